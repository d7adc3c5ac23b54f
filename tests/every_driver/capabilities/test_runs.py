"""Round an agent's run: its turns are kept, also of a stream that is cut."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

import kvpersist
from kvpersist import PersistenceMiddleware
from kvpersist.agents.persistence import Persistence

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(300)]


async def counting(message: str, history: list[object]) -> str:
    """An agent that says how much it was given."""
    return f"{message} is message {len(history) + 1}"


async def speaking(message: str) -> AsyncIterator[dict[str, str]]:
    """An agent that streams, and calls a tool."""
    yield {"type": "content", "delta": "There is "}
    yield {"type": "content", "delta": f"{message}."}


@pytest.mark.shows("Storage round an agent's run")
async def test_a_run_gets_its_history_and_leaves_its_turn(db: Persistence) -> None:
    agent = kvpersist.with_storage(counting, db)

    assert await agent.run("this", thread_id="runs") == "this is message 1"
    assert await agent.run("that", thread_id="runs") == "that is message 3"
    assert await kvpersist.continue_thread(counting, db, "runs", "again") == "again is message 5"
    said = [(message.role, message.content) for message in await db.threads.history("runs")]
    assert said[-2:] == [("user", "again"), ("assistant", "again is message 5")]


@pytest.mark.shows("An agent that streams goes on in its thread, and is kept at the end")
async def test_a_stream_is_kept_when_it_ends_or_is_cut(db: Persistence) -> None:
    agent = kvpersist.with_storage(speaking, db)

    async with agent.stream("tea", thread_id="streams") as chunks:
        told = [chunk["delta"] async for chunk in chunks]
    async with agent.stream("milk", thread_id="streams") as chunks:
        async for _ in chunks:
            break

    assert told == ["There is ", "tea."]
    kept = await db.threads.history("streams")
    assert [message.content for message in kept] == ["tea", "There is tea.", "milk", "There is "]
    assert kept[2].error is not None
    assert kept[3].partial is True


@pytest.mark.shows("Storage round an agent's run")
async def test_middleware_keeps_what_an_agent_reports(db: Persistence) -> None:
    middleware = PersistenceMiddleware(db)
    handler = middleware.handler("told", user_id="ada")

    await handler.on_user_message("Hi")
    await handler.on_assistant_message("Hello")
    await middleware.persist_trace({"trace_id": "t", "action": "start", "data": {"name": "run", "thread_id": "told"}})
    await middleware.persist_trace({"trace_id": "t", "action": "end", "data": {"output": 0}})

    assert [message.content for message in await middleware.get_thread_messages("told")] == ["Hi", "Hello"]
    assert [trace.output for trace in await middleware.get_thread_traces("told")] == [0]
