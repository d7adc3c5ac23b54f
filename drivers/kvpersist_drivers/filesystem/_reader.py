"""What is read, and how half a batch is never seen.

A commit that needs no journal changes one file at once. Around a batch the journal's first line is
pending, and counts: what was read while it stayed the same and nothing was pending is whole.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Final, TypeVar

from kvpersist.driver import Clock, Entry
from kvpersist.errors import BadKey, Busy, CorruptRecord, KvError
from kvpersist_drivers.filesystem._errors import translated
from kvpersist_drivers.filesystem._header import HEADER_BYTES, unpack
from kvpersist_drivers.filesystem._journal import Journal
from kvpersist_drivers.filesystem._lock import FileLock
from kvpersist_drivers.filesystem._names import place
from kvpersist_drivers.filesystem._scan import empty_folders, keys
from kvpersist_drivers.filesystem._tree import OWN, TooLarge, Tree

__all__ = ["NotInline", "Reader"]

T = TypeVar("T")

_ATTEMPTS: Final = 3  # before the lock is taken, so that writers who never stop cannot keep a reader out
_SWEPT: Final = 20_000  # files looked at by one compaction
_DAMAGED: Final = b"\xff"  # no frame begins so: whoever decodes the value names the key
_NO_VERSION: Final = bytes(8)


class NotInline(Exception):
    """It would wait for a writer, or for a large file."""


class Reader:
    """Reads in one thread; `get_inline` never waits, every other method may."""

    def __init__(self, root: str, *, sync: bool, busy_timeout: float, clock: Clock) -> None:
        self.clock = clock
        self._root, self._busy_timeout = root, busy_timeout
        self._tree = Tree(root)
        self._journal = Journal(self._tree, sync=sync)
        try:
            self._lock: FileLock | None = FileLock(os.path.join(root, OWN, "lock"))
        except OSError:  # a folder that may only be read, without a lock file: nobody writes
            self._lock = None
        self._cursor: str | None = None  # where the next compaction goes on

    def get_inline(self, wanted: Sequence[str], most: int) -> list[Entry | None]:
        """As the driver's ``get``.

        Raises:
            NotInline: a batch is under way, or a file has ``most`` bytes or more.
        """
        now = self.clock()
        try:
            if len(wanted) == 1:  # one file is always whole; the batch that put it there must be, too
                found: list[Entry | None] = [self._tree.entry(wanted[0], now, most)]
                if self._journal.pending():
                    raise NotInline
                return found
            before = self._journal.head()
            if before.pending:
                raise NotInline
            found = [self._tree.entry(key, now, most) for key in wanted]
            after = self._journal.head()
        except TooLarge as error:
            raise NotInline from error
        except OSError as error:
            raise self._failed(error, "get") from error
        if after.pending or after.number != before.number:
            raise NotInline
        return found

    def get(self, wanted: Sequence[str]) -> list[Entry | None]:
        """As the driver's."""
        return self._whole("get", lambda: [self._tree.entry(key, self.clock()) for key in wanted])

    def scan(
        self, start: str | None, end: str | None, limit: int, reverse: bool, keys_only: bool, deref: str | None
    ) -> list[Entry]:
        """As the driver's."""
        return self._whole("scan", lambda: self._scan(start, end, limit, reverse, keys_only, deref))

    def expired(self, limit: int) -> list[str]:
        """Some keys that have expired; the next call goes on where this one ended."""
        now, seen = self.clock(), 0
        found: list[str] = []
        try:
            for key in keys(self._tree, self._cursor, None, False):
                if seen == _SWEPT or len(found) == limit:
                    self._cursor = key
                    return found
                seen += 1
                path, name, _ = place(key)
                data = self._tree.read(path, name, HEADER_BYTES)
                try:
                    if data is not None and (at := unpack(key, data)[1]) is not None and at <= now:
                        found.append(key)
                except CorruptRecord:  # left for those who read it
                    continue
        except OSError as error:
            raise self._failed(error, "compact") from error
        again = self._cursor is not None and not found
        self._cursor = None
        return self.expired(limit) if again else found

    def empty(self) -> list[str]:
        """Folders that hold nothing."""
        return empty_folders(self._tree)

    def may_expire(self) -> bool:
        """Whether an entry with an expiry was ever written."""
        return "expiring" in self._tree.names(OWN)

    def ping(self) -> None:
        """Read something."""
        try:
            self._tree.names("")
            os.stat(os.path.join(self._root, OWN, "format"))
        except OSError as error:
            raise self._failed(error, "ping") from error

    def close(self) -> None:
        """Let go of everything."""
        if self._lock is not None:
            self._lock.close()
        self._journal.close()
        self._tree.close()

    def _whole(self, operation: str, read: Callable[[], T]) -> T:
        try:
            for _ in range(_ATTEMPTS):
                before = self._journal.head()
                if before.pending:
                    break
                found = read()
                after = self._journal.head()
                if not after.pending and after.number == before.number:
                    return found
            return self._locked(read)
        except OSError as error:
            raise self._failed(error, operation) from error

    def _locked(self, read: Callable[[], T]) -> T:
        if self._lock is None:
            return read()
        if not self._lock.acquire(self._busy_timeout):
            raise Busy(f"filesystem, {self._root}: another process holds the lock")
        try:
            self._journal.settle(self._journal.head())
            return read()
        finally:
            self._journal.counter.end()
            self._lock.release()

    def _scan(
        self, start: str | None, end: str | None, limit: int, reverse: bool, keys_only: bool, deref: str | None
    ) -> list[Entry]:
        now = self.clock()
        found: list[Entry] = []
        if limit <= 0:
            return found
        for key in keys(self._tree, start, end, reverse):
            entry = self._listed(key, now, keys_only, strict=deref is not None)
            if entry is None:
                continue
            if deref is not None:
                target = self._target(deref, entry.value, now)
                entry = Entry(entry.key, entry.value, entry.version, entry.expires_at, target)
            found.append(entry)
            if len(found) == limit:
                break
        return found

    def _target(self, deref: str, value: bytes, now: float) -> Entry | None:
        try:
            return self._listed(deref + value.decode(), now, False, strict=False)
        except (UnicodeDecodeError, BadKey):  # it names no key
            return None

    def _listed(self, key: str, now: float, keys_only: bool, *, strict: bool) -> Entry | None:
        """An entry of a list; a damaged one is told by its value, so that the list can go on."""
        try:
            if not keys_only:
                return self._tree.entry(key, now)
            path, name, _ = place(key)
            data = self._tree.read(path, name, HEADER_BYTES)
            if data is None:
                return None
            version, expires_at, _ = unpack(key, data)
            return None if expires_at is not None and expires_at <= now else Entry(key, b"", version, expires_at)
        except CorruptRecord as error:
            if strict:
                raise
            return Entry(key, b"" if keys_only else _DAMAGED + error.reason.encode(), _NO_VERSION)

    def _failed(self, error: OSError, operation: str) -> KvError:
        return error if isinstance(error, KvError) else translated(error, operation, self._root, reading=True)
