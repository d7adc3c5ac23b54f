"""Sessions: creation, times, edits, lists and counts."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import msgspec
import pytest

import kvpersist
from kvpersist import Index, Message, Session
from kvpersist.agents.persistence import Persistence
from kvpersist.errors import (
    BadKey,
    BadOption,
    BadRequest,
    KeyTooLong,
    NoIndex,
    ReservedNamespace,
    Unencodable,
    UniqueConflict,
    Unsupported,
)
from kvpersist.testing import FaultyDriver, ManualClock

START = datetime(2025, 3, 1, 12, tzinfo=UTC)
Sound = Callable[[Persistence], Awaitable[None]]


def titled(title: str) -> Callable[[Session], Session]:
    return lambda session: msgspec.structs.replace(session, title=title)


async def test_a_session_comes_back_as_it_was_created(db: Persistence) -> None:
    made = await db.sessions.create(
        user_id="u1", agent_id="a", title="Tea", metadata={"n": 1, "at": START, "raw": b"x"}, external_id="x-1"
    )

    assert made.id and made.created_at is not None and made.created_at.tzinfo is UTC
    assert made.updated_at == made.created_at
    assert await db.sessions.get(made.id) == made
    assert await db.sessions.find(user_id="u1") == [made]
    assert await db.sessions.get("nobody") is None


async def test_a_session_can_bring_its_id_and_times(db: Persistence) -> None:
    east = timezone(timedelta(hours=5))
    made = await db.sessions.create(
        id="auth0|7 ä!", created_at=START.astimezone(east), updated_at=START + timedelta(days=1)
    )

    found = await db.sessions.get("auth0|7 ä!")
    assert found == made
    assert (found.created_at, found.updated_at) == (START, START + timedelta(days=1))


async def test_an_id_is_given_once(db: Persistence, driver: Any, sound: Sound) -> None:
    await db.sessions.create(id="s", title="first")
    before = await driver.everything()

    with pytest.raises(UniqueConflict):
        await db.sessions.create(id="s", title="second")

    assert await driver.everything() == before
    await sound(db)


async def test_one_of_many_who_create_the_same_session_does(db: Persistence, sound: Sound) -> None:
    answers = await asyncio.gather(
        *[db.sessions.create(id="s", title=str(n)) for n in range(8)], return_exceptions=True
    )

    made = [answer for answer in answers if isinstance(answer, Session)]
    assert len(made) == 1
    assert all(isinstance(answer, UniqueConflict) for answer in answers if answer is not made[0])
    assert await db.sessions.get("s") is not None
    await sound(db)


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"colour": "red"}, BadRequest),
        ({"created_at": datetime(2025, 1, 1)}, BadRequest),  # noqa: DTZ001
        ({"metadata": {"x": {1, 2}}}, Unencodable),
        ({"id": "x" * 129}, KeyTooLong),
        ({"id": "\ud800"}, BadKey),
    ],
)
async def test_what_is_no_session_is_refused_and_nothing_is_written(
    db: Persistence, driver: Any, fields: dict[str, Any], error: type[Exception]
) -> None:
    before = await driver.everything()

    with pytest.raises(error):
        await db.sessions.create(**fields)

    assert await driver.everything() == before


async def test_an_edit_changes_the_record_and_its_indexes(db: Persistence, sound: Sound) -> None:
    made = await db.sessions.create(user_id="u1")

    changed = await db.sessions.update(made.id, lambda s: msgspec.structs.replace(s, title="T", user_id="u2"))

    assert changed is not None and changed.title == "T"
    assert await db.sessions.get(made.id) == changed
    assert await db.sessions.find(user_id="u1") == []
    assert await db.sessions.find(user_id="u2") == [changed]
    assert await db.sessions.update("nobody", titled("x")) is None
    with pytest.raises(BadRequest):
        await db.sessions.update(made.id, lambda s: msgspec.structs.replace(s, id="other"))
    await sound(db)


async def test_edits_and_appends_at_once_are_all_there(driver: Any, db: Persistence, sound: Sound) -> None:
    session = await db.sessions.create(metadata={"n": 0})

    def counted(found: Session) -> Session:
        return msgspec.structs.replace(found, metadata={"n": found.metadata["n"] + 1})

    async with kvpersist.open(driver) as other:
        await asyncio.gather(
            *[each.sessions.update(session.id, counted) for each in (db, other) for _ in range(10)],
            *[each.messages.append(session.id, Message("user", str(n))) for each in (db, other) for n in range(10)],
        )

    found = await db.sessions.get(session.id)
    assert found is not None and found.metadata == {"n": 20}
    assert await db.messages.count(session.id) == 20
    await sound(db)


async def test_updated_at_moves_with_every_change_below_the_session(driver: Any) -> None:
    clock = ManualClock()
    async with kvpersist.open(driver, clock=clock) as db:
        session = await db.sessions.create()
        times = [session.updated_at]

        async def after(change: Awaitable[Any]) -> Any:
            clock.advance(0.25)
            answer = await change
            found = await db.sessions.get(session.id)
            assert found is not None
            times.append(found.updated_at)
            return answer

        clock.advance(0.25)
        message = await after(db.messages.append(session.id, Message("user", "hi")))
        await after(db.sessions.update(session.id, titled("T")))
        await after(db.messages.update(message.id, lambda m: msgspec.structs.replace(m, content="ho")))
        await after(db.messages.delete(message.id))

        assert all(earlier < later for earlier, later in itertools.pairwise(times))
        assert times[-1] == datetime.fromtimestamp(clock(), UTC)
        [listed] = await db.sessions.list()
        assert listed.updated_at == times[-1]


async def test_the_list_of_recent_changes_is_exact_to_a_second(driver: Any, sound: Sound) -> None:
    clock = ManualClock()
    async with kvpersist.open(driver, clock=clock) as db:
        sessions = [await db.sessions.create(id=name) for name in "abc"]
        for _ in range(4):
            clock.advance(0.4)
            await db.messages.append("b", Message("user", "x"))
        clock.advance(1.1)
        await db.messages.append("a", Message("user", "x"))

        recent = await db.sessions.recent()

        assert [session.id for session in recent] == ["a", "b", "c"]
        assert [session.id for session in await db.sessions.recent(limit=1)] == ["a"]
        assert recent[2].updated_at == sessions[2].created_at
        await sound(db)


async def test_appends_within_a_second_do_not_move_the_index(driver: Any) -> None:
    clock = ManualClock()
    async with kvpersist.open(driver, clock=clock) as db:
        session = await db.sessions.create()
        await db.messages.append(session.id, Message("user", "x"))
        driver.clear()

        clock.advance(0.5)
        await db.messages.append(session.id, Message("user", "x"))
        assert not any("#updated:" in op.key for batch in driver.batches for op in batch.ops)

        clock.advance(0.6)
        await db.messages.append(session.id, Message("user", "x"))
        assert any("#updated:" in op.key for batch in driver.batches for op in batch.ops)


async def test_sessions_are_listed_newest_first_in_pages(db: Persistence) -> None:
    for n in range(25):
        await db.sessions.create(id=f"s{n:02}", user_id=f"u{n % 2}", created_at=START + timedelta(minutes=n))

    assert [session.id for session in await db.sessions.list(limit=3)] == ["s24", "s23", "s22"]
    page = await db.sessions.page(user_id="u1", limit=10)
    rest = await db.sessions.page(user_id="u1", limit=10, after=page.cursor)
    assert [s.id for s in page.items + rest.items] == [f"s{n:02}" for n in range(23, 0, -2)]
    assert rest.cursor is None
    assert [s.id async for s in db.sessions.iterate()] == [f"s{n:02}" for n in range(24, -1, -1)]
    assert await db.sessions.count() == 25
    assert await db.sessions.count(user_id="u0") == 13
    window = kvpersist.between(START, START + timedelta(minutes=4))
    assert [s.id for s in await db.sessions.find(user_id="u0", created_at=window)] == ["s04", "s02", "s00"]


async def test_more_indexes_can_be_declared(driver: Any, sound: Sound) -> None:
    indexes = [Index("agent_id"), Index("external_id", unique=True), Index("metadata.tag", type=str)]
    async with kvpersist.open(driver, session_indexes=indexes) as db:
        made = await db.sessions.create(agent_id="a", external_id="x", metadata={"tag": "t"})
        other = await db.sessions.create()

        assert [s.id for s in await db.sessions.find(**{"metadata.tag": "t"})] == [made.id]
        assert [s.id for s in await db.sessions.find(agent_id="a")] == [made.id]
        with pytest.raises(UniqueConflict):
            await db.sessions.create(external_id="x")
        with pytest.raises(UniqueConflict):
            await db.sessions.update(other.id, lambda s: msgspec.structs.replace(s, external_id="x"))
        assert await db.sessions.delete(made.id)
        await db.sessions.create(external_id="x")
        with pytest.raises(NoIndex):
            await db.sessions.find(title="T")
        await sound(db)


async def test_what_is_kept_beside_the_record_cannot_be_indexed_in_it(driver: Any) -> None:
    for index in (Index("updated_at"), Index("user_id", order_by="-updated_at"), Index("title", name="updated")):
        with pytest.raises(BadOption):
            await kvpersist.open(driver, session_indexes=[index])


async def test_namespaces_do_not_see_each_other(driver: Any, sound: Sound) -> None:
    async with kvpersist.open(driver, namespace="a:b") as one, kvpersist.open(driver, namespace="a") as two:
        await one.sessions.create(id="s", user_id="u")
        await one.messages.append("s", Message("user", "x", id="m"))

        assert await two.sessions.get("s") is None
        assert await two.sessions.list() == []
        assert await two.messages.get("m") is None
        await two.sessions.create(id="s")
        await two.messages.append("s", Message("user", "y", id="m"))
        assert await two.sessions.delete("s")
        assert await one.messages.count("s") == 1
        await sound(one)


async def test_plain_keys_cannot_reach_into_the_records(db: Persistence) -> None:
    await db.sessions.create(id="s")

    with pytest.raises(ReservedNamespace):
        await db.store.put("kv:session:s", {"id": "s"})
    await db.store.put("app:settings", 1)
    assert await db.store.get("app:settings") == 1


async def test_own_records_live_in_the_same_namespace(db: Persistence) -> None:
    class Note(msgspec.Struct):
        id: str
        text: str = ""

    notes = db.repository(Note, name="note", indexes=[Index("text")])
    await notes.put(Note("1", "tea"))

    assert await notes.find(text="tea") == [Note("1", "tea")]
    with pytest.raises(BadOption):
        db.repository(Note, name="session")


async def test_a_store_can_be_opened_awaited_and_shared(driver: Any) -> None:
    db = await kvpersist.open(driver)
    await db.sessions.create(id="s")
    async with kvpersist.open(db.store) as same:
        assert await same.sessions.get("s") is not None
    assert await db.sessions.get("s") is not None
    await db.close()
    await db.close()


async def test_a_backend_without_conditional_writes_is_refused(driver: Any) -> None:
    without = FaultyDriver(driver, without={"conditional"})

    with pytest.raises(Unsupported):
        await kvpersist.open(without)


async def test_a_caller_s_error_that_cannot_be_copied_reaches_it(db: Persistence) -> None:
    class Refused(Exception):
        def __init__(self, code: int, text: str) -> None:
            super().__init__(text)

    def refuse(session: Session) -> Session:
        raise Refused(1, "no")

    await db.sessions.create(id="s")
    async with asyncio.timeout(5):
        answers = await asyncio.gather(
            db.messages.append("s", Message("user", "a")),
            db.sessions.update("s", refuse),
            db.messages.append("s", Message("user", "b")),
            return_exceptions=True,
        )

    assert [type(each) for each in answers] == [Message, Refused, Message]


async def test_a_session_that_changes_while_the_recent_ones_are_read_is_among_them(
    driver: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if driver.capabilities.atomic_batch == "none":
        pytest.skip("there what moved cannot be told from what a crash left")
    clock = ManualClock()
    async with kvpersist.open(driver, clock=clock) as db:
        for n in range(3):
            await db.sessions.create(id=f"s{n}")
            clock.advance(10)
        finder = db.sessions._finder
        real = finder.stats

        async def slow(parts: Any) -> Any:
            monkeypatch.setattr(finder, "stats", real)
            await db.messages.append("s1", Message("user", "hi"))
            return await real(parts)

        monkeypatch.setattr(finder, "stats", slow)

        assert {session.id for session in await db.sessions.recent()} == {"s0", "s1", "s2"}


async def test_a_creation_that_a_unique_value_stops_takes_nothing_back_of_another_of_its_id(
    driver: Any, sound: Sound
) -> None:
    async with kvpersist.open(driver, session_indexes=[Index("external_id", unique=True)]) as db:
        await db.sessions.create(id="other", external_id="taken")
        for steps in range(12):
            id_ = f"s{steps}"
            refused = asyncio.create_task(db.sessions.create(id=id_, external_id="taken"))
            for _ in range(steps):
                await asyncio.sleep(0)
            created, error = await asyncio.gather(
                db.sessions.create(id=id_, external_id=id_), refused, return_exceptions=True
            )

            assert isinstance(error, UniqueConflict)
            assert created == await db.sessions.get(id_)
            assert (await db.messages.append(id_, Message("user", "q"))).number == 1
        await sound(db)
