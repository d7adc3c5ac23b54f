"""Tool calls: what assistants asked for, what came of it, and how long it took."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any
from uuid import UUID

from kvpersist import keys
from kvpersist.agents.approvals import CallStates
from kvpersist.agents.collections import Collections
from kvpersist.agents.items import Begin, End
from kvpersist.agents.ordered import OrderedTurns
from kvpersist.agents.records import ToolCall, new_id
from kvpersist.agents.turns import Turns
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

    def __init__(self, collections: Collections, turns: Turns | OrderedTurns) -> None:
        self._all = collections
        self._store = collections.store
        self._turns = turns

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

    async def find(self, *, limit: int = 100, **where: Any) -> list[ToolCall]:
        """Return calls of all sessions, newest first: ``find(name="search")``, ``find(is_error=True)``.

        Without more indexes (``tool_call_indexes=``) by name, or by state: "pending", "completed" or
        "failed", which ``is_error=False`` and ``True`` stand for. As `Repository.find`.
        """
        return await self._with_results(await self._all.tool_calls.find(limit=limit, **_by_state(where)))

    async def page(self, *, limit: int = 100, after: str | None = None, **where: Any) -> Page[ToolCall]:
        """Return one page as `find` does, and the cursor for the next. As `Repository.page`."""
        page = await self._all.tool_calls.page(limit=limit, after=after, **_by_state(where))
        return Page(await self._with_results(page.items), page.cursor)

    async def count(self, **where: Any) -> int:
        """Count the calls, all or those that `find` would return; only keys are read."""
        return await self._all.tool_calls.count(**_by_state(where))

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
            await self._turns.submit(parent, End(begun.number, begun.position, text, True))
            raise
        end = End(begun.number, begun.position, recording.result, recording.is_error)
        recording.call = await self._turns.submit(parent, end) or begun

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


def _by_state(where: dict[str, Any]) -> dict[str, Any]:
    """Ask for a state instead of ``is_error``: a call has failed exactly if it is an error, so one index tells both."""
    if "state" in where or not isinstance(where.get("is_error"), bool):
        return where
    state = "failed" if where["is_error"] else "completed"
    return {"state": state} | {name: value for name, value in where.items() if name != "is_error"}
