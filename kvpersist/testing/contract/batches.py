"""Batches: what belongs together, and the order of what does not."""

from __future__ import annotations

from typing import Any

import pytest

from kvpersist.driver import ABSENT, Check, Committed, Delete, Entry, Op, Put
from kvpersist.errors import Conflict
from kvpersist.testing.contract.base import Contract, D
from kvpersist.testing.contract.steps import assert_conflict, batch, fill, needs, outcome_of, put, values_of

__all__ = ["Batches"]


class Batches(Contract[D]):
    """A batch takes effect whole where batches are atomic, in its order elsewhere."""

    async def test_a_batch_of_puts_deletes_and_checks_takes_effect(self, driver: D) -> None:
        await fill(driver, {"c:old": b"1", "c:kept": b"2"})
        checks = (Check("c:none", ABSENT),) if driver.capabilities.conditional else ()

        [outcome] = await driver.commit([batch(Put("c:new", b"3"), Delete("c:old"), *checks, Put("c:kept", b"4"))])

        assert isinstance(outcome, Committed)
        assert values_of(await driver.get(["c:old", "c:kept", "c:new", "c:none"])) == [None, b"4", b"3", None]

    async def test_a_batch_of_a_hundred_operations_takes_effect(self, driver: D) -> None:
        if (driver.capabilities.max_batch or 100) < 100:
            pytest.skip("declares smaller batches")
        keys = [f"c:{number:03}" for number in range(100)]
        await fill(driver, dict.fromkeys(keys[:50], b"old"))

        [outcome] = await driver.commit(
            [batch(*(Delete(key) if number % 3 == 0 else Put(key, key.encode()) for number, key in enumerate(keys)))]
        )

        assert isinstance(outcome, Committed)
        assert values_of(await driver.get(keys)) == [
            None if number % 3 == 0 else key.encode() for number, key in enumerate(keys)
        ]

    async def test_a_failing_condition_leaves_nothing_of_its_batch(self, driver: D) -> None:
        needs(driver.capabilities.atomic_batch != "none", "atomic_batch")
        needs(driver.capabilities.conditional, "conditional")
        await fill(driver, {"c:deleted": b"1", "c:replaced": b"2", "c:held": b"3"})
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

                assert_conflict(outcome, "c:held", _expect(op), None, position)
                assert await driver.get(keys) == before
        assert [await self.peek(driver, key) for key in keys] == [b"1", b"2", b"3", None, None]

    async def test_every_condition_of_a_batch_sees_the_state_before_it(self, driver: D) -> None:
        needs(driver.capabilities.atomic_batch != "none", "atomic_batch")
        needs(driver.capabilities.conditional, "conditional")
        one, two = await put(driver, "c:a", b"1"), await put(driver, "c:b", b"2")
        swap = batch(Put("c:a", b"2", one), Check("c:c", ABSENT), Put("c:b", b"1", two), Put("c:d", b"new", ABSENT))

        again = batch(*swap.ops)
        outcomes = await driver.commit([swap, again])

        assert outcomes[0] == Committed(swap.version)
        assert_conflict(outcomes[1], "c:a", one, swap.version)
        entries = await driver.get(["c:a", "c:b", "c:c", "c:d"])
        assert values_of(entries) == [b"2", b"1", None, b"new"]

    async def test_without_atomic_batches_the_order_is_kept_and_a_prefix_is_left(self, driver: D) -> None:
        if driver.capabilities.atomic_batch != "none":
            pytest.skip("batches are atomic")
        needs(driver.capabilities.conditional, "conditional")
        await fill(driver, {"c:held": b"held", "c:gone": b"1", "c:kept": b"2"})

        [outcome] = await driver.commit(
            [batch(Put("c:a", b"1"), Delete("c:gone"), Put("c:held", b"x", ABSENT), Put("c:b", b"2"), Delete("c:kept"))]
        )

        assert_conflict(outcome, "c:held", ABSENT, None, 2)
        keys = ["c:a", "c:gone", "c:held", "c:b", "c:kept"]
        assert values_of(await driver.get(keys)) == [b"1", None, b"held", None, b"2"]

    async def test_a_batch_across_partitions_is_never_half_applied(self, driver: D) -> None:
        needs(driver.capabilities.atomic_batch != "none", "atomic_batch")

        outcome = await outcome_of(driver, batch(Put("one:a", b"1"), Put("two:a", b"2")))

        applied = isinstance(outcome, Committed)
        assert applied or driver.capabilities.atomic_batch == "partition"
        assert values_of(await driver.get(["one:a", "two:a"])) == ([b"1", b"2"] if applied else [None, None])

    async def test_the_batches_of_a_call_are_independent_and_answered_in_their_order(self, driver: D) -> None:
        needs(driver.capabilities.conditional, "conditional")
        await put(driver, "c:held", b"held")
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
        assert values_of(entries) == [None if number % 3 == 1 else b"v" for number in range(12)]

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
        assert values_of(entries) == [b"2", None, b"1", b"2"]
        assert entries[0] is not None
        assert entries[0].version == second.version
        assert len(await driver.scan("c:", "c;", limit=10)) == 3

    async def test_a_batch_sees_the_batches_before_it_in_the_call(self, driver: D) -> None:
        needs(driver.capabilities.conditional, "conditional")
        one, two, three = batch(Put("c:a", b"1", ABSENT)), batch(Put("c:a", b"2", ABSENT)), batch(Delete("c:a"))
        four, five = batch(Put("c:a", b"4", ABSENT)), batch(Check("c:a", one.version))
        six = batch(Put("c:a", b"6", four.version))

        outcomes = await driver.commit([one, two, three, four, five, six])

        assert [isinstance(outcome, Committed) for outcome in outcomes] == [True, False, True, True, False, True]
        assert_conflict(outcomes[1], "c:a", ABSENT, one.version)
        assert_conflict(outcomes[4], "c:a", one.version, four.version)
        assert await driver.get(["c:a"]) == [Entry("c:a", b"6", six.version)]

    async def test_sixty_four_one_key_batches_go_in_one_call(self, driver: D) -> None:
        batches = [batch(Put(f"c:{number:02}", b"%d" % number)) for number in range(64)]

        outcomes = await driver.commit(batches)

        assert outcomes == [Committed(one.version) for one in batches]
        entries = await driver.get([f"c:{number:02}" for number in range(64)])
        assert values_of(entries) == [b"%d" % number for number in range(64)]


def _expect(op: Op) -> Any:
    return op.expect
