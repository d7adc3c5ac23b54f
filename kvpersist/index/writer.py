"""What both ways of writing a record with its index entries share.

`AtomicWriter` commits record, entries and claims in one batch, `OrderedWriter` in a careful order, for
backends that apply a batch operation by operation.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final, Generic, TypeVar

from kvpersist.codec import RecordCodec
from kvpersist.driver import ABSENT, Entry, Expect
from kvpersist.errors import Conflict, UniqueConflict, Unsupported
from kvpersist.index.definitions import BytesStore, Definitions, Known, Slot
from kvpersist.keys import unescape
from kvpersist.transaction import jitter

__all__ = [
    "ATTEMPTS",
    "SHORTEST_LIFE",
    "TOMBSTONE",
    "UNREAD",
    "Sleep",
    "Writer",
    "live",
    "refuse_unkept",
    "too_short",
    "version_of",
]

R = TypeVar("R")
Sleep = Callable[[float], Awaitable[None]]

TOMBSTONE: Final = b""
"""The value of a deleted record on a backend without atomic batches; no record is empty."""

UNREAD: Final = Entry("", b"", b"")
"""Stands for "nobody has read the old record yet"; None: it was read, and there is none."""

ATTEMPTS: Final = 40
"""How often a save that keeps losing to others is tried."""

SHORTEST_LIFE: Final = 60.0
"""Seconds that an indexed record lives at least where batches are not atomic."""


def live(entry: Entry | None) -> Entry | None:
    """Return the entry of a record, None for a tombstone."""
    return None if entry is None or entry.value == TOMBSTONE else entry


class Writer(ABC, Generic[R]):
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

    @abstractmethod
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

    @abstractmethod
    async def remove(self, pk: str, *, expect: bytes | None = None) -> bool:
        """Remove the record and its index entries; False where there is none.

        Raises:
            Conflict: another version than ``expect`` is there.
        """

    @abstractmethod
    async def discard(self, slot: Slot, entry: Entry) -> bool:
        """Remove an index entry that its record does not account for; False: it is not stale after all."""

    def encoded(self, key: str, record: R, old: Entry | None, known: Known) -> bytes:
        # without atomic batches a newer schema may not be known of yet
        if (
            old is not None
            and (known.newer or self._store.capabilities.atomic_batch == "none")
            and self._codec.decode_newer(key, old.value) is not None
        ):
            return self._codec.encode_keeping(key, record, old.value)
        return self._codec.encode(key, record)

    def decoded(self, entry: Entry | None) -> R | None:
        return None if entry is None else self._codec.decode(entry.key, entry.value)

    async def back_off(self, attempt: int) -> None:
        await self._sleep(jitter(attempt))

    def taken(self, slot: Slot, claim: str, holder: str) -> UniqueConflict:
        return UniqueConflict(slot.bound.name, slot.bound.shown(claim[len(slot.prefix) :]), _shown(holder))

    def _required(self, key: str, stored: Entry | None, expect: Expect | None) -> None:
        """Raise Conflict unless ``stored`` is as the caller expects."""
        held = live(stored)
        found: Expect = ABSENT if held is None else held.version
        if expect is not None and found != expect:
            raise Conflict(key, expect, found)

    def held_keys(self, slot: Slot, record: Any, pk: str) -> list[str]:
        """Return the keys of the entries that a stored record has."""
        return [] if record is None else slot.stored_keys(record, pk)


def too_short() -> Unsupported:
    """Make the error of a life that is shorter than a save may take."""
    what = f"a ttl under {SHORTEST_LIFE:g} s in a collection with indexes"
    return Unsupported(what, "it has no atomic batches: give the record more time, or move")


def refuse_unkept(store: BytesStore, collection: str, indexes: Sequence[Any], ttl: float | None) -> None:
    """Raise Unsupported where the backend could not keep what is declared."""
    ordered = store.capabilities.atomic_batch == "none"
    if ordered and indexes and ttl is not None and ttl < SHORTEST_LIFE:
        raise too_short()
    unique = [index.name for index in indexes if index.unique]
    if unique and not store.capabilities.conditional:
        raise Unsupported(
            f"a unique index ({collection}.{unique[0]})", "it has no conditional writes: drop unique=True, or move"
        )


def version_of(entry: Entry | None) -> Expect:
    """Return what to expect where ``entry`` was read."""
    return ABSENT if entry is None else entry.version


def _shown(pk: str) -> str:
    return ", ".join(unescape(part) for part in pk.split("!"))
