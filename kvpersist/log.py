"""Numbered sequences per parent.

Numbers start at 1, have no gaps when they are assigned, and are never used again. One key per
item, ``ns:name:<parent>!<number>``, and one small record per parent, ``ns:name#stat:<parent>``
(last number, live count, first number that was not trimmed), so that appending the 20,000th item
costs what the first did.

With atomic batches the items and the stat are one batch, and the stat's version decides between
writers. Without, the items are written first, in order, and put-if-absent decides; the stat
follows, and what it missed is counted again by whoever loads it next. A deleted item leaves a
tombstone (an empty value) in its place.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, Final, Generic, NamedTuple, TypeAlias, TypeVar

import msgspec

from kvpersist import keys
from kvpersist.codec import JSON, MSGPACK, RecordCodec, frame
from kvpersist.driver import ABSENT, Check, Delete, Entry, Expect, Op, Put
from kvpersist.errors import BadRequest, CommitUnknown, Conflict, KvError, Unsupported
from kvpersist.funnel import Built, Funnel
from kvpersist.store import Store

__all__ = [
    "TOMBSTONE",
    "Built",
    "Funnel",
    "Log",
    "LogState",
    "Numbered",
    "Tail",
    "after_stat",
    "read_range",
    "require_sequences",
]

R = TypeVar("R")  # a record of a log

_PAGE: Final = 250  # items read, or removed, at once
_TRIMMED: Final = 500  # items deleted in one batch by a trim

TOMBSTONE: Final = b""
"""The value of a deleted item: its number stays taken."""


class Numbered(NamedTuple, Generic[R]):
    """An item of a log and its number."""

    number: int
    item: R


Tail: TypeAlias = tuple[int, ...]
"""What a kind of log remembers in the stat of its newest item; an ordinary log nothing."""


class _Stat(msgspec.Struct, frozen=True, gc=False, omit_defaults=True):
    """The stored form: the last number given out, how many items are alive, the first that was not trimmed."""

    last: int = 0
    count: int = 0
    first: int = 1
    tail: Tail = ()


class LogState(NamedTuple):
    """What is known of a parent: its stat, and where it and the items lie."""

    last: int
    alive: int
    expect: Expect  # of the stat record
    prefix: str  # of the items' keys
    stat_key: str
    first: int
    tail: Tail


class _Append:
    """Items to be appended: those that are ``left``, and the numbers ``given`` to those that stand already."""

    __slots__ = ("given", "left")

    def __init__(self, items: Sequence[Any]) -> None:
        self.left = items
        self.given: list[int] = []


class _Remove(NamedTuple):
    """Items to be removed; ``keep``: leaving tombstones. Answered with how many were alive."""

    numbers: tuple[int, ...]
    keep: bool = True


class _Lower(NamedTuple):
    """Lower the count of items already removed."""

    by: int


class _Trim(NamedTuple):
    """Let the numbers begin at ``before``; answered with where they begin."""

    before: int


class Log(Generic[R]):
    """One numbered sequence of records per parent.

    Two appends at once, in one process or many, get different numbers without a gap. A parent needs
    no creation, and need not exist.

    Example:
        log = Log(store, Step, name="step")
        number = await log.append("run-1", Step("plan"))
        recent = await log.last("run-1", 50)  # chronological, one range read
    """

    def __init__(self, store: Store, type_: type[R], *, name: str, namespace: str = "kv", version: int = 1) -> None:
        """
        Args:
            name: of the collection, ``[a-z0-9_.-]{1,64}``.
            version: of the records' schema, as for `Repository`.

        Raises:
            BadKey: ``name`` or ``namespace`` cannot be part of a key.
            Unsupported: the backend has no ordered scan or no conditional writes.
        """
        require_sequences(store, f"log {name!r}")
        self._store = store
        self._codec = RecordCodec(type_, codec=store.codec, version=version)
        self._stats = RecordCodec(_Stat, codec=store.codec)
        packs = store.codec == "msgpack"
        self._format = MSGPACK if packs else JSON  # a stat is made here, so its types need no proof
        self._pack = msgspec.msgpack.Encoder().encode if packs else msgspec.json.Encoder().encode
        space = keys.namespace(namespace)
        self._space = space
        self._prefix = keys.record_prefix(space, keys.check_name(name, "log"))
        self._stat_prefix = keys.meta_prefix(space, name, "stat")
        self._atomic = store.capabilities.atomic_batch != "none"
        self._owned = False
        self._funnel: Funnel[LogState, Any, Any] = Funnel(
            store,
            self._load,
            self._build,
            at_once=self._appended,
            partly=None if self._atomic else self._partly,
            stand=None if self._atomic else self._stand,
            weigh=_weight,
            what=f"append to log {name!r}",
        )

    async def append(self, parent: str, item: R) -> int:
        """Store ``item`` under the next number and return it: one commit once the parent is known here.

        Raises:
            Unencodable: the item cannot be kept and given back alike.
            DeadlineExceeded: other writers won every time until the store's timeout; nothing was changed.
            CommitUnknown: the item may have been stored; read `last` before appending it again.
        """
        if not self._owned:
            await self._own()
        return (await self._funnel.submit(parent, _Append((item,))))[0]

    async def append_many(self, parent: str, items: Sequence[R]) -> list[int]:
        """Append ``n`` items in order: ``n`` numbers; up to 500 are one batch, more are cut into several."""
        if not self._owned:
            await self._own()
        numbers: list[int] = []
        for at in range(0, len(items), 500):
            numbers += await self._funnel.submit(parent, _Append(tuple(items[at : at + 500])))
        return numbers

    async def get(self, parent: str, number: int) -> R | None:
        """The item ``number`` of ``parent``; None if there is none, or it was deleted."""
        key = self._prefix_of(parent) + keys.encode(number)
        [entry] = await self._store._entries([key])
        return None if entry is None or entry.value == TOMBSTONE else self._codec.decode(key, entry.value)

    async def last(self, parent: str, n: int) -> list[Numbered[R]]:
        """The ``n`` newest items in chronological order: one range read, more only where items were deleted."""
        return (await self.range(parent, limit=n, reverse=True))[::-1]

    async def range(
        self, parent: str, *, after: int = 0, before: int | None = None, limit: int = 100, reverse: bool = False
    ) -> list[Numbered[R]]:
        """The first ``limit`` items with ``after < number < before``; ``reverse`` starts at the newest."""
        prefix = self._prefix_of(parent)
        decode = self._codec.decode
        at = len(prefix) + 1  # behind the character that tells how many digits follow
        found = await read_range(self._store, prefix, after, before, limit, reverse, self._last_number, parent)
        return [Numbered(int(entry.key[at:], 16), decode(entry.key, entry.value)) for entry in found]

    async def iterate(self, parent: str, *, after: int = 0) -> AsyncIterator[Numbered[R]]:
        """Yield the items in order, reading 250 at a time; those appended meanwhile are seen too."""
        while True:
            page = await self.range(parent, after=after, limit=_PAGE)
            for numbered in page:
                yield numbered
            if len(page) < _PAGE:
                return
            after = page[-1].number

    async def count(self, parent: str) -> int:
        """How many items are alive: one read, whatever their number."""
        return (await self._load(parent)).alive

    async def delete(self, parent: str, number: int) -> bool:
        """Delete one item; False if there is none. Its number is not used again."""
        return await self._funnel.submit(parent, _Remove((number,))) == 1

    async def truncate(self, parent: str, *, after: int) -> int:
        """Delete the items with a number above ``after`` that are there now; return how many went."""
        return await self._remove(parent, after, keep=True)

    async def clear(self, parent: str) -> int:
        """Delete every item there is now; return how many went. Numbers go on where they were."""
        return await self._remove(parent, 0, keep=not self._atomic)

    async def trim(self, parent: str, *, before: int) -> int:
        """Delete the items with a number below ``before``, without tombstones; return how many keys went.

        In batches of 500, beside which appending goes on. What an interrupted trim left, the next removes.
        """
        first = await self._funnel.submit(parent, _Trim(before))
        if not self._atomic:  # there a stat may lag behind its items: only what it tells is gone may go
            first = (await self._load(parent)).first
        return await self._clear_below(parent, first)

    async def _clear_below(self, parent: str, first: int) -> int:
        prefix = self._prefix_of(parent)
        end, removed = prefix + keys.encode(first), 0
        size = min(_TRIMMED, self._store.capabilities.max_batch or _TRIMMED)
        while page := await self._store._scan(prefix, end, limit=size, keys_only=True):
            await self._store._commit([Delete(entry.key) for entry in page])
            removed += len(page)
            if len(page) < size:
                break
        return removed

    async def parents(self) -> AsyncIterator[str]:
        """Yield the parents that ever had an item, in order, reading 250 at a time."""
        start, end = self._stat_prefix, keys.prefix_end(self._stat_prefix)
        while True:
            page = await self._store._scan(start, end, limit=_PAGE, keys_only=True)
            for entry in page:
                yield keys.decode(entry.key[len(self._stat_prefix) :], str)
            if len(page) < _PAGE:
                return
            start = page[-1].key + "\0"

    async def _remove(self, parent: str, after: int, keep: bool) -> int:
        """Remove page by page; what was removed stays so if this is interrupted."""
        prefix = self._prefix_of(parent)
        start, end = prefix + keys.encode(after + 1), prefix + keys.encode((await self._load(parent)).last + 1)
        removed = 0
        while start < end:
            page = await self._store._scan(start, end, limit=_PAGE, keys_only=True)
            if not page:
                break
            numbers = tuple(keys.decode(entry.key[len(prefix) :], int) for entry in page)
            removed += await self._funnel.submit(parent, _Remove(numbers, keep))
            start = prefix + keys.encode(numbers[-1] + 1)
        return removed

    async def _own(self) -> None:
        await self._store._own(self._space)
        self._owned = True

    def _prefix_of(self, parent: str) -> str:
        return f"{self._prefix}{keys.encode(parent)}!"

    async def _last_number(self, parent: str) -> int:
        return (await self._load(parent)).last

    async def _load(self, parent: str) -> LogState:
        [entry] = await self._store._entries([self._stat_prefix + keys.encode(parent)])
        return await self._state_of(parent, entry)

    async def _state_of(self, parent: str, entry: Entry | None) -> LogState:
        """The state that the stat ``entry`` tells of, brought up to what is stored."""
        part = keys.encode(parent)
        prefix, key = f"{self._prefix}{part}!", self._stat_prefix + part
        stat = _Stat() if entry is None else self._stats.decode(key, entry.value)
        last, count, tail = stat.last, stat.count, stat.tail
        if not self._atomic:  # items may have been written that the stat does not know
            async for missed in after_stat(self._store, prefix, last):
                last = keys.decode(missed.key[len(prefix) :], int)
                count += missed.value != TOMBSTONE
                tail = self._tail_after(tail, missed)
        return LogState(last, count, ABSENT if entry is None else entry.version, prefix, key, stat.first, tail)

    def _appended(self, parent: str, state: LogState, items: list[Any]) -> Built[LogState, Any] | None:
        """As `_build`, where something is appended and nothing else."""
        last, count, expect, prefix, stat_key, first, tail = state
        ops: list[Op] = []
        results: list[Any] = []
        for item in items:
            if type(item) is not _Append:
                return None
            known = last
            last, tail = self._append(parent, prefix, item, ops, results, last, tail)
            count += last - known
        return self._built(state, LogState(last, count, expect, prefix, stat_key, first, tail), ops, results, ())

    async def _build(self, parent: str, state: LogState, items: list[Any]) -> Built[LogState, Any]:
        last, count, _, prefix, _, first, tail = state
        ops: list[Op] = []
        results: list[Any] = []
        amends: list[_Lower | _Trim] = []
        removed: dict[str, Entry | None] = {}
        for item in items:
            if type(item) is _Remove:
                names = [prefix + keys.encode(number) for number in item.numbers]
                names = [name for name in names if name not in removed]
                found = await self._store._entries(names)
                removed.update(zip(names, found, strict=True))
                there = [entry for entry in found if entry is not None]
                alive = [entry for entry in there if entry.value != TOMBSTONE]
                if item.keep:
                    ops += [Put(entry.key, TOMBSTONE, entry.version) for entry in alive]
                else:
                    ops += [Delete(entry.key, entry.version) for entry in there]
                count -= len(alive)
                amends.append(_Lower(len(alive)))
                results.append(len(alive))
            elif type(item) is _Lower:
                count -= item.by
                results.append(None)
            elif type(item) is _Trim:
                before = min(item.before, last + 1)
                if before > first:
                    count -= await self._alive(prefix, first, before, all_are=count == last + 1 - first)
                    first = before
                    amends.append(item)
                results.append(first)
            else:
                known = last
                last, tail = self._append(parent, prefix, item, ops, results, last, tail)
                count += last - known
        return self._built(state, state._replace(last=last, alive=count, first=first, tail=tail), ops, results, amends)

    def _append(
        self, parent: str, prefix: str, item: _Append, ops: list[Op], results: list[Any], last: int, tail: Tail
    ) -> tuple[int, Tail]:
        """Add what appends ``item`` behind ``last``; return the last number and the tail then."""
        left = item.left
        try:
            puts, tail = self._puts(parent, prefix, last, left, tail)
        except KvError as error:
            results.append(error)
            return last, tail
        numbers = range(last + 1, last + 1 + len(left))
        results.append([*item.given, *numbers] if item.given else numbers)
        ops += puts
        return last + len(left), tail

    def _built(
        self, before: LogState, after: LogState, ops: list[Op], results: list[Any], amends: Sequence[Any]
    ) -> Built[LogState, Any]:
        stands = len(ops)
        if self._is_found_again(before, after):
            if ops:
                ops.append(Check(after.stat_key, after.expect))
            return Built(ops, lambda _: after, results, stands, amends)
        if not ops and after == before:
            return Built(ops, lambda _: after, results, stands, amends)
        ops.append(self._stat_put(after))
        return Built(ops, lambda version: after._replace(expect=version), results, stands, amends)

    def _stat_put(self, state: LogState) -> Put:
        """Write what is known of a parent, unless somebody else has."""
        stat = _Stat(state.last, state.alive, state.first, state.tail)
        return Put(state.stat_key, frame(state.stat_key, self._pack(stat), self._format, 1), state.expect)

    def _is_found_again(self, before: LogState, after: LogState) -> bool:
        """Whether the items alone tell what has changed since the stat was written."""
        return False

    def _partly(self, parent: str, built: Built[LogState, Any], asked: Sequence[Any], conflict: Conflict) -> None:
        """Without atomic batches: keep what was appended before another writer came in between."""
        written = {op.key for op in built.ops[: conflict.position]}
        prefix = self._prefix_of(parent)
        for item, numbers in zip(asked, built.results, strict=True):
            if type(item) is _Append and not isinstance(numbers, KvError):
                fresh = numbers[len(item.given) :]
                stands = [number for number in fresh if prefix + keys.encode(number) in written]
                item.left = item.left[len(stands) :]
                item.given += stands

    async def _stand(self, parent: str, built: Built[LogState, Any], asked: Sequence[Any]) -> bool:
        """Whether what was appended lies where readers come by.

        Others may have used the numbers that this process took for the next, and trimmed them: those items
        are removed, to be appended anew.

        Raises:
            CommitUnknown: the backend does not tell.
        """
        prefix = self._prefix_of(parent)
        try:
            first = (await self._load(parent)).first
        except KvError as error:
            written = tuple(op.key for op in built.ops[: built.stands])
            raise CommitUnknown(written, f"it may have been trimmed at once; {error}") from error
        stands = True
        for item, numbers in zip(asked, built.results, strict=True):
            if type(item) is not _Append or isinstance(numbers, KvError):
                continue
            fresh = numbers[len(item.given) :]
            below = [number for number in fresh if number < first]
            item.left = item.left[: len(below)]
            item.given += fresh[len(below) :]
            if below:
                stands = False
                await self._store._commit([Delete(prefix + keys.encode(number)) for number in below])
        return stands

    def _puts(self, parent: str, prefix: str, last: int, items: Sequence[R], tail: Tail) -> tuple[list[Op], Tail]:
        """What stores ``items`` behind ``last``, and the tail then; what it raises fails these items alone."""
        encode, number_of = self._codec.encode, keys.encode
        puts: list[Op] = []
        for number, item in enumerate(items, last + 1):
            key = prefix + number_of(number)
            puts.append(Put(key, encode(key, item), ABSENT))
        return puts, tail

    def _tail_after(self, tail: Tail, missed: Entry) -> Tail:
        """The tail with an item that was written and that the stat does not know."""
        return tail

    async def _alive(self, prefix: str, first: int, before: int, *, all_are: bool) -> int:
        """How many of the items from ``first`` on are no tombstones; read only where there are any."""
        if all_are:
            return before - first
        alive, start, end = 0, prefix + keys.encode(first), prefix + keys.encode(before)
        while page := await self._store._scan(start, end, limit=_PAGE):
            alive += sum(entry.value != TOMBSTONE for entry in page)
            start = page[-1].key + "\0"
        return alive


def _weight(item: Any) -> int:
    if type(item) is _Remove:
        return len(item.numbers)
    return len(item.left) if type(item) is _Append else 1


async def after_stat(store: Store, prefix: str, last: int) -> AsyncIterator[Entry]:
    """The items above ``last``, which a stat that was written before them does not know; one scan if there are few."""
    end = keys.prefix_end(prefix)
    while True:
        page = await store._scan(prefix + keys.encode(last + 1), end, limit=_PAGE)
        for entry in page:
            yield entry
        if len(page) < _PAGE:
            return
        last = keys.decode(page[-1].key[len(prefix) :], int)


async def read_range(
    store: Store,
    prefix: str,
    after: int,
    before: int | None,
    limit: int,
    reverse: bool,
    last_of: Callable[[str], Awaitable[int]],
    parent: str,
) -> list[Entry]:
    """The first ``limit`` entries below ``prefix`` with ``after < number < before``, tombstones left out.

    One scan, and another for every time that tombstones left it short. Where the backend cannot scan
    backwards, ``last_of(parent)`` tells where to begin, and windows of numbers are read forwards.

    Raises:
        BadRequest: ``limit`` or ``after`` is negative.
    """
    if limit < 0 or after < 0:
        raise BadRequest(f"limit and after are 0 or more, not {limit} and {after}")
    scan = store._scan
    start = prefix + keys.encode(after + 1)
    found: list[Entry] = []
    if reverse and not store.capabilities.reverse:
        high = await last_of(parent) + 1
        if before is not None:
            high = min(high, before)
        while len(found) < limit and high > after + 1:
            low = max(after + 1, high - max(limit - len(found), 16))
            page = await scan(prefix + keys.encode(low), prefix + keys.encode(high), limit=high - low)
            found += [entry for entry in reversed(page) if entry.value != TOMBSTONE]
            high = low
        return found[:limit]
    end = keys.prefix_end(prefix) if before is None else prefix + keys.encode(max(before, 0))
    while len(found) < limit and (end is None or start < end):
        wanted = limit - len(found)
        page = await scan(start, end, limit=wanted, reverse=reverse)
        found += [entry for entry in page if entry.value != TOMBSTONE]
        if len(page) < wanted:
            break
        if reverse:
            end = page[-1].key
        else:
            start = prefix + keys.encode(keys.decode(page[-1].key[len(prefix) :], int) + 1)
    return found


def require_sequences(store: Store, what: str) -> None:
    """Refuse a backend that cannot keep numbered sequences.

    Raises:
        Unsupported: it has no ordered scan or no conditional writes.
    """
    if not (store.capabilities.ordered and store.capabilities.conditional):
        raise Unsupported(f"{what} (it needs an ordered scan and conditional writes)", "use another backend")
