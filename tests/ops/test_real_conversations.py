"""200 real conversations of an airline's agent (tau-bench, gpt-4o), where they lie beside the checkout."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from conversations import SOURCE, everything

import kvpersist
from kvpersist.agents.persistence import Persistence
from kvpersist.ops.chat_export import export_session
from kvpersist.ops.chat_import import import_chats

pytestmark = pytest.mark.skipif(not SOURCE.exists(), reason="the conversations do not lie in ../shared/data")

BY_ROLE = {"assistant": 2454, "user": 1490, "tool": 1164, "system": 200}
REWARD = kvpersist.Index("metadata.reward", type=float)
IMPORT = """
import asyncio, os, signal, sys
import kvpersist
from kvpersist.ops.chat_import import import_chats

async def main(url, source, after):
    def progress(state):
        if state.done == after:
            os.kill(os.getpid(), signal.SIGKILL)
    async with kvpersist.open(url, session_indexes=[kvpersist.Index("metadata.reward", type=float)]) as db:
        await import_chats(db, source, user="ada", progress=progress)

asyncio.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3])))
"""


@pytest.fixture(scope="module")
def source() -> list[dict[str, Any]]:
    return json.loads(SOURCE.read_bytes())


@pytest.fixture(scope="module")
def calls_in_source(source: list[dict[str, Any]]) -> Counter[str]:
    return Counter(
        call["function"]["name"]
        for talk in source
        for message in talk["traj"]
        for call in message.get("tool_calls") or []
    )


@pytest.fixture
async def db() -> AsyncIterator[Persistence]:
    async with kvpersist.open("memory://", session_indexes=[REWARD]) as opened:
        await import_chats(opened, SOURCE, user="ada")
        yield opened


async def test_every_session_message_and_call_is_counted(db: Persistence, calls_in_source: Counter[str]) -> None:
    stats = await db.stats()

    assert (stats.sessions, stats.messages, stats.tool_calls) == (200, 5308, 1164)
    assert stats.messages_by_role == BY_ROLE
    assert stats.tool_calls_by_name == dict(calls_in_source)
    assert stats.tool_errors == 73


async def test_every_message_is_what_it_was_in_the_file(db: Persistence, source: list[dict[str, Any]]) -> None:
    expected = sorted(json.dumps([talk["traj"], talk["task_id"], talk["trial"]], sort_keys=True) for talk in source)
    stored: list[str] = []
    async for session in db.sessions.iterate():
        exported = await export_session(db, session.id, "openai")
        assert exported is not None
        talk = json.loads(exported)
        assert talk["info"] == session.metadata["info"]
        stored.append(json.dumps([talk["messages"], talk["task_id"], talk["trial"]], sort_keys=True))

    assert sorted(stored) == expected


async def test_each_call_is_joined_to_its_own_result(db: Persistence, source: list[dict[str, Any]]) -> None:
    """Call ids repeat inside sessions of this file; here each call's result follows it directly."""
    repeated = 0
    joined: Counter[str] = Counter()
    async for session in db.sessions.iterate():
        messages = {message.number: message async for message in db.messages.iterate(session.id)}
        calls = await db.tool_calls.of(session.id)
        repeated += len({call.call_id for call in calls}) < len(calls)
        for call in calls:
            answer = messages[call.number + 1]
            assert (call.result_number, call.result) == (answer.number, answer.content)
            assert (call.call_id, call.name) == (answer.tool_call_id, answer.name)
            part = (messages[call.number].tool_calls or [])[call.position]
            assert call.arguments == part.arguments
            joined[call.state] += 1

    assert joined == {"completed": 1164 - 73, "failed": 73}
    assert repeated == 49
    del source


async def test_errors_are_found_by_index(db: Persistence) -> None:
    failed = await db.tool_calls.find(is_error=True, limit=1000)

    assert len(failed) == 73
    assert all(str(call.result).startswith("Error") for call in failed)


async def test_calls_are_found_by_the_tools_name(db: Persistence, calls_in_source: Counter[str]) -> None:
    for name, count in calls_in_source.items():
        found = await db.tool_calls.find(name=name, limit=1000)
        assert (len(found), {call.name for call in found}) == (count, {name})


async def test_sessions_are_found_by_their_reward(db: Persistence) -> None:
    for reward, count in ((0.0, 116), (1.0, 84), (0.5, 0)):
        found = await db.sessions.find(**{"metadata.reward": reward}, limit=1000)
        assert len(found) == count
        assert {session.metadata["reward"] for session in found} <= {reward}


async def test_sessions_belong_to_the_named_user(db: Persistence) -> None:
    assert await db.sessions.count() == 200
    assert len(await db.sessions.find(user_id="ada", limit=1000)) == 200
    assert await db.sessions.find(user_id="bob") == []


async def test_a_second_import_adds_nothing(db: Persistence) -> None:
    before = await everything(db)

    report = await import_chats(db, SOURCE, user="ada")

    assert (report.sessions, report.messages, report.completed, report.present) == (0, 0, 0, 200)
    assert await everything(db) == before


async def test_new_makes_200_copies(db: Persistence) -> None:
    report = await import_chats(db, SOURCE, user="ada", new=True)

    stats = await db.stats()
    assert (report.sessions, report.messages) == (200, 5308)
    assert (stats.sessions, stats.messages, stats.tool_calls, stats.tool_errors) == (400, 10616, 2328, 146)


async def test_exports_imported_for_another_user_are_equal_but_for_ids_and_owner(db: Persistence) -> None:
    def stripped(value: tuple[Any, Any, Any, Any]) -> str:
        own = ("id", "session_id", "user_id")
        session, messages, calls, stat = value
        return repr(
            [
                {name: part for name, part in record.items() if name not in own}
                for record in (session, *messages, *calls, stat)
            ]
        )

    before = await everything(db)
    async with kvpersist.open("memory://") as other:
        for session_id in before:
            exported = await export_session(db, session_id)
            assert exported is not None
            await import_chats(other, io.BytesIO(exported), user="bob")
        after = await everything(other)

    assert sorted(map(stripped, after.values())) == sorted(map(stripped, before.values()))
    assert before.keys().isdisjoint(after.keys())
    assert {session["user_id"] for session, *_ in after.values()} == {"bob"}


async def test_an_import_killed_several_times_ends_in_the_store_of_one_that_was_not(
    db: Persistence, tmp_path: Path
) -> None:
    url = f"sqlite:///{tmp_path}/killed.db"

    def run(after: int) -> int:
        command = [sys.executable, "-c", IMPORT, url, str(SOURCE), str(after)]
        return subprocess.run(command, timeout=100, check=False).returncode

    assert [run(1), run(60), run(150)] == [-signal.SIGKILL] * 3
    async with kvpersist.open(url, session_indexes=[REWARD]) as killed:
        assert 0 < (await killed.stats()).sessions < 200
    assert run(0) == 0

    async with kvpersist.open(url, session_indexes=[REWARD]) as killed:
        assert await everything(killed) == await everything(db)
        assert await killed.stats() == await db.stats()
        for part in (killed._all.sessions, killed._all.messages, killed._all.tool_calls):
            assert await part.verify() == []
        assert len(await killed.sessions.find(**{"metadata.reward": 0.0}, limit=1000)) == 116
        assert len(await killed.tool_calls.find(is_error=True, limit=1000)) == 73
