"""MariaDB: one server with the database ``kvpersist``, and a user and password of that name."""

from __future__ import annotations

import socket

import install
from server import HOST, Server

__all__ = ["MariadbServer", "missing"]

_MADE = """\
CREATE DATABASE IF NOT EXISTS kvpersist CHARACTER SET utf8mb4;
CREATE USER IF NOT EXISTS 'kvpersist'@'127.0.0.1' IDENTIFIED BY 'kvpersist';
GRANT ALL ON *.* TO 'kvpersist'@'127.0.0.1' WITH GRANT OPTION;
"""


def missing() -> str | None:
    """Why there is no MariaDB, None if there is one."""
    try:
        install.mariadb()
    except install.Missing as reason:
        return str(reason)
    return None


class MariadbServer(Server):
    """One server: ``MariadbServer("--max-connections=10")``."""

    name = "mariadb"
    users = ("mysql", "nobody")

    @property
    def url(self) -> str:
        return f"mysql://kvpersist:kvpersist@{HOST}:{self.port}/kvpersist"

    @property
    def environment(self) -> dict[str, str]:
        return {"MYSQL_URL": self.url}

    def _prepare(self) -> None:
        _, maker = install.mariadb()
        made = ["--auth-root-authentication-method=normal", "--skip-test-db"]
        self._run([maker, "--no-defaults", f"--datadir={self._data}", *made])
        (self.folder / "made.sql").write_text(_MADE, "utf-8")
        (self.folder / "made.sql").chmod(0o644)

    def _command(self) -> list[str]:
        server, _ = install.mariadb()
        where = [f"--datadir={self._data}", f"--port={self.port}", f"--bind-address={HOST}", "--skip-name-resolve"]
        inside = ["--socket=mariadb.sock", "--pid-file=mariadb.pid", f"--init-file={self.folder}/made.sql"]
        limits = ["--max-connections=200", "--max-allowed-packet=256M", "--character-set-server=utf8mb4"]
        return [server, "--no-defaults", *where, *inside, *limits, *self._options]

    def _ready(self) -> bool:
        with socket.create_connection((HOST, self.port), 5) as connection:
            return b"mysql_native_password" in connection.recv(4096)  # its greeting

    @property
    def _data(self) -> str:
        return str(self.folder / "data")
