"""Kode: its folder with what its logs hold, and its tables with the files beside them."""

from __future__ import annotations

import asyncio
import json
import os
import sqlite3
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import kode_layout as layout
import pytest
from contents import everything, fingerprint

from kvpersist.agents.persistence import Persistence
from kvpersist.errors import BadOption, BadRequest
from kvpersist.ops.importers import SystemImport, import_from, open_source

Service = Callable[[str], dict[str, str]]
AGENT, FORK = layout.AGENT, layout.FORK


async def brought(db: Persistence, text: str, **options: Any) -> SystemImport:
    async with await open_source(text) as source:
        return await import_from(db, source, **options)


async def in_postgres(service: Service, folder: Path) -> str:
    import asyncpg

    url = service("postgres")["KVPERSIST_TEST_POSTGRES_URL"]
    connection = await asyncpg.connect(url)
    await connection.execute("DROP SCHEMA IF EXISTS kode CASCADE; CREATE SCHEMA kode; SET search_path TO kode")
    for statement in layout.TABLES:
        await connection.execute(statement.format(json="JSONB", bool="BOOLEAN"))
    for table, rows in layout.ROWS.items():
        marks = ", ".join(f"${number + 1}" for number in range(len(rows[0])))
        await connection.executemany(f"INSERT INTO {table} VALUES ({marks})", rows)
    await connection.close()
    layout.files_beside(folder / "files" / AGENT)
    return f"kode:{url}?schema=kode&kv.files={folder / 'files'}"


PLACES: dict[str, Any] = {"files": layout.json_store, "sqlite": layout.sqlite_store, "postgres": in_postgres}


@pytest.fixture(params=PLACES)
async def source(request: pytest.FixtureRequest, folder: Path, service: Service) -> str:
    make = PLACES[request.param]
    return await make(service, folder) if request.param == "postgres" else make(folder)


def at(milliseconds: int) -> datetime:
    return datetime.fromtimestamp(milliseconds // 1000, UTC).replace(microsecond=milliseconds % 1000 * 1000)


async def test_an_agent_keeps_what_is_known_of_it(db: Persistence, source: str) -> None:
    report = await brought(db, source)

    agent = await db.agents.get(AGENT)
    assert agent is not None
    assert (agent.template_id, agent.lineage, agent.config_version) == ("coder", ["agt-older"], "v2.7")
    assert (agent.breakpoint, agent.last_safe_point) == ("awaiting_approval", 3)
    assert agent.bookmark is not None and agent.bookmark.seq == 2 and agent.bookmark.at == at(layout.BEGAN + 9)
    assert agent.metadata == {"zero": 0, "no": False}
    assert agent.created_at == at(layout.BEGAN)
    fork = await db.agents.get(FORK)
    assert fork is not None and fork.lineage == ["agt-older", AGENT]
    assert report.whole, report.problems


async def test_a_todo_that_waits_is_the_same_when_it_is_imported_again(db: Persistence, folder: Path) -> None:
    todo = {"id": "t1", "title": "Look", "status": "pending", "createdAt": layout.BEGAN, "updatedAt": layout.BEGAN}
    place = folder / "agt-waits" / "runtime" / "todos.json"
    place.parent.mkdir(parents=True)
    place.write_text(json.dumps({"todos": [todo], "version": 1, "updatedAt": layout.BEGAN}))
    place.parent.with_name("meta.json").write_text(json.dumps({"agentId": "agt-waits"}))

    reports = [await brought(db, f"kode:{folder}") for _ in range(2)]

    assert [(report.differing, report.problems) for report in reports] == [([], []), ([], [])]
    assert [report.verified and report.verified.missing_records for report in reports] == [[], []]


async def test_messages_keep_their_order_and_their_blocks(db: Persistence, source: str) -> None:
    await brought(db, source)

    messages = [message async for message in db.messages.iterate(AGENT)]
    assert [message.content for message in messages] == [raw["content"] for raw in layout.MESSAGES]
    assert messages[2].metadata == {"transport": "omit"}
    session = await db.sessions.get(AGENT)
    assert session is not None and session.agent_id == AGENT and session.template_id == "coder"
    assert await db.messages.count(FORK) == 2


async def test_calls_keep_state_result_approval_audit_and_times(db: Persistence, source: str) -> None:
    await brought(db, source)

    calls = await db.tool_calls.of(AGENT)
    assert [(call.call_id, call.state, call.result) for call in calls] == [
        ("c1", "completed", ""),
        ("c2", "completed", 0),
        ("c3", "failed", None),
        ("c4", "approval_required", None),
        ("c1", "completed", ""),
        ("alone", "sealed", False),
    ]
    first, failed = calls[0], calls[2]
    assert first.approval is not None
    assert (first.approval.decision, first.approval.decided_by, first.approval.note) == ("allow", "ada", "")
    assert first.approval.decided_at == at(layout.BEGAN + 2)
    assert [(entry.state, entry.note) for entry in first.audit] == [("pending", None), ("completed", "ok")]
    assert (first.started_at, first.completed_at) == (at(layout.BEGAN + 3), at(layout.BEGAN + 4))
    assert failed.error == "told" and failed.is_error is True
    waiting = await db.tool_calls.pending_approvals(AGENT)
    assert [call.call_id for call in waiting] == ["c4"]


async def test_the_state_of_an_agent_comes_along(db: Persistence, source: str) -> None:
    await brought(db, source)

    todos = await db.todos.get(AGENT)
    assert todos is not None and todos.version == 7 and todos.updated_at == at(layout.BEGAN + 2)
    assert [(todo.id, todo.status, todo.notes) for todo in todos.todos] == [
        ("t1", "completed", None),
        ("t2", "in_progress", ""),
    ]
    [snapshot] = await db.snapshots.find(agent_id=AGENT)
    assert (snapshot.id, snapshot.last_safe_point, snapshot.metadata) == ("sfp-1", 1, {"stepCount": 0})
    assert [message.content for message in snapshot.messages or ()] == [raw["content"] for raw in layout.MESSAGES[:2]]
    [window] = await db.windows.find(agent_id=AGENT)
    assert window.stats is not None and (window.stats.message_count, window.stats.token_count) == (1, 0)
    [compression] = await db.compressions.find(agent_id=AGENT)
    assert (compression.window_id, compression.ratio) == (window.id, 0.5)
    [recovered] = await db.recovered_files.find(agent_id=AGENT)
    assert (recovered.path, recovered.content) == ("/a/b.py", "print('a')\n\nprint('b')\n")
    assert recovered.modified_at == at(layout.BEGAN)
    [media] = await db.media.find(agent_id=AGENT)
    assert (media.key, media.size, media.file_id) == ("sha:../1", 0, "f")


async def test_events_of_all_channels_stand_in_one_sequence(db: Persistence, source: str) -> None:
    await brought(db, source)

    entries = await db.events.read(AGENT)
    assert [(entry.channel, entry.cursor) for entry in entries][:3] == [
        ("progress", 0),
        ("control", 1),
        ("progress", 2),
    ]
    assert entries[0].event == {"type": "text", "n": 0}
    assert entries[1].bookmark == {"seq": 1, "timestamp": layout.BEGAN + 8}
    late = await db.events.read(AGENT, after={"seq": 1, "timestamp": layout.BEGAN + 8})
    assert late == entries[2:]


async def test_importing_twice_adds_nothing(db: Persistence, source: str) -> None:
    await brought(db, source)
    before = await everything(db)

    second = await brought(db, source)

    assert await everything(db) == before
    assert (second.sessions, second.messages, second.events, second.records) == (0, 0, 0, {})


async def test_logs_that_were_not_replayed_are_read_and_left(folder: Path, db: Persistence) -> None:
    text = layout.json_store(folder)
    before = fingerprint(folder)

    report = await brought(db, text)

    assert await db.messages.count(AGENT) == len(layout.MESSAGES)
    assert [entry.event["type"] for entry in await db.events.read(AGENT)] == ["text", "permission", "done", "late"]
    assert fingerprint(folder) == before
    assert report.problems == []


async def test_unreadable_lines_and_files_are_reported_with_their_place(folder: Path, db: Persistence) -> None:
    text = layout.json_store(folder)
    agent = folder / "store" / AGENT
    (agent / "runtime" / "messages.wal").write_text("{half")
    (agent / "runtime" / "tool-calls.json").write_text(json.dumps([{"id": "x", "name": "n", "state": "DREAMING"}]))
    (agent / "runtime" / "todos.json").write_text("[]")
    (agent / "snapshots" / "bad.json").write_text("null")
    (agent / "runtime" / "tool-calls.wal.corrupted").write_text("?")
    with (agent / "events" / "control.log").open("a") as log:
        log.write('{"cursor": 9\n\n{"cursor": 10, "event": 1}\n')
    (folder / "store" / "nameless" / "runtime").mkdir(parents=True)
    (folder / "store" / "nameless" / "runtime" / "messages.json").write_text(json.dumps([layout.MESSAGES[0], 7]))

    report = await brought(db, text)

    places = {problem.place: problem.left_out for problem in report.problems}
    assert places == {
        f"{AGENT}/runtime/messages.wal": True,
        f"{AGENT}/runtime/tool-calls.json [0]": True,
        f"{AGENT}/runtime/todos.json": True,
        f"{AGENT}/snapshots/bad.json": True,
        f"{AGENT}/runtime/tool-calls.wal.corrupted": True,
        f"{AGENT}/events/control.log:2": True,
        f"{AGENT}/events/control.log:3": True,
        "nameless/meta.json": False,
        "nameless/runtime/messages.json [1]": True,
    }
    assert await db.messages.count(AGENT) == 1  # of the file: the log cannot be read
    assert await db.messages.count("nameless") == 1
    assert len(await db.snapshots.find(agent_id=AGENT)) == 1


async def test_messages_that_were_saved_again_under_other_ids_are_still_the_same(folder: Path, db: Persistence) -> None:
    text = layout.sqlite_store(folder)
    await brought(db, text)
    with sqlite3.connect(folder / "kode" / "agents.db") as database:
        database.execute("UPDATE messages SET id = id || 'x', created_at = created_at + 1000")
        row = ("msg_new", AGENT, "user", json.dumps([{"type": "text", "text": "More"}]), 4, None, layout.BEGAN + 60)
        database.execute("INSERT INTO messages VALUES (?, ?, ?, ?, ?, ?, ?)", row)
    database.close()

    report = await brought(db, text)

    assert report.differing == []
    assert report.messages == 1
    assert await db.messages.count(AGENT) == len(layout.MESSAGES) + 1


async def test_rows_of_no_agent_are_reported(folder: Path, db: Persistence) -> None:
    text = layout.sqlite_store(folder)
    with sqlite3.connect(folder / "kode" / "agents.db") as database:
        database.execute("INSERT INTO messages VALUES ('lost', 'gone', 'user', '[]', 0, NULL, 1)")
        database.execute("UPDATE messages SET content = '{' WHERE agent_id = ? AND seq = 0", (FORK,))
    database.close()
    layout.files_beside(folder / "kode" / "stray")

    report = await brought(db, text)

    assert [problem.place for problem in report.problems if problem.left_out] == [
        "messages msg_0_1",
        "messages of gone",
        f"{folder / 'kode'}/stray",
    ]


async def test_an_id_that_leads_out_of_the_folder_reads_nothing_there(folder: Path, db: Persistence) -> None:
    text = layout.sqlite_store(folder)
    layout.files_beside(folder / "elsewhere")
    with sqlite3.connect(folder / "kode" / "agents.db") as database:
        database.execute("INSERT INTO agents (agent_id) VALUES ('../elsewhere')")
    database.close()

    await brought(db, text)

    assert await db.agents.exists("../elsewhere")
    assert await db.todos.get("../elsewhere") is None
    assert "../elsewhere" not in await db.events.topics()


async def test_what_is_no_store_of_kode_is_refused(folder: Path) -> None:
    (folder / "empty").mkdir()
    with pytest.raises(BadRequest, match="no agents"):
        await open_source(f"kode:{folder / 'empty'}")
    with pytest.raises(BadOption, match="files"):
        await open_source(f"kode:{folder / 'empty'}", files=str(folder))
    sqlite3.connect(folder / "other.db").close()
    with pytest.raises(BadRequest, match="no table agents"):
        await open_source(f"kode:{folder / 'other.db'}")


async def test_a_link_out_of_an_agents_folder_is_reported_and_not_read(folder: Path, db: Persistence) -> None:
    elsewhere = folder / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "messages.json").write_text(json.dumps([{"role": "user", "content": "of another"}]))
    (elsewhere / "notes.txt").write_text("of another")
    agent = folder / "kode" / "a1"
    for part in ("runtime", "history", "events"):
        (agent / part).mkdir(parents=True)
    (agent / "meta.json").write_text(json.dumps({"agentId": "a1"}))
    (agent / "runtime" / "messages.json").symlink_to(elsewhere / "messages.json")
    (agent / "history" / "recovered").symlink_to(elsewhere)
    (agent / "events" / "progress.log").symlink_to(elsewhere / "notes.txt")

    report = await brought(db, f"kode:{folder / 'kode'}")

    assert await db.messages.count("a1") == 0
    assert await db.recovered_files.count() == 0
    assert [problem.place for problem in report.problems if "link out of" in problem.reason] == [
        "a1/runtime/messages.json",
        "a1/history/recovered/notes.txt",
        "a1/events/progress.log",
    ]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no pipes here")
async def test_a_pipe_among_the_files_is_not_waited_for(folder: Path, db: Persistence) -> None:
    (folder / "kode" / "a1" / "runtime").mkdir(parents=True)
    os.mkfifo(folder / "kode" / "a1" / "runtime" / "messages.json")

    async with asyncio.timeout(10):
        report = await brought(db, f"kode:{folder / 'kode'}")

    assert "a1/runtime/messages.json" in [problem.place for problem in report.problems if "no file" in problem.reason]
