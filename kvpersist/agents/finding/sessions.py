"""Finding sessions: by owner, time, the beginning of an id, or what is read."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any, ClassVar, Final, NamedTuple

from kvpersist import keys
from kvpersist.agents.collections import Collections
from kvpersist.agents.content import folded
from kvpersist.agents.finding.choices import best
from kvpersist.agents.finding.conditions import Test, Where, normal, tests_of, within
from kvpersist.agents.finding.finder import Chosen, IndexFinder, downwards
from kvpersist.agents.finding.queries import Asked, Plan
from kvpersist.agents.finding.sources import Chunk, Indexed, Replaced, Source, Through, passing
from kvpersist.agents.records import Session
from kvpersist.agents.stat import EXACT, Stat
from kvpersist.errors import BadRequest, CorruptRecord, IndexNotReady, KvError
from kvpersist.index import Index
from kvpersist.index.declaration import Range
from kvpersist.index.reads import OnCorrupt, Query
from kvpersist.index.writer import live

__all__ = ["OWNERS", "SESSION_INDEXES", "SESSION_ORDERS", "SessionFinder", "Timed"]

OWNERS: Final = ("user_id", "agent_id", "container_id", "image_id", "template_id", "parent_id")
"""The fields of a session that it is found by."""

SESSION_INDEXES: Final = (*(Index(owner, order_by="-created_at") for owner in OWNERS), Index(order_by="-created_at"))
"""The indexes that sessions always have; an owner that is not set takes no room in its own."""

SESSION_ORDERS: Final = ("created_at", "updated_at", "title", "message_count", "id")
"""What sessions can be ordered by; with ``-`` before it downwards."""

_SESSION_ALIASES: Final = {"created": "created_at", "updated": "updated_at"}


class Timed(NamedTuple):
    """A session with what is counted beside it; None where that is damaged."""

    session: Session
    stat: Stat | None


class SessionFinder(IndexFinder[Session]):
    """Finds sessions."""

    collection: ClassVar[str] = "session"

    def __init__(self, collections: Collections) -> None:
        super().__init__(collections, collections.sessions)
        self._atomic = collections.store.capabilities.atomic_batch != "none"

    @staticmethod
    def normal(where: Mapping[str, Any]) -> Where:
        """Return conditions in one spelling. Raises BadRequest."""
        asked = normal(where, _SESSION_ALIASES, ("created_at", "updated_at"))
        for label in ("id_prefix", "title"):
            if label in asked and not isinstance(asked[label], (str, Range)):
                raise BadRequest(f"{label}={asked[label]!r}: it is a text")
        if isinstance(asked.get("id_prefix"), Range):
            raise BadRequest("id_prefix is a text; for a range of ids ask for id=between(a, b)")
        if asked.get("id_prefix") == "":
            del asked["id_prefix"]
        return asked

    async def plan(self, asked: Asked) -> Plan[Timed]:
        """As `Finder.plan`."""
        where, order = asked.where, asked.order
        chosen, unready = await self._chosen(where, order)
        rest = {label: value for label, value in where.items() if label not in chosen.used}
        before, after = self._tests(rest)

        def refusal() -> KvError:
            return self._refusal(rest or f"order={order}")

        def make(reverse: bool) -> Source[Timed]:
            if chosen.order == "updated_at":
                updated = _Updated(
                    self._all,
                    self.stats,
                    chosen.query,
                    reverse=reverse,
                    atomic=self._atomic,
                    on_corrupt=asked.on_corrupt,
                )
                return passing(updated, [_of_session(test) for test in before] + after)
            indexed = Indexed(self._repository, chosen.query, reverse=reverse, on_corrupt=asked.on_corrupt)
            return passing(Through(passing(indexed, before), self._timed), after)

        if order is None:
            label, descending = chosen.order, chosen.descending
        else:
            label, descending = order.removeprefix("-"), order.startswith("-")
        place = _placed(label)
        source, is_sorted = self._directed(asked, chosen, label, descending, make, place, refusal)
        free = not chosen.narrow and not asked.scan  # nobody asked for the whole collection
        if free and (rest or (is_sorted and label in ("title", "message_count"))):
            raise self._wide(asked, unready, rest or f"order={order}")
        if unready is not None and free and not rest and chosen.order == "id" and order is None:
            raise IndexNotReady(self.collection, unready)
        most = None if asked.scan or is_sorted or not rest else asked.scanned
        return Plan(
            source=source, eager=is_sorted or not rest, most=most, refusal=refusal, count=self._count(chosen, rest)
        )

    async def finished(self, records: list[Timed], on_corrupt: OnCorrupt | None) -> list[Session]:
        """As `Finder.finished`."""
        return [timed.session for timed in records]

    async def parts(self, where: Mapping[str, Any]) -> AsyncIterator[list[str]]:
        """Yield the encoded ids of sessions that meet conditions on owners, some at a time; stats are not read."""
        asked = self.normal(where)
        chosen, unready = await self._chosen(asked, None)
        rest = {label: value for label, value in asked.items() if label not in chosen.used}
        if unready is not None and not chosen.narrow:
            raise IndexNotReady(self.collection, unready)
        before, _ = self._tests(rest)
        at: str | None = None
        while True:
            source = passing(Indexed(self._repository, chosen.query), before)
            try:
                items, _, at = await source.read(at, 500)
            except Replaced:
                chosen, _ = await self._chosen(asked, None)
                continue
            yield [keys.encode(session.id) for _, session in items]
            if at is None:
                return

    async def stats(self, parts: Sequence[str]) -> list[Stat | None]:
        """Read what is counted beside sessions, by their encoded ids: one read.

        What is damaged counts as missing here, and the next write below the session mends it.
        """
        prefix = self._all.stat_prefix
        entries = await self._store._entries([prefix + part for part in parts])
        decode = self._all.stats.decode
        found: list[Stat | None] = []
        for entry in entries:
            try:
                found.append(None if entry is None else decode(entry.key, entry.value))
            except CorruptRecord:
                found.append(None)
        return found

    async def _chosen(self, where: Where, order: str | None) -> tuple[Chosen, str | None]:
        prefix = self._all.session_prefix
        label = None if order is None else order.removeprefix("-")
        id_, start = where.get("id"), where.get("id_prefix")
        if isinstance(id_, str):
            key = prefix + keys.encode(id_)
            return Chosen(self._between(key, key + "!"), frozenset(("id",)), "id", False, True), None
        kept = ("updated_at", "id_prefix", *(["title"] if isinstance(where.get("title"), str) else []))
        indexed = {name: value for name, value in where.items() if name not in kept}
        choices = best(self._repository.indexes, indexed, label)
        exact = [each for each in choices if any(not isinstance(value, Range) for value in each.where.values())]
        found, unready = await self._ready(exact)
        if found is not None:
            return found, unready
        if start:
            key = prefix + keys.escape(start)
            return Chosen(
                self._between(key, keys.prefix_end(key)), frozenset(("id_prefix",)), "id", False, True
            ), unready
        ranges = [each for each in choices if each.where and each not in exact]
        found, late = await self._ready(ranges)
        unready = unready or late
        if found is not None:
            return found, unready
        updated = where.get("updated_at")
        if updated is not None or label == "updated_at":
            query = self._updated(updated)
            return Chosen(query, frozenset(), "updated_at", True, updated is not None), unready
        if label == "id":
            return Chosen(self._between(prefix, keys.prefix_end(prefix)), frozenset(), "id", False, False), unready
        found, late = await self._ready([each for each in choices if not each.where])
        if found is not None:
            return found, unready
        return Chosen(self._between(prefix, keys.prefix_end(prefix)), frozenset(), "id", False, False), unready or late

    def _updated(self, asked: Any) -> Query:
        """The part of the index by changes where the sessions lie; it is exact to a second."""
        prefix = self._all.updated_prefix
        low, high = (asked.low, asked.high) if isinstance(asked, Range) else (asked, asked)
        start = prefix if high is None else prefix + keys.encode(_moved(high, EXACT), True)
        end = keys.prefix_end(prefix) if low is None else prefix + keys.encode(_moved(low, -EXACT), True) + '"'
        return self._between(start, end, prefix)

    def _tests(self, rest: Where) -> tuple[list[Test], list[Test]]:
        """What is told by the record, and what by that with its stat."""
        late: list[Test] = []
        early = dict(rest)
        if "updated_at" in early:
            updated = early.pop("updated_at")
            late.append(lambda timed: within(timed.session.updated_at, updated))
        if "message_count" in early:
            wanted = early.pop("message_count")
            late.append(lambda timed: within(0 if timed.stat is None else timed.stat.messages, wanted))
        special: dict[str, Callable[[Any], Test]] = {"id_prefix": _begins}
        if isinstance(early.get("title"), str):
            special["title"] = _titled
        return tests_of(Session, self._repository.indexes, special, early), late

    async def _timed(self, items: list[tuple[str, Session]]) -> list[Timed | None]:
        sessions = [session for _, session in items]
        stats = await self.stats([keys.encode(session.id) for session in sessions])
        for session, stat in zip(sessions, stats, strict=True):
            session.updated_at = session.created_at if stat is None else stat.updated_at
        return [Timed(session, stat) for session, stat in zip(sessions, stats, strict=True)]

    def _count(self, chosen: Chosen, rest: Where) -> Callable[[], Awaitable[int]] | None:
        if rest or (chosen.order == "updated_at" and chosen.narrow):
            return None
        return self._counted([chosen.query]) if chosen.narrow else self._repository.count


class _Updated(Source[Timed]):
    """Sessions by their last change, through the index beside them."""

    def __init__(
        self,
        collections: Collections,
        stats: Callable[[Sequence[str]], Awaitable[list[Stat | None]]],
        query: Query,
        *,
        reverse: bool,
        atomic: bool,
        on_corrupt: OnCorrupt | None,
    ) -> None:
        self._all, self._stats, self._query = collections, stats, query
        self._reverse, self._atomic, self._on_corrupt = reverse, atomic, on_corrupt

    async def read(self, after: str | None, limit: int) -> Chunk[Timed]:
        """As `Source.read`."""
        every, query = self._all, self._query
        start, end = query.start, query.end
        if after is not None:
            behind = query.base + after
            start, end = (start, behind) if self._reverse else (behind + "!", end)
        page = await every.store._scan(start, end, limit=limit, reverse=self._reverse, deref=every.session_prefix)
        stats = await self._stats([entry.value.decode() for entry in page]) if page else ()
        items: list[tuple[str, Timed]] = []
        begin = len(query.base)
        decode = every.sessions._codec.decode
        for entry, stat in zip(page, stats, strict=True):
            target, part = live(entry.target), entry.value.decode()
            if target is None or stat is None or stat.indexed_at is None:
                continue
            now = every.updated_key(part, stat.indexed_at)
            if entry.key != now and (not self._atomic or (now < entry.key) is self._reverse):
                continue  # a crash left it; or it moved since the scan, to where it will be met
            try:
                session = decode(target.key, target.value)
            except CorruptRecord as error:
                if self._on_corrupt is None:
                    raise
                self._on_corrupt(error)
                continue
            session.updated_at = stat.updated_at
            items.append((entry.key[begin:], Timed(session, stat)))
        return Chunk(items, len(page), page[-1].key[len(query.base) :] if len(page) == limit else None)


def _begins(prefix: str) -> Test:
    return lambda session: session.id.startswith(prefix)


def _titled(text: str) -> Test:
    needle = folded(text)
    return lambda session: session.title is not None and needle in folded(session.title)


def _of_session(test: Test) -> Test:
    return lambda timed: test(timed.session)


def _placed(label: str) -> Callable[[Timed], str]:
    """Return what gives a session's position in an order."""

    def place(timed: Timed) -> str:
        session, part = timed.session, keys.encode(timed.session.id)
        if label == "title":
            return f"0{keys.escape(session.title)}!{part}" if session.title is not None else f"1!{part}"
        if label == "id":
            return part
        value: Any = (timed.stat.messages if timed.stat else 0) if label == "message_count" else getattr(session, label)
        return f"{downwards(value)}!{part}"

    return place


def _moved(at: datetime, by: timedelta) -> datetime:
    try:
        return at + by
    except OverflowError:
        return at
