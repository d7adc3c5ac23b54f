"""Messages: numbered within their session, named by an id in the whole store."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from typing import Any, Final
from uuid import UUID

from kvpersist import keys
from kvpersist.agents.collections import Collections
from kvpersist.agents.conversations.items import Edit, Remove, Rewritten, Turn, checked
from kvpersist.agents.conversations.ordered import OrderedTurns
from kvpersist.agents.conversations.repairs import Repairs
from kvpersist.agents.conversations.rewrites import Rewrites
from kvpersist.agents.conversations.turns import Turns
from kvpersist.agents.finding.messages import MessageFinder
from kvpersist.agents.finding.queries import SCANNED, Asked, Found
from kvpersist.agents.finding.sessions import SessionFinder
from kvpersist.agents.records import Message
from kvpersist.driver import Entry
from kvpersist.errors import BadRequest, KvError, PartlyDone
from kvpersist.index import at_least
from kvpersist.index.reads import OnCorrupt, decoded
from kvpersist.index.writer import live
from kvpersist.log import read_range
from kvpersist.repository import Page

__all__ = ["Messages"]

_LONGEST: Final = 1_000  # messages of one batch


class Messages(Rewrites, Repairs):
    """The messages of one namespace, ``db.messages``."""

    def __init__(self, collections: Collections, turns: Turns | OrderedTurns, sessions: SessionFinder) -> None:
        self._all = collections
        self._store = collections.store
        self._turns = turns
        self._finder = MessageFinder(collections, sessions, self._last_number)

    async def append(self, session_id: str | UUID, message: Message) -> Message:
        """Append one message; return it as stored, with its number. As `append_many`."""
        [stored] = await self.append_many(session_id, (message,))
        return stored

    async def append_many(self, session_id: str | UUID, messages: Iterable[Message]) -> list[Message]:
        """Append a turn: messages, the tool calls they ask for or answer, and the session's counts.

        It is one batch: all of it is stored, or nothing. (Over 1,000 messages are cut into several: where one
        fails, those before it stand, and "nothing was written" is true of the rest. On a backend without
        atomic batches a crash may leave the first messages of a turn.)

        Returns:
            The messages as stored, in their order: with ids, consecutive numbers, and times.

        Raises:
            BadRequest: an unknown role, or a message at odds with itself; nothing was written.
            Unencodable: something in a message cannot be kept and given back alike; nothing was written.
            UniqueConflict: a message of this id is there already; nothing was written.
            ParentGone: there is no such session, or it was deleted; nothing was written.
            DeadlineExceeded: other writers won every time until the store's timeout; nothing was written.
        """
        parent = str(session_id)
        ready = checked(list(messages), parent, self._all.now())
        if not ready:
            return []
        if not self._all.owned:
            await self._all.own()
        if len(ready) <= _LONGEST:
            return list(await self._turns.submit(parent, Turn(ready)))
        stored: list[Message] = []
        for at in range(0, len(ready), _LONGEST):
            stored += await self._turns.submit(parent, Turn(ready[at : at + _LONGEST]))
        return stored

    async def append_each(self, turns: Mapping[str, Sequence[Message]]) -> dict[str, list[Message]]:
        """Append a turn to each of several sessions, together; each turn is one batch of its own.

        Raises:
            PartlyDone: some turns failed; it names their sessions, with the errors.
        """
        sessions = list(turns)
        answers = await asyncio.gather(
            *[self.append_many(each, turns[each]) for each in sessions], return_exceptions=True
        )
        failed: dict[str, KvError] = {}
        stored: dict[str, list[Message]] = {}
        for each, answer in zip(sessions, answers, strict=True):
            if isinstance(answer, KvError):
                failed[each] = answer
            elif isinstance(answer, BaseException):
                raise answer
            else:
                stored[each] = answer
        if len(failed) == len(sessions) == 1:
            raise next(iter(failed.values()))
        if failed:
            raise PartlyDone(len(stored), failed)
        return stored

    async def get(self, id: str | UUID) -> Message | None:
        """Return the message of this id, or None; one read through the index."""
        return await self._all.messages.first(id=str(id))

    async def at(self, session_id: str | UUID, number: int) -> Message | None:
        """Return message ``number`` of a session, or None."""
        key = f"{self._prefix(session_id)}{keys.encode(number)}"
        [entry] = await self._store._entries([key])
        entry = live(entry)
        return None if entry is None else self._all.messages._codec.decode(key, entry.value)

    async def last(self, session_id: str | UUID, n: int, *, repair: bool = False) -> list[Message]:
        """Return the ``n`` newest messages in chronological order: one range read at any length.

        Args:
            repair: as a model takes them: each call with its answer behind it, and no other answers. What
                is stored stays as it is; `kvpersist.agents.conversations.repairs` says what is done to broken turns.
        """
        found = (await self.range(session_id, limit=n, reverse=True))[::-1]
        return await self._fit(str(session_id), found) if repair else found

    async def range(
        self,
        session_id: str | UUID,
        *,
        after: int = 0,
        before: int | None = None,
        limit: int = 100,
        reverse: bool = False,
        on_corrupt: OnCorrupt | None = None,
    ) -> list[Message]:
        """Return up to ``limit`` messages with ``after < number < before``; ``reverse`` starts at the newest.

        Args:
            on_corrupt: is handed the error of each damaged message, which is left out; without it, the
                error is raised.
        """
        found = await self._entries(session_id, after, before, limit, reverse)
        return list(decoded(self._all.messages._codec, found, on_corrupt))

    async def iterate(
        self,
        session_id: str | UUID | None = None,
        *,
        after: int = 0,
        order: str | None = None,
        scanned: int = SCANNED,
        scan: bool = False,
        on_corrupt: OnCorrupt | None = None,
        **where: Any,
    ) -> AsyncIterator[Message]:
        """Yield every message that `find` would, 250 in memory at a time.

        Those of a session come in order, also those that are appended meanwhile; ``after``: only those
        with a greater number.

        Raises:
            BadRequest: ``after`` without a session. As `find`.
        """
        if after:
            if session_id is None:
                raise BadRequest("after is a number in one session: give session_id, or created=at_least(time)")
            where["number"] = at_least(after + 1)
        async for message in self._finder.iterate(self._asked(session_id, where, order, scanned, scan, on_corrupt)):
            yield message

    async def count(
        self,
        session_id: str | UUID | None = None,
        *,
        scanned: int = SCANNED,
        scan: bool = False,
        **where: Any,
    ) -> int:
        """Count a session's messages, or those that `find` would return; 0 where there is no such session.

        Without further conditions no message is read.
        """
        if session_id is None or where:
            return await self._finder.count(self._asked(session_id, where, None, scanned, scan, None))
        part = keys.encode(str(session_id))
        [entry] = await self._store._entries([self._all.stat_prefix + part])
        if entry is None:
            return 0
        stat = self._all.stat_of(entry)
        if isinstance(self._turns, OrderedTurns):
            stat = await self._turns.stat(str(session_id), stat)
        return stat.messages

    async def find(
        self,
        session_id: str | UUID | None = None,
        *,
        limit: int = 100,
        offset: int = 0,
        order: str | None = None,
        scanned: int = SCANNED,
        scan: bool = False,
        on_corrupt: OnCorrupt | None = None,
        **where: Any,
    ) -> list[Message]:
        """Return up to ``limit`` messages: ``find(session_id, role="user")``, ``find(user_id="u1", text="tea")``.

        Conditions: ``user_id``, ``agent_id`` (and the other owners) of the session, ``role``,
        ``content_type`` (see `content_types`), ``text`` (in the content, in any case), ``created`` (a time,
        or a range), ``has_tool_calls``, ``name``, ``metadata={path: value}``, and any other field. A
        session's messages are read from its own range; those of a user or an agent session by session;
        others through an index given as ``message_indexes=``, of which a field named like an owner is
        then the message's own.

        Args:
            offset: leave out so many at first.
            order: "asc" or "desc": by number in a session, across sessions the oldest or the newest
                session first; through an index by time. "created_at" or "-created_at": by time, after
                reading all that is asked for. None: "asc" in a session, else "desc", or as the index is.
            scanned: records that may be read beyond those given back; a session is read to its end.
            scan: read any number of them, and the messages of all sessions if nothing narrows it.
            on_corrupt: is handed the error of each damaged message, which is left out; without it, the
                error is raised.

        Raises:
            NoIndex: without ``scan`` all messages, or over ``scanned``, would be read.
            IndexNotReady: an index for this was declared over records already there: `reindex` first.
            BadRequest: no such condition, role or order, or a value of another kind.
        """
        asked = self._asked(session_id, where, order, scanned, scan, on_corrupt)
        return await self._finder.find(asked, limit, offset)

    async def page(
        self,
        session_id: str | UUID | None = None,
        *,
        limit: int = 100,
        offset: int = 0,
        after: str | None = None,
        order: str | None = None,
        scanned: int = SCANNED,
        scan: bool = False,
        on_corrupt: OnCorrupt | None = None,
        **where: Any,
    ) -> Page[Message]:
        """Return one page as `find` does, and the cursor that ``after`` takes for the next.

        Where ``scanned`` records were read before the page was full it is short, and its cursor goes on.

        Raises:
            BadCursor: it belongs to another query.
        """
        asked = self._asked(session_id, where, order, scanned, scan, on_corrupt)
        return await self._finder.page(asked, limit, offset, after)

    async def update(self, id: str | UUID, fn: Callable[[Message], Message]) -> Message | None:
        """Replace a message by what ``fn`` makes of it, and return that; None where there is none.

        Raises:
            BadRequest: ``fn`` changed its id, place, role, calls, or what it answers.
        """
        found = await self.get(id)
        if found is None:
            return None
        return await self._turns.submit(found.session_id, Edit(found.number, found.id, fn))

    async def delete(self, id: str | UUID) -> bool:
        """Delete a message and the calls it asked for; False where there is none.

        Its number is not used again. A call that it answered waits for an answer again.
        """
        found = await self.get(id)
        if found is None:
            return False
        item = Remove(places=[(found.number, found.id)], most=1)
        done: Rewritten = await self._turns.submit(found.session_id, item)
        return done.removed > 0

    async def search(
        self,
        text: str,
        *,
        user_id: str | None = None,
        session_id: str | UUID | None = None,
        limit: int = 100,
        scanned: int = SCANNED,
        on_corrupt: OnCorrupt | None = None,
    ) -> Found[Message]:
        """Find messages in whose content ``text`` occurs, in any case.

        In one session they are read, the newest first. Across sessions the index of words is asked if
        there is one (``open(text_index=True)``): the newest message comes first, and a text without
        a space, or the like, is found where a word begins with it. Otherwise messages are read,
        the newest session first. Either ends with what was found after ``scanned`` messages, or
        entries of the index: ``complete`` of the answer is False then. ``indexed`` tells which it was.

        Args:
            user_id: only in sessions of this user.
            limit: how many to return at most.
            on_corrupt: as for `find`.

        Raises:
            BadRequest: ``text`` is empty. IndexNotReady: as `find`.
        """
        where: dict[str, Any] = {"text": text} | ({} if user_id is None else {"user_id": user_id})
        asked = self._asked(session_id, where, "desc", scanned, False, on_corrupt)._replace(partial=True)
        return await (self._finder.search(asked, limit) if session_id is None else self._finder.some(asked, limit))

    def _asked(
        self,
        session_id: str | UUID | None,
        where: dict[str, Any],
        order: str | None,
        scanned: int,
        scan: bool,
        on_corrupt: OnCorrupt | None,
    ) -> Asked:
        if order not in (None, "asc", "desc", "created_at", "-created_at"):
            raise BadRequest(f"order={order!r}: use asc, desc, created_at or -created_at")
        if session_id is not None:
            where = {"session_id": str(session_id)} | where
        return Asked(MessageFinder.normal(where), order, scanned, scan, on_corrupt)

    async def _entries(
        self, session_id: str | UUID, after: int, before: int | None, limit: int, reverse: bool
    ) -> list[Entry]:
        prefix = self._prefix(session_id)
        return await read_range(self._store, prefix, after, before, limit, reverse, self._last_number, str(session_id))

    def _prefix(self, session_id: str | UUID) -> str:
        return f"{self._all.message_prefix}{keys.encode(str(session_id))}!"

    async def _last_number(self, session_id: str) -> int:
        part = keys.encode(session_id)
        [entry] = await self._store._entries([self._all.stat_prefix + part])
        if entry is None:
            return 0
        stat = self._all.stat_of(entry)
        if isinstance(self._turns, OrderedTurns):
            stat = await self._turns.stat(session_id, stat)
        return stat.last
