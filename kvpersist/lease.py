"""Locks: a lease on a name, who holds it, and writes that only its holder can make.

A lock of namespace ``ns`` is two keys. ``ns:#lock:name`` says who holds it until when, and is
rewritten by every renewal; ``ns:#lock-token:name`` holds the token and is written only where the lock
changes hands. A fenced write is one batch with a `Check` of the second: renewals do not disturb it,
and once somebody else has taken the lock it fails, however long its process was stopped.

Without atomic batches there is the first key alone, and a fenced write is of one key: its version is
read, then whether the lock is still ours, then it is replaced if it has that version. Whoever took the
lock and has written the key has changed its version, so that the tokens behind the writes of one key
never go back. That rests on versions, which absence has not: removing and expiring are refused there.
"""

from __future__ import annotations

import asyncio
import math
import os
import random
import socket
from collections.abc import AsyncIterator, Coroutine, Iterable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Final, TypeVar

import msgspec

from kvpersist import codec, keys
from kvpersist.driver import ABSENT, Check, Delete, Entry, Expect, HasClock, Op, Put
from kvpersist.errors import (
    BadOption,
    BadRequest,
    Conflict,
    CorruptRecord,
    DeadlineExceeded,
    ForkedStore,
    KvError,
    LeaseLost,
    Locked,
    StoreClosed,
    Unsupported,
    WrongLoop,
)
from kvpersist.transaction import Transaction, backoff

if TYPE_CHECKING:
    from kvpersist.changes import Waker
    from kvpersist.store import Store

__all__ = ["Holder", "Lease", "Lock"]

_SHORTEST: Final = 0.001  # seconds of one wait
_FIRST_POLL: Final = 0.01  # seconds between two looks at a lock that somebody holds; doubled each time
_LONGEST_POLL: Final = 0.25  # seconds
_RENEWALS: Final = 3  # in the time of one lease
_ATTEMPTS: Final = 40  # of a write in steps that keeps losing to writers without the lock
_RETRIES: Final = 12  # in that time, where the backend does not answer

_T = TypeVar("_T")
_tasks: set[asyncio.Task[Any]] = set()  # the loop itself does not keep its tasks alive


class Holder(msgspec.Struct, frozen=True):
    """Who holds a lock; ``expires_at`` in seconds since 1970, unless it is renewed."""

    owner: str
    expires_at: float
    token: int


class _Record(msgspec.Struct):
    """What ``ns:#lock:name`` holds; ``owner`` is empty where the lock was given back."""

    owner: str
    token: int
    expires_at: float
    ttl: float  # seconds; a lock that nobody renewed for so long is free, whatever the clocks say


class _Seen(msgspec.Struct):
    """What one look at a lock found."""

    now: float
    held: Entry | None
    fence: Entry | None
    record: _Record | None
    number: int  # the last token given out, 0: none

    @property
    def holder(self) -> Holder | None:
        record = self.record
        if record is None or not record.owner or record.expires_at <= self.now:
            return None
        return Holder(record.owner, record.expires_at, record.token)


class Lock:
    """A name that one holder at a time has a lease on. Made by `Store.lock`; nothing is read or written yet.

    ``async with store.lock("job") as lease`` waits for the lock, renews the lease while the block runs and
    gives it back at the end. At the end it raises LeaseLost where somebody else took the lock meanwhile:
    what the block did unfenced may have been done beside them. Where the lock could not be given back it
    ends by its ``ttl``.

    The keys it keeps stay when nobody holds it, so that tokens go on growing.
    """

    def __init__(
        self,
        store: Store,
        name: str,
        *,
        ttl: float = 30.0,
        wait: float | None = None,
        namespace: str = "kv",
        owner: str | None = None,
        renew: bool = True,
    ) -> None:
        """As `Store.lock`."""
        if not store.capabilities.conditional:
            raise Unsupported("a lock", "use a backend with conditional writes")
        if not (0 < ttl < math.inf):
            raise BadOption("ttl", f"{ttl}: how many seconds a lease lasts without renewal, more than 0")
        if wait is not None and not wait >= 0:
            raise BadOption("wait", f"{wait}: seconds, 0 to try once, or None to wait for ever")
        if owner == "":
            raise BadOption("owner", "it is empty: leave it out, or say who asks")
        space = keys.namespace(namespace)
        escaped = keys.escape(name)
        keys.check_key(escaped, keys.ID_LIMIT)
        self.name = name
        self.ttl: float = float(ttl)
        self.wait = wait
        self.owner: str = owner or f"{socket.gethostname()}:{os.getpid()}"
        self._store = store
        self._space = space
        self._renew = renew
        self._key = f"{space}:{keys.LOCKS}:{escaped}"
        self._token_key = f"{space}:{keys.LOCKS}-token:{escaped}"
        self._fenced = store.capabilities.atomic_batch != "none"
        self._entered = False
        self._lease: Lease | None = None

    def __repr__(self) -> str:
        return f"<Lock {self._key}>"

    async def acquire(self) -> Lease:
        """Take the lock, waiting as ``wait`` says, and return the lease; its holder releases it.

        Those who wait are not queued: any of them may be next.

        Raises:
            Locked: somebody else holds it, and the time to wait is over.
        """
        loop = asyncio.get_running_loop()
        until = math.inf if self.wait is None else loop.time() + self.wait
        version, since = b"", 0.0  # of the holder's last renewal, and when this loop saw it first
        attempt = 0
        news: Waker | None = None
        try:
            while True:
                asked = loop.time()
                seen = await self._look()
                if seen.held is None or seen.held.version != version:
                    version, since = b"" if seen.held is None else seen.held.version, loop.time()
                holder, record = seen.holder, seen.record
                if holder is None or record is None or asked - since >= record.ttl:
                    lease = await self._kept(self._taken(seen))
                    if lease is not None:
                        return lease
                    await backoff(attempt)  # another was quicker
                    attempt += 1
                    continue
                left = until - loop.time()
                if left <= 0:
                    raise Locked(self.name, holder.owner, holder.expires_at)
                if news is None:
                    news = self._store._waker(self._key)  # tells of what comes after the next look
                    continue
                most = min(left, holder.expires_at - seen.now, since + record.ttl - asked)
                await news.wait(min(max(most, _SHORTEST), self._poll(attempt)))
                attempt += 1
        finally:
            if news is not None:
                news.close()

    async def holder(self) -> Holder | None:
        """Return who holds the lock now, or None."""
        return (await self._look()).holder

    async def __aenter__(self) -> Lease:
        if self._entered:
            raise BadRequest(f"this lock {self.name!r} is being held or waited for: make another with store.lock()")
        self._entered = True
        try:
            self._lease = await self.acquire()
        except BaseException:
            self._entered = False
            raise
        return self._lease

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
        lease, self._lease, self._entered = self._lease, None, False
        if lease is None:
            return
        try:
            kept = await asyncio.shield(_spawned(lease.release()))  # also where the block was cancelled
        except KvError:  # nobody else can have it before its time is over, and then they can
            return
        if not kept and kind is None:
            raise LeaseLost(self.name, lease.token)

    # ---- private

    async def _look(self) -> _Seen:
        wanted = [self._key, self._token_key] if self._fenced else [self._key]
        now, entries = await asyncio.gather(self._now(), self._store._entries(wanted))
        held, fence = entries[0], entries[1] if self._fenced else None
        record = None if held is None else _record(held)
        numbers = [0 if record is None else record.token, 0 if fence is None else _number(fence)]
        return _Seen(now, held, fence, record, max(numbers))

    async def _now(self) -> float:
        """Seconds since 1970 by the store's clock, where it has one."""
        store = self._store
        store._check()
        if not isinstance(store.driver, HasClock):
            return store.clock()
        try:
            async with asyncio.timeout(store.timeout):
                return await store.driver.now()
        except TimeoutError as error:
            raise DeadlineExceeded("now", store.timeout or 0) from error

    async def _taken(self, seen: _Seen) -> Lease | None:
        """Take a lock that is free, unless another was quicker."""
        began = asyncio.get_running_loop().time()
        # the first one counts from the clock: it is greater than those of a namespace that was cleared
        token = seen.number + 1 if seen.number else max(1, int(seen.now * 1e6))
        record = _Record(self.owner, token, seen.now + self.ttl, self.ttl)
        ops: list[Op] = [self._put(record, _expected(seen.held))]
        if self._fenced:
            number = codec.encode_plain(self._token_key, token, self._store.codec)
            ops.append(Put(self._token_key, number, _expected(seen.fence)))
        try:
            version = await self._store._commit(ops)
        except Conflict:
            return None
        return Lease(self, record, version, began + self.ttl)

    def _put(self, record: _Record, expect: Expect) -> Put:
        value = codec.encode_plain(self._key, msgspec.to_builtins(record), self._store.codec)
        return Put(self._key, value, expect)

    async def _kept(self, claim: Coroutine[Any, Any, Lease | None]) -> Lease | None:
        """Finish a claim also where its caller is cancelled, and give back then what nobody waits for."""
        task = _spawned(claim)
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            task.add_done_callback(_given_back)
            raise

    def _poll(self, attempt: int) -> float:
        """Seconds until the lock is looked at again where nothing tells that it was given back."""
        if self._store.capabilities.watch is not None:
            return math.inf
        return random.uniform(_FIRST_POLL, min(_LONGEST_POLL, _FIRST_POLL * 2 ** min(attempt + 1, 8)))


class Lease:
    """The right to a lock for a time, and to write under it.

    Attributes:
        name: of the lock. owner: who was named as its owner.
        token: grows by one whenever the lock changes hands; what a system outside the store compares.
        expires_at: seconds since 1970; renewals move it.
    """

    def __init__(self, lock: Lock, record: _Record, version: bytes, until: float) -> None:
        self.name: str = lock.name
        self.owner: str = record.owner
        self.token: int = record.token
        self.expires_at: float = record.expires_at
        self._lock = lock
        self._store = lock._store
        self._fence = version  # of the token's key: it stays while the lock does not change hands
        self._held = version  # of the lock's key: every renewal changes it
        self._until = until  # by the loop's clock
        self._taken = False
        self._released = False  # asked for; nothing is written under it any more
        self._given_back = False
        self._turn = asyncio.Lock()  # renewals and the release each begin from the version before
        self._renewer = _spawned(self._keep_renewed()) if lock._renew else None

    def __repr__(self) -> str:
        return f"<Lease {self._lock._key} token {self.token}>"

    @property
    def lost(self) -> bool:
        """Whether somebody else has the lock, or may have by now: released, or not renewed in time."""
        return self._taken or self._released or self._store._loop.time() >= self._until

    # ---- fenced writes

    async def put(
        self, key: str, value: Any, *, expect: Expect | None = None, ttl: float | None = None, raw: bool = False
    ) -> bytes:
        """Store ``value`` as `Store.put` does, if nobody took the lock meanwhile; return its version.

        Where the backend has no atomic batches, what holds is that no write under an older token happens
        to a key after one under a newer token.

        Raises:
            LeaseLost: the lock was taken over, or released; nothing was changed.
            Conflict: not as expected; nothing was changed.
            Unsupported: the key is in another namespace than the lock and the backend keeps them apart,
                or a ``ttl`` without atomic batches.
        """
        store = self._store
        store._may_write(key, raw)
        value_bytes = codec.encode_plain(key, value, store.codec)
        return await self._write(Put(key, value_bytes, expect, store._expiry(ttl)))

    async def delete(self, key: str, *, expect: bytes | None = None, raw: bool = False) -> bool:
        """Remove the key as `Store.delete` does, if nobody took the lock meanwhile; False where there was none.

        Raises:
            As `put`. Unsupported: the backend has no atomic batches.
        """
        store = self._store
        store._may_write(key, raw)
        if not self._lock._fenced:
            raise Unsupported("a fenced delete", "put a value that means it is gone")
        while True:
            found = expect
            if found is None and (info := await store.info(key)) is not None:
                found = info.version
            try:
                await self._write(Check(key, ABSENT) if found is None else Delete(key, found))
            except Conflict:
                if expect is not None:
                    raise
                continue
            return found is not None

    @asynccontextmanager
    async def atomic(self) -> AsyncIterator[Transaction]:
        """As `Store.atomic`: one batch at the end of the block, written only if nobody took the lock meanwhile.

        Repositories take the transaction as ``tx=``.

        Raises:
            LeaseLost: the lock was taken over, or released; nothing was changed.
            Conflict: somebody changed what was read; nothing was changed.
            Unsupported: no atomic batches, or keys of another namespace than the lock's where the backend
                keeps them apart.
        """
        if not self._lock._fenced:
            raise Unsupported("a fenced transaction", "write key by key, or use sqlite, redis, postgres or mysql")
        tx = Transaction(self._store)
        tx._stage(self._guard())
        yield tx
        self._refuse_apart((*tx._staged, *tx._seen))
        self._refuse_released()
        try:
            await tx._commit()
        except Conflict as conflict:
            await self._refuse_taken(conflict)
            raise

    # ---- its life

    async def renew(self) -> None:
        """Let the lease last ``ttl`` seconds from now; one whose time is over too, if nobody took it.

        Raises:
            LeaseLost: somebody else has the lock, or it was released.
        """
        async with self._turn:
            self._refuse_released()
            ttl = self._lock.ttl
            began = self._store._loop.time()
            record = _Record(self.owner, self.token, await self._lock._now() + ttl, ttl)
            if not await self._rewrite(record):
                raise LeaseLost(self.name, self.token)
            self.expires_at, self._until = record.expires_at, began + ttl

    async def release(self) -> bool:
        """Give the lock back; False where somebody else has taken it. A second call does nothing."""
        self._released = True
        if self._renewer is not None:
            self._renewer.cancel()
        async with self._turn:
            if not self._given_back and not self._taken:
                self._given_back = await self._rewrite(_Record("", self.token, 0.0, self._lock.ttl))
        return self._given_back

    # ---- private

    def _guard(self) -> tuple[Check, ...]:
        """What every fenced batch begins with."""
        return (Check(self._lock._token_key, self._fence),)

    async def _write(self, op: Op) -> bytes:
        self._refuse_released()
        self._refuse_apart((op.key,))
        if not self._lock._fenced:
            return await self._write_in_steps(op)
        try:
            return await self._store._commit((*self._guard(), op))
        except Conflict as conflict:
            await self._refuse_taken(conflict)
            raise

    async def _write_in_steps(self, op: Op) -> bytes:
        """Replace one key on a backend without atomic batches; see the top of the module."""
        if not isinstance(op, Put) or op.expires_at is not None:
            raise Unsupported(
                "a fenced write that expires", "leave out the ttl, or give math.inf where the store has one"
            )
        attempt = 0
        while True:
            expect = op.expect
            if expect is None:
                [entry] = await self._store._entries([op.key])
                expect = _expected(entry)
            if not self._ours(await self._current()):  # after the version was read: the order matters
                self._taken = True
                raise LeaseLost(self.name, self.token)
            try:
                return await self._store._commit((Put(op.key, op.value, expect),))
            except Conflict:
                attempt += 1
                if op.expect is not None or attempt == _ATTEMPTS:
                    raise
            await backoff(attempt)

    async def _refuse_taken(self, conflict: Conflict) -> None:
        """Raise LeaseLost where a fenced batch failed because of the lock, whatever else failed too."""
        token_key = self._lock._token_key
        if conflict.key != token_key:
            [fence] = await self._store._entries([token_key])
            if fence is not None and fence.version == self._fence:
                return
        self._taken = True
        raise LeaseLost(self.name, self.token) from conflict

    def _refuse_released(self) -> None:
        if self._released:
            raise LeaseLost(self.name, self.token)

    def _refuse_apart(self, written: Iterable[str]) -> None:
        if self._store.capabilities.atomic_batch != "partition":
            return
        for key in written:
            if keys.partition(key) != self._lock._space:
                raise Unsupported(
                    f"a write of {key!r} under a lock of namespace {self._lock._space!r}",
                    "name the namespace of what the lock guards: store.lock(..., namespace=...)",
                )

    async def _rewrite(self, record: _Record) -> bool:
        """Replace our record; False where it is not ours any more."""
        while True:
            try:
                self._held = await self._store._commit((self._lock._put(record, self._held),))
            except Conflict:
                current = await self._current()
                if current is None or not self._ours(current):
                    self._taken = True
                    return False
                self._held = current.version  # a write of ours whose answer was lost
            else:
                return True

    async def _current(self) -> Entry | None:
        [entry] = await self._store._entries([self._lock._key])
        return entry

    def _ours(self, held: Entry | None) -> bool:
        return held is not None and _record(held).token == self.token

    async def _keep_renewed(self) -> None:
        """Renew until the lease is released or lost; a backend that does not answer is asked more often."""
        ttl = self._lock.ttl
        pause = ttl / _RENEWALS
        while True:
            await asyncio.sleep(pause)
            try:
                await self.renew()
            except (LeaseLost, StoreClosed, WrongLoop, ForkedStore):
                return
            except KvError:  # `lost` tells when it was too long; until then, and after, it may come back
                pause = ttl / _RETRIES
            else:
                pause = ttl / _RENEWALS


def _record(entry: Entry) -> _Record:
    try:
        return msgspec.convert(codec.decode_plain(entry.key, entry.value), _Record, strict=True)
    except msgspec.ValidationError as error:
        raise CorruptRecord(entry.key, "it is not the record of a lock") from error


def _number(entry: Entry) -> int:
    number = codec.decode_plain(entry.key, entry.value)
    if type(number) is not int:
        raise CorruptRecord(entry.key, "it is not the token of a lock")
    return number


def _expected(entry: Entry | None) -> Expect:
    return ABSENT if entry is None else entry.version


def _spawned(work: Coroutine[Any, Any, _T]) -> asyncio.Task[_T]:
    task = asyncio.get_running_loop().create_task(work)
    _tasks.add(task)
    task.add_done_callback(_tasks.discard)
    return task


def _given_back(task: asyncio.Task[Lease | None]) -> None:
    """Release what a cancelled caller had asked for."""
    if task.cancelled() or task.exception() is not None or (lease := task.result()) is None:
        return
    _spawned(_quietly_released(lease))


async def _quietly_released(lease: Lease) -> None:
    try:
        await lease.release()
    except KvError:  # nobody is there to be told, and it ends by its time
        return
