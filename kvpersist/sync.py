"""The same names, blocking: for programs, notebooks and threads that have no event loop of their own.

``with kvpersist.open_sync("sqlite:///agent.db") as db`` gives what `kvpersist.open` does, without
``await``: methods return their result, ``async for`` becomes ``for`` and ``async with`` becomes
``with``. One thread runs one event loop for all that is open; any number of threads may call. The
types stand in ``sync.pyi``, which is made from those of the asynchronous names.
"""

from __future__ import annotations

import asyncio
import inspect
import os
import sys
import threading
from collections.abc import Callable, Coroutine, Generator
from concurrent.futures import CancelledError, Future
from contextlib import suppress
from functools import cache
from typing import Any, Final, Self, cast

from kvpersist.agents.persistence import open as open_async
from kvpersist.errors import BadRequest, ForkedStore, StoreClosed
from kvpersist.opening import open_store

__all__ = ["open_store_sync", "open_sync"]

_END: Final = object()
_CLOSED: Final = "the store was closed: open it again"


def open_sync(where: Any = None, **options: Any) -> Any:
    """Open an agent's records, for calls that block; ``with`` it, or close it.

    Arguments and errors are those of `kvpersist.open`. Functions that are handed to `update` and the
    like run in the thread of the event loop, and may not call what blocks; those of `transact` and
    `events.on` run in threads of their own, and may.

    Raises:
        As `kvpersist.open`; BadRequest: called from a function that runs in the thread of the event loop.
    """
    return _opened(open_async, where, options)


def open_store_sync(where: Any = None, **options: Any) -> Any:
    """Open a store of plain keys, for calls that block. Arguments and errors are those of `open_store`."""
    return _opened(open_store, where, options)


def _opened(opening: Callable[..., Any], where: Any, options: dict[str, Any]) -> Any:
    frame = sys._getframe(2)
    opener = f"{frame.f_code.co_filename}:{frame.f_lineno}"
    loop = _Loop.join()
    try:
        made = loop.run(_awaited(opening, (where.target if isinstance(where, _Blocking) else where,), options))
    except BaseException:
        loop.leave()
        raise
    store: Any = getattr(made, "store", made)
    store._opened_at(opener)
    return _Opened(loop, made)


class _Loop:
    """The thread with the event loop that everything of this process shares while something is open."""

    _shared: _Loop | None = None
    _lock = threading.RLock()  # the collector may end an iteration, which calls `run`, in whoever holds it

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._users = 0
        self._ended = False
        self._process = os.getpid()
        self._thread = threading.Thread(target=self._run, name="kvpersist-sync", daemon=True)
        self._thread.start()

    @classmethod
    def join(cls) -> _Loop:
        """The loop of this process, kept running until each of those who joined has left it."""
        with cls._lock:
            if cls._shared is None:
                cls._shared = _Loop()
            cls._shared._users += 1
            return cls._shared

    def leave(self) -> None:
        """End the loop if nobody else uses it."""
        with self._lock:
            self._users -= 1
            if self._users or self._process != os.getpid():
                return
            if _Loop._shared is self:
                _Loop._shared = None
            self._ended = True
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def check_thread(self) -> None:
        """Raise BadRequest in the thread of the event loop."""
        if threading.current_thread() is self._thread:
            raise BadRequest("a blocking call from the thread of the event loop would wait for itself")

    def run(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        """Run to its end in the loop; what interrupts the wait cancels it first."""
        try:
            if self._process != os.getpid():
                raise ForkedStore("this store was opened before a fork: open it again in the child")
            self.check_thread()
            with self._lock:  # what is handed over is before the stop of the loop, and is ended with it
                if self._ended:
                    raise StoreClosed(_CLOSED)
                future: Future[Any] = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        except Exception:
            coroutine.close()
            raise
        try:
            return future.result()
        except CancelledError:
            if self._ended:
                raise StoreClosed(_CLOSED) from None
            raise
        except BaseException:
            future.cancel()  # where it has ended, this does nothing
            raise

    def usable(self) -> bool:
        """Whether `run` can be called here."""
        return not self._ended and self._process == os.getpid() and threading.current_thread() is not self._thread

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_forever()
            self._loop.run_until_complete(_cancel_others())
            self._loop.run_until_complete(self._loop.shutdown_asyncgens())
            self._loop.run_until_complete(self._loop.shutdown_default_executor())
        finally:
            self._loop.close()


async def _cancel_others() -> None:
    """End the calls of other threads that are still under way: they would wait for ever."""
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)


def _after_fork() -> None:
    """The thread is not in the child: what it opens gets a loop of its own."""
    _Loop._shared = None
    _Loop._lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


class _Blocking:
    """An object whose asynchronous methods block."""

    def __init__(self, loop: _Loop, target: Any) -> None:
        object.__setattr__(self, "_loop", loop)
        object.__setattr__(self, "target", target)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(f"{type(self.target).__name__!r} has no public attribute {name!r}")
        if name == "close" and not hasattr(self.target, "close"):
            name = "aclose"  # there is nothing but blocking calls here
        found = getattr(self.target, name)
        if callable(found) and not _is_asynchronous(type(found)):
            return _method(self._loop, found)
        return _blocking(self._loop, found)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.target, name, _plain(value))

    def __dir__(self) -> list[str]:
        return [name for name in dir(self.target) if not name.startswith("_")]

    def __repr__(self) -> str:
        return f"<blocking {self.target!r}>"

    def __enter__(self) -> Any:
        entered = self._loop.run(self.target.__aenter__())
        return self if entered is self.target else _blocking(self._loop, entered)

    def __exit__(self, *problem: object) -> bool | None:
        return cast("bool | None", self._loop.run(self.target.__aexit__(*problem)))

    def __iter__(self) -> Generator[Any]:
        return _iterated(self._loop, self.target)

    def __next__(self) -> Any:
        item = self._loop.run(_next(self.target))
        if item is _END:
            raise StopIteration
        return item


class _Opened(_Blocking):
    """What was opened here: it is closed with the block, and takes leave of the loop."""

    def __init__(self, loop: _Loop, target: Any) -> None:
        super().__init__(loop, target)
        object.__setattr__(self, "_left", threading.Lock())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close it; a second call does nothing."""
        self._loop.check_thread()  # before it takes leave: the loop would end under the call that is under way
        if not self._left.acquire(blocking=False):  # kept: it is closed once
            return
        try:
            self._loop.run(self.target.close())
        finally:
            self._loop.leave()


@cache
def _is_asynchronous(type_: type) -> bool:
    """Whether objects of this type have something to await."""
    if type in type_.__mro__ or type_.__module__ == "builtins":
        return False
    if any(hasattr(type_, name) for name in ("__aenter__", "__anext__", "__aiter__")):
        return True
    return type_.__module__.partition(".")[0] == "kvpersist" and any(
        inspect.iscoroutinefunction(getattr(type_, name, None))
        or inspect.isasyncgenfunction(getattr(type_, name, None))
        for name in dir(type_)
        if not name.startswith("_")
    )


def _blocking(loop: _Loop, value: Any) -> Any:
    if inspect.isasyncgen(value):
        return _iterated(loop, value)
    if inspect.isfunction(value) or inspect.ismethod(value):
        return _method(loop, value)
    return _Blocking(loop, value) if _is_asynchronous(value.__class__) else value


def _plain(value: Any) -> Any:
    return value.target if isinstance(value, _Blocking) else value


def _method(loop: _Loop, method: Callable[..., Any]) -> Callable[..., Any]:
    awaited = _awaited_parameters(getattr(method, "__func__", method))

    def call(*arguments: Any, **options: Any) -> Any:
        given = [_plain(value) for value in arguments]
        named = {name: _plain(value) for name, value in options.items()}
        for position, name in awaited:
            if name in named:
                named[name] = _threaded(loop, named[name])
            elif position < len(given):
                given[position] = _threaded(loop, given[position])
        return _blocking(loop, loop.run(_awaited(method, given, named)))

    call.__name__ = call.__qualname__ = getattr(method, "__name__", "call")
    call.__doc__ = method.__doc__
    return call


@cache
def _awaited_parameters(function: Callable[..., Any]) -> tuple[tuple[int, str], ...]:
    """The parameters that take a function whose answer is awaited, by position behind ``self`` and by name."""
    found: list[tuple[int, str]] = []
    with suppress(ValueError, TypeError):
        names = [name for name in inspect.signature(function).parameters if name != "self"]
        for name, text in getattr(function, "__annotations__", {}).items():
            known = getattr(function, "__globals__", {}).get(str(text).partition("[")[0].partition(" ")[0])
            if name in names and ("Awaitable" in str(text) or "Awaitable" in repr(known)):
                found.append((names.index(name), name))
    return tuple(found)


def _threaded(loop: _Loop, function: Any) -> Any:
    """Let a blocking function serve where one is awaited, in a thread, so that it may make calls of its own."""
    if not callable(function) or inspect.iscoroutinefunction(function):
        return function

    async def call(*arguments: Any) -> Any:
        return await asyncio.to_thread(function, *[_blocking(loop, each) for each in arguments])

    return call


async def _awaited(function: Callable[..., Any], arguments: Any, options: dict[str, Any]) -> Any:
    """Call in the loop, and wait for what is only there to be awaited."""
    answer = function(*arguments, **options)
    if inspect.isawaitable(answer) and (function in (open_async, open_store) or not hasattr(answer, "__aenter__")):
        return await answer
    return answer


async def _next(target: Any) -> Any:
    try:
        return await target.__anext__()
    except StopAsyncIteration:
        return _END


def _iterated(loop: _Loop, iterable: Any) -> Generator[Any]:
    iterator = iterable.__aiter__()
    try:
        while (item := loop.run(_next(iterator))) is not _END:
            yield item
    finally:
        if loop.usable() and hasattr(iterator, "aclose"):  # otherwise the loop has ended it, or will
            loop.run(iterator.aclose())
