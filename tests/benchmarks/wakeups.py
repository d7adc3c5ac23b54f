"""From a commit in one process to the wake-up in another: ``wakeups.py [NAME=URL ...] [--rounds N]``.

One process puts, another waits, by a waker and by `Store.watch`; both read the system's monotonic clock.
Without arguments: sqlite, files, and redis and postgres where KVPERSIST_TEST_..._URL says where they are.
Printed are the median and the 95th percentile, of the time from before the put, and from after its answer.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import sys
import tempfile
import time
from pathlib import Path
from statistics import median, quantiles

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "drivers")]

import kvpersist  # noqa: E402

__all__ = ["main"]

_PREFIX = "wakeups:"


def main(arguments: list[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="wakeups", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("stores", nargs="*", metavar="NAME=URL")
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--write", nargs=2, metavar=("URL", "ROUNDS"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.write:
        asyncio.run(_write(options.write[0], int(options.write[1])))
        return 0
    print("| store | told by | median ms | p95 ms | after the answer: median ms |\n" + "|---" * 5 + "|")
    with tempfile.TemporaryDirectory(prefix="kvwake-") as folder:
        for name, url in [store.split("=", 1) for store in options.stores] or _stores(folder):
            for how in ("waker", "watch"):
                asyncio.run(_measured(name, url, how, options.rounds))
    return 0


def _stores(folder: str) -> list[list[str]]:
    servers = {name: os.environ.get(f"KVPERSIST_TEST_{name.upper()}_URL") for name in ("redis", "postgres")}
    return [
        ["sqlite", f"sqlite:///{folder}/kv.db"],
        ["files", f"file://{folder}/kv"],
        *([name, url] for name, url in servers.items() if url),
    ]


async def _measured(name: str, url: str, how: str, rounds: int) -> None:
    async with kvpersist.open_store(url) as store:
        await store.clear(_PREFIX)
        writer = await asyncio.create_subprocess_exec(
            sys.executable,
            __file__,
            *("--write", url, str(rounds)),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )
        assert writer.stdin is not None
        assert writer.stdout is not None
        waker = store._waker(_PREFIX)
        before, after = [], []
        async with store.watch(_PREFIX) as changes:
            await writer.stdout.readline()  # it is connected
            await waker.wait(1)
            for number in range(rounds):
                await asyncio.sleep(random.uniform(0.02, 0.06))
                writer.stdin.write(b"go\n")
                if how == "watch":
                    await anext(changes)
                else:
                    while await store.get(f"{_PREFIX}{number}") is None:
                        await waker.wait(10)
                woken = time.monotonic()
                began, answered = map(float, (await writer.stdout.readline()).split())
                before.append(woken - began)
                after.append(woken - answered)
                await waker.wait(0.02)
        await writer.communicate()
        await store.clear(_PREFIX)
    shown = " | ".join(f"{seconds * 1000:.2f}" for seconds in (median(before), quantiles(before, n=20)[-1]))
    print(f"| {name} | {how} | {shown} | {median(after) * 1000:.2f} |", flush=True)


async def _write(url: str, rounds: int) -> None:
    async with kvpersist.open_store(url) as store:
        await store.get(f"{_PREFIX}0")
        print("ready", flush=True)
        for number in range(rounds):
            await asyncio.to_thread(sys.stdin.readline)
            began = time.monotonic()
            await store.put(f"{_PREFIX}{number}", number)
            print(began, time.monotonic(), flush=True)


if __name__ == "__main__":
    sys.exit(main())
