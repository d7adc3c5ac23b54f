"""Conversations as a whole on every kind of driver, and several who change one at once."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

import kvpersist
from kvpersist import Message, ToolCallPart
from kvpersist.agents.persistence import Persistence
from kvpersist.errors import BadTransition, Conflict, DeadlineExceeded, UniqueConflict
from tests.services.stores import empty_store

Sound = Callable[[Persistence], Awaitable[None]]


def asks(*ids: str) -> Message:
    return Message("assistant", tool_calls=[ToolCallPart(id_, "t", {"of": id_}) for id_ in ids])


def answers(id_: str, content: Any = "r") -> Message:
    return Message("tool", content, tool_call_id=id_)


@pytest.mark.parametrize("driver_name", ["filesystem", "redis", "postgres", "mysql", "mongo"])
async def test_a_conversation_is_rewritten_forked_moved_and_mended(
    driver_name: str, service: Callable[[str], dict[str, str]], tmp_path: Path, sound: Sound
) -> None:
    url = empty_store(driver_name, tmp_path, service)
    async with kvpersist.open(url) as db:
        session = await db.sessions.create(user_id="u")
        id_ = session.id
        stored = await db.messages.append_many(id_, [Message("user", "q"), asks("a", "b"), answers("a"), answers("b")])
        await db.messages.truncate(id_, after=3)
        await db.tool_calls.require_approval(id_, 2, 1)
        assert [c.call_id for c in await db.tool_calls.pending_approvals(id_)] == ["b"]
        await db.tool_calls.approve(id_, 2, 1, by="ann")
        await db.messages.append_many(id_, [Message("user", "?"), answers("b", "late"), answers("b", "again")])

        [fork] = await db.sessions.fork(id_)
        copy = await db.sessions.import_(json.loads(json.dumps(await db.sessions.export(id_))), user_id="v")
        assert [p.kind for p in await db.messages.repair(copy.id)] == ["late_result", "duplicate_result"]
        assert await db.messages.validate(copy.id) == []
        assert [p.kind for p in await db.messages.validate(fork.id)] == ["late_result", "duplicate_result"]
        stands = await db.messages.replace_all(id_, [stored[0], Message("system", "s"), *stored[1:3]])
        assert [(m.number, m.role) for m in stands] == [(1, "user"), (8, "system"), (9, "assistant"), (10, "tool")]
        calls = await db.tool_calls.of(id_)
        assert [(c.number, c.state, c.result) for c in calls] == [(9, "completed", "r"), (9, "approved", None)]
        assert await db.sessions.delete_older(than=db._all.now() + timedelta(seconds=5)) == 3
        assert await db.sessions.count() == 0
        await sound(db)


async def test_a_list_is_replaced_while_others_append(driver: Any, sound: Sound) -> None:
    async with kvpersist.open(driver) as one, kvpersist.open(driver) as two:
        await one.sessions.create(id="s")
        history = [Message("user", "start")]

        async def replaces() -> None:
            for n in range(8):
                history.extend([asks(f"a{n}"), answers(f"a{n}")])
                await one.messages.replace_all("s", history)

        async def appends() -> None:
            for n in range(8):
                await two.messages.append_many("s", [asks(f"b{n}"), answers(f"b{n}")])

        async def truncates() -> None:
            for _ in range(4):
                await two.messages.truncate("s", after=2)

        await asyncio.gather(replaces(), appends(), truncates())
        stands = await one.messages.replace_all("s", history)

        async with kvpersist.open(driver) as third:
            assert [m.content for m in await third.messages.range("s")] == [m.content for m in history]
            assert [c.state for c in await third.tool_calls.of("s")] == ["completed"] * 8
            assert [m.number for m in stands] == sorted({m.number for m in stands})
            await sound(third)


async def test_states_are_set_while_others_write(driver: Any, sound: Sound) -> None:
    async with kvpersist.open(driver) as one, kvpersist.open(driver) as two:
        await one.sessions.create(id="s")
        await one.messages.append("s", asks(*[f"c{n}" for n in range(10)]))

        async def set_states(db: Persistence) -> int:
            won = 0
            for n in range(10):
                try:
                    await db.tool_calls.approve("s", 1, n)
                    won += 1
                except BadTransition:
                    pass
            return won

        async def appends() -> None:
            for n in range(10):
                await two.messages.append("s", answers(f"c{n}") if n % 2 else Message("user", "x"))

        first, second, _ = await asyncio.gather(set_states(one), set_states(two), appends())

        assert first + second <= 10
        async with kvpersist.open(driver) as third:
            calls = await third.tool_calls.of("s")
            assert [c.state for c in calls[::2]] == ["approved"] * 5
            assert [c.state for c in calls[1::2]] == ["completed"] * 5
            await sound(third)


async def test_a_session_that_is_deleted_while_it_is_rewritten_stays_deleted(driver: Any, sound: Sound) -> None:
    async with kvpersist.open(driver) as one, kvpersist.open(driver) as two:
        for n in range(6):
            await one.sessions.create(id=f"s{n}")
            stored = await one.messages.append_many(f"s{n}", [Message("user", f"{m}") for m in range(6)])

            async def rewrites(session: str = f"s{n}", stored: list[Message] = stored) -> None:
                await one.messages.replace_all(session, [stored[0], *(Message("user", f"n{m}") for m in range(6))])

            outcomes = await asyncio.gather(rewrites(), two.sessions.delete(f"s{n}"), return_exceptions=True)

            assert outcomes[1] is True
            assert not isinstance(outcomes[0], (UniqueConflict, Conflict, DeadlineExceeded))
            assert not await one.sessions.exists(f"s{n}")
        await sound(two)
