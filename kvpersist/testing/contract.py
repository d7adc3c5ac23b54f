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
"""

from __future__ import annotations

import asyncio
import inspect
import os
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from typing import Any, ClassVar, Final, Generic, TypeVar

import msgspec
import pytest

from kvpersist.driver import (
    ABSENT,
    DRIVER_API,
    Batch,
    Capabilities,
    Check,
    Committed,
    Compacts,
    Delete,
    Driver,
    Entry,
    HasClock,
    Op,
    Pings,
    Put,
    UsesClock,
    Watches,
    deref_by_get,
)
from kvpersist.errors import Conflict, KeyTooLong, KvError, StoreClosed, Unsupported, ValueTooLarge
from kvpersist.testing.clock import ManualClock

__all__ = ["AWKWARD_KEYS", "DriverContract", "batch"]

D = TypeVar("D", bound=Driver)

AWKWARD_KEYS: Final = (
    *("a:b", "a::b", ":", "::", ":a", "a:", "a!b", "a!!b", "!", "a#b", "#"),
    *("/", "//", "a/b", "a//b", "/a", "a/", ".", "..", "../a", "a/../b", "./a", "\\", "a\\b", "C:\\a"),
    *("%", "%%", "%25", "a%2Fb", "%00", "{", "{}", "{a}b", "a{b}c", "{a", "}a", "$where", "$a.b", "a.b"),
    *("\x00", "a\x00", "a\x00b", "\x01", "a\x01b", "a\x01\x02", "\x7f", "\t", "a\nb", "a\r\nb", "\x1b[31m"),
    *(" ", " a", "a ", "a.", ".a", "a. ", "-a", "--help", "~", "~a", "_", "*", "a*", "?", "[a]", "a^b"),
    *("A", "a", "AB", "Ab", "aB", "ab", "\u00df", "SS", "ss", "I", "i", "\u0130", "\u0131"),
    *("\u00e9", "e\u0301", "\u00c5", "A\u030a", "\u212b", "\uac00", "\u1100\u1161"),
    *("\ud7ff", "\ue000", "\ufeff", "\ufffd", "\uffff", "\U00010000", "\U0001f600", "\U0010ffff", "\U0010ffffa"),
    *("a\ud7ff", "a\ue000", "a\U0010ffff", "\u202eabc", "\U0001f468\u200d\U0001f469\u200d\U0001f467", "\u2028"),
    *(
        "CON",
        "con",
        "nul",
        "aux.txt",
        "COM1",
        "LPT1.",
        "__proto__",
        "constructor",
        "__class__",
        "None",
        "null",
        "0",
        "-0",
    ),
    *("' OR '1'='1", '"; DROP TABLE kv; --', "a';--", "$(id)", "`id`", "<script>", "${a}", "#{a}", "\u00ff", "\u0080"),
    *("x" * 200, "x" * 200 + "y", "\u00e9" * 120, "a" * 255, "a" * 256, "seg/" * 60, "x:" * 100),
)
"""Distinct keys that names, paths, patterns, collations or query languages are known to confuse."""

_LONG_AWAY: Final = 4_102_444_800.0  # 2100-01-01


def batch(*ops: Op, version: bytes | None = None) -> Batch:
    """Make a batch of ``ops``, under a version of its own unless one is given."""
    return Batch(ops, os.urandom(8) if version is None else version)


class DriverContract(ABC, Generic[D]):
    """Inherit, override ``driver`` and ``peek`` (and ``reopen`` where data outlives the driver), and run pytest."""

    __test__: ClassVar[bool] = False
    pytestmark = pytest.mark.asyncio
    ttl_seconds: ClassVar[float] = 0.5
    """Lifetime used where the backend's own clock cannot be moved: longer than a few calls take."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.__test__ = cls.__dict__.get("__test__", True)

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

    # -- reading and writing -------------------------------------------------------------------

    async def test_a_value_written_is_stored_and_read_back_under_its_version(self, driver: D) -> None:
        version = await _put(driver, "c:a", b"value")

        [entry] = await driver.get(["c:a"])

        assert entry == Entry("c:a", b"value", version)
        assert await self.peek(driver, "c:a") == b"value"

    async def test_get_answers_in_the_order_of_the_keys_with_repeats(self, driver: D) -> None:
        await _fill(driver, {"c:a": b"1", "c:b": b"2", "c:c": b"3"})

        entries = await driver.get(["c:c", "c:a", "c:none", "c:c", "c:b", "c:none", "c:a"])

        assert _values(entries) == [b"3", b"1", None, b"3", b"2", None, b"1"]

    async def test_get_of_no_keys_and_commit_of_no_batches_answer_nothing(self, driver: D) -> None:
        assert await driver.get([]) == []
        assert await driver.commit([]) == []

    async def test_an_absent_key_reads_as_none(self, driver: D) -> None:
        assert await driver.get(["c:a"]) == [None]
        assert await self.peek(driver, "c:a") is None

    async def test_a_thousand_keys_are_read_in_one_call(self, driver: D) -> None:
        stored = {f"c:{number:04}": b"%d" % number for number in range(0, 1000, 2)}
        await _fill(driver, stored)
        keys = [f"c:{number:04}" for number in reversed(range(1000))]

        entries = await driver.get(keys)

        assert _values(entries) == [stored.get(key) for key in keys]

    async def test_a_put_replaces_value_and_version(self, driver: D) -> None:
        await _put(driver, "c:a", b"a longer first value")
        version = await _put(driver, "c:a", b"new")

        [entry] = await driver.get(["c:a"])

        assert entry == Entry("c:a", b"new", version)
        assert await self.peek(driver, "c:a") == b"new"

    async def test_a_deleted_key_is_gone_from_get_scan_and_backend(self, driver: D) -> None:
        await _fill(driver, {"c:a": b"1", "c:b": b"2"})
        assert _values(await driver.get(["c:a"])) == [b"1"]
        assert len(await driver.scan(None, None, limit=10)) == 2

        [outcome] = await driver.commit([batch(Delete("c:a"))])

        assert isinstance(outcome, Committed)
        assert await driver.get(["c:a"]) == [None]
        assert [entry.key for entry in await driver.scan(None, None, limit=10)] == ["c:b"]
        assert await self.peek(driver, "c:a") is None

    async def test_deleting_an_absent_key_succeeds(self, driver: D) -> None:
        one = batch(Delete("c:a"))

        assert await driver.commit([one]) == [Committed(one.version)]

    async def test_a_key_can_be_written_again_after_its_delete(self, driver: D) -> None:
        for number in range(3):
            version = await _put(driver, "c:a", b"%d" % number)
            assert await driver.get(["c:a"]) == [Entry("c:a", b"%d" % number, version)]
            assert len(await driver.scan(None, None, limit=10)) == 1
            await driver.commit([batch(Delete("c:a"))])
            assert await driver.scan(None, None, limit=10) == []

    async def test_every_put_of_a_batch_is_stored_under_the_version_of_its_batch(self, driver: D) -> None:
        first = batch(Put("c:a", b"1"), Put("c:b", b"2"), version=b"version1")
        second = batch(Put("c:c", b"3"), version=b"\x00\xff\x00\x80\n' \x00")

        outcomes = await driver.commit([first, second])

        assert outcomes == [Committed(first.version), Committed(second.version)]
        entries = await driver.get(["c:a", "c:b", "c:c"])
        assert [entry and entry.version for entry in entries] == [first.version, first.version, second.version]

    async def test_a_batch_without_operations_is_committed(self, driver: D) -> None:
        empty, full = batch(), batch(Put("c:a", b"1"))

        assert await driver.commit([empty, full]) == [Committed(empty.version), Committed(full.version)]

    async def test_any_bytes_are_a_value(self, driver: D) -> None:
        values = {
            "c:empty": b"",
            "c:nul": b"\x00",
            "c:all": bytes(range(256)),
            "c:text": "\U0001f600 \u00e9\n".encode(),
            "c:crlf": b"a\r\nb\n",
            "c:frame": b"kv1 json 0 00000000\n{}",
            "c:number": b"123",
            "c:long": os.urandom(70_000),
        }
        await _fill(driver, values)

        entries = await driver.get(list(values))
        scanned = await driver.scan("c:", "c;", limit=100)

        assert _values(entries) == list(values.values())
        assert {entry.key: entry.value for entry in scanned} == values
        for key, value in values.items():
            assert await self.peek(driver, key) == value

    # -- keys ----------------------------------------------------------------------------------

    async def test_awkward_keys_stay_apart_and_come_back_as_they_were(self, driver: D) -> None:
        stored = _awkward(driver)
        await _fill(driver, stored)

        entries = await driver.get(list(stored))

        assert {key: entry and (entry.key, entry.value) for key, entry in zip(stored, entries, strict=True)} == {
            key: (key, value) for key, value in stored.items()
        }

    async def test_a_scan_of_awkward_keys_gives_each_once_in_byte_order(self, driver: D) -> None:
        stored = _awkward(driver)
        await _fill(driver, stored)

        found = await driver.scan(None, None, limit=2 * len(stored))

        if not driver.capabilities.ordered:
            found.sort(key=lambda entry: entry.key.encode())
        assert [(entry.key, entry.value) for entry in found] == [(key, stored[key]) for key in _in_order(stored)]

    async def test_any_awkward_key_is_a_scan_bound(self, driver: D) -> None:
        _needs(driver.capabilities.ordered, "ordered")
        stored = _awkward(driver)
        await _fill(driver, stored)
        ordered = _in_order(stored)

        for position, key in enumerate(ordered):
            [found] = await driver.scan(key, None, limit=1)
            after = await driver.scan(key + "\x00", None, limit=1)
            until = await driver.scan(ordered[max(position - 1, 0)], key, limit=5)

            assert found.key == key
            assert [entry.key for entry in after][:1] == _in_order(k for k in stored if k.encode() > key.encode())[:1]
            assert [entry.key for entry in until] == ordered[max(position - 1, 0) : position]

    async def test_deleting_every_second_awkward_key_leaves_the_others(self, driver: D) -> None:
        stored = _awkward(driver)
        await _fill(driver, stored)
        doomed = list(stored)[::2]

        outcomes = await driver.commit([batch(Delete(key)) for key in doomed])

        assert all(isinstance(outcome, Committed) for outcome in outcomes)
        assert _values(await driver.get(list(stored))) == [
            None if key in doomed else value for key, value in stored.items()
        ]
        assert len(await driver.scan(None, None, limit=2 * len(stored))) == len(stored) - len(doomed)

    async def test_the_backend_holds_awkward_keys_apart_too(self, driver: D) -> None:
        stored = _awkward(driver)
        await _fill(driver, stored)

        assert {key: await self.peek(driver, key) for key in stored} == stored

    # -- limits --------------------------------------------------------------------------------

    async def test_a_value_at_the_declared_limit_is_kept(self, driver: D) -> None:
        limit = _limit(driver.capabilities.max_value_bytes)
        value = os.urandom(limit)

        await _put(driver, "c:a", value)

        assert _values(await driver.get(["c:a"])) == [value]

    async def test_a_value_over_the_declared_limit_is_refused_whole(self, driver: D) -> None:
        limit = _limit(driver.capabilities.max_value_bytes)
        await _put(driver, "c:a", b"old")

        outcomes = await driver.commit(
            [batch(Put("c:b", b"before")), batch(Put("c:a", bytes(limit + 1))), batch(Put("c:c", b"after"))]
        )

        assert isinstance(outcomes[1], ValueTooLarge)
        assert (outcomes[1].key, outcomes[1].size, outcomes[1].limit) == ("c:a", limit + 1, limit)
        assert _values(await driver.get(["c:a", "c:b", "c:c"])) == [b"old", b"before", b"after"]

    async def test_a_batch_with_one_value_over_the_limit_leaves_nothing(self, driver: D) -> None:
        limit = _limit(driver.capabilities.max_value_bytes)
        _needs(driver.capabilities.atomic_batch != "none", "atomic_batch")

        [outcome] = await driver.commit([batch(Put("c:a", b"1"), Put("c:b", bytes(limit + 1)), Put("c:c", b"3"))])

        assert isinstance(outcome, ValueTooLarge)
        assert await driver.get(["c:a", "c:b", "c:c"]) == [None, None, None]

    async def test_a_key_at_the_declared_limit_is_kept_and_scanned(self, driver: D) -> None:
        limit = _limit(driver.capabilities.max_key_bytes)
        keys = [("c:" + "k" * limit)[: limit - 1] + last for last in "ab"]
        await _fill(driver, dict.fromkeys(keys, b"v"))

        assert _values(await driver.get(keys)) == [b"v", b"v"]
        assert sorted(entry.key for entry in await driver.scan("c:", "c;", limit=5)) == keys
        if driver.capabilities.ordered:
            assert [entry.key for entry in await driver.scan(keys[0] + "\x00", None, limit=5)] == keys[1:]

    async def test_a_key_over_the_declared_limit_is_refused_and_its_neighbours_are_not(self, driver: D) -> None:
        limit = _limit(driver.capabilities.max_key_bytes)
        long = "c:" + "\u00e9" * (limit // 2)

        outcomes = await driver.commit([batch(Put("c:b", b"1")), batch(Put(long, b"2")), batch(Put("c:c", b"3"))])

        assert isinstance(outcomes[1], KeyTooLong)
        assert _values(await driver.get(["c:b", "c:c"])) == [b"1", b"3"]
        assert len(await driver.scan(None, None, limit=5)) == 2

    async def test_a_batch_of_the_declared_size_is_kept_and_one_more_operation_is_refused_whole(
        self, driver: D
    ) -> None:
        limit = _limit(driver.capabilities.max_batch)
        ops = [Put(f"c:{number:06}", b"v") for number in range(limit + 1)]

        refused = await _outcome(driver, batch(*ops))
        left = await driver.scan(None, None, limit=5)
        accepted = await _outcome(driver, batch(*ops[:limit]))

        assert isinstance(refused, KvError)
        assert not isinstance(refused, Conflict)
        assert left == []
        assert isinstance(accepted, Committed)
        assert len(await driver.scan(None, None, limit=limit + 1)) == limit

    # -- conditions ----------------------------------------------------------------------------

    async def test_a_put_that_expects_absence_succeeds_once(self, driver: D) -> None:
        _needs(driver.capabilities.conditional, "conditional")
        first, second = batch(Put("c:a", b"1", ABSENT)), batch(Put("c:a", b"2", ABSENT))

        [won] = await driver.commit([first])
        [lost] = await driver.commit([second])

        assert won == Committed(first.version)
        _assert_conflict(lost, "c:a", ABSENT, first.version)
        assert await driver.get(["c:a"]) == [Entry("c:a", b"1", first.version)]

    async def test_a_put_that_expects_a_version_replaces_only_that_version(self, driver: D) -> None:
        _needs(driver.capabilities.conditional, "conditional")
        old = await _put(driver, "c:a", b"same")
        new = await _put(driver, "c:a", b"same")

        [stale] = await driver.commit([batch(Put("c:a", b"lost", old))])
        [fresh] = await driver.commit([batch(Put("c:a", b"won", new))])
        [absent] = await driver.commit([batch(Put("c:b", b"lost", new))])

        _assert_conflict(stale, "c:a", old, new)
        assert isinstance(fresh, Committed)
        _assert_conflict(absent, "c:b", new, ABSENT)
        assert _values(await driver.get(["c:a", "c:b"])) == [b"won", None]

    async def test_a_version_expected_before_delete_and_recreate_is_not_met(self, driver: D) -> None:
        _needs(driver.capabilities.conditional, "conditional")
        old = await _put(driver, "c:a", b"same")
        await driver.commit([batch(Delete("c:a"))])
        new = await _put(driver, "c:a", b"same")

        [outcome] = await driver.commit([batch(Put("c:a", b"lost", old))])

        _assert_conflict(outcome, "c:a", old, new)

    async def test_versions_are_compared_as_bytes(self, driver: D) -> None:
        _needs(driver.capabilities.conditional, "conditional")
        versions = [b"\x00" * 8, b"\x00" * 7 + b"\x01", b"abcdefgh", b"ABCDEFGH", b"\xff" * 8, b"12345678", b"1234567 "]
        for stored in versions:
            await driver.commit([batch(Put("c:a", b"v"), version=stored)])
            for expected in versions:
                [outcome] = await driver.commit([batch(Check("c:a", expected))])
                assert isinstance(outcome, Committed if expected == stored else Conflict), (stored, expected)

    async def test_a_check_decides_and_changes_nothing(self, driver: D) -> None:
        _needs(driver.capabilities.conditional, "conditional")
        version = await _put(driver, "c:a", b"1")
        before = await driver.get(["c:a", "c:b"])

        for key, expect, found in (
            ("c:a", version, None),
            ("c:b", ABSENT, None),
            ("c:a", ABSENT, version),
            ("c:a", b"otherone", version),
            ("c:b", version, ABSENT),
        ):
            [outcome] = await driver.commit([batch(Check(key, expect))])
            if found is None:
                assert isinstance(outcome, Committed)
            else:
                _assert_conflict(outcome, key, expect, found)

        assert await driver.get(["c:a", "c:b"]) == before

    async def test_a_delete_that_expects_a_version_removes_only_that_version(self, driver: D) -> None:
        _needs(driver.capabilities.conditional_delete, "conditional_delete")
        old = await _put(driver, "c:a", b"1")
        new = await _put(driver, "c:a", b"2")

        [stale] = await driver.commit([batch(Delete("c:a", old))])
        kept = await driver.get(["c:a"])
        [fresh] = await driver.commit([batch(Delete("c:a", new))])
        [absent] = await driver.commit([batch(Delete("c:a", new))])

        _assert_conflict(stale, "c:a", old, new)
        assert _values(kept) == [b"2"]
        assert isinstance(fresh, Committed)
        _assert_conflict(absent, "c:a", new, ABSENT)
        assert await driver.get(["c:a"]) == [None]

    async def test_a_conflict_names_the_operation_that_failed(self, driver: D) -> None:
        _needs(driver.capabilities.conditional, "conditional")
        version = await _put(driver, "c:held", b"1")

        for position in range(4):
            ops: list[Op] = [Check(f"c:{number}", ABSENT) for number in range(4)]
            ops[position] = Put("c:held", b"2", ABSENT)
            [outcome] = await driver.commit([batch(*ops)])
            _assert_conflict(outcome, "c:held", ABSENT, version, position)

    async def test_conditions_not_claimed_are_refused(self, driver: D) -> None:
        able = driver.capabilities
        version = await _put(driver, "c:a", b"1")
        refused: list[Op] = []
        if not able.conditional:
            refused += [Put("c:a", b"2", version), Put("c:b", b"2", ABSENT), Check("c:a", version)]
        if not able.conditional_delete:
            refused += [Delete("c:a", version)]
        if not refused:
            pytest.skip("claims every condition")

        for op in refused:
            with pytest.raises(Unsupported):
                await driver.commit([batch(op)])

        assert _values(await driver.get(["c:a", "c:b"])) == [b"1", None]

    # -- batches -------------------------------------------------------------------------------

    async def test_a_batch_of_puts_deletes_and_checks_takes_effect(self, driver: D) -> None:
        await _fill(driver, {"c:old": b"1", "c:kept": b"2"})
        checks = (Check("c:none", ABSENT),) if driver.capabilities.conditional else ()

        [outcome] = await driver.commit([batch(Put("c:new", b"3"), Delete("c:old"), *checks, Put("c:kept", b"4"))])

        assert isinstance(outcome, Committed)
        assert _values(await driver.get(["c:old", "c:kept", "c:new", "c:none"])) == [None, b"4", b"3", None]

    async def test_a_batch_of_a_hundred_operations_takes_effect(self, driver: D) -> None:
        if (driver.capabilities.max_batch or 100) < 100:
            pytest.skip("declares smaller batches")
        keys = [f"c:{number:03}" for number in range(100)]
        await _fill(driver, dict.fromkeys(keys[:50], b"old"))

        [outcome] = await driver.commit(
            [batch(*(Delete(key) if number % 3 == 0 else Put(key, key.encode()) for number, key in enumerate(keys)))]
        )

        assert isinstance(outcome, Committed)
        assert _values(await driver.get(keys)) == [
            None if number % 3 == 0 else key.encode() for number, key in enumerate(keys)
        ]

    async def test_a_failing_condition_leaves_nothing_of_its_batch(self, driver: D) -> None:
        _needs(driver.capabilities.atomic_batch != "none", "atomic_batch")
        _needs(driver.capabilities.conditional, "conditional")
        await _fill(driver, {"c:deleted": b"1", "c:replaced": b"2", "c:held": b"3"})
        keys = ["c:deleted", "c:replaced", "c:held", "c:first", "c:last"]
        before = await driver.get(keys)

        failing: list[Op] = [Put("c:held", b"x", ABSENT), Put("c:held", b"x", b"otherone"), Check("c:held", ABSENT)]
        if driver.capabilities.conditional_delete:
            failing.append(Delete("c:held", b"otherone"))
        for op in failing:
            effects: list[Op] = [
                Put("c:first", b"x"),
                Delete("c:deleted"),
                Put("c:replaced", b"x"),
                Put("c:last", b"x"),
            ]
            for position in range(len(effects) + 1):
                [outcome] = await driver.commit([batch(*effects[:position], op, *effects[position:])])

                _assert_conflict(outcome, "c:held", _expect(op), None, position)
                assert await driver.get(keys) == before
        assert [await self.peek(driver, key) for key in keys] == [b"1", b"2", b"3", None, None]

    async def test_every_condition_of_a_batch_sees_the_state_before_it(self, driver: D) -> None:
        _needs(driver.capabilities.atomic_batch != "none", "atomic_batch")
        _needs(driver.capabilities.conditional, "conditional")
        one, two = await _put(driver, "c:a", b"1"), await _put(driver, "c:b", b"2")
        swap = batch(Put("c:a", b"2", one), Check("c:c", ABSENT), Put("c:b", b"1", two), Put("c:d", b"new", ABSENT))

        again = batch(*swap.ops)
        outcomes = await driver.commit([swap, again])

        assert outcomes[0] == Committed(swap.version)
        _assert_conflict(outcomes[1], "c:a", one, swap.version)
        entries = await driver.get(["c:a", "c:b", "c:c", "c:d"])
        assert _values(entries) == [b"2", b"1", None, b"new"]

    async def test_without_atomic_batches_the_order_is_kept_and_a_prefix_is_left(self, driver: D) -> None:
        if driver.capabilities.atomic_batch != "none":
            pytest.skip("batches are atomic")
        _needs(driver.capabilities.conditional, "conditional")
        await _fill(driver, {"c:held": b"held", "c:gone": b"1", "c:kept": b"2"})

        [outcome] = await driver.commit(
            [batch(Put("c:a", b"1"), Delete("c:gone"), Put("c:held", b"x", ABSENT), Put("c:b", b"2"), Delete("c:kept"))]
        )

        _assert_conflict(outcome, "c:held", ABSENT, None, 2)
        keys = ["c:a", "c:gone", "c:held", "c:b", "c:kept"]
        assert _values(await driver.get(keys)) == [b"1", None, b"held", None, b"2"]

    async def test_a_batch_across_partitions_is_never_half_applied(self, driver: D) -> None:
        _needs(driver.capabilities.atomic_batch != "none", "atomic_batch")

        outcome = await _outcome(driver, batch(Put("one:a", b"1"), Put("two:a", b"2")))

        applied = isinstance(outcome, Committed)
        assert applied or driver.capabilities.atomic_batch == "partition"
        assert _values(await driver.get(["one:a", "two:a"])) == ([b"1", b"2"] if applied else [None, None])

    async def test_the_batches_of_a_call_are_independent_and_answered_in_their_order(self, driver: D) -> None:
        _needs(driver.capabilities.conditional, "conditional")
        await _put(driver, "c:held", b"held")
        batches = [
            batch(Put(f"c:{number:02}", b"v"), Check("c:held", ABSENT))
            if number % 3 == 1
            else batch(Put(f"c:{number:02}", b"v"))
            for number in range(12)
        ]
        if driver.capabilities.atomic_batch == "none":  # the prefix of a failing batch is left: have none
            batches = [batch(*reversed(one.ops)) for one in batches]

        outcomes = await driver.commit(batches)

        for number, outcome in enumerate(outcomes):
            assert isinstance(outcome, Conflict) if number % 3 == 1 else outcome == Committed(batches[number].version)
        entries = await driver.get([f"c:{number:02}" for number in range(12)])
        assert _values(entries) == [None if number % 3 == 1 else b"v" for number in range(12)]

    async def test_the_batches_of_a_call_are_applied_in_list_order(self, driver: D) -> None:
        first, second = batch(Put("c:a", b"1")), batch(Put("c:a", b"2"))

        outcomes = await driver.commit(
            [
                *(first, second),
                *(batch(Put("c:b", b"1")), batch(Delete("c:b"))),
                *(batch(Delete("c:c")), batch(Put("c:c", b"1"))),
                *(batch(Put("c:d", b"1")), batch(Delete("c:d")), batch(Put("c:d", b"2"))),
            ]
        )

        assert all(isinstance(outcome, Committed) for outcome in outcomes)
        assert len(outcomes) == 9
        entries = await driver.get(["c:a", "c:b", "c:c", "c:d"])
        assert _values(entries) == [b"2", None, b"1", b"2"]
        assert entries[0] is not None
        assert entries[0].version == second.version
        assert len(await driver.scan("c:", "c;", limit=10)) == 3

    async def test_a_batch_sees_the_batches_before_it_in_the_call(self, driver: D) -> None:
        _needs(driver.capabilities.conditional, "conditional")
        one, two, three = batch(Put("c:a", b"1", ABSENT)), batch(Put("c:a", b"2", ABSENT)), batch(Delete("c:a"))
        four, five = batch(Put("c:a", b"4", ABSENT)), batch(Check("c:a", one.version))
        six = batch(Put("c:a", b"6", four.version))

        outcomes = await driver.commit([one, two, three, four, five, six])

        assert [isinstance(outcome, Committed) for outcome in outcomes] == [True, False, True, True, False, True]
        _assert_conflict(outcomes[1], "c:a", ABSENT, one.version)
        _assert_conflict(outcomes[4], "c:a", one.version, four.version)
        assert await driver.get(["c:a"]) == [Entry("c:a", b"6", six.version)]

    async def test_sixty_four_one_key_batches_go_in_one_call(self, driver: D) -> None:
        batches = [batch(Put(f"c:{number:02}", b"%d" % number)) for number in range(64)]

        outcomes = await driver.commit(batches)

        assert outcomes == [Committed(one.version) for one in batches]
        entries = await driver.get([f"c:{number:02}" for number in range(64)])
        assert _values(entries) == [b"%d" % number for number in range(64)]

    # -- expiry --------------------------------------------------------------------------------

    async def test_expiry_is_judged_by_a_clock_that_can_be_asked(self, driver: D) -> None:
        assert isinstance(driver, UsesClock) != isinstance(driver, HasClock)

        now = await driver.now() if isinstance(driver, HasClock) else time.time()

        assert isinstance(now, float)
        assert now > 1_600_000_000

    async def test_expiry_is_given_back_to_the_millisecond(self, driver: D) -> None:
        times = await _time(driver, self.ttl_seconds)
        soon = times.now + 86_400.123

        await _put(driver, "c:soon", b"1", expires_at=soon)
        await _put(driver, "c:far", b"2", expires_at=_LONG_AWAY)
        await _put(driver, "c:never", b"3")

        for entries in (
            await driver.get(["c:far", "c:never", "c:soon"]),
            sorted(await driver.scan("c:", "c;", limit=5), key=lambda entry: entry.key),
            sorted(await driver.scan("c:", "c;", limit=5, keys_only=True), key=lambda entry: entry.key),
        ):
            expiries = [entry and entry.expires_at for entry in entries]
            assert expiries == [pytest.approx(_LONG_AWAY, abs=0.002), None, pytest.approx(soon, abs=0.002)]

    async def test_an_entry_is_there_until_it_expires_and_not_after(self, driver: D) -> None:
        times = await _time(driver, self.ttl_seconds)
        await _put(driver, "c:a", b"1", expires_at=times.expiry)
        await _put(driver, "c:b", b"2")
        before = await driver.get(["c:a", "c:b"])
        scanned = await driver.scan("c:", "c;", limit=5)

        await times.reach_expiry()

        assert _values(before) == [b"1", b"2"]
        assert len(scanned) == 2
        assert await driver.get(["c:a"]) == [None]
        assert _values(await driver.get(["c:a", "c:b", "c:a"])) == [None, b"2", None]
        assert [entry.key for entry in await driver.scan("c:", "c;", limit=5)] == ["c:b"]
        assert [entry.key for entry in await driver.scan(None, None, limit=5, keys_only=True)] == ["c:b"]

    async def test_expired_entries_do_not_count_against_the_limit_of_a_scan(self, driver: D) -> None:
        times = await _time(driver, self.ttl_seconds)
        for number in range(40):
            await _put(driver, f"c:{number:02}", b"v", expires_at=times.expiry if number % 4 else None)

        await times.reach_expiry()

        found = await driver.scan("c:", "c;", limit=5)
        assert len(found) == 5
        if driver.capabilities.ordered:
            assert [entry.key for entry in found] == ["c:00", "c:04", "c:08", "c:12", "c:16"]
        if driver.capabilities.reverse:
            found = await driver.scan("c:", "c;", limit=3, reverse=True)
            assert [entry.key for entry in found] == ["c:36", "c:32", "c:28"]

    async def test_conditions_take_an_expired_entry_for_absent(self, driver: D) -> None:
        _needs(driver.capabilities.conditional, "conditional")
        times = await _time(driver, self.ttl_seconds)
        keys = ["c:a", "c:b", "c:c", "c:d", "c:e"]
        versions = [await _put(driver, key, b"old", expires_at=times.expiry) for key in keys]

        await times.reach_expiry()

        ops: list[Op] = [
            *(Put("c:a", b"new", versions[0]), Put("c:b", b"new", ABSENT)),
            *(Check("c:c", versions[2]), Check("c:d", ABSENT)),
        ]
        if driver.capabilities.conditional_delete:
            ops.append(Delete("c:e", versions[4]))
        outcomes = await driver.commit([batch(op) for op in ops])

        assert [isinstance(outcome, Committed) for outcome in outcomes] == [False, True, False, True, False][: len(ops)]
        _assert_conflict(outcomes[0], "c:a", versions[0], ABSENT)
        _assert_conflict(outcomes[2], "c:c", versions[2], ABSENT)
        assert _values(await driver.get(keys)) == [None, b"new", None, None, None]

    async def test_a_put_that_is_already_expired_deletes_its_key(self, driver: D) -> None:
        times = await _time(driver, self.ttl_seconds)
        past = [times.now - 1, times.now - 0.001, 1.0, 0.0, -1.0]
        if isinstance(driver, UsesClock):
            past.append(times.now)

        for expires_at in past:
            await _put(driver, "c:a", b"old")
            ops = (Put("c:a", b"new", expires_at=expires_at), Put("c:absent", b"new", expires_at=expires_at))
            outcomes = await driver.commit([batch(op) for op in ops])

            assert all(isinstance(outcome, Committed) for outcome in outcomes), (expires_at, outcomes)
            assert await driver.get(["c:a", "c:absent"]) == [None, None]
            assert await driver.scan("c:", "c;", limit=5) == []
            assert await self.peek(driver, "c:a") is None

    async def test_a_put_that_is_already_expired_is_bound_to_its_condition(self, driver: D) -> None:
        _needs(driver.capabilities.conditional, "conditional")
        version = await _put(driver, "c:a", b"old")

        [lost] = await driver.commit([batch(Put("c:a", b"new", ABSENT, expires_at=1.0))])
        kept = await driver.get(["c:a"])
        [won] = await driver.commit([batch(Put("c:a", b"new", version, expires_at=1.0))])

        _assert_conflict(lost, "c:a", ABSENT, version)
        assert _values(kept) == [b"old"]
        assert isinstance(won, Committed)
        assert await driver.get(["c:a"]) == [None]

    async def test_an_already_expired_put_among_others_deletes_only_its_key(self, driver: D) -> None:
        await _fill(driver, {"c:a": b"1", "c:b": b"2"})

        [outcome] = await driver.commit([batch(Put("c:c", b"3"), Put("c:a", b"x", expires_at=0.0), Put("c:d", b"4"))])

        assert isinstance(outcome, Committed)
        assert _values(await driver.get(["c:a", "c:b", "c:c", "c:d"])) == [None, b"2", b"3", b"4"]

    async def test_a_put_without_expiry_clears_the_one_before(self, driver: D) -> None:
        times = await _time(driver, self.ttl_seconds)
        await _put(driver, "c:a", b"1", expires_at=times.expiry)
        await _put(driver, "c:b", b"1", expires_at=times.expiry)
        version = await _put(driver, "c:a", b"2")
        await _put(driver, "c:b", b"2", expires_at=_LONG_AWAY)

        await times.reach_expiry()
        if isinstance(driver, Compacts):
            await driver.compact()

        assert (await driver.get(["c:a"])) == [Entry("c:a", b"2", version)]
        assert _values(await driver.get(["c:a", "c:b"])) == [b"2", b"2"]
        assert len(await driver.scan("c:", "c;", limit=5)) == 2

    async def test_a_key_written_after_its_expiry_is_a_new_entry(self, driver: D) -> None:
        times = await _time(driver, self.ttl_seconds)
        await _put(driver, "c:a", b"1", expires_at=times.expiry)
        await times.reach_expiry()

        version = await _put(driver, "c:a", b"2")

        assert await driver.get(["c:a"]) == [Entry("c:a", b"2", version)]
        assert [entry.key for entry in await driver.scan("c:", "c;", limit=5)] == ["c:a"]

    async def test_what_the_backend_does_not_remove_can_be_compacted(self, driver: D) -> None:
        assert driver.capabilities.ttl == "native" or isinstance(driver, Compacts)

    async def test_compact_removes_expired_entries_and_no_others(self, driver: D) -> None:
        if not isinstance(driver, Compacts):
            pytest.skip("does not compact")
        times = await _time(driver, self.ttl_seconds)
        expired = [f"c:expired{number}" for number in range(8)]
        for key in expired:
            await _put(driver, key, b"v", expires_at=times.expiry)
        await _put(driver, "c:later", b"v", expires_at=_LONG_AWAY)
        await _put(driver, "c:renewed", b"v", expires_at=times.expiry)
        await _put(driver, "c:renewed", b"v", expires_at=_LONG_AWAY)
        await _put(driver, "c:cleared", b"v", expires_at=times.expiry)
        await _put(driver, "c:cleared", b"v")
        early = await driver.compact()

        await times.reach_expiry()
        removed = await driver.compact(3)
        while more := await driver.compact(3):
            removed += more

        assert early == 0
        assert removed <= 8
        assert removed == 8 or driver.capabilities.ttl == "native"
        kept = ["c:later", "c:renewed", "c:cleared"]
        assert _values(await driver.get(kept)) == [b"v"] * 3
        assert len(await driver.scan(None, None, limit=20)) == 3
        for key in expired:
            assert await self.peek(driver, key) is None

    async def test_compact_keeps_to_its_limit(self, driver: D) -> None:
        if not isinstance(driver, Compacts):
            pytest.skip("does not compact")
        times = await _time(driver, self.ttl_seconds)
        for number in range(6):
            await _put(driver, f"c:{number}", b"v", expires_at=times.expiry)

        await times.reach_expiry()

        assert await driver.compact(4) <= 4
        assert await driver.compact(4) <= 2
        assert await driver.compact(4) == 0

    # -- scans ---------------------------------------------------------------------------------

    async def test_a_scan_of_nothing_answers_nothing(self, driver: D) -> None:
        assert await driver.scan(None, None, limit=10) == []
        await _put(driver, "c:m", b"v")

        for start, end in (("c:n", None), (None, "c:m"), ("c:m", "c:m"), ("c:z", "c:a"), ("c:n", "c:z"), ("d:", "e:")):
            assert await driver.scan(start, end, limit=10) == []
        if driver.capabilities.reverse:
            for start, end in (("c:n", None), (None, "c:m"), ("c:m", "c:m"), ("c:z", "c:a")):
                assert await driver.scan(start, end, limit=10, reverse=True) == []

    async def test_a_scan_begins_at_its_start_and_ends_before_its_end(self, driver: D) -> None:
        await _fill(driver, {f"c:{letter}": letter.encode() for letter in "acegi"})

        async def keys(start: str | None, end: str | None) -> str:
            return "".join(sorted(entry.key[2:] for entry in await driver.scan(start, end, limit=10)))

        assert await keys(None, None) == "acegi"
        assert await keys("c:c", "c:g") == "ce"
        assert await keys("c:b", "c:h") == "ceg"
        assert await keys("c:a", "c:i") == "aceg"
        assert await keys(None, "c:c") == "a"
        assert await keys("c:g", None) == "gi"
        assert await keys("c:e", "c:f") == "e"
        assert await keys("c:e", "c:e\x00") == "e"
        assert await keys("c:e\x00", "c:g") == ""
        assert await keys("a", "z") == "acegi"
        assert await keys("c:", "c;") == "acegi"

    async def test_a_scan_answers_whole_entries_in_key_order(self, driver: D) -> None:
        _needs(driver.capabilities.ordered, "ordered")
        keys = ["c:b", "c:a", "d:a", "c:ab", "c-d:a", "c:b!", "c:", "c:10", "c:9", "b:z"]
        versions = {key: await _put(driver, key, key.encode()) for key in keys}

        found = await driver.scan(None, None, limit=100)

        assert found == [Entry(key, key.encode(), versions[key]) for key in _in_order(keys)]

    async def test_the_limit_of_a_scan_takes_the_first(self, driver: D) -> None:
        stored = {f"c:{number:02}": b"v" for number in range(10)}
        await _fill(driver, stored)

        for limit in (1, 2, 9, 10, 11, 1000):
            found = [entry.key for entry in await driver.scan("c:", "c;", limit=limit)]
            assert len(found) == min(limit, 10)
            if driver.capabilities.ordered:
                assert found == list(stored)[:limit]
            found = [entry.key for entry in await driver.scan("c:03", "c:06", limit=limit)]
            assert len(found) == min(limit, 3)

    async def test_a_scan_of_keys_only_leaves_the_values_out(self, driver: D) -> None:
        versions = {key: await _put(driver, key, b"value") for key in ("c:a", "c:b")}

        found = await driver.scan("c:", "c;", limit=5, keys_only=True)

        assert sorted(found, key=lambda entry: entry.key) == [Entry(key, b"", versions[key]) for key in versions]

    async def test_a_reverse_scan_starts_at_the_end(self, driver: D) -> None:
        _needs(driver.capabilities.reverse, "reverse")
        stored = {f"c:{number:02}": b"%d" % number for number in range(10)}
        await _fill(driver, {**stored, "b:": b"x", "d:": b"x"})

        async def keys(start: str | None, end: str | None, limit: int, keys_only: bool = False) -> list[str]:
            found = await driver.scan(start, end, limit=limit, reverse=True, keys_only=keys_only)
            assert [entry.value for entry in found] == [
                b"" if keys_only else stored.get(entry.key, b"x") for entry in found
            ]
            return [entry.key for entry in found]

        assert await keys("c:", "c;", 100) == list(stored)[::-1]
        assert await keys("c:", "c;", 3) == ["c:09", "c:08", "c:07"]
        assert await keys("c:02", "c:05", 100) == ["c:04", "c:03", "c:02"]
        assert await keys("c:02", "c:05", 2, keys_only=True) == ["c:04", "c:03"]
        assert await keys(None, "c:01", 100) == ["c:00", "b:"]
        assert await keys("c:09", None, 100) == ["d:", "c:09"]
        assert await keys(None, None, 1) == ["d:"]

    async def test_two_thousand_keys_are_scanned_in_pages_without_loss_or_repeat(self, driver: D) -> None:
        _needs(driver.capabilities.ordered, "ordered")
        stored = {f"c:{number * 7919 % 2000:04}": b"%d" % number for number in range(2000)}
        await _fill(driver, stored)

        forwards: list[str] = []
        start: str | None = "c:"
        while page := await driver.scan(start, "c;", limit=130):
            assert not forwards or page[0].key > forwards[-1]
            forwards += [entry.key for entry in page]
            assert all(entry.value == stored[entry.key] for entry in page)
            start = page[-1].key + "\x00"
        assert forwards == sorted(stored)
        if driver.capabilities.reverse:
            backwards: list[str] = []
            end = "c;"
            while page := await driver.scan("c:", end, limit=130, reverse=True, keys_only=True):
                assert not backwards or page[0].key < backwards[-1]
                backwards += [entry.key for entry in page]
                end = page[-1].key
            assert backwards == sorted(stored, reverse=True)

    async def test_a_scan_sees_every_write_acknowledged_before_it(self, driver: D) -> None:
        live: set[str] = set()
        for number in range(30):
            key = f"c:{number * 7 % 30:02}"
            await _put(driver, key, b"v")
            live.add(key)
            if number % 3 == 2:
                doomed = min(live)
                await driver.commit([batch(Delete(doomed))])
                live.discard(doomed)
            assert {entry.key for entry in await driver.scan("c:", "c;", limit=100)} == live

    async def test_deref_adds_the_target_of_each_index_entry(self, driver: D) -> None:
        _needs(driver.capabilities.deref, "deref")
        times = await _time(driver, self.ttl_seconds)
        await _fill(driver, {"c:r:1": b"one", "c:r:2": b"two", "c:r:4": b"four", "c:r:\u00e9!%": b"other"})
        await _put(driver, "c:r:5", b"five", expires_at=times.expiry)
        ids = {"a": "2", "b": "1", "c": "gone", "d": "1", "e": "5", "f": "4", "g": "\u00e9!%"}
        await _fill(driver, {f"c#i:{name}": id_.encode() for name, id_ in ids.items()})
        await _put(driver, "c#i:a1", b"1", expires_at=times.expiry)
        await times.reach_expiry()
        records = await driver.get([f"c:r:{id_}" for id_ in ids.values()])

        plain = await driver.scan("c#i:", "c#i;", limit=100)
        found = await driver.scan("c#i:", "c#i;", limit=100, deref="c:r:")
        some = await driver.scan("c#i:b", "c#i;", limit=3, deref="c:r:")

        assert [entry.target for entry in found] == records
        assert [entry.target and entry.target.value for entry in found] == [
            *(b"two", b"one", None, b"one", None, b"four", b"other")
        ]
        assert [msgspec.structs.replace(entry, target=None) for entry in found] == plain
        assert some == found[1:4]
        assert found == await deref_by_get(driver, plain, "c:r:")
        if driver.capabilities.reverse:
            assert await driver.scan("c#i:", "c#i;", limit=100, reverse=True, deref="c:r:") == found[::-1]

    async def test_scans_not_claimed_are_refused(self, driver: D) -> None:
        able = driver.capabilities
        if able.reverse and able.deref:
            pytest.skip("claims every scan")
        await _fill(driver, {"c:r:1": b"one", "c#i:a": b"1"})

        if not able.reverse:
            with pytest.raises(Unsupported):
                await driver.scan("c#", "c$", limit=1, reverse=True)
        if not able.deref:
            with pytest.raises(Unsupported):
                await driver.scan("c#", "c$", limit=1, deref="c:r:")
            [entry] = await deref_by_get(driver, await driver.scan("c#", "c$", limit=1), "c:r:")
            assert entry.target is not None
            assert entry.target.value == b"one"

    # -- many callers --------------------------------------------------------------------------

    async def test_concurrent_commits_and_reads_each_get_their_own_answer(self, driver: D) -> None:
        async def work(number: int) -> None:
            key, one = f"c:{number:02}", batch(Put(f"c:{number:02}", b"%d" % number))
            assert await driver.get([key]) == [None]
            assert await driver.commit([one]) == [Committed(one.version)]
            assert await driver.get([key]) == [Entry(key, b"%d" % number, one.version)]
            assert [entry.key for entry in await driver.scan(key, key + "\x00", limit=5)] == [key]

        await asyncio.gather(*(work(number) for number in range(40)))

        assert len(await driver.scan("c:", "c;", limit=100)) == 40

    async def test_one_of_many_who_expect_absence_wins(self, driver: D) -> None:
        _needs(driver.capabilities.conditional, "conditional")
        batches = [batch(Put("c:a", b"%d" % number, ABSENT)) for number in range(24)]

        answers = await asyncio.gather(*(driver.commit([one]) for one in batches))

        won = [outcome.version for [outcome] in answers if isinstance(outcome, Committed)]
        assert len(won) == 1
        assert all(isinstance(outcome, Committed | Conflict) for [outcome] in answers)
        [entry] = await driver.get(["c:a"])
        assert entry is not None
        assert [entry.version] == won

    async def test_no_increment_of_many_writers_is_lost(self, driver: D) -> None:
        _needs(driver.capabilities.conditional, "conditional")
        writers, rounds = 8, 5

        async def work() -> None:
            for _ in range(rounds):
                while True:
                    [entry] = await driver.get(["c:a"])
                    count = 0 if entry is None else int(entry.value)
                    expect = ABSENT if entry is None else entry.version
                    await asyncio.sleep(0)
                    [outcome] = await driver.commit([batch(Put("c:a", b"%d" % (count + 1), expect))])
                    if isinstance(outcome, Committed):
                        break
                    assert isinstance(outcome, Conflict)

        await asyncio.gather(*(work() for _ in range(writers)))

        assert _values(await driver.get(["c:a"])) == [b"%d" % (writers * rounds)]

    async def test_readers_of_a_key_see_old_or_new_and_nothing_else(self, driver: D) -> None:
        values = [bytes([letter]) * 20_000 for letter in range(12)]
        await _put(driver, "c:a", values[0])
        writing = True
        seen: list[bytes | None] = []

        async def read() -> None:
            while writing:
                seen.extend(_values(await driver.get(["c:a"])))
                await asyncio.sleep(0)

        readers = [asyncio.ensure_future(read()) for _ in range(3)]
        for value in values:
            await _put(driver, "c:a", value)
            await asyncio.sleep(0)
        writing = False
        await asyncio.gather(*readers)

        assert set(seen) <= set(values)

    async def test_a_cancelled_call_leaves_the_driver_usable_and_the_answers_right(self, driver: D) -> None:
        await _fill(driver, {f"c:{number}": b"%d" % number for number in range(10)})
        for attempt in range(12):
            calls: list[asyncio.Future[Any]] = [
                asyncio.ensure_future(driver.commit([batch(Put("c:w", b"%d" % attempt), Put("c:x", b"%d" % attempt))])),
                asyncio.ensure_future(driver.get([f"c:{attempt % 10}"])),
                asyncio.ensure_future(driver.scan("c:", "c;", limit=5)),
            ]
            for _ in range(attempt % 4):
                await asyncio.sleep(0)
            for call in calls:
                call.cancel()
            await asyncio.gather(*calls, return_exceptions=True)

            keys = [f"c:{(attempt + step) % 10}" for step in range(3)]
            assert _values(await driver.get(keys)) == [key[2:].encode() for key in keys]
            version = await _put(driver, "c:y", b"%d" % attempt)
            assert await driver.get(["c:y"]) == [Entry("c:y", b"%d" % attempt, version)]
            if driver.capabilities.atomic_batch != "none" and driver.capabilities.cancel_settles:
                one, other = _values(await driver.get(["c:w", "c:x"]))
                assert one == other

    async def test_a_cancelled_commit_that_has_returned_has_settled(self, driver: D) -> None:
        _needs(driver.capabilities.cancel_settles, "cancel_settles")
        for attempt in range(12):
            key, one = f"c:{attempt:02}", batch(Put(f"c:{attempt:02}", b"v"))
            call = asyncio.ensure_future(driver.commit([one]))
            for _ in range(attempt % 4):
                await asyncio.sleep(0)
            call.cancel()
            await asyncio.gather(call, return_exceptions=True)

            first = await driver.get([key])
            await _put(driver, "c:other", b"v")
            assert await driver.get([key]) == first

    # -- life ----------------------------------------------------------------------------------

    async def test_a_second_close_does_nothing(self, driver: D) -> None:
        await driver.close()
        await driver.close()

    async def test_a_closed_driver_refuses_every_call(self, driver: D) -> None:
        await _put(driver, "c:a", b"1")
        await driver.close()

        with pytest.raises(StoreClosed):
            await driver.get(["c:a"])
        with pytest.raises(StoreClosed):
            await driver.commit([batch(Put("c:a", b"2"))])
        with pytest.raises(StoreClosed):
            await driver.scan(None, None, limit=1)
        if isinstance(driver, Compacts):
            with pytest.raises(StoreClosed):
                await driver.compact()

    async def test_calls_under_way_end_or_fail_when_the_driver_is_closed(self, driver: D) -> None:
        calls: list[asyncio.Future[Any]] = []
        for number in range(8):
            calls.append(asyncio.ensure_future(driver.commit([batch(Put(f"c:{number}", b"v"))])))
            calls.append(asyncio.ensure_future(driver.get([f"c:{number}"])))
        await asyncio.sleep(0)

        await driver.close()
        async with asyncio.timeout(10):
            answers = await asyncio.gather(*calls, return_exceptions=True)

        for answer in answers:
            assert isinstance(answer, list | KvError), answer

    async def test_acknowledged_writes_are_there_after_a_reopen(self, driver: D) -> None:
        stored = _awkward(driver)
        await _fill(driver, stored)
        await _fill(driver, {"c:gone": b"1", "c:twice": b"1"})
        await driver.commit([batch(Delete("c:gone"))])
        version = await _put(driver, "c:twice", b"2", expires_at=_LONG_AWAY)
        before = await driver.scan(None, None, limit=1000)
        await driver.close()

        again = await self.reopen(driver)
        try:
            after = await again.scan(None, None, limit=1000)
            [gone, twice] = await again.get(["c:gone", "c:twice"])
            await _put(again, "c:new", b"3")
            assert _values(await again.get(["c:new"])) == [b"3"]
        finally:
            await again.close()

        assert after == before
        assert len(after) == len(stored) + 1
        assert gone is None
        assert twice is not None
        assert (twice.value, twice.version) == (b"2", version)

    # -- what is claimed -----------------------------------------------------------------------

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

    async def test_a_ping_returns_while_the_driver_is_open(self, driver: D) -> None:
        if not isinstance(driver, Pings):
            pytest.skip("cannot be asked")

        await driver.ping()
        await driver.close()

        with pytest.raises(KvError):
            await driver.ping()

    async def test_a_watch_tells_of_a_change_below_its_prefix(self, driver: D) -> None:
        if not isinstance(driver, Watches):
            pytest.skip("does not watch")

        changes = driver.watch("c:")
        told = asyncio.ensure_future(anext(changes))
        try:
            async with asyncio.timeout(20):
                begun = await asyncio.shield(told)
                told = asyncio.ensure_future(anext(changes))
                await _fill(driver, {"d:1": b"v", "c:1": b"v"})
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


# -- helpers -----------------------------------------------------------------------------------


class _Time:
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


async def _time(driver: Driver, ttl: float) -> _Time:
    if isinstance(driver, HasClock):
        return _Time(driver, await driver.now(), None, ttl)
    assert isinstance(driver, UsesClock), "a driver has a clock, or now()"
    clock = ManualClock(time.time())
    driver.clock = clock
    return _Time(driver, clock.now, clock, ttl)


async def _put(driver: Driver, key: str, value: bytes, expires_at: float | None = None) -> bytes:
    one = batch(Put(key, value, None, expires_at))
    [outcome] = await driver.commit([one])
    assert outcome == Committed(one.version)
    return one.version


async def _fill(driver: Driver, items: Mapping[str, bytes]) -> None:
    batches = [batch(Put(key, value)) for key, value in items.items()]
    for at in range(0, len(batches), 500):
        outcomes = await driver.commit(batches[at : at + 500])
        assert outcomes == [Committed(one.version) for one in batches[at : at + 500]]


async def _outcome(driver: Driver, one: Batch) -> Committed | KvError:
    try:
        [outcome] = await driver.commit([one])
    except KvError as error:
        return error
    return outcome


def _assert_conflict(
    outcome: Committed | KvError, key: str, expected: Any, found: Any = None, position: int = 0
) -> None:
    """``found`` may be left unsaid by the driver (None), and is not looked at where the test gives None."""
    assert isinstance(outcome, Conflict), outcome
    assert (outcome.key, outcome.expected, outcome.position) == (key, expected, position)
    assert found is None or outcome.found is None or outcome.found == found


def _expect(op: Op) -> Any:
    return op.expect


def _values(entries: Sequence[Entry | None]) -> list[bytes | None]:
    return [None if entry is None else entry.value for entry in entries]


def _in_order(keys: Iterable[str]) -> list[str]:
    return sorted(keys, key=str.encode)


def _awkward(driver: Driver) -> dict[str, bytes]:
    limit = driver.capabilities.max_key_bytes or 512
    keys = [key for key in AWKWARD_KEYS if len(key.encode()) <= limit]
    return {key: b"%d" % number for number, key in enumerate(keys)}


def _limit(declared: int | None) -> int:
    if declared is None:
        pytest.skip("declares no limit")
    if declared > 64 << 20:
        pytest.skip("the declared limit is too large to try")
    return declared


def _needs(claimed: bool, capability: str) -> None:
    if not claimed:
        pytest.skip(f"does not claim {capability}")
