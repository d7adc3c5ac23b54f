"""Every error kvpersist raises.

    KvError                    code, retryable, outcome
    |-- Unavailable            ConnectionError   the backend did not answer; nothing changed
    |   |-- DeadlineExceeded   TimeoutError      no answer in time; nothing changed
    |   |-- Busy                                 another process holds the store's lock; nothing changed
    |   |-- PoolExhausted                        every connection of this process's pool is in use; nothing changed
    |   `-- TooManyClients                       the server takes no more connections; nothing changed
    |-- CommitUnknown                            the write may or may not have happened
    |-- Conflict                                 the stored version is not the expected one
    |   `-- UniqueConflict                       another record holds the unique value
    |-- Locked                                 somebody else holds the lock
    |-- LeaseLost                              somebody else took the lock; nothing changed
    |-- PartlyDone                               some of many independent writes failed
    |-- ValueReplaced                            a large value was replaced while it was read
    |-- LargeValue                               a large value is read piece by piece, not whole
    |-- ParentGone             LookupError       the record it belongs to was deleted, or never was
    |-- SchemaChanged                            another writer declared other indexes
    |-- IndexNotReady                            the index is still being built
    |-- EventsExpired                            retention removed events that were not read yet
    |-- Unsupported                              this backend cannot keep that promise
    |-- BadRequest             ValueError        the call itself is wrong
    |   |-- BadKey, KeyTooLong, ValueTooLarge, Unencodable, NoIndex, BadCursor
    |   |-- ReservedNamespace, BadOption, UnknownScheme, MalformedRecord, BadTransition
    |-- CorruptRecord          ValueError        stored bytes are not what was written
    |-- FormatMismatch                           a store of another format, or no store at all
    |-- ReadOnly               PermissionError   the store cannot be written
    |-- StoreClosed, WrongLoop, ForkedStore      RuntimeError
    |-- MissingExtra, BrokenPlugin               ImportError

Three outcomes exist: done (no error), failed without effect (``outcome == "none"``), and unknown
(``outcome == "unknown"``, only `CommitUnknown`). ``retryable`` is true where the same call may be
made again as it stands.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

__all__ = [
    "BadCursor",
    "BadKey",
    "BadOption",
    "BadRequest",
    "BadTransition",
    "BrokenPlugin",
    "Busy",
    "CommitUnknown",
    "Conflict",
    "CorruptRecord",
    "DeadlineExceeded",
    "EventsExpired",
    "ForkedStore",
    "FormatMismatch",
    "IndexNotReady",
    "KeyTooLong",
    "KvError",
    "LargeValue",
    "LeaseLost",
    "Locked",
    "MalformedRecord",
    "MissingExtra",
    "NoIndex",
    "ParentGone",
    "PartlyDone",
    "PoolExhausted",
    "ReadOnly",
    "ReservedNamespace",
    "SchemaChanged",
    "StoreClosed",
    "TooManyClients",
    "Unavailable",
    "Unencodable",
    "UniqueConflict",
    "UnknownScheme",
    "Unsupported",
    "ValueReplaced",
    "ValueTooLarge",
    "WrongLoop",
]


class KvError(Exception):
    """Base of every kvpersist error; every field is positional, so each pickles."""

    code: ClassVar[str] = "KV000"
    retryable: ClassVar[bool] = False
    outcome: ClassVar[Literal["none", "unknown"]] = "none"
    about: tuple[str, ...] | None = None
    """Of an error of a driver's ``get``: the keys that cannot be read. None: all that were asked for."""


class Unavailable(KvError, ConnectionError):
    """The backend did not answer, and nothing was changed: the same call may be made again."""

    code = "KV200"
    retryable = True


class DeadlineExceeded(Unavailable, TimeoutError):
    """No answer came within the store's ``timeout``; nothing was changed."""

    code = "KV201"

    def __init__(self, operation: str, seconds: float) -> None:
        super().__init__(operation, seconds)
        self.operation, self.seconds = operation, seconds

    def __str__(self) -> str:
        return (
            f"{self.operation} got no answer in {self.seconds:g} s; nothing was changed: try again, or raise kv.timeout"
        )


class Busy(Unavailable):
    """Another process held the store's write lock for too long; nothing was changed."""

    code = "KV202"


class PoolExhausted(Unavailable):
    """Every connection of this process's pool stayed in use for ``seconds``; nothing was changed.

    ``size`` is the pool's limit, ``in_use`` how many of it were taken.
    """

    code = "KV203"

    def __init__(self, size: int, in_use: int, seconds: float) -> None:
        super().__init__(size, in_use, seconds)
        self.size, self.in_use, self.seconds = size, in_use, seconds

    def __str__(self) -> str:
        return (
            f"all {self.in_use} of {self.size} connections stayed in use for {self.seconds:g} s; nothing was changed: "
            "raise kv.pool_max, or do less at once"
        )


class TooManyClients(Unavailable):
    """The server takes no more connections, from whomever; nothing was changed."""

    code = "KV204"


class CommitUnknown(KvError):
    """The answer to a write was lost: it may or may not have happened. Read before writing again.

    ``settled`` is true where the backend has finished with the write, so that its effect, if any,
    is visible by now.
    """

    code = "KV210"
    outcome = "unknown"

    def __init__(self, keys: tuple[str, ...], reason: str, settled: bool = False) -> None:
        super().__init__(keys, reason, settled)
        self.keys, self.reason, self.settled = keys, reason, settled

    def __str__(self) -> str:
        shown = ", ".join(repr(key) for key in self.keys[:3]) + (", ..." if len(self.keys) > 3 else "")
        return f"the write of {shown} may or may not have happened ({self.reason}): read it before writing again"


class Conflict(KvError):
    """The stored version is not the one the caller expected.

    Not retryable as it stands: a blind second attempt would erase the other writer. ``expected``
    and ``found`` are a version, ``ABSENT``, or None where any or an unknown one is meant;
    ``position`` is that of the failing operation in its batch.
    """

    code = "KV300"

    def __init__(self, key: str, expected: Any, found: Any = None, position: int = 0) -> None:
        super().__init__(key, expected, found, position)
        self.key, self.expected, self.found, self.position = key, expected, found, position

    def __str__(self) -> str:
        return f"{self.key!r} is {_shown(self.found)}, expected {_shown(self.expected)}: read it again"


class UniqueConflict(Conflict):
    """Another record holds this value of a unique index."""

    code = "KV301"

    def __init__(self, index: str, value: str, holder: str) -> None:
        KvError.__init__(self, index, value, holder)
        self.index, self.value, self.holder = index, value, holder
        self.key, self.expected, self.found, self.position = f"{index}:{value}", None, None, 0

    def __str__(self) -> str:
        return f"unique index {self.index!r}: {self.value!r} belongs to record {self.holder!r}; choose another value"


class Locked(KvError):
    """Somebody else, ``owner``, holds the lock, and the time to wait for it is over.

    ``expires_at``, in seconds since 1970, is when it ends unless they renew it.
    """

    code = "KV310"
    retryable = True

    def __init__(self, name: str, owner: str, expires_at: float) -> None:
        super().__init__(name, owner, expires_at)
        self.name, self.owner, self.expires_at = name, owner, expires_at

    def __str__(self) -> str:
        return f"{self.owner} holds the lock {self.name!r}: try again later, or wait longer with wait="


class LeaseLost(KvError):
    """The lease is over: somebody else took the lock, or it was released. What was to be written under it was not.

    No Conflict: to read again and write again is what must not be done.
    """

    code = "KV311"

    def __init__(self, name: str, token: int) -> None:
        super().__init__(name, token)
        self.name, self.token = name, token

    def __str__(self) -> str:
        return (
            f"the lock {self.name!r} was taken over or released, token {self.token} is over: "
            "acquire it again and begin with reading"
        )


class PartlyDone(KvError):
    """Of many independent writes some were done and some were not.

    ``failed`` maps each key that was not (surely) written to its error; every other key was.
    """

    code = "KV305"

    def __init__(self, done: int, failed: dict[str, KvError]) -> None:
        super().__init__(done, failed)
        self.done, self.failed = done, failed

    def __str__(self) -> str:
        key, error = next(iter(self.failed.items()))
        return f"{self.done} written, {len(self.failed)} not; the first of those, {key!r}: {error}"


class ValueReplaced(KvError):
    """A large value was replaced or removed while it was read; what was read of it is of the old one."""

    code = "KV306"
    retryable = True

    def __init__(self, key: str) -> None:
        super().__init__(key)
        self.key = key

    def __str__(self) -> str:
        return f"the value of {self.key!r} was replaced or removed while it was read: open it again"


class LargeValue(KvError):
    """The value has ``size`` bytes, was written with ``open_write``, and is not given as a whole."""

    code = "KV307"

    def __init__(self, key: str, size: int) -> None:
        super().__init__(key, size)
        self.key, self.size = key, size

    def __str__(self) -> str:
        return f"the value of {self.key!r} has {self.size} bytes: read it piece by piece, with open_read()"


class ParentGone(KvError, LookupError):
    """The record this one belongs to does not exist (any more)."""

    code = "KV302"

    def __init__(self, kind: str, id_: str) -> None:
        super().__init__(kind, id_)
        self.kind, self.id = kind, id_

    def __str__(self) -> str:
        return f"{self.kind} {self.id!r} does not exist, or was deleted: create it first"


class SchemaChanged(KvError):
    """Another writer declared indexes that this process does not know and could not maintain."""

    code = "KV303"

    def __init__(self, collection: str, detail: str) -> None:
        super().__init__(collection, detail)
        self.collection, self.detail = collection, detail

    def __str__(self) -> str:
        return f"the indexes of {self.collection!r} changed: {self.detail}; deploy the same declarations everywhere"


class IndexNotReady(KvError):
    """The index exists, and is written, but does not hold every record yet."""

    code = "KV304"

    def __init__(self, collection: str, index: str) -> None:
        super().__init__(collection, index)
        self.collection, self.index = collection, index

    def __str__(self) -> str:
        return f"index {self.index!r} of {self.collection!r} is being built: await reindex() once, then query it"


class EventsExpired(KvError):
    """Retention removed events behind ``after`` that this reader had not read; those from ``first`` on are there.

    ``missed`` says how many went. Read on from the position before ``first`` by ``on_expired="skip"``.
    """

    code = "KV308"

    def __init__(self, topic: str, after: str, first: str, missed: int) -> None:
        super().__init__(topic, after, first, missed)
        self.topic, self.after, self.first, self.missed = topic, after, first, missed

    def __str__(self) -> str:
        return (
            f"{self.missed} events of topic {self.topic!r} behind {self.after} expired unread; the first there is "
            f'{self.first}: read on with on_expired="skip", or keep events longer'
        )


class Unsupported(KvError):
    """This backend cannot keep what was asked for."""

    code = "KV400"

    def __init__(self, what: str, hint: str = "") -> None:
        super().__init__(what, hint)
        self.what, self.hint = what, hint

    def __str__(self) -> str:
        return f"{self.what} is not supported by this backend" + (f"; {self.hint}" if self.hint else "")


class BadRequest(KvError, ValueError):
    """The call itself is wrong, whatever the store holds."""

    code = "KV410"


class BadKey(BadRequest):
    """Not a key: ``key`` and why."""

    code = "KV411"

    def __init__(self, key: Any, reason: str) -> None:
        super().__init__(key, reason)
        self.key, self.reason = key, reason

    def __str__(self) -> str:
        return f"bad key {self.key!r}: {self.reason}"


class KeyTooLong(BadKey):
    """The encoded key is longer than this store keeps."""

    code = "KV412"

    def __init__(self, key: str, size: int, limit: int) -> None:
        super().__init__(key, f"{size} bytes encoded, the limit is {limit}: shorten it, or keep the text in the value")
        self.args = (key, size, limit)
        self.size, self.limit = size, limit


class ValueTooLarge(BadRequest):
    """The value is larger than this store keeps."""

    code = "KV413"

    def __init__(self, key: str, size: int, limit: int) -> None:
        super().__init__(key, size, limit)
        self.key, self.size, self.limit = key, size, limit

    def __str__(self) -> str:
        return f"the value of {self.key!r} has {self.size} bytes, the limit is {self.limit}: split it or use a bucket"


class Unencodable(BadRequest):
    """A value that cannot be kept and given back alike; ``path`` says where it is."""

    code = "KV414"

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(path, reason)
        self.path, self.reason = path, reason

    def __str__(self) -> str:
        return f"{self.path or 'the value'} cannot be kept: {self.reason}"


class NoIndex(BadRequest):
    """A query that no declared index answers."""

    code = "KV415"

    def __init__(self, collection: str, asked: str, available: tuple[str, ...]) -> None:
        super().__init__(collection, asked, available)
        self.collection, self.asked, self.available = collection, asked, available

    def __str__(self) -> str:
        known = ", ".join(self.available) or "none"
        return f"{self.collection!r} has no index for {self.asked}; declared: {known}. Declare one, or use iterate()"


class BadCursor(BadRequest):
    """A cursor that this query did not give out."""

    code = "KV416"

    def __init__(self, cursor: str) -> None:
        super().__init__(cursor)
        self.cursor = cursor

    def __str__(self) -> str:
        return "this cursor belongs to another query or store: start again without one"


class ReservedNamespace(BadRequest):
    """A plain write into a namespace that a repository owns."""

    code = "KV417"

    def __init__(self, key: str, namespace: str) -> None:
        super().__init__(key, namespace)
        self.key, self.namespace = key, namespace

    def __str__(self) -> str:
        return (
            f"{self.key!r} lies in namespace {self.namespace!r}, which a repository owns: a plain write would "
            "break its indexes; use the repository, another namespace, or raw=True"
        )


class BadOption(BadRequest):
    """An unknown or malformed option of a URL, mapping or call."""

    code = "KV418"

    def __init__(self, option: str, reason: str) -> None:
        super().__init__(option, reason)
        self.option, self.reason = option, reason

    def __str__(self) -> str:
        return f"option {self.option!r}: {self.reason}"


class UnknownScheme(BadRequest):
    """No driver is registered for the URL's scheme."""

    code = "KV419"

    def __init__(self, scheme: str, suggestion: str, known: tuple[str, ...], hint: str = "") -> None:
        super().__init__(scheme, suggestion, known, hint)
        self.scheme, self.suggestion, self.known, self.hint = scheme, suggestion, known, hint

    def __str__(self) -> str:
        meant = f" Did you mean {self.suggestion!r}?" if self.suggestion else ""
        hint = f". {self.hint}" if self.hint else ""
        return f"no driver for {self.scheme!r}.{meant} Known: {', '.join(self.known)}{hint}"


class MalformedRecord(BadRequest):
    """An imported record is not of the expected form; nothing of it was written."""

    code = "KV420"

    def __init__(self, source: str, record: int | str, field: str, reason: str) -> None:
        super().__init__(source, record, field, reason)
        self.source, self.record, self.field, self.reason = source, record, field, reason

    def __str__(self) -> str:
        field = f", field {self.field}" if self.field else ""
        return f"{self.source}: record {self.record}{field}: {self.reason}"


class BadTransition(BadRequest):
    """A record cannot come to ``wanted`` from the ``state`` it is in; nothing was changed."""

    code = "KV421"

    def __init__(self, record: str, state: str, wanted: str, allowed: tuple[str, ...]) -> None:
        super().__init__(record, state, wanted, allowed)
        self.record, self.state, self.wanted, self.allowed = record, state, wanted, allowed

    def __str__(self) -> str:
        ways = f"from there it may become {', '.join(self.allowed)}" if self.allowed else "that is its end"
        return f"{self.record} is {self.state} and cannot become {self.wanted}: {ways}"


class CorruptRecord(KvError, ValueError):
    """Stored bytes are not what was written under this key; nothing was returned for it."""

    code = "KV500"

    def __init__(self, key: str, reason: str) -> None:
        super().__init__(key, reason)
        self.key, self.reason = key, reason
        self.about = (key,)

    def __str__(self) -> str:
        return f"the record at {self.key!r} is damaged ({self.reason}): restore it from a backup, or delete it"


class FormatMismatch(KvError):
    """The store was written in a format this version does not read, or is not a kvpersist store."""

    code = "KV501"

    def __init__(self, where: str, found: str, expected: str) -> None:
        super().__init__(where, found, expected)
        self.where, self.found, self.expected = where, found, expected

    def __str__(self) -> str:
        return (
            f"{self.where}: found {self.found}, expected {self.expected}; nothing was written: "
            "name another place, or use the kvpersist that wrote this one"
        )


class ReadOnly(KvError, PermissionError):
    """The store was opened read-only, or its place cannot be written."""

    code = "KV502"


class StoreClosed(KvError, RuntimeError):
    """The store was closed: open it again."""

    code = "KV600"


class WrongLoop(KvError, RuntimeError):
    """The store belongs to another event loop: open one in each loop, or use ``open_sync``."""

    code = "KV601"


class ForkedStore(KvError, RuntimeError):
    """The store was opened before a fork: open it again in the child."""

    code = "KV602"


class MissingExtra(KvError, ImportError):
    """An optional library is not installed."""

    code = "KV700"

    def __init__(self, extra: str, module: str) -> None:
        super().__init__(extra, module)
        self.extra, self.module = extra, module

    def __str__(self) -> str:
        return f"{self.module!r} is not installed: pip install 'kvpersist[{self.extra}]'"


class BrokenPlugin(KvError, ImportError):
    """A driver is registered for the scheme and cannot be loaded."""

    code = "KV701"

    def __init__(self, scheme: str, target: str, reason: str) -> None:
        super().__init__(scheme, target, reason)
        self.scheme, self.target, self.reason = scheme, target, reason

    def __str__(self) -> str:
        return f"the driver of {self.scheme!r} ({self.target}) cannot be loaded: {self.reason}"


def _shown(version: Any) -> str:
    if version is None:
        return "not the expected one"
    return f"version {version.hex()}" if isinstance(version, bytes) else "absent"
