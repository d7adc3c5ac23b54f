r"""Where AgentX keeps its keys: a table, a folder, Redis or MongoDB. Each gives keys and the texts below them.

The keys are those of unstorage, in which ``/``, ``\`` and ``:`` all separate, and repeated or outer
separators vanish: `normal` does the same to an id, to find what belongs to it.
"""

from __future__ import annotations

import asyncio
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, cast

from kvpersist import urls
from kvpersist.driver import needs_extra
from kvpersist.errors import BadOption, BadRequest, Unavailable
from kvpersist.ops.importers.plan import printable
from kvpersist.ops.importers.sql import Database, check_url, found_at, held_database, path_of, unlisted

__all__ = ["Place", "normal", "open_place"]

_TABLES: Final = ("kv_storage", "unstorage")
_PAGE: Final = 500  # values read at once
_SCHEMES: Final = ("redis", "rediss", "unix", "valkey", "mongodb", "mongodb+srv")


def normal(key: str) -> str:
    """A key as unstorage writes it."""
    return re.sub(r":+", ":", key.partition("?")[0].replace("/", ":").replace("\\", ":")).strip(":")


class Place(ABC):
    """Keys and values of AgentX; ``name`` stands before a key where people are told of it."""

    name = ""

    def __init__(self, shown: str) -> None:
        self.shown = shown

    @abstractmethod
    async def keys(self) -> list[str]:
        """All keys, sorted."""

    @abstractmethod
    async def get(self, keys: Sequence[str]) -> list[Any]:
        """The values of some hundred keys: texts, or what a database made of them; None where there is none."""

    async def changed(self) -> str | None:
        """As `Source.changed`."""
        return None

    async def close(self) -> None:  # noqa: B027 - a folder has nothing to close
        """Close what was opened."""


async def open_place(where: str, **options: str) -> Place:
    """Open a SQLite file, a folder, or a URL.

    Args:
        options: ``table`` of SQL, ``base`` of Redis, ``database`` and ``collection`` of MongoDB, instead of the usual.
    """
    scheme = where.partition("://")[0].lower() if "://" in where else ""
    if scheme in _SCHEMES:
        check_url(where)
    if scheme in ("mongodb", "mongodb+srv"):
        return await _Mongo.open(where, options.get("database", ""), options.get("collection", "storage"))
    if scheme in _SCHEMES:
        return await _Redis.open(where, options.get("base", "agentx"))
    if found_at(where) == "folder":
        return _Folder(path_of(where))
    return await _Table.open(where, options.get("table"))


class _Table(Place):
    def __init__(self, database: Database, table: str, key: str, value: str) -> None:
        super().__init__(database.shown)
        self.name = table
        quoted = database.quoted
        self._database, self._key, self._value, self._from = database, quoted(key), quoted(value), quoted(table)

    @classmethod
    async def open(cls, where: str, table: str | None) -> _Table:
        async with held_database(where) as database:
            for name in (table,) if table else _TABLES:
                found = await database.table(name)
                if found is not None and found.has("value") and (found.has("key") or found.has("id")):
                    key = found.columns.get("key") or found.columns["id"]
                    return cls(database, name, key, found.columns["value"])
            wanted = table or _TABLES[0]
            raise BadRequest(f"{database.shown} has no table {wanted} of keys and values: no store of agentx")

    async def keys(self) -> list[str]:
        rows = await self._database.fetch(f"SELECT {self._key} FROM {self._from}")  # noqa: S608 - quoted names
        return sorted(_text(key) for (key,) in rows)

    async def get(self, keys: Sequence[str]) -> list[Any]:
        asked = [key for key in keys if printable(key) == key]  # a BLOB that is no text cannot be asked for
        if not asked:
            return [None] * len(keys)
        marks = ", ".join(self._database.mark(number + 1) for number in range(len(asked)))
        statement = f"SELECT {self._key}, {self._value} FROM {self._from} WHERE {self._key} IN ({marks})"  # noqa: S608
        found = {_text(key): value for key, value in await self._database.fetch(statement, *asked)}
        return [found.get(key) for key in keys]

    async def changed(self) -> str | None:
        return await self._database.changed()

    async def close(self) -> None:
        await self._database.close()


class _Folder(Place):
    """A file per key; the folders above it are the segments before. Links are not followed."""

    def __init__(self, base: Path) -> None:
        super().__init__(str(base))
        self._base = base
        self._paths: dict[str, Path] = {}

    async def keys(self) -> list[str]:
        self._paths = await asyncio.to_thread(self._walk)
        return sorted(self._paths)

    async def get(self, keys: Sequence[str]) -> list[Any]:
        return await asyncio.to_thread(lambda: [self._paths[key].read_bytes() for key in keys])

    def _walk(self) -> dict[str, Path]:
        found: dict[str, Path] = {}
        for folder, _, files in os.walk(self._base, onerror=unlisted):
            for file in files:
                path = Path(folder, file)
                if path.is_file() and not path.is_symlink():  # a pipe would be waited for
                    found[":".join(path.relative_to(self._base).parts)] = path
        return found


class _Redis(Place):
    name = "redis"

    def __init__(self, shown: str, client: Any, base: str) -> None:
        super().__init__(shown)
        self._client, self._base = client, base.rstrip(":") + ":" if base else ""

    @classmethod
    async def open(cls, where: str, base: str) -> _Redis:
        with needs_extra("redis", module="redis"):
            from redis.asyncio import Redis
        shown = urls.redact(where)
        if where.startswith("valkey://"):
            where = "redis://" + where.removeprefix("valkey://")
        connect = cast("Any", Redis).from_url
        try:
            client = connect(where, decode_responses=False, socket_timeout=30.0, socket_connect_timeout=30.0)
        except ValueError as error:
            raise BadOption("source", f"{shown}: {error}") from error
        place = cls(shown, client, base)
        try:
            await place._asked(client.ping)
        except BaseException:
            await place.close()
            raise
        return place

    async def keys(self) -> list[str]:
        pattern = re.sub(r"([*?\[\]\\^])", r"\\\1", self._base) + "*"
        found: set[str] = set()
        cursor: Any = 0
        while True:
            cursor, page = await self._asked(lambda at=cursor: self._client.scan(at, match=pattern, count=1000))
            found.update(key.decode("utf-8", "surrogateescape")[len(self._base) :] for key in page)
            if not int(cursor):
                return sorted(found)

    async def get(self, keys: Sequence[str]) -> list[Any]:
        if not keys:
            return []
        names = [(self._base + key).encode("utf-8", "surrogateescape") for key in keys]
        return await self._asked(lambda: self._client.mget(names))

    async def close(self) -> None:
        await self._client.aclose()

    async def _asked(self, call: Any) -> Any:
        from redis.exceptions import AuthenticationError, RedisError

        try:
            return await call()
        except AuthenticationError as error:
            raise BadOption("source", f"{self.shown}: {error}") from error
        except (RedisError, OSError, TimeoutError) as error:
            raise Unavailable(f"{self.shown}: {error}") from error


class _Mongo(Place):
    name = "storage"

    def __init__(self, shown: str, client: Any, database: str, collection: str) -> None:
        super().__init__(shown)
        self.name = collection
        self._client, self._collection = client, client[database][collection]

    @classmethod
    async def open(cls, where: str, database: str, collection: str) -> _Mongo:
        with needs_extra("mongo", module="pymongo"):
            from pymongo import AsyncMongoClient
            from pymongo.errors import ConfigurationError, InvalidURI, PyMongoError
        shown = urls.redact(where)
        connect: Any = AsyncMongoClient
        try:
            client = connect(where, serverSelectionTimeoutMS=30_000)
            named = client.get_default_database(default="agentx").name
        except (ConfigurationError, InvalidURI) as error:
            raise BadOption("source", f"{shown}: {error}") from error
        place = cls(shown, client, database or named, collection)
        try:
            await client.admin.command("ping")
        except PyMongoError as error:
            await client.close()
            raise Unavailable(f"{shown}: {error}") from error
        return place

    async def keys(self) -> list[str]:
        rows = await self._all({}, {"_id": 0, "key": 1})
        return sorted(row["key"] for row in rows if isinstance(row.get("key"), str))

    async def get(self, keys: Sequence[str]) -> list[Any]:
        rows = await self._all({"key": {"$in": list(keys)}}, {"_id": 0, "key": 1, "value": 1})
        found = {row["key"]: row.get("value") for row in rows}
        return [found.get(key) for key in keys]

    async def close(self) -> None:
        await self._client.close()

    async def _all(self, where: dict[str, Any], fields: dict[str, int]) -> list[dict[str, Any]]:
        from pymongo.errors import PyMongoError

        try:
            return [row async for row in self._collection.find(where, fields)]
        except PyMongoError as error:
            raise Unavailable(f"{self.shown}: {error}") from error


def _text(key: Any) -> str:
    return key.decode("utf-8", "surrogateescape") if isinstance(key, bytes) else str(key)
