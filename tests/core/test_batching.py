"""Coalescing lanes: what is merged, in which order, and how a call ends."""

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest

from kvpersist.batching import Batched
from kvpersist.driver import ABSENT, Batch, Capabilities, Check, Committed, Entry, Put
from kvpersist.errors import CommitUnknown, CorruptRecord, DeadlineExceeded, KvError, StoreClosed, Unavailable


class Scripted:
    """A driver whose calls end when the test says so, and which counts them."""

    def __init__(self, coalesce: str = "both", settles: bool = False) -> None:
        self.capabilities = Capabilities(coalesce=coalesce, cancel_settles=settles)  # type: ignore[arg-type]
        self.data: dict[str, Entry] = {}
        self.gets: list[list[str]] = []
        self.commits: list[list[Batch]] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.error: Exception | None = None
        self.ignores_cancel = False
        self.closed = 0

    async def _gated(self) -> None:
        while not self.gate.is_set():
            try:
                await self.gate.wait()
            except asyncio.CancelledError:
                if not self.ignores_cancel:
                    raise

    async def get(self, keys: Sequence[str]) -> list[Entry | None]:
        self.gets.append(list(keys))
        await self._gated()
        if self.error:
            raise self.error
        return [self.data.get(key) for key in keys]

    async def commit(self, batches: Sequence[Batch]) -> list[Committed | KvError]:
        self.commits.append(list(batches))
        await self._gated()
        if self.error:
            raise self.error
        for batch in batches:
            for op in batch.ops:
                if isinstance(op, Put):
                    self.data[op.key] = Entry(op.key, op.value, batch.version)
        return [Committed(batch.version) for batch in batches]

    async def scan(self, start: Any, end: Any, **_: Any) -> list[Entry]:
        await self._gated()
        return []

    async def close(self) -> None:
        self.closed += 1


def put(key: str, value: bytes = b"v", version: bytes = b"12345678") -> Batch:
    return Batch((Put(key, value),), version)


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_what_arrives_during_a_flight_goes_into_one_next_call() -> None:
    driver = Scripted()
    lanes = Batched(driver)
    driver.gate.clear()
    first = asyncio.ensure_future(lanes.commit([put("0")]))
    await settle()
    others = [asyncio.ensure_future(lanes.commit([put(str(n), str(n).encode())])) for n in range(1, 65)]
    await settle()

    driver.gate.set()
    await asyncio.gather(first, *others)

    assert [len(batches) for batches in driver.commits] == [1, 64]
    assert driver.data["64"].value == b"64"
    await lanes.close()


async def test_a_drain_takes_at_most_512_operations_and_never_splits_a_call() -> None:
    driver = Scripted()
    lanes = Batched(driver)
    driver.gate.clear()
    calls = [asyncio.ensure_future(lanes.commit([put("first")]))]
    await settle()
    calls += [asyncio.ensure_future(lanes.commit([put(f"{n}-{m}") for m in range(200)])) for n in range(3)]
    await settle()

    driver.gate.set()
    await asyncio.gather(*calls)

    assert [len(batches) for batches in driver.commits] == [1, 400, 200]
    await lanes.close()


async def test_a_drain_takes_at_most_1_mib_and_a_larger_value_goes_alone() -> None:
    driver = Scripted()
    lanes = Batched(driver)
    driver.gate.clear()
    calls = [asyncio.ensure_future(lanes.commit([put("first")]))]
    await settle()
    sizes = [600_000, 600_000, 5_000_000, 1]
    calls += [asyncio.ensure_future(lanes.commit([put(str(n), bytes(n))])) for n in sizes]
    await settle()

    driver.gate.set()
    await asyncio.gather(*calls)

    assert [len(batches) for batches in driver.commits] == [1, 1, 1, 1, 1]
    await lanes.close()


async def test_concurrent_gets_are_one_call_without_repeats_and_each_gets_its_own_answers() -> None:
    driver = Scripted()
    driver.data = {key: Entry(key, key.encode(), b"12345678") for key in "abc"}
    lanes = Batched(driver)
    driver.gate.clear()
    first = asyncio.ensure_future(lanes.get(["a"]))
    await settle()
    calls = [asyncio.ensure_future(lanes.get(keys)) for keys in (["a", "b"], ["b"], ["c", "x", "c"])]
    await settle()

    driver.gate.set()
    await first
    answers = [[entry and entry.key for entry in await call] for call in calls]

    assert answers == [["a", "b"], ["b"], ["c", None, "c"]]
    assert driver.gets == [["a"], ["a", "b", "c", "x"]]
    await lanes.close()


async def test_reads_do_not_wait_for_writes() -> None:
    driver = Scripted()
    lanes = Batched(driver)
    driver.gate.clear()
    write = asyncio.ensure_future(lanes.commit([put("a")]))
    await settle()
    read = asyncio.ensure_future(lanes.get(["a"]))
    await settle()

    assert driver.gets == [["a"]]

    driver.gate.set()
    await asyncio.gather(write, read)
    await lanes.close()


async def test_a_cancelled_call_that_was_not_taken_never_runs() -> None:
    driver = Scripted()
    lanes = Batched(driver)
    driver.gate.clear()
    first = asyncio.ensure_future(lanes.commit([put("a")]))
    await settle()
    second = asyncio.ensure_future(lanes.commit([put("b")]))
    await settle()
    second.cancel()
    await settle()

    driver.gate.set()
    await first
    await settle()

    assert "b" not in driver.data
    await lanes.close()


async def test_a_cancelled_caller_does_not_take_the_others_answers_along() -> None:
    driver = Scripted()
    lanes = Batched(driver)
    driver.gate.clear()
    first = asyncio.ensure_future(lanes.commit([put("a")]))
    await settle()
    second = asyncio.ensure_future(lanes.commit([put("b")]))
    third = asyncio.ensure_future(lanes.commit([put("c")]))
    await settle()
    first.cancel()
    await settle()

    driver.gate.set()

    assert [type(o) for o in await second + await third] == [Committed, Committed]
    assert set(driver.data) == {"a", "b", "c"}  # taken, so it ran
    await lanes.close()


@pytest.mark.parametrize("coalesce", ["none", "both"])
async def test_a_get_without_answer_fails_at_its_deadline_and_the_lane_goes_on(coalesce: str) -> None:
    driver = Scripted(coalesce)
    lanes = Batched(driver, timeout=0.02)
    driver.gate.clear()

    with pytest.raises(DeadlineExceeded) as caught:
        await lanes.get(["a"])
    driver.gate.set()

    assert caught.value.outcome == "none"
    assert await lanes.get(["a"]) == [None]
    await lanes.close()


@pytest.mark.parametrize("settles", [False, True])
@pytest.mark.parametrize("coalesce", ["none", "both"])
async def test_a_commit_without_answer_is_unknown_and_says_whether_it_is_settled(coalesce: str, settles: bool) -> None:
    driver = Scripted(coalesce, settles)
    lanes = Batched(driver, timeout=0.02)
    driver.gate.clear()

    with pytest.raises(CommitUnknown) as caught:
        await lanes.commit([put("a")])
    driver.gate.set()

    assert caught.value.settled is settles
    assert isinstance((await lanes.commit([put("b")]))[0], Committed)
    await lanes.close()


async def test_a_commit_that_waited_behind_a_stuck_one_failed_without_effect() -> None:
    driver = Scripted()
    driver.ignores_cancel = True
    lanes = Batched(driver, timeout=0.02)
    driver.gate.clear()
    stuck = asyncio.ensure_future(lanes.commit([put("a")]))
    await settle()

    with pytest.raises(DeadlineExceeded):
        await lanes.commit([put("b")])

    with pytest.raises(CommitUnknown) as caught:
        await stuck
    assert not caught.value.settled
    driver.gate.set()
    assert isinstance((await lanes.commit([put("c")]))[0], Committed)
    assert "b" not in driver.data
    await lanes.close()


async def test_each_caller_of_a_failed_drain_gets_an_error_of_its_own() -> None:
    driver = Scripted()
    lanes = Batched(driver)
    driver.gate.clear()
    driver.error = Unavailable("the server is gone")
    calls = [asyncio.ensure_future(lanes.get([str(n)])) for n in range(3)]
    await settle()

    driver.gate.set()
    errors = await asyncio.gather(*calls, return_exceptions=True)

    assert [str(error) for error in errors] == ["the server is gone"] * 3
    assert len({id(error) for error in errors}) == 3
    await lanes.close()


@pytest.mark.parametrize("damaged", [("c",), ("a", "c"), ("a", "b", "c", "d")])
async def test_a_key_that_cannot_be_read_fails_those_who_asked_for_it_and_nobody_else(damaged: tuple[str, ...]) -> None:
    class Damaged(Scripted):
        async def get(self, keys: Sequence[str]) -> list[Entry | None]:
            found = await super().get(keys)
            if bad := [key for key in keys if key in damaged]:
                raise CorruptRecord(bad[0], "flipped")
            return found

    driver = Damaged()
    lanes = Batched(driver)
    await lanes.commit([put(key, key.encode()) for key in "abcd"])
    asked = [["x"], ["a"], ["b", "a"], ["c"], ["d"], ["c"], ["b"], []]
    driver.gate.clear()
    calls = [asyncio.ensure_future(lanes.get(keys)) for keys in asked]
    await settle()
    driver.gate.set()

    answers = await asyncio.gather(*calls, return_exceptions=True)

    for keys, answer in zip(asked, answers, strict=True):
        if set(keys) & set(damaged):
            assert isinstance(answer, CorruptRecord)
            assert answer.key in keys
        else:
            assert isinstance(answer, list)
            assert [entry and entry.key for entry in answer] == [None if key == "x" else key for key in keys]
    assert len({id(answer) for answer in answers if isinstance(answer, CorruptRecord)}) == sum(
        isinstance(answer, CorruptRecord) for answer in answers
    )
    assert len(driver.gets) <= 2 + len(damaged)


async def test_close_answers_what_was_submitted_and_refuses_what_comes_after() -> None:
    driver = Scripted()
    lanes = Batched(driver)
    driver.gate.clear()
    writes = [asyncio.ensure_future(lanes.commit([put(str(n))])) for n in range(5)]
    await settle()
    closing = asyncio.create_task(lanes.close())
    await settle()

    with pytest.raises(StoreClosed):
        await lanes.commit([put("late")])
    driver.gate.set()
    await closing

    outcomes = await asyncio.gather(*writes)
    assert all(isinstance(outcome, Committed) for [outcome] in outcomes)
    assert driver.closed == 1


async def test_ten_thousand_waiting_calls_are_answered_in_their_order() -> None:
    driver = Scripted()
    lanes = Batched(driver)
    driver.gate.clear()
    calls = [asyncio.ensure_future(lanes.commit([put("same", str(n).encode())])) for n in range(10_700)]
    await settle()

    driver.gate.set()
    outcomes = await asyncio.gather(*calls)

    assert all(isinstance(outcome, Committed) for [outcome] in outcomes)
    assert driver.data["same"].value == b"10699"
    await lanes.close()


async def test_a_lane_survives_the_cancellation_of_all_tasks() -> None:
    driver = Scripted()
    lanes = Batched(driver)
    await lanes.commit([put("a")])
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await settle()

    assert isinstance((await lanes.commit([put("b")]))[0], Committed)
    await lanes.close()


async def test_a_cancellation_that_a_driver_leaks_fails_its_call_and_not_the_lane() -> None:
    driver = Scripted()
    lanes = Batched(driver)
    driver.error = asyncio.CancelledError()  # type: ignore[assignment]

    with pytest.raises(CommitUnknown):
        await lanes.commit([put("a")])
    driver.error = None

    assert isinstance((await lanes.commit([put("b")]))[0], Committed)
    await lanes.close()


async def test_an_error_that_cannot_be_copied_reaches_every_caller() -> None:
    class Odd(Exception):
        def __init__(self, one: int, two: int) -> None:
            super().__init__(one)

    driver = Scripted()
    lanes = Batched(driver, timeout=None)
    driver.error = Odd(1, 2)

    with pytest.raises(Odd):
        await lanes.get(["a"])
    await lanes.close()


async def test_closing_fails_the_calls_that_a_stuck_driver_leaves() -> None:
    driver = Scripted()
    driver.ignores_cancel = True
    lanes = Batched(driver, timeout=0.02)
    driver.gate.clear()
    calls = [asyncio.ensure_future(lanes.commit([put(str(n))])) for n in range(2)]
    await asyncio.sleep(0)

    await lanes.drain()
    errors = await asyncio.gather(*calls, return_exceptions=True)
    driver.gate.set()

    assert all(isinstance(error, KvError) for error in errors)


async def test_a_driver_that_need_not_wait_is_called_without_a_timer_or_a_task() -> None:
    driver = Scripted("none")
    lanes = Batched(driver, timeout=5)
    before = len(asyncio.all_tasks())

    await lanes.commit([put("a")])
    [entry] = await lanes.get(["a"])

    assert entry is not None and len(asyncio.all_tasks()) == before


class Held(Scripted):
    """Each commit and get waits until the test lets it go."""

    def __init__(self, overlap: str = "both") -> None:
        super().__init__()
        self.capabilities = Capabilities(coalesce="both", overlap=overlap)  # type: ignore[arg-type]
        self.holds: list[asyncio.Event] = []
        self.most = self._under_way = 0

    async def _gated(self) -> None:
        hold = asyncio.Event()
        self.holds.append(hold)
        self._under_way += 1
        self.most = max(self.most, self._under_way)
        try:
            await hold.wait()
        finally:
            self._under_way -= 1

    def let_go(self) -> None:
        for hold in self.holds:
            hold.set()


async def put_three_times(lanes: Batched, caller: int) -> None:
    for turn in range(3):
        await lanes.commit([put(f"{caller}.{turn}")])


def keys_of(commits: list[list[Batch]]) -> list[list[str]]:
    return [[op.key for batch in batches for op in batch.ops] for batches in commits]


@pytest.mark.parametrize(
    ("overlap", "commits", "gets"), [("none", 1, 1), ("writes", 2, 1), ("both", 2, 2)], ids=["none", "writes", "both"]
)
async def test_a_second_flight_takes_off_only_where_the_driver_wants_it(overlap: str, commits: int, gets: int) -> None:
    driver = Held(overlap)
    lanes = Batched(driver)
    calls: list[Any] = []
    for n in range(3):
        calls += [asyncio.ensure_future(lanes.commit([put(f"{n}")])), asyncio.ensure_future(lanes.get([f"{n}"]))]
        await settle()

    assert (len(driver.commits), len(driver.gets)) == (commits, gets)
    while not all(call.done() for call in calls):
        driver.let_go()
        await settle()
    assert driver.most == commits + gets
    await lanes.close()


async def test_calls_that_come_together_are_one_flight_and_a_second_one_takes_half_of_all() -> None:
    driver = Held()
    lanes = Batched(driver)
    together = [asyncio.ensure_future(lanes.commit([put(f"a{n}")])) for n in range(10)]
    await settle()
    later = [asyncio.ensure_future(lanes.commit([put(f"b{n}")])) for n in range(30)]
    await settle()

    assert [len(commit) for commit in driver.commits] == [10, 20]  # of 40; with 20 it would be 10 and 10
    while not all(call.done() for call in (*together, *later)):
        driver.let_go()
        await settle()
    assert [len(commit) for commit in driver.commits] == [10, 20, 10]
    await lanes.close()


async def test_a_flight_that_was_alone_is_answered_in_halves_so_that_two_alternate() -> None:
    driver = Held()
    lanes = Batched(driver)

    tasks = [asyncio.ensure_future(put_three_times(lanes, n)) for n in range(64)]
    while not all(task.done() for task in tasks):
        await settle()
        for hold in driver.holds[:1]:
            hold.set()
        driver.holds[:1] = []

    assert [len(commit) for commit in driver.commits] == [64, 32, 32, 32, 32]
    await lanes.close()


async def test_three_groups_of_callers_become_two_that_alternate() -> None:
    driver = Held()
    lanes = Batched(driver)

    tasks = []
    for group in range(3):  # two fly, and the third waits
        tasks += [asyncio.ensure_future(put_three_times(lanes, n)) for n in range(21 * group, 21 * group + 21)]
        await settle()
    while not all(task.done() for task in tasks):
        for hold in driver.holds[:1]:
            hold.set()
        driver.holds[:1] = []
        await settle()

    assert [len(commit) for commit in driver.commits[:6]] == [21, 21, 32, 31, 32, 31]
    await lanes.close()


async def test_a_commit_waits_for_one_in_flight_that_writes_its_key_and_so_do_those_behind_it() -> None:
    driver = Held()
    lanes = Batched(driver)
    calls = [asyncio.ensure_future(lanes.commit([put("same", b"1")]))]
    await settle()
    calls.append(asyncio.ensure_future(lanes.commit([Batch((Check("same", ABSENT), Put("other", b"2")), b"2" * 8)])))
    await settle()
    calls.append(asyncio.ensure_future(lanes.commit([put("third", b"3")])))
    await settle()
    assert keys_of(driver.commits) == [["same"]]

    driver.let_go()
    await settle()
    assert keys_of(driver.commits) == [["same"], ["same", "other", "third"]]
    driver.let_go()
    await asyncio.gather(*calls)
    await lanes.close()


async def test_what_two_flights_only_look_at_keeps_neither_back() -> None:
    driver = Held()
    lanes = Batched(driver)
    looks = Check("parent", b"12345678")
    calls = []
    for key in ("a", "b"):
        calls.append(asyncio.ensure_future(lanes.commit([Batch((looks, Put(key, b"v")), b"2" * 8)])))
        await settle()

    assert keys_of(driver.commits) == [["parent", "a"], ["parent", "b"]]
    driver.let_go()
    await asyncio.gather(*calls)
    await lanes.close()


async def test_puts_of_one_key_apply_in_their_order_however_many_are_in_flight() -> None:
    class Slow(Held):
        async def _gated(self) -> None:
            for _ in range(len(self.commits) * 7 % 5):
                await asyncio.sleep(0)

    driver = Slow()
    lanes = Batched(driver)

    async def write(key: str, n: int) -> None:
        await asyncio.sleep(0) if n % 3 else None
        await lanes.commit([put(key, str(n).encode())])

    for key in ("x", "y"):
        last = -1
        submitted = [asyncio.ensure_future(lanes.commit([put(key, str(n).encode())])) for n in range(200)]
        others = [asyncio.ensure_future(write(f"{key}{n}", n)) for n in range(200)]
        for n, call in enumerate(submitted):
            await call
            stored = int(driver.data[key].value)
            assert stored >= max(n, last)
            last = stored
        assert last == 199
        await asyncio.gather(*others)
    await lanes.close()


async def test_a_stuck_flight_is_cancelled_by_its_deadline_while_the_other_goes_on() -> None:
    driver = Held()
    lanes = Batched(driver, timeout=0.05)
    stuck = asyncio.ensure_future(lanes.commit([put("stuck")]))
    await settle()
    outcomes: list[Any] = []
    while not stuck.done():
        call = asyncio.ensure_future(lanes.commit([put("other")]))
        await settle()
        for hold in driver.holds[1:]:
            hold.set()
        outcomes += await call

    assert isinstance(stuck.exception(), CommitUnknown)
    assert outcomes and all(isinstance(outcome, Committed) for outcome in outcomes)
    driver.let_go()
    assert isinstance((await asyncio.wait_for(_let_through(driver, lanes, "stuck"), 1))[0], Committed)
    await lanes.close()


async def _let_through(driver: Held, lanes: Batched, key: str) -> list[Any]:
    call = asyncio.ensure_future(lanes.commit([put(key)]))
    await settle()
    driver.let_go()
    return list(await call)


async def test_two_flights_survive_the_cancellation_of_all_tasks() -> None:
    driver = Held()
    lanes = Batched(driver)
    first = [asyncio.ensure_future(lanes.commit([put("a")]))]
    await settle()
    first.append(asyncio.ensure_future(lanes.commit([put("b")])))
    await settle()
    for task in asyncio.all_tasks() - {asyncio.current_task()}:
        task.cancel()
    errors = await asyncio.gather(*first, return_exceptions=True)
    assert all(isinstance(error, CommitUnknown) for error in errors)

    for key in ("a", "b", "c"):
        assert isinstance((await _let_through(driver, lanes, key))[0], Committed)
    await lanes.close()


@pytest.mark.parametrize("wanted", [[["a"], ["b"]], [["a"], ["a"], ["b"]]], ids=["a key each", "some share"])
async def test_nobody_is_given_an_entry_where_a_driver_returns_too_few(wanted: list[list[str]]) -> None:
    class Short(Scripted):
        async def get(self, keys: Sequence[str]) -> list[Entry | None]:
            return (await super().get(keys))[1:]

    lanes = Batched(Short())
    calls = [asyncio.ensure_future(lanes.get(keys)) for keys in wanted]

    errors = await asyncio.wait_for(asyncio.gather(*calls, return_exceptions=True), 5)

    assert [type(error) for error in errors] == [ValueError] * len(wanted)
    await lanes.close()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
async def test_a_driver_that_answers_too_few_leaves_nobody_waiting() -> None:
    class Short(Scripted):
        async def commit(self, batches: Sequence[Batch]) -> list[Committed | KvError]:
            return (await super().commit(batches))[1:]

    failures: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: failures.append(context))
    driver = Short()
    lanes = Batched(driver)
    calls = [asyncio.ensure_future(lanes.commit([put(str(n))])) for n in range(3)]

    errors = await asyncio.wait_for(asyncio.gather(*calls, return_exceptions=True), 5)

    assert all(isinstance(error, CommitUnknown) for error in errors)
    await lanes.close()
