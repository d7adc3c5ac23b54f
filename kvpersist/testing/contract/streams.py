"""Values written and read piece by piece: `Streams`."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Iterable

import pytest

from kvpersist.driver import ABSENT, Committed, Driver, Entry, Streams
from kvpersist.errors import KvError, StoreClosed, Unsupported
from kvpersist.testing.contract.base import Contract, D
from kvpersist.testing.contract.clocks import times_of
from kvpersist.testing.contract.steps import LONG_AWAY, assert_conflict, put, values_of

__all__ = ["Streamed"]


class Streamed(Contract[D]):
    """A streamed value is an entry like any other."""

    async def test_what_is_streamed_is_stored_as_one_value_and_can_be_streamed_back(self, driver: D) -> None:
        streams = _streams(driver)
        for sizes in ((), (0,), (1, 0, 2), (300_000, 5, 300_000, 700_000)):
            value = os.urandom(sum(sizes))

            outcome = await streams.write_stream("c:a", _pieces(value, sizes), version=b"version1")

            assert outcome == Committed(b"version1")
            assert await driver.get(["c:a"]) == [Entry("c:a", value, b"version1")]
            assert await _streamed(driver, "c:a") == (Entry("c:a", b"", b"version1"), value)
            assert await self.peek(driver, "c:a") == value
            assert [entry.key for entry in await driver.scan(None, None, limit=5)] == ["c:a"]

    async def test_what_was_put_can_be_streamed_and_what_is_not_there_cannot(self, driver: D) -> None:
        streams = _streams(driver)
        value = os.urandom(300_000)
        version = await put(driver, "c:a", value, expires_at=LONG_AWAY)
        time = await times_of(driver, self.ttl_seconds)
        await put(driver, "c:soon", b"1", expires_at=time.expiry)

        assert await _streamed(driver, "c:a") == (Entry("c:a", b"", version, LONG_AWAY), value)
        await time.reach_expiry()
        assert await streams.read_stream("c:none") is None
        assert await streams.read_stream("c:soon") is None

    async def test_a_streamed_value_is_there_at_its_end_and_not_before(self, driver: D) -> None:
        streams = _streams(driver)
        await put(driver, "c:a", b"old")
        seen: list[bytes | None] = []

        async def pieces() -> AsyncIterator[bytes]:
            for _ in range(3):
                yield bytes(300_000)
                seen.extend(values_of(await driver.get(["c:a"])))

        outcome = await streams.write_stream("c:a", pieces(), version=b"version1")

        assert isinstance(outcome, Committed)
        assert seen == [b"old"] * 3
        assert values_of(await driver.get(["c:a"])) == [bytes(900_000)]

    async def test_a_stream_that_raises_or_is_cancelled_stores_nothing(self, driver: D) -> None:
        streams = _streams(driver)
        await put(driver, "c:a", b"old")
        begun = asyncio.Event()

        async def failing() -> AsyncIterator[bytes]:
            yield bytes(300_000)
            raise LookupError("mine")

        async def waiting() -> AsyncIterator[bytes]:
            yield bytes(300_000)
            begun.set()
            await asyncio.Event().wait()

        for key in ("c:a", "c:b"):
            with pytest.raises(LookupError, match="mine"):
                await streams.write_stream(key, failing(), version=b"version1")
            begun.clear()
            task = asyncio.ensure_future(streams.write_stream(key, waiting(), version=b"version1"))
            await asyncio.wait_for(begun.wait(), 10)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

        assert [(e.key, e.value) for e in await driver.scan(None, None, limit=5)] == [("c:a", b"old")]

    async def test_the_condition_of_a_stream_is_that_of_a_put(self, driver: D) -> None:
        streams = _streams(driver)
        if not driver.capabilities.conditional:
            with pytest.raises(Unsupported):
                await streams.write_stream("c:a", _pieces(b"v", (1,)), version=b"version1", expect=ABSENT)
            return

        first = await streams.write_stream("c:a", _pieces(b"1", (1,)), version=b"version1", expect=ABSENT)
        second = await streams.write_stream("c:a", _pieces(b"2", (1,)), version=b"version2", expect=ABSENT)
        third = await streams.write_stream("c:a", _pieces(b"3", (1,)), version=b"version3", expect=b"version2")
        fourth = await streams.write_stream("c:a", _pieces(b"4", (1,)), version=b"version4", expect=b"version1")

        assert (first, fourth) == (Committed(b"version1"), Committed(b"version4"))
        assert_conflict(second, "c:a", ABSENT, b"version1")
        assert_conflict(third, "c:a", b"version2", b"version1")
        assert await driver.get(["c:a"]) == [Entry("c:a", b"4", b"version4")]

    async def test_a_streamed_value_expires_and_one_that_has_deletes_its_key(self, driver: D) -> None:
        streams = _streams(driver)
        time = await times_of(driver, self.ttl_seconds)
        await put(driver, "c:b", b"old")

        for key, expires_at in (("c:a", time.expiry), ("c:b", time.now - 1)):
            outcome = await streams.write_stream(key, _pieces(b"v", (1,)), version=b"version1", expires_at=expires_at)
            assert outcome == Committed(b"version1")

        assert values_of(await driver.get(["c:a", "c:b"])) == [b"v", None]
        await time.reach_expiry()
        assert await driver.get(["c:a"]) == [None]

    async def test_a_stream_read_is_of_one_value_whatever_is_written_meanwhile(self, driver: D) -> None:
        streams = _streams(driver)
        old, new = b"o" * 3_000_000, b"n" * 3_000_000
        await streams.write_stream("c:a", _pieces(old, (1_000_000,) * 3), version=b"version1")
        found = await streams.read_stream("c:a")
        assert found is not None
        entry, pieces = found
        read = await anext(pieces)

        await streams.write_stream("c:a", _pieces(new, (1_000_000,) * 3), version=b"version2")
        try:
            async for piece in pieces:
                read += piece
        except KvError:  # it may be told so instead
            assert old.startswith(read)
        else:
            assert (entry.version, read) == (b"version1", old)
        assert await _streamed(driver, "c:a") == (Entry("c:a", b"", b"version2"), new)

    async def test_a_closed_driver_refuses_streams(self, driver: D) -> None:
        streams = _streams(driver)
        await put(driver, "c:a", b"1")
        await driver.close()

        with pytest.raises(StoreClosed):
            await streams.read_stream("c:a")
        with pytest.raises(StoreClosed):
            await streams.write_stream("c:a", _pieces(b"2", (1,)), version=b"version1")


def _streams(driver: Driver) -> Streams:
    if not isinstance(driver, Streams):
        pytest.skip("does not stream")
    return driver


async def _pieces(value: bytes, sizes: Iterable[int]) -> AsyncIterator[bytes]:
    at = 0
    for size in sizes:
        yield value[at : at + size]
        at += size


async def _streamed(driver: Driver, key: str) -> tuple[Entry, bytes]:
    assert isinstance(driver, Streams)
    found = await driver.read_stream(key)
    assert found is not None
    return found[0], b"".join([piece async for piece in found[1]])
