"""The floor on MongoDB: pymongo's asynchronous client, one command for many documents."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Generic, Protocol, TypeVar

import msgspec
from pymongo import ReplaceOne

__all__ = ["RawMongo"]


class _Keyed(Protocol):
    @property
    def id(self) -> str: ...


T = TypeVar("T", bound=_Keyed)


class RawMongo(Generic[T]):
    """Records as documents of an id and bytes."""

    def __init__(self, collection: Any, type_: type[T]) -> None:
        self._collection = collection
        self._encode = msgspec.msgpack.Encoder().encode
        self._decode = msgspec.msgpack.Decoder(type_).decode

    async def put_many(self, records: Sequence[T]) -> None:
        encode = self._encode
        writes = [ReplaceOne({"_id": record.id}, {"v": encode(record)}, upsert=True) for record in records]
        await self._collection.bulk_write(writes, ordered=False)

    async def get_many(self, ids: Sequence[str]) -> list[T | None]:
        decode = self._decode
        documents = await self._collection.find({"_id": {"$in": list(ids)}}, batch_size=len(ids) + 1).to_list()
        found = {document["_id"]: document["v"] for document in documents}
        return [None if (data := found.get(id_)) is None else decode(data) for id_ in ids]
