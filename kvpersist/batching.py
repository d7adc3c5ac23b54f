"""Coalescing: concurrent calls share round trips, and every call ends by its deadline.

Two lanes per stack, reads and writes; where neither is wanted, the driver is called at once.
"""

from __future__ import annotations

import asyncio
import time
import types
from collections.abc import Awaitable, Callable, Coroutine, Generator, Sequence
from time import perf_counter
from typing import Any, TypeVar, cast

from kvpersist.driver import Batch, Capabilities, Check, Committed, Driver, Entry
from kvpersist.errors import CommitUnknown, DeadlineExceeded, KvError
from kvpersist.lane import Lane
from kvpersist.metrics import Counters

__all__ = ["Batched"]

_Answer = TypeVar("_Answer")


class Batched:
    """Wraps the top of a stack of linear layers, with a driver's operations.

    Promised: a get that is called after a put's await returned sees it; two puts of one key by one
    loop apply in their order; reads never wait for writes. A cancelled caller's operation is dropped
    if its lane has not taken it yet; once taken it runs, and may be committed.

    Attributes:
        counters: what was asked for, and how long the driver took.
    """

    def __init__(self, driver: Driver, *, timeout: float | None = 10.0, counters: Counters | None = None) -> None:
        self.driver = driver
        self.counters = counters or Counters(time.time)
        self.capabilities: Capabilities = driver.capabilities
        self._timeout = timeout
        coalesce = self.capabilities.coalesce
        settles = self.capabilities.cancel_settles
        overlap = self.capabilities.overlap
        self._reads = self._writes = None
        if coalesce == "both":
            self._reads = Lane(
                "get", self._get_merged, timeout=timeout, settles=settles, flights=1 + (overlap == "both")
            )
        if coalesce != "none":
            self._writes = Lane(
                "commit",
                self._commit_merged,
                timeout=timeout,
                settles=settles,
                flights=1 + (overlap != "none"),
                apart=_apart,
            )

    def get(self, keys: Sequence[str]) -> Awaitable[list[Entry | None]]:
        """As `Driver.get`; to be awaited at once. Not a coroutine of its own: this is the hot path."""
        counters = self.counters
        counters.gets += 1
        counters.keys_read += len(keys)
        if self._reads is None:
            return self._within("get", self.driver.get(keys))
        return self._reads.submit(keys, len(keys), 0)

    def commit(self, batches: Sequence[Batch]) -> Awaitable[list[Committed | KvError]]:
        """As `Driver.commit`; a `CommitUnknown` raised by it names no keys. To be awaited at once."""
        operations, size = self.counters.asked(batches)
        if self._writes is None:
            return self._within("commit", self.driver.commit(batches))
        return self._writes.submit(batches, operations, size)

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
        self.counters.scans += 1
        call = self.driver.scan(start, end, limit=limit, reverse=reverse, keys_only=keys_only, deref=deref)
        found = await self._within("scan", call)
        self.counters.scanned(found)
        return found

    async def close(self) -> None:
        """End what was submitted, then close the driver."""
        await self.drain()
        await self.driver.close()

    async def drain(self) -> None:
        """End what was submitted and refuse what comes after it; the driver stays open."""
        for lane in (self._writes, self._reads):
            if lane is not None:
                await lane.close()

    async def _get(self, keys: Sequence[str]) -> list[Entry | None]:
        begun = perf_counter()
        try:
            found = await self.driver.get(keys)
        finally:
            self.counters.ended("get", perf_counter() - begun)
        self.counters.read(found)
        return found

    async def _commit(self, batches: Sequence[Batch]) -> list[Committed | KvError]:
        begun = perf_counter()
        try:
            return await self.driver.commit(batches)
        finally:
            self.counters.ended("commit", perf_counter() - begun)

    async def _get_merged(self, calls: list[Sequence[str]]) -> list[list[Entry | None] | KvError]:
        if len(calls) == 1:
            return [await self._get(calls[0])]
        unique = list(dict.fromkeys([key for keys in calls for key in keys]))
        single = len(calls) == len(unique) and max(map(len, calls)) == 1  # each asks for a key of its own: most often
        try:
            entries = await self._get(unique)
        except KvError as error:
            return await self._get_around(calls, error)
        if single:
            return [[entry] for entry, _ in zip(entries, unique, strict=True)]
        found = dict(zip(unique, entries, strict=True))
        return [[found[key] for key in keys] for keys in calls]

    async def _get_around(self, calls: list[Sequence[str]], error: KvError) -> list[list[Entry | None] | KvError]:
        """Give ``error`` to those who asked for the keys it is about, and read again what the others asked for."""
        failed: dict[str, KvError] = {}
        found: dict[str, Entry | None] | None = None
        left = calls
        while found is None:
            about = set(error.about or ()).intersection([key for keys in left for key in keys])
            if not about:  # it is everybody's
                raise error
            failed |= dict.fromkeys(about, error)
            left = [keys for keys in left if failed.keys().isdisjoint(keys)]
            unique = list(dict.fromkeys([key for keys in left for key in keys]))
            try:
                found = dict(zip(unique, await self._get(unique), strict=True))
            except KvError as another:
                error = another
        theirs = [next((failed[key] for key in keys if key in failed), None) for keys in calls]
        return [own or [found[key] for key in keys] for keys, own in zip(calls, theirs, strict=True)]

    async def _commit_merged(self, calls: list[Sequence[Batch]]) -> list[list[Committed | KvError]]:
        if len(calls) == 1:
            return [await self._commit(calls[0])]
        merged = [batch for batches in calls for batch in batches]
        outcomes = await self._commit(merged)
        if len(merged) == len(calls):
            return [[outcome] for outcome in outcomes]
        answers: list[list[Committed | KvError]] = []
        at = 0
        for batches in calls:
            answers.append(outcomes[at : at + len(batches)])
            at += len(batches)
        return answers

    async def _within(self, operation: str, call: Coroutine[Any, Any, _Answer]) -> _Answer:
        """Await a driver's call, which ends by the deadline; one that need not wait costs no timer."""
        begun = perf_counter()
        try:
            if self._timeout is None:
                answer = await call
            else:
                try:
                    waits_for = call.send(None)
                except StopIteration as done:
                    answer = done.value
                else:
                    answer = await self._by_deadline(operation, self._timeout, call, waits_for)
        finally:
            self.counters.ended(operation, perf_counter() - begun)
        if operation == "get":
            self.counters.read(cast("list[Entry | None]", answer))
        return answer

    async def _by_deadline(
        self, operation: str, seconds: float, call: Coroutine[Any, Any, _Answer], waits_for: Any
    ) -> _Answer:
        deadline = asyncio.timeout(seconds)
        try:
            async with deadline:
                return await _resumed(call, waits_for)
        except TimeoutError as error:
            if not deadline.expired():
                raise
            if operation == "commit":
                reason = f"no answer in {seconds:g} s"
                raise CommitUnknown((), reason, self.capabilities.cancel_settles) from error
            raise DeadlineExceeded(operation, seconds) from error


def _apart(flying: list[Sequence[Batch]]) -> Callable[[list[Sequence[Batch]]], bool]:
    """Return what tells whether commits use none of the keys that ``flying`` writes."""
    written = {op.key for batches in flying for batch in batches for op in batch.ops if type(op) is not Check}
    return lambda calls: written.isdisjoint([op.key for batches in calls for batch in batches for op in batch.ops])


@types.coroutine
def _resumed(call: Coroutine[Any, Any, _Answer], waits_for: Any) -> Generator[Any, Any, _Answer]:
    """Await a coroutine that was already started and has yielded ``waits_for``."""
    while True:
        try:
            sent = yield waits_for
        except BaseException as error:  # noqa: BLE001  # cancellation too belongs to the coroutine
            step, argument = call.throw, error
        else:
            step, argument = call.send, sent
        try:
            waits_for = step(argument)
        except StopIteration as done:
            return done.value
