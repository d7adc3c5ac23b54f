"""Ranges of keys: bounds, order, limits, directions, and targets of index entries."""

from __future__ import annotations

import msgspec
import pytest

from kvpersist.driver import Delete, Entry, deref_by_get
from kvpersist.errors import Unsupported
from kvpersist.testing.contract.base import Contract, D
from kvpersist.testing.contract.clocks import times_of
from kvpersist.testing.contract.steps import batch, fill, in_byte_order, needs, put

__all__ = ["Scans"]


class Scans(Contract[D]):
    """A scan answers the live entries of a range."""

    async def test_a_scan_of_nothing_answers_nothing(self, driver: D) -> None:
        assert await driver.scan(None, None, limit=10) == []
        await put(driver, "c:m", b"v")

        for start, end in (("c:n", None), (None, "c:m"), ("c:m", "c:m"), ("c:z", "c:a"), ("c:n", "c:z"), ("d:", "e:")):
            assert await driver.scan(start, end, limit=10) == []
        if driver.capabilities.reverse:
            for start, end in (("c:n", None), (None, "c:m"), ("c:m", "c:m"), ("c:z", "c:a")):
                assert await driver.scan(start, end, limit=10, reverse=True) == []

    async def test_a_scan_begins_at_its_start_and_ends_before_its_end(self, driver: D) -> None:
        await fill(driver, {f"c:{letter}": letter.encode() for letter in "acegi"})

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
        needs(driver.capabilities.ordered, "ordered")
        keys = ["c:b", "c:a", "d:a", "c:ab", "c-d:a", "c:b!", "c:", "c:10", "c:9", "b:z"]
        versions = {key: await put(driver, key, key.encode()) for key in keys}

        found = await driver.scan(None, None, limit=100)

        assert found == [Entry(key, key.encode(), versions[key]) for key in in_byte_order(keys)]

    async def test_the_limit_of_a_scan_takes_the_first(self, driver: D) -> None:
        stored = {f"c:{number:02}": b"v" for number in range(10)}
        await fill(driver, stored)

        for limit in (1, 2, 9, 10, 11, 1000):
            found = [entry.key for entry in await driver.scan("c:", "c;", limit=limit)]
            assert len(found) == min(limit, 10)
            if driver.capabilities.ordered:
                assert found == list(stored)[:limit]
            found = [entry.key for entry in await driver.scan("c:03", "c:06", limit=limit)]
            assert len(found) == min(limit, 3)

    async def test_a_scan_of_keys_only_leaves_the_values_out(self, driver: D) -> None:
        versions = {key: await put(driver, key, b"value") for key in ("c:a", "c:b")}

        found = await driver.scan("c:", "c;", limit=5, keys_only=True)

        assert sorted(found, key=lambda entry: entry.key) == [Entry(key, b"", versions[key]) for key in versions]

    async def test_a_reverse_scan_starts_at_the_end(self, driver: D) -> None:
        needs(driver.capabilities.reverse, "reverse")
        stored = {f"c:{number:02}": b"%d" % number for number in range(10)}
        await fill(driver, {**stored, "b:": b"x", "d:": b"x"})

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
        needs(driver.capabilities.ordered, "ordered")
        stored = {f"c:{number * 7919 % 2000:04}": b"%d" % number for number in range(2000)}
        await fill(driver, stored)

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
            await put(driver, key, b"v")
            live.add(key)
            if number % 3 == 2:
                doomed = min(live)
                await driver.commit([batch(Delete(doomed))])
                live.discard(doomed)
            assert {entry.key for entry in await driver.scan("c:", "c;", limit=100)} == live

    async def test_deref_adds_the_target_of_each_index_entry(self, driver: D) -> None:
        needs(driver.capabilities.deref, "deref")
        times = await times_of(driver, self.ttl_seconds)
        await fill(driver, {"c:r:1": b"one", "c:r:2": b"two", "c:r:4": b"four", "c:r:\u00e9!%": b"other"})
        await put(driver, "c:r:5", b"five", expires_at=times.expiry)
        ids = {"a": "2", "b": "1", "c": "gone", "d": "1", "e": "5", "f": "4", "g": "\u00e9!%"}
        await fill(driver, {f"c#i:{name}": id_.encode() for name, id_ in ids.items()})
        await put(driver, "c#i:a1", b"1", expires_at=times.expiry)
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
        await fill(driver, {"c:r:1": b"one", "c#i:a": b"1"})

        if not able.reverse:
            with pytest.raises(Unsupported):
                await driver.scan("c#", "c$", limit=1, reverse=True)
        if not able.deref:
            with pytest.raises(Unsupported):
                await driver.scan("c#", "c$", limit=1, deref="c:r:")
            [entry] = await deref_by_get(driver, await driver.scan("c#", "c$", limit=1), "c:r:")
            assert entry.target is not None
            assert entry.target.value == b"one"
