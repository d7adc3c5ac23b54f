"""What another system knows of tool calls beside its messages: states, results, approvals, times.

A call is given what the source knows of it as long as nothing happened to it here: it is pending, and
nothing stands in its ``audit``. A call that no message asks for follows the last message.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Final

import msgspec

from kvpersist.agents.conversations.items import ReplaceCalls, Rewritten
from kvpersist.agents.persistence import Persistence
from kvpersist.agents.records import ToolCall
from kvpersist.ops.importers.plan import CallRecord, Conversation

__all__ = ["TIMES", "complete_calls", "missing_calls"]

_LONGEST: Final = 1_000  # calls of one batch
TIMES: Final = ("created_at", "started_at", "updated_at", "completed_at")
"""Fields of a call that are times."""


async def complete_calls(db: Persistence, session_id: str, conversation: Conversation, indexes: Sequence[int]) -> int:
    """Bring the calls of a session to what the source knows of them.

    Args:
        indexes: which messages of the source the session's first ones are.

    Returns:
        How many changed.
    """
    if not conversation.calls:
        return 0
    numbers = dict(zip(indexes, await _numbers(db, session_id, len(indexes)), strict=False))
    stored = {(call.number, call.position): call for call in await db.tool_calls.of(session_id)}
    changed: dict[tuple[int, int], ToolCall] = {}
    taken = set(stored)
    for record in conversation.calls:
        place = _place(record, numbers, stored)
        if place is None:
            last = max(numbers.values(), default=0)
            place = last, 1 + max((position for number, position in taken if number == last), default=-1)
        elif place in stored and not _untouched(stored[place]):
            continue
        taken.add(place)
        before = stored.get(place)
        changed[place] = _completed(record.call, before, session_id, place)
    if changed:
        every = {place: _unread(call) for place, call in stored.items()} | changed
        latest = max((at for call in changed.values() for at in _times(call)), default=None)
        item = ReplaceCalls(every, _LONGEST, latest or (conversation.session.created_at))
        while True:
            done: Rewritten = await db.tool_calls._turns.submit(session_id, item)
            if not done.again:
                break
    return len(changed)


async def missing_calls(db: Persistence, session_id: str, conversation: Conversation) -> list[str]:
    """The places of those of the source's calls that are not in the session."""
    if not conversation.calls:
        return []
    found = [(call.call_id, call.name, call.state) for call in await db.tool_calls.of(session_id)]
    missing: list[str] = []
    for record in conversation.calls:
        wanted = record.call.call_id, record.call.name, record.call.state
        if wanted in found:
            found.remove(wanted)
        elif not any(call[:2] == wanted[:2] for call in found):  # it may have been gone on with
            missing.append(record.place)
    return missing


async def _numbers(db: Persistence, session_id: str, count: int) -> list[int]:
    numbers: list[int] = []
    async for message in db.messages.iterate(session_id):
        if len(numbers) == count:
            break
        numbers.append(message.number)
    return numbers


def _place(
    record: CallRecord, numbers: dict[int, int], stored: dict[tuple[int, int], ToolCall]
) -> tuple[int, int] | None:
    """Where the call is, or belongs; None: no message asks for it, and it is not there yet."""
    if record.asked_by is not None and record.asked_by in numbers:
        return numbers[record.asked_by], record.position
    named = record.call.call_id, record.call.name
    return next((place for place, call in stored.items() if (call.call_id, call.name) == named), None)


def _untouched(call: ToolCall) -> bool:
    return call.state == "pending" and not call.audit and call.approval is None and call.result_number is None


def _completed(call: ToolCall, before: ToolCall | None, session_id: str, place: tuple[int, int]) -> ToolCall:
    asked = {} if before is None else {"call_id": before.call_id, "name": before.name, "arguments": before.arguments}
    at = call.created_at or (None if before is None else before.created_at)
    return msgspec.structs.replace(
        call, session_id=session_id, number=place[0], position=place[1], created_at=at, **asked
    )


def _unread(call: ToolCall) -> ToolCall:
    """The call as it is stored: a result that stands in a message is not in it."""
    return call if call.result_number is None else msgspec.structs.replace(call, result=None)


def _times(call: ToolCall) -> list[datetime]:
    return [at for name in TIMES if (at := getattr(call, name)) is not None]
