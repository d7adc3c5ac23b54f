"""Coalescing: concurrent calls share round trips, and every call ends by its deadline.

Two parked lanes per stack, reads and writes, each with one call in flight and no timer that delays
anything: what arrives while a call is in flight goes into the next one.
"""

from __future__ import annotations

import asyncio
import copy
import time
import types
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Generator, Iterable, Sequence
from time import perf_counter
from typing import Any, Final, Generic, TypeVar, cast

import msgspec

from kvpersist.driver import Batch, Capabilities, Committed, Driver, Entry
from kvpersist.errors import CommitUnknown, DeadlineExceeded, KvError, StoreClosed
from kvpersist.metrics import Counters

__all__ = ["Batched", "own_instance"]

_MAX_OPERATIONS: Final = 512  # of one drain
_MAX_BYTES: Final = 1 << 20  # of one drain
_GRACE: Final = 0.5  # seconds a cancelled driver call gets to end before it is abandoned

_Work = TypeVar("_Work")
_Answer = TypeVar("_Answer")
_Error = TypeVar("_Error", bound=BaseException)


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
        self._reads = _Lane("get", self._get_merged, timeout, settles) if coalesce == "both" else None
        self._writes = _Lane("commit", self._commit_merged, timeout, settles) if coalesce != "none" else None

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
        try:
            found = dict(zip(unique, await self._get(unique), strict=True))
        except KvError as error:
            return await self._get_around(calls, error)
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


class _Call(msgspec.Struct, Generic[_Work, _Answer], gc=False):
    work: _Work
    operations: int
    size: int  # bytes of the values
    answer: asyncio.Future[_Answer]
    deadline: float


class _Lane(Generic[_Work, _Answer]):
    """Calls in their order, one drain in flight. Belongs to the loop of its first call."""

    def __init__(
        self,
        operation: str,
        run: Callable[[list[_Work]], Awaitable[Sequence[_Answer | KvError]]],
        timeout: float | None,
        settles: bool,
    ) -> None:
        self._operation = operation
        self._run = run
        self._timeout = timeout
        self._settles = settles
        self._waiting: deque[_Call[_Work, _Answer]] = deque()
        self._operations = self._size = 0  # of what is waiting
        self._flying: list[_Call[_Work, _Answer]] = []
        self._cancelled = False  # the flight was cancelled because all of its calls are overdue
        self._closed = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._worker: asyncio.Task[None] | None = None
        self._parked: asyncio.Future[None] | None = None
        self._timer: asyncio.TimerHandle | None = None

    def submit(self, work: _Work, operations: int, size: int) -> asyncio.Future[_Answer]:
        loop = self._loop
        if loop is None:
            loop = self._loop = asyncio.get_running_loop()
        deadline = 0.0 if self._timeout is None else loop.time() + self._timeout
        if self._closed:
            raise StoreClosed("the store was closed: open it again")
        answer: asyncio.Future[_Answer] = loop.create_future()
        self._waiting.append(_Call(work, operations, size, answer, deadline))
        self._operations += operations
        self._size += size
        if self._parked is not None:
            if not self._parked.done():
                self._parked.set_result(None)
        elif self._worker is None:
            self._start()
        if self._timer is None and self._timeout is not None:
            self._timer = loop.call_at(deadline, self._tick)
        return answer

    async def close(self) -> None:
        """Answer what was submitted, within the deadline, then refuse everything."""
        self._closed = True
        left = [call.answer for call in (*self._flying, *self._waiting) if not call.answer.done()]
        if left:
            await asyncio.wait(left, timeout=self._timeout)
        worker, self._worker = self._worker, None
        if self._timer is not None:
            self._timer.cancel()
        if worker is not None:
            worker.cancel()
            await asyncio.wait([worker], timeout=_GRACE)
        _fail(self._flying, self._lost("the store was closed", settled=False))
        _fail(self._waiting, self._late())

    async def _serve(self) -> None:
        loop = asyncio.get_running_loop()
        me = asyncio.current_task()
        assert me is not None
        while True:
            if not self._waiting:
                self._parked = loop.create_future()
                try:
                    await self._parked
                finally:
                    self._parked = None
            calls = self._take()
            if not calls:
                continue
            self._flying, self._cancelled = calls, False
            try:
                answers = await self._run([call.work for call in calls])
            except asyncio.CancelledError:
                if self._cancelled:
                    me.uncancel()
                    _fail(calls, self._lost(f"no answer in {self._timeout:g} s", self._settles))
                else:  # the lane is closing, or the driver cancelled its own call
                    _fail(calls, self._lost("the call was cancelled", settled=False))
                    if me.cancelling():
                        raise
            except Exception as error:  # noqa: BLE001  # whatever a driver raises belongs to these callers, not to the lane
                _fail(calls, error)
            else:
                for call, answer in zip(calls, answers, strict=True):
                    if call.answer.done():
                        continue
                    if type(answer) is list:
                        call.answer.set_result(cast(_Answer, answer))
                    else:
                        _fail([call], cast(KvError, answer))
            if self._worker is not me:  # abandoned: another worker serves the lane
                return
            self._flying = []

    def _take(self) -> list[_Call[_Work, _Answer]]:
        """Take whole calls, at least one, up to the limits of a drain; cancelled ones are dropped."""
        waiting = self._waiting
        if self._operations <= _MAX_OPERATIONS and self._size <= _MAX_BYTES:
            calls = [call for call in waiting if not call.answer.done()]
            waiting.clear()
            self._operations = self._size = 0
            return calls
        calls: list[_Call[_Work, _Answer]] = []
        operations = size = 0
        while waiting:
            call = waiting[0]
            if not call.answer.done():
                operations += call.operations
                size += call.size
                if calls and (operations > _MAX_OPERATIONS or size > _MAX_BYTES):
                    break
                calls.append(call)
            self._pop()
        return calls

    def _pop(self) -> _Call[_Work, _Answer]:
        call = self._waiting.popleft()
        self._operations -= call.operations
        self._size -= call.size
        return call

    def _tick(self) -> None:
        """Fail what is overdue; the lane's only timer."""
        loop = asyncio.get_running_loop()
        now = loop.time()
        while self._waiting and (self._waiting[0].deadline <= now or self._waiting[0].answer.done()):
            _fail([self._pop()], self._late())
        if self._flying and self._cancelled:
            self._abandon()
        elif self._flying and self._flying[-1].deadline <= now:  # the youngest, so all of them
            self._cancelled = True
            assert self._worker is not None
            self._worker.cancel()
            self._timer = loop.call_later(_GRACE, self._tick)
            return
        else:
            _fail(
                [call for call in self._flying if call.deadline <= now],
                self._lost(f"no answer in {self._timeout:g} s", settled=False),
            )
        due = [call.deadline for call in self._flying if not call.answer.done()]
        due += [self._waiting[0].deadline] if self._waiting else []
        self._timer = loop.call_at(min(due), self._tick) if due else None
        if self._timer is None and self._flying:
            self._timer = loop.call_at(self._flying[-1].deadline, self._tick)

    def _abandon(self) -> None:
        """Leave a driver call that ignores its cancellation to itself, and serve the lane anew."""
        _fail(self._flying, self._lost("the driver does not answer", settled=False))
        self._flying, self._cancelled = [], False
        self._start()

    def _start(self) -> None:
        self._worker = asyncio.get_running_loop().create_task(self._serve())
        self._worker.add_done_callback(self._ended)

    def _ended(self, worker: asyncio.Task[None]) -> None:
        """Somebody cancelled the worker, e.g. all tasks of the loop: the next call starts another."""
        if worker is self._worker:
            _fail(self._flying, self._lost("its task was ended", settled=False))
            self._worker, self._flying = None, []
            if any(not call.answer.done() for call in self._waiting):
                self._start()

    def _late(self) -> Exception:
        return DeadlineExceeded(self._operation, self._timeout or 0)

    def _lost(self, reason: str, settled: bool) -> Exception:
        return CommitUnknown((), reason, settled) if self._operation == "commit" else self._late()


def own_instance(error: _Error) -> _Error:
    """Return a copy for one of several callers: a traceback grows where an exception is raised.

    An exception of somebody else's may refuse to be copied; it is shared.
    """
    if not isinstance(error, KvError):
        return error
    own = copy.copy(error)
    own.__cause__ = error.__cause__
    return own


def _fail(calls: Iterable[_Call[Any, Any]], error: Exception) -> None:
    for call in calls:
        if not call.answer.done():
            call.answer.set_exception(own_instance(error))


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
