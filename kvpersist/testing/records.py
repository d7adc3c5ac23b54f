"""What an agent's records must do over every driver, as pytest tests that a test class inherits.

    class TestRecordsInCabinet(PersistenceContract[CabinetDriver]):
        @pytest.fixture
        async def driver(self) -> AsyncIterator[CabinetDriver]:
            driver = await CabinetDriver.open(CabinetOptions(url=...))
            yield driver
            await driver.close()

        async def reopen(self, driver: CabinetDriver) -> CabinetDriver:
            return await CabinetDriver.open(...)  # optional: the same place again

Fixture and ``reopen`` are those of `kvpersist.testing.DriverContract`. Every test ends by comparing all
indexes and counts with the records. A driver that does not claim ordered scans and conditional writes
keeps no records; it must refuse them. Needs pytest and pytest-asyncio.
"""

from __future__ import annotations

import asyncio
import time
from abc import ABC
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime, timedelta
from typing import Any, ClassVar, Final, Generic, TypeVar

import msgspec
import pytest

import kvpersist
from kvpersist import Index, Message, Persistence, Session, ToolCallPart, between
from kvpersist.driver import Driver, Entry
from kvpersist.errors import CommitUnknown, Conflict, KvError, ParentGone, UniqueConflict, Unsupported
from kvpersist.testing.contract import AWKWARD_KEYS
from kvpersist.testing.faults import FaultyDriver

__all__ = ["PersistenceContract"]

D = TypeVar("D", bound=Driver)

_INDEXES: Final[dict[str, Any]] = {
    "session_indexes": [Index("external_id", unique=True), Index("agent_id")],
    "message_indexes": [Index("role", order_by="created_at")],
}
_TOMBSTONES: Final = (b"", b"done")
_MONTH: Final = 31 * 86_400.0  # seconds; tombstones live for 30 days
_AWKWARD: Final = [key for key in AWKWARD_KEYS if len(key.encode()) <= 32]


class PersistenceContract(ABC, Generic[D]):
    """Inherit, override the fixture ``driver`` (and ``reopen`` where data outlives the driver), and run pytest."""

    __test__: ClassVar[bool] = False
    pytestmark = pytest.mark.asyncio

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.__test__ = cls.__dict__.get("__test__", True)

    @pytest.fixture
    def driver(self) -> D:
        """Override: an open driver on an empty store, closed afterwards."""
        raise NotImplementedError(f"{type(self).__name__} must override the fixture 'driver'")

    async def reopen(self, driver: D) -> D:
        """Open the place of ``driver``, which is closed by now, once more."""
        pytest.skip("keeps nothing after it is closed")

    # -- what is written is read ---------------------------------------------------------------

    async def test_a_driver_that_cannot_keep_records_refuses_them(self, driver: D) -> None:
        able = driver.capabilities
        if able.ordered and able.conditional:
            pytest.skip("can keep records")

        with pytest.raises(Unsupported):
            await kvpersist.open(driver)

    async def test_a_turn_comes_back_as_it_was_written(self, driver: D) -> None:
        async with _opened(driver) as db:
            session = await db.sessions.create(
                user_id="ada", title="Späte Fracht 🚚", metadata={"n": [1, None, b"\x00"]}
            )
            written = await db.messages.append_many(session.id, _turn("a"))

            assert await db.sessions.get(session.id) == msgspec.structs.replace(
                session, updated_at=written[-1].created_at
            )
            assert [message.number for message in written] == [1, 2, 3, 4, 5]
            assert await db.messages.range(session.id) == written
            assert await db.messages.last(session.id, 2) == written[3:]
            assert [await db.messages.at(session.id, number) for number in (1, 5, 6)] == [written[0], written[4], None]
            assert [await db.messages.get(message.id) for message in written] == written
            assert [_content(message) for message in written] == [_content(message) for message in _turn("a")]

    async def test_calls_get_their_results_and_are_found_by_name_and_state(self, driver: D) -> None:
        async with _opened(driver) as db:
            for name in ("a", "b"):
                await db.sessions.create(id=name)
                await db.messages.append_many(name, _turn(name))
            async with db.tool_calls.record("a", "measure", {"of": "depth"}) as call:
                call.result = 3.5

            calls = await db.tool_calls.of("a")
            assert [(call.name, call.state, call.result) for call in calls] == [
                ("track", "completed", "in Rotterdam"),
                ("weigh", "failed", "no scale"),
                ("wait", "pending", None),
                ("measure", "completed", 3.5),
            ]
            assert await db.tool_calls.get("a", 2, 1) == calls[1]
            assert sorted(call.session_id for call in await db.tool_calls.find(name="weigh")) == ["a", "b"]
            assert await db.tool_calls.find(is_error=True) == await db.tool_calls.find(name="weigh")
            assert [await db.tool_calls.count(state=s) for s in ("pending", "completed", "failed")] == [2, 3, 2]

    async def test_a_timeline_joins_messages_calls_and_results(self, driver: D) -> None:
        async with _opened(driver) as db:
            await db.sessions.create(id="a")
            written = await db.messages.append_many("a", _turn("a"))

            timeline = await db.timeline("a")

            assert [item.message for item in timeline] == written
            assert [[call.name for call in item.tool_calls] for item in timeline] == [
                *([], ["track", "weigh", "wait"], [], [], [])
            ]
            assert [item.answers and item.answers.name for item in timeline] == [None, None, "track", "weigh", None]

    async def test_a_long_session_is_read_in_pages_without_loss_or_repeat(self, driver: D) -> None:
        async with _opened(driver) as db:
            await db.sessions.create(id="a")
            for at in range(0, 300, 100):
                await db.messages.append_many("a", [Message("user", n) for n in range(at, at + 100)])

            assert [message.content async for message in db.messages.iterate("a")] == list(range(300))
            assert [message.number for message in await db.messages.last("a", 5)] == [296, 297, 298, 299, 300]
            page = await db.messages.range("a", after=100, before=141, limit=50)
            assert [message.number for message in page] == list(range(101, 141))

    # -- finding -------------------------------------------------------------------------------

    async def test_sessions_are_found_by_index_newest_first(self, driver: D) -> None:
        start = datetime(2026, 1, 1, tzinfo=UTC)
        async with _opened(driver) as db:
            for n in range(12):
                await db.sessions.create(
                    id=f"s{n:02}", user_id="ada" if n % 3 else "bob", created_at=start + timedelta(seconds=n * 7 % 12)
                )
            newest = sorted((f"s{n:02}" for n in range(12)), key=lambda id_: -(int(id_[1:]) * 7 % 12))
            adas = [id_ for id_ in newest if int(id_[1:]) % 3]

            assert [session.id for session in await db.sessions.list()] == newest
            assert [session.id for session in await db.sessions.find(user_id="ada")] == adas
            first = await db.sessions.page(user_id="ada", limit=5)
            rest = await db.sessions.page(user_id="ada", limit=5, after=first.cursor)
            assert [session.id for session in (*first.items, *rest.items)] == adas
            assert (await db.sessions.count(user_id="ada"), await db.sessions.count()) == (8, 12)
            assert await db.sessions.find(user_id="nobody") == []

    async def test_queries_answer_in_either_direction_page_by_page(self, driver: D) -> None:
        start = datetime(2026, 1, 1, tzinfo=UTC)
        async with _opened(driver) as db:
            for n in range(4):
                at = start + timedelta(minutes=n)
                await db.sessions.create(
                    id=f"s{n}", agent_id="a", template_id=f"i{n % 2}", created_at=at, title=f"T{n}"
                )
                turn = [msgspec.structs.replace(message, created_at=at) for message in _turn(f"s{n}")]
                await db.messages.append_many(f"s{n}", turn)
            await db.messages.append("s0", Message("user", "late", created_at=start + timedelta(days=1)))
            window = between(start + timedelta(minutes=1), start + timedelta(minutes=2))

            queries: list[tuple[Any, dict[str, Any], list[str]]] = [
                (db.sessions, {"agent_id": "a", "order": "created_at"}, ["s0", "s1", "s2", "s3"]),
                (db.sessions, {"template_id": "i1"}, ["s3", "s1"]),
                (db.sessions, {"created": window}, ["s2", "s1"]),
                (db.sessions, {"order": "-updated_at"}, ["s0", "s3", "s2", "s1"]),
                (db.sessions, {"order": "updated_at"}, ["s1", "s2", "s3", "s0"]),
                (db.sessions, {"id_prefix": "s", "order": "-id"}, ["s3", "s2", "s1", "s0"]),
                (db.sessions, {"agent_id": "a", "title": "t2"}, ["s2"]),
                (db.tool_calls, {"name": "weigh"}, ["s3", "s2", "s1", "s0"]),
                (db.tool_calls, {"success": True, "order": "asc"}, ["s0", "s1", "s2", "s3"]),
                (db.tool_calls, {"session_id": "s1", "state": "pending"}, ["s1"]),
                (db.tool_calls, {"created": window, "order": "asc"}, ["s1"] * 3 + ["s2"] * 3),
                (db.messages, {"agent_id": "a", "has_tool_calls": True}, ["s3", "s2", "s1", "s0"]),
                (db.messages, {"agent_id": "a", "text": "scale", "order": "asc"}, ["s0", "s1", "s2", "s3"]),
                (db.messages, {"role": "user", "order": "desc"}, ["s0", "s3", "s2", "s1", "s0"]),
                (db.messages, {"session_id": "s0", "order": "desc", "content_type": "tool_use"}, ["s0"]),
            ]
            for repository, where, expected in queries:
                paged: list[Any] = []
                cursor: str | None = None
                while True:
                    page = await repository.page(limit=2, after=cursor, **where)
                    paged += page.items
                    cursor = page.cursor
                    if cursor is None:
                        break
                assert [getattr(each, "session_id", None) or each.id for each in paged] == expected, where
                assert await repository.find(**where) == [each async for each in repository.iterate(**where)] == paged
            assert [m.number for m in await db.messages.find("s0", order="desc", limit=3)] == [6, 5, 4]
            assert (await db.stats(agent_id="a")).messages == 21

    async def test_messages_are_found_across_sessions_by_an_index_of_their_own(self, driver: D) -> None:
        async with _opened(driver) as db:
            for name in ("a", "b"):
                await db.sessions.create(id=name)
                await db.messages.append_many(name, _turn(name))

            found = await db.messages.find(role="tool")

            assert [(message.session_id, message.number) for message in found] == [
                ("a", 3),
                ("a", 4),
                ("b", 3),
                ("b", 4),
            ]
            assert [message.session_id for message in await db.messages.search("SCALE", session_id="b")] == ["b"]

    async def test_an_index_follows_its_record(self, driver: D) -> None:
        async with _opened(driver) as db:
            await db.sessions.create(id="a", agent_id="one", external_id="x")
            written = await db.messages.append_many("a", _turn("a"))

            await db.sessions.update("a", lambda s: msgspec.structs.replace(s, agent_id="two", external_id="y"))
            await db.messages.update(written[4].id, lambda m: msgspec.structs.replace(m, content="corrected"))
            await db.messages.delete(written[0].id)

            assert await db.sessions.find(agent_id="one") == []
            assert [session.id for session in await db.sessions.find(agent_id="two")] == ["a"]
            await db.sessions.create(id="b", external_id="x")
            assert await db.messages.find(role="user") == []
            assert await db.messages.get(written[0].id) is None
            assert [message.content for message in await db.messages.last("a", 1)] == ["corrected"]

    async def test_counts_are_those_of_what_is_there(self, driver: D) -> None:
        async with _opened(driver) as db:
            for name in ("a", "b"):
                await db.sessions.create(id=name)
                await db.messages.append_many(name, _turn(name))
            [asking] = [message for message in await db.messages.range("b") if message.tool_calls]
            await db.messages.delete(asking.id)

            stats, stat = await db.stats(), await db.sessions.stat("a")

            assert (stats.sessions, stats.messages, stats.tool_calls, stats.tool_errors) == (2, 9, 3, 1)
            assert stats.messages_by_role == {"user": 2, "assistant": 3, "tool": 4}
            assert stats.tool_calls_by_state == {"completed": 1, "failed": 1, "pending": 1}
            assert stat is not None
            assert (stat.last, stat.messages, stat.tool_calls) == (5, 5, 3)

    async def test_awkward_ids_and_index_values_stay_apart(self, driver: D) -> None:
        async with _opened(driver) as db:
            for position, name in enumerate(_AWKWARD):
                await db.sessions.create(id=name, user_id=name)
                if position % 8 == 0:
                    await db.messages.append(name, Message("user", name))

            assert {session.id async for session in db.sessions.iterate()} == set(_AWKWARD)
            for position, name in enumerate(_AWKWARD):
                assert [session.id for session in await db.sessions.find(user_id=name)] == [name]
                if position % 8 == 0:
                    assert [message.content for message in await db.messages.range(name)] == [name]

    async def test_namespaces_do_not_see_each_other(self, driver: D) -> None:
        spaces = ["kv", "KV", "kv2", "a:b", "a", "../x", "%3A"]
        for name in spaces:
            async with _opened(driver, namespace=name) as db:
                await db.sessions.create(id="same", title=name)
                await db.messages.append("same", Message("user", name))
        async with _opened(driver, namespace=spaces[0]) as db:
            await db.sessions.delete("same")

        for name in spaces[1:]:
            async with _opened(driver, namespace=name) as db:
                assert [session.title for session in await db.sessions.list()] == [name]
                assert [message.content for message in await db.messages.range("same")] == [name]

    # -- several at once -----------------------------------------------------------------------

    async def test_concurrent_appends_are_numbered_without_a_gap(self, driver: D) -> None:
        async with _opened(driver) as db, kvpersist.open(driver, **_INDEXES) as other:
            await db.sessions.create(id="a")

            written = await asyncio.gather(
                *(
                    (db, other)[n % 2].messages.append_many("a", [Message("user", n), Message("user", n)])
                    for n in range(16)
                )
            )

            kept = [message async for message in db.messages.iterate("a")]
            assert [message.number for message in kept] == list(range(1, 33))
            assert sorted((m.number, m.content) for turn in written for m in turn) == [
                (message.number, message.content) for message in kept
            ]
            for first, second in written:  # a turn is not torn apart
                assert second.number == first.number + 1

    async def test_no_edit_of_many_is_lost(self, driver: D) -> None:
        def counted(session: Session) -> Session:
            return msgspec.structs.replace(session, metadata={"n": session.metadata.get("n", 0) + 1})

        slow = FaultyDriver(driver)
        async with _opened(driver) as db, kvpersist.open(slow, **_INDEXES) as other:
            await db.sessions.create(id="a")
            await other.sessions.update("a", counted)
            gate = slow.hold("commit")
            late = asyncio.ensure_future(other.sessions.update("a", counted))
            await gate.reached()
            await db.sessions.update("a", counted)
            gate.release()
            await late

            await asyncio.gather(*((db, other)[n % 2].sessions.update("a", counted) for n in range(7)))

            session = await db.sessions.get("a")
            assert session is not None
            assert session.metadata == {"n": 10}

    async def test_a_version_that_was_replaced_is_a_conflict(self, driver: D) -> None:
        slow = FaultyDriver(driver)
        async with _opened(driver) as db, kvpersist.open(slow, **_INDEXES) as other:
            notes, late = (each.repository(_Note, name="note", indexes=[Index("topic")]) for each in (db, other))
            await notes.put(_Note("a", "sea"))
            seen = await late.get_versioned("a")
            assert seen is not None
            gate = slow.hold("commit")
            held = asyncio.ensure_future(late.put(_Note("a", "late"), expect=seen.version))
            await gate.reached()
            await notes.put(_Note("a", "sky"))
            gate.release()

            with pytest.raises(Conflict):
                await held
            with pytest.raises(Conflict):
                await notes.put(_Note("a", "stale"), expect=seen.version)

            assert await notes.find(topic="sky") == [_Note("a", "sky")]
            for topic in ("sea", "late", "stale"):
                assert await notes.find(topic=topic) == []
            assert _unexpected(db, await notes.verify()) == []

    async def test_a_unique_value_has_one_owner(self, driver: D) -> None:
        async with _opened(driver) as db, kvpersist.open(driver, **_INDEXES) as other:
            answers = await asyncio.gather(
                *((db, other)[n % 2].sessions.create(id=f"s{n}", external_id="x") for n in range(8)),
                return_exceptions=True,
            )

            [owner] = [answer for answer in answers if isinstance(answer, Session)]
            assert all(isinstance(answer, Session | UniqueConflict) for answer in answers), answers
            assert [session.id for session in await db.sessions.find(external_id="x")] == [owner.id]

    async def test_a_write_whose_answer_was_lost_is_done_once(self, driver: D) -> None:
        faulty = FaultyDriver(driver)
        async with _opened(faulty) as db:
            await db.sessions.create(id="a")
            await db.messages.append("a", Message("user", "first"))
            faulty.fail("commit", 1, effect=True)

            with suppress(CommitUnknown):
                await db.messages.append("a", Message("user", "second"))

            contents = [message.content for message in await db.messages.range("a")]
            assert contents == ["first", "second"]
            assert (await db.messages.append("a", Message("user", "third"))).number == 3

    # -- deletion ------------------------------------------------------------------------------

    async def test_delete_leaves_no_key_of_it(self, driver: D) -> None:
        async with _opened(driver) as db:
            for name in ("kept", "kept!"):
                await db.sessions.create(id=name, user_id="ada", external_id=name)
                await db.messages.append_many(name, _turn(name))
            before = await _everything(driver)
            await db.sessions.create(id="kept!1", user_id="ada", agent_id="one", external_id="gone")
            for n in range(30):
                await db.messages.append_many("kept!1", _turn(f"m{n}"))

            assert await db.sessions.delete("kept!1") is True

            left = {key: entry for key, entry in (await _everything(driver)).items() if key not in before}
            if driver.capabilities.atomic_batch != "none":
                assert left == {}
            for entry in left.values():  # while late writers may come, something has to refuse them
                assert entry.value in _TOMBSTONES, entry
                assert entry.expires_at is not None, entry
                assert entry.expires_at < await _now(driver) + _MONTH, entry
            assert {key: entry.value for key, entry in before.items()} == {
                key: entry.value for key, entry in (await _everything(driver)).items() if key not in left
            }
            assert await db.sessions.delete("kept!1") is False

    async def test_what_was_deleted_does_not_come_back_and_its_id_can_be_used_again(self, driver: D) -> None:
        async with _opened(driver) as db, kvpersist.open(driver, **_INDEXES) as other:
            await db.sessions.create(id="a", external_id="x")
            await other.messages.append_many("a", _turn("a"))
            await db.sessions.delete("a")

            with pytest.raises(ParentGone):
                await other.messages.append("a", Message("user", "late"))
            assert await db.sessions.get("a") is None
            assert await other.messages.range("a") == await other.tool_calls.of("a") == []

            await db.sessions.create(id="a", external_id="x")
            assert (await db.messages.append("a", Message("user", "new"))).content == "new"
            assert [message.content for message in await db.messages.range("a")] == ["new"]

    async def test_a_deletion_that_was_interrupted_is_finished_by_the_next_open(self, driver: D) -> None:
        stopping = FaultyDriver(driver)
        async with _opened(stopping) as db:
            await db.sessions.create(id="kept")
            await db.messages.append("kept", Message("user", "stays"))
        async with kvpersist.open(stopping, **_INDEXES) as db:
            await db.sessions.create(id="a")
            for n in range(25):
                await db.messages.append_many("a", _turn(f"m{n}"))
            stopping.fail("commit", 3, persistent=True)
            with pytest.raises(KvError):
                await db.sessions.delete("a")
            stopping.heal()

        async with _opened(driver) as db:
            assert [session.id for session in await db.sessions.list()] == ["kept"]
            assert [key for key, entry in (await _everything(driver)).items() if _lives(entry) and "!m" in key] == []
            assert (await db.stats()).messages == 1

    async def test_a_container_takes_along_what_belongs_to_it(self, driver: D) -> None:
        async with _opened(driver) as db, kvpersist.open(driver, **_INDEXES) as other:
            await db.containers.create(id="kept")
            await db.images.create(id="kept", container_id="kept")
            before = await _everything(driver)
            await db.containers.create(id="c")
            for n in range(3):
                await db.images.create(id=f"i{n}", container_id="c", name="same")
                await db.prototypes.create(container_id="c")
                await db.providers.create(container_id="c", is_default=True, secret_ref="env:KEY")  # noqa: S106
            assert [each.is_default for each in await db.providers.find(container_id="c")].count(True) == 1
            await other.sessions.create(id="s", container_id="c", image_id="i0")
            await other.messages.append_many("s", _turn("a"))
            await other.confirmations.save(kvpersist.Confirmation(session_id="s", tool_name="rm"))
            trace = await other.traces.start("run", session_id="s")
            await other.traces.end(trace.id, output=0)

            assert await db.containers.delete("c")

            for write in (
                other.images.create(container_id="c"),
                other.providers.create(container_id="c", is_default=True),
                other.sessions.create(container_id="c"),
                other.traces.create(name="late", session_id="s"),
                other.confirmations.save(kvpersist.Confirmation(session_id="s", tool_name="late")),
            ):
                with pytest.raises(ParentGone):
                    await write
            for repository in db._family.repositories.values():  # where batches are not atomic, entries may be stale
                await repository.verify(repair=True)
            left = {key for key, entry in (await _everything(driver)).items() if _lives(entry)}
            assert {key for key in left - before.keys() if "#def" not in key} == set()
            assert await db.containers.delete("c") is False
            await db.containers.create(id="c")
            await other.images.create(id="i0", container_id="c")
            assert [image.id for image in await db.images.find(container_id="c")] == ["i0"]

    # -- life ----------------------------------------------------------------------------------

    async def test_records_are_there_after_a_reopen(self, driver: D) -> None:
        async with _opened(driver) as db:
            await db.sessions.create(id="a", user_id="ada")
            written = await db.messages.append_many("a", _turn("a"))
            calls = await db.tool_calls.of("a")
        await driver.close()

        again = await self.reopen(driver)
        try:
            async with _opened(again) as db:
                assert await db.messages.range("a") == written
                assert await db.tool_calls.of("a") == calls
                assert [session.id for session in await db.sessions.find(user_id="ada")] == ["a"]
                assert (await db.messages.append("a", Message("user", "more"))).number == 6
        finally:
            await again.close()


# -- helpers -----------------------------------------------------------------------------------


class _Note(msgspec.Struct):
    id: str
    topic: str


@asynccontextmanager
async def _opened(driver: Driver, namespace: str = "kv") -> AsyncIterator[Persistence]:
    """Records over ``driver``; at the end indexes and counts are compared with them."""
    able = driver.capabilities
    if not (able.ordered and able.conditional):
        pytest.skip("cannot keep records, and says so")
    async with kvpersist.open(driver, namespace=namespace, **_INDEXES) as db:
        yield db
        await _sound(db)


async def _sound(db: Persistence) -> None:
    every = db._all
    repositories: list[Any] = [every.sessions, every.messages, every.tool_calls, *db._family.repositories.values()]
    for repository in repositories:
        assert _unexpected(db, await repository.verify()) == []
    messages = Counter([message.session_id async for message in every.messages.iterate()])
    calls = Counter([call.session_id async for call in every.tool_calls.iterate()])
    alive = {session.id async for session in db.sessions.iterate()}
    assert {session.id for session in await db.sessions.recent(limit=10_000)} == alive
    assert messages.keys() | calls.keys() <= alive
    for id_ in messages.keys() | calls.keys():
        stat = await db.sessions.stat(id_)
        assert stat is not None
        assert (stat.messages, stat.tool_calls) == (messages[id_], calls[id_])


def _unexpected(db: Persistence, found: list[Any]) -> list[Any]:
    """Without atomic batches an index entry may be stale, never missing."""
    stale = db.store.capabilities.atomic_batch == "none"
    return [damage for damage in found if not (stale and damage.kind == "stale")]


def _turn(name: str) -> list[Message]:
    asked = [ToolCallPart(f"{name}1", "track", {"id": 7}), ToolCallPart(f"{name}2", "weigh"), ToolCallPart("c", "wait")]
    return [
        Message("user", "Where is my parcel?", metadata={"topic": "parcel"}),
        Message("assistant", None, tool_calls=asked),
        Message("tool", "in Rotterdam", tool_call_id=f"{name}1"),
        Message("tool", "no scale", tool_call_id=f"{name}2", is_error=True),
        Message("assistant", [{"type": "text", "text": "In Rotterdam. \u202e\x00"}, {"type": "blob", "data": b"\xff"}]),
    ]


def _content(message: Message) -> tuple[Any, ...]:
    return (message.role, message.content, message.tool_calls, message.tool_call_id, message.metadata)


def _lives(entry: Entry) -> bool:
    return entry.value not in _TOMBSTONES


async def _everything(driver: Driver) -> dict[str, Entry]:
    """Every key there is, read from the driver in pages."""
    found: dict[str, Entry] = {}
    start: str | None = None
    while page := await driver.scan(start, None, limit=500):
        found.update((entry.key, entry) for entry in page)
        start = page[-1].key + "\x00"
    return found


async def _now(driver: Any) -> float:
    return await driver.now() if hasattr(driver, "now") else time.time()
