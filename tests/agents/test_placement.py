"""Stores beside the main one: what is kept where, and what a deletion, a crash and a batch do then."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

import kvpersist
from kvpersist.agents.persistence import Persistence
from kvpersist.agents.placement import Placement, events_of
from kvpersist.agents.state.history import HistoryWindow, RecoveredFile
from kvpersist.agents.state.media import Media
from kvpersist.agents.state.todos import Todo
from kvpersist.driver import Batch, Committed, Driver, Entry
from kvpersist.errors import BadOption, KvError, ParentGone, Unsupported
from kvpersist.testing.faults import FaultyDriver
from kvpersist_drivers.memory import MemoryDriver
from kvpersist_drivers.sqlite import SqliteDriver

_PLACED = ("todo", "window", "recovered_file", "media")


class Watched:
    """A driver that lets others run before a commit, and can stop answering."""

    def __init__(self, driver: Driver) -> None:
        self.driver = driver
        self.capabilities = driver.capabilities
        self.before_commit: Callable[[Sequence[Batch]], Any] | None = None

    async def get(self, keys: Sequence[str]) -> list[Entry | None]:
        return await self.driver.get(keys)

    async def commit(self, batches: Sequence[Batch]) -> list[Committed | KvError]:
        if self.before_commit is not None:
            await self.before_commit(batches)
        return await self.driver.commit(batches)

    async def scan(self, start: str | None, end: str | None, **options: Any) -> list[Entry]:
        return await self.driver.scan(start, end, **options)

    async def close(self) -> None:
        await self.driver.close()

    async def keys(self) -> set[str]:
        """Those of records, of whatever kind; without marks of stores and definitions, and without tombstones."""
        found = await self.driver.scan(None, None, limit=1_000_000)
        return {
            entry.key
            for entry in found
            if not entry.key.startswith("kvpersist:") and "#def" not in entry.key
            if entry.value not in (b"", b"done") and entry.expires_at is None
        }


class Stores:
    def __init__(self, main: Watched, files: Watched, events: Watched) -> None:
        self.main, self.files, self.events = main, files, events

    def open(self, **more: Any) -> Any:
        return kvpersist.open(self.main, files=self.files, events=self.events, **more)

    async def keys(self) -> list[set[str]]:
        return [await each.keys() for each in (self.main, self.files, self.events)]


async def _driver(kind: str, path: Path) -> Driver:
    if kind == "sqlite":
        return await SqliteDriver.open(SqliteDriver.Options(path=str(path), durability="normal"))
    memory = MemoryDriver()
    return memory if kind == "memory" else FaultyDriver(memory, without={"atomic_batch", "reverse", "deref"})


@pytest.fixture(params=["memory+ordered", "sqlite+memory", "ordered+memory", "ordered+ordered"])
async def stores(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Stores]:
    main, beside = request.param.split("+")
    drivers = [
        Watched(await _driver(kind, tmp_path / f"{at}.db")) for at, kind in enumerate((main, beside, beside), start=1)
    ]
    yield Stores(*drivers)
    for driver in drivers:
        await driver.close()


async def _fill(db: Persistence, agent_id: str) -> None:
    await db.agents.create(id=agent_id)
    session = await db.sessions.create(agent_id=agent_id)
    await db.messages.append(session.id, kvpersist.Message(role="user", content="hello"))
    await db.todos.save(agent_id, [Todo(title="one")])
    await db.snapshots.create(agent_id=agent_id, session_id=session.id, last_safe_point=0)
    await db.windows.create(HistoryWindow(agent_id=agent_id, id="w"))
    await db.compressions.create(agent_id=agent_id, id="c", window_id="w")
    await db.recovered_files.create(RecoveredFile(agent_id=agent_id, path="/a.py", content="x"))
    await db.media.replace_all(agent_id, [Media(agent_id=agent_id, key=str(n), provider="p") for n in range(3)])
    await db.events.publish(agent_id, {"n": 1}, cursor="c-1")


# -- what is where -----------------------------------------------------------------------------


async def test_each_concept_is_in_its_store(stores: Stores) -> None:
    async with stores.open() as db:
        await _fill(db, "a")
        main, files, events = await stores.keys()

        assert {key.partition(":")[2].partition(":")[0].partition("#")[0] for key in files} == set(_PLACED)
        assert {key.partition(":")[2].partition(":")[0].partition("#")[0] for key in events} == {"event", "event_mark"}
        assert not [key for key in main if any(f":{name}" in key for name in (*_PLACED, "event"))]
        assert (await db.todos.get("a")).todos[0].title == "one"
        assert [media.key for media in await db.media.of("a")] == ["0", "1", "2"]
        assert [window.id for window in await db.windows.find(agent_id="a")] == ["w"]
        assert [entry.event for entry in await db.events.read("a")] == [{"n": 1}]
        assert list(db.placement.stores) == ["main", "files", "events"]
        assert db.placement.store_of("todos") is db.placement.files
        assert db.placement.store_of("sessions") is db.store
        assert db.events.store is db.placement.events


async def test_without_other_stores_everything_is_in_one() -> None:
    async with kvpersist.open("memory://", events={"retention": 60}) as db:
        assert db.placement.stores == {"main": db.store}
        assert db.events.store is db.store


async def test_urls_open_stores_and_closing_closes_them(tmp_path: Path) -> None:
    db = await kvpersist.open(
        f"sqlite:///{tmp_path}/m.db",
        files=f"file://{tmp_path}/files",
        events={"url": f"sqlite:///{tmp_path}/e.db", "retention": 60, "durability": "normal"},
    )
    await _fill(db, "a")
    every = list(db.placement.stores.values())
    assert len(every) == 3

    await db.close()
    await db.close()

    for store in every:
        with pytest.raises(kvpersist.KvError, match="closed"):
            await store.get("app:x")
    async with kvpersist.open(
        f"sqlite:///{tmp_path}/m.db", files=f"{tmp_path}/files/", events=f"sqlite:///{tmp_path}/e.db"
    ) as db:
        assert (await db.todos.get("a")).version == 1
        assert len(await db.events.read("a")) == 1


async def test_stores_that_are_open_already_stay_open() -> None:
    async with kvpersist.open_store("memory://") as files, kvpersist.open_store("memory://") as events:
        for given in (events, {"store": events, "retention": 60}):
            async with kvpersist.open("memory://", files=files, events=given) as db:
                assert db.placement.files is files
                assert db.events.store is events
        await files.put("app:x", 1)
        await events.put("app:x", 1)


async def test_a_mapping_names_the_other_stores_too(tmp_path: Path) -> None:
    where = {"url": "memory://", "files": {"type": "memory"}, "events": {"type": "memory", "retention": 60}}

    async with kvpersist.open(where) as db:
        assert len(db.placement.stores) == 3
    async with kvpersist.open(where, events={"max_events": 5}) as db:  # settings beside the configured store
        assert len(db.placement.stores) == 3
    async with kvpersist.open_store(where) as store:
        assert store.where.startswith("memory://")


def test_what_events_say_is_a_store_or_settings_or_both() -> None:
    assert events_of(None) == (None, {})
    assert events_of({"retention": 5}) == (None, {"retention": 5})
    assert events_of("memory://x") == ("memory://x", {})
    assert events_of({"url": "memory://", "retention": 5, "timeout": 3}) == (
        {"url": "memory://", "timeout": 3},
        {"retention": 5},
    )
    assert events_of({"retention": 5}, "memory://x") == ("memory://x", {"retention": 5})
    assert events_of(None, {"url": "memory://", "retention": 5}) == ({"url": "memory://"}, {"retention": 5})
    for wrong in ({"retentoin": 5}, {"store": "memory://", "url": "memory://"}):
        with pytest.raises(BadOption):
            events_of(wrong)


async def test_when_another_store_cannot_be_opened_the_first_ones_are_closed(tmp_path: Path) -> None:
    opened: list[Any] = []
    real = Placement.close

    async def close(self: Placement) -> None:
        opened.extend(self.opened)
        await real(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Placement, "close", close)
        with pytest.raises(KvError):
            await kvpersist.open(f"sqlite:///{tmp_path}/m.db", files="memory://", events="nosuch://x")

    assert len(opened) == 2
    for store in opened:
        with pytest.raises(kvpersist.KvError, match="closed"):
            await store.get("app:x")


async def test_no_plain_write_can_come_between_the_records_of_any_store(stores: Stores) -> None:
    async with stores.open() as db:
        for store in db.placement.stores.values():
            with pytest.raises(KvError, match="namespace"):
                await store.put("kv:todo:a", 1)


# -- deletion ----------------------------------------------------------------------------------


async def test_deleting_an_agent_leaves_nothing_of_it_in_any_store(stores: Stores) -> None:
    async with stores.open() as db:
        await _fill(db, "other")
        before = await stores.keys()
        await _fill(db, "a")

        assert await db.agents.delete("a")

        assert await stores.keys() == before
        assert not await db.agents.delete("a")
        await _fill(db, "a")  # the id can be used again
        assert (await db.todos.get("a")).version == 1


@pytest.mark.parametrize("dies_in", ["files", "events"])
async def test_a_deletion_that_is_interrupted_is_finished_by_the_next_open(stores: Stores, dies_in: str) -> None:
    async with stores.open() as db:
        await _fill(db, "other")
        before = await stores.keys()
        await _fill(db, "a")
    dying: Watched = getattr(stores, dies_in)

    async def dies(_: Any) -> None:
        raise kvpersist.Unavailable("gone")

    async with stores.open() as db:
        dying.before_commit = dies
        with pytest.raises(kvpersist.Unavailable):
            await db.agents.delete("a")
        dying.before_commit = None
        assert await db.agents.get("a") is None
        assert await stores.keys() != before
        with pytest.raises(ParentGone):
            await db.media.create(Media(agent_id="a", key="late"))

    async with stores.open():
        assert await stores.keys() == before


async def test_a_late_writer_adds_nothing_to_a_deleted_agent(stores: Stores) -> None:
    async with stores.open() as db, stores.open() as other:
        await _fill(db, "other")
        before = await stores.keys()
        await _fill(db, "a")
        await other.todos.save("a", [Todo(title="knows the agent")])  # and keeps its birth key in mind
        await other.media.replace_all("a", [])

        async def deletes(batches: Sequence[Batch]) -> None:
            if any(":todo:" in op.key or ":media:" in op.key for batch in batches for op in batch.ops):
                stores.files.before_commit = None
                await db.agents.delete("a")

        for late in (
            lambda: other.todos.save("a", [Todo(title="late")]),
            lambda: other.media.replace_all("a", [Media(agent_id="a", key="k")]),
            lambda: other.media.create(Media(agent_id="a", key="k")),
        ):
            stores.files.before_commit = deletes
            with pytest.raises(ParentGone):
                await late()
            assert await stores.keys() == before
            await _fill(db, "a")
            await other.todos.save("a", [Todo(title="again")])
            await other.media.replace_all("a", [])


async def test_what_a_dead_late_writer_left_is_not_the_next_agents(stores: Stores) -> None:
    async with stores.open() as db:
        await _fill(db, "a")

        class _Dead(BaseException):
            pass

        async def deletes(batches: Sequence[Batch]) -> None:
            if any(":media:" in op.key for batch in batches for op in batch.ops):
                stores.files.before_commit = None
                await other.agents.delete("a")
                stores.main.before_commit = dies

        async def dies(_: Any) -> None:
            raise kvpersist.Unavailable("dead")

        async with stores.open() as other:
            stores.files.before_commit = deletes
            real = db._family.holds

            async def killed(_: Any) -> bool:
                raise _Dead  # between its write and its second look

            db._family.holds = killed  # type: ignore[method-assign]
            with pytest.raises(_Dead):
                await db.media.create(Media(agent_id="a", key="left"))
            db._family.holds = real  # type: ignore[method-assign]
            stores.main.before_commit = None

    async with stores.open() as db:
        await db.agents.create(id="a")
        assert await db.media.of("a") == []


async def test_an_agent_is_forked_with_what_is_in_other_stores(stores: Stores) -> None:
    async with stores.open() as db:
        if not hasattr(db.sessions, "fork"):
            pytest.skip("sessions cannot be forked")
        await _fill(db, "a")

        [fork] = await db.agents.fork("a")

        assert (await db.todos.get(fork.id)).todos[0].title == "one"
        assert len(await db.media.of(fork.id)) == 3
        assert len(await db.events.read(fork.id)) == 1


# -- batches -----------------------------------------------------------------------------------


async def test_a_batch_over_two_stores_is_refused_when_it_is_built(tmp_path: Path) -> None:
    places = {name: f"sqlite:///{tmp_path}/{name}.db" for name in ("main", "files")}
    async with kvpersist.open(places["main"], files=places["files"]) as db:
        await db.agents.create(id="a")

        with pytest.raises(Unsupported) as caught:
            async with db.atomic() as tx:
                tx.put("app:x", 1)
                await db.media.repository.put(Media(agent_id="a", key="k"), tx=tx)

        assert places["main"] in str(caught.value)
        assert places["files"] in str(caught.value)
        assert await db.store.get("app:x") is None
        assert await db.media.of("a") == []
