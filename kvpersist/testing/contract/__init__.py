"""What every driver must do, as pytest tests that a driver's own test class inherits.

    class TestCabinet(DriverContract[CabinetDriver]):
        @pytest.fixture
        async def driver(self) -> AsyncIterator[CabinetDriver]:
            driver = await CabinetDriver.open(CabinetOptions(url=...))
            yield driver
            await driver.close()

        async def peek(self, driver: CabinetDriver, key: str) -> bytes | None:
            ...  # read the backend by other means

        async def reopen(self, driver: CabinetDriver) -> CabinetDriver:
            return await CabinetDriver.open(...)  # optional: the same place again

The fixture must give an empty store each time. A capability claimed is exercised, one not claimed
must be refused. Expiry is tested by moving the driver's ``clock``; a backend that judges it by its
own (`HasClock`) is waited for, ``ttl_seconds`` at a time. Needs pytest and pytest-asyncio.

One module per concept: ``entries``, ``awkward_keys``, ``limits``, ``conditions``, ``batches``, ``expiry``,
``scans``, ``concurrency``, ``life``, ``claims``, ``watching``, ``streams``; ``base`` holds what a test class
overrides, ``steps`` and ``clocks`` what the tests share.
"""

from __future__ import annotations

from typing import Any, ClassVar

from kvpersist.testing.contract.awkward_keys import AWKWARD_KEYS, AwkwardKeys
from kvpersist.testing.contract.base import D
from kvpersist.testing.contract.batches import Batches
from kvpersist.testing.contract.claims import Claims
from kvpersist.testing.contract.concurrency import Concurrency
from kvpersist.testing.contract.conditions import Conditions
from kvpersist.testing.contract.entries import Entries
from kvpersist.testing.contract.expiry import Expiry
from kvpersist.testing.contract.life import Life
from kvpersist.testing.contract.limits import Limits
from kvpersist.testing.contract.scans import Scans
from kvpersist.testing.contract.steps import batch
from kvpersist.testing.contract.streams import Streamed
from kvpersist.testing.contract.watching import Watching

__all__ = ["AWKWARD_KEYS", "DriverContract", "batch"]


class DriverContract(  # pytest collects the tests of the last base first
    Streamed[D],
    Watching[D],
    Claims[D],
    Life[D],
    Concurrency[D],
    Scans[D],
    Expiry[D],
    Batches[D],
    Conditions[D],
    Limits[D],
    AwkwardKeys[D],
    Entries[D],
):
    """Inherit, override ``driver`` and ``peek`` (and ``reopen`` where data outlives the driver), and run pytest."""

    __test__: ClassVar[bool] = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.__test__ = cls.__dict__.get("__test__", True)
