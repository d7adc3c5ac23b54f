"""storage-prisma: its four tables in SQLite, PostgreSQL or MySQL.

A message becomes a message, with ``metadata["response_type"]``; its tool calls are asked for by it where
it is an assistant's, with their results; a pending confirmation becomes the session's.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any, Final

from kvpersist.agents.conversations.confirmations import Confirmation
from kvpersist.agents.records import Message, Session, ToolCall, ToolCallPart
from kvpersist.ops.importers.plan import (
    Bad,
    CallRecord,
    Conversation,
    Item,
    Problem,
    Record,
    Source,
    id_for,
    json_value,
    mapping,
    moment_of,
    object_or_none,
    required_text,
    text_or_none,
)
from kvpersist.ops.importers.sql import Database, Row, Table, held_database
from kvpersist.ops.importers.tables import TablesSource

__all__ = ["open_prisma"]

_SYSTEM: Final = "prisma"
_ROLES: Final = ("user", "assistant", "system")


async def open_prisma(where: str) -> Source:
    """Open the database: a SQLite file, or the URL of PostgreSQL or MySQL, as in ``DATABASE_URL``."""
    async with held_database(where.removeprefix("file:")) as database:
        sessions = await database.needed("agent_sessions", _SYSTEM, "id", "createdAt")
        messages = await database.needed("agent_messages", _SYSTEM, "id", "sessionId", "role", "content", "timestamp")
        calls = await database.table("agent_tool_calls")
        confirmations = await database.table("agent_pending_confirmations")
        return _Prisma(database, sessions, messages, calls, confirmations)


class _Prisma(TablesSource):
    def __init__(
        self, database: Database, sessions: Table, messages: Table, calls: Table | None, confirmations: Table | None
    ) -> None:
        super().__init__(_SYSTEM, database)
        self._sessions, self._messages = sessions, messages
        self._calls, self._confirmations = calls, confirmations

    async def items(self) -> AsyncIterator[Item]:
        seen: set[str] = set()
        async for row in self._database.iterate(self._sessions, "id"):
            place = f"agent_sessions {row.get('id')}"
            try:
                seen.add(required_text(row, "id"))
                yield await self._conversation(place, row)
            except Bad as error:
                yield Problem(place=place, reason=str(error))
        for session_id, count in await self._database.strays(self._messages, "sessionId", seen):
            reason = f"{count} messages of a session that is not there"
            yield Problem(place=f"agent_messages of {session_id}", reason=reason)
        async for item in self._records(self._confirmations, _confirmation):
            yield item

    async def total(self) -> int | None:
        other = 0 if self._confirmations is None else await self._database.count(self._confirmations)
        return await self._database.count(self._sessions) + other

    async def _conversation(self, place: str, row: Row) -> Conversation:
        id_, foreign = id_for(required_text(row, "id"), "session")
        metadata = json_value(row.get("metadata"))
        active: Any = row.get("active", True)
        session = Session(
            id=id_,
            external_id=foreign,
            metadata={} if metadata is None else mapping(metadata, "metadata"),
            active=active is None or bool(active),
            created_at=moment_of(row.get("createdat"), "createdAt"),
            updated_at=moment_of(row.get("updatedat"), "updatedAt"),
        )
        made = Conversation(place=place, session=session, messages=[], calls=[], problems=[])
        asked = await self._calls_of(row["id"])
        for below in await self._database.select(
            self._messages, where={"sessionId": row["id"]}, order=("timestamp", *self._tie())
        ):
            at = f"agent_messages {below.get('id')}"
            try:
                message = _message(below)
            except Bad as error:
                made.problems.append(Problem(place=at, reason=str(error)))
                asked.pop(str(below.get("id")), None)
                continue
            made.messages.append(message)
            for call in asked.pop(str(below.get("id")), ()):
                self._ask(made, message, call)
        for strays in asked.values():
            made.problems += [
                Problem(place=f"agent_tool_calls {call.get('id')}", reason="its message is not there")
                for call in strays
            ]
        return made

    def _tie(self) -> tuple[str, ...]:
        """What orders messages of one millisecond where the order of insertion is not known."""
        return () if self._database.row_order else ("id",)

    def _ask(self, made: Conversation, message: Message, row: Row) -> None:
        place = f"agent_tool_calls {row.get('id')}"
        try:
            part = ToolCallPart(
                required_text(row, "id"), required_text(row, "toolname"), json_value(row.get("arguments"))
            )
            at = moment_of(row.get("timestamp"), "timestamp")
            result = json_value(row.get("result"))
        except Bad as error:
            made.problems.append(Problem(place=place, reason=str(error)))
            return
        asks = message.role == "assistant"
        position = len(message.tool_calls or ())
        if asks:
            message.tool_calls = [*(message.tool_calls or ()), part]
        if row.get("result") is None and asks:
            return  # it waits
        told = object_or_none(result) or {}
        failed = told.get("success") is not True
        if row.get("result") is not None and not isinstance(told.get("success"), bool):
            reason = "its result does not say whether it was a success: kept as it is, as an error"
            made.problems.append(Problem(place=place, reason=reason, left_out=False))
        call = ToolCall(
            session_id="",
            number=0,
            position=0,
            call_id=part.id,
            name=part.name,
            arguments=part.arguments,
            state="pending" if row.get("result") is None else "failed" if failed else "completed",
            is_error=None if row.get("result") is None else failed,
            result=result,
            created_at=message.created_at or at,
            completed_at=None if row.get("result") is None else at,
        )
        index = len(made.messages) - 1 if asks else None
        made.calls.append(CallRecord(place=place, call=call, asked_by=index, position=position))

    async def _calls_of(self, session_id: Any) -> dict[str, list[Row]]:
        """The calls of a session, by message, in their order."""
        if self._calls is None:
            return {}
        database, calls, messages = self._database, self._calls, self._messages
        quoted = database.quoted
        columns = ", ".join(quoted(column) for column in calls.columns.values())
        order = [quoted(calls.columns["timestamp"]), database.row_order or quoted(calls.columns["id"])]
        statement = (
            f"SELECT {columns} FROM {quoted(calls.name)} WHERE {quoted(calls.columns['messageid'])} IN "  # noqa: S608
            f"(SELECT {quoted(messages.columns['id'])} FROM {quoted(messages.name)} "
            f"WHERE {quoted(messages.columns['sessionid'])} = {database.mark(1)}) ORDER BY {', '.join(order)}"
        )
        found: dict[str, list[Row]] = {}
        for values in await database.fetch(statement, session_id):
            row = dict(zip(calls.columns, values, strict=True))
            found.setdefault(str(row["messageid"]), []).append(row)
        return found


def _message(row: Row) -> Message:
    role = row.get("role")
    if role not in _ROLES:
        raise Bad(f"unknown role {role!r}")
    given = json_value(row.get("metadata"))
    metadata = None if given is None else mapping(given, "metadata")
    if (kind := text_or_none(row.get("responsetype"), "responseType")) is not None:
        metadata = {**(metadata or {}), "response_type": kind}
    return Message(
        role,
        text_or_none(row.get("content"), "content"),
        id=required_text(row, "id"),
        metadata=metadata,
        created_at=moment_of(row.get("timestamp"), "timestamp"),
    )


def _confirmation(place: str, row: Row) -> Record:
    record = Confirmation(
        session_id=id_for(required_text(row, "sessionid"), "session")[0],
        tool_name=required_text(row, "toolname"),
        arguments=json_value(row.get("arguments")),
        user_message=text_or_none(row.get("usermessage"), "userMessage"),
        metadata={"id": required_text(row, "id")},
        created_at=moment_of(row.get("timestamp"), "timestamp"),
    )
    return Record(place=place, kind="confirmations", record=record)
