"""Every operation of the Kode SDK's store, done with kvpersist.

    python docs/coming-from/kode.py                                  # in memory, on the demo's conversation
    python docs/coming-from/kode.py sqlite:///talks.db --data FILE   # any store, and your own conversations

``docs/coming-from/kode.md`` is the page to it. Each step gets a conversation of its own, ``talk``.
"""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from msgspec.structs import replace
from steps import main, refused, theirs

import kvpersist
from kvpersist import (
    Agent,
    Bookmark,
    Compression,
    CompressionConfig,
    HistoryWindow,
    Locked,
    Media,
    Message,
    Persistence,
    RecoveredFile,
    Session,
    Snapshot,
    Todo,
    ToolCallPart,
    WindowStats,
    at_least,
    between,
    config,
)
from kvpersist.errors import BadOption, BadRequest, ParentGone
from kvpersist.ops.importers import import_from, open_source

DAY = timedelta(days=1)


async def agent_of(db: Persistence, talk: Session) -> Agent:
    """Keep the conversation as Kode does: an agent, and its messages under the same id."""
    agent = await db.agents.create(template_id=f"template-{talk.id}")
    await db.sessions.fork(talk.id, id=agent.id, agent_id=agent.id, template_id=agent.template_id)
    return agent


# ---- opening


@theirs("createStore", "createExtendedStore", "close")
async def open_and_close(db: Persistence, talk: Session) -> None:
    with TemporaryDirectory() as folder:
        where = f"sqlite:///{folder}/agents.db"
        async with kvpersist.open(where, files=f"file://{folder}/store") as other:  # todos, history, media in files
            agent = await other.agents.create()
            await other.todos.save(agent.id, [Todo(title="Look")])
        environ = {
            "KODE_STORE_TYPE": "sqlite",
            "KODE_SQLITE_PATH": f"{folder}/agents.db",
            "KODE_STORE_PATH": f"{folder}/store",
        }
        async with kvpersist.open(config.from_kode_env(environ=environ)) as other:  # the same stores
            assert await other.todos.get(agent.id) is not None
    settings = config.from_kode_env(environ={"KODE_STORE_TYPE": "postgres", "POSTGRES_PASSWORD": "secret"})
    assert (settings["host"], settings["port"]) == ("localhost", 5432)
    assert (settings["database"], settings["username"]) == ("kode_agents", "kode")
    with refused(BadOption):
        config.from_kode_env(environ={"KODE_STORE_TYPE": "json"})


def their_folder(base: Path, agent_id: str, messages: list[Message]) -> None:
    """Write a conversation as the JSON store keeps it."""
    began = 1_700_000_000_000  # ms since 1970
    rows: list[dict[str, Any]] = []
    for message in messages:
        blocks: list[dict[str, Any]] = [{"type": "text", "text": message.content or ""}]
        blocks += [
            {"type": "tool_use", "id": part.id, "name": part.name, "input": part.arguments}
            for part in message.tool_calls or []
        ]
        rows.append({"role": message.role, "content": blocks})
    call: dict[str, Any] = {
        "id": "toolu_1",
        "name": "look",
        "input": {},
        "state": "SEALED",
        "createdAt": began,
        "updatedAt": began,
    }
    event = {"cursor": 1, "bookmark": {"seq": 0, "timestamp": began}, "event": {"type": "done"}}
    todo = {"id": "t1", "title": "Look", "status": "pending", "createdAt": began, "updatedAt": began}
    media = {"key": "k", "provider": "p", "mimeType": "image/png", "sizeBytes": 7, "createdAt": began}
    window = {"id": "window-1", "messages": rows[:1], "events": [], "stats": {"tokenCount": 9}, "timestamp": began}
    compression = {"id": "comp-1", "windowId": "window-1", "summary": "Hello", "ratio": 0.5, "timestamp": began}
    snapshot = {"id": "sfp-0", "messages": rows[:1], "lastSfpIndex": 0, "createdAt": "2026-01-01T00:00:00Z"}
    info = {"agentId": agent_id, "templateId": "seller", "createdAt": "2026-01-01T00:00:00Z", "metadata": {"of": "ada"}}
    files = {
        "meta.json": json.dumps(info),
        "runtime/messages.json": json.dumps(rows[:-1]),
        "runtime/messages.wal": json.dumps({"data": rows, "timestamp": began}),  # newer than the file
        "runtime/tool-calls.json": json.dumps([call]),
        "runtime/todos.json": json.dumps({"todos": [todo], "version": 1, "updatedAt": began}),
        "runtime/media-cache.json": json.dumps([media]),
        "events/progress.log": json.dumps(event) + "\n",
        "history/windows/1.json": json.dumps(window),
        "history/compressions/1.json": json.dumps(compression),
        "history/recovered/notes_1.txt": f"# Recovered: notes.md\n# Timestamp: {began}\n# Mtime: {began}\n\nMilk",
        "snapshots/sfp-0.json": json.dumps(snapshot),
    }
    for name, text in files.items():
        path = base / agent_id / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, "utf-8")


@theirs("runtime/", "events/", "history/windows/", "history/compressions/", "history/recovered/", "snapshots/")
async def bring_what_is_there(db: Persistence, talk: Session) -> None:
    messages = [message for message in await db.messages.range(talk.id) if message.role in ("user", "assistant")]
    agent_id = f"agt-{talk.id}"
    with TemporaryDirectory() as folder:
        their_folder(Path(folder), agent_id, messages)
        for new in (1, 0):  # again is no harm
            async with await open_source(f"kode:{folder}") as source:
                report = await import_from(db, source)
            assert (report.sessions, report.events, report.problems) == (new, new, []), report
            assert report.verified is not None and report.verified.different == []
    assert await db.messages.count(agent_id) == len(messages)
    agent = await db.agents.get(agent_id)
    assert agent is not None and agent.metadata == {"of": "ada"}
    state = (db.windows, db.compressions, db.recovered_files, db.media, db.snapshots)
    assert [await each.count(agent_id=agent_id) for each in state] == [1, 1, 1, 1, 1]
    assert await db.todos.get(agent_id) is not None


# ---- the agent


@theirs("saveInfo", "loadInfo")
async def agents(db: Persistence, talk: Session) -> None:
    agent = await db.agents.save(
        Agent(
            id=f"agt-{talk.id}",
            template_id="seller",
            config_version="v1",
            breakpoint="READY",  # is kept in lower case
            bookmark=Bookmark(seq=0),
        )
    )
    assert (agent.breakpoint, agent.last_safe_point, agent.lineage) == ("ready", -1, [])
    assert await db.agents.get(agent.id) == agent
    moved = await db.agents.update(agent.id, lambda agent: replace(agent, breakpoint="pre_tool", last_safe_point=3))
    assert moved is not None and moved.created_at == agent.created_at
    assert await db.agents.get("nobody's") is None


@theirs("exists", "list", "delete")
async def the_list_of_agents(db: Persistence, talk: Session) -> None:
    agent = await db.agents.create(id=f"agt-{talk.id}")
    other = await db.agents.create(id=f"agt-{talk.id}/fork-1")
    assert await db.agents.exists(agent.id)
    assert [each.id for each in await db.agents.find(id_prefix=agent.id)] == [other.id, agent.id]  # newest first
    assert await db.agents.find(id_prefix=f"{agent.id}_") == []  # every character counts as itself
    assert [each.id for each in await db.agents.list(limit=2)] == [other.id, agent.id]
    await db.snapshots.create(agent_id=agent.id, id="start", messages=[])
    await db.events.publish(agent.id, "started")
    assert await db.agents.delete(agent.id)  # with everything of it
    assert await db.snapshots.count(agent_id=agent.id) == 0
    assert await db.events.read(agent.id) == []
    with refused(ParentGone):
        await db.todos.save(agent.id, [Todo(title="Too late")])


# ---- messages and calls


@theirs("saveMessages", "loadMessages")
async def messages(db: Persistence, talk: Session) -> None:
    agent = await agent_of(db, talk)
    messages = [message async for message in db.messages.iterate(agent.id)]
    next_message = Message("user", [{"type": "text", "text": "And this?"}, {"type": "image", "base64": "iVBORw0="}])
    await db.messages.append(agent.id, next_message)  # what is new
    stored = await db.messages.replace_all(agent.id, [*messages, next_message])  # or the whole list, as before
    assert stored[:-1] == messages  # what is equal was not written again
    assert stored[-1].content == next_message.content
    assert [message async for message in db.messages.iterate(agent.id)] == stored
    assert [message async for message in db.messages.iterate("nobody's")] == []


@theirs("saveToolCallRecords", "loadToolCallRecords")
async def tool_calls(db: Persistence, talk: Session) -> None:
    agent = await agent_of(db, talk)
    use = Message("assistant", None, tool_calls=[ToolCallPart("toolu_1", "delete", {"file": "old.txt"})])
    number = (await db.messages.append(agent.id, use)).number
    await db.tool_calls.require_approval(agent.id, number, 0, note="it deletes a file")
    await db.tool_calls.approve(agent.id, number, 0, by="boss")
    await db.tool_calls.start(agent.id, number, 0)
    call = await db.tool_calls.complete(agent.id, number, 0, result=0)
    assert call is not None and call.approval is not None and call.approval.decided_by == "boss"
    assert [entry.state for entry in call.audit] == ["approval_required", "approved", "executing", "completed"]
    assert call.result == 0 and call.duration is not None
    calls = await db.tool_calls.of(agent.id)
    changed = [*calls[:-1], replace(calls[-1], state="SEALED")]
    assert await db.tool_calls.replace_all(agent.id, changed) == 0  # none was removed
    assert (await db.tool_calls.of(agent.id))[-1].state == "sealed"


# ---- state


@theirs("saveTodos", "loadTodos")
async def todos(db: Persistence, talk: Session) -> None:
    agent = await db.agents.create()
    assert await db.todos.get(agent.id) is None
    todos = await db.todos.save(agent.id, [Todo(title="Look", status="in_progress"), Todo(title="Tell")])
    assert await db.todos.get(agent.id) == todos
    assert todos.version == 1
    with refused(BadRequest):  # two at once
        await db.todos.save(agent.id, [replace(todo, status="in_progress") for todo in todos.todos])


@theirs("appendEvent", "readEvents")
async def events(db: Persistence, talk: Session) -> None:
    agent = await db.agents.create()
    bookmarks = [{"seq": seq, "timestamp": 1_700_000_000_000 + seq} for seq in range(3)]
    channels = ("progress", "control", "progress")
    positions = [
        await db.events.publish(agent.id, {"type": "step", "at": seq}, channel=channel, bookmark=bookmark)
        for seq, (channel, bookmark) in enumerate(zip(channels, bookmarks, strict=True))
    ]
    entries = await db.events.read(agent.id)
    assert [entry.bookmark for entry in entries] == bookmarks  # all channels, in their order
    since = bookmarks[0]
    assert [entry.event["at"] for entry in await db.events.read(agent.id, since, channels="progress")] == [2]
    position = positions[0]
    async with db.events.subscribe(agent.id, after=position, channels="progress") as progress:
        async for entry in progress:  # what is there, and then what comes
            assert entry.event["at"] == 2
            break


@theirs("saveHistoryWindow", "loadHistoryWindows", "saveCompressionRecord", "loadCompressionRecords")
async def history(db: Persistence, talk: Session) -> None:
    agent = await agent_of(db, talk)
    messages = await db.messages.last(agent.id, 4)
    window = await db.windows.save(
        HistoryWindow(agent_id=agent.id, messages=messages, stats=WindowStats(len(messages), token_count=900))
    )
    assert await db.windows.of(agent.id) == [window]
    compression = await db.compressions.save(
        Compression(
            agent_id=agent.id,
            window_id=window.id,
            config=CompressionConfig(model="small", prompt="Be brief."),
            summary="A parcel was late.",
            ratio=0.1,
            recovered_files=["notes.md"],
        )
    )
    assert compression.config.threshold == 50_000  # tokens
    assert await db.compressions.of(agent.id) == [compression]


@theirs("saveRecoveredFile", "loadRecoveredFiles", "saveMediaCache", "loadMediaCache")
async def files_and_media(db: Persistence, talk: Session) -> None:
    agent = await db.agents.create()
    file = await db.recovered_files.save(
        RecoveredFile(agent_id=agent.id, path="src/../notes.md", content="Milk", modified_at=datetime.now(UTC))
    )
    assert await db.recovered_files.of(agent.id) == [file]
    assert await db.recovered_files.find(agent_id=agent.id, path="src/../notes.md") == [file]
    media = [
        Media(key=key, agent_id=agent.id, provider="acme", mime_type="image/png", size=7, file_id=f"file-{key}")
        for key in ("a", "b")
    ]
    stored = await db.media.replace_all(agent.id, media)
    assert await db.media.of(agent.id) == stored
    assert [each.file_id for each in stored] == ["file-a", "file-b"]


@theirs("saveSnapshot", "loadSnapshot", "listSnapshots")
async def snapshots(db: Persistence, talk: Session) -> None:
    agent = await agent_of(db, talk)
    count = await db.messages.count(agent.id)
    safe = await db.snapshots.save(
        Snapshot(agent_id=agent.id, session_id=agent.id, last_safe_point=count - 1, metadata={"step_count": 2})
    )
    assert safe.id == f"sfp-{count - 1}"
    copied = await db.snapshots.save(Snapshot(id="by hand", agent_id=agent.id, messages=[Message("user", "Hello")]))
    assert await db.snapshots.get((agent.id, "by hand")) == copied
    assert [each.id for each in await db.snapshots.find(agent_id=agent.id)] == [copied.id, safe.id]  # newest first
    await db.messages.append(agent.id, Message("user", "Later"))
    assert len(await db.snapshots.messages(safe)) == count  # a place in the session, not a copy


# ---- queries


@theirs("querySessions")
async def query_sessions(db: Persistence, talk: Session) -> None:
    agent = await agent_of(db, talk)
    now = datetime.now(UTC)
    where: dict[str, Any] = {"template_id": agent.template_id, "created": between(now - DAY, now + DAY)}
    assert [each.id for each in await db.agents.find(**where, limit=100, offset=0)] == [agent.id]
    for order in ("created_at", "-updated_at", "-message_count"):
        assert [each.id for each in await db.sessions.find(**where, order=order)] == [agent.id]


@theirs("queryMessages")
async def query_messages(db: Persistence, talk: Session) -> None:
    agent = await agent_of(db, talk)
    messages = await db.messages.range(agent.id)
    for content_type, role in (("text", "user"), ("tool_use", "assistant"), ("tool_result", "tool")):
        found = await db.messages.find(agent_id=agent.id, role=role, content_type=content_type, limit=50, offset=0)
        assert {message.role for message in found} == {role}
    created = [message.created_at for message in messages if message.created_at is not None]
    every = await db.messages.find(agent_id=agent.id, created=between(min(created), max(created)))
    assert len(every) == len(messages)
    assert await db.messages.find(agent_id=agent.id, created=at_least(max(created) + DAY)) == []


@theirs("queryToolCalls")
async def query_tool_calls(db: Persistence, talk: Session) -> None:
    agent = await agent_of(db, talk)
    calls = await db.tool_calls.of(agent.id)
    now = datetime.now(UTC)
    where: dict[str, Any] = {
        "session_id": agent.id,
        "name": calls[0].name,
        "is_error": False,
        "state": "COMPLETED",  # or completed
        "has_approval": False,
        "created": between(now - 9999 * DAY, now + DAY),
    }
    good = [call for call in calls if call.name == calls[0].name and call.is_error is False]
    found = await db.tool_calls.find(**where, limit=100, offset=0)
    assert sorted((call.number, call.position) for call in found) == [(call.number, call.position) for call in good]
    failed = await db.tool_calls.find(session_id=agent.id, is_error=True)
    assert len(failed) == len([call for call in calls if call.is_error])


@theirs("aggregateStats")
async def count_things(db: Persistence, talk: Session) -> None:
    agent = await agent_of(db, talk)
    calls = await db.tool_calls.of(agent.id)
    stats = await db.agents.stats(agent.id)
    assert stats is not None
    assert (stats.messages, stats.tool_calls, stats.snapshots) == (await db.messages.count(agent.id), len(calls), 0)
    assert stats.messages_per_session == stats.messages
    assert sum(stats.tool_calls_by_name.values()) == sum(stats.tool_calls_by_state.values()) == len(calls)
    completed = stats.tool_calls_by_state.get("completed", 0)
    assert stats.success_rate == 100 * completed / len(calls)


# ---- running it


@theirs("healthCheck", "checkConsistency", "getMetrics")
async def look_after_it(db: Persistence, talk: Session) -> None:
    agent = await agent_of(db, talk)
    health = await db.health()
    assert health.healthy and health.checked_at is not None
    assert all(store.connected and store.writable for store in health.stores.values())
    consistency = await db.check(agent_id=agent.id)
    assert consistency.consistent and consistency.issues == []
    metrics = db.metrics()
    assert metrics.commits > 0 and metrics.commit.average is not None  # seconds
    totals = await db.totals()
    assert totals.records["agent"] > 0 and totals.messages > 0 and "main" in totals.bytes


@theirs("acquireAgentLock")
async def lock_an_agent(db: Persistence, talk: Session) -> None:
    agent = await db.agents.create()
    async with db.store.lock(agent.id, ttl=30, wait=0, namespace="app") as lease:
        with refused(Locked):  # tried once
            async with db.store.lock(agent.id, wait=0, namespace="app"):
                raise AssertionError
        await lease.put(f"app:{agent.id}", "mine")  # refused once the lock is lost
    assert await db.store.get(f"app:{agent.id}") == "mine"


@theirs("batchFork", "Agent.fork")
async def fork_an_agent(db: Persistence, talk: Session) -> None:
    agent = await agent_of(db, talk)
    snapshot = await db.snapshots.create(agent_id=agent.id, id="here", session_id=agent.id)
    await db.messages.append(agent.id, Message("user", "Not for the forks"))
    for _ in range(2):  # as often as you like
        forks = await db.agents.fork(agent.id, at=snapshot.id, count=2)
        assert len({fork.id for fork in forks}) == 2
        for fork in forks:
            assert fork.lineage == [agent.id]
            stats = await db.agents.stats(fork.id)
            assert stats is not None and (stats.messages, stats.snapshots) == (snapshot.number, 1)


if __name__ == "__main__":
    main("Kode")
