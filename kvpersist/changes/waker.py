"""When to read again, at little cost and without saying what has changed."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from kvpersist.errors import StoreClosed

if TYPE_CHECKING:
    from kvpersist.changes.feed import Feed
    from kvpersist.changes.hub import Hub

__all__ = ["Waker"]


class Waker:
    """Tells a reader when to read again, at little cost and without saying what has changed.

    Whatever is committed after a read has begun makes the next `wait` return, if that read began after
    the wait before had returned. It may return for nothing. For one reader at a time.
    """

    def __init__(self, hub: Hub, interval: float, safety: float | None) -> None:
        self.feeds: list[Feed] = []
        self._hub, self._interval, self._safety = hub, interval, safety
        self._woken = asyncio.Event()
        self._closed = False

    async def wait(self, timeout: float | None = None) -> None:
        """Return when something below the prefix may have changed, or ``timeout`` seconds have passed.

        Raises:
            StoreClosed: there is nothing to wait for any more.
        """
        tells = self.feeds and all(feed.begun for feed in self.feeds)
        longest = self._safety if tells else self._interval
        if longest is not None:
            timeout = longest if timeout is None else min(timeout, longest)
        if not self._woken.is_set():
            with suppress(TimeoutError):
                async with asyncio.timeout(timeout):
                    await self._woken.wait()
        self._woken.clear()  # before the caller reads: what is committed from here on is for the next wait
        if self._closed or self._hub.closed:
            raise StoreClosed("the store was closed: open it again")

    def wake(self) -> None:
        """Make the wait under way, or the next one, return."""
        self._woken.set()

    def close(self) -> None:
        """Stop being told; a second call does nothing."""
        self._closed = True
        self.wake()
        self._hub.leave(self)

    def told(self, changed: Sequence[str]) -> None:
        self._woken.set()

    def committed(self, mine: Sequence[str], done: Mapping[str, bytes | None]) -> None:
        self._woken.set()

    def missed(self) -> None:
        self._woken.set()

    def failed(self, error: Exception) -> None:
        self._woken.set()  # the wait after that is by the interval
