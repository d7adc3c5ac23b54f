"""What a store of files would hold after the power went at any call, by a model of a disk.

    python files_power.py FOLDER SCENARIO [STRIDE [BUG]]

A program runs once, and every call that changes files or folders is written down, with what a file
holds after it. Then, for each point, the disk is put together as the power could have left it, opened
as a user would, and compared with what the program was told until then. A file holds what it held when
it was last synced, a folder the names that it had then. What came later is there in one of three ways:

* "none": nothing of it;
* "names": every name, but no content, as when a file system writes its own records first;
* "some": of each file and each name either, by a draw; a file that was moved is not lost in between.

SCENARIO: "fresh", the store is created; "again", a program that died has left it; "streams", values are
streamed. Bugs that can be planted: ``folders`` and ``files`` are never synced; ``journal`` is not
before its batch is done; ``unsettled`` forgets that its end may not be on the disk. Prints one JSON object.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import shutil
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

from files_matrix import program, verify
from sqlite_matrix import STEPS

from kvpersist.driver import Batch, Committed, Put
from kvpersist_drivers.filesystem import FilesystemDriver, FilesystemOptions, _at
from kvpersist_drivers.filesystem._journal import Journal
from kvpersist_drivers.filesystem._writer import Writer

MODES = ("none", "names", "some")


class Event(NamedTuple):
    """``what``: put (a name for a node), drop (a name), data (of a file), sync (of a node), or told."""

    what: str
    node: int = 0  # the folder, where a name changes
    name: str = ""
    target: int = 0
    content: bytes | None = b""
    folder: bool = False  # whether the target is one
    move: int = 0  # the two names that a move changes have a number in common


class Recorder:
    """Writes down what is done below ``root``; nodes are numbered as they appear, the root is 0."""

    def __init__(self, root: str) -> None:
        self.events: list[Event] = []
        self._root = root
        self._nodes: dict[tuple[int, int], int] = {}
        self._lock = threading.RLock()
        self._real = {name: getattr(os, name) for name in _CALLS}
        found = os.stat(root)
        self._nodes[found.st_dev, found.st_ino] = 0

    def told(self, generation: int, line: str) -> None:
        with self._lock:
            self.events.append(Event("told", generation, line))

    @contextmanager
    def recording(self) -> Iterator[None]:
        with mock.patch.multiple(os, **{name: getattr(self, f"_{name}") for name in _CALLS}):
            yield

    def _node(self, path_or_descriptor: str | int, *, new: bool = False) -> int | None:
        found = os.stat(path_or_descriptor)
        known = self._nodes.get((found.st_dev, found.st_ino))
        if new:
            known = self._nodes[found.st_dev, found.st_ino] = max(self._nodes.values()) + 1
        return known

    def _place(self, path: Any, dir_fd: int | None) -> tuple[int, str] | None:
        """The folder's node and the name, if it is one of ours."""
        folder, name = os.path.split(os.fspath(path))
        node = self._node(dir_fd if dir_fd is not None else folder or ".")
        return None if node is None else (node, name)

    def _open(self, path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        with self._lock:
            descriptor = None
            if flags & os.O_CREAT and (place := self._place(path, dir_fd)) is not None:
                try:
                    descriptor = self._real["open"](path, flags & ~os.O_CREAT & ~os.O_EXCL, mode, dir_fd=dir_fd)
                    if flags & os.O_EXCL:
                        os.close(descriptor)
                        raise FileExistsError
                    if flags & os.O_TRUNC:
                        self._data(descriptor)
                except FileNotFoundError:
                    descriptor = self._real["open"](path, flags, mode, dir_fd=dir_fd)
                    self.events.append(Event("put", *place, self._node(descriptor, new=True) or 0))
            return descriptor if descriptor is not None else self._real["open"](path, flags, mode, dir_fd=dir_fd)

    def _data(self, descriptor: int) -> None:
        if (node := self._node(descriptor)) is not None:
            self.events.append(Event("data", node, content=Path(f"/proc/self/fd/{descriptor}").read_bytes()))

    def _changing(self, name: str, descriptor: int, *arguments: Any) -> Any:
        with self._lock:
            answer = self._real[name](descriptor, *arguments)
            self._data(descriptor)
            return answer

    def _write(self, descriptor: int, data: bytes) -> int:
        return self._changing("write", descriptor, data) if descriptor > 2 else self._real["write"](descriptor, data)

    def _pwrite(self, descriptor: int, data: bytes, at: int) -> int:
        return self._changing("pwrite", descriptor, data, at)

    def _ftruncate(self, descriptor: int, size: int) -> None:
        self._changing("ftruncate", descriptor, size)

    def _fsync(self, descriptor: int) -> None:
        with self._lock:
            self._real["fsync"](descriptor)
            if (node := self._node(descriptor)) is not None:
                folder = os.path.isdir(f"/proc/self/fd/{descriptor}")
                if not folder:  # what came by other ways than these functions
                    self._data(descriptor)
                self.events.append(Event("sync", node, folder=folder))

    def _mkdir(self, path: Any, mode: int = 0o777, *, dir_fd: int | None = None) -> None:
        with self._lock:
            place = self._place(path, dir_fd)
            self._real["mkdir"](path, mode, dir_fd=dir_fd)
            if place is not None:
                descriptor = self._real["open"](path, os.O_RDONLY, dir_fd=dir_fd)
                self.events.append(Event("put", *place, self._node(descriptor, new=True) or 0, folder=True))
                os.close(descriptor)

    def _moving(self, real: str, old: Any, new: Any, src_dir_fd: int | None, dst_dir_fd: int | None) -> None:
        with self._lock:
            source, target = self._place(old, src_dir_fd), self._place(new, dst_dir_fd)
            descriptor = self._real["open"](old, os.O_RDONLY, dir_fd=src_dir_fd)
            node = self._node(descriptor)
            os.close(descriptor)
            self._real[real](old, new, src_dir_fd=src_dir_fd, dst_dir_fd=dst_dir_fd)
            if source is not None and target is not None and node is not None:
                move = len(self.events)
                self.events += [Event("put", *target, node, move=move), Event("drop", *source, move=move)]

    def _rename(self, old: Any, new: Any, *, src_dir_fd: int | None = None, dst_dir_fd: int | None = None) -> None:
        self._moving("rename", old, new, src_dir_fd, dst_dir_fd)

    def _replace(self, old: Any, new: Any, *, src_dir_fd: int | None = None, dst_dir_fd: int | None = None) -> None:
        self._moving("replace", old, new, src_dir_fd, dst_dir_fd)

    def _dropping(self, real: str, path: Any, dir_fd: int | None) -> None:
        with self._lock:
            place = self._place(path, dir_fd)
            self._real[real](path, dir_fd=dir_fd)
            if place is not None:
                self.events.append(Event("drop", *place))

    def _unlink(self, path: Any, *, dir_fd: int | None = None) -> None:
        self._dropping("unlink", path, dir_fd)

    def _rmdir(self, path: Any, *, dir_fd: int | None = None) -> None:
        self._dropping("rmdir", path, dir_fd)


_CALLS = ("open", "write", "pwrite", "ftruncate", "fsync", "mkdir", "rename", "replace", "unlink", "rmdir")

_Names = dict[str, tuple[int, bool]]
_Change = tuple[tuple[int, bool] | None, int]  # what the name stands for, and the number of the move


class Disk:
    """What is on it for sure, and what came later."""

    def __init__(self) -> None:
        self.salt = 0  # of draws
        self.content: dict[int, bytes] = {}
        self.later: dict[int, bytes] = {}
        self.names: dict[int, _Names] = {0: {}}
        self.changes: dict[int, dict[str, _Change]] = {}

    def take(self, event: Event) -> None:
        """Follow one event."""
        if event.what == "put":
            self.changes.setdefault(event.node, {})[event.name] = (event.target, event.folder), event.move
        elif event.what == "drop":
            self.changes.setdefault(event.node, {})[event.name] = None, event.move
        elif event.what == "data":
            self.later[event.node] = event.content or b""
        elif event.what == "sync" and event.folder:
            self._sync(event.node)
        elif event.what == "sync":
            self.content[event.node] = self.later.pop(event.node, self.content.get(event.node, b""))

    def leave(self, folder: Path, mode: str, draw: random.Random, node: int = 0) -> None:
        """Write what the power leaves."""
        folder.mkdir(parents=True)
        kept = {
            name: change
            for name, change in self.changes.get(node, {}).items()
            if mode == "names" or (mode == "some" and (draw if not change[1] else self._draw(change[1])).random() < 0.5)
        }
        for name, (target, is_folder) in self._changed(node, kept).items():
            if is_folder:
                self.leave(folder / name, mode, draw, target)
                continue
            content = self.content.get(target, b"")
            if mode == "some" and target in self.later and draw.random() < 0.5:
                content = self.later[target][: draw.choice([None, draw.randrange(len(self.later[target]) + 1)])]
            (folder / name).write_bytes(content)

    def _draw(self, move: int) -> random.Random:
        return random.Random(f"{self.salt} {move}")

    def _sync(self, node: int) -> None:
        changes = self.changes.pop(node, {})
        self.names[node] = self._changed(node, changes)
        moved = {move for target, move in changes.values() if move and target is None}
        for other, theirs in self.changes.items():
            for name, change in list(theirs.items()):
                if change[1] in moved:
                    self.names[other] = self._changed(other, {name: theirs.pop(name)})

    def _changed(self, node: int, changes: dict[str, _Change]) -> _Names:
        names = dict(self.names.get(node, {}))
        for name, (target, _) in changes.items():
            if target is None:
                names.pop(name, None)
            else:
                names[name] = target
        return names


def streamed(step: int) -> bytes:
    """What a step of the scenario "streams" stores."""
    return bytes([step]) * (70_000 * step + 1)


async def streams(folder: str, tell: Callable[[str], None]) -> None:
    """Stream values to new keys, and to one that a batch has written just before."""
    driver = await FilesystemDriver.open(FilesystemOptions(path=folder))

    async def pieces(step: int) -> AsyncIterator[bytes]:
        value = streamed(step)
        for at in range(0, len(value), 50_000):
            yield value[at : at + 50_000]

    for step in range(STEPS):
        one = Batch((Put("s:0", b"batch"), Put(f"b:{step}", b"batch")), b"version-")
        assert await driver.commit([one]) == [Committed(b"version-")]
        for key in ("s:0", f"c:{step}"):
            outcome = await driver.write_stream(key, pieces(step), version=b"version%d" % step)
            assert isinstance(outcome, Committed)
        tell(f"{step} done")
    await driver.close()


async def verify_streams(folder: str, told: dict[int, str]) -> list[str]:
    """As `verify`, for what `streams` stored."""
    driver = await FilesystemDriver.open(FilesystemOptions(path=folder))
    stored = {entry.key: entry.value for entry in await driver.scan(None, None, limit=1000)}
    [written] = await driver.commit([Batch((Put("x:later", b"1"),), b"version-")])
    await driver.close()
    wrong = [] if isinstance(written, Committed) else [f"cannot write: {written}"]
    wrong += [f"step {step} was acknowledged and is lost" for step in told if f"c:{step}" not in stored]
    whole = [b"batch", *map(streamed, range(STEPS))]
    wrong += [f"{key} is torn" for key, value in stored.items() if value not in whole]
    last = max((step for step in range(STEPS) if f"b:{step}" in stored), default=-1)
    expected: list[bytes | None] = [None] if last < 0 else [streamed(last)]
    if last >= 0 and last not in told and f"c:{last}" not in stored:
        expected.append(b"batch")
    if stored.get("s:0") not in expected:
        wrong.append("the shared key is of another step")
    return wrong


@contextmanager
def planted(bug: str) -> Iterator[None]:
    """Plant a bug; the empty one is none."""
    real = os.fsync

    def only_folders(descriptor: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            real(descriptor)

    def nothing(*_: object) -> None:
        pass

    places: dict[str, tuple[Any, str, Callable[..., None]]] = {
        "folders": (_at, "sync_folder", nothing),
        "files": (os, "fsync", only_folders),
        "journal": (Journal, "_synced", nothing),
        "unsettled": (Writer, "_settled", nothing),
    }
    if not bug:
        yield
        return
    with mock.patch.object(*places[bug]):
        yield


def main(folder: str, scenario: str, stride: str = "1", bug: str = "") -> None:
    """Run the program, then go through the points."""
    root = Path(folder).absolute()
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    recorder = Recorder(str(root))
    with recorder.recording(), planted(bug):
        for generation in range(2 if scenario == "again" else 1):
            tell = lambda line, generation=generation: recorder.told(generation, line)  # noqa: E731
            if scenario == "streams":
                asyncio.run(streams(str(root), tell))
            else:
                asyncio.run(program(str(root), generation, tell, "", scenario == "fresh"))
    disk, told, wrong = Disk(), [{}] if scenario != "again" else [{}, {}], []
    disks, left = 0, root.with_name(root.name + "-left")
    for number, event in enumerate(recorder.events):
        disk.take(event)
        disk.salt = number
        if event.what == "told":
            step, word = event.name.split()
            told[event.node][int(step)] = word
        if number % int(stride) and event.what != "told":
            continue
        for mode in MODES:
            shutil.rmtree(left, ignore_errors=True)
            disk.leave(left, mode, random.Random(number))
            disks += 1
            try:
                if scenario == "streams":
                    found = asyncio.run(verify_streams(str(left), told[0]))
                else:
                    found = asyncio.run(verify(str(left), told))
            except Exception as error:  # noqa: BLE001  # whatever keeps it from being opened is a finding
                found = [f"{type(error).__name__}: {error}"]
            wrong += [f"{mode} at {number}: {problem}" for problem in found]
    print(json.dumps({"events": len(recorder.events), "disks": disks, "wrong": wrong}))


if __name__ == "__main__":
    main(*sys.argv[1:])
