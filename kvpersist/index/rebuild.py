"""Building, dropping and checking indexes while others read and write."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, Generic, Literal, TypeVar

import msgspec

from kvpersist import keys
from kvpersist.codec import RecordCodec
from kvpersist.driver import ABSENT, Check, Delete, Entry, Op, Put
from kvpersist.errors import BadOption, Conflict, CorruptRecord, KvError, SchemaChanged, UniqueConflict
from kvpersist.index.declaration import BoundIndex
from kvpersist.index.definitions import BytesStore, Definition, Definitions, Known, Slot, State
from kvpersist.index.ordered_writer import OrderedWriter
from kvpersist.index.writer import Sleep, Writer, live

__all__ = ["GRACE", "Damage", "Duplicate", "Reindexed", "Reindexer"]

R = TypeVar("R")

GRACE: Final = 60.0
"""Seconds after which nobody trusts a definition that was read before; twice what they trust it for."""

_PAGE: Final = 100  # records looked at together
_CLEARED: Final = 500  # entries removed together
_REPORTED: Final = 100  # duplicates named
_ATTEMPTS: Final = 40  # at a record that keeps changing


class Duplicate(msgspec.Struct, frozen=True):
    """Two records with one value of a unique index."""

    index: str
    value: str
    record: str
    holder: str


class Reindexed(msgspec.Struct, frozen=True):
    """What `Repository.reindex` did.

    Attributes:
        indexes: those that are readable now and were not before.
        records: how many were looked at.
        removed: entries of replaced indexes that went.
        duplicates: what keeps unique indexes from becoming readable, at most 100 of them: change or
            delete one record of each pair and reindex again.
    """

    indexes: tuple[str, ...]
    records: int
    removed: int
    duplicates: tuple[Duplicate, ...] = ()


class Damage(msgspec.Struct, frozen=True):
    """One disagreement between records and indexes.

    ``kind``: "missing": a record without its entry; "stale": an entry without its record;
    "duplicate": a record whose unique value another one holds; "corrupt": a record that cannot be read.
    """

    kind: Literal["missing", "stale", "duplicate", "corrupt"]
    index: str
    key: str
    record: str


class _Cursor(msgspec.Struct, frozen=True):
    """How far the building of one slot has come: the key to go on from."""

    slot: str
    start: str


class Reindexer(Generic[R]):
    """The slow operations of one repository."""

    def __init__(
        self,
        store: BytesStore,
        definitions: Definitions,
        codec: RecordCodec[R],
        indexes: Sequence[BoundIndex],
        records: str,
        writer: Writer[R],
        sleep: Sleep,
    ) -> None:
        self._store = store
        self._definitions = definitions
        self._codec = codec
        self._indexes = indexes
        self._records = records
        self._end = keys.prefix_end(records)
        self._writer = writer
        self._sleep = sleep

    # ---- build

    async def reindex(self, progress: Callable[[int], None] | None) -> Reindexed:
        """See `Repository.reindex`."""
        known = await self._definitions.declare()
        building = [slot for slot in known.named.values() if slot.state == "building"]
        duplicates: list[Duplicate] = []
        records = 0
        if building:
            start = await self._started(building)
            records = await self._backfill(building, start, duplicates, progress)
            blocked = {each.index for each in duplicates}
            done = [slot for slot in building if slot.bound.name not in blocked]
            known = await self._finish(done)
            building = done
        removed = await self._retire(known.definition)
        return Reindexed(tuple(slot.bound.name for slot in building), records, removed, tuple(duplicates[:_REPORTED]))

    async def _started(self, building: Sequence[Slot]) -> str:
        """Return where to begin: behind what is done in all of ``building``."""
        starts: list[str] = []
        new: list[Op] = []
        entries = await self._store._entries([self._cursor_key(slot.bound.name) for slot in building])
        for slot, entry in zip(building, entries, strict=True):
            cursor = _CURSOR.decode(entry.value) if entry is not None else None
            if cursor is None or cursor.slot != slot.slot:
                starts.append(self._records)
                new.append(Put(self._cursor_key(slot.bound.name), _PACKED.encode(_Cursor(slot.slot, self._records))))
            else:
                starts.append(cursor.start)
        if new:
            if isinstance(self._writer, OrderedWriter):
                await self._sleep(GRACE)  # for writers that do not know of the index yet
            for op in new:
                await self._store._commit((op,))
        return min(starts)

    async def _backfill(
        self,
        building: Sequence[Slot],
        start: str,
        duplicates: list[Duplicate],
        progress: Callable[[int], None] | None,
    ) -> int:
        records = 0
        at: str | None = start
        while at is not None:
            page = await self._store._scan(at, self._end, limit=_PAGE)
            await self._fill(building, [entry for entry in page if live(entry) is not None], duplicates)
            records += len(page)
            at = page[-1].key + "!" if len(page) == _PAGE else None
            if at is not None and not duplicates:  # after a duplicate, the next run has to see all again
                for slot in building:
                    cursor = _PACKED.encode(_Cursor(slot.slot, at))
                    await self._store._commit((Put(self._cursor_key(slot.bound.name), cursor),))
            if progress is not None:
                progress(records)
        return records

    async def _fill(self, building: Sequence[Slot], page: Sequence[Entry], duplicates: list[Duplicate]) -> None:
        """Bring the records of one page into the slots, reading again those that change meanwhile."""
        for _ in range(_ATTEMPTS):
            if isinstance(self._writer, OrderedWriter):
                again = await self._fill_in_order(self._writer, building, page, duplicates)
            else:
                again = await self._fill_at_once(building, page, duplicates)
            if not again:
                return
            maintained = {slot.slot for slot in (await self._definitions.refresh()).maintained}
            if any(slot.slot not in maintained for slot in building):
                raise SchemaChanged(self._definitions.collection, "an index was dropped while it was being built")
            page = [entry for entry in await self._store._entries(again) if entry is not None and live(entry)]
        raise Conflict(page[0].key if page else self._definitions.key, None)

    async def _fill_at_once(
        self, building: Sequence[Slot], page: Sequence[Entry], duplicates: list[Duplicate]
    ) -> list[str]:
        """Commit one batch per record; return the keys of those that changed."""
        check = (await self._definitions.known()).check
        wanted: list[tuple[Entry, dict[str, Slot]]] = [(entry, self._keys(building, entry)) for entry in page]
        claims = [key for _, found in wanted for key, slot in found.items() if slot.bound.unique]
        held = dict(zip(claims, await self._store._entries(claims), strict=True))
        batches: list[list[Op]] = []
        filled: list[str] = []
        first: dict[str, str] = {}  # claims of this page: a second one in it is judged when it is read again
        later: list[str] = []
        for entry, found in wanted:
            pk = entry.key[len(self._records) :]
            ops: list[Op] = [check, Check(entry.key, entry.version)]
            if any(first.setdefault(key, pk) != pk for key, slot in found.items() if slot.bound.unique):
                later.append(entry.key)
                continue
            for key, slot in found.items():
                claim = held.get(key)
                if not slot.bound.unique:
                    ops.append(Put(key, pk.encode(), None, entry.expires_at))
                elif claim is None:
                    ops.append(Put(key, pk.encode(), ABSENT, entry.expires_at))
                elif claim.value.decode() == pk:
                    ops.append(Put(key, pk.encode(), claim.version, entry.expires_at))
                elif await self._accounts(slot, claim):
                    duplicates.append(self._duplicate(slot, claim, pk))
                else:
                    ops.append(Put(key, pk.encode(), claim.version, entry.expires_at))
            if len(ops) > 2:
                batches.append(ops)
                filled.append(entry.key)
        outcomes = await self._store._commit_each(batches) if batches else []
        for key, outcome in zip(filled, outcomes, strict=True):
            if isinstance(outcome, Conflict):
                later.append(key)
            elif isinstance(outcome, KvError):
                raise outcome
        return later

    async def _fill_in_order(
        self,
        ordered: OrderedWriter[R],
        building: Sequence[Slot],
        page: Sequence[Entry],
        duplicates: list[Duplicate],
    ) -> list[str]:
        again: list[str] = []
        claimed = [slot for slot in building if slot.bound.unique]
        plain = [slot for slot in building if not slot.bound.unique]
        for entry in page:
            pk = entry.key[len(self._records) :]
            for key in self._keys(plain, entry):  # may be stale by now, which is no harm
                await self._store._commit((Put(key, pk.encode()),))
            for slot in claimed:
                if not self._keys([slot], entry):
                    continue
                try:
                    [stored] = await self._store._entries([entry.key])
                    if stored is not None and live(stored) is not None:
                        await ordered.rebuild([slot], pk, stored)
                except UniqueConflict as conflict:
                    duplicates.append(Duplicate(conflict.index, conflict.value, pk, conflict.holder))
                except Conflict:
                    again.append(entry.key)
        return again

    def _keys(self, slots: Sequence[Slot], entry: Entry) -> dict[str, Slot]:
        """Return the keys that a record has in ``slots``; none for one that cannot be read."""
        try:
            record = self._codec.decode(entry.key, entry.value)
        except CorruptRecord:  # verify() reports it; it could not be found and read either
            return {}
        pk = entry.key[len(self._records) :]
        return {key: slot for slot in slots for key in slot.stored_keys(record, pk)}

    async def _accounts(self, slot: Slot, claim: Entry) -> bool:
        """Whether the record that a claim names has the claimed value."""
        [held] = await self._store._entries([self._records + claim.value.decode()])
        held = live(held)
        return held is not None and claim.key in self._keys([slot], held)

    def _duplicate(self, slot: Slot, claim: Entry, pk: str) -> Duplicate:
        value = slot.bound.shown(claim.key[len(slot.prefix) :])
        return Duplicate(slot.bound.name, value, pk, claim.value.decode())

    async def _finish(self, done: Sequence[Slot]) -> Known:
        """Make slots readable, and those they replace no longer so."""
        definition = (await self._definitions.refresh()).definition
        names = {slot.bound.name for slot in done}
        slots = {slot.slot for slot in done}
        states: dict[str, State | None] = {}
        for each in definition.indexes:
            if each.slot in slots and each.state == "building":
                states[each.slot] = "readable"
            elif each.name in names and each.state in ("building", "readable"):
                states[each.slot] = "dropping"
        await self._definitions.write_states(states)
        for slot in done:
            await self._store._commit((Delete(self._cursor_key(slot.bound.name)),))
        return await self._definitions.refresh()

    # ---- drop

    async def drop(self, name: str) -> int:
        """See `Repository.drop_index`."""
        definition = await self._definitions.stored()
        found = [each for each in definition.indexes if each.name == name]
        if not found:
            known = ", ".join(sorted({each.name for each in definition.indexes})) or "none"
            raise BadOption("drop_index", f"no index {name!r}; there are: {known}")
        states: dict[str, State | None] = {
            each.slot: "dead" if each.spec.computed else "dropping" for each in found if each.state != "dead"
        }
        await self._definitions.write_states(states)
        return await self._retire(await self._definitions.stored(), name)

    async def _retire(self, definition: Definition, name: str | None = None) -> int:
        """Remove the slots that are dropping or dead, when nobody reads them any more."""
        going = [
            each
            for each in definition.indexes
            if each.state in ("dropping", "dead") and (name is None or each.name == name)
        ]
        if not going:
            return 0
        if any(each.state == "dropping" for each in going) or isinstance(self._writer, OrderedWriter):
            await self._sleep(GRACE)
        await self._definitions.write_states({each.slot: "dead" for each in going})
        if isinstance(self._writer, OrderedWriter):
            await self._sleep(GRACE)  # for writers that still maintain them
        removed = 0
        for each in going:
            removed += await self._cleared(self._definitions.prefix(each.slot))
            await self._store._commit((Delete(self._cursor_key(each.name)),))  # the slot's name may be used again
        await self._definitions.write_states({each.slot: None for each in going})
        return removed

    async def _cleared(self, prefix: str) -> int:
        removed = 0
        while page := await self._store._scan(prefix, keys.prefix_end(prefix), limit=_CLEARED, keys_only=True):
            for outcome in await self._store._commit_each([(Delete(entry.key),) for entry in page]):
                if isinstance(outcome, KvError):
                    raise outcome
            removed += len(page)
        return removed

    # ---- verify

    async def verify(self, repair: bool, *, below: str = "", limit: int | None = None) -> list[Damage]:
        """See `Repository.verify`.

        Args:
            below: only the records at this encoded key and below it; entries are then not looked through.
            limit: end when so much was found.
        """
        known = await self._definitions.refresh()
        found: list[Damage] = []
        at: str | None = self._records + below
        end = keys.prefix_end(f"{at}!") if below else self._end
        while at is not None:
            page = await self._store._scan(at, end, limit=_PAGE)
            for entry in page:
                if live(entry) is not None:
                    found.extend(await self._verified(known, entry))
            at = page[-1].key + "!" if len(page) == _PAGE else None
            if limit is not None and len(found) >= limit:
                return found
        for slot in known.maintained if not below else ():
            at = slot.prefix
            while at is not None:
                page = await self._store._scan(at, keys.prefix_end(slot.prefix), limit=_PAGE, deref=self._records)
                for entry in page:
                    if await self._is_stale(slot, entry):
                        found.append(Damage("stale", slot.bound.name, entry.key, entry.value.decode()))
                        if repair:
                            await self._writer.discard(slot, entry)
                at = page[-1].key + "!" if len(page) == _PAGE else None
        if repair:
            for damage in found:
                if damage.kind == "missing":
                    await self._mend(known, damage)
        return found

    async def _verified(self, known: Known, entry: Entry) -> list[Damage]:
        """Compare one record with its entries, again if it changed meanwhile."""
        for _ in range(_ATTEMPTS):
            pk = entry.key[len(self._records) :]
            try:
                self._codec.decode(entry.key, entry.value)
            except CorruptRecord:
                return [Damage("corrupt", "", entry.key, pk)]
            slots = [slot for slot in known.maintained if slot.state != "building"]
            wanted = self._keys(slots, entry)
            held = await self._store._entries(list(wanted))
            damaged: list[Damage] = []
            for (key, slot), found in zip(wanted.items(), held, strict=True):
                if found is not None and found.value.decode() == pk:
                    continue
                taken = found is not None and await self._accounts(slot, found)
                damaged.append(Damage("duplicate" if taken else "missing", slot.bound.name, key, pk))
            if not damaged:
                return []
            [again] = await self._store._entries([entry.key])
            if again is None or live(again) is None:
                return []
            if again.version == entry.version:
                return damaged
            entry = again
        return []

    async def _is_stale(self, slot: Slot, entry: Entry) -> bool:
        """Whether an entry of a ``deref`` scan is one that its record does not account for."""
        held = live(entry.target)
        try:
            if held is not None and self._accounted(slot, entry, held):
                return False
            again, stored = await self._store._entries([entry.key, self._records + entry.value.decode()])
            held = live(stored)
            if again is None or again.version != entry.version:
                return False
            return held is None or not self._accounted(slot, entry, held)
        except CorruptRecord:  # reported as such
            return False

    def _accounted(self, slot: Slot, entry: Entry, held: Entry) -> bool:
        record = self._codec.decode(held.key, held.value)
        return entry.key in slot.stored_keys(record, entry.value.decode())

    async def _mend(self, known: Known, damage: Damage) -> None:
        """Write a missing entry, unless its record changed: then its writer has done so."""
        slot = next(slot for slot in known.maintained if damage.key.startswith(slot.prefix))
        [entry] = await self._store._entries([self._records + damage.record])
        if entry is not None and live(entry) is not None:
            await self._fill([slot], [entry], [])

    def _cursor_key(self, name: str) -> str:
        return f"{self._definitions.key}:cursor!{name}"


_PACKED: Final = msgspec.msgpack.Encoder()
_CURSOR: Final = msgspec.msgpack.Decoder(_Cursor)
