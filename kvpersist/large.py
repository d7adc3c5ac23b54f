"""Large values: written and read piece by piece, whole or absent, in bounded memory.

A value of more than `PIECE` bytes is kept beside its key, in the same partition::

    app:film                        the manifest: its commit is that of the value
    app:#large!c!<id>!<number>      a piece each, framed; where the driver has `Streams`, one value of all frames
    app:#large!o!<hash>!<id>        the owner: whose pieces they are, and until when their writer may be at work

The owner is written before the first piece and removed after the last one, and each write has an id
of its own. Pieces are removed when their owner is settled, or its time is over, and the manifest at
its key is of another id: first the owner is doomed, by compare-and-set, so that a writer that comes
back late cannot commit. docs/decisions/0013-large-values.md has the reasons.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Collection, Coroutine, Sequence
from contextlib import suppress
from hashlib import blake2b
from typing import Any, Final, Literal, Protocol, TypeVar
from zlib import crc32

import msgspec

from kvpersist import codec, keys
from kvpersist.driver import ABSENT, Capabilities, Clock, Committed, Delete, Driver, Entry, Expect, Op, Put, Streams
from kvpersist.errors import (
    BadRequest,
    CommitUnknown,
    Conflict,
    CorruptRecord,
    DeadlineExceeded,
    KeyTooLong,
    KvError,
    Unavailable,
    Unsupported,
    ValueReplaced,
)

__all__ = ["LEASE", "MARK", "PIECE", "LargeReader", "LargeValues", "LargeWriter", "area", "area_of"]

PIECE: Final = 256 << 10
"""Bytes of a piece. A value that fits into one is an ordinary value of bytes."""

LEASE: Final = 86_400.0
"""Seconds after which a writer that has written nothing is taken for dead."""

MARK: Final = "#large!"
"""Follows the partition in every key of pieces and owners."""

_TOGETHER: Final = 4  # pieces in one call: a drain takes 1 MiB
_FRAME: Final = 6  # bytes that a frame adds to its piece: format, schema, CRC32
_REMOVED: Final = 100  # entries removed by one batch
_OWNERS: Final = 32  # looked at together: what is at their keys by now may be of any size
_TURN: Final = 512  # owners looked at by one turn of the sweeper
_TIDY: Final = 5.0  # seconds that a write waits for the pieces of what it replaced to go; the sweep removes the rest

_T = TypeVar("_T")


class _Owner(msgspec.Struct, frozen=True):
    """``until``: seconds since 1970; counts while the state is "writing"."""

    key: str
    state: Literal["writing", "kept", "doomed"]
    until: float = 0.0


class _Level(Protocol):
    """What is needed of the store."""

    driver: Driver
    capabilities: Capabilities
    clock: Clock
    timeout: float | None
    _large: frozenset[str]

    async def _commit(self, ops: Sequence[Op]) -> bytes: ...
    async def _entries(self, keys: Sequence[str]) -> list[Entry | None]: ...
    async def _scan(
        self, start: str | None, end: str | None, *, limit: int, keys_only: bool = False
    ) -> list[Entry]: ...
    async def _keeps_large(self, partition: str) -> None: ...


def area(partition: str) -> str:
    """Return what the keys of pieces and owners in a partition begin with."""
    return f"{partition}:{MARK}" if partition else MARK


def area_of(key: str) -> str:
    """Return the beginning of the keys of pieces and owners, if ``key`` is one; otherwise nothing."""
    if MARK not in key:
        return ""
    found = area(keys.partition(key))
    return found if key.startswith(found) else ""


class LargeReader:
    """A value, piece by piece: iterate over it, or `read`.

    Attributes:
        key, version, expires_at: as of `Info`. size: bytes of the whole.
    """

    def __init__(self, entry: Entry, size: int, pieces: AsyncGenerator[bytes]) -> None:
        self.key, self.version, self.expires_at = entry.key, entry.version, entry.expires_at
        self.size = size
        self._pieces = pieces
        self._left = bytearray()  # taken from the pieces, and not given out yet

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        """Return the next bytes, at most 256 KiB of them.

        Raises:
            ValueReplaced: somebody wrote another value, or removed this one, meanwhile.
            CorruptRecord: a piece is damaged or gone; it is not returned.
        """
        if not self._left:
            return await anext(self._pieces)
        piece = bytes(self._left)
        self._left.clear()
        return piece

    async def read(self, size: int = -1) -> bytes:
        """Return the next ``size`` bytes, fewer only at the end; -1: all that are left. Raises as iteration does."""
        while size < 0 or len(self._left) < size:
            try:
                self._left += await anext(self._pieces)
            except StopAsyncIteration:
                break
        size = len(self._left) if size < 0 else size
        found = bytes(self._left[:size])
        del self._left[:size]
        return found

    async def _close(self) -> None:
        await self._pieces.aclose()


class LargeWriter:
    """Takes a value in parts of any size. It is there, whole, when its ``async with`` block has ended.

    Attributes:
        key: where it will be. size: bytes taken so far. version: of the value, after the block.
    """

    def __init__(
        self, values: LargeValues, key: str, expect: Expect | None, expiry: Callable[[], float | None]
    ) -> None:
        self.key, self.size = key, 0
        self.version: bytes | None = None
        self._values, self._level = values, values.level
        self._expect, self._expiry = expect, expiry
        self._id = os.urandom(8).hex()
        self._owner_key = _owners_of(key) + self._id
        self._owner = b""  # its version
        self._renewed = 0.0
        self._buffer = bytearray()
        self._pieces = self._crc = 0
        self._sink: _Chunks | _Stream | None = None  # None: it fits into one piece, so far
        self._flight: asyncio.Task[Any] | None = None
        self._writing = self._ended = False
        self._in_doubt = False  # a write whose answer was lost may come later: what it leaves must have an owner

    async def write(self, data: bytes | bytearray | memoryview) -> None:
        """Add ``data``, which may have any size.

        Raises:
            Unavailable, CommitUnknown: a piece could not be written; let the error end the block.
            BadRequest: the block has ended, or another task is writing.
        """
        if self._ended or self._writing:
            raise BadRequest("write inside the block of open_write(), one write at a time")
        self._writing = True
        try:
            with memoryview(data).cast("B") as view:
                at = 0
                while at < len(view):
                    if len(self._buffer) == PIECE:
                        await self._flush()
                    room = PIECE - len(self._buffer)
                    self._buffer += view[at : at + room]
                    at += room
                self.size += len(view)
        except BaseException:  # cancelled too: a part is missing
            self._ended = True
            raise
        finally:
            self._writing = False

    async def _commit(self) -> None:
        if self._ended:
            raise BadRequest("a write() failed or was cancelled: nothing is stored")
        self._ended = True
        if self._sink is None:
            payload = codec.frame(self.key, bytes(self._buffer), codec.RAW, 0)
            await self._run(self._put((Put(self.key, payload, self._expect, self._expiry()),)))
            return
        await self._flush()
        await self._run(self._sink.finish())
        manifest = codec.Manifest(self._id, self.size, self._crc, PIECE, isinstance(self._sink, _Stream))
        payload = codec.frame(self.key, msgspec.json.encode(manifest), codec.LARGE, 0)
        put = Put(self.key, payload, self._expect, self._expiry())
        if self._level.capabilities.atomic_batch != "none":
            await self._run(self._put((self._owned("kept"), put)))
            return
        await self._run(self._put((self._owned("writing"), put)))
        with suppress(KvError):  # its time will be over, too
            await self._level._commit((self._owned("kept"),))

    async def _abort(self) -> None:
        """Remove what was written, unless it is the value by now, or may become it."""
        self._ended = True
        flight = self._flight
        if flight is not None:
            await asyncio.wait([flight])  # it ends by its deadline
            if flight.cancelled() or isinstance(flight.exception(), CommitUnknown):
                self._in_doubt = True
        if self._sink is None or self.version is not None:
            return
        stopped = await self._sink.stop()
        if stopped and not self._in_doubt:
            with suppress(KvError):  # found by the sweep, when its time is over
                await self._values.remove(self._owner_key, self._piece_key(""))

    async def _flush(self) -> None:
        payload = bytes(self._buffer)
        self._buffer.clear()
        if self._sink is None:
            await self._run(self._begin())
        elif self._level.clock() > self._renewed + LEASE / 4:
            await self._run(self._renew())
        assert self._sink is not None
        key = self._piece_key(keys.encode(self._pieces))
        self._pieces += 1
        self._crc = crc32(payload, self._crc)
        await self._run(self._sink.add(Put(key, codec.frame(key, payload, codec.RAW, 0))))

    async def _begin(self) -> None:
        limit = self._level.capabilities.max_key_bytes
        longest = len(self._owner_key.encode())  # pieces have shorter keys
        if limit is not None and longest > limit:
            raise KeyTooLong(self.key, longest, limit)
        await self._level._keeps_large(keys.partition(self.key))
        await self._renew()
        native = isinstance(self._level.driver, Streams)
        self._sink = _Stream(self._level, self._piece_key(keys.encode(0))) if native else _Chunks(self._level)

    async def _renew(self) -> None:
        now = self._level.clock()
        self._owner = await self._told(self._owned("writing"))
        self._renewed = now

    def _owned(self, state: Literal["writing", "kept"]) -> Put:
        owner = _Owner(self.key, state, self._level.clock() + LEASE if state == "writing" else 0.0)
        value = codec.frame(self._owner_key, msgspec.json.encode(owner), codec.RAW, 0)
        expect = (self._owner or ABSENT) if self._level.capabilities.conditional else None
        return Put(self._owner_key, value, expect)

    async def _put(self, ops: Sequence[Put]) -> None:
        self._owner = self.version = await self._told(*ops)

    async def _told(self, *ops: Put) -> bytes:
        try:
            return await self._level._commit(ops)
        except Conflict as error:
            if error.key == self._owner_key:
                raise Unavailable(
                    f"nothing was written to {self.key!r} for {LEASE / 3600:g} hours, and a sweep removed its pieces; "
                    "nothing was changed: write it again"
                ) from error
            raise Conflict(error.key, error.expected, error.found) from error

    async def _run(self, call: Coroutine[Any, Any, _T]) -> _T:
        """Await a call that goes on when this task is cancelled: `_abort` waits for it, and knows how it ended."""
        self._flight = asyncio.create_task(call)
        return await asyncio.shield(self._flight)

    def _piece_key(self, number: str) -> str:
        return f"{_pieces_of(self.key, self._id)}{number}"


class LargeValues:
    """The large values of one store."""

    def __init__(self, level: _Level) -> None:
        self.level = level
        self._cursor = ("", "")  # partition and owner at which the next turn of the sweeper begins

    async def open(self, key: str) -> LargeReader | None:
        """Begin to read; None if there is no such key."""
        while True:
            [entry] = await self.level._entries([key])
            if entry is None:
                return None
            framed = codec.unframe(key, entry.value)
            if framed.codec != codec.LARGE:
                return LargeReader(entry, len(framed.payload), _cut(framed.payload))
            manifest = codec.manifest_of(key, framed)
            if not manifest.streamed:
                return LargeReader(entry, manifest.size, self._checked(entry, manifest, self._chunks(key, manifest)))
            frames = await self._opened(key, manifest)
            if frames is not None:
                return LargeReader(entry, manifest.size, self._checked(entry, manifest, frames))
            if await self._is_still(key, manifest):
                raise CorruptRecord(key, "the pieces of its value are gone")

    async def tidy(self, changed: Collection[str]) -> None:
        """Remove what was kept for keys that now have another value, or none. Never fails: the sweep does the rest."""
        changed = {key for key in changed if keys.partition(key) in self.level._large}
        if not changed:
            return
        with suppress(KvError, TimeoutError):
            async with asyncio.timeout(_TIDY):
                if len(changed) <= _TOGETHER:
                    for key in changed:
                        await self._sweep(_owners_of(key), _owners_of(key), None, changed)
                else:
                    for partition in {keys.partition(key) for key in changed}:
                        prefix = f"{area(partition)}o!"
                        await self._sweep(prefix, prefix, None, changed)

    async def sweep(self, *, all_: bool) -> None:
        """Remove what no manifest names and no writer is at work on; unless ``all_``, a part, and the next later."""
        left = None if all_ else _TURN
        begin, start = ("", "") if all_ else self._cursor
        self._cursor = ("", "")
        for partition in sorted(self.level._large):
            if partition < begin:
                continue
            prefix = f"{area(partition)}o!"
            left, at = await self._sweep(prefix, start if partition == begin and start else prefix, left, None)
            if left == 0:
                self._cursor = (partition, at)
                return

    async def remove(self, owner_key: str, pieces: str) -> None:
        """Remove the pieces whose keys begin with ``pieces``, then their owner."""
        most = min(_REMOVED, self.level.capabilities.max_batch or _REMOVED)
        while page := await self.level._scan(pieces, keys.prefix_end(pieces), limit=most, keys_only=True):
            await self.level._commit([Delete(entry.key) for entry in page])
        await self.level._commit((Delete(owner_key),))

    async def _sweep(
        self, prefix: str, start: str, left: int | None, of: Collection[str] | None
    ) -> tuple[int | None, str]:
        """Judge owners from ``start`` on, ``left`` at most; return how many more may be, and where to go on."""
        while True:
            most = _OWNERS if left is None else min(left, _OWNERS)
            page = await self.level._scan(start, keys.prefix_end(prefix), limit=most)
            await self._judge(page, of)
            if page:
                start = page[-1].key + "\0"
            if left is not None:
                left -= len(page)
            if len(page) < most or left == 0:
                return left, start

    async def _judge(self, page: Sequence[Entry], of: Collection[str] | None) -> None:
        now = self.level.clock()
        over: list[tuple[Entry, _Owner]] = []
        for entry in page:
            owner = _owner(entry)
            if owner is None or (of is not None and owner.key not in of):
                continue
            if owner.state != "writing" or owner.until <= now:
                over.append((entry, owner))
        there = list({owner.key for _, owner in over})  # read after the owners: what is gone by then stays so
        found = dict(zip(there, await self.level._entries(there), strict=True))
        for entry, owner in over:
            id_ = entry.key.rpartition("!")[2]
            if owner.state != "doomed":
                if _names(found[owner.key], id_):
                    continue
                doomed = msgspec.json.encode(_Owner(owner.key, "doomed"))
                expect = entry.version if self.level.capabilities.conditional else None
                try:
                    await self.level._commit((Put(entry.key, codec.frame(entry.key, doomed, codec.RAW, 0), expect),))
                except Conflict:  # its writer was not dead, or somebody else removes it
                    continue
            await self.remove(entry.key, _pieces_of(owner.key, id_))

    async def _checked(
        self, entry: Entry, manifest: codec.Manifest, frames: AsyncGenerator[tuple[str, bytes]]
    ) -> AsyncGenerator[bytes]:
        """Yield what is in the frames, as long as it is what was written."""
        crc = size = 0
        try:
            async for key, frame in frames:
                try:
                    payload = codec.unframe(key, frame).payload
                except CorruptRecord as error:
                    raise CorruptRecord(entry.key, f"{error.reason}, in the piece {key!r}") from error
                if len(payload) != min(manifest.piece, manifest.size - size):
                    raise CorruptRecord(entry.key, f"the piece {key!r} has {len(payload)} bytes")
                size += len(payload)
                crc = crc32(payload, crc)
                if size == manifest.size and crc != manifest.crc:
                    raise CorruptRecord(entry.key, "checksum mismatch of the whole")
                yield payload
        finally:
            await frames.aclose()

    async def _chunks(self, key: str, manifest: codec.Manifest) -> AsyncGenerator[tuple[str, bytes]]:
        count = _count(manifest)
        for first in range(0, count, _TOGETHER):
            wanted = [_piece_name(key, manifest, number) for number in range(first, min(first + _TOGETHER, count))]
            found = await self.level._entries(wanted)
            while found:
                entry = found.pop(0)  # given out, so not held
                if entry is not None:
                    yield entry.key, entry.value
                elif await self._is_still(key, manifest):
                    raise CorruptRecord(key, f"the piece {wanted[-1 - len(found)]!r} is gone")
                else:
                    raise ValueReplaced(key)

    async def _opened(self, key: str, manifest: codec.Manifest) -> AsyncGenerator[tuple[str, bytes]] | None:
        driver = self.level.driver
        if not isinstance(driver, Streams):
            raise Unsupported("a value that was written as one stream", "open the store without what hides its driver")
        body = _piece_name(key, manifest, 0)
        try:
            async with asyncio.timeout(self.level.timeout):
                found = await driver.read_stream(body)
        except TimeoutError as error:
            raise DeadlineExceeded("read_stream", self.level.timeout or 0) from error
        return None if found is None else self._frames(key, manifest, found[1])

    async def _frames(
        self, key: str, manifest: codec.Manifest, stream: AsyncIterator[bytes]
    ) -> AsyncGenerator[tuple[str, bytes]]:
        """Cut a stream into the frames that were put into it."""
        left = bytearray()
        try:
            for number in range(_count(manifest)):
                wanted = min(manifest.piece, manifest.size - number * manifest.piece) + _FRAME
                while len(left) < wanted:
                    async with asyncio.timeout(self.level.timeout):
                        left += await anext(stream)
                frame = bytes(memoryview(left)[:wanted])
                del left[:wanted]
                yield _piece_name(key, manifest, number), frame
        except StopAsyncIteration:
            raise CorruptRecord(key, "the stream of its pieces ends too early") from None
        except TimeoutError as error:
            raise DeadlineExceeded("read_stream", self.level.timeout or 0) from error
        finally:
            close = getattr(stream, "aclose", None)
            if close is not None:
                await close()

    async def _is_still(self, key: str, manifest: codec.Manifest) -> bool:
        """Whether the value at ``key`` is this one; a damaged one may be."""
        [entry] = await self.level._entries([key])
        return _names(entry, manifest.id)


class _Chunks:
    """Pieces under keys of their own, some in a batch."""

    def __init__(self, level: _Level) -> None:
        self._level = level
        self._most = min(_TOGETHER, level.capabilities.max_batch or _TOGETHER)
        self._waiting: list[Put] = []

    async def add(self, piece: Put) -> None:
        self._waiting.append(piece)
        if len(self._waiting) == self._most:
            await self.finish()

    async def finish(self) -> None:
        waiting, self._waiting = self._waiting, []
        if waiting:
            await self._level._commit(waiting)

    async def stop(self) -> bool:
        """Whether nothing of it can still be written."""
        return True


class _Stream:
    """Pieces as one value of the driver's, which takes them as they come."""

    def __init__(self, level: _Level, key: str) -> None:
        assert isinstance(level.driver, Streams)
        self._level = level
        self._queue: asyncio.Queue[bytes | None] = asyncio.Queue(1)
        call = level.driver.write_stream(key, self._pieces(), version=os.urandom(8))
        self._task = asyncio.ensure_future(call)

    async def add(self, piece: Put) -> None:
        await self._hand(piece.value)

    async def finish(self) -> None:
        await self._hand(None)
        done, _ = await asyncio.wait([self._task], timeout=self._level.timeout)
        if not done:
            raise DeadlineExceeded("write_stream", self._level.timeout or 0)
        self._raise_unless_committed()

    async def stop(self) -> bool:
        """End it, unless it has; whether nothing of it can still be written."""
        ended = self._task.done()
        if not ended:
            self._task.cancel()
            await asyncio.wait([self._task], timeout=self._level.timeout)
        if self._task.done() and not self._task.cancelled():
            self._task.exception()  # taken note of
        return ended or (self._task.done() and self._level.capabilities.cancel_settles)

    async def _hand(self, piece: bytes | None) -> None:
        handing = asyncio.ensure_future(self._queue.put(piece))
        try:
            done, _ = await asyncio.wait(
                [handing, self._task], timeout=self._level.timeout, return_when=asyncio.FIRST_COMPLETED
            )
        finally:
            handing.cancel()
        if self._task in done and piece is not None:
            self._raise_unless_committed()
            raise Unavailable("the driver ended its stream early; nothing was changed")
        if not done:
            raise DeadlineExceeded("write_stream", self._level.timeout or 0)

    async def _pieces(self) -> AsyncIterator[bytes]:
        while (piece := await self._queue.get()) is not None:
            yield piece

    def _raise_unless_committed(self) -> None:
        outcome = self._task.result()
        if not isinstance(outcome, Committed):
            raise outcome


def _owners_of(key: str) -> str:
    hashed = blake2b(key.encode(), digest_size=8).hexdigest()
    return f"{area(keys.partition(key))}o!{hashed}!"


def _pieces_of(key: str, id_: str) -> str:
    return f"{area(keys.partition(key))}c!{id_}!"


def _count(manifest: codec.Manifest) -> int:
    return -(-manifest.size // manifest.piece)


def _piece_name(key: str, manifest: codec.Manifest, number: int) -> str:
    return _pieces_of(key, manifest.id) + keys.encode(number)


def _owner(entry: Entry) -> _Owner | None:
    """What is stored; None if it is damaged: what it owns stays where it is."""
    try:
        return msgspec.json.decode(codec.unframe(entry.key, entry.value).payload, type=_Owner)
    except (CorruptRecord, msgspec.DecodeError):
        return None


def _names(entry: Entry | None, id_: str) -> bool:
    """Whether the value is the large one of this id; a damaged one may be."""
    if entry is None:
        return False
    try:
        framed = codec.unframe(entry.key, entry.value)
        return framed.codec == codec.LARGE and codec.manifest_of(entry.key, framed).id == id_
    except CorruptRecord:
        return True


async def _cut(payload: bytes) -> AsyncGenerator[bytes]:
    for at in range(0, len(payload), PIECE):
        yield payload[at : at + PIECE]
