"""The rows S1-S9, and P3 on sqlite: what is stored, what each side does in a slice, and the goal.

Every value is distinct, and no slice repeats another's: SQLite skips writing a cell that does not change.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

from agent_work import new_messages, new_raw_messages, new_raw_turns, new_turns
from floors_sqlite import DRAIN_LIMIT, RawDirect, RawItems, RawRecords, RawSessions, RawTurns
from measure import Line, Plan, Side
from work import TASKS, Note, below, by_raw_growth, chance, drawn, microseconds, new_items, new_note, new_notes, side

import kvpersist
from kvpersist_drivers.sqlite import SqliteDriver

__all__ = ["ROWS"]


async def _driver(folder: str, name: str, **options: Any) -> Any:
    return await SqliteDriver.open(SqliteDriver.Options(path=str(Path(folder, name)), **options))


class _Records:
    """A repository without indexes, and the raw table of the same notes."""

    def __init__(self, notes: Any, raw: RawRecords[Note], ids: list[str]) -> None:
        self.notes, self.raw, self.ids = notes, raw, ids


@asynccontextmanager
async def _records(folder: str, stored: int, **options: Any) -> AsyncIterator[_Records]:
    options = {"durability": "normal", **options}
    async with kvpersist.open_store(await _driver(folder, "ours.db", **options)) as store:
        raw = RawRecords(str(Path(folder, "raw.db")), Note, durability=options["durability"])
        notes = kvpersist.Repository(store, Note, name="note", key="id")
        fixtures = [new_note() for _ in range(stored)]
        for start in range(0, stored, 500):
            await notes.put_many(fixtures[start : start + 500])
            await raw.put_many([(note.id, note) for note in fixtures[start : start + 500]])
        yield _Records(notes, raw, [note.id for note in fixtures])
        await raw.close()


@asynccontextmanager
async def _s1(folder: str, plan: Plan) -> AsyncIterator[list[Line]]:
    count = int(400 * plan.scale)
    async with _records(folder, int(20_000 * plan.load)) as both:
        sides = {
            "kvpersist": side(new_notes(count), both.notes.put, count),
            "floor": side(new_notes(count), lambda note: both.raw.put(note.id, note), count),
        }
        yield [Line("S1", "put c1", 1.6, sides, sequential=True)]


@asynccontextmanager
async def _s2(folder: str, plan: Plan) -> AsyncIterator[list[Line]]:
    count = int(600 * plan.scale)
    stored = int(20_000 * plan.load)
    inline_folder = below(folder, "inline")
    async with _records(folder, stored) as both, _records(inline_folder, stored, reads="inline") as inline:
        sides = {
            "kvpersist": side(drawn(both.ids, count), both.notes.get, count),
            "floor": side(drawn(both.ids, count), both.raw.get, count),
        }
        direct = RawDirect(str(Path(inline_folder, "raw.db")), Note)
        inline_sides = {
            "kvpersist": side(drawn(inline.ids, count * 3), inline.notes.get, count * 3),
            "floor": side(drawn(inline.ids, count * 3), direct.get, count * 3),
        }
        yield [
            Line("S2", "get c1", 1.5, sides, sequential=True),
            Line("S2", "get c1, inline against direct", 3.0, inline_sides, sequential=True),
        ]
        await direct.close()


@asynccontextmanager
async def _s3(folder: str, plan: Plan) -> AsyncIterator[list[Line]]:
    count = TASKS * int(25 * plan.scale)
    async with _records(folder, int(20_000 * plan.load)) as both:
        put = {
            "kvpersist": side(new_notes(count), both.notes.put, count, TASKS),
            "floor": side(new_notes(count), lambda note: both.raw.put(note.id, note), count, TASKS),
        }
        get = {
            "kvpersist": side(drawn(both.ids, count), both.notes.get, count, TASKS),
            "floor": side(drawn(both.ids, count), both.raw.get, count, TASKS),
        }
        yield [Line("S3", "put c64", 1.3, put), Line("S3", "get c64", 1.3, get)]


@asynccontextmanager
async def _s4(folder: str, plan: Plan) -> AsyncIterator[list[Line]]:
    calls = int(60 * plan.scale)  # a round spans several checkpoints of the WAL, or one side pays them by chance
    count = calls * 100

    def notes() -> list[list[Note]]:
        return [[new_note() for _ in range(100)] for _ in range(calls)]

    async with _records(folder, int(20_000 * plan.load)) as both:

        def picks() -> list[list[str]]:
            return [chance.sample(both.ids, 100) for _ in range(calls)]

        put = {
            "kvpersist": side(notes, both.notes.put_many, count),
            "floor": side(notes, lambda many: both.raw.put_many([(note.id, note) for note in many]), count),
        }
        get = {
            "kvpersist": side(picks, both.notes.get_many, count),
            "floor": side(picks, both.raw.get_many, count),
        }
        yield [
            Line("S4", "put_many of 100", 1.6, put, sequential=True),
            Line("S4", "get_many of 100", 1.6, get, sequential=True),
        ]


@asynccontextmanager
async def _logs(folder: str, lengths: dict[str, int]) -> AsyncIterator[tuple[Any, RawItems[Note]]]:
    """A log and the raw table of items, each parent filled to its length."""
    async with kvpersist.open_store(await _driver(folder, "ours.db", durability="normal")) as store:
        log = kvpersist.Log(store, Note, name="line")
        raw = RawItems(str(Path(folder, "raw.db")), Note)
        for parent, length in lengths.items():
            items = [new_note() for _ in range(length)]
            await raw.fill(parent, items)
            for start in range(0, length, 250):
                await log.append_many(parent, items[start : start + 250])
        yield log, raw
        await raw.close()


@asynccontextmanager
async def _s5(folder: str, plan: Plan) -> AsyncIterator[list[Line]]:
    count = int(400 * plan.scale)
    many = TASKS * int(15 * plan.scale)
    brief = int(200 * plan.scale)
    copies = 4 if plan.load >= 1 else 1
    # neighbours in key order, so that neither length has the better places
    short, long = [f"{n}-short" for n in range(copies)], [f"{n}-long" for n in range(copies)]
    lengths = dict.fromkeys(short, 1_000) | dict.fromkeys(long, 20_000)
    wide = [f"wide-{n}" for n in range(TASKS)]
    async with _logs(folder, lengths) as (log, raw), _agents(folder, TASKS) as (db, turns, ours, theirs):

        def sides(names: Sequence[str], count: int, tasks: int) -> dict[str, Side]:
            prepare = new_items(names, count)
            return {
                "kvpersist": side(prepare, lambda item: log.append(*item), count, tasks),
                "floor": side(prepare, lambda item: raw.append(*item), count, tasks),
            }

        def messages(tasks: int, count: int) -> dict[str, Side]:
            return {
                "kvpersist": side(new_messages(ours, count), lambda item: db.messages.append(*item), count, tasks),
                "floor": side(
                    new_raw_messages(theirs, count), lambda item: turns.append(item[0], [item[1]]), count, tasks
                ),
            }

        growth = {
            f"{who}@{length}": side
            for length, names in (("20k", long), ("1k", short))
            for who, side in sides(names, brief, 1).items()
        }
        yield [
            Line("S5", "log append c1", 1.6, sides(wide, count, 1), sequential=True),
            Line("S5", "log append c64", 1.1, sides(wide, many, TASKS)),
            Line("S5", "log append c64, all to one parent", None, sides(["one"], many, TASKS)),
            Line("S5", "session append c1", 1.6, messages(1, count), sequential=True),
            Line("S5", "session append c64", 1.1, messages(TASKS, many)),
            Line("S5", "append@20k / append@1k by raw's growth", 1.2, growth, by_raw_growth, sequential=True),
        ]


@asynccontextmanager
async def _s6(folder: str, plan: Plan) -> AsyncIterator[list[Line]]:
    count = int(150 * plan.scale)
    async with _logs(folder, {"short": 1_000, "long": 20_000}) as (log, raw):

        def sides(parent: str, suffix: str = "") -> dict[str, Side]:
            def prepare() -> list[str]:
                return [parent] * count

            return {
                f"kvpersist{suffix}": side(prepare, lambda parent: log.last(parent, 50), count),
                f"floor{suffix}": side(prepare, lambda parent: raw.last(parent, 50), count),
            }

        growth = sides("long", "@20k") | sides("short", "@1k")
        yield [
            Line("S6", "last 50 of 20k", 1.7, sides("long"), sequential=True),
            Line("S6", "last 50 of 20k / of 1k by raw's growth", 1.2, growth, by_raw_growth, sequential=True),
        ]


@asynccontextmanager
async def _s7(folder: str, plan: Plan) -> AsyncIterator[list[Line]]:
    count = int(60 * plan.scale)
    users = max(10, int(200 * plan.load))
    total = 500 * users
    async with kvpersist.open_store(await _driver(folder, "ours.db", durability="normal")) as store:
        index = kvpersist.Index("user_id", order_by="-created_at")
        sessions = kvpersist.Repository(store, Note, name="session", key="id", indexes=[index])
        raw = RawSessions(str(Path(folder, "raw.db")), Note)
        for start in range(0, total, 1000):
            rows = [new_note(user=f"user-{n % users}") for n in range(start, min(start + 1000, total))]
            chance.shuffle(rows)
            await sessions.put_many(rows)
            await raw.fill([(row.id, row.user_id, microseconds(row.created_at), row) for row in rows])

        def prepare() -> list[str]:
            return [f"user-{chance.randrange(users)}" for _ in range(count)]

        sides = {
            "kvpersist": side(prepare, lambda user: sessions.find(user_id=user, limit=100), count),
            "floor": side(prepare, lambda user: raw.newest(user, 100), count),
        }
        yield [Line("S7", f"a user's 100 newest of {total // 1000}k", 2.0, sides, sequential=True)]
        await raw.close()


@asynccontextmanager
async def _agents(
    folder: str, sessions: int, *, drain_limit: int = DRAIN_LIMIT, **options: Any
) -> AsyncIterator[tuple[Any, RawTurns, list[str], list[str]]]:
    """An agent's database and the raw tables, each with some empty sessions."""
    driver = await _driver(folder, "agents.db", durability="normal")
    async with kvpersist.open(driver, **options) as db:
        turns = RawTurns(str(Path(folder, "turns.db")), drain_limit=drain_limit)
        ours = [(await db.sessions.create(user_id=f"user-{n}")).id for n in range(sessions)]
        theirs = [await turns.create(f"user-{n}") for n in range(sessions)]
        yield db, turns, ours, theirs
        await turns.close()


@asynccontextmanager
async def _s8(folder: str, plan: Plan) -> AsyncIterator[list[Line]]:
    count = TASKS * int(6 * plan.scale)
    async with _agents(folder, TASKS) as (db, turns, ours, theirs):

        def sides(tasks: int, answered: bool = True) -> dict[str, Side]:
            return {
                "kvpersist": side(
                    new_turns(ours, count, answered), lambda turn: db.messages.append_many(*turn), count, tasks
                ),
                "floor": side(new_raw_turns(theirs, count, answered), lambda turn: turns.append(*turn), count, tasks),
            }

        yield [
            Line("S8", "agent turn c64, its call answered", 1.3, sides(TASKS)),
            Line("S8", "agent turn c1", None, sides(1), sequential=True),
            # last: what is left unanswered stays in the stat, up to 256 calls, and makes it larger
            Line("S8", "agent turn c64, calls never answered", None, sides(TASKS, answered=False)),
        ]


@asynccontextmanager
async def _s9(folder: str, plan: Plan) -> AsyncIterator[list[Line]]:
    count = TASKS * int(25 * plan.scale)
    full_folder = below(folder, "full")
    stored = int(20_000 * plan.load)
    async with _records(folder, stored) as normal, _records(full_folder, stored, durability="full") as full:
        own = {
            "kvpersist": side(new_notes(count), full.notes.put, count, TASKS),
            "floor": side(new_notes(count), normal.notes.put, count, TASKS),
        }
        raw = {
            "kvpersist": side(new_notes(count), full.notes.put, count, TASKS),
            "floor": side(new_notes(count), lambda note: full.raw.put(note.id, note), count, TASKS),
        }
        yield [
            Line("S9", "put c64, full against own normal", 1.3, own, setting="full / normal"),
            Line("S9", "put c64, full against raw full", None, raw, setting="full"),
        ]


@asynccontextmanager
async def _p3(folder: str, plan: Plan) -> AsyncIterator[list[Line]]:
    count = TASKS * int(6 * plan.scale)
    async with _agents(folder, TASKS, drain_limit=1) as (db, turns, ours, theirs):

        def sides(tasks: int) -> dict[str, Side]:
            return {
                "kvpersist": side(new_turns(ours, count), lambda turn: db.messages.append_many(*turn), count, tasks),
                "floor": side(new_raw_turns(theirs, count), lambda turn: turns.append(*turn), count, tasks),
            }

        yield [
            Line("P3", "sqlite: turn c1", 1.4, sides(1), sequential=True),
            Line("P3", "sqlite: turn c64, against a transaction for each", 0.8, sides(TASKS)),
        ]


ROWS: dict[str, Callable[[str, Plan], AbstractAsyncContextManager[list[Line]]]] = {
    "S1": _s1,
    "S2": _s2,
    "S3": _s3,
    "S4": _s4,
    "S5": _s5,
    "S6": _s6,
    "S7": _s7,
    "S8": _s8,
    "S9": _s9,
    "P3-SQLITE": _p3,
}
