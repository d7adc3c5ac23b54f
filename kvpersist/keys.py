"""Key grammar: names, escaping, parts that keep their order, prefixes and their ends.

A record lies at ``ns:collection:`` + parts joined by ``!``, an index entry at
``ns:collection#index:`` + parts. In a part each code point up to ``%`` becomes ``%XX``, so ``!`` and
``#`` never occur in one, distinct tuples never share a key, and the byte order of the keys is the
order of the tuples. UUIDs, ``-``, ``.``, ``/``, ``:``, ``*`` and other text stay readable.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from hashlib import blake2b
from math import isnan
from typing import Any, Final, Literal, TypeAlias, TypeVar, cast
from uuid import UUID

from kvpersist.errors import BadKey, KeyTooLong

__all__ = [
    "ID_LIMIT",
    "INDEX_LIMIT",
    "KEY_LIMIT",
    "LOCKS",
    "NAMESPACE_LIMIT",
    "MetaKind",
    "Part",
    "check_key",
    "check_name",
    "decode",
    "encode",
    "escape",
    "index_prefix",
    "index_text",
    "join",
    "meta_key",
    "meta_prefix",
    "namespace",
    "partition",
    "prefix_end",
    "record_prefix",
    "unescape",
]

Part: TypeAlias = str | int | bool | float | datetime | UUID
"""What one part of a key may be. A UUID is kept as its text."""
MetaKind: TypeAlias = Literal["def", "stat", "birth", "deleting"]
"""Names after ``#`` that no index may have."""

P = TypeVar("P", str, int, bool, float, datetime, UUID)

KEY_LIMIT: Final = 512  # UTF-8 bytes of a whole key
ID_LIMIT: Final = 160  # UTF-8 bytes of a record's encoded, joined key parts
INDEX_LIMIT: Final = 160  # UTF-8 bytes of one encoded index value; longer text is cut and hashed
NAMESPACE_LIMIT: Final = 64  # UTF-8 bytes of an encoded namespace
LOCKS: Final = "#lock"  # what stands for the collection in the keys of locks; no collection has such a name
_CUT: Final = 120  # UTF-8 bytes kept of text over INDEX_LIMIT
_HASHED: Final = "%~"  # no escaped text contains it, so cut text never meets whole text
_COMPLEMENTS: Final = str.maketrans("0123456789abcdef", "fedcba9876543210")  # the digits of n to those of ~n
_INT_DIGITS: Final = 64  # hex digits; the length character of more would fall below '%'

_META: Final = frozenset(("def", "stat", "birth", "deleting"))
_NAME: Final = re.compile(r"[a-z0-9_.-]{1,64}")
_SPECIAL: Final = re.compile("[^&-\ud7ff\ue000-\U0010ffff]")  # what is plain comes first in the class: faster
_ESCAPES: Final = {code: f"%{code:02X}" for code in range(0x26)}
_ESCAPED: Final = re.compile("%(..?)?|[\x00-$\ud800-\udfff]", re.DOTALL)
_UNESCAPES: Final = {escape: chr(code) for code, escape in _ESCAPES.items()} | {"%3A": ":"}

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_FIRST_MOMENT: Final = -62_135_596_800_000_000  # microseconds of year 1 and the end of year 9999, UTC
_LAST_MOMENT: Final = 253_402_300_799_999_999
_SIGN: Final = 1 << 63
_ALL_BITS: Final = (1 << 64) - 1
_DOUBLE: Final = struct.Struct(">d")
_BITS: Final = struct.Struct(">Q")


def check_name(name: str, what: str) -> str:
    """Return ``name`` if it can name a collection or an index (``what`` says which, for the error).

    Raises:
        BadKey: not 1 to 64 characters of ``a-z 0-9 _ . -``.
    """
    if not isinstance(cast(Any, name), str) or not _NAME.fullmatch(name):
        raise BadKey(name, f"a {what} has 1 to 64 characters of a-z 0-9 _ . -")
    return name


def escape(text: str) -> str:
    """Return ``text`` as one part of a key: code points up to ``%`` become ``%XX``.

    Example:
        >>> escape("50% off!")
        '50%25%20off%21'

    Raises:
        BadKey: a lone surrogate, which has no UTF-8 form.
    """
    found = _SPECIAL.search(text)
    if found is None:
        return text
    if not text.isascii():
        _refuse_surrogates(text)
    return text.translate(_ESCAPES)


def unescape(part: str) -> str:
    """Return the text of an escaped part or namespace.

    Raises:
        BadKey: no text escapes to ``part``.
    """
    if _SPECIAL.search(part) is None:
        return part

    def text_of(match: re.Match[str]) -> str:
        text = _UNESCAPES.get(match[0])
        if text is None:
            raise BadKey(part, f"{match[0]!r} does not occur in an escaped part")
        return text

    return _ESCAPED.sub(text_of, part)


def encode(value: Part, descending: bool = False) -> str:
    """Return one part of a key; the order of parts of one type is the order of their values.

    Integers have up to 256 bits. An aware datetime counts as its UTC microseconds, True as 1,
    ``-0.0`` as ``0.0``. Parts of different types do not compare; use one type per position.

    Args:
        descending: greater values come first; not for text and UUIDs.

    Example:
        >>> encode(255), encode(-1), encode(255, descending=True)
        ('iff', 'ff', 'e00')

    Raises:
        BadKey: another type, a naive datetime, NaN, an integer over 256 bits, a lone surrogate,
            or descending text.
    """
    if type(value) is int:
        return _int_part(~value if descending else value)
    if isinstance(value, datetime):
        return _moment_part(value, descending)
    if isinstance(value, (str, UUID)):
        if descending:
            raise BadKey(value, "text has no descending order: order by a number or a time")
        return escape(str.__str__(value) if isinstance(value, str) else str(value))
    if type(value) is bool:
        return "1" if value is not descending else "0"
    if isinstance(value, int):
        return _int_part(~int(value) if descending else int(value))
    if isinstance(cast(Any, value), float):
        return _float_part(value, descending)
    raise BadKey(value, f"{type(value).__name__} cannot be part of a key: use str, int, float, bool, datetime or UUID")


def decode(part: str, type_: type[P], descending: bool = False) -> P:
    """Return the value that `encode` made ``part`` of; a datetime comes back in UTC.

    Raises:
        BadKey: ``part`` is not what `encode` gives for a ``type_``.
    """
    value: Any = None
    try:
        if type_ is str:
            value = unescape(part)
        elif type_ is UUID:
            value = UUID(part)
        elif type_ is bool:
            value = {"0": descending, "1": not descending}[part]
        elif type_ is int:
            value = _int_of(part, descending)
        elif type_ is datetime:
            value = _EPOCH + timedelta(microseconds=_int_of(part, descending))
        elif type_ is float:
            value = _float_of(part, descending)
        else:
            raise BadKey(part, f"no part of a key is a {type_.__name__}")
        if encode(value, descending) != part:  # another spelling of the value, e.g. a superfluous zero
            raise ValueError(part)
    except BadKey:
        raise
    except (ValueError, KeyError, IndexError, OverflowError, struct.error) as error:
        raise BadKey(part, f"not an encoded {type_.__name__}") from error
    return value


def join(parts: Iterable[str]) -> str:
    """Join parts that are encoded already."""
    return "!".join(parts)


def prefix_end(prefix: str) -> str | None:
    """Return the first key after all that start with ``prefix``; None: there is no bound.

    Example:
        >>> prefix_end("kv:session:")
        'kv:session;'
    """
    head = prefix.rstrip("\U0010ffff")
    if not head:
        return None
    last = ord(head[-1])
    return head[:-1] + ("\ue000" if last == 0xD7FF else chr(last + 1))  # surrogates have no UTF-8 form


def partition(key: str) -> str:
    """Return the text before the first ``:``, which decides where a partitioned backend keeps the key."""
    head, colon, _ = key.partition(":")
    return head if colon else ""


def namespace(text: str) -> str:
    """Return ``text`` escaped as a namespace, ``:`` included; `unescape` gives it back.

    Raises:
        BadKey: empty, over 64 bytes once escaped, or with a lone surrogate.
    """
    if not isinstance(cast(Any, text), str) or not text:
        raise BadKey(text, "a namespace is a text that is not empty")
    escaped = escape(text).replace(":", "%3A")  # otherwise "a:b" would reach into namespace "a"
    if _size(escaped) > NAMESPACE_LIMIT:
        raise BadKey(text, f"a namespace has at most {NAMESPACE_LIMIT} bytes encoded, this one {_size(escaped)}")
    return escaped


def record_prefix(ns: str, collection: str) -> str:
    """Return ``ns:collection:``; ``ns`` comes from `namespace`."""
    return f"{ns}:{collection}:"


def index_prefix(ns: str, collection: str, index: str) -> str:
    """Return ``ns:collection#index:``.

    Raises:
        BadKey: ``index`` is one of the reserved names def, stat, birth, deleting.
    """
    if index in _META:
        raise BadKey(index, "this name is reserved: give the index another")
    return f"{ns}:{collection}#{index}:"


def meta_key(ns: str, collection: str, kind: MetaKind) -> str:
    """Return ``ns:collection#kind``, of which a collection has one."""
    return f"{ns}:{collection}#{kind}"


def meta_prefix(ns: str, collection: str, kind: MetaKind) -> str:
    """Return ``ns:collection#kind:``, below which each record has its own."""
    return f"{ns}:{collection}#{kind}:"


def check_key(key: str, limit: int | None = KEY_LIMIT) -> None:
    """Refuse what is not a key: any text will do that is not empty and not over ``limit`` bytes of UTF-8.

    Raises:
        BadKey: not text, empty, or with a lone surrogate.
        KeyTooLong: over ``limit`` bytes.
    """
    if not isinstance(cast(Any, key), str) or not key:
        raise BadKey(key, "a key is a text that is not empty")
    size = _size(key)
    if limit is not None and size > limit:
        raise KeyTooLong(key, size, limit)


def index_text(value: str) -> tuple[str, bool]:
    """Return ``value`` as a part of an index key, and whether it was cut.

    Text over 160 encoded bytes is cut to at most 120 and given its hash: good for equality, to be
    checked again on the record, and without order.

    Raises:
        BadKey: a lone surrogate.
    """
    part = escape(value)
    if len(part) <= 40 or _size(part) <= INDEX_LIMIT:  # no code point takes more than 4 bytes
        return part, False
    data = part.encode()
    head = data[:_CUT].decode(errors="ignore")
    cut = head.rfind("%", -2)
    if cut >= 0:
        head = head[:cut]
    return f"{head}{_HASHED}{blake2b(data, digest_size=16).hexdigest()}", True


@lru_cache(1024)  # the same numbers come again and again
def _int_part(number: int) -> str:
    if number >= 0:
        text = f"{number:x}"
        if len(text) <= _INT_DIGITS:
            return chr(103 + len(text)) + text
    else:
        text = f"{~number:x}"
        if len(text) <= _INT_DIGITS:
            return chr(103 - len(text)) + text.translate(_COMPLEMENTS)
    raise BadKey(number, "an integer in a key has at most 256 bits")


def _int_of(part: str, descending: bool) -> int:
    digits = ord(part[0]) - 103
    number = int(part[1:], 16)
    if digits < 0:
        number -= 1 << -4 * digits
    return ~number if descending else number


def _float_part(value: float, descending: bool) -> str:
    if isnan(value):
        raise BadKey(value, "NaN has no place in an order")
    (bits,) = _BITS.unpack(_DOUBLE.pack(value + 0.0))  # -0.0 + 0.0 is 0.0
    bits = bits ^ _ALL_BITS if bits & _SIGN else bits | _SIGN
    return f"{bits ^ _ALL_BITS if descending else bits:016x}"


def _float_of(part: str, descending: bool) -> float:
    bits = int(part, 16) ^ (_ALL_BITS if descending else 0)
    bits = bits ^ _SIGN if bits & _SIGN else bits ^ _ALL_BITS
    return _DOUBLE.unpack(_BITS.pack(bits))[0]


_latest = _EPOCH, False, "h0"  # the time encoded last, in which order, and what came of it


def _moment_part(value: datetime, descending: bool) -> str:
    global _latest
    moment, order, part = _latest  # in one step: other threads write it too
    if moment is not value or order is not descending:  # else: another index of the record has the same time
        number = _microseconds(value)
        part = _int_part(~number if descending else number)
        _latest = value, descending, part
    return part


def _microseconds(value: datetime) -> int:
    try:
        since = value - _EPOCH
    except TypeError as error:
        raise BadKey(value, "a time in a key has a zone: use datetime.now(UTC)") from error
    moment = (since.days * 86_400 + since.seconds) * 1_000_000 + since.microseconds
    if not _FIRST_MOMENT <= moment <= _LAST_MOMENT:  # e.g. datetime.max west of Greenwich
        raise BadKey(value, "this time has no form in UTC")
    return moment


def _size(text: str) -> int:
    """UTF-8 bytes of ``text``."""
    if text.isascii():
        return len(text)
    _refuse_surrogates(text)
    return len(text.encode())


def _refuse_surrogates(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadKey(text, "a lone surrogate has no UTF-8 form: replace it") from error
