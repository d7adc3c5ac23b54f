"""The MySQL driver: the contract, the model, and what is its own. On a real MariaDB."""

from __future__ import annotations

import itertools
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import urlsplit

import asyncmy
import pytest

from kvpersist.testing import DriverContract, driver_machine
from kvpersist_drivers.mysql import MysqlDriver, MysqlOptions

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
        settings = "SET SESSION sql_mode='ANSI,NO_BACKSLASH_ESCAPES', TRANSACTION ISOLATION LEVEL SERIALIZABLE"
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

        async def open_new() -> MysqlDriver:
            return await MysqlDriver.open(MysqlOptions(url=url, table=_table()))

        async def open_again(closed: MysqlDriver) -> MysqlDriver:
            return await MysqlDriver.open(MysqlOptions(url=url, table=closed._options.table))

        machine = driver_machine(open_new, reopener=open_again)
        run_state_machine_as_test(machine, settings=machine.TestCase.settings)
