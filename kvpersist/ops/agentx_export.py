"""AgentX's export of everything a store holds: {containers, images, sessions, messages: {session id: messages}}.

What came from AgentX leaves as it came: ids, subtypes, times and content are equal as JSON values. A
message of another origin has the subtype that its role stands for. Keys of providers are not exported.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any, Final

import msgspec

from kvpersist.agents.persistence import Persistence
from kvpersist.agents.records import Message, Session
from kvpersist.agents.workspace.containers import Container
from kvpersist.agents.workspace.images import Image
from kvpersist.agents.workspace.prototypes import Prototype
from kvpersist.events.records import as_json
from kvpersist.ops.importers.agentx_records import SHELVES

__all__ = ["export_agentx"]

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_SUBTYPES: Final = {"assistant": "assistant", "tool": "tool_result"}
_SESSION: Final = {"container_id": "containerId", "image_id": "imageId"}
_BESIDE: Final = ("agentx", "external_id", "missing")


async def export_agentx(db: Persistence) -> bytes:
    """Return the export as JSON. All of it is held in memory, as AgentX does that reads it."""
    document: dict[str, Any] = {
        "containers": [_record(record) async for record in db.containers.iterate()],
        "images": [_record(record) async for record in db.images.iterate()],
        "sessions": [],
        "messages": {},
        "prototypes": [_record(record) async for record in db.prototypes.iterate()],
    }
    names: dict[str, str] = {}
    for kind in ("containers", "images"):
        fields = {"containers": "containerId", "images": "imageId"}[kind]
        names |= {each["_"]: each[fields] for each in document[kind]}
    for each in (*document["containers"], *document["images"], *document["prototypes"]):
        del each["_"]
    async for session in db.sessions.iterate():
        shown = session.external_id or session.id
        document["sessions"].append(_session(session, shown, names))
        document["messages"][shown] = [_message(message) async for message in db.messages.iterate(session.id)]
    for kind in ("images", "prototypes"):
        for each in document[kind]:
            for field in ("containerId", "parentImageId"):
                each |= {field: names.get(each[field], each[field])} if field in each else {}
    return msgspec.json.format(msgspec.json.encode(document, enc_hook=as_json))


def _record(record: Container | Image | Prototype) -> dict[str, Any]:
    shelf = next(shelf for shelf in SHELVES if shelf.type is type(record))
    metadata = dict(record.metadata)
    beside = {name: metadata.pop(name) for name in _BESIDE if name in metadata}
    missing: dict[str, Any] = beside.get("missing", {})
    made: dict[str, Any] = {"_": record.id, shelf.id_field: beside.get("external_id", record.id)}
    for theirs, ours in shelf.fields.items():
        value = metadata if ours == "metadata" else getattr(record, ours)
        value = missing.get(ours) if value is None else value
        if value is not None and value != {}:
            made[theirs] = value
    return {**made, **beside.get("agentx", {}), **_times(record)}


def _session(session: Session, shown: str, names: dict[str, str]) -> dict[str, Any]:
    missing: dict[str, Any] = session.metadata.get("missing", {})
    made: dict[str, Any] = {"sessionId": shown}
    for ours, theirs in _SESSION.items():
        named = getattr(session, ours)
        named = missing.get(ours) if named is None else names.get(named, named)
        if named is not None:
            made[theirs] = named
    return {**made, **session.metadata.get("agentx", {}), **_times(session)}


def _message(message: Message) -> dict[str, Any]:
    extra = dict(message.extra or {})
    made: dict[str, Any] = {"id": extra.pop("external_id", message.id)}
    content = message.content
    if "subtype" not in extra and "role" not in extra:
        made["subtype"] = "tool_call" if message.tool_calls else _SUBTYPES.get(message.role, message.role)
        if message.tool_calls and content is None:
            content = [{"id": part.id, "name": part.name, "input": part.arguments} for part in message.tool_calls]
        if message.tool_call_id is not None:
            made["toolCallId"] = message.tool_call_id
    made |= extra
    if content is not None or not ("toolCall" in extra or "toolResult" in extra):
        made["content"] = content
    if message.created_at is not None:
        made["timestamp"] = _milliseconds(message.created_at)
    return made


def _times(record: Any) -> dict[str, int]:
    pairs = (("createdAt", record.created_at), ("updatedAt", record.updated_at))
    return {name: _milliseconds(at) for name, at in pairs if at is not None}


def _milliseconds(at: datetime) -> int:
    return (at - _EPOCH) // timedelta(milliseconds=1)
