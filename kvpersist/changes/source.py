"""What runs while somebody wants to be told."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeAlias

from kvpersist.lane import own_instance

__all__ = ["FIRST_PAUSE", "LONGEST_PAUSE", "Source", "Spawn"]

Spawn: TypeAlias = Callable[[Callable[[], Coroutine[Any, Any, None]]], asyncio.Task[None]]
"""Starts what is to be ended before the store is."""

FIRST_PAUSE, LONGEST_PAUSE = 0.05, 5.0  # seconds before a source that failed is asked again


class Source:
    """Something that runs while it is wanted; ``begun`` once it misses nothing any more."""

    def __init__(self, spawn: Spawn) -> None:
        self._spawn = spawn
        self._loop = asyncio.get_running_loop()
        self.begun = False
        self._error: Exception | None = None
        self._waiting: list[asyncio.Future[None]] = []
        self._task: asyncio.Task[None] | None = None

    async def until_begun(self) -> None:
        """Return once it has begun. Raises what keeps it from that."""
        if self.begun:
            return
        if self._error is not None:
            raise own_instance(self._error)
        waiting: asyncio.Future[None] = self._loop.create_future()
        self._waiting.append(waiting)
        await waiting

    def start(self) -> None:
        if self._task is None or self._task.done():
            self._error = None
            self._task = self._spawn(self._run)

    def end(self) -> None:
        if self._task is not None:
            self._task.cancel()

    async def _run(self) -> None:
        raise NotImplementedError

    def _begin(self) -> None:
        self.begun, self._error = True, None
        for waiting in self._took():
            waiting.set_result(None)

    def _fail(self, error: Exception) -> None:
        self.begun, self._error = False, error
        for waiting in self._took():
            waiting.set_exception(own_instance(error))

    def _took(self) -> list[asyncio.Future[None]]:
        waiting, self._waiting = self._waiting, []
        return [future for future in waiting if not future.done()]
