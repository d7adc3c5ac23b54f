"""LangGraph's SQLite checkpoints: the messages of each thread's last checkpoint.

A checkpoint is decoded as data: nothing in it is imported, called or revived, and no pickle is read. A
message is a map of its fields, whatever class wrote it; a value of another class, but for a few that are
plain values themselves, is refused, and with it its message.

Source: langgraph-checkpoint-sqlite, tables ``checkpoints`` and ``writes``; langgraph-checkpoint,
``JsonPlusSerializer``: extensions 0 to 5 are [module, class, arguments, ...].
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import datetime
from typing import Any, Final, cast

import msgspec
from msgspec import Struct

from kvpersist.agents.records import Message, Session, ToolCallPart
from kvpersist.ops.importers.plan import (
    Bad,
    Conversation,
    Item,
    Problem,
    Source,
    id_for,
    list_or_none,
    mapping,
    moment_of,
    object_or_none,
    read_json,
    text_or_none,
)
from kvpersist.ops.importers.sql import Database, Table, held_database
from kvpersist.ops.importers.tables import TablesSource

__all__ = ["open_langgraph"]

_SYSTEM: Final = "langgraph"
_OBJECTS: Final = range(6)  # extensions that are [module, class, arguments, ...]
_MESSAGES: Final = ("langchain_core", "langchain", "langchain_community")
_TEXTS: Final = {
    "uuid.UUID",
    "decimal.Decimal",
    "ipaddress.IPv4Address",
    "ipaddress.IPv6Address",
    "zoneinfo.ZoneInfo",
}
_LISTS: Final = {"builtins.set", "builtins.frozenset", "collections.deque"}
_ROLES: Final = {
    "human": "user",
    "HumanMessageChunk": "user",
    "user": "user",
    "ai": "assistant",
    "AIMessageChunk": "assistant",
    "assistant": "assistant",
    "system": "system",
    "SystemMessageChunk": "system",
    "developer": "developer",
    "tool": "tool",
    "ToolMessageChunk": "tool",
    "function": "tool",
}
_OWN: Final = ("content", "type", "role", "id", "name", "tool_calls", "tool_call_id")


async def open_langgraph(where: str, *, channel: str = "messages") -> Source:
    """Open the SQLite file of a saver.

    Args:
        channel: of the graph's state, in which it keeps its messages.
    """
    async with held_database(where) as database:
        table = await database.needed("checkpoints", _SYSTEM, "thread_id", "checkpoint_ns", "checkpoint_id", "type")
        return _Langgraph(database, table, channel)


class _Object(Struct, frozen=True):
    """An instance as it was written: its class and its arguments, not made."""

    name: str
    arguments: Any


class _Langgraph(TablesSource):
    def __init__(self, database: Database, table: Table, channel: str) -> None:
        super().__init__(_SYSTEM, database)
        self._table, self._channel = table, channel

    async def items(self) -> AsyncIterator[Item]:
        statement = "SELECT thread_id, sum(checkpoint_ns <> '') FROM checkpoints GROUP BY thread_id ORDER BY thread_id"
        for thread, below in await self._database.fetch(statement):
            if isinstance(thread, bytes):
                yield Problem(place=f"checkpoints {thread!r}", reason="its thread_id is no text")
                continue
            place = f"checkpoints {thread}"
            try:
                found = await self._conversation(place, str(thread))
                if found is not None:
                    yield found
            except Bad as error:
                yield Problem(place=place, reason=str(error))
            if below:
                reason = f"{below} checkpoints of subgraphs were not read: only the thread's own messages are"
                yield Problem(place=place, reason=reason, left_out=False)

    async def total(self) -> int | None:
        [[count]] = await self._database.fetch("SELECT count(DISTINCT thread_id) FROM checkpoints")
        return int(count)

    async def _conversation(self, place: str, thread: str) -> Conversation | None:
        last = await self._checkpoint(thread, "DESC")
        if last is None:
            return None
        first = await self._checkpoint(thread, "ASC")
        values = mapping(last.get("channel_values"), "channel_values")
        listed = values.get(self._channel, [])
        if isinstance(listed, _Object) or list_or_none(listed) is None:
            raise Bad(f"channel {self._channel!r} holds no list of messages")
        id_, foreign = id_for(thread, "session")
        began = _time(first) if first is not None else None
        session = Session(id=id_, external_id=foreign, created_at=began, updated_at=_time(last))
        made = Conversation(place=place, session=session, messages=[], problems=[])
        for index, value in enumerate(list_or_none(listed) or ()):
            try:
                made.messages.append(_message(value))
            except (Bad, RecursionError) as error:
                made.problems.append(Problem(place=f"{place} {self._channel}[{index}]", reason=str(error)))
        return made

    async def _checkpoint(self, thread: str, order: str) -> dict[str, Any] | None:
        rows = await self._database.fetch(
            "SELECT type, checkpoint FROM checkpoints WHERE thread_id = ?1 AND checkpoint_ns = '' "  # noqa: S608
            f"ORDER BY checkpoint_id {order} LIMIT 1",
            thread,
        )
        return mapping(_decoded(*rows[0]), "the checkpoint") if rows else None


def _decoded(kind: Any, data: Any) -> Any:
    raw = data.encode() if isinstance(data, str) else data
    if not isinstance(raw, bytes):
        raise Bad("the checkpoint is empty")
    if kind == "json":
        return read_json(raw)
    if kind != "msgpack":
        raise Bad(f"a checkpoint of type {kind!r} is not read")
    try:
        return msgspec.msgpack.decode(raw, ext_hook=_extension)
    except (msgspec.DecodeError, ValueError, TypeError, RecursionError) as error:
        raise Bad(f"no msgpack: {error}") from None


def _extension(code: int, data: memoryview) -> Any:
    if code not in _OBJECTS:
        return _Object(f"extension {code}", None)
    parts = msgspec.msgpack.decode(data, ext_hook=_extension)
    if not isinstance(parts, list) or len(cast("list[Any]", parts)) < 3:
        return _Object(f"extension {code}", None)
    module, name, arguments = cast("list[Any]", parts)[:3]
    return _Object(f"{module}.{name}", arguments)


def _message(value: Any) -> Message:
    row = _fields(value)
    kind = str(row.get("type") or row.get("role"))
    role = _ROLES.get(kind) or _ROLES.get(str(row.get("role")))
    if role is None:
        raise Bad(f"unknown kind of message {kind!r}")
    status = row.get("status")
    rest = {name: field for name, field in row.items() if name not in _OWN and field not in (None, [], {}, "")}
    if role == "tool" and status in ("success", "error"):
        rest.pop("status", None)
    calls = list_or_none(row.get("tool_calls")) or []
    return Message(
        role,
        row.get("content"),
        id=text_or_none(row.get("id"), "id") or "",
        name=text_or_none(row.get("name"), "name"),
        tool_calls=[_call(call) for call in calls] or None,
        tool_call_id=text_or_none(row.get("tool_call_id"), "tool_call_id"),
        is_error=status == "error" if role == "tool" and status in ("success", "error") else None,
        extra=rest or None,
    )


def _fields(value: Any) -> dict[str, Any]:
    """The fields of a message in any form it is written in."""
    if isinstance(value, _Object):
        if value.name.partition(".")[0] not in _MESSAGES:
            raise Bad(f"it is a {value.name}, which is not read")
        return _plain(mapping(value.arguments, "the message"))
    row = mapping(value, "the message")
    if row.get("lc") in (1, 2) and row.get("type") == "constructor":
        name = str((list_or_none(row.get("id")) or ["?"])[-1])
        fields = mapping(row.get("kwargs"), f"what {name} is made of")
        kind = name.removesuffix("Chunk").removesuffix("Message").lower()
        return _plain({"type": kind, **fields})
    return _plain(row)


def _call(value: Any) -> ToolCallPart:
    call = mapping(value, "a tool call")
    function = object_or_none(call.get("function")) or call
    arguments = function.get("args", function.get("arguments"))
    return ToolCallPart(str(call.get("id") or ""), str(function.get("name") or ""), arguments)


def _plain(value: Any) -> Any:
    """The value without instances: those that are plain values become these.

    Raises:
        Bad: it holds another.
    """
    if isinstance(value, _Object):
        if value.name == "datetime.datetime" and isinstance(value.arguments, str):
            return _zoned(value.arguments)
        if value.name in _TEXTS and isinstance(value.arguments, str):
            return value.arguments
        if value.name in _LISTS and (items := list_or_none(value.arguments)) is not None:
            return _plain(items)
        raise Bad(f"it holds a {value.name}, which is not read")
    if (items := list_or_none(value)) is not None:
        return [_plain(item) for item in items]
    if (fields := object_or_none(value)) is not None:
        if fields.get("lc") in (1, 2) and fields.get("type") == "constructor":
            raise Bad(f"it holds a {fields.get('id')}, which is not read")
        return {name: _plain(field) for name, field in fields.items()}
    return value


def _zoned(text: str) -> Any:
    """A time with a zone as one; without, its text."""
    try:
        at = datetime.fromisoformat(text)
    except ValueError:
        return text
    return text if at.tzinfo is None else at


def _time(checkpoint: dict[str, Any]) -> datetime | None:
    try:
        return moment_of(checkpoint.get("ts"), "ts")
    except Bad:
        return None
