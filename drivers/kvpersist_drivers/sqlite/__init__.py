"""A SQLite file, by the standard library's ``sqlite3``: the default store.

One thread writes: all that waits becomes one transaction, so concurrent commits share one fsync.
Another thread reads, and never waits for the writer. An answer is given after COMMIT; with
``durability="full"`` that is after the fsync of the write-ahead log.

Several processes may use one file on a local disk (not on a network file system). A commit that
finds the file locked waits for ``busy_timeout`` and then fails with ``Busy``. A cancelled ``commit``
that has not begun never runs; one that has begun is waited for before the cancellation goes on.

Keys are ordered by their UTF-8 bytes, NUL included. ``path=":memory:"`` is private to its driver,
and its reads share the writer's thread; so do those of ``mode="ro"``, which writes nothing, creates
no database, and fails a commit with ``ReadOnly``.
"""

from __future__ import annotations

import asyncio
import sqlite3
import threading
import time
import weakref
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Annotated, ClassVar, Final, Literal, Self

import msgspec
from msgspec import Meta, Struct

from kvpersist.driver import Batch, Capabilities, Clock, Committed, Entry
from kvpersist.errors import BadOption, ForkedStore, KvError, ReadOnly
from kvpersist_drivers.sqlite._database import Database
from kvpersist_drivers.sqlite._errors import translated
from kvpersist_drivers.sqlite._lane import CLOSED, Lane, serve_calls
from kvpersist_drivers.sqlite._reader import Reader
from kvpersist_drivers.sqlite._statements import Statements
from kvpersist_drivers.sqlite._watch import Watching
from kvpersist_drivers.sqlite._writer import MAX_VALUE_BYTES, Writer

__all__ = ["SqliteDriver", "SqliteOptions"]

_INLINE_ROWS: Final = 100  # more are read in the thread also with reads="inline"


class SqliteOptions(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where the store is, and how it is kept.

    Attributes:
        path: the file, or ``:memory:``. Missing folders are made, for the owner only, and so is the file.
        mode: "rwc" creates what is missing, "rw" does not, "ro" only reads.
        durability: "full": an acknowledged write is on the disk; "normal": it survives the process,
            and the machine's crash can take the last ones, never damage the file.
        table: the table's name; letters, digits and ``_``.
        busy_timeout: seconds to wait for other writers.
        reads: "inline" reads up to 100 rows on the event loop: several times quicker, but a cold page
            makes the whole loop wait for the disk.
    """

    path: Annotated[str, Meta(min_length=1)]
    mode: Literal["rwc", "rw", "ro"] = "rwc"
    durability: Literal["full", "normal"] = "full"
    table: str = "kv"
    busy_timeout: Annotated[float, Meta(ge=0)] = 5.0
    reads: Literal["thread", "inline"] = "thread"


class SqliteDriver:
    """One file. ``clock`` judges expiry."""

    api: ClassVar[int] = 1
    Options: ClassVar[type[Struct]] = SqliteOptions

    watch: Callable[[str], AsyncGenerator[tuple[str, ...]]]
    """As `Watches.watch`, never with names; not of ``:memory:``, where there is nobody else to tell of."""

    def __init__(self, options: SqliteOptions) -> None:
        """Starts the threads; `open` is what a user calls."""
        sql = Statements(options.table)
        synchronous = "FULL" if options.durability == "full" else "NORMAL"
        database = Database(options.path, options.mode, synchronous, options.busy_timeout, sql)
        one_thread = database.in_memory or database.read_only
        self._inline = Reader(database, sql) if options.reads == "inline" and not one_thread else None
        self.capabilities = Capabilities(
            atomic_batch="all",
            conditional=True,
            conditional_delete=True,
            ordered=True,
            reverse=True,
            deref=True,
            coalesce="both" if self._inline is None else "writes",
            watch=None if database.in_memory else "poll",
            durable=options.durability == "full" and not database.in_memory,
            shared=not database.in_memory,
            cancel_settles=True,
            max_value_bytes=MAX_VALUE_BYTES,
            server=f"SQLite {sqlite3.sqlite_version}",
        )
        self._sql, self._database = sql, database
        self._reader, self._writer = Reader(database, sql), Writer(database, sql, time.time)
        self._writes = Lane("kvpersist-sqlite-writer", self._writer.serve, self._writer.tend)
        self._reads = self._writes if one_thread else Lane("kvpersist-sqlite-reader", serve_calls)
        self._watching = Watching(database)
        if not database.in_memory:
            self.watch = self._watching.watch
        self._closing = threading.Event()
        self._backups: list[threading.Thread] = []
        self._closed = asyncio.get_running_loop().create_future()
        # also of a driver that was dropped unclosed; at the end of the program the threads just end
        self._end = weakref.finalize(
            self, _end, self._writes, self._reads, self._watching, self._backups, database, self._closed
        )
        self._end.atexit = False

    @property
    def clock(self) -> Clock:
        """Seconds since 1970; called in the driver's threads too."""
        return self._writer.clock

    @clock.setter
    def clock(self, clock: Clock) -> None:
        self._writer.clock = clock

    @classmethod
    async def open(cls, options: SqliteOptions, /) -> Self:
        """Open the file, or create it.

        Raises:
            FormatMismatch: it is no kvpersist store, or one of a newer format; it was not touched.
            ReadOnly: it cannot be written, and ``mode`` is not "ro".
            Busy: other processes held it for ``busy_timeout``.
            Unavailable: the disk failed. BadOption: an option has no meaning.
        """
        try:
            msgspec.convert(msgspec.structs.asdict(options), type(options))
        except msgspec.ValidationError as error:
            raise BadOption("sqlite", str(error)) from error
        driver = cls(options)
        try:
            await driver._writes.run(driver._connect, settle=True)
        except BaseException:  # cancelled too: nothing may stay open
            await driver.close()
            raise
        return driver

    async def get(self, keys: Sequence[str]) -> list[Entry | None]:
        now = self.clock()
        if self._inline is not None and len(keys) <= _INLINE_ROWS and self._reads.refusal is None:
            return self._inline.get(keys, now)
        return await self._reads.run(partial(self._reader.get, keys, now), settle=False)

    async def commit(self, batches: Sequence[Batch]) -> list[Committed | KvError]:
        if self._database.read_only:
            raise ReadOnly(f"{self._database.path} was opened with mode=ro: open it without that to write")
        return await self._writes.run(list(batches), settle=True) if batches else []

    async def scan(
        self,
        start: str | None,
        end: str | None,
        *,
        limit: int,
        reverse: bool = False,
        keys_only: bool = False,
        deref: str | None = None,
    ) -> list[Entry]:
        form = "keys" if keys_only else "entries" if deref is None else "deref"
        sql = self._sql.scan(start, end, reverse, form)
        now = self.clock()
        bounds = [bound for bound in (start, end) if bound is not None]
        parameters = [*([] if deref is None else [deref, now]), *bounds, now, max(limit, 0)]  # below 0: no limit
        if self._inline is not None and limit <= _INLINE_ROWS and self._reads.refusal is None:
            return self._inline.scan(sql, parameters)
        return await self._reads.run(partial(self._reader.scan, sql, parameters), settle=False)

    async def ping(self) -> None:
        await self._reads.run(self._reader.ping, settle=False)

    async def size(self) -> int:
        """Bytes of the whole file, other tables and free pages included, its log not."""
        return await self._reads.run(self._reader.size, settle=False)

    async def compact(self, limit: int = 500) -> int:
        if self._database.read_only:
            raise ReadOnly(f"{self._database.path} was opened with mode=ro: open it without that to write")
        return await self._writes.run(partial(self._writer.compact, limit), settle=True)

    async def backup(self, path: str) -> None:
        """Copy the store, as it is at this moment, to the new file ``path``; writing goes on meanwhile.

        Raises:
            BadRequest: there is something at ``path``. StoreClosed: the store was closed meanwhile.
            Unavailable, ReadOnly: the copy could not be written; nothing is left of it.
        """
        if self._database.in_memory:
            return await self._writes.run(partial(self._database.backup, path, self._closing.is_set), settle=True)
        if self._writes.refusal is not None:
            raise self._writes.refusal(CLOSED)
        unwanted = threading.Event()
        closing = self._closing
        lane = Lane("kvpersist-sqlite-backup", serve_calls)
        self._backups[:] = [*(thread for thread in self._backups if thread.is_alive()), lane.thread]
        try:
            copy = partial(self._database.backup, path, lambda: unwanted.is_set() or closing.is_set())
            await lane.run(copy, settle=False)
        finally:
            unwanted.set()
            lane.stop(_nothing)

    async def close(self) -> None:
        if self._writes.refusal is ForkedStore:  # the threads are the parent's, and so are the connections
            return
        self._closing.set()
        self._end()
        await asyncio.shield(self._closed)
        self._writes.thread.join()

    def _connect(self) -> None:
        try:
            first = self._writer.connection = self._database.open()
            self._reader.connection = first if self._reads is self._writes else self._database.connect(reading=True)
            if self._inline is not None:
                self._inline.connection = self._database.connect(reading=True)
        except sqlite3.Error as error:
            raise translated(error, "open", self._database.path) from error


def _end(
    writes: Lane,
    reads: Lane,
    watching: Watching,
    backups: list[threading.Thread],
    database: Database,
    closed: asyncio.Future[None],
) -> None:
    """Let the threads finish what they have; the writer's closes all connections when the others have ended."""
    loop = closed.get_loop()

    def last() -> None:
        try:
            for thread in (reads.thread, *watching.threads(), *backups):
                if thread is not writes.thread:
                    thread.join()
            database.close()
        finally:
            with suppress(RuntimeError):  # the loop was closed: nobody waits
                loop.call_soon_threadsafe(_resolve, closed)

    watching.end()
    if reads is not writes:
        reads.stop(_nothing)
    writes.stop(last)


def _resolve(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def _nothing() -> None:
    pass
