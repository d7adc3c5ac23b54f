"""200 real conversations through every driver; the calling code is the same, only the place changes."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from conversations import SOURCE, everything
from places import LONGEST, Place, Where

import kvpersist
from kvpersist.ops.chat_import import import_chats

pytestmark = [
    pytest.mark.skipif(not SOURCE.exists(), reason="the conversations do not lie in ../shared/data"),
    pytest.mark.timeout(LONGEST),
]


@pytest.fixture
def source(place: Place, tmp_path: Path) -> Path:
    """The conversations, or the first of them for a slow emulator."""
    if place.conversations >= 200:
        return SOURCE
    fewer = tmp_path / "fewer.json"
    fewer.write_bytes(msgspec.json.encode(msgspec.json.decode(SOURCE.read_bytes())[: place.conversations]))
    return fewer


async def test_real_conversations_come_back_equal(where: Where, source: Path) -> None:
    async with kvpersist.open("memory://") as db:
        await import_chats(db, source, user="ada")
        expected, stats = await everything(db), await db.stats()
    if source is SOURCE:
        assert (stats.sessions, stats.messages, stats.tool_calls, stats.tool_errors) == (200, 5308, 1164, 73)
    async with kvpersist.open(where, timeout=60) as db:
        await import_chats(db, source, user="ada")

        assert await everything(db) == expected
        assert await db.stats() == stats
        assert len(await db.sessions.find(user_id="ada", limit=1000)) == stats.sessions
        assert len(await db.tool_calls.find(is_error=True, limit=1000)) == stats.tool_errors
