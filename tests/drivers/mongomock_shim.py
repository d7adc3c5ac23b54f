"""mongomock behind the few calls of an ``AsyncMongoClient`` that the MongoDB driver makes.

For tests without a server. mongomock has no asynchronous client, and its ``bulk_write`` does not know
the arguments that PyMongo passes since 4.11, so bulks are done one by one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import mongomock
from pymongo import DeleteOne
from pymongo.errors import OperationFailure
from pymongo.write_concern import WriteConcern

__all__ = ["MockClient"]


class MockClient:
    """Like ``AsyncMongoClient``. Without ``ttl`` it refuses the index that removes what expired by the real clock.

    Attributes:
        commands: those that a server would have received.
        after: what happens once, right after a command of that name.
        fail: what commands of that name raise instead.
    """

    def __init__(self, *, ttl: bool = True) -> None:
        self.ttl = ttl
        self.mock: Any = mongomock.MongoClient()
        self.write_concern = WriteConcern()
        self.commands: list[str] = []
        self.after: dict[str, Callable[[], object]] = {}
        self.fail: dict[str, Exception] = {}

    @property
    def admin(self) -> MockClient:
        return self

    async def command(self, name: str) -> dict[str, Any]:
        return await self._sent(name, lambda: self.mock.server_info())

    def get_database(self, name: str) -> _Database:
        return _Database(self, self.mock.get_database(name))

    async def close(self) -> None:
        self.mock.close()

    async def _sent(self, name: str, act: Callable[[], Any]) -> Any:
        self.commands.append(name)
        await asyncio.sleep(0)
        if name in self.fail:
            raise self.fail[name]
        try:
            return act()
        finally:
            self.after.pop(name, lambda: None)()


class _Database:
    def __init__(self, client: MockClient, mock: Any) -> None:
        self.client, self._mock = client, mock

    def get_collection(self, name: str, **_: Any) -> _Collection:
        return _Collection(self.client, self._mock.get_collection(name))


class _Collection:
    def __init__(self, client: MockClient, mock: Any) -> None:
        self._client, self._mock = client, mock

    async def create_index(self, *arguments: Any, **options: Any) -> str:
        if not self._client.ttl:
            raise OperationFailure("not implemented", 238)
        return await self._client._sent("createIndexes", lambda: self._mock.create_index(*arguments, **options))

    def find(self, *arguments: Any, **options: Any) -> _Cursor:
        return _Cursor(self._client, lambda: list(self._mock.find(*arguments, **options)))

    async def insert_many(self, documents: list[dict[str, Any]], *, ordered: bool) -> Any:
        return await self._client._sent("insert", lambda: self._mock.insert_many(documents, ordered=ordered))

    async def delete_many(self, query: dict[str, Any]) -> Any:
        return await self._client._sent("delete", lambda: self._mock.delete_many(query))

    async def bulk_write(self, requests: list[Any], *, ordered: bool) -> Any:
        kinds = {type(request) for request in requests}
        assert len(kinds) == 1, "one command"
        name = "delete" if DeleteOne in kinds else "update"
        return await self._client._sent(name, lambda: _Bulk([self._one(request) for request in requests]))

    def _one(self, request: Any) -> Any:
        if isinstance(request, DeleteOne):
            return self._mock.delete_one(request._filter)
        return self._mock.replace_one(request._filter, request._doc, upsert=bool(request._upsert))


class _Bulk:
    """What ``bulk_write`` returns."""

    def __init__(self, done: list[Any]) -> None:
        self.deleted_count = sum(getattr(each, "deleted_count", 0) for each in done)
        upserted = sum(getattr(each, "upserted_id", None) is not None for each in done)
        matched = sum(getattr(each, "matched_count", 0) for each in done)
        self.bulk_api_result = {"nMatched": matched, "nUpserted": upserted}


class _Cursor:
    def __init__(self, client: MockClient, act: Any) -> None:
        self._client, self._act = client, act

    async def to_list(self) -> list[dict[str, Any]]:
        return await self._client._sent("find", self._act)
