"""Connections with one call in flight each, taken from a client of redis-py."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from hashlib import sha1
from pathlib import Path
from typing import Any, Final, cast

import hiredis
from redis.asyncio import Redis
from redis.asyncio.connection import AbstractConnection
from redis.exceptions import (
    AuthenticationError,
    AuthorizationError,
    BusyLoadingError,
    RedisError,
    ResponseError,
)

from kvpersist.errors import CommitUnknown, KvError, StoreClosed, Unavailable
from kvpersist_drivers.redis._errors import is_missing_script, of_client

__all__ = ["COMMIT", "PERMIT", "SCAN", "SWEEP", "Connections", "Script"]

_packed: Final[Callable[[tuple[str | bytes | int, ...]], bytes]] = cast(Any, hiredis).pack_command  # no whole types
_CLOSE_SECONDS: Final = 2.0  # that calls under way have when the driver is closed


class Script:
    """A script of ``redis.lua`` and the name the server knows it by."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.sha = sha1(text.encode(), usedforsecurity=False).hexdigest()


_SCRIPTS: Final = {
    name: Script(text)
    for part in Path(__file__).with_name("redis.lua").read_text("utf-8").split("--- ")[1:]
    for name, text in [part.split("\n", 1)]
}
COMMIT: Final = _SCRIPTS["commit"]
SCAN: Final = _SCRIPTS["scan"]
SWEEP: Final = _SCRIPTS["sweep"]
PERMIT: Final = _SCRIPTS["permit"]


class Connections:
    """At most ``limit`` connections of ``client``; calls beyond that wait for one.

    A call that does not end with the server's answer takes its connection with it: what would have
    been the answer is never read by the next caller.
    """

    def __init__(self, client: Redis, limit: int, where: str) -> None:
        self.calls = 0  # sent so far
        self._client = client
        self._where = where
        self._idle: list[AbstractConnection] = []
        self._all: list[AbstractConnection] = []
        self._asking: set[AbstractConnection] = set()
        self._limit = limit
        self._free = asyncio.Semaphore(limit)
        self._closed = False

    async def call(self, *command: str | bytes | int, writes: bool = False) -> Any:
        """Send a command and return the answer; texts in it are bytes.

        Raises:
            Unavailable: nothing was sent, or nothing was changed.
            CommitUnknown: it was sent, the answer is lost, and it ``writes``.
            RedisError: the server's own refusal of this command.
        """
        packed = _packed(command)
        async with self._free:
            if self._closed:
                raise StoreClosed("the store was closed: open it again")
            connection = await self._ready()
            try:
                if self._closed:
                    raise StoreClosed("the store was closed: open it again")
                self.calls += 1
                self._asking.add(connection)
                await connection.send_packed_command(packed, check_health=False)
                return cast(Any, await connection.read_response(disable_decoding=True))
            except (ResponseError, AuthenticationError, AuthorizationError, BusyLoadingError, StoreClosed):
                raise
            except (RedisError, OSError) as error:
                await connection.disconnect(nowait=True)
                if self._closed and not writes:
                    raise StoreClosed("the store was closed: open it again") from error
                if writes:
                    raise CommitUnknown((), f"{self._where}: {error}") from error
                raise Unavailable(f"{self._where}: {error}") from error
            except BaseException:  # cancelled: the answer is still to come
                await connection.disconnect(nowait=True)
                raise
            finally:
                self._asking.discard(connection)
                self._idle.append(connection)

    async def run(self, script: Script, keys: list[str], args: list[str | bytes | int], writes: bool = False) -> Any:
        """Call a script by its name, or with its text where the server has forgotten it."""
        try:
            return await self.call("EVALSHA", script.sha, len(keys), *keys, *args, writes=writes)
        except ResponseError as error:
            if not is_missing_script(error):
                raise
        return await self.call("EVAL", script.text, len(keys), *keys, *args, writes=writes)

    async def close(self) -> None:
        """Let calls under way end, then give the connections back to the client, closed."""
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
            for connection in list(self._asking):
                await connection.disconnect(nowait=True)  # its call fails now
            for _ in range(held, self._limit):
                await self._free.acquire()
        for connection in self._all:
            await connection.disconnect(nowait=True)
            await self._client.connection_pool.release(connection)
        for _ in range(self._limit):  # calls still to come are refused, not kept waiting
            self._free.release()

    async def _ready(self) -> AbstractConnection:
        """Return a connected connection with nothing to be read in it."""
        try:
            if not self._idle:
                connection = await self._client.connection_pool.get_connection()
                self._all.append(connection)
                return connection
        except (RedisError, OSError) as error:
            raise of_client(error, self._where) from error
        connection = self._idle.pop()
        try:
            if connection.is_connected and await connection.can_read():  # closed by the server meanwhile
                await connection.disconnect(nowait=True)
            if not connection.is_connected:
                await connection.connect()
        except BaseException as error:
            await connection.disconnect(nowait=True)
            self._idle.append(connection)
            if isinstance(error, RedisError | OSError) and not isinstance(error, KvError):
                raise of_client(error, self._where) from error
            raise
        return connection
