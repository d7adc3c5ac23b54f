"""Sessions: the records everything else of a conversation belongs to."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, Final, TypeAlias
from uuid import UUID

import msgspec

from kvpersist import keys
from kvpersist.agents.collections import Collections
from kvpersist.agents.deletion import Cascade, belonging
from kvpersist.agents.family import Belongs
from kvpersist.agents.items import EditSession, Kill
from kvpersist.agents.ordered import OrderedTurns
from kvpersist.agents.records import Session, SessionStat, new_id, utc
from kvpersist.agents.stat import Parent, Stat
from kvpersist.agents.turns import Turns
from kvpersist.driver import ABSENT, Check, Entry, Op, Put
from kvpersist.errors import BadRequest, CorruptRecord, KeyTooLong, ParentGone
from kvpersist.index.writer import live, version_of
from kvpersist.repository import Page

__all__ = ["Sessions"]

_List: TypeAlias = list[Op]
_Sessions: TypeAlias = list[Session]  # in the class below, `list` is a method

_ID_BYTES: Final = 128  # of an encoded session id: what lies below it has to fit behind it


class Sessions:
    """The sessions of one namespace, ``db.sessions``.

    What is written below a session (messages, tool calls) checks its birth key, so that nothing is
    ever added to one that was deleted. ``updated_at`` is kept beside the record, and so are its counts.
    """

    def __init__(self, collections: Collections, turns: Turns | OrderedTurns) -> None:
        self._all = collections
        self._store = collections.store
        self._turns = turns

    async def create(self, **fields: Any) -> Session:
        """Create a session of the given fields of `Session`; one commit.

        Raises:
            UniqueConflict: there is a session of this id, or of a unique value.
            ParentGone: the container or image it names does not exist.
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
        birth, version = await self._all.births.bear(
            part,
            session,
            lambda: self._all.checks(session),
            lambda old: self._beside(part, stat, version_of(old)),
            self._all.stat_prefix + part,
        )
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
            ParentGone: the container or image that it names from now on does not exist.
        """
        await self._all.own()
        try:
            return await self._turns.submit(str(id), EditSession(fn))
        except ParentGone as gone:
            if gone.kind != "session":
                raise
            return None

    async def delete(self, id: str | UUID) -> bool:
        """Delete the session and everything that belongs to it; False where there was none.

        From the first commit on the session is gone; what belongs to it follows in batches. If that is
        interrupted, it is finished by the next `open` of the store, or when the id is used again.
        """
        await self._all.own()
        return await self._delete(str(id), None)

    def _belong(self, belongs: Belongs) -> None:
        """Let a field of sessions name what they belong to."""
        self._all.belongs.append(belongs)
        if belongs.cascade:
            belongs.births.also(self._cascade_of(belongs.field))

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

    async def _delete(self, session_id: str, guard: Check | None) -> bool:
        part = keys.encode(session_id)
        existed = True
        try:
            await self._turns.submit(session_id, Kill(guard))
        except ParentGone:
            existed = False
        self._all.births.forget(self._all.birth_prefix + part)
        await self._all.births.deletions.finish(part)
        return existed

    def _cascade_of(self, field: str) -> Cascade:
        async def cascade(id_: str, guard: Check) -> None:
            prefix = self._all.session_prefix
            async for page in belonging(self._all.sessions, field, id_):
                for entry in page:
                    await self._delete(keys.unescape(entry.key[len(prefix) :]), guard)
            await self._all.births.deletions.finish_all()  # of those that somebody removed and could not finish

        return cascade

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
