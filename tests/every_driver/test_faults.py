"""A server that is down, cut off, silent, slow, or answers half: a typed error by the deadline, and no wrong answer."""

from __future__ import annotations

import asyncio
import gc
import random
import warnings
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from places import PLACES, Where
from proxy import Proxy

import kvpersist
from kvpersist.errors import CommitUnknown, KvError, Unavailable
from kvpersist.store import Store

DEADLINE = 1.5  # seconds, of every call here
GRACE = 1.5  # of a machine that does other things too

_NETWORK = [place for place in PLACES if place.service and place.name not in ("redis-cluster", "redis-sentinel")]


@pytest.fixture(params=_NETWORK, ids=lambda place: place.name)
def proxied(
    request: pytest.FixtureRequest, service: Callable[[str], dict[str, str]], tmp_path: Path
) -> Iterator[tuple[Proxy, Where]]:
    """An empty place of a driver, reached through a proxy."""
    where = request.param.make(service(request.param.service), tmp_path)
    name = next(name for name in ("connection_string", "endpoint_url", "url") if name in where)
    before, address, after = _parted(where[name])
    with Proxy.before(address) as proxy:
        where[name] = before + proxy.url + after
        if proxy.url.startswith("mongodb:"):
            where[name] += "?directConnection=true"  # not to the address that the server gives itself
        yield proxy, where
    if request.param.name == "mongo":  # pymongo leaves the socket of a cancelled attempt to the collector
        with warnings.catch_warnings(action="ignore", category=ResourceWarning):
            gc.collect()


def _parted(text: str) -> tuple[str, str, str]:
    """An address, and what stands around it in a connection string."""
    start = max(text.find("http://"), 0)
    address, semicolon, after = text[start:].partition(";")
    return text[:start], address, semicolon + after


async def _within_deadline(call: Any) -> Any:
    """The answer or the error of a call, which has to come in time."""
    try:
        async with asyncio.timeout(DEADLINE + GRACE):
            return await call
    except KvError as error:
        return error


@asynccontextmanager
async def _opened(where: Where) -> AsyncIterator[Store]:
    """A store whose calls end soon; what its first opening makes may take longer."""
    async with kvpersist.open_store(where, timeout=60):
        pass
    async with kvpersist.open_store(where, timeout=DEADLINE) as store:
        yield store


async def _filled(where: Where) -> None:
    async with kvpersist.open_store(where, timeout=60) as store:
        await store.put_many({f"own:{number:03}": f"value {number}" for number in range(100)})


async def _stored(where: Where, prefix: str) -> dict[str, Any]:
    async with kvpersist.open_store(where, timeout=60) as store:
        return dict([item async for item in store.scan(prefix)])


async def _recovered(store: Store) -> None:
    """Whatever the fault left behind is used up after a call or two."""
    for attempts_left in (3, 2, 1, 0):
        outcome = await _within_deadline(store.put("recovered", attempts_left))
        if not isinstance(outcome, KvError):
            return
        assert isinstance(outcome, Unavailable | CommitUnknown), outcome
    raise AssertionError(f"still fails: {outcome!r}")


async def test_a_server_that_is_down_is_told_at_once_when_opening(proxied: tuple[Proxy, Where]) -> None:
    proxy, where = proxied
    proxy.refuse()

    async def opened() -> None:
        async with kvpersist.open_store(where, timeout=DEADLINE):
            pass

    async with asyncio.timeout(20):  # of the client's connecting, and of its attempts
        with pytest.raises(Unavailable) as caught:
            await opened()
    assert caught.value.outcome == "none"
    assert str(proxy.port) in str(caught.value)


async def test_calls_fail_while_the_server_is_down_and_work_once_it_is_back(proxied: tuple[Proxy, Where]) -> None:
    proxy, where = proxied
    async with _opened(where) as store:
        await store.put("a", 1)
        proxy.refuse()
        proxy.cut()

        for call in (store.get("a"), store.put("a", 2), store.get_many(["a", "b"]), store.delete("a")):
            assert isinstance(await _within_deadline(call), Unavailable | CommitUnknown)

        proxy.heal()
        await _recovered(store)
        assert await store.get("a") in (1, 2, None)


async def test_a_silent_server_holds_no_call_beyond_its_deadline(proxied: tuple[Proxy, Where]) -> None:
    proxy, where = proxied
    async with _opened(where) as store:
        await store.put("a", 1)
        proxy.stall()

        calls = [store.get("a"), store.get("b"), store.put("c", 1), store.put_many({"d": 1, "e": 1})]
        calls.append(anext(store.scan()))
        for outcome in await asyncio.gather(*map(_within_deadline, calls)):
            assert isinstance(outcome, KvError), outcome

        proxy.cut()
        proxy.heal()
        await _recovered(store)
        assert await store.get("a") == 1


async def test_a_slow_server_is_waited_for(proxied: tuple[Proxy, Where]) -> None:
    proxy, where = proxied
    async with kvpersist.open_store(where, timeout=30) as store:
        proxy.delay(0.05, jitter=0.03)
        await store.put_many({f"a:{number}": number for number in range(20)})

        assert await store.get_many([f"a:{number}" for number in range(20)]) == list(range(20))


async def test_half_answers_are_errors_and_what_was_acknowledged_is_there(proxied: tuple[Proxy, Where]) -> None:
    proxy, where = proxied
    acknowledged: dict[str, int] = {}
    refused: dict[str, KvError] = {}
    async with _opened(where) as store:
        for number in range(12):
            proxy.cut_after(number * 40)
            key = f"half:{number:02}"
            match await _within_deadline(store.put(key, number)):
                case CommitUnknown():
                    pass
                case KvError() as error:
                    assert error.outcome == "none"
                    refused[key] = error
                case _:
                    acknowledged[key] = number
            got = await _within_deadline(store.get(key))
            assert isinstance(got, KvError) or got in (number, None)
        proxy.heal()
        await _recovered(store)

    there = await _stored(where, "half:")
    assert acknowledged.items() <= there.items()
    assert {key: error for key, error in refused.items() if key in there} == {}


async def test_connections_cut_under_load_lose_nothing_acknowledged_and_mix_no_answers(
    proxied: tuple[Proxy, Where],
) -> None:
    proxy, where = proxied
    rng = random.Random(3)
    outcomes: dict[str, Any] = {}
    await _filled(where)
    async with _opened(where) as store:

        async def worker(name: int) -> None:
            for step in range(12):
                key = f"load:{name:02}:{step:02}"
                outcomes[key] = await _within_deadline(store.put(key, key))
                number = rng.randrange(100)
                got = await _within_deadline(store.get(f"own:{number:03}"))
                assert isinstance(got, KvError) or got == f"value {number}"

        async def saboteur() -> None:
            for _ in range(6):
                await asyncio.sleep(0.03)
                proxy.cut()

        await asyncio.gather(saboteur(), *map(worker, range(16)))
        proxy.heal()
        await _recovered(store)

    there = await _stored(where, "load:")
    for key, outcome in outcomes.items():
        if not isinstance(outcome, KvError):
            assert there.get(key) == key, f"{key} was acknowledged"
        elif outcome.outcome == "none":
            assert key not in there, f"{outcome!r} says that nothing was changed"


async def test_cancelled_calls_leave_no_answer_for_the_next_and_no_connection_behind(
    proxied: tuple[Proxy, Where],
) -> None:
    proxy, where = proxied
    rng = random.Random(5)
    await _filled(where)
    async with kvpersist.open_store(where, timeout=20) as store:
        proxy.delay(0.002, jitter=0.002)

        async def read(number: int) -> None:
            assert await store.get(f"own:{number:03}") == f"value {number}"

        for _ in range(20):
            tasks = [asyncio.create_task(read(rng.randrange(100))) for _ in range(10)]
            await asyncio.sleep(rng.random() * 0.006)
            for task in rng.sample(tasks, 7):
                task.cancel()
            for outcome in await asyncio.gather(*tasks, return_exceptions=True):
                assert outcome is None or isinstance(outcome, asyncio.CancelledError), outcome
        proxy.heal()
        await asyncio.gather(*map(read, range(100)))

    async with asyncio.timeout(10):
        while proxy.connections:
            await asyncio.sleep(0.01)
