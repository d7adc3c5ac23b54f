"""What a collection's writers agreed on: its definition record, kept at ``ns:collection#def``.

It names every index with its specification, the *slot* its entries lie in (a segment of their keys),
and a state:

    building   every writer maintains it, records from before are not all in it yet: no queries
    readable   it holds every record
    dropping   still maintained for readers that do not know yet, asked by nobody who does
    dead       not maintained, its entries are being removed

A changed specification takes a new slot beside the old one, which stays readable for the processes
that declared it, and is maintained by all, until the new one is. Writers on drivers with atomic
batches carry a Check of the definition, so none writes under an old one. Other writers, and readers
everywhere, trust what they read for 30 seconds, and whoever changes the definition waits 60: enough
for a save of at most 15 seconds and a last call that ends by the default deadline of 10.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, Literal, Protocol

import msgspec

from kvpersist import keys
from kvpersist.driver import ABSENT, Capabilities, Check, Clock, Entry, Op, Put
from kvpersist.errors import BadKey, BadOption, Conflict, CorruptRecord, KvError, ReadOnly, SchemaChanged, Unencodable
from kvpersist.index.declaration import BoundIndex, Index, Spec, bind

__all__ = ["LEASE", "BytesStore", "Definition", "Definitions", "Known", "Slot", "State", "StoredIndex"]

LEASE: Final = 30.0
"""Seconds for which a definition is trusted without looking again."""

_LONG_KEY: Final = 120  # characters from which a key's bytes are counted (UTF-8 has at most 4 per character)

State = Literal["building", "readable", "dropping", "dead"]


class BytesStore(Protocol):
    """What index code needs of a Store."""

    capabilities: Capabilities
    clock: Clock

    async def _entries(self, keys: Sequence[str]) -> list[Entry | None]: ...
    async def _commit(self, ops: Sequence[Op]) -> bytes: ...
    async def _commit_each(self, batches: Sequence[Sequence[Op]]) -> list[bytes | KvError]: ...
    async def _scan(
        self,
        start: str | None,
        end: str | None,
        *,
        limit: int,
        reverse: bool = False,
        keys_only: bool = False,
        deref: str | None = None,
    ) -> list[Entry]: ...


class StoredIndex(msgspec.Struct, frozen=True):
    """One index of a definition record."""

    name: str
    slot: str
    spec: Spec
    state: State


class Definition(msgspec.Struct, frozen=True):
    """The definition record; ``schema``: the highest schema version that any writer declared."""

    schema: int = 1
    indexes: tuple[StoredIndex, ...] = ()

    def with_states(self, states: Mapping[str, State | None]) -> Definition:
        """Return a copy in which slots have other states; None leaves one out."""
        changed = (
            msgspec.structs.replace(each, state=states[each.slot]) if each.slot in states else each
            for each in self.indexes
            if states.get(each.slot, each.state) is not None
        )
        return msgspec.structs.replace(self, indexes=tuple(changed))


class Slot:
    """An index where its entries lie."""

    __slots__ = ("bound", "prefix", "slot", "state")

    def __init__(self, bound: BoundIndex, slot: str, prefix: str, state: State) -> None:
        self.bound, self.slot, self.prefix, self.state = bound, slot, prefix, state

    def keys(self, record: Any, pk: str) -> list[str]:
        """Return the keys of the entries ``record`` has here. Raises Unencodable."""
        bound = self.bound
        return bound.keys(record, self.prefix, "" if bound.unique else "!" + pk)

    def wanted_keys(self, record: Any, pk: str) -> list[str]:
        """Return the keys of the entries that a new record needs. Raises Unencodable, KeyTooLong."""
        bound = self.bound
        found = bound.keys(record, self.prefix, "" if bound.unique else "!" + pk)
        for key in found:
            if len(key) > _LONG_KEY:
                keys.check_key(key)
        return found

    def stored_keys(self, record: Any, pk: str) -> list[str]:
        """As `keys`, of a record that may be older than the index: none where it does not fit."""
        try:
            return self.keys(record, pk)
        except Unencodable:
            return []


class Known:
    """A definition as this process last read it; ``maintained``: the slots that every write keeps up."""

    __slots__ = ("check", "definition", "maintained", "named", "newer", "version")

    def __init__(self, definition: Definition, version: bytes, key: str, maintained: list[Slot], newer: bool) -> None:
        self.definition, self.version = definition, version
        self.check = Check(key, version)
        self.maintained = maintained
        self.newer = newer  # a writer of a newer schema exists: its fields are to be kept
        self.named: dict[str, Slot] = {}  # this process's own declarations


class Definitions:
    """Reads, caches, declares and changes the definition of one collection."""

    def __init__(
        self, store: BytesStore, ns: str, collection: str, type_: type, indexes: Sequence[BoundIndex], schema: int
    ) -> None:
        self.key = keys.meta_key(ns, collection, "def")
        self.collection = collection
        self._store = store
        self._ns = ns
        self._type = type_
        self._records = keys.record_prefix(ns, collection)
        self._declared = {bound.name: bound for bound in indexes}
        self._adopts: dict[str, BoundIndex] = {}
        self._schema = schema
        self._known: Known | None = None
        self._seen_at = 0.0

    def adopt(self, bound: BoundIndex) -> None:
        """Maintain and read an index where another process declared it, without declaring it; before the first use."""
        self._adopts[bound.name] = bound

    @property
    def cached(self) -> Known | None:
        """The definition last read, None before the first time."""
        return self._known

    async def known(self) -> Known:
        """Return the cached definition; the first time, declare what this process brings."""
        return self._known or await self.declare()

    async def fresh(self) -> Known:
        """Return a definition read at most `LEASE` seconds ago."""
        if self._known is None:
            return await self.declare()
        if self._store.clock() - self._seen_at > LEASE:
            await self.refresh()
        return self._known

    async def refresh(self) -> Known:
        """Read the definition again.

        Raises:
            SchemaChanged: it holds indexes that this process could not maintain.
        """
        if self._known is None:
            return await self.declare()
        at = self._store.clock()
        [entry] = await self._store._entries([self.key])
        if entry is None:  # somebody removed everything below the namespace
            return await self.declare()
        return self.take(entry, at)

    def take(self, entry: Entry, at: float | None = None) -> Known:
        """Adopt a definition record; ``at``: when it was read, by the store's clock."""
        if self._known is None or self._known.version != entry.version:
            self._known = self._adopted(self.read(entry), entry.version)
        if at is not None:  # what could not be adopted has not been seen: the next operation looks again
            self._seen_at = at
        return self._known

    def read(self, entry: Entry) -> Definition:
        """Decode a definition record. Raises CorruptRecord."""
        try:
            return _DECODER.decode(entry.value)
        except msgspec.MsgspecError as error:
            raise CorruptRecord(self.key, f"not a definition: {error}") from error

    def prefix(self, slot: str) -> str:
        """Return what the keys of a slot start with."""
        return keys.index_prefix(self._ns, self.collection, slot)

    async def stored(self) -> Definition:
        """Return the definition record as it is, whether or not this process could maintain its indexes."""
        [entry] = await self._store._entries([self.key])
        return Definition() if entry is None else self.read(entry)

    async def write_states(self, states: Mapping[str, State | None]) -> None:
        """Give slots other states, whatever else changes meanwhile; None removes one."""
        while True:
            [entry] = await self._store._entries([self.key])
            if entry is None:
                return
            found = self.read(entry)
            wanted = found.with_states(states)
            if wanted == found or await self._write(wanted, entry) is not None:
                return

    async def declare(self) -> Known:
        """Read the definition, and add to it what this process declares beyond it."""
        while True:
            at = self._store.clock()
            [entry] = await self._store._entries([self.key])
            wanted = await self._first() if entry is None else self._joined(self.read(entry))
            if entry is not None and wanted == self.read(entry):
                return self.take(entry, at)
            try:
                version = await self._write(wanted, entry)
            except ReadOnly:
                if entry is not None:  # what is not declared in it stays unreadable
                    return self.take(entry, at)
                version = b""
            if version is not None:
                self._known = self._adopted(wanted, version)
                self._seen_at = at
                return self._known

    async def _first(self) -> Definition:
        """The definition of a collection that has none: without records, every index is complete."""
        found = await self._store._scan(
            self._records, keys.prefix_end(self._records), limit=1, keys_only=True
        )  # a writer would have had to declare first, so none can come between
        state: State = "building" if found else "readable"
        stored = (StoredIndex(name, name, bound.spec, state) for name, bound in self._declared.items())
        return Definition(self._schema, tuple(stored))

    def _joined(self, found: Definition) -> Definition:
        """Return ``found`` with what this process declares beyond it."""
        indexes = list(found.indexes)
        for name, bound in self._declared.items():
            same = [each for each in indexes if each.name == name]
            if any(each.spec == bound.spec and each.state in ("building", "readable") for each in same):
                continue
            indexes = [  # what an old callable gave cannot be maintained by who has the new one
                msgspec.structs.replace(each, state="dead") if each in same and each.spec.computed else each
                for each in indexes
            ]
            taken = {each.slot for each in indexes}
            slots = (name if n == 1 else f"{name}~{n}" for n in range(1, len(taken) + 2))
            slot = next(each for each in slots if each not in taken)
            indexes.append(StoredIndex(name, slot, bound.spec, "building"))
        return Definition(max(found.schema, self._schema), tuple(indexes))

    def _adopted(self, definition: Definition, version: bytes) -> Known:
        maintained: list[Slot] = []
        known = Known(definition, version, self.key, maintained, definition.schema > self._schema)
        for stored in definition.indexes:
            if stored.state == "dead":
                continue
            mine = self._declared.get(stored.name) or self._adopts.get(stored.name)
            own = mine is not None and mine.spec == stored.spec
            bound = mine if mine is not None and own else self._unknown(stored)
            slot = Slot(bound, stored.slot, self.prefix(stored.slot), stored.state)
            maintained.append(slot)
            if own and stored.state in ("building", "readable"):
                known.named[stored.name] = slot
        return known

    def _unknown(self, stored: StoredIndex) -> BoundIndex:
        """Make an index that another writer declared, to maintain it."""
        if stored.spec.computed:
            detail = f"index {stored.name!r} is computed, and not declared here so (or drop it with drop_index)"
            raise SchemaChanged(self.collection, detail)
        try:
            bound = bind(Index.of(stored.name, stored.spec), self._type)
        except (BadOption, BadKey) as error:
            raise SchemaChanged(self.collection, f"index {stored.name!r} does not fit here: {error}") from error
        if bound.spec != stored.spec:
            raise SchemaChanged(self.collection, f"index {stored.name!r} is over fields of other types")
        return bound

    async def _write(self, definition: Definition, seen: Entry | None) -> bytes | None:
        """Write the record unless another writer came first (None)."""
        expect = (ABSENT if seen is None else seen.version) if self._store.capabilities.conditional else None
        try:
            return await self._store._commit((Put(self.key, _ENCODER.encode(definition), expect),))
        except Conflict:
            return None


_ENCODER: Final = msgspec.msgpack.Encoder()
_DECODER: Final = msgspec.msgpack.Decoder(Definition)
