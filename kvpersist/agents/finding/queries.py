"""What the queries of sessions, messages and tool calls share: where records come from, in which order, how many.

A *source* gives records in one total order, each with its *position*, a text: the order of the texts
is the order of the records, and reading goes on strictly behind any of them. What no index tells is
*filtered* on the records; where no source comes in the order asked for, the records are *sorted*.
`Finder` turns a source into find, page, iterate and count.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import heapq
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from datetime import datetime
from hashlib import blake2b
from typing import Any, ClassVar, Final, Generic, NamedTuple, TypeAlias, TypeVar, cast
from uuid import UUID

import msgspec

from kvpersist.agents.records import utc
from kvpersist.errors import BadCursor, BadRequest, KvError
from kvpersist.index.declaration import BoundIndex, Range
from kvpersist.index.fields import getter
from kvpersist.index.reads import OnCorrupt, Query
from kvpersist.repository import Page, Repository

__all__ = [
    "SCANNED",
    "Asked",
    "Choice",
    "Chunk",
    "Filtered",
    "Finder",
    "Found",
    "Indexed",
    "Merged",
    "Nested",
    "Plan",
    "Replaced",
    "Sorted",
    "Source",
    "Test",
    "Through",
    "Where",
    "best",
    "equal",
    "normal",
    "passing",
    "tests_of",
    "within",
]

R = TypeVar("R")
S = TypeVar("S")  # what a source gives, where that is not what is given back

SCANNED: Final = 10_000
"""Records that a query reads beyond those it gives back, unless told otherwise."""

Test: TypeAlias = Callable[[Any], bool]
Where: TypeAlias = dict[str, Any]

_PAGE: Final = 250  # records read at once where most may not be wanted
_AHEAD: Final = 64  # records read at first there
_HELD: Final = 10_000  # sorted records remembered between two chunks
_SEAL: Final = 8  # bytes that tell a query's cursors from others
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
            chunk = await self._source.read(at, _PAGE)
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


class Plan(msgspec.Struct, Generic[R], kw_only=True):
    """How a query is answered.

    Attributes:
        source: what it asks for, filtered and in order.
        eager: nothing is read that is not asked for.
        most: how many records may be read that are not given back, None: any number; then ``refusal()``.
        count: counts without reading records, where that is possible.
    """

    source: Source[R]
    eager: bool
    most: int | None
    refusal: Callable[[], KvError]
    count: Callable[[], Awaitable[int]] | None = None


class Found(list[R]):
    """What `Messages.search` found, a list, and how.

    Attributes:
        indexed: through the index of words; False: by reading messages.
        complete: nothing was left unread that might have been found, but for what is beyond ``limit``.
    """

    def __init__(self, items: Iterable[R] = (), *, indexed: bool = False, complete: bool = True) -> None:
        super().__init__(items)
        self.indexed, self.complete = indexed, complete


class Asked(NamedTuple):
    """Which records a query asks for, and how it may be answered.

    ``partial``: what is found among the first ``scanned`` records will do, whatever they are taken from.
    """

    where: Where
    order: str | None
    scanned: int
    scan: bool
    on_corrupt: OnCorrupt | None = None
    partial: bool = False


class Finder(ABC, Generic[S, R]):
    """find, page, iterate and count of one kind of record; ``S`` is what its sources give, ``R`` what a user gets."""

    collection: ClassVar[str]

    @abstractmethod
    async def plan(self, asked: Asked) -> Plan[S]:
        """Choose how ``asked`` is answered.

        Raises:
            NoIndex: only by reading the whole collection, and nobody asked for that.
            IndexNotReady: as NoIndex, while an index that would answer is being built.
            BadRequest: no such condition, order, or kind of value.
        """

    @abstractmethod
    async def finished(self, records: list[S], on_corrupt: OnCorrupt | None) -> list[R]:
        """Return records as they are given back, with what is kept elsewhere filled in."""

    async def find(self, asked: Asked, limit: int, offset: int) -> list[R]:
        """Return up to ``limit`` records behind the first ``offset``."""
        _refuse_bounds(limit, offset, asked.scanned)
        found, _, plan = await self._gathered(asked, None, limit, offset)
        if plan is not None:
            raise plan.refusal()
        return await self.finished(found, asked.on_corrupt)

    async def page(self, asked: Asked, limit: int, offset: int, after: str | None) -> Page[R]:
        """Return one page; its cursor is None at the end. Where much was passed over it may hold fewer."""
        _refuse_bounds(limit, offset, asked.scanned)
        tag = self._tag(asked)
        start = None if after is None else _opened(tag, after)
        found, at, _ = await self._gathered(asked, start, limit, offset, more=True)
        return Page(await self.finished(found, asked.on_corrupt), None if at is None else _sealed(tag, at))

    async def some(self, asked: Asked, limit: int, plan: Plan[S] | None = None) -> Found[R]:
        """Return up to ``limit`` records, or those among the records that may be read; ``plan`` is made already."""
        _refuse_bounds(limit, 0, asked.scanned)
        found, _, refused = await self._gathered(asked, None, limit, 0, plan=plan)
        return Found(await self.finished(found, asked.on_corrupt), complete=refused is None)

    async def iterate(self, asked: Asked) -> AsyncIterator[R]:
        """Yield every record, about 250 in memory at a time."""
        _refuse_bounds(1, 0, asked.scanned)
        async for chunk in self._chunks(asked):
            for record in await self.finished([record for _, record in chunk.items], asked.on_corrupt):
                yield record

    async def count(self, asked: Asked) -> int:
        """Count the records; where an index answers all of it, only keys are read."""
        while True:
            plan = await self.plan(asked)
            if plan.count is None:
                return sum([len(chunk.items) async for chunk in self._chunks(asked, plan)])
            try:
                return await plan.count()
            except Replaced:
                continue

    async def _chunks(self, asked: Asked, plan: Plan[S] | None = None) -> AsyncIterator[Chunk[S]]:
        """What a query asks for, to its end. Raises the plan's refusal where too much is passed over."""
        plan = plan or await self.plan(asked)
        at: str | None = None
        passed = 0
        while True:
            try:
                chunk = await plan.source.read(at, _most(_PAGE, plan.most, passed))
            except Replaced:
                plan = await self.plan(asked)
                continue
            yield chunk
            passed += chunk.read - len(chunk.items)
            at = chunk.at
            if at is None:
                return
            if plan.most is not None and passed > plan.most:
                raise plan.refusal()

    async def _gathered(
        self,
        asked: Asked,
        after: str | None,
        limit: int,
        offset: int,
        *,
        more: bool = False,
        plan: Plan[S] | None = None,
    ) -> tuple[list[S], str | None, Plan[S] | None]:
        """Return the records wanted, where the next ones begin, and the plan if it read as much as it may before.

        ``more``: the next ones are asked for (None: there are none).
        """
        wanted = offset + limit + more
        while True:
            plan = plan or await self.plan(asked)
            found: list[tuple[str, S]] = []
            at, passed, refused = after, 0, False
            try:
                while True:
                    size = wanted - len(found) if plan.eager else _PAGE if found or passed else max(wanted, _AHEAD)
                    chunk = await plan.source.read(at, _most(size, plan.most, passed))
                    found += chunk.items
                    passed += chunk.read - len(chunk.items)
                    at = chunk.at
                    if at is None or len(found) >= wanted:
                        break
                    # what will do with a part reads no more; others may find the next record to be the last
                    if refused := plan.most is not None and passed + asked.partial > plan.most:
                        break
            except Replaced:
                plan = None
                continue
            if len(found) > offset + limit:
                at = found[offset + limit - 1][0]
            elif not refused:
                at = None
            return [record for _, record in found[offset : offset + limit]], at, plan if refused else None

    def _tag(self, asked: Asked) -> bytes:
        what = repr((self.collection, sorted(asked.where.items(), key=lambda item: item[0]), asked.order))
        return blake2b(what.encode(errors="surrogatepass"), digest_size=16).digest()


# ---- conditions


def normal(where: Mapping[str, Any], aliases: Mapping[str, str], times: Iterable[str]) -> Where:
    """Return conditions in one spelling: fields by their name, metadata by paths, times in UTC, ids as text.

    Raises:
        BadRequest: a condition twice, on None, or on a time that is none.
    """
    asked: Where = {}
    for label, value in where.items():
        if value is None:
            raise BadRequest(f"{label}=None: records without a value cannot be asked for; leave it out")
        if label == "metadata":
            pairs = _metadata(value)
        else:
            pairs = {aliases.get(label, label): str(value) if isinstance(value, UUID) else value}
        if twice := sorted(asked.keys() & pairs.keys()):
            raise BadRequest(f"{twice[0]} is asked for twice: give one condition, or a range")
        asked |= pairs
    for label in times:
        value = asked.get(label)
        if isinstance(value, Range):
            asked[label] = Range(_time(label, value.low), _time(label, value.high))
        elif value is not None:
            asked[label] = _time(label, value)
    return asked


def _metadata(asked: Any) -> Where:
    if not isinstance(asked, Mapping):
        raise BadRequest("metadata: ask for {path: value}, such as {'topic': 'tea', 'order.id': 7}")
    pairs = {f"metadata.{path}": value for path, value in cast("Mapping[str, Any]", asked).items()}
    if None in pairs.values():
        raise BadRequest("metadata: what has no value cannot be asked for; leave it out")
    return pairs


def _time(label: str, value: Any) -> datetime | None:
    if value is None:  # an open end
        return None
    if not isinstance(value, datetime):
        raise BadRequest(f"{label}: ask for a datetime, or a range made with between, at_least or at_most")
    return utc(value, label)


def within(value: Any, asked: Any) -> bool:
    """Whether a value is what is asked for: equal, in the range, or a collection that contains it."""
    if isinstance(asked, Range):
        if value is None:
            return False
        try:
            return (asked.low is None or value >= asked.low) and (asked.high is None or value <= asked.high)
        except TypeError:  # of another type
            return False
    return equal(value, asked)


def equal(value: Any, asked: Any) -> bool:
    """Whether ``asked`` is ``value``, or contained in it: a mapping by its keys, an element in a list."""
    if isinstance(asked, dict):
        if not isinstance(value, dict):
            return False
        mine, wanted = cast("dict[str, Any]", value), cast("dict[str, Any]", asked)
        return all(key in mine and equal(mine[key], each) for key, each in wanted.items())
    if isinstance(value, list) and not isinstance(asked, list):
        return any(equal(each, asked) for each in cast("list[Any]", value))
    if isinstance(value, bool) is not isinstance(asked, bool):  # True == 1
        return False
    return bool(value == asked)


def tests_of(
    type_: type, indexes: Sequence[BoundIndex], special: Mapping[str, Callable[[Any], Test]], where: Where
) -> list[Test]:
    """Return what tells on a record whether it is asked for: one test per condition.

    Args:
        special: conditions that are no fields: what makes a test of the value asked for.

    Raises:
        BadRequest: no such condition; the error names those there are.
    """
    tests: list[Test] = []
    fields: tuple[str, ...] = cast("Any", type_).__struct_fields__
    computed = {part.label: part for bound in indexes for part in bound.parts[: bound.fields]}
    for label, asked in where.items():
        if label in special:
            tests.append(special[label](asked))
        elif label.partition(".")[0] in fields:
            tests.append(_field_test(getter(type_, label), asked))
        elif label in computed:
            tests.append(_part_test(computed[label], asked))
        else:
            known = ", ".join(sorted({*fields, *computed, *special}))
            raise BadRequest(f"{label!r} cannot be asked for; use metadata={{path: value}} or one of {known}")
    return tests


def _field_test(get: Callable[[Any], Any], asked: Any) -> Test:
    return lambda record: within(get(record), asked)


def _part_test(part: Any, asked: Any) -> Test:
    return lambda record: any(within(value, asked) for value in part.of(record))


# ---- choosing an index


class Choice(NamedTuple):
    """An index, the conditions that it answers, and what it orders the records by then."""

    bound: BoundIndex
    where: Where
    order: str
    descending: bool


def best(indexes: Sequence[BoundIndex], where: Mapping[str, Any], order: str | None = None) -> list[Choice]:
    """Return the indexes that answer some of ``where``, or are only an order, the most useful first.

    That is: of one record, of the most equal values, of a range, in this order.
    """
    choices: list[tuple[tuple[int, int, int, int], int, Choice]] = []
    for at, bound in enumerate(indexes):
        parts, fields = bound.parts, bound.fields
        if fields and parts[0].label not in where:
            continue
        used: Where = {}
        for part in parts:
            if part.label not in where or isinstance(where[part.label], Range):
                break
            used[part.label] = where[part.label]
        equals = len(used)
        if equals < len(parts) and isinstance(where.get(parts[equals].label), Range):
            used[parts[equals].label] = where[parts[equals].label]
        rest = parts[len(used) : fields]
        if any(part.optional for part in rest) or any(part.multi for part in parts[equals:]):
            continue  # records are missing there, or occur several times
        if any(isinstance(value, (dict, list)) for value in used.values()):
            continue  # contained in something: no index tells
        by = parts[equals] if equals < len(parts) else None
        label = "id" if by is None else by.label
        choice = Choice(bound, used, label, by is not None and by.descending)
        single = bound.unique and equals == len(parts)
        choices.append(((not single, -equals, -len(used), label != order), at, choice))
    return [choice for _, _, choice in sorted(choices, key=lambda each: each[:2])]


# ---- cursors


def _sealed(tag: bytes, position: str) -> str:
    data = position.encode()
    seal = blake2b(data, key=tag, digest_size=_SEAL).digest()
    return base64.urlsafe_b64encode(seal + data).decode().rstrip("=")


def _opened(tag: bytes, cursor: str) -> str:
    try:
        data = base64.b64decode(cursor + "=" * (-len(cursor) % 4), altchars=b"-_", validate=True)
        seal, position = data[:_SEAL], data[_SEAL:]
        text = position.decode()
    except (TypeError, ValueError, AttributeError, binascii.Error) as error:
        raise BadCursor(cursor) from error
    if seal != blake2b(position, key=tag, digest_size=_SEAL).digest():
        raise BadCursor(cursor)
    return text


async def _together(reads: Iterable[Awaitable[S]]) -> list[S]:
    """Read side by side; an error is raised once all have ended."""
    answers = await asyncio.gather(*reads, return_exceptions=True)
    for answer in answers:
        if isinstance(answer, BaseException):
            raise answer
    return cast("list[S]", answers)


def _position(item: tuple[str, Any]) -> str:
    return item[0]


def _most(size: int, most: int | None, passed: int) -> int:
    """How many records to read next."""
    return size if most is None else max(1, min(size, most - passed))


def _refuse_bounds(limit: int, offset: int, scanned: int) -> None:
    if limit < 1:
        raise BadRequest(f"limit={limit}: ask for at least one")
    if offset < 0 or scanned < 0:
        raise BadRequest(f"offset and scanned are 0 or more, not {offset} and {scanned}")
