"""Repositories over a backend with atomic batches, and over one that applies them operation by operation."""

import asyncio
import enum
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any, TypedDict
from uuid import UUID

import msgspec
import pytest

from kvpersist.driver import ABSENT, Put
from kvpersist.errors import (
    BadCursor,
    BadKey,
    BadRequest,
    Conflict,
    CorruptRecord,
    KeyTooLong,
    NoIndex,
    PartlyDone,
    ReservedNamespace,
    Unencodable,
    UniqueConflict,
    Unsupported,
)
from kvpersist.index import Index, at_least, at_most, between
from kvpersist.opening import open_store
from kvpersist.repository import Page, Repository
from kvpersist.store import Store
from kvpersist.testing import FaultyDriver, ManualClock
from kvpersist_drivers.memory import MemoryDriver

DAY = datetime(2024, 5, 1, tzinfo=UTC)


class User(msgspec.Struct, kw_only=True):
    id: str
    team: str = "t"
    email: str | None = None
    joined: datetime = DAY
    tags: list[str] = []
    meta: dict[str, Any] = {}


INDEXES = [
    Index("team", order_by="-joined"),
    Index("email", unique=True),
    Index("tags", multi=True),
    Index("meta.score", type=float),
]


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture(params=["atomic", "ordered"])
async def store(request: pytest.FixtureRequest, clock: ManualClock) -> AsyncIterator[Store]:
    driver: Any = MemoryDriver()
    if request.param == "ordered":
        driver = FaultyDriver(driver, without={"atomic_batch", "deref"})
    async with open_store(driver, clock=clock) as store:
        yield store


@pytest.fixture
async def atomic(clock: ManualClock) -> AsyncIterator[Store]:
    async with open_store(MemoryDriver(), clock=clock) as store:
        yield store


@pytest.fixture
def users(store: Store) -> Repository[User]:
    return Repository(store, User, name="user", indexes=INDEXES)


def ids(found: list[User]) -> list[str]:
    return [user.id for user in found]


# ---- one record


async def test_a_record_comes_back_as_it_was_put(users: Repository[User]) -> None:
    user = User(id="ann", email="ann@x", tags=["a", "b"], meta={"n": 2**70, "at": DAY, "raw": b"\0"})
    await users.put(user)

    assert await users.get("ann") == user
    assert await users.get("bob") is None
    assert await users.exists("ann")
    assert not await users.exists("bob")


async def test_get_many_answers_in_the_order_asked_with_none_for_the_absent(users: Repository[User]) -> None:
    await users.put_many([User(id="a"), User(id="b")])

    found = await users.get_many(["b", "x", "a", "b"])

    assert [user.id if user else None for user in found] == ["b", None, "a", "b"]
    assert await users.get_many([]) == []


async def test_insert_refuses_what_is_there_and_changes_nothing(users: Repository[User]) -> None:
    await users.insert(User(id="ann", team="a"))

    with pytest.raises(Conflict):
        await users.insert(User(id="ann", team="b"))

    assert ids(await users.find(team="a")) == ["ann"]
    assert await users.find(team="b") == []
    assert await users.verify() == []


async def test_put_with_a_version_writes_only_over_that_version(users: Repository[User]) -> None:
    version = await users.put(User(id="ann"))
    await users.put(User(id="ann", team="b"), expect=version)

    with pytest.raises(Conflict):
        await users.put(User(id="ann", team="c"), expect=version)
    with pytest.raises(Conflict):
        await users.put(User(id="new"), expect=version)

    versioned = await users.get_versioned("ann")
    assert versioned is not None
    assert versioned.value.team == "b"
    assert versioned.version != version
    assert await users.get_versioned("new") is None


async def test_update_changes_the_record_and_its_indexes_and_keeps_its_expiry(
    users: Repository[User], clock: ManualClock
) -> None:
    await users.put(User(id="ann", team="a"), ttl=100)
    changed = await users.update("ann", lambda user: msgspec.structs.replace(user, team="b"))

    assert changed is not None
    assert changed.team == "b"
    assert await users.find(team="a") == []
    assert ids(await users.find(team="b")) == ["ann"]
    assert await users.update("nobody", lambda user: user) is None
    clock.advance(101)
    assert await users.get("ann") is None
    assert await users.find(team="b") == []


async def test_update_refuses_to_change_the_key(users: Repository[User]) -> None:
    await users.put(User(id="ann"))

    with pytest.raises(BadRequest, match="changed its key"):
        await users.update("ann", lambda user: msgspec.structs.replace(user, id="bob"))

    assert await users.get("bob") is None


async def test_concurrent_updates_of_one_record_are_all_kept(users: Repository[User]) -> None:
    await users.put(User(id="ann", meta={"score": 0}))

    def more(user: User) -> User:
        return msgspec.structs.replace(user, meta={"score": user.meta["score"] + 1})

    await asyncio.gather(*(users.update("ann", more) for _ in range(12)))

    assert (await users.first(**{"meta.score": 12.0})) is not None
    assert await users.verify() == []


async def test_concurrent_puts_leave_the_index_as_the_last_one_has_it(users: Repository[User]) -> None:
    await asyncio.gather(*(users.put(User(id="ann", team=f"t{n}", tags=[f"g{n}"])) for n in range(12)))

    last = await users.get("ann")

    assert last is not None
    for n in range(12):
        assert ids(await users.find(team=f"t{n}")) == (["ann"] if last.team == f"t{n}" else [])
    assert await users.verify(repair=True) is not None
    assert await users.verify() == []


async def test_delete_removes_the_record_from_every_index(users: Repository[User]) -> None:
    await users.put(User(id="ann", email="e", tags=["a", "b"], meta={"score": 1}))

    assert await users.delete("ann")
    assert not await users.delete("ann")

    assert await users.get("ann") is None
    assert await users.find(email="e") == []
    assert await users.find(tags="a") == []
    assert await users.count() == 0
    await users.insert(User(id="ann", email="e"))
    assert ids(await users.find(email="e")) == ["ann"]
    assert await users.verify() == []


async def test_delete_with_a_version_removes_only_that_version(users: Repository[User]) -> None:
    version = await users.put(User(id="ann"))
    newer = await users.put(User(id="ann", team="b"))

    with pytest.raises(Conflict):
        await users.delete("ann", expect=version)

    assert await users.delete("ann", expect=newer)
    with pytest.raises(Conflict):
        await users.delete("ann", expect=newer)


# ---- unique values


async def test_a_unique_value_has_one_owner(users: Repository[User]) -> None:
    await users.put(User(id="ann", email="e"))

    with pytest.raises(UniqueConflict) as caught:
        await users.put(User(id="bob", email="e"))

    assert (caught.value.index, caught.value.value, caught.value.holder) == ("email", "e", "ann")
    assert await users.get("bob") is None
    with pytest.raises(UniqueConflict):
        await users.insert(User(id="bob", email="e"))
    await users.put(User(id="bob", email="f"))
    with pytest.raises(UniqueConflict):
        await users.update("bob", lambda user: msgspec.structs.replace(user, email="e"))
    assert await users.verify() == []


async def test_of_concurrent_claims_of_one_value_one_wins(users: Repository[User]) -> None:
    outcomes = await asyncio.gather(
        *(users.insert(User(id=f"u{n}", email="e")) for n in range(8)), return_exceptions=True
    )

    assert sum(isinstance(outcome, bytes) for outcome in outcomes) == 1
    assert all(isinstance(outcome, (bytes, UniqueConflict)) for outcome in outcomes)
    assert len(await users.find(email="e")) == 1
    assert await users.count() == 1


async def test_a_unique_value_is_free_again_after_change_delete_and_expiry(
    users: Repository[User], clock: ManualClock
) -> None:
    await users.put(User(id="a", email="1"))
    await users.put(User(id="a", email="2"))
    await users.put(User(id="b", email="1"))
    await users.delete("b")
    await users.put(User(id="c", email="1"), ttl=100)
    clock.advance(101)
    await users.put(User(id="d", email="1"))

    assert ids(await users.find(email="1")) == ["d"]
    assert ids(await users.find(email="2")) == ["a"]
    assert {damage.kind for damage in await users.verify()} <= {"stale"}


async def test_two_records_may_exchange_nothing_but_one_after_the_other(users: Repository[User]) -> None:
    await users.put_many([User(id="a", email="1"), User(id="b", email="2")])
    await users.put(User(id="a", email="3"))
    await users.put(User(id="b", email="1"))
    await users.put(User(id="a", email="2"))

    assert ids(await users.find(email="1")) == ["b"]
    assert ids(await users.find(email="2")) == ["a"]
    assert await users.find(email="3") == []


# ---- many records


async def test_put_many_writes_more_than_one_batch_and_the_last_of_equal_keys_counts(users: Repository[User]) -> None:
    records = [User(id=f"{n:03}", team="many", email=f"e{n}") for n in range(130)]
    versions = await users.put_many([*records, User(id="000", team="last")])

    assert len(versions) == 131
    assert versions[0] == versions[-1]
    assert await users.count(team="many") == 129
    assert ids(await users.find(team="last")) == ["000"]
    assert await users.put_many([]) == []
    assert await users.verify() == []


async def test_put_many_names_those_that_failed_and_writes_the_others(users: Repository[User]) -> None:
    await users.put(User(id="holder", email="e"))

    with pytest.raises(PartlyDone) as caught:
        await users.put_many([User(id="a", email="1"), User(id="b", email="e"), User(id="c", email="1")])

    assert caught.value.done == 1
    assert sorted(caught.value.failed) == ["kv:user:b", "kv:user:c"]
    assert all(isinstance(error, UniqueConflict) for error in caught.value.failed.values())
    assert ids(await users.find(email="1")) == ["a"]
    assert await users.verify() == []


async def test_put_many_hands_a_unique_value_from_one_record_to_another(atomic: Store) -> None:
    users = Repository(atomic, User, name="user", indexes=INDEXES)
    await users.put_many([User(id="a", email="1"), User(id="b", email="2")])

    await users.put_many([User(id="a", email="2"), User(id="b", email="1")])

    assert ids(await users.find(email="1")) == ["b"]
    assert ids(await users.find(email="2")) == ["a"]
    assert await users.verify() == []


async def test_put_many_does_not_take_a_value_from_a_record_that_keeps_it(users: Repository[User]) -> None:
    await users.put(User(id="b", email="1"), ttl=100)

    with pytest.raises(PartlyDone) as caught:
        await users.put_many([User(id="a", email="1"), User(id="b", email="1")])

    assert list(caught.value.failed) == ["kv:user:a"]
    assert ids(await users.find(email="1")) == ["b"]
    assert await users.verify() == []


async def test_put_many_writes_nothing_when_a_record_cannot_be_kept(users: Repository[User]) -> None:
    with pytest.raises((Unencodable, PartlyDone)):
        await users.put_many([User(id="a", meta={"score": "high"}), User(id="b", meta={"score": object()})])

    assert await users.count() == 0


async def test_delete_many_counts_those_there_were(users: Repository[User]) -> None:
    await users.put_many([User(id=str(n), tags=["x"]) for n in range(40)])

    assert await users.delete_many([*map(str, range(30)), "0", "nobody"]) == 30
    assert await users.count(tags="x") == 10
    assert await users.verify() == []


# ---- queries


async def test_find_answers_in_the_order_of_the_index(users: Repository[User]) -> None:
    for n in (3, 1, 2):
        await users.put(User(id=f"u{n}", team="a", joined=DAY + timedelta(days=n)))
    await users.put(User(id="other", team="b"))

    assert ids(await users.find(team="a")) == ["u3", "u2", "u1"]
    assert ids(await users.find(team="a", limit=2)) == ["u3", "u2"]
    assert ids(await users.find(team="a", joined=between(DAY + timedelta(days=1), DAY + timedelta(days=2)))) == [
        "u2",
        "u1",
    ]
    assert ids(await users.find(team="a", joined=at_least(DAY + timedelta(days=3)))) == ["u3"]
    assert ids(await users.find(team="a", joined=at_most(DAY + timedelta(days=1)))) == ["u1"]
    assert ids(await users.find(team="a", joined=DAY + timedelta(days=2))) == ["u2"]
    assert (await users.first(team="a")) == await users.get("u3")
    assert await users.first(team="none") is None


async def test_a_collection_is_found_by_each_of_its_elements(users: Repository[User]) -> None:
    await users.put_many([User(id="a", tags=["x", "y", "x"]), User(id="b", tags=["y"]), User(id="c", tags=[])])

    assert ids(await users.find(tags="y")) == ["a", "b"]
    assert ids(await users.find(tags="x")) == ["a"]
    assert await users.count(tags="x") == 1
    with pytest.raises(NoIndex):
        await users.find(tags=at_least("a"))


async def test_free_form_data_is_found_by_its_path_and_refused_when_of_another_type(users: Repository[User]) -> None:
    await users.put(User(id="a", meta={"score": 2}))
    await users.put(User(id="b", meta={"score": 2.5}))
    await users.put(User(id="c", meta={}))

    assert ids(await users.find(**{"meta.score": 2})) == ["a"]
    assert ids(await users.find(**{"meta.score": between(2, 3)})) == ["a", "b"]
    with pytest.raises(Unencodable, match=r"meta\.score"):
        await users.put(User(id="d", meta={"score": "high"}))
    assert await users.get("d") is None


async def test_none_is_not_in_an_index_and_cannot_be_asked_for(users: Repository[User]) -> None:
    await users.put(User(id="a"))

    assert await users.find(email="None") == []
    with pytest.raises(BadRequest, match="email=None"):
        await users.find(email=None)


async def test_a_query_without_an_index_names_those_there_are(users: Repository[User]) -> None:
    with pytest.raises(NoIndex, match=r"joined.*team_by_joined_desc.*email"):
        await users.find(joined=DAY)
    with pytest.raises(NoIndex):
        await users.find(team="a", email="b")
    with pytest.raises(NoIndex):
        await users.count(nobody=1)


async def test_a_value_of_another_type_is_refused(users: Repository[User]) -> None:
    with pytest.raises(BadRequest, match="indexed as str"):
        await users.find(team=1)
    with pytest.raises(BadRequest, match="zone"):
        await users.find(team="a", joined=DAY.replace(tzinfo=None))
    with pytest.raises(BadRequest, match="limit=0"):
        await users.find(team="a", limit=0)


async def test_pages_join_to_what_find_returns(users: Repository[User]) -> None:
    await users.put_many([User(id=f"{n:02}", team="a", joined=DAY + timedelta(hours=n // 3)) for n in range(23)])
    expected = await users.find(team="a")

    seen: list[User] = []
    cursor = None
    while True:
        page: Page[User] = await users.page(team="a", limit=5, after=cursor)
        seen += page.items
        cursor = page.cursor
        if cursor is None:
            break
        assert len(page.items) == 5

    assert seen == expected
    exact = await users.page(team="a", limit=23)
    assert exact.cursor is None


async def test_a_cursor_stays_valid_while_records_come_and_go(users: Repository[User]) -> None:
    await users.put_many([User(id=f"{n}", tags=["x"]) for n in range(6)])
    first = await users.page(tags="x", limit=3)
    await users.delete("2")
    await users.delete("3")
    await users.put(User(id="35", tags=["x"]))

    assert ids((await users.page(tags="x", limit=9, after=first.cursor)).items) == ["35", "4", "5"]


async def test_a_cursor_of_another_query_is_refused(users: Repository[User]) -> None:
    await users.put_many([User(id=f"{n}", team="a", tags=["x", "y"]) for n in range(4)])
    cursor = (await users.page(tags="x", limit=2)).cursor
    assert cursor is not None

    for foreign in (cursor[:-2], "", "garbage!", "AAAA", cursor + "AAAA"):
        if foreign == cursor + "AAAA":
            continue
        with pytest.raises(BadCursor):
            await users.page(tags="x", limit=2, after=foreign)
    with pytest.raises(BadCursor):
        await users.page(tags="y", limit=2, after=cursor)
    with pytest.raises(BadCursor):
        await users.page(team="a", limit=2, after=cursor)
    with pytest.raises(BadCursor):
        await users.page(limit=2, after=cursor)


async def test_iterate_yields_everything_beyond_one_page(users: Repository[User]) -> None:
    await users.put_many([User(id=f"{n:03}", team="a") for n in range(230)])

    assert len([user async for user in users.iterate(team="a")]) == 230
    assert [user.id async for user in users.iterate()] == [f"{n:03}" for n in range(230)]
    assert await users.count(team="a") == 230
    assert await users.count() == 230


async def test_without_conditions_the_ordered_index_decides_and_else_the_key(store: Store) -> None:
    plain = Repository(store, User, name="plain")
    timed = Repository(store, User, name="timed", indexes=[Index(order_by="-joined")])
    records = [User(id="b", joined=DAY), User(id="a", joined=DAY + timedelta(1)), User(id="c", joined=DAY)]
    await plain.put_many(records)
    await timed.put_many(records)

    assert ids(await plain.find()) == ["a", "b", "c"]
    assert ids(await timed.find(limit=2)) == ["a", "b"]
    assert ids(await timed.find(joined=at_most(DAY))) == ["b", "c"]
    page = await timed.page(limit=1)
    assert ids((await timed.page(limit=5, after=page.cursor)).items) == ["b", "c"]


async def test_long_values_that_share_their_beginning_are_told_apart(store: Store) -> None:
    repo = Repository(store, User, name="long", indexes=[Index("team"), Index("email", unique=True)])
    long = "x" * 400
    await repo.put_many([User(id="a", team=long + "1", email=long + "1"), User(id="b", team=long + "2")])
    await repo.put(User(id="c", team="x" * 115, email="y"))

    assert ids(await repo.find(team=long + "2")) == ["b"]
    assert ids(await repo.find(email=long + "1")) == ["a"]
    assert await repo.count(team=long + "1") == 1
    assert sorted(ids(await repo.find(team=between(long + "0", long + "1")))) == ["a"]
    assert sorted(ids(await repo.find(team=at_least("x" * 116)))) == ["a", "b"]
    assert ids(await repo.find(team=at_most("x" * 120))) == ["c"]
    with pytest.raises(UniqueConflict):
        await repo.put(User(id="d", email=long + "1"))


# ---- keys and types


async def test_ids_with_every_kind_of_character_survive(users: Repository[User]) -> None:
    awkward = ["", " ", "!", "a!b", "a:b", "a/b", "%", "#def", "\0", "é", "😀", "~", "a\nb", "{}", "*", "\uffff"]
    await users.put_many([User(id=each, team="a:!", tags=[each]) for each in awkward])

    for each in awkward:
        assert ids(await users.find(tags=each)) == [each]
        found = await users.get(each)
        assert found is not None
        assert found.id == each
    assert sorted(ids(await users.find(team="a:!"))) == sorted(awkward)
    assert await users.verify() == []


async def test_an_id_over_the_limit_is_refused(users: Repository[User]) -> None:
    await users.put(User(id="x" * 160))
    with pytest.raises(KeyTooLong):
        await users.put(User(id="x" * 161))
    with pytest.raises(KeyTooLong):
        await users.get("é" * 81)


async def test_several_fields_make_a_key(store: Store) -> None:
    @dataclass
    class Seat:
        row: int
        name: str
        taken: bool = False

    seats = Repository(store, Seat, name="seat", key=("row", "name"), indexes=[Index("taken")])
    await seats.put_many([Seat(10, "a"), Seat(9, "b!", True), Seat(-1, "", True)])

    assert await seats.get((9, "b!")) == Seat(9, "b!", True)
    assert [seat.row async for seat in seats.iterate()] == [-1, 9, 10]
    assert [seat.row for seat in await seats.find(taken=True)] == [-1, 9]
    assert await seats.update((10, "a"), lambda seat: replace(seat, taken=True)) == Seat(10, "a", True)
    assert await seats.delete((-1, ""))
    with pytest.raises(BadKey, match="row, name"):
        await seats.get("a")
    with pytest.raises(BadKey, match="row"):
        await seats.get(("9", "b!"))


async def test_every_kind_of_record_type_can_be_kept_and_found(store: Store) -> None:
    class Colour(enum.Enum):
        RED = "red"
        BLUE = "blue"

    class Typed(TypedDict):
        id: int
        colour: str

    class Tree(msgspec.Struct):
        id: UUID
        colour: Colour

    typed = Repository(store, Typed, name="typed", indexes=[Index("colour")])
    plain = Repository(store, dict, name="plain", indexes=[Index("meta.topic", type=str)])
    trees = Repository(store, Tree, name="tree", indexes=[Index("colour")])
    key = UUID("12345678-1234-5678-1234-567812345678")
    await typed.put({"id": 1, "colour": "red"})
    await plain.put({"id": "p", "meta": {"topic": "x"}})
    await plain.put({"id": "q"})
    await trees.put(Tree(key, Colour.BLUE))

    assert await typed.find(colour="red") == [{"id": 1, "colour": "red"}]
    assert await plain.find(**{"meta.topic": "x"}) == [{"id": "p", "meta": {"topic": "x"}}]
    assert await trees.get(key) == Tree(key, Colour.BLUE)
    assert await trees.get(str(key)) == Tree(key, Colour.BLUE)
    assert await trees.find(colour=Colour.BLUE) == await trees.find(colour="blue") == [Tree(key, Colour.BLUE)]
    with pytest.raises((BadKey, Unencodable)):
        await plain.put({"meta": {}})


async def test_both_codecs_are_read_by_one_repository(store: Store) -> None:
    packed = Repository(store, User, name="u", codec="msgpack", indexes=[Index("team")])
    text = Repository(store, User, name="u", codec="json", indexes=[Index("team")])
    await packed.put(User(id="a", meta={"raw": b"\xff"}))
    await text.put(User(id="b", meta={"raw": b"\xff"}))

    assert ids(await packed.find(team="t")) == ["a", "b"]
    assert await text.get("a") == User(id="a", meta={"raw": b"\xff"})


# ---- schema versions


async def test_what_a_newer_version_wrote_is_kept_by_an_older_one(store: Store, clock: ManualClock) -> None:
    class Old(msgspec.Struct):
        id: str
        name: str

    class New(msgspec.Struct):
        id: str
        name: str
        colour: str = "none"

    new = Repository(store, New, name="r", version=2)
    old = Repository(store, Old, name="r", version=1)
    await old.put(Old("early", "x"))
    await new.put(New("a", "x", "red"))
    await old.update("a", lambda record: msgspec.structs.replace(record, name="y"))
    clock.advance(31)  # by then every writer has looked at the definition
    await old.put(Old("a", "z"))

    assert await new.get("a") == New("a", "z", "red")
    assert await new.get("early") == New("early", "x")


async def test_upcasters_take_old_records_to_the_current_version(store: Store) -> None:
    class Old(msgspec.Struct):
        id: str
        name: str

    class New(msgspec.Struct):
        id: str
        first: str

    await Repository(store, Old, name="r").put(Old("a", "ann bell"))
    new = Repository(
        store, New, name="r", version=2, upcasters={1: lambda old: {"id": old["id"], "first": old["name"].split()[0]}}
    )

    assert await new.get("a") == New("a", "ann")


# ---- time, damage, other writers


async def test_an_expired_record_is_in_no_index(users: Repository[User], clock: ManualClock) -> None:
    await users.put(User(id="a", tags=["x"], email="e"), ttl=60)
    await users.put(User(id="b", tags=["x"]))
    await users.put(User(id="a", tags=["x"], email="e"), ttl=90)
    clock.advance(70)
    assert ids(await users.find(tags="x")) == ["a", "b"]
    clock.advance(21)

    assert ids(await users.find(tags="x")) == ["b"]
    assert await users.count(tags="x") == 1
    assert await users.find(email="e") == []
    await users.put(User(id="a", tags=["x"]))
    clock.advance(1000)
    assert ids(await users.find(tags="x")) == ["a", "b"]


async def test_a_life_that_grows_takes_the_index_entries_along(users: Repository[User], clock: ManualClock) -> None:
    await users.put(User(id="a", tags=["x"], email="e"), ttl=60)
    await users.put(User(id="a", tags=["x"], email="e"))
    clock.advance(61)

    assert ids(await users.find(tags="x")) == ["a"]
    with pytest.raises(UniqueConflict):
        await users.put(User(id="b", email="e"))


async def test_a_put_that_is_already_expired_removes_the_record(users: Repository[User]) -> None:
    await users.put(User(id="a", tags=["x"], email="e"))
    await users.put(User(id="a", tags=["x", "y"], email="e"), ttl=0)

    assert await users.get("a") is None
    assert await users.find(tags="x") == []
    await users.put(User(id="b", email="e"))
    assert await users.verify() == []


async def test_a_damaged_record_is_reported_and_can_be_deleted(users: Repository[User], store: Store) -> None:
    await users.put(User(id="a", email="e", tags=["x"]))
    await users.put(User(id="b", tags=["x"]))
    await store._commit((Put("kv:user:a", b"damaged"),))

    with pytest.raises(CorruptRecord):
        await users.get("a")
    assert [damage.kind for damage in await users.verify()] == ["corrupt"]
    assert await users.delete("a")
    assert ids(await users.find(tags="x")) == ["b"]
    await users.put(User(id="c", email="e"))
    assert {damage.kind for damage in await users.verify(repair=True)} <= {"stale"}
    assert await users.verify() == []


async def test_verify_finds_and_mends_missing_and_stale_entries(users: Repository[User], store: Store) -> None:
    await users.put_many([User(id="a", email="e", tags=["x"]), User(id="b", tags=["y"])])
    for key in ("kv:user#tags:x!a", "kv:user#email:e"):
        await store.delete(key, raw=True)
    await store._commit((Put("kv:user#tags:z!b", b"b"),))
    await store._commit((Put("kv:user#tags:z!nobody", b"nobody"),))

    found = await users.verify(repair=True)

    assert sorted((damage.kind, damage.key) for damage in found) == [
        ("missing", "kv:user#email:e"),
        ("missing", "kv:user#tags:x!a"),
        ("stale", "kv:user#tags:z!b"),
        ("stale", "kv:user#tags:z!nobody"),
    ]
    assert await users.verify() == []
    assert ids(await users.find(tags="x")) == ["a"]
    assert ids(await users.find(email="e")) == ["a"]


async def test_a_claim_without_a_holder_is_taken_over(users: Repository[User], store: Store) -> None:
    await users.put(User(id="a", email="kept"))
    await store._commit((Put("kv:user#email:e", b"nobody"),))
    await store._commit((Put("kv:user#email:f", b"a"),))

    await users.put(User(id="b", email="e"))
    await users.put(User(id="c", email="f"))
    await users.put(User(id="a", email="g"))

    assert ids(await users.find(email="e")) == ["b"]
    assert ids(await users.find(email="f")) == ["c"]
    assert await users.verify() == []


async def test_plain_writes_into_the_namespace_are_refused(users: Repository[User], store: Store) -> None:
    await users.put(User(id="a"))

    with pytest.raises(ReservedNamespace):
        await store.put("kv:user:a", 1)


async def test_stores_of_two_namespaces_do_not_meet(store: Store) -> None:
    one = Repository(store, User, name="user", namespace="auth0|1", indexes=INDEXES)
    two = Repository(store, User, name="user", namespace="auth0|2", indexes=INDEXES)
    await one.put(User(id="a", email="e"))
    await two.put(User(id="b", email="e"))

    assert ids(await one.find(email="e")) == ["a"]
    assert await two.count() == 1


# ---- transactions


async def test_a_transaction_writes_all_records_and_their_indexes_or_none(atomic: Store) -> None:
    users = Repository(atomic, User, name="user", indexes=INDEXES)
    await users.put_many([User(id="a", email="1"), User(id="b", email="2")])

    async with atomic.atomic() as tx:
        a = await users.get("a", tx=tx)
        assert a is not None
        await users.put(msgspec.structs.replace(a, email="3", tags=["x"]), tx=tx)
        await users.put(User(id="b", email="1"), tx=tx)  # freed in this transaction
        await users.insert(User(id="c", email="2"), tx=tx)
        assert await users.delete("nobody", tx=tx) is False
        assert (await users.update("c", lambda user: msgspec.structs.replace(user, team="c"), tx=tx)) is not None
    with pytest.raises(UniqueConflict):
        async with atomic.atomic() as tx:
            await users.put(User(id="d"), tx=tx)
            await users.put(User(id="e", email="1"), tx=tx)

    assert ids(await users.find(email="1")) == ["b"]
    assert ids(await users.find(tags="x")) == ["a"]
    assert ids(await users.find(team="c")) == ["c"]
    assert await users.count() == 3
    assert await users.verify() == []


async def test_a_transaction_fails_when_what_it_read_was_changed(atomic: Store) -> None:
    users = Repository(atomic, User, name="user", indexes=INDEXES)
    await users.put(User(id="a"))

    with pytest.raises(Conflict):
        async with atomic.atomic() as tx:
            await users.get("a", tx=tx)
            await users.put(User(id="a", team="other"))
            await users.put(User(id="b"), tx=tx)

    assert await users.get("b") is None


async def test_transact_counts_up_under_contention(atomic: Store) -> None:
    users = Repository(atomic, User, name="user", indexes=INDEXES)
    await users.put(User(id="n", meta={"score": 0}))

    async def more(tx: Any) -> None:
        user = await users.get("n", tx=tx)
        assert user is not None
        await users.put(msgspec.structs.replace(user, meta={"score": user.meta["score"] + 1}), tx=tx)

    await asyncio.gather(*(atomic.transact(more, attempts=50) for _ in range(10)))

    assert await users.count(**{"meta.score": 10}) == 1
    assert await users.verify() == []


async def test_a_transaction_of_another_store_is_refused(atomic: Store) -> None:
    async with open_store(MemoryDriver()) as other:
        users = Repository(other, User, name="user")
        async with atomic.atomic() as tx:
            with pytest.raises(Unsupported):
                await users.put(User(id="a"), tx=tx)


# ---- failures and round trips


@pytest.mark.parametrize("effect", [False, True])
async def test_a_failure_at_any_step_leaves_indexes_that_miss_nothing(effect: bool, clock: ManualClock) -> None:
    for ordered in (False, True):
        for at in range(1, 12):
            driver = FaultyDriver(MemoryDriver(), without={"atomic_batch"} if ordered else set())
            async with open_store(driver, clock=clock) as store:
                users = Repository(store, User, name="user", indexes=INDEXES)
                await users.put(User(id="a", team="1", email="1", tags=["x"]))
                fault = driver.fail("step", at, effect=effect)
                with_fault = [User(id="a", team="2", email="2", tags=["y"]), User(id="b", email="1")]
                for record in with_fault:
                    try:
                        await users.put(record)
                    except Exception:  # noqa: BLE001 - whatever it is, the indexes have to hold
                        continue
                driver.heal()
                assert {damage.kind for damage in await users.verify()} <= {"stale"}, (ordered, at)
                for record in [user async for user in users.iterate()]:
                    assert record in await users.find(team=record.team)
                    assert record in await users.find(email=record.email)
            assert fault.fired or at > 2


async def test_the_everyday_operations_take_one_round_trip_where_batches_are_atomic(clock: ManualClock) -> None:
    driver = FaultyDriver(MemoryDriver())
    async with open_store(driver, clock=clock) as store:
        plain = Repository(store, User, name="plain")
        users = Repository(store, User, name="user", indexes=INDEXES)
        await plain.put(User(id="0"))
        await users.put(User(id="0"))

        async def trips(operation: Any) -> int:
            before = driver.calls["get"] + driver.calls["commit"] + driver.calls["scan"]
            await operation
            return driver.calls["get"] + driver.calls["commit"] + driver.calls["scan"] - before

        assert await trips(plain.put(User(id="a"))) == 1
        assert await trips(plain.insert(User(id="b"))) == 1
        assert await trips(users.insert(User(id="a", email="e", tags=["x"]))) == 1
        assert await trips(users.put(User(id="a", email="f"))) == 2
        assert await trips(users.find(team="t")) == 1
        assert await trips(users.find(email="f")) == 1
        assert await trips(users.get_many(["a", "b", "0"])) == 1
        assert await trips(users.count(team="t")) == 1
        assert await trips(users.put_many([User(id=str(n)) for n in range(100)])) == 2


async def test_an_insert_without_atomic_batches_writes_claim_entry_and_record_in_order(
    clock: ManualClock,
) -> None:
    driver = FaultyDriver(MemoryDriver(), without={"atomic_batch"})
    async with open_store(driver, clock=clock) as store:
        users = Repository(store, User, name="user", indexes=[Index("email", unique=True), Index("team")])
        await users.put(User(id="0"))
        for step, present in enumerate(([], ["kv:user#email:e"], ["kv:user#email:e", "kv:user#team:t!a"]), start=1):
            driver.fail("step", step)
            with pytest.raises(Exception, match=r"injected|operations were done"):
                await users.insert(User(id="a", email="e"))
            driver.heal()
            found = [key async for key in store.keys("kv:user") if key.endswith(("!a", ":a", ":e"))]
            assert found == present
        assert await users.insert(User(id="a", email="e"), ttl=None)


async def test_a_unique_index_needs_conditional_writes() -> None:
    async with open_store(FaultyDriver(MemoryDriver(), without={"atomic_batch", "conditional"})) as store:
        with pytest.raises(Unsupported, match="unique"):
            Repository(store, User, name="user", indexes=INDEXES)
        plain = Repository(store, User, name="user", indexes=[Index("team")])
        await plain.put(User(id="a", team="1"))
        await plain.put(User(id="a", team="2"))
        await plain.delete("nobody")
        assert await plain.find(team="1") == []
        assert ids(await plain.find(team="2")) == ["a"]
        assert await plain.delete("a")
        assert await plain.find(team="2") == []
        with pytest.raises(Unsupported):
            await plain.insert(User(id="b"))
        with pytest.raises(Unsupported):
            await plain.delete("b", expect=b"version!")


async def test_a_backend_that_deletes_without_conditions_still_frees_values(clock: ManualClock) -> None:
    driver = FaultyDriver(MemoryDriver(), without={"atomic_batch", "conditional_delete"})
    async with open_store(driver, clock=clock) as store:
        users = Repository(store, User, name="user", indexes=INDEXES)
        await users.put(User(id="a", email="1", tags=["x"]))
        await users.put(User(id="a", email="2", tags=["y"]))
        await users.put(User(id="b", email="1", tags=["x"]))
        assert await users.delete("a")
        await users.put(User(id="c", email="2", tags=["y"]))
        clock.advance(3600)

        assert ids(await users.find(email="1")) == ["b"]
        assert ids(await users.find(email="2")) == ["c"]
        assert ids(await users.find(tags="y")) == ["c"]
        assert {damage.kind for damage in await users.verify(repair=True)} <= {"stale"}


async def test_a_ttl_shorter_than_a_save_is_refused_where_batches_are_not_atomic(clock: ManualClock) -> None:
    async with open_store(FaultyDriver(MemoryDriver(), without={"atomic_batch"}), clock=clock) as store:
        with pytest.raises(Unsupported, match="ttl"):
            Repository(store, User, name="user", indexes=INDEXES, ttl=10)
        users = Repository(store, User, name="user", indexes=INDEXES)
        with pytest.raises(Unsupported, match="ttl"):
            await users.put(User(id="a"), ttl=10)
        await Repository(store, User, name="plain", ttl=10).put(User(id="a"))
        await users.put(User(id="a"), ttl=60)
        assert await users.put(User(id="b"), expect=ABSENT, ttl=-1) is not None


async def test_a_damaged_record_is_named_and_a_list_goes_on_past_it(users: Repository[User]) -> None:
    await users.put_many([User(id=each, team="a") for each in "xyz"])
    [entry] = await users.store._entries(["kv:user:y"])
    assert entry is not None
    await users.store._commit((Put("kv:user:y", entry.value[:-1] + bytes([entry.value[-1] ^ 1])),))

    for call in (users.get("y"), users.find(team="a"), users.page(team="a")):
        with pytest.raises(CorruptRecord) as caught:
            await call
        assert caught.value.key == "kv:user:y"
    skipped: list[CorruptRecord] = []
    found = await users.find(team="a", on_corrupt=skipped.append)
    page = await users.page(team="a", limit=2, on_corrupt=skipped.append)
    every = [user.id async for user in users.iterate(on_corrupt=skipped.append)]

    assert sorted(ids(found)) == sorted(ids(page.items)) == every == ["x", "z"]
    assert [error.key for error in skipped] == ["kv:user:y"] * 3


async def test_the_stores_own_namespace_is_refused(store: Store) -> None:
    with pytest.raises(BadKey):
        Repository(store, User, name="user", namespace="kvpersist")
