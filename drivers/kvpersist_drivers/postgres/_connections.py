"""Connections with one call in flight each, of asyncpg or borrowed from a pool of asyncpg's."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import suppress
from typing import Any, Final, TypeAlias, cast

import asyncpg

from kvpersist.errors import CommitUnknown, KvError, PoolExhausted, StoreClosed, Unavailable
from kvpersist_drivers.postgres._errors import is_answer, of_connecting

__all__ = ["Connection", "Connections", "Row", "Source"]

Connection: TypeAlias = Any  # an asyncpg.Connection, or a pool's proxy of one; asyncpg brings no whole types
Row: TypeAlias = Sequence[Any]

_STALE: Final = 0.005  # seconds unused, after which the loop is asked whether the server has hung up
_TURNS: Final = 5  # of the loop, until it has read that
_CLOSE_SECONDS: Final = 2.0  # that calls under way have when the driver is closed
_RETIRE_SECONDS: Final = 1.0  # that a connection has to cancel its statement and say goodbye


class Source:
    """Where connections come from: `make` connects or borrows, `retire` ends one for good, `give_back` returns it."""

    def __init__(
        self, where: str, timeout: float, connect: Callable[[], Awaitable[Connection]], pool: asyncpg.Pool | None
    ) -> None:
        self.where, self.timeout = where, timeout
        self._connect, self._pool = connect, pool

    async def make(self) -> Connection:
        try:
            if self._pool is None:
                return await self._connect()
            return await cast("Any", self._pool).acquire(timeout=self.timeout)
        except (asyncpg.PostgresError, asyncpg.InterfaceError, OSError, TimeoutError, ValueError) as error:
            raise self.failure(error) from (None if type(error) is ValueError else error)

    def failure(self, error: Exception) -> KvError:
        """The error of ours for a connection that did not come about."""
        pool = self._pool
        if pool is not None and isinstance(error, TimeoutError) and pool.get_size() == pool.get_max_size():
            return PoolExhausted(pool.get_max_size(), pool.get_size() - pool.get_idle_size(), self.timeout)
        return of_connecting(error, self.where, self.timeout)

    async def give_back(self, connection: Connection) -> None:
        """End a connection that is whole."""
        if self._pool is None:
            await self.retire(connection)
        else:
            with suppress(asyncpg.PostgresError, asyncpg.InterfaceError, OSError, TimeoutError):
                await cast("Any", self._pool).release(connection, timeout=_RETIRE_SECONDS)

    async def retire(self, connection: Connection) -> None:
        """Cancel what it is doing, as far as the server listens, and close it; asyncpg tells its pool."""
        try:
            await connection.close(timeout=_RETIRE_SECONDS)
        except (asyncpg.PostgresError, asyncpg.InterfaceError, OSError, TimeoutError):
            with suppress(asyncpg.InterfaceError):
                connection.terminate()


class Connections:
    """At most ``limit`` connections; a call that finds none free waits for one, ``source.timeout`` at most.

    A call that does not end with the server's answer takes its connection with it: what would have
    been the answer is never read by the next caller. Its place is taken until it is closed.
    """

    def __init__(self, source: Source, limit: int, idle: float) -> None:
        self.calls = 0  # made so far
        self._source = source
        self._limit, self._idle_seconds = limit, idle
        self._free = asyncio.Semaphore(limit)
        self._idle: list[tuple[Connection, float]] = []  # and since when, the oldest first
        self._busy: set[Connection] = set()
        self._making: set[asyncio.Task[Connection]] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._reaper: asyncio.TimerHandle | None = None
        self._loop = asyncio.get_running_loop()
        self._closed = False

    @property
    def in_use(self) -> int:
        """Connections with a call in flight, or about to be closed after one."""
        return self._limit - self._free._value  # pyright: ignore[reportPrivateUsage]

    async def call(self, query: str, *args: Any, writes: bool = False) -> list[Row]:
        """Execute a statement and return its rows.

        Raises:
            Unavailable: nothing was sent, or nothing was changed. PoolExhausted: so too.
            CommitUnknown: it was sent, the answer is lost, and it ``writes``.
            asyncpg.PostgresError: the server's own refusal of this statement.
        """
        return await self._run(lambda connection: connection.fetch(query, *args), writes)

    async def call_many(self, query: str, args: Sequence[tuple[Any, ...]], *, writes: bool = False) -> list[Row]:
        """Execute a statement once for each of ``args``, in one transaction and round trip; otherwise as `call`."""
        return await self._run(lambda connection: connection.fetchmany(query, args), writes)

    async def script(self, text: str) -> None:
        """Execute several statements without arguments in one transaction."""
        await self._run(lambda connection: connection.execute(text), True)

    async def close(self) -> None:
        """Let calls under way end, then close everything."""
        if self._closed:
            return
        self._closed = True
        held = 0
        try:
            async with asyncio.timeout(_CLOSE_SECONDS):
                while held < self._limit:
                    await self._free.acquire()
                    held += 1
        except TimeoutError:
            for connection in list(self._busy):
                connection.terminate()  # its call fails now
            for making in self._making:
                making.cancel()
            for _ in range(held, self._limit):
                await self._free.acquire()
        for _ in range(self._limit):  # calls still to come are refused, not kept waiting
            self._free.release()
        if self._reaper is not None:
            self._reaper.cancel()
        idle, self._idle = self._idle, []
        for connection, _ in idle:
            self._start(self._source.give_back(connection))
        while self._tasks:
            await asyncio.wait(self._tasks)

    async def _run(self, work: Callable[[Connection], Awaitable[Any]], writes: bool) -> Any:
        connection = await self._take()
        self.calls += 1
        self._busy.add(connection)
        try:
            answer = await work(connection)
        except (asyncpg.PostgresError, asyncpg.InterfaceError, OSError) as error:
            if is_answer(error) and not connection.is_closed():
                self._put(connection)
                raise
            self._drop(connection)
            if self._closed and not writes:
                raise _closed() from error
            if writes:
                raise CommitUnknown((), f"{self._source.where}: {error}") from error
            raise Unavailable(f"{self._source.where}: {error}; nothing was changed: try again") from error
        except BaseException:  # cancelled: the answer is still to come
            self._drop(connection)
            raise
        self._put(connection)
        return answer

    async def _take(self) -> Connection:
        """Return a connection that nobody uses, and that the server has not closed as far as is known."""
        if self._closed:
            raise _closed()
        if self._free.locked():
            try:
                async with asyncio.timeout(self._source.timeout):
                    await self._free.acquire()
            except TimeoutError as error:
                raise PoolExhausted(self._limit, self.in_use, self._source.timeout) from error
        else:
            await self._free.acquire()
        connection: Connection = None
        try:
            while self._idle and not self._closed:
                connection, since = self._idle.pop()
                if self._loop.time() - since > _STALE:
                    for _ in range(_TURNS):
                        await asyncio.sleep(0)
                if not connection.is_closed():
                    return connection
                connection = None
            if self._closed:
                raise _closed()
        except BaseException:  # cancelled too: its place in the pool is given back
            if connection is None:
                self._free.release()
            else:
                self._drop(connection)
            raise
        return await self._made()

    async def _made(self) -> Connection:
        """Connect, in a task of its own: asyncpg does not clean up behind a cancelled attempt."""
        making = self._loop.create_task(self._source.make())
        self._making.add(making)
        making.add_done_callback(self._making.discard)
        try:
            connection = await asyncio.shield(making)
        except asyncio.CancelledError:
            self._start(self._adopt(making))  # for the next caller
            raise
        except BaseException:  # whatever it was, the place in the pool is given back
            self._free.release()
            raise
        if self._closed:
            self._drop(connection)
            raise _closed()
        return connection

    async def _adopt(self, making: asyncio.Task[Connection]) -> None:
        await asyncio.wait([making])
        if making.cancelled() or making.exception() is not None:
            self._free.release()
        elif self._closed:
            await self._retire(making.result())
        else:
            self._put(making.result())

    def _put(self, connection: Connection) -> None:
        self._busy.discard(connection)
        self._idle.append((connection, self._loop.time()))
        if self._reaper is None:
            self._reaper = self._loop.call_later(self._idle_seconds, self._reap)
        self._free.release()

    def _drop(self, connection: Connection) -> None:
        self._busy.discard(connection)
        self._start(self._retire(connection))

    async def _retire(self, connection: Connection) -> None:
        try:
            await self._source.retire(connection)
        finally:
            self._free.release()

    def _reap(self) -> None:
        """End connections that nobody has used for long; called when the oldest may be one of them."""
        self._reaper = None
        late = self._loop.time() - self._idle_seconds
        while self._idle and self._idle[0][1] <= late:
            self._start(self._source.give_back(self._idle.pop(0)[0]))
        if self._idle:
            self._reaper = self._loop.call_at(self._idle[0][1] + self._idle_seconds, self._reap)

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _closed() -> StoreClosed:
    return StoreClosed("the store was closed: open it again")
