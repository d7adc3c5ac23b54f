"""Every statement on one table, put together once: afterwards no text ever enters a query."""
# ruff: noqa: S608  (of text, only the table's name, which was checked)

from __future__ import annotations

import re
from typing import Final

from kvpersist.errors import BadOption

__all__ = ["APPLICATION_ID", "FORMAT", "MAX_KEYS", "Statements", "padded"]

APPLICATION_ID: Final = 0x6B767073  # "kvps", in bytes 68-71 of the file
FORMAT: Final = 1  # in user_version; raised when the table changes
MAX_KEYS: Final = 512  # per statement; with one more parameter below the 999 of old libraries

_NAME: Final = re.compile(r"(?!(?i:sqlite_))[A-Za-z_][A-Za-z0-9_]{0,62}")
_LIVE: Final = "(exp IS NULL OR exp > ?)"


class Statements:
    """The SQL of the table ``table``, with ``?`` wherever a value goes.

    Args:
        table: letters, digits and ``_``, at most 63, not beginning with a digit or ``sqlite_``.

    Raises:
        BadOption: ``table`` is anything else.
    """

    def __init__(self, table: str) -> None:
        if not _NAME.fullmatch(table):
            raise BadOption("table", f"{table!r} is not a table name: letters, digits and _, at most 63")
        sizes = [1 << exponent for exponent in range(MAX_KEYS.bit_length())]
        marks = {size: ", ".join("?" * size) for size in sizes}
        self.create = (
            f'CREATE TABLE "{table}" (k TEXT PRIMARY KEY NOT NULL, v BLOB NOT NULL, ver BLOB NOT NULL, exp REAL)',
            f'CREATE INDEX "{table}_exp" ON "{table}" (exp) WHERE exp IS NOT NULL',
            f"PRAGMA application_id = {APPLICATION_ID}",
            f"PRAGMA user_version = {FORMAT}",
        )
        self.columns = f"SELECT name FROM pragma_table_info('{table}') ORDER BY cid"
        self.get = {
            size: f'SELECT k, CAST(v AS BLOB), ver, exp FROM "{table}" WHERE k IN ({marks[size]}) AND {_LIVE}'
            for size in sizes
        }
        self.versions = {size: f'SELECT k, ver FROM "{table}" WHERE k IN ({marks[size]}) AND {_LIVE}' for size in sizes}
        self.put = (
            f'INSERT INTO "{table}" (k, v, ver, exp) VALUES (?, ?, ?, ?) '
            "ON CONFLICT (k) DO UPDATE SET v = excluded.v, ver = excluded.ver, exp = excluded.exp"
        )
        self.delete = f'DELETE FROM "{table}" WHERE k = ?'
        self.sweep = (
            f'DELETE FROM "{table}" WHERE rowid IN '
            f'(SELECT rowid FROM "{table}" WHERE exp IS NOT NULL AND exp <= ? ORDER BY exp LIMIT ?)'
        )
        self.ping = f'SELECT count(*) FROM (SELECT 1 FROM "{table}" LIMIT 1)'
        self._scans = {
            (bounds, reverse, form): _scan(table, bounds, reverse, form)
            for bounds in ((False, False), (False, True), (True, False), (True, True))
            for reverse in (False, True)
            for form in ("entries", "keys", "deref")
        }

    def scan(self, start: str | None, end: str | None, reverse: bool, form: str) -> str:
        """The scan of ``form`` entries, keys or deref; parameters: [deref, now,] [start,] [end,] now, limit."""
        return self._scans[(start is not None, end is not None), reverse, form]


def padded(keys: list[str]) -> list[str]:
    """``keys`` with the last one repeated up to a power of two, so that few statements are ever compiled."""
    return keys + keys[-1:] * ((1 << (len(keys) - 1).bit_length()) - len(keys))


def _scan(table: str, bounds: tuple[bool, bool], reverse: bool, form: str) -> str:
    # the cast makes text, which only another program can have put there, bytes that fail their checksum
    columns = {
        "entries": "a.k, CAST(a.v AS BLOB), a.ver, a.exp",
        "keys": "a.k, x'', a.ver, a.exp",
        "deref": "a.k, CAST(a.v AS BLOB), a.ver, a.exp, b.k, CAST(b.v AS BLOB), b.ver, b.exp",
    }[form]
    # CAST keeps the bytes as they are, NUL included; || is by length too
    join = f' LEFT JOIN "{table}" b ON b.k = ? || CAST(a.v AS TEXT) AND (b.exp IS NULL OR b.exp > ?)'
    within = "a.k >= ? AND " * bounds[0] + "a.k < ? AND " * bounds[1]
    return (
        f'SELECT {columns} FROM "{table}" a{join if form == "deref" else ""} '
        f"WHERE {within}(a.exp IS NULL OR a.exp > ?) ORDER BY a.k{' DESC' * reverse} LIMIT ?"
    )
