"""A session as a file.

==========  ================================================================================
format      what is written
==========  ================================================================================
kvpersist   everything: imported again it is equal but for ids and, if one is named, the owner
openai      ``{"messages": [...]}``, the session's metadata beside them
jsonl       an OpenAI message per line; the session itself is left out
==========  ================================================================================

The last two are for other tools: they hold what an OpenAI message has a place for, and the keys
that an import kept in ``extra``; times, and calls that no message asked for, are left out.
"""

from __future__ import annotations

from bisect import bisect_right
from typing import Any, Literal, TypeAlias, cast, get_args

import msgspec

from kvpersist.agents.persistence import Persistence
from kvpersist.agents.records import Message, Session, ToolCall, ToolCallPart
from kvpersist.errors import BadOption
from kvpersist.ops.chat_formats import EXPORT_FORMAT, EXPORT_VERSION, to_json

__all__ = ["ExportFormat", "export_session"]

ExportFormat: TypeAlias = Literal["kvpersist", "openai", "jsonl"]


async def export_session(db: Persistence, session_id: str, format: ExportFormat = "kvpersist") -> bytes | None:
    """Return a session and its messages as a file's content; None where there is no such session.

    Two tasks may append meanwhile: what is returned is a prefix of the session, without a hole.

    Raises:
        BadOption: ``format`` is none of those.
    """
    if format not in get_args(ExportFormat):
        raise BadOption("format", f"{format!r} is none of {', '.join(get_args(ExportFormat))}")
    session = await db.sessions.get(session_id)
    if session is None:
        return None
    calls = await db.tool_calls.of(session_id)  # before the messages: none of a later one is among them
    messages = [message async for message in db.messages.iterate(session_id)]
    if format == "kvpersist":
        return _own(session, messages, calls)
    items = [_to_openai(message) for message in messages]
    if format == "jsonl":
        return b"".join(_encoded(item) + b"\n" for item in items)
    metadata = session.metadata
    # Metadata with a key that says what the file is would make it another file.
    beside = {"metadata": metadata} if {"messages", "traj", "format"} & metadata.keys() else metadata
    return _encoded({"messages": items, **beside}) + b"\n"


def _to_openai(message: Message) -> dict[str, Any]:
    """A message in OpenAI's form, with the unknown keys it was imported with."""
    extra = dict(message.extra or {})
    kept: Any = extra.pop("tool_calls", None) if message.tool_calls is not None else None
    unknown = cast("list[Any]", kept) if isinstance(kept, list) else []
    item: dict[str, Any] = {"role": message.role}
    if message.tool_call_id is not None:
        item["tool_call_id"] = message.tool_call_id
    if message.name is not None:
        item["name"] = message.name
    item["content"] = message.content
    if message.tool_calls is not None:
        item["tool_calls"] = [
            _call(part, unknown[n] if n < len(unknown) and isinstance(unknown[n], dict) else {})
            for n, part in enumerate(message.tool_calls)
        ]
    return extra | item


def _call(part: ToolCallPart, unknown: dict[str, Any]) -> dict[str, Any]:
    inner = unknown.get("function")
    function = {"name": part.name, "arguments": part.arguments}
    return {"id": part.id, "type": "function", **unknown, "function": function | (inner or {})}


def _own(session: Session, messages: list[Message], calls: list[ToolCall]) -> bytes:
    """One line for the head, one per message: a change of one message is a change of one line."""
    head = {"format": EXPORT_FORMAT, "version": EXPORT_VERSION, "session": to_json(session)}
    items = [_without(to_json(message), "session_id", "number") for message in messages]  # known by the place
    written = _encoded(head)[:-1] + b',"messages":[\n' + b",\n".join(map(_encoded, items))
    if recorded := _recorded(messages, calls):
        written += b'\n],"recorded_calls":[\n' + b",\n".join(map(_encoded, recorded))
    return written + b"\n]}\n"


def _recorded(messages: list[Message], calls: list[ToolCall]) -> list[dict[str, Any]]:
    """The calls that no message asks for; their numbers are places in the file."""
    asked = {message.number: len(message.tool_calls or ()) for message in messages}
    numbers = [message.number for message in messages]
    recorded: list[dict[str, Any]] = []
    for call in calls:
        if call.position < asked.get(call.number, 0):
            continue
        item = _without(to_json(call), "session_id", "position")
        item["number"] = bisect_right(numbers, call.number)
        if call.result_number is not None:  # the result stands in that message
            item["result_number"] = bisect_right(numbers, call.result_number)
            item.pop("result", None)
        recorded.append(item)
    return recorded


def _without(item: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in item.items() if name not in names}


def _encoded(value: Any) -> bytes:
    return msgspec.json.encode(value)
