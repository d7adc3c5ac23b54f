"""The testing kit: the contract and the model catch planted bugs, faults happen as they are told."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
import unicodedata
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test

import kvpersist.testing
from kvpersist.driver import ABSENT, Batch, Check, Committed, Delete, Driver, Entry, Put, UsesClock
from kvpersist.errors import (
    CommitUnknown,
    Conflict,
    KeyTooLong,
    KvError,
    StoreClosed,
    Unavailable,
    Unsupported,
    ValueTooLarge,
)
from kvpersist.testing import Crashed, DriverContract, FaultyDriver, ManualClock, batch, driver_machine
from kvpersist_drivers.memory import MemoryDriver


class _Delegate:
    """A driver of the four methods alone, by another one."""

    def __init__(self) -> None:
        self.inner = MemoryDriver()
        self.capabilities = self.inner.capabilities

    async def get(self, keys: Sequence[str]) -> list[Entry | None]:
        return await self.inner.get(keys)

    async def commit(self, batches: Sequence[Batch]) -> list[Committed | KvError]:
        return await self.inner.commit(batches)

    async def scan(self, start: str | None, end: str | None, **options: Any) -> list[Entry]:
        return await self.inner.scan(start, end, **options)

    async def close(self) -> None:
        await self.inner.close()


class _Server(_Delegate):
    """Has a clock of its own, that moves when it is asked; removes what expired, is pinged and watched."""

    def __init__(self) -> None:
        super().__init__()
        self.capabilities = msgspec.structs.replace(self.capabilities, ttl="native", watch="push")
        self._changes: asyncio.Queue[tuple[str, ...] | None] = asyncio.Queue()
        self._open = True
        self._time = time.time()
        self.inner.clock = lambda: self._time

    async def get(self, keys: Sequence[str]) -> list[Entry | None]:
        await asyncio.sleep(0)
        return await super().get(keys)

    async def commit(self, batches: Sequence[Batch]) -> list[Committed | KvError]:
        await asyncio.sleep(0)
        outcomes = await super().commit(batches)
        for one in batches:
            self._changes.put_nowait(tuple(op.key for op in one.ops))
        return outcomes

    async def close(self) -> None:
        self._open = False
        self._changes.put_nowait(None)
        await super().close()

    async def now(self) -> float:
        self._time += 0.09
        return self._time

    async def ping(self) -> None:
        if not self._open:
            raise StoreClosed("the server was closed")

    async def watch(self, prefix: str) -> AsyncIterator[tuple[str, ...]]:
        yield ()
        while (changed := await self._changes.get()) is not None:
            if keys := tuple(key for key in changed if key.startswith(prefix)):
                yield keys


class _Limited(MemoryDriver):
    """Refuses what is too large before it begins."""

    def __init__(self) -> None:
        super().__init__()
        self.capabilities = msgspec.structs.replace(
            self.capabilities, max_key_bytes=300, max_value_bytes=100_000, max_batch=120
        )

    async def commit(self, batches: Sequence[Batch]) -> list[Committed | KvError]:
        return [self._refusal(one) or (await super(_Limited, self).commit([one]))[0] for one in batches]

    def _refusal(self, one: Batch) -> KvError | None:
        if len(one.ops) > 120:
            return Unsupported("a batch of more than 120 operations")
        for op in one.ops:
            if len(op.key.encode()) > 300:
                return KeyTooLong(op.key, len(op.key.encode()), 300)
            if isinstance(op, Put) and len(op.value) > 100_000:
                return ValueTooLarge(op.key, len(op.value), 100_000)
        return None


class _MemoryContract(DriverContract[Any]):
    """The contract of drivers that end in a `MemoryDriver`."""

    __test__ = False
    ttl_seconds = 0.1

    def make(self) -> Driver:
        return MemoryDriver()

    @pytest.fixture
    async def driver(self) -> AsyncIterator[Any]:
        driver = self.make()
        yield driver
        await driver.close()

    async def peek(self, driver: Any, key: str) -> bytes | None:
        inner = _innermost(driver)
        entry = inner._space.entries.get(key)
        expired = entry and entry.expires_at is not None and entry.expires_at <= inner.clock()
        return None if entry is None or (expired and driver.capabilities.ttl == "native") else entry.value


class TestALimitedDriver(_MemoryContract):
    def make(self) -> Driver:
        return _Limited()


class TestADriverWithItsOwnClock(_MemoryContract):
    def make(self) -> Driver:
        return _Server()


class TestFaultsUnused(_MemoryContract):
    def make(self) -> Driver:
        return FaultyDriver(MemoryDriver())


class TestOrderedBatches(_MemoryContract):
    def make(self) -> Driver:
        return FaultyDriver(_Limited(), without={"atomic_batch"})


class TestFewClaims(_MemoryContract):
    def make(self) -> Driver:
        return FaultyDriver(MemoryDriver(), without={"atomic_batch", "conditional", "reverse", "deref"})


class TestFaultsBeforeAServer(_MemoryContract):
    def make(self) -> Driver:
        return FaultyDriver(_Server(), without={"conditional_delete"})


def _innermost(driver: Any) -> MemoryDriver:
    while not isinstance(driver, MemoryDriver):
        driver = driver.inner
    return driver


# -- planted bugs ------------------------------------------------------------------------------


class _IgnoresExpect(MemoryDriver):
    async def commit(self, batches: Sequence[Batch]) -> list[Committed | KvError]:
        return await super().commit(
            [
                Batch(
                    tuple(msgspec.structs.replace(op, expect=None) for op in one.ops if not isinstance(op, Check)),
                    one.version,
                )
                for one in batches
            ]
        )


class _IgnoresExpectedAbsence(MemoryDriver):
    async def commit(self, batches: Sequence[Batch]) -> list[Committed | KvError]:
        return await super().commit(
            [
                Batch(
                    tuple(
                        msgspec.structs.replace(op, expect=None) if isinstance(op, Put) and op.expect is ABSENT else op
                        for op in one.ops
                    ),
                    one.version,
                )
                for one in batches
            ]
        )


class _AppliesHalfABatch(MemoryDriver):
    async def commit(self, batches: Sequence[Batch]) -> list[Committed | KvError]:
        outcomes: list[Committed | KvError] = []
        for one in batches:
            [outcome] = await super().commit([one])
            if isinstance(outcome, Conflict):
                await super().commit([Batch(one.ops[: outcome.position], one.version)])
            outcomes.append(outcome)
        return outcomes


class _StopsAtTheFirstConflict(MemoryDriver):
    async def commit(self, batches: Sequence[Batch]) -> list[Committed | KvError]:
        outcomes: list[Committed | KvError] = []
        for one in batches:
            failed = next((outcome for outcome in outcomes if isinstance(outcome, Conflict)), None)
            outcomes.append(failed or (await super().commit([one]))[0])
        return outcomes


class _AppliesBatchesBackwards(MemoryDriver):
    async def commit(self, batches: Sequence[Batch]) -> list[Committed | KvError]:
        return (await super().commit(list(batches)[::-1]))[::-1]


class _AnswersBackwards(MemoryDriver):
    async def commit(self, batches: Sequence[Batch]) -> list[Committed | KvError]:
        return (await super().commit(batches))[::-1]


class _BlamesTheFirstOperation(MemoryDriver):
    async def commit(self, batches: Sequence[Batch]) -> list[Committed | KvError]:
        return [
            Conflict(outcome.key, outcome.expected, outcome.found) if isinstance(outcome, Conflict) else outcome
            for outcome in await super().commit(batches)
        ]


class _KeepsWhatIsAlreadyExpired(MemoryDriver):
    async def commit(self, batches: Sequence[Batch]) -> list[Committed | KvError]:
        now = self.clock()
        changed = [
            Batch(
                tuple(
                    msgspec.structs.replace(op, expires_at=None)
                    if isinstance(op, Put) and op.expires_at is not None and op.expires_at <= now
                    else op
                    for op in one.ops
                ),
                one.version,
            )
            for one in batches
        ]
        return await super().commit(changed)


class _KeepsTheExpiryBefore(MemoryDriver):
    async def commit(self, batches: Sequence[Batch]) -> list[Committed | KvError]:
        def kept(op: Any) -> Any:
            before = self._space.entries.get(op.key)
            if isinstance(op, Put) and op.expires_at is None and before is not None:
                return msgspec.structs.replace(op, expires_at=before.expires_at)
            return op

        return await super().commit([Batch(tuple(map(kept, one.ops)), one.version) for one in batches])


class _ConditionsSeeTheExpired(MemoryDriver):
    async def commit(self, batches: Sequence[Batch]) -> list[Committed | KvError]:
        clock, self.clock = self.clock, lambda: 1.5
        try:
            return await super().commit(batches)
        finally:
            self.clock = clock


class _StaleAfterDelete(MemoryDriver):
    def __init__(self) -> None:
        super().__init__()
        self._seen: dict[str, Entry] = {}

    async def get(self, keys: Sequence[str]) -> list[Entry | None]:
        found = [entry or self._seen.get(key) for key, entry in zip(keys, await super().get(keys), strict=True)]
        self._seen.update((entry.key, entry) for entry in found if entry is not None)
        return found


class _GetsEachKeyOnce(MemoryDriver):
    async def get(self, keys: Sequence[str]) -> list[Entry | None]:
        return await super().get(list(dict.fromkeys(keys)))


class _GetsInKeyOrder(MemoryDriver):
    async def get(self, keys: Sequence[str]) -> list[Entry | None]:
        return await super().get(sorted(keys))


class _TakesEmptyForAbsent(MemoryDriver):
    async def get(self, keys: Sequence[str]) -> list[Entry | None]:
        return [entry if entry and entry.value else None for entry in await super().get(keys)]


class _ScanForgetsExpiry(MemoryDriver):
    async def scan(self, start: str | None, end: str | None, **options: Any) -> list[Entry]:
        clock, self.clock = self.clock, lambda: 0.0
        try:
            return await super().scan(start, end, **options)
        finally:
            self.clock = clock


class _ScanIncludesItsEnd(MemoryDriver):
    async def scan(self, start: str | None, end: str | None, **options: Any) -> list[Entry]:
        return await super().scan(start, None if end is None else end + "\x00", **options)


class _ScanLeavesOutItsStart(MemoryDriver):
    async def scan(self, start: str | None, end: str | None, **options: Any) -> list[Entry]:
        return await super().scan(None if start is None else start + "\x00", end, **options)


class _ScanLosesTheLastOfAPage(MemoryDriver):
    async def scan(self, start: str | None, end: str | None, *, limit: int, **options: Any) -> list[Entry]:
        found = await super().scan(start, end, limit=limit, **options)
        return found[:-1] if len(found) == limit > 1 else found


class _CutsNulOffBounds(MemoryDriver):
    async def scan(self, start: str | None, end: str | None, **options: Any) -> list[Entry]:
        return await super().scan(start and start.rstrip("\x00"), end and end.rstrip("\x00"), **options)


class _LimitCountsTheExpired(MemoryDriver):
    async def scan(self, start: str | None, end: str | None, **options: Any) -> list[Entry]:
        clock, self.clock = self.clock, lambda: 0.0
        try:
            found = await super().scan(start, end, **options)
        finally:
            self.clock = clock
        return [entry for entry in found if entry.expires_at is None or entry.expires_at > self.clock()]


class _ReversesThePage(MemoryDriver):
    async def scan(self, start: str | None, end: str | None, *, reverse: bool = False, **options: Any) -> list[Entry]:
        found = await super().scan(start, end, **options)
        return found[::-1] if reverse else found


class _IgnoresKeysOnly(MemoryDriver):
    async def scan(self, start: str | None, end: str | None, *, keys_only: bool = False, **options: Any) -> list[Entry]:
        return await super().scan(start, end, **options)


class _OrdersByUtf16(MemoryDriver):
    async def scan(self, start: str | None, end: str | None, **options: Any) -> list[Entry]:
        found = await super().scan(start, end, **options)
        return sorted(found, key=lambda entry: entry.key.encode("utf-16-be"), reverse=options.get("reverse", False))


class _DropsStaleTargets(MemoryDriver):
    async def scan(self, start: str | None, end: str | None, **options: Any) -> list[Entry]:
        found = await super().scan(start, end, **options)
        return found if options.get("deref") is None else [entry for entry in found if entry.target]


class _FollowsToTheExpired(MemoryDriver):
    async def scan(
        self, start: str | None, end: str | None, *, deref: str | None = None, **options: Any
    ) -> list[Entry]:
        found = await super().scan(start, end, **options)
        if deref is None:
            return found
        entries = self._space.entries
        return [msgspec.structs.replace(one, target=entries.get(deref + one.value.decode())) for one in found]


class _FoldsKeys(MemoryDriver):
    """Takes keys for equal that differ, as a collation or a file system may."""

    def fold(self, key: str) -> str:
        return key.lower()

    async def get(self, keys: Sequence[str]) -> list[Entry | None]:
        found = await super().get([self.fold(key) for key in keys])
        return [entry and msgspec.structs.replace(entry, key=key) for key, entry in zip(keys, found, strict=True)]

    async def commit(self, batches: Sequence[Batch]) -> list[Committed | KvError]:
        return await super().commit(
            [
                Batch(tuple(msgspec.structs.replace(op, key=self.fold(op.key)) for op in one.ops), one.version)
                for one in batches
            ]
        )


class _FoldsForms(_FoldsKeys):
    def fold(self, key: str) -> str:
        return unicodedata.normalize("NFC", key)


class _FoldsTrailingDots(_FoldsKeys):
    def fold(self, key: str) -> str:
        return key.rstrip(". ") or key


class _CutsAtNul(_FoldsKeys):
    def fold(self, key: str) -> str:
        return key.split("\x00", 1)[0] or key


class _CompactsTheLiving(MemoryDriver):
    async def compact(self, limit: int = 500) -> int:
        doomed = [entry for entry in self._space.entries.values() if entry.expires_at is not None][:limit]
        await self.commit([batch(*(Delete(entry.key) for entry in doomed))])
        return len(doomed)


class _CompactsBeyondItsLimit(MemoryDriver):
    async def compact(self, limit: int = 500) -> int:
        return await super().compact(limit + 1)


class _VersionPerOperation(MemoryDriver):
    async def commit(self, batches: Sequence[Batch]) -> list[Committed | KvError]:
        outcomes = await super().commit(batches)
        for one in batches:
            for op in one.ops[1:]:
                if (entry := self._space.entries.get(op.key)) is not None and entry.version == one.version:
                    self._space.entries[op.key] = msgspec.structs.replace(entry, version=entry.version[::-1])
        return outcomes


class _AnswersAfterClose(MemoryDriver):
    async def get(self, keys: Sequence[str]) -> list[Entry | None]:
        return [None for _ in keys] if self._closed else await super().get(keys)


class _ClosesOnce(MemoryDriver):
    async def close(self) -> None:
        if self._closed:
            raise RuntimeError("closed twice")
        await super().close()


class _NeverClosesItsCalls(_Delegate):
    def __init__(self) -> None:
        super().__init__()
        self.clock = self.inner.clock

    async def get(self, keys: Sequence[str]) -> list[Entry | None]:
        await asyncio.sleep(0.001)
        found: list[Entry | None] = [self.inner._entries.get(key) for key in keys]
        if self.inner._closed:
            raise RuntimeError("the connection is gone")
        return found


class _ImitatesACondition(MemoryDriver):
    """Reads, waits, then writes: two callers both win."""

    async def commit(self, batches: Sequence[Batch]) -> list[Committed | KvError]:
        outcomes: list[Committed | KvError] = []
        for one in batches:
            [refused] = await super().commit([Batch(tuple(Check(o.key, o.expect) for o in one.ops if o.expect), b"")])
            await asyncio.sleep(0)
            if isinstance(refused, Conflict):
                outcomes.append(refused)
                continue
            stripped = tuple(msgspec.structs.replace(o, expect=None) for o in one.ops if not isinstance(o, Check))
            outcomes += await super().commit([Batch(stripped, one.version)])
        return outcomes


class _MixesUpAnswers(_Delegate):
    """One shared answer for whoever asks while a call is in flight."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = self.inner.clock
        self._keys: Sequence[str] = ()

    async def get(self, keys: Sequence[str]) -> list[Entry | None]:
        self._keys = keys
        await asyncio.sleep(0)
        return await self.inner.get(self._keys)


class _RunsOnAfterCancel(MemoryDriver):
    """A cancelled commit is still carried out, later."""

    async def commit(self, batches: Sequence[Batch]) -> list[Committed | KvError]:
        return await asyncio.shield(asyncio.ensure_future(self._later(batches)))

    async def _later(self, batches: Sequence[Batch]) -> list[Committed | KvError]:
        for _ in range(6):
            await asyncio.sleep(0)
        return await super().commit(batches)


class _ClaimsLess(MemoryDriver):
    """Does not claim what it then half does, instead of refusing it."""

    def __init__(self) -> None:
        super().__init__()
        self.capabilities = msgspec.structs.replace(
            self.capabilities, reverse=False, deref=False, conditional=False, conditional_delete=False
        )


class _OverLimit(_Limited):
    def _refusal(self, one: Batch) -> KvError | None:
        refusal = super()._refusal(one)
        return None if isinstance(refusal, ValueTooLarge) and refusal.size == refusal.limit + 1 else refusal


class _UnderLimit(_Limited):
    async def commit(self, batches: Sequence[Batch]) -> list[Committed | KvError]:
        for one in batches:
            for op in one.ops:
                if isinstance(op, Put) and len(op.value) >= 100_000:
                    return [ValueTooLarge(op.key, len(op.value), 100_000) for _ in batches]
        return await super().commit(batches)


_PLANTED: tuple[tuple[Callable[[], Driver], str, bool], ...] = (
    # the bug, a contract test that fails with it, and whether the model finds it too
    (_IgnoresExpect, "a_put_that_expects_absence_succeeds_once", True),
    (_IgnoresExpect, "a_check_decides_and_changes_nothing", True),
    (_IgnoresExpect, "a_delete_that_expects_a_version_removes_only_that_version", True),
    (_IgnoresExpect, "no_increment_of_many_writers_is_lost", False),
    (_IgnoresExpectedAbsence, "one_of_many_who_expect_absence_wins", True),
    (_AppliesHalfABatch, "a_failing_condition_leaves_nothing_of_its_batch", True),
    (_StopsAtTheFirstConflict, "the_batches_of_a_call_are_independent_and_answered_in_their_order", True),
    (_AppliesBatchesBackwards, "the_batches_of_a_call_are_applied_in_list_order", True),
    (_AnswersBackwards, "every_put_of_a_batch_is_stored_under_the_version_of_its_batch", True),
    (_BlamesTheFirstOperation, "a_conflict_names_the_operation_that_failed", True),
    (_KeepsWhatIsAlreadyExpired, "a_put_that_is_already_expired_deletes_its_key", True),
    (_KeepsWhatIsAlreadyExpired, "an_already_expired_put_among_others_deletes_only_its_key", True),
    (_KeepsTheExpiryBefore, "a_put_without_expiry_clears_the_one_before", True),
    (_ConditionsSeeTheExpired, "conditions_take_an_expired_entry_for_absent", True),
    (_StaleAfterDelete, "a_deleted_key_is_gone_from_get_scan_and_backend", True),
    (_StaleAfterDelete, "an_entry_is_there_until_it_expires_and_not_after", True),
    (_GetsEachKeyOnce, "get_answers_in_the_order_of_the_keys_with_repeats", True),
    (_GetsInKeyOrder, "get_answers_in_the_order_of_the_keys_with_repeats", True),
    (_TakesEmptyForAbsent, "any_bytes_are_a_value", True),
    (_ScanForgetsExpiry, "an_entry_is_there_until_it_expires_and_not_after", True),
    (_ScanForgetsExpiry, "expired_entries_do_not_count_against_the_limit_of_a_scan", True),
    (_ScanIncludesItsEnd, "a_scan_begins_at_its_start_and_ends_before_its_end", True),
    (_ScanLeavesOutItsStart, "a_scan_begins_at_its_start_and_ends_before_its_end", True),
    (_ScanLosesTheLastOfAPage, "the_limit_of_a_scan_takes_the_first", True),
    (_CutsNulOffBounds, "two_thousand_keys_are_scanned_in_pages_without_loss_or_repeat", True),
    (_LimitCountsTheExpired, "expired_entries_do_not_count_against_the_limit_of_a_scan", True),
    (_ReversesThePage, "a_reverse_scan_starts_at_the_end", True),
    (_IgnoresKeysOnly, "a_scan_of_keys_only_leaves_the_values_out", True),
    (_OrdersByUtf16, "a_scan_of_awkward_keys_gives_each_once_in_byte_order", True),
    (_DropsStaleTargets, "deref_adds_the_target_of_each_index_entry", True),
    (_FollowsToTheExpired, "deref_adds_the_target_of_each_index_entry", True),
    (_FoldsKeys, "awkward_keys_stay_apart_and_come_back_as_they_were", True),
    (_FoldsForms, "awkward_keys_stay_apart_and_come_back_as_they_were", True),
    (_FoldsTrailingDots, "deleting_every_second_awkward_key_leaves_the_others", False),
    (_CutsAtNul, "a_scan_of_awkward_keys_gives_each_once_in_byte_order", True),
    (_CompactsTheLiving, "compact_removes_expired_entries_and_no_others", True),
    (_CompactsBeyondItsLimit, "compact_keeps_to_its_limit", True),
    (_VersionPerOperation, "every_put_of_a_batch_is_stored_under_the_version_of_its_batch", True),
    (_AnswersAfterClose, "a_closed_driver_refuses_every_call", False),
    (_ClosesOnce, "a_second_close_does_nothing", False),
    (_NeverClosesItsCalls, "calls_under_way_end_or_fail_when_the_driver_is_closed", False),
    (_ImitatesACondition, "one_of_many_who_expect_absence_wins", False),
    (_ImitatesACondition, "no_increment_of_many_writers_is_lost", False),
    (_MixesUpAnswers, "concurrent_commits_and_reads_each_get_their_own_answer", False),
    (_RunsOnAfterCancel, "a_cancelled_commit_that_has_returned_has_settled", False),
    (_ClaimsLess, "scans_not_claimed_are_refused", False),
    (_ClaimsLess, "conditions_not_claimed_are_refused", False),
    (_Delegate, "expiry_is_judged_by_a_clock_that_can_be_asked", False),
    (lambda: FaultyDriver(_Delegate()), "what_the_backend_does_not_remove_can_be_compacted", False),
    (_OverLimit, "a_value_over_the_declared_limit_is_refused_whole", False),
    (_UnderLimit, "a_value_at_the_declared_limit_is_kept", False),
)


class _Contract(_MemoryContract):
    __test__ = False


async def _holds(test: str, driver: Driver) -> None:
    try:
        await getattr(_Contract(), f"test_{test}")(driver)
    except pytest.skip.Exception as skipped:
        pytest.fail(f"skipped: {skipped}")


def _sound(make: Callable[[], Driver]) -> Driver:
    if isinstance(make, type) and issubclass(make, _Limited):
        return _Limited()
    if make is _ClaimsLess:
        return FaultyDriver(MemoryDriver(), without={"reverse", "deref", "conditional"})
    return MemoryDriver()


@pytest.mark.parametrize(("make", "test"), [(make, test) for make, test, _ in _PLANTED])
async def test_the_contract_catches_a_planted_bug(make: Callable[[], Driver], test: str) -> None:
    await _holds(test, _sound(make))

    with pytest.raises((AssertionError, pytest.fail.Exception, ValueError, RuntimeError)) as caught:
        await _holds(test, make())

    assert "skipped" not in str(caught.value)


_QUICK = settings(
    max_examples=3_000,  # it stops at the first failure
    stateful_step_count=30,
    deadline=None,
    database=None,
    derandomize=True,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)


@pytest.mark.parametrize("make", dict.fromkeys(make for make, _, modelled in _PLANTED if modelled))
def test_the_model_catches_a_planted_bug(make: Callable[[], Driver]) -> None:
    async def opener() -> Driver:
        return make()

    with pytest.raises((AssertionError, ValueError, BaseExceptionGroup)):
        run_state_machine_as_test(driver_machine(opener), settings=_QUICK)


def test_the_model_passes_drivers_that_claim_less() -> None:
    for without in ({"atomic_batch"}, {"conditional", "reverse", "deref"}, {"conditional_delete"}):

        async def opener(without: set[str] = without) -> Driver:
            return FaultyDriver(MemoryDriver(), without=without)

        machine = driver_machine(opener, max_examples=15)
        run_state_machine_as_test(machine, settings=machine.TestCase.settings)


def test_the_model_passes_a_driver_with_its_own_clock() -> None:
    async def opener() -> Driver:
        return _Server()

    machine = driver_machine(opener, max_examples=15)
    run_state_machine_as_test(machine, settings=machine.TestCase.settings)


def test_the_model_finds_what_a_reopen_lost() -> None:
    async def opener() -> Driver:
        return MemoryDriver()

    async def emptied(_: Driver) -> Driver:
        return MemoryDriver()

    with pytest.raises((AssertionError, BaseExceptionGroup)):
        run_state_machine_as_test(driver_machine(opener, reopener=emptied), settings=_QUICK)


# -- faults ------------------------------------------------------------------------------------


async def test_a_call_fails_before_its_effect_once() -> None:
    driver = FaultyDriver(MemoryDriver())
    fault = driver.fail("commit", 2)

    await driver.commit([batch(Put("c:a", b"1"))])
    with pytest.raises(Unavailable):
        await driver.commit([batch(Put("c:a", b"2"))])
    await driver.commit([batch(Put("c:b", b"3"))])

    assert [entry and entry.value for entry in await driver.get(["c:a", "c:b"])] == [b"1", b"3"]
    assert (fault.fired, driver.calls["commit"]) == (1, 3)


async def test_a_call_fails_after_its_effect_as_unknown() -> None:
    driver = FaultyDriver(MemoryDriver())
    driver.fail("commit", effect=True)

    with pytest.raises(CommitUnknown) as lost:
        await driver.commit([batch(Put("c:a", b"1")), batch(Put("c:b", b"2"))])

    assert lost.value.keys == ("c:a", "c:b")
    assert None not in await driver.get(["c:a", "c:b"])


@pytest.mark.parametrize("operation", ["get", "scan"])
async def test_reads_fail_until_they_are_healed(operation: Any) -> None:
    driver = FaultyDriver(MemoryDriver())
    fault = driver.fail(operation, persistent=True)

    async def read() -> None:
        await (driver.get(["c:a"]) if operation == "get" else driver.scan(None, None, limit=1))

    for _ in range(3):
        with pytest.raises(Unavailable):
            await read()
    driver.heal()
    await read()

    assert fault.fired == 3


async def test_a_failed_step_is_answered_in_the_place_of_its_batch() -> None:
    driver = FaultyDriver(MemoryDriver())
    driver.fail("step", 2)
    driver.fail("step", 3, effect=True)
    batches = [batch(Put(f"c:{number}", b"v")) for number in range(4)]

    outcomes = await driver.commit(batches)

    assert [type(outcome) for outcome in outcomes] == [Committed, Unavailable, CommitUnknown, Committed]
    entries = await driver.get(["c:0", "c:1", "c:2", "c:3"])
    assert [entry is not None for entry in entries] == [True, False, True, True]


async def test_a_held_call_waits_for_its_gate() -> None:
    driver = FaultyDriver(MemoryDriver())
    gate = driver.hold("commit")
    call = asyncio.ensure_future(driver.commit([batch(Put("c:a", b"1"))]))
    await gate.reached()

    assert await driver.get(["c:a"]) == [None]
    gate.release()
    assert [type(outcome) for outcome in await call] == [Committed]
    assert await driver.get(["c:a"]) != [None]


async def test_a_fault_strikes_the_call_it_was_planned_for_while_others_run() -> None:
    driver = FaultyDriver(MemoryDriver())
    gate, fault = driver.hold("commit", 1), driver.fail("commit", 2, effect=True)
    first = asyncio.ensure_future(driver.commit([batch(Put("c:a", b"1"))]))
    await gate.reached()

    with pytest.raises(CommitUnknown):
        await driver.commit([batch(Put("c:b", b"2"))])
    gate.release()

    assert [type(outcome) for outcome in await first] == [Committed]
    assert fault.fired == 1


@pytest.mark.parametrize("effect", [False, True])
async def test_a_held_call_can_be_cancelled_before_or_after_its_effect(effect: bool) -> None:
    driver = FaultyDriver(MemoryDriver())
    gate = driver.hold("commit", effect=effect)
    call = asyncio.ensure_future(driver.commit([batch(Put("c:a", b"1"))]))
    await gate.reached()
    call.cancel()
    await asyncio.wait([call])

    assert call.cancelled()
    assert gate.cancelled == 1
    assert (await driver.get(["c:a"]) != [None]) is effect


async def test_an_ordered_batch_stops_where_a_step_fails_and_says_so() -> None:
    driver = FaultyDriver(MemoryDriver(), without={"atomic_batch"})
    ops = [Put(f"c:{number}", b"v") for number in range(3)]

    driver.fail("step", 1)
    [nothing] = await driver.commit([batch(*ops)])
    left = await driver.scan(None, None, limit=5)
    driver.fail("step", 3)
    [some] = await driver.commit([batch(*ops)])

    assert (type(nothing), left) == (Unavailable, [])
    assert isinstance(some, CommitUnknown)
    assert [entry.key for entry in await driver.scan(None, None, limit=5)] == ["c:0", "c:1"]


@pytest.mark.parametrize("ordered", [False, True])
async def test_a_crash_leaves_exactly_the_steps_before_it(ordered: bool) -> None:
    batches = [batch(Put("c:0", b"v"), Put("c:1", b"v")), batch(Put("c:2", b"v"), Put("c:3", b"v"))]
    left: list[int] = []
    for nth in range(1, 10):
        inner = MemoryDriver()
        driver = FaultyDriver(inner, without={"atomic_batch"} if ordered else ())
        driver.crash(nth)
        try:
            await driver.commit(batches)
        except Crashed:
            with pytest.raises(Crashed):
                await driver.get(["c:0"])
            await driver.close()
        left.append(len(await inner.scan(None, None, limit=5)))
        if not driver.crashed:
            break

    assert left == ([0, 1, 2, 3, 4] if ordered else [0, 2, 4])


async def test_a_wrapper_has_the_optional_protocols_of_what_it_wraps_and_no_others() -> None:
    memory, server = FaultyDriver(MemoryDriver()), FaultyDriver(_Server())

    assert isinstance(memory, UsesClock)
    assert not isinstance(server, UsesClock)
    there = [hasattr(memory, name) for name in ("compact", "watch", "now", "ping", "backup")]
    assert there == [True, True, False, False, False]
    assert [hasattr(server, name) for name in ("compact", "now", "watch", "ping")] == [False, True, True, True]
    memory.clock = clock = ManualClock(5.0)
    assert _innermost(memory).clock is clock


def test_a_claim_that_does_not_exist_cannot_be_dropped() -> None:
    with pytest.raises(ValueError, match="atomic"):
        FaultyDriver(MemoryDriver(), without={"atomic"})


# -- the package -------------------------------------------------------------------------------


def _python(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"PYTHONPATH": os.pathsep.join(str(Path(entry).resolve()) for entry in sys.path)}
    env.pop("KVPERSIST_URL", None)
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=cwd, env=env, check=False)


def test_every_public_name_can_be_reached_and_an_unknown_one_says_so() -> None:
    for name in kvpersist.testing.__all__:
        assert getattr(kvpersist.testing, name) is not None
        assert name in dir(kvpersist.testing)
    with pytest.raises(AttributeError, match="no attribute 'DriverContrac'"):
        _ = kvpersist.testing.DriverContrac


def test_importing_the_kit_or_the_plugin_loads_nothing_heavy() -> None:
    code = (
        "import sys; import {module}; "
        "print(sorted({{'hypothesis', 'msgspec', 'sqlite3', 'kvpersist.store', 'pytest'}} & set(sys.modules)))"
    )
    kit = _python("-c", code.format(module="kvpersist.testing"))
    plugin = _python("-c", code.format(module="kvpersist.testing.plugin"))

    assert kit.stdout.strip() == "[]", kit.stderr
    assert plugin.stdout.strip() == "['pytest']", plugin.stderr


_USED = """
import pytest
import pytest_asyncio
from kvpersist.testing import DriverContract
from kvpersist_drivers.memory import MemoryDriver

class Concrete(DriverContract):
    __test__ = False

class TestInherited(Concrete):
    @pytest_asyncio.fixture
    async def driver(self):
        yield MemoryDriver()
    async def peek(self, driver, key):
        return None

pytestmark = pytest.mark.asyncio

async def test_in_memory(kv):
    await kv.put("a", 1)
    assert await kv.get("a") == 1

async def test_that_it_is_empty_each_time(kv):
    assert await kv.get("a") is None

async def test_in_a_file(kv_sqlite, tmp_path):
    await kv_sqlite.put("a", 1)
    assert await kv_sqlite.get("a") == 1
    assert (tmp_path / "kv.db").exists()

async def test_at_the_url(kv_url):
    assert kv_url.capabilities.server == "memory"
"""


@pytest.fixture(scope="module")
def used(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Run tests that use the kit as somebody else would; return what pytest says."""
    folder = tmp_path_factory.mktemp("used")

    def run(*arguments: str, mode: str = "auto") -> str:
        (folder / "pytest.ini").write_text(
            f"[pytest]\nasyncio_mode = {mode}\nasyncio_default_fixture_loop_scope = function\nfilterwarnings = error\n"
        )
        (folder / "test_used.py").write_text(_USED)
        plugin = ("-p", "no:kvpersist", "-p", "kvpersist.testing.plugin", "-p", "no:cacheprovider")
        done = _python("-m", "pytest", "-q", "-rA", *plugin, *arguments, "test_used.py", cwd=folder)
        return done.stdout + done.stderr

    return run


def test_the_contract_itself_is_not_collected_and_what_inherits_it_is(used: Callable[..., str]) -> None:
    said = used("--collect-only", "-k", "second_close")

    assert "TestInherited::test_a_second_close" in said
    assert "DriverContract" not in said
    assert "Concrete" not in said


@pytest.mark.parametrize("mode", ["auto", "strict"])
def test_contract_and_fixtures_work_where_the_kit_is_used(used: Callable[..., str], mode: str) -> None:
    said = used("--kv-url", "memory://scratch", "-k", "second_close or test_in or test_at or test_that", mode=mode)

    for name in ("in_memory", "that_it_is_empty_each_time", "in_a_file", "at_the_url", "a_second_close_does_nothing"):
        assert f"test_{name}\n" in said.split("short test summary")[-1], said
    assert "5 passed" in said, said


def test_the_fixture_of_the_url_skips_without_one(used: Callable[..., str]) -> None:
    assert "needs --kv-url" in used("-k", "test_at_the_url")


# -- stores left open --------------------------------------------------------------------------


_LEAKING = """
import kvpersist
import pytest

pytestmark = [pytest.mark.asyncio, pytest.mark.usefixtures("kv_no_leaks")]


async def test_leaks(tmp_path):
    store = await kvpersist.open_store("memory://")
    keep.append(store)
    keep.append(await kvpersist.open(f"sqlite:///{tmp_path}/a.db?kv.mode=rwc"))


async def test_closes(kv, kv_sqlite):
    async with kvpersist.open("memory://") as db:
        await db.sessions.create()
    async with kvpersist.open(kv):
        pass


async def test_fails():
    keep.append(await kvpersist.open_store("memory://"))
    raise RuntimeError("of its own")


keep = []
"""


def test_a_test_that_leaves_a_store_open_fails_and_names_its_line(tmp_path: Path) -> None:
    path = tmp_path / "test_leaking.py"
    path.write_text(_LEAKING)
    options = ["-p", "no:cacheprovider", "-p", "no:kvpersist", "-p", "kvpersist.testing.plugin"]
    options += ["-o", "asyncio_default_fixture_loop_scope=function"]
    command = [sys.executable, "-m", "pytest", "-q", *options, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=60, check=False)

    assert "1 failed, 2 passed, 2 errors" in done.stdout, done.stdout
    assert "RuntimeError: of its own" in done.stdout
    for line in (9, 11, 22):
        assert f"opened at {path}:{line}" in done.stdout


async def test_leaks_are_those_of_the_block() -> None:
    outside = await kvpersist.open_store("memory://")
    with kvpersist.testing.no_leaks():
        async with kvpersist.open_store("memory://"):
            pass

    with pytest.raises(AssertionError, match=rf"^left open: memory://, opened at {__file__}:"):  # noqa: SIM117
        with kvpersist.testing.no_leaks():
            inside = await kvpersist.open_store("memory://")
    await inside.close()
    await outside.close()
