"""Sessions: the records everything else of a conversation belongs to."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any, Final, TypeAlias
from uuid import UUID

import msgspec

from kvpersist import keys
from kvpersist.agents.collections import Collections
from kvpersist.agents.deletion import Deletions
from kvpersist.agents.finders import SESSION_ORDERS, SessionFinder
from kvpersist.agents.items import EditSession, Kill
from kvpersist.agents.ordered import OrderedTurns, ordered_writer
from kvpersist.agents.queries import SCANNED, Asked
from kvpersist.agents.records import Session, SessionStat, new_id, utc
from kvpersist.agents.stat import Parent, Stat
from kvpersist.agents.turns import Turns, atomic_writer
from kvpersist.driver import ABSENT, Check, Op, Put
from kvpersist.errors import BadRequest, Conflict, KeyTooLong, ParentGone, UniqueConflict
from kvpersist.index.atomic_writer import IndexOps
from kvpersist.index.reads import OnCorrupt
from kvpersist.index.writer import live
from kvpersist.repository import Page
from kvpersist.transaction import backoff

__all__ = ["Sessions"]

_List: TypeAlias = list[Op]
_Sessions: TypeAlias = list[Session]  # in the class below, `list` is a method

_ID_BYTES: Final = 128  # of an encoded session id: what lies below it has to fit behind it
_ATTEMPTS: Final = 40  # of a creation that keeps losing to others
_BIRTH: Final = b"1"


class Sessions:
    """The sessions of one namespace, ``db.sessions``.

    What is written below a session (messages, tool calls) checks its birth key, so that nothing is
    ever added to one that was deleted. ``updated_at`` is kept beside the record, and so are its counts.
    """

    def __init__(self, collections: Collections, turns: Turns | OrderedTurns, deletions: Deletions) -> None:
        self._all = collections
        self._store = collections.store
        self._turns = turns
        self._deletions = deletions
        self._finder = SessionFinder(collections)

    async def create(self, **fields: Any) -> Session:
        """Create a session of the given fields of `Session`; one commit.

        Raises:
            UniqueConflict: there is a session of this id, or of a unique value.
            BadRequest: no such field, or a time without a zone.
            KeyTooLong: the id has over 128 encoded bytes.
        """
        try:
            session = Session(**fields)
        except TypeError as error:
            raise BadRequest(f"{error}; fields: {', '.join(Session.__struct_fields__)}") from error
        session.id = str(session.id) if session.id else new_id()
        part = keys.encode(session.id)
        if (size := len(part.encode())) > _ID_BYTES:
            raise KeyTooLong(session.id, size, _ID_BYTES)
        now = self._all.now()
        session.created_at = now if session.created_at is None else utc(session.created_at, "created_at")
        updated_at = session.updated_at
        updated_at = session.created_at if updated_at is None else utc(updated_at, "updated_at")
        session.updated_at = None
        await self._all.own()
        stat = Stat(updated_at, indexed_at=updated_at)
        if isinstance(self._turns, Turns):
            birth, version = await self._create(part, session, stat)
        else:
            birth, version = await self._create_in_order(part, session, stat)
        self._turns.created(session.id, Parent(birth, stat, version, {}))
        return msgspec.structs.replace(session, updated_at=updated_at)

    async def get(self, id: str | UUID) -> Session | None:
        """Return the session, or None; one read."""
        part = keys.encode(str(id))
        entry, stat = await self._store._entries([self._all.session_prefix + part, self._all.stat_prefix + part])
        entry = live(entry)
        if entry is None:
            return None
        session = self._all.sessions._codec.decode(entry.key, entry.value)
        session.updated_at = session.created_at if stat is None else self._all.stat_of(stat).updated_at
        return session

    async def update(self, id: str | UUID, fn: Callable[[Session], Session]) -> Session | None:
        """Replace the session by what ``fn`` makes of it, and return that; None where there is none.

        ``fn`` is called again when another writer came first. ``updated_at`` moves, unless ``fn`` sets it.

        Raises:
            BadRequest: ``fn`` changed the id. UniqueConflict: a unique value belongs to another.
        """
        await self._all.own()
        try:
            return await self._turns.submit(str(id), EditSession(fn))
        except ParentGone:
            return None

    async def delete(self, id: str | UUID) -> bool:
        """Delete the session and everything that belongs to it; False where there was none.

        From the first commit on the session is gone; what belongs to it follows in batches. If that is
        interrupted, it is finished by the next `open` of the store, or when the id is used again.
        """
        session_id = str(id)
        await self._all.own()
        try:
            await self._turns.submit(session_id, Kill())
        except ParentGone:
            await self._deletions.finish(keys.encode(session_id))
            return False
        await self._deletions.finish(keys.encode(session_id))
        return True

    async def find(
        self,
        *,
        limit: int = 100,
        offset: int = 0,
        order: str | None = None,
        scanned: int = SCANNED,
        scan: bool = False,
        on_corrupt: OnCorrupt | None = None,
        **where: Any,
    ) -> _Sessions:
        """Return up to ``limit`` sessions: ``find(user_id="u1", created=at_least(monday))``.

        Conditions: ``user_id agent_id container_id image_id template_id parent_id``, which are indexed,
        ``created`` and ``updated`` (times, or ranges made with `between`, `at_least`, `at_most`),
        ``id_prefix``, ``title`` (text in it, in any case), ``metadata={path: value}``, ``active``, and
        any other field. What no index answers is told by reading the records below the best one.

        Args:
            offset: leave out so many at first.
            order: "created_at", "updated_at" (without an owner exact to a second), "title",
                "message_count" or "id", with "-" before it the greatest first. None: as the index is
                ordered, which is the newest first for owners and for all.
            scanned: records that may be read beyond those given back.
            scan: read any number of them, and the whole collection if no index narrows it.
            on_corrupt: is handed the error of each damaged session, and the list goes on past it.

        Raises:
            NoIndex: without ``scan`` the whole collection, or over ``scanned`` records, would be read.
            IndexNotReady: an index for this was declared over records already there: `reindex` first.
            BadRequest: no such condition or order, or a value of another kind.
        """
        return await self._finder.find(self._asked(where, order, scanned, scan, on_corrupt), limit, offset)

    async def page(
        self,
        *,
        limit: int = 100,
        offset: int = 0,
        after: str | None = None,
        order: str | None = None,
        scanned: int = SCANNED,
        scan: bool = False,
        on_corrupt: OnCorrupt | None = None,
        **where: Any,
    ) -> Page[Session]:
        """Return one page as `find` does, and the cursor that ``after`` takes for the next.

        Where ``scanned`` records were read before the page was full it is short, and its cursor goes on.

        Raises:
            BadCursor: it belongs to another query.
        """
        return await self._finder.page(self._asked(where, order, scanned, scan, on_corrupt), limit, offset, after)

    async def iterate(
        self,
        *,
        order: str | None = None,
        scanned: int = SCANNED,
        scan: bool = False,
        on_corrupt: OnCorrupt | None = None,
        **where: Any,
    ) -> AsyncIterator[Session]:
        """Yield every session that `find` would, 250 in memory at a time; without conditions all, newest first.

        In an order that no index has, up to 10,000 are in memory.
        """
        async for session in self._finder.iterate(self._asked(where, order, scanned, scan, on_corrupt)):
            yield session

    async def list(self, limit: int = 100) -> _Sessions:
        """Return the newest sessions, newest first."""
        return await self.find(limit=limit)

    async def recent(self, limit: int = 100) -> _Sessions:
        """Return the sessions that changed last, newest change first; exact to a second."""
        return await self.find(order="-updated_at", limit=limit)

    async def count(self, *, scanned: int = SCANNED, scan: bool = False, **where: Any) -> int:
        """Count the sessions, all or those that `find` would return; only keys are read where an index answers all."""
        return await self._finder.count(self._asked(where, None, scanned, scan, None))

    async def stat(self, id: str | UUID) -> SessionStat | None:
        """Return what is counted of a session, None where there is none; one read, no messages."""
        part = keys.encode(str(id))
        birth, entry = await self._store._entries([self._all.birth_prefix + part, self._all.stat_prefix + part])
        if birth is None or entry is None:
            return None
        stat = self._all.stat_of(entry)
        if isinstance(self._turns, OrderedTurns):
            stat = await self._turns.stat(str(id), stat)
        return stat.public()

    # ---- private

    async def _create(self, part: str, session: Session, stat: Stat) -> tuple[Check, bytes]:
        every = self._all
        writer = atomic_writer(every.sessions)
        orphans: dict[str, bytes] = {}
        known = await every.sessions._definitions.known()
        key, birth_key = every.session_prefix + part, every.birth_prefix + part
        marker = Check(every.deleting_prefix + part, ABSENT)
        for attempt in range(_ATTEMPTS):
            ops = IndexOps()
            await writer.index_ops(ops, known, part, None, session, None, orphans)
            batch: _List = [
                marker,
                Put(birth_key, _BIRTH, ABSENT),
                known.check,
                Put(key, writer._codec.encode(key, session), ABSENT),
                *ops.by_key.values(),
                *self._beside(part, stat),
            ]
            try:
                version = await self._store._commit(batch)
            except Conflict as conflict:
                if conflict.key == known.check.key:
                    known = await every.sessions._definitions.refresh()
                elif conflict.key == marker.key:
                    await self._deletions.finish(part, begin_anew=True)
                elif conflict.key in (birth_key, key):
                    raise UniqueConflict("id", session.id, session.id) from conflict
                else:
                    await writer.resolve(known, part, conflict, orphans)
                    await backoff(attempt)
                continue
            return Check(birth_key, version), version
        raise Conflict(key, ABSENT)

    async def _create_in_order(self, part: str, session: Session, stat: Stat) -> tuple[Check, bytes]:
        """Birth key and stat first, the record last: a session that can be seen can be written to."""
        every = self._all
        key, birth_key = every.session_prefix + part, every.birth_prefix + part
        every.sessions._codec.encode(key, session)  # what cannot be kept fails before anything is written
        await self._deletions.finish(part, begin_anew=True)
        record, birth, old = await self._store._entries([key, birth_key, every.stat_prefix + part])
        if live(record) is not None:
            raise UniqueConflict("id", session.id, session.id)
        try:
            version = b""
            if birth is None:
                version = await self._store._commit([Put(birth_key, _BIRTH, ABSENT)])
            beside = self._beside(part, stat, ABSENT if old is None else old.version)
            stat_version = await self._store._commit(beside)
            await ordered_writer(every.sessions).save(part, session, old=record)
        except UniqueConflict:
            raise
        except Conflict as conflict:
            raise UniqueConflict("id", session.id, session.id) from conflict
        return Check(birth_key, version if birth is None else birth.version), stat_version

    def _beside(self, part: str, stat: Stat, expect: Any = ABSENT) -> _List:
        key = self._all.stat_prefix + part
        return [
            Put(self._all.updated_key(part, stat.updated_at), part.encode()),
            Put(key, self._all.packed(key, stat), expect),
        ]

    def _asked(
        self, where: dict[str, Any], order: str | None, scanned: int, scan: bool, on_corrupt: OnCorrupt | None
    ) -> Asked:
        if order is not None and order.removeprefix("-") not in SESSION_ORDERS:
            raise BadRequest(f"order={order!r}: use one of {', '.join(SESSION_ORDERS)}, or one with '-' before it")
        return Asked(SessionFinder.normal(where), order, scanned, scan, on_corrupt)
