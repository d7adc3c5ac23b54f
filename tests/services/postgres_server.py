"""PostgreSQL: one server with the database ``kvpersist`` and a user of that name, who needs no password."""

from __future__ import annotations

import signal
import socket
import struct
from pathlib import Path

import install
from server import HOST, Server

__all__ = ["PostgresServer", "missing"]

_READY = b"Z\x00\x00\x00\x05I"  # ReadyForQuery


def missing() -> str | None:
    """Why there is no PostgreSQL, None if there is one."""
    try:
        install.postgres()
    except install.Missing as reason:
        return str(reason)
    return None


class PostgresServer(Server):
    """One server: ``PostgresServer("-c", "max_connections=5")``."""

    name = "postgres"
    ending = signal.SIGINT  # "fast": SIGTERM would wait for the clients to go
    users = ("postgres", "nobody")

    @property
    def url(self) -> str:
        return f"postgresql://kvpersist@{HOST}:{self.port}/kvpersist"

    @property
    def environment(self) -> dict[str, str]:
        return {"POSTGRES_URL": self.url}

    def _prepare(self) -> None:
        text = ["-E", "UTF8", "--locale=C.UTF-8"]
        made = ["-D", self._data, "-U", "kvpersist", "--auth=trust", *text, "--no-sync"]
        self._run([str(self._programs / "initdb"), *made])
        self._run(
            [str(self._programs / "postgres"), "--single", "-D", self._data, "postgres"], "CREATE DATABASE kvpersist"
        )

    def _command(self) -> list[str]:
        settings = [f"listen_addresses={HOST}", "unix_socket_directories=", "max_connections=200"]
        fixed = [word for setting in settings for word in ("-c", setting)]
        return [str(self._programs / "postgres"), "-D", self._data, "-p", str(self.port), *fixed, *self._options]

    def _ready(self) -> bool:
        words = b"user\0kvpersist\0database\0kvpersist\0\0"
        with socket.create_connection((HOST, self.port), 5) as connection:
            connection.sendall(struct.pack("!ii", 8 + len(words), 3 << 16) + words)
            told = b""
            while part := connection.recv(4096):
                told += part
                if told.endswith(_READY):
                    connection.sendall(b"X\x00\x00\x00\x04")
                    return True
            return False

    @property
    def _data(self) -> str:
        return str(self.folder / "data")

    @property
    def _programs(self) -> Path:
        folder = install.postgres()
        in_wheel = folder.parent.name == "pginstall"  # its libraries lie beside its package
        return self._reachable(folder, folder.parents[2] if in_wheel else folder.parent)
