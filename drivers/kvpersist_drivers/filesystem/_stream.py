"""Values that are written and read piece by piece.

A value that is being written is a file of the stage, locked by whoever writes it: who opens the store
removes those that nobody has locked. Renaming it into its place is the commit.
"""

from __future__ import annotations

import errno
import os
from contextlib import suppress

from kvpersist_drivers.filesystem import _at
from kvpersist_drivers.filesystem._lock import exclusively
from kvpersist_drivers.filesystem._tree import STAGE, Tree

__all__ = ["PREFIX", "remove_abandoned", "stage"]

PREFIX = "stream-"
"""What the names of such files in the stage begin with."""


def stage(tree: Tree, header: bytes, *, sync: bool) -> _at.Held:
    """Begin a file of the stage."""
    while True:
        folder = tree.folder(STAGE, make=True, sync=sync)
        assert folder is not None
        name = PREFIX + os.urandom(8).hex()
        try:
            held = _at.Held(_at.open_file(folder, name, os.O_WRONLY | os.O_CREAT | os.O_EXCL), name)
        except FileNotFoundError:  # somebody removed the folder
            tree.forget(STAGE)
            continue
        if exclusively(held.descriptor) and os.fstat(held.descriptor).st_nlink:
            _at.write_all(held.descriptor, header)
            return held
        held.close()  # taken for abandoned, before it was locked


def remove_abandoned(folder: _at.Folder, name: str) -> None:
    """Remove a file of the stage, unless somebody is writing it."""
    with suppress(FileNotFoundError, PermissionError):  # the latter is what Windows says of an open file
        try:
            held = _at.Held(_at.open_file(folder, name, os.O_RDWR))
        except OSError as error:
            if error.errno not in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
                raise
            return
        if exclusively(held.descriptor):
            _at.remove(folder, name)
        held.close()
