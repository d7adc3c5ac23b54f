"""A diskcache folder, for those who have one. Needs ``kvpersist[diskcache]``; SQLite is quicker and safer.

diskcache pickles whatever is no text, number or bytes, and revives what it finds: whoever can write to
the folder runs code in every reader (CVE-2025-69872, not mended in 5.6.3, the last release). Here only
text keys and bytes pass, through a ``Disk`` that has no pickle in it: a pickled row or key is a
``CorruptRecord``, and is never loaded. The folder is for its owner alone.

Nothing is evicted. Every value is in its row, never in a file of its own, behind a header with its
version; ``tag`` holds its expiry, judged by ``clock``. One thread reads and writes; a call's batches
are one transaction. A pickled or damaged row gives ``scan`` an entry whose value no frame begins with,
so that a list can go on past it.
"""

from __future__ import annotations

import asyncio
import os
import sqlite3
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from functools import partial
from typing import Annotated, Any, ClassVar, Final, Literal, Self, TypeVar

from msgspec import Meta, Struct

from kvpersist.driver import (
    ABSENT,
    HEADER_BYTES,
    Batch,
    Capabilities,
    Check,
    Clock,
    Committed,
    Entry,
    Expect,
    Put,
    milliseconds,
    needs_extra,
    packed_header,
    unpacked_entry,
)
from kvpersist.errors import (
    BadKey,
    BadOption,
    Busy,
    CommitUnknown,
    Conflict,
    CorruptRecord,
    ForkedStore,
    FormatMismatch,
    KvError,
    ReadOnly,
    StoreClosed,
    Unavailable,
    Unsupported,
    ValueTooLarge,
)
from kvpersist.urls import UrlParts

with needs_extra("diskcache", module="diskcache"):
    import diskcache

__all__ = ["DiskcacheDriver", "DiskcacheOptions"]

T = TypeVar("T")

_MAX_VALUE: Final = 900_000_000  # bytes; SQLite keeps rows of up to 1,000,000,000
_MAX_KEYS: Final = 512  # per statement
_MARK: Final = "kvpersist"  # a setting of diskcache's that says whose folder it is
_FORMAT: Final = 1
_RAW, _PICKLED = 1, 4  # modes of diskcache's rows
_DAMAGED: Final = b"\xff"  # no frame begins so: whoever decodes the value names the key
_NO_VERSION: Final = bytes(8)  # of a damaged entry, in lists and conditions: it can be replaced and deleted
_CLOSED: Final = "this diskcache driver was closed, or opened before a fork: open it again"

_LIVE: Final = "(tag IS NULL OR tag > ?)"
_SIZES: Final = [1 << exponent for exponent in range(_MAX_KEYS.bit_length())]
_GET: Final = {
    size: f"SELECT key, raw, mode, value FROM Cache WHERE key IN ({', '.join('?' * size)}) AND {_LIVE}"  # noqa: S608
    for size in _SIZES
}
_VERSION: Final = f"SELECT key, raw, mode, substr(value, 1, {HEADER_BYTES}) FROM Cache WHERE key = ? AND {_LIVE}"  # noqa: S608
_EXPIRED: Final = "SELECT key FROM Cache WHERE tag <= ? AND typeof(key) = 'text' AND raw = 1 ORDER BY tag LIMIT ?"
_SCAN: Final = {  # of text, only what stands here
    (bounds, reverse, keys_only): "SELECT key, raw, mode, "  # noqa: S608
    + (f"substr(value, 1, {HEADER_BYTES})" if keys_only else "value")
    + f" FROM Cache WHERE {_LIVE}"
    + (" AND key >= ?" if bounds[0] else "")
    + (" AND key < ?" if bounds[1] else "")
    + f" ORDER BY key {'DESC' if reverse else 'ASC'} LIMIT ?"
    for bounds in ((False, False), (False, True), (True, False), (True, True))
    for reverse in (False, True)
    for keys_only in (False, True)
}


class DiskcacheOptions(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where the store is, and how it is kept.

    Attributes:
        path: the folder; a missing one is made. It is for its owner only, and is made so.
        durability: "full": an acknowledged write is on the disk; "normal": it survives the process,
            and the machine's crash can take the last ones.
        busy_timeout: seconds to wait for other writers.
    """

    path: Annotated[str, Meta(min_length=1)]
    durability: Literal["full", "normal"] = "full"
    busy_timeout: Annotated[float, Meta(ge=0)] = 5.0

    @classmethod
    def from_url(cls, parts: UrlParts) -> dict[str, Any]:
        """``diskcache:///abs/dir``; `kvpersist.urls` asks."""
        for lost in ("port", "username", "password", "params"):
            if getattr(parts, lost) not in ("", None, {}):
                raise BadOption("url", f"{parts.scheme}:// takes no {lost}")
        if parts.host not in ("", "localhost"):
            raise BadOption("url", "two slashes name a host: write diskcache:///abs/dir")
        if not parts.path:
            raise BadOption("path", "it is required")
        return {"path": "/" + parts.path.lstrip("/")}


class _Bytes(diskcache.Disk):
    """Text keys, bytes values; nothing is pickled, and nothing pickled is loaded."""

    def put(self, key: Any) -> tuple[Any, Literal[True]]:
        if type(key) is not str:
            raise BadKey(key, "a key is text")
        return key, True

    def get(self, key: Any, raw: Any) -> str:
        if raw != 1 or type(key) is not str:
            raise CorruptRecord(repr(key)[:80], "a key that kvpersist did not write, maybe a pickled one: not loaded")
        return key

    def store(self, value: Any, read: Any, key: Any = None) -> tuple[Literal[0], Literal[1], None, Any]:
        if read or type(value) is not bytes:
            raise BadKey(key, "a value is bytes")
        return 0, 1, None, value

    def fetch(self, mode: Any, filename: Any, value: Any, read: Any) -> bytes:
        if mode != _RAW or type(value) is not bytes or read:
            what = "a pickled value: it was not loaded" if mode == _PICKLED else "a value that kvpersist did not write"
            raise CorruptRecord("", what)
        return value


class DiskcacheDriver:
    """One folder. ``clock`` judges expiry."""

    api: ClassVar[int] = 1
    Options: ClassVar[type[Struct]] = DiskcacheOptions

    def __init__(self, options: DiskcacheOptions) -> None:
        """`open` is what a user calls."""
        self.capabilities = Capabilities(
            atomic_batch="all",
            conditional=True,
            conditional_delete=True,
            ordered=True,
            reverse=True,
            coalesce="both",
            durable=options.durability == "full",
            shared=True,
            cancel_settles=True,
            max_value_bytes=_MAX_VALUE,
            server=f"diskcache {diskcache.__version__}, SQLite {sqlite3.sqlite_version}",
        )
        self.clock: Clock = time.time
        self.path = os.path.abspath(options.path)
        self._options = options
        self._cache: Any = None  # diskcache brings no types
        self._thread = ThreadPoolExecutor(1, "kvpersist-diskcache")
        self._refusal: type[KvError] | None = None
        _drivers.add(self)

    @classmethod
    async def open(cls, options: DiskcacheOptions, /) -> Self:
        """Open the folder, or make it.

        Raises:
            FormatMismatch: it holds something else; it was not touched.
            BadOption: diskcache would take the path for another one.
            Busy, ReadOnly, Unavailable: it cannot be opened.
        """
        driver = cls(options)
        try:
            await driver._run(driver._open)
        except BaseException:  # cancelled too: nothing may stay open
            await driver.close()
            raise
        return driver

    async def get(self, keys: Sequence[str]) -> list[Entry | None]:
        return await self._run(partial(self._get, keys))

    async def commit(self, batches: Sequence[Batch]) -> list[Committed | KvError]:
        return await self._run(partial(self._commit, batches)) if batches else []

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
        if deref is not None:
            raise Unsupported("a scan with deref", "use deref_by_get")
        return await self._run(partial(self._scan, start, end, limit, reverse, keys_only))

    async def compact(self, limit: int = 500) -> int:
        """Remove at most ``limit`` expired entries; return how many went."""
        return await self._run(partial(self._compact, limit))

    async def ping(self) -> None:
        await self._run(partial(self._get, ["ping"]))

    async def close(self) -> None:
        if self._refusal is not None:  # closed, or of the parent process, whose thread is not here
            return
        self._refusal = StoreClosed
        await _settled(self._thread, self._close)
        self._thread.shutdown(wait=True)

    async def _run(self, call: Callable[[], T]) -> T:
        if self._refusal is not None:
            raise self._refusal(_CLOSED)
        return await _settled(self._thread, call)

    # ---- in the thread

    def _open(self) -> None:
        if os.path.expandvars(os.path.expanduser(self.path)) != self.path:
            raise BadOption("path", "diskcache would replace what begins with '$' or '~': name another folder")
        try:
            os.makedirs(self.path, 0o700, exist_ok=True)
            _refuse_foreign(self.path)
            if os.stat(self.path).st_mode & 0o077:
                os.chmod(self.path, 0o700)
        except FileExistsError as error:
            raise FormatMismatch(self.path, "a file", "a folder") from error
        except PermissionError as error:
            raise ReadOnly(f"diskcache, {self.path}: {error.strerror}; name a folder of your own") from error
        except OSError as error:
            raise Unavailable(f"diskcache, {self.path}: {error.strerror}") from error
        with self._translated("open"):
            opens: Any = diskcache.Cache  # which is said to take whole seconds
            self._cache = opens(
                self.path,
                timeout=self._options.busy_timeout,
                disk=_Bytes,
                eviction_policy="none",
                cull_limit=0,
                size_limit=1 << 62,
                statistics=0,
                tag_index=1,
                disk_min_file_size=1 << 62,
                sqlite_synchronous=2 if self._options.durability == "full" else 1,
                **{_MARK: _FORMAT},
            )

    def _close(self) -> None:
        if self._cache is not None:
            self._cache.close()

    def _get(self, keys: Sequence[str]) -> list[Entry | None]:
        unique = list(dict.fromkeys(keys))
        now = self.clock()
        found: dict[str, Entry] = {}
        with self._translated("get"):
            for at in range(0, len(unique), _MAX_KEYS):
                part = unique[at : at + _MAX_KEYS]
                size = 1 << (len(part) - 1).bit_length()
                padded = [*part, *part[:1] * (size - len(part))]
                for row in self._cache._sql(_GET[size], (*padded, now)).fetchall():
                    entry = self._entry(row)
                    found[entry.key] = entry
        return [found.get(key) for key in keys]

    def _scan(self, start: str | None, end: str | None, limit: int, reverse: bool, keys_only: bool) -> list[Entry]:
        bounds = [bound for bound in (start, end) if bound is not None]
        statement = _SCAN[(start is not None, end is not None), reverse, keys_only]
        with self._translated("scan"):
            rows = self._cache._sql(statement, (self.clock(), *bounds, max(limit, 0))).fetchall()
            return [self._listed(row) for row in rows]

    def _compact(self, limit: int) -> int:
        with self._translated("compact"), self._cache.transact():
            expired = self._cache._sql(_EXPIRED, (self.clock(), limit)).fetchall()
            for (key,) in expired:
                self._cache.delete(key)
        return len(expired)

    def _commit(self, batches: Sequence[Batch]) -> list[Committed | KvError]:
        answers: list[Committed | KvError] = []
        applied = False
        try:
            with self._translated("commit"), self._cache.transact():
                answers += [self._apply(batch) for batch in batches]
                applied = True
        except Unavailable as error:
            if not applied:
                raise
            keys = tuple(op.key for batch in batches for op in batch.ops if not isinstance(op, Check))
            raise CommitUnknown(keys, str(error)) from error
        finally:
            if self._cache._con.in_transaction:  # a COMMIT that failed leaves it open
                with suppress(sqlite3.Error):
                    self._cache._sql("ROLLBACK")
        return answers

    def _apply(self, batch: Batch) -> Committed | KvError:
        now = self.clock()
        for op in batch.ops:
            if isinstance(op, Put) and len(op.value) > _MAX_VALUE:
                return ValueTooLarge(op.key, len(op.value), _MAX_VALUE)
            try:
                op.key.encode()
            except UnicodeEncodeError:
                return BadKey(op.key, "no UTF-8 text: it holds a lone surrogate")
        for position, op in enumerate(batch.ops):
            if op.expect is not None:
                found = self._version(op.key, now)
                if found != op.expect:
                    return Conflict(op.key, op.expect, found, position)
        for op in batch.ops:
            if isinstance(op, Put) and (op.expires_at is None or op.expires_at > now):
                expires_ms = milliseconds(op.expires_at)
                value = packed_header(batch.version, expires_ms) + op.value
                self._cache.set(op.key, value, tag=expires_ms / 1000 if expires_ms else None)
            elif not isinstance(op, Check):
                self._cache.delete(op.key)
        return Committed(batch.version)

    def _version(self, key: str, now: float) -> Expect:
        row = self._cache._sql(_VERSION, (key, now)).fetchone()
        if row is None:
            return ABSENT
        try:
            return self._entry(row).version
        except CorruptRecord:
            return _NO_VERSION

    def _entry(self, row: tuple[Any, Any, Any, Any]) -> Entry:
        key = self._cache.disk.get(row[0], row[1])
        try:
            value = self._cache.disk.fetch(row[2], None, row[3], False)
        except CorruptRecord as error:
            raise CorruptRecord(key, error.reason) from None
        return unpacked_entry(key, value)

    def _listed(self, row: tuple[Any, Any, Any, Any]) -> Entry:
        """An entry of a list; a damaged one is told by its value, so that the list can go on."""
        key = self._cache.disk.get(row[0], row[1])
        try:
            return self._entry(row)
        except CorruptRecord as error:
            return Entry(key, _DAMAGED + error.reason.encode(), _NO_VERSION)

    @contextmanager
    def _translated(self, operation: str) -> Iterator[None]:
        where = f"diskcache {operation}, {self.path}"
        try:
            yield
        except diskcache.Timeout as error:
            raise Busy(f"{where}: another process holds the write lock; nothing was changed") from error
        except sqlite3.OperationalError as error:
            if "readonly" in str(error):
                raise ReadOnly(f"{where}: {error}") from error
            raise Unavailable(f"{where}: {error}") from error
        except sqlite3.DatabaseError as error:
            raise CorruptRecord(self.path, str(error)) from error


def _refuse_foreign(path: str) -> None:
    """Refuse a cache that another program has filled, before diskcache changes its settings."""
    file = os.path.join(path, "cache.db")
    if not os.path.exists(file):
        if os.listdir(path):
            raise FormatMismatch(path, "a folder with something else in it", "an empty folder, or a kvpersist store")
        return
    try:
        with closing(sqlite3.connect(f"file:{file.replace('%', '%25').replace('?', '%3f')}?mode=ro", uri=True)) as db:
            tables = {name for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
            if not tables:
                return
            if {"Settings", "Cache"} <= tables:
                mark = db.execute("SELECT value FROM Settings WHERE key = ?", (_MARK,)).fetchone()
                if mark is not None and mark[0] == _FORMAT:
                    return
                if mark is None and db.execute("SELECT 1 FROM Cache LIMIT 1").fetchone() is None:
                    return
    except sqlite3.DatabaseError as error:
        raise FormatMismatch(path, f"no database of diskcache ({error})", "a kvpersist store") from error
    raise FormatMismatch(path, "the cache of another program, or a newer format", "a kvpersist store")


async def _settled(thread: ThreadPoolExecutor, call: Callable[[], T]) -> T:
    """Make a call. Cancelled before it has begun, it is never made; afterwards it is waited for."""
    job = thread.submit(call)
    future = asyncio.wrap_future(job)
    try:
        return await asyncio.shield(future)
    except asyncio.CancelledError:
        if not job.cancel():
            while not future.done():
                with suppress(asyncio.CancelledError):  # cancelled again: the first one is still under way
                    await asyncio.wait([future])
        if future.done() and not future.cancelled():
            future.exception()  # taken note of
        raise


_drivers: Final[weakref.WeakSet[DiskcacheDriver]] = weakref.WeakSet()


def _forked() -> None:
    for driver in list(_drivers):
        driver._refusal = ForkedStore


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)
