"""The way in: an agent's records in one namespace of a store."""

from __future__ import annotations

import time
from bisect import bisect_right
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from contextlib import AbstractAsyncContextManager, suppress
from typing import Any, Literal, Self, TypeVar
from uuid import UUID

from msgspec import UNSET, UnsetType

from kvpersist import keys
from kvpersist.agents.collections import Collections
from kvpersist.agents.content import text_index as words_index
from kvpersist.agents.deletion import Deletions
from kvpersist.agents.finders import SESSION_INDEXES
from kvpersist.agents.messages import Messages
from kvpersist.agents.ordered import OrderedTurns
from kvpersist.agents.records import Message, Session, Stats, TimelineItem, ToolCall
from kvpersist.agents.sessions import Sessions
from kvpersist.agents.tool_calls import ToolCalls
from kvpersist.agents.turns import Turns
from kvpersist.driver import Clock, Driver, Entry
from kvpersist.errors import BadOption, ReadOnly
from kvpersist.events import EventQueue
from kvpersist.events.queue import COLLECTIONS
from kvpersist.index import Index
from kvpersist.index.reads import OnCorrupt, decoded
from kvpersist.index.rebuild import Reindexed
from kvpersist.log import require_sequences
from kvpersist.repository import Repository
from kvpersist.store import Opening, Store, _caller, _opened
from kvpersist.transaction import Transaction
from kvpersist.urls import Where

__all__ = ["Persistence", "open"]

R = TypeVar("R")

_PAGE = 500  # stats read at once
_ARGUMENTS = (  # of `open`
    "namespace",
    "session_indexes",
    "message_indexes",
    "tool_call_indexes",
    "text_index",
    "events",
    "clock",
)
_COLLECTIONS = frozenset(("session", "message", "tool_call", *COLLECTIONS))


class Persistence:
    """Sessions, messages, tool calls and events of one namespace. Made by `open`.

    Attributes:
        store: plain keys beside the records, in namespaces of their own.
        sessions, messages, tool_calls: the records.
        events: the topics, an `EventQueue`.
    """

    def __init__(
        self,
        store: Store,
        *,
        namespace: str = "kv",
        session_indexes: Iterable[Index] = (),
        message_indexes: Iterable[Index] = (),
        tool_call_indexes: Iterable[Index] = (),
        text_index: bool = False,
        events: Mapping[str, Any] | None = None,
        owns_store: bool = False,
    ) -> None:
        require_sequences(store, "persistence of sessions")
        self.store = store
        self.namespace = namespace
        more_calls = list(tool_call_indexes)
        sessions = Repository(
            store,
            Session,
            name="session",
            namespace=namespace,
            indexes=[*SESSION_INDEXES, *_own(session_indexes)],
        )
        messages = Repository(
            store,
            Message,
            name="message",
            key=("session_id", "number"),
            namespace=namespace,
            indexes=[Index("id", unique=True), *message_indexes, *([words_index()] if text_index else ())],
        )
        tool_calls = Repository(
            store,
            ToolCall,
            name="tool_call",
            key=("session_id", "number", "position"),
            namespace=namespace,
            indexes=[
                Index("name", order_by="-created_at"),
                Index("state", order_by="-created_at"),
                *more_calls,
            ],
        )
        self._all = Collections(store, namespace, sessions, messages, tool_calls, own_call_indexes=bool(more_calls))
        atomic = store.capabilities.atomic_batch != "none"
        turns = Turns(self._all) if atomic else OrderedTurns(self._all)
        self._deletions = Deletions(self._all)
        self.sessions = Sessions(self._all, turns, self._deletions)
        self.messages = Messages(self._all, turns, self.sessions._finder)
        self.tool_calls = ToolCalls(self._all, turns, self.messages)
        self.events = EventQueue(store, namespace=namespace, **(events or {}))
        self._owns_store = owns_store

    def repository(
        self,
        type: type[R],
        *,
        name: str,
        key: str | tuple[str, ...] = "id",
        indexes: Iterable[Index] = (),
        **options: Any,
    ) -> Repository[R]:
        """Declare a collection of your own in this namespace. As `Repository`.

        Raises:
            BadOption: ``name`` is one of the agent's own collections.
        """
        if name in _COLLECTIONS:
            raise BadOption("name", f"{name!r} is the agent's own collection: choose another name")
        return Repository(self.store, type, name=name, key=key, indexes=indexes, namespace=self.namespace, **options)

    def atomic(self) -> AbstractAsyncContextManager[Transaction]:
        """As `Store.atomic`: for plain keys and for repositories of your own, by their ``tx=``."""
        return self.store.atomic()

    async def transact(self, fn: Callable[[Transaction], Awaitable[R]], *, attempts: int = 10) -> R:
        """As `Store.transact`."""
        return await self.store.transact(fn, attempts=attempts)

    async def reindex(self, progress: Callable[[int], None] | None = None) -> dict[str, Reindexed]:
        """Build the indexes of sessions, messages and calls that were declared over records already there.

        Online and resumable, as `Repository.reindex`; returns what was done, by collection.
        """
        await self._all.own()
        return {
            "session": await self._all.sessions.reindex(progress),
            "message": await self._all.messages.reindex(progress),
            "tool_call": await self._all.tool_calls.reindex(progress),
        }

    async def timeline(
        self,
        session_id: str | UUID,
        *,
        after: int = 0,
        limit: int = 1_000,
        on_corrupt: OnCorrupt | None = None,
    ) -> list[TimelineItem]:
        """Return a session's messages in order, each with the calls it asked for, their results and durations.

        Args:
            after: begin behind this message number.
            limit: how many messages at most.
            on_corrupt: is handed the error of each damaged message or call, which is left out; without
                it, the error is raised.
        """
        found = await self.messages.range(session_id, after=after, limit=limit, on_corrupt=on_corrupt)
        if not found:
            return []
        # behind the session's last message there may be calls recorded when a later one, since deleted, was there
        end = None if len(found) < limit and on_corrupt is None else found[-1].number + 1
        calls = await self.tool_calls.of(session_id, after=after, before=end, on_corrupt=on_corrupt)
        numbers = [message.number for message in found]
        items = {
            message.number: TimelineItem(
                at=message.created_at or self._all.now(), number=message.number, message=message, tool_calls=[]
            )
            for message in found
        }
        for call in calls:
            # recorded before the first message, or with one that was deleted: it stands with the one before
            item = items[numbers[max(0, bisect_right(numbers, call.number) - 1)]]
            item.tool_calls.append(call)
            if call.result_number in items:
                items[call.result_number].answers = call
        return list(items.values())

    async def stats(
        self,
        *,
        user_id: str | UUID | None = None,
        agent_id: str | UUID | None = None,
        session_id: str | UUID | None = None,
        on_corrupt: OnCorrupt | None = None,
    ) -> Stats:
        """Count what the namespace holds, or what belongs to a user, an agent or one session.

        It is told by the sessions' stats: no message or call is read.

        Args:
            on_corrupt: is handed the error of each damaged stat, whose session is then not counted (the
                next write to it mends it); without it, the error is raised.

        Raises:
            IndexNotReady: by an agent, where sessions are older than that index: `reindex` first.
        """
        total = Stats()
        given = {"user_id": user_id, "agent_id": agent_id, "id": session_id}
        where = {label: str(value) for label, value in given.items() if value is not None}
        async for page in self._stat_pages(where):
            for stat in decoded(self._all.stats, page, on_corrupt):
                total.sessions += 1
                total.messages += stat.messages
                _add(total.messages_by_role, stat.roles)
                for name, (calls, completed, failed) in stat.tools.items():
                    states = {"pending": calls - completed - failed, "completed": completed, "failed": failed}
                    total.tool_calls += calls
                    total.tool_errors += failed
                    _add(total.tool_calls_by_name, {name: calls})
                    _add(total.tool_calls_by_state, {state: count for state, count in states.items() if count})
        return total

    async def close(self) -> None:
        """End what reads events, and close the store if `open` opened it; a second call does nothing."""
        await self.events.close()
        if self._owns_store:
            await self.store.close()

    async def _stat_pages(self, where: dict[str, str]) -> AsyncIterator[list[Entry]]:
        prefix = self._all.stat_prefix
        if where:
            async for parts in self.sessions._finder.parts(where):
                found = await self.store._entries([prefix + part for part in parts]) if parts else []
                yield [entry for entry in found if entry is not None]
            return
        start: str | None = prefix
        while start is not None:
            page = await self.store._scan(start, keys.prefix_end(prefix), limit=_PAGE)
            yield page
            start = page[-1].key + "!" if len(page) == _PAGE else None  # no key lies between a key and itself + '!'

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


def open(
    where: Where | Driver | Store | None = None,
    *,
    namespace: str = "kv",
    session_indexes: Iterable[Index] = (),
    message_indexes: Iterable[Index] = (),
    tool_call_indexes: Iterable[Index] = (),
    text_index: bool = False,
    events: Mapping[str, Any] | None = None,
    codec: Literal["msgpack", "json"] | None = None,
    ttl: float | None | UnsetType = UNSET,
    timeout: float | None | UnsetType = UNSET,
    clock: Clock = time.time,
    sweep: float | None | UnsetType = UNSET,
    **options: Any,
) -> Opening[Persistence]:
    """Open an agent's records; ``async with`` it, or await it and close it.

    A deletion that a crash interrupted is finished first.

    Args:
        where: a URL, a path, a mapping with a ``type`` key, a ready Driver, an open Store (both yours
            to close), or None: ``KVPERSIST_URL``, then ``kvpersist.toml``, then a SQLite file in the
            user's data folder.
        namespace: a tenant or application; namespaces of one store do not see each other.
        session_indexes, message_indexes, tool_call_indexes: indexes beyond the usual ones.
        text_index: keep an index of the words in messages, for `Messages.search`; other processes keep
            it up without saying so.
        events: settings of ``db.events``, such as ``{"retention": 7 * 86_400}``, as for `EventQueue`.
        codec, ttl, timeout, clock, sweep: as for `open_store`. ``ttl`` is for plain keys, and for
            repositories of your own: sessions and what belongs to them do not expire.
        options: the driver's, as for `open_store`.

    Raises:
        As `open_store`; Unsupported: the backend has no ordered scan or no conditional writes.
    """
    opener = _caller()
    given: dict[str, Any] = {"codec": codec or UNSET, "ttl": ttl, "timeout": timeout, "sweep": sweep}
    given = {name: value for name, value in given.items() if value is not UNSET}

    async def make() -> Persistence:
        store = await _opened(where, options, given, clock, opener, also=_ARGUMENTS)
        owns = store is not where
        try:
            db = Persistence(
                store,
                namespace=namespace,
                session_indexes=session_indexes,
                message_indexes=message_indexes,
                tool_call_indexes=tool_call_indexes,
                text_index=text_index,
                events=events,
                owns_store=owns,
            )
            await db._all.own()  # before a plain write can put something between the records
            with suppress(ReadOnly):  # whoever may write finishes them; what is left is not seen here either
                await db._deletions.finish_all()
        except BaseException:  # cancelled too: nothing may stay open
            if owns:
                await store.close()
            raise
        return db

    return Opening(make)


def _own(indexes: Iterable[Index]) -> list[Index]:
    """Refuse what cannot be indexed in a session's own record."""
    declared = list(indexes)
    for index in declared:
        if index.name == "updated" or "updated_at" in (*index.fields, (index.order_by or "").removeprefix("-")):
            raise BadOption("session_indexes", "updated_at is kept beside the record: use sessions.recent()")
    usual = {index.name: index for index in SESSION_INDEXES}
    return [index for index in declared if not _same(index, usual.get(index.name))]


def _same(index: Index, other: Index | None) -> bool:
    """Whether an index is declared already: it is among the usual ones."""
    parts = ("fields", "order_by", "unique", "multi", "version", "type")
    return other is not None and all(getattr(index, part) == getattr(other, part) for part in parts)


def _add(total: dict[str, int], counts: Mapping[str, int]) -> None:
    for name, count in counts.items():
        total[name] = total.get(name, 0) + count
