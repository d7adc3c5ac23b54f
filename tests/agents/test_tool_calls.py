"""Tool calls: joining answers with calls, repeated call ids, counts, recording, and what is stored once."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
import pytest

import kvpersist
from kvpersist import Index, Message, ToolCall, ToolCallPart
from kvpersist.agents.persistence import Persistence
from kvpersist.agents.stat import UNANSWERED
from kvpersist.errors import ParentGone, Unencodable, UniqueConflict
from kvpersist.testing import ManualClock

START = datetime(2025, 3, 1, 12, tzinfo=UTC)
Sound = Callable[[Persistence], Awaitable[None]]


@pytest.fixture
async def session(db: Persistence) -> str:
    return (await db.sessions.create(user_id="u1")).id


def asks(*calls: tuple[str, str], **fields: Any) -> Message:
    return Message("assistant", tool_calls=[ToolCallPart(id_, name, {"of": id_}) for id_, name in calls], **fields)


def answers(call_id: str, content: Any = "done", **fields: Any) -> Message:
    return Message("tool", content, tool_call_id=call_id, **fields)


def place(call: ToolCall) -> tuple[int, int, str, int | None]:
    return call.number, call.position, call.state, call.result_number


async def test_calls_are_stored_with_the_message_that_asks(db: Persistence, session: str) -> None:
    message = await db.messages.append(session, asks(("c1", "search"), ("c2", "read")))

    assert await db.tool_calls.of(session) == [
        ToolCall(
            session_id=session,
            number=1,
            position=n,
            call_id=id_,
            name=name,
            arguments={"of": id_},
            state="pending",
            created_at=message.created_at,
        )
        for n, (id_, name) in enumerate([("c1", "search"), ("c2", "read")])
    ]
    assert await db.tool_calls.get(session, 1, 1) == (await db.tool_calls.of(session))[1]
    assert await db.tool_calls.get(session, 1, 2) is None


async def test_an_answer_completes_its_call(db: Persistence, session: str, sound: Sound) -> None:
    await db.messages.append(session, asks(("c1", "search"), ("c2", "read")))

    good = await db.messages.append(session, answers("c2", [{"type": "text", "text": "found"}]))
    bad = await db.messages.append(session, answers("c1", "Error: no", is_error=True))

    first, second = await db.tool_calls.of(session)
    assert place(first) == (1, 0, "failed", 3)
    assert place(second) == (1, 1, "completed", 2)
    assert (first.is_error, first.result, first.completed_at) == (True, "Error: no", bad.created_at)
    assert (second.is_error, second.result, second.completed_at) == (False, good.content, good.created_at)
    assert second.duration is not None and second.duration >= 0
    await sound(db)


@pytest.mark.parametrize("result", [None, "", 0, False, [], {}])
async def test_an_empty_result_is_a_result(db: Persistence, session: str, result: Any) -> None:
    await db.messages.append_many(session, [asks(("c", "t")), answers("c", result)])

    [call] = await db.tool_calls.of(session)
    assert (call.state, call.is_error, call.result, call.duration) == ("completed", False, result, 0.0)


async def test_an_answer_in_the_turn_that_asks_is_joined(db: Persistence, session: str, sound: Sound) -> None:
    await db.messages.append_many(
        session, [Message("user", "x"), asks(("c1", "t"), ("c2", "t")), answers("c1"), answers("c2", is_error=True)]
    )

    assert [place(call) for call in await db.tool_calls.of(session)] == [(2, 0, "completed", 3), (2, 1, "failed", 4)]
    await sound(db)


async def test_a_repeated_call_id_joins_the_latest_earlier_call_that_waits(
    db: Persistence, session: str, sound: Sound
) -> None:
    await db.messages.append_many(session, [asks(("c", "t")), answers("c", "first")])
    await db.messages.append(session, asks(("c", "t")))
    await db.messages.append(session, asks(("c", "t"), ("c", "u")))
    for n in range(4):
        await db.messages.append(session, answers("c", f"answer {n}"))

    calls = await db.tool_calls.of(session)

    assert [(*place(call), call.result) for call in calls] == [
        (1, 0, "completed", 2, "first"),
        (3, 0, "completed", 7, "answer 2"),
        (4, 0, "completed", 6, "answer 1"),
        (4, 1, "completed", 5, "answer 0"),
    ]
    [last] = await db.messages.last(session, 1)  # nothing was left to answer, and it is kept all the same
    assert last.content == "answer 3"
    await sound(db)


async def test_repeated_ids_in_one_turn_are_joined_in_order(db: Persistence, session: str, sound: Sound) -> None:
    turn = [asks(("c", "t")), answers("c", "1"), asks(("c", "t")), answers("c", "2"), asks(("c", "t"))]
    await db.messages.append_many(session, turn)
    await db.messages.append(session, answers("c", "3"))

    assert [(call.number, call.result) for call in await db.tool_calls.of(session)] == [(1, "1"), (3, "2"), (5, "3")]
    await sound(db)


async def test_one_call_id_in_two_sessions_is_two_calls(db: Persistence, session: str, sound: Sound) -> None:
    other = (await db.sessions.create()).id
    for each in (session, other):
        await db.messages.append(each, asks(("c", "t")))

    await db.messages.append(other, answers("c", "mine"))

    assert [call.state for call in await db.tool_calls.of(session)] == ["pending"]
    assert [call.result for call in await db.tool_calls.of(other)] == ["mine"]
    await sound(db)


async def test_an_answer_to_nothing_is_a_message(db: Persistence, session: str, sound: Sound) -> None:
    await db.messages.append(session, answers("unknown"))

    assert await db.messages.count(session) == 1
    assert await db.tool_calls.of(session) == []
    await sound(db)


async def test_answers_of_another_process_are_joined(driver: Any, db: Persistence, session: str, sound: Sound) -> None:
    await db.messages.append(session, asks(("c1", "t"), ("c2", "t")))
    async with kvpersist.open(driver) as other:
        await asyncio.gather(
            db.messages.append(session, answers("c1", "one")), other.messages.append(session, answers("c2", "two"))
        )

    assert [call.result for call in await db.tool_calls.of(session)] == ["one", "two"]
    await sound(db)


async def test_a_session_remembers_a_bounded_number_of_unanswered_calls(
    db: Persistence, session: str, sound: Sound
) -> None:
    count = UNANSWERED + 10
    for n in range(0, count, 20):
        await db.messages.append(session, asks(*[(f"c{k}", "t") for k in range(n, min(n + 20, count))]))

    await db.messages.append_many(session, [answers("c0"), answers(f"c{count - 1}"), answers("c10")])

    states = {call.call_id: call.state for call in await db.tool_calls.of(session)}
    assert (states["c0"], states["c10"], states[f"c{count - 1}"]) == ("pending", "completed", "completed")
    await sound(db)


async def test_calls_are_found_by_name_error_and_state(db: Persistence, session: str) -> None:
    at = [START + timedelta(seconds=n) for n in range(4)]
    await db.messages.append(session, asks(("1", "a"), created_at=at[0]))
    await db.messages.append(session, answers("1", "r1", created_at=at[1]))
    await db.messages.append(session, asks(("2", "b"), ("3", "a"), created_at=at[2]))
    await db.messages.append(session, answers("2", "r2", is_error=True, created_at=at[3]))

    async def found(**where: Any) -> list[tuple[str, Any]]:
        return [(call.call_id, call.result) for call in await db.tool_calls.find(**where)]

    assert await found(name="a") == [("3", None), ("1", "r1")]
    assert await found(is_error=True) == [("2", "r2")]
    assert await found(is_error=False) == [("1", "r1")]
    assert await found(state="pending") == [("3", None)]
    assert await found(state="failed") == [("2", "r2")]
    assert await found(name="a", created_at=kvpersist.at_most(at[1])) == [("1", "r1")]
    assert [await db.tool_calls.count(name=name) for name in "abc"] == [2, 1, 0]
    assert await db.tool_calls.count() == 3
    page = await db.tool_calls.page(name="a", limit=1)
    assert [call.call_id for call in page.items] == ["3"]
    assert [call.result for call in (await db.tool_calls.page(name="a", limit=1, after=page.cursor)).items] == ["r1"]


async def test_more_indexes_find_calls_by_their_arguments(driver: Any, sound: Sound) -> None:
    async with kvpersist.open(driver, tool_call_indexes=[Index("arguments.of", type=str)]) as db:
        session = (await db.sessions.create()).id
        await db.messages.append(session, asks(("c1", "t"), ("c2", "t")))

        assert [c.call_id for c in await db.tool_calls.find(**{"arguments.of": "c2"})] == ["c2"]
        before = await driver.everything()
        wrong = Message("assistant", tool_calls=[ToolCallPart("c3", "t", {"of": 3})])
        turn = [Message("user", "x"), wrong]
        with pytest.raises(Unencodable):
            await db.messages.append_many(session, turn)
        assert await driver.everything() == before
        await sound(db)


async def test_a_result_is_stored_once(db: Persistence, driver: Any, session: str) -> None:
    await db.messages.append_many(session, [asks(("c", "t")), answers("c", "a result of some length")])

    stored = await driver.everything()

    assert sum(b"a result of some length" in value for value in stored.values()) == 1


async def test_results_of_many_calls_are_one_further_read(db: Persistence, driver: Any, session: str) -> None:
    for n in range(10):
        await db.messages.append_many(session, [asks((f"c{n}", "t")), answers(f"c{n}", n)])
    driver.clear()

    assert [call.result for call in await db.tool_calls.of(session)] == list(range(10))
    assert driver.calls == ["scan", "get"]


async def test_a_call_whose_answer_is_deleted_waits_again(db: Persistence, session: str, sound: Sound) -> None:
    await db.messages.append_many(session, [asks(("c", "t"), ("d", "t")), answers("c", "old"), answers("d")])
    [answer] = await db.messages.range(session, after=1, before=3)

    await db.messages.delete(answer.id)

    [call, _] = await db.tool_calls.of(session)
    assert (call.state, call.is_error, call.result, call.completed_at) == ("pending", None, None, None)
    await sound(db)
    await db.messages.append(session, answers("c", "new"))
    assert [call.result for call in await db.tool_calls.of(session)] == ["new", "done"]
    await sound(db)


async def test_deleting_the_message_that_asks_deletes_its_calls(db: Persistence, session: str, sound: Sound) -> None:
    [asking, *_] = await db.messages.append_many(session, [asks(("c", "t"), ("d", "t")), answers("c")])

    await db.messages.delete(asking.id)

    assert await db.tool_calls.of(session) == await db.tool_calls.find(name="t") == []
    await db.messages.append(session, answers("d"))
    stats = await db.stats()
    assert (stats.tool_calls, stats.tool_calls_by_name, stats.tool_calls_by_state) == (0, {}, {})
    await sound(db)


async def test_a_recorded_call_belongs_to_the_last_message(db: Persistence, session: str, sound: Sound) -> None:
    await db.messages.append(session, asks(("c", "t")))

    async with db.tool_calls.record(session, "fetch", {"url": "x"}) as first:
        assert first.call.state == "pending"
        async with db.tool_calls.record(session, "parse") as second:
            second.result, second.is_error = "unreadable", True
        first.result = {"body": b"\0"}

    calls = await db.tool_calls.of(session)
    assert [(c.number, c.position, c.name, c.state, c.result) for c in calls] == [
        (1, 0, "t", "pending", None),
        (1, 1, "fetch", "completed", {"body": b"\0"}),
        (1, 2, "parse", "failed", "unreadable"),
    ]
    assert first.call == calls[1]
    await sound(db)


async def test_a_recorded_call_that_raises_has_failed(driver: Any, sound: Sound) -> None:
    clock = ManualClock()
    async with kvpersist.open(driver, clock=clock) as db:
        session = (await db.sessions.create()).id

        with pytest.raises(ZeroDivisionError):
            async with db.tool_calls.record(session, "divide", {"by": 0}):
                clock.advance(1.5)
                _ = 1 / 0

        [call] = await db.tool_calls.find(name="divide")
        assert (call.state, call.is_error, call.result, call.duration) == ("failed", True, "division by zero", 1.5)
        await sound(db)


async def test_what_cannot_be_recorded_is_refused(db: Persistence, driver: Any, session: str) -> None:
    before = await driver.everything()

    with pytest.raises(ParentGone):
        async with db.tool_calls.record("nobody", "t"):
            pass
    with pytest.raises(Unencodable):
        async with db.tool_calls.record(session, "t", {"x": object()}):
            pass

    assert await driver.everything() == before


async def test_recorded_calls_at_once_get_places_of_their_own(db: Persistence, session: str, sound: Sound) -> None:
    async def work(n: int) -> None:
        async with db.tool_calls.record(session, "t", n) as call:
            await asyncio.sleep(0)
            call.result = n

    await asyncio.gather(*[work(n) for n in range(8)])

    calls = await db.tool_calls.of(session)
    assert sorted(call.position for call in calls) == list(range(8))
    assert all(call.result == call.arguments for call in calls)
    await sound(db)


async def test_the_timeline_joins_messages_calls_and_results(db: Persistence, session: str) -> None:
    at = [START + timedelta(seconds=n) for n in range(4)]
    async with db.tool_calls.record(session, "before"):
        pass
    await db.messages.append_many(
        session,
        [
            Message("user", "q", created_at=at[0]),
            asks(("c", "t"), ("d", "t"), created_at=at[1]),
            answers("c", "r", created_at=at[3]),
        ],
    )

    items = await db.timeline(session)

    assert [(item.number, item.at) for item in items] == [(1, at[0]), (2, at[1]), (3, at[3])]
    assert [[call.name for call in item.tool_calls] for item in items] == [["before"], ["t", "t"], []]
    [joined, waiting] = items[1].tool_calls
    assert (joined.result, joined.duration, waiting.state) == ("r", 2.0, "pending")
    assert items[2].answers == joined
    assert [item.number for item in await db.timeline(session, after=1, limit=1)] == [2]
    assert await db.timeline("nobody") == []


async def test_stats_count_calls_by_name_state_and_error(db: Persistence, session: str, driver: Any) -> None:
    await db.messages.append_many(session, [asks(("1", "a"), ("2", "a"), ("3", "b")), answers("1")])
    other = (await db.sessions.create()).id
    await db.messages.append_many(other, [asks(("1", "a")), answers("1", is_error=True)])
    driver.clear()

    stats = await db.stats()

    assert (stats.tool_calls, stats.tool_errors) == (4, 1)
    assert stats.tool_calls_by_name == {"a": 3, "b": 1}
    assert stats.tool_calls_by_state == {"pending": 2, "completed": 1, "failed": 1}
    assert driver.values_read == 0
    stat = await db.sessions.stat(session)
    assert stat is not None and stat.tools["a"].pending == 1 and stat.tool_calls == 3


async def test_arguments_are_kept_as_they_came(db: Persistence, session: str) -> None:
    kept: list[Any] = ['{"broken": ', None, {"n": 2**70}, ""]
    await db.messages.append(
        session, Message("assistant", tool_calls=[ToolCallPart(str(n), "t", value) for n, value in enumerate(kept)])
    )

    assert [call.arguments for call in await db.tool_calls.of(session)] == kept
    [message] = await db.messages.last(session, 1)
    assert [part.arguments for part in message.tool_calls or []] == kept
    assert msgspec.to_builtins(message.tool_calls or [])[0]["id"] == "0"


async def test_a_call_whose_unique_value_is_taken_is_refused_at_once(driver: Any, sound: Sound) -> None:
    if driver.capabilities.atomic_batch == "none":
        pytest.skip("there calls follow their message")
    async with kvpersist.open(driver, tool_call_indexes=[Index("call_id", unique=True)], timeout=5) as db:
        await db.sessions.create(id="s")
        await db.messages.append("s", asks(("c", "search")))

        with pytest.raises(UniqueConflict):
            await db.messages.append("s", asks(("c", "search")))

        await sound(db)


async def test_a_call_recorded_behind_a_deleted_message_stands_with_the_one_before(db: Persistence) -> None:
    await db.sessions.create(id="s")
    stored = await db.messages.append_many("s", [Message("user", str(n)) for n in range(3)])
    await db.messages.delete(stored[2].id)
    async with db.tool_calls.record("s", "search") as call:
        call.result = 1

    last = await db.timeline("s")
    await db.messages.append("s", Message("user", "more"))
    middle = await db.timeline("s")
    pages = [*await db.timeline("s", limit=2), *await db.timeline("s", after=2)]

    assert [len(item.tool_calls) for item in last] == [0, 1]
    assert [len(item.tool_calls) for item in middle] == [0, 1, 0]
    assert sum(len(item.tool_calls) for item in pages) == 1
