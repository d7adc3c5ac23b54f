"""MariaDB 10.11 (tested) and MySQL 8 (not tested). Needs ``kvpersist[mysql]``.

An entry is a row of one InnoDB table: the key as bytes, which InnoDB orders as bytes, its version, its
expiry and its value. ``get`` and ``scan`` are one SELECT per thousand keys or entries. ``commit`` is one
call however many batches it has: one INSERT where all is puts without conditions of their own, which
looks itself at the few other keys that they check; else one transaction whose statements are sent
together. They hold the rows, compare them with what the batches expect and end in COMMIT. Where something
else is there, they stop before writing; the versions found have arrived by then, and another call writes
the batches that may be, and commits.

The client's clock judges expiry. A cancelled commit may still be executed by the server.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, ClassVar, Final, Self

from msgspec import Struct, structs

from kvpersist.driver import ABSENT, Batch, Capabilities, Check, Clock, Committed, Entry, Expect, needs_extra
from kvpersist.errors import BadKey, CommitUnknown, FormatMismatch, KvError, StoreClosed

with needs_extra("mysql", module="asyncmy"):
    from asyncmy.errors import Error
    from asyncmy.pool import Pool

    from kvpersist_drivers.mysql._connections import Answer, Connections, Link, Source
    from kvpersist_drivers.mysql._errors import AGAIN, NOT_AS_EXPECTED, code_of, of_server
    from kvpersist_drivers.mysql._options import MysqlOptions, place_of, pool_source
    from kvpersist_drivers.mysql._plan import Verdict, expectations, judge, locks, refusal
    from kvpersist_drivers.mysql._statements import (
        BESIDE_A_VALUE,
        COLUMNS,
        DUMMY,
        MAX_KEY_BYTES,
        PAGE,
        Statements,
        packets,
    )

__all__ = ["MysqlDriver", "MysqlOptions"]

_ATTEMPTS: Final = 8  # at a commit that met a deadlock, or waited 1 s for a lock
_PAUSE_SECONDS: Final = 0.01  # at most; doubled each time, four times over
_MOST: Final = 16 << 20  # bytes of a value, however large the server's packets may be
_LOOKED_AT: Final = 8  # keys at most that an INSERT looks at by itself, each with a subquery
_SWEEP: Final = 500  # entries that one statement removes


class MysqlDriver:
    """One table. Made by `open`, or by `over` on a pool of asyncmy that stays the caller's."""

    api: ClassVar[int] = 1
    Options: ClassVar[type[Struct]] = MysqlOptions

    def __init__(self, connections: Connections, options: MysqlOptions) -> None:
        """Does not connect; `open` and `over` are what a user calls."""
        self.capabilities = Capabilities(
            atomic_batch="all",
            conditional=True,
            conditional_delete=True,
            ordered=True,
            reverse=True,
            deref=True,
            coalesce="both",
            overlap="writes",
            ttl="swept",
            shared=True,
            max_key_bytes=MAX_KEY_BYTES,
            server="MariaDB or MySQL",
        )
        self.clock: Clock = time.time
        self._connections = connections
        self._where = connections.where
        self._options = options
        self._sql = Statements(options.table)
        self._packet = 1 << 20  # bytes of one call; probed

    @classmethod
    async def open(cls, options: MysqlOptions, /) -> Self:
        """Connect, and make the table where it is missing and ``auto_create`` allows it.

        Raises:
            BadOption: an option is wrong, or the server refuses the user, password or database.
            Unavailable, TooManyClients: there is no connection to be had.
            FormatMismatch: the table is missing, or is not one of kvpersist's. ReadOnly: it cannot be made.
        """
        if options.client is None:
            place = place_of(options)
            source, where, shown = Source(place.connect), place.where, place.shown
            limit = options.pool_max
        else:
            source = pool_source(options)
            where = shown = "mysql, through a ready pool"
            limit = min(options.pool_max, options.client.maxsize)
        connections = Connections(source, where, limit=limit, idle=options.pool_idle, patience=options.connect_timeout)
        driver = cls(connections, options)
        try:
            await driver._probe(shown)
        except BaseException:  # cancelled too: nothing may stay open
            await driver.close()
            raise
        return driver

    @classmethod
    async def over(cls, client: Pool, **options: Any) -> Self:
        """Use connections of ``client``, a pool of asyncmy; it is not closed by `close`.

        They are taken when needed, set up for kvpersist, and given back closed: nobody else meets their
        settings. ``options`` are those of `MysqlOptions` that say nothing about the server.
        """
        return await cls.open(MysqlOptions(client=client, **options))

    @classmethod
    def ddl_of(cls, options: MysqlOptions, /) -> str:
        """The statement that makes what the store of ``options`` needs. Does not connect."""
        return Statements(options.table).create

    def ddl(self) -> str:
        return self.ddl_of(self._options)

    async def provision(self) -> None:
        """Make the table; where there is one, do nothing."""
        await self._ask(self._sql.create)

    async def get(self, keys: Sequence[str]) -> list[Entry | None]:
        self._check_open()
        with _keys():
            statements = self._sql.get(keys)
        now_ms = self._now()
        found: dict[str, Entry] = {}
        for sql in statements:
            [answer] = await self._ask(sql)
            for row in answer.rows:
                if not row[2] or row[2] > now_ms:
                    entry = _entry(row)
                    found[entry.key] = entry
        return [found.get(key) for key in keys]

    async def commit(self, batches: Sequence[Batch]) -> list[Committed | KvError]:
        self._check_open()
        limit = self.capabilities.max_value_bytes or _MOST
        refused = [refusal(batch, limit) for batch in batches]
        kept = [batch for batch, error in zip(batches, refused, strict=True) if error is None and batch.ops]
        done = iter(await self._committed(kept) if kept else ())
        return [
            error or (next(done) if batch.ops else Committed(batch.version))
            for batch, error in zip(batches, refused, strict=True)
        ]

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
        self._check_open()
        now_ms = self._now()
        found: list[Entry] = []
        after = False
        while len(found) < limit:
            size = min(PAGE, limit - len(found))
            with _keys():
                sql = self._sql.scan(
                    start, end, now_ms, size, reverse=reverse, keys_only=keys_only, deref=deref, after=after
                )
            [answer] = await self._ask(sql)
            found += map(_entry, answer.rows)
            if len(answer.rows) < size:
                break
            if reverse:
                end = found[-1].key
            else:
                start, after = found[-1].key, True
        return found

    async def compact(self, limit: int = 500) -> int:
        """Remove at most ``limit`` expired entries, 500 with each statement."""
        removed = 0
        while removed < limit:
            size = min(_SWEEP, limit - removed)
            [answer] = await self._ask(self._sql.sweep(self._now(), size))
            removed += answer.affected
            if answer.affected < size:
                break
        return removed

    async def ping(self) -> None:
        await self._ask("SELECT 1")

    async def close(self) -> None:
        await self._connections.close()

    # -- commits -----------------------------------------------------------------------------------

    async def _committed(self, batches: Sequence[Batch]) -> list[Committed | KvError]:
        """Answer ``batches``, all of which can be kept; after a deadlock, try again."""
        for attempt in range(_ATTEMPTS):
            try:
                async with self._connections.lease() as link:
                    try:
                        return await self._attempt(link, batches)
                    except Error:
                        if link.in_transaction:
                            with suppress(Error, KvError):  # a connection that is still in one is not used again
                                await link.call("ROLLBACK")
                        raise
            except Error as error:
                if code_of(error) not in AGAIN or attempt == _ATTEMPTS - 1:
                    raise of_server(error, self._where) from error
            except CommitUnknown as error:
                keys = tuple(op.key for batch in batches for op in batch.ops if not isinstance(op, Check))
                raise CommitUnknown(keys, error.reason) from error.__cause__
            await asyncio.sleep(random.uniform(0, _PAUSE_SECONDS * 2 ** min(attempt, 4)))
        raise AssertionError("unreachable")

    async def _attempt(self, link: Link, batches: Sequence[Batch]) -> list[Committed | KvError]:
        now_ms, sql = self._now(), self._sql
        expected = expectations(batches)
        hoped = judge(batches, expected, now_ms)
        if not expected:
            writes = self._written(hoped)
            await self._send(link, writes if len(writes) == 1 else ["BEGIN", *writes, "COMMIT"])
            return hoped.answers
        checked, held = locks(batches)
        hopeful = all(isinstance(answer, Committed) for answer in hoped.answers)
        if hopeful and not held and len(expected) <= _LOOKED_AT:
            puts = {key: row for key, row in hoped.rows.items() if row is not None}
            writes = sql.put(puts, self._packet, sql.unchanged(expected, now_ms))
            if len(writes) == 1 and len(puts) == len(hoped.rows):
                try:
                    await self._send(link, writes)
                except Error as error:
                    if code_of(error) != NOT_AS_EXPECTED:
                        raise
                    hopeful = False
                else:
                    return hoped.answers
        begin = ["BEGIN", *sql.share(checked), *sql.hold(held, self._packet), *sql.versions(held)]
        found: list[Answer] = []
        if hopeful:
            finish = [*sql.guard(expected, now_ms), *self._written(hoped, held, expected), "COMMIT"]
            try:
                await self._send(link, begin + finish, found)
            except Error as error:
                if code_of(error) != NOT_AS_EXPECTED:
                    raise
            else:
                return hoped.answers
        else:  # something is not as expected, or the batches contradict each other
            await self._send(link, begin, found, commits=False)
        rows = (row for answer in found for row in answer.rows if len(row) == 3)
        stored: dict[str, Expect] = {key.decode(): version for key, version, exp in rows if not exp or exp > now_ms}
        verdict = judge(batches, stored, now_ms)
        finish = [*self._written(verdict, held, stored), "COMMIT"] if verdict.rows else ["ROLLBACK"]
        await self._send(link, finish, commits=bool(verdict.rows))
        return verdict.answers

    def _written(
        self, verdict: Verdict, held: Collection[str] = (), stored: Mapping[str, Expect] | None = None
    ) -> list[str]:
        """The statements that write, and that remove what `Statements.hold` put where nothing is stored."""
        puts = {key: row for key, row in verdict.rows.items() if row is not None}
        removed = {key for key, row in verdict.rows.items() if row is None}
        removed.update(key for key in held if key not in puts and (stored or {}).get(key, ABSENT) is ABSENT)
        if puts and not held:  # so that all keys are locked in one order, and two commits hardly ever deadlock
            puts |= dict.fromkeys(removed, DUMMY)
        return [*self._sql.put(puts, self._packet), *self._sql.delete(removed)]

    async def _send(
        self, link: Link, statements: Sequence[str], answers: list[Answer] | None = None, *, commits: bool = True
    ) -> None:
        """Send ``statements`` in as few calls as the server's packets allow; nothing is done before the last."""
        calls = packets(statements, self._packet)
        for number, sql in enumerate(calls, 1):
            await link.call(sql, writes=commits and number == len(calls), answers=answers)

    # -- the rest ----------------------------------------------------------------------------------

    async def _probe(self, shown: str) -> None:
        """Learn what the server is and allows; make the table, or refuse one that is not ours."""
        told, columns, engines = await self._ask(self._sql.probe)
        if not columns.rows and self._options.auto_create:
            await self.provision()
            told, columns, engines = await self._ask(self._sql.probe)
        table = self._options.table
        if not columns.rows:
            url = f"{shown}{'&' if '?' in shown else '?'}kv.table={table}"
            expected = f"the table {table!r}, which `kvpersist init '{url}'` makes and `kvpersist ddl '{url}'` prints"
            raise FormatMismatch(shown, "nothing", expected)
        found = [
            (_word(name), _word(short if _word(short) == "bigint" else full)) for name, short, full in columns.rows
        ]
        engine = _word(engines.rows[0][0])
        if found != COLUMNS or engine != "innodb":
            text = ", ".join(" ".join(column) for column in found)
            raise FormatMismatch(shown, f"the {engine} table {table!r} of {text}", "one that kvpersist made")
        [[version, packet, flush]] = told.rows
        name, number = ("MariaDB" if "MariaDB" in version else "MySQL"), version.split("-")[0]
        self._packet = int(packet) - 1024
        self._sql.page = max(1, min(PAGE, self._packet // BESIDE_A_VALUE))
        self.capabilities = structs.replace(
            self.capabilities,
            durable=int(flush) == 1,
            max_value_bytes=min(_MOST, (self._packet - BESIDE_A_VALUE) // 2),  # two digits a byte
            server=f"{name} {number}",
        )

    async def _ask(self, sql: str) -> list[Answer]:
        try:
            async with self._connections.lease() as link:
                return await link.call(sql)
        except Error as error:
            raise of_server(error, self._where) from error

    def _now(self) -> int:
        return int(self.clock() * 1000)

    def _check_open(self) -> None:
        if self._connections.closed:
            raise StoreClosed("the store was closed: open it again")


@contextmanager
def _keys() -> Iterator[None]:
    """Around whatever encodes a key of the caller's."""
    try:
        yield
    except UnicodeEncodeError as error:
        raise BadKey(error.object, "no UTF-8 text: it holds a lone surrogate") from error


def _entry(row: tuple[Any, ...]) -> Entry:
    key, version, expires, value, *target = row
    found = _entry(tuple(target)) if target and target[0] is not None else None
    return Entry(key.decode(), value, version, expires / 1000 if expires else None, found)


def _word(text: str | bytes) -> str:
    return (text.decode() if isinstance(text, bytes) else text).lower()
