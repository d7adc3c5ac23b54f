"""Lifetimes, and the removal of what has expired."""

from __future__ import annotations

import time

import pytest

from kvpersist.driver import ABSENT, Check, Committed, Compacts, Delete, Entry, HasClock, Op, Put, UsesClock
from kvpersist.testing.contract.base import Contract, D
from kvpersist.testing.contract.clocks import times_of
from kvpersist.testing.contract.steps import LONG_AWAY, assert_conflict, batch, fill, needs, put, values_of

__all__ = ["Expiry"]


class Expiry(Contract[D]):
    """An entry is there until it expires, and not after."""

    async def test_expiry_is_judged_by_a_clock_that_can_be_asked(self, driver: D) -> None:
        assert isinstance(driver, UsesClock) != isinstance(driver, HasClock)

        now = await driver.now() if isinstance(driver, HasClock) else time.time()

        assert isinstance(now, float)
        assert now > 1_600_000_000

    async def test_expiry_is_given_back_to_the_millisecond(self, driver: D) -> None:
        times = await times_of(driver, self.ttl_seconds)
        soon = times.now + 86_400.123

        await put(driver, "c:soon", b"1", expires_at=soon)
        await put(driver, "c:far", b"2", expires_at=LONG_AWAY)
        await put(driver, "c:never", b"3")

        for entries in (
            await driver.get(["c:far", "c:never", "c:soon"]),
            sorted(await driver.scan("c:", "c;", limit=5), key=lambda entry: entry.key),
            sorted(await driver.scan("c:", "c;", limit=5, keys_only=True), key=lambda entry: entry.key),
        ):
            expiries = [entry and entry.expires_at for entry in entries]
            assert expiries == [pytest.approx(LONG_AWAY, abs=0.002), None, pytest.approx(soon, abs=0.002)]

    async def test_an_entry_is_there_until_it_expires_and_not_after(self, driver: D) -> None:
        times = await times_of(driver, self.ttl_seconds)
        await put(driver, "c:a", b"1", expires_at=times.expiry)
        await put(driver, "c:b", b"2")
        before = await driver.get(["c:a", "c:b"])
        scanned = await driver.scan("c:", "c;", limit=5)

        await times.reach_expiry()

        assert values_of(before) == [b"1", b"2"]
        assert len(scanned) == 2
        assert await driver.get(["c:a"]) == [None]
        assert values_of(await driver.get(["c:a", "c:b", "c:a"])) == [None, b"2", None]
        assert [entry.key for entry in await driver.scan("c:", "c;", limit=5)] == ["c:b"]
        assert [entry.key for entry in await driver.scan(None, None, limit=5, keys_only=True)] == ["c:b"]

    async def test_expired_entries_do_not_count_against_the_limit_of_a_scan(self, driver: D) -> None:
        times = await times_of(driver, self.ttl_seconds)
        for number in range(40):
            await put(driver, f"c:{number:02}", b"v", expires_at=times.expiry if number % 4 else None)

        await times.reach_expiry()

        found = await driver.scan("c:", "c;", limit=5)
        assert len(found) == 5
        if driver.capabilities.ordered:
            assert [entry.key for entry in found] == ["c:00", "c:04", "c:08", "c:12", "c:16"]
        if driver.capabilities.reverse:
            found = await driver.scan("c:", "c;", limit=3, reverse=True)
            assert [entry.key for entry in found] == ["c:36", "c:32", "c:28"]

    async def test_conditions_take_an_expired_entry_for_absent(self, driver: D) -> None:
        needs(driver.capabilities.conditional, "conditional")
        times = await times_of(driver, self.ttl_seconds)
        keys = ["c:a", "c:b", "c:c", "c:d", "c:e"]
        versions = [await put(driver, key, b"old", expires_at=times.expiry) for key in keys]

        await times.reach_expiry()

        ops: list[Op] = [
            *(Put("c:a", b"new", versions[0]), Put("c:b", b"new", ABSENT)),
            *(Check("c:c", versions[2]), Check("c:d", ABSENT)),
        ]
        if driver.capabilities.conditional_delete:
            ops.append(Delete("c:e", versions[4]))
        outcomes = await driver.commit([batch(op) for op in ops])

        assert [isinstance(outcome, Committed) for outcome in outcomes] == [False, True, False, True, False][: len(ops)]
        assert_conflict(outcomes[0], "c:a", versions[0], ABSENT)
        assert_conflict(outcomes[2], "c:c", versions[2], ABSENT)
        assert values_of(await driver.get(keys)) == [None, b"new", None, None, None]

    async def test_a_put_that_is_already_expired_deletes_its_key(self, driver: D) -> None:
        times = await times_of(driver, self.ttl_seconds)
        past = [times.now - 1, times.now - 0.001, 1.0, 0.0, -1.0]
        if isinstance(driver, UsesClock):
            past.append(times.now)

        for expires_at in past:
            await put(driver, "c:a", b"old")
            ops = (Put("c:a", b"new", expires_at=expires_at), Put("c:absent", b"new", expires_at=expires_at))
            outcomes = await driver.commit([batch(op) for op in ops])

            assert all(isinstance(outcome, Committed) for outcome in outcomes), (expires_at, outcomes)
            assert await driver.get(["c:a", "c:absent"]) == [None, None]
            assert await driver.scan("c:", "c;", limit=5) == []
            assert await self.peek(driver, "c:a") is None

    async def test_a_put_that_is_already_expired_is_bound_to_its_condition(self, driver: D) -> None:
        needs(driver.capabilities.conditional, "conditional")
        version = await put(driver, "c:a", b"old")

        [lost] = await driver.commit([batch(Put("c:a", b"new", ABSENT, expires_at=1.0))])
        kept = await driver.get(["c:a"])
        [won] = await driver.commit([batch(Put("c:a", b"new", version, expires_at=1.0))])

        assert_conflict(lost, "c:a", ABSENT, version)
        assert values_of(kept) == [b"old"]
        assert isinstance(won, Committed)
        assert await driver.get(["c:a"]) == [None]

    async def test_an_already_expired_put_among_others_deletes_only_its_key(self, driver: D) -> None:
        await fill(driver, {"c:a": b"1", "c:b": b"2"})

        [outcome] = await driver.commit([batch(Put("c:c", b"3"), Put("c:a", b"x", expires_at=0.0), Put("c:d", b"4"))])

        assert isinstance(outcome, Committed)
        assert values_of(await driver.get(["c:a", "c:b", "c:c", "c:d"])) == [None, b"2", b"3", b"4"]

    async def test_a_put_without_expiry_clears_the_one_before(self, driver: D) -> None:
        times = await times_of(driver, self.ttl_seconds)
        await put(driver, "c:a", b"1", expires_at=times.expiry)
        await put(driver, "c:b", b"1", expires_at=times.expiry)
        version = await put(driver, "c:a", b"2")
        await put(driver, "c:b", b"2", expires_at=LONG_AWAY)

        await times.reach_expiry()
        if isinstance(driver, Compacts):
            await driver.compact()

        assert (await driver.get(["c:a"])) == [Entry("c:a", b"2", version)]
        assert values_of(await driver.get(["c:a", "c:b"])) == [b"2", b"2"]
        assert len(await driver.scan("c:", "c;", limit=5)) == 2

    async def test_a_key_written_after_its_expiry_is_a_new_entry(self, driver: D) -> None:
        times = await times_of(driver, self.ttl_seconds)
        await put(driver, "c:a", b"1", expires_at=times.expiry)
        await times.reach_expiry()

        version = await put(driver, "c:a", b"2")

        assert await driver.get(["c:a"]) == [Entry("c:a", b"2", version)]
        assert [entry.key for entry in await driver.scan("c:", "c;", limit=5)] == ["c:a"]

    async def test_what_the_backend_does_not_remove_can_be_compacted(self, driver: D) -> None:
        assert driver.capabilities.ttl == "native" or isinstance(driver, Compacts)

    async def test_compact_removes_expired_entries_and_no_others(self, driver: D) -> None:
        if not isinstance(driver, Compacts):
            pytest.skip("does not compact")
        times = await times_of(driver, self.ttl_seconds)
        expired = [f"c:expired{number}" for number in range(8)]
        for key in expired:
            await put(driver, key, b"v", expires_at=times.expiry)
        await put(driver, "c:later", b"v", expires_at=LONG_AWAY)
        await put(driver, "c:renewed", b"v", expires_at=times.expiry)
        await put(driver, "c:renewed", b"v", expires_at=LONG_AWAY)
        await put(driver, "c:cleared", b"v", expires_at=times.expiry)
        await put(driver, "c:cleared", b"v")
        early = await driver.compact()

        await times.reach_expiry()
        removed = await driver.compact(3)
        while more := await driver.compact(3):
            removed += more

        assert early == 0
        assert removed <= 8
        assert removed == 8 or driver.capabilities.ttl == "native"
        kept = ["c:later", "c:renewed", "c:cleared"]
        assert values_of(await driver.get(kept)) == [b"v"] * 3
        assert len(await driver.scan(None, None, limit=20)) == 3
        for key in expired:
            assert await self.peek(driver, key) is None

    async def test_compact_keeps_to_its_limit(self, driver: D) -> None:
        if not isinstance(driver, Compacts):
            pytest.skip("does not compact")
        times = await times_of(driver, self.ttl_seconds)
        for number in range(6):
            await put(driver, f"c:{number}", b"v", expires_at=times.expiry)

        await times.reach_expiry()

        assert await driver.compact(4) <= 4
        assert await driver.compact(4) <= 2
        assert await driver.compact(4) == 0
