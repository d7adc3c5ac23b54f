"""Login sessions: who is logged in, until when."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import msgspec

from kvpersist.agents.births import Family
from kvpersist.agents.family import Records
from kvpersist.agents.records import utc
from kvpersist.errors import BadRequest
from kvpersist.index import Index
from kvpersist.index.writer import SHORTEST_LIFE, too_short

__all__ = ["LoginSession", "LoginSessions"]


class LoginSession(msgspec.Struct, kw_only=True, omit_defaults=True):
    """A user's login; at ``expires_at`` it is gone, with its index entries. None: it stays until deleted."""

    id: str = ""
    user_id: str
    metadata: dict[str, Any] = {}
    expires_at: datetime | None = None
    created_at: datetime | None = None


class LoginSessions(Records[LoginSession]):
    """The login sessions of one namespace, ``db.login_sessions``, newest first.

    Found by ``user_id=``, or by ``expires_at=between(a, b)``, soonest first. What has expired is not
    found, and removed by the store. Where batches are not atomic, a life is not set to under 60 seconds.
    """

    def __init__(self, family: Family) -> None:
        super().__init__(
            family,
            LoginSession,
            name="login_session",
            indexes=[
                Index("user_id", order_by="-created_at"),
                Index(order_by="-created_at"),  # before the next one: the order of all
                Index(order_by="expires_at"),
            ],
        )

    def _new(self, record: LoginSession) -> LoginSession:
        made = super()._new(record)
        self._refuse_short(made)
        return made

    def _renewed(self, record: LoginSession, before: LoginSession) -> LoginSession:
        made = super()._renewed(record, before)
        if made.expires_at != before.expires_at:
            self._refuse_short(made)
        return made

    def _check(self, record: LoginSession) -> None:
        if record.expires_at is not None:
            record.expires_at = utc(record.expires_at, "expires_at")

    def _refuse_short(self, record: LoginSession) -> None:
        if record.expires_at is None:
            return
        left = record.expires_at.timestamp() - self._store.clock()
        if left <= 0:
            raise BadRequest(f"expires_at={record.expires_at.isoformat()} is over: delete the login session instead")
        if left < SHORTEST_LIFE and not self._family.atomic:
            raise too_short()

    def _ttl(self, record: LoginSession) -> float | None:
        return None if record.expires_at is None else record.expires_at.timestamp()
