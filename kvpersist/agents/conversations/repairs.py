"""Broken turns: calls without results and results without calls, which models refuse, found and mended.

===================  ========================================================  ===========================
kind                 what is there                                             in a view for a model
===================  ========================================================  ===========================
orphan_call          a call that no later message answers                      answered with what is known
orphan_result        a tool message whose call is not there                    left out
duplicate_result     a tool message for a call that has its answer             left out
early_result         a tool message before the call of its id                  left out
late_result          an answer behind other messages than answers              moved behind its call
===================  ========================================================  ===========================

A made-up answer has the result or error that is kept with the call, otherwise says that there is none;
it is an error unless the call was completed. It has no id and no number, for it is not stored.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias
from uuid import UUID

import msgspec

from kvpersist import keys
from kvpersist.agents.collections import Collections
from kvpersist.agents.conversations.items import Replace, Rewritten
from kvpersist.agents.conversations.ordered import OrderedTurns
from kvpersist.agents.conversations.turns import Turns
from kvpersist.agents.records import Message, ToolCall
from kvpersist.errors import BadRequest, ParentGone
from kvpersist.index.reads import decoded

__all__ = ["Problem", "ProblemKind", "Repairs", "mended", "problems_of"]

ProblemKind: TypeAlias = Literal["orphan_call", "orphan_result", "duplicate_result", "early_result", "late_result"]

_MOST: Final = 10_000  # changes that a repair makes as one batch
_ANY_NUMBER: Final = 1 << 62
_OPEN: Final = frozenset(("pending", "approval_required", "approved", "executing"))
_UNKNOWN: Final = {
    "denied": "The call was denied.",
    "approval_required": "The call was not approved.",
}
_NO_RESULT: Final = "The call was interrupted: there is no result."


class Problem(msgspec.Struct, frozen=True):
    """Something a model would refuse.

    Attributes:
        kind: see `kvpersist.agents.conversations.repairs`.
        number: of the message with the call, or of the tool message.
        call_id: whose.
        position: of the call in its message; None for a result.
    """

    kind: ProblemKind
    number: int
    call_id: str
    position: int | None = None


class Repairs:
    """What `Messages` does about broken turns of one session."""

    _all: Collections
    _turns: Turns | OrderedTurns

    if TYPE_CHECKING:  # as in `Messages`

        async def range(self, session_id: str | UUID, *, limit: int = 100) -> list[Message]: ...

    async def validate(self, session_id: str | UUID) -> list[Problem]:
        """Return what a model would refuse in a session, in the order of its messages; nothing is changed.

        The calls a session ends with are among it while they wait for an answer.

        Raises:
            ParentGone: there is no such session.
        """
        parent = str(session_id)
        if await self._all.sessions.get(parent) is None:
            raise ParentGone("session", parent)
        return problems_of(await self.range(parent, limit=_ANY_NUMBER))

    async def repair(self, session_id: str | UUID) -> list[Problem]:
        """Store a session as a model would take it, and return what was wrong with it.

        Messages stand as `last` shows them with ``repair=True``. What stands behind the first change is
        appended again: under new numbers, with its id, time and calls. Calls that the session ends with
        are left to wait for their answers. It is one batch, on what is stored at that moment.

        Raises:
            ParentGone: there is no such session.
            BadRequest: over 10,000 messages would have to be written.
        """
        found: list[Problem] = []

        def mend(messages: Sequence[Message], calls: Sequence[ToolCall]) -> Sequence[Message]:
            kept = _awaited(messages, calls)
            found[:] = [each for each in problems_of(messages) if (each.number, each.position) not in kept]
            return mended(messages, calls, leave=kept) if found else messages

        await self._all.own()
        item = Replace((), frozenset(), frozenset(), _MOST, mend)
        done: Rewritten = await self._turns.submit(str(session_id), item)
        if done.again:
            raise BadRequest(f"over {_MOST} messages would have to be written: truncate the session, or replace_all")
        return found

    async def _fit(self, session_id: str, messages: Sequence[Message]) -> list[Message]:
        """Messages that follow one another, as a model takes them; what is stored stays as it is."""
        if not problems_of(messages):
            return list(messages)
        first, last = messages[0].number, messages[-1].number
        entries = [entry async for entry in self._all.calls_of(keys.encode(session_id), first, last)]
        return mended(messages, list(decoded(self._all.tool_calls._codec, entries, None)))


def problems_of(messages: Sequence[Message]) -> list[Problem]:
    """Return what a model would refuse in these messages."""
    match = _Match(messages)
    found = list(match.problems)
    for (index, position), answer in match.answers.items():
        message = messages[index]
        call_id = (message.tool_calls or ())[position].id
        if answer is None:
            found.append(Problem("orphan_call", message.number, call_id, position))
        elif any(between.role != "tool" for between in messages[index + 1 : answer]):
            found.append(Problem("late_result", messages[answer].number, call_id))
    return sorted(found, key=lambda each: (each.number, each.position or 0))


def mended(
    messages: Sequence[Message], calls: Iterable[ToolCall] = (), *, leave: Iterable[tuple[int, int]] = ()
) -> list[Message]:
    """Return the messages as a model takes them.

    Args:
        calls: what is known of the calls that the messages ask for.
        leave: calls, by number and position, that may stay without an answer.
    """
    known: Mapping[tuple[int, int], ToolCall] = {(call.number, call.position): call for call in calls}
    left = set(leave)
    match = _Match(messages)
    view: list[Message] = []
    for index, message in enumerate(messages):
        if message.role == "tool":
            continue  # it stands behind its call, or nowhere
        view.append(message)
        asked = [(answer, position) for (_, position), answer in match.of(index)]
        view += [messages[answer] for answer in sorted(answer for answer, _ in asked if answer is not None)]
        for answer, position in asked:
            place = message.number, position
            if answer is None and place not in left:
                view.append(_made_up(message, position, known.get(place)))
    return view


class _Match:
    """Which tool message answers which call, by the rule of `append_many`: the latest earlier one that waits."""

    def __init__(self, messages: Sequence[Message]) -> None:
        self.answers: dict[tuple[int, int], int | None] = {}
        self.problems: list[Problem] = []
        self._of: dict[int, list[tuple[int, int]]] = {}
        waiting: dict[str, list[tuple[int, int]]] = {}
        asked: set[str] = set()
        every = {part.id for message in messages for part in message.tool_calls or ()}
        for index, message in enumerate(messages):
            for position, part in enumerate(message.tool_calls or ()):
                place = index, position
                self.answers[place] = None
                self._of.setdefault(index, []).append(place)
                waiting.setdefault(part.id, []).append(place)
                asked.add(part.id)
            if message.role != "tool":
                continue
            call_id = message.tool_call_id or ""
            if message.tool_call_id is not None and waiting.get(call_id):
                self.answers[waiting[call_id].pop()] = index
                continue
            kind: ProblemKind = "orphan_result"
            if message.tool_call_id is not None and call_id in every:
                kind = "duplicate_result" if call_id in asked else "early_result"
            self.problems.append(Problem(kind, message.number, call_id))

    def of(self, index: int) -> list[tuple[tuple[int, int], int | None]]:
        """The calls of one message, each with the place of its answer."""
        return [(place, self.answers[place]) for place in self._of.get(index, ())]


def _awaited(messages: Sequence[Message], calls: Sequence[ToolCall]) -> set[tuple[int, int]]:
    """The calls that a session ends with, and that something may still come of."""
    last = next((message for message in reversed(messages) if message.role != "tool"), None)
    if last is None:
        return set()
    return {(call.number, call.position) for call in calls if call.number == last.number and call.state in _OPEN}


def _made_up(message: Message, position: int, call: ToolCall | None) -> Message:
    part = (message.tool_calls or [])[position]
    content: Any = _NO_RESULT
    is_error = True
    if call is not None and call.state == "completed":
        content, is_error = call.result, False
    elif call is not None:
        note = call.approval.note if call.approval is not None and call.state == "denied" else None
        content = call.error or _UNKNOWN.get(call.state, _NO_RESULT) + (f" {note}" if note else "")
    return Message(
        "tool",
        content,
        session_id=message.session_id,
        name=part.name or None,
        tool_call_id=part.id,
        is_error=is_error,
        created_at=message.created_at,
    )
