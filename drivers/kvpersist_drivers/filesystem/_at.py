"""File operations below an open folder: a link put into the tree is never followed.

A folder is a descriptor where the system has ``openat`` and its like, else a path.
"""

from __future__ import annotations

import errno
import os
from typing import Final, TypeAlias

__all__ = [
    "Folder",
    "Held",
    "close",
    "list_names",
    "make",
    "open_file",
    "open_folder",
    "read_file",
    "remove",
    "remove_folder",
    "rename",
]
__all__ += ["same_exists", "sync_folder", "write_all", "write_file"]

Folder: TypeAlias = int | str

_HAS_FDS: Final = {os.open, os.mkdir, os.rename, os.unlink, os.rmdir} <= os.supports_dir_fd
_FILE: Final = (
    getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0) | getattr(os, "O_NOCTTY", 0)
)
_OPENED: Final = getattr(os, "O_NONBLOCK", 0) | _FILE
_MORE: Final = 1 << 20  # bytes, of a file that is longer than was thought
_FIRST: Final = 8 << 10  # bytes: most files are read at once, and no large buffer is made for them
_FOLDER: Final = os.O_RDONLY | getattr(os, "O_DIRECTORY", 0) | _FILE


class Held:
    """An open file, closed with the object."""

    def __init__(self, descriptor: int, name: str = "") -> None:
        self.descriptor, self.name = descriptor, name

    def close(self) -> None:
        """Close it; a second call does nothing."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1

    def __del__(self) -> None:
        self.close()


def open_file(folder: Folder, name: str, flags: int) -> int:
    """Open a file; a link, or a pipe that nobody writes to, is not waited for."""
    flags |= _OPENED
    if isinstance(folder, int):
        return os.open(name, flags, 0o600, dir_fd=folder)
    return os.open(os.path.join(folder, name), flags, 0o600)


def read_file(folder: Folder, name: str, most: int | None) -> bytes:
    """The content of a file, or its first ``most`` bytes; as `open_file`."""
    descriptor = open_file(folder, name, os.O_RDONLY)
    try:
        wanted = _FIRST if most is None or most > _FIRST else most
        data = os.read(descriptor, wanted)
        if len(data) < wanted or wanted == most:
            return data
        parts = [data]
        left = most - wanted if most is not None else _MORE
        while left and (data := os.read(descriptor, left)):
            parts.append(data)
            if most is not None:
                left -= len(data)
        return b"".join(parts)
    finally:
        os.close(descriptor)


def write_file(folder: Folder, name: str, *parts: bytes, sync: bool) -> None:
    """Write a file anew, and wait until it is on the disk if that is wanted."""
    descriptor = open_file(folder, name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    try:
        write_all(descriptor, *parts)
        if sync:
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def open_folder(parent: Folder | None, name: str) -> Folder:
    """Open a folder; ``parent`` None: ``name`` is a path that may be or go through a link."""
    if not _HAS_FDS:
        path = name if parent is None else os.path.join(str(parent), name)
        if not os.path.isdir(path) or (parent is not None and os.path.islink(path)):
            kind = errno.ENOTDIR if os.path.lexists(path) else errno.ENOENT
            raise OSError(kind, os.strerror(kind), path)
        return path
    if parent is None:
        return os.open(name, os.O_RDONLY | getattr(os, "O_DIRECTORY", 0) | getattr(os, "O_CLOEXEC", 0))
    assert isinstance(parent, int)
    return os.open(name, _FOLDER, dir_fd=parent)


def make(parent: Folder, name: str) -> None:
    """Make a folder."""
    if isinstance(parent, int):
        os.mkdir(name, 0o700, dir_fd=parent)
    else:
        os.mkdir(os.path.join(parent, name), 0o700)


def rename(source: Folder, name: str, target: Folder, new: str) -> None:
    """Move a file, in place of what is there."""
    if isinstance(source, int) and isinstance(target, int):
        os.rename(name, new, src_dir_fd=source, dst_dir_fd=target)
    else:
        os.replace(os.path.join(str(source), name), os.path.join(str(target), new))


def remove(folder: Folder, name: str) -> None:
    """Remove a file."""
    if isinstance(folder, int):
        os.unlink(name, dir_fd=folder)
    else:
        os.unlink(os.path.join(folder, name))


def remove_folder(folder: Folder, name: str) -> None:
    """Remove an empty folder."""
    if isinstance(folder, int):
        os.rmdir(name, dir_fd=folder)
    else:
        os.rmdir(os.path.join(folder, name))


def list_names(folder: Folder) -> list[str]:
    """The names in a folder, in no order."""
    return os.listdir(folder)


def same_exists(folder: Folder) -> bool:
    """Whether the open folder is still in the tree: one that was removed has no link left."""
    return os.fstat(folder).st_nlink > 0 if isinstance(folder, int) else os.path.isdir(folder)


def sync_folder(folder: Folder) -> None:
    """Wait until the names of the folder are on the disk."""
    if isinstance(folder, int):
        os.fsync(folder)


def write_all(descriptor: int, *parts: bytes) -> None:
    """Write everything: a single call may write less."""
    data = b"".join(parts)
    written = os.write(descriptor, data)
    while written < len(data):
        written += os.write(descriptor, memoryview(data)[written:])


def close(folder: Folder) -> None:
    """Let go of a folder."""
    if isinstance(folder, int):
        os.close(folder)
