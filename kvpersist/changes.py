"""Changes: who wants to know of them, and where they are learnt from.

A `Hub` is there while somebody watches a store. It learns of changes from the driver's ``watch``,
one call per namespace whatever the number of watchers, and of the store's own commits at once. Where
a driver says only that something has changed, or nothing at all, a `_Survey` finds out what, by
comparing versions.
"""

from __future__ import annotations

import asyncio
import math
import weakref
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any, Final, Protocol, Self, cast

import msgspec

from kvpersist import keys
from kvpersist.batching import own_instance
from kvpersist.driver import Capabilities, Check, Driver, Entry, Op, Put, Watches
from kvpersist.errors import BadRequest, DeadlineExceeded, KvError, StoreClosed, Unsupported

__all__ = ["Change", "Hub", "Scope", "Waker", "Watch"]

_BUFFER: Final = 1024  # keys kept for a slow watcher
_MOST: Final = 100_000  # keys whose versions are remembered, per watched prefix
_PAGE: Final = 1000  # entries looked at in one call
_REST: Final = 5.0  # after a look, this many times as long as it took nobody looks
_INTERVAL: Final = 1.0  # seconds between looks where nothing tells of changes
_WAKE: Final = 0.25  # the same, of a waker: it costs its owner one read, not a scan
_SAFETY: Final = 5.0  # seconds after which a waker returns in any case: some writers may not tell
_SHARE: Final = 0.002  # seconds: with n wakers, news that names no key wakes all of them every n * so long at most
_FIRST_PAUSE, _LONGEST_PAUSE = 0.05, 5.0  # seconds before a source that failed is asked again


class Change(msgspec.Struct, frozen=True):
    """Keys that were put or deleted, by one commit or some.

    ``missed``: there were changes that are not named, of any of the watched keys: read what matters.
    """

    keys: tuple[str, ...]
    missed: bool = False


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


class Scope(msgspec.Struct, frozen=True):
    """What is watched: everything below a prefix, or some keys; of a waker also both."""

    prefix: str = ""
    keys: tuple[str, ...] | None = None

    @property
    def below(self) -> tuple[str, ...]:
        """The prefix, where one is meant."""
        return (self.prefix,) if self.prefix or self.keys is None else ()

    @classmethod
    def of(cls, wanted: str | Sequence[str]) -> Self:
        """What a caller of `Store.watch` means. Raises BadRequest."""
        if isinstance(wanted, str):
            return cls(wanted)
        if not wanted or not all(isinstance(key, str) and key for key in cast(Sequence[Any], wanted)):
            raise BadRequest(f"watch({wanted!r}): give a prefix, or a list of keys")
        return cls(keys=tuple(dict.fromkeys(wanted)))

    def namespaces(self) -> set[str]:
        """The prefixes to be asked of a driver: whole namespaces, so that watchers can share."""
        return {text[: text.find(":") + 1] for text in (*self.below, *(self.keys or ()))}


class _Listener(Protocol):
    """Who is told. ``told``: of these keys; ``missed``: of any; ``failed``: nothing is told for now."""

    def told(self, changed: Sequence[str]) -> None: ...
    def missed(self) -> None: ...
    def failed(self, error: Exception) -> None: ...


class _Router:
    """Finds the listeners that a key is for; what it costs does not depend on how many there are."""

    def __init__(self) -> None:
        self.listeners: dict[Any, Scope] = {}
        self._exact: dict[str, list[Any]] = {}
        self._below: dict[str, list[Any]] = {}
        self._lengths: list[int] = []  # of the prefixes, each once, the shortest first

    def add(self, listener: Any, scope: Scope) -> None:
        if listener in self.listeners:
            return
        self.listeners[listener] = scope
        for table, texts in ((self._below, scope.below), (self._exact, scope.keys or ())):
            for text in texts:
                table.setdefault(text, []).append(listener)
        self._lengths = sorted({len(prefix) for prefix in self._below})

    def remove(self, listener: Any) -> None:
        scope = self.listeners.pop(listener, None)
        if scope is None:
            return
        for table, texts in ((self._below, scope.below), (self._exact, scope.keys or ())):
            for text in texts:
                table[text].remove(listener)
                if not table[text]:
                    del table[text]
        self._lengths = sorted({len(prefix) for prefix in self._below})

    def route(self, changed: Iterable[str]) -> dict[Any, list[str]]:
        """The listeners that ``changed`` concerns, each with its keys in their order."""
        found: dict[Any, list[str]] = {}
        for key in changed:
            for listener in self._exact.get(key, ()):
                found.setdefault(listener, []).append(key)
            for length in self._lengths:
                if length > len(key):
                    break
                for listener in self._below.get(key[:length], ()):
                    found.setdefault(listener, []).append(key)
        return found


class Hub:
    """Everybody who watches one store, in its event loop."""

    def __init__(self, store: _Store) -> None:
        self.store = store
        self.loop = asyncio.get_running_loop()
        self.closed = False
        self._own = _Router()  # who is told of this store's commits
        self._feeds: dict[str, _Feed] = {}
        self._surveys: dict[tuple[Scope, float], _Survey] = {}
        self._boxes: set[_Box] = set()
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
        waker = Waker(self, scope, interval, safety)
        self._wakers.add(waker)
        if own and self.store.capabilities.watch != "local":  # which tells at once
            self._own.add(waker, scope)
        waker.feeds = self.feeds(waker, scope)
        return waker

    def feeds(self, listener: _Listener, scope: Scope) -> list[_Feed]:
        """Have ``listener`` told of what the driver tells; none where it does not watch."""
        driver, able = self.store.driver, self.store.capabilities
        if able.watch is None or not isinstance(driver, Watches):
            return []
        found: list[_Feed] = []
        for prefix in {""} if able.watch == "poll" else scope.namespaces():
            feed = self._feeds.get(prefix)
            if feed is None:
                feed = self._feeds[prefix] = _Feed(self, driver, prefix)
            feed.join(listener, scope)
            found.append(feed)
        return found

    def open(self, box: _Box) -> list[_Feed | _Survey]:
        """Have changes put into ``box``."""
        self._boxes.add(box)
        if self.store.capabilities.watch in ("push", "local") and (feeds := self.feeds(box, box.scope)):
            return [*feeds]
        name = (box.scope, box.interval)
        survey = self._surveys.get(name)
        if survey is None:
            survey = self._surveys[name] = _Survey(self, box.scope, box.interval)
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


class _Source:
    """Something that runs while it is wanted; ``begun`` once it misses nothing any more."""

    def __init__(self, hub: Hub) -> None:
        self.hub = hub
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
        waiting: asyncio.Future[None] = self.hub.loop.create_future()
        self._waiting.append(waiting)
        await waiting

    def start(self) -> None:
        if self._task is None or self._task.done():
            self._error = None
            self._task = self.hub.spawn(self._run)

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


class _Feed(_Source):
    """What the driver tells of one namespace, or of the whole store."""

    def __init__(self, hub: Hub, driver: Watches, prefix: str) -> None:
        super().__init__(hub)
        self.router = _Router()
        self._driver, self._prefix = driver, prefix
        self._woke = 0.0  # when the wakers were woken for news that names no key, by the loop's clock
        self._timer: asyncio.TimerHandle | None = None

    def join(self, listener: _Listener, scope: Scope) -> None:
        self.router.add(listener, scope)
        self.start()

    def end(self) -> None:
        super().end()
        if self._timer is not None:
            self._timer.cancel()

    async def _run(self) -> None:
        pause = _FIRST_PAUSE
        while True:
            news = self._driver.watch(self._prefix)
            try:
                async for changed in news:
                    pause = _FIRST_PAUSE
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
            pause = min(2 * pause, _LONGEST_PAUSE)

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


class _Survey(_Source):
    """What changed below one prefix, or of some keys, found by comparing with the versions known before."""

    def __init__(self, hub: Hub, scope: Scope, interval: float) -> None:
        super().__init__(hub)
        self.boxes: set[_Box] = set()
        self._scope, self._interval = scope, interval
        self._known: dict[str, bytes] = {}
        self._touched: set[str] = set()  # by this store's commits, since the look under way began

    def join(self, box: _Box) -> None:
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
                    await asyncio.sleep(min(self._interval, _LONGEST_PAUSE))
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


class _Box:
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
        self._box: _Box | None = None
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

    async def _begin(self) -> _Box:
        box = self._box
        if box is not None and box.begun:
            return box
        if self._closed:
            raise StoreClosed("this watch was closed: begin another")
        hub = self._hub()
        if box is None:
            interval = _INTERVAL if self._interval is None else self._interval
            box = self._box = _Box(hub, self._scope, interval, self._buffer, bool(self._collapse))
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


class Waker:
    """Tells a reader when to read again, at little cost and without saying what has changed.

    Whatever is committed after a read has begun makes the next `wait` return, if that read began after
    the wait before had returned. It may return for nothing. For one reader at a time.
    """

    def __init__(self, hub: Hub, scope: Scope, interval: float, safety: float | None) -> None:
        self.feeds: list[_Feed] = []
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


def _left(hub: Hub, box: _Box) -> None:
    """Its watch was dropped, in whichever thread."""
    with suppress(RuntimeError):  # the loop was closed
        hub.loop.call_soon_threadsafe(hub.leave, box)
