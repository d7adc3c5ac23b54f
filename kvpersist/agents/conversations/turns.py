"""Everything that is written below a session, on a backend with atomic batches.

One batch per turn, through one funnel per session. It carries checks of the session's birth key and
of the definitions its index entries were made by, the new stat on condition of the old one, and
what the items of the round need. `kvpersist.agents.conversations.ordered` serves the other backends.
"""

from __future__ import annotations

from collections.abc import Awaitable, Mapping, Sequence
from contextlib import suppress
from itertools import islice
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
from kvpersist.agents.writers import atomic_writer
from kvpersist.driver import ABSENT, Check, Delete, Entry, Op, Put
from kvpersist.errors import Conflict, CorruptRecord, KvError, ParentGone, UniqueConflict
from kvpersist.funnel import Built, Funnel
from kvpersist.index.atomic_writer import AtomicWriter, IndexOps
from kvpersist.index.definitions import Known
from kvpersist.index.writer import version_of
from kvpersist.log import after_stat
from kvpersist.repository import Repository

__all__ = ["Round", "Turns"]

R = TypeVar("R")

_ANY_NUMBER: Final = 1 << 62
_LARGE: Final = 1 << 13  # bytes of a stored call; a larger one is not remembered until its answer


class Turns:
    """Builds the batches of one namespace's sessions, on a backend with atomic ones."""

    def __init__(self, collections: Collections) -> None:
        self._all = collections
        self._store = collections.store
        self._taken_over: dict[str, bytes] = {}  # claims whose holder does not live, as a conflict showed
        self._funnel: Funnel[Parent, Item, Any] = Funnel(
            self._store, self._load, self._build, lost=self._lost, weigh=weight, what="write to session"
        )

    def created(self, session_id: str, parent: Parent) -> None:
        """Remember a session that was created here, so that its first turn needs no read."""
        self._funnel.remember(session_id, parent)

    def submit(self, session_id: str, item: Item) -> Awaitable[Any]:
        """Write ``item`` below the session and return its answer.

        Raises:
            ParentGone: there is no such session, or it was deleted; nothing was written.
        """
        return self._funnel.submit(session_id, item)

    async def _load(self, session_id: str) -> Parent:
        every = self._all
        part = keys.encode(session_id)
        birth, stat = await self._store._entries([every.birth_prefix + part, every.stat_prefix + part])
        if birth is None:
            raise ParentGone("session", session_id)
        checked = Check(birth.key, birth.version)
        if stat is not None:
            with suppress(CorruptRecord):  # then it is made anew
                return Parent(checked, every.stat_of(stat), stat.version, {})
        return Parent(checked, await self._recounted(part), b"" if stat is None else stat.version, {})

    async def _recounted(self, part: str) -> Stat:
        """Make a damaged stat from what it counted; the number of a deleted last message is not known any more."""
        every = self._all
        draft = Draft(Stat(every.now()))
        prefix = f"{every.message_prefix}{part}!"
        async for entry in after_stat(self._store, prefix, 0):
            try:
                draft.add(every.messages._codec.decode(entry.key, entry.value))
            except CorruptRecord:  # its place is taken all the same
                draft.last = keys.decode(entry.key[len(prefix) :], int)
                draft.messages += 1
        async for entry in every.calls_of(part, 0, _ANY_NUMBER):
            with suppress(CorruptRecord):
                call = every.tool_calls._codec.decode(entry.key, entry.value)
                draft.count(None, call)
                draft.leave_off(call.number)
        return draft.done(None)

    async def _build(self, session_id: str, parent: Parent, items: list[Item]) -> Built[Parent, Any]:
        round_ = Round(self._all, session_id, parent, self._taken_over)
        if parent.stat.open or parent.stat.settled:
            await round_.prepare(items)
        for position, item in enumerate(items):
            await round_.add(position, item)
        return await round_.built()

    async def _lost(self, session_id: str, built: Built[Parent, Any], conflict: Conflict) -> tuple[int, KvError] | None:
        """Refresh what the conflict shows to be stale; a value that is taken fails the item that wants it."""
        every = self._all
        if every.family.forget(conflict.key):
            killing = (built.claims or {}).get(conflict.key)  # it is part of a deletion that another has finished
            return None if killing is None else (killing, conflict)
        repositories: list[Repository[Any]] = [every.messages, every.tool_calls, every.sessions]
        for repository in repositories:
            definitions = repository._definitions
            known = definitions.cached
            if known is None:
                continue
            if conflict.key == definitions.key:
                await definitions.refresh()
                return None
            if any(slot.bound.unique and conflict.key.startswith(slot.prefix) for slot in known.maintained):
                try:
                    await atomic_writer(repository).resolve(known, "", conflict, self._taken_over)
                except UniqueConflict as error:
                    position = (built.claims or {}).get(conflict.key)
                    return None if position is None else (position, error)
        return None


class Round:
    """One batch in the making: what several items below one session write together."""

    def __init__(self, collections: Collections, session_id: str, parent: Parent, orphans: dict[str, bytes]) -> None:
        self._all = collections
        self._store = collections.store
        self._session_id = session_id
        self._part = parent.birth.key[len(collections.birth_prefix) :]
        self._parent = parent
        self._draft = Draft(parent.stat)
        self._orphans = orphans
        self._checks: dict[str, Op] = {}
        self._puts: list[Op] = []
        self._ops = IndexOps()
        self._claims: dict[str, int] = {}
        self._askers: dict[str, int] = {}  # by call, the item that made or changed it first
        self._calls: dict[str, tuple[Entry | None, ToolCall]] = {}  # as stored, and as it will be
        self._waiting: dict[str, tuple[Entry, ToolCall]] = {}
        self._results: list[Any] = []
        self._dead = False

    async def prepare(self, items: Sequence[Item]) -> None:
        """Read the calls that the round's messages answer, where they are not remembered: one get."""
        await self._read_waiting([message for item in items if type(item) is Turn for message in item.messages])

    async def _read_waiting(self, messages: Sequence[Message]) -> None:
        asked: dict[str, int] = {}
        for message in messages:
            if message.tool_call_id is not None and message.role == "tool":
                asked[message.tool_call_id] = asked.get(message.tool_call_id, 0) + 1
        if not asked:
            return
        held: dict[str, Entry | None] = {}
        waiting = sorted((*self._draft.open, *self._draft.settled), key=lambda each: each[1:], reverse=True)
        for call_id, number, position in waiting:
            if asked.get(call_id, 0) > 0:
                asked[call_id] -= 1
                pk = self._call_pk(number, position)
                held[pk] = self._parent.recent.get(pk)
        missing = [pk for pk, entry in held.items() if entry is None]
        prefix, codec = self._all.call_prefix, self._all.tool_calls._codec
        held.update(zip(missing, await self._store._entries([prefix + pk for pk in missing]), strict=True))
        for pk, entry in held.items():
            if entry is not None:
                try:
                    self._waiting[pk] = entry, codec.decode(entry.key, entry.value)
                except CorruptRecord:  # it cannot be joined; its message is kept all the same
                    continue

    async def add(self, position: int, item: Item) -> None:
        """Add one item; where it fails, its error, and nothing else of it."""
        marks = len(self._ops.by_key), len(self._puts)
        try:
            self._results.append(await self._added(item))
        except Exception as error:  # noqa: BLE001  # functions of the caller's and of indexes fail their own item only
            for key in list(self._ops.by_key)[marks[0] :]:
                del self._ops.by_key[key]
                self._ops.claims.pop(key, None)
            del self._puts[marks[1] :]
            if type(item) is not Turn:  # it has the round to itself, and may have counted some of what it meant to do
                self._draft = Draft(self._parent.stat)
                self._calls.clear()
            self._results.append(error)
        for key in islice(self._ops.claims, len(self._claims), None):
            self._claims[key] = position
        if self._all.own_call_indexes:  # what they claim is known when the batch is complete
            for pk in self._calls:
                self._askers.setdefault(pk, position)

    async def built(self) -> Built[Parent, Any]:
        """Return the batch: checks, records, index entries, and the stat that counts them."""
        parent, every, draft = self._parent, self._all, self._draft
        recent: dict[str, tuple[str, bytes]] = {}
        if self._calls:
            writer, known = await self._using(every.tool_calls)
            for pk, (old, call) in self._calls.items():
                key = every.call_prefix + pk
                data = writer.encoded(key, call, old, known)
                self._puts.append(Put(key, data, version_of(old)))
                if old is None:
                    self._enter(writer, known, pk, call)
                else:
                    await writer.index_ops(self._ops, known, pk, old, call, None, {})
                if every.own_call_indexes:
                    for claim in self._ops.claims:
                        self._claims.setdefault(claim, self._askers[pk])
                if call.result_number is None and len(data) <= _LARGE:
                    recent[pk] = key, data
        if not self._puts and not self._ops.by_key:
            return Built([], lambda version: parent, self._results)
        ops: list[Op] = [*self._checks.values(), *self._puts, *self._ops.by_key.values()]
        for key in self._claims if self._orphans else ():
            self._orphans.pop(key, None)
        if self._dead:
            return Built(ops, lambda version: cast("Parent", None), self._results, claims=self._claims)
        indexed_at = parent.stat.indexed_at
        if indexed_at is None or abs(draft.updated_at - indexed_at) >= EXACT:
            if indexed_at is not None:
                ops.append(Delete(every.updated_key(self._part, indexed_at)))
            indexed_at = draft.updated_at
            ops.append(Put(every.updated_key(self._part, indexed_at), self._part.encode()))
        stat = draft.done(indexed_at)
        key = every.stat_prefix + self._part
        ops.append(parent.birth)
        ops.append(Put(key, every.packed(key, stat), parent.version or ABSENT))

        def after(version: bytes) -> Parent:
            remembered = parent.recent
            if recent:
                remembered = {pk: Entry(key, data, version) for pk, (key, data) in recent.items()}
            elif remembered:
                remembered = {pk: entry for pk, entry in remembered.items() if pk not in self._calls}
            return Parent(parent.birth, stat, version, remembered)

        return Built(ops, after, self._results, claims=self._claims)

    # ---- items

    def _added(self, item: Item) -> Awaitable[Any]:
        if type(item) is Turn:
            return self._turn(item.messages)
        if type(item) is Edit:
            return self._edit(item)
        if type(item) is Remove:
            return self._remove(item)
        if type(item) is Replace:
            return self._replace(item)
        if type(item) is ReplaceCalls:
            return self._replace_calls(item)
        if type(item) is Begin:
            return self._begin(item.call, item.place)
        if type(item) is EditCall:
            return self._edit_call(item)
        if type(item) is Kill:
            return self._kill(item)
        return self._edit_session(cast("EditSession", item))

    async def _turn(
        self, messages: Sequence[Message], moved: Mapping[str, Sequence[ToolCall]] | None = None
    ) -> Sequence[Message]:
        """``moved``: the calls that these messages, by their ids, had in another place."""
        every = self._all
        writer, known = await self._using(every.messages)
        encode, prefix, part = writer._codec.encode, every.message_prefix, self._part
        puts, draft = self._puts, self._draft
        made: list[tuple[str, ToolCall]] = []
        for number, message in enumerate(messages, draft.last + 1):
            message.number = number
            pk = f"{part}!{keys.encode(number)}"
            key = prefix + pk
            puts.append(Put(key, encode(key, message), ABSENT))
            self._enter(writer, known, pk, message)
            if message.tool_calls:
                positions = range(len(message.tool_calls))
                made += [(f"{pk}!{keys.encode(each)}", asked_call(message, each)) for each in positions]
        made = self._carried(messages, made, moved) if moved else made
        if made and every.own_call_indexes:  # what they refuse is refused here, before anything is counted
            for slot in (await every.tool_calls._definitions.known()).maintained:
                for pk, call in made:
                    slot.keys(call, pk)
        asked = iter(made)
        for message in messages:
            draft.add(message)
            more = 0 if not moved else len(_recorded(message, moved.get(message.id, ())))
            for pk, call in islice(asked, len(message.tool_calls or ()) + more):
                self._calls[pk] = None, call
                draft.count(None, call)
            if message.tool_call_id is not None and message.role == "tool":
                self._answer(message, message.tool_call_id)
        return messages

    def _enter(self, writer: AtomicWriter[R], known: Known, pk: str, record: R) -> None:
        """Add the index entries of a new record; what `AtomicWriter` does for any, without looking for old ones."""
        value = pk.encode()
        ops = self._ops
        for slot in known.maintained:
            for key in slot.wanted_keys(record, pk):
                if slot.bound.unique:
                    if key in ops.claims:  # wanted by another record of this batch
                        raise writer.taken(slot, key, cast("Put", ops.by_key[key]).value.decode())
                    ops.claim(key, slot, value, None, self._orphans.get(key, ABSENT))
                else:
                    ops.by_key[key] = Put(key, value)

    def _answer(self, message: Message, call_id: str) -> None:
        """Join a tool message with the latest earlier call of its id that waits, if there is one."""
        waiting = self._draft.asked(call_id, message.number)
        if waiting is None:
            return
        pk = self._call_pk(waiting[1], waiting[2])
        held = self._calls.get(pk) or self._waiting.get(pk)
        if held is None:  # damaged: nothing to join with
            self._draft.forget(waiting)
            return
        done = answered(held[1], message)
        self._draft.count(held[1], done)
        self._calls[pk] = held[0], done

    async def _edit(self, item: Edit) -> Message | None:
        writer, known = await self._using(self._all.messages)
        pk = f"{self._part}!{keys.encode(item.number)}"
        [entry] = await self._store._entries([self._all.message_prefix + pk])
        if entry is None or writer._codec.decode(entry.key, entry.value).id != item.id:
            return None
        changed = edited(item.fn, writer._codec, entry)
        self._puts.append(Put(entry.key, writer.encoded(entry.key, changed, entry, known), entry.version))
        await writer.index_ops(self._ops, known, pk, entry, changed, None, self._orphans)
        self._draft.touch(self._all.now())
        return changed

    async def _remove(self, item: Remove) -> Rewritten:
        every = self._all
        found = await doomed(every, self._part, self._session_id, item, self._parent.stat.last)
        again = item.places is None and len(found) >= item.most
        behind: int | None = None
        if item.places is None:
            behind = found[-1][1].number if again else item.after + 1 if item.after else 0
        gone = await self._take_out(found, behind)
        if found or gone:
            self._draft.touch(every.now())
        return Rewritten(len(found), again=again)

    async def _take_out(self, removed: Sequence[StoredMessage], behind: int | None = None) -> list[StoredCall]:
        """Remove messages and what follows from that; return the calls that went with them."""
        every = self._all
        gone, waiting = await followers(every, self._part, removed, behind)
        writer, known = await self._using(every.messages)
        for entry, message in removed:
            await writer.index_ops(self._ops, known, entry.key[len(every.message_prefix) :], entry, None, None, {})
            self._puts.append(writer.deletion(entry))
            self._draft.remove(message)
        if gone or waiting:
            await self._drop_calls(gone)
            now = every.now()
            for entry, call in waiting:
                asked = unanswered(call, now)
                self._calls[entry.key[len(every.call_prefix) :]] = entry, asked
                self._draft.count(call, asked)
        return gone

    async def _drop_calls(self, gone: Sequence[StoredCall]) -> None:
        every = self._all
        writer, known = await self._using(every.tool_calls)
        for entry, call in gone:
            await writer.index_ops(self._ops, known, entry.key[len(every.call_prefix) :], entry, None, None, {})
            self._puts.append(writer.deletion(entry))
            self._draft.count(call, None)

    async def _replace(self, item: Replace) -> Rewritten:
        every = self._all
        plan = await planned(every, self._part, item)
        if not (plan.remove or plan.edit or plan.append):
            return Rewritten(0, plan.stands, plan.again)
        gone = await self._take_out(plan.remove)
        writer, known = await self._using(every.messages)
        for entry, changed in plan.edit:
            self._puts.append(Put(entry.key, writer.encoded(entry.key, changed, entry, known), entry.version))
            pk = entry.key[len(every.message_prefix) :]
            await writer.index_ops(self._ops, known, pk, entry, changed, None, self._orphans)
        if plan.append:
            await self._read_waiting(plan.append)
            by_number: dict[int, list[ToolCall]] = {}
            for _, call in gone:
                by_number.setdefault(call.number, []).append(call)
            moved = {message.id: by_number.get(message.number, []) for _, message in plan.remove}
            await self._turn(plan.append, moved)
        self._draft.touch(every.now())
        return Rewritten(len(plan.remove), [*plan.stands, *plan.append], plan.again)

    def _carried(
        self,
        messages: Sequence[Message],
        made: Sequence[tuple[str, ToolCall]],
        moved: Mapping[str, Sequence[ToolCall]],
    ) -> list[tuple[str, ToolCall]]:
        """Give new calls what is known of those they were, and bring along calls that were recorded beside them."""
        fresh = iter(made)
        calls: list[tuple[str, ToolCall]] = []
        for message in messages:
            old = {call.position: call for call in moved.get(message.id, ())}
            for pk, call in islice(fresh, len(message.tool_calls or ())):
                calls.append((pk, carried(call, old.get(call.position))))
            for call in _recorded(message, moved.get(message.id, ())):
                pk = self._call_pk(message.number, call.position)
                calls.append((pk, carried(msgspec.structs.replace(call, number=message.number), call)))
        return calls

    async def _replace_calls(self, item: ReplaceCalls) -> Rewritten:
        every = self._all
        plan = await planned_calls(every, self._part, item)
        await self._drop_calls(plan.remove)
        for entry, call in plan.put:
            pk = self._call_pk(call.number, call.position)
            every.tool_calls._codec.encode(pk, call)  # what cannot be kept fails here
            self._calls[pk] = entry, call
            before = None if entry is None else every.tool_calls._codec.decode(entry.key, entry.value)
            self._draft.count(before, call)
            self._draft.leave_off(call.number)
        if plan.remove or plan.put:
            self._draft.touch(item.at or every.now())
        return Rewritten(len(plan.remove), again=plan.again)

    async def _begin(self, call: ToolCall, place: tuple[int, int] | None) -> ToolCall:
        every = self._all
        call.number, call.position = self._draft.last, 0
        async for entry in every.calls_of(self._part, call.number, call.number):
            call.position = keys.decode(entry.key.rpartition("!")[2], int) + 1
        pk = self._call_pk(call.number, call.position)
        if place is not None and place != (call.number, call.position):
            raise Conflict(every.call_prefix + pk, ABSENT)
        every.tool_calls._codec.encode(pk, call)  # what cannot be kept fails here
        self._calls[pk] = None, call
        self._draft.count(None, call)
        self._draft.touch(call.created_at)
        return call

    async def _edit_call(self, item: EditCall) -> ToolCall | None:
        every = self._all
        pk = self._call_pk(item.number, item.position)
        [entry] = await self._store._entries([every.call_prefix + pk])
        if entry is None:
            return None
        codec, now = every.tool_calls._codec, every.now()
        changed = edited_call(item, codec, entry, now)
        self._calls[pk] = entry, changed
        self._draft.count(codec.decode(entry.key, entry.value), changed)
        self._draft.touch(now)
        return changed

    async def _edit_session(self, item: EditSession) -> Session:
        every = self._all
        writer, known = await self._using(every.sessions)
        [entry] = await self._store._entries([every.session_prefix + self._part])
        if entry is None:
            raise ParentGone("session", self._session_id)
        changed = edited_session(item.fn, writer._codec, entry, self._draft, every.now())
        checks = await every.checks(changed, writer._codec.decode(entry.key, entry.value))
        self._checks.update({check.key: check for check in checks})
        stored = msgspec.structs.replace(changed, updated_at=None)
        self._puts.append(Put(entry.key, writer.encoded(entry.key, stored, entry, known), entry.version))
        await writer.index_ops(self._ops, known, self._part, entry, stored, None, self._orphans)
        return changed

    async def _kill(self, item: Kill) -> bool:
        every, parent = self._all, self._parent
        if item.before is not None and parent.stat.updated_at >= item.before:
            return False
        if item.guard is not None:
            self._checks[item.guard.key] = item.guard
            self._claims[item.guard.key] = 0  # it shares no round with others
        writer, known = await self._using(every.sessions)
        [entry] = await self._store._entries([every.session_prefix + self._part])
        if item.closed and entry is not None and writer._codec.decode(entry.key, entry.value).active:
            return False
        if entry is not None:
            try:
                await writer.index_ops(self._ops, known, self._part, entry, None, None, {})
            except CorruptRecord:  # its index entries are found by what they point at
                self._ops.by_key.update((await writer.entries_of(known, self._part)).by_key)
            self._puts.append(writer.deletion(entry))
        self._puts.append(Delete(parent.birth.key, cast("bytes", parent.birth.expect)))
        self._puts.append(Put(every.deleting_prefix + self._part, b"1"))
        if parent.version:
            self._puts.append(Delete(every.stat_prefix + self._part, parent.version))
        if parent.stat.indexed_at is not None:
            self._puts.append(Delete(every.updated_key(self._part, parent.stat.indexed_at)))
        self._dead = True
        return True

    # ---- shared

    async def _using(self, repository: Repository[R]) -> tuple[AtomicWriter[R], Known]:
        """Return how the records of a collection are written; the batch checks its definition from now on."""
        known = repository._definitions.cached or await repository._definitions.known()
        self._checks[known.check.key] = known.check
        return atomic_writer(repository), known

    def _call_pk(self, number: int, position: int) -> str:
        return f"{self._part}!{keys.encode(number)}!{keys.encode(position)}"


def _recorded(message: Message, calls: Sequence[ToolCall]) -> list[ToolCall]:
    """Those of a message's calls that it does not ask for."""
    asked = len(message.tool_calls or ())
    return [call for call in calls if call.position >= asked]
