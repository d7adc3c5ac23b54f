"""storage-prisma, Seashore, LangGraph and the OpenAI Agents SDK: their tables become sessions of ours."""

from __future__ import annotations

import asyncio
import json
import pickle
import sqlite3
import sys
import threading
import traceback
import uuid
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
import pytest
import tables_layout as layout
from contents import everything

from kvpersist.agents.persistence import Persistence
from kvpersist.errors import BadOption, BadRequest
from kvpersist.ops.importers import SystemImport, import_from, open_source

Service = Callable[[str], dict[str, str]]


async def brought(db: Persistence, text: str, **options: Any) -> SystemImport:
    async with await open_source(text) as source:
        return await import_from(db, source, **options)


def at(milliseconds: int) -> datetime:
    return datetime.fromtimestamp(milliseconds // 1000, UTC).replace(microsecond=milliseconds % 1000 * 1000)


def naive(milliseconds: int) -> datetime:
    return at(milliseconds).replace(tzinfo=None)


# ---- storage-prisma


def timed(rows: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """The rows with times as servers have them."""
    return [
        tuple(
            naive(value) if isinstance(value, int) and not isinstance(value, bool) and value >= layout.BEGAN else value
            for value in row
        )
        for row in rows
    ]


async def prisma_postgres(service: Service) -> str:
    import asyncpg

    url = service("postgres")["KVPERSIST_TEST_POSTGRES_URL"]
    connection = await asyncpg.connect(url)
    await connection.execute("DROP SCHEMA IF EXISTS prisma CASCADE; CREATE SCHEMA prisma; SET search_path TO prisma")
    for statement in layout.PRISMA_TABLES:
        kinds = {"text": "TEXT", "time": "TIMESTAMP(3)", "bool": "BOOLEAN", "json": "JSONB"}
        await connection.execute(statement.format(q='"', **kinds))
    for table, rows in layout.PRISMA_ROWS.items():
        marks = ", ".join(f"${number + 1}" for number in range(len(rows[0])))
        await connection.executemany(f"INSERT INTO {table} VALUES ({marks})", timed(rows))
    await connection.close()
    return f"prisma:{url}?schema=prisma&connection_limit=5"


async def prisma_mysql(service: Service) -> str:
    from asyncmy import connect

    from kvpersist.urls import split

    url = service("mariadb")["KVPERSIST_TEST_MYSQL_URL"]
    parts, _ = split(url)
    connection = await connect(
        host=parts.host, port=parts.port, user=parts.username, password=parts.password, db=parts.path, charset="utf8mb4"
    )
    async with connection.cursor() as cursor:
        for statement in layout.PRISMA_TABLES:
            await cursor.execute("DROP TABLE IF EXISTS " + statement.split()[2])
            kinds = {"text": "VARCHAR(191)", "time": "DATETIME(3)", "bool": "TINYINT(1)", "json": "JSON"}
            await cursor.execute(statement.format(q="`", **kinds))
        for table, rows in layout.PRISMA_ROWS.items():
            for row in timed(rows):
                await cursor.execute(f"INSERT INTO {table} VALUES ({', '.join(['%s'] * len(row))})", row)
    await connection.commit()
    await connection.ensure_closed()
    return f"prisma:{url}"


PRISMA: dict[str, Any] = {"sqlite": layout.prisma_sqlite, "postgres": prisma_postgres, "mysql": prisma_mysql}


@pytest.fixture(params=PRISMA)
async def prisma(request: pytest.FixtureRequest, folder: Path, service: Service) -> str:
    make = PRISMA[request.param]
    return make(folder) if request.param == "sqlite" else await make(service)


async def test_prisma_sessions_messages_and_calls_survive(db: Persistence, prisma: str) -> None:
    report = await brought(db, prisma)

    session = await db.sessions.get("s1")
    assert session is not None
    assert (session.metadata, session.active) == ({"user": "ada", "zero": 0}, True)
    assert (session.created_at, session.updated_at) == (at(layout.BEGAN), at(layout.BEGAN + 90))
    messages = [message async for message in db.messages.iterate("s1")]
    rows = layout.PRISMA_ROWS["agent_messages"][:4]
    assert [(message.id, message.role, message.content) for message in messages] == [
        (row[0], row[2], row[3]) for row in rows
    ]
    assert [message.created_at for message in messages] == [at(row[4]) for row in rows]
    assert [message.metadata for message in messages[1:]] == [
        {"n": 0},
        {"response_type": "execute"},
        {"response_type": "message"},
    ]
    calls = await db.tool_calls.of("s1")
    assert [(call.call_id, call.name, call.arguments, call.state) for call in calls] == [
        ("t1", "look:up", {"at": "../x"}, "completed"),
        ("t2", "count", 0, "failed"),
        ("t3", "odd", "", "failed"),
        ("t4", "none", None, "failed"),
    ]
    assert [call.result for call in calls] == [
        {"success": True, "content": "", "data": 0},
        {"success": False, "content": "no"},
        False,
        0,
    ]
    assert calls[0].completed_at == at(layout.BEGAN + 4)
    odd = await db.sessions.get(layout.ODD)
    assert odd is not None and odd.active is False
    confirmation = await db.confirmations.get("s1")
    assert confirmation is not None and confirmation.arguments == {"all": False}
    assert (confirmation.tool_name, confirmation.user_message) == ("delete", "Sure?")
    assert report.whole
    told = [(problem.place, problem.left_out) for problem in report.problems]
    assert told == [("agent_tool_calls t3", False), ("agent_tool_calls t4", False)]


async def test_importing_prisma_twice_adds_nothing(db: Persistence, prisma: str) -> None:
    await brought(db, prisma)
    before = await everything(db)

    second = await brought(db, prisma)

    assert await everything(db) == before
    assert (second.sessions, second.messages, second.records) == (0, 0, {})


async def test_bad_rows_of_prisma_are_reported(folder: Path, db: Persistence) -> None:
    text = layout.prisma_sqlite(folder)
    with sqlite3.connect(folder / "dev.db") as database:
        database.execute("INSERT INTO agent_messages VALUES ('lost', 'gone', 'user', '', 1, NULL, NULL)")
        database.execute("INSERT INTO agent_messages VALUES ('tool', 's1', 'tool', '', 1, NULL, NULL)")
        database.execute("INSERT INTO agent_messages VALUES ('late', 's1', 'user', '', 'soon', NULL, NULL)")
        database.execute("INSERT INTO agent_tool_calls VALUES ('bad', 'm3', 'x', '{', NULL, 1)")
        database.execute("INSERT INTO agent_pending_confirmations VALUES ('p2', 'gone', 'x', '1', '', 1)")
        database.execute("INSERT INTO agent_sessions VALUES ('list', 1, 1, 1, '[]')")
    database.close()

    report = await brought(db, text)

    assert sorted(problem.place for problem in report.problems if problem.left_out) == [
        "agent_messages late",
        "agent_messages of gone",
        "agent_messages tool",
        "agent_pending_confirmations p2",
        "agent_sessions list",
        "agent_tool_calls bad",
    ]
    assert await db.messages.count("s1") == 4
    assert len(await db.tool_calls.of("s1")) == 4


# ---- Seashore

THREAD, OTHER, LOGIN = (str(uuid.UUID(int=n + (4 << 76))) for n in (1, 2, 3))
SEASHORE = """
DROP SCHEMA IF EXISTS seashore CASCADE; CREATE SCHEMA seashore; SET search_path TO seashore;
CREATE TABLE threads (id UUID PRIMARY KEY, title TEXT, agent_id TEXT NOT NULL, user_id TEXT, metadata JSONB,
  created_at TIMESTAMPTZ, updated_at TIMESTAMPTZ);
CREATE TABLE messages (id UUID PRIMARY KEY, thread_id UUID REFERENCES threads ON DELETE CASCADE, role TEXT,
  content TEXT, tool_calls JSONB, tool_call_id TEXT, name TEXT, metadata JSONB, created_at TIMESTAMPTZ);
CREATE TABLE traces (id UUID PRIMARY KEY, thread_id UUID REFERENCES threads ON DELETE SET NULL, parent_id UUID,
  name TEXT, type TEXT, input JSONB, output JSONB, error TEXT, token_usage JSONB, duration_ms INTEGER,
  started_at TIMESTAMPTZ, ended_at TIMESTAMPTZ);
CREATE TABLE sessions (id UUID PRIMARY KEY, user_id TEXT, metadata JSONB, expires_at TIMESTAMPTZ,
  created_at TIMESTAMPTZ);
"""


@pytest.fixture
async def seashore(service: Service) -> str:
    import asyncpg

    url = service("postgres")["KVPERSIST_TEST_POSTGRES_URL"]
    connection = await asyncpg.connect(url)
    await connection.execute(SEASHORE)
    began = at(layout.BEGAN)
    call = {"id": "c1", "type": "function", "function": {"name": "look:up", "arguments": '{"at":  "../x"}'}}
    await connection.executemany(
        "INSERT INTO threads VALUES ($1, $2, 'helper', $3, $4, $5, $6)",
        [
            (THREAD, "Title: ..", "ada", json.dumps({"zero": 0}), began, began + timedelta(seconds=9)),
            (OTHER, None, None, None, began, began),
        ],
    )
    rows = [
        ("user", "", None, None, None, json.dumps({"no": False})),
        ("assistant", None, json.dumps([call]), None, None, None),
        ("tool", "0", None, "c1", "look:up", None),
        ("assistant", "Here", None, None, None, None),
    ]
    await connection.executemany(
        "INSERT INTO messages VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9)",
        [(str(uuid.UUID(int=99 - n + (4 << 76))), THREAD, *row, began) for n, row in enumerate(rows)],
    )
    ended = began + timedelta(seconds=1.5)
    usage = json.dumps({"promptTokens": 0, "completionTokens": 3, "totalTokens": 3})
    await connection.executemany(
        "INSERT INTO traces VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12)",
        [
            (
                THREAD,
                THREAD,
                None,
                "run",
                "agent",
                '"in"',
                "0",
                None,
                usage,
                1500,
                began,
                ended,
            ),
            (OTHER, None, THREAD, "llm", "llm", "false", None, "no answer", None, 0, began, None),
            (LOGIN, None, None, "x", "dream", None, None, None, None, None, began, None),
        ],
    )
    soon = datetime.now(UTC).replace(microsecond=0) + timedelta(days=1)
    await connection.executemany(
        "INSERT INTO sessions VALUES ($1, $2, $3, $4, $5)",
        [(LOGIN, "ada", json.dumps({"ip": ""}), soon, began), (OTHER, "bob", None, began, began)],
    )
    await connection.close()
    return f"seashore:{url}?schema=seashore"


async def test_seashore_threads_keep_rows_of_one_instant_in_their_order(db: Persistence, seashore: str) -> None:
    report = await brought(db, seashore)

    session = await db.sessions.get(THREAD)
    assert session is not None
    assert (session.title, session.agent_id, session.user_id) == ("Title: ..", "helper", "ada")
    assert session.metadata == {"zero": 0}
    assert session.updated_at == at(layout.BEGAN) + timedelta(seconds=9)
    messages = [message async for message in db.messages.iterate(THREAD)]
    assert [(message.role, message.content) for message in messages] == [
        ("user", ""),
        ("assistant", None),
        ("tool", "0"),
        ("assistant", "Here"),
    ]
    [call] = await db.tool_calls.of(THREAD)
    assert (call.arguments, call.result, call.state) == ('{"at":  "../x"}', "0", "completed")
    assert report.sessions == 2


async def test_seashore_traces_and_login_sessions_come_along(db: Persistence, seashore: str) -> None:
    report = await brought(db, seashore)

    trace = await db.traces.get(THREAD)
    assert trace is not None and trace.token_usage is not None
    assert (trace.session_id, trace.input, trace.output, trace.duration) == (THREAD, "in", 0, 1.5)
    assert (trace.token_usage.prompt, trace.token_usage.total) == (0, 3)
    child = await db.traces.get(OTHER)
    assert child is not None
    assert (child.parent_id, child.input, child.error, child.duration) == (THREAD, False, "no answer", 0)
    login = await db.login_sessions.get(LOGIN)
    assert login is not None and login.metadata == {"ip": ""}
    assert [problem.place for problem in report.problems] == [f"traces {LOGIN}", f"sessions {OTHER}"]


async def test_importing_seashore_twice_adds_nothing(db: Persistence, seashore: str) -> None:
    await brought(db, seashore)
    before = await everything(db)

    second = await brought(db, seashore, user="nobody")

    assert await everything(db) == before
    assert (second.sessions, second.messages, second.records) == (0, 0, {})


# ---- LangGraph


async def test_langgraph_threads_become_sessions_of_their_last_messages(folder: Path, db: Persistence) -> None:
    report = await brought(db, layout.langgraph_db(folder))

    messages = [message async for message in db.messages.iterate("t:1")]
    assert [(message.role, message.id) for message in messages] == [
        ("user", "h1"),
        ("assistant", "a1"),
        ("tool", "r1"),
        ("tool", "r2"),
        ("assistant", "a2"),
    ]
    assert messages[1].content == [{"type": "text", "text": ""}]
    assert (messages[1].extra or {})["usage_metadata"] == {"input_tokens": 0, "output_tokens": 2}
    assert (messages[1].extra or {})["additional_kwargs"] == {"at": datetime(2024, 1, 1, tzinfo=UTC)}
    calls = await db.tool_calls.of("t:1")
    assert [(call.name, call.result, call.state) for call in calls] == [
        ("look", "", "failed"),
        ("count", "0", "completed"),
    ]
    session = await db.sessions.get("t:1")
    assert session is not None
    assert session.created_at == datetime(2024, 5, 5, 9, tzinfo=UTC)
    assert session.updated_at == datetime(2024, 5, 5, 10, microsecond=123456, tzinfo=UTC)
    [old] = [message async for message in db.messages.iterate("old")]
    assert (old.role, old.content) == ("user", "Old: form")
    assert [(problem.place, problem.left_out) for problem in report.problems] == [("checkpoints t:1", False)]


async def test_messages_that_two_threads_share_keep_their_ids_beside(folder: Path, db: Persistence) -> None:
    await brought(db, layout.langgraph_db(folder))

    first = [message async for message in db.messages.iterate("t:1")][:2]
    forked = [message async for message in db.messages.iterate("z/fork/..")]
    assert [message.id for message in first] == ["h1", "a1"]
    assert [(message.extra or {})["external_id"] for message in forked] == ["h1", "a1"]
    assert not {message.id for message in forked} & {"h1", "a1"}


async def test_nothing_of_a_checkpoint_is_revived(folder: Path, db: Persistence) -> None:
    text = layout.langgraph_db(folder)
    ran = folder / "ran"

    class Trap:
        def __reduce__(self) -> Any:
            return (Path.touch, (ran,))

    encode = msgspec.msgpack.encode
    touch = encode(["pathlib", "Path", [str(ran)], "touch"])
    evil = [
        layout.packed_message("human", content="ok", id="e1"),
        layout.packed_message("human", content=msgspec.msgpack.Ext(3, touch), id="e2"),
        msgspec.msgpack.Ext(1, encode(["os", "system", [f"touch {ran}"]])),
        msgspec.msgpack.Ext(99, b"unknown"),
        "no message",
    ]
    lc = {"lc": 2, "type": "constructor", "id": ["pathlib", "Path"], "method": "touch", "args": [str(ran)]}
    state = {"ts": "x", "channel_values": {"messages": [{"type": "human", "content": lc}, lc]}}
    with sqlite3.connect(folder / "checkpoints.sqlite") as database:
        rows = [
            ("evil", "", "1", None, "msgpack", layout.checkpoint(evil), b"{}"),
            ("json", "", "1", None, "json", json.dumps(state).encode(), b"{}"),
            ("pickle", "", "1", None, "pickle", pickle.dumps(Trap()), b"{}"),
            ("torn", "", "1", None, "msgpack", layout.checkpoint(evil)[:50], b"{}"),
            ("delta", "", "1", None, "msgpack", layout.checkpoint(msgspec.msgpack.Ext(7, b"\x90")), b"{}"),
        ]
        database.executemany("INSERT INTO checkpoints VALUES (?, ?, ?, ?, ?, ?, ?)", rows)
    database.close()

    report = await brought(db, text)

    assert not ran.exists()
    assert [message.content async for message in db.messages.iterate("evil")] == ["ok"]
    assert sorted(problem.place for problem in report.problems if problem.left_out) == [
        "checkpoints delta",
        "checkpoints evil messages[1]",
        "checkpoints evil messages[2]",
        "checkpoints evil messages[3]",
        "checkpoints evil messages[4]",
        "checkpoints json messages[0]",
        "checkpoints json messages[1]",
        "checkpoints pickle",
        "checkpoints torn",
    ]


async def test_another_channel_is_asked_for_by_its_name(folder: Path, db: Persistence) -> None:
    text = layout.langgraph_db(folder)
    with pytest.raises(BadOption, match="takes no such option"):
        await open_source(text, table="x")

    async with await open_source(text, channel="nothing") as source:
        report = await import_from(db, source)

    assert report.messages == 0
    assert report.sessions == 3


# ---- OpenAI Agents SDK


async def test_items_of_openai_agents_become_messages_and_calls(folder: Path, db: Persistence) -> None:
    report = await brought(db, layout.openai_agents_db(folder))

    messages = [message async for message in db.messages.iterate("s:1")]
    assert [message.role for message in messages] == [
        "user",
        "assistant",
        "assistant",
        "tool",
        "assistant",
        "assistant",
    ]
    assert messages[1].content == [layout.ITEMS[1]]
    assert messages[4].content == layout.ITEMS[4]["content"]
    assert messages[4].extra == {"type": "message", "status": "completed"}
    assert messages[0].created_at == datetime(2024, 5, 5, 10, 30, tzinfo=UTC)
    assert len({message.id for message in messages}) == 6
    [call] = await db.tool_calls.of("s:1")
    assert (call.name, call.arguments, call.result) == ("look", '{"at":  "../x"}', "")
    session = await db.sessions.get("s:1")
    assert session is not None and session.updated_at == datetime(2024, 5, 5, 11, tzinfo=UTC)
    assert report.whole


async def test_bad_and_encrypted_items_are_reported(folder: Path, db: Persistence) -> None:
    text = layout.openai_agents_db(folder)
    with sqlite3.connect(folder / "sessions.db") as database:
        rows = ['{"__enc__": 1, "payload": "x"}', "{", "7", '{"role": "wizard"}', '{"id": "x"}']
        database.executemany(
            "INSERT INTO agent_messages (session_id, message_data) VALUES ('s:1', ?)", [(row,) for row in rows]
        )
        database.execute(
            "INSERT INTO agent_messages (session_id, message_data) VALUES ('gone', '{\"role\": \"user\"}')"
        )
    database.close()

    report = await brought(db, text)

    assert [problem.place for problem in report.problems if problem.left_out] == [
        f"agent_messages {number}" for number in range(8, 13)
    ]
    assert await db.messages.count("gone") == 1
    assert await db.messages.count("s:1") == 6


async def test_another_database_is_refused(folder: Path) -> None:
    text = layout.prisma_sqlite(folder)
    for system in ("langgraph", "openai-agents", "seashore", "kode", "agentx"):
        with pytest.raises(BadRequest, match=r"no column|no table"):
            await open_source(f"{system}:{text.partition(':')[2]}")


# ---- sources that are broken, and addresses that are


@pytest.mark.parametrize(
    "text",
    [
        "mysql://me:hunter2@h.test/db",
        "prisma:mysql://me:hunter2/x@h.test/db",
        "prisma:postgresql://me:hun#ter2@h.test/db",
        "prisma:postgresql://me:hunter2/x@h.test/db",
        "agentx:redis://me:hunter2/x@h.test/0",
        "agentx:mongodb://me:hunter2/x@h.test/0",
        "agentx:mongodb://me:12/hunter2@h.test/0",
    ],
)
async def test_an_address_that_is_refused_shows_nothing_of_its_password(text: str) -> None:
    for module in ("asyncpg", "asyncmy", "redis", "pymongo"):
        pytest.importorskip(module)
    with pytest.raises(BadOption) as caught:
        await open_source(text)

    shown = "".join(traceback.format_exception(caught.value)).replace(text, "")
    assert "hun" not in shown and "ter2" not in shown


async def test_a_field_that_is_no_text_is_reported_and_the_rows_around_it_come(folder: Path, db: Persistence) -> None:
    with sqlite3.connect(folder / "s.db") as database:
        database.execute("CREATE TABLE agent_sessions (session_id TEXT PRIMARY KEY, created_at, updated_at)")
        database.execute("CREATE TABLE agent_messages (id INTEGER PRIMARY KEY, session_id TEXT, message_data TEXT)")
        database.execute("INSERT INTO agent_sessions (session_id) VALUES ('s1'), (CAST(x'ff' AS TEXT))")
        item = json.dumps({"role": "user", "content": "kept"})
        for session, data in (("s1", item), ("s1", b"{\xff"), ("s1", item), (b"\xfe", item)):
            database.execute(
                "INSERT INTO agent_messages (session_id, message_data) VALUES (CAST(? AS TEXT), CAST(? AS TEXT))",
                (session, data),
            )
    database.close()

    report = await brought(db, f"openai-agents:{folder / 's.db'}")

    assert [message.content for message in await db.messages.last("s1", 5)] == ["kept", "kept"]
    assert [problem.place for problem in report.problems] == [
        "agent_messages 2",
        "agent_sessions b'\\xff'",
        "agent_messages of b'\\xfe'",
    ]
    assert await db.sessions.count() == 1


async def test_a_thread_whose_id_is_no_text_is_reported(folder: Path, db: Persistence) -> None:
    text = layout.langgraph_db(folder)
    before = await brought(db, text)
    with sqlite3.connect(text.partition(":")[2]) as database:
        database.execute("INSERT INTO checkpoints (thread_id, checkpoint_id) VALUES (CAST(x'ff' AS TEXT), '1')")
    database.close()

    report = await brought(db, text)

    assert [problem.place for problem in report.problems if problem not in before.problems] == ["checkpoints b'\\xff'"]


async def test_a_statement_that_takes_long_ends_when_it_is_cancelled(folder: Path, db: Persistence) -> None:
    with sqlite3.connect(folder / "slow.db") as database:
        database.execute(
            "CREATE VIEW agent_sessions AS WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) "
            "SELECT i AS session_id FROM n"
        )
        database.execute("CREATE TABLE agent_messages (id INTEGER PRIMARY KEY, session_id, message_data TEXT)")
    database.close()

    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.2):
            await brought(db, f"openai-agents:{folder / 'slow.db'}")

    assert not [each for each in threading.enumerate() if each.name.startswith("asyncio_") and _runs_sql(each)]


def _runs_sql(thread: threading.Thread) -> bool:
    frame = sys._current_frames().get(thread.ident or 0)
    return frame is not None and any(each.filename.endswith("sql.py") for each in traceback.extract_stack(frame))
