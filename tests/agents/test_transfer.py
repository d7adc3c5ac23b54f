"""A session as JSON and back: what is kept, whose it is then, and what is refused."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import Any

import pytest
from msgspec.structs import replace

import kvpersist
from kvpersist import Message, ToolCallPart
from kvpersist.agents.conversations import making
from kvpersist.agents.conversations.confirmations import Confirmation
from kvpersist.agents.conversations.traces import TokenUsage
from kvpersist.agents.persistence import Persistence
from kvpersist.errors import BadRequest, MalformedRecord, ParentGone, UniqueConflict
from kvpersist.ops.chat_export import export_session
from kvpersist.ops.chat_import import import_chats
from kvpersist.testing.faults import Crashed, FaultyDriver
from kvpersist_drivers.memory import MemoryDriver

Sound = Callable[[Persistence], Awaitable[None]]
NOON = datetime(2025, 3, 1, 12, 0, 0, 5, tzinfo=UTC)
ORDERED = {"atomic_batch", "reverse", "deref"}


async def talk(db: Persistence, id_: str = "s") -> None:
    await db.sessions.create(
        id=id_, user_id="old", title="T", metadata={"at": NOON, "raw": b"\x00\xff", "big": 2**70}, created_at=NOON
    )
    await db.messages.append_many(
        id_,
        [
            Message("user", [{"type": "image", "base64": b"\x01"}], user_id="old", metadata={"m": None}),
            Message("assistant", tool_calls=[ToolCallPart("a", "t", {"x": 0}), ToolCallPart("b", "t", "{}")]),
            Message("tool", "", tool_call_id="a", is_error=True, name="t"),
            Message("user", "gone"),
            Message("user", "from somebody else", user_id="guest", extra={"e": 1}),
        ],
    )
    [_, _, _, gone, _] = await db.messages.range(id_)
    await db.messages.delete(gone.id)
    await db.tool_calls.require_approval(id_, 2, 1, note="sure?", meta={"r": 1})
    await db.tool_calls.approve(id_, 2, 1, by="ann")
    async with db.tool_calls.record(id_, "aside") as call:
        call.result = 0
    await db.confirmations.save(
        Confirmation(session_id=id_, tool_name="t", arguments={"x": b"1"}, number=2, position=1)
    )
    root = await db.traces.start("run", session_id=id_, input={"q": 1})
    leaf = await db.traces.start("call", type="tool", session_id=id_, parent_id=root.id)
    await db.traces.end(leaf.id, error="broken", token_usage=TokenUsage(1, 2))


async def test_an_export_is_json_and_comes_back_as_it_was(db: Persistence, sound: Sound) -> None:
    await talk(db)
    data = json.loads(json.dumps(await db.sessions.export("s")))

    copy = await db.sessions.import_(data)

    original = await db.sessions.get("s")
    assert original is not None and copy.id != "s"
    assert copy == await db.sessions.get(copy.id) == replace(original, id=copy.id)
    ours, theirs = await db.messages.range(copy.id), await db.messages.range("s")
    assert [replace(m, id="", session_id="") for m in ours] == [replace(m, id="", session_id="") for m in theirs]
    assert [replace(c, session_id="s") for c in await db.tool_calls.of(copy.id)] == await db.tool_calls.of("s")
    assert (await db.messages.append(copy.id, Message("tool", "B", tool_call_id="b"))).number == 6
    assert (await db.tool_calls.of(copy.id))[1].state == "completed"
    asked, copied = await db.confirmations.get("s"), await db.confirmations.get(copy.id)
    assert asked is not None and copied == replace(asked, session_id=copy.id)
    was = [trace async for trace in db.traces.iterate(session_id="s")]
    is_ = [trace async for trace in db.traces.iterate(session_id=copy.id)]
    assert [(t.name, t.type, t.error, t.token_usage, t.started_at, t.ended_at, t.root, t.failed) for t in is_] == [
        (t.name, t.type, t.error, t.token_usage, t.started_at, t.ended_at, t.root, t.failed) for t in was
    ]
    names = {trace.name: trace for trace in is_}
    assert names["call"].parent_id == names["run"].id and not {t.id for t in is_} & {t.id for t in was}
    again = await db.sessions.export(copy.id)
    assert set(again) == {"format", "version", "session", "last", "messages", "calls", "confirmation", "traces"}
    await sound(db)


async def test_a_new_owner_gets_what_was_the_old_ones(db: Persistence, sound: Sound) -> None:
    await talk(db)

    copy = await db.sessions.import_(await db.sessions.export("s"), user_id="new", title="Copy", active=False)

    assert (copy.user_id, copy.title, copy.active) == ("new", "Copy", False)
    assert [m.user_id for m in await db.messages.range(copy.id)] == ["new", "new", "new", "guest"] or [
        m.user_id for m in await db.messages.range(copy.id)
    ] == ["new", None, None, "guest"]
    assert [s.id for s in await db.sessions.find(user_id="new")] == [copy.id]
    await sound(db)


async def test_loading_an_export_twice_under_its_ids_is_loading_it_once(
    db: Persistence, driver: Any, sound: Sound
) -> None:
    await talk(db)
    data = await db.sessions.export("s")
    async with kvpersist.open(MemoryDriver()) as other:
        first = await other.sessions.import_(data, new_ids=False)
        second = await other.sessions.import_(data, new_ids=False)
        assert first == second == await db.sessions.get("s")
        assert await other.sessions.count() == 1
        assert await other.messages.range("s") == await db.messages.range("s")
        assert await other.sessions.export("s") == data
        await sound(other)

    before = await driver.everything()
    assert await db.sessions.import_(data, new_ids=False) == await db.sessions.get("s")
    with pytest.raises(BadRequest, match="another user"):
        await db.sessions.import_(data, new_ids=False, user_id="new")
    await db.messages.delete(data["messages"][0]["id"])
    with pytest.raises(UniqueConflict):
        await db.sessions.import_(data, new_ids=False)
    assert len(before) > len(await driver.everything())
    await sound(db)


async def test_a_message_id_that_is_taken_stops_the_import(db: Persistence, driver: Any, sound: Sound) -> None:
    await talk(db)
    data = await db.sessions.export("s")
    before = await driver.everything()

    with pytest.raises(UniqueConflict):
        await db.sessions.import_(data | {"session": data["session"] | {"id": "other"}}, new_ids=False)

    assert await driver.everything() == before
    await sound(db)


async def test_only_the_owner_of_a_session_can_export_it_as_theirs(db: Persistence) -> None:
    await talk(db)
    assert (await db.sessions.export("s", user_id="old"))["session"]["id"] == "s"
    with pytest.raises(BadRequest, match="not one of user"):
        await db.sessions.export("s", user_id="new")
    with pytest.raises(ParentGone):
        await db.sessions.export("nobody")


async def test_the_files_of_the_command_line_are_read_too(db: Persistence, sound: Sound) -> None:
    await talk(db)
    file = await export_session(db, "s")
    assert file is not None

    copy = await db.sessions.import_(json.loads(file))

    assert [m.content for m in await db.messages.range(copy.id)] == [m.content for m in await db.messages.range("s")]
    assert [(c.number, c.name, c.state, c.result) for c in await db.tool_calls.of(copy.id)] == [
        (2, "t", "failed", ""),
        (2, "t", "pending", None),
        (4, "aside", "completed", 0),
    ]
    await sound(db)


BAD: list[tuple[str, Callable[[dict[str, Any]], Any]]] = [
    ("format", lambda d: d | {"format": "other"}),
    ("version", lambda d: d | {"version": 3}),
    ("version", lambda d: d | {"version": True}),
    ("session", lambda d: d | {"session": []}),
    ("session", lambda d: d | {"session": {"title": 5}}),
    ("session", lambda d: d | {"session": d["session"] | {"created_at": "yesterday"}}),
    ("messages", lambda d: {k: v for k, v in d.items() if k != "messages"}),
    ("messages[0]", lambda d: d | {"messages": ["text"]}),
    ("messages[1]", lambda d: d | {"messages": [d["messages"][0], d["messages"][1] | {"role": "robot"}]}),
    ("messages[0]", lambda d: d | {"messages": [d["messages"][0] | {"role": 5}]}),
    ("messages[0]", lambda d: d | {"messages": [d["messages"][0] | {"tool_call_id": "a"}]}),
    ("messages[1].number", lambda d: d | {"messages": [d["messages"][0], d["messages"][0]]}),
    ("messages[1].number", lambda d: d | {"messages": [d["messages"][0], d["messages"][1] | {"number": 0}]}),
    ("messages[0].number", lambda d: d | {"messages": [d["messages"][0] | {"number": -1}]}),
    ("messages[1].id", lambda d: d | {"messages": [m | {"id": "same"} for m in d["messages"]]}),
    ("calls[0]", lambda d: d | {"calls": [7]}),
    ("calls[0].state", lambda d: d | {"calls": [d["calls"][0] | {"state": "done"}]}),
    ("calls[1]", lambda d: d | {"calls": [d["calls"][1], d["calls"][1]]}),
    ("calls[0].result_number", lambda d: d | {"calls": [d["calls"][0] | {"result_number": 1}]}),
    ("calls[0].number", lambda d: d | {"calls": [d["calls"][0] | {"number": -4}]}),
    ("last", lambda d: d | {"last": "7"}),
    ("confirmation", lambda d: d | {"confirmation": {"tool_name": 7}}),
    ("traces[0].type", lambda d: d | {"traces": [d["traces"][0] | {"type": "dance"}]}),
    ("traces[0]", lambda d: d | {"traces": [{}]}),
    ("", lambda d: [d]),
]


@pytest.mark.parametrize(("field", "spoil"), BAD, ids=[f"{n} {field}" for n, (field, _) in enumerate(BAD)])
async def test_a_malformed_export_is_refused_whole(
    db: Persistence, driver: Any, field: str, spoil: Callable[[dict[str, Any]], Any]
) -> None:
    await talk(db)
    data = await db.sessions.export("s")
    before = await driver.everything()

    for new_ids in (True, False):
        with pytest.raises(MalformedRecord) as raised:
            await db.sessions.import_(spoil(data), new_ids=new_ids)
        assert raised.value.field == field

    assert await driver.everything() == before


async def test_a_session_of_a_container_that_is_not_here_is_refused(db: Persistence, driver: Any) -> None:
    await talk(db)
    data = await db.sessions.export("s")
    before = await driver.everything()

    with pytest.raises(BadRequest, match="fields"):
        await db.sessions.import_(data, colour="red")

    assert await driver.everything() == before


@pytest.mark.parametrize("without", [set[str](), ORDERED], ids=["memory", "ordered"])
async def test_an_import_killed_anywhere_is_whole_or_not_seen(
    without: set[str], sound: Sound, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(making, "_TOGETHER", 2)
    async with kvpersist.open("memory://") as source:
        await talk(source)
        data = await source.sessions.export("s")
    for nth in range(1, 200):
        disk = MemoryDriver()
        async with kvpersist.open(FaultyDriver(disk, without=without)) as db:
            dying = FaultyDriver(disk, without=without)
            victim = await kvpersist.open(dying)
            dying.crash(nth)
            with contextlib.suppress(Crashed):
                await victim.sessions.import_(data, new_ids=False)
            seen = await db.sessions.exists("s")
            assert not seen or await db.messages.count("s") == 4
        if not dying.crashed:
            assert seen
            return
    pytest.fail("it never ends")


async def test_what_fails_half_way_is_taken_away_again(driver: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(making, "_TOGETHER", 1)
    monkeypatch.setattr(making, "_PAGE", 2)
    async with kvpersist.open(driver) as db:
        await talk(db)
        data = await db.sessions.export("s")
        last = data["messages"][-1]["id"]
        keys = set(await driver.everything())
        messages = [m | {"id": "" if m["id"] != last else last} for m in data["messages"]]

        with pytest.raises(MalformedRecord, match="the limit is 128"):
            await db.sessions.import_(data | {"session": {"id": "x" * 400}}, new_ids=False)
        with pytest.raises(UniqueConflict):
            await db.sessions.import_(data | {"session": {"id": "new"}, "messages": messages}, new_ids=False)

        assert set(await driver.everything()) == keys
        assert not await db.sessions.exists("new")


async def test_the_command_line_imports_what_is_exported_here(db: Persistence, sound: Sound) -> None:
    await talk(db)
    data = json.dumps(await db.sessions.export("s")).encode()
    async with kvpersist.open(MemoryDriver()) as other:
        for _ in range(2):
            report = await import_chats(other, io.BytesIO(data))
        assert (report.present, await other.sessions.count()) == (1, 1)
        assert report.first is not None
        messages = await other.messages.range(report.first)
        assert [m.content for m in messages] == [m.content for m in await db.messages.range("s")]
        calls = await other.tool_calls.of(report.first)
        assert [(c.number, c.name, c.state, c.result) for c in calls] == [
            (2, "t", "failed", ""),
            (2, "t", "pending", None),
            (4, "aside", "completed", 0),
        ]
        await sound(other)
