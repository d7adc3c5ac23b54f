"""Whether anybody has committed: a number that SQLite keeps, looked at by a thread while somebody watches."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
from collections.abc import AsyncGenerator, Callable
from contextlib import suppress
from typing import Final

from kvpersist.errors import StoreClosed
from kvpersist_drivers.sqlite._database import Database
from kvpersist_drivers.sqlite._errors import translated
from kvpersist_drivers.sqlite._lane import CLOSED, Lane, serve_calls

__all__ = ["Watching"]

_PERIOD: Final = 0.01  # seconds between two looks, each of some microseconds


class Watching:
    """The watchers of one driver. The thread, and its connection, are there while there are any."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._loop = asyncio.get_running_loop()
        self._looker: _Looker | None = None
        self._lane: Lane | None = None
        self._left: list[threading.Thread] = []  # that were told to end
        self._woken: set[asyncio.Event] = set()
        self._closed = False

    async def watch(self, prefix: str) -> AsyncGenerator[tuple[str, ...]]:
        """Yield the empty tuple after a commit, or several, by whichever connection."""
        woken = asyncio.Event()
        self._woken.add(woken)
        try:
            if self._closed:
                raise StoreClosed(CLOSED)
            if self._lane is None or self._looker is None:
                self._looker = _Looker(self._database, self._tell)
                self._lane = Lane("kvpersist-sqlite-watcher", serve_calls, self._looker.look)
            await self._lane.run(self._looker.connect, settle=False)
            while not self._closed:
                woken.clear()
                yield ()
                await woken.wait()
            raise StoreClosed(CLOSED)
        finally:
            self._woken.discard(woken)
            if not self._woken:
                self._stop()

    def threads(self) -> list[threading.Thread]:
        """Those that must have ended before the database is closed."""
        return self._left

    def end(self) -> None:
        """End the iterations, in whichever thread the driver is closed or dropped."""
        self._closed = True
        self._stop()
        self._tell()

    def _stop(self) -> None:
        lane, looker = self._lane, self._looker
        self._lane = self._looker = None
        if lane is not None and looker is not None:
            self._left[:] = [*(thread for thread in self._left if thread.is_alive()), lane.thread]
            lane.stop(looker.disconnect)

    def _tell(self) -> None:
        with suppress(RuntimeError):  # the loop was closed: nobody waits
            self._loop.call_soon_threadsafe(self._wake)

    def _wake(self) -> None:
        for woken in self._woken:
            woken.set()


class _Looker:
    """What the thread does."""

    def __init__(self, database: Database, changed: Callable[[], None]) -> None:
        self._database, self._changed = database, changed
        self._connection: sqlite3.Connection | None = None
        self._seen: int | None = None

    def connect(self) -> None:
        if self._connection is None:
            try:
                self._connection = self._database.connect(reading=True)
                self._seen = self._number(self._connection)
            except sqlite3.Error as error:
                raise translated(error, "watch", self._database.path) from error

    def look(self, _idle: bool) -> float | None:
        if self._connection is None:
            return None
        try:
            number = self._number(self._connection)
        except sqlite3.Error:  # looked at again; until then nothing is known
            number = None
        if number is not None and number != self._seen:
            self._changed()
        self._seen = number
        return _PERIOD

    def disconnect(self) -> None:
        if self._connection is not None:
            self._database.disconnect(self._connection)

    def _number(self, connection: sqlite3.Connection) -> int:
        """A number that is another one after somebody else's commit."""
        [number] = connection.execute("PRAGMA data_version").fetchone()
        return number
