"""Made by tests/sync/make_types.py from the asynchronous names; see `kvpersist.sync`."""

import builtins
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from datetime import datetime, timedelta
from kvpersist.agents.checking import Consistency
from kvpersist.agents.conversations.confirmations import Confirmation
from kvpersist.agents.conversations.repairs import Problem
from kvpersist.agents.conversations.tool_calls import Recording
from kvpersist.agents.conversations.traces import TokenUsage, Trace
from kvpersist.agents.finding.queries import Found
from kvpersist.agents.health import Health, Totals
from kvpersist.agents.records import Message, Session, SessionStat, Stats, TimelineItem, ToolCall
from kvpersist.agents.runs.streams import StoredTurn
from kvpersist.agents.runs.threads import ThreadContext
from kvpersist.agents.state.agents import Agent, AgentStats
from kvpersist.agents.state.history import Compression, HistoryWindow, RecoveredFile
from kvpersist.agents.state.media import Media
from kvpersist.agents.state.snapshots import Snapshot
from kvpersist.agents.state.todos import Todo, TodoList
from kvpersist.agents.workspace.containers import Container
from kvpersist.agents.workspace.images import Image
from kvpersist.agents.workspace.login_sessions import LoginSession
from kvpersist.agents.workspace.prototypes import Prototype
from kvpersist.agents.workspace.providers import Provider
from kvpersist.changes.scope import Change
from kvpersist.driver import Absent, Capabilities, Check, Driver
from kvpersist.errors import CorruptRecord, LargeValue
from kvpersist.events.records import Claimed, EventEntry, GroupStats, Lag, Parked, TopicStats
from kvpersist.home import Home
from kvpersist.index.declaration import BoundIndex, Index
from kvpersist.index.rebuild import Damage, Reindexed
from kvpersist.lease import Holder
from kvpersist.metrics import Metrics
from kvpersist.repository import Page
from kvpersist.store import Info, Versioned
from msgspec import UnsetType
from os import PathLike
from typing import Any, Generic, Literal, Self, TypeAlias, TypeVar
from uuid import UUID

__all__ = ["open_store_sync", "open_sync"]

After: TypeAlias = str | int | dict[str, Any] | None
Beside: TypeAlias = Where | Driver | Store | None
Clock: TypeAlias = Callable[[], float]
DotEnv: TypeAlias = bool | str | PathLike[str]
Expect: TypeAlias = bytes | Absent
Given: TypeAlias = str | Message | Mapping[str, Any] | Sequence[Any]
Handler: TypeAlias = Callable[[EventEntry], object | object]
OnCorrupt: TypeAlias = Callable[[CorruptRecord], None]
OnExpired: TypeAlias = Literal['raise', 'skip']
R = TypeVar('R')
SecretKey: TypeAlias = str | bytes | Sequence[str | bytes]
TraceType: TypeAlias = Literal['agent', 'tool', 'llm', 'retriever', 'embedding', 'chain']
Where: TypeAlias = str | PathLike[str] | Mapping[str, Any]
_Agents: TypeAlias = 'list[Agent]'
_Messages: TypeAlias = builtins.list[Message]
_Sessions: TypeAlias = builtins.list[Session]
_T = TypeVar('_T')

def open_sync(where: Where | Driver | Store | None = ..., *, namespace: str = ..., session_indexes: Iterable[Index] = ..., message_indexes: Iterable[Index] = ..., tool_call_indexes: Iterable[Index] = ..., text_index: bool = ..., events: Mapping[str, Any] | Beside = ..., files: Beside = ..., secret_key: SecretKey | None = ..., codec: Literal['msgpack', 'json'] | None = ..., ttl: float | None | UnsetType = ..., timeout: float | None | UnsetType = ..., clock: Clock = ..., sweep: float | None | UnsetType = ..., profile: str | None = ..., home: Home | str | PathLike[str] | None = ..., dotenv: DotEnv = ..., logs: int | str | bool | None = ..., **options: Any) -> Persistence:
    """Open an agent's records; ``with`` it, or close it."""
def open_store_sync(where: Where | Driver | Store | None = ..., *, codec: Literal['msgpack', 'json'] | None = ..., ttl: float | None | UnsetType = ..., timeout: float | None | UnsetType = ..., clock: Clock = ..., sweep: float | None | UnsetType = ..., profile: str | None = ..., home: Home | str | PathLike[str] | None = ..., dotenv: DotEnv = ..., **options: Any) -> Store:
    """Open a store; ``with`` it, or close it."""

class Agents:
    """The agents of one namespace, ``db.agents``."""
    def create(self, agent: Agent | None = ..., **fields: Any) -> Agent:
        """Store a new agent, given whole or by its fields; return it as it is stored."""
    def save(self, agent: Agent) -> Agent:
        """Store an agent, in place of the one of its id if there is one; return it as stored."""
    def get(self, id: str | UUID) -> Agent | None:
        """Return the agent, or None; one read."""
    def exists(self, id: str | UUID) -> bool:
        """Whether there is such an agent."""
    def update(self, id: str | UUID, fn: Callable[[Agent], Agent]) -> Agent | None:
        """Replace the agent by what ``fn`` makes of it, and return that; None where there is none."""
    def set_metadata(self, id: str | UUID, metadata: Mapping[str, Any]) -> Agent | None:
        """Replace the agent's metadata as a whole; None where there is no such agent."""
    def merge_metadata(self, id: str | UUID, metadata: Mapping[str, Any]) -> Agent | None:
        """Set some keys of the agent's metadata and leave the others; None where there is no such agent."""
    def delete(self, id: str | UUID) -> bool:
        """Delete the agent and everything that belongs to it; False where there was none."""
    def find(self, *, limit: int = ..., offset: int = ..., id_prefix: str | None = ..., on_corrupt: OnCorrupt | None = ..., **where: Any) -> _Agents:
        """Return up to ``limit`` agents, newest first, behind the first ``offset``."""
    def page(self, *, limit: int = ..., after: str | None = ..., on_corrupt: OnCorrupt | None = ..., **where: Any) -> Page[Agent]:
        """Return one page as `find` does without ``id_prefix``, and the cursor for the next. As `Repository.page`."""
    def iterate(self, *, id_prefix: str | None = ..., on_corrupt: OnCorrupt | None = ..., **where: Any) -> Iterator[Agent]:
        """Yield every agent that `find` would, newest first; with ``id_prefix`` in the order of their ids."""
    def count(self, *, id_prefix: str | None = ..., **where: Any) -> int:
        """Count what `find` would return without a limit; with ``id_prefix`` they are read for it."""
    def list(self, limit: int = ...) -> _Agents:
        """Return the newest agents, newest first."""
    def stats(self, id: str | UUID) -> AgentStats | None:
        """Count what there is of an agent, None where there is none: no message, call or event is read."""
    def fork(self, id: str | UUID, *, at: str | None = ..., count: int = ...) -> _Agents:
        """Make ``count`` new agents out of one, as it is, or as it was at a snapshot."""

class Compressions:
    """The compressions of one namespace, ``db.compressions``; those of an agent are found oldest first."""
    def get(self, id: Any) -> Compression | None:
        """Return the record, or None; one read."""
    def exists(self, id: Any) -> bool:
        """Whether there is such a record; it is not decoded."""
    def find(self, *, limit: int = ..., offset: int = ..., on_corrupt: OnCorrupt | None = ..., **where: Any) -> builtins.list[Compression]:
        """Return up to ``limit`` records behind the first ``offset`` through an index. As `Repository.find`."""
    def page(self, *, limit: int = ..., after: str | None = ..., on_corrupt: OnCorrupt | None = ..., **where: Any) -> Page[Compression]:
        """Return one page as `find` does, and the cursor for the next. As `Repository.page`."""
    def iterate(self, *, on_corrupt: OnCorrupt | None = ..., **where: Any) -> Iterator[Compression]:
        """Yield every record that `find` would. As `Repository.iterate`."""
    def count(self, **where: Any) -> int:
        """Count the records, all or those that `find` would return; only keys are read."""
    def create(self, record: Compression | None = ..., **fields: Any) -> Compression:
        """Store a new record, given whole or by its fields; return it as it is stored."""
    def save(self, record: Compression) -> Compression:
        """Store a record whose id you bring, in place of what is there; return it as it is stored."""
    def update(self, id: Any, fn: Callable[[Compression], Compression]) -> Compression | None:
        """Replace the record by what ``fn`` makes of it, and return that; None where there is none."""
    def set_metadata(self, id: Any, metadata: Mapping[str, Any]) -> Compression | None:
        """Replace the metadata as a whole; None where there is no such record."""
    def merge_metadata(self, id: Any, metadata: Mapping[str, Any]) -> Compression | None:
        """Set some keys of the metadata and leave the others; None where there is no such record."""
    def delete(self, id: Any) -> bool:
        """Remove the record; False where there was none."""
    def of(self, parent: str | UUID, *, limit: int | None = ..., reverse: bool = ..., on_corrupt: OnCorrupt | None = ...) -> builtins.list[Compression]:
        """Return the records below a parent in the order of their keys, all or the first ``limit`` of them."""
    def delete_all(self, parent: str | UUID) -> int:
        """Remove the records below a parent; return how many there were. As `replace_all` by nothing."""
    def replace_all(self, parent: str | UUID, items: Iterable[Compression]) -> builtins.list[Compression]:
        """Let ``items`` be all the records below a parent; return them as they are stored."""

class Confirmations:
    """The pending confirmations of one namespace, ``db.confirmations``: at most one per session."""
    def save(self, confirmation: Confirmation) -> Confirmation:
        """Store what a session waits for, in place of what it waited for before; return it as it is stored."""
    def get(self, session_id: str | UUID) -> Confirmation | None:
        """Return what a session waits for, or None; one read."""
    def clear(self, session_id: str | UUID) -> bool:
        """Let the session wait no more; False where it did not."""
    def find(self, *, limit: int = ..., offset: int = ...) -> builtins.list[Confirmation]:
        """Return the confirmations of all sessions, newest first."""
    def page(self, *, limit: int = ..., after: str | None = ...) -> Page[Confirmation]:
        """Return one page as `find` does, and the cursor for the next. Raises BadCursor."""
    def iterate(self) -> Iterator[Confirmation]:
        """Yield all confirmations, by session."""
    def count(self) -> int:
        """Count the sessions that wait; only keys are read."""

class Containers:
    """The containers of one namespace, ``db.containers``, newest first; found by ``name=``."""
    def get(self, id: Any) -> Container | None:
        """Return the record, or None; one read."""
    def exists(self, id: Any) -> bool:
        """Whether there is such a record; it is not decoded."""
    def find(self, *, limit: int = ..., offset: int = ..., on_corrupt: OnCorrupt | None = ..., **where: Any) -> builtins.list[Container]:
        """Return up to ``limit`` records behind the first ``offset`` through an index. As `Repository.find`."""
    def page(self, *, limit: int = ..., after: str | None = ..., on_corrupt: OnCorrupt | None = ..., **where: Any) -> Page[Container]:
        """Return one page as `find` does, and the cursor for the next. As `Repository.page`."""
    def iterate(self, *, on_corrupt: OnCorrupt | None = ..., **where: Any) -> Iterator[Container]:
        """Yield every record that `find` would. As `Repository.iterate`."""
    def count(self, **where: Any) -> int:
        """Count the records, all or those that `find` would return; only keys are read."""
    def create(self, record: Container | None = ..., **fields: Any) -> Container:
        """Store a new record, given whole or by its fields; return it as it is stored."""
    def save(self, record: Container) -> Container:
        """Store a record whose id you bring, in place of what is there; return it as it is stored."""
    def update(self, id: Any, fn: Callable[[Container], Container]) -> Container | None:
        """Replace the record by what ``fn`` makes of it, and return that; None where there is none."""
    def set_metadata(self, id: Any, metadata: Mapping[str, Any]) -> Container | None:
        """Replace the metadata as a whole; None where there is no such record."""
    def merge_metadata(self, id: Any, metadata: Mapping[str, Any]) -> Container | None:
        """Set some keys of the metadata and leave the others; None where there is no such record."""
    def delete(self, id: Any) -> bool:
        """Delete the record and everything that belongs to it; False where there was none."""
    def check(self, id: str | UUID) -> Check:
        """As `Births.check`."""

class EventGroup:
    """Consumers that share the events of one topic. Made by `EventQueue.group`."""
    topic: str
    name: str
    def claim(self, consumer: str, n: int = ...) -> builtins.list[Claimed]:
        """Take up to ``n`` events for ``consumer``: first those whose deadline passed, then new ones."""
    def ack(self, claimed: Claimed) -> bool:
        """The event is done; False where it was handed to another meanwhile, or acknowledged."""
    def release(self, claimed: Claimed, *, delay: float = ..., reason: str = ...) -> bool:
        """Let the event be handed out again, after ``delay`` seconds; False as for `ack`."""
    def extend(self, claimed: Claimed, seconds: float | None = ...) -> bool:
        """Put the deadline off to ``seconds`` from now (None: the group's); False as for `ack`."""
    def park(self, claimed: Claimed, *, reason: str = ...) -> bool:
        """Give the event up at once, without further attempts; False as for `ack`."""
    def consume(self, consumer: str, n: int = ...) -> Iterator[Claimed]:
        """Yield events as they come, taking ``n`` at a time, until the queue is closed."""
    def parked(self, limit: int = ..., after: str | None = ...) -> builtins.list[Parked]:
        """The events that were given up, by position, those behind ``after``."""
    def retry(self, position: str) -> bool:
        """Hand a parked event out again, its attempts counted anew; False where it is not parked."""
    def discard(self, position: str) -> bool:
        """Remove a parked event; False where it is not parked."""
    def stats(self) -> GroupStats:
        """How many events wait, are handed out, and expired before they were: a few reads."""

class EventQueue:
    """Topics of ordered events, kept in a store: published once, read by whoever wants, from wherever."""
    store: Store
    namespace: str
    def publish(self, topic: str, event: Any, *, channel: str | None = ..., cursor: str | int | None = ..., bookmark: Any = ...) -> str:
        """Store ``event`` behind all others of ``topic`` and return its position; then tell those who wait."""
    def publish_many(self, topic: str, events: Sequence[Any]) -> builtins.list[str]:
        """Publish ``n`` events in order: ``n`` positions. Up to 500 are one batch, more are cut into several."""
    def read(self, topic: str, after: After = ..., limit: int = ..., *, channels: str | Collection[str] | None = ..., on_expired: OnExpired = ...) -> builtins.list[EventEntry]:
        """Return the first ``limit`` events behind ``after``, oldest first."""
    def subscribe(self, topic: str, after: After = ..., *, consumer: str | None = ..., channels: str | Collection[str] | None = ..., buffer: int = ..., on_expired: OnExpired = ...) -> Subscription:
        """Return the events behind ``after``, and then each new one, for ``for``."""
    def on(self, topic: str, handler: Handler, after: After = ..., *, consumer: str | None = ..., channels: str | Collection[str] | None = ...) -> Callable[[], None]:
        """Call ``handler`` with each event, one after the other; return a function that ends this."""
    def replay(self, topic: str | None, last_event_id: str | None = ..., *, otherwise: After = ..., channels: str | Collection[str] | None = ..., on_expired: OnExpired = ...) -> Subscription:
        """Resume a stream at the ``Last-Event-ID`` a client sent: the events behind it, and then each new one."""
    def ack(self, consumer: str, topic: str, position: After) -> str:
        """Note that ``consumer`` is done with everything up to ``position``; return how far it has come."""
    def cursor(self, consumer: str, topic: str) -> str | None:
        """The position up to which ``consumer`` acknowledged; None: it is not known."""
    def recover(self, consumer: str, topic: str, limit: int = ..., *, channels: str | Collection[str] | None = ..., on_expired: OnExpired = ...) -> builtins.list[EventEntry]:
        """Return the first ``limit`` events that ``consumer`` has not acknowledged, oldest first."""
    def lag(self, consumer: str, topic: str) -> Lag:
        """How many events wait for ``consumer``, and how many expired before it acknowledged them: a few reads."""
    def consumers(self, topic: str) -> dict[str, str]:
        """The consumers of a topic, and the position up to which each acknowledged."""
    def forget(self, consumer: str, topic: str) -> bool:
        """Forget a consumer's cursor; False where there is none."""
    def group(self, topic: str, name: str, *, after: After = ..., deadline: float = ..., max_attempts: int = ..., in_flight: int = ..., on_expired: OnExpired = ...) -> EventGroup:
        """A group of consumers that share the events of a topic: each event goes to one of them."""
    def topics(self) -> builtins.list[str]:
        """The topics that ever had an event, in order."""
    def delete(self, topic: str) -> bool:
        """Remove a topic: its events, consumers, groups and what they parked; False where there was none."""
    def stats(self, topic: str) -> TopicStats:
        """What a topic holds: a few reads, whatever its length."""
    def sweep(self) -> int:
        """Apply retention now; return how many events went."""
    def close(self) -> None:
        """End every subscription and the sweeps; a second call does nothing. The store stays open."""
    def __enter__(self) -> Self: ...
    def __exit__(self, *problem: object) -> bool | None: ...

class Images:
    """The images of one namespace, ``db.images``, newest first."""
    def get(self, id: Any) -> Image | None:
        """Return the record, or None; one read."""
    def exists(self, id: Any) -> bool:
        """Whether there is such a record; it is not decoded."""
    def find(self, *, limit: int = ..., offset: int = ..., on_corrupt: OnCorrupt | None = ..., **where: Any) -> builtins.list[Image]:
        """Return up to ``limit`` records behind the first ``offset`` through an index. As `Repository.find`."""
    def page(self, *, limit: int = ..., after: str | None = ..., on_corrupt: OnCorrupt | None = ..., **where: Any) -> Page[Image]:
        """Return one page as `find` does, and the cursor for the next. As `Repository.page`."""
    def iterate(self, *, on_corrupt: OnCorrupt | None = ..., **where: Any) -> Iterator[Image]:
        """Yield every record that `find` would. As `Repository.iterate`."""
    def count(self, **where: Any) -> int:
        """Count the records, all or those that `find` would return; only keys are read."""
    def create(self, record: Image | None = ..., **fields: Any) -> Image:
        """Store a new record, given whole or by its fields; return it as it is stored."""
    def save(self, record: Image) -> Image:
        """Store a record whose id you bring, in place of what is there; return it as it is stored."""
    def update(self, id: Any, fn: Callable[[Image], Image]) -> Image | None:
        """Replace the record by what ``fn`` makes of it, and return that; None where there is none."""
    def set_metadata(self, id: Any, metadata: Mapping[str, Any]) -> Image | None:
        """Replace the metadata as a whole; None where there is no such record."""
    def merge_metadata(self, id: Any, metadata: Mapping[str, Any]) -> Image | None:
        """Set some keys of the metadata and leave the others; None where there is no such record."""
    def delete(self, id: Any) -> bool:
        """Delete the record and everything that belongs to it; False where there was none."""
    def check(self, id: str | UUID) -> Check:
        """As `Births.check`."""

class LargeReader:
    """A value, piece by piece: iterate over it, or `read`."""
    size: int
    def read(self, size: int = ...) -> bytes:
        """Return the next ``size`` bytes, fewer only at the end; -1: all that are left. Raises as iteration does."""
    def __iter__(self) -> Iterator[bytes]: ...
    def __next__(self) -> bytes: ...

class LargeWriter:
    """Takes a value in parts of any size. It is there, whole, when its ``with`` block has ended."""
    version: bytes | None
    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Add ``data``, which may have any size."""

class Lease:
    """The right to a lock for a time, and to write under it."""
    name: str
    owner: str
    token: int
    expires_at: float
    @property
    def lost(self) -> bool: ...
    def put(self, key: str, value: Any, *, expect: Expect | None = ..., ttl: float | None = ..., raw: bool = ...) -> bytes:
        """Store ``value`` as `Store.put` does, if nobody took the lock meanwhile; return its version."""
    def delete(self, key: str, *, expect: bytes | None = ..., raw: bool = ...) -> bool:
        """Remove the key as `Store.delete` does, if nobody took the lock meanwhile; False where there was none."""
    def atomic(self) -> AbstractContextManager[Transaction]:
        """As `Store.atomic`: one batch at the end of the block, written only if nobody took the lock meanwhile."""
    def renew(self) -> None:
        """Let the lease last ``ttl`` seconds from now; one whose time is over too, if nobody took it."""
    def release(self) -> bool:
        """Give the lock back; False where somebody else has taken it. A second call does nothing."""

class Lock:
    """A name that one holder at a time has a lease on. Made by `Store.lock`; nothing is read or written yet."""
    name: str
    ttl: float
    wait: float | None
    owner: str
    def acquire(self) -> Lease:
        """Take the lock, waiting as ``wait`` says, and return the lease; its holder releases it."""
    def holder(self) -> Holder | None:
        """Return who holds the lock now, or None."""
    def __enter__(self) -> Lease: ...
    def __exit__(self, *problem: object) -> bool | None: ...

class LoginSessions:
    """The login sessions of one namespace, ``db.login_sessions``, newest first."""
    def get(self, id: Any) -> LoginSession | None:
        """Return the record, or None; one read."""
    def exists(self, id: Any) -> bool:
        """Whether there is such a record; it is not decoded."""
    def find(self, *, limit: int = ..., offset: int = ..., on_corrupt: OnCorrupt | None = ..., **where: Any) -> builtins.list[LoginSession]:
        """Return up to ``limit`` records behind the first ``offset`` through an index. As `Repository.find`."""
    def page(self, *, limit: int = ..., after: str | None = ..., on_corrupt: OnCorrupt | None = ..., **where: Any) -> Page[LoginSession]:
        """Return one page as `find` does, and the cursor for the next. As `Repository.page`."""
    def iterate(self, *, on_corrupt: OnCorrupt | None = ..., **where: Any) -> Iterator[LoginSession]:
        """Yield every record that `find` would. As `Repository.iterate`."""
    def count(self, **where: Any) -> int:
        """Count the records, all or those that `find` would return; only keys are read."""
    def create(self, record: LoginSession | None = ..., **fields: Any) -> LoginSession:
        """Store a new record, given whole or by its fields; return it as it is stored."""
    def save(self, record: LoginSession) -> LoginSession:
        """Store a record whose id you bring, in place of what is there; return it as it is stored."""
    def update(self, id: Any, fn: Callable[[LoginSession], LoginSession]) -> LoginSession | None:
        """Replace the record by what ``fn`` makes of it, and return that; None where there is none."""
    def set_metadata(self, id: Any, metadata: Mapping[str, Any]) -> LoginSession | None:
        """Replace the metadata as a whole; None where there is no such record."""
    def merge_metadata(self, id: Any, metadata: Mapping[str, Any]) -> LoginSession | None:
        """Set some keys of the metadata and leave the others; None where there is no such record."""
    def delete(self, id: Any) -> bool:
        """Remove the record; False where there was none."""

class MediaCache:
    """The media caches of one namespace, ``db.media``; ``(agent_id, key)`` is a record's id."""
    def get(self, id: Any) -> Media | None:
        """Return the record, or None; one read."""
    def exists(self, id: Any) -> bool:
        """Whether there is such a record; it is not decoded."""
    def find(self, *, limit: int = ..., offset: int = ..., on_corrupt: OnCorrupt | None = ..., **where: Any) -> builtins.list[Media]:
        """Return up to ``limit`` records behind the first ``offset`` through an index. As `Repository.find`."""
    def page(self, *, limit: int = ..., after: str | None = ..., on_corrupt: OnCorrupt | None = ..., **where: Any) -> Page[Media]:
        """Return one page as `find` does, and the cursor for the next. As `Repository.page`."""
    def iterate(self, *, on_corrupt: OnCorrupt | None = ..., **where: Any) -> Iterator[Media]:
        """Yield every record that `find` would. As `Repository.iterate`."""
    def count(self, **where: Any) -> int:
        """Count the records, all or those that `find` would return; only keys are read."""
    def create(self, record: Media | None = ..., **fields: Any) -> Media:
        """Store a new record, given whole or by its fields; return it as it is stored."""
    def save(self, record: Media) -> Media:
        """Store a record whose id you bring, in place of what is there; return it as it is stored."""
    def update(self, id: Any, fn: Callable[[Media], Media]) -> Media | None:
        """Replace the record by what ``fn`` makes of it, and return that; None where there is none."""
    def set_metadata(self, id: Any, metadata: Mapping[str, Any]) -> Media | None:
        """Replace the metadata as a whole; None where there is no such record."""
    def merge_metadata(self, id: Any, metadata: Mapping[str, Any]) -> Media | None:
        """Set some keys of the metadata and leave the others; None where there is no such record."""
    def delete(self, id: Any) -> bool:
        """Remove the record; False where there was none."""
    def of(self, parent: str | UUID, *, limit: int | None = ..., reverse: bool = ..., on_corrupt: OnCorrupt | None = ...) -> builtins.list[Media]:
        """Return the records below a parent in the order of their keys, all or the first ``limit`` of them."""
    def delete_all(self, parent: str | UUID) -> int:
        """Remove the records below a parent; return how many there were. As `replace_all` by nothing."""
    def replace_all(self, parent: str | UUID, items: Iterable[Media]) -> builtins.list[Media]:
        """Let ``items`` be all the records below a parent; return them as they are stored."""

class Messages:
    """The messages of one namespace, ``db.messages``."""
    def validate(self, session_id: str | UUID) -> builtins.list[Problem]:
        """Return what a model would refuse in a session, in the order of its messages; nothing is changed."""
    def repair(self, session_id: str | UUID) -> builtins.list[Problem]:
        """Store a session as a model would take it, and return what was wrong with it."""
    def truncate(self, session_id: str | UUID, *, after: int | str | UUID) -> int:
        """Delete what follows a message, with the calls asked for there; return how many messages went."""
    def clear(self, session_id: str | UUID) -> int:
        """Delete all messages and calls of a session; return how many messages went. The session stays."""
    def delete_older(self, session_id: str | UUID, *, than: datetime | timedelta) -> int:
        """Delete a session's messages from before a time, with the calls they asked for; return how many went."""
    def replace_all(self, session_id: str | UUID, messages: Iterable[Message]) -> builtins.list[Message]:
        """Make a session's messages the given ones, writing only what differs; return them as stored."""
    def append(self, session_id: str | UUID, message: Message) -> Message:
        """Append one message; return it as stored, with its number. As `append_many`."""
    def append_many(self, session_id: str | UUID, messages: Iterable[Message]) -> builtins.list[Message]:
        """Append a turn: messages, the tool calls they ask for or answer, and the session's counts."""
    def append_each(self, turns: Mapping[str, Sequence[Message]]) -> dict[str, builtins.list[Message]]:
        """Append a turn to each of several sessions, together; each turn is one batch of its own."""
    def get(self, id: str | UUID) -> Message | None:
        """Return the message of this id, or None; one read through the index."""
    def at(self, session_id: str | UUID, number: int) -> Message | None:
        """Return message ``number`` of a session, or None."""
    def last(self, session_id: str | UUID, n: int, *, repair: bool = ...) -> builtins.list[Message]:
        """Return the ``n`` newest messages in chronological order: one range read at any length."""
    def range(self, session_id: str | UUID, *, after: int = ..., before: int | None = ..., limit: int = ..., reverse: bool = ..., on_corrupt: OnCorrupt | None = ...) -> builtins.list[Message]:
        """Return up to ``limit`` messages with ``after < number < before``; ``reverse`` starts at the newest."""
    def iterate(self, session_id: str | UUID | None = ..., *, after: int = ..., order: str | None = ..., scanned: int = ..., scan: bool = ..., on_corrupt: OnCorrupt | None = ..., **where: Any) -> Iterator[Message]:
        """Yield every message that `find` would, 250 in memory at a time."""
    def count(self, session_id: str | UUID | None = ..., *, scanned: int = ..., scan: bool = ..., **where: Any) -> int:
        """Count a session's messages, or those that `find` would return; 0 where there is no such session."""
    def find(self, session_id: str | UUID | None = ..., *, limit: int = ..., offset: int = ..., order: str | None = ..., scanned: int = ..., scan: bool = ..., on_corrupt: OnCorrupt | None = ..., **where: Any) -> builtins.list[Message]:
        """Return up to ``limit`` messages: ``find(session_id, role="user")``, ``find(user_id="u1", text="tea")``."""
    def page(self, session_id: str | UUID | None = ..., *, limit: int = ..., offset: int = ..., after: str | None = ..., order: str | None = ..., scanned: int = ..., scan: bool = ..., on_corrupt: OnCorrupt | None = ..., **where: Any) -> Page[Message]:
        """Return one page as `find` does, and the cursor that ``after`` takes for the next."""
    def update(self, id: str | UUID, fn: Callable[[Message], Message]) -> Message | None:
        """Replace a message by what ``fn`` makes of it, and return that; None where there is none."""
    def delete(self, id: str | UUID) -> bool:
        """Delete a message and the calls it asked for; False where there is none."""
    def search(self, text: str, *, user_id: str | None = ..., session_id: str | UUID | None = ..., limit: int = ..., scanned: int = ..., on_corrupt: OnCorrupt | None = ...) -> Found[Message]:
        """Find messages in whose content ``text`` occurs, in any case."""

class Persistence:
    """Sessions, messages, tool calls and events of one namespace. Made by `open`."""
    store: Store
    home: Home | None
    namespace: str
    sessions: Sessions
    messages: Messages
    tool_calls: ToolCalls
    confirmations: Confirmations
    traces: Traces
    login_sessions: LoginSessions
    containers: Containers
    images: Images
    prototypes: Prototypes
    providers: Providers
    events: EventQueue
    todos: Todos
    snapshots: Snapshots
    windows: Windows
    compressions: Compressions
    recovered_files: RecoveredFiles
    media: MediaCache
    agents: Agents
    threads: ThreadManager
    def repository(self, type: builtins.type[R], *, name: str, key: str | tuple[str, ...] = ..., indexes: Iterable[Index] = ..., **options: Any) -> Repository[R]:
        """Declare a collection of your own in this namespace. As `Repository`."""
    def atomic(self) -> AbstractContextManager[Transaction]:
        """As `Store.atomic`: for plain keys and for repositories of your own, by their ``tx=``."""
    def transact(self, fn: Callable[[Transaction], R], *, attempts: int = ...) -> R:
        """As `Store.transact`."""
    def reindex(self, progress: Callable[[int], None] | None = ...) -> dict[str, Reindexed]:
        """Build the indexes of the agent's collections that were declared over records already there."""
    def timeline(self, session_id: str | UUID, *, after: int = ..., limit: int = ..., on_corrupt: OnCorrupt | None = ...) -> builtins.list[TimelineItem]:
        """Return a session's messages in order, each with the calls it asked for, their results and durations."""
    def stats(self, *, user_id: str | UUID | None = ..., agent_id: str | UUID | None = ..., session_id: str | UUID | None = ..., on_corrupt: OnCorrupt | None = ...) -> Stats:
        """Count what the namespace holds, or what belongs to a user, an agent or one session."""
    def health(self, *, timeout: float = ..., write: bool = ...) -> Health:
        """Ask every store whether it answers and can be written; raises nothing."""
    def metrics(self) -> Metrics:
        """What all stores together did since they were opened; `Store.metrics` tells of one."""
    def totals(self, *, on_corrupt: OnCorrupt | None = ...) -> Totals:
        """Count what is stored, and ask the drivers for the room it takes; no payload is read."""
    def check(self, *, agent_id: str | UUID | None = ..., session_id: str | UUID | None = ..., limit: int = ..., repair: bool = ...) -> Consistency:
        """Look for what does not fit together, in all stores; without ``repair`` nothing is changed."""
    def close(self) -> None:
        """End runs that stream and what reads events, and close the stores that `open` opened; once is enough."""
    def __enter__(self) -> Self: ...
    def __exit__(self, *problem: object) -> bool | None: ...

class PersistenceMiddleware:
    """Stores what an agent tells, message by message and trace by trace."""
    def persist_message(self, event: Mapping[str, Any]) -> Message:
        """Store one message and return it."""
    def persist_trace(self, event: Mapping[str, Any]) -> Trace:
        """Store the start or the end of a trace, and return the trace."""
    def ensure_thread(self, thread_id: str | UUID, *, agent_id: str | None = ..., user_id: str | None = ..., title: str | None = ..., metadata: Mapping[str, Any] | None = ...) -> bool:
        """Make sure of the thread of this id; True where it was created."""
    def get_thread_messages(self, thread_id: str | UUID, limit: int = ...) -> builtins.list[Message]:
        """Return the latest messages of a thread, oldest first."""
    def get_thread_traces(self, thread_id: str | UUID, limit: int = ...) -> builtins.list[Trace]:
        """Return the latest traces of a thread, newest first."""
    def handler(self, thread_id: str | UUID, *, agent_id: str | None = ..., user_id: str | None = ...) -> ThreadHandler:
        """Return the callbacks of one thread, for agents that are given functions to call."""

class Prototypes:
    """The prototypes of one namespace, ``db.prototypes``, newest first; found by ``name=`` or ``container_id=``."""
    def get(self, id: Any) -> Prototype | None:
        """Return the record, or None; one read."""
    def exists(self, id: Any) -> bool:
        """Whether there is such a record; it is not decoded."""
    def find(self, *, limit: int = ..., offset: int = ..., on_corrupt: OnCorrupt | None = ..., **where: Any) -> builtins.list[Prototype]:
        """Return up to ``limit`` records behind the first ``offset`` through an index. As `Repository.find`."""
    def page(self, *, limit: int = ..., after: str | None = ..., on_corrupt: OnCorrupt | None = ..., **where: Any) -> Page[Prototype]:
        """Return one page as `find` does, and the cursor for the next. As `Repository.page`."""
    def iterate(self, *, on_corrupt: OnCorrupt | None = ..., **where: Any) -> Iterator[Prototype]:
        """Yield every record that `find` would. As `Repository.iterate`."""
    def count(self, **where: Any) -> int:
        """Count the records, all or those that `find` would return; only keys are read."""
    def create(self, record: Prototype | None = ..., **fields: Any) -> Prototype:
        """Store a new record, given whole or by its fields; return it as it is stored."""
    def save(self, record: Prototype) -> Prototype:
        """Store a record whose id you bring, in place of what is there; return it as it is stored."""
    def update(self, id: Any, fn: Callable[[Prototype], Prototype]) -> Prototype | None:
        """Replace the record by what ``fn`` makes of it, and return that; None where there is none."""
    def set_metadata(self, id: Any, metadata: Mapping[str, Any]) -> Prototype | None:
        """Replace the metadata as a whole; None where there is no such record."""
    def merge_metadata(self, id: Any, metadata: Mapping[str, Any]) -> Prototype | None:
        """Set some keys of the metadata and leave the others; None where there is no such record."""
    def delete(self, id: Any) -> bool:
        """Remove the record; False where there was none."""

class Providers:
    """The providers of one namespace, ``db.providers``, newest first."""
    def get(self, id: Any) -> Provider | None:
        """Return the record, or None; one read."""
    def exists(self, id: Any) -> bool:
        """Whether there is such a record; it is not decoded."""
    def find(self, *, limit: int = ..., offset: int = ..., on_corrupt: OnCorrupt | None = ..., **where: Any) -> builtins.list[Provider]:
        """Return up to ``limit`` records behind the first ``offset`` through an index. As `Repository.find`."""
    def page(self, *, limit: int = ..., after: str | None = ..., on_corrupt: OnCorrupt | None = ..., **where: Any) -> Page[Provider]:
        """Return one page as `find` does, and the cursor for the next. As `Repository.page`."""
    def iterate(self, *, on_corrupt: OnCorrupt | None = ..., **where: Any) -> Iterator[Provider]:
        """Yield every record that `find` would. As `Repository.iterate`."""
    def count(self, **where: Any) -> int:
        """Count the records, all or those that `find` would return; only keys are read."""
    def create(self, record: Provider | None = ..., *, secret: str | None = ..., **fields: Any) -> Provider:
        """Store a new provider, given whole or by its fields; return it as it is stored."""
    def save(self, record: Provider, *, secret: str | None = ...) -> Provider:
        """Store a provider whose id you bring, in place of what is there; return it as it is stored."""
    def update(self, id: Any, fn: Callable[[Provider], Provider]) -> Provider | None:
        """Replace the record by what ``fn`` makes of it, and return that; None where there is none."""
    def set_metadata(self, id: Any, metadata: Mapping[str, Any]) -> Provider | None:
        """Replace the metadata as a whole; None where there is no such record."""
    def merge_metadata(self, id: Any, metadata: Mapping[str, Any]) -> Provider | None:
        """Set some keys of the metadata and leave the others; None where there is no such record."""
    def delete(self, id: Any) -> bool:
        """Remove the record; False where there was none."""
    def set_secret(self, id: str | UUID, secret: str | None) -> Provider | None:
        """Store another secret, encrypted, in place of the secret or reference there; None removes it."""
    def secret(self, id: str | UUID) -> str | None:
        """Return the secret: what its reference refers to now, or decrypted; None where there is none."""
    def default(self, container_id: str | UUID) -> Provider | None:
        """Return the default provider of a container, or None."""

class RecoveredFiles:
    """The recovered files of one namespace, ``db.recovered_files``; those of an agent, or of one of its paths (``find(agent_id=..., path=...)``), are found oldest first."""
    def get(self, id: Any) -> RecoveredFile | None:
        """Return the record, or None; one read."""
    def exists(self, id: Any) -> bool:
        """Whether there is such a record; it is not decoded."""
    def find(self, *, limit: int = ..., offset: int = ..., on_corrupt: OnCorrupt | None = ..., **where: Any) -> builtins.list[RecoveredFile]:
        """Return up to ``limit`` records behind the first ``offset`` through an index. As `Repository.find`."""
    def page(self, *, limit: int = ..., after: str | None = ..., on_corrupt: OnCorrupt | None = ..., **where: Any) -> Page[RecoveredFile]:
        """Return one page as `find` does, and the cursor for the next. As `Repository.page`."""
    def iterate(self, *, on_corrupt: OnCorrupt | None = ..., **where: Any) -> Iterator[RecoveredFile]:
        """Yield every record that `find` would. As `Repository.iterate`."""
    def count(self, **where: Any) -> int:
        """Count the records, all or those that `find` would return; only keys are read."""
    def create(self, record: RecoveredFile | None = ..., **fields: Any) -> RecoveredFile:
        """Store a new record, given whole or by its fields; return it as it is stored."""
    def save(self, record: RecoveredFile) -> RecoveredFile:
        """Store a record whose id you bring, in place of what is there; return it as it is stored."""
    def update(self, id: Any, fn: Callable[[RecoveredFile], RecoveredFile]) -> RecoveredFile | None:
        """Replace the record by what ``fn`` makes of it, and return that; None where there is none."""
    def set_metadata(self, id: Any, metadata: Mapping[str, Any]) -> RecoveredFile | None:
        """Replace the metadata as a whole; None where there is no such record."""
    def merge_metadata(self, id: Any, metadata: Mapping[str, Any]) -> RecoveredFile | None:
        """Set some keys of the metadata and leave the others; None where there is no such record."""
    def delete(self, id: Any) -> bool:
        """Remove the record; False where there was none."""
    def of(self, parent: str | UUID, *, limit: int | None = ..., reverse: bool = ..., on_corrupt: OnCorrupt | None = ...) -> builtins.list[RecoveredFile]:
        """Return the records below a parent in the order of their keys, all or the first ``limit`` of them."""
    def delete_all(self, parent: str | UUID) -> int:
        """Remove the records below a parent; return how many there were. As `replace_all` by nothing."""
    def replace_all(self, parent: str | UUID, items: Iterable[RecoveredFile]) -> builtins.list[RecoveredFile]:
        """Let ``items`` be all the records below a parent; return them as they are stored."""

class Repository(Generic[R]):
    """Records of one type in one collection of a store."""
    store: Store
    name: str
    namespace: str
    indexes: tuple[BoundIndex, ...]
    def get(self, id: Any, *, tx: Transaction | None = ...) -> R | None:
        """Return the record, or None. ``id``: the key's value, a tuple where it has several fields."""
    def get_versioned(self, id: Any) -> Versioned[R] | None:
        """Return the record with its version, for a later ``put(expect=version)``."""
    def get_many(self, ids: Sequence[Any]) -> builtins.list[R | None]:
        """Read ``n`` records in one round trip: ``n`` items in the order of ``ids``, None where there is none."""
    def exists(self, id: Any) -> bool:
        """Whether there is such a record; it is not decoded."""
    def insert(self, record: R, *, ttl: float | None = ..., tx: Transaction | None = ...) -> bytes:
        """Store a record that must not be there yet; return its version."""
    def put(self, record: R, *, expect: Expect | None = ..., ttl: float | None = ..., tx: Transaction | None = ...) -> bytes:
        """Store a record and return its version; of several writers, the last one wins."""
    def update(self, id: Any, fn: Callable[[R], R], *, tx: Transaction | None = ...) -> R | None:
        """Replace the record by what ``fn`` makes of it, and return that; None where there is none."""
    def delete(self, id: Any, *, expect: bytes | None = ..., tx: Transaction | None = ...) -> bool:
        """Remove the record and its index entries; False where there was none."""
    def put_many(self, records: Iterable[R], *, ttl: float | None = ...) -> builtins.list[bytes]:
        """Store records in atomic batches of 100 and return their versions; not atomic as a whole."""
    def delete_many(self, ids: Iterable[Any]) -> int:
        """Remove records side by side, each as `delete` does; return how many there were."""
    def find(self, *, limit: int = ..., on_corrupt: OnCorrupt | None = ..., **where: Any) -> builtins.list[R]:
        """Return up to ``limit`` records through the index that answers ``where``, in its order."""
    def first(self, **where: Any) -> R | None:
        """Return the first record that `find` would, or None."""
    def page(self, *, limit: int = ..., after: str | None = ..., on_corrupt: OnCorrupt | None = ..., **where: Any) -> Page[R]:
        """Return one page as `find` does, and the cursor that `after` takes for the next."""
    def iterate(self, *, on_corrupt: OnCorrupt | None = ..., **where: Any) -> Iterator[R]:
        """Yield every record that `find` would without a limit, 100 in memory at a time."""
    def count(self, **where: Any) -> int:
        """Count what `find` would return without a limit; of the whole collection without conditions."""
    def reindex(self, progress: Callable[[int], None] | None = ...) -> Reindexed:
        """Build every index that is not readable yet, while others read and write."""
    def drop_index(self, name: str) -> int:
        """Forget an index and remove its entries, waiting 60 seconds for readers; return how many there were."""
    def verify(self, *, repair: bool = ...) -> builtins.list[Damage]:
        """Compare every record with its index entries, and every entry with its record."""

class Sessions:
    """The sessions of one namespace, ``db.sessions``."""
    def export(self, session_id: str | UUID, *, user_id: str | None = ...) -> dict[str, Any]:
        """Return a session and all that belongs to it as a JSON value; this module's text has its shape."""
    def import_(self, data: Mapping[str, Any], *, user_id: str | UnsetType | None = ..., new_ids: bool = ..., **fields: Any) -> Session:
        """Store what `export` returned, and return the session. It can be seen when all of it is there."""
    def fork(self, session_id: str | UUID, *, at: int | str | UUID | None = ..., after: int = ..., count: int = ..., **fields: Any) -> _Sessions:
        """Make sessions that begin as this one does, and return them."""
    def exists(self, id: str | UUID) -> bool:
        """Whether there is such a session; it is not decoded."""
    def set_metadata(self, id: str | UUID, metadata: Mapping[str, Any]) -> Session | None:
        """Replace a session's metadata; return the session, or None where there is none."""
    def merge_metadata(self, id: str | UUID, metadata: Mapping[str, Any]) -> Session | None:
        """Set these keys of a session's metadata and keep the others; return the session, None where there is none."""
    def close(self, id: str | UUID) -> Session | None:
        """Close a session: ``active=False``. It can still be read and written. None where there is none."""
    def reopen(self, id: str | UUID) -> Session | None:
        """Open a closed session again. None where there is none."""
    def clear(self, id: str | UUID) -> int:
        """Delete all that was said in a session, messages and calls; return how many messages. The session stays."""
    def active(self, user_id: str, create: bool | Mapping[str, Any] = ...) -> Session | None:
        """Return the newest open session of a user, or None."""
    def delete_older(self, *, than: datetime | timedelta, user_id: str | None = ..., inactive_only: bool = ...) -> int:
        """Delete the sessions that nothing was added to or changed in since a time; return how many."""
    def create(self, **fields: Any) -> Session:
        """Create a session of the given fields of `Session`; one commit."""
    def get(self, id: str | UUID) -> Session | None:
        """Return the session, or None; one read."""
    def update(self, id: str | UUID, fn: Callable[[Session], Session]) -> Session | None:
        """Replace the session by what ``fn`` makes of it, and return that; None where there is none."""
    def delete(self, id: str | UUID) -> bool:
        """Delete the session and everything that belongs to it; False where there was none."""
    def find(self, *, limit: int = ..., offset: int = ..., order: str | None = ..., scanned: int = ..., scan: bool = ..., on_corrupt: OnCorrupt | None = ..., **where: Any) -> _Sessions:
        """Return up to ``limit`` sessions: ``find(user_id="u1", created=at_least(monday))``."""
    def page(self, *, limit: int = ..., offset: int = ..., after: str | None = ..., order: str | None = ..., scanned: int = ..., scan: bool = ..., on_corrupt: OnCorrupt | None = ..., **where: Any) -> Page[Session]:
        """Return one page as `find` does, and the cursor that ``after`` takes for the next."""
    def iterate(self, *, order: str | None = ..., scanned: int = ..., scan: bool = ..., on_corrupt: OnCorrupt | None = ..., **where: Any) -> Iterator[Session]:
        """Yield every session that `find` would, 250 in memory at a time; without conditions all, newest first."""
    def list(self, limit: int = ...) -> _Sessions:
        """Return the newest sessions, newest first."""
    def recent(self, limit: int = ...) -> _Sessions:
        """Return the sessions that changed last, newest change first; exact to a second."""
    def count(self, *, scanned: int = ..., scan: bool = ..., **where: Any) -> int:
        """Count the sessions, all or those that `find` would return; only keys are read where an index answers all."""
    def stat(self, id: str | UUID) -> SessionStat | None:
        """Return what is counted of a session, None where there is none; one read, no messages."""

class Snapshots:
    """The snapshots of one namespace, ``db.snapshots``; those of an agent are found newest first."""
    def get(self, id: Any) -> Snapshot | None:
        """Return the record, or None; one read."""
    def exists(self, id: Any) -> bool:
        """Whether there is such a record; it is not decoded."""
    def find(self, *, limit: int = ..., offset: int = ..., on_corrupt: OnCorrupt | None = ..., **where: Any) -> builtins.list[Snapshot]:
        """Return up to ``limit`` records behind the first ``offset`` through an index. As `Repository.find`."""
    def page(self, *, limit: int = ..., after: str | None = ..., on_corrupt: OnCorrupt | None = ..., **where: Any) -> Page[Snapshot]:
        """Return one page as `find` does, and the cursor for the next. As `Repository.page`."""
    def iterate(self, *, on_corrupt: OnCorrupt | None = ..., **where: Any) -> Iterator[Snapshot]:
        """Yield every record that `find` would. As `Repository.iterate`."""
    def count(self, **where: Any) -> int:
        """Count the records, all or those that `find` would return; only keys are read."""
    def create(self, record: Snapshot | None = ..., **fields: Any) -> Snapshot:
        """As `save`, of a new one. ``UniqueConflict``: the agent has a snapshot of this id."""
    def save(self, record: Snapshot) -> Snapshot:
        """Store a snapshot, in place of the agent's snapshot of that id if there is one; return it as stored."""
    def update(self, id: Any, fn: Callable[[Snapshot], Snapshot]) -> Snapshot | None:
        """Replace the record by what ``fn`` makes of it, and return that; None where there is none."""
    def set_metadata(self, id: Any, metadata: Mapping[str, Any]) -> Snapshot | None:
        """Replace the metadata as a whole; None where there is no such record."""
    def merge_metadata(self, id: Any, metadata: Mapping[str, Any]) -> Snapshot | None:
        """Set some keys of the metadata and leave the others; None where there is no such record."""
    def delete(self, id: Any) -> bool:
        """Remove the record; False where there was none."""
    def of(self, parent: str | UUID, *, limit: int | None = ..., reverse: bool = ..., on_corrupt: OnCorrupt | None = ...) -> builtins.list[Snapshot]:
        """Return the records below a parent in the order of their keys, all or the first ``limit`` of them."""
    def delete_all(self, parent: str | UUID) -> int:
        """Remove the records below a parent; return how many there were. As `replace_all` by nothing."""
    def replace_all(self, parent: str | UUID, items: Iterable[Snapshot]) -> builtins.list[Snapshot]:
        """Let ``items`` be all the records below a parent; return them as they are stored."""
    def messages(self, snapshot: Snapshot) -> builtins.list[Message]:
        """Return what had been said, in order: the snapshot's copy, else its session up to its number."""

class Store:
    """Plain values under plain text keys, in one event loop."""
    capabilities: Capabilities
    codec: Literal['msgpack', 'json']
    clock: Clock
    where: str
    timeout: float | None
    def sweep(self) -> int:
        """Remove expired entries now, where the backend does not do it itself; return how many."""
    def metrics(self) -> Metrics:
        """What was done since the store was opened, and how long its backend took."""
    def close(self) -> None:
        """End what is under way and release the backend; a second call does nothing."""
    def get(self, key: str, default: Any = ...) -> Any:
        """Return the value at ``key``, or ``default``. Raises CorruptRecord, BadKey, LargeValue."""
    def get_versioned(self, key: str) -> Versioned[Any] | None:
        """Return the value with its version, for a later ``put(expect=version)``."""
    def put(self, key: str, value: Any, *, expect: Expect | None = ..., ttl: float | None = ..., raw: bool = ...) -> bytes:
        """Store ``value`` and return its version."""
    def get_raw(self, key: str) -> bytes | None:
        """Return the bytes that `put_raw` stored, or the encoded payload of another value."""
    def put_raw(self, key: str, value: bytes, *, expect: Expect | None = ..., ttl: float | None = ..., raw: bool = ...) -> bytes:
        """Store bytes as they are, framed and checksummed; otherwise as `put`."""
    def open_write(self, key: str, *, expect: Expect | None = ..., ttl: float | None = ...) -> AbstractContextManager[LargeWriter]:
        """Store bytes that come in parts, whole when the block ends, or not at all."""
    def open_read(self, key: str) -> AbstractContextManager[LargeReader | None]:
        """Read bytes in parts of at most 256 KiB; None where there is no such key."""
    def has(self, key: str) -> bool:
        """Whether there is a live entry; its value is not read."""
    def info(self, key: str) -> Info | None:
        """Return version and expiry without reading the value."""
    def touch(self, key: str, ttl: float | None = ...) -> bool:
        """Give the entry a new time to live, keeping its value; False where there is none."""
    def delete(self, key: str, *, expect: bytes | None = ..., raw: bool = ...) -> bool:
        """Remove the key; False where there was none. Raises Conflict when ``expect`` is not there."""
    def get_many(self, keys: Sequence[str]) -> builtins.list[Any]:
        """Read ``n`` keys in one call: ``n`` values in their order, None where there is none. Raises as `get`."""
    def has_many(self, keys: Sequence[str]) -> builtins.list[bool]:
        """Whether each of ``n`` keys has a live entry, in one call."""
    def put_many(self, items: Mapping[str, Any], *, ttl: float | None = ..., raw: bool = ...) -> None:
        """Store many values, in atomic batches of 100; not atomic as a whole."""
    def delete_many(self, keys: Iterable[str], *, raw: bool = ...) -> int:
        """Remove many keys, in atomic batches of 100; return how many there were."""
    def clear(self, prefix: str, *, raw: bool = ...) -> int:
        """Remove every key that starts with ``prefix``; return how many there were."""
    def scan(self, prefix: str = ..., *, start: str | None = ..., end: str | None = ..., reverse: bool = ..., page: int = ..., on_corrupt: Callable[[CorruptRecord], None] | None = ..., on_large: Callable[[LargeValue], None] | None = ...) -> Iterator[tuple[str, Any]]:
        """Yield ``(key, value)`` below ``prefix`` in key order, ``page`` entries a round trip."""
    def keys(self, prefix: str = ..., max_depth: int | None = ..., *, raw: bool = ...) -> Iterator[str]:
        """Yield the keys below ``prefix`` in order, without values."""
    def snapshot(self, prefix: str = ...) -> dict[str, Any]:
        """Return all values below ``prefix``, the prefix cut off their keys; for `restore`. Raises LargeValue."""
    def restore(self, snapshot: Mapping[str, Any], prefix: str = ...) -> None:
        """Write what `snapshot` returned below ``prefix``; other keys stay."""
    def watch(self, prefix: str | Sequence[str], *, collapse: float | None = ..., interval: float | None = ..., buffer: int = ...) -> Watch:
        """Iterate over what changes below ``prefix``, or of a list of keys, whoever changes it."""
    def atomic(self) -> AbstractContextManager[Transaction]:
        """Buffer writes and commit them as one batch at the end of the block."""
    def transact(self, fn: Callable[[Transaction], _T], *, attempts: int = ...) -> _T:
        """Run ``fn`` inside `atomic`, again with full jitter when another writer came first."""
    def lock(self, name: str, *, ttl: float = ..., wait: float | None = ..., namespace: str = ..., owner: str | None = ..., renew: bool = ...) -> Lock:
        """Return a lock to ``with``; what is inside has a `Lease`, also to write under."""
    def __enter__(self) -> Self: ...
    def __exit__(self, *problem: object) -> bool | None: ...

class StoredAgent:
    """An agent whose turns are kept. Made by `with_storage`."""
    def run(self, message: Given, *, thread_id: str | UUID | None = ..., user_id: str | None = ..., thread_title: str | None = ..., load_history: bool | None = ..., max_history_messages: int | None = ...) -> Any:
        """Run the agent on a message and return what it returned; arguments and errors as for `turn`."""
    def turn(self, message: Given, *, thread_id: str | UUID | None = ..., user_id: str | None = ..., thread_title: str | None = ..., load_history: bool | None = ..., max_history_messages: int | None = ...) -> StoredTurn:
        """Run the agent on a message and return what came of it, as it was stored."""
    def stream(self, message: Given, *, thread_id: str | UUID | None = ..., user_id: str | None = ..., thread_title: str | None = ..., load_history: bool | None = ..., max_history_messages: int | None = ...) -> StoredStream:
        """Run the agent on a message and give its chunks, unchanged; arguments and errors as for `turn`."""

class StoredStream:
    """The chunks of a run, unchanged, while it goes on: ``for`` it, best inside ``with``."""
    turn: StoredTurn
    @property
    def thread_id(self) -> str: ...
    def close(self) -> None:
        """Leave the stream: the run ends here, and what there is of the turn is stored."""
    def __enter__(self) -> Self: ...
    def __exit__(self, *problem: object) -> bool | None: ...
    def __iter__(self) -> Iterator[Any]: ...
    def __next__(self) -> Any: ...

class Subscription:
    """The events of a topic in order, those there are and then those to come. Made by `EventQueue.subscribe`."""
    topic: str
    @property
    def position(self) -> str | None: ...
    def close(self) -> None:
        """End the iteration, also one that waits; a second call does nothing."""
    def __enter__(self) -> Self: ...
    def __exit__(self, *problem: object) -> bool | None: ...
    def __iter__(self) -> Iterator[EventEntry]: ...
    def __next__(self) -> EventEntry: ...

class ThreadHandler:
    """The callbacks of one thread. Made by `PersistenceMiddleware.handler`; raises as `persist_message`."""
    thread_id: str
    def on_user_message(self, content: Any, **fields: Any) -> Message:
        """Store what the user said; ``fields`` are others of `Message`."""
    def on_assistant_message(self, content: Any, tool_calls: builtins.list[Any] | None = ..., **fields: Any) -> Message:
        """Store what the assistant said, with the calls it asks for."""
    def on_tool_result(self, tool_call_id: str, result: Any, *, name: str | None = ..., is_error: bool = ..., **fields: Any) -> Message:
        """Store what came of a call: it joins the latest earlier unanswered call of that id."""

class ThreadManager:
    """The threads of one namespace, ``db.threads``; with an agent of its own: ``ThreadManager(db, agent)``."""
    def agent(self, agent: Any, **settings: Any) -> StoredAgent:
        """Put storage round an agent, as `with_storage` does; here also for programs that block."""
    def middleware(self, **settings: Any) -> PersistenceMiddleware:
        """Return a `PersistenceMiddleware` of this store; here also for programs that block."""
    def create(self, *, title: str | None = ..., **fields: Any) -> Session:
        """Create a thread; the title is ``Conversation`` and the local time, by default. As ``db.sessions.create``."""
    def get_or_create(self, thread_id: str | UUID, *, user_id: str | None = ..., **fields: Any) -> Session:
        """Return the thread of this id, created with these fields where there is none; two at once get the same."""
    def send(self, thread_id: str | UUID, message: Given, *, agent: Any = ..., user_id: str | None = ..., load_history: bool | None = ..., max_history_messages: int | None = ...) -> Any:
        """Say something in a thread that is there, and return what the agent returned. As `StoredAgent.run`."""
    def history(self, thread_id: str | UUID) -> _Messages:
        """Return all messages of a thread in order; none where there is no such thread."""
    def load_context(self, thread_id: str | UUID, *, message_limit: int = ..., include_tool_messages: bool = ..., filter: Callable[[Message], bool] | None = ...) -> ThreadContext:
        """Return a thread and the latest messages of it."""
    def list(self, limit: int = ..., offset: int = ..., *, order: Literal['desc', 'asc'] = ..., **where: Any) -> _Sessions:
        """Return threads by the time of their creation, newest first; ``user_id=`` and others as ``db.sessions.find``."""
    def fork(self, thread_id: str | UUID, *, title: str | None = ..., message_limit: int | None = ..., at: int | str | UUID | None = ..., **fields: Any) -> Session:
        """Make a thread that begins with the latest messages of this one, and return it. As ``db.sessions.fork``."""
    def delete(self, thread_id: str | UUID) -> bool:
        """Delete a thread with everything that belongs to it; False where there was none."""

class Todos:
    """The todo lists of one namespace, ``db.todos``. What is written checks that the agent is there."""
    def get(self, agent_id: str | UUID) -> TodoList | None:
        """Return the agent's list, or None where none was saved; one read."""
    def save(self, agent_id: str | UUID, todos: Iterable[Todo], *, version: int | None = ...) -> TodoList:
        """Replace the agent's list and return it as stored, with the next version."""
    def update(self, agent_id: str | UUID, fn: Callable[[builtins.list[Todo]], Iterable[Todo]]) -> TodoList:
        """Replace the agent's items by what ``fn`` makes of them (of an empty list where there is none)."""
    def delete(self, agent_id: str | UUID) -> bool:
        """Remove the agent's list; False where there was none. The next one begins with version 1."""

class ToolCalls:
    """The tool calls of one namespace, ``db.tool_calls``."""
    def set_state(self, session_id: str | UUID, number: int, position: int, state: str, *, note: str | None = ...) -> ToolCall | None:
        """Bring a call to a state, in lower or upper case; return it, or None where there is no such call."""
    def require_approval(self, session_id: str | UUID, number: int, position: int, *, note: str | None = ..., meta: dict[str, Any] | None = ...) -> ToolCall | None:
        """Let a call wait until somebody approves or denies it. As `set_state`."""
    def approve(self, session_id: str | UUID, number: int, position: int, *, by: str | None = ..., note: str | None = ..., meta: dict[str, Any] | None = ...) -> ToolCall | None:
        """Let a call run: kept in ``approval`` with who decided, and when. Of two who decide, one gets the error."""
    def deny(self, session_id: str | UUID, number: int, position: int, *, by: str | None = ..., note: str | None = ..., meta: dict[str, Any] | None = ...) -> ToolCall | None:
        """Refuse a call. A tool message may still tell the model so; the call stays denied. As `approve`."""
    def start(self, session_id: str | UUID, number: int, position: int, *, note: str | None = ...) -> ToolCall | None:
        """Say that a call runs from now on: ``duration`` counts from here. As `set_state`."""
    def complete(self, session_id: str | UUID, number: int, position: int, result: Any = ..., *, note: str | None = ...) -> ToolCall | None:
        """Keep the result of a call that no message answers (yet). As `set_state`."""
    def fail(self, session_id: str | UUID, number: int, position: int, error: str, *, note: str | None = ...) -> ToolCall | None:
        """Keep what went wrong with a call, in ``error``. As `set_state`."""
    def seal(self, session_id: str | UUID, number: int, position: int, *, note: str | None = ...) -> ToolCall | None:
        """End a call that nobody will go on with, such as one that a crash interrupted. As `set_state`."""
    def pending_approvals(self, session_id: str | UUID | None = ...) -> builtins.list[ToolCall]:
        """Return the calls that wait for approval, of one session or of all, the oldest first."""
    def replace_all(self, session_id: str | UUID, calls: Iterable[ToolCall]) -> int:
        """Make a session's calls the given ones, by their places, writing only what differs."""
    def get(self, session_id: str | UUID, number: int, position: int) -> ToolCall | None:
        """Return the call at ``position`` (from 0) of message ``number``, or None."""
    def of(self, session_id: str | UUID, *, after: int = ..., before: int | None = ..., on_corrupt: OnCorrupt | None = ...) -> builtins.list[ToolCall]:
        """Return the calls of a session in the order they were asked for, by messages between two numbers."""
    def find(self, session_id: str | UUID | None = ..., *, limit: int = ..., offset: int = ..., order: str | None = ..., scanned: int = ..., scan: bool = ..., on_corrupt: OnCorrupt | None = ..., **where: Any) -> builtins.list[ToolCall]:
        """Return up to ``limit`` calls, newest first: ``find(name="search")``, ``find(session_id, is_error=True)``."""
    def page(self, session_id: str | UUID | None = ..., *, limit: int = ..., offset: int = ..., after: str | None = ..., order: str | None = ..., scanned: int = ..., scan: bool = ..., on_corrupt: OnCorrupt | None = ..., **where: Any) -> Page[ToolCall]:
        """Return one page as `find` does, and the cursor that ``after`` takes for the next."""
    def iterate(self, session_id: str | UUID | None = ..., *, order: str | None = ..., scanned: int = ..., scan: bool = ..., on_corrupt: OnCorrupt | None = ..., **where: Any) -> Iterator[ToolCall]:
        """Yield every call that `find` would, about 250 in memory at a time."""
    def count(self, session_id: str | UUID | None = ..., *, scanned: int = ..., scan: bool = ..., **where: Any) -> int:
        """Count the calls, all or those that `find` would return; only keys are read where an index answers all."""
    def record(self, session_id: str | UUID, name: str, arguments: Any = ..., *, call_id: str | None = ...) -> AbstractContextManager[Recording]:
        """Record a call that no message asks for: begun here, ended with the block."""

class Traces:
    """The traces of one namespace, ``db.traces``, newest first; the children of one, oldest first."""
    def get(self, id: Any) -> Trace | None:
        """Return the record, or None; one read."""
    def exists(self, id: Any) -> bool:
        """Whether there is such a record; it is not decoded."""
    def find(self, *, limit: int = ..., offset: int = ..., on_corrupt: OnCorrupt | None = ..., scan: bool = ..., **where: Any) -> builtins.list[Trace]:
        """Return up to ``limit`` traces behind the first ``offset``."""
    def page(self, *, limit: int = ..., after: str | None = ..., on_corrupt: OnCorrupt | None = ..., scan: bool = ..., **where: Any) -> Page[Trace]:
        """Return one page as `find` does, and the cursor that ``after`` takes for the next. Raises BadCursor."""
    def iterate(self, *, on_corrupt: OnCorrupt | None = ..., scan: bool = ..., **where: Any) -> Iterator[Trace]:
        """Yield every trace that `find` would without a limit, 100 in memory at a time."""
    def count(self, *, scan: bool = ..., **where: Any) -> int:
        """Count what `find` would return without a limit; only keys are read where an index answers it."""
    def create(self, record: Trace | None = ..., **fields: Any) -> Trace:
        """Store a new record, given whole or by its fields; return it as it is stored."""
    def save(self, record: Trace) -> Trace:
        """Store a record whose id you bring, in place of what is there; return it as it is stored."""
    def update(self, id: Any, fn: Callable[[Trace], Trace]) -> Trace | None:
        """Replace the record by what ``fn`` makes of it, and return that; None where there is none."""
    def set_metadata(self, id: Any, metadata: Mapping[str, Any]) -> Trace | None:
        """Replace the metadata as a whole; None where there is no such record."""
    def merge_metadata(self, id: Any, metadata: Mapping[str, Any]) -> Trace | None:
        """Set some keys of the metadata and leave the others; None where there is no such record."""
    def delete(self, id: Any) -> bool:
        """Remove the record; False where there was none."""
    def start(self, name: str, *, type: TraceType = ..., session_id: str | UUID | None = ..., parent_id: str | UUID | None = ..., input: Any = ..., metadata: Mapping[str, Any] | None = ...) -> Trace:
        """Store a trace that begins now, and return it. Raises as `create`."""
    def end(self, id: str | UUID, *, output: Any = ..., error: str | BaseException | None = ..., token_usage: TokenUsage | None = ..., metadata: Mapping[str, Any] | None = ..., ended_at: datetime | None = ...) -> Trace | None:
        """Let a trace end, now unless told otherwise, and return it; None where there is none."""

class Transaction:
    """Buffered writes of one `Store.atomic` block; what is read here is checked at the commit."""
    def get(self, key: str, default: Any = ...) -> Any:
        """As `Store.get`, and the block fails at its end if somebody changes it meanwhile."""
    def put(self, key: str, value: Any, *, ttl: float | None = ..., raw: bool = ...) -> None:
        """Store ``value`` at the end of the block."""
    def delete(self, key: str, *, raw: bool = ...) -> None:
        """Remove the key at the end of the block."""

class Watch:
    """An iteration over changes; `Store.watch` makes it."""
    def close(self) -> None:
        """End the iteration; a second call does nothing."""
    def __enter__(self) -> Self: ...
    def __exit__(self, *problem: object) -> bool | None: ...
    def __iter__(self) -> Iterator[Change]: ...
    def __next__(self) -> Change: ...

class Windows:
    """The history windows of one namespace, ``db.windows``; those of an agent are found oldest first."""
    def get(self, id: Any) -> HistoryWindow | None:
        """Return the record, or None; one read."""
    def exists(self, id: Any) -> bool:
        """Whether there is such a record; it is not decoded."""
    def find(self, *, limit: int = ..., offset: int = ..., on_corrupt: OnCorrupt | None = ..., **where: Any) -> builtins.list[HistoryWindow]:
        """Return up to ``limit`` records behind the first ``offset`` through an index. As `Repository.find`."""
    def page(self, *, limit: int = ..., after: str | None = ..., on_corrupt: OnCorrupt | None = ..., **where: Any) -> Page[HistoryWindow]:
        """Return one page as `find` does, and the cursor for the next. As `Repository.page`."""
    def iterate(self, *, on_corrupt: OnCorrupt | None = ..., **where: Any) -> Iterator[HistoryWindow]:
        """Yield every record that `find` would. As `Repository.iterate`."""
    def count(self, **where: Any) -> int:
        """Count the records, all or those that `find` would return; only keys are read."""
    def create(self, record: HistoryWindow | None = ..., **fields: Any) -> HistoryWindow:
        """Store a new record, given whole or by its fields; return it as it is stored."""
    def save(self, record: HistoryWindow) -> HistoryWindow:
        """Store a record whose id you bring, in place of what is there; return it as it is stored."""
    def update(self, id: Any, fn: Callable[[HistoryWindow], HistoryWindow]) -> HistoryWindow | None:
        """Replace the record by what ``fn`` makes of it, and return that; None where there is none."""
    def set_metadata(self, id: Any, metadata: Mapping[str, Any]) -> HistoryWindow | None:
        """Replace the metadata as a whole; None where there is no such record."""
    def merge_metadata(self, id: Any, metadata: Mapping[str, Any]) -> HistoryWindow | None:
        """Set some keys of the metadata and leave the others; None where there is no such record."""
    def delete(self, id: Any) -> bool:
        """Remove the record; False where there was none."""
    def of(self, parent: str | UUID, *, limit: int | None = ..., reverse: bool = ..., on_corrupt: OnCorrupt | None = ...) -> builtins.list[HistoryWindow]:
        """Return the records below a parent in the order of their keys, all or the first ``limit`` of them."""
    def delete_all(self, parent: str | UUID) -> int:
        """Remove the records below a parent; return how many there were. As `replace_all` by nothing."""
    def replace_all(self, parent: str | UUID, items: Iterable[HistoryWindow]) -> builtins.list[HistoryWindow]:
        """Let ``items`` be all the records below a parent; return them as they are stored."""
