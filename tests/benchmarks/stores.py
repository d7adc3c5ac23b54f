"""Measure what one call takes on each store, for the table of `docs/explanation/choosing-a-store.md`.

    tests/services/up all; .venv/bin/python tests/benchmarks/stores.py [NAME...]

Milliseconds, medians of a few dozen calls one after the other; distinct values of about 300 bytes. Backends
are as the tests start them, on this machine; the figures compare them with each other and with nothing else.
"""

from __future__ import annotations

import asyncio
import os
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "drivers"), str(ROOT / "tests" / "every_driver"), str(Path(__file__).parent)]

from places import PLACES  # noqa: E402
from servers import Missing, needed  # noqa: E402

import kvpersist  # noqa: E402
from kvpersist import Message, ToolCallPart  # noqa: E402

__all__ = ["main"]

_SLOW = {"mongo", "s3", "gcs", "azure"}


async def main(names: list[str]) -> None:
    """Print one row of the table for each store."""
    for place in PLACES:
        if names and place.name not in names:
            continue
        try:
            found = needed(place.service) if place.service else {}
        except Missing as error:
            print(f"| {place.name} | {error} |")
            continue
        found = {f"KVPERSIST_TEST_{name}": value for name, value in found.items()}
        with tempfile.TemporaryDirectory(prefix="kvbench-") as folder:
            where = {name: value for name, value in place.make(found, Path(folder)).items() if name != "durability"}
            cells = await _measured(where, 20 if place.name in _SLOW else 100, place.name in _SLOW)
        print(f"| {place.name} | {' | '.join(cells)} |", flush=True)


async def _measured(where: dict[str, Any], calls: int, slow: bool) -> list[str]:
    async with kvpersist.open(where, timeout=120) as db:
        store, stored = db.store, 200 if slow else 1000
        await store.put_many({f"app:{number:04}": _value() for number in range(stored)})
        put = await _each(calls, lambda number: store.put(f"app:{number:04}", _value()))
        together = await _each(5, lambda _: _at_once(store))
        get = await _each(calls, lambda number: store.get(f"app:{number:04}"))
        keys = [f"app:{number % stored:04}" for number in range(1000)]
        many = await _each(5, lambda _: store.get_many(keys))
        session = await db.sessions.create(user_id="ada")
        turn = await _each(calls // 2, lambda number: db.messages.append_many(session.id, _turn(number)))
        last = await _each(calls // 2, lambda _: db.messages.last(session.id, 50))
        return [store.capabilities.server, *(f"{value:.3g}" for value in (put, together / 64, get, many, turn, last))]


async def _at_once(store: Any) -> None:
    await asyncio.gather(*[store.put(f"app:{number:04}", _value()) for number in range(64)])


async def _each(calls: int, call: Callable[[int], Awaitable[Any]]) -> float:
    """The median of what a call takes, in milliseconds."""
    took: list[float] = []
    for number in range(calls):
        begun = time.perf_counter()
        await call(number)
        took.append((time.perf_counter() - begun) * 1000)
    return median(took)


def _value() -> dict[str, str]:
    return {"text": os.urandom(140).hex()}


def _turn(number: int) -> list[Message]:
    ask = Message(role="assistant", tool_calls=[ToolCallPart(f"c{number}", "track", {"parcel": number})])
    return [ask, Message(role="tool", tool_call_id=f"c{number}", content=os.urandom(60).hex())]


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1:]))
