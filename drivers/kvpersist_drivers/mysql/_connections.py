"""Connections of asyncmy, with one call in flight each. Why not its pool: docs/decisions/0010-mysql-connections.md."""

from __future__ import annotations

import asyncio
import select
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, Final, NamedTuple, cast

from asyncmy import Connection
from asyncmy.errors import Error

from kvpersist.errors import CommitUnknown, KvError, PoolExhausted, StoreClosed, Unavailable
from kvpersist_drivers.mysql._errors import NOTHING_SENT, code_of, is_lost, of_connecting
from kvpersist_drivers.mysql._statements import SESSION

__all__ = ["Answer", "Connections", "Link", "Source"]

_CLOSE_SECONDS: Final = 2.0  # that calls under way have when the driver is closed
_QUIT: Final = b"\x01\x00\x00\x00\x01"  # a packet of one byte, COM_QUIT: otherwise the server logs an aborted client


class Answer(NamedTuple):
    """To one statement."""

    rows: tuple[tuple[Any, ...], ...]  # texts and blobs as bytes
    affected: int


class Source(NamedTuple):
    """Where connections come from, and where they go when they are closed."""

    connect: Callable[[], Awaitable[Connection]]
    forget: Callable[[Connection], object] | None = None


class Link:
    """One connection. Broken once a call on it has not been answered to its end: then nobody uses it again."""

    def __init__(self, connection: Connection, connections: Connections) -> None:
        self.broken = False
        self.since = 0.0  # when it was last given back
        self._closed = False
        self._connection: Any = connection  # its types leave out what is read here
        self._transport: asyncio.Transport = self._connection._transport  # which `Connection.close` forgets
        self._connections = connections

    async def call(self, sql: str, *, writes: bool = False, answers: list[Answer] | None = None) -> list[Answer]:
        """Send statements, separated by ``;``, and return the answer to each; a round trip.

        ``answers``, where given, holds what came before an error.

        Raises:
            Unavailable: nothing was sent, or nothing was changed.
            CommitUnknown: it was sent, the answer is lost, and it ``writes``.
            asyncmy.errors.Error: the server's own refusal of one of the statements; those before it were done.
        """
        connections, connection = self._connections, self._connection
        connections.calls += 1
        answers = [] if answers is None else answers
        try:
            await connection.query(sql)
            answers.append(_answer(connection))
            while connection._result.has_next:
                await connection.next_result()
                answers.append(_answer(connection))
        except Exception as error:  # not only asyncmy's: it has no errors of its own for an answer that makes no sense
            if isinstance(error, Error) and not is_lost(error):
                raise
            self.broken = True
            reason = f"{connections.where}: {error}"
            if writes and code_of(error) != NOTHING_SENT:
                raise CommitUnknown((), reason) from error
            if connections.closed:
                raise StoreClosed("the store was closed: open it again") from error
            raise Unavailable(f"{reason}; nothing was changed") from error
        except BaseException:  # cancelled: the answer is still to come
            self.broken = True
            raise
        return answers

    @property
    def in_transaction(self) -> bool:
        return self._connection.get_transaction_status()

    @property
    def silent(self) -> bool:
        """Whether the server has said nothing since the last answer: what it says unasked is that it goes."""
        if self._transport.is_closing():
            return False
        if not hasattr(select, "poll"):
            return True
        ready = select.poll()
        ready.register(self._transport.get_extra_info("socket").fileno(), select.POLLIN)
        return not ready.poll(0)

    def close(self) -> None:
        """Close it at once; what the server still wants to say is lost."""
        if self._closed:
            return
        self._closed = True
        if not self.broken and not self._transport.is_closing():
            self._transport.write(_QUIT)
        self._connection.close()
        self._transport.abort()  # where the other side does not read, `close` alone would wait for it for ever
        if self._connections.forget is not None:
            self._connections.forget(self._connection)


class Connections:
    """At most ``limit`` connections; who finds none free waits ``patience`` seconds for one."""

    def __init__(self, source: Source, where: str, *, limit: int, idle: float, patience: float) -> None:
        self.calls = 0  # sent so far
        self.closed = False
        self.where = where
        self.forget = source.forget
        self._connect = source.connect
        self._limit, self._idle_seconds, self._patience = limit, idle, patience
        self._idle: list[Link] = []
        self._used: set[Link] = set()
        self._free = asyncio.Semaphore(limit)
        self._timer: asyncio.TimerHandle | None = None

    @property
    def in_use(self) -> int:
        return len(self._used)

    @property
    def size(self) -> int:
        return len(self._used) + len(self._idle)

    @asynccontextmanager
    async def lease(self) -> AsyncIterator[Link]:
        """A connection for as long as the block takes.

        Raises:
            PoolExhausted: all stayed in use. StoreClosed: closed. What `of_connecting` returns: there is none.
        """
        await self._wait()
        try:
            link = await self._ready()
            self._used.add(link)
            try:
                yield link
            except BaseException as error:  # in the middle of anything, a transaction too, unless the server said no
                link.broken = link.broken or not isinstance(error, Error | KvError)
                raise
            finally:
                self._used.discard(link)
                self._keep(link)
        finally:
            self._free.release()

    async def close(self) -> None:
        """Let calls under way end for a moment, then cut them."""
        if self.closed:
            return
        self.closed = True
        held = 0
        try:
            async with asyncio.timeout(_CLOSE_SECONDS):
                while held < self._limit:
                    await self._free.acquire()
                    held += 1
        except TimeoutError:
            for link in list(self._used):
                link.broken = True
                link.close()  # its call fails now
        finally:
            for _ in range(held):  # calls still to come are refused, not kept waiting
                self._free.release()
            self._drop(self._idle)
            if self._timer is not None:
                self._timer.cancel()
        await asyncio.sleep(0)  # in which the sockets are closed

    async def _wait(self) -> None:
        if self._free.locked():
            try:
                async with asyncio.timeout(self._patience):
                    await self._free.acquire()
            except TimeoutError:
                raise PoolExhausted(self._limit, len(self._used), self._patience) from None
        else:
            await self._free.acquire()
        if self.closed:
            self._free.release()
            raise StoreClosed("the store was closed: open it again")

    async def _ready(self) -> Link:
        while self._idle:
            link = self._idle.pop()
            if link.silent:
                return link
            link.close()
        try:
            link = Link(await self._connect(), self)
            try:
                async with asyncio.timeout(self._patience):
                    await link.call(SESSION)
            except BaseException:  # cancelled too: nothing may stay open
                link.close()
                raise
        except KvError:
            raise
        except TimeoutError as error:
            raise Unavailable(f"{self.where} does not answer within {self._patience:g} s") from error
        except (Error, OSError) as error:
            raise of_connecting(error, self.where) from error
        except Exception as error:  # asyncmy has no error of its own for a greeting that makes no sense
            raise Unavailable(f"{self.where}: no connection: {error!r}") from error
        if self.closed:
            link.close()
            raise StoreClosed("the store was closed: open it again")
        return link

    def _keep(self, link: Link) -> None:
        if link.broken or self.closed or link.in_transaction:
            link.close()
            return
        loop = asyncio.get_running_loop()
        link.since = loop.time()
        self._idle.append(link)
        if self._timer is None:
            self._timer = loop.call_later(self._idle_seconds, self._reap)

    def _reap(self) -> None:
        """Close what nobody used for long; come back while there is something left."""
        self._timer = None
        loop = asyncio.get_running_loop()
        oldest = loop.time() - self._idle_seconds
        self._drop([link for link in self._idle if link.since <= oldest])
        if self._idle:
            first = min(link.since for link in self._idle)
            self._timer = loop.call_later(first + self._idle_seconds - loop.time(), self._reap)

    def _drop(self, links: list[Link]) -> None:
        for link in list(links):
            self._idle.remove(link)
            link.close()


def _answer(connection: Any) -> Answer:
    result = connection._result  # a cursor would ask for the text of each warning, with a call of its own
    return Answer(cast("tuple[tuple[Any, ...], ...]", result.rows or ()), result.affected_rows)
