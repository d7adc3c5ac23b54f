"""The way in: indexes declared late, plain keys beside the records, damage in a session."""

from __future__ import annotations

import pytest

import kvpersist
from kvpersist import Index, Message, ToolCallPart, keys
from kvpersist.agents.persistence import Persistence
from kvpersist.driver import Put
from kvpersist.errors import CorruptRecord, IndexNotReady, ReservedNamespace
from kvpersist_drivers.memory import MemoryDriver

TURN = [
    Message(role="user", content="find tea"),
    Message(role="assistant", tool_calls=[ToolCallPart("c", "search", {"q": "tea"})]),
    Message(role="tool", tool_call_id="c", content="tea: 3 found"),
    Message(role="assistant", content="three kinds of tea"),
]


async def test_an_index_declared_over_sessions_already_there_answers_after_a_reindex() -> None:
    driver = MemoryDriver()
    async with kvpersist.open(driver) as old:
        await old.sessions.create(id="s", title="a")
    async with kvpersist.open(driver, session_indexes=[Index("title")]) as db:
        with pytest.raises(IndexNotReady):
            await db.sessions.find(title="a")
        async with kvpersist.open(driver, session_indexes=[Index("title")]) as other:
            with pytest.raises(IndexNotReady):
                await other.sessions.find(title="a")

            done = await db.reindex()

            assert done["session"].records == 1
            assert [session.id for session in await db.sessions.find(title="a")] == ["s"]
            assert [session.id for session in await other.sessions.find(title="a")] == ["s"]


async def test_plain_writes_between_the_records_are_refused_before_the_first_session() -> None:
    async with kvpersist.open_store(MemoryDriver()) as store, kvpersist.open(store) as db:
        with pytest.raises(ReservedNamespace):
            await store.put("kv:session:1", "x")

        await db.sessions.create(id="s")

        assert [session.id for session in await db.sessions.list()] == ["s"]


async def test_transactions_are_reached_from_the_way_in() -> None:
    async with kvpersist.open(MemoryDriver()) as db:
        async with db.atomic() as tx:
            tx.put("app:n", 1)

        async def increment(tx: kvpersist.Transaction) -> int:
            n = await tx.get("app:n")
            tx.put("app:n", n + 1)
            return n + 1

        assert await db.transact(increment) == 2
        assert await db.store.get("app:n") == 2


async def damage(db: Persistence, key: str) -> None:
    [entry] = await db.store._entries([key])
    assert entry is not None
    await db.store._commit((Put(key, entry.value[:-1] + bytes([entry.value[-1] ^ 1])),))


@pytest.mark.parametrize("number", [1, 3])
async def test_timeline_and_search_go_on_past_damage_when_told_to(number: int) -> None:
    async with kvpersist.open(MemoryDriver()) as db:
        await db.sessions.create(id="s")
        await db.messages.append_many("s", TURN)
        key = f"kv:message:s!{keys.encode(number)}"
        await damage(db, key)

        for call in (db.timeline("s"), db.messages.search("tea")):
            with pytest.raises(CorruptRecord):
                await call
        skipped: list[CorruptRecord] = []
        items = await db.timeline("s", on_corrupt=skipped.append)
        found = await db.messages.search("tea", on_corrupt=skipped.append)

        assert [item.number for item in items] == [n for n in (1, 2, 3, 4) if n != number]
        assert [message.number for message in found] == [n for n in (4, 3, 1) if n != number]
        assert {error.key for error in skipped} == {key}


async def test_a_damaged_call_is_left_out_of_the_timeline_when_told_to() -> None:
    async with kvpersist.open(MemoryDriver()) as db:
        await db.sessions.create(id="s")
        await db.messages.append_many("s", TURN)
        [call] = await db.tool_calls.of("s")
        key = f"kv:tool_call:s!{keys.encode(call.number)}!{keys.encode(call.position)}"
        await damage(db, key)
        skipped: list[CorruptRecord] = []

        items = await db.timeline("s", on_corrupt=skipped.append)

        assert [(item.number, item.tool_calls) for item in items] == [(1, []), (2, []), (3, []), (4, [])]
        assert [error.key for error in skipped] == [key]


async def test_a_damaged_stat_is_passed_over_and_mended_by_the_next_write() -> None:
    async with kvpersist.open(MemoryDriver()) as db:
        for id_ in ("s", "t"):
            await db.sessions.create(id=id_)
            await db.messages.append_many(id_, TURN)
        before = await db.stats()
    async with kvpersist.open(db.store.driver) as db:
        await damage(db, "kv:session#stat:s")

        assert {session.id for session in await db.sessions.list()} == {"s", "t"}
        with pytest.raises(CorruptRecord):
            await db.stats()
        skipped: list[CorruptRecord] = []
        assert (await db.stats(on_corrupt=skipped.append)).sessions == 1
        assert [error.key for error in skipped] == ["kv:session#stat:s"]

        stored = await db.messages.append("s", Message(role="user", content="thanks"))

        after = await db.stats()
        assert stored.number == 5
        assert (after.messages, after.tool_calls_by_name) == (before.messages + 1, before.tool_calls_by_name)
        await damage(db, "kv:session#stat:t")
        assert await db.sessions.delete("t")
        assert (await db.stats()).sessions == 1
