"""Waking those who wait for the events of a topic: told at once inside the process, by looking elsewhere."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Final
from weakref import WeakKeyDictionary, WeakSet

from kvpersist.store import Store

__all__ = ["Waker", "tell"]

INTERVAL: Final = 0.25  # seconds after which a waiter looks for what other processes wrote

_wakers: WeakKeyDictionary[Store, dict[str, WeakSet[Waker]]] = WeakKeyDictionary()


class Waker:
    """Tells that something below ``prefix`` may have changed.

    Made before the first read, and the flag is taken back before each further one, so that no change
    committed after a read is missed.
    """

    def __init__(self, store: Store, prefix: str) -> None:
        self._flag = asyncio.Event()
        self._all = _wakers.setdefault(store, {})
        self._prefix = prefix
        self._all.setdefault(prefix, WeakSet()).add(self)

    def wake(self) -> None:
        """Let the wait under way, or the next, end at once."""
        self._flag.set()

    async def wait(self, timeout: float | None = None) -> None:
        """Return when there may be a change since the last wait, or ``timeout`` seconds passed."""
        seconds = INTERVAL if timeout is None else min(timeout, INTERVAL)
        with suppress(TimeoutError):
            async with asyncio.timeout(max(0.0, seconds)):
                await self._flag.wait()
        self._flag.clear()

    def close(self) -> None:
        """Be told nothing more; a second call does nothing."""
        beside = self._all.get(self._prefix)
        if beside is not None:
            beside.discard(self)
            if not beside:
                del self._all[self._prefix]
        self._flag.set()


def tell(store: Store, prefix: str) -> None:
    """Wake those of this process that wait for changes below ``prefix``."""
    waiting = _wakers.get(store)
    if waiting:
        for waker in tuple(waiting.get(prefix, ())):
            waker.wake()
