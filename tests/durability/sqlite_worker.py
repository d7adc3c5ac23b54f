"""One of several processes on one SQLite store.

python sqlite_worker.py PATH increment ROUNDS     adds 1 to a counter, ROUNDS times, by compare-and-set
python sqlite_worker.py PATH write NAME [early]   writes until it is killed; prints each number it committed
                                                  (``early``, the planted bug: that it is about to commit)
"""

from __future__ import annotations

import asyncio
import os
import random
import sys

from kvpersist.driver import ABSENT, Batch, Committed, Put
from kvpersist.errors import Conflict
from kvpersist_drivers.sqlite import SqliteDriver, SqliteOptions


async def increment(driver: SqliteDriver, rounds: int) -> None:
    for _ in range(rounds):
        while True:
            [entry] = await driver.get(["n:count"])
            count, expect = (0, ABSENT) if entry is None else (int(entry.value), entry.version)
            [outcome] = await driver.commit([Batch((Put("n:count", b"%d" % (count + 1), expect),), os.urandom(8))])
            if isinstance(outcome, Committed):
                break
            assert isinstance(outcome, Conflict), outcome
            await asyncio.sleep(random.uniform(0, 0.01))


async def write(driver: SqliteDriver, name: str, early: bool) -> None:
    [found] = [await driver.scan(f"c:{name}:", f"c:{name};", limit=1, reverse=True)]
    number = int(found[0].key.rpartition(":")[2]) + 1 if found else 0
    while True:
        value = os.urandom(random.randrange(20, 2000))
        ops = (Put(f"c:{name}:{number:06}", value, ABSENT), Put(f"t:{name}:{number:06}", value, ABSENT))
        if early:
            os.write(1, b"%d\n" % number)
        [outcome] = await driver.commit([Batch(ops, os.urandom(8))])
        assert isinstance(outcome, Committed), outcome
        if not early:
            os.write(1, b"%d\n" % number)
        number += 1


async def main(path: str, task: str, *arguments: str) -> None:
    durability = "full" if task == "write" else "normal"
    driver = await SqliteDriver.open(SqliteOptions(path=path, durability=durability, busy_timeout=30.0))
    if task == "increment":
        await increment(driver, int(arguments[0]))
    else:
        await write(driver, arguments[0], "early" in arguments)
    await driver.close()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
