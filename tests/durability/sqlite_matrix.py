"""Run under the shim: a small program on a SQLite store dies or fails at its Nth write-class call, for every N.

    LD_PRELOAD=preload.so python sqlite_matrix.py FOLDER MODE SCENARIO [STRIDE [early|normal]]

MODE as the shim's KP_MODE, or "power": killed, and only what was synced is left. SCENARIO: "fresh", the
store is created; "again", it was left by a process that died. Every STRIDEth point runs in a forked
child, which tells of each step as it ends; another child then opens the store without faults and
compares. Prints one JSON object. Two bugs can be planted: ``early`` acknowledges a step before its
commit; ``normal`` opens the store with durability="normal", which does not outlive a loss of power.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

from kvpersist.driver import ABSENT, Batch, Committed, Delete, Op, Put
from kvpersist.errors import KvError
from kvpersist_drivers.sqlite import SqliteDriver, SqliteOptions

STEPS = 10


def batch(generation: int, step: int) -> Batch:
    """What a step commits: keys of its own, the shared one, and the end of a seed that step 0 sowed."""
    own = [Put(f"c:{generation}:{step}:{name}", b"v" * step, ABSENT) for name in "ab"]
    if step == 0:
        ops: list[Op] = [*own, *(Put(f"seed:{generation}:{other}", b"seed") for other in range(1, STEPS))]
    elif step == 1:  # one key without a condition: a single statement
        ops = [Put(f"c:{generation}:1:a", b"lone")]
    else:
        large = Put(f"c:{generation}:{step}:large", os.urandom(30_000 if step == 5 else 50))
        ops = [own[0], large, Put(f"s:{generation}", b"%d" % step), Delete(f"seed:{generation}:{step}"), own[1]]
    return Batch(tuple(ops), b"version%d" % step)


async def program(folder: str, generation: int, tell: Callable[[str], None], bug: str, close: bool) -> None:
    """Open, commit step after step with a checkpoint and a compaction between, and close."""
    durability = "normal" if bug == "normal" else "full"
    driver = await SqliteDriver.open(SqliteOptions(path=f"{folder}/kv.db", durability=durability))
    for step in range(STEPS):
        if bug == "early":
            tell(f"{step} done")
        try:
            [outcome] = await driver.commit([batch(generation, step)])
        except KvError as error:
            outcome = error
        tell(f"{step} {'done' if isinstance(outcome, Committed) else outcome.outcome}")
        try:
            if step == 3:
                await driver._writes.run(lambda: driver._writer.tend(True), settle=True)
            if step == 7:
                await driver.compact()
            await driver.get([f"s:{generation}"])
        except KvError:
            pass
    if close:
        await driver.close()


async def verify(folder: str, told: list[dict[int, str]]) -> list[str]:
    """Open as a user would, and say what is wrong; ``told`` has what each generation's program told."""
    driver = await SqliteDriver.open(SqliteOptions(path=f"{folder}/kv.db"))
    stored = {entry.key: entry.value for entry in await driver.scan(None, None, limit=1000)}
    integrity = driver._writer.connection.execute("PRAGMA integrity_check").fetchall()
    [written] = await driver.commit([Batch((Put("x:later", b"1"),), b"version-")])
    await driver.close()
    wrong = [] if integrity == [("ok",)] else [f"integrity: {integrity}"]
    wrong += [] if isinstance(written, Committed) else [f"cannot write: {written}"]
    for generation, words in enumerate(told):
        wrong += _compared(stored, generation, words)
    return wrong


def _compared(stored: dict[str, bytes], generation: int, words: dict[int, str]) -> list[str]:
    wrong: list[str] = []
    happened: dict[int, bool] = {}
    for step in range(STEPS):
        ops = batch(generation, step).ops
        own = [op.key in stored for op in ops if isinstance(op, Put) and op.key.startswith("c:")]
        happened[step] = own[0]
        seed_left = f"seed:{generation}:{step}" in stored
        if len(set(own)) > 1 or (step and seed_left != (happened[0] and (step == 1 or not own[0]))):
            wrong.append(f"step {step} is torn")
        if words.get(step) == "done" and not own[0]:
            wrong.append(f"step {step} was acknowledged and is lost")
        if words.get(step) == "none" and own[0]:
            wrong.append(f"step {step} was to have no effect and is there")
    last = max((step for step in range(2, STEPS) if happened[step]), default=None)
    if stored.get(f"s:{generation}") != (None if last is None else b"%d" % last):
        wrong.append(f"the shared key is of another step than {last}")
    return wrong


def in_child(main: Callable[[Callable[[str], None]], Coroutine[Any, Any, None]]) -> tuple[list[str], int]:
    """Run a coroutine in a forked child; return the lines it told, and its wait status."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 3
        try:
            asyncio.run(main(lambda line: (os.write(writing, line.encode() + b"\n"), None)[1]))
            code = 0
        except KvError as error:  # an open that fails must do so like this
            code = 0
            print(f"({error})", file=sys.stderr)
        finally:
            os._exit(code)
    os.close(writing)
    with os.fdopen(reading) as lines:
        told = lines.read().splitlines()
    return told, os.waitpid(pid, 0)[1]


def run(folder: str, generation: int, *, bug: str = "", close: bool = True, **faults: str) -> dict[int, str]:
    """Run the program with these variables of the shim; return the last word of each step."""

    async def child(tell: Callable[[str], None]) -> None:
        os.environ.update(faults)
        await program(folder, generation, tell, bug, close)

    told, status = in_child(child)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        raise SystemExit(f"the program failed with an error that is not ours: {faults}")
    return {int(step): word for step, word in map(str.split, told)}


def checked(folder: str, told: list[dict[int, str]]) -> list[str]:
    """`verify` in a child."""

    async def child(tell: Callable[[str], None]) -> None:
        tell(json.dumps(await verify(folder, told)))

    lines, _ = in_child(child)
    return json.loads(lines[0]) if lines else ["the store does not open again"]


def prepared(folder: str, scenario: str) -> list[dict[int, str]]:
    """Make the folders; return what was told so far, per generation."""
    shadow = f"{folder}-shadow"
    for path in (folder, shadow):
        shutil.rmtree(path, ignore_errors=True)
        Path(path).mkdir(parents=True)
    if scenario == "fresh":
        return []
    return [run(folder, 0, close=False, KP_PATH=folder, KP_SHADOW=shadow)]


def main(folder: str, mode: str, scenario: str, stride: str = "1", bug: str = "") -> None:
    """Go through the points."""
    folder = os.path.realpath(folder)
    log = Path(f"{folder}.log")
    log.unlink(missing_ok=True)
    before = prepared(folder, scenario)
    clean = run(folder, len(before), KP_PATH=folder, KP_N="0", KP_LOG=str(log))
    calls = len(log.read_text().splitlines())
    wrong = [f"clean: {problem}" for problem in checked(folder, [*before, clean])]
    left, variables = folder, {"KP_PATH": folder, "KP_MODE": mode}
    if mode == "power":
        left = variables["KP_SHADOW"] = f"{folder}-shadow"
        variables["KP_MODE"] = "kill"
    words: dict[str, int] = {}
    points = range(1, calls + 1, int(stride))
    most = 0
    for number in points:
        before = prepared(folder, scenario)
        told = run(folder, len(before), bug=bug, KP_N=str(number), **variables)
        for word in told.values():
            words[word] = words.get(word, 0) + 1
        most = max(most, sum(word != "done" for word in told.values()))
        wrong += [f"{mode} at {number}: {problem}" for problem in checked(left, [*before, told])]
    print(json.dumps({"points": len(points), "words": words, "most_failed": most, "wrong": wrong}))


if __name__ == "__main__":
    main(*sys.argv[1:])
