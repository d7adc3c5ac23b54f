"""What a SQLite store keeps when its process dies, its disk fails, or the power goes, at any write-class call.

`KVPERSIST_FAULT_STRIDE=1` goes through every point everywhere; by default every fourth is enough for most.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from programs import run_program

_STRIDE = os.environ.get("KVPERSIST_FAULT_STRIDE", "4")


def _matrix(shim: Path, folder: Path, *arguments: str) -> dict[str, Any]:
    return run_program("sqlite_matrix.py", folder / "store", *arguments, LD_PRELOAD=str(shim))


@pytest.mark.parametrize("scenario", ["fresh", "again"])
@pytest.mark.parametrize("mode", ["kill", "power"])
def test_what_was_acknowledged_outlives_a_death_at_any_point(
    shim: Path, tmp_path: Path, mode: str, scenario: str
) -> None:
    stride = "1" if scenario == "fresh" else _STRIDE
    result = _matrix(shim, tmp_path, mode, scenario, stride)

    assert result["wrong"] == []
    assert result["points"] * int(stride) > 80


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
    assert result["most_failed"] == 1


def test_the_matrix_catches_an_answer_before_the_commit(shim: Path, tmp_path: Path) -> None:
    result = _matrix(shim, tmp_path, "kill", "fresh", "4", "early")

    assert sum("acknowledged and is lost" in problem for problem in result["wrong"]) > 5


def test_normal_durability_loses_the_last_writes_with_the_power_and_damages_nothing(shim: Path, tmp_path: Path) -> None:
    result = _matrix(shim, tmp_path, "power", "fresh", "4", "normal")

    lost = [problem for problem in result["wrong"] if "acknowledged and is lost" in problem]
    assert len(lost) > 5  # so a loss of power is seen, when nothing protects from it
    assert lost == result["wrong"]


_ONE_PUT = """
import asyncio, os, sys
from kvpersist.driver import ABSENT, Batch, Put
from kvpersist_drivers.sqlite import SqliteDriver, SqliteOptions
async def main(folder, durability):
    driver = await SqliteDriver.open(SqliteOptions(path=folder + "/kv.db", durability=durability))
    acks = os.open(folder + "/acks", os.O_WRONLY | os.O_CREAT)
    for number in range(4):
        if number:  # the first one creates the log
            os.environ.update(KP_PATH=folder, KP_N="0", KP_LOG=folder + ".log")
        await driver.commit([Batch((Put(f"c:{number}", b"v", ABSENT if number == 2 else None),), b"version1")])
        os.write(acks, b"x")
    os._exit(0)
asyncio.run(main(*sys.argv[1:]))
"""


@pytest.mark.parametrize("durability", ["full", "normal"])
def test_the_log_is_synced_before_the_answer_if_durability_is_full(shim: Path, tmp_path: Path, durability: str) -> None:
    (tmp_path / "store").mkdir()

    subprocess.run(
        [sys.executable, "-c", _ONE_PUT, tmp_path / "store", durability],
        env={**os.environ, "LD_PRELOAD": str(shim)},
        check=True,
        timeout=60,
    )

    calls = (tmp_path / "store.log").read_text().replace(f"{tmp_path / 'store'}/", "")
    answers = calls.split("write acks\n")
    assert answers.pop() == ""
    assert len(answers) == 3
    for before in answers:
        assert before.startswith("write kv.db-wal\n")
        assert before.endswith("write kv.db-wal\nfsync kv.db-wal\n" if durability == "full" else "write kv.db-wal\n")
        assert before.count("fsync") == (durability == "full")
