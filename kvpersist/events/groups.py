"""Groups: consumers that share a topic, each event going to one of them.

The state of a group is one small record, ``ns:event_group:<topic>!<name>``: up to where events were
handed out, and which of those are not acknowledged. Every change is a compare-and-set of it; those of
one process share a batch. An event that failed too often is kept whole below
``ns:event_parked:<topic>!<name>!``, where retention does not reach it.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, Final, NamedTuple

import msgspec

from kvpersist import codec, keys
from kvpersist.changes import Scope
from kvpersist.codec import RecordCodec
from kvpersist.driver import ABSENT, Delete, Entry, Expect, Op, Put
from kvpersist.errors import BadCursor, BadRequest, KvError
from kvpersist.events._log import TopicLog, checked, entry_of, expired, moment
from kvpersist.events.records import After, Claimed, GroupStats, Parked, number_of
from kvpersist.events.subscription import OnExpired
from kvpersist.funnel import Built, Funnel
from kvpersist.log import LogState
from kvpersist.store import Store

__all__ = ["EventGroup", "needed_by"]

_SECOND: Final = 1_000_000  # microseconds
_LOOK: Final = 1.0  # seconds after which a waiting member looks for what others released
_REASON: Final = 200  # characters kept of why an event was released


class _Claim(msgspec.Struct, frozen=True, array_like=True):
    """An event handed out. ``deadline`` in microseconds since 1970, 0: free; ``parked``: taken from there."""

    number: int
    consumer: str
    deadline: int
    attempts: int
    reason: str = ""
    parked: bool = False


class _Group(msgspec.Struct, frozen=True):
    """The stored form. ``cursor``: the last number that was handed out; ``claims`` in the order of numbers."""

    cursor: int = 0
    claims: list[_Claim] = []


class _Take(NamedTuple):
    consumer: str
    n: int


class _Settle(NamedTuple):
    """Change one claim; ``attempts`` and ``consumer`` tell whether it is still the one that was handed out."""

    number: int
    attempts: int
    consumer: str
    act: str  # ack, release, extend, park
    seconds: float = 0.0
    reason: str = ""


class _Return(NamedTuple):
    """Give events back as if they had not been handed out, and drop ``lost`` ones, which are there no more."""

    numbers: tuple[int, ...]
    lost: tuple[int, ...]


class _Revive(NamedTuple):
    """Hand a parked event out again, or with ``discard`` remove it."""

    number: int
    discard: bool


class _Taken(NamedTuple):
    claims: list[_Claim]
    lost: list[int]  # numbers of events that were to be parked and are there no more
    due: int | None  # when the next claim runs out, microseconds since 1970


_codec = RecordCodec(_Group)  # reads both formats


class EventGroup:
    """Consumers that share the events of one topic. Made by `EventQueue.group`.

    An event is handed to one member, and to another when that one neither acknowledges nor extends it
    before its deadline, by the clock of whoever looks: at least once, then. Members in different
    processes need clocks that agree to well below the deadline. Events are handed out in order; what is
    handed out again comes before what is new.
    """

    def __init__(
        self,
        store: Store,
        log: TopicLog,
        namespace: str,
        topic: str,
        name: str,
        *,
        begin: Callable[[], None],
        after: After,
        deadline: float,
        max_attempts: int,
        in_flight: int,
        on_expired: OnExpired,
    ) -> None:
        self.topic = topic
        self.name = name
        self._store = store
        self._log = log
        self._begin = begin
        self._after = after
        self._deadline = int(deadline * _SECOND)
        self._max_attempts = max_attempts
        self._in_flight = in_flight
        self._skips = on_expired == "skip"
        space, part = keys.namespace(namespace), f"{keys.encode(topic)}!{keys.encode(name)}"
        self._key = keys.record_prefix(space, "event_group") + part
        self._parked = f"{keys.record_prefix(space, 'event_parked')}{part}!"
        self._codec = RecordCodec(_Group, codec=store.codec)
        self._funnel: Funnel[None, Any, Any] = Funnel(store, _nothing, self._build, what="change a group")

    async def claim(self, consumer: str, n: int = 1) -> list[Claimed]:
        """Take up to ``n`` events for ``consumer``: first those whose deadline passed, then new ones.

        Raises:
            EventsExpired: retention removed events that were not acknowledged, unless ``on_expired="skip"``.
        """
        return (await self._claim(consumer, n))[0]

    async def ack(self, claimed: Claimed) -> bool:
        """The event is done; False where it was handed to another meanwhile, or acknowledged."""
        return await self._settle(claimed, "ack")

    async def release(self, claimed: Claimed, *, delay: float = 0.0, reason: str = "") -> bool:
        """Let the event be handed out again, after ``delay`` seconds; False as for `ack`.

        Args:
            reason: is kept with the event if this was its last attempt.
        """
        return await self._settle(claimed, "release", delay, reason)

    async def extend(self, claimed: Claimed, seconds: float | None = None) -> bool:
        """Put the deadline off to ``seconds`` from now (None: the group's); False as for `ack`."""
        return await self._settle(claimed, "extend", self._deadline / _SECOND if seconds is None else seconds)

    async def park(self, claimed: Claimed, *, reason: str = "") -> bool:
        """Give the event up at once, without further attempts; False as for `ack`."""
        return await self._settle(claimed, "park", 0.0, reason)

    async def consume(self, consumer: str, n: int = 1) -> AsyncIterator[Claimed]:
        """Yield events as they come, taking ``n`` at a time, until the queue is closed.

        Each is the consumer's to `ack`, `release` or `extend`; one that is not is handed out again.
        """
        waker = self._store._waker(Scope(self._log.wake_prefix(self.topic), (self._key,)))
        try:
            while True:
                claimed, due = await self._claim(consumer, n)
                for one in claimed:
                    yield one
                if not claimed:
                    seconds = _LOOK if due is None else due / _SECOND - self._store.clock()
                    await waker.wait(max(0.0, min(_LOOK, seconds)))
        finally:
            waker.close()

    async def parked(self, limit: int = 100, after: str | None = None) -> list[Parked]:
        """The events that were given up, by position, those behind ``after``."""
        number = 0 if after is None else _number(after)
        _, group, _ = await self._read()
        being_retried = {claim.number for claim in group.claims if claim.parked}
        start, end = self._parked + keys.encode(number + 1), keys.prefix_end(self._parked)
        found = await self._store._scan(start, end, limit=limit + len(being_retried))
        parked = [self._parked_of(entry.key, entry.value) for entry in found]
        return [one for one in parked if number_of(one.entry.position) not in being_retried][:limit]

    async def retry(self, position: str) -> bool:
        """Hand a parked event out again, its attempts counted anew; False where it is not parked."""
        return await self._funnel.submit(self._key, _Revive(_number(position), discard=False))

    async def discard(self, position: str) -> bool:
        """Remove a parked event; False where it is not parked."""
        return await self._funnel.submit(self._key, _Revive(_number(position), discard=True))

    async def stats(self) -> GroupStats:
        """How many events wait, are handed out, and expired before they were: a few reads."""
        log, group, _ = await self._read()
        waiting = log.last - max(group.cursor, log.first - 1)
        return GroupStats(max(0, waiting), len(group.claims), max(0, log.first - 1 - group.cursor))

    async def _settle(self, claimed: Claimed, act: str, seconds: float = 0.0, reason: str = "") -> bool:
        number = _number(claimed.entry.position)
        change = _Settle(number, claimed.attempts, claimed.consumer, act, seconds, reason[:_REASON])
        return await self._funnel.submit(self._key, change)

    async def _claim(self, consumer: str, n: int) -> tuple[list[Claimed], int | None]:
        self._begin()
        if n < 1:
            raise BadRequest(f"n={n}: claim at least one event")
        checked(consumer, "consumer")
        while True:
            taken: _Taken = await self._funnel.submit(self._key, _Take(consumer, n))
            items = await self._items(taken.claims)
            there = [claim for claim in taken.claims if items[claim.number] is not None]
            lost = [claim.number for claim in taken.claims if items[claim.number] is None] + taken.lost
            if lost:
                back = () if self._skips else tuple(claim.number for claim in there)
                await self._funnel.submit(self._key, _Return(back, tuple(lost)))
                if not self._skips:
                    raise expired(self.topic, min(lost) - 1, (await self._log.state(self.topic)).first)
                if not there:
                    continue
            return [self._claimed(claim, items[claim.number] or {}) for claim in there], taken.due

    async def _items(self, claims: Sequence[_Claim]) -> dict[int, dict[str, Any] | None]:
        """The events of some claims, as the log has them or, once parked, as they were kept."""
        numbers = [claim.number for claim in claims]
        items = dict(zip(numbers, await self._log.many(self.topic, numbers), strict=True))
        missing = [claim.number for claim in claims if claim.parked and items[claim.number] is None]
        kept = await self._store._entries([self._parked + keys.encode(number) for number in missing])
        for number, entry in zip(missing, kept, strict=True):
            items[number] = None if entry is None else codec.decode_plain(entry.key, entry.value)["item"]
        return items

    def _claimed(self, claim: _Claim, item: dict[str, Any]) -> Claimed:
        entry = entry_of(self.topic, claim.number, item)
        return Claimed(entry, claim.consumer, claim.attempts, moment(claim.deadline))

    def _parked_of(self, key: str, value: bytes) -> Parked:
        kept = codec.decode_plain(key, value)
        number = keys.decode(key[len(self._parked) :], int)
        return Parked(entry_of(self.topic, number, kept["item"]), kept["attempts"], kept["reason"], moment(kept["at"]))

    async def _read(self) -> tuple[LogState, _Group, Expect]:
        log, [entry] = await self._log.beside(self.topic, [self._key])
        if entry is None:
            return log, _Group(await self._log.place(self.topic, self._after)), ABSENT
        return log, self._codec.decode(self._key, entry.value), entry.version

    async def _build(self, key: str, _: None, asked: list[Any]) -> Built[None, Any]:
        log, before, expect = await self._read()  # always anew: what another process took may have run out since
        draft = _Draft(self, before, log, int(self._store.clock() * _SECOND))
        results: list[Any | KvError] = []
        for one in asked:
            try:
                if type(one) is _Take:
                    results.append(await draft.take(one))
                elif type(one) is _Settle:
                    results.append(await draft.settle(one))
                elif type(one) is _Revive:
                    results.append(await draft.revive(one))
                else:
                    results.append(draft.give_back(one))
            except KvError as error:
                results.append(error)
        ops: list[Op] = [*draft.parked.values()]
        after = draft.group()
        if after != before or expect is ABSENT:
            ops.append(Put(key, self._codec.encode(key, after), expect))
        ops += draft.gone.values()
        return Built(ops, _forgotten, results)


class _Draft:
    """A group's state in the making."""

    def __init__(self, group: EventGroup, state: _Group, log: LogState, now: int) -> None:
        self._group = group
        self._log = log
        self._now = now
        self._cursor = state.cursor
        self._claims = {claim.number: claim for claim in state.claims}
        self.parked: dict[int, Put] = {}
        self.gone: dict[int, Delete] = {}

    def group(self) -> _Group:
        return _Group(self._cursor, [self._claims[number] for number in sorted(self._claims)])

    async def take(self, asked: _Take) -> _Taken:
        group, now = self._group, self._now
        taken: list[_Claim] = []
        lost: list[int] = []
        for claim in [self._claims[number] for number in sorted(self._claims)]:
            if claim.deadline > now or len(taken) == asked.n:
                continue
            if claim.attempts >= group._max_attempts:
                if not await self._park(claim, claim.reason):
                    lost.append(claim.number)
            else:
                taken.append(self._hand_out(claim.number, asked.consumer, claim))
        if self._cursor + 1 < self._log.first and len(taken) < asked.n:
            if not (group._skips or taken or lost):
                raise expired(group.topic, self._cursor, self._log.first)
            if group._skips:
                self._cursor = self._log.first - 1
        while (
            len(taken) < asked.n
            and self._log.first - 1 <= self._cursor < self._log.last
            and len(self._claims) < group._in_flight
        ):
            self._cursor += 1
            taken.append(self._hand_out(self._cursor, asked.consumer, None))
        due = [claim.deadline for claim in self._claims.values()]
        return _Taken(taken, lost, min(due) if due else None)

    async def settle(self, asked: _Settle) -> bool:
        claim = self._claims.get(asked.number)
        if claim is None or (claim.attempts, claim.consumer) != (asked.attempts, asked.consumer):
            return False
        if asked.act == "ack":
            self._drop(claim)
        elif asked.act == "park":
            if not await self._park(claim, asked.reason):
                raise expired(self._group.topic, claim.number - 1, self._log.first)
        elif asked.act == "extend":
            deadline = self._now + int(asked.seconds * _SECOND)
            self._claims[claim.number] = msgspec.structs.replace(claim, deadline=deadline)
        else:
            free = self._now + int(asked.seconds * _SECOND) if asked.seconds > 0 else 0
            self._claims[claim.number] = msgspec.structs.replace(claim, consumer="", deadline=free, reason=asked.reason)
        return True

    async def revive(self, asked: _Revive) -> bool:
        group = self._group
        key = group._parked + keys.encode(asked.number)
        [entry] = await group._store._entries([key])
        claim = self._claims.get(asked.number)
        if entry is None or (claim is not None and not asked.discard):
            return False
        if asked.discard:
            self.gone[asked.number] = Delete(key)
            if claim is not None:
                del self._claims[asked.number]
        else:
            self._claims[asked.number] = _Claim(asked.number, "", 0, 0, "", True)
        return True

    def give_back(self, asked: _Return) -> None:
        for number in asked.lost:
            self._claims.pop(number, None)
        for number in asked.numbers:
            claim = self._claims.get(number)
            if claim is not None:
                self._claims[number] = msgspec.structs.replace(
                    claim, consumer="", deadline=0, attempts=claim.attempts - 1
                )

    def _hand_out(self, number: int, consumer: str, before: _Claim | None) -> _Claim:
        deadline = self._now + self._group._deadline
        claim = (
            _Claim(number, consumer, deadline, 1)
            if before is None
            else msgspec.structs.replace(before, consumer=consumer, deadline=deadline, attempts=before.attempts + 1)
        )
        self._claims[number] = claim
        return claim

    async def _park(self, claim: _Claim, reason: str) -> bool:
        """Keep the event itself, as retention may remove it from the topic; False: it has done so."""
        group = self._group
        item = (await group._items([claim]))[claim.number]
        if item is None:
            return False
        key = group._parked + keys.encode(claim.number)
        kept = {"item": item, "attempts": claim.attempts, "reason": reason or claim.reason, "at": self._now}
        self.parked[claim.number] = Put(key, codec.encode_plain(key, kept, group._store.codec))
        del self._claims[claim.number]
        return True

    def _drop(self, claim: _Claim) -> None:
        del self._claims[claim.number]
        if claim.parked:
            self.gone[claim.number] = Delete(self._group._parked + keys.encode(claim.number))


def needed_by(entry: Entry) -> int:
    """The first number that the group whose state this is has not acknowledged, parked events aside."""
    group = _codec.decode(entry.key, entry.value)
    return min((claim.number for claim in group.claims if not claim.parked), default=group.cursor + 1)


async def _nothing(_: str) -> None:
    return None


def _forgotten(_: bytes) -> None:
    return None


def _number(position: Any) -> int:
    number = number_of(position)
    if number is None:
        raise BadCursor(str(position))
    return number
