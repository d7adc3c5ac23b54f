"""The floor on Redis: redis-py with hiredis, one connection, and the commands an expert would send.

A record is a string. Where lists are wanted, a sorted set of ids stands beside them; several keys are
written together by MSET and ZADD, in one MULTI of one round trip.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Generic, Protocol, TypeVar

import msgspec
from agent_work import RawMessage, raw_turn
from redis.asyncio import Redis

__all__ = ["RawItems", "RawRedis", "RawTurns", "connected", "remove"]


class _Keyed(Protocol):
    @property
    def id(self) -> str: ...


T = TypeVar("T", bound=_Keyed)
R = TypeVar("R")


async def connected(url: str) -> Any:
    return await Redis.from_url(url, single_connection_client=True).initialize()


async def remove(client: Any, base: str) -> None:
    """Remove every key that begins so."""
    names = [name async for name in client.scan_iter(f"{base}*", count=10_000)]
    for start in range(0, len(names), 10_000):
        await client.unlink(*names[start : start + 10_000])


class RawRedis(Generic[T]):
    """Records by id; by owner too, where `own` has stored them."""

    def __init__(self, client: Any, base: str, type_: type[T]) -> None:
        self._client, self._base, self._index = client, f"{base}:r:", f"{base}:i:"
        self._encode = msgspec.msgpack.Encoder().encode
        self._decode = msgspec.msgpack.Decoder(type_).decode

    async def put(self, record: T) -> None:
        await self._client.set(self._base + record.id, self._encode(record))

    async def get(self, id_: str) -> T | None:
        data = await self._client.get(self._base + id_)
        return None if data is None else self._decode(data)

    async def pipeline_put(self, records: Sequence[T]) -> None:
        pipeline = self._client.pipeline(transaction=False)
        for record in records:
            pipeline.set(self._base + record.id, self._encode(record))
        await pipeline.execute()

    async def pipeline_get(self, ids: Sequence[str]) -> list[T | None]:
        pipeline = self._client.pipeline(transaction=False)
        for id_ in ids:
            pipeline.get(self._base + id_)
        return self._decoded(await pipeline.execute())

    async def put_many(self, records: Sequence[T]) -> None:
        pipeline = self._client.pipeline(transaction=True)
        pipeline.mset({self._base + record.id: self._encode(record) for record in records})
        pipeline.zadd(self._index, {record.id: 0 for record in records})
        await pipeline.execute()

    async def get_many(self, ids: Sequence[str]) -> list[T | None]:
        return self._decoded(await self._client.mget([self._base + id_ for id_ in ids]))

    async def own(self, user_id: str, records: Sequence[tuple[int, T]]) -> None:
        """Store (microseconds, record) pairs of a user; not timed."""
        await self._client.mset({self._base + record.id: self._encode(record) for _, record in records})
        await self._client.zadd(self._index + user_id, {record.id: at for at, record in records})

    async def newest(self, user_id: str, count: int) -> list[T | None]:
        ids = await self._client.zrange(self._index + user_id, 0, count - 1, desc=True)
        return await self.get_many([id_.decode() for id_ in ids])

    def _decoded(self, stored: Sequence[bytes | None]) -> list[T | None]:
        decode = self._decode
        return [None if data is None else decode(data) for data in stored]


class RawItems(Generic[R]):
    """Items numbered from 1 per parent; the next number is known here, as it is to a lone writer."""

    def __init__(self, client: Any, base: str) -> None:
        self._client, self._base, self._index = client, f"{base}:l:", f"{base}:l#"
        self._lengths: dict[str, int] = {}
        self._encode = msgspec.msgpack.Encoder().encode

    async def append(self, parent: str, item: R) -> int:
        return await self.append_many(parent, [item])

    async def append_many(self, parent: str, items: Sequence[R]) -> int:
        first = self._lengths.get(parent, 0) + 1
        last = self._lengths[parent] = first + len(items) - 1
        numbered = list(zip(range(first, last + 1), items, strict=True))
        pipeline = self._client.pipeline(transaction=True)
        pipeline.mset({f"{self._base}{parent}:{number}": self._encode(item) for number, item in numbered})
        pipeline.zadd(self._index + parent, {str(number): number for number, _ in numbered})
        await pipeline.execute()
        return last


class RawTurns:
    """Sessions with messages and calls: the same keys as kvpersist's, each turn an MSET and a ZADD.

    A turn writes its messages, a key for each message's id, its calls, and the session's state; the set holds
    all of these and two index entries for each call. Numbers are known here.
    """

    def __init__(self, client: Any, base: str) -> None:
        self._client, self._base = client, f"{base}:t:"
        self._states: dict[str, tuple[int, int]] = {}  # last number, calls
        self._encode = msgspec.msgpack.Encoder().encode

    async def append(self, session_id: str, messages: Sequence[RawMessage]) -> None:
        """One pipeline, on a connection of its own while it lasts."""
        await self.append_all([(session_id, messages)])

    async def append_all(self, turns: Sequence[tuple[str, Sequence[RawMessage]]]) -> None:
        """All of them in one pipeline."""
        async with self._client.pipeline(transaction=True) as pipeline:
            for session_id, messages in turns:
                entries, pointers = self._entries(session_id, messages)
                pipeline.mset({self._base + key: data for key, data in entries.items()})
                pipeline.zadd(self._base, dict.fromkeys([*entries, *pointers], 0))
            await pipeline.execute()

    async def append_singly(self, turns: Sequence[tuple[str, Sequence[RawMessage]]]) -> None:
        """All of them in one pipeline, with a command for every key and every member."""
        async with self._client.pipeline(transaction=True) as pipeline:
            for session_id, messages in turns:
                entries, pointers = self._entries(session_id, messages)
                for key, data in entries.items():
                    pipeline.set(self._base + key, data)
                for key in (*entries, *pointers):
                    pipeline.zadd(self._base, {key: 0})
            await pipeline.execute()

    def _entries(self, session_id: str, messages: Sequence[RawMessage]) -> tuple[dict[str, bytes], list[str]]:
        turn = raw_turn(session_id, messages)
        last, calls = self._states.get(session_id, (0, 0))
        entries: dict[str, bytes] = {}
        pointers: list[str] = []
        for number, (id_, data) in enumerate(turn.messages, last + 1):
            entries[f"message:{session_id}!{number:08x}"] = data
            entries[f"message#id:{id_}"] = b"%s!%d" % (session_id.encode(), number)
        for offset, position, call, data in turn.calls:
            place = f"{session_id}!{last + 1 + offset:08x}!{position}"
            entries[f"call:{place}"] = data
            for field, value in (("name", call.name), ("state", call.state)):
                pointers.append(f"call#{field}:{value}:{turn.updated_at}:{place}")
        state = self._states[session_id] = last + len(turn.messages), calls + len(turn.calls)
        entries[f"session#stat:{session_id}"] = self._encode((*state, turn.updated_at))
        return entries, pointers
