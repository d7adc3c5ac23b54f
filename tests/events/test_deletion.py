"""Deleting a topic: everything of it goes, nothing of others, and publishing may go on."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable

import pytest

from kvpersist import EventQueue, NewEvent, Store
from kvpersist import open as open_persistence
from kvpersist.errors import BadCursor, BadKey
from kvpersist.events.records import number_of
from kvpersist.testing.faults import Crashed, FaultyDriver
from kvpersist_drivers.memory import MemoryDriver

Stores = Callable[[], Awaitable[Store]]


async def fill(queue: EventQueue, topic: str, n: int = 300) -> None:
    """A topic with events, cursors, marks, a consumer, and a group that parked one."""
    await queue.publish_many(topic, [NewEvent(n, "progress", f"c-{n}", {"seq": n}) for n in range(n)])
    await queue.ack("me", topic, "c-3")
    group = queue.group(topic, "team", max_attempts=1)
    [job] = await group.claim("x")
    await group.release(job, reason="no")
    await group.claim("x")


async def keys_of(store: Store, namespace: str) -> set[str]:
    """All but what stays for a time where batches are not atomic."""
    found = await store._scan(f"{namespace}:", f"{namespace};", limit=10_000)
    return {entry.key for entry in found if entry.expires_at is None}


async def test_nothing_of_a_deleted_topic_stays_and_nothing_else_goes(
    store: Store, queue: EventQueue, namespace: str
) -> None:
    for other in ("t!", "t!1", "s"):
        await fill(queue, other)
    before = await keys_of(store, namespace)
    await fill(queue, "t")

    assert await queue.delete("t") is True
    assert await queue.delete("t") is False
    assert await queue.delete("never there") is False

    assert await keys_of(store, namespace) == before
    assert [topic for topic in await queue.topics() if topic != "t"] == ["s", "t!", "t!1"]
    assert (await queue.consumers("t"), await queue.read("t")) == ({}, [])
    with pytest.raises(BadKey):
        await queue.delete("")


async def test_a_topic_goes_on_also_for_those_who_knew_the_old_one(
    store: Store, queue: EventQueue, stores: Stores, namespace: str
) -> None:
    async with EventQueue(await stores(), namespace=namespace) as other:
        first = await queue.publish("t", "old")
        await other.publish("t", "old too")
        await other.ack("me", "t", first)

        await queue.delete("t")

        new = await other.publish("t", "new")
        anew = store.capabilities.atomic_batch != "none"
        assert number_of(new) == (1 if anew else 3)
        assert await other.ack("me", "t", new) == new
        assert [entry.event for entry in await queue.read("t")] == ["new"]
        assert (await queue.stats("t")).count == 1


async def test_who_follows_a_deleted_topic_is_told(store: Store, queue: EventQueue) -> None:
    await queue.publish_many("t", ["one", "two"])
    async with queue.subscribe("t", "start") as events:
        assert [(await anext(events)).event for _ in range(2)] == ["one", "two"]

        await queue.delete("t")
        await queue.publish("t", "three")

        if store.capabilities.atomic_batch == "none":
            assert (await anext(events)).event == "three"
        else:
            with pytest.raises(BadCursor):
                await anext(events)


async def test_what_is_published_during_a_deletion_goes_or_begins_the_topic_anew(
    store: Store, queue: EventQueue, namespace: str
) -> None:
    slow = FaultyDriver(store.driver)
    async with open_persistence(slow, namespace=namespace) as db:
        await fill(queue, "t")
        gate = slow.hold("commit")
        deleting = asyncio.ensure_future(db.events.delete("t"))
        await gate.reached()
        await queue.publish("t", "meanwhile")
        gate.release()
        await deleting

    assert [entry.event for entry in await queue.read("t")] in ([], ["meanwhile"])
    await queue.publish("t", "after")
    assert (await queue.read("t"))[-1].event == "after"


@pytest.mark.parametrize("without", [set[str](), {"atomic_batch", "reverse"}], ids=["memory", "ordered"])
async def test_a_deletion_killed_anywhere_is_finished_by_the_next(without: set[str]) -> None:
    for nth in range(1, 1_000):
        disk = MemoryDriver()
        async with open_persistence(FaultyDriver(disk, without=without)) as db:
            await fill(db.events, "kept", 4)
            before = await keys_of(db.store, "kv")
            await fill(db.events, "t", 6)
            dying = FaultyDriver(disk, without=without)
            victim = await open_persistence(dying)
            dying.crash(nth)
            with contextlib.suppress(Crashed):
                await victim.events.delete("t")
            await db.events.publish("t", "still there")
            await db.events.delete("t")
            assert await keys_of(db.store, "kv") == before, f"killed before step {nth}"
        if not dying.crashed:
            return
    pytest.fail("the deletion never ends")
