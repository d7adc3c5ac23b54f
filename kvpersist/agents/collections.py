"""The agent's collections in one namespace, and the keys beside their records."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import datetime
from typing import Final

import msgspec

from kvpersist import keys
from kvpersist.agents.births import Belongs, Births, Family, checks_of
from kvpersist.agents.records import Message, Session, ToolCall
from kvpersist.agents.stat import Stat
from kvpersist.codec import RecordCodec
from kvpersist.driver import Check, Delete, Entry, Op
from kvpersist.errors import CorruptRecord
from kvpersist.index.writer import live
from kvpersist.repository import Repository
from kvpersist.store import Store

__all__ = ["Collections"]

_PAGE: Final = 250  # entries read at once


class Collections:
    """The agent's collections in one namespace, and the keys beside them."""

    def __init__(
        self,
        family: Family,
        sessions: Repository[Session],
        messages: Repository[Message],
        tool_calls: Repository[ToolCall],
        *,
        own_call_indexes: bool = False,
    ) -> None:
        """``own_call_indexes``: tool calls have indexes beyond the usual ones."""
        store, space = family.store, family.space
        self.family = family
        self.store: Store = store
        self.namespace = family.namespace
        self.sessions, self.messages, self.tool_calls = sessions, messages, tool_calls
        self.own_call_indexes = own_call_indexes
        self.stats = RecordCodec(Stat, codec=store.codec)
        self._pack = (msgspec.msgpack if store.codec == "msgpack" else msgspec.json).Encoder().encode
        self.message_prefix = keys.record_prefix(space, "message")
        self.call_prefix = keys.record_prefix(space, "tool_call")
        self.session_prefix = keys.record_prefix(space, "session")
        self.stat_prefix = keys.meta_prefix(space, "session", "stat")
        self.births = Births(family, sessions, beside=self._beside)
        self.births.deletions.children += [tool_calls, messages]
        self.birth_prefix, self.deleting_prefix = self.births.prefix, self.births.deleting_prefix
        self.belongs: list[Belongs] = []  # what a session may belong to
        self.updated_prefix = keys.index_prefix(space, "session", "updated")

    @property
    def owned(self) -> bool:
        """Whether it is noted already that plain writes have no place in this namespace."""
        return self.family.owned

    async def own(self) -> None:
        """Note that plain writes have no place in this namespace."""
        await self.family.own()

    def now(self) -> datetime:
        """The store's time."""
        return self.family.now()

    async def checks(self, session: Session, before: Session | None = None) -> tuple[Check, ...]:
        """Return what has to be so for a session to be written in place of ``before``. Raises ParentGone."""
        return await checks_of(self.belongs, session, before)

    def updated_key(self, pk: str, at: datetime) -> str:
        """The key of a session in the index by its last change, newest first."""
        return f"{self.updated_prefix}{keys.encode(at, descending=True)}!{pk}"

    async def calls_of(self, part: str, first: int, last: int) -> AsyncIterator[Entry]:
        """The stored calls of a session that messages ``first`` to ``last`` asked for."""
        start = f"{self.call_prefix}{part}!{keys.encode(first)}"
        end = f"{self.call_prefix}{part}!{keys.encode(last + 1)}"
        while True:
            page = await self.store._scan(start, end, limit=_PAGE)
            for entry in page:
                if live(entry) is not None:
                    yield entry
            if len(page) < _PAGE:
                return
            start = page[-1].key + "!"  # no key lies between a key and itself + '!'

    async def _beside(self, part: str) -> list[Op]:
        """What removes the stat of a session and its entry in the index `updated`."""
        key = self.stat_prefix + part
        [entry] = await self.store._entries([key])
        if entry is None:
            return []
        ops: list[Op] = []
        try:
            indexed_at = self.stat_of(entry).indexed_at
        except CorruptRecord:  # its index entry is passed over by readers
            indexed_at = None
        if indexed_at is not None:
            ops.append(Delete(self.updated_key(part, indexed_at)))
        return [*ops, Delete(key)]

    def packed(self, key: str, stat: Stat) -> bytes:
        """Encode a stat record. It is made here, so its types need no proof."""
        return self.stats.framed(key, self._pack(stat))

    def stat_of(self, entry: Entry) -> Stat:
        """Decode a stat record."""
        return self.stats.decode(entry.key, entry.value)
