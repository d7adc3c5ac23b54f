"""A TCP proxy that fails as it is told: refused, cut, silent and slow connections, answers cut in the middle.

    with Proxy.before("redis://127.0.0.1:6379/0") as proxy:
        client = connect(proxy.url)
        proxy.cut_after(0)  # requests reach the server, their answers are lost
        ...
        proxy.heal()

It runs in a thread of its own, so a blocked test does not hold it up; its methods may be called from any
thread, and what they ask for has happened when they return. Standard library only.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import struct
import threading
from collections.abc import Awaitable, Callable
from typing import Any, Self
from urllib.parse import urlsplit, urlunsplit

__all__ = ["Proxy"]

_HOST = "127.0.0.1"
_CHUNK_BYTES = 1 << 16
_QUEUED_CHUNKS = 64  # read ahead of a delayed answer; then the server has to wait
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)  # SO_LINGER of 0 s


class _Link:
    """A client's connection and the one made to the server for it."""

    def __init__(self, client: asyncio.StreamWriter, server: asyncio.StreamWriter, answer_left: int | None) -> None:
        self.client, self.server = client, server
        self.answer_left = answer_left  # bytes until it is cut; None: never

    def cut(self, *, reset: bool) -> None:
        self.server.transport.abort()
        if not reset:
            self.client.close()  # what was written is still sent
            return
        with contextlib.suppress(OSError):
            bare: socket.socket = self.client.get_extra_info("socket")
            bare.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
        self.client.transport.abort()


class Proxy:
    """Listens on a free loopback `port` and passes bytes to ``host:port`` and back, until told otherwise.

    Attributes:
        port: where it listens, the same for as long as it lives.
        accepted: connections taken so far.
        sent: bytes that reached the server's side.
        answered: bytes that reached the clients' side.
    """

    def __init__(self, host: str, port: int, *, url: str = "") -> None:
        self._target = (host, port)
        self._url = url
        self.port = self.accepted = self.sent = self.answered = 0
        self._links: set[_Link] = set()
        self._serving: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None
        self._held: socket.socket | None = None  # the port, while it refuses
        self._cut_after: int | None = None
        self._delay = self._jitter = 0.0  # seconds
        ready = threading.Event()
        self._thread = threading.Thread(target=self._run, args=[ready], name=f"proxy of {host}:{port}", daemon=True)
        self._thread.start()
        ready.wait()

    @classmethod
    def before(cls, url: str) -> Self:
        """A proxy of the server that ``url`` names, with its port in it; `url` leads through the proxy."""
        parts = urlsplit(url)
        if parts.hostname is None or parts.port is None:
            raise ValueError("a URL with a host and a port is needed")
        return cls(parts.hostname, parts.port, url=url)

    @property
    def url(self) -> str:
        """The URL given to `before`, leading through the proxy."""
        parts = urlsplit(self._url)
        user, at, _ = parts.netloc.rpartition("@")
        return urlunsplit(parts._replace(netloc=f"{user}{at}{_HOST}:{self.port}"))

    @property
    def connections(self) -> int:
        """Connections that are open now."""
        return len(self._links)

    def refuse(self) -> None:
        """Listen no more: who connects is refused by the system. Open connections go on."""
        self._do(self._refuse)

    def accept(self) -> None:
        """Listen again, at the same port."""
        self._do(self._accept)

    def cut(self, *, reset: bool = True) -> None:
        """Cut every connection now: clients see a reset, or without ``reset`` an end of the stream."""
        self._do(self._cut, reset)

    def cut_after(self, answer_bytes: int) -> None:
        """Cut each connection, open or new, once that many more bytes were answered on it; 0: answer nothing."""
        self._do(self._set_cut_after, answer_bytes)

    def stall(self) -> None:
        """Take connections and pass nothing on in either direction, until healed: then what waited arrives."""
        self._do(self._stall, self._requests, self._answers)

    def stall_answers(self) -> None:
        """Pass requests on, and hold back the answers until healed."""
        self._do(self._stall, self._answers)

    def delay(self, seconds: float, jitter: float = 0.0) -> None:
        """Deliver each answer so many seconds late, give or take ``jitter``; the order is kept."""
        self._do(self._set_delay, seconds, jitter)

    def heal(self) -> None:
        """Work as a proxy should: undo everything above; connections that were cut stay cut."""
        self._do(self._heal)

    def close(self) -> None:
        """Cut every connection and end the thread."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._ending.set)
            self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _do(self, act: Callable[..., Awaitable[None]], *arguments: Any) -> None:
        async def acted() -> None:
            await act(*arguments)

        asyncio.run_coroutine_threadsafe(acted(), self._loop).result()

    # From here on everything runs in the thread's event loop.

    def _run(self, ready: threading.Event) -> None:
        asyncio.run(self._live(ready))

    async def _live(self, ready: threading.Event) -> None:
        self._loop = asyncio.get_running_loop()
        self._ending, self._requests, self._answers = asyncio.Event(), asyncio.Event(), asyncio.Event()
        await self._heal()
        ready.set()
        await self._ending.wait()
        await self._refuse()
        if self._held is not None:
            self._held.close()
        await self._cut(reset=True)

    async def _accept(self) -> None:
        if self._held is not None:
            self._held.close()
            self._held = None
        while self._server is None:
            # A port below those the system gives to outgoing connections, so that nobody gets it while we refuse.
            port = self.port or random.randrange(20_000, 32_000)
            try:
                self._server = await asyncio.start_server(self._taken, _HOST, port)
            except OSError:
                if self.port:
                    raise
            else:
                self.port = port

    async def _refuse(self) -> None:
        if self._server is not None:
            for listening in self._server.sockets:
                self._loop.remove_reader(listening.fileno())
            for _ in range(3):  # what was accepted belongs to a server, or asyncio forgets it without closing it
                await asyncio.sleep(0)
            self._server.close()
            self._server = None
            self._held = socket.socket()  # bound, and not listening: refused, and nobody else gets the port
            self._held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self._held.bind((_HOST, self.port))

    async def _cut(self, reset: bool) -> None:
        for link in self._links:
            link.cut(reset=reset)
        serving = list(self._serving)  # a stalled one does not notice by itself
        for task in serving:
            task.cancel()
        await asyncio.gather(*serving, return_exceptions=True)

    async def _set_cut_after(self, answer_bytes: int | None) -> None:
        self._cut_after = answer_bytes
        for link in self._links:
            link.answer_left = answer_bytes

    async def _stall(self, *gates: asyncio.Event) -> None:
        for gate in gates:
            gate.clear()

    async def _set_delay(self, seconds: float, jitter: float) -> None:
        self._delay, self._jitter = seconds, jitter

    async def _heal(self) -> None:
        await self._accept()
        await self._set_cut_after(None)
        await self._set_delay(0.0, 0.0)
        self._requests.set()
        self._answers.set()

    def _taken(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.accepted += 1
        task = self._loop.create_task(self._serve(reader, writer))
        self._serving.add(task)
        task.add_done_callback(self._serving.discard)
        task.add_done_callback(lambda _: writer.close())  # also where the task was cancelled before it began

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            answers, server = await asyncio.open_connection(*self._target)
        except OSError:
            return
        link = _Link(writer, server, self._cut_after)
        self._links.add(link)
        ways = [
            asyncio.create_task(way) for way in (self._carry_requests(reader, link), self._carry_answers(answers, link))
        ]
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)
            link.cut(reset=False)
            self._links.discard(link)

    async def _carry_requests(self, reader: asyncio.StreamReader, link: _Link) -> None:
        with contextlib.suppress(OSError):
            while chunk := await reader.read(_CHUNK_BYTES):
                await self._requests.wait()
                self.sent += len(chunk)
                link.server.write(chunk)
                await link.server.drain()

    async def _carry_answers(self, reader: asyncio.StreamReader, link: _Link) -> None:
        """Answers: read ahead into a queue, so that a delay is a time on the way and not a pause between chunks."""
        queue: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(_QUEUED_CHUNKS)
        reading = asyncio.create_task(self._read_ahead(reader, queue))
        try:
            while True:
                due, chunk = await queue.get()
                if (early := due - self._loop.time()) > 0:
                    await asyncio.sleep(early)
                await self._answers.wait()
                if not chunk or not await self._answer(link, chunk):
                    return
        except OSError:
            return
        finally:
            reading.cancel()

    async def _read_ahead(self, reader: asyncio.StreamReader, queue: asyncio.Queue[tuple[float, bytes]]) -> None:
        due = 0.0
        while True:
            try:
                chunk = await reader.read(_CHUNK_BYTES)
            except OSError:
                chunk = b""
            late = max(0.0, self._delay + random.uniform(-self._jitter, self._jitter))
            due = max(due, self._loop.time() + late)
            await queue.put((due, chunk))
            if not chunk:
                return

    async def _answer(self, link: _Link, chunk: bytes) -> bool:
        """Pass a chunk on, or as much of it as is left before the cut; false when that came."""
        left = link.answer_left
        if left is not None:
            chunk = chunk[:left]
            link.answer_left = left - len(chunk)
        self.answered += len(chunk)
        link.client.write(chunk)
        await link.client.drain()
        return left is None or left > len(chunk)
