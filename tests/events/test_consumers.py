"""Consumers: acknowledgements only move forward, and what is missing is told."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable

import pytest

import kvpersist
from kvpersist import EventQueue, EventsExpired, Store
from kvpersist.driver import Put
from kvpersist.errors import BadCursor
from kvpersist.events.consumers import Consumers
from kvpersist.events.records import Lag
from kvpersist.testing.clock import ManualClock

Stores = Callable[[], Awaitable[Store]]


async def test_a_consumer_recovers_what_it_has_not_acknowledged(queue: EventQueue) -> None:
    positions = await queue.publish_many("t", list(range(10)))
    assert await queue.cursor("c", "t") is None
    assert [entry.event for entry in await queue.recover("c", "t", 3)] == [0, 1, 2]

    assert await queue.ack("c", "t", positions[4]) == positions[4]

    assert await queue.cursor("c", "t") == positions[4]
    assert [entry.event for entry in await queue.recover("c", "t")] == [5, 6, 7, 8, 9]
    assert await queue.lag("c", "t") == Lag(5, 0)
    assert await queue.lag("new", "t") == Lag(10, 0)
    assert await queue.consumers("t") == {"c": positions[4]}


async def test_an_acknowledgement_never_moves_back(queue: EventQueue) -> None:
    positions = await queue.publish_many("t", list(range(50)))
    order = random.Random(3).sample(positions, 50)

    await asyncio.gather(*(queue.ack("c", "t", position) for position in order))
    assert await queue.ack("c", "t", positions[3]) == positions[-1]

    assert await queue.cursor("c", "t") == positions[-1]


async def test_two_processes_acknowledging_at_once_keep_the_greater(stores: Stores, namespace: str) -> None:
    a, b = EventQueue(await stores(), namespace=namespace), EventQueue(await stores(), namespace=namespace)
    positions = await a.publish_many("t", list(range(40)))

    await asyncio.gather(*(queue.ack("c", "t", position) for position in positions for queue in (a, b)))
    await b.ack("c", "t", positions[0])

    assert await a.cursor("c", "t") == await b.cursor("c", "t") == positions[-1]
    await a.close()
    await b.close()


async def test_an_acknowledgement_of_what_is_not_published_yet_is_refused(queue: EventQueue) -> None:
    await queue.publish("t", 1)

    with pytest.raises(BadCursor):
        await queue.ack("c", "t", "0000000000000002")

    assert await queue.cursor("c", "t") is None
    await queue.publish("t", 2)
    assert await queue.ack("c", "t", "0000000000000002") == "0000000000000002"


async def test_a_consumers_subscription_begins_behind_its_acknowledgement(queue: EventQueue) -> None:
    await queue.publish_many("t", list(range(6)))
    async with queue.subscribe("t", consumer="c") as events:
        for _ in range(3):
            entry = await anext(events)
        await queue.ack("c", "t", entry.position)
        await anext(events)

    async with queue.subscribe("t", "start", consumer="c") as events:
        assert (await anext(events)).event == 3


async def test_a_new_consumer_that_begins_now_is_known_from_then_on(queue: EventQueue) -> None:
    await queue.publish("t", "before")
    async with queue.subscribe("t", "now", consumer="c"):
        pass
    await queue.publish("t", "while away")

    assert [entry.event for entry in await queue.recover("c", "t")] == ["while away"]


async def test_what_expired_unacknowledged_is_told(store: Store, namespace: str) -> None:
    async with EventQueue(store, namespace=namespace, max_events=4) as queue:
        positions = await queue.publish_many("t", list(range(10)))
        await queue.ack("c", "t", positions[1])
        await queue.sweep()

        with pytest.raises(EventsExpired) as caught:
            await queue.recover("c", "t")
        assert caught.value.missed == 4
        assert await queue.lag("c", "t") == Lag(4, 4)
        assert [entry.event for entry in await queue.recover("c", "t", on_expired="skip")] == [6, 7, 8, 9]
        with pytest.raises(EventsExpired):
            await anext(queue.subscribe("t", consumer="c"))


async def test_a_consumer_expires_when_that_is_asked_for(clock: ManualClock) -> None:
    async with kvpersist.open_store("memory://", clock=clock) as store, EventQueue(store, consumer_ttl=60) as queue:
        [position] = await queue.publish_many("t", [1])
        await queue.ack("c", "t", position)
        clock.advance(50)
        await queue.ack("c", "t", position)
        clock.advance(50)
        assert await queue.cursor("c", "t") == position
        clock.advance(11)

        assert await queue.cursor("c", "t") is None
        assert await queue.ack("c", "t", position) == position


async def test_a_consumer_can_be_forgotten(queue: EventQueue) -> None:
    [position] = await queue.publish_many("t", [1])
    await queue.ack("c", "t", position)

    assert (await queue.forget("c", "t"), await queue.forget("c", "t")) == (True, False)
    assert await queue.cursor("c", "t") is None
    await queue.ack("c", "t", position)
    assert await queue.cursor("c", "t") == position


async def test_planted_an_acknowledgement_that_overwrites_is_caught(
    store: Store, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Consumers._build

    async def overwriting(self: Consumers, key: str, state: object, acks: list[object]) -> object:
        built = await real(self, key, state._replace(number=None), acks)  # type: ignore[attr-defined]
        built.ops[:] = [Put(op.key, op.value) for op in built.ops]
        return built

    monkeypatch.setattr(Consumers, "_build", overwriting)

    with pytest.raises(AssertionError):
        await test_an_acknowledgement_never_moves_back(EventQueue(store, namespace=namespace, cleanup_interval=0))
