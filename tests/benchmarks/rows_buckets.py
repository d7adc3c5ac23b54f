"""The row O1: a bucket of an S3 server, against s3fs alone."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from floors_buckets import AT_ONCE, RawBucket
from measure import Line, Plan, Side
from rows import Row
from servers import needed, new_name
from work import Note, drawn, new_note, new_notes, side

import kvpersist

__all__ = ["ROWS"]

_TASKS = 32
_LISTED = 100


@asynccontextmanager
async def _o1(folder: str, plan: Plan) -> AsyncIterator[list[Line]]:
    told, name = needed("s3"), new_name()
    bucket, endpoint = told["S3_URL"].removeprefix("s3://"), told["S3_ENDPOINT"]
    credentials = {"key": told["S3_KEY"], "secret": told["S3_SECRET"]}
    raw = await RawBucket.open(
        f"{bucket}/{name}/raw", Note, concurrency=_TASKS, client_kwargs={"endpoint_url": endpoint}, **credentials
    )
    where = {"url": f"s3://{bucket}/{name}/ours", "endpoint_url": endpoint, "concurrency": _TASKS, **credentials}
    try:
        async with kvpersist.open_store(where) as store:
            notes = kvpersist.Repository(store, Note, name="note", key="id")
            listed = kvpersist.Repository(store, Note, name="listed", key="id")
            fixtures = [new_note() for _ in range(_LISTED)]
            await notes.put_many(fixtures)
            await listed.put_many(fixtures)
            for note in fixtures:
                await raw.put(note.id, note)
                await raw.put(f"listed/{note.id}", note)
            ids, count, lists = (
                [note.id for note in fixtures],
                _TASKS * int(6 * plan.scale),
                max(1, int(3 * plan.scale)),
            )
            puts = {
                "kvpersist": side(new_notes(count), notes.put, count, _TASKS),
                "floor": side(new_notes(count), lambda note: raw.put(note.id, note), count, _TASKS),
            }
            names = ["listed/"] * lists
            ours_get = side(drawn(ids, count), notes.get, count, _TASKS)
            ours_list = side(lambda: names, lambda _: listed.find(limit=_LISTED), lists)

            def get_and_list(how: dict[str, int]) -> tuple[dict[str, Side], dict[str, Side]]:
                get = side(drawn(ids, count), lambda id_: raw.get(id_, **how), count, _TASKS)
                found = side(lambda: names, lambda prefix: raw.list(prefix, **how), lists)
                return {"kvpersist": ours_get, "floor": get}, {"kvpersist": ours_list, "floor": found}

            get, found = get_and_list(AT_ONCE)
            get_as_it_comes, found_as_it_comes = get_and_list({})
            lines: list[tuple[str, float | None, dict[str, Side]]] = [
                ("put c32", 1.25, puts),
                ("get c32", 1.25, get),
                ("get c32, s3fs as it comes", None, get_as_it_comes),
                (f"list {_LISTED} with values", 1.25, found),
                (f"list {_LISTED} with values, s3fs as it comes", None, found_as_it_comes),
            ]
            yield [Line("O1", *line, setting=store.capabilities.server) for line in lines]
    finally:
        with suppress(FileNotFoundError):
            await raw.filesystem._rm(f"{bucket}/{name}", recursive=True)
        await raw.close()
        await asyncio.sleep(0.1)  # for aiohttp's sockets to end


ROWS: dict[str, Row] = {"O1": _o1}
