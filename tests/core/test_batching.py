"""Coalescing lanes: what is merged, in which order, and how a call ends."""

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest

from kvpersist.batching import Batched
from kvpersist.driver import Batch, Capabilities, Committed, Entry, Put
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
                assert isinstance(op, Put)
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
