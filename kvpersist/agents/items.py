"""What can be written below a session, and the rules for it that hold on every backend."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any, Final

import msgspec

from kvpersist.agents.records import ROLES, Message, Session, ToolCall, new_id, utc
from kvpersist.agents.stat import Draft
from kvpersist.codec import RecordCodec
from kvpersist.driver import Check, Entry
from kvpersist.errors import BadRequest

__all__ = [
    "Begin",
    "Edit",
    "EditSession",
    "End",
    "Item",
    "Kill",
    "RemoveMessage",
    "Turn",
    "answered",
    "asked_call",
    "checked",
    "edited",
    "edited_session",
    "ended",
    "unanswered",
    "weight",
]

_ALONE: Final = 1 << 20  # operations: such an item shares no round with others
_FIXED: Final = ("id", "session_id", "number", "role", "tool_calls", "tool_call_id", "is_error")


class Turn:
    """Messages to append, checked already. Answered with them as they are stored."""

    __slots__ = ("messages", "stored")

    def __init__(self, messages: Sequence[Message]) -> None:
        self.messages = messages
        self.stored: list[Message] = []  # without atomic batches: those that stand already


class Edit:
    """Change one message. Answered with it, None if there is none, or another (a session's id may be used again)."""

    __slots__ = ("fn", "id", "number")

    def __init__(self, number: int, id: str, fn: Callable[[Message], Message]) -> None:
        self.number, self.id, self.fn = number, id, fn


class RemoveMessage:
    """Remove one message and the calls it asked for. Answered with whether it was there."""

    __slots__ = ("id", "number")

    def __init__(self, number: int, id: str) -> None:
        self.number, self.id = number, id


class Begin:
    """A call that is made outside of messages. Answered with it; ``place``: its only one (atomic batches)."""

    __slots__ = ("call", "place")

    def __init__(self, call: ToolCall, place: tuple[int, int] | None = None) -> None:
        self.call, self.place = call, place


class End:
    """The end of a call that was begun. Answered with it, None if it is gone."""

    __slots__ = ("is_error", "number", "position", "result")

    def __init__(self, number: int, position: int, result: Any, is_error: bool) -> None:
        self.number, self.position, self.result, self.is_error = number, position, result, is_error


class EditSession:
    """Change the session's own record. Answered with it."""

    __slots__ = ("fn",)

    def __init__(self, fn: Callable[[Session], Session]) -> None:
        self.fn = fn


class Kill:
    """Remove the session's birth key, record and stat, and leave the marker of a deletion to be finished.

    ``guard``: of the deletion that this one is part of; its Conflict is the answer where that is finished.
    """

    __slots__ = ("guard",)

    def __init__(self, guard: Check | None = None) -> None:
        self.guard = guard


Item = Turn | Edit | RemoveMessage | Begin | End | EditSession | Kill


def asked_call(message: Message, position: int) -> ToolCall:
    """The record of a call that a message asks for."""
    part = (message.tool_calls or [])[position]
    return ToolCall(
        session_id=message.session_id,
        number=message.number,
        position=position,
        call_id=part.id,
        name=part.name,
        arguments=part.arguments,
        created_at=message.created_at,
    )


def answered(call: ToolCall, message: Message) -> ToolCall:
    """The call once ``message`` answers it; the result stays in the message."""
    return msgspec.structs.replace(
        call,
        state="failed" if message.is_error else "completed",
        is_error=bool(message.is_error),
        result_number=message.number,
        completed_at=message.created_at,
    )


def unanswered(call: ToolCall) -> ToolCall:
    """The call once its answer is gone."""
    return msgspec.structs.replace(call, state="pending", is_error=None, result_number=None, completed_at=None)


def ended(call: ToolCall, item: End, now: datetime) -> ToolCall:
    """The call once what was begun has ended."""
    state = "failed" if item.is_error else "completed"
    return msgspec.structs.replace(call, state=state, is_error=item.is_error, result=item.result, completed_at=now)


def edited(fn: Callable[[Message], Message], codec: RecordCodec[Message], entry: Entry) -> Message:
    """What ``fn`` makes of a stored message.

    Raises:
        BadRequest: it changed what others rely on.
    """
    before = codec.decode(entry.key, entry.value)
    changed: Any = fn(codec.decode(entry.key, entry.value))
    if not isinstance(changed, Message):
        raise BadRequest(f"the function returned {type(changed).__name__}, not the message")
    for field in _FIXED:
        if getattr(before, field) != getattr(changed, field):
            raise BadRequest(f"{field} of a stored message cannot change: delete it and append another")
    changed.created_at = before.created_at if changed.created_at is None else utc(changed.created_at, "created_at")
    return changed


def edited_session(
    fn: Callable[[Session], Session], codec: RecordCodec[Session], entry: Entry, draft: Draft, now: datetime
) -> Session:
    """What ``fn`` makes of a stored session; moves the draft's ``updated_at``, unless ``fn`` set it.

    Raises:
        BadRequest: it changed the id.
    """
    session = codec.decode(entry.key, entry.value)
    id_, created_at, session.updated_at = session.id, session.created_at, draft.updated_at
    changed: Any = fn(session)
    if not isinstance(changed, Session):
        raise BadRequest(f"the function returned {type(changed).__name__}, not the session")
    if changed.id != id_:
        raise BadRequest("the id of a stored session cannot change: create another")
    changed.created_at = created_at if changed.created_at is None else utc(changed.created_at, "created_at")
    if changed.updated_at is None or changed.updated_at == draft.updated_at:
        draft.touch(now)
    else:
        draft.updated_at = utc(changed.updated_at, "updated_at")
    return msgspec.structs.replace(changed, updated_at=draft.updated_at)


def checked(messages: Sequence[Message], session_id: str, now: datetime) -> list[Message]:
    """Return copies of new messages as they will be stored, but for their numbers.

    Raises:
        BadRequest: one is not a new message of this session, or at odds with itself.
    """
    ready: list[Message] = []
    for message in messages:
        if not isinstance(message, Message):
            raise BadRequest(f"a message is a kvpersist.Message, not {type(message).__name__}")
        if message.role not in ROLES:
            raise BadRequest(f"unknown role {message.role!r}: use one of {', '.join(sorted(ROLES))}")
        if message.session_id and message.session_id != session_id:
            raise BadRequest(f"the message belongs to session {message.session_id!r}, not {session_id!r}")
        if message.tool_calls and message.role != "assistant":
            raise BadRequest(f"tool_calls belong to an assistant message, not to one of role {message.role!r}")
        if message.tool_call_id is not None and message.role != "tool":
            raise BadRequest(f"tool_call_id belongs to a tool message, not to one of role {message.role!r}")
        at = message.created_at
        ready.append(
            msgspec.structs.replace(
                message,
                id=message.id or new_id(),
                session_id=session_id,
                created_at=now if at is None else utc(at, "created_at"),
            )
        )
    return ready


def weight(item: Item) -> int:
    """About how many operations an item becomes."""
    if type(item) is not Turn:
        return _ALONE
    return sum(4 + 5 * len(message.tool_calls or ()) for message in item.messages)
