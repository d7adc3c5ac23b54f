"""What a reader makes of another system's layout, and the rules all readers share.

A `Source` yields items in an order that does not change from one reading to the next, what others
belong to first. Nothing is ever written to it. A row that cannot be read becomes a `Problem` in its
place, and the rows around it are read all the same.

**Ids.** A foreign id that fits is kept. One that does not, or that stands there twice, is replaced by
a UUID made from it, and kept beside: in ``Session.external_id``, in ``extra["external_id"]`` of a
message. So reading the same source again gives the same ids.
"""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any, Final, Literal, Self, TypeAlias, cast
from uuid import UUID, uuid5

from msgspec import Struct

from kvpersist import keys
from kvpersist.agents.records import Message, Session, ToolCall
from kvpersist.errors import BadKey
from kvpersist.events.records import NewEvent

__all__ = [
    "Bad",
    "CallRecord",
    "ConsumerPosition",
    "Conversation",
    "Events",
    "Item",
    "Problem",
    "Record",
    "RecordKind",
    "Source",
    "id_for",
    "json_value",
    "made_id",
    "list_or_none",
    "mapping",
    "moment_of",
    "object_or_none",
    "printable",
    "read_json",
    "required_text",
    "text_or_none",
]

RecordKind: TypeAlias = Literal[
    "containers",
    "images",
    "prototypes",
    "providers",
    "agents",
    "todos",
    "snapshots",
    "windows",
    "compressions",
    "recovered_files",
    "media",
    "traces",
    "login_sessions",
    "confirmations",
]
"""An attribute of `Persistence`."""

_NAMESPACE: Final = UUID("6b1d5f2e-8c1f-5b1e-9a64-0c6d3c0a7f11")  # of the ids made here; never changed
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)


class Bad(Exception):
    """A row that cannot be read; the text says why. A reader makes a `Problem` of it."""


class Problem(Struct, frozen=True, kw_only=True):
    """Something that is not in the store as it is in the source.

    Attributes:
        place: where in the source, such as ``kv_storage sessions:s1`` or ``messages.json [3]``.
        left_out: nothing of it was imported; otherwise ``reason`` says what became of it.
    """

    place: str
    reason: str
    left_out: bool = True


class CallRecord(Struct, kw_only=True):
    """What the source knows of a call beside its messages.

    Attributes:
        asked_by: index, from 0, of the asking message in the conversation; None: no message asks for it.
        position: which of that message's calls.
        call: state, result, times and so on; where it belongs is filled in later.
    """

    place: str
    call: ToolCall
    asked_by: int | None = None
    position: int = 0


class Conversation(Struct, kw_only=True):
    """A session with all its messages, in order; ids of messages are those of the source, or empty.

    ``resaved``: the source gives messages other ids and times whenever it saves them, so these do not
    tell whether a stored message is the same.
    """

    place: str
    session: Session
    messages: list[Message]
    calls: list[CallRecord] = []
    problems: list[Problem] = []
    resaved: bool = False


class Record(Struct, kw_only=True):
    """A record of another kind, as the store will hold it.

    Attributes:
        kind: which of the persistence's attributes keeps it, such as ``containers``.
        secret: of a provider, in clear; it is stored only if that is asked for, and then encrypted.
    """

    place: str
    kind: RecordKind
    record: Any
    secret: str | None = None


class Events(Struct, kw_only=True):
    """Events of one topic in their order, a part of them."""

    place: str
    topic: str
    events: list[NewEvent]


class ConsumerPosition(Struct, kw_only=True):
    """How far a consumer has come: the cursor of the last event of the source it is done with, None: of none."""

    place: str
    consumer: str
    topic: str
    cursor: str | int | None


Item: TypeAlias = Conversation | Record | Events | ConsumerPosition | Problem


class Source(ABC):
    """A layout of another system, open for reading. A context manager that closes what it opened.

    Attributes:
        system: its name, such as ``agentx``.
        shown: where it is, for people: without a password.
    """

    def __init__(self, system: str, shown: str) -> None:
        self.system, self.shown = system, shown

    @abstractmethod
    def items(self) -> AsyncIterator[Item]:
        """Yield everything, in the same order whenever it is called."""

    async def total(self) -> int | None:
        """How many items there are, where that is known without reading them."""
        return None

    async def changed(self) -> str | None:
        """Say what shows that somebody wrote to the source meanwhile; None: nothing does."""
        return None

    async def close(self) -> None:  # noqa: B027 - some have nothing to close
        """Close what was opened."""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


def made_id(*parts: str | int) -> str:
    """A UUID that depends on ``parts`` only."""
    return str(uuid5(_NAMESPACE, json.dumps(parts)))


def id_for(foreign: str, kind: str, limit: int = 128) -> tuple[str, str | None]:
    """Return the id a foreign one becomes, and the foreign one where it was replaced.

    Args:
        limit: bytes that the encoded id may have.
    """
    try:
        if foreign and len(keys.encode(foreign).encode()) <= limit:
            return foreign, None
    except (BadKey, UnicodeEncodeError):
        pass
    return made_id(kind, foreign), printable(foreign)


def printable(text: str) -> str:
    """``text`` as it can be stored: halves of surrogate pairs written out."""
    return text.encode("utf-8", "backslashreplace").decode()


def read_json(text: str | bytes) -> Any:
    """Decode JSON.

    Raises:
        Bad: it is none, or has a number that no number of JSON stands for.
    """
    try:
        return json.loads(text, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise Bad(f"no JSON: {error}") from None


def json_value(value: Any) -> Any:
    """The value of a column that holds JSON, whether its type is a text or not. None is None.

    Raises:
        Bad: it is no JSON.
    """
    return read_json(value) if isinstance(value, (str, bytes)) else value


def mapping(value: Any, what: str) -> dict[str, Any]:
    """Return ``value`` if it is an object.

    Raises:
        Bad: it is something else.
    """
    if not isinstance(value, dict):
        raise Bad(f"{what} is no object")
    return cast("dict[str, Any]", value)


def object_or_none(value: Any) -> dict[str, Any] | None:
    """``value`` if it is an object."""
    return cast("dict[str, Any]", value) if isinstance(value, dict) else None


def list_or_none(value: Any) -> list[Any] | None:
    """``value`` if it is a list."""
    return cast("list[Any]", value) if isinstance(value, list) else None


def required_text(row: Mapping[str, Any], name: str) -> str:
    """The text of a field; ids of other types are written out.

    Raises:
        Bad: it is missing, empty or no text.
    """
    value = text_or_none(row.get(name), name)
    if not value:
        raise Bad(f"{name} is missing")
    return value


def text_or_none(value: Any, what: str) -> str | None:
    """A text, an integer or a UUID as text.

    Raises:
        Bad: it is something else.
    """
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, UUID) or (isinstance(value, int) and not isinstance(value, bool)):
        return str(value)
    raise Bad(f"{what} is no text")


def moment_of(value: Any, what: str) -> datetime | None:
    """A time: milliseconds since 1970, a text in ISO form, or a datetime; without a zone it is in UTC.

    Raises:
        Bad: it is something else.
    """
    if value is None:
        return None
    try:
        if isinstance(value, str):
            text = value.strip()
            if text.lstrip("-").isdigit():
                return moment_of(int(text), what)
            value = datetime.fromisoformat(text)
        if isinstance(value, datetime):
            return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)
        if isinstance(value, int) and not isinstance(value, bool):
            return _EPOCH + timedelta(milliseconds=value)
        if isinstance(value, float) and math.isfinite(value):
            return _EPOCH + timedelta(microseconds=round(value * 1000))
    except (ValueError, OverflowError):
        pass
    raise Bad(f"{what} is no time: {str(value)[:40]!r}")


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON")
