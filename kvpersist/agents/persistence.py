"""The way in: an agent's records in one namespace of a store."""

from __future__ import annotations

import time
from bisect import bisect_right
from collections.abc import Awaitable, Callable, Iterable, Mapping
from contextlib import AbstractAsyncContextManager, suppress
from typing import Any, Literal, Self, TypeVar
from uuid import UUID

from msgspec import UNSET, UnsetType

from kvpersist import keys
from kvpersist.agents.agent_forks import AgentForks, topic_cascade
from kvpersist.agents.agents import AgentParents, Agents
from kvpersist.agents.collections import Collections
from kvpersist.agents.confirmations import Confirmations
from kvpersist.agents.containers import Containers
from kvpersist.agents.family import Belongs, Family
from kvpersist.agents.history import Compressions, RecoveredFiles, Windows
from kvpersist.agents.images import Images
from kvpersist.agents.login_sessions import LoginSessions
from kvpersist.agents.making import finish_makings
from kvpersist.agents.media import MediaCache
from kvpersist.agents.messages import Messages
from kvpersist.agents.ordered import OrderedTurns
from kvpersist.agents.prototypes import Prototypes
from kvpersist.agents.providers import Providers
from kvpersist.agents.records import Message, Session, Stats, TimelineItem, ToolCall
from kvpersist.agents.secrets import SecretKey, Secrets
from kvpersist.agents.sessions import Sessions
from kvpersist.agents.snapshots import Snapshots
from kvpersist.agents.stat import tool_stats
from kvpersist.agents.todos import Todos
from kvpersist.agents.tool_calls import ToolCalls
from kvpersist.agents.traces import Traces
from kvpersist.agents.turns import Turns
from kvpersist.driver import Clock, Driver
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
_ARGUMENTS = ("namespace", "session_indexes", "message_indexes", "tool_call_indexes", "events", "secret_key", "clock")
_COLLECTIONS = frozenset(("session", "message", "tool_call", *COLLECTIONS))


class Persistence:
    """Sessions, messages, tool calls and events of one namespace. Made by `open`.

    Attributes:
        store: plain keys beside the records, in namespaces of their own.
        sessions, messages, tool_calls: the records.
        agents, todos, snapshots, windows, compressions, recovered_files, media: agents, and their state.
        confirmations, traces: what belongs to sessions, too.
        containers, images, prototypes, providers: what sessions are made in, and of.
        login_sessions: who is logged in.
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
        events: Mapping[str, Any] | None = None,
        secret_key: SecretKey | None = None,
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
            indexes=_own(session_indexes),
        )
        messages = Repository(
            store,
            Message,
            name="message",
            key=("session_id", "number"),
            namespace=namespace,
            indexes=[Index("id", unique=True), *message_indexes],
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
        self._family = Family(store, namespace)
        self._all = Collections(self._family, sessions, messages, tool_calls, own_call_indexes=bool(more_calls))
        atomic = store.capabilities.atomic_batch != "none"
        turns = Turns(self._all) if atomic else OrderedTurns(self._all)
        self.sessions = Sessions(self._all, turns)
        self.messages = Messages(self._all, turns)
        self.tool_calls = ToolCalls(self._all, turns)
        self.confirmations = Confirmations(self._family, self._all.births)
        self.traces = Traces(self._family, self._all.births)
        self.login_sessions = LoginSessions(self._family)
        self.containers = Containers(self._family)
        containers = self.containers.births
        self.images = Images(self._family, containers)
        self.prototypes = Prototypes(self._family, containers)
        self.providers = Providers(self._family, containers, Secrets(secret_key))
        self.sessions._belong(Belongs("container_id", containers))
        self.sessions._belong(Belongs("image_id", self.images.births, cascade=False))
        self.events = EventQueue(store, namespace=namespace, **(events or {}))
        agents = AgentParents(self._family)
        self.sessions._belong(Belongs("agent_id", agents.births, optional=True))
        agents.births.also(topic_cascade(self.events, store))
        self.todos = Todos(self._family, agents.births)
        self.snapshots = Snapshots(self._family, agents.births, self.sessions, self.messages)
        self.windows = Windows(self._family, agents.births)
        self.compressions = Compressions(self._family, agents.births)
        self.recovered_files = RecoveredFiles(self._family, agents.births)
        self.media = MediaCache(self._family, agents.births)
        self._forks = AgentForks(
            self._family,
            agents,
            sessions=self.sessions,
            messages=self.messages,
            events=self.events,
            todos=self.todos,
            snapshots=self.snapshots,
            windows=self.windows,
            compressions=self.compressions,
            recovered_files=self.recovered_files,
            media=self.media,
        )
        self.agents = Agents(agents, self.sessions, self.snapshots, self._forks)
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
        if name in _COLLECTIONS or name in self._family.repositories:
            raise BadOption("name", f"{name!r} is the agent's own collection: choose another name")
        return Repository(self.store, type, name=name, key=key, indexes=indexes, namespace=self.namespace, **options)

    def atomic(self) -> AbstractAsyncContextManager[Transaction]:
        """As `Store.atomic`: for plain keys and for repositories of your own, by their ``tx=``."""
        return self.store.atomic()

    async def transact(self, fn: Callable[[Transaction], Awaitable[R]], *, attempts: int = 10) -> R:
        """As `Store.transact`."""
        return await self.store.transact(fn, attempts=attempts)

    async def reindex(self, progress: Callable[[int], None] | None = None) -> dict[str, Reindexed]:
        """Build the indexes of the agent's collections that were declared over records already there.

        Online and resumable, as `Repository.reindex`; returns what was done, by collection.
        """
        await self._all.own()
        return {
            "session": await self._all.sessions.reindex(progress),
            "message": await self._all.messages.reindex(progress),
            "tool_call": await self._all.tool_calls.reindex(progress),
            **{name: await each.reindex(progress) for name, each in self._family.repositories.items()},
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

    async def stats(self, *, on_corrupt: OnCorrupt | None = None) -> Stats:
        """Count everything in the namespace from the sessions' stats: no message or call is read.

        Args:
            on_corrupt: is handed the error of each damaged stat, whose session is then not counted (the
                next write to it mends it); without it, the error is raised.
        """
        total = Stats()
        prefix = self._all.stat_prefix
        start, end = prefix, keys.prefix_end(prefix)
        while True:
            page = await self.store._scan(start, end, limit=_PAGE)
            for stat in decoded(self._all.stats, page, on_corrupt):
                total.sessions += 1
                total.messages += stat.messages
                _add(total.messages_by_role, stat.roles)
                for name, counts in stat.tools.items():
                    tool = tool_stats(counts)
                    total.tool_calls += tool.calls
                    total.tool_errors += tool.failed
                    _add(total.tool_calls_by_name, {name: tool.calls})
                    _add(total.tool_calls_by_state, tool.by_state())
            if len(page) < _PAGE:
                return total
            start = page[-1].key + "!"  # no key lies between a key and itself + '!'

    async def close(self) -> None:
        """End what reads events, and close the store if `open` opened it; a second call does nothing."""
        await self.events.close()
        if self._owns_store:
            await self.store.close()

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
    events: Mapping[str, Any] | None = None,
    secret_key: SecretKey | None = None,
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
        events: settings of ``db.events``, such as ``{"retention": 7 * 86_400}``, as for `EventQueue`.
        secret_key: encrypts the secrets of ``db.providers``: 32 bytes or their base64, or several, of which
            the first encrypts and all decrypt. None: as the variable ``KVPERSIST_SECRET_KEY`` says.
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
                events=events,
                secret_key=secret_key,
                owns_store=owns,
            )
            await db._all.own()  # before a plain write can put something between the records
            with suppress(ReadOnly):  # whoever may write finishes them; what is left is not seen here either
                await db._family.finish_all()
                await finish_makings(db._all)
                await db._forks.sweep()
        except BaseException:  # cancelled too: nothing may stay open
            if owns:
                await store.close()
            raise
        return db

    return Opening(make)


def _own(indexes: Iterable[Index]) -> list[Index]:
    """Return the indexes of sessions; refuse what cannot be indexed in a session's own record."""
    usual = [
        Index("user_id", order_by="-created_at"),
        Index("agent_id", order_by="-created_at"),
        Index("container_id", order_by="-created_at"),
        Index("image_id", order_by="-created_at"),
        Index(order_by="-created_at"),
    ]
    named = {index.name: (index.fields, index.order_by) for index in usual}
    declared = [index for index in indexes if named.get(index.name) != (index.fields, index.order_by)]
    for index in declared:
        if index.name == "updated" or "updated_at" in (*index.fields, (index.order_by or "").removeprefix("-")):
            raise BadOption("session_indexes", "updated_at is kept beside the record: use sessions.recent()")
    return [*usual, *declared]


def _add(total: dict[str, int], counts: Mapping[str, int]) -> None:
    for name, count in counts.items():
        total[name] = total.get(name, 0) + count
