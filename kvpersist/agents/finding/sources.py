"""Where the records of a query come from.

A *source* gives records in one total order, each with its *position*, a text: the order of the texts
is the order of the records, and reading goes on strictly behind any of them. What no index tells is
*filtered* on the records; where no source comes in the order asked for, the records are *sorted*.
"""

from __future__ import annotations

import asyncio
import heapq
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Any, Final, Generic, NamedTuple, TypeVar, cast

from kvpersist.agents.finding.conditions import Test
from kvpersist.errors import KvError
from kvpersist.index.reads import OnCorrupt, Query
from kvpersist.repository import Repository

__all__ = [
    "PAGE",
    "Chunk",
    "Filtered",
    "Indexed",
    "Merged",
    "Nested",
    "Replaced",
    "Sorted",
    "Source",
    "Through",
    "passing",
]

R = TypeVar("R")
S = TypeVar("S")  # what a source gives, where that is not what is given back

PAGE: Final = 250
"""Records read at once where most may not be wanted."""

_HELD: Final = 10_000  # sorted records remembered between two chunks
_WIDTH: Final = 8  # parents below which is read side by side
_PARENTS: Final = 100  # parents read at once


class Chunk(NamedTuple, Generic[R]):
    """Some records with their positions, how many were read for them, and where to go on (None: at the end)."""

    items: list[tuple[str, R]]
    read: int
    at: str | None


class Source(ABC, Generic[R]):
    """Records in a total order."""

    @abstractmethod
    async def read(self, after: str | None, limit: int) -> Chunk[R]:
        """Return about ``limit`` records, never more, strictly behind a position (None: from the first on)."""


class Replaced(Exception):
    """The index that was read is another one by now."""


class Indexed(Source[R]):
    """The records between two keys of an index, or of the collection itself, upwards or downwards."""

    def __init__(
        self,
        repository: Repository[R],
        query: Query,
        *,
        reverse: bool = False,
        on_corrupt: OnCorrupt | None = None,
    ) -> None:
        self._reader = repository._reader
        self._query = query
        self._base = query.base or repository._prefix
        self._reverse = reverse
        self._on_corrupt = on_corrupt

    async def read(self, after: str | None, limit: int) -> Chunk[R]:
        """As `Source.read`. Raises Replaced."""
        query, base = self._query, self._base
        start = query.end if self._reverse else query.start
        if after is not None:
            behind = base + after
            if self._reverse:
                start = behind if start is None else min(start, behind)
            else:
                start = max(query.start, behind + "!")
        if start is not None and (start < query.start or (query.end is not None and start > query.end)):
            return Chunk([], 0, None)
        found, at = await self._reader.records(query, start, limit, self._on_corrupt, reverse=self._reverse)
        if not await self._reader.unchanged(query):
            raise Replaced
        items = [(key[len(base) :], record) for key, record in found]
        return Chunk(items, len(items), None if at is None else (at if self._reverse else at[:-1])[len(base) :])


class Filtered(Source[R]):
    """Those records of a source that pass a test."""

    def __init__(self, source: Source[R], test: Test) -> None:
        self._source, self._test = source, test

    async def read(self, after: str | None, limit: int) -> Chunk[R]:
        """As `Source.read`; one read of the source, whatever passes."""
        items, read, at = await self._source.read(after, limit)
        return Chunk([item for item in items if self._test(item[1])], read, at)


def passing(source: Source[R], tests: Sequence[Test]) -> Source[R]:
    """Return what of a source passes every test."""
    if not tests:
        return source
    return Filtered(source, tests[0] if len(tests) == 1 else lambda record: all(test(record) for test in tests))


class Through(Source[S], Generic[R, S]):
    """What a function makes of the records of a source, read for several at once; None leaves one out."""

    def __init__(self, source: Source[R], change: Callable[[list[tuple[str, R]]], Awaitable[list[S | None]]]) -> None:
        self._source, self._change = source, change

    async def read(self, after: str | None, limit: int) -> Chunk[S]:
        """As `Source.read`."""
        items, read, at = await self._source.read(after, limit)
        made = await self._change(items) if items else []
        kept = [(position, each) for (position, _), each in zip(items, made, strict=True) if each is not None]
        return Chunk(kept, read, at)


class Merged(Source[R]):
    """Several sources as one, in the order of their positions; no two share a position."""

    def __init__(self, sources: Sequence[Source[R]], *, reverse: bool = False) -> None:
        self._sources, self._reverse = sources, reverse

    async def read(self, after: str | None, limit: int) -> Chunk[R]:
        """As `Source.read`: all sources side by side, as far as each of them is known."""
        chunks = await _together([source.read(after, limit) for source in self._sources])
        ends = [chunk.at for chunk in chunks if chunk.at is not None]
        end = (max if self._reverse else min)(ends, default=None)  # behind it something may be unread
        items = [item for chunk in chunks for item in chunk.items]
        passed = sum(chunk.read for chunk in chunks) - len(items)
        items.sort(key=_position, reverse=self._reverse)
        if end is not None:
            items = [item for item in items if (item[0] >= end if self._reverse else item[0] <= end)]
        if len(items) > limit:
            items, end = items[:limit], items[limit - 1][0]
        # what has given nothing and ended stays at its end, whatever is read next
        self._sources = [
            source for source, chunk in zip(self._sources, chunks, strict=True) if chunk.items or chunk.at is not None
        ]
        return Chunk(items, len(items) + passed, end)


class Nested(Source[R]):
    """The records below the parents that another source gives, parent by parent.

    A position is the parent's, ``#``, and the record's below it; the parent's alone stands behind all
    that is below it.
    """

    def __init__(self, parents: Source[Any], below: Callable[[str], Source[R]]) -> None:
        """``below`` gives the source of a parent at its position."""
        self._parents, self._below = parents, below
        self._queue: list[tuple[str, Source[R], str | None]] = []  # parents, and where to go on below each
        self._behind: str | None = None  # the last parent that was read to its end
        self._known: str | None = None  # to where the parents are known
        self._begun = self._ended = False
        self._width = 1

    async def read(self, after: str | None, limit: int) -> Chunk[R]:
        """As `Source.read`; the first call says where to begin, every other one goes on."""
        if not self._begun:
            self._begin(after)
        items: list[tuple[str, R]] = []
        read = passed = 0
        while read < limit:
            if not self._queue:
                if self._ended:
                    return Chunk(items, read + passed, None)
                if passed >= limit:  # parents that are none of those asked for
                    return Chunk(items, read + passed, self._known)
                passed += await self._fill()
                continue
            batch = self._queue[: self._width]
            chunks = await _together([source.read(start, limit - read) for _, source, start in batch])
            whole = True
            for (parent, source, start), chunk in zip(batch, chunks, strict=True):
                kept, at = chunk.items[: limit - read], chunk.at
                if len(kept) < len(chunk.items):
                    at = kept[-1][0] if kept else start
                items += [(f"{parent}#{position}", record) for position, record in kept]
                read += max(1, chunk.read - len(chunk.items) + len(kept))
                if at is not None or len(kept) < len(chunk.items):
                    self._queue[0] = parent, source, at
                    whole = False
                    break
                del self._queue[0]
                self._behind = parent
            self._width = min(_WIDTH, 2 * self._width) if whole else 1
        if self._queue and self._queue[0][2] is not None:
            parent, _, at = self._queue[0]
            return Chunk(items, read + passed, f"{parent}#{at}")
        return Chunk(items, read + passed, self._behind)

    def _begin(self, after: str | None) -> None:
        self._begun = True
        if after is None:
            return
        parent, inside, at = after.partition("#")
        self._known = self._behind = parent
        if inside:
            self._queue.append((parent, self._below(parent), at))

    async def _fill(self) -> int:
        """Read more parents; return how many of those read are not among them."""
        chunk = await self._parents.read(self._known, _PARENTS)
        self._queue += [(position, self._below(position), None) for position, _ in chunk.items]
        self._known, self._ended = chunk.at, chunk.at is None
        return chunk.read - len(chunk.items)


class Sorted(Source[R]):
    """The records of a source in another order. It is read whole; only what is wanted is held, and up to 10,000."""

    def __init__(
        self,
        source: Source[R],
        place: Callable[[R], str],
        *,
        reverse: bool,
        most: int | None,
        refusal: Callable[[], KvError],
    ) -> None:
        """``most``: how many records may be read beyond those wanted; then ``refusal()`` is raised."""
        self._source, self._place, self._reverse = source, place, reverse
        self._most, self._refusal = most, refusal
        self._all: list[tuple[str, R]] | None = None

    async def read(self, after: str | None, limit: int) -> Chunk[R]:
        """As `Source.read`."""
        if self._all is None:
            items = await self._collected(after, limit)
        else:
            items = [item for item in self._all if self._behind(item[0], after)]
        more = len(items) > limit
        items = items[:limit]
        return Chunk(items, len(items), items[-1][0] if more else None)

    async def _collected(self, after: str | None, limit: int) -> list[tuple[str, R]]:
        """The ``limit + 1`` records behind ``after``, or all, if they are few enough to be remembered."""
        every: list[tuple[str, R]] = []
        few, read, at = True, 0, None
        while True:
            chunk = await self._source.read(at, PAGE)
            read += chunk.read
            if self._most is not None and read - limit > self._most:
                raise self._refusal()
            placed = ((self._place(record), record) for _, record in chunk.items)
            every += placed if few else (item for item in placed if self._behind(item[0], after))
            if few and len(every) > _HELD:
                few = False
                every = [item for item in every if self._behind(item[0], after)]
            if not few:
                every = self._first(every, limit + 1)
            at = chunk.at
            if at is None:
                break
        if few:
            self._all = self._first(every, len(every))
            return [item for item in self._all if self._behind(item[0], after)]
        return every

    def _first(self, items: Iterable[tuple[str, R]], count: int) -> list[tuple[str, R]]:
        pick = heapq.nlargest if self._reverse else heapq.nsmallest
        return pick(count, items, key=_position)

    def _behind(self, position: str, after: str | None) -> bool:
        return after is None or (position < after if self._reverse else position > after)


async def _together(reads: Iterable[Awaitable[S]]) -> list[S]:
    """Read side by side; an error is raised once all have ended."""
    answers = await asyncio.gather(*reads, return_exceptions=True)
    for answer in answers:
        if isinstance(answer, BaseException):
            raise answer
    return cast("list[S]", answers)


def _position(item: tuple[str, Any]) -> str:
    return item[0]
