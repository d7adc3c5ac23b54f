"""The bucket driver: the contract and the model on three services and on plain file systems, and what is its own."""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Self
from urllib.parse import quote
from urllib.request import Request, urlopen

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

import kvpersist
from kvpersist import Index, Message, Repository, ToolCallPart
from kvpersist.driver import ABSENT, HEADER_BYTES, Check, Committed, Delete, Entry, Put
from kvpersist.errors import (
    BadKey,
    BadOption,
    Busy,
    CommitUnknown,
    Conflict,
    CorruptRecord,
    KeyTooLong,
    ReadOnly,
    StoreClosed,
    Unavailable,
    UniqueConflict,
    Unsupported,
)
from kvpersist.testing import AWKWARD_KEYS, DriverContract, batch, driver_machine
from kvpersist.testing.clock import ManualClock
from kvpersist_drivers.buckets import BucketDriver, BucketOptions
from kvpersist_drivers.buckets._names import before, behind, escaped, unescaped
from kvpersist_drivers.buckets._records import Records
from kvpersist_drivers.buckets._store import Changed

Service = Callable[[str], dict[str, str]]
Place = dict[str, Any]

_DAY = 86400.0


def _s3(service: Service) -> Place:
    found = service("s3")
    return {
        "url": f"{found['KVPERSIST_TEST_S3_URL']}/t{os.urandom(6).hex()}",
        "endpoint_url": found["KVPERSIST_TEST_S3_ENDPOINT"],
        "key": found["KVPERSIST_TEST_S3_KEY"],
        "secret": found["KVPERSIST_TEST_S3_SECRET"],
    }


def _gcs(service: Service) -> Place:
    endpoint = service("gcs")["KVPERSIST_TEST_GCS_ENDPOINT"]
    bucket = f"t{os.urandom(6).hex()}"  # of its own: the emulator looks at all of a bucket for each listing
    body = json.dumps({"name": bucket}).encode()
    request = Request(f"{endpoint}/storage/v1/b?project=test", body, {"Content-Type": "application/json"})
    with urlopen(request, timeout=30) as answer:
        assert answer.status == 200
    return {"url": f"gs://{bucket}/p", "endpoint_url": endpoint, "token": "anon", "project": "test"}


def _azure(service: Service) -> Place:
    from azure.storage.blob import BlobServiceClient

    connection = service("azure")["KVPERSIST_TEST_AZURE_CONNECTION_STRING"]
    container = f"t{os.urandom(6).hex()}"  # for the same reason
    with BlobServiceClient.from_connection_string(connection) as client:
        client.create_container(container).close()
    return {"url": f"az://{container}/p", "connection_string": connection}


def _memory(service: Service) -> Place:
    return {"url": f"dir::memory://b{os.urandom(6).hex()}/p"}


_SERVICES = {"s3": _s3, "gcs": _gcs, "azure": _azure}


@asynccontextmanager
async def _opened(place: Place, **options: Any) -> AsyncIterator[BucketDriver]:
    driver = await BucketDriver.open(BucketOptions(**place, **options))
    try:
        yield driver
    finally:
        await driver.close()


@pytest.fixture(params=_SERVICES)
def place(request: pytest.FixtureRequest, service: Service) -> Place:
    return _SERVICES[request.param](service)


@pytest.fixture
async def any_bucket(place: Place) -> AsyncIterator[BucketDriver]:
    """A driver on each of the services."""
    async with _opened(place) as driver:
        yield driver


@pytest.fixture
async def bucket(service: Service) -> AsyncIterator[BucketDriver]:
    """A driver on S3."""
    async with _opened(_s3(service)) as driver:
        yield driver


async def _raw(driver: BucketDriver, name: str) -> bytes | None:
    """Read an object with the service's own client."""
    store: Any = driver._store
    if type(store).__name__ == "S3Store":
        client = store._fs._s3
        try:
            answer = await client.get_object(Bucket=store._bucket, Key=name)
        except client.exceptions.NoSuchKey:
            return None
        return await answer["Body"].read()
    if type(store).__name__ == "GcsStore":
        url = f"{store._fs._location}/download/storage/v1/b/{store._bucket}/o/{quote(name, safe='')}?alt=media"
        async with store._fs.session.get(_encoded(url)) as answer:
            return None if answer.status == 404 else await answer.read()
    if type(store).__name__ == "AzureStore":
        from azure.core.exceptions import ResourceNotFoundError

        try:
            return await (await store._container.download_blob(name)).readall()
        except ResourceNotFoundError:
            return None
    path = store._path(name)
    return store._fs.sync_fs.cat_file(path) if store._fs.sync_fs.exists(path) else None


def _encoded(url: str) -> Any:
    from yarl import URL

    return URL(url, encoded=True)


async def _names(driver: BucketDriver) -> list[str]:
    listed, more = await driver._store.list(driver._root, driver._root, 1000)
    assert not more
    return [item.name[len(driver._root) :] for item in listed]


@pytest.mark.timeout(300)
class _Contract(DriverContract[BucketDriver]):
    __test__ = False
    place: Callable[[Service], Place]

    @pytest.fixture
    async def driver(self, service: Service) -> AsyncIterator[BucketDriver]:
        self._options = type(self).place(service)
        async with _opened(self._options) as driver:
            yield driver

    async def peek(self, driver: BucketDriver, key: str) -> bytes | None:
        body = await _raw(driver, driver._root + escaped(key))
        return None if body is None or len(body) < HEADER_BYTES else body[HEADER_BYTES:]

    async def reopen(self, driver: BucketDriver) -> BucketDriver:
        return await BucketDriver.open(BucketOptions(**self._options))


class TestS3(_Contract):
    place = staticmethod(_s3)


class TestGcs(_Contract):
    place = staticmethod(_gcs)


class TestAzure(_Contract):
    place = staticmethod(_azure)


class TestMemory(_Contract):
    """Quick, and without a server: what needs no conditions."""

    place = staticmethod(_memory)


class TestFolder(_Contract):
    """A folder of this machine, reached through fsspec."""

    @pytest.fixture
    async def driver(self, tmp_path: Path) -> AsyncIterator[BucketDriver]:
        self._options = {"url": f"local://{tmp_path}/bucket"}
        async with _opened(self._options) as driver:
            yield driver


class TestS3OverAFileSystem(_Contract):
    @pytest.fixture
    async def driver(self, service: Service) -> AsyncIterator[BucketDriver]:
        from s3fs import S3FileSystem

        self._options = _s3(service)
        given = {name: value for name, value in self._options.items() if name != "url"}
        client = S3FileSystem(asynchronous=True, skip_instance_cache=True, use_listings_cache=False, **given)
        session = await client.set_session()
        driver = await BucketDriver.over(client, self._options["url"].removeprefix("s3://"))
        yield driver
        await driver.close()
        assert (await session.list_buckets())["Buckets"]
        await client._s3creator.__aexit__(None, None, None)


class TestModel:
    @pytest.mark.timeout(600)
    @pytest.mark.parametrize("kind", [*_SERVICES, "memory"])
    def test_the_driver_does_what_a_dict_does(self, kind: str, service: Service) -> None:
        from hypothesis import settings
        from hypothesis.stateful import run_state_machine_as_test

        made = _SERVICES.get(kind, _memory)
        made(service)  # skips here where there is none
        places: dict[str, Place] = {}

        async def open_new() -> BucketDriver:
            place = made(service)
            driver = await BucketDriver.open(BucketOptions(**place))
            places[driver._root or place["url"]] = place
            return driver

        async def open_again(closed: BucketDriver) -> BucketDriver:
            return await BucketDriver.open(BucketOptions(**places[closed._root or closed._store.where]))

        machine = driver_machine(open_new, reopener=open_again)
        examples, steps = (40, 20) if kind == "memory" else (5, 12)
        few = settings(max_examples=examples, stateful_step_count=steps, deadline=None)
        run_state_machine_as_test(machine, settings=few)


# -- names ---------------------------------------------------------------------------------------


@given(st.lists(st.text(st.characters(codec="utf-8"), min_size=1, max_size=300), min_size=2, max_size=8))
def test_names_are_in_the_order_of_their_keys_by_utf_8_and_by_utf_16(keys: list[str]) -> None:
    ordered = sorted(set(keys), key=str.encode)
    names = [escaped(key) for key in ordered]

    assert sorted(names, key=str.encode) == names
    assert sorted(names, key=lambda name: name.encode("utf-16-be")) == names
    assert [unescaped(name) for name in names] == ordered


def test_names_of_awkward_keys_hold_nothing_that_a_service_refuses() -> None:
    for key in (*AWKWARD_KEYS, "x" * 512, "\U0001f600" * 128, "/" * 512, "".join(map(chr, range(256)))):
        name = escaped(key)
        assert unescaped(name) == key
        assert not set(name) & set("\x00\r\n\t\\\x7f\x85")
        assert max(map(ord, name)) <= 0xFF5E
        for part in name.split("/"):
            assert 0 < len(part.encode()) <= 255
            assert not part.endswith((".", " "))


def test_what_is_no_name_of_a_key_has_no_key() -> None:
    for name in (
        "",
        "a/b",
        "a.",
        "a.3",
        "a 2",
        "a 4G",
        "[",
        "a\\b",
        "~",
        "~20",
        "\uff5e",
        "\uff5ezzzz",
        "\ue000",
        ".0/x",
    ):
        assert unescaped(name) is None, name


@given(st.text(st.characters(codec="utf-8"), min_size=1, max_size=8), st.text(st.characters(codec="utf-8"), min_size=1))
def test_a_listing_that_starts_before_a_name_begins_with_it(key: str, other: str) -> None:
    name, rest = escaped(key), escaped(other)
    start = before(name).encode()

    assert start < name.encode()
    if other.encode() < key.encode():
        assert rest.encode() <= start
    assert (rest.encode() >= behind(name).encode()) == (other.encode() > key.encode())


async def test_a_key_whose_name_would_be_too_long_is_refused_and_its_prefix_counts(service: Service) -> None:
    place = _s3(service)
    place["url"] += "/" + "p" * 200 + "/" + "q" * 200
    async with _opened(place) as driver:
        fits, long = "/" * 280, "/" * 300  # two bytes each

        [kept, refused] = await driver.commit([batch(Put(fits, b"1")), batch(Put(long, b"2"))])

        assert isinstance(kept, Committed)
        assert isinstance(refused, KeyTooLong)
        assert [entry and entry.value for entry in await driver.get([fits, long])] == [b"1", None]
        assert [entry.key for entry in await driver.scan(None, None, limit=5)] == [fits]


async def test_a_key_that_is_no_text_is_refused(bucket: BucketDriver) -> None:
    [outcome] = await bucket.commit([batch(Put("c:\ud800", b"v"))])

    assert isinstance(outcome, BadKey)
    with pytest.raises(BadKey):
        await bucket.get(["c:\udfff"])


# -- what is sent --------------------------------------------------------------------------------


async def test_an_unconditional_put_of_a_new_key_a_get_and_a_delete_are_one_request_each(
    any_bucket: BucketDriver,
) -> None:
    store = any_bucket._store
    counts: list[int] = []
    for call in (
        any_bucket.commit([batch(Put("c:a", b"v"))]),
        any_bucket.get(["c:a"]),
        any_bucket.commit([batch(Delete("c:a"))]),
    ):
        before_it = store.calls
        await call
        counts.append(store.calls - before_it)

    assert counts == [1, 1, 1]


async def test_a_conditional_put_takes_two_requests_and_one_where_the_entry_was_seen(
    place: Place, any_bucket: BucketDriver
) -> None:
    first, second, third = batch(Put("c:a", b"1", ABSENT)), batch(), batch()
    async with _opened(place) as other:
        counts: list[int] = []
        for driver, put, version in (
            (any_bucket, Put("c:a", b"1", ABSENT), first.version),
            (other, Put("c:a", b"2", first.version), second.version),
            (other, Put("c:a", b"3", second.version), third.version),
        ):
            before_it = driver._store.calls
            assert await driver.commit([batch(put, version=version)]) == [Committed(version)]
            counts.append(driver._store.calls - before_it)
        assert counts == [1, 2, 1]

        # what the first remembers is stale: it finds out, and says what is there
        [lost] = await any_bucket.commit([batch(Put("c:a", b"4", first.version))])
        assert isinstance(lost, Conflict)
        assert lost.found == third.version


async def test_a_scan_reads_names_once_and_each_entry_once_and_no_entry_that_it_remembers(
    bucket: BucketDriver,
) -> None:
    await bucket.commit([batch(Put(f"c:{number:02}", b"v")) for number in range(20)])
    start = bucket._store.calls

    await bucket.scan("c:", "c;", limit=100)
    with_values = bucket._store.calls - start
    await bucket.scan("c:", "c;", limit=100, keys_only=True)
    keys_only = bucket._store.calls - start - with_values

    assert (with_values, keys_only) == (21, 1)


async def test_opening_asks_little_and_leaves_nothing(any_bucket: BucketDriver) -> None:
    assert any_bucket._store.calls <= 12
    assert await _names(any_bucket) == []


async def test_what_a_service_keeps_is_found_out(service: Service) -> None:
    for kind, deletes in (("s3", False), ("gcs", False), ("azure", True)):
        async with _opened(_SERVICES[kind](service)) as driver:
            able = driver.capabilities
            assert (able.conditional, able.conditional_delete, able.ordered, able.shared) == (True, True, True, True)
            assert driver._records.able.delete is deletes, kind
    async with _opened(_memory(service)) as driver:
        assert not driver.capabilities.conditional
        assert not driver.capabilities.shared


# -- many at once --------------------------------------------------------------------------------


class _Gate:
    """Stands before a store's puts of one name, and lets them through when told."""

    def __init__(self, driver: BucketDriver, key: str) -> None:
        self.open = asyncio.Event()
        self.arrived = asyncio.Event()
        self.under_way = self.most = 0
        name, put = driver._root + escaped(key), driver._store.put

        async def gated(called: str, body: bytes, condition: str | None = None) -> str:
            self.under_way += 1
            self.most = max(self.most, self.under_way)
            try:
                if called == name and not self.open.is_set():
                    self.arrived.set()
                    await self.open.wait()
                return await put(called, body, condition)
            finally:
                self.under_way -= 1

        driver._store.put = gated  # type: ignore[method-assign]


async def test_a_slow_write_does_not_stall_the_others(bucket: BucketDriver) -> None:
    gate = _Gate(bucket, "c:slow")
    slow = asyncio.ensure_future(bucket.commit([batch(Put("c:slow", b"v"))]))
    await gate.arrived.wait()

    outcomes = await bucket.commit([batch(Put(f"c:{number}", b"v")) for number in range(40)])
    read = await bucket.get(["c:1"])

    assert all(isinstance(outcome, Committed) for outcome in outcomes)
    assert read[0] is not None
    assert not slow.done()
    gate.open.set()
    assert isinstance((await slow)[0], Committed)


async def test_two_puts_of_a_key_apply_in_their_order_also_when_the_first_is_given_up(bucket: BucketDriver) -> None:
    gate = _Gate(bucket, "c:a")
    first = asyncio.ensure_future(bucket.commit([batch(Put("c:a", b"1"))]))
    await gate.arrived.wait()
    second = asyncio.ensure_future(bucket.commit([batch(Put("c:a", b"2"))]))
    third = asyncio.ensure_future(bucket.commit([batch(Put("c:a", b"3"))]))
    await asyncio.sleep(0)
    first.cancel()
    second.cancel()
    await asyncio.wait([first, second])
    await asyncio.sleep(0.05)

    assert not third.done()  # the request of the first is still out
    gate.open.set()
    await third

    assert [entry and entry.value for entry in await bucket.get(["c:a"])] == [b"3"]


async def test_no_more_writes_are_under_way_than_allowed(service: Service) -> None:
    async with _opened(_s3(service), concurrency=4) as driver:
        gate = _Gate(driver, "c:none")

        await driver.commit([batch(Put(f"c:{number}", b"v")) for number in range(30)])

        assert gate.most == 4


async def test_after_many_cancelled_calls_the_driver_works_and_answers_right(bucket: BucketDriver) -> None:
    await bucket.commit([batch(Put(f"c:{number}", b"%d" % number)) for number in range(20)])
    for attempt in range(200):
        key = f"c:{attempt % 20}"
        calls: list[asyncio.Future[Any]] = [
            asyncio.ensure_future(bucket.get([key])),
            asyncio.ensure_future(bucket.commit([batch(Put(f"d:{attempt}", b"v"))])),
        ]
        await asyncio.sleep(0.001 * (attempt % 5))
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)

    answers = await asyncio.gather(*(bucket.get([f"c:{number}"]) for number in range(20)))

    assert [entry and entry.value for [entry] in answers] == [b"%d" % number for number in range(20)]
    async with asyncio.timeout(5):
        await bucket._queue.drain(4)
    assert not bucket._queue.jobs
    assert not bucket._queue._last
    assert bucket._reading._value == bucket._writing._value == 32


# -- what is left of deleted and expired entries -------------------------------------------------


async def test_a_tombstone_hides_its_entry_and_is_written_over(service: Service) -> None:
    place = _s3(service)
    async with _opened(place) as driver, _opened(place) as other:
        one = batch(Put("c:a", b"1"))
        await driver.commit([one])
        assert isinstance((await driver.commit([batch(Delete("c:a", one.version))]))[0], Committed)

        body = await _raw(driver, driver._root + "c:a")
        assert body is not None
        assert len(body) < HEADER_BYTES
        for reader in (driver, other):
            assert await reader.get(["c:a"]) == [None]
            assert await reader.scan(None, None, limit=5) == []
            assert await reader.read_stream("c:a") is None
            [checked] = await reader.commit([batch(Check("c:a", ABSENT))])
            assert isinstance(checked, Committed)

        two = batch(Put("c:a", b"2", ABSENT))
        assert await other.commit([two]) == [Committed(two.version)]
        assert await driver.get(["c:a"]) == [Entry("c:a", b"2", two.version)]


async def test_a_tombstone_is_removed_after_its_grace_in_two_steps(service: Service) -> None:
    place = _s3(service)
    async with _opened(place) as driver, _opened(place) as other:
        clock = driver.clock = other.clock = ManualClock(1_700_000_000.0)
        one = batch(Put("c:a", b"1"))
        await driver.commit([one])
        await driver.commit([batch(Delete("c:a", one.version))])
        clock.advance(_DAY - 60)
        await driver.compact()
        assert "c:a" in await _names(driver)

        clock.advance(120)
        await driver.compact()  # marks it
        assert "c:a" in await _names(driver)
        clock.advance(40)
        for put in (Put("c:a", b"2"), Put("c:a", b"2", ABSENT)):
            [busy] = await other.commit([batch(put)])
            assert isinstance(busy, Busy)
        clock.advance(30)
        await other.compact()  # is not the one who marked it
        assert "c:a" in await _names(driver)
        await driver.compact()  # removes it

        assert await _names(driver) == []
        assert isinstance((await other.commit([batch(Put("c:a", b"3", ABSENT))]))[0], Committed)


async def test_a_removal_that_was_interrupted_is_begun_anew_and_a_write_may_come_first(service: Service) -> None:
    async with _opened(_s3(service)) as driver:
        clock = driver.clock = ManualClock(1_700_000_000.0)
        for key in ("c:a", "c:b"):
            one = batch(Put(key, b"1"))
            await driver.commit([one, batch(Delete(key, one.version))])
        clock.advance(_DAY + 60)
        await driver.compact()
        clock.advance(1000)  # nobody came for the second step

        [written] = await driver.commit([batch(Put("c:a", b"2", ABSENT))])
        await driver.compact()
        clock.advance(70)
        await driver.compact()
        await driver.compact()

        assert isinstance(written, Committed)
        assert await _names(driver) == ["c:a"]
        assert [entry and entry.value for entry in await driver.get(["c:a"])] == [b"2"]


async def test_a_put_without_a_condition_does_not_go_under_a_tombstone_that_is_removed(service: Service) -> None:
    place = _s3(service)
    async with _opened(place) as driver, _opened(place) as other:
        clock = driver.clock = other.clock = ManualClock(1_700_000_000.0)
        one = batch(Put("c:a", b"1"))
        await other.commit([one])  # which remembers it
        await driver.commit([batch(Delete("c:a", one.version))])
        clock.advance(_DAY + 60)
        await driver.compact()
        clock.advance(45)
        seen, _ = other._records._seen["c:a"]
        other._records._seen["c:a"] = seen, time.monotonic() - _DAY

        [outcome] = await other.commit([batch(Put("c:a", b"2"))])

        assert isinstance(outcome, Busy)


async def test_without_a_grace_tombstones_stay(service: Service) -> None:
    async with _opened(_s3(service), grace=None) as driver:
        clock = driver.clock = ManualClock(1_700_000_000.0)
        one = batch(Put("c:a", b"1"))
        await driver.commit([one, batch(Delete("c:a", one.version))])
        clock.advance(100 * _DAY)

        await driver.compact()

        assert await _names(driver) == ["c:a"]


async def test_expired_entries_and_their_notes_go(any_bucket: BucketDriver) -> None:
    clock = any_bucket.clock = ManualClock(1_700_000_000.0)
    expiring = [Put(f"c:{number}", b"v", None, clock() + 30) for number in range(5)]
    await any_bucket.commit([batch(put) for put in expiring])
    await any_bucket.commit([batch(Put("c:0", b"kept"))])
    clock.advance(60)

    removed = await any_bucket.compact()
    for seconds in (_DAY + 60, 70, 70):  # and what is left of them
        clock.advance(seconds)
        await any_bucket.compact()

    assert removed == 4
    assert await _names(any_bucket) == ["c:0"]


async def test_what_an_interrupted_probe_left_is_hidden_and_goes(bucket: BucketDriver) -> None:
    await bucket._store.put(bucket._root + ".0/018bcfe56800-pabcB", b"probe")  # of 2023
    await bucket.commit([batch(Put(".0/x", b"v"))])

    assert [entry.key for entry in await bucket.scan(None, None, limit=10)] == [".0/x"]
    await bucket.compact()

    assert await _names(bucket) == [escaped(".0/x")]


async def test_other_objects_below_the_prefix_are_left_alone(bucket: BucketDriver) -> None:
    for name in ("a/b", "a.txt", ".0/readme", "folder/"):
        await bucket._store.put(bucket._root + name, b"somebody's, and longer than a header")
    await bucket.commit([batch(Put("b", b"v"))])

    assert [entry.key for entry in await bucket.scan(None, None, limit=10)] == ["b"]
    await bucket.compact()

    assert len(await _names(bucket)) == 5


async def test_a_damaged_header_is_found(bucket: BucketDriver) -> None:
    await bucket._store.put(bucket._root + "c:a", b"\x00" * 30)

    with pytest.raises(CorruptRecord):
        await bucket.get(["c:a"])
    with pytest.raises(CorruptRecord):
        await bucket.scan(None, None, limit=5)


# -- pieces --------------------------------------------------------------------------------------


async def _pieces(size: int, *, each: int = 1 << 20, fails: Exception | None = None) -> AsyncIterator[bytes]:
    for at in range(0, size, each):
        yield bytes([at // each % 251]) * min(each, size - at)
    if fails is not None:
        raise fails


async def _streamed(driver: BucketDriver, key: str) -> tuple[Entry, bytes]:
    found = await driver.read_stream(key)
    assert found is not None
    return found[0], b"".join([piece async for piece in found[1]])


@pytest.mark.parametrize("size", [0, 1, 100_000, (8 << 20) - HEADER_BYTES, (8 << 20) - 19, (17 << 20) + 5])
async def test_a_value_is_written_and_read_in_pieces(any_bucket: BucketDriver, size: int) -> None:
    version = os.urandom(8)

    outcome = await any_bucket.write_stream("c:a", _pieces(size), version=version)

    assert outcome == Committed(version)
    whole = b"".join([piece async for piece in _pieces(size)])
    assert await any_bucket.get(["c:a"]) == [Entry("c:a", whole, version)]
    assert await _streamed(any_bucket, "c:a") == (Entry("c:a", b"", version), whole)


@pytest.mark.parametrize("size", [100, 20 << 20])
async def test_pieces_that_fail_leave_nothing(any_bucket: BucketDriver, size: int) -> None:
    with pytest.raises(ZeroDivisionError):
        await any_bucket.write_stream("c:a", _pieces(size, fails=ZeroDivisionError()), version=os.urandom(8))

    assert await any_bucket.get(["c:a"]) == [None]
    assert await _names(any_bucket) == []
    if any_bucket._store.server.startswith("S3"):
        assert await _uploads(any_bucket) == []


async def test_a_cancelled_upload_leaves_nothing(bucket: BucketDriver) -> None:
    reached, never = asyncio.Event(), asyncio.Event()

    async def pieces() -> AsyncIterator[bytes]:
        yield bytes(9 << 20)
        reached.set()
        await never.wait()

    call = asyncio.ensure_future(bucket.write_stream("c:a", pieces(), version=os.urandom(8)))
    await reached.wait()
    assert len(await _uploads(bucket)) == 1
    call.cancel()
    await asyncio.wait([call])
    await bucket._queue.drain(5)

    assert await _uploads(bucket) == []
    assert await _names(bucket) == []


@pytest.mark.parametrize("size", [100, 20 << 20])
async def test_a_streamed_value_keeps_its_condition(any_bucket: BucketDriver, size: int) -> None:
    first, second = os.urandom(8), os.urandom(8)

    made = await any_bucket.write_stream("c:a", _pieces(size), version=first, expect=ABSENT)
    twice = await any_bucket.write_stream("c:a", _pieces(size), version=second, expect=ABSENT)
    replaced = await any_bucket.write_stream("c:a", _pieces(size), version=second, expect=first)
    stale = await any_bucket.write_stream("c:a", _pieces(size), version=os.urandom(8), expect=first)

    assert (made, replaced) == (Committed(first), Committed(second))
    assert isinstance(twice, Conflict)
    assert isinstance(stale, Conflict)
    assert (twice.found, stale.found) == (first, second)


async def test_a_write_that_comes_between_makes_a_streamed_one_fail(place: Place, any_bucket: BucketDriver) -> None:
    async with _opened(place) as other:

        async def pieces() -> AsyncIterator[bytes]:
            yield bytes(9 << 20)
            await other.commit([batch(Put("c:a", b"other"))])
            yield bytes(9 << 20)

        outcome = await any_bucket.write_stream("c:a", pieces(), version=os.urandom(8), expect=ABSENT)

        assert isinstance(outcome, Conflict)
        assert [entry and entry.value for entry in await any_bucket.get(["c:a"])] == [b"other"]


async def test_an_expiry_holds_for_streams_too(bucket: BucketDriver) -> None:
    clock = bucket.clock = ManualClock(1_700_000_000.0)
    await bucket.write_stream("c:a", _pieces(9 << 20), version=os.urandom(8), expires_at=clock() + 30)
    assert (await _streamed(bucket, "c:a"))[0].expires_at == clock() + 30

    clock.advance(60)

    assert await bucket.read_stream("c:a") is None
    assert await bucket.compact() == 1


async def test_a_stream_that_is_not_read_to_its_end_gives_its_connection_back(bucket: BucketDriver) -> None:
    await bucket.write_stream("c:a", _pieces(9 << 20), version=os.urandom(8))
    for number in range(70):  # more than there are connections
        found = await bucket.read_stream("c:a")
        assert found is not None
        if number % 2:
            await anext(aiter(found[1]))
        await found[1].aclose()  # type: ignore[attr-defined]

    assert (await bucket.get(["c:a"]))[0] is not None


async def _uploads(driver: BucketDriver) -> list[str]:
    store: Any = driver._store
    answer = await store._fs._s3.list_multipart_uploads(Bucket=store._bucket, Prefix=driver._root + "c:a")
    return [upload["Key"] for upload in answer.get("Uploads", ())]


# -- when something is wrong ---------------------------------------------------------------------


@pytest.mark.parametrize("kind", _SERVICES)
async def test_a_bucket_that_is_not_there_is_told(kind: str, service: Service) -> None:
    place = _SERVICES[kind](service)
    place["url"] = place["url"].partition("://")[0] + "://no-such-bucket-here/p"

    with pytest.raises(BadOption, match=r"no such (bucket|container)"):
        await BucketDriver.open(BucketOptions(**place))


@pytest.mark.parametrize("wrong", [{"key": "nobody"}, {"secret": "CANARY-CANARY"}])
async def test_wrong_credentials_are_told_and_not_shown(service: Service, wrong: Place) -> None:
    place = {**_s3(service), **wrong}

    with pytest.raises(BadOption) as caught:
        await BucketDriver.open(BucketOptions(**place))

    assert caught.value.option == "key"
    assert "CANARY" not in str(caught.value) + repr(caught.value) + repr(BucketOptions(**place))


async def test_a_service_that_is_down_is_unavailable(service: Service) -> None:
    for place in (
        {**_s3(service), "endpoint_url": "http://127.0.0.1:1"},
        {**_gcs(service), "endpoint_url": "http://127.0.0.1:1"},
        {
            **_azure(service),
            "connection_string": "DefaultEndpointsProtocol=http;AccountName=a;AccountKey=Y2FuYXJ5;"
            "BlobEndpoint=http://127.0.0.1:1/a;",
        },
    ):
        async with asyncio.timeout(8):
            with pytest.raises(Unavailable):
                await BucketDriver.open(BucketOptions(**place))


async def test_a_user_who_may_only_read_opens_and_is_refused_writes(service: Service) -> None:
    place = _s3(service)
    name = f"kvpersist-read-{os.urandom(4).hex()}"
    async with _opened(place) as admin:
        client: Any = admin._store._fs._s3  # type: ignore[attr-defined]
        await client.create_bucket(Bucket=name)
        allowed = {"Effect": "Allow", "Principal": {"AWS": ["*"]}}
        policy = [
            {**allowed, "Action": ["s3:GetObject"], "Resource": [f"arn:aws:s3:::{name}/*"]},
            {**allowed, "Action": ["s3:ListBucket"], "Resource": [f"arn:aws:s3:::{name}"]},
        ]
        await client.put_bucket_policy(Bucket=name, Policy=json.dumps({"Version": "2012-10-17", "Statement": policy}))
        async with kvpersist.open_store({"type": "s3", **place, "url": f"s3://{name}/p"}) as writer:
            await writer.put("c:a", 1)

        where = f"s3://{name}/p?anon=true&endpoint_url={quote(place['endpoint_url'])}"
        async with kvpersist.open_store(where) as reader:
            assert await reader.get("c:a") == 1
            assert await reader.snapshot() == {"c:a": 1}
            with pytest.raises(ReadOnly):
                await reader.put("c:a", 2)
        async with kvpersist.open(where) as db:
            assert await db.sessions.get("none") is None

        for found in (await client.list_objects_v2(Bucket=name))["Contents"]:
            await client.delete_object(Bucket=name, Key=found["Key"])
        await client.delete_bucket(Bucket=name)


class _Cut:
    """A proxy that forwards requests and, when told, drops the answers."""

    def __init__(self, target: str) -> None:
        self._host, _, port = target.removeprefix("http://").partition(":")
        self._port = int(port)
        self.cuts = False
        self._tasks: set[asyncio.Task[Any]] = set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.sleep(0)  # transports that were closed let go of their sockets

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        copies: list[asyncio.Task[None]] = []
        ends = [writer]
        try:
            answers, requests = await asyncio.open_connection(self._host, self._port)
            ends.append(requests)
            copies = [
                asyncio.create_task(self._copy(reader, requests, answers=False)),
                asyncio.create_task(self._copy(answers, writer, answers=True)),
            ]
            await asyncio.wait(copies, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for end in ends:
                end.close()
            for one in copies:
                one.cancel()
            await asyncio.gather(*copies, *(end.wait_closed() for end in ends), return_exceptions=True)

    async def _copy(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, *, answers: bool) -> None:
        while data := await source.read(1 << 16):
            if answers and self.cuts:
                break
            sink.write(data)
            await sink.drain()


async def test_a_write_whose_answer_is_lost_is_unknown_and_is_found_by_reading(service: Service) -> None:
    place = _s3(service)
    async with (
        _Cut(place["endpoint_url"]) as cut,
        _opened(place) as direct,
        _opened({**place, "endpoint_url": cut.url}) as driver,
    ):
        one = batch(Put("c:a", b"1", ABSENT))
        cut.cuts = True
        [outcome] = await driver.commit([one])
        assert isinstance(outcome, CommitUnknown)
        assert outcome.keys == ("c:a",)
        for read in (driver.get(["c:a"]), driver.scan(None, None, limit=5), driver.ping()):
            with pytest.raises(Unavailable):
                await read
        assert await direct.get(["c:a"]) == [Entry("c:a", b"1", one.version)]

        cut.cuts = False
        assert await driver.get(["c:a"]) == [Entry("c:a", b"1", one.version)]


async def test_a_batch_that_is_cut_off_in_the_middle_is_unknown(bucket: BucketDriver) -> None:
    put, name = bucket._store.put, bucket._root + "c:b"

    async def failing(called: str, body: bytes, condition: str | None = None) -> str:
        if called == name:
            raise Unavailable("too many requests")
        return await put(called, body, condition)

    bucket._store.put = failing  # type: ignore[method-assign]
    [some, none] = await bucket.commit(
        [batch(Put("c:a", b"1"), Put("c:b", b"2"), Put("c:c", b"3")), batch(Put("c:b", b"2"))]
    )

    assert isinstance(some, CommitUnknown)
    assert isinstance(none, Unavailable)
    assert [entry and entry.value for entry in await bucket.get(["c:a", "c:b", "c:c"])] == [b"1", None, None]


async def test_a_driver_that_is_closed_lets_what_is_under_way_end(bucket: BucketDriver) -> None:
    writes = [asyncio.ensure_future(bucket.commit([batch(Put(f"c:{number}", b"v"))])) for number in range(40)]
    reads = [asyncio.ensure_future(bucket.get([f"c:{number}"])) for number in range(40)]
    await asyncio.sleep(0.01)

    await bucket.close()

    for call in (*writes, *reads):
        assert call.done()
        assert isinstance(call.exception(), StoreClosed | None)


# -- where it is ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"url": "s3:///p"}, "names no bucket"),
        ({"url": "s3://ada:x@b/p"}, "no user or port"),
        ({"url": "s3://b/a//b"}, "empty parts"),
        ({"url": "s3://b/../c"}, "no '.' or '..'"),
        ({"url": "s3://b/" + "x" * 950}, "shorten it"),
        ({"url": "s3://b/p?nosuch=1", "key": "k", "secret": "s", "endpoint_url": "http://127.0.0.1:1"}, "nosuch"),
        ({"url": "fsspec://nosuch"}, "fsspec"),
        ({"url": "az://b", "connection_string": "CANARY"}, "az://b"),
    ],
)
async def test_a_place_that_cannot_be_is_refused(options: Place, says: str) -> None:
    with pytest.raises(BadOption) as caught:
        await BucketDriver.open(BucketOptions(**options))

    assert says in str(caught.value)
    assert "CANARY" not in str(caught.value)


async def test_a_cache_in_front_is_refused() -> None:
    with pytest.raises(Unsupported, match="simplecache"):
        await BucketDriver.open(BucketOptions(url="simplecache::memory://b/p"))


async def test_a_file_system_that_belongs_to_another_loop_is_refused() -> None:
    from s3fs import S3FileSystem

    with pytest.raises(BadOption, match="asynchronous=True"):
        await BucketDriver.over(S3FileSystem(key="k", secret="s", skip_instance_cache=True), "b/p")


async def test_parameters_of_the_url_are_the_file_systems(service: Service) -> None:
    place = _s3(service)
    asked = "&".join(f"{name}={quote(place[name], safe='')}" for name in ("endpoint_url", "key", "secret"))
    url = f"{place['url']}?{asked}&region=eu-west-1&use_ssl=false&kv.concurrency=5"

    async with kvpersist.open_store(url) as store:
        await store.put("c:a", 1)
        assert store.driver.capabilities.server.startswith("S3")  # type: ignore[attr-defined]
        assert "secret=***" in store.where
        assert store.driver._concurrency == 5  # type: ignore[attr-defined]
    async with kvpersist.open_store({"type": "s3", **place}) as store:
        assert await store.get("c:a") == 1


async def test_memory_of_fsspec_is_reached_by_a_chain_or_a_mapping() -> None:
    name = f"b{os.urandom(4).hex()}"
    async with kvpersist.open_store(f"dir::memory://{name}/p") as store:
        await store.put("c:a", [1, 2])
    async with kvpersist.open_store({"type": "fsspec", "url": f"memory://{name}/p"}) as store:
        assert await store.get("c:a") == [1, 2]
        with pytest.raises(Unsupported):
            await store.put("c:a", 3, expect=ABSENT)


# -- what stands on it ---------------------------------------------------------------------------


_TURN = [
    Message(role="assistant", tool_calls=[ToolCallPart("c", "search", {"q": "tea"})]),
    Message(role="tool", tool_call_id="c", content="tea: 3 found"),
    Message(role="assistant", content="three kinds of tea"),
]


class _User(msgspec.Struct, kw_only=True):
    id: str
    email: str


async def test_unique_indexes_hold(place: Place) -> None:
    async with kvpersist.open_store({"type": place["url"].partition(":")[0], **place}) as store:
        users = Repository(store, _User, name="user", key="id", indexes=[Index("email", unique=True)])
        answers = await asyncio.gather(
            *(users.put(_User(id=f"u{number}", email="same@x")) for number in range(4)), return_exceptions=True
        )

        assert sum(answer is None or isinstance(answer, bytes) for answer in answers) == 1
        assert all(isinstance(answer, UniqueConflict) for answer in answers if isinstance(answer, Exception))
        [found] = await users.find(email="same@x")
        await users.delete(found.id)
        await users.put(_User(id="u9", email="same@x"))
        assert [user.id for user in await users.find(email="same@x")] == ["u9"]


async def test_a_conversation_is_kept_listed_and_deleted(place: Place) -> None:
    where = {"type": place["url"].partition(":")[0], **place, "timeout": 60}
    async with kvpersist.open(where) as db:
        session = await db.sessions.create(user_id="ada", title="Buckets")
        for turn in range(2):
            await db.messages.append_many(session.id, [Message(role="user", content=f"{turn}?"), *_TURN])
    async with kvpersist.open(where) as db:
        assert [found.id for found in await db.sessions.find(user_id="ada")] == [session.id]
        assert [message.number for message in await db.messages.range(session.id)] == list(range(1, 9))
        assert [message.content for message in await db.messages.last(session.id, 1)] == ["three kinds of tea"]
        assert await db.sessions.delete(session.id)
        assert await db.sessions.get(session.id) is None
        assert await db.sessions.list() == []


async def test_a_write_whose_second_sending_met_the_first_is_not_told_to_have_changed_nothing() -> None:
    class Cut:
        """Its connection is cut behind a PUT that landed: sent again, it is refused, and then nothing answers."""

        where = "s3://cut"

        async def put(self, *_: object) -> str:
            raise Changed

        async def get(self, *_: object) -> None:
            raise Unavailable("could not connect")

    records = Records(Cut(), "", None)  # type: ignore[arg-type]

    with pytest.raises(CommitUnknown):
        await records.put("a", b"value", b"version!", 0, ABSENT)
