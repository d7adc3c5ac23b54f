"""Large values: whole or absent, in bounded memory, and nothing left of them when they are gone."""

from __future__ import annotations

import asyncio
import os
import tracemalloc
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from kvpersist import codec
from kvpersist.driver import ABSENT, Batch, Delete, Driver, Entry, Put
from kvpersist.errors import (
    BadKey,
    BadOption,
    BadRequest,
    CommitUnknown,
    Conflict,
    CorruptRecord,
    KvError,
    LargeValue,
    ReservedNamespace,
    StoreClosed,
    Unavailable,
    ValueReplaced,
)
from kvpersist.large import LEASE, MARK, PIECE, LargeWriter
from kvpersist.opening import open_store
from kvpersist.store import Store
from kvpersist.testing import Crashed, FaultyDriver, ManualClock
from kvpersist_drivers.filesystem import FilesystemDriver, FilesystemOptions
from kvpersist_drivers.memory import MemoryDriver
from kvpersist_drivers.sqlite import SqliteDriver, SqliteOptions

DAY = 86_400.0

Opens = Callable[[Path], Any]

KINDS: dict[str, Opens] = {
    "memory": lambda _: _ready(MemoryDriver()),
    "sqlite": lambda path: SqliteDriver.open(SqliteOptions(path=str(path / "kv.db"), durability="normal")),
    "files": lambda path: FilesystemDriver.open(FilesystemOptions(path=str(path / "kv"), durability="normal")),
    "ordered": lambda _: _ready(FaultyDriver(MemoryDriver(), without={"atomic_batch"})),
    "unconditional": lambda _: _ready(FaultyDriver(MemoryDriver(), without={"atomic_batch", "conditional"})),
}


async def _ready(driver: Driver) -> Driver:
    return driver


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture(params=KINDS)
async def store(request: pytest.FixtureRequest, tmp_path: Path, clock: ManualClock) -> AsyncIterator[Store]:
    driver = await KINDS[request.param](tmp_path)
    async with open_store(driver, clock=clock, sweep=None) as store:
        yield store
    await driver.close()


@pytest.fixture
async def chunked(clock: ManualClock) -> AsyncIterator[Store]:
    async with open_store(MemoryDriver(), clock=clock, sweep=None) as store:
        yield store


async def written(store: Store, key: str, data: bytes, **options: Any) -> LargeWriter:
    async with store.open_write(key, **options) as out:
        for at in range(0, len(data), 100_000):
            await out.write(data[at : at + 100_000])
    return out


async def value_of(store: Store, key: str) -> bytes | None:
    async with store.open_read(key) as value:
        return None if value is None else await value.read()


async def stored(driver: Driver) -> list[str]:
    """Every key that the driver holds, but for the format record."""
    return [e.key for e in await driver.scan(None, None, limit=10_000, keys_only=True) if e.key != "kvpersist:format"]


def pieces(keys: list[str]) -> list[str]:
    return [key for key in keys if MARK in key]


@pytest.mark.parametrize("size", [0, 1, PIECE - 1, PIECE, PIECE + 1, 4 * PIECE, 4 * PIECE + 1, 9 * PIECE + 7])
async def test_what_was_written_in_parts_is_read_in_parts(store: Store, size: int) -> None:
    data = os.urandom(size)

    out = await written(store, "app:film", data)
    async with store.open_read("app:film") as value:
        assert value is not None
        parts = [part async for part in value]

    assert b"".join(parts) == data
    assert max(map(len, parts), default=0) <= PIECE
    assert (value.size, value.version, out.size) == (size, out.version, size)
    info = await store.info("app:film")
    assert info is not None and info.version == out.version
    assert [key async for key in store.keys("")] == ["app:film"]


async def test_a_value_of_one_piece_is_an_ordinary_one(store: Store) -> None:
    data = os.urandom(PIECE)

    await written(store, "app:film", data)

    assert await store.get("app:film") == await store.get_raw("app:film") == data
    assert await stored(store.driver) == ["app:film"]


async def test_an_absent_key_is_none_and_any_value_can_be_read_in_parts(store: Store) -> None:
    assert await value_of(store, "app:none") is None

    await store.put_raw("app:raw", bytes(3 * PIECE))
    await store.put("app:text", "x")

    assert await value_of(store, "app:raw") == bytes(3 * PIECE)
    assert await value_of(store, "app:text") == await store.get_raw("app:text")


async def test_reads_of_any_size_join_up(chunked: Store) -> None:
    data = os.urandom(3 * PIECE)
    await written(chunked, "app:film", data)

    async with chunked.open_read("app:film") as value:
        assert value is not None
        parts = [await value.read(10), await anext(value), await value.read(PIECE + 1), await value.read()]
        assert await value.read() == await value.read(5) == b""

    assert b"".join(parts) == data
    assert [len(part) for part in parts[:3]] == [10, PIECE - 10, PIECE + 1]


@pytest.mark.parametrize("data", [bytearray(b"a" * 10), memoryview(b"abcd").cast("I"), memoryview(b"ab"), b""])
async def test_parts_may_be_any_buffer(chunked: Store, data: Any) -> None:
    async with chunked.open_write("app:film") as out:
        await out.write(data)

    assert await chunked.get("app:film") == bytes(data)


async def test_a_large_value_is_not_given_whole(store: Store) -> None:
    await written(store, "app:film", bytes(PIECE + 1))
    await store.put("app:a", 1)
    await store.put("app:z", 2)
    passed: list[LargeValue] = []

    for call in (
        store.get("app:film"),
        store.get_raw("app:film"),
        store.get_versioned("app:film"),
        store.get_many(["app:a", "app:film"]),
        store.snapshot("app:"),
    ):
        with pytest.raises(LargeValue, match="open_read") as caught:
            await call
        assert (caught.value.key, caught.value.size) == ("app:film", PIECE + 1)
    assert [item async for item in store.scan("app:", on_large=passed.append)] == [("app:a", 1), ("app:z", 2)]
    assert [error.key for error in passed] == ["app:film"]
    if store.capabilities.atomic_batch != "none":
        with pytest.raises(LargeValue):
            async with store.atomic() as tx:
                await tx.get("app:film")


async def test_lists_pass_over_the_pieces(store: Store) -> None:
    for name in ("a", "b", "zebra"):
        await written(store, f"app:{name}", bytes(3 * PIECE))
        await written(store, name, bytes(3 * PIECE))
    await store.put("app:#l", 1)
    await store.put("app:!", 1)
    await store.put("!", 1)
    everything = ["!", "a", "app:!", "app:#l", "app:a", "app:b", "app:zebra", "b", "zebra"]

    for keys in (store.keys(), store.keys(raw=True)):
        assert [key async for key in keys if not key.startswith("kvpersist")] == everything
    assert [key async for key in store.keys("app:", max_depth=1)] == everything[2:7]
    for page in (1, 2, 3, 200):
        for reverse in (False, True):
            if reverse and not store.capabilities.reverse:
                continue
            passed: list[LargeValue] = []
            found = [key async for key, _ in store.scan(page=page, reverse=reverse, on_large=passed.append)]
            assert found == (everything[:1] + everything[2:4])[:: -1 if reverse else 1]
            assert len(passed) == 6


async def test_a_scan_reads_no_pieces_that_another_process_wrote() -> None:
    """The other one may have been the first to write any."""
    inner = MemoryDriver()
    sizes: list[int] = []

    class Counting(FaultyDriver):
        async def scan(self, start: str | None, end: str | None, **options: Any) -> list[Entry]:
            found = await super().scan(start, end, **options)
            sizes.append(sum(len(entry.value) for entry in found))
            return found

    async with open_store(inner, sweep=None) as other, open_store(Counting(inner), sweep=None) as store:
        await store.put("app:a", 1)
        await written(other, "app:film", bytes(20 * PIECE))

        for prefix in ("", "ap", "app:"):
            assert [key async for key, _ in store.scan(prefix, on_large=lambda _: None)] == ["app:a"]

    assert sum(sizes) < 3000


async def test_the_keys_of_pieces_cannot_be_written(chunked: Store) -> None:
    for key in (f"app:{MARK}c!x", MARK, f"{MARK}!"):
        with pytest.raises(BadKey, match="large"):
            await chunked.put(key, 1)
        with pytest.raises(BadKey, match="large"):
            await chunked.delete(key)
        with pytest.raises(BadKey, match="large"):
            async with chunked.open_write(key):
                pass
    for key in (f"app:a{MARK}", f"app:a:{MARK}x", f"x{MARK}"):
        await chunked.put(key, 1)
        assert await chunked.get(key) == 1


async def _copied(source: Driver, target: Driver) -> None:
    for entry in await source.scan(None, None, limit=1000):
        await target.commit([Batch((Put(entry.key, entry.value, None, entry.expires_at),), os.urandom(8))])


async def test_a_store_copied_entry_by_entry_in_key_order_holds_its_large_values(chunked: Store) -> None:
    data = os.urandom(5 * PIECE)
    await written(chunked, "app:film", data)
    copy = MemoryDriver()

    await _copied(chunked.driver, copy)

    async with open_store(copy, sweep=None) as other:
        assert await value_of(other, "app:film") == data
        await other.sweep()
        assert await value_of(other, "app:film") == data
        await other.delete("app:film")
        assert await stored(copy) == []


# -- what replaces or removes it leaves nothing -----------------------------------------------------


async def _tx_put(store: Store) -> None:
    async with store.atomic() as tx:
        tx.put("app:film", 1)


async def _tx_delete(store: Store) -> None:
    async with store.atomic() as tx:
        tx.delete("app:film")


async def _restored(store: Store) -> None:
    await store.restore({"film": 1, **{f"{n}": n for n in range(10)}}, "app:")


REPLACING: dict[str, Callable[[Store], Any]] = {
    "put": lambda store: store.put("app:film", 1),
    "put_raw": lambda store: store.put_raw("app:film", b"1"),
    "put_many": lambda store: store.put_many({"app:film": 1}),
    "restore": _restored,
    "small": lambda store: written(store, "app:film", b"1"),
    "dead": lambda store: store.put("app:film", 1, ttl=-1),
    "delete": lambda store: store.delete("app:film"),
    "delete_many": lambda store: store.delete_many(["app:film"]),
    "clear": lambda store: store.clear("app:fi"),
    "clear_all": lambda store: store.clear("app:"),
    "touch_dead": lambda store: store.touch("app:film", 0),
    "tx_put": _tx_put,
    "tx_delete": _tx_delete,
}


@pytest.mark.parametrize("how", REPLACING)
async def test_whatever_replaces_or_removes_it_leaves_none_of_its_pieces(store: Store, how: str) -> None:
    if how.startswith("tx") and store.capabilities.atomic_batch == "none":
        pytest.skip("no atomic batches")
    await written(store, "app:film", bytes(9 * PIECE))
    await written(store, "app:other", bytes(2 * PIECE))
    kept = await stored(store.driver)

    await REPLACING[how](store)

    left = await stored(store.driver)
    assert [key for key in pieces(left) if key not in kept] == []
    if how == "clear_all":
        assert left == []
    else:
        assert len(pieces(left)) == (2 if store.driver.capabilities.server == "files" else 3)
        assert await value_of(store, "app:other") == bytes(2 * PIECE)


async def test_a_large_value_over_a_large_one_leaves_only_its_own_pieces(store: Store) -> None:
    await written(store, "app:film", bytes(9 * PIECE))
    await written(store, "app:film", b"x" * (2 * PIECE))

    assert await value_of(store, "app:film") == b"x" * (2 * PIECE)
    assert len(pieces(await stored(store.driver))) == (2 if store.driver.capabilities.server == "files" else 3)


async def test_a_delete_by_version_and_a_count_do_not_count_pieces(chunked: Store) -> None:
    out = await written(chunked, "app:film", bytes(9 * PIECE))
    with pytest.raises(Conflict):
        await chunked.delete("app:film", expect=b"12345678")
    await chunked.delete("app:film", expect=out.version)
    assert await stored(chunked.driver) == []

    await written(chunked, "app:film", bytes(9 * PIECE))
    assert await chunked.clear("app:") == 1
    assert await stored(chunked.driver) == []


async def test_another_process_that_knows_of_no_large_values_leaves_pieces_to_the_sweep() -> None:
    inner = MemoryDriver()
    async with open_store(inner, sweep=None) as first, open_store(inner, sweep=None) as second:
        await written(first, "app:film", bytes(3 * PIECE))
        await second.put("app:film", 1)
        assert len(pieces(await stored(inner))) == 4

        await first.sweep()

        assert await stored(inner) == ["app:film"]


async def test_expired_pieces_go_with_the_sweep(store: Store, clock: ManualClock) -> None:
    out = await written(store, "app:film", bytes(3 * PIECE), ttl=10)
    async with store.open_read("app:film") as value:
        assert value is not None and value.expires_at == clock() + 10
    assert await store.touch("app:film", 100)
    clock.advance(50)
    await store.sweep()
    assert await value_of(store, "app:film") == bytes(3 * PIECE)
    assert out.version is not None

    clock.advance(60 if store.capabilities.atomic_batch != "none" else DAY)
    assert await value_of(store, "app:film") is None
    await store.sweep()

    assert await stored(store.driver) == []


async def test_a_time_to_live_begins_at_the_end_and_none_stores_nothing(chunked: Store, clock: ManualClock) -> None:
    async with chunked.open_write("app:film", ttl=10) as out:
        await out.write(bytes(2 * PIECE))
        clock.advance(100)
    async with chunked.open_read("app:film") as value:
        assert value is not None and value.expires_at == clock() + 10

    await written(chunked, "app:film", bytes(2 * PIECE), ttl=0)
    assert await stored(chunked.driver) == []
    with pytest.raises(BadOption):
        async with chunked.open_write("app:film", ttl=float("nan")):
            pass


async def test_conditions_are_judged_at_the_end(store: Store) -> None:
    if not store.capabilities.conditional:
        pytest.skip("no conditions")
    first = await written(store, "app:film", bytes(2 * PIECE), expect=ABSENT)
    for size in (1, 2 * PIECE):
        with pytest.raises(Conflict) as caught:
            await written(store, "app:film", bytes(size), expect=ABSENT)
        assert (caught.value.key, caught.value.position) == ("app:film", 0)
        with pytest.raises(Conflict):
            await written(store, "app:film", bytes(size), expect=b"12345678")
    kept = await stored(store.driver)
    assert len(pieces(kept)) == (2 if store.driver.capabilities.server == "files" else 3)

    await written(store, "app:film", b"x" * (2 * PIECE), expect=first.version)

    assert await value_of(store, "app:film") == b"x" * (2 * PIECE)


# -- writers that do not get to the end ---------------------------------------------------------------


class Mine(Exception):
    pass


@pytest.mark.parametrize("size", [0, 10, PIECE, 3 * PIECE, 11 * PIECE])
async def test_a_block_that_raises_stores_nothing_and_leaves_nothing(store: Store, size: int) -> None:
    await store.put("app:film", "old")

    with pytest.raises(Mine):
        async with store.open_write("app:film") as out:
            await out.write(bytes(size))
            raise Mine

    assert await store.get("app:film") == "old"
    assert await stored(store.driver) == ["app:film"]
    with pytest.raises(BadRequest):
        await out.write(b"late")


async def test_a_cancelled_writer_leaves_nothing(store: Store) -> None:
    begun = asyncio.Event()

    async def writing() -> None:
        async with store.open_write("app:film") as out:
            await out.write(bytes(6 * PIECE))
            begun.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(writing())
    await begun.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task

    assert await value_of(store, "app:film") is None
    assert await stored(store.driver) == []


@pytest.mark.parametrize("nth", range(1, 8))
@pytest.mark.parametrize("effect", [False, True])
async def test_a_writer_cancelled_at_any_commit_stores_all_or_nothing(nth: int, effect: bool) -> None:
    driver = FaultyDriver(MemoryDriver())
    async with open_store(driver, sweep=None) as store:
        data = os.urandom(9 * PIECE)
        gate = driver.hold("commit", nth, effect=effect)
        task = asyncio.create_task(written(store, "app:film", data))
        if nth < 7:
            await asyncio.wait_for(gate.reached(), 5)
            task.cancel()
            await asyncio.sleep(0)
            gate.release()
            with pytest.raises(asyncio.CancelledError):
                await task
        else:
            await task

        assert await value_of(store, "app:film") in (data, None)
        left = await stored(driver)
        assert left == [] if await store.info("app:film") is None else len(pieces(left)) == 10


async def test_a_failed_write_ends_the_block(chunked: Store) -> None:
    driver = FaultyDriver(chunked.driver)
    async with open_store(driver, sweep=None) as store:
        with pytest.raises(BadRequest, match="nothing is stored"):
            async with store.open_write("app:film") as out:
                driver.fail("commit", 4)
                with pytest.raises(Unavailable):
                    await out.write(bytes(20 * PIECE))

        assert await stored(driver) == []


async def test_one_write_at_a_time() -> None:
    driver = FaultyDriver(MemoryDriver())
    async with open_store(driver, sweep=None) as store:
        gate = driver.hold("commit")
        async with store.open_write("app:film") as out:
            first = asyncio.create_task(out.write(bytes(2 * PIECE)))
            await gate.reached()
            with pytest.raises(BadRequest, match="one write at a time"):
                await out.write(b"x")
            gate.release()
            await first
        assert await value_of(store, "app:film") == bytes(2 * PIECE)


async def test_a_writer_whose_store_was_closed_says_so() -> None:
    inner = MemoryDriver()
    store = await open_store(inner, sweep=None)
    with pytest.raises(StoreClosed):
        async with store.open_write("app:film") as out:
            await out.write(bytes(2 * PIECE))
            await store.close()


@pytest.mark.parametrize("kind", ["memory", "ordered", "unconditional", "files"])
@pytest.mark.parametrize("old", [None, "old", "large"])
async def test_a_death_at_any_step_leaves_the_old_value_or_the_new_and_the_sweep_the_rest(
    tmp_path: Path, clock: ManualClock, kind: str, old: str | None
) -> None:
    data, before, nth, deaths = os.urandom(9 * PIECE), os.urandom(5 * PIECE), 0, 0
    without = {"ordered": ["atomic_batch"], "unconditional": ["atomic_batch", "conditional"]}.get(kind, [])
    while True:
        nth += 1
        (tmp_path / f"{nth}").mkdir()
        inner = await KINDS["files" if kind == "files" else "memory"](tmp_path / f"{nth}")
        driver = FaultyDriver(inner, without=without)
        driver.capabilities = msgspec.structs.replace(driver.capabilities, coalesce="none")
        async with open_store(driver, clock=clock, sweep=None) as store:
            if old == "old":
                await store.put_raw("app:film", before)
            elif old == "large":
                await written(store, "app:film", before)
            driver.crash(nth)
            try:
                await written(store, "app:film", data)
            except Crashed:
                deaths += 1
        driver.heal()
        async with open_store(inner, clock=clock, sweep=None) as store:
            found = await value_of(store, "app:film")
            assert found in (data, before if old else None)
            await store.sweep()
            assert await value_of(store, "app:film") == found
            clock.advance(LEASE + 1)
            await store.sweep()
            assert await value_of(store, "app:film") == found
            assert driver.crashed or found == data
            await store.delete("app:film")
            await store.sweep()
            assert await stored(inner) == []
        await inner.close()
        if not driver.crashed:
            break
    assert deaths == nth - 1 > (3 if kind == "files" else 5)


@pytest.mark.parametrize("kind", ["memory", "ordered", "files"])
@pytest.mark.parametrize("operation", ["get", "commit", "scan", "step"])
@pytest.mark.parametrize("effect", [False, True])
async def test_a_failure_at_any_call_is_told_and_stores_all_or_nothing(
    tmp_path: Path, clock: ManualClock, kind: str, operation: Any, effect: bool
) -> None:
    data, before, nth = os.urandom(9 * PIECE), os.urandom(5 * PIECE), 0
    while True:
        nth += 1
        (tmp_path / f"{nth}").mkdir()
        inner = await KINDS["files" if kind == "files" else "memory"](tmp_path / f"{nth}")
        driver = FaultyDriver(inner, without=["atomic_batch"] if kind == "ordered" else [])
        async with open_store(driver, clock=clock, sweep=None) as store:
            await written(store, "app:film", before)
            fault = driver.fail(operation, nth, effect=effect)
            error: KvError | None = None
            try:
                await written(store, "app:film", data)
            except KvError as caught:
                error = caught
            driver.heal()
            found = await value_of(store, "app:film")
            if error is None:
                assert found == data
            elif not isinstance(error, CommitUnknown):
                assert found == before
            assert found in (before, data)
            clock.advance(LEASE + 1)
            await store.sweep()
            assert await value_of(store, "app:film") == found
            await store.delete("app:film")
            assert await stored(driver) == []
        await inner.close()
        if not fault.fired:
            break
    assert nth > 1


async def test_the_sweep_never_takes_the_pieces_of_a_writer_at_work(store: Store, clock: ManualClock) -> None:
    data = os.urandom(12 * PIECE)
    async with store.open_write("app:film") as out:
        for at in range(0, len(data), PIECE):
            await out.write(data[at : at + PIECE])
            clock.advance(LEASE / 2)
            await store.sweep()

    assert await value_of(store, "app:film") == data


async def test_a_writer_that_comes_back_after_its_time_cannot_commit(clock: ManualClock) -> None:
    async with open_store(MemoryDriver(), clock=clock, sweep=None) as store:
        await store.put("app:film", "old")
        for more in (b"", bytes(9 * PIECE)):
            with pytest.raises(Unavailable, match="24 hours"):
                async with store.open_write("app:film") as out:
                    await out.write(bytes(3 * PIECE))
                    clock.advance(LEASE + 1)
                    await store.sweep()
                    await out.write(more)

            assert await store.get("app:film") == "old"
            assert await stored(store.driver) == ["app:film"]


@pytest.mark.parametrize("kind", ["memory", "ordered"])
async def test_a_sweep_and_a_late_writer_agree_at_every_step(clock: ManualClock, kind: str) -> None:
    """The writer's last commit is held at each step of a sweep that takes it for dead, and the other way round."""
    for nth in range(1, 12):
        inner = MemoryDriver()
        driver = FaultyDriver(inner, without=["atomic_batch"] if kind == "ordered" else [])
        async with open_store(driver, clock=clock, sweep=None) as sweeping, open_store(inner, clock=clock) as store:
            writer = store.open_write("app:film")
            out = await writer.__aenter__()
            data = os.urandom(3 * PIECE)
            await out.write(data)
            clock.advance(LEASE + 1)
            await sweeping._refresh()
            gate = driver.hold("step", nth)
            sweep = asyncio.create_task(sweeping.sweep())
            waiting = asyncio.create_task(gate.reached())
            await asyncio.wait([sweep, waiting], return_when=asyncio.FIRST_COMPLETED)
            failed = False
            try:
                await writer.__aexit__(None, None, None)
            except Unavailable:
                failed = True
            gate.release()
            await sweep
            waiting.cancel()

            found = await value_of(store, "app:film")
            assert found == (None if failed else data)
            assert failed == (nth > 1)


async def _around(driver: Driver, key: str) -> None:
    """Replace a value as a process does that knows of no large ones, and dies."""
    await driver.commit([Batch((Put(key, codec.frame(key, b"other", codec.RAW, 0)),), os.urandom(8))])


async def test_the_sweep_goes_on_where_it_was(chunked: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvpersist.large._TURN", 3)
    for number in range(8):
        await written(chunked, f"app{number % 2}:{number}", bytes(2 * PIECE))
        await _around(chunked.driver, f"app{number % 2}:{number}")

    counts: list[int] = []
    for _ in range(4):
        await chunked._tend()
        counts.append(len([key for key in await stored(chunked.driver) if f"{MARK}o!" in key]))

    assert counts == [5, 2, 0, 0]


async def test_the_sweeper_looks_after_large_values_by_itself() -> None:
    inner = MemoryDriver()
    async with open_store(inner, sweep=0.01) as store, open_store(inner, sweep=None) as other:
        await written(other, "app:film", bytes(2 * PIECE))
        await _around(inner, "app:film")
        async with asyncio.timeout(5):
            while pieces(await stored(inner)):
                await asyncio.sleep(0.01)
        assert "app" in store._large


# -- readers and writers at once ------------------------------------------------------------------------


async def test_a_reader_of_a_replaced_value_finishes_it_or_is_told(store: Store) -> None:
    old, new = os.urandom(12 * PIECE), os.urandom(12 * PIECE)
    await written(store, "app:film", old)
    async with store.open_read("app:film") as value:
        assert value is not None
        first = await anext(value)

        await written(store, "app:film", new)

        if store.driver.capabilities.server == "files":  # an open file stays
            assert first + await value.read() == old
        else:
            with pytest.raises(ValueReplaced) as caught:
                await value.read()
            assert caught.value.retryable
    assert await value_of(store, "app:film") == new


async def test_many_writers_and_readers_of_one_key_never_mix_values(store: Store) -> None:
    values = [bytes([number]) * (PIECE * (2 + number)) for number in range(5)]
    await written(store, "app:film", values[0])
    seen: set[int] = set()

    async def write(number: int) -> None:
        for _ in range(3):
            await written(store, "app:film", values[number])

    async def read() -> None:
        for _ in range(10):
            try:
                found = await value_of(store, "app:film")
            except ValueReplaced:
                continue
            assert found in values
            seen.add(len(found))

    await asyncio.gather(*(write(number) for number in range(5)), *(read() for _ in range(3)))

    last = await value_of(store, "app:film")
    assert last in values and seen
    kept = pieces(await stored(store.driver))
    assert len(kept) == (2 if store.driver.capabilities.server == "files" else len(last) // PIECE + 1)


async def test_of_many_who_expect_absence_one_wins(store: Store) -> None:
    if not store.capabilities.conditional:
        pytest.skip("no conditions")

    async def attempt(number: int) -> bool:
        try:
            await written(store, "app:film", bytes([number]) * (3 * PIECE), expect=ABSENT)
        except Conflict:
            return False
        return True

    won = await asyncio.gather(*map(attempt, range(6)))

    assert won.count(True) == 1
    assert await value_of(store, "app:film") == bytes([won.index(True)]) * (3 * PIECE)
    assert len(pieces(await stored(store.driver))) == (2 if store.driver.capabilities.server == "files" else 4)


# -- damage ---------------------------------------------------------------------------------------------


async def _spoil(driver: Driver, key: str, change: Callable[[bytes], bytes | None]) -> None:
    [entry] = await driver.get([key])
    assert entry is not None
    value = change(entry.value)
    op = Delete(key) if value is None else Put(key, value)
    await driver.commit([Batch((op,), entry.version)])


@pytest.mark.parametrize(
    "change",
    [
        lambda value: None,
        lambda value: b"",
        lambda value: value[:-1],
        lambda value: value + b"x",
        lambda value: value[:100] + bytes([value[100] ^ 1]) + value[101:],
        lambda value: codec.frame("app:other", value[6:], codec.RAW, 0),
    ],
    ids=["gone", "empty", "cut", "longer", "flipped", "swapped"],
)
async def test_a_damaged_piece_is_told_and_never_given(chunked: Store, change: Any) -> None:
    data = os.urandom(7 * PIECE)
    await written(chunked, "app:film", data)
    names = [key for key in await stored(chunked.driver) if f"{MARK}c!" in key]

    await _spoil(chunked.driver, names[5], change)

    parts: list[bytes] = []
    with pytest.raises(CorruptRecord) as caught:
        async with chunked.open_read("app:film") as value:
            assert value is not None
            async for part in value:
                parts.append(part)  # noqa: PERF401  # those before the error count
    assert caught.value.key == "app:film" and names[5] in str(caught.value)
    assert b"".join(parts) == data[: 5 * PIECE]


@pytest.mark.parametrize("change", [lambda v: v[:-1], lambda v: v[:200] + bytes([v[200] ^ 4]) + v[201:], lambda v: b""])
async def test_a_damaged_stream_is_told(tmp_path: Path, change: Any) -> None:
    driver = await KINDS["files"](tmp_path)
    async with open_store(driver, sweep=None) as store:
        await written(store, "app:film", os.urandom(3 * PIECE))
        [name] = [key for key in await stored(driver) if f"{MARK}c!" in key]
        await _spoil(driver, name, change)
        with pytest.raises(CorruptRecord, match="app:film"):
            await value_of(store, "app:film")
        await _spoil(driver, name, lambda _: None)
        with pytest.raises(CorruptRecord, match="gone"):
            await value_of(store, "app:film")
    await driver.close()


async def test_a_damaged_manifest_is_told_and_keeps_its_pieces(chunked: Store, clock: ManualClock) -> None:
    await written(chunked, "app:film", bytes(2 * PIECE))
    kept = await stored(chunked.driver)
    await _spoil(chunked.driver, "app:film", lambda value: value[:-1] + b"!")

    with pytest.raises(CorruptRecord):
        await value_of(chunked, "app:film")
    clock.advance(10 * DAY)
    await chunked.sweep()

    assert await stored(chunked.driver) == kept


async def test_a_damaged_owner_keeps_its_pieces(chunked: Store) -> None:
    await written(chunked, "app:film", bytes(2 * PIECE))
    [owner] = [key for key in await stored(chunked.driver) if f"{MARK}o!" in key]
    await _spoil(chunked.driver, owner, lambda value: value[:-1])
    await chunked.delete("app:film")

    await chunked.sweep()

    assert len(pieces(await stored(chunked.driver))) == 3


# -- limits -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sqlite", "files", "ordered"])
async def test_sixty_four_mebibytes_pass_through_a_few_pieces_of_memory(tmp_path: Path, kind: str) -> None:
    inner = await KINDS["sqlite" if kind == "ordered" else kind](tmp_path)
    driver = FaultyDriver(inner, without=["atomic_batch"] if kind == "ordered" else [])
    part = os.urandom(1 << 20)
    async with open_store(driver, sweep=None) as store:
        await written(store, "app:warm", bytes(2 * PIECE))
        tracemalloc.start()
        try:
            async with store.open_write("app:film") as out:
                for _ in range(64):
                    await out.write(part)
            wrote = tracemalloc.get_traced_memory()[1]
            tracemalloc.reset_peak()
            size = 0
            async with store.open_read("app:film") as value:
                assert value is not None
                async for piece in value:
                    size += len(piece)
            read = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    await inner.close()

    assert size == 64 << 20
    assert wrote < 20 * PIECE, wrote
    assert read < 20 * PIECE, read


async def test_a_namespace_that_leaves_no_room_is_refused_before_anything_is_written() -> None:
    async with open_store({"type": "memory"}, sweep=None) as store:
        long = "p" * 500 + ":k"
        assert await written(store, long, bytes(2 * PIECE))  # a driver without a limit
    with pytest.raises(ReservedNamespace):
        async with store.open_write("kvpersist:x"):
            pass


@asynccontextmanager
async def _both(inner: Driver) -> AsyncIterator[tuple[Store, Store]]:
    async with open_store(inner, sweep=None) as first, open_store(inner, sweep=None) as second:
        yield first, second


async def test_namespaces_do_not_disturb_each_other() -> None:
    inner = MemoryDriver()
    async with _both(inner) as (first, second):
        for key in ("film", "a:film", "b:film", ":film", "c:film"):
            await written(first, key, key.encode() * PIECE)
        await second.sweep()
        await first.clear("a:")
        await second.delete("b:film")
        await first.sweep()

        for key in ("film", ":film", "c:film"):
            assert await value_of(second, key) == key.encode() * PIECE
        assert not [key for key in await stored(inner) if key.startswith(("a:", "b:"))]
