"""Removing everything below a record once its deletion has begun.

The first batch of a deletion removes the birth key, which every batch below the record checks, and
leaves ``ns:collection#deleting:<id>``. From there anybody can go on: the deleter itself, whoever opens
the store next, and whoever wants to create a record of that id. The marker goes last.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from operator import attrgetter
from typing import Any, Final

from kvpersist import keys
from kvpersist.driver import Check, Delete, Entry, Op, Put
from kvpersist.errors import Conflict, CorruptRecord, IndexNotReady
from kvpersist.index.atomic_writer import AtomicWriter, IndexOps
from kvpersist.index.writer import live
from kvpersist.repository import Repository
from kvpersist.store import Store

__all__ = ["DONE", "PENDING", "Beside", "Cascade", "Deletions", "belonging", "remove_page", "require"]

PENDING: Final = b"1"
"""The marker of a deletion that is not finished."""

DONE: Final = b"done"
"""The marker of a finished one on a backend without atomic batches, while late writers may come."""

_LATE: Final = 30 * 86_400.0  # seconds that such a marker stays
_PAGE: Final = 100  # records removed in one batch

Cascade = Callable[[str, Check], Awaitable[None]]
"""Removes what belongs to the deleted record of an id. Where batches are atomic each of them carries the
check, whose Conflict is let through; elsewhere `require` is asked before each."""

Beside = Callable[[str], Awaitable[list[Op]]]
"""Returns what removes the keys kept beside a record (by its encoded id), where batches are not atomic."""


class Deletions:
    """Finishes the deletions of one collection's records.

    Attributes:
        children: collections whose keys begin with the id of the deleted record.
        cascades: remove what belongs to it in another way.
        guards: prefixes of single keys that are kept of each record for its children.
    """

    def __init__(
        self,
        store: Store,
        repository: Repository[Any],
        birth_prefix: str,
        deleting_prefix: str,
        beside: Beside | None = None,
    ) -> None:
        self._store = store
        self._repository = repository
        self._birth_prefix, self._deleting_prefix = birth_prefix, deleting_prefix
        self._beside = beside
        self._atomic = store.capabilities.atomic_batch != "none"
        self.children: list[Repository[Any]] = []
        self.cascades: list[Cascade] = []
        self.guards: list[str] = []

    async def finish_all(self) -> int:
        """Finish every deletion that was begun and not finished; return how many there were."""
        prefix = self._deleting_prefix
        finished = 0
        start: str | None = prefix
        while start is not None:
            page = await self._store._scan(start, keys.prefix_end(prefix), limit=_PAGE)
            for marker in page:
                if marker.value == PENDING:
                    await self.finish(marker.key[len(prefix) :])
                    finished += 1
            start = page[-1].key + "!" if len(page) == _PAGE else None
        return finished

    async def finish(self, part: str, *, begin_anew: bool = False) -> None:
        """Remove what is left below a record, and the marker; nothing happens where there is none.

        It may be interrupted, run again, and run by several at once.

        Args:
            part: the record's encoded id.
            begin_anew: the id is wanted for a new record: remove the marker that waits for late writers too.
        """
        key = self._deleting_prefix + part
        [marker] = await self._store._entries([key])
        if marker is None or (marker.value == DONE and not begin_anew):
            return
        guard = Check(key, marker.version)
        try:
            if not self._atomic:
                await self.behead(part)
            for repository in self.children:
                await self._sweep(repository, part, guard)
            for cascade in self.cascades:
                await cascade(keys.unescape(part), guard)
            await self._store._commit(self._end(part, marker, begin_anew=begin_anew))
        except Conflict as conflict:
            if conflict.key != key:
                raise
            return  # somebody else has finished it

    def _end(self, part: str, marker: Entry, *, begin_anew: bool) -> list[Op]:
        """What is done last; the marker is the last of it."""
        ops: list[Op] = [Delete(prefix + part) for prefix in self.guards]
        if self._atomic or begin_anew:
            conditional = self._store.capabilities.conditional_delete
            return [*ops, Delete(marker.key, marker.version if conditional else None)]
        return [*ops, Put(marker.key, DONE, marker.version, self._store.clock() + _LATE)]

    async def behead(self, part: str) -> None:
        """Remove the record itself, step by step: a crash may have come between any two."""
        [birth] = await self._store._entries([self._birth_prefix + part])
        ops: list[Op] = [] if birth is None else [Delete(birth.key)]
        if self._beside is not None:
            ops += await self._beside(part)
        if ops:
            await self._store._commit(ops)
        await self._repository._writer.remove(part)

    async def _sweep(self, repository: Repository[Any], part: str, guard: Check) -> None:
        """Remove what is kept at the id of the record, and below it."""
        start = repository._prefix + part
        end = keys.prefix_end(start + "!")  # behind the id itself comes nothing before '!'
        while page := await self._store._scan(start, end, limit=_PAGE):
            await remove_page(repository, [entry for entry in page if live(entry) is not None], guard)
            if not self._atomic:  # what was removed leaves tombstones
                start = page[-1].key + "!"


async def remove_page(repository: Repository[Any], entries: Sequence[Entry], guard: Check) -> None:
    """Remove records as they were read, and their index entries; as one batch where batches are atomic.

    What changed meanwhile may stay: read again, and repeat.

    Raises:
        Conflict: at the key of ``guard``: somebody else has finished the deletion.
    """
    store, writer = repository.store, repository._writer
    if not isinstance(writer, AtomicWriter):
        await require(store, guard)
        for entry in entries:
            pk = entry.key[len(repository._prefix) :]
            try:
                await writer.remove(pk, expect=entry.version)
            except Conflict:  # removed by another, or rewritten unchanged by one who looked at its claim
                await writer.remove(pk)
        return
    if not entries:
        return
    known = await repository._definitions.known()
    ops = IndexOps()
    deletes: list[Op] = []
    for entry in entries:
        pk = entry.key[len(repository._prefix) :]
        try:
            await writer.index_ops(ops, known, pk, entry, None, None, {})
        except CorruptRecord:  # its index entries are found by what they point at
            ops.by_key.update((await writer.entries_of(known, pk)).by_key)
        deletes.append(writer.deletion(entry))
    try:
        await store._commit([guard, known.check, *deletes, *ops.by_key.values()])
    except Conflict as conflict:
        if conflict.key == guard.key:
            raise
        if conflict.key == known.check.key:
            await repository._definitions.refresh()


async def belonging(repository: Repository[Any], field: str, id: str) -> AsyncIterator[list[Entry]]:
    """Yield pages of the stored records whose ``field`` is ``id``; those that are damaged, by their index entries.

    Through an index over the field; while that is being built, all records are read.
    """
    value_of = attrgetter(field)
    store, decode = repository.store, repository._codec.decode
    if repository._definitions.cached is None:
        [definition] = await store._entries([repository._definitions.key])
        if definition is None:  # the first write of a collection makes it
            return
    try:
        query = await repository._reader.query({field: id})
    except IndexNotReady:
        query = await repository._reader.query({}, whole=True)
    start: str | None = query.start
    while start is not None:
        page = await store._scan(start, query.end, limit=_PAGE)
        start = page[-1].key + "!" if len(page) == _PAGE else None
        if query.slot is not None:
            stored = await store._entries([repository._prefix + entry.value.decode() for entry in page])
            page = [entry for entry in stored if entry is not None]
        found: list[Entry] = []
        for entry in page:
            if live(entry) is None:
                continue
            try:
                mine = value_of(decode(entry.key, entry.value)) == id
            except CorruptRecord:
                mine = query.slot is not None
            if mine:
                found.append(entry)
        if found:
            yield found


async def require(store: Store, guard: Check) -> None:
    """Raise Conflict where the marker of a deletion is not the one that was read."""
    [entry] = await store._entries([guard.key])
    if entry is None or entry.version != guard.expect:
        raise Conflict(guard.key, guard.expect, None if entry is None else entry.version)
