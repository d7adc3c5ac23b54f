"""Typed agent records over a small async key-value protocol.

``async with kvpersist.open("sqlite:///agent.db") as db`` is the way in. Names are loaded when they
are first asked for, so that importing kvpersist costs next to nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from kvpersist.agents.agents import Agent, AgentStats
    from kvpersist.agents.confirmations import Confirmation
    from kvpersist.agents.containers import Container
    from kvpersist.agents.history import (
        Compression,
        CompressionConfig,
        HistoryWindow,
        RecoveredFile,
        WindowStats,
    )
    from kvpersist.agents.images import Image
    from kvpersist.agents.login_sessions import LoginSession
    from kvpersist.agents.media import Media
    from kvpersist.agents.persistence import Persistence
    from kvpersist.agents.persistence import open as open
    from kvpersist.agents.prototypes import Prototype
    from kvpersist.agents.providers import Provider
    from kvpersist.agents.records import Message, Session, TimelineItem, ToolCall, ToolCallPart
    from kvpersist.agents.secrets import new_secret_key
    from kvpersist.agents.snapshots import Bookmark, Snapshot
    from kvpersist.agents.todos import Todo, TodoList
    from kvpersist.agents.traces import TokenUsage, Trace
    from kvpersist.changes import Change, Watch
    from kvpersist.errors import CommitUnknown, Conflict, EventsExpired, KvError, LeaseLost, Locked, Unavailable
    from kvpersist.events import EventEntry, EventQueue, NewEvent
    from kvpersist.index import Index, at_least, at_most, between
    from kvpersist.lease import Holder, Lease, Lock
    from kvpersist.log import Log
    from kvpersist.repository import Page, Repository
    from kvpersist.store import Info, Store, Versioned, open_store
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
    "Prototype",
    "Provider",
    "RecoveredFile",
    "Repository",
    "Session",
    "Snapshot",
    "Store",
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
    "new_secret_key",
    "open_store",
    "open_store_sync",
    "open_sync",
]

__version__ = "0.1.0"

_HOMES: Final = {
    "kvpersist.agents.agents": ("Agent", "AgentStats"),
    "kvpersist.agents.history": ("Compression", "CompressionConfig", "HistoryWindow", "RecoveredFile", "WindowStats"),
    "kvpersist.agents.media": ("Media",),
    "kvpersist.agents.confirmations": ("Confirmation",),
    "kvpersist.agents.containers": ("Container",),
    "kvpersist.agents.images": ("Image",),
    "kvpersist.agents.login_sessions": ("LoginSession",),
    "kvpersist.agents.prototypes": ("Prototype",),
    "kvpersist.agents.providers": ("Provider",),
    "kvpersist.agents.secrets": ("new_secret_key",),
    "kvpersist.agents.traces": (
        "TokenUsage",
        "Trace",
    ),
    "kvpersist.agents.persistence": ("Persistence", "open"),
    "kvpersist.agents.records": ("Message", "Session", "TimelineItem", "ToolCall", "ToolCallPart"),
    "kvpersist.agents.snapshots": ("Bookmark", "Snapshot"),
    "kvpersist.agents.todos": ("Todo", "TodoList"),
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
    "kvpersist.store": ("Info", "Store", "Versioned", "open_store"),
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
