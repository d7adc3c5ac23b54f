"""Parts of messages: every kind of the reference systems comes back as it was, in both codecs."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import pytest

import kvpersist
from kvpersist import Message

NOON = datetime(2025, 3, 1, 12, tzinfo=UTC)
PIXEL = bytes(range(256))

BLOCKS: list[dict[str, Any]] = [
    {"type": "text", "text": "h\u00e9llo \U0001f600\n\x00"},
    {"type": "text", "text": ""},
    {"type": "image_url", "image_url": {"url": "https://example.org/a.png", "detail": "low"}},
    {
        "type": "tool_use",
        "id": "toolu_1",
        "name": "search",
        "input": {"q": "tea", "n": 0, "deep": {"x": [None, False]}},
    },
    {"type": "tool_result", "tool_use_id": "toolu_1", "content": [{"type": "text", "text": "r"}], "is_error": False},
    {"type": "tool_result", "tool_use_id": "toolu_2", "content": "", "is_error": True},
    {"type": "reasoning", "reasoning": "because", "signature": b"\x00\xff"},
    {"type": "thinking", "thinking": "hm", "signature": None},
    {"type": "image", "url": "file:///a.png", "mime_type": "image/png"},
    {"type": "image", "file_id": "file-1", "meta": {"width": 1, "ratio": 1.5}},
    {"type": "image", "base64": "AAE=", "bytes": PIXEL},
    {"type": "audio", "base64": "AAE=", "mime_type": "audio/wav", "filename": "a.wav", "meta": {"seconds": 0.0}},
    {"type": "video", "url": "https://example.org/v.mp4", "mime_type": "video/mp4"},
    {"type": "file", "file_id": "file-2", "filename": "\u00fc.pdf", "mime_type": "application/pdf"},
    {"type": "file", "data": PIXEL, "made_at": NOON, "size": 2**70},
    {"type": "tool-call", "toolCallId": "c1", "toolName": "t", "input": {"a": -1}},
    {"type": "tool-result", "toolCallId": "c1", "toolName": "t", "output": {"type": "text", "value": "x"}},
    {
        "type": "tool-result",
        "toolCallId": "c1",
        "toolName": "t",
        "output": {"type": "json", "value": {"k": [0, False]}},
    },
    {"type": "tool-result", "toolCallId": "c1", "toolName": "t", "output": {"type": "error-text", "value": "no"}},
    {"type": "tool-result", "toolCallId": "c1", "toolName": "t", "output": {"type": "error-json", "value": None}},
    {"type": "tool-result", "toolCallId": "c1", "toolName": "t", "output": {"type": "execution-denied", "reason": "r"}},
    {"type": "tool-result", "toolCallId": "c1", "toolName": "t", "output": {"type": "content", "value": [PIXEL]}},
    {"$bytes": "no bytes", "type": "custom"},
]


@pytest.mark.parametrize("codec", ["msgpack", "json"])
async def test_every_kind_of_part_comes_back_as_it_was(codec: Literal["msgpack", "json"], tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/m.db?kv.durability=normal"
    async with kvpersist.open(url, codec=codec) as db:
        await db.sessions.create(id="s")
        await db.messages.append_many("s", [Message("user", [block]) for block in BLOCKS])
        await db.messages.append("s", Message("assistant", BLOCKS, metadata={"content_blocks": BLOCKS}))

    async with kvpersist.open(url, codec=codec) as db:
        *single, together = [message async for message in db.messages.iterate("s")]
        assert [repr(message.content) for message in single] == [repr([block]) for block in BLOCKS]
        assert repr(together.content) == repr(BLOCKS)
        assert together.metadata is not None and repr(together.metadata["content_blocks"]) == repr(BLOCKS)
        copy = await db.sessions.import_(await db.sessions.export("s"))
        [fork] = await db.sessions.fork("s")
        for id_ in (copy.id, fork.id):
            assert [repr(m.content) for m in await db.messages.range(id_)] == [
                *(repr(message.content) for message in single),
                repr(BLOCKS),
            ]
        stands = await db.messages.replace_all("s", [*single, together])
        assert [message.number for message in stands] == list(range(1, len(BLOCKS) + 2))
