"""Stores: opened, looked after, closed; several writes as one; moved to another."""

from __future__ import annotations

import logging

import msgspec
import pytest
from places import Place, Where

import kvpersist
from kvpersist import Locked, Message, Todo
from kvpersist.agents.persistence import Persistence
from kvpersist.errors import BadRequest, StoreClosed, Unsupported

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(300)]


class Note(msgspec.Struct):
    """A record of one's own."""

    id: str
    text: str


@pytest.mark.shows(
    "In memory",
    "In files that people and git can read",
    "In SQLite",
    "In PostgreSQL",
    "In MariaDB or MySQL",
    "In Redis",
    "In MongoDB",
    "The same calls on every store",
    "A store from a mapping with its type",
    "Closing, also twice",
)
async def test_a_store_is_opened_by_a_mapping_closed_twice_and_opened_again(where: Where, place: Place) -> None:
    db = await kvpersist.open(where, timeout=60)
    await db.sessions.create(id="kept")
    await db.messages.append("kept", Message("user", "hi"))
    await db.close()
    await db.close()

    with pytest.raises(StoreClosed):
        await db.sessions.get("kept")
    async with kvpersist.open(where, timeout=60) as again:
        found = [message.content for message in await again.messages.range("kept")]
        assert found == ([] if place.name == "memory" else ["hi"])


@pytest.mark.shows(
    "Whether the store answers, and how quickly",
    "Counts and times of what was done, and sizes",
    "The time that queries take is watched",
)
async def test_a_store_tells_how_it_is_and_what_it_did(db: Persistence) -> None:
    health = await db.health(timeout=30)
    await db.sessions.create(id="counted")
    await db.messages.append("counted", Message("user", "hi"))
    metrics, totals = db.metrics(), await db.totals()

    assert health.healthy
    assert health.stores["main"].writable is True
    assert health.latency is not None
    assert metrics.puts > 2
    assert metrics.commit.percentile(50) is not None
    assert metrics.errors == {}
    assert totals.sessions >= 1
    assert "main" in totals.bytes


@pytest.mark.shows("Whether records fit together, in all stores", "What does not fit together is looked for")
async def test_what_does_not_fit_together_is_told(db: Persistence) -> None:
    await db.containers.create(id="box")
    await db.images.create(id="picture", container_id="box")
    await db.sessions.create(id="named", container_id="box", image_id="picture")
    assert (await db.check(session_id="named")).consistent
    await db.images.delete("picture")

    found = await db.check(session_id="named")

    assert [(issue.kind, issue.id) for issue in found.issues] == [("reference", "named")]


@pytest.mark.shows("Files beside a database: todos, windows, files, media, events")
async def test_state_and_events_may_lie_in_files_beside_any_store(
    where: Where, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("files")
    async with kvpersist.open(
        where, timeout=60, files=f"file://{folder}/files", events=f"file://{folder}/events"
    ) as db:
        await db.agents.create(id="agent")
        await db.sessions.create(id="session", agent_id="agent")
        await db.todos.save("agent", [Todo(title="draft")])
        await db.events.publish("agent", {"n": 0})

        assert [key async for key in db.placement.stores["files"].keys("kv:") if "todo" in key] != []
        assert [key async for key in db.store.keys("kv:") if "todo" in key] == []
        assert (await db.check()).consistent
        await db.agents.delete("agent")
        assert await db.events.read("agent") == []
        assert [key async for key in db.placement.stores["files"].keys("kv:") if "todo:" in key] == []


@pytest.mark.shows("One at a time: a lock for an agent, across processes")
async def test_one_holds_a_lock_and_others_are_told(db: Persistence) -> None:
    async with db.store.lock("agent-7", ttl=60) as lease:
        with pytest.raises(Locked):
            await db.store.lock("agent-7", wait=0).acquire()
        assert lease.token > 0

    async with db.store.lock("agent-7", wait=0) as later:
        assert later.token > lease.token


@pytest.mark.shows(
    "Several writes as one",
    "Writes that belong together are one transaction",
    "A turn is kept whole, or not at all",
)
async def test_several_writes_are_one_or_are_refused(db: Persistence) -> None:
    notes = db.repository(Note, name="note")

    async def both() -> None:
        async with db.atomic() as tx:
            await notes.put(Note("a", "1"), tx=tx)
            await notes.put(Note("b", "2"), tx=tx)

    if db.store.capabilities.atomic_batch == "none":
        with pytest.raises(Unsupported):
            await both()
        assert [await notes.get("a"), await notes.get("b")] == [None, None]
    else:
        await both()
        assert [await notes.get("a"), await notes.get("b")] == [Note("a", "1"), Note("b", "2")]
        with pytest.raises(RuntimeError, match="no"):
            async with db.atomic() as tx:
                await notes.put(Note("c", "3"), tx=tx)
                raise RuntimeError("no")
        assert await notes.get("c") is None
    await db.sessions.create(id="turn")
    with pytest.raises(BadRequest):
        await db.messages.append_many("turn", [Message("user", "good"), Message("nobody", "bad")])
    assert await db.messages.count("turn") == 0


@pytest.mark.shows("Everything of one store into another, of any kind", "From memory to a database, step by step")
async def test_all_conversations_move_to_another_store(db: Persistence) -> None:
    async with kvpersist.open("memory://") as memory:
        for n in range(3):
            await memory.sessions.create(id=f"moved-{n}", user_id="mover", title=str(n))
            await memory.messages.append(f"moved-{n}", Message("user", n))

        async for session in memory.sessions.iterate():
            await db.sessions.import_(await memory.sessions.export(session.id), new_ids=False)

        moved = await db.sessions.find(user_id="mover", order="title")
        assert [(session.id, session.title) for session in moved] == [(f"moved-{n}", str(n)) for n in range(3)]
        async with kvpersist.open("memory://") as back:
            for session in moved:
                await back.sessions.import_(await db.sessions.export(session.id), new_ids=False)
            assert [m.content for m in await back.messages.range("moved-2")] == [2]
            assert (await back.stats()).messages == 3


@pytest.mark.shows("A switch for debug logging")
async def test_what_is_done_is_logged_where_debugging_is_on(where: Where, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "kvpersist")
    async with kvpersist.open(where, timeout=60) as db:
        await db.sessions.create(id="a")

    assert "commit: " in "".join(record.getMessage() for record in caplog.records)
