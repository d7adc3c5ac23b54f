"""Writes a golden store of the present format: ``python tests/data/formats/make.py format-N.db``.

Run once per released format, by that release; the file is then kept for good. `what_is_in_it` is what
every later version must find in it.
"""

from __future__ import annotations

import asyncio
import sys
from datetime import UTC, datetime
from typing import Any

import msgspec

import kvpersist
from kvpersist import Index, Log, Message, Repository, ToolCallPart

NOON = datetime(2026, 11, 21, 12, 0, 0, 250_000, tzinfo=UTC)
VALUES: dict[str, Any] = {
    "app:bytes": b"\x00\xff",
    "app:list": [None, True, 2**70, -1.5, "\u00e9\U0001f600", {"$bytes": "not bytes"}],
    "app:time": NOON,
}


class Note(msgspec.Struct):
    """An item of a log."""

    text: str


class Part(msgspec.Struct, kw_only=True):
    """A record with an index of every kind."""

    id: str
    maker: str
    serial: str
    tags: list[str]
    price: float
    meta: dict[str, Any]


PARTS = [
    Part(id="a/1", maker="x", serial="s1", tags=["red", "new"], price=2.5, meta={"rank": 1}),
    Part(id="b!2%", maker="x", serial="s2", tags=["red"], price=-1.0, meta={"rank": 2.5}),
    Part(id="c", maker="y", serial="long " * 60, tags=[], price=0.0, meta={}),
]
INDEXES = [
    Index("maker", order_by="-price"),
    Index("serial", unique=True),
    Index("tags", multi=True),
    Index("meta.rank", type=float),
]
TURN = [
    Message(role="user", content="Where is parcel 7?", created_at=NOON),
    Message(role="assistant", tool_calls=[ToolCallPart("c1", "track", {"parcel": 7})], created_at=NOON),
    Message(role="tool", tool_call_id="c1", content="in Oslo", created_at=NOON),
    Message(role="assistant", content=[{"type": "text", "text": "In Oslo."}], metadata={"at": NOON}, created_at=NOON),
]


async def write(url: str) -> None:
    """Write everything."""
    async with kvpersist.open(url) as db:
        await db.store.put_many(VALUES)
        await db.store.put_raw("app:raw", b"raw")
        await db.sessions.create(id="s1", user_id="ada", title="Late parcel", metadata={"n": 1}, created_at=NOON)
        await db.messages.append_many("s1", TURN)
        await db.sessions.create(id="gone", user_id="ada", created_at=NOON)
        await db.sessions.delete("gone")
        for codec in ("msgpack", "json"):
            parts = Repository(db.store, Part, name=f"part-{codec}", indexes=INDEXES, codec=codec)
            await parts.put_many(PARTS)
        log = Log(db.store, Note, name="log")
        await log.append_many("p", [Note("one"), Note("two"), Note("three")])
        await log.delete("p", 3)


if __name__ == "__main__":
    asyncio.run(write(f"sqlite:///{sys.argv[1]}"))
