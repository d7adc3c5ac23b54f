"""Groups: each event to one member, again after its deadline, and parked when it fails too often."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from kvpersist import EventQueue, EventsExpired, Store
from kvpersist.errors import BadCursor, BadOption, BadRequest
from kvpersist.events.groups import _Draft
from kvpersist.events.records import GroupStats
from kvpersist.testing.clock import ManualClock

Stores = Callable[[], Awaitable[Store]]


def events(claimed: list[Any]) -> list[Any]:
    return [one.entry.event for one in claimed]


async def test_each_event_goes_to_one_member_in_order(queue: EventQueue) -> None:
    await queue.publish_many("t", list(range(6)))
    group = queue.group("t", "g")

    one, two = await group.claim("one", 2), await group.claim("two", 3)

    assert (events(one), events(two)) == ([0, 1], [2, 3, 4])
    assert await group.stats() == GroupStats(1, 5, 0)
    assert [await group.ack(claimed) for claimed in one] == [True, True]
    assert await group.ack(one[0]) is False
    assert await group.stats() == GroupStats(1, 3, 0)
    assert events(await queue.group("t", "another").claim("one", 10)) == list(range(6))


async def test_members_of_two_processes_share_without_overlap(stores: Stores, namespace: str) -> None:
    queues = [EventQueue(await stores(), namespace=namespace, cleanup_interval=0) for _ in range(2)]
    await queues[0].publish_many("t", list(range(60)))
    done: list[Any] = []

    async def work(queue: EventQueue, name: str) -> None:
        group = queue.group("t", "g")
        while claimed := await group.claim(name, 3):
            for one in claimed:
                done.append(one.entry.event)
                assert await group.ack(one)

    await asyncio.gather(*(work(queue, f"{n}") for n, queue in enumerate(queues * 2)))

    assert sorted(done) == list(range(60))


async def test_an_event_is_handed_out_again_after_its_deadline(queue: EventQueue, clock: ManualClock) -> None:
    await queue.publish_many("t", [0, 1])
    group = queue.group("t", "g", deadline=30)
    [first] = await group.claim("dead")
    clock.advance(29.9)
    assert events(await group.claim("other")) == [1]
    assert await group.claim("other") == []
    clock.advance(0.2)

    [again] = await group.claim("other")

    assert (again.entry, again.attempts, again.consumer) == (first.entry, 2, "other")
    assert await group.ack(first) is False, "it is another's now"
    assert await group.ack(again) is True


async def test_a_late_acknowledgement_counts_while_nobody_else_has_it(queue: EventQueue, clock: ManualClock) -> None:
    await queue.publish("t", 0)
    group = queue.group("t", "g", deadline=5)
    [claimed] = await group.claim("slow")
    clock.advance(60)

    assert await group.ack(claimed) is True
    assert await group.claim("other") == []


async def test_a_deadline_can_be_put_off(queue: EventQueue, clock: ManualClock) -> None:
    await queue.publish("t", 0)
    group = queue.group("t", "g", deadline=10)
    [claimed] = await group.claim("w")
    for _ in range(5):
        clock.advance(8)
        assert await group.extend(claimed)
        assert await group.claim("other") == []

    clock.advance(11)
    assert events(await group.claim("other")) == [0]
    assert await group.extend(claimed) is False


async def test_what_is_released_comes_again_at_once_or_after_a_while(queue: EventQueue, clock: ManualClock) -> None:
    await queue.publish_many("t", [0, 1])
    group = queue.group("t", "g")
    zero, one = await group.claim("w", 2)

    assert await group.release(zero) and await group.release(one, delay=5)
    assert events(await group.claim("w", 5)) == [0]
    clock.advance(6)
    assert events(await group.claim("w", 5)) == [1]


async def test_a_poison_event_is_parked_whole_and_can_be_retried(
    queue: EventQueue, store: Store, namespace: str, clock: ManualClock
) -> None:
    await queue.publish_many("t", ["poison", "fine"])
    group = queue.group("t", "g", max_attempts=3, deadline=10)
    for attempt in (1, 2, 3):
        [claimed] = await group.claim("w")
        assert (claimed.entry.event, claimed.attempts) == ("poison", attempt)
        await group.release(claimed, reason=f"boom {attempt}")

    [fine] = await group.claim("w")
    assert fine.entry.event == "fine"
    await group.ack(fine)
    [parked] = await group.parked()
    assert (parked.entry, parked.attempts, parked.reason) == (claimed.entry, 3, "boom 3")
    clock.advance(10 * 86_400)
    await queue.sweep()
    assert await queue.read("t") == []

    assert await group.retry(parked.entry.position) is True
    assert await group.retry(parked.entry.position) is False
    assert await group.parked() == []
    [again] = await group.claim("w")
    assert (again.entry, again.attempts) == (claimed.entry, 1)
    await group.release(again)
    [again] = await group.claim("w")
    assert await group.park(again, reason="hopeless")
    assert [one.reason for one in await group.parked()] == ["hopeless"]
    assert await group.discard(parked.entry.position) is True
    assert await group.discard(parked.entry.position) is False
    assert (await group.parked(), await group.claim("w")) == ([], [])


async def test_a_retried_event_that_is_done_is_parked_no_more(queue: EventQueue) -> None:
    await queue.publish("t", 1)
    group = queue.group("t", "g")
    [claimed] = await group.claim("w")
    await group.park(claimed)
    await group.retry(claimed.entry.position)
    [again] = await group.claim("v")

    assert await group.ack(again)
    assert await group.parked() == []
    assert await group.stats() == GroupStats(0, 0, 0)


async def test_parked_events_are_listed_page_by_page(queue: EventQueue) -> None:
    await queue.publish_many("t", list(range(7)))
    group = queue.group("t", "g", max_attempts=1)
    for claimed in await group.claim("w", 7):
        await group.release(claimed)
    assert await group.claim("w") == []

    first = await group.parked(limit=4)
    rest = await group.parked(limit=4, after=first[-1].entry.position)
    assert [one.entry.event for one in first + rest] == list(range(7))
    with pytest.raises(BadCursor):
        await group.parked(after="x")


async def test_no_more_are_handed_out_than_may_be_in_flight(queue: EventQueue) -> None:
    await queue.publish_many("t", list(range(10)))
    group = queue.group("t", "g", in_flight=4)
    claimed = await group.claim("w", 10)

    assert events(claimed) == [0, 1, 2, 3]
    assert await group.claim("w") == []
    await group.ack(claimed[2])
    assert events(await group.claim("w", 10)) == [4]


async def test_a_group_begins_where_it_is_told_and_goes_on_where_it_was(queue: EventQueue) -> None:
    positions = await queue.publish_many("t", list(range(4)))

    assert events(await queue.group("t", "b", after=positions[1]).claim("w", 9)) == [2, 3]
    assert await queue.group("t", "c", after="now").claim("w", 9) == []
    await queue.publish("t", 4)
    assert events(await queue.group("t", "c", after="start").claim("w", 9)) == [4]


async def test_a_group_is_told_what_expired_or_passes_over_it(store: Store, namespace: str) -> None:
    async with EventQueue(store, namespace=namespace, max_events=3) as queue:
        group = queue.group("t", "g", deadline=0.001)
        lenient = queue.group("t", "g", on_expired="skip")
        await queue.publish_many("t", list(range(10)))
        await group.claim("w", 2)
        await queue.sweep()

        assert await group.stats() == GroupStats(3, 2, 5)
        with pytest.raises(EventsExpired):
            await group.claim("v", 4)
        assert events(await lenient.claim("v", 4)) == [7, 8, 9]


async def test_members_wait_for_events_and_for_deadlines(queue: EventQueue, clock: ManualClock) -> None:
    group = queue.group("t", "g", deadline=1)
    got: list[Any] = []

    async def work() -> None:
        async for claimed in group.consume("w"):
            got.append((claimed.entry.event, claimed.attempts))
            if claimed.attempts == 2:
                await group.ack(claimed)
                return
            clock.advance(2)

    working = asyncio.create_task(work())
    await asyncio.sleep(0.02)
    await queue.publish("t", "e")
    await asyncio.wait_for(working, 10)

    assert got == [("e", 1), ("e", 2)]


@pytest.mark.parametrize("options", [{"deadline": 0}, {"max_attempts": 0}, {"in_flight": 0}])
async def test_a_setting_that_makes_no_sense_is_refused(queue: EventQueue, options: dict[str, Any]) -> None:
    with pytest.raises(BadOption):
        queue.group("t", "g", **options)
    with pytest.raises(BadRequest):
        await queue.group("t", "g").claim("w", 0)


async def test_members_that_die_at_random_lose_nothing(queue: EventQueue, clock: ManualClock) -> None:
    import random

    draw = random.Random(11)
    await queue.publish_many("t", list(range(120)))
    done: Counter[int] = Counter()
    group = queue.group("t", "g", deadline=5, max_attempts=1_000)
    for _ in range(200):
        for claimed in await group.claim(f"w{draw.randint(0, 3)}", draw.randint(1, 8)):
            if draw.random() < 0.3:
                continue  # it died
            if await group.ack(claimed):
                done[claimed.entry.event] += 1
        clock.advance(draw.choice((0, 1, 6)))

    assert done == Counter(range(120))


async def test_planted_a_lost_claim_is_caught(
    queue: EventQueue, clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = _Draft.group

    def forgetful(self: _Draft) -> Any:
        return type(state := real(self))(state.cursor, state.claims[:-1])

    monkeypatch.setattr(_Draft, "group", forgetful)

    with pytest.raises(AssertionError):
        await test_members_that_die_at_random_lose_nothing(queue, clock)
