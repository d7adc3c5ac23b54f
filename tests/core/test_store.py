"""The store over the memory driver: values, keys, conditions, time, transactions, life."""

import asyncio
import math
import os
import threading
from collections.abc import AsyncIterator, Sequence
from datetime import UTC, datetime

import pytest

from kvpersist.driver import ABSENT, Batch, Capabilities, Check, Committed, Delete, Entry, Put
from kvpersist.errors import (
    BadKey,
    BadRequest,
    CommitUnknown,
    Conflict,
    CorruptRecord,
    ForkedStore,
    FormatMismatch,
    KeyTooLong,
    KvError,
    PartlyDone,
    ReservedNamespace,
    StoreClosed,
    Unavailable,
    Unencodable,
    Unsupported,
    WrongLoop,
)
from kvpersist.opening import open_store
from kvpersist.store import Store
from kvpersist_drivers.memory import MemoryDriver


class Clock:
    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
async def store(clock: Clock) -> AsyncIterator[Store]:
    async with open_store(MemoryDriver(), clock=clock) as store:
        yield store


async def collected(items: AsyncIterator[object]) -> list[object]:
    return [item async for item in items]


@pytest.mark.parametrize(
    "value",
    [
        *(None, False, True, 0, 1, -1, 2**64, -(2**80), 1.5, "", "text", b"", b"\0bytes", [], {}, [1, [None]]),
        {"a": {"b": [1, "x", b"y"]}},
        datetime(2024, 5, 1, 12, 30, 15, 123456, tzinfo=UTC),
    ],
)
@pytest.mark.parametrize("codec", ["msgpack", "json"])
async def test_a_value_comes_back_as_it_was_put(value: object, codec: str) -> None:
    async with open_store(MemoryDriver(), codec=codec) as store:  # type: ignore[arg-type]
        await store.put("k", value)

        found = await store.get("k", default="missing")

    assert found == value and type(found) is type(value)


@pytest.mark.parametrize("value", [{1: 2}, (1,), {"a": {"b": [object()]}}, datetime(2024, 1, 1), "\ud800"])  # noqa: DTZ001
async def test_a_value_that_could_not_come_back_alike_is_refused(store: Store, value: object) -> None:
    with pytest.raises(Unencodable):
        await store.put("k", value)

    assert await store.get("k") is None


async def test_an_absent_key_gives_the_default(store: Store) -> None:
    assert await store.get("nothing") is None
    assert await store.get("nothing", default=5) == 5
    assert await store.get_versioned("nothing") is None
    assert await store.get_raw("nothing") is None


async def test_an_expectation_that_does_not_hold_changes_nothing(store: Store) -> None:
    version = await store.put("k", "one", expect=ABSENT)
    later = await store.put("k", "two", expect=version)

    with pytest.raises(Conflict) as caught:
        await store.put("k", "three", expect=version)
    with pytest.raises(Conflict):
        await store.put("k", "three", expect=ABSENT)
    with pytest.raises(Conflict):
        await store.delete("k", expect=version)

    assert caught.value.found == later
    assert await store.get("k") == "two"


async def test_a_version_is_never_repeated(store: Store) -> None:
    first = await store.put("k", 1)
    await store.delete("k")

    assert await store.put("k", 1) != first


async def test_delete_says_whether_there_was_anything(store: Store) -> None:
    await store.put("k", 1)

    assert await store.delete("k") is True
    assert await store.delete("k") is False


async def test_an_entry_lives_for_its_ttl_and_a_put_without_one_lets_it_live(store: Store, clock: Clock) -> None:
    await store.put("a", 1, ttl=10)
    await store.put("b", 1, ttl=10)
    await store.put("b", 2)
    clock.now += 9.9
    assert await store.has("a")
    clock.now += 0.1

    assert not await store.has("a")
    assert await store.get_many(["a", "b"]) == [None, 2]
    assert await collected(store.keys()) == ["b"]


@pytest.mark.parametrize("ttl", [0, -5])
async def test_a_put_that_has_no_time_to_live_deletes(store: Store, ttl: float) -> None:
    await store.put("k", 1)

    await store.put("k", 2, ttl=ttl)

    assert not await store.has("k")


async def test_a_default_ttl_holds_unless_a_put_says_otherwise(clock: Clock) -> None:
    async with open_store(MemoryDriver(), clock=clock, ttl=5) as store:
        await store.put("default", 1)
        await store.put("long", 1, ttl=50)
        await store.put("ever", 1, ttl=math.inf)
        clock.now += 10

        assert await store.has_many(["default", "long", "ever"]) == [False, True, True]


async def test_touch_moves_the_expiry_and_keeps_the_value(store: Store, clock: Clock) -> None:
    await store.put("k", "kept", ttl=10)

    assert await store.touch("k", 100)
    assert not await store.touch("nothing", 100)
    clock.now += 50

    assert await store.get("k") == "kept"
    info = await store.info("k")
    assert info is not None and info.expires_at == 1_000_100


async def test_sweeping_removes_only_what_expired(store: Store, clock: Clock) -> None:
    for n in range(1_200):
        await store.put(f"t:{n}", n, ttl=5)
    await store.put("stays", 1)
    clock.now += 6

    assert await store.sweep() == 1_200
    assert await store.get("stays") == 1


async def test_many_keys_are_read_in_one_call_and_in_their_order(store: Store) -> None:
    await store.put_many({f"k{n}": n for n in range(250)})

    assert await store.get_many(["k7", "none", "k249", "k7"]) == [7, None, 249, 7]
    assert await store.delete_many(["k7", "none", "k249"]) == 2
    assert await store.has_many(["k7", "k8"]) == [False, True]


async def test_scan_walks_a_prefix_in_key_order_over_several_pages(store: Store) -> None:
    await store.put_many({f"a:{n:03}": n for n in range(50)} | {"b": "other", "a": "before"})

    forward = await collected(store.scan("a:", page=7))
    backward = await collected(store.scan("a:", page=7, reverse=True))
    between = await collected(store.scan("a:", start="a:010", end="a:013"))

    assert forward == [(f"a:{n:03}", n) for n in range(50)]
    assert backward == forward[::-1]
    assert between == forward[10:13]


async def test_keys_to_a_depth_leave_out_what_lies_deeper(store: Store) -> None:
    names = ["a", "a:1", "a:1:x", "a:1:x:y", "a:2", "b:1:x", "b:1:y", "c"]
    await store.put_many(dict.fromkeys(names, 1))

    assert await collected(store.keys("a:")) == names[1:5]
    assert await collected(store.keys("a:", max_depth=1)) == ["a:1", "a:2"]
    assert await collected(store.keys("a:", max_depth=2)) == ["a:1", "a:1:x", "a:2"]
    assert await collected(store.keys(max_depth=1)) == ["a", "c"]


async def test_a_snapshot_of_a_prefix_is_restored_below_another(store: Store) -> None:
    await store.put_many({"a:1": {"x": b"\0"}, "a:2": [1], "b:1": 0})

    snapshot = await store.snapshot("a:")
    await store.restore(snapshot, "copy:")

    assert snapshot == {"1": {"x": b"\0"}, "2": [1]}
    assert await collected(store.scan("copy:")) == [("copy:1", {"x": b"\0"}), ("copy:2", [1])]


async def test_clear_removes_a_prefix_and_nothing_else(store: Store) -> None:
    await store.put_many({f"a:{n}": n for n in range(1_500)} | {"ab": 1, "a": 1})

    assert await store.clear("a:") == 1_500
    assert await collected(store.keys()) == ["a", "ab"]


async def test_raw_bytes_are_kept_as_they_are(store: Store) -> None:
    await store.put_raw("k", b"\xff\x00raw")

    assert await store.get_raw("k") == b"\xff\x00raw"
    assert await store.get("k") == b"\xff\x00raw"


@pytest.mark.parametrize("key", ["", "\ud800", 5, None])
async def test_a_bad_key_is_refused(store: Store, key: str) -> None:
    with pytest.raises(BadKey):
        await store.put(key, 1)
    with pytest.raises(BadKey):
        await store.get(key)


async def test_a_key_of_512_bytes_is_kept_and_one_more_is_refused(store: Store) -> None:
    await store.put("é" * 256, 1)

    with pytest.raises(KeyTooLong) as caught:
        await store.put("é" * 256 + "x", 1)

    assert caught.value.size == 513
    assert await store.get("é" * 256) == 1


async def test_a_flipped_bit_is_found_and_a_scan_goes_on_past_it(store: Store) -> None:
    await store.put_many({"a:1": "one", "a:2": "two", "a:3": "three"})
    [entry] = await store.driver.get(["a:2"])
    assert entry is not None
    damaged = bytearray(entry.value)
    damaged[-1] ^= 1
    await store.driver.commit([Batch((Put("a:2", bytes(damaged)),), b"12345678")])

    with pytest.raises(CorruptRecord) as caught:
        await store.get("a:2")
    with pytest.raises(CorruptRecord):
        await collected(store.scan("a:"))
    skipped: list[CorruptRecord] = []
    found = await collected(store.scan("a:", on_corrupt=skipped.append))

    assert caught.value.key == "a:2"
    assert found == [("a:1", "one"), ("a:3", "three")]
    assert [error.key for error in skipped] == ["a:2"]


async def test_swapped_values_are_found(store: Store) -> None:
    await store.put_many({"a": "one", "b": "two"})
    [entry] = await store.driver.get(["a"])
    assert entry is not None
    await store.driver.commit([Batch((Put("b", entry.value),), b"12345678")])

    with pytest.raises(CorruptRecord):
        await store.get("b")


async def test_plain_writes_into_an_owned_namespace_are_refused_unless_raw(store: Store) -> None:
    await store._own("kv")  # pyright: ignore[reportPrivateUsage]

    for call in (
        lambda: store.put("kv:session:1", 1),
        lambda: store.put("kvpersist:format", 1),
        lambda: store.delete("kv:session:1"),
        lambda: store.clear("kv"),
        lambda: store.clear(""),
        lambda: store.put_many({"ok": 1, "kv:x": 2}),
    ):
        with pytest.raises(ReservedNamespace):
            await call()
    await store.put("kvx:1", 1)
    await store.put("kv", 1)
    await store.put("kv:session:1", 1, raw=True)

    assert await store.has_many(["ok", "kvx:1", "kv", "kv:session:1"]) == [False, True, True, True]


async def test_what_repositories_own_is_left_out_of_a_walk_unless_asked_for() -> None:
    async with open_store(MemoryDriver()) as store:
        await store._own("kv")  # pyright: ignore[reportPrivateUsage]
        await store.put_many({"a": 1, "kv": 2, "kvx:1": 3, "z:1": 4})
        await store.put_many({f"kv:rec:{n:03}": n for n in range(300)}, raw=True)
        await store._commit((Put("kv:rec#def", b"unframed"), Put("kv:rec#index:x!1", b"1")))  # pyright: ignore[reportPrivateUsage]

        assert await collected(store.keys()) == ["a", "kv", "kvx:1", "z:1"]
        assert await collected(store.scan(page=2)) == [("a", 1), ("kv", 2), ("kvx:1", 3), ("z:1", 4)]
        assert await collected(store.scan(page=2, reverse=True)) == [("z:1", 4), ("kvx:1", 3), ("kv", 2), ("a", 1)]
        assert await store.snapshot() == {"a": 1, "kv": 2, "kvx:1": 3, "z:1": 4}
        assert len(await collected(store.scan("kv:"))) == 300
        assert "kv:rec#def" in await collected(store.keys("kv:"))
        assert len(await collected(store.keys(raw=True))) == 307


async def test_a_later_store_knows_which_namespaces_are_owned() -> None:
    driver = MemoryDriver()
    async with open_store(driver) as first:
        await first._own("kv")  # pyright: ignore[reportPrivateUsage]

    async with open_store(driver) as second:
        with pytest.raises(ReservedNamespace):
            await second.put("kv:x", 1)


@pytest.mark.parametrize("newer", [{"format": 2}, {"keys": 2}, {"cipher": "aes"}, {"format": "x"}])
async def test_a_newer_format_is_refused_before_any_write(newer: dict[str, object]) -> None:
    driver = MemoryDriver()
    async with open_store(driver) as store:
        record = await store.get("kvpersist:format")
        await store.put("kvpersist:format", {**record, **newer}, raw=True)
    before = await driver.scan(None, None, limit=10)

    with pytest.raises(FormatMismatch):
        await open_store(driver)

    assert await driver.scan(None, None, limit=10) == before


async def test_atomic_writes_all_at_the_end_or_nothing(store: Store) -> None:
    async with store.atomic() as tx:
        tx.put("a", 1)
        tx.put("b", 2)
        assert await tx.get("a") == 1
        assert await store.get("a") is None
    with pytest.raises(ZeroDivisionError):
        async with store.atomic() as tx:
            tx.put("a", 5)
            tx.put("b", 1 / 0)

    assert await store.get_many(["a", "b"]) == [1, 2]


async def test_atomic_fails_when_what_it_read_changed_meanwhile(store: Store) -> None:
    await store.put("balance", 10)

    with pytest.raises(Conflict):
        async with store.atomic() as tx:
            balance = await tx.get("balance")
            await store.put("balance", 100)
            tx.put("balance", balance - 1)

    assert await store.get("balance") == 100


async def test_atomic_fails_when_what_was_absent_came_to_be(store: Store) -> None:
    with pytest.raises(Conflict):
        async with store.atomic() as tx:
            assert await tx.get("new") is None
            await store.put("new", 1)
            tx.put("other", 1)

    assert not await store.has("other")


async def test_atomic_merges_the_operations_of_one_key(store: Store) -> None:
    await store.put("old", 1)
    async with store.atomic() as tx:
        tx.put("fleeting", 1)
        tx.delete("fleeting")
        assert await tx.get("old") == 1
        tx.put("old", 2)
        tx.put("old", 3)
        assert await tx.get("fleeting") is None
        assert await tx.get("gone") is None
        tx.delete("gone")

    assert await store.get_many(["old", "fleeting", "gone"]) == [3, None, None]


async def test_atomic_checks_the_read_that_was_used_when_two_were_under_way(store: Store) -> None:
    await store.put("n", 1)
    slow = asyncio.Event()
    get, held = store.driver.get, False

    async def gated(keys: Sequence[str]) -> list[Entry | None]:
        nonlocal held
        found_late = held
        held = True
        if found_late:
            await slow.wait()
        return await get(keys)

    store.driver.get = gated  # type: ignore[method-assign]
    with pytest.raises(Conflict):
        async with store.atomic() as tx:
            first, second = asyncio.ensure_future(tx.get("n")), asyncio.ensure_future(tx.get("n"))
            n = await first
            store.driver.get = get  # type: ignore[method-assign]
            await store.put("n", 100)
            slow.set()
            await second
            tx.put("n", n + 1)

    assert await store.get("n") == 100


async def test_a_write_after_the_end_of_its_block_is_refused(store: Store) -> None:
    async with store.atomic() as tx:
        tx.put("a", 1)

    with pytest.raises(BadRequest):
        tx.put("b", 1)


async def test_transact_tries_again_until_it_wins(store: Store) -> None:
    await store.put("n", 0)

    async def increment(tx: object) -> int:
        n = await tx.get("n")  # type: ignore[attr-defined]
        await asyncio.sleep(0)
        tx.put("n", n + 1)  # type: ignore[attr-defined]
        return n + 1

    results = await asyncio.gather(*(store.transact(increment, attempts=200) for _ in range(20)))

    assert sorted(results) == list(range(1, 21))
    assert await store.get("n") == 20


async def test_transact_gives_up_after_its_attempts(store: Store) -> None:
    tries = 0

    async def loses(tx: object) -> None:
        nonlocal tries
        tries += 1
        await tx.get("n")  # type: ignore[attr-defined]
        await store.put("n", tries)
        tx.put("n", "mine")  # type: ignore[attr-defined]

    with pytest.raises(Conflict):
        await store.transact(loses, attempts=3)

    assert tries == 3 and await store.get("n") == 3


async def test_a_closed_store_says_so_and_closes_twice() -> None:
    store = await open_store(MemoryDriver())
    await store.close()
    await store.close()

    with pytest.raises(StoreClosed):
        await store.get("k")


async def test_a_driver_handed_in_is_left_open() -> None:
    driver = MemoryDriver()
    async with open_store(driver) as store:
        await store.put("k", 1)

    assert await driver.get(["k"]) != [None]


async def test_another_event_loop_is_refused(store: Store) -> None:
    errors: list[BaseException] = []

    def elsewhere() -> None:
        try:
            asyncio.run(store.get("k"))
        except WrongLoop as error:
            errors.append(error)

    thread = threading.Thread(target=elsewhere)
    thread.start()
    await asyncio.to_thread(thread.join)

    assert len(errors) == 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this platform")
async def test_a_forked_child_is_refused(store: Store) -> None:
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            store.get("k").send(None)
        except ForkedStore:
            os.write(write, b"refused")
        except BaseException as error:  # noqa: BLE001  # reported to the parent
            os.write(write, repr(error).encode())
        os._exit(0)

    os.waitpid(child, 0)
    assert os.read(read, 100) == b"refused"
    os.close(read)
    os.close(write)


class LosesAnswers(MemoryDriver):
    """Commits, or does not, and answers neither way."""

    def __init__(self, lands: bool, settled: bool, atomic: bool = True) -> None:
        super().__init__()
        self.lands, self.settled, self.armed = lands, settled, False
        if not atomic:
            self.capabilities = Capabilities(conditional=True, conditional_delete=True, ordered=True)

    async def commit(self, batches: Sequence[Batch]) -> list[Committed | KvError]:
        if not self.armed:
            return await super().commit(batches)
        if self.lands:
            await super().commit(batches)
        raise CommitUnknown((), "connection reset", self.settled)

    async def get(self, keys: Sequence[str]) -> list[Entry | None]:
        return await super().get(keys)


@pytest.mark.parametrize("atomic", [True, False])
async def test_a_lost_answer_is_decided_by_finding_the_own_version(atomic: bool) -> None:
    driver = LosesAnswers(lands=True, settled=False, atomic=atomic)
    async with open_store(driver) as store:
        driver.armed = True

        version = await store.put("k", "landed")

        found = await store.get_versioned("k")
        assert found is not None and (found.value, found.version) == ("landed", version)


async def test_a_lost_write_is_known_not_to_have_happened_only_where_the_driver_settled_it() -> None:
    for settled, expected in ((True, Unavailable), (False, CommitUnknown)):
        driver = LosesAnswers(lands=False, settled=settled)
        async with open_store(driver) as store:
            version = await store.put("k", "before")
            driver.armed = True

            with pytest.raises(expected):
                await store.put("k", "after", expect=version)

            driver.armed = False
            assert await store.get("k") == "before"


async def test_a_lost_delete_is_not_reported_as_undone_because_of_what_it_checked() -> None:
    driver = LosesAnswers(lands=True, settled=True)
    async with open_store(driver) as store:
        version = await store.put("definition", 1)
        await store.put("k", 1)
        driver.armed = True

        with pytest.raises(CommitUnknown):
            await store._commit((Check("definition", version), Delete("k")))  # pyright: ignore[reportPrivateUsage]


async def test_a_cancelled_close_goes_on_and_a_second_one_waits_for_it() -> None:
    class Slow(MemoryDriver):
        ended = False

        async def close(self) -> None:
            await gate.wait()
            await super().close()
            self.ended = True

    gate = asyncio.Event()
    driver = Slow()
    store = await open_store(driver)
    store._owns_driver = True  # pyright: ignore[reportPrivateUsage]
    closing = asyncio.ensure_future(store.close())
    await asyncio.sleep(0)
    closing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await closing
    second = asyncio.ensure_future(store.close())
    await asyncio.sleep(0)
    gate.set()

    await second

    assert driver.ended


@pytest.mark.parametrize("call", ["ttl", "page"])
async def test_a_number_that_means_nothing_is_refused(store: Store, call: str) -> None:
    with pytest.raises(BadRequest):
        await (store.put("k", 1, ttl=math.nan) if call == "ttl" else collected(store.scan(page=0)))

    assert not await store.has("k")


async def test_an_unconditional_write_that_cannot_be_found_stays_unknown() -> None:
    driver = LosesAnswers(lands=False, settled=True)
    async with open_store(driver) as store:
        await store.put("k", "before")
        driver.armed = True

        with pytest.raises(CommitUnknown) as caught:
            await store.put("k", "after")

        assert caught.value.keys == ("k",) and caught.value.outcome == "unknown"


async def test_atomic_is_unsupported_where_batches_are_not() -> None:
    async with open_store(LosesAnswers(lands=True, settled=True, atomic=False)) as store:
        with pytest.raises(Unsupported):
            async with store.atomic():
                pass


async def test_put_many_names_what_was_not_written() -> None:
    class Picky(MemoryDriver):
        async def commit(self, batches: Sequence[Batch]) -> list[Committed | KvError]:
            refused = [any(op.key == "k150" for op in batch.ops) for batch in batches]
            done = iter(await super().commit([b for b, no in zip(batches, refused, strict=True) if not no]))
            return [Unavailable("no") if no else next(done) for no in refused]

    async with open_store(Picky()) as store:
        with pytest.raises(PartlyDone) as caught:
            await store.put_many({f"k{n}": n for n in range(250)})

        assert set(caught.value.failed) == {f"k{n}" for n in range(100, 200)}
        assert caught.value.done == 150
        assert await store.has_many(["k0", "k99", "k100", "k199", "k200"]) == [True, True, False, False, True]
