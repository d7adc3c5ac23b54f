"""A lock between processes, on a file that is never deleted: a lock on a deleted file excludes nobody."""

from __future__ import annotations

import os
import random
import sqlite3
import time
import weakref
from typing import Final, Protocol

from kvpersist_drivers.sqlite._errors import code_of

__all__ = ["DatabaseLock", "FileLock", "Lock", "new_lock"]


class Lock(Protocol):
    """Excludes every other holder, in this process and in others; gone with the process that holds it."""

    def acquire(self, timeout: float) -> bool:
        """Return whether it was had within ``timeout`` seconds; 0 does not wait."""
        ...

    def release(self) -> None:
        """Give it back."""
        ...

    def close(self) -> None:
        """Let go of the file; a second call does nothing."""
        ...


class FileLock:
    """By ``flock``."""

    def __init__(self, path: str) -> None:
        import fcntl  # not on Windows

        self._flock, self._exclusive, self._none = fcntl.flock, fcntl.LOCK_EX | fcntl.LOCK_NB, fcntl.LOCK_UN
        self._descriptor = os.open(path, os.O_CREAT | os.O_RDWR, 0o600)
        _file_locks.add(self)

    def acquire(self, timeout: float) -> bool:
        deadline: float | None = None
        pause = 0.0002
        while True:
            try:
                self._flock(self._descriptor, self._exclusive)
                return True
            except BlockingIOError:
                now = time.monotonic()
                deadline = deadline or now + timeout
                if now >= deadline:
                    return False
            time.sleep(random.uniform(0, pause))
            pause = min(pause * 2, 0.01)

    def release(self) -> None:
        self._flock(self._descriptor, self._none)

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


class DatabaseLock:
    """The same by a second SQLite database, where there is no ``fcntl``. Untested on Windows itself."""

    def __init__(self, path: str) -> None:
        self._connection = sqlite3.connect(path, timeout=0, isolation_level=None, check_same_thread=False)

    def acquire(self, timeout: float) -> bool:
        deadline = time.monotonic() + timeout
        while True:
            try:
                self._connection.execute("BEGIN EXCLUSIVE")
                return True
            except sqlite3.OperationalError as error:
                if code_of(error) != sqlite3.SQLITE_BUSY:
                    raise
                if time.monotonic() >= deadline:
                    return False
            time.sleep(random.uniform(0, 0.005))

    def release(self) -> None:
        self._connection.execute("ROLLBACK")

    def close(self) -> None:
        self._connection.close()


def new_lock(path: str) -> Lock:
    """Make the lock whose file is ``path``."""
    try:
        return FileLock(path)
    except ModuleNotFoundError:
        return DatabaseLock(path)


_file_locks: Final[weakref.WeakSet[FileLock]] = weakref.WeakSet()


def _forked() -> None:
    for lock in list(_file_locks):  # a descriptor that the child kept would keep a dead parent's lock
        lock.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)
