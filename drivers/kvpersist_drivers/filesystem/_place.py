"""What the folder is: a store of ours, an empty place for one, or somebody else's."""

from __future__ import annotations

import os
from contextlib import suppress
from typing import Final

from kvpersist.errors import FormatMismatch
from kvpersist_drivers.filesystem._tree import OWN

__all__ = ["prepare"]

_FORMAT: Final = 1
_MARK: Final = b"kvpersist files 1\n"
_IGNORED: Final = b"lock\njournal\nexpiring\nnew/\n"
_ATTRIBUTES: Final = b"* -text\n"  # git must not change line ends: headers and frames are checksummed


def prepare(root: str, *, sync: bool) -> None:
    """Check ``root``, or make it a store.

    Raises:
        FormatMismatch: it is something else, or of a newer format; nothing was changed.
        OSError: the disk failed, or refused.
    """
    if os.path.lexists(root) and not os.path.isdir(root):
        raise FormatMismatch(root, "a file", "a folder")
    own = os.path.join(root, OWN)
    mark = os.path.join(own, "format")
    try:
        with open(mark, "rb") as file:
            found = file.read(64)
    except FileNotFoundError:
        found = b""
    if found:
        if found != _MARK:
            known = found.startswith(b"kvpersist files ")
            shown = f"a newer format ({found[16:].decode('ascii', 'replace').strip()})" if known else "another mark"
            raise FormatMismatch(root, shown, f"a kvpersist store of files, format {_FORMAT}")
        with suppress(PermissionError):  # may only be read
            os.makedirs(os.path.join(own, "new"), 0o700, exist_ok=True)
        return
    if os.path.isdir(root) and any(not name.startswith(".") for name in os.listdir(root)):
        raise FormatMismatch(root, "a folder with something else in it", "an empty folder, or a kvpersist store")
    made = _make(os.path.join(own, "new"))
    for path, content in (
        (os.path.join(own, ".gitignore"), _IGNORED),
        (os.path.join(root, ".gitattributes"), _ATTRIBUTES),
        (mark, _MARK),  # the last one: before it the folder counts as empty
    ):
        if path == mark or not os.path.lexists(path):
            _write(path, content, sync)
    if sync:
        for folder in {own, root, *(os.path.dirname(path) for path in made)}:
            _sync(folder)


def _make(path: str) -> list[str]:
    """Make a folder and those above it, each for its owner only; return those that were not there."""
    missing: list[str] = []
    while not os.path.isdir(path):
        missing.append(path)
        path = os.path.dirname(path)
    for folder in reversed(missing):
        with suppress(FileExistsError):
            os.mkdir(folder, 0o700)
    return missing


def _write(path: str, content: bytes, sync: bool) -> None:
    partial = f"{path}.{os.getpid()}.partial"
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | getattr(os, "O_NOFOLLOW", 0), 0o600)
    try:
        os.write(descriptor, content)
        if sync:
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
    os.replace(partial, path)


def _sync(folder: str) -> None:
    with suppress(PermissionError, IsADirectoryError):  # Windows, or a folder above that may not be read
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
