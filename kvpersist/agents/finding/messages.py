"""Finding messages: in one session, in the sessions of an owner, or through an index."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, ClassVar, Final

from kvpersist import keys
from kvpersist.agents.collections import Collections
from kvpersist.agents.content import MORE, TEXT_INDEX, Term, content_types, folded, lookup, text_index, text_of
from kvpersist.agents.finding.choices import best
from kvpersist.agents.finding.conditions import Test, Where, normal, tests_of, within
from kvpersist.agents.finding.finder import Chosen, IndexFinder, downwards, refuse_unknown
from kvpersist.agents.finding.queries import Asked, Found, Plan
from kvpersist.agents.finding.sessions import OWNERS, SessionFinder
from kvpersist.agents.finding.sources import Chunk, Indexed, Nested, Sorted, Source, Through, passing
from kvpersist.agents.records import ROLES, Message, Session
from kvpersist.errors import BadRequest, IndexNotReady, KvError
from kvpersist.index import bind
from kvpersist.index.declaration import Range
from kvpersist.index.reads import OnCorrupt, Query, decoded
from kvpersist.index.writer import live
from kvpersist.log import read_range
from kvpersist.repository import Repository

__all__ = ["MessageFinder"]

_KEYS: Final = 1_000  # keys of the index of words read at once


class MessageFinder(IndexFinder[Message]):
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
        refuse_unknown(asked, "role", ROLES)
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


_MESSAGE_TESTS: Final[dict[str, Callable[[Any], Test]]] = {
    "text": _saying,
    "content_type": _made_of,
    "has_tool_calls": _calling,
}


def _never(_: object) -> bool:
    return False


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


def _message_time(message: Message) -> str:
    part = keys.encode(message.session_id)
    return f"{downwards(message.created_at)}!{part}!{keys.encode(message.number)}"
