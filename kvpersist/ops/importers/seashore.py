"""Seashore: its four PostgreSQL tables. A thread becomes a session, a login session stays one."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any, Final

from kvpersist.agents.conversations.traces import TokenUsage, Trace
from kvpersist.agents.records import Message, Session, ToolCallPart
from kvpersist.agents.workspace.login_sessions import LoginSession
from kvpersist.ops.importers.plan import (
    Bad,
    Conversation,
    Item,
    Problem,
    Record,
    Source,
    id_for,
    json_value,
    list_or_none,
    mapping,
    moment_of,
    object_or_none,
    required_text,
    text_or_none,
)
from kvpersist.ops.importers.sql import Database, JsonText, Row, Table, held_database
from kvpersist.ops.importers.tables import TablesSource

__all__ = ["open_seashore"]

_SYSTEM: Final = "seashore"
_ROLES: Final = ("user", "assistant", "system", "tool")


async def open_seashore(where: str) -> Source:
    """Open the database by its URL."""
    async with held_database(where) as database:
        threads = await database.needed("threads", _SYSTEM, "id", "agent_id", "created_at")
        messages = await database.needed("messages", _SYSTEM, "id", "thread_id", "role", "content")
        return _Seashore(database, threads, messages, await database.table("traces"), await database.table("sessions"))


class _Seashore(TablesSource):
    def __init__(
        self, database: Database, threads: Table, messages: Table, traces: Table | None, logins: Table | None
    ) -> None:
        super().__init__(_SYSTEM, database)
        self._threads, self._messages = threads, messages
        self._traces, self._logins = traces, logins

    async def items(self) -> AsyncIterator[Item]:
        seen: set[str] = set()
        async for row in self._database.iterate(self._threads, "id"):
            place = f"threads {row.get('id')}"
            try:
                seen.add(required_text(row, "id"))
                yield await self._conversation(place, row)
            except Bad as error:
                yield Problem(place=place, reason=str(error))
        for thread, count in await self._database.strays(self._messages, "thread_id", seen):
            yield Problem(place=f"messages of {thread}", reason=f"{count} messages of a thread that is not there")
        async for item in self._records(self._traces, _trace):
            yield item
        async for item in self._records(self._logins, _login):
            yield item

    async def total(self) -> int | None:
        tables = [table for table in (self._threads, self._traces, self._logins) if table is not None]
        return sum([await self._database.count(table) for table in tables])

    async def _conversation(self, place: str, row: Row) -> Conversation:
        id_, foreign = id_for(required_text(row, "id"), "session")
        metadata = json_value(row.get("metadata"))
        session = Session(
            id=id_,
            external_id=foreign,
            title=text_or_none(row.get("title"), "title"),
            agent_id=text_or_none(row.get("agentid"), "agent_id"),
            user_id=text_or_none(row.get("userid"), "user_id"),
            metadata={} if metadata is None else mapping(metadata, "metadata"),
            created_at=moment_of(row.get("createdat"), "created_at"),
            updated_at=moment_of(row.get("updatedat"), "updated_at"),
        )
        made = Conversation(place=place, session=session, messages=[], problems=[])
        where = {"thread_id": row["id"]}
        for below in await self._database.select(self._messages, where=where, order=("created_at",)):
            try:
                made.messages.append(_message(below))
            except Bad as error:
                made.problems.append(Problem(place=f"messages {below.get('id')}", reason=str(error)))
        return made


def _message(row: Row) -> Message:
    role = row.get("role")
    if role not in _ROLES:
        raise Bad(f"unknown role {role!r}")
    metadata = json_value(row.get("metadata"))
    calls = json_value(row.get("toolcalls"))
    if calls is not None and list_or_none(calls) is None:
        raise Bad("tool_calls is no list")
    return Message(
        role,
        text_or_none(row.get("content"), "content"),
        id=required_text(row, "id"),
        name=text_or_none(row.get("name"), "name"),
        tool_calls=[_call(call) for call in list_or_none(calls) or ()] or None,
        tool_call_id=text_or_none(row.get("toolcallid"), "tool_call_id"),
        metadata=None if metadata is None else mapping(metadata, "metadata"),
        created_at=moment_of(row.get("createdat"), "created_at"),
    )


def _call(value: Any) -> ToolCallPart:
    call = mapping(value, "a tool call")
    function = object_or_none(call.get("function")) or call
    return ToolCallPart(str(call.get("id") or ""), str(function.get("name") or ""), function.get("arguments"))


def _trace(place: str, row: Row) -> Record:
    thread, parent = text_or_none(row.get("threadid"), "thread_id"), text_or_none(row.get("parentid"), "parent_id")
    duration = row.get("durationms")
    ended = moment_of(row.get("endedat"), "ended_at")
    id_, foreign = id_for(required_text(row, "id"), "trace")
    metadata: dict[str, Any] = {} if foreign is None else {"external_id": foreign}
    if isinstance(duration, int):
        metadata["duration_ms"] = duration
    record = Trace(
        id=id_,
        session_id=id_for(thread, "session")[0] if thread else None,
        parent_id=id_for(parent, "trace")[0] if parent else None,
        name=text_or_none(row.get("name"), "name") or "",
        type=str(row.get("type")),
        input=_free(row.get("input")),
        output=_free(row.get("output")),
        error=text_or_none(row.get("error"), "error"),
        token_usage=_usage(json_value(row.get("tokenusage"))),
        duration=duration / 1000 if isinstance(duration, int) else None,
        started_at=moment_of(row.get("startedat"), "started_at"),
        ended_at=ended,
        metadata=metadata,
    )
    return Record(place=place, kind="traces", record=record)


def _login(place: str, row: Row) -> Record:
    metadata = json_value(row.get("metadata"))
    id_, foreign = id_for(required_text(row, "id"), "login session")
    record = LoginSession(
        id=id_,
        user_id=required_text(row, "userid"),
        metadata={
            **({} if metadata is None else mapping(metadata, "metadata")),
            **({} if foreign is None else {"external_id": foreign}),
        },
        expires_at=moment_of(row.get("expiresat"), "expires_at"),
        created_at=moment_of(row.get("createdat"), "created_at"),
    )
    return Record(place=place, kind="login_sessions", record=record)


def _free(value: Any) -> Any:
    """A text stays one; what the database knows to be JSON is decoded."""
    return json_value(value) if isinstance(value, JsonText) else value


def _usage(value: Any) -> TokenUsage | None:
    if value is None:
        return None
    row = mapping(value, "token_usage")
    counts = [row.get(name) for name in ("promptTokens", "completionTokens", "totalTokens")]
    if any(count is not None and (isinstance(count, bool) or not isinstance(count, int)) for count in counts):
        raise Bad("token_usage holds something that is no count")
    return TokenUsage(counts[0] or 0, counts[1] or 0, counts[2])
