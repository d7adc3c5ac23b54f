"""Layouts of other systems, built by the tests, and stores to import them into."""

from __future__ import annotations

import fcntl
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest

import kvpersist
from kvpersist.agents.persistence import Persistence
from kvpersist.testing.faults import FaultyDriver
from kvpersist_drivers.memory import MemoryDriver

sys.path.insert(0, str(Path(__file__).parent))  # for the layouts and what compares stores


@pytest.fixture(params=["memory", "sqlite", "ordered"])
async def db(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Persistence]:
    if request.param == "sqlite":
        where = {"type": "sqlite", "path": str(tmp_path / "target" / "kv.db"), "durability": "normal"}
        (tmp_path / "target").mkdir()
        async with kvpersist.open(where) as opened:
            yield opened
        return
    without = {"atomic_batch", "reverse", "deref"} if request.param == "ordered" else ()
    async with kvpersist.open(FaultyDriver(MemoryDriver(), without=without)) as opened:
        yield opened


@pytest.fixture
def service(
    service: Callable[[str], dict[str, str]], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[str], dict[str, str]]]:
    """As everywhere, for one test at a time: the layouts of others have names that cannot be chosen."""
    with (tmp_path_factory.getbasetemp().parent / "layouts.lock").open("w") as lock:

        def alone(name: str) -> dict[str, str]:
            told = service(name)
            fcntl.flock(lock, fcntl.LOCK_EX)  # until the file is closed, after the layout was removed
            return told

        yield alone


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where a layout is built; nothing but it lies there."""
    made = tmp_path / "source"
    made.mkdir()
    return made
