"""The PostgreSQL driver on a real server: the contract, the model, and what is its own."""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import re
import shutil
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from checked_puts import follow_what_they_checked
from postgres_server import PostgresServer, missing
from proxy import Proxy

import kvpersist
from kvpersist import Message, ToolCallPart, urls
from kvpersist.driver import ABSENT, Batch, Check, Committed, Delete, Op, Provisions, Put
from kvpersist.errors import (
    BadKey,
    BadOption,
    BadRequest,
    CommitUnknown,
    Conflict,
    FormatMismatch,
    KeyTooLong,
    KvError,
    PoolExhausted,
    ReadOnly,
    StoreClosed,
    TooManyClients,
    Unavailable,
    Unsupported,
    ValueTooLarge,
)
from kvpersist.testing import AWKWARD_KEYS, DriverContract, batch, driver_machine
from kvpersist_drivers.postgres import PostgresDriver, PostgresOptions
from kvpersist_drivers.postgres._plan import Plan
from kvpersist_drivers.postgres._statements import MAX_KEY_BYTES, escaped, unescaped

_numbers = itertools.count()


def _table() -> str:
    return f"t{os.getpid()}_{next(_numbers)}"


@pytest.fixture(scope="session")
def url(service: Any) -> str:
    return service("postgres")["KVPERSIST_TEST_POSTGRES_URL"]


@pytest.fixture
def own_server() -> Iterator[PostgresServer]:
    """A server that a test may stop."""
    if reason := missing():
        pytest.skip(reason)
    with PostgresServer() as server:
        yield server


@asynccontextmanager
async def _opened(url: str, **options: Any) -> AsyncIterator[PostgresDriver]:
    driver = await PostgresDriver.open(PostgresOptions(**{"url": url, "table": _table(), **options}))
    try:
        yield driver
    finally:
        await driver.close()


async def _sql(url: str, text: str, *args: Any) -> list[Any]:
    """Ask the server around the driver; texts here are the tests' own."""
    connection = await asyncpg.connect(url)
    try:
        return await connection.fetch(text, *args) if args else [await connection.execute(text)]
    finally:
        await connection.close()


async def _dropped(url: str, *tables: str) -> None:
    for table in tables:
        await _sql(url, f"DROP TABLE IF EXISTS {table}")


async def _peek(url: str, table: str, key: str) -> bytes | None:
    connection = await asyncpg.connect(url)
    try:
        return await connection.fetchval(f"SELECT value FROM {table} WHERE key = $1", escaped(key))
    finally:
        await connection.close()


@asynccontextmanager
async def _emptied(url: str, **options: Any) -> AsyncIterator[PostgresDriver]:
    """A driver on a table of its own, which is dropped afterwards."""
    async with _opened(url, **options) as driver:
        try:
            yield driver
        finally:
            await driver.close()
            await _dropped(url, driver._sql.table)


@pytest.fixture
async def driver(url: str) -> AsyncIterator[PostgresDriver]:
    async with _emptied(url) as driver:
        yield driver


class TestPostgres(DriverContract[PostgresDriver]):
    @pytest.fixture
    async def driver(self, url: str) -> AsyncIterator[PostgresDriver]:
        self._url = url
        async with _emptied(url) as driver:
            yield driver

    async def peek(self, driver: PostgresDriver, key: str) -> bytes | None:
        return await _peek(self._url, driver._sql.table, key)

    async def reopen(self, driver: PostgresDriver) -> PostgresDriver:
        return await PostgresDriver.open(driver._options)


class TestPostgresAsBehindPgBouncer(DriverContract[PostgresDriver]):
    @pytest.fixture
    async def driver(self, url: str) -> AsyncIterator[PostgresDriver]:
        self._url = url
        async with _emptied(url, pgbouncer=True, notify=False) as driver:
            yield driver

    async def peek(self, driver: PostgresDriver, key: str) -> bytes | None:
        return await _peek(self._url, driver._sql.table, key)


class TestPostgresOverAPool(DriverContract[PostgresDriver]):
    @pytest.fixture
    async def driver(self, url: str) -> AsyncIterator[PostgresDriver]:
        self._url = url
        async with asyncpg.create_pool(url, min_size=0, max_size=8) as pool:
            driver = await PostgresDriver.over(pool, table=_table(), schema="public", pool_max=4)
            yield driver
            await driver.close()
            assert await pool.fetchval("SELECT 1") == 1
            assert pool.get_idle_size() == pool.get_size()
        await _dropped(url, driver._sql.table)

    async def peek(self, driver: PostgresDriver, key: str) -> bytes | None:
        return await _peek(self._url, driver._sql.table, key)


class TestPostgresWithFewRights(DriverContract[PostgresDriver]):
    """A role that may use the table and make nothing."""

    @pytest.fixture
    async def driver(self, url: str) -> AsyncIterator[PostgresDriver]:
        self._url = url
        async with _few_rights(url) as (plain, table), _opened(plain, table=table) as driver:
            yield driver

    async def peek(self, driver: PostgresDriver, key: str) -> bytes | None:
        return await _peek(self._url, driver._sql.table, key)


@asynccontextmanager
async def _few_rights(url: str, rights: str = "SELECT, INSERT, UPDATE, DELETE") -> AsyncIterator[tuple[str, str]]:
    """The URL of a role without rights but ``rights`` on a table, and the table's name."""
    role, table = f"r{_table()}", _table()
    async with _opened(url, table=table):
        pass
    await _sql(url, f"CREATE ROLE {role} LOGIN")
    if rights:
        await _sql(url, f"GRANT {rights} ON {table} TO {role}")
    try:
        yield re.sub("//[^@]*@", f"//{role}@", url), table
    finally:
        await _sql(url, f"DROP TABLE {table}; DROP OWNED BY {role}; DROP ROLE {role}")


class TestPostgresModel:
    def test_the_driver_does_what_a_dict_does(self, url: str) -> None:
        from hypothesis.stateful import run_state_machine_as_test

        tables: list[str] = []

        async def open_new() -> PostgresDriver:
            tables.append(_table())
            return await PostgresDriver.open(PostgresOptions(url=f"{url}?synchronous_commit=off", table=tables[-1]))

        async def open_again(closed: PostgresDriver) -> PostgresDriver:
            return await PostgresDriver.open(closed._options)

        machine = driver_machine(open_new, reopener=open_again)
        try:
            run_state_machine_as_test(machine, settings=machine.TestCase.settings)
        finally:
            asyncio.run(_dropped(url, *tables))


# -- what is sent --------------------------------------------------------------------------------


class _Counted:
    """Calls since it was made."""

    def __init__(self, driver: PostgresDriver) -> None:
        self._connections = driver._connections
        self._before = self._connections.calls

    def __call__(self) -> int:
        return self._connections.calls - self._before


async def test_each_kind_of_call_is_one_call(driver: PostgresDriver) -> None:
    version = b"versions"
    for _ in range(2):  # the second time as an update
        await driver.commit([batch(Put("c:held", b"v"), Put("c#i:a", b"held"), version=version)])
    turn = batch(Check("c:held", version), Put("c:a", b"1", ABSENT), Put("c:b", b"1"), Delete("c:none"))
    for work in (
        lambda: driver.commit([batch(Put(f"c:{number}", b"v")) for number in range(64)]),
        lambda: driver.commit([batch(Put(f"c:{number}", b"v", b"otherone")) for number in range(64)]),
        lambda: driver.commit([batch(Check("c:held", version), Put(f"c:{number}", b"v")) for number in range(64)]),
        lambda: driver.commit([batch(*(Put(f"d:{number}", b"v") for number in range(1000)))]),
        lambda: driver.commit([turn]),
        lambda: driver.commit([batch(Put("c:a", b"v", ABSENT)), batch(Delete("c:a")), batch(Put("c:a", b"v", ABSENT))]),
        lambda: driver.get([f"d:{number}" for number in range(1000)]),
        lambda: driver.scan("d:", "d;", limit=1000),
        lambda: driver.scan("c#i:", "c#i;", limit=100, deref="c:"),
        lambda: driver.compact(),
        lambda: driver.ping(),
    ):
        counted = _Counted(driver)
        await work()
        assert counted() == 1


async def test_a_call_is_one_round_trip_once_its_statement_is_known(url: str) -> None:
    with Proxy.before(url) as proxy:
        async with _emptied(url) as direct, _opened(proxy.url, table=direct._options.table, pool_max=1) as driver:
            works = [
                lambda: driver.commit([batch(Put(f"c:{number}", b"v")) for number in range(20)]),
                lambda: driver.commit([batch(Put("c:a", b"v", b"otherone")), batch(Put("c:a", b"v"))]),
                lambda: driver.get(["c:1", "c:2"]),
                lambda: driver.scan("c:", "c;", limit=10),
            ]
            for work in works:
                await work()
            proxy.delay(0.2)
            for work in works:
                began = time.monotonic()
                await work()
                assert 0.2 <= time.monotonic() - began < 0.4


async def test_a_store_joins_what_is_concurrent(driver: PostgresDriver) -> None:
    async with kvpersist.open_store(driver) as store:
        counted = _Counted(driver)
        await asyncio.gather(*(store.put(f"c:{number}", number) for number in range(64)))
        assert counted() == 1
        counted = _Counted(driver)
        assert await asyncio.gather(*(store.get(f"c:{number}") for number in range(64))) == list(range(64))
        assert counted() == 1


async def test_batches_that_need_each_other_are_judged_in_order_and_others_together() -> None:
    def waves(*batches: Batch) -> list[list[str]]:
        plan = Plan(0.0)
        for place, one in enumerate(batches):
            assert plan.add(place, one) is None
        return [sorted(what[0] for what in (*wave.checks, *wave.writes)) for wave in plan.waves()]

    assert waves(batch(Put("a", b"", ABSENT)), batch(Put("b", b"", ABSENT))) == [["a", "b"]]
    assert waves(batch(Put("a", b"", ABSENT)), batch(Put("a", b""))) == [["a"], ["a"]]
    assert waves(batch(Check("a", ABSENT)), batch(Put("a", b""))) == [["a", "a"]]
    assert waves(batch(Put("a", b"")), batch(Check("a", ABSENT))) == [["a"], ["a"]]
    assert waves(
        *(batch(Put("a", b"")), batch(Check("b", ABSENT), Put("a", b"")), batch(Put("b", b""))),
        *(batch(Check("c", ABSENT)), batch(Check("b", ABSENT))),
    ) == [["a", "c"], ["a", "b", "b"], ["b"]]


async def test_a_check_does_not_see_a_write_that_comes_after_it(driver: PostgresDriver) -> None:
    outcomes = await driver.commit(
        [batch(Check("c:a", ABSENT), Put("c:b", b"1")), batch(Put("c:a", b"1")), batch(Check("c:a", ABSENT))]
    )

    assert [isinstance(outcome, Committed) for outcome in outcomes] == [True, True, False]


async def test_a_conflict_of_several_names_the_first(driver: PostgresDriver) -> None:
    await driver.commit([batch(Put("c:a", b"1"), Put("c:z", b"1"))])

    [outcome] = await driver.commit([batch(Check("c:0", ABSENT), Put("c:z", b"2", ABSENT), Put("c:a", b"2", ABSENT))])

    assert isinstance(outcome, Conflict)
    assert (outcome.key, outcome.position) == ("c:z", 1)


# -- what is stored ------------------------------------------------------------------------------


def test_stored_keys_keep_their_order_and_come_back() -> None:
    keys = sorted({*AWKWARD_KEYS, *("".join(made) for made in itertools.product("\0\1\2a", repeat=4))}, key=str.encode)
    stored = [escaped(key) for key in keys]

    assert [unescaped(text) for text in stored] == keys
    assert sorted(stored, key=str.encode) == stored
    assert len(set(stored)) == len(keys)
    assert not any("\0" in text for text in stored)


async def test_keys_at_the_limit_are_kept_whatever_they_are_and_one_byte_more_is_refused(
    driver: PostgresDriver,
) -> None:
    limit = driver.capabilities.max_key_bytes
    assert limit == MAX_KEY_BYTES == 2692
    chance = random.Random(3)
    letters = [chr(n) for n in range(33, 127)]
    keys = ["".join(chance.choices(letters, k=limit)) for _ in range(60)]  # nothing that could be compressed
    keys += ["\0" * (limit // 2), "\U0001f600" * (limit // 4)]

    outcomes = await driver.commit([batch(Put(key, b"v")) for key in keys])
    over = await driver.commit([batch(Put(key, b"v")) for key in (keys[0] + "x", keys[-2] + "\1", keys[-1] + "x")])

    assert all(isinstance(outcome, Committed) for outcome in outcomes)
    assert [type(outcome) for outcome in over] == [KeyTooLong] * 3
    assert [entry.key for entry in await driver.scan(None, None, limit=99)] == sorted(keys, key=str.encode)


async def test_a_batch_that_cannot_be_kept_fails_alone(driver: PostgresDriver) -> None:
    outcomes = await driver.commit(
        [
            *(batch(Put("c:a", b"1")), batch(Put("c:\ud800", b"2")), batch(), batch(Put("c:v", b"5", b"short"))),
            batch(Put("c:n", b"4", expires_at=float("nan"))),
            batch(Put("c:b", bytes((64 << 20) + 1))),
            *(batch(Check("c:a", ABSENT), Put("c:c", b"6")), batch(Put("c:d", b"7", expires_at=float("inf")))),
        ]
    )

    kinds = [Committed, BadKey, Committed, BadRequest, BadRequest, ValueTooLarge, Conflict, Committed]
    assert [type(outcome) for outcome in outcomes] == kinds
    assert [entry.key for entry in await driver.scan(None, None, limit=9)] == ["c:a", "c:d"]
    with pytest.raises(BadKey):
        await driver.get(["c:\ud800"])
    with pytest.raises(BadKey):
        await driver.scan("c:\ud800", None, limit=1)


async def test_a_rule_that_somebody_added_refuses_one_batch_and_not_its_neighbours(
    url: str, driver: PostgresDriver
) -> None:
    await _sql(url, f"ALTER TABLE {driver._sql.table} ADD CHECK (key <> 'c:b')")

    outcomes = await driver.commit([batch(Put(f"c:{letter}", b"v")) for letter in "abc"])

    assert [type(outcome) for outcome in outcomes] == [Committed, KvError, Committed]
    assert [entry.key for entry in await driver.scan(None, None, limit=9)] == ["c:a", "c:c"]


async def test_many_large_values_are_sent_in_several_statements(
    driver: PostgresDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvpersist_drivers.postgres.MAX_BATCH_BYTES", 3 << 20)
    value = os.urandom(1 << 20)
    counted = _Counted(driver)

    outcomes = await driver.commit([batch(Put(f"c:{number}", value)) for number in range(6)])

    assert all(isinstance(outcome, Committed) for outcome in outcomes)
    assert counted() == 2
    assert len(await driver.scan(None, None, limit=9, keys_only=True)) == 6


async def test_index_entries_whose_value_is_no_text_have_no_target(driver: PostgresDriver) -> None:
    values = {"a": b"1", "b": b"\xff\xfe", "c": b"x\x00y", "d": b"x\x01y"}
    await driver.commit([batch(Put(f"c#i:{name}", value)) for name, value in values.items()])
    await driver.commit([batch(Put(key, key.encode())) for key in ("c:1", "c:x\x00y", "c:x\x01y")])

    found = await driver.scan("c#i:", "c#i;", limit=9, deref="c:")
    some = await driver.scan("c#i:d", "c#i;", limit=9, deref="c:")

    assert [entry.target and entry.target.key for entry in found] == ["c:1", None, "c:x\x00y", "c:x\x01y"]
    assert [entry.target and entry.target.key for entry in some] == ["c:x\x01y"]


async def test_a_hundred_thousand_keys_are_listed_exactly_and_read_by_their_index(
    url: str, driver: PostgresDriver
) -> None:
    count = 100_000
    for at in range(0, count, 5000):
        await driver.commit([batch(*(Put(f"c:{n:06}", b"%d" % n) for n in range(at, at + 5000)))])

    found: list[str] = []
    start = "c:"
    while page := await driver.scan(start, "c;", limit=1000, keys_only=True):
        found += [entry.key for entry in page]
        start = page[-1].key + "\0"

    assert found == [f"c:{n:06}" for n in range(count)]
    [entry] = await driver.get([f"c:{count - 1:06}"])
    assert entry is not None and entry.value == b"%d" % (count - 1)
    [[scans]] = await _sql(
        url, "SELECT seq_tup_read FROM pg_stat_user_tables WHERE relname = $1", driver._options.table
    )
    assert scans == 0  # though the plans were made while it was empty


# -- several writers -----------------------------------------------------------------------------


async def test_writers_of_the_same_keys_neither_deadlock_nor_mix(url: str, driver: PostgresDriver) -> None:
    keys = [f"c:{number}" for number in range(12)]
    await driver.commit([batch(*(Put(key, b"0") for key in keys))])
    wrong: list[object] = []

    async def write(number: int) -> None:
        chance = random.Random(number)
        async with _opened(url, table=driver._options.table) as other:
            for turn in range(25):
                mine = chance.sample(keys, 6)
                value = b"%d.%d" % (number, turn)
                if turn % 3 == 0:
                    ops: list[Op] = [Put(key, value) for key in keys]
                    chance.shuffle(ops)
                    wrong.extend(o for o in await other.commit([batch(*ops)]) if not isinstance(o, Committed))
                    continue
                entries = await other.get(mine)
                one = [Put(e.key, value, e.version) if turn % 2 else Delete(e.key, e.version) for e in entries if e]
                absent = [Check(key, ABSENT) for key, e in zip(mine, entries, strict=True) if e is None]
                outcomes = await other.commit([batch(*one, *absent), batch(*(Put(key, value) for key in keys))])
                wrong.extend(o for o in outcomes if not isinstance(o, Committed | Conflict))

    async with asyncio.timeout(60):
        await asyncio.gather(*(write(number) for number in range(6)))

    assert wrong == []
    values = {entry and entry.value for entry in await driver.get(keys)}
    assert len(values) == 1  # each of them wrote all keys at once, and the last one stands whole


async def test_a_batch_is_never_torn_between_an_absence_and_a_plain_put(url: str, driver: PostgresDriver) -> None:
    """Plain puts take the same locks as conditions, or this check would pass beside them."""
    async with _opened(url, table=driver._options.table) as other:
        for turn in range(40):
            a, b = f"c:{turn}a", f"c:{turn}b"
            [[plain], [judged]] = await asyncio.gather(
                other.commit([batch(Put(a, b"p"), Put(b, b"p"))]),
                driver.commit([batch(Check(a, ABSENT), Put(b, b"j"))]),
            )
            [entry] = await driver.get([b])
            assert isinstance(plain, Committed) and entry is not None
            # judged before the plain put, so overwritten by it; or after it, so refused
            assert entry.value == b"p"
            assert isinstance(judged, Committed | Conflict)


async def test_of_two_who_each_need_what_the_other_removes_one_wins(url: str, driver: PostgresDriver) -> None:
    """Checks take shared locks, or each would be judged before the other's write."""
    async with _opened(url, table=driver._options.table) as other:
        for turn in range(40):
            a, b = f"c:{turn}a", f"c:{turn}b"
            answers = await asyncio.gather(
                driver.commit([batch(Check(a, ABSENT), Put(b, b"1"))]),
                other.commit([batch(Check(b, ABSENT), Put(a, b"1"))]),
            )
            assert sorted(type(outcome).__name__ for [outcome] in answers) == ["Committed", "Conflict"]


_OLD, _NEW = b"versold!", b"versnew!"
_OTHER = "INSERT INTO {t} (key, value, version) VALUES ('c:other', '', $1)"


async def _lock(writer: Any, driver: PostgresDriver, key: str) -> None:
    """Lock ``key`` as who writes it does."""
    await writer.execute('SELECT pg_advisory_xact_lock($1, hashtext($2::text COLLATE "C"))', driver._table, key)


async def _until_waiting(writer: Any, count: int = 1) -> None:
    """Return once ``count`` others wait for locks."""
    async with asyncio.timeout(10):
        while await writer.fetchval("SELECT count(*) FROM pg_locks WHERE NOT granted") < count:
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("updated", [False, True], ids=["first", "updated"])
@pytest.mark.parametrize(
    ("change", "outcomes"),
    [
        ("UPDATE {t} SET version = $1 WHERE key = 'c:held'", {_OLD: Conflict, _NEW: Committed}),
        ("DELETE FROM {t} WHERE key = 'c:held' AND version <> $1", {_OLD: Conflict}),
        ("WITH gone AS (DELETE FROM {t} WHERE key = 'c:held') {other}", {_OLD: Conflict}),
        ("{other}", {_OLD: Committed, _NEW: Conflict}),
    ],
    ids=["updated", "deleted", "deleted beside a write", "untouched"],
)
@pytest.mark.parametrize("looks", [True, False], ids=["beside a check", "under a version"])
async def test_a_put_that_waits_for_another_writer_is_judged_by_what_that_one_left(
    url: str, driver: PostgresDriver, looks: bool, change: str, outcomes: dict[bytes, type], updated: bool
) -> None:
    def put_at(version: bytes) -> Batch:
        key = f"c:{version.decode()}"
        return batch(Check("c:held", version), Put(key, b"p")) if looks else batch(Put("c:held", b"p", version))

    for version in (b"versfirs", _OLD) if updated else (_OLD,):
        await driver.commit([batch(Put("c:held", b"v"), version=version)])
    writer = await asyncpg.connect(url)
    try:
        async with writer.transaction():
            await _lock(writer, driver, "c:held")
            await writer.execute(change.replace("{other}", _OTHER).format(t=driver._sql.table), _NEW)
            puts = [asyncio.create_task(driver.commit([put_at(version)])) for version in outcomes]
            await _until_waiting(writer, len(puts))
    finally:
        await writer.close()

    answers = [outcome for put in puts for outcome in await put]
    assert [type(answer) for answer in answers] == list(outcomes.values())
    stored = await driver.get([f"c:{version.decode()}" if looks else "c:held" for version in outcomes])
    written = [entry is not None and entry.value == b"p" for entry in stored]
    wanted = [kind is Committed for kind in outcomes.values()]
    assert written == (wanted if looks else [any(wanted)] * len(wanted))


@pytest.mark.parametrize("stays", [True, False], ids=["committed", "rolled back"])
async def test_an_insert_that_waits_for_another_writer_is_judged_by_what_that_one_left(
    url: str, driver: PostgresDriver, stays: bool
) -> None:
    writer = await asyncpg.connect(url)
    try:
        transaction = writer.transaction()
        await transaction.start()
        await _lock(writer, driver, "c:other")
        await writer.execute(_OTHER.format(t=driver._sql.table), _OLD)
        inserts = asyncio.create_task(
            driver.commit([batch(Put("c:other", b"p", ABSENT)), batch(Put("c:beside", b"p", ABSENT))])
        )
        await _until_waiting(writer)
        await (transaction.commit() if stays else transaction.rollback())
    finally:
        await writer.close()

    other, beside = await inserts
    assert isinstance(beside, Committed)
    assert (other.args == ("c:other", ABSENT, _OLD, 0)) if isinstance(other, Conflict) else not stays
    entries = await driver.get(["c:other", "c:beside"])
    assert [entry and entry.value for entry in entries] == [b"" if stays else b"p", b"p"]


async def test_inserts_are_told_apart(driver: PostgresDriver) -> None:
    now = time.time()
    await driver.commit([batch(Put("c:held", b"v"), version=_OLD)])
    await driver.commit([batch(Put("c:past", b"v", None, now + 60), version=_OLD)])
    driver.clock = lambda: now + 120
    held = Check("c:held", _OLD)
    counted = _Counted(driver)
    two = batch(held, Put("c:1", b"v", ABSENT), Put("c:2", b"v", ABSENT), version=_NEW)
    assert await driver.commit([two, batch(Put("c:3", b"v", ABSENT), version=_OLD)]) == [
        Committed(_NEW),
        Committed(_OLD),
    ]
    assert counted() == 1

    outcomes = await driver.commit(
        [
            batch(held, Put("c:4", b"v", ABSENT), Put("c:1", b"new", ABSENT), version=_NEW),
            batch(held, Put("c:past", b"new", ABSENT), version=_NEW),
            batch(held, Put("c:5", b"v", ABSENT), version=_NEW),
            batch(held, Put("c:5", b"new", ABSENT), version=_OLD),
        ]
    )

    assert outcomes[1:3] == [Committed(_NEW), Committed(_NEW)]
    assert [outcome.args for outcome in outcomes if isinstance(outcome, Conflict)] == [
        ("c:1", ABSENT, _NEW, 2),
        ("c:5", ABSENT, _NEW, 1),
    ]
    stored = [entry and entry.value for entry in await driver.get(["c:1", "c:4", "c:5", "c:past"])]
    assert stored == [b"v", None, b"v", b"new"]


async def test_who_lost_a_put_under_a_version_leaves_nothing_that_costs_others_a_call(
    url: str, driver: PostgresDriver
) -> None:
    await driver.commit([batch(Put("c:held", b"v"), version=_OLD)])
    writer = await asyncpg.connect(url)
    try:
        async with writer.transaction():
            await _lock(writer, driver, "c:held")
            await writer.execute(f"UPDATE {driver._sql.table} SET version = $1 WHERE key = 'c:held'", _NEW)
            losing = asyncio.create_task(driver.commit([batch(Put("c:held", b"p", _OLD))]))
            await _until_waiting(writer)
    finally:
        await writer.close()
    [lost] = await losing
    assert isinstance(lost, Conflict)

    counted = _Counted(driver)
    [outcome] = await driver.commit([batch(Check("c:held", _NEW), Put("c:a", b"v"))])

    assert isinstance(outcome, Committed)
    assert counted() == 1


async def test_an_error_behind_some_puts_under_a_version_is_not_theirs(
    driver: PostgresDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    await driver.commit([batch(Put("c:a", b"v"), version=_OLD)])

    async def lost(*_: object, **__: object) -> None:
        raise CommitUnknown((), "the connection broke")

    monkeypatch.setattr(driver._connections, "call_many", lost)
    outcomes = await driver.commit(
        [batch(Put("c:a", b"new", _OLD), version=_NEW), batch(Put("c:none", b"new", _OLD), version=_NEW)]
    )

    assert outcomes[0] == Committed(_NEW)
    assert isinstance(outcomes[1], CommitUnknown)


async def test_every_increment_of_several_writers_counts_once(url: str, driver: PostgresDriver) -> None:
    keys = [f"c:{number}" for number in range(8)]
    await driver.commit([batch(Put("c:held", b"v"), *(Put(key, b"0") for key in keys), version=_OLD)])

    async def add(number: int) -> int:
        made = 0
        chance = random.Random(number)
        async with _opened(url, table=driver._options.table) as other:
            for _ in range(40):
                found = [entry for entry in await other.get(chance.sample(keys, 4)) if entry is not None]
                outcomes = await other.commit(
                    [batch(Check("c:held", _OLD), Put(e.key, b"%d" % (int(e.value) + 1), e.version)) for e in found]
                )
                assert all(isinstance(outcome, Committed | Conflict) for outcome in outcomes)
                made += sum(isinstance(outcome, Committed) for outcome in outcomes)
        return made

    async with asyncio.timeout(60):
        made = await asyncio.gather(*(add(number) for number in range(6)))

    assert sum(int(entry.value) for entry in await driver.get(keys) if entry is not None) == sum(made)
    assert sum(made) < 6 * 40 * 4  # or nobody met anybody


async def test_puts_under_a_version_are_told_apart(driver: PostgresDriver) -> None:
    now = time.time()
    await driver.commit([batch(*(Put(f"c:{number}", b"v") for number in range(4)), version=_OLD)])
    await driver.commit([batch(Put("c:past", b"v", None, now + 60), version=_OLD)])
    driver.clock = lambda: now + 120

    outcomes = await driver.commit(
        [
            batch(Put("c:0", b"new", _OLD), version=_NEW),
            batch(Put("c:1", b"new", _NEW), version=_NEW),
            batch(Check("c:3", _OLD), Put("c:2", b"new", _OLD), version=_NEW),
            batch(Check("c:3", _OLD), Put("c:none", b"new", _OLD), version=_NEW),
            batch(Check("c:3", _OLD), Put("c:past", b"new", _OLD), version=_NEW),
        ]
    )
    refused = await driver.commit(
        [batch(Check("c:3", _NEW), Put("c:2", b"newer", _NEW)), batch(Check("c:3", _NEW), Put("c:0", b"newer", _OLD))]
    )

    assert outcomes[0] == outcomes[2] == Committed(_NEW)
    told = [outcome.args for outcome in (*outcomes, *refused) if isinstance(outcome, Conflict)]
    assert told == [
        ("c:1", _NEW, _OLD, 0),
        ("c:none", _OLD, ABSENT, 1),
        ("c:past", _OLD, ABSENT, 1),
        ("c:3", _NEW, _OLD, 0),
        ("c:3", _NEW, _OLD, 0),
    ]
    stored = [entry and entry.value for entry in await driver.get(["c:0", "c:1", "c:2", "c:3", "c:none", "c:past"])]
    assert stored == [b"new", b"v", b"new", b"v", None, None]


async def test_a_put_never_lands_behind_a_change_of_what_it_checked(url: str, driver: PostgresDriver) -> None:
    await follow_what_they_checked(driver, lambda: _opened(url, table=driver._options.table))


async def test_a_change_that_was_taken_back_is_no_conflict(url: str, driver: PostgresDriver) -> None:
    await driver.commit([batch(Put("c:held", b"v"), version=_OLD)])
    await _sql(
        url, f"DO $$BEGIN UPDATE {driver._sql.table} SET version = 'x'; RAISE 'no'; EXCEPTION WHEN OTHERS THEN END$$"
    )

    [outcome] = await driver.commit([batch(Check("c:held", _OLD), Put("c:a", b"v"))])

    assert isinstance(outcome, Committed)


async def test_a_check_of_all_fails_all_and_one_of_some_only_those(driver: PostgresDriver) -> None:
    await driver.commit([batch(Put("c:a", b"v"), Put("c:b", b"v"), version=_OLD)])
    both = Check("c:a", _OLD)

    some = await driver.commit(
        [
            batch(both, Put("c:1", b"v")),
            batch(Check("c:b", _NEW), both, Put("c:2", b"v")),
            batch(both, Put("c:3", b"v", ABSENT)),
        ]
    )
    none = await driver.commit(
        [batch(Put("c:4", b"v", ABSENT), Check("c:b", _NEW)), batch(Check("c:b", _NEW), Delete("c:1"))]
    )

    assert [type(outcome) for outcome in some] == [Committed, Conflict, Committed]
    assert [outcome.args for outcome in none if isinstance(outcome, Conflict)] == [
        ("c:b", _NEW, _OLD, 1),
        ("c:b", _NEW, _OLD, 0),
    ]
    found = await driver.get([f"c:{number}" for number in (1, 2, 3, 4)])
    assert [entry is not None for entry in found] == [True, False, True, False]


async def test_a_key_without_a_letter_is_refused_alone(driver: PostgresDriver) -> None:
    refused, taken = await driver.commit([batch(Put("", b"v")), batch(Put("c:a", b"v"))])

    assert isinstance(refused, BadKey) and isinstance(taken, Committed)


async def test_what_another_process_is_about_to_change_is_not_compacted(url: str, driver: PostgresDriver) -> None:
    await driver.commit([batch(Put(f"c:{number}", b"v", expires_at=time.time() + 0.05)) for number in range(4)])
    await asyncio.sleep(0.1)
    connection = await asyncpg.connect(url)
    async with connection.transaction():
        await connection.execute(f"SELECT FROM {driver._sql.table} WHERE key = 'c:1' FOR UPDATE")
        async with asyncio.timeout(5):
            assert await driver.compact() == 3
    await connection.close()
    assert await driver.compact() == 1


# -- tables --------------------------------------------------------------------------------------


async def test_sixteen_may_open_a_store_that_is_not_there_yet(url: str) -> None:
    schema, table = f"s{_table()}", _table()
    drivers = await asyncio.gather(
        *(PostgresDriver.open(PostgresOptions(url=url, schema=schema, table=table)) for _ in range(16))
    )
    assert [type(outcome) for [outcome] in [await d.commit([batch(Put("c:a", b"v"))]) for d in drivers]] == (
        [Committed] * 16
    )
    for one in drivers:
        await one.provision()
        await one.close()
    await _sql(url, f"DROP SCHEMA {schema} CASCADE")


async def test_the_printed_statements_make_what_open_needs(url: str) -> None:
    schema, table = f"s{_table()}", _table()
    options = PostgresOptions(url=url, schema=schema, table=table, auto_create=False)
    with pytest.raises(FormatMismatch) as told:
        await PostgresDriver.open(options)
    assert told.value.found == "nothing"
    assert "kvpersist init 'postgresql://" in str(told.value) and "kvpersist ddl 'postgresql://" in str(told.value)
    assert "kv.table=" in str(told.value)

    for _ in range(2):  # they may be run again
        await _sql(url, PostgresDriver.ddl_of(options))
    driver = await PostgresDriver.open(options)
    assert isinstance(driver, Provisions)
    assert driver.ddl() == PostgresDriver.ddl_of(PostgresOptions(client=object(), schema=schema, table=table))
    assert isinstance((await driver.commit([batch(Put("c:a", b"v"))]))[0], Committed)
    await driver.close()
    await _sql(url, f"DROP SCHEMA {schema} CASCADE")


async def test_two_tables_are_two_stores(url: str) -> None:
    async with _emptied(url) as one, _emptied(url, table=f"T{_table()}") as two:  # names keep their case
        await one.commit([batch(Put("c:a", b"1"))])
        await two.commit([batch(Put("c:b", b"2"))])

        assert [entry.key for entry in await one.scan(None, None, limit=9)] == ["c:a"]
        assert [entry.key for entry in await two.scan(None, None, limit=9)] == ["c:b"]


async def test_the_longest_names_of_tables_get_an_index_each(url: str) -> None:
    names = ["x" * 62 + letter for letter in "ab"]
    try:
        for name in names:
            async with _opened(url, table=name):
                pass
        found = await _sql(url, "SELECT tablename FROM pg_indexes WHERE indexname LIKE $1 ORDER BY 1", "xx%expires_at")
        assert [row[0] for row in found] == names
    finally:
        await _dropped(url, *names)


@pytest.mark.parametrize("name", ['k"; DROP TABLE x; --', "a.b", "", "1a", "a b", "x" * 64, "é", "a'b", "a\n"])
async def test_a_name_that_is_none_never_reaches_the_server(url: str, name: str) -> None:
    for option in ("table", "schema"):
        with pytest.raises(BadOption, match=option):
            await PostgresDriver.open(PostgresOptions(url="postgresql://127.0.0.1:1/x", **{option: name}))


async def test_a_table_of_another_shape_is_refused_and_left_alone(url: str) -> None:
    for columns in (
        "key text primary key, value bytea, version bytea, expires_at float8",
        'key text COLLATE "C", value bytea, version bytea, expires_at float8',
        "id int",
    ):
        table = _table()
        await _sql(url, f"CREATE TABLE {table} ({columns})")
        with pytest.raises(FormatMismatch, match="key"):
            await PostgresDriver.open(PostgresOptions(url=url, table=table))
        await _dropped(url, table)


# -- rights --------------------------------------------------------------------------------------


async def test_a_role_that_may_not_make_the_table_is_told_what_is_missing(url: str) -> None:
    async with _few_rights(url) as (plain, _):
        with pytest.raises(FormatMismatch, match=r"permission denied.*kvpersist ddl"):
            await PostgresDriver.open(PostgresOptions(url=plain, table=_table()))
        with pytest.raises(FormatMismatch, match=r"permission denied.*kvpersist ddl"):
            await PostgresDriver.open(PostgresOptions(url=plain, table=_table(), schema=f"s{_table()}"))


async def test_a_role_that_may_only_read_reads_and_is_refused_to_write(url: str) -> None:
    async with _few_rights(url, "SELECT") as (plain, table):
        async with _opened(url, table=table) as driver:
            await driver.commit([batch(Put("c:a", b"1"))])
        async with _opened(plain, table=table) as driver:
            assert [entry and entry.value for entry in await driver.get(["c:a"])] == [b"1"]
            for ops in ((Put("c:a", b"2"),), (Delete("c:a"),)):
                with pytest.raises(ReadOnly, match="GRANT"):
                    await driver.commit([batch(*ops)])
        async with kvpersist.open_store(f"{plain}?kv.table={table}") as store:
            with pytest.raises(ReadOnly):
                await store.put("a", 1)


async def test_a_role_that_may_not_read_is_told_so(url: str) -> None:
    async with _few_rights(url, "") as (plain, table), _opened(plain, table=table) as driver:
        with pytest.raises(BadOption, match="GRANT"):
            await driver.get(["c:a"])


async def test_a_server_that_only_reads_is_opened_and_refuses_to_write(url: str, driver: PostgresDriver) -> None:
    await driver.commit([batch(Put("c:a", b"1"))])
    where = f"{url}?default_transaction_read_only=on"
    async with _opened(where, table=driver._options.table) as other:
        assert [entry and entry.value for entry in await other.get(["c:a"])] == [b"1"]
        with pytest.raises(ReadOnly, match="read-only"):
            await other.commit([batch(Put("c:a", b"2"))])
        with pytest.raises(ReadOnly):
            await other.compact()
    with pytest.raises(FormatMismatch, match="read-only"):
        await PostgresDriver.open(PostgresOptions(url=where, table=_table()))


async def test_a_standby_is_read_and_refuses_to_write(own_server: PostgresServer, tmp_path: Path) -> None:
    async with _opened(own_server.url, table="kv") as driver:
        await driver.commit([batch(Put("c:a", b"1"))])
    own_server.stop()
    signal = Path(own_server.folder, "data", "standby.signal")
    signal.touch()
    shutil.copystat(signal.parent, signal)
    shutil.chown(signal, signal.parent.stat().st_uid, signal.parent.stat().st_gid)
    own_server.start()

    async with _opened(own_server.url, table="kv") as driver:
        assert [entry and entry.value for entry in await driver.get(["c:a"])] == [b"1"]
        with pytest.raises(ReadOnly, match="read-only"):
            await driver.commit([batch(Put("c:a", b"2"))])


# -- addresses -----------------------------------------------------------------------------------


def test_a_password_is_not_shown() -> None:
    for options in (
        PostgresOptions(url="postgresql://ada:s3cret@localhost/x"),
        PostgresOptions(url="postgresql://ada@localhost/x?password=s3cret"),
        PostgresOptions(host="localhost", username="ada", password="s3cret"),
    ):
        assert "s3cret" not in repr(options) + str(options) + options.where


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"url": "postgresql://h/x", "host": "h"},
        {"host": "h", "client": 1},
        {"client": object()},
        {"url": "postgresql://h/x?sslmode=maybe"},
        {"url": "postgresql://h/x", "ssl": "maybe"},
    ],
)
async def test_an_address_without_meaning_is_refused(given: dict[str, Any]) -> None:
    with pytest.raises(BadOption):
        await PostgresDriver.open(PostgresOptions(**given))


async def test_a_mapping_and_each_scheme_lead_to_the_server(url: str) -> None:
    parts, _ = urls.split(url)
    table = _table()
    mapping = {"type": "postgresql", "host": parts.host, "port": parts.port, "username": parts.username}
    for where in (
        {**mapping, "database": parts.path, "table": table, "ssl": False},
        f"{url.replace('postgresql:', 'postgres:')}?kv.table={table}&sslmode=disable&kv.pool_idle=1m",
    ):
        async with kvpersist.open_store(where) as store:
            await store.put("greeting", "hello")
            assert await store.get("greeting") == "hello"
            assert store.capabilities.server.startswith("PostgreSQL ")
            assert store.capabilities.durable
    await _dropped(url, table)


async def test_what_the_server_does_not_know_is_told(url: str) -> None:
    unknown = url.rpartition("/")[0] + "/nowhere"
    for where, error in ((unknown, BadOption), (f"{url}?colour=blue", BadOption), (f"{url}?jit=maybe", BadOption)):
        with pytest.raises(error):
            await PostgresDriver.open(PostgresOptions(url=where))
    with pytest.raises(Unavailable, match=r"127\.0\.0\.1:1/"):
        await PostgresDriver.open(PostgresOptions(url="postgresql://127.0.0.1:1/x"))
    with pytest.raises(Unsupported, match="serializable"):
        await PostgresDriver.open(PostgresOptions(url=f"{url}?default_transaction_isolation=serializable"))


async def test_writes_that_are_not_flushed_are_not_called_durable(url: str) -> None:
    async with _emptied(f"{url}?synchronous_commit=off") as driver:
        assert not driver.capabilities.durable


async def test_a_database_in_another_encoding_is_refused(url: str) -> None:
    name = f"d{_table()}"
    await _sql(url, f"CREATE DATABASE {name} ENCODING 'LATIN1' LOCALE 'C' TEMPLATE template0")
    try:
        with pytest.raises(Unsupported, match="LATIN1"):
            await PostgresDriver.open(PostgresOptions(url=f"{url.rpartition('/')[0]}/{name}"))
    finally:
        await _sql(url, f"DROP DATABASE {name}")


def test_without_its_client_it_says_what_to_install() -> None:
    program = "import sys; sys.modules['asyncpg'] = None\nimport asyncio, kvpersist\n"
    program += "async def main(): await kvpersist.open_store('postgresql://localhost')\nasyncio.run(main())"

    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)

    assert "pip install 'kvpersist[postgres]'" in done.stderr


async def test_a_wrong_password_is_told_and_not_shown(own_server: PostgresServer) -> None:
    await _sql(own_server.url, "CREATE ROLE ada LOGIN PASSWORD 's3cret'; GRANT ALL ON SCHEMA public TO ada")
    hba = Path(own_server.folder, "data", "pg_hba.conf")
    hba.write_text(f"host all ada all scram-sha-256\n{hba.read_text()}")
    await _sql(own_server.url, "SELECT pg_reload_conf()")
    await asyncio.sleep(0.2)
    place = own_server.url.partition("@")[2]

    for wrong in ("postgresql://ada:wr0ng@", "postgresql://ada@"):
        with pytest.raises(BadOption, match="password") as told:
            await PostgresDriver.open(PostgresOptions(url=wrong + place))
        assert not told.value.retryable
        assert "wr0ng" not in str(told.value)
    async with _opened(f"postgresql://ada:s3cret@{place}") as driver:
        assert await driver.get(["c:a"]) == [None]


async def test_tls_is_spoken_with_a_server_whose_certificate_is_known(
    own_server: PostgresServer, tmp_path: Path
) -> None:
    if not shutil.which("openssl"):
        pytest.skip("needs openssl")
    data = Path(own_server.folder, "data")
    request = ["-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    names = ["-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    made = ["-keyout", str(data / "server.key"), "-out", str(data / "server.crt")]
    subprocess.run(["openssl", "req", *request, *names, *made], check=True, capture_output=True)
    for name in ("server.key", "server.crt"):
        shutil.chown(data / name, data.stat().st_uid, data.stat().st_gid)
    (data / "server.key").chmod(0o600)
    await _sql(own_server.url, "ALTER SYSTEM SET ssl = on")
    await _sql(own_server.url, "SELECT pg_reload_conf()")
    await asyncio.sleep(0.2)

    async def encrypted(driver: PostgresDriver) -> bool:
        [[spoken]] = await driver._read("SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()")
        return bool(spoken)

    for ssl, spoken in (("require", True), (False, False), (None, True)):
        async with _opened(own_server.url, ssl=ssl) as driver:
            assert await encrypted(driver) is spoken
    async with _opened(f"{own_server.url}?sslmode=verify-full&sslrootcert={data / 'server.crt'}") as driver:
        assert await encrypted(driver)
    with pytest.raises(Unavailable, match=r"(?i)certificate"):
        await PostgresDriver.open(PostgresOptions(url=own_server.url, ssl=True))


# -- connections ---------------------------------------------------------------------------------


async def test_a_full_server_and_an_exhausted_pool_are_two_errors(url: str, driver: PostgresDriver) -> None:
    async with _few_rights(url) as (plain, table):
        role = plain.partition("//")[2].partition("@")[0]
        async with _opened(plain, table=table, pool_max=2, connect_timeout=0.3) as narrow:
            locker = await asyncpg.connect(url)
            async with locker.transaction():
                await locker.execute(f"LOCK TABLE {table}")
                calls = [asyncio.ensure_future(narrow.get(["c:a"])) for _ in range(2)]
                await asyncio.sleep(0.1)
                with pytest.raises(PoolExhausted) as told:
                    await narrow.get(["c:a"])
                assert (told.value.size, told.value.in_use) == (2, 2)
            assert await asyncio.gather(*calls) == [[None], [None]]
            await locker.close()
            await _sql(url, f"ALTER ROLE {role} CONNECTION LIMIT 2")
            with pytest.raises(TooManyClients, match="too many connections"):
                await PostgresDriver.open(PostgresOptions(url=plain, table=table))
            assert await narrow.get(["c:a"]) == [None]


async def test_no_more_connections_are_made_than_allowed_and_unused_ones_are_closed(url: str) -> None:
    name = f"app{_table()}"

    async def count() -> int:
        [[found]] = await _sql(url, "SELECT count(*) FROM pg_stat_activity WHERE application_name = $1", name)
        return found

    async with _emptied(f"{url}?application_name={name}", pool_max=3, pool_idle=0.3) as driver:
        await asyncio.gather(*(driver.get(["c:a"]) for _ in range(40)))
        assert await count() == 3
        assert driver._connections.in_use == 0
        async with asyncio.timeout(5):
            while await count():
                await asyncio.sleep(0.05)
        assert await driver.get(["c:a"]) == [None]
        assert await count() == 1
    assert await count() == 0


async def test_a_terminated_backend_is_told_once_or_not_at_all(url: str) -> None:
    name = f"app{_table()}"
    kill = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = $1"
    async with _emptied(f"{url}?application_name={name}") as driver:
        await driver.commit([batch(Put("c:a", b"1"))])
        await _sql(url, kill, name)
        await asyncio.sleep(0.1)

        assert [entry and entry.value for entry in await driver.get(["c:a"])] == [b"1"]  # it was unused: not noticed

        locker = await asyncpg.connect(url)
        async with locker.transaction():
            await locker.execute(f"LOCK TABLE {driver._sql.table}")
            reading = asyncio.ensure_future(driver.get(["c:a"]))
            writing = asyncio.ensure_future(driver.commit([batch(Put("c:a", b"2"))]))
            await asyncio.sleep(0.1)
            await _sql(url, kill, name)
            with pytest.raises(Unavailable):
                await reading
            with pytest.raises(CommitUnknown):
                await writing
        await locker.close()
        assert [entry and entry.value for entry in await driver.get(["c:a"])] == [b"1"]
        assert driver._connections.in_use == 0


async def test_a_server_that_goes_and_comes_back_is_used_again(own_server: PostgresServer) -> None:
    async with _opened(own_server.url) as driver:
        await driver.commit([batch(Put("c:a", b"1"))])

        await asyncio.to_thread(own_server.stop)
        for _ in range(3):
            with pytest.raises(Unavailable):
                await driver.get(["c:a"])
            with pytest.raises(Unavailable):  # nothing was sent, so it is no CommitUnknown
                await driver.commit([batch(Put("c:b", b"2"))])
        await asyncio.to_thread(own_server.start)
        assert [entry and entry.value for entry in await driver.get(["c:a", "c:b"])] == [b"1", None]

        own_server.restart()  # the loop does not run meanwhile
        await asyncio.sleep(0.06)
        assert isinstance((await driver.commit([batch(Put("c:b", b"2"))]))[0], Committed)


async def test_faults_of_the_network_are_typed_and_the_next_call_works(url: str) -> None:
    with Proxy.before(url) as proxy:
        async with _emptied(url) as direct:
            options = {"table": direct._options.table, "connect_timeout": 1.0}
            async with _opened(proxy.url, **options) as driver:
                await driver.commit([batch(Put("c:a", b"0"))])
                for number, cut in enumerate((0, 1, 7, 20), 1):
                    await driver.commit([batch(Put("c:warm", b"v"))])  # the statement is known from here on
                    await driver.get(["c:warm"])
                    proxy.cut_after(cut)
                    with pytest.raises(Unavailable):
                        await driver.get(["c:a"])
                    proxy.heal()
                    await driver.commit([batch(Put("c:warm", b"v"))])
                    proxy.cut_after(cut)
                    with pytest.raises(CommitUnknown):
                        await driver.commit([batch(Put("c:a", b"%d" % number))])
                    proxy.heal()
                    for reader in (direct, driver):  # it was done, and only its answer was lost
                        [entry] = await reader.get(["c:a"])
                        assert entry is not None and entry.value == b"%d" % number
                proxy.refuse()
                proxy.cut()
                await asyncio.sleep(0.02)  # the loop may see it
                for _ in range(2):
                    with pytest.raises(Unavailable):
                        await driver.commit([batch(Put("c:a", b"x"))])
                proxy.heal()
                assert len(await driver.get(["c:a"])) == 1
                proxy.stall()
                began = time.monotonic()
                async with kvpersist.open_store(direct) as store:
                    assert await store.get("c:none") is None
                behind = kvpersist.Store(driver, timeout=0.3)
                with pytest.raises(KvError) as told:
                    await behind.get("c:a")
                assert told.value.outcome == "none"
                with pytest.raises(CommitUnknown):
                    await behind.put("c:a", 1)
                assert time.monotonic() - began < 4
                proxy.heal()
                await behind.put("c:b", 1)
                assert await behind.get("c:b") == 1
                async with asyncio.timeout(5):
                    while driver._connections.in_use:
                        await asyncio.sleep(0.02)
                await behind.close()


async def test_a_server_that_does_not_answer_is_given_up_when_connecting() -> None:
    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    deaf = await asyncio.start_server(silent, "127.0.0.1", 0)
    port = deaf.sockets[0].getsockname()[1]
    began = time.monotonic()
    with pytest.raises(Unavailable, match="connect_timeout"):
        await PostgresDriver.open(PostgresOptions(url=f"postgresql://a@127.0.0.1:{port}/x", connect_timeout=0.3))
    assert time.monotonic() - began < 2
    deaf.close()


async def test_a_storm_of_cancelled_calls_mixes_up_no_answers_and_leaks_no_connection(url: str) -> None:
    keys = [f"c:{number:03}" for number in range(50)]
    chance = random.Random(7)
    wrong: list[Any] = []
    cancelled = answered = 0
    with Proxy.before(url) as proxy:
        async with _emptied(url) as direct, _opened(proxy.url, table=direct._options.table, pool_max=8) as driver:
            await driver.commit([batch(Put(key, key.encode())) for key in keys])
            proxy.delay(0.003, 0.003)

            async def ask(key: str) -> None:
                nonlocal answered
                match chance.randrange(3):
                    case 0:
                        found = await driver.get([key])
                        wrong.extend(entry for entry in found if entry is None or entry.value != key.encode())
                    case 1:
                        found = await driver.scan(key, key + "\x00", limit=3)
                        wrong.extend([key] * ([entry.key for entry in found] != [key]))
                    case _:
                        one = batch(Put(key, key.encode()))
                        outcome = await driver.commit([one])
                        wrong.extend([outcome] * (outcome != [Committed(one.version)]))
                answered += 1

            async def later(task: asyncio.Task[None], delay: float) -> None:
                await asyncio.sleep(delay)
                task.cancel()

            while cancelled < 200:
                tasks = [asyncio.create_task(ask(chance.choice(keys))) for _ in range(32)]
                stops = [asyncio.create_task(later(task, chance.random() * 0.2)) for task in tasks[::2]]
                answers = await asyncio.gather(*tasks, return_exceptions=True)
                await asyncio.gather(*stops)
                cancelled += sum(isinstance(answer, asyncio.CancelledError) for answer in answers)
                assert all(answer is None or isinstance(answer, asyncio.CancelledError) for answer in answers), answers

            proxy.heal()
            async with asyncio.timeout(5):
                while driver._connections.in_use:
                    await asyncio.sleep(0.02)
            assert wrong == []
            assert answered > 20
            assert proxy.connections <= 8
            [[open_]] = await _sql(
                url,
                "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND classid = $1",
                driver._table % (1 << 32),
            )
            assert open_ == 0
            assert [entry and entry.value for entry in await driver.get(keys)] == [key.encode() for key in keys]


async def test_a_cancelled_commit_that_waits_is_cancelled_on_the_server_too(url: str, driver: PostgresDriver) -> None:
    locker = await asyncpg.connect(url)
    async with locker.transaction():
        await locker.execute(f"LOCK TABLE {driver._sql.table}")
        call = asyncio.ensure_future(driver.commit([batch(Put("c:a", b"1"))]))
        await asyncio.sleep(0.1)
        call.cancel()
        await asyncio.wait([call])
        async with asyncio.timeout(5):
            while driver._connections.in_use:
                await asyncio.sleep(0.01)
    await locker.close()

    assert await driver.get(["c:a"]) == [None]


async def test_a_closed_driver_leaves_a_ready_pool_open_with_its_connections(url: str) -> None:
    async with asyncpg.create_pool(url, min_size=1, max_size=3) as pool:
        driver = await PostgresDriver.over(pool, table=_table(), pool_max=2)
        call = asyncio.ensure_future(driver.scan(None, None, limit=1))
        await asyncio.sleep(0)
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)
        await driver.commit([batch(Put("c:a", b"1"))])

        await driver.close()

        with pytest.raises(StoreClosed):
            await driver.get(["c:a"])
        assert await asyncio.gather(*(pool.fetchval("SELECT 1") for _ in range(9))) == [1] * 9
        assert pool.get_idle_size() == pool.get_size()
    await _dropped(url, driver._sql.table)


async def test_a_ready_pool_that_its_owner_has_exhausted_is_told_as_such(url: str) -> None:
    async with asyncpg.create_pool(url, min_size=1, max_size=1) as pool, pool.acquire():
        with pytest.raises(PoolExhausted):
            await PostgresDriver.over(pool, connect_timeout=0.2)


# -- watching ------------------------------------------------------------------------------------


@asynccontextmanager
async def _watching(driver: PostgresDriver, prefix: str) -> AsyncIterator[asyncio.Queue[tuple[str, ...]]]:
    """What a watch yields, from the moment on that it listens."""
    told: asyncio.Queue[tuple[str, ...]] = asyncio.Queue()

    async def follow() -> None:
        async for keys in driver.watch(prefix):
            await told.put(keys)

    task = asyncio.ensure_future(follow())
    async with asyncio.timeout(10):
        assert await told.get() == ()  # it listens from here on
    try:
        yield told
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_a_watch_names_what_was_changed_and_nothing_that_was_not(url: str, driver: PostgresDriver) -> None:
    await driver.commit([batch(Put("c:held", b"v"), Put("c:gone", b"v"))])
    async with _opened(url, table=driver._options.table) as other, _watching(other, "c:") as told:
        await driver.commit([batch(Put("c:a", b"1"), Put("d:a", b"1"))])
        await driver.commit([batch(Put("d:b", b"1"))])
        await driver.commit(
            [
                batch(Put("c:x", b"1"), Check("c:held", ABSENT)),
                batch(Put("c:b\0\1", b"1", ABSENT)),
                batch(Delete("c:gone")),
            ]
        )
        await driver.commit([batch(*(Put(f"c:{number:04}" + "x" * 40, b"1") for number in range(400)))])
        async with asyncio.timeout(10):
            first, second, third = [await told.get() for _ in range(3)]

        assert first == ("c:a",)
        assert set(second) == {"c:b\0\1", "c:gone"}
        assert third == ()  # too many to be named


async def test_a_watch_that_lost_its_connection_says_so_and_listens_again(url: str, driver: PostgresDriver) -> None:
    async with _watching(driver, "c:") as told:
        kill = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE query LIKE 'LISTEN%' AND query LIKE $1"
        await _sql(url, kill, f"%{driver._table % (1 << 32)}%")
        async with asyncio.timeout(10):
            assert await told.get() == ()
            assert await told.get() == ()  # by now it listens again
            await driver.commit([batch(Put("c:a", b"1"))])
            assert await told.get() == ("c:a",)


async def test_a_watch_has_a_connection_of_its_own_and_leaves_with_the_last_watcher(driver: PostgresDriver) -> None:
    async with _watching(driver, "c:") as one, _watching(driver, "d:") as two:
        assert driver._connections.in_use == 0
        await driver.commit([batch(Put("d:a", b"1"), Put("c:a", b"1"))])
        async with asyncio.timeout(10):
            assert (await one.get(), await two.get()) == (("c:a",), ("d:a",))
    assert driver._listener is not None
    assert driver._listener._connection is None


async def test_a_watch_ends_when_the_driver_is_closed(driver: PostgresDriver) -> None:
    changes = driver.watch("c:")
    assert await anext(changes) == ()
    waiting = asyncio.ensure_future(anext(changes))
    await asyncio.sleep(0.1)

    await driver.close()

    with pytest.raises(StoreClosed):
        await waiting


async def test_a_slow_watcher_is_told_that_it_missed_something(driver: PostgresDriver) -> None:
    changes = driver.watch("c:")
    assert await anext(changes) == ()
    async with asyncio.timeout(30):
        for _ in range(1100):
            driver._listener._notified(None, 0, "", "c:b")
        assert await anext(changes) == ()
    await changes.aclose()


# -- PgBouncer -----------------------------------------------------------------------------------


@pytest.fixture
def bouncer(url: str, tmp_path: Path) -> Iterator[str]:
    """The URL of the server behind PgBouncer in transaction mode, with two connections to it."""
    program = shutil.which("pgbouncer", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
    if program is None:
        pytest.skip("needs pgbouncer")
    parts, _ = urls.split(url)
    from server import free_port

    port = free_port()
    users = tmp_path / "users"
    users.write_text(f'"{parts.username}" ""\n')
    settings = tmp_path / "pgbouncer.ini"
    settings.write_text(
        f"[databases]\n* = host={parts.host} port={parts.port}\n[pgbouncer]\nlisten_addr=127.0.0.1\n"
        f"listen_port={port}\nunix_socket_dir=\nauth_type=any\nauth_file={users}\npool_mode=transaction\n"
        f"default_pool_size=2\n"
    )
    settings.write_text(settings.read_text().replace("* = host", f"{parts.path} = user={parts.username} host"))
    as_nobody = {"user": "nobody", "cwd": "/"} if os.geteuid() == 0 else {}
    for path in (tmp_path, *list(tmp_path.parents)[:3]):
        path.chmod(path.stat().st_mode | 0o055)
    process = subprocess.Popen([program, "-q", str(settings)], stderr=subprocess.DEVNULL, **as_nobody)
    time.sleep(0.5)
    assert process.poll() is None
    yield f"postgresql://{parts.username}@127.0.0.1:{port}/{parts.path}"
    process.terminate()
    process.wait()


async def test_behind_pgbouncer_everything_but_watching_works(bouncer: str, url: str) -> None:
    async with _emptied(bouncer, pgbouncer=True, pool_max=8) as driver:
        assert driver.capabilities.watch is None

        async def count_up(number: int) -> None:
            for _ in range(10):
                while True:
                    [entry] = await driver.get(["c:n"])
                    value = b"%d" % (1 + (int(entry.value) if entry else 0))
                    [outcome] = await driver.commit([batch(Put("c:n", value, entry.version if entry else ABSENT))])
                    if isinstance(outcome, Committed):
                        break
                await driver.commit([batch(Put(f"c:{number}", value))])
                assert (await driver.scan(f"c:{number}", None, limit=1, deref=""))[0].value == value

        await asyncio.gather(*(count_up(number) for number in range(8)))

        [entry] = await driver.get(["c:n"])
        assert entry is not None and entry.value == b"80"


# -- the agents' records -------------------------------------------------------------------------


async def test_a_turn_is_one_call_and_its_records_are_found(url: str) -> None:
    table = _table()
    async with kvpersist.open(f"{url}?kv.table={table}") as db:
        driver: Any = db.store.driver
        session = await db.sessions.create(user_id="ada", title="Late parcel")
        ask = Message("assistant", tool_calls=[ToolCallPart("c0", "track", {"parcel": 7})])
        await db.messages.append_many(session.id, [Message("user", "where?"), ask])
        counted = _Counted(driver)

        ask = Message("assistant", tool_calls=[ToolCallPart("c1", "track", {"parcel": 8})])
        await db.messages.append_many(session.id, [Message("user", "and this?"), ask])
        assert counted() == 1
        await db.messages.append(session.id, Message("tool", "in Oslo", tool_call_id="c1"))
        last = await db.messages.last(session.id, 50)
        sessions = await db.sessions.find(user_id="ada")
        calls = await db.tool_calls.find(name="track")

        assert [message.number for message in last] == [1, 2, 3, 4, 5]
        assert [found.id for found in sessions] == [session.id]
        assert {call.call_id: call.result for call in calls} == {"c0": None, "c1": "in Oslo"}
        await db.sessions.delete(session.id)
        assert await db.messages.last(session.id, 5) == []
    await _dropped(url, table)


async def test_concurrent_turns_of_two_processes_are_numbered_without_gaps(url: str) -> None:
    table = _table()
    where = f"{url}?kv.table={table}"
    async with kvpersist.open(where) as first, kvpersist.open(where) as second:
        session = (await first.sessions.create()).id

        await asyncio.gather(
            *(db.messages.append(session, Message("user", str(n))) for n in range(40) for db in (first, second))
        )

        assert [message.number for message in await first.messages.last(session, 100)] == list(range(1, 81))
        assert await first._all.messages.verify() == []
    await _dropped(url, table)
