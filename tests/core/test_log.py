"""Logs: numbers under concurrency, ranges, deletion, and what they cost in driver calls."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest

from kvpersist.driver import Batch, Capabilities, Committed, Driver, Entry
from kvpersist.errors import (
    BadKey,
    BadRequest,
    Conflict,
    DeadlineExceeded,
    KvError,
    Unavailable,
    Unencodable,
    Unsupported,
)
from kvpersist.log import Log
from kvpersist.opening import open_store
from kvpersist.store import Store
from kvpersist_drivers.memory import MemoryDriver


class Line(msgspec.Struct):
    text: str
    extra: Any = None


class Wrapped:
    """A driver that counts its calls and does what a test tells it before each commit."""

    def __init__(self, driver: Driver, capabilities: Capabilities | None = None) -> None:
        self.driver = driver
        self.capabilities = capabilities or driver.capabilities
        self.calls: list[str] = []
        self.commits = 0
        self.before: Callable[[Sequence[Batch]], Any] = lambda batches: None
        self.gate: asyncio.Event | None = None
        self.between: Callable[[], Awaitable[object]] = lambda: asyncio.sleep(0)

    async def get(self, keys: Sequence[str]) -> list[Entry | None]:
        self.calls.append("get")
        return await self.driver.get(keys)

    async def commit(self, batches: Sequence[Batch]) -> list[Committed | KvError]:
        self.calls.append("commit")
        self.before(batches)
        if self.gate is not None:
            await self.gate.wait()
        if self.capabilities.atomic_batch == "none":
            return [await self._in_order(batch) for batch in batches]
        return await self.driver.commit(batches)

    async def scan(self, start: str | None, end: str | None, **options: Any) -> list[Entry]:
        self.calls.append("scan")
        return await self.driver.scan(start, end, **options)

    async def close(self) -> None:
        await self.driver.close()

    async def _in_order(self, batch: Batch) -> Committed | KvError:
        """Operation by operation, with a chance for others in between."""
        for position, op in enumerate(batch.ops):
            await self.between()
            [outcome] = await self.driver.commit([Batch((op,), batch.version)])
            if isinstance(outcome, Conflict):
                return Conflict(outcome.key, outcome.expected, outcome.found, position)
        return Committed(batch.version)


ORDERED = Capabilities(conditional=True, conditional_delete=True, ordered=True, reverse=False)


async def _driver(kind: str, folder: Path) -> Driver:
    if kind == "sqlite":
        sqlite = pytest.importorskip("kvpersist_drivers.sqlite")
        options = sqlite.SqliteDriver.Options(path=str(folder / "log.db"), durability="normal")
        return await sqlite.SqliteDriver.open(options)
    return MemoryDriver()


@pytest.fixture(params=["memory", "sqlite", "ordered"])
async def driver(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Wrapped]:
    wrapped = Wrapped(await _driver(request.param, tmp_path), ORDERED if request.param == "ordered" else None)
    yield wrapped
    await wrapped.close()


@pytest.fixture
async def store(driver: Wrapped) -> AsyncIterator[Store]:
    async with open_store(driver) as store:
        yield store


@pytest.fixture
def log(store: Store) -> Log[Line]:
    return Log(store, Line, name="line")


def lines(count: int, name: str = "l") -> list[Line]:
    return [Line(f"{name}{n}") for n in range(1, count + 1)]


async def whole(log: Log[Line], parent: str) -> list[tuple[int, str]]:
    return [(number, line.text) async for number, line in log.iterate(parent)]


async def test_numbers_start_at_1_and_have_no_gaps(log: Log[Line]) -> None:
    assert await log.append("p", Line("a")) == 1
    assert await log.append_many("p", [Line("b"), Line("c")]) == [2, 3]
    assert await log.append("p", Line("d")) == 4
    assert await log.append("other", Line("x")) == 1

    assert await whole(log, "p") == [(1, "a"), (2, "b"), (3, "c"), (4, "d")]
    assert await log.count("p") == 4
    assert await log.get("p", 3) == Line("c")
    assert await log.get("p", 5) is None


async def test_the_last_n_come_in_chronological_order(log: Log[Line]) -> None:
    await log.append_many("p", lines(40))

    assert [number for number, _ in await log.last("p", 5)] == [36, 37, 38, 39, 40]
    assert [number for number, _ in await log.last("p", 100)] == list(range(1, 41))
    assert await log.last("p", 0) == []
    assert await log.last("nobody", 5) == []


async def test_ranges_keep_to_their_bounds_in_both_directions(log: Log[Line]) -> None:
    await log.append_many("p", lines(300))

    async def numbers(**options: Any) -> list[int]:
        return [number for number, _ in await log.range("p", **options)]

    assert await numbers(after=10, before=14) == [11, 12, 13]
    assert await numbers(after=10, limit=2) == [11, 12]
    assert await numbers(before=4, reverse=True) == [3, 2, 1]
    assert await numbers(after=290, limit=3, reverse=True) == [300, 299, 298]
    assert await numbers(after=5, before=5) == await numbers(after=7, before=3) == await numbers(before=-3) == []
    with pytest.raises(BadRequest):
        await numbers(limit=-1)


async def test_parents_whose_names_share_a_beginning_do_not_mix(log: Log[Line]) -> None:
    awkward = ["a", "a!", "a!b", "a:", "", "%", "ä\U0001f600", "a\x00"]
    for parent in awkward:
        await log.append_many(parent, [Line(parent), Line("second")])

    for parent in awkward:
        assert await whole(log, parent) == [(1, parent), (2, "second")]
    with pytest.raises(BadKey):
        await log.append("\ud800", Line("x"))


async def test_appends_that_come_between_one_another_are_all_stored_once_in_order(driver: Wrapped) -> None:
    chance = random.Random(11)

    async def stalled() -> None:
        for _ in range(chance.choice((0, 0, 0, 20))):
            await asyncio.sleep(0)

    driver.between = stalled
    logs = [Log(Store(driver), Line, name="line") for _ in range(4)]

    async def write(n: int, log: Log[Line]) -> list[tuple[int, str]]:
        found: list[tuple[int, str]] = []
        for turn in range(10):
            texts = [f"{n}.{turn}.{at}" for at in range(6)]
            numbers = await log.append_many("p", [Line(text) for text in texts])
            found += zip(numbers, texts, strict=True)
        return found

    written = await asyncio.gather(*(write(n, log) for n, log in enumerate(logs)))

    assert await whole(logs[0], "p") == sorted(one for each in written for one in each)
    assert all(each == sorted(each) for each in written)
    assert [await log.count("p") for log in logs] == [240] * 4


async def test_who_did_not_hear_of_a_trim_appends_behind_it(driver: Wrapped) -> None:
    late, other = Log(Store(driver), Line, name="line"), Log(Store(driver), Line, name="line")
    await late.append("p", Line("first"))
    await other.append_many("p", lines(40))
    await other.trim("p", before=35)

    assert await late.append_many("p", [Line("a"), Line("b")]) == [42, 43]

    assert (await whole(other, "p"))[-3:] == [(41, "l40"), (42, "a"), (43, "b")]
    assert await other.count("p") == 9


async def test_concurrent_appends_get_every_number_once(log: Log[Line]) -> None:
    numbers = await asyncio.gather(*[log.append("p", Line(f"{n}")) for n in range(200)])

    assert sorted(numbers) == list(range(1, 201))
    found = dict(await whole(log, "p"))
    assert all(found[number] == f"{n}" for n, number in enumerate(numbers))
    assert await log.count("p") == 200


async def test_logs_of_several_stores_share_one_sequence(driver: Wrapped) -> None:
    stores = [Store(driver) for _ in range(4)]
    logs = [Log(store, Line, name="line") for store in stores]

    numbers = await asyncio.gather(*[log.append("p", Line("x")) for log in logs for _ in range(15)])

    assert sorted(numbers) == list(range(1, 61))
    assert [await log.count("p") for log in logs] == [60] * 4


async def test_a_deleted_item_is_gone_and_its_number_is_not_used_again(log: Log[Line], store: Store) -> None:
    await log.append_many("p", lines(3))

    assert await log.delete("p", 3) is True
    assert await log.delete("p", 3) is False
    assert await log.delete("p", 99) is False

    assert await log.count("p") == 2
    assert await log.get("p", 3) is None
    assert await Log(store, Line, name="line").append("p", Line("new")) == 4
    assert await whole(log, "p") == [(1, "l1"), (2, "l2"), (4, "new")]


async def test_truncate_removes_what_lies_above_a_number(log: Log[Line]) -> None:
    await log.append_many("p", lines(600))
    await log.delete("p", 550)

    assert await log.truncate("p", after=5) == 594
    assert await log.truncate("p", after=5) == 0

    assert await log.count("p") == 5
    assert [number for number, _ in await log.last("p", 3)] == [3, 4, 5]
    assert await log.append("p", Line("next")) == 601
    assert [number for number, _ in await log.last("p", 2)] == [5, 601]


async def test_clear_leaves_nothing_but_the_numbering(log: Log[Line]) -> None:
    await log.append_many("p", lines(300))
    await log.delete("p", 7)

    assert await log.clear("p") == 299

    assert await log.count("p") == 0
    assert await whole(log, "p") == []
    assert await log.append("p", Line("next")) == 301


async def test_two_deletes_at_once_lower_the_count_once(log: Log[Line]) -> None:
    await log.append_many("p", lines(10))

    answers = await asyncio.gather(*[log.delete("p", 4) for _ in range(5)], log.append("p", Line("x")))

    assert sum(answer is True for answer in answers[:5]) == 1
    assert await log.count("p") == 10


async def test_an_item_that_cannot_be_kept_fails_alone(log: Log[Line]) -> None:
    await log.append("p", Line("first"))

    answers = await asyncio.gather(
        *[log.append("p", Line("x", extra={1, 2} if n == 3 else n)) for n in range(8)], return_exceptions=True
    )

    assert isinstance(answers[3], Unencodable)
    assert sorted(a for a in answers if isinstance(a, int)) == [2, 3, 4, 5, 6, 7, 8]
    assert await log.count("p") == 8


async def test_an_append_to_a_known_parent_is_one_commit(driver: Wrapped, log: Log[Line]) -> None:
    await log.append("p", Line("first"))
    driver.calls.clear()

    await log.append("p", Line("second"))

    assert driver.calls == ["commit"]


async def test_64_appends_to_one_parent_share_few_commits(driver: Wrapped, log: Log[Line]) -> None:
    if isinstance(driver.driver, MemoryDriver) and driver.capabilities is not ORDERED:
        pytest.skip("answers at once: nothing has to wait, so nothing is shared")
    await log.append("p", Line("first"))
    driver.calls.clear()

    async def worker() -> None:
        for _ in range(5):
            await log.append("p", Line("x"))

    await asyncio.gather(*[worker() for _ in range(64)])

    assert set(driver.calls) == {"commit"}
    assert len(driver.calls) <= 8
    assert await log.count("p") == 321


async def test_the_last_n_are_one_range_read(driver: Wrapped, log: Log[Line]) -> None:
    if not driver.capabilities.reverse:
        pytest.skip("cannot scan backwards: the stat is read first")
    await log.append_many("p", lines(100))
    driver.calls.clear()

    await log.last("p", 50)

    assert driver.calls == ["scan"]


async def test_a_cancelled_append_does_not_take_the_others_with_it(driver: Wrapped, log: Log[Line]) -> None:
    await log.append("p", Line("first"))
    driver.gate = asyncio.Event()
    tasks = [asyncio.create_task(log.append("p", Line(f"{n}"))) for n in range(6)]
    for _ in range(5):
        await asyncio.sleep(0)

    tasks[0].cancel()  # commits for itself
    tasks[3].cancel()  # waits its turn
    await asyncio.sleep(0)
    driver.gate.set()
    driver.gate = None
    answers = await asyncio.gather(*tasks, return_exceptions=True)

    assert [type(answer) for answer in answers].count(asyncio.CancelledError) == 2
    found = await whole(log, "p")
    assert [number for number, _ in found] == list(range(1, len(found) + 1))
    assert {"1", "2", "4", "5"} <= {text for _, text in found}
    assert "3" not in {text for _, text in found}
    assert await log.count("p") == len(found)


async def test_losing_every_time_ends_with_the_deadline(driver: Wrapped) -> None:
    async with open_store(driver, timeout=0.2) as store:
        log = Log(store, Line, name="line")
        await log.append("p", Line("first"))
        rival = Log(Store(driver), Line, name="line")
        rivals: set[asyncio.Task[int]] = set()

        async def commit(batches: Sequence[Batch]) -> list[Committed | KvError]:
            return [Conflict(batch.ops[0].key, None, None, 0) for batch in batches]

        driver.commit = commit  # type: ignore[method-assign]
        with pytest.raises(DeadlineExceeded):
            await log.append("p", Line("never"))
        del driver.commit

        assert await log.append("p", Line("second")) == 2
        assert await rival.count("p") == 2
        assert not rivals


async def test_a_backend_that_fails_once_fails_one_append(driver: Wrapped, log: Log[Line]) -> None:
    await log.append("p", Line("first"))

    def fail(batches: Sequence[Batch]) -> None:
        driver.before = lambda batches: None
        raise Unavailable("out for a moment")

    driver.before = fail
    with pytest.raises(Unavailable):
        await log.append("p", Line("lost"))

    assert await log.append("p", Line("second")) == 2


async def test_the_stat_is_caught_up_after_a_crash_between_item_and_stat() -> None:
    driver = Wrapped(MemoryDriver(), ORDERED)
    log = Log(Store(driver), Line, name="line")
    await log.append_many("p", lines(3))
    [stat] = await driver.driver.get(["kv:line#stat:p"])
    assert stat is not None
    await log.append_many("p", lines(2))
    await log.delete("p", 5)
    log = Log(Store(driver), Line, name="line")
    from kvpersist.driver import Put

    await driver.driver.commit([Batch((Put(stat.key, stat.value),), b"12345678")])

    assert await log.count("p") == 4
    assert await log.append("p", Line("next")) == 6
    assert await log.count("p") == 5


async def test_idle_parents_are_forgotten_and_remembered_again(driver: Wrapped, store: Store) -> None:
    log = Log(store, Line, name="line")
    log._funnel._max_idle = 3
    for n in range(10):
        await log.append(f"p{n}", Line("x"))

    assert len(log._funnel._lanes) <= 4
    assert await log.append("p0", Line("y")) == 2


async def test_a_backend_without_order_or_conditions_is_refused() -> None:
    for capabilities in (Capabilities(conditional=True), Capabilities(ordered=True)):
        store = Store(Wrapped(MemoryDriver(), capabilities))
        with pytest.raises(Unsupported):
            Log(store, Line, name="line")
