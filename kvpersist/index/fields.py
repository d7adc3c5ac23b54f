"""Fields of a record type: what a path leads to, how to get its value, and how to put that into a key."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable, Iterable
from datetime import datetime
from enum import Enum
from operator import attrgetter, itemgetter
from typing import Any, Final, cast
from uuid import UUID

import msgspec
from msgspec import inspect

from kvpersist import keys
from kvpersist.codec import described
from kvpersist.errors import BadKey, BadOption, BadRequest, Unencodable

__all__ = ["KINDS", "Field", "Part", "field_at", "getter", "key_parts", "returned_kind"]

KINDS: Final[dict[str, type]] = {
    "str": str,
    "int": int,
    "bool": bool,
    "float": float,
    "datetime": datetime,
    "UUID": UUID,
}
"""What a part of a key may be, by name."""

_SHORT: Final = keys.INDEX_LIMIT // 4  # characters that cannot be more bytes than an index value may have


class Field(msgspec.Struct):
    """What a path leads to; ``kind`` None: free-form data. ``optional``: there may be no value."""

    kind: type | None
    collection: bool = False
    optional: bool = False


class Part:
    """One part of an index or record key: how to get it out of a record, and into a key."""

    __slots__ = ("descending", "encode", "get", "kind", "label", "multi", "optional")

    def __init__(
        self,
        label: str,
        get: Callable[[Any], Any],
        kind: type,
        *,
        descending: bool = False,
        multi: bool = False,
        optional: bool = False,
        whole: bool = False,
    ) -> None:
        """``optional``: a record may have no value here. ``whole``: long text is not cut and hashed."""
        self.label, self.get, self.kind = label, get, kind
        self.descending, self.multi, self.optional = descending, multi, optional
        self.encode = _encoder(label, kind, descending, whole)

    def asked(self, value: Any) -> Any:
        """Return ``value`` of a query as this part's type. Raises BadRequest."""
        try:
            return _coerced(value, self.kind)
        except (TypeError, ValueError) as error:
            raise BadRequest(f"{self.label}={value!r}: it is indexed as {self.kind.__name__}") from error

    def of(self, record: Any) -> list[Any]:
        """Return the values this part has in ``record``: none, one, or a collection's elements."""
        value = self.get(record)
        if value is None or value is msgspec.UNSET:
            return []
        return [_coerced(each, self.kind) for each in (self.elements(value) if self.multi else (value,))]

    def elements(self, value: Any) -> list[Any]:
        """Return what a collection holds, None left out. Raises Unencodable."""
        if isinstance(value, (str, bytes, dict)) or not isinstance(value, Iterable):
            found = type(cast("object", value)).__name__
            raise Unencodable(self.label, f"a multi-valued index needs a collection, found {found}")
        return [each for each in cast("Iterable[Any]", value) if each is not None]


def key_parts(type_: type, key: str | tuple[str, ...]) -> tuple[Part, ...]:
    """Return how to make a record's key from its fields.

    Raises:
        BadOption: no such field, or one that cannot be part of a key.
    """
    names = (key,) if isinstance(key, str) else tuple(key)
    if not names:
        raise BadOption("key", "name at least one field")
    parts: list[Part] = []
    for name in names:
        found = field_at(type_, name, "key")
        if found.collection:
            raise BadOption("key", f"{name!r} is a collection")
        # the text of a plain dict's key cannot be told from an encoded number, so it has to be text
        parts.append(Part(name, getter(type_, name), found.kind or str, whole=True))
    return tuple(parts)


def field_at(type_: type, path: str, what: str) -> Field:
    """Follow ``path`` through the record type; ``what`` is declared over it, for the error.

    Raises:
        BadOption: no such field (the error lists those there are), or one that no key can hold.
    """
    at = described(type_)
    done: list[str] = []
    optional = False
    for step in path.split("."):
        at = _plain(at)
        fields = _fields(at)
        if fields is not None:
            if step not in fields:
                inside = f"{'.'.join(done)} of {type_.__name__}" if done else type_.__name__
                raise BadOption(what, f"{step!r} is no field of {inside}; fields: {', '.join(fields)}")
            optional |= isinstance(at, inspect.TypedDictType) and not fields[step].required
            at = fields[step].type
        elif isinstance(at, inspect.DictType):
            at, optional = at.value_type, True
        elif isinstance(at, inspect.AnyType):
            return Field(None, optional=True)
        else:
            raise BadOption(what, f"{'.'.join(done)!r} has no fields, so there is no {path!r}")
        optional |= _may_be_none(at)
        done.append(step)
    at = _plain(at)
    if isinstance(at, inspect.CollectionType):
        return Field(_kind(_plain(at.item_type), what, path), True, optional)
    if isinstance(at, inspect.TupleType):
        kinds = {_kind(_plain(item), what, path) for item in at.item_types}
        if len(kinds) == 1:
            return Field(kinds.pop(), True, optional)
    return Field(_kind(at, what, path), False, optional)


def _may_be_none(info: inspect.Type) -> bool:
    if isinstance(info, inspect.Metadata):
        return _may_be_none(info.type)
    return isinstance(info, (inspect.UnionType, inspect.AnyType, inspect.NoneType, inspect.LiteralType))


def _plain(info: inspect.Type) -> inspect.Type:
    """Leave out what does not decide the key: metadata, and None in a union."""
    if isinstance(info, inspect.Metadata):
        return _plain(info.type)
    if isinstance(info, inspect.UnionType):
        rest = [_plain(each) for each in info.types if not isinstance(each, inspect.NoneType)]
        if len(rest) == 1:
            return rest[0]
        if all(isinstance(each, (inspect.IntType, inspect.FloatType)) for each in rest):
            return inspect.FloatType()
    return info


def _fields(info: inspect.Type) -> dict[str, inspect.Field] | None:
    if isinstance(info, (inspect.StructType, inspect.DataclassType, inspect.TypedDictType, inspect.NamedTupleType)):
        return {field.name: field for field in info.fields}
    return None


def _kind(info: inspect.Type, what: str, path: str) -> type | None:
    match info:
        case inspect.AnyType():
            return None
        case inspect.StrType():
            return str
        case inspect.BoolType():
            return bool
        case inspect.IntType():
            return int
        case inspect.FloatType():
            return float
        case inspect.DateTimeType():
            return datetime
        case inspect.UUIDType():
            return UUID
        case inspect.EnumType():
            values = [member.value for member in info.cls]
        case inspect.LiteralType():
            values = list(info.values)
        case _:
            raise BadOption(what, f"{path!r} cannot be indexed; use a field of {', '.join(KINDS)}")
    kinds: set[type] = {type(value) for value in values if value is not None}
    if len(kinds) == 1 and (kind := kinds.pop()) in (str, int):
        return kind
    raise BadOption(what, f"{path!r} has values of several types")


def returned_kind(function: Callable[[Any], Any], multi: bool) -> type:
    """Return the annotated type of what a callable returns; text where it does not say."""
    try:
        returned = typing.get_type_hints(function).get("return", str)
    except (NameError, TypeError):
        return str
    choices = [each for each in typing.get_args(returned) or (returned,) if each is not type(None) and each is not ...]
    kinds = {each for each in choices if each in KINDS.values()}
    return kinds.pop() if len(kinds) == 1 and (multi or len(choices) == 1) else str


# ---- values


def getter(type_: type, path: str) -> Callable[[Any], Any]:
    """Return what gets the value at ``path`` out of a record."""
    steps = path.split(".")
    is_mapping = typing.is_typeddict(type_) or type_ is dict or typing.get_origin(type_) is dict
    if len(steps) == 1 and not is_mapping:
        return attrgetter(path)
    if is_mapping and len(steps) == 1:
        required: frozenset[str] = getattr(type_, "__required_keys__", frozenset())
        return itemgetter(path) if path in required else _Path(steps)
    return _Path(steps)


class _Path:
    """Follows ``meta.topic`` through attributes and mappings; None where it ends early."""

    __slots__ = ("_steps",)

    def __init__(self, steps: list[str]) -> None:
        self._steps = steps

    def __call__(self, record: Any) -> Any:
        at: Any = record
        for step in self._steps:
            if at is None or at is msgspec.UNSET:
                return None
            if isinstance(at, dict):
                at = typing.cast("dict[str, Any]", at).get(step)
            elif isinstance(at, msgspec.Struct) or dataclasses.is_dataclass(at):
                at = getattr(at, step)
            else:  # free-form data that is something else in this record
                return None
        return at


def _coerced(value: Any, kind: type) -> Any:
    """Return ``value`` as ``kind``: enum members by their value, an int for a float. Raises TypeError."""
    if isinstance(value, Enum):
        value = value.value
    if kind is float and type(value) is int:
        return float(value)
    if kind is UUID and isinstance(value, str):
        return UUID(value) if len(value) == 36 else _refused(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        return _refused(value)
    return value


def _refused(value: Any) -> Any:
    raise TypeError(type(value).__name__)


def _encoder(label: str, kind: type, descending: bool, whole: bool) -> Callable[[Any], str]:
    def encode(value: Any) -> str:
        if type(value) is not kind:
            try:
                value = _coerced(value, kind)
            except (TypeError, ValueError) as error:
                kept = "a" if whole else "indexed as"
                raise Unencodable(label, f"it is {kept} {kind.__name__}, found {type(value).__name__}") from error
        try:
            return keys.encode(value, descending)
        except BadKey as error:
            raise Unencodable(label, error.reason) from error

    def encode_text(value: Any) -> str:
        if type(value) is not str:
            try:
                value = str.__str__(_coerced(value, str))
            except TypeError as error:
                raise Unencodable(label, f"it is indexed as str, found {type(value).__name__}") from error
        try:
            part = keys.escape(value)
            return part if len(part) <= _SHORT else keys.index_text(value)[0]
        except BadKey as error:
            raise Unencodable(label, error.reason) from error

    return encode_text if kind is str and not whole else encode
