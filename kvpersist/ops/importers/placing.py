"""Messages on their way into a session: what they may be, what tells them apart, how many go in at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import msgspec
from msgspec import Struct

from kvpersist.agents.records import Message
from kvpersist.ops.chat_formats import to_json

__all__ = ["Placed", "allowed", "content_of", "fitting"]

_BATCH_BYTES: Final = 1 << 20  # of the messages' JSON


class Placed(Struct):
    """A message as it will be stored: which one of the source it is, its size in bytes, and what it is known by."""

    message: Message
    index: int
    size: int
    digest: bytes


def allowed(message: Message) -> Message:
    """The message as our rules allow it: what has no place in a role's messages is kept in ``extra``."""
    moved: dict[str, Any] = {}
    if message.tool_calls and message.role != "assistant":
        moved["tool_calls"] = [msgspec.to_builtins(call) for call in message.tool_calls]
        message.tool_calls = None
    if message.tool_call_id is not None and message.role != "tool":
        moved["tool_call_id"], message.tool_call_id = message.tool_call_id, None
    if moved:
        message.extra = {**(message.extra or {}), **moved}
    return message


def content_of(message: Message, resaved: bool) -> bytes:
    """What two messages have in common where one is the other, imported: all but the place, and a changed id.

    Raises:
        Unencodable: it cannot be stored.
    """
    extra = dict(message.extra or {})
    foreign = extra.pop("external_id", message.id)
    loose: dict[str, Any] = {"id": "", "created_at": None} if resaved else {"id": foreign}
    common = msgspec.structs.replace(message, session_id="", number=0, extra=extra or None, **loose)
    return msgspec.json.encode(to_json(common), order="sorted")


def fitting(messages: Sequence[Placed], start: int, most: int) -> list[Message]:
    """The next messages that go in as one batch: at least one."""
    size = 0
    batch: list[Message] = []
    for placed in messages[start : start + most]:
        size += placed.size
        if batch and size > _BATCH_BYTES:
            break
        batch.append(placed.message)
    return batch
