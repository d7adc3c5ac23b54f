"""The records' contract holds where drivers are sound, and catches planted bugs."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest

from kvpersist.driver import ABSENT, Batch, Check, Committed, Delete, Driver, Entry, Put
from kvpersist.errors import KvError
from kvpersist.testing import FaultyDriver, PersistenceContract
from kvpersist_drivers.filesystem import FilesystemDriver, FilesystemOptions
from kvpersist_drivers.memory import MemoryDriver, MemoryOptions
from kvpersist_drivers.sqlite import SqliteDriver, SqliteOptions


class _OverMemory(PersistenceContract[Any]):
    __test__ = False

    def make(self) -> Driver:
        return MemoryDriver()

    @pytest.fixture
    async def driver(self) -> AsyncIterator[Any]:
        driver = self.make()
        yield driver
        await driver.close()


class TestRecordsInMemory(_OverMemory):
    @pytest.fixture
    async def driver(self) -> AsyncIterator[Any]:
        driver, holder = MemoryDriver("records"), MemoryDriver("records")
        yield driver
        await driver.close()
        await holder.close()

    async def reopen(self, driver: MemoryDriver) -> MemoryDriver:
        return await MemoryDriver.open(MemoryOptions(name="records"))


class TestRecordsWithoutAtomicBatches(_OverMemory):
    def make(self) -> Driver:
        return FaultyDriver(MemoryDriver(), without={"atomic_batch", "reverse", "deref"})


class TestRecordsAsOnABucket(_OverMemory):
    def make(self) -> Driver:
        return FaultyDriver(MemoryDriver(), without={"atomic_batch", "reverse", "deref", "conditional_delete"})


class TestNoRecords(_OverMemory):
    def make(self) -> Driver:
        return FaultyDriver(MemoryDriver(), without={"conditional"})


class TestRecordsInSqlite(PersistenceContract[SqliteDriver]):
    @pytest.fixture
    async def driver(self, tmp_path: Path) -> AsyncIterator[SqliteDriver]:
        self._options = SqliteOptions(path=str(tmp_path / "kv.db"), durability="normal")
        driver = await SqliteDriver.open(self._options)
        yield driver
        await driver.close()

    async def reopen(self, driver: SqliteDriver) -> SqliteDriver:
        return await SqliteDriver.open(self._options)


class TestRecordsInFiles(PersistenceContract[FilesystemDriver]):
    @pytest.fixture
    async def driver(self, tmp_path: Path) -> AsyncIterator[FilesystemDriver]:
        self._options = FilesystemOptions(path=str(tmp_path / "kv"), durability="normal")
        driver = await FilesystemDriver.open(self._options)
        yield driver
        await driver.close()

    async def reopen(self, driver: FilesystemDriver) -> FilesystemDriver:
        return await FilesystemDriver.open(self._options)


# -- planted bugs ------------------------------------------------------------------------------


class _Changes(MemoryDriver):
    """Does something else than it is told."""

    def change(self, op: Any) -> Any:
        return op

    async def commit(self, batches: Sequence[Batch]) -> list[Committed | KvError]:
        changed = [[self.change(op) for op in one.ops] for one in batches]
        return await super().commit(
            [
                Batch(tuple(op for op in ops if op is not None), one.version)
                for ops, one in zip(changed, batches, strict=True)
            ]
        )


class _KeepsIndexEntries(_Changes):
    def change(self, op: Any) -> Any:
        return None if isinstance(op, Delete) and "#" in op.key else op


class _KeepsCalls(_Changes):
    def change(self, op: Any) -> Any:
        return None if isinstance(op, Delete) and ":tool_call:" in op.key else op


class _IgnoresConditions(_Changes):
    def change(self, op: Any) -> Any:
        return None if isinstance(op, Check) else msgspec.structs.replace(op, expect=None)


class _IgnoresExpectedAbsence(_Changes):
    def change(self, op: Any) -> Any:
        return msgspec.structs.replace(op, expect=None) if isinstance(op, Put) and op.expect is ABSENT else op


class _LosesTheLastOperation(MemoryDriver):
    async def commit(self, batches: Sequence[Batch]) -> list[Committed | KvError]:
        return await super().commit([Batch(one.ops[:-1] or one.ops, one.version) for one in batches])


class _ScanLosesTheLastOfAPage(MemoryDriver):
    async def scan(self, start: str | None, end: str | None, *, limit: int, **options: Any) -> list[Entry]:
        found = await super().scan(start, end, limit=limit, **options)
        return found[:-1] if len(found) == limit > 1 else found


class _FoldsKeys(_Changes):
    def change(self, op: Any) -> Any:
        return msgspec.structs.replace(op, key=op.key.lower())

    async def get(self, keys: Sequence[str]) -> list[Entry | None]:
        found = await super().get([key.lower() for key in keys])
        return [entry and msgspec.structs.replace(entry, key=key) for key, entry in zip(keys, found, strict=True)]


class _ForgetsOnClose(MemoryDriver):
    async def close(self) -> None:
        if not self._closed:
            self._space.entries.clear()
            self._space.ordered()
        await super().close()


class _TombstonesForEver(_Changes):
    def change(self, op: Any) -> Any:
        return msgspec.structs.replace(op, expires_at=None) if isinstance(op, Put) else op


def _ordered(inner: Driver) -> Driver:
    return FaultyDriver(inner, without={"atomic_batch", "reverse", "deref"})


_PLANTED: tuple[tuple[Callable[[], Driver], str], ...] = (
    (_KeepsIndexEntries, "delete_leaves_no_key_of_it"),
    (_KeepsIndexEntries, "an_index_follows_its_record"),
    (_KeepsCalls, "counts_are_those_of_what_is_there"),
    (_IgnoresConditions, "concurrent_appends_are_numbered_without_a_gap"),
    (_IgnoresConditions, "no_edit_of_many_is_lost"),
    (_IgnoresConditions, "a_version_that_was_replaced_is_a_conflict"),
    (_IgnoresConditions, "what_was_deleted_does_not_come_back_and_its_id_can_be_used_again"),
    (_IgnoresExpectedAbsence, "a_unique_value_has_one_owner"),
    (_LosesTheLastOperation, "a_turn_comes_back_as_it_was_written"),
    (_LosesTheLastOperation, "a_timeline_joins_messages_calls_and_results"),
    (_ScanLosesTheLastOfAPage, "a_long_session_is_read_in_pages_without_loss_or_repeat"),
    (_ScanLosesTheLastOfAPage, "sessions_are_found_by_index_newest_first"),
    (_FoldsKeys, "awkward_ids_and_index_values_stay_apart"),
    (_FoldsKeys, "namespaces_do_not_see_each_other"),
    (lambda: _ForgetsOnClose("records"), "records_are_there_after_a_reopen"),
    (lambda: _ordered(_TombstonesForEver()), "delete_leaves_no_key_of_it"),
    (lambda: _ordered(_IgnoresConditions()), "concurrent_appends_are_numbered_without_a_gap"),
)


class _Contract(_OverMemory):
    __test__ = False

    async def reopen(self, driver: Any) -> Any:
        return MemoryDriver("records")


async def _holds(test: str, driver: Driver) -> None:
    holder = MemoryDriver("records")
    try:
        await getattr(_Contract(), f"test_{test}")(driver)
    except pytest.skip.Exception as skipped:
        pytest.fail(f"skipped: {skipped}")
    finally:
        await driver.close()
        await holder.close()


@pytest.mark.parametrize(("make", "test"), _PLANTED)
async def test_the_contract_catches_a_planted_bug(make: Callable[[], Driver], test: str) -> None:
    sound = MemoryDriver("records") if test.startswith("records") else MemoryDriver()
    await _holds(test, _ordered(sound) if isinstance(make(), FaultyDriver) else sound)

    with pytest.raises((AssertionError, pytest.fail.Exception, KvError, ValueError)) as caught:
        await _holds(test, make())

    assert "skipped" not in str(caught.value)
