"""What providers know of an agent's media, so that nothing is uploaded twice."""

from __future__ import annotations

from datetime import datetime

import msgspec

from kvpersist.agents.births import Births, Family
from kvpersist.agents.children import Children
from kvpersist.agents.state.history import BY_TIME
from kvpersist.errors import BadRequest

__all__ = ["Media", "MediaCache"]


class Media(msgspec.Struct, kw_only=True, omit_defaults=True):
    """A file or picture that a provider has: ``key`` names it, such as a digest; ``size`` in bytes."""

    key: str = ""
    agent_id: str = ""
    provider: str = ""
    mime_type: str = ""
    size: int = 0
    file_id: str | None = None
    file_uri: str | None = None
    created_at: datetime | None = None


class MediaCache(Children[Media]):
    """The media caches of one namespace, ``db.media``; ``(agent_id, key)`` is a record's id.

    Those of an agent are found oldest first. Ids of agent and media have together at most 159 encoded bytes:
    use a digest where a key is longer.
    """

    def __init__(self, family: Family, agents: Births) -> None:
        super().__init__(family, Media, name="media", key=("agent_id", "key"), parents=agents, indexes=[BY_TIME])

    def _check(self, record: Media) -> None:
        if not record.key:
            raise BadRequest("key is empty: name the media by its digest, or as its provider does")
