"""The rows S1-S9: what is stored, what each side does in a slice, and the goal.

Every value is distinct, and no slice repeats another's: SQLite skips writing a cell that does not change.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
from floors import RawDirect, RawItems, RawMessage, RawPart, RawRecords, RawSessions, RawTurns
from measure import Line, Plan, Side, each, over

import kvpersist
from kvpersist.agents.records import Message, ToolCallPart
from kvpersist_drivers.sqlite import SqliteDriver

__all__ = ["ROWS"]

TASKS = 64
EPOCH = datetime(2025, 1, 1, tzinfo=UTC)


class Note(msgspec.Struct, kw_only=True):
    """A record of about 300 bytes."""

    id: str
    user_id: str
    title: str
    body: str
    score: float
    tags: list[str]
    created_at: datetime


_WORDS = ("what", "the", "agent", "said", "about", "an", "order", "and", "which", "tool", "it", "called", "then")
_numbers = itertools.count()
_random = random.Random(7)


def _text(words: int) -> str:
    return " ".join(_random.choices(_WORDS, k=words))


def _note(id_: str | None = None, user: str = "u1") -> Note:
    number = next(_numbers)
    return Note(
        id=id_ or f"note-{number:010d}",
        user_id=user,
        title=_text(4),
        body=_text(38),
        score=_random.random(),
        tags=["a", f"t{number}"],
        created_at=EPOCH + timedelta(microseconds=number),
    )


def _notes(count: int) -> Callable[[], list[Note]]:
    return lambda: [_note() for _ in range(count)]


def _picks(ids: Sequence[str], count: int) -> Callable[[], list[str]]:
    return lambda: _random.choices(ids, k=count)


def _side(prepare: Callable[[], Sequence[Any]], call: Callable[[Any], Any], operations: int, tasks: int = 1) -> Side:
    return Side(prepare, lambda items: each(call, items, tasks), operations)


def _below(folder: str, name: str) -> str:
    place = Path(folder, name)
    place.mkdir()
    return str(place)


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
        fixtures = [_note() for _ in range(stored)]
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
            "kvpersist": _side(_notes(count), both.notes.put, count),
            "floor": _side(_notes(count), lambda note: both.raw.put(note.id, note), count),
        }
        yield [Line("S1", "put c1", 1.6, sides, sequential=True)]


@asynccontextmanager
async def _s2(folder: str, plan: Plan) -> AsyncIterator[list[Line]]:
    count = int(600 * plan.scale)
    stored = int(20_000 * plan.load)
    inline_folder = _below(folder, "inline")
    async with _records(folder, stored) as both, _records(inline_folder, stored, reads="inline") as inline:
        sides = {
            "kvpersist": _side(_picks(both.ids, count), both.notes.get, count),
            "floor": _side(_picks(both.ids, count), both.raw.get, count),
        }
        direct = RawDirect(str(Path(inline_folder, "raw.db")), Note)
        inline_sides = {
            "kvpersist": _side(_picks(inline.ids, count * 3), inline.notes.get, count * 3),
            "floor": _side(_picks(inline.ids, count * 3), direct.get, count * 3),
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
            "kvpersist": _side(_notes(count), both.notes.put, count, TASKS),
            "floor": _side(_notes(count), lambda note: both.raw.put(note.id, note), count, TASKS),
        }
        get = {
            "kvpersist": _side(_picks(both.ids, count), both.notes.get, count, TASKS),
            "floor": _side(_picks(both.ids, count), both.raw.get, count, TASKS),
        }
        yield [Line("S3", "put c64", 1.3, put), Line("S3", "get c64", 1.3, get)]


@asynccontextmanager
async def _s4(folder: str, plan: Plan) -> AsyncIterator[list[Line]]:
    calls = int(60 * plan.scale)  # a round spans several checkpoints of the WAL, or one side pays them by chance
    count = calls * 100

    def notes() -> list[list[Note]]:
        return [[_note() for _ in range(100)] for _ in range(calls)]

    async with _records(folder, int(20_000 * plan.load)) as both:

        def picks() -> list[list[str]]:
            return [_random.sample(both.ids, 100) for _ in range(calls)]

        put = {
            "kvpersist": _side(notes, both.notes.put_many, count),
            "floor": _side(notes, lambda many: both.raw.put_many([(note.id, note) for note in many]), count),
        }
        get = {
            "kvpersist": _side(picks, both.notes.get_many, count),
            "floor": _side(picks, both.raw.get_many, count),
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
            items = [_note() for _ in range(length)]
            await raw.fill(parent, items)
            for start in range(0, length, 250):
                await log.append_many(parent, items[start : start + 250])
        yield log, raw
        await raw.close()


def _parents(names: Sequence[str], count: int) -> Callable[[], list[tuple[str, Note]]]:
    return lambda: [(name, _note()) for name, _ in zip(itertools.cycle(names), range(count))]


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
            prepare = _parents(names, count)
            return {
                "kvpersist": _side(prepare, lambda item: log.append(*item), count, tasks),
                "floor": _side(prepare, lambda item: raw.append(*item), count, tasks),
            }

        def messages(tasks: int, count: int) -> dict[str, Side]:
            return {
                "kvpersist": _side(_said(ours, count), lambda item: db.messages.append(*item), count, tasks),
                "floor": _side(_raw_said(theirs, count), lambda item: turns.append(item[0], [item[1]]), count, tasks),
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
            Line("S5", "append@20k / append@1k by raw's growth", 1.2, growth, _growth, sequential=True),
        ]


def _growth(took: dict[str, float]) -> float:
    return over("kvpersist@20k", "kvpersist@1k")(took) / over("floor@20k", "floor@1k")(took)


@asynccontextmanager
async def _s6(folder: str, plan: Plan) -> AsyncIterator[list[Line]]:
    count = int(150 * plan.scale)
    async with _logs(folder, {"short": 1_000, "long": 20_000}) as (log, raw):

        def sides(parent: str, suffix: str = "") -> dict[str, Side]:
            def prepare() -> list[str]:
                return [parent] * count

            return {
                f"kvpersist{suffix}": _side(prepare, lambda parent: log.last(parent, 50), count),
                f"floor{suffix}": _side(prepare, lambda parent: raw.last(parent, 50), count),
            }

        growth = sides("long", "@20k") | sides("short", "@1k")
        yield [
            Line("S6", "last 50 of 20k", 1.7, sides("long"), sequential=True),
            Line("S6", "last 50 of 20k / of 1k by raw's growth", 1.2, growth, _growth, sequential=True),
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
            rows = [_note(user=f"user-{n % users}") for n in range(start, min(start + 1000, total))]
            _random.shuffle(rows)
            await sessions.put_many(rows)
            await raw.fill([(row.id, row.user_id, _microseconds(row.created_at), row) for row in rows])

        def prepare() -> list[str]:
            return [f"user-{_random.randrange(users)}" for _ in range(count)]

        sides = {
            "kvpersist": _side(prepare, lambda user: sessions.find(user_id=user, limit=100), count),
            "floor": _side(prepare, lambda user: raw.newest(user, 100), count),
        }
        yield [Line("S7", f"a user's 100 newest of {total // 1000}k", 2.0, sides, sequential=True)]
        await raw.close()


def _microseconds(at: datetime) -> int:
    return (at - EPOCH) // timedelta(microseconds=1)


@asynccontextmanager
async def _agents(
    folder: str, sessions: int, **options: Any
) -> AsyncIterator[tuple[Any, RawTurns, list[str], list[str]]]:
    """An agent's database and the raw tables, each with some empty sessions."""
    driver = await _driver(folder, "agents.db", durability="normal")
    async with kvpersist.open(driver, **options) as db:
        turns = RawTurns(str(Path(folder, "turns.db")))
        ours = [(await db.sessions.create(user_id=f"user-{n}")).id for n in range(sessions)]
        theirs = [await turns.create(f"user-{n}") for n in range(sessions)]
        yield db, turns, ours, theirs
        await turns.close()


def _said(sessions: Sequence[str], count: int) -> Callable[[], list[tuple[str, Message]]]:
    return lambda: [(id_, Message(role="user", content=_text(30))) for id_ in _cycle(sessions, count)]


def _raw_said(sessions: Sequence[str], count: int) -> Callable[[], list[tuple[str, RawMessage]]]:
    return lambda: [(id_, RawMessage(role="user", content=_text(30))) for id_ in _cycle(sessions, count)]


def _cycle(names: Sequence[str], count: int) -> Iterator[str]:
    return itertools.islice(itertools.cycle(names), count)


def _turns(sessions: Sequence[str], count: int, answered: bool = True) -> list[tuple[str, list[Message]]]:
    """Turns of two messages and one call, which the second message answers, or nobody."""

    def turn() -> list[Message]:
        id_ = f"call-{next(_numbers)}"
        part = ToolCallPart(id_, "search", {"query": _text(5), "limit": 10})
        asks = Message(role="assistant", content=_text(30), tool_calls=[part])
        if answered:
            return [asks, Message(role="tool", content=_text(30), tool_call_id=id_)]
        return [Message(role="user", content=_text(30)), asks]

    return [(id_, turn()) for id_ in _cycle(sessions, count)]


def _raw_turns(sessions: Sequence[str], count: int, answered: bool = True) -> list[tuple[str, list[RawMessage]]]:
    def turn() -> list[RawMessage]:
        id_ = f"call-{next(_numbers)}"
        part = RawPart(id_, "search", {"query": _text(5), "limit": 10})
        asks = RawMessage(role="assistant", content=_text(30), tool_calls=[part])
        if answered:
            return [asks, RawMessage(role="tool", content=_text(30), tool_call_id=id_)]
        return [RawMessage(role="user", content=_text(30)), asks]

    return [(id_, turn()) for id_ in _cycle(sessions, count)]


@asynccontextmanager
async def _s8(folder: str, plan: Plan) -> AsyncIterator[list[Line]]:
    count = TASKS * int(6 * plan.scale)
    async with _agents(folder, TASKS) as (db, turns, ours, theirs):

        def sides(tasks: int, answered: bool = True) -> dict[str, Side]:
            def prepare() -> list[tuple[str, list[Message]]]:
                return _turns(ours, count, answered)

            def raw_prepare() -> list[tuple[str, list[RawMessage]]]:
                return _raw_turns(theirs, count, answered)

            return {
                "kvpersist": _side(prepare, lambda turn: db.messages.append_many(*turn), count, tasks),
                "floor": _side(raw_prepare, lambda turn: turns.append(*turn), count, tasks),
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
    full_folder = _below(folder, "full")
    stored = int(20_000 * plan.load)
    async with _records(folder, stored) as normal, _records(full_folder, stored, durability="full") as full:
        own = {
            "kvpersist": _side(_notes(count), full.notes.put, count, TASKS),
            "floor": _side(_notes(count), normal.notes.put, count, TASKS),
        }
        raw = {
            "kvpersist": _side(_notes(count), full.notes.put, count, TASKS),
            "floor": _side(_notes(count), lambda note: full.raw.put(note.id, note), count, TASKS),
        }
        yield [
            Line("S9", "put c64, full against own normal", 1.3, own, setting="full / normal"),
            Line("S9", "put c64, full against raw full", None, raw, setting="full"),
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
}
