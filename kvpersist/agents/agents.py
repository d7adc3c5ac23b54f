"""Agents: the records that an agent's state, its sessions and its events belong to."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator, Callable, Mapping
from datetime import datetime
from threading import Lock
from typing import Any, Final, Literal, TypeAlias, get_args
from uuid import UUID

import msgspec

from kvpersist.agents.family import Parents
from kvpersist.agents.forks import AgentForks
from kvpersist.agents.records import utc
from kvpersist.agents.sessions import Sessions
from kvpersist.agents.snapshots import Bookmark, Snapshots, marked
from kvpersist.errors import BadRequest, Conflict, ParentGone, UniqueConflict
from kvpersist.index import between
from kvpersist.repository import Page

__all__ = ["BREAKPOINTS", "Agent", "AgentStats", "Agents", "Breakpoint", "new_agent_id"]

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
_ATTEMPTS: Final = 40  # of a save that keeps losing to others


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
    lineage: list[str] = msgspec.field(default_factory=list[str])
    config_version: str | None = None
    breakpoint: str = "ready"
    last_safe_point: int = -1
    bookmark: Bookmark | None = None
    counters: dict[str, int] = msgspec.field(default_factory=dict[str, int])
    metadata: dict[str, Any] = msgspec.field(default_factory=dict[str, Any])
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
    messages_by_role: dict[str, int] = msgspec.field(default_factory=dict[str, int])
    tool_calls_by_name: dict[str, int] = msgspec.field(default_factory=dict[str, int])
    tool_calls_by_state: dict[str, int] = msgspec.field(default_factory=dict[str, int])
    messages_per_session: float | None = None
    success_rate: float | None = None


class Agents:
    """The agents of one namespace, ``db.agents``.

    What is written below an agent checks that it is there, so nothing is ever added to one that was deleted.
    """

    def __init__(self, parents: Parents[Agent], sessions: Sessions, snapshots: Snapshots, forks: AgentForks) -> None:
        self._parents = parents
        self._sessions = sessions
        self._snapshots = snapshots
        self._forks = forks

    async def create(self, **fields: Any) -> Agent:
        """Create an agent of the given fields of `Agent`; one commit.

        Raises:
            UniqueConflict: there is an agent of this id.
            BadRequest: no such field, an unknown breakpoint, or a time without a zone.
            KeyTooLong: the id has over 120 encoded bytes.
        """
        try:
            agent = Agent(**fields)
        except TypeError as error:
            raise BadRequest(f"{error}; fields: {', '.join(Agent.__struct_fields__)}") from error
        return await self._create(agent)

    async def save(self, agent: Agent) -> Agent:
        """Store an agent, in place of the one of its id if there is one; return it as stored.

        Without a ``created_at`` it keeps the one it had; ``updated_at`` moves unless it is given.

        Raises:
            BadRequest: an unknown breakpoint, or a time without a zone. KeyTooLong: as `create`.
        """
        for _ in range(_ATTEMPTS):
            saved = await self.update(agent.id, lambda old: _over(old, agent)) if agent.id else None
            if saved is not None:
                return saved
            try:
                return await self._create(agent)
            except UniqueConflict:  # another has created it meanwhile
                continue
        raise Conflict(agent.id, None)

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

        def change(old: Agent) -> Agent:
            if old.created_at is None:
                raise _Hidden
            changed: Any = fn(msgspec.structs.replace(old))
            if not isinstance(changed, Agent):
                raise BadRequest(f"the function returned {type(changed).__name__}, not the agent")
            if changed.id != old.id:
                raise BadRequest("the id of a stored agent cannot change: create another")
            if changed.updated_at in (None, old.updated_at):
                changed = msgspec.structs.replace(changed, updated_at=self._parents.now())
            if changed.created_at is None:
                changed = msgspec.structs.replace(changed, created_at=old.created_at)
            return _checked(changed)

        try:
            return await self._parents.update(str(id), change)
        except _Hidden:
            return None

    async def set_metadata(self, id: str | UUID, metadata: Mapping[str, Any]) -> Agent | None:
        """Replace the agent's metadata; None where there is no such agent."""
        new = dict(metadata)
        return await self.update(id, lambda agent: msgspec.structs.replace(agent, metadata=new))

    async def merge_metadata(self, id: str | UUID, metadata: Mapping[str, Any]) -> Agent | None:
        """Add to the agent's metadata, key by key of its top level; None where there is no such agent."""
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
        template_id: str | None = None,
        created_at: Any = None,
        id_prefix: str | None = None,
    ) -> _Agents:
        """Return up to ``limit`` agents, newest first, ``offset`` of them passed over.

        Args:
            template_id: only those of this template.
            created_at: ``between(a, b)``, ``at_least(a)`` or ``at_most(b)``; both ends are included.
            id_prefix: only those whose id begins so; every character counts as itself.
        """

    async def list(self, limit: int = 100) -> _Agents:
        """Return the newest agents, newest first."""
        return await self.find(limit=limit)

    async def stats(self, id: str | UUID) -> AgentStats | None:
        """Count what there is of an agent, None where there is none: no message, call or snapshot is read."""
        agent_id = str(id)
        if not await self.exists(agent_id):
            return None

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
        snapshot = None if at is None else await self._snapshots.get(parent.id, at)
        if at is not None and snapshot is None:
            raise ParentGone("snapshot", at)
        changes: dict[str, Any] = {"lineage": [*parent.lineage, parent.id]}
        if snapshot is not None:
            place = {"last_safe_point": snapshot.last_safe_point, "bookmark": snapshot.bookmark}
            changes |= {"breakpoint": "ready", **place}
        news = [msgspec.structs.replace(parent, id=new_agent_id(), **changes) for _ in range(count)]
        return await self._forks.make(parent, news, snapshot)

    # ---- private

    async def _create(self, agent: Agent) -> Agent:
        now = self._parents.now()
        created_at = now if agent.created_at is None else agent.created_at
        updated_at = created_at if agent.updated_at is None else agent.updated_at
        id_ = str(agent.id) if agent.id else new_agent_id()
        new = _checked(msgspec.structs.replace(agent, id=id_, created_at=created_at, updated_at=updated_at))
        return await self._parents.create(new)


class _Hidden(Exception):
    """The agent is a fork in the making."""


def _checked(agent: Agent) -> Agent:
    """Return the agent as it will be stored.

    Raises:
        BadRequest: an unknown breakpoint, or a time without a zone.
    """
    breakpoint_: Any = agent.breakpoint
    breakpoint_ = breakpoint_.lower() if isinstance(breakpoint_, str) else breakpoint_
    if breakpoint_ not in BREAKPOINTS:
        raise BadRequest(f"unknown breakpoint {agent.breakpoint!r}: use one of {', '.join(sorted(BREAKPOINTS))}")
    times = {
        name: None if (at := getattr(agent, name)) is None else utc(at, name) for name in ("created_at", "updated_at")
    }
    return msgspec.structs.replace(agent, breakpoint=breakpoint_, bookmark=marked(agent.bookmark), **times)


def _over(old: Agent, new: Agent) -> Agent:
    return msgspec.structs.replace(new, created_at=new.created_at or old.created_at)


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
