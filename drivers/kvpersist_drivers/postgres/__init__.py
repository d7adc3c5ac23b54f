r"""A PostgreSQL server, 12 or later, by asyncpg. Needs ``kvpersist[postgres]``.

A store is one table: key, value, version, expiry. Its keys are compared byte by byte (``COLLATE "C"``);
NUL, which a text of PostgreSQL cannot hold, is stored as ``\x01\x01`` and ``\x01`` as ``\x01\x02``.
No function, type or extension is made.

``get`` and ``scan`` are one statement, targets of index entries included. ``commit`` is one statement where
there are only puts without conditions of their own, only puts of absent keys, or only batches of one put under
a known version, and checks of other keys that hold; otherwise it is one statement executed several times in
one transaction: first for its locks, then once for every group of batches that may see the same state. Both
are one round trip, and one after the other where such a condition does not hold, or a key occurs twice. Every
writer takes advisory locks of the transaction on the keys it writes, and shared ones on those it only checks,
in the order of their numbers: so nobody changes what conditions were judged by before the commit, and writers
cannot deadlock each other. A call about more than 128 keys locks the table's writers out as a whole while it
runs.

The client's clock judges expiry. A cancelled commit is cancelled on the server too if it still can be;
it may have happened. What was acknowledged is as durable as ``synchronous_commit`` and ``fsync`` say.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import suppress
from typing import Any, ClassVar, Final, Self, TypeAlias, cast
from urllib.parse import urlsplit

from msgspec import structs

from kvpersist.driver import ABSENT, Batch, Capabilities, Clock, Committed, Entry, needs_extra
from kvpersist.errors import (
    BadOption,
    Conflict,
    FormatMismatch,
    KvError,
    StoreClosed,
    Unsupported,
)
from kvpersist.pooling import PoolOptions, ssl_context
from kvpersist.urls import UrlParts, redact

with needs_extra("postgres", module="asyncpg"):
    import asyncpg

    from kvpersist_drivers.postgres._connections import Connection, Connections, Row, Source
    from kvpersist_drivers.postgres._errors import AGAIN, code_of, is_of_one_batch, of_server
    from kvpersist_drivers.postgres._plan import MAX_BATCH_BYTES, MAX_VALUE_BYTES, Plan
    from kvpersist_drivers.postgres._statements import (
        COLUMNS,
        MAX_KEY_BYTES,
        SEPARATOR,
        Statements,
        all_escaped,
        escaped,
        unescaped,
    )
    from kvpersist_drivers.postgres._watch import Listener

__all__ = ["PostgresDriver", "PostgresOptions"]

_Answer: TypeAlias = Committed | KvError

_OLDEST: Final = 120000  # the first with MATERIALIZED
_ATTEMPTS: Final = 4  # of a statement that the server rolled back for another's sake
_PAUSE: Final = 0.01  # seconds before the second of them; it doubles
_PROVISIONING: Final = 0x6B7670  # the advisory lock of those who make tables
_SESSION: Final = {
    "application_name": "kvpersist",
    "default_transaction_isolation": "read committed",
    # plans are made once, and one made while the table is small must not read the whole table when it is large
    "plan_cache_mode": "force_generic_plan",
    "enable_bitmapscan": "off",
    "enable_seqscan": "off",
    "enable_hashjoin": "off",
    "enable_mergejoin": "off",
    "jit": "off",
}


class PostgresOptions(PoolOptions, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where the server is, by one of ``url``, ``host`` and ``client``, and what the store is called in it.

    Attributes:
        url: ``postgresql://`` or ``postgres://``; parameters that are not kvpersist's are those of asyncpg,
            such as ``sslmode``, or settings of the session.
        host, port, username, password, database: the same without a URL; ``host`` may be the folder of a socket.
        client: a ready ``asyncpg.Pool``, which stays the caller's.
        table: the table's name; letters, digits and ``_``. ``schema``: where it is, if not in the first
            schema of the search path.
        auto_create: make the table when it is missing.
        pgbouncer: behind PgBouncer in transaction mode: nothing is kept in a session, so statements are
            not prepared beforehand, and nothing can be watched.
        notify: commits tell those who watch the store; costs a little, and commits of different
            processes wait for each other at their ends.
    """

    url: str = ""
    host: str = ""
    port: int = 5432
    username: str = ""
    password: str = ""
    database: str = ""
    client: Any = None
    table: str = "kvpersist"
    schema: str | None = None
    auto_create: bool = True
    pgbouncer: bool = False
    notify: bool = True

    @classmethod
    def from_url(cls, parts: UrlParts) -> dict[str, Any]:
        return {"url": parts.url}

    def __repr__(self) -> str:
        return f"PostgresOptions({self.where!r}, table={self.table!r}, pool_max={self.pool_max})"

    @property
    def where(self) -> str:
        """The server and database for people, without the password."""
        if self.client is not None:
            return "postgresql, by a ready pool"
        if self.url:
            return redact(self.url).partition("?")[0]
        return f"postgresql://{self.host}:{self.port}/{self.database}"


class PostgresDriver:
    """One table of a database. ``clock`` judges expiry.

    ``watch(prefix)``, which is not there behind PgBouncer, yields the changed keys; one connection
    besides the pool's listens for all watches. Only commits of drivers with ``notify`` are seen, and no
    expiry. A commit of more keys than a notification can name, and a lost connection, yield the empty tuple.
    """

    watch: Callable[[str], AsyncGenerator[tuple[str, ...]]]

    api: ClassVar[int] = 1
    Options: ClassVar[type[PostgresOptions]] = PostgresOptions

    def __init__(self, options: PostgresOptions) -> None:
        """Does not connect; `open` and `over` are what a user calls."""
        self.capabilities = Capabilities(
            atomic_batch="all",
            conditional=True,
            conditional_delete=True,
            ordered=True,
            reverse=True,
            deref=True,
            coalesce="both",
            overlap="both",
            shared=True,
            max_key_bytes=MAX_KEY_BYTES,
            max_value_bytes=MAX_VALUE_BYTES,
            server="PostgreSQL",
        )
        self.clock: Clock = time.time
        self._options = options
        self._sql = Statements(options.table, options.schema)
        self._where = options.where
        self._source = Source(options.where, options.connect_timeout, _connector(options), options.client)
        self._connections = Connections(self._source, options.pool_max, options.pool_idle)
        self._table = 0  # the table's number, which its locks and its channel have
        self._channel: str | None = None  # None: nobody is notified
        self._listener: Listener | None = None
        self._closed = False

    @classmethod
    async def open(cls, options: PostgresOptions, /) -> Self:
        """Connect, and find the table or make it.

        Raises:
            BadOption: an option has no meaning, or the server refuses the user, password or database.
            FormatMismatch: there is no table and none may be made, or one of another shape.
            Unavailable: the server cannot be reached. TooManyClients: it is full.
            Unsupported: it is too old, or the database has another encoding than UTF-8.
        """
        if sum((bool(options.url), bool(options.host), options.client is not None)) != 1:
            raise BadOption("url", "say where the server is by one of url, host and client")
        if options.client is not None and not isinstance(options.client, asyncpg.Pool):
            raise BadOption("client", f"an asyncpg.Pool is meant, not {type(options.client).__name__}")
        driver = cls(options)
        try:
            await driver._begin()
        except BaseException:  # cancelled too: nothing may stay open
            await driver.close()
            raise
        return driver

    @classmethod
    async def over(cls, client: asyncpg.Pool, **options: Any) -> Self:
        """Use a pool of asyncpg, which stays the caller's.

        At most ``pool_max`` of its connections are borrowed, and given back after ``pool_idle`` seconds
        without use or by `close`; a watch borrows one more. They keep the settings the pool gave them.
        """
        return await cls.open(PostgresOptions(client=client, **options))

    async def get(self, keys: Sequence[str]) -> list[Entry | None]:
        if self._closed:
            raise _closed()
        if not keys:
            return []
        stored = all_escaped(keys)
        rows = await self._read(self._sql.get, SEPARATOR.join(stored), self.clock())
        found = {name: Entry(unescaped(name), *rest) for name, *rest in rows}
        return [found.get(name) for name in stored]

    async def commit(self, batches: Sequence[Batch]) -> list[_Answer]:
        if self._closed:
            raise _closed()
        now = self.clock()
        answers: list[_Answer] = []
        plans = [Plan(now)]
        for place, batch in enumerate(batches):
            if plans[-1].size > MAX_BATCH_BYTES:
                plans.append(Plan(now))
            answers.append(plans[-1].add(place, batch) or Committed(batch.version))
        for plan in plans:
            if not plan.places:
                continue
            if len(plans) == 1:
                await self._apply(plan, now, batches, answers)
            else:
                await self._apply_apart(plan, now, batches, answers)
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
        form = "keys" if keys_only else "scan" if deref is None else "deref"
        text = self._sql.scan(form, start=start is not None, end=end is not None, reverse=reverse)
        bounds = [escaped(bound) for bound in (start, end) if bound is not None]
        target = [] if deref is None else [escaped(deref)]
        try:
            rows = await self._connections.call(text, self.clock(), limit, *target, *bounds)
        except asyncpg.PostgresError as error:
            if deref is None or not isinstance(error, asyncpg.DataError):
                raise of_server(error, self._where) from error
            # a value of no text, or of one with NUL: PostgreSQL cannot join it
            entries = await self.scan(start, end, limit=limit, reverse=reverse)
            targets = await self.get([deref + entry.value.decode("utf-8", "replace") for entry in entries])
            return [structs.replace(entry, target=found) for entry, found in zip(entries, targets, strict=True)]
        if keys_only:
            return [Entry(unescaped(key), b"", version, expires) for key, version, expires in rows]
        if deref is None:
            return [Entry(unescaped(key), value, version, expires) for key, value, version, expires in rows]
        return [_with_target(row) for row in rows]

    async def ping(self) -> None:
        await self._read("SELECT 1")

    async def size(self) -> int:
        """Bytes of the table and its indexes, rows that are dead and not yet vacuumed included."""
        [row] = await self._read("SELECT pg_total_relation_size($1::text::regclass)", self._sql.table)
        return row[0]

    async def compact(self, limit: int = 500) -> int:
        """Remove at most ``limit`` expired entries that no other process is about to change."""
        rows = await self._read(self._sql.compact, self.clock(), limit, writes=True)
        return len(rows)

    @classmethod
    def ddl_of(cls, options: PostgresOptions, /) -> str:
        """The statements that make what the store of ``options`` needs. Does not connect."""
        sql = Statements(options.table, options.schema)
        return (f"CREATE SCHEMA IF NOT EXISTS {sql.schema};\n" if sql.schema else "") + sql.provision + "\n"

    def ddl(self) -> str:
        return self.ddl_of(self._options)

    async def provision(self) -> None:
        """Make the table, and its schema; where there is a table, see whether it is one of ours."""
        await self._begin(create=True)

    async def close(self) -> None:
        self._closed = True
        if self._listener is not None:
            await self._listener.close()
        await self._connections.close()

    async def _begin(self, create: bool | None = None) -> None:
        """Learn what the server is, and find the table or make it."""
        [[version, number, encoding, durable, isolation, oid]] = await self._read(self._sql.server, self._sql.table)
        if number < _OLDEST:
            raise Unsupported(f"PostgreSQL {version} ({self._where})", "it needs 12 or later")
        if encoding != "UTF8":
            raise Unsupported(f"a database in {encoding} ({self._where})", "CREATE DATABASE ... ENCODING 'UTF8'")
        if isolation != "read committed":
            hint = "ALTER ROLE ... SET default_transaction_isolation = 'read committed'"
            raise Unsupported(f"default_transaction_isolation={isolation} ({self._where})", hint)
        if oid is None:
            if not (self._options.auto_create if create is None else create):
                raise self._missing("nothing")
            await self._create()
            [[*_, oid]] = await self._read(self._sql.server, self._sql.table)
        [[columns]] = await self._read(self._sql.columns, oid)
        if columns != COLUMNS:
            raise FormatMismatch(f"{self._where}, table {self._sql.table}", f"({columns})", f"({COLUMNS})")
        self._table = oid - (1 << 32) if oid >= 1 << 31 else oid
        self._channel = f"kvpersist:{oid}" if self._options.notify else None
        listens = not self._options.pgbouncer
        if listens and self._listener is None:
            self._listener = Listener(self._source, f"kvpersist:{oid}")
            self.watch = self._listener.watch
        self.capabilities = structs.replace(
            self.capabilities, durable=durable, watch="push" if listens else None, server=f"PostgreSQL {version}"
        )

    async def _create(self) -> None:
        """Make the schema and the table, one process at a time."""
        schema = self._sql.schema
        steps = [f"SELECT pg_advisory_xact_lock({_PROVISIONING})"]
        [[known]] = await self._read("SELECT to_regnamespace($1)::text", schema or "public")
        if schema is not None and known is None:
            steps.append(f"CREATE SCHEMA IF NOT EXISTS {schema}")
        try:
            await self._connections.script(";\n".join([*steps, self._sql.provision]))
        except asyncpg.PostgresError as error:
            if code_of(error) in ("42501", "25006", "3F000"):
                raise self._missing(f"nothing, and may not make it ({error})") from error
            raise of_server(error, self._where) from error

    def _missing(self, found: str) -> FormatMismatch:
        where = self._where
        schema = f"&kv.schema={self._options.schema}" if self._options.schema else ""
        url = f"{where}{'&' if '?' in where else '?'}kv.table={self._options.table}{schema}"
        made = f"which `kvpersist init '{url}'` makes and `kvpersist ddl '{url}'` prints"
        return FormatMismatch(where, found, f"the table {self._sql.table}, {made}")

    async def _read(self, query: str, *args: Any, writes: bool = False) -> list[Row]:
        try:
            return await self._connections.call(query, *args, writes=writes)
        except asyncpg.PostgresError as error:
            raise of_server(error, self._where, writes=writes) from error

    async def _apply(self, plan: Plan, now: float, batches: Sequence[Batch], answers: list[_Answer]) -> None:
        """Commit a plan and put the outcomes of its failed batches into ``answers``."""
        direct = plan.direct(self._table, self._channel)
        try:
            rows = await self._again(lambda: self._send(plan, direct))
        except asyncpg.PostgresError as error:
            if len(plan.places) == 1 or not is_of_one_batch(error):
                raise of_server(error, self._where, writes=True) from error
            for place in plan.places:  # each by itself, so that only those fail which have to
                alone = Plan(now)
                alone.add(place, batches[place])
                await self._apply_apart(alone, now, batches, answers)
            return
        if direct is not None and direct[0] == "swap":
            await self._apply_unswapped(plan, rows, now, batches, answers)
            return
        for number, key, found in rows:
            for place in plan.places_of(number):
                _note(answers, place, batches[place], key, found)

    async def _apply_unswapped(
        self, plan: Plan, rows: list[Row], now: float, batches: Sequence[Batch], answers: list[_Answer]
    ) -> None:
        """Put what ``swap`` answered into ``answers``, and commit what it said nothing of."""
        told: dict[str, bytes | None] = {row[0]: row[1] for row in rows}
        left = Plan(now, swaps=False)
        for place, key in plan.swapping():
            if key not in told:
                left.add(place, batches[place])
            elif (found := told[key]) is not None:
                _note(answers, place, batches[place], key, found)
        if left.places:
            await self._apply_apart(left, now, batches, answers)

    async def _apply_apart(self, plan: Plan, now: float, batches: Sequence[Batch], answers: list[_Answer]) -> None:
        """As `_apply`; an error is the outcome of this plan's batches, and of no others."""
        try:
            await self._apply(plan, now, batches, answers)
        except KvError as error:
            for place in plan.places:
                answers[place] = error

    async def _send(self, plan: Plan, direct: tuple[str, tuple[Any, ...]] | None) -> list[Row]:
        """Send a plan; return what ``swap`` answers, or the conditions that do not hold."""
        if direct is not None:
            name, args = direct
            with suppress(asyncpg.UniqueViolationError):  # somebody inserted the same key a moment ago
                rows = await self._connections.call(self._sql.direct[name], *args, writes=True)
                if name == "swap" or not rows:
                    return rows
        waves = plan.apply_arguments(self._table, self._channel)
        return await self._connections.call_many(self._sql.apply, waves, writes=True)

    async def _again(self, work: Callable[[], Awaitable[list[Row]]]) -> list[Row]:
        """Do ``work``; again where the server rolled it back in favour of another transaction."""
        attempt = 0
        while True:
            try:
                return await work()
            except asyncpg.PostgresError as error:
                attempt += 1
                if code_of(error) not in AGAIN or attempt == _ATTEMPTS:
                    raise
            await asyncio.sleep(random.uniform(0, _PAUSE * 2**attempt))


def _note(answers: list[_Answer], place: int, batch: Batch, key: str, found: bytes | None) -> None:
    """Note a conflict at ``key``, as stored, unless one of an earlier operation is known."""
    position = next(at for at, op in enumerate(batch.ops) if escaped(op.key) == key)
    before = answers[place]
    if not isinstance(before, Conflict) or position < before.position:
        op = batch.ops[position]
        answers[place] = Conflict(op.key, op.expect, ABSENT if found is None else found, position)


def _connector(options: PostgresOptions) -> Any:
    """What makes a connection of our own."""
    given: dict[str, Any] = {"timeout": options.connect_timeout}
    if options.url:
        given["dsn"] = options.url
    else:
        given |= {"host": options.host, "port": options.port}
        given |= {"user": options.username or None, "password": options.password or None}
        given["database"] = options.database or None
    if options.ssl is not None:
        given["ssl"] = ssl_context(options.ssl) or False
    if options.pgbouncer:
        given |= {"statement_cache_size": 0, "server_settings": {"application_name": "kvpersist"}}
    else:
        in_url = {pair.partition("=")[0] for pair in urlsplit(options.url).query.split("&")}
        given["server_settings"] = {name: value for name, value in _SESSION.items() if name not in in_url}

    async def connect() -> Connection:
        return await cast("Any", asyncpg).connect(**given)

    return connect


def _with_target(row: Row) -> Entry:
    key, value, version, expires, target, *rest = row
    found = None if target is None else Entry(unescaped(target), *rest)
    return Entry(unescaped(key), value, version, expires, found)


def _closed() -> StoreClosed:
    return StoreClosed("the store was closed: open it again")
