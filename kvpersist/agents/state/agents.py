"""Agents: the records that an agent's state, its sessions and its events belong to."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from datetime import datetime
from threading import Lock
from typing import Any, Final, Literal, TypeAlias, get_args
from uuid import UUID

import msgspec

from kvpersist import keys
from kvpersist.agents.births import Family
from kvpersist.agents.conversations.sessions import Sessions
from kvpersist.agents.family import Parents
from kvpersist.agents.records import SessionStat
from kvpersist.agents.state.forks import AgentForks
from kvpersist.agents.state.snapshots import Bookmark, Snapshots, marked
from kvpersist.driver import Op
from kvpersist.errors import BadRequest, KeyTooLong, ParentGone
from kvpersist.index import Index, between
from kvpersist.index.atomic_writer import AtomicWriter
from kvpersist.index.declaration import Range
from kvpersist.index.reads import OnCorrupt, decoded
from kvpersist.index.writer import live
from kvpersist.repository import Page

__all__ = ["BREAKPOINTS", "Agent", "AgentParents", "AgentStats", "Agents", "Breakpoint", "new_agent_id"]

Breakpoint: TypeAlias = Literal[
    "ready",
    "pre_model",
    "streaming_model",
    "tool_pending",
    "awaiting_approval",
    "pre_tool",
    "tool_executing",
    "post_tool",
]
BREAKPOINTS: Final = frozenset(get_args(Breakpoint))

_Agents: TypeAlias = "list[Agent]"  # in the class below, `list` is a method
_CROCKFORD: Final = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
_ID_BYTES: Final = 120  # of an encoded agent id: the id of what lies below it has to fit behind it
_PAGE: Final = 250  # agents read at once
_TOGETHER: Final = 100  # sessions whose counts are read at once


class Agent(msgspec.Struct, kw_only=True, omit_defaults=True):
    """What is known of an agent as a whole.

    Attributes:
        id: ``agt-`` and 26 characters that sort by time, unless given.
        lineage: ids of the agents that it was forked from, the oldest first.
        breakpoint: where its run stands, one of `BREAKPOINTS`; upper case is accepted when it is written.
        last_safe_point: index of the last message at which it may be forked, -1: none yet.
        bookmark: the last of its events that counts.
        counters: whatever it counts.
    """

    id: str = ""
    template_id: str | None = None
    lineage: list[str] = []
    config_version: str | None = None
    breakpoint: str = "ready"
    last_safe_point: int = -1
    bookmark: Bookmark | None = None
    counters: dict[str, int] = {}
    metadata: dict[str, Any] = {}
    created_at: datetime | None = None
    updated_at: datetime | None = None


class AgentStats(msgspec.Struct, kw_only=True):
    """What there is of an agent, counted. The last two are None where there is nothing to divide by.

    Attributes:
        tool_calls_by_state: only states that occur; names as in `ToolCall.state`.
        messages_per_session: the average.
        success_rate: completed calls in percent of all.
    """

    sessions: int = 0
    messages: int = 0
    tool_calls: int = 0
    snapshots: int = 0
    messages_by_role: dict[str, int] = {}
    tool_calls_by_name: dict[str, int] = {}
    tool_calls_by_state: dict[str, int] = {}
    messages_per_session: float | None = None
    success_rate: float | None = None


class AgentParents(Parents[Agent]):
    """The stored agents, among them forks in the making: those are *hidden*, by having no ``created_at``."""

    def __init__(self, family: Family) -> None:
        super().__init__(
            family,
            Agent,
            name="agent",
            indexes=[Index(order_by="-created_at"), Index("template_id", order_by="-created_at")],
        )

    async def hide(self, agent: Agent) -> None:
        """Store a new agent that no reader is given."""
        await self._family.own()
        await self._insert(msgspec.structs.replace(agent, created_at=None, updated_at=None))

    async def show(self, id: str, also: Sequence[Op]) -> Agent | None:
        """Give a hidden agent its time; return it, None where there is none.

        Args:
            also: where batches are atomic, further operations of the same batch.

        Raises:
            Conflict: it was changed or deleted meanwhile, or at an operation of ``also``.
        """
        pk = self.repository._pk(id)
        entry = await self._entry(pk)
        if entry is None:
            return None
        now = self._family.now()
        shown = msgspec.structs.replace(self._decode(entry), created_at=now, updated_at=now)
        writer = self.repository._writer
        if isinstance(writer, AtomicWriter):
            await writer.save(pk, shown, old=entry, also=also)
        else:
            await writer.save(pk, shown, old=entry)
        return shown

    def beginning(self, id_prefix: str) -> tuple[str, str | None]:
        """Between which keys the agents lie whose ids begin so."""
        start = self.repository._prefix + keys.escape(id_prefix)
        return start, keys.prefix_end(start)

    def _new(self, record: Agent) -> Agent:
        return super()._new(record if record.id else msgspec.structs.replace(record, id=new_agent_id()))

    def _check(self, record: Agent) -> None:
        breakpoint_: Any = record.breakpoint
        record.breakpoint = breakpoint_.lower() if isinstance(breakpoint_, str) else breakpoint_
        if record.breakpoint not in BREAKPOINTS:
            raise BadRequest(f"unknown breakpoint {breakpoint_!r}: use one of {', '.join(sorted(BREAKPOINTS))}")
        record.bookmark = marked(record.bookmark)
        if (size := len(keys.encode(record.id).encode())) > _ID_BYTES:
            raise KeyTooLong(record.id, size, _ID_BYTES)


class Agents:
    """The agents of one namespace, ``db.agents``.

    What is written below an agent checks that it is there, so nothing is ever added to one that was deleted.
    """

    def __init__(self, parents: AgentParents, sessions: Sessions, snapshots: Snapshots, forks: AgentForks) -> None:
        self._parents = parents
        self._sessions = sessions
        self._snapshots = snapshots
        self._forks = forks

    async def create(self, agent: Agent | None = None, /, **fields: Any) -> Agent:
        """Store a new agent, given whole or by its fields; return it as it is stored.

        Raises:
            UniqueConflict: there is an agent of this id.
            BadRequest: no such field, an unknown breakpoint, or a time without a zone.
            KeyTooLong: the id has over 120 encoded bytes.
        """
        return await self._parents.create(agent, **fields)

    async def save(self, agent: Agent) -> Agent:
        """Store an agent, in place of the one of its id if there is one; return it as stored.

        Without a ``created_at`` it keeps the one it had; ``updated_at`` moves unless it is given.

        Raises:
            As `create`, but for UniqueConflict.
        """
        return await (self._parents.save(agent) if agent.id else self._parents.create(agent))

    async def get(self, id: str | UUID) -> Agent | None:
        """Return the agent, or None; one read."""
        found = await self._parents.get(str(id))
        return None if found is None or found.created_at is None else found

    async def exists(self, id: str | UUID) -> bool:
        """Whether there is such an agent."""
        return await self.get(id) is not None

    async def update(self, id: str | UUID, fn: Callable[[Agent], Agent]) -> Agent | None:
        """Replace the agent by what ``fn`` makes of it, and return that; None where there is none.

        ``fn`` is called again when another writer came first. ``updated_at`` moves, unless ``fn`` sets it.

        Raises:
            BadRequest: ``fn`` changed the id, or set an unknown breakpoint or a time without a zone.
        """

        def change(agent: Agent) -> Agent:
            if agent.created_at is None:
                raise _Hidden
            return fn(agent)

        try:
            return await self._parents.update(str(id), change)
        except _Hidden:
            return None

    async def set_metadata(self, id: str | UUID, metadata: Mapping[str, Any]) -> Agent | None:
        """Replace the agent's metadata as a whole; None where there is no such agent."""
        new = dict(metadata)
        return await self.update(id, lambda agent: msgspec.structs.replace(agent, metadata=new))

    async def merge_metadata(self, id: str | UUID, metadata: Mapping[str, Any]) -> Agent | None:
        """Set some keys of the agent's metadata and leave the others; None where there is no such agent."""
        new = dict(metadata)
        return await self.update(id, lambda agent: msgspec.structs.replace(agent, metadata=agent.metadata | new))

    async def delete(self, id: str | UUID) -> bool:
        """Delete the agent and everything that belongs to it; False where there was none.

        That is its state, the sessions whose ``agent_id`` it is, with all below them, and the topic of its id.
        From the first commit on the agent is gone; the rest follows in batches. If that is interrupted, it is
        finished by the next `open` of the store, or when the id is used again.
        """
        return await self._parents.delete(str(id))

    async def find(
        self,
        *,
        limit: int = 100,
        offset: int = 0,
        id_prefix: str | None = None,
        on_corrupt: OnCorrupt | None = None,
        **where: Any,
    ) -> _Agents:
        """Return up to ``limit`` agents, newest first, behind the first ``offset``.

        Args:
            where: ``template_id="t"``, and for ``created`` a time or a range: ``between(a, b)``, ends included.
            id_prefix: only those whose id begins so; every character counts as itself. All of these are read.

        Raises:
            BadRequest: a negative limit or offset. NoIndex: another condition.
        """
        if id_prefix is None:
            return await self._parents.find(limit=limit, offset=offset, on_corrupt=on_corrupt, **_by_time(where))
        if limit < 1 or offset < 0:
            raise BadRequest(f"limit={limit}, offset={offset}: ask for at least one, and pass over none or some")
        mine = self._beginning(id_prefix, where, on_corrupt)
        newest = _Newest(limit + offset)
        async for agent in mine:
            newest.add(agent)
        return newest.sorted()[offset:]

    async def page(
        self, *, limit: int = 100, after: str | None = None, on_corrupt: OnCorrupt | None = None, **where: Any
    ) -> Page[Agent]:
        """Return one page as `find` does without ``id_prefix``, and the cursor for the next. As `Repository.page`."""
        return await self._parents.page(limit=limit, after=after, on_corrupt=on_corrupt, **_by_time(where))

    async def iterate(
        self, *, id_prefix: str | None = None, on_corrupt: OnCorrupt | None = None, **where: Any
    ) -> AsyncIterator[Agent]:
        """Yield every agent that `find` would, newest first; with ``id_prefix`` in the order of their ids."""
        if id_prefix is None:
            mine = self._parents.iterate(on_corrupt=on_corrupt, **_by_time(where))
        else:
            mine = self._beginning(id_prefix, where, on_corrupt)
        async for agent in mine:
            yield agent

    async def count(self, *, id_prefix: str | None = None, **where: Any) -> int:
        """Count what `find` would return without a limit; with ``id_prefix`` they are read for it."""
        if id_prefix is None:
            return await self._parents.count(**_by_time(where))
        return len([agent async for agent in self._beginning(id_prefix, where, None)])

    async def list(self, limit: int = 100) -> _Agents:
        """Return the newest agents, newest first."""
        return await self.find(limit=limit)

    async def stats(self, id: str | UUID) -> AgentStats | None:
        """Count what there is of an agent, None where there is none: no message, call or event is read."""
        agent_id = str(id)
        if not await self.exists(agent_id):
            return None
        total = AgentStats(snapshots=await self._snapshots.count(agent_id=agent_id))
        cursor: str | None = None
        while True:
            page = await self._sessions.page(limit=_TOGETHER, after=cursor, agent_id=agent_id)
            for stat in await asyncio.gather(*[self._sessions.stat(session.id) for session in page.items]):
                _count(total, stat)
            cursor = page.cursor
            if cursor is None:
                break
        if total.sessions:
            total.messages_per_session = total.messages / total.sessions
        if total.tool_calls:
            total.success_rate = 100 * total.tool_calls_by_state.get("completed", 0) / total.tool_calls
        return total

    async def fork(self, id: str | UUID, *, at: str | None = None, count: int = 1) -> _Agents:
        """Make ``count`` new agents out of one, as it is, or as it was at a snapshot.

        Each has the parent's ``lineage`` + the parent's id, ids of its own, and copies of the parent's todos,
        snapshots (up to the one it is made at), history windows, compressions, recovered files and media. Its
        sessions are forked (`Sessions.fork`), and the events of its topic copied in their order, both as far
        as the snapshot: the session it names to its number, others to its time; events to its bookmark, those
        without one to its time. A snapshot that has its own copy of the messages and no session becomes a session
        of the fork. Made at a snapshot, a fork is ``ready``, with the snapshot's safe point and bookmark.

        An agent appears with all of this at once, or never, on every backend. The copies below it are made
        before, and its sessions are seen by `db.sessions` while they are: they belong to an agent that is not
        there yet. Copies are of different moments where others write to the parent meanwhile. What a crash
        leaves is removed by the next `open`, or the next fork, ten minutes later.

        Args:
            at: the id of one of the agent's snapshots.

        Raises:
            ParentGone: there is no such agent, or snapshot.
            BadRequest: ``count`` is less than 1.
        """
        if count < 1:
            raise BadRequest(f"count={count}: make at least one fork")
        parent = await self.get(id)
        if parent is None:
            raise ParentGone("agent", str(id))
        snapshot = None if at is None else await self._snapshots.get((parent.id, at))
        if at is not None and snapshot is None:
            raise ParentGone("snapshot", at)
        changes: dict[str, Any] = {"lineage": [*parent.lineage, parent.id]}
        if snapshot is not None:
            place = {"last_safe_point": snapshot.last_safe_point, "bookmark": snapshot.bookmark}
            changes |= {"breakpoint": "ready", **place}
        news = [msgspec.structs.replace(parent, id=new_agent_id(), **changes) for _ in range(count)]
        return await self._forks.make(parent, news, snapshot)

    # ---- private

    async def _beginning(
        self, id_prefix: str, where: Mapping[str, Any], on_corrupt: OnCorrupt | None
    ) -> AsyncIterator[Agent]:
        asked = _by_time(where)
        if unknown := sorted(asked.keys() - {"template_id", "created_at"}):
            raise BadRequest(f"with id_prefix, ask for template_id and created, not for {', '.join(unknown)}")
        template, times = asked.get("template_id"), asked.get("created_at", between(None, None))
        if not isinstance(times, Range):
            times = between(times, times)
        repository = self._parents.repository
        start, end = self._parents.beginning(id_prefix)
        while True:
            page = await repository.store._scan(start, end, limit=_PAGE)
            for agent in decoded(repository._codec, (e for e in page if live(e) is not None), on_corrupt):
                at = agent.created_at
                if at is None or (template is not None and agent.template_id != template):
                    continue
                if (times.low is None or times.low <= at) and (times.high is None or at <= times.high):
                    yield agent
            if len(page) < _PAGE:
                return
            start = page[-1].key + "!"  # no key lies between a key and itself + '!'


class _Hidden(Exception):
    """The agent is a fork in the making."""


class _Newest:
    """Keeps the newest ``n`` agents of those that are added."""

    def __init__(self, n: int) -> None:
        self._n = n
        self._agents: list[Agent] = []

    def add(self, agent: Agent) -> None:
        self._agents.append(agent)
        if len(self._agents) >= 2 * self._n + _PAGE:
            self._agents = self.sorted()

    def sorted(self) -> list[Agent]:
        return sorted(self._agents, key=_newest_first)[: self._n]


def _newest_first(agent: Agent) -> tuple[float, str]:
    return (0.0 if agent.created_at is None else -agent.created_at.timestamp(), keys.encode(agent.id))


def _by_time(where: Mapping[str, Any]) -> dict[str, Any]:
    """Ask for a time in any case: through an index by time hidden agents are not met."""
    asked = {"created_at" if name == "created" else name: value for name, value in where.items()}
    return asked or {"created_at": between(None, None)}


def _count(total: AgentStats, stat: SessionStat | None) -> None:
    if stat is None:  # deleted meanwhile
        return
    total.sessions += 1
    total.messages += stat.messages
    total.tool_calls += stat.tool_calls
    _add(total.messages_by_role, stat.roles)
    for name, tool in stat.tools.items():
        _add(total.tool_calls_by_name, {name: tool.calls})
        _add(total.tool_calls_by_state, tool.by_state())


def _add(total: dict[str, int], counts: Mapping[str, int]) -> None:
    for name, count in counts.items():
        total[name] = total.get(name, 0) + count


_lock: Final = Lock()
_last: list[int] = [0, 0]  # milliseconds and random part of the newest id of this process


def new_agent_id() -> str:
    """Return ``agt-`` and 26 characters of Crockford's base 32, milliseconds first.

    Those of one process sort as they were made, also within a millisecond and when the clock is set back.

    Source: the ULID specification, "Layout" and "Monotonicity"; the random part grows by a random number.
    """
    with _lock:
        now = time.time_ns() // 1_000_000
        if now > _last[0]:
            _last[:] = now, secrets.randbits(79)
        else:
            _last[1] += 1 + secrets.randbits(32)
        number = _last[0] << 80 | _last[1]
    return "agt-" + "".join(_CROCKFORD[number >> shift & 31] for shift in range(125, -1, -5))
