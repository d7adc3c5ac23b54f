"""Containers, images, prototypes and providers of AgentX as ours; what has no field is in ``metadata["agentx"]``."""

from __future__ import annotations

from typing import Any, Final

from msgspec import Struct

from kvpersist.agents.workspace.containers import Container
from kvpersist.agents.workspace.images import Image
from kvpersist.agents.workspace.prototypes import Prototype
from kvpersist.agents.workspace.providers import Provider
from kvpersist.ops.importers.plan import Bad, Record, RecordKind, id_for, mapping, moment_of, text_or_none

__all__ = ["SHELVES", "Shelf", "record_of"]

_TIMES: Final = {"createdAt": "created_at", "updatedAt": "updated_at"}
_TEXTS: Final = ("name", "description", "system_prompt", "role_id", "os_id", "model", "vendor", "protocol", "base_url")
_MAPPINGS: Final = ("config", "metadata", "mcp_servers", "provider_options", "custom_data")
_NAMES: Final = {
    "container_id": "container",
    "session_id": "session",
    "parent_id": "image",
    "prototype_id": "prototype",
}
"""Fields that name another record, and of which kind."""
_SETUP: Final = {
    "containerId": "container_id",
    "name": "name",
    "description": "description",
    "systemPrompt": "system_prompt",
    "mcpServers": "mcp_servers",
    "metadata": "metadata",
    "roleId": "role_id",
    "osId": "os_id",
    "model": "model",
    "thinking": "thinking",
    "providerOptions": "provider_options",
    "customData": "custom_data",
}


class Shelf(Struct, frozen=True):
    """A kind of record: the beginning of its keys, the field of its id, and where its fields go."""

    name: str
    kind: RecordKind
    what: str
    id_field: str
    type: Any
    fields: dict[str, str]


SHELVES: Final = (
    Shelf("containers", "containers", "container", "containerId", Container, {"name": "name", "config": "config"}),
    Shelf(
        "images",
        "images",
        "image",
        "imageId",
        Image,
        {**_SETUP, "sessionId": "session_id", "parentImageId": "parent_id", "prototypeId": "prototype_id"},
    ),
    Shelf("prototypes", "prototypes", "prototype", "prototypeId", Prototype, _SETUP),
    Shelf(
        "llm-providers",
        "providers",
        "provider",
        "id",
        Provider,
        {
            "containerId": "container_id",
            "name": "name",
            "vendor": "vendor",
            "protocol": "protocol",
            "baseUrl": "base_url",
            "model": "model",
            "isDefault": "is_default",
        },
    ),
)
"""In the order in which they can be stored."""


def record_of(place: str, shelf: Shelf, row: dict[str, Any]) -> Record:
    """Make a record of one of AgentX's.

    Raises:
        Bad: a field is of another type than it has to be.
    """
    id_, foreign = id_for(row[shelf.id_field], shelf.what)
    values: dict[str, Any] = {}
    rest: dict[str, Any] = {}
    secret: str | None = None
    for name, value in row.items():
        ours = _TIMES.get(name) or shelf.fields.get(name)
        if name == shelf.id_field or (value is None and ours is not None):
            continue
        if shelf.kind == "providers" and name == "apiKey":
            secret = text_or_none(value, name) or None
        elif ours is None:
            rest[name] = value
        else:
            values[ours] = _checked(ours, name, value)
    beside: dict[str, Any] = {"agentx": rest} if rest else {}
    if foreign is not None:
        beside["external_id"] = foreign
    if beside:
        values["metadata"] = {**values.get("metadata", {}), **beside}
    return Record(place=place, kind=shelf.kind, record=shelf.type(id=id_, **values), secret=secret)


def _checked(ours: str, name: str, value: Any) -> Any:
    if name in _TIMES:
        return moment_of(value, name)
    if ours in _MAPPINGS:
        return mapping(value, name)
    if ours in _NAMES:
        text = text_or_none(value, name)
        return id_for(text, _NAMES[ours])[0] if text else None
    if ours in _TEXTS:
        return text_or_none(value, name)
    if ours == "is_default" and not isinstance(value, bool):
        raise Bad(f"{name} is neither true nor false")
    return value
