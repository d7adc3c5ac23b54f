"""What a driver's own test class supplies, for the tests of every concept."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, Generic, TypeVar

import pytest

from kvpersist.driver import Driver

__all__ = ["Contract"]

D = TypeVar("D", bound=Driver)


class Contract(ABC, Generic[D]):
    """The driver under test, and the ways around it."""

    __test__: ClassVar[bool] = False
    pytestmark = pytest.mark.asyncio
    ttl_seconds: ClassVar[float] = 0.5
    """Lifetime used where the backend's own clock cannot be moved: longer than a few calls take."""

    @pytest.fixture
    def driver(self) -> D:
        """Override: an open driver on an empty store, closed afterwards."""
        raise NotImplementedError(f"{type(self).__name__} must override the fixture 'driver'")

    @abstractmethod
    async def peek(self, driver: D, key: str) -> bytes | None:
        """Read the value at ``key`` from the backend around the driver, so a driver cannot vouch for itself."""

    async def reopen(self, driver: D) -> D:
        """Open the place of ``driver``, which is closed by now, once more."""
        pytest.skip("keeps nothing after it is closed")
