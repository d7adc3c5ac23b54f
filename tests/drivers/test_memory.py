"""The memory driver: the contract, and what is its own."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from kvpersist.testing import DriverContract
from kvpersist_drivers.memory import MemoryDriver, MemoryOptions


class TestMemory(DriverContract[MemoryDriver]):
    @pytest.fixture
    async def driver(self) -> AsyncIterator[MemoryDriver]:
        driver = await MemoryDriver.open(MemoryOptions())
        yield driver
        await driver.close()

    async def peek(self, driver: MemoryDriver, key: str) -> bytes | None:
        entry = driver._entries.get(key)  # pyright: ignore[reportPrivateUsage]
        return None if entry is None else entry.value
