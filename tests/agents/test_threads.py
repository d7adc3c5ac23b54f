"""Threads: created, talked to, listed; their latest messages as a context for a model."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

import kvpersist
from kvpersist.agents.persistence import Persistence
from kvpersist.agents.records import Message, ToolCallPart
from kvpersist.agents.runs.threads import ThreadManager
from kvpersist.errors import BadOption, BadRequest, ParentGone, UniqueConflict

Sound = Callable[[Persistence], Awaitable[None]]


def counting(message: str, history: list[Any]) -> str:
    return f"{message} after {len(history)}"


async def test_a_thread_has_a_title_with_the_local_time_unless_it_is_given_one(db: Persistence) -> None:
    usual = await db.threads.create(user_id="ada")
    named = await db.threads.create(title="Tea", id="t", metadata={"topic": "tea"})

    assert usual.created_at is not None
    assert usual.title == f"Conversation {usual.created_at.astimezone():%Y-%m-%d %H:%M:%S}"
    assert (named.id, named.title, named.metadata) == ("t", "Tea", {"topic": "tea"})
    assert await db.sessions.get("t") == named
    with pytest.raises(UniqueConflict):
        await db.threads.create(id="t")


async def test_get_or_create_gives_one_thread_to_all_who_ask_at_once(db: Persistence) -> None:
    found = await asyncio.gather(*[db.threads.get_or_create("t", user_id="ada", title="Tea") for _ in range(10)])

    assert {(session.id, session.user_id, session.title) for session in found} == {("t", "ada", "Tea")}
    assert await db.sessions.count() == 1
    assert (await db.threads.get_or_create("t", title="other")).title == "Tea"
    with pytest.raises(BadRequest, match="another user"):
        await db.threads.get_or_create("t", user_id="eve")


async def test_what_is_sent_is_answered_by_the_agent_and_kept(db: Persistence) -> None:
    manager = ThreadManager(db, counting)
    await manager.create(id="t")

    assert await manager.send("t", {"role": "user", "content": "hi"}) == "hi after 0"
    assert await manager.send("t", "ho") == "ho after 2"
    assert await manager.send("t", "ho", max_history_messages=1) == "ho after 1"
    assert await db.threads.send("t", "hu", agent=lambda message: {"content": "as it is"}) == {"content": "as it is"}
    assert [message.content for message in await db.threads.history("t")][-2:] == ["hu", "as it is"]


async def test_sending_needs_an_agent_and_a_thread(db: Persistence) -> None:
    with pytest.raises(BadRequest, match="agent="):
        await db.threads.send("t", "hi")
    with pytest.raises(ParentGone):
        await ThreadManager(db, counting).send("t", "hi")
    assert await db.sessions.count() == 0
    await db.threads.create(id="t", user_id="ada")
    with pytest.raises(BadRequest, match="another user"):
        await ThreadManager(db, counting).send("t", "hi", user_id="eve")


async def test_history_is_all_of_a_thread_in_order(db: Persistence) -> None:
    await db.threads.create(id="t")
    await db.messages.append_many("t", [Message("user", n) for n in range(300)])

    assert [message.content for message in await db.threads.history("t")] == list(range(300))
    assert await db.threads.history("missing") == []


async def test_a_context_has_the_latest_messages_oldest_first(db: Persistence) -> None:
    await db.threads.create(id="t", title="Counting")
    await db.messages.append_many("t", [Message("user", f"number  {n}\nof many") for n in range(230)])

    context = await db.threads.load_context("t")
    odd = await db.threads.load_context("t", message_limit=120, filter=lambda message: message.number % 2 == 1)

    assert [message.number for message in context.messages] == list(range(181, 231))
    assert [message.number for message in odd.messages] == list(range(1, 230, 2))[-120:]
    assert context.summary().splitlines() == [
        "Thread: Counting",
        "Messages: 50 of 230",
        "Roles: user 50",
        "Last: user: number 229 of many",
    ]
    assert (await db.threads.load_context("t", message_limit=0)).messages == []
    with pytest.raises(ParentGone):
        await db.threads.load_context("missing")
    with pytest.raises(BadOption, match="message_limit"):
        await db.threads.load_context("t", message_limit=-1)


async def test_a_context_may_leave_tools_out(db: Persistence) -> None:
    await db.threads.create(id="t")
    await db.messages.append_many(
        "t",
        [
            Message("system", "be brief"),
            Message("user", "what is it?"),
            Message("assistant", "let me look", tool_calls=[ToolCallPart("c1", "look", {})]),
            Message("tool", "cat", tool_call_id="c1"),
            Message("assistant", None, tool_calls=[ToolCallPart("c2", "look", {})]),
            Message("tool", "cat", tool_call_id="c2"),
            Message("assistant", "a cat"),
        ],
    )

    whole = await db.threads.load_context("t")
    plain = await db.threads.load_context("t", message_limit=3, include_tool_messages=False)

    assert [message["role"] for message in whole.to_llm_messages()] == [
        "system",
        "user",
        "assistant",
        "tool",
        "assistant",
        "tool",
        "assistant",
    ]
    assert [message["role"] for message in whole.to_llm_messages("anthropic")] == [
        "user",
        "assistant",
        "user",
        "assistant",
        "user",
        "assistant",
    ]
    assert whole.system == "be brief"
    assert plain.to_llm_messages() == [
        {"role": "user", "content": "what is it?"},
        {"role": "assistant", "content": "let me look"},
        {"role": "assistant", "content": "a cat"},
    ]


async def test_an_empty_thread_has_a_summary_too(db: Persistence) -> None:
    await db.sessions.create(id="t")

    assert (await db.threads.load_context("t")).summary().splitlines() == [
        "Thread: t",
        "Messages: 0 of 0",
        "Roles: none",
        "Last: none",
    ]


async def test_threads_are_listed_newest_first(db: Persistence) -> None:
    for number in range(25):
        await db.threads.create(id=f"t{number:02}", user_id="ada" if number % 2 else "bob")

    newest = [f"t{number:02}" for number in reversed(range(25))]
    assert [thread.id for thread in await db.threads.list()] == newest[:20]
    assert [thread.id for thread in await db.threads.list(10, 20)] == newest[20:]
    assert [thread.id for thread in await db.threads.list(2, 1, order="asc")] == ["t01", "t02"]
    assert [thread.id for thread in await db.threads.list(2, user_id="ada")] == ["t23", "t21"]
    assert await db.threads.list(0) == []
    with pytest.raises(BadRequest, match="order"):
        await db.threads.list(order="random")  # type: ignore[arg-type]
    with pytest.raises(BadRequest):
        await db.threads.list(offset=-1)


async def numbered(db: Persistence, count: int) -> None:
    await db.threads.create(id="t", title="Tea", user_id="ada", metadata={"kind": "green"})
    await db.messages.append_many("t", [Message("user", n) for n in range(1, count + 1)])


async def test_a_fork_begins_with_the_latest_messages(db: Persistence, sound: Sound) -> None:
    await numbered(db, 120)

    usual = await db.threads.fork("t")
    early = await db.threads.fork("t", at=60, message_limit=10, title="Early")
    whole = await db.threads.fork("t", message_limit=None, id="whole", user_id="bob")
    empty = await db.threads.fork("t", message_limit=0)

    async def contents(thread: str) -> list[Any]:
        return [message.content for message in await db.threads.history(thread)]

    assert (usual.title, usual.user_id, usual.metadata) == ("Fork of Tea", "ada", {"kind": "green"})
    assert (usual.parent_id, usual.forked_at, usual.lineage) == ("t", 120, ["t"])
    assert await contents(usual.id) == list(range(71, 121))
    assert (early.title, await contents(early.id)) == ("Early", list(range(51, 61)))
    assert (whole.id, whole.user_id, await contents("whole")) == ("whole", "bob", list(range(1, 121)))
    assert await contents(empty.id) == []
    assert await contents("t") == list(range(1, 121))
    await sound(db)


async def test_a_fork_and_its_parent_go_on_apart(db: Persistence, sound: Sound) -> None:
    await numbered(db, 60)
    middle = await db.messages.at("t", 30)
    assert middle is not None

    fork = await db.threads.fork("t", at=middle.id, message_limit=5)
    await db.threads.send(fork.id, "fork", agent=lambda message: "forked")
    await db.threads.send("t", "parent", agent=lambda message: "stayed")

    assert [m.content for m in await db.threads.history(fork.id)] == [26, 27, 28, 29, 30, "fork", "forked"]
    assert [m.content for m in await db.messages.last("t", 3)] == [60, "parent", "stayed"]
    with pytest.raises(BadRequest, match="no message"):
        await db.threads.fork("t", at="nothing")
    with pytest.raises(BadRequest, match="no message"):
        await db.threads.fork(fork.id, at=middle.id)
    with pytest.raises(ParentGone):
        await db.threads.fork("missing")
    with pytest.raises(BadOption, match="message_limit"):
        await db.threads.fork("t", message_limit=-1)
    await sound(db)


async def test_a_fork_has_no_answers_to_calls_it_does_not_have(db: Persistence, sound: Sound) -> None:
    await db.threads.create(id="t")
    calls = [ToolCallPart("c1", "look", {}), ToolCallPart("c2", "look", {})]
    await db.messages.append_many(
        "t",
        [
            Message("user", "look twice"),
            Message("assistant", None, tool_calls=calls),
            Message("tool", "one", tool_call_id="c1"),
            Message("tool", "two", tool_call_id="c2"),
            Message("assistant", "done"),
        ],
    )

    cut = await db.threads.fork("t", message_limit=3)
    kept = await db.threads.fork("t", message_limit=4)
    none = await db.threads.fork("t", message_limit=1, at=4)

    assert [message.role for message in await db.threads.history(cut.id)] == ["assistant"]
    assert [message.role for message in await db.threads.history(kept.id)] == ["assistant", "tool", "tool", "assistant"]
    assert [call.state for call in await db.tool_calls.of(kept.id)] == ["completed", "completed"]
    assert await db.threads.history(none.id) == []
    await sound(db)


async def test_a_deleted_thread_is_gone_with_its_messages(db: Persistence, driver: Any, sound: Sound) -> None:
    empty = await driver.everything()
    await ThreadManager(db, counting).create(id="t")
    await ThreadManager(db, counting).send("t", "hi")

    assert await db.threads.delete("t") is True
    assert await db.threads.delete("t") is False
    assert await driver.everything() == empty
    await sound(db)


async def test_an_approval_that_waits_survives_a_restart(driver: Any) -> None:
    def agent(messages: list[Any]) -> Any:
        if messages[-1]["role"] == "tool":
            return f"It said: {messages[-1]['content']}"
        return {"content": "May I?", "tool_calls": [{"id": "c1", "name": "delete", "arguments": {"path": "/tmp/x"}}]}

    async with kvpersist.open(driver) as db:
        await db.threads.create(id="t")
        await db.threads.send("t", "delete it", agent=agent)
        [call] = await db.tool_calls.of("t")
        await db.tool_calls.require_approval("t", call.number, call.position)

    async with kvpersist.open(driver) as db:
        [waiting] = await db.tool_calls.pending_approvals("t")
        assert (waiting.name, waiting.arguments) == ("delete", {"path": "/tmp/x"})
        await db.tool_calls.approve("t", waiting.number, waiting.position, by="ada")
        answer = await db.threads.send(
            "t", {"role": "tool", "tool_call_id": waiting.call_id, "content": "deleted"}, agent=agent
        )

        assert answer == "It said: deleted"
        [done] = await db.tool_calls.of("t")
        assert (done.state, done.result) == ("completed", "deleted")
        assert done.approval is not None and done.approval.decided_by == "ada"
        assert await db.tool_calls.pending_approvals() == []
