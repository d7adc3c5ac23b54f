"""A driver that fails, waits or dies where a test says, and that claims less than it could.

    driver = FaultyDriver(MemoryDriver())
    fault = driver.fail("commit", 3, effect=True)   # the third commit from now: done, but its answer is lost
    gate = driver.hold("get")                       # the next get waits until gate.release()
    driver.crash(5)                                 # the process "dies" before the fifth write from now
    bucket = FaultyDriver(MemoryDriver(), without={"atomic_batch"})   # batches run op by op, in their order

A test that must survive a fault anywhere counts: fail the 1st call, then the 2nd, and so on, until
``fault.fired`` stays 0.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Collection, Sequence
from typing import Any, Final, Literal, Self, TypeAlias, TypeVar

import msgspec

from kvpersist.driver import (
    BacksUp,
    Batch,
    Capabilities,
    Clock,
    Committed,
    Compacts,
    Delete,
    Driver,
    Entry,
    Expect,
    HasClock,
    Pings,
    Put,
    Streams,
    UsesClock,
    Watches,
)
from kvpersist.errors import CommitUnknown, Conflict, KvError, Unavailable, Unsupported

__all__ = ["Crashed", "Fault", "FaultyDriver", "Gate", "Operation"]

Operation: TypeAlias = Literal["get", "commit", "scan", "step"]
"""What is counted: calls, or the steps inside commits: one batch, or one operation of an ordered batch."""

_DROPPABLE: Final = {
    "atomic_batch": "none",
    "conditional": False,
    "conditional_delete": False,
    "reverse": False,
    "deref": False,
}

_A = TypeVar("_A")


class Crashed(BaseException):
    """The simulated end of the process: nothing that handles errors may handle it."""


class Fault:
    """A planned fault; ``fired`` counts how often it happened."""

    def __init__(self, operation: Operation, at: int, *, effect: bool, persistent: bool) -> None:
        self.operation, self.at, self.effect, self.persistent = operation, at, effect, persistent
        self.fired = 0

    def due(self, operation: Operation, number: int, *, effect: bool) -> bool:
        """Whether it strikes the ``number``-th call, before (``effect`` false) or after it is done."""
        return (
            self.operation == operation
            and self.effect == effect
            and (number == self.at or (self.persistent and number > self.at))
        )

    async def strike(self, keys: tuple[str, ...]) -> None:
        """Happen: raise, or hold the call."""
        self.fired += 1
        if self.effect and self.operation in ("commit", "step"):
            raise CommitUnknown(keys, "injected fault after the effect", settled=True)
        raise Unavailable(f"injected fault: {self.operation}")


class Gate(Fault):
    """A call that waits. One that is never released hangs until it is cancelled."""

    def __init__(self, operation: Operation, at: int, *, effect: bool, persistent: bool) -> None:
        super().__init__(operation, at, effect=effect, persistent=persistent)
        self.cancelled = 0
        self._reached = asyncio.Event()
        self._open = asyncio.Event()

    async def reached(self) -> None:
        """Return when a call waits at the gate, or has."""
        await self._reached.wait()

    def release(self) -> None:
        """Let every call through, also later ones."""
        self._open.set()

    async def strike(self, keys: tuple[str, ...]) -> None:
        self.fired += 1
        self._reached.set()
        try:
            await self._open.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise


class FaultyDriver:
    """Wraps ``inner`` and is a driver again; ``close`` closes it.

    ``without`` drops claims: "atomic_batch", "conditional", "conditional_delete", "reverse", "deref".
    What is dropped is refused as `Unsupported`; without "atomic_batch" every batch runs operation by
    operation in its order and stops at the first that fails, as on a bucket.
    """

    def __new__(cls, inner: Driver, *, without: Collection[str] = ()) -> Self:
        kind: Any = _ClockedFaultyDriver if isinstance(inner, UsesClock) and cls is FaultyDriver else cls
        return object.__new__(kind)

    def __init__(self, inner: Driver, *, without: Collection[str] = ()) -> None:
        if unknown := set(without) - _DROPPABLE.keys():
            raise ValueError(f"cannot do without {sorted(unknown)}: {', '.join(_DROPPABLE)}")
        dropped: dict[str, Any] = {name: _DROPPABLE[name] for name in without}
        if "conditional" in dropped:
            dropped["conditional_delete"] = False
        if "atomic_batch" in dropped:
            dropped["max_batch"] = None
        self.inner = inner
        self.capabilities: Capabilities = msgspec.structs.replace(inner.capabilities, **dropped)
        self.calls: Counter[Operation] = Counter()
        self._faults: list[Fault] = []
        self._dies_at: int | None = None
        self._dead = False
        if isinstance(inner, HasClock):
            self.now = inner.now
        if isinstance(inner, Compacts):
            self.compact = inner.compact
        if isinstance(inner, Watches):
            self.watch = inner.watch
        if isinstance(inner, BacksUp):
            self.backup = inner.backup
        if isinstance(inner, Pings):
            self.ping = inner.ping
        if isinstance(inner, Streams):
            self.read_stream, self.write_stream = self._read_stream, self._write_stream

    @property
    def crashed(self) -> bool:
        """Whether the crash that was planned has happened; get, commit and scan raise `Crashed` since."""
        return self._dead

    def fail(self, operation: Operation, nth: int = 1, *, effect: bool = False, persistent: bool = False) -> Fault:
        """Fail the ``nth`` call from now on, 1 being the next; ``persistent``: and every later one.

        Without ``effect`` nothing is done and `Unavailable` is the error; with it the call is done and its
        answer lost: `CommitUnknown` for writes. A failed "step" is answered in its batch's place, the others
        are raised; if an ordered batch has begun by then, `CommitUnknown` is the error in either case.
        """
        fault = Fault(operation, self.calls[operation] + nth, effect=effect, persistent=persistent)
        self._faults.append(fault)
        return fault

    def hold(self, operation: Operation, nth: int = 1, *, effect: bool = False, persistent: bool = False) -> Gate:
        """Hold the ``nth`` call from now on at a gate, before it is done or (``effect``) after."""
        gate = Gate(operation, self.calls[operation] + nth, effect=effect, persistent=persistent)
        self._faults.append(gate)
        return gate

    def crash(self, nth: int = 1) -> None:
        """Die before the ``nth`` step from now: that call and every later get, commit and scan raise `Crashed`.

        ``inner`` stays open, and is what a new process would find. For drivers that are not coalesced:
        a lane waits for an answer that never comes.
        """
        self._dies_at = self.calls["step"] + nth

    def heal(self) -> None:
        """Forget every fault and crash that has not happened, and release every gate."""
        for fault in self._faults:
            if isinstance(fault, Gate):
                fault.release()
        self._faults.clear()
        self._dies_at = None

    async def get(self, keys: Sequence[str]) -> list[Entry | None]:
        number = await self._before("get", tuple(keys))
        return await self._after("get", number, tuple(keys), await self.inner.get(keys))

    async def commit(self, batches: Sequence[Batch]) -> list[Committed | KvError]:
        self._refuse_conditions(batches)
        keys = tuple(op.key for batch in batches for op in batch.ops)
        number = await self._before("commit", keys)
        ordered = self.capabilities.atomic_batch == "none" != self.inner.capabilities.atomic_batch
        if ordered or self._dies_at is not None or any(fault.operation == "step" for fault in self._faults):
            outcomes = [await (self._in_order(batch) if ordered else self._step(batch)) for batch in batches]
        else:
            outcomes = await self.inner.commit(batches)
            self.calls["step"] += len(batches)
        return await self._after("commit", number, keys, outcomes)

    async def scan(
        self,
        start: str | None,
        end: str | None,
        *,
        limit: int,
        reverse: bool = False,
        keys_only: bool = False,
        deref: str | None = None,
    ) -> list[Entry]:
        if reverse and not self.capabilities.reverse:
            raise Unsupported("a reverse scan")
        if deref is not None and not self.capabilities.deref:
            raise Unsupported("a scan with deref", "use deref_by_get")
        number = await self._before("scan", ())
        found = await self.inner.scan(start, end, limit=limit, reverse=reverse, keys_only=keys_only, deref=deref)
        return await self._after("scan", number, (), found)

    async def close(self) -> None:
        if not self._dead:
            await self.inner.close()

    async def _read_stream(self, key: str) -> tuple[Entry, AsyncIterator[bytes]] | None:
        """Counted as a get."""
        assert isinstance(self.inner, Streams)
        number = await self._before("get", (key,))
        return await self._after("get", number, (key,), await self.inner.read_stream(key))

    async def _write_stream(
        self,
        key: str,
        pieces: AsyncIterator[bytes],
        *,
        version: bytes,
        expect: Expect | None = None,
        expires_at: float | None = None,
    ) -> Committed | KvError:
        """Counted as a commit of one step."""
        assert isinstance(self.inner, Streams)
        self._refuse_conditions([Batch((Put(key, b"", expect),), version)])
        number = await self._before("commit", (key,))
        try:
            step = await self._before("step", (key,))
            outcome = await self.inner.write_stream(key, pieces, version=version, expect=expect, expires_at=expires_at)
            outcome = await self._after("step", step, (key,), outcome)
        except (Unavailable, CommitUnknown) as error:
            outcome = error
        return await self._after("commit", number, (key,), outcome)

    async def _before(self, operation: Operation, keys: tuple[str, ...]) -> int:
        if self._dead:
            raise Crashed
        self.calls[operation] += 1
        number = self.calls[operation]
        if operation == "step" and number == self._dies_at:
            self._dead = True
            raise Crashed
        for fault in [fault for fault in self._faults if fault.due(operation, number, effect=False)]:
            await fault.strike(keys)
        return number

    async def _after(self, operation: Operation, number: int, keys: tuple[str, ...], answer: _A) -> _A:
        for fault in [fault for fault in self._faults if fault.due(operation, number, effect=True)]:
            await fault.strike(keys)
        return answer

    async def _in_order(self, batch: Batch) -> Committed | KvError:
        for position, op in enumerate(batch.ops):
            outcome = await self._step(Batch((op,), batch.version))
            if isinstance(outcome, Conflict):
                return Conflict(outcome.key, outcome.expected, outcome.found, position)
            if isinstance(outcome, Unavailable) and position:
                lost = CommitUnknown(tuple(op.key for op in batch.ops), f"{position} operations were done", True)
                lost.__cause__ = outcome
                return lost
            if isinstance(outcome, KvError):
                return outcome
        return Committed(batch.version)

    async def _step(self, batch: Batch) -> Committed | KvError:
        keys = tuple(op.key for op in batch.ops)
        try:
            number = await self._before("step", keys)
            [outcome] = await self.inner.commit([batch])
            return await self._after("step", number, keys, outcome)
        except (Unavailable, CommitUnknown) as error:
            return error

    def _refuse_conditions(self, batches: Sequence[Batch]) -> None:
        able = self.capabilities
        if able.conditional and able.conditional_delete:
            return
        for batch in batches:
            for op in batch.ops:
                if op.expect is None:
                    continue
                if not able.conditional:
                    raise Unsupported("a condition")
                if isinstance(op, Delete):
                    raise Unsupported("a conditional delete")


class _ClockedFaultyDriver(FaultyDriver):
    """Around a driver whose ``clock`` may be replaced."""

    @property
    def clock(self) -> Clock:
        inner: Any = self.inner
        return inner.clock

    @clock.setter
    def clock(self, clock: Clock) -> None:
        inner: Any = self.inner
        inner.clock = clock
