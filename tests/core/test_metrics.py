"""What a store counts of what it does."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
import pytest

import kvpersist
from kvpersist.errors import Conflict, Unavailable
from kvpersist.metrics import Counters, Latency, Metrics
from kvpersist.testing.clock import ManualClock
from kvpersist.testing.faults import FaultyDriver
from kvpersist_drivers.memory import MemoryDriver

_COUNTS = ("gets", "commits", "scans", "puts", "deletes", "checks", "keys_read", "entries_scanned", "round_trips")


async def _counted(store: kvpersist.Store, act: Any) -> dict[str, int]:
    before = store.metrics()
    await act
    after = store.metrics()
    changed = {name: getattr(after, name) - getattr(before, name) for name in _COUNTS}
    return {name: count for name, count in changed.items() if count}


async def test_each_operation_is_counted_by_what_it_asks_for() -> None:
    async with kvpersist.open_store(MemoryDriver(), sweep=None) as store:
        assert await _counted(store, store.put("app:a", 1)) == {"commits": 1, "puts": 1, "round_trips": 1}
        assert await _counted(store, store.get("app:a")) == {"gets": 1, "keys_read": 1, "round_trips": 1}
        assert await _counted(store, store.get_many(["app:a", "app:b"])) == {
            "gets": 1,
            "keys_read": 2,
            "round_trips": 1,
        }
        assert await _counted(store, store.info("app:a")) == {"scans": 1, "entries_scanned": 1, "round_trips": 1}
        assert await _counted(store, store.put_many({f"app:{n}": n for n in range(150)})) == {
            "commits": 2,
            "puts": 150,
            "round_trips": 1,
        }
        found = await _counted(store, store.delete("app:a"))
        assert (found["commits"], found["deletes"]) == (1, 1)


async def test_bytes_are_those_of_values() -> None:
    async with kvpersist.open_store(MemoryDriver(), sweep=None) as store:
        before = store.metrics()
        await store.put_raw("app:a", bytes(10_000))
        await store.get_raw("app:a")
        [_ async for _ in store.scan("app:")]
        after = store.metrics()

    assert 10_000 <= after.bytes_written - before.bytes_written <= 10_100
    assert 20_000 <= after.bytes_read - before.bytes_read <= 20_200


async def test_operations_that_share_a_round_trip_are_counted_each() -> None:
    driver = MemoryDriver()
    driver.capabilities = msgspec.structs.replace(driver.capabilities, coalesce="both")
    async with kvpersist.open_store(driver, sweep=None) as store:
        before = store.metrics()
        await asyncio.gather(*(store.get("app:a") for _ in range(100)))
        after = store.metrics()

    assert after.gets - before.gets == 100
    assert after.round_trips - before.round_trips < 10


async def test_errors_are_counted_by_their_code() -> None:
    driver = FaultyDriver(MemoryDriver())
    async with kvpersist.open_store(driver, sweep=None) as store:
        version = await store.put("app:a", 1)
        with pytest.raises(Conflict):
            await store.put("app:a", 2, expect=b"another ")
        driver.fail("get", 1)
        with pytest.raises(Unavailable):
            await store.get("app:a")
        await store.put("app:a", 2, expect=version)

        assert store.metrics().errors == {"KV300": 1, "KV200": 1}


async def test_latencies_have_bounds_a_histogram_and_a_time_they_began() -> None:
    clock = ManualClock(1_000.0)
    async with kvpersist.open_store(MemoryDriver(), sweep=None, clock=clock) as store:
        assert store.metrics().scan == Latency()
        for _ in range(10):
            await store.get("app:a")
        clock.advance(60)
        found = store.metrics()

    assert (found.collected_at - found.since).total_seconds() == 60
    get = found.get
    assert get.minimum is not None and get.average is not None and get.maximum is not None
    assert 0 <= get.minimum <= get.average <= get.maximum
    assert sum(count for _, count in get.histogram) == get.count >= 10
    assert get.percentile(100) is not None
    assert get.percentile(50) <= get.maximum  # type: ignore[operator]


def test_a_histogram_says_what_took_how_long() -> None:
    counters = Counters(lambda: 0.0)
    for seconds in (0.0000005, 0.000003, 0.003, 100.0):
        counters.ended("get", seconds)

    found = counters.metrics(lambda: 0.0).get

    assert [count for _, count in found.histogram] == [1, 1, 1, 1]
    assert (found.minimum, found.maximum) == (0.0000005, 100.0)
    assert found.percentile(50) == 0.000004
    assert found.percentile(100) is not None


def test_several_stores_are_added_up() -> None:
    one, two = Counters(lambda: 5.0), Counters(lambda: 3.0)
    one.gets, two.gets = 2, 3
    one.ended("get", 0.001)
    two.ended("get", 0.003)
    two.failed(Unavailable("x"))

    total = Metrics.total([one.metrics(lambda: 9.0), two.metrics(lambda: 9.0)])

    assert total.gets == 5
    assert total.since.timestamp() == 3.0
    assert total.get.count == 2
    assert total.get.average == pytest.approx(0.002)
    assert (total.get.minimum, total.get.maximum) == (0.001, 0.003)
    assert total.errors == {"KV200": 1}
