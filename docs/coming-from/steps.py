"""What the scripts of this folder share: steps, each named after what the other system calls it.

A script is a list of steps. Each step gets the store and a conversation of its own, a fork of the first
one of a file of real conversations, and does with it what the named operations of the other system did.
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias
from uuid import uuid4

import kvpersist
import kvpersist.cli
from kvpersist import KvError, Persistence, Session
from kvpersist.ops.chat_import import import_chats

__all__ = ["main", "perform", "refused", "theirs"]

Step: TypeAlias = Callable[[Persistence, Session], Awaitable[None]]

DEMO = Path(kvpersist.cli.__file__).with_name("demo.json")
STEPS: list[tuple[tuple[str, ...], Step]] = []


def theirs(*names: str) -> Callable[[Step], Step]:
    """Say which operations of the other system a step does; steps are done in the order in which they stand."""

    def add(step: Step) -> Step:
        STEPS.append((names, step))
        return step

    return add


@contextmanager
def refused(error: type[KvError]) -> Iterator[None]:
    """Do what has to fail with this error."""
    try:
        yield
    except error:
        return
    raise AssertionError(f"this was not refused with {error.__name__}")


def main(system: str) -> None:
    """Read the arguments, and `perform`."""
    parser = argparse.ArgumentParser(description=f"What {system} did, done with kvpersist on real conversations.")
    parser.add_argument("url", nargs="?", default="memory://", help="the store; default: memory://")
    parser.add_argument("--data", default=DEMO, type=Path, help="a file of conversations; default: the demo's")
    given = parser.parse_args()
    asyncio.run(perform(system, given.url, given.data))


async def perform(system: str, where: Any, data: Path = DEMO) -> None:
    """Bring a file's conversations into the store, and do the steps."""
    async with kvpersist.open(where) as db:
        before = await db.stats()
        report = await import_chats(db, data)
        stats = await db.stats()
        assert (stats.sessions, stats.messages) == (
            before.sessions + report.sessions,
            before.messages + report.messages,
        )
        assert (await import_chats(db, data)).present == report.sessions + report.completed + report.present
        assert report.first is not None, f"{data} holds no conversation"
        print(f"conversations new here: {report.sessions}, messages: {report.messages}")
        done = 0
        for names, step in STEPS:
            [talk] = await db.sessions.fork(report.first, user_id=f"user-{uuid4()}", title=f"{system}: {names[0]}")
            await step(db, talk)
            print(f"  {' '.join(names)}")
            done += len(names)
        print(f"{done} operations of {system} were done")
