"""What does not fit together is found, what fits is not told, and nothing is changed."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import msgspec
import pytest

import kvpersist
from kvpersist import keys
from kvpersist.agents.births import Births
from kvpersist.agents.checking import Consistency
from kvpersist.agents.persistence import Persistence
from kvpersist.agents.state.history import HistoryWindow
from kvpersist.agents.state.media import Media
from kvpersist.agents.state.todos import Todo
from kvpersist.driver import Delete, Put
from kvpersist.errors import BadRequest
from kvpersist.testing import ManualClock

Sound = Callable[[Persistence], Awaitable[None]]


@pytest.fixture
async def filled(db: Persistence) -> Persistence:
    """Agent ``a`` with its state; container ``c`` with image ``i``; sessions ``s`` (of all three) and ``t``."""
    await db.agents.create(id="a")
    await db.containers.create(id="c")
    await db.images.create(id="i", container_id="c")
    for id_ in ("s", "t"):
        session = await db.sessions.create(
            id=id_, user_id="u", agent_id="a" if id_ == "s" else "a free label", container_id="c", image_id="i"
        )
        part = kvpersist.ToolCallPart(id="call", name="look", arguments={})
        await db.messages.append_many(
            session.id,
            [
                kvpersist.Message(role="user", content="hello"),
                kvpersist.Message(role="assistant", content=None, tool_calls=[part, part]),
                kvpersist.Message(role="tool", content="found", tool_call_id="call"),
            ],
        )
    await db.todos.save("a", [Todo(title="one")])
    await db.snapshots.create(agent_id="a", session_id="s", last_safe_point=0)
    await db.windows.create(HistoryWindow(agent_id="a", id="w"))
    await db.compressions.create(agent_id="a", id="k", window_id="w")
    await db.media.create(Media(agent_id="a", key="m"))
    return db


def _told(found: Consistency) -> list[tuple[str, str, str]]:
    return [(issue.kind, issue.collection, issue.id) for issue in found.issues]


async def _everything(db: Persistence) -> list[tuple[str, bytes]]:
    return [(entry.key, entry.version) for entry in await db.store._scan(None, None, limit=100_000)]


async def _raw_delete(db: Persistence, *keys_: str) -> None:
    for key in keys_:
        await db.store._commit([Delete(key)])


async def test_what_fits_together_has_no_issues_and_stays_as_it_is(filled: Persistence) -> None:
    before = await _everything(filled)

    every = await filled.check()
    of_agent = await filled.check(agent_id="a")
    of_session = await filled.check(session_id="s")

    for found in (every, of_agent, of_session):
        assert found.issues == []
        assert found.consistent and found.complete
    assert every.records > of_agent.records > of_session.records >= 6
    assert await _everything(filled) == before


async def test_a_count_that_is_wrong_is_told(filled: Persistence) -> None:
    every = filled._all
    key = every.message_prefix + "s!" + keys.encode(1)
    await _raw_delete(filled, key)

    for found in (await filled.check(), await filled.check(session_id="s"), await filled.check(agent_id="a")):
        assert not found.consistent
        assert ("count", "session", "s") in _told(found)
        assert any("messages: 3 kept, 2 there" in issue.detail for issue in found.issues)
    assert (await filled.check(session_id="t")).issues == []


async def test_a_missing_index_entry_is_told(filled: Persistence) -> None:
    [entry] = await filled.store._scan(f"{filled.namespace}:session#user_id", None, limit=1)
    await _raw_delete(filled, entry.key)

    found = await filled.check()

    [issue] = found.issues
    assert (issue.kind, issue.collection, issue.store) == ("index", "session", "main")
    assert "missing in index" in issue.detail
    assert not found.consistent


async def test_a_damaged_record_is_told(filled: Persistence) -> None:
    key = filled._all.message_prefix + "s!" + keys.encode(1)
    await filled.store._commit([Put(key, b"no frame")])

    for found in (await filled.check(), await filled.check(session_id="s")):
        assert ("corrupt", "message", "s, " + keys.unescape(keys.encode(1))) in _told(found)
        assert not found.consistent


async def test_records_whose_parent_is_gone_are_told(filled: Persistence) -> None:
    await _raw_delete(filled, filled._family.births["agent"].prefix + "a")
    await _raw_delete(filled, filled._family.births["container"].prefix + "c")

    found = await filled.check()

    assert not found.consistent
    told = set(_told(found))
    assert {
        ("orphan", "agent", "a"),
        ("orphan", "todo", "a"),
        ("orphan", "media", "a, m"),
        ("orphan", "container", "c"),
        ("orphan", "image", "i"),
        ("orphan", "session", "s"),
        ("orphan", "session", "t"),
    } <= told
    assert {("orphan", "todo", "a"), ("orphan", "agent", "a")} <= set(_told(await filled.check(agent_id="a")))


async def test_names_that_name_nothing_are_told_and_are_no_damage(filled: Persistence) -> None:
    assert await filled.images.delete("i")
    assert await filled.windows.delete(("a", "w"))
    assert await filled.sessions.delete("s")

    found = await filled.check()

    assert sorted(_told(found)) == [
        ("reference", "compression", "a, k"),
        ("reference", "session", "t"),
        ("reference", "snapshot", "a, sfp-0"),
    ]
    assert found.consistent
    assert any("image_id names the image 'i'" in issue.detail for issue in found.issues)


async def test_what_was_interrupted_is_told(filled: Persistence) -> None:
    births = filled._family.births
    await filled.store._commit([Put(births["session"].deleting_prefix + "x", b"1")])
    await filled.store._commit([Put(births["agent"].prefix + "y", b"1")])

    found = await filled.check()

    assert sorted(_told(found)) == [("unfinished", "agent", "y"), ("unfinished", "session", "x")]


async def test_what_is_not_there_is_told(filled: Persistence) -> None:
    assert _told(await filled.check(session_id="nosuch")) == [("missing", "session", "nosuch")]
    assert _told(await filled.check(agent_id="nosuch")) == [("missing", "agent", "nosuch")]
    assert (await filled.check(agent_id="a free label")).issues[0].kind == "missing"


async def test_as_many_issues_as_asked_for_end_the_check(filled: Persistence) -> None:
    for n in range(20):
        await filled.store._commit([Put(filled._family.births["agent"].prefix + f"y{n}", b"1")])

    found = await filled.check(limit=5)

    assert len(found.issues) == 5
    assert not found.complete and not found.consistent
    for wrong in ({"limit": 0}, {"agent_id": "a", "session_id": "s"}):
        with pytest.raises(BadRequest):
            await filled.check(**wrong)  # type: ignore[arg-type]


async def test_the_files_store_is_checked_against_the_main_one() -> None:
    async with kvpersist.open("memory://", files="memory://", events="memory://") as db:
        await db.agents.create(id="a")
        await db.media.create(Media(agent_id="a", key="m"))
        await db.windows.create(HistoryWindow(agent_id="a", id="w"))
        await db.compressions.create(agent_id="a", id="k", window_id="w")
        assert (await db.check()).issues == []

        await db.placement.files._commit([Delete(db.windows.repository._prefix + "a!w")])
        await db.store._commit([Delete(db._family.births["agent"].prefix + "a")])
        found = await db.check(agent_id="a")

    told = [(issue.kind, issue.store, issue.collection) for issue in found.issues]
    assert ("orphan", "files", "media") in told
    assert ("reference", "main", "compression") in told
    assert ("index", "files", "window") not in told  # stale entries are looked for in a whole check


async def test_memory_is_bounded_by_pages(db: Persistence) -> None:
    session = await db.sessions.create(id="s")
    for _ in range(3):
        await db.messages.append_many(session.id, [kvpersist.Message(role="user", content=str(n)) for n in range(250)])

    found = await db.check(session_id="s")

    assert found.issues == []
    assert found.records == 751


# -- what is under way, and what was left ---------------------------------------------------------


@pytest.fixture
async def late(driver: Any) -> AsyncIterator[tuple[Persistence, ManualClock]]:
    """A database with a clock that can be moved."""
    clock = ManualClock()
    async with kvpersist.open(driver, clock=clock) as db:
        yield db, clock


async def _half_a_fork(db: Persistence, monkeypatch: pytest.MonkeyPatch, check: Callable[[], Awaitable[None]]) -> None:
    """Fork a session with 1,010 messages; ``check`` is called when only its record is missing."""
    await db.sessions.create(id="s")
    await db.messages.append_many("s", [kvpersist.Message(role="user", content="x") for _ in range(1_010)])
    bear = Births.bear

    async def checked(self: Births, part: str, *arguments: Any) -> Any:
        await check()
        return await bear(self, part, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Births, "bear", checked)
        await db.sessions.fork("s", id="f")


async def test_a_fork_under_way_elsewhere_is_no_orphan_and_one_given_up_is_told(
    late: tuple[Persistence, ManualClock], driver: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    db, clock = late

    async def seen() -> None:
        async with kvpersist.open(driver, clock=clock) as other:
            assert (await other.check()).issues == []
            assert _told(await other.check(session_id="f")) == [("missing", "session", "f")]
            clock.advance(601)
            assert _told(await other.check(limit=3)) == [("unfinished", "session", "f")]

    await _half_a_fork(db, monkeypatch, seen)

    assert (await db.check()).issues == []


async def test_a_fork_that_was_given_up_is_removed_by_a_check_that_repairs(
    late: tuple[Persistence, ManualClock], driver: Any, monkeypatch: pytest.MonkeyPatch, sound: Sound
) -> None:
    db, clock = late

    async def dies() -> None:
        clock.advance(601)
        found = await db.check(repair=True)
        assert found.issues == []
        raise LookupError

    with pytest.raises(LookupError):
        await _half_a_fork(db, monkeypatch, dies)

    assert await db._all.messages.count() == 1_010
    await sound(db)


async def test_calls_of_every_state_are_compared_with_the_counts(filled: Persistence) -> None:
    call = await filled._all.tool_calls.get(("s", 2, 0))
    assert call is not None and call.state == "pending"
    raw = filled._all.tool_calls
    key = raw._prefix + raw._pk(("s", 2, 0))
    changed = msgspec.structs.replace(call, state="executing")
    await filled.store._commit([Put(key, raw._codec.encode(key, changed))])

    found = await filled.check(session_id="s")

    assert ("count", "session", "s") in _told(found)
    assert any("'pending': 1" in issue.detail and "'executing': 1" in issue.detail for issue in found.issues)


@pytest.mark.parametrize("written", [1, 2])
async def test_what_an_early_death_of_a_creation_left_is_told_and_removed_when_nobody_can_be_at_it(
    late: tuple[Persistence, ManualClock], backend: str, monkeypatch: pytest.MonkeyPatch, sound: Sound, written: int
) -> None:
    if backend != "ordered":
        pytest.skip("there a creation is one batch")
    db, clock = late
    await db.sessions.create(id="other")
    before = {entry.key for entry in await db.store._scan(None, None, limit=1_000)}
    commit, left = type(db.store)._commit, written

    async def dies(self: Any, ops: Any) -> bytes:
        nonlocal left
        left -= 1
        if left < 0:
            raise LookupError
        return await commit(self, ops)

    with monkeypatch.context() as patch:
        patch.setattr(type(db.store), "_commit", dies)
        with pytest.raises(LookupError):
            await db.sessions.create(id="s")

    assert (await db.check(repair=True)).issues == []  # as far as is known it is under way
    assert db._all.birth_prefix + "s" in {entry.key for entry in await db.store._scan(None, None, limit=1_000)}
    clock.advance(601)
    assert _told(await db.check()) == [("unfinished", "session", "s")]
    assert (await db.check(repair=True)).issues == []
    assert {entry.key for entry in await db.store._scan(None, None, limit=1_000)} == before
    await db.sessions.create(id="s")
    await sound(db)


@pytest.mark.parametrize("before", [0, 1, 2])
async def test_a_creation_that_was_taken_for_left_over_comes_through_all_the_same(
    late: tuple[Persistence, ManualClock], backend: str, monkeypatch: pytest.MonkeyPatch, sound: Sound, before: int
) -> None:
    if backend != "ordered":
        pytest.skip("there a creation is one batch")
    db, clock = late
    await db.sessions.create(id="other")
    commit, calls = type(db.store)._commit, 0

    async def slow(self: Any, ops: Any) -> bytes:
        nonlocal calls
        calls += 1
        if calls == before + 1:
            clock.advance(601)
            await db.check(repair=True)
        return await commit(self, ops)

    with monkeypatch.context() as patch:
        patch.setattr(type(db.store), "_commit", slow)
        await db.sessions.create(id="s")

    await db.messages.append("s", kvpersist.Message(role="user", content="x"))
    assert (await db.check()).issues == []
    await sound(db)


async def test_a_birth_key_that_is_about_to_be_removed_is_taken_back_by_a_creation_that_comes_through(
    late: tuple[Persistence, ManualClock], backend: str, monkeypatch: pytest.MonkeyPatch, sound: Sound
) -> None:
    if backend != "ordered":
        pytest.skip("there a creation is one batch")
    db, _ = late
    await db.sessions.create(id="other")
    birth_key, commit = db._all.birth_prefix + "s", type(db.store)._commit

    async def claimed(self: Any, ops: Any) -> bytes:
        if any(op.key == db._all.session_prefix + "s" for op in ops):
            [birth] = await self._entries([birth_key])
            await commit(self, [Put(birth_key, b"", birth.version)])
        return await commit(self, ops)

    with monkeypatch.context() as patch:
        patch.setattr(type(db.store), "_commit", claimed)
        await db.sessions.create(id="s")

    [birth] = await db.store._entries([birth_key])
    assert birth is not None and birth.value != b""
    await db.messages.append("s", kvpersist.Message(role="user", content="x"))
    await sound(db)
