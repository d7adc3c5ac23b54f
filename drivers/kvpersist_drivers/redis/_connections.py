"""Connections to one server with one call in flight each, taken from a pool of redis-py."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from hashlib import sha1
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeAlias, cast

import hiredis
from redis.asyncio.connection import AbstractConnection, ConnectionPool
from redis.exceptions import (
    AuthenticationError,
    AuthorizationError,
    BusyLoadingError,
    MaxConnectionsError,
    NoScriptError,
    RedisError,
    ResponseError,
)

from kvpersist.errors import CommitUnknown, KvError, PoolExhausted, StoreClosed, TooManyClients, Unavailable
from kvpersist_drivers.redis._errors import is_full, of_client

__all__ = ["COMMIT", "PERMIT", "SCAN", "SWEEP", "TELL", "Connections", "Limits", "Request", "Script", "closed"]

Word: TypeAlias = str | bytes | int

_packed: Final[Callable[[tuple[Word, ...]], bytes]] = cast(Any, hiredis).pack_command  # no whole types
_GREETING_SECONDS: Final = 0.2  # in which a server that is full says so
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
TELL: Final = _SCRIPTS["tell"]


class Request(NamedTuple):
    """A command, or a script with the number of its keys, its keys and arguments; all names in it are of ``slot``."""

    slot: int
    words: tuple[Word, ...]
    script: Script | None = None

    def packed(self, *, whole: bool = False) -> bytes:
        """As it is sent; ``whole``: with the text of the script."""
        if self.script is None:
            return _packed(self.words)
        return _packed((*(("EVAL", self.script.text) if whole else ("EVALSHA", self.script.sha)), *self.words))


class Limits(NamedTuple):
    """Of the connections to one server; seconds."""

    size: int
    connect: float
    idle: float


class Connections:
    """At most ``limits.size`` connections of ``pool``; calls beyond that wait for one.

    A call that does not end with the server's answer takes its connection with it: what would have
    been the answer is never read by the next caller. ``greet`` is awaited on each new connection.
    """

    def __init__(
        self,
        pool: ConnectionPool,
        where: str,
        limits: Limits,
        greet: Callable[[AbstractConnection, str], Awaitable[None]] | None = None,
    ) -> None:
        self.calls = 0  # sent so far
        self.where = where
        self.pool = pool
        self._limits = limits
        self._greet = greet
        self._all: list[AbstractConnection] = []
        self._idle: list[tuple[AbstractConnection, float]] = []  # since when; the last used one last
        self._asking: set[AbstractConnection] = set()
        self._listening: set[AbstractConnection] = set()
        self._free = asyncio.Semaphore(limits.size)
        self._timer: asyncio.TimerHandle | None = None
        self._pruning: asyncio.Task[None] | None = None
        self._closed = False

    @property
    def in_use(self) -> int:
        """How many connections have a call in flight."""
        return len(self._asking)

    async def run(self, requests: Sequence[Request], *, writes: bool = False) -> list[Any]:
        """Send ``n`` requests in one round trip: ``n`` answers, where one is refused the `RedisError`.

        A script that the server has forgotten is sent again with its text. Texts in answers are bytes.

        Raises:
            PoolExhausted, TooManyClients, Unavailable: nothing was sent, or nothing was changed.
            CommitUnknown: they were sent, an answer is lost, and they are ``writes``.
        """
        answers = await self.exchange([request.packed() for request in requests], len(requests), writes=writes)
        forgotten = [at for at, answer in enumerate(answers) if isinstance(answer, NoScriptError)]
        if forgotten:
            whole = [requests[at].packed(whole=True) for at in forgotten]
            for at, answer in zip(forgotten, await self.exchange(whole, len(whole), writes=writes), strict=True):
                answers[at] = answer
        return answers

    async def exchange(self, packed: Sequence[bytes], count: int, *, writes: bool = False) -> list[Any]:
        """Send commands that have ``count`` answers, and return these, as `run` does."""
        await self._wait()
        try:
            connection = await self._ready()
            try:
                if self._closed:
                    raise closed()
                self.calls += 1
                self._asking.add(connection)
                await connection.send_packed_command(packed, check_health=False)
                return await _answers(connection, count)
            except StoreClosed:
                raise
            except (RedisError, OSError) as error:
                await connection.disconnect(nowait=True)
                await self._doubt()
                if is_full(error):  # it is the server's greeting, and all it ever said
                    raise TooManyClients(f"{self.where}: {error}") from error
                if self._closed and not writes:
                    raise closed() from error
                if writes:
                    raise CommitUnknown((), f"{self.where}: {error}") from error
                raise Unavailable(f"{self.where}: {error}") from error
            except BaseException:  # cancelled: the answer is still to come
                await connection.disconnect(nowait=True)
                raise
            finally:
                self._asking.discard(connection)
                self._rest(connection)
        finally:
            self._free.release()

    async def listen(self) -> AbstractConnection:
        """Return a new connection, beyond the limit, for whoever listens; `hang_up` ends it."""
        if self._closed:
            raise closed()
        settings: dict[str, Any] = {**self.pool.connection_kwargs, "protocol": 2}
        connection = cast(Any, self.pool.connection_class)(**settings)
        await self._connect(connection)
        self._listening.add(connection)
        return connection

    async def hang_up(self, connection: AbstractConnection) -> None:
        """Close a connection that `listen` gave."""
        self._listening.discard(connection)
        await connection.disconnect(nowait=True)

    async def close(self) -> None:
        """Let calls under way end, then give the connections back to the pool, closed."""
        if self._closed:
            return
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
        held = 0
        try:
            async with asyncio.timeout(_CLOSE_SECONDS):
                while held < self._limits.size:
                    await self._free.acquire()
                    held += 1
        except TimeoutError:
            for connection in list(self._asking):
                await connection.disconnect(nowait=True)  # its call fails now
            for _ in range(held, self._limits.size):
                await self._free.acquire()
        for connection in list(self._listening):
            await self.hang_up(connection)
        for connection in self._all:
            await connection.disconnect(nowait=True)
            await self.pool.release(connection)
        for _ in range(self._limits.size):  # calls still to come are refused, not kept waiting
            self._free.release()

    async def _wait(self) -> None:
        """Take one of the permits."""
        if not self._free.locked():
            await self._free.acquire()  # without waiting
        else:
            try:
                async with asyncio.timeout(self._limits.connect):
                    await self._free.acquire()
            except TimeoutError:
                raise PoolExhausted(self._limits.size, self.in_use, self._limits.connect) from None
        if self._closed:
            self._free.release()
            raise closed()

    async def _ready(self) -> AbstractConnection:
        """Return a connected connection with nothing to be read in it."""
        try:
            return await self._taken()
        except Unavailable as error:
            if type(error) is Unavailable and await self._turns_away():
                raise TooManyClients(f"{self.where}: it has as many clients as its maxclients allows") from error
            raise

    async def _turns_away(self) -> bool:
        """Whether the server tells who connects that it is full; a client that writes first may not hear it."""
        place = self.pool.connection_kwargs
        try:
            async with asyncio.timeout(_GREETING_SECONDS):
                if "path" in place:
                    reader, writer = await asyncio.open_unix_connection(place["path"])
                else:
                    reader, writer = await asyncio.open_connection(place["host"], place["port"])
                try:
                    return b"max number of clients" in await reader.read(1 << 10)
                finally:
                    writer.close()
        except (OSError, KeyError):
            return False

    async def _taken(self) -> AbstractConnection:
        if not self._idle:
            return await self._made()
        connection, _ = self._idle.pop()
        try:
            if connection.is_connected:
                if not await connection.can_read():
                    return connection
                await connection.disconnect(nowait=True)  # the server closed it meanwhile
                await self._doubt()
            await self._connect(connection)
        except BaseException:  # cancelled too: its place in the pool is given back
            self._rest(connection)
            raise
        return connection

    async def _doubt(self) -> None:
        """Close what is idle: what ended one connection may have ended all, and the next call is to find a good one."""
        for connection, _ in list(self._idle):
            await connection.disconnect(nowait=True)

    async def _made(self) -> AbstractConnection:
        """Take one more connection out of the pool."""
        with self._translated():
            async with asyncio.timeout(self._limits.connect):
                connection = await self.pool.get_connection()
        self._all.append(connection)
        if self._greet is not None:
            try:
                await self._connect(connection)
            except BaseException:  # cancelled too: its place in the pool is given back
                self._rest(connection)
                raise
        return connection

    async def _connect(self, connection: AbstractConnection) -> None:
        try:
            with self._translated():
                async with asyncio.timeout(self._limits.connect):
                    await connection.connect()
                    if self._greet is not None:
                        await self._greet(connection, self.where)
        except BaseException:  # cancelled too: a connection half made is of no use
            await connection.disconnect(nowait=True)
            raise

    @contextmanager
    def _translated(self) -> Iterator[None]:
        """Raise errors of ours for those of connecting."""
        try:
            yield
        except KvError:
            raise
        except TimeoutError as error:
            raise Unavailable(f"{self.where}: no connection in {self._limits.connect:g} s") from error
        except MaxConnectionsError as error:  # of a client that was handed in
            raise PoolExhausted(self.pool.max_connections, self.pool.max_connections, 0) from error
        except (RedisError, OSError) as error:
            raise of_client(error, self.where) from error

    def _rest(self, connection: AbstractConnection) -> None:
        if not connection.is_connected:
            self._idle.insert(0, (connection, 0))
            return
        loop = asyncio.get_running_loop()
        self._idle.append((connection, loop.time()))
        if self._timer is None and not self._closed:
            self._timer = loop.call_later(self._limits.idle, self._tick)

    def _tick(self) -> None:
        self._timer = None
        self._pruning = asyncio.get_running_loop().create_task(self._prune())

    async def _prune(self) -> None:
        """Close what was not used for the time allowed."""
        loop = asyncio.get_running_loop()
        until = loop.time() - self._limits.idle
        for item in [item for item in self._idle if item[0].is_connected and item[1] <= until]:
            self._idle.remove(item)
            await item[0].disconnect(nowait=True)
            self._idle.insert(0, (item[0], 0))
        left = [since for connection, since in self._idle if connection.is_connected]
        if left and self._timer is None and not self._closed:
            self._timer = loop.call_at(min(left) + self._limits.idle, self._tick)


async def _answers(connection: AbstractConnection, count: int) -> list[Any]:
    answers: list[Any] = []
    while len(answers) < count:
        try:
            answers.append(cast(Any, await connection.read_response(disable_decoding=True)))
        except ResponseError as refusal:
            answers.append(refusal)
        except (AuthenticationError, AuthorizationError, BusyLoadingError) as refusal:  # of all of them
            answers += [refusal] * (count - len(answers))
    return answers


def closed() -> StoreClosed:
    """What every call of a closed driver is told."""
    return StoreClosed("the store was closed: open it again")
