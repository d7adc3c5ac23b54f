"""Sessions: the records everything else of a conversation belongs to."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, Final, TypeAlias
from uuid import UUID

import msgspec

from kvpersist import keys
from kvpersist.agents.collections import Collections
from kvpersist.agents.deletion import Deletions
from kvpersist.agents.items import EditSession, Kill
from kvpersist.agents.ordered import OrderedTurns, ordered_writer
from kvpersist.agents.records import Session, SessionStat, new_id, utc
from kvpersist.agents.stat import Parent, Stat
from kvpersist.agents.turns import Turns, atomic_writer
from kvpersist.driver import ABSENT, Check, Entry, Op, Put
from kvpersist.errors import BadRequest, Conflict, CorruptRecord, KeyTooLong, ParentGone, UniqueConflict
from kvpersist.index.atomic_writer import IndexOps
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

    async def find(self, *, limit: int = 100, **where: Any) -> _Sessions:
        """Return sessions through an index: ``find(user_id="u1")``, newest first. As `Repository.find`."""
        return await self._with_times(await self._all.sessions.find(limit=limit, **where))

    async def page(self, *, limit: int = 100, after: str | None = None, **where: Any) -> Page[Session]:
        """Return one page as `find` does, and the cursor for the next. As `Repository.page`."""
        page = await self._all.sessions.page(limit=limit, after=after, **where)
        return Page(await self._with_times(page.items), page.cursor)

    async def iterate(self, **where: Any) -> AsyncIterator[Session]:
        """Yield every session that `find` would; without conditions all of them, newest first."""
        cursor: str | None = None
        while True:
            page = await self.page(limit=100, after=cursor, **where)
            for session in page.items:
                yield session
            if page.cursor is None:
                return
            cursor = page.cursor

    async def list(self, limit: int = 100) -> _Sessions:
        """Return the newest sessions, newest first."""
        return await self.find(limit=limit)

    async def recent(self, limit: int = 100) -> _Sessions:
        """Return the sessions that changed last, newest change first; exact to a second."""
        prefix = self._all.updated_prefix
        found: _Sessions = []
        met: set[str] = set()
        atomic = isinstance(self._turns, Turns)
        start, end = prefix, keys.prefix_end(prefix)
        while len(found) < limit:
            wanted = limit - len(found)
            page = await self._store._scan(start, end, limit=wanted, deref=self._all.session_prefix)
            decode = self._all.sessions._codec.decode
            stats = await self._stats([entry.value.decode() for entry in page])
            for entry, stat in zip(page, stats, strict=True):
                target = live(entry.target)
                part = entry.value.decode()
                if target is None or stat is None or stat.indexed_at is None or part in met:
                    continue
                # with atomic batches it moved since the scan; without, a crash may have left it
                if not atomic and entry.key != self._all.updated_key(part, stat.indexed_at):
                    continue
                met.add(part)
                session = decode(target.key, target.value)
                session.updated_at = stat.updated_at
                found.append(session)
            if len(page) < wanted:
                break
            start = page[-1].key + "!"
        return found

    async def count(self, **where: Any) -> int:
        """Count the sessions, all or those that `find` would return; only keys are read."""
        return await self._all.sessions.count(**where)

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

    async def _stats(self, parts: Sequence[str]) -> Sequence[Stat | None]:
        prefix = self._all.stat_prefix
        entries = await self._store._entries([prefix + part for part in parts])
        return [None if entry is None else self._whole(entry) for entry in entries]

    def _whole(self, entry: Entry) -> Stat | None:
        """Decode a stat; a damaged one counts as missing here, and the next write below the session mends it."""
        try:
            return self._all.stat_of(entry)
        except CorruptRecord:
            return None

    async def _with_times(self, sessions: _Sessions) -> _Sessions:
        stats = await self._stats([keys.encode(session.id) for session in sessions])
        for session, stat in zip(sessions, stats, strict=True):
            session.updated_at = session.created_at if stat is None else stat.updated_at
        return sessions
