"""Watches and wakers: what is told, by whom, and what runs meanwhile."""

from __future__ import annotations

import asyncio
import gc
import itertools
import random
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

import kvpersist
from kvpersist import Change, Index, Repository, Store
from kvpersist.changes import Scope, feed, hub, survey
from kvpersist.changes.routing import Router
from kvpersist.driver import Driver
from kvpersist.errors import BadRequest, DeadlineExceeded, StoreClosed, Unavailable, Unsupported
from kvpersist_drivers.memory import MemoryDriver

_numbers = itertools.count()

Opens = Callable[[], Any]


class _Silent(MemoryDriver):
    """Tells of nothing, as a bucket."""

    def __init__(self, name: str = "") -> None:
        super().__init__(name)
        self.capabilities = msgspec.structs.replace(self.capabilities, watch=None)


class _Scripted(MemoryDriver):
    """Tells what the test says: keys, or an error."""

    def __init__(self) -> None:
        super().__init__()
        self.capabilities = msgspec.structs.replace(self.capabilities, watch="push")
        self.says: asyncio.Queue[tuple[str, ...] | Exception] = asyncio.Queue()
        self.watched: list[str] = []
        self.left = 0

    async def watch(self, prefix: str) -> AsyncGenerator[tuple[str, ...]]:
        self.watched.append(prefix)
        try:
            while True:
                said = await self.says.get()
                if isinstance(said, Exception):
                    raise said
                yield said
        finally:
            self.left += 1


@pytest.fixture(params=["memory", "silent", "sqlite", "files", "redis", "postgres"])
async def opens(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Opens]:
    """Opens one store after another at the same place."""
    name = f"w{time.time_ns():x}{next(_numbers)}"
    if request.param == "silent":
        driver = _Silent(name)
        yield lambda: kvpersist.open_store(_Silent(name))
        await driver.close()
        return
    urls = {"memory": f"memory://{name}", "sqlite": f"sqlite:///{tmp_path}/kv.db", "files": f"file://{tmp_path}/kv"}
    url = urls.get(request.param)
    if url is None:
        found = request.getfixturevalue("service")(request.param)[f"KVPERSIST_TEST_{request.param.upper()}_URL"]
        url = f"{found}?kv.{'table' if request.param == 'postgres' else 'base'}={name}"
    held = await kvpersist.open_store(url, sweep=None)
    yield lambda: kvpersist.open_store(url, sweep=None)
    await held.clear("", raw=True)
    await held.close()


async def _next(watch: kvpersist.Watch, keys: int = 1) -> list[str]:
    """The next changed keys, however many changes tell of them."""
    told: list[str] = []
    async with asyncio.timeout(10):
        while len(told) < keys:
            change = await anext(watch)
            assert not change.missed
            told += change.keys
    return told


async def _silence(watch: kvpersist.Watch) -> None:
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.15):
            raise AssertionError(await anext(watch))


async def test_what_a_store_commits_is_told_once_in_order(opens: Opens) -> None:
    async with opens() as store, store.watch("app:", interval=0.05) as watch:
        await store.put("app:a", 1)
        await store.put("other:a", 1)
        await store.put("app:b", 1)
        await store.delete("app:a")
        await store.put_many({"app:c": 1, "app:d": 1})

        told = await _next(watch, 5)
        assert [*told[:3], *sorted(told[3:])] == ["app:a", "app:b", "app:a", "app:c", "app:d"]
        await _silence(watch)


async def test_what_another_store_commits_is_told(opens: Opens) -> None:
    async with opens() as store, opens() as other:
        await other.put("app:gone", 1)
        async with store.watch("app:", interval=0.05) as watch:
            await other.put("app:a", 1)
            assert await _next(watch) == ["app:a"]
            await other.put("app:a", 2)
            assert await _next(watch) == ["app:a"]
            await other.delete("app:gone")
            assert await _next(watch) == ["app:gone"]
            await other.put("apple", 1)
            await _silence(watch)


async def test_some_keys_are_watched(opens: Opens) -> None:
    async with opens() as store, opens() as other, store.watch(["n:a", "n:ab"], interval=0.05) as watch:
        await other.put("n:abc", 1)
        await other.put("n:ab", 1)
        assert await _next(watch) == ["n:ab"]
        await store.put("n:a", 1)
        await store.put("n:b", 1)
        assert await _next(watch) == ["n:a"]
        await _silence(watch)


async def test_a_batch_is_one_change(opens: Opens) -> None:
    async with opens() as store, store.watch("app:", interval=0.05) as watch:
        async with store.atomic() as tx:
            tx.put("app:a", 1)
            tx.put("app:b", 1)

        async with asyncio.timeout(10):
            assert sorted((await anext(watch)).keys) == ["app:a", "app:b"]


async def test_a_waker_never_sleeps_through_a_commit(opens: Opens) -> None:
    """The reader reads, then waits: whatever the writer does in between, it learns of the last number."""
    dice = random.Random(3)
    rounds = 60
    async with opens() as store, opens() as other:
        waker = store._waker("n:", interval=0.05)
        await store.put("n:last", 0)

        async def write() -> None:
            for number in range(1, rounds + 1):
                await (store if dice.random() < 0.3 else other).put("n:last", number)
                await asyncio.sleep(dice.choice([0, 0, 0.001, 0.012]))

        writing = asyncio.ensure_future(write())
        async with asyncio.timeout(30):
            while await store.get("n:last") != rounds:
                began = time.monotonic()
                await waker.wait()
                assert time.monotonic() - began < hub._SAFETY / 2, "it was woken by the safety's clock"
        await writing
        waker.close()


async def test_nothing_runs_while_nobody_watches(opens: Opens) -> None:
    async with opens() as store:
        tasks = len(asyncio.all_tasks())
        async with store.watch("app:"), store.watch("app:"), store.watch(["b:c"]):
            pass
        store._waker("app:").close()
        async with asyncio.timeout(10):
            while store._hub is not None:
                await asyncio.sleep(0.01)

        assert len(asyncio.all_tasks()) == tasks


async def test_an_iteration_that_is_left_is_forgotten(opens: Opens) -> None:
    async with opens() as store:
        putting = asyncio.ensure_future(_put_again(store))
        async for change in store.watch("app:"):
            assert change.keys
            break
        putting.cancel()
        await asyncio.wait([putting])
        gc.collect()
        async with asyncio.timeout(10):
            while store._hub is not None:
                await asyncio.sleep(0.01)


async def _put_again(store: Store) -> None:
    while True:
        await store.put("app:a", 1)
        await asyncio.sleep(0.01)


async def test_the_iteration_ends_with_the_store(opens: Opens) -> None:
    told: list[Change] = []

    async def follow(watch: kvpersist.Watch) -> None:
        told.extend([change async for change in watch])

    async with opens() as store:
        following = asyncio.ensure_future(follow(store.watch("app:")))
        async with store.watch("app:"):
            await store.put("app:a", 1)
        async with asyncio.timeout(10):
            while not told and not following.done() and (store._hub is None or not store._hub._boxes):
                await asyncio.sleep(0.01)
        waker = store._waker("app:")
        waiting = asyncio.ensure_future(waker.wait())
        await asyncio.sleep(0.05)
        waiting.cancel()
        waiting = asyncio.ensure_future(waker.wait())
    async with asyncio.timeout(10):
        await following
        with pytest.raises(StoreClosed):
            await waiting
            await waker.wait()
    with pytest.raises(StoreClosed):
        async with store.watch("app:"):
            pass


# -- what a watcher is handed ---------------------------------------------------------------------


async def test_a_burst_is_joined() -> None:
    async with kvpersist.open_store("memory://") as store, store.watch("n:", collapse=0.05) as watch:
        for number in (1, 2, 1, 3):
            await store.put(f"n:{number}", 1)

        assert await anext(watch) == Change(("n:1", "n:2", "n:3"))


async def test_a_slow_watcher_is_told_that_it_missed_some_and_goes_on() -> None:
    async with kvpersist.open_store("memory://") as store, store.watch("n:", buffer=10) as watch:
        for number in range(11):
            await store.put(f"n:{number}", 1)
            await asyncio.sleep(0)
        async with asyncio.timeout(10):
            while not watch._box._missed:  # pyright: ignore[reportOptionalMemberAccess]
                await asyncio.sleep(0)
        await store.put("n:after", 1)

        assert await anext(watch) == Change((), missed=True)
        assert await anext(watch) == Change(("n:after",))


async def test_a_joined_burst_of_few_keys_overflows_nothing() -> None:
    async with kvpersist.open_store("memory://") as store, store.watch("n:", collapse=0.2, buffer=10) as watch:
        for number in range(1000):
            await store.put(f"n:{number % 7}", 1)
            await asyncio.sleep(0)

        assert await anext(watch) == Change(tuple(f"n:{number}" for number in range(7)))


class _Thing(msgspec.Struct):
    id: str
    user: str


async def test_what_is_a_repositorys_own_is_told_to_those_who_name_its_namespace() -> None:
    async with kvpersist.open_store("memory://") as store:
        things = Repository(store, _Thing, name="thing", key="id", indexes=[Index("user")], namespace="ns")
        await things.put(_Thing("0", "ada"))
        async with (
            store.watch("") as everything,
            store.watch("ns:thing") as theirs,
            store.watch("ns:thing#") as index,
        ):
            await things.put(_Thing("1", "ada"))
            await store.put("plain", 1)

            assert await _next(everything) == ["plain"]
            assert await _next(theirs) == ["ns:thing:1"]
            assert [key[:9] for key in await _next(index)] == ["ns:thing#"]


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        ([[]], {}),
        ([["a", ""]], {}),
        (["a"], {"collapse": -1.0}),
        (["a"], {"collapse": float("nan")}),
        (["a"], {"interval": 0.0}),
        (["a"], {"buffer": 0}),
    ],
)
async def test_what_makes_no_sense_is_refused(arguments: list[Any], options: dict[str, Any]) -> None:
    async with kvpersist.open_store("memory://") as store:
        with pytest.raises(BadRequest, match="watch"):
            store.watch(*arguments, **options)


# -- sources --------------------------------------------------------------------------------------


async def test_watchers_of_a_namespace_share_one_source() -> None:
    driver = _Scripted()
    driver.says.put_nowait(())
    async with (
        kvpersist.open_store(driver) as store,
        store.watch("n:a") as one,
        store.watch("n:b") as two,
        store.watch(["n:a", "n:c"]) as three,
    ):
        waker = store._waker("n:b")
        driver.says.put_nowait(("n:c", "n:a1", "n:b", "n:a"))
        told = [(await anext(watch)).keys for watch in (one, two, three)]
        await waker.wait(10)

    assert told == [("n:a1", "n:a"), ("n:b",), ("n:c", "n:a")]
    assert driver.watched == ["n:"]
    assert driver.left == 1
    await driver.close()


async def test_a_source_that_fails_is_asked_again_and_says_so() -> None:
    driver = _Scripted()
    driver.says.put_nowait(())
    async with kvpersist.open_store(driver) as store, store.watch("n:") as watch:
        driver.says.put_nowait(("n:a",))
        driver.says.put_nowait(Unavailable("gone"))
        driver.says.put_nowait(())
        driver.says.put_nowait(("n:b",))
        async with asyncio.timeout(10):
            while len(driver.watched) < 2 or not driver.says.empty():
                await asyncio.sleep(0.01)

        assert await anext(watch) == Change((), missed=True)
        assert await anext(watch) == Change(("n:b",))
    await driver.close()


async def test_a_waker_whose_source_fails_goes_by_the_clock_until_it_is_back() -> None:
    driver = _Scripted()
    async with kvpersist.open_store(driver) as store:
        waker = store._waker("n:", interval=0.02)
        driver.says.put_nowait(Unsupported("no such thing"))
        began = time.monotonic()
        for _ in range(4):
            await waker.wait()
        assert time.monotonic() - began < hub._SAFETY / 2
        driver.says.put_nowait(())
        another = store._waker("n:a")
        async with asyncio.timeout(10):
            while not waker.feeds[0].begun:
                await waker.wait()
        another.close()
        waker.close()
    await driver.close()


@pytest.mark.parametrize("error", [Unavailable("not there"), Unsupported("this"), ZeroDivisionError("a defect")])
async def test_a_source_that_does_not_begin_is_the_error_of_those_who_watch(error: Exception) -> None:
    driver = _Scripted()
    async with kvpersist.open_store(driver) as store:
        driver.says.put_nowait(error)
        with pytest.raises(type(error)):
            async with store.watch("n:"):
                pass
        driver.says.put_nowait(())
        async with store.watch("n:") as watch:
            driver.says.put_nowait(("n:a",))
            assert await _next(watch) == ["n:a"]
    await driver.close()


async def test_a_source_that_says_nothing_is_not_waited_for_without_end() -> None:
    driver = _Scripted()
    async with kvpersist.open_store(driver, timeout=0.05) as store:
        with pytest.raises(DeadlineExceeded, match="watch"):
            async with store.watch("n:"):
                pass
        assert store._hub is None or not store._hub._boxes
    await driver.close()


async def test_a_source_that_ends_for_good_ends_the_watch() -> None:
    driver = _Scripted()
    driver.says.put_nowait(())
    async with kvpersist.open_store(driver) as store, store.watch("n:") as watch:
        driver.says.put_nowait(StoreClosed("by its owner"))
        with pytest.raises(StoreClosed, match="owner"):
            await anext(watch)
        with pytest.raises(StopAsyncIteration):
            await anext(watch)
    await driver.close()


async def test_more_keys_than_are_remembered_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(survey, "_MOST", 1500)
    driver = _Silent()
    async with kvpersist.open_store(driver) as store:
        await store.put_many({f"n:{number}": 1 for number in range(1500)})
        async with store.watch("n:", interval=0.01) as watch:
            await store.put("n:more", 1)
            assert await _next(watch) == ["n:more"]
            with pytest.raises(Unsupported, match="1500 keys"):
                async with asyncio.timeout(10):
                    await anext(watch)
        with pytest.raises(Unsupported, match="1500 keys"):
            async with store.watch("n:"):
                pass
    await driver.close()


async def test_a_survey_ends_with_its_last_watcher() -> None:
    driver = _Silent()
    async with kvpersist.open_store(driver) as store:
        waker = store._waker("n:")
        async with store.watch("n:"), store.watch("n:"):
            assert store._hub is not None
            assert len(store._hub._own.listeners) == 2
        assert list(store._hub._own.listeners) == [waker]
        waker.close()
    await driver.close()


async def test_a_look_that_fails_is_repeated_and_nothing_is_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    driver, other = _Silent("look"), _Silent("look")
    fails = True
    scan = driver.scan

    async def failing(*arguments: Any, **options: Any) -> Any:
        if fails:
            raise Unavailable("not now")
        return await scan(*arguments, **options)

    async with (
        kvpersist.open_store(driver) as store,
        kvpersist.open_store(other) as writer,
        store.watch("n:", interval=0.01) as watch,
    ):
        monkeypatch.setattr(driver, "scan", failing)
        await writer.put("n:a", 1)
        await asyncio.sleep(0.1)
        fails = False

        assert await _next(watch) == ["n:a"]
    await driver.close()
    await other.close()


async def test_many_wakers_share_what_news_without_names_costs() -> None:
    driver = _Scripted()
    driver.capabilities = msgspec.structs.replace(driver.capabilities, watch="poll")
    async with kvpersist.open_store(driver) as store:
        wakers = [store._waker(f"n:{number}") for number in range(50)]
        driver.says.put_nowait(())
        for waker in wakers:
            await waker.wait()
        woken = 0
        began = time.monotonic()
        while time.monotonic() - began < 0.5:
            driver.says.put_nowait(())
            await asyncio.sleep(0.005)
            woken += wakers[0]._woken.is_set()
            wakers[0]._woken.clear()

        assert 1 <= woken <= 0.5 / (feed._SHARE * 50) + 2
    await driver.close()


def test_a_key_is_routed_to_its_prefixes_once_each() -> None:
    router = Router()
    scopes = {text: Scope(text) for text in ("", "a", "ab", "abc", "b")}
    for text, scope in scopes.items():
        router.add(text, scope)
    router.add("exact", Scope(keys=("ab", "x")))
    router.add("exact", Scope(keys=("ab", "x")))

    assert router.route(["ab", "x"]) == {"": ["ab", "x"], "a": ["ab"], "ab": ["ab"], "exact": ["ab", "x"]}
    for listener in [*scopes, "exact", "unknown"]:
        router.remove(listener)
    assert router.route(["ab", "x"]) == {}


async def test_a_space_tells_watchers_of_other_threads() -> None:
    name = f"threads{next(_numbers)}"

    async def write() -> None:
        async with kvpersist.open_store(f"memory://{name}") as other:
            for number in range(200):
                await other.put(f"n:{number}", number)

    async with kvpersist.open_store(f"memory://{name}") as store, store.watch("n:") as watch:
        writing = asyncio.create_task(asyncio.to_thread(lambda: asyncio.run(write())))
        told = await _next(watch, 200)
        await writing

    assert told == [f"n:{number}" for number in range(200)]


async def test_a_driver_that_is_no_watcher_says_so() -> None:
    async with kvpersist.open_store("sqlite:///:memory:") as store:
        driver: Driver = store.driver
        assert driver.capabilities.watch is None
        async with store.watch("n:", interval=0.02) as watch:
            await store.put("n:a", 1)
            assert await _next(watch) == ["n:a"]
