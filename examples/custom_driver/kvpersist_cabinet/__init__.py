"""One file that only grows, and its entries in memory: a small store with quick reads, for one process.

What is written at once becomes one frame at the end of the file, synced to the disk before it is
answered: its length, its checksum, and the batches as MessagePack. Opening reads the file from its
beginning. A frame that a crash cut off was never answered, and is removed; a damaged one with more
behind it is refused. `compact` writes the file anew when half of it is no longer true.

Everything is in memory, so the whole store has to fit there. POSIX only, for its lock.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import struct
import time
from bisect import bisect_left, insort
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import Annotated, Any, ClassVar, Final, NamedTuple, Self, TypeVar
from zlib import crc32

import msgspec

from kvpersist.driver import ABSENT, Batch, Capabilities, Clock, Committed, Delete, Entry, Op, Put
from kvpersist.errors import (
    BadKey,
    Busy,
    CommitUnknown,
    Conflict,
    FormatMismatch,
    KvError,
    ReadOnly,
    StoreClosed,
    Unavailable,
    Unsupported,
    ValueTooLarge,
)

__all__ = ["CabinetDriver", "CabinetOptions"]

_MAGIC: Final = b"kvpersist-cabinet 1\n"
_FRAME: Final = struct.Struct(">QI")  # length and CRC32 of what follows
_MAX_VALUE: Final = 16 << 20  # bytes; it is held in memory, and so is its frame
_SMALL: Final = 1 << 20  # bytes; a file below this is not written anew

_T = TypeVar("_T")


class _Change(NamedTuple):
    """What a frame says of a key: its entry, or that there is none (``version`` is empty)."""

    key: str
    value: bytes
    version: bytes
    expires_at: float | None


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(list[_Change]).decode


class CabinetOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``path``: the file, which is made if it is missing; its folder is not."""

    path: Annotated[str, msgspec.Meta(min_length=1)]


class CabinetDriver:
    """One file, locked while it is open. ``clock`` judges expiry."""

    api: ClassVar[int] = 1
    Options: ClassVar[type[msgspec.Struct]] = CabinetOptions

    def __init__(self, path: str) -> None:
        """Does not open the file; `open` is what a user calls."""
        self.capabilities = Capabilities(
            atomic_batch="all",
            conditional=True,
            conditional_delete=True,
            ordered=True,
            reverse=True,
            coalesce="writes",  # one sync for all that waits
            durable=True,
            cancel_settles=True,
            max_value_bytes=_MAX_VALUE,
            server="cabinet file",
        )
        self.clock: Clock = time.time
        self._path = path
        self._lock = self._file = -1
        self._size = 0
        self._entries: dict[str, Entry] = {}
        self._order: list[str] = []  # their keys; Python orders text as UTF-8 orders its bytes
        self._writing = asyncio.Lock()
        self._broken = ""
        self._closed = False

    @classmethod
    async def open(cls, options: CabinetOptions, /) -> Self:
        """Lock the file and read it, or make it.

        Raises:
            Busy: somebody has it open. FormatMismatch: it is no cabinet, or a damaged one.
            ReadOnly, Unavailable: the system refuses.
        """
        driver = cls(options.path)
        try:
            await _thread(driver._load)
        except BaseException:  # cancelled too: nothing may stay open
            await driver.close()
            raise
        return driver

    async def get(self, keys: Sequence[str]) -> list[Entry | None]:
        self._check()
        return [self._live(self._entries.get(key)) for key in keys]

    async def commit(self, batches: Sequence[Batch]) -> list[Committed | KvError]:
        self._check()
        if not batches:
            return []
        async with self._writing:
            self._check()
            changes: dict[str, _Change] = {}
            outcomes = [self._judged(batch, changes) for batch in batches]
            if changes:
                await _settled(self._write_and_apply(list(changes.values())))
            return outcomes

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
        self._check()
        if deref is not None:
            raise Unsupported("a scan with deref", "use deref_by_get")
        low = 0 if start is None else bisect_left(self._order, start)
        high = len(self._order) if end is None else bisect_left(self._order, end)
        found: list[Entry] = []
        for at in range(high - 1, low - 1, -1) if reverse else range(low, high):
            if len(found) >= limit:
                break
            if (entry := self._live(self._entries[self._order[at]])) is not None:
                found.append(msgspec.structs.replace(entry, value=b"") if keys_only else entry)
        return found

    async def compact(self, limit: int = 500) -> int:
        """Remove at most ``limit`` expired entries; write the file anew where half of it is old."""
        self._check()
        async with self._writing:
            self._check()
            now = self.clock()
            expired = [e.key for e in self._entries.values() if e.expires_at is not None and e.expires_at <= now]
            gone = [_Change(key, b"", b"", None) for key in expired[:limit]]
            if gone:
                await _settled(self._write_and_apply(gone))
            if self._size > _SMALL and self._size > 2 * sum(map(_bytes_of, self._entries.values())):
                await _settled(_thread(self._rewrite))
            return len(gone)

    async def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        async with self._writing:  # a commit under way ends first
            for descriptor in (self._file, self._lock):
                if descriptor >= 0:
                    os.close(descriptor)
            self._file = self._lock = -1

    # ---- what a batch does

    def _judged(self, batch: Batch, changes: dict[str, _Change]) -> Committed | KvError:
        """Judge the batch by the state after ``changes``, and add its own where it holds."""
        for position, op in enumerate(batch.ops):
            if refused := _refusal(op):
                return refused
            if op.expect is not None:
                found = self._version(op.key, changes)
                if found != op.expect:
                    return Conflict(op.key, op.expect, found, position)
        now = self.clock()
        for op in batch.ops:
            if isinstance(op, Put) and (op.expires_at is None or op.expires_at > now):
                changes[op.key] = _Change(op.key, op.value, batch.version, op.expires_at)
            elif isinstance(op, Put | Delete):
                changes[op.key] = _Change(op.key, b"", b"", None)
        return Committed(batch.version)

    def _version(self, key: str, changes: dict[str, _Change]) -> Any:
        if key in changes:
            return changes[key].version or ABSENT
        entry = self._live(self._entries.get(key))
        return ABSENT if entry is None else entry.version

    def _apply(self, changes: Iterable[_Change]) -> None:
        for key, value, version, expires_at in changes:
            if version:
                if key not in self._entries:
                    insort(self._order, key)
                self._entries[key] = Entry(key, value, version, expires_at)
            elif self._entries.pop(key, None) is not None:
                del self._order[bisect_left(self._order, key)]

    def _live(self, entry: Entry | None) -> Entry | None:
        return None if entry is None or (entry.expires_at is not None and entry.expires_at <= self.clock()) else entry

    def _check(self) -> None:
        if self._closed:
            raise StoreClosed("the cabinet was closed: open it again")
        if self._broken:
            raise Unavailable(f"{self._path}: {self._broken}: open it again")

    # ---- the file

    async def _write_and_apply(self, changes: list[_Change]) -> None:
        await _thread(self._write, changes)
        self._apply(changes)  # readers see it once it is on the disk

    def _write(self, changes: list[_Change]) -> None:
        """Append one frame; on an error nothing of it stays."""
        frame = _framed(changes)
        try:
            _write_all(self._file, frame)
            os.fsync(self._file)
        except OSError as error:
            try:
                os.ftruncate(self._file, self._size)
                os.fsync(self._file)
            except OSError as worse:
                self._broken = f"a failed write could not be undone ({worse.strerror})"
                raise CommitUnknown(tuple(one.key for one in changes), str(error)) from error
            raise Unavailable(f"{self._path}: {error.strerror}; nothing was changed") from error
        self._size += len(frame)

    def _load(self) -> None:
        try:
            self._lock = os.open(self._path + ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
            stored = _read_all(self._file)
            if not _MAGIC.startswith(stored[: len(_MAGIC)]):
                raise FormatMismatch(self._path, "another file", "a kvpersist cabinet")
            if len(stored) < len(_MAGIC):  # new, or its making was cut off
                os.ftruncate(self._file, 0)
                _write_all(self._file, _MAGIC)
                os.fsync(self._file)
                _sync_folder(self._path)
                stored = _MAGIC
            self._size = self._replay(stored)
            if self._size < len(stored):
                os.ftruncate(self._file, self._size)
                os.fsync(self._file)
        except BlockingIOError as error:
            raise Busy(f"{self._path} is open elsewhere: close it there first") from error
        except PermissionError as error:
            raise ReadOnly(f"{self._path}: {error.strerror}") from error
        except OSError as error:
            raise Unavailable(f"{self._path}: {error.strerror}") from error
        self._order = sorted(self._entries)

    def _replay(self, stored: bytes) -> int:
        """Read frame after frame; return where the last whole one ends."""
        at = len(_MAGIC)
        while at + _FRAME.size <= len(stored):
            length, check = _FRAME.unpack_from(stored, at)
            end = at + _FRAME.size + length
            payload = stored[at + _FRAME.size : end]
            if end > len(stored) or (crc32(payload) != check and end == len(stored)):
                break  # a write that was cut off, and never answered
            if crc32(payload) != check:
                raise FormatMismatch(self._path, f"damage at byte {at}", "what was written")
            for key, value, version, expires_at in _decode(payload):
                if version:
                    self._entries[key] = Entry(key, value, version, expires_at)
                else:
                    self._entries.pop(key, None)
            at = end
        return at

    def _rewrite(self) -> None:
        """Write the entries into a new file, and put it in the place of the old one."""
        partial = self._path + ".new"
        new = -1
        try:
            new = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC, 0o600)
            _write_all(new, _MAGIC)
            size = len(_MAGIC)
            for entry in self._entries.values():
                frame = _framed([_Change(entry.key, entry.value, entry.version, entry.expires_at)])
                _write_all(new, frame)
                size += len(frame)
            os.fsync(new)
            os.rename(partial, self._path)
        except OSError as error:
            if new >= 0:
                os.close(new)
            with suppress(OSError):
                os.unlink(partial)
            raise Unavailable(f"{self._path}: {error.strerror}; nothing was changed") from error
        old, self._file, self._size = self._file, new, size
        os.close(old)
        _sync_folder(self._path)


def _refusal(op: Op) -> KvError | None:
    try:
        op.key.encode()
    except UnicodeEncodeError:
        return BadKey(op.key, "no UTF-8 text: it holds a lone surrogate")
    if isinstance(op, Put) and len(op.value) > _MAX_VALUE:
        return ValueTooLarge(op.key, len(op.value), _MAX_VALUE)
    return None


def _framed(changes: list[_Change]) -> bytes:
    payload = _encode(changes)
    return _FRAME.pack(len(payload), crc32(payload)) + payload


def _bytes_of(entry: Entry) -> int:
    return len(entry.key) + len(entry.value) + 40  # about what its frame takes beside


def _read_all(descriptor: int) -> bytes:
    with os.fdopen(os.dup(descriptor), "rb") as file:
        file.seek(0)
        return file.read()


def _write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def _sync_folder(path: str) -> None:
    folder = os.open(os.path.dirname(os.path.abspath(path)), os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


async def _thread(function: Callable[..., _T], *arguments: Any) -> _T:
    return await _settled(asyncio.to_thread(function, *arguments))


async def _settled(work: Any) -> Any:
    """Await ``work`` to its end also when the caller is cancelled: a thread cannot be stopped half way."""
    task = asyncio.ensure_future(work)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is None:
        return task.result()
    task.exception()  # has been seen
    raise cancelled
