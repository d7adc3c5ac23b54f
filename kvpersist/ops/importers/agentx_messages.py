"""A message of AgentX, in any of the forms it has had, as a message of ours."""

from __future__ import annotations

from typing import Any, Final

from kvpersist.agents.records import Message, ToolCallPart
from kvpersist.ops.importers.plan import Bad, list_or_none, moment_of, object_or_none, text_or_none

__all__ = ["message_of"]

_ROLES: Final = {
    "user": "user",
    "assistant": "assistant",
    "tool_call": "assistant",
    "tool_result": "tool",
    "error": "assistant",
    "system": "system",
    "tool": "tool",
}
_OWN: Final = ("id", "content", "timestamp")
_ERRORS: Final = ("error-text", "error-json", "execution-denied")
_CALL_ID: Final = ("toolCallId", "tool_call_id", "tool_use_id", "id")


def message_of(raw: dict[str, Any]) -> Message:
    """Content and time stay equal; ``subtype`` and what has no field of ours are kept in ``extra``.

    Raises:
        Bad: neither subtype nor role is known, or id or time is none.
    """
    subtype = raw.get("subtype")
    kind = (subtype if isinstance(subtype, str) else str(raw.get("role"))).replace("-", "_")
    role = _ROLES.get(kind) or _ROLES.get(str(raw.get("role")))
    if role is None:
        raise Bad(f"unknown subtype {subtype!r}" if subtype is not None else f"unknown role {raw.get('role')!r}")
    message = Message(
        role=role,
        id=text_or_none(raw.get("id"), "id") or "",
        content=raw.get("content"),
        extra={name: value for name, value in raw.items() if name not in _OWN} or None,
        created_at=moment_of(raw.get("timestamp"), "timestamp"),
    )
    if role == "assistant":
        message.tool_calls = _calls(raw, kind) or None
    elif role == "tool":
        message.tool_call_id, message.is_error = _answer(raw)
    return message


def _calls(raw: dict[str, Any], kind: str) -> list[ToolCallPart]:
    calls: list[ToolCallPart] = []
    for index, part in enumerate([raw.get("toolCall"), *_parts(raw)]):
        call = object_or_none(part)
        if call is None or (index and kind != "tool_call" and call.get("type") not in ("tool-call", "tool_call")):
            continue
        if (function := object_or_none(call.get("function"))) is not None:
            call = {**function, "id": call.get("id")}
        name = call.get("name", call.get("toolName"))
        if isinstance(name, str):
            id_ = call.get("id", call.get("toolCallId"))
            arguments = next((call[field] for field in ("input", "arguments", "args") if field in call), None)
            calls.append(ToolCallPart(id="" if id_ is None else str(id_), name=name, arguments=arguments))
    return calls


def _answer(raw: dict[str, Any]) -> tuple[str | None, bool | None]:
    """Which call a result answers, and whether it is an error; None where it does not say."""
    call_id: Any = raw.get("toolCallId") or raw.get("tool_call_id")
    failed: bool | None = None
    for part in map(object_or_none, (raw, raw.get("toolResult"), *_parts(raw))):
        if part is None:
            continue
        if part is not raw:
            call_id = call_id or next((part[field] for field in _CALL_ID if part.get(field)), None)
        kind = (object_or_none(part.get("output")) or {}).get("type")
        if isinstance(kind, str):
            failed = bool(failed) or kind in _ERRORS
        elif isinstance(told := part.get("isError", part.get("is_error")), bool):
            failed = bool(failed) or told
    return (str(call_id) if call_id else None), failed


def _parts(raw: dict[str, Any]) -> list[Any]:
    content = raw.get("content")
    return list_or_none(content) or [content]
