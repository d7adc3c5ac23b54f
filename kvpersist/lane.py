"""A lane of calls: what arrives while others are in flight is merged, and every call ends by its deadline."""

from __future__ import annotations

import asyncio
import copy
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Any, Final, Generic, TypeVar, cast

import msgspec

from kvpersist.errors import CommitUnknown, DeadlineExceeded, KvError, StoreClosed

__all__ = ["Lane", "own_instance"]

_MAX_OPERATIONS: Final = 512  # of one drain
_MAX_BYTES: Final = 1 << 20  # of one drain
_GRACE: Final = 0.5  # seconds a cancelled driver call gets to end before it is abandoned
_HALVED: Final = 8  # calls from which a flight that was alone is answered in two halves

_Work = TypeVar("_Work")
_Answer = TypeVar("_Answer")
_Error = TypeVar("_Error", bound=BaseException)


class _Call(msgspec.Struct, Generic[_Work, _Answer], gc=False):
    work: _Work
    operations: int
    size: int  # bytes of the values
    answer: asyncio.Future[_Answer]
    deadline: float


class _Flight(Generic[_Work, _Answer]):
    """A place in flight, and the task that brings calls there, one drain at a time."""

    __slots__ = ("calls", "grace", "parked", "task")

    def __init__(self) -> None:
        self.calls: list[_Call[_Work, _Answer]] = []  # that are with the driver
        self.grace: float | None = None  # until then they may end; they were cancelled, as all were overdue
        self.parked: asyncio.Future[None] | None = None
        self.task: asyncio.Task[None] | None = None


class Lane(Generic[_Work, _Answer]):
    """Calls in their order. Belongs to the loop of its first call.

    No timer delays a call: one that finds nothing in flight is taken at once, with all that came
    with it. A second flight takes half of what there is, so that this process works while the
    backend does. ``apart`` is given what is in flight and returns what tells whether works may
    overtake it; one that may not waits, and so do those behind it.
    """

    def __init__(
        self,
        operation: str,
        run: Callable[[list[_Work]], Awaitable[Sequence[_Answer | KvError]]],
        *,
        timeout: float | None,
        settles: bool,
        flights: int = 1,
        apart: Callable[[list[_Work]], Callable[[list[_Work]], bool]] | None = None,
    ) -> None:
        self._operation = operation
        self._run = run
        self._timeout = timeout
        self._settles = settles
        self._apart = apart
        self._waiting: deque[_Call[_Work, _Answer]] = deque()
        self._operations = self._size = 0  # of what is waiting
        self._flights = [_Flight[_Work, _Answer]() for _ in range(flights)]
        self._alternates = flights > 1
        self._resting = list(self._flights)  # parked, or without a task
        self._waking = False  # one of them was called, and has not looked yet
        self._closed = False
        self._loop: asyncio.AbstractEventLoop | None = None
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
        if self._resting and not self._waking:
            self._wake()
        if self._timer is None and self._timeout is not None:
            self._timer = loop.call_at(deadline, self._tick)
        return answer

    async def close(self) -> None:
        """Answer what was submitted, within the deadline, then refuse everything."""
        self._closed = True
        flying = [call for flight in self._flights for call in flight.calls]
        left = [call.answer for call in (*flying, *self._waiting) if not call.answer.done()]
        if left:
            await asyncio.wait(left, timeout=self._timeout)
        if self._timer is not None:
            self._timer.cancel()
        tasks = [flight.task for flight in self._flights if flight.task is not None]
        for flight in self._flights:
            flight.task = None
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=_GRACE)
        for flight in self._flights:
            _fail(flight.calls, self._lost("the store was closed", settled=False))
        _fail(self._waiting, self._late())

    def _wake(self) -> None:
        flight = self._resting.pop()
        self._waking = True
        if flight.task is None:
            self._start(flight)
        elif flight.parked is not None and not flight.parked.done():
            flight.parked.set_result(None)

    async def _serve(self, flight: _Flight[_Work, _Answer]) -> None:
        loop = asyncio.get_running_loop()
        me = asyncio.current_task()
        assert me is not None
        blocked = False  # what is waiting waits for what is in flight
        while True:
            self._waking = False
            if blocked or not self._waiting:
                flight.parked = loop.create_future()
                self._resting.append(flight)
                try:
                    await flight.parked
                finally:
                    flight.parked = None
                self._waking = False
            calls = self._take(flight)
            blocked = not calls and bool(self._waiting)
            if not calls:
                continue
            flight.calls, flight.grace = calls, None
            if self._waiting and self._resting:
                self._wake()
            try:
                answers = await self._run([call.work for call in calls])
            except asyncio.CancelledError:
                if flight.grace is not None and flight.task is me:
                    me.uncancel()
                    _fail(calls, self._lost(f"no answer in {self._timeout:g} s", self._settles))
                else:  # the lane is closing, or the driver cancelled its own call
                    _fail(calls, self._lost("the call was cancelled", settled=False))
                    if me.cancelling():
                        raise
            except Exception as error:  # noqa: BLE001  # whatever a driver raises belongs to these callers, not to the lane
                _fail(calls, error)
            else:
                pairs = list(zip(calls, answers, strict=True))
                if flight.task is me:
                    flight.calls = []
                await self._answer(pairs)
            if flight.task is not me:  # abandoned: another task has its place
                return
            flight.calls = []

    async def _answer(self, pairs: list[tuple[_Call[_Work, _Answer], _Answer | KvError]]) -> None:
        """Answer the calls of a flight, so that those who call again at once fill two equal flights by turns."""
        if not self._alternates:
            _settle(pairs)
            return
        others = sum([len(each.calls) for each in self._flights])
        if not others and len(pairs) >= _HALVED:  # half of them get a head start, or all would come back at once
            half = len(pairs) // 2
            _settle(pairs[:half])
            pairs = pairs[half:]
            try:
                await asyncio.sleep(0)
            finally:
                _settle(pairs)
            return
        _settle(pairs)
        if others and 0 < len(self._waiting) < len(pairs) + others:
            await asyncio.sleep(0)  # fewer than half of all are waiting: they fly with those who now call again

    def _take(self, flight: _Flight[_Work, _Answer]) -> list[_Call[_Work, _Answer]]:
        """Take whole calls, at least one if any may fly, up to the limits of a drain; cancelled ones are dropped."""
        waiting = self._waiting
        apart, most = None, len(waiting)
        if self._alternates:
            flying = [call.work for other in self._flights if other is not flight for call in other.calls]
            if flying:
                most = (len(waiting) + len(flying) + 1) // 2
                apart = None if self._apart is None else self._apart(flying)
        calls: list[_Call[_Work, _Answer]] = []
        if most >= len(waiting) and self._operations <= _MAX_OPERATIONS and self._size <= _MAX_BYTES:
            every = [call for call in waiting if not call.answer.done()]
            if apart is None or apart([call.work for call in every]):
                waiting.clear()
                self._operations = self._size = 0
                return every
        operations = size = 0
        while waiting and len(calls) < most:
            call = waiting[0]
            if not call.answer.done():
                operations += call.operations
                size += call.size
                if calls and (operations > _MAX_OPERATIONS or size > _MAX_BYTES):
                    break
                if apart is not None and not apart([call.work]):
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
        due = [self._waiting[0].deadline] if self._waiting else []
        for flight in self._flights:
            if flight.calls:
                due += self._ended_by(flight, now)
        self._timer = loop.call_at(min(due), self._tick) if due else None

    def _ended_by(self, flight: _Flight[_Work, _Answer], now: float) -> list[float]:
        """Fail what is overdue in ``flight``; return when to look again, if ever."""
        youngest = flight.calls[-1].deadline
        if flight.grace is not None:
            if now < flight.grace:
                return [flight.grace]
            self._abandon(flight)
            return []
        if youngest <= now:  # so all of them are
            flight.grace = now + _GRACE
            assert flight.task is not None
            flight.task.cancel()
            return [flight.grace]
        overdue = self._lost(f"no answer in {self._timeout:g} s", settled=False)
        _fail([call for call in flight.calls if call.deadline <= now], overdue)
        return [min((call.deadline for call in flight.calls if not call.answer.done()), default=youngest)]

    def _abandon(self, flight: _Flight[_Work, _Answer]) -> None:
        """Leave a driver call that ignores its cancellation to itself, and serve the lane anew."""
        _fail(flight.calls, self._lost("the driver does not answer", settled=False))
        flight.calls, flight.grace = [], None
        self._start(flight)

    def _start(self, flight: _Flight[_Work, _Answer]) -> None:
        task = flight.task = asyncio.get_running_loop().create_task(self._serve(flight))
        task.add_done_callback(lambda task: self._ended(flight, task))

    def _ended(self, flight: _Flight[_Work, _Answer], task: asyncio.Task[None]) -> None:
        """Somebody cancelled the task, e.g. all tasks of the loop: the next call starts another."""
        if task is not flight.task:
            return
        _fail(flight.calls, self._lost("its task was ended", settled=False))
        flight.task, flight.calls = None, []
        if flight not in self._resting:
            self._resting.append(flight)
        self._waking = False
        if any(not call.answer.done() for call in self._waiting):
            self._wake()

    def _late(self) -> Exception:
        return DeadlineExceeded(self._operation, self._timeout or 0)

    def _lost(self, reason: str, settled: bool) -> Exception:
        return CommitUnknown((), reason, settled) if self._operation == "commit" else self._late()


def _settle(pairs: Iterable[tuple[_Call[_Work, _Answer], _Answer | KvError]]) -> None:
    for call, answer in pairs:
        if call.answer.done():
            continue
        if type(answer) is list:
            call.answer.set_result(cast(_Answer, answer))
        else:
            _fail([call], cast(KvError, answer))


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
