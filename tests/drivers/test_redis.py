"""The Redis driver: the contract, the model, and what is its own. On a real server, and on a fake one."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
import shutil
import ssl as tls_contexts
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from proxy import Proxy
from redis.asyncio import ConnectionPool, Redis
from redis_server import RedisServer, free_port, major_version, missing

import kvpersist
from kvpersist import Message, ToolCallPart, codec
from kvpersist.driver import ABSENT, HEADER_BYTES, Check, Committed, Delete, Put, Watches
from kvpersist.errors import (
    BadKey,
    BadOption,
    BadRequest,
    CommitUnknown,
    Conflict,
    CorruptRecord,
    KvError,
    PoolExhausted,
    ReadOnly,
    StoreClosed,
    TooManyClients,
    Unavailable,
    Unsupported,
)
from kvpersist.testing import AWKWARD_KEYS, DriverContract, batch, driver_machine
from kvpersist_drivers.redis import RedisDriver, RedisOptions
from kvpersist_drivers.redis._connections import Connections, Limits
from kvpersist_drivers.redis._plan import names_of
from kvpersist_drivers.redis._servers import Servers

_numbers = itertools.count()
_needs_redis_7 = pytest.mark.skipif(missing() is None and major_version() < 7, reason="needs Redis 7")


def _base() -> str:
    return f"t{next(_numbers)}"


def _name(driver: RedisDriver, key: str) -> str:
    space, colon, _ = key.partition(":")
    space = space if colon else ""
    return names_of(driver._base, space).prefix + key[len(space) :]


async def _peek(driver: RedisDriver, url: str, key: str) -> bytes | None:
    async with Redis.from_url(url) as client:
        stored = await client.get(_name(driver, key))
    return None if stored is None else stored[HEADER_BYTES:]


def _pool(driver: RedisDriver) -> Any:
    return driver._servers._connections


def _calls(driver: RedisDriver) -> int:
    return driver._servers.calls


@asynccontextmanager
async def _opened(server: RedisServer, **options: Any) -> AsyncIterator[RedisDriver]:
    driver = await RedisDriver.open(RedisOptions(**{"url": server.url, "base": _base(), **options}))
    try:
        yield driver
    finally:
        await driver.close()


@pytest.fixture
async def driver(redis_server: RedisServer) -> AsyncIterator[RedisDriver]:
    async with _opened(redis_server) as driver:
        yield driver


@pytest.fixture
async def raw(redis_server: RedisServer) -> AsyncIterator[Redis]:
    """A client of the same server, for looking around the driver."""
    async with Redis.from_url(redis_server.url) as client:
        yield client


@pytest.fixture
def own_server(redis_server: RedisServer) -> Iterator[RedisServer]:
    """A server that a test may stop, with its data on the disk."""
    server = RedisServer("--appendonly", "yes", "--appendfsync", "always")
    yield server
    server.close()


class TestRedis(DriverContract[RedisDriver]):
    @pytest.fixture
    async def driver(self, redis_server: RedisServer) -> AsyncIterator[RedisDriver]:
        self._url = redis_server.url
        async with _opened(redis_server) as driver:
            yield driver

    async def peek(self, driver: RedisDriver, key: str) -> bytes | None:
        return await _peek(driver, self._url, key)

    async def reopen(self, driver: RedisDriver) -> RedisDriver:
        return await RedisDriver.open(RedisOptions(url=self._url, base=driver._base))


class TestRedisOverAClient(DriverContract[RedisDriver]):
    @pytest.fixture
    async def driver(self, redis_server: RedisServer) -> AsyncIterator[RedisDriver]:
        client = Redis(unix_socket_path=redis_server.socket, decode_responses=True, protocol=3)
        self._url = redis_server.url
        driver = await RedisDriver.over(client, base=_base())
        yield driver
        await driver.close()
        assert await client.ping() is True
        await client.aclose()

    async def peek(self, driver: RedisDriver, key: str) -> bytes | None:
        return await _peek(driver, self._url, key)


class TestRedisFake(DriverContract[RedisDriver]):
    """Quick, and without a server; its cancelled calls and clocks are not Redis's."""

    @pytest.fixture
    async def driver(self) -> AsyncIterator[RedisDriver]:
        fakeredis = pytest.importorskip("fakeredis")
        self._client = fakeredis.FakeAsyncRedis(version=(7,))
        driver = await RedisDriver.over(self._client, base="fake")
        yield driver
        await driver.close()
        await self._client.aclose()

    async def peek(self, driver: RedisDriver, key: str) -> bytes | None:
        stored = await self._client.get(_name(driver, key))
        return None if stored is None else stored[HEADER_BYTES:]


class TestRedisModel:
    def test_the_driver_does_what_a_dict_does(self, redis_server: RedisServer) -> None:
        from hypothesis.stateful import run_state_machine_as_test

        async def open_new() -> RedisDriver:
            return await RedisDriver.open(RedisOptions(url=redis_server.url, base=_base()))

        async def open_again(closed: RedisDriver) -> RedisDriver:
            return await RedisDriver.open(RedisOptions(url=redis_server.url, base=closed._base))

        machine = driver_machine(open_new, reopener=open_again)
        run_state_machine_as_test(machine, settings=machine.TestCase.settings)


# -- what is sent --------------------------------------------------------------------------------


async def test_sixty_four_batches_of_one_key_are_one_call(driver: RedisDriver) -> None:
    await driver.commit([batch(Put("c:warm", b"v"))])  # from here on the server knows the script
    before = _calls(driver)

    await driver.commit([batch(Put(f"c:{number}", b"v")) for number in range(64)])

    assert _calls(driver) == before + 1


async def test_a_thousand_keys_of_many_namespaces_are_one_call(driver: RedisDriver) -> None:
    keys = [f"n{number % 40}:{number}" for number in range(1000)]
    await driver.commit([batch(Put(key, key.encode())) for key in keys])
    before = _calls(driver)

    entries = await driver.get(keys)

    assert [entry and entry.value for entry in entries] == [key.encode() for key in keys]
    assert _calls(driver) == before + 1


async def test_a_scan_with_values_and_targets_is_one_call(driver: RedisDriver) -> None:
    await driver.commit([batch(Put(f"c:r:{n:03}", b"%d" % n), Put(f"c:r#i:{n:03}", b"%03d" % n)) for n in range(200)])
    await driver.scan("c:", "c;", limit=1)
    before = _calls(driver)

    found = await driver.scan("c:r#i:", "c:r#i;", limit=100, deref="c:r:")

    assert [entry.target and entry.target.value for entry in found] == [b"%d" % n for n in range(100)]
    assert _calls(driver) == before + 1


async def test_a_store_joins_what_is_concurrent(redis_server: RedisServer, driver: RedisDriver) -> None:
    async with kvpersist.open_store(driver) as store:
        await store.put("c:warm", 1)
        before = _calls(driver)

        await asyncio.gather(*(store.put(f"c:{number}", number) for number in range(64)))
        written = _calls(driver)
        assert await asyncio.gather(*(store.get(f"c:{number}") for number in range(64))) == list(range(64))

        assert (written - before, _calls(driver) - written) == (1, 1)


async def test_no_more_connections_are_made_than_allowed(redis_server: RedisServer) -> None:
    async with _opened(redis_server, pool_max=3) as driver:
        await driver.commit([batch(Put(f"c:{number}", b"v")) for number in range(50)])

        answers = await asyncio.gather(*(driver.scan("c:", "c;", limit=50) for _ in range(40)))

        assert [len(found) for found in answers] == [50] * 40
        assert len(_pool(driver)._all) <= 3


# -- what is stored ------------------------------------------------------------------------------


async def test_hostile_keys_are_stored_under_names_of_their_own_with_one_tag_a_namespace(driver: RedisDriver) -> None:
    keys = [*AWKWARD_KEYS, *(f"{space}:{rest}" for space in ("}", "{", "}{", "a}", "*", "") for rest in ("", "}", ":"))]
    keys = list(dict.fromkeys(keys))
    names = {_name(driver, key) for key in keys}
    tags = {key.partition(":")[0] if ":" in key else "": _tag(_name(driver, key)) for key in keys}

    await driver.commit([batch(Put(key, key.encode())) for key in keys])

    assert len(names) == len(keys)
    assert all(tags.values())
    for key in keys:
        space = key.partition(":")[0] if ":" in key else ""
        assert {_tag(name) for name in (*names_of(driver._base, space), _name(driver, key))} == {tags[space]}
    found = await driver.scan(None, None, limit=1000)
    assert [(entry.key, entry.value) for entry in found] == [(k, k.encode()) for k in sorted(keys, key=str.encode)]


def _tag(name: str) -> str:
    """What a cluster would hash: Redis Cluster Specification, "Hash tags"."""
    return name.partition("{")[2].partition("}")[0]


async def test_two_bases_in_one_database_are_apart(redis_server: RedisServer) -> None:
    async with _opened(redis_server, base="one") as one, _opened(redis_server, base="one:") as two:
        await one.commit([batch(Put("c:a", b"1"))])
        await two.commit([batch(Put("c:b", b"2"))])

        assert [entry.key for entry in await one.scan(None, None, limit=9)] == ["c:a"]
        assert [entry.key for entry in await two.scan(None, None, limit=9)] == ["c:b"]


async def test_nothing_is_left_of_a_store_whose_keys_are_deleted(redis_server: RedisServer) -> None:
    async with _opened(redis_server) as driver:
        keys = ["a:1", "a:2", "b:1", "plain"]
        await driver.commit([batch(Put(key, b"v")) for key in keys])
        await driver.commit([batch(Delete(key)) for key in keys])

        client = Redis.from_url(redis_server.url)
        assert [name async for name in client.scan_iter(f"{driver._base}:*")] == []
        await client.aclose()


async def test_expired_keys_leave_the_index_by_themselves(driver: RedisDriver, raw: Redis) -> None:
    soon = await driver.now() + 0.05
    await driver.commit([batch(Put(f"c:{number}", b"v", expires_at=soon)) for number in range(40)])
    await asyncio.sleep(0.1)

    for number in range(40):
        await driver.commit([batch(Put(f"c:later{number}", b"v", expires_at=soon + 1000))])

    assert await raw.zcard(names_of(driver._base, "c").lex) == 40
    assert await raw.zcard(names_of(driver._base, "c").expiries) == 40


async def test_a_scan_goes_past_thousands_of_expired_keys(driver: RedisDriver, raw: Redis) -> None:
    soon = await driver.now() + 0.3
    for part in range(3):
        await driver.commit([batch(Put(f"c:{part}{n:04}", b"v", expires_at=soon)) for n in range(1000)])
    await driver.commit([batch(Put("c:z", b"v"))])
    await asyncio.sleep(0.35)

    assert [entry.key for entry in await driver.scan("c:", "c;", limit=5)] == ["c:z"]
    assert await raw.zcard(names_of(driver._base, "c").lex) == 1


@pytest.mark.parametrize("reverse", [False, True])
async def test_a_long_scan_is_read_in_pages_of_a_thousand(driver: RedisDriver, reverse: bool) -> None:
    keys = [f"c:{number:04}" for number in range(2500)] + [f"d:{number:04}" for number in range(1500)]
    for at in range(0, len(keys), 1000):
        await driver.commit([batch(*(Put(key, b"v") for key in group)) for group in _by_space(keys[at : at + 1000])])
    before = _calls(driver)

    inside = await driver.scan("c:", "c;", limit=10_000, reverse=reverse)
    calls = _calls(driver) - before
    everything = await driver.scan(None, None, limit=3900, reverse=reverse)

    assert calls <= 4  # three pages, and the script's text where the server did not know it
    assert [entry.key for entry in inside] == sorted(keys[:2500], reverse=reverse)
    assert [entry.key for entry in everything] == sorted(keys, reverse=reverse)[:3900]


def _by_space(keys: list[str]) -> list[list[str]]:
    return [list(group) for _, group in itertools.groupby(keys, lambda key: key.partition(":")[0])]


@pytest.mark.parametrize("flip", ["empty", "short", "version", "expiry", "checksum"])
async def test_a_damaged_value_is_named_and_a_list_goes_on_past_it(driver: RedisDriver, raw: Redis, flip: str) -> None:
    await driver.commit([batch(Put(key, b"value")) for key in ("c:a", "c:b")])
    await driver.commit([batch(Put(key, b"a")) for key in ("c:#i:a", "d:i")])
    whole = await raw.get(_name(driver, "c:a"))
    damaged = {
        "empty": b"",
        "short": b"short",
        "version": b"x" + whole[1:],
        "expiry": whole[:12] + b"x" + whole[13:],
        "checksum": whole[:19] + b"x" + whole[20:],
    }[flip]
    await raw.set(_name(driver, "c:a"), damaged)

    with pytest.raises(CorruptRecord, match="c:a") as told:
        await driver.get(["c:b", "c:a"])
    found = await driver.scan("c:a", "c;", limit=5)
    names = await driver.scan("c:a", "c;", limit=5, keys_only=True)
    [near] = await driver.scan("c:#", "c:$", limit=5, deref="c:")
    [far] = await driver.scan("d:", "d;", limit=5, deref="c:")

    assert told.value.about == ("c:a",)
    assert [entry.key for entry in found] == [entry.key for entry in names] == ["c:a", "c:b"]
    for entry in (found[0], near.target, far.target):
        assert entry is not None
        with pytest.raises(CorruptRecord, match="c:a"):
            codec.unframe(entry.key, entry.value)


async def test_a_damaged_value_fails_those_who_ask_for_it_and_nobody_else(driver: RedisDriver, raw: Redis) -> None:
    async with kvpersist.open_store(driver) as store:
        await store.put_many({f"c:{number}": number for number in range(64)})
        await raw.set(_name(driver, "c:7"), b"x" * 40)

        answers = await asyncio.gather(*(store.get(f"c:{number}") for number in range(64)), return_exceptions=True)
        damaged: list[str] = []
        listed = [key async for key, _ in store.scan("c:", on_corrupt=lambda error: damaged.append(error.key))]

        assert isinstance(answers[7], CorruptRecord)
        assert [answer for at, answer in enumerate(answers) if at != 7] == [n for n in range(64) if n != 7]
        assert damaged == ["c:7"]
        assert len(listed) == 63


# -- what is refused -----------------------------------------------------------------------------


async def test_a_batch_that_cannot_be_kept_fails_alone(driver: RedisDriver) -> None:
    outcomes = await driver.commit(
        [
            *(batch(Put("c:a", b"1")), batch(Put("c:\ud800", b"2")), batch(Put("c:b", b"3"), Put("d:b", b"3"))),
            *(batch(), batch(Put("c:n", b"4", expires_at=float("nan"))), batch(Put("c:v", b"5", b"short"))),
            *(batch(Check("c:a", ABSENT), Put("c:c", b"6")), batch(Put("c:d", b"7"))),
        ]
    )

    kinds = [Committed, BadKey, Unsupported, Committed, BadRequest, BadRequest, Conflict, Committed]
    assert [type(outcome) for outcome in outcomes] == kinds
    assert [entry.key for entry in await driver.scan(None, None, limit=9)] == ["c:a", "c:d"]


async def test_nothing_is_left_of_a_batch_that_is_refused_behind_its_first_operations(driver: RedisDriver) -> None:
    there = b"12345678"
    await driver.commit([batch(Put("c:a", b"1"), Put("c:b", b"1"), Put("c:e", b"1"), version=there)])
    lost = [Check("c:e", there), Put("c:b", b"2", there), Delete("c:a", there), Put("c:n", b"2", ABSENT, 1e10)]

    outcomes = await driver.commit(
        [
            batch(*lost, Put("c:\ud800", b"2")),
            batch(Check("c:e", there), Check("c:n", ABSENT), Put("c:b", b"3", there)),
            batch(*lost, Put("c:s", b"2", b"short")),
        ]
    )

    assert [type(outcome) for outcome in outcomes] == [BadKey, Committed, BadRequest]
    found = await driver.get(["c:a", "c:b", "c:n", "c:s"])
    assert [entry and (entry.value, entry.expires_at) for entry in found] == [(b"1", None), (b"3", None), None, None]


async def test_a_batch_is_judged_by_what_those_before_it_in_the_call_did(driver: RedisDriver) -> None:
    first, second, third, fourth = (bytes([n]) * 8 for n in range(1, 5))
    await driver.commit([batch(Put("c:old", b"0"), version=fourth)])
    later = await driver.now() + 1000

    outcomes = await driver.commit(
        [
            batch(Put("c:a", b"1", ABSENT), version=first),
            batch(Check("c:old", fourth), Put("c:a", b"2", ABSENT), version=second),  # it is there now
            batch(Put("c:b", b"2"), Put("c:a", b"3", first), version=second),
            batch(Put("c:x", b"x"), Check("c:a", first)),  # it was replaced
            batch(Delete("c:a", second), Delete("c:old", fourth)),
            batch(Check("c:a", ABSENT), Put("c:p", b"p", ABSENT, expires_at=1.0), version=first),  # it never was
            batch(Check("c:p", first)),
            batch(Check("c:p", ABSENT), Put("c:t", b"4", expires_at=later), Put("c:a", b"4"), version=third),
            batch(Put("c:t", b"5", third), Delete("c:b", second), Put("c:u", b"5", None, later), version=first),
            batch(Put("c:b", b"6", second), version=fourth),  # it is gone
            batch(Check("c:t", first), Put("c:old", b"7", fourth)),  # so is this
            batch(Put("c:u", b"8", first), Delete("c:none"), version=second),
        ]
    )

    failed = {at: outcome for at, outcome in enumerate(outcomes) if not isinstance(outcome, Committed)}
    assert {
        at: (error.key, error.found, error.position) for at, error in failed.items() if isinstance(error, Conflict)
    } == {
        1: ("c:a", first, 1),
        3: ("c:a", second, 1),
        6: ("c:p", ABSENT, 0),
        9: ("c:b", ABSENT, 0),
        10: ("c:old", ABSENT, 1),
    }
    assert len(failed) == 5
    found = await driver.scan(None, None, limit=9)
    assert [(entry.key, entry.value, entry.version, entry.expires_at) for entry in found] == [
        ("c:a", b"4", third, None),
        ("c:t", b"5", first, None),
        ("c:u", b"8", second, None),
    ]


async def test_thousands_of_operations_of_one_call_are_judged_and_written(driver: RedisDriver) -> None:
    keys = [f"c:{n:05}" for n in range(9000)]
    old, new = b"11111111", b"22222222"

    for ops, outcome in (
        ([Put(key, b"1", ABSENT) for key in keys], Committed),
        ([Put(key, b"2", ABSENT if key == keys[-1] else new) for key in keys], Conflict),
        ([Check(key, ABSENT) for key in (*keys[:-1], "c:none")], Conflict),
        ([Put(key, b"2", old) for key in keys], Committed),
    ):
        [answer] = await driver.commit([batch(*ops, version=new if ops[0].expect == old else old)])
        assert isinstance(answer, outcome)
    [answer] = await driver.commit([batch(*(Check(key, new) for key in keys))])
    assert isinstance(answer, Committed)
    assert len(await driver.scan("c:", "c;", limit=10_000)) == 9000
    [answer] = await driver.commit([batch(*(Delete(key, new) for key in keys))])
    assert isinstance(answer, Committed)
    assert await driver.scan(None, None, limit=5) == []


async def test_a_key_with_a_lone_surrogate_is_no_key(driver: RedisDriver) -> None:
    with pytest.raises(BadKey):
        await driver.get(["c:\ud800"])
    with pytest.raises(BadKey):
        await driver.scan("c:\ud800", "c;", limit=1)


async def test_an_index_that_is_none_refuses_its_namespace_and_no_other(driver: RedisDriver, raw: Redis) -> None:
    await raw.set(names_of(driver._base, "c").lex, "a text")

    outcomes = await driver.commit([batch(Put("c:a", b"1")), batch(Put("d:a", b"1")), batch(Delete("c:a"))])

    assert [isinstance(outcome, Committed) for outcome in outcomes] == [False, True, False]
    assert [entry and entry.value for entry in await driver.get(["c:a", "d:a"])] == [None, b"1"]


async def test_a_full_server_refuses_puts_whole_and_takes_deletes(own_server: RedisServer) -> None:
    async with _opened(own_server) as driver:
        await driver.commit([batch(Put("c:a", b"1"), Put("c:b", b"2"))])
        own_server.say("CONFIG", "SET", "maxmemory", "1")

        outcomes = await driver.commit(
            [
                *(batch(Delete("c:a"), Put("c:c", b"3")), batch(Delete("c:b")), batch(Put("c:d", b"4"))),
                *(batch(Check("c:d", ABSENT)), batch(Check("c:b", ABSENT), Put("c:d", b"5", ABSENT))),
                *(batch(Check("c:a", ABSENT), Put("c:c", b"6")), batch(Delete("c:d", b"12345678"))),
            ]
        )

        kinds = [Unavailable, Committed, Unavailable, Committed, Unavailable, Conflict, Conflict]
        assert [type(outcome) for outcome in outcomes] == kinds
        assert "OOM" in str(outcomes[0])
        assert [entry and entry.value for entry in await driver.get(["c:a", "c:b", "c:c", "c:d"])] == [
            b"1",
            None,
            None,
            None,
        ]
        own_server.say("CONFIG", "SET", "maxmemory", "0")


async def test_a_replica_reads_and_refuses_to_write(own_server: RedisServer, redis_server: RedisServer) -> None:
    async with _opened(own_server) as driver:
        await driver.commit([batch(Put("c:a", b"1"))])
        own_server.say("REPLICAOF", "127.0.0.1", "1")

        for refused in (Put("c:a", b"2"), Delete("c:a")):
            with pytest.raises(ReadOnly) as told:
                await driver.commit([batch(refused)])
            assert not told.value.retryable
        assert [entry.value for entry in await driver.scan("c:", "c;", limit=5)] == [b"1"]
        own_server.say("REPLICAOF", "NO", "ONE")


async def test_a_user_who_lacks_one_command_writes_nothing(own_server: RedisServer) -> None:
    for lacking in ("set", "mset", "zadd", "sadd", "zrem", "del"):
        own_server.say("ACL", "SETUSER", "ada", "reset", "on", ">pw", "~*", "+@all", f"-{lacking}")
        url = f"redis://ada:pw@127.0.0.1:{own_server.port}"
        async with _opened(own_server, url=url) as driver:
            try:
                [outcome] = await driver.commit([batch(Put("c:a", b"1"), Delete("c:b"))])
            except KvError as error:
                outcome = error

            assert isinstance(outcome, ReadOnly), (lacking, outcome)
            assert await driver.get(["c:a"]) == [None]
            assert await driver.scan(None, None, limit=5) == []


async def test_a_user_who_loses_a_command_changes_nothing_or_is_told_that_nobody_knows(own_server: RedisServer) -> None:
    there = b"12345678"
    for lost, told in (("sadd", ReadOnly), ("zadd", ReadOnly), ("mset", ReadOnly), ("set", CommitUnknown)):
        own_server.say("ACL", "SETUSER", "ada", "reset", "on", ">pw", "~*", "&*", "+@all")
        async with _opened(own_server, url=f"redis://ada:pw@127.0.0.1:{own_server.port}") as driver:
            await driver.commit([batch(Put("c:a", b"1"), Put("c:b", b"1"), version=there)])
            own_server.say("ACL", "SETUSER", "ada", f"-{lost}")
            try:
                [outcome, conflict] = await driver.commit(
                    [
                        batch(Put("c:a", b"2", there), Put("c:n", b"2"), Put("c:t", b"2", None, 1e10), Delete("c:b")),
                        batch(Put("c:x", b"2", there)),
                    ]
                )
            except KvError as error:
                outcome = conflict = error

            assert type(outcome) is told, lost
            if isinstance(outcome, CommitUnknown):
                assert outcome.keys == ("c:a", "c:n", "c:t", "c:b")
                assert isinstance(conflict, Conflict)
            else:
                found = await driver.get(["c:a", "c:b", "c:n", "c:t"])
                assert [entry and entry.value for entry in found] == [b"1", b"1", None, None]
                assert [entry.key for entry in await driver.scan(None, None, limit=5)] == ["c:a", "c:b"]


@_needs_redis_7
async def test_the_rights_that_the_page_names_suffice(own_server: RedisServer) -> None:
    rights = "+@read +@write +@string +@sortedset +@set +@scripting +@connection +info +time"
    page = Path(__file__).parents[2] / "docs" / "how-to" / "redis.md"
    if page.exists():  # not where the tests of a wheel run
        assert rights in page.read_text("utf-8")
    own_server.say("ACL", "SETUSER", "bob", "reset", "on", ">pw", "~kvpersist:*", *rights.split())

    async with kvpersist.open_store(f"redis://bob:pw@127.0.0.1:{own_server.port}/1") as store:
        await store.put("c:a", 1, ttl=60)
        await store.put_many({"c:b": 2, "plain": 3})
        await store.delete("c:b")
        await store.sweep()

        assert await store.snapshot() == {"c:a": 1, "plain": 3}
        assert store.capabilities.server.startswith("Redis 7")


async def test_a_wrong_password_is_told_and_not_tried_again(own_server: RedisServer) -> None:
    own_server.say("CONFIG", "SET", "requirepass", "right")
    for url in ("redis://127.0.0.1:{}", "redis://:wr0ng@127.0.0.1:{}", "redis://ada:wr0ng@127.0.0.1:{}/0"):
        with pytest.raises(BadOption, match="refuses this user or password") as told:
            await RedisDriver.open(RedisOptions(url=url.format(own_server.port)))
        assert not told.value.retryable
        assert "wr0ng" not in str(told.value)

    async with _opened(own_server, url=f"redis://:right@127.0.0.1:{own_server.port}") as driver:
        assert await driver.get(["c:a"]) == [None]


def test_a_password_is_not_shown() -> None:
    assert "s3cret" not in repr(RedisOptions(url="redis://ada:s3cret@localhost:6379/0"))


@pytest.mark.parametrize(
    ("url", "error"),
    [
        ("redis://127.0.0.1:6379/zero", BadOption),
        ("redis://127.0.0.1:x", BadOption),
        ("http://127.0.0.1", BadOption),
        ("redis://127.0.0.1?socket_timeout=soon", BadOption),
        ("redis://127.0.0.1?colour=blue", BadOption),
        ("redis://127.0.0.1:1,127.0.0.1:2/0", Unavailable),
        ("", BadOption),
        ("redis://127.0.0.1,127.0.0.1:x", BadOption),
    ],
)
async def test_an_address_without_meaning_is_refused(url: str, error: type[KvError]) -> None:
    with pytest.raises(error):
        await RedisDriver.open(RedisOptions(url=url))


@pytest.mark.parametrize("module", ["redis", "hiredis"])
def test_without_its_client_it_says_what_to_install(module: str) -> None:
    program = f"import sys; sys.modules[{module!r}] = None\nimport asyncio, kvpersist\n"
    program += "async def main(): await kvpersist.open_store('redis://localhost')\nasyncio.run(main())"

    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)

    assert "pip install 'kvpersist[redis]'" in done.stderr


@_needs_redis_7
async def test_tls_is_spoken_with_a_server_whose_certificate_is_known(
    redis_server: RedisServer, tmp_path: Path
) -> None:
    if not shutil.which("openssl"):
        pytest.skip("needs openssl")
    key, certificate = str(tmp_path / "key"), str(tmp_path / "certificate")
    request = ["-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    names = ["-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    command = ["openssl", "req", *request, *names, "-keyout", key, "-out", certificate]
    subprocess.run(command, check=True, capture_output=True)
    port = free_port()
    tls = ["--tls-port", str(port), "--tls-cert-file", certificate, "--tls-key-file", key, "--tls-auth-clients", "no"]
    server = RedisServer(*tls)
    try:
        async with kvpersist.open_store(f"rediss://127.0.0.1:{port}?ssl_ca_certs={certificate}") as store:
            await store.put("greeting", "hello")
            assert await store.get("greeting") == "hello"
        context = tls_contexts.create_default_context(cafile=certificate)
        for options in (
            {"url": f"redis://127.0.0.1:{port}", "ssl": context},
            {"url": f"redis://127.0.0.1:{port}", "ssl": "require"},
            {"url": f"redis://127.0.0.1:{port}?ssl_ca_certs={certificate}", "ssl": True},
            {"host": "127.0.0.1", "port": port, "ssl": context},
        ):
            async with kvpersist.open_store({"type": "redis", **options}) as store:
                assert await store.get("greeting") == "hello"
        for options in ({}, {"ssl": "verify-ca"}):
            with pytest.raises(Unavailable, match=r"(?i)certificate"):
                await RedisDriver.open(RedisOptions(url=f"rediss://127.0.0.1:{port}", **options))
    finally:
        server.close()


async def test_several_hosts_that_are_no_cluster_are_refused(redis_server: RedisServer) -> None:
    where = f"127.0.0.1:{redis_server.port}"
    with pytest.raises(BadOption, match="no part of a cluster"):
        await RedisDriver.open(RedisOptions(url=f"redis://{where},{where}"))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"host": "localhost", "url": "redis://localhost"}, "give one of"),
        ({"port": 6379}, "give one of"),
        ({"client": object()}, "not object"),
        ({"url": "unix:///x", "sentinel": "m"}, "hosts"),
        ({"url": "unix:///x", "ssl": True}, "no TLS"),
        ({"url": "rediss://localhost", "ssl": False}, "rediss"),
        ({"url": "redis://localhost", "ssl": "sometimes"}, "sometimes"),
    ],
)
async def test_options_that_do_not_fit_are_told(options: dict[str, Any], said: str) -> None:
    with pytest.raises(BadOption, match=said):
        await RedisDriver.open(RedisOptions(**options))


async def test_it_opens_by_its_pieces_and_by_a_client(own_server: RedisServer) -> None:
    own_server.say("ACL", "SETUSER", "ada", "on", ">pw@:/", "~*", "&*", "+@all")
    pieces = {"host": "127.0.0.1", "port": own_server.port, "username": "ada", "password": "pw@:/", "database": 1}
    async with kvpersist.open_store({"type": "redis", **pieces, "base": "app"}) as store:
        await store.put("c:a", 1)
    async with (
        Redis(host="127.0.0.1", port=own_server.port, db=1, username="ada", password="pw@:/") as client,
        kvpersist.open_store({"type": "redis", "client": client, "base": "app"}) as store,
    ):
        assert await store.get("c:a") == 1


@pytest.mark.parametrize("url", ["unix://{socket}", "valkey://127.0.0.1:{port}/1", "redis://localhost:{port}/2"])
async def test_each_scheme_leads_to_the_server(redis_server: RedisServer, url: str) -> None:
    where = url.format(socket=redis_server.socket, port=redis_server.port)
    async with kvpersist.open_store(f"{where}?kv.base={_base()}&kv.pool_max=4") as store:
        await store.put("greeting", "hello")
        assert await store.get("greeting") == "hello"
        assert await store.has("greeting")
        assert store.capabilities.server.startswith(("Redis ", "Valkey "))


# -- the pool -----------------------------------------------------------------------------------


async def test_a_call_that_finds_no_free_connection_says_so(redis_server: RedisServer) -> None:
    with Proxy.before(redis_server.url) as proxy:
        async with _opened(redis_server, url=proxy.url, pool_max=2, connect_timeout=1.0) as driver:
            await asyncio.gather(*(driver.get(["c:a"]) for _ in range(2)))  # both are connected
            proxy.stall_answers()
            held = [asyncio.ensure_future(driver.get(["c:a"])) for _ in range(2)]
            await asyncio.sleep(0)

            with pytest.raises(PoolExhausted) as told:
                await driver.get(["c:b"])
            proxy.heal()

            assert (told.value.size, told.value.in_use, told.value.outcome) == (2, 2, "none")
            assert await asyncio.gather(*held) == [[None]] * 2
            assert await driver.get(["c:b"]) == [None]


async def test_a_server_that_is_full_says_so_and_is_used_again(own_server: RedisServer) -> None:
    async with _opened(own_server) as driver, Redis.from_url(own_server.url) as other:
        await driver.get(["c:a"])
        await other.ping()
        own_server.say("CONFIG", "SET", "maxclients", "1")

        with pytest.raises(TooManyClients):
            await RedisDriver.open(RedisOptions(url=own_server.url))
        await _pool(driver)._all[0].disconnect()
        with pytest.raises(TooManyClients) as told:
            await driver.commit([batch(Put("c:a", b"1"))])
        await other.config_set("maxclients", 100)

        assert told.value.outcome == "none"
        assert await driver.get(["c:a"]) == [None]


async def test_a_connection_that_is_not_used_is_closed_and_made_again(redis_server: RedisServer, raw: Redis) -> None:
    async with _opened(redis_server, pool_idle=0.05) as driver:
        await asyncio.gather(*(driver.get(["c:a"]) for _ in range(4)))
        assert sum(connection.is_connected for connection in _pool(driver)._all) == 4

        async with asyncio.timeout(5):
            while any(connection.is_connected for connection in _pool(driver)._all):
                await asyncio.sleep(0.01)

        assert await driver.get(["c:a"]) == [None]


async def test_a_connection_in_use_is_not_closed_as_unused(redis_server: RedisServer) -> None:
    async with _opened(redis_server, pool_idle=0.01) as driver:
        async with asyncio.timeout(5):
            for number in range(300):
                one = batch(Put(f"c:{number}", b"v"))
                assert await driver.commit([one]) == [Committed(one.version)]
                await asyncio.sleep(0.001 * (number % 12))


# -- watching -----------------------------------------------------------------------------------


async def test_a_watch_names_every_change_below_its_prefix_and_no_other(driver: RedisDriver) -> None:
    await driver.commit([batch(Put("c:a:gone", b"1"))])
    below, namespace, everything = driver.watch("c:a"), driver.watch("c:"), driver.watch("")
    for watch in (below, namespace, everything):
        assert await anext(watch) == ()  # it listens from here on

    await driver.commit(
        [
            *(batch(Put("c:a\x00\u00e9", b"1"), Delete("c:a:gone")), batch(Put("c:b", b"1"))),
            *(batch(Put("d:a", b"1")), batch(Put("plain", b"1")), batch(Put("c:never", b"1", b"x" * 8))),
        ]
    )

    assert sorted(await anext(below)) == ["c:a\x00\u00e9", "c:a:gone"]
    assert sorted(await anext(namespace)) == ["c:a\x00\u00e9", "c:a:gone", "c:b"]
    told = [*await anext(everything), *await anext(everything), *await anext(everything)]
    assert sorted(told) == ["c:a\x00\u00e9", "c:a:gone", "c:b", "d:a", "plain"]
    for watch in (below, namespace, everything):
        await watch.aclose()
    assert not _pool(driver)._listening


async def test_changes_too_many_for_a_message_are_told_as_missed(driver: RedisDriver) -> None:
    watch = driver.watch("c:")
    await anext(watch)

    await driver.commit([batch(*(Put(f"c:{number}", b"v") for number in range(1500)))])
    many = await anext(watch)
    await driver.commit([batch(*(Put(f"c:{number}", b"v") for number in range(2500)))])

    assert len(many) == 1500
    assert await anext(watch) == ()
    await watch.aclose()


async def test_a_watch_that_lost_its_connection_says_that_it_may_have_missed_some(redis_server: RedisServer) -> None:
    with Proxy.before(redis_server.url) as proxy:
        async with (
            _opened(redis_server) as driver,
            _opened(redis_server, url=proxy.url, base=driver._base) as behind,
        ):
            watch = behind.watch("c:")
            assert await anext(watch) == ()
            for _ in range(3):
                told = asyncio.ensure_future(anext(watch))
                proxy.cut()
                await driver.commit([batch(Put("c:missed", b"v"))])
                assert await asyncio.wait_for(told, 10) == ()
            await driver.commit([batch(Put("c:b", b"v"))])
            assert await asyncio.wait_for(anext(watch), 10) == ("c:b",)
            await watch.aclose()


async def test_a_watcher_that_does_not_listen_holds_nobody_up(driver: RedisDriver) -> None:
    watch = driver.watch("c:")
    await anext(watch)

    async with asyncio.timeout(10):
        for number in range(200):
            await driver.commit([batch(*(Put(f"c:{number}:{'k' * 200}{at}", b"v") for at in range(50)))])

    assert len(await anext(watch)) == 50
    await watch.aclose()


async def test_a_watch_ends_with_its_driver(redis_server: RedisServer) -> None:
    async with _opened(redis_server) as driver:
        watch = driver.watch("c:")
        await anext(watch)
        told = asyncio.ensure_future(anext(watch))
        await asyncio.sleep(0)
        await driver.close()

        with pytest.raises(StoreClosed):
            await asyncio.wait_for(told, 5)


async def test_a_user_who_may_not_publish_writes_and_cannot_watch(own_server: RedisServer) -> None:
    own_server.say("ACL", "SETUSER", "ada", "reset", "on", ">pw", "~*", "+@all")  # and no channel
    async with _opened(own_server, url=f"redis://ada:pw@127.0.0.1:{own_server.port}") as driver:
        assert driver.capabilities.watch is None
        assert not isinstance(driver, Watches)
        assert isinstance((await driver.commit([batch(Put("c:a", b"1"))]))[0], Committed)


# -- failures ------------------------------------------------------------------------------------


async def test_a_script_that_the_server_forgot_is_sent_again(driver: RedisDriver, raw: Redis) -> None:
    await driver.commit([batch(Put("c:a", b"1"))])
    await raw.script_flush()

    [outcome] = await driver.commit([batch(Put("c:b", b"2"))])
    await raw.script_flush()
    found = await driver.scan("c:", "c;", limit=5)

    assert isinstance(outcome, Committed)
    assert [entry.key for entry in found] == ["c:a", "c:b"]


async def test_a_server_that_is_not_there_is_told_as_such() -> None:
    with pytest.raises(Unavailable, match=r"127\.0\.0\.1:1:"):
        await RedisDriver.open(RedisOptions(url="redis://127.0.0.1:1"))


async def test_a_server_that_goes_and_comes_back_is_used_again(own_server: RedisServer) -> None:
    async with _opened(own_server) as driver:
        await driver.commit([batch(Put("c:a", b"1"))])
        await driver.scan("c:", "c;", limit=1)

        own_server.stop()
        for _ in range(3):
            with pytest.raises(Unavailable):
                await driver.get(["c:a"])
            with pytest.raises(Unavailable):  # nothing was sent, so it is no CommitUnknown
                await driver.commit([batch(Put("c:b", b"2"))])
        own_server.start()

        assert [entry and entry.value for entry in await driver.get(["c:a", "c:b"])] == [b"1", None]
        assert isinstance((await driver.commit([batch(Put("c:b", b"2"))]))[0], Committed)
        assert [entry.key for entry in await driver.scan("c:", "c;", limit=5)] == ["c:a", "c:b"]


async def test_a_restart_between_two_calls_is_not_noticed(own_server: RedisServer) -> None:
    async with _opened(own_server) as driver:
        await driver.commit([batch(Put("c:a", b"1"))])

        await asyncio.to_thread(own_server.restart)

        assert [entry and entry.value for entry in await driver.get(["c:a"])] == [b"1"]
        assert isinstance((await driver.commit([batch(Put("c:b", b"2"))]))[0], Committed)


async def test_a_commit_whose_answer_is_lost_is_unknown_and_a_read_is_not(redis_server: RedisServer) -> None:
    async def swallow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        to_server = await asyncio.open_connection("127.0.0.1", redis_server.port)
        while True:
            data = await reader.read(1 << 16)
            if not data or (b"EVALSHA" in data and b"MARK" in data) or b"MGET" in data:
                if data:
                    to_server[1].write(data)
                    await to_server[0].read(1 << 16)  # it was done, and nobody learns of it
                break
            to_server[1].write(data)
            writer.write(await to_server[0].read(1 << 16))
        writer.close()
        to_server[1].close()

    proxy = await asyncio.start_server(swallow, "127.0.0.1", 0)
    port = proxy.sockets[0].getsockname()[1]
    async with (
        _opened(redis_server) as driver,
        _opened(redis_server, url=f"redis://127.0.0.1:{port}", base=driver._base) as behind,
    ):
        await driver.commit([batch(Put("c:warm", b"1"))])

        with pytest.raises(CommitUnknown):
            await behind.commit([batch(Put("c:a", b"MARK"))])
        with pytest.raises(Unavailable):
            await behind.get(["c:a"])

        assert [entry and entry.value for entry in await driver.get(["c:a"])] == [b"MARK"]
    proxy.close()
    await proxy.wait_closed()


async def test_a_storm_of_cancelled_calls_mixes_up_no_answers(driver: RedisDriver) -> None:
    keys = [f"c:{number:03}" for number in range(100)]
    await driver.commit([batch(Put(key, key.encode())) for key in keys])
    chance = random.Random(7)
    wrong: list[Any] = []
    cancelled = answered = 0

    async def ask(key: str) -> None:
        nonlocal answered
        match chance.randrange(3):
            case 0:
                found = await driver.get([key])
                answered += 1
                wrong.extend(entry for entry in found if entry is None or entry.value != key.encode())
            case 1:
                found = await driver.scan(key, key + "\x00", limit=3)
                answered += 1
                wrong.extend(entry for entry in found if entry.key != key)
                wrong.extend([key] * (len(found) != 1))
            case _:
                one = batch(Put(key, key.encode()))
                outcome = await driver.commit([one])
                answered += 1
                wrong.extend([outcome] * (outcome != [Committed(one.version)]))

    async def later(task: asyncio.Task[None], delay: float) -> None:
        await asyncio.sleep(delay)
        task.cancel()

    while cancelled < 2000 or answered <= 200:
        tasks = [asyncio.create_task(ask(chance.choice(keys))) for _ in range(64)]
        stops = [asyncio.create_task(later(task, chance.random() * 0.008)) for task in tasks]
        answers = await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.gather(*stops)
        cancelled += sum(isinstance(answer, asyncio.CancelledError) for answer in answers)
        assert all(answer is None or isinstance(answer, asyncio.CancelledError) for answer in answers), answers

    assert wrong == []
    assert len(_pool(driver)._all) <= 10
    assert driver._servers.in_use == 0
    assert [entry and entry.value for entry in await driver.get(keys)] == [key.encode() for key in keys]


async def test_a_call_to_a_server_that_does_not_answer_ends_with_the_store_s_deadline() -> None:
    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    deaf = await asyncio.start_server(silent, "127.0.0.1", 0)
    port = deaf.sockets[0].getsockname()[1]
    pool = ConnectionPool(host="127.0.0.1", port=port, socket_timeout=None, protocol=2)
    driver = RedisDriver(Servers(Connections(pool, "redis", Limits(10, 5.0, 30.0))))
    store = kvpersist.Store(driver, timeout=0.2)

    with pytest.raises(KvError) as told:
        await store.get("c:a")
    assert told.value.outcome == "none"
    with pytest.raises(CommitUnknown):
        await store.put("c:a", 1)

    await store.close()
    await driver.close()
    deaf.close()


async def test_a_closed_driver_leaves_a_ready_client_open(redis_server: RedisServer) -> None:
    client = Redis.from_url(redis_server.url)
    driver = await RedisDriver.over(client, base=_base())
    await driver.commit([batch(Put("c:a", b"1"))])

    await driver.close()

    assert await client.ping()
    with pytest.raises(StoreClosed):
        await driver.get(["c:a"])
    await client.aclose()


# -- the agents' records -------------------------------------------------------------------------


async def test_a_turn_is_one_call_and_its_records_are_found(driver: RedisDriver) -> None:
    async with kvpersist.open(driver) as db:
        session = await db.sessions.create(user_id="ada", title="Late parcel")
        ask = Message("assistant", tool_calls=[ToolCallPart("c0", "track", {"parcel": 7})])
        await db.messages.append_many(session.id, [Message("user", "where?"), ask])
        before = _calls(driver)

        ask = Message("assistant", tool_calls=[ToolCallPart("c1", "track", {"parcel": 8})])
        await db.messages.append_many(session.id, [Message("user", "and this?"), ask])
        turn = _calls(driver) - before
        await db.messages.append(session.id, Message("tool", "in Oslo", tool_call_id="c1"))
        last = await db.messages.last(session.id, 50)
        sessions = await db.sessions.find(user_id="ada")
        calls = await db.tool_calls.find(name="track")

        assert turn == 1
        assert [message.number for message in last] == [1, 2, 3, 4, 5]
        assert [found.id for found in sessions] == [session.id]
        assert {call.call_id: call.result for call in calls} == {"c0": None, "c1": "in Oslo"}
        await db.sessions.delete(session.id)
        assert await db.messages.last(session.id, 5) == []


async def test_concurrent_turns_are_numbered_without_gaps(redis_server: RedisServer) -> None:
    base = _base()
    async with (
        _opened(redis_server, base=base) as one,
        _opened(redis_server, base=base) as two,
        kvpersist.open(one) as first,
        kvpersist.open(two) as second,
    ):
        session = (await first.sessions.create()).id

        await asyncio.gather(
            *(db.messages.append(session, Message("user", str(n))) for n in range(40) for db in (first, second))
        )

        assert [message.number for message in await first.messages.last(session, 100)] == list(range(1, 81))
        assert await first._all.messages.verify() == []


# -- faults on the way ----------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["refuse", "cut", "end", "cut in answers", "no answers", "stall", "slow"])
async def test_what_fails_on_the_way_is_told_in_time_and_leaves_nothing_behind(
    redis_server: RedisServer, fault: str
) -> None:
    timeout = 0.4
    wrong: list[Any] = []
    errors: list[KvError] = []
    numbers = itertools.count()
    written: dict[str, set[int]] = {}  # what may be there

    async def work(store: kvpersist.Store, rounds: int) -> None:
        for _ in range(rounds):
            number = next(numbers)
            key = f"c:{number % 40}"
            begun = asyncio.get_running_loop().time()
            try:
                if number % 3:
                    written.setdefault(key, set()).add(number)
                    await store.put(key, [key, number])
                else:
                    found = await store.get(key)
                    wrong.extend([found] * (found is not None and (found[0] != key or found[1] not in written[key])))
            except KvError as error:
                errors.append(error)
            took = asyncio.get_running_loop().time() - begun
            wrong.extend([took] * (took > timeout + 1.5))  # a lane's grace, and looking for a lost write

    with Proxy.before(redis_server.url) as proxy:
        async with (
            _opened(redis_server, url=proxy.url, connect_timeout=0.3) as driver,
            kvpersist.open_store(driver, timeout=timeout) as store,
        ):
            await work(store, 20)
            for _ in range(2):
                tasks = [asyncio.create_task(work(store, 5)) for _ in range(24)]
                await asyncio.sleep(0.01)
                match fault:
                    case "refuse":
                        proxy.refuse()
                        proxy.cut()
                    case "cut":
                        proxy.cut()
                    case "end":
                        proxy.cut(reset=False)
                    case "cut in answers":
                        proxy.cut_after(7)
                    case "no answers":
                        proxy.stall_answers()
                    case "stall":
                        proxy.stall()
                    case _:
                        proxy.delay(0.03, 0.03)
                await asyncio.gather(*tasks)
                proxy.heal()
                with contextlib.suppress(CommitUnknown):  # an idle connection may have been cut just now
                    await store.put("c:after", next(numbers))
                await store.put("c:after", next(numbers))
                assert await store.has("c:after")

            assert wrong == []
            assert all(isinstance(error, Unavailable | CommitUnknown) for error in errors), errors
            assert driver._servers.in_use == 0
            assert sum(connection.is_connected for connection in _pool(driver)._all) <= proxy.connections + 1
            entries = [await store.get(f"c:{number}") for number in range(40)]
            assert all(found[0] == f"c:{n}" for n, found in enumerate(entries) if found is not None)
