"""The row M2: put and get against ``bulk_write`` and ``$in`` of pymongo."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from floors_mongo import RawMongo
from measure import Line, Plan
from pymongo import AsyncMongoClient
from rows import Row
from servers import needed, new_name
from statements import fill, lines_of_64
from work import TASKS, Note

import kvpersist

__all__ = ["ROWS"]


@asynccontextmanager
async def _m2(folder: str, plan: Plan) -> AsyncIterator[list[Line]]:
    url, name = needed("mongo")["MONGO_URL"], new_name()
    client = AsyncMongoClient(url)
    database = client.get_default_database("kvpersist")
    try:
        async with kvpersist.open_store({"url": url, "collection": name}) as store:
            raw = RawMongo(database.get_collection(f"{name}_raw"), Note)
            notes = kvpersist.Repository(store, Note, name="note", key="id")
            ids = await fill(notes, raw, int(2_000 * plan.load))
            setting = f"{store.capabilities.server}, acknowledged"
            count = TASKS * int(5 * plan.scale)  # FerretDB takes milliseconds for a write
            yield lines_of_64("M2", notes, raw, ids, count, goals=(1.2, 1.3), setting=setting)
    finally:
        for left in (name, f"{name}_raw", f"{name}_turn"):
            await database.drop_collection(left)
        await client.close()


ROWS: dict[str, Row] = {"M2": _m2}
