"""Locks: one holder, tokens that grow, writes that only the holder can make; on every driver that keeps them."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Coroutine, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
from stores import SHARED, empty_store

import kvpersist
from kvpersist import Lease, LeaseLost, Locked, Repository, Store, open_store
from kvpersist.codec import decode_plain
from kvpersist.driver import ABSENT, Batch, Committed, Entry, Op, Put
from kvpersist.errors import (
    BadOption,
    BadRequest,
    CommitUnknown,
    Conflict,
    CorruptRecord,
    KvError,
    StoreClosed,
    Unavailable,
    Unsupported,
)
from kvpersist.testing import FaultyDriver, ManualClock
from kvpersist_drivers.memory import MemoryDriver

_LONG = 60.0  # seconds: a lease that does not end during a test


@pytest.fixture(params=["memory", *SHARED])
async def store(request: pytest.FixtureRequest, tmp_path: Path, service: Any) -> AsyncIterator[Store]:
    async with open_store(empty_store(request.param, tmp_path, service)) as store:
        yield store
        await store.clear("", raw=True)


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
async def timed(clock: ManualClock) -> AsyncIterator[Store]:
    """A store whose time stands still."""
    async with open_store(MemoryDriver(), clock=clock) as store:
        yield store


async def taken(store: Store, name: str = "job", **options: Any) -> Lease:
    return await store.lock(name, **{"ttl": _LONG, "wait": 0, "namespace": "app", **options}).acquire()


async def stolen(store: Store) -> tuple[Lease, Lease]:
    """A lease that ended unnoticed, and the one of who took the lock then."""
    old = await taken(store, ttl=0.02, renew=False, owner="old")
    return old, await taken(store, wait=None, owner="new")


async def keep_holding(task: asyncio.Task[Any], rounds: int = 20) -> None:
    for _ in range(rounds):
        await asyncio.sleep(0)
    assert not task.done()


# ---- on every driver


async def test_a_lock_that_is_held_is_refused_and_names_its_owner(store: Store) -> None:
    lease = await taken(store, owner="ada")

    with pytest.raises(Locked) as refused:
        await taken(store)

    assert (refused.value.name, refused.value.owner) == ("job", "ada")
    assert abs(refused.value.expires_at - time.time() - _LONG) < 10
    holder = await store.lock("job", namespace="app").holder()
    assert holder is not None
    assert (holder.owner, holder.token, holder.expires_at) == ("ada", lease.token, lease.expires_at)
    assert await lease.release()


async def test_a_released_lock_is_free_and_the_token_grows_by_one(store: Store) -> None:
    tokens: list[int] = []
    for _ in range(3):
        async with store.lock("job", wait=0, namespace="app") as lease:
            tokens.append(lease.token)

    assert [token - tokens[0] for token in tokens] == [0, 1, 2]
    assert await store.lock("job", namespace="app").holder() is None


async def test_a_renewal_keeps_the_lock_and_what_its_holder_writes(store: Store) -> None:
    lease = await taken(store)
    before = lease.expires_at

    for n in range(3):
        await lease.renew()
        await lease.put("app:state", n)

    assert await store.get("app:state") == 2
    assert lease.expires_at > before
    async with lease.atomic() as tx:
        tx.put("app:state", 3)
    assert await lease.delete("app:state")
    assert not await lease.delete("app:state")
    assert not lease.lost
    assert await lease.release()


async def test_nothing_is_written_under_a_lease_that_was_taken_over(store: Store) -> None:
    await store.put("app:state", "before")
    old, new = await stolen(store)

    with pytest.raises(LeaseLost):
        await old.put("app:state", "stale")
    with pytest.raises(LeaseLost):
        await old.put("app:state", "stale", expect=b"another!")
    with pytest.raises(LeaseLost):
        await old.delete("app:state")
    with pytest.raises(LeaseLost):
        await old.delete("app:nothing")
    with pytest.raises(LeaseLost):
        async with old.atomic() as tx:
            tx.put("app:state", "stale")
    with pytest.raises(LeaseLost):
        await old.renew()

    assert await store.get("app:state") == "before"
    assert new.token == old.token + 1
    assert old.lost and not new.lost
    assert not await old.release()
    await new.put("app:state", "after")
    assert await new.release()


async def test_of_many_who_wait_one_at_a_time_has_it_and_no_write_is_lost(store: Store) -> None:
    inside = 0

    async def count() -> int:
        nonlocal inside
        async with store.lock("job", namespace="app") as lease:
            inside += 1
            assert inside == 1
            await lease.put("app:count", await store.get("app:count", 0) + 1)
            inside -= 1
            return lease.token

    tokens = await asyncio.gather(*(count() for _ in range(8)))

    assert await store.get("app:count") == 8
    assert sorted(token - min(tokens) for token in tokens) == list(range(8))


async def test_records_are_written_under_a_lease_with_their_indexes(store: Store) -> None:
    class Job(msgspec.Struct):
        id: str
        state: str

    jobs = Repository(store, Job, name="job", indexes=[kvpersist.Index("state")], namespace="app")
    old = await taken(store, ttl=0.02, renew=False)
    async with old.atomic() as tx:
        await jobs.put(Job("a", "new"), tx=tx)
    new = await taken(store, wait=None)

    with pytest.raises(LeaseLost):
        async with old.atomic() as tx:
            await jobs.put(Job("a", "stale"), tx=tx)

    assert await jobs.find(state="new") == [Job("a", "new")]
    assert await jobs.find(state="stale") == []
    assert await jobs.verify() == []
    await new.release()


async def test_what_locks_keep_is_not_seen_among_the_values(store: Store) -> None:
    lease = await taken(store)
    await lease.put("app:state", 1)

    assert await store.snapshot("app:") == {"state": 1}
    assert [key async for key in store.keys("app:")] == ["app:state"]
    assert [key async for key in store.keys("app:", raw=True)] == [
        "app:#lock-token:job",
        "app:#lock:job",
        "app:state",
    ]
    await lease.release()


async def test_a_namespace_that_was_cleared_does_not_begin_with_old_tokens(store: Store) -> None:
    lease = await taken(store, renew=False)
    await store.clear("app:")

    again = await taken(store)

    assert again.token > lease.token
    with pytest.raises(LeaseLost):
        await lease.put("app:state", "stale")
    assert not await lease.release()
    assert await again.release()


@pytest.mark.parametrize("name", ["redis"])
async def test_a_write_outside_the_namespace_of_the_lock_is_refused_where_namespaces_are_apart(
    name: str, tmp_path: Path, service: Any
) -> None:
    async with open_store(empty_store(name, tmp_path, service)) as store:
        lease = await taken(store)

        with pytest.raises(Unsupported, match="namespace=") as refused:
            await lease.put("other:state", 1)
        with pytest.raises(Unsupported, match="namespace="):
            async with lease.atomic() as tx:
                tx.put("app:state", 1)
                tx.put("other:state", 1)

        assert "'app'" in str(refused.value)
        assert await store.get_many(["app:state", "other:state"]) == [None, None]
        await lease.release()
        await store.clear("", raw=True)


# ---- time


async def test_a_lease_ends_by_the_clock_of_the_store(timed: Store, clock: ManualClock) -> None:
    old = await taken(timed, ttl=30.0, renew=False)
    clock.advance(29.9)
    with pytest.raises(Locked):
        await taken(timed)
    clock.advance(0.2)

    assert await timed.lock("job", namespace="app").holder() is None
    new = await taken(timed)

    assert new.token == old.token + 1
    with pytest.raises(LeaseLost):
        await old.renew()
    await new.release()


async def test_a_lease_that_ended_and_nobody_took_is_renewed_and_written_under(
    timed: Store, clock: ManualClock
) -> None:
    lease = await taken(timed, ttl=30.0, renew=False)
    clock.advance(100)

    await lease.put("app:state", 1)
    await lease.renew()

    assert lease.expires_at == clock() + 30
    with pytest.raises(Locked):
        await taken(timed)
    assert await lease.release()


async def test_a_holder_whose_clock_was_ahead_does_not_keep_the_lock_for_ever(timed: Store, clock: ManualClock) -> None:
    clock.advance(1_000_000)
    gone = await taken(timed, ttl=0.05, renew=False)
    clock.advance(-1_000_000)  # everybody else

    lease = await taken(timed, wait=10)

    assert lease.token == gone.token + 1
    await lease.release()


async def test_one_who_renews_is_not_taken_for_dead_whatever_the_clock_says(timed: Store, clock: ManualClock) -> None:
    lease = await taken(timed, ttl=0.15)

    for _ in range(6):
        with pytest.raises(Locked):
            await taken(timed, wait=0.1)

    assert not lease.lost
    assert await lease.release()


async def test_a_stores_own_clock_decides_where_it_has_one() -> None:
    class Clocked(MemoryDriver):
        async def now(self) -> float:
            return 5_000.0

    async with open_store(Clocked()) as store:
        lease = await taken(store, ttl=30.0)

        assert lease.expires_at == 5_030.0
        await lease.release()


async def test_a_stores_clock_that_does_not_answer_ends_with_the_deadline() -> None:
    class Silent(MemoryDriver):
        async def now(self) -> float:
            await asyncio.Event().wait()
            raise AssertionError

    async with open_store(Silent(), timeout=0.05) as store:
        with pytest.raises(Unavailable):
            await taken(store)


# ---- waiting


async def test_whoever_waits_gets_it_when_it_is_released(timed: Store) -> None:
    lease = await taken(timed)
    waiting = asyncio.create_task(taken(timed, wait=None))
    await keep_holding(waiting)

    await lease.release()
    other = await waiting

    assert other.token == lease.token + 1
    await other.release()


async def test_waiting_ends_with_locked(timed: Store) -> None:
    lease = await taken(timed)
    began = time.monotonic()

    with pytest.raises(Locked):
        await taken(timed, wait=0.1)

    assert 0.09 < time.monotonic() - began < 5
    await lease.release()


async def test_one_who_stopped_waiting_takes_nothing(timed: Store) -> None:
    lease = await taken(timed)
    waiting = asyncio.create_task(taken(timed, wait=None))
    await keep_holding(waiting)

    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    await lease.release()
    await asyncio.sleep(0.05)

    assert await timed.lock("job", namespace="app").holder() is None


async def test_a_claim_that_was_cancelled_on_its_way_gives_the_lock_back() -> None:
    driver = FaultyDriver(MemoryDriver())
    async with open_store(driver) as store:
        gate = driver.hold("commit", effect=True)
        claim = asyncio.create_task(taken(store))
        await gate.reached()
        assert await store.lock("job", namespace="app").holder() is not None

        claim.cancel()
        with pytest.raises(asyncio.CancelledError):
            await claim
        gate.release()

        other = await taken(store, wait=5)
        await other.release()


async def test_losing_the_race_to_another_is_told_as_locked() -> None:
    driver = FaultyDriver(MemoryDriver())
    async with open_store(driver) as store:
        gate = driver.hold("commit")
        slow = asyncio.create_task(taken(store, owner="slow"))
        await gate.reached()
        quick = await taken(store, owner="quick")
        gate.release()

        with pytest.raises(Locked) as refused:
            await slow

        assert refused.value.owner == "quick"
        await quick.release()


async def test_a_lock_is_entered_once_at_a_time(timed: Store) -> None:
    lock = timed.lock("job")
    async with lock:
        with pytest.raises(BadRequest):
            async with lock:
                pass
    async with lock as again:
        assert not again.lost


# ---- its life


async def test_a_lease_is_renewed_while_its_block_runs(timed: Store) -> None:
    async with timed.lock("job", ttl=0.06) as lease:
        await asyncio.sleep(0.3)
        assert not lease.lost
        await lease.put("kv2:state", 1)


async def test_a_block_that_ends_after_its_lock_was_taken_over_says_so(timed: Store, clock: ManualClock) -> None:
    with pytest.raises(LeaseLost) as lost:
        async with timed.lock("job", ttl=30, namespace="app", renew=False) as lease:
            clock.advance(31)
            new = await taken(timed)

    assert (lost.value.name, lost.value.token) == ("job", lease.token)
    assert (await timed.lock("job", namespace="app").holder() or lost).token == new.token  # type: ignore[union-attr]
    await new.release()


async def test_an_error_of_the_block_is_not_hidden_by_the_lost_lease(timed: Store, clock: ManualClock) -> None:
    with pytest.raises(ZeroDivisionError):
        async with timed.lock("job", ttl=30, namespace="app", renew=False):
            clock.advance(31)
            new = await taken(timed)
            raise ZeroDivisionError
    await new.release()


async def test_a_cancelled_block_gives_the_lock_back(timed: Store) -> None:
    began = asyncio.Event()

    async def work() -> None:
        async with timed.lock("job", namespace="app"):
            began.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(work())
    await began.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task

    await (await taken(timed)).release()


async def test_nothing_is_written_under_a_lease_that_was_released(timed: Store) -> None:
    lease = await taken(timed)
    assert await lease.release()
    assert await lease.release()

    for work in (lease.put("app:state", 1), lease.delete("app:state"), lease.renew()):
        with pytest.raises(LeaseLost):
            await work
    with pytest.raises(LeaseLost):
        async with lease.atomic() as tx:
            tx.put("app:state", 1)

    assert lease.lost
    assert await timed.get("app:state") is None


async def test_a_lease_released_in_its_own_transaction_writes_nothing(timed: Store) -> None:
    lease = await taken(timed)

    with pytest.raises(LeaseLost):
        async with lease.atomic() as tx:
            tx.put("app:state", 1)
            await lease.release()

    assert await timed.get("app:state") is None


async def test_a_conflict_that_is_not_about_the_lock_stays_one(timed: Store) -> None:
    lease = await taken(timed)
    await timed.put("app:state", 1)

    with pytest.raises(Conflict):
        await lease.put("app:state", 2, expect=b"another!")
    with pytest.raises(Conflict):
        async with lease.atomic() as tx:
            await tx.get("app:state")
            await timed.put("app:state", 3)
            tx.put("app:state", 4)

    assert await timed.get("app:state") == 3
    assert not lease.lost
    await lease.release()


async def test_a_backend_that_is_away_for_a_while_does_not_end_the_lease() -> None:
    driver = FaultyDriver(MemoryDriver())
    async with open_store(driver) as store:
        lease = await taken(store, ttl=0.3)
        driver.fail("commit", persistent=True)
        while not lease.lost:
            await asyncio.sleep(0.01)
        driver.heal()
        while lease.lost:
            await asyncio.sleep(0.01)

        await lease.put("app:state", 1)
        assert await lease.release()


async def test_a_renewal_whose_answer_was_lost_is_no_loss() -> None:
    driver = FaultyDriver(MemoryDriver())
    async with open_store(driver) as store:
        lease = await taken(store)
        driver.fail("commit", effect=True)
        driver.fail("get")
        with pytest.raises(CommitUnknown):
            await lease.renew()

        await lease.renew()

        assert not lease.lost
        assert await lease.release()


async def test_a_release_whose_answer_was_lost_may_be_asked_for_again() -> None:
    driver = FaultyDriver(MemoryDriver())
    async with open_store(driver) as store:
        lease = await taken(store)
        driver.fail("commit", effect=True)
        driver.fail("get")
        with pytest.raises(CommitUnknown):
            await lease.release()

        assert await lease.release()
        assert await store.lock("job", namespace="app").holder() is None


async def test_a_lock_that_cannot_be_given_back_ends_by_its_time_and_the_block_well() -> None:
    driver = FaultyDriver(MemoryDriver())
    clock = ManualClock()
    async with open_store(driver, clock=clock) as store:
        async with store.lock("job", ttl=30, namespace="app", renew=False):
            driver.fail("commit", persistent=True)
        driver.heal()
        clock.advance(31)

        await (await taken(store)).release()


async def test_leases_of_a_closed_store_end_quietly() -> None:
    async with open_store(MemoryDriver()) as store:
        lease = await taken(store, ttl=0.03)
    await asyncio.sleep(0.05)

    assert lease._renewer is not None and lease._renewer.done()
    with pytest.raises(StoreClosed):
        await lease.release()


# ---- without atomic batches


@pytest.fixture
def stepwise() -> FaultyDriver:
    return FaultyDriver(MemoryDriver(), without={"atomic_batch"})


async def test_without_atomic_batches_single_keys_are_fenced_and_the_rest_is_refused(stepwise: FaultyDriver) -> None:
    async with open_store(stepwise) as store:
        old, new = await stolen(store)

        with pytest.raises(LeaseLost):
            await old.put("app:state", "stale")
        version = await new.put("app:state", 1)
        await new.put("app:state", 2, expect=version)
        with pytest.raises(Conflict):
            await new.put("app:state", 3, expect=version)
        with pytest.raises(Unsupported):
            await new.put("app:state", 3, ttl=60)
        with pytest.raises(Unsupported):
            await new.delete("app:state")
        with pytest.raises(Unsupported):
            async with new.atomic():
                pass

        assert await store.get("app:state") == 2
        assert [key async for key in store.keys("app:", raw=True)] == ["app:#lock:job", "app:state"]
        assert await new.release()
        assert not await old.release()


async def test_a_write_that_was_on_its_way_does_not_follow_one_of_the_next_holder(stepwise: FaultyDriver) -> None:
    async with open_store(stepwise) as store:
        old = await taken(store, ttl=0.02, renew=False)
        gate = stepwise.hold("commit")
        stale = asyncio.create_task(old.put("app:state", "stale"))
        await gate.reached()
        new = await taken(store, wait=None)
        await new.put("app:state", "new")
        gate.release()

        with pytest.raises(LeaseLost):
            await stale

        assert await store.get("app:state") == "new"
        await new.release()


async def test_losing_every_time_to_writers_without_the_lock_ends_with_a_conflict(
    stepwise: FaultyDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_store(stepwise) as store:
        lease = await taken(store)
        entries = store._entries

        async def overtaken(keys: Sequence[str]) -> list[Entry | None]:
            found = await entries(keys)
            if keys == ["app:state"]:
                await store.put("app:state", 0)
            return found

        async def at_once(attempt: int) -> None:
            pass

        monkeypatch.setattr(store, "_entries", overtaken)
        monkeypatch.setattr("kvpersist.lease.backoff", at_once)
        with pytest.raises(Conflict):
            await lease.put("app:state", 1)
        await lease.release()


class _Shuffled(MemoryDriver):
    """Without atomic batches; every call takes its time, before and after it is done."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.capabilities = msgspec.structs.replace(self.capabilities, atomic_batch="none", max_batch=None)
        self.random = random.Random(seed)
        self.written: list[int] = []

    async def get(self, keys: Sequence[str]) -> list[Entry | None]:
        return await self._slowly(super().get(keys))

    async def commit(self, batches: Sequence[Batch]) -> list[Committed | KvError]:
        return await self._slowly(self._noted(batches))

    async def _noted(self, batches: Sequence[Batch]) -> list[Committed | KvError]:
        outcomes = await super().commit(batches)
        for batch, outcome in zip(batches, outcomes, strict=True):
            for op in batch.ops:
                if isinstance(op, Put) and op.key == "app:state" and isinstance(outcome, Committed):
                    self.written.append(decode_plain(op.key, op.value))
        return outcomes

    async def _slowly(self, work: Coroutine[Any, Any, Any]) -> Any:
        await self._turns()
        answer = await work
        await self._turns()
        return answer

    async def _turns(self) -> None:
        for _ in range(self.random.choice((0, 0, 1, 3, 20))):
            await asyncio.sleep(0)


async def _tokens_in_order(seed: int) -> list[int]:
    """Let holders who are all late write one key; return the tokens in the order of their writes."""
    driver = _Shuffled(seed)
    clock = ManualClock()
    async with open_store(driver, clock=clock) as store:

        async def work() -> None:
            for _ in range(3):
                lease = await store.lock("job", ttl=0.05, namespace="app", renew=False).acquire()
                clock.advance(0.1)  # and anybody may take it
                try:
                    for _ in range(2):
                        await lease.put("app:state", lease.token)
                except LeaseLost:
                    continue

        await asyncio.gather(*(work() for _ in range(3)))
    return driver.written


async def test_in_no_order_of_steps_does_an_older_token_follow_a_newer_one() -> None:
    writes = 0
    for seed in range(100):
        written = await _tokens_in_order(seed)

        assert written == sorted(written), f"seed {seed}"
        writes += len(written)

    assert writes > 100


async def test_the_order_of_tokens_is_lost_if_the_lock_is_looked_at_before_the_version_is_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def wrong(self: Lease, op: Any) -> bytes:
        while True:
            if not self._ours(await self._current()):
                raise LeaseLost(self.name, self.token)
            [entry] = await self._store._entries([op.key])
            try:
                return await self._store._commit(
                    (msgspec.structs.replace(op, expect=ABSENT if entry is None else entry.version),)
                )
            except Conflict:
                continue

    monkeypatch.setattr(Lease, "_write_in_steps", wrong)

    seen = [await _tokens_in_order(seed) for seed in range(60)]

    assert any(written != sorted(written) for written in seen)


# ---- planted mistakes, and wrong calls


async def test_a_fence_that_is_left_out_is_caught(timed: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Lease, "_guard", lambda self: ())
    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
        await test_nothing_is_written_under_a_lease_that_was_taken_over(timed)


async def test_a_renewal_that_touches_the_token_is_caught(timed: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = timed._commit

    async def touching(ops: Sequence[Op]) -> bytes:
        if len(ops) == 1 and ops[0].key.startswith("app:#lock:"):
            [token] = await timed._entries(["app:#lock-token:job"])
            assert token is not None
            ops = (*ops, msgspec.structs.replace(ops[0], key=token.key, value=token.value, expect=None))
        return await commit(ops)

    monkeypatch.setattr(timed, "_commit", touching)
    with pytest.raises(LeaseLost):
        await test_a_renewal_keeps_the_lock_and_what_its_holder_writes(timed)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"ttl": 0}, BadOption),
        ({"ttl": -1}, BadOption),
        ({"ttl": float("inf")}, BadOption),
        ({"ttl": float("nan")}, BadOption),
        ({"wait": -1}, BadOption),
        ({"wait": float("nan")}, BadOption),
        ({"owner": ""}, BadOption),
        ({"namespace": ""}, BadRequest),
        ({"name": ""}, BadRequest),
        ({"name": "x" * 161}, BadRequest),
        ({"name": "\ud800"}, BadRequest),
    ],
)
async def test_a_wrong_option_is_refused(timed: Store, options: dict[str, Any], error: type[KvError]) -> None:
    with pytest.raises(error):
        timed.lock(**{"name": "job", **options})


async def test_a_lock_needs_conditional_writes() -> None:
    async with open_store(FaultyDriver(MemoryDriver(), without={"conditional"})) as store:
        with pytest.raises(Unsupported):
            store.lock("job")


async def test_plain_writes_into_what_repositories_own_stay_refused(timed: Store) -> None:
    Repository(timed, dict, name="thing", namespace="app")
    await timed._own("app")
    lease = await taken(timed)

    with pytest.raises(BadRequest):
        await lease.put("app:thing:a", 1)
    with pytest.raises(BadRequest):
        await lease.delete("app:thing:a")

    await lease.release()


@pytest.mark.parametrize("key", ["app:#lock:job", "app:#lock-token:job"])
async def test_a_key_that_holds_something_else_is_told_as_damaged(timed: Store, key: str) -> None:
    await (await taken(timed)).release()
    await timed.put(key, {"owner": 1})

    with pytest.raises(CorruptRecord) as damaged:
        await taken(timed)

    assert damaged.value.key == key
