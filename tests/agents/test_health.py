"""Whether stores answer, and what is in them."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import kvpersist
from kvpersist.agents.persistence import Persistence
from kvpersist.driver import Batch, Committed, Driver, Entry
from kvpersist.errors import KvError, Unavailable
from kvpersist_drivers.memory import MemoryDriver


class Troubled:
    """A memory driver that hangs, or fails, in one of its calls. It has no ``ping``."""

    def __init__(self, *, hangs: str = "", fails: str = "", error: Exception | None = None) -> None:
        self.driver: Driver = MemoryDriver()
        self.capabilities = self.driver.capabilities
        self.hangs, self.fails = hangs, fails
        self.error = error or Unavailable("it is down")

    async def _trouble(self, call: str) -> None:
        if self.hangs == call:
            await asyncio.Event().wait()
        if self.fails == call:
            raise self.error

    async def get(self, keys: Sequence[str]) -> list[Entry | None]:
        await self._trouble("get")
        return await self.driver.get(keys)

    async def commit(self, batches: Sequence[Batch]) -> list[Committed | KvError]:
        await self._trouble("commit")
        return await self.driver.commit(batches)

    async def scan(self, *args: Any, **options: Any) -> list[Entry]:
        return await self.driver.scan(*args, **options)

    async def close(self) -> None:
        await self.driver.close()


async def test_a_store_that_answers_is_healthy(db: Persistence) -> None:
    keys = [key async for key in db.store.keys(raw=True)]

    found = await db.health()

    assert found.healthy
    [store] = found.stores.values()
    assert store.connected and store.writable and store.error is None
    assert store.store == db.store.where
    assert found.latency == store.latency and 0 < (store.latency or 0) < 5
    assert found.checked_at.tzinfo is not None
    assert [key async for key in db.store.keys(raw=True)] == keys


async def test_a_driver_that_can_be_pinged_is_pinged_and_says_what_it_is(tmp_path: Path) -> None:
    async with kvpersist.open(f"sqlite:///{tmp_path}/a.db", files="memory://") as db:
        found = await db.health(write=False)
    main = found.stores["main"]
    assert main.driver == "SqliteDriver"
    assert "SQLite" in main.server or "sqlite" in main.server
    assert main.durable and not found.stores["files"].durable
    assert main.writable is None
    assert list(found.stores) == ["main", "files"]


@pytest.mark.parametrize(
    ("trouble", "connected", "writable", "says"),
    [
        ({"hangs": "get"}, False, None, "no answer in 0.05 s"),
        ({"fails": "get"}, False, None, "KV200 it is down"),
        ({"hangs": "commit"}, True, False, "no answer in 0.05 s"),
        ({"fails": "commit"}, True, False, "KV200 it is down"),
        ({"fails": "get", "error": OSError("password=CANARY")}, False, None, "OSError"),
    ],
)
async def test_a_store_in_trouble_is_unhealthy_in_time_and_nothing_is_raised(
    trouble: dict[str, Any], connected: bool, writable: bool | None, says: str
) -> None:
    driver = Troubled()
    async with kvpersist.open(driver) as db, kvpersist.open("memory://", files=db.store) as other:
        for name, value in trouble.items():
            setattr(driver, name, value)

        alone, beside = await db.health(timeout=0.05), await other.health(timeout=0.05)

        driver.hangs = driver.fails = ""
    assert not alone.healthy and not beside.healthy
    [store] = alone.stores.values()
    assert (store.connected, store.writable, store.error) == (connected, writable, says)
    assert (store.latency is not None) == connected
    assert beside.stores["main"].connected
    assert beside.stores["files"].connected == connected
    assert (beside.latency is not None) == connected


async def test_a_store_that_was_closed_is_not_connected() -> None:
    db = await kvpersist.open("memory://")
    await db.close()

    found = await db.health()

    assert not found.healthy
    assert "closed" in (found.stores["main"].error or "")


async def test_a_store_that_may_only_be_read_is_healthy_and_not_writable(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/a.db"
    async with kvpersist.open(url):
        pass
    async with kvpersist.open(url, mode="ro") as db:
        found = await db.health()

    store = found.stores["main"]
    assert found.healthy
    assert (store.connected, store.writable, store.read_only) == (True, False, True)


async def test_metrics_count_what_all_stores_do(tmp_path: Path) -> None:
    async with kvpersist.open("memory://", events="memory://") as db:
        before = db.metrics()
        session = await db.sessions.create()
        await db.messages.append(session.id, kvpersist.Message(role="user", content="hello"))
        after_messages = db.metrics()
        await db.events.publish("topic", 1)
        after = db.metrics()

    assert after_messages.commits >= before.commits + 2
    assert after_messages.puts > before.puts
    assert after.commits > after_messages.commits
    assert after.round_trips > before.round_trips


async def test_totals_are_what_is_stored(db: Persistence) -> None:
    await db.agents.create(id="a")
    for _ in range(2):
        session = await db.sessions.create(agent_id="a")
        await db.messages.append(session.id, kvpersist.Message(role="user", content="hello"))

    found = await db.totals()

    assert (found.sessions, found.messages, found.tool_calls) == (2, 2, 0)
    assert found.records == {"agent": 1}
    assert list(found.bytes) == ["main"]
    await db.agents.delete("a")
    assert (await db.totals()).records == {}


async def test_drivers_that_know_it_tell_the_room_they_take(tmp_path: Path) -> None:
    async with kvpersist.open(f"sqlite:///{tmp_path}/a.db", files="memory://", events=Troubled()) as db:
        found = await db.totals()
        await db.store.put_raw("app:large", bytes(1 << 20))
        larger = await db.totals()

    assert found.bytes["main"] is not None and found.bytes["files"] is not None
    assert found.bytes["events"] is None
    assert (larger.bytes["main"] or 0) - found.bytes["main"] >= 1 << 20
