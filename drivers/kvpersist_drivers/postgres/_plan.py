"""From batches to the arguments of one statement."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Final, TypeAlias

from kvpersist.driver import ABSENT, Batch, Check, Put
from kvpersist.errors import BadKey, BadRequest, KvError, ValueTooLarge
from kvpersist_drivers.postgres._statements import MAX_KEY_BYTES, SEPARATOR, escaped

__all__ = ["MAX_BATCH_BYTES", "MAX_VALUE_BYTES", "Plan"]

MAX_VALUE_BYTES: Final = 64 << 20  # PostgreSQL itself keeps 1 GB, and handles a value several times in memory
MAX_BATCH_BYTES: Final = 256 << 20  # of values in one statement, whose message may have 1 GB

# key as stored, act, number of the batch, expected version or b"" for absent, value, version, expiry
_Row: TypeAlias = tuple[str, int, int, bytes | None, bytes | None, bytes, float | None]
_CHECK, _PUT, _DELETE = range(3)
_LOCKS: Final = 128  # more keys than that lock the table as a whole: locks are a resource of the server
_NOTIFIED: Final = 7900  # bytes; a notification has less than 8,000


class Plan:
    """Collects batches. One that cannot be kept is refused by itself and leaves nothing in the plan."""

    def __init__(self, now: float) -> None:
        self.places: list[int] = []  # of the batches, as the caller counts them
        self.size = 0  # bytes of the values
        self.is_plain = True  # there are only puts, and none of them has a condition
        self._now = now
        self._rows: list[_Row] = []
        self._starts: list[int] = []  # of the batches in the rows
        self._conditional = False

    def add(self, place: int, batch: Batch) -> KvError | None:
        """Take ``batch`` in, unless it is empty; return why not."""
        number, version, size = len(self.places), batch.version, 0
        rows: list[_Row] = []
        plain, conditional = True, False
        try:
            for op in batch.ops:
                key, expect = escaped(op.key, MAX_KEY_BYTES), op.expect
                if expect is not None:
                    conditional = True
                    expect = b"" if expect is ABSENT else expect
                    if len(expect) not in (0, 8):
                        return BadRequest(f"the version expected at {op.key!r} has {len(expect)} bytes instead of 8")
                if type(op) is Put:
                    value, expires = op.value, op.expires_at
                    if len(value) > MAX_VALUE_BYTES:
                        return ValueTooLarge(op.key, len(value), MAX_VALUE_BYTES)
                    if expires is None or expires > self._now:
                        size += len(value)
                        rows.append((key, _PUT, number, expect, value, version, expires))
                        continue
                    if expires != expires:
                        return BadRequest("an expiry is a number of seconds since 1970, not NaN")
                plain = False
                rows.append((key, _CHECK if type(op) is Check else _DELETE, number, expect, None, version, None))
        except BadKey as error:
            return error
        if size > 2 * MAX_BATCH_BYTES:
            return BadRequest(f"the values of one batch have {size} bytes, the limit is {2 * MAX_BATCH_BYTES}")
        if rows:
            self.size += size
            self.places.append(place)
            self._starts.append(len(self._rows))
            self._rows += rows
            self._conditional = self._conditional or conditional
            self.is_plain = self.is_plain and plain and not conditional
        return None

    def put_arguments(self, table: int, channel: str | None) -> tuple[Any, ...]:
        """Arguments of the statement ``put``."""
        keys, _, _, _, values, versions, expiries = zip(*self._last(), strict=True)
        told = None if channel is None else _payload(keys)
        expiring = None if expiries.count(None) == len(keys) else expiries
        return keys, values, versions, expiring, table, len(keys) > _LOCKS, channel, told

    def apply_arguments(self, table: int, channel: str | None) -> list[tuple[Any, ...]]:
        """Arguments of the statement ``apply``: those of the locks, then those of each wave."""
        waves = self._waves() if self._conditional else [self._last()]
        acts: dict[str, int] = {}
        for row in self._rows:
            acts[row[0]] = acts.get(row[0], 0) or row[1]
        what, locked = ("table", {}) if len(acts) > _LOCKS else ("keys", acts)
        first = (table, what, list(locked), list(locked.values()), None, None, None, None, None, None, None)
        return [first, *((table, None, *zip(*rows, strict=True), self._now, channel) for rows in waves)]

    def position(self, batch: int, key: str) -> int:
        """Which operation of a batch is about the stored ``key``."""
        start = self._starts[batch]
        return next(at for at, row in enumerate(self._rows[start:]) if row[0] == key)

    def _last(self) -> list[_Row]:
        """Of several operations on a key the last one counts, where none has a condition."""
        last = {row[0]: row for row in self._rows}
        return self._rows if len(last) == len(self._rows) else list(last.values())

    def _waves(self) -> list[list[_Row]]:
        """Batches whose conditions may see the same state, in as few groups as keep the order of the list."""
        waves: list[list[_Row]] = []
        written: dict[str, int] = {}  # key -> the first wave that sees what was written
        looked_at: dict[str, int] = {}  # key -> the last wave in which something looks at it
        for start, end in zip(self._starts, [*self._starts[1:], len(self._rows)], strict=True):
            rows = self._rows[start:end]
            wave = 0
            for key, act, *_ in rows:
                wave = max(wave, written.get(key, 0), looked_at.get(key, 0) if act else 0)
            for key, act, *_ in rows:
                looked_at[key] = max(wave, looked_at.get(key, 0))
                if act:
                    written[key] = wave + 1
            if wave == len(waves):
                waves.append([])
            waves[wave] += rows
        return waves


def _payload(keys: Collection[str]) -> str:
    """What is notified of a change of ``keys``; empty where they are too many to be named."""
    text = SEPARATOR.join(keys)
    return text if len(text) * 4 < _NOTIFIED or len(text.encode()) < _NOTIFIED else ""
