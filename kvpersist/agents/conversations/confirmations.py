"""Confirmations: what a session waits for a person to allow."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import datetime
from typing import Any
from uuid import UUID

import msgspec

from kvpersist.agents.births import Belongs, Births, Family
from kvpersist.agents.family import Records
from kvpersist.index import Index
from kvpersist.repository import Page

__all__ = ["Confirmation", "Confirmations"]


class Confirmation(msgspec.Struct, kw_only=True, omit_defaults=True):
    """A call of a tool that waits for a decision; ``number`` and ``position`` are its place, where it has one."""

    session_id: str
    tool_name: str
    arguments: Any = None
    user_message: str | None = None
    call_id: str | None = None
    number: int | None = None
    position: int | None = None
    metadata: dict[str, Any] = {}
    created_at: datetime | None = None


class _Pending(Records[Confirmation]):
    def _renewed(self, record: Confirmation, before: Confirmation) -> Confirmation:
        return self._new(record)  # another question than the one before


class Confirmations:
    """The pending confirmations of one namespace, ``db.confirmations``: at most one per session.

    They are deleted with their session.
    """

    def __init__(self, family: Family, sessions: Births) -> None:
        self._pending = _Pending(
            family,
            Confirmation,
            name="confirmation",
            key="session_id",
            indexes=[Index(order_by="-created_at")],
            belongs=[Belongs("session_id", sessions)],
        )

    async def save(self, confirmation: Confirmation) -> Confirmation:
        """Store what a session waits for, in place of what it waited for before; return it as it is stored.

        Raises:
            ParentGone: there is no such session.
            BadRequest, Unencodable: it cannot be kept; nothing was changed.
        """
        return await self._pending.save(confirmation)

    async def get(self, session_id: str | UUID) -> Confirmation | None:
        """Return what a session waits for, or None; one read."""
        return await self._pending.get(session_id)

    async def clear(self, session_id: str | UUID) -> bool:
        """Let the session wait no more; False where it did not."""
        return await self._pending.delete(session_id)

    async def find(self, *, limit: int = 100, offset: int = 0) -> list[Confirmation]:
        """Return the confirmations of all sessions, newest first."""
        return await self._pending.find(limit=limit, offset=offset)

    async def page(self, *, limit: int = 100, after: str | None = None) -> Page[Confirmation]:
        """Return one page as `find` does, and the cursor for the next. Raises BadCursor."""
        return await self._pending.page(limit=limit, after=after)

    async def iterate(self) -> AsyncIterator[Confirmation]:
        """Yield all confirmations, by session."""
        async for confirmation in self._pending.iterate():
            yield confirmation

    async def count(self) -> int:
        """Count the sessions that wait; only keys are read."""
        return await self._pending.count()
