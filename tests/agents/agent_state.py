"""An agent with one of everything, and what checks that nothing else is there."""

from __future__ import annotations

from typing import Any

from kvpersist import (
    Agent,
    Bookmark,
    Compression,
    HistoryWindow,
    Media,
    Message,
    NewEvent,
    Persistence,
    RecoveredFile,
    Snapshot,
    Todo,
    ToolCallPart,
)

__all__ = ["ORDERED", "fill", "kept_of", "sound_state", "space"]

ORDERED = {"atomic_batch", "reverse", "deref"}


async def fill(db: Persistence, id_: str, *, template: str = "coder", turns: int = 2) -> Agent:
    """Create an agent with a session of some turns, a snapshot after each, todos, history, media and events."""
    agent = await db.agents.create(
        id=id_, template_id=template, counters={"steps": 2}, metadata={"colour": "red"}, breakpoint="pre_model"
    )
    session = await db.sessions.create(id=f"session of {id_}", agent_id=id_, user_id="u")
    for n in range(1, turns + 1):
        call = f"call-{n}"
        await db.messages.append_many(
            session.id,
            [
                Message("user", f"question {n}"),
                Message("assistant", tool_calls=[ToolCallPart(call, "look")]),
                Message("tool", 0, tool_call_id=call),
            ],
        )
        await db.events.publish_many(
            id_,
            [
                NewEvent({"n": n}, "progress", bookmark={"seq": 2 * n - 1, "timestamp": n}),
                NewEvent({"done": n}, "control", bookmark={"seq": 2 * n, "timestamp": n}),
            ],
        )
        await db.snapshots.save(
            Snapshot(agent_id=id_, session_id=session.id, last_safe_point=3 * n, bookmark=Bookmark(2 * n))
        )
    await db.todos.save(id_, [Todo(title="read", status="completed"), Todo(title="write", status="in_progress")])
    window = await db.windows.save(HistoryWindow(agent_id=id_, messages=[Message("user", "old")], events=[{"e": 1}]))
    await db.recovered_files.save(RecoveredFile(agent_id=id_, path="/a/../b.txt", content="text"))
    await db.compressions.save(
        Compression(agent_id=id_, window_id=window.id, summary="short", ratio=0.0, recovered_files=["/a/../b.txt"])
    )
    await db.media.save(Media(agent_id=id_, key="sha256-0", provider="p", mime_type="image/png", size=0))
    return agent


async def kept_of(db: Persistence, id_: str) -> dict[str, Any]:
    """What the agent has, without what names the agent or its session."""
    todos = await db.todos.get(id_)
    return {
        "todos": None if todos is None else todos.todos,
        "snapshots": [(s.id, s.number, s.bookmark) for s in await db.snapshots.find(agent_id=id_)],
        "windows": [(w.id, w.messages, w.events, w.created_at) for w in await db.windows.find(agent_id=id_)],
        "compressions": [(c.id, c.window_id, c.summary) for c in await db.compressions.find(agent_id=id_)],
        "files": [(f.id, f.path, f.content) for f in await db.recovered_files.find(agent_id=id_)],
        "media": [(m.key, m.provider, m.size) for m in await db.media.find(agent_id=id_)],
        "events": [(e.event, e.channel, e.bookmark) for e in await db.events.read(id_)],
        "sessions": [
            [(m.role, m.content) async for m in db.messages.iterate(s.id)]
            async for s in db.sessions.iterate(agent_id=id_)
        ],
    }


async def space(driver: Any) -> dict[str, bytes]:
    """Every key but the marks of the store; tombstones are none."""
    found = await driver.scan(None, None, limit=100_000)
    return {
        entry.key: entry.value
        for entry in found
        if entry.value != b""
        and entry.expires_at is None
        and not entry.key.startswith("kvpersist:")
        and "#def" not in entry.key
    }


async def sound_state(db: Persistence) -> None:
    """Compare every index of agents and their state with its records, and every record with its agent."""
    alive = {agent.id async for agent in db.agents.iterate()}
    for name, repository in db._family.repositories.items():
        found = await repository.verify()
        if db.store.capabilities.atomic_batch == "none":  # there an entry may be stale, never missing
            found = [damage for damage in found if damage.kind != "stale"]
        assert found == [], name
        async for record in repository.iterate():
            assert getattr(record, "agent_id", None) is None or record.agent_id in alive
