"""Agents: their ids, lists, statistics, and deletion with everything that is theirs."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
import pytest
from agent_state import ORDERED, fill, kept_of, sound_state, space

import kvpersist
from kvpersist import (
    Agent,
    Bookmark,
    Compression,
    HistoryWindow,
    Media,
    Message,
    Persistence,
    RecoveredFile,
    Snapshot,
    Todo,
    ToolCallPart,
    at_least,
    between,
)
from kvpersist.agents.state.agents import BREAKPOINTS, new_agent_id
from kvpersist.errors import BadRequest, KeyTooLong, ParentGone, UniqueConflict
from kvpersist.testing.faults import Crashed, FaultyDriver
from kvpersist_drivers.memory import MemoryDriver

Sound = Callable[[Persistence], Awaitable[None]]
BEGIN = datetime(2026, 1, 1, tzinfo=UTC)


def test_ids_made_at_once_differ_and_sort_as_they_were_made() -> None:
    ids = [new_agent_id() for _ in range(5_000)]

    assert len(set(ids)) == 5_000
    assert sorted(ids) == ids
    assert all(re.fullmatch(r"agt-[0-7][0-9A-HJKMNP-TV-Z]{25}", id_) for id_ in ids)


async def test_an_agent_comes_back_as_it_was_created(db: Persistence) -> None:
    created = await db.agents.create(
        template_id="t",
        lineage=["a"],
        config_version="1",
        last_safe_point=0,
        bookmark=Bookmark(0, BEGIN),
        counters={"none": 0},
        metadata={"none": None, "no": False, "zero": 0, "empty": ""},
    )

    assert await db.agents.get(created.id) == created
    assert (created.breakpoint, created.created_at) == ("ready", created.updated_at)
    assert await db.agents.exists(created.id)
    assert not await db.agents.exists("nobody")
    assert await db.agents.get("nobody") is None


async def test_an_id_is_given_once(db: Persistence) -> None:
    await db.agents.create(id="a", template_id="first")

    with pytest.raises(UniqueConflict):
        await db.agents.create(id="a")

    assert [agent.template_id for agent in await db.agents.list()] == ["first"]


@pytest.mark.parametrize("name", sorted(BREAKPOINTS))
async def test_breakpoints_are_accepted_in_upper_case_and_kept_in_lower(name: str) -> None:
    async with kvpersist.open(MemoryDriver()) as db:
        created = await db.agents.create(id="a", breakpoint=name.upper())
        saved = await db.agents.save(Agent(id="a", breakpoint=name.upper()))
        updated = await db.agents.update("a", lambda agent: msgspec.structs.replace(agent, breakpoint=name.upper()))

        assert [each.breakpoint for each in (created, saved, updated) if each] == [name] * 3


async def test_what_no_agent_can_be_is_refused_and_nothing_is_written(db: Persistence, driver: Any) -> None:
    await db.agents.create(id="a")
    before = await driver.everything()

    with pytest.raises(BadRequest, match="streaming_model"):
        await db.agents.create(breakpoint="sleeping")
    with pytest.raises(BadRequest, match="breakpoint"):
        await db.agents.update("a", lambda agent: msgspec.structs.replace(agent, breakpoint="sleeping"))
    with pytest.raises(BadRequest, match="fields: id"):
        await db.agents.create(name="x")
    with pytest.raises(BadRequest, match="time zone"):
        await db.agents.create(created_at=datetime(2026, 1, 1))  # noqa: DTZ001
    with pytest.raises(BadRequest, match="time zone"):
        await db.agents.save(Agent(id="a", bookmark=Bookmark(1, datetime(2026, 1, 1))))  # noqa: DTZ001
    with pytest.raises(KeyTooLong):
        await db.agents.create(id="x" * 121)
    with pytest.raises(BadRequest, match="key"):
        await db.agents.update("a", lambda agent: msgspec.structs.replace(agent, id="b"))

    assert await driver.everything() == before


async def test_saving_an_agent_keeps_when_it_was_created(db: Persistence) -> None:
    first = await db.agents.save(Agent(id="a", counters={"n": 1}))

    second = await db.agents.save(Agent(id="a", counters={"n": 2}))

    assert await db.agents.get("a") == second
    assert (second.created_at, second.counters) == (first.created_at, {"n": 2})
    assert second.updated_at is not None and first.updated_at is not None and second.updated_at > first.updated_at
    assert len(await db.agents.list()) == 1
    unnamed = await db.agents.save(Agent(template_id="t"))
    assert unnamed.id.startswith("agt-")


async def test_an_agent_is_updated_by_whoever_comes_and_nothing_is_lost(db: Persistence) -> None:
    await db.agents.create(id="a")

    def count(agent: Agent) -> Agent:
        return msgspec.structs.replace(agent, counters={"n": agent.counters.get("n", 0) + 1})

    await asyncio.gather(*[db.agents.update("a", count) for _ in range(8)])

    agent = await db.agents.get("a")
    assert agent is not None and agent.counters == {"n": 8}
    assert await db.agents.update("nobody", count) is None


async def test_metadata_is_replaced_or_merged(db: Persistence) -> None:
    await db.agents.create(id="a", metadata={"x": 1, "y": {"z": 1}})

    merged = await db.agents.merge_metadata("a", {"y": 2, "w": 0})
    replaced = await db.agents.set_metadata("a", {"only": False})

    assert merged is not None and merged.metadata == {"x": 1, "y": 2, "w": 0}
    assert replaced is not None and replaced.metadata == {"only": False}
    assert await db.agents.merge_metadata("nobody", {}) is None
    assert await db.agents.set_metadata("nobody", {}) is None


async def test_two_mergers_at_once_both_count(db: Persistence) -> None:
    await db.agents.create(id="a")

    await asyncio.gather(*[db.agents.merge_metadata("a", {str(n): n}) for n in range(6)])

    agent = await db.agents.get("a")
    assert agent is not None and agent.metadata == {str(n): n for n in range(6)}


async def test_agents_are_listed_newest_first_by_template_and_time(db: Persistence) -> None:
    for n in range(6):
        await db.agents.create(id=f"a{n}", template_id="even" if n % 2 == 0 else "odd", created_at=BEGIN + timedelta(n))

    def ids(agents: list[Agent]) -> str:
        return "".join(agent.id[-1] for agent in agents)

    assert ids(await db.agents.list()) == ids(await db.agents.find()) == "543210"
    assert ids(await db.agents.list(2)) == "54"
    assert ids(await db.agents.find(limit=2, offset=3)) == "21"
    assert ids(await db.agents.find(template_id="even")) == "420"
    days = between(BEGIN + timedelta(1), BEGIN + timedelta(4))
    assert ids(await db.agents.find(created_at=days)) == "4321"
    assert ids(await db.agents.find(template_id="odd", created_at=days)) == "31"
    assert ids(await db.agents.find(created=at_least(BEGIN + timedelta(4)), template_id="even")) == "4"
    assert ids(await db.agents.find(created=BEGIN + timedelta(2))) == "2"
    assert ids(await db.agents.find(id_prefix="a", created=days, template_id="odd")) == "31"
    assert ids(await db.agents.find(created_at=at_least(BEGIN + timedelta(9)))) == ""
    assert ids([agent async for agent in db.agents.iterate(template_id="odd")]) == "531"
    assert ids([agent async for agent in db.agents.iterate()]) == "543210"
    assert (await db.agents.count(), await db.agents.count(template_id="odd")) == (6, 3)
    first = await db.agents.page(limit=4)
    rest = await db.agents.page(limit=4, after=first.cursor)
    assert (ids(first.items), ids(rest.items), rest.cursor) == ("5432", "10", None)


async def test_a_prefix_of_ids_is_meant_literally(db: Persistence) -> None:
    for n, id_ in enumerate(("a%b", "a%c", "a_b", "axb", "a/b/..", "A%b", "a!b")):
        await db.agents.create(id=id_, template_id="t" if n % 2 else "s", created_at=BEGIN + timedelta(n))

    async def found(prefix: str, **where: Any) -> list[str]:
        return [agent.id for agent in await db.agents.find(id_prefix=prefix, **where)]

    assert await found("a%") == ["a%c", "a%b"]
    assert await found("a_") == ["a_b"]
    assert await found("a/b/") == ["a/b/.."]
    assert await found("a!") == ["a!b"]
    assert await found("%") == await found("_") == []
    assert await found("a", limit=2, offset=1) == ["a/b/..", "axb"]
    assert await found("a", template_id="t") == ["axb", "a%c"]
    assert await found("a", created_at=between(BEGIN, BEGIN + timedelta(2))) == ["a_b", "a%c", "a%b"]
    assert [agent.id async for agent in db.agents.iterate(id_prefix="a%")] == ["a%b", "a%c"]
    assert (await db.agents.count(id_prefix="a%"), await db.agents.count(id_prefix="")) == (2, 7)
    with pytest.raises(BadRequest, match="metadata"):
        await found("a", metadata="x")


async def test_an_id_like_a_path_leads_nowhere_else(tmp_path: Path) -> None:
    home = tmp_path / "in" / "here"
    evil = ["../../../out", "/etc/agent", "parent/fork-1", "..", "C:\\x", "a\x00b"]
    async with kvpersist.open(f"file://{home}?kv.durability=normal") as db:
        for id_ in evil:
            await fill(db, id_)
        assert {agent.id for agent in await db.agents.list()} == set(evil)
        assert [agent.id for agent in await db.agents.find(id_prefix="parent/")] == ["parent/fork-1"]
        for id_ in evil:
            assert (await kept_of(db, id_))["media"] == [("sha256-0", "p", 0)]
            assert await db.agents.delete(id_)
        assert await db.agents.list() == []

    assert {path.name for path in tmp_path.iterdir()} == {"in"}
    assert {path.name for path in (tmp_path / "in").iterdir()} == {"here"}


# ---- statistics


async def test_statistics_count_and_read_no_message(db: Persistence, driver: Any) -> None:
    await fill(db, "other")
    await db.agents.create(id="a")
    for n in range(2):
        await db.sessions.create(id=f"s{n}", agent_id="a")
    await db.messages.append_many(
        "s0",
        [
            Message("user", "q"),
            Message("assistant", tool_calls=[ToolCallPart("c", "look"), ToolCallPart("d", "look")]),
            Message("tool", False, tool_call_id="c"),
            Message("assistant", tool_calls=[ToolCallPart("c", "write"), ToolCallPart("e", "look")]),
            Message("tool", "no", tool_call_id="e", is_error=True),
        ],
    )
    for n in range(3):
        await db.snapshots.save(Snapshot(agent_id="a", id=f"at {n}"))
    driver.clear()

    stats = await db.agents.stats("a")

    assert stats is not None
    assert (stats.sessions, stats.messages, stats.tool_calls, stats.snapshots) == (2, 5, 4, 3)
    assert stats.messages_by_role == {"user": 1, "assistant": 2, "tool": 2}
    assert stats.tool_calls_by_name == {"look": 3, "write": 1}
    assert stats.tool_calls_by_state == {"completed": 1, "failed": 1, "pending": 2}
    assert (stats.messages_per_session, stats.success_rate) == (2.5, 25.0)
    assert driver.values_read == 0


async def test_calls_are_counted_by_every_state(db: Persistence) -> None:
    await db.agents.create(id="a")
    await db.sessions.create(id="s", agent_id="a")
    parts = [ToolCallPart(str(n), "t") for n in range(5)]
    await db.messages.append("s", Message("assistant", tool_calls=parts))
    await db.tool_calls.require_approval("s", 1, 0)
    await db.tool_calls.require_approval("s", 1, 1)
    await db.tool_calls.approve("s", 1, 1, by="me")
    await db.tool_calls.require_approval("s", 1, 2)
    await db.tool_calls.deny("s", 1, 2, by="me")
    await db.tool_calls.start("s", 1, 3)
    await db.tool_calls.complete("s", 1, 3, 0)

    stats = await db.agents.stats("a")

    assert stats is not None
    assert stats.tool_calls_by_state == {
        "approval_required": 1,
        "approved": 1,
        "denied": 1,
        "completed": 1,
        "pending": 1,
    }
    assert stats.success_rate == 20.0


async def test_there_is_no_rate_where_there_is_nothing(db: Persistence) -> None:
    await db.agents.create(id="a")

    stats = await db.agents.stats("a")

    assert stats is not None
    assert (stats.messages, stats.messages_per_session, stats.success_rate) == (0, None, None)
    assert await db.agents.stats("nobody") is None


# ---- what was lost elsewhere


@pytest.mark.parametrize("result", [None, False, 0, "", [], {}, 0.0])
async def test_a_result_that_counts_as_false_comes_back(db: Persistence, result: Any) -> None:
    at = BEGIN
    await db.agents.create(id="a")
    await db.sessions.create(id="s", agent_id="a")
    await db.messages.append_many(
        "s",
        [
            Message("assistant", tool_calls=[ToolCallPart("c", "t", {"x": 0})], created_at=at),
            Message("tool", result, tool_call_id="c", created_at=at),
        ],
    )

    [call] = await db.tool_calls.of("s")

    assert (call.state, call.result, type(call.result), call.duration) == ("completed", result, type(result), 0.0)


async def test_two_agents_may_use_one_call_id(db: Persistence, sound: Sound) -> None:
    for id_ in ("a", "b"):
        await db.agents.create(id=id_)
        await db.sessions.create(id=f"s-{id_}", agent_id=id_)
        await db.messages.append_many(
            f"s-{id_}",
            [
                Message("assistant", tool_calls=[ToolCallPart("call-1", "t")]),
                Message("tool", id_, tool_call_id="call-1"),
            ],
        )

    assert [call.result for id_ in ("a", "b") for call in await db.tool_calls.of(f"s-{id_}")] == ["a", "b"]
    await sound(db)


# ---- deletion


async def test_a_deleted_agent_leaves_no_key_and_takes_nothing_of_others(
    db: Persistence, driver: Any, sound: Sound
) -> None:
    await fill(db, "kept")
    await fill(db, "kept!")
    await db.sessions.create(id="free", user_id="u")
    before = await driver.everything()
    await fill(db, "kept!1")
    await db.events.ack("me", "kept!1", await db.events.publish("kept!1", "x"))
    await db.events.group("kept!1", "team").claim("me")

    assert await db.agents.delete("kept!1") is True
    assert await db.agents.delete("kept!1") is False
    assert await db.agents.delete("nobody") is False

    assert await driver.everything() == before
    assert await db.agents.get("kept!1") is None
    await sound(db)
    await sound_state(db)


@pytest.mark.parametrize("without", [set[str](), ORDERED], ids=["memory", "ordered"])
async def test_a_deletion_killed_anywhere_is_finished_by_the_next_open(without: set[str], sound: Sound) -> None:
    for nth in range(1, 500):
        disk = MemoryDriver()
        async with kvpersist.open(FaultyDriver(disk, without=without)) as db:
            await fill(db, "kept", turns=0)
            before = await space(disk)
            await fill(db, "a", turns=1)
            dying = FaultyDriver(disk, without=without)
            victim = await kvpersist.open(dying)
            dying.crash(nth)
            with contextlib.suppress(Crashed):
                await victim.agents.delete("a")
            begun = not await db.agents.exists("a") or any("#deleting:a" in key for key in await space(disk))
            async with kvpersist.open(FaultyDriver(disk, without=without)) as again:
                if begun:
                    assert not await again.agents.exists("a")
                    if without:  # index entries that a crash left stale are readers' and fsck's to remove
                        every = again._all
                        named = again._family.repositories.values()
                        for repository in (every.sessions, every.messages, every.tool_calls, *named):
                            assert all(d.kind == "stale" for d in await repository.verify(repair=True))
                    assert await space(disk) == before, f"killed before step {nth}"
                    await fill(again, "a", turns=1)
                    assert len((await kept_of(again, "a"))["events"]) == 2
                await sound(again)
                await sound_state(again)
        if not dying.crashed:
            return
    pytest.fail("the deletion never ends")


async def test_a_late_writer_cannot_bring_a_deleted_agent_back(db: Persistence, driver: Any) -> None:
    await fill(db, "kept")
    before = await driver.everything()
    writes: list[Callable[[Persistence], Awaitable[Any]]] = [
        lambda late: late.todos.save("a", [Todo(title="late")]),
        lambda late: late.todos.update("a", lambda todos: [*todos, Todo(title="late")]),
        lambda late: late.snapshots.save(Snapshot(agent_id="a", id="late")),
        lambda late: late.windows.save(HistoryWindow(agent_id="a")),
        lambda late: late.compressions.create(agent_id="a"),
        lambda late: late.recovered_files.replace_all("a", [RecoveredFile(agent_id="a", path="x")]),
        lambda late: late.media.replace_all("a", [Media(agent_id="a", key="late")]),
        lambda late: late.compressions.save(Compression(agent_id="a", id="late")),
    ]
    for write in writes:
        await fill(db, "a")
        slow = FaultyDriver(driver)
        async with kvpersist.open(slow) as late:
            await late.media.save(Media(agent_id="a", key="remembered"))
            gate = slow.hold("commit")
            task = asyncio.ensure_future(write(late))
            await gate.reached()
            await db.agents.delete("a")
            gate.release()

            with pytest.raises(ParentGone):
                await task
        assert not await db.agents.exists("a")
        assert await driver.everything() == before
    await sound_state(db)


async def test_state_of_an_agent_that_is_not_there_is_refused(db: Persistence, driver: Any) -> None:
    before = await driver.everything()

    for write in (
        db.todos.save("nobody", []),
        db.snapshots.save(Snapshot(agent_id="nobody", id="x")),
        db.windows.save(HistoryWindow(agent_id="nobody")),
        db.media.replace_all("nobody", []),
        db.media.save(Media(key="no agent named")),
    ):
        with pytest.raises(ParentGone):
            await write

    assert await driver.everything() == before


async def test_a_late_event_makes_no_agent(db: Persistence) -> None:
    await fill(db, "a")
    await db.agents.delete("a")

    await db.events.publish("a", "late")

    assert not await db.agents.exists("a")
    assert (await db.agents.list(), await db.sessions.list()) == ([], [])
    with pytest.raises(ParentGone):
        await db.todos.save("a", [])


async def test_an_id_used_again_begins_with_nothing(db: Persistence) -> None:
    await fill(db, "a")
    await db.agents.delete("a")

    await db.agents.create(id="a")

    assert not any((await kept_of(db, "a")).values())
    assert (await db.todos.save("a", [])).version == 1
