"""Copying an agent's state into a new one, which is seen when all of it is there, or never.

A fork is made below a *hidden* agent, one without ``created_at``, which no reader is given; the last step
gives it its time. A note of it, ``ns:agent##making:<id>``, is written first, renewed on the way, and removed
last. What a crash left is deleted, as any agent is, by an `open` or a fork that finds the note ten minutes
old; whoever is slower than that, and still at it, fails by the note's version.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from datetime import datetime
from typing import TYPE_CHECKING, Any, Final, cast

import msgspec

from kvpersist import keys
from kvpersist.agents.births import Family, given_up
from kvpersist.agents.children import Children
from kvpersist.agents.conversations.messages import Messages
from kvpersist.agents.conversations.sessions import Sessions
from kvpersist.agents.deletion import Cascade, require
from kvpersist.agents.records import Session
from kvpersist.agents.state.history import Compressions, RecoveredFiles, Windows
from kvpersist.agents.state.media import MediaCache
from kvpersist.agents.state.snapshots import Snapshot, Snapshots
from kvpersist.agents.state.todos import Todos
from kvpersist.driver import ABSENT, Check, Delete, Put
from kvpersist.errors import Conflict, ParentGone, UniqueConflict
from kvpersist.events import EventEntry, EventQueue, NewEvent
from kvpersist.events.removal import remove_topic
from kvpersist.store import Store

if TYPE_CHECKING:
    from kvpersist.agents.state.agents import Agent, AgentParents

__all__ = ["AgentForks", "topic_cascade"]

_PAGE: Final = 250  # messages, or notes, read at once
_EVENTS: Final = 500  # events copied at once


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
        self._now = family.now
        self._store = family.store
        self._atomic = family.atomic
        self._notes = parents.births.making_prefix
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
        notes = {new.id: b"" for new in news}  # versions, while a fork is not shown
        try:
            for new in news:
                await self._copy(parent, new, at, notes)
            shown: list[Agent] = []
            for new in news:
                shown.append(await self._show(new, notes))
                del notes[new.id]
        except BaseException:  # cancelled too: nothing half made may stay
            for id_, version in notes.items():
                if version:
                    await self._remove(id_)
            raise
        await self._store._commit_each([[Delete(self._notes + keys.encode(new.id))] for new in news])
        return shown

    async def sweep(self) -> int:
        """Remove what was left of forks that nobody is at any more; return how many."""
        removed = 0
        start: str | None = self._notes
        while start is not None:
            page = await self._store._scan(start, keys.prefix_end(self._notes), limit=_PAGE)
            for note in page:
                if not given_up(note.value, self._store.clock()):
                    continue
                try:
                    await self._store._commit([Put(note.key, b"", note.version)])
                except Conflict:  # its maker goes on after all, or another removes it
                    continue
                removed += await self._remove(keys.unescape(note.key[len(self._notes) :]))
            start = page[-1].key + "!" if len(page) == _PAGE else None
        return removed

    # ---- private

    async def _copy(self, parent: Agent, new: Agent, at: Snapshot | None, notes: dict[str, bytes]) -> None:
        await self._renew(new.id, notes)
        await self._parents.hide(new)
        places: dict[str, str] = {}  # a session of the parent, and its fork
        async for session, number in self._of(parent, at):
            places[session.id] = await self._fork(session, number, new)
            await self._renew(new.id, notes)
        if at is not None and at.messages is not None and at.session_id not in places:
            await self._unfold(at, new)
        await self._copy_events(parent, new, at)
        await self._renew(new.id, notes)
        await self._todos._copy(parent.id, new.id)
        await self._copy_snapshots(parent, new, at, places)
        for kept in self._kept:
            copies = [msgspec.structs.replace(record, agent_id=new.id) for record in await kept.of(parent.id)]
            await kept.replace_all(new.id, copies)

    async def _renew(self, id_: str, notes: dict[str, bytes]) -> None:
        """Say that somebody is at it. Raises ParentGone where it was taken for left over."""
        put = Put(self._notes + keys.encode(id_), b"%d" % self._store.clock(), notes[id_] or ABSENT)
        try:
            notes[id_] = await self._store._commit([put])
        except Conflict as conflict:
            raise ParentGone("agent", id_) from conflict

    async def _show(self, new: Agent, notes: dict[str, bytes]) -> Agent:
        """Let the agent be seen, on condition of its note: in one batch where batches are atomic."""
        await self._renew(new.id, notes)
        also = [Put(self._notes + keys.encode(new.id), b"0", notes[new.id])] if self._atomic else []
        try:
            shown = await self._parents.show(new.id, also)
        except Conflict as conflict:
            raise ParentGone("agent", new.id) from conflict
        if shown is None:
            raise ParentGone("agent", new.id)
        return shown

    async def _remove(self, id_: str) -> bool:
        """Remove a fork that was not shown, and its note; False: it was shown."""
        found = await self._parents.get(id_)
        hidden = found is None or found.created_at is None
        if hidden:
            await self._parents.delete(id_)
            # a maker that was held up while others removed the agent writes on as if its id were a label
            async for session in self._sessions.iterate(agent_id=id_):
                await self._sessions.delete(session.id)
            await self._events.delete(id_)
        await self._store._commit([Delete(self._notes + keys.encode(id_))])
        return hidden

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
        try:
            [forked] = await self._sessions.fork(session.id, at=number, agent_id=new.id)
        except UniqueConflict:
            raise
        except Conflict as conflict:  # it was taken for left over
            raise ParentGone("agent", new.id) from conflict
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
            events.store, events._log, id_, checks=(guard,) if together else (), ask=None if together else ask
        )

    return cascade
