"""The two ways of writing a record with its index entries: one atomic batch, or a careful order.

`AtomicWriter` commits record, entries and claims together. `OrderedWriter`, for backends that apply
a batch operation by operation, keeps these at every moment and after any crash:

* an index entry may be stale, never missing;
* two live records never hold one unique value, and a live record is found by its own;
* what was acknowledged stays.

Its save reads all versions first, claims the new unique values, puts the new entries, then the record
(the commit point), and only then removes what is stale. Four traps, each of which alone breaks it:

* A claim is taken over only after its holder's record was rewritten unchanged (*fenced*), so that a
  save of the holder that is under way cannot commit any more.
* Entries and claims are removed only at the version read before the own commit point: somebody may
  have moved back to them since.
* The place of a deleted record keeps a tombstone (an empty value), so that "absent" never means two
  different things to a save that began before.
* Entries never expire by themselves: a save that lost could otherwise shorten the life of the
  winner's. What a record's expiry leaves behind is stale, and removed by readers.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final, Generic, Protocol, TypeVar

from kvpersist.codec import RecordCodec
from kvpersist.definitions import BytesStore, Definitions, Known, Slot
from kvpersist.driver import ABSENT, Check, Delete, Entry, Expect, Op, Put
from kvpersist.errors import Conflict, CorruptRecord, KvError, UniqueConflict, Unsupported
from kvpersist.keys import check_key, unescape

__all__ = [
    "TOMBSTONE",
    "UNREAD",
    "AtomicWriter",
    "OrderedWriter",
    "Sleep",
    "Stage",
    "Writer",
    "live",
    "refuse_unkept",
    "writer",
]

R = TypeVar("R")
Sleep = Callable[[float], Awaitable[None]]

TOMBSTONE: Final = b""
"""The value of a deleted record on a backend without atomic batches; no record is empty."""

UNREAD: Final = Entry("", b"", b"")
"""Stands for "nobody has read the old record yet"; None: it was read, and there is none."""

_ATTEMPTS: Final = 40  # of a save that keeps losing to others
_FIRST_WAIT: Final = 0.002  # seconds, upper bound of the first wait after a lost race; doubled each time
_LONGEST_WAIT: Final = 0.25  # seconds
_WINDOW: Final = 40.0  # seconds from the first read of an ordered save to its commit point; then it starts again
_SETTLED: Final = 60.0  # seconds: longer than any save started before can still commit
_TOMBSTONE_LIFE: Final = 30 * 86_400.0  # seconds
_LONG_KEY: Final = 120  # characters from which a key's bytes are counted (UTF-8 has at most 4 per character)


class Stage(Protocol):
    """What writing needs of a Transaction."""

    async def _entries(self, keys: Sequence[str]) -> list[Entry | None]: ...
    def _stage(self, ops: Sequence[Op]) -> None: ...


def live(entry: Entry | None) -> Entry | None:
    """Return the entry of a record, None for a tombstone."""
    return None if entry is None or entry.value == TOMBSTONE else entry


class Writer(Generic[R]):
    """What both ways share."""

    def __init__(
        self, store: BytesStore, definitions: Definitions, codec: RecordCodec[R], records: str, sleep: Sleep
    ) -> None:
        """``records``: what the keys of the collection's records start with."""
        self._store = store
        self._definitions = definitions
        self._codec = codec
        self._records = records
        self._sleep = sleep

    async def save(
        self,
        pk: str,
        record: R,
        *,
        expect: Expect | None = None,
        expires_at: float | None = None,
        old: Entry | None = UNREAD,
    ) -> bytes:
        """Write ``record`` at ``pk`` and everything its indexes need; return its version.

        Args:
            pk: the record's encoded key parts.
            expect: the version that must be there, ABSENT, or None: the last writer wins.
            expires_at: seconds since 1970.
            old: the entry that is there, where the caller has read it; it is then expected.

        Raises:
            Conflict: not as expected, or lost to other writers too often.
            UniqueConflict: another record holds a unique value. Nothing was changed.
        """
        raise NotImplementedError

    async def remove(self, pk: str, *, expect: bytes | None = None) -> bool:
        """Remove the record and its index entries; False where there is none.

        Raises:
            Conflict: another version than ``expect`` is there.
        """
        raise NotImplementedError

    async def discard(self, slot: Slot, entry: Entry) -> bool:
        """Remove an index entry that its record does not account for; False: it is not stale after all."""
        raise NotImplementedError

    def _encoded(self, key: str, record: R, old: Entry | None, known: Known) -> bytes:
        if known.newer and old is not None and self._codec.decode_newer(key, old.value) is not None:
            return self._codec.encode_keeping(key, record, old.value)
        return self._codec.encode(key, record)

    def _decoded(self, entry: Entry | None) -> R | None:
        return None if entry is None else self._codec.decode(entry.key, entry.value)

    async def back_off(self, attempt: int) -> None:
        await self._sleep(random.uniform(0, min(_LONGEST_WAIT, _FIRST_WAIT * 2**attempt)))

    def _taken(self, slot: Slot, claim: str, holder: str) -> UniqueConflict:
        return UniqueConflict(slot.bound.name, slot.bound.shown(claim[len(slot.prefix) :]), _shown(holder))


class _Ops:
    """The operations of one atomic batch, at most one per key."""

    __slots__ = ("by_key", "claims")

    def __init__(self) -> None:
        self.by_key: dict[str, Op] = {}
        self.claims: dict[str, Slot] = {}  # those that must be free

    def delete(self, key: str) -> None:
        self.by_key[key] = Delete(key)

    def put(self, key: str, value: bytes, expires_at: float | None) -> None:
        self.by_key[key] = Put(key, value, None, expires_at)

    def claim(self, key: str, slot: Slot, value: bytes, expires_at: float | None, expect: Expect | None) -> None:
        if type(self.by_key.get(key)) is Delete:  # given up by another record of this batch, whose version is checked
            expect = None
        self.by_key[key] = Put(key, value, expect, expires_at)
        self.claims[key] = slot


class _Orphans:
    """Claims without a living holder, at the version to take them over at, and what makes sure of that."""

    __slots__ = ("claims", "guards")

    def __init__(self) -> None:
        self.claims: dict[str, bytes] = {}
        self.guards: dict[str, Op] = {}


class AtomicWriter(Writer[R]):
    """One batch per save: all of it happens, or nothing."""

    async def save(
        self,
        pk: str,
        record: R,
        *,
        expect: Expect | None = None,
        expires_at: float | None = None,
        old: Entry | None = UNREAD,
    ) -> bytes:
        key = self._records + pk
        given = old is not UNREAD
        wanted = expect
        orphans = _Orphans()
        known = await self._definitions.known()
        for attempt in range(_ATTEMPTS):
            if expect is ABSENT:
                old = None
            elif old is UNREAD:
                if known.maintained or known.newer:
                    [old] = await self._store._entries([key])
                    wanted = self._required(key, old, expect)
                else:
                    wanted = expect
            else:
                wanted = ABSENT if old is None else old.version
            seen = None if old is UNREAD else old
            data = self._encoded(key, record, seen, known)
            try:
                if not known.maintained:
                    return await self._store._commit((known.check, Put(key, data, wanted, expires_at)))
                ops = _Ops()
                await self._index_ops(ops, known, pk, seen, record, expires_at, orphans.claims)
                put = Put(key, data, wanted, expires_at)
                return await self._store._commit((known.check, put, *ops.by_key.values(), *orphans.guards.values()))
            except UniqueConflict:
                raise
            except Conflict as conflict:
                if conflict.key == known.check.key:
                    known = await self._definitions.refresh()
                elif conflict.key == key:
                    if expect is not None or given:
                        raise
                    old = UNREAD
                    await self.back_off(attempt)
                else:
                    await self._resolve(known, pk, conflict, orphans)
        raise Conflict(key, expect)

    async def remove(self, pk: str, *, expect: bytes | None = None) -> bool:
        key = self._records + pk
        known = await self._definitions.known()
        for attempt in range(_ATTEMPTS):
            [old] = await self._store._entries([key])
            if expect is not None:
                self._required(key, old, expect)
            if old is None:
                return False
            ops = _Ops()
            try:
                await self._index_ops(ops, known, pk, old, None, None, {})
            except CorruptRecord:
                ops = await self._pointing_at(known, pk)
            try:
                await self._store._commit((known.check, self._deletion(old), *ops.by_key.values()))
            except Conflict as conflict:
                if conflict.key == known.check.key:
                    known = await self._definitions.refresh()
                    continue
                if expect is not None:
                    raise
                await self.back_off(attempt)
                continue
            return True
        raise Conflict(key, expect)

    async def discard(self, slot: Slot, entry: Entry) -> bool:
        known = await self._definitions.known()
        key = self._records + entry.value.decode()
        [held] = await self._store._entries([key])
        if held is not None and entry.key in slot.stored_keys(self._decoded(held), entry.value.decode()):
            return False
        guard = Check(key, ABSENT if held is None else held.version)
        try:
            await self._store._commit((known.check, guard, Delete(entry.key, entry.version)))
        except Conflict:
            return False
        return True

    async def stage(
        self, tx: Stage, pk: str, record: R | None, *, expect: Expect | None = None, expires_at: float | None = None
    ) -> bool:
        """Add a save, or (``record=None``) a removal, to a transaction; False: nothing to remove."""
        key = self._records + pk
        await self._definitions.known()
        definition, old = await tx._entries([self._definitions.key, key])
        known = await self._definitions.known() if definition is None else self._definitions.take(definition)
        if expect is not None:
            self._required(key, old, expect)
        if record is None:
            if old is None:
                return False
            primary: Op = Delete(key)
        else:
            primary = Put(key, self._encoded(key, record, old, known), None, expires_at)
        ops = _Ops()
        await self._index_ops(ops, known, pk, old, record, expires_at, {})
        for claim, entry in zip(ops.claims, await tx._entries(list(ops.claims)), strict=True):
            if entry is not None and entry.value.decode() != pk:
                raise self._taken(ops.claims[claim], claim, entry.value.decode())
        tx._stage([primary, *(_unconditional(op) for op in ops.by_key.values())])
        return True

    async def save_many(self, items: Sequence[tuple[str, R, float | None]], size: int) -> list[bytes | KvError]:
        """Save distinct records in atomic batches of ``size``: one version or error per item."""
        answers: list[bytes | KvError] = [Conflict(self._records + pk, None) for pk, _, _ in items]
        waiting = [list(range(at, min(at + size, len(items)))) for at in range(0, len(items), size)]
        known = await self._definitions.known()
        for attempt in range(_ATTEMPTS):
            batches, clashing = await self._batches(known, items, waiting)
            outcomes = await self._store._commit_each(batches)
            for chunk in clashing:
                waiting.remove(chunk)
                for at in chunk:
                    answers[at] = await self._saved_alone(*items[at])
            again: list[list[int]] = []
            stale = False
            for chunk, outcome in zip(waiting, outcomes, strict=True):
                if type(outcome) is Conflict and outcome.key == known.check.key:
                    stale = True
                    again.append(chunk)
                elif isinstance(outcome, Conflict) and len(chunk) > 1 and attempt == 0:
                    again.extend([at] for at in chunk)  # find out which one it is, and let the others pass
                elif isinstance(outcome, Conflict):
                    for at in chunk:
                        answers[at] = await self._saved_alone(*items[at])
                else:
                    for at in chunk:
                        answers[at] = outcome
            if not again:
                break
            waiting = again
            if stale:
                known = await self._definitions.refresh()
        return answers

    async def _saved_alone(self, pk: str, record: R, expires_at: float | None) -> bytes | KvError:
        try:
            return await self.save(pk, record, expires_at=expires_at)
        except KvError as error:
            return error

    async def _batches(
        self, known: Known, items: Sequence[tuple[str, R, float | None]], chunks: Sequence[list[int]]
    ) -> tuple[list[list[Op]], list[list[int]]]:
        """Return a batch per chunk, and apart the chunks in which two records want one unique value."""
        wanted = [self._records + items[at][0] for chunk in chunks for at in chunk]
        found = iter(await self._store._entries(wanted) if known.maintained or known.newer else ())
        batches: list[list[Op]] = []
        clashing: list[list[int]] = []
        for chunk in chunks:
            puts: list[Op] = [known.check]
            ops = _Ops()
            olds = [next(found, None) for _ in chunk]
            for at, old in zip(chunk, olds, strict=True):  # first what is given up, then what is claimed
                pk, record, _ = items[at]
                before = self._decoded(old)
                for slot in known.maintained if before is not None else ():
                    if slot.state != "building":
                        has = slot.keys(record, pk)
                        for each in slot.stored_keys(before, pk):
                            if each not in has:
                                ops.delete(each)
            try:
                for at, old in zip(chunk, olds, strict=True):
                    pk, record, expires_at = items[at]
                    key = self._records + pk
                    expect = _version(old) if known.maintained or known.newer else None
                    puts.append(Put(key, self._encoded(key, record, old, known), expect, expires_at))
                    await self._index_ops(ops, known, pk, old, record, expires_at, {})
            except UniqueConflict:
                clashing.append(chunk)
                continue
            batches.append([*puts, *ops.by_key.values()])
        return batches, clashing

    async def _index_ops(
        self,
        ops: _Ops,
        known: Known,
        pk: str,
        old: Entry | None,
        record: R | None,
        expires_at: float | None,
        taken_over: dict[str, bytes],
    ) -> None:
        """Add what takes the indexes from ``old`` to ``record`` (None: to nothing)."""
        before = self._decoded(old)
        value = pk.encode()
        renewed = old is not None and old.expires_at != expires_at  # entries carry the record's expiry
        for slot in known.maintained:
            had = _before(slot, before, pk)
            has = slot.keys(record, pk) if record is not None else []
            gone = [key for key in had if key not in has]
            kept = [key for key in has if key in had] if renewed else []
            if slot.bound.unique and slot.state == "building" and (gone or kept):
                # records from before may share a value: only what names this one is its own
                own = {
                    entry.key
                    for entry in await self._store._entries([*gone, *kept])
                    if entry is not None and entry.value == value
                }
                gone = [key for key in gone if key in own]
                kept = [key for key in kept if key in own]
            for key in gone:
                if key not in ops.by_key:
                    ops.delete(key)
            for key in kept:
                ops.put(key, value, expires_at)
            for key in has:
                if key in had:
                    continue
                if len(key) > _LONG_KEY:
                    check_key(key)
                if slot.bound.unique:
                    prior = ops.by_key.get(key)
                    if type(prior) is Put and prior.value != value:  # by another record of this batch
                        raise self._taken(slot, key, prior.value.decode())
                    ops.claim(key, slot, value, expires_at, taken_over.get(key, ABSENT))
                else:
                    ops.put(key, value, expires_at)

    async def _resolve(self, known: Known, pk: str, conflict: Conflict, orphans: _Orphans) -> None:
        """Look at a claim that is not free: raise if its holder lives, else let it be taken over."""
        slot = next((slot for slot in known.maintained if conflict.key.startswith(slot.prefix)), None)
        if slot is None:  # the record of a claim's holder changed meanwhile: look at all again
            orphans.claims.clear()
            orphans.guards.clear()
            return
        orphans.claims.pop(conflict.key, None)
        [claim] = await self._store._entries([conflict.key])
        if claim is None:
            return
        holder = claim.value.decode()
        if holder != pk:
            key = self._records + holder
            [held] = await self._store._entries([key])
            if held is not None and claim.key in slot.stored_keys(self._decoded(held), holder):
                raise self._taken(slot, claim.key, holder)
            orphans.guards[key] = Check(key, _version(held))
        orphans.claims[claim.key] = claim.version

    async def _pointing_at(self, known: Known, pk: str) -> _Ops:
        """Find the entries of a record that cannot be read, by looking at all of them."""
        ops = _Ops()
        for slot in known.maintained:
            start: str | None = slot.prefix
            while start is not None:
                page = await self._store._scan(start, _after(slot.prefix), limit=500)
                for entry in page:
                    if entry.value.decode() == pk:
                        ops.delete(entry.key)
                start = page[-1].key + "!" if len(page) == 500 else None
        return ops

    def _required(self, key: str, old: Entry | None, expect: Expect | None) -> Expect | None:
        found: Expect = ABSENT if old is None else old.version
        if expect is not None and found != expect:
            raise Conflict(key, expect, found)
        return found

    def _deletion(self, old: Entry) -> Delete:
        return Delete(old.key, old.version if self._store.capabilities.conditional_delete else None)


class OrderedWriter(Writer[R]):
    """Single operations in an order that keeps the promises; see the module."""

    async def save(
        self,
        pk: str,
        record: R,
        *,
        expect: Expect | None = None,
        expires_at: float | None = None,
        old: Entry | None = UNREAD,
    ) -> bytes:
        key = self._records + pk
        for attempt in range(_ATTEMPTS):
            known = await self._definitions.fresh()
            started = self._store.clock()
            if old is UNREAD:
                if known.maintained or known.newer:
                    [stored] = await self._store._entries([key])
                    self._required(key, stored, expect)
                else:
                    stored = UNREAD
            else:
                stored = old
            seen = None if stored is UNREAD else live(stored)
            data = self._encoded(key, record, seen, known)
            if not known.maintained:
                wanted = expect if stored is UNREAD else _version(stored)
                return await self._store._commit((Put(key, data, wanted, expires_at),))
            try:
                before = self._decoded(seen)
                version = await self._write(known, key, pk, stored, before, record, data, expires_at, started)
            except UniqueConflict:
                raise
            except Conflict as conflict:
                if old is not UNREAD and conflict.key == key:
                    raise
                version = None
            if version is not None:
                return version
            if old is not UNREAD:
                raise Conflict(key, _version(stored))
            await self.back_off(attempt)
        raise Conflict(key, expect)

    async def remove(self, pk: str, *, expect: bytes | None = None) -> bool:
        key = self._records + pk
        for attempt in range(_ATTEMPTS):
            known = await self._definitions.fresh()
            started = self._store.clock()
            [stored] = await self._store._entries([key])
            self._required(key, stored, expect)
            old = live(stored)
            if old is None:
                return False
            if not known.maintained:
                try:
                    await self._store._commit((self._gone(old),))
                except Conflict:
                    await self.back_off(attempt)
                    continue
                return True
            try:
                before = self._decoded(old)
            except CorruptRecord:  # its entries are stale from now on, and removed by readers
                before = None
            try:
                if await self._write(known, key, pk, stored, before, None, TOMBSTONE, None, started) is not None:
                    return True
            except Conflict:
                pass
            await self.back_off(attempt)
        raise Conflict(key, expect)

    async def rebuild(self, slots: Sequence[Slot], pk: str, stored: Entry) -> None:
        """Bring an existing record into ``slots``, by saving it as it is with all its entries there.

        Raises:
            Conflict: it changed meanwhile; read it again.
            UniqueConflict: another record holds its value.
        """
        known = await self._definitions.fresh()
        record = self._decoded(stored)
        assert record is not None  # noqa: S101  # an entry decodes to a record, or raises
        await self._write(
            known,
            stored.key,
            pk,
            stored,
            record,
            record,
            stored.value,
            stored.expires_at,
            self._store.clock(),
            rebuilt=frozenset(slot.slot for slot in slots),
        )

    async def discard(self, slot: Slot, entry: Entry) -> bool:
        capabilities = self._store.capabilities
        if not capabilities.conditional:
            return False
        holder = entry.value.decode()
        key = self._records + holder
        [stored] = await self._store._entries([key])
        held = live(stored)
        if held is not None:
            if entry.key in slot.stored_keys(self._decoded(held), holder):
                return False
            if not self._lasts(held.expires_at):
                return False
        try:
            await self._fence(key, stored)
            await self._store._commit((self._erasure(entry),))
        except Conflict:
            return False
        return True

    async def _write(
        self,
        known: Known,
        key: str,
        pk: str,
        stored: Entry | None,
        before: R | None,
        record: R | None,
        data: bytes,
        expires_at: float | None,
        started: float,
        rebuilt: frozenset[str] = frozenset(),
    ) -> bytes | None:
        """Take claims and entries from ``before`` to ``record`` around the commit point; None: start again."""
        claims: dict[str, Slot] = {}
        entries: list[str] = []
        stale: list[str] = []
        for slot in known.maintained:
            had = [] if slot.slot in rebuilt else _before(slot, before, pk)
            has = self._wanted(slot, record, pk, lenient=bool(rebuilt))
            stale.extend(each for each in had if each not in has)
            added = [each for each in has if each not in had]
            if slot.bound.unique:
                claims.update(dict.fromkeys(added, slot))
            else:
                entries.extend(added)
        # every version is read here, before the first write of this save
        looked_at = [*claims, *stale]
        seen = dict(zip(looked_at, await self._store._entries(looked_at) if looked_at else (), strict=True))
        ops: list[Op] = []
        for claim, slot in claims.items():
            held = seen[claim]
            if held is not None and held.value != pk.encode() and held.value != TOMBSTONE:
                if not await self._freed(slot, claim, held.value.decode()):
                    return None
            # written even where it names this record: the new version is what stops others under way
            ops.append(Put(claim, pk.encode(), _version(held)))
        ops.extend(Put(entry, pk.encode()) for entry in entries)
        if self._store.clock() - started > _WINDOW:
            return None  # too late to be sure that the definition, and what was read, still hold
        if data == TOMBSTONE:
            expires_at = self._store.clock() + _TOMBSTONE_LIFE
        conditional = self._store.capabilities.conditional
        ops.append(Put(key, data, _version(stored) if conditional else None, expires_at))
        version = await self._store._commit(ops)  # the last operation is the commit point
        if conditional and (data == TOMBSTONE or self._lasts(expires_at)):
            mine = [entry for each in stale if (entry := seen[each]) is not None and entry.value == pk.encode()]
            await self._clean(mine)
        return version

    def _wanted(self, slot: Slot, record: R | None, pk: str, *, lenient: bool) -> list[str]:
        if record is None:
            return []
        found = slot.stored_keys(record, pk) if lenient else slot.keys(record, pk)
        for key in found:
            if len(key) > _LONG_KEY:
                check_key(key)
        return found

    async def _freed(self, slot: Slot, claim: str, holder: str) -> bool:
        """Make sure that ``holder`` neither has the claimed value nor is about to; False: start again.

        Raises:
            UniqueConflict: it has it.
        """
        key = self._records + holder
        [stored] = await self._store._entries([key])
        held = live(stored)
        if held is not None and claim in slot.stored_keys(self._decoded(held), holder):
            raise self._taken(slot, claim, holder)
        try:
            await self._fence(key, stored)
        except Conflict:
            return False
        return True

    async def _fence(self, key: str, stored: Entry | None) -> None:
        """Rewrite a record as it is, so that no save that read it before can commit. Raises Conflict."""
        if stored is None or stored.value == TOMBSTONE:
            until = self._store.clock() + _TOMBSTONE_LIFE
            await self._store._commit((Put(key, TOMBSTONE, _version(stored), until),))
        else:
            await self._store._commit((Put(key, stored.value, stored.version, stored.expires_at),))

    async def _clean(self, stale: Sequence[Entry]) -> None:
        """Remove entries at the versions they were read at; nothing acknowledged depends on it."""
        if not stale:
            return
        try:
            await self._store._commit_each([(self._erasure(entry),) for entry in stale])
        except KvError:
            return  # the record is written; readers pass over what is stale, and remove it

    def _erasure(self, entry: Entry) -> Op:
        if self._store.capabilities.conditional_delete:
            return Delete(entry.key, entry.version)
        # a bucket deletes without conditions: leave an entry that names nobody, and let it expire
        return Put(entry.key, TOMBSTONE, entry.version, self._store.clock() + _SETTLED)

    def _gone(self, old: Entry) -> Op:
        return Delete(old.key, old.version if self._store.capabilities.conditional_delete else None)

    def _lasts(self, expires_at: float | None) -> bool:
        """Whether the record outlives every save that is under way; only then may its old entries go."""
        return expires_at is None or expires_at - self._store.clock() > _SETTLED

    def _required(self, key: str, stored: Entry | None, expect: Expect | None) -> None:
        held = live(stored)
        found: Expect = ABSENT if held is None else held.version
        if expect is not None and found != expect:
            raise Conflict(key, expect, found)


def writer(
    store: BytesStore, definitions: Definitions, codec: RecordCodec[R], records: str, sleep: Sleep = asyncio.sleep
) -> AtomicWriter[R] | OrderedWriter[R]:
    """Return the way of writing that the store's backend allows."""
    atomic = store.capabilities.atomic_batch != "none"
    return (AtomicWriter if atomic else OrderedWriter)(store, definitions, codec, records, sleep)


def refuse_unkept(store: BytesStore, collection: str, indexes: Sequence[Any]) -> None:
    """Raise Unsupported where the backend could not keep a unique index."""
    unique = [index.name for index in indexes if index.unique]
    if unique and not store.capabilities.conditional:
        raise Unsupported(
            f"a unique index ({collection}.{unique[0]})", "it has no conditional writes: drop unique=True, or move"
        )


def _before(slot: Slot, record: Any, pk: str) -> list[str]:
    return [] if record is None else slot.stored_keys(record, pk)


def _version(entry: Entry | None) -> Expect:
    return ABSENT if entry is None else entry.version


def _unconditional(op: Op) -> Op:
    """In a transaction, what was read is checked at the commit anyway."""
    return Put(op.key, op.value, None, op.expires_at) if type(op) is Put else op


def _after(prefix: str) -> str:
    return prefix[:-1] + ";"  # ';' follows ':'


def _shown(pk: str) -> str:
    return ", ".join(unescape(part) for part in pk.split("!"))
