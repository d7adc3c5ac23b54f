"""Deleting a session: nothing of it stays, wherever it is interrupted, and nobody brings it back."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

import kvpersist
from kvpersist import Index, Message, ToolCallPart
from kvpersist.agents.persistence import Persistence
from kvpersist.errors import ParentGone, ReadOnly
from kvpersist.testing.faults import Crashed, FaultyDriver
from kvpersist_drivers.memory import MemoryDriver
from kvpersist_drivers.sqlite import SqliteDriver

Sound = Callable[[Persistence], Awaitable[None]]
ORDERED = {"atomic_batch", "reverse", "deref"}
OPTIONS: dict[str, Any] = {
    "session_indexes": [Index("external_id", unique=True)],
    "message_indexes": [Index("role", order_by="-created_at")],
}


async def fill(db: Persistence, id_: str, turns: int = 4) -> None:
    await db.sessions.create(id=id_, user_id="u", external_id=f"x-{id_}")
    for n in range(turns):
        call = f"c{n}"
        await db.messages.append_many(
            id_,
            [
                Message("user", "q"),
                Message("assistant", tool_calls=[ToolCallPart(call, "t")]),
                Message("tool", "r", tool_call_id=call),
            ],
        )


async def space(driver: Any) -> dict[str, bytes]:
    """Every key but the marks of the store; tombstones are none."""
    found = await driver.scan(None, None, limit=100_000)
    return {
        entry.key: entry.value
        for entry in found
        if entry.value not in (b"", b"done") and not entry.key.startswith("kvpersist:") and "#def" not in entry.key
    }


async def test_everything_of_a_session_goes_and_nothing_else(db: Persistence, driver: Any, sound: Sound) -> None:
    await fill(db, "kept")
    await fill(db, "kept!")
    before = await driver.everything()
    await fill(db, "kept!1", turns=100)

    assert await db.sessions.delete("kept!1") is True
    assert await db.sessions.delete("kept!1") is False
    assert await db.sessions.delete("nobody") is False

    assert await driver.everything() == before
    await sound(db)


async def test_a_session_id_can_be_used_again(db: Persistence, driver: Any, sound: Sound) -> None:
    await fill(db, "s")
    await db.sessions.delete("s")

    await fill(db, "s", turns=1)

    assert await db.messages.count("s") == 3
    assert [m.role async for m in db.messages.iterate("s")] == ["user", "assistant", "tool"]
    assert [call.result for call in await db.tool_calls.of("s")] == ["r"]
    await sound(db)


@pytest.mark.parametrize("without", [set[str](), ORDERED], ids=["memory", "ordered"])
async def test_a_deletion_killed_anywhere_is_finished_by_the_next_open(without: set[str], sound: Sound) -> None:
    for nth in range(1, 500):
        disk = MemoryDriver()
        async with kvpersist.open(FaultyDriver(disk, without=without), **OPTIONS) as db:
            await fill(db, "kept", turns=1)
            before = await space(disk)
            await fill(db, "s", turns=3)
            dying = FaultyDriver(disk, without=without)
            victim = await kvpersist.open(dying, **OPTIONS)
            dying.crash(nth)
            with contextlib.suppress(Crashed):
                await victim.sessions.delete("s")
            begun = await db.sessions.get("s") is None or any("#deleting:s" in key for key in await space(disk))
            async with kvpersist.open(FaultyDriver(disk, without=without), **OPTIONS) as again:
                if begun:
                    assert await again.sessions.get("s") is None
                    if without:  # index entries that a crash left stale are readers' and fsck's to remove
                        for repository in (again._all.sessions, again._all.messages, again._all.tool_calls):
                            assert all(d.kind == "stale" for d in await repository.verify(repair=True))
                    assert await space(disk) == before, f"killed before step {nth}"
                    await fill(again, "s", turns=1)
                await sound(again)
        if not dying.crashed:
            return
    pytest.fail("the deletion never ends")


@pytest.mark.parametrize("without", [set[str](), ORDERED], ids=["memory", "ordered"])
async def test_a_deletion_killed_anywhere_is_finished_before_its_id_is_used_again(
    without: set[str], sound: Sound
) -> None:
    for nth in range(1, 500):
        disk = MemoryDriver()
        async with kvpersist.open(FaultyDriver(disk, without=without)) as db:
            await fill(db, "s", turns=2)
            dying = FaultyDriver(disk, without=without)
            victim = await kvpersist.open(dying)
            dying.crash(nth)
            with contextlib.suppress(Crashed):
                await victim.sessions.delete("s")
            if any("#deleting:s" in key for key in await space(disk)):
                await db.sessions.create(id="s")
                assert await db.messages.count("s") == 0
                assert [m async for m in db.messages.iterate("s")] == await db.tool_calls.of("s") == []
                await db.messages.append("s", Message("user", "new"))
                await sound(db)
        if not dying.crashed:
            return
    pytest.fail("the deletion never ends")


@pytest.mark.parametrize("without", [set[str](), ORDERED], ids=["memory", "ordered"])
async def test_an_append_killed_anywhere_leaves_a_beginning_of_its_turn(without: set[str], sound: Sound) -> None:
    turn = [
        Message("user", "q"),
        Message("assistant", tool_calls=[ToolCallPart("c", "t"), ToolCallPart("d", "t")]),
        Message("tool", "r", tool_call_id="c"),
    ]
    for nth in range(1, 200):
        disk = MemoryDriver()
        async with kvpersist.open(FaultyDriver(disk, without=without), **OPTIONS) as db:
            await fill(db, "s", turns=1)
            dying = FaultyDriver(disk, without=without)
            victim = await kvpersist.open(dying, **OPTIONS)
            dying.crash(nth)
            with contextlib.suppress(Crashed):
                await victim.messages.append_many("s", turn)
            left = [m.role async for m in db.messages.iterate("s")][3:]
            assert left in ([], ["user"], ["user", "assistant"], ["user", "assistant", "tool"])
            if not without:
                assert left in ([], ["user", "assistant", "tool"])
            next_ = await db.messages.append("s", Message("user", "next"))
            assert next_.number == 4 + len(left)
            assert len(await db.tool_calls.of("s")) == 1 + (2 if len(left) > 1 else 0)
            await sound(db)
        if not dying.crashed:
            return
    pytest.fail("the append never ends")


@pytest.mark.parametrize("without", [set[str](), ORDERED], ids=["memory", "ordered"])
async def test_a_creation_killed_anywhere_can_be_made_again(without: set[str], sound: Sound) -> None:
    for nth in range(1, 50):
        disk = MemoryDriver()
        async with kvpersist.open(FaultyDriver(disk, without=without), **OPTIONS) as db:
            await fill(db, "kept", turns=1)
            dying = FaultyDriver(disk, without=without)
            victim = await kvpersist.open(dying, **OPTIONS)
            dying.crash(nth)
            with contextlib.suppress(Crashed):
                await victim.sessions.create(id="s", external_id="x-s")
            if await db.sessions.get("s") is None:
                await db.sessions.create(id="s", external_id="x-s")
            await db.messages.append("s", Message("user", "x"))
            await sound(db)
        if not dying.crashed:
            return
    pytest.fail("the creation never ends")


async def test_a_writer_held_up_during_a_deletion_cannot_bring_the_session_back(
    db: Persistence, driver: Any, sound: Sound
) -> None:
    await fill(db, "kept")
    before = await driver.everything()
    await fill(db, "s")
    slow = FaultyDriver(driver)
    async with kvpersist.open(slow) as other:
        await other.messages.append("s", Message("user", "remembered"))
        gate = slow.hold("commit")
        late = asyncio.create_task(other.messages.append("s", Message("user", "late")))
        await gate.reached()
        await db.sessions.delete("s")
        gate.release()

        with pytest.raises(ParentGone):
            await late

    assert await driver.everything() == before
    await sound(db)


async def test_a_writer_held_up_is_not_taken_in_by_a_new_session_of_the_same_id(
    db: Persistence, driver: Any, sound: Sound
) -> None:
    await fill(db, "s")
    slow = FaultyDriver(driver)
    async with kvpersist.open(slow) as other:
        await other.messages.append("s", Message("user", "remembered"))
        gate = slow.hold("commit")
        late = asyncio.create_task(other.messages.append("s", Message("user", "late")))
        await gate.reached()
        await db.sessions.delete("s")
        await db.sessions.create(id="s")
        gate.release()
        await asyncio.gather(late, return_exceptions=True)

    found = [m.content async for m in db.messages.iterate("s")]
    assert found in ([], ["late"])  # "late" may belong to the new session, never to the old one's places
    assert await db.messages.count("s") == len(found)
    await sound(db)


async def test_appends_and_edits_during_a_deletion_end_one_way_or_the_other(
    db: Persistence, driver: Any, sound: Sound
) -> None:
    await fill(db, "kept", turns=1)
    before = await driver.everything()
    for _ in range(5):
        await fill(db, "s")
        async with kvpersist.open(driver) as other:
            work: list[Awaitable[Any]] = [
                each.messages.append_many("s", [Message("assistant", tool_calls=[ToolCallPart("c", "t")])])
                for each in (db, other)
                for _ in range(4)
            ]
            work.insert(3, db.sessions.delete("s"))
            work.insert(5, other.sessions.delete("s"))
            answers = await asyncio.gather(*work, return_exceptions=True)

        assert {type(answer) for answer in answers} <= {list, bool, ParentGone}
        assert [answer for answer in answers if isinstance(answer, bool)].count(True) == 1
        assert await driver.everything() == before
    await sound(db)


async def test_deletions_begun_elsewhere_are_finished_by_several_at_once(driver: Any, sound: Sound) -> None:
    stopping = FaultyDriver(driver)
    async with kvpersist.open(stopping) as db:
        await fill(db, "s", turns=80)
        stopping.fail("commit", 2, persistent=True)
        with pytest.raises(ConnectionError):
            await db.sessions.delete("s")
        stopping.heal()

    opened = await asyncio.gather(*[kvpersist.open(driver) for _ in range(4)])

    assert await driver.everything() == {}
    await sound(opened[0])


async def test_a_read_only_opening_leaves_a_pending_deletion_to_others(tmp_path: Path) -> None:
    path = tmp_path / "ro.db"
    stopping = FaultyDriver(await SqliteDriver.open(SqliteDriver.Options(path=str(path), durability="normal")))
    async with kvpersist.open(stopping) as db:
        await fill(db, "kept", turns=1)
        await fill(db, "s", turns=1)
        stopping.fail("commit", 2, persistent=True)
        with pytest.raises(ConnectionError):
            await db.sessions.delete("s")
    await stopping.close()

    async with kvpersist.open(f"sqlite:///{path}?kv.mode=ro") as db:
        assert [session.id for session in await db.sessions.list()] == ["kept"]
        assert await db.messages.count("kept") == 3
        with pytest.raises(ReadOnly):
            await db.messages.append("kept", Message("user", "x"))
    async with kvpersist.open(f"sqlite:///{path}") as db:
        assert [key async for key in db.store.keys("kv:") if "!" in key and "kept" not in key] == []
