"""The SQLite driver: the contract, the model, and what is its own."""

from __future__ import annotations

import asyncio
import atexit
import fcntl
import gc
import itertools
import os
import random
import shutil
import sqlite3
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import pytest

from kvpersist.driver import ABSENT, Check, Committed, Delete, Put
from kvpersist.errors import (
    BadKey,
    BadOption,
    BadRequest,
    Busy,
    Conflict,
    CorruptRecord,
    FormatMismatch,
    KvError,
    ReadOnly,
    StoreClosed,
    Unavailable,
    ValueTooLarge,
)
from kvpersist.testing import DriverContract, ManualClock, batch, driver_machine
from kvpersist_drivers.sqlite import SqliteDriver, SqliteOptions, _database, _lock, _watch, _writer


class TestSqlite(DriverContract[SqliteDriver]):
    @pytest.fixture
    async def driver(self, tmp_path: Path) -> AsyncIterator[SqliteDriver]:
        self._path = str(tmp_path / "kv.db")
        driver = await SqliteDriver.open(self._options())
        yield driver
        await driver.close()

    def _options(self) -> SqliteOptions:
        return SqliteOptions(path=self._path, durability="normal")

    async def peek(self, driver: SqliteDriver, key: str) -> bytes | None:
        return _peek(self._path, key)

    async def reopen(self, driver: SqliteDriver) -> SqliteDriver:
        return await SqliteDriver.open(self._options())


class TestSqliteInline(TestSqlite):
    def _options(self) -> SqliteOptions:
        return SqliteOptions(path=self._path, durability="normal", reads="inline", table="other")

    async def peek(self, driver: SqliteDriver, key: str) -> bytes | None:
        return _peek(self._path, key, "other")


class TestSqliteInMemory(DriverContract[SqliteDriver]):
    @pytest.fixture
    async def driver(self) -> AsyncIterator[SqliteDriver]:
        driver = await SqliteDriver.open(SqliteOptions(path=":memory:"))
        yield driver
        await driver.close()

    async def peek(self, driver: SqliteDriver, key: str) -> bytes | None:
        rows = driver._reader.connection.execute("SELECT v FROM kv WHERE k = ?", (key,)).fetchall()
        return rows[0][0] if rows else None


_folder = tempfile.TemporaryDirectory(prefix="kvpersist-sqlite-")
atexit.register(_folder.cleanup)
_numbers = itertools.count()


async def _open_new() -> SqliteDriver:
    return await SqliteDriver.open(SqliteOptions(path=f"{_folder.name}/{next(_numbers)}.db", durability="normal"))


async def _open_again(closed: SqliteDriver) -> SqliteDriver:
    return await SqliteDriver.open(SqliteOptions(path=closed._database.path, durability="normal"))


TestSqliteModel = driver_machine(_open_new, reopener=_open_again).TestCase


def _peek(path: str, key: str, table: str = "kv") -> bytes | None:
    connection = sqlite3.connect(path)
    try:
        rows = connection.execute(f'SELECT v FROM "{table}" WHERE k = ?', (key,)).fetchall()
    finally:
        connection.close()
    return rows[0][0] if rows else None


@asynccontextmanager
async def _opened(path: Path | str, **options: Any) -> AsyncIterator[SqliteDriver]:
    driver = await SqliteDriver.open(SqliteOptions(path=str(path), **{"durability": "normal", **options}))
    try:
        yield driver
    finally:
        await driver.close()


async def _value(driver: SqliteDriver, key: str) -> bytes | None:
    [entry] = await driver.get([key])
    return None if entry is None else entry.value


def _files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def _make(path: Path, *statements: str) -> None:
    connection = sqlite3.connect(path, isolation_level=None)
    for statement in statements:
        connection.execute(statement)
    connection.close()


# -- what is at the path -------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["rwc", "rw", "ro"])
@pytest.mark.parametrize(
    "statements",
    [
        ["CREATE TABLE notes (text)"],
        ["PRAGMA journal_mode = WAL", "CREATE TABLE kv (k TEXT PRIMARY KEY, v, ver, exp)"],
        ["PRAGMA application_id = 252006673", "PRAGMA user_version = 1"],
        ["PRAGMA user_version = 7"],
    ],
)
async def test_another_programs_database_is_refused_and_not_touched(
    tmp_path: Path, mode: str, statements: list[str]
) -> None:
    _make(tmp_path / "theirs.db", *statements)
    before = _files(tmp_path)

    with pytest.raises(FormatMismatch, match=r"theirs\.db"):
        await SqliteDriver.open(SqliteOptions(path=str(tmp_path / "theirs.db"), mode=mode))  # pyright: ignore[reportArgumentType]

    assert _files(tmp_path) == before


@pytest.mark.parametrize("content", [b"x", b"# notes\n" * 500, os.urandom(8192), bytes(4096), b"SQLite format 3\x00"])
async def test_a_file_that_is_no_database_is_refused_and_not_touched(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "notes.db").write_bytes(content)

    with pytest.raises(FormatMismatch, match=r"notes\.db"):
        await SqliteDriver.open(SqliteOptions(path=str(tmp_path / "notes.db")))

    assert _files(tmp_path) == {"notes.db": content}


async def test_a_store_of_a_newer_format_is_refused_and_not_touched(tmp_path: Path) -> None:
    async with _opened(tmp_path / "kv.db") as driver:
        await driver.commit([batch(Put("c:a", b"1"))])
    _make(tmp_path / "kv.db", "PRAGMA user_version = 2")
    before = _files(tmp_path)

    with pytest.raises(FormatMismatch, match="newer format 2"):
        await SqliteDriver.open(SqliteOptions(path=str(tmp_path / "kv.db")))

    assert _files(tmp_path) == before


async def test_a_newer_format_that_is_only_in_the_log_yet_is_refused(tmp_path: Path) -> None:
    async with _opened(tmp_path / "kv.db"):
        other = sqlite3.connect(tmp_path / "kv.db", isolation_level=None)
        other.execute("PRAGMA wal_autocheckpoint = 0")
        other.execute("PRAGMA user_version = 2")

        with pytest.raises(FormatMismatch, match="newer format 2"):
            await SqliteDriver.open(SqliteOptions(path=str(tmp_path / "kv.db")))

        other.close()


async def test_a_table_of_another_shape_is_refused(tmp_path: Path) -> None:
    async with _opened(tmp_path / "kv.db", table="kv"):
        pass
    _make(tmp_path / "kv.db", "CREATE TABLE other (id INTEGER, text TEXT)")

    with pytest.raises(FormatMismatch, match="id, text"):
        await SqliteDriver.open(SqliteOptions(path=str(tmp_path / "kv.db"), table="other"))


@pytest.mark.parametrize("mode", ["rwc", "rw", "ro"])
async def test_a_folder_is_refused(tmp_path: Path, mode: str) -> None:
    with pytest.raises(FormatMismatch, match="a folder"):
        await SqliteDriver.open(SqliteOptions(path=str(tmp_path), mode=mode))  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("mode", ["rw", "ro"])
async def test_only_rwc_creates(tmp_path: Path, mode: str) -> None:
    with pytest.raises(FormatMismatch, match="found nothing"):
        await SqliteDriver.open(SqliteOptions(path=str(tmp_path / "sub" / "kv.db"), mode=mode))  # pyright: ignore[reportArgumentType]

    assert list(tmp_path.iterdir()) == []


async def test_an_empty_file_becomes_a_store_only_with_rwc(tmp_path: Path) -> None:
    (tmp_path / "kv.db").touch()
    for mode in ("rw", "ro"):
        with pytest.raises(FormatMismatch, match="without this store's table"):
            await SqliteDriver.open(SqliteOptions(path=str(tmp_path / "kv.db"), mode=mode))  # pyright: ignore[reportArgumentType]
    assert (tmp_path / "kv.db").read_bytes() == b""

    async with _opened(tmp_path / "kv.db", mode="rwc") as driver:
        await driver.commit([batch(Put("c:a", b"1"))])

    async with _opened(tmp_path / "kv.db", mode="rw") as driver:
        assert await _value(driver, "c:a") == b"1"


async def test_a_new_file_says_what_it_is_and_can_give_space_back(tmp_path: Path) -> None:
    async with _opened(tmp_path / "kv.db"):
        pass

    connection = sqlite3.connect(tmp_path / "kv.db")
    names = ("application_id", "user_version", "auto_vacuum", "journal_mode")
    found = {name: connection.execute(f"PRAGMA {name}").fetchone()[0] for name in names}
    connection.close()
    assert found == {"application_id": 0x6B767073, "user_version": 1, "auto_vacuum": 2, "journal_mode": "wal"}


async def test_files_and_new_folders_are_for_their_owner_only(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    path = tmp_path / "a" / "b" / "kv.db"

    async with _opened(path) as driver:
        await driver.commit([batch(Put("c:a", b"1"))])
        modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in path.parent.iterdir()}

    assert set(modes) >= {"kv.db", "kv.db-wal", "kv.db-shm"}
    assert set(modes.values()) == {0o600}
    assert [stat.S_IMODE(folder.stat().st_mode) for folder in (tmp_path / "a", tmp_path / "a" / "b")] == [0o700, 0o700]
    assert stat.S_IMODE(tmp_path.stat().st_mode) == 0o755


@pytest.mark.parametrize("name", ["a?b.db", "a#b%41.db", "a b&c=d.db", "\u00e9\U0001f600.db", "a'b\"c;d.db", "-x.db"])
async def test_any_file_name_is_taken_as_it_is(tmp_path: Path, name: str) -> None:
    async with _opened(tmp_path / name) as driver:
        await driver.commit([batch(Put("c:a", b"1"))])
        await driver.backup(str(tmp_path / "copy") + name)

    assert _peek(str(tmp_path / name), "c:a") == b"1"
    assert {path.name.removesuffix("-lock") for path in tmp_path.iterdir()} == {name, "copy" + name}


async def test_a_link_leads_to_the_same_lock(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link.db").symlink_to(tmp_path / "real" / "kv.db")

    async with _opened(tmp_path / "link.db") as driver:
        await driver.commit([batch(Put("c:a", b"1"))])

    assert (tmp_path / "real" / "kv.db").exists()
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["link.db"]


async def test_two_tables_of_one_file_are_apart(tmp_path: Path) -> None:
    async with _opened(tmp_path / "kv.db") as one, _opened(tmp_path / "kv.db", table="select") as other:
        await one.commit([batch(Put("c:a", b"1"))])
        await other.commit([batch(Put("c:a", b"2"))])

        assert [await _value(one, "c:a"), await _value(other, "c:a")] == [b"1", b"2"]


@pytest.mark.parametrize(
    "options",
    [
        {"table": ""},
        {"table": "1a"},
        {"table": 'kv"; DROP TABLE kv; --'},
        {"table": "sqlite_kv"},
        {"table": "a" * 64},
        {"table": "k\u00e9"},
        {"mode": "w"},
        {"durability": "none"},
        {"reads": "async"},
        {"busy_timeout": -1},
        {"path": ""},
    ],
)
async def test_an_option_without_meaning_is_refused(tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(BadOption):
        await SqliteDriver.open(SqliteOptions(**{"path": str(tmp_path / "kv.db"), **options}))

    assert list(tmp_path.iterdir()) == []


# -- reading only --------------------------------------------------------------------------------


async def test_a_store_opened_for_reading_reads_and_refuses_to_write(tmp_path: Path) -> None:
    async with _opened(tmp_path / "kv.db") as driver:
        await driver.commit([batch(Put("c:a", b"1"))])
    async with _opened(tmp_path / "kv.db", mode="ro") as reader:
        assert await _value(reader, "c:a") == b"1"
        with pytest.raises(ReadOnly, match=r"kv\.db"):
            await reader.commit([batch(Put("c:a", b"2"))])
        with pytest.raises(ReadOnly, match=r"kv\.db"):
            await reader.compact()

    assert _peek(str(tmp_path / "kv.db"), "c:a") == b"1"


async def test_a_store_opened_for_reading_sees_what_others_write(tmp_path: Path) -> None:
    async with _opened(tmp_path / "kv.db") as driver, _opened(tmp_path / "kv.db", mode="ro") as reader:
        await driver.commit([batch(Put("c:a", b"1"))])

        assert await _value(reader, "c:a") == b"1"


_AS_NOBODY = """
import asyncio, os, sys
from kvpersist.errors import ReadOnly
from kvpersist_drivers.sqlite import SqliteDriver, SqliteOptions
if os.getuid() == 0:
    os.setuid(65534)
async def main(path, mode):
    try:
        driver = await SqliteDriver.open(SqliteOptions(path=path, mode=mode))
    except ReadOnly as error:
        return str(error)
    await driver.close()
    return "opened"
print(asyncio.run(main(*sys.argv[1:])))
"""


@pytest.mark.parametrize(("there", "mode"), [(True, "rwc"), (True, "rw"), (True, "ro"), (False, "rwc")])
async def test_a_folder_that_cannot_be_written_is_named(there: bool, mode: str) -> None:
    folder = tempfile.mkdtemp(prefix="kvpersist-sqlite-", dir="/tmp")  # which another user can enter
    try:
        if there:
            async with _opened(f"{folder}/kv.db"):
                pass
            Path(f"{folder}/kv.db").chmod(0o666)
        Path(folder).chmod(0o555)

        told = _python(_AS_NOBODY, f"{folder}/kv.db", mode)

        assert f"{folder} cannot be written" in told or f"{folder}/kv.db: Permission denied" in told
    finally:
        Path(folder).chmod(0o700)
        shutil.rmtree(folder)


def _python(program: str, *arguments: str) -> str:
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# -- transactions --------------------------------------------------------------------------------


@pytest.mark.parametrize(("durability", "synchronous"), [("full", 2), ("normal", 1)])
async def test_durability_is_what_sqlite_is_told(tmp_path: Path, durability: str, synchronous: int) -> None:
    async with _opened(tmp_path / "kv.db", durability=durability) as driver:
        told = await driver._writes.run(
            lambda: driver._writer.connection.execute("PRAGMA synchronous").fetchone(), settle=True
        )

        assert told == (synchronous,)
        assert driver.capabilities.durable == (durability == "full")


class _Gate:
    """A clock that lets the writer's thread in only when told: what has begun stays under way."""

    def __init__(self, driver: SqliteDriver) -> None:
        self.reached, self._open = asyncio.Event(), threading.Event()
        self._loop = asyncio.get_running_loop()
        self._driver, driver.clock = driver, self

    def __call__(self) -> float:
        if threading.current_thread() is self._driver._writes.thread:
            self._loop.call_soon_threadsafe(self.reached.set)
            assert self._open.wait(30)
        return 1_700_000_000.0

    def open(self) -> None:
        self._open.set()


@contextmanager
def _traced(driver: SqliteDriver) -> Iterator[list[str]]:
    statements: list[str] = []
    driver._writer.connection.set_trace_callback(statements.append)
    yield statements
    driver._writer.connection.set_trace_callback(None)


async def test_what_waits_behind_a_commit_becomes_one_transaction(tmp_path: Path) -> None:
    async with _opened(tmp_path / "kv.db") as driver:
        gate = _Gate(driver)
        with _traced(driver) as statements:
            first = asyncio.ensure_future(driver.commit([batch(Put("c:first", b"1", ABSENT))]))
            await gate.reached.wait()
            others = [asyncio.ensure_future(driver.commit([batch(Put(f"c:{n}", b"v"))])) for n in range(64)]
            await asyncio.sleep(0)
            gate.open()
            outcomes = await asyncio.gather(first, *others)

        assert all(isinstance(outcome, Committed) for [outcome] in outcomes)
        assert [text for text in statements if not text.startswith(("INSERT", "SELECT"))] == [
            "BEGIN IMMEDIATE",
            "COMMIT",
        ] * 2


async def test_conditions_of_any_number_of_batches_are_one_select(tmp_path: Path) -> None:
    async with _opened(tmp_path / "kv.db") as driver:
        batches = [batch(Put(f"c:{n}", b"v", ABSENT), Check(f"d:{n}", ABSENT)) for n in range(200)]
        with _traced(driver) as statements:
            await driver.commit(batches)

        assert sum(text.startswith("SELECT") for text in statements) == 1
        assert sum(text.startswith("INSERT") for text in statements) == 200


async def test_a_lone_put_is_a_single_statement(tmp_path: Path) -> None:
    async with _opened(tmp_path / "kv.db") as driver:
        with _traced(driver) as statements:
            await driver.commit([batch(Put("c:a", b"1"))])
            await driver.commit([batch(Delete("c:a"))])

        assert [text.split(None, 1)[0] for text in statements] == ["INSERT", "DELETE"]


async def test_batches_of_one_call_see_those_before_them(tmp_path: Path) -> None:
    async with _opened(tmp_path / "kv.db") as driver:
        one, two, three = batch(Put("c:a", b"1")), batch(Put("c:a", b"2", ABSENT)), batch(Delete("c:a"))
        four, five = batch(Put("c:a", b"4", ABSENT)), batch(Put("c:a", b"5", one.version))

        outcomes = await driver.commit([one, two, three, four, five])

        assert outcomes[::2][:2] == [Committed(one.version), Committed(three.version)]
        assert isinstance(outcomes[1], Conflict) and outcomes[1].found == one.version
        assert outcomes[3] == Committed(four.version)
        assert isinstance(outcomes[4], Conflict) and outcomes[4].found == four.version
        assert await _value(driver, "c:a") == b"4"


async def test_a_batch_that_sqlite_refuses_fails_alone(tmp_path: Path) -> None:
    async with _opened(tmp_path / "kv.db") as driver:
        driver._writer.connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, 50_000)
        batches = [
            batch(Put("c:a", b"1")),
            batch(Put("c:b", b"2"), Put("c:large", bytes(60_000))),
            batch(Put("c:c", b"3")),
            batch(Put("c:\ud800", b"4"), Put("c:d", b"4")),
            batch(Put("c:b", b"5", ABSENT)),
        ]

        outcomes = await driver.commit(batches)

        assert [type(outcome) for outcome in outcomes] == [Committed, ValueTooLarge, Committed, BadKey, Committed]
        entries = await driver.get(["c:a", "c:b", "c:c", "c:d", "c:large"])
        assert [entry and entry.value for entry in entries] == [b"1", b"5", b"3", None, None]
        [alone] = await driver.commit([batch(Put("c:large", bytes(60_000)))])
        assert isinstance(alone, ValueTooLarge)


async def test_a_value_that_no_row_can_hold_is_refused_before_it_is_copied(tmp_path: Path) -> None:
    async with _opened(tmp_path / "kv.db") as driver:
        limit = driver.capabilities.max_value_bytes
        assert limit is not None
        large = bytes(limit + 1)  # never touched, so the kernel keeps one page of zeros for it

        outcomes = await driver.commit([batch(Put("c:a", b"1")), batch(Put("c:b", large)), batch(Put("c:c", b"3"))])
        [alone] = await driver.commit([batch(Put("c:b", large))])

        assert [type(outcome) for outcome in outcomes] == [Committed, ValueTooLarge, Committed]
        assert isinstance(alone, ValueTooLarge)


async def test_a_key_that_is_no_text_is_a_bad_key_to_readers(tmp_path: Path) -> None:
    async with _opened(tmp_path / "kv.db") as driver:
        with pytest.raises(BadKey):
            await driver.get(["c:\ud800"])
        with pytest.raises(BadKey):
            await driver.scan("\ud800", None, limit=1)


async def test_the_order_of_keys_with_nul_is_that_of_their_bytes(tmp_path: Path) -> None:
    keys = ["a", "a\x00", "a\x00\x00", "a\x00b", "a\x01", "ab", "\x00", "\x00a"]
    async with _opened(tmp_path / "kv.db") as driver:
        await driver.commit([batch(*(Put(key, b"a\x00b" if key == "\x00" else key.encode()) for key in keys))])

        found = await driver.scan(None, None, limit=100)
        [entry] = await driver.scan("\x00", "\x00\x00", limit=1, deref="")

        assert [item.key for item in found] == sorted(keys, key=str.encode)
        assert entry.target is not None and entry.target.key == "a\x00b"


# -- cancelling ----------------------------------------------------------------------------------


@pytest.mark.parametrize("operations", [1, 2])
async def test_a_commit_cancelled_before_it_began_never_runs(tmp_path: Path, operations: int) -> None:
    async with _opened(tmp_path / "kv.db") as driver:
        gate = _Gate(driver)
        first = asyncio.ensure_future(driver.commit([batch(Put("c:first", b"1", ABSENT))]))
        await gate.reached.wait()
        second = asyncio.ensure_future(driver.commit([batch(*(Put(f"c:{n}", b"v") for n in range(operations)))]))
        await asyncio.sleep(0)

        second.cancel()
        with pytest.raises(asyncio.CancelledError):
            await second

        gate.open()
        assert isinstance((await first)[0], Committed)
        await driver.commit([batch(Put("c:later", b"1"))])
        assert [entry.key for entry in await driver.scan(None, None, limit=9)] == ["c:first", "c:later"]


async def test_a_commit_cancelled_after_it_began_ends_with_its_transaction(tmp_path: Path) -> None:
    async with _opened(tmp_path / "kv.db") as driver:
        gate = _Gate(driver)
        task = asyncio.ensure_future(driver.commit([batch(Put("c:a", b"1", ABSENT))]))
        await gate.reached.wait()

        for _ in range(3):
            task.cancel()
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        assert not task.done()
        gate.open()
        with pytest.raises(asyncio.CancelledError):
            await task

        assert not driver._writer.connection.in_transaction
        assert await _value(driver, "c:a") == b"1"


async def test_a_commit_cancelled_while_others_hold_the_file_ends_at_once_and_never_runs(tmp_path: Path) -> None:
    async with _opened(tmp_path / "kv.db") as driver:
        with _traced(driver) as statements:
            other = sqlite3.connect(tmp_path / "kv.db", isolation_level=None)
            other.execute("BEGIN IMMEDIATE")
            task = asyncio.ensure_future(driver.commit([batch(Put("c:a", b"1"), Put("c:b", b"1"))]))
            await driver.ping()

            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asyncio.wait_for(task, 2)

            other.execute("ROLLBACK")
            other.close()
            await driver.commit([batch(Put("c:later", b"1"), Put("c:last", b"1"))])

        assert [entry.key for entry in await driver.scan(None, None, limit=9)] == ["c:last", "c:later"]
        assert statements[-1] == "COMMIT"


async def test_a_storm_of_cancellations_leaves_no_transaction_and_no_wrong_answer(tmp_path: Path) -> None:
    seed = random.randrange(1 << 32)
    print("seed", seed)
    chance = random.Random(seed)
    acknowledged: dict[str, bytes] = {}
    written: dict[str, list[bytes]] = {}
    cancelled = 0

    async def work(driver: SqliteDriver, key: str) -> None:
        for number in range(20):
            value = f"{key} {number}".encode()
            written.setdefault(key, []).append(value)
            [outcome] = await driver.commit([batch(Put(key, value), Put(f"{key}:twin", value))])
            assert isinstance(outcome, Committed)
            acknowledged[key] = value
            one, twin = await driver.get([key, f"{key}:twin"])
            assert one is not None and twin is not None
            assert one.key == key and one.value == twin.value
            assert one.value == value

    async with _opened(tmp_path / "kv.db") as driver:
        for wave in range(20):
            tasks = [asyncio.ensure_future(work(driver, f"c:{wave}:{number}")) for number in range(16)]
            while not all(task.done() for task in tasks):
                await driver.ping()
                for task in tasks:
                    if chance.random() < 0.05:
                        task.cancel()
            for answer in await asyncio.gather(*tasks, return_exceptions=True):
                cancelled += isinstance(answer, asyncio.CancelledError)
                assert answer is None or isinstance(answer, asyncio.CancelledError)
            # asked in the thread: it may just be finding that all it began for was withdrawn
            assert not await driver._writes.run(lambda: driver._writer.connection.in_transaction, settle=True)
            other = sqlite3.connect(tmp_path / "kv.db", timeout=0, isolation_level=None)
            other.execute("BEGIN IMMEDIATE")
            other.close()

        assert cancelled > 20
        for key, values in written.items():
            one, twin = await driver.get([key, f"{key}:twin"])
            stored = None if one is None else one.value
            assert stored == (None if twin is None else twin.value)
            # the last acknowledged one, or the cancelled one after it
            assert stored in ([acknowledged.get(key), values[-1]])


async def test_an_open_that_is_cancelled_leaves_no_thread(tmp_path: Path) -> None:
    before = set(threading.enumerate())
    for turns in range(12):
        task = asyncio.ensure_future(SqliteDriver.open(SqliteOptions(path=str(tmp_path / "kv.db"))))
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await (await task).close()
            raise asyncio.CancelledError

    assert set(threading.enumerate()) == before


# -- other processes -----------------------------------------------------------------------------


@pytest.mark.parametrize("operations", [1, 2])
async def test_a_file_locked_by_another_program_is_busy_and_nothing_changed(tmp_path: Path, operations: int) -> None:
    async with _opened(tmp_path / "kv.db", busy_timeout=0.05) as driver:
        await driver.commit([batch(Put("c:0", b"old"))])
        other = sqlite3.connect(tmp_path / "kv.db", isolation_level=None)
        other.execute("BEGIN IMMEDIATE")

        with pytest.raises(Busy) as refused:
            outcomes = await driver.commit([batch(*(Put(f"c:{n}", b"new") for n in range(operations)))])
            raise next(outcome for outcome in outcomes if isinstance(outcome, KvError))

        assert refused.value.retryable and refused.value.outcome == "none"
        assert await _value(driver, "c:0") == b"old"
        other.close()
        assert isinstance((await driver.commit([batch(Put("c:0", b"new"))]))[0], Committed)


async def test_a_lock_held_too_long_by_another_store_is_busy(tmp_path: Path) -> None:
    (tmp_path / "kv.db-lock").touch()
    async with _opened(tmp_path / "kv.db", busy_timeout=0.05) as driver:
        with _flock(tmp_path / "kv.db-lock"), pytest.raises(Busy):
            await driver.commit([batch(Put("c:a", b"1"))])

        assert await _value(driver, "c:a") is None
        assert isinstance((await driver.commit([batch(Put("c:a", b"1"))]))[0], Committed)


async def test_a_commit_waits_for_another_writer_that_ends_in_time(tmp_path: Path) -> None:
    async with _opened(tmp_path / "kv.db") as driver:
        other = sqlite3.connect(tmp_path / "kv.db", isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        task = asyncio.ensure_future(driver.commit([batch(Put("c:a", b"1"))]))
        await driver.ping()
        assert not task.done()
        other.close()

        assert isinstance((await task)[0], Committed)


@contextmanager
def _flock(path: Path) -> Iterator[None]:
    with path.open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _is_locked(path: Path) -> bool:
    with path.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


async def test_every_write_and_checkpoint_is_within_the_lock_of_old_libraries(tmp_path: Path) -> None:
    lock = tmp_path / "kv.db-lock"
    lock.touch()  # as an old library left it: a newer one keeps to it too
    seen: list[tuple[str, bool]] = []
    async with _opened(tmp_path / "kv.db") as driver:
        driver._writer.connection.set_trace_callback(lambda text: seen.append((text.split("(")[0], _is_locked(lock))))
        await driver.commit([batch(Put("c:a", b"1"))])
        await driver.commit([batch(Put("c:a", b"1", ABSENT)), batch(Put("c:b", b"2"))])
        await driver.compact()
        await driver._writes.run(lambda: driver._writer.tend(True), settle=True)
        driver._writer.connection.set_trace_callback(None)
        assert not _is_locked(lock)

    assert {text for text, _ in seen} >= {"BEGIN IMMEDIATE", "COMMIT", "PRAGMA wal_checkpoint"}
    assert [text for text, locked in seen if not locked] == []


async def test_a_close_waits_for_that_lock(tmp_path: Path) -> None:
    lock = tmp_path / "kv.db-lock"
    lock.touch()
    driver = await SqliteDriver.open(SqliteOptions(path=str(tmp_path / "kv.db")))
    await driver.commit([batch(Put("c:a", b"1"))])
    with _flock(lock):
        closing = asyncio.ensure_future(driver.close())
        done, _ = await asyncio.wait({closing}, timeout=0.05)

        assert not done
        assert (tmp_path / "kv.db-wal").exists()
    await closing
    assert not (tmp_path / "kv.db-wal").exists()


async def test_without_fcntl_another_database_is_the_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fcntl", None)
    (tmp_path / "kv.db-lock").touch()
    async with _opened(tmp_path / "kv.db") as one, _opened(tmp_path / "kv.db", busy_timeout=0.05) as other:
        gate = _Gate(one)
        task = asyncio.ensure_future(one.commit([batch(Put("c:a", b"1", ABSENT))]))
        await gate.reached.wait()
        with pytest.raises(Busy):
            await other.commit([batch(Put("c:a", b"2"))])
        gate.open()
        await task
        await other.commit([batch(Put("c:a", b"2"))])

        assert isinstance(one._database._lock, _lock.DatabaseLock)
        assert await _value(one, "c:a") == b"2"


def test_drivers_in_several_loops_count_every_increment(tmp_path: Path) -> None:
    loops, rounds = 4, 50
    barrier = threading.Barrier(loops)
    failures: list[BaseException] = []

    async def work() -> None:
        async with _opened(tmp_path / "kv.db") as driver:
            for _ in range(rounds):
                await _increment(driver, "n:count")

    def run() -> None:
        barrier.wait()
        try:
            asyncio.run(work())
        except BaseException as error:
            failures.append(error)
            raise

    threads = [threading.Thread(target=run) for _ in range(loops)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert failures == []
    assert _peek(str(tmp_path / "kv.db"), "n:count") == b"%d" % (loops * rounds)


async def _increment(driver: SqliteDriver, key: str) -> None:
    while True:
        [entry] = await driver.get([key])
        count, expect = (0, ABSENT) if entry is None else (int(entry.value), entry.version)
        [outcome] = await driver.commit([batch(Put(key, b"%d" % (count + 1), expect))])
        if isinstance(outcome, Committed):
            return
        assert isinstance(outcome, Conflict)
        await asyncio.sleep(random.uniform(0, 0.005))


_FORKED = """
import asyncio, os, sys, warnings
from kvpersist.driver import Batch, Put
from kvpersist.errors import ForkedStore
from kvpersist_drivers.sqlite import SqliteDriver, SqliteOptions
warnings.simplefilter("ignore", DeprecationWarning)  # of a fork with threads: it is what is tested
async def refused(call):
    try:
        await call
    except ForkedStore:
        return True
async def main(path):
    driver = await SqliteDriver.open(SqliteOptions(path=path))
    await driver.commit([Batch((Put("c:a", b"1"),), b"version1")])
    pid = os.fork()
    if pid == 0:
        answers = [
            await refused(driver.get(["c:a"])),
            await refused(driver.commit([Batch((Put("c:a", b"2"),), b"version2")])),
            await refused(driver.scan(None, None, limit=1)),
        ]
        await driver.close()
        os._exit(0 if all(answers) else 1)
    status = os.waitpid(pid, 0)[1]
    await driver.commit([Batch((Put("c:b", b"1"),), b"version3")])
    found = len(await driver.scan(None, None, limit=9))
    await driver.close()
    return status, found
print(asyncio.run(main(*sys.argv[1:])))
"""


def test_a_forked_child_is_refused_and_does_no_harm(tmp_path: Path) -> None:
    assert _python(_FORKED, str(tmp_path / "kv.db")) == "(0, 2)"
    assert _peek(str(tmp_path / "kv.db"), "c:a") == b"1"


_FORGETFUL = """
import asyncio, sys
from kvpersist.driver import Batch, Put
from kvpersist_drivers.sqlite import SqliteDriver, SqliteOptions
async def main(path):
    driver = await SqliteDriver.open(SqliteOptions(path=path))
    await driver.commit([Batch((Put("c:a", b"1"),), b"version1")])
    return driver
kept = asyncio.run(main(*sys.argv[1:]))
"""


def test_a_program_that_never_closes_ends_and_loses_nothing(tmp_path: Path) -> None:
    assert _python(_FORGETFUL, str(tmp_path / "kv.db")) == ""
    assert _peek(str(tmp_path / "kv.db"), "c:a") == b"1"


async def test_a_driver_that_is_dropped_lets_go_of_its_threads(tmp_path: Path) -> None:
    before = set(threading.enumerate())
    driver = await SqliteDriver.open(SqliteOptions(path=str(tmp_path / "kv.db")))
    await driver.commit([batch(Put("c:a", b"1"))])
    await driver.get(["c:a"])
    started = set(threading.enumerate()) - before
    assert len(started) == 2

    del driver
    gc.collect()
    for thread in started:
        thread.join(10)

    assert set(threading.enumerate()) == before
    assert not (tmp_path / "kv.db-wal").exists()


# -- failures ------------------------------------------------------------------------------------


async def test_a_full_disk_is_told_and_nothing_changes(tmp_path: Path) -> None:
    async with _opened(tmp_path / "kv.db") as driver:
        await driver.commit([batch(Put("c:old", b"1"))])
        connection = driver._writer.connection
        [pages] = connection.execute("PRAGMA page_count").fetchone()
        connection.execute(f"PRAGMA max_page_count = {pages + 10}")

        outcomes = await driver.commit(
            [batch(Put("c:a", b"1")), batch(Put("c:large", os.urandom(100_000))), batch(Put("c:b", b"2"))]
        )
        [alone] = await driver.commit([batch(Put("c:large", os.urandom(100_000)))])

        assert [type(outcome) for outcome in outcomes] == [Committed, Unavailable, Committed]
        assert isinstance(alone, Unavailable) and alone.outcome == "none"
        assert [entry.key for entry in await driver.scan(None, None, limit=9)] == ["c:a", "c:b", "c:old"]
        connection.execute("PRAGMA max_page_count = 1000000")
        [later] = await driver.commit([batch(Put("c:large", os.urandom(100_000)))])
        assert isinstance(later, Committed)


async def test_a_damaged_file_is_told_and_named(tmp_path: Path) -> None:
    path = tmp_path / "kv.db"
    async with _opened(path) as driver:
        await driver.commit([batch(*(Put(f"c:{number:04}", os.urandom(300)) for number in range(500)))])
    content = bytearray(path.read_bytes())
    content[4096 * 4 :] = os.urandom(len(content) - 4096 * 4)
    path.write_bytes(content)

    async with _opened(path) as driver:
        with pytest.raises(CorruptRecord, match=r"kv\.db"):
            await driver.scan(None, None, limit=1000)
        with pytest.raises(CorruptRecord, match=r"kv\.db"):
            outcomes = await driver.commit([batch(Put("c:0100", b"1")), batch(Put("c:0300", b"1"))])
            raise next(outcome for outcome in outcomes if isinstance(outcome, KvError))


async def test_a_table_dropped_by_another_program_is_told(tmp_path: Path) -> None:
    async with _opened(tmp_path / "kv.db") as driver:
        _make(tmp_path / "kv.db", "DROP TABLE kv")

        with pytest.raises(FormatMismatch, match="no such table"):
            await driver.get(["c:a"])
        [outcome] = await driver.commit([batch(Put("c:a", b"1"))])
        assert isinstance(outcome, FormatMismatch)


async def test_a_defect_in_the_thread_fails_the_call_and_leaves_no_transaction(tmp_path: Path) -> None:
    async with _opened(tmp_path / "kv.db") as driver:

        def broken() -> float:
            raise ZeroDivisionError

        driver.clock = broken
        with pytest.raises(ZeroDivisionError):
            await driver.commit([batch(Put("c:a", b"1", ABSENT))])
        driver.clock = ManualClock()

        assert isinstance((await driver.commit([batch(Put("c:a", b"1", ABSENT))]))[0], Committed)


# -- keeping house -------------------------------------------------------------------------------


def _in_main_file(path: Path, key: str) -> bool:
    """Whether the database holds the key without its log."""
    connection = sqlite3.connect(f"file:{path}?mode=ro&immutable=1", uri=True)
    try:
        return bool(connection.execute("SELECT 1 FROM kv WHERE k = ?", (key,)).fetchall())
    finally:
        connection.close()


async def _checkpoints(driver: SqliteDriver, work: Callable[[], Any]) -> int:
    with _traced(driver) as statements:
        await work()
        await driver._writes.run(int, settle=True)  # behind what follows the answer
    return sum("wal_checkpoint" in text for text in statements)


async def test_the_log_is_copied_when_nothing_is_written_for_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_writer, "_IDLE_SECONDS", 0.01)
    told = asyncio.Event()
    loop = asyncio.get_running_loop()
    async with _opened(tmp_path / "kv.db") as driver:
        checkpoint = driver._database.checkpoint

        def told_checkpoint(connection: sqlite3.Connection) -> bool:
            done = checkpoint(connection)
            loop.call_soon_threadsafe(told.set)
            return done

        monkeypatch.setattr(driver._database, "checkpoint", told_checkpoint)
        await driver.commit([batch(Put("c:a", b"1"))])
        await asyncio.wait_for(told.wait(), 10)

        assert _in_main_file(tmp_path / "kv.db", "c:a")


async def test_the_log_is_copied_when_it_has_grown_but_not_at_each_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_writer, "_IDLE_SECONDS", 100)
    monkeypatch.setattr(_writer, "_BOUND_PAGES", 50)
    async with _opened(tmp_path / "kv.db") as driver:
        small = await _checkpoints(driver, lambda: driver.commit([batch(Put("c:a", b"1"))]))
        many = await _checkpoints(driver, lambda: driver.commit([batch(*(Put(f"c:{n}", b"v") for n in range(60)))]))
        large = await _checkpoints(driver, lambda: driver.commit([batch(Put("c:b", bytes(300_000)))]))

    assert (small, many, large) == (0, 1, 1)


async def test_compact_removes_expired_rows_and_gives_space_back(tmp_path: Path) -> None:
    path = tmp_path / "kv.db"
    clock = ManualClock()
    async with _opened(path) as driver:
        driver.clock = clock
        expires = clock.now + 10
        await driver.commit([batch(Put(f"c:{n}", os.urandom(3000), None, expires)) for n in range(400)])
        await driver.commit([batch(Put("c:kept", b"1"), Put("c:later", b"2", None, expires + 100))])
        assert await driver.compact() == 0
        clock.advance(11)

        removed = [await driver.compact(150) for _ in range(4)]

        assert removed == [150, 150, 100, 0]
        assert [entry.key for entry in await driver.scan(None, None, limit=9)] == ["c:kept", "c:later"]
    assert path.stat().st_size < 100_000
    assert _peek(str(path), "c:0") is None


async def test_a_backup_is_a_store_of_one_moment_while_writing_goes_on(tmp_path: Path) -> None:
    async with _opened(tmp_path / "kv.db") as driver:
        await driver.commit([batch(Put(f"c:{n}", os.urandom(2000))) for n in range(1000)])
        written = 0

        async def write() -> None:
            nonlocal written
            while True:
                await driver.commit([batch(Put("d:one", b"%d" % written), Put("d:two", b"%d" % written))])
                written += 1

        writing = asyncio.ensure_future(write())
        await driver.backup(str(tmp_path / "copy.db"))
        writing.cancel()
        await asyncio.wait({writing})
        assert written > 1

    async with _opened(tmp_path / "copy.db", mode="rw") as copy:
        one, two = await copy.get(["d:one", "d:two"])
        assert (one and one.value) == (two and two.value)
        assert len(await copy.scan("c:", "c;", limit=5000)) == 1000
    connection = sqlite3.connect(tmp_path / "copy.db")
    assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    connection.close()
    assert stat.S_IMODE((tmp_path / "copy.db").stat().st_mode) == 0o600


@pytest.mark.parametrize("path", [":memory:", "kv.db"])
async def test_a_backup_never_replaces_a_file(tmp_path: Path, path: str) -> None:
    async with _opened(path if path == ":memory:" else tmp_path / path) as driver:
        await driver.commit([batch(Put("c:a", b"1"))])
        (tmp_path / "copy.db").write_bytes(b"mine")

        with pytest.raises(BadRequest, match="exists"):
            await driver.backup(str(tmp_path / "copy.db"))
        await driver.backup(str(tmp_path / "other.db"))

        assert (tmp_path / "copy.db").read_bytes() == b"mine"
        assert _peek(str(tmp_path / "other.db"), "c:a") == b"1"
        assert list(tmp_path.glob("*.partial")) == []


async def test_a_backup_to_a_place_that_is_not_there_is_told(tmp_path: Path) -> None:
    async with _opened(tmp_path / "kv.db") as driver:
        with pytest.raises(Unavailable, match="no/copy"):
            await driver.backup(str(tmp_path / "no" / "copy.db"))


async def test_a_backup_ends_when_the_store_is_closed_or_its_task_is_cancelled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_database, "_STEP_PAGES", 1)
    threads = set(threading.enumerate())
    driver = await SqliteDriver.open(SqliteOptions(path=str(tmp_path / "kv.db"), durability="normal"))
    await driver.commit([batch(Put("c:a", os.urandom(20_000_000)))])
    cancelled = asyncio.ensure_future(driver.backup(str(tmp_path / "one.db")))
    await driver.ping()
    cancelled.cancel()
    with pytest.raises(asyncio.CancelledError):
        await cancelled
    closed = asyncio.ensure_future(driver.backup(str(tmp_path / "two.db")))
    await driver.ping()
    await driver.close()
    with pytest.raises(StoreClosed):
        await closed

    assert set(threading.enumerate()) == threads
    assert {path.name.removesuffix("-lock") for path in tmp_path.iterdir()} == {"kv.db"}
    with pytest.raises(StoreClosed):
        await driver.backup(str(tmp_path / "three.db"))


# -- watching -----------------------------------------------------------------------------------


def _watchers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "kvpersist-sqlite-watcher"]


async def test_a_thread_looks_for_commits_while_somebody_watches(tmp_path: Path) -> None:
    options = SqliteOptions(path=str(tmp_path / "kv.db"), durability="normal")
    driver, other = await SqliteDriver.open(options), await SqliteDriver.open(options)
    connections = len(driver._database._connections)
    one, two = driver.watch("c:"), driver.watch("")
    assert [await anext(one), await anext(two)] == [(), ()]
    async with asyncio.timeout(10):
        for writer in (driver, other):
            told = [asyncio.ensure_future(anext(watch)) for watch in (one, two)]
            await asyncio.sleep(0.05)
            assert not any(future.done() for future in told)
            await writer.commit([batch(Put("c:a", b"1"))])
            assert await asyncio.gather(*told) == [(), ()]
        assert len(_watchers()) == 1
        await one.aclose()
        assert len(_watchers()) == 1
        await two.aclose()
        while _watchers():
            await asyncio.sleep(0.01)
    assert len(driver._database._connections) == connections

    again = driver.watch("c:")
    assert await anext(again) == ()
    await driver.close()
    assert _watchers() == []
    with pytest.raises(StoreClosed):
        await anext(again)
    await other.close()


async def test_a_driver_that_was_dropped_while_it_was_watched_leaves_no_thread(tmp_path: Path) -> None:
    driver = await SqliteDriver.open(SqliteOptions(path=str(tmp_path / "kv.db")))
    watch = driver.watch("c:")
    await anext(watch)
    del driver
    gc.collect()

    with pytest.raises(StoreClosed):
        async with asyncio.timeout(10):
            await anext(watch)
    async with asyncio.timeout(10):
        while _watchers():
            await asyncio.sleep(0.01)


async def test_an_error_while_it_looks_is_no_end_of_the_watch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = await SqliteDriver.open(SqliteOptions(path=str(tmp_path / "kv.db")))
    watch = driver.watch("c:")
    await anext(watch)
    number = _watch._Looker._number
    failed = threading.Event()

    def failing(looker: Any, connection: sqlite3.Connection) -> int:
        if not failed.is_set():
            failed.set()
            raise sqlite3.OperationalError("disk I/O error")
        return number(looker, connection)

    monkeypatch.setattr(_watch._Looker, "_number", failing)
    async with asyncio.timeout(10):
        assert await anext(watch) == ()  # something may have been missed meanwhile
    await driver.close()
