"""The SQLite sessions of the OpenAI Agents SDK: ``agent_sessions`` and ``agent_messages``.

An item that is a message becomes one; a function call becomes an assistant's message that asks for it, its
output a tool's; any other item an assistant's message that holds it. What has no field is in ``extra``.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any, Final

from kvpersist.agents.records import ROLES, Message, Session, ToolCallPart
from kvpersist.ops.importers.plan import (
    Bad,
    Conversation,
    Item,
    Problem,
    Source,
    id_for,
    json_value,
    mapping,
    moment_of,
    required_text,
    text_or_none,
)
from kvpersist.ops.importers.sql import Database, Row, Table, held_database
from kvpersist.ops.importers.tables import TablesSource

__all__ = ["open_openai_agents"]

_SYSTEM: Final = "openai-agents"
_NO_ID: Final = "__fake_id__"  # what the SDK writes where there is none


async def open_openai_agents(where: str) -> Source:
    """Open the SQLite file."""
    async with held_database(where) as database:
        sessions = await database.needed("agent_sessions", _SYSTEM, "session_id")
        messages = await database.needed("agent_messages", _SYSTEM, "id", "session_id", "message_data")
        return _Sessions(database, sessions, messages)


class _Sessions(TablesSource):
    def __init__(self, database: Database, sessions: Table, messages: Table) -> None:
        super().__init__(_SYSTEM, database)
        self._sessions, self._messages = sessions, messages

    async def items(self) -> AsyncIterator[Item]:
        seen: set[str] = set()
        async for row in self._database.iterate(self._sessions, "session_id"):
            place = f"agent_sessions {row.get('sessionid')}"
            try:
                seen.add(required_text(row, "sessionid"))
                yield await self._conversation(place, row)
            except Bad as error:
                yield Problem(place=place, reason=str(error))
        for session_id, count in await self._database.strays(self._messages, "session_id", seen):
            place = f"agent_messages of {session_id}"
            made = await self._conversation(place, {"sessionid": session_id})
            if not made.messages and not made.problems:
                yield Problem(place=place, reason=f"{count} messages whose session_id is no text")
                continue
            yield Problem(place=place, reason="there is no session of this id: one was made for them", left_out=False)
            yield made

    async def total(self) -> int | None:
        return await self._database.count(self._sessions)

    async def _conversation(self, place: str, row: Row) -> Conversation:
        id_, foreign = id_for(required_text(row, "sessionid"), "session")
        session = Session(
            id=id_,
            external_id=foreign,
            created_at=moment_of(row.get("createdat"), "created_at"),
            updated_at=moment_of(row.get("updatedat"), "updated_at"),
        )
        made = Conversation(place=place, session=session, messages=[], problems=[])
        where = {"session_id": row["sessionid"]}
        for below in await self._database.select(self._messages, where=where, order=("id",)):
            try:
                message = _message(mapping(json_value(below.get("messagedata")), "the item"))
                message.created_at = moment_of(below.get("createdat"), "created_at")
                made.messages.append(message)
            except Bad as error:
                made.problems.append(Problem(place=f"agent_messages {below.get('id')}", reason=str(error)))
        return made


def _message(item: dict[str, Any]) -> Message:
    if "__enc__" in item:
        raise Bad("it is encrypted: import the session decrypted")
    kind = item.get("type")
    given = text_or_none(item.get("id"), "id") or ""
    id_ = "" if given == _NO_ID else given
    if kind in (None, "message") and "role" in item:
        if item["role"] not in ROLES:
            raise Bad(f"unknown role {item['role']!r}")
        return Message(item["role"], item.get("content"), id=id_, extra=_rest(item, "role", "content", "id"))
    if kind == "function_call":
        part = ToolCallPart(str(item.get("call_id") or ""), required_text(item, "name"), item.get("arguments"))
        extra = _rest(item, "call_id", "name", "arguments", "id")
        return Message("assistant", None, id=id_, tool_calls=[part], extra=extra)
    if kind == "function_call_output":
        extra = _rest(item, "call_id", "output", "id")
        call_id = required_text(item, "call_id")
        return Message("tool", item.get("output"), id=id_, tool_call_id=call_id, extra=extra)
    if not isinstance(kind, str):
        raise Bad("it has neither a role nor a type")
    return Message("assistant", [item], id=id_)


def _rest(item: dict[str, Any], *own: str) -> dict[str, Any] | None:
    return {name: value for name, value in item.items() if name not in own} or None
