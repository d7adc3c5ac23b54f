"""Everything that is written below a session, on a backend that applies a batch operation by operation.

Messages are written one after the other, each by the careful order of its collection, and each
counts from then on: a crash leaves a beginning of the turn, never a hole. The calls a message asks
for, or answers, follow it, then the stat. What a crash kept from following is made up for by
whoever loads the session's stat next. The birth key is looked at again after a turn; where it is
gone, the turn is taken back.

Who appends writes on the stat it knows; everybody else notes in the stat that he is at it, and others
wait. What is appended meanwhile is seen to by who appends: the stat has changed under him, and where the
session was rewritten he brings calls and counts into line.
"""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from datetime import datetime
from typing import Any, Final, TypeVar, cast

import msgspec

from kvpersist import keys
from kvpersist.agents.collections import Collections
from kvpersist.agents.conversations.items import (
    Begin,
    Edit,
    EditCall,
    EditSession,
    Item,
    Kill,
    Remove,
    Replace,
    ReplaceCalls,
    Rewritten,
    Turn,
    answered,
    asked_call,
    asked_of,
    carried,
    edited,
    edited_call,
    edited_session,
    unanswered,
    weight,
)
from kvpersist.agents.conversations.rewriting import (
    StoredCall,
    StoredMessage,
    doomed,
    followers,
    planned,
    planned_calls,
)
from kvpersist.agents.records import Message, Session, ToolCall
from kvpersist.agents.stat import EXACT, Draft, Parent, Stat
from kvpersist.agents.writers import ordered_writer
from kvpersist.driver import ABSENT, Check, Delete, Entry, Op, Put
from kvpersist.errors import CommitUnknown, Conflict, KvError, ParentGone, UniqueConflict
from kvpersist.funnel import Built, Funnel
from kvpersist.index.ordered_writer import OrderedWriter
from kvpersist.index.writer import live
from kvpersist.log import after_stat

__all__ = ["OrderedTurns", "Recount"]

R = TypeVar("R")

_ATTEMPTS: Final = 20  # of a rewriting that others write between
_ANY_NUMBER: Final = 1 << 62
_HOLD: Final = 5.0  # seconds that others leave a session alone, after its writer was last heard of
_REMEMBERED: Final = 4096  # sessions with something that was begun and never came to be counted


class Recount:
    """Bring the session's calls into line with its messages, and count both again."""

    __slots__ = ()


class _Settle:
    """The session changed at that time; all else stands already, and `_build` sees that it is counted."""

    __slots__ = ("at",)

    def __init__(self, at: datetime) -> None:
        self.at = at


class _Begun:
    """What this process has begun to write below a session, and not counted yet."""

    __slots__ = ("held", "rewritten")

    def __init__(self, rewritten: int) -> None:
        self.rewritten = rewritten  # `Stat.rewritten` when it was begun
        self.held = b""  # the version of the stat in which this process noted that others shall wait


class _Hold:
    """The right of a rewriting to a session, noted in the stat: what others find while it goes on."""

    __slots__ = ("anew", "parent", "renew_at")

    def __init__(self, parent: Parent) -> None:
        self.parent = parent
        self.renew_at = 0.0  # seconds since 1970
        self.anew = False  # whether what others have begun to write is to be looked at again


class OrderedTurns:
    """Writes below one namespace's sessions, without atomic batches."""

    def __init__(self, collections: Collections) -> None:
        self._all = collections
        self._store = collections.store
        self._begun: dict[str, _Begun] = {}
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
        draft, part = Draft(stat), keys.encode(session_id)
        if stat.unsure:
            await self._recount(part, draft)
        else:
            await self._catch_up(part, draft, write=False)
        return _done(draft, stat)

    async def _load(self, session_id: str) -> Parent:
        every = self._all
        part = keys.encode(session_id)
        birth, entry = await self._store._entries([every.birth_prefix + part, every.stat_prefix + part])
        if birth is None:
            raise ParentGone("session", session_id)
        stat = Stat(every.now()) if entry is None else every.stat_of(entry)
        begun = self._begun.get(part)
        mine = entry is not None and begun is not None and entry.version == begun.held
        if entry is not None and stat.unsure and stat.until > self._store.clock() and not mine:
            raise Conflict(entry.key, entry.version, entry.version)  # it is being rewritten: wait, and read again
        if not stat.unsure:
            draft = Draft(stat)
            await self._catch_up(part, draft, write=True)
            stat = _done(draft, stat)
        return Parent(Check(birth.key, birth.version), stat, b"" if entry is None else entry.version, {})

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
        draft, hold = Draft(parent.stat), _Hold(parent)
        if self._overtaken(part, parent.stat) or parent.stat.unsure:
            await self._mend(part, hold, draft)
        results: list[Any] = []
        amends: list[Any] = []
        for item in items:
            try:
                if type(item) is Turn:
                    results.append(await self._turn(session_id, part, hold.parent, draft, item))
                    continue
                if type(item) is Kill:
                    return await self._kill(part, hold.parent, item)
                if isinstance(item, (Remove, Replace, ReplaceCalls)):
                    results.append(await self._rewritten(session_id, part, hold, draft, item))
                else:
                    await self._catch_up(part, draft, write=True)  # what others wrote, and have not counted
                    if isinstance(item, (Begin, EditCall)):  # what a crash keeps from being counted no number tells
                        await self._keep(part, hold)
                    results.append(await self._other(session_id, part, hold, draft, item))
                if isinstance(item, (Remove, Replace, ReplaceCalls, Begin, EditCall, Recount)):
                    amends = [Recount()]
            except UniqueConflict as error:
                results.append(error)
            except Conflict:
                raise
            except KvError as error:
                results.append(_partly(item, error))
        return self._counted(part, hold, draft, results, amends or [_Settle(draft.updated_at)])

    def _overtaken(self, part: str, stat: Stat) -> bool:
        """Whether the session was rewritten, or counted anew, since this process began what it has not counted yet.

        Then neither saw all that the other did: an answer may have been joined to a call that was being taken
        from it, or a call counted in the state that it had before.
        """
        begun = self._begun.setdefault(part, _Begun(stat.rewritten))
        if len(self._begun) > _REMEMBERED:
            del self._begun[next(iter(self._begun))]
        return begun.rewritten != stat.rewritten

    def _counted(
        self, part: str, hold: _Hold, draft: Draft, results: list[Any], amends: Sequence[Any]
    ) -> Built[Parent, Any]:
        every, parent = self._all, hold.parent
        indexed_at = before = parent.stat.indexed_at
        ops: list[Op] = [] if parent.version else [parent.birth]  # where a stat is expected, that says as much
        if before is None or abs(draft.updated_at - before) >= EXACT:
            indexed_at = draft.updated_at
            ops.append(Put(every.updated_key(part, indexed_at), part.encode()))
        if draft.messages < 0 or any(count < 0 for counts in draft.tools.values() for count in counts):
            draft.unsure = True  # something went that was not counted: to be counted again
        stat = _done(draft, parent.stat, indexed_at)
        if stat == parent.stat:
            self._begun.pop(part, None)
            return Built([], lambda version: parent, results)
        key = every.stat_prefix + part
        ops.append(Put(key, every.packed(key, stat), parent.version or ABSENT))
        if before is not None and indexed_at != before:
            ops.append(Delete(every.updated_key(part, before)))

        def counted(version: bytes) -> Parent:
            self._begun.pop(part, None)
            return Parent(parent.birth, stat, version, {})

        return Built(ops, counted, results, stands=0, amends=amends)

    async def _kill(self, part: str, parent: Parent, item: Kill) -> Built[Parent, Any]:
        every = self._all
        if item.guard is not None and not await every.family.holds([item.guard]):
            return Built([], lambda version: parent, [Conflict(item.guard.key, item.guard.expect)])
        if not await self._may_go(part, item):
            return Built([], lambda version: parent, [False])
        conditional = self._store.capabilities.conditional_delete
        ops: list[Op] = [
            parent.birth,
            Put(every.deleting_prefix + part, b"1"),  # what follows is finished by whoever sees this
            Delete(parent.birth.key, cast("bytes", parent.birth.expect) if conditional else None),
        ]
        self._begun.pop(part, None)
        return Built(ops, lambda version: cast("Parent", None), [True])

    async def _may_go(self, part: str, item: Kill) -> bool:
        if item.before is None and not item.closed:
            return True
        record, entry = await self._store._entries([self._all.session_prefix + part, self._all.stat_prefix + part])
        record = live(record)
        if item.before is not None and entry is not None and self._all.stat_of(entry).updated_at >= item.before:
            return False
        codec = self._all.sessions._codec
        return not (item.closed and record is not None and codec.decode(record.key, record.value).active)

    async def _keep(self, part: str, hold: _Hold, *, anew: bool = False) -> None:
        """Note in the stat that its counts will not hold, and that others shall wait; again before that lapses.

        A crash leaves that note, and whoever loads the stat after that time counts again. ``anew``: those who
        read the stat before, and do not wait, shall look again at what they write.

        Raises:
            Conflict: another has written the stat: read it again.
        """
        now = self._store.clock()
        anew = anew and not hold.anew
        if now < hold.renew_at and not anew:
            return
        parent = hold.parent
        rewritten = parent.stat.rewritten + anew
        stat = msgspec.structs.replace(parent.stat, unsure=True, until=now + _HOLD, rewritten=rewritten)
        key = self._all.stat_prefix + part
        version = await self._store._commit([Put(key, self._all.packed(key, stat), parent.version or ABSENT)])
        hold.parent, hold.renew_at = Parent(parent.birth, stat, version, {}), now + _HOLD / 2
        hold.anew = hold.anew or anew
        self._begun.setdefault(part, _Begun(rewritten)).held = version

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
        self,
        writer: OrderedWriter[Message],
        part: str,
        draft: Draft,
        messages: Sequence[Message],
        leaving: AbstractSet[str] = frozenset(),
    ) -> None:
        """Raise what the turn would fail with half way: values that cannot be kept, unique ones that are taken.

        ``leaving``: keys of the records that give up what they have first.
        """
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
            if (
                holder is not None
                and holder.key not in leaving
                and claim.key in slot.stored_keys(writer.decoded(holder), claim.value.decode())
            ):
                raise writer.taken(slot, claim.key, claim.value.decode())

    async def _take_back(self, part: str, messages: Sequence[Message]) -> None:
        for message in messages:
            async for entry in self._all.calls_of(part, message.number, message.number):
                await ordered_writer(self._all.tool_calls).remove(entry.key[len(self._all.call_prefix) :])
            await ordered_writer(self._all.messages).remove(f"{part}!{keys.encode(message.number)}")

    async def _follow(
        self, part: str, draft: Draft, message: Message, *, write: bool, moved: Sequence[ToolCall] = ()
    ) -> None:
        """Store and count the calls that a stored message asks for, or answers; again does no harm.

        ``moved``: the calls that it had in another place.
        """
        writer = ordered_writer(self._all.tool_calls)
        known = {call.position: call for call in moved}
        for position in sorted({*range(len(message.tool_calls or ())), *known}):
            old = known.get(position)
            if position < len(message.tool_calls or ()):
                call = carried(asked_call(message, position), old)
            else:
                call = msgspec.structs.replace(asked_of(cast("ToolCall", old)), number=message.number)
            pk = f"{part}!{keys.encode(message.number)}!{keys.encode(position)}"
            if write:
                try:
                    await writer.save(pk, call, old=None)
                except (
                    Conflict
                ):  # another follows the same message; the answer may be joined already, and is counted below
                    call = asked_of(await self._stored_call(pk) or call)
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
                draft.forget(waiting)
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

    async def _other(self, session_id: str, part: str, hold: _Hold, draft: Draft, item: Any) -> Any:
        if type(item) is Edit:
            return await self._edit(part, draft, item)
        if type(item) is Begin:
            call = await self._begin(part, draft, item.call)
            if not await self._lives(hold.parent):
                await ordered_writer(self._all.tool_calls).remove(self._all.tool_calls._pk_of(call))
                raise ParentGone("session", session_id)
            return call
        if type(item) is EditCall:
            return await self._edit_call(part, draft, item)
        if type(item) is EditSession:
            return await self._edit_session(session_id, part, draft, item)
        if type(item) is _Settle:
            return draft.touch(item.at)
        return await self._mend(part, hold, draft)

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

    async def _rewritten(
        self, session_id: str, part: str, hold: _Hold, draft: Draft, item: Remove | Replace | ReplaceCalls
    ) -> Rewritten:
        """Rewrite, and again where another writer came between: what stands is read anew each time.

        Those who had read the stat before may still append: that counts, and goes on behind what is rewritten.
        """
        await self._keep(part, hold, anew=True)
        for _ in range(_ATTEMPTS):
            try:
                await self._catch_up(part, draft, write=True)
                if isinstance(item, Remove):
                    return await self._remove(session_id, part, hold, draft, item)
                if isinstance(item, Replace):
                    return await self._replace(session_id, part, hold, draft, item)
                return await self._replace_calls(part, hold, draft, item)
            except KvError as error:
                if isinstance(error, Conflict) and error.key == self._all.stat_prefix + part:
                    raise
                draft.unsure = True
                await self._recount(part, draft)
                if not isinstance(error, Conflict) or isinstance(error, UniqueConflict):
                    raise
        raise Conflict(self._all.stat_prefix + part, hold.parent.version)

    async def _remove(self, session_id: str, part: str, hold: _Hold, draft: Draft, item: Remove) -> Rewritten:
        every = self._all
        found = await doomed(every, part, session_id, item, draft.last)
        if found and found[0][1].number > draft.last:  # another's, who has not counted it, nor made its calls perhaps
            await self._catch_up(part, draft, write=True)
        again = item.places is None and len(found) >= item.most
        behind: int | None = None
        if item.places is None:
            behind = found[-1][1].number if again else item.after + 1 if item.after else 0
        gone = await self._take_out(part, hold, draft, found, behind)
        if found or gone:
            draft.touch(every.now())
        return Rewritten(len(found), again=again)

    async def _take_out(
        self, part: str, hold: _Hold, draft: Draft, removed: Sequence[StoredMessage], behind: int | None = None
    ) -> list[StoredCall]:
        """Remove messages, the newest first, each behind its calls; return the calls that went with them.

        What a crash leaves of one message, `_mend` finds: calls that it still asks for, or still answers.
        """
        every = self._all
        gone, waiting = await followers(every, part, removed, behind, draft.last)
        now = every.now()
        numbers = {message.number for _, message in removed}
        await self._drop_calls(draft, [each for each in gone if each[1].number not in numbers])
        for entry, message in removed:
            await self._keep(part, hold)
            await self._drop_calls(draft, [each for each in gone if each[1].number == message.number])
            for stored, call in waiting:
                if call.result_number == message.number:
                    asked = unanswered(call, now)
                    await ordered_writer(every.tool_calls).save(stored.key[len(every.call_prefix) :], asked, old=stored)
                    draft.count(call, asked)
            if await ordered_writer(every.messages).remove(entry.key[len(every.message_prefix) :]):
                draft.remove(message)
        return gone

    async def _mend(self, part: str, hold: _Hold, draft: Draft) -> None:
        """Bring calls into line with messages, and count all of them.

        It is done where a rewriting was not finished, and where one came between what this process wrote.
        """
        await self._keep(part, hold, anew=True)
        every = self._all
        writer = ordered_writer(every.tool_calls)
        calls: dict[tuple[int, int], StoredCall] = {}
        async for entry in every.calls_of(part, 0, _ANY_NUMBER):
            call = writer._codec.decode(entry.key, entry.value)
            calls[call.number, call.position] = entry, call
        entries = after_stat(self._store, f"{every.message_prefix}{part}!", 0)
        messages = [every.messages._codec.decode(each.key, each.value) async for each in entries if live(each)]
        answers = {message.number for message in messages if message.role == "tool"}
        for place in sorted(calls, reverse=True):  # an answer is that of the latest call
            entry, call = calls[place]
            if call.result_number is not None and call.result_number not in answers:
                await self._keep(part, hold)
                await writer.save(entry.key[len(every.call_prefix) :], unanswered(call, every.now()), old=entry)
            answers.discard(-1 if call.result_number is None else call.result_number)
        for message in messages:
            for position in range(len(message.tool_calls or ())):
                if (message.number, position) not in calls:
                    await self._keep(part, hold)
                    pk = f"{part}!{keys.encode(message.number)}!{keys.encode(position)}"
                    [tombstone] = await self._store._entries([every.call_prefix + pk])
                    await writer.save(pk, asked_call(message, position), old=tombstone)
        await self._recount(part, draft)
        for message in messages:
            if message.number in answers:  # of no call yet
                await self._follow(part, draft, message, write=True)

    async def _drop_calls(self, draft: Draft, gone: Sequence[StoredCall]) -> None:
        for entry, call in gone:
            await ordered_writer(self._all.tool_calls).remove(entry.key[len(self._all.call_prefix) :])
            draft.count(call, None)

    async def _replace(self, session_id: str, part: str, hold: _Hold, draft: Draft, item: Replace) -> Rewritten:
        every = self._all
        plan = await planned(every, part, item, draft.last)
        writer = ordered_writer(every.messages)
        if item.make is not None and not plan.again:  # from here on, what is stored is not what it was made of
            item.messages, item.make, item.since = [*plan.stands, *plan.append], None, draft.last
        await self._refuse(writer, part, draft, plan.append, {entry.key for entry, _ in plan.remove})
        gone = await self._take_out(part, hold, draft, plan.remove)
        for entry, changed in plan.edit:
            await writer.save(entry.key[len(every.message_prefix) :], changed, old=entry)
        by_number: dict[int, list[ToolCall]] = {}
        for _, call in gone:
            by_number.setdefault(call.number, []).append(call)
        moved = {message.id: by_number.get(message.number, []) for _, message in plan.remove}
        for message in plan.append:
            await self._keep(part, hold)
            message.number = draft.last + 1
            await writer.save(f"{part}!{keys.encode(message.number)}", message, old=None)
            draft.add(message)
            await self._follow(part, draft, message, write=True, moved=moved.get(message.id, ()))
        if plan.append and not await self._lives(hold.parent):
            await self._take_back(part, plan.append)
            raise ParentGone("session", session_id)
        if plan.remove or plan.edit or plan.append:
            draft.touch(every.now())
        return Rewritten(len(plan.remove), [*plan.stands, *plan.append], plan.again)

    async def _replace_calls(self, part: str, hold: _Hold, draft: Draft, item: ReplaceCalls) -> Rewritten:
        every = self._all
        plan = await planned_calls(every, part, item)
        for _, call in plan.put:  # what cannot be kept fails before anything is written
            every.tool_calls._codec.encode(part, call)
        await self._drop_calls(draft, plan.remove)
        for entry, call in plan.put:
            await self._keep(part, hold)
            pk = f"{part}!{keys.encode(call.number)}!{keys.encode(call.position)}"
            before = None if entry is None else every.tool_calls._codec.decode(entry.key, entry.value)
            if entry is None:  # the place may hold a tombstone
                [entry] = await self._store._entries([every.call_prefix + pk])
            await ordered_writer(every.tool_calls).save(pk, call, old=entry)
            draft.count(before, call)
            draft.leave_off(call.number)
        if plan.remove or plan.put:
            draft.touch(item.at or every.now())
        return Rewritten(len(plan.remove), again=plan.again)

    async def _begin(self, part: str, draft: Draft, call: ToolCall) -> ToolCall:
        every = self._all
        call.number, call.position = draft.last, 0
        async for entry in every.calls_of(part, call.number, call.number):
            call.position = keys.decode(entry.key.rpartition("!")[2], int) + 1
        pk = f"{part}!{keys.encode(call.number)}!{keys.encode(call.position)}"
        [tombstone] = await self._store._entries([every.call_prefix + pk])  # of a call that was removed
        await ordered_writer(every.tool_calls).save(pk, call, old=tombstone)
        draft.count(None, call)
        draft.touch(call.created_at)
        return call

    async def _edit_call(self, part: str, draft: Draft, item: EditCall) -> ToolCall | None:
        every = self._all
        writer = ordered_writer(every.tool_calls)
        pk = f"{part}!{keys.encode(item.number)}!{keys.encode(item.position)}"
        while True:
            entry = await self._alive(every.call_prefix + pk)
            if entry is None:
                return None
            now, before = every.now(), writer._codec.decode(entry.key, entry.value)
            if before.result_number is not None and before.result_number > draft.last:
                await self._catch_up(part, draft, write=True)  # it was answered a moment ago
            changed = edited_call(item, writer._codec, entry, now)
            try:
                await writer.save(pk, changed, old=entry)
            except UniqueConflict:
                raise
            except Conflict:
                continue
            draft.count(before, changed)
            draft.touch(now)
            return changed

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
        draft.messages, draft.roles, draft.tools, draft.open, draft.settled = 0, {}, {}, [], []
        last, prefix = draft.last, f"{every.message_prefix}{part}!"
        async for entry in after_stat(self._store, prefix, 0):
            if live(entry) is not None:
                draft.add(every.messages._codec.decode(entry.key, entry.value))
            last = max(last, keys.decode(entry.key[len(prefix) :], int))
        draft.last = last
        async for entry in every.calls_of(part, 0, _ANY_NUMBER):
            call = every.tool_calls._codec.decode(entry.key, entry.value)
            draft.count(None, call)
            draft.leave_off(call.number)
        draft.unsure = False

    async def _alive(self, key: str) -> Entry | None:
        [entry] = await self._store._entries([key])
        return live(entry)


def _done(draft: Draft, before: Stat, indexed_at: datetime | None = None) -> Stat:
    """The stat that comes of ``before``."""
    return msgspec.structs.replace(draft.done(indexed_at or before.indexed_at), rewritten=before.rewritten)


def _partly(item: Any, error: KvError) -> KvError:
    """The error of an item of which a part stands already."""
    if type(item) is not Turn or not item.stored or isinstance(error, ParentGone):
        return error
    what = tuple(message.id for message in item.messages)
    unknown = CommitUnknown(what, f"the first {len(item.stored)} of {len(what)} messages stand: {error}")
    unknown.__cause__ = error
    return unknown
