"""Where the server is, and how asyncmy is told so."""

from __future__ import annotations

import asyncio
from typing import Any, Final

from asyncmy import Connection
from asyncmy.pool import Pool

from kvpersist.errors import BadOption, PoolExhausted, Unavailable, Unsupported
from kvpersist.pooling import PoolOptions, ssl_context
from kvpersist.urls import UrlParts, redact, split
from kvpersist_drivers.mysql._connections import Source

__all__ = ["MysqlOptions", "Place", "place_of", "pool_source"]

_PARAMETERS: Final = ("unix_socket", "read_default_file", "read_default_group", "program_name")
_TLS: Final = ("ssl_ca", "ssl_cert", "ssl_key")
_OURS: Final = {  # what commits rely on
    "autocommit": "the driver sets it",
    "charset": "keys and values are bytes to the server: leave it out",
    "init_command": "the driver sets what its sessions need",
    "sql_mode": "the driver sets it",
    "connect_timeout": "write kv.connect_timeout",
    "ssl": "write kv.ssl",
    "db": "write it behind the host: mysql://host/database",
    "database": "write it behind the host: mysql://host/database",
}


class MysqlOptions(PoolOptions, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where the server is. Either ``url``, or ``host`` and what belongs to it, or ``client``.

    Attributes:
        url: ``mysql://user:password@host:3306/database`` or the same with ``mariadb://``. Parameters that
            are not kvpersist's: ``unix_socket``, ``read_default_file``, ``read_default_group`` and
            ``program_name`` of asyncmy, and the files ``ssl_ca``, ``ssl_cert`` and ``ssl_key``, which ask
            for TLS where ``ssl`` says nothing.
        host, port, username, password, database: the same in pieces.
        client: a pool of asyncmy (``asyncmy.create_pool``), which stays the caller's.
        table: where the entries are kept; several stores can share a database.
        auto_create: make the table when it is missing.
    """

    url: str = ""
    host: str = ""
    port: int = 3306
    username: str = ""
    password: str = ""
    database: str = ""
    client: Any = None
    table: str = "kvpersist"
    auto_create: bool = True

    @classmethod
    def from_url(cls, parts: UrlParts) -> dict[str, Any]:
        return {"url": parts.url}

    def __repr__(self) -> str:
        place = redact(self.url) if self.url else "a ready client" if self.client else f"{self.host}/{self.database}"
        return f"MysqlOptions({place!r}, table={self.table!r}, pool_max={self.pool_max})"


class Place:
    """One database of one server: ``shown`` to people without its password."""

    def __init__(self, shown: str, where: str, seconds: float, arguments: dict[str, Any]) -> None:
        self.shown, self.where = shown, where
        self._seconds, self._arguments = seconds, arguments

    async def connect(self) -> Connection:
        """Connect; nothing stays open where that fails."""
        connection = Connection(**self._arguments)
        try:
            async with asyncio.timeout(self._seconds):  # asyncmy's own covers the socket, not the greeting
                await connection.connect()
        except TimeoutError as error:
            raise Unavailable(f"{self.where} does not answer within {self._seconds:g} s") from error
        return connection


def pool_source(options: MysqlOptions) -> Source:
    """Connections of the ``client`` in ``options``."""
    if not isinstance(options.client, Pool):
        raise BadOption("client", f"a pool of asyncmy.create_pool is needed, not {type(options.client).__name__}")
    pool: Any = options.client  # whose types are not whole

    async def connect() -> Connection:
        try:
            async with asyncio.timeout(options.connect_timeout):
                return await pool.acquire()
        except TimeoutError:
            in_use = pool.size - pool.freesize
            raise PoolExhausted(pool.maxsize, in_use, options.connect_timeout) from None

    return Source(connect, pool.release)


def place_of(options: MysqlOptions) -> Place:
    """Read what leads to the server.

    Raises:
        BadOption: it is not said once and whole, or a parameter is not known.
        Unsupported: several servers.
    """
    given = [bool(options.url), bool(options.host or options.database), options.client is not None]
    if sum(given) != 1:
        raise BadOption("url", "give one of url (mysql://user@host/database), host with database, or client")
    if options.url:
        parts, _ = split(options.url)
    else:
        parts = UrlParts(
            scheme="mysql",
            host=options.host,
            port=options.port,
            username=options.username,
            password=options.password,
            path=options.database,
        )
    if "," in parts.host:
        raise Unsupported("a list of servers", "name one, or a proxy in front of them")
    if not parts.path or "/" in parts.path:
        raise BadOption("url", "behind the host stands one database, as in mysql://user@host:3306/database")
    for name in parts.params:
        if name not in (*_PARAMETERS, *_TLS):
            raise BadOption(name, _OURS.get(name) or f"known: {', '.join((*_PARAMETERS, *_TLS))}, and kv. options")
    host, port = parts.host or "localhost", parts.port or 3306
    arguments = {name: value for name, value in parts.params.items() if name in _PARAMETERS}
    arguments |= {
        "host": host,
        "port": port,
        "user": parts.username or None,
        "password": parts.password.encode(),  # a text would be sent in Latin-1
        "database": parts.path,
        "ssl": _tls(options, parts.params),
        "connect_timeout": options.connect_timeout,
        "autocommit": None,  # set with the rest of the session
    }
    at = parts.params.get("unix_socket") or f"{host}:{port}"
    shown = redact(options.url) if options.url else f"mysql://{host}:{port}/{parts.path}"
    return Place(shown, f"mysql at {at}/{parts.path}", options.connect_timeout, arguments)


def _tls(options: MysqlOptions, params: dict[str, str]) -> Any:
    files = {name: params[name] for name in _TLS if name in params}
    context = ssl_context(options.ssl if options.ssl is not None or not files else True)
    if not files:
        return context
    if context is None:
        raise BadOption(next(iter(files)), "kv.ssl says that the connection is plain: leave one of them out")
    if "ssl_key" in files and "ssl_cert" not in files:
        raise BadOption("ssl_key", "it belongs to an ssl_cert, which is missing")
    try:
        if "ssl_ca" in files:
            context.load_verify_locations(files["ssl_ca"])
        if "ssl_cert" in files:
            context.load_cert_chain(files["ssl_cert"], files.get("ssl_key"))
    except OSError as error:  # ssl.SSLError is one
        raise BadOption(next(iter(files)), f"it cannot be used: {error}") from error
    return context
