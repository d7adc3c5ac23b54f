"""Traces: what an agent's run consisted of, how long it took, what it cost."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from datetime import datetime
from hashlib import blake2b
from typing import Any, Final, Literal, TypeAlias, get_args
from uuid import UUID

import msgspec

from kvpersist.agents.births import Belongs, Births, Family
from kvpersist.agents.family import Records
from kvpersist.agents.records import utc
from kvpersist.errors import BadRequest, NoIndex
from kvpersist.index import Index
from kvpersist.index.declaration import Range
from kvpersist.index.reads import OnCorrupt, Query
from kvpersist.repository import Page

__all__ = ["TRACE_TYPES", "TokenUsage", "Trace", "TraceType", "Traces"]

TraceType: TypeAlias = Literal["agent", "tool", "llm", "retriever", "embedding", "chain"]

TRACE_TYPES: Final = get_args(TraceType)
_PAGE: Final = 100  # traces that iterate holds at once


class TokenUsage(msgspec.Struct, omit_defaults=True):
    """Tokens of a call of a model; ``total`` is their sum unless given."""

    prompt: int = 0
    completion: int = 0
    total: int | None = None


class Trace(msgspec.Struct, kw_only=True, omit_defaults=True):
    """One span of a run. ``duration`` is in seconds: from start to end, where both are known.

    ``root`` (it has no parent) and ``failed`` (it has an error) are True or None, and follow from the rest.
    """

    id: str = ""
    session_id: str | None = None
    parent_id: str | None = None
    name: str
    type: str = "agent"
    input: Any = None
    output: Any = None
    error: str | None = None
    token_usage: TokenUsage | None = None
    duration: float | None = None
    started_at: datetime | None = None
    ended_at: datetime | None = None
    metadata: dict[str, Any] = {}
    root: bool | None = None
    failed: bool | None = None


class Traces(Records[Trace]):
    """The traces of one namespace, ``db.traces``, newest first; the children of one, oldest first.

    A trace of a session needs that to be there, and is deleted with it. ``parent_id`` is a name: the
    parent may be stored later, or be gone.
    """

    def __init__(self, family: Family, sessions: Births) -> None:
        super().__init__(
            family,
            Trace,
            name="trace",
            indexes=[
                Index("session_id", order_by="-started_at"),
                Index("parent_id", order_by="started_at"),
                Index("root", order_by="-started_at"),
                Index("failed", order_by="-started_at"),
                Index("type", order_by="-started_at"),
                Index(order_by="-started_at"),  # before the next one: the order of all
                Index(order_by="duration"),
            ],
            belongs=[Belongs("session_id", sessions)],
        )

    async def start(
        self,
        name: str,
        *,
        type: TraceType = "agent",
        session_id: str | UUID | None = None,
        parent_id: str | UUID | None = None,
        input: Any = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> Trace:
        """Store a trace that begins now, and return it. Raises as `create`."""
        return await self.create(
            name=name,
            type=type,
            session_id=None if session_id is None else str(session_id),
            parent_id=None if parent_id is None else str(parent_id),
            input=input,
            metadata=dict(metadata or {}),
        )

    async def end(
        self,
        id: str | UUID,
        *,
        output: Any = None,
        error: str | BaseException | None = None,
        token_usage: TokenUsage | None = None,
        metadata: Mapping[str, Any] | None = None,
        ended_at: datetime | None = None,
    ) -> Trace | None:
        """Let a trace end, now unless told otherwise, and return it; None where there is none.

        Args:
            error: the text of what went wrong, or the exception.
            metadata: is merged into what the trace has.
        """
        text = error if error is None or isinstance(error, str) else str(error) or type(error).__name__
        at = self._family.now() if ended_at is None else ended_at
        return await self.update(
            id,
            lambda trace: msgspec.structs.replace(
                trace,
                output=output,
                error=text,
                token_usage=trace.token_usage if token_usage is None else token_usage,
                metadata={**trace.metadata, **(metadata or {})},
                ended_at=at,
            ),
        )

    async def find(
        self,
        *,
        limit: int = 100,
        offset: int = 0,
        on_corrupt: OnCorrupt | None = None,
        scan: bool = False,
        **where: Any,
    ) -> list[Trace]:
        """Return up to ``limit`` traces behind the first ``offset``.

        ``where`` is any of ``session_id=``, ``parent_id=``, ``type=``, ``root=True``, ``failed=``,
        ``started_at=between(a, b)`` and ``duration=between(a, b)`` (seconds; both ends included). Those
        of one parent come oldest first, by ``duration`` alone the shortest first, all others newest first.

        Args:
            scan: what no index answers may be found by reading all traces. Below one session or parent
                it is found by reading those, without being asked for.

        Raises:
            NoIndex: it would have to, and ``scan`` is not set.
        """
        if limit < 1 or offset < 0:
            raise BadRequest(f"limit={limit}, offset={offset}: ask for at least one, behind none or some")
        reader = self.repository._reader
        while True:
            query = await self._query(where, scan)
            found, _ = await reader.records(query, query.start, limit + offset, on_corrupt)
            if await reader.unchanged(query):
                return [trace for _, trace in found[offset:]]

    async def page(
        self,
        *,
        limit: int = 100,
        after: str | None = None,
        on_corrupt: OnCorrupt | None = None,
        scan: bool = False,
        **where: Any,
    ) -> Page[Trace]:
        """Return one page as `find` does, and the cursor that ``after`` takes for the next. Raises BadCursor."""
        reader = self.repository._reader
        while True:
            query = await self._query(where, scan)
            start = query.start if after is None else reader.position(query, after)
            found, _ = await reader.records(query, start, _bounded(limit) + 1, on_corrupt)
            if await reader.unchanged(query):
                break
        cursor = reader.cursor(query, found[limit - 1][0]) if len(found) > limit else None
        return Page([trace for _, trace in found[:limit]], cursor)

    async def iterate(
        self, *, on_corrupt: OnCorrupt | None = None, scan: bool = False, **where: Any
    ) -> AsyncIterator[Trace]:
        """Yield every trace that `find` would without a limit, 100 in memory at a time."""
        cursor: str | None = None
        while True:
            page = await self.page(limit=_PAGE, after=cursor, on_corrupt=on_corrupt, scan=scan, **where)
            for trace in page.items:
                yield trace
            if page.cursor is None:
                return
            cursor = page.cursor

    async def count(self, *, scan: bool = False, **where: Any) -> int:
        """Count what `find` would return without a limit; only keys are read where an index answers it."""
        reader = self.repository._reader
        while True:
            query = await self._query(where, scan)
            total = await reader.count(query)
            if await reader.unchanged(query):
                return total

    # ---- private

    async def _query(self, where: Mapping[str, Any], scan: bool) -> Query:
        """Ask the narrowest index, and let records decide what it leaves open."""
        if "started_at" in where and not isinstance(where["started_at"], Range):
            raise BadRequest("started_at: ask for between(a, b), at_least(a) or at_most(b)")
        unknown = where.keys() - _FILTERS.keys()
        if unknown:
            raise NoIndex("trace", ", ".join(sorted(unknown)), tuple(_FILTERS))
        given = dict(where)
        for field in ("session_id", "parent_id"):
            if isinstance(given.get(field), UUID):
                given[field] = str(given[field])
        base: dict[str, Any] = {}
        for field in ("session_id", "parent_id", "root", "failed", "type"):
            if field in given and (field not in ("root", "failed") or given[field] is True):
                base[field] = given.pop(field)
                break
        if "started_at" in given and (base or "duration" not in given):
            base["started_at"] = given.pop("started_at")
        elif not base and "duration" in given:
            base["duration"] = given.pop("duration")
        bounded = "session_id" in base or "parent_id" in base
        if given and not bounded and not scan:
            raise NoIndex("trace", ", ".join((*base, *given)), tuple(str(index) for index in self.repository.indexes))
        query = await self.repository._reader.query(base)
        if not given:
            return query
        tests = [_FILTERS[field](value) for field, value in given.items()]
        if query.matches is not None:
            tests.append(query.matches)

        def matches(trace: Trace) -> bool:
            return all(test(trace) for test in tests)

        tag = blake2b(repr(sorted(given.items())).encode(), key=query.tag, digest_size=len(query.tag)).digest()
        return msgspec.structs.replace(query, matches=matches, tag=tag)

    def _new(self, record: Trace) -> Trace:
        made = msgspec.structs.replace(record)
        if made.started_at is None:
            made.started_at = self._family.now()
        return super()._new(made)

    def _renewed(self, record: Trace, before: Trace) -> Trace:
        made = msgspec.structs.replace(record)
        if made.started_at is None:
            made.started_at = before.started_at
        return super()._renewed(made, before)

    def _check(self, record: Trace) -> None:
        if record.type not in TRACE_TYPES:
            raise BadRequest(f"unknown type {record.type!r} of a trace: use one of {', '.join(TRACE_TYPES)}")
        if record.started_at is not None:
            record.started_at = utc(record.started_at, "started_at")
        if record.ended_at is not None:
            record.ended_at = utc(record.ended_at, "ended_at")
        if record.started_at is not None and record.ended_at is not None:
            record.duration = (record.ended_at - record.started_at).total_seconds()
        if record.duration is not None and not record.duration >= 0:
            raise BadRequest(f"a trace of {record.duration} s: it cannot end before it started")
        usage = record.token_usage
        if usage is not None and usage.total is None:
            record.token_usage = TokenUsage(usage.prompt, usage.completion, usage.prompt + usage.completion)
        record.root = True if record.parent_id is None else None
        record.failed = None if record.error is None else True


def _equal(field: str) -> Callable[[Any], Callable[[Trace], bool]]:
    return lambda wanted: lambda trace: getattr(trace, field) == wanted


def _set(field: str) -> Callable[[Any], Callable[[Trace], bool]]:
    return lambda wanted: lambda trace: (getattr(trace, field) is True) == bool(wanted)


def _within(field: str) -> Callable[[Any], Callable[[Trace], bool]]:
    def test_of(wanted: Any) -> Callable[[Trace], bool]:
        if not isinstance(wanted, Range):
            raise BadRequest(f"{field}: ask for between(a, b), at_least(a) or at_most(b)")

        def test(trace: Trace) -> bool:
            value = getattr(trace, field)
            low, high = wanted.low, wanted.high
            return value is not None and (low is None or value >= low) and (high is None or value <= high)

        return test

    return test_of


def _bounded(limit: int) -> int:
    if limit < 1:
        raise BadRequest(f"limit={limit}: ask for at least one")
    return limit


_FILTERS: Final[dict[str, Callable[[Any], Callable[[Trace], bool]]]] = {
    "session_id": _equal("session_id"),
    "parent_id": _equal("parent_id"),
    "root": _set("root"),
    "failed": _set("failed"),
    "type": _equal("type"),
    "started_at": _within("started_at"),
    "duration": _within("duration"),
}
