"""From batches to the arguments of one statement."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, Final, NamedTuple, TypeAlias

from kvpersist.driver import ABSENT, Batch, Check, Put
from kvpersist.errors import BadKey, BadRequest, KvError, ValueTooLarge
from kvpersist_drivers.postgres._statements import MAX_KEY_BYTES, SEPARATOR, escaped

__all__ = ["MAX_BATCH_BYTES", "MAX_VALUE_BYTES", "Plan", "Wave"]

MAX_VALUE_BYTES: Final = 64 << 20  # PostgreSQL itself keeps 1 GB, and handles a value several times in memory
MAX_BATCH_BYTES: Final = 256 << 20  # of values in one statement, whose message may have 1 GB

# key as stored, number of the batch, expected version or b"" for absent, value or None to delete, version, expiry
_Write: TypeAlias = tuple[str, int, bytes | None, bytes | None, bytes, float | None]
_Check: TypeAlias = tuple[str, int, bytes]  # key as stored, number of the batch, expected version or b"" for absent
_VERSION: Final = 8  # bytes
_LOCKS: Final = 128  # more keys than that lock the table as a whole: locks are a resource of the server


class Wave(NamedTuple):
    """Batches, by their numbers, whose conditions may see the same state, and what they have to do."""

    batches: Sequence[int]
    writes: Sequence[_Write]
    checks: Sequence[_Check]


class Plan:
    """Collects batches. One that cannot be kept is refused by itself and leaves nothing in the plan.

    ``swaps``: the statement ``swap`` may be tried.
    """

    def __init__(self, now: float, *, swaps: bool = True) -> None:
        self.places: list[int] = []  # of the batches, as the caller counts them
        self.size = 0  # bytes of the values
        self._now = now
        self._swaps = swaps
        self._writes: list[_Write] = []
        self._checks: list[_Check] = []
        self._ends: list[tuple[int, int]] = []  # of each batch, in the writes and in the checks
        self._candidate: str | None = None  # the statement besides ``apply`` that may do all of it
        self._conditional = False

    def add(self, place: int, batch: Batch) -> KvError | None:
        """Take ``batch`` in, unless it is empty; return why not."""
        number, version, size = len(self.places), batch.version, 0
        writes: list[_Write] = []
        checks: list[_Check] = []
        candidate, conditional = "put", False
        try:
            for op in batch.ops:
                key, expect = escaped(op.key, MAX_KEY_BYTES), op.expect
                if expect is not None:
                    conditional = True
                    expect = b"" if expect is ABSENT else expect
                    if len(expect) not in (0, _VERSION):
                        return BadRequest(
                            f"the version expected at {op.key!r} has {len(expect)} bytes instead of {_VERSION}"
                        )
                    if type(op) is Check:
                        checks.append((key, number, expect))
                        continue
                    candidate = "swap" if expect else "insert"
                if type(op) is Put:
                    value, expires = op.value, op.expires_at
                    if len(value) > MAX_VALUE_BYTES:
                        return ValueTooLarge(op.key, len(value), MAX_VALUE_BYTES)
                    if expires is None or expires > self._now:
                        size += len(value)
                        writes.append((key, number, expect, value, version, expires))
                        continue
                    if expires != expires:
                        return BadRequest("an expiry is a number of seconds since 1970, not NaN")
                writes.append((key, number, expect, None, version, None))
        except BadKey as error:
            return error
        if size > 2 * MAX_BATCH_BYTES:
            return BadRequest(f"the values of one batch have {size} bytes, the limit is {2 * MAX_BATCH_BYTES}")
        if batch.ops:
            self.size += size
            if candidate != self._candidate:
                self._candidate = None if self.places else candidate
            self.places.append(place)
            self._writes += writes
            self._checks += checks
            self._ends.append((len(self._writes), len(self._checks)))
            self._conditional = self._conditional or conditional
        return None

    def direct(self, table: int, channel: str | None) -> tuple[str, tuple[Any, ...]] | None:
        """The statement that does all of it in one execution, by its name, and its arguments; None: ``apply`` does."""
        name = self._candidate
        writes = self._last() if name == "put" else self._writes
        if name is None or not writes:
            return None
        keys, _, expects, values, versions, expiries = _columns(writes, 6)
        found = {key: version for key, _, version in self._checks}
        if (
            set(map(len, versions)) != {_VERSION}
            or None in values
            or not all(found.values())  # b"": nothing may be there
            or not all(found[key] == version for key, _, version in self._checks)
            or not found.keys().isdisjoint(keys)
        ):
            return None
        if name != "put" and (expects.count(b"") not in (0, len(keys)) or len(set(keys)) < len(keys)):
            return None
        if name == "swap" and not (self._swaps and len(keys) == len(self.places)):
            return None
        what = "table" if len(keys) + len(found) > _LOCKS else "keys"
        looked_at = (_joined(found), list(found.values())) if found else (None, None)
        together = b"".join(versions)  # asyncpg looks at each item of a list, whether it is a list itself
        args = table, what, _joined(keys), *looked_at, self._now, values, together, _column(expiries), channel
        return name, (*args, b"".join(expects)) if name == "swap" else args

    def swapping(self) -> list[tuple[int, str]]:
        """The place and the key, as stored, of each put of ``swap``."""
        return [(place, write[0]) for place, write in zip(self.places, self._writes, strict=True)]

    def apply_arguments(self, table: int, channel: str | None) -> list[tuple[Any, ...]]:
        """Arguments of the statement ``apply``: those of the locks, then those of each wave."""
        written = dict.fromkeys([write[0] for write in self._writes])
        checked = dict.fromkeys([check[0] for check in self._checks])
        if len(written.keys() | checked) > _LOCKS:
            locks = (table, "table", None, None)
        else:
            locks = (table, "keys", _joined(written), _joined(checked))
        sent: list[tuple[Any, ...]] = [(*locks, *[None] * 9)]
        for number, wave in enumerate(self.waves()):
            keys, batches, expects, values, versions, expiries = _columns(wave.writes, 6)
            writes = (batches, _column(expects), values, versions, _column(expiries))
            looked_at, of, found = _columns(_shared(wave, number), 3)
            sent.append((table, None, _joined(keys), _joined(looked_at), *writes, of, found, self._now, channel))
        return sent

    def places_of(self, number: int) -> list[int]:
        """The places of those whom an answer of ``apply`` is about: a batch, or below 0 all of a wave."""
        return [self.places[batch] for batch in (self.waves()[-1 - number].batches if number < 0 else [number])]

    def waves(self) -> list[Wave]:
        """Batches whose conditions may see the same state, in as few groups as keep the order of the list."""
        everything = Wave(range(len(self.places)), self._writes, self._checks)
        if not self._conditional:
            return [everything._replace(writes=self._last())]
        keys = {write[0] for write in self._writes}
        if len(keys) == len(self._writes) and keys.isdisjoint([check[0] for check in self._checks]):
            return [everything]
        waves: list[tuple[list[int], list[_Write], list[_Check]]] = []
        written: dict[str, int] = {}  # key -> the first wave that sees what was written
        looked_at: dict[str, int] = {}  # key -> the last wave in which something looks at it
        start = (0, 0)
        for number, end in enumerate(self._ends):
            writes, checks = self._writes[start[0] : end[0]], self._checks[start[1] : end[1]]
            start, wave = end, 0
            for key, *_ in checks:
                wave = max(wave, written.get(key, 0))
            for key, *_ in writes:
                wave = max(wave, written.get(key, 0), looked_at.get(key, 0))
            for key, *_ in (*writes, *checks):
                looked_at[key] = max(wave, looked_at.get(key, 0))
            for key, *_ in writes:
                written[key] = wave + 1
            if wave == len(waves):
                waves.append(([], [], []))
            waves[wave][0].append(number)
            waves[wave][1].extend(writes)
            waves[wave][2].extend(checks)
        return [Wave(*wave) for wave in waves]

    def _last(self) -> list[_Write]:
        """Of several writes of a key the last one counts, where none has a condition."""
        last = {write[0]: write for write in self._writes}
        return self._writes if len(last) == len(self._writes) else list(last.values())


def _shared(wave: Wave, number: int) -> list[_Check]:
    """The checks of a wave; one that each of its batches makes is there once, for all of them."""
    checks = wave.checks
    times = Counter([(key, version) for key, _, version in checks])
    everybody = {check for check, count in times.items() if count == len(wave.batches)}
    return [(key, -1 - number, version) for key, version in everybody] + [
        check for check in checks if (check[0], check[2]) not in everybody
    ]


def _joined(keys: Iterable[str]) -> str:
    return SEPARATOR.join(keys)


def _columns(rows: Sequence[tuple[Any, ...]], width: int) -> Sequence[Sequence[Any]]:
    return list(zip(*rows, strict=True)) or [()] * width


def _column(values: Sequence[Any]) -> Sequence[Any] | None:
    """``values``, or None where they all are: the server then fills the column."""
    return None if values.count(None) == len(values) else values
