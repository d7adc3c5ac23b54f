"""The Redis driver: the contract, the model, and what is its own. On a real server, and on a fake one."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from redis.asyncio import Redis, RedisCluster
from redis_server import RedisServer

import kvpersist
from kvpersist import Message, ToolCallPart
from kvpersist.driver import ABSENT, HEADER_BYTES, Check, Committed, Delete, Put, packed_header, unpacked_entry
from kvpersist.errors import (
    BadKey,
    BadOption,
    BadRequest,
    CommitUnknown,
    Conflict,
    CorruptRecord,
    KvError,
    ReadOnly,
    StoreClosed,
    Unavailable,
    Unsupported,
)
from kvpersist.testing import AWKWARD_KEYS, DriverContract, batch, driver_machine
from kvpersist_drivers.redis import RedisDriver, RedisOptions
from kvpersist_drivers.redis._plan import names_of

_numbers = itertools.count()


def _base() -> str:
    return f"t{next(_numbers)}"


def _name(driver: RedisDriver, key: str) -> str:
    space, colon, _ = key.partition(":")
    space = space if colon else ""
    return names_of(driver._base, space).prefix + key[len(space) :]


async def _peek(driver: RedisDriver, url: str, key: str) -> bytes | None:
    client = Redis.from_url(url)
    try:
        stored = await client.get(_name(driver, key))
    finally:
        await client.aclose()
    return None if stored is None else stored[HEADER_BYTES:]


@asynccontextmanager
async def _opened(server: RedisServer, **options: Any) -> AsyncIterator[RedisDriver]:
    driver = await RedisDriver.open(RedisOptions(**{"url": server.url, "base": _base(), **options}))
    try:
        yield driver
    finally:
        await driver.close()


@pytest.fixture
async def driver(redis_server: RedisServer) -> AsyncIterator[RedisDriver]:
    async with _opened(redis_server) as driver:
        yield driver


@pytest.fixture
def own_server(redis_server: RedisServer) -> Iterator[RedisServer]:
    """A server that a test may stop, with its data on the disk."""
    server = RedisServer("--appendonly", "yes", "--appendfsync", "always")
    yield server
    server.close()


class TestRedis(DriverContract[RedisDriver]):
    @pytest.fixture
    async def driver(self, redis_server: RedisServer) -> AsyncIterator[RedisDriver]:
        self._url = redis_server.url
        async with _opened(redis_server) as driver:
            yield driver

    async def peek(self, driver: RedisDriver, key: str) -> bytes | None:
        return await _peek(driver, self._url, key)

    async def reopen(self, driver: RedisDriver) -> RedisDriver:
        return await RedisDriver.open(RedisOptions(url=self._url, base=driver._base))


class TestRedisOverAClient(DriverContract[RedisDriver]):
    @pytest.fixture
    async def driver(self, redis_server: RedisServer) -> AsyncIterator[RedisDriver]:
        client = Redis(unix_socket_path=redis_server.socket, decode_responses=True, protocol=3)
        self._url = redis_server.url
        driver = await RedisDriver.over(client, base=_base())
        yield driver
        await driver.close()
        assert await client.ping() is True
        await client.aclose()

    async def peek(self, driver: RedisDriver, key: str) -> bytes | None:
        return await _peek(driver, self._url, key)


class TestRedisFake(DriverContract[RedisDriver]):
    """Quick, and without a server; its cancelled calls and clocks are not Redis's."""

    @pytest.fixture
    async def driver(self) -> AsyncIterator[RedisDriver]:
        fakeredis = pytest.importorskip("fakeredis")
        self._client = fakeredis.FakeAsyncRedis(version=(7,))
        driver = await RedisDriver.over(self._client, base="fake")
        yield driver
        await driver.close()
        await self._client.aclose()

    async def peek(self, driver: RedisDriver, key: str) -> bytes | None:
        stored = await self._client.get(_name(driver, key))
        return None if stored is None else stored[HEADER_BYTES:]


@pytest.fixture(scope="module")
def model_url(redis_server: RedisServer) -> str:
    return redis_server.url


class TestRedisModel:
    def test_the_driver_does_what_a_dict_does(self, redis_server: RedisServer) -> None:
        from hypothesis.stateful import run_state_machine_as_test

        async def open_new() -> RedisDriver:
            return await RedisDriver.open(RedisOptions(url=redis_server.url, base=_base()))

        async def open_again(closed: RedisDriver) -> RedisDriver:
            return await RedisDriver.open(RedisOptions(url=redis_server.url, base=closed._base))

        machine = driver_machine(open_new, reopener=open_again)
        run_state_machine_as_test(machine, settings=machine.TestCase.settings)
