"""Every query against the same conditions told on every record, on data and conditions made at random."""

from __future__ import annotations

import asyncio
import itertools
import tempfile
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import kvpersist
from kvpersist import Message, ToolCallPart, at_least, at_most, between, keys
from kvpersist.agents.content import content_types, text_of
from kvpersist.agents.persistence import Persistence
from kvpersist.agents.records import Session, ToolCall
from kvpersist.errors import NoIndex
from kvpersist.testing import FaultyDriver
from kvpersist_drivers.memory import MemoryDriver

START = datetime(2025, 3, 1, 12, tzinfo=UTC)
ALL = 100_000
SECOND = timedelta(seconds=1)


def minute(n: float) -> datetime:
    return START + timedelta(minutes=n)


owner = st.sampled_from([None, "u1", "u2", "a!", "a%", "ä"])
moments = st.integers(0, 6).map(minute)
ids = st.text("ab!%é", min_size=1, max_size=4)
meta = st.fixed_dictionaries(
    {},
    optional={
        "topic": st.sampled_from(["tea", "Tea", "", 0, False, None, 1]),
        "order": st.fixed_dictionaries({"id": st.integers(0, 2)}),
        "tags": st.lists(st.sampled_from(["red", "new"]), max_size=2),
    },
)
sessions = st.fixed_dictionaries(
    {
        "user_id": owner,
        "agent_id": owner,
        "parent_id": owner,
        "title": st.sampled_from([None, "Green TEA", "straße", "STRASSE 1", "coffee", ""]),
        "active": st.booleans(),
        "metadata": meta,
        "created_at": moments,
        "updated_at": st.none() | moments,
    }
)
contents = st.sampled_from(
    [
        None,
        "",
        "Late parcel",
        "no tea, thanks",
        ["green", {"type": "input_text", "text": "TEA"}],
        [{"type": "image_url", "image_url": {"url": "http://tea"}}],
        [{"type": "thinking", "thinking": "tea?"}, {"type": "tool_use", "id": "t", "name": "search", "input": {}}],
        [{"type": "tool_result", "content": [{"type": "text", "text": "tea"}, {"type": "image"}]}],
        {"status": "late"},
    ]
)


@st.composite
def turns(draw: st.DrawFn) -> list[Message]:
    made: list[Message] = []
    asked: list[str] = []
    for role in draw(st.lists(st.sampled_from(["user", "assistant", "asks", "tool", "system"]), max_size=7)):
        at = draw(moments)
        content = draw(contents)
        metadata = draw(st.none() | meta)
        if role == "asks":
            calls = [
                ToolCallPart(f"c{len(asked) + n}", draw(st.sampled_from(["search", "read"])), {"n": n})
                for n in range(draw(st.integers(1, 2)))
            ]
            asked += [call.id for call in calls]
            made.append(Message("assistant", content, tool_calls=calls, created_at=at, metadata=metadata))
        elif role == "tool":
            id_ = draw(st.sampled_from(asked)) if asked else None
            error = draw(st.sampled_from([None, False, True]))
            made.append(Message("tool", content, tool_call_id=id_, is_error=error, created_at=at, metadata=metadata))
        else:
            name = draw(st.sampled_from([None, "bob"]))
            made.append(Message(role, content, name=name, created_at=at, metadata=metadata))
    return made


stores = st.dictionaries(ids, st.tuples(sessions, turns()), max_size=6)
times = st.one_of(
    st.tuples(moments, moments).map(lambda pair: between(*sorted(pair))),
    moments.map(at_least),
    moments.map(at_most),
    moments,
)
metadata = st.sampled_from(
    [
        {"topic": "tea"},
        {"topic": 0},
        {"topic": False},
        {"order.id": 1},
        {"order": {"id": 1}},
        {"tags": "red"},
        {"topic": "tea", "order.id": 2},
        {"order.id": between(1, 2)},
        {"topic": at_least("a")},
    ]
)
session_where = st.fixed_dictionaries(
    {},
    optional={
        "user_id": st.sampled_from(["u1", "a!", "ä", "none"]),
        "agent_id": st.sampled_from(["u2", "a%"]),
        "parent_id": st.sampled_from(["u1", "a!"]),
        "active": st.booleans(),
        "created": times,
        "updated": times,
        "metadata": metadata,
        "id_prefix": st.sampled_from(["a", "b!", "%", "é", "ab"]),
        "title": st.sampled_from(["tea", "STRASSE", "o", "1"]),
        "message_count": st.sampled_from([0, at_least(2)]),
    },
)
message_where = st.fixed_dictionaries(
    {},
    optional={
        "role": st.sampled_from(["user", "assistant", "tool"]),
        "content_type": st.sampled_from(["text", "tool_use", "tool_result", "image", "reasoning"]),
        "created": times,
        "text": st.sampled_from(["tea", "LATE", "arc", "tea, t"]),
        "metadata": metadata,
        "has_tool_calls": st.booleans(),
        "name": st.just("bob"),
    },
)
call_where = st.fixed_dictionaries(
    {},
    optional={
        "name": st.sampled_from(["search", "read", "none"]),
        "is_error": st.booleans(),
        "success": st.booleans(),
        "state": st.sampled_from(["pending", "COMPLETED", "failed"]),
        "has_approval": st.booleans(),
        "created": times,
    },
)


# ---- what a condition means


def fits(value: Any, asked: Any) -> bool:
    if hasattr(asked, "low"):
        bound = asked.low if asked.high is None else asked.high
        if value is None or isinstance(value, str) is not isinstance(bound, str):
            return False
        return (asked.low is None or asked.low <= value) and (asked.high is None or value <= asked.high)
    if isinstance(value, list):
        return asked in value
    return type(value) is type(asked) and value == asked


def holds(data: Any, asked: dict[str, Any]) -> bool:
    for path, wanted in asked.items():
        at = data
        for step in path.split("."):
            at = (at or {}).get(step)
        if not fits(at, wanted):
            return False
    return True


def session_fits(session: Session, messages: int, where: dict[str, Any]) -> bool:
    tests: dict[str, Callable[[Any], bool]] = {
        "created": lambda asked: fits(session.created_at, asked),
        "updated": lambda asked: fits(session.updated_at, asked),
        "metadata": lambda asked: holds(session.metadata, asked),
        "id_prefix": session.id.startswith,
        "title": lambda asked: session.title is not None and asked.casefold() in session.title.casefold(),
        "message_count": lambda asked: fits(messages, asked),
    }
    return all(
        tests[label](asked) if label in tests else fits(getattr(session, label), asked)
        for label, asked in where.items()
    )


def message_fits(message: Message, where: dict[str, Any]) -> bool:
    tests: dict[str, Callable[[Any], bool]] = {
        "created": lambda asked: fits(message.created_at, asked),
        "metadata": lambda asked: holds(message.metadata, asked),
        "text": lambda asked: asked.casefold() in text_of(message.content).casefold(),
        "content_type": lambda asked: asked in content_types(message),
        "has_tool_calls": lambda asked: bool(message.tool_calls) is asked,
    }
    return all(
        tests[label](asked) if label in tests else getattr(message, label) == asked for label, asked in where.items()
    )


def call_fits(call: ToolCall, where: dict[str, Any]) -> bool:
    tests: dict[str, Callable[[Any], bool]] = {
        "created": lambda asked: fits(call.created_at, asked),
        "state": lambda asked: call.state == asked.lower(),
        "success": lambda asked: call.is_error is (not asked),
        "has_approval": lambda asked: (call.approval is not None) is asked,
    }
    return all(
        tests[label](asked) if label in tests else getattr(call, label) == asked for label, asked in where.items()
    )


def downwards(at: datetime | None) -> float:
    assert at is not None
    return -at.timestamp()


def newest_first(session: Session) -> Any:
    return downwards(session.created_at), keys.encode(session.id)


def in_order(found: Sequence[Session], order: str, counts: dict[str, int]) -> list[Session]:
    label = order.removeprefix("-")
    places: dict[str, Callable[[Session], Any]] = {
        "created_at": newest_first,
        "updated_at": lambda s: (downwards(s.updated_at), keys.encode(s.id)),
        "message_count": lambda s: (-counts[s.id], keys.encode(s.id)),
        "title": lambda s: (s.title is None, s.title or "", keys.encode(s.id)),
        "id": lambda s: keys.encode(s.id),
    }
    upwards_is_forward = label in ("title", "id")
    return sorted(found, key=places[label], reverse=order.startswith("-") is upwards_is_forward)


# ---- the comparison


@asynccontextmanager
async def opened(backend: str) -> AsyncIterator[Persistence]:
    if backend == "sqlite":
        with tempfile.TemporaryDirectory() as folder:
            async with kvpersist.open(f"sqlite:///{folder}/q.db?kv.durability=normal", text_index=True) as db:
                yield db
        return
    driver: Any = MemoryDriver()
    if backend == "ordered":
        driver = FaultyDriver(driver, without={"atomic_batch", "reverse", "deref"})
    async with kvpersist.open(driver, text_index=True) as db:
        yield db


async def same(
    repository: Any, expected: Sequence[Any] | None, options: dict[str, Any], limit: int, offset: int
) -> list[Any] | None:
    """Compare find, page, iterate and count with each other, and with what is expected, in that order."""
    try:
        every = await repository.find(limit=ALL, **options)
    except NoIndex:
        with pytest.raises(NoIndex):
            await repository.page(limit=limit, **options)
        with pytest.raises(NoIndex):
            [_ async for _ in repository.iterate(**options)]
        return None
    if expected is not None:
        assert every == list(expected), options
    assert await repository.find(limit=limit, offset=offset, **options) == every[offset : offset + limit]
    assert [each async for each in repository.iterate(**options)] == every
    unordered = {name: value for name, value in options.items() if name != "order"}
    assert await repository.count(**unordered) == len(every)
    for scanned in (3, 10_000):
        try:
            paged, cursor = [], None
            while True:
                page = await repository.page(limit=limit, after=cursor, **{"scanned": scanned, **options})
                assert len(page.items) <= limit
                paged += page.items
                cursor = page.cursor
                if cursor is None:
                    break
        except NoIndex:  # to be sorted, and over three to be read
            assert scanned == 3
            continue
        assert paged == every, (options, scanned)
    return every


async def compare(backend: str, data: dict[str, Any], queries: dict[str, Any]) -> None:
    limit, offset = queries["limit"], queries["offset"]
    async with opened(backend) as db:
        for id_, (fields, turn) in data.items():
            await db.sessions.create(id=id_, **fields)
            await db.messages.append_many(id_, turn)
        everyone = [session for id_ in data if (session := await db.sessions.get(id_))]
        counts = {id_: len(turn) for id_, (_, turn) in data.items()}
        messages = {session.id: await db.messages.range(session.id, limit=ALL) for session in everyone}
        calls = {session.id: await db.tool_calls.of(session.id) for session in everyone}

        for where, order, scan in queries["sessions"]:
            await compare_sessions(db, everyone, counts, where, order, scan, limit, offset)
        for where, scope, order, scan in queries["messages"]:
            await compare_messages(db, everyone, messages, where, scope, order, scan, limit, offset)
        for where, inside, order, scan in queries["calls"]:
            session = everyone[inside % len(everyone)] if everyone and inside is not None else None
            await compare_calls(db, calls, session, where, order, scan, limit, offset)
        for user, agent in (("u1", None), (None, "u2"), ("u1", "a%")):
            stats = await db.stats(user_id=user, agent_id=agent)
            mine = [s for s in everyone if user in (None, s.user_id) and agent in (None, s.agent_id)]
            assert stats.sessions == len(mine)
            assert stats.messages == sum(counts[s.id] for s in mine)
            assert stats.tool_calls == sum(len(calls[s.id]) for s in mine)
        await compare_search(db, messages)


async def compare_sessions(
    db: Persistence,
    everyone: list[Session],
    counts: dict[str, int],
    where: dict[str, Any],
    order: str | None,
    scan: bool,
    limit: int,
    offset: int,
) -> None:
    options = {**where, "scan": scan} | ({} if order is None else {"order": order})
    mine = [session for session in everyone if session_fits(session, counts[session.id], where)]
    narrow = where.keys() & {"user_id", "agent_id", "parent_id", "created", "updated", "id_prefix"}
    owned = where.keys() & {"user_id", "agent_id", "parent_id"} or "created" in where or "id_prefix" in where
    exact = order is not None and (not order.endswith("updated_at") or owned)
    expected = in_order(mine, order, counts) if exact and order else None
    found = await same(db.sessions, expected, options, limit, offset)
    if found is None:
        assert not scan
        assert not narrow
        assert where or (order and order.removeprefix("-") in ("title", "message_count"))
        return
    if expected is None:
        assert in_order(found, "id", counts) == in_order(mine, "id", counts)
    if order is None and (not where or where.keys() == {"user_id"}):
        assert found == sorted(found, key=newest_first)
    if order == "-updated_at" or (order is None and where.keys() == {"updated"} and hasattr(where["updated"], "low")):
        pairs = itertools.pairwise(found)
        assert all(a.updated_at and b.updated_at and a.updated_at > b.updated_at - SECOND for a, b in pairs)


async def compare_messages(
    db: Persistence,
    everyone: list[Session],
    messages: dict[str, list[Message]],
    where: dict[str, Any],
    scope: dict[str, Any],
    order: str | None,
    scan: bool,
    limit: int,
    offset: int,
) -> None:
    options = {**where, **scope, "scan": scan} | ({} if order is None else {"order": order})
    owners = {label: value for label, value in scope.items() if label != "session_id"}
    scoped = [s for s in everyone if session_fits(s, 0, owners) and scope.get("session_id", s.id) == s.id]
    scoped.sort(key=newest_first)
    down = [m for session in scoped for m in reversed(messages[session.id]) if message_fits(m, where)]
    effective = order or ("asc" if "session_id" in scope else "desc")
    by_time = sorted(down, key=lambda m: (downwards(m.created_at), keys.encode(m.session_id), m.number))
    expected = {"desc": down, "asc": down[::-1], "-created_at": by_time, "created_at": by_time[::-1]}[effective]

    found = await same(db.messages, expected, options, limit, offset)

    if found is None:
        assert not scan
        assert not scope
        assert where or effective.endswith("created_at")


async def compare_calls(
    db: Persistence,
    calls: dict[str, list[ToolCall]],
    session: Session | None,
    where: dict[str, Any],
    order: str | None,
    scan: bool,
    limit: int,
    offset: int,
) -> None:
    if "success" in where and where.get("is_error", not where["success"]) is where["success"]:
        where = {label: value for label, value in where.items() if label != "success"}
    inside = {} if session is None else {"session_id": session.id}
    options = {**where, **inside, "scan": scan} | ({} if order is None else {"order": order})
    mine = [call for id_ in calls for call in calls[id_] if call_fits(call, where)]
    if session is not None:
        down = [call for call in mine if call.session_id == session.id][::-1]
    else:
        down = sorted(mine, key=lambda c: (downwards(c.created_at), keys.encode(c.session_id), c.number, c.position))
    # an index of one moment orders by place
    ties = session is None and isinstance(where.get("created"), datetime) and where.keys() & {"name", "state"}
    expected = None if ties else down if order != "asc" else down[::-1]

    found = await same(db.tool_calls, expected, options, limit, offset)

    if found is None:
        assert not scan
        assert session is None
        assert not where.keys() & {"name", "state", "is_error", "success", "created"}


async def compare_search(db: Persistence, messages: dict[str, list[Message]]) -> None:
    """Through the index of words a text is found where a word begins with it; several words, wherever they are."""
    for text in ("tea", "TEA, T", "e", "arcel", "te parc", " parcel", "late", "nothing"):
        hits = [m for each in messages.values() for m in each if text.casefold() in text_of(m.content).casefold()]
        found = await db.messages.search(text, limit=1_000)
        scanned = await db.messages.find(text=text, limit=1_000, scan=True)

        assert found.indexed and found.complete
        assert sorted(m.id for m in scanned) == sorted(m.id for m in hits)
        assert {m.id for m in found} <= {m.id for m in hits}
        if text not in ("e", "arcel"):
            assert {m.id for m in found} == {m.id for m in hits}, text
        assert list(found) == sorted(
            found, key=lambda m: (downwards(m.created_at), keys.encode(m.session_id), m.number)
        )


orders = st.sampled_from(
    [None, "created_at", "-created_at", "updated_at", "-updated_at", "title", "-title", "-message_count", "id", "-id"]
)
scopes = st.sampled_from(
    [
        {},
        {"session_id": "a"},
        {"session_id": "a", "user_id": "u1"},
        {"user_id": "u1"},
        {"agent_id": "u2"},
        {"user_id": "u1", "agent_id": "u2"},
    ]
)
questions = st.fixed_dictionaries(
    {
        "limit": st.integers(1, 4),
        "offset": st.integers(0, 3),
        "sessions": st.lists(st.tuples(session_where, orders, st.booleans()), min_size=4, max_size=4),
        "messages": st.lists(
            st.tuples(
                message_where,
                scopes,
                st.sampled_from([None, "asc", "desc", "created_at", "-created_at"]),
                st.booleans(),
            ),
            min_size=4,
            max_size=4,
        ),
        "calls": st.lists(
            st.tuples(call_where, st.none() | st.integers(0, 5), st.sampled_from([None, "asc", "desc"]), st.booleans()),
            min_size=3,
            max_size=3,
        ),
    }
)


@pytest.mark.parametrize("backend", ["memory", "sqlite", "ordered"])
@settings(
    max_examples=30,
    deadline=None,
    phases=[Phase.generate],  # shrinking takes minutes
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(data=stores, queries=questions)
def test_every_query_answers_what_its_conditions_mean(
    backend: str, data: dict[str, Any], queries: dict[str, Any]
) -> None:
    asyncio.run(compare(backend, data, queries))
