"""Every statement on one table.

A caller's data is only ever a hexadecimal literal or a whole number: it needs no escaping, whatever
``sql_mode`` and the connection's character set are. The table's name was checked.
"""
# ruff: noqa: S608  (see above)

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from kvpersist.driver import ABSENT, Expect
from kvpersist.errors import BadOption

__all__ = ["BESIDE_A_VALUE", "COLUMNS", "DUMMY", "MAX_KEY_BYTES", "PAGE", "SESSION", "Row", "Statements", "packets"]

PAGE: Final = 1000  # keys or entries of one statement
BESIDE_A_VALUE: Final = 4096  # bytes of a packet: the longest key, twice, and the statement around it
MAX_KEY_BYTES: Final = 767  # what InnoDB indexes with any page size and row format
COLUMNS: Final = [
    ("k", f"varbinary({MAX_KEY_BYTES})"),
    ("version", "binary(8)"),
    ("expires", "bigint"),
    ("value", "longblob"),
]
SESSION: Final = (
    # a lock is waited for 1 s, so that eight attempts end before most deadlines
    "SET SESSION sql_mode='STRICT_ALL_TABLES',autocommit=1,innodb_lock_wait_timeout=1"
    # MariaDB would make a join of a list of a thousand keys, and read the whole table for it
    "/*M!100300 ,in_predicate_conversion_threshold=0 */"
    ";SET SESSION TRANSACTION ISOLATION LEVEL READ COMMITTED"
)

_FAILURE: Final = "(SELECT 1 UNION SELECT 2)"  # of a condition: as a single value, it is an error
_NAME: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,62}")

Row = tuple[bytes, int, bytes]
"""Version, expiry in milliseconds or 0 for never, value."""

DUMMY: Final[Row] = (bytes(8), 1, b"")
"""An entry that is not there: long expired, and only seen by the transaction that holds its key with it."""


class Statements:
    """The SQL of the table ``table``.

    Args:
        table: letters, digits and ``_``, at most 63, not beginning with a digit.

    Raises:
        BadOption: ``table`` is anything else.
    """

    def __init__(self, table: str) -> None:
        if not _NAME.fullmatch(table):
            raise BadOption("table", f"{table!r} is not a table name: letters, digits and _, at most 63")
        name = f"`{table}`"
        self.create = (
            f"CREATE TABLE IF NOT EXISTS {name} (\n"
            f"  k VARBINARY({MAX_KEY_BYTES}) NOT NULL,  -- UTF-8\n"
            "  version BINARY(8) NOT NULL,\n"
            "  expires BIGINT NOT NULL,  -- milliseconds since 1970; 0: never\n"
            "  value LONGBLOB NOT NULL,\n"
            "  PRIMARY KEY (k),\n"
            "  KEY expires (expires)\n"
            ") ENGINE=InnoDB ROW_FORMAT=DYNAMIC DEFAULT CHARACTER SET binary;\n"
        )
        self.probe = (
            "SELECT VERSION(),@@max_allowed_packet,@@innodb_flush_log_at_trx_commit;"
            "SELECT column_name,data_type,column_type FROM information_schema.columns "
            f"WHERE table_schema=DATABASE() AND table_name='{table}' ORDER BY ordinal_position;"
            f"SELECT engine FROM information_schema.tables WHERE table_schema=DATABASE() AND table_name='{table}'"
        )
        self.page = PAGE  # keys of one statement
        self._name = name

    def get(self, keys: Iterable[str]) -> list[str]:
        return [f"SELECT k,version,expires,value FROM {self._listed(part)}" for part in self._parts(keys)]

    def put(self, rows: Mapping[str, Row], limit: int, condition: str = "") -> list[str]:
        """Insert or replace, in the order of the keys; statements of at most ``limit`` characters.

        Where the ``condition`` does not hold the first of them fails with `NOT_AS_EXPECTED`.
        """
        update = "version=VALUES(version),expires=VALUES(expires),value=VALUES(value)"
        return self._inserted(rows, update, limit, condition)

    def hold(self, keys: Iterable[str], limit: int) -> list[str]:
        """Lock ``keys`` for this transaction, one after the other, whether there is an entry or not."""
        return self._inserted(dict.fromkeys(keys, DUMMY), "k=VALUES(k)", limit)

    def delete(self, keys: Iterable[str]) -> list[str]:
        return [f"DELETE e FROM {self._joined(part)}" for part in self._parts(keys)]

    def versions(self, keys: Iterable[str]) -> list[str]:
        return [f"SELECT k,version,expires FROM {self._listed(part)}" for part in self._parts(keys)]

    def share(self, keys: Iterable[str]) -> list[str]:
        """The versions of ``keys``, which nobody changes until this transaction ends."""
        return [
            f"SELECT e.k,e.version,e.expires FROM {self._joined(part)} LOCK IN SHARE MODE" for part in self._parts(keys)
        ]

    def unchanged(self, expected: Mapping[str, Expect], now_ms: int) -> str:
        """A condition: these versions are there; nobody changes them until this transaction ends.

        MySQL lets an INSERT read its own table only by way of a derived one that it cannot merge.
        """
        return " AND ".join(
            f"(SELECT version FROM (SELECT version FROM {self._name} WHERE k={_text(key)} AND {_live('', now_ms)} "
            f"LIMIT 1 LOCK IN SHARE MODE) e)=x'{version.hex()}'"
            for key in sorted(expected, key=str.encode)
            if (version := expected[key]) is not ABSENT
        )

    def guard(self, expected: Mapping[str, Expect], now_ms: int) -> list[str]:
        """Fail with `NOT_AS_EXPECTED` unless exactly the expected versions are there."""
        return [self._guarded(part, expected, now_ms) for part in self._parts(expected)]

    def sweep(self, now_ms: int, limit: int) -> str:
        return f"DELETE FROM {self._name} WHERE expires>0 AND expires<={now_ms} ORDER BY expires LIMIT {limit}"

    def scan(
        self,
        start: str | None,
        end: str | None,
        now_ms: int,
        limit: int,
        *,
        reverse: bool,
        keys_only: bool,
        deref: str | None,
        after: bool,
    ) -> str:
        """A page; ``after``: begin behind ``start``, or with ``reverse`` the end is never included anyway."""
        columns = "a.k,a.version,a.expires," + ("x''" if keys_only else "a.value")
        join = ""
        if deref is not None:
            columns += ",b.k,b.version,b.expires,b.value"
            join = f" LEFT JOIN {self._name} b ON b.k=CONCAT({_text(deref)},a.value) AND {_live('b', now_ms)}"
        bounds = _live("a", now_ms)
        if start is not None:
            bounds += f" AND a.k{'>' if after else '>='}{_text(start)}"
        if end is not None:
            bounds += f" AND a.k<{_text(end)}"
        order = "a.k DESC" if reverse else "a.k"
        return (
            f"SELECT {columns} FROM {self._name} a FORCE INDEX (PRIMARY){join} "
            f"WHERE {bounds} ORDER BY {order} LIMIT {limit}"
        )

    def _guarded(self, keys: Sequence[str], expected: Mapping[str, Expect], now_ms: int) -> str:
        there = [f"x'{version.hex()}{key.encode().hex()}'" for key in keys if (version := expected[key]) is not ABSENT]
        right = f"SUM(CONCAT(version,k) IN ({','.join(there)}))" if there else "0"
        return (
            f"SELECT IF((SELECT COUNT(*)={len(there)} AND COALESCE({right},0)={len(there)} "
            f"FROM {self._listed(keys)} AND {_live('', now_ms)}),1,{_FAILURE})"
        )

    def _parts(self, keys: Iterable[str]) -> list[list[str]]:
        ordered = sorted(keys, key=str.encode)
        return [ordered[at : at + self.page] for at in range(0, len(ordered), self.page)]

    def _listed(self, keys: Iterable[str]) -> str:
        return f"{self._name} FORCE INDEX (PRIMARY) WHERE k IN ({','.join(map(_text, keys))})"

    def _joined(self, keys: Iterable[str]) -> str:
        """Finds each key by itself, in their order: where most of a table is listed, IN would read and lock it all."""
        first, *others = map(_text, keys)
        table = " UNION ALL SELECT ".join([f"SELECT {first} AS k", *others])
        return f"({table}) d STRAIGHT_JOIN {self._name} e ON e.k=d.k"

    def _inserted(self, rows: Mapping[str, Row], update: str, limit: int, condition: str = "") -> list[str]:
        texts: list[str] = []
        for key, (version, expires, value) in sorted(rows.items(), key=_by_bytes):
            # computed before the first row is written
            when = f"IF({condition},{expires},{_FAILURE})" if condition and not texts else expires
            texts.append(f"({_text(key)},x'{version.hex()}',{when},x'{value.hex()}')")
        head = f"INSERT INTO {self._name} (k,version,expires,value) VALUES "
        tail = f" ON DUPLICATE KEY UPDATE {update}"
        return [head + part + tail for part in packets(texts, limit - len(head) - len(tail), ",")]


def packets(texts: Iterable[str], limit: int, between: str = ";") -> list[str]:
    """Join ``texts`` into as few as possible of at most ``limit`` characters; one that is longer stays alone."""
    joined: list[str] = []
    part: list[str] = []
    size = 0
    for text in texts:
        if part and size + len(text) > limit:
            joined.append(between.join(part))
            part, size = [], 0
        part.append(text)
        size += len(text) + len(between)
    if part:
        joined.append(between.join(part))
    return joined


def _text(key: str) -> str:
    return f"x'{key.encode().hex()}'"


def _by_bytes(item: tuple[str, Row]) -> bytes:
    return item[0].encode()


def _live(table: str, now_ms: int) -> str:
    column = f"{table}.expires" if table else "expires"
    return f"({column}=0 OR {column}>{now_ms})"
