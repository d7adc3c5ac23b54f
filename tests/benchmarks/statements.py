"""Rows of a server whose floor is one statement for many keys.

The floor that is judged by sends statement after statement, each of 64 keys, from one task: nothing
waits for anything else. Beside it stands, not judged, what a service would write by hand around the
same statement: 64 tasks whose operations wait in a list, and go together when the statement before
has been answered.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Protocol

from measure import Line, Side
from work import TASKS, Note, drawn, in_chunks, new_note, new_notes, side

__all__ = ["Raw", "Waiting", "fill", "lines_of_64", "lines_of_many"]


class Raw(Protocol):
    """Notes in a table of their own."""

    async def put_many(self, notes: Sequence[Note]) -> Any: ...

    async def get_many(self, ids: Sequence[str]) -> list[Note | None]: ...


class Waiting:
    """A list, one call in flight, a future for each operation."""

    def __init__(self, run: Callable[[list[Any]], Awaitable[Sequence[Any] | None]]) -> None:
        self._run = run
        self._waiting: list[tuple[Any, asyncio.Future[Any]]] = []
        self._task: asyncio.Task[None] | None = None

    def ask(self, item: Any) -> asyncio.Future[Any]:
        future = asyncio.get_running_loop().create_future()
        self._waiting.append((item, future))
        if self._task is None:
            self._task = asyncio.create_task(self._serve())
        return future

    async def _serve(self) -> None:
        while self._waiting:
            now, self._waiting = self._waiting, []
            answers = await self._run([item for item, _ in now])
            for place, (_, future) in enumerate(now):
                future.set_result(None if answers is None else answers[place])
        self._task = None


async def fill(notes: Any, raw: Raw, stored: int) -> list[str]:
    """Store the same notes on both sides; return their ids."""
    fixtures = [new_note() for _ in range(stored)]
    for start in range(0, stored, 500):
        await notes.put_many(fixtures[start : start + 500])
        await raw.put_many(fixtures[start : start + 500])
    return [note.id for note in fixtures]


def lines_of_64(
    row: str, notes: Any, raw: Raw, ids: Sequence[str], count: int, *, goals: tuple[float, float], setting: str
) -> list[Line]:
    """Put and get by 64 tasks; ``goals`` are those of put and of get."""
    put_goal, get_goal = goals
    puts, gets = Waiting(raw.put_many), Waiting(raw.get_many)
    ours_put = side(new_notes(count), notes.put, count, TASKS)
    ours_get = side(drawn(ids, count), notes.get, count, TASKS)
    floors: list[tuple[str, float | None, Side, Side]] = [
        ("put c64, bare statements", put_goal, ours_put, side(in_chunks(new_notes(count)), raw.put_many, count)),
        ("get c64, bare statements", get_goal, ours_get, side(in_chunks(drawn(ids, count)), raw.get_many, count)),
        ("put c64, statements in tasks", None, ours_put, side(new_notes(count), puts.ask, count, TASKS)),
        ("get c64, statements in tasks", None, ours_get, side(drawn(ids, count), gets.ask, count, TASKS)),
    ]
    return [
        Line(row, what, goal, {"kvpersist": ours, "floor": floor}, setting=setting)
        for what, goal, ours, floor in floors
    ]


def lines_of_many(
    row: str, notes: Any, raw: Raw, ids: Sequence[str], calls: int, *, goal: float, setting: str
) -> list[Line]:
    """put_many and get_many of 100, one call after another."""
    count = calls * 100
    put, get = in_chunks(new_notes(count), 100), in_chunks(drawn(ids, count), 100)
    puts = {"kvpersist": side(put, notes.put_many, count), "floor": side(put, raw.put_many, count)}
    gets = {"kvpersist": side(get, notes.get_many, count), "floor": side(get, raw.get_many, count)}
    return [
        Line(row, "put_many of 100", goal, puts, sequential=True, setting=setting),
        Line(row, "get_many of 100", goal, gets, sequential=True, setting=setting),
    ]
