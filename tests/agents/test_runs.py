"""Runs of agents: every kind of agent, result and chunk; turns whole, failed and cut; history that arrives."""

from __future__ import annotations

import asyncio
import functools
import gc
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

import kvpersist
from kvpersist.agents.persistence import Persistence
from kvpersist.agents.records import Message, ToolCallPart
from kvpersist.agents.runs.model_messages import model_messages, system_text
from kvpersist.agents.runs.runs import continue_thread, stream_continue_thread, with_storage
from kvpersist.driver import Put
from kvpersist.errors import BadOption, BadRequest, CommitUnknown, ParentGone, Unavailable, Unencodable
from kvpersist.testing.faults import Crashed, FaultyDriver
from kvpersist_drivers.memory import MemoryDriver

Sound = Callable[[Persistence], Awaitable[None]]


async def said(db: Persistence, thread: str = "t") -> list[tuple[str, Any]]:
    """Role and content of a thread's messages, in order."""
    return [(message.role, message.content) async for message in db.messages.iterate(thread)]


# ---- agents


def echo(message: str) -> str:
    return f"{message}!"


async def async_echo(message: str) -> str:
    await asyncio.sleep(0)
    return f"{message}!"


def chunks(message: str) -> Iterator[str]:
    yield message
    yield "!"


async def async_chunks(message: str) -> AsyncIterator[str]:
    yield message
    await asyncio.sleep(0)
    yield "!"


class Calls:
    def __call__(self, message: str) -> str:
        return f"{message}!"


class AsyncCalls:
    async def __call__(self, message: str) -> str:
        return f"{message}!"


def having(**methods: Any) -> Any:
    return SimpleNamespace(**methods)


class Awaitables:
    def run(self, message: str) -> Awaitable[str]:
        return async_echo(message)


class Iterated:
    """Iterates without being a generator."""

    def stream(self, message: str) -> AsyncIterator[str]:
        parts = iter([message, "!"])

        class Chunks:
            def __aiter__(self) -> Chunks:
                return self

            async def __anext__(self) -> str:
                for part in parts:
                    return part
                raise StopAsyncIteration

        return Chunks()


AGENTS: dict[str, Any] = {
    "function": echo,
    "async function": async_echo,
    "lambda": lambda message: f"{message}!",
    "partial": functools.partial(lambda mark, message: f"{message}{mark}", "!"),
    "partial of async": functools.partial(async_echo),
    "callable": Calls(),
    "async callable": AsyncCalls(),
    "run": having(run=echo),
    "async run": having(run=async_echo),
    "chat": having(chat=echo),
    "async chat": having(chat=async_echo),
    "send": having(send=echo),
    "async send": having(send=async_echo),
    "stream": having(stream=chunks),
    "async stream": having(stream=async_chunks),
    "async function that gives a stream": having(stream=None, run=async_chunks),
    "generator": chunks,
    "async generator": async_chunks,
    "function that gives an iterator": lambda message: iter([message, "!"]),
    "sync method that gives an awaitable": Awaitables(),
    "iterator of its own": Iterated(),
    "run and stream": having(run=echo, stream=async_chunks),
}


@pytest.mark.parametrize("kind", AGENTS)
async def test_every_kind_of_agent_runs_and_streams(db: Persistence, kind: str) -> None:
    agent = with_storage(AGENTS[kind], db)

    result = await agent.run("hi", thread_id="t")
    async with agent.stream("ho", thread_id="t") as stream:
        streamed = [chunk async for chunk in stream]

    assert result == "hi!"
    assert "".join(streamed) == "ho!"
    assert await said(db) == [("user", "hi"), ("assistant", "hi!"), ("user", "ho"), ("assistant", "ho!")]


@pytest.mark.parametrize("agent", [None, 7, "agent", object(), echo.__class__, Calls, having(go=echo)])
async def test_what_is_no_agent_is_refused(db: Persistence, agent: Any) -> None:
    with pytest.raises(BadRequest, match="an agent is a callable, or has run, chat, send or stream"):
        with_storage(agent, db)


# ---- how they are called


async def history_of(db: Persistence, agent: Any, **settings: Any) -> Any:
    """What an agent that gives back all it is called with got on the third run."""
    seen: list[Any] = []

    def note(*arguments: Any, **named: Any) -> str:
        seen.append((arguments, named))
        return f"answer {len(seen)}"

    stored = with_storage(agent(note), db, **settings)
    for number in (1, 2, 3):
        await stored.run(f"question {number}", thread_id="t", user_id="ada")
    return seen[-1]


HISTORY = [
    {"role": "user", "content": "question 1"},
    {"role": "assistant", "content": "answer 1"},
    {"role": "user", "content": "question 2"},
    {"role": "assistant", "content": "answer 2"},
]
LAST = {"role": "user", "content": "question 3"}
ALL = {"session_id": "t", "user_id": "ada", "history": HISTORY}


@pytest.mark.parametrize(
    ("agent", "expected"),
    [
        (lambda note: lambda message, history: note(message, history), (("question 3", HISTORY), {})),
        (lambda note: lambda messages: note(messages), (([*HISTORY, LAST],), {})),
        (lambda note: lambda message, session: note(message, session), (("question 3", ALL), {})),
        (lambda note: lambda message, options=None: note(message, options), (("question 3", ALL), {})),
        (lambda note: lambda message, *, context: note(message, context=context), (("question 3",), {"context": ALL})),
        (
            lambda note: lambda message, *, thread_id, user_id=None, session_id: note(thread_id, user_id, session_id),
            (("t", "ada", "t"), {}),
        ),
        (
            lambda note: lambda prompt, temperature=0.5, history=(): note(prompt, temperature, history),
            (("question 3", 0.5, HISTORY), {}),
        ),
        (lambda note: lambda message, history, /: note(message, history), (("question 3", HISTORY), {})),
        (lambda note: note, (("question 3",), {"history": HISTORY, "session_id": "t", "user_id": "ada"})),
        (lambda note: lambda message: note(message), (("question 3",), {})),
        (lambda note: having(chat=lambda message, options: note(message, options)), (("question 3", ALL), {})),
    ],
)
async def test_an_agent_is_called_with_what_it_takes(db: Persistence, agent: Any, expected: Any) -> None:
    assert await history_of(db, agent) == expected


async def test_an_agent_that_wants_what_nobody_has_is_refused(db: Persistence) -> None:
    with pytest.raises(BadRequest, match="nothing fills the agent's parameter 'temperature'"):
        with_storage(lambda message, context, temperature: "", db)
    with pytest.raises(BadRequest, match="takes no message"):
        with_storage(lambda: "", db)


async def test_history_that_was_asked_for_is_never_dropped_in_silence(db: Persistence) -> None:
    stored = with_storage(echo, db)

    with pytest.raises(BadRequest, match="takes no history"):
        await stored.run("hi", thread_id="t", load_history=True)
    assert await db.sessions.count() == 0


async def test_the_latest_messages_are_loaded_in_chronological_order(db: Persistence) -> None:
    await db.sessions.create(id="t")
    await db.messages.append_many("t", [Message(role="user", content=n) for n in range(1, 121)])
    seen: list[Any] = []
    stored = with_storage(lambda message, history: seen.append([each["content"] for each in history]), db)

    await stored.run("usual", thread_id="t")
    await stored.run("three", thread_id="t", max_history_messages=3)
    await stored.run("none", thread_id="t", load_history=False)
    await stored.run("none", thread_id="t", max_history_messages=0)

    assert seen == [list(range(71, 121)), [119, 120, "usual"], [], []]


async def test_history_is_given_in_the_style_that_is_asked_for(db: Persistence) -> None:
    def agent(note: Any) -> Any:
        return lambda message, history: note(history)

    (given,), _ = await history_of(db, agent, history_style="anthropic")
    assert given == HISTORY

    (records,), _ = await history_of(db, agent, history_style="records")
    assert [type(each) for each in records] == [Message] * 10
    with pytest.raises(BadOption, match="history_style"):
        with_storage(echo, db, history_style="yaml")  # type: ignore[arg-type]


async def test_a_sync_agent_does_not_block_the_loop(db: Persistence) -> None:
    started, free = threading.Event(), threading.Event()

    def blocking(message: str) -> str:
        started.set()
        assert free.wait(30)
        return threading.current_thread().name

    run = asyncio.create_task(with_storage(blocking, db).run("hi", thread_id="t"))
    while not started.is_set():
        await asyncio.sleep(0)
    free.set()

    assert (await run).startswith("kvpersist-agent")


async def test_all_steps_of_a_sync_stream_happen_in_one_thread(db: Persistence) -> None:
    names: list[int] = []

    def agent(message: str) -> Iterator[str]:
        for _ in range(5):
            names.append(threading.get_ident())
            yield "x"
        names.append(threading.get_ident())

    await with_storage(agent, db).run("hi")

    assert len(set(names)) == 1
    assert names[0] != threading.get_ident()


# ---- results


def parted(*parts: tuple[Any, ...]) -> list[tuple[Any, ...]]:
    return list(parts)


FUNCTION = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": '{"q":1}'}}
FLAT = {"id": "c1", "name": "look", "arguments": {"q": 1}}
ASKED = ("assistant", None, [ToolCallPart("c1", "look", {"q": 1})])


@pytest.mark.parametrize(
    ("result", "expected"),
    [
        ("text", [("assistant", "text", None)]),
        ("", []),
        (None, []),
        ({"content": "text"}, [("assistant", "text", None)]),
        ({"message": "text"}, [("assistant", "text", None)]),
        ({"message": {"role": "assistant", "content": "text"}}, [("assistant", "text", None)]),
        (having(content="text"), [("assistant", "text", None)]),
        (having(message=having(content="text", tool_calls=None)), [("assistant", "text", None)]),
        (Message(role="assistant", content="text"), [("assistant", "text", None)]),
        ({"content": [{"type": "text", "text": "x"}]}, [("assistant", [{"type": "text", "text": "x"}], None)]),
        ({"answer": 4}, [("assistant", '{"answer":4}', None)]),
        ({"content": None, "tool_calls": [FLAT]}, [ASKED]),
        (having(content=None, tool_calls=[having(**FLAT)]), [ASKED]),
        (
            {"content": "let me look", "tool_calls": [FUNCTION]},
            [("assistant", "let me look", [ToolCallPart("c1", "look", '{"q":1}')])],
        ),
        ({"message": "ok", "type": "execute", "toolCalls": [{"toolName": "look", "id": "c1", "arguments": {"q": 1}}]},
         [("assistant", "ok", [ToolCallPart("c1", "look", {"q": 1})])]),
        ({"content": "it is 0", "tool_calls": [FLAT | {"result": 0}]},
         [ASKED, ("tool", 0, "c1"), ("assistant", "it is 0", None)]),
        ({"content": "no", "tool_calls": [FLAT | {"result": False}]},
         [ASKED, ("tool", False, "c1"), ("assistant", "no", None)]),
        ({"content": "it is 3", "tool_calls": [FUNCTION], "tool_results": [{"tool_call_id": "c1", "content": "3"}]},
         [("assistant", None, [ToolCallPart("c1", "look", '{"q":1}')]), ("tool", "3", "c1"),
          ("assistant", "it is 3", None)]),
        ({"tool_calls": [FLAT, FLAT | {"id": "c2", "result": "two"}]},
         [("assistant", None, [ToolCallPart("c1", "look", {"q": 1}), ToolCallPart("c2", "look", {"q": 1})]),
          ("tool", "two", "c2")]),
        ({"tool_calls": [FLAT | {"result": "a"}, FLAT | {"result": "b"}]},
         [("assistant", None, [ToolCallPart("c1", "look", {"q": 1})] * 2), ("tool", "a", "c1"), ("tool", "b", "c1")]),
    ],
)  # fmt: skip
async def test_every_kind_of_result_becomes_a_turn(db: Persistence, sound: Sound, result: Any, expected: Any) -> None:
    given = await with_storage(lambda message: result, db).run("hi", thread_id="t")

    assert given is result
    [first, *rest] = [message async for message in db.messages.iterate("t")]
    assert (first.role, first.content, first.error) == ("user", "hi", None)
    assert [(each.role, each.content, each.tool_calls or each.tool_call_id) for each in rest] == expected
    await sound(db)


async def test_a_failed_call_is_told_from_one_that_succeeded(db: Persistence) -> None:
    calls = [
        {"id": "a", "name": "x", "error": "no such file"},
        {"id": "b", "name": "x", "result": {"success": False, "content": "denied"}},
        {"id": "c", "name": "x", "result": ValueError("bad"), "is_error": True},
        {"id": "d", "name": "x", "result": {"success": True}},
        {"id": "e", "name": "x", "result": 0, "error": ""},
        {"id": "f", "name": "x", "error": None, "result": None},
    ]
    await with_storage(lambda message: {"tool_calls": calls}, db).run("hi", thread_id="t")

    states = {call.call_id: (call.state, call.result) for call in await db.tool_calls.of("t")}
    assert states == {
        "a": ("failed", "no such file"),
        "b": ("failed", {"success": False, "content": "denied"}),
        "c": ("failed", "bad"),
        "d": ("completed", {"success": True}),
        "e": ("completed", 0),
        "f": ("pending", None),
    }


@pytest.mark.parametrize("response", [{"type": "execute", "message": "done"}, {"type": "execute", "steps": [1]}])
async def test_the_kind_of_a_response_is_kept(db: Persistence, response: Any) -> None:
    await with_storage(lambda message: response, db).run("hi", thread_id="t")

    [_, answer] = await db.threads.history("t")
    assert (answer.metadata, answer.extra) == (
        {"response_type": "execute"},
        None,
    )  # as it is imported from storage-prisma
    assert answer.content == response.get("message", '{"type":"execute","steps":[1]}')


async def test_an_extractor_says_what_a_result_means(db: Persistence) -> None:
    result = SimpleNamespace(output_text="four")
    stored = with_storage(lambda message: result, db, extract=lambda found: found.output_text)
    many = with_storage(
        lambda message: result, db, extract=lambda found: [Message("assistant", "f"), Message("assistant", "our")]
    )

    assert await stored.run("2+2?", thread_id="t") is result
    await many.run("2+2?", thread_id="t")

    assert [content for _, content in await said(db)] == ["2+2?", "four", "2+2?", "f", "our"]


@pytest.mark.parametrize("result", [7, b"bytes", [1, 2], object(), {"content": "x", "tool_calls": "all"}])
async def test_a_result_that_nobody_understands_fails_the_turn(db: Persistence, result: Any) -> None:
    with pytest.raises(BadRequest, match="extract="):
        await with_storage(lambda message: result, db).run("hi", thread_id="t")

    [only] = await db.threads.history("t")
    assert only.error is not None and only.error.startswith("BadRequest")


async def test_a_call_without_a_name_fails_the_turn(db: Persistence) -> None:
    with pytest.raises(BadRequest, match="no name"):
        await with_storage(lambda message: {"tool_calls": [{"id": "x"}]}, db).run("hi", thread_id="t")

    assert [message.role for message in await db.threads.history("t")] == ["user"]


async def test_an_answer_that_cannot_be_kept_leaves_the_message_with_the_error(db: Persistence) -> None:
    with pytest.raises(Unencodable):
        await with_storage(lambda message: {"content": {"x": {1, 2}}}, db).run("hi", thread_id="t")

    [only] = await db.threads.history("t")
    assert only.content == "hi"
    assert only.error is not None and only.error.startswith("Unencodable")


# ---- chunks


async def stream_of(*chunks: Any) -> AsyncIterator[Any]:
    for chunk in chunks:
        yield chunk


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["a", "b"], [("assistant", "ab", None)]),
        ([{"type": "content", "delta": "a"}, {"type": "content", "delta": "b"}], [("assistant", "ab", None)]),
        ([having(type="text-delta", delta="a"), having(type="text-delta", delta="b")], [("assistant", "ab", None)]),
        ([{"type": "content", "delta": {"text": "a"}}, {"type": "ping"}, None, 7], [("assistant", "a", None)]),
        (
            [
                {"type": "content", "delta": "let me "},
                {"type": "content", "delta": "look"},
                {"type": "tool_call", "tool_call": FLAT},
                {"type": "tool_result", "tool_call_id": "c1", "result": 0},
                {"type": "content", "delta": "it is 0"},
            ],
            [
                ("assistant", "let me look", [ToolCallPart("c1", "look", {"q": 1})]),
                ("tool", 0, "c1"),
                ("assistant", "it is 0", None),
            ],
        ),
        (
            [
                {"type": "tool-call-start", "toolCall": {"id": "c1", "name": "look"}},
                {"type": "tool-call-delta", "id": "c1", "delta": '{"q"'},
                {"type": "tool-call-delta", "id": "c1", "delta": ":1}"},
                {"type": "tool-call-end", "id": "c1"},
                {"type": "tool-result", "toolResult": {"toolCallId": "c1", "content": "one"}},
                {"type": "finish"},
            ],
            [("assistant", None, [ToolCallPart("c1", "look", '{"q":1}')]), ("tool", "one", "c1")],
        ),
        (
            [
                {"type": "tool_call", **FLAT},
                {"type": "tool_call", **FLAT, "id": "c2"},
                {"type": "tool_result", "tool_call_id": "c2", "result": 2},
                {"type": "tool_result", "tool_call_id": "c1", "result": 1},
            ],
            [
                ("assistant", None, [ToolCallPart("c1", "look", {"q": 1}), ToolCallPart("c2", "look", {"q": 1})]),
                ("tool", 2, "c2"),
                ("tool", 1, "c1"),
            ],
        ),
        (
            [
                {"type": "tool_call", **FLAT},
                {"type": "tool_call_end", **FLAT, "result": 1},
                {"type": "tool_result", "tool_call_id": "c1", "result": 1},
                {"type": "tool_call_end", "id": "c1"},
                {"type": "tool_call", **FLAT},
                {"type": "tool_result", "tool_call_id": "c1", "result": 2},
            ],
            [ASKED, ("tool", 1, "c1"), ASKED, ("tool", 2, "c1")],
        ),
        (
            [{"type": "tool_result", "tool_call_id": "of an earlier turn", "result": 1}, "done"],
            [("tool", 1, "of an earlier turn"), ("assistant", "done", None)],
        ),
        ([{"type": "finish", "result": {"content": "all at once"}}], [("assistant", "all at once", None)]),
        (["a", {"type": "done", "result": {"content": "a"}}], [("assistant", "a", None)]),
    ],
)
async def test_every_kind_of_chunk_is_forwarded_and_kept(
    db: Persistence, sound: Sound, given: list[Any], expected: Any
) -> None:
    stream = with_storage(lambda message: stream_of(*given), db).stream("hi", thread_id="t")

    forwarded = [chunk async for chunk in stream]

    assert len(forwarded) == len(given)
    assert all(one is other for one, other in zip(forwarded, given, strict=True))
    [_, *rest] = await db.threads.history("t")
    assert [(each.role, each.content, each.tool_calls or each.tool_call_id) for each in rest] == expected
    assert [each.partial for each in rest] == [None] * len(rest)
    assert stream.turn.messages == await db.threads.history("t")
    await sound(db)


@pytest.mark.parametrize("chunk", [{"type": "tool_call", "id": "c1"}, {"type": "tool_result", "result": 1}])
async def test_a_tool_event_that_nobody_understands_fails_the_turn(db: Persistence, chunk: Any) -> None:
    stored = with_storage(lambda message: stream_of("so far", chunk), db)

    with pytest.raises(BadRequest, match="extract_chunk="):
        await stored.run("hi", thread_id="t")

    [user, answer] = await db.threads.history("t")
    assert user.error is not None
    assert (answer.content, answer.partial) == ("so far", True)


async def test_an_extractor_says_what_a_chunk_means(db: Persistence) -> None:
    given = [SimpleNamespace(token="a"), SimpleNamespace(token=None), SimpleNamespace(token="b")]
    stored = with_storage(lambda message: stream_of(*given), db, extract_chunk=lambda chunk: chunk.token)

    assert [chunk async for chunk in stored.stream("hi", thread_id="t")] == given
    assert await said(db) == [("user", "hi"), ("assistant", "ab")]


# ---- turns


async def test_a_turn_is_one_batch(db: Persistence, driver: Any, backend: str) -> None:
    await db.sessions.create(id="t")
    result = {"content": "done", "tool_calls": [FLAT | {"result": 1}]}
    stored = with_storage(lambda message: result, db)
    await stored.run("first", thread_id="t")
    driver.clear()

    await stored.run("second", thread_id="t")

    written = [
        [op.key for op in batch.ops if isinstance(op, Put) and ":message:" in op.key] for batch in driver.batches
    ]
    if backend == "ordered":
        assert sum(len(each) for each in written) == 4
    else:
        assert [len(each) for each in written] == [4]


async def test_the_session_that_was_asked_for_is_the_one_that_is_created(db: Persistence) -> None:
    await with_storage(echo, db, agent_id="helper").run("hi", thread_id="asked for", user_id="ada")

    [session] = await db.sessions.list()
    assert (session.id, session.user_id, session.agent_id) == ("asked for", "ada", "helper")
    assert session.title is not None and session.title.startswith("Conversation 20")
    assert [each.session_id for each in await db.threads.history("asked for")] == ["asked for"] * 2


async def test_a_run_without_a_thread_begins_one(db: Persistence) -> None:
    turn = await with_storage(echo, db).turn("hi", thread_title="A talk")

    [session] = await db.sessions.list()
    assert (session.id, session.title) == (turn.thread_id, "A talk")
    assert turn.result == "hi!"
    assert turn.messages == await db.threads.history(turn.thread_id)


async def test_without_leave_to_create_a_missing_thread_is_an_error_before_the_agent_runs(db: Persistence) -> None:
    ran: list[str] = []
    stored = with_storage(ran.append, db, auto_create_thread=False)

    with pytest.raises(ParentGone):
        await stored.run("hi", thread_id="t")

    assert ran == []
    assert await db.sessions.count() == 0
    await stored.run("hi")  # a new one is nobody's
    assert ran == ["hi"]


@pytest.mark.parametrize("settings", [{}, {"auto_save": False}, {"auto_create_thread": False}])
async def test_a_thread_of_another_user_is_refused(db: Persistence, settings: dict[str, Any]) -> None:
    await db.sessions.create(id="t", user_id="ada")
    ran: list[str] = []

    with pytest.raises(BadRequest, match="belongs to another user"):
        await with_storage(ran.append, db, **settings).run("hi", thread_id="t", user_id="eve")

    assert ran == []


async def test_nothing_is_written_where_saving_is_off(db: Persistence, driver: Any) -> None:
    await db.sessions.create(id="t")
    await db.messages.append("t", Message("user", "before"))
    seen: list[Any] = []
    driver.clear()

    await with_storage(lambda message, history: seen.append(history), db, auto_save=False).run("hi", thread_id="t")
    turn = await with_storage(echo, db, auto_save=False).turn("hi")

    assert seen == [[{"role": "user", "content": "before"}]]
    assert (turn.result, turn.messages, driver.batches) == ("hi!", [], [])


async def test_messages_of_a_turn_stand_in_order_though_they_share_a_time(db: Persistence) -> None:
    result = {"content": "done", "tool_calls": [{"id": str(n), "name": "x", "result": n} for n in range(9)]}
    await with_storage(lambda message: result, db).run("hi", thread_id="t")

    history = await db.threads.history("t")
    assert [message.number for message in history] == list(range(1, 13))
    assert [message.role for message in history] == ["user", "assistant", *["tool"] * 9, "assistant"]
    assert [message.content for message in history[2:-1]] == list(range(9))


async def test_runs_that_interleave_leave_whole_turns_without_gaps(db: Persistence, sound: Sound) -> None:
    count = 20
    inside = 0
    all_inside = asyncio.Event()

    async def agent(message: str) -> Any:
        nonlocal inside
        inside += 1
        if inside == count:
            all_inside.set()
        await all_inside.wait()
        return {"content": f"answer {message}", "tool_calls": [{"id": message, "name": "x", "result": message}]}

    stored = with_storage(agent, db)
    await asyncio.gather(*[stored.run(str(n), thread_id="t") for n in range(count)])

    history = await db.threads.history("t")
    assert [message.number for message in history] == list(range(1, 4 * count + 1))
    turns = [history[at : at + 4] for at in range(0, len(history), 4)]
    for user, asks, result, answer in turns:
        assert [user.role, asks.role, result.role, answer.role] == ["user", "assistant", "tool", "assistant"]
        assert asks.tool_calls is not None
        assert {asks.tool_calls[0].id, result.content} == {user.content}
        assert answer.content == f"answer {user.content}"
    assert {turn[0].content for turn in turns} == {str(n) for n in range(count)}
    await sound(db)


async def test_each_stored_message_is_handed_to_the_callback(db: Persistence) -> None:
    seen: list[tuple[int, str]] = []

    async def later(message: Message) -> None:
        await asyncio.sleep(0)
        assert await db.messages.get(message.id) == message
        seen.append((message.number, message.role))

    await with_storage(echo, db, on_message=lambda message: seen.append((message.number, "sync"))).run(
        "hi", thread_id="t"
    )
    await with_storage(echo, db, on_message=later).run("hi", thread_id="t")

    assert seen == [(1, "sync"), (2, "sync"), (3, "user"), (4, "assistant")]


async def test_an_error_of_the_callback_reaches_the_caller_once_the_turn_is_stored(db: Persistence) -> None:
    def refuse(message: Message) -> None:
        raise LookupError("no")

    with pytest.raises(LookupError, match="no"):
        await with_storage(echo, db, on_message=refuse).run("hi", thread_id="t")

    assert [(message.content, message.error) for message in await db.threads.history("t")] == [
        ("hi", None),
        ("hi!", None),
    ]


# ---- what can be said


async def test_a_message_may_be_a_text_parts_a_mapping_or_a_record(db: Persistence) -> None:
    parts = [{"type": "text", "text": "what is it?"}, {"type": "image", "url": "u"}]
    got: list[Any] = []
    stored = with_storage(got.append, db)

    for message in ("text", parts, {"role": "user", "content": "mapped", "name": "Ada"}, Message("user", "record")):
        await stored.run(message, thread_id="t")
    await stored.run([{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}], thread_id="t")

    assert got == ["text", parts, "mapped", "record", "hi"]
    assert await said(db) == [
        ("user", "text"),
        ("user", parts),
        ("user", "mapped"),
        ("user", "record"),
        ("system", "be brief"),
        ("user", "hi"),
    ]


@pytest.mark.parametrize(
    "message",
    [
        [],
        None,
        7,
        {"role": "assistant", "content": "I"},
        {"role": "robot", "content": "beep"},
        {"role": "user", "text": "typo"},
        {"role": "user", "content": object()},
        [{"role": "user", "content": "a"}, {"role": "nobody", "content": "b"}],
        Message("user", "x", session_id="another"),
    ],
)
async def test_what_cannot_be_said_is_refused_before_the_agent_runs(db: Persistence, message: Any) -> None:
    ran: list[Any] = []

    with pytest.raises(BadRequest):
        await with_storage(ran.append, db).run(message, thread_id="t")

    assert ran == []
    assert await db.sessions.count() == 0


async def test_a_call_that_was_approved_later_is_answered_by_the_next_run(db: Persistence, sound: Sound) -> None:
    seen: list[Any] = []

    def agent(messages: list[Any]) -> Any:
        seen.append(messages)
        return {"content": "May I?", "tool_calls": [FLAT]} if len(seen) == 1 else "Deleted."

    stored = with_storage(agent, db)
    await stored.run("delete it", thread_id="t")
    await stored.run({"role": "tool", "tool_call_id": "c1", "content": "ok"}, thread_id="t")

    assert [message["role"] for message in seen[1]] == ["user", "assistant", "tool"]
    assert [call.state for call in await db.tool_calls.of("t")] == ["completed"]
    assert await said(db) == [
        ("user", "delete it"),
        ("assistant", "May I?"),
        ("tool", "ok"),
        ("assistant", "Deleted."),
    ]
    await sound(db)


# ---- failures


class Broken(Exception):
    pass


async def test_a_run_that_raises_keeps_the_message_and_marks_it(db: Persistence, sound: Sound) -> None:
    error = Broken("no credit")

    async def agent(message: str) -> str:
        raise error

    with pytest.raises(Broken) as raised:
        await with_storage(agent, db).run("hi", thread_id="t")

    assert raised.value is error
    [only] = await db.threads.history("t")
    assert (only.role, only.content, only.error) == ("user", "hi", "Broken: no credit")
    await sound(db)


@pytest.mark.parametrize("agent", ["sync", "async"])
@pytest.mark.parametrize("keep", [True, False])
async def test_a_stream_that_raises_keeps_the_partial_answer_by_option(db: Persistence, agent: str, keep: bool) -> None:
    def failing(message: str) -> Iterator[str]:
        yield "so "
        yield "far"
        raise Broken("gone")

    async def async_failing(message: str) -> AsyncIterator[str]:
        for chunk in ("so ", "far"):
            yield chunk
        raise Broken("gone")

    stored = with_storage(failing if agent == "sync" else async_failing, db, keep_partial=keep)
    forwarded: list[str] = []
    with pytest.raises(Broken, match="gone"):
        async for chunk in stored.stream("hi", thread_id="t"):
            forwarded += [chunk]

    assert forwarded == ["so ", "far"]
    [user, *rest] = await db.threads.history("t")
    assert user.error == "Broken: gone"
    assert [(each.role, each.content, each.partial) for each in rest] == (
        [("assistant", "so far", True)] if keep else []
    )


async def test_a_stream_that_is_left_is_marked_and_its_agent_closed(db: Persistence, sound: Sound) -> None:
    closed: list[str] = []

    async def agent(message: str) -> AsyncIterator[Any]:
        try:
            yield {"type": "tool_call", **FLAT}
            yield {"type": "tool_result", "tool_call_id": "c1", "result": 1}
            yield "so far"
            yield "never read"
        finally:
            closed.append("agent")

    async with with_storage(agent, db).stream("hi", thread_id="t") as stream:
        async for chunk in stream:
            if chunk == "so far":
                break

    assert closed == ["agent"]
    history = await db.threads.history("t")
    assert stream.turn.messages == history
    assert [(each.role, each.content, each.error, each.partial) for each in history] == [
        ("user", "hi", "the stream was left before its end", None),
        ("assistant", None, None, None),
        ("tool", 1, None, None),
        ("assistant", "so far", None, True),
    ]
    await sound(db)


async def test_a_sync_stream_that_is_left_is_closed_in_its_thread(db: Persistence) -> None:
    closed: list[str] = []

    def agent(message: str) -> Iterator[str]:
        try:
            yield "a"
            yield "b"
        finally:
            closed.append(threading.current_thread().name)

    async with with_storage(agent, db).stream("hi", thread_id="t") as stream:
        assert await anext(stream) == "a"

    [name] = closed
    assert name.startswith("kvpersist-agent")


async def test_a_stream_that_is_abandoned_is_stored_before_the_store_closes(driver: Any) -> None:
    async with kvpersist.open(driver) as db:
        async for _ in with_storage(async_chunks, db).stream("hi", thread_id="t"):
            break
        gc.collect()
        held = with_storage(async_chunks, db).stream("ho", thread_id="u")
        assert await anext(held) == "ho"

    async with kvpersist.open(driver) as db:
        for thread, text in (("t", "hi"), ("u", "ho")):
            [user, answer] = await db.threads.history(thread)
            assert user.error == "the stream was left before its end"
            assert (answer.content, answer.partial) == (text, True)


async def test_a_stream_that_nobody_reads_leaves_nothing(db: Persistence) -> None:
    ran: list[str] = []
    stream = with_storage(ran.append, db).stream("hi", thread_id="t")

    await stream.aclose()

    assert ran == []
    assert await db.sessions.count() == 0


async def test_a_stream_that_is_left_after_its_last_chunk_has_not_failed(db: Persistence) -> None:
    async def agent(message: str) -> AsyncIterator[Any]:
        yield "whole"
        yield {"type": "finish"}

    async with with_storage(agent, db).stream("hi", thread_id="t") as stream:
        async for chunk in stream:
            if chunk != "whole":
                break

    assert [(each.error, each.partial) for each in await db.threads.history("t")] == [(None, None)] * 2


@pytest.mark.parametrize("streaming", [False, True])
async def test_a_cancelled_run_is_marked_and_the_cancellation_goes_on(db: Persistence, streaming: bool) -> None:
    reached = asyncio.Event()

    async def agent(message: str) -> AsyncIterator[str]:
        yield "so far"
        reached.set()
        await asyncio.Event().wait()

    stored = with_storage(agent, db)

    async def consume() -> None:
        async for _ in stored.stream("hi", thread_id="t"):
            pass

    task = asyncio.create_task(consume() if streaming else stored.run("hi", thread_id="t"))
    await reached.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task

    [user, answer] = await db.threads.history("t")
    assert (user.error, answer.content, answer.partial) == ("the run was cancelled", "so far", True)


async def test_cancelling_a_sync_run_does_not_wait_for_its_thread(db: Persistence) -> None:
    started, free = threading.Event(), threading.Event()

    def agent(message: str) -> str:
        started.set()
        free.wait(30)
        return "too late"

    task = asyncio.create_task(with_storage(agent, db).run("hi", thread_id="t"))
    while not started.is_set():
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    free.set()

    assert [(each.content, each.error) for each in await db.threads.history("t")] == [("hi", "the run was cancelled")]


async def test_a_sync_stream_that_is_cancelled_is_closed_once_its_step_is_done(db: Persistence) -> None:
    started, free, closed = threading.Event(), threading.Event(), threading.Event()

    def agent(message: str) -> Iterator[str]:
        try:
            yield "so far"
            started.set()
            free.wait(30)
            yield "too late"
        finally:
            closed.set()

    task = asyncio.create_task(with_storage(agent, db).run("hi", thread_id="t"))
    while not started.is_set():
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task

    assert not closed.is_set()
    assert [(each.content, each.partial) for each in await db.threads.history("t")] == [("hi", None), ("so far", True)]
    free.set()
    assert await asyncio.to_thread(closed.wait, 30)


async def test_an_agent_that_fails_to_close_does_not_hide_what_went_wrong(db: Persistence) -> None:
    class Chunks:
        def __aiter__(self) -> Chunks:
            return self

        async def __anext__(self) -> str:
            raise Broken("first")

        async def aclose(self) -> None:
            raise LookupError("second")

    with pytest.raises(Broken, match="first") as raised:
        await with_storage(lambda message: Chunks(), db).run("hi", thread_id="t")

    assert "LookupError('second')" in raised.value.__notes__[0]


async def test_a_thread_that_was_deleted_meanwhile_stays_deleted(db: Persistence, driver: Any) -> None:
    async def agent(message: str) -> str:
        await db.sessions.delete("t")
        if message == "raise":
            raise Broken("as well")
        return "late"

    with pytest.raises(ParentGone):
        await with_storage(agent, db).run("hi", thread_id="t")
    with pytest.raises(Broken) as raised:
        await with_storage(agent, db).run("raise", thread_id="t")

    assert "the failed turn was not stored" in raised.value.__notes__[0]
    assert [key for key in await driver.everything() if ":message" in key] == []


async def test_a_stop_iteration_of_an_agent_is_an_error_and_not_a_hang(db: Persistence) -> None:
    def agent(message: str) -> str:
        raise StopIteration

    with pytest.raises(RuntimeError, match="StopIteration"):
        await with_storage(agent, db).run("hi", thread_id="t")


async def test_a_partial_answer_that_cannot_be_kept_does_not_take_the_message_with_it(db: Persistence) -> None:
    async def agent(message: str) -> AsyncIterator[Any]:
        yield {"type": "tool_call", "id": "a", "name": "x"}
        yield {"type": "tool_result", "tool_call_id": "a", "result": {1, 2}}
        raise Broken("gone")

    with pytest.raises(Broken):
        await with_storage(agent, db).run("hi", thread_id="t")

    assert [(each.content, each.error) for each in await db.threads.history("t")] == [("hi", "Broken: gone")]


# ---- continuing a thread


async def test_a_thread_is_continued_with_its_history(db: Persistence) -> None:
    await db.sessions.create(id="t")
    await db.messages.append_many("t", [Message("user", str(n)) for n in range(60)])

    async def agent(message: str, history: list[Any]) -> str:
        return f"{message} after {len(history)}, the first {history[0]['content'] if history else None}"

    everything = await continue_thread(agent=agent, thread_id="t", message="a", db=db)
    two = await continue_thread(agent, db, "t", "b", message_limit=2)
    none = await continue_thread(agent, db, "t", "c", load_history=False)
    unsaved = await continue_thread(agent, db, "t", "d", persist_messages=False)

    assert everything == "a after 50, the first 10"
    assert two == "b after 2, the first a"
    assert none == "c after 0, the first None"
    assert unsaved == "d after 50, the first 16"
    assert await db.messages.count("t") == 66


async def test_a_thread_is_continued_as_a_stream(db: Persistence) -> None:
    await db.sessions.create(id="t")

    given = [chunk async for chunk in stream_continue_thread(async_chunks, db, "t", "hi")]

    assert given == ["hi", "!"]
    assert await said(db) == [("user", "hi"), ("assistant", "hi!")]


@pytest.mark.parametrize("persist", [True, False])
async def test_a_thread_that_is_not_there_cannot_be_continued(db: Persistence, persist: bool) -> None:
    with pytest.raises(ParentGone):
        await continue_thread(echo, db, "t", "hi", persist_messages=persist)
    with pytest.raises(ParentGone):
        await anext(stream_continue_thread(echo, db, "t", "hi", persist_messages=persist))
    assert await db.sessions.count() == 0


async def test_an_empty_id_is_nobodys(db: Persistence) -> None:
    with pytest.raises(BadRequest, match="not empty"):
        await with_storage(echo, db).run("hi", thread_id="")
    with pytest.raises(BadRequest, match="not empty"):
        await continue_thread(echo, db, "", "hi")
    with pytest.raises(BadRequest, match="not empty"):
        await db.threads.get_or_create("")
    assert await db.sessions.count() == 0


async def test_a_setting_that_is_not_there_is_refused(db: Persistence) -> None:
    with pytest.raises(BadRequest, match="autosave"):
        await continue_thread(echo, db, "t", "hi", autosave=True)
    with pytest.raises(BadOption, match="max_history_messages"):
        with_storage(echo, db, max_history_messages=-1)


# ---- messages for models

TURN = [
    Message("system", "be brief"),
    Message("user", "what is it?"),
    Message("assistant", "let me look", tool_calls=[ToolCallPart("c1", "look", {"q": 1}), ToolCallPart("c2", "x", "")]),
    Message("tool", {"seen": True}, tool_call_id="c1"),
    Message("tool", "broken", tool_call_id="c2", is_error=True),
    Message("assistant", "a cat"),
]  # fmt: skip


def test_messages_take_the_form_of_openai() -> None:
    made = model_messages(TURN)

    assert made[2] == {
        "role": "assistant",
        "content": "let me look",
        "tool_calls": [
            {"id": "c1", "type": "function", "function": {"name": "look", "arguments": '{"q":1}'}},
            {"id": "c2", "type": "function", "function": {"name": "x", "arguments": ""}},
        ],
    }
    assert made[3:] == [
        {"role": "tool", "tool_call_id": "c1", "content": '{"seen":true}'},
        {"role": "tool", "tool_call_id": "c2", "content": "broken"},
        {"role": "assistant", "content": "a cat"},
    ]


def test_messages_take_the_form_of_anthropic() -> None:
    assert system_text(TURN) == "be brief"
    assert model_messages(TURN, "anthropic") == [
        {"role": "user", "content": "what is it?"},
        {
            "role": "assistant",
            "content": [
                {"type": "text", "text": "let me look"},
                {"type": "tool_use", "id": "c1", "name": "look", "input": {"q": 1}},
                {"type": "tool_use", "id": "c2", "name": "x", "input": {}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "c1", "content": '{"seen":true}'},
                {"type": "tool_result", "tool_use_id": "c2", "content": "broken", "is_error": True},
            ],
        },
        {"role": "assistant", "content": "a cat"},
    ]


def test_what_model_apis_refuse_is_left_out() -> None:
    calls = [ToolCallPart("c1", "look"), ToolCallPart("c2", "look")]
    messages = [
        Message("tool", "of an earlier window", tool_call_id="c0"),
        Message("assistant", None, tool_calls=[ToolCallPart("c9", "never answered")]),
        Message("assistant", None, tool_calls=calls),
        Message("user", "in between"),
        Message("tool", "one", tool_call_id="c1"),
    ]

    assert [(each["role"], each["content"]) for each in model_messages(messages)] == [
        ("assistant", None),
        ("tool", "one"),
        ("user", "in between"),
    ]
    assert [each["role"] for each in model_messages(messages, "anthropic")] == ["assistant", "user", "user"]
    assert model_messages(TURN, tools=False)[2:] == [
        {"role": "assistant", "content": "let me look"},
        {"role": "assistant", "content": "a cat"},
    ]
    with pytest.raises(BadOption, match="style"):
        model_messages(TURN, "yaml")  # type: ignore[arg-type]


# ---- faults of the store


@pytest.mark.parametrize("without", [(), ("atomic_batch", "reverse", "deref")])
@pytest.mark.parametrize("agent", ["answers", "raises"])
async def test_a_store_that_fails_at_any_call_leaves_no_part_of_a_turn(
    sound: Sound, without: tuple[str, ...], agent: str
) -> None:
    def answering(message: str, history: list[Any]) -> Any:
        if agent == "raises":
            raise Broken("no credit")
        return {"content": "done", "tool_calls": [FLAT | {"result": 1}]}

    outcomes: set[str] = set()
    for operation in ("get", "scan", "commit"):
        for at in range(1, 20):
            disk = MemoryDriver()
            async with kvpersist.open(FaultyDriver(disk, without=without)) as db:
                await db.sessions.create(id="t")
                await db.messages.append("t", Message("user", "before"))
            failing = FaultyDriver(disk, without=without)
            async with kvpersist.open(failing) as db:
                fault = failing.fail(operation, at)
                try:
                    await with_storage(answering, db).run("hi", thread_id="t")
                    outcomes.add("done")
                except Broken as error:
                    outcomes.add("noted" if hasattr(error, "__notes__") else "raised")
                except Unavailable:
                    outcomes.add("unavailable")
                except CommitUnknown:
                    assert without, "with atomic batches the store finds out"
            if not fault.fired:
                break
            async with kvpersist.open(FaultyDriver(disk, without=without)) as db:
                roles = [role for role, _ in await said(db)]
                whole = ["user", "user"] if agent == "raises" else ["user", "user", "assistant", "tool", "assistant"]
                if without:  # there, a beginning of the turn may be kept
                    assert roles == whole[: len(roles)]
                else:
                    assert roles in (["user"], whole)
                await sound(db)
        else:
            pytest.fail("it never came to its end without a fault")
    assert outcomes == ({"raised", "noted", "unavailable"} if agent == "raises" else {"done", "unavailable"})


async def test_a_run_whose_process_dies_at_any_write_leaves_a_whole_turn_or_none(sound: Sound) -> None:
    for at in range(1, 20):
        disk = MemoryDriver()
        dying = FaultyDriver(disk)
        try:
            async with kvpersist.open(dying) as db:
                dying.crash(at)
                await with_storage(lambda message: {"tool_calls": [FLAT | {"result": 1}]}, db).run("hi", thread_id="t")
        except Crashed:
            pass
        async with kvpersist.open(FaultyDriver(disk)) as db:
            assert [role for role, _ in await said(db)] in ([], ["user", "assistant", "tool"])
            await sound(db)
        if not dying.crashed:
            return
    pytest.fail("the run never ends")
