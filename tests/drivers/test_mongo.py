"""The MongoDB driver: the contract, the model, and what is its own. On FerretDB, and on mongomock.

FerretDB 1.x does not keep compare-and-set, so what the driver does on a server that does (one command a
drain, conditions in the filter) is shown on mongomock, with what others do in between said by the test.
"""

from __future__ import annotations

import asyncio
import gc
import os
import random
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from ssl import CERT_REQUIRED, create_default_context
from typing import Any

import pytest
from pymongo import AsyncMongoClient, MongoClient
from pymongo.errors import AutoReconnect, BulkWriteError, OperationFailure
from pymongo.monitoring import CommandListener, CommandStartedEvent

sys.path.insert(0, str(Path(__file__).parent))  # for mongomock_shim.py
sys.path.insert(0, str(Path(__file__).parents[1] / "services"))  # for proxy.py

from mongomock_shim import MockClient

import kvpersist
from kvpersist import Message, ToolCallPart
from kvpersist.driver import ABSENT, Check, Committed, Delete, Put
from kvpersist.errors import (
    BadKey,
    BadOption,
    BadRequest,
    Busy,
    CommitUnknown,
    Conflict,
    CorruptRecord,
    KeyTooLong,
    KvError,
    PoolExhausted,
    ReadOnly,
    StoreClosed,
    Unavailable,
    UniqueConflict,
    ValueTooLarge,
)
from kvpersist.testing import DriverContract, ManualClock, batch, driver_machine
from kvpersist.urls import parse
from kvpersist_drivers.mongo import MongoDriver, MongoOptions, _client, _turns
from kvpersist_drivers.mongo._entries import MAX_VALUE_BYTES

# PyMongo leaves a socket that it was connecting, when it was closed or cancelled, to the garbage collector
pytestmark = pytest.mark.filterwarnings("ignore:Exception ignored in. <socket:pytest.PytestUnraisableExceptionWarning")

FIELDS = ("c:a", "c:b", "c:c", "c:d")


class Place:
    """A database of its own, dropped afterwards."""

    def __init__(self, url: str) -> None:
        self.server = url.rpartition("/")[0]
        self.database = "t" + os.urandom(6).hex()
        self.url = f"{self.server}/{self.database}"

    def options(self, **more: Any) -> MongoOptions:
        return MongoOptions(**{"url": self.url, "database": self.database, **more})

    @asynccontextmanager
    async def opened(self, **more: Any) -> AsyncIterator[MongoDriver]:
        driver = await MongoDriver.open(self.options(**more))
        try:
            yield driver
        finally:
            await driver.close()

    def found(self, key: Any) -> dict[str, Any] | None:
        with MongoClient(self.server) as client:
            return client[self.database]["storage"].find_one({"_id": key})

    def insert(self, document: dict[str, Any], collection: str = "storage") -> None:
        with MongoClient(self.server) as client:
            client[self.database][collection].insert_one(document)

    def drop(self) -> None:
        with MongoClient(self.server) as client:
            client.drop_database(self.database)


@pytest.fixture(scope="module", autouse=True)
def collected() -> Iterator[None]:
    yield
    gc.collect()  # here, and not in somebody else's test


@pytest.fixture
def place(service: Callable[[str], dict[str, str]]) -> Iterator[Place]:
    place = Place(service("mongo")["KVPERSIST_TEST_MONGO_URL"])
    yield place
    place.drop()


@pytest.fixture
async def driver(place: Place) -> AsyncIterator[MongoDriver]:
    async with place.opened() as driver:
        yield driver


@pytest.fixture
def mock() -> MockClient:
    return MockClient()


@pytest.fixture
async def mocked(mock: MockClient) -> AsyncIterator[MongoDriver]:
    driver = await MongoDriver.over(mock)
    mock.commands.clear()
    yield driver
    await driver.close()


class TestMongo(DriverContract[MongoDriver]):
    @pytest.fixture
    async def driver(self, place: Place) -> AsyncIterator[MongoDriver]:
        self._place = place
        async with place.opened() as driver:
            yield driver

    async def peek(self, driver: MongoDriver, key: str) -> bytes | None:
        found = self._place.found(key)
        return None if found is None else found["v"]

    async def reopen(self, driver: MongoDriver) -> MongoDriver:
        return await MongoDriver.open(self._place.options())


class TestMongoMock(DriverContract[MongoDriver]):
    """Quick, and without a server; its cancelled calls are not a server's."""

    @pytest.fixture
    async def driver(self) -> AsyncIterator[MongoDriver]:
        self._client = MockClient()
        driver = await MongoDriver.over(self._client)
        yield driver
        await driver.close()

    async def peek(self, driver: MongoDriver, key: str) -> bytes | None:
        found = self._client.mock.kvpersist.storage.find_one({"_id": key})
        return None if found is None else found["v"]

    async def reopen(self, driver: MongoDriver) -> MongoDriver:
        return await MongoDriver.over(self._client)


class TestMongoModel:
    def test_the_driver_does_what_a_dict_does(self, place: Place) -> None:
        from hypothesis.stateful import run_state_machine_as_test

        async def open_new() -> MongoDriver:
            await asyncio.to_thread(place.drop)
            return await MongoDriver.open(place.options())

        async def open_again(closed: MongoDriver) -> MongoDriver:
            return await MongoDriver.open(place.options())

        machine = driver_machine(open_new, reopener=open_again, max_examples=15, steps=20)
        run_state_machine_as_test(machine, settings=machine.TestCase.settings)

    def test_it_does_so_with_conditions_that_the_server_keeps(self) -> None:
        from hypothesis.stateful import run_state_machine_as_test

        clients: list[MockClient] = []

        async def open_new() -> MongoDriver:
            clients.append(MockClient(ttl=False))
            return await MongoDriver.over(clients[-1])

        async def open_again(closed: MongoDriver) -> MongoDriver:
            return await MongoDriver.over(clients[-1])

        machine = driver_machine(open_new, reopener=open_again, max_examples=30, steps=20)
        run_state_machine_as_test(machine, settings=machine.TestCase.settings)


# -- what is sent --------------------------------------------------------------------------------


class Heard(CommandListener):
    """The commands on one collection, with those of the turns apart."""

    def __init__(self) -> None:
        self.commands: list[str] = []
        self.turns: list[str] = []

    def started(self, event: CommandStartedEvent) -> None:
        name = event.command_name
        collection = event.command.get("collection" if name == "getMore" else name)
        if name in ("find", "getMore", "insert", "update", "delete"):
            (self.turns if str(collection).endswith("_turn") else self.commands).append(name)

    def succeeded(self, event: Any) -> None: ...

    def failed(self, event: Any) -> None: ...


@pytest.fixture
async def heard(place: Place) -> AsyncIterator[tuple[MongoDriver, Heard]]:
    listener = Heard()
    async with AsyncMongoClient(place.url, event_listeners=[listener]) as client:
        driver = await MongoDriver.over(client, database=place.database)
        yield driver, listener
        await driver.close()


async def test_a_drain_of_puts_is_one_command_and_so_is_one_of_inserts(heard: tuple[MongoDriver, Heard]) -> None:
    driver, listener = heard
    listener.turns.clear()

    await driver.commit([batch(Put(f"c:{number}", b"v")) for number in range(64)])
    puts = listener.commands.copy()
    outcomes = await driver.commit([batch(Put(f"d:{number}", b"v", ABSENT)) for number in range(64)])

    assert puts == ["update"]
    assert listener.commands == ["update", "insert"]
    assert all(isinstance(outcome, Committed) for outcome in outcomes)
    assert listener.turns == ["insert", "delete"] * 2  # of FerretDB 1.x only


async def test_a_thousand_keys_are_one_command_and_a_scan_is_one_for_each_thousand(
    heard: tuple[MongoDriver, Heard],
) -> None:
    driver, listener = heard
    for part in range(3):
        await driver.commit([batch(Put(f"c:{part}{number:03}", b"v", ABSENT)) for number in range(1000)])
    listener.commands.clear()

    entries = await driver.get([f"c:1{number:03}" for number in range(1000)])
    got = listener.commands.copy()
    page = await driver.scan("c:", "c;", limit=1000)
    paged = listener.commands.copy()
    everything = await driver.scan(None, None, limit=2500, reverse=True, keys_only=True)

    assert all(entries)
    assert got == ["find"]
    assert len(page) == 1000
    assert paged == ["find"] * 2
    assert listener.commands == ["find"] * 3 + ["getMore"] * 2
    assert [entry.key for entry in everything][::2499] == ["c:2999", "c:0500"]


async def test_conditional_batches_of_one_key_are_one_command_too(mocked: MongoDriver, mock: MockClient) -> None:
    keys = [f"c:{number}" for number in range(64)]
    first = [batch(Put(key, b"1", ABSENT)) for key in keys]
    await mocked.commit(first)
    inserts = mock.commands.copy()
    mock.commands.clear()

    second = [batch(Put(key, b"2", one.version)) for key, one in zip(keys, first, strict=True)]
    swapped = await mocked.commit(second)
    swaps = mock.commands.copy()
    third = [batch(Put(key, b"3", second[at % 60].version)) for at, key in enumerate(keys)]
    some = await mocked.commit(third)
    partly = mock.commands[len(swaps) :]
    mock.commands.clear()
    checked = await mocked.commit([batch(Check(key, one.version)) for key, one in zip(keys, third, strict=True)])
    checks = mock.commands.copy()
    mock.commands.clear()
    deleted = await mocked.commit([batch(Delete(key, one.version)) for key, one in zip(keys, third, strict=True)])

    assert inserts == ["insert"]
    assert swaps == ["update"]
    assert all(isinstance(outcome, Committed) for outcome in swapped)
    assert [isinstance(outcome, Committed) for outcome in some] == [True] * 60 + [False] * 4
    assert partly == ["update", "find"]  # the versions tell which
    assert [isinstance(outcome, Committed) for outcome in checked] == [True] * 60 + [False] * 4
    assert checks == ["find"]
    assert [isinstance(outcome, Committed) for outcome in deleted] == [True] * 60 + [False] * 4
    assert mock.commands == ["find", "delete"]


async def test_of_many_who_want_one_key_all_but_one_cost_nothing(mocked: MongoDriver, mock: MockClient) -> None:
    one = batch(Put("c:a", b"1"))
    await mocked.commit([one])
    mock.commands.clear()

    swaps = [batch(Put("c:a", b"2", one.version)) for _ in range(64)]
    outcomes = await mocked.commit(swaps)
    inserts = await mocked.commit([batch(Put("c:b", b"1", ABSENT)) for _ in range(64)])

    assert [type(outcome) for outcome in outcomes] == [Committed] + [Conflict] * 63
    assert [getattr(outcome, "found", None) for outcome in outcomes[1:]] == [swaps[0].version] * 63
    assert [type(outcome) for outcome in inserts] == [Committed] + [Conflict] * 63
    assert mock.commands == ["update", "insert"]


async def test_a_batch_sends_what_keeps_its_order_together(mocked: MongoDriver, mock: MockClient) -> None:
    held = batch(Put("c:r", b"0"), Put("c:old", b"0"))
    await mocked.commit([held])
    mock.commands.clear()

    ops = [Check("c:r", held.version), Check("c:none", ABSENT), *(Put(f"c#i:{n}", b"r") for n in range(9))]
    [outcome] = await mocked.commit([batch(*ops, Put("c:r", b"1", held.version), Delete("c:old", held.version))])

    assert isinstance(outcome, Committed)
    assert mock.commands == ["find", "update", "delete"]


async def test_a_store_joins_what_is_concurrent(heard: tuple[MongoDriver, Heard]) -> None:
    driver, listener = heard
    async with kvpersist.open_store(driver) as store:
        await store.put("c:warm", 1)
        listener.commands.clear()

        await asyncio.gather(*(store.put(f"c:{number}", number) for number in range(64)))
        assert await asyncio.gather(*(store.get(f"c:{number}") for number in range(64))) == list(range(64))

        assert listener.commands == ["update", "find"]


# -- conditions, and others who write at the same time ---------------------------------------------


async def test_one_of_many_drivers_wins_each_version(place: Place) -> None:
    drivers = [await MongoDriver.open(place.options()) for _ in range(6)]
    try:
        for number in range(8):
            one = batch(Put("c:a", b"%d" % number))
            await drivers[0].commit([one])
            swaps = [batch(Put("c:a", b"x", one.version)) for _ in drivers[1:]]

            answers = await asyncio.gather(
                drivers[0].commit([batch(Delete("c:a", one.version))]),
                *(driver.commit([swap]) for driver, swap in zip(drivers[1:], swaps, strict=True)),
            )

            won = [outcome.version for [outcome] in answers if isinstance(outcome, Committed)]
            assert len(won) == 1
            [entry] = await drivers[0].get(["c:a"])
            assert (None if entry is None else entry.version) in (None, *won)
    finally:
        for driver in drivers:
            await driver.close()


async def test_what_somebody_replaced_before_we_looked_is_unknown(mocked: MongoDriver, mock: MockClient) -> None:
    one = batch(*(Put(key, b"1") for key in FIELDS))
    await mocked.commit([one])

    def meddle() -> None:
        mock.mock.kvpersist.storage.replace_one({"_id": "c:a"}, {"v": b"theirs", "r": b"theirs!!"})

    mock.after["update"] = meddle
    outcomes = await mocked.commit(
        [batch(Put(key, b"2", b"otherone" if key == "c:d" else one.version)) for key in FIELDS]
    )

    assert [type(outcome) for outcome in outcomes] == [CommitUnknown, Committed, Committed, CommitUnknown]
    assert outcomes[0] is not outcomes[3]
    [a, b, _, d] = await mocked.get(FIELDS)
    assert [entry and entry.value for entry in (a, b, d)] == [b"theirs", b"2", b"1"]


async def test_a_swap_that_cannot_be_looked_at_is_unknown_and_one_that_was_not_made_is_not(
    mocked: MongoDriver, mock: MockClient
) -> None:
    one = batch(*(Put(key, b"1") for key in FIELDS))
    await mocked.commit([one])
    mock.fail["find"] = AutoReconnect("gone")

    partly = await mocked.commit([batch(Put("c:a", b"2", one.version)), batch(Put("c:b", b"2", b"otherone"))])
    with pytest.raises(Unavailable):
        await mocked.commit([batch(Put("c:c", b"2", b"otherone"))])

    assert [type(outcome) for outcome in partly] == [CommitUnknown, CommitUnknown]


async def test_deletes_that_somebody_else_may_have_made_are_unknown(mocked: MongoDriver, mock: MockClient) -> None:
    one = batch(*(Put(key, b"1") for key in FIELDS))
    await mocked.commit([one])
    mock.after["find"] = lambda: mock.mock.kvpersist.storage.delete_one({"_id": "c:a"})

    outcomes = await mocked.commit([batch(Delete(key, one.version)) for key in FIELDS])
    [alone] = await mocked.commit([batch(Delete("c:a", one.version))])

    assert [type(outcome) for outcome in outcomes] == [CommitUnknown] * 4
    assert isinstance(alone, Conflict)
    assert alone.found is ABSENT


async def test_an_insert_tries_again_where_the_key_was_freed_meanwhile(mocked: MongoDriver, mock: MockClient) -> None:
    await mocked.commit([batch(Put("c:a", b"1"))])
    mock.after["insert"] = lambda: mock.mock.kvpersist.storage.delete_one({"_id": "c:a"})

    [outcome] = await mocked.commit([batch(Put("c:a", b"2", ABSENT))])

    assert isinstance(outcome, Committed)
    assert mock.commands[-3:] == ["insert", "find", "insert"]


async def test_a_key_that_is_inserted_and_deleted_for_ever_is_given_up(mocked: MongoDriver, mock: MockClient) -> None:
    taken = {"writeErrors": [{"index": 0, "code": 11000, "errmsg": "E11000"}], "nMatched": 0, "nUpserted": 0}
    for command in ("insert", "update"):
        mock.fail[command] = BulkWriteError(taken)
    for expect in (ABSENT, None):
        [outcome] = await mocked.commit([batch(Put("c:a", b"2", expect))])

        assert type(outcome) is Unavailable


async def test_what_the_server_says_of_a_command_is_what_its_batches_are_told(
    mocked: MongoDriver, mock: MockClient
) -> None:
    async def outcome(error: Exception) -> KvError:
        mock.fail["update"] = error
        try:
            [outcome, other] = await mocked.commit([batch(Put("c:b", b"1")), batch(Put("c:a", b"1", ABSENT))])
        except KvError as raised:
            return raised
        assert isinstance(outcome, KvError)
        assert isinstance(other, Committed)  # which was sent before
        await mocked.commit([batch(Delete("c:a"))])
        return outcome

    def refused(code: int) -> BulkWriteError:
        told = {"writeErrors": [{"index": 0, "code": code, "errmsg": "no"}], "nMatched": 0, "nUpserted": 0}
        return BulkWriteError(told)

    late = BulkWriteError({"writeErrors": [], "writeConcernErrors": [{"code": 64, "errmsg": "late"}]})
    assert type(await outcome(late)) is CommitUnknown
    assert type(await outcome(AutoReconnect("cut"))) is CommitUnknown
    assert type(await outcome(KeyError("nModified"))) is CommitUnknown
    assert type(await outcome(OperationFailure("half way", 96))) is CommitUnknown
    assert type(await outcome(OperationFailure("not yours", 13))) is ReadOnly
    assert type(await outcome(refused(13))) is ReadOnly
    assert type(await outcome(refused(121))) is KvError


async def test_a_batch_that_fails_half_way_is_unknown_and_others_are_not_tried(
    mocked: MongoDriver, mock: MockClient
) -> None:
    mock.fail["update"] = OperationFailure("not yours", 13)

    outcomes = await mocked.commit(
        [batch(Put("c:a", b"1", ABSENT), Put("c:b", b"1")), batch(Put("c:c", b"1", ABSENT)), batch(Put("c:c", b"2"))]
    )

    assert [type(outcome) for outcome in outcomes] == [CommitUnknown, Committed, ReadOnly]
    assert isinstance(outcomes[0], CommitUnknown)
    assert outcomes[0].keys == ("c:a", "c:b")


# -- what is stored ------------------------------------------------------------------------------


async def test_a_document_holds_key_value_version_and_expiry(place: Place, driver: MongoDriver) -> None:
    one = batch(Put("c:a", b"value"), Put("c:b", b"", expires_at=4_102_444_800.5))
    await driver.commit([one])

    assert place.found("c:a") == {"_id": "c:a", "v": b"value", "r": one.version}
    found = place.found("c:b")
    assert found is not None
    assert found["e"].isoformat() == "2100-01-01T00:00:00.500000"


async def test_what_looks_like_an_operator_is_a_text_or_bytes(place: Place, driver: MongoDriver) -> None:
    hostile = ["$where", "$set", '{"$gt": ""}', "a.$[].b", "$ne", "__proto__", "' || 1 == 1", "sleep(1000)", "/.*/"]
    await driver.commit([batch(Put("c:held", b"1"))])

    await driver.commit([batch(Put(text, text.encode(), ABSENT)) for text in hostile])
    scans = [[entry.key for entry in await driver.scan(text, text + "\0", limit=9)] for text in hostile]
    removed = await driver.commit([batch(Delete(text)) for text in hostile[1:]])

    assert scans == [[text] for text in hostile]
    assert all(isinstance(outcome, Committed) for outcome in removed)
    assert [entry.key for entry in await driver.scan(None, None, limit=9)] == ["$where", "c:held"]
    found = place.found("$where")
    assert found is not None
    assert (type(found["_id"]), type(found["v"])) == (str, bytes)


async def test_keys_are_in_the_order_of_utf8_and_not_of_utf16(driver: MongoDriver) -> None:
    keys = [
        "c:\ud7ff",
        "c:\ue000",
        "c:\uffff",
        "c:\U00010000",
        "c:\U0001f600",
        "c:\U0010ffff",
        "c:\x00",
        "c:",
        "c:e\u0301",
    ]
    await driver.commit([batch(Put(key, b"v", ABSENT)) for key in keys])

    assert [entry.key for entry in await driver.scan(None, None, limit=99)] == sorted(keys, key=str.encode)
    found = await driver.scan("c:\ue000", "c:\U0001f600", limit=99, reverse=True)
    assert [entry.key for entry in found] == ["c:\U00010000", "c:\uffff", "c:\ue000"]


async def test_other_documents_of_the_collection_are_left_alone_or_named(place: Place, driver: MongoDriver) -> None:
    await driver.commit([batch(Put("c:a", b"1"))])
    place.insert({"_id": 7, "v": "theirs"})
    place.insert({"_id": "c:b", "v": "a text", "r": b"12345678"})

    with pytest.raises(CorruptRecord, match="c:b"):
        await driver.get(["c:a", "c:b"])
    with pytest.raises(CorruptRecord, match="c:b"):
        await driver.scan("c:", "c;", limit=5)
    outcomes = await driver.commit([batch(Put("c:b", b"1", ABSENT)), batch(Delete("c:b", b"12345678"))])
    assert isinstance(outcomes[0], Conflict)
    await driver.commit([batch(Put("c:b", b"1")), batch(Delete("c:b"))])

    assert [entry.key for entry in await driver.scan(None, None, limit=5)] == ["c:a"]
    assert place.found(7) == {"_id": 7, "v": "theirs"}


async def test_two_collections_and_two_databases_are_apart(place: Place) -> None:
    other = Place(place.url)
    async with place.opened() as one, place.opened(collection="another") as two, other.opened() as three:
        for number, driver in enumerate((one, two, three)):
            await driver.commit([batch(Put(f"c:{number}", b"v"))])

        found = [[entry.key for entry in await driver.scan(None, None, limit=9)] for driver in (one, two, three)]

    assert found == [["c:0"], ["c:1"], ["c:2"]]
    other.drop()


async def test_the_server_removes_what_expired_only_where_it_can(mocked: MongoDriver, driver: MongoDriver) -> None:
    assert driver.capabilities.ttl == "swept"  # FerretDB refuses the index
    assert mocked.capabilities.ttl == "native"
    assert driver.capabilities.server.startswith("FerretDB ")
    assert driver.capabilities.atomic_batch == mocked.capabilities.atomic_batch == "none"


async def test_an_entry_that_expired_and_is_still_there_counts_as_absent_in_each_condition(
    mocked: MongoDriver, mock: MockClient
) -> None:
    clock = mocked.clock = ManualClock(time.time())
    one = batch(*(Put(key, b"1", expires_at=clock.now + 50) for key in FIELDS))
    await mocked.commit([one])
    clock.advance(60)

    outcomes = await mocked.commit(
        [
            *(batch(Put("c:a", b"2", ABSENT)), batch(Put("c:b", b"2", one.version)), batch(Delete("c:c", one.version))),
            *(batch(Check("c:d", ABSENT)), batch(Put("c:d", b"2", ABSENT, expires_at=clock.now - 1))),
        ]
    )

    assert [type(outcome) for outcome in outcomes] == [Committed, Conflict, Conflict, Committed, Committed]
    assert [entry and entry.value for entry in await mocked.get(FIELDS)] == [b"2", None, None, None]


# -- what is refused -----------------------------------------------------------------------------


async def test_a_batch_that_cannot_be_kept_fails_alone(mocked: MongoDriver) -> None:
    outcomes = await mocked.commit(
        [
            *(batch(Put("c:a", b"1")), batch(Put("c:\ud800", b"2")), batch(Put("c:" + "k" * 1023, b"3"))),
            *(batch(), batch(Put("c:n", b"4", expires_at=float("nan"))), batch(Put("c:v", b"5", b"short"))),
            *(batch(Put("c:w", b"6"), Put("c:x", bytes(MAX_VALUE_BYTES + 1))), batch(Put("c:b", b"7"))),
        ]
    )

    kinds = [Committed, BadKey, KeyTooLong, Committed, BadRequest, BadRequest, ValueTooLarge, Committed]
    assert [type(outcome) for outcome in outcomes] == kinds
    assert [entry.key for entry in await mocked.scan(None, None, limit=9)] == ["c:a", "c:b"]


async def test_a_key_with_a_lone_surrogate_is_no_key(driver: MongoDriver) -> None:
    with pytest.raises(BadKey):
        await driver.get(["c:\ud800"])
    with pytest.raises(BadKey):
        await driver.scan("c:\ud800", "c;", limit=1)


async def test_several_values_at_the_limit_go_together(driver: MongoDriver) -> None:
    values = {f"c:{number}": bytes([number]) * MAX_VALUE_BYTES for number in range(3)}  # more than one message

    outcomes = await driver.commit([batch(Put(key, value)) for key, value in values.items()])
    entries = await driver.get(list(values))

    assert all(isinstance(outcome, Committed) for outcome in outcomes)
    assert [entry is not None and entry.value == values[entry.key] for entry in entries] == [True] * 3


# -- options -------------------------------------------------------------------------------------


def test_the_pool_is_as_the_options_say_unless_the_url_says_otherwise() -> None:
    plain = _client(MongoOptions(url="mongodb://localhost/db")).options.pool_options
    told = _client(MongoOptions(host="localhost", pool_max=3, pool_idle=7, connect_timeout=2)).options.pool_options
    url = _client(MongoOptions(url="mongodb://localhost/db?maxPoolSize=5&waitQueueTimeoutMS=250")).options.pool_options

    assert (plain.max_pool_size, plain.max_idle_time_seconds, plain.connect_timeout) == (10, 30, 5)
    assert (plain.wait_queue_timeout, plain.socket_timeout) == (5, None)
    assert (told.max_pool_size, told.max_idle_time_seconds, told.wait_queue_timeout) == (3, 7, 2)
    assert (url.max_pool_size, url.wait_queue_timeout) == (5, 0.25)


@pytest.mark.parametrize(
    ("mode", "checks"),
    [(True, (True, True)), ("verify-full", (True, True)), ("verify-ca", (True, False)), ("require", (False, False))],
)
def test_tls_checks_as_much_as_is_asked_for(mode: Any, checks: tuple[bool, bool]) -> None:
    pool = _client(MongoOptions(host="localhost", ssl=mode)).options.pool_options

    assert pool._ssl_context is not None
    signed = pool._ssl_context.verify_mode == CERT_REQUIRED
    assert (signed, signed and not pool.tls_allow_invalid_hostnames) == checks


def test_tls_is_off_where_that_is_said_and_takes_no_context() -> None:
    assert _client(MongoOptions(host="localhost", ssl=False)).options.pool_options._ssl_context is None
    with pytest.raises(BadOption, match="tlsCAFile"):
        _client(MongoOptions(host="localhost", ssl=create_default_context()))


@pytest.mark.parametrize(
    "options",
    [
        {"url": "mongodb://localhost:port/db"},
        {"url": "mongodb://ada:s3cr:et@localhost/db"},
        {"url": "http://localhost/db"},
        {"url": "mongodb://localhost/db?colour=blue"},
        {"url": "mongodb://localhost/db", "host": "localhost"},
        {"url": "mongodb://localhost/db?readPreference=somewhere"},
        {"url": "mongodb://localhost/db?w=0"},
        {},
        {"client": object(), "host": "localhost"},
        {"client": MongoClient(connect=False)},
    ],
)
async def test_an_address_without_meaning_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(BadOption) as told:
        await MongoDriver.open(MongoOptions(**options))
    assert "s3cr" not in str(told.value)


def test_a_url_names_the_database_and_ours_name_the_collection() -> None:
    def options(url: str) -> Any:
        return parse(url).options

    found = options("mongodb://ada:s3cret@h1:1,h2:2/my-app?replicaSet=rs&kv.collection=kv&kv.pool_max=4")
    assert (found.database, found.collection, found.pool_max) == ("my-app", "kv", 4)
    assert found.url == "mongodb://ada:s3cret@h1:1,h2:2/my-app?replicaSet=rs"
    assert "s3cret" not in repr(found)
    assert "s3cret" not in repr(MongoOptions(host="h", username="ada", password="s3cret"))
    found = options("mongodb+srv://cluster.example")
    assert (found.database, found.collection) == ("kvpersist", "storage")
    for wrong in ("mongodb://h/a$b", "mongodb://h/db?kv.collection=a.b", "mongodb://h/?kv.collection=system-x"):
        with pytest.raises(BadOption):
            options(wrong)


async def test_a_mapping_and_a_ready_client_lead_to_the_server(place: Place) -> None:
    with MongoClient(place.url) as client:
        [(host, port)] = client.nodes or [client.address]
    ready = AsyncMongoClient(place.url, tz_aware=True)
    for where in (
        {"type": "mongodb", "host": host, "port": port, "database": place.database},
        {"type": "mongodb", "client": ready, "database": place.database},
        {"url": place.url, "pool_max": 2},
    ):
        async with kvpersist.open_store(where) as store:
            await store.put("greeting", "hello", ttl=60)
            assert await store.get("greeting") == "hello"

    assert (await ready.admin.command("ping"))["ok"] == 1
    await ready.close()


@pytest.mark.parametrize("module", ["pymongo"])
def test_without_its_client_it_says_what_to_install(module: str) -> None:
    program = f"import sys; sys.modules[{module!r}] = None\nimport asyncio, kvpersist\n"
    program += "async def main(): await kvpersist.open_store('mongodb://localhost')\nasyncio.run(main())"

    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)

    assert "pip install 'kvpersist[mongo]'" in done.stderr


# -- failures ------------------------------------------------------------------------------------


async def test_a_server_that_is_not_there_is_told_in_time() -> None:
    began = time.monotonic()
    with pytest.raises(Unavailable, match=r"127\.0\.0\.1:1"):
        await MongoDriver.open(MongoOptions(url="mongodb://ada:s3cret@127.0.0.1:1/db", connect_timeout=0.3))
    assert time.monotonic() - began < 2


async def test_a_refused_user_is_told_and_not_tried_again(place: Place) -> None:
    url = place.url.replace("://", "://ada:wr0ng@")
    with pytest.raises(BadOption, match="refuses this user or password") as told:
        await MongoDriver.open(place.options(url=url))
    assert not told.value.retryable
    assert "wr0ng" not in str(told.value)


async def test_of_a_long_batch_nothing_is_written_behind_a_condition_that_fails(place: Place) -> None:
    async with place.opened() as driver:
        await driver.commit([batch(Put("c:005", b"there"))])

        long = batch(*(Put(f"c:{number:03}", b"new", ABSENT) for number in range(300)))
        [lost, beside] = await driver.commit([long, batch(Put("d:a", b"1", ABSENT), Put("d:b", b"2", ABSENT))])

        assert isinstance(lost, Conflict)
        assert (lost.key, lost.position) == ("c:005", 5)
        assert isinstance(beside, Committed)
        assert [entry.key for entry in await driver.scan("c:", None, limit=1000)] == [
            *(f"c:{number:03}" for number in range(6)),
            "d:a",
            "d:b",
        ]


async def test_a_pool_that_is_used_up_is_told_as_such(place: Place) -> None:
    async with place.opened(pool_max=1, connect_timeout=0.2) as driver:
        await driver.commit([batch(Put("c:a", b"x" * 5_000_000))])

        answers = await asyncio.gather(*(driver.get(["c:a", "c:b"]) for _ in range(60)), return_exceptions=True)

        failed = [answer for answer in answers if isinstance(answer, BaseException)]
        assert failed
        assert all(type(error) is PoolExhausted for error in failed), failed
        assert isinstance(failed[0], PoolExhausted)
        assert (failed[0].size, failed[0].in_use, failed[0].seconds) == (1, 1, 0.2)
        assert (await driver.get(["c:a"]))[0] is not None
        assert _in_use(driver) == 0


def _in_use(driver: MongoDriver) -> int:
    """Connections that are out of the pools of the client."""
    return sum(server.pool.active_sockets for server in driver._client._topology._servers.values())


async def test_two_hundred_cancelled_calls_mix_up_no_answers(place: Place) -> None:
    keys = [f"c:{number:03}" for number in range(40)]
    chance = random.Random(7)
    wrong: list[Any] = []
    cancelled = answered = 0
    async with place.opened(pool_max=8) as driver:
        await driver.commit([batch(Put(key, key.encode())) for key in keys])

        async def ask(key: str) -> None:
            nonlocal answered
            match chance.randrange(4):
                case 0 | 1:
                    found = await driver.get([key])
                    wrong.extend(entry for entry in found if entry is None or entry.value != key.encode())
                case 2:
                    found = await driver.scan(key, key + "\x00", limit=3)
                    wrong.extend([key] * ([entry.key for entry in found] != [key]))
                case _:
                    one = batch(Put(key, key.encode()))
                    outcome = await driver.commit([one])
                    wrong.extend([outcome] * (outcome != [Committed(one.version)]))
            answered += 1

        async def later(task: asyncio.Task[None], delay: float) -> None:
            await asyncio.sleep(delay)
            task.cancel()

        while cancelled < 200:
            tasks = [asyncio.create_task(ask(chance.choice(keys))) for _ in range(24)]
            stops = [asyncio.create_task(later(task, chance.random() * 0.05)) for task in tasks[::2]]
            answers = await asyncio.gather(*tasks, return_exceptions=True)
            await asyncio.gather(*stops)
            cancelled += sum(isinstance(answer, asyncio.CancelledError) for answer in answers)
            assert all(answer is None or isinstance(answer, asyncio.CancelledError) for answer in answers), answers

        assert wrong == []
        assert answered > 50
        assert [entry and entry.value for entry in await driver.get(keys)] == [key.encode() for key in keys]
        while driver._under_way:
            await asyncio.wait(driver._under_way)
        assert _in_use(driver) == 0


async def test_a_closed_driver_leaves_a_ready_client_open(place: Place) -> None:
    async with AsyncMongoClient(place.url) as client:
        driver = await MongoDriver.over(client, database=place.database)

        await driver.close()

        assert (await client.admin.command("ping"))["ok"] == 1
        with pytest.raises(StoreClosed):
            await driver.get(["c:a"])


async def test_a_driver_that_could_not_be_opened_leaves_nothing_open(place: Place) -> None:
    with pytest.raises(KvError):
        await MongoDriver.open(place.options(url=place.url.replace("://", "://ada:wr0ng@")))
    gc.collect()  # an open socket would warn, and warnings are errors


class TestFaults:
    """Through a proxy that cuts, stalls and refuses."""

    @pytest.fixture
    def proxy(self, place: Place) -> Iterator[Any]:
        from proxy import Proxy

        with Proxy.before(place.url) as proxy:
            yield proxy

    @pytest.fixture
    async def behind(self, place: Place, proxy: Any) -> AsyncIterator[MongoDriver]:
        async with place.opened(url=proxy.url + "?directConnection=true", connect_timeout=1.0) as driver:
            yield driver
            proxy.heal()

    async def test_a_commit_whose_answer_is_lost_is_unknown_and_a_read_is_not(
        self, place: Place, proxy: Any, behind: MongoDriver, driver: MongoDriver
    ) -> None:
        await behind.commit([batch(Put("c:warm", b"1"))])
        behind._turns = None  # whose own answer would be lost first
        proxy.cut_after(0)

        [outcome] = await behind.commit([batch(Put("c:a", b"MARK"))])
        with pytest.raises(Unavailable):
            await behind.get(["c:a"])

        assert isinstance(outcome, CommitUnknown)
        assert outcome.keys == ("c:a",)
        proxy.heal()
        assert [entry and entry.value for entry in await driver.get(["c:a"])] == [b"MARK"]
        assert [entry and entry.value for entry in await behind.get(["c:a"])] == [b"MARK"]

    async def test_a_server_that_goes_and_comes_back_is_used_again(self, proxy: Any, behind: MongoDriver) -> None:
        await behind.commit([batch(Put("c:a", b"1"))])

        proxy.refuse()
        proxy.cut()
        for _ in range(2):
            began = time.monotonic()
            with pytest.raises(Unavailable):
                await behind.get(["c:a"])
            with pytest.raises(Unavailable):  # nothing was sent
                await behind.commit([batch(Put("c:b", b"2"))])
            assert time.monotonic() - began < 4
        proxy.heal()

        [outcome] = await behind.commit([batch(Put("c:b", b"2"))])
        assert isinstance(outcome, Committed)
        assert [entry and entry.value for entry in await behind.get(["c:a", "c:b"])] == [b"1", b"2"]
        assert _in_use(behind) == 0

    async def test_a_server_that_is_silent_costs_no_more_than_the_deadline(
        self, proxy: Any, behind: MongoDriver
    ) -> None:
        store = kvpersist.Store(behind, timeout=1.0)
        await store.put("c:a", 1)
        proxy.stall()

        began = time.monotonic()
        with pytest.raises(Unavailable):
            await store.get("c:a")
        with pytest.raises(CommitUnknown):
            await store.put("c:b", 1)
        assert time.monotonic() - began < 6
        proxy.heal()
        while behind._under_way:
            await asyncio.wait(behind._under_way)

        assert await store.get("c:a") == 1
        await store.put("c:c", 2)
        await store.close()

    async def test_calls_to_a_silent_server_end_when_the_driver_is_closed(
        self, proxy: Any, behind: MongoDriver
    ) -> None:
        await behind.commit([batch(Put("c:a", b"1"))])
        proxy.stall()
        calls = [
            asyncio.ensure_future(behind.get(["c:a"])),
            asyncio.ensure_future(behind.commit([batch(Delete("c:a"))])),
        ]
        await asyncio.sleep(0.05)

        async with asyncio.timeout(6):
            await behind.close()
            answers = await asyncio.gather(*calls, return_exceptions=True)

        assert all(isinstance(answer, KvError) for answer in answers), answers

    async def test_answers_that_are_cut_in_the_middle_are_never_taken_for_whole(
        self, proxy: Any, behind: MongoDriver
    ) -> None:
        value = os.urandom(20_000)
        await behind.commit([batch(Put("c:a", value))])
        for left in (1, 16, 21, 100, 5_000, 20_050):
            proxy.cut_after(left)
            with pytest.raises(Unavailable):
                await behind.get(["c:a"])
            proxy.heal()
            [entry] = await behind.get(["c:a"])
            assert entry is not None
            assert entry.value == value


# -- turns, on FerretDB 1.x ------------------------------------------------------------------------


async def test_ferretdb_itself_tells_several_that_they_replaced_one_version(place: Place) -> None:
    async with AsyncMongoClient(place.url) as client:
        collection = client[place.database]["raw"]
        won = 0
        for number in range(12):
            await collection.insert_one({"_id": number, "r": b"0"})
            swaps = (collection.replace_one({"_id": number, "r": b"0"}, {"r": b"%d" % n}) for n in range(1, 17))
            won += sum(swap.matched_count for swap in await asyncio.gather(*swaps))

    assert won > 12  # the day this fails, turns can go


async def test_a_turn_whose_holder_died_ends(
    place: Place, driver: MongoDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_turns, "_LEASE", 0.3)
    place.insert({"_id": "dead", "turn": 1}, "kvpersist_turn")

    [outcome] = await driver.commit([batch(Put("c:a", b"1"))])

    assert isinstance(outcome, Committed)


async def test_a_turn_that_is_taken_is_waited_for_and_no_longer_than_is_patient(
    place: Place, driver: MongoDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_turns, "_PATIENCE", 0.2)
    place.insert({"_id": "alive", "turn": 1}, "kvpersist_turn")

    with pytest.raises(Busy):
        await driver.commit([batch(Put("c:a", b"1"))])

    assert await driver.get(["c:a"]) == [None]
    assert await driver.commit([]) == []


async def test_a_drain_larger_than_the_server_can_take_is_cut(heard: tuple[MongoDriver, Heard]) -> None:
    driver, listener = heard
    keys = [f"c:{number:03}" for number in range(150)]
    await driver.commit([batch(Put(key, b"1", ABSENT)) for key in keys])
    listener.commands.clear()

    outcomes = await driver.commit([batch(Put(key, b"2")) for key in keys])

    assert all(isinstance(outcome, Committed) for outcome in outcomes)
    assert listener.commands == ["update"] * 3
    assert [entry and entry.value for entry in await driver.get(keys)] == [b"2"] * 150


async def test_a_cut_drain_that_stops_is_unknown(mocked: MongoDriver, mock: MockClient) -> None:
    mocked._entries.at_once = 2

    def stop() -> None:
        mock.fail["update"] = OperationFailure("not yours", 13)

    mock.after["update"] = stop
    outcomes = await mocked.commit([batch(Put(key, b"1")) for key in FIELDS])

    assert [type(outcome) for outcome in outcomes] == [CommitUnknown] * 4
    assert [entry and entry.value for entry in await mocked.get(FIELDS)] == [b"1", b"1", None, None]


async def test_a_holder_that_takes_long_is_not_taken_for_dead(
    place: Place, driver: MongoDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_turns, "_LEASE", 1.0)
    monkeypatch.setattr(_turns, "_BEAT", 0.2)
    replace = driver._entries.replace

    async def slowly(*arguments: Any, **options: Any) -> Any:
        await asyncio.sleep(2.5)
        return await replace(*arguments, **options)

    monkeypatch.setattr(driver._entries, "replace", slowly)
    async with place.opened() as other:
        slow = asyncio.ensure_future(driver.commit([batch(Put("c:a", b"slow"))]))
        await asyncio.sleep(0.3)

        [quick] = await other.commit([batch(Put("c:a", b"quick"))])

        assert isinstance(quick, Committed)
        assert slow.done()
        assert isinstance((await slow)[0], Committed)
        assert [entry and entry.value for entry in await other.get(["c:a"])] == [b"quick"]


async def test_a_holder_that_was_taken_for_dead_gives_up(
    place: Place, driver: MongoDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_turns, "_BEAT", 0.2)

    async def robbed(*_: Any, **__: Any) -> Any:
        await driver._turns._collection.delete_many({})
        await asyncio.sleep(60)

    with monkeypatch.context() as patch:
        patch.setattr(driver._entries, "replace", robbed)
        with pytest.raises(CommitUnknown, match="dead"):
            await driver.commit([batch(Put("c:a", b"1"))])

    [outcome] = await driver.commit([batch(Put("c:a", b"1"))])
    assert isinstance(outcome, Committed)


async def test_a_cancelled_commit_gives_its_turn_back(place: Place, driver: MongoDriver) -> None:
    async with place.opened() as other:
        for _ in range(10):
            call = asyncio.ensure_future(driver.commit([batch(Put("c:a", b"1"))]))
            await asyncio.sleep(0.002)
            call.cancel()
            await asyncio.wait([call])

            async with asyncio.timeout(5):
                [outcome] = await other.commit([batch(Put("c:b", b"1"))])
            assert isinstance(outcome, Committed)


# -- the agents' records ---------------------------------------------------------------------------


async def test_turns_tool_calls_and_unique_values_are_kept_and_found(place: Place) -> None:
    url = place.url
    async with kvpersist.open(url) as db:
        session = await db.sessions.create(user_id="ada", title="Late parcel")
        ask = Message("assistant", tool_calls=[ToolCallPart("c1", "track", {"parcel": 7})])
        await db.messages.append_many(session.id, [Message("user", "where?"), ask])
        await db.messages.append(session.id, Message("tool", "in Oslo", tool_call_id="c1"))
        people = db.repository(dict, name="person", key="id", indexes=[kvpersist.Index("email", unique=True, type=str)])
        await people.put({"id": "1", "email": "ada@example.org"})

        with pytest.raises(UniqueConflict):
            await people.put({"id": "2", "email": "ada@example.org"})
        await people.put({"id": "1", "email": "lovelace@example.org"})
        await people.put({"id": "2", "email": "ada@example.org"})
    async with kvpersist.open(url) as db:
        people = db.repository(dict, name="person", key="id", indexes=[kvpersist.Index("email", unique=True, type=str)])
        assert [message.number for message in await db.messages.last(session.id, 50)] == [1, 2, 3]
        assert [found.id for found in await db.sessions.find(user_id="ada")] == [session.id]
        assert [call.result for call in await db.tool_calls.find(name="track")] == ["in Oslo"]
        assert [person["id"] for person in await people.find(email="ada@example.org")] == ["2"]
        await db.sessions.delete(session.id)
        assert await db.messages.last(session.id, 5) == []


APPEND = """
import asyncio, sys
import kvpersist
from kvpersist import Message

async def main(url, name, count):
    async with kvpersist.open(url) as db:
        for number in range(count):
            await db.messages.append("s", Message("user", f"{name}.{number}"))

asyncio.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3])))
"""


async def test_two_processes_append_to_one_session_without_gap_or_loss(place: Place) -> None:
    url, count = f"{place.url}?kv.timeout=60", 15
    async with kvpersist.open(url) as db:
        await db.sessions.create(id="s")
        writers = [
            subprocess.Popen(
                [sys.executable, "-c", APPEND, url, name, str(count)],
                env=os.environ | {"PYTHONPATH": os.pathsep.join(each for each in sys.path if each)},
                stderr=subprocess.PIPE,
                text=True,
            )
            for name in "ab"
        ]
        errors = await asyncio.gather(*(asyncio.to_thread(writer.communicate) for writer in writers))

        assert [writer.returncode for writer in writers] == [0, 0], errors
        messages = await db.messages.last("s", 100)
        assert [message.number for message in messages] == list(range(1, 2 * count + 1))
        for name in "ab":
            own = [str(message.content) for message in messages if str(message.content).startswith(name)]
            assert own == [f"{name}.{number}" for number in range(count)]
        stat = await db.sessions.stat("s")
        assert stat is not None
        assert (stat.last, stat.messages) == (2 * count, 2 * count)
        assert await db._all.messages.verify() == []
