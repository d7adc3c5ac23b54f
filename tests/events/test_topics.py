"""Publishing and reading: positions, cursors of the caller's, old cursors, channels."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import Any

import pytest

import kvpersist
from kvpersist import EventQueue, EventsExpired, NewEvent, Store
from kvpersist.driver import ABSENT
from kvpersist.errors import BadCursor, BadKey, BadOption, BadRequest, KeyTooLong, StoreClosed, Unavailable, Unencodable
from kvpersist.events._log import TopicLog
from kvpersist.testing.clock import ManualClock
from kvpersist.testing.faults import FaultyDriver
from kvpersist_drivers.memory import MemoryDriver

Stores = Callable[[], Awaitable[Store]]


async def test_events_are_read_in_the_order_they_were_published(queue: EventQueue) -> None:
    first = await queue.publish("t", {"n": 1})
    more = await queue.publish_many("t", [{"n": n} for n in range(2, 1_300)])

    entries = await queue.read("t", limit=10_000)

    assert [entry.event["n"] for entry in entries] == list(range(1, 1_300))
    assert [entry.position for entry in entries] == [first, *more] == sorted([first, *more])
    assert {len(entry.position) for entry in entries} == {16}
    assert {entry.topic for entry in entries} == {"t"}


async def test_an_event_comes_back_as_it_was_given(queue: EventQueue) -> None:
    event = {
        "at": datetime(2026, 1, 2, tzinfo=UTC),
        "raw": b"\0\xff",
        "big": 1 << 80,
        "no": None,
        "$bytes": "x",
        "": [],
    }

    await queue.publish("t", event, channel="control", cursor="c-1", bookmark={"seq": 4, "timestamp": 9})

    [entry] = await queue.read("t")
    assert (entry.event, entry.channel, entry.cursor) == (event, "control", "c-1")
    assert entry.bookmark == {"seq": 4, "timestamp": 9}


@pytest.mark.parametrize("topic", ["a", "a!b", "a:b", "a/b", "%", "\N{SNOWMAN}", "a\nb", "x" * 160])
async def test_topics_do_not_see_each_other(queue: EventQueue, topic: str) -> None:
    for other in ("a", "a!", "b", "a:"):
        await queue.publish(other, "other")
    await queue.publish(topic, "mine")

    assert (await queue.read(topic))[-1].event == "mine"
    assert topic in await queue.topics()
    assert [entry.event for entry in await queue.read("b")][:1] == ["other"]


async def test_reading_goes_on_behind_a_position_up_to_a_limit(queue: EventQueue) -> None:
    positions = await queue.publish_many("t", list(range(10)))

    assert [entry.event for entry in await queue.read("t", positions[3], 2)] == [4, 5]
    assert await queue.read("t", positions[9]) == []
    assert await queue.read("t", "now") == []
    assert await queue.read("t", limit=0) == []
    assert await queue.read("nothing") == []


async def test_a_callers_own_cursor_or_bookmark_is_a_place(queue: EventQueue) -> None:
    events = [NewEvent(n, cursor=100 + n, bookmark={"seq": n, "timestamp": 5}) for n in range(6)]
    await queue.publish_many("t", events)
    await queue.publish("t", 6, cursor="x" * 400)
    await queue.publish("t", 7)

    assert [entry.event for entry in await queue.read("t", 103)] == [4, 5, 6, 7]
    assert [entry.event for entry in await queue.read("t", "103")] == [4, 5, 6, 7]
    assert [entry.event for entry in await queue.read("t", {"timestamp": 5, "seq": 4})] == [5, 6, 7]
    assert [entry.event for entry in await queue.read("t", "x" * 400)] == [7]
    with pytest.raises(BadCursor):
        await queue.read("t", "x" * 399 + "y")


async def test_of_a_cursor_given_twice_the_newer_counts(queue: EventQueue) -> None:
    await queue.publish_many("t", [NewEvent(1, cursor="c"), NewEvent(2, cursor="c"), NewEvent(3)])

    assert [entry.event for entry in await queue.read("t", "c")] == [3]


@pytest.mark.parametrize("cursor", ["", "now", "start", "00000000000000ff", 1.5, b"x", True])
async def test_a_cursor_that_would_be_misread_is_refused(queue: EventQueue, cursor: Any) -> None:
    with pytest.raises(BadRequest):
        await queue.publish("t", 1, cursor=cursor)

    assert await queue.read("t") == []


async def test_an_old_cursor_that_nobody_stored_is_found_by_its_time(queue: EventQueue, clock: ManualClock) -> None:
    for n in range(40):
        await queue.publish("t", n)
        clock.advance(1)
    then = (1_700_000_000 + 25) * 1000

    def old(ms: int, sequence: int = 1) -> str:
        digits = ""
        while ms:
            ms, digit = divmod(ms, 36)
            digits = "0123456789abcdefghijklmnopqrstuvwxyz"[digit] + digits
        return f"{digits}-{sequence:04d}"

    assert [entry.event for entry in await queue.read("t", old(then))] == list(range(25, 40))
    assert [entry.event for entry in await queue.read("t", old(then - 1))] == list(range(25, 40))
    assert [entry.event for entry in await queue.read("t", old(then + 1))] == list(range(26, 40))
    assert [entry.event for entry in await queue.read("t", old(36**7))] == list(range(40))
    assert await queue.read("t", old(then + 100_000)) == []


@pytest.mark.parametrize(
    "after", ["?", "", "zz", 5, {"seq": 1}, "00000000000000FF", "ffffffffffffffff", "0000000000000002"]
)
async def test_a_place_that_the_topic_does_not_have_is_refused(queue: EventQueue, after: Any) -> None:
    await queue.publish("t", 1)

    with pytest.raises(BadCursor):
        await queue.read("t", after)
    with pytest.raises(BadCursor):
        async for _ in queue.subscribe("t", after):
            break


async def test_channels_are_read_alone_or_merged_in_order(queue: EventQueue) -> None:
    for n in range(30):
        await queue.publish("t", n, channel=("progress", "control", "monitor")[n % 3])

    assert [entry.event for entry in await queue.read("t", channels="control")] == list(range(1, 30, 3))
    merged = await queue.read("t", channels=["control", "monitor"], limit=5)
    assert [entry.event for entry in merged] == [1, 2, 4, 5, 7]
    assert [entry.event for entry in await queue.read("t")] == list(range(30))


async def test_positions_and_times_grow_while_the_clock_steps_back(queue: EventQueue, clock: ManualClock) -> None:
    for _ in range(20):
        await queue.publish("t", None)
        clock.advance(-3600)

    entries = await queue.read("t")
    assert [entry.published_at for entry in entries] == sorted(entry.published_at for entry in entries)
    assert [entry.position for entry in entries] == sorted({entry.position for entry in entries})


async def test_a_thousand_publishers_in_one_moment_get_positions_of_their_own(queue: EventQueue) -> None:
    positions = await asyncio.gather(*(queue.publish("t", n) for n in range(1_000)))

    entries = await queue.read("t", limit=2_000)
    assert [entry.position for entry in entries] == sorted(positions)
    assert len(set(positions)) == 1_000
    assert sorted(entry.event for entry in entries) == list(range(1_000))


async def test_writers_of_two_processes_in_one_microsecond_lose_nothing(stores: Stores, namespace: str) -> None:
    one, two = await stores(), await stores()
    async with EventQueue(one, namespace=namespace) as a, EventQueue(two, namespace=namespace) as b:
        given = await asyncio.gather(*(queue.publish("t", n) for n in range(60) for queue in (a, b)))

        entries = await a.read("t")
        assert [entry.position for entry in entries] == sorted(given)
        assert sorted(entry.event for entry in entries) == sorted([*range(60), *range(60)])
        assert await b.read("t") == entries


async def test_twenty_thousand_events_of_one_millisecond_are_in_order(queue: EventQueue, part: int) -> None:
    total = 20_000 // part
    positions = await queue.publish_many("t", list(range(total)))

    entries = await queue.read("t", limit=total)
    assert positions == sorted(set(positions))
    assert [entry.event for entry in entries] == list(range(total))
    assert len({entry.published_at for entry in entries}) == 1


async def test_a_failed_publish_is_an_error_and_nobody_is_told() -> None:
    driver = FaultyDriver(MemoryDriver())
    async with kvpersist.open_store(driver) as store, EventQueue(store) as queue:
        await queue.publish("t", 0)
        async with queue.subscribe("t") as events:
            driver.fail("commit")
            with pytest.raises(Unavailable):
                await queue.publish("t", "lost")
            with pytest.raises(Unencodable, match="event"):
                await queue.publish("t", {1, 2})
            await queue.publish("t", "there")

            assert (await anext(events)).event == "there"


async def test_one_event_of_a_batch_that_cannot_be_kept_refuses_all(queue: EventQueue) -> None:
    with pytest.raises(Unencodable):
        await queue.publish_many("t", [1, object(), 3])

    assert await queue.read("t") == []


async def test_a_damaged_topic_is_told_not_passed_over(queue: EventQueue, store: Store, namespace: str) -> None:
    await queue.publish_many("t", list(range(5)))
    await store.delete(f"{namespace}:event:t!h3", raw=True)

    assert [entry.event for entry in await queue.read("t", limit=2)] == [0, 1]
    with pytest.raises(EventsExpired) as caught:
        await queue.read("t")
    assert (caught.value.missed, caught.value.first) == (1, "0000000000000004")
    assert [entry.event for entry in await queue.read("t", on_expired="skip")] == [0, 1, 3, 4]


async def test_a_scan_that_misses_what_is_being_written_is_read_again(
    store: Store, queue: EventQueue, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    await queue.publish_many("t", list(range(5)))
    real, calls = TopicLog.range, 0

    async def holed(self: TopicLog, *args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        found = await real(self, *args, **options)
        return [one for one in found if one.number != 3] if calls < 3 else found

    monkeypatch.setattr(TopicLog, "range", holed)

    assert [entry.event for entry in await queue.read("t")] == list(range(5))


async def test_stats_tell_what_a_topic_holds(queue: EventQueue) -> None:
    assert (await queue.stats("t")).count == 0
    positions = await queue.publish_many("t", ["x" * 100] * 10)

    stats = await queue.stats("t")

    assert (stats.first, stats.last, stats.count) == (positions[0], positions[-1], 10)
    assert 1_000 < stats.bytes < 3_000


@pytest.mark.parametrize(("topic", "error"), [("", BadKey), ("\ud800", BadKey), ("x" * 161, KeyTooLong), (5, BadKey)])
async def test_what_cannot_be_a_topic_is_refused(queue: EventQueue, topic: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        await queue.publish(topic, 1)
    with pytest.raises(error):
        queue.subscribe(topic)


@pytest.mark.parametrize(
    "options",
    [{"retention": 0}, {"retention": float("nan")}, {"max_events": 0}, {"max_bytes": -1}, {"cleanup_interval": -1}],
)
async def test_a_setting_that_makes_no_sense_is_refused(options: dict[str, Any]) -> None:
    async with kvpersist.open_store("memory://") as store:
        with pytest.raises(BadOption):
            EventQueue(store, **options)


async def test_a_closed_queue_refuses_and_leaves_the_store_open(store: Store, namespace: str) -> None:
    queue = EventQueue(store, namespace=namespace)
    await queue.publish("t", 1)
    await queue.close()
    await queue.close()

    with pytest.raises(StoreClosed):
        await queue.publish("t", 2)
    assert await store.put("plain", 1, expect=ABSENT)
    await store.delete("plain")


async def test_db_events_is_the_queue_of_the_namespace() -> None:
    async with kvpersist.open("memory://", namespace="app", events={"retention": 5.0}) as db:
        await db.events.publish("t", {"n": 1})

        other = EventQueue(db.store, namespace="app")
        assert [entry.event for entry in await other.read("t")] == [{"n": 1}]
        assert await EventQueue(db.store, namespace="kv").read("t") == []
        with pytest.raises(BadOption):
            db.repository(dict, name="event")


async def test_planted_a_time_of_the_local_clock_alone_is_caught(
    queue: EventQueue, clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = TopicLog._puts
    monkeypatch.setattr(
        TopicLog, "_puts", lambda self, *args: real(self, *args[:-1], (0, *args[-1][1:]) if args[-1] else ())
    )

    with pytest.raises(AssertionError):
        await test_positions_and_times_grow_while_the_clock_steps_back(queue, clock)
