"""The MySQL driver: the contract, the model, and what is its own. On a real MariaDB."""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import re
import ssl
import subprocess
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit, urlunsplit

import asyncmy
import pytest
from checked_puts import follow_what_they_checked
from mariadb_server import MariadbServer, missing
from proxy import Proxy

import kvpersist
from kvpersist import Message, ToolCallPart
from kvpersist.driver import ABSENT, Check, Committed, Delete, Entry, Put
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
from kvpersist_drivers.mysql import MysqlDriver, MysqlOptions
from kvpersist_drivers.mysql._connections import Link

_numbers = itertools.count()


def _table() -> str:
    return f"t{os.getpid()}_{next(_numbers)}"


@pytest.fixture
def url(service: Any) -> str:
    return service("mariadb")["KVPERSIST_TEST_MYSQL_URL"]


def _arguments(url: str) -> dict[str, Any]:
    parts = urlsplit(url)
    return {
        "host": parts.hostname,
        "port": parts.port,
        "user": parts.username,
        "password": parts.password,
        "database": parts.path[1:],
        "autocommit": True,
    }


async def _ask(url: str, sql: str, args: Any = None) -> tuple[tuple[Any, ...], ...]:
    """Run a statement around the driver."""
    async with asyncmy.connect(**_arguments(url)) as connection, connection.cursor() as cursor:
        await cursor.execute(sql, args)
        return tuple(await cursor.fetchall())


async def _peek(url: str, driver: MysqlDriver, key: str) -> bytes | None:
    rows = await _ask(url, f"SELECT value FROM {driver._options.table} WHERE k = %s", [key.encode()])
    return rows[0][0] if rows else None


@asynccontextmanager
async def _opened(url: str, **options: Any) -> AsyncIterator[MysqlDriver]:
    driver = await MysqlDriver.open(MysqlOptions(**{"url": url, "table": _table(), **options}))
    try:
        yield driver
    finally:
        await driver.close()
        if "table" not in options:
            await _ask(url, f"DROP TABLE {driver._options.table}")


@pytest.fixture(scope="module")
def certificate() -> Iterator[Path]:
    """Of a server called localhost, with its key beside it, where the server's user can read them."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
        command += ["-keyout", f"{folder}/key", "-out", f"{folder}/cert", "-days", "2", "-subj", "/CN=localhost"]
        subprocess.run([*command, "-addext", "subjectAltName=DNS:localhost"], check=True, capture_output=True)
        (folder / "key").chmod(0o644)
        yield folder / "cert"


@pytest.fixture(scope="module")
def own_server(certificate: Path) -> Iterator[MariadbServer]:
    """A server that a test may restart, with TLS, small packets and few connections."""
    if reason := missing():
        pytest.skip(reason)
    tls = [f"--ssl-cert={certificate}", f"--ssl-key={certificate.with_name('key')}"]
    with MariadbServer("--max-allowed-packet=1M", "--max-connections=30", *tls) as server:
        yield server


@asynccontextmanager
async def _user(server: MariadbServer, password: str, grant: str, limits: str = "") -> AsyncIterator[str]:
    """The URL of a user who may do what ``grant`` says."""
    await _ask(server.url, f"CREATE OR REPLACE USER other@'127.0.0.1' IDENTIFIED BY %s {limits}", [password])
    await _ask(server.url, f"GRANT {grant} TO other@'127.0.0.1'")
    try:
        yield f"mysql://other:{quote(password, safe='')}@{server.url.rpartition('@')[2]}"
    finally:
        await _ask(server.url, "DROP USER other@'127.0.0.1'")


@pytest.fixture
async def driver(url: str) -> AsyncIterator[MysqlDriver]:
    async with _opened(url) as driver:
        yield driver


class TestMysql(DriverContract[MysqlDriver]):
    @pytest.fixture
    async def driver(self, url: str) -> AsyncIterator[MysqlDriver]:
        self._url = url
        async with _opened(url) as driver:
            yield driver

    async def peek(self, driver: MysqlDriver, key: str) -> bytes | None:
        return await _peek(self._url, driver, key)

    async def reopen(self, driver: MysqlDriver) -> MysqlDriver:
        return await MysqlDriver.open(MysqlOptions(url=self._url, table=driver._options.table, auto_create=False))


class TestMysqlOverAPool(DriverContract[MysqlDriver]):
    """Of a caller whose sessions are set up otherwise than ours."""

    @pytest.fixture
    async def driver(self, url: str) -> AsyncIterator[MysqlDriver]:
        self._url = url
        settings = "SET SESSION sql_mode='ANSI,NO_BACKSLASH_ESCAPES', tx_isolation='SERIALIZABLE'"
        arguments = {**_arguments(url), "autocommit": False, "charset": "latin1", "init_command": settings}
        async with asyncmy.create_pool(minsize=1, maxsize=5, **arguments) as pool:
            driver = await MysqlDriver.over(pool, table=_table())
            yield driver
            await driver.close()
            assert pool.size == pool.freesize
        await _ask(url, f"DROP TABLE {driver._options.table}")

    async def peek(self, driver: MysqlDriver, key: str) -> bytes | None:
        return await _peek(self._url, driver, key)


class TestMysqlModel:
    def test_the_driver_does_what_a_dict_does(self, url: str) -> None:
        from hypothesis.stateful import run_state_machine_as_test

        table = _table()

        async def open_new() -> MysqlDriver:
            driver = await MysqlDriver.open(MysqlOptions(url=url, table=table))
            await _ask(url, f"TRUNCATE TABLE {table}")
            return driver

        async def open_again(closed: MysqlDriver) -> MysqlDriver:
            return await MysqlDriver.open(MysqlOptions(url=url, table=closed._options.table))

        machine = driver_machine(open_new, reopener=open_again)
        run_state_machine_as_test(machine, settings=machine.TestCase.settings)
        asyncio.run(_ask(url, f"DROP TABLE {table}"))


# -- what is sent --------------------------------------------------------------------------------


_OLD, _NEW = b"versold!", b"versnew!"


def _spied(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Everything that is sent from now on."""
    sent: list[str] = []
    call = Link.call

    async def told(self: Link, sql: str, **options: Any) -> Any:
        sent.append(sql)
        return await call(self, sql, **options)

    monkeypatch.setattr(Link, "call", told)
    return sent


async def test_sixty_four_batches_of_one_key_are_one_statement(
    driver: MysqlDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent = _spied(monkeypatch)
    before = driver._connections.calls

    await driver.commit([batch(Put(f"c:{number}", b"v")) for number in range(64)])

    assert driver._connections.calls == before + 1
    assert len(sent) == 1
    assert sent[0].startswith("INSERT INTO")
    assert ";" not in sent[0]


async def test_puts_with_checks_are_one_statement_where_the_checks_hold(
    driver: MysqlDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    await driver.commit([batch(Put("c:held", b"v"), Put("c:too", b"v"), version=_OLD)])
    checks = [Check("c:held", _OLD), Check("c:too", _OLD)]
    sent = _spied(monkeypatch)

    outcomes = await driver.commit([batch(checks[n % 2], Put(f"c:{n}", b"v")) for n in range(64)])
    one = list(sent)
    wrong = await driver.commit([batch(Check("c:too", _NEW), Put("c:a", b"v")), batch(checks[0], Put("c:b", b"v"))])

    assert {type(outcome) for outcome in outcomes} == {Committed}
    assert len(one) == 1
    assert ";" not in one[0]
    assert [type(outcome) for outcome in wrong] == [Conflict, Committed]
    assert len(sent) - len(one) <= 3
    assert [entry is not None for entry in await driver.get(["c:a", "c:b", "c:0", "c:63"])] == [False, True, True, True]


@pytest.mark.parametrize(
    ("change", "outcomes"),
    [
        ("UPDATE {t} SET version = %s WHERE k = 'c:held'", {_OLD: Conflict, _NEW: Committed}),
        ("DELETE FROM {t} WHERE k = 'c:held' AND version <> %s", {_OLD: Conflict}),
        ("UPDATE {t} SET value = %s WHERE k = 'c:held'", {_OLD: Committed, _NEW: Conflict}),
    ],
    ids=["updated", "deleted", "the same version"],
)
async def test_a_put_that_waits_for_another_writer_is_judged_by_what_that_one_left(
    url: str, driver: MysqlDriver, change: str, outcomes: dict[bytes, type]
) -> None:
    await driver.commit([batch(Put("c:held", b"v"), version=_OLD)])
    async with asyncmy.connect(**_arguments(url)) as writer, writer.cursor() as cursor:
        await writer.begin()
        await cursor.execute(change.format(t=driver._options.table), [_NEW])
        puts = [
            asyncio.create_task(driver.commit([batch(Check("c:held", version), Put(f"c:{version.decode()}", b"p"))]))
            for version in outcomes
        ]
        _, early = await asyncio.wait(puts, timeout=0.2)
        await writer.commit()

    answers = [outcome for put in puts for outcome in await put]
    assert len(early) == len(puts)  # they waited
    assert [type(answer) for answer in answers] == list(outcomes.values())
    stored = await driver.get([f"c:{version.decode()}" for version in outcomes])
    assert [entry is not None for entry in stored] == [kind is Committed for kind in outcomes.values()]


async def test_a_put_never_lands_behind_a_change_of_what_it_checked(url: str, driver: MysqlDriver) -> None:
    await follow_what_they_checked(driver, lambda: _opened(url, table=driver._options.table))


async def test_a_thousand_keys_are_one_call(driver: MysqlDriver) -> None:
    keys = [f"n{number % 40}:{number}" for number in range(1000)]
    await driver.commit([batch(Put(key, key.encode())) for key in keys])
    before = driver._connections.calls

    entries = await driver.get(keys)

    assert [entry and entry.value for entry in entries] == [key.encode() for key in keys]
    assert driver._connections.calls == before + 1


async def test_a_scan_of_a_page_with_targets_is_one_call(driver: MysqlDriver) -> None:
    await driver.commit([batch(Put(f"c:r:{n:04}", b"%d" % n), Put(f"c:r#i:{n:04}", b"%04d" % n)) for n in range(1200)])
    before = driver._connections.calls

    found = await driver.scan("c:r#i:", "c:r#i;", limit=1000, deref="c:r:")

    assert [entry.target and entry.target.value for entry in found] == [b"%d" % n for n in range(1000)]
    assert driver._connections.calls == before + 1
    assert len(await driver.scan("c:", "c;", limit=9999)) == 2400
    assert driver._connections.calls == before + 4


async def test_conditions_that_hold_cost_one_call_and_those_that_do_not_a_second(driver: MysqlDriver) -> None:
    one = batch(Put("c:a", b"1", ABSENT))
    await driver.commit([one])
    before = driver._connections.calls

    held = [
        batch(Check("c:a", one.version), Put("c:b", b"1", ABSENT), Check("c:none", ABSENT), Delete("c:z")),
        *(batch(Put(f"c:{number}", b"v", ABSENT), Check("c:a", one.version)) for number in range(62)),
        batch(Put("c:a", b"2", one.version)),
    ]
    assert all(isinstance(outcome, Committed) for outcome in await driver.commit(held))
    first = driver._connections.calls
    lost = await driver.commit([batch(Put("c:a", b"3", one.version)), batch(Put("c:new", b"3", ABSENT))])
    second = driver._connections.calls
    against = await driver.commit([batch(Put("c:y", b"4", ABSENT)), batch(Put("c:y", b"5", ABSENT))])

    assert (first - before, second - first, driver._connections.calls - second) == (1, 2, 2)
    assert [type(outcome) for outcome in (*lost, *against)] == [Conflict, Committed, Committed, Conflict]
    entries = await driver.get(["c:a", "c:new", "c:y", "c:none"])
    assert [entry and entry.value for entry in entries] == [b"2", b"3", b"4", None]


async def test_nothing_is_left_of_a_key_that_was_only_expected_to_be_absent(url: str, driver: MysqlDriver) -> None:
    await driver.commit([batch(Put("c:a", b"1"))])
    await driver.commit([batch(Check("c:b", ABSENT), Put("c:c", b"1"))])
    await driver.commit([batch(Put("c:d", b"1", ABSENT), Check("c:a", ABSENT)), batch(Put("c:e", b"1", ABSENT))])
    await driver.commit([batch(Delete("c:f", b"otherone"))])

    rows = await _ask(url, f"SELECT k FROM {driver._options.table} ORDER BY k")
    assert [key for [key] in rows] == [b"c:a", b"c:c", b"c:e"]


async def test_a_store_joins_what_is_concurrent(driver: MysqlDriver) -> None:
    async with kvpersist.open_store(driver) as store:
        await store.put("c:warm", 1)
        before = driver._connections.calls

        await asyncio.gather(*(store.put(f"c:{number}", number) for number in range(64)))
        written = driver._connections.calls
        assert await asyncio.gather(*(store.get(f"c:{number}") for number in range(64))) == list(range(64))

        assert (written - before, driver._connections.calls - written) == (1, 1)


_HOSTILE = (
    *(
        "'",
        "''",
        "\\'",
        "\\",
        "\\\\'",
        "`",
        '"',
        "%",
        "%s",
        "%(a)s",
        "%%",
        "a%'b",
        "\x00'",
        "\x00",
        "\x1a",
        ";",
        "--",
        "/*",
        "*/",
    ),
    *(
        "'; DROP TABLE kvpersist; --",
        "x'61'",
        "0x61",
        "\u02bc",
        "\uff07",
        "\U0001f600'",
        "\u00bf'",
        "\u00bf\\",
        "{",
        "?",
        ":a",
    ),
)


@pytest.mark.parametrize("mode", ["", "NO_BACKSLASH_ESCAPES,ANSI_QUOTES"])
async def test_no_byte_of_a_caller_s_stands_in_a_statement_but_as_hexadecimal_digits(
    driver: MysqlDriver, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    async with driver._connections.lease() as link:
        await link.call(f"SET SESSION sql_mode='{mode}'")  # the only connection so far, so that of all calls below
    sent = _spied(monkeypatch)
    keys = list(dict.fromkeys((*_HOSTILE, *AWKWARD_KEYS)))
    stored = {key: key.encode() + b"\xff\xfe'\\\xf0\x9f'\xc3'" + bytes(range(256)) for key in keys}

    outcomes = await driver.commit([batch(Put(key, value, ABSENT)) for key, value in stored.items()])
    entries = await driver.get(keys)
    found = [await driver.scan(key, key + "\0", limit=9, deref=key) for key in _HOSTILE]
    versions = {entry.key: entry.version for entry in entries if entry}
    await driver.commit([batch(Put(key, value, versions[key])) for key, value in stored.items()])
    await driver.commit([batch(Delete(key)) for key in _HOSTILE])

    assert all(isinstance(outcome, Committed) for outcome in outcomes)
    assert [entry and (entry.key, entry.value) for entry in entries] == list(stored.items())
    assert [[entry.key for entry in page] for page in found] == [[key] for key in _HOSTILE]
    left = await driver.scan(None, None, limit=1000)
    assert [(e.key, e.value) for e in left] == sorted(
        ((k, v) for k, v in stored.items() if k not in _HOSTILE), key=lambda item: item[0].encode()
    )
    table = driver._options.table
    for sql in sent:
        without_literals = re.sub(r"x'[0-9a-f]*'", "?", sql)
        assert re.fullmatch(r"[A-Za-z0-9_`?(),;.=<>* ]+", without_literals.replace(table, "t")), without_literals


async def test_every_byte_of_a_key_counts_for_the_server_too(url: str, driver: MysqlDriver) -> None:
    keys = [
        "a",
        "a ",
        "a  ",
        "a\0",
        "a\0\0",
        "a\0 ",
        "A",
        "A ",
        "\u00e4",
        "a\u0308",
        "\u00e4 ",
        " a",
        "\0a",
        "ss",
        "\u00df",
    ]

    outcomes = await driver.commit([batch(Put(key, key.encode(), ABSENT)) for key in keys])

    assert all(isinstance(outcome, Committed) for outcome in outcomes)
    rows = await _ask(url, f"SELECT k, value FROM {driver._options.table} ORDER BY k")
    assert [tuple(row) for row in rows] == [(key, key) for key in sorted(key.encode() for key in keys)]


async def test_a_key_is_kept_up_to_its_limit_whatever_its_end(driver: MysqlDriver) -> None:
    keys = ["k" * 766 + last for last in ("k", " ", "\0")]
    await driver.commit([batch(Put(key, key.encode(), ABSENT)) for key in keys])
    [refused] = await driver.commit([batch(Put(keys[1] + " ", b"v"))])

    assert [entry.key for entry in await driver.scan(None, None, limit=9)] == sorted(keys)
    assert isinstance(refused, KeyTooLong)
    assert await driver.get([keys[1] + " ", "k" * 9000]) == [None, None]


async def test_a_target_longer_than_any_key_is_none(driver: MysqlDriver) -> None:
    await driver.commit([batch(Put("r:" + "x" * 765, b"one"), Put("i:a", b"x" * 765), Put("i:b", b"x" * 766))])
    await driver.commit([batch(Put("i:c", b"x" * 70_000), Put("i:d", b"\xff"))])

    found = await driver.scan("i:", "i;", limit=9, deref="r:")

    assert [entry.target and entry.target.value for entry in found] == [b"one", None, None, None]


# -- what is refused -----------------------------------------------------------------------------


async def test_a_batch_that_cannot_be_kept_fails_alone(driver: MysqlDriver) -> None:
    limit = driver.capabilities.max_value_bytes or 0
    outcomes = await driver.commit(
        [
            *(batch(Put("c:a", b"1")), batch(Put("c:\ud800", b"2")), batch(Put("c:b", b"3"), Put("k" * 768, b"3"))),
            *(batch(), batch(Put("c:n", b"4", expires_at=float("nan"))), batch(Put("c:v", b"5", b"short"))),
            *(batch(Check("c:a", ABSENT), Put("c:c", b"6")), batch(Put("c:d", b"7"))),
            batch(Put("c:e", bytes(limit + 1))),
        ]
    )

    kinds = [Committed, BadKey, KeyTooLong, Committed, BadRequest, BadRequest, Conflict, Committed, ValueTooLarge]
    assert [type(outcome) for outcome in outcomes] == kinds
    assert [entry.key for entry in await driver.scan(None, None, limit=9)] == ["c:a", "c:d"]
    with pytest.raises(BadKey):
        await driver.get(["c:\ud800"])
    with pytest.raises(BadKey):
        await driver.scan("c:\ud800", "c;", limit=1)


async def test_a_batch_larger_than_the_server_s_packets_is_still_atomic(own_server: MariadbServer) -> None:
    async with _opened(own_server.url) as driver:
        limit = driver.capabilities.max_value_bytes or 0
        assert 400_000 < limit < 1 << 19
        values = {f"c:{number}": os.urandom(limit - number) for number in range(6)}
        before = driver._connections.calls

        [kept] = await driver.commit([batch(*(Put(key, value, ABSENT) for key, value in values.items()))])
        calls = driver._connections.calls - before
        outcomes = await driver.commit(
            [
                batch(*(Put(key, b"x", ABSENT) for key in values), Put("c:new", values["c:0"])),
                batch(Put("c:plain", values["c:1"]), Put("c:other", values["c:2"])),
            ]
        )
        entries = await driver.get([*values, "c:new", "c:plain", "c:other"])

        assert isinstance(kept, Committed)
        assert calls == 6
        assert [type(outcome) for outcome in outcomes] == [Conflict, Committed]
        expected = [*values.values(), None, values["c:1"], values["c:2"]]
        assert [entry and entry.value for entry in entries] == expected


async def test_ten_thousand_operations_are_one_batch(own_server: MariadbServer) -> None:
    async with _opened(own_server.url) as driver:
        [outcome] = await driver.commit([batch(*(Put(f"c:{n:05}", b"v" * 200, ABSENT) for n in range(10_000)))])
        found = await driver.scan("c:", "c;", limit=20_000, keys_only=True)
        keys = [entry.key for entry in found]

        assert isinstance(outcome, Committed)
        assert keys == [f"c:{n:05}" for n in range(10_000)]
        assert [entry.key for entry in await driver.scan("c:", "c;", limit=20_000, reverse=True)] == keys[::-1]
        assert all(await driver.get(keys))


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"password": "canary"}, BadOption, "refuses this user or password"),
        ({"username": "nobody", "password": "canary"}, BadOption, "refuses this user or password"),
        ({"path": "/nowhere"}, BadOption, "Unknown database"),
        ({"path": ""}, BadOption, "one database"),
        ({"path": "/a/b"}, BadOption, "one database"),
        ({"port": 1}, Unavailable, "127.0.0.1:1/kvpersist"),
        ({"query": "charset=latin1"}, BadOption, "leave it out"),
        ({"query": "nonsense=1"}, BadOption, "unix_socket"),
        ({"query": "ssl_key=/nowhere"}, BadOption, "ssl_cert"),
        ({"query": "ssl_ca=/nowhere"}, BadOption, "cannot be used"),
        ({"query": "kv.ssl=require"}, Unavailable, "nothing was changed"),
        ({"query": "kv.ssl=perhaps"}, BadOption, "verify-full"),
        ({"query": "kv.table=a-b"}, BadOption, "table name"),
        ({"query": "kv.table=a`b"}, BadOption, "table name"),
        ({"query": "kv.tabel=a"}, BadOption, "kv.table"),
        ({"host": "a,b"}, Unsupported, "one"),
    ],
)
async def test_an_open_that_fails_says_why_and_shows_no_password(
    url: str, change: dict[str, Any], error: type[KvError], text: str
) -> None:
    parts = urlsplit(url)
    user = f"{change.get('username', parts.username)}:{change.get('password', parts.password)}"
    place = f"{change.get('host', parts.hostname)}:{change.get('port', parts.port)}"
    changed = parts._replace(
        netloc=f"{user}@{place}", path=change.get("path", parts.path), query=change.get("query", "")
    )

    with pytest.raises(error, match=text) as told:
        await kvpersist.open_store(urlunsplit(changed))

    assert "canary" not in str(told.value)


def test_options_show_no_password() -> None:
    shown = [
        MysqlOptions(url="mysql://ada:canary@db/app?password=canary"),
        MysqlOptions(host="db", username="ada", password="canary", database="app"),
    ]

    assert "canary" not in repr(shown)


async def test_pieces_and_a_mapping_lead_to_the_same_store(url: str, driver: MysqlDriver) -> None:
    parts = urlsplit(url)
    place = {"host": parts.hostname, "port": parts.port, "database": parts.path[1:]}
    who = {"username": parts.username, "password": parts.password, "table": driver._options.table}
    async with kvpersist.open_store(driver) as store:
        await store.put("c:a", 1)

    async with kvpersist.open_store({"type": "mariadb", **place, **who}) as store:
        assert await store.get("c:a") == 1
    for wrong in ({}, {"url": url, "host": "localhost", "database": "x"}, {"host": "localhost"}):
        with pytest.raises(BadOption):
            await MysqlDriver.open(MysqlOptions(**wrong))
    with pytest.raises(BadOption, match="create_pool"):
        await MysqlDriver.over(object())  # pyright: ignore[reportArgumentType]


async def test_a_password_of_any_letters_is_accepted(own_server: MariadbServer) -> None:
    password = "p\u00e4\u00df\U0001f600@:/'%"
    table = _table()
    async with _user(own_server, password, "ALL ON kvpersist.*") as place, _opened(place, table=table) as driver:
        await driver.ping()
    await _ask(own_server.url, f"DROP TABLE {table}")


# -- the table -----------------------------------------------------------------------------------


async def test_sixteen_who_open_a_new_store_at_once_all_get_it(url: str) -> None:
    table = _table()
    drivers = await asyncio.gather(*(MysqlDriver.open(MysqlOptions(url=url, table=table)) for _ in range(16)))

    await asyncio.gather(*(one.commit([batch(Put(f"c:{n}", b"v"))]) for n, one in enumerate(drivers)))

    assert len(await drivers[0].scan(None, None, limit=99)) == 16
    await asyncio.gather(*(one.close() for one in drivers))
    await _ask(url, f"DROP TABLE {table}")


async def test_a_missing_table_is_named_with_the_commands_that_make_it(url: str) -> None:
    table = _table()
    with pytest.raises(
        FormatMismatch, match=r"`kvpersist init 'mysql://kvpersist:\*\*\*@.*kv.table=.*kvpersist ddl"
    ) as told:
        await MysqlDriver.open(MysqlOptions(url=url, table=table, auto_create=False))
    assert told.value.found == "nothing"

    await _ask(url, MysqlDriver.ddl_of(MysqlOptions(url=url, table=table)))

    async with _opened(url, table=table, auto_create=False) as driver:
        await driver.provision()
        assert driver.ddl() == MysqlDriver.ddl_of(MysqlOptions(table=table))
        assert await driver.scan(None, None, limit=1) == []
    await _ask(url, f"DROP TABLE {table}")


@pytest.mark.parametrize(
    "columns",
    [
        "(id INT)",
        "(k VARCHAR(191) PRIMARY KEY, version BINARY(8), expires BIGINT, value LONGBLOB)",
        "(k VARBINARY(767) PRIMARY KEY, version BINARY(8), expires BIGINT, value LONGBLOB) ENGINE=MyISAM",
    ],
)
async def test_a_table_of_another_kind_is_refused_and_left_alone(url: str, columns: str) -> None:
    table = _table()
    await _ask(url, f"CREATE TABLE {table} {columns}")
    before = await _ask(url, f"SHOW CREATE TABLE {table}")

    with pytest.raises(FormatMismatch, match=table):
        await MysqlDriver.open(MysqlOptions(url=url, table=table))

    assert await _ask(url, f"SHOW CREATE TABLE {table}") == before
    await _ask(url, f"DROP TABLE {table}")


async def test_a_user_who_may_only_read_reads(own_server: MariadbServer) -> None:
    async with _opened(own_server.url) as driver:
        await driver.commit([batch(Put("c:a", b"1"))])
        table = driver._options.table
        async with _user(own_server, "reader", f"SELECT ON {table}") as place:
            async with _opened(place, table=table) as reader:
                assert [entry and entry.value for entry in await reader.get(["c:a"])] == [b"1"]
                for ops in ([Put("c:a", b"2")], [Put("c:b", b"2", ABSENT)], [Delete("c:a")]):
                    with pytest.raises(ReadOnly, match="denied"):
                        await reader.commit([batch(*ops)])
                assert [entry.value for entry in await reader.scan(None, None, limit=9)] == [b"1"]
                assert reader._connections.size == 1
            with pytest.raises(ReadOnly):
                await MysqlDriver.open(MysqlOptions(url=place, table="new_table"))


async def test_a_server_that_only_reads_refuses_to_write(own_server: MariadbServer) -> None:
    async with _user(own_server, "plain", "ALL ON kvpersist.*") as place, _opened(place) as driver:
        await driver.commit([batch(Put("c:a", b"1"))])
        await _ask(own_server.url, "SET GLOBAL read_only=1")
        try:
            with pytest.raises(ReadOnly, match="read-only"):
                await driver.commit([batch(Put("c:a", b"2"))])
            with pytest.raises(ReadOnly, match="read-only"):
                await driver.commit([batch(Put("c:b", b"2", ABSENT))])
            assert [entry and entry.value for entry in await driver.get(["c:a", "c:b"])] == [b"1", None]
        finally:
            await _ask(own_server.url, "SET GLOBAL read_only=0")
        assert isinstance((await driver.commit([batch(Put("c:a", b"2"))]))[0], Committed)


async def test_what_was_probed_is_claimed(url: str, own_server: MariadbServer) -> None:
    async with _opened(url) as driver:
        assert re.fullmatch(r"MariaDB 1\d\.\d+\.\d+", driver.capabilities.server)
        assert driver.capabilities.durable
    await _ask(own_server.url, "SET GLOBAL innodb_flush_log_at_trx_commit=2")
    try:
        async with _opened(own_server.url) as driver:
            assert not driver.capabilities.durable
    finally:
        await _ask(own_server.url, "SET GLOBAL innodb_flush_log_at_trx_commit=1")


async def test_tls_is_used_as_asked_for(own_server: MariadbServer, certificate: Path) -> None:
    place = own_server.url.replace("127.0.0.1", "localhost")
    await _ask(own_server.url, "CREATE OR REPLACE USER kvpersist@localhost IDENTIFIED BY 'kvpersist'")
    await _ask(own_server.url, "GRANT ALL ON *.* TO kvpersist@localhost")
    ca = f"ssl_ca={certificate}"
    for query, options in (
        ("", {"ssl": "require"}),
        (ca, {}),
        (ca, {"ssl": "verify-ca"}),
        ("", {"ssl": ssl.create_default_context(cafile=certificate)}),
    ):
        async with _opened(f"{place}?{query}", **options) as driver:
            async with driver._connections.lease() as link:
                [answer] = await link.call("SHOW STATUS LIKE 'Ssl_cipher'")
            assert answer.rows[0][1], (query, options)
            await driver.commit([batch(Put("c:a", os.urandom(300_000)))])
            assert (await driver.get(["c:a"]))[0] is not None

    with pytest.raises(BadOption, match="certificate"):
        await MysqlDriver.open(MysqlOptions(url=place, ssl=True))
    with pytest.raises(BadOption, match="certificate"):
        await MysqlDriver.open(MysqlOptions(url=f"{own_server.url}?{ca}"))  # a certificate of another name
    with pytest.raises(BadOption, match="plain"):
        await MysqlDriver.open(MysqlOptions(url=f"{place}?{ca}", ssl=False))


# -- many at once --------------------------------------------------------------------------------


async def test_two_batches_that_expect_each_other_s_key_to_be_absent_are_never_both_done(url: str) -> None:
    table = _table()
    async with _opened(url, table=table) as one, _opened(url, table=table) as two:
        for number in range(40):
            a, b = f"c:{number}a", f"c:{number}b"
            answers = await asyncio.gather(
                one.commit([batch(Check(a, ABSENT), Put(b, b"1"))]), two.commit([batch(Put(a, b"1"), Check(b, ABSENT))])
            )
            kinds = sorted(type(outcome).__name__ for [outcome] in answers)
            assert kinds == ["Committed", "Conflict"]
    await _ask(url, f"DROP TABLE {table}")


async def test_commits_in_every_order_of_the_same_keys_hardly_ever_deadlock_and_all_end_well(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    table, keys = _table(), [f"c:{number}" for number in range(12)]
    chance = random.Random(3)
    refused: list[int] = []
    call = Link.call

    async def told(self: Link, sql: str, **options: Any) -> Any:
        try:
            return await call(self, sql, **options)
        except asyncmy.errors.Error as error:
            refused.append(error.args[0])
            raise

    monkeypatch.setattr(Link, "call", told)
    async with _opened(url, table=table) as one, _opened(url, table=table) as two:

        async def work(driver: MysqlDriver) -> None:
            for _ in range(25):
                some = chance.sample(keys, 6)
                ops = [Delete(key) if chance.random() < 0.3 else Put(key, b"v") for key in some]
                checks = [Check(key, ABSENT) for key in set(keys) - set(some)][: chance.randrange(3)]
                [outcome] = await driver.commit([batch(*checks, *ops)])
                assert isinstance(outcome, Committed | Conflict)

        await asyncio.gather(*(work(driver) for driver in (one, two) for _ in range(4)))

        assert len(await one.scan(None, None, limit=99)) <= 12
        assert set(refused) <= {1213, 1242}  # 1242: a condition that did not hold
        assert refused.count(1213) < 20  # of 200 commits; some hundred where a statement locks what it need not
    await _ask(url, f"DROP TABLE {table}")


async def test_a_lock_that_somebody_else_holds_is_waited_for_and_then_given_up(url: str, driver: MysqlDriver) -> None:
    await driver.commit([batch(Put("c:a", b"1"))])
    async with asyncmy.connect(**_arguments(url)) as other:
        await other.begin()
        await other.query(f"UPDATE {driver._options.table} SET value='x' WHERE k='c:a'")
        waiting = asyncio.ensure_future(driver.commit([batch(Put("c:a", b"2"), Check("c:b", ABSENT))]))
        given_up = asyncio.ensure_future(driver.commit([batch(Put("c:a", b"3"))]))
        done, _ = await asyncio.wait({given_up}, timeout=30)

        assert done
        with pytest.raises(Unavailable, match=r"[Ll]ock wait timeout"):
            given_up.result()
        await other.rollback()
        outcomes = await asyncio.gather(waiting, return_exceptions=True)

    assert isinstance(outcomes[0], list | Unavailable)
    [entry] = await driver.get(["c:a"])
    assert entry is not None
    assert entry.value == (b"2" if isinstance(outcomes[0], list) else b"1")
    assert driver._connections.in_use == 0


# -- connections ---------------------------------------------------------------------------------


async def test_no_more_connections_are_made_than_allowed_and_idle_ones_are_closed(url: str) -> None:
    async with _opened(url, pool_max=3, pool_idle=0.2) as driver:
        await driver.commit([batch(Put(f"c:{number}", b"v")) for number in range(50)])

        answers = await asyncio.gather(*(driver.scan("c:", "c;", limit=50) for _ in range(40)))

        assert [len(found) for found in answers] == [50] * 40
        assert 1 < driver._connections.size <= 3
        async with asyncio.timeout(5):
            while driver._connections.size:
                await asyncio.sleep(0.02)
        assert len(await driver.scan("c:", "c;", limit=50)) == 50


async def test_who_finds_no_free_connection_in_time_is_told_so(url: str) -> None:
    async with _opened(url, pool_max=2, connect_timeout=0.3) as driver:
        async with driver._connections.lease(), driver._connections.lease():
            with pytest.raises(PoolExhausted) as told:
                await driver.get(["c:a"])

        assert (told.value.size, told.value.in_use) == (2, 2)
        assert await driver.get(["c:a"]) == [None]


async def test_a_ready_pool_that_is_all_in_use_is_told_apart(url: str) -> None:
    async with asyncmy.create_pool(minsize=0, maxsize=2, **_arguments(url)) as pool:
        driver = await MysqlDriver.over(pool, table=_table(), connect_timeout=0.3)
        async with pool.acquire(), driver._connections.lease():
            with pytest.raises(PoolExhausted):
                await driver.get(["c:a"])
        await driver.provision()
        await driver.close()
        assert pool.size == pool.freesize
        async with pool.acquire() as connection, connection.cursor() as cursor:
            await cursor.execute(f"DROP TABLE {driver._options.table}")
        with pytest.raises(StoreClosed):
            await driver.get(["c:a"])


async def test_a_full_server_is_told_apart_from_one_that_is_not_there(own_server: MariadbServer) -> None:
    others = [await asyncmy.connect(**_arguments(own_server.url)) for _ in range(31)]  # one more: has SUPER
    try:
        with pytest.raises(TooManyClients, match="Too many connections"):
            await MysqlDriver.open(MysqlOptions(url=own_server.url))
    finally:
        for other in others:
            await other.ensure_closed()


async def test_a_user_with_too_many_connections_is_told_so(own_server: MariadbServer) -> None:
    async with _user(own_server, "few", "ALL ON kvpersist.*", "WITH MAX_USER_CONNECTIONS 1") as place:
        table = _table()
        async with _opened(place, table=table) as driver:
            with pytest.raises(TooManyClients):
                await MysqlDriver.open(MysqlOptions(url=place))
            async with driver._connections.lease():
                with pytest.raises(TooManyClients, match="max_user_connections"):
                    await driver.get(["c:a"])
            assert await driver.get(["c:a"]) == [None]
            assert (driver._connections.in_use, driver._connections.size) == (0, 1)
        await _ask(own_server.url, f"DROP TABLE {table}")


async def test_a_storm_of_cancelled_calls_mixes_up_no_answers(url: str, driver: MysqlDriver) -> None:
    keys = [f"c:{number:03}" for number in range(100)]
    await driver.commit([batch(Put(key, key.encode())) for key in keys])
    chance = random.Random(7)
    wrong: list[Any] = []
    cancelled = answered = 0

    async def ask(key: str) -> None:
        nonlocal answered
        match chance.randrange(3):
            case 0:
                found = await driver.get([key])
                wrong.extend(entry for entry in found if entry is None or entry.value != key.encode())
            case 1:
                found = await driver.scan(key, key + "\x00", limit=3)
                wrong.extend(entry for entry in found if (entry.key, entry.value) != (key, key.encode()))
                wrong.extend([key] * (len(found) != 1))
            case _:
                condition = Check(f"d:{key}", ABSENT)
                one = batch(Put(key, key.encode()), *([condition] * chance.randrange(2)))
                outcome = await driver.commit([one])
                wrong.extend([outcome] * (outcome != [Committed(one.version)]))
        answered += 1

    async def later(task: asyncio.Task[None], delay: float) -> None:
        await asyncio.sleep(delay)
        task.cancel()

    while cancelled < 200 or answered < 200:
        tasks = [asyncio.create_task(ask(chance.choice(keys))) for _ in range(32)]
        stops = [asyncio.create_task(later(task, chance.random() * 0.03)) for task in tasks]
        answers = await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.gather(*stops)
        cancelled += sum(isinstance(answer, asyncio.CancelledError) for answer in answers)
        assert all(answer is None or isinstance(answer, asyncio.CancelledError) for answer in answers), answers

    assert wrong == []
    assert driver._connections.in_use == 0
    assert driver._connections.size <= 10
    assert driver._connections._free._value == 10
    assert [entry and entry.value for entry in await driver.get(keys)] == [key.encode() for key in keys]
    await driver.close()
    async with asyncio.timeout(10):  # the server ends what was cancelled when it gets to it
        while await _ask(
            url, "SELECT 1 FROM information_schema.processlist WHERE info LIKE %s", [f"%{driver._options.table}\\`%"]
        ):
            await asyncio.sleep(0.02)


# -- failures ------------------------------------------------------------------------------------


async def test_a_connection_killed_in_the_middle_of_a_call_is_not_used_again(url: str, driver: MysqlDriver) -> None:
    await driver.commit([batch(Put("c:a", b"1"))])
    table = driver._options.table
    async with asyncmy.connect(**_arguments(url)) as other:

        async def kill(call: asyncio.Future[Any], how: str) -> KvError:
            rows: tuple[Any, ...] = ()
            async with other.cursor() as cursor, asyncio.timeout(10):
                while not rows:
                    await cursor.execute(
                        "SELECT id FROM information_schema.processlist WHERE info LIKE %s AND id != CONNECTION_ID()",
                        [f"%`{table}`%"],
                    )
                    rows = tuple(await cursor.fetchall())
                await cursor.execute(f"KILL {how} {rows[0][0]}")
            with pytest.raises(KvError) as told:
                await call
            return told.value

        await other.begin()
        await other.query(f"UPDATE {table} SET value='x' WHERE k='c:a'")
        lone = await kill(asyncio.ensure_future(driver.commit([batch(Put("c:a", b"2"))])), "CONNECTION")
        some = batch(Put("c:a", b"2"), Put("c:b", b"2", ABSENT))
        several = await kill(asyncio.ensure_future(driver.commit([some])), "CONNECTION")
        query = await kill(asyncio.ensure_future(driver.commit([some])), "QUERY")
        await other.rollback()

    assert isinstance(lone, CommitUnknown)
    assert isinstance(several, CommitUnknown)
    assert several.keys == ("c:a", "c:b")
    assert type(query) is Unavailable
    assert [entry and entry.value for entry in await driver.get(["c:a", "c:b"])] == [b"1", None]
    assert driver._connections.in_use == 0


async def test_a_restart_between_two_calls_is_not_noticed(own_server: MariadbServer) -> None:
    async with _opened(own_server.url) as driver:
        await driver.commit([batch(Put("c:a", b"1"))])

        own_server.restart()  # meanwhile the loop does not run

        assert [entry and entry.value for entry in await driver.get(["c:a"])] == [b"1"]
        await asyncio.to_thread(own_server.restart)
        assert isinstance((await driver.commit([batch(Put("c:b", b"2"))]))[0], Committed)


async def test_a_server_that_goes_and_comes_back_is_used_again(own_server: MariadbServer) -> None:
    async with _opened(own_server.url) as driver:
        await driver.commit([batch(Put("c:a", b"1"))])

        own_server.stop()
        for _ in range(3):
            with pytest.raises(Unavailable):
                await driver.get(["c:a"])
            with pytest.raises(Unavailable):  # nothing was sent, so it is no CommitUnknown
                await driver.commit([batch(Put("c:b", b"2"))])
        own_server.start()

        assert [entry and entry.value for entry in await driver.get(["c:a", "c:b"])] == [b"1", None]
        assert isinstance((await driver.commit([batch(Put("c:b", b"2"))]))[0], Committed)


@pytest.mark.parametrize("answer_bytes", [0, 1, 3, 4, 7, 12, 30])
async def test_a_commit_whose_answer_is_cut_is_unknown_and_a_read_is_not(url: str, answer_bytes: int) -> None:
    with Proxy.before(url) as proxy:
        async with _opened(url) as driver, _opened(proxy.url, table=driver._options.table) as behind:
            await behind.commit([batch(Put("c:a", b"1"))])
            for number, op in enumerate((Put("c:b", b"2"), Put("c:c", b"2", ABSENT))):
                await behind.ping()
                proxy.cut_after(min(answer_bytes, 6) if number == 0 else answer_bytes)
                with pytest.raises(CommitUnknown, match=f"c:{'bc'[number]}"):
                    await behind.commit([batch(op)])
                proxy.heal()
            await behind.ping()
            proxy.cut_after(answer_bytes)
            with pytest.raises(Unavailable):
                await behind.get(["c:a"])
            proxy.heal()

            async with asyncio.timeout(10):
                while None in await driver.get(["c:b", "c:c"]):  # the server may not have come to it yet
                    await asyncio.sleep(0.01)
            assert [entry and entry.value for entry in await behind.get(["c:a", "c:b"])] == [b"1", b"2"]
            assert (behind._connections.in_use, behind._connections.size) == (0, 1)


async def test_a_silent_server_is_given_up_by_the_deadline_and_used_again_once_it_speaks(url: str) -> None:
    with Proxy.before(url) as proxy:
        async with _opened(url) as driver:
            behind = await MysqlDriver.open(
                MysqlOptions(url=proxy.url, table=driver._options.table, connect_timeout=0.4)
            )
            async with kvpersist.open_store(behind, timeout=0.5) as store:
                await store.put("c:a", 1)
                proxy.stall()
                for call in (store.get("c:a"), store.put("c:a", 2), store.get("c:a")):
                    with pytest.raises(KvError) as told:
                        async with asyncio.timeout(1.5):
                            await call
                    assert told.value.code in ("KV200", "KV201", "KV210"), told.value
                proxy.heal()

                assert await store.get("c:a") in (1, 2)
                await store.put("c:a", 3)
                assert await store.get("c:a") == 3
                assert behind._connections.in_use == 0
            await behind.close()


async def test_a_server_that_greets_nobody_or_with_nonsense_is_unavailable_in_time() -> None:
    greetings = iter([b"", b"HTTP/1.1 400 Bad Request\r\n\r\n", b"\x05\x00\x00\x00\x0a1.2", b"\xff" * 40, None])

    served: list[asyncio.Task[Any] | None] = []

    async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        served.append(asyncio.current_task())
        text = next(greetings)
        if text is None:
            await reader.read()
        else:
            writer.write(text)
        writer.close()
        await asyncio.gather(writer.wait_closed(), return_exceptions=True)

    async with await asyncio.start_server(greet, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        for _ in range(5):
            with pytest.raises(Unavailable):
                async with asyncio.timeout(3):
                    await MysqlDriver.open(
                        MysqlOptions(host="127.0.0.1", port=port, username="a", database="b", connect_timeout=0.3)
                    )
        await asyncio.gather(*(task for task in served if task))


async def test_slow_and_cut_connections_give_no_wrong_answer_and_leak_nothing(url: str) -> None:
    chance = random.Random(11)
    with Proxy.before(url) as proxy:
        async with _opened(url) as driver, _opened(proxy.url, table=driver._options.table, pool_max=4) as behind:
            keys = [f"c:{number:02}" for number in range(40)]
            await driver.commit([batch(Put(key, key.encode())) for key in keys])
            for number in range(30):
                calls: list[Any] = [behind.get([key]) for key in chance.sample(keys, 4)]
                calls += [behind.commit([batch(Put(key, key.encode()))]) for key in chance.sample(keys, 2)]
                if number % 3 == 0:
                    proxy.cut_after(chance.randrange(600))
                elif number % 3 == 1:
                    proxy.delay(0.002, 0.002)
                tasks = [asyncio.ensure_future(call) for call in calls]
                await asyncio.wait(tasks, timeout=chance.random() * 0.02)
                if number % 2:
                    proxy.cut()
                for answer in await asyncio.gather(*tasks, return_exceptions=True):
                    assert isinstance(answer, Unavailable | CommitUnknown | list), answer
                    entries = (
                        [entry for entry in answer if isinstance(entry, Entry)] if isinstance(answer, list) else []
                    )
                    assert all(entry.value == entry.key.encode() for entry in entries)
                proxy.heal()
            assert [entry and entry.value for entry in await behind.get(keys)] == [key.encode() for key in keys]
            assert behind._connections.in_use == 0
            assert behind._connections._free._value == 4


# -- the agents' records -------------------------------------------------------------------------


async def test_a_turn_is_one_call_and_its_records_are_found(driver: MysqlDriver) -> None:
    async with kvpersist.open(driver) as db:
        session = await db.sessions.create(user_id="ada", title="Late parcel")
        ask = Message("assistant", tool_calls=[ToolCallPart("c0", "track", {"parcel": 7})])
        await db.messages.append_many(session.id, [Message("user", "where?"), ask])
        before = driver._connections.calls

        ask = Message("assistant", tool_calls=[ToolCallPart("c1", "track", {"parcel": 8})])
        await db.messages.append_many(session.id, [Message("user", "and this?"), ask])
        turn = driver._connections.calls - before
        await db.messages.append(session.id, Message("tool", "in Oslo", tool_call_id="c1"))
        last = await db.messages.last(session.id, 50)
        sessions = await db.sessions.find(user_id="ada")
        calls = await db.tool_calls.find(name="track")

        assert turn == 1
        assert [message.number for message in last] == [1, 2, 3, 4, 5]
        assert [found.id for found in sessions] == [session.id]
        assert {call.call_id: call.result for call in calls} == {"c0": None, "c1": "in Oslo"}
        await db.sessions.delete(session.id)
        assert await db.messages.last(session.id, 5) == []


async def test_concurrent_turns_of_two_openers_by_url_are_numbered_without_gaps(url: str) -> None:
    table = _table()
    place = f"{url}?kv.table={table}"
    async with kvpersist.open(place) as first, kvpersist.open(place.replace("mysql:", "mariadb:")) as second:
        session = (await first.sessions.create()).id

        await asyncio.gather(
            *(db.messages.append(session, Message("user", str(n))) for n in range(30) for db in (first, second))
        )

        assert [message.number for message in await first.messages.last(session, 100)] == list(range(1, 61))
        assert await first._all.messages.verify() == []
    await _ask(url, f"DROP TABLE {table}")
