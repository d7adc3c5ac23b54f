"""The contracts run in a corner of a store that holds data: they catch planted bugs, and leave it as it was."""

from __future__ import annotations

import asyncio
import inspect
import os
import time
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest

import kvpersist
from kvpersist import Message, registry
from kvpersist.driver import Batch, Capabilities, Committed, Delete, Driver, Entry, HasClock, Put, UsesClock
from kvpersist.errors import BadKey, CommitUnknown, Conflict, KeyTooLong, KvError, ReadOnly, Unavailable, ValueTooLarge
from kvpersist.testing import DriverContract, FaultyDriver, PersistenceContract, ScratchDriver, batch
from kvpersist.testing.conformance import Result, check
from kvpersist_drivers.memory import MemoryDriver, MemoryOptions

PREFIX = "scratch-"
NEIGHBOURS = [
    "",
    "a",
    "c:a",
    "scratch",
    "scratch,",
    "scratch.",
    "scratch.c:a",
    "t:r",
    "\U0010ffff",
    "scratc",
    "SCRATCH-c:a",
]


async def _with_neighbours(driver: Driver) -> None:
    outcomes = await driver.commit([batch(Put(key, b"theirs"), version=b"neighbor") for key in NEIGHBOURS])
    assert outcomes == [Committed(b"neighbor")] * len(NEIGHBOURS)


async def _neighbours(driver: Driver) -> list[tuple[str, bytes, bytes]]:
    found = await driver.scan(None, None, limit=10_000)
    return [(entry.key, entry.value, entry.version) for entry in found if not entry.key.startswith(PREFIX)]


THEIRS = [(key, b"theirs", b"neighbor") for key in sorted(NEIGHBOURS)]


class _Beside(DriverContract[Any]):
    """The contract in a corner of a driver that holds other keys, which stay as they are."""

    __test__ = False

    def make(self, inner: MemoryDriver) -> Any:
        return ScratchDriver(inner, PREFIX)

    @pytest.fixture
    async def driver(self) -> AsyncIterator[Any]:
        holder, inner = MemoryDriver("scratch"), MemoryDriver("scratch")
        await _with_neighbours(holder)
        driver = self.make(inner)
        yield driver
        await driver.close()
        assert await _neighbours(holder) == THEIRS
        await holder.close()

    async def peek(self, driver: Any, key: str) -> bytes | None:
        holder = MemoryDriver("scratch")
        [entry] = await holder.get([PREFIX + key])
        await holder.close()
        return None if entry is None else entry.value

    async def reopen(self, driver: Any) -> Any:
        return self.make(MemoryDriver("scratch"))


class TestACorner(_Beside):
    ttl_seconds = 0.1


class TestACornerWithoutAtomicBatches(_Beside):
    ttl_seconds = 0.1

    def make(self, inner: MemoryDriver) -> Any:
        return ScratchDriver(FaultyDriver(inner, without={"atomic_batch", "reverse", "conditional_delete"}), PREFIX)


class TestRecordsInACorner(PersistenceContract[Any]):
    @pytest.fixture
    async def driver(self) -> AsyncIterator[Any]:
        holder, inner = MemoryDriver("records"), MemoryDriver("records")
        await _with_neighbours(holder)
        yield ScratchDriver(inner, PREFIX)
        await inner.close()
        assert await _neighbours(holder) == THEIRS
        await holder.close()

    async def reopen(self, driver: Any) -> Any:
        return ScratchDriver(MemoryDriver("records"), PREFIX)


class _Limited(MemoryDriver):
    def __init__(self, name: str = "") -> None:
        super().__init__(name)
        self.capabilities = msgspec.structs.replace(self.capabilities, max_key_bytes=300, max_value_bytes=1000)

    async def commit(self, batches: Sequence[Batch]) -> list[Committed | KvError]:
        for one in batches:
            for op in one.ops:
                if (size := len(op.key.encode())) > 300:
                    return [KeyTooLong(op.key, size, 300) for _ in batches]
                if isinstance(op, Put) and len(op.value) > 1000:
                    return [ValueTooLarge(op.key, len(op.value), 1000) for _ in batches]
        return await super().commit(batches)


async def test_a_corner_keeps_shorter_keys_and_names_them_as_it_was_given_them() -> None:
    scratch = ScratchDriver(_Limited(), PREFIX)
    limit = 300 - len(PREFIX)
    await scratch.commit([batch(Put("c:a", b"1"))])

    assert scratch.capabilities.max_key_bytes == limit
    [kept] = await scratch.commit([batch(Put("k" * limit, b"1"))])
    [long] = await scratch.commit([batch(Put("k" * (limit + 1), b"1"))])
    [large] = await scratch.commit([batch(Put("c:a", bytes(1001)))])
    [lost] = await scratch.commit([batch(Put("c:a", b"2", b"otherone"))])

    assert isinstance(kept, Committed)
    assert isinstance(long, KeyTooLong)
    assert (long.key, long.size, long.limit) == ("k" * (limit + 1), limit + 1, limit)
    assert isinstance(large, ValueTooLarge)
    assert (large.key, large.size, large.limit) == ("c:a", 1001, 1000)
    assert isinstance(lost, Conflict)
    assert (lost.key, lost.expected, lost.position) == ("c:a", b"otherone", 0)


async def test_an_error_that_is_raised_names_the_key_too() -> None:
    class _Raises(MemoryDriver):
        error: KvError

        async def get(self, keys: Sequence[str]) -> list[Entry | None]:
            raise self.error

    driver = _Raises()
    scratch = ScratchDriver(driver, PREFIX)
    for error, shown in (
        (CommitUnknown((PREFIX + "c:a", "else"), "lost", True), "the write of 'c:a', 'else' may"),
        (BadKey(PREFIX + "c:a", "it is bad"), "bad key 'c:a': it is bad"),
        (Unavailable("down"), "down"),
    ):
        driver.error = error
        with pytest.raises(type(error)) as caught:
            await scratch.get(["c:a"])
        assert str(caught.value).startswith(shown)


async def test_nobody_can_move_the_clock_of_a_whole_store_from_a_corner() -> None:
    inner = MemoryDriver()
    scratch: Any = ScratchDriver(inner, PREFIX)

    assert not isinstance(scratch, UsesClock)
    assert isinstance(scratch, HasClock)
    assert abs(await scratch.now() - time.time()) < 1


async def test_a_corner_is_cleared_and_nothing_else_is() -> None:
    inner = MemoryDriver()
    await _with_neighbours(inner)
    scratch = ScratchDriver(inner, PREFIX)
    await scratch.commit([batch(Put(f"c:{number:04}", b"v")) for number in range(1200)])

    assert await scratch.clear() == 1200

    assert await scratch.scan(None, None, limit=5) == []
    assert await _neighbours(inner) == THEIRS


# -- planted bugs: in the wrapper, and in drivers -------------------------------------------------


class _SeesWhatFollows(ScratchDriver):
    async def scan(self, start: str | None, end: str | None, **options: Any) -> list[Entry]:
        self._end = None
        return await super().scan(start, end, **options)


class _FollowsOutside(ScratchDriver):
    async def scan(
        self, start: str | None, end: str | None, *, deref: str | None = None, **options: Any
    ) -> list[Entry]:
        found = await super().scan(start, end, **options)
        if deref is None:
            return found
        targets = await self.inner.get([deref + entry.value.decode() for entry in found])
        return [msgspec.structs.replace(entry, target=target) for entry, target in zip(found, targets, strict=True)]


class _ReadsOutside(ScratchDriver):
    async def get(self, keys: Sequence[str]) -> list[Entry | None]:
        return await self.inner.get(keys)


class _LeavesThePrefix(ScratchDriver):
    def _unnamed(self, key: str) -> str:
        return key


class _DeletesOutside(ScratchDriver):
    def _named(self, op: Any) -> Any:
        return op if isinstance(op, Delete) else super()._named(op)


@pytest.mark.parametrize(
    ("kind", "test"),
    [
        (_SeesWhatFollows, "a_deleted_key_is_gone_from_get_scan_and_backend"),
        (_SeesWhatFollows, "a_scan_of_nothing_answers_nothing"),
        (_FollowsOutside, "deref_adds_the_target_of_each_index_entry"),
        (_ReadsOutside, "a_value_written_is_stored_and_read_back_under_its_version"),
        (_LeavesThePrefix, "a_conflict_names_the_operation_that_failed"),
        (_DeletesOutside, "deleting_every_second_awkward_key_leaves_the_others"),
    ],
)
async def test_the_contract_catches_a_corner_that_leaks(kind: type[ScratchDriver], test: str) -> None:
    class _Contract(_Beside):
        __test__ = False

    async def run(kind: type[ScratchDriver]) -> None:
        inner = MemoryDriver("scratch")
        await _with_neighbours(inner)
        try:
            await getattr(_Contract(), f"test_{test}")(kind(inner, PREFIX))
        finally:
            await inner.close()

    await run(ScratchDriver)
    with pytest.raises((AssertionError, ValueError)):
        await run(kind)


class _IgnoresExpect(MemoryDriver):
    async def commit(self, batches: Sequence[Batch]) -> list[Committed | KvError]:
        stripped = [
            Batch(
                tuple(msgspec.structs.replace(op, expect=None) for op in one.ops if hasattr(op, "value")), one.version
            )
            for one in batches
        ]
        return await super().commit(stripped)


class _KeepsWhatIsDeleted(MemoryDriver):
    async def commit(self, batches: Sequence[Batch]) -> list[Committed | KvError]:
        kept = [Batch(tuple(op for op in one.ops if not isinstance(op, Delete)), one.version) for one in batches]
        return await super().commit(kept)


class _ScanForgetsItsEnd(MemoryDriver):
    async def scan(self, start: str | None, end: str | None, **options: Any) -> list[Entry]:
        return await super().scan(start, None, **options)


class _Hangs(MemoryDriver):
    async def scan(self, start: str | None, end: str | None, **options: Any) -> list[Entry]:
        if options.get("reverse"):
            await asyncio.sleep(3600)
        return await super().scan(start, end, **options)


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> Callable[[type[MemoryDriver]], None]:
    """Make ``planted://name`` open this driver."""
    real = registry.driver_class

    def plant(kind: type[MemoryDriver]) -> None:
        async def open(options: MemoryOptions, /) -> MemoryDriver:
            return kind(options.name)

        monkeypatch.setattr(kind, "open", open)
        monkeypatch.setattr(registry, "driver_class", lambda scheme: kind if scheme == "planted" else real(scheme))

    return plant


def _failed(results: Sequence[Result]) -> set[str]:
    return {result.test for result in results if result.outcome == "failed"}


@pytest.mark.parametrize(
    ("kind", "module", "test"),
    [
        (_IgnoresExpect, "steps", "a put that expects absence succeeds once"),
        (_IgnoresExpect, "expiry", "conditions take an expired entry for absent"),
        (_KeepsWhatIsDeleted, "entries", "a deleted key is gone from get scan and backend"),
        (_ScanForgetsItsEnd, "scans", "a scan begins at its start and ends before its end"),
    ],
)
async def test_a_check_finds_what_a_driver_does_wrong(
    kind: type[MemoryDriver], module: str, test: str, planted: Callable[[type[MemoryDriver]], None]
) -> None:
    planted(kind)

    report = await check("planted://")

    assert test in _failed(report.results)
    assert not report.ok
    assert report.failed == len(_failed(report.results)) < report.passed
    [result] = [result for result in report.results if result.test == test]
    assert f"{module}.py:" in result.reason
    assert "assert" in result.reason or "==" in result.reason
    assert report.driver == f"{kind.__module__}:{kind.__qualname__}"


async def test_what_cannot_be_emptied_is_named(planted: Callable[[type[MemoryDriver]], None]) -> None:
    planted(_KeepsWhatIsDeleted)
    holder = MemoryDriver("stays")

    report = await check("planted://stays")

    stayed = [entry.key for entry in await holder.scan(None, None, limit=100_000, keys_only=True)]
    await holder.close()
    assert len(report.left) > 10
    for prefix in report.left:
        assert any(key.startswith(prefix) for key in stayed)


async def test_a_driver_that_does_not_answer_fails_its_test_and_not_the_run(
    planted: Callable[[type[MemoryDriver]], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    planted(_Hangs)
    monkeypatch.setattr("kvpersist.testing.conformance._LIMIT", 1.0)

    report = await check("planted://")

    [result] = [result for result in report.results if result.test == "a reverse scan starts at the end"]
    assert (result.outcome, result.reason.partition(":")[0]) == ("failed", "TimeoutError")
    assert report.passed > 50


async def test_a_store_that_cannot_be_written_or_reached_is_refused_at_once(
    planted: Callable[[type[MemoryDriver]], None], tmp_path: Path
) -> None:
    async with kvpersist.open_store(f"sqlite:///{tmp_path}/a.db"):
        pass
    with pytest.raises(ReadOnly):
        await check(f"sqlite:///{tmp_path}/a.db?kv.mode=ro")

    class _Down(MemoryDriver):
        async def commit(self, batches: Sequence[Batch]) -> list[Committed | KvError]:
            raise Unavailable("down")

    planted(_Down)
    with pytest.raises(Unavailable):
        await check("planted://")


async def test_a_check_that_is_cancelled_empties_its_corner() -> None:
    holder = MemoryDriver("cancelled")
    seen: list[int] = []

    def told(result: Result, done: int, total: int) -> None:
        seen.append(done)
        if done == 40:
            running.cancel()

    running = asyncio.ensure_future(check("memory://cancelled", on_result=told))
    with pytest.raises(asyncio.CancelledError):
        await running

    assert await holder.scan(None, None, limit=5) == []
    await holder.close()


def test_every_test_of_a_contract_takes_a_driver_and_nothing_else() -> None:
    for contract in (DriverContract, PersistenceContract):
        tests = [getattr(contract, name) for name in dir(contract) if name.startswith("test_")]

        assert len(tests) >= 20
        for test in tests:
            assert inspect.iscoroutinefunction(test)
            assert list(inspect.signature(test).parameters) == ["self", "driver"]
            assert not hasattr(test, "pytestmark")


# -- stores that hold data ------------------------------------------------------------------------


async def _dump(url: str) -> list[Any]:
    driver = await kvpersist.open_store(url, sweep=None)
    async with driver as store:
        found: list[Entry] = []
        start: str | None = None
        while page := await store.driver.scan(start, None, limit=500):
            found += page
            start = page[-1].key + "\x00"
        return found


@pytest.mark.parametrize("backend", ["sqlite", "file", "redis"])
async def test_a_store_in_use_passes_and_stays_as_it_was(
    backend: str, tmp_path: Path, service: Callable[[str], dict[str, str]]
) -> None:
    url = {
        "sqlite": lambda: f"sqlite:///{tmp_path}/a.db",
        "file": lambda: f"file://{tmp_path}/folder?kv.durability=normal",
        "redis": lambda: f"{service('redis')['KVPERSIST_TEST_REDIS_URL']}?kv.base=t{os.urandom(6).hex()}",
    }[backend]()
    async with kvpersist.open(url) as db:
        await db.sessions.create(id="kept")
        await db.messages.append("kept", Message("user", "stays"))
        await db.store.put("app:soon", "expires", ttl=50)
    before = await _dump(url)
    told: list[tuple[int, int]] = []

    records = backend != "file"  # which takes its time
    report = await check(url, records=records, on_result=lambda result, done, total: told.append((done, total)))

    assert [result for result in report.results if result.outcome == "failed"] == []
    assert report.ok
    assert (report.passed + report.skipped, report.left) == (len(report.results), [])
    assert told == [(n + 1, len(report.results)) for n in range(len(report.results))]
    assert {result.contract for result in report.results} == ({"driver", "records"} if records else {"driver"})
    assert report.capabilities.server
    assert await _dump(url) == before
    if backend == "redis":
        async with kvpersist.open_store(url) as store:
            await store.clear("", raw=True)


async def test_a_report_is_data(tmp_path: Path) -> None:
    report = await check({"type": "memory", "name": "report"})

    again = msgspec.json.decode(msgspec.json.encode(report), type=type(report))

    assert again == report
    assert (report.store, report.driver) == ("memory://report", "kvpersist_drivers.memory:MemoryDriver")
    assert isinstance(report.capabilities, Capabilities)
    assert all(result.reason for result in report.results if result.outcome == "skipped")
