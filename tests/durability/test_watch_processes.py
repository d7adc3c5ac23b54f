"""What one process writes, another is told of: by names, in order, also when the writer is killed."""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

import kvpersist
from kvpersist_drivers.filesystem._counter import Counter

_numbers = itertools.count()

WRITER = """
import asyncio, sys
import kvpersist

async def main(url, name, count):
    async with kvpersist.open_store(url, sweep=None) as store:
        for n in range(count):
            await store.put(f"w:{name}!{n:06}", n)
            await store.put(f"w:{name}", n)
            print(n, flush=True)

asyncio.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3])))
"""

WATCHER = """
import asyncio, sys
import kvpersist

async def main(url, last):
    async with kvpersist.open_store(url, sweep=None) as store:
        async with store.watch("w:", interval=0.05) as changes:
            print("watching", flush=True)
            async for change in changes:
                if change.missed or last in change.keys:
                    value = await store.get(last)
                    print(value, flush=True)
                    if value == "end":
                        return

asyncio.run(main(sys.argv[1], sys.argv[2]))
"""


@pytest.fixture(params=["sqlite", "files", "redis", "postgres"])
async def url(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[str]:
    urls = {
        "sqlite": f"sqlite:///{tmp_path}/kv.db?kv.durability=normal",
        "files": f"file://{tmp_path}/kv?kv.durability=normal",
    }
    found = urls.get(request.param)
    if found is None:
        where = request.getfixturevalue("service")(request.param)[f"KVPERSIST_TEST_{request.param.upper()}_URL"]
        name = f"w{time.time_ns():x}{next(_numbers)}"
        found = f"{where}?kv.{'table' if request.param == 'postgres' else 'base'}={name}"
    yield found
    async with kvpersist.open_store(found) as store:
        await store.clear("", raw=True)


def _started(code: str, *arguments: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(each for each in sys.path if each)},
        stdout=subprocess.PIPE,
        text=True,
    )


@pytest.mark.timeout(120)
async def test_every_key_that_other_processes_write_is_told(url: str) -> None:
    count, names = 100, ("a", "b", "c")
    told: dict[str, list[str]] = {name: [] for name in names}
    async with kvpersist.open_store(url, sweep=None) as store, store.watch("w:", buffer=10_000) as watch:
        writers = [_started(WRITER, url, name, count) for name in names]
        async with asyncio.timeout(100):
            while any(f"w:{name}!{count - 1:06}" not in keys for name, keys in told.items()):
                change = await anext(watch)
                assert not change.missed
                for key in change.keys:
                    name, _, number = key.removeprefix("w:").partition("!")
                    if number:
                        told[name].append(key)
        for writer in writers:
            await asyncio.to_thread(writer.communicate)
            assert writer.returncode == 0

    for name, keys in told.items():
        assert keys == [f"w:{name}!{number:06}" for number in range(count)]


@pytest.mark.timeout(120)
async def test_a_watcher_in_another_process_sees_the_last_value(url: str) -> None:
    async with kvpersist.open_store(url, sweep=None) as store:
        watcher = _started(WATCHER, url, "w:last")
        assert watcher.stdout is not None
        assert await asyncio.to_thread(watcher.stdout.readline) == "watching\n"
        for number in range(200):
            await store.put("w:last", number)
        await store.put("w:last", "end")

        seen, _ = await asyncio.to_thread(watcher.communicate)

    *values, last = [value for value in seen.split() if value != "None"]
    assert last == "end"
    assert [int(value) for value in values] == sorted(int(value) for value in values)


@pytest.mark.timeout(120)
async def test_what_a_killed_process_left_is_told(url: str) -> None:
    async with kvpersist.open_store(url, sweep=None) as store, store.watch("w:", buffer=10_000, collapse=0.01) as watch:
        for attempt in range(5):
            name = f"k{attempt}"
            writer = _started(WRITER, url, name, 100_000)
            assert writer.stdout is not None
            for _ in range(5 + 3 * attempt):
                await asyncio.to_thread(writer.stdout.readline)
            writer.send_signal(signal.SIGKILL)
            await asyncio.to_thread(writer.wait)
            await asyncio.to_thread(writer.stdout.close)
            there = {key async for key in store.keys(f"w:{name}")}

            told: set[str] = set()
            async with asyncio.timeout(20):
                while not there <= told:
                    told.update((await anext(watch)).keys)


async def test_a_writer_of_files_that_died_half_way_is_told_of(tmp_path: Path) -> None:
    url = f"file://{tmp_path}/kv"
    async with kvpersist.open_store(url, sweep=None) as store, store.watch("w:") as watch:
        await store.put("w:a", 1)
        async with asyncio.timeout(10):
            assert (await anext(watch)).keys == ("w:a",)
        dead = Counter(f"{tmp_path}/kv", writing=True)
        dead.begin()  # and it is told of before the change
        await asyncio.sleep(0.05)
        (tmp_path / "kv" / "w~d" / "a.json").unlink()
        dead.close()

        async with asyncio.timeout(10):
            assert (await anext(watch)).keys == ("w:a",)
