"""The floors of a long conversation: what an expert would send to SQLite and to Redis for it, and nothing else."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from typing import Any

import msgspec
from agent_work import RawMessage
from floors_sqlite import RawThread
from uuid_utils import uuid7

__all__ = ["RawConversationsRedis", "RawConversationsSqlite"]

_SCRIPT = """
create table messages (session text, number integer, id text unique, data blob, primary key (session, number));
create table sessions (id text primary key, last integer, messages integer);
"""
_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(RawMessage).decode


class RawConversationsSqlite:
    """Messages by session and number, a unique id, and a row that counts them."""

    def __init__(self, path: str) -> None:
        self._thread = RawThread(path, _SCRIPT)

    async def append_many(self, session: str, messages: Sequence[RawMessage]) -> list[str]:
        ids = [str(uuid7()) for _ in messages]
        rows = [(id_, _encode(message)) for id_, message in zip(ids, messages, strict=True)]
        await self._thread.write(_append, (session, rows))
        return ids

    async def last(self, session: str, count: int) -> list[RawMessage]:
        rows = await self._thread.read(_last, (session, count))
        return [_decode(data) for (data,) in reversed(rows)]

    async def count(self, session: str) -> int:
        return await self._thread.read(_count, session)

    async def delete(self, id_: str) -> None:
        await self._thread.write(_delete, id_)

    async def close(self) -> None:
        await self._thread.close()


def _append(connection: sqlite3.Connection, turn: tuple[str, list[tuple[str, bytes]]]) -> None:
    session, rows = turn
    [(last,)] = connection.execute(
        "insert into sessions values (?1, ?2, ?2) on conflict (id) do update set last = last + ?2, "
        "messages = messages + ?2 returning last",
        (session, len(rows)),
    ).fetchall()
    first = last - len(rows) + 1
    connection.executemany(
        "insert into messages values (?, ?, ?, ?)",
        [(session, number, id_, data) for number, (id_, data) in enumerate(rows, first)],
    )


def _last(connection: sqlite3.Connection, row: tuple[str, int]) -> list[tuple[bytes]]:
    return connection.execute(
        "select data from messages where session = ? order by number desc limit ?", row
    ).fetchall()


def _count(connection: sqlite3.Connection, session: str) -> int:
    return connection.execute("select messages from sessions where id = ?", (session,)).fetchone()[0]


def _delete(connection: sqlite3.Connection, id_: str) -> None:
    [(session,)] = connection.execute("delete from messages where id = ? returning session", (id_,)).fetchall()
    connection.execute("update sessions set messages = messages - 1 where id = ?", (session,))


class RawConversationsRedis:
    """A string for each message and one for its id, a sorted set of numbers, a hash that counts; numbers known here."""

    def __init__(self, client: Any, base: str) -> None:
        self._client, self._base = client, f"{base}:c:"
        self._last: dict[str, int] = {}

    async def append_many(self, session: str, messages: Sequence[RawMessage]) -> list[str]:
        first = self._last.get(session, 0) + 1
        self._last[session] = first + len(messages) - 1
        ids = [str(uuid7()) for _ in messages]
        pipeline = self._client.pipeline(transaction=True)
        strings: dict[str, bytes | str] = {}
        for number, (id_, message) in enumerate(zip(ids, messages, strict=True), first):
            strings[f"{self._base}{session}:{number}"] = _encode(message)
            strings[f"{self._base}id:{id_}"] = f"{session}:{number}"
        pipeline.mset(strings)
        pipeline.zadd(self._base + session, {str(number): number for number in range(first, first + len(messages))})
        pipeline.hincrby(f"{self._base}{session}:stat", "messages", len(messages))
        await pipeline.execute()
        return ids

    async def last(self, session: str, count: int) -> list[RawMessage]:
        numbers = await self._client.zrange(self._base + session, 0, count - 1, desc=True)
        stored = await self._client.mget([f"{self._base}{session}:{number.decode()}" for number in reversed(numbers)])
        return [_decode(data) for data in stored]

    async def count(self, session: str) -> int:
        return int(await self._client.hget(f"{self._base}{session}:stat", "messages"))

    async def delete(self, id_: str) -> None:
        place = (await self._client.get(f"{self._base}id:{id_}")).decode()
        session, _, number = place.partition(":")
        pipeline = self._client.pipeline(transaction=True)
        pipeline.unlink(self._base + place, f"{self._base}id:{id_}")
        pipeline.zrem(self._base + session, number)
        pipeline.hincrby(f"{self._base}{session}:stat", "messages", -1)
        await pipeline.execute()
