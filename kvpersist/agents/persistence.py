"""The way in: an agent's records in one namespace of a store."""

from __future__ import annotations

import os
import time
from bisect import bisect_right
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from contextlib import AbstractAsyncContextManager, suppress
from datetime import UTC, datetime
from typing import Any, Literal, Self, TypeVar, cast
from uuid import UUID

from msgspec import UNSET, UnsetType

from kvpersist import keys
from kvpersist.agents.births import Belongs, Family
from kvpersist.agents.checking import Checker, Consistency
from kvpersist.agents.collections import Collections
from kvpersist.agents.content import text_index as words_index
from kvpersist.agents.conversations.confirmations import Confirmations
from kvpersist.agents.conversations.making import finish_makings
from kvpersist.agents.conversations.messages import Messages
from kvpersist.agents.conversations.ordered import OrderedTurns
from kvpersist.agents.conversations.sessions import Sessions
from kvpersist.agents.conversations.tool_calls import ToolCalls
from kvpersist.agents.conversations.traces import Traces
from kvpersist.agents.conversations.turns import Turns
from kvpersist.agents.finding.sessions import SESSION_INDEXES
from kvpersist.agents.health import Health, Totals, health_of, size_of
from kvpersist.agents.placement import Beside, Placement, events_of
from kvpersist.agents.records import Message, Session, Stats, TimelineItem, ToolCall
from kvpersist.agents.runs.streams import Ending
from kvpersist.agents.runs.threads import ThreadManager
from kvpersist.agents.stat import tool_stats
from kvpersist.agents.state.agents import AgentParents, Agents
from kvpersist.agents.state.forks import AgentForks, topic_cascade
from kvpersist.agents.state.history import Compressions, RecoveredFiles, Windows
from kvpersist.agents.state.media import MediaCache
from kvpersist.agents.state.snapshots import Snapshots
from kvpersist.agents.state.todos import Todos
from kvpersist.agents.workspace.containers import Containers
from kvpersist.agents.workspace.images import Images
from kvpersist.agents.workspace.login_sessions import LoginSessions
from kvpersist.agents.workspace.prototypes import Prototypes
from kvpersist.agents.workspace.providers import Providers
from kvpersist.agents.workspace.secrets import SecretKey, Secrets
from kvpersist.config import DotEnv, Resolved, home_of, resolve, variables
from kvpersist.driver import Clock, Driver, Entry
from kvpersist.errors import BadOption, BadRequest, ReadOnly
from kvpersist.events import EventQueue
from kvpersist.events.queue import COLLECTIONS
from kvpersist.home import LOGS, Home
from kvpersist.index import Index
from kvpersist.index.reads import OnCorrupt, decoded
from kvpersist.index.rebuild import Reindexed
from kvpersist.log import require_sequences
from kvpersist.metrics import Metrics
from kvpersist.opening import Opening, caller_line, named_by, open_named
from kvpersist.repository import Repository
from kvpersist.store import Store
from kvpersist.transaction import Transaction
from kvpersist.urls import Where

__all__ = ["Persistence", "open"]

R = TypeVar("R")

_PAGE = 500  # stats read at once
_REFERENCES = (("snapshot", "session_id", "session"), ("compression", "window_id", "window"))
_SHARED = frozenset(("timeout", "sweep"))  # settings that all stores get
_ARGUMENTS = (  # of `open`, that are no settings of a URL
    "namespace",
    "session_indexes",
    "message_indexes",
    "tool_call_indexes",
    "text_index",
    "events",
    "secret_key",
    "clock",
    "files",
    "profile",
    "home",
    "dotenv",
    "logs",
)
_COLLECTIONS = frozenset(("session", "message", "tool_call", *COLLECTIONS))


class Persistence:
    """Sessions, messages, tool calls and events of one namespace. Made by `open`.

    Attributes:
        store: plain keys beside the records, in namespaces of their own.
        placement: the stores there are, and what is kept in which.
        home: the home folder, None where there is none.
        sessions, messages, tool_calls: the records.
        agents, todos, snapshots, windows, compressions, recovered_files, media: agents, and their state.
        confirmations, traces: what belongs to sessions, too.
        containers, images, prototypes, providers: what sessions are made in, and of.
        login_sessions: who is logged in.
        events: the topics, an `EventQueue`.
        threads: sessions as agents use them, a `ThreadManager`.
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
        secret_key: SecretKey | None = None,
        placement: Placement | None = None,
        home: Home | None = None,
    ) -> None:
        """``placement`` has ``store`` as its main one; None: everything is in that. `open` is what a user calls."""
        require_sequences(store, "persistence of sessions")
        self.store = store
        self.placement: Placement = placement or Placement(store)
        self.home: Home | None = home
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
        self._family = Family(store, namespace, elsewhere=self.placement.elsewhere)
        self._all = Collections(self._family, sessions, messages, tool_calls, own_call_indexes=bool(more_calls))
        atomic = store.capabilities.atomic_batch != "none"
        turns = Turns(self._all) if atomic else OrderedTurns(self._all)
        self.sessions = Sessions(self._all, turns)
        self.messages = Messages(self._all, turns, self.sessions._finder)
        self.tool_calls = ToolCalls(self._all, turns, self.messages)
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
        self.events = EventQueue(self.placement.store_of("events"), namespace=namespace, **(events or {}))
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
        self._ending = Ending()
        self.threads = ThreadManager(self)
        self._on_close: list[Callable[[], None]] = []

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
                for name, counts in stat.tools.items():
                    tool = tool_stats(counts)
                    total.tool_calls += tool.calls
                    total.tool_errors += tool.failed
                    _add(total.tool_calls_by_name, {name: tool.calls})
                    _add(total.tool_calls_by_state, tool.by_state())
        return total

    async def health(self, *, timeout: float = 5.0, write: bool = True) -> Health:
        """Ask every store whether it answers and can be written; raises nothing.

        Args:
            timeout: seconds after which a store counts as not answering.
            write: write a key and remove it again, in each store; otherwise `StoreHealth.writable` is None.
        """
        return await health_of(self.placement.stores, timeout=timeout, write=write)

    def metrics(self) -> Metrics:
        """What all stores together did since they were opened; `Store.metrics` tells of one."""
        return Metrics.total(store.metrics() for store in self.placement.stores.values())

    async def totals(self, *, on_corrupt: OnCorrupt | None = None) -> Totals:
        """Count what is stored, and ask the drivers for the room it takes; no payload is read.

        Cost: one entry per session, and the keys of the other records.

        Args:
            on_corrupt: as for `stats`.
        """
        counted = await self.stats(on_corrupt=on_corrupt)
        others = {name: await each.count() for name, each in self._family.repositories.items()}
        sizes = {name: await size_of(store) for name, store in self.placement.stores.items()}
        return Totals(
            sessions=counted.sessions,
            messages=counted.messages,
            tool_calls=counted.tool_calls,
            records={name: count for name, count in others.items() if count},
            bytes=sizes,
            collected_at=datetime.now(UTC),
        )

    async def check(
        self,
        *,
        agent_id: str | UUID | None = None,
        session_id: str | UUID | None = None,
        limit: int = 1_000,
        repair: bool = False,
    ) -> Consistency:
        """Look for what does not fit together, in all stores; without ``repair`` nothing is changed.

        Indexes against records, counts against messages and calls, records against what they belong to and
        what they name, creations and deletions that were not finished. Everything is read once, a page at a time.

        Args:
            agent_id: only this agent, its state and its sessions.
            session_id: only this session and what belongs to it. Index entries without a record are looked
                for only where neither is given.
            limit: end after so many issues.
            repair: finish or remove before what was interrupted, wherever it is: deletions, and creations that
                nobody has been at for ten minutes. What else is found is only told.

        Raises:
            BadRequest: both an agent and a session, or a limit under 1.
        """
        if (agent_id is not None and session_id is not None) or limit < 1:
            raise BadRequest("check an agent or a session or everything, and ask for at least one issue")
        if repair:
            await self._all.own()
            await self._finish_others()
            await self._family.remove_unborn()
        own: dict[str, Repository[Any]] = {
            "session": self._all.sessions,
            "message": self._all.messages,
            "tool_call": self._all.tool_calls,
        }
        checker = Checker(
            self._family,
            self.placement.stores,
            {**own, **self._family.repositories},
            {**self._family.belongs, "session": self._all.belongs},
            self.sessions.stat,
            _REFERENCES,
            limit,
        )
        await self._all.own()
        if session_id is not None:
            return await checker.session(str(session_id))
        return await checker.all() if agent_id is None else await checker.agent(str(agent_id))

    async def _finish_others(self) -> None:
        """Finish or remove what others were interrupted at, as far as notes tell of it."""
        await self._family.finish_all()
        await finish_makings(self._all)
        await self._forks.sweep()

    async def close(self) -> None:
        """End runs that stream and what reads events, and close the stores that `open` opened; once is enough."""
        try:
            if not self.store._is_forked:  # there they are the parent's
                await self._ending.settle()
        finally:
            try:
                await self.events.close()
            finally:
                try:
                    await self.placement.close()
                finally:
                    while self._on_close:
                        self._on_close.pop()()

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
    events: Mapping[str, Any] | Beside = None,
    files: Beside = None,
    secret_key: SecretKey | None = None,
    codec: Literal["msgpack", "json"] | None = None,
    ttl: float | None | UnsetType = UNSET,
    timeout: float | None | UnsetType = UNSET,
    clock: Clock = time.time,
    sweep: float | None | UnsetType = UNSET,
    profile: str | None = None,
    home: Home | str | os.PathLike[str] | None = None,
    dotenv: DotEnv = False,
    logs: int | str | bool | None = None,
    **options: Any,
) -> Opening[Persistence]:
    """Open an agent's records; ``async with`` it, or await it and close it.

    A deletion that a crash interrupted is finished first.

    Args:
        where: a URL, a path, a mapping with a ``type`` key, a ready Driver, an open Store (both yours
            to close), or None: ``KVPERSIST_URL``, then ``kvpersist.toml``, then a SQLite file in the
            home folder or the user's data folder. A mapping may hold ``files`` and ``events``, too.
        namespace: a tenant or application; namespaces of one store do not see each other.
        session_indexes, message_indexes, tool_call_indexes: indexes beyond the usual ones.
        text_index: keep an index of the words in messages, for `Messages.search`; other processes keep
            it up without saying so.
        events: settings of ``db.events``, such as ``{"retention": 7 * 86_400}``, as for `EventQueue`; or a
            store of their own, by anything that ``where`` takes; or both, ``{"url": ..., "retention": ...}``.
        files: a store of their own for todos, history windows, recovered files and media, such as
            ``"file:///var/lib/agents"``. `Placement` tells what is where; no batch spans two stores.
        secret_key: encrypts the secrets of ``db.providers``: 32 bytes or their base64, or several, of which
            the first encrypts and all decrypt. None: as the variable ``KVPERSIST_SECRET_KEY`` says.
        codec, ttl, timeout, clock, sweep: as for `open_store`. ``ttl`` is for plain keys, and for
            repositories of your own: sessions and what belongs to them do not expire. ``timeout``,
            ``clock`` and ``sweep`` are for all stores that are opened, the others for the main one.
        profile, home, dotenv: as for `open_store`; ``home``, or ``KVPERSIST_HOME``, becomes ``db.home``.
        logs: write what the library logs to a file in the home folder, from this level on, until the
            end: True, a name or number of `logging`; None: as ``KVPERSIST_LOGS`` says, which is no file.
        options: the driver's, as for `open_store`.

    Raises:
        As `open_store`; Unsupported: the backend has no ordered scan or no conditional writes.
    """
    opener = caller_line()
    given: dict[str, Any] = {"codec": codec or UNSET, "ttl": ttl, "timeout": timeout, "sweep": sweep}
    given = {name: value for name, value in given.items() if value is not UNSET}

    async def beside(place: Any) -> Store:
        is_named = isinstance(place, str | os.PathLike | Mapping)
        named = resolve(cast("Where", place)) if is_named else place
        return await open_named(named, {name: given[name] for name in _SHARED & given.keys()}, clock, opener, also=())

    async def make() -> Persistence:
        environ = variables(dotenv)
        meant = named_by(where, options, profile, home, environ, also=_ARGUMENTS)
        folder = home_of(home, environ)
        end_logs = _logging(logs, folder, environ)
        placement: Placement | None = None
        try:
            configured = meant if isinstance(meant, Resolved) else None
            place, settings = events_of(events, configured and configured.events)
            store = await open_named(meant, given, clock, opener, also=_ARGUMENTS)
            placement = Placement(store)
            if store is not where:
                placement.opened.append(store)
            await placement.add(files if files is not None else configured and configured.files, place, beside)
            db = Persistence(
                store,
                namespace=namespace,
                session_indexes=session_indexes,
                message_indexes=message_indexes,
                tool_call_indexes=tool_call_indexes,
                text_index=text_index,
                events=settings,
                placement=placement,
                home=folder,
                secret_key=secret_key,
            )
            db._on_close.append(end_logs)
            await db._all.own()  # before a plain write can put something between the records
            await db.events.store._own(db._family.space)
            with suppress(ReadOnly):  # whoever may write finishes them; what is left is not seen here either
                await db._finish_others()
        except BaseException:  # cancelled too: nothing may stay open
            try:
                if placement is not None:
                    await placement.close()
            finally:
                end_logs()
            raise
        return db

    return Opening(make)


def _logging(level: int | str | bool | None, home: Home | None, environ: Mapping[str, str]) -> Callable[[], None]:
    """Begin to write a log file if one is asked for; return what ends that."""
    asked = "logs" if level is not None else LOGS
    if level is None:
        level = environ.get(LOGS) or False
    if level is False:
        return lambda: None
    if home is None:
        raise BadOption(asked, "there is no home folder to write logs to: give home=DIR, or set KVPERSIST_HOME")
    return home.log_to_file(level)


def _own(indexes: Iterable[Index]) -> list[Index]:
    """Leave out the usual indexes; refuse what cannot be indexed in a session's own record."""
    usual = {index.name: index for index in SESSION_INDEXES}
    declared = [index for index in indexes if not _same(index, usual.get(index.name))]
    for index in declared:
        if index.name == "updated" or "updated_at" in (*index.fields, (index.order_by or "").removeprefix("-")):
            raise BadOption("session_indexes", "updated_at is kept beside the record: use sessions.recent()")
    return declared


def _same(index: Index, other: Index | None) -> bool:
    """Whether an index is declared already: it is among the usual ones."""
    parts = ("fields", "order_by", "unique", "multi", "version", "type")
    return other is not None and all(getattr(index, part) == getattr(other, part) for part in parts)


def _add(total: dict[str, int], counts: Mapping[str, int]) -> None:
    for name, count in counts.items():
        total[name] = total.get(name, 0) + count
