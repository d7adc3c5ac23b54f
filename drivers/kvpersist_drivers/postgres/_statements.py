"""The statements of ``postgres.sql`` for one table, and how keys are written in them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Final
from zlib import crc32

from kvpersist.errors import BadKey, BadOption, KeyTooLong

__all__ = ["COLUMNS", "MAX_KEY_BYTES", "SEPARATOR", "Statements", "all_escaped", "escaped", "unescaped"]

MAX_KEY_BYTES: Final = 2692  # as stored: an entry of a B-tree has 2,704 bytes, 12 of them its heads
COLUMNS: Final = "expires_at double precision, key text C, value bytea, version bytea"
SEPARATOR: Final = "\x01\x03"  # of keys that are sent as one text; no stored key holds it

_NAME: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,62}")
_TEXTS: Final = {
    name: text.strip()
    for part in Path(__file__).with_name("postgres.sql").read_text("utf-8").split("--- ")[1:]
    for name, text in [part.split("\n", 1)]
}


class Statements:
    """Texts with the names of a table in them; nothing else of a caller is ever in a text."""

    def __init__(self, table: str, schema: str | None) -> None:
        for option, name in (("table", table), ("schema", schema)):
            if name is not None and not _NAME.fullmatch(name):
                raise BadOption(option, f"{name!r}: up to 63 letters, digits and _, the first no digit")
        self.schema = None if schema is None else f'"{schema}"'
        self.table = f'"{table}"' if schema is None else f'"{schema}"."{table}"'
        index = f"{table}_expires_at" if len(table) <= 52 else f"{table[:43]}_{crc32(table.encode()):08x}_expires_at"
        parts = {f"{{{name}}}": _TEXTS[name] for name in ("guard", "locks")}  # the first holds the second
        self._names = parts | {"{table}": self.table, "{index}": f'"{index}"'}
        self._scans: dict[tuple[str, bool, bool, bool], str] = {}
        self.server, self.columns = _TEXTS["server"], _TEXTS["columns"]
        self.provision, self.get = self._named("provision"), self._named("get")
        self.apply, self.compact = self._named("apply"), self._named("compact")
        self.direct = {name: self._named(name) for name in ("put", "insert", "swap")}

    def scan(self, form: str, *, start: bool, end: bool, reverse: bool) -> str:
        """The text of a scan of the form "scan", "keys" or "deref" with or without bounds, which come last."""
        known = self._scans.get((form, start, end, reverse))
        if known is None:
            number = 4 if form == "deref" else 3
            bounds = [f"key >= ${number}::text"] * start + [f"key < ${number + start}::text"] * end
            text = self._named(form).replace("{range}", " AND ".join(bounds) or "true")
            known = text.replace("{order}", "DESC" if reverse else "ASC")
            self._scans[form, start, end, reverse] = known
        return known

    def _named(self, name: str) -> str:
        text = _TEXTS[name]
        for placeholder, quoted in self._names.items():
            text = text.replace(placeholder, quoted)
        return text


def escaped(key: str, limit: int | None = None) -> str:
    r"""Return ``key`` as it is stored: a text of PostgreSQL holds no NUL.

    ``\x01`` becomes ``\x01\x02`` and NUL ``\x01\x01``, which keeps the order and is not ambiguous.

    Raises:
        BadKey: it holds a lone surrogate. With a ``limit`` also, BadKey: it is empty; KeyTooLong: as stored it has
            more bytes.
    """
    stored = key
    if "\0" in key or "\1" in key:
        stored = key.replace("\1", "\1\2").replace("\0", "\1\1")
    if stored.isascii() and (limit is None or 0 < len(stored) <= limit):
        return stored
    try:
        size = len(stored.encode())
    except UnicodeEncodeError as error:
        raise BadKey(key, "no UTF-8 text: it holds a lone surrogate") from error
    if limit is not None and not size:
        raise BadKey(key, "a key is a text that is not empty")
    if limit is not None and size > limit:
        raise KeyTooLong(key, size, limit)
    return stored


def all_escaped(keys: Sequence[str]) -> Sequence[str]:
    """Return each of ``keys`` as `escaped` does without a limit."""
    together = "".join(keys)
    if together.isascii() and "\0" not in together and "\1" not in together:
        return keys
    return [escaped(key) for key in keys]


def unescaped(stored: str) -> str:
    """Return the key that is stored as ``stored``."""
    return stored.replace("\1\1", "\0").replace("\1\2", "\1") if "\1" in stored else stored
