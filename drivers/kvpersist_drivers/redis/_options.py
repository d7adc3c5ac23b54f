"""What says where Redis is, and from it the pools of redis-py."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Final, NamedTuple, cast
from urllib.parse import urlsplit

from msgspec import Meta
from redis.asyncio import Redis, RedisCluster
from redis.asyncio.connection import Connection, ConnectionPool, SSLConnection, parse_url
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import SentinelConnectionPool
from redis.backoff import NoBackoff

from kvpersist.errors import BadOption
from kvpersist.pooling import PoolOptions, ssl_context
from kvpersist.urls import UrlParts, redact
from kvpersist_drivers.redis._connections import Limits
from kvpersist_drivers.redis._servers import Address

__all__ = ["Place", "RedisOptions", "place_of"]

_PORT: Final = 6379
_SENTINEL_PORT: Final = 26379
_OTHERS: Final = {"connection_pool", "response_callbacks", "max_connections", "connection_class", "redis_connect_func"}
_THEIRS: Final = re.compile(
    "maint_|orig_|oss_cluster_"
)  # what redis-py keeps of a client among its connections' arguments


class RedisOptions(PoolOptions, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where the server, the cluster or the sentinels are: a ``url``, or a ``host``, or a ``client``.

    Attributes:
        url: ``redis://``, ``rediss://`` (TLS), ``unix://`` or ``valkey://``. Several hosts, separated by
            commas, are nodes of one cluster, or sentinels. Parameters that are not kvpersist's are those
            of redis-py's ``Redis.from_url``.
        host, port, username, password, database: the same in pieces; ``host`` too may be several.
        client: a ``Redis`` or ``RedisCluster`` of redis-py's asyncio, which is not closed.
        sentinel: what the sentinels call the master; the hosts are sentinels then.
        sentinel_username, sentinel_password: where the sentinels ask for them.
        base: what every name in the server begins with: several stores can share a database.
        pool_max: connections to each server at most.
    """

    url: str = ""
    host: str = ""
    port: Annotated[int, Meta(ge=1, le=65535)] | None = None
    username: str = ""
    password: str = ""
    database: Annotated[int, Meta(ge=0)] = 0
    client: Any = None
    sentinel: str = ""
    sentinel_username: str = ""
    sentinel_password: str = ""
    base: Annotated[str, Meta(min_length=1, max_length=64, pattern="^[^{}]*$")] = "kvpersist"

    @classmethod
    def from_url(cls, parts: UrlParts) -> dict[str, Any]:
        """Everything of a URL is redis-py's to read."""
        return {"url": parts.url}

    def __repr__(self) -> str:
        where = redact(self.url) if self.url else self.host or type(self.client).__name__
        return f"RedisOptions({where!r}, base={self.base!r}, pool_max={self.pool_max})"

    @property
    def limits(self) -> Limits:
        return Limits(self.pool_max, self.connect_timeout, self.pool_idle)


class Place(NamedTuple):
    """Servers to begin with, and how to connect to them."""

    addresses: list[Address]  # none for a socket
    settings: Mapping[str, Any]  # of a connection, beside host and port
    connection_class: type[Any]
    limits: Limits
    pool: ConnectionPool | None = None  # of a client that was handed in
    sentinel: str = ""
    sentinel_settings: Mapping[str, Any] = {}
    sentinel_class: type[Any] = Connection

    def open(self, address: Address | None = None) -> ConnectionPool:
        """A pool of connections to ``address``, or to the socket."""
        return self._pool(self.connection_class, self.settings, address)

    def open_sentinel(self, address: Address) -> ConnectionPool:
        return self._pool(self.sentinel_class, self.sentinel_settings, address)

    def _pool(self, kind: type[Any], settings: Mapping[str, Any], address: Address | None) -> ConnectionPool:
        more = {} if address is None else address._asdict()
        return ConnectionPool(connection_class=kind, max_connections=self.limits.size, **{**settings, **more})


def place_of(options: RedisOptions) -> Place:
    """Read the options.

    Raises:
        BadOption: they do not say where, or say it twice, or mean nothing.
    """
    given = [name for name in ("url", "host", "client") if getattr(options, name)]
    if len(given) != 1:
        raise BadOption(given[1] if given else "url", "give one of url, host and client: what is to be opened?")
    if options.client is not None:
        return _of_client(options.client, options)
    try:
        return _of_url(options.url or _url(options), options)
    except ValueError as error:
        if isinstance(error, BadOption):
            raise
        raise BadOption("url", str(error)) from error


class _TlsConnection(SSLConnection):
    """With a context that was handed in."""

    def __init__(self, *, context: Any, **settings: Any) -> None:
        super().__init__(**settings)  # pyright: ignore[reportUnknownMemberType]
        self.ssl_context.context = context


def _url(options: RedisOptions) -> str:
    """A URL without user and password, which are added unread."""
    host = options.host
    port = "" if options.port is None else f":{options.port}"
    return f"redis://{host}{port}/{options.database}"


def _of_url(url: str, options: RedisOptions) -> Place:
    scheme, _, rest = url.partition("://")
    scheme = "redis" if scheme == "valkey" else scheme
    place, mark, query = rest.partition("?")
    authority, slash, path = place.partition("/")
    userinfo, at, hosts = authority.rpartition("@")
    if scheme not in ("redis", "rediss", "unix"):
        raise BadOption("url", f"it begins with redis://, rediss://, unix:// or valkey://, not {scheme}://")
    if scheme != "unix" and not (path.strip("/") or "0").isdigit():
        raise BadOption("url", "behind the server stands the number of a database, such as redis://host:6379/0")
    addresses = [] if scheme == "unix" else [_address(host, options) for host in hosts.split(",")]
    known = f"{scheme}://{userinfo}{at}{'' if addresses else hosts}{slash}{path}{mark}{query}"
    settings: dict[str, Any] = {
        "protocol": 2,
        "retry": Retry(NoBackoff(), 0),  # a second attempt at a write is the store's to decide
        "socket_timeout": None,  # kv.timeout is counted for the whole call
        "socket_connect_timeout": options.connect_timeout,
        "socket_read_size": 1 << 16,
        **({} if scheme == "unix" else {"socket_keepalive": True}),
        **cast("dict[str, Any]", parse_url(known)),
    }
    given = {"username": options.username, "password": options.password}
    settings |= {name: value for name, value in given.items() if value}
    kind = settings.pop("connection_class", Connection)
    for name in ("host", "port"):
        settings.pop(name, None)
    kind = _secured(kind, settings, options)
    found = Place(addresses, settings, kind, options.limits)
    if not options.sentinel:
        return found
    if not addresses:
        raise BadOption("sentinel", "sentinels have hosts, not a socket: redis://h1:26379,h2:26379/0?kv.sentinel=NAME")
    return found._replace(
        sentinel=options.sentinel, sentinel_class=kind, sentinel_settings=_for_sentinels(settings, options)
    )


def _address(host: str, options: RedisOptions) -> Address:
    parts = urlsplit(f"redis://{host}")
    default = _SENTINEL_PORT if options.sentinel else _PORT
    return Address(parts.hostname or "localhost", default if parts.port is None else parts.port)


def _secured(kind: type[Any], settings: dict[str, Any], options: RedisOptions) -> type[Any]:
    """The class of connections that option ``ssl`` asks for; its arguments are added to ``settings``."""
    if options.ssl is None:
        return kind
    context = ssl_context(options.ssl)  # refuses what is no mode
    if context is None:
        if kind is SSLConnection:
            raise BadOption("ssl", "the URL says rediss, which is TLS: write redis://, or leave kv.ssl out")
        return kind
    if kind not in (Connection, SSLConnection):
        raise BadOption("ssl", "there is no TLS on a socket: leave kv.ssl out")
    if context is options.ssl:
        settings["context"] = context
        return _TlsConnection
    mode = str(options.ssl).lower()
    settings.setdefault("ssl_cert_reqs", "none" if mode == "require" else "required")
    settings.setdefault("ssl_check_hostname", mode in ("true", "verify-full"))
    return SSLConnection


def _for_sentinels(settings: Mapping[str, Any], options: RedisOptions) -> dict[str, Any]:
    """Sentinels have users of their own, and no databases."""
    kept = {name: value for name, value in settings.items() if name not in ("db", "username", "password")}
    given = {"username": options.sentinel_username, "password": options.sentinel_password}
    return kept | {name: value for name, value in given.items() if value}


def _of_client(given: Any, options: RedisOptions) -> Place:
    if options.sentinel:
        raise BadOption("sentinel", "hand in what Sentinel(...).master_for(NAME) returns, and leave it out")
    client = given  # seen without its types, which are not whole
    if isinstance(given, RedisCluster):
        settings = client.connection_kwargs
        kind = settings.get("connection_class", Connection)
        nodes = [Address(node.host, int(node.port)) for node in client.nodes_manager.startup_nodes.values()]
        return Place(nodes, _own(settings), kind, options.limits)
    if not isinstance(given, Redis):
        raise BadOption("client", f"a Redis or RedisCluster of redis.asyncio, not {type(given).__name__}")
    pool = client.connection_pool
    settings = pool.connection_kwargs
    if not isinstance(pool, SentinelConnectionPool):
        addresses = [] if "path" in settings else [_place(pool)]
        return Place(addresses, _own(settings), pool.connection_class, options.limits, pool)
    if not client.connection_pool.is_master:
        raise BadOption("client", "it reads from replicas, which may be behind: hand in what master_for(NAME) returns")
    sentinels = [sentinel.connection_pool for sentinel in client.connection_pool.sentinel_manager.sentinels]
    return Place(
        [_place(sentinel) for sentinel in sentinels],
        _own(settings),
        SSLConnection if issubclass(client.connection_pool.connection_class, SSLConnection) else Connection,
        options.limits,
        sentinel=client.connection_pool.service_name,
        sentinel_settings=_own(sentinels[0].connection_kwargs),
        sentinel_class=sentinels[0].connection_class,
    )


def _place(pool: Any) -> Address:
    return Address(pool.connection_kwargs.get("host", "localhost"), int(pool.connection_kwargs.get("port", _PORT)))


def _own(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What a client's connections are made with, less what belongs to that client, or to one of its servers."""
    mine = {"retry": Retry(NoBackoff(), 0), "socket_timeout": None, "protocol": 2}
    kept = {name: value for name, value in settings.items() if name not in _OTHERS and not _THEIRS.match(name)}
    return {name: value for name, value in (kept | mine).items() if name not in ("host", "port")}
