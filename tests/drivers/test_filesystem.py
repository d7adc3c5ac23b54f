"""The filesystem driver: the contract, the model, and what is its own."""

from __future__ import annotations

import asyncio
import atexit
import errno
import itertools
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import kvpersist
from kvpersist import urls
from kvpersist.driver import ABSENT, Check, Committed, Delete, Entry, Op, Put
from kvpersist.errors import (
    BadKey,
    BadOption,
    Busy,
    CommitUnknown,
    Conflict,
    CorruptRecord,
    ForkedStore,
    FormatMismatch,
    KeyTooLong,
    KvError,
    MissingExtra,
    ReadOnly,
    StoreClosed,
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
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


# -- names ---------------------------------------------------------------------------------------


async def test_a_tree_is_what_its_description_says(tmp_path: Path) -> None:
    async with _opened(tmp_path / "kv") as driver:
        keys = ["plain", "kv:session:42", "kv:message:s1!iff", "kv:message:s1!k1234", "kv:session#user:Ada!42", "a:"]
        await _put(driver, *keys)

        assert {path for path in _tree(tmp_path / "kv") if path.endswith(".json")} == {
            "plain.json",
            "kv~d/session~d/42.json",
            "kv~d/message~d/s1~p/iff.json",
            "kv~d/message~d/s1~p/k1~n/234.json",
            "kv~d/session#user~d/~41da~p/42.json",
            "a~d/~.json",
        }
        text = (tmp_path / "kv" / "kv~d" / "session~d" / "42.json").read_text()
        assert re.fullmatch(r"kv1 [0-9a-f]{16} - [0-9a-f]{8}\nv", text)


async def test_hostile_keys_never_leave_the_folder(tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "kept.json").write_text("kept")
    before = _tree(tmp_path)
    keys = [key for key in AWKWARD_KEYS if len(key.encode()) <= 512]
    keys += [
        "../outside/kept",
        "../../x",
        "/etc/kv",
        "..:..:x",
        ".:..!x",
        "~:~",
        "a\x00/../x",
        "..\\x",
        "C:x",
        "~~",
        "x/../../y",
    ]
    keys += [".kvpersist", ".kvpersist:journal", ".git:config", "new", ".gitignore"]
    async with _opened(tmp_path / "kv") as driver:
        own = _tree(tmp_path / "kv")
        await _put(driver, *keys)
        assert [await _value(driver, key) for key in keys] == [b"v"] * len(keys)

    after = {path: content for path, content in _tree(tmp_path).items() if not path.startswith("kv")}
    assert after == before
    names = [path.name for path in (tmp_path / "kv").rglob("*") if str(path.relative_to(tmp_path / "kv")) not in own]
    assert [name for name in names if not re.fullmatch(r"[a-z0-9_#~-][a-z0-9_.#~-]{0,249}", name)] == []
    assert [name for name in names if re.match(r"(con|nul|aux|prn|com\d|lpt\d)(\.|$)", name)] == []


async def test_keys_that_differ_in_case_or_form_differ_on_a_disk_that_ignores_it(tmp_path: Path) -> None:
    keys = [
        "a",
        "A",
        "ab",
        "aB",
        "Ab",
        "AB",
        "stra\u00dfe",
        "STRASSE",
        "i",
        "I",
        "\u0130",
        "\u0131",
        "\u00e9",
        "e\u0301",
    ]
    keys += [f"n:{key}:x" for key in keys] + ["x" * 300, "X" + "x" * 299, "\u00c5" * 100, "A\u030a" * 100]
    async with _opened(tmp_path / "kv") as driver:
        await _put(driver, *keys)

    paths = [path for path in _tree(tmp_path / "kv") if path.endswith(".json")]
    assert len(paths) == len(keys)
    assert all(path == path.lower() and path.isascii() for path in paths)


def test_names_lead_back_to_their_keys() -> None:
    chance = random.Random(7)
    alphabet = "aAbk019f:!.~#%- \u00e9\x00n/"
    seen: dict[tuple[str, str], str] = {}
    for _ in range(20_000):
        key = "".join(chance.choice(alphabet) for _ in range(chance.randrange(1, 12)))
        folder, name, _ = _names.place(key)
        assert seen.setdefault((folder, name), key) == key
        text, of_integers = "", False
        for part in filter(None, folder.split("/")):
            found = _names.folder_text(part)
            assert found is not None
            text, of_integers = text + found[0], found[1]
        assert text + str(_names.file_text(name, of_integers)) == key


async def test_keys_between_those_of_a_split_integer_are_in_order(tmp_path: Path) -> None:
    keys = [
        f"l:{text}" for text in ("k1000", "k1", "k12", "k11ff", "k1200", "k12:", "k12!a", "k1fff", "k2000", "k1g", "k9")
    ]
    keys += ["l:l10000", "l:k10000", "l:k123", "l:K1000", "l:" + "k11" + "z" * 300, "l:k1~n"]
    async with _opened(tmp_path / "kv") as driver:
        await _put(driver, *keys)
        ordered = sorted(keys, key=str.encode)

        assert [entry.key for entry in await driver.scan(None, None, limit=99)] == ordered
        assert [entry.key for entry in await driver.scan(None, None, limit=99, reverse=True)] == ordered[::-1]
        for low, high in itertools.combinations(ordered, 2):
            found = [entry.key for entry in await driver.scan(low, high, limit=99)]
            assert found == ordered[ordered.index(low) : ordered.index(high)]


async def test_a_long_key_is_hashed_and_too_long_a_key_is_refused(tmp_path: Path) -> None:
    keys = ["x" * 512, "n:" + "\u00e9" * 250, "n:" + "y" * 300 + ":" + "z" * 100, ":" * 512]
    async with _opened(tmp_path / "kv") as driver:
        await _put(driver, *keys)
        assert [entry.key for entry in await driver.scan(None, None, limit=9)] == sorted(keys)
        [refused, kept, bad] = await driver.commit(
            [batch(Put("x" * 513, b"")), batch(Put("a", b"")), batch(Put("\ud800", b""))]
        )
    assert isinstance(refused, KeyTooLong)
    assert isinstance(kept, Committed)
    assert isinstance(bad, BadKey)


# -- what is in the folder -----------------------------------------------------------------------


@pytest.mark.parametrize("content", ["notes.txt", "x~d/y.json"])
async def test_a_folder_of_something_else_is_refused_and_not_touched(tmp_path: Path, content: str) -> None:
    (tmp_path / content).parent.mkdir(exist_ok=True)
    (tmp_path / content).write_text("mine")
    before = _tree(tmp_path)

    with pytest.raises(FormatMismatch, match="something else"):
        await FilesystemDriver.open(_options(tmp_path))

    assert _tree(tmp_path) == before


async def test_a_file_and_a_newer_format_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(FormatMismatch, match="a file"):
        await FilesystemDriver.open(_options(tmp_path / "file"))
    async with _opened(tmp_path / "kv") as driver:
        mark = Path(driver.root, ".kvpersist", "format")
    mark.write_text("kvpersist files 2\n")
    before = _tree(tmp_path)

    with pytest.raises(FormatMismatch, match="newer format"):
        await FilesystemDriver.open(_options(tmp_path / "kv"))

    assert _tree(tmp_path) == before


async def test_a_copy_without_the_files_that_git_ignores_is_the_store(tmp_path: Path) -> None:
    async with _opened(tmp_path / "kv") as driver:
        await _put(driver, "c:a", "c:b")
    ignored = (tmp_path / "kv" / ".kvpersist" / ".gitignore").read_text().split()
    shutil.copytree(
        tmp_path / "kv", tmp_path / "copy", ignore=shutil.ignore_patterns(*(name.rstrip("/") for name in ignored))
    )

    async with _opened(tmp_path / "copy") as copy:
        await _put(copy, "c:c")
        assert len(await copy.scan(None, None, limit=9)) == 3


async def test_other_files_in_the_tree_are_passed_over(tmp_path: Path) -> None:
    async with _opened(tmp_path / "kv") as driver:
        await _put(driver, "c:a", "l:k1234")
        for path in (
            "README.md",
            ".git/config",
            "c~d/.DS_Store",
            "c~d/a.json~",
            "c~d/B.json",
            "c~d/~zz.json",
            "c~d/con.json",
        ):
            (tmp_path / "kv" / path).parent.mkdir(exist_ok=True)
            (tmp_path / "kv" / path).write_text("mine")
        (tmp_path / "kv" / "l~d" / "k1~n" / "zzz.json").write_text("mine")

        assert [entry.key for entry in await driver.scan(None, None, limit=9)] == ["c:a", "l:k1234"]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"k",
        b"kv1 3030",
        b"{}",
        b"\xff\x00" * 90,
        b"kv1 - - -\n",
        b"kv1 0000000000000000 - 00000000\nv",
        b"kv2 x\n",
    ],
)
async def test_a_damaged_file_is_named_a_list_goes_on_and_a_put_repairs_it(tmp_path: Path, content: bytes) -> None:
    async with _opened(tmp_path / "kv") as driver:
        await _put(driver, "c:a", "c:b", "c:c")
        (tmp_path / "kv" / "c~d" / "b.json").write_bytes(content)

        with pytest.raises(CorruptRecord, match="c:b"):
            await driver.get(["c:a", "c:b"])
        [checked] = await driver.commit([batch(Check("c:b", ABSENT), Put("c:d", b"v"))])
        listed = await driver.scan(None, None, limit=9)

        assert isinstance(checked, CorruptRecord)
        assert [entry.key for entry in listed] == ["c:a", "c:b", "c:c"]
        assert [entry.value for entry in listed if entry.key != "c:b"] == [b"v", b"v"]
        await _put(driver, "c:b", value=b"new")
        assert await _value(driver, "c:b") == b"new"


async def test_every_flip_of_a_header_is_found(tmp_path: Path) -> None:
    async with _opened(tmp_path / "kv") as driver:
        for key in ("c:a", "x" * 300):
            await driver.commit([batch(Put(key, b"v", expires_at=4e9))])
            [path] = [path for path in (tmp_path / "kv").rglob("*.json") if path.stem[0] == key[-1]]
            whole = path.read_bytes()
            header = whole.index(b"\n") + 1
            for bit in range(8 * header):
                damaged = bytearray(whole)
                damaged[bit // 8] ^= 1 << bit % 8
                path.write_bytes(damaged)
                with pytest.raises(CorruptRecord):
                    await driver.get([key])
            for size in range(header):
                path.write_bytes(whole[:size])
                with pytest.raises(CorruptRecord):
                    await driver.get([key])
            path.write_bytes(whole)


async def test_two_files_that_were_swapped_are_found(tmp_path: Path) -> None:
    async with _opened(tmp_path / "kv") as driver:
        await _put(driver, "c:a", "c:b")
        one, other = (tmp_path / "kv" / "c~d" / f"{name}.json" for name in "ab")
        one.rename(tmp_path / "x")
        other.rename(one)
        (tmp_path / "x").rename(other)

        for key in ("c:a", "c:b"):
            with pytest.raises(CorruptRecord, match=key):
                await driver.get([key])


async def test_a_damaged_hashed_file_is_named_by_its_path(tmp_path: Path) -> None:
    async with _opened(tmp_path / "kv") as driver:
        await _put(driver, "c:" + "x" * 300, "d:a")
        [path] = list((tmp_path / "kv").rglob("*~~*"))
        path.write_bytes(b"kv1")

        with pytest.raises(CorruptRecord, match="c~d/xxx"):
            await driver.scan(None, None, limit=9)
        assert len(await driver.scan("d:", None, limit=9)) == 1


async def test_a_list_of_records_goes_on_past_a_damaged_one(tmp_path: Path) -> None:
    async with kvpersist.open_store(f"file://{tmp_path}/kv") as store:
        for name in "abc":
            await store.put(f"n:{name}", name)
        (tmp_path / "kv" / "n~d" / "b.json").write_text("torn")
        damaged: list[str] = []

        found = [item async for item in store.scan("n:", on_corrupt=lambda error: damaged.append(error.key))]

        assert len(found) == 2
        assert damaged == ["n:b"]


@pytest.mark.skipif(not hasattr(os, "symlink") or not _at._HAS_FDS, reason="no links")
async def test_links_and_pipes_put_into_the_tree_are_not_followed(tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    async with _opened(tmp_path / "kv") as driver:
        await _put(driver, "c:a")
        (tmp_path / "outside" / "a.json").write_bytes((tmp_path / "kv" / "c~d" / "a.json").read_bytes())
        (tmp_path / "kv" / "d~d").symlink_to(tmp_path / "outside")
        (tmp_path / "kv" / "c~d" / "link.json").symlink_to(tmp_path / "outside" / "a.json")
        os.mkfifo(tmp_path / "kv" / "c~d" / "pipe.json")
        (tmp_path / "kv" / "c~d" / "folder.json").mkdir()
        before = _tree(tmp_path / "outside")

        for key in ("c:link", "c:pipe", "c:folder", "d:a"):
            with pytest.raises(CorruptRecord, match=key):
                await driver.get([key])
        [outcome] = await driver.commit([batch(Put("d:new", b"x"))])

        assert isinstance(outcome, KvError)
        assert _tree(tmp_path / "outside") == before
        await _put(driver, "c:link")  # takes the link's place
        assert await _value(driver, "c:link") == b"v"
        assert _tree(tmp_path / "outside") == before


# -- several, and failures -----------------------------------------------------------------------


async def test_two_drivers_on_one_folder_see_each_other(tmp_path: Path) -> None:
    async with _opened(tmp_path / "kv") as one, _opened(tmp_path / "kv") as other:
        for number in range(20):
            writer, reader = (one, other) if number % 2 else (other, one)
            await _put(writer, f"c:{number}:x")
            assert await _value(reader, f"c:{number}:x") == b"v"
            assert len(await reader.scan(None, None, limit=99)) == number + 1


async def test_a_folder_that_was_removed_when_empty_is_made_again(tmp_path: Path) -> None:
    async with _opened(tmp_path / "kv") as one, _opened(tmp_path / "kv") as other:
        for number in range(3):
            for driver in (one, other):
                await _put(driver, "c:s!a", "c:s!k1234")
                assert await _value(other, "c:s!a") == b"v"
            await one.commit([batch(Delete("c:s!a"), Delete("c:s!k1234"))])
            assert await one.compact() == 0
            assert not (tmp_path / "kv" / "c~d").exists()
            assert await other.get(["c:s!a"]) == [None]
            assert await other.scan(None, None, limit=9) == []
            if number == 1:
                [outcome] = await other.commit([batch(Put("c:s!a", b"v"), Put("c:s!b", b"v"))])
                assert isinstance(outcome, Committed)
                await one.commit([batch(Delete("c:s!b"))])


async def test_a_batch_is_never_seen_by_half(tmp_path: Path) -> None:
    async with _opened(tmp_path / "kv") as one, _opened(tmp_path / "kv") as other:
        keys = [f"{space}:k" for space in "abcd"]
        writing = True

        async def write() -> None:
            nonlocal writing
            for number in range(60):
                await one.commit([batch(*(Put(key, b"%d" % number) for key in keys))])
            writing = False

        task = asyncio.ensure_future(write())
        looks = 0
        while writing:
            entries = await other.get(keys)
            scanned = await other.scan(None, None, limit=9)
            assert len({entry and entry.version for entry in entries}) == 1
            assert len({entry.version for entry in scanned}) <= 1
            looks += 1
            await asyncio.sleep(0)
        await task
        assert looks > 3


class _Death(BaseException):
    """Nothing after it is done, as nothing is after a kill."""


_CALLS = ("open_file", "make", "rename", "remove", "write_all", "sync_folder")


async def test_a_batch_is_whole_after_a_death_between_any_two_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ops: list[Op] = [Put("c:a", b"new"), Delete("c:b"), Put("d:k1234", b"new"), Put("x" * 300, b"new", ABSENT)]
    whole = {"c:a": b"new", "d:k1234": b"new", "x" * 300: b"new"}
    seen: set[bool] = set()
    for point in range(1, 60):
        root = tmp_path / str(point)
        async with _opened(root, durability="full") as driver:
            await _put(driver, "c:a", "c:b", value=b"old")
        async with _opened(root, durability="full") as victim, _opened(root) as witness:
            count = 0

            def counted(real: Callable[..., Any], point: int = point) -> Callable[..., Any]:
                def call(*arguments: Any, **options: Any) -> Any:
                    nonlocal count
                    count += 1
                    if count >= point:
                        raise _Death
                    return real(*arguments, **options)

                return call

            with monkeypatch.context() as patch:
                for name in _CALLS:
                    patch.setattr(_at, name, counted(getattr(_at, name)))
                for name in ("begin", "end"):
                    patch.setattr(Journal, name, counted(getattr(Journal, name)))
                died = False
                try:
                    await victim.commit([batch(*ops)])
                except _Death:
                    died = True
            found = {entry.key: entry.value for entry in await witness.scan(None, None, limit=9)}  # replays
            assert found in (whole, {"c:a": b"old", "c:b": b"old"}), point
            assert {key: await _value(witness, key) for key in found} == found
            seen.add(found == whole)
        async with _opened(root) as later:
            assert {entry.key: entry.value for entry in await later.scan(None, None, limit=9)} == found
            assert os.listdir(root / ".kvpersist" / "new") == []
        if not died:
            break
    else:
        raise AssertionError("it never came to its end")
    assert seen == {True, False}
    assert point > 12


async def test_a_lock_that_is_held_makes_a_commit_busy_and_reads_go_on(tmp_path: Path) -> None:
    async with _opened(tmp_path / "kv", busy_timeout=0.05) as driver:
        await _put(driver, "c:a")
        lock = FileLock(str(tmp_path / "kv" / ".kvpersist" / "lock"))
        assert lock.acquire(0)

        with pytest.raises(Busy):
            await driver.commit([batch(Put("c:a", b"2"))])
        assert await _value(driver, "c:a") == b"v"

        lock.close()
        await _put(driver, "c:a", value=b"2")


@pytest.mark.parametrize(
    ("number", "kind"), [(28, Unavailable), (5, Unavailable), (13, ReadOnly), (30, ReadOnly), (24, Unavailable)]
)
async def test_a_failing_write_changes_nothing_and_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, kind: type[KvError]
) -> None:
    async with _opened(tmp_path / "kv", durability="full") as driver:
        await _put(driver, "c:a", value=b"old")

        def fail(*arguments: Any) -> None:
            raise OSError(number, os.strerror(number))

        for name in ("write_all", "rename"):
            with monkeypatch.context() as patch:
                patch.setattr(_at, name, fail)
                outcomes = await driver.commit([batch(Put("c:a", b"1")), batch(Put("c:a", b"2"), Put("c:b", b"2"))])
            assert [type(outcome) for outcome in outcomes] == [kind, kind]
            assert [entry.value for entry in await driver.scan(None, None, limit=9)] == [b"old"]
        with monkeypatch.context() as patch:
            patch.setattr(_at, "sync_folder", fail)
            [unsynced] = await driver.commit([batch(Put("c:a", b"3"))])
        assert isinstance(unsynced, CommitUnknown)
        assert os.listdir(tmp_path / "kv" / ".kvpersist" / "new") == []
        await _put(driver, "c:a", value=b"4")


_READ_ONLY = """
import asyncio, os, sys
from kvpersist.driver import Batch, Put
from kvpersist.errors import ReadOnly
from kvpersist_drivers.filesystem import FilesystemDriver, FilesystemOptions
async def main(folder):
    driver = await FilesystemDriver.open(FilesystemOptions(path=folder))
    assert [entry.value for entry in await driver.scan(None, None, limit=9)] == [b"v"]
    assert (await driver.get(["c:a"]))[0].value == b"v"
    try:
        await driver.commit([Batch((Put("c:a", b"x"),), b"version1")])
    except ReadOnly:
        print("refused")
    await driver.close()
if os.getuid() == 0:
    os.setuid(65534)
if not os.access(sys.argv[1], os.R_OK | os.X_OK):
    sys.exit("another user cannot enter the folder of the test")
asyncio.run(main(sys.argv[1]))
"""


async def test_a_folder_that_may_only_be_read_is_read(tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        async with _opened(folder / "kv") as driver:
            await _put(driver, "c:a")
        for path in [folder, *folder.rglob("*")]:
            path.chmod(0o555 if path.is_dir() else 0o444)
        done = await asyncio.to_thread(
            subprocess.run,
            [sys.executable, "-c", _READ_ONLY, folder / "kv"],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        for path in [folder, *folder.rglob("*")]:
            path.chmod(0o755)
    if "Permission denied" in done.stderr and "site-packages" in done.stderr:
        pytest.skip("another user may not read this Python")
    if "cannot enter the folder" in done.stderr:
        pytest.skip("another user cannot enter the folder of the test")
    assert done.stdout == "refused\n", done.stderr


async def test_a_store_of_the_parent_is_refused_after_a_fork(tmp_path: Path) -> None:
    async with _opened(tmp_path / "kv") as driver:
        await _put(driver, "c:a")
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                driver.get(["c:a"]).send(None)
            except ForkedStore:
                code = 0
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        await _put(driver, "c:b")


async def test_expired_files_are_swept_with_the_folders_they_leave_empty(tmp_path: Path) -> None:
    clock = ManualClock()
    async with _opened(tmp_path / "kv") as driver:
        driver.clock = clock
        await driver.commit([batch(Put(f"c:{number}:x", b"v", expires_at=clock() + 10)) for number in range(5)])
        await _put(driver, "d:a")
        clock.advance(20)
        assert await driver.compact() == 5
        assert await driver.compact() == 0
    assert [path for path in _tree(tmp_path / "kv") if "~d" in path] == ["d~d", "d~d/a.json"]


async def test_large_files_are_read_whole(tmp_path: Path) -> None:
    async with _opened(tmp_path / "kv") as driver:
        for size in (16_000, 16_384, 65_000, 65_536, 70_000, 3_000_000):
            value = os.urandom(size)
            await _put(driver, "c:a", value=value)
            assert await _value(driver, "c:a") == value
            [entry] = await driver.scan(None, None, limit=1)
            assert entry.value == value


# -- addresses -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "path"),
    [
        ("file:///var/kv", "/var/kv"),
        ("file:////var/kv", "/var/kv"),
        ("file://localhost/var/kv/", "/var/kv/"),
        ("file:///my%20dir%23", "/my dir#"),
        ("./dir/", "./dir/"),
        ("dir/", "dir/"),
        ("/var/kv/", "/var/kv/"),
    ],
)
def test_urls_and_bare_folders(url: str, path: str) -> None:
    target = urls.parse(url)

    assert target.scheme == "file"
    assert target.options == FilesystemOptions(path=path)


@pytest.mark.parametrize(
    "url", ["file://host/x", "file://rel", "file://", "file:///x?a=1", "file:///x?kv.durability=some", "file://u:p@/x"]
)
def test_an_address_without_meaning_is_refused(url: str) -> None:
    with pytest.raises(BadOption):
        urls.parse(url)


# -- costs ---------------------------------------------------------------------------------------


async def _calls(call: Callable[[], Awaitable[list[Any]]], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The system calls of a call of the driver, by name, without those of the lock."""
    made: list[str] = []
    names = (
        "open",
        "read",
        "write",
        "close",
        "rename",
        "unlink",
        "mkdir",
        "fstat",
        "pread",
        "pwrite",
        "fsync",
        "listdir",
    )

    def counted(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            made.append(name)
            return real(*arguments, **options)

        return call

    with monkeypatch.context() as patch:
        for name in names:
            patch.setattr(os, name, counted(name, getattr(os, name)))
        outcomes = await call()
    assert [type(outcome) for outcome in outcomes] in ([Committed], [Entry])
    return made


async def test_an_append_costs_few_system_calls_and_no_more_in_a_long_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with _opened(tmp_path / "kv") as driver:
        costs: list[int] = []
        for first in (0x100, 0x4E20):
            keys = [f"l:s!{chr(103 + len(f'{number:x}'))}{number:x}" for number in range(first, first + 5)]
            await _put(driver, keys[0])
            lone = await _calls(partial(driver.commit, [batch(Put(keys[1], b"v", ABSENT))]), monkeypatch)
            two = batch(Put(keys[2], b"v"), Put(keys[3], b"v"))
            both = await _calls(partial(driver.commit, [two]), monkeypatch)
            # with two calls of the lock and two for those who watch. By hand: lock, look, open, write, close, rename,
            # unlock
            assert len(lone) == 9, lone
            assert len(both) == 1 + 2 * 4 + 2 + 2, both
            costs.append(len(lone))
        assert costs[0] == costs[1]


async def test_a_put_and_a_get_make_the_system_calls_of_one_by_hand_and_few_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with _opened(tmp_path / "kv", durability="normal") as driver:
        first = batch(Put("c:a", b"v"))
        await driver.commit([first])
        assert await _value(driver, "c:a") == b"v"  # the folder is open

        put = await _calls(partial(driver.commit, [batch(Put("c:b", b"v"))]), monkeypatch)
        checked = await _calls(
            partial(driver.commit, [batch(Put("c:c", b"v"), Check("c:a", first.version))]), monkeypatch
        )
        got = await _calls(partial(driver.get, ["c:b"]), monkeypatch)

    watched = ["pwrite", "rename", "pwrite"]  # whoever watches is told before and after
    assert put == ["pread", "open", "write", "close", *watched]
    assert checked == ["pread", "open", "read", "close", "open", "write", "close", *watched]
    assert got == ["open", "read", "close", "pread"]


async def test_a_damaged_file_can_be_deleted_and_replaced_through_a_store(tmp_path: Path) -> None:
    async with kvpersist.open_store(f"{tmp_path}/kv/") as store:
        for how in (store.delete("app:a"), store.put("app:a", 2), store.delete_many(["app:a"]), store.clear("app:")):
            await store.put("app:a", 1)
            (tmp_path / "kv" / "app~d" / "a.json").write_bytes(b"junk")
            with pytest.raises(CorruptRecord):
                await store.get("app:a")
            try:
                await how
            except CorruptRecord:  # it reads what it removes
                assert await store.delete("app:a")
            assert await store.get("app:a") in (None, 2)


@pytest.mark.parametrize("tangled", [False, True])
async def test_scans_over_integers_and_what_lies_between_are_exact(tmp_path: Path, tangled: bool) -> None:
    draw = random.Random(5)
    numbers = [*range(20), *(draw.randrange(1 << 24) for _ in range(120))]
    keys = {f"c:{chr(103 + len(f'{number:x}'))}{number:x}" for number in numbers}
    keys |= {"c:", "c:h", "c:k", "c:m!", "c:k1:x", "c:Kapital", "c:con", "c:a.b", "c:a-b", "c:a"}
    if tangled:
        keys |= {"c:k12", "c:k1g", "c:k1!a", "c:l12", "c:m1234567", "c:k12:a", "c:l12g", "c:l1Z"}
    ordered = sorted(keys)
    async with _opened(tmp_path / "kv") as driver:
        await driver.commit([batch(*(Put(key, b"v") for key in ordered))])
        bounds = [*ordered, "c:k1", "c:k1g", "c:l", "c:l12", "c:m12", "c;", "c:k1000", "c:k1ffg", "b", "d"]
        for _ in range(400):
            start, end = (draw.choice([None, draw.choice(bounds)]) for _ in range(2))
            reverse, limit = draw.random() < 0.5, draw.choice([1, 5, 1000])
            found = await driver.scan(start, end, limit=limit, reverse=reverse, keys_only=True)
            wanted = [key for key in ordered if (start is None or key >= start) and (end is None or key < end)]
            assert [entry.key for entry in found] == (wanted[::-1] if reverse else wanted)[:limit]


# -- streams ---------------------------------------------------------------------------------------


async def _parts(*parts: bytes) -> AsyncIterator[bytes]:
    for part in parts:
        yield part


def _staged(root: Path) -> list[str]:
    return os.listdir(root / ".kvpersist" / "new")


async def test_a_stream_under_way_outlives_those_who_open_the_folder_and_what_was_abandoned_does_not(
    tmp_path: Path,
) -> None:
    opened = asyncio.Event()

    async def parts() -> AsyncIterator[bytes]:
        yield b"first "
        await opened.wait()
        yield b"second"

    async with _opened(tmp_path / "kv") as driver:
        (tmp_path / "kv" / ".kvpersist" / "new" / "stream-0000").write_bytes(b"of a process that died")
        (tmp_path / "kv" / ".kvpersist" / "new" / "stream-1111").symlink_to("stream-0000")
        (tmp_path / "kv" / ".kvpersist" / "new" / "stream-2222").mkdir()
        writing = asyncio.create_task(driver.write_stream("c:a", parts(), version=b"version1"))
        while not [name for name in _staged(tmp_path / "kv") if len(name) > 12]:
            await asyncio.sleep(0)
        async with _opened(tmp_path / "kv") as other:
            assert len(_staged(tmp_path / "kv")) == 3
            assert await _value(other, "c:a") is None
            opened.set()
            assert await writing == Committed(b"version1")
            assert await _value(other, "c:a") == b"first second"
            assert _staged(tmp_path / "kv").count("stream-0000") == 0


async def test_nothing_is_left_of_streams_that_failed(tmp_path: Path) -> None:
    async def failing() -> AsyncIterator[bytes]:
        yield b"x"
        raise LookupError

    async with _opened(tmp_path / "kv") as driver:
        await _put(driver, "c:a")
        with pytest.raises(LookupError):
            await driver.write_stream("c:b", failing(), version=b"version1")
        outcome = await driver.write_stream("c:a", _parts(b"x"), version=b"version1", expect=ABSENT)
        assert isinstance(outcome, Conflict)
        too_long = await driver.write_stream("c" * 600, _parts(b"x"), version=b"version1")
        assert isinstance(too_long, KeyTooLong)
        driver._streams.submit(int).result()  # what was to be removed is

        assert _staged(tmp_path / "kv") == []
        assert await _value(driver, "c:a") == b"v"


async def test_a_stream_fails_as_itself_when_its_file_is_taken_away(tmp_path: Path) -> None:
    async def parts() -> AsyncIterator[bytes]:
        yield b"x"
        shutil.rmtree(tmp_path / "kv" / ".kvpersist" / "new")

    async with _opened(tmp_path / "kv") as driver:
        with pytest.raises(Unavailable):
            await driver.write_stream("c:a", parts(), version=b"version1")

        assert await driver.write_stream("c:a", _parts(b"x"), version=b"version1") == Committed(b"version1")


async def test_an_error_of_the_one_who_gives_the_pieces_comes_out_as_it_is(tmp_path: Path) -> None:
    async def parts() -> AsyncIterator[bytes]:
        yield b"x"
        raise FileNotFoundError("mine")

    async with _opened(tmp_path / "kv") as driver:
        with pytest.raises(FileNotFoundError, match="mine"):
            await driver.write_stream("c:a", parts(), version=b"version1")


async def test_a_disk_that_is_full_fails_a_stream_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", _raising(errno.ENOSPC))
    async with _opened(tmp_path / "kv") as driver:
        driver._sync = True
        with pytest.raises(Unavailable, match="No space"):
            await driver.write_stream("c:a", _parts(b"x"), version=b"version1")
        driver._sync = False
        assert await driver.write_stream("c:a", _parts(b"x"), version=b"version1") == Committed(b"version1")


def _raising(number: int) -> Callable[..., Any]:
    def fail(*_: Any) -> Any:
        raise OSError(number, os.strerror(number))

    return fail


async def test_an_open_stream_gives_its_file_back(tmp_path: Path) -> None:
    async with _opened(tmp_path / "kv") as driver:
        await driver.write_stream("c:a", _parts(bytes(1_000_000)), version=b"version1")
        before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
        for take in (0, 1, 9):
            found = await driver.read_stream("c:a")
            assert found is not None
            pieces: Any = found[1]
            for _ in range(take):
                if not await anext(pieces, b""):
                    break
            await pieces.aclose()
            del found, pieces
        driver._streams.submit(int).result()

        assert not before or len(os.listdir("/proc/self/fd")) <= before + 1  # the folder c~d


async def test_streams_end_when_the_driver_is_closed(tmp_path: Path) -> None:
    async with _opened(tmp_path / "kv") as driver:
        await driver.write_stream("c:a", _parts(bytes(1_000_000)), version=b"version1")
        begun, closed = asyncio.Event(), asyncio.Event()

        async def parts() -> AsyncIterator[bytes]:
            yield b"x"
            begun.set()
            await closed.wait()
            yield b"y"

        writing = asyncio.create_task(driver.write_stream("c:b", parts(), version=b"version1"))
        found = await driver.read_stream("c:a")
        assert found is not None
        await anext(found[1])
        await begun.wait()
        await driver.close()
        closed.set()

        with pytest.raises(StoreClosed):
            await writing
        with pytest.raises(StoreClosed):
            await anext(found[1])
    async with _opened(tmp_path / "kv") as driver:
        assert _staged(tmp_path / "kv") == []
        assert await _value(driver, "c:b") is None


async def test_only_streams_need_aiofiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "aiofiles", None)
    async with _opened(tmp_path / "kv") as driver, kvpersist.open_store(driver) as store:
        await store.put("a", 1)
        assert await store.get("a") == 1
        with pytest.raises(MissingExtra, match=r"kvpersist\[files\]"):
            async with store.open_write("a") as out:
                await out.write(bytes(300_000))
        with pytest.raises(MissingExtra):
            await driver.read_stream("a")
        assert await store.get("a") == 1
        assert [key async for key in store.keys("")] == ["a"]
    assert _staged(tmp_path / "kv") == []


async def test_a_store_whose_folder_is_removed_under_it_says_so(tmp_path: Path) -> None:
    driver = await FilesystemDriver.open(FilesystemOptions(path=str(tmp_path / "store")))
    try:
        await driver.commit([batch(Put("c:a", b"1"))])
        shutil.rmtree(tmp_path / "store")

        with pytest.raises(Unavailable, match="removed"):
            await driver.get(["d:a"])
    finally:
        await driver.close()
