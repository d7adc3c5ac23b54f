"""Forks: a session that begins with what another one has said so far."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final
from uuid import UUID

import msgspec

from kvpersist import keys
from kvpersist.agents.collections import Collections
from kvpersist.agents.conversations.items import asked_of
from kvpersist.agents.conversations.making import Making, new_session
from kvpersist.agents.conversations.ordered import OrderedTurns
from kvpersist.agents.conversations.rewrites import number_of
from kvpersist.agents.conversations.turns import Turns
from kvpersist.agents.records import Message, Session, ToolCall, new_id
from kvpersist.errors import BadRequest, ParentGone
from kvpersist.index.reads import decoded
from kvpersist.index.writer import live
from kvpersist.log import after_stat

__all__ = ["Forks"]

_Sessions = list[Session]

_INHERITED: Final = ("user_id", "agent_id", "container_id", "image_id", "template_id", "title", "metadata")
_PAGE: Final = 250  # messages read at once
_ANY_NUMBER: Final = 1 << 62


class Forks:
    """What `Sessions` does to let a conversation go on in several ways."""

    _all: Collections
    _turns: Turns | OrderedTurns

    if TYPE_CHECKING:  # as in `Sessions`

        async def delete(self, id: str | UUID) -> bool: ...

    async def fork(
        self,
        session_id: str | UUID,
        *,
        at: int | str | UUID | None = None,
        after: int = 0,
        count: int = 1,
        **fields: Any,
    ) -> _Sessions:
        """Make sessions that begin as this one does, and return them.

        Messages are copied with their numbers and times under new ids, and so are calls with their
        states and results; a call whose answer is not copied waits for one. ``parent_id``, ``forked_at``
        and ``lineage`` say where a fork comes from. It has its parent's owner, agent, container, image,
        template, title and metadata, but no ``external_id``, and no confirmation.

        Each fork can be seen when it is whole, and not before: up to 1,000 messages and calls are one
        batch where batches are atomic, and what a crash leaves of a longer one is removed by a later `open`.

        Args:
            at: the last message that is copied, by number or id; None: all.
            after: only messages above this number are copied.
            count: how many to make.
            fields: of the new sessions, in place of the parent's.

        Raises:
            ParentGone: there is no such session, or no container or image that ``fields`` name.
            BadRequest: no message of this session has that id; no such field; one id for several forks.
            UniqueConflict: as for `create`. Forks made before it are removed again.
        """
        parent_id = str(session_id)
        if count < 1:
            raise BadRequest(f"count={count}: make one fork, or more")
        if after < 0:
            raise BadRequest(f"after={after}: the number of a message, or 0")
        if count > 1 and fields.get("id"):
            raise BadRequest("one id for several forks: leave it out, or make them one by one")
        for name in ("parent_id", "forked_at", "lineage"):
            if name in fields:
                raise BadRequest(f"{name} of a fork is set by forking")
        last = _ANY_NUMBER if at is None else await number_of(self._all, parent_id, at)
        made: list[Making] = []
        forks: _Sessions = []
        try:
            for _ in range(count):
                part = keys.encode(parent_id)
                entry, stat = await self._all.store._entries(
                    [self._all.session_prefix + part, self._all.stat_prefix + part]
                )
                entry = live(entry)
                if entry is None:
                    raise ParentGone("session", parent_id)
                parent = self._all.sessions._codec.decode(entry.key, entry.value)
                inherited = {name: getattr(parent, name) for name in _INHERITED}
                inherited["parent_id"], inherited["lineage"] = parent_id, [*parent.lineage, parent_id]
                session, updated_at = new_session(inherited | fields, self._all.now())
                making = Making(self._all, self._turns, session, updated_at)
                made.append(making)
                end = last  # what is said from here on is not copied, nor what it asks for or answers
                if stat is not None:
                    known = self._all.stat_of(stat)
                    if isinstance(self._turns, OrderedTurns):
                        known = await self._turns.stat(parent_id, known)
                    end = min(last, known.last)
                session.forked_at = await self._copy(parent_id, making, after, end)
                forks.append(await making.finish())
        except BaseException:  # cancelled too
            for fork in forks:
                await self.delete(fork.id)
            if len(made) > len(forks):
                await made[-1].abandon()
            raise
        return forks

    async def _copy(self, parent_id: str, making: Making, after: int, last: int) -> int:
        """Copy what was said behind message ``after`` up to ``last``; return the number of the last one there was."""
        every = self._all
        part = keys.encode(parent_id)
        copied, page, held = 0, list[Message](), list[ToolCall]()
        first = after + 1 if after else 0  # where the calls of the next page begin
        async for entry in after_stat(every.store, f"{every.message_prefix}{part}!", after):
            if keys.decode(entry.key.rpartition("!")[2], int) > last:
                break
            if live(entry) is None:
                continue
            page.append(every.messages._codec.decode(entry.key, entry.value))
            copied = page[-1].number
            if len(page) == _PAGE:
                held = await self._add(making, part, page, first, copied, last, held)
                first, page = copied + 1, []
        await self._add(making, part, page, first, last, last, held)
        return copied

    async def _add(
        self, making: Making, part: str, page: list[Message], first: int, end: int, last: int, held: list[ToolCall]
    ) -> list[ToolCall]:
        """Add messages, the calls that messages ``first`` to ``end`` asked for, and those that were held back.

        Returns:
            Calls whose answers are to come with messages behind ``end``. One whose answer was removed
            meanwhile waits for another.
        """
        session_id = making.session.id
        numbers = {message.number for message in page}
        for message in page:
            message.id, message.session_id = new_id(), session_id
        calls: list[ToolCall] = []
        late: list[ToolCall] = []
        entries = [entry async for entry in self._all.calls_of(part, first, end)]
        for call in (*held, *decoded(self._all.tool_calls._codec, entries, None)):
            answer = call.result_number
            if answer is not None and end < answer <= last:
                late.append(call)
                continue
            cut = answer is not None and answer not in numbers
            calls.append(msgspec.structs.replace(asked_of(call) if cut else call, session_id=session_id))
        await making.add(page, calls)
        return late
