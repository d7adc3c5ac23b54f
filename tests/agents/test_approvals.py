"""States of tool calls: who may let them run, what became of them, and what is counted of them."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import msgspec
import pytest
from msgspec.structs import replace

import kvpersist
from kvpersist import Message, ToolCall, ToolCallPart
from kvpersist.agents.conversations.approvals import TRANSITIONS
from kvpersist.agents.persistence import Persistence
from kvpersist.agents.records import TOOL_CALL_STATES
from kvpersist.codec import JSON, MSGPACK, frame
from kvpersist.driver import Delete, Put
from kvpersist.errors import BadRequest, BadTransition, ParentGone, Unencodable, UniqueConflict
from kvpersist.testing import ManualClock
from kvpersist.testing.faults import Crashed, FaultyDriver
from kvpersist_drivers.memory import MemoryDriver

Sound = Callable[[Persistence], Awaitable[None]]
NOON = datetime(2025, 3, 1, 12, tzinfo=UTC)


def asks(*ids: str, name: str = "t") -> Message:
    return Message("assistant", tool_calls=[ToolCallPart(id_, name, {}) for id_ in ids])


@pytest.fixture
async def session(db: Persistence) -> str:
    id_ = (await db.sessions.create(user_id="u1")).id
    await db.messages.append(id_, asks("a", "b"))
    return id_


async def test_a_call_is_approved_run_and_completed(db: Persistence, session: str, sound: Sound) -> None:
    asked = await db.tool_calls.require_approval(session, 1, 0, note="writes files", meta={"risk": 2})
    assert asked is not None and asked.approval is not None
    assert (asked.state, asked.approval.required, asked.approval.decision) == ("approval_required", True, None)

    approved = await db.tool_calls.approve(session, 1, 0, by="ann", note="go on")
    started = await db.tool_calls.start(session, 1, 0)
    done = await db.tool_calls.complete(session, 1, 0, {"files": 3})

    assert approved is not None and approved.approval is not None and started is not None and done is not None
    assert (approved.approval.decision, approved.approval.decided_by) == ("allow", "ann")
    assert (approved.approval.note, approved.approval.meta) == ("go on", {"risk": 2})
    assert approved.approval.decided_at is not None
    assert (done.state, done.is_error, done.result) == ("completed", False, {"files": 3})
    assert [(entry.state, entry.note) for entry in done.audit] == [
        ("approval_required", "writes files"),
        ("approved", "go on"),
        ("executing", None),
        ("completed", None),
    ]
    assert [entry.at for entry in done.audit] == sorted(entry.at for entry in done.audit)
    assert done.audit[2].at == done.started_at and done.audit[3].at == done.completed_at == done.updated_at
    assert done == await db.tool_calls.get(session, 1, 0)
    await sound(db)


async def test_a_denied_call_stays_denied_when_the_model_is_told(db: Persistence, session: str, sound: Sound) -> None:
    denied = await db.tool_calls.deny(session, 1, 0, by="bob", note="no")
    await db.messages.append(session, Message("tool", "denied", tool_call_id="a", is_error=True))

    [call, _] = await db.tool_calls.of(session)
    assert denied is not None and denied.approval is not None
    assert (denied.approval.decision, denied.approval.required) == ("deny", False)
    assert (call.state, call.result, call.result_number) == ("denied", "denied", 2)
    stat = await db.sessions.stat(session)
    assert stat is not None and stat.tools["t"].by_state() == {"pending": 1, "denied": 1}
    await sound(db)


@pytest.mark.parametrize("before", sorted(TOOL_CALL_STATES))
async def test_only_the_named_transitions_are_possible(db: Persistence, before: str, sound: Sound) -> None:
    session = (await db.sessions.create()).id
    await db.messages.append(session, asks(*sorted(TOOL_CALL_STATES)))
    for position, state in enumerate(sorted(TOOL_CALL_STATES)):
        stored = await db.tool_calls.of(session)
        await db.tool_calls.replace_all(
            session, [replace(c, state=before) if c.position == position else c for c in stored]
        )
        allowed = TRANSITIONS[before]  # type: ignore[index]
        if state in allowed:
            call = await db.tool_calls.set_state(session, 1, position, state.upper(), note="n")
            assert call is not None and (call.state, call.audit[-1].note) == (state, "n")
            continue
        with pytest.raises(BadTransition) as raised:
            await db.tool_calls.set_state(session, 1, position, state)
        assert (raised.value.state, raised.value.wanted, raised.value.allowed) == (before, state, allowed)
        assert all(name in str(raised.value) for name in allowed)
        unchanged = await db.tool_calls.get(session, 1, position)
        assert unchanged is not None and (unchanged.state, unchanged.audit) == (before, [])
    await sound(db)


async def test_of_two_who_decide_one_is_told_so(db: Persistence, session: str, sound: Sound) -> None:
    await db.tool_calls.require_approval(session, 1, 0)

    outcomes = await asyncio.gather(
        db.tool_calls.approve(session, 1, 0, by="ann"),
        db.tool_calls.deny(session, 1, 0, by="bob"),
        db.tool_calls.approve(session, 1, 0, by="cem"),
        return_exceptions=True,
    )

    assert sum(isinstance(each, ToolCall) for each in outcomes) == 1
    assert sum(isinstance(each, BadTransition) for each in outcomes) == 2
    await sound(db)


@pytest.mark.parametrize("result", [0, 0.0, "", False, [], {}, None, b"", "text", {"a": [1]}])
async def test_every_result_is_kept_as_it_is(db: Persistence, session: str, result: Any) -> None:
    await db.tool_calls.start(session, 1, 0)
    await db.tool_calls.complete(session, 1, 0, result)

    call, waiting = await db.tool_calls.of(session)
    assert (call.state, repr(call.result), call.completed_at is not None) == ("completed", repr(result), True)
    assert (waiting.state, waiting.result, waiting.completed_at) == ("pending", None, None)


async def test_a_duration_of_nothing_is_a_duration(tmp_path: Path) -> None:
    clock = ManualClock()
    async with kvpersist.open("memory://", clock=clock) as db:
        session = (await db.sessions.create()).id
        await db.messages.append(session, asks("a", "b"))
        clock.advance(7)
        await db.tool_calls.start(session, 1, 0)
        await db.tool_calls.complete(session, 1, 0, 0)
        await db.tool_calls.fail(session, 1, 1, "late")

        started, failed = await db.tool_calls.of(session)
        assert (started.duration, failed.duration) == (0.0, 7.0)
        assert (failed.state, failed.is_error, failed.error, failed.result) == ("failed", True, "late", None)


async def test_a_message_completes_a_call_in_any_open_state(db: Persistence, session: str, sound: Sound) -> None:
    await db.tool_calls.require_approval(session, 1, 0)
    await db.tool_calls.start(session, 1, 1)

    await db.messages.append_many(
        session, [Message("tool", "A", tool_call_id="a"), Message("tool", "B", tool_call_id="b", is_error=True)]
    )

    first, second = await db.tool_calls.of(session)
    assert (first.state, first.result, second.state, second.result) == ("completed", "A", "failed", "B")
    assert [entry.state for entry in second.audit] == ["executing", "failed"]
    await sound(db)
    await db.messages.truncate(session, after=1)
    assert [(c.state, c.result, c.is_error) for c in await db.tool_calls.of(session)] == [
        ("approval_required", None, None),
        ("executing", None, None),
    ]
    await sound(db)


async def test_the_message_of_a_call_that_is_done_is_joined_with_it(
    db: Persistence, session: str, sound: Sound
) -> None:
    await db.tool_calls.complete(session, 1, 0, "by hand")
    await db.tool_calls.fail(session, 1, 1, "broken")

    await db.messages.append_many(
        session, [Message("tool", "A", tool_call_id="a"), Message("tool", "B", tool_call_id="b", is_error=True)]
    )

    calls = await db.tool_calls.of(session)
    assert [(c.state, c.result, c.result_number, c.error) for c in calls] == [
        ("completed", "A", 2, None),
        ("failed", "B", 3, "broken"),
    ]
    assert await db.messages.validate(session) == []
    await sound(db)
    await db.messages.truncate(session, after=1)
    assert [(c.state, c.result) for c in await db.tool_calls.of(session)] == [
        ("completed", "by hand"),
        ("failed", None),
    ]
    await sound(db)


async def test_what_waits_for_approval_survives_a_restart(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/a.db"
    async with kvpersist.open(url) as db:
        for name in ("s1", "s2"):
            await db.sessions.create(id=name)
            await db.messages.append(name, asks("a", "b", "c"))
            await db.tool_calls.require_approval(name, 1, 1)
            await db.tool_calls.require_approval(name, 1, 2)
        await db.tool_calls.approve("s2", 1, 2)

    async with kvpersist.open(url) as db:
        waiting = await db.tool_calls.pending_approvals()
        assert [(c.session_id, c.position) for c in waiting] == [("s1", 1), ("s1", 2), ("s2", 1)]
        assert [(c.session_id, c.position) for c in await db.tool_calls.pending_approvals("s2")] == [("s2", 1)]
        await db.tool_calls.approve("s1", 1, 1)
        assert len(await db.tool_calls.pending_approvals("s1")) == 1


async def test_every_state_is_counted_by_session_and_namespace(db: Persistence, sound: Sound) -> None:
    session = (await db.sessions.create()).id
    states = sorted(TOOL_CALL_STATES)
    await db.messages.append(session, asks(*states, name="x"))
    await db.messages.append(session, asks(*states, name="y"))
    for number in (1, 2):
        for position, state in enumerate(states):
            if state != "pending":
                await db.tool_calls.set_state(session, number, position, state)
    await db.tool_calls.set_state(session, 2, states.index("executing"), "completed")

    stat, stats = await db.sessions.stat(session), await db.stats()

    assert stat is not None
    assert stat.tools["x"].by_state() == dict.fromkeys(states, 1)
    assert (stat.tools["y"].executing, stat.tools["y"].completed, stat.tools["y"].pending) == (0, 2, 1)
    assert stats.tool_calls_by_state == Counter(dict.fromkeys(states, 2)) + Counter({"completed": 1}) - Counter(
        {"executing": 1}
    )
    assert [await db.tool_calls.count(state=state) for state in ("denied", "sealed")] == [2, 2]
    await sound(db)


@pytest.mark.parametrize("codec", ["msgpack", "json"])
async def test_a_stat_of_before_the_states_is_read_and_counted_on(codec: Literal["msgpack", "json"]) -> None:
    old = {
        "updated_at": NOON,
        "last": 3,
        "messages": 3,
        "roles": {"assistant": 2, "tool": 1},
        "tools": {"t": [4, 1, 1]},
        "open": [["a", 1, 0]],
        "indexed_at": NOON,
    }
    data = msgspec.msgpack.encode(old) if codec == "msgpack" else msgspec.json.encode(old)
    async with kvpersist.open("memory://", codec=codec) as db:
        session = await db.sessions.create(id="s", created_at=NOON)
        await db.messages.append_many("s", [asks("a", "b"), asks("c", "d")])
        key = f"{db._all.stat_prefix}s"
        await db.store._commit([Put(key, frame(key, data, MSGPACK if codec == "msgpack" else JSON, 1))])

        async with kvpersist.open(db.store) as again:  # with nothing in memory
            stat = await again.sessions.stat(session.id)
            assert stat is not None
            assert (stat.tool_calls, stat.tools["t"].by_state()) == (4, {"pending": 2, "completed": 1, "failed": 1})
            assert (await again.stats()).tool_calls_by_state == {"pending": 2, "completed": 1, "failed": 1}
            await again.tool_calls.require_approval("s", 1, 1)
            [answer] = await again.messages.append_many("s", [Message("tool", "r", tool_call_id="a")])
            stat = await again.sessions.stat(session.id)
            assert stat is not None and answer.number == 4
            assert stat.tools["t"].by_state() == {"approval_required": 1, "completed": 2, "failed": 1}


async def test_calls_are_replaced_by_their_places(db: Persistence, driver: Any, session: str, sound: Sound) -> None:
    await db.tool_calls.complete(session, 1, 0, "r")
    before = await db.tool_calls.of(session)
    driver.clear()

    assert await db.tool_calls.replace_all(session, before) == 0
    keys = [op.key for b in driver.batches for op in b.ops if isinstance(op, (Put, Delete)) and "#stat" not in op.key]
    assert keys == []

    extra = ToolCall(session_id="", number=1, position=5, name="extra", state="EXECUTING")
    assert await db.tool_calls.replace_all(session, [replace(before[0], metadata={"k": 1}), extra]) == 1

    first, second = await db.tool_calls.of(session)
    assert (first.metadata, first.result, first.audit) == ({"k": 1}, "r", before[0].audit)
    assert (second.position, second.state, second.created_at is not None) == (5, "executing", True)
    assert [c.name for c in await db.tool_calls.find(state="executing")] == ["extra"]
    await sound(db)
    assert await db.tool_calls.replace_all(session, []) == 2
    assert await db.tool_calls.replace_all(session, before) == 0  # where calls were before
    assert await db.tool_calls.of(session) == before
    await sound(db)


async def test_the_next_message_stands_above_calls_that_were_put_above_the_last_one(
    db: Persistence, session: str, sound: Sound
) -> None:
    before = await db.tool_calls.of(session)
    early = ToolCall(session_id="", number=before[0].number + 7, position=0, name="early")

    await db.tool_calls.replace_all(session, [*before, early])

    asking = await db.messages.append(session, Message("assistant", tool_calls=[ToolCallPart("z", "t")]))
    assert asking.number == early.number + 1
    assert [call.name for call in await db.tool_calls.of(session)][-2:] == ["early", "t"]
    await sound(db)


async def test_replacing_answered_calls_stores_no_result_twice(
    db: Persistence, driver: Any, session: str, sound: Sound
) -> None:
    await db.messages.append(session, Message("tool", "A", tool_call_id="a"))
    calls = await db.tool_calls.of(session)
    driver.clear()

    await db.tool_calls.replace_all(session, calls)

    assert not any(isinstance(op, Put) and ":tool_call:" in op.key for b in driver.batches for op in b.ops)
    assert await db.tool_calls.of(session) == calls
    await sound(db)


async def test_bad_states_and_places_are_refused(db: Persistence, session: str, sound: Sound) -> None:
    before = await db.tool_calls.of(session)
    with pytest.raises(BadRequest, match="unknown state 'done'"):
        await db.tool_calls.set_state(session, 1, 0, "done")
    with pytest.raises(BadRequest, match="unknown state"):
        await db.tool_calls.replace_all(session, [replace(before[0], state="done")])
    with pytest.raises(BadRequest, match="belongs to session"):
        await db.tool_calls.replace_all(session, [replace(before[0], session_id="other")])
    with pytest.raises(UniqueConflict):
        await db.tool_calls.replace_all(session, [before[0], before[0]])
    with pytest.raises(Unencodable):
        await db.tool_calls.complete(session, 1, 0, object())
    with pytest.raises(Unencodable):
        await db.tool_calls.replace_all(session, [replace(before[0], arguments={1: 2})])
    with pytest.raises(ParentGone):
        await db.tool_calls.approve("nobody", 1, 0)
    assert await db.tool_calls.approve(session, 9, 0) is None
    assert await db.tool_calls.of(session) == before
    await sound(db)


@pytest.mark.parametrize("without", [set[str](), {"atomic_batch", "reverse", "deref"}], ids=["memory", "ordered"])
async def test_a_change_of_state_killed_anywhere_is_made_or_not(without: set[str]) -> None:
    for nth in range(1, 60):
        disk = MemoryDriver()
        async with kvpersist.open(FaultyDriver(disk, without=without)) as db:
            await db.sessions.create(id="s")
            await db.messages.append("s", asks("a"))
            dying = FaultyDriver(disk, without=without)
            victim = await kvpersist.open(dying)
            dying.crash(nth)
            with contextlib.suppress(Crashed):
                await victim.tool_calls.require_approval("s", 1, 0)
        async with kvpersist.open(FaultyDriver(disk, without=without)) as again:
            [call] = await again.tool_calls.of("s")
            assert call.state in ("pending", "approval_required")
            assert (len(call.audit) == 1) == (call.state == "approval_required")
            assert len(await again.tool_calls.pending_approvals()) == len(call.audit)
        if not dying.crashed:
            return
    pytest.fail("it never ends")
