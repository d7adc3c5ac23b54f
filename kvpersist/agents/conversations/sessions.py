"""Sessions: the records everything else of a conversation belongs to."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any, TypeAlias
from uuid import UUID

import msgspec

from kvpersist import keys
from kvpersist.agents.births import Belongs
from kvpersist.agents.collections import Collections
from kvpersist.agents.conversations.forks import Forks
from kvpersist.agents.conversations.items import EditSession, Kill
from kvpersist.agents.conversations.lifecycle import Lifecycle
from kvpersist.agents.conversations.making import new_session
from kvpersist.agents.conversations.ordered import OrderedTurns
from kvpersist.agents.conversations.transfer import Transfers
from kvpersist.agents.conversations.turns import Turns
from kvpersist.agents.deletion import Cascade, belonging
from kvpersist.agents.finding.queries import SCANNED, Asked
from kvpersist.agents.finding.sessions import SESSION_ORDERS, SessionFinder
from kvpersist.agents.records import Session, SessionStat
from kvpersist.agents.stat import Parent, Stat
from kvpersist.driver import ABSENT, Check, Op, Put
from kvpersist.errors import BadRequest, ParentGone
from kvpersist.index.reads import OnCorrupt
from kvpersist.index.writer import live, version_of
from kvpersist.repository import Page

__all__ = ["Sessions"]

_List: TypeAlias = list[Op]
_Sessions: TypeAlias = list[Session]  # in the class below, `list` is a method


class Sessions(Lifecycle, Forks, Transfers):
    """The sessions of one namespace, ``db.sessions``.

    What is written below a session (messages, tool calls) checks its birth key, so that nothing is
    ever added to one that was deleted. ``updated_at`` is kept beside the record, and so are its counts.
    """

    def __init__(self, collections: Collections, turns: Turns | OrderedTurns) -> None:
        self._all = collections
        self._store = collections.store
        self._turns = turns
        self._finder = SessionFinder(collections)

    async def create(self, **fields: Any) -> Session:
        """Create a session of the given fields of `Session`; one commit.

        Raises:
            UniqueConflict: there is a session of this id, or of a unique value.
            ParentGone: the container or image it names does not exist.
            BadRequest: no such field, or a time without a zone.
            KeyTooLong: the id has over 128 encoded bytes.
        """
        session, updated_at = new_session(fields, self._all.now())
        part = keys.encode(session.id)
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

    def _asked(
        self, where: dict[str, Any], order: str | None, scanned: int, scan: bool, on_corrupt: OnCorrupt | None
    ) -> Asked:
        if order is not None and order.removeprefix("-") not in SESSION_ORDERS:
            raise BadRequest(f"order={order!r}: use one of {', '.join(SESSION_ORDERS)}, or one with '-' before it")
        return Asked(SessionFinder.normal(where), order, scanned, scan, on_corrupt)
