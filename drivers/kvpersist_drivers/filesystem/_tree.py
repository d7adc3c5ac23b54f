"""The files of a store as one thread sees them; each thread has a tree of its own."""

from __future__ import annotations

import errno
import os
from typing import Final

from kvpersist.driver import Entry
from kvpersist.errors import CorruptRecord
from kvpersist_drivers.filesystem import _at
from kvpersist_drivers.filesystem._header import HEADER_BYTES, unpack
from kvpersist_drivers.filesystem._names import place

__all__ = ["DAMAGED_VERSION", "OWN", "STAGE", "Tree", "TooLarge"]

OWN: Final = ".kvpersist"  # no key's folder begins with a dot
STAGE: Final = f"{OWN}/new"  # where files are written before they take their place
DAMAGED_VERSION: Final = bytes(8)
"""The version that lists tell of a damaged file."""
_KEPT_FOLDERS: Final = 48  # descriptors, per tree
_NOT_OURS: Final = (errno.ELOOP, errno.EISDIR, errno.ENOTDIR, errno.ENXIO, errno.EMLINK)


class TooLarge(Exception):
    """The file has more bytes than the caller wanted to wait for."""


class Tree:
    """Open folders below ``root``, the latest first. Not for two threads at once."""

    def __init__(self, root: str) -> None:
        self.root = root
        self._folders: dict[str, _at.Folder] = {"": _at.open_folder(None, root)}

    def folder(self, path: str, *, make: bool = False, sync: bool = False) -> _at.Folder | None:
        """Open the folder ``path``; None if there is none, unless it is to be made (and its name synced)."""
        folders = self._folders
        known = folders.get(path)
        if known is not None:
            return known
        above, _, name = path.rpartition("/")
        parent = self.folder(above, make=make, sync=sync)
        if parent is None:
            return None
        while True:
            try:
                opened = _at.open_folder(parent, name)
                break
            except FileNotFoundError:
                if not _at.same_exists(parent):
                    if not above:
                        raise FileNotFoundError(
                            errno.ENOENT, "the folder of the store was removed", self.root
                        ) from None
                    self.forget(above)
                    return self.folder(path, make=make, sync=sync)
                if not make:
                    return None
            try:
                _at.make(parent, name)
            except FileExistsError:
                continue
            except FileNotFoundError:  # the folder above was removed, by a compaction of another process
                if not above:
                    raise
                self.forget(above)
                return self.folder(path, make=make, sync=sync)
            if sync:
                _at.sync_folder(parent)
        if len(folders) >= _KEPT_FOLDERS:
            for old in [other for other in folders if other and not path.startswith(other + "/")][:8]:
                _at.close(folders.pop(old))
        folders[path] = opened
        return opened

    def forget(self, path: str) -> None:
        """Close the folder and those below it: they are opened anew when they are needed."""
        below = path + "/"
        for known in [known for known in self._folders if known and (known == path or known.startswith(below))]:
            _at.close(self._folders.pop(known))

    def names(self, path: str) -> list[str]:
        """The names in a folder; none if it is not there."""
        for _ in range(2):
            folder = self.folder(path)
            if folder is None:
                return []
            try:
                found = _at.list_names(folder)
            except FileNotFoundError:
                found = []
            if found or not path or _at.same_exists(folder):
                return found
            self.forget(path)
        return []

    def read(self, path: str, name: str, most: int | None = None) -> bytes | None:
        """The content of a file, or its first ``most`` bytes; None if it is not there."""
        while True:
            folder = self._folders.get(path)
            if folder is None and (folder := self.folder(path)) is None:
                return None
            try:
                return _at.read_file(folder, name, most)
            except FileNotFoundError:
                if _at.same_exists(folder):
                    return None
                self.forget(path)

    def open(self, key: str, now: float) -> tuple[Entry, _at.Held, int] | None:
        """As `entry`, without the value, with the open file, and where in that the value begins."""
        path, name, _ = place(key)
        try:
            descriptor = self._descriptor(path, name)
        except OSError as error:
            raise _foreign(key, error) or error from None
        if descriptor is None:
            return None
        held = _at.Held(descriptor)
        version, expires_at, start = unpack(key, _head(key, descriptor))
        if expires_at is not None and expires_at <= now:
            return None
        return Entry(key, b"", version, expires_at), held, start

    def _descriptor(self, path: str, name: str) -> int | None:
        """Open a file to read it; None if it is not there."""
        while True:
            folder = self.folder(path)
            if folder is None:
                return None
            try:
                return _at.open_file(folder, name, os.O_RDONLY)
            except FileNotFoundError:
                if _at.same_exists(folder):
                    return None
                self.forget(path)

    def entry(self, key: str, now: float, most: int | None = None) -> Entry | None:
        """What is stored at ``key`` and has not expired.

        Raises:
            CorruptRecord: something else is there. TooLarge: it has ``most`` bytes or more.
        """
        path, name, _ = place(key)
        try:
            data = self.read(path, name, most)
        except OSError as error:
            raise _foreign(key, error) or error from None
        if data is None:
            return None
        if most is not None and len(data) >= most:
            raise TooLarge
        version, expires_at, start = unpack(key, data)
        if expires_at is not None and expires_at <= now:
            return None
        return Entry(key, data[start:], version, expires_at)

    def version(self, key: str, now: float) -> bytes | None:
        """The version of a live entry; raises as `entry` does."""
        path, name, _ = place(key)
        try:
            data = self.read(path, name, HEADER_BYTES)
        except OSError as error:
            raise _foreign(key, error) or error from None
        if data is None:
            return None
        version, expires_at, _ = unpack(key, data)
        return None if expires_at is not None and expires_at <= now else version

    def close(self) -> None:
        """Let go of every folder."""
        for folder in self._folders.values():
            _at.close(folder)
        self._folders.clear()

    def __del__(self) -> None:
        self.close()


def _head(key: str, descriptor: int) -> bytes:
    try:
        return os.read(descriptor, HEADER_BYTES)
    except OSError as error:
        raise _foreign(key, error) or error from None


def _foreign(key: str, error: OSError) -> CorruptRecord | None:
    if error.errno in _NOT_OURS:
        return CorruptRecord(key, "a link, a folder or a device in the place of its file")
    return None
