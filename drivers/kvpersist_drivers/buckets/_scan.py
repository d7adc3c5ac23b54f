"""Walks over the names of a store, a page at a time."""

from __future__ import annotations

from collections.abc import Iterator

from kvpersist import keys as grammar
from kvpersist.driver import HEADER_BYTES
from kvpersist_drivers.buckets._names import INTERNAL, behind, escaped, unescaped
from kvpersist_drivers.buckets._store import Listed, ObjectStore

__all__ = ["Due", "Range"]

_PAGE = 1000  # names of one listing
_PAST_INTERNAL = ".01"  # behind all that is internal, before any key's name


class Range:
    """What is left to be listed of ``[start, end)``."""

    def __init__(self, store: ObjectStore, root: str, start: str | None, end: str | None) -> None:
        """Nothing is asked yet."""
        self._store = store
        self._root = root
        shared = _shared(start, end)
        self._prefix = root + (escaped(shared) if shared else "")
        self._at = root + escaped(start) if start else self._prefix
        self._end = root + escaped(end) if end else None
        self._ahead: list[tuple[str, Listed]] = []  # listed, and not asked for yet
        self._size: int | None = None  # of the next listing, where the limit does not say it
        self._ended = end == ""

    @property
    def more(self) -> bool:
        """Whether there may be more."""
        return bool(self._ahead) or not self._ended

    async def page(self, limit: int) -> list[tuple[str, Listed]]:
        """Return at most ``limit`` of the next keys, and the objects as they were listed; none is not the end."""
        if not self._ahead:
            listed, more = await self._store.list(self._prefix, self._at, self._size or min(limit, _PAGE))
            self._size = _PAGE  # what was listed did not do: there are tombstones, or expired entries
            self._ended = not more or not listed
            self._ahead = list(self._entries(listed))
            if listed:
                last = listed[-1].name
                inside = last.startswith(self._root + INTERNAL)
                self._at = self._root + _PAST_INTERNAL if inside else behind(last)
        found, self._ahead = self._ahead[:limit], self._ahead[limit:]
        return found

    def _entries(self, listed: list[Listed]) -> Iterator[tuple[str, Listed]]:
        for item in listed:
            if self._end is not None and item.name.encode() >= self._end.encode():
                self._ended = True
                return
            name = item.name[len(self._root) :]
            if item.size >= HEADER_BYTES and not name.startswith(INTERNAL):  # not a tombstone
                key = unescaped(name)
                if key is not None:
                    yield key, item


class Due:
    """Internal objects whose time has come, in the order of it."""

    def __init__(self, store: ObjectStore, root: str, now_ms: int) -> None:
        """Nothing is asked yet."""
        self._store = store
        self._prefix = self._at = root + INTERNAL
        self._end = f"{self._prefix}{now_ms + 1:012x}"
        self.more = True

    async def page(self) -> list[str]:
        """Return the next names."""
        listed, more = await self._store.list(self._prefix, self._at, _PAGE)
        found = [item.name for item in listed if item.name < self._end]
        self.more = more and bool(listed) and len(found) == len(listed)
        if self.more:
            self._at = behind(found[-1])
        return found


def _shared(start: str | None, end: str | None) -> str:
    """Return what every key of ``[start, end)`` begins with."""
    if not start or not end:
        return ""
    same = 0
    while same < min(len(start), len(end)) and start[same] == end[same]:
        same += 1
    whole = len(end) == same + 1 and same < len(start) and grammar.prefix_end(start[: same + 1]) == end
    return start[: same + 1] if whole else start[:same]
