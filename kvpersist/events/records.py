"""What publishers give and readers get, and positions as text."""

from __future__ import annotations

import json
import re
from base64 import b64encode
from datetime import datetime
from typing import Any, Final, TypeAlias
from urllib.parse import quote, unquote

import msgspec

from kvpersist.errors import BadCursor

__all__ = [
    "After",
    "Claimed",
    "EventEntry",
    "GroupStats",
    "Lag",
    "NewEvent",
    "Parked",
    "TopicStats",
    "as_json",
    "number_of",
    "position_of",
    "split_event_id",
]

After: TypeAlias = str | int | dict[str, Any] | None
"""Where to begin: "start", "now", a position, a caller's own cursor or bookmark, or an old cursor."""

_POSITION: Final = re.compile(r"[0-9a-f]{16}")
_LAST: Final = (1 << 63) - 1  # the greatest number that a position can be of


def position_of(number: int) -> str:
    """Return a number as the text that callers keep: of one width, so that text order is the order of events."""
    return f"{number:016x}"


def number_of(position: Any) -> int | None:
    """Return the number a position stands for; None: this is no position of ours."""
    if type(position) is str and _POSITION.fullmatch(position) and (number := int(position, 16)) <= _LAST:
        return number
    return None


class NewEvent(msgspec.Struct, frozen=True):
    """An event to be published, with what belongs to it.

    Attributes:
        event: any free-form value.
        channel: of the topic, such as "progress", "control" or "monitor".
        cursor: the publisher's own; `after` accepts it.
        bookmark: the publisher's own, any free-form value; `after` accepts it.
    """

    event: Any
    channel: str | None = None
    cursor: str | int | None = None
    bookmark: Any = None


class EventEntry(msgspec.Struct, frozen=True):
    """A published event.

    Attributes:
        position: where it stands in its topic: opaque text that sorts as the events do.
        published_at: never before that of the event ahead of it, whatever the clocks do.
        channel, cursor, bookmark: what the publisher gave, or None.
    """

    position: str
    topic: str
    event: Any
    published_at: datetime
    channel: str | None = None
    cursor: str | int | None = None
    bookmark: Any = None

    @property
    def event_id(self) -> str:
        """Position and topic in one ASCII text without spaces, for protocols that know only an event's id."""
        return f"{self.position}/{quote(self.topic, safe='')}"

    def sse(self, *, with_topic: bool = False) -> str:
        """Return the event as one message of a ``text/event-stream``: its id, its channel, and its JSON.

        Args:
            with_topic: the id is `event_id`, so that it can be resumed without knowing the topic.
        """
        id_ = self.event_id if with_topic else self.position
        kind = f"event: {' '.join(self.channel.split())}\n" if self.channel else ""
        data = json.dumps(self.event, separators=(",", ":"), ensure_ascii=False, default=as_json)
        return f"id: {id_}\n{kind}data: {data}\n\n"


class TopicStats(msgspec.Struct, frozen=True):
    """What a topic holds. ``first`` and ``last`` are positions, None where there is no event; bytes are about."""

    first: str | None
    last: str | None
    count: int
    bytes: int
    published_at: datetime | None


class Lag(msgspec.Struct, frozen=True):
    """How far a consumer is behind: ``events`` that wait for it, ``expired`` that it can no longer read."""

    events: int
    expired: int


class Claimed(msgspec.Struct, frozen=True):
    """An event handed to a member of a group.

    Attributes:
        attempts: how often it was handed out, this time included.
        deadline: after which it is handed to another, unless acknowledged or extended.
    """

    entry: EventEntry
    consumer: str
    attempts: int
    deadline: datetime


class GroupStats(msgspec.Struct, frozen=True):
    """``waiting`` to be handed out, ``in_flight`` handed out and not acknowledged, ``expired`` before either."""

    waiting: int
    in_flight: int
    expired: int


class Parked(msgspec.Struct, frozen=True):
    """An event that a group gave up on, as it was published. ``reason`` is what the last release said."""

    entry: EventEntry
    attempts: int
    reason: str
    parked_at: datetime


def split_event_id(event_id: str) -> tuple[str | None, str]:
    """Return topic and position of an `EventEntry.event_id`; of other text None and itself.

    Raises:
        BadCursor: the topic in it is no text.
    """
    position, slash, topic = event_id.partition("/")
    if not slash or number_of(position) is None:
        return None, event_id
    try:
        return unquote(topic, errors="strict"), position
    except UnicodeDecodeError as error:
        raise BadCursor(event_id) from error


def as_json(value: Any) -> Any:
    """Return what JSON has no form for as text: times in ISO form, bytes in base 64.

    Raises:
        TypeError: it is neither.
    """
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, bytes):
        return b64encode(value).decode()
    raise TypeError(f"a {type(value).__name__} has no form in JSON")
