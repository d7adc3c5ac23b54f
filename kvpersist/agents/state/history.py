"""What an agent took out of its context: windows of history, their compressions, files it kept a copy of."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Final

import msgspec

from kvpersist.agents.births import Births, Family
from kvpersist.agents.children import Children
from kvpersist.agents.records import Message, utc
from kvpersist.errors import BadRequest
from kvpersist.index import Index

__all__ = [
    "BY_TIME",
    "COMPRESSION_THRESHOLD",
    "Compression",
    "CompressionConfig",
    "Compressions",
    "HistoryWindow",
    "RecoveredFile",
    "RecoveredFiles",
    "WindowStats",
    "Windows",
]

BY_TIME: Final = Index("agent_id", order_by="created_at")
"""What finds an agent's records in the order of their times."""

COMPRESSION_THRESHOLD: Final = 50_000
"""Tokens above which a context is usually compressed."""


class WindowStats(msgspec.Struct, omit_defaults=True):
    """What a window holds; tokens are counted by whoever saves it."""

    message_count: int = 0
    token_count: int = 0
    event_count: int = 0


class HistoryWindow(msgspec.Struct, kw_only=True, omit_defaults=True):
    """Messages and events as they were before a compression: a copy, in their order.

    Without ``stats``, messages and events are counted when it is saved.
    """

    id: str = ""
    agent_id: str = ""
    messages: list[Message] = []
    events: list[Any] = []
    stats: WindowStats | None = None
    created_at: datetime | None = None


class CompressionConfig(msgspec.Struct, omit_defaults=True):
    """How a compression was made; ``threshold`` in tokens."""

    model: str = ""
    prompt: str = ""
    threshold: int = COMPRESSION_THRESHOLD


class Compression(msgspec.Struct, kw_only=True, omit_defaults=True):
    """What became of a window: its summary, and ``ratio``, the size after / before.

    ``recovered_files``: paths of the files kept beside it.
    """

    id: str = ""
    agent_id: str = ""
    window_id: str | None = None
    config: CompressionConfig = msgspec.field(default_factory=CompressionConfig)
    summary: str = ""
    ratio: float = 0.0
    recovered_files: list[str] = []
    created_at: datetime | None = None


class RecoveredFile(msgspec.Struct, kw_only=True, omit_defaults=True):
    """A copy of a file that the agent had read; ``modified_at`` is the file's own time.

    One path may be kept several times, as it was at several times.
    """

    id: str = ""
    agent_id: str = ""
    path: str = ""
    content: Any = ""
    modified_at: datetime | None = None
    created_at: datetime | None = None


class Windows(Children[HistoryWindow]):
    """The history windows of one namespace, ``db.windows``; those of an agent are found oldest first."""

    def __init__(self, family: Family, agents: Births) -> None:
        super().__init__(
            family, HistoryWindow, name="window", key=("agent_id", "id"), parents=agents, indexes=[BY_TIME]
        )

    def _check(self, record: HistoryWindow) -> None:
        if record.stats is None:
            record.stats = WindowStats(message_count=len(record.messages), event_count=len(record.events))


class Compressions(Children[Compression]):
    """The compressions of one namespace, ``db.compressions``; those of an agent are found oldest first."""

    def __init__(self, family: Family, agents: Births) -> None:
        super().__init__(
            family, Compression, name="compression", key=("agent_id", "id"), parents=agents, indexes=[BY_TIME]
        )


class RecoveredFiles(Children[RecoveredFile]):
    """The recovered files of one namespace, ``db.recovered_files``; those of an agent, or of one of its paths
    (``find(agent_id=..., path=...)``), are found oldest first.
    """

    def __init__(self, family: Family, agents: Births) -> None:
        super().__init__(
            family,
            RecoveredFile,
            name="recovered_file",
            key=("agent_id", "id"),
            parents=agents,
            indexes=[BY_TIME, Index("agent_id", "path", order_by="created_at")],
        )

    def _check(self, record: RecoveredFile) -> None:
        if not record.path:
            raise BadRequest("path is empty: say which file this is")
        if record.modified_at is not None:
            record.modified_at = utc(record.modified_at, "modified_at")
