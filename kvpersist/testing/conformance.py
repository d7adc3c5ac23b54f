"""Run the contracts against any store, in a scratch corner of it.

    report = await check("redis://localhost:6379/0", records=True)
    assert report.ok

Every test gets a `kvpersist.testing.ScratchDriver` under a prefix of its own, which is emptied after it:
what is in the store is not touched. Needs pytest, which the contracts are written for; it is not run.
"""

from __future__ import annotations

import asyncio
import linecache
import os
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any, Final, Literal, cast

import msgspec

from kvpersist import config, registry
from kvpersist.driver import ABSENT, DRIVER_API, Batch, Capabilities, Delete, Driver, Put, needs_extra
from kvpersist.errors import KvError
from kvpersist.testing.scratch import ScratchDriver
from kvpersist.urls import Target, Where

with needs_extra("test", module="pytest"):
    import pytest

    from kvpersist.testing.contract import DriverContract
    from kvpersist.testing.records import PersistenceContract

__all__ = ["OnResult", "Report", "Result", "check"]

OnResult = Callable[["Result", int, int], None]
"""Is handed each result, how many there are so far, and how many there will be."""

_LIMIT: Final = 120.0  # seconds for one test
_TTL: Final = (0.3, 10.0)  # seconds: the shortest and the longest life of an entry that a test waits for
_CALLS: Final = 60  # that a test makes at most while such an entry must live


class Result(msgspec.Struct, frozen=True):
    """What one test came to; ``reason`` says why it was skipped, or how it failed."""

    contract: Literal["driver", "records"]
    test: str
    outcome: Literal["passed", "skipped", "failed"]
    reason: str = ""
    seconds: float = 0.0


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """What a store keeps, and what the contracts say of it; ``left`` are prefixes that could not be emptied."""

    store: str
    driver: str
    kvpersist: str
    capabilities: Capabilities
    results: list[Result]
    left: list[str]
    passed: int
    skipped: int
    failed: int

    @property
    def ok(self) -> bool:
        """Nothing failed."""
        return not self.failed


async def check(where: Where | None = None, *, records: bool = False, on_result: OnResult | None = None) -> Report:
    """Run the contract of drivers against a store, and with ``records`` that of the agent's records.

    Raises:
        As `kvpersist.open_store`; ReadOnly: nothing can be written there.
    """
    from kvpersist import __version__

    place = _Place(config.resolve(where).target)
    capabilities = await place.probe()
    contracts: list[tuple[Literal["driver", "records"], Any]] = [("driver", _OfDrivers)]
    if records:
        contracts.append(("records", _OfRecords))
    tests = [(kind, contract, name) for kind, contract in contracts for name in _tests_of(contract)]
    results: list[Result] = []
    for kind, contract, name in tests:
        result = await _run(place, kind, contract(place), name)
        results.append(result)
        if on_result is not None:
            on_result(result, len(results), len(tests))
    counts = {outcome: sum(one.outcome == outcome for one in results) for outcome in ("passed", "skipped", "failed")}
    kind: Any = place.kind
    return Report(
        store=place.target.shown,
        driver=f"{kind.__module__}:{kind.__qualname__}",
        kvpersist=__version__,
        capabilities=capabilities,
        results=results,
        left=place.left,
        **counts,
    )


class _Place:
    """The store, opened as often as tests want, each time in a new corner."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self.kind = registry.driver_class(target.scheme)
        self.ttl_seconds = _TTL[0]
        self.left: list[str] = []
        self.shared = False
        self.outlives = False
        self._run = os.urandom(4).hex()
        self._corners = 0

    async def open(self, prefix: str) -> ScratchDriver:
        return ScratchDriver(await self.kind.open(self.target.options), prefix)

    def corner(self) -> str:
        """A prefix that nothing has used."""
        self._corners += 1
        return f"kvpersist-scratch-{self._run}-{self._corners}-"

    async def probe(self) -> Capabilities:
        """Learn what the driver claims, that it can write, and how long a call takes."""
        prefix = self.corner()
        driver = await self.open(prefix)
        try:
            able = driver.inner.capabilities
            self.shared, self.outlives = able.shared, able.shared or able.durable
            started = time.monotonic()
            for one in (Put("c:probe", b"v", ABSENT if able.conditional else None), Delete("c:probe")):
                [outcome] = await driver.commit([Batch((one,), os.urandom(8))])
                if isinstance(outcome, KvError):
                    raise outcome
            seconds = (time.monotonic() - started) / 2
        finally:
            await driver.close()
        self.ttl_seconds = min(max(_TTL[0], _CALLS * seconds), _TTL[1])
        return able

    async def empty(self, prefix: str) -> None:
        """Remove what a test left; a driver that cannot is noted, for the next test has a corner of its own."""
        try:
            async with asyncio.timeout(_LIMIT):
                driver = await self.open(prefix)
                try:
                    await driver.clear()
                finally:
                    await driver.close()
        except Exception:  # noqa: BLE001  (whatever a driver under test raises)
            self.left.append(prefix)


class _OfDrivers(DriverContract[ScratchDriver]):
    __test__ = False

    def __init__(self, place: _Place) -> None:
        self._place = place
        self.ttl_seconds = place.ttl_seconds  # pyright: ignore[reportAttributeAccessIssue]

    async def peek(self, driver: ScratchDriver, key: str) -> bytes | None:
        """Read by a second connection, where there can be one."""
        if not self._place.shared:
            [entry] = await driver.get([key])
        else:
            other = await self._place.open(driver.prefix)
            try:
                [entry] = await other.get([key])
            finally:
                await other.close()
        return None if entry is None else entry.value

    async def reopen(self, driver: ScratchDriver) -> ScratchDriver:
        return await _reopened(self._place, driver)

    async def test_the_class_is_what_an_entry_point_names(self, driver: ScratchDriver) -> None:
        kind = self._place.kind

        assert kind.api == DRIVER_API
        assert isinstance(driver.inner, cast(Any, kind))


class _OfRecords(PersistenceContract[ScratchDriver]):
    __test__ = False

    def __init__(self, place: _Place) -> None:
        self._place = place

    async def reopen(self, driver: ScratchDriver) -> ScratchDriver:
        return await _reopened(self._place, driver)


async def _reopened(place: _Place, driver: ScratchDriver) -> ScratchDriver:
    if not place.outlives:
        pytest.skip("keeps nothing after it is closed: it claims neither shared nor durable")
    return await place.open(driver.prefix)


def _tests_of(contract: type) -> Iterator[str]:
    """The names of its tests in the order in which pytest runs them: those of the last base first."""
    names = (name for base in reversed(contract.__mro__) for name in vars(base) if name.startswith("test_"))
    return iter(dict.fromkeys(names))


async def _run(place: _Place, kind: Literal["driver", "records"], contract: Any, name: str) -> Result:
    prefix = place.corner()
    started = time.monotonic()
    outcome, reason = "passed", ""
    try:
        async with asyncio.timeout(_LIMIT):
            driver: Driver = await place.open(prefix)
            try:
                await getattr(contract, name)(driver)
            finally:
                await driver.close()
    except pytest.skip.Exception as skipped:
        outcome, reason = "skipped", str(skipped)
    except (Exception, pytest.fail.Exception) as error:  # noqa: BLE001  (what a driver under test raises is its failure)
        outcome, reason = "failed", _told(error)
    finally:
        await place.empty(prefix)
    test = name.removeprefix("test_").replace("_", " ")
    return Result(kind, test, cast(Any, outcome), reason, round(time.monotonic() - started, 3))


def _told(error: BaseException) -> str:
    """What went wrong and where; an assertion is told by its line."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if f"{os.sep}testing{os.sep}" in frame.filename and frame.name != "_run"]
    if not own:
        return f"{type(error).__name__}: {error}"
    frame = own[-1] if isinstance(error, AssertionError) else own[0]
    first, last = frame.lineno or 0, frame.end_lineno or frame.lineno or 0
    lines = " ".join(linecache.getline(frame.filename, number).strip() for number in range(first, last + 1))
    place = f"{os.path.basename(frame.filename)}:{first}"
    if isinstance(error, AssertionError):
        return f"{place}: {lines}" + (f" ({error})" if str(error) else "")
    return f"{type(error).__name__}: {error} ({place}: {lines})"
