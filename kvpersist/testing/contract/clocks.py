"""The way to the moment of an expiry: by moving the driver's clock, or by waiting for its backend's."""

from __future__ import annotations

import asyncio
import time

from kvpersist.driver import Driver, HasClock, UsesClock
from kvpersist.testing.clock import ManualClock

__all__ = ["Times", "times_of"]


class Times:
    """``now``, an ``expiry`` soon after it, and the way there."""

    def __init__(self, driver: Driver, now: float, clock: ManualClock | None, ttl: float) -> None:
        self.now = now
        self.expiry = now + (60.0 if clock else ttl)
        self._driver, self._clock = driver, clock

    async def reach_expiry(self) -> None:
        if self._clock is not None:
            self._clock.now = self.expiry
            return
        assert isinstance(self._driver, HasClock)
        expiry = self.expiry + 0.002  # kept in milliseconds
        while (left := expiry - await self._driver.now()) > 0:  # noqa: ASYNC110  (a server's clock is no event)
            await asyncio.sleep(left)


async def times_of(driver: Driver, ttl: float) -> Times:
    """The time as ``driver`` judges it, by a clock that can be moved where it has one."""
    if isinstance(driver, HasClock):
        return Times(driver, await driver.now(), None, ttl)
    assert isinstance(driver, UsesClock), "a driver has a clock, or now()"
    clock = ManualClock(time.time())
    driver.clock = clock
    return Times(driver, clock.now, clock, ttl)
