"""Values of every size, many keys, and the ends of lives."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import pytest
from places import LONGEST, Place, Where

import kvpersist
from kvpersist.errors import KvError, ValueTooLarge

SIZES = (0, 1, 19, 20, 21, 255, 4096, 65_535, 65_536, 1 << 20, 5 << 20)
PATIENCE = 60.0  # seconds that a call may take where emulators share a machine
_ONE_OVER_IS_TRIED_BELOW = 64 << 20  # bytes; the limits beyond are those of the contract's tests


async def test_values_of_every_size_come_back_equal(where: Where) -> None:
    rng = random.Random(7)
    values = {f"size:{size:08}": rng.randbytes(size) for size in SIZES}
    async with kvpersist.open_store(where, timeout=PATIENCE) as store:
        for key, value in values.items():
            await store.put(key, value)

        for key, value in values.items():
            assert await store.get(key) == value
        assert dict([item async for item in store.scan("size:")]) == values


async def test_a_value_over_the_drivers_limit_is_refused_and_leaves_what_was_there(where: Where) -> None:
    async with kvpersist.open_store(where, timeout=PATIENCE) as store:
        limit = store.capabilities.max_value_bytes
        if limit is None or limit > _ONE_OVER_IS_TRIED_BELOW:
            pytest.skip(f"the limit of this driver is {limit}")
        await store.put_raw("a", b"old")
        with pytest.raises(ValueTooLarge) as caught:
            await store.put_raw("a", bytes(limit + 1))

        assert caught.value.outcome == "none"
        assert await store.get_raw("a") == b"old"


async def test_two_hundred_keys_are_listed_exactly(where: Where) -> None:
    await _listed(where, 200)


@pytest.mark.timeout(LONGEST)
async def test_very_many_keys_are_listed_exactly(where: Where, place: Place) -> None:
    await _listed(where, place.keys)


async def _listed(where: Where, count: int) -> None:
    keys = [f"many:{number:06}" for number in range(count)]
    async with kvpersist.open_store(where, timeout=2 * PATIENCE) as store:
        for at in range(0, count, 500):
            await store.put_many(dict.fromkeys(keys[at : at + 500], at))

        assert [key async for key in store.keys("many:")] == keys
        assert [key async for key in store.keys("many:0001")] == [key for key in keys if key.startswith("many:0001")]


@pytest.mark.parametrize("ttl", [0.001, 0.0, -1.0])
async def test_what_has_expired_is_not_there(where: Where, ttl: float) -> None:
    async with kvpersist.open_store(where, timeout=PATIENCE) as store:
        await store.put("a", 1)
        await store.put("a", 2, ttl=ttl)
        await store.put("b", 1, ttl=1000)
        while ttl > 0 and await store.has("a"):
            await asyncio.sleep(0.002)  # the backend's clock may be the judge

        assert await store.get("a") is None
        assert [key async for key in store.keys("")] == ["b"]
        assert await store.get_many(["a", "b"]) == [None, 1]
        await store.put("a", 3)
        assert await store.get("a") == 3


async def test_a_put_without_expiry_clears_the_one_before(where: Where) -> None:
    async with kvpersist.open_store(where, timeout=PATIENCE) as store:
        await store.put("a", 1, ttl=0.2)
        await store.put("b", 1, ttl=0.2)
        await store.put("a", 2)
        while await store.has("b"):
            await asyncio.sleep(0.02)

        info = await store.info("a")
        assert await store.get("a") == 2
        assert info is not None
        assert info.expires_at is None


async def test_what_was_acknowledged_is_there_for_the_next_opener(where: Where, tmp_path: Path) -> None:
    if where.get("type") == "memory":
        where["name"] = tmp_path.name
    async with kvpersist.open_store(where, timeout=PATIENCE) as first:
        await first.put_many({f"a:{number}": number for number in range(50)})
        version = await first.put("b", "kept")
        if where.get("type") != "memory":
            await first.close()
        async with kvpersist.open_store(where, timeout=PATIENCE) as second:
            found = await second.get_versioned("b")
            assert found is not None
            assert (found.value, found.version) == ("kept", version)
            assert len([key async for key in second.keys("a:")]) == 50
            if second.capabilities.conditional:
                with pytest.raises(KvError):
                    await second.put("b", "lost", expect=b"another.")
            assert await second.get("b") == "kept"
