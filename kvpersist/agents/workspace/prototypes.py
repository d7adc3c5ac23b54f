"""Prototypes: what images are made from."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import msgspec

from kvpersist.agents.births import Belongs, Births, Family
from kvpersist.agents.family import Records
from kvpersist.index import Index

__all__ = ["Prototype", "Prototypes"]


class Prototype(msgspec.Struct, kw_only=True, omit_defaults=True):
    """A named configuration that images are made from; an image names its own by ``prototype_id``."""

    id: str = ""
    container_id: str | None = None
    name: str | None = None
    description: str | None = None
    system_prompt: str | None = None
    mcp_servers: dict[str, Any] = {}
    metadata: dict[str, Any] = {}
    role_id: str | None = None
    os_id: str | None = None
    model: str | None = None
    thinking: Any = None
    provider_options: dict[str, Any] | None = None
    custom_data: dict[str, Any] | None = None
    created_at: datetime | None = None
    updated_at: datetime | None = None


class Prototypes(Records[Prototype]):
    """The prototypes of one namespace, ``db.prototypes``, newest first; found by ``name=`` or ``container_id=``.

    Its container must be there, and takes it along when it is deleted.
    """

    def __init__(self, family: Family, containers: Births) -> None:
        super().__init__(
            family,
            Prototype,
            name="prototype",
            indexes=[
                Index("name", order_by="-created_at"),
                Index("container_id", order_by="-created_at"),
                Index(order_by="-created_at"),
            ],
            belongs=[Belongs("container_id", containers)],
        )
