"""Several processes on one store of files. `KVPERSIST_INCREMENTS` sets how often each process counts."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

from kvpersist_drivers.filesystem import FilesystemDriver, FilesystemOptions

_INCREMENTS = int(os.environ.get("KVPERSIST_INCREMENTS", "25"))
_PROCESSES = 8

_WORKER = """
import asyncio, os, random, sys
from kvpersist.driver import ABSENT, Batch, Committed, Put
from kvpersist_drivers.filesystem import FilesystemDriver, FilesystemOptions
async def main(path, rounds):
    driver = await FilesystemDriver.open(FilesystemOptions(path=path, durability="normal", busy_timeout=30.0))
    for _ in range(int(rounds)):
        while True:
            [entry] = await driver.get(["n:count"])
            count, expect = (0, ABSENT) if entry is None else (int(entry.value), entry.version)
            puts = (Put("n:count", b"%d" % (count + 1), expect), Put("m:twin", b"%d" % (count + 1)))
            [outcome] = await driver.commit([Batch(puts, os.urandom(8))])
            if isinstance(outcome, Committed):
                break
            await asyncio.sleep(random.uniform(0, 0.01))
    await driver.close()
asyncio.run(main(*sys.argv[1:]))
"""


async def test_increments_by_eight_processes_are_all_counted_and_batches_are_whole(tmp_path: Path) -> None:
    path = str(tmp_path / "kv")
    driver = await FilesystemDriver.open(FilesystemOptions(path=path, durability="normal", busy_timeout=30.0))
    workers = [
        await asyncio.create_subprocess_exec(sys.executable, "-c", _WORKER, path, str(_INCREMENTS))
        for _ in range(_PROCESSES)
    ]
    ends = asyncio.gather(*(worker.wait() for worker in workers))
    halves = 0
    while not ends.done():
        count, twin = await driver.get(["n:count", "m:twin"])
        halves += (count and count.value) != (twin and twin.value)
        await asyncio.sleep(0.001)
    [count] = await driver.get(["n:count"])
    await driver.close()

    assert await ends == [0] * _PROCESSES
    assert count is not None
    assert int(count.value) == _PROCESSES * _INCREMENTS
    assert halves == 0
