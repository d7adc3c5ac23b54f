"""Events and consumers of another system, as topics of ours.

An event keeps its cursor and its bookmark; by its bookmark (or, without one, its cursor) and channel it
is known again, so that none is published twice. Its age counts from the import: retention by time would
otherwise remove at once what has just come.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, Final

import msgspec

from kvpersist.errors import BadCursor, BadRequest
from kvpersist.events import EventQueue
from kvpersist.events.records import NewEvent
from kvpersist.ops.importers.plan import ConsumerPosition, Events, Problem

__all__ = ["OnProblem", "Topics"]

_PAGE: Final = 250  # events read or written at once

OnProblem = Callable[[Problem], None]


class Topics:
    """The topics of one import."""

    def __init__(self, queue: EventQueue, *, dry_run: bool) -> None:
        self._queue, self._dry_run = queue, dry_run
        self._there: dict[str, set[str]] = {}

    async def add(self, events: Events, problem: OnProblem) -> int:
        """Publish those that are not there yet, in their order; return how many that were."""
        there = await self._marks(events.topic)
        wanted = [event for event in events.events if _mark(event.cursor, event.bookmark, event.channel) not in there]
        if self._dry_run:
            return len(wanted)
        published = 0
        for start in range(0, len(wanted), _PAGE):
            batch = wanted[start : start + _PAGE]
            try:
                await self._queue.publish_many(events.topic, batch)
                published += len(batch)
            except BadRequest:  # one of them cannot be kept: nothing was written
                for event in batch:
                    published += await self._one(events, event, problem)
        there.update(_mark(event.cursor, event.bookmark, event.channel) for event in wanted)
        return published

    async def acknowledge(self, position: ConsumerPosition, problem: OnProblem) -> int:
        """Note how far a consumer has come, if it is not as far; return 1 if so, otherwise 0."""
        queue = self._queue
        try:
            before = await queue.cursor(position.consumer, position.topic)
            if self._dry_run:
                return int(before is None)
            after = "start" if position.cursor is None else position.cursor
            return int(before != await queue.ack(position.consumer, position.topic, after))
        except (BadCursor, BadRequest) as error:
            problem(Problem(place=position.place, reason=str(error)))
            return 0

    async def missing(self, events: Events) -> int:
        """How many of ``events`` are not there."""
        there = await self._marks(events.topic)
        return sum(_mark(event.cursor, event.bookmark, event.channel) not in there for event in events.events)

    async def _one(self, events: Events, event: NewEvent, problem: OnProblem) -> int:
        place = f"{events.place} {event.cursor if event.cursor is not None else event.bookmark}"
        try:
            await self._queue.publish_many(events.topic, [event])
        except BadRequest as error:
            if event.cursor is None:
                problem(Problem(place=place, reason=str(error)))
                return 0
            unnamed = msgspec.structs.replace(event, cursor=None)
            try:
                await self._queue.publish_many(events.topic, [unnamed])
            except BadRequest:
                problem(Problem(place=place, reason=str(error)))
                return 0
            problem(Problem(place=place, reason=f"imported without its cursor: {error}", left_out=False))
        return 1

    async def _marks(self, topic: str) -> set[str]:
        """The marks of what a topic holds; read once."""
        found = self._there.get(topic)
        if found is None:
            found = self._there[topic] = set()
            try:
                entries = await self._queue.read(topic, limit=_PAGE)
            except BadRequest:  # a topic that cannot be named holds nothing
                return found
            while entries:
                found.update(_mark(entry.cursor, entry.bookmark, entry.channel) for entry in entries)
                entries = await self._queue.read(topic, after=entries[-1].position, limit=_PAGE, on_expired="skip")
        return found


def _mark(cursor: Any, bookmark: Any, channel: str | None) -> str:
    return json.dumps([cursor if bookmark is None else None, bookmark, channel], sort_keys=True, default=str)
