"""Calls in a thread, awaited: one thread, one call after the other.

Its own queue and one wake-up of the loop per call cost half of what an executor's futures do, chained
to the loop's; as an `Executor` it serves who needs one.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future
from contextlib import suppress
from queue import SimpleQueue
from typing import Any, ParamSpec, TypeAlias, TypeVar

__all__ = ["Thread"]

P = ParamSpec("P")
T = TypeVar("T")

_Queue: TypeAlias = "SimpleQueue[Callable[[], None] | None]"


class Thread(Executor):
    """One thread, started by its first call; it ends with `close`, or with the last reference to this.

    A daemon: a program that forgot to close its store still ends, as if it had been killed.
    """

    def __init__(self, name: str) -> None:
        self._queue: _Queue = SimpleQueue()
        self._thread = threading.Thread(target=_serve, args=(self._queue,), name=name, daemon=True)
        self._mutex = threading.Lock()
        self._started = self._ended = False

    async def run(self, call: Callable[[], T], *, settle: bool) -> T:
        """Make the call. Cancelled before it has begun, it is never made; afterwards, with ``settle``,
        the cancellation goes on only when the call has ended.

        Raises:
            RuntimeError: the thread has ended.
        """
        job = _Job(call)
        self._put(job.make)
        try:
            return await job.answer
        except asyncio.CancelledError:
            if not job.withdrawn() and settle:
                await job.ended()
            raise

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """As an executor's."""
        future: Future[T] = Future()

        def make() -> None:
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(fn(*args, **kwargs))
                except BaseException as error:  # noqa: BLE001  # whatever it is, it is the answer of this call
                    future.set_exception(error)

        self._put(make)
        return future

    async def close(self, last: Callable[[], None]) -> None:
        """Make the calls that wait, then the ``last``, and end."""
        with suppress(RuntimeError):  # it was closed before
            await self.run(last, settle=True)
        with self._mutex:
            self._ended = True
            self._queue.put(None)
        if self._started:
            self._thread.join()

    def _put(self, make: Callable[[], None]) -> None:
        with self._mutex:
            if self._ended:
                raise RuntimeError("the thread has ended")
            if not self._started:
                self._thread.start()
                self._started = True
            self._queue.put(make)

    def __del__(self) -> None:
        self._queue.put(None)


class _Job:
    """A call that a coroutine waits for."""

    __slots__ = ("_begun", "_call", "_deaf", "_error", "_loop", "_mutex", "_result", "_settled", "_withdrawn", "answer")

    def __init__(self, call: Callable[[], Any]) -> None:
        self._call = call
        self._loop = asyncio.get_running_loop()
        self.answer: asyncio.Future[Any] = self._loop.create_future()
        self._mutex = threading.Lock()  # whoever has it first decides between begun and withdrawn
        self._begun = self._withdrawn = self._settled = self._deaf = False
        self._result: Any = None
        self._error: BaseException | None = None

    def make(self) -> None:
        """Make the call, in the thread."""
        with self._mutex:
            if self._withdrawn:
                return
            self._begun = True
        try:
            self._result = self._call()
        except BaseException as error:  # noqa: BLE001  # whatever it is, it is the answer of this call
            self._error = error
        with suppress(RuntimeError):  # the loop was closed: nobody waits any more
            self._loop.call_soon_threadsafe(self._settle)

    def withdrawn(self) -> bool:
        """Have it never made; False if it has begun."""
        with self._mutex:
            self._withdrawn = not self._begun
        return self._withdrawn

    async def ended(self) -> None:
        """Wait until it has ended, after its answer was cancelled; who is cancelled again waits on."""
        self._deaf, self.answer = True, self._loop.create_future()
        while not self._settled:
            with suppress(asyncio.CancelledError):
                await asyncio.wait([self.answer])

    def _settle(self) -> None:
        self._settled = True
        error, self._error = self._error, None  # its traceback leads back here
        if self.answer.done():
            return
        if error is None or self._deaf:
            self.answer.set_result(self._result)
        else:
            self.answer.set_exception(error)


def _serve(queue: _Queue) -> None:
    while (make := queue.get()) is not None:
        make()
        del make  # what it holds must not live until the next one comes
