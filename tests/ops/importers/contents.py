"""What a store holds, and what a source looks like from outside, in a form that can be compared."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec

from kvpersist.agents.persistence import Persistence

__all__ = ["everything", "fingerprint"]


def fingerprint(folder: Path) -> dict[str, str]:
    """A hash of every file of a folder; what SQLite keeps beside a database while it is open does not count."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.endswith("-shm")
    }


OTHERS = (
    "containers",
    "images",
    "prototypes",
    "providers",
    "login_sessions",
    "traces",
    "confirmations",
    "agents",
    "snapshots",
    "windows",
    "compressions",
    "recovered_files",
    "media",
)


def _plain(record: Any) -> dict[str, Any]:
    return {name: value for name, value in msgspec.to_builtins(record).items() if name != "sealed"}


async def everything(db: Persistence, topics: Iterable[str] = ()) -> dict[str, Any]:
    """All records, by kind and key, without what differs from one run to the next.

    ``topics``: also those, where a crash kept a topic from being listed until something is published to it.
    """
    sessions = {session.id: msgspec.to_builtins(session) async for session in db.sessions.iterate()}
    found: dict[str, Any] = {
        "sessions": sessions,
        "messages": {id_: [message async for message in db.messages.iterate(id_)] for id_ in sessions},
        "calls": {id_: await db.tool_calls.of(id_) for id_ in sessions},
        "stats": {id_: msgspec.to_builtins(await db.sessions.stat(id_)) for id_ in sessions},
        "events": {},
    }
    for name in OTHERS:
        repository = getattr(db, name)
        found[name] = [_plain(record) async for record in repository.iterate()]
    for agent in found["agents"]:
        found[f"todos of {agent['id']}"] = msgspec.to_builtins(await db.todos.get(agent["id"]))
    for topic in sorted({*topics, *await db.events.topics()}):
        entries = await db.events.read(topic)
        events = [(entry.position, entry.cursor, entry.bookmark, entry.channel, entry.event) for entry in entries]
        found["events"][topic] = events, await db.events.consumers(topic)
    return found
