"""Reading, writing and deleting single entries."""

from __future__ import annotations

import os

from kvpersist.driver import Committed, Delete, Entry, Put
from kvpersist.testing.contract.base import Contract, D
from kvpersist.testing.contract.steps import batch, fill, put, values_of

__all__ = ["Entries"]


class Entries(Contract[D]):
    """What is written is read, until it is replaced or deleted."""

    async def test_a_value_written_is_stored_and_read_back_under_its_version(self, driver: D) -> None:
        version = await put(driver, "c:a", b"value")

        [entry] = await driver.get(["c:a"])

        assert entry == Entry("c:a", b"value", version)
        assert await self.peek(driver, "c:a") == b"value"

    async def test_get_answers_in_the_order_of_the_keys_with_repeats(self, driver: D) -> None:
        await fill(driver, {"c:a": b"1", "c:b": b"2", "c:c": b"3"})

        entries = await driver.get(["c:c", "c:a", "c:none", "c:c", "c:b", "c:none", "c:a"])

        assert values_of(entries) == [b"3", b"1", None, b"3", b"2", None, b"1"]

    async def test_get_of_no_keys_and_commit_of_no_batches_answer_nothing(self, driver: D) -> None:
        assert await driver.get([]) == []
        assert await driver.commit([]) == []

    async def test_an_absent_key_reads_as_none(self, driver: D) -> None:
        assert await driver.get(["c:a"]) == [None]
        assert await self.peek(driver, "c:a") is None

    async def test_a_thousand_keys_are_read_in_one_call(self, driver: D) -> None:
        stored = {f"c:{number:04}": b"%d" % number for number in range(0, 1000, 2)}
        await fill(driver, stored)
        keys = [f"c:{number:04}" for number in reversed(range(1000))]

        entries = await driver.get(keys)

        assert values_of(entries) == [stored.get(key) for key in keys]

    async def test_a_put_replaces_value_and_version(self, driver: D) -> None:
        await put(driver, "c:a", b"a longer first value")
        version = await put(driver, "c:a", b"new")

        [entry] = await driver.get(["c:a"])

        assert entry == Entry("c:a", b"new", version)
        assert await self.peek(driver, "c:a") == b"new"

    async def test_a_deleted_key_is_gone_from_get_scan_and_backend(self, driver: D) -> None:
        await fill(driver, {"c:a": b"1", "c:b": b"2"})
        assert values_of(await driver.get(["c:a"])) == [b"1"]
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
            version = await put(driver, "c:a", b"%d" % number)
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
        await fill(driver, values)

        entries = await driver.get(list(values))
        scanned = await driver.scan("c:", "c;", limit=100)

        assert values_of(entries) == list(values.values())
        assert {entry.key: entry.value for entry in scanned} == values
        for key, value in values.items():
            assert await self.peek(driver, key) == value
