"""What belongs to a record goes with it, wherever a deletion is interrupted, and nothing is added to it afterwards."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

import kvpersist
from kvpersist import Confirmation, Image, Index, Message, ToolCallPart
from kvpersist.agents.births import Belongs, Family
from kvpersist.agents.children import Children
from kvpersist.agents.family import Parents, Records
from kvpersist.agents.persistence import Persistence
from kvpersist.driver import Batch, Put
from kvpersist.errors import BadRequest, ParentGone, Unencodable, UniqueConflict
from kvpersist.testing.faults import Crashed, FaultyDriver
from kvpersist_drivers.memory import MemoryDriver
from kvpersist_drivers.sqlite import SqliteDriver

Sound = Callable[[Persistence], Awaitable[None]]
ORDERED = {"atomic_batch", "reverse", "deref"}
both = pytest.mark.parametrize("without", [set[str](), ORDERED], ids=["memory", "ordered"])


async def furnish(db: Persistence, id_: str, sessions: int = 2) -> None:
    """A container with one of everything, and sessions with everything."""
    await db.containers.create(id=id_, name=f"n-{id_}")
    for n in range(2):
        await db.images.create(id=f"{id_}-i{n}", container_id=id_, name="same", parent_id="elsewhere")
    await db.prototypes.create(id=f"{id_}-p", container_id=id_)
    await db.providers.create(id=f"{id_}-v", container_id=id_, is_default=True, secret_ref="env:KEY")
    for n in range(sessions):
        session = f"{id_}-s{n}"
        await db.sessions.create(id=session, container_id=id_, image_id=f"{id_}-i{n % 2}", user_id="u")
        await db.messages.append_many(
            session,
            [Message("user", "q"), Message("assistant", tool_calls=[ToolCallPart("c", "t")]), Message("tool", "r")],
        )
        await db.confirmations.save(Confirmation(session_id=session, tool_name="rm"))
        await db.traces.create(name="run", session_id=session, id=f"{session}-t")
        await db.traces.create(name="call", session_id=session, parent_id=f"{session}-t", error="x")


async def space(driver: Any) -> dict[str, bytes]:
    """Every key but the marks of the store; tombstones are none."""
    found = await driver.scan(None, None, limit=100_000)
    return {
        entry.key: entry.value
        for entry in found
        if entry.value not in (b"", b"done") and not entry.key.startswith("kvpersist:") and "#def" not in entry.key
    }


async def copy_of(disk: MemoryDriver) -> MemoryDriver:
    """Another disk with the same entries, at the same versions."""
    other = MemoryDriver()
    found = await disk.scan(None, None, limit=100_000)
    await other.commit([Batch((Put(e.key, e.value, None, e.expires_at),), e.version) for e in found])
    return other


async def without_stale(db: Persistence) -> None:
    """Index entries that a crash left stale are readers' and fsck's to remove; nothing may be missing."""
    every = db._all
    for repository in (every.sessions, every.messages, every.tool_calls, *db._family.repositories.values()):
        assert all(damage.kind == "stale" for damage in await repository.verify(repair=True))


async def test_everything_of_a_container_goes_and_nothing_else(db: Persistence, driver: Any, sound: Sound) -> None:
    await furnish(db, "kept")
    await furnish(db, "c!")
    await db.sessions.create(id="free", user_id="u")
    before = await driver.everything()
    await furnish(db, "c", sessions=3)

    assert await db.containers.delete("c") is True
    assert await db.containers.delete("c") is False
    assert await db.containers.delete("nobody") is False

    assert await driver.everything() == before
    await sound(db)


async def test_a_container_of_hundreds_of_records_goes_whole(db: Persistence, driver: Any) -> None:
    before = await driver.everything()
    await db.containers.create(id="c")
    for n in range(250):
        await db.prototypes.create(id=f"p{n}", container_id="c")
    await db.sessions.create(id="s", container_id="c")
    for n in range(130):
        await db.traces.create(id=f"t{n}", name="x", session_id="s")

    assert await db.containers.delete("c")

    assert await driver.everything() == before


async def test_an_image_goes_alone(db: Persistence, sound: Sound) -> None:
    await furnish(db, "c")

    assert await db.images.delete("c-i0")

    session = await db.sessions.get("c-s0")
    assert session is not None
    assert session.image_id == "c-i0"
    assert await db.sessions.update("c-s0", lambda s: msgspec.structs.replace(s, title="t")) is not None
    assert await db.messages.append("c-s0", Message("user", "goes on"))
    await sound(db)


async def test_a_session_takes_its_confirmation_and_traces_along(db: Persistence, driver: Any, sound: Sound) -> None:
    await furnish(db, "c", sessions=1)
    await db.traces.create(id="free", name="x")
    before = await driver.everything()
    await db.sessions.create(id="s", container_id="c")
    await db.confirmations.save(Confirmation(session_id="s", tool_name="rm"))
    await db.traces.create(name="run", session_id="s")

    await db.sessions.delete("s")

    assert await driver.everything() == before
    await sound(db)


@both
async def test_a_deletion_killed_anywhere_is_finished_by_the_next_open(without: set[str], sound: Sound) -> None:
    full = MemoryDriver()
    async with kvpersist.open(FaultyDriver(full, without=without)) as db:
        await furnish(db, "kept", sessions=1)
        before = await space(full)
        await furnish(db, "c", sessions=1)
    for nth in range(1, 900):
        disk = await copy_of(full)
        dying = FaultyDriver(disk, without=without)
        victim = await kvpersist.open(dying)
        dying.crash(nth)
        with contextlib.suppress(Crashed):
            await victim.containers.delete("c")
        begun = any("container#deleting:c" in key for key in await space(disk))
        async with kvpersist.open(FaultyDriver(disk, without=without)) as again:
            if begun or await again.containers.get("c") is None:
                assert await again.containers.get("c") is None
                if without:
                    await without_stale(again)
                assert await space(disk) == before, f"killed before step {nth}"
            await sound(again)
        if not dying.crashed:
            return
    pytest.fail("the deletion never ends")


@both
async def test_a_deletion_killed_anywhere_is_finished_before_its_id_is_used_again(
    without: set[str], sound: Sound
) -> None:
    full = MemoryDriver()
    async with kvpersist.open(FaultyDriver(full, without=without)) as db:
        await furnish(db, "c", sessions=1)
    for nth in range(1, 900):
        disk = await copy_of(full)
        async with kvpersist.open(FaultyDriver(disk, without=without)) as db:
            dying = FaultyDriver(disk, without=without)
            victim = await kvpersist.open(dying)
            dying.crash(nth)
            with contextlib.suppress(Crashed):
                await victim.containers.delete("c")
            if any("container#deleting:c" in key for key in await space(disk)):
                await db.containers.create(id="c")
                assert await db.images.count() == await db.sessions.count() == await db.traces.count() == 0
                assert await db.providers.count() == await db.prototypes.count() == await db.confirmations.count() == 0
                await db.images.create(container_id="c")
                await sound(db)
        if not dying.crashed:
            return
    pytest.fail("the deletion never ends")


@both
async def test_a_creation_killed_anywhere_can_be_made_again(without: set[str], sound: Sound) -> None:
    for nth in range(1, 60):
        disk = MemoryDriver()
        async with kvpersist.open(FaultyDriver(disk, without=without)) as db:
            await db.containers.create(id="c")
            dying = FaultyDriver(disk, without=without)
            victim = await kvpersist.open(dying)
            dying.crash(nth)
            with contextlib.suppress(Crashed):
                await victim.images.create(id="i", container_id="c")
                await victim.traces.create(id="t", name="x")
            if await db.images.get("i") is None:
                await db.images.create(id="i", container_id="c")
            await db.images.save(Image(id="i", container_id="c", name="renamed"))
            assert [image.name for image in await db.images.find(container_id="c")] == ["renamed"]
            await sound(db)
        if not dying.crashed:
            return
    pytest.fail("the creation never ends")


@pytest.mark.parametrize("what", ["image", "session", "prototype", "provider", "moved"])
async def test_a_writer_held_up_during_a_deletion_adds_nothing(
    what: str, db: Persistence, driver: Any, sound: Sound
) -> None:
    await furnish(db, "kept", sessions=1)
    await db.sessions.create(id="free")
    before = await driver.everything()
    await furnish(db, "c", sessions=1)
    slow = FaultyDriver(driver)
    async with kvpersist.open(slow) as other:
        await other.containers.births.check("c")  # remembered
        await other.sessions.update("free", lambda s: s)
        before = {key: value for key, value in before.items() if "free" not in key}
        gate = slow.hold("commit")
        writes = {
            "image": lambda: other.images.create(container_id="c"),
            "session": lambda: other.sessions.create(container_id="c"),
            "prototype": lambda: other.prototypes.create(container_id="c"),
            "provider": lambda: other.providers.create(container_id="c", is_default=True),
            "moved": lambda: other.sessions.update("free", lambda s: msgspec.structs.replace(s, container_id="c")),
        }
        late = asyncio.create_task(writes[what]())
        await gate.reached()
        await db.containers.delete("c")
        gate.release()

        with pytest.raises(ParentGone) as gone:
            await late

    assert (gone.value.kind, gone.value.id) == ("container", "c")
    free = await db.sessions.get("free")
    assert free is not None and free.container_id is None
    await db.sessions.update("free", lambda s: s)
    left = {key: value for key, value in (await driver.everything()).items() if "free" not in key}
    assert left == before
    await sound(db)


@pytest.mark.parametrize("what", ["trace", "confirmation"])
async def test_a_writer_held_up_adds_nothing_to_a_deleted_session(
    what: str, db: Persistence, driver: Any, sound: Sound
) -> None:
    await db.sessions.create(id="kept")
    before = await driver.everything()
    await db.sessions.create(id="s")
    slow = FaultyDriver(driver)
    async with kvpersist.open(slow) as other:
        await other.traces.create(name="remembered", session_id="s")
        await other.confirmations.save(Confirmation(session_id="s", tool_name="a"))
        gate = slow.hold("commit")
        writes: dict[str, Callable[[], Any]] = {
            "trace": lambda: other.traces.create(name="late", session_id="s"),
            "confirmation": lambda: other.confirmations.save(Confirmation(session_id="s", tool_name="late")),
        }
        late = asyncio.create_task(writes[what]())
        await gate.reached()
        await db.sessions.delete("s")
        gate.release()

        with pytest.raises(ParentGone):
            await late

    if db.store.capabilities.atomic_batch == "none":
        await without_stale(db)
    assert await driver.everything() == before
    await sound(db)


async def test_writes_during_a_deletion_end_one_way_or_the_other(db: Persistence, driver: Any, sound: Sound) -> None:
    await furnish(db, "kept", sessions=1)
    before = await driver.everything()
    await furnish(db, "c")
    async with kvpersist.open(driver) as other:
        ends = await asyncio.gather(
            db.containers.delete("c"),
            other.containers.delete("c"),
            *(other.images.create(container_id="c", name=f"late {n}") for n in range(5)),
            *(other.sessions.create(container_id="c") for _ in range(5)),
            other.sessions.delete("c-s0"),
            other.traces.end("c-s0-t"),
            return_exceptions=True,
        )

    failures = [end for end in ends if isinstance(end, BaseException)]
    assert all(isinstance(end, ParentGone) for end in failures), failures
    assert await db.images.find(container_id="c") == await db.sessions.find(container_id="c") == []
    if db.store.capabilities.atomic_batch == "none":
        await without_stale(db)
    assert await driver.everything() == before
    await sound(db)


async def test_a_deletion_begun_by_a_process_that_died_is_not_seen_by_a_new_owner(
    db: Persistence, driver: Any, sound: Sound
) -> None:
    """The sweep of the old container must not reach what is put into a new one of its id."""
    await furnish(db, "c", sessions=1)
    slow = FaultyDriver(driver)
    async with kvpersist.open(slow) as other:
        gate = slow.hold("scan")
        sweep = asyncio.create_task(other.containers.delete("c"))
        await gate.reached()
        await db.containers.create(id="c")
        await furnish_again(db)
        gate.release()
        await sweep

    assert [image.id for image in await db.images.find(container_id="c")] == ["new"]
    assert [session.id for session in await db.sessions.find(container_id="c")] == ["new"]
    assert await db.sessions.count() == 1
    await sound(db)


async def furnish_again(db: Persistence) -> None:
    await db.images.create(id="new", container_id="c")
    await db.sessions.create(id="new", container_id="c")
    await db.prototypes.create(id="new", container_id="c")


async def test_a_container_is_gone_in_a_store_that_was_opened_before(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'a.db'}"
    async with kvpersist.open(url) as one, kvpersist.open(url) as two:
        await one.containers.create(id="c")
        await two.images.create(id="i", container_id="c")
        await one.containers.delete("c")

        with pytest.raises(ParentGone):
            await two.images.create(container_id="c")
        with pytest.raises(ParentGone):
            await two.sessions.create(image_id="i")
        await one.containers.create(id="c")
        assert await two.images.create(container_id="c")


async def test_a_session_must_name_what_is_there(db: Persistence, driver: Any) -> None:
    before = await driver.everything()

    for fields in ({"container_id": "c"}, {"image_id": "i"}):
        with pytest.raises(ParentGone):
            await db.sessions.create(id="s", **fields)

    assert await driver.everything() == before
    await db.sessions.create(id="s")
    with pytest.raises(ParentGone):
        await db.sessions.update("s", lambda s: msgspec.structs.replace(s, image_id="i"))
    session = await db.sessions.get("s")
    assert session is not None and session.image_id is None


async def test_a_creation_stopped_by_a_unique_value_leaves_nothing(driver: Any) -> None:
    async with kvpersist.open(driver, session_indexes=[Index("external_id", unique=True)]) as db:
        await db.sessions.create(id="a", external_id="x")
        before = await driver.everything()

        with pytest.raises(UniqueConflict, match="external_id"):
            await db.sessions.create(id="b", external_id="x")

        assert await driver.everything() == before


# ---- the mechanism by itself


class Agent(msgspec.Struct, kw_only=True, omit_defaults=True):
    id: str = ""
    name: str = ""


class Note(msgspec.Struct, kw_only=True, omit_defaults=True):
    agent_id: str
    position: int
    text: str = ""


class Run(msgspec.Struct, kw_only=True, omit_defaults=True):
    id: str = ""
    agent_id: str | None = None


class Kit:
    def __init__(self, db: Persistence) -> None:
        self.family: Family = db._family
        self.agents = Parents(self.family, Agent, name="my_agent")
        births = self.agents.births
        self.notes = Children(
            self.family, Note, name="note", key=("agent_id", "position"), parents=births, indexes=[Index("text")]
        )
        self.runs = Records(
            self.family,
            Run,
            name="run",
            indexes=[Index("agent_id")],
            belongs=[Belongs("agent_id", births, optional=True)],
        )


def notes(*texts: str) -> list[Note]:
    return [Note(agent_id="a", position=n, text=text) for n, text in enumerate(texts)]


@pytest.fixture
def kit(db: Persistence) -> Kit:
    return Kit(db)


async def test_all_records_below_a_parent_are_replaced(kit: Kit, driver: Any) -> None:
    await kit.agents.create(id="a")
    await kit.agents.create(id="a!b")
    await kit.notes.save(Note(agent_id="a!b", position=0, text="other"))

    await kit.notes.replace_all("a", notes("x", "y", "z"))
    await kit.notes.replace_all("a", notes("x", "changed"))

    assert [note.text for note in await kit.notes.of("a")] == ["x", "changed"]
    assert [note.text for note in await kit.notes.of("a", reverse=True, limit=1)] == ["changed"]
    assert await kit.notes.find(text="y") == await kit.notes.find(text="z") == []
    assert [note.text for note in await kit.notes.of("a!b")] == ["other"]


async def test_what_is_equal_is_not_written_again(kit: Kit, driver: Any) -> None:
    await kit.agents.create(id="a")
    many = notes(*map(str, range(400)))
    await kit.notes.replace_all("a", many)
    driver.clear()

    await kit.notes.replace_all("a", many)
    assert [batch for batch in driver.batches if batch.ops] == []

    many[7] = Note(agent_id="a", position=7, text="changed")
    await kit.notes.replace_all("a", many)
    written = [op.key for batch in driver.batches for op in batch.ops if ":note:" in op.key]
    assert len(set(written)) == 1


async def test_two_replacements_at_once_do_not_mix(kit: Kit, driver: Any) -> None:
    if not kit.family.atomic:
        pytest.skip("batches are not atomic here")
    await kit.agents.create(id="a")
    one = [Note(agent_id="a", position=n, text="one") for n in range(3)]
    two = [Note(agent_id="a", position=n, text="two") for n in range(5, 9)]

    for _ in range(5):
        await asyncio.gather(kit.notes.replace_all("a", one), kit.notes.replace_all("a", two))
        assert await kit.notes.of("a") in (one, two)


async def test_a_replacement_that_cannot_be_kept_changes_nothing(kit: Kit, driver: Any) -> None:
    await kit.agents.create(id="a")
    await kit.notes.replace_all("a", notes("x"))
    before = await driver.everything()

    with pytest.raises(BadRequest, match="does not belong"):
        await kit.notes.replace_all("a", [*notes("y"), Note(agent_id="b", position=1)])
    with pytest.raises(BadRequest, match="two items"):
        await kit.notes.replace_all("a", [*notes("y"), *notes("z")])
    with pytest.raises(Unencodable):
        await kit.notes.replace_all("a", [*notes("y"), Note(agent_id="a", position=1, text=7)])  # pyright: ignore[reportArgumentType]
    with pytest.raises(ParentGone):
        await kit.notes.replace_all("b", [])

    assert await driver.everything() == before


async def test_records_below_a_parent_go_with_it(kit: Kit, driver: Any) -> None:
    before = await driver.everything()
    await kit.agents.create(id="a")
    await kit.notes.replace_all("a", notes(*map(str, range(250))))
    await kit.runs.create(id="r", agent_id="a")

    await kit.agents.delete("a")

    assert await driver.everything() == before
    with pytest.raises(ParentGone, match="my_agent 'a'"):
        await kit.notes.save(Note(agent_id="a", position=1))
    assert await kit.notes.delete_all("a") == 0


async def test_all_records_below_a_parent_can_be_removed(kit: Kit) -> None:
    await kit.agents.create(id="a")
    await kit.notes.replace_all("a", notes("x", "y"))

    assert await kit.notes.delete_all("a") == 2
    assert await kit.notes.of("a") == []


@both
async def test_a_replacement_killed_anywhere_is_whole_or_can_be_made_again(without: set[str]) -> None:
    for nth in range(1, 60):
        disk = MemoryDriver()
        async with kvpersist.open(FaultyDriver(disk, without=without)) as db:
            kit = Kit(db)
            await kit.agents.create(id="a")
            await kit.notes.replace_all("a", notes("x", "y", "z"))
            dying = FaultyDriver(disk, without=without)
            victim = Kit(await kvpersist.open(dying))
            dying.crash(nth)
            with contextlib.suppress(Crashed):
                await victim.notes.replace_all("a", notes("1", "y"))
            found = [note.text for note in await kit.notes.of("a")]
            if not without:
                assert found in (["x", "y", "z"], ["1", "y"])
            await kit.notes.replace_all("a", notes("1", "y"))
            assert [note.text for note in await kit.notes.of("a")] == ["1", "y"]
            assert all(damage.kind == "stale" for damage in await kit.notes.repository.verify())
        if not dying.crashed:
            return
    pytest.fail("the replacement never ends")


async def test_a_name_without_a_record_is_a_label_until_there_is_one(kit: Kit, driver: Any) -> None:
    await kit.runs.create(id="before", agent_id="a")
    await kit.agents.create(id="a")
    await kit.runs.create(id="after", agent_id="a")

    await kit.agents.delete("a")

    assert await kit.runs.find(agent_id="a") == []
    await kit.runs.create(id="again", agent_id="a")
    assert [run.id for run in await kit.runs.find(agent_id="a")] == ["again"]


async def test_a_label_written_while_its_record_is_deleted_is_one_again(db: Persistence, driver: Any) -> None:
    kit = Kit(db)
    await kit.agents.create(id="a")
    slow = FaultyDriver(driver)
    async with kvpersist.open(slow) as other_db:
        other = Kit(other_db)
        await other.runs.create(id="first", agent_id="a")
        gate = slow.hold("commit")
        late = asyncio.create_task(other.runs.create(id="late", agent_id="a"))
        await gate.reached()
        await kit.agents.delete("a")
        gate.release()
        await late

    assert [run.id for run in await kit.runs.find(agent_id="a")] == ["late"]


async def test_a_damaged_record_does_not_keep_a_deletion_from_ending(db: Persistence, driver: Any) -> None:
    await furnish(db, "kept", sessions=1)
    before = await driver.everything()
    await furnish(db, "c", sessions=1)
    for key in [key for key in await driver.everything() if key.endswith((":c-i0", ":c-p", ":c-v", ":c-s0-t"))]:
        if "#" not in key:
            await db.store._commit([Put(key, b"damaged")])

    assert await db.containers.delete("c")

    if db.store.capabilities.atomic_batch == "none":
        await without_stale(db)
    assert await driver.everything() == before


async def test_what_belonged_to_a_record_before_there_was_an_index_goes_with_it(db: Persistence) -> None:
    old = kvpersist.Repository(db.store, Run, name="run")
    for n in range(130):
        await old.put(Run(id=f"r{n}", agent_id="a" if n % 2 else "b"))
    kit = Kit(db)
    await kit.agents.create(id="a")

    await kit.agents.delete("a")

    assert {run.agent_id async for run in kit.runs.iterate()} == {"b"}
    assert await kit.runs.count() == 65


async def test_a_cascade_of_ones_own_is_asked_with_the_id(kit: Kit) -> None:
    seen: list[str] = []

    async def cascade(id_: str, guard: Any) -> None:
        seen.append(id_)

    kit.agents.births.also(cascade)
    await kit.agents.create(id="50% ä!")

    await kit.agents.delete("50% ä!")

    assert seen == ["50% ä!"]


async def test_a_record_in_place_of_another_keeps_when_it_was_made(db: Persistence) -> None:
    made = await db.containers.create(id="c", name="a")
    saved = await db.containers.save(kvpersist.Container(id="c", name="b"))

    assert saved.created_at == made.created_at
    assert saved.updated_at is not None and made.updated_at is not None and saved.updated_at >= made.updated_at
    assert await db.containers.get("c") == saved


@pytest.mark.parametrize("path", ["sqlite"])
async def test_many_creators_of_one_id_leave_one(path: str, tmp_path: Path) -> None:
    options = SqliteDriver.Options(path=str(tmp_path / "a.db"), durability="normal")
    driver = await SqliteDriver.open(options)
    async with kvpersist.open(driver) as one, kvpersist.open(driver) as two:
        ends = await asyncio.gather(
            *(db.containers.create(id="c", name=str(n)) for n in range(4) for db in (one, two)),
            return_exceptions=True,
        )
        assert sum(not isinstance(end, BaseException) for end in ends) == 1
        assert all(isinstance(end, UniqueConflict) for end in ends if isinstance(end, BaseException))
        await asyncio.gather(
            *(db.containers.save(kvpersist.Container(id="d", name=str(n))) for n in range(4) for db in (one, two))
        )
        assert await one.containers.count() == 2
    await driver.close()
