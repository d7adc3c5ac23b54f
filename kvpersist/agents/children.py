"""Records below a parent: their key begins with its id, and nothing is added once it is gone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any, Final, TypeVar
from uuid import UUID

import msgspec

from kvpersist import keys
from kvpersist.agents.births import Belongs, Births, Family, checks_of
from kvpersist.agents.family import Records
from kvpersist.agents.writers import atomic_writer, shown
from kvpersist.driver import ABSENT, Check, Delete, Entry, Op, Put
from kvpersist.errors import BadRequest, Conflict, ParentGone, UniqueConflict
from kvpersist.index import Index
from kvpersist.index.atomic_writer import AtomicWriter, IndexOps
from kvpersist.index.reads import OnCorrupt, decoded
from kvpersist.index.writer import live, version_of
from kvpersist.transaction import backoff

__all__ = ["Children"]

R = TypeVar("R", bound=msgspec.Struct)

_ATTEMPTS: Final = 40  # of a write that keeps losing to others
_BIRTH: Final = b"1"
_PAGE: Final = 250  # children read at once


class Children(Records[R]):
    """Records kept below a parent: its id is the first field of their key, or their whole key."""

    def __init__(
        self,
        family: Family,
        type: type[R],
        *,
        name: str,
        key: str | tuple[str, ...],
        parents: Births,
        indexes: Iterable[Index] = (),
        belongs: Sequence[Belongs] = (),
        **options: Any,
    ) -> None:
        field = key if isinstance(key, str) else key[0]
        below = Belongs(field, parents)
        super().__init__(family, type, name=name, key=key, indexes=indexes, belongs=(below, *belongs), **options)
        self._parents = parents
        self._guard_prefix = keys.meta_prefix(family.space, name, "stat")
        parents.deletions.guards.append((self._store, self._guard_prefix))

    async def of(
        self,
        parent: str | UUID,
        *,
        limit: int | None = None,
        reverse: bool = False,
        on_corrupt: OnCorrupt | None = None,
    ) -> list[R]:
        """Return the records below a parent in the order of their keys, all or the first ``limit`` of them.

        Args:
            reverse: the last ones first.
            on_corrupt: is handed the error of each damaged record, which is left out; without it, it is raised.
        """
        entries = await self._below(keys.encode(str(parent)), None if reverse else limit)
        if reverse:
            entries.reverse()
        return list(decoded(self.repository._codec, entries[:limit], on_corrupt))

    async def delete_all(self, parent: str | UUID) -> int:
        """Remove the records below a parent; return how many there were. As `replace_all` by nothing."""
        had = len(await self._below(keys.encode(str(parent))))
        try:
            await self.replace_all(parent, ())
        except ParentGone:
            return 0
        return had

    async def replace_all(self, parent: str | UUID, items: Iterable[R]) -> list[R]:
        """Let ``items`` be all the records below a parent; return them as they are stored.

        What is there and equal is not written. Where batches are atomic this is one batch, whole or not at
        all, and of several at once each replaces the other as a whole. Elsewhere what is new or changed is
        written first, and what is left over is removed then.

        Raises:
            ParentGone: there is no such parent; nothing was changed.
            BadRequest: an item belongs to another parent, or two have one key.
        """
        id_ = str(parent)
        part = keys.encode(id_)
        await self._family.own()
        given = list(items)
        for attempt in range(_ATTEMPTS):
            checks = (await self._parents.check(id_),)
            entries, guard = await self._below(part), Check("", ABSENT)
            if isinstance(self.repository._writer, AtomicWriter):
                [found] = await self._store._entries([self._guard_prefix + part])
                guard = Check(self._guard_prefix + part, version_of(found))
            stored = {entry.key[len(self.repository._prefix) :]: entry for entry in entries}
            wanted = self._wanted(id_, given, stored)
            more = [each for record in wanted.values() for each in await checks_of(self._belongs[1:], record)]
            checks = tuple({check.key: check for check in (*checks, *more)}.values())
            try:
                if isinstance(self.repository._writer, AtomicWriter):
                    if not await self._replace_at_once(stored, wanted, checks, guard):
                        continue
                elif not await self._replace_in_order(stored, wanted, checks):
                    continue
            except UniqueConflict:
                raise
            except Conflict as conflict:
                self._family.forget(conflict.key)
                if conflict.key == self.repository._definitions.key:
                    await self.repository._definitions.refresh()
                await backoff(attempt)
                continue
            return list(wanted.values())
        raise Conflict(self.repository._prefix + part, None)

    def _wanted(self, parent: str, items: Sequence[R], stored: Mapping[str, Entry]) -> dict[str, R]:
        """Return the records to be there, by their encoded keys; what is equal but for its times as it is."""
        wanted: dict[str, R] = {}
        field = self._key[0]
        for item in items:
            self._refuse_type(item)
            if getattr(item, field) != parent:
                raise BadRequest(f"{field} is {getattr(item, field)!r}: the item does not belong to {parent!r}")
            made = self._new(item)
            pk = self.repository._pk_of(made)
            if pk in stored:
                before = self._decode(stored[pk])
                made = before if self._same(item, before) else self._renewed(item, before)
            if pk in wanted:
                raise BadRequest(f"two items have the key {shown(pk)!r}")
            wanted[pk] = made
        return wanted

    def _same(self, item: R, before: R) -> bool:
        """Whether ``item`` says nothing that is not stored; times that it leaves open count as the stored ones."""
        given: Any = msgspec.structs.replace(item)
        for field, has in zip(("created_at", "updated_at"), self._has_times, strict=True):
            if has and getattr(given, field) is None:
                setattr(given, field, getattr(before, field))
        return given == before

    async def _replace_at_once(
        self, stored: Mapping[str, Entry], wanted: Mapping[str, R], checks: Sequence[Check], guard: Check
    ) -> bool:
        writer = atomic_writer(self.repository)
        known = await self.repository._definitions.known()
        ops = IndexOps()
        main: list[Op] = []
        gone = [(pk, entry) for pk, entry in stored.items() if pk not in wanted]
        changed = [(pk, record) for pk, record in wanted.items() if self._differs(pk, record, stored.get(pk))]
        if not gone and not changed:
            return True
        for pk, entry in gone:
            await writer.index_ops(ops, known, pk, entry, None, None, {})
            main.append(writer.deletion(entry))
        for pk, record in changed:  # what is given up comes before what is claimed
            old = stored.get(pk)
            for slot in known.maintained if old is not None else ():
                has = slot.keys(record, pk)
                for each in slot.stored_keys(writer.decoded(old), pk):
                    if each not in has and slot.state != "building":
                        ops.delete(each)
        for pk, record in changed:
            old, key = stored.get(pk), self.repository._prefix + pk
            main.append(Put(key, writer.encoded(key, record, old, known), version_of(old)))
            await writer.index_ops(ops, known, pk, old, record, None, {})
        stamp = Put(guard.key, _BIRTH, guard.expect)  # two at once differ here, whatever they write
        try:
            carried = checks if self._together else ()
            version = await self._store._commit([*carried, known.check, stamp, *main, *ops.by_key.values()])
        except Conflict as conflict:
            slot = ops.claims.get(conflict.key)
            if slot is not None:  # a value of another parent's record, or of one that is gone
                await writer.resolve(known, "", conflict, {})
            raise
        if self._together or await self._stands([pk for pk, _ in changed], checks):
            return True
        conditional = self._store.capabilities.conditional_delete
        with suppress(Conflict):  # somebody else has replaced them since
            await self._store._commit([Delete(guard.key, version if conditional else None)])
        return False

    async def _replace_in_order(
        self, stored: Mapping[str, Entry], wanted: Mapping[str, R], checks: Sequence[Check]
    ) -> bool:
        writer = self.repository._writer
        for pk, record in wanted.items():
            self.repository._codec.encode(self.repository._prefix + pk, record)
        written: list[str] = []
        for pk, record in wanted.items():
            if self._differs(pk, record, stored.get(pk)):
                await writer.save(pk, record)
                written.append(pk)
        for pk in stored:
            if pk not in wanted:
                await writer.remove(pk)
        return await self._stands(written, checks)

    async def _stands(self, written: Sequence[str], checks: Sequence[Check]) -> bool:
        """Look at the parents again after a write that could not carry the checks; False: it was taken back."""
        if await self._family.holds(checks):
            return True
        for check in checks:
            self._family.forget(check.key)
        for pk in written:
            await self.repository._writer.remove(pk)
        return False

    def _differs(self, pk: str, record: R, old: Entry | None) -> bool:
        return old is None or self._decode(old) != record

    async def _below(self, part: str, limit: int | None = None) -> list[Entry]:
        start = self.repository._prefix + part
        end = keys.prefix_end(start + "!")
        found: list[Entry] = []
        while True:
            page = await self._store._scan(start, end, limit=_PAGE)
            found += [entry for entry in page if live(entry) is not None]
            if len(page) < _PAGE or (limit is not None and len(found) >= limit):
                return found
            start = page[-1].key + "!"  # no key lies between a key and itself + '!'
