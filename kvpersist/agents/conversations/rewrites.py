"""Changing what was said: truncate, clear, delete by age, and replacing a whole list of messages.

Up to 1,000 changes are one batch: all of it happens, or nothing. More are cut into batches of 1,000:
removals first, the newest first, so that what an interruption leaves is a beginning of the session;
then what is added, in order. On a backend without atomic batches the same order holds message by
message. Either way the call may be made again, and does what is left to do. No number is used twice.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime, timedelta
from typing import Final
from uuid import UUID

from kvpersist import keys
from kvpersist.agents.collections import Collections
from kvpersist.agents.conversations.items import Remove, Replace, Rewritten, Turn, checked
from kvpersist.agents.conversations.ordered import OrderedTurns
from kvpersist.agents.conversations.turns import Turns
from kvpersist.agents.records import Message, utc
from kvpersist.errors import BadRequest, ParentGone
from kvpersist.index.writer import live
from kvpersist.log import after_stat

__all__ = ["LONGEST", "Rewrites", "cutoff", "number_of"]

LONGEST: Final = 1_000
"""Messages of one batch."""


class Rewrites:
    """What `Messages` does to many messages of one session at once."""

    _all: Collections
    _turns: Turns | OrderedTurns

    async def truncate(self, session_id: str | UUID, *, after: int | str | UUID) -> int:
        """Delete what follows a message, with the calls asked for there; return how many messages went.

        That message stays. Calls that a deleted message answered wait for an answer again.

        Args:
            after: the number of that message, whether or not it is still there, or its id.

        Raises:
            BadRequest: no message of this session has that id, or the number is below 0.
            ParentGone: there is no such session.
        """
        parent = str(session_id)
        number = await number_of(self._all, parent, after)
        return await self._removed(parent, number)

    async def clear(self, session_id: str | UUID) -> int:
        """Delete all messages and calls of a session; return how many messages went. The session stays.

        Raises:
            ParentGone: there is no such session.
        """
        return await self._removed(str(session_id), 0)

    async def delete_older(self, session_id: str | UUID, *, than: datetime | timedelta) -> int:
        """Delete a session's messages from before a time, with the calls they asked for; return how many went.

        The session's messages are read once, in bounded memory: there is no index behind this.

        Args:
            than: a time, or an age.

        Raises:
            BadRequest: a time without a zone, or a negative age.
            ParentGone: there is no such session.
        """
        parent = str(session_id)
        limit = cutoff(than, self._all.now())
        await self._all.own()
        old: list[tuple[int, str]] = []
        removed = 0
        async for entry in after_stat(self._all.store, f"{self._all.message_prefix}{keys.encode(parent)}!", 0):
            if live(entry) is None:
                continue
            message = self._all.messages._codec.decode(entry.key, entry.value)
            if message.created_at is not None and message.created_at < limit:
                old.append((message.number, message.id))
            if len(old) == LONGEST:
                removed += await self._removed_named(parent, old)
                old = []
        return removed + await self._removed_named(parent, old)

    async def replace_all(self, session_id: str | UUID, messages: Iterable[Message]) -> list[Message]:
        """Make a session's messages the given ones, writing only what differs; return them as stored.

        A given message is one that is stored if it has its id, or, without an id, the same in all other
        fields (its time only where it gives one). The longest beginning of the given list that is
        stored, in this order, stays as it is, with its numbers; one of it whose content changed is
        written in place. What follows is appended under new numbers, and what else was stored is
        deleted. So an unchanged beginning with new messages behind it costs the new messages. (Reading
        costs one range read of the session.) A call keeps its state and history where its message is appended again.

        Raises:
            BadRequest, Unencodable, UniqueConflict, ParentGone: as for `append_many`; nothing was changed,
                where it was one batch.
        """
        parent = str(session_id)
        given = list(messages)
        ready = checked(given, parent, self._all.now())
        anonymous = {new.id for new, old in zip(ready, given, strict=True) if not old.id}
        undated = {new.id for new, old in zip(ready, given, strict=True) if old.created_at is None}
        await self._all.own()
        while True:
            done: Rewritten = await self._turns.submit(parent, Replace(ready, anonymous, undated, LONGEST))
            if not done.again:
                return list(done.stands)
            stands = list(done.stands)
            while stands and len(stands) < len(ready):  # nothing is left but to append
                rest = ready[len(stands) : len(stands) + LONGEST]
                stands += await self._turns.submit(parent, Turn(rest))
            if stands:
                return stands

    async def _removed(self, parent: str, after: int) -> int:
        await self._all.own()
        removed = 0
        while True:
            done: Rewritten = await self._turns.submit(parent, Remove(after=after, most=LONGEST))
            removed += done.removed
            if not done.again:
                return removed

    async def _removed_named(self, parent: str, places: list[tuple[int, str]]) -> int:
        done: Rewritten = await self._turns.submit(parent, Remove(places=places, most=LONGEST))
        return done.removed


async def number_of(every: Collections, session_id: str, place: int | str | UUID) -> int:
    """Return the number that ``place`` names: a number itself, or the id of a message of the session.

    Raises:
        BadRequest: no message of this session has that id, or the number is below 0.
        ParentGone: there is no such session.
    """
    [birth] = await every.store._entries([every.birth_prefix + keys.encode(session_id)])
    if birth is None:
        raise ParentGone("session", session_id)
    if isinstance(place, bool) or (isinstance(place, int) and place < 0):
        raise BadRequest(f"{place!r} is no message's number: numbers start at 1, and 0 stands before them all")
    if isinstance(place, int):
        return place
    message = await every.messages.first(id=str(place))
    if message is None or message.session_id != session_id:
        raise BadRequest(f"no message of session {session_id!r} has the id {str(place)!r}")
    return message.number


def cutoff(than: datetime | timedelta, now: datetime) -> datetime:
    """Return the time before which something is too old.

    Raises:
        BadRequest: a time without a zone, or a negative age.
    """
    if isinstance(than, timedelta):
        if than < timedelta(0):
            raise BadRequest("an age is not negative")
        return now - than
    return utc(than, "than")
