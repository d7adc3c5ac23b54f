"""A session that is made with what belongs to it: the session itself comes last, so that no half of it is seen.

Where batches are atomic and up to 1,000 records belong to it, all of it is one batch. Otherwise a note
of it, ``ns:session##making:<id>``, is written first and renewed with every batch. What a crash left is
removed by an `open` that finds the note ten minutes old; whoever is slower than that, and still at it,
fails by the note's version.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from functools import partial
from typing import Any, Final, TypeVar

import msgspec

from kvpersist import keys
from kvpersist.agents.births import given_up
from kvpersist.agents.collections import Collections
from kvpersist.agents.conversations.ordered import OrderedTurns
from kvpersist.agents.conversations.turns import Turns
from kvpersist.agents.deletion import PENDING
from kvpersist.agents.records import Message, Session, ToolCall, new_id, utc
from kvpersist.agents.stat import Draft, Parent, Stat
from kvpersist.agents.writers import atomic_writer, ordered_writer
from kvpersist.driver import ABSENT, Check, Delete, Entry, Op, Put
from kvpersist.errors import BadRequest, Conflict, KeyTooLong, UniqueConflict
from kvpersist.index.atomic_writer import IndexOps
from kvpersist.index.writer import live, version_of
from kvpersist.repository import Repository

__all__ = ["Making", "finish_makings", "new_session"]

R = TypeVar("R")

_ID_BYTES: Final = 128  # of an encoded session id: what lies below it has to fit behind it
_TOGETHER: Final = 1_000  # records of one batch
_RENEWED: Final = 100  # records between two renewals of the note, without atomic batches
_ATTEMPTS: Final = 40
_PAGE: Final = 100


def new_session(fields: dict[str, Any], now: datetime) -> tuple[Session, datetime]:
    """Return a session as it will be stored, and its ``updated_at``, which is kept beside it.

    Raises:
        BadRequest: no such field, or a time without a zone.
        KeyTooLong: the id has over 128 encoded bytes.
    """
    try:
        session = Session(**fields)
    except TypeError as error:
        raise BadRequest(f"{error}; fields: {', '.join(Session.__struct_fields__)}") from error
    session.id = str(session.id) if session.id else new_id()
    part = keys.encode(session.id)
    if (size := len(part.encode())) > _ID_BYTES:
        raise KeyTooLong(session.id, size, _ID_BYTES)
    session.created_at = now if session.created_at is None else utc(session.created_at, "created_at")
    updated_at = session.updated_at
    updated_at = session.created_at if updated_at is None else utc(updated_at, "updated_at")
    session.updated_at = None
    return session, updated_at


class Making:
    """Makes one session: `add` what belongs to it in the order of its numbers, then `finish`, or `abandon`."""

    def __init__(
        self, collections: Collections, turns: Turns | OrderedTurns, session: Session, updated_at: datetime
    ) -> None:
        """``session``, ``updated_at``: as `new_session` returns them."""
        self.session = session
        self._all = collections
        self._store = collections.store
        self._turns = turns
        self._part = keys.encode(session.id)
        self._draft = Draft(Stat(updated_at))
        self._updated_at = updated_at
        self._messages: list[Message] = []
        self._calls: list[ToolCall] = []
        self._others: list[tuple[Repository[Any], Any]] = []
        self._orphans: dict[str, bytes] = {}
        self._note_key = collections.births.making_prefix + self._part
        self._note: bytes | None = None  # the version of the note

    async def add(self, messages: Sequence[Message], calls: Sequence[ToolCall]) -> None:
        """Take messages as they will be stored, and the calls they ask for, or that were recorded with them.

        Raises:
            UniqueConflict: a message of one of the ids is there already, or a session of this one.
            Unencodable: something cannot be kept and given back alike.
            Conflict: it took so long that the session counted as given up.
        """
        for message in messages:
            self._draft.add(message)
        for call in calls:
            self._draft.count(None, call)
            self.leave_off(call.number)  # it may stand with a message that was deleted
        self._messages += messages
        self._calls += calls
        if len(self._messages) + len(self._calls) > _TOGETHER:
            await self._flush()

    async def add_all(self, messages: Sequence[Message], calls: Sequence[ToolCall]) -> None:
        """As `add`, in batches. ``calls`` are sorted by their places."""
        at = 0
        for first in range(0, len(messages), _PAGE):
            page = messages[first : first + _PAGE]
            end = at
            while end < len(calls) and (first + _PAGE >= len(messages) or calls[end].number <= page[-1].number):
                end += 1
            await self.add(page, calls[at:end])
            at = end
        if calls[at:]:
            await self.add((), calls[at:])

    def also(self, repository: Repository[Any], records: Sequence[Any]) -> None:
        """Take other records that belong to the session, as they will be stored."""
        self._others += [(repository, record) for record in records]

    def leave_off(self, last: int) -> None:
        """The session gives out numbers above ``last`` only."""
        self._draft.leave_off(last)

    async def finish(self) -> Session:
        """Store the session itself, from when on it can be seen, and return it.

        Raises:
            UniqueConflict: there is a session of this id, or of a unique value.
            ParentGone: the container or image it names does not exist.
        """
        atomic = isinstance(self._turns, Turns)
        if self._note is not None or (not atomic and (self._messages or self._calls or self._others)):
            await self._flush()
        self._draft.updated_at = self._updated_at
        stat = self._draft.done(self._updated_at)
        for attempt in range(_ATTEMPTS):
            try:
                birth, version = await self._all.births.bear(
                    self._part,
                    self.session,
                    self._conditions,
                    partial(self._beside, stat, await self._ops() if atomic else []),
                    self._all.stat_prefix + self._part,
                )
            except UniqueConflict:
                raise
            except Conflict as conflict:
                if attempt + 1 == _ATTEMPTS or not await self._resolved(conflict):
                    raise
                continue
            self._turns.created(self.session.id, Parent(birth, stat, version, {}))
            break
        if self._note is not None:
            await _remove_note(self._all, self._note_key)
        return msgspec.structs.replace(self.session, updated_at=self._updated_at)

    async def abandon(self) -> None:
        """Remove what was stored, if anything was."""
        if self._note is not None:
            await _unmake(self._all, self._part, Entry(self._note_key, b"", self._note), own=True)

    # ---- private

    async def _conditions(self) -> tuple[Check, ...]:
        checks = await self._all.checks(self.session)
        return checks if self._note is None else (*checks, Check(self._note_key, self._note))

    def _beside(self, stat: Stat, together: Sequence[Op], old: Entry | None) -> list[Op]:
        key = self._all.stat_prefix + self._part
        return [
            Put(self._all.updated_key(self._part, stat.updated_at), self._part.encode()),
            Put(key, self._all.packed(key, stat), version_of(old)),
            *together,
        ]

    async def _flush(self) -> None:
        await self._all.own()
        if self._note is None:
            await self._begin()
        if isinstance(self._turns, OrderedTurns):
            await self._flush_in_order()
        else:
            for attempt in range(_ATTEMPTS):
                ops = await self._ops()
                try:
                    self._note = await self._store._commit([self._renewal(), *ops])
                    break
                except UniqueConflict:
                    raise
                except Conflict as conflict:
                    if attempt + 1 == _ATTEMPTS or not await self._resolved(conflict):
                        raise
        self._messages, self._calls, self._others = [], [], []

    async def _begin(self) -> None:
        birth_key = self._all.birth_prefix + self._part
        await self._all.births.deletions.finish(self._part, begin_anew=True)
        try:
            self._note = await self._store._commit([Check(birth_key, ABSENT), Put(self._note_key, self._now(), ABSENT)])
        except Conflict as conflict:
            raise UniqueConflict("id", self.session.id, self.session.id) from conflict

    def _renewal(self) -> Put:
        return Put(self._note_key, self._now(), self._note)

    def _now(self) -> bytes:
        return b"%d" % self._store.clock()

    async def _flush_in_order(self) -> None:
        records = self._waiting()
        for repository, record in records:
            repository._codec.encode("", record)  # what cannot be kept fails before anything is written
        for done, (repository, record) in enumerate(records):
            if done % _RENEWED == 0:
                self._note = await self._store._commit([self._renewal()])
            pk = repository._pk_of(record)
            try:
                await ordered_writer(repository).save(pk, record, expect=ABSENT)
            except UniqueConflict:
                raise
            except Conflict as conflict:
                raise UniqueConflict("id", keys.unescape(pk), keys.unescape(pk)) from conflict

    def _waiting(self) -> list[tuple[Repository[Any], Any]]:
        messages = [(self._all.messages, message) for message in self._messages]
        return [*messages, *((self._all.tool_calls, call) for call in self._calls), *self._others]

    async def _ops(self) -> list[Op]:
        """What stores the records that wait, on condition of the definitions their index entries are made by."""
        ops = IndexOps()
        puts: list[Op] = []
        waiting: dict[str, tuple[Repository[Any], list[Any]]] = {}
        for repository, record in self._waiting():
            waiting.setdefault(repository.name, (repository, []))[1].append(record)
        for repository, records in waiting.values():
            writer = atomic_writer(repository)
            known = await repository._definitions.known()
            puts.append(known.check)
            for record in records:
                pk = repository._pk_of(record)
                key = repository._prefix + pk
                puts.append(Put(key, writer._codec.encode(key, record), ABSENT))
                await writer.index_ops(ops, known, pk, None, record, None, self._orphans)
        return [*puts, *ops.by_key.values()]

    async def _resolved(self, conflict: Conflict) -> bool:
        """Look at what a batch failed with; False: it cannot be tried again. Raises UniqueConflict."""
        for repository in {repository.name: repository for repository, _ in self._waiting()}.values():
            definitions = repository._definitions
            if conflict.key == definitions.key:
                await definitions.refresh()
                return True
            known = await definitions.known()
            if any(slot.bound.unique and conflict.key.startswith(slot.prefix) for slot in known.maintained):
                await atomic_writer(repository).resolve(known, "", conflict, self._orphans)
                return True
            if conflict.key.startswith(repository._prefix):
                taken = keys.unescape(conflict.key[len(repository._prefix) :])
                raise UniqueConflict("id", taken, taken) from conflict
        return False


async def finish_makings(every: Collections) -> int:
    """Remove what makings that nobody is at any more left; return how many there were."""
    prefix = every.births.making_prefix
    removed = 0
    start: str | None = prefix
    while start is not None:
        page = await every.store._scan(start, keys.prefix_end(prefix), limit=_PAGE)
        for note in page:
            part = note.key[len(prefix) :]
            [record] = await every.store._entries([every.session_prefix + part])
            if live(record) is not None:  # it was made; only the note is left
                await _remove_note(every, note.key)
            elif given_up(note.value, every.store.clock()):
                await _unmake(every, part, note)
                removed += 1
        start = page[-1].key + "!" if len(page) == _PAGE else None
    return removed


async def _unmake(every: Collections, part: str, note: Entry, *, own: bool = False) -> None:
    """Delete what belongs to a session that was not made. ``own``: by its maker, who may have lost the note."""
    store = every.store
    # in one batch with its record, a birth key is that of a session; by itself it was left where batches are not atomic
    unborn = [Check(every.birth_prefix + part, ABSENT)] if every.family.atomic else []
    try:
        await store._commit([*unborn, Put(note.key, b"", note.version)])
    except Conflict as conflict:  # its maker goes on; or, asked by the maker, somebody else has begun to remove it
        if not own or conflict.key != note.key:
            return
    await store._commit([Put(every.deleting_prefix + part, PENDING)])
    await every.births.deletions.finish(part)
    await _remove_note(every, note.key)


async def _remove_note(every: Collections, key: str) -> None:
    await every.store._commit([Delete(key)])
