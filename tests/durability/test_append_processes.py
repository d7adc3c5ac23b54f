"""Eight processes append turns to one session: no gap, no loss, no fork, no lock error, exact counts.

`KVPERSIST_TURNS` sets how many turns each appends, 500 unless set (50 elsewhere than on SQLite).
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from stores import SHARED, empty_store

import kvpersist

PROCESSES = 8

WRITER = """
import asyncio, sys
import kvpersist
from kvpersist import Message, ToolCallPart

async def main(url, name, turns):
    async with kvpersist.open(url, timeout=60) as db:
        for n in range(turns):
            call = f"{name}.{n}"
            await db.messages.append_many("s", [
                Message("user", call),
                Message("assistant", call, tool_calls=[ToolCallPart(call, "t")]),
                Message("tool", call, tool_call_id=call),
            ])

asyncio.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3])))
"""


@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", SHARED)
async def test_turns_of_eight_processes_are_numbered_without_gap_or_loss(
    name: str, tmp_path: Path, service: Any
) -> None:
    url = empty_store(name, tmp_path, service)
    turns_each = int(os.environ.get("KVPERSIST_TURNS") or (500 if name == "sqlite" else 50))
    async with kvpersist.open(url) as db:
        await db.sessions.create(id="s")

        began = time.monotonic()
        writers = [
            subprocess.Popen(
                [sys.executable, "-c", WRITER, url, str(n), str(turns_each)],
                env=os.environ | {"PYTHONPATH": os.pathsep.join(each for each in sys.path if each)},
                stderr=subprocess.PIPE,
                text=True,
            )
            for n in range(PROCESSES)
        ]
        errors = await asyncio.gather(*[asyncio.to_thread(writer.communicate) for writer in writers])
        took = time.monotonic() - began

        assert [writer.returncode for writer in writers] == [0] * PROCESSES, errors[0][1]
        assert not [error for _, error in errors if error]
        expected = {f"{process}.{n}" for process in range(PROCESSES) for n in range(turns_each)}
        numbers: list[int] = []
        turns: list[tuple[object, ...]] = []
        async for message in db.messages.iterate("s"):
            numbers.append(message.number)
            if message.role == "user":
                turns.append(())
            turns[-1] += (message.content,)
        assert numbers == list(range(1, 3 * PROCESSES * turns_each + 1))
        assert {turn[0] for turn in turns} == expected
        assert all(len(turn) == 3 and len(set(turn)) == 1 for turn in turns)  # no turn came between another's
        each = [[turn for turn in turns if str(turn[0]).startswith(f"{n}.")] for n in range(PROCESSES)]
        for n, own in enumerate(each):
            assert [turn[0] for turn in own] == [f"{n}.{k}" for k in range(turns_each)]
        stat = await db.sessions.stat("s")
        assert stat is not None
        assert (stat.last, stat.messages) == (len(numbers), len(numbers))
        assert stat.roles == dict.fromkeys(("user", "assistant", "tool"), PROCESSES * turns_each)
        assert stat.tools["t"].completed == PROCESSES * turns_each
        calls = [call async for call in db._all.tool_calls.iterate()]
        assert Counter(call.state for call in calls) == {"completed": PROCESSES * turns_each}
        owners = [str(turn[0]).partition(".")[0] for turn in turns]
        switches = sum(before != after for before, after in pairwise(owners))
        assert switches > PROCESSES * turns_each // 10, "one process kept the others from writing"
        print(f"{name}: {PROCESSES} x {turns_each} turns in {took:.1f} s, {switches} changes of the writer")
