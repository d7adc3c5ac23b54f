"""Messages: numbered within their session, named by an id in the whole store."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from typing import Any, Final, cast
from uuid import UUID

from kvpersist import keys
from kvpersist.agents.collections import Collections
from kvpersist.agents.items import Edit, Remove, Rewritten, Turn, checked
from kvpersist.agents.ordered import OrderedTurns
from kvpersist.agents.records import Message
from kvpersist.agents.repairs import Repairs
from kvpersist.agents.rewrites import Rewrites
from kvpersist.agents.turns import Turns
from kvpersist.driver import Entry
from kvpersist.errors import BadRequest, KvError, PartlyDone
from kvpersist.index.reads import OnCorrupt, decoded
from kvpersist.index.writer import live
from kvpersist.log import read_range
from kvpersist.repository import Page

__all__ = ["Messages"]

_PAGE: Final = 250  # messages read at once
_LONGEST: Final = 1_000  # messages of one batch


class Messages(Rewrites, Repairs):
    """The messages of one namespace, ``db.messages``."""

    def __init__(self, collections: Collections, turns: Turns | OrderedTurns) -> None:
        self._all = collections
        self._store = collections.store
        self._turns = turns

    async def append(self, session_id: str | UUID, message: Message) -> Message:
        """Append one message; return it as stored, with its number. As `append_many`."""
        [stored] = await self.append_many(session_id, (message,))
        return stored

    async def append_many(self, session_id: str | UUID, messages: Iterable[Message]) -> list[Message]:
        """Append a turn: messages, the tool calls they ask for or answer, and the session's counts.

        It is one batch: all of it is stored, or nothing. (Over 1,000 messages are cut into several;
        on a backend without atomic batches a crash may leave the first messages of a turn.)

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
                is stored stays as it is; `kvpersist.agents.repairs` says what is done to broken turns.
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
        self, session_id: str | UUID, *, after: int = 0, on_corrupt: OnCorrupt | None = None
    ) -> AsyncIterator[Message]:
        """Yield a session's messages in order, 250 in memory at a time; those appended meanwhile too.

        ``on_corrupt`` as for `range`.
        """
        prefix = self._prefix(session_id)
        while True:
            found = await self._entries(session_id, after, None, _PAGE, False)
            for message in decoded(self._all.messages._codec, found, on_corrupt):
                yield message
            if len(found) < _PAGE:
                return
            after = keys.decode(found[-1].key[len(prefix) :], int)

    async def count(self, session_id: str | UUID) -> int:
        """Count a session's messages, without reading them; 0 where there is no such session."""
        part = keys.encode(str(session_id))
        [entry] = await self._store._entries([self._all.stat_prefix + part])
        if entry is None:
            return 0
        stat = self._all.stat_of(entry)
        if isinstance(self._turns, OrderedTurns):
            stat = await self._turns.stat(str(session_id), stat)
        return stat.messages

    async def find(self, *, limit: int = 100, **where: Any) -> list[Message]:
        """Return messages of all sessions through an index given as ``message_indexes=``. As `Repository.find`."""
        return await self._all.messages.find(limit=limit, **where)

    async def page(self, *, limit: int = 100, after: str | None = None, **where: Any) -> Page[Message]:
        """Return one page as `find` does, and the cursor for the next. As `Repository.page`."""
        return await self._all.messages.page(limit=limit, after=after, **where)

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
        scanned: int = 10_000,
        on_corrupt: OnCorrupt | None = None,
    ) -> list[Message]:
        """Find messages in whose content ``text`` occurs, in any case, by reading them.

        There is no index behind this: after ``scanned`` messages it ends with what it has found. In one
        session it starts at the newest message, otherwise at the newest session (by its messages' order).

        Args:
            user_id: only in sessions of this user.
            limit: how many to return at most.
            on_corrupt: as for `range`.

        Raises:
            BadRequest: ``text`` is empty.
        """
        if not text:
            raise BadRequest("search for a text that is not empty")
        needle = text.casefold()
        found: list[Message] = []
        left = scanned
        async for session in self._searched(user_id, session_id):
            before: int | None = None
            while left > 0 and len(found) < limit:
                size = min(_PAGE, left)
                page = await self._entries(session, 0, before, size, True)
                left -= len(page) or 1
                read = decoded(self._all.messages._codec, page, on_corrupt)
                found += [message for message in read if _contains(message.content, needle)]
                if len(page) < size:
                    break
                before = keys.decode(page[-1].key[len(self._prefix(session)) :], int)
            if left <= 0 or len(found) >= limit:
                break
        return found[:limit]

    async def _searched(self, user_id: str | None, session_id: str | UUID | None) -> AsyncIterator[str]:
        if session_id is not None:
            if user_id is not None:
                session = await self._all.sessions.get(str(session_id))
                if session is None or session.user_id != user_id:
                    return
            yield str(session_id)
            return
        where: dict[str, Any] = {} if user_id is None else {"user_id": user_id}
        cursor: str | None = None
        while True:
            page = await self._all.sessions.page(limit=100, after=cursor, **where)
            for session in page.items:
                yield session.id
            if page.cursor is None:
                return
            cursor = page.cursor

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


def _contains(value: Any, needle: str) -> bool:
    if isinstance(value, str):
        return needle in value.casefold()
    if isinstance(value, dict):
        item = cast("dict[str, Any]", value)
        return any(_contains(each, needle) for key, each in item.items() if key != "type")
    if isinstance(value, list):
        return any(_contains(each, needle) for each in cast("list[Any]", value))
    return False
