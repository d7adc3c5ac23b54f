"""Takes locks again and again, and counts under each without looking whether others did: lease_worker.py URL PLAN.

PLAN is JSON: ``share``: how often; ``tasks``, ``locks``, ``ttl``; ``stops``: the part of all turns in which the
process stops itself between reading and writing; ``seed``; ``fence``: false leaves the fence out, a planted
mistake. At the end it prints what was acknowledged, as JSON.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import select
import signal
import sys
import time
from typing import Any

from kvpersist import Lease, LeaseLost, open_store
from kvpersist.driver import ABSENT
from kvpersist.errors import Conflict, KvError


async def main(url: str, plan: dict[str, Any]) -> None:
    chance = random.Random(plan["seed"])
    acknowledged: list[tuple[int, int, int]] = []  # lock, count, token
    left = plan["share"]
    refused = 0
    if not plan["fence"]:
        Lease._guard = lambda self: ()  # type: ignore[method-assign]

    async def turns() -> None:
        nonlocal left
        while left > 0:
            left -= 1
            try:
                await turn(chance.randrange(plan["locks"]))
            except KvError as error:
                if error.outcome != "none" or not error.retryable:
                    raise  # otherwise a file's lock was held by a stopped process for too long

    async def turn(lock: int) -> None:
        nonlocal refused
        lease = await store.lock(f"job{lock}", ttl=plan["ttl"], namespace="app").acquire()
        key = f"app:count{lock}"
        found = await store.get_versioned(key)
        number = 1 if found is None else found.value + 1
        if chance.random() < 0.3:
            await asyncio.sleep(chance.uniform(0, plan["ttl"] / 4))
        if chance.random() < plan["stops"]:
            os.kill(os.getpid(), signal.SIGSTOP)
        try:
            if alone:
                await lease.put(key, number, expect=ABSENT if found is None else found.version)
            elif chance.random() < 0.5:
                await lease.put(key, number)
            else:
                async with lease.atomic() as tx:
                    tx.put(key, number)
        except (LeaseLost, Conflict):
            refused += 1
        else:
            acknowledged.append((lock, number, lease.token))
        await lease.release()

    async with open_store(url) as store:
        # there an older holder may write once more before the newer one does, but never after it
        alone = store.capabilities.atomic_batch == "none"
        print("ready", flush=True)
        sys.stdin.readline()
        await asyncio.gather(*(turns() for _ in range(plan["tasks"])))
    print(json.dumps({"acknowledged": acknowledged, "refused": refused}), flush=True)


if "FAKETIME_TIMESTAMP_FILE" in os.environ:  # libfaketime moves the end of a sleep when it moves the clock
    time.sleep = lambda seconds: select.select([], [], [], seconds)
    sys.setswitchinterval(0.0002)  # under it a thread that waits for the interpreter waits for the whole interval
asyncio.run(main(sys.argv[1], json.loads(sys.argv[2])))
