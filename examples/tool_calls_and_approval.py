"""A tool that must not run before somebody allows it, though the program ends in between.

    python examples/tool_calls_and_approval.py                          # keeps approvals.db in this folder
    python examples/tool_calls_and_approval.py mysql://root@localhost/db  # or any other store

The model is made up: it asks for a file to be deleted, and tells what came of it. The program is run
in three parts, each of which opens the store anew, as three programs would.
"""

from __future__ import annotations

import asyncio
import sys
from typing import Any

import kvpersist

FILES = {"notes.txt": "to do", "old.txt": "done"}


def model(messages: list[dict[str, Any]]) -> dict[str, Any]:
    """Answer the last message: with a call of a tool, or, behind its result, with a text."""
    last = messages[-1]
    if last["role"] == "tool":
        return {"content": f"The tool says: {last['content']}"}
    call = {"id": "call-1", "name": "delete_file", "arguments": {"path": "old.txt"}}
    return {"content": "I have to delete old.txt for that.", "tool_calls": [call]}


def delete_file(path: str) -> str:
    del FILES[path]
    return f"{path} is deleted"


async def ask(where: str) -> str:
    """The user says something, the agent wants to use a tool, and that has to be allowed first."""
    async with kvpersist.open(where) as db:
        thread = await db.threads.create(title="Clean up", user_id="ada")
        answer = await db.threads.send(thread.id, "Please clean up.", agent=model)
        print("agent:  ", answer["content"])
        for call in await db.tool_calls.of(thread.id):
            await db.tool_calls.require_approval(thread.id, call.number, call.position, note="it deletes a file")
            print("waiting:", call.name, call.arguments)
        return thread.id


async def decide(where: str, thread_id: str) -> None:
    """Later, elsewhere: somebody sees what waits, and allows it."""
    async with kvpersist.open(where) as db:
        for call in await db.tool_calls.pending_approvals(thread_id):
            print("boss:    may it", call.name, call.arguments, "- yes")
            await db.tool_calls.approve(thread_id, call.number, call.position, by="boss")


async def go_on(where: str, thread_id: str) -> None:
    """Later still: what was allowed runs, and the agent is told what came of it."""
    async with kvpersist.open(where) as db:
        for call in await db.tool_calls.of(thread_id):
            if call.state != "approved":
                continue
            await db.tool_calls.start(thread_id, call.number, call.position)
            result = {"role": "tool", "tool_call_id": call.call_id, "content": delete_file(**call.arguments)}
            answer = await db.threads.send(thread_id, result, agent=model)
            print("agent:  ", answer["content"])

        [call] = await db.tool_calls.of(thread_id)
        print("kept:   ", " -> ".join(entry.state for entry in call.audit))
        print("by:     ", call.approval.decided_by if call.approval else None)
        print("files:  ", list(FILES))


async def main(where: str) -> None:
    if where.startswith("memory://"):
        sys.exit("a store in memory ends with the program: choose one that stays")
    thread_id = await ask(where)
    print("-- the program ends, and is started again")
    await decide(where, thread_id)
    print("-- the program ends, and is started again")
    await go_on(where, thread_id)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1] if len(sys.argv) > 1 else "sqlite:///approvals.db"))
