"""Records and values to bytes and back: the frame, the two codecs, schema versions.

A framed value is, for MessagePack and raw bytes::

    format byte | schema version, varint | CRC32, 4 bytes big-endian | payload

(a large value has the same frame around its `Manifest`, and around each of its pieces), and for JSON,
so that a file of it reads well, one ASCII line before indented text::

    kv1 json <schema version> <CRC32, 8 hex digits>
    {...}

The CRC covers the format, the schema version, the logical key and the payload: a value that was
flipped, cut or swapped with another key's is found, never returned.

Free-form values (``Any``, ``object``, ``dict[str, Any]`` and the like) are None, bool, int of any size,
float, text, bytes, aware datetimes (back in UTC), lists, and dicts with text keys. Subclasses of these
come back as the plain type; everything else is `Unencodable`. Both codecs give back alike: what JSON
has no form for is an object whose one key starts with ``$`` (``{"$bytes": "aGk="}``), and a user's
object that looks like one is put inside ``{"$dict": ...}``.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from typing import Any, Final, Generic, Literal, TypeAlias, TypeVar, cast, get_origin, is_typeddict
from zlib import crc32

import msgspec
import msgspec.inspect as inspect

from kvpersist._freeform import (
    DEPTH_LIMIT,
    FreeDict,
    Refused,
    Shapes,
    ext_hook,
    json_free,
    packed_free,
    untag,
)
from kvpersist.errors import BadOption, CorruptRecord, FormatMismatch, LargeValue, Unencodable

__all__ = [
    "DEPTH_LIMIT",
    "JSON",
    "LARGE",
    "MSGPACK",
    "RAW",
    "SCHEMA_LIMIT",
    "CodecName",
    "Framed",
    "Manifest",
    "RecordCodec",
    "Upcaster",
    "decode_plain",
    "described",
    "encode_plain",
    "frame",
    "manifest_of",
    "unframe",
]

R = TypeVar("R")
CodecName: TypeAlias = Literal["msgpack", "json"]
Upcaster: TypeAlias = Callable[[dict[str, Any]], dict[str, Any]]
"""Turns a stored record of one schema version into one of the next."""

RAW: Final = 0x01
MSGPACK: Final = 0x02
LARGE: Final = 0x03  # the payload is a Manifest, in JSON
JSON: Final = 0x6B  # the "k" of "kv1 json"
SCHEMA_LIMIT: Final = (1 << 24) - 1  # greatest schema version

_JSON_LINE: Final = re.compile(rb"kv1 json (0|[1-9][0-9]{0,7}) ([0-9a-f]{8})\n")
_PACK: Final = msgspec.msgpack.Encoder().encode
_UNPACK: Final = msgspec.msgpack.Decoder(ext_hook=ext_hook).decode
_JSON_ENCODE: Final = msgspec.json.Encoder().encode
_JSON_DECODE: Final = msgspec.json.Decoder().decode

# What msgspec raises for what it cannot encode, and for bytes that are not what is asked for.
_REFUSALS: Final = (ValueError, TypeError, OverflowError, RecursionError)


class Framed(msgspec.Struct, frozen=True, gc=False):
    """A frame taken apart: ``codec`` is RAW, MSGPACK, JSON or LARGE."""

    codec: int
    schema: int
    payload: bytes


class Manifest(msgspec.Struct, frozen=True):
    """What is stored at the key of a large value, whose pieces are elsewhere.

    Attributes:
        id: names the pieces; another for each time that a value is written.
        size: bytes of the whole. crc: CRC32 of the whole.
        piece: bytes of every piece but the last, which may be shorter.
        streamed: the pieces are one value of the driver's `Streams`, one after the other.
    """

    id: str
    size: int
    crc: int
    piece: int
    streamed: bool


_MANIFEST: Final = msgspec.json.Decoder(Manifest).decode


def frame(key: str, payload: bytes, codec: int, schema: int) -> bytes:
    """Return ``payload`` framed for ``key``.

    Args:
        key: one that `kvpersist.keys.check_key` lets pass.
        codec: RAW, MSGPACK, JSON or LARGE.
        schema: schema version, ``0 <= schema <= SCHEMA_LIMIT``.
    """
    crc = _crc(key, payload, codec, schema)
    if codec == JSON:
        return b"kv1 json %d %08x\n%b" % (schema, crc, payload)
    return _head(codec, schema) + crc.to_bytes(4, "big") + payload


def unframe(key: str, data: bytes) -> Framed:
    """Take the framed value of ``key`` apart.

    Raises:
        CorruptRecord: not a frame, or not the one that was written under ``key``.
    """
    codec = data[0] if data else -1
    if codec == JSON:
        line = _JSON_LINE.match(data)
        if line is None:
            raise CorruptRecord(key, "its first line is not that of a JSON value")
        schema, crc, payload = int(line[1]), int(line[2], 16), data[line.end() :]
    elif codec in (RAW, MSGPACK, LARGE):
        schema, start = _varint(key, data)
        crc, payload = int.from_bytes(data[start : start + 4], "big"), data[start + 4 :]
        if len(data) < start + 4:
            raise CorruptRecord(key, "cut off in its header")
    else:
        raise CorruptRecord(key, f"unknown format byte {codec}" if data else "empty")
    if _crc(key, payload, codec, schema) != crc:
        raise CorruptRecord(key, "checksum mismatch")
    return Framed(codec, schema, payload)


def encode_plain(key: str, value: Any, codec: CodecName, schema: int = 0) -> bytes:
    """Return a free-form value framed for ``key``.

    Raises:
        Unencodable: part of the value would not be given back as it is; ``path`` says which.
    """
    try:
        kept = json_free(value, 0) if codec == "json" else packed_free(value, 0)
    except Refused as refused:
        raise refused.public() from None
    try:
        payload = _json_text(kept) if codec == "json" else _PACK(kept)
    except _REFUSALS as error:
        raise _blamed(packed_free(value, 0), error, _PACK) from error
    return frame(key, payload, JSON if codec == "json" else MSGPACK, schema)


def decode_plain(key: str, data: bytes) -> Any:
    """Return the free-form value framed for ``key``; of a RAW frame, its bytes.

    Raises:
        CorruptRecord: not what was written under ``key``.
        LargeValue: it is written and read in pieces.
    """
    framed = unframe(key, data)
    if framed.codec == LARGE:
        raise LargeValue(key, manifest_of(key, framed).size)
    return framed.payload if framed.codec == RAW else _plain(key, framed)


def manifest_of(key: str, framed: Framed) -> Manifest:
    """Return the manifest of a large value.

    Raises:
        CorruptRecord: it is none.
    """
    try:
        return _MANIFEST(framed.payload)
    except msgspec.DecodeError as error:
        raise CorruptRecord(key, str(error)) from error


class RecordCodec(Generic[R]):
    """Records of one type to framed bytes and back.

    A record is written in ``codec`` under ``version``; either codec and every older version are read.
    What was written is always read back alike: a record is refused when a field does not have its
    declared type, even where that type would do after a conversion (a tuple for a list).

    In an upcaster the fields of a record that was stored as JSON are as JSON holds them: the times,
    bytes and UUIDs of typed fields are text there. Free-form values are always themselves.
    """

    def __init__(
        self,
        type_: type[R],
        *,
        codec: CodecName = "msgpack",
        version: int = 1,
        upcasters: Mapping[int, Upcaster] | None = None,
    ) -> None:
        """Prepare to keep records of ``type_``: a Struct, a dataclass, a TypedDict, or ``dict``.

        Args:
            upcasters: at ``n`` the step from schema version n to n + 1; a version without one
                changed nothing that needs a step.

        Raises:
            BadOption: ``codec``, ``version`` or ``upcasters`` make no sense.
            Unencodable: a field of a type that cannot be kept, named by ``path``.
        """
        self._steps = dict(upcasters or {})
        if codec not in ("msgpack", "json"):
            raise BadOption("codec", f"{codec!r} is neither 'msgpack' nor 'json'")
        if not 1 <= version <= SCHEMA_LIMIT:
            raise BadOption("version", f"{version} is not from 1 to {SCHEMA_LIMIT}")
        for step in self._steps:
            if not 0 <= step < version:
                raise BadOption("upcasters", f"there is no step from {step}: the version is {version}")
        self._type, self._version = type_, version
        self._class: type[Any] = dict if is_typeddict(type_) else get_origin(type_) or type_
        self._info = _record_info(type_)
        try:
            packed = _Packed(type_, self._info)
            self._formats: dict[int, _Packed | _Text] = {MSGPACK: packed, JSON: _Text(type_, self._info, packed)}
        except Refused as refused:
            raise refused.public() from None
        self._codec = JSON if codec == "json" else MSGPACK
        self._write = self._formats[self._codec].write
        # The hot paths' own copies: records of this version.
        self._text_read = self._formats[JSON].read
        self._text_head = b"kv1 json %d " % version
        self._text_start = len(self._text_head) + 9
        self._text_seed = _seed(JSON, version)
        self._packed_read = packed.read
        self._packed_head = _head(MSGPACK, version)
        self._packed_start = len(self._packed_head) + 4
        self._packed_seed = _seed(MSGPACK, version)

    def encode(self, key: str, record: R) -> bytes:
        """Return ``record`` framed for ``key``.

        Raises:
            Unencodable: not a record of this type, a field with another type than declared, or a
                free-form value that would not be given back as it is; ``path`` says where.
        """
        if type(record) is not self._class:
            self._refuse(record)
        return self.framed(key, self._write(record))

    def framed(self, key: str, payload: bytes) -> bytes:
        """Return ``payload``, a record of this version that was made elsewhere, framed for ``key``."""
        if self._codec != MSGPACK:
            return frame(key, payload, self._codec, self._version)
        crc = crc32(payload, crc32(key.encode(), self._packed_seed))
        return self._packed_head + crc.to_bytes(4, "big") + payload

    def decode(self, key: str, data: bytes) -> R:
        """Return the record framed for ``key``.

        Fields that only a newer version knows are left out; see `encode_keeping`.

        Raises:
            CorruptRecord: not what was written under ``key``, or not a record of this type.
            FormatMismatch: a newer version wrote it and this one cannot read it.
            Exception: whatever an upcaster raises, with a note that names it.
        """
        if data.startswith(self._packed_head):
            start = self._packed_start
            payload = data[start:]
            if crc32(payload, crc32(key.encode(), self._packed_seed)) == int.from_bytes(data[start - 4 : start], "big"):
                try:
                    return self._packed_read(payload)
                except _REFUSALS as error:
                    raise CorruptRecord(key, str(error)) from error
        elif data.startswith(self._text_head):
            payload = data[self._text_start :]
            crc = crc32(payload, crc32(key.encode(), self._text_seed))
            if data.startswith(b"%08x\n" % crc, self._text_start - 9):
                try:
                    return self._text_read(payload)
                except _REFUSALS as error:
                    raise CorruptRecord(key, str(error)) from error
        return self._decode(key, unframe(key, data))

    def decode_newer(self, key: str, data: bytes) -> dict[str, Any] | None:
        """Return all that is stored, as a plain dict, if a newer schema version wrote it; None otherwise.

        Raises:
            CorruptRecord: not what was written under ``key``.
        """
        framed = unframe(key, data)
        return _plain_dict(key, framed) if framed.schema > self._version else None

    def encode_keeping(self, key: str, record: R, newer: bytes) -> bytes:
        """Return ``record`` framed for ``key`` with the fields of ``newer`` that this version does not know.

        Fields of inner records are kept too: those below a field or a mapping's key, and those in a
        list whose item at the same position is otherwise unchanged; not those in a union of several
        record types. The result has the schema version and the codec of ``newer``.

        Args:
            newer: what is stored under ``key``, written by a newer schema version.

        Raises:
            Unencodable: as `encode`.
            CorruptRecord: ``newer`` is not what was written under ``key``.
        """
        framed = unframe(key, newer)
        if framed.schema <= self._version:
            return self.encode(key, record)
        if type(record) is not self._class:
            self._refuse(record)
        format_ = self._format_of(key, framed)
        payload = format_.write(record)
        try:
            payload = _merged(self._info, format_, payload, framed.payload)
        except _REFUSALS as error:
            raise CorruptRecord(key, str(error)) from error
        return frame(key, payload, framed.codec, framed.schema)

    def _decode(self, key: str, framed: Framed) -> R:
        format_ = self._format_of(key, framed)
        steps = [step for step in sorted(self._steps) if step >= framed.schema]
        if steps:
            return self._upcast(key, framed, steps)
        try:
            return format_.read(framed.payload)
        except _REFUSALS as error:
            if framed.schema <= self._version:
                raise CorruptRecord(key, str(error)) from error
            found, known = f"schema version {framed.schema} ({error})", f"at most {self._version}"
            raise FormatMismatch(key, found, known) from error

    def _upcast(self, key: str, framed: Framed, steps: Iterable[int]) -> R:
        value = _plain_dict(key, framed)
        for step in steps:
            try:
                value = self._steps[step](value)
                if type(value) is not dict:
                    raise TypeError("an upcaster returns a dict")
            except Exception as error:  # a mistake in the caller's code is no damage to the record
                error.add_note(f"kvpersist: in the upcaster from schema version {step}, for {key!r}")
                raise
        try:
            return msgspec.convert(value, self._type, str_keys=framed.codec == JSON)
        except _REFUSALS as error:
            raise CorruptRecord(key, f"after the upcasters from version {framed.schema}: {error}") from error

    def _format_of(self, key: str, framed: Framed) -> _Packed | _Text:
        if framed.codec in (RAW, LARGE):
            raise CorruptRecord(key, "raw bytes, not a record")
        return self._formats[framed.codec]

    def _refuse(self, record: Any) -> None:
        """Refuse what is not exactly a record: an instance of a subclass would lose what it adds."""
        if self._class is not dict or not isinstance(record, dict):
            raise Unencodable("", f"a {type(record).__name__} is not a {self._class.__name__}")


class _Packed:
    """Records of one type as MessagePack."""

    def __init__(self, type_: Any, info: inspect.Type) -> None:
        self._shape = Shapes(json=False).of(info)
        self._all_free = isinstance(self._shape, FreeDict)
        self.read: Callable[[bytes], Any] = msgspec.msgpack.Decoder(type_, ext_hook=ext_hook).decode
        self.plain = _UNPACK
        self.raw_fields = msgspec.msgpack.Decoder(dict[str, msgspec.Raw]).decode
        self.raw_items = msgspec.msgpack.Decoder(list[msgspec.Raw]).decode
        self.join = _PACK

    def write(self, record: Any) -> bytes:
        """Return the payload, once it has been read back alike."""
        kept = record
        if self._shape is not None:
            try:
                kept = self._shape.write(record, 0, packed_free)
            except Refused as refused:
                raise refused.public() from None
        try:
            payload = _PACK(kept)
        except _REFUSALS as error:
            raise _blamed(kept, error, _PACK) from error
        if self._all_free:
            return payload
        try:
            found = self.read(payload)
        except _REFUSALS as error:
            raise _mistyped(error) from error
        if found != record:
            _compare(record, found)
        return payload


class _Text:
    """Records of one type as JSON. What MessagePack does not keep, this does not either."""

    def __init__(self, type_: Any, info: inspect.Type, packed: _Packed) -> None:
        self._shape = Shapes(json=True).of(info)
        self._packed = packed
        self._read: Callable[[bytes], Any] = msgspec.json.Decoder(type_).decode
        self.read: Callable[[bytes], Any] = self._read if self._shape is None else self._shaped
        self.raw_fields = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
        self.raw_items = msgspec.json.Decoder(list[msgspec.Raw]).decode
        self.join = _json_text

    def write(self, record: Any) -> bytes:
        """Return the payload, once it has been read back."""
        self._packed.write(record)
        kept = record
        if self._shape is not None:
            try:
                kept = self._shape.write(record, 0, json_free)
            except Refused as refused:
                raise refused.public() from None
        try:
            payload = _json_text(kept)
        except _REFUSALS as error:
            raise _blamed(kept, error, _JSON_ENCODE) from error
        try:
            found = self._read(payload)
        except _REFUSALS as error:
            raise _mistyped(error) from error
        if found != kept:  # e.g. NaN, which msgspec writes as null
            _compare(kept, found)
        return payload

    def _shaped(self, payload: bytes) -> Any:
        assert self._shape is not None
        return self._shape.read(self._read(payload))

    def plain(self, payload: bytes) -> Any:
        return untag(_JSON_DECODE(payload))


# --- Frames ----------------------------------------------------------------------------------------------------------


def _seed(codec: int, schema: int) -> int:
    """Where the CRC starts: another place for each codec and schema version."""
    return codec << 24 | schema


def _crc(key: str, payload: bytes, codec: int, schema: int) -> int:
    return crc32(payload, crc32(key.encode(), _seed(codec, schema)))


def _head(codec: int, schema: int) -> bytes:
    head = bytearray((codec,))
    while schema > 0x7F:
        head.append(schema & 0x7F | 0x80)
        schema >>= 7
    head.append(schema)
    return bytes(head)


def _varint(key: str, data: bytes) -> tuple[int, int]:
    """Return the schema version after the format byte, and where it ends."""
    schema = 0
    for at, byte in enumerate(data[1:5]):
        schema |= (byte & 0x7F) << 7 * at
        if byte < 0x80:
            if schema <= SCHEMA_LIMIT and (byte or at == 0):  # a last byte of zero is another spelling
                return schema, at + 2
            break
    raise CorruptRecord(key, "no schema version in its header")


# --- Payloads --------------------------------------------------------------------------------------------------------


def _json_text(value: Any) -> bytes:
    return msgspec.json.format(_JSON_ENCODE(value), indent=2)


def _plain(key: str, framed: Framed) -> Any:
    try:
        return _UNPACK(framed.payload) if framed.codec == MSGPACK else untag(_JSON_DECODE(framed.payload))
    except _REFUSALS as error:
        raise CorruptRecord(key, str(error)) from error


def _plain_dict(key: str, framed: Framed) -> dict[str, Any]:
    value = None if framed.codec in (RAW, LARGE) else _plain(key, framed)
    if type(value) is not dict:
        raise CorruptRecord(key, "not a record")
    return cast("dict[str, Any]", value)


@lru_cache(maxsize=256)
def described(type_: Any) -> inspect.Type:
    """Return what msgspec knows of a record type; dear, and asked often when a collection is declared."""
    return inspect.type_info(type_)


def _record_info(type_: Any) -> inspect.Type:
    """Describe a record type, or refuse it."""
    try:
        info = described(type_)
        msgspec.msgpack.Decoder(type_)
    except (TypeError, NameError) as error:
        raise Unencodable("", f"{type_!r} is not a record type: {error}") from error
    if isinstance(info, inspect.StructType) and info.array_like:
        raise Unencodable("", f"{type_.__name__} is array_like, and records are kept by the names of their fields")
    if isinstance(info, inspect.DictType):
        if info.key_type in (inspect.AnyType(), inspect.StrType()) and info.value_type in _ANY:
            return info
        raise Unencodable("", f"{type_!r} is not a record type: use dict[str, Any]")
    if not isinstance(info, inspect.StructType | inspect.DataclassType | inspect.TypedDictType):
        raise Unencodable("", f"{type_!r} is not a record type: use a Struct, a dataclass, a TypedDict or dict")
    return info


_ANY: Final = (inspect.AnyType(), inspect.CustomType(object))


# --- Why a record cannot be kept (none of this runs for one that can) ------------------------------------------------


def _parts(value: Any) -> Iterable[tuple[Any, Any]]:
    """Give the parts of a container or record, each after the step that leads to it."""
    if isinstance(value, msgspec.Struct):
        found = [(name, getattr(value, name)) for name in value.__struct_fields__]
        return [(name, item) for name, item in found if item is not msgspec.UNSET]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [(field.name, getattr(value, field.name, None)) for field in dataclasses.fields(value)]
    if isinstance(value, dict):
        return list(cast("dict[Any, Any]", value).items())
    return enumerate(cast("list[Any]", value)) if isinstance(value, list | tuple | set | frozenset) else ()


def _blamed(value: Any, error: Exception, encode: Callable[[Any], bytes]) -> Unencodable:
    """Find the innermost part that ``encode`` refuses."""
    steps: list[Any] = []
    found = True
    while found:
        found = False
        for step, item in _parts(value):
            try:
                encode(item)
            except _REFUSALS as inner:
                error, value = inner, item
                found = not isinstance(inner, RecursionError)  # a list within itself has no innermost part
                steps.append(step)
                break
    refused = Refused(_reason(error))
    refused.steps = steps[::-1]
    return refused.public()


def _reason(error: Exception) -> str:
    if isinstance(error, UnicodeEncodeError):
        return "text with a lone surrogate, which has no UTF-8 form: replace it"
    return "too deep" if isinstance(error, RecursionError) else str(error)


def _mistyped(error: Exception) -> Unencodable:
    """Tell what the decoder found, and where."""
    reason, _, where = str(error).partition(" - at `")
    return Unencodable(where.rstrip("`").replace("$.", "").replace("$", ""), reason or "too deep")


def _compare(before: Any, after: Any) -> None:
    """Refuse a record that comes back as another. NaN, and classes without equality, go by what they hold.

    Raises:
        Unencodable: ``path`` leads to the first part that differs.
    """
    try:
        _compare_parts(before, after)
    except Refused as refused:
        raise refused.public() from None


def _compare_parts(before: Any, after: Any) -> None:
    if before == after or (before != before and after != after):
        return
    if type(before) is not type(after):
        raise Refused(f"a {type(before).__name__}, which would come back as {type(after).__name__}")
    parts, others = dict(_parts(before)), dict(_parts(after))
    if not parts or parts.keys() != others.keys() or isinstance(before, set | frozenset):
        raise Refused("it would not come back as it is")
    for step, item in parts.items():
        try:
            _compare_parts(item, others[step])
        except Refused as refused:
            refused.steps.append(step)
            raise


# --- Fields that only a newer version knows --------------------------------------------------------------------------


def _only_record(info: inspect.Type) -> inspect.StructType | inspect.DataclassType | inspect.TypedDictType | None:
    """Return the one record type in ``info``, None if there is none or a choice."""
    kinds = (inspect.StructType, inspect.DataclassType, inspect.TypedDictType)
    types = info.types if isinstance(info, inspect.UnionType) else (info,)
    found = [type_ for type_ in types if isinstance(type_, kinds)]
    if len(found) != 1 or (isinstance(found[0], inspect.StructType) and found[0].array_like):
        return None
    return found[0]


def _known(record: inspect.StructType | inspect.DataclassType | inspect.TypedDictType) -> dict[str, inspect.Type]:
    known = {field.encode_name: field.type for field in record.fields}
    if isinstance(record, inspect.StructType) and record.tag_field is not None:
        known[record.tag_field] = inspect.AnyType()
    return known


def _merged(info: inspect.Type, format_: _Packed | _Text, mine: bytes, theirs: bytes) -> bytes:
    """Return ``mine`` with those fields of ``theirs`` that ``info`` does not know."""
    record = _only_record(info)
    if record is not None:
        known = _known(record)
        own, others = format_.raw_fields(mine), format_.raw_fields(theirs)
        for name in own.keys() & others.keys() & known.keys():
            own[name] = msgspec.Raw(_merged_inside(known[name], format_, own[name], others[name]))
        return format_.join(own | {name: raw for name, raw in others.items() if name not in known})
    for inner in info.types if isinstance(info, inspect.UnionType) else (info,):
        if isinstance(inner, inspect.DictType) and _only_record(inner.value_type) is not None:
            own, others = format_.raw_fields(mine), format_.raw_fields(theirs)
            for name in own.keys() & others.keys():
                own[name] = msgspec.Raw(_merged_inside(inner.value_type, format_, own[name], others[name]))
            return format_.join(own)
        if isinstance(inner, inspect.ListType) and (record := _only_record(inner.item_type)) is not None:
            return _merged_list(_known(record).keys(), format_, mine, theirs)
    return mine


def _merged_inside(info: inspect.Type, format_: _Packed | _Text, mine: bytes, theirs: bytes) -> bytes:
    try:
        return _merged(info, format_, mine, theirs)
    except msgspec.DecodeError:  # one of the two is null, or another member of a union
        return mine


def _merged_list(known: Iterable[str], format_: _Packed | _Text, mine: bytes, theirs: bytes) -> bytes:
    """Keep an item of ``theirs`` whole where all that is known of it is unchanged."""
    own, others = format_.raw_items(mine), format_.raw_items(theirs)
    for at, (raw, other) in enumerate(zip(own, others, strict=False)):
        before, after = format_.plain(other), format_.plain(raw)
        if isinstance(before, dict) and after == {name: before[name] for name in known if name in before}:
            own[at] = other
    return format_.join(own)
