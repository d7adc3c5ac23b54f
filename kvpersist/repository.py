"""Typed records under namespaced keys, found again by index."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, Generic, Literal, TypeVar, cast

import msgspec

from kvpersist import keys
from kvpersist.codec import RecordCodec
from kvpersist.driver import ABSENT, Entry, Expect
from kvpersist.errors import (
    BadKey,
    BadOption,
    BadRequest,
    Conflict,
    KeyTooLong,
    KvError,
    PartlyDone,
    Unencodable,
    Unsupported,
)
from kvpersist.index import BoundIndex, Index, bind
from kvpersist.index.atomic_writer import AtomicWriter
from kvpersist.index.definitions import Definitions
from kvpersist.index.fields import Part, key_parts
from kvpersist.index.ordered_writer import OrderedWriter
from kvpersist.index.reads import OnCorrupt, Query, Reader
from kvpersist.index.rebuild import Damage, Reindexed, Reindexer
from kvpersist.index.writer import Sleep, live, refuse_unkept
from kvpersist.store import Versioned

if TYPE_CHECKING:
    from kvpersist.store import Store
    from kvpersist.transaction import Transaction

__all__ = ["Damage", "Page", "Reindexed", "Repository"]

R = TypeVar("R")

_BATCH: Final = 100  # records in one atomic batch of put_many
_PAGE: Final = 100  # records that iterate holds at once
_SHORT: Final = keys.ID_LIMIT // 4  # characters that cannot be more bytes than an id may have
_TOGETHER: Final = 32  # records saved side by side where each is a batch of its own
_ATTEMPTS: Final = 40  # of an update that keeps losing to others


class Page(msgspec.Struct, Generic[R], frozen=True):
    """``items`` of one page, and the ``cursor`` of the next; None: there is none."""

    items: list[R]
    cursor: str | None


class Repository(Generic[R]):
    """Records of one type in one collection of a store.

    Every write keeps the indexes: in the same batch where the backend has atomic ones, otherwise in
    an order in which an index entry may be stale (readers pass over it) but never missing.

    All operations may raise what `Store`'s do, and SchemaChanged when another process declared
    indexes that this one could not maintain.
    """

    def __init__(
        self,
        store: Store,
        type: type[R],
        *,
        name: str,
        key: str | tuple[str, ...] = "id",
        indexes: Iterable[Index] = (),
        namespace: str = "kv",
        codec: Literal["msgpack", "json"] | None = None,
        version: int = 1,
        upcasters: Mapping[int, Callable[[dict[str, Any]], dict[str, Any]]] | None = None,
        ttl: float | None = None,
        sleep: Sleep = asyncio.sleep,
    ) -> None:
        """Declare a collection; nothing is read or written yet.

        Args:
            type: of the records: a msgspec Struct, a dataclass, a TypedDict, or ``dict`` (ids are text).
            name: of the collection.
            key: the field, or fields, that identify a record.
            version: of the schema; ``upcasters[n]`` takes a stored dict from version n to n + 1.
            ttl: seconds that a record lives unless told otherwise; None: as the store has it.
            sleep: waits between attempts and phases; replaced in tests.

        Raises:
            BadOption, BadKey: the declaration does not fit the type.
            Unsupported: a unique index on a backend without conditional writes, or indexes and a ``ttl``
                under 60 on one without atomic batches.
        """
        self.store = store
        self.name: str = keys.check_name(name, "collection")
        self.namespace: str = keys.namespace(namespace)
        if self.namespace == "kvpersist":
            raise BadKey(namespace, "this namespace is the store's own: choose another")
        self.indexes: tuple[BoundIndex, ...] = tuple(bind(index, type) for index in indexes)
        names = [index.name for index in self.indexes]
        if len(set(names)) != len(names):
            raise BadOption("indexes", f"{', '.join(names)}: two have one name; give one a name=")
        for each in names:
            keys.index_prefix(self.namespace, self.name, each)
        refuse_unkept(store, self.name, self.indexes, ttl)
        self._type = type
        self._key_parts: tuple[Part, ...] = key_parts(type, key)
        self._key_of_one = self._key_parts[0] if len(self._key_parts) == 1 else None
        self._key_is_text = self._key_of_one is not None and self._key_of_one.kind is str
        self._prefix = keys.record_prefix(self.namespace, self.name)
        self._codec = RecordCodec(type, codec=codec or store.codec, version=version, upcasters=upcasters or {})
        self._ttl = ttl
        self._sleep = sleep
        self._definitions = Definitions(store, self.namespace, self.name, type, self.indexes, version)
        atomic = store.capabilities.atomic_batch != "none"
        make: Any = AtomicWriter if atomic else OrderedWriter
        self._writer: AtomicWriter[R] | OrderedWriter[R] = make(
            store, self._definitions, self._codec, self._prefix, sleep
        )
        self._reader = Reader(store, self._definitions, self._codec, self.indexes, self._prefix, self._writer)
        self._owned = False

    def __repr__(self) -> str:
        return f"<Repository {self.namespace}:{self.name}>"

    # ---- one record

    async def get(self, id: Any, *, tx: Transaction | None = None) -> R | None:
        """Return the record, or None. ``id``: the key's value, a tuple where it has several fields.

        Raises:
            CorruptRecord: stored bytes are not a record of this repository's type.
        """
        # not by `_entry`: a coroutine less, on the hottest path
        [entry] = await (self.store if tx is None else tx)._entries((self._prefix + self._pk(id),))
        return self._record(entry)

    async def get_versioned(self, id: Any) -> Versioned[R] | None:
        """Return the record with its version, for a later ``put(expect=version)``."""
        entry = await self._entry(self._pk(id), None)
        if entry is None:
            return None
        return Versioned(self._codec.decode(entry.key, entry.value), entry.version, entry.expires_at)

    async def get_many(self, ids: Sequence[Any]) -> list[R | None]:
        """Read ``n`` records in one round trip: ``n`` items in the order of ``ids``, None where there is none."""
        entries = await self.store._entries([self._prefix + self._pk(id) for id in ids])
        return [self._record(entry) for entry in entries]

    async def exists(self, id: Any) -> bool:
        """Whether there is such a record; it is not decoded."""
        return await self._entry(self._pk(id), None) is not None

    async def insert(self, record: R, *, ttl: float | None = None, tx: Transaction | None = None) -> bytes:
        """Store a record that must not be there yet; return its version.

        Raises:
            Conflict: there is one. UniqueConflict: another holds a unique value. Nothing was changed.
            Unencodable: a field cannot be kept. KeyTooLong: the id has over 160 encoded bytes.
        """
        return await self.put(record, expect=ABSENT, ttl=ttl, tx=tx)

    async def put(
        self,
        record: R,
        *,
        expect: Expect | None = None,
        ttl: float | None = None,
        tx: Transaction | None = None,
    ) -> bytes:
        """Store a record and return its version; of several writers, the last one wins.

        Args:
            expect: the version that must be there, ABSENT, or None for whatever is there.
            ttl: seconds to live; None: as the repository has it. With 0 or less the record is removed.
            tx: write at the end of this transaction; the version is then not known yet, and empty.

        Raises:
            Unsupported: a ttl under 60 with indexes on a backend without atomic batches.
            As `insert`; Conflict only with ``expect``, or after losing to others 40 times.
        """
        pk = self._pk_of(record)
        if not self._owned:
            await self._own()
        expires_at = self.store._expiry(self._ttl if ttl is None else ttl)
        if tx is not None:
            await self._atomic(tx).stage(tx, pk, record, expect=expect, expires_at=expires_at)
            return b""
        return await self._writer.save(pk, record, expect=expect, expires_at=expires_at)

    async def update(self, id: Any, fn: Callable[[R], R], *, tx: Transaction | None = None) -> R | None:
        """Replace the record by what ``fn`` makes of it, and return that; None where there is none.

        ``fn`` is called again when another writer came first. The record keeps its expiry.

        Raises:
            BadRequest: ``fn`` gave the record another key.
            Conflict: lost to other writers 40 times.
        """
        pk = self._pk(id)
        if not self._owned:
            await self._own()
        for attempt in range(_ATTEMPTS):
            entry = await self._entry(pk, tx)
            if entry is None:
                return None
            changed = fn(self._codec.decode(entry.key, entry.value))
            if self._pk_of(changed) != pk:
                raise BadRequest(f"update of {id!r} changed its key: insert the new record and delete the old one")
            if tx is not None:
                await self._atomic(tx).stage(tx, pk, changed, expires_at=entry.expires_at)
                return changed
            try:
                await self._writer.save(pk, changed, expires_at=entry.expires_at, old=entry)
            except Conflict as conflict:
                if conflict.key != entry.key:  # a unique value of another record
                    raise
                await self._writer.back_off(attempt)
                continue
            return changed
        raise Conflict(self._prefix + pk, None)

    async def delete(self, id: Any, *, expect: bytes | None = None, tx: Transaction | None = None) -> bool:
        """Remove the record and its index entries; False where there was none.

        Raises:
            Conflict: another version than ``expect`` is there, or none.
        """
        pk = self._pk(id)
        if not self._owned:
            await self._own()
        if tx is not None:
            return await self._atomic(tx).stage(tx, pk, None, expect=expect)
        return await self._writer.remove(pk, expect=expect)

    # ---- many records

    async def put_many(self, records: Iterable[R], *, ttl: float | None = None) -> list[bytes]:
        """Store records in atomic batches of 100 and return their versions; not atomic as a whole.

        Of several records with one key the last counts. Where the backend has no atomic batches each
        record is a save of its own.

        Raises:
            Unencodable, KeyTooLong: nothing was written.
            PartlyDone: some were written; it names the keys of those that were not, with their errors.
        """
        if not self._owned:
            await self._own()
        expires_at = self.store._expiry(self._ttl if ttl is None else ttl)
        order = [(self._pk_of(record), record) for record in records]
        items = [(pk, record, expires_at) for pk, record in dict(order).items()]
        if not items:
            return []
        if isinstance(self._writer, AtomicWriter):
            size = min(
                _BATCH, max(1, (self.store.capabilities.max_batch or 10 * _BATCH) // (3 + 2 * len(self.indexes)))
            )
            answers = await self._writer.save_many(items, size)
        else:
            answers = await _side_by_side([self._saved(*item) for item in items])
        self._refuse_failures([pk for pk, _, _ in items], answers)
        versions = dict(zip((pk for pk, _, _ in items), answers, strict=True))
        return [version for pk, _ in order if isinstance(version := versions[pk], bytes)]

    async def delete_many(self, ids: Iterable[Any]) -> int:
        """Remove records side by side, each as `delete` does; return how many there were.

        Raises:
            PartlyDone: some were removed; it names the keys of those that were not.
        """
        if not self._owned:
            await self._own()
        pks = list(dict.fromkeys(self._pk(id) for id in ids))
        answers = await _side_by_side([self._removed(pk) for pk in pks])
        self._refuse_failures(pks, answers)
        return sum(answer is True for answer in answers)

    # ---- queries

    async def find(self, *, limit: int = 100, on_corrupt: OnCorrupt | None = None, **where: Any) -> list[R]:
        """Return up to ``limit`` records through the index that answers ``where``, in its order.

        ``field=value`` for the index's fields (a collection's: "contains"), and one range, made with
        `between`, `at_least` or `at_most`, for the field that follows them or orders. Without
        conditions: by the index that has only an order, else by key.

        Args:
            on_corrupt: is handed the error of each damaged record, and the list goes on past it; without
                it, the error is raised.

        Raises:
            NoIndex: no declared index answers this; the error names them.
            IndexNotReady: it is being built.
        """
        while True:
            query = await self._reader.query(where)
            found, _ = await self._reader.records(query, query.start, _bounded(limit), on_corrupt)
            if await self._reader.unchanged(query):
                return [record for _, record in found]

    async def first(self, **where: Any) -> R | None:
        """Return the first record that `find` would, or None."""
        found = await self.find(limit=1, **where)
        return found[0] if found else None

    async def page(
        self, *, limit: int = 100, after: str | None = None, on_corrupt: OnCorrupt | None = None, **where: Any
    ) -> Page[R]:
        """Return one page as `find` does, and the cursor that `after` takes for the next.

        Raises:
            BadCursor: it belongs to another query.
        """
        while True:
            query = await self._reader.query(where)
            start = query.start if after is None else self._reader.position(query, after)
            found, _ = await self._reader.records(query, start, _bounded(limit) + 1, on_corrupt)
            if await self._reader.unchanged(query):
                break
        cursor = self._reader.cursor(query, found[limit - 1][0]) if len(found) > limit else None
        return Page([record for _, record in found[:limit]], cursor)

    async def iterate(self, *, on_corrupt: OnCorrupt | None = None, **where: Any) -> AsyncIterator[R]:
        """Yield every record that `find` would without a limit, 100 in memory at a time.

        Without conditions: every record of the collection, by key.
        """
        query = await self._reader.query(where, whole=True)
        start: str | None = query.start
        while start is not None:
            found, start = await self._reader.records(query, start, _PAGE, on_corrupt)
            if not await self._reader.unchanged(query):
                query = await self._again(query, where)
            for _, record in found:
                yield record

    async def count(self, **where: Any) -> int:
        """Count what `find` would return without a limit; of the whole collection without conditions.

        Only keys are read, except where the backend has no atomic batches.
        """
        while True:
            query = await self._reader.query(where, whole=True)
            total = await self._reader.count(query)
            if await self._reader.unchanged(query):
                return total

    # ---- indexes

    async def reindex(self, progress: Callable[[int], None] | None = None) -> Reindexed:
        """Build every index that is not readable yet, while others read and write.

        It may be stopped and called again: it goes on where it was. Without atomic batches it waits 60
        seconds first, and again before the entries of a replaced index are removed.

        Args:
            progress: is told how many records have been looked at.
        """
        await self._own()
        return await self._reindexer().reindex(progress)

    async def drop_index(self, name: str) -> int:
        """Forget an index and remove its entries, waiting 60 seconds for readers; return how many there were.

        A process that still declares it builds it anew when it starts.
        """
        return await self._reindexer().drop(name)

    async def verify(self, *, repair: bool = False) -> list[Damage]:
        """Compare every record with its index entries, and every entry with its record.

        Args:
            repair: mend what is found; what two records claim is only reported.

        Returns:
            What was found, whether mended or not; empty: all is well.
        """
        await self._own()
        return await self._reindexer().verify(repair)

    # ---- private

    def _reindexer(self) -> Reindexer[R]:
        return Reindexer(
            self.store, self._definitions, self._codec, self.indexes, self._prefix, self._writer, self._sleep
        )

    async def _own(self) -> None:
        await self.store._own(self.namespace)
        self._owned = True

    async def _entry(self, pk: str, tx: Transaction | None) -> Entry | None:
        [entry] = await (self.store if tx is None else tx)._entries((self._prefix + pk,))
        return live(entry)

    def _record(self, entry: Entry | None) -> R | None:
        entry = live(entry)
        return None if entry is None else self._codec.decode(entry.key, entry.value)

    def _atomic(self, tx: Transaction) -> AtomicWriter[R]:
        if tx.store is not self.store:
            both = f"one batch over two stores, {tx.store.where} and {self.store.where},"
            raise Unsupported(both, "take the transaction from this repository's store, and write the rest after it")
        if not isinstance(self._writer, AtomicWriter):
            raise Unsupported("a transaction", "write record by record")
        return self._writer

    async def _again(self, query: Query, where: Mapping[str, Any]) -> Query:
        fresh = await self._reader.query(where)
        if fresh.slot is None or query.slot is None or fresh.slot.prefix != query.slot.prefix:
            raise Conflict(self._definitions.key, None)  # the index was replaced half way: begin again
        return fresh

    async def _saved(self, pk: str, record: R, expires_at: float | None) -> bytes | KvError:
        try:
            return await self._writer.save(pk, record, expires_at=expires_at)
        except KvError as error:
            return error

    async def _removed(self, pk: str) -> bool | KvError:
        try:
            return await self._writer.remove(pk)
        except KvError as error:
            return error

    def _refuse_failures(self, pks: Sequence[str], answers: Sequence[object]) -> None:
        failed = {self._prefix + pk: each for pk, each in zip(pks, answers, strict=True) if isinstance(each, KvError)}
        if len(failed) == len(pks) == 1:
            raise next(iter(failed.values()))
        if failed:
            raise PartlyDone(len(pks) - len(failed), failed)

    def _pk(self, id: Any) -> str:
        """Encode a key that the caller gave."""
        if self._key_is_text and type(id) is str and len(pk := keys.escape(id)) <= _SHORT:
            return pk
        if self._key_of_one is not None:
            values: Sequence[Any] = (id,)
        else:
            values = cast("Sequence[Any]", id) if isinstance(id, (tuple, list)) else (id,)
            if len(values) != len(self._key_parts):
                fields = ", ".join(part.label for part in self._key_parts)
                raise BadKey(id, f"the key of {self.name!r} is a tuple of {fields}")
        return self._joined(values)

    def _pk_of(self, record: R) -> str:
        """Encode the key of a record."""
        try:
            if self._key_of_one is not None:
                return self._pk(self._key_of_one.get(record))
            values = [part.get(record) for part in self._key_parts]
        except (AttributeError, KeyError, TypeError) as error:
            raise Unencodable("", f"{type(record).__name__} is not a record of {self.name!r}") from error
        return self._joined(values)

    def _joined(self, values: Sequence[Any]) -> str:
        try:
            pk = "!".join([part.encode(value) for part, value in zip(self._key_parts, values, strict=True)])
        except Unencodable as error:
            raise BadKey(values[0] if len(values) == 1 else tuple(values), f"{error.path}: {error.reason}") from error
        if len(pk) > _SHORT and (size := len(pk.encode())) > keys.ID_LIMIT:
            raise KeyTooLong(pk, size, keys.ID_LIMIT)
        return pk


def _bounded(limit: int) -> int:
    if limit < 1:
        raise BadRequest(f"limit={limit}: ask for at least one")
    return limit


T = TypeVar("T")


async def _side_by_side(saves: Sequence[Awaitable[T]]) -> list[T]:
    answers: list[T] = []
    for at in range(0, len(saves), _TOGETHER):
        answers.extend(await asyncio.gather(*saves[at : at + _TOGETHER]))
    return answers
