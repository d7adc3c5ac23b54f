"""Many callers at once, and callers that give up."""

from __future__ import annotations

import asyncio
from typing import Any

from kvpersist.driver import ABSENT, Committed, Entry, Put
from kvpersist.errors import Conflict
from kvpersist.testing.contract.base import Contract, D
from kvpersist.testing.contract.steps import batch, fill, needs, put, values_of

__all__ = ["Concurrency"]


class Concurrency(Contract[D]):
    """Each caller gets its own answer, whatever the others do."""

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
        needs(driver.capabilities.conditional, "conditional")
        batches = [batch(Put("c:a", b"%d" % number, ABSENT)) for number in range(24)]

        answers = await asyncio.gather(*(driver.commit([one]) for one in batches))

        won = [outcome.version for [outcome] in answers if isinstance(outcome, Committed)]
        assert len(won) == 1
        assert all(isinstance(outcome, Committed | Conflict) for [outcome] in answers)
        [entry] = await driver.get(["c:a"])
        assert entry is not None
        assert [entry.version] == won

    async def test_no_increment_of_many_writers_is_lost(self, driver: D) -> None:
        needs(driver.capabilities.conditional, "conditional")
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

        assert values_of(await driver.get(["c:a"])) == [b"%d" % (writers * rounds)]

    async def test_readers_of_a_key_see_old_or_new_and_nothing_else(self, driver: D) -> None:
        values = [bytes([letter]) * 20_000 for letter in range(12)]
        await put(driver, "c:a", values[0])
        writing = True
        seen: list[bytes | None] = []

        async def read() -> None:
            while writing:
                seen.extend(values_of(await driver.get(["c:a"])))
                await asyncio.sleep(0)

        readers = [asyncio.ensure_future(read()) for _ in range(3)]
        for value in values:
            await put(driver, "c:a", value)
            await asyncio.sleep(0)
        writing = False
        await asyncio.gather(*readers)

        assert set(seen) <= set(values)

    async def test_a_cancelled_call_leaves_the_driver_usable_and_the_answers_right(self, driver: D) -> None:
        await fill(driver, {f"c:{number}": b"%d" % number for number in range(10)})
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
            assert values_of(await driver.get(keys)) == [key[2:].encode() for key in keys]
            version = await put(driver, "c:y", b"%d" % attempt)
            assert await driver.get(["c:y"]) == [Entry("c:y", b"%d" % attempt, version)]
            if driver.capabilities.atomic_batch != "none" and driver.capabilities.cancel_settles:
                one, other = values_of(await driver.get(["c:w", "c:x"]))
                assert one == other

    async def test_a_cancelled_commit_that_has_returned_has_settled(self, driver: D) -> None:
        needs(driver.capabilities.cancel_settles, "cancel_settles")
        for attempt in range(12):
            key, one = f"c:{attempt:02}", batch(Put(f"c:{attempt:02}", b"v"))
            call = asyncio.ensure_future(driver.commit([one]))
            for _ in range(attempt % 4):
                await asyncio.sleep(0)
            call.cancel()
            await asyncio.gather(call, return_exceptions=True)

            first = await driver.get([key])
            await put(driver, "c:other", b"v")
            assert await driver.get([key]) == first
