"""The cabinet keeps the contract, behaves like a dict, holds an agent's records, and survives a crash."""

# ruff: noqa: ASYNC240, PLW0108

from __future__ import annotations

import itertools
import os
import struct
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import settings
from hypothesis.stateful import run_state_machine_as_test
from kvpersist_cabinet import CabinetDriver, CabinetOptions

import kvpersist
from kvpersist.driver import ABSENT, Put
from kvpersist.errors import Busy, FormatMismatch, ReadOnly, StoreClosed, Unavailable
from kvpersist.testing import DriverContract, PersistenceContract, batch, driver_machine

_HEAD = len(b"kvpersist-cabinet 1\n")


def read_around(path: Path) -> dict[str, bytes]:
    """What the file says, read by other means than the driver's."""
    stored, at, found = path.read_bytes(), _HEAD, dict[str, bytes]()
    while at < len(stored):
        length, _ = struct.unpack_from(">QI", stored, at)
        for key, value, version, _ in msgspec.msgpack.decode(stored[at + 12 : at + 12 + length]):
            found[key] = value
            if not version:
                del found[key]
        at += 12 + length
    return found


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "store.cabinet"


@pytest.fixture
async def driver(path: Path) -> AsyncIterator[CabinetDriver]:
    driver = await CabinetDriver.open(CabinetOptions(path=str(path)))
    yield driver
    await driver.close()


class TestCabinet(DriverContract[CabinetDriver]):
    @pytest.fixture
    async def driver(self, path: Path) -> AsyncIterator[CabinetDriver]:
        self._path = path
        driver = await CabinetDriver.open(CabinetOptions(path=str(path)))
        yield driver
        await driver.close()

    async def peek(self, driver: CabinetDriver, key: str) -> bytes | None:
        return read_around(self._path).get(key)

    async def reopen(self, driver: CabinetDriver) -> CabinetDriver:
        return await CabinetDriver.open(CabinetOptions(path=str(self._path)))


class TestRecordsInACabinet(PersistenceContract[CabinetDriver]):
    @pytest.fixture
    async def driver(self, path: Path) -> AsyncIterator[CabinetDriver]:
        self._path = path
        driver = await CabinetDriver.open(CabinetOptions(path=str(path)))
        yield driver
        await driver.close()

    async def reopen(self, driver: CabinetDriver) -> CabinetDriver:
        return await CabinetDriver.open(CabinetOptions(path=str(self._path)))


@pytest.mark.parametrize("reopened", [False, True])
def test_it_does_what_a_dict_does(tmp_path: Path, reopened: bool) -> None:
    numbers = itertools.count()

    async def fresh() -> CabinetDriver:
        return await CabinetDriver.open(CabinetOptions(path=str(tmp_path / f"{next(numbers)}.cabinet")))

    async def again(closed: Any) -> CabinetDriver:
        return await CabinetDriver.open(CabinetOptions(path=closed._path))

    machine = driver_machine(fresh, reopener=again) if reopened else driver_machine(fresh)
    run_state_machine_as_test(machine, settings=settings(max_examples=25, stateful_step_count=30, deadline=None))


async def test_it_is_opened_by_its_scheme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    async with kvpersist.open("cabinet:///agent.cabinet") as db:
        session = await db.sessions.create(user_id="ada")
        await db.messages.append(session.id, kvpersist.Message(role="user", content="hello"))

    async with kvpersist.open(type="cabinet", path="agent.cabinet") as db:
        assert [message.content for message in await db.messages.last(session.id, 5)] == ["hello"]


async def test_a_write_cut_off_anywhere_is_as_if_it_had_not_begun(path: Path) -> None:
    driver = await CabinetDriver.open(CabinetOptions(path=str(path)))
    await driver.commit([batch(Put("c:a", b"1"), Put("c:b", b"1"))])
    whole = path.stat().st_size
    await driver.commit([batch(Put("c:a", b"2"), Put("c:c", b"2"))])
    await driver.close()
    stored = path.read_bytes()

    for cut in range(whole, len(stored)):
        path.write_bytes(stored[:cut])
        again = await CabinetDriver.open(CabinetOptions(path=str(path)))
        found = await again.get(["c:a", "c:b", "c:c"])
        assert [entry and entry.value for entry in found] == [b"1", b"1", None]
        await again.commit([batch(Put("c:d", b"3", ABSENT))])
        await again.close()
        assert read_around(path) == {"c:a": b"1", "c:b": b"1", "c:d": b"3"}


async def test_a_file_cut_off_while_it_was_made_is_made(path: Path) -> None:
    for cut in range(_HEAD):
        path.write_bytes(b"kvpersist-cabinet 1\n"[:cut])
        driver = await CabinetDriver.open(CabinetOptions(path=str(path)))
        await driver.close()
        assert path.read_bytes() == b"kvpersist-cabinet 1\n"


async def test_damage_in_the_middle_is_refused_and_nothing_is_changed(path: Path) -> None:
    driver = await CabinetDriver.open(CabinetOptions(path=str(path)))
    for number in range(3):
        await driver.commit([batch(Put(f"c:{number}", b"value"))])
    await driver.close()
    stored = bytearray(path.read_bytes())
    stored[_HEAD + 14] ^= 1
    path.write_bytes(stored)

    with pytest.raises(FormatMismatch, match=f"damage at byte {_HEAD}"):
        await CabinetDriver.open(CabinetOptions(path=str(path)))

    assert path.read_bytes() == stored


async def test_another_file_is_refused_and_not_touched(path: Path) -> None:
    path.write_bytes(b"SQLite format 3\0")

    with pytest.raises(FormatMismatch):
        await CabinetDriver.open(CabinetOptions(path=str(path)))

    assert path.read_bytes() == b"SQLite format 3\0"


async def test_it_is_open_once(driver: CabinetDriver, path: Path) -> None:
    with pytest.raises(Busy):
        await CabinetDriver.open(CabinetOptions(path=str(path)))


async def test_a_full_disk_leaves_nothing(driver: CabinetDriver, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    await driver.commit([batch(Put("c:a", b"1"))])
    before = path.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        sync, left = os.fsync, iter([full, os.fsync])
        patched.setattr(os, "fsync", lambda descriptor: next(left, sync)(descriptor))
        with pytest.raises(Unavailable, match="No space left"):
            await driver.commit([batch(Put("c:a", b"2"))])

    [entry] = await driver.get(["c:a"])
    assert entry is not None
    assert entry.value == b"1"
    assert path.read_bytes() == before


async def test_the_file_is_written_anew_when_most_of_it_is_old(driver: CabinetDriver, path: Path) -> None:
    for number in range(30):
        await driver.commit([batch(Put("c:a", bytes(100_000)), Put(f"c:{number}", b"kept"))])
    grown = path.stat().st_size

    await driver.compact()
    await driver.commit([batch(Put("c:new", b"after"))])
    await driver.close()

    again = await CabinetDriver.open(CabinetOptions(path=str(path)))
    assert len(await again.scan(None, None, limit=100)) == 32
    await again.close()
    assert path.stat().st_size < grown / 10
    assert len(read_around(path)) == 32


async def test_a_folder_that_is_missing_or_closed_is_told(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="No such file"):
        await CabinetDriver.open(CabinetOptions(path=str(tmp_path / "no" / "store.cabinet")))
    if os.geteuid():
        tmp_path.chmod(0o500)
        with pytest.raises(ReadOnly):
            await CabinetDriver.open(CabinetOptions(path=str(tmp_path / "store.cabinet")))


async def test_a_commit_after_the_close_is_refused(driver: CabinetDriver) -> None:
    await driver.close()
    with pytest.raises(StoreClosed):
        await driver.commit([batch(Put("c:a", b"1"))])
