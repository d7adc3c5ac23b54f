"""A session's life: metadata, closed and open, found or created, deleted by age."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

import kvpersist
from kvpersist import Message
from kvpersist.agents.persistence import Persistence
from kvpersist.driver import Driver
from kvpersist.errors import BadRequest, ParentGone, UniqueConflict
from kvpersist.testing import ManualClock
from kvpersist.testing.faults import Crashed, FaultyDriver
from kvpersist_drivers.memory import MemoryDriver
from tests.services.stores import empty_store

Sound = Callable[[Persistence], Awaitable[None]]
ORDERED = {"atomic_batch", "reverse", "deref"}


async def test_metadata_is_replaced_or_merged(db: Persistence, sound: Sound) -> None:
    session = await db.sessions.create(metadata={"a": 1, "b": {"x": 1}})

    merged = await db.sessions.merge_metadata(session.id, {"b": {"y": 2}, "c": None})
    assert merged is not None and merged.metadata == {"a": 1, "b": {"y": 2}, "c": None}
    assert merged.updated_at is not None and session.updated_at is not None and merged.updated_at >= session.updated_at
    replaced = await db.sessions.set_metadata(session.id, {"z": 0})
    assert replaced == await db.sessions.get(session.id)
    assert replaced is not None and replaced.metadata == {"z": 0}
    assert await db.sessions.set_metadata("nobody", {}) is None
    assert await db.sessions.merge_metadata("nobody", {}) is None
    await sound(db)


async def test_nothing_that_is_merged_at_once_is_lost(driver: Driver) -> None:
    async with kvpersist.open(driver) as one, kvpersist.open(driver) as two:
        session = await one.sessions.create()

        await asyncio.gather(
            *[one.sessions.merge_metadata(session.id, {f"1-{n}": n}) for n in range(10)],
            *[two.sessions.merge_metadata(session.id, {f"2-{n}": n}) for n in range(10)],
        )

        found = await one.sessions.get(session.id)
        assert found is not None and len(found.metadata) == 20


async def test_a_session_is_closed_and_opened_again(db: Persistence) -> None:
    session = await db.sessions.create(user_id="u")

    closed = await db.sessions.close(session.id)
    assert closed is not None and not closed.active
    assert await db.sessions.active("u") is None
    await db.messages.append(session.id, Message("user", "still"))
    reopened = await db.sessions.reopen(session.id)
    assert reopened is not None and reopened.active
    found = await db.sessions.active("u")
    assert found is not None and found == await db.sessions.get(session.id)
    assert await db.sessions.close("nobody") is None and await db.sessions.reopen("nobody") is None


async def test_existence_and_clearing(db: Persistence, sound: Sound) -> None:
    session = await db.sessions.create(title="t")
    await db.messages.append_many(session.id, [Message("user", "1"), Message("user", "2")])

    assert await db.sessions.exists(session.id)
    assert await db.sessions.clear(session.id) == 2
    assert await db.messages.count(session.id) == 0
    assert await db.sessions.exists(session.id)
    await db.sessions.delete(session.id)
    assert not await db.sessions.exists(session.id)
    with pytest.raises(ParentGone):
        await db.sessions.clear(session.id)
    await sound(db)


async def test_the_newest_open_session_is_found_behind_closed_ones(db: Persistence) -> None:
    ids = [(await db.sessions.create(user_id="u")).id for _ in range(5)]
    other = await db.sessions.create(user_id="v")
    for id_ in ids[2:]:
        await db.sessions.close(id_)

    found = await db.sessions.active("u")

    assert found is not None and found.id == ids[1]
    assert await db.sessions.active("nobody") is None
    again = await db.sessions.active("v", create={"title": "not made"})
    assert again is not None and (again.id, again.title) == (other.id, None)


async def test_an_open_session_is_created_where_there_is_none(db: Persistence, driver: Any, sound: Sound) -> None:
    before = set(await driver.everything())

    made = await db.sessions.active("u", create={"title": "T", "metadata": {"n": 1}})
    assert made is not None and (made.user_id, made.title, made.metadata) == ("u", "T", {"n": 1})
    assert await db.sessions.active("u", create=True) == made
    await db.sessions.close(made.id)
    second = await db.sessions.active("u", create=True)
    assert second is not None and second.id != made.id
    await sound(db)

    await db.sessions.delete(made.id)
    await db.sessions.delete(second.id)
    assert set(await driver.everything()) == before
    third = await db.sessions.active("u", create={"id": "mine"})
    assert third is not None and third.id == "mine"
    await db.sessions.close("mine")
    with pytest.raises(UniqueConflict):
        await db.sessions.active("u", create={"id": "mine"})
    with pytest.raises(BadRequest):
        await db.sessions.active("u", create={"user_id": "v"})
    with pytest.raises(BadRequest):
        await db.sessions.active("u", create={"active": False})
    with pytest.raises(BadRequest, match="fields"):
        await db.sessions.active("u", create={"colour": "red"})
    assert [s.id for s in await db.sessions.find(user_id="u")] == ["mine"]


async def one_for_all(where: Driver | str, rounds: int = 6) -> None:
    async with contextlib.AsyncExitStack() as stack:
        dbs = [await stack.enter_async_context(kvpersist.open(where)) for _ in range(4)]
        for _ in range(rounds):
            found = await asyncio.gather(
                *[db.sessions.active("u", create={"title": "t"}) for db in dbs for _ in (1, 2)]
            )
            ids = {session.id for session in found if session is not None}
            assert len(ids) == 1
            assert [s.id for s in await dbs[0].sessions.find(user_id="u") if s.active] == list(ids)
            await dbs[0].sessions.close(ids.pop())
        found = await dbs[0].sessions.find(user_id="u")
        assert len(found) == rounds
        for session in found:
            await dbs[0].sessions.delete(session.id)


async def test_all_who_ask_at_once_get_one_session(driver: Driver) -> None:
    await one_for_all(driver)


@pytest.mark.parametrize("server", ["filesystem", "redis", "postgres", "mysql", "mongo"])
async def test_all_who_ask_at_once_get_one_session_on_a_server(
    server: str, service: Callable[[str], dict[str, str]], tmp_path: Path
) -> None:
    await one_for_all(empty_store(server, tmp_path, service), rounds=3)


async def test_all_who_ask_at_once_get_one_session_where_deletes_have_no_conditions() -> None:
    await one_for_all(FaultyDriver(MemoryDriver(), without={*ORDERED, "conditional_delete"}))


@pytest.mark.parametrize("without", [set[str](), ORDERED], ids=["memory", "ordered"])
async def test_a_find_or_create_killed_anywhere_is_taken_up_by_the_next(without: set[str], sound: Sound) -> None:
    for nth in range(1, 60):
        disk = MemoryDriver()
        dying = FaultyDriver(disk, without=without)
        victim = await kvpersist.open(dying)
        dying.crash(nth)
        with contextlib.suppress(Crashed):
            await victim.sessions.active("u", create=True)
        async with kvpersist.open(FaultyDriver(disk, without=without)) as db:
            found = await asyncio.gather(*[db.sessions.active("u", create=True) for _ in range(3)])
            assert len({session.id for session in found if session is not None}) == 1
            assert await db.sessions.count(user_id="u") == 1
            await sound(db)
        if not dying.crashed:
            return
    pytest.fail("it never ends")


@pytest.mark.parametrize("without", [set[str](), ORDERED], ids=["memory", "ordered"])
async def test_old_sessions_are_deleted_with_all_they_have(without: set[str], sound: Sound) -> None:
    clock = ManualClock()
    async with kvpersist.open(FaultyDriver(MemoryDriver(), without=without), clock=clock) as db:
        for n in range(4):
            await db.sessions.create(id=f"s{n}", user_id="u" if n % 2 else "v", active=n < 2)
            await db.messages.append(f"s{n}", Message("user", "x"))
            clock.advance(3600)
        await db.messages.append("s0", Message("user", "late"))

        async def ids() -> list[str]:
            return sorted([s.id async for s in db.sessions.iterate()])

        assert await db.sessions.delete_older(than=timedelta(days=1)) == 0
        assert await db.sessions.delete_older(than=timedelta(hours=2, minutes=30), inactive_only=True) == 0
        assert await db.sessions.delete_older(than=timedelta(minutes=30), user_id="v", inactive_only=True) == 1
        assert await ids() == ["s0", "s1", "s3"]
        assert await db.sessions.delete_older(than=timedelta(hours=2)) == 1
        assert await ids() == ["s0", "s3"]
        assert await db.sessions.delete_older(than=datetime.fromtimestamp(clock(), UTC)) == 1
        assert await ids() == ["s0"]
        await sound(db)
        with pytest.raises(BadRequest):
            await db.sessions.delete_older(than=datetime(2025, 1, 1))  # noqa: DTZ001


async def test_a_session_that_is_written_to_meanwhile_is_not_deleted_by_age() -> None:
    clock = ManualClock()
    faulty = FaultyDriver(MemoryDriver())
    async with kvpersist.open(faulty, clock=clock) as db:
        await db.sessions.create(id="s")
        clock.advance(3600)
        gate = faulty.hold("commit", 1)
        deleting = asyncio.create_task(db.sessions.delete_older(than=timedelta(minutes=1)))
        await gate.reached()
        async with kvpersist.open(faulty.inner, clock=clock) as other:
            await other.messages.append("s", Message("user", "just in time"))
        gate.release()

        assert await deleting == 0
        assert await db.messages.count("s") == 1
