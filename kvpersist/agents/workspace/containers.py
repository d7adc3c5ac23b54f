"""Containers: tenants or applications, to which images, prototypes, providers and sessions belong."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import msgspec

from kvpersist.agents.births import Family
from kvpersist.agents.family import Parents
from kvpersist.index import Index

__all__ = ["Container", "Containers"]


class Container(msgspec.Struct, kw_only=True, omit_defaults=True):
    """A tenant, or an application of one; ``config`` is an open map."""

    id: str = ""
    name: str | None = None
    config: dict[str, Any] = {}
    metadata: dict[str, Any] = {}
    created_at: datetime | None = None
    updated_at: datetime | None = None


class Containers(Parents[Container]):
    """The containers of one namespace, ``db.containers``, newest first; found by ``name=``.

    Deleting one deletes its images, prototypes, providers and sessions, and what belongs to those.
    """

    def __init__(self, family: Family) -> None:
        super().__init__(
            family,
            Container,
            name="container",
            indexes=[Index("name", order_by="-created_at"), Index(order_by="-created_at")],
        )
