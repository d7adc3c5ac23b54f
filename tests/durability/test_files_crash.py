"""What a store of files keeps when its process dies, its disk fails or the power goes, at any write-class call.

`KVPERSIST_FAULT_STRIDE=1` goes through every point everywhere; by default every twelfth, and every third of a death.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from programs import run_program

_STRIDE = os.environ.get("KVPERSIST_FAULT_STRIDE", "12")


def _matrix(shim: Path, folder: Path, *arguments: str) -> dict[str, Any]:
    return run_program("files_matrix.py", folder / "store", *arguments, LD_PRELOAD=str(shim))


@pytest.mark.parametrize("scenario", ["fresh", "again"])
def test_what_was_acknowledged_outlives_a_death_at_any_point(shim: Path, tmp_path: Path, scenario: str) -> None:
    stride = "3" if scenario == "fresh" and _STRIDE != "1" else _STRIDE
    result = _matrix(shim, tmp_path, "kill", scenario, stride)

    assert result["wrong"] == []
    assert result["points"] * int(stride) > 150


@pytest.mark.parametrize("scenario", ["fresh", "again"])
@pytest.mark.parametrize("mode", ["enospc", "eio"])
def test_a_disk_that_fails_for_good_loses_nothing_and_tells_what_is_unknown(
    shim: Path, tmp_path: Path, mode: str, scenario: str
) -> None:
    result = _matrix(shim, tmp_path, mode, scenario, _STRIDE)

    assert result["wrong"] == []
    assert set(result["words"]) <= {"done", "none", "unknown"}
    assert result["most_failed"] > 5


@pytest.mark.parametrize("scenario", ["fresh", "again"])
@pytest.mark.parametrize("mode", ["enospc-once", "eio-once"])
def test_a_disk_that_fails_once_costs_one_commit_at_most(shim: Path, tmp_path: Path, mode: str, scenario: str) -> None:
    result = _matrix(shim, tmp_path, mode, scenario, _STRIDE)

    assert result["wrong"] == []
    assert result["most_failed"] <= 1


def test_the_matrix_catches_an_answer_before_the_commit(shim: Path, tmp_path: Path) -> None:
    result = _matrix(shim, tmp_path, "kill", "fresh", "8", "early")

    assert sum("acknowledged and is lost" in problem for problem in result["wrong"]) > 5


def test_the_matrix_catches_a_batch_without_a_journal(shim: Path, tmp_path: Path) -> None:
    result = _matrix(shim, tmp_path, "kill", "fresh", "5", "unwritten")

    assert sum("is torn" in problem for problem in result["wrong"]) > 2


def _power(folder: Path, *arguments: str) -> dict[str, Any]:
    if not sys.platform.startswith("linux"):
        pytest.skip("reads /proc")
    pytest.importorskip("aiofiles")
    return run_program("files_power.py", folder / "store", *arguments)


@pytest.mark.parametrize("scenario", ["fresh", "again", "streams"])
def test_what_was_acknowledged_outlives_a_loss_of_power_at_any_point(tmp_path: Path, scenario: str) -> None:
    result = _power(tmp_path, scenario, "1" if _STRIDE == "1" else "5")

    assert result["wrong"] == []
    assert result["disks"] > 100


@pytest.mark.parametrize(
    ("bug", "scenario", "found"),
    [
        ("folders", "fresh", "acknowledged and is lost"),
        ("folders", "streams", "acknowledged and is lost"),
        ("files", "streams", "is torn"),
        ("files", "fresh", "FormatMismatch"),
        ("unsettled", "streams", "the shared key is of another step"),
        ("journal", "fresh", "is torn"),
    ],
)
def test_the_loss_of_power_catches_what_is_not_synced(tmp_path: Path, bug: str, scenario: str, found: str) -> None:
    result = _power(tmp_path, scenario, "6", bug)

    assert len([problem for problem in result["wrong"] if found in problem]) > 2


_WRITES = """
import asyncio, os, sys
from kvpersist.driver import ABSENT, Batch, Put
from kvpersist_drivers.filesystem import FilesystemDriver, FilesystemOptions
async def main(folder, durability):
    driver = await FilesystemDriver.open(FilesystemOptions(path=folder, durability=durability))
    acks = os.open(folder + "/acks", os.O_WRONLY | os.O_CREAT)
    async def commit(*keys):
        await driver.commit([Batch(tuple(Put(key, b"v", ABSENT) for key in keys), b"version1")])
        os.write(acks, b"x")
    await commit("c:0", "d:0")
    await commit("c:1")
    os.environ.update(KP_PATH=folder, KP_N="0", KP_LOG=folder + ".log")
    await commit("c:2")
    await commit("c:3", "d:3")
    await commit("c:4")
    os._exit(0)
asyncio.run(main(*sys.argv[1:]))
"""

_LONE = "write .kvpersist/new/one\nfsync .kvpersist/new/one\nrename c~d/{}.json\nfsync c~d\n"
_BATCH = """write .kvpersist/new/2-0
fsync .kvpersist/new/2-0
write .kvpersist/new/2-1
fsync .kvpersist/new/2-1
fsync .kvpersist/new
write .kvpersist/journal
fsync .kvpersist/journal
rename c~d/3.json
rename d~d/3.json
fsync c~d
fsync d~d
write .kvpersist/journal
"""


@pytest.mark.parametrize("durability", ["full", "normal"])
def test_files_and_folders_are_synced_in_order_before_the_answer(shim: Path, tmp_path: Path, durability: str) -> None:
    subprocess.run(
        [sys.executable, "-c", _WRITES, tmp_path / "store", durability],
        env={**os.environ, "LD_PRELOAD": str(shim)},
        check=True,
        timeout=60,
    )

    calls = (tmp_path / "store.log").read_text().replace(f"{tmp_path / 'store'}/", "")
    calls = calls.replace("write .kvpersist/lock\n", "")  # the number that watchers look at: it need not survive
    answers = calls.split("write acks\n")
    # after a batch, the journal's end is on the disk before another write: it must not come back and undo that
    wanted = [_LONE.format(2), _BATCH, "fsync .kvpersist/journal\nwrite .kvpersist/journal\n" + _LONE.format(4), ""]
    if durability == "normal":
        wanted = ["".join(f"{line}\n" for line in part.splitlines() if "fsync" not in line) for part in wanted]
        wanted[2] = wanted[2].removeprefix("write .kvpersist/journal\n")
    assert answers == wanted
