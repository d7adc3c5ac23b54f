"""A conversation moves to another store, and to another owner, by way of a JSON file.

    python examples/export_import.py                                   # from here.db to there.db
    python examples/export_import.py sqlite:///here.db redis://localhost  # between any two stores

Order, numbers, times, calls of tools and their results stay as they are.
"""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

import kvpersist
from kvpersist import Message, ToolCallPart

FILE = Path("conversation.json")


async def talk(where: str) -> str:
    """Keep a conversation; return its id."""
    async with kvpersist.open(where) as db:
        thread = await db.threads.create(title="Tea", user_id="ada")
        await db.messages.append_many(
            thread.id,
            [
                Message("user", "Is there tea?"),
                Message("assistant", None, tool_calls=[ToolCallPart("c1", "look", {"place": "cupboard"})]),
                Message("tool", ["green", "black"], tool_call_id="c1"),
                Message("assistant", "Green and black."),
            ],
        )
        return thread.id


async def write(where: str, thread_id: str) -> None:
    async with kvpersist.open(where) as db:
        data = await db.sessions.export(thread_id)
    FILE.write_text(json.dumps(data, indent=2, ensure_ascii=False), "utf-8")
    print(f"exported {len(data['messages'])} messages to {FILE}")


async def read(where: str, owner: str) -> None:
    async with kvpersist.open(where) as db:
        thread = await db.sessions.import_(json.loads(FILE.read_text("utf-8")), user_id=owner)
        print(f"imported {thread.title!r} for {thread.user_id}")
        for item in await db.timeline(thread.id):
            calls = "".join(f" {call.name}({call.arguments}) -> {call.result}" for call in item.tool_calls)
            print(f"  {item.number} {item.message.role}: {item.message.content or ''}{calls}")


async def main(here: str, there: str) -> None:
    await write(here, await talk(here))
    await read(there, owner="bob")


if __name__ == "__main__":
    given = dict(enumerate(sys.argv))
    asyncio.run(main(given.get(1, "sqlite:///here.db"), given.get(2, "sqlite:///there.db")))
