"""Changes found by comparing versions, where the driver does not name them."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Final

from kvpersist import keys
from kvpersist.changes.scope import Scope
from kvpersist.changes.source import LONGEST_PAUSE, Source
from kvpersist.errors import KvError, Unsupported

if TYPE_CHECKING:
    from kvpersist.changes.hub import Hub
    from kvpersist.changes.watch import Box

__all__ = ["Survey"]

_MOST: Final = 100_000  # keys whose versions are remembered, per watched prefix
_PAGE: Final = 1000  # entries looked at in one call
_REST: Final = 5.0  # after a look, this many times as long as it took nobody looks


class Survey(Source):
    """What changed below one prefix, or of some keys, found by comparing with the versions known before."""

    def __init__(self, hub: Hub, scope: Scope, interval: float) -> None:
        super().__init__(hub)
        self.boxes: set[Box] = set()
        self._scope, self._interval = scope, interval
        self._known: dict[str, bytes] = {}
        self._touched: set[str] = set()  # by this store's commits, since the look under way began

    def join(self, box: Box) -> None:
        self.boxes.add(box)
        self.start()

    def committed(self, mine: Sequence[str], done: Mapping[str, bytes | None]) -> None:
        news: list[str] = []
        for key in mine:
            version = done[key]
            self._touched.add(key)
            if self._known.get(key) == version:  # a look was quicker
                continue
            if version is None:
                del self._known[key]
            else:
                self._known[key] = version
            news.append(key)
        self._tell(news)

    async def _run(self) -> None:
        waker = self.hub.waker(self._scope, self._interval, safety=None, own=False)
        waker.wake()  # for the first look
        try:
            while True:
                await waker.wait()
                began = self.hub.loop.time()
                try:
                    news = await self._news()
                except KvError as error:
                    if not self.begun or not error.retryable:
                        raise
                    await asyncio.sleep(min(self._interval, LONGEST_PAUSE))
                    waker.wake()
                    continue
                if self.begun:
                    self._tell(news)
                else:
                    self._begin()
                    for box in self.boxes:
                        box.missed()
                await asyncio.sleep(_REST * (self.hub.loop.time() - began))
        except Exception as error:  # noqa: BLE001  # whatever it is belongs to those who watch
            self._fail(error)
            for box in list(self.boxes):
                box.failed(error)
        finally:
            waker.close()

    async def _news(self) -> list[str]:
        """Look, and return what is not as it was. What this store changed meanwhile is left to the next look."""
        self._touched.clear()
        found = await self._look()
        known = self._known
        for key in self._touched:
            if key in known:
                found[key] = known[key]
            else:
                found.pop(key, None)
        news = [key for key, version in found.items() if known.get(key) != version]
        news += [key for key in known if key not in found]
        self._known = found
        return news

    async def _look(self) -> dict[str, bytes]:
        store, scope = self.hub.store, self._scope
        found: dict[str, bytes] = {}
        if scope.keys is not None:
            entries = await store._entries(scope.keys)
            return {entry.key: entry.version for entry in entries if entry is not None}
        start, end = (scope.prefix, keys.prefix_end(scope.prefix)) if scope.prefix else (None, None)
        while True:
            page = await store._scan(start, end, limit=_PAGE, keys_only=True)
            found.update((entry.key, entry.version) for entry in page)
            if len(found) > _MOST:
                raise Unsupported(f"watching more than {_MOST} keys on this backend", "watch a longer prefix, or keys")
            if len(page) < _PAGE:
                return found
            start = page[-1].key + "\0"

    def _tell(self, news: Sequence[str]) -> None:
        if news:
            for box in self.boxes:
                box.told(news)
