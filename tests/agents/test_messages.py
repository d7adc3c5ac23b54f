"""Messages: turns, numbers, ranges, edits, deletion, search; what is refused leaves nothing behind."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
import pytest

import kvpersist
from kvpersist import Index, Message, ToolCallPart, keys
from kvpersist.agents.persistence import Persistence
from kvpersist.driver import Put
from kvpersist.errors import (
    BadRequest,
    CommitUnknown,
    CorruptRecord,
    KvError,
    ParentGone,
    PartlyDone,
    Unavailable,
    Unencodable,
    UniqueConflict,
)
from kvpersist.testing import FaultyDriver

START = datetime(2025, 3, 1, 12, tzinfo=UTC)
Sound = Callable[[Persistence], Awaitable[None]]


@pytest.fixture
async def session(db: Persistence) -> str:
    return (await db.sessions.create(user_id="u1")).id


def said(*texts: str) -> list[Message]:
    return [Message("user" if n % 2 == 0 else "assistant", text) for n, text in enumerate(texts)]


async def contents(db: Persistence, session: str) -> list[Any]:
    return [message.content async for message in db.messages.iterate(session)]


async def test_a_turn_is_stored_with_ids_numbers_and_times(db: Persistence, session: str) -> None:
    mine = said("a", "b", "c")

    stored = await db.messages.append_many(session, mine)

    assert [m.number for m in stored] == [1, 2, 3]
    assert [m.session_id for m in stored] == [session] * 3
    assert len({m.id for m in stored}) == 3 and all(m.created_at is not None for m in stored)
    assert mine == said("a", "b", "c")
    assert [m async for m in db.messages.iterate(session)] == stored
    assert [await db.messages.get(m.id) for m in stored] == stored
    assert await db.messages.at(session, 2) == stored[1]
    assert await db.messages.at(session, 9) is None
    assert await db.messages.get("nobody") is None
    assert await db.messages.append_many(session, []) == []


@pytest.mark.parametrize(
    "content",
    [
        None,
        "",
        "text \U0001f600",
        0,
        False,
        [],
        {},
        [{"type": "text", "text": "x"}, {"n": 2**70, "raw": b"\0", "at": START}],
    ],
)
async def test_any_content_comes_back_alike(db: Persistence, session: str, content: Any) -> None:
    await db.messages.append(session, Message("user", content, metadata={"c": content}, extra={"c": content}))

    [found] = await db.messages.last(session, 1)
    assert found.content == content and type(found.content) is type(content)
    assert found.metadata == found.extra == {"c": content}


async def test_the_last_n_are_chronological_at_any_length(db: Persistence, session: str) -> None:
    await db.messages.append_many(session, said(*[str(n) for n in range(1, 301)]))

    assert [m.content for m in await db.messages.last(session, 3)] == ["298", "299", "300"]
    assert len(await db.messages.last(session, 1000)) == 300
    assert [m.number for m in await db.messages.range(session, after=5, before=9)] == [6, 7, 8]
    assert [m.number for m in await db.messages.range(session, before=5, reverse=True, limit=2)] == [4, 3]
    assert await db.messages.last("nobody", 5) == []


async def test_turns_of_many_tasks_get_every_number_once_and_stay_together(
    db: Persistence, session: str, sound: Sound
) -> None:
    async def writer(name: str) -> None:
        for n in range(5):
            await db.messages.append_many(session, said(f"{name}.{n}.a", f"{name}.{n}.b"))

    await asyncio.gather(*[writer(str(n)) for n in range(12)])

    found = await contents(db, session)
    assert len(found) == len(set(found)) == 120
    for first, second in zip(found[::2], found[1::2], strict=True):
        assert first[:-1] == second[:-1]
    await sound(db)


async def test_several_openings_share_one_sequence(driver: Any, db: Persistence, session: str, sound: Sound) -> None:
    async with kvpersist.open(driver) as second, kvpersist.open(driver) as third:
        await asyncio.gather(
            *[each.messages.append_many(session, said("x", "y")) for each in (db, second, third) for _ in range(10)]
        )
        numbers = [m.number async for m in third.messages.iterate(session)]

    assert numbers == list(range(1, 61))
    await sound(db)


@pytest.mark.parametrize(
    ("bad", "error"),
    [
        (Message("robot", "x"), BadRequest),
        (Message("user", "x", session_id="another"), BadRequest),
        (Message("user", "x", tool_calls=[ToolCallPart("c", "t")]), BadRequest),
        (Message("user", "x", tool_call_id="c"), BadRequest),
        (Message("user", "x", created_at=datetime(2025, 1, 1)), BadRequest),  # noqa: DTZ001
        (Message("user", {1, 2}), Unencodable),
        (Message("user", "x", metadata={"at": datetime(2025, 1, 1)}), Unencodable),  # noqa: DTZ001
        (Message("assistant", tool_calls=[ToolCallPart("c", "t", {"x": object()})]), Unencodable),
        (Message("user", "x", id="taken"), UniqueConflict),
    ],
)
async def test_a_bad_message_is_refused_with_its_whole_turn(
    db: Persistence, driver: Any, session: str, sound: Sound, bad: Message, error: type[KvError]
) -> None:
    await db.messages.append(session, Message("user", "there", id="taken"))
    before = await driver.everything()

    with pytest.raises(error):
        await db.messages.append_many(session, [Message("user", "good"), bad])

    assert await driver.everything() == before
    assert (await db.messages.append(session, Message("user", "next"))).number == 2
    await sound(db)


async def test_two_messages_of_one_id_in_a_turn_are_refused(db: Persistence, session: str, sound: Sound) -> None:
    with pytest.raises(UniqueConflict):
        await db.messages.append_many(session, [Message("user", "a", id="m"), Message("user", "b", id="m")])

    assert await contents(db, session) == []
    await sound(db)


async def test_an_id_is_taken_across_sessions(db: Persistence, session: str, sound: Sound) -> None:
    other = (await db.sessions.create()).id
    await db.messages.append(session, Message("user", "a", id="m"))

    with pytest.raises(UniqueConflict):
        await db.messages.append(other, Message("user", "b", id="m"))

    found = await db.messages.get("m")
    assert found is not None and found.session_id == session
    assert await contents(db, other) == []
    await sound(db)


async def test_of_many_appends_at_once_only_the_bad_ones_fail(db: Persistence, session: str, sound: Sound) -> None:
    await db.messages.append(session, Message("user", "first", id="taken"))
    turns = [Message("user", str(n), id="taken" if n % 5 == 0 else "") for n in range(20)]
    turns[7].content = {object()}

    answers = await asyncio.gather(*[db.messages.append(session, each) for each in turns], return_exceptions=True)

    failed = {n: type(answer) for n, answer in enumerate(answers) if isinstance(answer, BaseException)}
    assert failed == {0: UniqueConflict, 5: UniqueConflict, 10: UniqueConflict, 15: UniqueConflict, 7: Unencodable}
    assert await db.messages.count(session) == 16
    await sound(db)


async def test_a_message_needs_a_session(db: Persistence, driver: Any) -> None:
    before = await driver.everything()

    with pytest.raises(ParentGone):
        await db.messages.append("nobody", Message("user", "x"))

    assert await driver.everything() == before


async def test_a_message_of_a_deleted_session_is_refused(driver: Any, db: Persistence, session: str) -> None:
    async with kvpersist.open(driver) as other:
        await other.messages.append(session, Message("user", "x"))  # remembers the session
        await db.sessions.delete(session)
        before = await driver.everything()

        with pytest.raises(ParentGone):
            await other.messages.append(session, Message("user", "y"))
        with pytest.raises(ParentGone):
            await db.messages.append(session, Message("user", "y"))

        assert await driver.everything() == before == {}


async def test_append_each_appends_to_several_sessions(db: Persistence, sound: Sound) -> None:
    sessions = [(await db.sessions.create()).id for _ in range(5)]

    stored = await db.messages.append_each({each: said("a", "b") for each in sessions})

    assert {each: [m.number for m in turn] for each, turn in stored.items()} == {each: [1, 2] for each in sessions}
    with pytest.raises(PartlyDone) as failure:
        await db.messages.append_each({sessions[0]: said("c"), "nobody": said("c")})
    assert isinstance(failure.value.failed["nobody"], ParentGone)
    assert await db.messages.count(sessions[0]) == 3
    await sound(db)


async def test_imported_times_are_kept_and_move_updated_at(db: Persistence) -> None:
    session = await db.sessions.create(created_at=START)
    await db.messages.append_many(
        session.id, [Message("user", str(n), created_at=START + timedelta(hours=n)) for n in range(3)]
    )

    found = await db.sessions.get(session.id)
    assert found is not None and found.updated_at == START + timedelta(hours=2)
    assert [m.created_at for m in await db.messages.last(session.id, 3)] == [
        START + timedelta(hours=n) for n in range(3)
    ]


async def test_an_edit_keeps_place_and_id(db: Persistence, session: str, sound: Sound) -> None:
    [first, _] = await db.messages.append_many(session, said("a", "b"))

    changed = await db.messages.update(first.id, lambda m: msgspec.structs.replace(m, content="A", metadata={"e": 1}))

    assert changed is not None and (changed.content, changed.number) == ("A", 1)
    assert await db.messages.get(first.id) == changed
    assert await contents(db, session) == ["A", "b"]
    assert await db.messages.update("nobody", lambda m: m) is None
    for field, value in {"id": "x", "number": 7, "role": "system", "session_id": "s", "tool_call_id": "c"}.items():
        with pytest.raises(BadRequest):
            await db.messages.update(first.id, lambda m, f=field, v=value: msgspec.structs.replace(m, **{f: v}))
    await sound(db)


async def test_a_deleted_message_is_gone_from_everything(
    db: Persistence, driver: Any, session: str, sound: Sound
) -> None:
    await db.messages.append_many(session, said("a", "b"))
    before = await driver.everything()
    asked = Message("assistant", tool_calls=[ToolCallPart("c1", "t"), ToolCallPart("c2", "t")])
    message = await db.messages.append(session, asked)

    assert await db.messages.delete(message.id) is True
    assert await db.messages.delete(message.id) is False

    after = await driver.everything()
    stat = f"kv:session#stat:{session}"
    moved = {key for key in after.keys() | before.keys() if "#updated:" in key or key == stat}
    assert {k: v for k, v in after.items() if k not in moved} == {k: v for k, v in before.items() if k not in moved}
    assert await db.messages.count(session) == 2
    assert await db.tool_calls.of(session) == []
    assert [m.content for m in await db.messages.last(session, 5)] == ["a", "b"]
    assert (await db.messages.append(session, Message("user", "next"))).number == 4
    await sound(db)


async def test_search_finds_text_in_any_case(db: Persistence, session: str) -> None:
    other = (await db.sessions.create(user_id="u2")).id
    await db.messages.append_many(session, said("Green TEA", "coffee", "straße"))
    await db.messages.append(other, Message("user", [{"type": "text", "text": "more tea"}, {"n": 1}]))

    async def found(text: str, **options: Any) -> list[Any]:
        return [(m.session_id, m.number) for m in await db.messages.search(text, **options)]

    assert sorted(await found("tea")) == sorted([(session, 1), (other, 1)])
    assert await found("tea", user_id="u1") == await found("tea", session_id=session) == [(session, 1)]
    assert await found("STRASSE") == [(session, 3)]
    assert await found("tea", session_id=other, user_id="u1") == []
    assert await found("nothing") == await found("text") == []
    assert len(await found("tea", limit=1)) == 1
    with pytest.raises(BadRequest):
        await found("")


async def test_search_reads_no_more_than_it_may(db: Persistence, driver: Any, session: str) -> None:
    await db.messages.append_many(session, said(*["x"] * 400, "needle"))
    await db.messages.append_many(session, said(*["x"] * 300))
    driver.clear()

    assert await db.messages.search("needle", session_id=session, scanned=200) == []
    assert driver.values_read <= 200
    assert len(await db.messages.search("needle", session_id=session, scanned=400)) == 1


async def test_more_indexes_find_messages_across_sessions(driver: Any, sound: Sound) -> None:
    indexes = [Index("role", order_by="-created_at"), Index("metadata.topic", type=str)]
    async with kvpersist.open(driver, message_indexes=indexes) as db:
        for name in "ab":
            await db.sessions.create(id=name)
            await db.messages.append_many(
                name, [Message("user", name), Message("system", "s", metadata={"topic": name})]
            )

        assert {m.session_id for m in await db.messages.find(role="system")} == {"a", "b"}
        assert [m.session_id for m in await db.messages.find(**{"metadata.topic": "b"})] == ["b"]
        with pytest.raises(Unencodable):
            await db.messages.append("a", Message("user", "x", metadata={"topic": 7}))
        await db.sessions.delete("a")
        assert {m.session_id for m in await db.messages.find(role="system")} == {"b"}
        await sound(db)


async def test_counts_of_a_namespace_are_read_without_messages(db: Persistence, driver: Any, session: str) -> None:
    for n in range(12):
        other = await db.sessions.create(user_id=f"u{n}")
        await db.messages.append_many(other.id, said("a", "b", "c"))
    await db.messages.append(session, Message("system", "x"))
    driver.clear()

    stats = await db.stats()

    assert (stats.sessions, stats.messages, stats.tool_calls) == (13, 37, 0)
    assert stats.messages_by_role == {"user": 24, "assistant": 12, "system": 1}
    assert driver.values_read == 0


async def test_a_turn_over_the_largest_batch_is_stored_in_order(db: Persistence, session: str) -> None:
    stored = await db.messages.append_many(session, [Message("user", n) for n in range(1_500)])

    assert [m.number for m in stored] == list(range(1, 1_501))
    assert await db.messages.count(session) == 1_500


async def test_a_turn_whose_write_fails_leaves_nothing_or_says_so(
    driver: Any, backend: str, db: Persistence, sound: Sound
) -> None:
    session = (await db.sessions.create()).id
    await db.messages.append(session, Message("user", "first"))
    for nth in range(1, 12):
        faulty = FaultyDriver(driver)
        async with kvpersist.open(faulty) as again:
            await again.messages.append(session, Message("user", "warm"))
            count = await again.messages.count(session)
            fault = faulty.fail("commit", nth)
            try:
                await again.messages.append_many(session, [Message("assistant", tool_calls=[ToolCallPart("c", "t")])])
            except Unavailable:
                assert await again.messages.count(session) == count
            except CommitUnknown:
                assert backend == "ordered"
            done = not fault.fired
        await sound(db)
        if done:
            break
    else:
        pytest.fail("every write was failed and none was the last")


async def test_cancelled_turns_are_whole_or_absent_and_stop_nobody(
    db: Persistence, backend: str, session: str, sound: Sound
) -> None:
    tasks = [asyncio.create_task(db.messages.append_many(session, said(f"{n}a", f"{n}b"))) for n in range(40)]
    for n, task in enumerate(tasks):
        if n % 3 == 0:
            for _ in range(n % 5):
                await asyncio.sleep(0)
            task.cancel()
    answers = await asyncio.gather(*tasks, return_exceptions=True)

    found = await contents(db, session)
    for n, answer in enumerate(answers):
        there = [text for text in (f"{n}a", f"{n}b") if text in found]
        if isinstance(answer, list):
            assert len(there) == 2
        else:
            assert isinstance(answer, asyncio.CancelledError)
            assert len(there) in ((0, 1, 2) if backend == "ordered" else (0, 2))
    assert len(found) == len(set(found))
    next_ = await db.messages.append(session, Message("user", "next"))
    assert next_.number == len(found) + 1
    await sound(db)


async def test_a_turn_whose_answer_is_lost_is_found_to_have_happened(
    driver: Any, db: Persistence, session: str, backend: str, sound: Sound
) -> None:
    if backend == "ordered":
        pytest.skip("a lost answer in the middle of an ordered turn is reported, see the test of failing writes")
    faulty = FaultyDriver(driver)
    async with kvpersist.open(faulty) as again:
        await again.messages.append(session, Message("user", "warm"))
        faulty.fail("commit", 1, effect=True)

        stored = await again.messages.append_many(session, said("a", "b"))

        assert [m.number for m in stored] == [2, 3]
        assert (await again.messages.append(session, Message("user", "next"))).number == 4
    assert await contents(db, session) == ["warm", "a", "b", "next"]
    await sound(db)


async def test_a_damaged_message_is_named_and_reading_goes_on_past_it(db: Persistence, session: str) -> None:
    await db.messages.append_many(session, said("a", "b", "c"))
    key = f"kv:message:{session}!{keys.encode(2)}"
    [entry] = await db.store._entries([key])
    assert entry is not None
    await db.store._commit((Put(key, entry.value[:-1] + bytes([entry.value[-1] ^ 1])),))

    with pytest.raises(CorruptRecord) as caught:
        await db.messages.last(session, 3)
    skipped: list[CorruptRecord] = []
    ranged = await db.messages.range(session, on_corrupt=skipped.append)
    every = [message.content async for message in db.messages.iterate(session, on_corrupt=skipped.append)]

    assert caught.value.key == key
    assert [message.content for message in ranged] == every == ["a", "c"]
    assert [error.key for error in skipped] == [key, key]


@pytest.mark.parametrize("act", ["delete", "update"])
async def test_a_message_of_a_session_that_took_the_id_meanwhile_is_left_alone(
    db: Persistence, sound: Sound, monkeypatch: pytest.MonkeyPatch, act: str
) -> None:
    await db.sessions.create(id="s")
    old = await db.messages.append("s", Message("user", "old"))
    turns: Any = db.messages._turns
    real = turns.submit

    async def late(session_id: str, item: Any) -> Any:
        monkeypatch.setattr(turns, "submit", real)
        await db.sessions.delete("s")
        await db.sessions.create(id="s")
        await db.messages.append("s", Message("user", "new"))
        return await real(session_id, item)

    monkeypatch.setattr(turns, "submit", late)

    if act == "delete":
        assert not await db.messages.delete(old.id)
    else:
        assert await db.messages.update(old.id, lambda m: msgspec.structs.replace(m, content="changed")) is None

    assert [message.content for message in await db.messages.last("s", 10)] == ["new"]
    await sound(db)


async def test_a_message_that_a_computed_index_fails_on_fails_alone(driver: Any, sound: Sound) -> None:
    if driver.capabilities.atomic_batch == "none":
        pytest.skip("there every turn is a batch of its own")
    topic = Index(lambda message: message.metadata["topic"], name="topic")
    async with kvpersist.open(driver, message_indexes=[topic]) as db:
        await db.sessions.create(id="s")
        good = Message("user", "good", metadata={"topic": "tea"})

        answers = await asyncio.gather(
            *[db.messages.append("s", each) for each in (good, good, Message("user", "bad"), good)],
            return_exceptions=True,
        )

        assert [type(each) for each in answers] == [Message, Message, TypeError, Message]
        assert [message.number for message in await db.messages.last("s", 10)] == [1, 2, 3]
        await sound(db)
