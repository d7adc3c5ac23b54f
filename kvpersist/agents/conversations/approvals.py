"""The states of a tool call, who may let it run, and what became of it.

==================  ==============================================================================
from                to
==================  ==============================================================================
pending             approval_required, approved, executing, completed, failed, denied, sealed
approval_required   approved, denied, failed, sealed
approved            executing, completed, failed, sealed
executing           completed, failed, sealed
==================  ==============================================================================

The other four are ends. A message that answers a call completes it (or fails it, with ``is_error``)
from any of the first four; where a call has come to an end already, the message is joined with it
and the state stays. Each change that is made here is entered in ``audit`` with the store's time.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import datetime
from types import MappingProxyType
from typing import Any, Final, cast
from uuid import UUID

import msgspec

from kvpersist.agents.collections import Collections
from kvpersist.agents.conversations.items import EditCall, ReplaceCalls, Rewritten
from kvpersist.agents.conversations.ordered import OrderedTurns
from kvpersist.agents.conversations.turns import Turns
from kvpersist.agents.records import Approval, AuditEntry, ToolCall, ToolCallState, utc
from kvpersist.errors import BadRequest, BadTransition, UniqueConflict

__all__ = ["TRANSITIONS", "CallStates", "state_named"]

TRANSITIONS: Final[Mapping[ToolCallState, tuple[ToolCallState, ...]]] = MappingProxyType(
    {
        "pending": ("approval_required", "approved", "executing", "completed", "failed", "denied", "sealed"),
        "approval_required": ("approved", "denied", "failed", "sealed"),
        "approved": ("executing", "completed", "failed", "sealed"),
        "executing": ("completed", "failed", "sealed"),
        "completed": (),
        "failed": (),
        "denied": (),
        "sealed": (),
    }
)
"""The states that a call may come to from each."""

_PAGE: Final = 100
_LONGEST: Final = 1_000  # calls of one batch


class CallStates:
    """What `ToolCalls` does to the state of a call. Each change is one batch, decided by the stored state."""

    _all: Collections
    _turns: Turns | OrderedTurns

    async def set_state(
        self, session_id: str | UUID, number: int, position: int, state: str, *, note: str | None = None
    ) -> ToolCall | None:
        """Bring a call to a state, in lower or upper case; return it, or None where there is no such call.

        ``started_at`` and ``completed_at`` are set with the states they belong to, and ``approval`` with
        those that are a decision.

        Args:
            note: kept with the entry in ``audit``.

        Raises:
            BadRequest: there is no such state.
            BadTransition: the call cannot come to it from where it is; the error names what it can.
            ParentGone: there is no such session.
        """
        return await self._moved(session_id, number, position, state_named(state), note)

    async def require_approval(
        self,
        session_id: str | UUID,
        number: int,
        position: int,
        *,
        note: str | None = None,
        meta: dict[str, Any] | None = None,
    ) -> ToolCall | None:
        """Let a call wait until somebody approves or denies it. As `set_state`."""
        return await self._moved(session_id, number, position, "approval_required", note, meta=meta)

    async def approve(
        self,
        session_id: str | UUID,
        number: int,
        position: int,
        *,
        by: str | None = None,
        note: str | None = None,
        meta: dict[str, Any] | None = None,
    ) -> ToolCall | None:
        """Let a call run: kept in ``approval`` with who decided, and when. Of two who decide, one gets the error.

        Raises:
            BadTransition: somebody has decided already, or it has run.
        """
        return await self._moved(session_id, number, position, "approved", note, by=by, meta=meta)

    async def deny(
        self,
        session_id: str | UUID,
        number: int,
        position: int,
        *,
        by: str | None = None,
        note: str | None = None,
        meta: dict[str, Any] | None = None,
    ) -> ToolCall | None:
        """Refuse a call. A tool message may still tell the model so; the call stays denied. As `approve`."""
        return await self._moved(session_id, number, position, "denied", note, by=by, meta=meta)

    async def start(
        self, session_id: str | UUID, number: int, position: int, *, note: str | None = None
    ) -> ToolCall | None:
        """Say that a call runs from now on: ``duration`` counts from here. As `set_state`."""
        return await self._moved(session_id, number, position, "executing", note)

    async def complete(
        self, session_id: str | UUID, number: int, position: int, result: Any = None, *, note: str | None = None
    ) -> ToolCall | None:
        """Keep the result of a call that no message answers (yet). As `set_state`.

        Raises:
            Unencodable: the result cannot be kept and given back alike.
        """
        return await self._moved(session_id, number, position, "completed", note, result=result)

    async def fail(
        self, session_id: str | UUID, number: int, position: int, error: str, *, note: str | None = None
    ) -> ToolCall | None:
        """Keep what went wrong with a call, in ``error``. As `set_state`."""
        return await self._moved(session_id, number, position, "failed", note, error=error)

    async def seal(
        self, session_id: str | UUID, number: int, position: int, *, note: str | None = None
    ) -> ToolCall | None:
        """End a call that nobody will go on with, such as one that a crash interrupted. As `set_state`."""
        return await self._moved(session_id, number, position, "sealed", note)

    async def pending_approvals(self, session_id: str | UUID | None = None) -> list[ToolCall]:
        """Return the calls that wait for approval, of one session or of all, the oldest first.

        They are found by the index of states: what it costs is what waits, in the whole namespace.
        """
        parent = None if session_id is None else str(session_id)
        found: list[ToolCall] = []
        cursor: str | None = None
        while True:
            page = await self._all.tool_calls.page(limit=_PAGE, after=cursor, state="approval_required")
            found += [call for call in page.items if parent is None or call.session_id == parent]
            if page.cursor is None:
                return sorted(found, key=lambda call: (call.created_at, call.session_id, call.number, call.position))
            cursor = page.cursor

    async def replace_all(self, session_id: str | UUID, calls: Iterable[ToolCall]) -> int:
        """Make a session's calls the given ones, by their places, writing only what differs.

        Places are ``(number, position)``; messages stay as they are, and the next one has a number above
        those of the calls. A result that stands in a message
        (``result_number``) is not stored again. Up to 1,000 changes are one batch.

        Returns:
            How many were deleted.

        Raises:
            BadRequest: an unknown state, a call of another session, a negative place.
            UniqueConflict: two of them have one place. Nothing was changed.
            ParentGone: there is no such session.
        """
        parent = str(session_id)
        given: dict[tuple[int, int], ToolCall] = {}
        for call in calls:
            ready = _checked(call, parent)
            place = ready.number, ready.position
            if place in given:
                raise UniqueConflict("place", f"{place[0]}, {place[1]}", parent)
            given[place] = ready
        await self._all.own()
        removed = 0
        while True:
            done: Rewritten = await self._turns.submit(parent, ReplaceCalls(given, _LONGEST))
            removed += done.removed
            if not done.again:
                return removed

    async def _moved(
        self,
        session_id: str | UUID,
        number: int,
        position: int,
        state: ToolCallState,
        note: str | None,
        **details: Any,
    ) -> ToolCall | None:
        def move(call: ToolCall, now: datetime) -> ToolCall:
            return _moved(call, state, now, note, **details)

        await self._all.own()
        return await self._turns.submit(str(session_id), EditCall(number, position, move))


def state_named(state: str) -> ToolCallState:
    """Return a state's name as it is stored.

    Raises:
        BadRequest: there is no such state.
    """
    wanted = state.lower() if isinstance(cast("Any", state), str) else ""
    for name in TRANSITIONS:
        if name == wanted:
            return name
    raise BadRequest(f"unknown state {state!r}: use one of {', '.join(TRANSITIONS)}")


def _moved(
    call: ToolCall,
    state: ToolCallState,
    now: datetime,
    note: str | None,
    *,
    by: str | None = None,
    meta: dict[str, Any] | None = None,
    result: Any = None,
    error: str | None = None,
) -> ToolCall:
    before = cast("ToolCallState", call.state)
    if state not in TRANSITIONS.get(before, ()):
        name = f"tool call {call.number}.{call.position} of session {call.session_id!r}"
        raise BadTransition(name, before, state, TRANSITIONS.get(before, ()))
    changes: dict[str, Any] = {
        "state": state,
        "updated_at": now,
        "audit": [*call.audit, AuditEntry(state, now, note)],
    }
    if state == "approval_required":
        changes["approval"] = Approval(note=note, meta=meta)
    elif state in ("approved", "denied"):
        asked = call.approval or Approval(required=before == "approval_required")
        changes["approval"] = msgspec.structs.replace(
            asked,
            decision="allow" if state == "approved" else "deny",
            decided_by=by,
            decided_at=now,
            note=asked.note if note is None else note,
            meta=asked.meta if meta is None else meta,
        )
    elif state == "executing":
        changes["started_at"] = now
    elif state in ("completed", "failed"):
        changes |= {"is_error": state == "failed", "result": result, "error": error, "completed_at": now}
    return msgspec.structs.replace(call, **changes)


def _checked(call: ToolCall, session_id: str) -> ToolCall:
    if not isinstance(cast("Any", call), ToolCall):
        raise BadRequest(f"a call is a kvpersist.ToolCall, not {type(call).__name__}")
    if call.session_id and call.session_id != session_id:
        raise BadRequest(f"the call belongs to session {call.session_id!r}, not {session_id!r}")
    if call.number < 0 or call.position < 0:
        raise BadRequest(f"a call's place is the number of a message and a position from 0, not {call.number}")
    times = {field: getattr(call, field) for field in ("created_at", "started_at", "updated_at", "completed_at")}
    return msgspec.structs.replace(
        call,
        session_id=session_id,
        state=state_named(call.state),
        result=None if call.result_number is not None else call.result,
        **{field: utc(at, field) for field, at in times.items() if at is not None},
    )
