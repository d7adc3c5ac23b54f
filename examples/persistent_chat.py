"""A chat that remembers: run it twice.

    python examples/persistent_chat.py                          # keeps chat.db in this folder
    python examples/persistent_chat.py redis://localhost:6379/0  # or any other store

The model is made up, so that nothing has to be installed beside kvpersist. Put a real one in the
place of `answer`: it gets the new message, and the earlier ones as its API takes them.
"""

from __future__ import annotations

import asyncio
import sys
from typing import Any

import kvpersist

THREAD = "tea with Ada"


async def answer(message: str, history: list[dict[str, Any]]) -> str:
    """Answer a message; what is known comes from the history alone."""
    said = [each["content"] for each in history if each["role"] == "user"]
    names = [text.removeprefix("My name is ").rstrip(".") for text in said if text.startswith("My name is ")]
    if message.startswith("My name is "):
        return "Nice to meet you."
    if message == "What is my name?":
        return f"You are {names[-1]}." if names else "I do not know yet."
    return f"You have said {len(said) + 1} things so far."


async def main(where: str) -> None:
    async with kvpersist.open(where) as db:
        thread = await db.threads.get_or_create(THREAD, user_id="ada", title="Tea with Ada")
        earlier = await db.messages.count(thread.id)
        print(f"{thread.title}: {earlier} messages so far")

        agent = kvpersist.with_storage(answer, db)
        say = ["What is my name?", "My name is Ada."] if earlier == 0 else ["What is my name?", "Thank you."]
        for message in say:
            print(f"  you:   {message}")
            print(f"  agent: {await agent.run(message, thread_id=thread.id, user_id='ada')}")

        print(f"Kept: {await db.messages.count(thread.id)} messages. Run it again: it goes on from here.")


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1] if len(sys.argv) > 1 else "sqlite:///chat.db"))
