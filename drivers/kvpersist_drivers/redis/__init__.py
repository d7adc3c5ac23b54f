"""A single Redis or Valkey server, 6.2 or later. Needs ``kvpersist[redis]``.

An entry is a string under ``<base>:{.<namespace>}<rest of the key>``: a header of 20 bytes and the
value. Beside the entries of a namespace stand its index, a sorted set of all its keys in their order
(``<base>:#{.<namespace>}``), and the expiries of those that have one (``<base>:~{.<namespace>}``); the
namespaces are a set, ``<base>:#``. The namespace is the text before a key's first ``:``; keys without
one share the empty namespace.

``commit`` is one script call however many batches it has, ``get`` one MGET, ``scan`` one script call
per namespace and thousand entries. Batches across namespaces are refused, so that a cluster could keep
the same layout. The server's clock judges expiry.

A cancelled commit may still be executed by the server. What the server acknowledged is as durable as
its configuration makes it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Final, Self, cast
from urllib.parse import urlsplit

from msgspec import Meta, Struct, structs

from kvpersist import keys as grammar
from kvpersist.driver import ABSENT, Batch, Capabilities, Check, Committed, Entry, needs_extra, unpacked_entry
from kvpersist.errors import (
    BadKey,
    BadOption,
    CommitUnknown,
    Conflict,
    KvError,
    ReadOnly,
    StoreClosed,
    Unsupported,
)
from kvpersist.urls import redact

with needs_extra("redis", module="redis"), needs_extra("redis", module="hiredis"):
    from redis.asyncio import Redis
    from redis.asyncio.retry import Retry
    from redis.asyncio.sentinel import SentinelConnectionPool
    from redis.backoff import NoBackoff
    from redis.exceptions import RedisError

    from kvpersist_drivers.redis._connections import COMMIT, PERMIT, SCAN, SWEEP, Connections, Script
    from kvpersist_drivers.redis._errors import of_client, of_reply
    from kvpersist_drivers.redis._plan import MAX_VALUE_BYTES, Names, Plan, names_of

__all__ = ["RedisDriver", "RedisOptions"]

_PAGE: Final = 1000  # entries of one call of the scan script, which hands as many names to one MGET
_OLDEST: Final = (6, 2)  # the first with PXAT
_CONNECT_SECONDS: Final = 5.0


class RedisOptions(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where the server is.

    Attributes:
        url: ``redis://``, ``rediss://`` (TLS), ``unix://`` or ``valkey://``; parameters that are not
            kvpersist's are those of redis-py's ``Redis.from_url``.
        base: what every name in the server begins with: several stores can share a database.
        pool_max: connections at most; calls beyond that wait for one.
    """

    url: Annotated[str, Meta(min_length=1)]
    base: Annotated[str, Meta(min_length=1, max_length=64, pattern="^[^{}]*$")] = "kvpersist"
    pool_max: Annotated[int, Meta(ge=3)] = 8  # one for reads, one for writes, the others for scans

    def __repr__(self) -> str:
        return f"RedisOptions(url={redact(self.url)!r}, base={self.base!r}, pool_max={self.pool_max})"


class RedisDriver:
    """One server. Made by `open`, or by `over` on a client that stays the caller's."""

    api: ClassVar[int] = 1
    Options: ClassVar[type[Struct]] = RedisOptions

    def __init__(self, client: Redis, *, base: str = "kvpersist", pool_max: int = 8) -> None:
        """Does not connect; `open` and `over` are what a user calls."""
        self.capabilities = Capabilities(
            atomic_batch="partition",
            conditional=True,
            conditional_delete=True,
            ordered=True,
            reverse=True,
            deref=True,
            coalesce="both",
            ttl="native",
            shared=True,
            max_value_bytes=MAX_VALUE_BYTES,
            server="Redis",
        )
        self._client = client
        self._owns_client = False
        self._base = base
        self._where = _place(client)
        self._connections = Connections(client, pool_max, self._where)
        self._denied: str | None = None  # why this user cannot write
        self._closed = False

    @classmethod
    async def open(cls, options: RedisOptions, /) -> Self:
        """Connect to the server that ``options`` name.

        Raises:
            BadOption: the URL is wrong, or the server refuses the user or password.
            Unavailable: the server cannot be reached. Unsupported: it is too old, a cluster or a sentinel.
        """
        client = _client(options)
        try:
            driver = await cls.over(client, base=options.base, pool_max=options.pool_max)
        except BaseException as error:
            await client.aclose()
            if isinstance(error, TypeError) and "argument" in str(error):  # from the parameters of the URL
                raise BadOption("url", str(error)) from error
            raise
        driver._owns_client = True
        return driver

    @classmethod
    async def over(cls, client: Redis, *, base: str = "kvpersist", pool_max: int = 8) -> Self:
        """Use a client of redis-py, which must allow ``pool_max`` connections and is not closed by `close`."""
        if not isinstance(client, Redis) or isinstance(client.connection_pool, SentinelConnectionPool):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise Unsupported("a client of Redis Cluster or Sentinel", "name a single server")
        driver = cls(client, base=base, pool_max=pool_max)
        try:
            await driver._probe()
        except BaseException:  # cancelled too: nothing may stay open
            await driver.close()
            raise
        return driver

    async def get(self, keys: Sequence[str]) -> list[Entry | None]:
        if self._closed:
            raise _closed()
        if not keys:
            return []
        base = self._base
        names = [
            f"{base}:{{.{key[:at]}}}{key[at:]}" if (at := key.find(":")) >= 0 else f"{base}:{{.}}{key}" for key in keys
        ]
        stored = await self._ask("MGET", *names)
        return [None if data is None else unpacked_entry(key, data) for key, data in zip(keys, stored, strict=True)]

    async def commit(self, batches: Sequence[Batch]) -> list[Committed | KvError]:
        if self._closed:
            raise _closed()
        plan = Plan(self._base)
        answers: list[Committed | KvError] = [plan.add(batch) or Committed(batch.version) for batch in batches]
        if not plan.batches:
            return answers
        if self._denied is not None:
            raise ReadOnly(self._denied)
        keys, args = plan.command()
        try:
            failed = cast("list[Any]", await self._connections.run(COMMIT, keys, args, writes=True))
        except RedisError as error:
            answer = of_client(error, self._where)
            if type(answer) is KvError:  # of the script itself, somewhere in the middle
                answer = CommitUnknown((), str(answer))
            raise answer from error
        if failed:
            places = [at for at, answer in enumerate(answers) if isinstance(answer, Committed) and batches[at].ops]
            for at in range(0, len(failed), 3):
                number, position, found = failed[at : at + 3]
                place = places[int(number) - 1]
                answers[place] = self._failure(batches[place], position, found)
        return answers

    async def scan(
        self,
        start: str | None,
        end: str | None,
        *,
        limit: int,
        reverse: bool = False,
        keys_only: bool = False,
        deref: str | None = None,
    ) -> list[Entry]:
        if self._closed:
            raise _closed()
        if limit <= 0 or (start is not None and end is not None and start >= end):
            return []
        space = _only_namespace(start, end)
        if space is not None:
            return await self._scan(space, start, end, limit, reverse, keys_only, deref)
        spaces = [text.decode() for text in await self._ask("SMEMBERS", f"{self._base}:#")]
        found: list[Entry] = []
        for space in sorted((space for space in spaces if space), key=lambda space: space + ":", reverse=reverse):
            if len(found) >= limit:
                break
            found += await self._scan(space, start, end, limit - len(found), reverse, keys_only, deref)
        if "" in spaces:  # its keys stand between those of the others
            found += await self._scan("", start, end, limit, reverse, keys_only, deref)
            found.sort(key=lambda entry: entry.key, reverse=reverse)
        return found[:limit]

    async def now(self) -> float:
        """Seconds since 1970 by the server's clock."""
        seconds, microseconds = await self._ask("TIME")
        return int(seconds) + int(microseconds) / 1e6

    async def ping(self) -> None:
        await self._ask("PING")

    async def compact(self, limit: int = 500) -> int:
        """Take at most ``limit`` expired keys out of the indexes; their values are gone by themselves."""
        removed = 0
        for space in await self._ask("SMEMBERS", f"{self._base}:#"):
            names = self._names(space.decode())
            looked = 1
            while looked and removed < limit:
                gone, looked = await self._run(SWEEP, [names.lex, names.expiries], [names.prefix, limit - removed])
                removed += gone
        return removed

    async def close(self) -> None:
        self._closed = True
        await self._connections.close()
        if self._owns_client:
            await self._client.aclose()

    async def _scan(
        self,
        space: str,
        start: str | None,
        end: str | None,
        limit: int,
        reverse: bool,
        keys_only: bool,
        deref: str | None,
    ) -> list[Entry]:
        """Scan the part of ``[start, end)`` that lies in one namespace."""
        bounds = _bounds(space, start, end)
        if bounds is None:
            return []
        low, high = bounds
        prefix, index, _ = self._names(space)
        near = deref is not None and ":" in deref and grammar.partition(deref) == space
        targets = prefix + deref[len(space) :] if deref is not None and near else ""
        found: list[Entry] = []
        while len(found) < limit:
            args = [prefix, low, high, min(_PAGE, limit - len(found)), "reverse" * reverse, "keys" * keys_only, targets]
            last, *page = await self._run(SCAN, [index], args)
            found += _entries(space, page, deref if near else None)
            if last is None:
                break
            bound = "(" + last.decode()
            low, high = (low, bound) if reverse else (bound, high)
        return await self._followed(found, deref) if deref is not None and not near else found

    async def _followed(self, entries: list[Entry], deref: str) -> list[Entry]:
        """Add the targets, which are in other namespaces, with one more call."""
        keys = [deref + entry.value.decode("utf-8", "replace") for entry in entries]
        return [
            Entry(entry.key, entry.value, entry.version, entry.expires_at, target)
            for entry, target in zip(entries, await self.get(keys), strict=True)
        ]

    async def _probe(self) -> None:
        """Learn what the server is, and whether this user may do what a commit needs."""
        try:
            told: bytes = await self._ask("INFO", "server")
        except KvError as error:
            if type(error) not in (ReadOnly, KvError):
                raise
            told = b""  # not for this user
        info = dict(line.split(":", 1) for line in told.decode("utf-8", "replace").splitlines() if ":" in line)
        if info.get("redis_mode", "standalone") != "standalone":
            raise Unsupported(f"a server in {info['redis_mode']} mode ({self._where})", "name a single server")
        version = info.get("redis_version", "")
        numbers = tuple(int(number) for number in version.split(".")[:2] if number.isdigit())
        if numbers and numbers < _OLDEST:
            raise Unsupported(f"Redis {version} ({self._where})", "it needs 6.2 or later")
        valkey = info.get("valkey_version")
        server = f"Valkey {valkey}" if valkey else f"Redis {version}".strip()
        self.capabilities = structs.replace(self.capabilities, server=server)
        try:
            await self._run(PERMIT, [f"{self._base}:?"], [])
        except ReadOnly as error:
            self._denied = str(error)
        except KvError:  # what else keeps it from writing now is told by the commit that it keeps
            return

    async def _ask(self, *command: str) -> Any:
        try:
            return await self._connections.call(*command)
        except RedisError as error:
            raise of_client(error, self._where) from error
        except UnicodeEncodeError as error:
            raise BadKey(error.object, "no UTF-8 text: it holds a lone surrogate") from error

    async def _run(self, script: Script, keys: list[str], args: list[str | bytes | int]) -> Any:
        try:
            return await self._connections.run(script, keys, args)
        except RedisError as error:
            raise of_client(error, self._where) from error
        except UnicodeEncodeError as error:
            raise BadKey(error.object, "no UTF-8 text: it holds a lone surrogate") from error

    def _names(self, space: str) -> Names:
        return names_of(self._base, space)

    def _failure(self, batch: Batch, position: int, found: bytes) -> KvError:
        if position >= 0:
            op = batch.ops[position]
            return Conflict(op.key, op.expect, found or ABSENT, position)
        text = found.decode("utf-8", "replace")
        if position == -1:
            return of_reply(text, self._where)
        return CommitUnknown(tuple(op.key for op in batch.ops if not isinstance(op, Check)), f"{self._where}: {text}")


def _client(options: RedisOptions) -> Redis:
    scheme, separator, rest = options.url.partition("://")
    url = ("redis" if scheme == "valkey" else scheme) + separator + rest
    try:
        parts = urlsplit(url)
        if "," in parts.netloc:
            raise Unsupported("a list of servers, as of Redis Cluster or Sentinel,", "name a single server")
        if scheme != "unix" and not (parts.path.strip("/") or "0").isdigit():
            raise BadOption("url", "behind the server stands the number of a database, such as redis://host:6379/0")
        alive = {} if scheme == "unix" else {"socket_keepalive": True}
        return cast(Any, Redis).from_url(  # whose types are not whole
            url,
            protocol=2,
            max_connections=options.pool_max,
            retry=Retry(NoBackoff(), 0),  # a second attempt at a write is the store's to decide
            socket_timeout=None,  # kv.timeout is counted for the whole call
            socket_connect_timeout=_CONNECT_SECONDS,
            socket_read_size=1 << 16,
            **alive,
        )
    except ValueError as error:
        if isinstance(error, KvError):
            raise
        raise BadOption("url", str(error)) from error


def _place(client: Redis) -> str:
    """The server's address for people, without user and password."""
    given = client.connection_pool.connection_kwargs
    return f"redis at {given.get('path') or '{}:{}'.format(given.get('host', 'localhost'), given.get('port', 6379))}"


def _only_namespace(start: str | None, end: str | None) -> str | None:
    """The one namespace in which every key of ``[start, end)`` is, None if that cannot be said."""
    if start is None or end is None:
        return None
    space = grammar.partition(start)
    return space if end == start + "\0" or (":" in start and end <= space + ";") else None


def _bounds(space: str, start: str | None, end: str | None) -> tuple[str, str] | None:
    """``[start, end)`` as Redis wants it for the members of a namespace's index; None if nothing is in it."""
    if not space:
        return ("-" if start is None else "[" + start), ("+" if end is None else "(" + end)
    first, after = space + ":", space + ";"
    if (start is not None and start >= after) or (end is not None and end <= first):
        return None
    low = "-" if start is None or start <= first else "[" + start[len(space) :]
    high = "+" if end is None or end >= after else "(" + end[len(space) :]
    return low, high


def _entries(space: str, page: list[bytes], deref: str | None) -> list[Entry]:
    """The entries of a page: member, what is stored, and with ``deref`` what is stored at the target."""
    if deref is None:
        items = iter(page)
        return [unpacked_entry(space + member.decode(), stored) for member, stored in zip(items, items, strict=True)]
    entries: list[Entry] = []
    for at in range(0, len(page), 3):
        member, stored, target = page[at : at + 3]
        entry = unpacked_entry(space + member.decode(), stored)
        found = None if target is None else unpacked_entry(deref + entry.value.decode(), target)  # pyright: ignore[reportUnnecessaryComparison]
        entries.append(Entry(entry.key, entry.value, entry.version, entry.expires_at, found))
    return entries


def _closed() -> StoreClosed:
    return StoreClosed("the store was closed: open it again")
