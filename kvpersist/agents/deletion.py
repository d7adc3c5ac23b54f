"""Removing everything below a session once its deletion has begun.

The first batch of a deletion removes the birth key, which every batch below the session checks, and
leaves ``ns:session#deleting:<id>``. From there anybody can go on: the deleter itself, whoever opens
the store next, and whoever wants to create a session of that id. The marker goes last.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from kvpersist import keys
from kvpersist.agents.collections import Collections
from kvpersist.agents.ordered import ordered_writer
from kvpersist.agents.turns import atomic_writer
from kvpersist.driver import Check, Delete, Entry, Op, Put
from kvpersist.errors import Conflict, CorruptRecord
from kvpersist.index.atomic_writer import IndexOps
from kvpersist.index.writer import live
from kvpersist.repository import Repository

__all__ = ["PENDING", "Deletions"]

PENDING: Final = b"1"
"""The marker of a deletion that is not finished."""

_DONE: Final = b"done"  # the marker on a backend without atomic batches, while late writers may come
_LATE: Final = 30 * 86_400.0  # seconds that such a marker stays
_PAGE: Final = 100  # records removed in one batch


class Deletions:
    """Finishes the deletions of one namespace."""

    def __init__(self, collections: Collections) -> None:
        self._all = collections
        self._store = collections.store
        self._atomic = self._store.capabilities.atomic_batch != "none"

    async def finish_all(self) -> int:
        """Finish every deletion that was begun and not finished; return how many there were."""
        prefix = self._all.deleting_prefix
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
        """Remove what is left below a session, and the marker; nothing happens where there is none.

        It may be interrupted, run again, and run by several at once.

        Args:
            part: the session's encoded id.
            begin_anew: the id is wanted for a new session: remove the marker that waits for late writers too.
        """
        key = self._all.deleting_prefix + part
        [marker] = await self._store._entries([key])
        if marker is None or (marker.value == _DONE and not begin_anew):
            return
        if not self._atomic:
            await self._behead(part)
        repositories: list[tuple[Repository[Any], str]] = [
            (self._all.tool_calls, self._all.call_prefix),
            (self._all.messages, self._all.message_prefix),
        ]
        for repository, prefix in repositories:
            if self._atomic:
                await self._sweep(repository, prefix, part, Check(key, marker.version))
            else:
                await self._sweep_ordered(repository, prefix, part)
        if self._atomic or begin_anew:
            op: Op = Delete(key, marker.version if self._store.capabilities.conditional_delete else None)
        else:
            op = Put(key, _DONE, marker.version, self._store.clock() + _LATE)
        try:
            await self._store._commit((op,))
        except Conflict:  # somebody else has finished it
            return

    async def _behead(self, part: str) -> None:
        """Remove the session itself, step by step: a crash may have come between any two."""
        every = self._all
        stat_key = every.stat_prefix + part
        birth, stat = await self._store._entries([every.birth_prefix + part, stat_key])
        ops: list[Op] = []
        if birth is not None:
            ops.append(Delete(birth.key))
        if stat is not None:
            try:
                indexed_at = every.stat_of(stat).indexed_at
            except CorruptRecord:  # its index entry is passed over by readers
                indexed_at = None
            if indexed_at is not None:
                ops.append(Delete(every.updated_key(part, indexed_at)))
            ops.append(Delete(stat_key))
        if ops:
            await self._store._commit(ops)
        await ordered_writer(every.sessions).remove(part)

    async def _sweep(self, repository: Repository[Any], prefix: str, part: str, marker: Check) -> None:
        writer = atomic_writer(repository)
        start, end = f"{prefix}{part}!", keys.prefix_end(f"{prefix}{part}!")
        while page := await self._store._scan(start, end, limit=_PAGE):
            known = await repository._definitions.known()
            ops = IndexOps()
            deletes: list[Op] = []
            for entry in page:
                pk = entry.key[len(prefix) :]
                try:
                    await writer.index_ops(ops, known, pk, entry, None, None, {})
                except CorruptRecord:  # its index entries are found by what they point at
                    ops.by_key.update((await writer.entries_of(known, pk)).by_key)
                deletes.append(writer.deletion(entry))
            try:
                await self._store._commit([marker, known.check, *deletes, *ops.by_key.values()])
            except Conflict as conflict:
                if conflict.key == marker.key:  # somebody else has finished it
                    return
                if conflict.key == known.check.key:
                    await repository._definitions.refresh()

    async def _sweep_ordered(self, repository: Repository[Any], prefix: str, part: str) -> None:
        writer = ordered_writer(repository)
        start, end = f"{prefix}{part}!", keys.prefix_end(f"{prefix}{part}!")
        while page := await self._store._scan(start, end, limit=_PAGE):
            await self._remove_each(writer, [entry for entry in page if live(entry) is not None], prefix)
            start = page[-1].key + "!"  # no key lies between a key and itself + '!'

    async def _remove_each(self, writer: Any, entries: Sequence[Entry], prefix: str) -> None:
        for entry in entries:
            try:
                await writer.remove(entry.key[len(prefix) :], expect=entry.version)
            except Conflict:  # removed by another, or rewritten unchanged by one who looked at its claim
                await writer.remove(entry.key[len(prefix) :])
