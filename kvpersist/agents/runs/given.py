"""What is said to an agent, in any of the accepted forms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, TypeAlias, cast

from kvpersist.agents.records import Message
from kvpersist.agents.runs.answers import read_tool_call
from kvpersist.errors import BadRequest

__all__ = ["Given", "message_of", "read_messages"]

Given: TypeAlias = str | Message | Mapping[str, Any] | Sequence[Any]
"""What is said to an agent: a text, a `Message` or ``{"role", "content"}``, several of these, or a list of parts."""

_FIELDS: Final = frozenset(Message.__struct_fields__) - {"session_id", "number"}


def read_messages(given: Given) -> list[Message]:
    """Return what is said to an agent as messages, not yet checked for a session.

    Raises:
        BadRequest: it is nothing that can be said, or nothing at all.
    """
    if isinstance(given, str):
        return [Message(role="user", content=given)]
    if isinstance(given, Message):
        return [_said(given)]
    if isinstance(given, Mapping):
        return [_said(message_of(given))]
    items = list(given) if isinstance(given, list | tuple) else []
    if not items:
        raise BadRequest("say something: a text, parts, a Message, or a mapping with role and content")
    if all(isinstance(each, Message) or (isinstance(each, Mapping) and "role" in each) for each in items):
        return [message for each in items for message in read_messages(each)]
    return [Message(role="user", content=items)]


def message_of(given: Mapping[str, Any]) -> Message:
    """Return a message of these fields; the role is "user" by default, calls may be in any accepted form."""
    fields: dict[str, Any] = {"role": "user", **given}
    if unknown := fields.keys() - _FIELDS:
        known = ", ".join(each for each in Message.__struct_fields__ if each in _FIELDS)
        raise BadRequest(f"a message has no {', '.join(sorted(unknown))}; it has {known}")
    calls = fields.get("tool_calls")
    if calls is not None:
        fields["tool_calls"] = [read_tool_call(each) for each in cast("list[Any]", calls)]
    return Message(**fields)


def _said(message: Message) -> Message:
    if message.role == "assistant":
        raise BadRequest("an assistant's message is what an agent answers: append it by db.messages")
    return message
