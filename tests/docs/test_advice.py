"""What others advise is what kvpersist does unless it is told otherwise."""

from __future__ import annotations

import inspect
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

import kvpersist
from kvpersist.pooling import PoolOptions
from kvpersist_drivers.sqlite import SqliteOptions


@pytest.mark.shows("A pool of connections has a size, and those unused are closed")
def test_a_pool_has_ten_connections_that_are_closed_when_unused() -> None:
    options = PoolOptions()

    assert (options.pool_max, options.pool_idle, options.connect_timeout) == (10, 30.0, 5.0)


@pytest.mark.shows("Lists are read in pages of 100")
@pytest.mark.parametrize("name", ["agents", "sessions", "messages", "tool_calls", "traces", "images"])
async def test_a_list_has_a_hundred_records_unless_more_are_asked_for(name: str) -> None:
    async with kvpersist.open("memory://") as db:
        for method in (getattr(db, name).find, getattr(db, name).page):
            assert inspect.signature(method).parameters["limit"].default == 100


@pytest.mark.shows("SQLite has a write-ahead log, and waits 5 seconds for other writers")
async def test_a_sqlite_file_has_a_write_ahead_log_and_is_waited_for(tmp_path: Path) -> None:
    async with kvpersist.open_store(tmp_path / "a.db") as store:
        await store.put("a", 1)
        with closing(sqlite3.connect(tmp_path / "a.db")) as other:
            assert other.execute("PRAGMA journal_mode").fetchone() == ("wal",)

    assert SqliteOptions(path="a.db").busy_timeout == 5.0


@pytest.mark.shows("What is looked up often is indexed")
async def test_sessions_and_calls_are_found_by_what_they_belong_to_through_an_index() -> None:
    async with kvpersist.open("memory://") as db:
        for n in range(3):
            await db.sessions.create(id=str(n), user_id=str(n), agent_id=str(n), template_id=str(n))

        for field in ("user_id", "agent_id", "template_id"):
            assert [each.id for each in await db.sessions.find(scanned=1, **{field: "1"})] == ["1"]


@pytest.mark.shows("A store that does not answer ends a call in time")
def test_a_call_ends_after_ten_seconds() -> None:
    assert inspect.signature(kvpersist.Store).parameters["timeout"].default == 10


def test_events_are_kept_for_a_day_and_swept_every_five_minutes() -> None:
    settings = inspect.signature(kvpersist.EventQueue).parameters

    assert (settings["retention"].default, settings["cleanup_interval"].default) == (86_400, 300)
