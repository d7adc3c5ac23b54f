"""Publishes and reads its part of a history and writes down what came of it: history_worker.py URL PLAN.

PLAN is JSON, the fields of `Plan`. It kills and stops itself at random moments, and cancels its own calls. Lines
are written at once, so that a killed process leaves all that it knew; `history` reads them:

``NAME.published``: ``i producer topic first count`` before a publish; then ``o producer position``, ``f producer``
(an error that says nothing was done) or ``u producer`` (not known). ``NAME.read``: ``b consumer``, a subscription
begins; ``d consumer position producer number``, an event was worked on; ``t`` and ``a consumer position``, before
and after an acknowledgement; of a group ``g consumer position attempts producer number`` and ``k consumer position
attempts``, done. ``x`` in either: a call was cancelled. ``NAME.done``: a producer has published its share.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import sys
import threading
from collections import Counter
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import msgspec

from kvpersist import EventEntry, EventQueue, open_store
from kvpersist.errors import CommitUnknown, KvError
from kvpersist.events import Claimed, EventGroup

__all__ = ["GROUP", "GROUP_TOPIC", "TOPICS", "Plan", "Worker"]

TOPICS = ("t0", "t1", "t2")
"""Each is read by two consumers, each on its own: consumer c reads ``TOPICS[c % 3]``."""
GROUP_TOPIC, GROUP = "shared", "g"
"""Is read by the members of one group: consumers 6 and 7."""

_IDLE_ACK = 0.05  # seconds until the last event that was worked on is acknowledged, at most
_IN_DOUBT = 0.005  # seconds after which a call is cancelled, at most


class Plan(msgspec.Struct, kw_only=True):
    """What a worker is to do.

    Attributes:
        name: of its files in ``folder``.
        share: events that each producer publishes.
        batch: events of a publish, at most.
        deadline: of the group's claims, seconds.
        faults: events between two faults, on average; 0: none.
        cancels: the part of all publishes that is cancelled; subscriptions are, per event, a tenth as often.
        ack_first: acknowledge before the work is done, and die between the two: a planted mistake.
    """

    name: str
    folder: str
    producers: list[int]
    consumers: list[int]
    share: int
    batch: int
    seed: int
    deadline: float = 1.0
    faults: float = 0
    cancels: float = 0.02
    ack_first: bool = False


class _Journal:
    """Lines that outlive the death of the process."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def __call__(self, line: str) -> None:
        os.write(self._file, line.encode() + b"\n")

    def close(self) -> None:
        os.close(self._file)


class _CutOff(Exception):
    """A call was cancelled by its worker."""


class Worker:
    """Some producers and consumers. ``die`` ends it where it stands; ``stops``: it may stop its process."""

    def __init__(self, plan: Plan, queue: EventQueue, die: Callable[[], None], *, stops: bool) -> None:
        self._plan, self._queue, self._die, self._stops = plan, queue, die, stops
        self._chance = random.Random(plan.seed)
        self._folder = Path(plan.folder)
        self._earlier = self._read_back()
        self._published = _Journal(self._folder / f"{plan.name}.published")
        self._read = _Journal(self._folder / f"{plan.name}.read")
        self._until_fault = self._chance.expovariate(1 / plan.faults) if plan.faults else float("inf")

    async def run(self) -> None:
        """Work until cancelled, or until something is not as it should be."""
        try:
            async with asyncio.TaskGroup() as group:
                for producer in self._plan.producers:
                    group.create_task(self._produce(producer))
                for consumer in self._plan.consumers:
                    group.create_task(self._consume(consumer))
        finally:
            self._published.close()
            self._read.close()

    # ---- producers

    async def _produce(self, producer: int) -> None:
        plan, chance = self._plan, self._chance
        number, acknowledged = self._earlier.get(producer, (0, 0))
        while acknowledged < plan.share:
            topic = chance.choice((*TOPICS * 5, GROUP_TOPIC))
            count = min(chance.randint(1, plan.batch), plan.share - acknowledged)
            self._published(f"i {producer} {topic} {number} {count}")
            events = [[producer, n] for n in range(number, number + count)]
            number += count
            try:
                positions = await self._cut_off_at_times(self._publish(topic, events))
            except _CutOff:
                self._published(f"u {producer}\nx")
            except KvError as error:
                self._published(f"{'f' if error.outcome == 'none' else 'u'} {producer}")
            else:
                first = int(positions[0], 16)
                assert [int(each, 16) for each in positions] == list(range(first, first + count))
                self._published(f"o {producer} {first}")
                acknowledged += count
            self._touched(count)
        (self._folder / f"{producer}.done").touch()

    async def _publish(self, topic: str, events: list[Any]) -> list[str]:
        if len(events) == 1:
            return [await self._queue.publish(topic, events[0])]
        return await self._queue.publish_many(topic, events)

    async def _cut_off_at_times(self, call: Coroutine[Any, Any, list[str]]) -> list[str]:
        if self._chance.random() >= self._plan.cancels:
            return await call
        task = asyncio.ensure_future(call)
        asyncio.get_running_loop().call_later(self._chance.uniform(0, _IN_DOUBT), task.cancel)
        try:
            await asyncio.wait([task])
        finally:
            task.cancel()
        if task.cancelled():
            raise _CutOff
        return task.result()

    def _read_back(self) -> dict[int, tuple[int, int]]:
        """For each producer the next number, and how many events were acknowledged, before this process."""
        path = self._folder / f"{self._plan.name}.published"
        next_number: Counter[int] = Counter()
        acknowledged: Counter[int] = Counter()
        asked: dict[int, int] = {}
        for line in path.read_text().splitlines() if path.exists() else ():
            kind, *fields = line.split()
            if kind == "i":
                producer, count = int(fields[0]), int(fields[3])
                next_number[producer], asked[producer] = int(fields[2]) + count, count
            elif kind == "o":
                acknowledged[int(fields[0])] += asked[int(fields[0])]
        return {producer: (number, acknowledged[producer]) for producer, number in next_number.items()}

    # ---- consumers

    async def _consume(self, consumer: int) -> None:
        while True:
            run = asyncio.ensure_future(self._share(consumer) if consumer >= 6 else self._follow(consumer))
            try:
                await asyncio.wait([run])
            except asyncio.CancelledError:
                run.cancel()
                await asyncio.wait([run])
                raise
            if run.cancelled():
                self._read("x")
            elif (error := run.exception()) is not None and not _goes_on(error):
                raise error

    async def _follow(self, consumer: int) -> None:
        topic, name = TOPICS[consumer % 3], f"c{consumer}"
        latest: list[EventEntry] = []
        cut, left = self._cut_off_later(), self._until_ack()
        self._read(f"b {consumer}")
        async with self._queue.subscribe(topic, consumer=name, buffer=self._chance.choice((10, 100, 300))) as events:
            acks = asyncio.ensure_future(self._acknowledge(consumer, latest))
            try:
                async for entry in events:
                    if self._plan.ack_first:
                        await self._ack(consumer, entry)
                        if self._chance.random() < 0.01:
                            self._die()
                    producer, number = entry.event
                    self._read(f"d {consumer} {int(entry.position, 16)} {producer} {number}")
                    latest[:] = [entry]
                    cut()
                    self._touched(1)
                    left -= 1
                    if left <= 0:
                        await self._ack(consumer, entry)
                        left = self._until_ack()
            finally:
                acks.cancel()
                await asyncio.wait([acks])

    def _until_ack(self) -> float:
        return self._chance.expovariate(1 / 50)

    async def _acknowledge(self, consumer: int, latest: list[EventEntry]) -> None:
        """Acknowledge what was worked on when no more comes."""
        acknowledged: EventEntry | None = None
        while True:
            await asyncio.sleep(self._chance.uniform(0, _IDLE_ACK))
            if latest and latest[0] is not acknowledged:
                entry = latest[0]
                try:
                    await self._ack(consumer, entry)
                except KvError:
                    continue
                acknowledged = entry

    async def _ack(self, consumer: int, entry: EventEntry) -> None:
        position = int(entry.position, 16)
        self._read(f"t {consumer} {position}")
        await self._queue.ack(f"c{consumer}", entry.topic, entry.position)
        self._read(f"a {consumer} {position}")

    async def _share(self, consumer: int) -> None:
        group = self._queue.group(GROUP_TOPIC, GROUP, deadline=self._plan.deadline, max_attempts=1_000_000)
        acks: set[asyncio.Task[None]] = set()
        cut = self._cut_off_later()
        members = group.consume(f"c{consumer}", 32)
        try:
            async for claimed in members:
                producer, number = claimed.entry.event
                position = int(claimed.entry.position, 16)
                self._read(f"g {consumer} {position} {claimed.attempts} {producer} {number}")
                ack = asyncio.ensure_future(self._done(consumer, group, claimed))
                acks.add(ack)
                ack.add_done_callback(acks.discard)
                cut()
                self._touched(1)
                if len(acks) >= 32:
                    await asyncio.wait(acks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for ack in list(acks):
                ack.cancel()
            if acks:
                await asyncio.wait(acks)
            await members.aclose()  # type: ignore[attr-defined]

    async def _done(self, consumer: int, group: EventGroup, claimed: Claimed) -> None:
        try:
            done = await group.ack(claimed)
        except KvError:  # it is handed out again
            return
        if done:
            self._read(f"k {consumer} {int(claimed.entry.position, 16)} {claimed.attempts}")

    def _cut_off_later(self) -> Callable[[], None]:
        """Cancels the task it was made in some events later, at a random moment."""
        task, left = asyncio.current_task(), self._chance.expovariate(self._plan.cancels / 10)

        def cut() -> None:
            nonlocal left
            left -= 1
            if -1 < left <= 0 and task is not None:
                asyncio.get_running_loop().call_later(self._chance.uniform(0, _IN_DOUBT), task.cancel)

        return cut

    # ---- faults

    def _touched(self, events: int) -> None:
        self._until_fault -= events
        if self._until_fault > 0:
            return
        self._until_fault = self._chance.expovariate(1 / self._plan.faults)
        delay = self._chance.uniform(0, 0.02)
        if self._stops:  # from a thread: anywhere
            fault = signal.SIGKILL if self._chance.random() < 0.6 else signal.SIGSTOP
            threading.Timer(delay, os.kill, (os.getpid(), fault)).start()
        else:
            asyncio.get_running_loop().call_later(delay, self._die)


def _goes_on(error: BaseException) -> bool:
    """Whether a consumer begins again where it was; an answer that was lost may mean that it goes on later."""
    return isinstance(error, CommitUnknown) or (isinstance(error, KvError) and error.retryable)


async def _main(url: str, plan: Plan) -> None:
    ended = asyncio.Event()
    asyncio.get_running_loop().add_reader(sys.stdin.fileno(), ended.set)
    async with open_store(url) as store:
        queue = EventQueue(store, namespace="app", retention=None, cleanup_interval=0)
        worker = Worker(plan, queue, lambda: os.kill(os.getpid(), signal.SIGKILL), stops=True)
        working = asyncio.ensure_future(worker.run())
        until = asyncio.ensure_future(ended.wait())
        await asyncio.wait([working, until], return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            working.result()
        working.cancel()
        await asyncio.wait([working])
        await queue.close()


if __name__ == "__main__":
    asyncio.run(_main(sys.argv[1], msgspec.json.decode(sys.argv[2], type=Plan)))
