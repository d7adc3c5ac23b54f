"""Queries: which are answered by an index and what that costs, what is bounded, and what is refused."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
import pytest

import kvpersist
from kvpersist import Index, Message, ToolCallPart, at_least, at_most, between, keys
from kvpersist.agents.persistence import Persistence
from kvpersist.agents.records import Approval, ToolCall
from kvpersist.agents.workspace.containers import Container
from kvpersist.driver import Delete, Put
from kvpersist.errors import BadCursor, BadRequest, CorruptRecord, IndexNotReady, NoIndex
from kvpersist.testing import ManualClock
from kvpersist_drivers.memory import MemoryDriver

START = datetime(2025, 3, 1, 12, tzinfo=UTC)
Sound = Callable[[Persistence], Awaitable[None]]
OWNERS = ("user_id", "agent_id", "container_id", "image_id", "template_id", "parent_id")


def at(minutes: float) -> datetime:
    return START + timedelta(minutes=minutes)


async def many(db: Persistence, count: int, **fields: Any) -> None:
    for n in range(count):
        await db.sessions.create(id=f"s{n:02}", created_at=at(n), **fields)


async def turn(db: Persistence, session: str, *names: str, minutes: float = 0, error: bool = False) -> None:
    """One message asking for calls of these names, and one answer for each."""
    calls = [ToolCallPart(f"c{n}", name) for n, name in enumerate(names)]
    answers = [
        Message("tool", f"{name} of {session}", tool_call_id=f"c{n}", is_error=error, created_at=at(minutes))
        for n, name in enumerate(names)
    ]
    asking = Message("assistant", tool_calls=calls, created_at=at(minutes))
    await db.messages.append_many(session, [asking, *answers])


# ---- sessions


@pytest.mark.parametrize("owner", OWNERS)
async def test_sessions_are_found_by_each_owner_newest_first(db: Persistence, driver: Any, owner: str) -> None:
    for name in ("o0", "o1"):  # these have to be there
        if owner == "container_id":
            await db.containers.create(id=name)
        elif owner == "image_id":
            await db.containers.save(Container(id="c"))
            await db.images.create(id=name, container_id="c")
    for n in range(6):
        await db.sessions.create(id=f"s{n}", created_at=at(n), **{owner: f"o{n % 2}"})
    await db.sessions.find(**{owner: "warm"})
    driver.clear()

    found = await db.sessions.find(**{owner: "o1"})

    assert [session.id for session in found] == ["s5", "s3", "s1"]
    assert len(driver.calls) <= 3  # the index, the records where a backend does not follow it, the times
    window = between(at(1), at(3))
    assert [session.id for session in await db.sessions.find(**{owner: "o1"}, created=window)] == ["s3", "s1"]
    driver.clear()
    assert await db.sessions.count(**{owner: "o1"}) == 3
    assert "get" not in driver.calls or db.store.capabilities.atomic_batch == "none"


async def test_owners_that_are_not_set_take_no_room(db: Persistence, driver: Any) -> None:
    await db.sessions.create(id="s", user_id="u")

    written = [key for key in await driver.everything() if ":s" in key or "!s" in key]

    assert sorted(key.split(":")[1].split("#")[-1] for key in written) == sorted(
        ["session", "stat", "birth", "updated", "by_created_at_desc", "user_id_by_created_at_desc"]
    )


async def test_an_edit_moves_a_session_between_owners(db: Persistence, sound: Sound) -> None:
    await db.sessions.create(id="s", agent_id="a", template_id="i")

    await db.sessions.update("s", lambda s: msgspec.structs.replace(s, agent_id="b", template_id=None))

    assert await db.sessions.find(agent_id="a") == await db.sessions.find(template_id="i") == []
    assert [session.id for session in await db.sessions.find(agent_id="b")] == ["s"]
    await sound(db)


async def test_both_ends_of_a_range_are_included_and_ties_keep_their_order(db: Persistence) -> None:
    for name in "cab":
        await db.sessions.create(id=name, created_at=at(1), user_id="u")
    await db.sessions.create(id="z", created_at=at(2), user_id="u")

    assert [s.id for s in await db.sessions.find(created=between(at(1), at(2)))] == ["z", "a", "b", "c"]
    assert [s.id for s in await db.sessions.find(created=at_most(at(1)))] == ["a", "b", "c"]
    assert [s.id for s in await db.sessions.find(created=at_least(at(2)))] == ["z"]
    assert [s.id for s in await db.sessions.find(created=at(1), order="created_at")] == ["c", "b", "a"]
    assert [s.id for s in await db.sessions.find(user_id="u", order="created_at")] == ["c", "b", "a", "z"]


async def test_the_prefix_of_an_id_is_literal(db: Persistence) -> None:
    for name in ("a_b", "axb", "a%b", "a%", "a!b", "ab"):
        await db.sessions.create(id=name)

    async def found(prefix: str) -> list[str]:
        return [session.id for session in await db.sessions.find(id_prefix=prefix)]

    assert await found("a_") == ["a_b"]
    assert sorted(await found("a%")) == ["a%", "a%b"]
    assert await found("a!") == ["a!b"]
    assert len(await found("a")) == 6
    assert len(await found("")) == 6
    assert await db.sessions.count(id_prefix="a%") == 2


async def test_sessions_are_found_by_when_they_changed(driver: Any) -> None:
    clock = ManualClock()
    async with kvpersist.open(driver, clock=clock) as db:
        for name in "abc":
            await db.sessions.create(id=name, user_id="u")
            clock.advance(60)
        begun = datetime.fromtimestamp(clock(), UTC)
        await db.messages.append("a", Message("user", "x"))
        clock.advance(0.4)  # too little to move the index
        later = datetime.fromtimestamp(clock(), UTC)
        await db.messages.append("a", Message("user", "y"))

        assert [s.id for s in await db.sessions.find(updated=at_least(later))] == ["a"]
        assert await db.sessions.find(updated=between(begun, later - timedelta(microseconds=1))) == []
        assert [s.id for s in await db.sessions.find(order="-updated_at")] == ["a", "c", "b"]
        assert [s.id for s in await db.sessions.find(order="updated_at", user_id="u")] == ["b", "c", "a"]
        driver.clear()
        assert [s.id for s in await db.sessions.find(updated=at_most(begun))] == ["c", "b"]
        assert len(driver.calls) <= 3


async def test_what_no_index_tells_is_read_below_the_best_one_and_no_further(db: Persistence, driver: Any) -> None:
    await many(db, 30, user_id="u", active=False)
    await db.sessions.update("s02", lambda s: msgspec.structs.replace(s, active=True))
    await db.sessions.find(user_id="u")

    assert [s.id for s in await db.sessions.find(user_id="u", active=True)] == ["s02"]
    assert [s.id for s in await db.sessions.find(user_id="u", active=True, scanned=29)] == ["s02"]
    with pytest.raises(NoIndex, match=r"no index for active.*scanned=.*scan=True"):
        await db.sessions.find(user_id="u", active=True, scanned=20)
    with pytest.raises(NoIndex):
        await db.sessions.count(user_id="u", active=True, scanned=20)
    with pytest.raises(NoIndex):
        [_ async for _ in db.sessions.iterate(user_id="u", active=True, scanned=20)]
    assert await db.sessions.count(user_id="u", active=False, scanned=1) == 29  # what is given back does not count

    page = await db.sessions.page(user_id="u", active=True, scanned=20)
    assert page.items == [] and page.cursor is not None
    rest = await db.sessions.page(user_id="u", active=True, scanned=20, after=page.cursor)
    assert ([s.id for s in rest.items], rest.cursor) == (["s02"], None)


@pytest.mark.parametrize(
    "where", [{"active": True}, {"title": "tea"}, {"metadata": {"a": 1}}, {"external_id": "x"}, {"order": "title"}]
)
async def test_reading_every_session_has_to_be_asked_for(db: Persistence, driver: Any, where: dict[str, Any]) -> None:
    await db.sessions.create(id="s", title="Tea", metadata={"a": 1}, external_id="x")
    await db.sessions.list()
    driver.clear()

    with pytest.raises(NoIndex, match=r"user_id_by_created_at_desc\(user_id; by -created_at\).*scan=True"):
        await db.sessions.find(**where)

    assert "scan" not in driver.calls
    assert [s.id for s in await db.sessions.find(**where, scan=True)] == ["s"]


async def test_a_declared_index_answers_what_was_a_scan(driver: Any) -> None:
    indexes = [
        Index("metadata.topic", type=str),
        Index("external_id", unique=True),
        Index("user_id", order_by="-created_at"),
    ]
    async with kvpersist.open(driver, session_indexes=indexes) as db:
        await many(db, 3, metadata={"topic": "tea", "n": 1})
        await db.sessions.create(id="x", metadata={"topic": "tea", "n": 2}, external_id="7")

        assert len(await db.sessions.find(metadata={"topic": "tea"})) == 4
        assert [s.id for s in await db.sessions.find(metadata={"topic": "tea", "n": 2})] == ["x"]
        assert [s.id for s in await db.sessions.find(external_id="7", title="")] == []
        found = await db.sessions.find(metadata={"topic": "tea"}, order="-created_at", limit=2)
        assert found == sorted(found, key=lambda s: s.created_at or START, reverse=True)


async def test_a_cursor_goes_on_whatever_came_and_went_and_only_for_its_query(db: Persistence) -> None:
    await many(db, 9, user_id="u")
    page = await db.sessions.page(user_id="u", limit=3)
    await db.sessions.delete("s06")  # the last one of the page
    await db.sessions.create(id="new", user_id="u", created_at=at(99))

    rest = await db.sessions.page(user_id="u", limit=3, after=page.cursor)

    assert [s.id for s in page.items + rest.items] == ["s08", "s07", "s06", "s05", "s04", "s03"]
    assert [s.id for s in (await db.sessions.page(user_id="u", limit=2, offset=1)).items] == ["s08", "s07"]
    others: list[dict[str, Any]] = [{"user_id": "v"}, {}, {"user_id": "u", "order": "created_at"}]
    for other in others:
        with pytest.raises(BadCursor):
            await db.sessions.page(**other, after=page.cursor)
    for cursor in ("", "x", "é", (page.cursor or "")[:-2], 7):
        with pytest.raises(BadCursor):
            await db.sessions.page(user_id="u", after=cursor)  # type: ignore[arg-type]
    with pytest.raises(BadCursor):
        await db.messages.page(user_id="u", after=page.cursor)


async def test_a_list_in_an_order_that_no_index_has_is_bounded(db: Persistence) -> None:
    for n in range(12):
        await db.sessions.create(id=f"s{n:02}", user_id="u", title=f"t{n * 5 % 12:02}", created_at=at(n))
        await db.messages.append_many(f"s{n:02}", [Message("user", "x")] * (n % 3))

    titles = [s.title for s in await db.sessions.find(user_id="u", order="title", limit=3)]
    assert titles == ["t00", "t01", "t02"]
    assert [s.id for s in await db.sessions.find(user_id="u", order="-message_count", limit=3)] == ["s02", "s05", "s08"]
    with pytest.raises(NoIndex):
        await db.sessions.find(user_id="u", order="title", limit=3, scanned=5)
    assert len(await db.sessions.find(order="-title", limit=3, scanned=5, scan=True)) == 3


async def test_a_session_that_moves_while_it_is_read_is_met_once(driver: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    if driver.capabilities.atomic_batch == "none":
        pytest.skip("there what moved cannot be told from what a crash left")
    clock = ManualClock()
    async with kvpersist.open(driver, clock=clock) as db:
        for n in range(4):
            await db.sessions.create(id=f"s{n}")
            clock.advance(10)
        real = db.store._scan
        moved = False

        async def scan(start: Any, end: Any, **options: Any) -> Any:
            nonlocal moved
            found = await real(start, end, **options)
            if "#updated:" in (start or "") and not moved:
                moved = True
                await db.messages.append("s1", Message("user", "hi"))
            return found

        monkeypatch.setattr(db.store, "_scan", scan)

        down = [s.id async for s in db.sessions.iterate(order="-updated_at")]
        moved = False
        up = [s.id async for s in db.sessions.iterate(order="updated_at")]

        assert sorted(down) == ["s0", "s1", "s2", "s3"]
        assert sorted(up) == ["s0", "s1", "s2", "s3"]


@pytest.mark.parametrize("kind", ["sessions", "messages", "tool_calls"])
@pytest.mark.parametrize(
    "where",
    [
        {"colour": "red"},
        {"limit": 0},
        {"limit": 1, "offset": -1},
        {"limit": 1, "scanned": -1},
        {"order": "colour"},
        {"order": "--created_at"},
        {"created": "yesterday"},
        {"created": datetime(2025, 1, 1)},  # noqa: DTZ001
        {"created": between(datetime(2025, 1, 1), START)},  # noqa: DTZ001
        {"created": START, "created_at": START},
        {"metadata": "topic"},
        {"metadata": {"topic": None}},
        {"user_id": None},
        {"created": None},
    ],
)
async def test_what_cannot_be_asked_is_refused(kind: str, where: dict[str, Any]) -> None:
    async with kvpersist.open(MemoryDriver()) as db:
        repository: Any = getattr(db, kind)
        calls = [repository.find] if "limit" in where else [repository.find, repository.page]
        for call in calls:
            with pytest.raises(BadRequest):
                await call(**where, scan=True)


@pytest.mark.parametrize(
    ("kind", "where"),
    [
        ("sessions", {"id_prefix": 7}),
        ("sessions", {"title": 7, "user_id": "u"}),
        ("sessions", {"user_id": 7}),
        ("messages", {"role": "robot", "session_id": "s"}),
        ("messages", {"text": "", "session_id": "s"}),
        ("messages", {"has_tool_calls": "yes", "session_id": "s"}),
        ("tool_calls", {"state": "lost"}),
        ("tool_calls", {"decision": "maybe", "session_id": "s"}),
        ("tool_calls", {"is_error": 1}),
        ("tool_calls", {"success": True, "is_error": True}),
    ],
)
async def test_values_that_nothing_can_have_are_refused(kind: str, where: dict[str, Any]) -> None:
    async with kvpersist.open(MemoryDriver()) as db:
        with pytest.raises(BadRequest):
            await getattr(db, kind).find(**where)


async def test_a_damaged_session_is_passed_over_when_told_to() -> None:
    async with kvpersist.open(MemoryDriver()) as db:
        await many(db, 3, user_id="u")
        [entry] = await db.store._entries(["kv:session:s01"])
        assert entry is not None
        await db.store._commit((Put(entry.key, entry.value[:-1] + b"\xff"),))
        queries: list[dict[str, Any]] = [{"user_id": "u"}, {"order": "-updated_at"}, {"id_prefix": "s"}]
        for where in queries:
            with pytest.raises(CorruptRecord):
                await db.sessions.find(**where)
            skipped: list[CorruptRecord] = []
            found = await db.sessions.find(**where, on_corrupt=skipped.append)
            assert sorted(session.id for session in found) == ["s00", "s02"]
            assert {error.key for error in skipped} == {"kv:session:s01"}


async def test_a_query_begins_again_when_its_index_was_replaced(
    db: Persistence, monkeypatch: pytest.MonkeyPatch
) -> None:
    await many(db, 5, user_id="u")
    reader = db._all.sessions._reader
    real = reader.unchanged
    answers = iter([False, True] * 20)

    async def unchanged(query: Any) -> bool:
        await real(query)
        return next(answers)

    monkeypatch.setattr(reader, "unchanged", unchanged)

    assert len(await db.sessions.find(user_id="u")) == 5
    assert len((await db.sessions.page(user_id="u", limit=2)).items) == 2
    assert len([s async for s in db.sessions.iterate(user_id="u")]) == 5
    assert await db.sessions.count(user_id="u") == 5


# ---- messages


async def test_one_session_s_messages_are_read_from_its_own_range_in_bounded_memory(
    db: Persistence, driver: Any
) -> None:
    await db.sessions.create(id="s")
    await db.sessions.create(id="t")
    for session in "st":
        await db.messages.append_many(
            session, [Message("user" if n % 10 else "system", str(n), created_at=at(n)) for n in range(600)]
        )
    driver.clear()

    assert [m.content for m in await db.messages.find("s", limit=3)] == ["0", "1", "2"]
    assert (driver.calls, driver.values_read) == (["scan"], 3)
    driver.clear()
    assert [m.content for m in await db.messages.find("s", limit=2, order="desc", offset=1)] == ["598", "597"]
    assert driver.values_read <= 16
    driver.clear()
    most = 0
    async for message in db.messages.iterate("s", role="system", after=300):
        most = max(most, driver.values_read)
        driver.values_read = 0
        assert message.role == "system" and message.number > 300
    assert most <= 250
    assert await db.messages.count("s", role="system") == 60
    assert await db.messages.count("s", number=between(10, 12)) == 3
    assert [m.number for m in await db.messages.find("s", created=between(at(5), at(7)))] == [6, 7, 8]
    assert (await db.messages.find("nobody"), await db.messages.count("nobody", role="user")) == ([], 0)


async def test_messages_of_a_user_come_session_by_session(db: Persistence, driver: Any) -> None:
    for n in range(5):
        await db.sessions.create(id=f"s{n}", user_id=f"u{n % 2}", agent_id="a", created_at=at(n))
        await db.messages.append_many(f"s{n}", [Message("user", f"{n}.{k}", created_at=at(-k)) for k in range(3)])

    async def found(**where: Any) -> list[Any]:
        return [message.content for message in await db.messages.find(**where)]

    assert await found(user_id="u1") == ["3.2", "3.1", "3.0", "1.2", "1.1", "1.0"]
    assert await found(user_id="u1", order="asc", limit=4) == ["1.0", "1.1", "1.2", "3.0"]
    assert await found(user_id="u1", order="-created_at", limit=3) == ["1.0", "3.0", "1.1"]
    assert await found(agent_id="a", user_id="u0", text="4.") == ["4.2", "4.1", "4.0"]
    assert len(await found()) == 15
    assert await db.messages.count(agent_id="a") == await db.messages.count() == 15
    driver.clear()
    page = await db.messages.page(user_id="u1", limit=2)
    assert driver.values_read <= 3
    rest = await db.messages.page(user_id="u1", limit=9, after=page.cursor)
    assert [m.content for m in rest.items] == ["3.0", "1.2", "1.1", "1.0"]
    with pytest.raises(NoIndex):
        await found(user_id="u1", text="4", scanned=2)
    with pytest.raises(NoIndex):
        await found(role="user")
    with pytest.raises(BadRequest):
        [_ async for _ in db.messages.iterate(user_id="u1", after=3)]
    assert len(await found(role="user", scan=True)) == 15


async def test_messages_of_the_last_of_many_sessions_are_found(db: Persistence) -> None:
    for n in range(260):
        await db.sessions.create(id=f"s{n:03}", user_id="u", agent_id="a" if n in (0, 130) else "b", created_at=at(n))
    for session in ("s000", "s130"):
        await db.messages.append_many(session, [Message("user", f"{session} {n}") for n in range(3)])

    expected = [f"s130 {n}" for n in (2, 1, 0)] + [f"s000 {n}" for n in (2, 1, 0)]
    for limit in (1, 2, 5, 100):
        paged: list[Any] = []
        cursor: str | None = None
        while True:
            page = await db.messages.page(user_id="u", agent_id="a", limit=limit, after=cursor, scanned=50)
            paged += [message.content for message in page.items]
            cursor = page.cursor
            if cursor is None:
                break
        assert paged == expected
        found = await db.messages.find(user_id="u", agent_id="a", limit=limit)
        assert [message.content for message in found] == expected[:limit]
    assert await db.messages.count(user_id="u", agent_id="a", role="user") == 6
    assert [m.content async for m in db.messages.iterate(user_id="u", order="asc", agent_id="a")] == expected[::-1]


async def test_an_index_of_messages_answers_in_time_order_and_its_owners_are_the_messages_own(driver: Any) -> None:
    indexes = [Index("agent_id", order_by="-created_at"), Index("role", order_by="-created_at")]
    async with kvpersist.open(driver, message_indexes=indexes) as db:
        for n, name in enumerate("ab"):
            await db.sessions.create(id=name, agent_id="main", user_id=name)
            await db.messages.append_many(
                name,
                [Message("user", "x", agent_id="sub", created_at=at(n)), Message("system", "y", created_at=at(-n))],
            )

        assert [m.session_id for m in await db.messages.find(agent_id="sub")] == ["b", "a"]
        assert await db.messages.find(agent_id="main") == []
        assert [m.session_id for m in await db.messages.find(role="user", order="asc")] == ["a", "b"]
        assert [m.session_id for m in await db.messages.find(role="user", user_id="a")] == ["a"]
        assert await db.messages.count(role="user") == 2
        found = await db.messages.find(role="user", created=between(at(1), at(1)))
        assert [m.session_id for m in found] == ["b"]


# ---- the index of words


async def test_words_are_searched_through_their_index_where_there_is_one(driver: Any, sound: Sound) -> None:
    async with kvpersist.open(driver, text_index=True) as db:
        for n in range(3):
            await db.sessions.create(id=f"s{n}", user_id=f"u{n}")
            await db.messages.append_many(
                f"s{n}",
                [
                    Message("user", f"Where is PARCEL {n}?", created_at=at(n)),
                    Message("assistant", [{"type": "text", "text": "ﬁnd the Straße"}], created_at=at(n)),
                    Message("user", " ".join(f"w{k}" for k in range(300)) + " parcels", created_at=at(n)),
                ],
            )
        driver.clear()

        found = await db.messages.search("parcel 1")

        assert [(m.session_id, m.number) for m in found] == [("s1", 1)]
        assert (found.indexed, found.complete) == (True, True)
        assert driver.values_read <= 6
        assert [m.session_id for m in await db.messages.search("FIND", limit=2)] == ["s2", "s1"]
        assert len(await db.messages.search("strasse")) == 3
        assert len(await db.messages.search("w299 parcels")) == 3  # beyond what is indexed of a message
        assert [m.session_id for m in await db.messages.search("parcel", user_id="u1")] == ["s1", "s1"]
        assert await db.messages.search("arcel") == []
        assert len(await db.messages.search("arcel", session_id="s1")) == 2  # a session is read
        assert not (await db.messages.search("?")).indexed
        assert not (await db.messages.search("parcel", scanned=2)).complete
        assert [m.session_id for m in await db.messages.find(terms="where")] == ["s2", "s1", "s0"]
        await db.messages.update(found[0].id, lambda m: msgspec.structs.replace(m, content="gone"))
        assert await db.messages.search("parcel 1") == []
        await db.sessions.delete("s2")
        assert len(await db.messages.search("straße")) == 2
        await sound(db)
        async with kvpersist.open(driver) as other:
            await other.messages.append("s0", Message("user", "from elsewhere"))
            assert (await other.messages.search("elsewhere")).indexed
        assert len(await db.messages.search("elsewhere")) == 1


async def test_a_search_without_the_index_says_so_and_whether_it_read_all(db: Persistence) -> None:
    await db.sessions.create(id="s")
    await db.messages.append_many("s", [Message("user", f"tea {n}") for n in range(20)])

    found = await db.messages.search("EA 1")
    short = await db.messages.search("ea 1", scanned=5, limit=8)

    assert (len(found), found.indexed, found.complete) == (11, False, True)
    assert (len(short), short.indexed, short.complete) == (8, False, True)
    assert not (await db.messages.search("coffee", scanned=5)).complete


async def test_an_index_of_words_declared_late_is_asked_once_it_is_built() -> None:
    driver = MemoryDriver()
    async with kvpersist.open(driver) as db:
        await db.sessions.create(id="s")
        await db.messages.append("s", Message("user", "tea"))
    async with kvpersist.open(driver, text_index=True) as db:
        with pytest.raises(IndexNotReady):
            await db.messages.search("tea")
        async with kvpersist.open(driver) as other:  # which did not ask for it
            assert not (await other.messages.search("tea")).indexed
        await db.reindex()
        assert len(await db.messages.search("tea")) == 1


# ---- tool calls


async def test_calls_across_sessions_come_newest_first_and_filters_apply_before_the_limit(
    db: Persistence, driver: Any
) -> None:
    for n in range(6):
        await db.sessions.create(id=f"s{n}")
        await turn(db, f"s{n}", "search", "read", minutes=n, error=n == 1)
    await db.messages.append("s0", Message("assistant", tool_calls=[ToolCallPart("c9", "search")], created_at=at(9)))

    async def found(*session: str, **where: Any) -> list[tuple[str, str]]:
        return [(call.session_id, call.name) for call in await db.tool_calls.find(*session, **where)]

    driver.clear()
    assert await found(limit=3) == [("s0", "search"), ("s5", "search"), ("s5", "read")]
    assert await found(success=False, limit=1) == [("s1", "search")]
    assert await found(is_error=True, name="read", limit=1) == [("s1", "read")]
    assert await found(is_error=False, name="read", limit=1, offset=1) == [("s4", "read")]
    assert await found(state="PENDING") == [("s0", "search")]
    down = [("s3", "search"), ("s3", "read"), ("s2", "search"), ("s2", "read")]
    assert await found(created=between(at(2), at(3))) == down
    assert await found(created=between(at(2), at(3)), order="asc") == down[::-1]
    assert await found("s0") == [("s0", "search"), ("s0", "read"), ("s0", "search")]
    assert await found("s0", order="asc", name="read") == [("s0", "read")]
    assert [call.result for call in await db.tool_calls.find("s1", name="read")] == ["read of s1"]
    assert await db.tool_calls.count() == 13
    driver.clear()
    assert await db.tool_calls.count(name="search") == 7
    assert await db.tool_calls.count(created=at_least(at(5))) == 3
    assert driver.values_read == 0
    assert await db.tool_calls.count("s0", state="completed") == 2
    assert [call.session_id async for call in db.tool_calls.iterate(name="search")][:2] == ["s0", "s5"]


async def test_calls_are_found_by_what_was_decided_about_them(db: Persistence) -> None:
    await db.sessions.create(id="s")
    await turn(db, "s", "a", "b", "c")
    approvals = [Approval(decision="allow"), Approval(decision="deny"), None]
    for call, approval in zip(await db.tool_calls.of("s"), approvals, strict=True):
        await db._all.tool_calls.update(
            (call.session_id, call.number, call.position),
            lambda stored, given=approval: msgspec.structs.replace(stored, approval=given),
        )

    def names(calls: list[ToolCall]) -> list[str]:
        return [call.name for call in calls]

    assert names(await db.tool_calls.find("s", has_approval=True)) == ["b", "a"]
    assert names(await db.tool_calls.find("s", has_approval=False)) == ["c"]
    assert names(await db.tool_calls.find(decision="deny", name="b")) == ["b"]
    with pytest.raises(NoIndex):
        await db.tool_calls.find(has_approval=True)
    assert names(await db.tool_calls.find(decision="allow", scan=True)) == ["a"]


# ---- counts


async def test_counts_of_an_owner_are_told_without_messages(db: Persistence, driver: Any) -> None:
    for n in range(4):
        await db.sessions.create(id=f"s{n}", user_id=f"u{n % 2}", agent_id="a" if n else None)
        await turn(db, f"s{n}", "search", "read", error=n == 3)
    await db.messages.append("s3", Message("assistant", tool_calls=[ToolCallPart("c9", "late")]))
    await db.stats(agent_id="a")
    driver.clear()

    mine = await db.stats(user_id="u1")

    assert driver.values_read == 0
    assert len(driver.calls) <= 3
    assert (mine.sessions, mine.messages, mine.tool_calls, mine.tool_errors) == (2, 7, 5, 2)
    assert mine.tool_calls_by_state == {"completed": 2, "failed": 2, "pending": 1}
    assert (mine.messages_per_session, mine.tool_calls_per_session, mine.success_rate) == (3.5, 2.5, 40.0)
    assert (await db.stats(agent_id="a", user_id="u1")).sessions == 2
    assert (await db.stats(agent_id="a")).sessions == 3
    one = await db.stats(session_id="s0")
    assert (one.sessions, one.messages, one.success_rate) == (1, 3, 100.0)
    none = await db.stats(session_id="nobody")
    assert (none.sessions, none.success_rate, none.messages_per_session) == (0, None, None)
    assert (await db.stats(session_id="s0", user_id="u1")).sessions == 0
    assert (await db.stats()).messages == 13


async def test_an_index_is_asked_only_when_it_holds_everything() -> None:
    driver = MemoryDriver()
    async with kvpersist.open(driver) as db:
        await db.sessions.create(id="s", user_id="u", agent_id="a")
        # as a version without this index left it
        definitions = db._all.sessions._definitions
        known = await definitions.known()
        kept = tuple(each for each in known.definition.indexes if not each.name.startswith("agent_id"))
        older = msgspec.structs.replace(known.definition, indexes=kept)
        [stored] = await db.store._entries([definitions.key])
        await definitions._write(older, stored)
        prefix = "kv:session#agent_id"
        for entry in await db.store._scan(prefix, keys.prefix_end(prefix), limit=10):
            await db.store._commit((Delete(entry.key),))
    async with kvpersist.open(driver) as db:
        with pytest.raises(IndexNotReady):
            await db.sessions.find(agent_id="a")
        with pytest.raises(IndexNotReady):
            await db.messages.find(agent_id="a")
        with pytest.raises(IndexNotReady):
            await db.stats(agent_id="a")
        assert [s.id for s in await db.sessions.find(agent_id="a", user_id="u")] == ["s"]
        assert [s.id for s in await db.sessions.find(agent_id="a", scan=True)] == ["s"]
        assert len(await db.sessions.list()) == len(await db.sessions.recent()) == 1
        await db.messages.append("s", Message("user", "hi"))
        await db.sessions.create(id="t", agent_id="a")

        await db.reindex()

        assert {s.id for s in await db.sessions.find(agent_id="a")} == {"s", "t"}
        assert len(await db.messages.find(agent_id="a")) == 1
