"""What a driver says of itself, and what else it can be asked."""

from __future__ import annotations

import asyncio
import inspect
from typing import Any

import msgspec
import pytest

from kvpersist.driver import DRIVER_API, Capabilities, DescribesTables, Entry, Pings, Provisions, Watches
from kvpersist.errors import KvError
from kvpersist.testing.contract.base import Contract, D
from kvpersist.testing.contract.steps import put

__all__ = ["Claims"]


class Claims(Contract[D]):
    """Capabilities hold together, and what they name is there."""

    async def test_capabilities_hold_together(self, driver: D) -> None:
        able = driver.capabilities

        assert isinstance(able, Capabilities)
        assert able.conditional or not able.conditional_delete
        assert able.ordered or not (able.reverse or able.deref)
        for limit in (able.max_key_bytes, able.max_value_bytes, able.max_batch):
            assert limit is None or limit > 0
        assert (able.watch is not None) == isinstance(driver, Watches)

    async def test_the_class_is_what_an_entry_point_names(self, driver: D) -> None:
        kind: Any = type(driver)
        if not hasattr(kind, "api"):
            pytest.skip("not a class that an entry point names")

        assert kind.api == DRIVER_API
        assert issubclass(kind.Options, msgspec.Struct)
        assert inspect.iscoroutinefunction(kind.open)

    async def test_what_the_store_needs_can_be_told_and_made_again(self, driver: D) -> None:
        if not isinstance(driver, Provisions):
            pytest.skip("needs no tables or the like")
        version = await put(driver, "c:a", b"1")

        await driver.provision()
        await asyncio.gather(*(driver.provision() for _ in range(4)))

        assert driver.ddl().strip()
        assert await driver.get(["c:a"]) == [Entry("c:a", b"1", version)]
        if hasattr(type(driver), "api"):
            assert isinstance(type(driver), DescribesTables), "its class has no ddl_of(options)"

    async def test_a_ping_returns_while_the_driver_is_open(self, driver: D) -> None:
        if not isinstance(driver, Pings):
            pytest.skip("cannot be asked")

        await driver.ping()
        await driver.close()

        with pytest.raises(KvError):
            await driver.ping()
