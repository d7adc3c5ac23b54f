"""Every operation of storage-prisma, and of the in-memory package beside it, done with kvpersist.

    python docs/coming-from/storage_prisma.py                                  # in memory, on the demo's conversation
    python docs/coming-from/storage_prisma.py sqlite:///talks.db --data FILE   # any store, and your own conversations

``docs/coming-from/storage-prisma.md`` is the page to it. Each step gets a conversation of its own, ``talk``.
"""

from __future__ import annotations

import json
import logging
import sqlite3
from datetime import UTC, datetime, timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from steps import main, refused, theirs

import kvpersist
from kvpersist import (
    Confirmation,
    Message,
    Persistence,
    Session,
    ToolCallPart,
    at_least,
    at_most,
    between,
    config,
    with_storage,
)
from kvpersist.errors import BadRequest, ParentGone, UniqueConflict, UnknownScheme
from kvpersist.ops.importers import import_from, open_source

DAY = timedelta(days=1)

# ---- moving


@theirs("createPrismaStorage", "disconnect")
async def open_and_close(db: Persistence, talk: Session) -> None:
    logging.getLogger("kvpersist").setLevel(logging.WARNING)  # DEBUG is what debug: true was
    where = config.from_database_url(environ={"DATABASE_URL": "file::memory:"})
    other = await kvpersist.open(where)
    assert await other.sessions.count() == 0
    await other.close()
    with refused(UnknownScheme):
        config.from_database_url(environ={"DATABASE_URL": "sqlserver://host;database=talks"})


def their_database(folder: str, talk: Session, messages: list[Message]) -> Path:
    """Write a conversation as storage-prisma keeps it in SQLite."""
    path = Path(folder, "dev.db")
    database = sqlite3.connect(path)
    database.executescript(
        """
        CREATE TABLE agent_sessions (id TEXT PRIMARY KEY, createdAt DATETIME, updatedAt DATETIME,
            active BOOLEAN, metadata JSONB);
        CREATE TABLE agent_messages (id TEXT PRIMARY KEY, sessionId TEXT, role TEXT, content TEXT,
            timestamp DATETIME, responseType TEXT, metadata JSONB);
        CREATE TABLE agent_tool_calls (id TEXT PRIMARY KEY, messageId TEXT, toolName TEXT, arguments JSONB,
            result JSONB, timestamp DATETIME);
        """
    )
    began = 1_700_000_000_000  # ms since 1970
    session_id = f"theirs-{talk.id}"
    database.execute("INSERT INTO agent_sessions VALUES (?, ?, ?, ?, NULL)", (session_id, began, began + 999, True))
    for at, message in enumerate(messages, began):
        id_ = f"theirs-{message.id}"
        kind = "execute" if message.tool_calls else None
        database.execute(
            "INSERT INTO agent_messages VALUES (?, ?, ?, ?, ?, ?, NULL)",
            (id_, session_id, message.role, message.content or "", at, kind),
        )
        for position, part in enumerate(message.tool_calls or []):
            result = json.dumps({"success": True, "content": "", "data": 0})
            database.execute(
                "INSERT INTO agent_tool_calls VALUES (?, ?, ?, ?, ?, ?)",
                (f"{id_}-{position}", id_, part.name, json.dumps(part.arguments), result, at),
            )
    database.commit()
    database.close()
    return path


@theirs("agent_sessions", "agent_messages", "agent_tool_calls")
async def bring_what_is_there(db: Persistence, talk: Session) -> None:
    messages = [message for message in await db.messages.range(talk.id) if message.role != "tool"]
    calls = sum(len(message.tool_calls or []) for message in messages)
    with TemporaryDirectory() as folder:
        path = their_database(folder, talk, messages)
        async with await open_source(f"prisma:{path}") as source:
            report = await import_from(db, source)
    assert report.verified is not None and report.verified.different == []
    assert (report.sessions, report.messages, report.problems) == (1, len(messages), [])
    executed = await db.messages.find(session_id=report.first, metadata={"response_type": "execute"})
    assert len(executed) == len([message for message in messages if message.tool_calls])
    assert await db.tool_calls.count(report.first, success=True) == calls


# ---- sessions


@theirs("createSession")
async def create_a_session(db: Persistence, talk: Session) -> None:
    session = await db.sessions.create(metadata={"user": "ada"})
    await db.messages.append(session.id, Message(role="system", content="You sell books."))
    assert session.active
    with refused(UniqueConflict):
        await db.sessions.create(id=session.id)


@theirs("getSession")
async def get_a_session(db: Persistence, talk: Session) -> None:
    assert await db.sessions.get(talk.id) == talk
    assert await db.sessions.get("nobody's") is None


@theirs("querySessions")
async def query_sessions(db: Persistence, talk: Session) -> None:
    first = talk.created_at
    assert first is not None
    second = await db.sessions.create(user_id=talk.user_id, created_at=first + DAY)
    created_after, created_before = first, first + DAY  # bounds count, too
    found = await db.sessions.find(
        user_id=talk.user_id, active=True, created=between(created_after, created_before), limit=10, offset=0
    )
    assert [session.id for session in found] == [second.id, talk.id]  # newest first
    before = await db.sessions.find(user_id=talk.user_id, created=at_most(first))
    assert [session.id for session in before] == [talk.id]
    await db.sessions.close(talk.id)
    closed = [session.id async for session in db.sessions.iterate(user_id=talk.user_id, active=False)]
    assert closed == [talk.id]
    assert [session.id for session in await db.sessions.find(active=False, scan=True, limit=1)] == [talk.id]


@theirs("updateSessionMetadata")
async def update_the_metadata(db: Persistence, talk: Session) -> None:
    await db.sessions.set_metadata(talk.id, {"topic": "tea"})
    session = await db.sessions.merge_metadata(talk.id, {"cups": 2})
    assert session is not None and session.metadata == {"topic": "tea", "cups": 2}
    assert await db.sessions.merge_metadata("nobody's", {"cups": 2}) is None


@theirs("closeSession", "deleteSession")
async def close_and_delete(db: Persistence, talk: Session) -> None:
    session = await db.sessions.close(talk.id)
    assert session is not None and not session.active
    assert await db.sessions.close("nobody's") is None
    assert await db.sessions.delete(talk.id)
    assert not await db.sessions.delete(talk.id)
    assert await db.tool_calls.of(talk.id) == []  # with all that belongs to it


# ---- messages


@theirs("saveUserMessage", "saveAssistantMessage", "saveSystemMessage")
async def save_messages(db: Persistence, talk: Session) -> None:
    metadata = {"page": 7}
    said = await db.messages.append(talk.id, Message(role="user", content="hello", metadata=metadata))
    assert said.id
    response: dict[str, Any] = {
        "type": "message",  # tool calls are kept, whatever it is
        "message": "Let me look.",
        "tool_calls": [{"id": "call_l", "name": "look", "arguments": {"page": 7}}],
    }
    await db.messages.append_many(
        talk.id,
        [
            Message("system", "It is late."),
            Message(
                "assistant",
                response["message"],
                tool_calls=[ToolCallPart(**call) for call in response["tool_calls"]],
                metadata={"response_type": response["type"]},
            ),
        ],
    )
    [call] = await db.tool_calls.find(session_id=talk.id, name="look")
    assert call.state == "pending"
    session = await db.sessions.get(talk.id)
    assert session is not None and session.updated_at is not None and talk.updated_at is not None
    assert session.updated_at > talk.updated_at
    with refused(ParentGone):
        await db.messages.append("nobody's", Message("user", "hello"))


@theirs("getHistory", "getMessage", "getMessageCount", "getToolCallsForMessage")
async def read_messages(db: Persistence, talk: Session) -> None:
    timeline = await db.timeline(talk.id)
    assert [item.message for item in timeline] == [message async for message in db.messages.iterate(talk.id)]
    assert len(timeline) == await db.messages.count(talk.id)
    assert await db.messages.get(timeline[0].message.id) == timeline[0].message
    assert await db.messages.get("nobody's") is None
    for item in timeline:
        number = item.number
        assert await db.tool_calls.of(talk.id, after=number - 1, before=number + 1) == item.tool_calls


@theirs("queryMessages")
async def query_messages(db: Persistence, talk: Session) -> None:
    metadata = {"response_type": "execute"}
    said = await db.messages.append(talk.id, Message("assistant", "Done.", metadata=metadata))
    assert said.created_at is not None
    where: dict[str, Any] = {"session_id": talk.id, "role": "assistant"}
    assert await db.messages.find(**where, metadata=metadata, created=at_least(said.created_at)) == [said]
    every = await db.messages.find(**where)
    assert await db.messages.find(**where, limit=2, offset=1, order="asc") == every[1:3]
    assert await db.messages.find(**where, limit=1, order="desc") == [said]
    assert await db.messages.find(**where, created=at_most(said.created_at - 9999 * DAY)) == []


@theirs("deleteMessage", "deleteSessionMessages")
async def delete_messages(db: Persistence, talk: Session) -> None:
    [message] = await db.messages.last(talk.id, 1)
    assert await db.messages.delete(message.id)
    assert not await db.messages.delete(message.id)
    left = await db.messages.count(talk.id)
    assert await db.messages.clear(talk.id) == left


# ---- tool calls and confirmations


@theirs("queryToolCalls")
async def query_tool_calls(db: Persistence, talk: Session) -> None:
    calls = await db.tool_calls.of(talk.id)
    newest_first = await db.tool_calls.find(session_id=talk.id)
    assert len(newest_first) == len(calls) > 0
    now = datetime.now(UTC)
    where: dict[str, Any] = {
        "session_id": talk.id,
        "name": calls[0].name,
        "created": between(now - 9999 * DAY, now + DAY),
    }
    good = [call for call in newest_first if call.name == calls[0].name and call.is_error is False]
    assert await db.tool_calls.find(**where, success=True) == good
    assert await db.tool_calls.find(**where, success=True, limit=1) == good[:1]  # the limit comes after the filter
    assert await db.tool_calls.find(session_id=talk.id, limit=2, offset=1) == newest_first[1:3]


@theirs("savePendingConfirmation", "getPendingConfirmation", "clearPendingConfirmation")
async def confirm(db: Persistence, talk: Session) -> None:
    assert await db.confirmations.get(talk.id) is None
    for file in ("old.txt", "older.txt"):  # one for each session: the second takes the place of the first
        asked = await db.confirmations.save(
            Confirmation(
                session_id=talk.id, tool_name="delete", arguments={"file": file}, user_message=f"Delete {file}?"
            )
        )
    assert await db.confirmations.get(talk.id) == asked
    assert await db.confirmations.clear(talk.id)
    assert not await db.confirmations.clear(talk.id)


class Agent:
    """Stands for yours."""

    def chat(self, message: str, options: dict[str, Any]) -> dict[str, Any]:
        """Answer, as agents of that system do."""
        assert options["session_id"]
        return {"type": "message", "message": f"{message}: after {len(options['history'])} messages"}


@theirs("chat")
async def chat(db: Persistence, talk: Session) -> None:
    session = await db.sessions.create()
    stored = with_storage(Agent(), db)
    for text in ("Hello", "Are you there?"):
        response = await stored.run(text, thread_id=session.id)
    assert response == {"type": "message", "message": "Are you there?: after 2 messages"}
    answers = await db.messages.find(session_id=session.id, metadata={"response_type": "message"})
    assert [answer.content for answer in answers] == ["Hello: after 0 messages", response["message"]]


# ---- the in-memory package


@theirs("SessionManager.createSession", "SessionManager.hasSession", "SessionManager.getOrCreateSession")
async def manage_sessions(db: Persistence, talk: Session) -> None:
    assert await db.sessions.exists(talk.id)
    with refused(UniqueConflict):
        await db.sessions.create(id=talk.id)
    default = await db.threads.get_or_create("default")
    assert await db.threads.get_or_create("default") == default
    assert not await db.sessions.exists("nobody's")
    data = await db.sessions.export(talk.id)  # out of a store in memory, before the program ends
    async with kvpersist.open("memory://") as other:
        assert (await other.sessions.import_(data, new_ids=False)).id == talk.id


@theirs("SessionManager.clearSession", "SessionManager.updateMetadata")
async def clear_a_session(db: Persistence, talk: Session) -> None:
    assert await db.sessions.clear(talk.id) > 0
    session = await db.sessions.merge_metadata(talk.id, {"cleared": True})
    assert session is not None and session.metadata["cleared"]


@theirs("MessageStore.addUserMessage", "MessageStore.addAssistantMessage", "MessageStore.addSystemMessage")
async def add_messages(db: Persistence, talk: Session) -> None:
    session = await db.threads.get_or_create(f"new-{talk.id}")  # their methods make it, too
    turn = [Message("system", "Be brief."), Message("user", "Why?"), Message("assistant", "Because.")]
    await db.messages.append_many(session.id, turn)
    assert await db.messages.count(session.id) == 3
    with refused(BadRequest):
        await db.messages.append(session.id, Message("narrator", "It was night."))


if __name__ == "__main__":
    main("storage-prisma")
