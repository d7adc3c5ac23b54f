"""The driver protocol: what a backend must offer, and what it may.

Bytes under text keys, in the order of the keys' UTF-8 bytes. Four methods are all that a driver
author writes; `kvpersist.testing.DriverContract` proves them. Rules that hold for every driver:

* **Versions** are 8 bytes minted by the caller, one per batch: every Put of a batch is stored under
  its batch's version. Drivers store and compare them, never make them.
* **A batch is ordered, and no key is in more than one of its operations.** With
  ``atomic_batch`` ("all", or "partition" within one) it happens whole or not at all, and its
  conditions see the state before it. Without, it runs in its order and stops at the first
  operation that fails.
* **The batches of one call** are independent and are applied in list order; each has its own answer.
* **Expired entries do not exist** for get, scan and conditions alike. A Put that is already expired
  deletes its key.
* **An error is raised for the whole call, or returned in a batch's place**; returned errors are
  ``Conflict``, ``ValueTooLarge``, ``KeyTooLong``, ``Unavailable`` (no effect) or ``CommitUnknown``.
"""

from __future__ import annotations

import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from enum import Enum
from typing import Any, ClassVar, Final, Literal, Protocol, TypeAlias, runtime_checkable
from zlib import crc32

import msgspec

from kvpersist.errors import BadRequest, CorruptRecord, KvError, MissingExtra

__all__ = [
    "ABSENT",
    "DRIVER_API",
    "HEADER_BYTES",
    "Absent",
    "BacksUp",
    "Batch",
    "Capabilities",
    "Check",
    "Clock",
    "Committed",
    "Compacts",
    "Delete",
    "DescribesTables",
    "Driver",
    "DriverClass",
    "Entry",
    "Expect",
    "Gets",
    "HasClock",
    "Measures",
    "Op",
    "Pings",
    "Provisions",
    "Put",
    "Streams",
    "UsesClock",
    "Watches",
    "deref_by_get",
    "milliseconds",
    "needs_extra",
    "packed_header",
    "unpacked_entry",
]

DRIVER_API: Final = 1
"""The number a driver class carries as ``api``; raised only together with an adapter for the old one."""


class Absent(Enum):
    """The type of `ABSENT`: no live entry at this key."""

    ABSENT = "absent"

    def __repr__(self) -> str:
        return "ABSENT"


ABSENT: Final = Absent.ABSENT
Expect: TypeAlias = bytes | Absent
Clock: TypeAlias = Callable[[], float]
"""Seconds since 1970, as ``time.time``."""

HEADER_BYTES: Final = 20
"""Length of what `packed_header` returns."""

_HEADER: Final = struct.Struct(">8sQI")  # version, expiry in milliseconds or 0 for never, CRC32 of both
_NEVER: Final = bytes(8)
_FAR: Final = 1 << 53  # milliseconds: up to here every double holds them exactly


class Entry(msgspec.Struct, frozen=True, gc=False):
    """What is stored at one key. ``expires_at`` is in seconds since 1970; None: never.

    In the answer of a ``deref`` scan, ``target`` is the entry that this one points at, None if
    there is none. With ``keys_only``, ``value`` is empty.
    """

    key: str
    value: bytes
    version: bytes
    expires_at: float | None = None
    target: Entry | None = None


class Put(msgspec.Struct, frozen=True, gc=False):
    """Store ``value``; ``expect`` is the version that must be there, ABSENT, or None for any."""

    key: str
    value: bytes
    expect: Expect | None = None
    expires_at: float | None = None


class Delete(msgspec.Struct, frozen=True, gc=False):
    """Remove the key; deleting what is absent succeeds unless ``expect`` names a version."""

    key: str
    expect: bytes | None = None


class Check(msgspec.Struct, frozen=True, gc=False):
    """Change nothing, and fail the batch unless the key is as expected."""

    key: str
    expect: Expect


Op: TypeAlias = Check | Put | Delete


class Batch(msgspec.Struct, frozen=True, gc=False):
    """Operations that belong together, and the version their Puts are stored under."""

    ops: tuple[Op, ...]
    version: bytes


class Committed(msgspec.Struct, frozen=True, gc=False):
    """A batch took effect and will be seen by every later read."""

    version: bytes


class Capabilities(msgspec.Struct, frozen=True, kw_only=True):
    """What a backend keeps, probed when it was opened; the defaults promise nothing.

    Attributes:
        atomic_batch: "all": any batch is atomic; "partition": one whose keys share the text before
            their first ``:``; "none": batches run in their order.
        conditional: Put and Check honour ``expect``. conditional_delete: Delete does too.
        ordered: scan answers in key order. reverse: also backwards. deref: scan follows index entries.
        coalesce: which concurrent calls gain from being merged into one.
        overlap: which merged calls are two in flight at a time, where a second one waits; commits never
            with a key that the other one writes. It gains where the backend works in another process.
        ttl: "native": the backend removes expired entries; "swept": `Compacts.compact` does.
        watch: how changes become known, None where they do not.
        durable: an acknowledged write survives the machine's death, not only the process's.
        shared: several processes may hold the same store open.
        cancel_settles: once a cancelled commit call has returned, it either took effect or never will.
        preferred_codec: the codec a Store uses unless told otherwise.
        max_key_bytes, max_value_bytes, max_batch: limits; None: none known. max_batch counts operations.
        server: name and version of what answers, for people.
    """

    atomic_batch: Literal["none", "partition", "all"] = "none"
    conditional: bool = False
    conditional_delete: bool = False
    ordered: bool = False
    reverse: bool = False
    deref: bool = False
    coalesce: Literal["none", "writes", "both"] = "none"
    overlap: Literal["none", "writes", "both"] = "none"
    ttl: Literal["native", "swept"] = "swept"
    watch: Literal["push", "poll", "local"] | None = None
    durable: bool = False
    shared: bool = False
    cancel_settles: bool = False
    preferred_codec: Literal["msgpack", "json"] = "msgpack"
    max_key_bytes: int | None = None
    max_value_bytes: int | None = None
    max_batch: int | None = None
    server: str = ""


class Driver(Protocol):
    """Talks to one backend. An instance belongs to the event loop it was opened in."""

    capabilities: Capabilities

    async def get(self, keys: Sequence[str]) -> list[Entry | None]:
        """Read ``n`` keys in one round trip: ``n`` items in their order, repeats allowed.

        An error that is not every key's names its keys in ``about``, as `CorruptRecord` does; whoever
        asked for others asks again.
        """
        ...

    async def commit(self, batches: Sequence[Batch]) -> list[Committed | KvError]:
        """Apply ``n`` independent batches in order: ``n`` outcomes in their order.

        Raises:
            Unavailable: none of the batches took effect.
            CommitUnknown: any of them may have.
        """
        ...

    async def scan(
        self,
        start: str | None,
        end: str | None,
        *,
        limit: int,
        reverse: bool = False,
        keys_only: bool = False,
        deref: str | None = None,
    ) -> list[Entry]:
        """Return the first ``limit`` live entries of ``[start, end)`` in key order (None: no bound).

        ``reverse`` starts at the end. With ``deref`` each answered entry carries as ``target`` the
        entry at ``deref + value``; ``keys_only`` leaves values out and is not combined with it.
        """
        ...

    async def close(self) -> None:
        """Release everything; a second call does nothing. Calls under way end or fail first."""
        ...


class DriverClass(Protocol):
    """What an entry point of the group ``kvpersist.drivers`` names."""

    api: ClassVar[int]
    Options: ClassVar[type[msgspec.Struct]]

    @classmethod
    async def open(cls, options: Any, /) -> Driver: ...


@runtime_checkable
class UsesClock(Protocol):
    """Judges expiry by the client's clock: a Store may replace ``clock``, e.g. in a test."""

    clock: Clock


@runtime_checkable
class HasClock(Protocol):
    """Judges expiry by the backend's own clock."""

    async def now(self) -> float:
        """Seconds since 1970 by the backend's clock."""
        ...


@runtime_checkable
class Compacts(Protocol):
    """Can reclaim space."""

    async def compact(self, limit: int = 500) -> int:
        """Remove at most ``limit`` expired entries, give back free space; return how many went."""
        ...


@runtime_checkable
class Watches(Protocol):
    """Can tell of changes."""

    def watch(self, prefix: str) -> AsyncIterator[tuple[str, ...]]:
        """Yield the changed keys below ``prefix``, whoever changed them.

        An empty tuple says that any may have changed. It is the first item, too: what is committed after
        it is told. A connection that was lost is made again, and an empty tuple follows.

        With ``capabilities.watch`` "push" or "local" keys are named wherever possible; with "poll" they
        may never be.
        """
        ...


@runtime_checkable
class BacksUp(Protocol):
    """Can copy itself while in use."""

    async def backup(self, path: str) -> None:
        """Write a consistent copy of the whole store to ``path``."""
        ...


@runtime_checkable
class Pings(Protocol):
    """Can be asked whether it is there."""

    async def ping(self) -> None:
        """Return when the backend answers; raise ``Unavailable`` when it does not."""
        ...


@runtime_checkable
class Measures(Protocol):
    """Can tell how much room it takes."""

    async def size(self) -> int:
        """Bytes in the backend, indexes and free space included, as far as it is known there."""
        ...


@runtime_checkable
class Provisions(Protocol):
    """Keeps its entries in tables or the like, which must be there before the first call."""

    def ddl(self) -> str:
        """Return the statements that make what the store needs, as an administrator would run them."""
        ...

    async def provision(self) -> None:
        """Make what is missing; where nothing is, do nothing."""
        ...


@runtime_checkable
class DescribesTables(Protocol):
    """Of the class of a driver that `Provisions`: tells its statements without a server."""

    @classmethod
    def ddl_of(cls, options: Any, /) -> str:
        """Return what `Provisions.ddl` does for the store of ``options``; nothing is opened."""
        ...


@runtime_checkable
class Streams(Protocol):
    """Can read and write one value piece by piece, without holding it in memory."""

    async def read_stream(self, key: str) -> tuple[Entry, AsyncIterator[bytes]] | None:
        """Return the entry, with an empty value, and the value's pieces; None if there is no live entry.

        All pieces are of one version. Whoever asked exhausts the iterator or calls its ``aclose``.
        """
        ...

    async def write_stream(
        self,
        key: str,
        pieces: AsyncIterator[bytes],
        *,
        version: bytes,
        expect: Expect | None = None,
        expires_at: float | None = None,
    ) -> Committed | KvError:
        """Store what ``pieces`` yields as one value, whole or not at all, as one `Put` would.

        What ``pieces`` raises comes out, and nothing is stored then.
        """
        ...


class Gets(Protocol):
    """The reading half of a driver."""

    def get(self, keys: Sequence[str], /) -> Awaitable[list[Entry | None]]: ...


async def deref_by_get(driver: Gets, entries: list[Entry], prefix: str) -> list[Entry]:
    """Add the targets to index entries with one get, for a driver without the ``deref`` capability."""
    if not entries:
        return []
    targets = await driver.get([prefix + entry.value.decode() for entry in entries])
    return [
        Entry(entry.key, entry.value, entry.version, entry.expires_at, target)
        for entry, target in zip(entries, targets, strict=True)
    ]


def milliseconds(expires_at: float | None) -> int:
    """Return an expiry as `packed_header` keeps it: 0 never, 1 at the least.

    Raises:
        BadRequest: it is not a number.
    """
    if expires_at is None:
        return 0
    if expires_at != expires_at:
        raise BadRequest("an expiry is a number of seconds since 1970, not NaN")
    return int(max(1, min(expires_at * 1000, _FAR)))


def packed_header(version: bytes, expires_ms: int) -> bytes:
    """Return what a driver writes before the value where its backend keeps nothing but bytes."""
    head = version + (expires_ms.to_bytes(8, "big") if expires_ms else _NEVER)
    return head + crc32(head).to_bytes(4, "big")


def unpacked_entry(key: str, stored: bytes) -> Entry:
    """Return the entry that was stored as header and value.

    Raises:
        CorruptRecord: this is no header, or a damaged one.
    """
    if len(stored) < HEADER_BYTES:
        raise CorruptRecord(key, f"{len(stored)} bytes are shorter than a header")
    version, expires_ms, check = _HEADER.unpack_from(stored)
    if check != crc32(stored[:16]):
        raise CorruptRecord(key, "its header is not what was written")
    return Entry(key, stored[HEADER_BYTES:], version, expires_ms / 1000 if expires_ms else None)


@contextmanager
def needs_extra(extra: str, *, module: str) -> Iterator[None]:
    """Turn the absence of an optional ``module`` into an install hint; let a broken one fail as itself."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name != module and not (error.name or "").startswith(module + "."):
            raise
        raise MissingExtra(extra, module) from error
