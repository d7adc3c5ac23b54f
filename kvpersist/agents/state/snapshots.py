"""Snapshots: places an agent can be forked at."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Final

import msgspec

from kvpersist.agents.births import Births, Family
from kvpersist.agents.children import Children
from kvpersist.agents.conversations.messages import Messages
from kvpersist.agents.conversations.sessions import Sessions
from kvpersist.agents.records import Message, new_id, utc
from kvpersist.errors import BadRequest, ParentGone
from kvpersist.index import Index

__all__ = ["Bookmark", "Snapshot", "Snapshots", "marked"]

_PAGE: Final = 250  # messages read at once


class Bookmark(msgspec.Struct, omit_defaults=True):
    """A place among an agent's events: the number that its publisher counts, and when."""

    seq: int
    at: datetime | None = None


class Snapshot(msgspec.Struct, kw_only=True, omit_defaults=True):
    """A safe point of an agent: a place in one of its sessions, or a copy of what was said until then.

    ``number`` is that of the last message that belongs to it; what was said is read from the session.
    ``messages`` is a copy of its own, for conversations that are kept nowhere else. ``id`` is a label;
    without one it is ``sfp-<last_safe_point>``. ``metadata`` holds what else there is to tell, such as ``step_count``.
    """

    id: str = ""
    agent_id: str = ""
    session_id: str | None = None
    number: int | None = None
    messages: list[Message] | None = None
    last_safe_point: int = -1
    bookmark: Bookmark | None = None
    metadata: dict[str, Any] = {}
    created_at: datetime | None = None


class Snapshots(Children[Snapshot]):
    """The snapshots of one namespace, ``db.snapshots``; those of an agent are found newest first."""

    def __init__(self, family: Family, agents: Births, sessions: Sessions, messages: Messages) -> None:
        by_time = Index("agent_id", order_by="-created_at")
        super().__init__(family, Snapshot, name="snapshot", key=("agent_id", "id"), parents=agents, indexes=[by_time])
        self._sessions = sessions
        self._messages = messages

    async def create(self, record: Snapshot | None = None, /, **fields: Any) -> Snapshot:
        """As `save`, of a new one. ``UniqueConflict``: the agent has a snapshot of this id."""
        return await super().create(await self._placed(self._made(record, fields)))

    async def save(self, record: Snapshot) -> Snapshot:
        """Store a snapshot, in place of the agent's snapshot of that id if there is one; return it as stored.

        With a ``session_id`` and no ``number`` it is taken of the session as it is now. Without
        a time it is as new as this call, also where it takes the place of another.

        Raises:
            ParentGone: there is no such agent, or, without a ``number``, no such session.
            BadRequest: a ``number`` and no session, or a time without a zone.
        """
        self._refuse_type(record)
        return await super().save(await self._placed(record))

    async def messages(self, snapshot: Snapshot) -> list[Message]:
        """Return what had been said, in order: the snapshot's copy, else its session up to its number.

        What was deleted from the session since is missing; of a snapshot without either there is nothing.
        """
        if snapshot.messages is not None:
            return snapshot.messages
        if snapshot.session_id is None or not snapshot.number:
            return []
        found: list[Message] = []
        after, end = 0, snapshot.number + 1
        while page := await self._messages.range(snapshot.session_id, after=after, before=end, limit=_PAGE):
            found += page
            after = page[-1].number
        return found

    async def _placed(self, snapshot: Snapshot) -> Snapshot:
        """Return a copy with its id and its place in its session."""
        placed = msgspec.structs.replace(snapshot, created_at=snapshot.created_at or self._family.now())
        if not placed.id and placed.last_safe_point >= 0:
            placed.id = f"sfp-{placed.last_safe_point}"
        if not placed.id:
            placed.id = new_id()
        if placed.session_id is not None and placed.number is None:
            stat = await self._sessions.stat(placed.session_id)
            if stat is None:
                raise ParentGone("session", placed.session_id)
            placed.number = stat.last
        return placed

    def _check(self, record: Snapshot) -> None:
        if record.session_id is None and record.number is not None:
            raise BadRequest(f"number={record.number} of which session? Give session_id")
        record.bookmark = marked(record.bookmark)


def marked(bookmark: Bookmark | None) -> Bookmark | None:
    """Return a bookmark with its time in UTC."""
    if bookmark is None or bookmark.at is None:
        return bookmark
    return Bookmark(bookmark.seq, utc(bookmark.at, "bookmark.at"))
