"""What an export holds, and that it imports again as the same conversation."""

from __future__ import annotations

import io
import json
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
import pytest

import kvpersist
from kvpersist.agents.persistence import Persistence
from kvpersist.agents.records import Message, Session, ToolCall, ToolCallPart
from kvpersist.errors import BadOption
from kvpersist.ops.chat_export import export_session
from kvpersist.ops.chat_import import import_chats
from kvpersist.testing.faults import FaultyDriver
from kvpersist_drivers.memory import MemoryDriver

AT = datetime(2026, 3, 4, 5, 6, 7, 8, UTC)
OWN = ("id", "session_id", "user_id")  # what another owner's copy may differ in


@pytest.fixture(params=[(), ("atomic_batch", "reverse", "deref")], ids=["atomic", "ordered"])
async def db(request: pytest.FixtureRequest) -> AsyncIterator[Persistence]:
    async with kvpersist.open(FaultyDriver(MemoryDriver(), without=request.param)) as opened:
        yield opened


def without_ids(record: Session | Message | ToolCall) -> dict[str, Any]:
    return {name: value for name, value in msgspec.structs.asdict(record).items() if name not in OWN}


async def whole(db: Persistence, session_id: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    messages = [without_ids(message) async for message in db.messages.iterate(session_id)]
    calls = [without_ids(call) for call in await db.tool_calls.of(session_id)]
    return messages, calls


async def rich_session(db: Persistence) -> str:
    metadata = {
        "bytes": b"\x00\xff",
        "when": AT,
        "big": 2**80,
        "float": 0.1,
        "whole": 1.0,
        "no": False,
        "zero": 0,
        "empty": "",
        "none": None,
        "looks": {"$bytes": "tagged"},
        "deep": [{"a": [1, {}]}],
    }
    session = await db.sessions.create(
        user_id="ada", agent_id="helper", title="A % ! : title", metadata=metadata, external_id="x|1", created_at=AT
    )
    talk = [
        Message(role="system", content="Be kind."),
        Message(role="user", content=[{"type": "text", "text": "\U0001f388"}], name="Ada", metadata={"n": 1}),
        Message(
            role="assistant",
            tool_calls=[ToolCallPart("c", "look", '{"a":  1}'), ToolCallPart("c", "look", {"b": 2})],
            agent_id="helper",
            extra={"refusal": None, "seen": AT},
        ),
        Message(role="tool", content="Error: no", tool_call_id="c", is_error=True),
        Message(role="tool", content="", tool_call_id="c", is_error=False),
        Message(role="assistant", content="Done"),
    ]
    for second, message in enumerate(talk):
        message.created_at = AT + timedelta(seconds=second)
    await db.messages.append_many(session.id, talk[:2])
    async with db.tool_calls.record(session.id, "measure", {"n": [1]}) as call:
        call.result = {"seen": AT}
    with pytest.raises(ValueError, match="broken"):
        async with db.tool_calls.record(session.id, "measure"):
            raise ValueError("broken")
    await db.messages.append_many(session.id, talk[2:])
    async with db.tool_calls.record(session.id, "measure") as call:
        call.result = b"late"
    return session.id


async def test_an_export_imported_for_another_user_is_equal_but_for_ids_and_owner(db: Persistence) -> None:
    session_id = await rich_session(db)
    exported = await export_session(db, session_id)
    assert exported is not None

    report = await import_chats(db, io.BytesIO(exported), user="bob")

    assert report.first is not None
    assert report.first != session_id
    before, after = await db.sessions.get(session_id), await db.sessions.get(report.first)
    assert before is not None
    assert after is not None
    assert after.user_id == "bob"
    assert without_ids(after) == without_ids(before)
    assert await whole(db, report.first) == await whole(db, session_id)
    assert await db.sessions.stat(report.first) == await db.sessions.stat(session_id)


async def test_an_export_of_an_import_of_an_export_is_the_same_file_but_for_ids(db: Persistence) -> None:
    first = await export_session(db, await rich_session(db))
    assert first is not None
    async with kvpersist.open("memory://") as other:
        report = await import_chats(other, io.BytesIO(first))
        assert report.first is not None
        second = await export_session(other, report.first)
    assert second is not None
    again = await import_chats(db, io.BytesIO(first))
    there = await import_chats(db, io.BytesIO(second))

    assert again.sessions == 1
    assert there.present == 1  # equal content and owner: the same conversation
    assert [stripped(line) for line in first.splitlines()[1:]] == [stripped(line) for line in second.splitlines()[1:]]


def stripped(line: bytes) -> Any:
    """A line of an export without the message's id."""
    text = line.removesuffix(b",")
    if not text.startswith(b"{"):
        return text
    value = json.loads(text)
    value.pop("id", None)
    return value


async def test_an_export_twice_imported_is_one_session(db: Persistence) -> None:
    exported = await export_session(db, await rich_session(db))
    assert exported is not None

    await import_chats(db, io.BytesIO(exported), user="bob")
    again = await import_chats(db, io.BytesIO(exported), user="bob")

    assert (again.sessions, again.present) == (0, 1)


async def test_an_export_is_one_json_document_with_a_message_per_line(db: Persistence) -> None:
    exported = await export_session(db, await rich_session(db))

    assert exported is not None
    document = json.loads(exported)
    assert (document["format"], document["version"], len(document["messages"])) == ("kvpersist.session", 1, 6)
    assert document["session"]["user_id"] == "ada"
    lines = exported.splitlines()
    assert [json.loads(line.removesuffix(b",")) for line in lines[1:7]] == document["messages"]
    assert [call["number"] for call in document["recorded_calls"]] == [2, 2, 6]


async def test_a_session_without_messages_is_exported_and_imported(db: Persistence) -> None:
    session = await db.sessions.create(title="Empty")
    exported = await export_session(db, session.id)

    assert exported is not None
    report = await import_chats(db, io.BytesIO(exported), user="bob")
    assert (report.sessions, report.messages) == (1, 0)


async def test_deleted_messages_are_not_exported(db: Persistence) -> None:
    session_id = await rich_session(db)
    [last] = await db.messages.last(session_id, 1)
    await db.messages.delete(last.id)

    exported = await export_session(db, session_id)

    assert exported is not None
    assert len(json.loads(exported)["messages"]) == 5


FOREIGN: list[dict[str, Any]] = [
    {"role": "user", "content": "Hi", "name": "Ada"},
    {
        "role": "assistant",
        "content": None,
        "refusal": None,
        "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{ }"}, "index": 0},
            {"id": "2", "type": "function", "function": {"name": "g", "arguments": "not json", "strict": True}},
        ],
    },
    {"role": "tool", "tool_call_id": "1", "name": "f", "content": ""},
    {"role": "tool", "tool_call_id": "2", "content": "Error"},
    {"role": "assistant", "content": [{"type": "text", "text": "x"}], "created_at": "yesterday"},
]


@pytest.mark.parametrize("metadata", [{}, {"model": "m", "tools": [1]}, {"metadata": {"a": 1}}])
async def test_what_came_in_as_openai_goes_out_as_it_was(db: Persistence, metadata: dict[str, Any]) -> None:
    report = await import_chats(db, io.BytesIO(json.dumps({"messages": FOREIGN, **metadata}).encode()))
    assert report.first is not None

    openai = await export_session(db, report.first, "openai")
    by_line = await export_session(db, report.first, "jsonl")

    assert openai is not None
    assert by_line is not None
    assert json.loads(openai) == {"messages": FOREIGN, **metadata}
    assert [json.loads(line) for line in by_line.splitlines()] == FOREIGN


@pytest.mark.parametrize("key", ["messages", "traj", "format"])
async def test_metadata_that_looks_like_a_conversation_does_not_replace_it(db: Persistence, key: str) -> None:
    session = await db.sessions.create(metadata={key: "kvpersist.session"})
    await db.messages.append(session.id, Message(role="user", content="Hi"))

    exported = await export_session(db, session.id, "openai")

    assert exported is not None
    document = json.loads(exported)
    assert document["messages"] == [{"role": "user", "content": "Hi"}]
    assert document["metadata"] == {key: "kvpersist.session"}


async def test_a_call_recorded_before_any_message_comes_back(db: Persistence) -> None:
    session = await db.sessions.create()
    async with db.tool_calls.record(session.id, "wake") as call:
        call.result = "awake"
    exported = await export_session(db, session.id)
    assert exported is not None

    for _ in range(2):
        report = await import_chats(db, io.BytesIO(exported), user="bob")
        assert report.first is not None
        assert await whole(db, report.first) == await whole(db, session.id)


async def test_numbers_close_up_behind_deleted_messages(db: Persistence) -> None:
    session = await db.sessions.create()
    stored = await db.messages.append_many(session.id, [Message(role="user", content=f"{n}") for n in range(4)])
    async with db.tool_calls.record(session.id, "look") as call:
        call.result = 1
    await db.messages.append(session.id, Message(role="user", content="4"))
    await db.messages.delete(stored[1].id)
    exported = await export_session(db, session.id)
    assert exported is not None

    report = await import_chats(db, io.BytesIO(exported), user="bob")

    assert report.first is not None
    messages, calls = await whole(db, report.first)
    assert [(message["number"], message["content"]) for message in messages] == [(1, "0"), (2, "2"), (3, "3"), (4, "4")]
    assert [(call["number"], call["result"]) for call in calls] == [(3, 1)]


async def test_extra_of_any_kind_is_exported(db: Persistence) -> None:
    session = await db.sessions.create()
    await db.messages.append(session.id, Message(role="user", content="Hi", extra={"tool_calls": 5, "role": "other"}))

    exported = await export_session(db, session.id, "openai")

    assert exported is not None
    assert json.loads(exported)["messages"][0]["role"] == "user"


async def test_a_session_that_is_not_there_is_none(db: Persistence) -> None:
    assert await export_session(db, "nobody") is None


async def test_a_format_nobody_knows_is_refused(db: Persistence) -> None:
    with pytest.raises(BadOption, match="yaml"):
        await export_session(db, "x", "yaml")  # type: ignore[arg-type]


async def test_a_turn_appended_while_a_session_is_exported_leaves_no_call_without_its_message(
    db: Persistence, monkeypatch: pytest.MonkeyPatch
) -> None:
    await db.sessions.create(id="s")
    await db.messages.append("s", Message("user", "q"))
    real = db.tool_calls.of

    async def late(session_id: str) -> list[ToolCall]:
        monkeypatch.setattr(db.tool_calls, "of", real)
        await db.messages.append("s", Message("assistant", tool_calls=[ToolCallPart("c", "search")]))
        return await real(session_id)

    monkeypatch.setattr(db.tool_calls, "of", late)

    exported = json.loads(await export_session(db, "s") or b"")

    assert "recorded_calls" not in exported
