"""A session that is there when it is needed."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING, Any, Final
from uuid import UUID

from kvpersist.agents.records import Session
from kvpersist.errors import BadRequest, ParentGone, UniqueConflict
from kvpersist.transaction import backoff

if TYPE_CHECKING:
    from kvpersist.agents.persistence import Persistence

__all__ = ["check_owner", "default_title", "ensure_session"]

_ATTEMPTS: Final = 20  # of somebody who creates the same session at the same time


async def ensure_session(
    db: Persistence, id: str | UUID, *, create: bool = True, user_id: str | None = None, **fields: Any
) -> tuple[Session, bool]:
    """Return the session of this id, and whether it was created here, with these fields; whoever comes second gets it.

    Raises:
        ParentGone: there is none, and ``create`` is off.
        BadRequest: it belongs to another user than ``user_id``.
    """
    if not str(id):
        raise BadRequest("the id of a session is not empty: leave it out for a new one")
    for attempt in range(_ATTEMPTS):
        session = await db.sessions.get(id)
        if session is not None:
            check_owner(session, user_id)
            return session, False
        if not create:
            raise ParentGone("session", str(id))
        fields["title"] = fields.get("title") or default_title(db._all.now())
        try:
            return await db.sessions.create(id=str(id), user_id=user_id, **fields), True
        except UniqueConflict as conflict:
            if conflict.index != "id" or attempt == _ATTEMPTS - 1:
                raise
        await backoff(attempt)  # without atomic batches, the one that came first is not at its end yet
    raise AssertionError("unreachable")


def check_owner(session: Session, user_id: str | None) -> None:
    """Refuse a session of another user; one without an owner is anybody's, and so is any to nobody in particular.

    Raises:
        BadRequest: it belongs to another user.
    """
    if user_id is not None and session.user_id is not None and session.user_id != user_id:
        raise BadRequest(f"session {session.id!r} belongs to another user than {user_id!r}")


def default_title(now: datetime) -> str:
    """Return ``Conversation`` and the local time."""
    return f"Conversation {now.astimezone():%Y-%m-%d %H:%M:%S}"
