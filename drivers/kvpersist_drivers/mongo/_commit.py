"""Ordered batches by means of single documents that are replaced whole.

A commit goes in waves. Each batch that need not wait for an earlier one with a key in common adds its
next operation to the wave, or several where that keeps their order; a wave is at most one insert, one
update and one delete command, whatever the number of batches, and one insert more for each batch that adds
several keys. So a thousand batches of one key are one command, and a batch of k operations is at most k.

Of a command with many conditional replacements the server tells how many were made, not which. Where
they are fewer than asked for, reading the versions back tells: each was made under a version nobody
else has. If fewer are found than were made, somebody has replaced some of them since, and those that
are not found are `CommitUnknown`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from enum import Enum, auto
from typing import Any, Final, NamedTuple

from pymongo import DeleteOne, ReplaceOne

from kvpersist.driver import ABSENT, Batch, Check, Committed, Delete, Expect, Op, Put, milliseconds
from kvpersist.errors import (
    BadKey,
    BadRequest,
    CommitUnknown,
    Conflict,
    KeyTooLong,
    KvError,
    Unavailable,
    ValueTooLarge,
)
from kvpersist_drivers.mongo._entries import MAX_KEY_BYTES, MAX_VALUE_BYTES, Entries, document, moment
from kvpersist_drivers.mongo._turns import Turns

__all__ = ["Commit"]

_ATTEMPTS: Final = 20  # at a key that others keep inserting and deleting


class _Act(Enum):
    CHECK = auto()
    INSERT = auto()
    SET = auto()
    SWAP = auto()
    REMOVE = auto()
    REMOVE_IF = auto()


class _Run:
    """A batch on its way: the first ``at`` of its operations took effect."""

    __slots__ = ("at", "attempts", "batch", "place")

    def __init__(self, place: int, batch: Batch) -> None:
        self.place, self.batch = place, batch
        self.at = self.attempts = 0


class _Step(NamedTuple):
    run: _Run
    op: Any  # of the class that the act implies


class Commit:
    """One commit call; ``now`` judges expiry for all of it."""

    def __init__(self, entries: Entries, batches: Sequence[Batch], now: float, turns: Turns | None) -> None:
        self._entries = entries
        self._now, self._moment = now, moment(milliseconds(now))
        self._turns = turns
        self._answers: list[Committed | KvError] = [_refusal(batch) or Committed(batch.version) for batch in batches]
        self._left = {
            place: _Run(place, batch)
            for place, batch in enumerate(batches)
            if batch.ops and type(self._answers[place]) is Committed
        }
        self._known: dict[str, Expect] = {}  # what was at a key during this call, after the last write of ours
        self._expired: dict[str, bytes] = {}  # the versions stored at keys that count as absent
        self._sent: Sequence[_Step] = ()  # of the command under way

    async def run(self) -> list[Committed | KvError]:
        """Apply the batches; return their outcomes.

        Raises:
            KvError: nothing was done, for this reason.
        """
        try:
            while self._left:
                await self._wave()
        except KvError as error:
            if error.outcome == "unknown":
                if self._turns is not None:
                    self._turns.unsettled()
            elif len(self._left) == len(self._answers) and not any(run.at for run in self._left.values()):
                raise
            sent = {step.run.place for step in self._sent}
            for place, run in self._left.items():
                self._answers[place] = _lost(run, error, place in sent)
        return self._answers

    async def _wave(self) -> None:
        wave: dict[_Act, list[_Step]] = {}
        waiting: set[str] = set()  # keys of batches that come first
        for run in list(self._left.values()):
            keys = [op.key for op in run.batch.ops[run.at :]]
            if waiting.isdisjoint(keys):
                self._take(run, wave)
            if run.place in self._left:
                waiting.update(keys)
        self._check(wave.get(_Act.CHECK, ()), await self._look(wave.get(_Act.CHECK, ())))
        await self._insert(wave.get(_Act.INSERT, ()))
        await self._replace(wave.get(_Act.SET, ()), wave.get(_Act.SWAP, ()))
        await self._remove(wave.get(_Act.REMOVE, ()))
        await self._remove_if(wave.get(_Act.REMOVE_IF, ()))

    def _take(self, run: _Run, wave: dict[_Act, list[_Step]]) -> None:
        """Add to the wave what can be done of ``run`` without knowing how anything else ends.

        Checks go together, and so do puts and deletes that cannot fail, and puts of what must not be there;
        after puts that cannot fail one conditional put, as one command does them in their order.
        """
        first: _Act | None = None
        for op in run.batch.ops[run.at :]:
            act = self._act(op)
            if first is not None and act is not first:
                if first is _Act.SET and act is _Act.SWAP and self._turns is None and not self._foreseen(run, op):
                    wave.setdefault(act, []).append(_Step(run, op))
                return
            if self._foreseen(run, op):
                if first is None:
                    self._fail(run, op, self._known[op.key])
                return
            wave.setdefault(act, []).append(_Step(run, op))
            first = act
            if act in (_Act.SWAP, _Act.REMOVE_IF):
                return

    def _act(self, op: Op) -> _Act:
        expect = op.expect
        if type(op) is Check:
            return _Act.CHECK
        if type(op) is Delete or (type(op) is Put and op.expires_at is not None and op.expires_at <= self._now):
            return _Act.REMOVE if expect is None else _Act.CHECK if expect is ABSENT else _Act.REMOVE_IF
        if expect is ABSENT:
            return _Act.SWAP if op.key in self._expired else _Act.INSERT
        return _Act.SET if expect is None else _Act.SWAP

    def _foreseen(self, run: _Run, op: Op) -> bool:
        """Whether it will fail: versions do not come back, so what differed once during this call still does."""
        return op.expect is not None and op.key in self._known and self._known[op.key] != op.expect

    # ---- the commands of a wave

    async def _look(self, steps: Iterable[_Step]) -> dict[str, Expect]:
        """Return what is at the keys of ``steps`` now."""
        keys = list(dict.fromkeys(step.op.key for step in steps))
        if not keys:
            return {}
        found = await self._entries.versions(keys, self._moment)
        for key in keys:
            self._expired.pop(key, None)
            if key in found and found[key][0] is ABSENT:
                self._expired[key] = found[key][1]
        return {key: found[key][0] if key in found else ABSENT for key in keys}

    def _check(self, steps: Sequence[_Step], found: dict[str, Expect]) -> None:
        failed: set[int] = set()
        for run, op in steps:
            if run.place in failed:
                continue
            if found[op.key] == op.expect:
                self._did(run, op, found[op.key])
            else:
                failed.add(run.place)
                self._fail(run, op, found[op.key])

    async def _insert(self, steps: Sequence[_Step]) -> None:
        """One command; one for each batch with several, which ends where one of them fails."""
        own: dict[int, list[_Step]] = {}
        for step in steps:
            own.setdefault(step.run.place, []).append(step)
        for several in (of_one for of_one in own.values() if len(of_one) > 1):
            await self._insert_together(several, ordered=True)
        single = [of_one[0] for of_one in own.values() if len(of_one) == 1]
        if single:
            await self._insert_together(single, ordered=False)

    async def _insert_together(self, steps: Sequence[_Step], *, ordered: bool) -> None:
        self._sent = steps
        failed = await self._entries.insert([document(op, run.batch.version) for run, op in steps], ordered=ordered)
        self._sent = ()
        taken: list[_Step] = []
        for position, (run, op) in enumerate(steps):
            if position not in failed:
                self._did(run, op, run.batch.version)
            elif (error := failed[position]) is not None:
                self._end(run, error)
            else:
                taken.append(steps[position])
            if ordered and position in failed:
                break
        found = await self._look(taken)
        for run, op in taken:
            if found[op.key] is ABSENT:  # expired, or deleted meanwhile
                self._again(run)
            else:
                self._fail(run, op, found[op.key])

    async def _replace(self, sets: Sequence[_Step], swaps: Sequence[_Step]) -> None:
        if self._turns is not None and swaps:
            swaps = await self._still(swaps)
        steps = [*sets, *swaps]
        if not steps:
            return
        ordered = len({step.run.place for step in steps}) < len(steps)
        if ordered and swaps:
            steps.sort(key=lambda step: step.run.place)  # stable: a batch's own order is kept
        self._sent = steps
        made, failed = await self._entries.replace([self._request(*step) for step in steps], ordered=ordered)
        self._sent = ()
        end = min(failed, default=len(steps)) if ordered else len(steps)  # from there on nothing was tried
        tried = [step for position, step in enumerate(steps[:end]) if position not in failed]
        asked = [step for step in tried if step.op.expect is not None]
        for run, op in tried:
            if op.expect is None:
                self._did(run, op, run.batch.version)
                made -= 1
        for position, error in failed.items():
            run = steps[position].run
            self._again(run) if error is None else self._end(run, error)
        found = {} if made == len(asked) else await self._look_back(asked, made)
        mine = made if not found else sum(found[step.op.key] == step.run.batch.version for step in asked)
        for run, op in asked:
            if not found or found[op.key] == run.batch.version:
                self._expired.pop(op.key, None)
                self._did(run, op, run.batch.version)
            elif mine < made:
                self._end(run, CommitUnknown(_keys(run), "somebody wrote the same keys at the same time"))
            elif found[op.key] == op.expect:  # expired when we wrote, or deleted meanwhile
                self._again(run)
            else:
                self._fail(run, op, found[op.key])

    async def _look_back(self, asked: Sequence[_Step], made: int) -> dict[str, Expect]:
        try:
            return await self._look(asked)
        except KvError as error:
            if not made:
                raise
            self._sent = asked
            raise CommitUnknown((), f"some of it was written: {error}") from error

    def _request(self, run: _Run, op: Put) -> ReplaceOne[dict[str, Any]]:
        stored = document(op, run.batch.version)
        if op.expect is None or self._turns is not None:
            return ReplaceOne({"_id": op.key}, stored, upsert=True)
        if op.expect is ABSENT:
            return ReplaceOne({"_id": op.key, "r": self._expired[op.key]}, stored)
        return ReplaceOne(self._condition(op), stored)

    def _condition(self, op: Put | Delete) -> dict[str, Any]:
        if self._turns is not None:  # it was looked at, and nobody else writes
            return {"_id": op.key}
        return {"_id": op.key, "r": op.expect, "e": {"$not": {"$lte": self._moment}}}

    async def _still(self, steps: Sequence[_Step]) -> list[_Step]:
        """Fail those of ``steps`` whose key is not as expected, and return the others."""
        found = await self._look(steps)
        for run, op in steps:
            if found[op.key] != op.expect:
                self._fail(run, op, found[op.key])
        return [step for step in steps if found[step.op.key] == step.op.expect]

    async def _remove(self, steps: Sequence[_Step]) -> None:
        if not steps:
            return
        self._sent = steps
        ordered = len({step.run.place for step in steps}) < len(steps)
        await self._entries.delete([DeleteOne({"_id": step.op.key}) for step in steps], ordered=ordered)
        self._sent = ()
        for run, op in steps:
            self._did(run, op, ABSENT)

    async def _remove_if(self, steps: Sequence[_Step]) -> None:
        """Look first where there are several: what was deleted cannot be told from what never was."""
        if len(steps) > 1 or (steps and self._turns is not None):
            steps = await self._still(steps)
        if not steps:
            return
        self._sent = steps
        deleted = await self._entries.delete([DeleteOne(self._condition(op)) for _, op in steps], ordered=False)
        self._sent = ()
        found = {} if deleted or len(steps) > 1 else await self._look(steps)
        for run, op in steps:
            if deleted == len(steps):
                self._did(run, op, ABSENT)
            elif len(steps) == 1:
                self._fail(run, op, found[op.key])
            else:
                self._end(run, CommitUnknown(_keys(run), "somebody wrote the same keys at the same time"))

    # ---- what became of it

    def _did(self, run: _Run, op: Op, now: Expect) -> None:
        self._known[op.key] = now
        run.at += 1
        if run.at == len(run.batch.ops):
            del self._left[run.place]

    def _fail(self, run: _Run, op: Op, found: Expect) -> None:
        self._known[op.key] = found
        self._end(run, Conflict(op.key, op.expect, found, run.at))

    def _end(self, run: _Run, error: KvError) -> None:
        del self._left[run.place]
        if run.at and not isinstance(error, Conflict | CommitUnknown):
            error = CommitUnknown(_keys(run), f"it was applied in part: {error}")
        self._answers[run.place] = error

    def _again(self, run: _Run) -> None:
        run.attempts += 1
        if run.attempts > _ATTEMPTS:
            self._end(run, Unavailable("others keep inserting and deleting the same key; try again"))


def _refusal(batch: Batch) -> KvError | None:
    """Why ``batch`` cannot be written at all, None if it can."""
    for op in batch.ops:
        key = op.key
        try:
            size = len(key) if key.isascii() else len(key.encode())
        except UnicodeEncodeError:
            return BadKey(key, "no UTF-8 text: it holds a lone surrogate")
        if size > MAX_KEY_BYTES:
            return KeyTooLong(key, size, MAX_KEY_BYTES)
        if type(op) is Put:
            if len(op.value) > MAX_VALUE_BYTES:
                return ValueTooLarge(key, len(op.value), MAX_VALUE_BYTES)
            if op.expires_at is not None and op.expires_at != op.expires_at:
                return BadRequest("an expiry is a number of seconds since 1970, not NaN")
        if type(op.expect) is bytes and len(op.expect) != 8:
            return BadRequest(f"the version expected at {key!r} has {len(op.expect)} bytes instead of 8")
    return None


def _keys(run: _Run) -> tuple[str, ...]:
    return tuple(op.key for op in run.batch.ops if type(op) is not Check)


def _lost(run: _Run, error: KvError, sent: bool) -> KvError:
    """The outcome of a batch that was not finished, since ``error`` came first."""
    if isinstance(error, CommitUnknown):
        if sent or run.at:
            return CommitUnknown(_keys(run), error.reason)
        return Unavailable(f"not tried: {error.reason}")
    return CommitUnknown(_keys(run), f"it was applied in part: {error}") if run.at else error
