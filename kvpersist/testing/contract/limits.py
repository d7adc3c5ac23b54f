"""What the capabilities declare as the longest and the most."""

from __future__ import annotations

import os

from kvpersist.driver import Committed, Put
from kvpersist.errors import Conflict, KeyTooLong, KvError, ValueTooLarge
from kvpersist.testing.contract.base import Contract, D
from kvpersist.testing.contract.steps import batch, fill, limit_or_skip, needs, outcome_of, put, values_of

__all__ = ["Limits"]


class Limits(Contract[D]):
    """What is at a declared limit is kept, what is over it is refused whole."""

    async def test_a_value_at_the_declared_limit_is_kept(self, driver: D) -> None:
        limit = limit_or_skip(driver.capabilities.max_value_bytes)
        value = os.urandom(limit)

        await put(driver, "c:a", value)

        assert values_of(await driver.get(["c:a"])) == [value]

    async def test_a_value_over_the_declared_limit_is_refused_whole(self, driver: D) -> None:
        limit = limit_or_skip(driver.capabilities.max_value_bytes)
        await put(driver, "c:a", b"old")

        outcomes = await driver.commit(
            [batch(Put("c:b", b"before")), batch(Put("c:a", bytes(limit + 1))), batch(Put("c:c", b"after"))]
        )

        assert isinstance(outcomes[1], ValueTooLarge)
        assert (outcomes[1].key, outcomes[1].size, outcomes[1].limit) == ("c:a", limit + 1, limit)
        assert values_of(await driver.get(["c:a", "c:b", "c:c"])) == [b"old", b"before", b"after"]

    async def test_a_batch_with_one_value_over_the_limit_leaves_nothing(self, driver: D) -> None:
        limit = limit_or_skip(driver.capabilities.max_value_bytes)
        needs(driver.capabilities.atomic_batch != "none", "atomic_batch")

        [outcome] = await driver.commit([batch(Put("c:a", b"1"), Put("c:b", bytes(limit + 1)), Put("c:c", b"3"))])

        assert isinstance(outcome, ValueTooLarge)
        assert await driver.get(["c:a", "c:b", "c:c"]) == [None, None, None]

    async def test_a_key_at_the_declared_limit_is_kept_and_scanned(self, driver: D) -> None:
        limit = limit_or_skip(driver.capabilities.max_key_bytes)
        keys = [("c:" + "k" * limit)[: limit - 1] + last for last in "ab"]
        await fill(driver, dict.fromkeys(keys, b"v"))

        assert values_of(await driver.get(keys)) == [b"v", b"v"]
        assert sorted(entry.key for entry in await driver.scan("c:", "c;", limit=5)) == keys
        if driver.capabilities.ordered:
            assert [entry.key for entry in await driver.scan(keys[0] + "\x00", None, limit=5)] == keys[1:]

    async def test_a_key_over_the_declared_limit_is_refused_and_its_neighbours_are_not(self, driver: D) -> None:
        limit = limit_or_skip(driver.capabilities.max_key_bytes)
        long = "c:" + "\u00e9" * (limit // 2)

        outcomes = await driver.commit([batch(Put("c:b", b"1")), batch(Put(long, b"2")), batch(Put("c:c", b"3"))])

        assert isinstance(outcomes[1], KeyTooLong)
        assert values_of(await driver.get(["c:b", "c:c"])) == [b"1", b"3"]
        assert len(await driver.scan(None, None, limit=5)) == 2

    async def test_a_batch_of_the_declared_size_is_kept_and_one_more_operation_is_refused_whole(
        self, driver: D
    ) -> None:
        limit = limit_or_skip(driver.capabilities.max_batch)
        ops = [Put(f"c:{number:06}", b"v") for number in range(limit + 1)]

        refused = await outcome_of(driver, batch(*ops))
        left = await driver.scan(None, None, limit=5)
        accepted = await outcome_of(driver, batch(*ops[:limit]))

        assert isinstance(refused, KvError)
        assert not isinstance(refused, Conflict)
        assert left == []
        assert isinstance(accepted, Committed)
        assert len(await driver.scan(None, None, limit=limit + 1)) == limit
