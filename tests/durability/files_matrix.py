"""Run under the shim: a small program on a store of files dies or fails at its Nth write-class call, for every N.

    LD_PRELOAD=preload.so python files_matrix.py FOLDER MODE SCENARIO [STRIDE [BUG]]

As sqlite_matrix.py, whose steps it takes, but without a loss of power. Two bugs can be planted:
``early`` acknowledges a step before its commit; ``unwritten`` moves the files of a batch without a journal.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from sqlite_matrix import STEPS, _compared, batch, in_child

from kvpersist.driver import Batch, Committed, Put
from kvpersist.errors import KvError
from kvpersist_drivers.filesystem import FilesystemDriver, FilesystemOptions
from kvpersist_drivers.filesystem._journal import Journal


async def program(folder: str, generation: int, tell: Callable[[str], None], bug: str, close: bool) -> None:
    """Open, commit step after step with a compaction between, and close."""
    if bug == "unwritten":
        Journal.begin = lambda self, number, steps: None
    driver = await FilesystemDriver.open(FilesystemOptions(path=folder, busy_timeout=0.5))
    for step in range(STEPS):
        if bug == "early":
            tell(f"{step} done")
        try:
            [outcome] = await driver.commit([batch(generation, step)])
        except KvError as error:
            outcome = error
        tell(f"{step} {'done' if isinstance(outcome, Committed) else outcome.outcome}")
        try:
            if step == 7:
                await driver.compact()
            await driver.get([f"s:{generation}"])
        except KvError:
            pass
    if close:
        await driver.close()


async def verify(folder: str, told: list[dict[int, str]]) -> list[str]:
    """Open as a user would, and say what is wrong; ``told`` has what each generation's program told."""
    driver = await FilesystemDriver.open(FilesystemOptions(path=folder, busy_timeout=0.5))
    stored = {entry.key: entry.value for entry in await driver.scan(None, None, limit=1000)}
    entries = await driver.get(list(stored))
    [written] = await driver.commit([Batch((Put("x:later", b"1"),), b"version-")])
    await driver.close()
    wrong = [f"{path} is left" for path in os.listdir(f"{folder}/.kvpersist/new")]
    wrong += [] if [entry and entry.value for entry in entries] == list(stored.values()) else ["scan and get differ"]
    wrong += [] if isinstance(written, Committed) else [f"cannot write: {written}"]
    for generation, words in enumerate(told):
        wrong += _compared(stored, generation, words)
    return wrong


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
    """Remove the folder, or leave in it what a process that died has written; return what that one told."""
    shutil.rmtree(folder, ignore_errors=True)
    return [] if scenario == "fresh" else [run(folder, 0, close=False)]


def main(folder: str, mode: str, scenario: str, stride: str = "1", bug: str = "") -> None:
    """Go through the points."""
    folder = os.path.realpath(folder)
    log = Path(f"{folder}.log")
    log.unlink(missing_ok=True)
    before = prepared(folder, scenario)
    clean = run(folder, len(before), KP_PATH=folder, KP_N="0", KP_LOG=str(log))
    calls = len(log.read_text().splitlines())
    wrong = [f"clean: {problem}" for problem in checked(folder, [*before, clean])]
    words: dict[str, int] = {}
    points = range(1, calls + 1, int(stride))
    most = 0
    for number in points:
        before = prepared(folder, scenario)
        told = run(folder, len(before), bug=bug, KP_N=str(number), KP_PATH=folder, KP_MODE=mode)
        for word in told.values():
            words[word] = words.get(word, 0) + 1
        most = max(most, sum(word != "done" for word in told.values()))
        wrong += [f"{mode} at {number}: {problem}" for problem in checked(folder, [*before, told])]
    print(json.dumps({"points": len(points), "words": words, "most_failed": most, "wrong": wrong}))


if __name__ == "__main__":
    main(*sys.argv[1:])
