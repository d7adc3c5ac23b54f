"""Retention: by age, count and size, in bounded batches, and never silently."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

import kvpersist
from kvpersist import EventQueue, EventsExpired, NewEvent, Store
from kvpersist.driver import Batch, Delete
from kvpersist.errors import BadCursor, CorruptRecord, Unavailable
from kvpersist.log import Log
from kvpersist.testing.clock import ManualClock
from kvpersist.testing.faults import FaultyDriver
from kvpersist_drivers.memory import MemoryDriver

Stores = Callable[[], Awaitable[Store]]


async def held(store: Store, namespace: str, collection: str) -> int:
    return len(await store._scan(f"{namespace}:{collection}:", f"{namespace}:{collection};", limit=100_000))


async def test_events_go_by_age(queue: EventQueue, store: Store, namespace: str, clock: ManualClock) -> None:
    for hour in range(48):
        await queue.publish("t", hour)
        await queue.publish("other", hour)
        clock.advance(3600)

    assert await queue.sweep() == 2 * 24

    assert [entry.event for entry in await queue.read("t")] == list(range(24, 48))
    assert await held(store, namespace, "event") == 2 * 24
    assert await queue.sweep() == 0
    clock.advance(10 * 86_400)
    await queue.sweep()
    assert await queue.read("t") == []
    assert (await queue.stats("t")).count == 0
    assert await queue.publish("t", "next") == f"{49:016x}"


async def test_events_go_by_count_and_by_size(store: Store, namespace: str) -> None:
    async with EventQueue(store, namespace=namespace, max_events=30) as queue:
        await queue.publish_many("t", ["x" * 1_000] * 100)
        assert await queue.sweep() == 70
        assert (await queue.stats("t")).count == 30
    async with EventQueue(store, namespace=namespace, max_bytes=12_000) as queue:
        await queue.sweep()
        stats = await queue.stats("t")
        assert stats.bytes <= 12_000
        assert stats.count in (10, 11)
    async with EventQueue(store, namespace=namespace, max_bytes=1) as queue:
        await queue.sweep()
        assert (await queue.stats("t")).count == 1, "the newest stays"


async def test_what_was_not_acknowledged_is_kept_where_that_is_asked_for(store: Store, namespace: str) -> None:
    async with EventQueue(store, namespace=namespace, max_events=5, keep_unacknowledged=True) as queue:
        positions = await queue.publish_many("t", list(range(50)))
        await queue.ack("slow", "t", positions[19])
        await queue.ack("fast", "t", positions[49])
        group = queue.group("t", "g")
        claimed = await group.claim("w", 12)
        for one in claimed:
            if one.entry.event != 9:
                await group.ack(one)

        await queue.sweep()
        assert [entry.event for entry in await queue.read("t")] == list(range(9, 50))
        await group.ack(claimed[9])
        await queue.sweep()
        assert (await queue.read("t"))[0].event == 12
        for one in await group.claim("w", 50):
            await group.ack(one)
        await queue.sweep()
        assert [entry.event for entry in await queue.recover("slow", "t")] == list(range(20, 50))


async def test_the_marks_of_expired_events_go_with_them(store: Store, namespace: str) -> None:
    async with EventQueue(store, namespace=namespace, max_events=3) as queue:
        events = [NewEvent(n, cursor=n, bookmark={"seq": n}) for n in range(250)]
        await queue.publish_many("t", [*events, NewEvent("again", cursor=0)])

        await queue.sweep()

        assert await held(store, namespace, "event") == 3
        assert await held(store, namespace, "event_mark") == 5
        assert await queue.read("t", 0) == []
        assert [entry.event for entry in await queue.read("t", 248)] == [249, "again"]
        with pytest.raises(BadCursor):
            await queue.read("t", 100)


async def test_a_place_before_what_is_left_is_told(queue: EventQueue, clock: ManualClock) -> None:
    positions = await queue.publish_many("t", [1, 2])
    clock.advance(86_402)
    await queue.publish("t", 3)
    await queue.sweep()

    assert [entry.event for entry in await queue.read("t")] == [3]
    assert [entry.event for entry in await queue.read("t", positions[1])] == [3]
    for after in (positions[0], "lpv0000-0001"):  # an old cursor of a time before
        with pytest.raises(EventsExpired):
            await queue.read("t", after)


async def test_batches_are_bounded_while_publishing_goes_on() -> None:
    driver = FaultyDriver(MemoryDriver())
    largest = 0
    real = driver.commit

    async def commit(batches: list[Batch]) -> object:
        nonlocal largest
        largest = max(largest, *(sum(type(op) is Delete for op in batch.ops) for batch in batches))
        await asyncio.sleep(0)
        return await real(batches)

    driver.commit = commit  # type: ignore[method-assign,assignment]
    async with kvpersist.open_store(driver) as store, EventQueue(store, max_events=100) as queue:
        await queue.publish_many("t", list(range(5_000)))
        sweeping = asyncio.create_task(queue.sweep())
        during = 0
        while not sweeping.done():
            await queue.publish("t", during)
            during += 1

        assert await sweeping == 4_900
        assert largest == 500
        assert during >= 5
        assert (await queue.stats("t")).count == 100 + during


async def test_an_interrupted_sweep_leaves_nothing_behind_and_shows_nothing_half() -> None:
    driver = FaultyDriver(MemoryDriver())
    async with kvpersist.open_store(driver) as store, EventQueue(store, max_events=10) as queue:
        await queue.publish_many("t", list(range(2_000)))
        driver.fail("commit", 3)  # the stat, 500 events, and then
        with pytest.raises(Unavailable):
            await queue.sweep()

        assert [entry.event for entry in await queue.read("t")] == list(range(1_990, 2_000))
        await queue.sweep()
        assert await held(store, "kv", "event") == 10


async def test_sweeps_run_by_themselves_after_each_interval(clock: ManualClock) -> None:
    async with (
        kvpersist.open_store("memory://", clock=clock) as store,
        EventQueue(store, retention=5, cleanup_interval=0.02) as queue,
        EventQueue(store, namespace="still", retention=5, cleanup_interval=0) as still,
    ):
        await queue.publish("t", 1)
        await still.publish("t", 1)
        clock.advance(6)
        async with asyncio.timeout(5):
            while await queue.read("t"):
                await asyncio.sleep(0.01)

        assert len(await still.read("t")) == 1


async def test_a_damaged_topic_does_not_keep_the_others_from_being_swept(
    store: Store, namespace: str, clock: ManualClock
) -> None:
    async with EventQueue(store, namespace=namespace) as queue:
        for topic in ("a", "b", "c"):
            await queue.publish(topic, 1)
        await store.put_raw(f"{namespace}:event:b!h1", b"?", raw=True)
        clock.advance(86_000)
        for topic in ("a", "b", "c"):
            await queue.publish(topic, 2)
        clock.advance(3_600)

        with pytest.raises(CorruptRecord):
            await queue.sweep()

        assert [(await queue.stats(topic)).count for topic in ("a", "c")] == [1, 1]


async def test_two_processes_sweep_at_once(stores: Stores, namespace: str) -> None:
    a = EventQueue(await stores(), namespace=namespace, max_events=20, cleanup_interval=0)
    b = EventQueue(await stores(), namespace=namespace, max_events=20, cleanup_interval=0)
    await a.publish_many("t", list(range(400)))

    await asyncio.gather(a.sweep(), b.sweep(), b.publish_many("t", ["x"] * 5))

    assert [entry.event for entry in await a.read("t")][-5:] == ["x"] * 5
    await a.sweep()
    assert (await b.stats("t")).count == 20
    assert (await b.read("t"))[0].position == f"{386:016x}"


async def test_a_reader_beside_a_sweep_sees_events_in_order_or_is_told(
    queue: EventQueue, clock: ManualClock, part: int
) -> None:
    old = 1_500 // part
    await queue.publish_many("t", list(range(old)))
    clock.advance(90_000)
    await queue.publish_many("t", list(range(old, old + 100)))
    sweeping = asyncio.create_task(queue.sweep())
    seen: list[int] = []
    async with queue.subscribe("t", "start", buffer=20, on_expired="skip") as events:
        while not seen or seen[-1] < old + 99:
            seen.append((await anext(events)).event)
    await sweeping

    assert seen == sorted(set(seen))
    assert seen[-100:] == list(range(old, old + 100))


async def test_a_log_is_trimmed_at_its_front(store: Store, namespace: str) -> None:
    log = Log(store, dict[str, Any], name="line", namespace=namespace)
    await log.append_many("p", [{"n": n} for n in range(1, 1_301)])
    await log.delete("p", 10)

    assert await log.trim("p", before=1_201) in (1_199, 1_200)
    assert await log.count("p") == 100
    assert [number for number, _ in await log.range("p", limit=2)] == [1_201, 1_202]
    assert await log.trim("p", before=5) == 0
    assert await log.trim("p", before=99_999) == 100
    assert (await log.count("p"), await log.append("p", {"n": 0})) == (0, 1_301)
    assert [parent async for parent in log.parents()] == ["p"]


async def test_memory_stays_bounded_over_a_long_topic(tmp_path: Path) -> None:
    import tracemalloc

    async with (
        kvpersist.open_store(f"sqlite:///{tmp_path}/long.db?kv.durability=normal") as store,
        EventQueue(store, max_events=10, cleanup_interval=0) as queue,
    ):
        for _ in range(20):
            await queue.publish_many("t", ["x" * 100] * 500)
        tracemalloc.start()
        async with queue.subscribe("t", "start") as events:
            for _ in range(10_000):
                await anext(events)
        await queue.sweep()
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()

    assert peak < 3_000_000
