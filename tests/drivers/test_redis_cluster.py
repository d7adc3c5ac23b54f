"""The Redis driver on a cluster and behind sentinels: the contract, the model, and who is asked for what."""

from __future__ import annotations

import asyncio
import itertools
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from redis.asyncio import Redis, RedisCluster
from redis.asyncio.cluster import ClusterNode
from redis.asyncio.sentinel import Sentinel

import kvpersist
from kvpersist import Message
from kvpersist.driver import ABSENT, HEADER_BYTES, Committed, Delete, Put
from kvpersist.errors import BadKey, BadOption, Unavailable, Unsupported
from kvpersist.testing import DriverContract, batch, driver_machine
from kvpersist_drivers.redis import RedisDriver, RedisOptions
from kvpersist_drivers.redis._plan import names_of, space_of
from kvpersist_drivers.redis._servers import slot_of

Service = Callable[[str], dict[str, str]]

_numbers = itertools.count()


def _base() -> str:
    return f"t{os.getpid()}-{next(_numbers)}"


def _name(driver: RedisDriver, key: str) -> str:
    space = space_of(key)
    return names_of(driver._base, space).prefix + key[len(space) :]


@pytest.fixture
def cluster(service: Service) -> str:
    return "redis://" + service("redis-cluster")["KVPERSIST_TEST_REDIS_CLUSTER_NODES"]


@pytest.fixture
def sentinel(service: Service) -> str:
    found = service("redis-sentinel")
    nodes, master = found["KVPERSIST_TEST_REDIS_SENTINEL_NODES"], found["KVPERSIST_TEST_REDIS_SENTINEL_MASTER"]
    return f"redis://{nodes}/0?kv.sentinel={master}"


def _addresses(url: str) -> list[tuple[str, int]]:
    hosts = url.partition("://")[2].partition("/")[0]
    return [(host.partition(":")[0], int(host.partition(":")[2])) for host in hosts.split(",")]


@asynccontextmanager
async def _raw_cluster(url: str) -> AsyncIterator[RedisCluster]:
    client: Any = RedisCluster(startup_nodes=[ClusterNode(*address) for address in _addresses(url)])
    try:
        yield client
    finally:
        await client.aclose()


@asynccontextmanager
async def _raw_master(url: str) -> AsyncIterator[Redis]:
    name = url.partition("kv.sentinel=")[2]
    sentinels = Sentinel(_addresses(url))
    client = sentinels.master_for(name)
    try:
        yield client
    finally:
        await client.aclose()
        await sentinels.aclose()


async def _emptied(driver: RedisDriver) -> None:
    """Leave nothing on servers that others use."""
    async with asyncio.timeout(20):
        while found := await driver.scan(None, None, limit=500, keys_only=True):
            await driver.commit([batch(Delete(entry.key)) for entry in found])


async def _open(url: str, **options: Any) -> RedisDriver:
    url, _, name = url.partition("?kv.sentinel=")
    return await RedisDriver.open(RedisOptions(**{"url": url, "sentinel": name, "base": _base(), **options}))


@asynccontextmanager
async def _opened(url: str, **options: Any) -> AsyncIterator[RedisDriver]:
    driver = await _open(url, **options)
    try:
        yield driver
        await _emptied(driver)
    finally:
        await driver.close()


class TestRedisCluster(DriverContract[RedisDriver]):
    @pytest.fixture
    async def driver(self, cluster: str) -> AsyncIterator[RedisDriver]:
        self._url = cluster
        driver = await _open(cluster)
        yield driver
        await driver.close()

    async def peek(self, driver: RedisDriver, key: str) -> bytes | None:
        async with _raw_cluster(self._url) as client:
            stored = await client.get(_name(driver, key))
        return None if stored is None else stored[HEADER_BYTES:]

    async def reopen(self, driver: RedisDriver) -> RedisDriver:
        return await _open(self._url, base=driver._base)


class TestRedisClusterOverAClient(DriverContract[RedisDriver]):
    @pytest.fixture
    async def driver(self, cluster: str) -> AsyncIterator[RedisDriver]:
        async with _raw_cluster(cluster) as client:
            self._client = client
            driver = await RedisDriver.over(client, base=_base())
            yield driver
            await driver.close()
            assert await client.ping()

    async def peek(self, driver: RedisDriver, key: str) -> bytes | None:
        stored = await self._client.get(_name(driver, key))
        return None if stored is None else stored[HEADER_BYTES:]


class TestRedisSentinel(DriverContract[RedisDriver]):
    @pytest.fixture
    async def driver(self, sentinel: str) -> AsyncIterator[RedisDriver]:
        self._url = sentinel
        driver = await _open(sentinel)
        yield driver
        await driver.close()

    async def peek(self, driver: RedisDriver, key: str) -> bytes | None:
        async with _raw_master(self._url) as client:
            stored = await client.get(_name(driver, key))
        return None if stored is None else stored[HEADER_BYTES:]

    async def reopen(self, driver: RedisDriver) -> RedisDriver:
        return await _open(self._url, base=driver._base)


@pytest.mark.parametrize("kind", ["cluster", "sentinel"])
def test_the_driver_does_what_a_dict_does(request: pytest.FixtureRequest, kind: str) -> None:
    from hypothesis.stateful import run_state_machine_as_test

    url: str = request.getfixturevalue(kind)

    async def open_new() -> RedisDriver:
        return await _open(url)

    async def open_again(closed: RedisDriver) -> RedisDriver:
        return await _open(url, base=closed._base)

    machine = driver_machine(open_new, reopener=open_again)
    run_state_machine_as_test(machine, settings=machine.TestCase.settings)


# -- who is asked ---------------------------------------------------------------------------------


async def test_one_node_leads_to_all_of_them(cluster: str) -> None:
    host, port = _addresses(cluster)[-1]
    async with _opened(f"redis://{host}:{port}") as driver:
        await driver.commit([batch(Put(f"n{number}:a", b"%d" % number)) for number in range(30)])

        found = await driver.get([f"n{number}:a" for number in range(30)])

        assert [entry and entry.value for entry in found] == [b"%d" % number for number in range(30)]
        assert "Cluster" in driver.capabilities.server
        assert len(await driver._servers.masters()) == 3


async def test_a_dead_node_among_those_that_are_named_is_passed_over(cluster: str) -> None:
    async with _opened(cluster.replace("redis://", "redis://127.0.0.1:1,")) as driver:
        assert await driver.get(["c:a"]) == [None]


async def test_a_drain_is_one_round_trip_for_each_server(cluster: str) -> None:
    async with _opened(cluster) as driver:
        keys = [f"n{number}:{at}" for number in range(30) for at in range(20)]
        await driver.commit([batch(Put(key, b"v")) for key in keys])  # namespaces are announced, scripts known
        await driver.get(keys)
        calls = driver._servers.calls

        await driver.commit([batch(Put(key, b"w")) for key in keys])
        written = driver._servers.calls
        entries = await driver.get(keys)

        assert [entry and entry.value for entry in entries] == [b"w"] * 600
        assert (written - calls, driver._servers.calls - written) == (3, 3)


async def test_sixty_four_batches_and_a_thousand_keys_of_a_namespace_are_one_call_each(cluster: str) -> None:
    async with _opened(cluster) as driver:
        keys = [f"c:{number}" for number in range(1000)]
        await driver.commit([batch(*(Put(key, b"v") for key in keys))])
        calls = driver._servers.calls

        await driver.commit([batch(Put(key, b"w")) for key in keys[:64]])
        written = driver._servers.calls
        await driver.get(keys)

        assert (written - calls, driver._servers.calls - written) == (1, 1)


async def test_every_namespace_is_listed_in_the_order_of_keys(cluster: str) -> None:
    async with _opened(cluster) as driver, _opened(cluster, base=driver._base) as other:
        keys = [f"{space}:{number}" for space in ("a", "a-b", "a}b", "{", "z") for number in range(30)] + ["plain"]
        await driver.commit([batch(Put(key, key.encode())) for key in keys])

        for reverse in (False, True):
            found = await other.scan(None, None, limit=1000, reverse=reverse)
            assert [entry.key for entry in found] == sorted(keys, reverse=reverse)
        found = await other.scan("a-b:", None, limit=35)
        assert [entry.key for entry in found] == sorted(key for key in keys if key >= "a-b:")[:35]


async def test_targets_in_another_namespace_are_found(cluster: str) -> None:
    async with _opened(cluster) as driver:
        await driver.commit([batch(Put(f"i{n}:x", b"%d" % n), Put(f"i{n}:y", b"gone")) for n in range(5)])
        await driver.commit([batch(Put(f"r:{n}", b"record %d" % n)) for n in range(5)])

        for n in range(5):
            found = await driver.scan(f"i{n}:", f"i{n};", limit=5, deref="r:")
            assert [entry.target and entry.target.value for entry in found] == [b"record %d" % n, None]


async def test_a_batch_across_namespaces_is_refused_and_a_bad_key_named(cluster: str) -> None:
    async with _opened(cluster) as driver:
        outcomes = await driver.commit(
            [batch(Put("c:a", b"1")), batch(Put("c:b", b"2"), Put("d:b", b"2")), batch(Put("d:\ud800", b"3")), batch()]
        )

        assert [type(outcome) for outcome in outcomes] == [Committed, Unsupported, BadKey, Committed]
        with pytest.raises(BadKey):
            await driver.get(["c:a", "d:\ud800"])


async def test_a_watch_on_a_cluster_is_of_one_namespace(cluster: str) -> None:
    async with _opened(cluster) as driver, _opened(cluster, base=driver._base) as other:
        watches = [driver.watch(f"n{number}:") for number in range(8)]
        for watch in watches:
            assert await anext(watch) == ()

        await other.commit([batch(Put(f"n{number}:{number}", b"v")) for number in range(8)])

        for number, watch in enumerate(watches):
            assert await asyncio.wait_for(anext(watch), 5) == (f"n{number}:{number}",)
            await watch.aclose()
        with pytest.raises(Unsupported):
            await anext(driver.watch(""))


async def test_a_ready_client_of_sentinels_is_followed(sentinel: str) -> None:
    async with _raw_master(sentinel) as client:
        driver = await RedisDriver.over(client, base=_base())
        await driver.commit([batch(Put("c:a", b"1"))])
        assert (await client.get(_name(driver, "c:a")))[HEADER_BYTES:] == b"1"
        await _emptied(driver)
        await driver.close()
        assert await client.ping()


async def test_sentinels_are_asked_by_the_parameters_of_a_url(sentinel: str) -> None:
    async with kvpersist.open_store(f"{sentinel}&kv.base={_base()}") as store:
        await store.put("greeting", "hello")
        assert await store.get("greeting") == "hello"
        assert "Sentinel" in store.capabilities.server
        await store.clear("", raw=True)


async def test_a_master_that_no_sentinel_knows_is_told(sentinel: str) -> None:
    with pytest.raises(BadOption, match="somebody"):
        await _open(sentinel.partition("?")[0] + "?kv.sentinel=somebody")


async def test_a_sentinel_without_the_name_of_a_master_is_told(sentinel: str) -> None:
    host, port = _addresses(sentinel)[0]
    with pytest.raises(BadOption, match=r"kv\.sentinel=NAME"):
        await _open(f"redis://{host}:{port}")


async def test_sentinels_that_are_not_there_are_told() -> None:
    with pytest.raises(Unavailable, match=r"127\.0\.0\.1:1:"):
        await _open("redis://127.0.0.1:1,127.0.0.1:2/0?kv.sentinel=m")


async def test_a_database_other_than_the_first_is_none_of_a_cluster(cluster: str) -> None:
    with pytest.raises((BadOption, kvpersist.KvError)):
        await _open(cluster + "/1")


async def test_turns_of_many_tenants_are_kept_on_a_cluster(cluster: str) -> None:
    async with _opened(cluster) as driver:
        for tenant in ("ada", "bob", "eve"):
            async with kvpersist.open(driver, namespace=tenant) as db:
                session = await db.sessions.create(user_id=tenant)
                await asyncio.gather(*(db.messages.append(session.id, Message("user", str(n))) for n in range(20)))

                assert [message.number for message in await db.messages.last(session.id, 50)] == list(range(1, 21))
                assert [found.id for found in await db.sessions.find(user_id=tenant)] == [session.id]
                assert await db._all.messages.verify() == []


# -- slots that move ------------------------------------------------------------------------------


async def _moved(client: RedisCluster, slot: int, *, half: bool = False) -> Callable[[], Any]:
    """Move a slot to another master, or with ``half`` begin to; return what ends it."""
    nodes = {node.name: node for node in client.get_primaries()}
    source = client.nodes_manager.get_node_from_slot(slot)
    target = next(node for name, node in nodes.items() if name != source.name)
    ids = {node.name: (await node.execute_command("CLUSTER", "MYID")).decode() for node in nodes.values()}
    await target.execute_command("CLUSTER", "SETSLOT", slot, "IMPORTING", ids[source.name])
    await source.execute_command("CLUSTER", "SETSLOT", slot, "MIGRATING", ids[target.name])

    async def end() -> None:
        while names := await source.execute_command("CLUSTER", "GETKEYSINSLOT", slot, 100):
            await source.execute_command("MIGRATE", target.host, target.port, "", 0, 5000, "KEYS", *names)
        for node in (target, source, *nodes.values()):
            await node.execute_command("CLUSTER", "SETSLOT", slot, "NODE", ids[target.name])

    if not half:
        await end()
    return end


async def test_a_slot_that_moved_is_followed(own_cluster: str) -> None:
    async with _raw_cluster(own_cluster) as client, _opened(own_cluster) as driver:
        await client.initialize()
        await driver.commit([batch(Put(f"c:{n}", b"%d" % n)) for n in range(50)])
        watch = driver.watch("c:")
        await anext(watch)

        await _moved(client, slot_of(f"{driver._base}:{{.c}}"))

        outcomes = await driver.commit([batch(Put("c:0", b"new", None)), batch(Put("c:new", b"1", ABSENT))])
        assert all(isinstance(outcome, Committed) for outcome in outcomes)
        assert len(await driver.scan("c:", "c;", limit=100)) == 51
        assert await asyncio.wait_for(anext(watch), 10) == ()
        await driver.commit([batch(Put("c:told", b""))])
        assert await asyncio.wait_for(anext(watch), 10) == ("c:told",)
        await watch.aclose()


async def test_while_a_slot_moves_every_write_happens_once_or_fails_without_effect(own_cluster: str) -> None:
    async with _raw_cluster(own_cluster) as client, _opened(own_cluster) as driver:
        await client.initialize()
        async with kvpersist.open_store(driver) as store:
            await store.put_many({f"c:{n}": 0 for n in range(40)})
            done = dict.fromkeys(range(40), 0)
            failed: list[kvpersist.KvError] = []
            going = True

            async def count(number: int) -> None:
                while going:
                    try:
                        found = await store.get_versioned(f"c:{number}")
                        assert found is not None
                        await store.put(f"c:{number}", done[number] + 1, expect=found.version)
                        done[number] += 1
                    except Unavailable as error:
                        failed.append(error)
                        await asyncio.sleep(0.01)

            tasks = [asyncio.create_task(count(number)) for number in range(40)]
            for _ in range(3):
                await asyncio.sleep(0.05)
                slot = slot_of(f"{driver._base}:{{.c}}")
                await client.nodes_manager.initialize()
                end = await _moved(client, slot, half=True)
                await asyncio.sleep(0.05)
                await end()
            await asyncio.sleep(0.1)
            going = False
            await asyncio.gather(*tasks)

            assert [await store.get(f"c:{n}") for n in range(40)] == list(done.values())
            assert min(done.values()) > 0
