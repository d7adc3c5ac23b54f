"""Histories of 16 producers and 8 consumers in processes that are killed, stopped and cancelled: nothing is lost.

Each run prints its figures. `KVPERSIST_HISTORY_EVENTS` says how many events are published on each driver (2,000, and
200 on FerretDB), `KVPERSIST_HISTORY_SEED` repeats the faults of a run as far as the machine's timing allows.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import pytest
from history import Verdict, judge
from history_worker import GROUP, GROUP_TOPIC, TOPICS, Plan, Worker
from stores import SHARED, empty_store

from kvpersist import EventQueue, open_store
from kvpersist.errors import KvError

_ASKED = int(os.environ.get("KVPERSIST_HISTORY_EVENTS", "0"))
_EVENTS = _ASKED or 2000
_SEED = int(os.environ.get("KVPERSIST_HISTORY_SEED", "0")) or random.randrange(1, 1 << 31)
_PRODUCERS, _CONSUMERS, _PROCESSES = 16, 8, 4
_DEADLINE = 1.0  # seconds until a group hands an event out again
_PATIENCE = 60.0  # seconds without a new event acknowledged by anybody
_FERRETDB_EVENTS = _ASKED or 200
_FERRETDB_ROUND = 800  # it reads the whole collection for a scan: after so many events, another history begins
_SCRIPT = Path(__file__).with_name("history_worker.py")


@dataclass
class Run:
    """What happened, and what came of it."""

    verdict: Verdict
    kills: int
    stops: int
    seconds: float
    ended: bool

    def line(self, name: str) -> str:
        found = self.verdict
        return (
            f"{name}: {found.acknowledged:,} events, {_PRODUCERS} producers, {_CONSUMERS} consumers, "
            f"{self.kills} kills, {self.stops} stops, {found.cancels} cancels; lost {found.lost}, "
            f"duplicates {found.duplicates:,}, unknown {found.unknown:,} of which {found.found:,} there, "
            f"failed {found.failed}, {self.seconds:.1f} s, seed {_SEED}"
        )


def plans(folder: Path, events: int, *, seed: int = _SEED, **options: Any) -> list[Plan]:
    """What each process is to do."""
    faults = max(6, min(60, events // 500))
    settings: dict[str, Any] = {
        "folder": str(folder),
        "share": events // _PRODUCERS,
        "batch": max(10, min(200, events // 1000)),
        "faults": 3 * events / faults,
        "deadline": _DEADLINE,
    }
    return [
        Plan(
            name=f"w{n}",
            producers=list(range(n, _PRODUCERS, _PROCESSES)),
            consumers=list(range(n, _CONSUMERS, _PROCESSES)),
            seed=seed + n,
            **settings | options,
        )
        for n in range(_PROCESSES)
    ]


class _Process:
    """One worker, begun again whenever it was killed, and let go on when it stopped itself."""

    def __init__(self, url: str, plan: Plan, chance: random.Random) -> None:
        self._url, self._plan, self._chance = url, plan, chance
        self._process: subprocess.Popen[bytes] | None = None
        self._ending = False
        self.kills = self.stops = 0

    async def run(self) -> None:
        while not self._ending:
            with subprocess.Popen(
                [sys.executable, _SCRIPT, self._url, msgspec.json.encode(self._plan)],
                env=os.environ | {"PYTHONPATH": os.pathsep.join(each for each in sys.path if each)},
                stdin=subprocess.PIPE,
            ) as self._process:
                code = await self._ended(self._process)
            if code == -signal.SIGKILL:
                self.kills += 1
                self._plan = msgspec.structs.replace(self._plan, seed=self._plan.seed + 1000)
            else:
                assert code == 0
                assert self._ending

    async def _ended(self, process: subprocess.Popen[bytes]) -> int:
        while (code := process.poll()) is None:
            await asyncio.sleep(0.05)
            if _is_stopped(process.pid):
                await asyncio.sleep(_DEADLINE * self._chance.uniform(1.1, 2.0))
                self.stops += 1
                process.send_signal(signal.SIGCONT)
        return code

    def end(self) -> None:
        self._ending = True
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()

    def kill(self) -> None:
        self._ending = True
        if self._process is not None:
            self._process.kill()


async def processes(url: str, work: list[Plan]) -> Run:
    """Run a history in several processes."""
    began = time.monotonic()
    chance = random.Random(_SEED)
    workers = [_Process(url, plan, chance) for plan in work]
    running = [asyncio.create_task(worker.run()) for worker in workers]
    async with open_store(url) as store:
        queue = EventQueue(store, namespace="app", retention=None, cleanup_interval=0)
        lasts = None
        try:
            lasts = await _all_read(queue, Path(work[0].folder), running)
            for worker in workers:
                worker.end()
            await asyncio.wait_for(asyncio.gather(*running), _PATIENCE)
        finally:
            for worker in workers:
                worker.kill()
            await asyncio.wait(running)
        seconds = time.monotonic() - began
        verdict = await _judged(queue, Path(work[0].folder), lasts)
        if not url.startswith(("sqlite", "file")):  # a folder goes with the test
            await store.clear("", raw=True)
    return Run(
        verdict, sum(each.kills for each in workers), sum(each.stops for each in workers), seconds, lasts is not None
    )


async def tasks(work: list[Plan], **planted: Callable[..., Any]) -> Run:
    """Run a history in tasks of this process; a kill ends all tasks of one worker at once, by cancelling them."""
    kills: list[str] = []
    began = time.monotonic()
    async with open_store("memory://") as store:
        queue = EventQueue(store, namespace="app", retention=None, cleanup_interval=0)
        for name, method in planted.items():
            setattr(queue, name, method(getattr(queue, name)))
        running: list[asyncio.Task[None]] = [asyncio.create_task(_begun_again(queue, plan, kills)) for plan in work]
        lasts = await _all_read(queue, Path(work[0].folder), running)
        for task in running:
            task.cancel()
        await asyncio.wait(running)
        seconds = time.monotonic() - began
        verdict = await _judged(queue, Path(work[0].folder), lasts)
        return Run(verdict, len(kills), 0, seconds, lasts is not None)


async def _begun_again(queue: EventQueue, plan: Plan, kills: list[str]) -> None:
    task: asyncio.Task[None] | None = None

    def die() -> None:
        if task is not None:
            task.cancel()

    while True:
        task = asyncio.ensure_future(Worker(plan, queue, die, stops=False).run())
        try:
            await asyncio.wait([task])
        finally:
            task.cancel()
        if not task.cancelled():
            task.result()
        kills.append(plan.name)
        plan = msgspec.structs.replace(plan, seed=plan.seed + 1000)


async def _all_read(queue: EventQueue, folder: Path, running: list[asyncio.Task[None]]) -> dict[str, int] | None:
    """Wait until everything is published, worked on and acknowledged; return where it ends, None: it does not go on."""
    before: Any = None
    changed = time.monotonic()
    while time.monotonic() - changed < _PATIENCE:
        await asyncio.sleep(0.1)
        for task in running:
            if task.done():
                task.result()
        published = len(list(folder.glob("*.done"))) == _PRODUCERS  # asked first: what is read then is the end
        try:
            now = await _progress(queue)
        except KvError as error:
            if not error.retryable:
                raise
            continue
        lasts, cursors, (waiting, in_flight) = now
        read = all(cursors.get(c) == lasts[TOPICS[c % 3]] for c in range(6)) and waiting == in_flight == 0
        if published and read:
            return lasts
        if now != before:
            before, changed = now, time.monotonic()
    return None


async def _progress(queue: EventQueue) -> tuple[dict[str, int], dict[int, int], tuple[int, int]]:
    lasts = await _lasts(queue)
    cursors = {
        int(name[1:]): int(position, 16)
        for topic in TOPICS
        for name, position in (await queue.consumers(topic)).items()
    }
    stats = await queue.group(GROUP_TOPIC, GROUP).stats()
    return lasts, cursors, (stats.waiting, stats.in_flight)


async def _lasts(queue: EventQueue) -> dict[str, int]:
    stats = {topic: await queue.stats(topic) for topic in (*TOPICS, GROUP_TOPIC)}
    return {topic: int(each.last, 16) if each.last is not None else 0 for topic, each in stats.items()}


async def _judged(queue: EventQueue, folder: Path, lasts: dict[str, int] | None) -> Verdict:
    """Judge up to ``lasts``: what somebody who was killed had sent may be stored when all have gone."""
    atomic = queue.store.capabilities.atomic_batch != "none"
    lasts = lasts or await _lasts(queue)
    return await asyncio.to_thread(judge, folder, lasts, atomic=atomic)


def _is_stopped(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].startswith("T")
    except OSError:  # it has ended
        return False


@pytest.mark.timeout(120 + _EVENTS // 100)
@pytest.mark.parametrize("name", SHARED)
async def test_nothing_is_lost_though_processes_are_killed_and_stopped(name: str, tmp_path: Path, service: Any) -> None:
    url = empty_store(name, tmp_path, service)

    run = await processes(url, plans(tmp_path, _EVENTS))

    print(run.line(name))
    _nothing_is_lost(run, _EVENTS)


@pytest.mark.timeout(120 + _FERRETDB_EVENTS // 5)
async def test_nothing_is_lost_on_ferretdb_though_processes_are_killed_and_stopped(
    tmp_path: Path, service: Any
) -> None:
    url = empty_store("mongo", tmp_path, service) + "&kv.timeout=60"  # a killed process keeps its turn for 8 s

    events = min(_FERRETDB_ROUND, _FERRETDB_EVENTS)
    for first in range(0, _FERRETDB_EVENTS, _FERRETDB_ROUND):
        folder = tmp_path / str(first)
        folder.mkdir()

        run = await processes(url, plans(folder, events, seed=_SEED + first))

        print(run.line(f"mongo, from {first:,}"), flush=True)
        _nothing_is_lost(run, events)


@pytest.mark.timeout(120 + _EVENTS // 100)
async def test_nothing_is_lost_though_tasks_are_cancelled(tmp_path: Path) -> None:
    run = await tasks(plans(tmp_path, _EVENTS))

    print(run.line("memory"))
    _nothing_is_lost(run, _EVENTS)


def _nothing_is_lost(run: Run, events: int) -> None:
    assert run.verdict.wrong == []
    assert run.ended
    assert (run.verdict.lost, run.verdict.acknowledged) == (0, events // _PRODUCERS * _PRODUCERS)
    assert run.kills + run.stops + run.verdict.cancels > 0


async def test_an_acknowledgement_before_the_work_is_caught(tmp_path: Path, service: Any) -> None:
    url = empty_store("sqlite", tmp_path, service)

    run = await processes(url, plans(tmp_path, 500, ack_first=True, faults=0))

    print(run.line("sqlite, acknowledging first"))
    assert run.kills > 0
    assert run.verdict.lost > 0


async def test_an_event_that_is_acknowledged_and_not_stored_is_caught(tmp_path: Path) -> None:
    def forgetful(real: Callable[..., Any]) -> Callable[..., Any]:
        async def publish_many(topic: str, events: list[Any]) -> list[str]:
            if events[0][1] % 10 != 3:
                return await real(topic, events)
            stored = await real(topic, events[:-1])
            return [*stored, f"{int(stored[-1], 16) + 1:016x}"]

        return publish_many

    run = await tasks(plans(tmp_path, 800, faults=0), publish_many=forgetful)

    assert run.verdict.lost > 0
    assert any("acknowledged, and is not there" in wrong for wrong in run.verdict.wrong)


async def test_events_that_change_places_are_caught(tmp_path: Path) -> None:
    def mixing(real: Callable[..., Any]) -> Callable[..., Any]:
        async def publish_many(topic: str, events: list[Any]) -> list[str]:
            return await real(topic, [events[1], events[0], *events[2:]])

        return publish_many

    run = await tasks(plans(tmp_path, 800, faults=0), publish_many=mixing)

    assert any("stands behind" in wrong for wrong in run.verdict.wrong)


@pytest.fixture
async def sound(tmp_path: Path) -> tuple[Path, dict[str, int]]:
    """The files of a history without faults, and where its topics end."""
    async with open_store("memory://") as store:
        queue = EventQueue(store, namespace="app", retention=None, cleanup_interval=0)
        work = plans(tmp_path, 320, faults=0, cancels=1e-9)
        running = [asyncio.create_task(_begun_again(queue, plan, [])) for plan in work]
        assert await _all_read(queue, tmp_path, running)
        for task in running:
            task.cancel()
        await asyncio.wait(running)
        lasts = await _lasts(queue)
    assert judge(tmp_path, lasts, atomic=True).wrong == []
    return tmp_path, lasts


@pytest.mark.parametrize(
    ("kind", "change", "told"),
    [
        ("d", lambda lines: lines.pop(3), "never worked on"),
        ("d", lambda lines: lines.insert(3, lines[2]), "was given"),
        ("d", lambda lines: lines.insert(3, lines.pop(4)), "was given"),
        ("d", lambda lines: lines.insert(0, lines.pop()), "began at"),
        ("g", lambda lines: lines.pop(), "no member worked on"),
        ("g", lambda lines: lines.append(lines[0]), "given out twice"),
        ("g", lambda lines: lines.append(" ".join([*lines[0].split()[:3], "2", *lines[0].split()[4:]])), "after it"),
        ("k", lambda lines: lines.append(lines[0]), "done twice"),
    ],
)
async def test_what_a_reader_must_not_see_is_told(
    sound: tuple[Path, dict[str, int]], kind: str, change: Callable[[list[str]], Any], told: str
) -> None:
    folder, lasts = sound
    path = next(path for path in sorted(folder.glob("*.read")) if f"\n{kind} " in path.read_text())
    lines = path.read_text().splitlines()
    at = [n for n, line in enumerate(lines) if line.startswith(f"{kind} ")]
    who = lines[at[0]].split()[1]
    mine = [lines[n] for n in at if lines[n].split()[1] == who]
    rest = [line for line in lines if line not in mine]
    change(mine)
    path.write_text("\n".join([f"b {who}", *mine, *(line for line in rest if line != f"b {who}")]) + "\n")

    assert any(told in wrong for wrong in judge(folder, lasts, atomic=True).wrong)


@pytest.mark.parametrize(
    ("outcome", "topic_end", "told"),
    [("f", 0, "failed, and are there"), ("o", 1, "never worked on")],
)
async def test_what_a_producer_was_told_wrongly_is_caught(
    sound: tuple[Path, dict[str, int]], outcome: str, topic_end: int, told: str
) -> None:
    folder, lasts = sound
    path = folder / "w0.published"
    lines = path.read_text().splitlines()
    answer = next(n for n, line in enumerate(lines) if line.startswith("o "))
    if outcome == "f":
        lines[answer] = "f " + lines[answer].split()[1]
    path.write_text("\n".join(lines) + "\n")

    verdict = judge(folder, {topic: last + topic_end for topic, last in lasts.items()}, atomic=True)

    assert any(told in wrong for wrong in verdict.wrong)
