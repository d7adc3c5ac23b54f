"""Consumers: how far each has acknowledged a topic, one small key each."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any, Final, NamedTuple

from kvpersist import codec, keys
from kvpersist.driver import ABSENT, Delete, Expect, Put
from kvpersist.errors import BadCursor
from kvpersist.events._log import TopicLog
from kvpersist.events.records import position_of
from kvpersist.funnel import Built, Funnel
from kvpersist.store import Store

__all__ = ["Consumers"]

_PAGE: Final = 250  # cursors read at once


class _Cursor(NamedTuple):
    number: int | None  # None: it acknowledged nothing, and is not known
    expect: Expect
    last: int  # the topic's last number as far as this process looked


class _Ack(NamedTuple):
    topic: str
    number: int


class Consumers:
    """The cursors of a namespace's consumers. A cursor only moves forward, whoever acknowledges at once."""

    def __init__(self, store: Store, log: TopicLog, namespace: str, ttl: float | None) -> None:
        self._store = store
        self._log = log
        self._ttl = ttl
        self._prefix = keys.record_prefix(keys.namespace(namespace), "event_consumer")
        self._funnel: Funnel[_Cursor, _Ack, int] = Funnel(store, self._load, self._build, what="acknowledge")

    def key(self, consumer: str, topic: str) -> str:
        """Where the cursor lies: below its topic."""
        return f"{self._below(topic)}{keys.encode(consumer)}"

    async def ack(self, consumer: str, topic: str, number: int) -> int:
        """Note that everything up to ``number`` is done; return how far the consumer has come."""
        return await self._funnel.submit(self.key(consumer, topic), _Ack(topic, number))

    async def number(self, consumer: str, topic: str) -> int | None:
        """How far the consumer has come; None: it is not known."""
        key = self.key(consumer, topic)
        [entry] = await self._store._entries([key])
        return None if entry is None else _number(key, entry.value)

    async def forget(self, consumer: str, topic: str) -> bool:
        """Remove a cursor; False where there was none."""
        key = self.key(consumer, topic)
        self._funnel.forget(key)
        [entry] = await self._store._entries([key])
        if entry is not None:
            await self._store._commit([Delete(key)])
        return entry is not None

    async def all(self, topic: str) -> AsyncIterator[tuple[str, int]]:
        """Yield the consumers of a topic and how far they have come."""
        prefix = self._below(topic)
        start, end = prefix, keys.prefix_end(prefix)
        while True:
            page = await self._store._scan(start, end, limit=_PAGE)
            for entry in page:
                yield keys.decode(entry.key[len(prefix) :], str), _number(entry.key, entry.value)
            if len(page) < _PAGE:
                return
            start = page[-1].key + "\0"

    def _below(self, topic: str) -> str:
        return f"{self._prefix}{keys.encode(topic)}!"

    async def _load(self, key: str) -> _Cursor:
        [entry] = await self._store._entries([key])
        if entry is None:
            return _Cursor(None, ABSENT, -1)
        return _Cursor(_number(key, entry.value), entry.version, -1)

    async def _build(self, key: str, state: _Cursor, acks: list[_Ack]) -> Built[_Cursor, int]:
        number, last = state.number, state.last
        results: list[int | BadCursor] = []
        for ack in acks:
            if ack.number > last:
                last = (await self._log.state(ack.topic)).last
            if ack.number > last:  # it would pass over what is still to be published
                results.append(BadCursor(position_of(ack.number)))
                continue
            number = ack.number if number is None else max(number, ack.number)
            results.append(number)
        ops: list[Any] = []
        if number is not None and (number != state.number or self._ttl is not None):
            value = codec.encode_plain(key, {"number": number}, self._store.codec)
            expires_at = None if self._ttl is None else self._store.clock() + self._ttl
            ops.append(Put(key, value, state.expect, expires_at))
        return Built(ops, lambda version: _Cursor(number, version, last), results)


def _number(key: str, value: bytes) -> int:
    return codec.decode_plain(key, value)["number"]
