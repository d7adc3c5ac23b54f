"""Everything that is written below a session, on a backend that applies a batch operation by operation.

Messages are written one after the other, each by the careful order of its collection, and each
counts from then on: a crash leaves a beginning of the turn, never a hole. The calls a message asks
for, or answers, follow it, then the stat. What a crash kept from following is made up for by
whoever loads the session's stat next. The birth key is looked at again after a turn; where it is
gone, the turn is taken back.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar, cast

import msgspec

from kvpersist import keys
from kvpersist.agents.collections import Collections
from kvpersist.agents.items import (
    Begin,
    Edit,
    EditSession,
    End,
    Item,
    Kill,
    RemoveMessage,
    Turn,
    answered,
    asked_call,
    edited,
    edited_session,
    ended,
    unanswered,
    weight,
)
from kvpersist.agents.records import Message, Session, ToolCall
from kvpersist.agents.stat import Draft, Parent, Stat
from kvpersist.agents.turns import EXACT
from kvpersist.driver import ABSENT, Check, Delete, Entry, Op, Put
from kvpersist.errors import CommitUnknown, Conflict, KvError, ParentGone, UniqueConflict
from kvpersist.funnel import Built, Funnel
from kvpersist.index.ordered_writer import OrderedWriter
from kvpersist.index.writer import live
from kvpersist.log import after_stat
from kvpersist.repository import Repository

__all__ = ["OrderedTurns", "Recount", "asked_of", "ordered_writer"]

R = TypeVar("R")


class Recount:
    """Count the session's messages and calls again."""

    __slots__ = ()


class OrderedTurns:
    """Writes below one namespace's sessions, without atomic batches."""

    def __init__(self, collections: Collections) -> None:
        self._all = collections
        self._store = collections.store
        self._funnel: Funnel[Parent, Any, Any] = Funnel(
            self._store, self._load, self._build, weigh=weight, what="write to session"
        )

    def created(self, session_id: str, parent: Parent) -> None:
        """Remember a session that was created here, so that its first turn needs no read."""
        self._funnel.remember(session_id, parent)

    async def submit(self, session_id: str, item: Item) -> Any:
        """Write ``item`` below the session and return its answer.

        Raises:
            ParentGone: there is no such session, or it was deleted; nothing was written.
        """
        return await self._funnel.submit(session_id, item)

    async def stat(self, session_id: str, stat: Stat) -> Stat:
        """Return ``stat`` with what it missed counted, changing nothing that is stored."""
        draft = Draft(stat)
        await self._catch_up(keys.encode(session_id), draft, write=False)
        return draft.done(stat.indexed_at)

    async def _load(self, session_id: str) -> Parent:
        every = self._all
        part = keys.encode(session_id)
        birth, entry = await self._store._entries([every.birth_prefix + part, every.stat_prefix + part])
        if birth is None:
            raise ParentGone("session", session_id)
        stat = Stat(every.now()) if entry is None else every.stat_of(entry)
        draft = Draft(stat)
        await self._catch_up(part, draft, write=True)
        version = b"" if entry is None else entry.version
        return Parent(Check(birth.key, birth.version), draft.done(stat.indexed_at), version, {})

    async def _catch_up(self, part: str, draft: Draft, *, write: bool) -> None:
        prefix = f"{self._all.message_prefix}{part}!"
        async for entry in after_stat(self._store, prefix, draft.last):
            if live(entry) is None:
                draft.last = keys.decode(entry.key[len(prefix) :], int)
                continue
            message = self._all.messages._codec.decode(entry.key, entry.value)
            draft.add(message)
            await self._follow(part, draft, message, write=write)

    async def _build(self, session_id: str, parent: Parent, items: list[Any]) -> Built[Parent, Any]:
        part = keys.encode(session_id)
        draft = Draft(parent.stat)
        results: list[Any] = []
        amends: list[Recount] = []
        for item in items:
            try:
                if type(item) is Turn:
                    results.append(await self._turn(session_id, part, parent, draft, item))
                    continue
                if type(item) is Kill:
                    if item.guard is not None and not await self._all.family.holds([item.guard]):
                        return Built([], lambda version: parent, [Conflict(item.guard.key, item.guard.expect)])
                    return self._kill(part, parent)
                results.append(await self._other(session_id, part, parent, draft, item))
                amends.append(Recount())
            except UniqueConflict as error:
                results.append(error)
            except Conflict:
                raise
            except KvError as error:
                results.append(_partly(item, error))
        return self._counted(part, parent, draft, results, amends)

    def _counted(
        self, part: str, parent: Parent, draft: Draft, results: list[Any], amends: Sequence[Recount]
    ) -> Built[Parent, Any]:
        every = self._all
        indexed_at = before = parent.stat.indexed_at
        ops: list[Op] = [] if parent.version else [parent.birth]  # where a stat is expected, that says as much
        if before is None or abs(draft.updated_at - before) >= EXACT:
            indexed_at = draft.updated_at
            ops.append(Put(every.updated_key(part, indexed_at), part.encode()))
        stat = draft.done(indexed_at)
        if stat == parent.stat:
            return Built([], lambda version: parent, results)
        key = every.stat_prefix + part
        ops.append(Put(key, every.packed(key, stat), parent.version or ABSENT))
        if before is not None and indexed_at != before:
            ops.append(Delete(every.updated_key(part, before)))
        return Built(ops, lambda version: Parent(parent.birth, stat, version, {}), results, stands=0, amends=amends[:1])

    def _kill(self, part: str, parent: Parent) -> Built[Parent, Any]:
        every = self._all
        conditional = self._store.capabilities.conditional_delete
        ops: list[Op] = [
            parent.birth,
            Put(every.deleting_prefix + part, b"1"),  # what follows is finished by whoever sees this
            Delete(parent.birth.key, cast("bytes", parent.birth.expect) if conditional else None),
        ]
        return Built(ops, lambda version: cast("Parent", None), [True])

    # ---- items

    async def _turn(self, session_id: str, part: str, parent: Parent, draft: Draft, item: Turn) -> Sequence[Message]:
        writer = ordered_writer(self._all.messages)
        if not item.stored:
            await self._refuse(writer, part, draft, item.messages)
        for message in item.messages[len(item.stored) :]:
            message.number = draft.last + 1
            await writer.save(f"{part}!{keys.encode(message.number)}", message, old=None)
            item.stored.append(message)
            draft.add(message)
            await self._follow(part, draft, message, write=True)
        if not await self._lives(parent):
            await self._take_back(part, item.stored)
            raise ParentGone("session", session_id)
        return item.messages

    async def _lives(self, parent: Parent) -> bool:
        """Whether the session was still there after what was written below it; its deleter will see that then."""
        [birth] = await self._store._entries([parent.birth.key])
        return birth is not None and birth.version == parent.birth.expect

    async def _refuse(
        self, writer: OrderedWriter[Message], part: str, draft: Draft, messages: Sequence[Message]
    ) -> None:
        """Raise what the turn would fail with half way: values that cannot be kept, unique ones that are taken."""
        known = await writer._definitions.fresh()
        wanted: dict[str, tuple[Any, str]] = {}
        for number, message in enumerate(messages, draft.last + 1):
            message.number = number
            pk = f"{part}!{keys.encode(number)}"
            writer._codec.encode(pk, message)
            for slot in known.maintained:
                for key in slot.keys(message, pk) if slot.bound.unique else ():
                    if key in wanted:
                        raise writer.taken(slot, key, wanted[key][1])
                    wanted[key] = slot, pk
        if self._all.own_call_indexes:
            slots = (await self._all.tool_calls._definitions.fresh()).maintained
            for message in messages:
                for position in range(len(message.tool_calls or ())):
                    for slot in slots:
                        slot.keys(asked_call(message, position), f"{part}!{position}")
        claims = [entry for entry in await self._store._entries(list(wanted)) if entry is not None and entry.value]
        holders = await self._store._entries([self._all.message_prefix + entry.value.decode() for entry in claims])
        for claim, holder in zip(claims, holders, strict=True):
            slot, _ = wanted[claim.key]
            holder = live(holder)
            if holder is not None and claim.key in slot.stored_keys(writer.decoded(holder), claim.value.decode()):
                raise writer.taken(slot, claim.key, claim.value.decode())

    async def _take_back(self, part: str, messages: Sequence[Message]) -> None:
        for message in messages:
            async for entry in self._all.calls_of(part, message.number, message.number):
                await ordered_writer(self._all.tool_calls).remove(entry.key[len(self._all.call_prefix) :])
            await ordered_writer(self._all.messages).remove(f"{part}!{keys.encode(message.number)}")

    async def _follow(self, part: str, draft: Draft, message: Message, *, write: bool) -> None:
        """Store and count the calls that a stored message asks for, or answers; again does no harm."""
        writer = ordered_writer(self._all.tool_calls)
        for position in range(len(message.tool_calls or ())):
            call = asked_call(message, position)
            pk = f"{part}!{keys.encode(message.number)}!{keys.encode(position)}"
            if write:
                try:
                    await writer.save(pk, call, old=None)
                except Conflict:
                    call = await self._stored_call(pk) or call
            draft.count(None, call)
        if message.tool_call_id is None or message.role != "tool":
            return
        waiting = draft.asked(message.tool_call_id, message.number)
        if waiting is None:
            return
        pk = f"{part}!{keys.encode(waiting[1])}!{keys.encode(waiting[2])}"
        while True:
            [entry] = await self._store._entries([self._all.call_prefix + pk])
            if live(entry) is None or entry is None:
                draft.open.remove(waiting)
                return
            call = writer._codec.decode(entry.key, entry.value)
            done = answered(call, message) if call.result_number is None else call
            try:
                if write and done is not call:
                    await writer.save(pk, done, old=entry)
            except Conflict:
                continue
            draft.count(asked_of(done), done)
            return

    async def _stored_call(self, pk: str) -> ToolCall | None:
        [entry] = await self._store._entries([self._all.call_prefix + pk])
        entry = live(entry)
        return None if entry is None else self._all.tool_calls._codec.decode(entry.key, entry.value)

    async def _other(self, session_id: str, part: str, parent: Parent, draft: Draft, item: Any) -> Any:
        if type(item) is Edit:
            return await self._edit(part, draft, item)
        if type(item) is RemoveMessage:
            return await self._remove(part, draft, item.number, item.id)
        if type(item) is Begin:
            call = await self._begin(part, draft, item.call)
            if not await self._lives(parent):
                await ordered_writer(self._all.tool_calls).remove(self._all.tool_calls._pk_of(call))
                raise ParentGone("session", session_id)
            return call
        if type(item) is End:
            return await self._end(part, draft, item)
        if type(item) is EditSession:
            return await self._edit_session(session_id, part, draft, item)
        return await self._recount(part, draft)

    async def _edit(self, part: str, draft: Draft, item: Edit) -> Message | None:
        writer = ordered_writer(self._all.messages)
        pk = f"{part}!{keys.encode(item.number)}"
        while True:
            entry = await self._alive(self._all.message_prefix + pk)
            if entry is None or writer._codec.decode(entry.key, entry.value).id != item.id:
                return None
            changed = edited(item.fn, writer._codec, entry)
            try:
                await writer.save(pk, changed, old=entry)
            except UniqueConflict:
                raise
            except Conflict:
                continue
            draft.touch(self._all.now())
            return changed

    async def _remove(self, part: str, draft: Draft, number: int, id_: str) -> bool:
        every = self._all
        writer = ordered_writer(every.tool_calls)
        pk = f"{part}!{keys.encode(number)}"
        entry = await self._alive(every.message_prefix + pk)
        if entry is None:
            return False
        message = every.messages._codec.decode(entry.key, entry.value)
        if message.id != id_:  # of another session that took this one's id
            return False
        if not await ordered_writer(every.messages).remove(pk):
            return False
        draft.remove(message)
        async for stored in every.calls_of(part, number, number):
            call = writer._codec.decode(stored.key, stored.value)
            await writer.remove(stored.key[len(every.call_prefix) :])
            draft.count(call, None)
        if message.role == "tool" and message.tool_call_id is not None:
            async for stored in every.calls_of(part, 0, number - 1):
                call = writer._codec.decode(stored.key, stored.value)
                if call.result_number == number:
                    await writer.save(stored.key[len(every.call_prefix) :], unanswered(call), old=stored)
                    draft.count(call, unanswered(call))
        draft.touch(every.now())
        return True

    async def _begin(self, part: str, draft: Draft, call: ToolCall) -> ToolCall:
        every = self._all
        call.number, call.position = draft.last, 0
        async for entry in every.calls_of(part, call.number, call.number):
            call.position = keys.decode(entry.key.rpartition("!")[2], int) + 1
        pk = f"{part}!{keys.encode(call.number)}!{keys.encode(call.position)}"
        await ordered_writer(every.tool_calls).save(pk, call, old=None)
        draft.count(None, call)
        draft.touch(call.created_at)
        return call

    async def _end(self, part: str, draft: Draft, item: End) -> ToolCall | None:
        every = self._all
        writer = ordered_writer(every.tool_calls)
        pk = f"{part}!{keys.encode(item.number)}!{keys.encode(item.position)}"
        while True:
            entry = await self._alive(every.call_prefix + pk)
            if entry is None:
                return None
            call = writer._codec.decode(entry.key, entry.value)
            done = ended(call, item, every.now())
            try:
                await writer.save(pk, done, old=entry)
            except Conflict:
                continue
            draft.count(call, done)
            draft.touch(done.completed_at)
            return done

    async def _edit_session(self, session_id: str, part: str, draft: Draft, item: EditSession) -> Session:
        every = self._all
        writer = ordered_writer(every.sessions)
        while True:
            entry = await self._alive(every.session_prefix + part)
            if entry is None:
                raise ParentGone("session", session_id)
            before = writer._codec.decode(entry.key, entry.value)
            changed = edited_session(item.fn, writer._codec, entry, draft, every.now())
            checks = await every.checks(changed, before)
            try:
                await writer.save(part, msgspec.structs.replace(changed, updated_at=None), old=entry)
            except UniqueConflict:
                raise
            except Conflict:
                continue
            if await every.family.holds(checks):
                return changed
            for check in checks:  # what it shall belong to is gone: as it was, and asked again
                every.family.forget(check.key)
            await writer.save(part, before)

    async def _recount(self, part: str, draft: Draft) -> None:
        every = self._all
        draft.messages, draft.roles, draft.tools, draft.open = 0, {}, {}, []
        last, prefix = draft.last, f"{every.message_prefix}{part}!"
        async for entry in after_stat(self._store, prefix, 0):
            if live(entry) is not None:
                draft.add(every.messages._codec.decode(entry.key, entry.value))
            last = max(last, keys.decode(entry.key[len(prefix) :], int))
        draft.last = last
        async for entry in every.calls_of(part, 0, last):
            draft.count(None, every.tool_calls._codec.decode(entry.key, entry.value))

    async def _alive(self, key: str) -> Entry | None:
        [entry] = await self._store._entries([key])
        return live(entry)


def _partly(item: Any, error: KvError) -> KvError:
    """The error of an item of which a part stands already."""
    if type(item) is not Turn or not item.stored or isinstance(error, ParentGone):
        return error
    what = tuple(message.id for message in item.messages)
    unknown = CommitUnknown(what, f"the first {len(item.stored)} of {len(what)} messages stand: {error}")
    unknown.__cause__ = error
    return unknown


def asked_of(call: ToolCall) -> ToolCall:
    """The call as it was counted while it waited."""
    return call if call.state == "pending" else unanswered(call)


def ordered_writer(repository: Repository[R]) -> OrderedWriter[R]:
    """How a repository writes on a backend without atomic batches."""
    return cast("OrderedWriter[R]", repository._writer)
