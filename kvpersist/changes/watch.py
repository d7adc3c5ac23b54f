"""An iteration over changes, and what it has not taken yet."""

from __future__ import annotations

import asyncio
import math
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Final, Self

from kvpersist.changes.scope import Change, Scope
from kvpersist.errors import BadRequest, DeadlineExceeded, KvError, StoreClosed
from kvpersist.lane import own_instance

if TYPE_CHECKING:
    from kvpersist.changes.hub import Hub

__all__ = ["Box", "Watch"]

_INTERVAL: Final = 1.0  # seconds between looks where nothing tells of changes


class Box:
    """What one watcher has not taken yet."""

    def __init__(self, hub: Hub, scope: Scope, interval: float, limit: int, merges: bool) -> None:
        self.hub, self.scope, self.interval = hub, scope, interval
        self.woken = asyncio.Event()
        self.ended = False
        self.error: Exception | None = None
        self.begun = False
        self._limit = limit
        self._merges = merges
        self._waiting: deque[Sequence[str]] = deque()
        self._merged: dict[str, None] = {}
        self._size = 0  # keys of what is waiting
        self._missed = False

    def told(self, changed: Sequence[str]) -> None:
        mine = [key for key in changed if not self.hub.hidden(key, self.scope)]
        if not mine:
            return
        if self._merges:
            self._merged.update(dict.fromkeys(mine))
            self._size = len(self._merged)
        else:
            self._waiting.append(mine)
            self._size += len(mine)
        if self._size > self._limit:
            self._drop()
        self.woken.set()

    def missed(self) -> None:
        if self.begun:  # before that it means that the source has begun
            self._drop()
            self.woken.set()

    def failed(self, error: Exception) -> None:
        if isinstance(error, KvError) and error.retryable:
            self.missed()
        elif self.begun:
            self.end(error)

    def end(self, error: Exception | None) -> None:
        if not self.ended:
            self.ended, self.error = True, error
        self.woken.set()

    def take(self) -> Change | None:
        """The next change, if there is one."""
        if self._missed:
            self._missed = False
            return Change((), missed=True)
        if self._merged:
            changed = tuple(self._merged)
            self._merged, self._size = {}, 0
            return Change(changed)
        if self._waiting:
            mine = self._waiting.popleft()
            self._size -= len(mine)
            return Change(tuple(mine))
        return None

    def waits(self) -> bool:
        return not (self._missed or self._merged or self._waiting)

    def _drop(self) -> None:
        self._waiting.clear()
        self._merged, self._size = {}, 0
        self._missed = True


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
            self._box.hub.leave(self._box)

    async def _begin(self) -> Box:
        box = self._box
        if box is not None and box.begun:
            return box
        if self._closed:
            raise StoreClosed("this watch was closed: begin another")
        hub = self._hub()
        if box is None:
            interval = _INTERVAL if self._interval is None else self._interval
            box = self._box = Box(hub, self._scope, interval, self._buffer, bool(self._collapse))
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
