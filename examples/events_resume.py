"""A reader of events goes away, and goes on where it was: nothing is missed.

    python examples/events_resume.py                           # keeps events.db in this folder
    python examples/events_resume.py redis://localhost:6379/0   # or any other store

An agent publishes what it does; a browser, a worker or another program follows. The reader has a
name: it acknowledges what it has done, and its place is kept in the store.
"""

from __future__ import annotations

import asyncio
import sys

import kvpersist

TOPIC = "run-7"
READER = "browser"


async def follow(db: kvpersist.Persistence, until: str) -> None:
    """Read and acknowledge, up to an event."""
    async with db.events.subscribe(TOPIC, consumer=READER) as events:
        async for entry in events:
            print(f"  {READER} got {entry.event['step']}")
            await db.events.ack(READER, TOPIC, entry.position)
            if entry.event["step"] == until:
                return


async def main(where: str) -> None:
    if where.startswith("memory://"):
        sys.exit("a store in memory ends with the program: choose one that stays")
    async with kvpersist.open(where) as db:
        await db.events.publish_many(TOPIC, [{"step": "started"}, {"step": "thinking"}, {"step": "calling a tool"}])
        print("the reader follows")
        await follow(db, until="thinking")

    print("the connection is lost; the agent goes on")
    async with kvpersist.open(where) as db:
        await db.events.publish(TOPIC, {"step": "answering"})
        print(f"  {(await db.events.lag(READER, TOPIC)).events} events wait")

    print("the reader comes back")
    async with kvpersist.open(where) as db:
        reading = asyncio.create_task(follow(db, until="finished"))
        await db.events.publish(TOPIC, {"step": "finished"})
        await reading
        print(f"  {(await db.events.lag(READER, TOPIC)).events} events wait")


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1] if len(sys.argv) > 1 else "sqlite:///events.db"))
