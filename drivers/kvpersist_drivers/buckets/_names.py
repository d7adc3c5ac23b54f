r"""What a key is called in a bucket: names in the order of the keys, safe on every service.

Each code point has a code. No code begins another one, and codes are in the order of their code points by
UTF-8 as well as by UTF-16, so names sort as keys do whichever of the two a service sorts by:

=====================  =====================================================
up to U+0020           a space and two hex digits
``.`` and ``/``        ``.1`` and ``.2``
``[`` and ``\``        ``[1`` and ``[2``
``~`` to U+009F        ``~`` and two hex digits
U+E000 and above       U+FF5E and four digits of base 64, in ASCII order
every other one        itself
=====================  =====================================================

A name is cut by ``.0/`` wherever 200 bytes have passed and more follows: a service on a file system keeps
no longer parts. As the place of a cut depends on what stands before it alone, the order stays.
"""

from __future__ import annotations

import re
from typing import Final

from kvpersist.errors import BadKey

__all__ = [
    "INTERNAL",
    "INTERNAL_BYTES",
    "MAX_NAME",
    "before",
    "behind",
    "escaped",
    "followed",
    "internal",
    "noted",
    "unescaped",
]

MAX_NAME: Final = 1024
"""Bytes of an object's name that every service keeps."""

INTERNAL: Final = ".0/"
"""What begins the names of objects that are no entries: no escaped key begins so."""

INTERNAL_BYTES: Final = 17
"""How much longer than an escaped key the name of what is noted of it is."""

_PART: Final = 200  # bytes after which a name is cut
_CUT: Final = ".0/"
_DIGITS: Final = "-0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ_abcdefghijklmnopqrstuvwxyz"
_HIGH: Final = "\uff5e"
_ABOVE: Final = "\uffe5"  # above all that stands in names
_PLAIN: Final = re.compile(r"[!-\-0-Z\]-}\xa0-\ud7ff]*")
_CODE: Final = re.compile(rf"\.0/| ([01][0-9a-f]|20)|([.\[])([12])|~([0-9a-f]{{2}})|{_HIGH}([{_DIGITS[1:]}-]{{4}})")
_INTERNAL: Final = re.compile(r"\.0/([0-9a-f]{12})-([a-z])(.*)", re.DOTALL)
_PAIRS: Final = {".1": ".", ".2": "/", "[1": "[", "[2": "\\"}


class _Codes(dict[int, str]):
    """Code point -> code, those that are themselves and the many high ones made when asked for."""

    def __missing__(self, point: int) -> str:
        if point < 0xD800:
            return chr(point)
        if point < 0xE000:
            raise BadKey(chr(point), "no UTF-8 text: it holds a lone surrogate")
        return _HIGH + "".join(_DIGITS[point >> shift & 63] for shift in (18, 12, 6, 0))


_CODES: Final = _Codes(
    {point: f" {point:02x}" for point in range(0x21)}
    | {ord(char): code for code, char in _PAIRS.items()}
    | {point: f"~{point:02x}" for point in range(0x7E, 0xA0)}
)


def escaped(key: str) -> str:
    """Return the name of a key.

    Example:
        >>> escaped("app:a/b.c"), escaped("../x y")
        ('app:a.2b.1c', '.1.1.2x 20y')

    Raises:
        BadKey: it is empty, or holds a lone surrogate.
    """
    if not key:
        raise BadKey(key, "an empty key has no name in a bucket")
    name = key if _PLAIN.fullmatch(key) else key.translate(_CODES)
    return name if len(name) * 3 <= _PART else _cut(key)


def unescaped(name: str) -> str | None:
    """Return the key that has this name; None where no key has."""
    if len(name) * 3 <= _PART and _PLAIN.fullmatch(name):
        return name or None
    try:
        key = _CODE.sub(_decoded, name)
        return key if escaped(key) == name else None
    except ValueError:  # a number beyond Unicode, or a surrogate
        return None


def before(name: str) -> str:
    """Return what a listing starts after so that ``name`` comes first, should it be there, and nothing smaller."""
    previous = followed(name)
    if previous is not None:
        return previous
    last = ord(name[-1]) - 1
    nearest = {0x2F: ".", 0x5C: "["}.get(last) or ("~" if 0x7E < last < 0xA0 else chr(last))
    return name[:-1] + nearest + _ABOVE


def followed(name: str) -> str | None:
    """Return the name that ``name`` comes right behind, if it was made so: by `behind`, or of a key and a NUL."""
    if name.endswith(" "):
        return name[:-1]
    return name[:-3] if name.endswith(" 00") else None


def behind(name: str) -> str:
    """Return the first name that may come after ``name``."""
    return name + " "


def internal(due_ms: int, kind: str, rest: str) -> str:
    """Return the name, below the prefix, of an object that `compact` looks at from ``due_ms`` on.

    Its ``kind`` says what it is: ``k``, a note that the entry of ``rest`` may have to be removed; ``p``, left by a
    probe, and ``t``, by an interrupted write: both are removed.
    """
    return f"{INTERNAL}{due_ms:012x}-{kind}{rest}"


def noted(name: str) -> tuple[int, str, str]:
    """Return what `internal` was given; a foreign object is of kind ``?``."""
    found = _INTERNAL.fullmatch(name)
    return (int(found[1], 16), found[2], found[3]) if found else (0, "?", "")


def _cut(key: str) -> str:
    parts: list[str] = []
    size = 0  # bytes since the last cut
    for char in key:
        if size >= _PART:
            parts.append(_CUT)
            size = 0
        code = _CODES[ord(char)]
        parts.append(code)
        size += len(code.encode())
    return "".join(parts)


def _decoded(found: re.Match[str]) -> str:
    space, mark, number, tilde, high = found.groups()
    if space or tilde:
        return chr(int(space or tilde, 16))
    if mark:
        return _PAIRS[mark + number]
    if not high:
        return ""
    point = 0
    for digit in high:
        point = point << 6 | _DIGITS.index(digit)
    return chr(point)
