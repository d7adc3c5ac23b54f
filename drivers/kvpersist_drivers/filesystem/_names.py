"""From a key to its place in the tree, and back.

A key is cut after each ``:`` and ``!``: the pieces become folders, whose names end in ``~d`` and
``~p``, the rest a file that ends in ``.json``. What is not ``a-z 0-9 _ - #`` or an inner ``.`` is
written as ``~`` and two hex digits per UTF-8 byte, capitals too: no two keys meet on a disk that
ignores case or normalises Unicode, and no name is one that Windows or a shell takes for its own. The
rest of a key that has the form of an order-preserving integer of four hex digits or more is split:
all but its last three name a folder that ends in ``~n``, so that no log fills one folder.

A piece whose name would be longer than 200 bytes begins a *hashed* name: it stands with all that
follows for the first bytes of the rest and a hash, and the file's header holds the key.
"""

from __future__ import annotations

import re
from functools import lru_cache
from hashlib import blake2b
from typing import Final

from kvpersist.errors import BadKey, KeyTooLong

__all__ = ["LOW", "MAX_KEY_BYTES", "SUFFIX", "Place", "file_text", "folder_text", "hashed_prefix", "is_hashed", "place"]

MAX_KEY_BYTES: Final = 512  # UTF-8; a key of separators alone is a path of three times as many
SUFFIX: Final = ".json"
_EMPTY: Final = "~"  # the name of no text at all; no escape ends so
_LONGEST: Final = 200  # bytes of an escaped piece; with an ending it must stay below 255
_KEPT: Final = 160  # bytes of the text in a hashed name
_RESERVED: Final = r"(?:con|prn|aux|nul|com[0-9]|lpt[0-9])(?![^.])"
_PLAIN: Final = re.compile(rf"(?!{_RESERVED})[a-z0-9_#-](?:[a-z0-9_.#-]*[a-z0-9_#-])?")
_SIMPLE_FILE: Final = re.compile(rf"(?![k-z][0-9a-f]{{4,}}\.)(?:{_PLAIN.pattern})\.json")  # most names: no second look
_DEVICE: Final = re.compile(_RESERVED)
_ODD: Final = re.compile(rb"[^a-z0-9_.#-]")
_ESCAPED: Final = re.compile(rb"(?:[a-z0-9_.#-]|~[0-9a-f]{2})+")
_ESCAPE: Final = re.compile(rb"~(..)")
_HASHED: Final = re.compile(r"(.*)~~[0-9a-f]{32}")
_CUT: Final = re.compile("(?<=[:!])")
_INTEGER: Final = re.compile("[k-z][0-9a-f]{4,}")  # as kvpersist.keys writes them: 'g' + digits, then the digits
LOW: Final = 3
"""Hex digits of an integer that name the file."""


class Place(tuple[str, str, bool]):
    """The folder below the root (with ``/`` between), the file's name, and whether it is hashed."""

    __slots__ = ()


@lru_cache(maxsize=8192)
def place(key: str) -> Place:
    """Where ``key`` lies.

    Raises:
        KeyTooLong: over 512 bytes. BadKey: it holds a lone surrogate.
    """
    try:
        size = len(key.encode())
    except UnicodeEncodeError as error:
        raise BadKey(key, "no UTF-8 text: it holds a lone surrogate") from error
    if size > MAX_KEY_BYTES:
        raise KeyTooLong(key, size, MAX_KEY_BYTES)
    cut = max(key.rfind(":"), key.rfind("!")) + 1
    (folder, rest), tail = _folder(key[:cut]), key[cut:]
    if rest:
        return Place((folder, _hashed(rest + tail), True))
    if _is_integer(tail):
        above, tail = f"{tail[:-LOW]}~n", tail[-LOW:]
        folder = f"{folder}/{above}" if folder else above
    name = _escape(tail) if tail else _EMPTY
    if len(name) > _LONGEST:
        return Place((folder, _hashed(tail), True))
    return Place((folder, name + SUFFIX, False))


@lru_cache(maxsize=1024)
def _folder(prefix: str) -> tuple[str, str]:
    """The folder of the keys that begin with ``prefix``, which ends where it is cut, and what of it is to be hashed."""
    pieces = _CUT.split(prefix)[:-1]
    folders: list[str] = []
    for number, piece in enumerate(pieces):
        name = _escape(piece[:-1]) if len(piece) > 1 else ""
        if len(name) > _LONGEST:
            return "/".join(folders), "".join(pieces[number:])
        folders.append(name + ("~d" if piece[-1] == ":" else "~p"))
    return "/".join(folders), ""


def folder_text(name: str) -> tuple[str, bool] | None:
    """The text that the folder ``name`` stands for, and whether it is of integers; None: not a folder of ours."""
    stem, ending = name[:-2], name[-2:]
    if ending == "~n":
        return (stem, True) if _is_integer(stem + "0" * LOW) else None
    separator = ":" if ending == "~d" else "!" if ending == "~p" else ""
    if not separator:
        return None
    text = _unescape(stem) if stem else ""
    return None if text is None else (text + separator, False)


def file_text(name: str, of_integers: bool) -> str | None:
    """The text that the file ``name`` stands for in its folder; None: not a file of ours, or hashed."""
    if not of_integers and _SIMPLE_FILE.fullmatch(name):
        return name[: -len(SUFFIX)]
    if not name.endswith(SUFFIX):
        return None
    stem = name[: -len(SUFFIX)]
    if of_integers:
        return stem if len(stem) == LOW and _INTEGER.fullmatch("k0" + stem) else None
    if stem == _EMPTY:
        return ""
    text = _unescape(stem)
    return None if text is None or _is_integer(text) else text


def is_hashed(name: str) -> bool:
    """Whether ``name`` may be that of a file whose header holds its key."""
    return "~~" in name


def hashed_prefix(name: str) -> str | None:
    """The text that the key of a hashed file goes on with, as far as the name tells; None: not one of ours."""
    found = _HASHED.fullmatch(name[: -len(SUFFIX)]) if name.endswith(SUFFIX) else None
    if found is None or not _ESCAPED.fullmatch(found[1].encode()):
        return None
    raw = _ESCAPE.sub(lambda match: bytes.fromhex(match[1].decode()), found[1].encode())
    return raw.decode("utf-8", "ignore")  # a character may have been cut


def _is_integer(text: str) -> bool:
    return _INTEGER.fullmatch(text) is not None and len(text) - 1 == ord(text[0]) - 103


def _escape(text: str) -> str:
    if _PLAIN.fullmatch(text):
        return text
    raw = text.encode()
    escaped = _ODD.sub(_escape_byte, raw).decode()
    if escaped[0] == "." or _DEVICE.match(escaped):
        escaped = f"~{ord(escaped[0]):02x}{escaped[1:]}"
    return escaped[:-1] + "~2e" if escaped[-1] == "." else escaped


def _escape_byte(match: re.Match[bytes]) -> bytes:
    return b"~%02x" % match[0][0]


def _unescape(name: str) -> str | None:
    """The text, if ``name`` is what it is escaped to."""
    if _PLAIN.fullmatch(name):
        return name
    try:
        raw = name.encode("ascii")
        if not _ESCAPED.fullmatch(raw):
            return None
        text = _ESCAPE.sub(lambda match: bytes.fromhex(match[1].decode()), raw).decode()
    except UnicodeError:
        return None
    return text if ":" not in text and "!" not in text and _escape(text) == name else None


def _hashed(rest: str) -> str:
    kept = _ODD.sub(_escape_byte, rest.encode())[:_KEPT].decode()
    while kept[-2:-1] == "~" or kept[-1] == "~":  # an escape that was cut
        kept = kept[: kept.rindex("~")]
    if kept[0] == "." or _DEVICE.match(kept):
        kept = f"~{ord(kept[0]):02x}{kept[1:]}"
    return f"{kept}~~{blake2b(rest.encode(), digest_size=16).hexdigest()}{SUFFIX}"
