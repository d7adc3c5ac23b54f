"""The SQLite driver: the contract, the model, and what is its own."""

from __future__ import annotations

import itertools
import sqlite3
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from kvpersist.testing import DriverContract, driver_machine
from kvpersist_drivers.sqlite import SqliteDriver, SqliteOptions


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


_folder = tempfile.TemporaryDirectory(prefix="kvpersist-")
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
