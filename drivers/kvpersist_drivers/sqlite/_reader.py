"""What is read, in whichever thread: each answer is one statement, run to its end."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import starmap

from kvpersist.driver import Entry
from kvpersist.errors import BadKey
from kvpersist_drivers.sqlite._database import Database
from kvpersist_drivers.sqlite._errors import translated
from kvpersist_drivers.sqlite._statements import MAX_KEYS, Statements, padded

__all__ = ["Reader"]


class Reader:
    """Reads through ``connection``, which must be set first. No statement stays open: that would stop checkpoints."""

    def __init__(self, database: Database, sql: Statements) -> None:
        self.connection: sqlite3.Connection = None  # pyright: ignore[reportAttributeAccessIssue]
        self._path = database.path
        self._sql = sql

    def get(self, keys: Sequence[str], now: float) -> list[Entry | None]:
        """As the driver's ``get``."""
        with self._translated("get"):
            if len(keys) == 1:
                rows = self.connection.execute(self._sql.get[1], (keys[0], now)).fetchall()
                return [Entry(*row) for row in rows] or [None]
            found: dict[str, Entry] = {}
            for start in range(0, len(keys), MAX_KEYS):
                part = padded([*keys[start : start + MAX_KEYS]])
                for row in self.connection.execute(self._sql.get[len(part)], (*part, now)).fetchall():
                    found[row[0]] = Entry(*row)
        return [found.get(key) for key in keys]

    def scan(self, sql: str, parameters: list[str | float | int]) -> list[Entry]:
        """Run one of the scans; rows of eight columns are an entry and its target."""
        with self._translated("scan"):
            rows = self.connection.execute(sql, parameters).fetchall()
        if rows and len(rows[0]) == 8:
            return [
                Entry(key, value, version, expires, None if found[0] is None else Entry(*found))
                for key, value, version, expires, *found in rows
            ]
        return list(starmap(Entry, rows))

    def ping(self) -> None:
        """Read something."""
        with self._translated("ping"):
            self.connection.execute(self._sql.ping).fetchall()

    def size(self) -> int:
        """Bytes of the pages of the whole file, free ones too."""
        with self._translated("size"):
            [[pages]] = self.connection.execute("PRAGMA page_count").fetchall()
            [[page_size]] = self.connection.execute("PRAGMA page_size").fetchall()
        return pages * page_size

    @contextmanager
    def _translated(self, operation: str) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise translated(error, operation, self._path) from error
        except UnicodeEncodeError as error:
            raise BadKey(error.object, "no UTF-8 text: it holds a lone surrogate") from error
