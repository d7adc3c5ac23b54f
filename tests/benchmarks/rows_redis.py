"""The rows R1-R5: commands of redis-py by hand."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from agent_work import new_messages, new_raw_messages, new_raw_turns, new_turns
from floors_redis import RawItems, RawRedis, RawTurns, connected, remove
from measure import Line, Plan, Side
from redis.asyncio import Redis
from rows import Row
from servers import needed, new_name
from statements import Waiting, fill, lines_of_many
from work import (
    TASKS,
    Note,
    by_raw_growth,
    chance,
    drawn,
    in_chunks,
    microseconds,
    new_items,
    new_note,
    new_notes,
    side,
)

import kvpersist

__all__ = ["ROWS", "server"]


@asynccontextmanager
async def server() -> AsyncIterator[tuple[Any, str, str, str]]:
    """A client, the server's URL, what keys are to begin with, and how the server keeps what it answered."""
    url, base = needed("redis")["REDIS_URL"], new_name()
    client = await connected(url)
    try:
        version = (await client.info("server"))["redis_version"]
        kept = await client.config_get("append*")
        file = f"appendfsync={kept['appendfsync']}" if kept["appendonly"] == "yes" else "appendonly=no"
        yield client, url, base, f"Redis {version}, {file}"
    finally:
        await remove(client, base)
        await client.aclose()


@asynccontextmanager
async def _records(stored: int) -> AsyncIterator[tuple[Any, RawRedis[Note], list[str], str]]:
    async with server() as (client, url, base, setting), kvpersist.open_store({"url": url, "base": base}) as store:
        raw = RawRedis(client, f"{base}raw", Note)
        notes = kvpersist.Repository(store, Note, name="note", key="id")
        yield notes, raw, await fill(notes, raw, stored), setting


@asynccontextmanager
async def _r1(folder: str, plan: Plan) -> AsyncIterator[list[Line]]:
    count = int(300 * plan.scale)
    async with _records(int(20_000 * plan.load)) as (notes, raw, ids, setting):
        get = {"kvpersist": side(drawn(ids, count), notes.get, count), "floor": side(drawn(ids, count), raw.get, count)}
        put = {"kvpersist": side(new_notes(count), notes.put, count), "floor": side(new_notes(count), raw.put, count)}
        yield [
            Line("R1", "get c1", 1.1, get, sequential=True, setting=setting),
            Line("R1", "put c1", 1.2, put, sequential=True, setting=setting),
        ]


@asynccontextmanager
async def _r2(folder: str, plan: Plan) -> AsyncIterator[list[Line]]:
    count = TASKS * int(20 * plan.scale)
    async with _records(int(20_000 * plan.load)) as (notes, raw, ids, setting):
        ours_get, ours_put = (
            side(drawn(ids, count), notes.get, count, TASKS),
            side(new_notes(count), notes.put, count, TASKS),
        )
        gets, puts = Waiting(raw.get_many), Waiting(raw.put_many)
        floors: list[tuple[str, float | None, Side, Side]] = [
            ("get c64, pipelines of 64", 0.8, ours_get, side(in_chunks(drawn(ids, count)), raw.pipeline_get, count)),
            ("put c64, pipelines of 64", 0.8, ours_put, side(in_chunks(new_notes(count)), raw.pipeline_put, count)),
            ("get c64, MGET in tasks", None, ours_get, side(drawn(ids, count), gets.ask, count, TASKS)),
            ("put c64, MSET+ZADD in tasks", None, ours_put, side(new_notes(count), puts.ask, count, TASKS)),
        ]
        yield [
            Line("R2", what, goal, {"kvpersist": ours, "floor": floor}, setting=setting)
            for what, goal, ours, floor in floors
        ]


@asynccontextmanager
async def _r3(folder: str, plan: Plan) -> AsyncIterator[list[Line]]:
    async with _records(int(20_000 * plan.load)) as (notes, raw, ids, setting):
        yield lines_of_many("R3", notes, raw, ids, int(20 * plan.scale), goal=1.3, setting=setting)


@asynccontextmanager
async def _r4(folder: str, plan: Plan) -> AsyncIterator[list[Line]]:
    count = TASKS * int(6 * plan.scale)
    async with (
        server() as (client, url, base, setting),
        Redis.from_url(url) as pool,  # a connection for each pipeline under way
        kvpersist.open({"url": url, "base": base}) as db,
    ):
        alone, together = RawTurns(pool, f"{base}alone"), RawTurns(client, f"{base}all")
        sessions = [(await db.sessions.create(user_id=f"user-{n}")).id for n in range(TASKS)]
        append = db.messages.append_many
        ours = side(new_turns(sessions, count), lambda turn: append(*turn), count, TASKS)
        turns = new_raw_turns(sessions, count)
        floors: list[tuple[str, float | None, Side]] = [
            (
                "turn c64, a pipeline for each, a command for each write",
                0.35,
                side(turns, lambda turn: alone.append_singly([turn]), count, TASKS),
            ),
            (
                "turn c64, one pipeline for 64, a command for each write",
                0.7,
                side(in_chunks(turns), together.append_singly, count),
            ),
            (
                "turn c64, a pipeline for each, of one MSET and ZADD",
                0.35,
                side(turns, lambda turn: alone.append(*turn), count, TASKS),
            ),
            (
                "turn c64, one pipeline for 64, an MSET and ZADD for each",
                0.7,
                side(in_chunks(turns), together.append_all, count),
            ),
        ]
        yield [
            Line("R4", what, goal, {"kvpersist": ours, "floor": floor}, setting=setting) for what, goal, floor in floors
        ]


@asynccontextmanager
async def _r5(folder: str, plan: Plan) -> AsyncIterator[list[Line]]:
    count = int(200 * plan.scale)
    async with (
        server() as (client, url, base, setting),
        kvpersist.open({"url": url, "base": f"{base}a"}) as db,
        kvpersist.open_store({"url": url, "base": f"{base}s"}) as store,
    ):
        log, items = await _logs(store, client, base, {"short": 1_000, "long": 20_000})

        def appended(parent: str, suffix: str = "") -> dict[str, Side]:
            prepare = new_items([parent], count)
            return {
                f"kvpersist{suffix}": side(prepare, lambda item: log.append(*item), count),
                f"floor{suffix}": side(prepare, lambda item: items.append(*item), count),
            }

        sessions = [(await db.sessions.create(user_id=f"user-{n}")).id for n in range(TASKS)]
        turns = RawTurns(client, f"{base}raw")
        said = {
            "kvpersist": side(new_messages(sessions, count), lambda said: db.messages.append(*said), count),
            "floor": side(new_raw_messages(sessions, count), lambda said: turns.append(said[0], [said[1]]), count),
        }
        growth = appended("long", "@20k") | appended("short", "@1k")
        newest = await _newest(store, client, base, max(4, int(20 * plan.load)), count // 2)
        lines: list[tuple[str, float, dict[str, Side]]] = [
            ("log append c1", 1.3, appended("wide")),
            ("session append c1", 1.3, said),
            ("a user's 100 newest, two trips by hand", 1.6, newest),
        ]
        flat = Line("R5", "append@20k / append@1k by raw's growth", 1.2, growth, by_raw_growth, True, setting)
        yield [*(Line("R5", *line, sequential=True, setting=setting) for line in lines), flat]


async def _logs(store: Any, client: Any, base: str, lengths: dict[str, int]) -> tuple[Any, RawItems[Note]]:
    """A log and the floor's, each parent filled to its length."""
    log, items = kvpersist.Log(store, Note, name="line"), RawItems[Note](client, f"{base}raw")
    for parent, length in lengths.items():
        for _ in range(0, length, 250):
            lines = [new_note() for _ in range(250)]
            await log.append_many(parent, lines)
            await items.append_many(parent, lines)
    return log, items


async def _newest(store: Any, client: Any, base: str, users: int, count: int) -> dict[str, Side]:
    index = kvpersist.Index("user_id", order_by="-created_at")
    owned = kvpersist.Repository(store, Note, name="session", key="id", indexes=[index])
    raw = RawRedis(client, f"{base}raw", Note)
    for user in (f"user-{n}" for n in range(users)):
        rows = [new_note(user=user) for _ in range(500)]
        await owned.put_many(rows)
        await raw.own(user, [(microseconds(row.created_at), row) for row in rows])

    def asked() -> list[str]:
        return [f"user-{chance.randrange(users)}" for _ in range(count)]

    return {
        "kvpersist": side(asked, lambda user: owned.find(user_id=user, limit=100), count),
        "floor": side(asked, lambda user: raw.newest(user, 100), count),
    }


ROWS: dict[str, Row] = {"R1": _r1, "R2": _r2, "R3": _r3, "R4": _r4, "R5": _r5}
