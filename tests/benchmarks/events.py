"""What publishing costs beside a plain put, and what retention takes: ``events.py publish|retention [NAME=URL ...]``.

``publish``: 64 tasks, each putting, publishing to one topic, or each to a topic of its own; in turns, so that what
else the machine does meets all of them. Printed are microseconds for each, and the medians of the ratios of a turn.

``retention --events 1000000``: a topic of so many events is swept down to 1,000 while somebody publishes to it;
printed are the seconds, the largest batch, what the process's memory grew by, and the longest publish meanwhile.

Without URLs: memory and sqlite, and redis and postgres where KVPERSIST_TEST_..._URL says where they are.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import resource
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from statistics import median
from typing import Any, Final
from uuid import uuid4

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "drivers")]

import kvpersist  # noqa: E402
from kvpersist import EventQueue, Store  # noqa: E402
from kvpersist.driver import Delete, Op  # noqa: E402

__all__ = ["main"]

_TASKS = 64
_EACH = 20  # calls of a task in a turn
_KEPT = 1_000  # events that retention leaves
_PUBLISHED: Final = ("store", "put us", "one topic us", "64 topics us", "one topic / put", "64 topics / put")
_SWEPT: Final = ("store", "events", "swept in s", "largest batch", "grew by MiB", "published meanwhile", "longest ms")
_EVENT: dict[str, Any] = {"kind": "progress", "run": "r-17", "text": "x" * 60, "n": 1}


def main(arguments: list[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="events", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("what", choices=("publish", "retention"))
    parser.add_argument("stores", nargs="*", metavar="NAME=URL")
    parser.add_argument("--turns", type=int, default=30)
    parser.add_argument("--events", type=int, default=1_000_000)
    options = parser.parse_intermixed_args(arguments)
    with tempfile.TemporaryDirectory(prefix="kvevents-") as folder:
        stores = [store.split("=", 1) for store in options.stores] or _stores(folder)
        head, run, size = (
            (_PUBLISHED, _published, options.turns) if options.what == "publish" else (_SWEPT, _swept, options.events)
        )
        print(f"| {' | '.join(head)} |\n" + "|---" * len(head) + "|")
        for name, url in stores:
            asyncio.run(run(name, url, size))
    return 0


def _stores(folder: str) -> list[list[str]]:
    servers = {name: os.environ.get(f"KVPERSIST_TEST_{name.upper()}_URL") for name in ("redis", "postgres")}
    return [
        ["memory", "memory://"],
        ["sqlite", f"sqlite:///{folder}/kv.db"],
        *([name, url] for name, url in servers.items() if url),
    ]


async def _published(name: str, url: str, turns: int) -> None:
    async with kvpersist.open_store(url) as store, _queue(store) as queue:
        space = queue.namespace
        sides: list[Callable[[int, int], Awaitable[object]]] = [
            lambda task, n: store.put(f"{space}-plain:{task}-{n}", _EVENT),
            lambda task, n: queue.publish("one", _EVENT),
            lambda task, n: queue.publish(f"topic{task}", _EVENT),
        ]
        took: list[list[float]] = [[], [], []]
        for turn in range(turns + 3):
            order = [(turn + at) % 3 for at in range(3)]
            for at in order:
                seconds = await _turn(sides[at], turn)
                if turn >= 3:  # before that nothing is warm
                    took[at].append(seconds)
        for prefix in (f"{space}:", f"{space}-plain:"):
            await store.clear(prefix, raw=True)
    figures = [f"{median(each) / _TASKS / _EACH * 1e6:.1f}" for each in took]
    ratios = [f"{median(a / b for a, b in zip(each, took[0], strict=True)):.2f}" for each in took[1:]]
    print(f"| {name} | {' | '.join([*figures, *ratios])} |", flush=True)


async def _turn(call: Callable[[int, int], Awaitable[object]], turn: int) -> float:
    async def one(task: int) -> None:
        for n in range(turn * _EACH, (turn + 1) * _EACH):
            await call(task, n)

    began = time.perf_counter()
    await asyncio.gather(*(one(task) for task in range(_TASKS)))
    return time.perf_counter() - began


async def _swept(name: str, url: str, events: int) -> None:
    async with kvpersist.open_store(url, timeout=60.0) as store, _queue(store, max_events=_KEPT) as queue:
        for _ in range(0, events, 500):
            await queue.publish_many("t", [_EVENT] * 500)
        largest, longest, during = 0, 0.0, 0
        real = store._commit

        async def commit(ops: list[Op]) -> bytes:
            nonlocal largest
            largest = max(largest, sum(type(op) is Delete for op in ops))
            return await real(ops)

        store._commit = commit  # type: ignore[method-assign,assignment]
        before = _resident()
        began = time.perf_counter()
        sweeping = asyncio.create_task(queue.sweep())
        peak = before
        while not sweeping.done():
            asked = time.perf_counter()
            await queue.publish("t", _EVENT)
            longest, during = max(longest, time.perf_counter() - asked), during + 1
            peak = max(peak, _resident())
            await asyncio.sleep(0)  # in memory nothing else lets the sweep go on
        removed = await sweeping
        seconds = time.perf_counter() - began
        stored = -(-events // 500) * 500
        assert removed >= stored - _KEPT, removed  # more where something was published before it looked
        assert (await queue.stats("t")).count == stored + during - removed
        await store.clear(f"{queue.namespace}:", raw=True)
    grew = f"{(peak - before) / 2**20:.1f}"
    figures = [f"{stored:,}", f"{seconds:.1f}", str(largest), grew, f"{during:,}", f"{longest * 1000:.0f}"]
    print(f"| {name} | {' | '.join(figures)} |", flush=True)


def _queue(store: Store, **options: Any) -> EventQueue:
    return EventQueue(store, namespace=f"bench-{uuid4().hex[:8]}", retention=None, cleanup_interval=0, **options)


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


if __name__ == "__main__":
    sys.exit(main())
