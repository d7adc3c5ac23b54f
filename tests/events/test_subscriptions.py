"""Subscriptions: no gap and no repetition, whoever publishes, however slow the reader."""

from __future__ import annotations

import asyncio
import gc
import os
import random
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

import kvpersist
from kvpersist import EventEntry, EventQueue, EventsExpired, NewEvent, Store
from kvpersist.changes import Waker
from kvpersist.errors import BadCursor, BadOption, Unavailable
from kvpersist.testing.faults import FaultyDriver
from kvpersist_drivers.memory import MemoryDriver

Stores = Callable[[], Awaitable[Store]]


async def taken(queue: EventQueue, n: int, *args: Any, **options: Any) -> list[Any]:
    """The first ``n`` events of a subscription."""
    found: list[Any] = []
    async with asyncio.timeout(60), queue.subscribe(*args, **options) as events:
        while len(found) < n:
            found.append((await anext(events)).event)
    return found


async def test_history_and_what_comes_are_one_sequence(queue: EventQueue, part: int) -> None:
    before, total = 250 // part, 600 // part
    await queue.publish_many("t", list(range(before)))
    reading = asyncio.create_task(taken(queue, total, "t", "start", buffer=7))
    for n in range(before, total):
        await queue.publish("t", n)
        if n % 50 == 0:
            await asyncio.sleep(0)

    assert await reading == list(range(total))


async def test_now_means_what_is_published_from_then_on(queue: EventQueue) -> None:
    await queue.publish("t", "before")

    async with queue.subscribe("t") as events:
        await queue.publish("t", "after")
        assert (await anext(events)).event == "after"
        assert events.position == "0000000000000002"


async def test_readers_in_one_process_are_woken_at_once(store: Store, queue: EventQueue) -> None:
    async with queue.subscribe("t") as one, queue.subscribe("t") as two:
        waiting = [asyncio.create_task(anext(one)), asyncio.create_task(anext(two))]
        await asyncio.sleep(0.01)
        await queue.publish("t", 1)
        began = asyncio.get_running_loop().time()
        await asyncio.gather(*waiting)
        took = asyncio.get_running_loop().time() - began

    assert took < 0.2


async def test_what_another_process_publishes_is_seen(stores: Stores, namespace: str) -> None:
    async with (
        EventQueue(await stores(), namespace=namespace) as here,
        EventQueue(await stores(), namespace=namespace) as there,
    ):
        reading = asyncio.create_task(taken(here, 50, "t", "start"))
        for n in range(50):
            await there.publish("t", n)

        assert await reading == list(range(50))


@pytest.mark.timeout(300)
async def test_a_reader_that_drops_and_resumes_a_thousand_times_sees_each_event_once(
    queue: EventQueue, part: int
) -> None:
    draw = random.Random(5)
    total = 2_000 // part
    seen: list[int] = []

    async def publish() -> None:
        for at in range(0, total, 20):
            await queue.publish_many("t", list(range(at, at + 20)))
            await asyncio.sleep(0)

    publishing = asyncio.create_task(publish())
    position, drops = "start", 0
    async with asyncio.timeout(280):
        while len(seen) < total:
            async with queue.subscribe("t", position, buffer=draw.choice((1, 3, 10))) as events:
                for _ in range(draw.randint(0, 3)):
                    if len(seen) < total:
                        entry = await anext(events)
                        seen.append(entry.event)
                        position = entry.position
            drops += 1
    await publishing

    assert drops >= 1_000 // part
    assert seen == list(range(total))


async def test_channels_are_left_out_without_being_waited_for(queue: EventQueue) -> None:
    events = [NewEvent(n, channel="noise" if n % 100 else "control") for n in range(300)]
    await queue.publish_many("t", events)

    assert await taken(queue, 3, "t", "start", channels="control") == [0, 100, 200]


async def test_a_slow_reader_holds_a_page_and_loses_nothing(queue: EventQueue) -> None:
    async with queue.subscribe("t", "start", buffer=5) as events:
        seen = [(await anext(events)).event for _ in range(await _publish(queue, 1))]
        for _ in range(40):
            await _publish(queue, 10)
            assert len(events._page) <= 5
            seen.append((await anext(events)).event)
        seen += [(await anext(events)).event for _ in range(360)]

    assert seen == [0, *list(range(10)) * 40]


async def _publish(queue: EventQueue, n: int) -> int:
    return len(await queue.publish_many("t", list(range(n))))


async def test_closing_the_queue_ends_those_who_wait(store: Store, namespace: str) -> None:
    queue = EventQueue(store, namespace=namespace)

    async def all_of_it() -> list[EventEntry]:
        return [entry async for entry in queue.subscribe("t", "start")]

    reading = asyncio.create_task(all_of_it())
    await queue.publish("t", 1)
    await asyncio.sleep(0.05)
    await queue.close()

    assert [entry.event for entry in await asyncio.wait_for(reading, 5)] == [1]


async def test_after_an_error_a_subscription_goes_on_where_it_was() -> None:
    driver = FaultyDriver(MemoryDriver())
    async with kvpersist.open_store(driver) as store, EventQueue(store) as queue:
        await queue.publish_many("t", [1, 2, 3])
        async with queue.subscribe("t", "start", buffer=1) as events:
            assert (await anext(events)).event == 1
            driver.fail("scan")
            with pytest.raises(Unavailable):
                await anext(events)

            assert [(await anext(events)).event, (await anext(events)).event] == [2, 3]


async def test_a_reader_is_told_what_expired_or_passes_over_it(store: Store, namespace: str) -> None:
    async with EventQueue(store, namespace=namespace, max_events=10) as queue:
        async with queue.subscribe("t", "start") as strict, queue.subscribe("t", "start", on_expired="skip") as lenient:
            await queue.publish_many("t", list(range(100)))
            assert await queue.sweep() == 90

            with pytest.raises(EventsExpired) as caught:
                await anext(strict)
            assert (caught.value.topic, caught.value.missed) == ("t", 90)
            assert (await anext(lenient)).event == 90
        with pytest.raises(EventsExpired):
            await taken(queue, 1, "t", caught.value.after)


async def test_an_abandoned_iteration_leaves_no_waker_behind(queue: EventQueue, store: Store) -> None:
    await queue.publish("t", 1)
    async for _ in queue.subscribe("t", "start"):
        break

    gc.collect()
    assert not store._changes()._wakers


async def test_a_handler_is_called_in_order_until_it_is_taken_back(queue: EventQueue) -> None:
    seen: list[Any] = []
    done = asyncio.Event()

    async def handler(entry: EventEntry) -> None:
        await asyncio.sleep(0)
        seen.append(entry.event)
        if len(seen) == 20:
            done.set()

    unsubscribe = await queue.on("t", handler)
    for n in range(20):
        await queue.publish("t", n)
    await asyncio.wait_for(done.wait(), 5)
    unsubscribe()
    unsubscribe()
    await queue.publish("t", "late")
    await asyncio.sleep(0.05)

    assert seen == list(range(20))


async def test_what_a_handler_raises_is_logged_and_ends_nothing(
    queue: EventQueue, caplog: pytest.LogCaptureFixture
) -> None:
    seen: list[Any] = []
    done = asyncio.Event()

    def handler(entry: EventEntry) -> None:
        if entry.event == 1:
            raise ValueError("broken")
        seen.append(entry.event)
        if entry.event == 3:
            done.set()

    await queue.on("t", handler, "start", consumer="c")
    await queue.publish_many("t", [0, 1, 2, 3])
    await asyncio.wait_for(done.wait(), 5)

    assert seen == [0, 2, 3]
    assert "broken" in caplog.text
    async with asyncio.timeout(5):
        while await queue.cursor("c", "t") != "0000000000000004":
            await asyncio.sleep(0.01)


async def test_a_handler_that_missed_events_is_told_by_the_log_and_goes_on(
    store: Store, namespace: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with EventQueue(store, namespace=namespace, max_events=2) as queue:
        [first, *_] = await queue.publish_many("t", [0, 1, 2, 3])
        await queue.ack("c", "t", first)
        await queue.publish("t", 4)
        await queue.sweep()
        seen: list[Any] = []
        await queue.on("t", lambda entry: seen.append(entry.event), consumer="c")
        async with asyncio.timeout(5):
            while len(seen) < 2:
                await asyncio.sleep(0.01)

    assert seen == [3, 4]
    assert "2 events of topic 't'" in caplog.text


async def test_a_stream_is_resumed_by_one_call(queue: EventQueue) -> None:
    await queue.publish_many("room 1/\N{SNOWMAN}", [{"n": n} for n in range(5)])
    [first, second, *_] = await queue.read("room 1/\N{SNOWMAN}")

    assert second.sse() == 'id: 0000000000000002\ndata: {"n":1}\n\n'
    async with queue.replay("room 1/\N{SNOWMAN}", second.position) as events:
        assert (await anext(events)).event == {"n": 2}
    async with queue.replay(None, first.event_id) as events:
        assert (await anext(events)).event == {"n": 1}
    assert first.event_id.isascii()
    assert first.sse(with_topic=True).startswith(f"id: {first.event_id}\n")
    async with queue.replay("room 1/\N{SNOWMAN}", "") as events:
        assert events.position == "0000000000000005"
    async with queue.replay("room 1/\N{SNOWMAN}", None, otherwise="start") as events:
        assert (await anext(events)).event == {"n": 0}


@pytest.mark.parametrize(
    ("topic", "id_"),
    [(None, "0000000000000001"), (None, None), ("other", "0000000000000001/t"), (None, "0000000000000001/%ff")],
)
async def test_an_id_that_names_no_place_is_refused(queue: EventQueue, topic: str | None, id_: str | None) -> None:
    with pytest.raises(BadCursor):
        queue.replay(topic, id_)


async def test_a_stream_message_has_one_line_of_json(queue: EventQueue) -> None:
    await queue.publish("t", {"text": "a\nb\r", "raw": b"\0", "big": 1 << 70}, channel="pro\ngress")

    [entry] = await queue.read("t")
    lines = entry.sse().split("\n")
    assert lines == [
        "id: 0000000000000001",
        "event: pro gress",
        'data: {"text":"a\\nb\\r","raw":"AA==","big":1180591620717411303424}',
        "",
        "",
    ]


async def test_a_buffer_holds_at_least_one_event(queue: EventQueue) -> None:
    with pytest.raises(BadOption):
        queue.subscribe("t", buffer=0)


async def test_planted_a_waker_made_after_the_first_read_is_caught(queue: EventQueue, monkeypatch: Any) -> None:
    """Without the flag a reader would sleep through what is published between its read and its wait."""
    if queue.store.capabilities.watch is None:
        pytest.skip("nothing tells of changes here: a reader looks again soon in any case")
    for tells in ("wake", "told", "committed", "missed"):
        monkeypatch.setattr(Waker, tells, lambda *_: None)

    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.5), queue.subscribe("t") as events:
            await queue.publish("t", 1)
            assert (await anext(events)).event == 1
            waiting = asyncio.create_task(anext(events))
            await asyncio.sleep(0.01)
            await queue.publish("t", 2)
            await waiting


PUBLISHER = """
import asyncio, sys
import kvpersist
from kvpersist import EventQueue

async def main(url, namespace, name, n):
    async with kvpersist.open_store(url) as store, EventQueue(store, namespace=namespace) as queue:
        for i in range(n):
            await queue.publish("t", [name, i])

asyncio.run(main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])))
"""


async def test_processes_publish_and_one_reader_sees_all_in_order(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/shared.db?kv.durability=normal"
    env = os.environ | {"PYTHONPATH": os.pathsep.join(each for each in sys.path if each)}
    async with kvpersist.open_store(url) as store, EventQueue(store) as queue:
        writers = [
            subprocess.Popen([sys.executable, "-c", PUBLISHER, url, "kv", str(n), "150"], env=env) for n in range(4)
        ]
        seen = await taken(queue, 600, "t", "start")
        codes = [await asyncio.to_thread(writer.wait) for writer in writers]

    assert codes == [0] * 4
    for n in range(4):
        assert [i for name, i in seen if name == str(n)] == list(range(150))
