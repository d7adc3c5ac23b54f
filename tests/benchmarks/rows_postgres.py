"""The rows P1-P3 on PostgreSQL, against statements of asyncpg."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import asyncpg
from agent_work import new_raw_turns, new_turns
from floors_postgres import RawPostgres, RawPostgresTurns
from measure import Line, Plan, Side
from rows import Row
from servers import needed, new_name
from statements import fill, lines_of_64, lines_of_many
from work import TASKS, Note, chance, in_chunks, new_note, side

import kvpersist

__all__ = ["ROWS"]

_CONNECTIONS = 8  # of the floor's pool, and of kvpersist's


@asynccontextmanager
async def _table() -> AsyncIterator[tuple[str, str, str]]:
    """The server, a name for a table of a store, and how the server keeps what it answered."""
    url, name = needed("postgres")["POSTGRES_URL"], new_name()
    connection = await asyncpg.connect(url)
    try:
        version, kept, synced = [
            await connection.fetchval(f"SHOW {setting}")
            for setting in ("server_version", "synchronous_commit", "fsync")
        ]
        yield url, name, f"PostgreSQL {version.split()[0]}, synchronous_commit={kept}, fsync={synced}"
    finally:
        await connection.execute(f"DROP TABLE IF EXISTS {name}")
        await connection.close()


@asynccontextmanager
async def _records(stored: int) -> AsyncIterator[tuple[Any, RawPostgres[Note], list[str], str]]:
    async with _table() as (url, name, setting):
        raw = await RawPostgres.open(url, f"{name}_raw", Note)
        try:
            async with kvpersist.open_store({"url": url, "table": name}) as store:
                notes = kvpersist.Repository(store, Note, name="note", key="id")
                ids = await fill(notes, raw, stored)
                for table in (name, f"{name}_raw"):
                    await raw.connection.execute(f"VACUUM ANALYZE {table}")
                yield notes, raw, ids, setting
        finally:
            await raw.close()


@asynccontextmanager
async def _p1(folder: str, plan: Plan) -> AsyncIterator[list[Line]]:
    count = TASKS * int(20 * plan.scale)
    async with _records(int(10_000 * plan.load)) as (notes, raw, ids, setting):
        lines = lines_of_64("P1", notes, raw, ids, count, goals=(1.5, 1.5), setting=setting)
        swapped = ids[:count]
        versions = dict(zip(swapped, await notes.put_many([new_note(id_) for id_ in swapped]), strict=True))

        def known() -> Sequence[Note]:
            return [new_note(id_) for id_ in chance.sample(swapped, len(swapped))]

        async def swap(note: Note) -> None:
            versions[note.id] = await notes.put(note, expect=versions[note.id])

        operations = len(swapped)
        sides = {
            "kvpersist": side(known, swap, operations, TASKS),
            "floor": side(in_chunks(known), raw.put_many, operations),
        }
        yield [*lines, Line("P1", "put c64 if unchanged, bare statements without", 2.0, sides, setting=setting)]


@asynccontextmanager
async def _p2(folder: str, plan: Plan) -> AsyncIterator[list[Line]]:
    async with _records(int(10_000 * plan.load)) as (notes, raw, ids, setting):
        yield lines_of_many("P2", notes, raw, ids, int(20 * plan.scale), goal=1.3, setting=setting)


@asynccontextmanager
async def _p3(folder: str, plan: Plan) -> AsyncIterator[list[Line]]:
    alone, many = int(100 * plan.scale), TASKS * int(6 * plan.scale)
    async with _table() as (url, name, setting), kvpersist.open({"url": url, "table": name}) as db:
        turns = await RawPostgresTurns.open(url, f"{name}_raw", connections=_CONNECTIONS)
        try:
            ours = [(await db.sessions.create(user_id=f"user-{n}")).id for n in range(TASKS)]
            theirs = [await turns.create(f"user-{n}") for n in range(TASKS)]

            def sides(count: int, tasks: int) -> dict[str, Side]:
                append = db.messages.append_many
                return {
                    "kvpersist": side(new_turns(ours, count), lambda turn: append(*turn), count, tasks),
                    "floor": side(new_raw_turns(theirs, count), lambda turn: turns.append(*turn), count, tasks),
                }

            yield [
                Line("P3", "postgres: turn c1", 1.4, sides(alone, 1), sequential=True, setting=setting),
                Line("P3", "postgres: turn c64, a statement for each", 0.8, sides(many, TASKS), setting=setting),
            ]
        finally:
            await turns.close()


ROWS: dict[str, Row] = {"P1": _p1, "P2": _p2, "P3": _p3}
