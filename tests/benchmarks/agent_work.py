"""Messages and turns of an agent: as kvpersist takes them, and as an expert would keep them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple

import msgspec
from uuid_utils import uuid7
from work import cycled, new_text, numbers

from kvpersist.agents.records import Message, ToolCallPart

__all__ = [
    "RawCall",
    "RawMessage",
    "RawPart",
    "RawTurn",
    "new_messages",
    "new_raw_messages",
    "new_raw_turns",
    "new_turns",
    "raw_turn",
]

_encode = msgspec.msgpack.Encoder().encode


class RawPart(msgspec.Struct, frozen=True):
    """A tool call as an assistant's message carries it."""

    id: str
    name: str
    arguments: dict[str, Any]


class RawMessage(msgspec.Struct, kw_only=True, omit_defaults=True):
    """A message as an expert would keep it; its session and number are columns."""

    role: str
    content: str | None = None
    id: str = ""
    tool_calls: list[RawPart] | None = None
    tool_call_id: str | None = None
    created_at: datetime | None = None


class RawCall(msgspec.Struct, kw_only=True, omit_defaults=True):
    """A row of tool_calls; its place is in columns."""

    call_id: str
    name: str
    arguments: dict[str, Any]
    state: str = "pending"
    is_error: bool | None = None
    answered_by: int | None = None  # offset of the answering message in the turn
    created_at: datetime | None = None


class RawTurn(NamedTuple):
    session_id: str
    updated_at: int  # microseconds since 1970
    messages: list[tuple[str, bytes]]
    calls: list[tuple[int, int, RawCall, bytes]]  # offset of the message, position, call, its data


def raw_turn(session_id: str, messages: Sequence[RawMessage]) -> RawTurn:
    """Give ids and times, as kvpersist gives them, and encode."""
    now = datetime.now(UTC)
    rows: list[tuple[str, bytes]] = []
    waiting: dict[str, RawCall] = {}
    calls: list[tuple[int, int, RawCall]] = []
    for offset, message in enumerate(messages):
        message.id = str(uuid7())
        message.created_at = now
        rows.append((message.id, _encode(message)))
        for position, part in enumerate(message.tool_calls or ()):
            call = RawCall(call_id=part.id, name=part.name, arguments=part.arguments, created_at=now)
            waiting[part.id] = call
            calls.append((offset, position, call))
        if message.tool_call_id is not None and (asked := waiting.pop(message.tool_call_id, None)) is not None:
            asked.state, asked.is_error, asked.answered_by = "completed", False, offset
    return RawTurn(session_id, int(now.timestamp() * 1_000_000), rows, [(*call, _encode(call[2])) for call in calls])


def new_messages(sessions: Sequence[str], count: int) -> Callable[[], list[tuple[str, Message]]]:
    return lambda: [(id_, Message(role="user", content=new_text(30))) for id_ in cycled(sessions, count)]


def new_raw_messages(sessions: Sequence[str], count: int) -> Callable[[], list[tuple[str, RawMessage]]]:
    return lambda: [(id_, RawMessage(role="user", content=new_text(30))) for id_ in cycled(sessions, count)]


def new_turns(
    sessions: Sequence[str], count: int, answered: bool = True
) -> Callable[[], list[tuple[str, list[Message]]]]:
    """Turns of two messages and one call, which the second message answers, or nobody."""

    def turn() -> list[Message]:
        id_ = f"call-{next(numbers)}"
        part = ToolCallPart(id_, "search", {"query": new_text(5), "limit": 10})
        asks = Message(role="assistant", content=new_text(30), tool_calls=[part])
        if answered:
            return [asks, Message(role="tool", content=new_text(30), tool_call_id=id_)]
        return [Message(role="user", content=new_text(30)), asks]

    return lambda: [(id_, turn()) for id_ in cycled(sessions, count)]


def new_raw_turns(
    sessions: Sequence[str], count: int, answered: bool = True
) -> Callable[[], list[tuple[str, list[RawMessage]]]]:
    def turn() -> list[RawMessage]:
        id_ = f"call-{next(numbers)}"
        part = RawPart(id_, "search", {"query": new_text(5), "limit": 10})
        asks = RawMessage(role="assistant", content=new_text(30), tool_calls=[part])
        if answered:
            return [asks, RawMessage(role="tool", content=new_text(30), tool_call_id=id_)]
        return [RawMessage(role="user", content=new_text(30)), asks]

    return lambda: [(id_, turn()) for id_ in cycled(sessions, count)]
