"""The floor on PostgreSQL: asyncpg, and one statement for whatever is to be done."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Generic, Protocol, Self, TypeVar

import asyncpg
import msgspec
from agent_work import RawMessage, raw_turn

__all__ = ["RawPostgres", "RawPostgresTurns"]


class _Keyed(Protocol):
    @property
    def id(self) -> str: ...


T = TypeVar("T", bound=_Keyed)

_TABLE = 'CREATE TABLE {name} (id text COLLATE "C" PRIMARY KEY, data bytea NOT NULL)'
_PUT = (
    "INSERT INTO {name} SELECT * FROM unnest($1::text[], $2::bytea[])"
    " ON CONFLICT (id) DO UPDATE SET data = excluded.data"
)
_GET = "SELECT id, data FROM {name} WHERE id = any($1::text[])"


class RawPostgres(Generic[T]):
    """Records in a table of (id, data), by one connection."""

    def __init__(self, connection: Any, name: str, type_: type[T]) -> None:
        self.connection, self._name = connection, name
        self._put, self._get = _PUT.format(name=name), _GET.format(name=name)
        self._encode = msgspec.msgpack.Encoder().encode
        self._decode = msgspec.msgpack.Decoder(type_).decode

    @classmethod
    async def open(cls, url: str, name: str, type_: type[T]) -> Self:
        connection = await asyncpg.connect(url)
        await connection.execute(_TABLE.format(name=name))
        return cls(connection, name, type_)

    async def put_many(self, records: Sequence[T]) -> None:
        encode = self._encode
        await self.connection.execute(
            self._put, [record.id for record in records], [encode(record) for record in records]
        )

    async def get_many(self, ids: Sequence[str]) -> list[T | None]:
        decode = self._decode
        found = dict(await self.connection.fetch(self._get, ids))
        return [None if (data := found.get(id_)) is None else decode(data) for id_ in ids]

    async def close(self) -> None:
        await self.connection.execute(f"DROP TABLE {self._name}")
        await self.connection.close()


_TURNS = """
CREATE TABLE {0}_session (id text COLLATE "C" PRIMARY KEY, user_id text, last int NOT NULL DEFAULT 0,
                          calls int NOT NULL DEFAULT 0, updated_at int8 NOT NULL DEFAULT 0);
CREATE INDEX ON {0}_session (updated_at DESC);
CREATE TABLE {0}_message (session_id text COLLATE "C", number int, id text COLLATE "C" NOT NULL UNIQUE, data bytea,
                          PRIMARY KEY (session_id, number));
CREATE TABLE {0}_call (session_id text COLLATE "C", number int, position int, name text, state text,
                       created_at int8, data bytea, PRIMARY KEY (session_id, number, position));
CREATE INDEX ON {0}_call (name, created_at DESC);
CREATE INDEX ON {0}_call (state, created_at DESC);
"""
_TURN = """
WITH s AS (UPDATE {0}_session SET last = last + cardinality($3::text[]), calls = calls + cardinality($5::int[]),
                                  updated_at = $2 WHERE id = $1 RETURNING last - cardinality($3::text[]) + 1 AS first),
m AS (INSERT INTO {0}_message SELECT $1, s.first + x.n::int - 1, x.id, x.data
      FROM s, unnest($3::text[], $4::bytea[]) WITH ORDINALITY AS x (id, data, n)),
c AS (INSERT INTO {0}_call SELECT $1, s.first + x.at, x.position, x.name, x.state, $2, x.data
      FROM s, unnest($5::int[], $6::int[], $7::text[], $8::text[], $9::bytea[]) AS x (at, position, name, state, data))
SELECT first FROM s
"""


class RawPostgresTurns:
    """Sessions, messages and tool calls in three tables; a turn is one statement, on any connection of a pool."""

    def __init__(self, pool: Any, name: str) -> None:
        self._pool, self._name = pool, name
        self._turn = _TURN.format(name)

    @classmethod
    async def open(cls, url: str, name: str, *, connections: int) -> Self:
        pool = await asyncpg.create_pool(url, min_size=connections, max_size=connections)
        await pool.execute(_TURNS.format(name))
        return cls(pool, name)

    async def create(self, user_id: str) -> str:
        id_ = f"{self._name}-{user_id}"
        await self._pool.execute(f"INSERT INTO {self._name}_session (id, user_id) VALUES ($1, $2)", id_, user_id)
        return id_

    async def append(self, session_id: str, messages: Sequence[RawMessage]) -> int:
        turn = raw_turn(session_id, messages)
        ids, data = zip(*turn.messages, strict=True)
        calls = [[at, position, call.name, call.state, data] for at, position, call, data in turn.calls]
        columns = [list(column) for column in zip(*calls, strict=True)] or [[]] * 5
        return await self._pool.fetchval(self._turn, session_id, turn.updated_at, ids, data, *columns)

    async def close(self) -> None:
        await self._pool.execute("".join(f"DROP TABLE {self._name}_{part};" for part in ("session", "message", "call")))
        await self._pool.close()
