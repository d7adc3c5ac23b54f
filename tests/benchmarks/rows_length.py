"""The rows L1 (SQLite) and L2 (Redis): a session of 100,000 messages over one of 1,000, by the floor's growth."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from agent_work import RawMessage
from floors_length import RawConversationsRedis, RawConversationsSqlite
from measure import Line, Plan, Side, over
from rows import Row
from work import new_text, side

import kvpersist
from kvpersist.agents.records import Message

__all__ = ["ROWS"]

_GOAL = 1.3  # of our growth over the floor's
_LENGTHS = {"short": 1_000, "long": 100_000}
_TOGETHER = 1_000  # messages appended at once while filling


def _growth(took: dict[str, float]) -> float:
    return over("kvpersist, long", "kvpersist, short")(took) / over("floor, long", "floor, short")(took)


async def _lines(row: str, db: Any, raw: Any, setting: str, plan: Plan) -> list[Line]:
    lengths = {name: max(200, int(length * plan.load)) for name, length in _LENGTHS.items()}
    ours: dict[str, list[str]] = {}
    theirs: dict[str, list[str]] = {}
    for name, length in lengths.items():
        await db.sessions.create(id=name)
        ours[name], theirs[name] = [], []
        for start in range(0, length, _TOGETHER):
            texts = [new_text(30) for _ in range(min(_TOGETHER, length - start))]
            stored = await db.messages.append_many(name, [Message("user", text) for text in texts])
            ours[name] += [message.id for message in stored]
            theirs[name] += await raw.append_many(name, [RawMessage(role="user", content=text) for text in texts])

    def both(
        count: int, act: Callable[[str], tuple[Callable[[], list[Any]], Any]], of_raw: Callable[[str], Any]
    ) -> dict[str, Side]:
        sides: dict[str, Side] = {}
        for name in lengths:
            prepare, call = act(name)
            sides[f"kvpersist, {name}"] = side(prepare, call, count)
            prepare, call = of_raw(name)
            sides[f"floor, {name}"] = side(prepare, call, count)
        return sides

    many, few = int(100 * plan.scale), max(2, int(10 * plan.scale))
    appends = both(
        many,
        lambda name: (
            lambda: [Message("user", new_text(30)) for _ in range(many)],
            lambda message: db.messages.append(name, message),
        ),
        lambda name: (
            lambda: [RawMessage(role="user", content=new_text(30)) for _ in range(many)],
            lambda message: raw.append_many(name, [message]),
        ),
    )
    lasts = both(
        many,
        lambda name: (lambda: [name] * many, lambda name: db.messages.last(name, 50)),
        lambda name: (lambda: [name] * many, lambda name: raw.last(name, 50)),
    )
    counts = both(
        many,
        lambda name: (lambda: [name] * many, db.messages.count),
        lambda name: (lambda: [name] * many, raw.count),
    )
    deletes = both(
        few,
        lambda name: (lambda: [ours[name].pop(len(ours[name]) // 2) for _ in range(few)], db.messages.delete),
        lambda name: (lambda: [theirs[name].pop(len(theirs[name]) // 2) for _ in range(few)], raw.delete),
    )
    title = f"{lengths['long']:,} messages over {lengths['short']:,}, by raw's growth"
    return [
        Line(row, f"{what}: {title}", _GOAL, sides, _growth, sequential=True, setting=setting)
        for what, sides in (("append", appends), ("last 50", lasts), ("count", counts), ("delete one", deletes))
    ]


@asynccontextmanager
async def _sqlite(folder: str, plan: Plan) -> AsyncIterator[list[Line]]:
    raw = RawConversationsSqlite(str(Path(folder, "raw.db")))
    async with kvpersist.open(f"sqlite:///{folder}/ours.db?kv.durability=normal") as db:
        yield await _lines("L1", db, raw, "normal", plan)
    await raw.close()


@asynccontextmanager
async def _redis(folder: str, plan: Plan) -> AsyncIterator[list[Line]]:
    from rows_redis import server

    async with server() as (client, url, base, setting), kvpersist.open({"url": url, "base": base}) as db:
        yield await _lines("L2", db, RawConversationsRedis(client, f"{base}raw"), setting, plan)


ROWS: dict[str, Row] = {"L1": _sqlite, "L2": _redis}
