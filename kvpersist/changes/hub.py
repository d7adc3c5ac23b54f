"""Everybody who watches one store: what they share, and the end of it.

A `Hub` is there while somebody watches. It learns of changes from the driver's ``watch``, one call per
namespace whatever the number of watchers, and of the store's own commits at once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final, Protocol

from kvpersist.changes.feed import Feed
from kvpersist.changes.routing import Listener, Router
from kvpersist.changes.scope import Scope
from kvpersist.changes.survey import Survey
from kvpersist.changes.waker import Waker
from kvpersist.changes.watch import Box
from kvpersist.driver import Capabilities, Check, Driver, Entry, Op, Put, Watches

__all__ = ["Hub"]

_WAKE: Final = 0.25  # seconds between looks of a waker: it costs its owner one read, not a scan
_SAFETY: Final = 5.0  # seconds after which a waker returns in any case: some writers may not tell


class _Store(Protocol):
    """What a hub needs of the store it belongs to."""

    driver: Driver
    capabilities: Capabilities
    timeout: float | None
    _owned: frozenset[str]
    _hub: Hub | None

    async def _entries(self, keys: Sequence[str]) -> list[Entry | None]: ...
    async def _scan(
        self, start: str | None, end: str | None, *, limit: int, keys_only: bool = False
    ) -> list[Entry]: ...


class Hub:
    """Everybody who watches one store, in its event loop."""

    def __init__(self, store: _Store) -> None:
        self.store = store
        self.loop = asyncio.get_running_loop()
        self.closed = False
        self._own = Router()  # who is told of this store's commits
        self._feeds: dict[str, Feed] = {}
        self._surveys: dict[tuple[Scope, float], Survey] = {}
        self._boxes: set[Box] = set()
        self._wakers: set[Waker] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    def committed(self, ops: Iterable[Op], version: bytes) -> None:
        """This store has committed ``ops``; called with every acknowledged batch."""
        done = {op.key: version if type(op) is Put else None for op in ops if type(op) is not Check}
        for listener, mine in self._own.route(done).items():
            listener.committed(mine, done)

    async def close(self) -> None:
        """End every iteration and wait, and what runs for them."""
        self.closed = True
        for box in list(self._boxes):
            box.end(None)
        for waker in list(self._wakers):
            waker.wake()
        for task in list(self._tasks):
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=self.store.timeout)

    def spawn(self, run: Callable[[], Any]) -> asyncio.Task[None]:
        """Start what is to be ended before the store is."""
        task: asyncio.Task[None] = self.loop.create_task(run())
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def waker(
        self, scope: Scope, interval: float = _WAKE, *, safety: float | None = _SAFETY, own: bool = True
    ) -> Waker:
        waker = Waker(self, interval, safety)
        self._wakers.add(waker)
        if own and self.store.capabilities.watch != "local":  # which tells at once
            self._own.add(waker, scope)
        waker.feeds = self.feeds(waker, scope)
        return waker

    def feeds(self, listener: Listener, scope: Scope) -> list[Feed]:
        """Have ``listener`` told of what the driver tells; none where it does not watch."""
        driver, able = self.store.driver, self.store.capabilities
        if able.watch is None or not isinstance(driver, Watches):
            return []
        found: list[Feed] = []
        for prefix in {""} if able.watch == "poll" else scope.namespaces():
            feed = self._feeds.get(prefix)
            if feed is None:
                feed = self._feeds[prefix] = Feed(self, driver, prefix)
            feed.join(listener, scope)
            found.append(feed)
        return found

    def open(self, box: Box) -> list[Feed | Survey]:
        """Have changes put into ``box``."""
        self._boxes.add(box)
        if self.store.capabilities.watch in ("push", "local") and (feeds := self.feeds(box, box.scope)):
            return [*feeds]
        name = (box.scope, box.interval)
        survey = self._surveys.get(name)
        if survey is None:
            survey = self._surveys[name] = Survey(self, box.scope, box.interval)
            self._own.add(survey, box.scope)
        survey.join(box)
        return [survey]

    def leave(self, listener: Any) -> None:
        """Forget ``listener``, and end what nobody else wants."""
        self._boxes.discard(listener)
        self._wakers.discard(listener)
        self._own.remove(listener)
        for prefix, feed in list(self._feeds.items()):
            feed.router.remove(listener)
            if not feed.router.listeners:
                del self._feeds[prefix]
                feed.end()
        for name, survey in list(self._surveys.items()):
            survey.boxes.discard(listener)
            if not survey.boxes:
                del self._surveys[name]
                self._own.remove(survey)
                survey.end()
        self._rest()

    def hidden(self, key: str, scope: Scope) -> bool:
        """Whether a key is a repository's own business, as in `Store.scan`."""
        space, _, rest = key.partition(":")
        if scope.keys is not None or not rest or space not in self.store._owned:
            return False
        return not scope.prefix.startswith(f"{space}:") or ("#" in rest.partition(":")[0] and "#" not in scope.prefix)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # it was handed to those who wait
        self._rest()

    def _rest(self) -> None:
        if not (self._boxes or self._wakers or self._tasks or self.closed):
            self.store._hub = None
