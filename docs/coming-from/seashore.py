"""Every operation of Seashore's storage, done with kvpersist.

    python docs/coming-from/seashore.py                                  # in memory, on the demo's conversation
    python docs/coming-from/seashore.py sqlite:///talks.db --data FILE   # any store, and your own conversations

``docs/coming-from/seashore.md`` is the page to it. Each step gets a conversation of its own, ``talk``.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any

from msgspec.structs import replace
from steps import main, refused, theirs

import kvpersist
from kvpersist import (
    Message,
    Persistence,
    PersistenceMiddleware,
    Session,
    TokenUsage,
    ToolCallPart,
    Trace,
    at_least,
    between,
    continue_thread,
    stream_continue_thread,
    with_storage,
)
from kvpersist.errors import BadOption, ParentGone

DAY = timedelta(days=1)

# ---- connection


@theirs("create_database", "createDatabase", "close")
async def open_and_close(db: Persistence, talk: Session) -> None:
    where = "memory://"  # or "postgresql://host/db?kv.pool_max=20&kv.ssl=true"
    other = await kvpersist.open(where)
    assert await other.sessions.count() == 0
    await other.close()
    await other.close()  # again is no harm


@theirs("health_check", "healthCheck")
async def health(db: Persistence, talk: Session) -> None:
    health = await db.health()
    assert health.healthy
    assert health.latency is not None


# ---- threads


@theirs("threads.create")
async def create_a_thread(db: Persistence, talk: Session) -> None:
    thread = await db.sessions.create(user_id=talk.user_id, title="Tea", metadata={"topic": "tea"})
    assert thread.agent_id is None
    assert thread.created_at == thread.updated_at


@theirs("threads.getById", "threads.findById")
async def get_a_thread(db: Persistence, talk: Session) -> None:
    assert await db.sessions.get(talk.id) == talk
    assert await db.sessions.get("nobody's") is None


@theirs("threads.update")
async def update_a_thread(db: Persistence, talk: Session) -> None:
    thread = await db.sessions.update(talk.id, lambda thread: replace(thread, title="Resolved"))
    assert thread is not None and thread.title == "Resolved"
    thread = await db.sessions.set_metadata(talk.id, {"topic": "tea"})  # replaces it, as theirs does
    assert thread is not None and thread.metadata == {"topic": "tea"}
    thread = await db.sessions.merge_metadata(talk.id, {"cups": 2})
    assert thread is not None and thread.metadata == {"topic": "tea", "cups": 2}
    assert await db.sessions.set_metadata("nobody's", {}) is None


@theirs("threads.listByUser", "threads.findByUserId", "threads.findByAgentId", "threads.list")
async def list_threads(db: Persistence, talk: Session) -> None:
    newer = await db.sessions.create(user_id=talk.user_id, agent_id=talk.user_id, title="A newer one")
    ids = [thread.id for thread in await db.sessions.find(user_id=talk.user_id, limit=50, offset=0)]
    assert ids == [newer.id, talk.id]
    assert [thread.id for thread in await db.sessions.find(user_id=talk.user_id, limit=1, offset=1)] == [talk.id]
    assert [thread.id for thread in await db.sessions.find(agent_id=talk.user_id)] == [newer.id]
    for order, first in (("created_at", talk.id), ("-updated_at", newer.id), ("title", newer.id)):
        assert (await db.sessions.find(user_id=talk.user_id, order=order))[0].id == first
    assert [thread.id for thread in await db.sessions.list(limit=2)] == ids


@theirs("threads.delete")
async def delete_a_thread(db: Persistence, talk: Session) -> None:
    assert await db.sessions.delete(talk.id)
    assert not await db.sessions.delete(talk.id)
    assert await db.messages.count(talk.id) == 0


@theirs("threads.findActive")
async def find_the_active_thread(db: Persistence, talk: Session) -> None:
    user = str(talk.user_id)
    active = await db.sessions.active(user)
    assert active is not None and active.id == talk.id
    await db.sessions.close(talk.id)
    assert await db.sessions.active(user) is None
    assert await db.sessions.active(user, create=True) is not None


@theirs("threads.export", "threads.import")
async def export_and_import(db: Persistence, talk: Session) -> None:
    data = await db.sessions.export(talk.id)
    thread = await db.sessions.import_(data, user_id="bob")
    assert (thread.user_id, thread.title) == ("bob", talk.title) and thread.id != talk.id
    said = [message.content for message in await db.threads.history(talk.id)]
    assert [message.content for message in await db.threads.history(thread.id)] == said


@theirs("threads.execute", "threads.count")
async def query_threads(db: Persistence, talk: Session) -> None:
    now = datetime.now(UTC)
    where: dict[str, Any] = {
        "user_id": talk.user_id,
        "created": between(now - DAY, now),
        "updated": between(now - DAY, now),
        "title": str(talk.title).upper(),  # in the title, in any case
    }
    assert [thread.id for thread in await db.sessions.find(**where, limit=50)] == [talk.id]
    assert await db.sessions.count(**where) == 1
    assert await db.sessions.count(agent_id="nobody's") == 0


# ---- messages


@theirs("messages.create", "messages.findById")
async def create_a_message(db: Persistence, talk: Session) -> None:
    content = "And a pot of tea."
    message = await db.messages.append(talk.id, Message(role="user", content=content))
    assert await db.messages.get(message.id) == message
    assert message.number == await db.messages.count(talk.id)
    assert await db.messages.get("nobody's") is None
    with refused(ParentGone):
        await db.messages.append("nobody's", Message(role="user", content=content))


@theirs("messages.bulkCreate", "messages.createMany")
async def create_messages(db: Persistence, talk: Session) -> None:
    call = ToolCallPart(id="call_a", name="kettle", arguments={"on": True})
    turn = [Message("assistant", None, tool_calls=[call]), Message("tool", "it boils", tool_call_id="call_a")]
    stored = await db.messages.append_many(talk.id, turn)
    assert stored[1].number == stored[0].number + 1
    assert await db.messages.append_many(talk.id, []) == []


@theirs("messages.listByThread", "messages.findByThreadId")
async def list_messages(db: Persistence, talk: Session) -> None:
    messages = await db.messages.find(session_id=talk.id, limit=100, offset=0)
    assert messages == await db.messages.range(talk.id)
    assert [message.number for message in messages] == list(range(1, len(messages) + 1))
    assert await db.messages.find(session_id=talk.id, limit=2, offset=1) == messages[1:3]
    assert await db.messages.last(talk.id, 3) == messages[-3:]  # the newest, in order


@theirs("messages.update")
async def update_a_message(db: Persistence, talk: Session) -> None:
    [message] = await db.messages.last(talk.id, 1)
    changed = await db.messages.update(message.id, lambda message: replace(message, content="Never mind."))
    assert changed is not None and (changed.content, changed.number) == ("Never mind.", message.number)
    assert await db.messages.update("nobody's", lambda message: message) is None


@theirs("messages.delete")
async def delete_a_message(db: Persistence, talk: Session) -> None:
    [message] = await db.messages.last(talk.id, 1)
    assert await db.messages.delete(message.id)
    assert not await db.messages.delete(message.id)


@theirs("messages.deleteByThreadId")
async def delete_the_messages(db: Persistence, talk: Session) -> None:
    count = await db.messages.count(talk.id)
    assert await db.messages.clear(talk.id) == count
    assert await db.sessions.exists(talk.id)


@theirs("messages.bulkDelete")
async def delete_old_messages(db: Persistence, talk: Session) -> None:
    count = await db.messages.count(talk.id)
    now = datetime.now(UTC)
    await db.messages.append(talk.id, Message("user", "From tomorrow", created_at=now + DAY))
    assert await db.messages.delete_older(talk.id, than=now) == count
    assert [message.content for message in await db.messages.range(talk.id)] == ["From tomorrow"]


@theirs("messages.search", "messages.filter.metadata")
async def search_messages(db: Persistence, talk: Session) -> None:
    now = datetime.now(UTC)
    said = await db.messages.append(talk.id, Message("user", "A pot of TEA", metadata={"topic": "tea", "cups": 2}))
    found = await db.messages.find(
        user_id=talk.user_id, text="pot of tea", role="user", created=at_least(now - DAY), limit=10
    )
    assert found == [said]
    assert await db.messages.find(session_id=talk.id, metadata={"topic": "tea"}) == [said]
    assert await db.messages.find(session_id=talk.id, metadata={"topic": "coffee"}) == []


@theirs("messages.execute", "messages.count")
async def query_messages(db: Persistence, talk: Session) -> None:
    messages = await db.messages.range(talk.id)
    times = [message.created_at for message in messages if message.created_at is not None]
    calling = [message for message in messages if message.tool_calls]
    assert await db.messages.find(session_id=talk.id, has_tool_calls=True) == calling
    where: dict[str, Any] = {"role": "assistant", "created": between(min(times), max(times))}
    answers = [message for message in messages if message.role == "assistant"]
    assert await db.messages.find(session_id=talk.id, **where, limit=50) == answers[:50]
    assert await db.messages.count(talk.id, **where) == len(answers)


# ---- traces


@theirs("traces.create", "traces.update", "traces.delete")
async def keep_traces(db: Persistence, talk: Session) -> None:
    whole = await db.traces.create(session_id=talk.id, name="booked by hand", type="chain")
    assert whole.started_at is not None  # now, by default
    run = await db.traces.start("answer", type="llm", session_id=talk.id, parent_id=whole.id, input="a question")
    run = await db.traces.end(run.id, output="an answer", token_usage=TokenUsage(prompt=12, completion=30))
    assert run is not None and run.duration is not None
    assert run.token_usage is not None and run.token_usage.total == 42
    named = await db.traces.update(whole.id, lambda trace: replace(trace, name="booked"))
    assert named is not None and named.name == "booked"
    assert await db.traces.delete(whole.id)
    assert await db.traces.update(whole.id, lambda trace: trace) is None


@theirs("traces.findByThreadId", "traces.findByParentId", "traces.findRootTraces", "traces.execute", "traces.count")
async def find_traces(db: Persistence, talk: Session) -> None:
    now = datetime.now(UTC)
    second = timedelta(seconds=1)
    root = await db.traces.create(session_id=talk.id, name="turn", started_at=now, ended_at=now + 9 * second)
    tools = [
        await db.traces.create(
            session_id=talk.id,
            parent_id=root.id,
            name=name,
            type="tool",
            error=error,
            started_at=now + at * second,
            ended_at=now + (at + 2) * second,
        )
        for at, (name, error) in enumerate([("search", None), ("book", "sold out")], 1)
    ]

    def names(traces: list[Trace]) -> list[str]:
        return [trace.name for trace in traces]

    assert names(await db.traces.find(session_id=talk.id, limit=100)) == ["book", "search", "turn"]  # newest first
    assert names(await db.traces.find(parent_id=root.id, limit=100)) == ["search", "book"]  # oldest first
    assert names(await db.traces.find(session_id=talk.id, root=True, limit=50)) == ["turn"]
    where: dict[str, Any] = {
        "session_id": talk.id,
        "type": "tool",
        "failed": True,
        "started_at": between(now, now + DAY),
        "duration": between(0, 5),  # seconds
    }
    assert await db.traces.find(**where, limit=50) == [tools[1]]
    assert await db.traces.count(**where) == 1
    await db.sessions.delete(talk.id)
    assert await db.traces.get(root.id) is None  # traces go with their thread


# ---- login sessions


@theirs("sessions")
async def log_in(db: Persistence, talk: Session) -> None:
    login = await db.login_sessions.create(user_id=talk.user_id, expires_at=datetime.now(UTC) + DAY)
    assert await db.login_sessions.find(user_id=talk.user_id) == [login]
    assert await db.login_sessions.delete(login.id)


# ---- middleware


@theirs("ensureThread", "persistMessage", "persistTrace", "getThreadMessages", "getThreadTraces")
async def middleware(db: Persistence, talk: Session) -> None:
    seen: list[str] = []
    keeper = PersistenceMiddleware(
        db,
        auto_create_thread=True,
        default_agent_id="default",
        persist_messages=True,
        persist_traces=True,
        on_message=lambda message: seen.append(message.role),
        on_trace=lambda trace: seen.append(trace.type),
    )
    thread_id = f"new-{talk.id}"
    assert await keeper.ensure_thread(thread_id)
    assert not await keeper.ensure_thread(thread_id)
    thread = await db.sessions.get(thread_id)
    assert thread is not None and thread.agent_id == "default"
    said = await keeper.persist_message({"thread_id": thread_id, "role": "user", "content": "Hello"})
    trace_id = f"trace-{talk.id}"
    start = {"thread_id": thread_id, "name": "answer", "type": "llm"}
    await keeper.persist_trace({"trace_id": trace_id, "action": "start", "data": start})
    trace = await keeper.persist_trace({"trace_id": trace_id, "action": "end", "data": {"output": "Hello, you"}})
    assert seen == ["user", "llm", "llm"]
    assert await keeper.get_thread_messages(thread_id, limit=50) == [said]
    assert await keeper.get_thread_traces(thread_id, limit=50) == [trace]
    with refused(ParentGone):
        await PersistenceMiddleware(db, auto_create_thread=False).ensure_thread("nobody's")
    with refused(BadOption):
        await PersistenceMiddleware(db, persist_messages=False).persist_message({"thread_id": "x", "role": "user"})


@theirs("onUserMessage", "onAssistantMessage", "onToolResult")
async def callbacks(db: Persistence, talk: Session) -> None:
    handler = PersistenceMiddleware(db).handler(talk.id)
    await handler.on_user_message("Is the kettle on?")
    await handler.on_assistant_message(None, [{"id": "call_k", "name": "kettle", "arguments": {}}])
    await handler.on_tool_result("call_k", {"on": True}, name="kettle")
    assert [message.role for message in await db.messages.last(talk.id, 3)] == ["user", "assistant", "tool"]


# ---- runs


def agent(message: str, history: list[dict[str, Any]]) -> str:
    """Stands for yours: a function or an object with ``run``, ``chat``, ``send`` or ``stream``."""
    return f"{message}: after {len(history)} messages"


async def streaming_agent(message: str, history: list[dict[str, Any]]) -> AsyncIterator[str]:
    for word in ("Once", " upon", " a time"):
        yield word


@theirs("withStorage")
async def run_an_agent(db: Persistence, talk: Session) -> None:
    stored = with_storage(agent, db, auto_save=True, auto_load_history=True, max_history_messages=50, agent_id="waiter")
    turn = await stored.turn("Tea", user_id=talk.user_id)  # a new thread
    thread = await db.sessions.get(turn.thread_id)
    assert thread is not None and str(thread.title).startswith("Conversation ")
    assert turn.result == "Tea: after 0 messages"
    assert await stored.run("Milk", thread_id=turn.thread_id) == "Milk: after 2 messages"
    assert await stored.run("Salt", thread_id=turn.thread_id, load_history=False) == "Salt: after 0 messages"
    assert await stored.run("Jam", thread_id=turn.thread_id, max_history_messages=3) == "Jam: after 3 messages"
    await stored.run("Bread", thread_id=f"mine-{talk.id}", thread_title="Breakfast")
    mine = await db.sessions.get(f"mine-{talk.id}")
    assert mine is not None and (mine.title, mine.agent_id) == ("Breakfast", "waiter")


@theirs("continueThread", "streamContinueThread")
async def continue_a_thread(db: Persistence, talk: Session) -> None:
    before = await db.messages.count(talk.id)
    answer = await continue_thread(agent, db, talk.id, "Anything else?", message_limit=50, load_history=True)
    assert answer.startswith("Anything else?: after ")
    async with stream_continue_thread(streaming_agent, db, talk.id, "Tell me") as stream:
        assert "".join([chunk async for chunk in stream]) == "Once upon a time"
    [*_, said] = await db.messages.last(talk.id, 4)
    assert (said.role, said.content) == ("assistant", "Once upon a time")
    await continue_thread(agent, db, talk.id, "Off the record", persist_messages=False)
    assert await db.messages.count(talk.id) == before + 4
    with refused(ParentGone):
        await continue_thread(agent, db, "nobody's", "Hello")


@theirs("createThread", "getOrCreateThread", "sendMessage", "saveMessage", "getHistory", "listThreads", "deleteThread")
async def manage_threads(db: Persistence, talk: Session) -> None:
    thread = await db.threads.create(user_id=talk.user_id)
    assert await db.threads.get_or_create(thread.id) == thread
    answer = await db.threads.send(thread.id, {"role": "user", "content": "Tea"}, agent=agent)
    assert answer == "Tea: after 0 messages"
    await db.messages.append(thread.id, Message("user", "Thank you"))
    history = await db.threads.history(thread.id)
    assert [message.content for message in history] == ["Tea", answer, "Thank you"]
    threads = await db.threads.list(limit=20, offset=0, user_id=talk.user_id)
    assert [each.id for each in threads] == [thread.id, talk.id]
    assert await db.threads.delete(thread.id)
    assert not await db.threads.delete(thread.id)


@theirs("loadContext", "toLLMMessages", "summary", "forkThread")
async def load_a_context(db: Persistence, talk: Session) -> None:
    context = await db.threads.load_context(talk.id, message_limit=50, include_tool_messages=True)
    assert context.messages == await db.messages.last(talk.id, 50)
    assert context.to_llm_messages("openai")[-1]["role"] == context.messages[-1].role
    assert len(context.summary().splitlines()) == 4
    spoken = await db.threads.load_context(
        talk.id, include_tool_messages=False, filter=lambda message: message.role == "user"
    )
    assert {message.role for message in spoken.messages} == {"user"}
    fork = await db.threads.fork(talk.id, message_limit=50)
    assert fork.title == f"Fork of {talk.title}"
    assert (await db.threads.history(fork.id))[-1].content == context.messages[-1].content


if __name__ == "__main__":
    main("Seashore")
