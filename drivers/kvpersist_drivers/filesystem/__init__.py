"""A folder of text files that people and git can read: one file per key.

``kv:session:42`` is the file ``kv~d/session~d/42.json``: a header line, then the value as it is. A
file is written beside its place and renamed into it; a batch of several is written down first, in a
journal that whoever comes next carries out, so it happens whole or not at all, for readers too.
With ``durability="full"`` an answer is given when files and folders are on the disk.

Several processes may use one folder on a local disk (not on a network file system): one lock per
store is taken by every commit, which waits for it up to ``busy_timeout`` and then fails with
``Busy``. A cancelled ``commit`` that has not begun never runs; one that has begun is waited for.

Values that are streamed are read and written in a thread of their own, with aiofiles
(``kvpersist[files]``); a file that is being written is in the stage, locked, and is renamed at the end.

``get`` of up to 32 keys reads on the event loop, files of 64 KB and more in a thread. It raises
``CorruptRecord`` for a file that is not what was written. ``scan`` gives a damaged file an entry
whose value no frame begins with: whoever decodes it names the key, and the list goes on.
"""

from __future__ import annotations

import asyncio
import os
import time
import weakref
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Annotated, Any, ClassVar, Final, Literal, Self, TypeVar

import msgspec
from msgspec import Meta, Struct

from kvpersist.driver import Batch, Capabilities, Clock, Committed, Entry, Expect, Put, needs_extra
from kvpersist.errors import BadKey, BadOption, ForkedStore, KvError, StoreClosed
from kvpersist.urls import UrlParts
from kvpersist_drivers.filesystem._at import Held, remove
from kvpersist_drivers.filesystem._counter import Counter
from kvpersist_drivers.filesystem._errors import translated
from kvpersist_drivers.filesystem._header import pack
from kvpersist_drivers.filesystem._names import MAX_KEY_BYTES
from kvpersist_drivers.filesystem._names import place as place_of
from kvpersist_drivers.filesystem._place import prepare
from kvpersist_drivers.filesystem._reader import NotInline, Reader
from kvpersist_drivers.filesystem._stream import stage
from kvpersist_drivers.filesystem._thread import Thread
from kvpersist_drivers.filesystem._tree import STAGE, Tree
from kvpersist_drivers.filesystem._writer import Writer

__all__ = ["FilesystemDriver", "FilesystemOptions"]

T = TypeVar("T")

_INLINE_KEYS: Final = 32
_INLINE_BYTES: Final = 64 << 10
_STREAMED: Final = 256 << 10  # bytes read at once
_SYNCED: Final = 32 << 20  # bytes after which a stream is synced, so that its end does not wait for all of it
_PERIOD: Final = 0.01  # seconds between two looks at whether something has changed
_CLOSED: Final = "this filesystem driver was closed, or opened before a fork: open it again"


class FilesystemOptions(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where the store is, and how it is kept.

    Attributes:
        path: the folder; missing ones are made, for their owner only.
        durability: "full": an acknowledged write is on the disk; "normal": it survives the process,
            and the machine's crash can take the last ones.
        busy_timeout: seconds to wait for other writers.
    """

    path: Annotated[str, Meta(min_length=1)]
    durability: Literal["full", "normal"] = "full"
    busy_timeout: Annotated[float, Meta(ge=0)] = 5.0

    @classmethod
    def from_url(cls, parts: UrlParts) -> dict[str, Any]:
        """``file:///abs/dir``, or a bare path; `kvpersist.urls` asks."""
        if "://" not in parts.url:
            return {"path": parts.path}
        for lost in ("port", "username", "password", "params"):
            if getattr(parts, lost) not in ("", None, {}):
                raise BadOption("url", f"{parts.scheme}:// takes no {lost}")
        if parts.host not in ("", "localhost"):
            raise BadOption("url", "two slashes name a host: write file:///abs/dir, or ./dir/ for a relative path")
        if not parts.path:
            raise BadOption("path", "it is required")
        return {"path": "/" + parts.path.lstrip("/")}


class FilesystemDriver:
    """One folder. ``clock`` judges expiry."""

    api: ClassVar[int] = 1
    Options: ClassVar[type[Struct]] = FilesystemOptions

    def __init__(self, options: FilesystemOptions) -> None:
        """`open` is what a user calls: this one expects the folder to be prepared."""
        self.root = os.path.realpath(options.path)
        self.capabilities = Capabilities(
            atomic_batch="all",
            conditional=True,
            conditional_delete=True,
            ordered=True,
            reverse=True,
            deref=True,
            coalesce="writes",
            watch="poll",
            durable=options.durability == "full",
            shared=True,
            cancel_settles=True,
            preferred_codec="json",
            max_key_bytes=MAX_KEY_BYTES,
            server="files",
        )
        self.clock: Clock = time.time
        self._refusal: type[KvError] | None = None
        self._writes, self._reads = Thread("kvpersist-files-writer"), Thread("kvpersist-files-reader")
        self._streams = Thread("kvpersist-files-streams")
        self._sync = options.durability == "full"
        self._stage: Tree | None = None  # for the thread of streams
        sync, wait = options.durability == "full", options.busy_timeout
        self._writer = Writer(self.root, sync=sync, busy_timeout=wait, clock=self._now)
        self._reader = Reader(self.root, sync=sync, busy_timeout=wait, clock=self._now)
        self._inline = Reader(self.root, sync=sync, busy_timeout=wait, clock=self._now)
        _drivers.add(self)

    @classmethod
    async def open(cls, options: FilesystemOptions, /) -> Self:
        """Open the folder, or make it; finish what a process that died has left.

        Raises:
            FormatMismatch: it holds something else, or a newer format; it was not touched.
            ReadOnly: it is to be made and cannot. Busy: other processes held it for ``busy_timeout``.
            Unavailable: the disk failed. BadOption: an option has no meaning.
        """
        try:
            msgspec.convert(msgspec.structs.asdict(options), type(options))
        except msgspec.ValidationError as error:
            raise BadOption("file", str(error)) from error
        first = Thread("kvpersist-files-open")
        try:
            driver = await first.run(lambda: cls._opened(options), settle=True)
        finally:
            await first.close(_nothing)
        return driver

    @classmethod
    def _opened(cls, options: FilesystemOptions) -> Self:
        root = os.path.realpath(options.path)
        try:
            prepare(root, sync=options.durability == "full")
            driver = cls(options)
            driver._writer.open()
        except OSError as error:
            if isinstance(error, KvError):
                raise
            raise translated(error, "open", root) from error
        return driver

    async def get(self, keys: Sequence[str]) -> list[Entry | None]:
        if self._refusal is not None:
            raise self._refusal(_CLOSED)
        if len(keys) <= _INLINE_KEYS:
            try:
                return self._inline.get_inline(keys, _INLINE_BYTES)
            except NotInline:
                pass
        return await self._reading(partial(self._reader.get, keys))

    async def commit(self, batches: Sequence[Batch]) -> list[Committed | KvError]:
        if self._refusal is not None:
            raise self._refusal(_CLOSED)
        if not batches:
            return []
        return await self._writes.run(partial(self._writer.commit, list(batches)), settle=True)

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
        return await self._reading(partial(self._reader.scan, start, end, limit, reverse, keys_only, deref))

    async def read_stream(self, key: str) -> tuple[Entry, AsyncIterator[bytes]] | None:
        """As the protocol says. What was opened stays readable when the key is written or deleted."""
        with needs_extra("files", module="aiofiles"):
            import aiofiles
        found = await self._reading(partial(self._reader.open, key))
        if found is None:
            return None
        entry, held, start = found
        return entry, self._read_on(held, start, aiofiles.open)

    async def write_stream(
        self,
        key: str,
        pieces: AsyncIterator[bytes],
        *,
        version: bytes,
        expect: Expect | None = None,
        expires_at: float | None = None,
    ) -> Committed | KvError:
        if self._refusal is not None:
            raise self._refusal(_CLOSED)
        with needs_extra("files", module="aiofiles"):
            import aiofiles
        try:
            header = pack(key, version, expires_at, place_of(key)[2])
        except BadKey as error:
            return error
        streams = self._streams
        held = await streams.run(partial(self._staged, header), settle=True)
        try:
            with self._streaming("write_stream"):
                file = await aiofiles.open(held.descriptor, "wb", 0, closefd=False, executor=streams)
            unsynced = 0
            async for piece in pieces:
                with self._streaming("write_stream"), memoryview(piece) as left:
                    while left:
                        left = left[await file.write(left) :]
                    unsynced += len(piece)
                    if self._sync and unsynced >= _SYNCED:
                        unsynced = 0
                        await streams.run(partial(os.fsync, held.descriptor), settle=False)
            with self._streaming("write_stream"):
                if self._sync:
                    await streams.run(partial(os.fsync, held.descriptor), settle=False)
                placed = partial(self._writer.place_stream, held.name, Put(key, b"", expect, expires_at), version)
                return await self._writes.run(placed, settle=True)
        finally:
            self._later(partial(self._unstaged, held))

    async def watch(self, prefix: str) -> AsyncGenerator[tuple[str, ...]]:
        """Yield the empty tuple after a commit, or several, by whichever process.

        What a process changed just before it died is told after about as long again as that commit took.
        """
        counter = Counter(self.root, writing=False)
        try:
            loop = asyncio.get_running_loop()
            seen, since, silent = counter.read(), loop.time(), 0.0
            yield ()
            while True:
                await asyncio.sleep(_PERIOD)
                if self._refusal is not None:
                    raise self._refusal(_CLOSED)
                number = counter.read()
                if number != seen:
                    seen, since, silent = number, loop.time(), _PERIOD
                    yield ()
                elif number % 2 and loop.time() - since > silent:  # somebody is busy, or dead
                    silent = 2 * (loop.time() - since)
                    yield ()
        finally:
            counter.close()

    async def ping(self) -> None:
        await self._reading(self._reader.ping)

    async def compact(self, limit: int = 500) -> int:
        """Remove expired entries, of some thousands looked at, and folders that have become empty."""
        found: list[str] = []
        if await self._reading(self._reader.may_expire):
            found = await self._reading(partial(self._reader.expired, limit))
        if found:
            return await self._writes.run(partial(self._writer.sweep, found), settle=True)
        if self._writer.removed:  # by this driver: others look after their own
            self._writer.removed = False
            empty = await self._reading(self._reader.empty)
            await self._writes.run(partial(self._writer.prune, empty), settle=True)
        return 0

    async def close(self) -> None:
        if self._refusal is not None:  # closed, or of the parent process, whose threads are not here
            return
        self._refusal = StoreClosed
        await self._streams.close(self._close_stage)
        await self._writes.close(self._writer.close)
        await self._reads.close(self._reader.close)
        self._inline.close()

    async def _read_on(self, held: Held, start: int, opens: Callable[..., Any]) -> AsyncIterator[bytes]:
        if self._refusal is not None:
            raise self._refusal(_CLOSED)
        executor = self._streams
        try:
            with self._streaming("read_stream"):
                file = await opens(held.descriptor, "rb", 0, closefd=False, executor=executor)
                await file.seek(start)
            while True:
                with self._streaming("read_stream"):
                    piece = await file.read(_STREAMED)
                if not piece:
                    return
                yield piece
        finally:
            self._later(held.close)

    @contextmanager
    def _streaming(self, operation: str) -> Iterator[None]:
        try:
            yield
        except KvError:  # some are OSErrors themselves
            raise
        except OSError as error:
            raise translated(error, operation, self.root, reading=operation == "read_stream") from error
        except RuntimeError as error:
            if self._refusal is None:
                raise
            raise self._refusal(_CLOSED) from error  # its thread has ended

    def _staged(self, header: bytes) -> Held:
        try:
            if self._stage is None:
                self._stage = Tree(self.root)
            return stage(self._stage, header, sync=self._sync)
        except OSError as error:
            raise translated(error, "write_stream", self.root) from error

    def _unstaged(self, held: Held) -> None:
        """Remove the file, unless it was renamed into its place, and let go of it."""
        if self._stage is not None:
            with suppress(OSError):  # whoever opens the store next removes it
                folder = self._stage.folder(STAGE)
                if folder is not None:
                    remove(folder, held.name)
        held.close()

    def _later(self, call: Callable[[], None]) -> None:
        """Make a call in the thread of streams, after what that is doing; nobody waits for it."""
        try:
            self._streams.submit(call)
        except RuntimeError:  # it has ended
            call()

    def _close_stage(self) -> None:
        stage, self._stage = self._stage, None
        if stage is not None:
            stage.close()

    def _now(self) -> float:
        return self.clock()

    async def _reading(self, call: Callable[[], T]) -> T:
        if self._refusal is not None:
            raise self._refusal(_CLOSED)
        return await self._reads.run(call, settle=False)


def _nothing() -> None:
    pass


_drivers: Final[weakref.WeakSet[FilesystemDriver]] = weakref.WeakSet()


def _forked() -> None:
    for driver in list(_drivers):
        driver._refusal = ForkedStore


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)
