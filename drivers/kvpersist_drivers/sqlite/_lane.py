"""A thread that owns a connection, and the way in and out of it for coroutines of one event loop."""

from __future__ import annotations

import asyncio
import os
import threading
import weakref
from collections.abc import Callable
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Any, Final

from kvpersist.errors import ForkedStore, KvError, StoreClosed

__all__ = ["CLOSED", "Job", "Lane", "serve_calls"]

CLOSED: Final = "this sqlite driver was closed, or opened before a fork: open it again"


class Job:
    """One call, on its way through a lane. ``work`` is what the lane's ``serve`` understands.

    ``begun`` and ``withdrawn`` exclude each other; whoever takes the lane's mutex first decides.
    ``settled``: the loop was told. ``deaf``: it only waits for the end, and wants no outcome.
    """

    __slots__ = ("begun", "deaf", "error", "future", "outcome", "settled", "withdrawn", "work")

    def __init__(self, work: Any, future: asyncio.Future[Any]) -> None:
        self.work = work
        self.future = future
        self.outcome: Any = None
        self.error: BaseException | None = None
        self.begun = self.withdrawn = self.settled = self.deaf = False

    def call(self) -> None:
        """Call ``work``, and keep its answer."""
        try:
            self.outcome = self.work()
        except Exception as error:  # noqa: BLE001  (whatever it is, it is the answer of this call)
            self.error = error


class Lane:
    """Jobs in, answers out, in drains: what waits is served together and wakes the loop once.

    Args:
        serve: called in the thread with a drain; it claims jobs and sets their outcome or error.
        tend: called in the thread after the answers went out (False) and when idle (True); returns
            after how many seconds of silence it wants to be called again, None: not at all.
    """

    def __init__(
        self,
        name: str,
        serve: Callable[[Lane, list[Job]], None],
        tend: Callable[[bool], float | None] = lambda idle: None,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._serve, self._tend = serve, tend
        self._queue: SimpleQueue[Job | Callable[[], None]] = SimpleQueue()
        self._mutex = threading.Lock()
        self.refusal: type[KvError] | None = None
        # a daemon: a program that forgot to close its store still ends, as if it had been killed
        self.thread = threading.Thread(target=self._run, name=name, daemon=True)
        self.thread.start()
        _lanes.add(self)

    async def run(self, work: Any, *, settle: bool) -> Any:
        """Have ``work`` served.

        Cancelled before it has begun, it never runs. Afterwards, with ``settle``, the cancellation
        goes on only when the work has ended.

        Raises:
            StoreClosed, ForkedStore: the thread is not there any more.
        """
        if self.refusal is not None:
            raise self.refusal(CLOSED)
        job = Job(work, self._loop.create_future())
        self._queue.put(job)
        try:
            return await job.future
        except asyncio.CancelledError:
            if self._withdraw(job) or not settle:
                raise
            job.future, job.deaf = self._loop.create_future(), True
            while not job.settled:
                with suppress(asyncio.CancelledError):  # cancelled again: the first one is still under way
                    await asyncio.wait([job.future])
            raise

    def claim(self, jobs: list[Job]) -> list[Job]:
        """Begin those of ``jobs`` that nobody has withdrawn."""
        with self._mutex:
            kept = [job for job in jobs if not job.withdrawn]
            for job in kept:
                job.begun = True
        return kept

    def waiting(self) -> list[Job]:
        """Take what has arrived meanwhile, up to the order to stop."""
        jobs: list[Job] = []
        queue = self._queue
        while not queue.empty():
            item = queue.get()
            if not isinstance(item, Job):
                queue.put(item)  # nothing can be behind it: the lane refuses since it was put
                break
            jobs.append(item)
        return jobs

    def stop(self, last: Callable[[], None]) -> None:
        """Refuse new jobs; the thread serves those it has, calls ``last``, and ends."""
        if self.refusal is None:
            self.refusal = StoreClosed
            self._queue.put(last)

    def _withdraw(self, job: Job) -> bool:
        with self._mutex:
            job.withdrawn = not job.begun
        return job.withdrawn

    def _run(self) -> None:
        pause: float | None = None
        while True:
            try:
                item = self._queue.get(timeout=pause)
            except Empty:
                pause = self._tend(True)
                continue
            if not isinstance(item, Job):
                item()
                return
            jobs = [item, *self.waiting()]
            try:
                self._serve(self, jobs)
            except BaseException as error:  # noqa: BLE001  (a defect must fail the calls, not leave them waiting)
                for job in jobs:
                    if job.outcome is None and job.error is None:
                        job.error = error
            self._tell(jobs)
            del item, jobs  # what they hold must not live until the next one comes
            pause = self._tend(False)

    def _tell(self, jobs: list[Job]) -> None:
        with suppress(RuntimeError):  # the loop was closed: nobody waits any more
            self._loop.call_soon_threadsafe(_settle, jobs)


def serve_calls(lane: Lane, jobs: list[Job]) -> None:
    """Call each job's ``work``."""
    for job in lane.claim(jobs):
        job.call()


def _settle(jobs: list[Job]) -> None:
    for job in jobs:
        job.settled = True
        if job.future.done():
            continue
        if job.error is None or job.deaf:
            job.future.set_result(job.outcome)
        else:
            job.future.set_exception(job.error)


def _forked() -> None:
    for lane in list(_lanes):
        lane.refusal = ForkedStore
        _left_behind.append(lane)


_lanes: Final[weakref.WeakSet[Lane]] = weakref.WeakSet()
_left_behind: Final[list[Lane]] = []  # in a forked child: a connection of the parent must never be closed there
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)
