"""Several processes write below one session at once, on a store without atomic batches: the session stays sound.

First one write is stopped at each of its steps while another is done from beginning to end. Then chance
decides: two processes append, change, repair and approve, and each step of theirs (a key that is read, a page,
an operation) takes as long as a seed says. Bugs planted in the real code show that the runs would see them.
`KVPERSIST_FAULT_STRIDE=1` stops at every step and makes 500 random runs of each kind; by default it is every
fourth step, and 31 runs.
"""

from __future__ import annotations

import asyncio
import os
import random
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

import pytest
from msgspec.structs import replace
from own_time import Stepwise, now, run

import kvpersist
from kvpersist import Message, ToolCallPart
from kvpersist.agents.conversations.ordered import OrderedTurns
from kvpersist.agents.persistence import Persistence
from kvpersist.errors import BadRequest, BadTransition, KvError
from kvpersist.testing.faults import FaultyDriver
from kvpersist_drivers.memory import MemoryDriver

Sound = Callable[[Persistence], Awaitable[None]]
Act = Any  # a coroutine function of a Persistence

ORDERED = {"atomic_batch", "reverse", "deref"}
STRIDE = int(os.environ.get("KVPERSIST_FAULT_STRIDE", "4"))
RUNS = 500 // STRIDE**2
PLANTED = 200  # runs within which a planted bug has to be seen
STEPS = 6  # what each process does in a run


def asks(*ids: str) -> Message:
    return Message("assistant", tool_calls=[ToolCallPart(id_, "t") for id_ in ids])


def answers(id_: str) -> Message:
    return Message("tool", "r", tool_call_id=id_)


async def append(db: Persistence) -> None:
    await db.messages.append_many("s", [answers("b"), asks("d"), answers("d"), answers("c")])


async def approve(db: Persistence) -> None:
    with suppress(BadTransition):  # it was answered, too
        await db.tool_calls.approve("s", 4, 0)


async def truncate(db: Persistence) -> None:
    await db.messages.truncate("s", after=3)


async def put_before(db: Persistence) -> None:
    messages = await db.messages.range("s", limit=5)
    await db.messages.replace_all("s", [Message("system", "new"), *(replace(each, number=0) for each in messages)])


async def delete(db: Persistence) -> None:
    for newest in await db.messages.last("s", 1):  # of a rewriting that is under way there may be none
        await db.messages.delete(newest.id)


async def repair(db: Persistence) -> None:
    await db.messages.repair("s")


@pytest.mark.timeout(600)
@pytest.mark.parametrize("meanwhile", [append, approve, truncate, put_before, delete, repair])
@pytest.mark.parametrize("stopped", [append, approve, truncate, put_before, delete, repair])
async def test_a_write_that_is_stopped_anywhere_and_one_meanwhile_leave_the_session_sound(
    stopped: Act, meanwhile: Act, sound: Sound
) -> None:
    for nth in range(1 + len(stopped.__name__) % STRIDE, 200, STRIDE):
        disk = MemoryDriver()
        slow = FaultyDriver(disk, without=ORDERED)
        async with kvpersist.open(FaultyDriver(disk, without=ORDERED)) as db, kvpersist.open(slow) as other:
            await db.sessions.create(id="s")
            await db.messages.append_many("s", [Message("user", "q"), asks("a", "b"), answers("a"), asks("c")])
            await other.messages.append("s", Message("user", "next"))
            await db.messages.append("s", Message("user", "and next"))  # both know the session
            gate = slow.hold("step", nth)
            first = asyncio.create_task(stopped(other))
            while not gate.fired and not first.done():
                await asyncio.sleep(0)
            second = asyncio.create_task(meanwhile(db))
            for _ in range(300):  # it may have to wait for the first
                await asyncio.sleep(0)
            slow.heal()
            await asyncio.gather(first, second)

            await _whole(db, sound)
            await _whole(other, sound)
        if not gate.fired:
            return
    pytest.fail("it never comes to its end")


async def _whole(db: Persistence, sound: Sound) -> None:
    """The session is sound, each call that is asked for is there, and no answer is that of two calls."""
    await sound(db)
    calls = await db.tool_calls.of("s")
    asked = {(m.number, at) async for m in db.messages.iterate("s") for at in range(len(m.tool_calls or ()))}
    assert asked <= {(call.number, call.position) for call in calls}
    answered = Counter(call.result_number for call in calls if call.result_number is not None)
    assert all(times == 1 for times in answered.values())
    assert [issue for issue in (await db.check()).issues if issue.kind != "unfinished"] == []


async def _any(db: Persistence, chance: random.Random) -> None:
    """Do one of all that changes a session."""
    messages = await db.messages.last("s", 5)
    calls = await db.tool_calls.find("s")
    match chance.choices(range(9), (35, 10, 12, 13, 12, 4, 7, 4, 3))[0]:
        case 0:
            kinds = [lambda: Message("user", "q"), lambda: asks(*chance.choices("abc", k=2))]
            kinds.append(lambda: answers(chance.choice("abc")))
            turn = [make() for make in chance.choices(kinds, (2, 4, 4), k=chance.randint(1, 3))]
            await db.messages.append_many("s", turn)
        case 1 if messages:
            await db.messages.delete(chance.choice(messages).id)
        case 2 if messages:
            await db.messages.truncate("s", after=chance.choice(messages).number)
        case 3:
            all_of_them = await db.messages.range("s")
            if chance.random() < 0.3:
                chance.shuffle(all_of_them)
            if all_of_them and chance.random() < 0.5:
                all_of_them.pop(chance.randrange(len(all_of_them)))
            await db.messages.replace_all("s", [*(replace(m, number=0) for m in all_of_them), Message("user", "new")])
        case 4 if calls:
            call = chance.choice(calls)
            state = chance.choice(["approval_required", "approved", "executing", "completed", "denied", "sealed"])
            await db.tool_calls.set_state("s", call.number, call.position, state)
        case 5:
            async with db.tool_calls.record("s", "aside") as recording:
                recording.result = 1
        case 6:
            await db.messages.repair("s")
        case 7 if messages:
            await db.messages.update(chance.choice(messages).id, lambda message: replace(message, content="edited"))
        case 8:
            await db.sessions.clear("s")
        case _:
            pass


async def _together(seed: int, sound: Sound, stalls: float) -> None:
    disk = MemoryDriver()
    disk.clock = now
    shared = FaultyDriver(disk, without=ORDERED)
    ways = [Stepwise(shared, f"{seed} {each}") for each in range(2)]
    async with (
        kvpersist.open(ways[0], clock=now, timeout=120) as db,
        kvpersist.open(ways[1], clock=now, timeout=120) as other,
    ):
        await db.sessions.create(id="s")
        await db.messages.append_many("s", [Message("user", "q"), asks("a", "b"), answers("a"), asks("c")])

        async def some(mine: Persistence, chance: random.Random) -> None:
            for _ in range(STEPS):
                with suppress(BadTransition, BadRequest):
                    await _any(mine, chance)

        for way in ways:
            way.stalls = stalls
        await asyncio.gather(*(some(mine, random.Random(f"{seed} does {at}")) for at, mine in enumerate((db, other))))
        for way in ways:
            way.stalls = 0.0

        await _whole(db, sound)
        await _whole(other, sound)


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("stalls", [0.0, 0.01], ids=["", "stalling"])
def test_two_processes_leave_the_session_sound_whatever_they_do(
    stalls: float, sound: Sound, monkeypatch: pytest.MonkeyPatch
) -> None:
    for seed in range(RUNS):
        monkeypatch.setattr(random, "uniform", random.Random(seed).uniform)  # the jitter between attempts
        run(_together(seed, sound, stalls))


_overtaken = OrderedTurns._overtaken


def _looks_at_nothing_again(*given: Any) -> bool:
    _overtaken(*given)
    return False


async def _tells_nobody(*given: Any, **how: Any) -> None:
    pass


@pytest.mark.parametrize(
    ("name", "planted"),
    [("_overtaken", _looks_at_nothing_again), ("_keep", _tells_nobody)],
    ids=["who was overtaken does not look again", "a rewriting is not announced"],
)
def test_the_random_runs_would_see_that(name: str, planted: Any, sound: Sound, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OrderedTurns, name, planted)
    for seed in range(PLANTED):
        monkeypatch.setattr(random, "uniform", random.Random(seed).uniform)
        try:
            run(_together(seed, sound, 0.0))
        except (AssertionError, KeyError, KvError):
            return
    pytest.fail(f"{PLANTED} runs saw nothing")
