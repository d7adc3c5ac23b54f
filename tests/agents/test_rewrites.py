"""Changing what was said: truncate, clear, delete by age, replace all; what it writes, and what a crash leaves."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any

import pytest
from msgspec.structs import replace

import kvpersist
from kvpersist import Index, Message, ToolCallPart
from kvpersist.agents.conversations import rewrites
from kvpersist.agents.persistence import Persistence
from kvpersist.driver import Delete, Put
from kvpersist.errors import BadRequest, BadTransition, ParentGone, Unencodable, UniqueConflict
from kvpersist.testing.faults import Crashed, FaultyDriver
from kvpersist_drivers.memory import MemoryDriver

START = datetime(2025, 3, 1, 12, tzinfo=UTC)
Sound = Callable[[Persistence], Awaitable[None]]
ORDERED = {"atomic_batch", "reverse", "deref"}


@pytest.fixture
async def session(db: Persistence) -> str:
    return (await db.sessions.create(user_id="u1")).id


def asks(*ids: str) -> Message:
    return Message("assistant", tool_calls=[ToolCallPart(id_, "t", {"of": id_}) for id_ in ids])


def answers(id_: str, content: Any = "r") -> Message:
    return Message("tool", content, tool_call_id=id_)


def turn(n: int) -> list[Message]:
    return [Message("user", f"q{n}"), asks(f"c{n}"), answers(f"c{n}"), Message("assistant", f"a{n}")]


async def said(db: Persistence, session: str) -> list[tuple[int, str, Any]]:
    return [(m.number, m.role, m.content) async for m in db.messages.iterate(session)]


async def states(db: Persistence, session: str) -> list[tuple[int, int, str, int | None]]:
    return [(c.number, c.position, c.state, c.result_number) for c in await db.tool_calls.of(session)]


async def everything_said(driver: Any) -> dict[str, bytes]:
    """The whole key space but for the stats, in which rewritings are counted where batches are not atomic."""
    return {key: value for key, value in (await driver.everything()).items() if "#stat" not in key}


def written(driver: Any) -> list[str]:
    """The keys of records, stats and index entries that were put or deleted, definitions left out."""
    return sorted(op.key for batch in driver.batches for op in batch.ops if isinstance(op, (Put, Delete)))


async def test_truncating_keeps_the_message_and_what_is_before_it(db: Persistence, session: str, sound: Sound) -> None:
    stored = await db.messages.append_many(session, [*turn(1), *turn(2)])

    assert await db.messages.truncate(session, after=stored[3].id) == 4

    assert await said(db, session) == [(n, m.role, m.content) for n, m in enumerate(turn(1), 1)]
    assert await states(db, session) == [(2, 0, "completed", 3)]
    await sound(db)
    assert await db.messages.truncate(session, after=4) == 0
    assert (await db.messages.append(session, Message("user", "new"))).number == 9
    await sound(db)


async def test_a_call_whose_answer_was_cut_off_waits_again(db: Persistence, session: str, sound: Sound) -> None:
    await db.messages.append_many(session, [asks("a", "b"), answers("a"), answers("b", "old")])

    assert await db.messages.truncate(session, after=2) == 1

    assert await states(db, session) == [(1, 0, "completed", 2), (1, 1, "pending", None)]
    await db.messages.append(session, answers("b", "new"))
    assert [call.result for call in await db.tool_calls.of(session)] == ["r", "new"]
    await sound(db)


async def test_truncating_takes_calls_that_were_recorded_behind_the_message(
    db: Persistence, session: str, sound: Sound
) -> None:
    async with db.tool_calls.record(session, "first"):
        pass
    await db.messages.append(session, Message("user", "1"))
    async with db.tool_calls.record(session, "kept"):
        pass
    await db.messages.append(session, Message("user", "2"))
    async with db.tool_calls.record(session, "gone"):
        pass

    await db.messages.truncate(session, after=1)

    assert [call.name for call in await db.tool_calls.of(session)] == ["first", "kept"]
    assert await db.messages.truncate(session, after=0) == 1
    assert await db.tool_calls.of(session) == []
    await sound(db)


async def test_clearing_leaves_an_empty_session_that_goes_on(
    db: Persistence, driver: Any, session: str, sound: Sound
) -> None:
    empty = await driver.everything()
    await db.messages.append_many(session, turn(1))
    async with db.tool_calls.record(session, "t"):
        pass

    assert await db.messages.clear(session) == 4

    assert {key for key in await driver.everything() if "#updated" not in key} == {
        key for key in empty if "#updated" not in key
    }
    assert await db.messages.clear(session) == 0
    async with db.tool_calls.record(session, "again"):  # where a call was before
        pass
    assert [m.number for m in await db.messages.append_many(session, turn(2))] == [5, 6, 7, 8]
    await sound(db)


async def test_messages_are_deleted_by_age(db: Persistence, session: str, sound: Sound) -> None:
    for n in (1, 2, 3):
        await db.messages.append_many(session, [replace(m, created_at=START + timedelta(days=n)) for m in turn(n)])

    assert await db.messages.delete_older(session, than=START + timedelta(days=2)) == 4
    assert [number for number, _, _ in await said(db, session)] == list(range(5, 13))
    assert await states(db, session) == [(6, 0, "completed", 7), (10, 0, "completed", 11)]

    assert await db.messages.delete_older(session, than=timedelta(days=1)) == 8
    assert await db.messages.delete_older(session, than=timedelta(0)) == 0
    await sound(db)


async def test_more_than_a_batch_is_removed_and_written_in_batches(
    db: Persistence, driver: Any, session: str, sound: Sound, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rewrites, "LONGEST", 5)
    await db.messages.append_many(session, [m for n in range(8) for m in turn(n)])

    assert await db.messages.truncate(session, after=15) == 17
    assert [number for number, _, _ in await said(db, session)] == list(range(1, 16))
    await sound(db)

    wanted = [Message("user", f"n{n}") for n in range(12)]
    stands = await db.messages.replace_all(session, wanted)
    assert [m.content for m in stands] == [m.content for m in wanted]
    assert await said(db, session) == [(m.number, m.role, m.content) for m in stands]
    assert [m.number for m in stands] == list(range(33, 45))
    await sound(db)
    assert await db.messages.clear(session) == 12
    await sound(db)


async def test_replacing_by_the_same_messages_writes_nothing(
    db: Persistence, driver: Any, session: str, sound: Sound
) -> None:
    await db.messages.append_many(session, [*turn(1), *turn(2)])
    before, counts = await everything_said(driver), await db.sessions.stat(session)
    stored = await db.messages.range(session)
    driver.clear()

    assert await db.messages.replace_all(session, stored) == stored
    assert await db.messages.replace_all(session, [*turn(1), *turn(2)]) == stored

    assert [key for key in written(driver) if "#stat" not in key] == []
    assert await everything_said(driver) == before
    assert await db.sessions.stat(session) == counts
    await sound(db)


@pytest.mark.parametrize("named", [True, False], ids=["by id", "by content"])
async def test_a_new_tail_costs_the_new_tail(
    db: Persistence, driver: Any, session: str, sound: Sound, named: bool
) -> None:
    await db.messages.append_many(session, [m for n in range(50) for m in turn(n)])
    known = await db.messages.range(session, limit=1_000) if named else [m for n in range(50) for m in turn(n)]
    driver.clear()

    stands = await db.messages.replace_all(session, [*known, *turn(50)])

    keys = {key for key in written(driver) if "#stat" not in key and "#updated" not in key}
    # four messages and their ids, one call and its two index entries (moved once on its answer)
    assert len(keys) <= 4 * 2 + 5
    assert [m.number for m in stands] == list(range(1, 205))
    assert await db.messages.range(session, limit=1_000) == stands
    await sound(db)


async def test_one_changed_message_is_written_in_place(
    db: Persistence, driver: Any, session: str, sound: Sound
) -> None:
    await db.messages.append_many(session, [*turn(1), *turn(2)])
    stored = await db.messages.range(session)
    driver.clear()

    stands = await db.messages.replace_all(session, [replace(stored[0], content="edited"), *stored[1:]])

    assert [key.split(":")[1] for key in written(driver) if "#stat" not in key and "#updated" not in key] == ["message"]
    assert [m.content for m in stands][:2] == ["edited", None]
    assert [m.number for m in await db.messages.range(session)] == list(range(1, 9))
    await sound(db)


async def test_what_is_put_in_between_moves_what_follows_to_new_numbers(
    db: Persistence, session: str, sound: Sound
) -> None:
    stored = await db.messages.append_many(session, [*turn(1), *turn(2)])

    stands = await db.messages.replace_all(session, [*stored[:4], Message("system", "summary"), *stored[4:]])

    assert [m.number for m in stands] == [1, 2, 3, 4, 9, 10, 11, 12, 13]
    assert [m.id for m in stands if m.role != "system"] == [m.id for m in stored]
    assert [m.created_at for m in stands if m.role != "system"] == [m.created_at for m in stored]
    assert await states(db, session) == [(2, 0, "completed", 3), (11, 0, "completed", 12)]
    assert await db.messages.get(stored[5].id) == stands[6]
    await sound(db)


async def test_a_moved_call_keeps_what_is_known_of_it(db: Persistence, session: str, sound: Sound) -> None:
    first, asking = await db.messages.append_many(session, [Message("user", "q"), asks("c")])
    await db.tool_calls.require_approval(session, 2, 0)
    await db.tool_calls.approve(session, 2, 0, by="ann")
    async with db.tool_calls.record(session, "aside"):
        pass

    await db.messages.replace_all(session, [first, Message("system", "new"), asking])

    call, aside = await db.tool_calls.of(session)
    assert (call.number, call.position, call.state) == (4, 0, "approved")
    assert call.approval is not None and call.approval.decided_by == "ann"
    assert (aside.number, aside.position, aside.name, aside.state) == (4, 1, "aside", "completed")
    await db.messages.append(session, answers("c"))
    assert await states(db, session) == [(4, 0, "completed", 5), (4, 1, "completed", None)]
    await sound(db)


async def test_an_answer_in_the_new_tail_joins_a_call_that_stays(db: Persistence, session: str, sound: Sound) -> None:
    stored = await db.messages.append_many(session, [asks("a", "b"), answers("a", "old")])

    await db.messages.replace_all(session, [stored[0], answers("b", "B"), answers("a", "A")])

    assert [(c.call_id, c.result, c.result_number) for c in await db.tool_calls.of(session)] == [
        ("a", "A", 4),
        ("b", "B", 3),
    ]
    await sound(db)


async def test_a_new_message_that_says_what_a_given_one_says_is_another(
    db: Persistence, session: str, sound: Sound
) -> None:
    [first, second] = await db.messages.append_many(session, [Message("user", "tea"), Message("user", "milk")])

    stands = await db.messages.replace_all(session, [Message("user", "tea"), first, second])

    assert [message.content for message in stands] == ["tea", "tea", "milk"]
    assert [message.id for message in stands][1:] == [first.id, second.id]
    await sound(db)


async def test_replacing_by_nothing_clears(db: Persistence, session: str, sound: Sound) -> None:
    await db.messages.append_many(session, turn(1))

    assert await db.messages.replace_all(session, []) == []
    assert await said(db, session) == []
    await sound(db)


@pytest.mark.parametrize("other", [0, 0.0, False, "", [], None, {}])
async def test_equal_is_not_what_python_takes_for_equal(db: Persistence, session: str, other: Any) -> None:
    values: list[Any] = [0, 0.0, False, "", [], None, {}]
    [stored] = await db.messages.append_many(session, [Message("user", values[0])])

    await db.messages.replace_all(session, [replace(stored, content=other)])

    [(_, _, content)] = await said(db, session)
    assert repr(content) == repr(other)


async def test_bad_lists_are_refused_and_nothing_changes(
    db: Persistence, driver: Any, session: str, sound: Sound
) -> None:
    other = (await db.sessions.create()).id
    [taken] = await db.messages.append_many(other, [Message("user", "x")])
    stored = await db.messages.append_many(session, turn(1))
    before = await said(db, session)

    with pytest.raises(UniqueConflict):
        await db.messages.replace_all(session, [*stored, Message("user", "new", id="n"), Message("user", "2", id="n")])
    with pytest.raises(UniqueConflict):
        await db.messages.replace_all(session, [stored[0], Message("user", "new", id=taken.id)])
    with pytest.raises(BadRequest, match="belongs to session"):
        await db.messages.replace_all(session, [taken])
    with pytest.raises(BadRequest, match="unknown role"):
        await db.messages.replace_all(session, [Message("robot", "x")])
    with pytest.raises(Unencodable):
        await db.messages.replace_all(session, [stored[0], Message("user", {1: 2})])
    with pytest.raises(BadRequest, match="no message"):
        await db.messages.truncate(session, after=taken.id)
    with pytest.raises(BadRequest, match="no message"):
        await db.messages.truncate(session, after="nobody")
    with pytest.raises(BadRequest, match="number"):
        await db.messages.truncate(session, after=-1)
    with pytest.raises(BadRequest, match="negative"):
        await db.messages.delete_older(session, than=timedelta(days=-1))
    with pytest.raises(BadRequest, match="time zone"):
        await db.messages.delete_older(session, than=datetime(2025, 1, 1))  # noqa: DTZ001

    assert await said(db, session) == before
    await sound(db)


async def test_nothing_is_rewritten_in_a_session_that_is_gone(db: Persistence, driver: Any, session: str) -> None:
    await db.messages.append_many(session, turn(1))
    await db.sessions.delete(session)
    before = await driver.everything()

    for call in (
        db.messages.truncate(session, after=1),
        db.messages.clear(session),
        db.messages.delete_older(session, than=timedelta(0)),
        db.messages.replace_all(session, turn(2)),
        db.tool_calls.replace_all(session, []),
        db.messages.repair(session),
        db.messages.validate(session),
        db.sessions.clear(session),
    ):
        with pytest.raises(ParentGone):
            await call
    assert await driver.everything() == before


@pytest.mark.parametrize("without", [set[str](), ORDERED], ids=["memory", "ordered"])
@pytest.mark.parametrize("act", ["truncate", "replace"])
async def test_a_rewriting_killed_anywhere_leaves_counts_that_are_true(
    without: set[str], act: str, sound: Sound
) -> None:
    indexes: dict[str, Any] = {"message_indexes": [Index("role", order_by="-created_at")]}
    for nth in range(1, 300):
        disk = MemoryDriver()
        async with kvpersist.open(FaultyDriver(disk, without=without), **indexes) as db:
            await db.sessions.create(id="s")
            stored = await db.messages.append_many("s", [asks("a", "b"), answers("a"), *turn(2)])
            dying = FaultyDriver(disk, without=without)
            victim = await kvpersist.open(dying, **indexes)
            dying.crash(nth)
            with contextlib.suppress(Crashed):
                if act == "truncate":
                    await victim.messages.truncate("s", after=1)
                else:
                    await victim.messages.replace_all("s", [stored[0], *turn(3)])
            left = [m.content async for m in db.messages.iterate("s")]
        later = time.time() + 60  # nobody waits for the dead any more
        async with kvpersist.open(FaultyDriver(disk, without=without), clock=partial(float, later), **indexes) as again:
            old, new = [m.content for m in stored], [None, *(m.content for m in turn(3))]
            if without:
                assert left[: len(left)] in [old[:n] for n in range(1, 7)] + [new[:n] for n in range(1, 6)]
            else:
                assert left in ([old, old[:1]] if act == "truncate" else [old, new])
            await again.messages.append("s", Message("user", "next"))
            await sound(again)
        if not dying.crashed:
            return
    pytest.fail("it never ends")


@pytest.mark.parametrize("act", ["truncate", "approve"])
async def test_what_a_writer_left_uncounted_when_it_died_is_counted_by_one_that_knew_the_session(
    act: str, sound: Sound
) -> None:
    for nth in range(1, 100):
        disk = MemoryDriver()
        async with kvpersist.open(FaultyDriver(disk, without=ORDERED)) as db:
            await db.sessions.create(id="s")
            await db.messages.append_many("s", [asks("a"), Message("user", "q")])
            dying = FaultyDriver(disk, without=ORDERED)
            victim = await kvpersist.open(dying)
            dying.crash(nth)
            with contextlib.suppress(Crashed):
                await victim.messages.append_many("s", [asks("b"), answers("b")])

            if act == "truncate":
                await db.messages.truncate("s", after=1)
            else:
                with contextlib.suppress(BadTransition):  # it was answered, too
                    await db.tool_calls.approve("s", 3, 0)

            await sound(db)
        if not dying.crashed:
            return
    pytest.fail("it never came to its end")


async def test_a_call_changed_by_a_writer_that_died_is_counted_in_its_state(sound: Sound) -> None:
    for nth in range(1, 100):
        disk = MemoryDriver()
        async with kvpersist.open(FaultyDriver(disk, without=ORDERED)) as db:
            await db.sessions.create(id="s")
            await db.messages.append("s", asks("a"))
            dying = FaultyDriver(disk, without=ORDERED)
            victim = await kvpersist.open(dying)
            dying.crash(nth)
            with contextlib.suppress(Crashed):
                await victim.tool_calls.approve("s", 1, 0)
                async with victim.tool_calls.record("s", "aside", {}) as call:
                    call.result = 1
        later = time.time() + 60  # nobody waits for the dead any more
        async with kvpersist.open(FaultyDriver(disk, without=ORDERED), clock=partial(float, later)) as again:
            await again.messages.append("s", Message("user", "next"))
            await sound(again)
        if not dying.crashed:
            return
    pytest.fail("it never came to its end")
