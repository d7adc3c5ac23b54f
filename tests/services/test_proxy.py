"""The proxy that the fault tests of the drivers rely on."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator

import pytest
from proxy import Proxy


class _Echo:
    """Answers every chunk with itself."""

    def __init__(self) -> None:
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listening.getsockname()[1]
        self.heard = threading.Semaphore(0)
        self._taken: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listening.accept()
            except OSError:
                return
            self._taken.append(connection)
            threading.Thread(target=self._answer, args=[connection], daemon=True).start()

    def _answer(self, connection: socket.socket) -> None:
        try:
            while chunk := connection.recv(1 << 16):
                self.heard.release()
                connection.sendall(chunk)
        except OSError:
            pass
        finally:
            connection.close()

    def close(self) -> None:
        self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()


@pytest.fixture
def echo() -> Iterator[_Echo]:
    server = _Echo()
    yield server
    server.close()


@pytest.fixture
def proxy(echo: _Echo) -> Iterator[Proxy]:
    with Proxy("127.0.0.1", echo.port) as proxy:
        yield proxy


def _connect(proxy: Proxy, patience: float = 5.0) -> socket.socket:
    return socket.create_connection(("127.0.0.1", proxy.port), patience)


def _say(connection: socket.socket, data: bytes) -> bytes:
    connection.sendall(data)
    return _receive(connection, len(data))


def _receive(connection: socket.socket, count: int) -> bytes:
    parts: list[bytes] = []
    while count and (part := connection.recv(count)):
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


def test_bytes_go_there_and_back(proxy: Proxy) -> None:
    data = bytes(range(256)) * 8192  # 2 MiB, more than a socket holds
    with _connect(proxy) as connection:
        sender = threading.Thread(target=connection.sendall, args=[data])
        sender.start()

        assert _receive(connection, len(data)) == data
        sender.join()
        assert (proxy.connections, proxy.accepted) == (1, 1)
        assert (proxy.sent, proxy.answered) == (len(data), len(data))


def test_a_connection_that_ends_is_no_longer_counted(proxy: Proxy) -> None:
    with _connect(proxy) as connection:
        assert _say(connection, b"a") == b"a"
        assert proxy.connections == 1

    until = time.monotonic() + 5
    while proxy.connections and time.monotonic() < until:
        time.sleep(0.005)
    assert proxy.connections == 0


def test_refused_connections_are_refused_by_the_system_and_open_ones_go_on(proxy: Proxy) -> None:
    with _connect(proxy) as connection:
        assert _say(connection, b"a") == b"a"
        proxy.refuse()

        with pytest.raises(ConnectionRefusedError):
            _connect(proxy)
        assert _say(connection, b"b") == b"b"

    port = proxy.port
    proxy.accept()
    assert proxy.port == port
    with _connect(proxy) as connection:
        assert _say(connection, b"c") == b"c"


def test_cut_resets_every_connection_and_takes_new_ones(proxy: Proxy) -> None:
    with _connect(proxy) as one, _connect(proxy) as two:
        assert (_say(one, b"a"), _say(two, b"b")) == (b"a", b"b")
        proxy.cut()

        assert proxy.connections == 0
        for connection in (one, two):
            with pytest.raises(ConnectionResetError):
                connection.recv(1)
    with _connect(proxy) as connection:
        assert _say(connection, b"c") == b"c"


def test_cut_without_reset_is_an_end_of_the_stream(proxy: Proxy) -> None:
    with _connect(proxy) as connection:
        assert _say(connection, b"a") == b"a"
        proxy.cut(reset=False)

        assert connection.recv(1) == b""


@pytest.mark.parametrize("answered", [0, 1, 5])
def test_cut_after_passes_exactly_that_many_bytes_of_the_answer(proxy: Proxy, echo: _Echo, answered: int) -> None:
    with _connect(proxy) as connection:
        assert _say(connection, b"before") == b"before"
        assert echo.heard.acquire(timeout=5)
        proxy.cut_after(answered)
        connection.sendall(b"1234567890")

        assert _receive(connection, 10) == b"1234567890"[:answered]
        assert connection.recv(1) == b""
        assert echo.heard.acquire(timeout=5), "the request did not arrive"
    with _connect(proxy) as connection:  # new connections too, until healed
        connection.sendall(b"1234567890")
        assert _receive(connection, 10) == b"1234567890"[:answered]
    proxy.heal()
    with _connect(proxy) as connection:
        assert _say(connection, b"1234567890") == b"1234567890"


def test_a_stalled_proxy_takes_connections_and_is_silent_until_healed(proxy: Proxy, echo: _Echo) -> None:
    proxy.stall()
    with _connect(proxy, 0.1) as connection:
        connection.sendall(b"abc")
        with pytest.raises(TimeoutError):
            connection.recv(1)
        assert not echo.heard.acquire(blocking=False)

        proxy.heal()
        connection.settimeout(5)
        assert _receive(connection, 3) == b"abc"


def test_stalled_answers_come_late_and_the_request_at_once(proxy: Proxy, echo: _Echo) -> None:
    proxy.stall_answers()
    with _connect(proxy, 0.1) as connection:
        connection.sendall(b"abc")
        assert echo.heard.acquire(timeout=5)
        with pytest.raises(TimeoutError):
            connection.recv(1)

        proxy.heal()
        connection.settimeout(5)
        assert _receive(connection, 3) == b"abc"


def test_a_stalled_connection_can_be_cut(proxy: Proxy) -> None:
    with _connect(proxy) as connection:
        assert _say(connection, b"a") == b"a"
        proxy.stall()
        connection.sendall(b"b")
        proxy.cut()

        with pytest.raises(ConnectionResetError):
            connection.recv(1)


def test_a_delay_is_added_once_to_an_answer_of_many_chunks(proxy: Proxy) -> None:
    proxy.delay(0.2)
    data = bytes(1 << 20)
    with _connect(proxy) as connection:
        begun = time.monotonic()
        sender = threading.Thread(target=connection.sendall, args=[data])
        sender.start()
        assert _receive(connection, len(data)) == data
        sender.join()

        assert 0.2 <= time.monotonic() - begun < 2.0  # 16 chunks one after the other would take 3.2


def test_a_jittery_answer_keeps_its_order(proxy: Proxy) -> None:
    proxy.delay(0.003, jitter=0.003)
    with _connect(proxy) as connection:
        for number in range(20):
            connection.sendall(b"%02d" % number)

        assert _receive(connection, 40) == b"".join(b"%02d" % number for number in range(20))


def test_a_server_that_is_away_looks_cut(echo: _Echo, proxy: Proxy) -> None:
    echo.close()
    with _connect(proxy) as connection, contextlib.suppress(ConnectionResetError):
        assert connection.recv(1) == b""
    echo._listening = socket.create_server(("127.0.0.1", 0))  # for the fixture to close


def test_a_url_leads_through_the_proxy() -> None:
    with Proxy.before("postgresql://ada:secret@127.0.0.1:5432/kv?a=1") as proxy:
        assert proxy.url == f"postgresql://ada:secret@127.0.0.1:{proxy.port}/kv?a=1"
    with pytest.raises(ValueError, match="port"):
        Proxy.before("postgresql://localhost/kv")


def test_a_closed_proxy_leaves_no_thread_and_no_listener(echo: _Echo) -> None:
    proxy = Proxy("127.0.0.1", echo.port)
    with _connect(proxy) as connection:
        assert _say(connection, b"a") == b"a"
        proxy.close()
        proxy.close()

        assert [thread for thread in threading.enumerate() if thread.name.startswith("proxy of")] == []
        with pytest.raises(ConnectionRefusedError):
            _connect(proxy)
