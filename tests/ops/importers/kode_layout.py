"""What the Kode SDK keeps: a folder of files, or tables with files beside them."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path
from typing import Any

__all__ = ["AGENT", "BEGAN", "FORK", "INFO", "MESSAGES", "ROWS", "TABLES", "json_store", "sqlite_store"]

BEGAN = 1_700_000_000_123  # milliseconds since 1970
ISO = "2023-11-14T22:13:20.123Z"
AGENT = "agt-01HF:00..x"
FORK = f"{AGENT}/fork-1700000000999"

INFO: dict[str, Any] = {
    "agentId": AGENT,
    "templateId": "coder",
    "createdAt": ISO,
    "lineage": ["agt-older"],
    "configVersion": "v2.7",
    "messageCount": 4,
    "lastSfpIndex": 3,
    "lastBookmark": {"seq": 2, "timestamp": BEGAN + 9},
    "breakpoint": "AWAITING_APPROVAL",
    "metadata": {"zero": 0, "no": False},
}
MESSAGES: list[dict[str, Any]] = [
    {"role": "user", "content": [{"type": "text", "text": "Do: it"}]},
    {
        "role": "assistant",
        "content": [
            {"type": "text", "text": ""},
            {"type": "tool_use", "id": "c1", "name": "fs:read", "input": {"path": "../x"}},
            {"type": "tool_use", "id": "c2", "name": "count", "input": {}},
            {"type": "tool_use", "id": "c3", "name": "ask", "input": 0},
            {"type": "tool_use", "id": "c4", "name": "wait", "input": None},
            {"type": "tool_use", "id": "c1", "name": "fs:read", "input": {"path": "again"}},
        ],
    },
    {
        "role": "user",
        "content": [
            {"type": "tool_result", "tool_use_id": "c1", "content": ""},
            {"type": "tool_result", "tool_use_id": "c3", "content": "told", "is_error": True},
        ],
        "metadata": {"transport": "omit"},
    },
    {"role": "assistant", "content": [{"type": "text", "text": "Done"}, {"type": "reasoning", "reasoning": "…"}]},
]


def _call(id: str, name: str, input: Any, state: str, **more: Any) -> dict[str, Any]:
    usual = {"approval": {"required": False}, "createdAt": BEGAN + 1, "updatedAt": BEGAN + 1, "auditTrail": []}
    return {"id": id, "name": name, "input": input, "state": state, **usual, **more}


CALLS: list[dict[str, Any]] = [
    _call(
        "c1",
        "fs:read",
        {"path": "../x"},
        "COMPLETED",
        approval={
            "required": True,
            "decision": "allow",
            "decidedBy": "ada",
            "decidedAt": BEGAN + 2,
            "note": "",
            "meta": {"n": 0},
        },
        result="",
        isError=False,
        startedAt=BEGAN + 3,
        completedAt=BEGAN + 4,
        durationMs=1,
        auditTrail=[
            {"state": "PENDING", "timestamp": BEGAN + 1},
            {"state": "COMPLETED", "timestamp": BEGAN + 4, "note": "ok"},
        ],
    ),
    _call("c2", "count", {}, "COMPLETED", result=0, durationMs=0, completedAt=BEGAN + 1),
    _call("c3", "ask", 0, "FAILED", error="told", isError=True, updatedAt=BEGAN + 5),
    _call("c4", "wait", None, "APPROVAL_REQUIRED", approval={"required": True}, updatedAt=BEGAN + 6),
    _call("alone", "seal", {}, "SEALED", result=False),
]
TODOS: dict[str, Any] = {
    "todos": [
        {"id": "t1", "title": "One: ..", "status": "completed", "createdAt": BEGAN, "updatedAt": BEGAN + 1},
        {"id": "t2", "title": "Two", "status": "in_progress", "notes": "", "createdAt": BEGAN, "updatedAt": BEGAN + 2},
    ],
    "version": 7,
    "updatedAt": BEGAN + 2,
}
SNAPSHOT: dict[str, Any] = {
    "id": "sfp-1",
    "messages": MESSAGES[:2],
    "lastSfpIndex": 1,
    "lastBookmark": {"seq": 1, "timestamp": BEGAN + 8},
    "createdAt": ISO,
    "metadata": {"stepCount": 0},
}
WINDOW: dict[str, Any] = {
    "id": f"window-{BEGAN}",
    "messages": MESSAGES[:1],
    "events": [{"cursor": 0, "event": {"type": "done"}}],
    "stats": {"messageCount": 1, "tokenCount": 0, "eventCount": 1},
    "timestamp": BEGAN,
}
COMPRESSION: dict[str, Any] = {
    "id": f"comp-{BEGAN}",
    "windowId": f"window-{BEGAN}",
    "config": {"model": "m", "prompt": "p", "threshold": 50_000},
    "summary": "…",
    "ratio": 0.5,
    "recoveredFiles": ["/a/b.py"],
    "timestamp": BEGAN,
}
MEDIA: list[dict[str, Any]] = [
    {"key": "sha:../1", "provider": "p", "mimeType": "image/png", "sizeBytes": 0, "fileId": "f", "createdAt": BEGAN}
]
RECOVERED = f"# Recovered: /a/b.py\n# Timestamp: {BEGAN + 1}\n# Mtime: {BEGAN}\n\nprint('a')\n\nprint('b')\n"
EVENTS: dict[str, list[dict[str, Any]]] = {
    "progress": [
        {"cursor": 0, "bookmark": {"seq": 0, "timestamp": BEGAN}, "event": {"type": "text", "n": 0}},
        {"cursor": 2, "bookmark": {"seq": 2, "timestamp": BEGAN + 9}, "event": {"type": "done"}},
    ],
    "control": [{"cursor": 1, "bookmark": {"seq": 1, "timestamp": BEGAN + 8}, "event": {"type": "permission"}}],
}


def _write(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value), "utf-8")


def files_beside(folder: Path) -> None:
    """Todos, media, history and events of the agent."""
    _write(folder / "runtime" / "todos.json", TODOS)
    _write(folder / "runtime" / "media-cache.json", MEDIA)
    _write(folder / "history" / "windows" / f"{BEGAN}.json", WINDOW)
    _write(folder / "history" / "compressions" / f"{BEGAN}.json", COMPRESSION)
    _write(folder / "history" / "recovered" / f"_a_b.py_{BEGAN}.txt", RECOVERED)
    for channel, entries in EVENTS.items():
        _write(folder / "events" / f"{channel}.log", "".join(json.dumps(entry) + "\n" for entry in entries))


def json_store(folder: Path) -> str:
    """A store of two agents, the second a fork of the first and so below it, with logs that were not replayed."""
    base = folder / "store"
    agent = base / AGENT
    _write(agent / "meta.json", INFO)
    _write(agent / "runtime" / "messages.json", MESSAGES[:1])
    _write(agent / "runtime" / "messages.wal", {"data": MESSAGES, "timestamp": BEGAN})
    _write(agent / "runtime" / "tool-calls.json", CALLS)
    _write(agent / "snapshots" / "sfp-1.json", SNAPSHOT)
    files_beside(agent)
    late = {"cursor": 3, "bookmark": {"seq": 3, "timestamp": BEGAN + 10}, "event": {"type": "late"}}
    _write(agent / "events" / "progress.wal", json.dumps(EVENTS["progress"][1]) + "\n" + json.dumps(late) + "\n")
    _write(base / FORK / "meta.json", {**INFO, "agentId": FORK, "lineage": ["agt-older", AGENT]})
    _write(base / FORK / "runtime" / "messages.json", MESSAGES[:2])
    return f"kode:{base}"


TABLES = [
    """CREATE TABLE agents (agent_id TEXT PRIMARY KEY, template_id TEXT, created_at TEXT, config_version TEXT,
    lineage {json}, message_count INTEGER, last_sfp_index INTEGER, last_bookmark {json}, breakpoint TEXT,
    metadata {json})""",
    """CREATE TABLE messages (id TEXT PRIMARY KEY, agent_id TEXT REFERENCES agents ON DELETE CASCADE, role TEXT,
    content {json}, seq INTEGER, metadata {json}, created_at BIGINT, UNIQUE (agent_id, seq))""",
    """CREATE TABLE tool_calls (id TEXT PRIMARY KEY, agent_id TEXT REFERENCES agents ON DELETE CASCADE, name TEXT,
    input {json}, state TEXT, approval {json}, result {json}, error TEXT, is_error {bool}, started_at BIGINT,
    completed_at BIGINT, duration_ms INTEGER, created_at BIGINT, updated_at BIGINT, audit_trail {json})""",
    """CREATE TABLE snapshots (agent_id TEXT REFERENCES agents ON DELETE CASCADE, snapshot_id TEXT, messages {json},
    last_sfp_index INTEGER, last_bookmark {json}, created_at TEXT, metadata {json},
    PRIMARY KEY (agent_id, snapshot_id))""",
]


def _rows() -> dict[str, list[tuple[Any, ...]]]:
    info = json.dumps
    agents = [
        (
            id_,
            INFO["templateId"],
            INFO["createdAt"],
            INFO["configVersion"],
            info(lineage),
            4,
            3,
            info(INFO["lastBookmark"]),
            INFO["breakpoint"],
            info(INFO["metadata"]),
        )
        for id_, lineage in ((AGENT, ["agt-older"]), (FORK, ["agt-older", AGENT]))
    ]
    messages: list[tuple[Any, ...]] = []
    for n, (id_, listed) in enumerate(((AGENT, MESSAGES), (FORK, MESSAGES[:2]))):
        for seq, raw in reversed(list(enumerate(listed))):
            metadata = info(raw["metadata"]) if "metadata" in raw else None
            content = info(raw["content"])
            messages.append((f"msg_{seq}_{n}", id_, raw["role"], content, seq, metadata, BEGAN + 50))
    calls = [
        (
            raw["id"],
            AGENT,
            raw["name"],
            info(raw["input"]),
            raw["state"],
            info(raw["approval"]),
            info(raw["result"]) if "result" in raw else None,
            raw.get("error"),
            raw.get("isError"),
            raw.get("startedAt"),
            raw.get("completedAt"),
            raw.get("durationMs"),
            raw["createdAt"],
            raw["updatedAt"],
            info(raw["auditTrail"]),
        )
        for raw in CALLS
    ]
    mark, metadata = info(SNAPSHOT["lastBookmark"]), info(SNAPSHOT["metadata"])
    snapshots = [(AGENT, SNAPSHOT["id"], info(SNAPSHOT["messages"]), 1, mark, ISO, metadata)]
    return {"agents": agents, "messages": messages, "tool_calls": calls, "snapshots": snapshots}


ROWS = _rows()
"""The rows of each table."""


def sqlite_store(folder: Path) -> str:
    base = folder / "kode"
    base.mkdir()
    with sqlite3.connect(base / "agents.db") as database:
        for statement in TABLES:
            database.execute(statement.format(json="TEXT", bool="INTEGER"))
        for table, rows in ROWS.items():
            marks = ", ".join("?" * len(rows[0]))
            database.executemany(f"INSERT INTO {table} VALUES ({marks})", rows)
    database.close()
    files_beside(base / AGENT)
    return f"kode:{base / 'agents.db'}"
