"""The ordered write path against every interleaving that chance finds.

The real coroutines of `Repository` are driven by hand, without an event loop, over a store whose every
single operation may be interrupted: 2 to 4 tasks over 2 records x 2 emails (unique) x 2 users, and at
each step a 4 % chance that a task dies, or stalls until long after the others. After every change of the
store, and after every read, the promises are checked. Bugs planted in a seam of the real code show
that the model would see them.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Coroutine, Generator, Sequence
from types import coroutine
from typing import Any, TypeAlias

import msgspec
import pytest

from kvpersist.driver import Capabilities, Check, Delete, Entry, Op, Put
from kvpersist.errors import CommitUnknown, Conflict, KvError, SchemaChanged, Unsupported
from kvpersist.index import Index, ordered_writer
from kvpersist.index.definitions import Slot
from kvpersist.index.ordered_writer import OrderedWriter
from kvpersist.index.writer import TOMBSTONE, version_of
from kvpersist.repository import Repository

CHUNKS = 25
SCHEDULES = 6_000  # per chunk: 150,000 in all
MORTALS = 10_000  # schedules with records that expire
REBUILDS = 2_000  # per chunk of schedules during which an index is built: 20,000 in all
PLANTED = 3_000  # schedules within which a planted bug has to be seen
CRASH_OR_STALL = 0.04  # per step of a task

IDS = ("a", "b")
EMAILS = ("x", "y")
USERS = ("u", "v")


Task: TypeAlias = Coroutine[Any, Any, Any]


class Person(msgspec.Struct, frozen=True):
    id: str
    email: str | None = None
    user: str | None = None


class Broken(AssertionError):
    """A promise does not hold."""


@coroutine
def step(until: float | None = None) -> Generator[float | None]:
    """Let the others go on; ``until``: at least so long, by the model's clock."""
    yield until


class ModelStore:
    """What a repository needs of a Store, over a dict; every operation is a step of its own."""

    def __init__(self) -> None:
        self.capabilities = Capabilities(conditional=True, conditional_delete=True, ordered=True)
        self.codec = "msgpack"
        self.data: dict[str, Entry] = {}
        self.minted = 0
        self.now = 0.0
        self.checker: Callable[[str], None] | None = None

    def clock(self) -> float:
        return self.now

    def _expiry(self, ttl: float | None) -> float | None:
        return None if ttl is None else self.now + ttl

    async def _own(self, namespace: str) -> None:
        pass

    async def _entries(self, keys: Sequence[str]) -> list[Entry | None]:
        found: list[Entry | None] = []
        for key in keys:
            await step()
            found.append(self.live(key))
        return found

    def live(self, key: str) -> Entry | None:
        entry = self.data.get(key)
        return None if entry is None or (entry.expires_at is not None and entry.expires_at <= self.now) else entry

    async def _commit(self, ops: Sequence[Op]) -> bytes:
        self.minted += 1
        version = self.minted.to_bytes(8, "big")
        began = self.now
        for position, op in enumerate(ops):
            await step()
            if self.now - began > 10:  # the deadline of a call
                raise CommitUnknown((op.key,), "no answer in time")
            self._apply(op, version, position)
        return version

    def _apply(self, op: Op, version: bytes, position: int) -> None:
        found = self.live(op.key)
        if op.expect is not None and version_of(found) != op.expect:
            raise Conflict(op.key, op.expect, version_of(found), position)
        if isinstance(op, Put):
            self.data[op.key] = Entry(op.key, op.value, version, op.expires_at)
        elif isinstance(op, Delete):
            self.data.pop(op.key, None)
        if self.checker is not None and not isinstance(op, Check):
            self.checker(op.key)

    async def _commit_each(self, batches: Sequence[Sequence[Op]]) -> list[bytes | KvError]:
        answers: list[bytes | KvError] = []
        for ops in batches:
            try:
                answers.append(await self._commit(ops))
            except KvError as error:
                answers.append(error)
        return answers

    async def _scan(
        self,
        start: str | None,
        end: str | None,
        *,
        limit: int,
        reverse: bool = False,
        keys_only: bool = False,
        deref: str | None = None,
    ) -> list[Entry]:
        await step()
        low, high = start or "", end or "\U0010ffff"
        inside = (self.live(key) for key in sorted(self.data) if low <= key < high)
        page = [entry for entry in inside if entry is not None][:limit]
        if deref is None:
            return page
        targets = await self._entries([deref + entry.value.decode() for entry in page])
        return [
            Entry(entry.key, entry.value, entry.version, entry.expires_at, target)
            for entry, target in zip(page, targets, strict=True)
        ]


def finish(task: Task) -> Any:
    """Run a coroutine to its end, undisturbed."""
    while True:
        try:
            task.send(None)
        except StopIteration as end:
            return end.value


async def no_wait(seconds: float) -> None:
    await step()


class World:
    """One collection, and the promises about it."""

    lives: tuple[float | None, ...] = (None,)  # seconds that records live

    def __init__(self, writer: type[OrderedWriter[Person]] = OrderedWriter) -> None:
        self.store = ModelStore()
        self.people = self.repository()
        planted = self.people
        planted._writer = planted._reader._writer = writer(
            self.store, planted._definitions, planted._codec, planted._prefix, no_wait
        )
        finish(self.people.put(Person("a")))
        self.start = {key: entry for key, entry in self.store.data.items() if "#def" in key}
        self.decoded: dict[bytes, Person] = {}
        self.changes: dict[str, int] = {}
        self.values: dict[str, tuple[bytes, float | None] | None] = {}
        self.committed: set[bytes] = set()
        self.store.checker = self.changed

    def repository(self, indexes: Sequence[Index] | None = None) -> Repository[Person]:
        if indexes is None:
            indexes = [Index("email", unique=True), Index("user")]
        return Repository(self.store, Person, name="p", indexes=indexes, namespace="m", sleep=no_wait)  # type: ignore[arg-type]

    def reset(self) -> None:
        self.store.data.clear()
        self.store.data.update(self.start)
        self.changes.clear()
        self.values.clear()
        self.committed.clear()

    def person(self, id: str) -> Person | None:
        entry = self.store.live("m:p:" + id)
        if entry is None or entry.value == TOMBSTONE:
            return None
        person = self.decoded.get(entry.value)
        if person is None:
            person = self.decoded[entry.value] = self.people._codec.decode(entry.key, entry.value)
        return person

    def changed(self, key: str) -> None:
        """Check what has to hold at every moment; called after each change of the store."""
        data = self.store.data
        if key.startswith("m:p:"):
            entry = data.get(key)
            if entry is not None:
                self.committed.add(entry.version)
            value = None if entry is None or entry.value == TOMBSTONE else (entry.value, entry.expires_at)
            if self.values.get(key) != value:
                self.values[key] = value
                self.changes[key] = self.changes.get(key, 0) + 1
        a, b = self.person("a"), self.person("b")
        if a is not None and b is not None and a.email is not None and a.email == b.email:
            raise Broken(f"duplicate unique: {a} and {b}")
        for person in (a, b):
            if person is None:
                continue
            if person.email is not None:
                claim = data.get("m:p#email:" + person.email)
                if claim is None or claim.value.decode() != person.id:
                    raise Broken(f"lost unique lookup: {person}, its claim is {claim}")
            if person.user is not None and f"m:p#user:{person.user}!{person.id}" not in data:
                raise Broken(f"missing index entry: {person}")

    # ---- tasks

    def task(self, rng: random.Random) -> Task:
        return self.saves(rng) if rng.random() < 0.75 else self.reads(rng)

    async def saves(self, rng: random.Random) -> None:
        for _ in range(rng.choice((1, 1, 2))):
            id = rng.choice(IDS)
            try:
                if rng.random() < 0.2:
                    await self.people.delete(id)
                    continue
                person = Person(id, rng.choice((*EMAILS, *EMAILS, None)), rng.choice((*USERS, *USERS, None)))
                version = await self.people.put(person, ttl=rng.choice(self.lives))
            except (Conflict, CommitUnknown):
                continue
            if version not in self.committed:
                raise Broken(f"acknowledged and not there: {person}")

    async def reads(self, rng: random.Random) -> None:
        asked = {"email": rng.choice(EMAILS)} if rng.random() < 0.5 else {"user": rng.choice(USERS)}
        before = {id: (self.changes.get("m:p:" + id, 0), self.person(id)) for id in IDS}
        found = await self.people.find(limit=2, **asked)
        [(field, value)] = asked.items()
        for person in found:
            if getattr(person, field) != value:
                raise Broken(f"asked for {asked}, found {person}")
        if len({person.id for person in found}) != len(found):
            raise Broken(f"found twice: {found}")
        for id, (changes, person) in before.items():
            still = changes == self.changes.get("m:p:" + id, 0) and person == self.person(id)
            if still and person is not None and getattr(person, field) == value and person not in found:
                raise Broken(f"asked for {asked}, missed {person}")

    # ---- schedules

    def run(self, seed: int) -> None:
        """Interleave a few tasks as the seed says, then check the outcome."""
        rng = random.Random(seed)
        self.reset()
        for id in IDS:
            if rng.random() < 0.5:
                email = None if id == "b" and self.person("a") else rng.choice(EMAILS)
                finish(self.people.put(Person(id, email, rng.choice(USERS))))
        tasks = [self.task(rng) for _ in range(rng.choice((2, 3, 3, 4)))]
        stalled: list[Task] = []
        chance = rng.random
        while tasks or stalled:
            if not tasks:
                tasks, stalled = stalled, []
            at = int(chance() * len(tasks))
            if chance() < CRASH_OR_STALL:
                victim = tasks.pop(at)
                if chance() < 0.5:
                    victim.close()  # the process died
                else:
                    stalled.append(victim)
                continue
            try:
                tasks[at].send(None)
            except StopIteration:
                tasks.pop(at)
            except BaseException:
                for task in (*tasks, *stalled):
                    task.close()
                raise
        self.settled()

    def interleave(self, rng: random.Random, tasks: list[Task], builder: Task | None = None) -> None:
        """Run tasks in any order by a clock that moves; ``builder`` may stall, but does not die."""
        away: list[tuple[float, Task]] = []  # asleep or stalled, until when
        while tasks or away:
            if not tasks:
                self.store.now = max(self.store.now, min(until for until, _ in away))
            tasks += [task for until, task in away if until <= self.store.now]
            away = [each for each in away if each[0] > self.store.now]
            at = int(rng.random() * len(tasks))
            if rng.random() < CRASH_OR_STALL:
                victim = tasks.pop(at)
                if victim is not builder and rng.random() < 0.3:
                    victim.close()
                else:
                    away.append((self.store.now + rng.choice((2.0, 9.0, 30.0, 70.0)), victim))
                continue
            self.store.now += rng.choice((0.0, 0.1, 0.2))
            try:
                until = tasks[at].send(None)
            except StopIteration:
                tasks.pop(at)
            except BaseException:
                for task in (*tasks, *(task for _, task in away)):
                    task.close()
                raise
            else:
                if until is not None:
                    away.append((until, tasks.pop(at)))

    def settled(self) -> None:
        """Ask the indexes for everything, undisturbed."""
        for field, values in (("email", EMAILS), ("user", USERS)):
            for value in values:
                expected = [p for id in IDS if (p := self.person(id)) is not None and getattr(p, field) == value]
                if (found := finish(self.people.find(**{field: value}))) != expected:
                    raise Broken(f"{field}={value}: found {found}, there are {expected}")


class Mortal(World):
    """Records that expire while others are being saved."""

    lives = (None, 61.0, 62.0, 80.0)

    def run(self, seed: int) -> None:
        rng = random.Random(seed)
        self.reset()
        self.store.now = 0.0
        self.people._definitions._seen_at = 0.0
        for id in IDS:
            if rng.random() < 0.5:
                email = None if id == "b" and self.person("a") else rng.choice(EMAILS)
                finish(self.people.put(Person(id, email, rng.choice(USERS)), ttl=rng.choice(self.lives)))
        self.interleave(rng, [self.task(rng) for _ in range(rng.choice((2, 3, 3, 4)))])
        self.settled()


# ---- bugs that the model has to see, each planted in one seam of the real code


class NoFence(OrderedWriter[Person]):
    """Takes a claim from a holder whose save may be under way."""

    async def _freed(self, slot: Slot, claim: str, holder: str) -> bool:
        [held] = await self._store._entries([self._records + holder])
        if held is not None and held.value and claim in slot.stored_keys(self.decoded(held), holder):
            raise self.taken(slot, claim, holder)
        return True


class UnconditionalDelete(OrderedWriter[Person]):
    """Removes old entries and claims whoever wrote them last."""

    def _erasure(self, entry: Entry) -> Op:
        return Delete(entry.key)


class VersionReadLate(OrderedWriter[Person]):
    """Reads the versions to remove after its own commit point."""

    async def _clean(self, stale: Sequence[Entry]) -> None:
        again = await self._store._entries([entry.key for entry in stale])
        mine = [now for was, now in zip(stale, again, strict=True) if now is not None and now.value == was.value]
        await super()._clean(mine)


class RecordFirst(OrderedWriter[Person]):
    """Writes the record, then its entries."""

    def __init__(self, store: Any, *rest: Any) -> None:
        super().__init__(Reordered(store), *rest)


class Reordered:
    def __init__(self, store: Any) -> None:
        self._inner = store

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    async def _commit(self, ops: Sequence[Op]) -> bytes:
        return await self._inner._commit([ops[-1], *ops[:-1]])


class OwnClaimTrusted(OrderedWriter[Person]):
    """Does not write a claim that names its record already, so that nobody under way notices."""

    def __init__(self, store: Any, *rest: Any) -> None:
        super().__init__(Sparing(store), *rest)


class Sparing(Reordered):
    async def _commit(self, ops: Sequence[Op]) -> bytes:
        held = await self._inner._entries([op.key for op in ops])
        needed = [
            op
            for op, entry in zip(ops, held, strict=True)
            if not (
                "#email" in op.key
                and isinstance(op, Put)
                and entry is not None
                and (entry.value, entry.version) == (op.value, op.expect)
            )
        ]
        return await self._inner._commit(needed)


class NoTombstone(OrderedWriter[Person]):
    """Leaves nothing where a record was deleted."""

    def __init__(self, store: Any, *rest: Any) -> None:
        super().__init__(Erasing(store), *rest)


class Erasing(Reordered):
    async def _commit(self, ops: Sequence[Op]) -> bytes:
        return await self._inner._commit(
            [
                Delete(op.key, op.expect if isinstance(op.expect, bytes) else None)
                if isinstance(op, Put) and op.value == TOMBSTONE
                else op
                for op in ops
            ]
        )


class UnfencedReaders(OrderedWriter[Person]):
    """Lets readers remove a stale entry while its record's next save may be under way."""

    async def discard(self, slot: Slot, entry: Entry) -> bool:
        [held] = await self._store._entries([self._records + entry.value.decode()])
        pk = entry.value.decode()
        if held is not None and held.value and entry.key in slot.stored_keys(self.decoded(held), pk):
            return False
        try:
            await self._store._commit((self._erasure(entry),))
        except Conflict:
            return False
        return True


def caught_at(world: World, schedules: int) -> int | None:
    """Return how many schedules it takes until a promise breaks."""
    for seed in range(schedules):
        try:
            world.run(seed)
        except Broken:
            return seed
    return None


# ---- an index that is built while processes write that do not know of it


class Rebuild(World):
    """One process declares a second index and builds it; others were started before it existed."""

    def __init__(self, added: str) -> None:
        self.added = added
        super().__init__()
        both = {"email": Index("email", unique=True), "user": Index("user")}
        self.old = self.repository([index for name, index in both.items() if name != added])
        self.store.data.clear()
        finish(self.old._definitions.known())
        self.start = dict(self.store.data)
        self.known = self.old._definitions.cached
        self.readable = False
        self.built = 0  # schedules in which the index became readable
        self.people._sleep = self.sleep

    async def sleep(self, seconds: float) -> None:
        await step(self.store.now + seconds)

    def changed(self, key: str) -> None:
        if key == "m:p#def":
            definition = self.people._definitions.read(self.store.data[key])
            self.readable = [each.state for each in definition.indexes] == ["readable", "readable"]
        if self.readable:
            super().changed(key)
        elif key.startswith("m:p:"):
            self.committed.add(self.store.data[key].version)

    async def rebuilds(self, rng: random.Random) -> None:
        if rng.random() < 0.2:  # the first attempt may end anywhere; the next one goes on from there
            first = self.people.reindex()
            for _ in range(rng.randrange(40)):
                try:
                    await step(first.send(None))
                except (StopIteration, Conflict, CommitUnknown):
                    break
            first.close()
        try:
            await self.people.reindex()
        except (Conflict, CommitUnknown):
            return

    async def writes(self, rng: random.Random, repository: Repository[Person]) -> None:
        for _ in range(rng.choice((2, 4))):
            await self.sleep(rng.choice((0.0, 0.0, 3.0, 25.0, 50.0)))
            id = rng.choice(IDS)
            # emails differ per record: two records that share one would keep the index from being built
            email = rng.choice(({"a": "x", "b": "y"}[id], {"a": "x2", "b": "y2"}[id], None))
            try:
                if rng.random() < 0.2:
                    await repository.delete(id)
                else:
                    await repository.put(Person(id, email, rng.choice((*USERS, None))))
            except (Conflict, CommitUnknown, SchemaChanged):
                continue

    def run(self, seed: int) -> None:
        rng = random.Random(seed)
        self.reset()
        self.readable = False
        self.store.now = 0.0
        self.old._definitions._known, self.old._definitions._seen_at = self.known, 0.0
        self.people._definitions._known = None
        for id in IDS:
            finish(self.old.put(Person(id, {"a": "x", "b": "y"}[id], rng.choice(USERS))))
        builder = self.rebuilds(rng)
        tasks: list[Task] = [builder]
        tasks += [self.writes(rng, self.old) for _ in range(rng.choice((1, 2)))]
        tasks += [self.writes(rng, self.people) for _ in range(rng.choice((0, 1)))]
        self.interleave(rng, tasks, builder)
        if self.readable:
            self.settled()

    def settled(self) -> None:
        self.built += 1
        finish(self.people._definitions.refresh())
        values = {"email": ("x", "y", "x2", "y2"), "user": USERS}
        for value in values[self.added]:
            expected = [p for id in IDS if (p := self.person(id)) is not None and getattr(p, self.added) == value]
            if (found := finish(self.people.find(**{self.added: value}))) != expected:
                raise Broken(f"{self.added}={value}: found {found}, there are {expected}")


# ---- the tests


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_no_interleaving_with_crashes_breaks_a_promise(chunk: int) -> None:
    world = World()
    for seed in range(chunk * SCHEDULES, (chunk + 1) * SCHEDULES):
        try:
            world.run(seed)
        except BaseException:
            print(f"schedule {seed}: World().run({seed})")
            raise


@pytest.mark.parametrize("chunk", range(5))
@pytest.mark.parametrize("added", ["user", "email"])
def test_no_write_is_missed_by_an_index_that_is_built_meanwhile(added: str, chunk: int) -> None:
    world = Rebuild(added)
    for seed in range(chunk * REBUILDS, (chunk + 1) * REBUILDS):
        try:
            world.run(seed)
        except BaseException:
            print(f"schedule {seed}: Rebuild({added!r}).run({seed})")
            raise
    assert world.built > REBUILDS * 0.8


@pytest.mark.parametrize(
    "bug",
    [NoFence, UnconditionalDelete, VersionReadLate, RecordFirst, OwnClaimTrusted, NoTombstone, UnfencedReaders],
)
def test_the_model_sees_a_planted_bug(bug: type[OrderedWriter[Person]]) -> None:
    assert caught_at(World(bug), PLANTED) is not None


def test_the_model_sees_a_reader_that_trusts_stale_entries() -> None:
    world = World()
    world.people._reader._verifies = False

    assert caught_at(world, PLANTED) is not None


@pytest.mark.parametrize("added", ["user", "email"])
def test_the_model_sees_a_rebuild_that_does_not_wait(added: str) -> None:
    world = Rebuild(added)
    world.people._sleep = no_wait

    assert caught_at(world, PLANTED) is not None


@pytest.mark.parametrize("added", ["user", "email"])
def test_the_model_sees_an_old_writer_that_never_looks_again(added: str, monkeypatch: pytest.MonkeyPatch) -> None:
    world = Rebuild(added)
    monkeypatch.setattr(world.old._definitions, "fresh", world.old._definitions.known)

    assert caught_at(world, PLANTED) is not None


@pytest.mark.parametrize("added", ["user", "email"])
def test_the_model_sees_an_old_writer_that_takes_too_long(added: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ordered_writer, "_WINDOW", float("inf"))

    assert caught_at(Rebuild(added), PLANTED) is not None


def test_records_that_expire_between_saves_break_no_promise() -> None:
    world = Mortal()
    for seed in range(MORTALS):
        try:
            world.run(seed)
        except BaseException:
            print(f"schedule {seed}: Mortal().run({seed})")
            raise


def test_a_life_shorter_than_a_save_would_break_a_promise_and_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def schedule() -> None:
        world = World()
        world.reset()
        slow = world.people.put(Person("b", "x"))
        while "m:p#email:x" not in world.store.data:
            slow.send(None)
        finish(world.people.put(Person("a", "x")))  # fences b, takes its claim
        finish(world.people.put(Person("b"), ttl=2.0))
        world.store.now = 3.0  # the place of b is as absent as when the slow save began
        finish(slow)

    with pytest.raises(Unsupported, match="ttl under 60 s"):
        schedule()
    monkeypatch.setattr(ordered_writer, "SHORTEST_LIFE", 0.0)
    monkeypatch.setattr(ordered_writer, "_LEAST", 0.0)
    with pytest.raises(Broken, match="duplicate unique"):
        schedule()
