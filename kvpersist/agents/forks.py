"""Copying an agent's state into a new one, which is seen when all of it is there, or never.

A fork is made below a *hidden* agent, one without ``created_at``, which no reader is given; the last step
gives it its time. Before the first step ``ns:agent_fork:<id>`` is written, and it goes after the last: what
a crash left is found by it and deleted, as any agent is, by the next `open` or the next fork.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, Final, cast

import msgspec

from kvpersist.agents.deletion import Cascade, require
from kvpersist.agents.family import Children, Family, Records
from kvpersist.agents.history import Compressions, RecoveredFiles, Windows
from kvpersist.agents.media import MediaCache
from kvpersist.agents.messages import Messages
from kvpersist.agents.records import Session
from kvpersist.agents.sessions import Sessions
from kvpersist.agents.snapshots import Snapshot, Snapshots
from kvpersist.agents.todos import Todos
from kvpersist.driver import Check
from kvpersist.errors import ParentGone
from kvpersist.events import EventEntry, EventQueue, NewEvent
from kvpersist.events.removal import remove_topic
from kvpersist.store import Store

if TYPE_CHECKING:
    from kvpersist.agents.agents import Agent, AgentParents

__all__ = ["AgentForks", "Forking", "topic_cascade"]

_LEFT: Final = timedelta(minutes=10)  # without a sign of life, after which a fork is what a crash left
_PAGE: Final = 250  # messages read at once
_EVENTS: Final = 500  # events copied at once


class Forking(msgspec.Struct):
    """A fork that is being made. ``at``: when its maker last gave a sign of life."""

    id: str
    parent_id: str
    at: datetime


class AgentForks:
    """Makes the forks of one namespace, and removes what is left of those that were interrupted."""

    def __init__(
        self,
        family: Family,
        parents: AgentParents,
        *,
        sessions: Sessions,
        messages: Messages,
        events: EventQueue,
        todos: Todos,
        snapshots: Snapshots,
        windows: Windows,
        compressions: Compressions,
        recovered_files: RecoveredFiles,
        media: MediaCache,
    ) -> None:
        self._parents = parents
        self._marks = Records(family, Forking, name="agent_fork")
        self._now = family.now
        self._sessions = sessions
        self._messages = messages
        self._events = events
        self._todos = todos
        self._snapshots = snapshots
        self._kept: tuple[Children[Any], ...] = (windows, compressions, recovered_files, media)

    async def make(self, parent: Agent, news: list[Agent], at: Snapshot | None) -> list[Agent]:
        """Fork ``parent`` into ``news``, whose ids are new; return them as stored.

        If it fails, those that are not shown yet are removed again.

        Raises:
            ParentGone: a fork was deleted, or taken for left over, while it was made.
        """
        await self.sweep()
        hidden: list[str] = []
        try:
            for new in news:
                hidden.append(new.id)
                await self._copy(parent, new, at)
            shown: list[Agent] = []
            for new in news:
                shown.append(await self._show(new))
                hidden.remove(new.id)
        except BaseException:  # cancelled too: nothing half made may stay
            for id_ in hidden:
                await self._remove(id_)
            raise
        for new in news:
            await self._marks.delete(new.id)
        return shown

    async def sweep(self) -> int:
        """Remove what was left of forks whose makers gave no sign of life for 10 minutes; return how many."""
        removed = 0
        before = self._now() - _LEFT
        async for mark in self._marks.iterate():
            if mark.at <= before:
                await self._remove(mark.id)
                removed += 1
        return removed

    # ---- private

    async def _copy(self, parent: Agent, new: Agent, at: Snapshot | None) -> None:
        await self._alive(parent, new)
        await self._parents.hide(new)
        places: dict[str, str] = {}  # a session of the parent, and its fork
        async for session, number in self._of(parent, at):
            await self._alive(parent, new)
            places[session.id] = await self._fork(session, number, new)
        if at is not None and at.messages is not None and at.session_id not in places:
            await self._unfold(at, new)
        await self._copy_events(parent, new, at)
        await self._alive(parent, new)
        await self._todos.copy(parent.id, new.id)
        await self._copy_snapshots(parent, new, at, places)
        for kept in self._kept:
            copies = [msgspec.structs.replace(record, agent_id=new.id) for record in await kept.of(parent.id)]
            await kept.replace_all(new.id, copies)

    async def _show(self, new: Agent) -> Agent:
        now = self._now()

        def show(hidden: Agent) -> Agent:
            return msgspec.structs.replace(hidden, created_at=now, updated_at=now)

        shown = await self._parents.update(new.id, show)
        if shown is None:
            raise ParentGone("agent", new.id)
        return shown

    async def _remove(self, id_: str) -> None:
        """Remove a fork that was never shown, and its mark."""
        found = await self._parents.get(id_)
        if found is None or found.created_at is None:
            await self._parents.delete(id_)
        await self._marks.delete(id_)

    async def _alive(self, parent: Agent, new: Agent) -> None:
        await self._marks.save(Forking(new.id, parent.id, self._now()))

    async def _of(self, parent: Agent, at: Snapshot | None) -> AsyncIterator[tuple[Session, int | None]]:
        """Yield the parent's sessions, oldest first, each with the last number that the fork takes; None: all."""
        sessions = [session async for session in self._sessions.iterate(agent_id=parent.id)]
        copied = at is not None and at.messages is not None and at.session_id is None  # all that it had said
        for session in reversed(sessions):
            if at is None:
                yield session, None
            elif session.id == at.session_id and at.number is not None:
                yield session, at.number
            elif not copied and _not_after(session.created_at, at.created_at):
                yield session, await self._number_at(session.id, at.created_at)

    async def _number_at(self, session_id: str, at: datetime | None) -> int:
        """The number of the last message that was there at a time, 0: there was none."""
        before: int | None = None
        while page := await self._messages.range(session_id, before=before, limit=_PAGE, reverse=True):
            for message in page:
                if at is None or message.created_at is None or message.created_at <= at:
                    return message.number
            before = page[-1].number
        return 0

    async def _fork(self, session: Session, number: int | None, new: Agent) -> str:
        [forked] = await self._sessions.fork(session.id, at=number, agent_id=new.id)
        return forked.id

    async def _unfold(self, at: Snapshot, new: Agent) -> None:
        """Make a session of what the snapshot has a copy of."""
        session = await self._sessions.create(agent_id=new.id, template_id=new.template_id)
        copies = [msgspec.structs.replace(each, id="", session_id="", number=0) for each in at.messages or ()]
        await self._messages.append_many(session.id, copies)

    async def _copy_snapshots(self, parent: Agent, new: Agent, at: Snapshot | None, places: Mapping[str, str]) -> None:
        copies: list[Snapshot] = []
        for snapshot in await self._snapshots.of(parent.id):
            if at is None or snapshot.id == at.id or _not_after(snapshot.created_at, at.created_at):
                session_id = places.get(snapshot.session_id or "", snapshot.session_id)
                copies.append(msgspec.structs.replace(snapshot, agent_id=new.id, session_id=session_id))
        await self._snapshots.replace_all(new.id, copies)

    async def _copy_events(self, parent: Agent, new: Agent, at: Snapshot | None) -> None:
        after: str | None = None
        while page := await self._events.read(parent.id, after, _EVENTS, on_expired="skip"):
            events = [
                NewEvent(entry.event, entry.channel, entry.cursor, entry.bookmark)
                for entry in page
                if at is None or _belongs(entry, at)
            ]
            await self._events.publish_many(new.id, events)
            after = page[-1].position


def _belongs(entry: EventEntry, at: Snapshot) -> bool:
    """Whether an event is one of those that a snapshot has behind it: by its bookmark, else by its time."""
    place: Any = entry.bookmark
    seq = cast("dict[str, Any]", place).get("seq") if isinstance(place, dict) else place
    if at.bookmark is not None and type(seq) is int:
        return seq <= at.bookmark.seq
    return _not_after(entry.published_at, at.created_at)


def _not_after(time: datetime | None, end: datetime | None) -> bool:
    return time is None or end is None or time <= end


def topic_cascade(events: EventQueue, store: Store) -> Cascade:
    """Return what removes the topic of a deleted agent."""
    together = events.store is store and store.capabilities.atomic_batch != "none"

    async def cascade(id_: str, guard: Check) -> None:
        async def ask() -> None:
            await require(store, guard)

        await remove_topic(
            events.store, events.namespace, id_, checks=(guard,) if together else (), ask=None if together else ask
        )

    return cascade
