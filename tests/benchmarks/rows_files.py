"""The rows F1-F3: a folder of files, against system calls by hand."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from floors_files import RawFiles
from measure import Line, Plan, Side
from rows import Row
from work import Note, by_raw_growth, drawn, new_items, new_note, new_notes, side

import kvpersist

__all__ = ["ROWS"]


@asynccontextmanager
async def _stores(folder: str, durability: str = "normal") -> AsyncIterator[tuple[Any, RawFiles[Note]]]:
    raw = RawFiles(str(Path(folder, f"raw-{durability}")), Note, sync=durability == "full")
    path = str(Path(folder, f"ours-{durability}"))
    async with kvpersist.open_store({"type": "file", "path": path, "durability": durability}) as store:
        yield store, raw
    await raw.close()


async def _fill(store: Any, raw: RawFiles[Note], stored: int) -> tuple[Any, list[str]]:
    """A repository and the floor's folder with the same notes."""
    notes = kvpersist.Repository(store, Note, name="note", key="id")
    fixtures = [new_note() for _ in range(stored)]
    await notes.put_many(fixtures)
    for note in fixtures:
        await raw.put(note.id, note)
    return notes, [note.id for note in fixtures]


@asynccontextmanager
async def _f1(folder: str, plan: Plan) -> AsyncIterator[list[Line]]:
    count = int(600 * plan.scale)
    async with _stores(folder) as (store, raw):
        notes, ids = await _fill(store, raw, int(4_000 * plan.load))
        sides = {
            "kvpersist": side(drawn(ids, count), notes.get, count),
            "floor": side(drawn(ids, count), raw.get, count),
        }
        yield [Line("F1", "get c1, inline against direct", 2.0, sides, sequential=True)]


@asynccontextmanager
async def _f2(folder: str, plan: Plan) -> AsyncIterator[list[Line]]:
    async with _stores(folder) as (store, raw), _stores(folder, "full") as (full_store, full_raw):
        notes, _ = await _fill(store, raw, int(1_000 * plan.load))
        full_notes, _ = await _fill(full_store, full_raw, 50)

        def line(notes: Any, raw: RawFiles[Note], count: int, setting: str) -> Line:
            sides = {
                "kvpersist": side(new_notes(count), notes.put, count),
                "floor": side(new_notes(count), lambda note: raw.put(note.id, note), count),
            }
            return Line("F2", "put c1", 1.25, sides, sequential=True, setting=setting)

        yield [
            line(notes, raw, int(200 * plan.scale), "normal"),
            line(full_notes, full_raw, int(40 * plan.scale), "full"),
        ]


@asynccontextmanager
async def _f3(folder: str, plan: Plan) -> AsyncIterator[list[Line]]:
    count = int(100 * plan.scale)
    async with _stores(folder) as (store, raw):
        log = kvpersist.Log(store, Note, name="line")
        for parent, length in (("short", 1_000), ("long", 20_000)):
            items = [new_note() for _ in range(length)]
            await raw.fill(parent, items)
            for start in range(0, length, 250):
                await log.append_many(parent, items[start : start + 250])

        def appended(parent: str, suffix: str) -> dict[str, Side]:
            prepare = new_items([parent], count)
            return {
                f"kvpersist{suffix}": side(prepare, lambda item: log.append(*item), count),
                f"floor{suffix}": side(prepare, lambda item: raw.append(*item), count),
            }

        growth = appended("long", "@20k") | appended("short", "@1k")
        yield [
            Line("F3", "append@20k / append@1k by raw's growth", 1.2, growth, by_raw_growth, sequential=True),
            Line("F3", "append c1, which is a batch of two files", None, appended("wide", ""), sequential=True),
        ]


ROWS: dict[str, Row] = {"F1": _f1, "F2": _f2, "F3": _f3}
