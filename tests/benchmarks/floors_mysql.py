"""The floor on MySQL and MariaDB: asyncmy, one connection, statements of many rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Generic, Protocol, Self, TypeVar

import asyncmy
import msgspec

__all__ = ["RawMysql"]


class _Keyed(Protocol):
    @property
    def id(self) -> str: ...


T = TypeVar("T", bound=_Keyed)


class RawMysql(Generic[T]):
    """Records in a table of (id, data)."""

    def __init__(self, connection: Any, name: str, type_: type[T]) -> None:
        self.connection, self._name = connection, name
        self._encode = msgspec.msgpack.Encoder().encode
        self._decode = msgspec.msgpack.Decoder(type_).decode

    @classmethod
    async def open(cls, name: str, type_: type[T], **where: Any) -> Self:
        raw = cls(await asyncmy.connect(autocommit=True, **where), name, type_)
        await raw.run(f"CREATE TABLE {name} (id varbinary(255) PRIMARY KEY, data longblob NOT NULL)")
        return raw

    async def run(self, sql: str, arguments: Sequence[Any] = ()) -> Sequence[tuple[Any, ...]]:
        async with self.connection.cursor() as cursor:
            await cursor.execute(sql, arguments or None)
            return await cursor.fetchall() if cursor.description else ()

    async def put_many(self, records: Sequence[T]) -> None:
        rows = ",".join(["(%s,%s)"] * len(records))
        sql = f"INSERT INTO {self._name} VALUES {rows} ON DUPLICATE KEY UPDATE data = VALUES(data)"
        await self.run(sql, [value for record in records for value in (record.id, self._encode(record))])

    async def get_many(self, ids: Sequence[str]) -> list[T | None]:
        decode = self._decode
        marks = ",".join(["%s"] * len(ids))
        found = dict(await self.run(f"SELECT id, data FROM {self._name} WHERE id IN ({marks})", ids))
        return [None if (data := found.get(id_.encode())) is None else decode(data) for id_ in ids]

    async def close(self) -> None:
        await self.run(f"DROP TABLE {self._name}")
        self.connection.close()
