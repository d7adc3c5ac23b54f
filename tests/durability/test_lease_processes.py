"""Several processes fight for locks while they are stopped and their clocks jump: a late holder writes nothing.

Who has a lock reads a count, and writes one more without a condition but the fence. If a holder that was
stopped past the end of its lease ever wrote, a count would be lost, or come twice.
`KVPERSIST_FAULT_STRIDE=1` makes it 10,000 acquisitions for each driver; the default is a fortieth of that.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import sys
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from stores import SHARED, empty_store

from kvpersist import open_store

_ACQUISITIONS = 10_000 // int(os.environ.get("KVPERSIST_FAULT_STRIDE", "40"))
_PROCESSES = 4
_TASKS = 3  # of each process
_LOCKS = 3
_TTL = 0.2  # seconds
_STOPS = 0.02  # of the turns: a process stops itself at the worst moment
_WORKER = Path(__file__).with_name("lease_worker.py")
_LIBRARIES = sorted(Path("/usr").glob("lib*/**/faketime/libfaketimeMT.so.1"))

needs_faketime = pytest.mark.skipif(not _LIBRARIES, reason="needs libfaketime: apt-get install faketime")


@dataclass
class Report:
    """What came of a fight; ``wrong`` says which promise did not hold."""

    written: int
    refused: int
    stops: int
    jumps: int
    seconds: float
    wrong: list[str]


async def fight(
    url: str, folder: Path, acquisitions: int, *, jumps: bool, fence: bool = True, stops: float = _STOPS
) -> Report:
    began = time.monotonic()
    chance = random.Random(7)
    clocks = [folder / f"clock{n}" for n in range(_PROCESSES)]
    plan: dict[str, Any] = {"tasks": _TASKS, "locks": _LOCKS, "ttl": _TTL, "stops": stops, "fence": fence}
    workers: list[asyncio.subprocess.Process] = []
    report = Report(0, 0, 0, 0, 0.0, [])
    try:
        for n, clock in enumerate(clocks):
            workers.append(
                await asyncio.create_subprocess_exec(
                    *(sys.executable, str(_WORKER), url),
                    json.dumps(plan | {"seed": n, "share": acquisitions // _PROCESSES}),
                    env=os.environ
                    | {"PYTHONPATH": os.pathsep.join(each for each in sys.path if each)}
                    | (_jumping(clock) if jumps else {}),
                    stdin=asyncio.subprocess.PIPE,
                    stdout=asyncio.subprocess.PIPE,
                )
            )
        for worker in workers:
            assert worker.stdout is not None
            assert await worker.stdout.readline() == b"ready\n"
        ends = asyncio.gather(*(worker.communicate(b"\n") for worker in workers))
        while not ends.done() and not any(worker.returncode for worker in workers):
            await asyncio.sleep(chance.uniform(0, 0.1))
            report.stops += await _stopped_and_continued(workers, chance)
            if jumps and chance.random() < 0.3:
                _jump(chance.choice(clocks), chance)
                report.jumps += 1
    finally:
        for worker in workers:
            if worker.returncode is None:
                worker.kill()
    outputs = await ends
    assert [worker.returncode for worker in workers] == [0] * _PROCESSES
    told = [json.loads(out) for out, _ in outputs]
    report.seconds = time.monotonic() - began
    report.refused = sum(each["refused"] for each in told)
    acknowledged = sorted(tuple(ack) for each in told for ack in each["acknowledged"])
    report.written = len(acknowledged)
    async with open_store(url) as store:
        for lock in range(_LOCKS):
            mine = [(count, token) for at, count, token in acknowledged if at == lock]
            if [count for count, _ in mine] != list(range(1, len(mine) + 1)):
                report.wrong.append(f"lock {lock}: a count was lost or came twice")
            if any(before >= after for (_, before), (_, after) in pairwise(mine)):
                report.wrong.append(f"lock {lock}: a write under an older token followed one under a newer")
            if await store.get(f"app:count{lock}", 0) != len(mine):
                report.wrong.append(f"lock {lock}: what is stored is not what was acknowledged")
        await store.clear("", raw=True)
    return report


async def _stopped_and_continued(workers: list[asyncio.subprocess.Process], chance: random.Random) -> int:
    """Stop one now and then, and let those who are stopped go on after longer than their leases last."""
    running = [worker for worker in workers if worker.returncode is None]
    if running and chance.random() < 0.1:
        chance.choice(running).send_signal(signal.SIGSTOP)
    stopped = [worker for worker in running if _is_stopped(worker.pid)]
    if stopped:
        await asyncio.sleep(_TTL * chance.uniform(1.1, 2.5))
        for worker in stopped:
            worker.send_signal(signal.SIGCONT)
    return len(stopped)


def _is_stopped(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].startswith("T")
    except OSError:  # it has ended
        return False


def _jumping(clock: Path) -> dict[str, str]:
    clock.write_text("+0")
    return {
        "LD_PRELOAD": str(_LIBRARIES[0]),
        "FAKETIME_TIMESTAMP_FILE": str(clock),
        "FAKETIME_NO_CACHE": "1",
        "NO_FAKE_STAT": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",  # no clock of a real machine that is set does that
    }


def _jump(clock: Path, chance: random.Random) -> None:
    new = clock.with_suffix(".new")
    new.write_text(f"{chance.uniform(-60, 60):+.3f}")
    new.replace(clock)


@needs_faketime
@pytest.mark.timeout(60 + _ACQUISITIONS)
@pytest.mark.parametrize("name", [*SHARED, "mongo"])
async def test_no_late_holder_writes_though_processes_are_stopped_and_clocks_jump(
    name: str, tmp_path: Path, service: Any
) -> None:
    slow = name == "mongo"  # FerretDB takes a second for one
    acquisitions = _ACQUISITIONS // 10 if slow else _ACQUISITIONS
    url = empty_store(name, tmp_path, service) + ("&kv.timeout=60" if slow else "")

    report = await fight(url, tmp_path, acquisitions, jumps=True)

    print(f"{name}: {acquisitions} acquisitions, {report}")
    assert report.wrong == []
    assert report.refused > 0 or slow
    assert report.jumps > 0


@pytest.mark.timeout(60 + _ACQUISITIONS)
async def test_no_late_holder_writes_though_processes_are_stopped(tmp_path: Path, service: Any) -> None:
    report = await fight(empty_store("sqlite", tmp_path, service), tmp_path, _ACQUISITIONS, jumps=False)

    assert report.wrong == []
    assert report.refused > 0


async def test_the_fight_catches_a_fence_that_is_left_out(tmp_path: Path, service: Any) -> None:
    url = empty_store("sqlite", tmp_path, service)

    report = await fight(url, tmp_path, 120, jumps=False, fence=False, stops=0.15)

    assert any("count" in wrong for wrong in report.wrong)
