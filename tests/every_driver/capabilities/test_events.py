"""Events: kept, then told; followed, acknowledged, resumed, removed when they are old."""

from __future__ import annotations

import asyncio

import pytest
from places import Where

import kvpersist
from kvpersist import EventEntry, EventsExpired, NewEvent
from kvpersist.agents.persistence import Persistence
from kvpersist.testing import ManualClock

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(300)]


@pytest.mark.shows(
    "Topics of events in order, kept, with cursors",
    "Reading behind a cursor, which is not among them, 1,000 at a time",
    "Channels: progress, control, monitor",
)
async def test_events_are_kept_in_order_and_read_behind_a_position(db: Persistence) -> None:
    first = await db.events.publish("topic", {"n": 0}, channel="progress", cursor="lq5x4g2-0001")
    second, third = await db.events.publish_many(
        "topic", [NewEvent(event={"n": 1}, channel="control"), NewEvent(event={"n": 2}, channel="progress")]
    )

    assert first < second < third
    assert [entry.event for entry in await db.events.read("topic")] == [{"n": 0}, {"n": 1}, {"n": 2}]
    assert [entry.position for entry in await db.events.read("topic", first)] == [second, third]
    assert [entry.position for entry in await db.events.read("topic", "lq5x4g2-0001", limit=1)] == [second]
    assert [entry.event["n"] for entry in await db.events.read("topic", channels=["progress"])] == [0, 2]
    assert await db.events.read("topic", third) == []


@pytest.mark.shows("An event is kept before anybody is told", "Subscribing, and ending it")
async def test_a_subscriber_is_told_of_what_is_kept_until_it_leaves(db: Persistence) -> None:
    told: list[tuple[object, bool]] = []
    done = asyncio.Event()

    async def handler(entry: EventEntry) -> None:
        kept = await db.events.read("news")
        told.append((entry.event, entry.position in [each.position for each in kept]))
        done.set()

    unsubscribe = await db.events.on("news", handler)
    await db.events.publish("news", "first")
    await done.wait()
    unsubscribe()
    await db.events.publish("news", "second")
    await db.events.publish("other", "third")

    assert told == [("first", True)]
    assert [entry.event for entry in await db.events.read("news")] == ["first", "second"]


@pytest.mark.shows(
    "Acknowledging, and going on from there",
    "Catching up and following without a gap between",
)
async def test_a_consumer_goes_on_behind_its_acknowledgement_without_a_gap(db: Persistence) -> None:
    positions = await db.events.publish_many("mail", ["one", "two", "three"])
    await db.events.ack("sender", "mail", positions[1])
    await db.events.ack("sender", "mail", positions[0])  # late: it does not move back

    assert await db.events.cursor("sender", "mail") == positions[1]
    assert [entry.event for entry in await db.events.recover("sender", "mail")] == ["three"]
    seen: list[object] = []
    async with db.events.subscribe("mail", consumer="sender") as events:
        await db.events.publish("mail", "four")
        async for entry in events:
            seen.append(entry.event)
            if entry.event == "four":
                break
    assert seen == ["three", "four"]
    assert (await db.events.lag("sender", "mail")).events == 2


@pytest.mark.shows(
    "Events go after 24 hours, swept every 5 minutes, or as one likes",
)
async def test_old_events_go_and_who_missed_them_is_told(where: Where) -> None:
    clock = ManualClock()
    async with kvpersist.open(where, clock=clock, timeout=60, sweep=None, events={"cleanup_interval": 0}) as db:
        old = await db.events.publish("log", "old")
        await db.events.publish("log", "older too")
        clock.advance(86_401)
        await db.events.publish("log", "new")
        await db.events.sweep()

        assert [entry.event for entry in await db.events.read("log")] == ["new"]
        with pytest.raises(EventsExpired):
            await db.events.read("log", old)
        assert [entry.event for entry in await db.events.read("log", old, on_expired="skip")] == ["new"]


@pytest.mark.shows("Bookmarks in an agent's events")
async def test_an_agents_events_are_read_behind_a_bookmark(db: Persistence) -> None:
    await db.agents.create(id="teller")
    marks = [{"seq": n, "timestamp": 1_760_000_000_000} for n in (0, 1)]
    await db.events.publish_many("teller", [NewEvent(event=mark["seq"], bookmark=mark) for mark in marks])

    entries = await db.events.read("teller", marks[0])

    assert [(entry.event, entry.bookmark) for entry in entries] == [(1, marks[1])]
