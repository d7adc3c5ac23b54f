"""A publish writes the event and nothing beside it: what is known of a topic is found again, whoever came between."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from typing import Any
from uuid import uuid4

import pytest

from kvpersist import EventQueue, NewEvent, Store, open_store
from kvpersist.driver import Batch, Check, Entry, Put
from kvpersist.errors import CorruptRecord, EventsExpired, KvError
from kvpersist.events._log import TopicLog
from kvpersist.events.records import number_of
from kvpersist_drivers.memory import MemoryDriver

Stores = Callable[[], Awaitable[Store]]

_RUNS = 60
_UNTIL = 10 * _RUNS  # a planted mistake has shown by then, mostly within the first


class Unhurried(MemoryDriver):
    """Shares its space by name; before and after each call, whoever else can goes on."""

    def __init__(self, name: str, chance: random.Random) -> None:
        super().__init__(name)
        self._chance = chance

    async def get(self, keys: Sequence[str]) -> list[Entry | None]:
        await self._pause()
        found = await super().get(keys)
        await self._pause()
        return found

    async def commit(self, batches: Sequence[Batch]) -> list[Any]:
        await self._pause()
        done = await super().commit(batches)
        await self._pause()
        return done

    async def scan(self, *args: Any, **options: Any) -> list[Entry]:
        await self._pause()
        found = await super().scan(*args, **options)
        await self._pause()
        return found

    async def _pause(self) -> None:
        for _ in range(self._chance.randrange(4)):
            await asyncio.sleep(0)


class Crowd:
    """Queues of several processes on one place, and what became of a topic they work on."""

    def __init__(self, stack: AsyncExitStack, seed: int) -> None:
        self._stack, self.chance = stack, random.Random(seed)
        self._name = uuid4().hex
        self.given: list[str] = []
        self.read: list[int] = []

    async def queue(self, **options: Any) -> EventQueue:
        driver = Unhurried(self._name, self.chance)
        self._stack.push_async_callback(driver.close)
        store = await self._stack.enter_async_context(open_store(driver, timeout=None))
        return await self._stack.enter_async_context(EventQueue(store, retention=None, cleanup_interval=0, **options))

    async def publish(self, queue: EventQueue, n: int) -> None:
        for at in range(n):
            if self.chance.random() < 0.3:
                self.given += await queue.publish_many("t", [NewEvent(at, cursor=f"c{at}"), at])
            else:
                self.given.append(await queue.publish("t", at))

    async def sweep(self, queue: EventQueue, n: int) -> None:
        for _ in range(n):
            await queue.sweep()
            await asyncio.sleep(0)

    async def follow(self, queue: EventQueue) -> None:
        """Read to the end, noting what was read or expired."""
        async with queue.subscribe("t", "start", buffer=3) as events:
            while True:
                try:
                    self.read.append(number_of((await anext(events)).position) or 0)
                except EventsExpired as error:
                    self.read += range(self.read[-1] + 1 if self.read else 1, number_of(error.first) or 0)
                    events._pass(error)


async def test_a_publish_writes_one_row(backend: str, queue: EventQueue, store: Store) -> None:
    await queue.publish("t", "first")
    before = store.metrics()

    await queue.publish("t", "second")

    after = store.metrics()
    ordered = store.capabilities.atomic_batch == "none"
    assert (after.puts - before.puts, after.checks - before.checks) == ((2, 0) if ordered else (1, 1))
    assert after.round_trips - before.round_trips == 1


async def test_who_knew_less_goes_on_behind_what_others_published_and_swept(stores: Stores, namespace: str) -> None:
    async with (
        EventQueue(await stores(), namespace=namespace, max_events=1) as one,
        EventQueue(await stores(), namespace=namespace) as other,
    ):
        await other.publish("t", "by other")
        await one.publish_many("t", list(range(20)))
        assert await one.sweep() == 20
        assert number_of(await other.publish("t", "later")) == 22
        assert (await one.stats("t")).count == 2


async def test_who_only_sweeps_sweeps_what_others_publish_after_each_of_its_sweeps(
    stores: Stores, namespace: str
) -> None:
    async with (
        EventQueue(await stores(), namespace=namespace, max_events=2) as sweeper,
        EventQueue(await stores(), namespace=namespace) as publisher,
    ):
        for n in range(1, 4):
            await publisher.publish_many("t", list(range(10)))
            assert await sweeper.sweep() == (8 if n == 1 else 10)
            assert (await sweeper.stats("t")).count == 2


async def test_a_topic_whose_stat_was_written_with_every_event_goes_on(
    stores: Stores, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with EventQueue(await stores(), namespace=namespace, max_events=3) as queue:
        with monkeypatch.context() as earlier:
            earlier.setattr(TopicLog, "_is_found_again", lambda *_: False)
            await queue.publish_many("t", list(range(5)))
            await queue.publish("t", 5)
        async with EventQueue(await stores(), namespace=namespace) as fresh:
            assert number_of(await fresh.publish("t", 6)) == 7
            assert [entry.event for entry in await fresh.read("t")] == list(range(7))
        await queue.sweep()
        assert [entry.event for entry in await queue.read("t")] == [4, 5, 6]


async def test_a_topic_whose_newest_event_is_damaged_goes_on_and_can_be_deleted(
    store: Store, queue: EventQueue, stores: Stores, namespace: str
) -> None:
    if store.capabilities.atomic_batch == "none":
        pytest.skip("there whoever reads the topic is told of the damage")
    await queue.publish_many("t", list(range(4)))
    found = await store._scan(f"{namespace}:event:", f"{namespace}:event;", limit=10)
    size = (await queue.stats("t")).bytes
    await store._commit([Put(found[-1].key, b"\x02" + found[-1].value[1:-1] + b"\xff")])

    async with EventQueue(await stores(), namespace=namespace) as fresh:
        assert number_of(await fresh.publish("t", "on")) == 5
        assert (await fresh.stats("t")).bytes == size + len(found[-1].value) + 3
        assert [entry.event for entry in await fresh.read("t", limit=3)] == [0, 1, 2]
        with pytest.raises(CorruptRecord):
            await fresh.read("t")
        assert await fresh.delete("t") is True


async def numbers_are_whole(seed: int) -> None:
    """Publishers in three processes, two that sweep, one that reads."""
    async with AsyncExitStack() as stack:
        crowd = Crowd(stack, seed)
        publishers = [await crowd.queue() for _ in range(3)]
        sweepers = [await crowd.queue(max_events=kept) for kept in (1, 4)]
        reading = asyncio.create_task(crowd.follow(await crowd.queue()))
        work = [crowd.publish(queue, 12) for queue in publishers] + [crowd.sweep(queue, 8) for queue in sweepers]
        async with asyncio.timeout(20):
            await asyncio.gather(*work)
            last = len(crowd.given)
            assert sorted(crowd.given) == [f"{n:016x}" for n in range(1, last + 1)]
            while not crowd.read or crowd.read[-1] < last:
                assert not reading.done()
                await asyncio.sleep(0)
        reading.cancel()
        assert crowd.read == list(range(1, last + 1))
        stats = await publishers[0].stats("t")
        assert stats.last == f"{last:016x}"
        assert [entry.position for entry in await publishers[1].read("t")] == sorted(crowd.given)[-stats.count :]


async def nothing_is_left_alone(seed: int) -> None:
    """Publishers in two processes, one that sweeps, one that deletes the topic again and again."""
    async with AsyncExitStack() as stack:
        crowd = Crowd(stack, seed)
        publishers = [await crowd.queue() for _ in range(2)]
        sweeper, deleter = await crowd.queue(max_events=2), await crowd.queue()

        async def delete() -> None:
            for _ in range(4):
                await deleter.delete("t")
                await asyncio.sleep(0)

        async with asyncio.timeout(20):
            await asyncio.gather(*(crowd.publish(queue, 12) for queue in publishers), crowd.sweep(sweeper, 4), delete())
        store = deleter.store
        stat = await store._scan("kv:event#", "kv:event$", limit=2)
        events = await store._scan("kv:event:", "kv:event;", limit=100, keys_only=True)
        assert len(stat) == 1 or not events
        found = await deleter.read("t")
        numbers = [number_of(entry.position) or 0 for entry in found]
        assert numbers == list(range(numbers[0], numbers[0] + len(numbers))) if numbers else True
        assert len(events) == len(found)
        assert (
            number_of(await publishers[0].publish("t", "on")) == (numbers[-1] + 1 if numbers else None) or not numbers
        )


@pytest.mark.parametrize("check", [numbers_are_whole, nothing_is_left_alone])
async def test_whoever_comes_between_the_steps_of_others(check: Callable[[int], Awaitable[None]]) -> None:
    for seed in range(_RUNS):
        try:
            await check(seed)
        except (AssertionError, KvError) as error:
            error.add_note(f"seed {seed}")
            raise


@pytest.mark.parametrize("check", [numbers_are_whole, nothing_is_left_alone])
async def test_planted_a_publish_that_does_not_look_at_the_stat_is_caught(
    check: Callable[[int], Awaitable[None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = TopicLog._built

    def unchecked(self: TopicLog, *args: Any) -> Any:
        built = real(self, *args)
        built.ops = [op for op in built.ops if type(op) is not Check]
        return built

    monkeypatch.setattr(TopicLog, "_built", unchecked)
    with pytest.raises((AssertionError, KvError, TimeoutError)):
        for seed in range(_UNTIL):
            await check(seed)


async def test_planted_a_deletion_that_does_not_look_at_the_next_number_is_caught(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("kvpersist.events.removal.Check", lambda key, expect: Check(f"{key}-elsewhere", expect))
    with pytest.raises((AssertionError, KvError, TimeoutError)):
        for seed in range(_UNTIL):
            await nothing_is_left_alone(seed)
