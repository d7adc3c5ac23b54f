"""Who listens: one connection of a driver's own, while somebody watches."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator
from contextlib import suppress
from typing import Any, Final

import asyncpg

from kvpersist.errors import KvError, StoreClosed
from kvpersist_drivers.postgres._connections import Connection, Source
from kvpersist_drivers.postgres._statements import SEPARATOR, unescaped

__all__ = ["Listener"]

_WAITING: Final = 1000  # notifications kept for a slow watcher, beyond which it is told that it missed some
_PAUSES: Final = (0.05, 0.2, 1.0, 5.0)  # seconds before the next attempt to connect again


class _Watcher:
    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        self.told: deque[tuple[str, ...]] = deque()
        self.woken = asyncio.Event()

    def tell(self, keys: tuple[str, ...] | None) -> None:
        """``keys`` changed; None: some may have been missed."""
        if keys is None or len(self.told) >= _WAITING:
            self.told.clear()
            self.told.append(())
        elif mine := tuple(key for key in keys if key.startswith(self.prefix)):
            self.told.append(mine)
        else:
            return
        self.woken.set()


class Listener:
    """Hands out what is notified. It connects for the first watcher and leaves with the last one."""

    def __init__(self, source: Source, channel: str) -> None:
        self._source, self._channel = source, channel
        self._watchers: list[_Watcher] = []
        self._connection: Connection = None
        self._connecting = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()
        self._closed = False

    async def watch(self, prefix: str) -> AsyncGenerator[tuple[str, ...]]:
        """Yield the changed keys below ``prefix``, an empty tuple first.

        Raises:
            Unavailable, TooManyClients: it cannot listen. Later, when the connection is lost, it connects
                again by itself and yields the empty tuple. StoreClosed: the driver was closed.
        """
        watcher = _Watcher(prefix)
        self._watchers.append(watcher)
        try:
            await self._listen()
            watcher.told.appendleft(())
            while not self._closed:
                while watcher.told:
                    yield watcher.told.popleft()
                watcher.woken.clear()
                await watcher.woken.wait()
            raise StoreClosed("the store was closed: open it again")
        finally:
            self._watchers.remove(watcher)
            if not self._watchers:
                await self._leave()

    async def close(self) -> None:
        self._closed = True
        for watcher in self._watchers:
            watcher.woken.set()
        await self._leave()

    async def _listen(self) -> None:
        async with self._connecting:
            if self._closed:
                raise StoreClosed("the store was closed: open it again")
            if self._connection is not None:
                return
            connection = await self._source.make()
            try:
                await connection.add_listener(self._channel, self._notified)
                connection.add_termination_listener(self._lost)
            except BaseException as error:  # cancelled too: the connection is not left open
                await self._source.retire(connection)
                if isinstance(error, asyncpg.PostgresError | asyncpg.InterfaceError | OSError):
                    raise self._source.failure(error) from error
                raise
            self._connection = connection

    async def _leave(self) -> None:
        for task in list(self._tasks):
            task.cancel()
        connection, self._connection = self._connection, None
        if connection is not None:
            await self._source.retire(connection)

    def _notified(self, _connection: Any, _pid: int, _channel: str, payload: str) -> None:
        keys = tuple(unescaped(key) for key in payload.split(SEPARATOR)) if payload else None
        for watcher in self._watchers:
            watcher.tell(keys)

    def _lost(self, connection: Any) -> None:
        if self._connection is None or self._closed or not self._watchers:
            return
        self._connection = None
        task = asyncio.get_running_loop().create_task(self._return())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _return(self) -> None:
        """Listen again; what was notified meanwhile is lost, so everybody is told that it may be."""
        for watcher in self._watchers:
            watcher.tell(None)
        attempt = 0
        while self._watchers and not self._closed:
            with suppress(KvError):
                await self._listen()
                break
            await asyncio.sleep(_PAUSES[min(attempt, len(_PAUSES) - 1)])
            attempt += 1
        for watcher in self._watchers:
            watcher.tell(None)
