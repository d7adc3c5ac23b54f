"""What the queries of sessions, messages and tool calls share: `Finder` turns a source of records into answers.

It gives find, page, iterate and count: how many records, from where on, and how many may be read for them.
"""

from __future__ import annotations

import base64
import binascii
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from hashlib import blake2b
from typing import ClassVar, Final, Generic, NamedTuple, TypeVar

import msgspec

from kvpersist.agents.finding.conditions import Where
from kvpersist.agents.finding.sources import PAGE, Chunk, Replaced, Source
from kvpersist.errors import BadCursor, BadRequest, KvError
from kvpersist.index.reads import OnCorrupt
from kvpersist.repository import Page

__all__ = ["SCANNED", "Asked", "Finder", "Found", "Plan"]

R = TypeVar("R")
S = TypeVar("S")  # what a source gives, where that is not what is given back

SCANNED: Final = 10_000
"""Records that a query reads beyond those it gives back, unless told otherwise."""

_AHEAD: Final = 64  # records read at first where most may not be wanted
_SEAL: Final = 8  # bytes that tell a query's cursors from others


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
                chunk = await plan.source.read(at, _most(PAGE, plan.most, passed))
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
                    size = wanted - len(found) if plan.eager else PAGE if found or passed else max(wanted, _AHEAD)
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


def _most(size: int, most: int | None, passed: int) -> int:
    """How many records to read next."""
    return size if most is None else max(1, min(size, most - passed))


def _refuse_bounds(limit: int, offset: int, scanned: int) -> None:
    if limit < 1:
        raise BadRequest(f"limit={limit}: ask for at least one")
    if offset < 0 or scanned < 0:
        raise BadRequest(f"offset and scanned are 0 or more, not {offset} and {scanned}")
