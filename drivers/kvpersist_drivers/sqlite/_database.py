"""The file: finding out what it is, creating it, connections to it, and the lock round its writes.

SQLite before 3.51.3 can corrupt a database in WAL mode when one connection's commit resets the WAL
during another one's checkpoint. There, every write transaction, every checkpoint and every close of
a connection (the last one checkpoints) happens under one lock of our own, the file ``<path>-lock``,
and no commit checkpoints by itself.

The database, ``-wal`` and ``-shm`` files are never opened but by SQLite: closing a second
descriptor of a file drops every POSIX lock this process holds on it.
"""

from __future__ import annotations

import os
import random
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Final
from urllib.parse import quote

from kvpersist.errors import BadRequest, Busy, FormatMismatch, KvError, ReadOnly, StoreClosed, Unsupported
from kvpersist_drivers.sqlite._errors import code_of, of_file, translated
from kvpersist_drivers.sqlite._lock import Lock, new_lock
from kvpersist_drivers.sqlite._statements import APPLICATION_ID, FORMAT, Statements

__all__ = ["Database"]

_SOUND_SINCE: Final = (3, 51, 3)
_COLUMNS: Final = ["k", "v", "ver", "exp"]
_EXPECTED: Final = f"a kvpersist store of format {FORMAT}"
_LEAST_BYTES: Final = 512  # of a database: one page
_STEP_PAGES: Final = 1024  # of a backup, between two looks at whether it is still wanted
_WAL_KEPT_BYTES: Final = 32 << 20
_creating: Final = threading.Lock()


class Database:
    """One file, or one in memory. Every method is called in a thread of the driver, and blocks.

    Args:
        path: the file, or ``:memory:``.
        mode: "rwc", "rw" or "ro".
        synchronous: "FULL" or "NORMAL".
        busy_timeout: seconds to wait for a lock.
    """

    def __init__(self, path: str, mode: str, synchronous: str, busy_timeout: float, sql: Statements) -> None:
        self.in_memory = path == ":memory:"
        # one name for one file: relative paths and links must lead to the same lock
        self.path = path if self.in_memory else os.path.realpath(path)
        self.read_only = mode == "ro"
        self._mode = mode
        self._synchronous = synchronous
        self._busy_timeout = busy_timeout
        self._sql = sql
        self._lock: Lock | None = None
        self._mutex = threading.Lock()
        self._connections: list[sqlite3.Connection] = []

    def open(self) -> sqlite3.Connection:
        """Check the file, or create it, and return the first connection to it.

        Raises:
            FormatMismatch: no kvpersist store, or one of a newer format; nothing was written.
            ReadOnly: it cannot be written. Busy: it was locked all the time. Unavailable: the disk failed.
        """
        if not self.in_memory:
            with of_file(self.path), _creating:
                self._place()
        deadline = time.monotonic() + self._busy_timeout
        while True:
            try:
                with self.locked():
                    connection = self.connect()
                    self._prepare(connection)
                    return connection
            except sqlite3.Error as error:
                # two who create it at once: SQLite does not wait when it changes the journal mode
                if code_of(error) != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                    raise self._refused(error) from error
            self._close_connections()
            time.sleep(random.uniform(0.001, 0.01))

    def connect(self, *, reading: bool = False) -> sqlite3.Connection:
        """Open another connection, to be used by one thread at a time; `close` closes it."""
        target = (
            "file::memory:" if self.in_memory else f"file:{quote(self.path)}?mode={'ro' if self.read_only else 'rw'}"
        )
        connection = sqlite3.connect(
            target, uri=True, timeout=self._busy_timeout, isolation_level=None, check_same_thread=False
        )
        self._connections.append(connection)
        connection.execute("PRAGMA trusted_schema = OFF")
        connection.execute("PRAGMA wal_autocheckpoint = 0")
        connection.execute("PRAGMA cache_size = -8000")
        if not self.read_only:
            for setting in _SETTINGS[self._synchronous]:
                connection.execute(setting)
        if reading:
            connection.execute("PRAGMA query_only = ON")
        return connection

    def disconnect(self, connection: sqlite3.Connection) -> None:
        """Close a connection before the others."""
        with suppress(sqlite3.Error):
            self._close_one(connection)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the lock that old libraries need round writes, checkpoints and closes."""
        self.acquire()
        try:
            yield
        finally:
            self.release()

    def acquire(self) -> None:
        """Take that lock.

        Raises:
            Busy: others held it for ``busy_timeout``.
        """
        if not self._take(self._busy_timeout):
            raise Busy(f"{self.path}: others wrote for {self._busy_timeout:g} s; nothing was changed")

    def release(self) -> None:
        """Give it back."""
        if self._lock is not None:
            self._lock.release()
            self._mutex.release()

    def _take(self, timeout: float) -> bool:
        if self._lock is None:
            return True
        if not self._mutex.acquire(timeout=timeout):  # the file's lock is the driver's, not the thread's
            return False
        held = False
        try:
            with of_file(self.path + "-lock"):
                held = self._lock.acquire(timeout)
        finally:
            if not held:
                self._mutex.release()
        return held

    def checkpoint(self, connection: sqlite3.Connection) -> bool:
        """Copy the WAL into the database as far as readers let it; return False if it is to be tried again."""
        try:
            if not self._take(0):
                return False
        except (KvError, sqlite3.Error):  # the next commit will tell
            return False
        try:
            busy, frames, copied = connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
        except sqlite3.Error:  # every acknowledged write is safe in the WAL; the next commit will tell
            return False
        finally:
            self.release()
        return not busy and frames == copied

    def backup(self, path: str, unwanted: Callable[[], bool]) -> None:
        """Copy the whole store, as it is now, to the new file ``path``; give up when ``unwanted``."""
        source = self._connections[0] if self.in_memory else self.connect(reading=True)
        partial = f"{path}.{os.urandom(4).hex()}.partial"
        try:
            with of_file(path):
                if os.path.lexists(path):
                    raise BadRequest(f"{path} exists: name a new file for the backup")
                _create(partial)
            # one read transaction all along: without it each commit by others would start the copy anew
            source.execute("BEGIN")
            source.execute(self._sql.ping).fetchall()
            _copy(source, partial, unwanted)
            with of_file(path):
                os.rename(partial, path)
                _sync_folder(os.path.dirname(os.path.abspath(path)))
        except sqlite3.Error as error:
            raise translated(error, "backup", self.path) from error
        finally:
            with suppress(OSError):
                os.unlink(partial)
            with suppress(sqlite3.Error):
                source.execute("ROLLBACK")
            if not self.in_memory:
                self._close_one(source)

    def close(self) -> None:
        """Close every connection, the first one last."""
        self._close_connections()
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _close_connections(self) -> None:
        while self._connections:
            self._close_one(self._connections[-1])

    def _close_one(self, connection: sqlite3.Connection) -> None:
        self._connections.remove(connection)
        # if it is held all the time, its holder has the file open too: ours is not the last connection, and
        # does not checkpoint
        held = self._take(self._busy_timeout)
        try:
            connection.close()
        finally:
            if held:
                self.release()

    def _place(self) -> None:
        """See what is at ``path``; make the folders and an empty file if it may be made."""
        folder = os.path.dirname(self.path)
        if os.path.isdir(self.path):
            raise FormatMismatch(self.path, "a folder", _EXPECTED)
        if os.path.exists(self.path):
            self._look()
        elif self._mode != "rwc":
            raise FormatMismatch(self.path, "nothing", f"{_EXPECTED} (mode=rwc creates one)")
        if self.read_only:
            return
        if not os.path.exists(self.path):
            _make_folders(folder)
            with suppress(FileExistsError):
                _create(self.path)
            _sync_folder(folder)
        for place in (folder, self.path):
            if not os.access(place, os.W_OK):
                raise ReadOnly(f"{place} cannot be written: change its permissions, or open the store with mode=ro")
        if self._lock is None and (sqlite3.sqlite_version_info < _SOUND_SINCE or os.path.exists(self.path + "-lock")):
            self._lock = new_lock(self.path + "-lock")

    def _look(self) -> None:
        """Refuse what is not ours before anything is made beside it: immutable leaves no trace."""
        size = os.path.getsize(self.path)
        if not size:
            return
        if size < _LEAST_BYTES:  # SQLite would take it for an empty file
            raise FormatMismatch(self.path, "no SQLite database", _EXPECTED)
        connection = sqlite3.connect(f"file:{quote(self.path)}?mode=ro&immutable=1", uri=True)
        try:
            self._is_complete(connection)
        except sqlite3.Error as error:
            if code_of(error) == sqlite3.SQLITE_NOTADB:
                raise translated(error, "open", self.path) from error
            # anything else can come from ignoring a WAL or a journal: decided once it is open
        finally:
            connection.close()

    def _prepare(self, connection: sqlite3.Connection) -> None:
        if self._is_complete(connection):
            if not self.read_only:
                connection.execute("PRAGMA journal_mode = WAL").fetchone()
            return
        if self._mode != "rwc" and not self.in_memory:
            raise FormatMismatch(self.path, "a file without this store's table", _EXPECTED)
        connection.execute("PRAGMA auto_vacuum = INCREMENTAL")  # has no effect once there is a first page
        [journal] = connection.execute("PRAGMA journal_mode = WAL").fetchone()
        if journal != "wal" and not self.in_memory:
            raise Unsupported("write-ahead logging in " + os.path.dirname(self.path), "use a local disk")
        connection.execute("BEGIN IMMEDIATE")
        try:
            if not self._is_complete(connection):
                for statement in self._sql.create:
                    connection.execute(statement)
            connection.execute("COMMIT")
        finally:
            if connection.in_transaction:
                connection.execute("ROLLBACK")

    def _is_complete(self, connection: sqlite3.Connection) -> bool:
        """Return whether the table is there, False in an empty file or a store without it; refuse all else."""
        [application] = connection.execute("PRAGMA application_id").fetchone()
        [version] = connection.execute("PRAGMA user_version").fetchone()
        if application == APPLICATION_ID and version > FORMAT:
            raise FormatMismatch(self.path, f"a store of the newer format {version}", _EXPECTED)
        if application != APPLICATION_ID:
            [objects] = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
            if application or version or objects:
                raise FormatMismatch(self.path, f"another program's SQLite database ({application=})", _EXPECTED)
            return False
        columns = [name for (name,) in connection.execute(self._sql.columns)]
        if columns and columns != _COLUMNS:
            raise FormatMismatch(self.path, f"a table with columns {', '.join(columns)}", _EXPECTED)
        return bool(columns)

    def _refused(self, error: sqlite3.Error) -> Exception:
        folder = os.path.dirname(self.path)
        # a WAL is read through its -shm file, which a reader has to make if nobody else has
        if self.read_only and code_of(error) in (sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY):
            return ReadOnly(
                f"{folder} cannot be written, and SQLite needs a -shm file there even to read: copy the store"
            )
        return translated(error, "open", self.path)


_KEPT: Final = f"PRAGMA journal_size_limit = {_WAL_KEPT_BYTES}"
_SETTINGS: Final = {
    # without fullfsync, macOS only hands the bytes to the drive
    "FULL": ("PRAGMA synchronous = FULL", "PRAGMA fullfsync = ON", "PRAGMA checkpoint_fullfsync = ON", _KEPT),
    "NORMAL": ("PRAGMA synchronous = NORMAL", _KEPT),
}


def _copy(source: sqlite3.Connection, path: str, unwanted: Callable[[], bool]) -> None:
    target = sqlite3.connect(f"file:{quote(os.path.abspath(path))}?mode=rw", uri=True)

    def look(*_: int) -> None:
        if unwanted():
            raise StoreClosed("the store was closed during its backup: open it, and begin again")

    try:
        source.backup(target, pages=_STEP_PAGES, progress=look)
    finally:
        target.close()


def _make_folders(folder: str) -> None:
    if os.path.isdir(folder):
        return
    parent = os.path.dirname(folder)
    _make_folders(parent)
    with suppress(FileExistsError):
        os.mkdir(folder, 0o700)
    _sync_folder(parent)


def _create(path: str) -> None:
    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))


def _sync_folder(folder: str) -> None:
    if os.name != "posix":  # elsewhere a folder cannot be opened
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
