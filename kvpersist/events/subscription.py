"""Reading a topic as it grows."""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any, Literal, Self
from weakref import finalize

from kvpersist.changes import Waker
from kvpersist.errors import EventsExpired, StoreClosed
from kvpersist.events._log import TopicLog, entry_of
from kvpersist.events.records import EventEntry, number_of, position_of
from kvpersist.log import Numbered

__all__ = ["OnExpired", "Subscription"]

OnExpired = Literal["raise", "skip"]
"""What a reader does where retention removed what it had not read: raise `EventsExpired`, or read on behind it."""


class Subscription:
    """The events of a topic in order, those there are and then those to come. Made by `EventQueue.subscribe`.

    ``async for`` it; inside ``async with`` it has begun when the block begins. It reads a page when its
    reader asks for more: a slow reader falls behind in the topic, and neither holds more than a page nor
    loses anything. After an error it stands where it was, and may be asked again.
    """

    def __init__(
        self,
        log: TopicLog,
        topic: str,
        begin: Callable[[], Awaitable[int]],
        waker: Callable[[], Waker],
        *,
        channels: frozenset[str] | None,
        buffer: int,
        on_expired: OnExpired,
    ) -> None:
        self.topic = topic
        self._log = log
        self._begin = begin
        self._new_waker = waker
        self._channels = channels
        self._buffer = buffer
        self._skips = on_expired == "skip"
        self._page: deque[Numbered[dict[str, Any]]] = deque()
        self._number: int | None = None  # of the last event handed out, or passed over
        self._read_to = 0
        self._waker: Waker | None = None
        self._ended = False

    @property
    def position(self) -> str | None:
        """Where the reader stands: that of the last event it was given, or where it began; None: not begun."""
        return None if self._number is None else position_of(self._number)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> EventEntry:
        while not self._ended:
            waker = self._waker
            if self._number is None or waker is None:
                waker = await self._start()
            while self._page:
                number, item = self._page.popleft()
                self._number = number
                if self._channels is None or item.get("channel") in self._channels:
                    return entry_of(self.topic, number, item)
            if not await self._fill():
                try:
                    await waker.wait()
                except StoreClosed:
                    if not self._ended:
                        raise
        raise StopAsyncIteration

    async def _start(self) -> Waker:
        waker = self._waker
        if waker is None:  # before the first read, so that nothing falls between the two
            waker = self._waker = self._new_waker()
            finalize(self, waker.close).atexit = False
        self._number = self._read_to = await self._begin()
        return waker

    async def _fill(self) -> bool:
        """Read the next page; False: there is none yet."""
        try:
            page, _ = await self._log.page(self.topic, self._read_to, self._buffer)
        except EventsExpired as error:
            if not self._skips:
                raise
            self._pass(error)
            return True
        if page:
            self._page.extend(page)
            self._read_to = page[-1].number
        return bool(page)

    def _pass(self, error: EventsExpired) -> None:
        """Go on with the first event that is there."""
        self._number = self._read_to = (number_of(error.first) or 1) - 1

    async def aclose(self) -> None:
        """End the iteration, also one that waits; a second call does nothing."""
        self._end()

    def _end(self) -> None:
        """As `aclose`, at once; it may be called from anywhere."""
        self._ended = True
        self._page.clear()
        if self._waker is not None:
            self._waker.close()

    async def __aenter__(self) -> Self:
        if self._number is None:
            await self._start()
        return self

    async def __aexit__(self, *_: object) -> None:
        self._end()
