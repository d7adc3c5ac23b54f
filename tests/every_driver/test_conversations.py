"""200 real conversations through every driver; the calling code is the same, only the place changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
from places import LONGEST, Place, Where

import kvpersist
from kvpersist.agents.persistence import Persistence
from kvpersist.agents.records import Message, Session, ToolCall
from kvpersist.ops.chat_import import import_chats

SOURCE = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "tau-airline-gpt4o.json"
TIMES = {"created_at", "updated_at", "completed_at"}  # of the import, so never the same twice

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
        expected, stats = await _everything(db), await db.stats()
    if source is SOURCE:
        assert (stats.sessions, stats.messages, stats.tool_calls, stats.tool_errors) == (200, 5308, 1164, 73)
    async with kvpersist.open(where, timeout=60) as db:
        await import_chats(db, source, user="ada")

        assert await _everything(db) == expected
        assert await db.stats() == stats
        assert len(await db.sessions.find(user_id="ada", limit=1000)) == stats.sessions
        assert len(await db.tool_calls.find(is_error=True, limit=1000)) == stats.tool_errors


def _timeless(record: Session | Message | ToolCall) -> dict[str, Any]:
    return {name: value for name, value in msgspec.structs.asdict(record).items() if name not in TIMES}


async def _everything(db: Persistence) -> dict[str, Any]:
    """The whole store by session id, without the times."""
    return {
        session.id: (
            _timeless(session),
            [_timeless(message) async for message in db.messages.iterate(session.id)],
            [_timeless(call) for call in await db.tool_calls.of(session.id)],
        )
        async for session in db.sessions.iterate()
    }
