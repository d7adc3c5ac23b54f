"""A number that is another one after every change of the store: who watches looks at it.

It stands in the file of the lock, and only who has that lock writes it. Odd: changes are being made, or
whoever made them died. It is for those who run now, so it is never synced.
"""

from __future__ import annotations

import os
from random import Random
from typing import Final

from kvpersist_drivers.filesystem._tree import OWN

__all__ = ["Counter"]

_AT: Final = 16  # behind the byte that is locked where locks are of bytes
_SIZE: Final = 8
_HAS_PREAD: Final = hasattr(os, "pread")
_FLAGS: Final = getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)


class Counter:
    """The number of the store at ``root``, for one thread."""

    def __init__(self, root: str, *, writing: bool) -> None:
        self._odd = 0  # the number while something changes
        self._draw = Random().getrandbits  # drawn, not counted: that spares a read
        try:
            path = os.path.join(root, OWN, "lock")
            self._descriptor = os.open(path, (os.O_RDWR | os.O_CREAT if writing else os.O_RDONLY) | _FLAGS, 0o600)
        except OSError:  # a folder that may only be read, or a copy: nobody writes
            self._descriptor = -1

    def read(self) -> int:
        """Return the number; 0 where there is none."""
        if self._descriptor < 0:
            return 0
        if _HAS_PREAD:
            return int.from_bytes(os.pread(self._descriptor, _SIZE, _AT), "big")
        os.lseek(self._descriptor, _AT, os.SEEK_SET)
        return int.from_bytes(os.read(self._descriptor, _SIZE), "big")

    def begin(self) -> None:
        """Something is about to change; called again before `end`, it does nothing."""
        if not self._odd:
            self._odd = 2 * self._draw(62) + 1
            self._write(self._odd)

    def end(self) -> None:
        """What was to change has."""
        if self._odd:
            self._write(self._odd + 1)
            self._odd = 0

    def _write(self, number: int) -> None:
        if self._descriptor < 0:
            return
        data = number.to_bytes(_SIZE, "big")
        try:
            if _HAS_PREAD:
                os.pwrite(self._descriptor, data, _AT)
            else:
                os.lseek(self._descriptor, _AT, os.SEEK_SET)
                os.write(self._descriptor, data)
        except OSError:  # a full disk must not keep anybody from deleting; watchers learn of it late
            pass

    def close(self) -> None:
        """Let go of the file."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __del__(self) -> None:
        self.close()
