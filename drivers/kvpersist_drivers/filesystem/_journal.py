"""What makes a batch of several files one: the intention is written down before the first file moves.

The journal is one file, written in place. Its first line says whether a batch is pending and how
many there have been; below it are the steps, each moving a file that was written before into its
place, or removing one. Whoever has the store's lock and finds a pending journal carries it out:
steps that were done already are found so. Readers look at the first line before and after what they
read: a batch that was under way, or came between, makes them read again.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple
from zlib import crc32

from kvpersist_drivers.filesystem import _at
from kvpersist_drivers.filesystem._counter import Counter
from kvpersist_drivers.filesystem._tree import OWN, STAGE, Tree

__all__ = ["Head", "Journal", "Step"]

_HEAD: Final = re.compile(rb"kvj1 ([wci]) ([0-9a-f]{16}) ([0-9a-f]{12}) ([0-9a-f]{8})\n")
_HEAD_BYTES: Final = 46
_KEPT_BYTES: Final = 1 << 16  # a longer journal is cut when it is done
_HAS_PREAD: Final = hasattr(os, "pread")
_O_BINARY: Final = getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)


class Step(NamedTuple):
    """Move the staged file ``source`` to ``folder/name``; without one, remove what is there."""

    source: str
    folder: str
    name: str


class Head(NamedTuple):
    """The first line. ``settled``: the end of the last batch is known to be on the disk."""

    pending: bool
    number: int
    settled: bool
    size: int = 0
    checksum: int = 0


_NONE: Final = Head(False, 0, True)


class Journal:
    """The journal of a store, for one thread. ``writable`` is False where the file may only be read."""

    def __init__(self, tree: Tree, *, sync: bool) -> None:
        self._tree = tree
        self._sync = sync
        self.writable = True
        path = os.path.join(tree.root, OWN, "journal")
        try:
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | _O_BINARY, 0o600)
        except OSError:
            self.writable = False
            try:
                self._descriptor = os.open(path, os.O_RDONLY | _O_BINARY)
            except FileNotFoundError:  # a copy that only has the records
                self._descriptor = -1
        self._seen, self._told = b"", _NONE  # the first line, and what it says
        self.counter = Counter(tree.root, writing=self.writable)

    def pending(self) -> bool:
        """Whether a batch is under way, without a look at which."""
        return self._descriptor >= 0 and _pread(self._descriptor, 6, 0) == b"kvj1 w"

    def head(self) -> Head:
        """Read the first line; what is none says that nothing is pending."""
        if self._descriptor < 0:
            return _NONE
        line = _pread(self._descriptor, _HEAD_BYTES, 0)
        if line != self._seen:
            self._seen, self._told = line, _head(line)
        return self._told

    def begin(self, number: int, steps: Sequence[Step]) -> None:
        """Write the steps down: from here on the batch happens."""
        body = "".join(f"{source or '-'} {folder}/{name}\n" for source, folder, name in steps).encode()
        _pwrite(self._descriptor, _line(b"w", number, body) + body)
        self._synced()

    def end(self, number: int, *, settled: bool = False) -> None:
        """Say that nothing is pending; ``settled``: after what was said before is on the disk."""
        if settled:
            self._synced()
        _pwrite(self._descriptor, _line(b"i" if settled else b"c", number, b""))

    def settle(self, head: Head) -> Head:
        """Carry out what is pending. The caller has the store's lock."""
        if not head.pending:
            return head
        steps = self.steps(head)
        for step in steps or ():
            self.carry_out(step, again=True)
        self.sync({step.folder for step in steps or ()})
        self.end(head.number)
        if head.size > _KEPT_BYTES:
            os.ftruncate(self._descriptor, _HEAD_BYTES)
        return Head(False, head.number, False)

    def steps(self, head: Head) -> list[Step] | None:
        """What is pending; None if it was not written down to its end, so that nothing of it was done."""
        body = _pread(self._descriptor, head.size, _HEAD_BYTES)
        if _checksum(head.number, body) != head.checksum:
            return None
        return [_step(line) for line in body.decode().splitlines()]

    def carry_out(self, step: Step, *, again: bool = False) -> None:
        """Do one step; with ``again`` it may have been done, and its staged file be gone.

        Before the lock is given back, ``counter.end()`` is called.
        """
        tree, (source, path, name) = self._tree, step
        for attempt in (1, 2):
            folder = tree.folder(path, make=bool(source), sync=self._sync)
            stage = tree.folder(STAGE, make=True)
            if folder is None or stage is None:
                return
            self.counter.begin()
            try:
                if source:
                    _at.rename(stage, source, folder, name)
                else:
                    _at.remove(folder, name)
                return
            except FileNotFoundError:
                if _at.same_exists(folder):
                    if not source or again:
                        return
                    raise
                if attempt == 2:
                    raise
                tree.forget(path)

    def sync(self, paths: Iterable[str]) -> None:
        """Wait until the names in these folders are on the disk, if that is wanted."""
        if self._sync:
            for path in sorted(paths):
                folder = self._tree.folder(path)
                if folder is not None:
                    _at.sync_folder(folder)

    def close(self) -> None:
        """Let go of the file."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
        self.counter.close()

    def __del__(self) -> None:
        self.close()

    def _synced(self) -> None:
        if self._sync:
            os.fsync(self._descriptor)


def _head(line: bytes) -> Head:
    found = _HEAD.match(line)
    if found is None:
        return _NONE
    state = found[1]
    return Head(state == b"w", int(found[2], 16), state == b"i", int(found[3], 16), int(found[4], 16))


def _line(state: bytes, number: int, body: bytes) -> bytes:
    return b"kvj1 %b %016x %012x %08x\n" % (state, number, len(body), _checksum(number, body))


def _checksum(number: int, body: bytes) -> int:
    return crc32(body, number & 0xFFFFFFFF)


def _step(line: str) -> Step:
    source, _, path = line.partition(" ")
    folder, _, name = path.rpartition("/")
    return Step("" if source == "-" else source, folder, name)


def _pread(descriptor: int, size: int, at: int) -> bytes:
    if _HAS_PREAD:
        return os.pread(descriptor, size, at)
    os.lseek(descriptor, at, os.SEEK_SET)
    return os.read(descriptor, size)


def _pwrite(descriptor: int, data: bytes) -> None:
    written = 0
    while written < len(data):
        if _HAS_PREAD:
            written += os.pwrite(descriptor, data[written:], written)
        else:
            os.lseek(descriptor, written, os.SEEK_SET)
            written += os.write(descriptor, data[written:])
