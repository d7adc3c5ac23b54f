"""Traces: begun, ended, and found by session, parent, type, error, time and duration."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
import pytest

from kvpersist import TokenUsage, Trace, at_least, at_most, between
from kvpersist.agents.persistence import Persistence
from kvpersist.errors import BadCursor, BadRequest, NoIndex, ParentGone

START = datetime(2025, 3, 1, 12, tzinfo=UTC)


def after(seconds: float) -> datetime:
    return START + timedelta(seconds=seconds)


async def test_a_trace_is_begun_and_ended(db: Persistence) -> None:
    await db.sessions.create(id="s")
    begun = await db.traces.start("answer", type="llm", session_id="s", input={"q": 1}, metadata={"a": 1})
    assert (begun.ended_at, begun.duration, begun.root) == (None, None, True)

    done = await db.traces.end(begun.id, output=0, token_usage=TokenUsage(3, 4), metadata={"b": 2})

    assert done is not None and done == await db.traces.get(begun.id)
    assert done.started_at == begun.started_at and done.ended_at is not None and done.started_at is not None
    assert done.duration == (done.ended_at - done.started_at).total_seconds()
    assert (done.output, done.error, done.failed, done.input) == (0, None, None, {"q": 1})
    assert done.token_usage == TokenUsage(3, 4, 7)
    assert done.metadata == {"a": 1, "b": 2}
    assert await db.traces.end("nobody") is None


async def test_a_trace_of_no_time_and_no_output_keeps_both(db: Persistence) -> None:
    made = await db.traces.create(name="x", started_at=START, ended_at=START, output=False)

    found = await db.traces.get(made.id)
    assert found is not None and (found.duration, found.output) == (0.0, False)


async def test_an_exception_ends_a_trace_as_failed(db: Persistence) -> None:
    begun = await db.traces.start("x", type="tool")

    done = await db.traces.end(begun.id, error=KeyError())

    assert done is not None and (done.error, done.failed) == ("KeyError", True)
    assert await db.traces.find(failed=True) == [done]
    assert await db.traces.update(done.id, lambda trace: msgspec.structs.replace(trace, error=None)) is not None
    assert await db.traces.find(failed=True) == []


async def tree(db: Persistence) -> None:
    for id_ in ("s", "s2"):
        await db.sessions.create(id=id_)
    await db.traces.create(
        id="root", name="run", session_id="s", type="agent", started_at=after(0), ended_at=after(10), duration=99.0
    )
    await db.traces.create(
        id="a", name="call", session_id="s", parent_id="root", type="llm", started_at=after(1), ended_at=after(3)
    )
    await db.traces.create(
        id="b",
        name="tool",
        session_id="s",
        parent_id="root",
        type="tool",
        error="x",
        started_at=after(4),
        ended_at=after(5),
    )
    await db.traces.create(id="c", name="call", session_id="s", parent_id="root", type="llm", started_at=after(6))
    await db.traces.create(
        id="other", name="run", session_id="s2", type="chain", started_at=after(2), ended_at=after(9)
    )
    await db.traces.create(id="free", name="embed", type="embedding", started_at=after(8), ended_at=after(8.5))


@pytest.mark.parametrize(
    ("where", "ids"),
    [
        ({}, "free c b other a root"),
        ({"session_id": "s"}, "c b a root"),
        ({"parent_id": "root"}, "a b c"),
        ({"root": True}, "free other root"),
        ({"root": True, "session_id": "s"}, "root"),
        ({"type": "llm"}, "c a"),
        ({"type": "llm", "session_id": "s", "duration": at_least(0)}, "a"),
        ({"failed": True}, "b"),
        ({"failed": True, "session_id": "s"}, "b"),
        ({"failed": False, "parent_id": "root"}, "a c"),
        ({"started_at": between(START + timedelta(seconds=4), START + timedelta(seconds=6))}, "c b"),
        ({"session_id": "s", "started_at": at_most(START + timedelta(seconds=4))}, "b a root"),
        ({"parent_id": "root", "started_at": at_least(START + timedelta(seconds=4))}, "b c"),
        ({"duration": between(1.0, 7.0)}, "b a other"),
        ({"duration": at_most(0.5)}, "free"),
    ],
)
async def test_traces_are_found_in_their_order(where: dict[str, Any], ids: str, db: Persistence) -> None:
    await tree(db)

    assert [trace.id for trace in await db.traces.find(**where)] == ids.split()
    assert [trace.id for trace in await db.traces.find(limit=2, offset=1, **where)] == ids.split()[1:3]
    assert await db.traces.count(**where) == len(ids.split())
    assert [trace.id async for trace in db.traces.iterate(**where)] == ids.split()
    paged: list[str] = []
    cursor: str | None = None
    while True:
        page = await db.traces.page(limit=1, after=cursor, **where)
        paged += [trace.id for trace in page.items]
        cursor = page.cursor
        if cursor is None:
            break
    assert paged == ids.split()


async def test_reading_all_traces_has_to_be_asked_for(db: Persistence) -> None:
    await tree(db)

    for where in ({"type": "llm", "duration": at_least(1)}, {"failed": False}, {"root": True, "type": "chain"}):
        with pytest.raises(NoIndex):
            await db.traces.find(**where)
    assert [t.id for t in await db.traces.find(type="llm", duration=at_least(1), scan=True)] == ["a"]
    assert [t.id for t in await db.traces.find(root=True, type="chain", scan=True)] == ["other"]
    assert await db.traces.count(failed=False, scan=True) == 5
    with pytest.raises(NoIndex, match="nmae"):
        await db.traces.find(nmae="x", scan=True)
    with pytest.raises(BadRequest):
        await db.traces.find(session_id="s", duration=3)
    with pytest.raises(BadRequest):
        await db.traces.find(started_at=START)


async def test_a_cursor_belongs_to_its_filters(db: Persistence) -> None:
    await tree(db)
    page = await db.traces.page(limit=1, session_id="s", type="llm")

    with pytest.raises(BadCursor):
        await db.traces.page(limit=1, session_id="s", type="tool", after=page.cursor)


async def test_a_trace_that_makes_no_sense_is_refused_whole(db: Persistence, driver: Any) -> None:
    before = await driver.everything()

    for fields in (
        {"name": "x", "type": "llmm"},
        {"name": "x", "started_at": after(1), "ended_at": after(0)},
        {"name": "x", "duration": -1.0},
        {"type": "llm"},
    ):
        with pytest.raises(BadRequest):
            await db.traces.create(**fields)
    with pytest.raises(ParentGone, match="session 's'"):
        await db.traces.create(name="x", session_id="s")

    assert await driver.everything() == before


async def test_a_duration_without_times_is_kept(db: Persistence) -> None:
    made = await db.traces.save(Trace(id="t", name="x", started_at=START, duration=1.5))

    assert made.duration == 1.5 and await db.traces.get("t") == made


async def test_traces_are_deleted_one_by_one_or_with_their_session(db: Persistence) -> None:
    await tree(db)

    assert await db.traces.delete("a") and not await db.traces.delete("a")
    await db.sessions.delete("s")

    assert [trace.id for trace in await db.traces.find()] == ["free", "other"]
    assert await db.traces.end("b", output=1) is None
