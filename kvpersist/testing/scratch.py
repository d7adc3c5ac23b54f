"""A corner of any store that looks empty, so that tests can run where data lives.

    scratch = ScratchDriver(driver, "scratch-1a2b-")
    ...                      # a driver whose keys are those that begin with the prefix, without it
    await scratch.clear()

What is outside is neither read, written nor seen. The prefix stands before the whole key, so keys that
share a partition still do; a key limit shrinks by it.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from contextlib import aclosing, contextmanager
from typing import Any, Final, cast

import msgspec

from kvpersist import keys
from kvpersist.driver import (
    Batch,
    Capabilities,
    Check,
    Committed,
    Compacts,
    Delete,
    Driver,
    Entry,
    Expect,
    HasClock,
    Op,
    Pings,
    Provisions,
    Put,
    Streams,
    UsesClock,
    Watches,
)
from kvpersist.errors import BadKey, CommitUnknown, Conflict, CorruptRecord, KeyTooLong, KvError, ValueTooLarge

__all__ = ["ScratchDriver"]

_PAGE: Final = 500  # keys removed at once
_EXPIRED: Final = 10_000  # reclaimed at most by one `clear`


class ScratchDriver:
    """The keys of ``inner`` that begin with ``prefix``, without it; ``close`` closes ``inner``.

    Whatever clock ``inner`` judges expiry by, it can only be asked (`HasClock`): moving it would make
    live entries outside expire. `compact` is that of the whole store: expired entries outside go, too.
    """

    def __init__(self, inner: Driver, prefix: str) -> None:
        self.inner = inner
        self.prefix = prefix
        self._end = keys.prefix_end(prefix)
        self._bytes = len(prefix.encode())
        limit = inner.capabilities.max_key_bytes
        limit = None if limit is None else limit - self._bytes
        self.capabilities: Capabilities = msgspec.structs.replace(inner.capabilities, max_key_bytes=limit)
        if isinstance(inner, Compacts):
            self.compact = inner.compact
        if isinstance(inner, Pings):
            self.ping = inner.ping
        if isinstance(inner, Provisions):
            self.ddl, self.provision = inner.ddl, inner.provision
        if isinstance(inner, Watches):
            self.watch = self._watch
        if isinstance(inner, Streams):
            self.read_stream = self._read_stream
            self.write_stream = self._write_stream

    async def get(self, keys: Sequence[str]) -> list[Entry | None]:
        with self._own_names():
            found = await self.inner.get([self.prefix + key for key in keys])
        return [entry and self._mine(entry) for entry in found]

    async def commit(self, batches: Sequence[Batch]) -> list[Committed | KvError]:
        named = [Batch(tuple(map(self._named, batch.ops)), batch.version) for batch in batches]
        with self._own_names():
            outcomes = await self.inner.commit(named)
        return [self._own_name(outcome) if isinstance(outcome, KvError) else outcome for outcome in outcomes]

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
        with self._own_names():
            found = await self.inner.scan(
                self.prefix + (start or ""),
                self._end if end is None else self.prefix + end,
                limit=limit,
                reverse=reverse,
                keys_only=keys_only,
                deref=None if deref is None else self.prefix + deref,
            )
        return [self._mine(entry) for entry in found]

    async def now(self) -> float:
        """Seconds since 1970 by the clock that ``inner`` judges expiry by."""
        if isinstance(self.inner, HasClock):
            return await self.inner.now()
        return self.inner.clock() if isinstance(self.inner, UsesClock) else time.time()

    async def clear(self) -> int:
        """Remove every key, and what has expired from the store; return how many keys there were.

        Raises:
            KvError: a key stayed, or what the driver answered or raised.
        """
        removed = 0
        before: list[Entry] = []
        while page := await self.scan(None, None, limit=_PAGE, keys_only=True):
            if page == before:
                raise KvError(f"{page[0].key!r} is still there after its delete")
            before = page
            outcomes = await self.commit([Batch((Delete(entry.key),), bytes(8)) for entry in page])
            for outcome in outcomes:
                if isinstance(outcome, KvError):
                    raise outcome
            removed += len(page)
        if isinstance(self.inner, Compacts):
            expired = 0
            while expired < _EXPIRED and (gone := await self.inner.compact(_PAGE)):
                expired += gone
        return removed

    async def close(self) -> None:
        await self.inner.close()

    async def _watch(self, prefix: str) -> AsyncGenerator[tuple[str, ...]]:
        changes = cast("AsyncGenerator[tuple[str, ...]]", cast(Watches, self.inner).watch(self.prefix + prefix))
        async with aclosing(changes):
            async for told in changes:
                yield tuple(map(self._unnamed, told))

    async def _read_stream(self, key: str) -> tuple[Entry, AsyncIterator[bytes]] | None:
        with self._own_names():
            found = await cast(Streams, self.inner).read_stream(self.prefix + key)
        return None if found is None else (self._mine(found[0]), found[1])

    async def _write_stream(
        self,
        key: str,
        pieces: AsyncIterator[bytes],
        *,
        version: bytes,
        expect: Expect | None = None,
        expires_at: float | None = None,
    ) -> Committed | KvError:
        with self._own_names():
            outcome = await cast(Streams, self.inner).write_stream(
                self.prefix + key, pieces, version=version, expect=expect, expires_at=expires_at
            )
        return self._own_name(outcome) if isinstance(outcome, KvError) else outcome

    def _named(self, op: Op) -> Op:
        if isinstance(op, Put):
            return Put(self.prefix + op.key, op.value, op.expect, op.expires_at)
        if isinstance(op, Delete):
            return Delete(self.prefix + op.key, op.expect)
        return Check(self.prefix + op.key, op.expect)

    def _unnamed(self, key: str) -> str:
        return key.removeprefix(self.prefix)  # a key from outside stays what it is, for a test to see

    def _mine(self, entry: Entry) -> Entry:
        target = entry.target and self._mine(entry.target)
        return Entry(self._unnamed(entry.key), entry.value, entry.version, entry.expires_at, target)

    @contextmanager
    def _own_names(self) -> Iterator[None]:
        try:
            yield
        except KvError as error:
            renamed = self._own_name(error)
            if renamed is error:
                raise
            raise renamed from error

    def _own_name(self, error: KvError) -> KvError:
        """The same error, of the key without its prefix."""
        match error:
            case CommitUnknown():
                return CommitUnknown(tuple(map(self._unnamed, error.keys)), error.reason, error.settled)
            case Conflict():
                return Conflict(self._unnamed(error.key), error.expected, error.found, error.position)
            case KeyTooLong():
                return KeyTooLong(self._unnamed(error.key), error.size - self._bytes, error.limit - self._bytes)
            case ValueTooLarge():
                return ValueTooLarge(self._unnamed(error.key), error.size, error.limit)
            case BadKey() | CorruptRecord():
                changed: Any = type(error)(self._unnamed(error.key), error.reason)
                return changed
            case _:
                return error
