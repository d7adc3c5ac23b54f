"""Changes as the driver tells them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING, Final

from kvpersist.changes.routing import Listener, Router
from kvpersist.changes.scope import Scope
from kvpersist.changes.source import FIRST_PAUSE, LONGEST_PAUSE, Source
from kvpersist.changes.waker import Waker
from kvpersist.driver import Watches
from kvpersist.errors import KvError, StoreClosed

if TYPE_CHECKING:
    from kvpersist.changes.hub import Hub

__all__ = ["Feed"]

_SHARE: Final = 0.002  # seconds: with n wakers, news that names no key wakes all of them every n * so long at most


class Feed(Source):
    """What the driver tells of one namespace, or of the whole store."""

    def __init__(self, hub: Hub, driver: Watches, prefix: str) -> None:
        super().__init__(hub)
        self.router = Router()
        self._driver, self._prefix = driver, prefix
        self._woke = 0.0  # when the wakers were woken for news that names no key, by the loop's clock
        self._timer: asyncio.TimerHandle | None = None

    def join(self, listener: Listener, scope: Scope) -> None:
        self.router.add(listener, scope)
        self.start()

    def end(self) -> None:
        super().end()
        if self._timer is not None:
            self._timer.cancel()

    async def _run(self) -> None:
        pause = FIRST_PAUSE
        while True:
            news = self._driver.watch(self._prefix)
            try:
                async for changed in news:
                    pause = FIRST_PAUSE
                    self._tell(changed)
                error: Exception = StoreClosed("the driver tells of no more changes")
            except Exception as raised:  # noqa: BLE001  # whatever it is belongs to those who watch
                error = raised
            finally:
                if isinstance(news, AsyncGenerator):
                    await news.aclose()
            self._fail(error)
            for listener in list(self.router.listeners):
                listener.failed(error)
            if not (isinstance(error, KvError) and error.retryable):
                return
            await asyncio.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)

    def _tell(self, changed: tuple[str, ...]) -> None:
        if changed:
            for listener, mine in self.router.route(changed).items():
                listener.told(mine)
            return
        wakers = 0
        for listener in list(self.router.listeners):
            if isinstance(listener, Waker):
                wakers += 1
            else:
                listener.missed()
        if wakers and self._timer is None:
            self._timer = self.hub.loop.call_at(self._woke + _SHARE * wakers, self._wake)
        self._begin()

    def _wake(self) -> None:
        self._timer, self._woke = None, self.hub.loop.time()
        for listener in list(self.router.listeners):
            if isinstance(listener, Waker):
                listener.missed()
