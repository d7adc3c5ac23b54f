"""Conditional writes: `Check`, and the ``expect`` of `Put` and `Delete`."""

from __future__ import annotations

import pytest

from kvpersist.driver import ABSENT, Check, Committed, Delete, Entry, Op, Put
from kvpersist.errors import Conflict, Unsupported
from kvpersist.testing.contract.base import Contract, D
from kvpersist.testing.contract.steps import assert_conflict, batch, needs, put, values_of

__all__ = ["Conditions"]


class Conditions(Contract[D]):
    """A condition decides, and what it expects is a version."""

    async def test_a_put_that_expects_absence_succeeds_once(self, driver: D) -> None:
        needs(driver.capabilities.conditional, "conditional")
        first, second = batch(Put("c:a", b"1", ABSENT)), batch(Put("c:a", b"2", ABSENT))

        [won] = await driver.commit([first])
        [lost] = await driver.commit([second])

        assert won == Committed(first.version)
        assert_conflict(lost, "c:a", ABSENT, first.version)
        assert await driver.get(["c:a"]) == [Entry("c:a", b"1", first.version)]

    async def test_a_put_that_expects_a_version_replaces_only_that_version(self, driver: D) -> None:
        needs(driver.capabilities.conditional, "conditional")
        old = await put(driver, "c:a", b"same")
        new = await put(driver, "c:a", b"same")

        [stale] = await driver.commit([batch(Put("c:a", b"lost", old))])
        [fresh] = await driver.commit([batch(Put("c:a", b"won", new))])
        [absent] = await driver.commit([batch(Put("c:b", b"lost", new))])

        assert_conflict(stale, "c:a", old, new)
        assert isinstance(fresh, Committed)
        assert_conflict(absent, "c:b", new, ABSENT)
        assert values_of(await driver.get(["c:a", "c:b"])) == [b"won", None]

    async def test_a_version_expected_before_delete_and_recreate_is_not_met(self, driver: D) -> None:
        needs(driver.capabilities.conditional, "conditional")
        old = await put(driver, "c:a", b"same")
        await driver.commit([batch(Delete("c:a"))])
        new = await put(driver, "c:a", b"same")

        [outcome] = await driver.commit([batch(Put("c:a", b"lost", old))])

        assert_conflict(outcome, "c:a", old, new)

    async def test_versions_are_compared_as_bytes(self, driver: D) -> None:
        needs(driver.capabilities.conditional, "conditional")
        versions = [b"\x00" * 8, b"\x00" * 7 + b"\x01", b"abcdefgh", b"ABCDEFGH", b"\xff" * 8, b"12345678", b"1234567 "]
        for stored in versions:
            await driver.commit([batch(Put("c:a", b"v"), version=stored)])
            for expected in versions:
                [outcome] = await driver.commit([batch(Check("c:a", expected))])
                assert isinstance(outcome, Committed if expected == stored else Conflict), (stored, expected)

    async def test_a_check_decides_and_changes_nothing(self, driver: D) -> None:
        needs(driver.capabilities.conditional, "conditional")
        version = await put(driver, "c:a", b"1")
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
                assert_conflict(outcome, key, expect, found)

        assert await driver.get(["c:a", "c:b"]) == before

    async def test_a_delete_that_expects_a_version_removes_only_that_version(self, driver: D) -> None:
        needs(driver.capabilities.conditional_delete, "conditional_delete")
        old = await put(driver, "c:a", b"1")
        new = await put(driver, "c:a", b"2")

        [stale] = await driver.commit([batch(Delete("c:a", old))])
        kept = await driver.get(["c:a"])
        [fresh] = await driver.commit([batch(Delete("c:a", new))])
        [absent] = await driver.commit([batch(Delete("c:a", new))])

        assert_conflict(stale, "c:a", old, new)
        assert values_of(kept) == [b"2"]
        assert isinstance(fresh, Committed)
        assert_conflict(absent, "c:a", new, ABSENT)
        assert await driver.get(["c:a"]) == [None]

    async def test_a_conflict_names_the_operation_that_failed(self, driver: D) -> None:
        needs(driver.capabilities.conditional, "conditional")
        version = await put(driver, "c:held", b"1")

        for position in range(4):
            ops: list[Op] = [Check(f"c:{number}", ABSENT) for number in range(4)]
            ops[position] = Put("c:held", b"2", ABSENT)
            [outcome] = await driver.commit([batch(*ops)])
            assert_conflict(outcome, "c:held", ABSENT, version, position)

    async def test_conditions_not_claimed_are_refused(self, driver: D) -> None:
        able = driver.capabilities
        version = await put(driver, "c:a", b"1")
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

        assert values_of(await driver.get(["c:a", "c:b"])) == [b"1", None]
