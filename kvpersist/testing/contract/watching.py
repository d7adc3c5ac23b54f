"""Being told of changes: `Watches`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

import pytest

from kvpersist.driver import Watches
from kvpersist.errors import KvError
from kvpersist.testing.contract.base import Contract, D
from kvpersist.testing.contract.steps import fill

__all__ = ["Watching"]


class Watching(Contract[D]):
    """A watch tells of changes below its prefix, until its driver is closed."""

    async def test_a_watch_tells_of_a_change_below_its_prefix(self, driver: D) -> None:
        if not isinstance(driver, Watches):
            pytest.skip("does not watch")

        changes = driver.watch("c:")
        told = asyncio.ensure_future(anext(changes))
        try:
            async with asyncio.timeout(20):
                begun = await asyncio.shield(told)
                told = asyncio.ensure_future(anext(changes))
                await fill(driver, {"d:1": b"v", "c:1": b"v"})
                keys = await asyncio.shield(told)
        finally:
            told.cancel()
            await asyncio.wait({told})
            if isinstance(changes, AsyncGenerator):
                await changes.aclose()

        assert begun == ()
        assert keys in {("c:1",), ()}
        assert keys or driver.capabilities.watch == "poll"

    async def test_a_watch_ends_with_its_driver(self, driver: D) -> None:
        if not isinstance(driver, Watches):
            pytest.skip("does not watch")

        changes = driver.watch("c:")
        async with asyncio.timeout(20):
            await anext(changes)
            told = asyncio.ensure_future(anext(changes))
            await asyncio.sleep(0)
            await driver.close()

            with pytest.raises((KvError, StopAsyncIteration)):
                await told
