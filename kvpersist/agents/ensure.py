"""A session that is there when it is needed."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING, Any
from uuid import UUID

from kvpersist.agents.records import Session
from kvpersist.errors import BadRequest, ParentGone, UniqueConflict

if TYPE_CHECKING:
    from kvpersist.agents.persistence import Persistence

__all__ = ["default_title", "ensure_session"]


async def ensure_session(
    db: Persistence, id: str | UUID, *, create: bool = True, user_id: str | None = None, **fields: Any
) -> tuple[Session, bool]:
    """Return the session of this id, and whether it was created here, with these fields; whoever comes second gets it.

    Raises:
        ParentGone: there is none, and ``create`` is off.
        BadRequest: it belongs to another user than ``user_id``.
    """
    session = await db.sessions.get(id)
    if session is None:
        if not create:
            raise ParentGone("session", str(id))
        fields["title"] = fields.get("title") or default_title(db._all.now())
        try:
            return await db.sessions.create(id=str(id), user_id=user_id, **fields), True
        except UniqueConflict as conflict:
            session = await db.sessions.get(id)
            if session is None:  # not the id is taken, but another unique value; or it is gone again
                raise conflict
    if user_id is not None and session.user_id is not None and session.user_id != user_id:
        raise BadRequest(f"session {session.id!r} belongs to another user than {user_id!r}")
    return session, False


def default_title(now: datetime) -> str:
    """Return ``Conversation`` and the local time."""
    return f"Conversation {now.astimezone():%Y-%m-%d %H:%M:%S}"
