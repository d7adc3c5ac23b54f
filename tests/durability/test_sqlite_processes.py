"""Several processes on one SQLite store, and processes that are killed at random.

`KVPERSIST_KILLS` sets how many are killed, `KVPERSIST_INCREMENTS` how often each process counts.
"""

from __future__ import annotations

import asyncio
import os
import random
import sqlite3
import subprocess
import sys
from pathlib import Path

from kvpersist.driver import Batch, Committed, Put
from kvpersist_drivers.sqlite import SqliteDriver, SqliteOptions

_WORKER = Path(__file__).with_name("sqlite_worker.py")
_KILLS = int(os.environ.get("KVPERSIST_KILLS", "24"))
_INCREMENTS = int(os.environ.get("KVPERSIST_INCREMENTS", "40"))
_PROCESSES = 8


def _start(path: Path, *arguments: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, _WORKER, path, *arguments], stdout=subprocess.PIPE)


def _integrity(path: Path) -> list[tuple[str]]:
    connection = sqlite3.connect(path)
    try:
        return connection.execute("PRAGMA integrity_check").fetchall()
    finally:
        connection.close()


async def test_increments_by_eight_processes_are_all_counted_while_the_store_is_copied(tmp_path: Path) -> None:
    path = tmp_path / "kv.db"
    driver = await SqliteDriver.open(SqliteOptions(path=str(path), durability="normal", busy_timeout=30.0))
    workers = [
        await asyncio.create_subprocess_exec(sys.executable, _WORKER, path, "increment", str(_INCREMENTS))
        for _ in range(_PROCESSES)
    ]
    ends = asyncio.gather(*(worker.wait() for worker in workers))
    copies = 0
    while not ends.done():
        await driver.backup(str(tmp_path / f"copy{copies}.db"))
        await driver.compact()
        await driver._writes.run(lambda: driver._writer.tend(True), settle=True)
        assert _integrity(tmp_path / f"copy{copies}.db") == [("ok",)]
        (tmp_path / f"copy{copies}.db").unlink()
        copies += 1

    [entry] = await driver.get(["n:count"])
    await driver.close()

    assert await ends == [0] * _PROCESSES
    assert entry is not None
    assert int(entry.value) == _PROCESSES * _INCREMENTS
    assert copies > 0
    assert _integrity(path) == [("ok",)]


def _killed(path: Path, kills: int, seed: int, *more: str) -> dict[str, int]:
    """Let four processes write, kill one after another at random and replace it.

    Returns:
        The last number that was acknowledged, by name; each process has the name of the one it replaces.
    """
    chance = random.Random(seed)
    names = ["a", "b", "c", "d"]
    workers = {name: _start(path, "write", name, *more) for name in names}
    acknowledged: dict[str, int] = {}
    for _ in range(kills):
        name = chance.choice(names)
        worker = workers[name]
        assert worker.stdout is not None
        for _ in range(chance.randrange(1, 8)):  # it is under way
            line = worker.stdout.readline()
            assert line, "a worker ended by itself"
            acknowledged[name] = int(line)
        acknowledged.update(_kill(name, worker))
        workers[name] = _start(path, "write", name, *more)
    for name, worker in workers.items():
        acknowledged.update(_kill(name, worker))
    return acknowledged


def _kill(name: str, worker: subprocess.Popen[bytes]) -> dict[str, int]:
    worker.kill()
    rest, _ = worker.communicate()
    whole = rest[: rest.rfind(b"\n") + 1].split()
    return {name: int(whole[-1])} if whole else {}


async def _missing(path: Path, acknowledged: dict[str, int]) -> list[str]:
    """What was acknowledged and is not there; no batch may be there by half."""
    driver = await SqliteDriver.open(SqliteOptions(path=str(path), busy_timeout=0.5))
    missing: list[str] = []
    for name, last in acknowledged.items():
        numbers = {f"{number:06}" for number in range(last + 1)}
        records = {entry.key[-6:]: entry.value for entry in await driver.scan(f"c:{name}:", f"c:{name};", limit=99_999)}
        twins = {entry.key[-6:]: entry.value for entry in await driver.scan(f"t:{name}:", f"t:{name};", limit=99_999)}
        assert records == twins
        missing += [f"{name} {number}" for number in sorted(numbers - set(records))]
    outcomes = await driver.commit([Batch((Put("x:free", b"1"),), b"version1")])  # no lock was left behind
    assert outcomes == [Committed(b"version1")]
    await driver.close()
    return missing


async def test_no_acknowledged_write_is_lost_when_writers_are_killed(tmp_path: Path) -> None:
    seed = random.randrange(1 << 32)
    print("seed", seed)

    acknowledged = await asyncio.to_thread(_killed, tmp_path / "kv.db", _KILLS, seed)

    assert len(acknowledged) == 4
    assert await _missing(tmp_path / "kv.db", acknowledged) == []
    assert _integrity(tmp_path / "kv.db") == [("ok",)]


async def test_the_killing_catches_an_answer_before_the_commit(tmp_path: Path) -> None:
    for round_ in range(20):
        path = tmp_path / f"{round_}.db"
        acknowledged = await asyncio.to_thread(_killed, path, 3, round_, "early")
        if await _missing(path, acknowledged):
            return
    raise AssertionError("an answer before the commit was never caught")
