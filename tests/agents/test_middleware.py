"""Storage for agents that tell what they do: events become messages and traces, in the thread they name."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import Any

import pytest

from kvpersist.agents.conversations.traces import TokenUsage, Trace
from kvpersist.agents.persistence import Persistence
from kvpersist.agents.records import Message, ToolCallPart
from kvpersist.agents.runs.middleware import PersistenceMiddleware
from kvpersist.errors import BadOption, BadRequest, ParentGone, UniqueConflict

Sound = Callable[[Persistence], Awaitable[None]]


def message(**fields: Any) -> dict[str, Any]:
    return {"thread_id": "t", "role": "user", "content": "hi"} | fields


def start(**data: Any) -> dict[str, Any]:
    return {"trace_id": "run", "action": "start", "data": {"name": "answer", "thread_id": "t"} | data}


def end(**data: Any) -> dict[str, Any]:
    return {"trace_id": "run", "action": "end", "data": data}


async def test_a_message_is_stored_in_the_thread_it_names(db: Persistence, sound: Sound) -> None:
    middleware = PersistenceMiddleware(db)

    asked = await middleware.persist_message(message(user_id="ada", metadata={"from": "web"}))
    function = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": "{}"}}
    await middleware.persist_message(message(role="assistant", content=None, tool_calls=[function]))
    await middleware.persist_message(message(role="tool", content=0, tool_call_id="c1"))

    [session] = await db.sessions.list()
    assert (session.id, session.agent_id, session.user_id) == ("t", "default", "ada")
    assert session.title is not None and session.title.startswith("Conversation ")
    stored = await middleware.get_thread_messages("t")
    assert stored[0] == asked
    assert (asked.number, asked.user_id, asked.metadata) == (1, "ada", {"from": "web"})
    assert stored[1].tool_calls == [ToolCallPart("c1", "look", "{}")]
    assert [call.state for call in await db.tool_calls.of("t")] == ["completed"]
    await sound(db)


@pytest.mark.parametrize(
    "event",
    [
        {},
        "hi",
        {"role": "user", "content": "nowhere"},
        {"thread_id": "t", "content": "nobody"},
        message(role="robot"),
        message(text="typo"),
        message(content=object()),
        message(tool_calls=[{"id": "c1", "name": "look"}]),
        message(role="assistant", tool_calls=[{"id": "c1"}]),
    ],
)
async def test_an_event_that_is_not_understood_stores_no_message(db: Persistence, event: Any) -> None:
    with pytest.raises(BadRequest):
        await PersistenceMiddleware(db).persist_message(event)

    assert await db.messages.count("t") == 0


async def test_a_missing_thread_is_created_once_with_the_id_that_was_asked_for(db: Persistence) -> None:
    middleware = PersistenceMiddleware(db, default_agent_id="helper")

    made = await asyncio.gather(*[middleware.ensure_thread("asked for") for _ in range(8)])

    assert sorted(made) == [False] * 7 + [True]
    [session] = await db.sessions.list()
    assert (session.id, session.agent_id) == ("asked for", "helper")
    assert await middleware.ensure_thread("other", agent_id="own", user_id="ada", title="T", metadata={"a": 1}) is True
    other = await db.sessions.get("other")
    assert other is not None
    assert (other.agent_id, other.user_id, other.title, other.metadata) == ("own", "ada", "T", {"a": 1})
    with pytest.raises(BadRequest, match="another user"):
        await middleware.ensure_thread("other", user_id="eve")


async def test_without_leave_to_create_a_missing_thread_is_an_error(db: Persistence) -> None:
    middleware = PersistenceMiddleware(db, auto_create_thread=False)

    with pytest.raises(ParentGone):
        await middleware.ensure_thread("t")
    with pytest.raises(ParentGone):
        await middleware.persist_message(message())
    with pytest.raises(ParentGone):
        await middleware.persist_trace(start())
    assert await db.sessions.count() == 0
    assert await db.traces.count() == 0

    await db.sessions.create(id="t")
    assert await middleware.ensure_thread("t") is False
    assert (await middleware.persist_message(message())).number == 1


async def test_messages_are_the_latest_in_chronological_order(db: Persistence) -> None:
    await db.sessions.create(id="t")
    await db.messages.append_many("t", [Message("user", n) for n in range(70)])
    middleware = PersistenceMiddleware(db)

    assert [each.content for each in await middleware.get_thread_messages("t")] == list(range(20, 70))
    assert [each.content for each in await middleware.get_thread_messages("t", 2)] == [68, 69]
    assert await middleware.get_thread_messages("missing") == []


async def test_a_trace_is_started_and_ended(db: Persistence) -> None:
    middleware = PersistenceMiddleware(db)

    began = await middleware.persist_trace(start(type="llm", input={"q": 0}, metadata={"model": "m"}))
    ended = await middleware.persist_trace(
        end(output=False, token_usage={"prompt": 3, "completion": 4}, metadata={"tries": 1})
    )

    assert (began.id, began.session_id, began.name, began.type, began.ended_at) == ("run", "t", "answer", "llm", None)
    assert (ended.output, ended.error, ended.token_usage) == (False, None, TokenUsage(3, 4, 7))
    assert ended.metadata == {"model": "m", "tries": 1}
    assert ended.duration is not None and ended.duration >= 0
    assert await db.traces.get("run") == ended
    assert await db.sessions.get("t") is not None


async def test_a_failed_trace_has_its_error(db: Persistence) -> None:
    middleware = PersistenceMiddleware(db)
    await middleware.persist_trace(start())

    ended = await middleware.persist_trace(end(error=ValueError("no")))

    assert ended.error == "no"


async def test_an_unknown_trace_cannot_end_and_a_known_one_cannot_start_again(db: Persistence) -> None:
    middleware = PersistenceMiddleware(db)

    with pytest.raises(ParentGone, match="trace 'run'"):
        await middleware.persist_trace(end())
    await middleware.persist_trace(start())
    with pytest.raises(UniqueConflict):
        await middleware.persist_trace(start())
    assert await db.traces.count() == 1


@pytest.mark.parametrize(
    "event",
    [
        {},
        "run",
        {"trace_id": "run", "action": "pause"},
        {"trace_id": "run", "action": "start"},
        {"trace_id": "run", "action": "start", "data": ["name"]},
        {"action": "start", "data": {"name": "x"}},
        start(typo=1),
        start(type="nothing"),
        start(token_usage={"all": 3}),
        start(started_at=datetime(2026, 1, 1)),  # noqa: DTZ001
    ],
)
async def test_an_event_that_is_not_understood_stores_no_trace(db: Persistence, event: Any) -> None:
    with pytest.raises(BadRequest):
        await PersistenceMiddleware(db).persist_trace(event)

    assert await db.traces.count() == 0


async def test_traces_of_a_thread_come_newest_first(db: Persistence) -> None:
    middleware = PersistenceMiddleware(db)
    for number in range(55):
        at = datetime(2026, 1, 1, 0, number, tzinfo=UTC)
        event = start(started_at=at, parent_id="root") | {"trace_id": f"run {number}"}
        await middleware.persist_trace(event)
    await middleware.persist_trace(start(thread_id="another") | {"trace_id": "other"})
    await middleware.persist_trace({"trace_id": "nobody's", "action": "start", "data": {"name": "x"}})

    found = await middleware.get_thread_traces("t")

    assert [trace.id for trace in found] == [f"run {number}" for number in reversed(range(5, 55))]
    assert [trace.id for trace in await middleware.get_thread_traces("t", 1)] == ["run 54"]


async def test_what_is_switched_off_is_refused_and_not_dropped(db: Persistence) -> None:
    middleware = PersistenceMiddleware(db, persist_messages=False, persist_traces=False)

    with pytest.raises(BadOption, match="persist_messages"):
        await middleware.persist_message(message())
    with pytest.raises(BadOption, match="persist_messages"):
        await middleware.handler("t").on_user_message("hi")
    with pytest.raises(BadOption, match="persist_traces"):
        await middleware.persist_trace(start())
    assert await db.sessions.count() == 0


async def test_each_stored_record_is_handed_to_its_callback(db: Persistence) -> None:
    seen: list[Any] = []

    async def later(trace: Trace) -> None:
        assert await db.traces.get(trace.id) == trace
        seen.append(trace.ended_at is not None)

    middleware = PersistenceMiddleware(db, on_message=seen.append, on_trace=later)
    stored = await middleware.persist_message(message())
    await middleware.persist_trace(start())
    await middleware.persist_trace(end())

    assert seen == [stored, False, True]


async def test_a_handler_stores_what_its_callbacks_are_told(db: Persistence, sound: Sound) -> None:
    handler = PersistenceMiddleware(db).handler("t", agent_id="helper", user_id="ada")

    await handler.on_user_message("what is it?")
    await handler.on_assistant_message("let me look", [{"id": "c1", "name": "look", "arguments": {"q": 1}}])
    await handler.on_tool_result("c1", {"seen": "cat"}, name="look")
    await handler.on_assistant_message("a cat", metadata={"sure": True})
    await handler.on_assistant_message(None, [{"id": "c2", "name": "look"}])
    await handler.on_tool_result("c2", "no camera", is_error=True)

    assert [(each.role, each.content) for each in await db.threads.history("t")] == [
        ("user", "what is it?"),
        ("assistant", "let me look"),
        ("tool", {"seen": "cat"}),
        ("assistant", "a cat"),
        ("assistant", None),
        ("tool", "no camera"),
    ]
    assert [(call.state, call.result) for call in await db.tool_calls.of("t")] == [
        ("completed", {"seen": "cat"}),
        ("failed", "no camera"),
    ]
    [session] = await db.sessions.list()
    assert (session.user_id, session.agent_id) == ("ada", "helper")
    await sound(db)
