"""Messages and the calls of tools: kept in order, changed, deleted, found, counted."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta

import msgspec
import pytest

from kvpersist import Confirmation, Message, ToolCallPart, at_least, between
from kvpersist.agents.persistence import Persistence
from kvpersist.driver import Put
from kvpersist.errors import CorruptRecord, ParentGone
from kvpersist.testing import batch

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(300)]

NOON = datetime(2026, 3, 1, 12, tzinfo=UTC)


@pytest.mark.shows(
    "Append a message",
    "Append several messages at once",
    "Roles: user, assistant, system, tool",
    "Count messages",
)
async def test_messages_are_kept_in_order_with_their_roles(db: Persistence) -> None:
    await db.sessions.create(id="roles")
    await db.messages.append("roles", Message("system", "Be kind."))
    await db.messages.append_many(
        "roles", [Message("user", "Hi"), Message("assistant", "Hello"), Message("tool", "?", tool_call_id="gone")]
    )

    kept = await db.messages.range("roles")

    assert [(each.number, each.role) for each in kept] == [(1, "system"), (2, "user"), (3, "assistant"), (4, "tool")]
    assert [each.content for each in await db.messages.last("roles", 2)] == ["Hello", "?"]
    assert await db.messages.count("roles") == 4
    with pytest.raises(ParentGone):
        await db.messages.append("nowhere", Message("user", "?"))


@pytest.mark.shows(
    "Change a message", "Delete one message, or all behind one", "Delete all messages", "Delete messages by age"
)
async def test_messages_are_changed_and_deleted(db: Persistence) -> None:
    await db.sessions.create(id="edit")
    kept = await db.messages.append_many(
        "edit", [Message("user", str(n), created_at=NOON + timedelta(days=n)) for n in range(1, 6)]
    )

    changed = await db.messages.update(kept[1].id, lambda each: msgspec.structs.replace(each, content="two"))
    assert changed is not None
    assert (changed.number, changed.content) == (2, "two")
    assert await db.messages.delete(kept[2].id) is True
    assert await db.messages.delete(kept[2].id) is False
    assert await db.messages.truncate("edit", after=4) == 1
    assert [each.content for each in await db.messages.range("edit")] == ["1", "two", "4"]
    assert await db.messages.delete_older("edit", than=NOON + timedelta(days=2)) == 1
    assert await db.messages.clear("edit") == 2
    assert await db.messages.count("edit") == 0
    assert (await db.messages.append("edit", Message("user", "new"))).number == 6


@pytest.mark.shows("Replace the whole list of messages")
async def test_a_list_is_saved_as_a_whole_and_what_is_equal_stays(db: Persistence) -> None:
    await db.sessions.create(id="list")
    first = await db.messages.replace_all("list", [Message("user", "a"), Message("assistant", "b")])

    second = await db.messages.replace_all("list", [Message("user", "a"), Message("assistant", "c")])

    assert second[0] == first[0]
    assert [each.content for each in await db.messages.range("list")] == ["a", "c"]


@pytest.mark.shows("Content of several kinds in one message")
async def test_blocks_of_every_kind_come_back_as_they_were(db: Persistence) -> None:
    blocks = [
        {"type": "text", "text": "look"},
        {"type": "image", "base64": "aGk=", "mime_type": "image/png"},
        {"type": "image_url", "image_url": {"url": "https://example.org/a.png"}},
        {"type": "audio", "url": "https://example.org/a.ogg"},
        {"type": "video", "file_id": "v1"},
        {"type": "file", "file_id": "f1", "filename": "a.pdf", "meta": {"pages": 0}},
        {"type": "reasoning", "reasoning": "hm"},
        {"type": "tool_use", "id": "c", "name": "look", "input": {}},
        {"type": "tool_result", "tool_use_id": "c", "content": False, "is_error": False},
    ]
    await db.sessions.create(id="blocks")
    await db.messages.append("blocks", Message("user", blocks))

    [kept] = await db.messages.range("blocks")

    assert kept.content == blocks


@pytest.mark.shows(
    "Find messages by role and time, with limit, offset and order",
    "Find messages by text",
    "Find messages by metadata",
    "Find messages by the kind of their content",
    "Long lists are narrowed by time",
)
async def test_messages_are_found_by_what_they_are(db: Persistence) -> None:
    await db.sessions.create(id="find", user_id="finder")
    call = [ToolCallPart("c1", "look", {"place": "cupboard"})]
    turn = [
        Message("user", "Is there TEA?", metadata={"topic": {"name": "tea"}}),
        Message("assistant", tool_calls=call, metadata={"response_type": "execute"}),
        Message("tool", "green", tool_call_id="c1"),
        Message("assistant", [{"type": "text", "text": "Green tea."}, {"type": "image", "url": "https://a.example/i"}]),
    ]
    for n, message in enumerate(turn):
        message.created_at = NOON + timedelta(hours=n)
    await db.messages.append_many("find", turn)

    async def numbers(**where: object) -> list[int]:
        return [each.number for each in await db.messages.find("find", **where)]

    assert await numbers(role="assistant") == [2, 4]
    assert await numbers(created=between(NOON, NOON + timedelta(hours=1))) == [1, 2]
    assert await numbers(created=at_least(NOON + timedelta(hours=2)), order="desc") == [4, 3]
    assert await numbers(limit=2, offset=1) == [2, 3]
    assert await numbers(text="tea") == [1, 4]
    assert await numbers(metadata={"topic.name": "tea"}) == [1]
    assert await numbers(content_type="tool_use") == await numbers(has_tool_calls=True) == [2]
    assert await numbers(content_type="tool_result") == [3]
    assert await numbers(content_type="image") == [4]
    assert await numbers(metadata={"response_type": "execute"}) == [2]
    across = await db.messages.find(user_id="finder", role="user")
    assert [each.content for each in across] == ["Is there TEA?"]
    found = await db.messages.search("TEA", session_id="find")
    assert sorted(each.number for each in found) == [1, 4]


@pytest.mark.shows(
    "Tool calls are kept with the message that asks for them", "Find tool calls by name, outcome and time"
)
async def test_calls_are_kept_with_their_message_and_found(db: Persistence) -> None:
    await db.sessions.create(id="calls", user_id="caller")
    await db.messages.append_many(
        "calls",
        [
            Message("assistant", tool_calls=[ToolCallPart("a", "add", {"n": 1}), ToolCallPart("b", "halve", {"n": 0})]),
            Message("tool", 0, tool_call_id="a"),
            Message("tool", "no", tool_call_id="b", is_error=True),
        ],
    )

    [asking] = await db.messages.find("calls", role="assistant")
    added, halved = await db.tool_calls.of("calls")

    assert [part.name for part in asking.tool_calls or ()] == ["add", "halve"]
    assert (added.call_id, added.arguments, added.result, added.state) == ("a", {"n": 1}, 0, "completed")
    assert (halved.call_id, halved.is_error, halved.state) == ("b", True, "failed")
    calls = db.tool_calls
    assert [each.name for each in await calls.find(session_id="calls", success=True)] == ["add"]
    assert [each.call_id for each in await calls.find(is_error=True, limit=1)] == ["b"]
    assert [each.call_id for each in await calls.find(name="halve")] == ["b"]
    assert [each.name for each in await calls.find(session_id="calls", created=at_least(NOON), limit=1, offset=1)] == [
        "add"
    ]
    assert await calls.count(session_id="calls", has_approval=True) == 0
    timeline = await db.timeline("calls")
    assert [len(item.tool_calls) for item in timeline] == [2, 0, 0]


@pytest.mark.shows(
    "Tool calls that a person allows, and what a session waits for", "Find tool calls by state and approval"
)
async def test_a_call_waits_for_a_person_and_is_accounted_for(db: Persistence) -> None:
    await db.sessions.create(id="ask")
    asked = await db.messages.append("ask", Message("assistant", tool_calls=[ToolCallPart("c", "delete", {})]))
    place = ("ask", asked.number, 0)
    await db.tool_calls.require_approval(*place, note="it deletes")
    await db.confirmations.save(Confirmation(session_id="ask", tool_name="delete", arguments={}, user_message="Sure?"))

    assert [call.call_id for call in await db.tool_calls.pending_approvals("ask")] == ["c"]
    waits = await db.confirmations.get("ask")
    assert waits is not None
    assert (waits.tool_name, waits.user_message) == ("delete", "Sure?")
    await db.tool_calls.approve(*place, by="ada")
    await db.tool_calls.start(*place)
    await db.tool_calls.complete(*place, False)
    assert await db.confirmations.clear("ask") is True
    assert await db.confirmations.get("ask") is None
    [call] = await db.tool_calls.find(session_id="ask", has_approval=True, state="COMPLETED")
    assert call.approval is not None
    assert (call.result, call.approval.decision, call.approval.decided_by) == (False, "allow", "ada")
    assert [entry.state for entry in call.audit] == ["approval_required", "approved", "executing", "completed"]


@pytest.mark.shows("Counts of messages and tool calls, by name and by state")
async def test_what_there_is_is_counted_without_reading_it(db: Persistence) -> None:
    await db.sessions.create(id="count", user_id="counter")
    await db.messages.append_many(
        "count",
        [
            Message("user", "?"),
            Message("assistant", tool_calls=[ToolCallPart("a", "add"), ToolCallPart("b", "add")]),
            Message("tool", 3, tool_call_id="a"),
        ],
    )

    stats = await db.stats(user_id="counter")

    assert (stats.sessions, stats.messages, stats.tool_calls) == (1, 3, 2)
    assert stats.messages_by_role == {"user": 1, "assistant": 1, "tool": 1}
    assert stats.tool_calls_by_name == {"add": 2}
    assert stats.tool_calls_by_state == {"completed": 1, "pending": 1}
    assert (stats.messages_per_session, stats.success_rate) == (3, 50)


@pytest.mark.shows(
    "Many append to one conversation at once, and nothing is lost",
    "Several writers at once lose nothing: by versions, or by writing whole records",
)
async def test_turns_of_many_tasks_are_all_there_without_gaps(db: Persistence) -> None:
    await db.sessions.create(id="crowd")

    await asyncio.gather(
        *(db.messages.append_many("crowd", [Message("user", n), Message("assistant", n)]) for n in range(8))
    )

    kept = await db.messages.range("crowd")
    assert [each.number for each in kept] == list(range(1, 17))
    assert [each.content for each in kept[::2]] == [each.content for each in kept[1::2]]
    assert sorted(each.content for each in kept[::2]) == list(range(8))


@pytest.mark.shows("What is damaged is told, and the rest is read")
async def test_a_damaged_message_is_told_and_the_rest_is_read(db: Persistence) -> None:
    await db.sessions.create(id="damaged")
    await db.messages.append_many("damaged", [Message("user", "one"), Message("user", "two"), Message("user", "three")])
    entries = await db.store.driver.scan(None, None, limit=1_000_000, keys_only=True)
    second = sorted(entry.key for entry in entries if ":message:damaged" in entry.key)[1]
    await db.store.driver.commit([batch(Put(second, b"no record"))])
    told: list[CorruptRecord] = []

    with pytest.raises(CorruptRecord):
        await db.messages.range("damaged")
    kept = await db.messages.range("damaged", on_corrupt=told.append)

    assert [message.content for message in kept] == ["one", "three"]
    assert [error.key for error in told] == [second]
    assert [issue.kind for issue in (await db.check(session_id="damaged")).issues if issue.kind == "corrupt"] == [
        "corrupt"
    ]
