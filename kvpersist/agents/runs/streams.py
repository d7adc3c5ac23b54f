"""What comes of a run: a turn, and the stream of its chunks while it goes on."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from types import TracebackType
from typing import Any, Self
from weakref import WeakSet

from kvpersist.agents.records import Message

__all__ = ["Ending", "StoredStream", "StoredTurn"]


class StoredTurn:
    """What came of a run.

    Attributes:
        thread_id: the session it belongs to.
        result: what the agent returned; of an agent that gives chunks, their text.
        messages: the turn as it was stored, empty where it was not.
    """

    __slots__ = ("messages", "result", "thread_id")

    def __init__(self, thread_id: str) -> None:
        self.thread_id = thread_id
        self.result: Any = None
        self.messages: list[Message] = []


class StoredStream:
    """The chunks of a run, unchanged, while it goes on: ``async for`` it, best inside ``async with``.

    The turn is stored when the last chunk was given, or when the stream is left before: ``async with``
    stores it at the end of the block, an abandoned stream soon after, at the latest when the store closes.

    Attributes:
        turn: its ``messages`` are known once the stream has ended.
    """

    def __init__(self, ending: Ending, chunks: AsyncGenerator[Any], turn: StoredTurn) -> None:
        self.turn = turn
        self._chunks = chunks
        self._ending = ending
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ended = False

    @property
    def thread_id(self) -> str:
        """The session that the turn belongs to."""
        return self.turn.thread_id

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Any:
        if self._loop is None:
            self._loop = asyncio.get_running_loop()
            self._ending.add(self)
        try:
            return await anext(self._chunks)
        except BaseException:
            self._end()
            raise

    async def aclose(self) -> None:
        """Leave the stream: the run ends here, and what there is of the turn is stored."""
        self._end()
        await self._chunks.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    def _end(self) -> None:
        self._ended = True
        self._ending.discard(self)

    def __del__(self) -> None:
        loop = self._loop
        if loop is None or loop.is_closed() or self._ended:
            return
        try:
            here = asyncio.get_running_loop() is loop
        except RuntimeError:
            here = False
        if here:
            self._ending.leave(self._chunks)
        else:  # the collector may run in any thread
            loop.call_soon_threadsafe(self._ending.leave, self._chunks)


class Ending:
    """The open streams of one `Persistence`, and those that were abandoned and are being ended."""

    def __init__(self) -> None:
        self._open: WeakSet[StoredStream] = WeakSet()
        self._tasks: set[asyncio.Task[None]] = set()

    def add(self, stream: StoredStream) -> None:
        """Note a stream that has begun."""
        self._open.add(stream)

    def discard(self, stream: StoredStream) -> None:
        """Note that it has ended, or that somebody is ending it."""
        self._open.discard(stream)

    def leave(self, chunks: AsyncGenerator[Any]) -> None:
        """End the chunks of a stream that nobody reads any more."""
        task = asyncio.get_running_loop().create_task(_ended(chunks))
        self._tasks.add(task)
        task.add_done_callback(self._left)

    async def settle(self) -> None:
        """End every stream, and wait for those that are being ended; raise what went wrong with one of them."""
        for stream in list(self._open):
            self._tasks.add(asyncio.get_running_loop().create_task(stream.aclose()))
        tasks, self._tasks = self._tasks, set()
        failed = [each for each in await asyncio.gather(*tasks, return_exceptions=True) if each is not None]
        for error in failed:
            if type(error) is not RuntimeError:  # that one is being read in another task, which ends it
                raise error

    def _left(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and task.exception() is None:
            self._tasks.discard(task)


async def _ended(chunks: AsyncGenerator[Any]) -> None:
    await chunks.aclose()
