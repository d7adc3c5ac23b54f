"""Queries: which index answers one, between which keys, and how its entries become records."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from hashlib import blake2b
from typing import Any, Final, Generic, TypeAlias, TypeVar

import msgspec

from kvpersist import keys
from kvpersist.codec import RecordCodec
from kvpersist.driver import Entry
from kvpersist.errors import BadCursor, BadRequest, CorruptRecord, IndexNotReady, KvError, NoIndex, Unencodable
from kvpersist.index.declaration import BoundIndex, Range
from kvpersist.index.definitions import BytesStore, Definitions, Known, Slot
from kvpersist.index.fields import Part
from kvpersist.index.writer import Writer, live

__all__ = ["OnCorrupt", "Query", "Reader", "decoded"]

R = TypeVar("R")

OnCorrupt: TypeAlias = Callable[[CorruptRecord], None]
"""Is handed the error of each damaged record that a query passes over."""

_COUNTED: Final = 1000  # keys read at once
_EXTRA: Final = 8  # entries read beyond what is still wanted after a page shrank
_DISCARDED: Final = 16  # stale entries removed per page that met them
_EXACT: Final = 112  # bytes of an encoded bound; longer text may have been cut where it was indexed


class Query(msgspec.Struct, frozen=True):
    """A range of keys; ``slot`` is None where it is the records themselves.

    ``start`` and ``end`` are keys, the end excluded. ``matches`` judges the record where keys alone
    cannot (long text is cut and hashed). ``tag`` tells this query's cursors from others. ``version`` is
    that of the definition it was planned by. ``base``: what all its index keys have in common, the
    values that were asked for; it ends where the order begins.
    """

    slot: Slot | None
    start: str
    end: str | None
    matches: Callable[[Any], bool] | None
    tag: bytes
    version: bytes = b""
    base: str = ""


class Reader(Generic[R]):
    """Answers the queries of one collection."""

    def __init__(
        self,
        store: BytesStore,
        definitions: Definitions,
        codec: RecordCodec[R],
        indexes: Sequence[BoundIndex],
        records: str,
        writer: Writer[R],
    ) -> None:
        self._store = store
        self._definitions = definitions
        self._codec = codec
        self._indexes = indexes
        self._records = records
        self._writer = writer
        capabilities = store.capabilities
        self._ordered_writes = capabilities.atomic_batch == "none"
        # an entry and its record come from one moment only if the driver follows the entry itself
        self._verifies = self._ordered_writes or not capabilities.deref

    async def query(self, where: Mapping[str, Any], *, whole: bool = False) -> Query:
        """Choose the index that answers ``where``.

        ``whole``: without conditions, go through the records themselves, whatever orders there are.

        Raises:
            NoIndex: none does. IndexNotReady: it is being built. BadRequest: a value of another type.
        """
        if whole and not where:
            return Query(None, self._records, keys.prefix_end(self._records), None, _tag("", "", ""))
        known = await self._definitions.fresh()
        try:
            return self._plan(known, where)
        except IndexNotReady:  # another process may have built it since
            return self._plan(await self._definitions.refresh(), where)

    async def through(self, bound: BoundIndex, where: Mapping[str, Any]) -> Query | None:
        """Return the query of one declared index, all of whose conditions ``where`` are its own; None: not ready.

        Raises:
            BadRequest: a value of another type.
        """
        _refuse_none(where)
        known = await self._definitions.fresh()
        for refreshed in (False, True):
            slot = known.named.get(bound.name)
            if slot is not None and slot.state == "readable":
                return msgspec.structs.replace(_query(slot, where), version=known.version)
            if not refreshed:  # another process may have built it since
                known = await self._definitions.refresh()
        return None

    async def records(
        self,
        query: Query,
        start: str | None,
        limit: int,
        on_corrupt: OnCorrupt | None = None,
        *,
        reverse: bool = False,
    ) -> tuple[list[tuple[str, R]], str | None]:
        """Return up to ``limit`` pairs of key and record from ``start``, and where to go on (None: at the end).

        ``on_corrupt`` is handed each damaged record, which is passed over; without it, it is raised.
        ``reverse``: downwards, from below ``start`` (the query's ``end``) to the query's own start.
        """
        found: list[tuple[str, R]] = []
        discarded = 0
        wanted = limit
        while True:
            page = await self._page(query, start, wanted, reverse)
            for entry, target in page:
                if target is None:
                    record = None
                else:
                    try:
                        record = self._codec.decode(target.key, target.value)
                    except CorruptRecord as error:
                        if on_corrupt is None:
                            raise
                        on_corrupt(error)
                        continue
                    if not self._holds(query, entry, record):
                        record = None
                if record is not None:
                    if query.matches is None or query.matches(record):
                        found.append((entry.key, record))
                        if len(found) == limit:
                            return found, _behind(entry.key, reverse)
                elif query.slot is not None and self._ordered_writes and discarded < _DISCARDED:
                    discarded += 1
                    try:
                        await self._writer.discard(query.slot, entry)
                    except KvError:  # the query has its answer; the entry stays stale
                        discarded = _DISCARDED
            if len(page) < wanted:
                return found, None
            start = _behind(page[-1][0].key, reverse)
            wanted = limit - len(found) + _EXTRA

    async def count(self, query: Query) -> int:
        """Count what ``query`` finds; records are read only where keys alone cannot tell."""
        total = 0
        start: str | None = query.start
        if query.matches is not None or self._ordered_writes:
            while start is not None:
                found, start = await self.records(query, start, 100)
                total += len(found)
            return total
        while start is not None:
            page = await self._store._scan(start, query.end, limit=_COUNTED, keys_only=True)
            total += len(page)
            start = page[-1].key + "!" if len(page) == _COUNTED else None
        return total

    async def unchanged(self, query: Query) -> bool:
        """Whether the index read was the right one all the while.

        A computed index is not maintained by processes with another version of it, which others are
        for as long as anybody may still read them: of those, what was read in the last 30 s is enough.
        """
        if query.slot is None:
            return True
        definitions = self._definitions
        known = await (definitions.refresh() if query.slot.bound.computed else definitions.fresh())
        return known.version == query.version

    def cursor(self, query: Query, last: str) -> str:
        """Return the cursor behind the entry ``last``."""
        position = last[len(self._prefix(query)) :].encode()
        return base64.urlsafe_b64encode(self._seal(query, position) + position).decode().rstrip("=")

    def position(self, query: Query, cursor: str) -> str:
        """Return the key from which a cursor goes on. Raises BadCursor."""
        try:
            data = base64.b64decode(cursor + "=" * (-len(cursor) % 4), altchars=b"-_", validate=True)
            position = data[len(query.tag) :]
            start = self._prefix(query) + position.decode() + "!"
        except (TypeError, ValueError, AttributeError, binascii.Error) as error:
            raise BadCursor(cursor) from error
        outside = start < query.start or (query.end is not None and start >= query.end)
        if data[: len(query.tag)] != self._seal(query, position) or outside:
            raise BadCursor(cursor)
        return start

    def _seal(self, query: Query, position: bytes) -> bytes:
        """What tells a cursor of this query, of this collection, uncut, from any other."""
        return blake2b(self._prefix(query).encode() + position, key=query.tag, digest_size=len(query.tag)).digest()

    def _prefix(self, query: Query) -> str:
        return self._records if query.slot is None else query.slot.prefix

    async def _page(
        self, query: Query, start: str | None, limit: int, reverse: bool
    ) -> list[tuple[Entry, Entry | None]]:
        low, high = (query.start, start) if reverse else (start, query.end)
        deref = None if query.slot is None else self._records
        page = await self._store._scan(low, high, limit=limit, reverse=reverse, deref=deref)
        if deref is None:
            return [(entry, live(entry)) for entry in page]
        return [(entry, live(entry.target)) for entry in page]

    def _holds(self, query: Query, entry: Entry, record: Any) -> bool:
        """Whether the record accounts for the index entry it was found by."""
        slot = query.slot
        return slot is None or not self._verifies or entry.key in slot.stored_keys(record, entry.value.decode())

    # ---- planning

    def _plan(self, known: Known, where: Mapping[str, Any]) -> Query:
        _refuse_none(where)
        candidates = [
            (fits, at, bound) for at, bound in enumerate(self._indexes) if (fits := _fit(bound, where)) is not None
        ]
        if not candidates:
            if not where:
                return Query(None, self._records, keys.prefix_end(self._records), None, _tag("", "", ""))
            asked = ", ".join(where)
            raise NoIndex(self._definitions.collection, asked, tuple(str(bound) for bound in self._indexes))
        candidates.sort(key=lambda each: each[:2])
        for _, _, bound in candidates:
            slot = known.named.get(bound.name)
            if slot is not None and slot.state == "readable":
                return msgspec.structs.replace(_query(slot, where), version=known.version)
        raise IndexNotReady(self._definitions.collection, candidates[0][2].name)


def _refuse_none(where: Mapping[str, Any]) -> None:
    for label, value in where.items():
        if value is None:
            raise BadRequest(f"{label}=None: records without a value are not in an index; leave it out")


def _behind(key: str, reverse: bool) -> str:
    """Where a scan goes on behind ``key``: no key lies between a key and itself + '!'; the upper end is excluded."""
    return key if reverse else key + "!"


def decoded(codec: RecordCodec[R], entries: Iterable[Entry], on_corrupt: OnCorrupt | None) -> Iterator[R]:
    """Decode entries; ``on_corrupt`` is handed the errors of damaged ones, which without it are raised."""
    for entry in entries:
        try:
            yield codec.decode(entry.key, entry.value)
        except CorruptRecord as error:
            if on_corrupt is None:
                raise
            on_corrupt(error)


def _fit(bound: BoundIndex, where: Mapping[str, Any]) -> int | None:
    """How well an index answers: 0 it is made for this, 1 it holds more; None: not at all."""
    equal = 0
    for part in bound.parts:
        if part.label not in where or isinstance(where[part.label], Range):
            break
        equal += 1
    used = equal
    if equal < len(bound.parts) and isinstance(where.get(bound.parts[equal].label), Range):
        used += 1
    unasked = bound.parts[used : bound.fields]
    if used != len(where) or any(part.optional for part in unasked):
        return None  # records without a value there are not in it
    if any(part.multi for part in bound.parts[equal:]):
        return None  # a record would be met once per element
    return 0 if not unasked else 1 if where else None


def _query(slot: Slot, where: Mapping[str, Any]) -> Query:
    base = ""
    lossy = False
    tests: list[Callable[[Any], bool]] = []
    low, high = "", "\U0010ffff"
    parts = slot.bound.parts
    for at, part in enumerate(parts):
        if part.label not in where:
            break
        asked = where[part.label]
        if isinstance(asked, Range):
            low, high, cut = _bounds(part, asked)
            lossy |= cut
            tests.append(_within(part, asked))
            return _between(slot, base + low, base + high if high else None, tests if lossy else None, base)
        value = part.asked(asked)
        try:
            encoded = part.encode(value)
        except Unencodable as error:
            raise BadRequest(f"{part.label}={asked!r}: {error.reason}") from error
        if part.kind is str and keys.index_text(value)[1]:
            lossy = True
        tests.append(_equal(part, value))
        if at == len(parts) - 1 and slot.bound.unique:
            key = base + encoded
            return _between(slot, key, key + "!", tests if lossy else None, base)
        base += encoded + "!"
    return _between(slot, base, None, tests if lossy else None, base)


def _between(
    slot: Slot, start: str, end: str | None, tests: Sequence[Callable[[Any], bool]] | None, base: str
) -> Query:
    """Make the query of what starts with ``base`` from ``start`` to ``end`` (None: as far as ``base`` goes)."""
    matches = None if tests is None else _all(tests)
    last = keys.prefix_end(slot.prefix + base) if end is None else slot.prefix + end
    tag = _tag(slot.bound.fingerprint, start, end or "")
    return Query(slot, slot.prefix + start, last, matches, tag, base=slot.prefix + base)


def _bounds(part: Part, asked: Range) -> tuple[str, str, bool]:
    """Return where the values of a range begin, where they end ("": open), and whether records decide."""
    low, high = (asked.high, asked.low) if part.descending else (asked.low, asked.high)
    start, cut_low = _bound(part, low)
    end, cut_high = _bound(part, high)
    if end:
        # what starts with a cut bound may still be within; a whole one is followed by '!' or by nothing
        end = (keys.prefix_end(end) or "") if cut_high else end + '"'
    return start, end, cut_low or cut_high


def _bound(part: Part, value: Any) -> tuple[str, bool]:
    if value is None:
        return "", False
    value = part.asked(value)
    try:
        encoded = keys.encode(value, part.descending)
    except keys.BadKey as error:
        raise BadRequest(f"{part.label}: {error}") from error
    data = encoded.encode()
    if len(data) <= _EXACT:
        return encoded, False
    return data[:_EXACT].decode(errors="ignore"), True


def _all(tests: Sequence[Callable[[Any], bool]]) -> Callable[[Any], bool]:
    return lambda record: all(test(record) for test in tests)


def _equal(part: Part, value: Any) -> Callable[[Any], bool]:
    return lambda record: value in part.of(record)


def _within(part: Part, asked: Range) -> Callable[[Any], bool]:
    low = None if asked.low is None else part.asked(asked.low)
    high = None if asked.high is None else part.asked(asked.high)
    return lambda record: any(
        (low is None or value >= low) and (high is None or value <= high) for value in part.of(record)
    )


def _tag(fingerprint: str, start: str, end: str) -> bytes:
    return blake2b("\0".join((fingerprint, start, end)).encode(), digest_size=8).digest()
