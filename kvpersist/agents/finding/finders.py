"""How sessions, messages and tool calls are found: which index or range answers a query, and in which order."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any, ClassVar, Final, NamedTuple, TypeVar

from kvpersist import keys
from kvpersist.agents.content import MORE, TEXT_INDEX, Term, content_types, folded, lookup, text_index, text_of
from kvpersist.agents.conversations.collections import Collections
from kvpersist.agents.conversations.stat import Stat
from kvpersist.agents.conversations.turns import EXACT
from kvpersist.agents.finding.queries import (
    Asked,
    Choice,
    Chunk,
    Finder,
    Found,
    Indexed,
    Merged,
    Nested,
    Plan,
    Replaced,
    Sorted,
    Source,
    Test,
    Through,
    Where,
    best,
    normal,
    passing,
    tests_of,
    within,
)
from kvpersist.agents.records import ROLES, TOOL_CALL_STATES, Message, Session, ToolCall
from kvpersist.errors import BadRequest, CorruptRecord, IndexNotReady, KvError, NoIndex
from kvpersist.index import Index, bind
from kvpersist.index.declaration import Range
from kvpersist.index.reads import OnCorrupt, Query, decoded
from kvpersist.index.writer import live
from kvpersist.log import read_range
from kvpersist.repository import Repository

__all__ = [
    "OWNERS",
    "SESSION_INDEXES",
    "SESSION_ORDERS",
    "CallFinder",
    "Chosen",
    "MessageFinder",
    "SessionFinder",
    "Timed",
]

R = TypeVar("R")

OWNERS: Final = ("user_id", "agent_id", "container_id", "image_id", "template_id", "parent_id")
"""The fields of a session that it is found by."""

SESSION_INDEXES: Final = (*(Index(owner, order_by="-created_at") for owner in OWNERS), Index(order_by="-created_at"))
"""The indexes that sessions always have; an owner that is not set takes no room in its own."""

SESSION_ORDERS: Final = ("created_at", "updated_at", "title", "message_count", "id")
"""What sessions can be ordered by; with ``-`` before it downwards."""

_DESCENDING: Final = frozenset(("created_at", "updated_at", "message_count"))  # what positions hold greatest first
_SESSION_ALIASES: Final = {"created": "created_at", "updated": "updated_at"}
_KEYS: Final = 1_000  # keys of the index of words read at once
_WINDOW: Final = 16  # messages whose calls are read at once where a backend only reads upwards
_NARROW: Final = "Name an owner or a time, declare an index, or pass scan=True to read everything"
_MORE: Final = "Narrow it, declare an index, raise scanned=, go on by page(), or pass scan=True"


class Timed(NamedTuple):
    """A session with what is counted beside it; None where that is damaged."""

    session: Session
    stat: Stat | None


class Chosen(NamedTuple):
    """The index or range that a query goes through.

    ``used``: the conditions it answers. ``order`` and ``descending``: how it orders. ``narrow``: it
    does not hold the whole collection.
    """

    query: Query
    used: frozenset[str]
    order: str
    descending: bool
    narrow: bool


class _Finder(Finder[Any, R]):
    """What the three have in common."""

    def __init__(self, collections: Collections, repository: Repository[Any]) -> None:
        self._all = collections
        self._store = collections.store
        self._repository = repository
        self._reverses = collections.store.capabilities.reverse

    async def _ready(self, choices: Sequence[Choice]) -> tuple[Chosen | None, str | None]:
        """The first choice that can be read, and the name of a better one that cannot yet."""
        unready: str | None = None
        for choice in choices:
            query = await self._repository._reader.through(choice.bound, choice.where)
            if query is not None:
                used = frozenset(choice.where)
                return Chosen(query, used, choice.order, choice.descending, bool(used)), unready
            unready = unready or choice.bound.name
        return None, unready

    def _wide(self, asked: Asked, unready: str | None, what: Mapping[str, Any] | str) -> KvError:
        """The error of a query that would read the whole collection."""
        if unready is not None:
            return IndexNotReady(self.collection, unready)
        return self._refusal(what, _NARROW)

    def _refusal(self, what: Mapping[str, Any] | str, advice: str = _MORE) -> KvError:
        shown = what if isinstance(what, str) else ", ".join(what)
        return NoIndex(self.collection, shown, tuple(str(bound) for bound in self._repository.indexes), advice)

    def _counted(self, queries: Sequence[Query]) -> Callable[[], Awaitable[int]]:
        """Return what counts the entries of ranges. It raises Replaced."""
        reader = self._repository._reader

        async def count() -> int:
            total = 0
            for query in queries:
                total += await reader.count(query)
                if not await reader.unchanged(query):
                    raise Replaced
            return total

        return count

    def _between(self, start: str, end: str | None, base: str = "") -> Query:
        """The records between two keys."""
        return Query(None, start, end, None, b"", base=base)

    def _directed(
        self,
        asked: Asked,
        chosen: Chosen,
        order: str,
        descending: bool,
        make: Callable[[bool], Source[Any]],
        place: Callable[[Any], str],
        refusal: Callable[[], KvError],
    ) -> tuple[Source[Any], bool]:
        """Return ``make(reverse)`` if that comes in the order asked for, else sorted; and whether it was sorted."""
        if chosen.order == order and (chosen.descending == descending or self._reverses):
            return make(chosen.descending != descending), False
        most = None if asked.scan else asked.scanned
        reverse = descending != (order in _DESCENDING)
        return Sorted(make(False), place, reverse=reverse, most=most, refusal=refusal), True


class SessionFinder(_Finder[Session]):
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


class MessageFinder(_Finder[Message]):
    """Finds messages."""

    collection: ClassVar[str] = "message"

    def __init__(
        self, collections: Collections, sessions: SessionFinder, last_number: Callable[[str], Awaitable[int]]
    ) -> None:
        """``last_number`` is asked where a backend cannot read backwards."""
        super().__init__(collections, collections.messages)
        self._sessions = sessions
        self._last_number = last_number
        self._words = bind(text_index(), Message)  # kept up by every process, once one has declared it
        collections.messages._definitions.adopt(self._words)
        declared = {part.label for bound in collections.messages.indexes for part in bound.parts}
        self._owners = tuple(owner for owner in OWNERS if owner not in declared)

    @staticmethod
    def normal(where: Mapping[str, Any]) -> Where:
        """Return conditions in one spelling. Raises BadRequest."""
        asked = normal(where, {"created": "created_at"}, ("created_at",))
        _refuse_unknown(asked, "role", ROLES)
        if "text" in asked and (not isinstance(asked["text"], str) or not asked["text"]):
            raise BadRequest("text: look for a text that is not empty")
        if "has_tool_calls" in asked and not isinstance(asked["has_tool_calls"], bool):
            raise BadRequest("has_tool_calls is True or False")
        return asked

    async def plan(self, asked: Asked) -> Plan[Message]:
        """As `Finder.plan`."""
        where = dict(asked.where)
        owners = {owner: where.pop(owner) for owner in self._owners if owner in where}
        if "session_id" in where:
            return await self._in_session(asked, str(where.pop("session_id")), owners, where)
        usable = {label: value for label, value in where.items() if label not in _MESSAGE_TESTS}
        choices = [each for each in best(self._repository.indexes, usable, "created_at") if each.where]
        chosen, unready = await self._ready(choices)
        if chosen is not None:
            return self._indexed(asked, chosen, owners, where)
        return await self._across(asked, owners, where, unready)

    async def finished(self, records: list[Message], on_corrupt: OnCorrupt | None) -> list[Message]:
        """As `Finder.finished`."""
        return records

    async def search(self, asked: Asked, limit: int) -> Found[Message]:
        """Find messages of all sessions, or of an owner's, by a text: through the index of words if there is one."""
        text = folded(asked.where["text"])
        term = lookup(text)
        declared = any(bound.name == TEXT_INDEX for bound in self._repository.indexes)
        while True:
            query = None if term is None else await self._repository._reader.through(self._words, {TEXT_INDEX: MORE})
            if term is None or (query is None and not declared):
                return await self.some(asked, limit)
            if query is None:
                raise IndexNotReady(self.collection, TEXT_INDEX)
            ids, complete = await self._looked_up(query, term, asked.scanned)
            if await self._repository._reader.unchanged(query):
                break
        owners = {label: value for label, value in asked.where.items() if label in self._owners}
        tests = self._tests({label: value for label, value in asked.where.items() if label not in owners})
        if not term.everywhere:  # also of messages that are looked at for having more words than are indexed
            tests.append(_beginning(text))
        source = passing(_Listed(self._repository, ids, asked.on_corrupt), tests)
        if owners:
            source = Through(source, lambda items: self._owned(items, owners))
        plan = Plan(source=source, eager=False, most=None, refusal=self._never_refused)
        found = await self.some(asked, limit, plan)
        return Found(found, indexed=True, complete=complete)

    async def _looked_up(self, query: Query, term: Term, most: int) -> tuple[list[str], bool]:
        """The keys of messages with a term, or a longer one, or with too many; the newest first. Only keys are read."""
        assert query.slot is not None
        prefix = query.slot.prefix
        start = prefix + keys.escape(term.word) + ("" if term.open else "!")
        times: dict[str, str] = {}
        read = 0
        for low in (start, query.base):
            end, at = keys.prefix_end(low), low
            while read < most:
                size = min(_KEYS, most - read)
                page = await self._store._scan(at, end, limit=size, keys_only=True)
                read += len(page)
                for entry in page:
                    _, time, pk = entry.key[len(prefix) :].split("!", 2)
                    times[pk] = time
                if len(page) < size:
                    break
                at = page[-1].key + "!"
        return sorted(times, key=lambda pk: (times[pk], pk)), read < most

    async def _in_session(self, asked: Asked, session_id: str, owners: Where, rest: Where) -> Plan[Message]:
        rest = dict(rest)
        low, high = _numbers(rest)
        tests = self._tests(rest)
        order = asked.order or "asc"
        if owners and not await self._belongs(session_id, owners):
            tests = [_never]
        by_time = order in ("created_at", "-created_at")
        part = keys.encode(session_id)
        numbered = _Numbered(self._all, part, order == "desc", self._last_number, asked.on_corrupt, low, high)
        source = passing(numbered, tests)
        if by_time:
            source = self._by_time(source, order, None)
        most = asked.scanned if asked.partial else None
        return Plan(source=source, eager=by_time or not tests, most=most, refusal=self._never_refused)

    def _indexed(self, asked: Asked, chosen: Chosen, owners: Where, where: Where) -> Plan[Message]:
        rest = {label: value for label, value in where.items() if label not in chosen.used}
        tests = self._tests(rest)

        def refusal() -> KvError:
            return self._refusal({**rest, **owners} or f"order={asked.order}")

        def make(reverse: bool) -> Source[Message]:
            indexed = Indexed(self._repository, chosen.query, reverse=reverse, on_corrupt=asked.on_corrupt)
            source = passing(indexed, tests)
            return Through(source, lambda items: self._owned(items, owners)) if owners else source

        order = asked.order
        label, descending = chosen.order, chosen.descending
        if order is not None:
            label, descending = "created_at", order in ("desc", "-created_at")
        source, is_sorted = self._directed(asked, chosen, label, descending, make, _message_time, refusal)
        filtered = bool(tests or owners)
        most = None if asked.scan or is_sorted or not filtered else asked.scanned
        count = None if filtered else self._counted([chosen.query])
        return Plan(source=source, eager=is_sorted or not filtered, most=most, refusal=refusal, count=count)

    async def _across(self, asked: Asked, owners: Where, rest: Where, unready: str | None) -> Plan[Message]:
        tests = self._tests(rest)
        order = asked.order or "desc"
        by_time = order in ("created_at", "-created_at")
        if not owners and not asked.scan and not asked.partial and (rest or by_time):
            raise self._wide(asked, unready, rest or f"order={order}")
        newest_first = order != "asc"
        outer_order = "-created_at" if newest_first else "created_at"
        parents = Asked(owners, outer_order, asked.scanned, asked.scan, asked.on_corrupt)
        outer = (await self._sessions.plan(parents)).source
        nested = Nested(
            outer,
            lambda position: self._numbered(
                position.rpartition("!")[2], newest_first and not by_time, asked.on_corrupt
            ),
        )
        source = passing(nested, tests)

        def refusal() -> KvError:
            return self._refusal(rest or f"order={order}")

        if by_time:
            source = self._by_time(source, order, asked, refusal)
        filtered = bool(tests) or len(owners) > 1
        most = None if asked.scan or by_time or not filtered else asked.scanned
        count = self._repository.count if not owners and not rest else None
        return Plan(source=source, eager=by_time or not filtered, most=most, refusal=refusal, count=count)

    def _by_time(
        self, source: Source[Message], order: str, asked: Asked | None, refusal: Callable[[], KvError] | None = None
    ) -> Source[Message]:
        most = None if asked is None or asked.scan else asked.scanned
        return Sorted(
            source, _message_time, reverse=order == "created_at", most=most, refusal=refusal or self._never_refused
        )

    def _tests(self, rest: Where) -> list[Test]:
        return tests_of(Message, self._repository.indexes, _MESSAGE_TESTS, rest)

    def _numbered(self, part: str, reverse: bool, on_corrupt: OnCorrupt | None) -> Source[Message]:
        return _Numbered(self._all, part, reverse, self._last_number, on_corrupt)

    async def _belongs(self, session_id: str, owners: Where) -> bool:
        session = await self._all.sessions.get(session_id)
        return session is not None and _owned_by(session, owners)

    async def _owned(self, items: list[tuple[str, Message]], owners: Where) -> list[Message | None]:
        """Leave out messages whose session is not of these owners; one read."""
        ids = list({message.session_id for _, message in items})
        sessions = await self._all.sessions.get_many(ids)
        mine = {id_ for id_, session in zip(ids, sessions, strict=True) if session and _owned_by(session, owners)}
        return [message if message.session_id in mine else None for _, message in items]

    def _never_refused(self) -> KvError:
        return self._refusal("this")


class _Numbered(Source[Message]):
    """The messages of one session, by number."""

    def __init__(
        self,
        collections: Collections,
        part: str,
        reverse: bool,
        last_number: Callable[[str], Awaitable[int]],
        on_corrupt: OnCorrupt | None,
        low: int = 1,
        high: int | None = None,
    ) -> None:
        """``low`` and ``high``: the first and the last number there may be."""
        self._all, self._part, self._reverse = collections, part, reverse
        self._last_number, self._on_corrupt = last_number, on_corrupt
        self._low, self._end = max(0, low - 1), None if high is None else high + 1

    async def read(self, after: str | None, limit: int) -> Chunk[Message]:
        """As `Source.read`."""
        prefix = f"{self._all.message_prefix}{self._part}!"
        low, high = self._low, self._end
        if after is not None and self._reverse:
            high = keys.decode(after, int)
        elif after is not None:
            low = keys.decode(after, int)
        session_id = keys.unescape(self._part)
        found = await read_range(
            self._all.store, prefix, low, high, limit, self._reverse, self._last_number, session_id
        )
        codec = self._all.messages._codec
        items = [
            (entry.key[len(prefix) :], message)
            for entry in found
            for message in decoded(codec, (entry,), self._on_corrupt)
        ]
        return Chunk(items, len(found), found[-1].key[len(prefix) :] if len(found) == limit else None)


class _Listed(Source[Message]):
    """The messages of a list of keys; those that are gone are left out."""

    def __init__(self, repository: Repository[Message], pks: Sequence[str], on_corrupt: OnCorrupt | None) -> None:
        self._repository, self._pks, self._on_corrupt = repository, pks, on_corrupt

    async def read(self, after: str | None, limit: int) -> Chunk[Message]:
        """As `Source.read`; a position is a place in the list."""
        begin = 0 if after is None else int(after)
        prefix = self._repository._prefix
        pks = self._pks[begin : begin + limit]
        entries = await self._repository.store._entries([prefix + pk for pk in pks]) if pks else []
        items: list[tuple[str, Message]] = []
        for place, entry in enumerate(entries, begin + 1):
            kept = live(entry)
            read = () if kept is None else decoded(self._repository._codec, (kept,), self._on_corrupt)
            items += [(str(place), message) for message in read]
        end = begin + len(pks)
        return Chunk(items, len(pks), str(end) if end < len(self._pks) else None)


class CallFinder(_Finder[ToolCall]):
    """Finds tool calls."""

    collection: ClassVar[str] = "tool_call"

    def __init__(
        self,
        collections: Collections,
        last_number: Callable[[str], Awaitable[int]],
        results: Callable[[list[ToolCall], OnCorrupt | None], Awaitable[list[ToolCall]]],
    ) -> None:
        """``results`` fills in what stands in messages."""
        super().__init__(collections, collections.tool_calls)
        self._last_number = last_number
        self._results = results
        [self._by_state] = [each for each in collections.tool_calls.indexes if each.name == "state_by_created_at_desc"]

    @staticmethod
    def normal(where: Mapping[str, Any]) -> Where:
        """Return conditions in one spelling. Raises BadRequest."""
        asked = normal(where, {"created": "created_at"}, ("created_at", "started_at", "updated_at", "completed_at"))
        if isinstance(asked.get("state"), str):
            asked["state"] = asked["state"].lower()
        _refuse_unknown(asked, "state", TOOL_CALL_STATES)
        _refuse_unknown(asked, "decision", frozenset(("allow", "deny")))
        for label in ("is_error", "success", "has_approval"):
            if label in asked and not isinstance(asked[label], bool):
                raise BadRequest(f"{label} is True or False")
        if "success" in asked:
            failed = not asked.pop("success")
            if asked.setdefault("is_error", failed) is not failed:
                raise BadRequest("a call that succeeded is no error: ask for success or is_error")
        return asked

    async def plan(self, asked: Asked) -> Plan[ToolCall]:
        """As `Finder.plan`."""
        where = dict(asked.where)
        if "session_id" in where:
            return self._in_session(asked, str(where.pop("session_id")), where)
        usable = {label: value for label, value in where.items() if label not in _CALL_TESTS}
        choices = [each for each in best(self._repository.indexes, usable, "created_at") if each.where]
        chosen, unready = await self._ready(choices)
        if chosen is not None:
            return self._indexed(asked, chosen, where)
        return await self._across(asked, where, unready)

    async def finished(self, records: list[ToolCall], on_corrupt: OnCorrupt | None) -> list[ToolCall]:
        """As `Finder.finished`."""
        return await self._results(records, on_corrupt)

    def _in_session(self, asked: Asked, session_id: str, rest: Where) -> Plan[ToolCall]:
        tests = self._tests(rest)
        part = keys.encode(session_id)
        base = f"{self._all.call_prefix}{part}!"
        newest_first = asked.order != "asc"
        if newest_first and not self._reverses:
            source: Source[ToolCall] = _Downwards(self._all, session_id, self._last_number, asked.on_corrupt)
        else:
            query = self._between(base, keys.prefix_end(base), base)
            source = Indexed(self._repository, query, reverse=newest_first, on_corrupt=asked.on_corrupt)
        return Plan(source=passing(source, tests), eager=not tests, most=None, refusal=lambda: self._refusal(rest))

    def _indexed(self, asked: Asked, chosen: Chosen, where: Where) -> Plan[ToolCall]:
        rest = {label: value for label, value in where.items() if label not in chosen.used}
        tests = self._tests(rest)

        def refusal() -> KvError:
            return self._refusal(rest or f"order={asked.order}")

        def make(reverse: bool) -> Source[ToolCall]:
            return passing(Indexed(self._repository, chosen.query, reverse=reverse, on_corrupt=asked.on_corrupt), tests)

        label, descending = chosen.order, chosen.descending
        if asked.order is not None:
            label, descending = "created_at", asked.order == "desc"
        source, is_sorted = self._directed(asked, chosen, label, descending, make, _call_time, refusal)
        count = None if tests else self._counted([chosen.query])
        most = None if asked.scan or is_sorted or not tests else asked.scanned
        return Plan(source=source, eager=is_sorted or not tests, most=most, refusal=refusal, count=count)

    async def _across(self, asked: Asked, where: Where, unready: str | None) -> Plan[ToolCall]:
        """All calls by time: those of every state, merged."""
        rest = {label: value for label, value in where.items() if label not in ("created_at", "is_error")}
        if rest and "created_at" not in where and "is_error" not in where and not asked.scan:
            raise self._wide(asked, unready, rest)
        tests = self._tests(rest)
        ranged = {"created_at": where["created_at"]} if "created_at" in where else {}
        newest_first = asked.order != "asc"
        reverse = not newest_first and self._reverses
        sources: list[Source[ToolCall]] = []
        queries: list[Query] = []
        for state, sure in _states(where.get("is_error")):
            query = await self._repository._reader.through(self._by_state, {"state": state, **ranged})
            if query is None:
                raise IndexNotReady(self.collection, self._by_state.name)
            queries.append(query)
            source: Source[ToolCall] = Indexed(self._repository, query, reverse=reverse, on_corrupt=asked.on_corrupt)
            doubts = [] if sure else [_ended(where["is_error"])]
            sources.append(passing(source, [*tests, *doubts]))
        merged: Source[ToolCall] = Merged(sources, reverse=reverse)

        def refusal() -> KvError:
            return self._refusal(rest or f"order={asked.order}")

        is_sorted = not newest_first and not reverse
        if is_sorted:
            most = None if asked.scan else asked.scanned
            merged = Sorted(merged, _call_time, reverse=True, most=most, refusal=refusal)
        count: Callable[[], Awaitable[int]] | None = None
        if not where:
            count = self._repository.count
        elif not tests and "is_error" not in where:
            count = self._counted(queries)
        most = None if asked.scan or is_sorted or not tests else asked.scanned
        return Plan(source=merged, eager=is_sorted or not tests, most=most, refusal=refusal, count=count)

    def _tests(self, rest: Where) -> list[Test]:
        return tests_of(ToolCall, self._repository.indexes, _CALL_TESTS, rest)


class _Downwards(Source[ToolCall]):
    """The calls of one session, the last first, where a backend only reads upwards: by windows of messages."""

    def __init__(
        self,
        collections: Collections,
        session_id: str,
        last_number: Callable[[str], Awaitable[int]],
        on_corrupt: OnCorrupt | None,
    ) -> None:
        self._all, self._session_id = collections, session_id
        self._last_number, self._on_corrupt = last_number, on_corrupt

    async def read(self, after: str | None, limit: int) -> Chunk[ToolCall]:
        """As `Source.read`."""
        part = keys.encode(self._session_id)
        prefix = f"{self._all.call_prefix}{part}!"
        if after is None:
            high = await self._last_number(self._session_id) + 1
        else:
            high = keys.decode(after.partition("!")[0], int)
        low = max(0, high - max(limit, _WINDOW))
        items: list[tuple[str, ToolCall]] = []
        async for entry in self._all.calls_of(part, low, high):
            position = entry.key[len(prefix) :]
            if after is not None and position >= after:
                continue
            read = decoded(self._all.tool_calls._codec, (entry,), self._on_corrupt)
            items += [(position, call) for call in read]
        items.reverse()
        if len(items) > limit:
            return Chunk(items[:limit], limit, items[limit - 1][0])
        return Chunk(items, len(items), keys.encode(low) if low else None)


# ---- conditions that are no fields


def _begins(prefix: str) -> Test:
    return lambda session: session.id.startswith(prefix)


def _titled(text: str) -> Test:
    needle = folded(text)
    return lambda session: session.title is not None and needle in folded(session.title)


def _saying(text: str) -> Test:
    needle = folded(text)
    return lambda message: needle in folded(text_of(message.content))


def _beginning(needle: str) -> Test:
    at_a_word = re.compile(rf"(?<!\w){re.escape(needle)}")
    return lambda message: at_a_word.search(folded(text_of(message.content))) is not None


def _made_of(kind: str) -> Test:
    return lambda message: kind in content_types(message)


def _calling(asked: bool) -> Test:
    return lambda message: bool(message.tool_calls) is asked


def _approved(asked: bool) -> Test:
    return lambda call: (call.approval is not None) is asked


def _decided(asked: str) -> Test:
    return lambda call: call.approval is not None and call.approval.decision == asked


def _ended(is_error: bool) -> Test:
    return lambda call: call.is_error is is_error


_MESSAGE_TESTS: Final[dict[str, Callable[[Any], Test]]] = {
    "text": _saying,
    "content_type": _made_of,
    "has_tool_calls": _calling,
}
_CALL_TESTS: Final[dict[str, Callable[[Any], Test]]] = {"has_approval": _approved, "decision": _decided}


def _never(_: object) -> bool:
    return False


def _of_session(test: Test) -> Test:
    return lambda timed: test(timed.session)


def _owned_by(session: Session, owners: Where) -> bool:
    return all(within(getattr(session, owner), value) for owner, value in owners.items())


def _numbers(where: Where) -> tuple[int, int | None]:
    """Take what is asked of a message's number out of the conditions: the first and the last there may be."""
    asked = where.get("number")
    low, high = (asked.low, asked.high) if isinstance(asked, Range) else (asked, asked)
    if asked is None or not all(each is None or type(each) is int for each in (low, high)):
        return 1, None
    del where["number"]
    return 1 if low is None else low, high


def _refuse_unknown(asked: Where, label: str, known: frozenset[str]) -> None:
    value = asked.get(label)
    if value is not None and not isinstance(value, Range) and value not in known:
        raise BadRequest(f"unknown {label} {value!r}: use one of {', '.join(sorted(known))}")


def _states(is_error: bool | None) -> list[tuple[str, bool]]:
    """The states of calls with this outcome, and whether all calls in them have it."""
    if is_error is None:
        return [(state, True) for state in sorted(TOOL_CALL_STATES)]
    return [("failed" if is_error else "completed", True), ("denied", False), ("sealed", False)]


# ---- positions


def _placed(label: str) -> Callable[[Timed], str]:
    """Return what gives a session's position in an order."""

    def place(timed: Timed) -> str:
        session, part = timed.session, keys.encode(timed.session.id)
        if label == "title":
            return f"0{keys.escape(session.title)}!{part}" if session.title is not None else f"1!{part}"
        if label == "id":
            return part
        value: Any = (timed.stat.messages if timed.stat else 0) if label == "message_count" else getattr(session, label)
        return f"{_downwards(value)}!{part}"

    return place


def _message_time(message: Message) -> str:
    part = keys.encode(message.session_id)
    return f"{_downwards(message.created_at)}!{part}!{keys.encode(message.number)}"


def _call_time(call: ToolCall) -> str:
    place = "!".join((keys.encode(call.session_id), keys.encode(call.number), keys.encode(call.position)))
    return f"{_downwards(call.created_at)}!{place}"


def _downwards(value: datetime | int | None) -> str:
    """A value as a position holds it, greatest first; what has none comes last."""
    return "~" if value is None else keys.encode(value, True)


def _moved(at: datetime, by: timedelta) -> datetime:
    try:
        return at + by
    except OverflowError:
        return at
