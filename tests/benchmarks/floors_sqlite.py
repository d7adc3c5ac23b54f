"""The raw floor: what an expert writes by hand with sqlite3 alone, for one purpose at a time.

``raw-sqlite-thread``: one thread owns the only connection and drains a queue; one transaction per
drain (group commit), one cached statement per step, hand-made rowid tables with native indexes,
msgspec values; every operation has a future of its own, and one ``call_soon_threadsafe`` resolves
a drain's. Nothing is validated, checksummed, versioned or counted. ``raw-sqlite-direct``: the same
statements on the loop's own thread.
"""

from __future__ import annotations

import asyncio
import sqlite3
import threading
import time
from collections.abc import Callable, Sequence
from queue import Empty, SimpleQueue
from typing import Any, Generic, TypeAlias, TypeVar

import msgspec
from agent_work import RawMessage, RawTurn, raw_turn
from uuid_utils import uuid7

__all__ = [
    "DRAIN_LIMIT",
    "RawDirect",
    "RawItems",
    "RawRecords",
    "RawSessions",
    "RawThread",
    "RawTurns",
    "connect",
]

T = TypeVar("T")
R = TypeVar("R")
DRAIN_LIMIT = 512  # operations per transaction, as kvpersist's
_READ, _INSERT, _WRITE = 0, 1, 2
_Job: TypeAlias = tuple["asyncio.Future[Any]", Callable[..., Any], Any, int]


def connect(path: str, *, durability: str, script: str = "") -> sqlite3.Connection:
    """Open ``path`` with the settings the sqlite driver uses; ``durability`` is "normal" or "full"."""
    connection = sqlite3.connect(path, isolation_level=None, cached_statements=256, check_same_thread=False)
    connection.execute("PRAGMA auto_vacuum=INCREMENTAL")
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute(f"PRAGMA synchronous={durability.upper()}")
    connection.execute("PRAGMA cache_size=-8000")
    connection.execute("PRAGMA wal_autocheckpoint=2000")  # pages; the driver checkpoints after as many, by itself
    connection.executescript(script)
    return connection


class RawThread:
    """One thread, one connection, one transaction per drain."""

    def __init__(self, path: str, script: str, *, durability: str = "normal", drain_limit: int = DRAIN_LIMIT) -> None:
        self._drain_limit = drain_limit
        self.connection = connect(path, durability=durability, script=script)
        self._queue: SimpleQueue[_Job | None] = SimpleQueue()
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def read(self, work: Callable[[sqlite3.Connection, Any], R], argument: Any) -> asyncio.Future[R]:
        return self._submit(work, argument, _READ)

    def insert(self, work: Callable[[sqlite3.Connection, Any], R], argument: Any) -> asyncio.Future[R]:
        """Write with one statement, which commits by itself when nothing else waits."""
        return self._submit(work, argument, _INSERT)

    def write(self, work: Callable[[sqlite3.Connection, Any], R], argument: Any) -> asyncio.Future[R]:
        return self._submit(work, argument, _WRITE)

    def _submit(self, work: Callable[[sqlite3.Connection, Any], R], argument: Any, kind: int) -> asyncio.Future[R]:
        future: asyncio.Future[R] = self._loop.create_future()
        self._queue.put((future, work, argument, kind))
        return future

    async def close(self) -> None:
        self._queue.put(None)
        await asyncio.to_thread(self._thread.join)
        self.connection.close()

    def _run(self) -> None:
        connection, queue = self.connection, self._queue
        while (first := queue.get()) is not None:
            jobs = [first]
            closing = False
            try:
                while len(jobs) < self._drain_limit:
                    job = queue.get_nowait()
                    if job is None:
                        closing = True
                        break
                    jobs.append(job)
            except Empty:
                pass
            try:
                grouped = len(jobs) > 1 or first[3] == _WRITE
                if grouped:
                    connection.execute("BEGIN IMMEDIATE" if any(job[3] for job in jobs) else "BEGIN")
                results = [work(connection, argument) for _, work, argument, _ in jobs]
                if grouped:
                    connection.execute("COMMIT")
            except sqlite3.Error as error:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                self._loop.call_soon_threadsafe(_fail, jobs, error)
            else:
                self._loop.call_soon_threadsafe(_resolve, jobs, results)
            if closing:
                return


def _resolve(jobs: Sequence[_Job], results: list[Any]) -> None:
    for job, result in zip(jobs, results, strict=True):
        future = job[0]
        if not future.done():
            future.set_result(result)


def _fail(jobs: Sequence[_Job], error: Exception) -> None:
    for job in jobs:
        if not job[0].done():
            job[0].set_exception(error)


# Records by id -------------------------------------------------------------------------------------------------------

_RECORDS = "CREATE TABLE IF NOT EXISTS records (id TEXT PRIMARY KEY, data BLOB NOT NULL)"
_PUT = "INSERT INTO records (id, data) VALUES (?, ?) ON CONFLICT (id) DO UPDATE SET data = excluded.data"
_GET = "SELECT data FROM records WHERE id = ?"


def _put(connection: sqlite3.Connection, row: tuple[str, bytes]) -> None:
    connection.execute(_PUT, row)


def _put_many(connection: sqlite3.Connection, rows: list[tuple[str, bytes]]) -> None:
    connection.executemany(_PUT, rows)


def _get(connection: sqlite3.Connection, id_: str) -> tuple[bytes] | None:
    return connection.execute(_GET, (id_,)).fetchone()


def _get_many(connection: sqlite3.Connection, ids: Sequence[str]) -> list[tuple[str, bytes]]:
    marks = ",".join("?" * len(ids))
    return connection.execute(f"SELECT id, data FROM records WHERE id IN ({marks})", ids).fetchall()


class RawRecords(Generic[T]):
    """Typed records in a table of (id, data)."""

    def __init__(self, path: str, type_: type[T], *, durability: str = "normal") -> None:
        self.thread = RawThread(path, _RECORDS, durability=durability)
        self._encode = msgspec.msgpack.Encoder().encode
        self._decode = msgspec.msgpack.Decoder(type_).decode

    async def put(self, id_: str, record: T) -> None:
        await self.thread.insert(_put, (id_, self._encode(record)))

    async def get(self, id_: str) -> T | None:
        row = await self.thread.read(_get, id_)
        return None if row is None else self._decode(row[0])

    async def put_many(self, records: Sequence[tuple[str, T]]) -> None:
        encode = self._encode
        await self.thread.write(_put_many, [(id_, encode(record)) for id_, record in records])

    async def get_many(self, ids: Sequence[str]) -> list[T | None]:
        decode = self._decode
        found = dict(await self.thread.read(_get_many, ids))
        return [None if (data := found.get(id_)) is None else decode(data) for id_ in ids]

    async def close(self) -> None:
        await self.thread.close()


class RawDirect(Generic[T]):
    """The same table, read on the loop's own thread."""

    def __init__(self, path: str, type_: type[T]) -> None:
        self._connection = connect(path, durability="normal", script=_RECORDS)
        self._decode = msgspec.msgpack.Decoder(type_).decode

    async def get(self, id_: str) -> T | None:
        row = self._connection.execute(_GET, (id_,)).fetchone()
        return None if row is None else self._decode(row[0])

    async def close(self) -> None:
        self._connection.close()


# Numbered items under a parent ---------------------------------------------------------------------------------------

_ITEMS = """
CREATE TABLE IF NOT EXISTS items (parent TEXT NOT NULL, number INTEGER NOT NULL, data BLOB NOT NULL,
                                  PRIMARY KEY (parent, number))
"""
_APPEND = """
INSERT INTO items (parent, number, data)
VALUES (?1, (SELECT coalesce(max(number), 0) + 1 FROM items WHERE parent = ?1), ?2) RETURNING number
"""
_LAST = "SELECT data FROM items WHERE parent = ? ORDER BY number DESC LIMIT ?"


def _append(connection: sqlite3.Connection, row: tuple[str, bytes]) -> int:
    return connection.execute(_APPEND, row).fetchone()[0]


def _append_all(connection: sqlite3.Connection, rows: list[tuple[str, int, bytes]]) -> None:
    connection.executemany("INSERT INTO items (parent, number, data) VALUES (?, ?, ?)", rows)


def _last(connection: sqlite3.Connection, row: tuple[str, int]) -> list[tuple[bytes]]:
    return connection.execute(_LAST, row).fetchall()


class RawItems(Generic[T]):
    """Items numbered from 1 per parent; the number is found inside the insert."""

    def __init__(self, path: str, type_: type[T]) -> None:
        self.thread = RawThread(path, _ITEMS)
        self._encode = msgspec.msgpack.Encoder().encode
        self._decode = msgspec.msgpack.Decoder(type_).decode

    async def append(self, parent: str, item: T) -> int:
        return await self.thread.insert(_append, (parent, self._encode(item)))

    async def fill(self, parent: str, items: Sequence[T]) -> None:
        """Load items 1..n of an empty parent; not timed."""
        rows = [(parent, number, self._encode(item)) for number, item in enumerate(items, 1)]
        await self.thread.write(_append_all, rows)

    async def last(self, parent: str, count: int) -> list[T]:
        decode = self._decode
        rows = await self.thread.read(_last, (parent, count))
        return [decode(row[0]) for row in reversed(rows)]

    async def close(self) -> None:
        await self.thread.close()


# A user's newest records ---------------------------------------------------------------------------------------------

_SESSIONS = """
CREATE TABLE IF NOT EXISTS owned (id TEXT PRIMARY KEY, user_id TEXT NOT NULL, created_at INTEGER NOT NULL, data BLOB);
CREATE INDEX IF NOT EXISTS owned_by_user ON owned (user_id, created_at DESC);
"""
_NEWEST = "SELECT data FROM owned WHERE user_id = ? ORDER BY created_at DESC LIMIT ?"


def _newest(connection: sqlite3.Connection, row: tuple[str, int]) -> list[tuple[bytes]]:
    return connection.execute(_NEWEST, row).fetchall()


def _own(connection: sqlite3.Connection, rows: list[tuple[str, str, int, bytes]]) -> None:
    connection.executemany("INSERT INTO owned VALUES (?, ?, ?, ?)", rows)


class RawSessions(Generic[T]):
    """Records found by owner, newest first, through a native index."""

    def __init__(self, path: str, type_: type[T]) -> None:
        self.thread = RawThread(path, _SESSIONS)
        self._encode = msgspec.msgpack.Encoder().encode
        self._decode = msgspec.msgpack.Decoder(type_).decode

    async def fill(self, rows: Sequence[tuple[str, str, int, T]]) -> None:
        """Load (id, user, microseconds, record) rows; not timed."""
        await self.thread.write(_own, [(id_, user, at, self._encode(record)) for id_, user, at, record in rows])

    async def newest(self, user_id: str, count: int) -> list[T]:
        decode = self._decode
        return [decode(row[0]) for row in await self.thread.read(_newest, (user_id, count))]

    async def close(self) -> None:
        await self.thread.close()


# Agent turns ---------------------------------------------------------------------------------------------------------

_TURNS = """
CREATE TABLE IF NOT EXISTS sessions (id TEXT PRIMARY KEY, user_id TEXT, created_at INTEGER NOT NULL,
                                     updated_at INTEGER NOT NULL, last INTEGER NOT NULL DEFAULT 0,
                                     calls INTEGER NOT NULL DEFAULT 0, data BLOB NOT NULL);
CREATE INDEX IF NOT EXISTS sessions_by_user ON sessions (user_id, created_at DESC);
CREATE INDEX IF NOT EXISTS sessions_by_time ON sessions (created_at DESC);
CREATE INDEX IF NOT EXISTS sessions_by_update ON sessions (updated_at DESC);
CREATE TABLE IF NOT EXISTS messages (session_id TEXT NOT NULL, number INTEGER NOT NULL, id TEXT NOT NULL UNIQUE,
                                     data BLOB NOT NULL, PRIMARY KEY (session_id, number));
CREATE TABLE IF NOT EXISTS tool_calls (session_id TEXT NOT NULL, number INTEGER NOT NULL, position INTEGER NOT NULL,
                                       name TEXT NOT NULL, state TEXT NOT NULL, is_error INTEGER, created_at INTEGER,
                                       data BLOB NOT NULL, PRIMARY KEY (session_id, number, position));
CREATE INDEX IF NOT EXISTS calls_by_name ON tool_calls (name, created_at DESC);
CREATE INDEX IF NOT EXISTS calls_by_state ON tool_calls (state, created_at DESC);
"""
_ADVANCE = (
    "UPDATE sessions SET last = last + ?, calls = calls + ?, updated_at = max(updated_at, ?) WHERE id = ?"
    " RETURNING last"
)
_MESSAGE = "INSERT INTO messages (session_id, number, id, data) VALUES (?, ?, ?, ?)"
_CALL = (
    "INSERT INTO tool_calls (session_id, number, position, name, state, is_error, created_at, data)"
    " VALUES (?, ?, ?, ?, ?, ?, ?, ?)"
)
_OPEN = "INSERT INTO sessions (id, user_id, created_at, updated_at, data) VALUES (?, ?, ?, ?, ?)"


def _turn(connection: sqlite3.Connection, turn: RawTurn) -> int:
    execute = connection.execute
    session_id, messages, calls = turn.session_id, turn.messages, turn.calls
    row = execute(_ADVANCE, (len(messages), len(calls), turn.updated_at, session_id)).fetchone()
    if row is None:
        raise sqlite3.IntegrityError(f"no session {session_id!r}")
    first = row[0] - len(messages) + 1
    for number, (id_, data) in enumerate(messages, first):
        execute(_MESSAGE, (session_id, number, id_, data))
    for offset, position, call, data in calls:
        place = (session_id, first + offset, position)
        execute(_CALL, (*place, call.name, call.state, call.is_error, turn.updated_at, data))
    return first


def _open_session(connection: sqlite3.Connection, row: tuple[str, str, int, int, bytes]) -> None:
    connection.execute(_OPEN, row)


class RawTurns:
    """Sessions, messages and tool calls in three tables."""

    def __init__(self, path: str, *, drain_limit: int = DRAIN_LIMIT) -> None:
        self.thread = RawThread(path, _TURNS, drain_limit=drain_limit)
        self._encode = msgspec.msgpack.Encoder().encode

    async def create(self, user_id: str) -> str:
        id_ = str(uuid7())
        now = time.time_ns() // 1000
        await self.thread.write(_open_session, (id_, user_id, now, now, self._encode({"title": "t"})))
        return id_

    async def append(self, session_id: str, messages: Sequence[RawMessage]) -> int:
        """Store a turn; ids and times are given here, as kvpersist gives them."""
        return await self.thread.write(_turn, raw_turn(session_id, messages))

    async def close(self) -> None:
        await self.thread.close()
