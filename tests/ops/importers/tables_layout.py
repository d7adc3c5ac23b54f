"""The tables of storage-prisma and Seashore, LangGraph's checkpoints, sessions of the OpenAI Agents SDK."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path
from typing import Any

import msgspec

__all__ = [
    "BEGAN",
    "ITEMS",
    "PRISMA_ROWS",
    "PRISMA_TABLES",
    "checkpoint",
    "langgraph_db",
    "openai_agents_db",
    "packed_message",
    "prisma_sqlite",
]

BEGAN = 1_700_000_000_123  # milliseconds since 1970
ODD = "a:b/../c"

# ---- storage-prisma

PRISMA_TABLES = [
    """CREATE TABLE agent_sessions ({q}id{q} {text} PRIMARY KEY, {q}createdAt{q} {time}, {q}updatedAt{q} {time},
    {q}active{q} {bool}, {q}metadata{q} {json})""",
    """CREATE TABLE agent_messages ({q}id{q} {text} PRIMARY KEY, {q}sessionId{q} {text}, {q}role{q} {text},
    {q}content{q} {text}, {q}timestamp{q} {time}, {q}responseType{q} {text}, {q}metadata{q} {json})""",
    """CREATE TABLE agent_tool_calls ({q}id{q} {text} PRIMARY KEY, {q}messageId{q} {text}, {q}toolName{q} {text},
    {q}arguments{q} {json}, {q}result{q} {json}, {q}timestamp{q} {time})""",
    """CREATE TABLE agent_pending_confirmations ({q}id{q} {text} PRIMARY KEY, {q}sessionId{q} {text},
    {q}toolName{q} {text}, {q}arguments{q} {json}, {q}userMessage{q} {text}, {q}timestamp{q} {time})""",
]


def _ok(content: str, **more: Any) -> str:
    return json.dumps({"success": True, "content": content, **more})


PRISMA_ROWS: dict[str, list[tuple[Any, ...]]] = {
    "agent_sessions": [
        ("s1", BEGAN, BEGAN + 90, True, json.dumps({"user": "ada", "zero": 0})),
        (ODD, BEGAN + 1, BEGAN + 91, False, None),
    ],
    "agent_messages": [
        ("m1", "s1", "system", "Be: kind", BEGAN + 1, None, None),
        ("m2", "s1", "user", "", BEGAN + 2, None, json.dumps({"n": 0})),
        ("m3", "s1", "assistant", "Looking", BEGAN + 3, "execute", None),
        ("m4", "s1", "assistant", '{"type":"x"}', BEGAN + 3, "message", None),
        ("m5", ODD, "user", "Hi ..", BEGAN + 4, None, None),
    ],
    "agent_tool_calls": [
        ("t1", "m3", "look:up", json.dumps({"at": "../x"}), _ok("", data=0), BEGAN + 4),
        ("t2", "m3", "count", json.dumps(0), json.dumps({"success": False, "content": "no"}), BEGAN + 5),
        ("t3", "m3", "odd", json.dumps(""), json.dumps(False), BEGAN + 6),
        ("t4", "m3", "none", json.dumps(None), json.dumps(0), BEGAN + 7),
    ],
    "agent_pending_confirmations": [("p1", "s1", "delete", json.dumps({"all": False}), "Sure?", BEGAN + 8)],
}


def prisma_sqlite(folder: Path) -> str:
    path = folder / "dev.db"
    with sqlite3.connect(path) as database:
        for statement in PRISMA_TABLES:
            database.execute(statement.format(q='"', text="TEXT", time="DATETIME", bool="BOOLEAN", json="JSONB"))
        for table, rows in PRISMA_ROWS.items():
            database.executemany(f"INSERT INTO {table} VALUES ({', '.join('?' * len(rows[0]))})", rows)
    database.close()
    return f"prisma:{path}"


# ---- LangGraph

_ENCODER = msgspec.msgpack.Encoder()


def _packed(code: int, module: str, name: str, *arguments: Any) -> msgspec.msgpack.Ext:
    return msgspec.msgpack.Ext(code, _ENCODER.encode([module, name, *arguments]))


def packed_message(kind: str, **fields: Any) -> msgspec.msgpack.Ext:
    """A message as the saver writes a model of pydantic."""
    name = {"human": "HumanMessage", "ai": "AIMessage", "tool": "ToolMessage", "system": "SystemMessage"}[kind]
    empty = {"additional_kwargs": {}, "response_metadata": {}, "name": None}
    return _packed(5, f"langchain_core.messages.{kind}", name, {**empty, "type": kind, **fields}, "model_validate_json")


GRAPH: list[Any] = [
    packed_message("human", id="h1", content="Where: is it?"),
    packed_message(
        "ai",
        id="a1",
        content=[{"type": "text", "text": ""}],
        tool_calls=[
            {"name": "look", "args": {"at": "../x"}, "id": "c1", "type": "tool_call"},
            {"name": "count", "args": {}, "id": "c2", "type": "tool_call"},
        ],
        usage_metadata={"input_tokens": 0, "output_tokens": 2},
        additional_kwargs={"at": _packed(3, "datetime", "datetime", "2024-01-01T00:00:00+00:00", "fromisoformat")},
    ),
    packed_message("tool", id="r1", content="", tool_call_id="c1", status="error"),
    packed_message("tool", id="r2", content="0", tool_call_id="c2", status="success"),
    packed_message("ai", id="a2", content="Done"),
]


def checkpoint(messages: Any, ts: str = "2024-05-05T10:00:00.123456+00:00") -> bytes:
    state = {"messages": messages, "other": _packed(5, "mine.models", "State", {"x": 1}, "model_validate_json")}
    return _ENCODER.encode({"v": 4, "ts": ts, "id": "x", "channel_values": state, "channel_versions": {}})


def langgraph_db(folder: Path) -> str:
    path = folder / "checkpoints.sqlite"
    with sqlite3.connect(path) as database:
        database.executescript(
            """CREATE TABLE checkpoints (thread_id TEXT NOT NULL, checkpoint_ns TEXT NOT NULL DEFAULT '',
            checkpoint_id TEXT NOT NULL, parent_checkpoint_id TEXT, type TEXT, checkpoint BLOB, metadata BLOB,
            PRIMARY KEY (thread_id, checkpoint_ns, checkpoint_id));
            CREATE TABLE writes (thread_id TEXT NOT NULL, checkpoint_ns TEXT NOT NULL DEFAULT '',
            checkpoint_id TEXT NOT NULL, task_id TEXT NOT NULL, task_path TEXT NOT NULL DEFAULT '',
            idx INTEGER NOT NULL, channel TEXT NOT NULL, type TEXT, value BLOB,
            PRIMARY KEY (thread_id, checkpoint_ns, checkpoint_id, task_id, idx));"""
        )
        kwargs = {"content": "Old: form", "id": "o1", "type": "human"}
        old = {
            "lc": 1,
            "type": "constructor",
            "id": ["langchain", "schema", "messages", "HumanMessage"],
            "kwargs": kwargs,
        }
        state = {"v": 1, "ts": "2024-01-01T00:00:00+00:00", "channel_values": {"messages": [old]}}
        rows = [
            ("t:1", "", "1ef-0001", None, "msgpack", checkpoint(GRAPH[:1], "2024-05-05T09:00:00+00:00"), b"{}"),
            ("t:1", "", "1ef-0002", "1ef-0001", "msgpack", checkpoint(GRAPH), b"{}"),
            ("t:1", "sub:x", "1ef-0003", None, "msgpack", checkpoint(GRAPH[:1]), b"{}"),
            ("z/fork/..", "", "1ef-0001", None, "msgpack", checkpoint(GRAPH[:2]), b"{}"),
            ("old", "", "1ee-0001", None, "json", json.dumps(state).encode(), b"{}"),
        ]
        database.executemany("INSERT INTO checkpoints VALUES (?, ?, ?, ?, ?, ?, ?)", rows)
    database.close()
    return f"langgraph:{path}"


# ---- OpenAI Agents SDK

ITEMS: list[dict[str, Any]] = [
    {"role": "user", "content": "Where: is it?"},
    {"type": "reasoning", "id": "rs_1", "summary": []},
    {"type": "function_call", "id": "fc_1", "call_id": "c1", "name": "look", "arguments": '{"at":  "../x"}'},
    {"type": "function_call_output", "call_id": "c1", "output": ""},
    {
        "type": "message",
        "id": "__fake_id__",
        "role": "assistant",
        "status": "completed",
        "content": [{"type": "output_text", "text": "Here", "annotations": []}],
    },
    {
        "type": "message",
        "id": "__fake_id__",
        "role": "assistant",
        "content": [{"type": "output_text", "text": "Here", "annotations": []}],
    },
]


def openai_agents_db(folder: Path) -> str:
    path = folder / "sessions.db"
    with sqlite3.connect(path) as database:
        database.executescript(
            """CREATE TABLE agent_sessions (session_id TEXT PRIMARY KEY, created_at TIMESTAMP DEFAULT CURRENT_TIMESTAMP,
            updated_at TIMESTAMP DEFAULT CURRENT_TIMESTAMP);
            CREATE TABLE agent_messages (id INTEGER PRIMARY KEY AUTOINCREMENT, session_id TEXT NOT NULL,
            message_data TEXT NOT NULL, created_at TIMESTAMP DEFAULT CURRENT_TIMESTAMP,
            FOREIGN KEY (session_id) REFERENCES agent_sessions (session_id) ON DELETE CASCADE);
            CREATE INDEX idx ON agent_messages (session_id, id);"""
        )
        times = ("2024-05-05 10:00:00", "2024-05-05 11:00:00")
        database.executemany("INSERT INTO agent_sessions VALUES (?, ?, ?)", [("s:1", *times), (ODD, *times)])
        rows = [("s:1", json.dumps(item), "2024-05-05 10:30:00") for item in ITEMS]
        rows += [(ODD, json.dumps(ITEMS[0]), times[0])]
        database.executemany("INSERT INTO agent_messages (session_id, message_data, created_at) VALUES (?, ?, ?)", rows)
    database.close()
    return f"openai-agents:{path}"
