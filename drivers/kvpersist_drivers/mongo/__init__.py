"""A MongoDB server or cluster, or what speaks its protocol. Needs ``kvpersist[mongo]``.

An entry is a document ``{_id: key, v: value, r: version, e: expiry}`` of one collection. What must hold
holds by replacing and deleting single documents on a condition: no transactions, no change streams.

``get`` is one ``find``, ``scan`` one and another answer for each thousand entries. ``commit`` is at most
one command of each kind (insert, update, delete) for the first operations of all its batches, and so
on for the next: a drain of one-key puts is one command.

Tested on FerretDB 1.24, not on MongoDB. FerretDB 1.x does not keep conditional writes by itself; there
commits take turns, see `kvpersist_drivers.mongo._turns`. The client's clock judges expiry. A cancelled
commit may still happen.
"""

from __future__ import annotations

import asyncio
import time
import warnings
from collections.abc import Coroutine, Sequence
from typing import Annotated, Any, ClassVar, Final, Self, TypeVar
from urllib.parse import parse_qsl, unquote

from msgspec import Meta, Struct, structs

from kvpersist.driver import Batch, Capabilities, Clock, Committed, Entry, milliseconds, needs_extra
from kvpersist.errors import BadOption, CommitUnknown, KvError, StoreClosed, Unsupported
from kvpersist.pooling import PoolOptions
from kvpersist.urls import UrlParts, redact

with needs_extra("mongo", module="pymongo"):
    from pymongo import AsyncMongoClient, MongoClient
    from pymongo.errors import PyMongoError

    from kvpersist_drivers.mongo._commit import Commit
    from kvpersist_drivers.mongo._entries import MAX_KEY_BYTES, MAX_VALUE_BYTES, Entries, moment
    from kvpersist_drivers.mongo._errors import Translator
    from kvpersist_drivers.mongo._turns import Turns

__all__ = ["MongoDriver", "MongoOptions"]

_CLOSE_SECONDS: Final = 2.0  # that calls under way have when the driver is closed
_FERRETDB_AT_ONCE: Final = 64
"""Each replacement holds one of its 100 SQLite connections, and it stops for ever when all are held. Of inserts in
order it ends the hundred in which one fails, and goes on with the next hundred."""
_GRACE: Final = 1.0  # seconds that a call has to end whose caller was cancelled
_TLS: Final[dict[str, dict[str, Any]]] = {
    "false": {"tls": False},
    "disable": {"tls": False},
    "require": {"tls": True, "tlsAllowInvalidCertificates": True},
    "verify-ca": {"tls": True, "tlsAllowInvalidHostnames": True},
    "true": {"tls": True},
    "verify-full": {"tls": True},
}

_Answer = TypeVar("_Answer")


class MongoOptions(PoolOptions, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where the server is: by ``url``, by ``host``, or a ready ``client``.

    Attributes:
        url: ``mongodb://`` or ``mongodb+srv://``; parameters that are not kvpersist's are PyMongo's,
            and win over the options of the pool.
        host, port, username, password: the same without a URL.
        database, collection: where the entries are; the database is also the path of the URL.
        client: a ``pymongo.AsyncMongoClient``, which stays the caller's and is not closed.
    """

    url: str = ""
    host: str = ""
    port: int = 27017
    username: str = ""
    password: str = ""
    database: Annotated[str, Meta(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_-]{0,62}\Z")] = "kvpersist"
    collection: Annotated[str, Meta(pattern=r"^[A-Za-z_][A-Za-z0-9_]{0,62}\Z")] = "storage"
    client: Any = None

    @classmethod
    def from_url(cls, parts: UrlParts) -> dict[str, Any]:
        return {"url": parts.url, **({"database": parts.path} if parts.path else {})}

    def __repr__(self) -> str:
        place = redact(self.url) or self.host or "a client"
        return f"MongoOptions({place!r}, database={self.database!r}, collection={self.collection!r})"


class MongoDriver:
    """One collection. Made by `open`, or by `over` on a client that stays the caller's."""

    api: ClassVar[int] = 1
    Options: ClassVar[type[Struct]] = MongoOptions

    def __init__(self, client: Any, *, database: str = "kvpersist", collection: str = "storage") -> None:
        """Does not connect; `open` and `over` are what a user calls."""
        self.capabilities = Capabilities(
            conditional=True,
            conditional_delete=True,
            ordered=True,
            reverse=True,
            coalesce="both",
            shared=True,
            max_key_bytes=MAX_KEY_BYTES,
            max_value_bytes=MAX_VALUE_BYTES,
            server="MongoDB",
        )
        self.clock: Clock = time.time
        self._client = client
        self._owns_client = False
        self._errors = Translator(client)
        self._database = client.get_database(database)
        self._entries = Entries(self._database, collection, self._errors)
        self._turns: Turns | None = None  # where the server does not keep conditional writes
        self._under_way: set[asyncio.Future[Any]] = set()
        self._closed = False

    @classmethod
    async def open(cls, options: MongoOptions, /) -> Self:
        """Connect to the server that ``options`` name.

        Raises:
            BadOption: the URL is wrong, or the server refuses the user or password.
            Unavailable: the server cannot be reached.
        """
        if options.client is not None:
            if options.url or options.host:
                raise BadOption("client", "a ready client knows its server: leave url and host out")
            return await cls.over(options.client, database=options.database, collection=options.collection)
        client = _client(options)
        try:
            driver = await cls.over(client, database=options.database, collection=options.collection)
        except BaseException:  # cancelled too: nothing may stay open
            await client.close()
            raise
        driver._owns_client = True
        return driver

    @classmethod
    async def over(cls, client: Any, *, database: str = "kvpersist", collection: str = "storage") -> Self:
        """Use a ``pymongo.AsyncMongoClient``, which is not closed by `close`."""
        if isinstance(client, MongoClient):
            raise BadOption("client", "it is pymongo's MongoClient, which blocks: make an AsyncMongoClient")
        driver = cls(client, database=database, collection=collection)
        await driver._probe()
        return driver

    async def get(self, keys: Sequence[str]) -> list[Entry | None]:
        self._check()
        if not keys:
            return []
        found = await self._call(self._entries.find(list(dict.fromkeys(keys)), moment(milliseconds(self.clock()))))
        return [found.get(key) for key in keys]

    async def commit(self, batches: Sequence[Batch]) -> list[Committed | KvError]:
        self._check()
        if self._turns is None:
            return await self._call(Commit(self._entries, batches, self.clock(), None).run(), writes=True)
        if not any(batch.ops for batch in batches):
            return [Committed(batch.version) for batch in batches]
        return await self._call(self._commit_in_turn(batches, self._turns), writes=True, ends=True)

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
        self._check()
        if deref is not None:
            raise Unsupported("a scan that follows index entries", "use deref_by_get")
        if limit <= 0 or (start is not None and end is not None and start >= end):
            return []
        now = moment(milliseconds(self.clock()))
        return await self._call(self._entries.scan(start, end, now, limit, reverse, keys_only))

    async def compact(self, limit: int = 500) -> int:
        """Remove at most ``limit`` expired entries."""
        self._check()
        return await self._call(self._compact(limit), ends=self._turns is not None) if limit > 0 else 0

    async def ping(self) -> None:
        self._check()
        with self._errors.reading():
            await self._call(self._client.admin.command("ping"))

    async def close(self) -> None:
        """Calls under way have two seconds to end, and fail then."""
        self._closed = True
        if self._under_way:
            _, late = await asyncio.wait(self._under_way, timeout=_CLOSE_SECONDS)
            for call in late:
                call.cancel()
            if late:
                await asyncio.wait(late)
        if self._owns_client:
            await self._client.close()

    async def _probe(self) -> None:
        """Learn what the server is, and what it keeps."""
        with self._errors.reading():
            told: dict[str, Any] = await self._client.admin.command("buildInfo")
        server = f"MongoDB {told.get('version', '')}".strip()
        if "ferretdbVersion" in told:  # 1.x; later ones say it otherwise
            server = f"FerretDB {told['ferretdbVersion']} for {server}"
            self._turns = Turns(self._database.get_collection("kvpersist_turn"), self._errors)
            await self._turns.prepare()
            self._entries.finds_one_only = True
            self._entries.at_once = _FERRETDB_AT_ONCE
        native = await self._entries.expire_by_index()
        self.capabilities = structs.replace(self.capabilities, server=server, ttl="native" if native else "swept")

    async def _commit_in_turn(self, batches: Sequence[Batch], turns: Turns) -> list[Committed | KvError]:
        async with turns:
            return await turns.within(Commit(self._entries, batches, self.clock(), turns).run())

    async def _compact(self, limit: int) -> int:
        now = moment(milliseconds(self.clock()))
        if self._turns is None:
            return await self._entries.delete_expired(now, limit)
        async with self._turns as turns:
            return await turns.within(self._entries.delete_expired(now, limit))

    async def _call(self, work: Coroutine[Any, Any, _Answer], *, writes: bool = False, ends: bool = False) -> _Answer:
        """Do ``work`` in a task of its own, which `close` can end.

        A cancelled caller leaves at once, and the work is cancelled a little later: PyMongo forgets to
        close a socket where it is cancelled while connecting, and has to drop the connection where it
        is cancelled while waiting for an answer. Work that ``ends`` by itself is left alone.
        """
        call = asyncio.ensure_future(work)
        self._under_way.add(call)
        call.add_done_callback(self._ended)
        try:
            return await asyncio.shield(call)
        except asyncio.CancelledError:
            me = asyncio.current_task()
            if self._closed and call.cancelled() and not (me is not None and me.cancelling()):
                if writes:
                    raise CommitUnknown((), "the store was closed") from None
                raise StoreClosed("the store was closed: open it again") from None
            if not (ends or call.done()):
                later = asyncio.get_running_loop().call_later(_GRACE, call.cancel)
                call.add_done_callback(lambda _: later.cancel())
            raise

    def _ended(self, call: asyncio.Future[Any]) -> None:
        self._under_way.discard(call)
        if not call.cancelled():
            call.exception()  # where nobody waits for it any more, nobody is to be told

    def _check(self) -> None:
        if self._closed:
            raise StoreClosed("the store was closed: open it again")


def _client(options: MongoOptions) -> AsyncMongoClient[dict[str, Any]]:
    """Make a client whose pool is as the options say, unless the URL says otherwise."""
    if bool(options.url) == bool(options.host):
        raise BadOption("url", "name the server: by a URL such as mongodb://localhost/kvpersist, by host, or a client")
    wanted: dict[str, Any] = {
        "maxPoolSize": options.pool_max,
        "maxIdleTimeMS": round(options.pool_idle * 1000),
        "connectTimeoutMS": round(options.connect_timeout * 1000),
        "serverSelectionTimeoutMS": round(options.connect_timeout * 1000),
        "waitQueueTimeoutMS": round(options.connect_timeout * 1000),
        "appname": "kvpersist",
    }
    if options.ssl is not None:
        mode = _TLS.get(str(options.ssl).lower())
        if mode is None:
            raise BadOption(
                "ssl", "PyMongo takes true, false, require, verify-ca or verify-full; name certificates by tlsCAFile="
            )
        wanted |= mode
    if options.username:
        wanted |= {"username": options.username, "password": options.password}
    given = {name.lower() for name, _ in parse_qsl(options.url.partition("?")[2], keep_blank_values=True)}
    wanted = {name: value for name, value in wanted.items() if name.lower() not in given}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # that is how PyMongo tells of options it does not know
            return AsyncMongoClient(options.url or f"{options.host}:{options.port}", **wanted)
    except (PyMongoError, ValueError, TypeError, Warning) as error:
        secret = unquote(options.url.partition("://")[2].rpartition("@")[0].partition(":")[2]) or options.password
        reason = str(error).replace(secret, "***") if secret else str(error)
        raise BadOption("url", reason) from None
