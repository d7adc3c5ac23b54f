"""Writes of this process: those that share a key run in the order they came, and none is torn from its request."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Any, Final, cast

__all__ = ["Job", "Queue"]

_LATER: Final = 2.0  # seconds that a request goes on after its caller gave up


class Job:
    """One batch under way. ``sending`` is set while a request is out that may change something."""

    def __init__(self) -> None:
        """Not begun."""
        self.waits = True
        self.sending = False
        self.dropped = False
        self.task: asyncio.Task[Any] | None = None

    @property
    def ended_early(self) -> bool:
        """Whether it was cancelled, so that nothing is known of its last request."""
        return self.task is not None and self.task.cancelled()

    def answer(self) -> Any:
        """Return what the work returned, or raise what it raised."""
        assert self.task is not None
        return self.task.result()

    def drop(self) -> None:
        """Nobody waits any more: end before the next request; one that is out gets a moment to end.

        If it were cut off, the service might still carry it out after a later write of the same key.
        """
        self.dropped = True
        task = self.task
        if task is None or task.done() or self.waits:  # one that waits does so to the end: others wait for it
            return
        if self.sending:
            asyncio.get_running_loop().call_later(_LATER, task.cancel)
        else:
            task.cancel()


class Queue:
    """Starts jobs; a key's next one waits until the one before has ended."""

    def __init__(self) -> None:
        """Empty."""
        self._last: dict[str, asyncio.Future[None]] = {}
        self.jobs: set[Job] = set()

    def start(self, keys: Iterable[str], work: Callable[[Job], Awaitable[Any]]) -> Job:
        """Run ``work`` when its turn has come."""
        loop = asyncio.get_running_loop()
        names = tuple(keys)
        earlier = {last for key in names if (last := self._last.get(key)) is not None}
        ended: asyncio.Future[None] = loop.create_future()
        for key in names:
            self._last[key] = ended
        job = Job()
        self.jobs.add(job)

        async def run() -> Any:
            if earlier:
                await asyncio.wait(earlier)
            job.waits = False
            return None if job.dropped else await work(job)

        def end(task: asyncio.Task[Any]) -> None:
            if not task.cancelled():
                task.exception()  # looked at, also where nobody waits any more
            ended.set_result(None)
            self.jobs.discard(job)
            for key in names:
                if self._last.get(key) is ended:
                    del self._last[key]

        job.task = loop.create_task(run())
        job.task.add_done_callback(end)
        return job

    async def wait(self, jobs: Sequence[Job]) -> None:
        """Wait until all have ended; when the caller is cancelled they are dropped."""
        try:
            await asyncio.wait([cast("asyncio.Task[Any]", job.task) for job in jobs])
        except asyncio.CancelledError:
            for job in jobs:
                job.drop()
            raise

    async def drain(self, seconds: float) -> None:
        """Wait for what is under way, then end what is left of it."""
        tasks = [job.task for job in self.jobs if job.task is not None]
        if not tasks:
            return
        _, late = await asyncio.wait(tasks, timeout=seconds)
        for task in late:
            task.cancel()
        if late:
            await asyncio.wait(late)
