"""Reading conversations from files, and what an import makes of them, whatever happens meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from conversations import everything

import kvpersist
from kvpersist.agents.persistence import Persistence
from kvpersist.agents.records import Message
from kvpersist.errors import BadOption, MalformedRecord, Unavailable
from kvpersist.ops.chat_export import export_session
from kvpersist.ops.chat_formats import Chat, ChatFormat, read_chats
from kvpersist.ops.chat_import import import_chats
from kvpersist.ops.progress import Progress
from kvpersist.testing.faults import Crashed, FaultyDriver
from kvpersist_drivers.memory import MemoryDriver

CALL = {"id": "call_1", "type": "function", "function": {"name": "look", "arguments": '{"at":  "x"}'}}
TALK: list[dict[str, Any]] = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Look at x."},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "call_1", "name": "look", "content": "Error: x is gone"},
    {"role": "assistant", "content": "It is gone."},
]
OTHER: list[dict[str, Any]] = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


@pytest.fixture(params=["atomic", "ordered"])
async def db(request: pytest.FixtureRequest) -> AsyncIterator[Persistence]:
    async with kvpersist.open(faulty(MemoryDriver(), request.param)) as opened:
        yield opened


def faulty(driver: MemoryDriver, kind: str) -> FaultyDriver:
    return FaultyDriver(driver, without={"atomic_batch", "reverse", "deref"} if kind == "ordered" else ())


def text(value: Any) -> bytes:
    return json.dumps(value).encode()


def lines(*values: Any) -> bytes:
    return b"".join(text(value) + b"\n" for value in values)


def stream(data: bytes) -> io.BytesIO:
    return io.BytesIO(data)


def read(data: bytes, format: ChatFormat = "auto") -> list[Chat | MalformedRecord]:
    with read_chats(stream(data), format) as chats:
        return list(chats)


def told(item: Chat | MalformedRecord) -> list[tuple[str, Any]]:
    assert isinstance(item, Chat), item
    return [(message.role, message.content) for message in item.messages]


async def contents(db: Persistence, session_id: str) -> list[Any]:
    return [message.content async for message in db.messages.iterate(session_id)]


async def ids(db: Persistence) -> list[str]:
    return sorted([session.id async for session in db.sessions.iterate()])


# ---- forms


FORMS = {
    "one conversation, a list of messages": text(TALK),
    "a list of lists of messages": text([TALK]),
    "an object with messages": text({"messages": TALK}),
    "a list of objects with messages": text([{"messages": TALK}]),
    "an object with traj": text({"traj": TALK}),
    "a list of objects with traj": text([{"traj": TALK}]),
    "a message per line": lines(*TALK),
    "a conversation per line": lines({"messages": TALK}, {"messages": TALK}),
    "a list of messages per line": lines(TALK, TALK),
    "indented": json.dumps({"messages": TALK}, indent=2).encode(),
    "with a byte order mark": b"\xef\xbb\xbf" + text(TALK),
    "with blank lines around it": b"\n\n" + text(TALK) + b"\n\n",
    "messages per line, blank lines between": b"\n\n".join(text(message) for message in TALK),
    "lines that end as on Windows": lines(*TALK).replace(b"\n", b"\r\n"),
}


@pytest.mark.parametrize("data", FORMS.values(), ids=FORMS.keys())
def test_every_form_is_recognised_and_gives_the_same_conversation(data: bytes) -> None:
    first = read(data)[0]

    assert told(first) == [(message["role"], message["content"]) for message in TALK]


@pytest.mark.parametrize("data", FORMS.values(), ids=FORMS.keys())
def test_the_digest_does_not_depend_on_the_form(data: bytes) -> None:
    [plain] = read(text(TALK))
    first = read(data)[0]

    assert isinstance(plain, Chat)
    assert isinstance(first, Chat)
    assert first.digest == plain.digest


def test_the_digest_does_not_depend_on_the_order_of_keys_and_depends_on_everything_else() -> None:
    chats = read(
        lines(
            {"messages": OTHER, "a": 1, "b": 2},
            {"b": 2, "a": 1, "messages": [dict(reversed(message.items())) for message in OTHER]},
            {"messages": OTHER, "a": 1, "b": 3},
            {"messages": OTHER[:1], "a": 1, "b": 2},
        )
    )
    digests = [chat.digest for chat in chats if isinstance(chat, Chat)]

    assert digests[0] == digests[1]
    assert len(set(digests)) == 3


@pytest.mark.parametrize(
    ("format", "data"),
    [
        ("tau", text([{"traj": OTHER}])),
        ("openai", text({"messages": OTHER})),
        ("messages", text(OTHER)),
        ("jsonl", lines({"messages": OTHER})),
    ],
)
def test_a_named_format_takes_its_own_and_refuses_the_others(format: ChatFormat, data: bytes) -> None:
    assert [told(item) for item in read(data, format)] == [[("user", "Hi"), ("assistant", "Hello")]]
    for other in ("tau", "openai", "messages", "kvpersist"):
        if other != format and format != "jsonl":
            [refused] = read(data, other)
            assert isinstance(refused, MalformedRecord), other


def test_a_format_nobody_knows_is_refused() -> None:
    with pytest.raises(BadOption, match="csv"):
        read(b"[]", "csv")  # type: ignore[arg-type]


@pytest.mark.parametrize("data", [b"[]", b"[ ]\n"])
def test_a_file_without_conversations_has_none(data: bytes) -> None:
    assert read(data) == []


def test_an_empty_file_of_lines_has_no_conversations(tmp_path: Path) -> None:
    (tmp_path / "none.jsonl").write_bytes(b"\n")
    with read_chats(tmp_path / "none.jsonl") as chats:
        assert list(chats) == []


def test_the_suffix_decides_where_one_line_could_be_either(tmp_path: Path) -> None:
    (tmp_path / "one.jsonl").write_bytes(text(OTHER[0]))
    (tmp_path / "one.json").write_bytes(text(OTHER[0]))
    for name in ("one.jsonl", "one.json"):
        with read_chats(tmp_path / name) as chats:
            assert [told(chat) for chat in chats] == [[("user", "Hi")]]


def test_reading_by_lines_does_not_read_the_whole_file_first(tmp_path: Path) -> None:
    class Counting(io.BytesIO):
        taken = 0

        def __next__(self) -> bytes:
            self.taken += 1
            return super().__next__()

    source = Counting(lines(*({"messages": OTHER} for _ in range(1000))))
    with read_chats(source, "jsonl") as chats:
        next(iter(chats))

    assert source.taken < 5


def test_a_reader_left_early_closes_its_file_and_leaves_a_stream_open(tmp_path: Path) -> None:
    (tmp_path / "many.jsonl").write_bytes(lines({"messages": OTHER}, {"messages": TALK}))
    source = stream(lines({"messages": OTHER}, {"messages": TALK}))
    for where in (tmp_path / "many.jsonl", source):
        with read_chats(where) as chats:
            next(iter(chats))

    assert not source.closed  # an open file would be a ResourceWarning, which is an error here


@pytest.mark.parametrize(
    ("data", "record", "field", "reason"),
    [
        (b"", 1, "", "empty"),
        (b"[1, 2", 1, "", "not JSON"),
        (b'[{"messages": []}, {"mess', 1, "", "not JSON"),
        (b"\xff\xfe[]", 1, "", "not JSON"),
        (b'{"messages": [{"role": "user", "content": "\xff"}]}', 1, "", "not UTF-8"),
        (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', 1, "", "not JSON"),
        (b'{"messages": [], "x": NaN}', 1, "", "not JSON"),
        (b'{"messages": ' + b"[" * 5000 + b"]" * 5000 + b"}", 1, "", "nested"),
        (b'"text"', 1, "", "no conversation"),
        (b"{}", 1, "", "no conversation"),
        (text([{"messages": []}, 7]), 2, "", "no conversation"),
        (text({"messages": {}}), 1, "messages", "a list"),
        (text({"traj": "x"}), 1, "traj", "a list"),
        (text({"messages": [1]}), 1, "messages[0]", "a message"),
        (text({"messages": [{}]}), 1, "messages[0].role", "missing"),
        (text({"messages": [{"role": "robot"}]}), 1, "messages[0].role", "robot"),
        (text({"messages": [{"role": ["user"]}]}), 1, "messages[0].role", "a list"),
        (text({"messages": [OTHER[0], {"role": "user", "content": 5}]}), 1, "messages[1].content", "a number"),
        (text({"messages": [{"role": "user", "content": ["x"]}]}), 1, "messages[0].content", "a list"),
        (text({"messages": [{"role": "user", "name": 1}]}), 1, "messages[0].name", "a text"),
        (text({"messages": [{"role": "tool", "tool_call_id": 1}]}), 1, "messages[0].tool_call_id", "a text"),
        (text({"messages": [{"role": "user", "tool_call_id": "1"}]}), 1, "messages[0].tool_call_id", "role user"),
        (text({"messages": [{"role": "user", "tool_calls": [CALL]}]}), 1, "messages[0].tool_calls", "role user"),
        (text({"messages": [{"role": "assistant", "tool_calls": {}}]}), 1, "messages[0].tool_calls", "a list"),
        (text({"messages": [{"role": "assistant", "tool_calls": [{}]}]}), 1, "messages[0].tool_calls[0].function", ""),
        (
            text({"messages": [{"role": "assistant", "tool_calls": [{"function": {"arguments": "{}"}}]}]}),
            1,
            "messages[0].tool_calls[0].function.name",
            "a text",
        ),
        (lines({"messages": OTHER}, {"messages": 1}), 2, "messages", "a list"),
        (lines({"messages": OTHER}, OTHER[0]), 2, "", "no conversation"),
        (lines(OTHER[0]) + b"nonsense\n", 2, "", "not JSON"),
        (lines(OTHER[0], {"messages": OTHER}), 2, "role", "missing"),
    ],
)
def test_what_is_no_conversation_is_told_with_its_place(data: bytes, record: int, field: str, reason: str) -> None:
    errors = [item for item in read(data) if isinstance(item, MalformedRecord)]

    [error] = errors
    assert (error.record, error.field) == (record, field)
    assert reason in error.reason
    assert error.source == "stdin"


def test_a_malformed_record_does_not_hide_the_ones_behind_it() -> None:
    first, second, third = read(b'{"messages": []}\n{"messages": \n' + lines({"messages": OTHER}))

    assert isinstance(first, Chat)
    assert isinstance(second, MalformedRecord)
    assert isinstance(third, Chat)
    assert [first.record, second.record, third.record] == [1, 2, 3]


@pytest.mark.parametrize(
    ("content", "said", "is_error"),
    [
        ("Error: no such flight", None, True),
        ("Error", None, True),
        ("Errors were none", None, True),  # the rule is the beginning of the text, nothing else
        ("error: lower case", None, False),
        (" Error behind a space", None, False),
        ("", None, False),
        (None, None, False),
        ([{"type": "text", "text": "Error: in a block"}], None, True),
        ([{"type": "image_url"}, {"type": "text", "text": "fine"}], None, False),
        ("Error: but it says it is none", False, False),
        ("fine, but it says it is one", True, True),
    ],
)
def test_a_result_is_an_error_by_its_first_word_unless_it_says_otherwise(
    content: Any, said: bool | None, is_error: bool
) -> None:
    result = {"role": "tool", "tool_call_id": "1", "content": content} | ({} if said is None else {"is_error": said})
    [chat] = read(text([{"role": "user", "content": "Error"}, result]))

    assert isinstance(chat, Chat)
    assert [message.is_error for message in chat.messages] == [None, is_error]


# ---- import


async def test_everything_of_a_conversation_is_kept(db: Persistence) -> None:
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "Hm"}, {"type": "image_url", "image_url": {"url": "u"}}]},
        {
            "role": "assistant",
            "content": None,
            "refusal": None,
            "logprobs": {"tokens": [1, 2.5, 10**30]},
            "tool_calls": [{**CALL, "index": 0}, {**CALL, "function": {**CALL["function"], "strict": True}}],  # type: ignore[dict-item]
        },
        {"role": "tool", "tool_call_id": "call_1", "content": "", "latency": 0.0},
        {"role": "developer", "content": "\x00 \U0001f388 %:!", "name": "ops"},
    ]
    metadata = {"task_id": 3, "reward": 0.0, "empty": "", "none": None, "no": False, "deep": {"$bytes": "x"}}
    report = await import_chats(db, stream(text({"messages": messages, **metadata})), user="ada")

    assert report.first is not None
    session = await db.sessions.get(report.first)
    assert session is not None
    assert (session.user_id, session.metadata) == ("ada", metadata)
    stored = [message async for message in db.messages.iterate(session.id)]
    assert [message.content for message in stored] == [message["content"] for message in messages]
    assert stored[1].tool_calls is not None
    assert [part.arguments for part in stored[1].tool_calls] == ['{"at":  "x"}'] * 2
    assert stored[1].extra == {
        "refusal": None,
        "logprobs": {"tokens": [1, 2.5, 10**30]},
        "tool_calls": [{"index": 0}, {"function": {"strict": True}}],
    }
    assert stored[2].extra == {"latency": 0.0}
    assert stored[3].name == "ops"


async def test_a_call_is_joined_to_its_result_and_its_error_is_found(db: Persistence) -> None:
    report = await import_chats(db, stream(text(TALK)))

    assert report.first is not None
    [call] = await db.tool_calls.of(report.first)
    assert (call.name, call.state, call.is_error, call.result) == ("look", "failed", True, "Error: x is gone")


async def test_a_second_import_adds_nothing(db: Persistence) -> None:
    first = await import_chats(db, stream(text(TALK)), user="ada")
    again = await import_chats(db, stream(text(TALK)), user="ada")

    assert (first.sessions, first.messages, first.present) == (1, 5, 0)
    assert (again.sessions, again.messages, again.completed, again.present) == (0, 0, 0, 1)
    assert again.first == first.first


@pytest.mark.parametrize("data", FORMS.values(), ids=FORMS.keys())
async def test_a_conversation_in_another_form_is_not_imported_again(db: Persistence, data: bytes) -> None:
    first = await import_chats(db, stream(text(TALK)))
    again = await import_chats(db, stream(data))

    assert again.first == first.first
    assert again.present == 1


async def test_equal_conversations_of_one_file_are_several_sessions_and_stay_as_many(db: Persistence) -> None:
    data = text([{"messages": TALK}] * 3 + [{"messages": OTHER}])

    first = await import_chats(db, stream(data))
    again = await import_chats(db, stream(data))

    assert (first.sessions, again.sessions, again.present) == (4, 0, 4)
    assert len(await ids(db)) == 4


async def test_another_user_gets_sessions_of_their_own(db: Persistence) -> None:
    for user in ("ada", "bob", None, ""):
        report = await import_chats(db, stream(text(TALK)), user=user)
        assert report.sessions == 1

    assert len(await ids(db)) == 4
    assert [session.user_id async for session in db.sessions.iterate(user_id="bob")] == ["bob"]


async def test_new_makes_copies_each_time(db: Persistence) -> None:
    for _ in range(2):
        await import_chats(db, stream(text(TALK)))
    for _ in range(2):
        report = await import_chats(db, stream(text(TALK)), new=True)
        assert report.sessions == 1

    assert len(await ids(db)) == 3
    for session_id in await ids(db):
        assert await contents(db, session_id) == [message["content"] for message in TALK]


async def test_ids_are_the_same_in_every_store() -> None:
    found: list[list[str]] = []
    for _ in range(2):
        async with kvpersist.open("memory://") as db:
            await import_chats(db, stream(text([{"messages": TALK}] * 2)), user="ada")
            found.append(await ids(db))
            found[-1] += [message.id async for message in db.messages.iterate(found[-1][0])]

    assert found[0] == found[1]
    assert len(set(found[0])) == 7


async def test_stop_raises_and_leaves_whole_conversations_only(db: Persistence) -> None:
    bad = {"messages": [*TALK, {"role": "robot"}]}
    data = lines(
        *({"messages": TALK, "n": n} for n in range(20)), bad, *({"messages": OTHER, "n": n} for n in range(99))
    )

    with pytest.raises(MalformedRecord) as caught:
        await import_chats(db, stream(data))

    assert (caught.value.record, caught.value.field) == (21, "messages[5].role")
    assert len(await ids(db)) == 20
    for session_id in await ids(db):
        assert len(await contents(db, session_id)) == 5


async def test_skip_leaves_out_what_is_malformed_and_says_so(db: Persistence) -> None:
    data = lines({"messages": TALK}, {"messages": 1}) + b"oops\n" + lines({"messages": OTHER})

    report = await import_chats(db, stream(data), on_error="skip")

    assert (report.sessions, report.messages) == (2, 7)
    assert [(skipped.record, skipped.field) for skipped in report.skipped] == [(2, "messages"), (3, "")]


async def test_what_the_store_cannot_keep_is_malformed_and_leaves_nothing() -> None:
    index = kvpersist.Index("metadata.reward", type=float)
    async with kvpersist.open("memory://", session_indexes=[index]) as db:
        data = lines(*({"messages": OTHER, "reward": reward} for reward in (1.0, "high", 0.5)))

        report = await import_chats(db, stream(data), on_error="skip")
        with pytest.raises(MalformedRecord, match="record 2"):
            await import_chats(db, stream(data))

        assert report.sessions == 2
        assert [skipped.record for skipped in report.skipped] == [2]
        assert len(await ids(db)) == 2
        assert (await db.stats()).sessions == 2


def long_talk(count: int) -> list[dict[str, Any]]:
    return [{"role": "user", "content": f"{n}"} for n in range(count)]


async def damage(db: Persistence) -> list[Any]:
    """Index entries that do not fit their records; without atomic batches one may be left over, never missing."""
    found = [one for part in (db._all.sessions, db._all.messages, db._all.tool_calls) for one in await part.verify()]
    return [one for one in found if db.store.capabilities.atomic_batch != "none" or one.kind != "stale"]


@pytest.mark.parametrize("kind", ["atomic", "ordered"])
async def test_an_import_that_died_at_any_step_ends_in_the_same_store(kind: str) -> None:
    data = text([{"messages": TALK}, {"messages": OTHER}, {"messages": TALK}])
    async with kvpersist.open("memory://") as whole:
        await import_chats(whole, stream(data), user="ada")
        expected = await everything(whole)
    for step in range(1, 1000):
        memory = MemoryDriver()
        dying = faulty(memory, kind)
        dying.crash(step)
        with contextlib.suppress(Crashed):
            async with kvpersist.open(dying, sweep=None) as db:
                await import_chats(db, stream(data), user="ada", in_flight=2)
        async with kvpersist.open(faulty(memory, kind), sweep=None) as db:
            await import_chats(db, stream(data), user="ada")
            assert await everything(db) == expected, step
            assert await damage(db) == [], step
        if not dying.crashed:
            break

    assert step > (10 if kind == "atomic" else 50)  # else nothing was tried


@pytest.mark.parametrize("count", [0, 1, 249, 250, 251, 1000])
async def test_a_conversation_of_any_length_arrives_in_order(db: Persistence, count: int) -> None:
    report = await import_chats(db, stream(text({"messages": long_talk(count)})))

    assert report.first is not None
    assert await contents(db, report.first) == [f"{n}" for n in range(count)]
    assert (report.sessions, report.messages) == (1, count)


async def test_messages_larger_than_a_batch_arrive_too(db: Persistence) -> None:
    talk = [{"role": "user", "content": str(n) * 700_000} for n in range(4)]
    report = await import_chats(db, stream(text(talk)))

    assert report.first is not None
    assert [content[0] for content in await contents(db, report.first)] == ["0", "1", "2", "3"]


class Failing(Exception):
    pass


@pytest.mark.parametrize("after", [0, 1, 2, 4])
async def test_an_import_that_broke_off_goes_on_where_it_stopped(
    db: Persistence, after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = text([{"messages": long_talk(500), "n": n} for n in range(3)])
    append_many = db.messages.append_many
    done = 0

    async def breaking(session_id: str, messages: Any) -> Any:
        nonlocal done
        if done >= after:
            raise Unavailable("gone")
        done += 1
        return await append_many(session_id, messages)

    with monkeypatch.context() as patch:
        patch.setattr(db.messages, "append_many", breaking)
        with pytest.raises(Unavailable):
            await import_chats(db, stream(data))
    report = await import_chats(db, stream(data))

    assert report.sessions + report.completed + report.present == 3
    assert report.messages == 1500 - 250 * done
    for session_id in await ids(db):
        assert await contents(db, session_id) == [f"{n}" for n in range(500)]


async def test_two_imports_of_one_file_at_once_make_one_of_each(db: Persistence) -> None:
    data = text([{"messages": long_talk(300), "n": n} for n in range(5)])

    reports = await asyncio.gather(*(import_chats(db, stream(data)) for _ in range(3)))

    assert sum(report.sessions for report in reports) == 5
    assert sum(report.messages for report in reports) == 1500
    for session_id in await ids(db):
        assert await contents(db, session_id) == [f"{n}" for n in range(300)]


async def test_a_message_deleted_after_the_import_does_not_come_back(db: Persistence) -> None:
    report = await import_chats(db, stream(text(TALK)))
    assert report.first is not None
    last = await db.messages.last(report.first, 1)
    await db.messages.delete(last[0].id)

    again = await import_chats(db, stream(text(TALK)))

    assert (again.messages, again.present) == (0, 1)
    assert len(await contents(db, report.first)) == 4


async def test_a_session_deleted_after_the_import_is_imported_again(db: Persistence) -> None:
    report = await import_chats(db, stream(text(TALK)))
    assert report.first is not None
    await db.sessions.delete(report.first)

    again = await import_chats(db, stream(text(TALK)))

    assert (again.sessions, again.messages) == (1, 5)
    assert len(await contents(db, report.first)) == 5


async def test_progress_counts_every_record_up_to_the_total(db: Persistence) -> None:
    seen: list[Progress] = []
    data = text([{"messages": OTHER, "n": n} for n in range(5)] + [{"messages": 1}])

    await import_chats(db, stream(data), on_error="skip", progress=seen.append)

    assert [(progress.done, progress.total) for progress in seen] == [(n, 6) for n in range(1, 7)]
    assert {progress.unit for progress in seen} == {"conversations"}


async def test_a_progress_callback_that_raises_ends_the_import_with_its_own_error(db: Persistence) -> None:
    def stop(progress: Progress) -> None:
        if progress.done == 3:
            raise Failing

    data = text([{"messages": OTHER, "n": n} for n in range(50)])
    with pytest.raises(Failing):
        await import_chats(db, stream(data), progress=stop)

    assert (await import_chats(db, stream(data))).sessions < 50
    assert len(await ids(db)) == 50


async def test_no_more_conversations_are_under_way_than_allowed(
    db: Persistence, monkeypatch: pytest.MonkeyPatch
) -> None:
    append_many, under_way, most = db.messages.append_many, 0, 0

    async def counting(session_id: str, messages: Any) -> Any:
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        try:
            await asyncio.sleep(0)
            return await append_many(session_id, messages)
        finally:
            under_way -= 1

    monkeypatch.setattr(db.messages, "append_many", counting)
    await import_chats(db, stream(text([{"messages": OTHER, "n": n} for n in range(40)])), in_flight=3)

    assert 1 < most <= 3


@pytest.mark.parametrize("wrong", [{"on_error": "ignore"}, {"in_flight": 0}, {"format": "xml"}])
async def test_wrong_arguments_are_refused(db: Persistence, wrong: dict[str, Any]) -> None:
    with pytest.raises(BadOption):
        await import_chats(db, stream(b"[]"), **wrong)


async def test_a_file_that_is_not_there_is_told_as_such(db: Persistence, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        await import_chats(db, tmp_path / "none.json")


async def test_times_of_our_own_export_are_kept(db: Persistence) -> None:
    at = datetime(2026, 1, 2, 3, 4, 5, 678900, UTC)
    data = {
        "format": "kvpersist.session",
        "version": 1,
        "session": {"user_id": "ada", "created_at": at.isoformat(), "title": "Old"},
        "messages": [{"role": "user", "content": "Hi", "created_at": at.isoformat()}],
    }

    report = await import_chats(db, stream(text(data)))

    assert report.first is not None
    session = await db.sessions.get(report.first)
    assert session is not None
    assert (session.user_id, session.title, session.created_at) == ("ada", "Old", at)
    [message] = [message async for message in db.messages.iterate(report.first)]
    assert isinstance(message, Message)
    assert message.created_at == at


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"version": 3}, "version"),
        ({"session": None}, "session"),
        ({"session": {"metadata": []}}, "session"),
        ({"messages": None}, "messages"),
        ({"messages": [7]}, "messages[0]"),
        ({"messages": [{"role": "robot"}]}, "messages[0].role"),
        ({"messages": [{"content": "x"}]}, "messages[0]"),
    ],
)
def test_a_damaged_export_is_told_with_its_place(change: dict[str, Any], field: str) -> None:
    data = {"format": "kvpersist.session", "version": 1, "session": {}, "messages": [], **change}

    [error] = read(text(data))

    assert isinstance(error, MalformedRecord)
    assert error.field == field


async def test_a_recorded_call_goes_in_once_where_two_import_at_once(
    db: Persistence, monkeypatch: pytest.MonkeyPatch
) -> None:
    if db.store.capabilities.atomic_batch == "none":
        pytest.skip("there a call's place is not decided by a batch")
    async with kvpersist.open("memory://") as source:
        await source.sessions.create(id="s")
        await source.messages.append("s", Message("user", "q"))
        async with source.tool_calls.record("s", "search") as call:
            call.result = 1
        file = await export_session(source, "s") or b""
    real = db.tool_calls.of

    async def late(*place: Any, **between: Any) -> Any:
        monkeypatch.setattr(db.tool_calls, "of", real)
        there = await real(*place, **between)
        async with kvpersist.open(db.store) as other:
            await import_chats(other, io.BytesIO(file))
        return there

    monkeypatch.setattr(db.tool_calls, "of", late)

    await import_chats(db, io.BytesIO(file))

    [session] = await db.sessions.list()
    assert len(await db.tool_calls.of(session.id)) == 1
