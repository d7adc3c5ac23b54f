"""A Hypothesis machine that runs a driver against a plain dict.

    machine = driver_machine(lambda: CabinetDriver.open(CabinetOptions(url=...)))
    TestCabinetModel = machine.TestCase
    TestCabinetModel.settings = settings(max_examples=200, stateful_step_count=50, deadline=None)

Every machine has an event loop of its own, an empty store, and a clock that only the machine moves
(a backend with a clock of its own is only given entries that expired long ago or will in a century).
Versions are counted, not random, so a found example replays.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, ClassVar, Final, Literal, NamedTuple, TypeAlias, TypeVar

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvpersist.driver import (
    ABSENT,
    Batch,
    Capabilities,
    Check,
    Committed,
    Compacts,
    Delete,
    Driver,
    Entry,
    Expect,
    Op,
    Put,
    UsesClock,
)
from kvpersist.errors import Conflict
from kvpersist.testing.clock import ManualClock

__all__ = ["DriverMachine", "driver_machine"]

_T = TypeVar("_T")
_Condition: TypeAlias = Literal["any", "absent", "current", "older", "unknown"]
_Kind: TypeAlias = Literal["put", "delete", "check"]

_NAMES: Final = (
    "",
    "a",
    "a\x00",
    "a!",
    "ab",
    "A",
    "%",
    "b/c",
    "\u00e9",
    "e\u0301",
    "\ud7ff",
    "\ue000",
    "\uffff",
    "\U0001f600",
)
_PLAIN_KEYS: Final = {space: tuple(f"{space}:r:{name}" for name in _NAMES) for space in ("p", "q")}
_INDEX_KEYS: Final = tuple(f"p#i:{number}" for number in range(6))
_KEYS: Final = (*_PLAIN_KEYS["p"], *_PLAIN_KEYS["q"], *_INDEX_KEYS)
_BOUNDS: Final = (None, *_KEYS, "p", "p#", "p:", "p;", "p:r:a\x00\x00", "p:r:\U0010ffff", "q;", "\U0010ffff")
_CENTURY: Final = 3_200_000_000.0  # seconds


class _Step(NamedTuple):
    """An operation as it is drawn: what its condition names is known when it is run."""

    kind: _Kind
    key: str
    value: bytes
    condition: _Condition
    ttl: float | None


def _steps(keys: tuple[str, ...]) -> st.SearchStrategy[list[_Step]]:
    index = keys is _INDEX_KEYS
    values = st.sampled_from([name.encode() for name in _NAMES]) if index else st.binary(max_size=12)
    step = st.builds(
        _Step,
        st.sampled_from(("put", "put", "put", "put", "delete", "check")),
        st.sampled_from(keys),
        values,
        st.sampled_from((*["any"] * 8, *["current"] * 5, "absent", "older", "unknown")),
        st.sampled_from((*[None] * 6, 5.0, 10.0, 15.0, _CENTURY, 0.0, -1.0)),
    )
    return st.lists(step, min_size=1, max_size=5, unique_by=lambda step: step.key)


_ONE_BATCH: Final = st.one_of(*(_steps(keys) for keys in (*_PLAIN_KEYS.values(), _INDEX_KEYS)))


class DriverMachine(RuleBasedStateMachine):
    """The machine; `driver_machine` fills in how the driver is opened."""

    can_reopen: ClassVar[bool] = False

    async def open_driver(self) -> Driver:
        """Open an empty store."""
        raise NotImplementedError

    async def reopen_driver(self, closed: Driver) -> Driver:
        """Open the place of a closed driver again."""
        raise NotImplementedError

    def __init__(self) -> None:
        super().__init__()
        self._runner = asyncio.Runner()
        self._clock = ManualClock()
        self._driver: Driver | None = None
        self._entries: dict[str, Entry] = {}
        self._older: dict[str, bytes] = {}  # a version each key had once
        self._versions = 0

    @initialize()
    def open(self) -> None:
        """Open an empty store."""
        self._opened(self._run(self.open_driver()))

    @rule(drawn=st.lists(_ONE_BATCH, min_size=1, max_size=4))
    def commit(self, drawn: list[list[_Step]]) -> None:
        """Commit some batches in one call."""
        batches: list[Batch] = []
        expected: list[Committed | Conflict] = []
        for steps in drawn:
            self._versions += 1
            version = self._versions.to_bytes(8, "big")
            batches.append(Batch(tuple(self._op(step) for step in steps), version))
            expected.append(self._apply(batches[-1]))

        outcomes = self._run(self._open.commit(batches))

        assert len(outcomes) == len(expected), (outcomes, expected)
        for batch, outcome, wanted in zip(batches, outcomes, expected, strict=True):
            if isinstance(wanted, Committed):
                assert outcome == wanted, (batch, outcome)
                continue
            assert isinstance(outcome, Conflict), (batch, outcome, wanted)
            told = (outcome.key, outcome.expected, outcome.position)
            assert told == (wanted.key, wanted.expected, wanted.position), (batch, outcome, wanted)
            assert outcome.found is None or outcome.found == wanted.found, (batch, outcome, wanted)

    @rule(keys=st.lists(st.sampled_from(_KEYS), max_size=20, unique=True))
    def put(self, keys: list[str]) -> None:
        """Put many keys, each in a batch of its own."""
        batches: list[Batch] = []
        for key in keys:
            self._versions += 1
            batches.append(Batch((Put(key, b"%d" % self._versions),), self._versions.to_bytes(8, "big")))
            self._apply(batches[-1])

        assert self._run(self._open.commit(batches)) == [Committed(batch.version) for batch in batches]

    @rule(keys=st.lists(st.sampled_from(_KEYS), max_size=8))
    def get(self, keys: list[str]) -> None:
        """Read some keys, repeats among them."""
        assert self._run(self._open.get(keys)) == [self._live(key) for key in keys]

    @rule(
        start=st.sampled_from(_BOUNDS),
        end=st.sampled_from(_BOUNDS),
        limit=st.integers(1, 12),
        reverse=st.booleans(),
        keys_only=st.booleans(),
    )
    def scan(self, start: str | None, end: str | None, limit: int, reverse: bool, keys_only: bool) -> None:
        """Scan a range, forwards or backwards."""
        reverse = reverse and self._able.reverse
        limit = limit if self._able.ordered else len(_KEYS)

        found = self._run(self._open.scan(start, end, limit=limit, reverse=reverse, keys_only=keys_only))

        wanted = self._range(start, end, reverse)[:limit]
        if keys_only:
            wanted = [Entry(entry.key, b"", entry.version, entry.expires_at) for entry in wanted]
        assert self._sorted(found) == wanted, (start, end, limit, reverse)

    @precondition(lambda self: self._able.deref)
    @rule(start=st.sampled_from(_INDEX_KEYS), limit=st.integers(1, 7), reverse=st.booleans())
    def follow(self, start: str, limit: int, reverse: bool) -> None:
        """Scan index entries together with what they point at."""
        self._follow(start, limit, reverse and self._able.reverse)

    def _follow(self, start: str, limit: int, reverse: bool) -> None:
        found = self._run(self._open.scan(start, "p#i;", limit=limit, reverse=reverse, deref="p:r:"))

        assert found == [
            Entry(entry.key, entry.value, entry.version, entry.expires_at, self._live("p:r:" + entry.value.decode()))
            for entry in self._range(start, "p#i;", reverse)[:limit]
        ]

    @rule(seconds=st.sampled_from((1.0, 4.0, 5.0, 10.0)))
    def wait(self, seconds: float) -> None:
        """Let time pass."""
        self._clock.advance(seconds)

    @precondition(lambda self: isinstance(self._driver, Compacts))
    @rule(limit=st.integers(1, 4))
    def compact(self, limit: int) -> None:
        """Remove some expired entries."""
        driver = self._driver
        assert isinstance(driver, Compacts)
        assert 0 <= self._run(driver.compact(limit)) <= limit

    @precondition(lambda self: self.can_reopen)
    @rule()
    def reopen(self) -> None:
        """Close the driver and open its place again."""
        closed = self._open
        self._run(closed.close())
        self._opened(self._run(self.reopen_driver(closed)))

    @invariant()
    def the_store_holds_what_the_model_holds(self) -> None:
        """Compare everything."""
        if self._driver is not None:
            wanted = self._range(None, None, reverse=False)
            # a limit that is just enough shows a driver that counts what has expired
            for limit in {max(1, len(wanted)), 2 * len(_KEYS)}:
                found = self._run(self._driver.scan(None, None, limit=limit))
                assert self._sorted(found) == wanted, limit
            assert self._run(self._driver.get(_KEYS)) == [self._live(key) for key in _KEYS]
            if self._able.deref:
                self._follow(_INDEX_KEYS[0], len(_INDEX_KEYS), reverse=False)

    def teardown(self) -> None:
        """Close the driver and the loop."""
        try:
            if self._driver is not None:
                self._run(self._driver.close())
        finally:
            self._runner.close()

    @property
    def _open(self) -> Driver:
        assert self._driver is not None
        return self._driver

    @property
    def _able(self) -> Capabilities:
        return self._open.capabilities

    def _opened(self, driver: Driver) -> None:
        self._driver = driver
        if isinstance(driver, UsesClock):
            driver.clock = self._clock

    def _run(self, answer: Awaitable[_T]) -> _T:
        async def awaited() -> _T:
            return await answer

        call: Coroutine[Any, Any, _T] = awaited()
        return self._runner.run(call)

    def _live(self, key: str) -> Entry | None:
        entry = self._entries.get(key)
        expired = entry is not None and entry.expires_at is not None and entry.expires_at <= self._clock()
        return None if expired else entry

    def _range(self, start: str | None, end: str | None, reverse: bool) -> list[Entry]:
        return [
            entry
            for key in sorted(self._entries, key=str.encode, reverse=reverse)
            if (start is None or key.encode() >= start.encode())
            and (end is None or key.encode() < end.encode())
            and (entry := self._live(key)) is not None
        ]

    def _sorted(self, found: list[Entry]) -> list[Entry]:
        return found if self._able.ordered else sorted(found, key=lambda entry: entry.key.encode())

    def _op(self, step: _Step) -> Op:
        able = self._able
        expect = self._expect(step)
        if step.kind == "check" and able.conditional:
            entry = self._live(step.key)
            current = ABSENT if entry is None else entry.version
            return Check(step.key, current if expect is None else expect)
        if step.kind == "delete":
            return Delete(step.key, expect if able.conditional_delete and isinstance(expect, bytes) else None)
        ttl = step.ttl
        if ttl is not None and not isinstance(self._driver, UsesClock):
            ttl = -_CENTURY / 2 if ttl <= 0 else _CENTURY
        expires_at = None if ttl is None else self._clock() + ttl
        return Put(step.key, step.value, expect if able.conditional else None, expires_at)

    def _expect(self, step: _Step) -> Expect | None:
        entry = self._live(step.key)
        match step.condition:
            case "any":
                return None
            case "absent":
                return ABSENT
            case "current":
                return ABSENT if entry is None else entry.version
            case "older":
                return self._older.get(step.key, b"\x00" * 8)
            case "unknown":
                return b"\xff" * 8

    def _apply(self, batch: Batch) -> Committed | Conflict:
        before, older = dict(self._entries), dict(self._older)
        for position, op in enumerate(batch.ops):
            entry = self._live(op.key)
            found = ABSENT if entry is None else entry.version
            if op.expect is not None and op.expect != found:
                if self._able.atomic_batch != "none":
                    self._entries, self._older = before, older
                return Conflict(op.key, op.expect, found, position)
            if isinstance(op, Check):
                continue
            if entry is not None:
                self._older[op.key] = entry.version
            self._entries.pop(op.key, None)
            if isinstance(op, Put) and (op.expires_at is None or op.expires_at > self._clock()):
                self._entries[op.key] = Entry(op.key, op.value, batch.version, op.expires_at)
        return Committed(batch.version)


def driver_machine(
    opener: Callable[[], Awaitable[Driver]],
    *,
    reopener: Callable[[Driver], Awaitable[Driver]] | None = None,
    max_examples: int = 60,
    steps: int = 30,
) -> type[DriverMachine]:
    """Make a machine whose runs each begin with ``await opener()``, an empty store.

    Args:
        opener: opens a driver on an empty store.
        reopener: given a closed driver, opens its place again; None: the data does not outlive it.
        max_examples: runs, for the settings of the machine's ``TestCase``.
        steps: rules in a run, likewise.

    Returns:
        A class for ``hypothesis.stateful.run_state_machine_as_test``, or, as ``.TestCase``, for pytest.
    """

    class Machine(DriverMachine):
        can_reopen = reopener is not None

        async def open_driver(self) -> Driver:
            return await opener()

        async def reopen_driver(self, closed: Driver) -> Driver:
            assert reopener is not None
            return await reopener(closed)

    Machine.TestCase.settings = settings(max_examples=max_examples, stateful_step_count=steps, deadline=None)
    return Machine
