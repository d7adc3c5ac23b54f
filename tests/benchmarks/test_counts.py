"""What an operation costs, as numbers that no other load on the machine can blur.

Round trips are counted on the driver, transactions and statements by SQLite itself, tasks by the loop,
calls to a server by the driver that makes them.
"""

from __future__ import annotations

import asyncio
import sqlite3
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from operator import attrgetter
from pathlib import Path
from typing import Any

import msgspec
import pytest

import kvpersist
from kvpersist.agents.records import Message, ToolCallPart
from kvpersist.driver import Batch, Committed, Driver, Entry
from kvpersist.errors import KvError
from kvpersist.registry import driver_class
from kvpersist_drivers.sqlite import SqliteDriver

NOW = datetime(2025, 1, 1, tzinfo=UTC)


class Note(msgspec.Struct, kw_only=True):
    id: str
    user_id: str = "u1"
    text: str = ""
    created_at: datetime = NOW


class Counting:
    """A driver that notes every call: its name and how many keys, operations or entries it was about."""

    def __init__(self, driver: Driver) -> None:
        self.driver = driver
        self.capabilities = driver.capabilities
        self.calls: list[tuple[str, int]] = []

    async def get(self, keys: Sequence[str]) -> list[Entry | None]:
        self.calls.append(("get", len(keys)))
        return await self.driver.get(keys)

    async def commit(self, batches: Sequence[Batch]) -> list[Committed | KvError]:
        self.calls.append(("commit", sum(len(batch.ops) for batch in batches)))
        return await self.driver.commit(batches)

    async def scan(self, start: str | None, end: str | None, **options: Any) -> list[Entry]:
        self.calls.append(("scan deref" if options.get("deref") else "scan", options["limit"]))
        return await self.driver.scan(start, end, **options)

    async def close(self) -> None:
        await self.driver.close()

    def names(self) -> list[str]:
        return [name for name, _ in self.calls]


class Counts:
    """Since the last `clear`: driver calls, statements of every connection, tasks started."""

    def __init__(self) -> None:
        self.driver: Counting
        self.statements: list[str] = []
        self.tasks = 0

    def clear(self) -> None:
        self.driver.calls.clear()
        self.statements.clear()
        self.tasks = 0

    def transactions(self) -> int:
        """Those that write: explicit ones, and statements that commit by themselves."""
        writing = [text.split(None, 1)[0].upper() for text in self.statements]
        explicit = sum(text.upper().startswith("BEGIN IMMEDIATE") for text in self.statements)
        return explicit or sum(word in ("INSERT", "REPLACE", "DELETE", "UPDATE") for word in writing)


@pytest.fixture
async def counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Counts]:
    counted = Counts()
    connect = sqlite3.connect

    def tracing(*arguments: Any, **options: Any) -> sqlite3.Connection:
        connection = connect(*arguments, **options)
        connection.set_trace_callback(counted.statements.append)
        return connection

    monkeypatch.setattr(sqlite3, "connect", tracing)
    driver = await SqliteDriver.open(SqliteDriver.Options(path=str(tmp_path / "counts.db"), durability="normal"))
    counted.driver = Counting(driver)
    yield counted
    await driver.close()


@contextmanager
def counted_tasks(counts: Counts) -> Iterator[None]:
    """Count the tasks that the running loop starts."""

    def factory(
        loop: asyncio.AbstractEventLoop, coroutine: Coroutine[Any, Any, Any], **options: Any
    ) -> asyncio.Task[Any]:
        counts.tasks += 1
        return asyncio.Task(coroutine, loop=loop, **options)

    loop = asyncio.get_running_loop()
    loop.set_task_factory(factory)
    try:
        yield
    finally:
        loop.set_task_factory(None)


async def test_64_concurrent_puts_are_one_or_two_transactions(counts: Counts) -> None:
    async with kvpersist.open_store(counts.driver) as store:
        notes = kvpersist.Repository(store, Note, name="note", key="id")
        await notes.put(Note(id="first"))
        counts.clear()

        await asyncio.gather(*[notes.put(Note(id=f"n{n}")) for n in range(64)])

        assert counts.driver.names() in (["commit"], ["commit", "commit"])
        assert counts.transactions() <= 2


async def test_a_put_is_one_commit_and_starts_no_task(counts: Counts) -> None:
    async with kvpersist.open_store(counts.driver) as store:
        notes = kvpersist.Repository(store, Note, name="note", key="id")
        await notes.put(Note(id="first"))
        counts.clear()

        with counted_tasks(counts):
            await notes.put(Note(id="second"))

        assert counts.driver.names() == ["commit"]
        assert counts.transactions() == 1
        assert counts.tasks == 0


async def test_a_get_is_one_statement_and_starts_no_task(counts: Counts) -> None:
    async with kvpersist.open_store(counts.driver) as store:
        notes = kvpersist.Repository(store, Note, name="note", key="id")
        await notes.put(Note(id="first"))
        await notes.get("first")
        counts.clear()

        with counted_tasks(counts):
            assert await notes.get("first") == Note(id="first")

        assert counts.driver.calls == [("get", 1)]
        assert len(counts.statements) == 1
        assert counts.tasks == 0


async def test_64_concurrent_gets_are_one_or_two_round_trips(counts: Counts) -> None:
    async with kvpersist.open_store(counts.driver) as store:
        notes = kvpersist.Repository(store, Note, name="note", key="id")
        await notes.put_many([Note(id=f"n{n}") for n in range(64)])
        counts.clear()

        await asyncio.gather(*[notes.get(f"n{n}") for n in range(64)])

        assert counts.driver.names() in (["get"], ["get", "get"])
        assert len(counts.statements) <= 2


async def test_get_many_of_1000_is_one_driver_call(counts: Counts) -> None:
    async with kvpersist.open_store(counts.driver) as store:
        notes = kvpersist.Repository(store, Note, name="note", key="id")
        await notes.put_many([Note(id=f"n{n}") for n in range(1000)])
        counts.clear()

        found = await notes.get_many([f"n{n}" for n in range(1000)])

        assert sum(note is not None for note in found) == 1000
        assert counts.driver.calls == [("get", 1000)]


async def test_put_many_of_1000_is_at_most_ten_batches_in_few_transactions(counts: Counts) -> None:
    async with kvpersist.open_store(counts.driver) as store:
        notes = kvpersist.Repository(store, Note, name="note", key="id")
        await notes.put(Note(id="first"))
        counts.clear()

        await notes.put_many([Note(id=f"n{n}") for n in range(1000)])

        assert counts.driver.names().count("commit") <= 10
        assert counts.transactions() <= 10


async def test_an_append_is_one_commit_of_two_operations_at_any_length(counts: Counts) -> None:
    async with kvpersist.open_store(counts.driver) as store:
        log = kvpersist.Log(store, Note, name="line")
        await log.append("a", Note(id="1"))
        counts.clear()

        await log.append("a", Note(id="2"))
        short = list(counts.driver.calls)
        await log.append_many("a", [Note(id=f"n{n}") for n in range(998)])
        counts.clear()
        assert await log.append("a", Note(id="1001")) == 1001

        assert short == counts.driver.calls == [("commit", 2)]
        assert counts.transactions() == 1


async def test_the_last_50_are_one_scan_of_50(counts: Counts) -> None:
    async with kvpersist.open_store(counts.driver) as store:
        log = kvpersist.Log(store, Note, name="line")
        await log.append_many("a", [Note(id=f"n{n}") for n in range(200)])
        counts.clear()

        found = await log.last("a", 50)

        assert len(found) == 50
        assert counts.driver.calls == [("scan", 50)]


async def test_a_users_newest_are_one_scan_that_follows_the_index(counts: Counts) -> None:
    async with kvpersist.open_store(counts.driver) as store:
        index = kvpersist.Index("user_id", order_by="-created_at")
        notes = kvpersist.Repository(store, Note, name="note", key="id", indexes=[index])
        await notes.put_many(
            [Note(id=f"n{n}", user_id=f"u{n % 3}", created_at=NOW + timedelta(seconds=n)) for n in range(300)]
        )
        await notes.find(user_id="u1", limit=1)
        counts.clear()

        found = await notes.find(user_id="u1", limit=100)

        assert [note.id for note in found[:2]] == ["n298", "n295"]
        assert counts.driver.names() == ["scan deref"]
        assert len(counts.statements) == 1


def _turn(number: int) -> list[Message]:
    part = ToolCallPart(f"call-{number}", "search", {"query": "x"})
    return [
        Message(role="assistant", content=f"question {number}", tool_calls=[part]),
        Message(role="tool", content=f"answer {number}", tool_call_id=part.id),
    ]


async def test_a_turn_is_one_commit(counts: Counts) -> None:
    async with kvpersist.open(counts.driver) as db:
        session = await db.sessions.create(user_id="u1")
        await db.messages.append_many(session.id, _turn(1))
        counts.clear()

        await db.messages.append_many(session.id, _turn(2))

        assert counts.driver.names() == ["commit"]
        assert counts.transactions() == 1


async def test_64_concurrent_turns_are_one_or_two_transactions(counts: Counts) -> None:
    async with kvpersist.open(counts.driver) as db:
        sessions = [await db.sessions.create(user_id="u1") for _ in range(64)]
        for number, session in enumerate(sessions):
            await db.messages.append_many(session.id, _turn(number))
        counts.clear()

        await asyncio.gather(*[db.messages.append_many(session.id, _turn(100)) for session in sessions])

        assert counts.driver.names() in (["commit"], ["commit", "commit"])
        assert counts.transactions() <= 2


# -- sent to real servers; what each kind of call of a driver sends is counted in tests/drivers -----------------------


class Sent:
    """A driver, and the calls it has sent to its server since `clear`."""

    def __init__(self, driver: Any, counter: str) -> None:
        self.driver = driver
        self._counter = attrgetter(counter)
        self.clear()

    def clear(self) -> None:
        self._before = self._counter(self.driver)

    def calls(self) -> int:
        return self._counter(self.driver) - self._before


_SERVERS = {
    "redis": ("redis", "KVPERSIST_TEST_REDIS_URL", "base", "_servers.calls"),
    "postgresql": ("postgres", "KVPERSIST_TEST_POSTGRES_URL", "table", "_connections.calls"),
    "mysql": ("mariadb", "KVPERSIST_TEST_MYSQL_URL", "table", "_connections.calls"),
}


@pytest.fixture(params=_SERVERS)
async def sent(request: pytest.FixtureRequest, service: Callable[[str], dict[str, str]]) -> AsyncIterator[Sent]:
    name, variable, place, counter = _SERVERS[request.param]
    url = service(name)[variable]
    driver: Any = driver_class(request.param)
    driver = await driver.open(driver.Options(**{"url": url, place: f"t{uuid.uuid4().hex[:12]}"}))
    yield Sent(driver, counter)
    await driver.close()


async def test_a_thousand_records_are_one_call_to_the_server(sent: Sent) -> None:
    async with kvpersist.open_store(sent.driver) as store:
        notes = kvpersist.Repository(store, Note, name="note", key="id")
        await notes.put_many([Note(id=f"n{n}") for n in range(1000)])
        sent.clear()

        found = await notes.get_many([f"n{n}" for n in range(1000)])

        assert sum(note is not None for note in found) == 1000
        assert sent.calls() == 1


async def test_64_concurrent_puts_and_gets_are_one_or_two_calls_to_the_server(sent: Sent) -> None:
    async with kvpersist.open_store(sent.driver) as store:
        notes = kvpersist.Repository(store, Note, name="note", key="id")
        await notes.put(Note(id="first"))
        sent.clear()

        await asyncio.gather(*[notes.put(Note(id=f"n{n}")) for n in range(64)])
        written = sent.calls()
        await asyncio.gather(*[notes.get(f"n{n}") for n in range(64)])

        assert written <= 2
        assert sent.calls() - written <= 2


async def test_a_users_newest_are_one_call_to_the_server(sent: Sent) -> None:
    async with kvpersist.open_store(sent.driver) as store:
        index = kvpersist.Index("user_id", order_by="-created_at")
        notes = kvpersist.Repository(store, Note, name="note", key="id", indexes=[index])
        await notes.put_many([Note(id=f"n{n}", created_at=NOW + timedelta(seconds=n)) for n in range(200)])
        await notes.find(user_id="u1", limit=1)
        sent.clear()

        assert len(await notes.find(user_id="u1", limit=100)) == 100

        assert sent.calls() == 1


async def test_64_concurrent_turns_are_one_or_two_calls_to_the_server(sent: Sent) -> None:
    async with kvpersist.open(sent.driver) as db:
        sessions = [await db.sessions.create(user_id="u1") for _ in range(64)]
        await asyncio.gather(*[db.messages.append_many(session.id, _turn(0)) for session in sessions])
        sent.clear()

        await asyncio.gather(*[db.messages.append_many(session.id, _turn(100)) for session in sessions])

        assert sent.calls() <= 2
