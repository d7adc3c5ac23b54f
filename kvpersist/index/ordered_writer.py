"""Writing a record and its index entries where a batch is applied operation by operation.

At every moment, and after a crash at any:

* an index entry may be stale, never missing;
* two live records never hold one unique value, and a live record is found by its own;
* what was acknowledged stays.

A save reads all versions first, claims the new unique values, puts the new entries, then the record
(the commit point), and only then removes what is stale. Five traps, each of which alone breaks it:

* A claim is taken over only after its holder's record was rewritten unchanged (*fenced*), so that a
  save of the holder that is under way cannot commit any more.
* Entries and claims are removed only at the version read before the own commit point: somebody may
  have moved back to them since.
* The place of a deleted record keeps a tombstone (an empty value), so that "absent" never means two
  different things to a save that began before.
* Entries never expire by themselves: a save that lost could otherwise shorten the life of the
  winner's. What a record's expiry leaves behind is stale, and removed by readers.
* No record's life is set to less than 60 seconds, longer than a save that began before can last: an
  expired record's place is "absent" once more.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, TypeVar

from kvpersist.driver import Delete, Entry, Expect, Op, Put
from kvpersist.errors import Conflict, CorruptRecord, KvError, UniqueConflict, Unsupported
from kvpersist.index.definitions import Known, Slot
from kvpersist.index.writer import ATTEMPTS, SHORTEST_LIFE, TOMBSTONE, UNREAD, Writer, live, too_short, version_of

__all__ = ["OrderedWriter"]

R = TypeVar("R")

_WINDOW: Final = 15.0  # seconds from the first read of a save to its last write; then it starts again
_LEAST: Final = 50.0  # seconds that a record still has to live when its save starts again: twice what a save takes
_TOMBSTONE_LIFE: Final = 30 * 86_400.0  # seconds


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
        asked = self._store.clock()
        if expect is not None or old is not UNREAD:
            self._need_conditions()
        for attempt in range(ATTEMPTS):
            known = await self._definitions.fresh()
            started = self._store.clock()
            stored = old
            if old is UNREAD and (known.maintained or known.newer):
                [stored] = await self._store._entries([key])
                self._required(key, stored, expect)
            seen = None if stored is UNREAD else live(stored)
            data = self.encoded(key, record, seen, known)
            if known.maintained and old is UNREAD and expires_at is not None:
                if expires_at <= asked:
                    await self.remove(pk, expect=expect if isinstance(expect, bytes) else None)
                    return b""
                if expires_at - asked < SHORTEST_LIFE:
                    raise too_short()
                if expires_at - started < _LEAST:
                    raise Conflict(key, expect)
            if not known.maintained:
                wanted = expect if stored is UNREAD else version_of(stored)
                return await self._store._commit((Put(key, data, wanted, expires_at),))
            try:
                before = self.decoded(seen)
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
                raise Conflict(key, version_of(stored))
            await self.back_off(attempt)
        raise Conflict(key, expect)

    async def remove(self, pk: str, *, expect: bytes | None = None) -> bool:
        key = self._records + pk
        if expect is not None:
            self._need_conditions()
        for attempt in range(ATTEMPTS):
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
                before = self.decoded(old)
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
        record = self.decoded(stored)
        assert record is not None  # an entry decodes to a record, or raises
        version = await self._write(
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
        if version is None:
            raise Conflict(stored.key, stored.version)

    async def discard(self, slot: Slot, entry: Entry) -> bool:
        capabilities = self._store.capabilities
        if not capabilities.conditional:
            return False
        holder = entry.value.decode()
        key = self._records + holder
        [stored] = await self._store._entries([key])
        held = live(stored)
        if held is not None and entry.key in slot.stored_keys(self.decoded(held), holder):
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
            had = [] if slot.slot in rebuilt else self.held_keys(slot, before, pk)
            if rebuilt or record is None:
                has = self.held_keys(slot, record, pk)
            else:
                has = slot.wanted_keys(record, pk)
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
            foreign = held is not None and held.value not in (pk.encode(), TOMBSTONE)
            if held is not None and foreign and not await self._freed(slot, claim, held.value.decode()):
                return None
            # written even where it names this record: the new version is what stops others under way
            ops.append(Put(claim, pk.encode(), version_of(held)))
        ops.extend(Put(entry, pk.encode()) for entry in entries)
        if self._store.clock() - started > _WINDOW:
            return None  # too late to be sure that the definition, and what was read, still hold
        if data == TOMBSTONE:
            expires_at = self._store.clock() + _TOMBSTONE_LIFE
        conditional = self._store.capabilities.conditional
        ops.append(Put(key, data, version_of(stored) if conditional else None, expires_at))
        version = await self._store._commit(ops)  # the last operation is the commit point
        if conditional:
            mine = [entry for each in stale if (entry := seen[each]) is not None and entry.value == pk.encode()]
            await self._clean(mine)
        return version

    async def _freed(self, slot: Slot, claim: str, holder: str) -> bool:
        """Make sure that ``holder`` neither has the claimed value nor is about to; False: start again.

        Raises:
            UniqueConflict: it has it.
        """
        key = self._records + holder
        [stored] = await self._store._entries([key])
        held = live(stored)
        if held is not None and claim in slot.stored_keys(self.decoded(held), holder):
            raise self.taken(slot, claim, holder)
        try:
            await self._fence(key, stored)
        except Conflict:
            return False
        return True

    async def _fence(self, key: str, stored: Entry | None) -> None:
        """Rewrite a record as it is, so that no save that read it before can commit. Raises Conflict."""
        if stored is None or stored.value == TOMBSTONE:
            until = self._store.clock() + _TOMBSTONE_LIFE
            await self._store._commit((Put(key, TOMBSTONE, version_of(stored), until),))
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
        return Put(entry.key, TOMBSTONE, entry.version, self._store.clock() + SHORTEST_LIFE)

    def _gone(self, old: Entry) -> Op:
        return Delete(old.key, old.version if self._store.capabilities.conditional_delete else None)

    def _need_conditions(self) -> None:
        if not self._store.capabilities.conditional:
            raise Unsupported("insert, update and expect=", "it has no conditional writes: put is what it can do")
