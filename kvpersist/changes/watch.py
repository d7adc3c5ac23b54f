"""An iteration over changes."""

from __future__ import annotations

import asyncio
import math
import weakref
from collections.abc import Callable
from contextlib import suppress
from typing import Final, Self

from kvpersist.changes.box import Box
from kvpersist.changes.hub import Hub
from kvpersist.changes.scope import Change, Scope
from kvpersist.errors import BadRequest, DeadlineExceeded, StoreClosed
from kvpersist.lane import own_instance

__all__ = ["Watch"]

_INTERVAL: Final = 1.0  # seconds between looks where nothing tells of changes


class Watch:
    """An iteration over changes; `Store.watch` makes it.

    ``async with`` it to be sure that what is committed inside the block is told, or iterate at once.
    """

    def __init__(
        self, hub: Callable[[], Hub], scope: Scope, collapse: float | None, interval: float | None, buffer: int
    ) -> None:
        if not (0 <= (collapse or 0) < math.inf and (1 if interval is None else interval) > 0 and buffer >= 1):
            raise BadRequest(f"watch(collapse={collapse}, interval={interval}, buffer={buffer}): not such numbers")
        self._hub = hub
        self._scope, self._collapse, self._interval, self._buffer = scope, collapse, interval, buffer
        self._box: Box | None = None
        self._joined: Hub | None = None
        self._closed = False

    async def __aenter__(self) -> Self:
        await self._begin()
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Change:
        """Return the next change. The iteration ends when the store, or this watch, is closed.

        Raises:
            Unavailable, DeadlineExceeded: watching could not begin. Once it has, such failures are mended,
                and told as ``missed``.
            Unsupported: this backend cannot watch so much.
        """
        box = await self._begin()
        while True:
            if self._collapse and not box.waits() and not box.ended:
                await asyncio.sleep(self._collapse)
            change = box.take()
            if change is not None:
                return change
            if box.ended:
                self.close()
                error, box.error = box.error, None
                raise StopAsyncIteration if error is None else own_instance(error)
            box.woken.clear()
            await box.woken.wait()

    def close(self) -> None:
        """End the iteration; a second call does nothing."""
        self._closed = True
        if self._box is not None:
            self._box.end(None)
        if self._joined is not None:
            self._joined.leave(self._box)

    async def _begin(self) -> Box:
        box = self._box
        if box is not None and box.begun:
            return box
        if self._closed:
            raise StoreClosed("this watch was closed: begin another")
        hub = self._joined = self._hub()
        if box is None:
            interval = _INTERVAL if self._interval is None else self._interval
            box = self._box = Box(self._scope, interval, self._buffer, bool(self._collapse), hub.hidden)
            weakref.finalize(self, _left, hub, box).atexit = False
        sources = hub.open(box)
        timeout = hub.store.timeout
        try:
            async with asyncio.timeout(timeout):
                for source in sources:
                    await source.until_begun()
        except TimeoutError as error:
            raise DeadlineExceeded("watch", timeout or 0) from error
        finally:
            if not all(source.begun for source in sources):
                hub.leave(box)
        box.begun = True
        return box


def _left(hub: Hub, box: Box) -> None:
    """Its watch was dropped, in whichever thread."""
    with suppress(RuntimeError):  # the loop was closed
        hub.loop.call_soon_threadsafe(hub.leave, box)
