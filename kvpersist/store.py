"""The store: plain keys and values over any driver, and the bytes level that repositories stand on."""

from __future__ import annotations

import asyncio
import math
import os
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Generator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, Final, Generic, Literal, Protocol, Self, TypeVar, cast

import msgspec

from kvpersist import codec, keys
from kvpersist.batching import Batched
from kvpersist.driver import (
    ABSENT,
    Batch,
    Capabilities,
    Check,
    Clock,
    Committed,
    Compacts,
    Delete,
    Driver,
    Entry,
    Expect,
    Op,
    Put,
    UsesClock,
    deref_by_get,
)
from kvpersist.errors import (
    BadRequest,
    CommitUnknown,
    Conflict,
    CorruptRecord,
    ForkedStore,
    FormatMismatch,
    KvError,
    PartlyDone,
    ReadOnly,
    ReservedNamespace,
    StoreClosed,
    Unavailable,
    UniqueConflict,
    Unsupported,
    WrongLoop,
)

__all__ = ["FORMAT", "Info", "Opening", "Store", "Transaction", "Versioned", "open_store"]

FORMAT: Final = 1
"""The number of the store format this version writes; every smaller one is read."""

_FORMAT_KEY: Final = "kvpersist:format"
_KEY_BYTES: Final = 512  # of a plain key, unless the driver keeps less
_BATCH: Final = 100  # puts or deletes in one atomic batch of the *_many operations
_PAGE: Final = 1000  # entries read at once where values are left out
_DECIDE: Final = 0.5  # seconds that looking for a lost write may take

_T = TypeVar("_T")

_forks = 0


def _forked() -> None:
    global _forks
    _forks += 1


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)


class Info(msgspec.Struct, frozen=True):
    """What is known of an entry without its value; ``expires_at`` in seconds since 1970."""

    key: str
    version: bytes
    expires_at: float | None


class Versioned(msgspec.Struct, Generic[_T], frozen=True):
    """A value or record with the version it was read at."""

    value: _T
    version: bytes
    expires_at: float | None


class _Format(msgspec.Struct, kw_only=True):
    format: int = FORMAT
    keys: int = 1  # of the key escape
    cipher: str | None = None
    namespaces: list[str] = []
    library: str = ""


class _Closes(Protocol):
    async def close(self) -> None: ...


_Closing = TypeVar("_Closing", bound=_Closes)


class Opening(Generic[_Closing]):
    """What an open function returns: ``async with`` it, or await it and close what you get."""

    def __init__(self, make: Callable[[], Coroutine[Any, Any, _Closing]]) -> None:
        self._make = make
        self._made: _Closing | None = None

    def __await__(self) -> Generator[Any, Any, _Closing]:
        return self._make().__await__()

    async def __aenter__(self) -> _Closing:
        self._made = await self._make()
        return self._made

    async def __aexit__(self, *_: object) -> None:
        if self._made is not None:
            await self._made.close()


class Store:
    """Plain values under plain text keys, in one event loop.

    Keys are any text such as ``app:user:42`` up to 512 bytes, kept exactly. Values are None, bool,
    int, float, str, bytes, aware datetimes, and lists and dicts of them; what cannot be given back
    alike is refused. ``ttl`` is in seconds: None takes the store's default, ``math.inf`` never expires.

    Every operation raises StoreClosed, WrongLoop or ForkedStore when it comes too late or from
    elsewhere, Unavailable when the backend does not answer (nothing was changed), and writes raise
    CommitUnknown when their answer was lost and could not be decided by reading.
    """

    def __init__(
        self,
        driver: Driver,
        *,
        codec: Literal["msgpack", "json"] | None = None,
        ttl: float | None = None,
        timeout: float | None = 10.0,
        clock: Clock = time.time,
        where: str = "",
        owns_driver: bool = False,
    ) -> None:
        self.driver = driver
        self.capabilities: Capabilities = driver.capabilities
        self.codec: Literal["msgpack", "json"] = codec or self.capabilities.preferred_codec
        self.clock = clock
        self.where = where or type(driver).__name__
        if clock is not time.time and isinstance(driver, UsesClock):
            driver.clock = clock
        self._lanes = Batched(driver, timeout=timeout)
        self._ttl = ttl
        self._key_bytes = min(_KEY_BYTES, self.capabilities.max_key_bytes or _KEY_BYTES)
        self._owned: frozenset[str] = frozenset(("kvpersist",))
        self._owns_driver = owns_driver
        self._closed = False
        self._forks = _forks
        self._loop = asyncio.get_running_loop()
        self._sweeper: asyncio.Task[None] | None = None

    # ---- single keys

    async def get(self, key: str, default: Any = None) -> Any:
        """Return the value at ``key``, or ``default``. Raises CorruptRecord, BadKey."""
        [entry] = await self._entries([self._key(key)])
        return default if entry is None else codec.decode_plain(key, entry.value)

    async def get_versioned(self, key: str) -> Versioned[Any] | None:
        """Return the value with its version, for a later ``put(expect=version)``."""
        [entry] = await self._entries([self._key(key)])
        if entry is None:
            return None
        return Versioned(codec.decode_plain(key, entry.value), entry.version, entry.expires_at)

    async def put(
        self, key: str, value: Any, *, expect: Expect | None = None, ttl: float | None = None, raw: bool = False
    ) -> bytes:
        """Store ``value`` and return its version.

        Args:
            expect: a version that must be there, ABSENT, or None for whatever is there.
            ttl: seconds to live; 0 or less deletes the key.
            raw: write into a namespace that a repository owns all the same.

        Raises:
            Conflict: not as expected; nothing was changed.
            Unencodable, ValueTooLarge, BadKey, KeyTooLong, ReservedNamespace.
        """
        self._may_write(key, raw)
        return await self._commit((Put(key, codec.encode_plain(key, value, self.codec), expect, self._expiry(ttl)),))

    async def get_raw(self, key: str) -> bytes | None:
        """Return the bytes that `put_raw` stored, or the encoded payload of another value."""
        [entry] = await self._entries([self._key(key)])
        return None if entry is None else codec.unframe(key, entry.value).payload

    async def put_raw(
        self, key: str, value: bytes, *, expect: Expect | None = None, ttl: float | None = None, raw: bool = False
    ) -> bytes:
        """Store bytes as they are, framed and checksummed; otherwise as `put`."""
        self._may_write(key, raw)
        return await self._commit((Put(key, codec.frame(key, value, codec.RAW, 0), expect, self._expiry(ttl)),))

    async def has(self, key: str) -> bool:
        """Whether there is a live entry; its value is not read."""
        return await self.info(key) is not None

    async def info(self, key: str) -> Info | None:
        """Return version and expiry without reading the value."""
        self._key(key)
        found = await self._scan(key, key + "\0", limit=1, keys_only=True)
        return Info(key, found[0].version, found[0].expires_at) if found else None

    async def touch(self, key: str, ttl: float | None = None) -> bool:
        """Give the entry a new time to live, keeping its value; False where there is none."""
        self._may_write(key, False)
        while True:
            [entry] = await self._entries([key])
            if entry is None:
                return False
            try:
                await self._commit((Put(key, entry.value, self._if_unchanged(entry), self._expiry(ttl)),))
            except Conflict:
                continue
            return True

    async def delete(self, key: str, *, expect: bytes | None = None, raw: bool = False) -> bool:
        """Remove the key; False where there was none. Raises Conflict when ``expect`` is not there."""
        self._may_write(key, raw)
        if expect is not None:
            await self._commit((Delete(key, expect),))
            return True
        while True:
            found = await self.info(key)
            if found is None:
                return False
            conditional = self.capabilities.conditional_delete
            try:
                await self._commit((Delete(key, found.version if conditional else None),))
            except Conflict:
                continue
            return True

    # ---- many keys

    async def get_many(self, keys: Sequence[str]) -> list[Any]:
        """Read ``n`` keys in one call: ``n`` values in their order, None where there is none."""
        entries = await self._entries([self._key(key) for key in keys])
        return [None if entry is None else codec.decode_plain(entry.key, entry.value) for entry in entries]

    async def has_many(self, keys: Sequence[str]) -> list[bool]:
        """Whether each of ``n`` keys has a live entry, in one call."""
        return [entry is not None for entry in await self._entries([self._key(key) for key in keys])]

    async def put_many(self, items: Mapping[str, Any], *, ttl: float | None = None, raw: bool = False) -> None:
        """Store many values, in atomic batches of 100; not atomic as a whole.

        Raises:
            PartlyDone: some of the batches failed; it names their keys.
        """
        expires_at = self._expiry(ttl)
        puts: list[Op] = []
        for key, value in items.items():
            self._may_write(key, raw)
            puts.append(Put(key, codec.encode_plain(key, value, self.codec), None, expires_at))
        await self._commit_many(puts)

    async def delete_many(self, keys: Iterable[str], *, raw: bool = False) -> int:
        """Remove many keys, in atomic batches of 100; return how many there were."""
        names = list(dict.fromkeys(keys))
        for key in names:
            self._may_write(key, raw)
        live = [entry.key for entry in await self._entries(names) if entry is not None]
        await self._commit_many([Delete(key) for key in live])
        return len(live)

    async def clear(self, prefix: str, *, raw: bool = False) -> int:
        """Remove every key that starts with ``prefix``; return how many there were.

        Raises:
            ReservedNamespace: a repository owns keys below it, unless ``raw``.
        """
        if not raw:
            for namespace in self._owned:
                if f"{namespace}:".startswith(prefix) or prefix.startswith((f"{namespace}:", f"{namespace}#")):
                    raise ReservedNamespace(prefix, namespace)
        removed = 0
        while page := await self._scan(prefix, keys.prefix_end(prefix), limit=_PAGE, keys_only=True):
            await self._commit_many([Delete(entry.key) for entry in page])
            removed += len(page)
        return removed

    async def scan(
        self,
        prefix: str = "",
        *,
        start: str | None = None,
        end: str | None = None,
        reverse: bool = False,
        page: int = 200,
        on_corrupt: Callable[[CorruptRecord], None] | None = None,
    ) -> AsyncIterator[tuple[str, Any]]:
        """Yield ``(key, value)`` below ``prefix`` in key order, ``page`` entries a round trip.

        Args:
            start: first key, inclusive; ``end``: exclusive. Either may be None.
            on_corrupt: is handed each damaged entry, and the scan goes on; without it, it is raised.
        """
        async for entry in self._walk(prefix, start, end, reverse=reverse, page=page):
            try:
                value = codec.decode_plain(entry.key, entry.value)
            except CorruptRecord as error:
                if on_corrupt is None:
                    raise
                on_corrupt(error)
                continue
            yield entry.key, value

    async def keys(self, prefix: str = "", max_depth: int | None = None) -> AsyncIterator[str]:
        """Yield the keys below ``prefix`` in order, without values.

        ``max_depth=1`` leaves out keys with a further ``:`` behind the prefix, 2 those with two, and
        so on; what lies deeper is skipped over, not read.
        """
        start, end = prefix, keys.prefix_end(prefix) if prefix else None
        while True:
            page = await self._scan(start, end, limit=_PAGE, keys_only=True)
            skip_to = ""
            for entry in page:
                if entry.key < skip_to:
                    continue
                if max_depth is not None:
                    below = entry.key[len(prefix) :].split(":", max_depth)
                    if len(below) > max_depth:
                        deeper = prefix + ":".join(below[:max_depth]) + ":"
                        skip_to = keys.prefix_end(deeper) or ""
                        continue
                yield entry.key
            if len(page) < _PAGE:
                return
            start = max(page[-1].key + "\0", skip_to)

    async def snapshot(self, prefix: str = "") -> dict[str, Any]:
        """Return all values below ``prefix``, the prefix cut off their keys; for `restore`."""
        return {key[len(prefix) :]: value async for key, value in self.scan(prefix)}

    async def restore(self, snapshot: Mapping[str, Any], prefix: str = "") -> None:
        """Write what `snapshot` returned below ``prefix``; other keys stay."""
        await self.put_many({prefix + key: value for key, value in snapshot.items()})

    # ---- several keys at once

    @asynccontextmanager
    async def atomic(self) -> AsyncIterator[Transaction]:
        """Buffer writes and commit them as one batch at the end of the block.

        What the block reads is checked at the commit: if somebody changed it meanwhile, nothing is
        written. An exception inside the block writes nothing.

        Raises:
            Conflict: somebody changed what was read; `transact` would try again.
            Unsupported: this backend has no atomic batches.
        """
        if self.capabilities.atomic_batch == "none":
            raise Unsupported("atomic()", "write record by record, or use sqlite, redis, postgres or mysql")
        tx = Transaction(self)
        yield tx
        await tx._commit()  # pyright: ignore[reportPrivateUsage]

    async def transact(self, fn: Callable[[Transaction], Awaitable[_T]], *, attempts: int = 10) -> _T:
        """Run ``fn`` inside `atomic`, again with full jitter when another writer came first.

        Raises:
            Conflict: every one of ``attempts`` attempts lost.
        """
        for attempt in range(attempts):
            try:
                async with self.atomic() as tx:
                    return await fn(tx)
            except UniqueConflict:
                raise
            except Conflict:
                if attempt == attempts - 1:
                    raise
                await backoff(attempt)
        raise BadRequest("attempts must be at least 1")

    # ---- life

    async def sweep(self) -> int:
        """Remove expired entries now, where the backend does not do it itself; return how many."""
        removed = 0
        if isinstance(self.driver, Compacts):
            while gone := await self.driver.compact(500):
                removed += gone
        return removed

    async def close(self) -> None:
        """End what is under way and release the backend; a second call does nothing."""
        if self._closed or self._forks != _forks:
            return
        self._check()
        self._closed = True
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

    # ---- the bytes level: for repositories, indexes and logs. Nothing here frames or guards.

    async def _commit(self, ops: Sequence[Op]) -> bytes:
        """Commit one batch and return the version its puts carry."""
        [outcome] = await self._commit_each((ops,))
        if isinstance(outcome, KvError):
            raise outcome
        return outcome

    async def _commit_each(self, batches: Sequence[Sequence[Op]]) -> list[bytes | KvError]:
        """Commit ``n`` independent batches in one call: ``n`` versions or errors in their order."""
        self._check()
        minted = [Batch(tuple(ops), os.urandom(8)) for ops in batches]
        outcomes = await self._lanes.commit(minted)
        answers: list[bytes | KvError] = []
        for batch, outcome in zip(minted, outcomes, strict=True):
            if type(outcome) is Committed:
                answers.append(outcome.version)
            elif isinstance(outcome, CommitUnknown):
                answers.append(await self._decided(batch, outcome))
            else:
                answers.append(cast(KvError, outcome))
        return answers

    async def _entries(self, keys: Sequence[str]) -> list[Entry | None]:
        self._check()
        return await self._lanes.get(keys) if keys else []

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
        if deref is None or self.capabilities.deref:
            return await self._lanes.scan(start, end, limit=limit, reverse=reverse, keys_only=keys_only, deref=deref)
        found = await self._lanes.scan(start, end, limit=limit, reverse=reverse)
        return await deref_by_get(self._lanes, found, deref)

    async def _own(self, namespace: str) -> None:
        """Note in the format record that a repository owns ``namespace``."""
        while namespace not in self._owned:
            [entry] = await self._entries([_FORMAT_KEY])
            found = self._adopted(entry)
            if namespace in self._owned:
                return
            found.namespaces = sorted({*found.namespaces, namespace})
            try:
                await self._commit((self._format_put(found, entry),))
            except Conflict:
                continue
            except (ReadOnly, Unsupported):
                pass  # a read-only store has no plain writes to guard against
            self._owned |= {namespace}

    async def _walk(
        self, prefix: str, start: str | None, end: str | None, *, reverse: bool, page: int
    ) -> AsyncIterator[Entry]:
        low = max(prefix, start or "") or None
        high = keys.prefix_end(prefix) if prefix else None
        if end is not None:
            high = end if high is None else min(high, end)
        while True:
            found = await self._scan(low, high, limit=page, reverse=reverse)
            for entry in found:
                yield entry
            if len(found) < page:
                return
            if reverse:
                high = found[-1].key
            else:
                low = found[-1].key + "\0"

    # ---- opening

    async def _adopt(self) -> None:
        """Read the format record, or write the first one; the loser of a race re-reads."""
        while True:
            [entry] = await self._entries([_FORMAT_KEY])
            if entry is not None:
                self._adopted(entry)
                return
            try:
                await self._commit((self._format_put(_Format(library=_version()), None),))
            except Conflict:
                continue
            except (ReadOnly, Unsupported):
                return
            return

    def _adopted(self, entry: Entry | None) -> _Format:
        if entry is None:
            return _Format(library=_version())
        try:
            found = msgspec.convert(codec.decode_plain(_FORMAT_KEY, entry.value), _Format)
        except (CorruptRecord, msgspec.ValidationError) as error:
            raise FormatMismatch(self.where, "a damaged format record", f"format {FORMAT}") from error
        if found.format > FORMAT:
            raise FormatMismatch(self.where, f"format {found.format}", f"at most {FORMAT}: upgrade kvpersist")
        if found.cipher is not None:
            raise FormatMismatch(self.where, f"values encrypted with {found.cipher}", "plain values")
        self._owned |= set(found.namespaces)
        return found

    def _format_put(self, record: _Format, seen: Entry | None) -> Put:
        value = codec.encode_plain(_FORMAT_KEY, msgspec.to_builtins(record), "json")
        if not self.capabilities.conditional:
            return Put(_FORMAT_KEY, value)
        return Put(_FORMAT_KEY, value, ABSENT if seen is None else seen.version)

    def _start_sweeping(self, interval: float) -> None:
        if isinstance(self.driver, Compacts) and self.capabilities.ttl == "swept":
            self._sweeper = self._loop.create_task(self._sweep_every(interval))

    async def _sweep_every(self, interval: float) -> None:
        while True:
            await asyncio.sleep(interval)
            try:
                await self.sweep()
            except KvError:  # space is reclaimed at the next turn; expired entries are hidden either way
                continue

    # ---- private

    def _check(self) -> None:
        if self._forks != _forks:
            raise ForkedStore("this store was opened before a fork: open it again in the child")
        if self._closed:
            raise StoreClosed("the store was closed: open it again")
        if asyncio.get_running_loop() is not self._loop:
            raise WrongLoop("the store belongs to another event loop: open one in each loop")

    def _key(self, key: str) -> str:
        keys.check_key(key, self._key_bytes)
        return key

    def _may_write(self, key: str, raw: bool) -> None:
        keys.check_key(key, self._key_bytes)
        if not raw and (space := key.partition(":")[0].partition("#")[0]) in self._owned and ":" in key:
            raise ReservedNamespace(key, space)

    def _expiry(self, ttl: float | None) -> float | None:
        ttl = self._ttl if ttl is None else ttl
        return None if ttl is None or ttl == math.inf else self.clock() + ttl

    def _if_unchanged(self, entry: Entry) -> bytes | None:
        return entry.version if self.capabilities.conditional else None

    async def _commit_many(self, ops: Sequence[Op]) -> None:
        size = min(_BATCH, self.capabilities.max_batch or _BATCH)
        cuts = [ops[at : at + size] for at in range(0, len(ops), size)]
        outcomes = await self._commit_each(cuts) if cuts else []
        failed: dict[str, KvError] = {}
        for cut, outcome in zip(cuts, outcomes, strict=True):
            if isinstance(outcome, KvError):
                failed.update((op.key, outcome) for op in cut)
        if failed and len(failed) == len(ops) and len(cuts) == 1:
            raise next(iter(failed.values()))
        if failed:
            raise PartlyDone(len(ops) - len(failed), failed)

    async def _decided(self, batch: Batch, lost: CommitUnknown) -> bytes | KvError:
        """Decide a write whose answer was lost by looking for its version."""
        puts = [op.key for op in batch.ops if type(op) is Put]
        expected = {op.key: op.expect for op in batch.ops if type(op.expect) is bytes}
        looked_at = list(dict.fromkeys((*puts, *expected)))
        if not looked_at:
            return lost
        try:
            async with asyncio.timeout(_DECIDE):
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


class Transaction:
    """Buffered writes of one `Store.atomic` block; what is read here is checked at the commit."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._seen: dict[str, Entry | None] = {}
        self._staged: dict[str, Op] = {}

    async def get(self, key: str, default: Any = None) -> Any:
        """As `Store.get`, and the block fails at its end if somebody changes it meanwhile."""
        [entry] = await self._entries([self.store._key(key)])
        return default if entry is None else codec.decode_plain(key, entry.value)

    def put(self, key: str, value: Any, *, ttl: float | None = None, raw: bool = False) -> None:
        """Store ``value`` at the end of the block."""
        self.store._may_write(key, raw)
        self._stage((Put(key, codec.encode_plain(key, value, self.store.codec), None, self.store._expiry(ttl)),))

    def delete(self, key: str, *, raw: bool = False) -> None:
        """Remove the key at the end of the block."""
        self.store._may_write(key, raw)
        self._stage((Delete(key),))

    async def _entries(self, keys: Sequence[str]) -> list[Entry | None]:
        unread = [key for key in dict.fromkeys(keys) if key not in self._seen and key not in self._staged]
        self._seen.update(zip(unread, await self.store._entries(unread), strict=True))
        return [self._view(key) for key in keys]

    def _view(self, key: str) -> Entry | None:
        staged = self._staged.get(key)
        if type(staged) is Put:
            return Entry(key, staged.value, _PENDING, staged.expires_at)
        return None if type(staged) is Delete else self._seen.get(key)

    def _stage(self, ops: Sequence[Op]) -> None:
        """Merge operations into the batch; conditions on what this block wrote are judged at once."""
        for op in ops:
            before = self._staged.get(op.key)
            if type(before) is Put or type(before) is Delete:
                self._judge(op)
                condition = before.expect
                if type(op) is Check:
                    continue
                self._staged[op.key] = _conditioned(op, condition)
            elif before is not None and op.expect is None:
                self._staged[op.key] = _conditioned(op, before.expect)
            elif op.expect is None and op.key in self._seen:
                entry = self._seen[op.key]
                self._staged[op.key] = _conditioned(op, ABSENT if entry is None else entry.version)
            else:
                self._staged[op.key] = op

    def _judge(self, op: Op) -> None:
        if op.expect is None:
            return
        present = self._view(op.key)
        if (op.expect is ABSENT) != (present is None) or (present is not None and op.expect != _PENDING):
            raise Conflict(op.key, op.expect, ABSENT if present is None else _PENDING)

    async def _commit(self) -> None:
        ops: list[Op] = [
            Check(key, ABSENT if entry is None else entry.version)
            for key, entry in self._seen.items()
            if key not in self._staged
        ]
        for op in self._staged.values():
            # a delete of what was absent before the block, or was made in it, only checks that
            ops.append(Check(op.key, ABSENT) if type(op) is Delete and cast(Any, op.expect) is ABSENT else op)
        if not any(type(op) is not Check for op in ops):
            ops = [op for op in ops if op.key in self._seen]
        if not ops:
            return
        if self.store.capabilities.atomic_batch == "partition" and len({keys.partition(op.key) for op in ops}) > 1:
            raise Unsupported("a batch over several namespaces", "keep what changes together in one namespace")
        await self.store._commit(ops)


_PENDING: Final = b"pending!"  # the version shown for what the block itself wrote


def _conditioned(op: Op, expect: Expect | None) -> Op:
    if type(op) is Put:
        return Put(op.key, op.value, expect, op.expires_at)
    if type(op) is Delete:
        return Delete(op.key, cast(Any, expect))  # ABSENT here becomes a Check at the commit
    return op


async def backoff(attempt: int, *, base: float = 0.002, longest: float = 0.25) -> None:
    """Wait with full jitter before attempt ``attempt + 1``; times in seconds."""
    await asyncio.sleep(random.uniform(0, min(longest, base * 2**attempt)))  # noqa: S311  # not a secret


def _version() -> str:
    from kvpersist import __version__

    return __version__


def open_store(
    where: str | Mapping[str, Any] | Driver | Store | None = None,
    *,
    codec: Literal["msgpack", "json"] | None = None,
    ttl: float | None = None,
    timeout: float | None = 10.0,
    clock: Clock = time.time,
    sweep: float | None = 60.0,
) -> Opening[Store]:
    """Open a store; ``async with`` it, or await it and close it.

    Args:
        where: a URL, a path, a mapping with a ``type`` key, a ready Driver (yours to close), an open
            Store, or None for the configured default.
        codec: "msgpack" or "json" (readable in the backend's own tools); None: as the driver prefers.
        ttl: seconds every entry lives unless told otherwise; None: for ever.
        timeout: seconds after which a call fails; None: never.
        clock: seconds since 1970; replaced in tests of expiry.
        sweep: seconds between removals of expired entries; None: only when `Store.sweep` is called.

    Raises:
        UnknownScheme, BadOption, MissingExtra, BrokenPlugin: the address is wrong.
        Unavailable: the backend does not answer.
        FormatMismatch: not a store, or one written by a newer version; nothing was written.
    """

    async def make() -> Store:
        if isinstance(where, Store):
            return where
        raise NotImplementedError

    return Opening(make)
