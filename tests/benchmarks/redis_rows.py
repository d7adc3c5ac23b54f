"""Measure the rows R1-R4 of the performance goals, interleaved: ``redis_rows.py [R2 R3 ...] [--url URL]``.

The floors are redis-py with hiredis: single commands, pipelines of 64 without a transaction, MSET and
MGET. Both sides encode and decode the same records, all of them distinct; of a turn, the floors' values
are ready beforehand. A floor of writes does SET and ZADD, as kvpersist keeps an index; "SET alone"
leaves that out, and "W" is a row of kvpersist against itself without telling who watches.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import os
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [
    str(Path(__file__).resolve().parent),
    str(ROOT),
    str(ROOT / "drivers"),
    str(ROOT / "tests" / "services"),
]

import msgspec  # noqa: E402
from measure import Figure, Line, Plan, Side, each, measure  # noqa: E402
from redis.asyncio import Redis  # noqa: E402
from redis_server import RedisServer  # noqa: E402
from rows import TASKS, Note, _note, _random, _turns  # noqa: E402

import kvpersist  # noqa: E402
from kvpersist.driver import Batch, Delete, Put  # noqa: E402
from kvpersist_drivers.redis import RedisDriver, RedisOptions  # noqa: E402

encode = msgspec.msgpack.Encoder().encode
decode = msgspec.msgpack.Decoder(Note).decode
_numbers = itertools.count()


@asynccontextmanager
async def _both(url: str, stored: int) -> AsyncIterator[tuple[Any, RedisDriver, Redis, list[str]]]:
    base = f"bench{os.getpid()}-{next(_numbers)}"
    driver = await RedisDriver.open(RedisOptions(url=url, base=base))
    raw = Redis.from_url(url, single_connection_client=True)
    async with kvpersist.open_store(driver) as store:
        notes = kvpersist.Repository(store, Note, name="note", key="id")
        fixtures = [_note() for _ in range(stored)]
        for start in range(0, stored, 500):
            some = fixtures[start : start + 500]
            await notes.put_many(some)
            await _mset(raw, some)
        yield notes, driver, raw, [note.id for note in fixtures]
    await raw.aclose()


async def _mset(raw: Redis, notes: Sequence[Note]) -> None:
    async with raw.pipeline(transaction=False) as pipe:
        pipe.mset({f"raw:{note.id}": encode(note) for note in notes})
        pipe.zadd("raw#", dict.fromkeys([note.id for note in notes], 0))
        await pipe.execute()


def _notes(count: int) -> Callable[[], list[Note]]:
    return lambda: [_note() for _ in range(count)]


def _chunks(prepare: Callable[[], Sequence[Any]], size: int) -> Callable[[], list[Sequence[Any]]]:
    def cut() -> list[Sequence[Any]]:
        items = prepare()
        return [items[at : at + size] for at in range(0, len(items), size)]

    return cut


def _side(prepare: Callable[[], Sequence[Any]], call: Callable[[Any], Any], operations: int, tasks: int = 1) -> Side:
    return Side(prepare, lambda items: each(call, items, tasks), operations)


@asynccontextmanager
async def _r1(url: str, plan: Plan) -> AsyncIterator[list[Line]]:
    count = int(400 * plan.scale)
    async with _both(url, 2000) as (notes, _, raw, ids):

        def picks() -> list[str]:
            return _random.choices(ids, k=count)

        async def raw_get(id_: str) -> Note:
            return decode(await raw.get(f"raw:{id_}"))

        async def raw_put(note: Note) -> None:
            await raw.set(f"raw:{note.id}", encode(note))

        get = {"kvpersist": _side(picks, notes.get, count), "floor": _side(picks, raw_get, count)}
        put = {"kvpersist": _side(_notes(count), notes.put, count), "floor": _side(_notes(count), raw_put, count)}
        yield [
            Line("R1", "get c1", 1.1, get, sequential=True, setting="redis"),
            Line("R1", "put c1, SET alone", 1.2, put, sequential=True, setting="redis"),
        ]


@asynccontextmanager
async def _r2(url: str, plan: Plan) -> AsyncIterator[list[Line]]:
    count = TASKS * int(25 * plan.scale)
    async with _both(url, 5000) as (notes, _, raw, ids):

        def picks() -> list[str]:
            return _random.choices(ids, k=count)

        async def raw_gets(some: Sequence[str]) -> list[Note]:
            async with raw.pipeline(transaction=False) as pipe:
                for id_ in some:
                    pipe.get(f"raw:{id_}")
                return [decode(data) for data in await pipe.execute()]

        def raw_puts(indexed: bool) -> Callable[[Sequence[Note]], Any]:
            async def run(some: Sequence[Note]) -> None:
                async with raw.pipeline(transaction=False) as pipe:
                    for note in some:
                        pipe.set(f"raw:{note.id}", encode(note))
                        if indexed:
                            pipe.zadd("raw#", {note.id: 0})
                    await pipe.execute()

            return run

        get = {
            "kvpersist": _side(picks, notes.get, count, TASKS),
            "floor": _side(_chunks(picks, 64), raw_gets, count),
        }
        lines = [Line("R2", "get c64", 0.8, get, setting="redis")]
        for what, indexed in (("put c64, SET alone", False), ("put c64, SET and ZADD", True)):
            put = {
                "kvpersist": _side(_notes(count), notes.put, count, TASKS),
                "floor": _side(_chunks(_notes(count), 64), raw_puts(indexed), count),
            }
            lines.append(Line("R2", what, 0.8, put, setting="redis"))
        yield lines


@asynccontextmanager
async def _r3(url: str, plan: Plan) -> AsyncIterator[list[Line]]:
    calls = int(40 * plan.scale)
    count = calls * 100
    async with _both(url, 5000) as (notes, _, raw, ids):

        def picks() -> list[list[str]]:
            return [_random.sample(ids, 100) for _ in range(calls)]

        async def raw_get_many(some: Sequence[str]) -> list[Note]:
            return [decode(data) for data in await raw.mget([f"raw:{id_}" for id_ in some])]

        put = {
            "kvpersist": _side(_chunks(_notes(count), 100), notes.put_many, count),
            "floor": _side(_chunks(_notes(count), 100), lambda some: _mset(raw, some), count),
        }
        get = {"kvpersist": _side(picks, notes.get_many, count), "floor": _side(picks, raw_get_many, count)}
        yield [
            Line("R3", "put_many of 100", 1.3, put, sequential=True, setting="redis"),
            Line("R3", "get_many of 100", 1.3, get, sequential=True, setting="redis"),
        ]


@asynccontextmanager
async def _r4(url: str, plan: Plan) -> AsyncIterator[list[Line]]:
    count = TASKS * int(6 * plan.scale)
    base = f"bench{os.getpid()}-{next(_numbers)}"
    driver = await RedisDriver.open(RedisOptions(url=url, base=base))
    raw = Redis.from_url(url, single_connection_client=True)
    async with kvpersist.open(driver) as db:
        sessions = [(await db.sessions.create(user_id=f"user-{n}")).id for n in range(TASKS)]
        writes = await _writes_of_a_turn(driver, db, sessions[0])

        def turns() -> list[Any]:
            return _turns(sessions, count)

        def raw_turns() -> list[list[tuple[str, bytes | None]]]:
            """The same writes, with names and values of their own, ready to be sent."""
            return [
                [(f"{name}{n}", None if value is None else b"%d" % n + value) for name, value in writes]
                for n in itertools.islice(_numbers, count)
            ]

        def queue(pipe: Any, turn: list[tuple[str, bytes | None]], *, singly: bool = True) -> None:
            for name, value in turn:
                if value is None:
                    pipe.delete(name)
                    pipe.zrem("raw#", name)
                else:
                    pipe.set(name, value)
                    if singly:
                        pipe.zadd("raw#", {name: 0})
            if not singly:
                pipe.zadd("raw#", {name: 0 for name, value in turn if value is not None})

        pool = Redis.from_url(url)  # each task with a connection of its own

        async def one(turn: list[tuple[str, bytes | None]]) -> None:
            async with pool.pipeline(transaction=False) as pipe:
                queue(pipe, turn)
                await pipe.execute()

        async def many(some: list[list[tuple[str, bytes | None]]]) -> None:
            async with raw.pipeline(transaction=False) as pipe:
                for turn in some:
                    queue(pipe, turn)
                await pipe.execute()

        async def one_joined(turn: list[tuple[str, bytes | None]]) -> None:
            async with pool.pipeline(transaction=False) as pipe:
                queue(pipe, turn, singly=False)
                await pipe.execute()

        async def many_joined(some: list[list[tuple[str, bytes | None]]]) -> None:
            async with raw.pipeline(transaction=False) as pipe:
                for turn in some:
                    queue(pipe, turn, singly=False)
                await pipe.execute()

        ours = _side(turns, lambda turn: db.messages.append_many(*turn), count, TASKS)
        print(f"a turn: {len(writes)} writes, {sum(len(value or b'') for _, value in writes)} bytes")
        all_turns = _chunks(raw_turns, 64)
        lines: list[Line] = []
        for what, goal, floor in (
            ("a pipeline for each, SET and ZADD", 0.35, _side(raw_turns, one, count, TASKS)),
            ("a pipeline for each, its ZADDs in one", 0.35, _side(raw_turns, one_joined, count, TASKS)),
            ("64 in a pipeline, SET and ZADD", 0.7, _side(all_turns, many, count)),
            ("64 in a pipeline, the ZADDs of a turn in one", 0.7, _side(all_turns, many_joined, count)),
        ):
            lines.append(Line("R4", f"agent turn c64, {what}", goal, {"kvpersist": ours, "floor": floor}))
        yield lines
        await pool.aclose()
    await raw.aclose()


async def _writes_of_a_turn(driver: RedisDriver, db: Any, session: str) -> list[tuple[str, bytes | None]]:
    """What a later turn of a session writes: names, and values, None for what it deletes."""
    seen: list[Batch] = []
    commit = driver.commit

    async def listening(batches: Sequence[Batch]) -> Any:
        seen.extend(batches)
        return await commit(batches)

    await db.messages.append_many(*_turns([session], 1)[0])
    driver.commit = listening  # type: ignore[method-assign]
    await db.messages.append_many(*_turns([session], 1)[0])
    del driver.commit
    [turn] = seen
    return [(op.key, op.value if isinstance(op, Put) else None) for op in turn.ops if isinstance(op, Put | Delete)]


@asynccontextmanager
async def _w(url: str, plan: Plan) -> AsyncIterator[list[Line]]:
    count = TASKS * int(25 * plan.scale)
    async with _both(url, 500) as (notes, driver, _, _), _both(url, 500) as (silent, other, _, _):
        assert driver.capabilities.watch == "push"
        other._tells = False
        lines: list[Line] = []
        for tasks in (1, TASKS):
            sides = {
                "kvpersist": _side(_notes(count), notes.put, count, tasks),
                "floor": _side(_notes(count), silent.put, count, tasks),
            }
            lines.append(Line("W", f"put c{tasks}, telling / not", None, sides, sequential=tasks == 1))
        yield lines


ROWS = {"R1": _r1, "R2": _r2, "R3": _r3, "R4": _r4, "W": _w}


def _shown(figure: Figure) -> str:
    times = " / ".join(f"{value:.1f}" for value in figure.microseconds.values())
    low, high = figure.low, figure.high
    reached = {None: "-", True: "yes", False: "NO"}[figure.reached]
    goal = f"{figure.goal:g}" + (f" (x {figure.slack:g})" if figure.slack != 1 else "") if figure.goal else "-"
    return (
        f"| {figure.row} | {figure.what} | {goal} | {figure.ratio:.2f} ({low:.2f} - {high:.2f}) | "
        f"{figure.cpu:.2f} | {times} | {reached} |"
    )


async def _main(rows: Sequence[str], url: str, plan: Plan) -> None:
    print("| row | what | goal | ratio (min - max) | cpu of the client | us: ours / floor | reached |")
    print("|---" * 7 + "|")
    for row in rows:
        async with ROWS[row](url, plan) as lines:
            for line in lines:
                print(_shown(await measure(line, plan)), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("rows", nargs="*")
    parser.add_argument("--url", help="of a server; without it one is started")
    parser.add_argument("--rounds", type=int, default=7)
    given = parser.parse_args()
    server = None if given.url else RedisServer()
    try:
        where = given.url or server.url  # type: ignore[union-attr]
        asyncio.run(_main([row.upper() for row in given.rows] or list(ROWS), where, Plan(rounds=given.rounds)))
    finally:
        if server is not None:
            server.close()
