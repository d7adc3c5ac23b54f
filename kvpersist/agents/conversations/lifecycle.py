"""A session's life: metadata, closed and open again, the open one of a user, and the end of old ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, Final
from uuid import UUID

import msgspec

from kvpersist import keys
from kvpersist.agents.collections import Collections
from kvpersist.agents.conversations.items import Kill, Remove, Rewritten
from kvpersist.agents.conversations.ordered import OrderedTurns
from kvpersist.agents.conversations.rewrites import LONGEST, cutoff
from kvpersist.agents.conversations.turns import Turns
from kvpersist.agents.records import Session, new_id
from kvpersist.agents.stat import EXACT
from kvpersist.driver import ABSENT, Delete, Entry, Op, Put
from kvpersist.errors import BadRequest, Conflict, ParentGone, UniqueConflict
from kvpersist.index.writer import live
from kvpersist.transaction import backoff

__all__ = ["Lifecycle"]

_ATTEMPTS: Final = 60  # of a find-or-create that meets others
_PAGE: Final = 100
_FREED: Final = 60.0  # seconds that a claim given up stays, where deletes have no conditions


class Lifecycle:
    """What `Sessions` does in the life of a session."""

    _all: Collections
    _turns: Turns | OrderedTurns

    if TYPE_CHECKING:  # as in `Sessions`

        async def create(self, **fields: Any) -> Session: ...
        async def update(self, id: str | UUID, fn: Callable[[Session], Session]) -> Session | None: ...

    async def exists(self, id: str | UUID) -> bool:
        """Whether there is such a session; it is not decoded."""
        [entry] = await self._all.store._entries([self._all.session_prefix + keys.encode(str(id))])
        return live(entry) is not None

    async def set_metadata(self, id: str | UUID, metadata: Mapping[str, Any]) -> Session | None:
        """Replace a session's metadata; return the session, or None where there is none."""
        return await self._edited(id, metadata=dict(metadata))

    async def merge_metadata(self, id: str | UUID, metadata: Mapping[str, Any]) -> Session | None:
        """Set these keys of a session's metadata and keep the others; return the session, None where there is none.

        Of two that merge at once, neither loses what it set.
        """
        return await self.update(
            id, lambda session: msgspec.structs.replace(session, metadata=session.metadata | dict(metadata))
        )

    async def close(self, id: str | UUID) -> Session | None:
        """Close a session: ``active=False``. It can still be read and written. None where there is none."""
        return await self._edited(id, active=False)

    async def reopen(self, id: str | UUID) -> Session | None:
        """Open a closed session again. None where there is none."""
        return await self._edited(id, active=True)

    async def clear(self, id: str | UUID) -> int:
        """Delete all that was said in a session, messages and calls; return how many messages. The session stays.

        Raises:
            ParentGone: there is no such session.
        """
        await self._all.own()
        removed = 0
        while True:
            done: Rewritten = await self._turns.submit(str(id), Remove(after=0, most=LONGEST))
            removed += done.removed
            if not done.again:
                return removed

    async def active(self, user_id: str, create: bool | Mapping[str, Any] = False) -> Session | None:
        """Return the newest open session of a user, or None.

        Args:
            create: where there is none, create one, of these fields if they are given. Several that ask at
                once get the same one.

        Raises:
            BadRequest: ``create`` names another user, or a closed session. As `create`.
            Conflict: others created and closed sessions of this user all the time.
        """
        fields = dict(create) if isinstance(create, Mapping) else {}
        if fields.get("user_id", user_id) != user_id or not fields.get("active", True):
            raise BadRequest("the session to be created is an open one of this user: leave user_id and active out")
        if create is False:
            return await self._open_one(user_id)
        await self._all.own()
        key = f"{self._all.family.space}:session##active:{keys.encode(user_id)}"
        for attempt in range(_ATTEMPTS):
            [claim] = await self._all.store._entries([key])
            found = await self._open_one(user_id)  # after the claim was read: what its holder made is seen
            if found is not None:
                return found
            try:
                if claim is None or not claim.value:
                    wanted = str(fields.get("id") or new_id())
                    version = await self._all.store._commit(
                        [Put(key, wanted.encode(), ABSENT if claim is None else claim.version)]
                    )
                    claim = Entry(key, wanted.encode(), version)
                    found = await self._open_one(user_id)  # of one who held the claim just before
                if found is None:  # whoever finds the claim creates what it names: only one of them can
                    found = await self.create(**fields | {"id": claim.value.decode(), "user_id": user_id})
            except UniqueConflict as taken:
                named = None if taken.index != "id" or claim is None else claim.value.decode()
                held = None if named is None else await self._all.sessions.get(named)
                if named is None or (held is not None and not (held.active and held.user_id == user_id)):
                    await self._give_up(claim)
                    if named is None or named == fields.get("id"):
                        raise
            except Conflict:
                pass
            if found is not None:
                await self._give_up(claim)
                return found
            await backoff(attempt)
        raise Conflict(key, None)

    async def delete_older(
        self, *, than: datetime | timedelta, user_id: str | None = None, inactive_only: bool = False
    ) -> int:
        """Delete the sessions that nothing was added to or changed in since a time; return how many.

        Each goes with everything that belongs to it, as by `delete`; one that is written to meanwhile stays.

        Args:
            than: a time, or an age.
            user_id: only those of this user.
            inactive_only: only closed ones.

        Raises:
            BadRequest: a time without a zone, or a negative age.
        """
        limit = cutoff(than, self._all.now())
        await self._all.own()
        prefix = self._all.updated_prefix
        start = self._all.updated_key("", limit + EXACT)  # newest first: older ones lie behind
        deleted = 0
        while True:
            page = await self._all.store._scan(start, keys.prefix_end(prefix), limit=_PAGE)
            parts = list(dict.fromkeys(entry.value.decode() for entry in page))
            records = await self._all.store._entries([self._all.session_prefix + part for part in parts])
            for part, record in zip(parts, records, strict=True):
                record = live(record)
                if record is None:
                    continue
                session = self._all.sessions._codec.decode(record.key, record.value)
                if (user_id is None or session.user_id == user_id) and not (inactive_only and session.active):
                    deleted += await self._deleted_if(part, Kill(before=limit, closed=inactive_only))
            if len(page) < _PAGE:
                return deleted
            start = page[-1].key + "!"

    # ---- private

    async def _edited(self, id: str | UUID, **changes: Any) -> Session | None:
        return await self.update(id, lambda session: msgspec.structs.replace(session, **changes))

    async def _open_one(self, user_id: str) -> Session | None:
        cursor: str | None = None
        while True:
            page = await self._all.sessions.page(limit=_PAGE if cursor else 1, after=cursor, user_id=user_id)
            for session in page.items:
                if session.active:
                    return await self._with_time(session)
            if page.cursor is None:
                return None
            cursor = page.cursor

    async def _with_time(self, session: Session) -> Session:
        [stat] = await self._all.store._entries([self._all.stat_prefix + keys.encode(session.id)])
        session.updated_at = session.created_at if stat is None else self._all.stat_of(stat).updated_at
        return session

    async def _give_up(self, claim: Entry | None) -> None:
        """Free the claim; where somebody else did, or took it, it is theirs."""
        if claim is None:
            return
        store = self._all.store
        if store.capabilities.conditional_delete:
            op: Op = Delete(claim.key, claim.version)
        else:
            op = Put(claim.key, b"", claim.version, store.clock() + _FREED)
        try:
            await store._commit([op])
        except Conflict:
            return

    async def _deleted_if(self, part: str, kill: Kill) -> bool:
        try:
            done: bool = await self._turns.submit(keys.unescape(part), kill)
        except ParentGone:
            return False
        if done:
            self._all.births.forget(self._all.birth_prefix + part)
            await self._all.births.deletions.finish(part)
        return done
