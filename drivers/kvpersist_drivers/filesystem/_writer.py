"""What the writing thread does: one call's batches under one hold of the store's lock."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TypeAlias

from kvpersist.driver import ABSENT, Batch, Check, Clock, Committed, Expect, Put
from kvpersist.errors import Busy, CommitUnknown, Conflict, CorruptRecord, KvError, ReadOnly
from kvpersist_drivers.filesystem import _at
from kvpersist_drivers.filesystem._errors import translated
from kvpersist_drivers.filesystem._header import pack
from kvpersist_drivers.filesystem._journal import Head, Journal, Step
from kvpersist_drivers.filesystem._lock import FileLock
from kvpersist_drivers.filesystem._names import place
from kvpersist_drivers.filesystem._stream import PREFIX, remove_abandoned
from kvpersist_drivers.filesystem._tree import DAMAGED_VERSION, OWN, STAGE, Tree

__all__ = ["Writer"]

_Answer: TypeAlias = Committed | KvError
_Effect: TypeAlias = tuple[str, str, bytes | None, bytes]  # folder, name, header (None: remove), value
_LONE = "one"  # the staged file of a batch that needs no journal


class Writer:
    """Every method is called in one thread, and blocks."""

    def __init__(self, root: str, *, sync: bool, busy_timeout: float, clock: Clock) -> None:
        self.clock = clock
        self.tree = Tree(root)
        self.journal = Journal(self.tree, sync=sync)
        self._lock = FileLock(os.path.join(root, OWN, "lock")) if self.journal.writable else None
        self._root, self._sync, self._busy_timeout = root, sync, busy_timeout
        self._head = Head(False, 0, True)
        self._expiring = False  # whether the store is marked as one that has expiring entries
        self.removed = False  # whether a folder may have become empty
        self._dirty: set[str] = set()  # folders whose names are not on the disk yet

    def open(self) -> None:
        """Finish what a process that died has left."""
        if self._lock is None:
            return
        with self.locked():
            own = self.tree.folder(OWN)
            if self._sync and own is not None:
                _at.sync_folder(own)  # a journal whose name is lost with the power is none
            for name in self.tree.names(STAGE):
                if name.startswith(PREFIX):
                    folder = self.tree.folder(STAGE)
                    if folder is not None:
                        remove_abandoned(folder, name)
                else:
                    self.unstage(name)

    def commit(self, batches: Sequence[Batch]) -> list[_Answer]:
        """As the driver's."""
        try:  # the hot path: no context managers
            self._acquire()
            try:
                return self._apply(batches)
            finally:
                self._release()
        except OSError as error:
            if isinstance(error, KvError):  # some are OSErrors themselves
                raise
            raise translated(error, "commit", self._root) from error

    def place_stream(self, staged: str, put: Put, version: bytes) -> _Answer:
        """Give the staged file, which is on the disk, its place, as `commit` of ``put`` would, whose value it is."""
        batch = Batch((put,), version)
        with self._translated("write_stream"), self.locked():
            now = self.clock()
            if put.expect is not None:
                found = self._found(put.key, put.expect, now)
                if found != put.expect:
                    return Conflict(put.key, put.expect, found)
            folder, name, _ = place(put.key)
            stage = self.tree.folder(STAGE)
            if stage is not None and not _at.same_exists(stage):  # removed, and made anew by the thread of streams
                self.tree.forget(STAGE)
            if put.expires_at is not None:
                self._mark_expiring()
            expired = put.expires_at is not None and put.expires_at <= now
            self._settled()
            self.journal.carry_out(Step("" if expired else staged, folder, name))
            self._dirty.add(folder)
            self.removed |= expired
            try:
                self._synced()
            except OSError as error:  # it can be seen, and a loss of power could take it
                return self._unknown(batch, error)
        return Committed(version)

    def sweep(self, keys: Sequence[str]) -> int:
        """Remove those of ``keys`` that have expired; return how many."""
        now, removed = self.clock(), 0
        with self._translated("compact"), self.locked():
            for key in keys:
                path, name, _ = place(key)
                try:
                    expired = self.tree.version(key, now) is None
                except CorruptRecord:  # left for those who read it
                    continue
                if expired and self.tree.read(path, name, 1) is not None:
                    self._settled()
                    self.journal.carry_out(Step("", path, name))
                    self._dirty.add(path)
                    removed += 1
                    self.removed = True
            self._synced()
        return removed

    def prune(self, paths: Sequence[str]) -> None:
        """Remove folders that are empty; one that is not stays."""
        with self._translated("compact"), self.locked():
            for path in paths:
                above, _, name = path.rpartition("/")
                parent = self.tree.folder(above)
                self.tree.forget(path)
                if parent is not None:
                    with suppress(OSError):  # not empty any more
                        _at.remove_folder(parent, name)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the store's lock, with nothing pending."""
        self._acquire()
        try:
            yield
        finally:
            self._release()

    def close(self) -> None:
        """Let go of everything."""
        if self._lock is not None:
            self._lock.close()
        self.journal.close()
        self.tree.close()

    def _acquire(self) -> None:
        lock = self._lock
        if lock is None:
            raise ReadOnly(f"{self._root} cannot be written")
        if not lock.acquire(self._busy_timeout):
            raise Busy(f"filesystem, {self._root}: another process holds the lock; nothing was changed")
        try:
            self._head = self.journal.head()
            if self._head.pending:
                self._head = self.journal.settle(self._head)
        except BaseException:  # whatever it was, the lock is given back
            self._release()
            raise

    def _release(self) -> None:
        assert self._lock is not None
        self.journal.counter.end()
        self._lock.release()

    @contextmanager
    def _translated(self, operation: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if isinstance(error, KvError):
                raise
            raise translated(error, operation, self._root) from error

    def _apply(self, batches: Sequence[Batch]) -> list[_Answer]:
        answers = [self._one(batch) for batch in batches]
        try:
            self._synced()
        except OSError as error:  # they can be seen, and a loss of power could take them
            return [
                self._unknown(batch, error) if isinstance(answer, Committed) else answer
                for batch, answer in zip(batches, answers, strict=True)
            ]
        return answers

    def _one(self, batch: Batch) -> _Answer:
        try:
            if self._head.pending:  # the batch before did not come to its end
                self._head = self.journal.settle(self.journal.head())
            now = self.clock()
            for position, op in enumerate(batch.ops):
                if op.expect is not None:
                    found = self._found(op.key, op.expect, now)
                    if found != op.expect:
                        return Conflict(op.key, op.expect, found, position)
            effects = self._effects(batch, now)
            if len(effects) > 1:
                return self._together(batch, effects)
            for effect in effects:
                self._alone(effect)
        except OSError as error:
            return error if isinstance(error, KvError) else translated(error, "commit", self._root)
        except KvError as error:
            return error
        return Committed(batch.version)

    def _found(self, key: str, expect: Expect, now: float) -> Expect:
        try:
            return self.tree.version(key, now) or ABSENT
        except CorruptRecord:
            if expect != DAMAGED_VERSION:  # what a list told of it: it is to be replaced, or removed
                raise
            return expect

    def _effects(self, batch: Batch, now: float) -> list[_Effect]:
        effects: list[_Effect] = []
        for op in batch.ops:
            folder, name, hashed = place(op.key)
            if isinstance(op, Put) and (op.expires_at is None or op.expires_at > now):
                if op.expires_at is not None:
                    self._mark_expiring()
                effects.append((folder, name, pack(op.key, batch.version, op.expires_at, hashed), op.value))
            elif not isinstance(op, Check):
                effects.append((folder, name, None, b""))
                self.removed = True
        return effects

    def _alone(self, effect: _Effect) -> None:
        """One file: its rename is the commit."""
        folder, name, header, value = effect
        self._settled()
        source = ""
        try:
            if header is not None:
                self._stage(_LONE, header, value)
                source = _LONE
            self.journal.carry_out(Step(source, folder, name))
        except BaseException:  # cancelled too: what was staged is taken away
            self.unstage(_LONE)
            raise
        self._dirty.add(folder)

    def _together(self, batch: Batch, effects: Sequence[_Effect]) -> _Answer:
        """Several files: staged, written down, moved."""
        number = self._head.number + 1
        steps: list[Step] = []
        begun = done = False
        try:
            for position, (folder, name, header, value) in enumerate(effects):
                source = f"{number:x}-{position}" if header is not None else ""
                steps.append(Step(source, folder, name))
                if header is not None:
                    self._stage(source, header, value)
                    self.tree.folder(folder, make=True, sync=self._sync)
            self.journal.sync((STAGE,))
            begun = True
            self.journal.begin(number, steps)
            self._head = Head(True, number, False)
            for step in steps:
                self.journal.carry_out(step)
                done = True
            self.journal.sync({step.folder for step in steps})
            self._dirty -= {step.folder for step in steps}
        except OSError as error:
            if not begun or (not done and self._withdrawn(number)):
                for step in steps:
                    self.unstage(step.source)
                return translated(error, "commit", self._root)
            return self._forward(batch, number)
        with suppress(OSError):  # it is done; who comes next finds every step done
            self.journal.end(number)
            self._head = Head(False, number, False)
        return Committed(batch.version)

    def _withdrawn(self, number: int) -> bool:
        """Take back what was written down, before any step of it was done."""
        try:
            self.journal.end(number)
            self.journal.end(number, settled=True)
        except OSError:
            return False
        self._head = Head(False, number, True)
        return True

    def _forward(self, batch: Batch, number: int) -> _Answer:
        """Finish a batch that failed under way: it cannot be taken back."""
        try:
            head = self.journal.head()
            if head.pending and head.number == number and self.journal.steps(head) is not None:
                self._head = self.journal.settle(head)
                return Committed(batch.version)
            self._head = head
        except OSError as error:  # whoever has the lock next finishes it
            self._head = Head(True, number, False)
            return self._unknown(batch, error)
        return self._unknown(batch, OSError("the disk failed while the batch was written down"))

    def _stage(self, name: str, header: bytes, value: bytes) -> None:
        stage = self.tree.folder(STAGE, make=True, sync=self._sync)
        assert stage is not None
        try:
            _at.write_file(stage, name, header, value, sync=self._sync)
        except FileNotFoundError:  # somebody removed the folder
            self.tree.forget(STAGE)
            stage = self.tree.folder(STAGE, make=True, sync=self._sync)
            assert stage is not None
            _at.write_file(stage, name, header, value, sync=self._sync)

    def unstage(self, name: str) -> None:
        """Remove a staged file, if it is there."""
        with suppress(OSError):  # it is overwritten, or removed by the next who opens
            stage = self.tree.folder(STAGE)
            if name and stage is not None:
                _at.remove(stage, name)

    def _settled(self) -> None:
        """A journal that may come back after a loss of power must not undo what follows."""
        if self._sync and not self._head.settled:
            self.journal.end(self._head.number, settled=True)
            self._head = Head(False, self._head.number, True)

    def _synced(self) -> None:
        dirty, self._dirty = self._dirty, set()
        self.journal.sync(dirty)

    def _mark_expiring(self) -> None:
        if self._expiring:
            return
        own = self.tree.folder(OWN)
        assert own is not None
        os.close(_at.open_file(own, "expiring", os.O_WRONLY | os.O_CREAT))
        if self._sync:
            _at.sync_folder(own)
        self._expiring = True

    def _unknown(self, batch: Batch, error: OSError) -> KvError:
        keys = tuple(op.key for op in batch.ops if not isinstance(op, Check))
        answer = CommitUnknown(keys, f"filesystem, {self._root}: {error.strerror or error}")
        answer.__cause__ = error
        return answer
