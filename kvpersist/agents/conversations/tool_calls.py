"""Tool calls: what assistants asked for, what came of it, and how long it took."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Any
from uuid import UUID

from kvpersist import keys
from kvpersist.agents.collections import Collections
from kvpersist.agents.conversations.approvals import CallStates
from kvpersist.agents.conversations.items import Begin, EditCall, ended
from kvpersist.agents.conversations.messages import Messages
from kvpersist.agents.conversations.ordered import OrderedTurns
from kvpersist.agents.conversations.turns import Turns
from kvpersist.agents.finding.calls import CallFinder
from kvpersist.agents.finding.queries import SCANNED, Asked
from kvpersist.agents.records import ToolCall, new_id
from kvpersist.errors import BadRequest
from kvpersist.index.reads import OnCorrupt, decoded
from kvpersist.index.writer import live
from kvpersist.repository import Page

__all__ = ["Recording", "ToolCalls"]


class Recording:
    """A call under way: set ``result``, and ``is_error`` where it failed without an exception."""

    __slots__ = ("call", "is_error", "result")

    def __init__(self, call: ToolCall) -> None:
        self.call = call
        self.result: Any = None
        self.is_error = False


class ToolCalls(CallStates):
    """The tool calls of one namespace, ``db.tool_calls``.

    They are stored with the message that asks for them, and completed with the message that answers.
    An answer's content is stored once, in that message: ``result`` is filled in from it, with one
    further read for all the calls of an answer.
    """

    def __init__(self, collections: Collections, turns: Turns | OrderedTurns, messages: Messages) -> None:
        self._all = collections
        self._store = collections.store
        self._turns = turns
        self._finder = CallFinder(collections, messages._last_number, self._with_results)

    async def get(self, session_id: str | UUID, number: int, position: int) -> ToolCall | None:
        """Return the call at ``position`` (from 0) of message ``number``, or None."""
        found = await self._all.tool_calls.get((str(session_id), number, position))
        return None if found is None else (await self._with_results([found]))[0]

    async def of(
        self,
        session_id: str | UUID,
        *,
        after: int = 0,
        before: int | None = None,
        on_corrupt: OnCorrupt | None = None,
    ) -> list[ToolCall]:
        """Return the calls of a session in the order they were asked for, by messages between two numbers.

        Args:
            on_corrupt: is handed the error of each damaged call, which is left out, and of each damaged
                result, which stays None; without it, the error is raised.
        """
        part = keys.encode(str(session_id))
        first = after + 1 if after else 0
        last = (1 << 62) if before is None else before - 1
        entries = [entry async for entry in self._all.calls_of(part, first, last)]
        calls = list(decoded(self._all.tool_calls._codec, entries, on_corrupt))
        return await self._with_results(calls, on_corrupt)

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
    ) -> list[ToolCall]:
        """Return up to ``limit`` calls, newest first: ``find(name="search")``, ``find(session_id, is_error=True)``.

        Conditions: ``name``, ``state``, ``is_error`` or ``success``, ``has_approval``, ``decision`` ("allow" or
        "deny"), ``created`` (a time, or a range), ``metadata={path: value}``, and any other field. In a
        session all of them are told by reading its calls. Across sessions by name or state, which are
        indexed, by time, or through ``tool_call_indexes=``; the rest is told by reading what these find.

        Args:
            offset: leave out so many at first.
            order: "desc" or "asc": by place in a session, across sessions by time. None: "desc", or as
                the index of ``tool_call_indexes=`` is.
            scanned: calls that may be read beyond those given back; a session is read to its end.
            scan: read any number of them.
            on_corrupt: is handed the error of each damaged call, which is left out, and of each damaged
                result, which stays None; without it, the error is raised.

        Raises:
            NoIndex: without ``scan`` all calls, or over ``scanned``, would be read.
            IndexNotReady: an index for this was declared over records already there: `reindex` first.
            BadRequest: no such condition, state or order, or a value of another kind.
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
    ) -> Page[ToolCall]:
        """Return one page as `find` does, and the cursor that ``after`` takes for the next.

        Where ``scanned`` calls were read before the page was full it is short, and its cursor goes on.

        Raises:
            BadCursor: it belongs to another query.
        """
        asked = self._asked(session_id, where, order, scanned, scan, on_corrupt)
        return await self._finder.page(asked, limit, offset, after)

    async def iterate(
        self,
        session_id: str | UUID | None = None,
        *,
        order: str | None = None,
        scanned: int = SCANNED,
        scan: bool = False,
        on_corrupt: OnCorrupt | None = None,
        **where: Any,
    ) -> AsyncIterator[ToolCall]:
        """Yield every call that `find` would, about 250 in memory at a time."""
        async for call in self._finder.iterate(self._asked(session_id, where, order, scanned, scan, on_corrupt)):
            yield call

    async def count(
        self, session_id: str | UUID | None = None, *, scanned: int = SCANNED, scan: bool = False, **where: Any
    ) -> int:
        """Count the calls, all or those that `find` would return; only keys are read where an index answers all."""
        return await self._finder.count(self._asked(session_id, where, None, scanned, scan, None))

    @asynccontextmanager
    async def record(
        self, session_id: str | UUID, name: str, arguments: Any = None, *, call_id: str | None = None
    ) -> AsyncIterator[Recording]:
        """Record a call that no message asks for: begun here, ended with the block.

        It belongs to the session's last message. An exception ends it as failed, with the exception's
        text as the result, and goes on.

        Example:
            async with db.tool_calls.record(session.id, "search", {"q": "tea"}) as call:
                call.result = await search("tea")

        Raises:
            ParentGone: there is no such session.
            Unencodable: arguments or result cannot be kept and given back alike.
        """
        parent = str(session_id)
        await self._all.own()
        call = ToolCall(
            session_id=parent,
            number=0,
            position=0,
            call_id=call_id or new_id(),
            name=name,
            arguments=arguments,
            created_at=self._all.now(),
        )
        begun: ToolCall = await self._turns.submit(parent, Begin(call))
        recording = Recording(begun)
        try:
            yield recording
        except BaseException as error:  # a cancelled call has failed, too; the cancellation goes on
            text = str(error) or type(error).__name__
            failed = partial(ended, result=text, is_error=True)
            await self._turns.submit(parent, EditCall(begun.number, begun.position, failed))
            raise
        done = partial(ended, result=recording.result, is_error=recording.is_error)
        recording.call = await self._turns.submit(parent, EditCall(begun.number, begun.position, done)) or begun

    def _asked(
        self,
        session_id: str | UUID | None,
        where: dict[str, Any],
        order: str | None,
        scanned: int,
        scan: bool,
        on_corrupt: OnCorrupt | None,
    ) -> Asked:
        if order not in (None, "asc", "desc"):
            raise BadRequest(f"order={order!r}: use asc or desc")
        if session_id is not None:
            where = {"session_id": str(session_id)} | where
        return Asked(CallFinder.normal(where), order, scanned, scan, on_corrupt)

    async def _with_results(self, calls: Sequence[ToolCall], on_corrupt: OnCorrupt | None = None) -> list[ToolCall]:
        """Fill in the results that stand in messages: one read for all."""
        answered = [call for call in calls if call.result_number is not None]
        if answered:
            prefix = self._all.message_prefix
            codec = self._all.messages._codec
            names = [
                f"{prefix}{keys.encode(call.session_id)}!{keys.encode(call.result_number or 0)}" for call in answered
            ]
            for call, entry in zip(answered, await self._store._entries(names), strict=True):
                entry = live(entry)
                for message in () if entry is None else decoded(codec, (entry,), on_corrupt):
                    call.result = message.content
        return list(calls)
