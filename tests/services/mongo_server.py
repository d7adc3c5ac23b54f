"""FerretDB 1.24 over SQLite files, which speaks the wire protocol of MongoDB; not MongoDB itself."""

from __future__ import annotations

import socket
import struct

import install
from server import HOST, Server

__all__ = ["MongoServer"]

_OP_MSG = 2013


class MongoServer(Server):
    """One server; the database ``kvpersist`` is made by who first writes to it."""

    name = "mongo"

    @property
    def url(self) -> str:
        return f"mongodb://{HOST}:{self.port}/kvpersist"

    @property
    def environment(self) -> dict[str, str]:
        return {"MONGO_URL": self.url}

    def _prepare(self) -> None:
        (self.folder / "data").mkdir()

    def _command(self) -> list[str]:
        return [install.go_program("mongo"), f"{HOST}:{self.port}", str(self.folder / "data")]

    def _ready(self) -> bool:
        words = b"\x10hello\x00" + struct.pack("<i", 1) + b"\x02$db\x00" + struct.pack("<i", 6) + b"admin\x00"
        document = struct.pack("<i", len(words) + 5) + words + b"\x00"
        header = struct.pack("<iiii", 16 + 5 + len(document), 1, 0, _OP_MSG)
        with socket.create_connection((HOST, self.port), 5) as connection:
            connection.sendall(header + struct.pack("<i", 0) + b"\x00" + document)
            return b"isWritablePrimary" in connection.recv(1 << 16)
