"""Forks of agents: with everything, as far as a snapshot, seen whole or not at all."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
import pytest
from agent_state import ORDERED, fill, kept_of, sound_state, space

import kvpersist
from kvpersist import (
    Agent,
    Bookmark,
    HistoryWindow,
    Media,
    Message,
    NewEvent,
    Persistence,
    Snapshot,
    ToolCallPart,
)
from kvpersist.errors import BadRequest, ParentGone
from kvpersist.testing.faults import Crashed, FaultyDriver
from kvpersist_drivers.memory import MemoryDriver

Sound = Callable[[Persistence], Awaitable[None]]
BEGIN = datetime(2026, 1, 1, tzinfo=UTC)


class Clock:
    """Seconds since 1970, as far as it was moved; no two readings are the same."""

    def __init__(self) -> None:
        self.now = BEGIN.timestamp()

    def __call__(self) -> float:
        self.now += 0.001
        return self.now


async def test_a_fork_has_everything_of_its_parent_under_ids_of_its_own(
    db: Persistence, driver: Any, sound: Sound
) -> None:
    await fill(db, "other")
    await fill(db, "a")
    before = await driver.everything()

    [fork] = await db.agents.fork("a")

    assert {key: value for key, value in (await driver.everything()).items() if key in before} == before
    assert fork == await db.agents.get(fork.id)
    assert fork.id.startswith("agt-")
    assert fork.lineage == ["a"]
    assert (fork.template_id, fork.breakpoint, fork.counters, fork.metadata) == (
        "coder",
        "pre_model",
        {"steps": 2},
        {"colour": "red"},
    )
    assert await kept_of(db, fork.id) == await kept_of(db, "a")
    [session] = await db.sessions.find(agent_id=fork.id)
    assert {snapshot.session_id for snapshot in await db.snapshots.find(agent_id=fork.id)} == {session.id}
    assert session.id != "session of a"
    assert (await db.agents.stats(fork.id)) == (await db.agents.stats("a"))
    assert [call.result for call in await db.tool_calls.of(session.id)] == [0, 0]
    await sound(db)
    await sound_state(db)


async def test_a_fork_at_a_snapshot_ends_where_that_was_taken(db: Persistence, sound: Sound) -> None:
    await fill(db, "a")

    [fork] = await db.agents.fork("a", at="sfp-3")

    assert (fork.breakpoint, fork.last_safe_point, fork.bookmark) == ("ready", 3, Bookmark(2))
    kept = await kept_of(db, fork.id)
    assert kept["snapshots"] == [("sfp-3", 3, Bookmark(2))]
    assert [event for event, _, _ in kept["events"]] == [{"n": 1}, {"done": 1}]
    assert kept["sessions"] == [[("user", "question 1"), ("assistant", None), ("tool", 0)]]
    whole = await kept_of(db, "a")
    for what in ("todos", "windows", "compressions", "files", "media"):
        assert kept[what] == whole[what]
    [snapshot] = await db.snapshots.find(agent_id=fork.id)
    assert [message.content for message in await db.snapshots.messages(snapshot)] == ["question 1", None, 0]
    await sound(db)
    await sound_state(db)


async def test_forks_of_one_agent_never_meet(db: Persistence, sound: Sound) -> None:
    await fill(db, "a")

    made = [*await db.agents.fork("a", count=3), *await db.agents.fork("a", at="sfp-6", count=2)]
    [grandchild] = await db.agents.fork(made[0].id)
    at_once = await asyncio.gather(*[db.agents.fork("a") for _ in range(2)])
    made += [fork for [fork] in at_once]

    assert len({"a", grandchild.id, *(fork.id for fork in made)}) == 9
    assert {tuple(fork.lineage) for fork in made} == {("a",)}
    assert grandchild.lineage == ["a", made[0].id]
    whole = await kept_of(db, "a")
    for fork in (*made, grandchild):
        assert await kept_of(db, fork.id) == whole
    assert await db.agents.count() == 9
    await sound(db)
    await sound_state(db)


async def test_a_fork_lives_without_its_parent_and_leaves_no_key_itself(db: Persistence, driver: Any) -> None:
    await fill(db, "a")
    before = await driver.everything()
    whole = await kept_of(db, "a")
    [gone] = await db.agents.fork("a")
    assert await db.agents.delete(gone.id)
    assert await driver.everything() == before

    [fork] = await db.agents.fork("a")
    await db.agents.delete("a")

    assert await kept_of(db, fork.id) == whole
    await sound_state(db)
    await db.agents.delete(fork.id)
    assert await driver.everything() == {}


async def test_what_cannot_be_forked_is_refused_and_leaves_nothing(db: Persistence, driver: Any) -> None:
    await fill(db, "a")
    before = await driver.everything()

    with pytest.raises(ParentGone, match="nobody"):
        await db.agents.fork("nobody")
    with pytest.raises(ParentGone, match="nothing"):
        await db.agents.fork("a", at="nothing")
    with pytest.raises(BadRequest, match="count"):
        await db.agents.fork("a", count=0)

    assert await driver.everything() == before


async def test_sessions_that_a_snapshot_does_not_name_are_forked_as_far_as_its_time() -> None:
    clock = Clock()
    async with kvpersist.open(MemoryDriver(), clock=clock) as db:
        await db.agents.create(id="a")
        for id_ in ("named", "long", "silent"):
            await db.sessions.create(id=id_, agent_id="a", title=id_)
        await db.messages.append_many("named", [Message("user", n) for n in range(3)])
        await db.messages.append_many("long", [Message("user", n) for n in range(4)])
        await db.snapshots.save(Snapshot(agent_id="a", id="here", session_id="named", number=2))
        clock.now += 60
        await db.messages.append_many("long", [Message("user", n) for n in range(4, 600)])
        await db.messages.append("silent", Message("user", "late"))
        await db.sessions.create(id="young", agent_id="a", title="young")

        [fork] = await db.agents.fork("a", at="here")

        said = {
            session.title: [message.content async for message in db.messages.iterate(session.id)]
            async for session in db.sessions.iterate(agent_id=fork.id)
        }
        assert said == {"named": [0, 1], "long": [0, 1, 2, 3], "silent": []}


async def test_a_snapshot_with_its_own_copy_becomes_a_session_of_the_fork(db: Persistence) -> None:
    await db.agents.create(id="a", template_id="t")
    await db.sessions.create(id="s", agent_id="a")
    await db.messages.append("s", Message("user", "elsewhere"))
    copy = [
        Message("user", "q", id="m1", session_id="gone", number=7, created_at=BEGIN),
        Message("assistant", tool_calls=[ToolCallPart("c", "t")], created_at=BEGIN),
        Message("tool", False, tool_call_id="c", created_at=BEGIN),
    ]
    await db.snapshots.save(Snapshot(agent_id="a", id="x", messages=copy))

    forks = await db.agents.fork("a", at="x", count=2)

    for fork in forks:
        [session] = await db.sessions.find(agent_id=fork.id)
        found = [message async for message in db.messages.iterate(session.id)]
        assert [(m.role, m.content, m.created_at) for m in found] == [(m.role, m.content, BEGIN) for m in copy]
        assert [call.result for call in await db.tool_calls.of(session.id)] == [False]
        assert session.template_id == "t"


async def test_events_come_along_in_order_by_bookmark_or_time() -> None:
    clock = Clock()
    async with kvpersist.open(MemoryDriver(), clock=clock) as db:
        await db.agents.create(id="a")
        await db.events.publish_many("a", [NewEvent(n, bookmark={"seq": n, "timestamp": 0}) for n in range(1_200)])
        await db.events.publish("a", "before")
        await db.snapshots.save(Snapshot(agent_id="a", id="x", bookmark=Bookmark(700)))
        await db.snapshots.save(Snapshot(agent_id="a", id="y"))
        clock.now += 1
        await db.events.publish("a", "after")
        await db.events.publish("a", "out of order", bookmark={"seq": 3, "timestamp": 0, "again": True})

        [whole], [cut], [timed] = [await db.agents.fork("a", at=at) for at in (None, "x", "y")]

        async def events(agent: Agent) -> list[Any]:
            return [entry.event for entry in await db.events.read(agent.id, limit=10_000)]

        assert await events(whole) == [*range(1_200), "before", "after", "out of order"]
        assert await events(cut) == [*range(701), "before", "out of order"]
        assert await events(timed) == [*range(1_200), "before"]


async def test_a_fork_is_not_seen_before_all_of_it_is_there(db: Persistence, driver: Any) -> None:
    await fill(db, "a")
    slow = FaultyDriver(driver)
    async with kvpersist.open(slow) as maker:
        seen: set[int] = set()
        task = asyncio.ensure_future(maker.agents.fork("a", count=2))
        for _ in range(500):
            gate = slow.hold("commit")
            waiting = asyncio.ensure_future(gate.reached())
            await asyncio.wait([waiting, task], return_when=asyncio.FIRST_COMPLETED)
            agents = await db.agents.list()
            seen.add(len(agents))
            assert len(agents) == await db.agents.count() == await db.agents.count(id_prefix="")
            assert len(agents) == len([agent async for agent in db.agents.iterate()])
            for hidden in [agent async for agent in db._forks._parents.repository.iterate()]:
                shown = hidden.id in {agent.id for agent in agents}
                assert await db.agents.exists(hidden.id) is shown
                assert (await db.agents.update(hidden.id, lambda agent: agent) is not None) is shown
                assert (await db.agents.stats(hidden.id) is not None) is shown
                if shown:
                    assert (await kept_of(db, hidden.id))["todos"] == (await kept_of(db, "a"))["todos"]
            gate.release()
            if task.done():
                waiting.cancel()
                break
        assert len(await task) == 2
    assert 1 in seen and seen <= {1, 2, 3}


@pytest.mark.parametrize("without", [set[str](), ORDERED], ids=["memory", "ordered"])
async def test_a_fork_killed_anywhere_leaves_a_whole_one_or_none(without: set[str], sound: Sound) -> None:
    outcomes: set[bool] = set()
    for nth in range(1, 500):
        disk, clock = MemoryDriver(), Clock()
        async with kvpersist.open(FaultyDriver(disk, without=without), clock=clock) as db:
            await fill(db, "a", turns=1)
            before = await space(disk)
            whole = await kept_of(db, "a")
            dying = FaultyDriver(disk, without=without)
            victim = await kvpersist.open(dying, clock=clock)
            dying.crash(nth)
            with contextlib.suppress(Crashed):
                await victim.agents.fork("a")
            forks = [agent async for agent in db.agents.iterate() if agent.id != "a"]
            outcomes.add(bool(forks))
            for fork in forks:
                assert await kept_of(db, fork.id) == whole

            async with kvpersist.open(FaultyDriver(disk, without=without), clock=clock) as soon:
                assert [agent.id async for agent in soon.agents.iterate()] == [*(f.id for f in forks), "a"]
            clock.now += 601
            async with kvpersist.open(FaultyDriver(disk, without=without), clock=clock) as later:
                for fork in forks:
                    assert await kept_of(later, fork.id) == whole
                    assert await later.agents.delete(fork.id)
                if without:  # index entries that a crash left stale are readers' and fsck's to remove
                    every, named = later._all, later._family.repositories.values()
                    for repository in (every.sessions, every.messages, every.tool_calls, *named):
                        assert all(d.kind == "stale" for d in await repository.verify(repair=True))
                left = {
                    key: value for key, value in (await space(disk)).items() if "#updated:" not in key or key in before
                }
                assert left == before, f"killed before step {nth}"
                await sound(later)
                await sound_state(later)
        if not dying.crashed:
            assert outcomes == {False, True}
            return
    pytest.fail("the fork never ends")


async def test_a_fork_that_fails_is_removed_at_once(db: Persistence, driver: Any) -> None:
    await fill(db, "a")
    before = await driver.everything()
    for nth in (3, 8, 15):
        failing = FaultyDriver(driver)
        async with kvpersist.open(failing) as maker:
            failing.fail("commit", nth)
            with pytest.raises(ConnectionError):
                await maker.agents.fork("a", count=2)

        assert await driver.everything() == before


async def test_a_fork_that_is_given_up_is_removed_at_once(db: Persistence, driver: Any) -> None:
    await fill(db, "a")
    before = await driver.everything()
    slow = FaultyDriver(driver)
    async with kvpersist.open(slow) as maker:
        task = asyncio.ensure_future(maker.agents.fork("a"))
        for _ in range(4):
            gate = slow.hold("commit")
            await gate.reached()
            gate.release()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    assert await driver.everything() == before


@pytest.mark.parametrize("step", [1, 4, 7, 10])
async def test_a_maker_that_was_held_up_too_long_fails_and_leaves_nothing(driver: Any, step: int) -> None:
    clock = Clock()
    slow = FaultyDriver(driver)
    async with kvpersist.open(driver, clock=clock) as db, kvpersist.open(slow, clock=clock) as maker:
        await fill(db, "a")
        before = await driver.everything()
        task = asyncio.ensure_future(maker.agents.fork("a"))
        for _ in range(step):
            gate = slow.hold("commit")
            await gate.reached()
            gate.release()
        gate = slow.hold("commit")
        await gate.reached()
        clock.now += 601
        async with kvpersist.open(driver, clock=clock):
            assert await driver.everything() == before
        gate.release()

        with pytest.raises(ParentGone):
            await task

        assert await driver.everything() == before


async def test_the_state_of_a_fork_changes_alone(db: Persistence) -> None:
    await fill(db, "a")
    [fork] = await db.agents.fork("a")
    whole = await kept_of(db, "a")

    await db.todos.save(fork.id, [])
    await db.windows.save(HistoryWindow(agent_id=fork.id))
    await db.media.save(Media(agent_id=fork.id, key="sha256-0", size=9))
    await db.snapshots.delete((fork.id, "sfp-3"))
    await db.events.publish(fork.id, "more")
    await db.agents.update(fork.id, lambda agent: msgspec.structs.replace(agent, counters={}))
    [session] = await db.sessions.find(agent_id=fork.id)
    await db.messages.append(session.id, Message("user", "another way"))

    assert await kept_of(db, "a") == whole
    parent = await db.agents.get("a")
    assert parent is not None and parent.counters == {"steps": 2}
    assert parent.updated_at is not None and parent.updated_at - (parent.created_at or BEGIN) < timedelta(seconds=60)
