"""What can be written below a session, and the rules for it that hold on every backend."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from datetime import datetime
from typing import Any, Final, NamedTuple, cast

import msgspec

from kvpersist.agents.records import ROLES, AuditEntry, Message, Session, ToolCall, new_id, utc
from kvpersist.agents.stat import Draft
from kvpersist.codec import RecordCodec
from kvpersist.driver import Check, Entry
from kvpersist.errors import BadRequest

__all__ = [
    "FIXED",
    "Begin",
    "Edit",
    "EditCall",
    "EditSession",
    "Item",
    "Kill",
    "Remove",
    "Replace",
    "ReplaceCalls",
    "Rewritten",
    "Turn",
    "answered",
    "asked_call",
    "asked_of",
    "carried",
    "checked",
    "edited_call",
    "edited",
    "edited_session",
    "ended",
    "unanswered",
    "weight",
]

_ANSWERED: Final = "answered by a message"
_OPEN: Final = frozenset(("pending", "approval_required", "approved", "executing"))  # states an answer ends
_ALONE: Final = 1 << 20  # operations: such an item shares no round with others

FIXED: Final = ("id", "session_id", "number", "role", "tool_calls", "tool_call_id", "is_error")
"""Fields of a stored message that others rely on."""


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


class Begin:
    """A call that is made outside of messages. Answered with it; ``place``: its only one (atomic batches)."""

    __slots__ = ("call", "place")

    def __init__(self, call: ToolCall, place: tuple[int, int] | None = None) -> None:
        self.call, self.place = call, place


class EditCall:
    """Change one call. Answered with it, None if there is none."""

    __slots__ = ("fn", "number", "position")

    def __init__(self, number: int, position: int, fn: Callable[[ToolCall, datetime], ToolCall]) -> None:
        self.number, self.position, self.fn = number, position, fn


class Remove:
    """Remove messages, with the calls they asked for: the ``most`` newest behind a number, or those named.

    Answered with a `Rewritten`.
    """

    __slots__ = ("after", "most", "places")

    def __init__(self, *, after: int = 0, places: Sequence[tuple[int, str]] | None = None, most: int) -> None:
        self.after, self.places, self.most = after, places, most


class Replace:
    """Make a session's messages the given ones, which are checked already. Answered with a `Rewritten`.

    ``anonymous``: ids made just now, whose messages are known by their content; ``undated``: those
    whose time was made just now. ``make``, if there is one, makes the messages of those that are stored,
    and of their calls; then it is one batch, or none. ``since``: what others appended behind that number
    follows the messages, without atomic batches.
    """

    __slots__ = ("anonymous", "make", "messages", "most", "since", "undated")

    def __init__(
        self,
        messages: Sequence[Message],
        anonymous: AbstractSet[str],
        undated: AbstractSet[str],
        most: int,
        make: Callable[[Sequence[Message], Sequence[ToolCall]], Sequence[Message]] | None = None,
    ) -> None:
        self.messages, self.anonymous, self.undated, self.most = messages, anonymous, undated, most
        self.make = make
        self.since: int | None = None


class ReplaceCalls:
    """Make a session's calls the given ones, by their places. Answered with a `Rewritten`.

    ``at``: when they changed, where that is not now: the times of an import are the source's.
    """

    __slots__ = ("at", "calls", "most")

    def __init__(self, calls: dict[tuple[int, int], ToolCall], most: int, at: datetime | None = None) -> None:
        self.calls, self.most, self.at = calls, most, at


class Rewritten(NamedTuple):
    """What a round of rewriting did: how much was removed, what stands now, and whether another round is needed."""

    removed: int
    stands: Sequence[Message] = ()
    again: bool = False


class EditSession:
    """Change the session's own record. Answered with it."""

    __slots__ = ("fn",)

    def __init__(self, fn: Callable[[Session], Session]) -> None:
        self.fn = fn


class Kill:
    """Remove the session's birth key, record and stat, and leave the marker of a deletion to be finished.

    Answered with whether that was done: not where the session changed since ``before``, nor, if only
    ``closed`` ones are to go, where it is open.
    ``guard``: of the deletion that this one is part of; its Conflict is the answer where that is finished.
    """

    __slots__ = ("before", "closed", "guard")

    def __init__(self, guard: Check | None = None, *, before: datetime | None = None, closed: bool = False) -> None:
        self.guard, self.before, self.closed = guard, before, closed


Item = Turn | Edit | Remove | Replace | ReplaceCalls | Begin | EditCall | EditSession | Kill


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
    """The call once ``message`` answers it; the result stays in the message.

    An outcome that was set by hand stays as it is.
    """
    changes: dict[str, Any] = {"result_number": message.number}
    if call.state in _OPEN:
        changes["state"] = "failed" if message.is_error else "completed"
        changes["is_error"] = bool(message.is_error)
        changes["completed_at"] = message.created_at
    if call.audit:
        entry = AuditEntry(changes.get("state", call.state), cast("datetime", message.created_at), _ANSWERED)
        changes["audit"] = [*call.audit, entry]
        changes["updated_at"] = message.created_at
    return msgspec.structs.replace(call, **changes)


def asked_of(call: ToolCall) -> ToolCall:
    """The call as it was while it waited for the answer it has now."""
    if call.result_number is None:
        return call
    audit = call.audit[:-1] if call.audit and call.audit[-1].note == _ANSWERED else call.audit
    state = audit[-1].state if audit else "pending"
    changes: dict[str, Any] = {"state": state, "result_number": None, "audit": audit}
    if state in _OPEN:
        changes |= {"is_error": None, "completed_at": None}
    return msgspec.structs.replace(call, **changes)


def unanswered(call: ToolCall, now: datetime) -> ToolCall:
    """The call once its answer is gone."""
    before = asked_of(call)
    if not call.audit:
        return before
    entry = AuditEntry(before.state, now, "its answer was removed")
    return msgspec.structs.replace(before, audit=[*call.audit, entry], updated_at=now)


def carried(call: ToolCall, moved: ToolCall | None) -> ToolCall:
    """A new call with what is known of ``moved``, the same call of a message that stood elsewhere."""
    if moved is None or (moved.call_id, moved.name, moved.arguments) != (call.call_id, call.name, call.arguments):
        return call
    return msgspec.structs.replace(asked_of(moved), number=call.number, position=call.position)


def edited_call(item: EditCall, codec: RecordCodec[ToolCall], entry: Entry, now: datetime) -> ToolCall:
    """What ``item`` makes of a stored call.

    Raises:
        BadRequest: what its function raises.
        Unencodable: it cannot be kept and given back alike.
    """
    changed = item.fn(codec.decode(entry.key, entry.value), now)
    codec.encode(entry.key, changed)
    return changed


def ended(call: ToolCall, now: datetime, *, result: Any, is_error: bool) -> ToolCall:
    """The call once what was begun has ended."""
    state = "failed" if is_error else "completed"
    return msgspec.structs.replace(call, state=state, is_error=is_error, result=result, completed_at=now)


def edited(fn: Callable[[Message], Message], codec: RecordCodec[Message], entry: Entry) -> Message:
    """What ``fn`` makes of a stored message.

    Raises:
        BadRequest: it changed what others rely on.
    """
    before = codec.decode(entry.key, entry.value)
    changed: Any = fn(codec.decode(entry.key, entry.value))
    if not isinstance(changed, Message):
        raise BadRequest(f"the function returned {type(changed).__name__}, not the message")
    for field in FIXED:
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
