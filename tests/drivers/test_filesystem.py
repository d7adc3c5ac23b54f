"""The filesystem driver: the contract, the model, and what is its own."""

from __future__ import annotations

import asyncio
import atexit
import itertools
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

import kvpersist
from kvpersist import urls
from kvpersist.driver import ABSENT, Check, Committed, Delete, Op, Put
from kvpersist.errors import (
    BadKey,
    BadOption,
    Busy,
    CommitUnknown,
    CorruptRecord,
    ForkedStore,
    FormatMismatch,
    KeyTooLong,
    KvError,
    ReadOnly,
    Unavailable,
)
from kvpersist.testing import AWKWARD_KEYS, DriverContract, ManualClock, batch, driver_machine
from kvpersist_drivers.filesystem import FilesystemDriver, FilesystemOptions, _at, _names
from kvpersist_drivers.filesystem._journal import Journal
from kvpersist_drivers.filesystem._lock import FileLock


def _options(path: Path | str, durability: Any = "normal", busy_timeout: float = 5.0) -> FilesystemOptions:
    return FilesystemOptions(path=str(path), durability=durability, busy_timeout=busy_timeout)


class TestFilesystem(DriverContract[FilesystemDriver]):
    @pytest.fixture
    async def driver(self, tmp_path: Path) -> AsyncIterator[FilesystemDriver]:
        driver = await FilesystemDriver.open(_options(tmp_path / "kv"))
        yield driver
        await driver.close()

    async def peek(self, driver: FilesystemDriver, key: str) -> bytes | None:
        return _peek(Path(driver.root)).get(key)

    async def reopen(self, driver: FilesystemDriver) -> FilesystemDriver:
        return await FilesystemDriver.open(_options(driver.root))


class TestFilesystemFull(TestFilesystem):
    @pytest.fixture
    async def driver(self, tmp_path: Path) -> AsyncIterator[FilesystemDriver]:
        driver = await FilesystemDriver.open(FilesystemOptions(path=str(tmp_path / "new" / "kv")))
        yield driver
        await driver.close()


_folder = tempfile.TemporaryDirectory(prefix="kvpersist-files-")
atexit.register(_folder.cleanup)
_numbers = itertools.count()


async def _open_new() -> FilesystemDriver:
    return await FilesystemDriver.open(_options(f"{_folder.name}/{next(_numbers)}"))


async def _open_again(closed: FilesystemDriver) -> FilesystemDriver:
    return await FilesystemDriver.open(_options(closed.root))


TestFilesystemModel = driver_machine(_open_new, reopener=_open_again).TestCase


def _peek(root: Path) -> dict[str, bytes]:
    """Read the whole tree as its description says, without a line of the driver."""

    def text(name: str) -> str:
        return re.sub(rb"~(..)", lambda match: bytes.fromhex(match[1].decode()), name.encode()).decode()

    found: dict[str, bytes] = {}
    for path in root.rglob("*.json"):
        key = ""
        for folder in path.relative_to(root).parts[:-1]:
            key += text(folder[:-2]) + {"~d": ":", "~p": "!", "~n": ""}[folder[-2:]]
        head, _, value = path.read_bytes().partition(b"\n")
        words = head.decode().split(" ")
        assert words[0] == "kv1"
        stem = path.name.removesuffix(".json")
        key = bytes.fromhex(words[4]).decode() if len(words) == 5 else key + ("" if stem == "~" else text(stem))
        assert key not in found
        found[key] = value
    return found


@asynccontextmanager
async def _opened(path: Path | str, **options: Any) -> AsyncIterator[FilesystemDriver]:
    driver = await FilesystemDriver.open(_options(path, **options))
    try:
        yield driver
    finally:
        await driver.close()


async def _put(driver: FilesystemDriver, *keys: str, value: bytes = b"v") -> None:
    for key in keys:
        one = batch(Put(key, value))
        assert await driver.commit([one]) == [Committed(one.version)]


async def _value(driver: FilesystemDriver, key: str) -> bytes | None:
    [entry] = await driver.get([key])
    return None if entry is None else entry.value


def _tree(folder: Path) -> dict[str, bytes | None]:
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")
    }
