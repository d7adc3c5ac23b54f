"""Backends to run on, seen through a driver that counts, and the check that ends fault and race tests."""

from __future__ import annotations

import asyncio
import sys
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

import kvpersist
from kvpersist.agents.persistence import Persistence
from kvpersist.agents.records import ToolCall
from kvpersist.driver import Batch, Committed, Driver, Entry
from kvpersist.errors import KvError
from kvpersist.keys import prefix_end, unescape
from kvpersist.testing.faults import FaultyDriver
from kvpersist_drivers.memory import MemoryDriver
from kvpersist_drivers.sqlite import SqliteDriver

sys.path.insert(0, str(Path(__file__).parent))  # for agent_state.py


class Counting:
    """A driver that notes its calls and lets others run before each."""

    def __init__(self, driver: Driver) -> None:
        self.driver = driver
        self.capabilities = driver.capabilities
        self.calls: list[str] = []
        self.batches: list[Batch] = []
        self.values_read = 0

    async def get(self, keys: Sequence[str]) -> list[Entry | None]:
        self.calls.append("get")
        await asyncio.sleep(0)
        found = await self.driver.get(keys)
        self.values_read += sum(entry is not None and ":message:" in entry.key for entry in found)
        return found

    async def commit(self, batches: Sequence[Batch]) -> list[Committed | KvError]:
        self.calls.append("commit")
        self.batches += batches
        await asyncio.sleep(0)
        return await self.driver.commit(batches)

    async def scan(self, start: str | None, end: str | None, **options: Any) -> list[Entry]:
        self.calls.append("scan")
        await asyncio.sleep(0)
        found = await self.driver.scan(start, end, **options)
        self.values_read += sum(":message:" in entry.key and entry.value != b"" for entry in found)
        return found

    async def close(self) -> None:
        await self.driver.close()

    def clear(self) -> None:
        self.calls.clear()
        self.batches.clear()
        self.values_read = 0

    async def everything(self) -> dict[str, bytes]:
        """The whole key space, without the marks of stores and definitions, and without tombstones."""
        found = await self.driver.scan(None, None, limit=1_000_000)
        kept = (entry for entry in found if entry.value != b"" and entry.expires_at is None)
        return {
            entry.key: entry.value
            for entry in kept
            if not entry.key.startswith("kvpersist:") and "#def" not in entry.key
        }


@pytest.fixture(params=["memory", "sqlite", "ordered"])
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
async def driver(backend: str, tmp_path: Path) -> AsyncIterator[Counting]:
    inner: Driver
    if backend == "sqlite":
        options = SqliteDriver.Options(path=str(tmp_path / "agents.db"), durability="normal")
        inner = await SqliteDriver.open(options)
    elif backend == "memory":
        inner = MemoryDriver()
    else:
        inner = FaultyDriver(MemoryDriver(), without={"atomic_batch", "reverse", "deref"})
    counting = Counting(inner)
    yield counting
    await counting.close()


@pytest.fixture
async def db(driver: Counting) -> AsyncIterator[Persistence]:
    async with kvpersist.open(driver) as db:
        yield db


Sound = Callable[[Persistence], Awaitable[None]]


@pytest.fixture
def sound() -> Sound:
    """Compare every index with its records, every stat with what it counts, and every key with its session."""
    return _sound


async def _sound(db: Persistence) -> None:
    every = db._all
    repositories: list[Any] = [
        every.sessions,
        every.messages,
        every.tool_calls,
        *db._family.repositories.values(),
    ]
    for repository in repositories:
        found = await repository.verify()
        if db.store.capabilities.atomic_batch == "none":  # there an entry may be stale, never missing
            found = [damage for damage in found if damage.kind != "stale"]
        assert found == []
    await _family_sound(db)
    alive = {session.id async for session in db.sessions.iterate()}
    messages = [message async for message in every.messages.iterate()]
    calls = [call async for call in every.tool_calls.iterate()]
    assert {message.session_id for message in messages} <= alive
    assert {call.session_id for call in calls} <= alive
    assert {session.id for session in await db.sessions.recent(limit=10_000)} == alive
    for id_ in alive:
        stat = await db.sessions.stat(id_)
        mine = [message for message in messages if message.session_id == id_]
        asked = [call for call in calls if call.session_id == id_]
        assert stat is not None
        assert stat.messages == len(mine)
        assert stat.roles == Counter(message.role for message in mine)
        assert stat.tool_calls == len(asked)
        assert {name: counts.calls for name, counts in stat.tools.items()} == Counter(call.name for call in asked)
        for name, counts in stat.tools.items():
            assert counts.by_state() == Counter(call.state for call in asked if call.name == name)
        _answers_fit(mine, asked)


async def _family_sound(db: Persistence) -> None:
    """Every parent has its birth key, every birth key its parent, and every record what it belongs to."""
    living: dict[str, set[str]] = {}
    for kind, births in db._family.births.items():
        prefixes = births.repository._prefix, births.prefix
        there, born = [
            {entry.key[len(prefix) :] for entry in await db.store._scan(prefix, prefix_end(prefix), limit=10_000)}
            - {entry.key[len(prefix) :] for entry in await _tombstones(db, prefix)}
            for prefix in prefixes
        ]
        assert there == born, f"records and birth keys of {kind}"
        living[kind] = {unescape(part) for part in there}
    for records in (db.images, db.prototypes, db.providers, db.traces, db.confirmations._pending):
        async for record in records.iterate():
            for each in records._belongs:
                named = getattr(record, each.field)
                assert named is None or named in living[each.births.kind], record


async def _tombstones(db: Persistence, prefix: str) -> list[Entry]:
    found = await db.store._scan(prefix, prefix_end(prefix), limit=10_000)
    return [entry for entry in found if entry.value == b""]


def _answers_fit(messages: list[kvpersist.Message], calls: list[ToolCall]) -> None:
    answers = {message.number: message for message in messages if message.role == "tool"}
    for call in calls:
        if call.result_number is not None:
            assert answers[call.result_number].tool_call_id == call.call_id
            assert call.number < call.result_number
