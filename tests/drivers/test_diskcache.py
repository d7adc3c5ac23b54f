"""The diskcache driver: the contract, the model, and what it must never load."""

from __future__ import annotations

import asyncio
import atexit
import itertools
import os
import pickle
import sqlite3
import stat
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("diskcache")

import diskcache

from kvpersist import open_store, urls
from kvpersist.driver import ABSENT, Committed, Delete, Put
from kvpersist.errors import (
    BadKey,
    BadOption,
    Busy,
    Conflict,
    CorruptRecord,
    ForkedStore,
    FormatMismatch,
    KvError,
)
from kvpersist.testing import DriverContract, batch, driver_machine
from kvpersist_drivers.diskcache import DiskcacheDriver, DiskcacheOptions


def _options(path: Path | str, **options: Any) -> DiskcacheOptions:
    return DiskcacheOptions(path=str(path), **{"durability": "normal", **options})


def _sql(path: Path | str, statement: str, *values: Any) -> list[Any]:
    with closing(sqlite3.connect(Path(path) / "cache.db")) as db, db:
        return db.execute(statement, values).fetchall()


class TestDiskcache(DriverContract[DiskcacheDriver]):
    @pytest.fixture
    async def driver(self, tmp_path: Path) -> AsyncIterator[DiskcacheDriver]:
        driver = await DiskcacheDriver.open(_options(tmp_path / "kv"))
        yield driver
        await driver.close()

    async def peek(self, driver: DiskcacheDriver, key: str) -> bytes | None:
        found = _sql(driver.path, "SELECT value FROM Cache WHERE key = ?", key)
        return found[0][0][20:] if found else None

    async def reopen(self, driver: DiskcacheDriver) -> DiskcacheDriver:
        return await DiskcacheDriver.open(_options(driver.path))


_folder = tempfile.TemporaryDirectory(prefix="kvpersist-diskcache-")
atexit.register(_folder.cleanup)
_numbers = itertools.count()


async def _open_new() -> DiskcacheDriver:
    return await DiskcacheDriver.open(_options(f"{_folder.name}/{next(_numbers)}"))


async def _open_again(closed: DiskcacheDriver) -> DiskcacheDriver:
    return await DiskcacheDriver.open(_options(closed.path))


TestDiskcacheModel = driver_machine(_open_new, reopener=_open_again, max_examples=25).TestCase


@asynccontextmanager
async def _opened(path: Path | str, **options: Any) -> AsyncIterator[DiskcacheDriver]:
    driver = await DiskcacheDriver.open(_options(path, **options))
    try:
        yield driver
    finally:
        await driver.close()


# -- nothing is loaded ------------------------------------------------------------------------------


class _Bomb:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return (os.mkdir, (str(self.mark),))


@pytest.fixture
def bomb(tmp_path: Path) -> bytes:
    return pickle.dumps(_Bomb(tmp_path / "executed"))


_PLANT = "INSERT INTO Cache (key, raw, store_time, access_time, mode, filename, value) VALUES (?, ?, 0, 0, ?, ?, ?)"


async def test_the_bomb_goes_off_where_it_is_loaded(tmp_path: Path, bomb: bytes) -> None:
    with diskcache.Cache(str(tmp_path / "plain")) as cache:
        _sql(tmp_path / "plain", _PLANT, "c:a", 1, 4, None, bomb)
        cache.get("c:a")

    assert (tmp_path / "executed").is_dir()


@pytest.mark.parametrize("in_file", [False, True])
async def test_a_pickled_value_is_told_and_never_loaded(tmp_path: Path, bomb: bytes, in_file: bool) -> None:
    async with _opened(tmp_path / "kv") as driver:
        await driver.commit([batch(Put("c:b", b"1"))])
        (tmp_path / "kv" / "bomb.val").write_bytes(bomb)
        _sql(tmp_path / "kv", _PLANT, "c:a", 1, 4, "bomb.val" if in_file else None, None if in_file else bomb)

        with pytest.raises(CorruptRecord, match="pickled") as caught:
            await driver.get(["c:b", "c:a"])
        assert caught.value.key == "c:a"
        for keys_only in (False, True):
            found = await driver.scan(None, None, limit=10, keys_only=keys_only)
            assert [entry.key for entry in found] == ["c:a", "c:b"]
        [conflict] = await driver.commit([batch(Put("c:a", b"2", ABSENT))])
        assert isinstance(conflict, Conflict)
        with pytest.raises(CorruptRecord):
            await driver._run(lambda: driver._cache.get("c:a"))
        with pytest.raises(CorruptRecord):
            await driver._run(lambda: driver._cache.peekitem(last=True))
        async with open_store(driver) as store:
            damaged: list[CorruptRecord] = []
            assert [key async for key, _ in store.scan("c", on_corrupt=damaged.append)] == []
            assert [error.key for error in damaged] == ["c:a", "c:b"]  # b"1" is no frame either
            assert await store.delete("c:a")
        [outcome] = await driver.commit([batch(Put("c:a", b"2", ABSENT))])
        assert isinstance(outcome, Committed)

    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(("raw", "key"), [(0, None), (1, None), (0, "c:a"), (1, 7)])
async def test_a_pickled_key_is_told_and_never_loaded(tmp_path: Path, bomb: bytes, raw: int, key: Any) -> None:
    async with _opened(tmp_path / "kv") as driver:
        await driver.commit([batch(Put("c:b", b"1"))])
        _sql(tmp_path / "kv", _PLANT, bomb if key is None else key, raw, 1, None, b"value")

        for reverse in (False, True):
            for keys_only in (False, True):
                with pytest.raises(CorruptRecord, match="not loaded"):
                    await driver.scan(None, None, limit=10, reverse=reverse, keys_only=keys_only)
        for iterate in (lambda: list(driver._cache), lambda: list(driver._cache.iterkeys())):
            with pytest.raises(CorruptRecord):
                await driver._run(iterate)
        assert [entry.key for entry in await driver.scan("c:b", "d", limit=10)] == ["c:b"]
        if key == "c:a":
            with pytest.raises(CorruptRecord):
                await driver.get(["c:a"])
        await driver.compact()

    assert not (tmp_path / "executed").exists()


async def test_nothing_is_pickled_on_the_way_in(tmp_path: Path) -> None:
    async with _opened(tmp_path / "kv") as driver:
        for key, value in ((("a",), b"v"), (1, b"v"), (b"a", b"v"), ("a", {"x": 1}), ("a", "text"), ("a", 1)):
            with pytest.raises(BadKey):
                await driver._run(lambda key=key, value=value: driver._cache.set(key, value))
        assert await driver.scan(None, None, limit=10) == []


async def test_large_values_are_in_their_rows_and_damage_is_told(tmp_path: Path) -> None:
    value = os.urandom(3_000_000)
    async with _opened(tmp_path / "kv") as driver:
        await driver.commit([batch(Put("c:a", value))])
        [entry] = await driver.get(["c:a"])
        assert entry is not None and entry.value == value
        assert {path.name.partition("-")[0] for path in (tmp_path / "kv").iterdir()} == {"cache.db"}

        _sql(tmp_path / "kv", "UPDATE Cache SET value = ?", b"short")
        with pytest.raises(CorruptRecord, match="c:a"):
            await driver.get(["c:a"])


# -- whose folder it is ------------------------------------------------------------------------------


@pytest.mark.parametrize("before", [None, 0o755, 0o777])
async def test_the_folder_is_for_its_owner_alone(tmp_path: Path, before: int | None) -> None:
    if before is not None:
        (tmp_path / "kv").mkdir()
        (tmp_path / "kv").chmod(before)

    async with _opened(tmp_path / "kv"):
        assert stat.S_IMODE((tmp_path / "kv").stat().st_mode) == 0o700


async def test_what_is_not_ours_is_refused_and_not_touched(tmp_path: Path) -> None:
    with diskcache.Cache(str(tmp_path / "theirs")) as cache:
        cache["a"] = 1
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "x").write_text("x")
    (tmp_path / "file").write_text("x")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "cache.db").write_bytes(b"no database at all" * 100)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    for name in ("theirs", "files", "file", "other"):
        with pytest.raises(FormatMismatch):
            await DiskcacheDriver.open(_options(tmp_path / name))

    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path in before} == before


async def test_an_empty_cache_is_taken(tmp_path: Path) -> None:
    diskcache.Cache(str(tmp_path / "kv")).close()

    async with _opened(tmp_path / "kv") as driver:
        [outcome] = await driver.commit([batch(Put("a", b"1"))])
        assert isinstance(outcome, Committed)


async def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    async with _opened(tmp_path / "kv"):
        pass
    _sql(tmp_path / "kv", "UPDATE Settings SET value = 2 WHERE key = 'kvpersist'")

    with pytest.raises(FormatMismatch, match="newer"):
        await DiskcacheDriver.open(_options(tmp_path / "kv"))


async def test_a_path_that_diskcache_would_change_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOMEWHERE", "x")

    with pytest.raises(BadOption, match="another folder"):
        await DiskcacheDriver.open(_options(tmp_path / "$SOMEWHERE"))


def test_a_url_names_an_absolute_folder() -> None:
    target = urls.parse("diskcache:///var/kv?kv.durability=normal&kv.busy_timeout=100ms")

    assert target.options == DiskcacheOptions(path="/var/kv", durability="normal", busy_timeout=0.1)
    for url in ("diskcache://host/x", "diskcache://", "diskcache:///x?y=1", "diskcache://u:p@/x"):
        with pytest.raises(BadOption):
            urls.parse(url)


# -- nothing is evicted, others wait -----------------------------------------------------------------


async def test_nothing_is_evicted(tmp_path: Path) -> None:
    async with _opened(tmp_path / "kv") as driver:
        await driver._run(lambda: driver._cache.reset("size_limit", 1))
        await driver.commit([batch(*(Put(f"c:{n}", bytes(10_000)) for n in range(300)))])
        await driver.commit([batch(Delete("c:0"))])

        assert len(await driver.scan(None, None, limit=1000)) == 299
        assert driver._cache.eviction_policy == "none" and driver._cache.cull_limit == 0


async def test_a_held_lock_is_busy_and_a_failed_transaction_is_over(tmp_path: Path) -> None:
    async with _opened(tmp_path / "kv", busy_timeout=0.05) as driver:
        with closing(sqlite3.connect(tmp_path / "kv" / "cache.db", isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            with pytest.raises(Busy):
                await driver.commit([batch(Put("a", b"1"))])
            assert await driver.get(["a"]) == [None]
            other.execute("ROLLBACK")
        _sql(tmp_path / "kv", "CREATE TRIGGER no BEFORE INSERT ON Cache BEGIN SELECT RAISE(ABORT, 'no'); END")
        with pytest.raises(KvError):
            await driver.commit([batch(Put("b", b"1"))])
        _sql(tmp_path / "kv", "DROP TRIGGER no")

        assert await driver.commit([one := batch(Put("b", b"1"))]) == [Committed(one.version)]


async def test_a_lone_surrogate_fails_its_batch_alone(tmp_path: Path) -> None:
    async with _opened(tmp_path / "kv") as driver:
        outcomes = await driver.commit([batch(Put("\ud800", b"1")), batch(Put("a", b"1"))])

    assert [type(outcome) for outcome in outcomes] == [BadKey, Committed]


async def test_two_processes_worth_of_drivers_count_together(tmp_path: Path) -> None:
    async with _opened(tmp_path / "kv") as one, _opened(tmp_path / "kv") as two:

        async def increment(driver: DiskcacheDriver) -> None:
            for _ in range(20):
                while True:
                    [entry] = await driver.get(["n"])
                    count, expect = (0, ABSENT) if entry is None else (int(entry.value), entry.version)
                    [outcome] = await driver.commit([batch(Put("n", b"%d" % (count + 1), expect))])
                    if isinstance(outcome, Committed):
                        break

        await asyncio.gather(*(increment(driver) for driver in (one, two, one, two)))
        [entry] = await one.get(["n"])

    assert entry is not None and entry.value == b"80"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
async def test_a_forked_child_is_refused(tmp_path: Path) -> None:
    async with _opened(tmp_path / "kv") as driver:
        pid = os.fork()
        if pid == 0:
            try:
                driver.get(["a"]).send(None)
            except ForkedStore:
                os._exit(0)
            except BaseException:  # noqa: BLE001  # the child must end here
                os._exit(2)
            os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_the_driver_needs_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    from kvpersist.errors import MissingExtra

    monkeypatch.setitem(sys.modules, "diskcache", None)
    monkeypatch.delitem(sys.modules, "kvpersist_drivers.diskcache")
    with pytest.raises(MissingExtra, match=r"kvpersist\[diskcache\]"):
        import kvpersist_drivers.diskcache  # noqa: F401


async def test_conversations_live_in_it(tmp_path: Path) -> None:
    import kvpersist
    from kvpersist import Message

    async with kvpersist.open(f"diskcache://{tmp_path}/kv") as db:
        session = await db.sessions.create(user_id="Ada")
        await db.messages.append_many(session.id, [Message(role="user", content=f"{n}") for n in range(60)])
        assert [m.content for m in await db.messages.last(session.id, 2)] == ["58", "59"]
        assert [s.id for s in await db.sessions.find(user_id="Ada")] == [session.id]
