"""What a store has done since it was opened: counts, and how long its backend took.

Counters are plain integers of one event loop: an operation adds to a few of them, a round trip takes two
readings of the clock. Nothing is kept per key.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Any, Final

import msgspec

from kvpersist.driver import Batch, Check, Clock, Entry, Put
from kvpersist.errors import KvError

__all__ = ["Counters", "Latency", "Metrics"]

_log = logging.getLogger("kvpersist.store")
_BUCKETS: Final = 26  # of a histogram: bucket n holds what took less than 2**n microseconds; the last, all else


class Latency(msgspec.Struct, frozen=True):
    """How long round trips took; seconds.

    Attributes:
        count: round trips.
        average, minimum, maximum: None where there was none.
        histogram: (upper bound, round trips that took less, and no less than the bound before).
    """

    count: int = 0
    average: float | None = None
    minimum: float | None = None
    maximum: float | None = None
    histogram: tuple[tuple[float, int], ...] = ()

    def percentile(self, percent: float) -> float | None:
        """An upper bound, within a factor of two, of what ``percent`` of the round trips took at most."""
        seen = 0
        for bound, count in self.histogram:
            seen += count
            if seen * 100 >= self.count * percent:
                return min(bound, self.maximum or bound)
        return self.maximum


class Metrics(msgspec.Struct, frozen=True, kw_only=True):
    """What was done between ``since`` and ``collected_at``.

    Attributes:
        gets, commits, scans: operations that were asked for; a commit is one batch. Large values and
            watches are not counted.
        puts, deletes, checks: what the batches held.
        keys_read: keys that gets asked for. entries_scanned: entries that scans returned, targets included.
        bytes_read, bytes_written: of values.
        round_trips: calls of the driver; concurrent operations share them.
        errors: how many operations failed, by the error's code; "other": no error of ours.
        get, commit, scan: the round trips of each kind.
    """

    since: datetime
    collected_at: datetime
    gets: int
    commits: int
    scans: int
    puts: int
    deletes: int
    checks: int
    keys_read: int
    entries_scanned: int
    bytes_read: int
    bytes_written: int
    round_trips: int
    errors: dict[str, int]
    get: Latency
    commit: Latency
    scan: Latency

    @classmethod
    def total(cls, of: Iterable[Metrics]) -> Metrics:
        """Add up what several stores did; at least one."""
        every = list(of)
        first = every[0]
        values: dict[str, Any] = {}
        for name in cls.__struct_fields__:
            parts: list[Any] = [getattr(each, name) for each in every]
            if isinstance(getattr(first, name), int):
                values[name] = sum(parts)
            elif isinstance(getattr(first, name), Latency):
                values[name] = _joined(parts)
        errors: dict[str, int] = {}
        for each in every:
            for code, count in each.errors.items():
                errors[code] = errors.get(code, 0) + count
        return cls(
            since=min(each.since for each in every),
            collected_at=max(each.collected_at for each in every),
            errors=errors,
            **values,
        )


class _Trips:
    """Round trips of one kind."""

    __slots__ = ("buckets", "count", "longest", "seconds", "shortest")

    def __init__(self) -> None:
        self.count = 0
        self.seconds = self.longest = 0.0
        self.shortest = float("inf")
        self.buckets = [0] * _BUCKETS

    def latency(self) -> Latency:
        """Return it in the form that users get."""
        if not self.count:
            return Latency()
        histogram = tuple((2**n / 1e6, count) for n, count in enumerate(self.buckets) if count)
        return Latency(self.count, self.seconds / self.count, self.shortest, self.longest, histogram)


class Counters:
    """The counters of one store."""

    __slots__ = (
        "bytes_read",
        "bytes_written",
        "checks",
        "commits",
        "deletes",
        "entries_scanned",
        "errors",
        "gets",
        "keys_read",
        "puts",
        "scans",
        "since",
        "trips",
    )

    def __init__(self, clock: Clock) -> None:
        self.since = clock()
        self.gets = self.commits = self.scans = 0
        self.puts = self.deletes = self.checks = 0
        self.keys_read = self.entries_scanned = self.bytes_read = self.bytes_written = 0
        self.errors: dict[str, int] = {}
        self.trips = {"get": _Trips(), "commit": _Trips(), "scan": _Trips()}

    def ended(self, kind: str, seconds: float) -> None:
        """A call of the driver took so long, however it ended."""
        if _log.isEnabledFor(logging.DEBUG):
            _log.debug("%s: %.3f ms", kind, seconds * 1000)
        trips = self.trips[kind]
        trips.count += 1
        trips.seconds += seconds
        if seconds > trips.longest:
            trips.longest = seconds
        if seconds < trips.shortest:
            trips.shortest = seconds
        bucket = int(seconds * 1e6).bit_length()
        trips.buckets[bucket if bucket < _BUCKETS else -1] += 1

    def read(self, found: Sequence[Entry | None]) -> None:
        """A get of the driver returned this."""
        size = 0
        for entry in found:
            if entry is not None:
                size += len(entry.value)
        self.bytes_read += size

    def scanned(self, found: Sequence[Entry]) -> None:
        """A scan returned this."""
        size, count = 0, len(found)
        for entry in found:
            size += len(entry.value)
            if entry.target is not None:
                size += len(entry.target.value)
                count += 1
        self.entries_scanned += count
        self.bytes_read += size

    def asked(self, batches: Sequence[Batch]) -> tuple[int, int]:
        """These batches are to be committed; return their operations, and the bytes of their values."""
        operations = puts = checks = size = 0
        for batch in batches:
            ops = batch.ops
            operations += len(ops)
            for op in ops:
                kind = type(op)
                if kind is Put:
                    puts += 1
                    size += len(op.value)  # pyright: ignore[reportAttributeAccessIssue, reportUnknownArgumentType, reportUnknownMemberType]
                elif kind is Check:
                    checks += 1
        self.commits += len(batches)
        self.puts += puts
        self.checks += checks
        self.deletes += operations - puts - checks
        self.bytes_written += size
        return operations, size

    def failed(self, error: BaseException) -> None:
        """An operation ended with ``error``."""
        code = error.code if isinstance(error, KvError) else "other"
        _log.debug("%s %s", code, error if isinstance(error, KvError) else type(error).__name__)
        self.errors[code] = self.errors.get(code, 0) + 1

    def metrics(self, clock: Clock) -> Metrics:
        """Return what was counted so far."""
        get, commit, scan = (self.trips[kind].latency() for kind in ("get", "commit", "scan"))
        return Metrics(
            since=datetime.fromtimestamp(self.since, UTC),
            collected_at=datetime.fromtimestamp(clock(), UTC),
            gets=self.gets,
            commits=self.commits,
            scans=self.scans,
            puts=self.puts,
            deletes=self.deletes,
            checks=self.checks,
            keys_read=self.keys_read,
            entries_scanned=self.entries_scanned,
            bytes_read=self.bytes_read,
            bytes_written=self.bytes_written,
            round_trips=get.count + commit.count + scan.count,
            errors=dict(self.errors),
            get=get,
            commit=commit,
            scan=scan,
        )


def _joined(parts: Sequence[Latency]) -> Latency:
    there = [part for part in parts if part.count]
    if not there:
        return Latency()
    count = sum(part.count for part in there)
    buckets: dict[float, int] = {}
    for part in there:
        for bound, number in part.histogram:
            buckets[bound] = buckets.get(bound, 0) + number
    return Latency(
        count,
        sum((part.average or 0.0) * part.count for part in there) / count,
        min(part.minimum for part in there if part.minimum is not None),
        max(part.maximum for part in there if part.maximum is not None),
        tuple(sorted(buckets.items())),
    )
