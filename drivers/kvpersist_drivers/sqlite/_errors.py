"""What SQLite and the file system say, in kvpersist's words."""

from __future__ import annotations

import errno
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from kvpersist.errors import BadOption, Busy, CorruptRecord, FormatMismatch, KvError, ReadOnly, Unavailable

__all__ = ["code_of", "of_file", "translated"]

_BUSY: Final = (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_PROTOCOL)
_READ_ONLY: Final = (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_PERM, sqlite3.SQLITE_AUTH)
_FAILED: Final = (
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_NOMEM,
    sqlite3.SQLITE_INTERRUPT,
    sqlite3.SQLITE_NOLFS,
)
_DENIED: Final = (errno.EACCES, errno.EPERM, errno.EROFS)
_NO_PLACE: Final = (errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP)


def code_of(error: Exception) -> int:
    """SQLite's primary result code; 0 for what Python's module found by itself."""
    return getattr(error, "sqlite_errorcode", 0) & 0xFF


def translated(error: sqlite3.Error, operation: str, path: str) -> KvError:
    """The error of ours that says the same; of a write, it says that nothing was changed."""
    code = code_of(error)
    message = f"sqlite {operation}, {path}: {error}"
    if code in _BUSY:
        return Busy(f"{message}; nothing was changed")
    if code in _READ_ONLY:
        return ReadOnly(message)
    if code in _FAILED:
        return Unavailable(message)
    if code == sqlite3.SQLITE_CORRUPT or (not code and "decode" in str(error)):
        return CorruptRecord(path, str(error))
    if code == sqlite3.SQLITE_NOTADB:
        return FormatMismatch(path, "no SQLite database", "a kvpersist store")
    if code == sqlite3.SQLITE_ERROR:  # such as a table that another program dropped
        return FormatMismatch(path, str(error), "a kvpersist store")
    return KvError(message)


@contextmanager
def of_file(path: str) -> Iterator[None]:
    """Turn a failure of the file system at ``path`` into an error of ours."""
    try:
        yield
    except KvError:  # some are OSErrors themselves
        raise
    except OSError as error:
        message = f"{error.filename or path}: {error.strerror}"
        if error.errno in _DENIED:
            raise ReadOnly(f"{message}: change its permissions, or name another place") from error
        if error.errno in _NO_PLACE:
            raise BadOption("path", f"{message}: name another place") from error
        raise Unavailable(message) from error
