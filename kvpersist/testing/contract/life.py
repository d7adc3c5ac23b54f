"""Closing, and opening the same place again."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from kvpersist.driver import Compacts, Delete, Put
from kvpersist.errors import KvError, StoreClosed
from kvpersist.testing.contract.awkward_keys import awkward_entries
from kvpersist.testing.contract.base import Contract, D
from kvpersist.testing.contract.steps import LONG_AWAY, batch, fill, put, values_of

__all__ = ["Life"]


class Life(Contract[D]):
    """A closed driver refuses, and what it acknowledged is there after a reopen."""

    async def test_a_second_close_does_nothing(self, driver: D) -> None:
        await driver.close()
        await driver.close()

    async def test_a_closed_driver_refuses_every_call(self, driver: D) -> None:
        await put(driver, "c:a", b"1")
        await driver.close()

        with pytest.raises(StoreClosed):
            await driver.get(["c:a"])
        with pytest.raises(StoreClosed):
            await driver.commit([batch(Put("c:a", b"2"))])
        with pytest.raises(StoreClosed):
            await driver.scan(None, None, limit=1)
        if isinstance(driver, Compacts):
            with pytest.raises(StoreClosed):
                await driver.compact()

    async def test_calls_under_way_end_or_fail_when_the_driver_is_closed(self, driver: D) -> None:
        calls: list[asyncio.Future[Any]] = []
        for number in range(8):
            calls.append(asyncio.ensure_future(driver.commit([batch(Put(f"c:{number}", b"v"))])))
            calls.append(asyncio.ensure_future(driver.get([f"c:{number}"])))
        await asyncio.sleep(0)

        await driver.close()
        async with asyncio.timeout(10):
            answers = await asyncio.gather(*calls, return_exceptions=True)

        for answer in answers:
            assert isinstance(answer, list | KvError), answer

    async def test_acknowledged_writes_are_there_after_a_reopen(self, driver: D) -> None:
        stored = awkward_entries(driver)
        await fill(driver, stored)
        await fill(driver, {"c:gone": b"1", "c:twice": b"1"})
        await driver.commit([batch(Delete("c:gone"))])
        version = await put(driver, "c:twice", b"2", expires_at=LONG_AWAY)
        before = await driver.scan(None, None, limit=1000)
        await driver.close()

        again = await self.reopen(driver)
        try:
            after = await again.scan(None, None, limit=1000)
            [gone, twice] = await again.get(["c:gone", "c:twice"])
            await put(again, "c:new", b"3")
            assert values_of(await again.get(["c:new"])) == [b"3"]
        finally:
            await again.close()

        assert after == before
        assert len(after) == len(stored) + 1
        assert gone is None
        assert twice is not None
        assert (twice.value, twice.version) == (b"2", version)
