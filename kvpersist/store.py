"""The store: plain keys and values over any driver."""

from __future__ import annotations

import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, Final, Generic, Literal, TypeVar

import msgspec

from kvpersist import codec, keys
from kvpersist.bytes_level import BytesLevel
from kvpersist.changes import Scope, Watch
from kvpersist.driver import (
    Clock,
    Delete,
    Driver,
    Entry,
    Expect,
    Op,
    Put,
)
from kvpersist.errors import (
    BadKey,
    BadOption,
    BadRequest,
    CommitUnknown,
    Conflict,
    CorruptRecord,
    KvError,
    LargeValue,
    PartlyDone,
    ReservedNamespace,
    Unavailable,
    UniqueConflict,
    Unsupported,
)
from kvpersist.keys import LOCKS
from kvpersist.large import MARK, LargeReader, LargeValues, LargeWriter, area, area_of
from kvpersist.lease import Lock
from kvpersist.transaction import Transaction, backoff

__all__ = ["Info", "Store", "Versioned"]

_KEY_BYTES: Final = 512  # of a plain key, unless the driver keeps less
_BATCH: Final = 100  # puts or deletes in one atomic batch of the *_many operations
_CUTS: Final = 10  # such batches in one call: other writers, and the deadline, do not wait for all of them
_PAGE: Final = 1000  # entries read at once where values are left out

_T = TypeVar("_T")


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


class Store(BytesLevel):
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
        super().__init__(driver, codec=codec, timeout=timeout, clock=clock, where=where, owns_driver=owns_driver)
        self._ttl = ttl
        self._pieces = LargeValues(self)
        self._key_bytes = min(_KEY_BYTES, self.capabilities.max_key_bytes or _KEY_BYTES)

    async def sweep(self) -> int:
        """Remove expired entries now, where the backend does not do it itself; return how many.

        Pieces of large values whose writer died, or that were replaced, are removed too, and not counted.
        """
        removed = await super().sweep()
        await self._pieces.sweep(all_=True)
        return removed

    # ---- single keys

    async def get(self, key: str, default: Any = None) -> Any:
        """Return the value at ``key``, or ``default``. Raises CorruptRecord, BadKey, LargeValue."""
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
        return await self._put(Put(key, codec.encode_plain(key, value, self.codec), expect, self._expiry(ttl)))

    async def get_raw(self, key: str) -> bytes | None:
        """Return the bytes that `put_raw` stored, or the encoded payload of another value."""
        [entry] = await self._entries([self._key(key)])
        if entry is None:
            return None
        framed = codec.unframe(key, entry.value)
        if framed.codec == codec.LARGE:
            raise LargeValue(key, codec.manifest_of(key, framed).size)
        return framed.payload

    async def put_raw(
        self, key: str, value: bytes, *, expect: Expect | None = None, ttl: float | None = None, raw: bool = False
    ) -> bytes:
        """Store bytes as they are, framed and checksummed; otherwise as `put`."""
        self._may_write(key, raw)
        return await self._put(Put(key, codec.frame(key, value, codec.RAW, 0), expect, self._expiry(ttl)))

    @asynccontextmanager
    async def open_write(
        self, key: str, *, expect: Expect | None = None, ttl: float | None = None
    ) -> AsyncIterator[LargeWriter]:
        """Store bytes that come in parts, whole when the block ends, or not at all.

        An error inside the block stores nothing. What the key holds stays readable until the end.
        Memory holds a few parts of 256 KiB. A value of one part is stored as `put_raw` does; a larger
        one is read with `open_read`. A block that writes nothing for a day loses what it wrote.

        Args:
            expect, ttl: as of `put`; the time to live begins at the end of the block.

        Raises:
            Conflict: not as expected; nothing was changed.
            BadKey, KeyTooLong, ReservedNamespace.
            MissingExtra: the driver needs a library for streams (files: ``kvpersist[files]``).
        """
        self._may_write(key, False)
        self._expiry(ttl)
        writer = LargeWriter(self._pieces, key, expect, lambda: self._expiry(ttl))
        try:
            yield writer
            await writer._commit()
        except BaseException:  # cancelled too: nothing of it may stay
            await writer._abort()
            raise
        await self._pieces.tidy((key,))

    @asynccontextmanager
    async def open_read(self, key: str) -> AsyncIterator[LargeReader | None]:
        """Read bytes in parts of at most 256 KiB; None where there is no such key.

        All parts are of one value. What `put_raw` stored can be read so too, and of another value the
        encoded payload. Parts are checked before they are given out; raises as `LargeReader` tells.
        """
        reader = await self._pieces.open(self._key(key))
        try:
            yield reader
        finally:
            if reader is not None:
                await reader._close()

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
                await self._put(Put(key, entry.value, self._if_unchanged(entry), self._expiry(ttl)))
            except Conflict:
                continue
            return True

    async def delete(self, key: str, *, expect: bytes | None = None, raw: bool = False) -> bool:
        """Remove the key; False where there was none. Raises Conflict when ``expect`` is not there."""
        self._may_write(key, raw)
        if expect is not None:
            await self._commit((Delete(key, expect),))
            await self._tidy(key)
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
            await self._tidy(key)
            return True

    # ---- many keys

    async def get_many(self, keys: Sequence[str]) -> list[Any]:
        """Read ``n`` keys in one call: ``n`` values in their order, None where there is none. Raises as `get`."""
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
        doomed: list[str] = []
        async for entry in self._walk(prefix, None, None, lambda key: None, page=_PAGE, keys_only=True):
            doomed.append(entry.key)
            if len(doomed) == _PAGE:
                await self._commit_many([Delete(key) for key in doomed])
                removed += len(doomed)
                doomed.clear()
        await self._commit_many([Delete(key) for key in doomed])
        return removed + len(doomed)

    async def scan(
        self,
        prefix: str = "",
        *,
        start: str | None = None,
        end: str | None = None,
        reverse: bool = False,
        page: int = 200,
        on_corrupt: Callable[[CorruptRecord], None] | None = None,
        on_large: Callable[[LargeValue], None] | None = None,
    ) -> AsyncIterator[tuple[str, Any]]:
        """Yield ``(key, value)`` below ``prefix`` in key order, ``page`` entries a round trip.

        What repositories own is left out, unless ``prefix`` names their namespace; their index entries
        and the keys of locks always are.

        Args:
            start: first key, inclusive; ``end``: exclusive. Either may be None.
            on_corrupt: is handed each damaged entry, and the scan goes on; without it, it is raised.
            on_large: the same for values that `open_read` reads.
        """
        if _may_meet_pieces(prefix):
            await self._refresh()  # so that the pieces of large values are passed over, not read

        def skips(key: str) -> str | None:
            space, _, rest = key.partition(":")
            if rest.startswith(LOCKS):
                return f"{space}:{LOCKS}"
            if space not in self._owned or not rest:
                return None
            inside = prefix.startswith(f"{space}:")
            return (key if "#" in rest.partition(":")[0] else None) if inside else f"{space}:"

        async for entry in self._walk(prefix, start, end, skips, reverse=reverse, page=page):
            try:
                value = codec.decode_plain(entry.key, entry.value)
            except CorruptRecord as error:
                if on_corrupt is None:
                    raise
                on_corrupt(error)
                continue
            except LargeValue as error:
                if on_large is None:
                    raise
                on_large(error)
                continue
            yield entry.key, value

    async def keys(self, prefix: str = "", max_depth: int | None = None, *, raw: bool = False) -> AsyncIterator[str]:
        """Yield the keys below ``prefix`` in order, without values.

        ``max_depth=1`` leaves out keys with a further ``:`` behind the prefix, 2 those with two, and
        so on; what lies deeper is skipped over, not read. What repositories own is left out, unless
        ``prefix`` names their namespace, or ``raw``, and so are the keys of locks, unless ``raw``.
        """

        def skips(key: str) -> str | None:
            space, colon, rest = key.partition(":")
            if not raw and rest.startswith(LOCKS):
                return f"{space}:{LOCKS}"
            if colon and not raw and space in self._owned and not prefix.startswith(f"{space}:"):
                return f"{space}:"
            if max_depth is not None:
                below = key[len(prefix) :].split(":", max_depth)
                if len(below) > max_depth:
                    return prefix + ":".join(below[:max_depth]) + ":"
            return None

        async for entry in self._walk(prefix, None, None, skips, page=_PAGE, keys_only=True):
            yield entry.key

    async def snapshot(self, prefix: str = "") -> dict[str, Any]:
        """Return all values below ``prefix``, the prefix cut off their keys; for `restore`. Raises LargeValue."""
        return {key[len(prefix) :]: value async for key, value in self.scan(prefix)}

    async def restore(self, snapshot: Mapping[str, Any], prefix: str = "") -> None:
        """Write what `snapshot` returned below ``prefix``; other keys stay."""
        await self.put_many({prefix + key: value for key, value in snapshot.items()})

    # ---- changes

    def watch(
        self,
        prefix: str | Sequence[str],
        *,
        collapse: float | None = None,
        interval: float | None = None,
        buffer: int = 1024,
    ) -> Watch:
        """Iterate over what changes below ``prefix``, or of a list of keys, whoever changes it.

        Changes of a key come in the order of their commits; of several commits in quick succession only
        the last may be told. Expiry is not told where the backend removes expired entries itself.

        Args:
            collapse: join what comes within so many seconds into one change.
            interval: seconds between looks where the backend does not tell of changes; default 1.
            buffer: keys kept for a watcher that is slow; beyond it, it is told that it ``missed`` some.
        """
        return Watch(self._changes, Scope.of(prefix), collapse, interval, buffer)

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
        await tx._commit()
        await self._tidy(*tx._staged)

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

    def lock(
        self,
        name: str,
        *,
        ttl: float = 30.0,
        wait: float | None = None,
        namespace: str = "kv",
        owner: str | None = None,
        renew: bool = True,
    ) -> Lock:
        """Return a lock to ``async with``; what is inside has a `Lease`, also to write under.

        Args:
            ttl: seconds until others may have it when its holder is not heard of any more.
            wait: seconds to wait for it, then Locked is raised; 0 tries once, None waits for ever.
            namespace: of what the lock guards.
            owner: what others are told of who holds it; None: host and process.
            renew: renew the lease every third of ``ttl`` until it is released.

        Raises:
            BadOption, BadKey, KeyTooLong. Unsupported: a backend without conditional writes.
        """
        return Lock(self, name, ttl=ttl, wait=wait, namespace=namespace, owner=owner, renew=renew)

    # ---- private

    async def _walk(
        self,
        prefix: str,
        start: str | None,
        end: str | None,
        skips: Callable[[str], str | None],
        *,
        page: int,
        reverse: bool = False,
        keys_only: bool = False,
    ) -> AsyncIterator[Entry]:
        """Yield entries page by page; ``skips`` names a prefix to pass over, beginning with this key."""
        if page < 1:
            raise BadRequest(f"page={page}: read at least one entry at a time")
        low = max(prefix, start or "") or None
        high = keys.prefix_end(prefix) if prefix else None
        if end is not None:
            high = end if high is None else min(high, end)
        for first, last in self._around_pieces(low, high, reverse):
            async for entry in self._pages(first, last, skips, page, reverse, keys_only):
                yield entry

    async def _pages(
        self,
        low: str | None,
        high: str | None,
        skips: Callable[[str], str | None],
        page: int,
        reverse: bool,
        keys_only: bool,
    ) -> AsyncIterator[Entry]:
        while True:
            found = await self._scan(low, high, limit=page, reverse=reverse, keys_only=keys_only)
            skipped = ""
            for entry in found:
                if skipped and entry.key.startswith(skipped):
                    continue
                skipped = area_of(entry.key) or skips(entry.key) or ""
                if not skipped:
                    yield entry
            if len(found) < page:
                return
            last = found[-1].key
            if reverse:
                high = min(last, skipped) if skipped else last
            else:
                low = (keys.prefix_end(skipped) if skipped else None) or last + "\0"

    def _around_pieces(self, low: str | None, high: str | None, reverse: bool) -> list[tuple[str | None, str | None]]:
        """The parts of ``[low, high)`` that hold no pieces of large values, in the order of a scan."""
        parts: list[tuple[str | None, str | None]] = []
        for begin in sorted(map(area, self._large)):
            end = keys.prefix_end(begin)
            assert end is not None
            if (low is None or low < end) and (high is None or begin < high):
                if low is None or low < begin:
                    parts.append((low, begin))
                low = end
        if high is None or low is None or low < high:
            parts.append((low, high))
        return parts[::-1] if reverse else parts

    def _key(self, key: str) -> str:
        keys.check_key(key, self._key_bytes)
        return key

    def _may_write(self, key: str, raw: bool) -> None:
        keys.check_key(key, self._key_bytes)
        if MARK in key and area_of(key):
            raise BadKey(key, f"{MARK!r} begins the keys of the pieces of large values: choose another")
        if not raw and (space := key.partition(":")[0].partition("#")[0]) in self._owned and ":" in key:
            raise ReservedNamespace(key, space)

    def _expiry(self, ttl: float | None) -> float | None:
        ttl = self._ttl if ttl is None else ttl
        if ttl is None or ttl == math.inf:
            return None
        if math.isnan(ttl):
            raise BadOption("ttl", "it is not a number")
        return self.clock() + ttl

    def _if_unchanged(self, entry: Entry) -> bytes | None:
        return entry.version if self.capabilities.conditional else None

    async def _put(self, put: Put) -> bytes:
        version = await self._commit((put,))
        await self._tidy(put.key)
        return version

    async def _tidy(self, *changed: str) -> None:
        if self._large:
            await self._pieces.tidy(changed)

    async def _tend(self) -> None:
        await self._pieces.sweep(all_=False)

    async def _commit_many(self, ops: Sequence[Op]) -> None:
        try:
            await self._commit_cuts(ops)
        finally:
            await self._tidy(*(op.key for op in ops))

    async def _commit_cuts(self, ops: Sequence[Op]) -> None:
        size = min(_BATCH, self.capabilities.max_batch or _BATCH)
        apart = self.capabilities.atomic_batch == "partition"
        groups: dict[str, list[Op]] = {}
        for op in ops:
            groups.setdefault(keys.partition(op.key) if apart else "", []).append(op)
        cuts = [group[at : at + size] for group in groups.values() for at in range(0, len(group), size)]
        outcomes: list[bytes | KvError] = []
        for at in range(0, len(cuts), _CUTS):
            part = cuts[at : at + _CUTS]
            try:
                answers = await self._commit_each(part)
            except KvError as error:
                if not outcomes:
                    raise
                answers = [error] * len(part)
            outcomes += answers
            if all(isinstance(answer, (CommitUnknown, Unavailable)) for answer in answers):  # nobody is there
                outcomes += [Unavailable("not tried: the backend does not answer")] * (len(cuts) - len(outcomes))
                break
        failed: dict[str, KvError] = {}
        for cut, outcome in zip(cuts, outcomes, strict=True):
            if isinstance(outcome, KvError):
                failed.update((op.key, outcome) for op in cut)
        if failed and len(failed) == len(ops) and len(cuts) == 1:
            raise next(iter(failed.values()))
        if failed:
            raise PartlyDone(len(ops) - len(failed), failed)


def _may_meet_pieces(prefix: str) -> bool:
    """Whether keys below ``prefix`` may be those of pieces."""
    _, colon, rest = prefix.partition(":")
    return not colon or MARK.startswith(rest) or rest.startswith(MARK)
