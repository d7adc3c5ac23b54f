"""Typed agent records over a small async key-value protocol.

``async with kvpersist.open("sqlite:///agent.db") as db`` is the way in. Names are loaded when they
are first asked for, so that importing kvpersist costs next to nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from kvpersist.agents.conversations.confirmations import Confirmation
    from kvpersist.agents.conversations.traces import TokenUsage, Trace
    from kvpersist.agents.persistence import Persistence
    from kvpersist.agents.persistence import open as open
    from kvpersist.agents.records import Message, Session, TimelineItem, ToolCall, ToolCallPart
    from kvpersist.agents.runs.middleware import PersistenceMiddleware
    from kvpersist.agents.runs.runs import StoredAgent, continue_thread, stream_continue_thread, with_storage
    from kvpersist.agents.runs.streams import StoredStream, StoredTurn
    from kvpersist.agents.runs.threads import ThreadManager
    from kvpersist.agents.state.agents import Agent, AgentStats
    from kvpersist.agents.state.history import (
        Compression,
        CompressionConfig,
        HistoryWindow,
        RecoveredFile,
        WindowStats,
    )
    from kvpersist.agents.state.media import Media
    from kvpersist.agents.state.snapshots import Bookmark, Snapshot
    from kvpersist.agents.state.todos import Todo, TodoList
    from kvpersist.agents.workspace.containers import Container
    from kvpersist.agents.workspace.images import Image
    from kvpersist.agents.workspace.login_sessions import LoginSession
    from kvpersist.agents.workspace.prototypes import Prototype
    from kvpersist.agents.workspace.providers import Provider
    from kvpersist.agents.workspace.secrets import new_secret_key
    from kvpersist.changes import Change, Watch
    from kvpersist.errors import CommitUnknown, Conflict, EventsExpired, KvError, LeaseLost, Locked, Unavailable
    from kvpersist.events import EventEntry, EventQueue, NewEvent
    from kvpersist.index import Index, at_least, at_most, between
    from kvpersist.lease import Holder, Lease, Lock
    from kvpersist.log import Log
    from kvpersist.opening import open_store
    from kvpersist.repository import Page, Repository
    from kvpersist.store import Info, Store, Versioned
    from kvpersist.sync import open_store_sync, open_sync
    from kvpersist.transaction import Transaction

__all__ = [
    "Agent",
    "AgentStats",
    "Bookmark",
    "Change",
    "CommitUnknown",
    "Compression",
    "CompressionConfig",
    "Confirmation",
    "Conflict",
    "Container",
    "EventEntry",
    "EventQueue",
    "EventsExpired",
    "HistoryWindow",
    "Holder",
    "Image",
    "Index",
    "Info",
    "KvError",
    "Lease",
    "LeaseLost",
    "Lock",
    "Locked",
    "Log",
    "LoginSession",
    "Media",
    "Message",
    "NewEvent",
    "Page",
    "Persistence",
    "PersistenceMiddleware",
    "Prototype",
    "Provider",
    "RecoveredFile",
    "Repository",
    "Session",
    "Snapshot",
    "Store",
    "StoredAgent",
    "StoredStream",
    "StoredTurn",
    "ThreadManager",
    "TimelineItem",
    "Todo",
    "TodoList",
    "TokenUsage",
    "ToolCall",
    "ToolCallPart",
    "Trace",
    "Transaction",
    "Unavailable",
    "Versioned",
    "Watch",
    "WindowStats",
    "__version__",
    "at_least",
    "at_most",
    "between",
    "continue_thread",
    "new_secret_key",
    "open_store",
    "open_store_sync",
    "open_sync",
    "stream_continue_thread",
    "with_storage",
]

__version__ = "0.1.0"

_HOMES: Final = {
    "kvpersist.agents.state.agents": ("Agent", "AgentStats"),
    "kvpersist.agents.state.history": (
        "Compression",
        "CompressionConfig",
        "HistoryWindow",
        "RecoveredFile",
        "WindowStats",
    ),
    "kvpersist.agents.state.media": ("Media",),
    "kvpersist.agents.conversations.confirmations": ("Confirmation",),
    "kvpersist.agents.workspace.containers": ("Container",),
    "kvpersist.agents.workspace.images": ("Image",),
    "kvpersist.agents.workspace.login_sessions": ("LoginSession",),
    "kvpersist.agents.workspace.prototypes": ("Prototype",),
    "kvpersist.agents.workspace.providers": ("Provider",),
    "kvpersist.agents.runs.runs": ("StoredAgent", "continue_thread", "stream_continue_thread", "with_storage"),
    "kvpersist.agents.workspace.secrets": ("new_secret_key",),
    "kvpersist.agents.runs.streams": ("StoredStream", "StoredTurn"),
    "kvpersist.agents.runs.threads": ("ThreadManager",),
    "kvpersist.agents.conversations.traces": (
        "TokenUsage",
        "Trace",
    ),
    "kvpersist.agents.runs.middleware": ("PersistenceMiddleware",),
    "kvpersist.agents.persistence": ("Persistence", "open"),
    "kvpersist.agents.records": ("Message", "Session", "TimelineItem", "ToolCall", "ToolCallPart"),
    "kvpersist.agents.state.snapshots": ("Bookmark", "Snapshot"),
    "kvpersist.agents.state.todos": ("Todo", "TodoList"),
    "kvpersist.changes": ("Change", "Watch"),
    "kvpersist.errors": (
        "CommitUnknown",
        "Conflict",
        "EventsExpired",
        "KvError",
        "LeaseLost",
        "Locked",
        "Unavailable",
    ),
    "kvpersist.events": ("EventEntry", "EventQueue", "NewEvent"),
    "kvpersist.index": ("Index", "at_least", "at_most", "between"),
    "kvpersist.lease": ("Holder", "Lease", "Lock"),
    "kvpersist.log": ("Log",),
    "kvpersist.repository": ("Page", "Repository"),
    "kvpersist.opening": ("open_store",),
    "kvpersist.store": ("Info", "Store", "Versioned"),
    "kvpersist.sync": ("open_store_sync", "open_sync"),
    "kvpersist.transaction": ("Transaction",),
}
_MODULE_OF: Final = {name: module for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    module = _MODULE_OF.get(name)
    if module is None:
        raise AttributeError(f"module 'kvpersist' has no attribute {name!r}")
    value = getattr(importlib.import_module(module), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULE_OF})
