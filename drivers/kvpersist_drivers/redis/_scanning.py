"""Ranges of keys as ranges of a namespace's index, and entries of what a scan brings back."""

from __future__ import annotations

from typing import Final

from kvpersist import keys as grammar
from kvpersist.driver import Entry, unpacked_entry
from kvpersist.errors import CorruptRecord

__all__ = ["bounds_in", "entries_of", "only_namespace", "pointing"]

_DAMAGED: Final = b"\xff"  # no frame begins so: whoever decodes the value names the key
_NO_VERSION: Final = bytes(8)


def only_namespace(start: str | None, end: str | None) -> str | None:
    """The one namespace in which every key of ``[start, end)`` is, None if that cannot be said."""
    if start is None or end is None:
        return None
    space = grammar.partition(start)
    return space if end == start + "\0" or (":" in start and end <= space + ";") else None


def bounds_in(space: str, start: str | None, end: str | None) -> tuple[str, str] | None:
    """``[start, end)`` as Redis wants it for the members of a namespace's index; None if nothing is in it."""
    if not space:
        return ("-" if start is None else "[" + start), ("+" if end is None else "(" + end)
    first, after = space + ":", space + ";"
    if (start is not None and start >= after) or (end is not None and end <= first):
        return None
    low = "-" if start is None or start <= first else "[" + start[len(space) :]
    high = "+" if end is None or end >= after else "(" + end[len(space) :]
    return low, high


def entries_of(space: str, page: list[bytes], deref: str | None, keys_only: bool) -> list[Entry]:
    """The entries of a page: member, what is stored, and with ``deref`` what is stored at the target."""
    if deref is None:
        items = iter(page)
        return [
            _listed(space + member.decode(), stored, keys_only) for member, stored in zip(items, items, strict=True)
        ]
    entries: list[Entry] = []
    for at in range(0, len(page), 3):
        member, stored, target = page[at : at + 3]
        entry = _listed(space + member.decode(), stored)
        entries.append(pointing(entry, deref + entry.value.decode("utf-8", "replace"), target))
    return entries


def pointing(entry: Entry, key: str, target: bytes | None) -> Entry:
    """``entry`` with what is stored at ``key``; a damaged one points at nothing."""
    found = None if target is None or entry.version is _NO_VERSION else _listed(key, target)
    return Entry(entry.key, entry.value, entry.version, entry.expires_at, found)


def _listed(key: str, stored: bytes, keys_only: bool = False) -> Entry:
    """An entry of a list; a damaged one is told by its value, so that the list can go on."""
    try:
        return unpacked_entry(key, stored)
    except CorruptRecord as error:
        return Entry(key, b"" if keys_only else _DAMAGED + error.reason.encode(), _NO_VERSION)
