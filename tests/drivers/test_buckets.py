"""The bucket driver: the contract and the model on emulators of three services, and what is its own."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from kvpersist.driver import HEADER_BYTES
from kvpersist.testing import DriverContract, driver_machine
from kvpersist_drivers.buckets import BucketDriver, BucketOptions
from kvpersist_drivers.buckets._names import escaped

Service = Callable[[str], dict[str, str]]


def _s3(service: Service) -> dict[str, Any]:
    found = service("s3")
    return {
        "url": f"{found['KVPERSIST_TEST_S3_URL']}/t{os.urandom(6).hex()}",
        "endpoint_url": found["KVPERSIST_TEST_S3_ENDPOINT"],
        "key": found["KVPERSIST_TEST_S3_KEY"],
        "secret": found["KVPERSIST_TEST_S3_SECRET"],
    }


def _gcs(service: Service) -> dict[str, Any]:
    found = service("gcs")
    url, endpoint = found["KVPERSIST_TEST_GCS_URL"], found["KVPERSIST_TEST_GCS_ENDPOINT"]
    return {"url": f"{url}/t{os.urandom(6).hex()}", "endpoint_url": endpoint, "token": "anon", "project": "test"}


def _azure(service: Service) -> dict[str, Any]:
    found = service("azure")
    url, connection = found["KVPERSIST_TEST_AZURE_URL"], found["KVPERSIST_TEST_AZURE_CONNECTION_STRING"]
    return {"url": f"{url}/t{os.urandom(6).hex()}", "connection_string": connection}


@asynccontextmanager
async def _opened(place: dict[str, Any], **options: Any) -> AsyncIterator[BucketDriver]:
    driver = await BucketDriver.open(BucketOptions(**place, **options))
    try:
        yield driver
    finally:
        await driver.close()


class _Contract(DriverContract[BucketDriver]):
    __test__ = False
    place: Callable[[Service], dict[str, Any]]

    @pytest.fixture
    async def driver(self, service: Service) -> AsyncIterator[BucketDriver]:
        self._options = type(self).place(service)
        async with _opened(self._options) as driver:
            yield driver

    async def peek(self, driver: BucketDriver, key: str) -> bytes | None:
        found = await driver._store.get(driver._root + escaped(key))  # FIXME raw client
        return None if found is None or len(found.body) < HEADER_BYTES else found.body[HEADER_BYTES:]

    async def reopen(self, driver: BucketDriver) -> BucketDriver:
        return await BucketDriver.open(BucketOptions(**self._options))


class TestS3(_Contract):
    place = staticmethod(_s3)


class TestGcs(_Contract):
    place = staticmethod(_gcs)


class TestAzure(_Contract):
    place = staticmethod(_azure)


class TestMemory(_Contract):
    place = staticmethod(lambda service: {"url": f"dir::memory://b{os.urandom(6).hex()}/p"})
