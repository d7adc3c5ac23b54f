"""The collection that holds the entries, and the four calls that are made on it."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any, Final, cast

from bson.codec_options import CodecOptions
from pymongo import DeleteOne, ReadPreference, ReplaceOne
from pymongo.errors import BulkWriteError, OperationFailure
from pymongo.read_concern import ReadConcern
from pymongo.write_concern import WriteConcern

from kvpersist.driver import ABSENT, Entry, Expect, Put, milliseconds
from kvpersist.errors import BadOption, CommitUnknown, CorruptRecord, KvError, ReadOnly, ValueTooLarge
from kvpersist_drivers.mongo._errors import DUPLICATE_KEY, Translator

__all__ = ["MAX_KEY_BYTES", "MAX_VALUE_BYTES", "Entries", "document", "entry_of", "moment"]

MAX_KEY_BYTES: Final = 1024
MAX_VALUE_BYTES: Final = (16 << 20) - 2048  # of a document of 16 MiB, less the key and 50 bytes of BSON
PAGE: Final = 1000  # entries of one answer
_SINGLY: Final = 16  # keys at most that are asked for one by one, side by side, where the server finds only one

_SKEW: Final = 60  # seconds that an expired document stays: the server's clock may be ahead of ours
_BEGIN: Final = datetime(1970, 1, 1)  # noqa: DTZ001  # PyMongo's datetimes are UTC and naive
_LAST: Final = 253_402_300_799_999  # milliseconds: the end of year 9999, the last that a datetime can say
_NO_VALUE: Final = {"v": 0}


def moment(expires_ms: int) -> datetime:
    """Return milliseconds since 1970 as PyMongo takes them."""
    return _BEGIN + timedelta(milliseconds=min(expires_ms, _LAST))


def document(put: Put, version: bytes) -> dict[str, Any]:
    """Return what is stored for ``put``."""
    if put.expires_at is None:
        return {"_id": put.key, "v": put.value, "r": version}
    return {"_id": put.key, "v": put.value, "r": version, "e": moment(milliseconds(put.expires_at))}


def entry_of(found: dict[str, Any]) -> Entry:
    """Return the entry of a stored document.

    Raises:
        CorruptRecord: nobody of ours wrote it.
    """
    key, version, value, expires = found["_id"], found.get("r"), found.get("v", b""), found.get("e")
    if type(version) is not bytes or type(value) is not bytes or not (expires is None or type(expires) is datetime):
        raise CorruptRecord(key, "the document has not the fields that kvpersist writes")
    if expires is None:
        return Entry(key, value, version)
    return Entry(key, value, version, (expires - _BEGIN) // timedelta(milliseconds=1) / 1000)


class Entries:
    """One command for each call; PyMongo cuts one that is too large for a message."""

    def __init__(self, database: Any, name: str, errors: Translator) -> None:
        self.errors = errors
        self.finds_one_only = False  # the server reads every document, unless it is asked for one by its ``_id``
        self.at_once = sys.maxsize  # replacements, or inserts in order, that one command may have
        writes: WriteConcern = database.client.write_concern
        if writes.is_server_default:
            writes = WriteConcern("majority")
        if not writes.acknowledged:
            raise BadOption("url", "with w=0 nobody learns whether a write happened: leave it out")
        # a majority may not know yet what fewer have acknowledged
        reads = ReadConcern("majority" if writes.document.get("w") == "majority" else "local")
        self._collection = database.get_collection(
            name,
            codec_options=CodecOptions(),  # whatever a ready client prefers
            read_preference=ReadPreference.PRIMARY,
            read_concern=reads,
            write_concern=writes,
        )

    async def expire_by_index(self) -> bool:
        """Ask the server to remove what has expired; whether it will."""
        with self.errors.reading():
            try:
                await self._collection.create_index("e", expireAfterSeconds=_SKEW)
            except OperationFailure:  # it cannot, or this user may not ask for it
                return False
        return True

    async def find(self, keys: Sequence[str], now: datetime) -> dict[str, Entry]:
        """Return the live entries at ``keys``."""
        return {found["_id"]: entry_of(found) for found in await self._find(keys) if _lives(found, now)}

    async def versions(self, keys: Sequence[str], now: datetime) -> dict[str, tuple[Expect, bytes]]:
        """Return what is at each of ``keys`` that has a document: its version or ABSENT, and the version stored."""
        answer: dict[str, tuple[Expect, bytes]] = {}
        for found in await self._find(keys, _NO_VALUE):
            version = found.get("r")
            if type(version) is not bytes:
                version = b""  # a document that is not ours has none that could be expected
            answer[found["_id"]] = (version if _lives(found, now) else ABSENT, version)
        return answer

    async def scan(
        self, start: str | None, end: str | None, now: datetime, limit: int, reverse: bool, keys_only: bool
    ) -> list[Entry]:
        bounds = {"$gte": start or ""}  # every text, and nothing that is none
        if end is not None:
            bounds["$lt"] = end
        with self.errors.reading():
            cursor = self._collection.find(
                {"_id": bounds, "e": {"$not": {"$lte": now}}},
                _NO_VALUE if keys_only else None,
                sort=[("_id", -1 if reverse else 1)],
                limit=limit,
                batch_size=min(limit, PAGE),
            )
            return [entry_of(found) for found in await cursor.to_list()]

    async def insert(self, documents: list[dict[str, Any]], *, ordered: bool) -> dict[int, KvError | None]:
        """Insert; return what failed by its position, None where the key is taken. ``ordered``: nothing behind that."""
        most = self.at_once if ordered else len(documents)
        for at in range(0, len(documents), most):
            try:
                failed = await self._insert(documents[at : at + most], ordered)
            except KvError as error:
                if at and error.outcome == "none":
                    raise CommitUnknown((), f"some of it was written: {error}") from error
                raise
            if failed:
                return {at + position: error for position, error in failed.items()}
        return {}

    async def _insert(self, documents: list[dict[str, Any]], ordered: bool) -> dict[int, KvError | None]:
        with self.errors.writing():
            try:
                await self._collection.insert_many(documents, ordered=ordered)
            except BulkWriteError as error:
                return self._failed(error)
        return {}

    async def replace(
        self, requests: Sequence[ReplaceOne[dict[str, Any]]], *, ordered: bool
    ) -> tuple[int, dict[int, KvError | None]]:
        """Replace; return how many documents there are of these now, and what failed as `insert` does.

        ``ordered`` ends at the first failure, and not at a document that is not found.
        """
        made, failed = 0, dict[int, KvError | None]()
        for at in range(0, len(requests), self.at_once):
            try:
                more, wrong = await self._replace(requests[at : at + self.at_once], ordered)
            except KvError as error:
                if at and error.outcome == "none":
                    raise CommitUnknown((), f"some of it was written: {error}") from error
                raise
            made += more
            failed |= {at + position: error for position, error in wrong.items()}
            if ordered and wrong:
                break
        return made, failed

    async def _replace(
        self, requests: Sequence[ReplaceOne[dict[str, Any]]], ordered: bool
    ) -> tuple[int, dict[int, KvError | None]]:
        with self.errors.writing():
            try:
                told: dict[str, Any] = (await self._collection.bulk_write(requests, ordered=ordered)).bulk_api_result
            except BulkWriteError as error:
                told, failed = cast("dict[str, Any]", error.details), self._failed(error)
            else:
                failed = {}
        return told["nMatched"] + told["nUpserted"], failed

    async def delete(self, requests: Sequence[DeleteOne], *, ordered: bool) -> int:
        """Delete; return how many there were."""
        with self.errors.writing():
            try:
                return (await self._collection.bulk_write(requests, ordered=ordered)).deleted_count
            except BulkWriteError as error:
                raise next(filter(None, self._failed(error).values()), CommitUnknown((), str(error))) from error

    async def delete_expired(self, now: datetime, limit: int) -> int:
        with self.errors.reading():
            expired = await self._collection.find({"e": {"$lte": now}}, {"_id": 1}, limit=limit).to_list()
            if not expired:
                return 0
            keys = [found["_id"] for found in expired]
            return (await self._collection.delete_many({"_id": {"$in": keys}, "e": {"$lte": now}})).deleted_count

    async def _find(self, keys: Sequence[str], fields: dict[str, int] | None = None) -> list[dict[str, Any]]:
        if self.finds_one_only and 1 < len(keys) <= _SINGLY:
            answers = await asyncio.gather(*(self._find([key], fields) for key in keys))
            return [found for answer in answers for found in answer]
        found: list[dict[str, Any]] = []
        for at in range(0, len(keys), PAGE):
            page = keys[at : at + PAGE]
            named: Any = page[0] if len(page) == 1 else {"$in": page}
            with self.errors.reading():
                # one more than can be found, so that the server has seen the end with its first answer
                found += await self._collection.find({"_id": named}, fields, batch_size=len(page) + 1).to_list()
        return found

    def _failed(self, error: BulkWriteError) -> dict[int, KvError | None]:
        details: Any = error.details or {}
        if details.get("writeConcernErrors"):  # done here, and perhaps lost with this server
            raise CommitUnknown((), f"{self.errors.where}: {details['writeConcernErrors'][0].get('errmsg')}") from error
        return {told["index"]: self._refusal(told) for told in details.get("writeErrors", ())}

    def _refusal(self, told: dict[str, Any]) -> KvError | None:
        match told["code"]:
            case code if code == DUPLICATE_KEY:
                return None
            case 13:
                return ReadOnly(f"{self.errors.where}: {told['errmsg']}")
            case 10334 | 17419 | 17420:
                return ValueTooLarge("", 0, MAX_VALUE_BYTES)
            case _:
                return KvError(f"{self.errors.where}: {told['errmsg']}")


def _lives(found: dict[str, Any], now: datetime) -> bool:
    expires = found.get("e")
    return type(expires) is not datetime or expires > now
