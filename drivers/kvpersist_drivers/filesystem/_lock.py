"""A lock between processes, on a file that is never deleted: a lock on a deleted file excludes nobody."""

from __future__ import annotations

import os
import random
import time
import weakref
from collections.abc import Callable
from typing import Final

__all__ = ["FileLock", "exclusively"]


class FileLock:
    """Excludes every other holder, in this process and in others; gone with the process that holds it."""

    def __init__(self, path: str) -> None:
        try:
            self._descriptor = os.open(path, os.O_CREAT | os.O_RDWR | getattr(os, "O_CLOEXEC", 0), 0o600)
        except PermissionError:  # a folder that may only be read: a lock needs no more
            self._descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        self._try, self._free = _functions()
        _locks.add(self)

    def acquire(self, timeout: float) -> bool:
        """Return whether it was had within ``timeout`` seconds."""
        deadline: float | None = None
        pause = 0.0002
        while True:
            try:
                self._try(self._descriptor)
                return True
            except (BlockingIOError, PermissionError):  # the latter is what Windows says
                now = time.monotonic()
                deadline = deadline or now + timeout
                if now >= deadline:
                    return False
            time.sleep(random.uniform(0, pause))
            pause = min(pause * 2, 0.01)

    def release(self) -> None:
        """Give it back."""
        self._free(self._descriptor)

    def close(self) -> None:
        """Let go of the file; a second call does nothing."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __del__(self) -> None:
        self.close()


def exclusively(descriptor: int) -> bool:
    """Lock an open file until it is closed; False if somebody else has."""
    try:
        _functions()[0](descriptor)
    except (BlockingIOError, PermissionError):  # the latter is what Windows says
        return False
    return True


def _functions() -> tuple[Callable[[int], object], Callable[[int], object]]:
    try:
        import fcntl
    except ModuleNotFoundError:  # Windows, untested
        import msvcrt
        from typing import Any, cast

        locking: Any = cast(Any, msvcrt)
        return (
            lambda fd: locking.locking(fd, locking.LK_NBLCK, 1),
            lambda fd: locking.locking(fd, locking.LK_UNLCK, 1),
        )
    exclusive, none = fcntl.LOCK_EX | fcntl.LOCK_NB, fcntl.LOCK_UN
    return lambda fd: fcntl.flock(fd, exclusive), lambda fd: fcntl.flock(fd, none)


_locks: Final[weakref.WeakSet[FileLock]] = weakref.WeakSet()


def _forked() -> None:
    for lock in list(_locks):  # a descriptor that the child kept would keep a dead parent's lock
        lock.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)
