"""Entries in this process's memory, in key order: for tests, caches and scratch work.

``memory://`` is private to the driver that opened it. ``memory://name`` is one space per process,
shared by whoever opens that name, in any event loop or thread: its entries live from the first
open to the last close of the name, and are gone after it (a driver that is never closed keeps
them). Nothing survives the process.

``get`` and ``commit`` never suspend, so a cancelled call has either not begun or is done. A batch
is seen whole or not at all, by the other threads of a named space too; a private space belongs to
one thread. Keys are ordered as Python orders text, by code point, which is the order of their UTF-8
bytes as long as they hold no lone surrogates.
"""

from __future__ import annotations

import asyncio
import time
from bisect import bisect_left, bisect_right, insort
from collections import deque
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import suppress
from heapq import heapify, heappop, heappush
from threading import Lock, get_ident
from typing import ClassVar, Final, Self

from msgspec import Struct

from kvpersist.driver import ABSENT, Batch, Capabilities, Check, Clock, Committed, Delete, Entry, Put
from kvpersist.errors import Conflict, KvError, StoreClosed

__all__ = ["MemoryDriver", "MemoryOptions"]

_CHUNK: Final = 512  # keys per list after a split; a list is split at twice as many
_TOLD: Final = 1024  # commits kept for a slow watcher, beyond which it is told that it missed some


class MemoryOptions(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which space.

    Attributes:
        name: share the space of this name within the process; empty: a private one.
    """

    name: str = ""


class MemoryDriver:
    """A dict, and its keys in order. ``clock`` judges expiry; each driver of a shared space has its own."""

    api: ClassVar[int] = 1
    Options: ClassVar[type[Struct]] = MemoryOptions

    def __init__(self, name: str = "", *, clock: Clock = time.time) -> None:
        self.capabilities = Capabilities(
            atomic_batch="all",
            conditional=True,
            conditional_delete=True,
            ordered=True,
            reverse=True,
            deref=True,
            watch="local",
            cancel_settles=True,
            server="memory",
        )
        self.clock = clock
        self._name = name
        self._space = _join(name)
        self._entries = self._space.entries
        self._lock = self._space.lock
        self._closed = False

    @classmethod
    async def open(cls, options: MemoryOptions, /) -> Self:
        return cls(options.name)

    async def get(self, keys: Sequence[str]) -> list[Entry | None]:
        if self._closed:
            raise _closed()
        if len(keys) == 1:  # one lookup is atomic without the lock
            entry = self._entries.get(keys[0])
            if entry is None or entry.expires_at is None or entry.expires_at > self.clock():
                return [entry]
            return [None]
        with self._lock:
            found = list(map(self._entries.get, keys))
        if any(entry is not None and entry.expires_at is not None for entry in found):
            now = self.clock()
            return [_live(entry, now) for entry in found]
        return found

    async def commit(self, batches: Sequence[Batch]) -> list[Committed | KvError]:
        if self._closed:
            raise _closed()
        if len(batches) == 1 and not self._name:  # most writes, in a space of one loop: spare the lock and the loops
            batch = batches[0]
            if len(batch.ops) == 1:
                op = batch.ops[0]
                if isinstance(op, Put) and op.expect is None and op.expires_at is None:
                    key, version = op.key, batch.version
                    if key not in self._entries:
                        self._space.added(key)
                    self._entries[key] = Entry(key, op.value, version)
                    if self._space.watchers:
                        self._space.tell((key,))
                    return [Committed(version)]
        with self._lock:
            if len(batches) == 1:
                return [self._apply(batches[0])]
            return [self._apply(batch) for batch in batches]

    async def scan(
        self,
        start: str | None,
        end: str | None,
        *,
        limit: int,
        reverse: bool = False,
        keys_only: bool = False,
        deref: str | None = None,
    ) -> list[Entry]:
        if self._closed:
            raise _closed()
        now = self.clock()
        found: list[Entry] = []
        with self._lock:
            entries = self._entries
            for keys in self._space.ordered().pieces(start, end, limit, reverse):
                for key in keys:
                    entry = entries[key]
                    if entry.expires_at is None or entry.expires_at > now:
                        found.append(entry)
                if len(found) >= limit:
                    break
            del found[max(limit, 0) :]
            if deref is not None:
                found = [_with_target(entry, entries.get(deref + _text(entry.value)), now) for entry in found]
        if keys_only:
            return [Entry(entry.key, b"", entry.version, entry.expires_at) for entry in found]
        return found

    async def watch(self, prefix: str) -> AsyncGenerator[tuple[str, ...]]:
        """As `Watches.watch`, for everybody in this process who has the space open."""
        if self._closed:
            raise _closed()
        space, watcher = self._space, _Watcher(self, prefix)
        with self._lock:
            space.watchers.append(watcher)
        try:
            yield ()
            while not self._closed:
                while watcher.told:
                    yield watcher.told.popleft()
                await watcher.more()
            raise _closed()
        finally:
            with self._lock:
                space.watchers.remove(watcher)

    async def size(self) -> int:
        """Bytes of keys and values, without what Python needs beside them. All entries are looked at."""
        with self._lock:
            return sum(
                len(entry.key.encode("utf-8", "surrogatepass")) + len(entry.value) for entry in self._entries.values()
            )

    async def compact(self, limit: int = 500) -> int:
        """Remove at most ``limit`` expired entries, oldest expiry first; return how many went."""
        if self._closed:
            raise _closed()
        with self._lock:
            return self._space.compact(self.clock(), limit)

    async def close(self) -> None:
        if not self._closed:
            self._closed = True
            with self._lock:
                for watcher in self._space.watchers:
                    if watcher.driver is self:
                        watcher.wake()
            _leave(self._name, self._space)
            self._space, self._entries = _NOTHING, {}

    def _apply(self, batch: Batch) -> Committed | KvError:
        version, entries = batch.version, self._entries
        for position, op in enumerate(batch.ops):
            expect = op.expect
            if expect is not None:
                entry = entries.get(op.key)
                if entry is not None and entry.expires_at is not None:
                    entry = _live(entry, self.clock())
                if entry is None:
                    if expect is not ABSENT:
                        return Conflict(op.key, expect, ABSENT, position)
                elif entry.version != expect:
                    return Conflict(op.key, expect, entry.version, position)
        space = self._space
        for op in batch.ops:
            key = op.key
            if type(op) is Put:
                expires_at = op.expires_at
                if expires_at is not None:
                    if expires_at <= self.clock():
                        space.remove(key)
                        continue
                    space.expires(expires_at, key)
                if key not in entries:
                    space.added(key)
                entries[key] = Entry(key, op.value, version, expires_at)
            elif type(op) is Delete:
                space.remove(key)
        if space.watchers:  # now that they would see it
            space.tell([op.key for op in batch.ops if not isinstance(op, Check)])
        return Committed(version)


class _Space:
    """The entries of one name, guarded by ``lock``. The key order is brought up to date by the next scan."""

    def __init__(self) -> None:
        self.lock = Lock()
        self.holders = 0
        self.entries: dict[str, Entry] = {}
        self.watchers: list[_Watcher] = []
        self._order = _Order()
        self._new: list[str] = []  # keys to be put in order, each once
        self._gone: set[str] = set()  # keys in the order, or in _new, that have no entry
        self._expiries: list[tuple[float, str]] = []  # heap; an item counts if its entry still expires then

    def added(self, key: str) -> None:
        if key in self._gone:
            self._gone.discard(key)
        else:
            self._new.append(key)

    def remove(self, key: str) -> None:
        if self.entries.pop(key, None) is not None:
            self._gone.add(key)

    def expires(self, at: float, key: str) -> None:
        if len(self._expiries) > 2 * len(self.entries) + 64:  # mostly entries renewed or removed since
            self._expiries = [(e.expires_at, e.key) for e in self.entries.values() if e.expires_at is not None]
            heapify(self._expiries)
        heappush(self._expiries, (at, key))

    def tell(self, keys: Sequence[str]) -> None:
        for watcher in self.watchers:
            watcher.tell(keys)

    def compact(self, now: float, limit: int) -> int:
        removed = 0
        while removed < limit and self._expiries and self._expiries[0][0] <= now:
            at, key = heappop(self._expiries)
            entry = self.entries.get(key)
            if entry is not None and entry.expires_at == at:
                self.remove(key)
                removed += 1
        return removed

    def ordered(self) -> _Order:
        """The keys that have an entry, in order."""
        if self._new or self._gone:
            self._order.update(self._new, self._gone)
            self._new, self._gone = [], set()
        return self._order


class _Watcher:
    """What one `MemoryDriver.watch` has not yielded yet; filled from whichever thread commits."""

    def __init__(self, driver: MemoryDriver, prefix: str) -> None:
        self.driver = driver
        self.told: deque[tuple[str, ...]] = deque()
        self._prefix = prefix
        self._thread, self._loop = get_ident(), asyncio.get_running_loop()
        self._woken = asyncio.Event()

    def tell(self, keys: Sequence[str]) -> None:
        mine = tuple([key for key in keys if key.startswith(self._prefix)])
        if not mine:
            return
        if len(self.told) >= _TOLD:
            self.told.clear()
            mine = ()
        self.told.append(mine)
        if len(self.told) == 1:  # else it is on its way to wake up
            self.wake()

    def wake(self) -> None:
        if get_ident() == self._thread:
            self._woken.set()
            return
        with suppress(RuntimeError):  # its loop was closed
            self._loop.call_soon_threadsafe(self._woken.set)

    async def more(self) -> None:
        await self._woken.wait()
        self._woken.clear()


class _Order:
    """Sorted keys in lists of some hundreds (the idea of sortedcontainers), so that one more is cheap."""

    def __init__(self) -> None:
        self._size = 0
        self._chunks: list[list[str]] = [[]]
        self._firsts: list[str] = [""]  # at or below the first key of each chunk, above the chunk before

    def update(self, new: list[str], gone: set[str]) -> None:
        """Add and remove keys; ``gone`` may name keys of ``new``."""
        if 8 * (len(new) + len(gone)) > self._size:  # one merge is cheaper than many steps
            keys = [key for chunk in self._chunks for key in chunk]
            keys.extend(new)
            keys.sort()
            if gone:
                keys = [key for key in keys if key not in gone]
            self._size = len(keys)
            self._chunks = [keys[at : at + _CHUNK] for at in range(0, len(keys), _CHUNK)] or [[]]
            self._firsts = ["", *(chunk[0] for chunk in self._chunks[1:])]
            return
        for key in new:
            self._add(key)
        for key in gone:
            self._discard(key)
        self._size += len(new) - len(gone)

    def pieces(self, start: str | None, end: str | None, limit: int, reverse: bool) -> Iterator[list[str]]:
        """Yield the keys of ``[start, end)``, or backwards, in lists of at most ``limit``."""
        if limit <= 0 or (start is not None and end is not None and start >= end):
            return
        first, low = (0, 0) if start is None else self._find(start)
        last, high = (len(self._chunks) - 1, len(self._chunks[-1])) if end is None else self._find(end)
        for number in range(last, first - 1, -1) if reverse else range(first, last + 1):
            chunk = self._chunks[number]
            begin = low if number == first else 0
            stop = high if number == last else len(chunk)
            if reverse:
                for at in range(stop, begin, -limit):
                    yield chunk[max(at - limit, begin) : at][::-1]
            else:
                for at in range(begin, stop, limit):
                    yield chunk[at : min(at + limit, stop)]

    def _find(self, key: str) -> tuple[int, int]:
        number = bisect_right(self._firsts, key) - 1
        return number, bisect_left(self._chunks[number], key)

    def _add(self, key: str) -> None:
        number = bisect_right(self._firsts, key) - 1
        chunk = self._chunks[number]
        insort(chunk, key)
        if len(chunk) >= 2 * _CHUNK:
            self._chunks.insert(number + 1, chunk[_CHUNK:])
            self._firsts.insert(number + 1, chunk[_CHUNK])
            del chunk[_CHUNK:]

    def _discard(self, key: str) -> None:
        number, at = self._find(key)
        chunk = self._chunks[number]
        del chunk[at]
        if not chunk and number > 0:
            del self._chunks[number], self._firsts[number]


_NOTHING: Final = _Space()
_spaces: dict[str, _Space] = {}
_spaces_lock = Lock()


def _join(name: str) -> _Space:
    if not name:
        return _Space()
    with _spaces_lock:
        space = _spaces.setdefault(name, _Space())
        space.holders += 1
        return space


def _leave(name: str, space: _Space) -> None:
    with _spaces_lock:
        space.holders -= 1
        if name and not space.holders:
            del _spaces[name]


def _live(entry: Entry | None, now: float) -> Entry | None:
    return None if entry is None or (entry.expires_at is not None and entry.expires_at <= now) else entry


def _text(value: bytes) -> str:
    return value.decode("utf-8", "surrogateescape")  # what is not UTF-8 names no key


def _with_target(entry: Entry, target: Entry | None, now: float) -> Entry:
    return Entry(entry.key, entry.value, entry.version, entry.expires_at, _live(target, now))


def _closed() -> StoreClosed:
    return StoreClosed("the memory store was closed: open it again")
