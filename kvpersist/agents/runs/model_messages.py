"""Messages in the form that the APIs of language models take."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Final, Literal, TypeAlias, cast

import msgspec

from kvpersist.agents.records import Message, ToolCallPart
from kvpersist.errors import BadOption

__all__ = ["STYLES", "Style", "model_messages", "system_text"]

Style: TypeAlias = Literal["openai", "anthropic"]

STYLES: Final = ("openai", "anthropic")

_Answered: TypeAlias = list[tuple[ToolCallPart, Message]]


def model_messages(messages: Sequence[Message], style: Style = "openai", *, tools: bool = True) -> list[dict[str, Any]]:
    """Return messages as a list of mappings with ``role`` and ``content``.

    Each answer stands right behind the message that asked for it. Calls that nothing answers and answers
    that nobody asked for are left out, since the APIs refuse them; what is then empty is left out, too.

    Args:
        style: ``"openai"``: calls in ``tool_calls``, their arguments as JSON text, answers with the role
            "tool". ``"anthropic"``: calls and answers are blocks of assistant and user; what the system
            says is not among the messages: see `system_text`.
        tools: False leaves calls and answers out.

    Raises:
        BadOption: another style.
    """
    if style not in STYLES:
        raise BadOption("style", f"{style!r} is unknown: use one of {', '.join(STYLES)}")
    answers = _answers(messages) if tools else {}
    made: list[dict[str, Any]] = []
    for at, message in enumerate(messages):
        if message.role == "tool":
            continue
        made += (_openai if style == "openai" else _anthropic)(message, answers.get(at, []))
    return made


def system_text(messages: Iterable[Message]) -> str | None:
    """Return what system and developer say, joined by empty lines; None where they say nothing."""
    said = [_text(each.content) for each in messages if each.role in ("system", "developer") and each.content]
    return "\n\n".join(said) or None


def _answers(messages: Sequence[Message]) -> dict[int, _Answered]:
    """The answered calls of each asking message: an answer joins the latest earlier open call of its id."""
    waiting: list[tuple[int, ToolCallPart]] = []
    found: dict[int, _Answered] = {}
    for at, message in enumerate(messages):
        waiting += [(at, part) for part in message.tool_calls or ()]
        if message.role == "tool":
            asked = next((each for each in reversed(waiting) if each[1].id == message.tool_call_id), None)
            if asked is not None:
                waiting.remove(asked)
                found.setdefault(asked[0], []).append((asked[1], message))
    return found


def _openai(message: Message, answered: _Answered) -> list[dict[str, Any]]:
    made: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.name is not None:
        made["name"] = message.name
    if answered:
        made["tool_calls"] = [
            {
                "id": part.id,
                "type": "function",
                "function": {"name": part.name, "arguments": _text({} if part.arguments is None else part.arguments)},
            }
            for part, _ in answered
        ]
    elif message.role == "assistant" and not message.content:
        return []
    return [
        made,
        *({"role": "tool", "tool_call_id": part.id, "content": _text(answer.content)} for part, answer in answered),
    ]


def _anthropic(message: Message, answered: _Answered) -> list[dict[str, Any]]:
    if message.role in ("system", "developer") or (not message.content and not answered):
        return []
    if not answered:
        return [{"role": message.role, "content": message.content}]
    blocks: list[Any] = []
    if isinstance(message.content, list):
        blocks += cast("list[Any]", message.content)
    elif message.content:
        blocks.append({"type": "text", "text": _text(message.content)})
    blocks += [
        {"type": "tool_use", "id": part.id, "name": part.name, "input": _object(part.arguments)} for part, _ in answered
    ]
    results: list[dict[str, Any]] = []
    for part, answer in answered:
        block = {"type": "tool_result", "tool_use_id": part.id, "content": _text(answer.content)}
        results.append(block | {"is_error": True} if answer.is_error else block)
    return [{"role": "assistant", "content": blocks}, {"role": "user", "content": results}]


def _text(value: Any) -> str:
    """A text as it is, anything else as JSON."""
    return value if isinstance(value, str) else msgspec.json.encode(value).decode()


def _object(arguments: Any) -> Any:
    """Arguments as an object; a text that is not JSON stands in one."""
    if not isinstance(arguments, str):
        return {} if arguments is None else arguments
    try:
        return msgspec.json.decode(arguments or "{}")
    except msgspec.DecodeError:
        return {"arguments": arguments}
