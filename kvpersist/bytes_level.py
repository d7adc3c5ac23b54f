"""The bytes level of a store: what repositories, indexes and logs stand on.

It mints versions, decides lost answers, and keeps the store's format record. Nothing here frames a
value or guards a namespace.
"""

from __future__ import annotations

import asyncio
import os
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Final, Literal, Self, cast
from weakref import WeakSet, ref

import msgspec

from kvpersist import codec
from kvpersist.batching import Batched
from kvpersist.changes import Hub, Scope, Waker
from kvpersist.driver import (
    ABSENT,
    Batch,
    Capabilities,
    Check,
    Clock,
    Committed,
    Compacts,
    Driver,
    Entry,
    Op,
    Put,
    UsesClock,
    deref_by_get,
)
from kvpersist.errors import (
    CommitUnknown,
    Conflict,
    CorruptRecord,
    DeadlineExceeded,
    ForkedStore,
    FormatMismatch,
    KvError,
    ReadOnly,
    StoreClosed,
    Unavailable,
    Unsupported,
    WrongLoop,
)
from kvpersist.metrics import Counters, Metrics

__all__ = ["FORMAT", "KEYS", "BytesLevel", "left_open"]

FORMAT: Final = 1
"""The number of the store format this version writes; every smaller one is read."""

KEYS: Final = 1
"""The number of the key escape."""

_FORMAT_KEY: Final = "kvpersist:format"
_DECIDE: Final = 0.5  # seconds that looking for a lost write may take

_VERSIONS: Final = 64  # minted at once: one system call for so many

_running = asyncio.get_running_loop
_forks = 0
_pool: list[bytes] = []


def _forked() -> None:
    global _forks
    _forks += 1
    _pool.clear()  # or parent and child would mint the same


def _minted() -> bytes:
    """Return 8 fresh bytes of the system's randomness."""
    try:
        return _pool.pop()  # atomic: stores of other threads mint from it too
    except IndexError:
        data = os.urandom(8 * _VERSIONS)
        _pool.extend(data[at : at + 8] for at in range(8, len(data), 8))
        return data[:8]


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)


class _Format(msgspec.Struct, kw_only=True):
    format: int = FORMAT
    keys: int = KEYS
    cipher: str | None = None
    namespaces: list[str] = []
    large: list[str] = []  # partitions in which a large value was ever written
    library: str = ""


_opened: WeakSet[BytesLevel] = WeakSet()


def left_open() -> list[BytesLevel]:
    """The stores that were opened by a URL or the like in this process, and that nobody has closed yet."""
    return [store for store in _opened if store._forks == _forks and not store._closed]


class BytesLevel:
    """Entries of one open driver, in one event loop, in one process.

    ``opener`` is the line of code that opened it, as ``file:line``; empty where its driver is somebody else's.
    """

    opener = ""

    def __init__(
        self,
        driver: Driver,
        *,
        codec: Literal["msgpack", "json"] | None,
        timeout: float | None,
        clock: Clock,
        where: str,
        owns_driver: bool,
    ) -> None:
        self.driver = driver
        self.capabilities: Capabilities = driver.capabilities
        self.codec: Literal["msgpack", "json"] = codec or self.capabilities.preferred_codec
        self.clock = clock
        self.where: str = where or type(driver).__name__
        if clock is not time.time and isinstance(driver, UsesClock):
            driver.clock = clock
        self.timeout = timeout  # seconds, per call; None: never
        self._counters = Counters(clock)
        self._lanes = Batched(driver, timeout=timeout, counters=self._counters)
        self._owned: frozenset[str] = frozenset(("kvpersist",))
        self._large: frozenset[str] = frozenset()
        self._owns_driver = owns_driver
        self._closed = False
        self._closing: asyncio.Task[None] | None = None
        self._forks = _forks
        self._loop = asyncio.get_running_loop()
        self._sweeper: asyncio.Task[None] | None = None
        self._hub: Hub | None = None  # while somebody watches

    async def sweep(self) -> int:
        """Remove expired entries now, where the backend does not do it itself; return how many."""
        return await self._compact()

    def metrics(self) -> Metrics:
        """What was done since the store was opened, and how long its backend took."""
        return self._counters.metrics(self.clock)

    async def _compact(self) -> int:
        removed = 0
        while isinstance(self.driver, Compacts):
            self._check()
            try:
                async with asyncio.timeout(self.timeout):
                    gone = await self.driver.compact(500)
            except TimeoutError as error:
                raise DeadlineExceeded("compact", self.timeout or 0) from error
            if not gone:
                break
            removed += gone
        return removed

    async def close(self) -> None:
        """End what is under way and release the backend; a second call does nothing."""
        if self._forks != _forks:
            return
        if self._closing is None:
            self._check()
            self._closed = True
            _opened.discard(self)
            self._closing = self._loop.create_task(self._close())
        await asyncio.shield(self._closing)  # a cancelled close goes on; a second one waits for the first

    async def _close(self) -> None:
        if self._hub is not None:
            await self._hub.close()
        if self._sweeper is not None:
            self._sweeper.cancel()
            await asyncio.wait([self._sweeper])
        if self._owns_driver:
            await self._lanes.close()
        else:
            await self._lanes.drain()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def __del__(self) -> None:
        if self.opener and not self._closed and self._forks == _forks:
            left = f"the store {self.where}, opened at {self.opener}, was never closed: use async with"
            warnings.warn(left, ResourceWarning, stacklevel=2, source=self)

    def _opened_at(self, opener: str) -> None:
        """From now on it counts as left open until it is closed."""
        self.opener = opener
        _opened.add(self)

    async def _commit(self, ops: Sequence[Op]) -> bytes:
        """Commit one batch and return the version its puts carry."""
        self._check()
        batch = Batch(tuple(ops), _minted())
        try:
            [outcome] = await self._lanes.commit((batch,))
        except CommitUnknown as lost:
            outcome = lost
        except Exception as error:
            self._counters.failed(error)
            raise
        if type(outcome) is Committed:
            if self._hub is not None:
                self._hub.committed(batch.ops, batch.version)
            return outcome.version
        decided = await self._decided(batch, cast(KvError, outcome), self._loop.time() + _DECIDE)
        if isinstance(decided, bytes):
            if self._hub is not None:
                self._hub.committed(batch.ops, batch.version)
            return decided
        self._counters.failed(decided)
        raise decided

    async def _commit_each(self, batches: Sequence[Sequence[Op]]) -> list[bytes | KvError]:
        """Commit ``n`` independent batches in one call: ``n`` versions or errors in their order."""
        self._check()
        minted = [Batch(tuple(ops), _minted()) for ops in batches]
        try:
            outcomes = await self._lanes.commit(minted)
        except CommitUnknown as lost:
            outcomes = [lost] * len(minted)
        except Exception as error:
            self._counters.failed(error)
            raise
        until = self._loop.time() + _DECIDE  # for all of them
        decided = [
            outcome.version if type(outcome) is Committed else await self._decided(batch, cast(KvError, outcome), until)
            for batch, outcome in zip(minted, outcomes, strict=True)
        ]
        for batch, outcome in zip(minted, decided, strict=True):
            if not isinstance(outcome, bytes):
                self._counters.failed(outcome)
            elif self._hub is not None:
                self._hub.committed(batch.ops, outcome)
        return decided

    async def _entries(self, keys: Sequence[str]) -> list[Entry | None]:
        self._check()
        try:
            return await self._lanes.get(keys) if keys else []
        except Exception as error:
            self._counters.failed(error)
            raise

    async def _scan(
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
        try:
            if deref is None or self.capabilities.deref:
                return await self._lanes.scan(
                    start, end, limit=limit, reverse=reverse, keys_only=keys_only, deref=deref
                )
            found = await self._lanes.scan(start, end, limit=limit, reverse=reverse)
            return await deref_by_get(self._lanes, found, deref)
        except Exception as error:
            self._counters.failed(error)
            raise

    def _changes(self) -> Hub:
        """Whoever wants to be told of changes asks here."""
        self._check()
        if self._hub is None:
            self._hub = Hub(self)
        return self._hub

    def _waker(self, wanted: str | Sequence[str] | Scope, interval: float = 0.25) -> Waker:
        """Tell a reader when something below a prefix, or at some keys, may have changed, here or in another process.

        ``interval``: seconds between wake-ups where the backend tells nothing.
        """
        return self._changes().waker(wanted if isinstance(wanted, Scope) else Scope.of(wanted), interval)

    async def _own(self, namespace: str) -> None:
        """Note in the format record that a repository owns ``namespace``."""
        try:
            await self._note("namespaces", namespace, lambda: namespace in self._owned)
        except (ReadOnly, Unsupported):  # a read-only store has no plain writes to guard against
            self._owned |= {namespace}

    async def _keeps_large(self, partition: str) -> None:
        """Note in the format record that large values are written into ``partition``."""
        await self._note("large", partition, lambda: partition in self._large)

    async def _note(self, field: str, name: str, known: Callable[[], bool]) -> None:
        while not known():
            [entry] = await self._entries([_FORMAT_KEY])
            found = self._adopted(entry)
            if known():
                return
            found[field] = sorted({*found.get(field, ()), name})
            try:
                await self._commit((self._format_put(found, entry),))
            except Conflict:
                continue
            self._owned |= set(found["namespaces"])
            self._large |= set(found.get("large", ()))

    async def _refresh(self) -> None:
        """Learn what other processes have noted in the format record."""
        [entry] = await self._entries([_FORMAT_KEY])
        self._adopted(entry)

    async def _adopt(self) -> None:
        """Read the format record, or write the first one; the loser of a race re-reads."""
        while True:
            [entry] = await self._entries([_FORMAT_KEY])
            found = self._adopted(entry)
            if entry is not None:
                return
            try:
                await self._commit((self._format_put(found, None),))
            except Conflict:
                continue
            except (ReadOnly, Unsupported):
                return
            return

    def _adopted(self, entry: Entry | None) -> dict[str, Any]:
        """Return the format record as it is stored, fields of later versions included."""
        if entry is None:
            return msgspec.to_builtins(_Format(library=_version()))
        try:
            stored = codec.decode_plain(_FORMAT_KEY, entry.value)
            found = msgspec.convert(stored, _Format)
        except (CorruptRecord, msgspec.ValidationError) as error:
            raise FormatMismatch(self.where, "a damaged format record", f"format {FORMAT}") from error
        if found.format > FORMAT or found.keys > KEYS:
            shown = f"format {found.format}, keys {found.keys}"
            raise FormatMismatch(self.where, shown, f"at most {FORMAT} and {KEYS}: upgrade kvpersist")
        if found.cipher is not None:
            raise FormatMismatch(self.where, f"values encrypted with {found.cipher}", "plain values")
        self._owned |= set(found.namespaces)
        self._large |= set(found.large)
        return stored

    def _format_put(self, record: dict[str, Any], seen: Entry | None) -> Put:
        value = codec.encode_plain(_FORMAT_KEY, record, "json")
        if not self.capabilities.conditional:
            return Put(_FORMAT_KEY, value)
        return Put(_FORMAT_KEY, value, ABSENT if seen is None else seen.version)

    def _start_sweeping(self, interval: float) -> None:
        self._sweeper = self._loop.create_task(_sweep_every(interval, ref(self)))

    async def _sweep_turn(self) -> None:
        try:
            if self.capabilities.ttl == "swept":
                await self._compact()
            await self._refresh()
            await self._tend()
        except KvError:  # tried again at the next turn; expired entries are hidden either way
            return

    async def _tend(self) -> None:
        """Do what a store above this level does from time to time."""

    @property
    def _is_forked(self) -> bool:
        """Whether it was opened before a fork: then its tasks and connections are the parent's."""
        return self._forks != _forks

    def _check(self) -> None:
        if self._closed or self._forks != _forks or _running() is not self._loop:
            self._refuse()

    def _refuse(self) -> None:
        if self._forks != _forks:
            raise ForkedStore("this store was opened before a fork: open it again in the child")
        if self._closed:
            raise StoreClosed("the store was closed: open it again")
        raise WrongLoop("the store belongs to another event loop: open one in each loop")

    async def _decided(self, batch: Batch, error: KvError, until: float) -> bytes | KvError:
        """Decide a write whose answer was lost by looking for its version; other errors stay as they are."""
        if not isinstance(error, CommitUnknown):
            return error
        lost = CommitUnknown(tuple(op.key for op in batch.ops), error.reason, error.settled)
        lost.__cause__ = error.__cause__
        puts = [op.key for op in batch.ops if type(op) is Put]
        # a Check says nothing: what it names stays as it is, done or not
        expected = {op.key: op.expect for op in batch.ops if type(op) is not Check and type(op.expect) is bytes}
        looked_at = list(dict.fromkeys((*puts, *expected)))
        if not looked_at:
            return lost
        try:
            async with asyncio.timeout_at(until):
                entries = await self._lanes.get(looked_at)
        except (KvError, TimeoutError):
            return lost
        found = dict(zip(looked_at, entries, strict=True))
        mine = [key for key in puts if (entry := found[key]) is not None and entry.version == batch.version]
        if mine and (len(mine) == len(puts) or self.capabilities.atomic_batch != "none"):
            deletes_done = self.capabilities.atomic_batch != "none" or len(puts) == len(batch.ops)
            return batch.version if deletes_done else lost
        untouched = any((entry := found[key]) is not None and entry.version == e for key, e in expected.items())
        if lost.settled and untouched and self.capabilities.atomic_batch != "none":
            return Unavailable(f"the write of {looked_at[0]!r} did not happen ({lost.reason}): try again")
        return lost


async def _sweep_every(interval: float, weakly: ref[BytesLevel]) -> None:
    """Between its turns it does not keep the store, which may be dropped unclosed."""
    while True:
        await asyncio.sleep(interval)
        store = weakly()
        if store is None:
            return
        await store._sweep_turn()
        del store


def _version() -> str:
    from kvpersist import __version__

    return __version__
