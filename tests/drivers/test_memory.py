"""The memory driver: the contract, the model, and what is its own."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Coroutine
from threading import Barrier, Thread
from typing import Any

import msgspec
import pytest
from hypothesis.stateful import run_state_machine_as_test

from kvpersist.driver import ABSENT, Committed, Delete, Driver, Put
from kvpersist.testing import DriverContract, ManualClock, batch, driver_machine
from kvpersist_drivers import memory
from kvpersist_drivers.memory import MemoryDriver, MemoryOptions


class TestMemory(DriverContract[MemoryDriver]):
    @pytest.fixture
    async def driver(self) -> AsyncIterator[MemoryDriver]:
        driver = await MemoryDriver.open(MemoryOptions())
        yield driver
        await driver.close()

    async def peek(self, driver: MemoryDriver, key: str) -> bytes | None:
        entry = driver._space.entries.get(key)
        return None if entry is None else entry.value


class TestNamedMemory(TestMemory):
    """Again with a second holder of the name, by which the entries outlive a close."""

    @pytest.fixture
    async def driver(self) -> AsyncIterator[MemoryDriver]:
        driver, holder = MemoryDriver("contract"), MemoryDriver("contract")
        yield driver
        await driver.close()
        await holder.close()

    async def reopen(self, driver: MemoryDriver) -> MemoryDriver:
        return await MemoryDriver.open(MemoryOptions(name="contract"))


async def _open() -> MemoryDriver:
    return MemoryDriver()


TestMemoryModel = driver_machine(_open).TestCase


def test_a_name_that_is_held_keeps_everything_over_a_close() -> None:
    holders: list[MemoryDriver] = []

    async def opener() -> MemoryDriver:
        holders.append(MemoryDriver(f"model{len(holders)}"))
        return MemoryDriver(holders[-1]._name)

    async def reopener(closed: Driver) -> MemoryDriver:
        assert isinstance(closed, MemoryDriver)
        return MemoryDriver(closed._name)

    machine = driver_machine(opener, reopener=reopener, max_examples=20)
    run_state_machine_as_test(machine, settings=machine.TestCase.settings)
    for holder in holders:
        asyncio.run(holder.close())


def _at_once(call: Coroutine[Any, Any, Any]) -> Any:
    """Run a call that must not suspend, without an event loop."""
    with pytest.raises(StopIteration) as ended:
        call.send(None)
    return ended.value.value


async def _keys(driver: MemoryDriver, **options: Any) -> list[str]:
    return [entry.key for entry in await driver.scan(None, None, limit=100_000, **options)]


def test_get_and_commit_never_suspend() -> None:
    for name in ("", "suspends"):
        driver = MemoryDriver(name)
        one = batch(Put("c:a", b"1"), Put("c:b", b"2", ABSENT))

        assert _at_once(driver.commit([one])) == [Committed(one.version)]
        [entry] = _at_once(driver.get(["c:a"]))
        assert entry.value == b"1"
        assert _at_once(driver.close()) is None


async def test_private_stores_are_apart() -> None:
    one, other = MemoryDriver(), MemoryDriver()
    await one.commit([batch(Put("c:a", b"1"))])

    assert await other.get(["c:a"]) == [None]


async def test_a_name_is_one_store_until_its_last_close() -> None:
    one, other = MemoryDriver("shared"), await MemoryDriver.open(MemoryOptions(name="shared"))
    elsewhere = MemoryDriver("another")
    await one.commit([batch(Put("c:a", b"1"))])
    await one.close()
    await one.close()
    third = MemoryDriver("shared")

    assert [entry and entry.value for entry in await other.get(["c:a"]) + await third.get(["c:a"])] == [b"1", b"1"]
    assert await elsewhere.get(["c:a"]) == [None]
    for driver in (other, third, elsewhere):
        await driver.close()
    again = MemoryDriver("shared")
    assert await again.get(["c:a"]) == [None]
    await again.close()
    assert memory._spaces.keys().isdisjoint({"shared", "another"})


def test_increments_of_a_shared_name_from_several_threads_are_all_counted() -> None:
    threads, rounds = 4, 400
    barrier = Barrier(threads, timeout=30)
    last: list[int] = []

    async def work() -> None:
        driver = MemoryDriver("threads")
        barrier.wait()
        for number in range(rounds):
            await driver.commit([batch(Put(f"c:{id(driver)}:{number}", b"v"))])
            if number % 20 == 0:
                await driver.scan("c:", "c;", limit=10)
            while True:
                [entry] = await driver.get(["n:count"])
                count, expect = (0, ABSENT) if entry is None else (int(entry.value), entry.version)
                [outcome] = await driver.commit([batch(Put("n:count", b"%d" % (count + 1), expect))])
                if isinstance(outcome, Committed):
                    break
        barrier.wait()
        [entry] = await driver.get(["n:count"])
        assert entry is not None
        last.append(int(entry.value))
        assert len(await driver.scan("c:", "c;", limit=100_000)) == threads * rounds
        barrier.wait()
        await driver.close()

    workers = [Thread(target=asyncio.run, args=(work(),)) for _ in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()

    assert last == [threads * rounds] * threads


@pytest.mark.parametrize("seed", range(6))
async def test_the_order_is_right_however_keys_come_and_go(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_CHUNK", 4 + seed)
    chance = random.Random(seed)
    driver, live = MemoryDriver(), set[str]()
    for _ in range(1500):
        key = chance.choice("abc\uffff\U0001f600") * chance.randrange(1, 4) + str(chance.randrange(80))
        act = chance.random()
        if act < 0.45:
            await driver.commit([batch(Put(key, b"v"))])
            live.add(key)
        elif act < 0.8:
            await driver.commit([batch(Delete(key))])
            live.discard(key)
        elif act < 0.82:
            doomed = chance.sample(sorted(live), len(live) // 2)
            await driver.commit([batch(*map(Delete, doomed))])
            live.difference_update(doomed)
        else:
            start, end = chance.choice([None, key]), chance.choice([None, key + "5", "c", "\uffff"])
            limit, reverse = chance.randrange(1, 60), chance.random() < 0.5
            found = await driver.scan(start, end, limit=limit, reverse=reverse)
            assert [entry.key for entry in found] == sorted(
                (k for k in live if (start is None or k >= start) and (end is None or k < end)),
                key=str.encode,
                reverse=reverse,
            )[:limit]


async def test_compact_begins_with_what_expired_first() -> None:
    clock = ManualClock(100.0)
    driver = MemoryDriver(clock=clock)
    for number in (3, 1, 2):
        await driver.commit([batch(Put(f"c:{number}", b"v", expires_at=100.0 + number))])
    clock.advance(10)

    assert await driver.compact(2) == 2
    assert list(driver._space.entries) == ["c:3"]
    assert await driver.compact(0) == 0
    assert await driver.compact() == 1


async def test_renewing_one_entry_for_ever_does_not_grow_the_store() -> None:
    clock = ManualClock(0.0)
    driver = MemoryDriver(clock=clock)
    for _ in range(2000):
        clock.advance(1)
        await driver.commit([batch(Put("c:lease", b"v", expires_at=clock() + 1000))])

    assert len(driver._space._expiries) < 200
    clock.advance(1001)
    assert await driver.compact() == 1


async def test_an_unknown_option_is_refused() -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert({"nam": "x"}, MemoryOptions)
