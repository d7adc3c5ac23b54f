"""The event queue: topics in one namespace of a store."""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import Awaitable, Callable, Collection, Sequence
from typing import Any, Final, Self
from weakref import WeakSet

from kvpersist.errors import BadCursor, BadOption, BadRequest, EventsExpired, KvError, StoreClosed
from kvpersist.events._log import COLLECTIONS, TopicLog, checked, entry_of, item_of, moment
from kvpersist.events.consumers import Consumers
from kvpersist.events.groups import EventGroup
from kvpersist.events.records import (
    After,
    EventEntry,
    Lag,
    NewEvent,
    TopicStats,
    number_of,
    position_of,
    split_event_id,
)
from kvpersist.events.removal import remove_topic
from kvpersist.events.retention import Retention
from kvpersist.events.subscription import OnExpired, Subscription
from kvpersist.store import Store

__all__ = ["COLLECTIONS", "EventQueue", "Handler"]

Handler = Callable[[EventEntry], Awaitable[object] | object]
"""Is called with each event; what it returns is awaited where that can be."""

_PAGE: Final = 500  # events read at once where many are asked for
_PAUSE: Final = 0.5  # seconds before a backend that did not answer is asked again
_log = logging.getLogger("kvpersist.events")


class EventQueue:
    """Topics of ordered events, kept in a store: published once, read by whoever wants, from wherever.

    ``async with`` it, or `close` it; the store stays open. Whoever opens the same namespace of the same
    store, in whichever process, shares the topics. A topic needs no creation.

    Example:
        async with EventQueue(store) as queue:
            position = await queue.publish("jobs", {"run": 7})
            async for entry in queue.subscribe("jobs", after="start"):
                print(entry.position, entry.event)
    """

    def __init__(
        self,
        store: Store,
        *,
        namespace: str = "kv",
        retention: float | None = 86_400.0,
        max_events: int | None = None,
        max_bytes: int | None = None,
        keep_unacknowledged: bool = False,
        consumer_ttl: float | None = None,
        cleanup_interval: float = 300.0,
    ) -> None:
        """
        Args:
            retention: seconds that an event is kept; None: without end.
            max_events, max_bytes: how much of a topic is kept; None: all.
            keep_unacknowledged: keep what a known consumer or group has not acknowledged, however old.
            consumer_ttl: seconds after its last acknowledgement at which a consumer is forgotten; None: never.
            cleanup_interval: seconds between two sweeps by this queue, the first after one of them; 0: none.

        Raises:
            BadOption: a number that makes no sense. BadKey: ``namespace`` cannot be part of a key.
            Unsupported: the backend has no ordered scan or no conditional writes.
        """
        for name, value in (("retention", retention), ("consumer_ttl", consumer_ttl)):
            if value is not None and not value > 0:
                raise BadOption(name, f"{value} is not a positive number of seconds; None: without end")
        for name, value in (("max_events", max_events), ("max_bytes", max_bytes)):
            if value is not None and value < 1:
                raise BadOption(name, f"{value} is not a positive number; None: without bound")
        if not cleanup_interval >= 0:
            raise BadOption("cleanup_interval", f"{cleanup_interval} is not a number of seconds; 0: never")
        self.store = store
        self.namespace = namespace
        self._log = TopicLog(store, namespace)
        self._consumers = Consumers(store, self._log, namespace, consumer_ttl)
        self._retention = Retention(
            store,
            self._log,
            self._consumers,
            namespace,
            age=retention,
            count=max_events,
            size=max_bytes,
            keep_unacknowledged=keep_unacknowledged,
            interval=cleanup_interval,
        )
        self._subscriptions: WeakSet[Subscription] = WeakSet()
        self._handling: set[asyncio.Task[None]] = set()
        self._closed = False

    # ---- publishing and reading

    async def publish(
        self,
        topic: str,
        event: Any,
        *,
        channel: str | None = None,
        cursor: str | int | None = None,
        bookmark: Any = None,
    ) -> str:
        """Store ``event`` behind all others of ``topic`` and return its position; then tell those who wait.

        Args:
            event: any free-form value.
            channel: readers may ask for some channels only.
            cursor, bookmark: your own names for this place; `read` and `subscribe` accept them as ``after``.

        Raises:
            Unencodable: the event could not be given back alike.
            DeadlineExceeded: other writers won every time until the store's timeout; nothing was published.
            CommitUnknown: it may have been published, and readers will see it if it was.
        """
        self._begin()
        item = {"event": event}
        if channel is not None or cursor is not None or bookmark is not None:
            item = item_of(NewEvent(event, channel, cursor, bookmark))
        return position_of(await self._log.append(checked(topic, "topic"), item))

    async def publish_many(self, topic: str, events: Sequence[Any]) -> list[str]:
        """Publish ``n`` events in order: ``n`` positions. Up to 500 are one batch, more are cut into several.

        Args:
            events: free-form values; a `NewEvent` where one has a channel, a cursor or a bookmark.
        """
        self._begin()
        items = [item_of(event if isinstance(event, NewEvent) else NewEvent(event)) for event in events]
        checked(topic, "topic")
        return [position_of(number) for number in await self._log.append_many(topic, items)]

    async def read(
        self,
        topic: str,
        after: After = None,
        limit: int = 1_000,
        *,
        channels: str | Collection[str] | None = None,
        on_expired: OnExpired = "raise",
    ) -> list[EventEntry]:
        """Return the first ``limit`` events behind ``after``, oldest first.

        Args:
            after: a position, your own cursor or bookmark, a cursor of the AgentX queue, "now"; None or
                "start": the oldest there is.
            channels: leave out events of others.

        Raises:
            EventsExpired: retention removed what came right behind ``after``, unless ``on_expired="skip"``.
            BadCursor: ``after`` names no place in this topic.
        """
        number = await self._log.place(checked(topic, "topic"), after)
        return await self._read(topic, number, limit, _set_of(channels), on_expired)

    def subscribe(
        self,
        topic: str,
        after: After = None,
        *,
        consumer: str | None = None,
        channels: str | Collection[str] | None = None,
        buffer: int = 100,
        on_expired: OnExpired = "raise",
    ) -> Subscription:
        """Return the events behind ``after``, and then each new one, for ``async for``.

        There is no gap and no repetition between what was there and what comes. It ends when it, or the
        queue, is closed.

        Args:
            after: where to begin, as for `read`; None: "now", for a consumer "start".
            consumer: begin behind what it acknowledged; ``after`` counts while it is not known, and makes it
                known. Acknowledge by `ack`.
            buffer: events read at once, and held at most.

        Raises:
            EventsExpired, BadCursor: as `read`, from the iteration.
        """
        checked(topic, "topic")
        if buffer < 1:
            raise BadOption("buffer", f"{buffer}: hold at least one event")
        if consumer is not None:
            checked(consumer, "consumer")

        async def begin() -> int:
            self._begin()
            if consumer is None:
                return await self._log.place(topic, "now" if after is None else after)
            known = await self._consumers.number(consumer, topic)
            if known is not None:
                return known
            number = await self._log.place(topic, after)
            return await self._consumers.ack(consumer, topic, number)

        subscription = Subscription(
            self._log,
            topic,
            begin,
            lambda: self.store._waker(self._log.wake_prefix(topic)),
            channels=_set_of(channels),
            buffer=buffer,
            on_expired=on_expired,
        )
        self._subscriptions.add(subscription)
        return subscription

    async def on(
        self,
        topic: str,
        handler: Handler,
        after: After = None,
        *,
        consumer: str | None = None,
        channels: str | Collection[str] | None = None,
    ) -> Callable[[], None]:
        """Call ``handler`` with each event, one after the other; return a function that ends this.

        What the handler raises is logged, and it is called with the next event all the same; so is what
        expired before it was called with it. With a
        ``consumer`` each event is acknowledged once the handler has returned; one at which it raised is
        acknowledged with the next that succeeds. ``after``, ``consumer`` and ``channels`` are as for `subscribe`.
        """
        subscription = self.subscribe(topic, after, consumer=consumer, channels=channels)
        await subscription.__aenter__()
        task = asyncio.get_running_loop().create_task(self._handle(subscription, handler, consumer))
        self._handling.add(task)
        task.add_done_callback(self._handling.discard)
        return subscription._end

    def replay(
        self,
        topic: str | None,
        last_event_id: str | None = None,
        *,
        otherwise: After = "now",
        channels: str | Collection[str] | None = None,
        on_expired: OnExpired = "raise",
    ) -> Subscription:
        """Resume a stream at the ``Last-Event-ID`` a client sent: the events behind it, and then each new one.

        Args:
            topic: None: the one that the id names, as `EventEntry.event_id` does.
            last_event_id: the id of `EventEntry.sse`; None or empty: there is none.
            otherwise: where to begin without one.

        Raises:
            BadCursor: the id names no place in this topic; from the iteration, or at once where it
                names no topic, or another.
        """
        named, after = split_event_id(last_event_id or "")
        if topic is None:
            topic = named
        elif named is not None and named != topic:
            raise BadCursor(last_event_id or "")
        if topic is None:
            raise BadCursor(last_event_id or "")
        return self.subscribe(topic, after or otherwise, channels=channels, on_expired=on_expired)

    # ---- consumers

    async def ack(self, consumer: str, topic: str, position: After) -> str:
        """Note that ``consumer`` is done with everything up to ``position``; return how far it has come.

        A cursor only moves forward: an older position changes nothing.

        Raises:
            BadCursor: the topic has not come so far, or ``position`` names no place in it.
        """
        self._begin()
        number = await self._log.place(checked(topic, "topic"), position)
        return position_of(await self._consumers.ack(checked(consumer, "consumer"), topic, number))

    async def cursor(self, consumer: str, topic: str) -> str | None:
        """The position up to which ``consumer`` acknowledged; None: it is not known."""
        number = await self._consumers.number(checked(consumer, "consumer"), checked(topic, "topic"))
        return None if number is None else position_of(number)

    async def recover(
        self,
        consumer: str,
        topic: str,
        limit: int = 1_000,
        *,
        channels: str | Collection[str] | None = None,
        on_expired: OnExpired = "raise",
    ) -> list[EventEntry]:
        """Return the first ``limit`` events that ``consumer`` has not acknowledged, oldest first.

        Raises:
            EventsExpired: as `read`.
        """
        number = await self._consumers.number(checked(consumer, "consumer"), checked(topic, "topic"))
        if number is None:
            number = await self._log.place(topic, "start")
        return await self._read(topic, number, limit, _set_of(channels), on_expired)

    async def lag(self, consumer: str, topic: str) -> Lag:
        """How many events wait for ``consumer``, and how many expired before it acknowledged them: a few reads."""
        state = await self._log.state(checked(topic, "topic"))
        number = await self._consumers.number(checked(consumer, "consumer"), topic)
        if number is None:
            number = state.first - 1
        return Lag(max(0, state.last - max(number, state.first - 1)), max(0, state.first - 1 - number))

    async def consumers(self, topic: str) -> dict[str, str]:
        """The consumers of a topic, and the position up to which each acknowledged."""
        return {name: position_of(number) async for name, number in self._consumers.all(checked(topic, "topic"))}

    async def forget(self, consumer: str, topic: str) -> bool:
        """Forget a consumer's cursor; False where there is none."""
        return await self._consumers.forget(checked(consumer, "consumer"), checked(topic, "topic"))

    def group(
        self,
        topic: str,
        name: str,
        *,
        after: After = "start",
        deadline: float = 30.0,
        max_attempts: int = 5,
        in_flight: int = 256,
        on_expired: OnExpired = "raise",
    ) -> EventGroup:
        """A group of consumers that share the events of a topic: each event goes to one of them.

        Args:
            after: where a new group begins; one that is there goes on where it is.
            deadline: seconds after which an event that was handed out is handed out again.
            max_attempts: how often, before it is parked.
            in_flight: events handed out and not acknowledged, at most.
        """
        for option, value in (("deadline", deadline), ("max_attempts", max_attempts), ("in_flight", in_flight)):
            if not value > 0:
                raise BadOption(option, f"{value} is not a positive number")
        return EventGroup(
            self.store,
            self._log,
            self.namespace,
            checked(topic, "topic"),
            checked(name, "group"),
            begin=self._begin,
            after=after,
            deadline=deadline,
            max_attempts=max_attempts,
            in_flight=in_flight,
            on_expired=on_expired,
        )

    # ---- topics and retention

    async def topics(self) -> list[str]:
        """The topics that ever had an event, in order."""
        return [topic async for topic in self._log.parents()]

    async def delete(self, topic: str) -> bool:
        """Remove a topic: its events, consumers, groups and what they parked; False where there was none.

        In batches; what an interrupted call left, the next one removes. An event published meanwhile goes too,
        or is the first of a new topic, whose positions begin anew: who still follows the old one gets BadCursor.
        Without atomic batches they go on where they were, and the topic's name stays among `topics`, for 30 days.
        """
        return await remove_topic(self.store, self._log, checked(topic, "topic"))

    async def stats(self, topic: str) -> TopicStats:
        """What a topic holds: a few reads, whatever its length."""
        state = await self._log.state(checked(topic, "topic"))
        if state.last < state.first:
            return TopicStats(None, None, 0, 0, None)
        [oldest] = await self._log.many(topic, [state.first])
        at, size, _ = state.tail
        held = size - (oldest["from"] if oldest is not None else 0)
        count = state.last + 1 - state.first
        return TopicStats(position_of(state.first), position_of(state.last), count, held, moment(at))

    async def sweep(self) -> int:
        """Apply retention now; return how many events went."""
        return await self._retention.sweep()

    # ---- life

    async def close(self) -> None:
        """End every subscription and the sweeps; a second call does nothing. The store stays open."""
        self._closed = True
        if self.store._is_forked:
            return
        for subscription in tuple(self._subscriptions):
            subscription._end()
        me = asyncio.current_task()
        handling = [task for task in self._handling if task is not me]
        if handling:
            await asyncio.wait(handling)
        await self._retention.stop()

    async def __aenter__(self) -> Self:
        self._begin()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def _begin(self) -> None:
        if self._closed:
            raise StoreClosed("the event queue was closed: make another")
        self._retention.start()

    async def _read(
        self, topic: str, number: int, limit: int, channels: frozenset[str] | None, on_expired: OnExpired
    ) -> list[EventEntry]:
        if limit < 0:
            raise BadRequest(f"limit is 0 or more, not {limit}")
        entries: list[EventEntry] = []
        while len(entries) < limit:
            try:
                page, more = await self._log.page(topic, number, min(_PAGE, limit - len(entries)))
            except EventsExpired as error:
                first = number_of(error.first)
                if on_expired == "raise" or first is None:
                    raise
                number = first - 1
                continue
            entries += [
                entry_of(topic, at, item) for at, item in page if channels is None or item.get("channel") in channels
            ]
            if not more:
                break
            number = page[-1].number
        return entries

    async def _handle(self, subscription: Subscription, handler: Handler, consumer: str | None) -> None:
        """Hand on events until the subscription ends; a backend that does not answer is asked again."""
        while True:
            try:
                entry = await anext(subscription)
                try:
                    done = handler(entry)
                    if inspect.isawaitable(done):
                        await done
                except Exception:  # noqa: BLE001  # a handler's mistake ends neither the others nor itself
                    _log.exception("a handler of topic %r failed at %s", entry.topic, entry.position)
                else:
                    if consumer is not None:
                        await self.ack(consumer, entry.topic, entry.position)
            except (StopAsyncIteration, StoreClosed):
                return
            except EventsExpired as error:
                _log.error("the handler of topic %r goes on: %s", subscription.topic, error)
                subscription._pass(error)
            except KvError as error:
                _log.error("the handler of topic %r got no event: %s", subscription.topic, error)
                if not error.retryable:
                    return
                await asyncio.sleep(_PAUSE)


def _set_of(channels: str | Collection[str] | None) -> frozenset[str] | None:
    if channels is None:
        return None
    return frozenset((channels,) if isinstance(channels, str) else channels)
