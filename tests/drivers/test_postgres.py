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
import msgspec
import pytest
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
from kvpersist_drivers.postgres._statements import MAX_KEY_BYTES, Statements, escaped, unescaped

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
        async with _few_rights(url) as (plain, table):
            async with _opened(plain, table=table) as driver:
                yield driver

    async def peek(self, driver: PostgresDriver, key: str) -> bytes | None:
        return await _peek(self._url, driver._sql.table, key)


@asynccontextmanager
async def _few_rights(url: str, rights: str = "SELECT, INSERT, UPDATE, DELETE") -> AsyncIterator[tuple[str, str]]:
    """The URL of a role without rights but ``rights`` on a table, and the table's name."""
    role, table = f"r{_table()}", _table()
    async with _opened(url, table=table):
        pass
    await _sql(url, f"REVOKE CREATE ON SCHEMA public FROM public; CREATE ROLE {role} LOGIN")
    if rights:
        await _sql(url, f"GRANT {rights} ON {table} TO {role}")
    try:
        yield re.sub("//[^@]*@", f"//{role}@", url), table
    finally:
        await _sql(url, f"DROP TABLE {table}; DROP OWNED BY {role}; DROP ROLE {role}")
