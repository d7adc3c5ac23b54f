"""Backends to run the event queue on; another is added by its name."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from uuid import uuid4

import pytest
from stores import empty_store

from kvpersist import EventQueue, Store, open_store
from kvpersist.registry import driver_class
from kvpersist.testing.clock import ManualClock
from kvpersist.testing.faults import FaultyDriver
from kvpersist.urls import parse

BACKENDS = ["memory", "sqlite", "filesystem", "redis", "postgres", "mysql", "mongo", "ordered"]
"""``ordered`` has no atomic batches, cannot scan backwards and does not delete conditionally."""


_SLOW = ("postgres", "mysql", "mongo")


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    if request.param in _SLOW and request.node.name.startswith("test_planted"):
        pytest.skip("a planted mistake need not be found everywhere")
    return request.param


@pytest.fixture
def url(backend: str, tmp_path: Path, service: Callable[[str], dict[str, str]]) -> str:
    if backend in ("memory", "ordered"):
        return f"memory://{uuid4().hex}"
    if backend == "sqlite":
        return f"sqlite:///{tmp_path}/events.db?kv.durability=normal"
    if backend == "filesystem":
        return f"file://{tmp_path}/events?kv.durability=normal"
    return empty_store(backend, tmp_path, service)


@pytest.fixture
def part(backend: str) -> int:
    """Divides sizes that FerretDB, which reads the whole collection for a scan, does not reach in a test's time."""
    return 10 if backend == "mongo" else 1


@pytest.fixture
def namespace() -> str:
    """One that no other test uses: servers are shared."""
    return f"ev-{uuid4().hex[:12]}"


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


Open = Callable[[], "AsyncIterator[Store]"]


@pytest.fixture
async def stores(backend: str, url: str, clock: ManualClock) -> AsyncIterator[Callable[[], object]]:
    """Opens the same place once more, as another process would."""
    async with AsyncExitStack() as stack:

        async def again() -> Store:
            if backend != "ordered":
                return await stack.enter_async_context(open_store(url, clock=clock, timeout=30.0))
            target = parse(url)
            inner = await driver_class(target.scheme).open(target.options)
            driver = FaultyDriver(inner, without={"atomic_batch", "reverse", "conditional_delete"})
            stack.push_async_callback(driver.close)
            return await stack.enter_async_context(open_store(driver, clock=clock, timeout=30.0))

        yield again


@pytest.fixture
async def store(stores: Callable[[], object]) -> Store:
    return await stores()  # type: ignore[misc]


@pytest.fixture
async def queue(store: Store, namespace: str) -> AsyncIterator[EventQueue]:
    async with EventQueue(store, namespace=namespace) as queue:
        yield queue
