"""The queue of AgentX, ``queue.db``: events with their cursors, and how far consumers have come."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Mapping
from typing import Any, Final, Self

from kvpersist.events.records import NewEvent
from kvpersist.ops.importers.plan import Bad, ConsumerPosition, Events, Item, Problem, json_value
from kvpersist.ops.importers.sql import Database, Row, Table, held_database
from kvpersist.ops.importers.tables import TablesSource

__all__ = ["AgentxQueue"]

_CURSOR: Final = re.compile(r"([0-9a-z]+)-([0-9]+)")
_PAGE: Final = 200  # events handed on at once


class AgentxQueue(TablesSource):
    """``queue.db``: events in the order of their cursors, then the consumers."""

    def __init__(self, database: Database, entries: Table, consumers: Table | None) -> None:
        super().__init__("agentx", database)
        self._entries, self._consumers = entries, consumers

    @classmethod
    async def open(cls, where: str) -> Self:
        """Open the file.

        Raises:
            BadRequest: it is no queue.
        """
        async with held_database(where) as database:
            entries = await database.needed("entries", "the agentx queue", "cursor", "topic", "event")
            return cls(database, entries, await database.table("consumers"))

    async def items(self) -> AsyncIterator[Item]:
        database, entries = self._database, self._entries
        topic_column = database.quoted(entries.columns["topic"])
        statement = f"SELECT DISTINCT {topic_column} FROM {database.quoted(entries.name)}"  # noqa: S608 - quoted names
        topics: list[Any] = sorted(topic for (topic,) in await database.fetch(statement) if isinstance(topic, str))
        cursors: dict[str, list[str]] = {}
        for topic in topics:
            rows = await database.select(entries, where={"topic": topic}, order=("id",))
            order: list[tuple[tuple[int, int], int, Row]] = []
            for index, row in enumerate(rows):
                place = _sequence(row.get("cursor"))
                if place is None:
                    yield Problem(place=self._at(topic, row), reason="its cursor is none of the agentx queue's")
                else:
                    order.append((place, index, row))
            order.sort(key=lambda item: item[:2])
            known = cursors[topic] = []
            chunk: list[NewEvent] = []
            for _, index, row in order:
                try:
                    event = json_value(row["event"])
                    bookmark = {"seq": row.get("id", index), "timestamp": row.get("timestamp")}
                    chunk.append(NewEvent(event, cursor=row["cursor"], bookmark=bookmark))
                    known.append(row["cursor"])
                except Bad as error:
                    yield Problem(place=self._at(topic, row), reason=str(error))
                if len(chunk) == _PAGE:
                    yield Events(place=f"entries of {topic}", topic=topic, events=chunk)
                    chunk = []
            if chunk:
                yield Events(place=f"entries of {topic}", topic=topic, events=chunk)
        async for item in self._positions(cursors):
            yield item

    async def total(self) -> int | None:
        return None

    async def _positions(self, cursors: Mapping[str, list[str]]) -> AsyncIterator[Item]:
        if self._consumers is None:
            return
        for row in await self._database.select(self._consumers, order=("consumer_id", "topic")):
            consumer, topic, cursor = row.get("consumerid"), row.get("topic"), row.get("cursor")
            place = f"consumers {consumer} {topic}"
            reached = _sequence(cursor)
            if not isinstance(consumer, str) or not isinstance(topic, str) or reached is None:
                yield Problem(place=place, reason="it is no position in a topic")
                continue
            done = [each for each in cursors.get(topic, ()) if (_sequence(each) or reached) <= reached]
            yield ConsumerPosition(place=place, consumer=consumer, topic=topic, cursor=done[-1] if done else None)

    def _at(self, topic: str, row: Row) -> str:
        return f"entries of {topic} {row.get('cursor')}"


def _sequence(cursor: Any) -> tuple[int, int] | None:
    """What a cursor is compared by: milliseconds, and the number within them."""
    found = _CURSOR.fullmatch(cursor) if isinstance(cursor, str) else None
    return None if found is None else (int(found[1], 36), int(found[2]))
