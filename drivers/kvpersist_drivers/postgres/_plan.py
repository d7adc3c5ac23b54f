"""From batches to the arguments of one statement."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final, NamedTuple

from kvpersist.driver import ABSENT, Batch, Check, Put
from kvpersist.errors import BadKey, BadRequest, KvError, ValueTooLarge
from kvpersist_drivers.postgres._statements import MAX_KEY_BYTES, SEPARATOR, escaped, lock_of

__all__ = ["MAX_BATCH_BYTES", "MAX_VALUE_BYTES", "Plan"]

MAX_VALUE_BYTES: Final = 64 << 20  # PostgreSQL itself keeps 1 GB, and handles a value several times in memory
MAX_BATCH_BYTES: Final = 256 << 20  # of values in one statement, whose message may have 1 GB

_CHECK, _PUT, _DELETE = range(3)
_WHOLE: Final = 1  # the lock of the table
_LOCKS: Final = 128  # more keys than that are locked as a whole: locks are a resource of the server
_NOTIFIED: Final = 7900  # bytes; a notification has less than 8,000


class _Row(NamedTuple):
    key: str  # as stored
    batch: int
    act: int
    expect: bytes | None  # b"": absent
    value: bytes | None
    version: bytes
    expires_at: float | None


class Plan:
    """Collects batches. One that cannot be kept is refused by itself and leaves nothing in the plan."""

    def __init__(self, now: float) -> None:
        self.now = now
        self.places: list[int] = []  # of the batches, as the caller counts them
        self.size = 0  # bytes of the values
        self._batches: list[tuple[list[_Row], bool]] = []  # and whether it has conditions
        self._conditional = self._deletes = False

    def add(self, place: int, batch: Batch) -> KvError | None:
        """Take ``batch`` in, unless it is empty; return why not."""
        if not batch.ops:
            return None
        number, version, size = len(self.places), batch.version, 0
        rows: list[_Row] = []
        conditional = deletes = False
        try:
            for op in batch.ops:
                expect = op.expect
                if expect is not None:
                    conditional = True
                    expect = b"" if expect is ABSENT else expect
                    if len(expect) not in (0, 8):
                        return BadRequest(f"the version expected at {op.key!r} has {len(expect)} bytes instead of 8")
                key = escaped(op.key, MAX_KEY_BYTES)
                if type(op) is Put:
                    expires = op.expires_at
                    if expires is not None and expires != expires:
                        return BadRequest("an expiry is a number of seconds since 1970, not NaN")
                    if len(op.value) > MAX_VALUE_BYTES:
                        return ValueTooLarge(op.key, len(op.value), MAX_VALUE_BYTES)
                    if expires is None or expires > self.now:
                        size += len(op.value)
                        rows.append(_Row(key, number, _PUT, expect, op.value, version, expires))
                        continue
                act = _CHECK if type(op) is Check else _DELETE
                deletes = deletes or act == _DELETE
                rows.append(_Row(key, number, act, expect, None, version, None))
        except BadKey as error:
            return error
        if size > 2 * MAX_BATCH_BYTES:
            return BadRequest(f"the values of one batch have {size} bytes, the limit is {2 * MAX_BATCH_BYTES}")
        self.size += size
        self.places.append(place)
        self._batches.append((rows, conditional))
        self._conditional, self._deletes = self._conditional or conditional, self._deletes or deletes
        return None

    @property
    def is_plain(self) -> bool:
        """Whether there are only puts, and none of them has a condition."""
        return not self._conditional and not self._deletes

    def put_arguments(self, table: int, channel: str | None) -> tuple[Any, ...]:
        """Arguments of the statement ``put``: of several values of a key the last one counts."""
        rows = self._last()
        keys, _, _, _, values, versions, expiries = zip(*rows, strict=True)
        told = None if channel is None else _notified(keys)
        return keys, values, versions, expiries, table, self._locks(), channel or "", told

    def apply_arguments(self, table: int, channel: str | None) -> list[tuple[Any, ...]]:
        """Arguments of the statement ``apply``: those of the locks, then those of each wave."""
        waves = self._waves() if self._conditional else [self._last()]
        empty: tuple[list[Any], ...] = ([],) * 7
        sent: list[tuple[Any, ...]] = [(table, self._locks(), *empty, self.now, None)]
        for rows in waves:
            sent.append((table, [], *zip(*rows, strict=True), self.now, channel))
        return sent

    def position(self, batch: int, key: str) -> int:
        """Which operation of a batch is about the stored ``key``."""
        return next(at for at, row in enumerate(self._batches[batch][0]) if row.key == key)

    def _last(self) -> list[_Row]:
        rows = [row for rows, _ in self._batches for row in rows]
        if len(self._batches) == 1:
            return rows
        last = {row.key: row for row in rows}
        return rows if len(last) == len(rows) else list(last.values())

    def _waves(self) -> list[list[_Row]]:
        """Batches whose conditions may see the same state, in as few groups as keep the order of the list."""
        waves: list[list[_Row]] = []
        written: dict[str, int] = {}  # key -> the first wave that sees what was written
        touched: dict[str, int] = {}  # key -> the last wave that looks at it
        for rows, _ in self._batches:
            wave = 0
            for row in rows:
                wave = max(wave, written.get(row.key, 0))
                if row.act != _CHECK:
                    wave = max(wave, touched.get(row.key, 0))
            for row in rows:
                touched[row.key] = max(wave, touched.get(row.key, 0))
                if row.act != _CHECK:
                    written[row.key] = wave + 1
            if wave == len(waves):
                waves.append([])
            waves[wave] += rows
        return waves

    def _locks(self) -> list[int]:
        """Numbers of locks in their order, negative where a shared one will do.

        Writers of a key exclude each other, and those who only check it exclude its writers; so
        nothing is written between the snapshot that conditions are judged on and the commit.
        """
        exclusive: dict[int, bool] = {}
        for rows, _ in self._batches:
            for row in rows:
                number = lock_of(row.key)
                exclusive[number] = exclusive.get(number, False) or row.act != _CHECK
        if len(exclusive) > _LOCKS:
            return [_WHOLE]
        return [-_WHOLE, *(number if exclusive[number] else -number for number in sorted(exclusive))]


def _notified(keys: Iterable[str]) -> str:
    """The payload that names ``keys``; empty where they are too many to be named."""
    text = SEPARATOR.join(keys)
    return text if len(text) * 4 < _NOTIFIED or len(text.encode()) < _NOTIFIED else ""
