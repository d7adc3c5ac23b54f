"""Broken turns: what is found, how a model is shown them, and how they are mended."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from kvpersist import Message, ToolCallPart
from kvpersist.agents.conversations.repairs import mended, problems_of
from kvpersist.agents.persistence import Persistence

Sound = Callable[[Persistence], Awaitable[None]]


@pytest.fixture
async def session(db: Persistence) -> str:
    return (await db.sessions.create(user_id="u1")).id


def asks(*ids: str) -> Message:
    return Message("assistant", tool_calls=[ToolCallPart(id_, "t", {}) for id_ in ids])


def answers(id_: str | None, content: Any = "r") -> Message:
    return Message("tool", content, tool_call_id=id_)


async def found(db: Persistence, session: str) -> list[tuple[str, int, str, int | None]]:
    return [(p.kind, p.number, p.call_id, p.position) for p in await db.messages.validate(session)]


def shown(messages: list[Message]) -> list[tuple[str, Any]]:
    return [(m.role, m.content if m.tool_call_id is None else f"{m.tool_call_id}={m.content}") for m in messages]


WHOLE = [Message("user", "q"), asks("a", "b"), answers("b"), answers("a"), Message("assistant", "done")]


async def test_a_whole_session_has_no_problems_and_is_not_written(
    db: Persistence, driver: Any, session: str, sound: Sound
) -> None:
    await db.messages.append_many(session, WHOLE)
    before = await driver.everything()

    assert await db.messages.validate(session) == []
    assert await db.messages.repair(session) == []
    assert await db.messages.last(session, 10, repair=True) == await db.messages.last(session, 10)
    after = await driver.everything()
    assert {key: value for key, value in after.items() if "#stat" not in key} == {
        key: value for key, value in before.items() if "#stat" not in key
    }
    await sound(db)


async def test_each_kind_of_problem_is_named(db: Persistence, session: str) -> None:
    await db.messages.append_many(
        session,
        [
            answers("nowhere"),
            answers("later"),
            answers(None),
            asks("later", "twice", "never"),
            answers("twice"),
            answers("twice"),
            Message("user", "and?"),
            answers("later"),
        ],
    )

    assert await found(db, session) == [
        ("orphan_result", 1, "nowhere", None),
        ("early_result", 2, "later", None),
        ("orphan_result", 3, "", None),
        ("orphan_call", 4, "never", 2),
        ("duplicate_result", 6, "twice", None),
        ("late_result", 8, "later", None),
    ]


async def test_a_view_for_a_model_has_each_call_with_its_answer_behind_it(
    db: Persistence, driver: Any, session: str, sound: Sound
) -> None:
    await db.messages.append_many(
        session,
        [
            Message("user", "q"),
            answers("nowhere"),
            asks("a", "b", "c"),
            answers("b", "B"),
            answers("b", "again"),
            Message("user", "and?"),
            answers("a", "A"),
            Message("assistant", "done"),
        ],
    )
    before = await driver.everything()

    view = await db.messages.last(session, 100, repair=True)

    assert shown(view) == [
        ("user", "q"),
        ("assistant", None),
        ("tool", "b=B"),
        ("tool", "a=A"),
        ("tool", "c=The call was interrupted: there is no result."),
        ("user", "and?"),
        ("assistant", "done"),
    ]
    assert (view[4].is_error, view[4].id, view[4].number) == (True, "", 0)
    assert problems_of(view) == []
    assert await driver.everything() == before
    await sound(db)


async def test_a_window_that_begins_inside_a_turn_is_fit_for_a_model(db: Persistence, session: str) -> None:
    await db.messages.append_many(session, WHOLE)

    assert shown(await db.messages.last(session, 3)) == [("tool", "b=r"), ("tool", "a=r"), ("assistant", "done")]
    assert shown(await db.messages.last(session, 3, repair=True)) == [("assistant", "done")]
    assert await db.messages.last("nobody", 3, repair=True) == []


async def test_what_is_known_of_a_call_answers_it(db: Persistence, session: str) -> None:
    await db.messages.append_many(session, [asks("done", "failed", "denied", "sealed", "waits"), Message("user", "?")])
    await db.tool_calls.complete(session, 1, 0, {"n": 0})
    await db.tool_calls.fail(session, 1, 1, "disk full")
    await db.tool_calls.deny(session, 1, 2, note="not today")
    await db.tool_calls.seal(session, 1, 3)
    await db.tool_calls.require_approval(session, 1, 4)

    view = await db.messages.last(session, 100, repair=True)

    assert [(m.tool_call_id, m.content, m.is_error) for m in view[1:6]] == [
        ("done", {"n": 0}, False),
        ("failed", "disk full", True),
        ("denied", "The call was denied. not today", True),
        ("sealed", "The call was interrupted: there is no result.", True),
        ("waits", "The call was not approved.", True),
    ]


async def test_repairing_stores_what_the_view_shows(db: Persistence, session: str, sound: Sound) -> None:
    stored = await db.messages.append_many(
        session,
        [
            Message("user", "q"),
            asks("a", "b"),
            answers("b", "B"),
            Message("user", "and?"),
            answers("b", "again"),
            asks("c"),
            answers("c"),
        ],
    )
    await db.tool_calls.deny(session, 2, 0, by="ann")
    view = await db.messages.last(session, 100, repair=True)

    problems = await db.messages.repair(session)

    assert [p.kind for p in problems] == ["orphan_call", "duplicate_result"]
    assert await db.messages.validate(session) == []
    after = await db.messages.range(session)
    assert shown(after) == shown(view)
    assert [m.number for m in after] == [1, 2, 3, 8, 9, 10, 11]
    assert [m.id for m in after if m.id in {each.id for each in stored}] == [
        m.id for m in stored if m.content != "again"
    ]
    calls = await db.tool_calls.of(session)
    assert [(c.number, c.call_id, c.state, c.result_number) for c in calls] == [
        (2, "a", "denied", 8),
        (2, "b", "completed", 3),
        (10, "c", "completed", 11),
    ]
    assert calls[0].approval is not None and calls[0].approval.decided_by == "ann"
    await sound(db)
    assert await db.messages.repair(session) == []


async def test_calls_that_still_wait_at_the_end_are_left_to_wait(db: Persistence, session: str, sound: Sound) -> None:
    await db.messages.append_many(session, [answers("nowhere"), asks("a", "b"), answers("a")])
    await db.tool_calls.require_approval(session, 2, 1)

    assert [p.kind for p in await db.messages.repair(session)] == ["orphan_result"]

    assert [(c.call_id, c.state) for c in await db.tool_calls.of(session)] == [
        ("a", "completed"),
        ("b", "approval_required"),
    ]
    assert [c.call_id for c in await db.tool_calls.pending_approvals(session)] == ["b"]
    assert await db.messages.repair(session) == []
    assert [kind for kind, *_ in await found(db, session)] == ["orphan_call"]
    await sound(db)


def test_mending_needs_no_store() -> None:
    assert shown(mended([asks("a"), Message("user", "x")])) == [
        ("assistant", None),
        ("tool", "a=The call was interrupted: there is no result."),
        ("user", "x"),
    ]
    assert mended([]) == []
