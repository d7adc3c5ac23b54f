"""What AgentX keeps, in each place it can keep it."""

from __future__ import annotations

import json
import re
import sqlite3
from pathlib import Path
from typing import Any

__all__ = ["CURSORS", "EXPORT", "KEYS", "TALK", "export_file", "files", "kv_sqlite", "queue_db"]

BEGAN = 1_700_000_000_123  # milliseconds since 1970
ODD = "tenant:a/../b"  # an id with separators and a step upwards
TALK: list[dict[str, Any]] = [
    {"id": "msg_1", "subtype": "user", "content": "Where: is it?", "timestamp": BEGAN},
    {
        "id": "msg_2",
        "subtype": "tool_call",
        "content": [
            {"id": "call_1", "name": "look:up", "input": {"at": "../x", "n": 0}},
            {"id": "call_2", "name": "count", "input": {}},
            {"id": "call_3", "name": "ask", "input": None},
            {"id": "call_4", "name": "say", "input": ""},
        ],
        "timestamp": BEGAN + 1,
    },
    {"id": "msg_3", "subtype": "tool_result", "toolCallId": "call_1", "content": "", "timestamp": BEGAN + 2},
    {"id": "msg_4", "subtype": "tool_result", "toolCallId": "call_2", "content": 0, "timestamp": BEGAN + 2},
    {"id": "msg_5", "subtype": "tool_result", "toolCallId": "call_3", "content": False, "timestamp": BEGAN + 2},
    {"id": "msg_6", "subtype": "tool_result", "toolCallId": "call_4", "content": None, "timestamp": BEGAN + 2},
    {"id": "msg_7", "subtype": "assistant", "content": "Here: 🙂", "timestamp": BEGAN + 3},
]
NEWER: list[dict[str, Any]] = [
    {"id": "msg_1", "role": "user", "subtype": "user", "content": [{"type": "text", "text": "Hi"}], "timestamp": BEGAN},
    {
        "id": "n2",
        "role": "assistant",
        "subtype": "tool-call",
        "toolCall": {"type": "tool-call", "id": "t1", "name": "look", "input": {"q": 1}},
        "timestamp": BEGAN + 5,
    },
    {
        "id": "n3",
        "role": "tool",
        "subtype": "tool-result",
        "toolCallId": "t1",
        "toolResult": {
            "type": "tool-result",
            "id": "t1",
            "name": "look",
            "output": {"type": "error-text", "value": "no"},
        },
        "timestamp": BEGAN + 6,
    },
]


def _times(at: int = 0) -> dict[str, int]:
    return {"createdAt": BEGAN + at, "updatedAt": BEGAN + at + 7}


CONTAINERS: list[dict[str, Any]] = [
    {"containerId": "c1", "config": {"region": "eu", "n": 0}, **_times()},
    {"containerId": ODD, **_times(1)},
]
IMAGES: list[dict[str, Any]] = [
    {
        "imageId": "img_1",
        "containerId": "c1",
        "sessionId": "sess_1",
        "name": "Weather: ../today",
        "description": "",
        "systemPrompt": "Be kind.",
        "mcpServers": {"files": {"command": "npx", "args": ["a:b"]}},
        "metadata": {"claudeSdkSessionId": "x", "zero": 0},
        "model": "m-1",
        **_times(2),
    },
    {
        "imageId": "img:2",
        "containerId": ODD,
        "sessionId": ODD,
        "name": "New Conversation",
        "parentImageId": "img_1",
        **_times(3),
    },
]
PROTOTYPES: list[dict[str, Any]] = [{"prototypeId": "proto_1", "containerId": "c1", "name": "Base", **_times(4)}]
PROVIDERS: list[dict[str, Any]] = [
    {
        "id": "llm_1",
        "containerId": "c1",
        "name": "main",
        "vendor": "anthropic",
        "protocol": "anthropic",
        "apiKey": "sk-very-secret",
        "baseUrl": "https://llm.example",
        "model": "m-1",
        "isDefault": True,
        **_times(5),
    }
]
SESSIONS: list[dict[str, Any]] = [
    {"sessionId": "sess_1", "imageId": "img_1", "containerId": "c1", **_times(10)},
    {"sessionId": ODD, "imageId": "img:2", "containerId": ODD, **_times(11)},
    {"sessionId": "sess_empty", "imageId": "img_1", "containerId": "c1", **_times(12)},
    {"sessionId": "sess_orphan", "imageId": "img_gone", "containerId": "c_gone", **_times(13)},
    {"sessionId": "s" * 300, "imageId": "img_1", "containerId": "c1", **_times(14)},
]
MESSAGES: dict[str, Any] = {"sess_1": TALK, ODD: NEWER, "sess_orphan": TALK[:1], "s" * 300: TALK[:2]}
EXPORT: dict[str, Any] = {"containers": CONTAINERS, "images": IMAGES, "sessions": SESSIONS, "messages": MESSAGES}
CURSORS = ["loyw3v28-0001", "loyw3v28-0002", "loyw3v28-10000", "loyw3v29-0001"]
"""Of one topic, in their order, which is not that of the texts."""


def _key(text: str) -> str:
    return re.sub(":+", ":", text.replace("/", ":")).strip(":")


def _keys() -> dict[str, str]:
    found: dict[str, Any] = {f"containers:{each['containerId']}": each for each in CONTAINERS}
    for each in IMAGES:
        found[f"images:{each['imageId']}"] = each
        found[f"idx:images:name:{each['name']}:{each['imageId']}"] = each["imageId"]
        found[f"idx:images:container:{each['containerId']}:{each['imageId']}"] = each["imageId"]
    found |= {f"prototypes:{each['prototypeId']}": each for each in PROTOTYPES}
    found |= {f"llm-providers:{each['id']}": each for each in PROVIDERS}
    found |= {f"sessions:{each['sessionId']}": each for each in SESSIONS}
    found |= {f"messages:{id_}": messages for id_, messages in MESSAGES.items()}
    return {_key(key): json.dumps(value) for key, value in found.items()}


KEYS = _keys()
"""The same by key, as every driver of AgentX has it."""


def kv_sqlite(folder: Path, keys: dict[str, str] = KEYS) -> str:
    path = folder / "agentx.db"
    with sqlite3.connect(path) as database:
        database.execute(
            "CREATE TABLE kv_storage (key TEXT PRIMARY KEY, value TEXT, created_at INTEGER, updated_at INTEGER)"
        )
        database.executemany("INSERT INTO kv_storage VALUES (?, ?, 1, 2)", keys.items())
    database.close()
    return f"agentx:{path}"


def files(folder: Path, keys: dict[str, str] = KEYS) -> str:
    """A file per key. No key with ``..`` is ever written there."""
    for key, text in keys.items():
        if ".." not in key.split(":") and len(key) < 200:
            path = folder / "fs" / key.replace(":", "/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, "utf-8")
    return f"agentx:{folder / 'fs'}"


def export_file(folder: Path) -> str:
    path = folder / "export.json"
    path.write_text(json.dumps({**EXPORT, "prototypes": PROTOTYPES, "llmProviders": PROVIDERS}, indent=2), "utf-8")
    return f"agentx:{path}"


def queue_db(folder: Path) -> str:
    path = folder / "queue.db"
    with sqlite3.connect(path) as database:
        database.executescript(
            "CREATE TABLE entries (id INTEGER PRIMARY KEY AUTOINCREMENT, cursor TEXT UNIQUE, topic TEXT, event TEXT,"
            " timestamp INTEGER);"
            "CREATE INDEX by_topic ON entries (topic, cursor);"
            "CREATE TABLE consumers (consumer_id TEXT, topic TEXT, cursor TEXT, updated_at INTEGER,"
            " PRIMARY KEY (consumer_id, topic));"
        )
        rows = [(cursor, "jobs:../x", json.dumps({"n": n}), BEGAN + n) for n, cursor in enumerate(CURSORS)]
        rows += [("loyw3v30-0001", "other", "0", BEGAN), ("loyw3v30-0002", "other", "{broken", BEGAN)]
        database.executemany("INSERT INTO entries (cursor, topic, event, timestamp) VALUES (?, ?, ?, ?)", rows)
        database.executemany(
            "INSERT INTO consumers VALUES (?, ?, ?, 1)",
            [
                ("reader:1", "jobs:../x", CURSORS[1]),
                ("reader:2", "jobs:../x", "loyw3v28-9999"),  # retention removed it
                ("reader:3", "jobs:../x", "loyw3v20-0001"),  # before all there is
                ("reader:4", "other", "nonsense"),
            ],
        )
    database.close()
    return f"agentx:{path}"
