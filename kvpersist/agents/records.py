"""The agent's records. Times are aware datetimes in UTC; ids are UUIDv7 text unless given."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from functools import cache
from typing import Any, Final, Literal, TypeAlias, cast, get_args
from uuid import UUID

import msgspec

from kvpersist.errors import BadRequest

__all__ = [
    "ROLES",
    "TOOL_CALL_STATES",
    "Approval",
    "AuditEntry",
    "Message",
    "Role",
    "Session",
    "SessionStat",
    "Stats",
    "TimelineItem",
    "ToolCall",
    "ToolCallPart",
    "ToolCallState",
    "ToolStats",
    "id_text",
    "moment",
    "new_id",
    "utc",
]

Role: TypeAlias = Literal["system", "developer", "user", "assistant", "tool"]
ToolCallState: TypeAlias = Literal[
    "pending", "approval_required", "approved", "executing", "completed", "failed", "denied", "sealed"
]

ROLES: Final = frozenset(get_args(Role))
TOOL_CALL_STATES: Final = frozenset(get_args(ToolCallState))


class Session(msgspec.Struct, kw_only=True, omit_defaults=True):
    """A conversation, thread or agent run.

    ``updated_at`` moves with every change of the session and of what belongs to it; it is kept
    beside the record and filled in when a session is read. A fork has ``parent_id``, the session it
    was made from, ``forked_at``, the number of the last message it took from there, and ``lineage``,
    the ids of its ancestors, the oldest first.
    """

    id: str = ""
    user_id: str | None = None
    agent_id: str | None = None
    container_id: str | None = None
    image_id: str | None = None
    template_id: str | None = None
    parent_id: str | None = None
    forked_at: int | None = None
    lineage: list[str] = []
    title: str | None = None
    metadata: dict[str, Any] = {}
    active: bool = True
    external_id: str | None = None
    created_at: datetime | None = None
    updated_at: datetime | None = None


class ToolCallPart(msgspec.Struct, omit_defaults=True):
    """A call as the assistant's message asks for it; ``arguments`` are an object, or its text as received."""

    id: str = ""
    name: str = ""
    arguments: Any = None


class Message(msgspec.Struct, omit_defaults=True):
    """One message of a session: ``number`` is its place there, ``id`` its name in the whole store.

    ``tool_calls`` belongs to assistant messages; ``tool_call_id`` and ``is_error`` to tool messages,
    which answer the latest earlier unanswered call of that id. ``error`` of a user's message is what
    ended the turn it began; ``partial``: the answer was cut before its end.
    """

    role: str
    content: Any = None
    id: str = ""
    session_id: str = ""
    number: int = 0
    name: str | None = None
    tool_calls: list[ToolCallPart] | None = None
    tool_call_id: str | None = None
    is_error: bool | None = None
    agent_id: str | None = None
    user_id: str | None = None
    metadata: dict[str, Any] | None = None
    extra: dict[str, Any] | None = None
    created_at: datetime | None = None
    error: str | None = None
    partial: bool | None = None


class Approval(msgspec.Struct, kw_only=True, omit_defaults=True):
    """What a person decided about a call; ``decision`` is None while nobody did."""

    required: bool = True
    decision: Literal["allow", "deny"] | None = None
    decided_by: str | None = None
    decided_at: datetime | None = None
    note: str | None = None
    meta: dict[str, Any] | None = None


class AuditEntry(msgspec.Struct, omit_defaults=True):
    """A state that a call came to, and when."""

    state: str
    at: datetime
    note: str | None = None


class ToolCall(msgspec.Struct, kw_only=True, omit_defaults=True):
    """A call of a tool: (session, number of the asking message, position in it) is its identity.

    ``call_id`` may repeat, also inside one session. ``result`` of a call that a message answered
    is that message's content: it is stored once, there, and filled in when the call is read.
    """

    session_id: str
    number: int
    position: int
    call_id: str = ""
    name: str = ""
    arguments: Any = None
    state: str = "pending"
    is_error: bool | None = None
    result: Any = None
    result_number: int | None = None
    error: str | None = None
    approval: Approval | None = None
    audit: list[AuditEntry] = []
    metadata: dict[str, Any] | None = None
    created_at: datetime | None = None
    started_at: datetime | None = None
    updated_at: datetime | None = None
    completed_at: datetime | None = None

    @property
    def duration(self) -> float | None:
        """Seconds from start (or, where none is known, from the call) to result; None while there is none."""
        began = self.created_at if self.started_at is None else self.started_at
        if began is None or self.completed_at is None:
            return None
        return (self.completed_at - began).total_seconds()


class ToolStats(msgspec.Struct):
    """Counts of the calls of one tool, or of all."""

    calls: int = 0
    completed: int = 0
    failed: int = 0
    approval_required: int = 0
    approved: int = 0
    executing: int = 0
    denied: int = 0
    sealed: int = 0

    @property
    def pending(self) -> int:
        """Calls that nothing was decided or done about yet."""
        return self.calls - sum(getattr(self, state) for state in self.__struct_fields__[1:])

    def by_state(self) -> dict[str, int]:
        """How many calls are in each state, those without any left out."""
        counts = {"pending": self.pending} | {state: getattr(self, state) for state in self.__struct_fields__[1:]}
        return {state: count for state, count in counts.items() if count}


class SessionStat(msgspec.Struct, kw_only=True):
    """What is counted of one session, read without its messages.

    Attributes:
        last: number of the last message given out, deleted or not.
        messages: how many are alive; ``roles``: the same by role.
        tool_calls: how many calls there are; ``tools``: the same by name and outcome.
        updated_at: the last change of the session or of what belongs to it.
    """

    last: int
    messages: int
    tool_calls: int
    roles: dict[str, int]
    tools: dict[str, ToolStats]
    updated_at: datetime


class Stats(msgspec.Struct, kw_only=True):
    """Counts of a namespace, or of what belongs to an owner in it."""

    sessions: int = 0
    messages: int = 0
    tool_calls: int = 0
    messages_by_role: dict[str, int] = {}
    tool_calls_by_name: dict[str, int] = {}
    tool_calls_by_state: dict[str, int] = {}
    tool_errors: int = 0

    @property
    def messages_per_session(self) -> float | None:
        """The average; None without sessions."""
        return self.messages / self.sessions if self.sessions else None

    @property
    def tool_calls_per_session(self) -> float | None:
        """The average; None without sessions."""
        return self.tool_calls / self.sessions if self.sessions else None

    @property
    def success_rate(self) -> float | None:
        """Per cent of all calls that are completed; None without calls."""
        if not self.tool_calls:
            return None
        return 100 * self.tool_calls_by_state.get("completed", 0) / self.tool_calls


class TimelineItem(msgspec.Struct, kw_only=True):
    """A message with the calls it asked for; ``duration`` of each call stands in its ``duration``.

    ``answers`` is the call that a tool message answers, None for other messages and for answers
    whose call is unknown.
    """

    at: datetime
    number: int
    message: Message
    tool_calls: list[ToolCall] = []
    answers: ToolCall | None = None


def new_id() -> str:
    """Return a UUIDv7 as text: ids made later sort later."""
    return str(_uuid7()())


@cache
def _uuid7() -> Any:
    try:
        from uuid import uuid7  # type: ignore[attr-defined]  # 3.14 and later
    except ImportError:
        from uuid_utils import uuid7
    return cast("Any", uuid7)


_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)


def moment(seconds: float) -> datetime:
    """Return seconds since 1970 as a time in UTC, to the microsecond."""
    return _EPOCH + timedelta(microseconds=round(seconds * 1_000_000))


def utc(value: datetime, what: str) -> datetime:
    """Return a time in UTC.

    Raises:
        BadRequest: it has no zone.
    """
    if value.tzinfo is None:
        raise BadRequest(f"{what} has no time zone: use datetime.now(UTC)")
    return value if value.tzinfo is UTC else value.astimezone(UTC)


def id_text(value: str | UUID, what: str) -> str:
    """Return an id as text."""
    return value if type(value) is str else str(value)
