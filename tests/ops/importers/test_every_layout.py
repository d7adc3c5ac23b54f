"""What holds for the import of every layout: interrupted anywhere it goes on, and the source stays as it is."""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import agentx_layout
import kode_layout
import pytest
import tables_layout
from contents import everything, fingerprint

import kvpersist
from kvpersist.errors import MalformedRecord
from kvpersist.ops.importers import SystemImport, import_from, open_source
from kvpersist.ops.progress import Progress
from kvpersist.testing.faults import Crashed, FaultyDriver
from kvpersist_drivers.memory import MemoryDriver

Build = Callable[[Path], str]
LAYOUTS: dict[str, Build] = {
    "agentx, sqlite": agentx_layout.kv_sqlite,
    "agentx, files": agentx_layout.files,
    "agentx, export": agentx_layout.export_file,
    "agentx, queue": agentx_layout.queue_db,
    "kode, files": kode_layout.json_store,
    "kode, sqlite": kode_layout.sqlite_store,
    "prisma": tables_layout.prisma_sqlite,
    "langgraph": tables_layout.langgraph_db,
    "openai-agents": tables_layout.openai_agents_db,
}


@pytest.fixture(params=LAYOUTS)
def source(request: pytest.FixtureRequest, folder: Path) -> str:
    return LAYOUTS[request.param](folder)


async def brought(driver: Any, text: str, **options: Any) -> SystemImport:
    async with kvpersist.open(driver) as db, await open_source(text) as source:
        return await import_from(db, source, **options)


async def held(driver: Any, topics: Iterable[str] = ()) -> dict[str, Any]:
    async with kvpersist.open(driver) as db:
        return await everything(db, topics)


def driver(kind: str, inner: MemoryDriver | None = None) -> FaultyDriver:
    without = {"atomic_batch", "reverse", "deref"} if kind == "ordered" else ()
    return FaultyDriver(inner or MemoryDriver(), without=without)


@pytest.mark.parametrize("kind", ["atomic", "ordered"])
async def test_an_import_that_was_killed_anywhere_ends_as_one_that_was_not(source: str, kind: str) -> None:
    whole = driver(kind)
    await brought(whole, source)
    total = whole.calls["step"]
    wanted = await held(whole)
    chance = random.Random(source.partition(":")[0] + kind)
    points = range(1, total + 1)
    for point in points if total <= 40 else chance.sample(points, 8):
        inner = MemoryDriver()
        for step in (point, chance.randint(1, 20)):  # it may be killed again while it goes on
            killed = driver(kind, inner)
            killed.crash(step)
            with contextlib.suppress(Crashed):
                await brought(killed, source)
            assert killed.crashed or step != point

        again = driver(kind, inner)
        await brought(again, source)

        assert await held(again, wanted["events"]) == wanted


async def test_an_import_that_was_interrupted_between_records_goes_on(source: str) -> None:
    whole = driver("atomic")
    report = await brought(whole, source)
    wanted = await held(whole)
    inner = MemoryDriver()

    class Stop(Exception):
        pass

    def stop(progress: Progress) -> None:
        raise Stop

    for _ in range(2):
        with pytest.raises(Stop):
            await brought(driver("atomic", inner), source, progress=stop)
    after = await brought(driver("atomic", inner), source)

    assert await held(driver("atomic", inner)) == wanted
    assert after.verified == report.verified


async def test_importing_twice_adds_nothing_and_the_source_stays_as_it_was(source: str, folder: Path) -> None:
    before = fingerprint(folder)
    store = driver("atomic")
    first = await brought(store, source)
    wanted = await held(store)

    second = await brought(store, source)

    assert await held(store) == wanted
    assert (second.sessions, second.messages, second.events, second.records) == (0, 0, 0, {})
    assert second.present == first.sessions
    assert second.verified == first.verified
    assert first.verified is not None
    assert first.verified.different == first.verified.missing_records == []
    assert fingerprint(folder) == before


async def test_a_dry_run_says_what_a_real_one_does_and_writes_nothing(source: str) -> None:
    store = driver("atomic")
    before = await held(store)
    dry = await brought(store, source, dry_run=True)
    assert await held(store) == before

    real = await brought(store, source)

    assert (dry.sessions, dry.messages, dry.events) == (real.sessions, real.messages, real.events)
    assert dry.verified is None


async def test_progress_is_told_after_each_record(source: str) -> None:
    told: list[Progress] = []

    await brought(driver("atomic"), source, progress=told.append)

    assert [progress.done for progress in told] == list(range(1, len(told) + 1))
    assert told and all(progress.total is None or progress.total >= 1 for progress in told)


@pytest.mark.parametrize("system", ["agentx", "kode"])
async def test_a_folder_that_cannot_be_listed_is_no_empty_one(
    system: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "agent" / "runtime" / "closed").mkdir(parents=True)
    (folder / "sessions").mkdir()
    (folder / "agent" / "meta.json").write_text("{}")
    lists = os.scandir

    def refuses(path: Any) -> Any:
        if Path(path).name in ("sessions", "agent"):
            raise PermissionError(13, "Permission denied", str(path))
        return lists(path)

    monkeypatch.setattr(os, "scandir", refuses)
    with pytest.raises(PermissionError):
        async with kvpersist.open("memory://") as db, await open_source(f"{system}:{folder}") as source:
            await import_from(db, source)


async def test_stop_ends_at_the_first_row_that_cannot_be_imported(folder: Path) -> None:
    keys = {"sessions:a": "{", "sessions:b": '{"sessionId": "b"}'}
    text = agentx_layout.kv_sqlite(folder, keys)

    with pytest.raises(MalformedRecord, match="sessions:a"):
        await brought(driver("atomic"), text, on_error="stop")
