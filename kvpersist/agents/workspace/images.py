"""Images: how agents were set up, to begin sessions from."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import msgspec

from kvpersist.agents.births import Belongs, Births, Family
from kvpersist.agents.family import Parents
from kvpersist.index import Index

__all__ = ["Image", "Images"]


class Image(msgspec.Struct, kw_only=True, omit_defaults=True):
    """A snapshot of an agent's configuration.

    ``parent_id`` names the image it was made from, ``session_id`` the session it was taken of or is
    used by, ``prototype_id`` a prototype: these are names, and need not be there. ``mcp_servers``: the
    configuration of each by its name.
    """

    id: str = ""
    container_id: str | None = None
    session_id: str | None = None
    name: str = "New Conversation"
    description: str | None = None
    system_prompt: str | None = None
    parent_id: str | None = None
    mcp_servers: dict[str, Any] = {}
    metadata: dict[str, Any] = {}
    role_id: str | None = None
    os_id: str | None = None
    model: str | None = None
    thinking: Any = None
    provider_options: dict[str, Any] | None = None
    prototype_id: str | None = None
    custom_data: dict[str, Any] | None = None
    created_at: datetime | None = None
    updated_at: datetime | None = None


class Images(Parents[Image]):
    """The images of one namespace, ``db.images``, newest first.

    Found by ``name=`` (exact), ``container_id=``, ``session_id=`` or ``parent_id=``. Its container must
    be there, and takes it along when it is deleted. Sessions of a deleted image stay; their ``image_id``
    then names nothing.
    """

    def __init__(self, family: Family, containers: Births) -> None:
        super().__init__(
            family,
            Image,
            name="image",
            indexes=[
                Index("name", order_by="-created_at"),
                Index("container_id", order_by="-created_at"),
                Index("session_id", order_by="-created_at"),
                Index("parent_id", order_by="-created_at"),
                Index(order_by="-created_at"),
            ],
            belongs=[Belongs("container_id", containers)],
        )
