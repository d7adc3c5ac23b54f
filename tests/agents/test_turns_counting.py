"""What each operation costs in round trips, transactions and operations: exact, whatever the machine does."""

from __future__ import annotations

import asyncio
import sqlite3
from pathlib import Path
from typing import Any

import pytest

import kvpersist
from kvpersist import Index, Message, ToolCallPart
from kvpersist.agents.persistence import Persistence
from kvpersist.testing import ManualClock
from kvpersist_drivers.sqlite import SqliteDriver


@pytest.fixture(params=["memory", "sqlite"])
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


def turn(call: str = "c") -> list[Message]:
    return [Message("user", "question"), Message("assistant", "hm", tool_calls=[ToolCallPart(call, "t", {"q": 1})])]


async def test_a_session_is_created_by_one_commit(db: Persistence, driver: Any) -> None:
    await db.sessions.create()
    driver.clear()

    await db.sessions.create(user_id="u")

    assert driver.calls == ["commit"]


async def test_the_first_turn_of_a_session_created_here_is_one_commit(db: Persistence, driver: Any) -> None:
    await db.messages.append_many((await db.sessions.create()).id, turn())
    session = (await db.sessions.create()).id
    driver.clear()

    await db.messages.append_many(session, turn())

    assert driver.calls == ["commit"]
    assert len(driver.batches) == 1


async def test_a_turn_costs_as_many_operations_as_it_has_things_to_keep(driver: Any) -> None:
    async with kvpersist.open(driver, clock=ManualClock()) as db:
        session = (await db.sessions.create()).id
        await db.messages.append_many(session, turn())
        driver.clear()

        await db.messages.append_many(session, turn("d"))

        [batch] = driver.batches
        kinds = [type(op).__name__ for op in batch.ops]
        # the birth, two definitions; two messages and their ids; a call, its name and its state; the stat
        assert (kinds.count("Check"), kinds.count("Put"), kinds.count("Delete")) == (3, 2 + 2 + 1 + 2 + 1, 0)


async def test_an_answer_to_a_call_of_the_last_turn_is_one_commit(db: Persistence, driver: Any) -> None:
    session = (await db.sessions.create()).id
    await db.messages.append_many(session, turn())
    driver.clear()

    await db.messages.append(session, Message("tool", "r", tool_call_id="c"))

    assert driver.calls == ["commit"]
    assert (await db.tool_calls.of(session))[0].result == "r"


async def test_answers_to_older_calls_are_one_read_and_one_commit(db: Persistence, driver: Any) -> None:
    session = (await db.sessions.create()).id
    for name in "abc":
        await db.messages.append_many(session, turn(name))
    driver.clear()

    await db.messages.append_many(session, [Message("tool", "r", tool_call_id=name) for name in "abc"])

    assert driver.calls == ["get", "commit"]
    assert [call.result for call in await db.tool_calls.of(session)] == ["r"] * 3


async def test_the_first_turn_of_a_process_is_one_read_more(driver: Any, db: Persistence) -> None:
    session = (await db.sessions.create()).id
    async with kvpersist.open(driver) as other:
        await other.messages.append_many((await other.sessions.create()).id, turn())
        driver.clear()

        await other.messages.append_many(session, turn())

        assert driver.calls == ["get", "commit"]


async def test_reads_are_one_round_trip(db: Persistence, driver: Any) -> None:
    session = (await db.sessions.create(user_id="u")).id
    [message, _] = await db.messages.append_many(session, turn())
    await db.messages.get(message.id)
    reads = {
        "session": db.sessions.get(session),
        "stat": db.sessions.stat(session),
        "count": db.messages.count(session),
        "last": db.messages.last(session, 50),
        "at": db.messages.at(session, 1),
        "id": db.messages.get(message.id),
        "calls": db.tool_calls.of(session),
        "call": db.tool_calls.get(session, 2, 0),
        "stats": db.stats(),
    }

    for name, read in reads.items():
        driver.clear()
        await read
        assert len(driver.calls) == 1, name


async def test_a_list_of_sessions_is_one_read_of_the_index_and_one_of_their_times(db: Persistence, driver: Any) -> None:
    for n in range(30):
        await db.sessions.create(id=str(n), user_id="u")
    for found in (db.sessions.find(user_id="u"), db.sessions.list(), db.sessions.recent()):
        driver.clear()
        assert len(await found) == 30
        assert driver.calls == ["scan", "get"]


async def test_an_edit_of_a_session_is_one_read_and_one_commit(db: Persistence, driver: Any) -> None:
    session = (await db.sessions.create()).id
    driver.clear()

    await db.sessions.update(session, lambda s: s)

    assert driver.calls == ["get", "commit"]


async def test_appending_costs_the_same_at_any_length(driver: Any) -> None:
    async with kvpersist.open(driver, clock=ManualClock()) as db:
        session = (await db.sessions.create()).id
        await db.messages.append(session, Message("user", "x"))
        driver.clear()
        await db.messages.append(session, Message("user", "x"))
        short = [len(batch.ops) for batch in driver.batches]
        await db.messages.append_many(session, [Message("user", n) for n in range(900)])
        driver.clear()

        await db.messages.append(session, Message("user", "x"))

        assert driver.calls == ["commit"]
        assert [len(batch.ops) for batch in driver.batches] == short == [5]


async def test_turns_of_many_tasks_in_one_session_share_few_batches(db: Persistence, driver: Any) -> None:
    session = (await db.sessions.create()).id
    await db.messages.append_many(session, turn())
    driver.clear()

    async def worker() -> None:
        for _ in range(4):
            await db.messages.append(session, Message("user", "x"))

    await asyncio.gather(*[worker() for _ in range(64)])

    assert set(driver.calls) == {"commit"}
    assert len(driver.batches) <= 7
    assert await db.messages.count(session) == 2 + 256


async def test_more_indexes_cost_one_operation_each_per_message(driver: Any) -> None:
    indexes = [Index("role"), Index("user_id"), Index("agent_id")]
    async with kvpersist.open(driver, message_indexes=indexes, clock=ManualClock()) as db:
        session = (await db.sessions.create()).id
        await db.messages.append(session, Message("user", "x"))
        driver.clear()

        await db.messages.append(session, Message("user", "x", user_id="u"))

        [batch] = driver.batches
        assert len(batch.ops) == 5 + 2  # agent_id is None, so there is no entry


async def test_append_each_is_one_transaction(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    statements: list[str] = []
    connect = sqlite3.connect

    def tracing(*arguments: Any, **options: Any) -> sqlite3.Connection:
        connection = connect(*arguments, **options)
        connection.set_trace_callback(statements.append)
        return connection

    monkeypatch.setattr(sqlite3, "connect", tracing)
    driver = await SqliteDriver.open(SqliteDriver.Options(path=str(tmp_path / "each.db"), durability="normal"))
    async with kvpersist.open(driver) as db:
        sessions = [(await db.sessions.create()).id for _ in range(20)]
        await db.messages.append_each({each: turn() for each in sessions})
        statements.clear()

        await db.messages.append_each({each: turn("d") for each in sessions})

        assert sum(text.upper().startswith("BEGIN IMMEDIATE") for text in statements) == 1
        statements.clear()
        await asyncio.gather(*[db.messages.append_many(each, turn("e")) for each in sessions])
        assert sum(text.upper().startswith("BEGIN IMMEDIATE") for text in statements) <= 2
    await driver.close()
