"""Buckets: S3 and what speaks its protocol, Google Cloud Storage, Azure Blob Storage, any file system of fsspec.

An entry is an object: a header of 20 bytes and the value, under the prefix of the store and the escaped key
(`kvpersist_drivers.buckets._names`). A batch runs operation by operation; batches that share no key run side by
side. What a service keeps of conditions is tried when the store is opened. Needs ``kvpersist[s3]``, ``[gcs]``,
``[azure]`` or ``[fsspec]``.

Requests: a get one, side by side for several keys; an unconditional put or delete one; a conditional one one
where the entry was seen lately, otherwise two; with an expiry one more. A scan: one for each thousand names, and
one for each entry. A service that ignores conditions on a DELETE takes tombstones, see `Records`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, ClassVar, Final, Self, TypeVar

from msgspec import Struct, structs

from kvpersist.driver import (
    Batch,
    Capabilities,
    Check,
    Clock,
    Committed,
    Delete,
    Entry,
    Expect,
    Op,
    Put,
    milliseconds,
    needs_extra,
    packed_header,
)
from kvpersist.errors import (
    BadKey,
    BadOption,
    CommitUnknown,
    Conflict,
    KeyTooLong,
    KvError,
    ReadOnly,
    StoreClosed,
    Unsupported,
    ValueTooLarge,
)

with needs_extra("fsspec", module="fsspec"):
    import fsspec.asyn  # noqa: F401  # pyright: ignore[reportUnusedImport]

from kvpersist_drivers.buckets import _open, _streams
from kvpersist_drivers.buckets._names import INTERNAL_BYTES, MAX_NAME, escaped, noted, unescaped
from kvpersist_drivers.buckets._options import BucketOptions, Place
from kvpersist_drivers.buckets._order import Job, Queue
from kvpersist_drivers.buckets._plain import PlainStore
from kvpersist_drivers.buckets._probe import probed
from kvpersist_drivers.buckets._records import Records, Seen
from kvpersist_drivers.buckets._scan import Due, Range
from kvpersist_drivers.buckets._store import Conditions, Listed, ObjectStore

__all__ = ["BucketDriver", "BucketOptions"]

_CONCURRENCY: Final = 32
_GRACE: Final = 86400.0  # seconds
_SHORT: Final = 400  # bytes of keys that are not too long wherever the prefix leaves room
_CLOSING: Final = 5.0  # seconds that calls under way get to end

_T = TypeVar("_T")
_Found = TypeVar("_Found")


class BucketDriver:
    """The entries below one prefix. Made by `open`, or by `over` on a file system that stays the caller's."""

    api: ClassVar[int] = 1
    Options: ClassVar[type[Struct]] = BucketOptions

    def __init__(self, store: ObjectStore, root: str, *, concurrency: int = _CONCURRENCY, grace: float | None = _GRACE):
        """Does not connect; `open` and `over` are what a user calls."""
        self._room = MAX_NAME - len(root.encode()) - INTERNAL_BYTES
        if self._room < 100:
            raise BadOption("url", f"its prefix leaves {self._room} bytes for keys: shorten it")
        self.capabilities = Capabilities(
            ordered=True, max_key_bytes=min(512, self._room), max_value_bytes=1 << 30, server=store.server
        )
        self._store = store
        self._root = root
        self._records = Records(store, root, grace)
        self._queue = Queue()
        self._concurrency = concurrency
        self._reading = asyncio.Semaphore(concurrency)
        self._writing = asyncio.Semaphore(concurrency)
        self._readers: set[asyncio.Future[None]] = set()
        self._denied: str | None = None  # why this user cannot write
        self._closed = False

    @property
    def clock(self) -> Clock:
        """Seconds since 1970, as they judge expiry; replaced in tests."""
        return self._records.clock

    @clock.setter
    def clock(self, clock: Clock) -> None:
        self._records.clock = clock

    @classmethod
    async def open(cls, options: BucketOptions, /) -> Self:
        """Reach the bucket, and try what its service keeps.

        Raises:
            BadOption: the URL is wrong, there is no such bucket, or its user may not read it.
            Unavailable: the service cannot be reached. Unsupported: it does not list names in their order.
        """
        place = Place.of(options)
        if options.client is not None:
            root = f"{place.bucket}/{place.root}" if place.bucket else place.root.partition("://")[2]
            return await cls.over(options.client, root, concurrency=options.concurrency, grace=options.grace)
        store, root = await asyncio.to_thread(_open.opened, place, 2 * options.concurrency)
        return await cls._over(store, root, options.concurrency, options.grace)

    @classmethod
    async def over(
        cls, filesystem: Any, root: str, *, concurrency: int = _CONCURRENCY, grace: float | None = _GRACE
    ) -> Self:
        """Use a file system of fsspec, which is not closed by `close`; ``root`` is ``bucket/prefix``.

        One that is asynchronous must have been made with ``asynchronous=True``.
        """
        store, root = _open.over(filesystem, root)
        return await cls._over(store, root, concurrency, grace)

    @classmethod
    async def _over(cls, store: ObjectStore, root: str, concurrency: int, grace: float | None) -> Self:
        try:
            driver = cls(store, root, concurrency=concurrency, grace=grace)
            await driver._probe()
        except BaseException:  # cancelled too: nothing may stay open
            await store.close()
            raise
        return driver

    async def get(self, keys: Sequence[str]) -> list[Entry | None]:
        async def read(key: str) -> Entry | None:
            name = self._root + escaped(key)
            return None if self._too_long(key) else await self._records.read(key, name)

        async with self._reader():
            unique = list(dict.fromkeys(keys))
            found = dict(zip(unique, await self._each(read, unique), strict=True))
        return [found[key] for key in keys]

    async def commit(self, batches: Sequence[Batch]) -> list[Committed | KvError]:
        self._refuse([op for batch in batches for op in batch.ops])
        started = [self._mistake(batch) or self._begin(batch) for batch in batches]
        jobs = [one for one in started if isinstance(one, Job)]
        if jobs:
            await self._queue.wait(jobs)
        return [
            self._answer(one, batch) if isinstance(one, Job) else one
            for one, batch in zip(started, batches, strict=True)
        ]

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
        if reverse or deref is not None:
            raise Unsupported("a reverse scan" if reverse else "a scan with deref")

        async def one(item: tuple[str, Listed]) -> Entry | None:
            key, listed = item
            if not keys_only:
                return await self._records.read(key, listed.name)
            seen = await self._records.look(key, listed.name, listed.tag)
            return _without_value(key, seen) if seen is not None and self._records.is_live(seen) else None

        async with self._reader():
            if limit <= 0 or (start is not None and end is not None and start >= end):
                return []
            if start and end == start + "\0":  # one key
                single = (start, Listed(self._root + escaped(start), 0, ""))
                found = [] if self._too_long(start) else await self._each(one, [single])
                return [entry for entry in found if entry is not None]
            left = Range(self._store, self._root, start, end)
            entries: list[Entry] = []
            while left.more and len(entries) < limit:
                page = await left.page(limit - len(entries))
                entries += [entry for entry in await self._each(one, page) if entry is not None]
        return entries

    async def compact(self, limit: int = 500) -> int:
        """Remove at most ``limit`` expired entries, and what is left of those deleted ``grace`` ago."""
        if self._denied is not None:
            return 0
        removed = 0
        async with self._reader():
            notes = Due(self._store, self._root, int(self.clock() * 1000))
            while notes.more and removed < limit:
                waiting = await notes.page()
                while waiting and removed < limit:
                    now, waiting = waiting[: limit - removed], waiting[limit - removed :]
                    removed += sum(await self._each(self._clear, now))
        return removed

    async def ping(self) -> None:
        async with self._reader():
            await self._store.list(self._root, self._root, 1)

    async def read_stream(self, key: str) -> tuple[Entry, AsyncIterator[bytes]] | None:
        """As `Streams.read_stream`; one request, whose answer is read as the pieces are asked for."""
        async with self._reader():
            if self._too_long(key):
                return None
            stream = await self._store.read(self._root + escaped(key))
            if stream is None:
                return None
            found = await _streams.read(key, stream)
            if found is not None and (expires_at := found[0].expires_at) is not None and expires_at <= self.clock():
                await found[1].aclose()
                return None
            return found

    async def write_stream(
        self,
        key: str,
        pieces: AsyncIterator[bytes],
        *,
        version: bytes,
        expect: Expect | None = None,
        expires_at: float | None = None,
    ) -> Committed | KvError:
        """As `Streams.write_stream`; a value of more than 8 MiB is a multipart upload."""
        if expires_at is not None and expires_at <= self.clock():
            async for _ in pieces:
                continue
            [outcome] = await self.commit([Batch((Put(key, b"", expect, expires_at),), version)])
            return outcome
        batch = Batch((Put(key, b"", expect, expires_at),), version)
        self._refuse(batch.ops)
        if (mistake := self._mistake(batch)) is not None:
            return mistake
        expires_ms = milliseconds(expires_at)
        head = packed_header(version, expires_ms)
        async with self._reader():
            sent = await _streams.send(self._records, key, self._root + escaped(key), head, pieces, expect)
            if isinstance(sent, KvError):
                return _of_batch(sent, batch, 0, changed=False)
            upload, rest = sent

            async def finish(job: Job) -> Committed | KvError:
                job.sending = True
                try:
                    if upload is None:
                        await self._records.put(key, rest[len(head) :], version, expires_ms, expect)
                    else:
                        await self._records.finish(key, upload, rest, Seen(version, expires_ms, ""), expect)
                except KvError as error:
                    await _streams.give_up(upload)
                    return _of_batch(error, batch, 0, changed=False)
                return Committed(version)

            job = self._queue.start((key,), finish)
            try:
                await self._queue.wait([job])
            except BaseException:  # cancelled: what is not in its place by now will not come there
                await _streams.give_up(upload)
                raise
            return self._answer(job, batch)

    async def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        if self._readers:
            await asyncio.wait(self._readers, timeout=_CLOSING)
        await self._queue.drain(_CLOSING)
        await self._store.close()

    async def _probe(self) -> None:
        if isinstance(self._store, PlainStore):
            able, shared = Conditions(put=False, delete=False), False
        else:
            able, self._denied = await probed(self._store, self._root)
            shared = True
        self._records.able = able
        self.capabilities = structs.replace(
            self.capabilities,
            conditional=able.put,
            conditional_delete=able.put,
            shared=shared,
            durable=shared,
            server=self._store.server,
        )

    def _begin(self, batch: Batch) -> Job:
        return self._queue.start([op.key for op in batch.ops], lambda job: self._run(batch, job))

    async def _run(self, batch: Batch, job: Job) -> Committed | KvError:
        """Do the operations of a batch in their order, up to the first that fails."""
        changed = False
        for position, op in enumerate(batch.ops):
            try:
                async with self._writing:
                    if job.dropped:
                        break
                    job.sending = True
                    await self._apply(op, batch.version)
            except KvError as error:
                return _of_batch(error, batch, position, changed)
            except Exception as error:  # a client that is closed while it asks raises anything
                if self._closed:  # under the feet of the request
                    return CommitUnknown(_written(batch), "the store was closed")
                raise error
            finally:
                job.sending = False
            changed = changed or not isinstance(op, Check)
        return Committed(batch.version)

    async def _apply(self, op: Op, version: bytes) -> None:
        if isinstance(op, Check):
            await self._records.check(op.key, op.expect)
        elif isinstance(op, Delete) or (op.expires_at is not None and op.expires_at <= self.clock()):
            await self._records.delete(op.key, version, op.expect)
        else:
            await self._records.put(op.key, op.value, version, milliseconds(op.expires_at), op.expect)

    def _answer(self, job: Job, batch: Batch) -> Committed | KvError:
        if job.ended_early:
            return CommitUnknown(_written(batch), "the store was closed")
        return job.answer()

    def _refuse(self, ops: Sequence[Op]) -> None:
        """Raise what holds for the whole call."""
        if self._closed:
            raise _closed()
        if not self._records.able.put and any(op.expect is not None for op in ops):
            raise Unsupported(f"a condition ({self._store.where})", "s3, gs and az keep them")
        if self._denied is not None and not all(isinstance(op, Check) for op in ops):
            raise ReadOnly(self._denied)

    def _mistake(self, batch: Batch) -> KvError | None:
        """Return what keeps the batch from being begun."""
        limit = self.capabilities.max_value_bytes or 0
        for op in batch.ops:
            if isinstance(op, Put) and len(op.value) > limit:
                return ValueTooLarge(op.key, len(op.value), limit)
            try:
                if (error := self._too_long(op.key)) is not None:
                    return error
            except BadKey as error:
                return error
        return None

    def _too_long(self, key: str) -> KeyTooLong | None:
        if len(key) * 9 <= self._room and len(key) * 4 <= _SHORT:
            escaped(key)  # raises what it has against the key
            return None
        limit = self.capabilities.max_key_bytes or 0
        size = len(key.encode("utf-8", "surrogatepass"))
        if size > limit:
            return KeyTooLong(key, size, limit)
        size = len(escaped(key).encode())
        return KeyTooLong(key, size, self._room) if size > self._room else None

    async def _clear(self, name: str) -> bool:
        """Look at one internal object that is due; whether an expired entry went."""
        due_ms, kind, rest = noted(name[len(self._root) :])
        key = unescaped(rest) if kind == "k" else None
        if key is None:
            if kind in "pt":
                await self._store.delete(name)
            return False
        job = self._queue.start((key,), lambda _: self._records.remove(key, due_ms))
        await self._queue.wait([job])
        gone, served = job.answer()
        if served:
            await self._store.delete(name)
        return gone

    async def _each(self, call: Callable[[_T], Awaitable[_Found]], items: Sequence[_T]) -> list[_Found]:
        """Call for each item, side by side: results in the order of the items."""

        async def one(item: _T) -> _Found:
            async with self._reading:
                return await call(item)

        if len(items) == 1:
            return [await one(items[0])]
        tasks = [asyncio.ensure_future(one(item)) for item in items]
        try:
            return await asyncio.gather(*tasks)
        except BaseException:  # cancelled too: none goes on
            for task in tasks:
                task.cancel()
            if tasks:
                await asyncio.wait(tasks)
            raise

    @asynccontextmanager
    async def _reader(self) -> AsyncIterator[None]:
        """Let `close` wait for a call; it fails with StoreClosed if it was not waited for long enough."""
        if self._closed:
            raise _closed()
        ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._readers.add(ended)
        try:
            yield
        except Exception as error:  # a client that is closed while it asks raises anything
            if self._closed:
                raise _closed() from error
            raise
        finally:
            self._readers.discard(ended)
            ended.set_result(None)


def _of_batch(error: KvError, batch: Batch, position: int, changed: bool) -> KvError:
    """Return the outcome of a batch whose operation at ``position`` failed, perhaps after others took effect."""
    if isinstance(error, Conflict):
        return Conflict(error.key, error.expected, error.found, position)
    if isinstance(error, CommitUnknown):
        reason = error.reason
    elif changed:
        reason = f"its first {position} operations happened, then: {error}"
    else:
        return error
    unknown = CommitUnknown(_written(batch), reason)
    unknown.__cause__ = error.__cause__
    return unknown


def _written(batch: Batch) -> tuple[str, ...]:
    return tuple(op.key for op in batch.ops if not isinstance(op, Check))


def _without_value(key: str, seen: Seen) -> Entry:
    assert seen.version is not None
    return Entry(key, b"", seen.version, seen.expires_ms / 1000 if seen.expires_ms else None)


def _closed() -> StoreClosed:
    return StoreClosed("the store was closed: open it again")
