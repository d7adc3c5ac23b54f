"""Writing a record and its index entries as one atomic batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Protocol, TypeVar

from kvpersist.driver import ABSENT, Check, Delete, Entry, Expect, Op, Put
from kvpersist.errors import Conflict, CorruptRecord, KvError, UniqueConflict
from kvpersist.index.definitions import Known, Slot
from kvpersist.index.writer import ATTEMPTS, UNREAD, Writer, version_of
from kvpersist.keys import prefix_end

__all__ = ["AtomicWriter", "IndexOps", "Stage"]

R = TypeVar("R")


class Stage(Protocol):
    """What writing needs of a Transaction."""

    async def _entries(self, keys: Sequence[str]) -> list[Entry | None]: ...
    def _stage(self, ops: Sequence[Op]) -> None: ...


class IndexOps:
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


_NONE: Final = IndexOps()  # where there are no indexes; never changed


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
        also: Sequence[Op] = (),
    ) -> bytes:
        """As `Writer.save`; ``also``: operations on other keys of the same batch, whose conflicts are raised."""
        key = self._records + pk
        stored = old
        orphans: dict[str, bytes] = {}  # claims nobody holds any more, and the versions to take them over at
        known = self._definitions.cached or await self._definitions.known()
        for attempt in range(ATTEMPTS):
            if expect is ABSENT:
                stored = None
            elif old is UNREAD and (known.maintained or known.newer):
                [stored] = await self._store._entries([key])
                self._required(key, stored, expect)
            seen = None if stored is UNREAD else stored
            wanted = expect if stored is UNREAD else version_of(stored)
            put = Put(key, self.encoded(key, record, seen, known), wanted, expires_at)
            ops = IndexOps() if known.maintained else _NONE
            try:
                if known.maintained:
                    await self.index_ops(ops, known, pk, seen, record, expires_at, orphans)
                return await self._store._commit((known.check, put, *ops.by_key.values(), *also))
            except UniqueConflict:
                raise
            except Conflict as conflict:
                if conflict.key == known.check.key:
                    known = await self._definitions.refresh()
                elif any(op.key == conflict.key for op in also):
                    raise
                elif conflict.key == key:
                    if expect is not None or old is not UNREAD:
                        raise
                    await self.back_off(attempt)
                elif type(ops.by_key.get(conflict.key)) is Check:  # the rebuild came to a value that is given up
                    await self.back_off(attempt)
                else:
                    await self.resolve(known, pk, conflict, orphans)
        raise Conflict(key, expect)

    async def remove(self, pk: str, *, expect: bytes | None = None, also: Sequence[Op] = ()) -> bool:
        """As `Writer.remove`; ``also`` as for `save`, where there is a record to remove."""
        key = self._records + pk
        known = await self._definitions.known()
        for attempt in range(ATTEMPTS):
            [old] = await self._store._entries([key])
            if expect is not None:
                self._required(key, old, expect)
            if old is None:
                return False
            ops = IndexOps()
            try:
                await self.index_ops(ops, known, pk, old, None, None, {})
            except CorruptRecord:
                ops = await self.entries_of(known, pk)
            try:
                await self._store._commit((known.check, self.deletion(old), *ops.by_key.values(), *also))
            except Conflict as conflict:
                if conflict.key == known.check.key:
                    known = await self._definitions.refresh()
                    continue
                if any(op.key == conflict.key for op in also):
                    raise
                if expect is not None and conflict.key == key:
                    raise
                await self.back_off(attempt)
                continue
            return True
        raise Conflict(key, expect)

    async def discard(self, slot: Slot, entry: Entry) -> bool:
        known = await self._definitions.known()
        key = self._records + entry.value.decode()
        [held] = await self._store._entries([key])
        if held is not None and entry.key in slot.stored_keys(self.decoded(held), entry.value.decode()):
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
        if definition is None:  # everything was removed meanwhile: declare again, and let the transaction fail
            known = await self._definitions.refresh()
        else:
            known = self._definitions.take(definition)
        if expect is not None:
            self._required(key, old, expect)
        if record is None:
            if old is None:
                return False
            primary: Op = Delete(key)
        else:
            primary = Put(key, self.encoded(key, record, old, known), None, expires_at)
        ops = IndexOps()
        await self.index_ops(ops, known, pk, old, record, expires_at, {})
        for claim, entry in zip(ops.claims, await tx._entries(list(ops.claims)), strict=True):
            if entry is not None and entry.value.decode() != pk:
                raise self.taken(ops.claims[claim], claim, entry.value.decode())
        tx._stage([primary, *(_unconditional(op) for op in ops.by_key.values())])
        return True

    async def save_many(self, items: Sequence[tuple[str, R, float | None]], size: int) -> list[bytes | KvError]:
        """Save distinct records in atomic batches of ``size``: one version or error per item."""
        answers: list[bytes | KvError | None] = [None] * len(items)
        waiting = [list(range(at, min(at + size, len(items)))) for at in range(0, len(items), size)]
        known = await self._definitions.known()
        for attempt in range(ATTEMPTS):
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
        return [
            Conflict(self._records + pk, None) if answer is None else answer
            for answer, (pk, _, _) in zip(answers, items, strict=True)
        ]

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
            ops = IndexOps()
            olds = [next(found, None) for _ in chunk]
            # first what is given up, then what is claimed
            for at, old in zip(chunk, olds, strict=True) if known.maintained else ():
                pk, record, _ = items[at]
                before = self.decoded(old)
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
                    expect = version_of(old) if known.maintained or known.newer else None
                    puts.append(Put(key, self.encoded(key, record, old, known), expect, expires_at))
                    if known.maintained:
                        await self.index_ops(ops, known, pk, old, record, expires_at, {})
            except UniqueConflict:
                clashing.append(chunk)
                continue
            batches.append([*puts, *ops.by_key.values()])
        return batches, clashing

    async def index_ops(
        self,
        ops: IndexOps,
        known: Known,
        pk: str,
        old: Entry | None,
        record: R | None,
        expires_at: float | None,
        taken_over: dict[str, bytes],
    ) -> None:
        """Add what takes the indexes from ``old`` to ``record`` (None: to nothing)."""
        before = self.decoded(old)
        value = pk.encode()
        renewed = old is not None and old.expires_at != expires_at  # entries carry the record's expiry
        for slot in known.maintained:
            had = self.held_keys(slot, before, pk)
            has = [] if record is None else slot.wanted_keys(record, pk)
            gone = [key for key in had if key not in has]
            kept = [key for key in has if key in had] if renewed else []
            if slot.bound.unique and slot.state == "building" and (gone or kept):
                # records from before may share a value: only what names this one is its own
                asked = [*gone, *kept]
                own: set[str] = set()
                for key, entry in zip(asked, await self._store._entries(asked), strict=True):
                    if entry is not None and entry.value == value:
                        own.add(key)
                    else:  # nor may the rebuild make it so before the commit
                        ops.by_key.setdefault(key, Check(key, version_of(entry)))
                gone = [key for key in gone if key in own]
                kept = [key for key in kept if key in own]
            for key in gone:
                if key not in ops.by_key:
                    ops.delete(key)
            added = [key for key in has if key not in had]
            for key in (*kept, *added):
                prior = ops.by_key.get(key)
                if type(prior) is Put and prior.value != value:  # claimed by another record of this batch
                    raise self.taken(slot, key, prior.value.decode())
            for key in kept:
                ops.put(key, value, expires_at)
            for key in added:
                if slot.bound.unique:
                    ops.claim(key, slot, value, expires_at, taken_over.get(key, ABSENT))
                else:
                    ops.put(key, value, expires_at)

    async def resolve(self, known: Known, pk: str, conflict: Conflict, orphans: dict[str, bytes]) -> None:
        """Look at a claim that is not free: raise if its holder lives, else note that it may be taken over.

        A holder that comes back to the value meanwhile has to rewrite the claim, so its version decides.
        """
        orphans.pop(conflict.key, None)
        slot = next(slot for slot in known.maintained if conflict.key.startswith(slot.prefix))
        [claim] = await self._store._entries([conflict.key])
        if claim is None:
            return
        holder = claim.value.decode()
        if holder != pk:
            [held] = await self._store._entries([self._records + holder])
            if held is not None and claim.key in slot.stored_keys(self.decoded(held), holder):
                raise self.taken(slot, claim.key, holder)
        orphans[claim.key] = claim.version

    async def entries_of(self, known: Known, pk: str) -> IndexOps:
        """Find the entries of a record that cannot be read, by looking at all of them."""
        ops = IndexOps()
        for slot in known.maintained:
            start: str | None = slot.prefix
            while start is not None:
                page = await self._store._scan(start, prefix_end(slot.prefix), limit=500)
                for entry in page:
                    if entry.value.decode() == pk:
                        ops.delete(entry.key)
                start = page[-1].key + "!" if len(page) == 500 else None
        return ops

    def deletion(self, old: Entry) -> Delete:
        return Delete(old.key, old.version if self._store.capabilities.conditional_delete else None)


def _unconditional(op: Op) -> Op:
    """In a transaction, what was read is checked at the commit anyway."""
    return Put(op.key, op.value, None, op.expires_at) if type(op) is Put else op
