"""The MongoDB driver: the contract, the model, and what is its own. On FerretDB, and on mongomock."""

from __future__ import annotations

import os
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pymongo import MongoClient

sys.path.insert(0, str(Path(__file__).parent))  # for mongomock_shim.py

from mongomock_shim import MockClient

from kvpersist.testing import DriverContract
from kvpersist_drivers.mongo import MongoDriver, MongoOptions


class _Place:
    """A collection of its own, dropped afterwards."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.collection = "t" + os.urandom(6).hex()

    def options(self, **more: Any) -> MongoOptions:
        return MongoOptions(**{"url": self.url, "collection": self.collection, **more})

    def drop(self) -> None:
        with MongoClient(self.url) as client:
            for name in (self.collection, self.collection + "_turn"):
                client["kvpersist"].drop_collection(name)

    def peek(self, key: str) -> bytes | None:
        with MongoClient(self.url) as client:
            found = client["kvpersist"][self.collection].find_one({"_id": key})
        return None if found is None else found["v"]


@pytest.fixture
def place(service: Callable[[str], dict[str, str]]) -> Iterator[_Place]:
    place = _Place(service("mongo")["KVPERSIST_TEST_MONGO_URL"])
    yield place
    place.drop()


class TestMongo(DriverContract[MongoDriver]):
    @pytest.fixture
    async def driver(self, place: _Place) -> AsyncIterator[MongoDriver]:
        self._place = place
        driver = await MongoDriver.open(place.options())
        yield driver
        await driver.close()

    async def peek(self, driver: MongoDriver, key: str) -> bytes | None:
        return self._place.peek(key)

    async def reopen(self, driver: MongoDriver) -> MongoDriver:
        return await MongoDriver.open(self._place.options())


class TestMongoMock(DriverContract[MongoDriver]):
    @pytest.fixture
    async def driver(self) -> AsyncIterator[MongoDriver]:
        self._client = MockClient()
        driver = await MongoDriver.over(self._client)
        yield driver
        await driver.close()

    async def peek(self, driver: MongoDriver, key: str) -> bytes | None:
        found = self._client.mock.kvpersist.storage.find_one({"_id": key})
        return None if found is None else found["v"]

    async def reopen(self, driver: MongoDriver) -> MongoDriver:
        return await MongoDriver.over(self._client)
