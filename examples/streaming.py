"""An answer that comes in pieces: shown as it comes, kept when it is whole, and kept as far as it came.

    python examples/streaming.py                           # in memory
    python examples/streaming.py postgresql://localhost/db  # or any other store

The model is made up. Each piece it gives goes on to the reader unchanged; the turn is stored once
the last one was given, or once the reader has left.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from typing import Any

import kvpersist


async def model(message: str, history: list[dict[str, Any]]) -> AsyncIterator[dict[str, Any]]:
    """Give an answer word by word, and ask a tool on the way."""
    for word in ("Let", " me", " look."):
        yield {"type": "content", "delta": word}
    yield {"type": "tool_call", "id": f"look-{len(history)}", "name": "look", "arguments": {"for": message}}
    yield {"type": "tool_result", "tool_call_id": f"look-{len(history)}", "result": ["green", "black"]}
    for word in ("There", " is", " green", " and", " black", " tea."):
        yield {"type": "content", "delta": word}


async def main(where: str) -> None:
    async with kvpersist.open(where) as db:
        agent = kvpersist.with_storage(model, db)
        thread = await db.threads.create(title="Tea")

        print("A whole answer:")
        async for chunk in agent.stream("Is there tea?", thread_id=thread.id):
            print("  ", chunk.get("delta") or chunk["type"])

        print("The reader leaves in the middle of the next one:")
        async with agent.stream("And coffee?", thread_id=thread.id) as stream:
            async for chunk in stream:
                print("  ", chunk.get("delta") or chunk["type"])
                if chunk.get("delta") == " me":
                    break

        print("What is kept:")
        for message in await db.threads.history(thread.id):
            asked = "".join(f" calls {call.name}" for call in message.tool_calls or ())
            marks = f" [{message.error}]" if message.error else " [partial]" if message.partial else ""
            print(f"   {message.number} {message.role}: {message.content}{asked}{marks}")
        await db.threads.delete(thread.id)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1] if len(sys.argv) > 1 else "memory://"))
