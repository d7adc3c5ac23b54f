"""Births of records that others belong to: the keys that show that they live, and what is checked against them.

`kvpersist.agents.family` tells how they are used.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any, Final

import msgspec

from kvpersist import keys
from kvpersist.agents.deletion import PENDING, Beside, Cascade, Deletions, require
from kvpersist.agents.writers import atomic_writer, ordered_writer, taken
from kvpersist.driver import ABSENT, Check, Delete, Entry, Op, Put
from kvpersist.errors import Conflict, ParentGone, UniqueConflict
from kvpersist.index.writer import live, version_of
from kvpersist.repository import Repository
from kvpersist.store import Store
from kvpersist.transaction import backoff

__all__ = ["Belongs", "Births", "Family", "checks_of", "given_up"]

_ATTEMPTS: Final = 40  # of a write that keeps losing to others
_BIRTH: Final = b"1"
_LEFT: Final = b""  # of one that is being removed, because nobody came to store its record
_IDLE: Final = 600.0  # seconds after which nobody is at a creation any more
_PAGE: Final = 250  # birth keys read at once
_REMEMBERED: Final = 4096  # birth keys per kind


class Family:
    """The kinds of records of one namespace that others belong to, and the collections of those others."""

    def __init__(self, store: Store, namespace: str, *, elsewhere: Mapping[str, Store] | None = None) -> None:
        """``elsewhere``: collections that are kept in another store. Nothing belongs to their records."""
        self.store = store
        self.elsewhere: dict[str, Store] = dict(elsewhere or {})
        self.namespace = namespace
        self.space: str = keys.namespace(namespace)
        self.atomic: bool = store.capabilities.atomic_batch != "none"
        self.births: dict[str, Births] = {}
        self.repositories: dict[str, Repository[Any]] = {}
        self.belongs: dict[str, tuple[Belongs, ...]] = {}
        self.owned: bool = False

    async def own(self) -> None:
        """Note that plain writes have no place in this namespace."""
        if not self.owned:
            for store in dict.fromkeys((self.store, *self.elsewhere.values())):
                await store._own(self.space)
            self.owned = True

    def now(self) -> datetime:
        """The store's time."""
        return datetime.fromtimestamp(self.store.clock(), UTC)

    async def finish_all(self) -> int:
        """Finish every deletion that was begun and not finished; return how many there were."""
        return sum([await births.deletions.finish_all() for births in self.births.values()])

    async def remove_unborn(self) -> int:
        """Remove what creations that were interrupted left; return how many there were."""
        return sum([await births.remove_unborn() for births in self.births.values()])

    def forget(self, key: str) -> bool:
        """Read a birth key again before it is next relied on; False: ``key`` is none, nor a marker."""
        return any(births.forget(key) for births in self.births.values())

    async def holds(self, checks: Sequence[Check]) -> bool:
        """Whether everything is still as the checks say."""
        found = await self.store._entries([check.key for check in checks])
        return all(version_of(entry) == check.expect for entry, check in zip(found, checks, strict=True))


class Births:
    """The birth keys of one collection, and the deletions of what belongs to its records."""

    def __init__(self, family: Family, repository: Repository[Any], *, beside: Beside | None = None) -> None:
        """``beside``: removes what is kept beside a record, where batches are not atomic."""
        self.kind: str = repository.name
        self.repository = repository
        self._family = family
        self._store = family.store
        self.prefix: str = keys.meta_prefix(family.space, self.kind, "birth")
        self.deleting_prefix: str = keys.meta_prefix(family.space, self.kind, "deleting")
        self.making_prefix: str = f"{family.space}:{self.kind}##making:"  # no index has such a name
        self.deletions = Deletions(family.store, repository, self.prefix, self.deleting_prefix, beside)
        self._beside = beside
        self._known: OrderedDict[str, Check] = OrderedDict()
        family.births[self.kind] = self

    def also(self, cascade: Cascade) -> None:
        """Let ``cascade`` remove what belongs to a deleted record."""
        self.deletions.cascades.append(cascade)

    async def check(self, id: str) -> Check:
        """Return the condition that the record of ``id`` lives, for every batch below it.

        Raises:
            ParentGone: there is no such record, as far as is known here.
        """
        part = keys.encode(id)
        found = self._known.get(part)
        if found is None:
            [entry] = await self._store._entries([self.prefix + part])
            if entry is None:
                raise ParentGone(self.kind, id)
            found = Check(entry.key, entry.version)
            self.remember(part, found)
        return found

    async def check_or_absent(self, id: str) -> tuple[Check, ...]:
        """Return the condition that the record of ``id`` lives, or that there is none, as it is now."""
        part = keys.encode(id)
        if part in self._known:
            return (self._known[part],)
        birth_key, marker_key = self.prefix + part, self.deleting_prefix + part
        while True:
            birth, marker = await self._store._entries([birth_key, marker_key])
            if birth is not None:
                return (await self.check(id),)
            if marker is None or marker.value != PENDING:
                return Check(birth_key, ABSENT), Check(marker_key, version_of(marker))
            await self.deletions.finish(part)

    def remember(self, part: str, check: Check) -> None:
        """Spare the next check a read."""
        self._known[part] = check
        if len(self._known) > _REMEMBERED:
            self._known.popitem(last=False)

    def forget(self, key: str) -> bool:
        """As `Family.forget`."""
        for prefix in (self.prefix, self.deleting_prefix):
            if key.startswith(prefix):
                self._known.pop(key[len(prefix) :], None)
                return True
        return False

    async def bear(
        self,
        part: str,
        record: Any,
        checks: Callable[[], Awaitable[Sequence[Check]]],
        beside: Callable[[Entry | None], list[Op]] | None = None,
        beside_key: str = "",
    ) -> tuple[Check, bytes]:
        """Create a record with its birth key; return the check of that and the version of what is beside it.

        Args:
            part: the record's encoded id.
            checks: asks for what the record's own parents have to fulfil, again after each conflict.
            beside: what is written with it, made of what lies at ``beside_key`` already.

        Raises:
            UniqueConflict: there is a record of this id, or of a unique value.
            ParentGone: as ``checks`` does.
        """
        if not self._family.atomic:
            return await self._bear_in_order(part, record, checks, beside, beside_key)
        key, writer = self.repository._prefix + part, atomic_writer(self.repository)
        birth_key, marker_key = self.prefix + part, self.deleting_prefix + part
        more = [] if beside is None else beside(None)
        for attempt in range(_ATTEMPTS):
            also = [Check(marker_key, ABSENT), Put(birth_key, _BIRTH, ABSENT), *more, *await checks()]
            try:
                version = await writer.save(part, record, expect=ABSENT, also=also)
            except UniqueConflict:
                raise
            except Conflict as conflict:
                if conflict.key in (birth_key, key):
                    raise taken(part) from conflict
                if conflict.key == marker_key:
                    await self.deletions.finish(part, begin_anew=True)
                elif not self._family.forget(conflict.key):
                    raise
                await backoff(attempt)
                continue
            check = Check(birth_key, version)
            self.remember(part, check)
            return check, version
        raise Conflict(key, ABSENT)

    async def _bear_in_order(
        self,
        part: str,
        record: Any,
        checks: Callable[[], Awaitable[Sequence[Check]]],
        beside: Callable[[Entry | None], list[Op]] | None,
        beside_key: str,
    ) -> tuple[Check, bytes]:
        """Birth key and what is beside first, the record last: a record that can be seen can be written to.

        A birth key without a record is another's who is at it, or was: it is written anew, so that this one
        does not take it back. It holds the time: after ten minutes `remove_unborn` may take it away, and who
        comes through only then begins anew.
        """
        key, birth_key = self.repository._prefix + part, self.prefix + part
        self.repository._codec.encode(key, record)  # what cannot be kept fails before anything is written
        for attempt in range(_ATTEMPTS):
            await self.deletions.finish(part, begin_anew=True)
            looked_at = [key, birth_key, *([beside_key] if beside_key else ())]
            stored, birth, *old = await self._store._entries(looked_at)
            if live(stored) is not None:
                raise taken(part)
            conditions = await checks()
            mine: list[tuple[str, bytes]] = []
            beside_version = b""
            try:
                version = await self._store._commit([Put(birth_key, self._now(), version_of(birth))])
                mine.append((birth_key, version))
                if beside is not None:
                    ops = beside(old[0])
                    beside_version = await self._store._commit(ops)
                    mine += [(op.key, beside_version) for op in ops]
                saved = await ordered_writer(self.repository).save(part, record, old=stored)
                check = await self._born(part, version)
                if check is not None:
                    break
                with suppress(Conflict):  # somebody else has changed it: the next attempt finds it
                    await ordered_writer(self.repository).remove(part, expect=saved)
            except UniqueConflict:
                if birth is None:
                    await self._unborn(mine)
                raise
            except Conflict as conflict:
                if conflict.key == key:
                    raise taken(part) from conflict
                await backoff(attempt)
        else:
            raise Conflict(key, ABSENT)
        if not await self._family.holds(conditions):
            for condition in conditions:
                self._family.forget(condition.key)
            try:
                await checks()
            except ParentGone:
                await self.kill(part)
                raise
        self.remember(part, check)
        return check, beside_version

    async def _born(self, part: str, version: bytes) -> Check | None:
        """Return the check of a record that was just stored; None: its birth key was taken away, as left over."""
        birth_key = self.prefix + part
        while True:
            birth, marker = await self._store._entries([birth_key, self.deleting_prefix + part])
            if birth is None:  # with a marker: the record was seen, and deleted
                return None if marker is None else Check(birth_key, version)
            if birth.value != _LEFT:
                return Check(birth_key, birth.version)
            with suppress(Conflict):  # it is gone, or another's: look again
                await self._store._commit([Put(birth_key, self._now(), birth.version)])

    async def remove_unborn(self) -> int:
        """Remove birth keys whose records were never stored, and what is beside them; return how many there were.

        Only where batches are not atomic does an interrupted creation leave them. One that wrote its key in the
        last ten minutes, by the store's clock, is under way.
        """
        removed = 0
        start: str | None = None if self._family.atomic else self.prefix
        while start is not None:
            page = await self._store._scan(start, keys.prefix_end(self.prefix), limit=_PAGE)
            parts = [birth.key[len(self.prefix) :] for birth in page]
            stored = await self._store._entries([self.repository._prefix + part for part in parts])
            for birth, part, record in zip(page, parts, stored, strict=True):
                if live(record) is None and given_up(birth.value, self._store.clock()):
                    removed += await self._remove_unborn(part, birth)
            start = page[-1].key + "!" if len(page) == _PAGE else None
        return removed

    async def _remove_unborn(self, part: str, birth: Entry) -> bool:
        """Claim the birth key first: of its creator, who may come after all, and of others who create or remove it."""
        try:
            version = await self._store._commit([Put(birth.key, _LEFT, birth.version)])
        except Conflict:
            return False
        beside = [] if self._beside is None else [op.key for op in await self._beside(part)]
        record, *kept = await self._store._entries([self.repository._prefix + part, *beside])
        if live(record) is not None:
            return False
        mine = [(entry.key, entry.version) for entry in kept if entry is not None]
        await self._unborn([(birth.key, version), *mine])
        self.forget(birth.key)
        return True

    def _now(self) -> bytes:
        return b"%d" % self._store.clock()

    async def _unborn(self, mine: Sequence[tuple[str, bytes]]) -> None:
        """Take back what a creation wrote, at these versions, that a unique value stopped; what others did stays."""
        conditional = self._store.capabilities.conditional_delete
        for key, version in mine:
            try:
                await require(self._store, Check(key, version))
                await self._store._commit([Delete(key, version if conditional else None)])
            except Conflict:
                return

    async def kill(self, part: str, guard: Check | None = None) -> bool:
        """Delete a record by its encoded id, and everything that belongs to it; False where there was none.

        Args:
            guard: of the deletion that this one is part of. Its Conflict is let through.
        """
        if self._family.atomic:
            existed = await self._begin(part, guard)
        else:
            existed = await self._begin_in_order(part, guard)
        self.forget(self.prefix + part)
        await self.deletions.finish(part)
        return existed

    async def _begin(self, part: str, guard: Check | None) -> bool:
        writer = atomic_writer(self.repository)
        key, birth_key, marker_key = self.repository._prefix + part, self.prefix + part, self.deleting_prefix + part
        for attempt in range(_ATTEMPTS):
            birth, stored = await self._store._entries([birth_key, key])
            if birth is None and stored is None:
                return False
            also: list[Op] = [Put(marker_key, PENDING), *([] if guard is None else [guard])]
            if birth is not None:
                conditional = self._store.capabilities.conditional_delete
                also.append(Delete(birth_key, birth.version if conditional else None))
            try:
                if stored is None:
                    await self._store._commit(also)
                elif not await writer.remove(part, also=also):
                    continue
            except Conflict as conflict:
                if guard is not None and conflict.key == guard.key:
                    raise
                await backoff(attempt)
                continue
            return True
        raise Conflict(key, None)

    async def _begin_in_order(self, part: str, guard: Check | None) -> bool:
        if guard is not None:
            await require(self._store, guard)
        key, birth_key = self.repository._prefix + part, self.prefix + part
        birth, stored = await self._store._entries([birth_key, key])
        if birth is None and live(stored) is None:
            return False
        conditional = self._store.capabilities.conditional_delete
        ops: list[Op] = [Put(self.deleting_prefix + part, PENDING)]  # what follows is finished by whoever sees this
        if birth is not None:
            ops.append(Delete(birth_key, birth.version if conditional else None))
        try:
            await self._store._commit(ops)
        except Conflict:  # somebody else deletes it
            return False
        return True


class Belongs(msgspec.Struct, frozen=True):
    """What a field of a record names.

    Attributes:
        field: holds the parent's id; None: there is none.
        births: of the parent's kind.
        cascade: the record is deleted with its parent. Needs an index over the field, or the field first in the key.
        optional: the parent need not be there.
    """

    field: str
    births: Births
    cascade: bool = True
    optional: bool = False

    async def checks(self, record: Any, before: Any = None) -> tuple[Check, ...]:
        """Return what the field of ``record`` asks for, nothing where ``before`` has the same there."""
        id_ = getattr(record, self.field)
        if id_ is None or (before is not None and getattr(before, self.field) == id_):
            return ()
        if self.optional:
            return await self.births.check_or_absent(id_)
        return (await self.births.check(id_),)


def given_up(since: bytes, now: float) -> bool:
    """Whether nobody is at a creation any more that last told of itself at ``since``; empty: it is being removed."""
    return not since or now - float(since) > _IDLE


async def checks_of(belongs: Iterable[Belongs], record: Any, before: Any = None) -> tuple[Check, ...]:
    """Return what has to be so for ``record`` to be written in place of ``before``.

    Raises:
        ParentGone: a record that it belongs to does not exist.
    """
    found: dict[str, Check] = {}
    for each in belongs:
        for check in await each.checks(record, before):
            found[check.key] = check
    return tuple(found.values())
