"""The funnel: one queue per parent and process, through which everything below a parent is written.

`Log` and the agent's sessions share it: both build one batch from the state of a parent and some
items, and the version of a small record of the parent decides between writers.
"""

from __future__ import annotations

import asyncio
import random
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final, Generic, TypeVar, cast

import msgspec

from kvpersist.driver import Op
from kvpersist.errors import Conflict, DeadlineExceeded, KvError, StoreClosed
from kvpersist.lane import own_instance
from kvpersist.store import Store

__all__ = ["Built", "Funnel"]

S = TypeVar("S")  # what a funnel remembers of a parent
I = TypeVar("I")  # noqa: E741  # one item given to a funnel
O = TypeVar("O")  # noqa: E741  # its answer

_MAX_OPERATIONS: Final = 512  # of one round
_IDLE_PARENTS: Final = 4096  # whose state is remembered
_SHORTEST: Final = 0.001  # seconds; an attempt counts as at least that long
_AMENDED: Final = 10.0  # seconds to try to mend a stat, where the store has no timeout
_DOUBLINGS: Final = 4  # of the wait after a conflict
_LONGEST: Final = 0.25  # seconds of that wait
_POLITE: Final = 1.0  # seconds after a conflict in which every round begins with a short pause


class Built(msgspec.Struct, Generic[S, O], gc=False):
    """What one round wants to write.

    Attributes:
        ops: one batch; empty: nothing to write.
        after: makes the parent's state once the batch is stored under the version it is given.
        results: one answer, or error, per item.
        stands: without atomic batches: how many leading operations make the items stand. A conflict
            at a later one (the stat) does not undo them. None: all of them; 0: they are written already,
            and no failure of the operations undoes them.
        amends: items that mend the stat after such a conflict.
        claims: keys that only one item (by position) of the round wants to be free.
    """

    ops: list[Op]
    after: Callable[[bytes], S]
    results: Sequence[O | KvError]
    stands: int | None = None
    amends: Sequence[Any] = ()
    claims: dict[str, int] | None = None


class _Call(Generic[I, O]):
    """One submitted item. The leader's has no ``future``: its answer stays in ``answer``."""

    __slots__ = ("answer", "future", "item", "since")

    def __init__(self, item: I, since: float, future: asyncio.Future[O] | None) -> None:
        self.item, self.since, self.future = item, since, future
        self.answer: O | BaseException | None = None

    def settle(self, answer: O | BaseException) -> None:
        future = self.future
        if future is None:
            self.answer = answer
        elif future.done():  # its caller was cancelled
            return
        elif isinstance(answer, BaseException):
            future.set_exception(own_instance(answer))
        else:
            future.set_result(answer)


class _Lane(Generic[S, I, O]):
    __slots__ = ("busy", "polite_until", "scale", "state", "waiting")

    def __init__(self) -> None:
        self.busy = False
        self.polite_until = 0.0  # by the loop's clock
        self.scale = 0.0  # seconds that a lost attempt took
        self.state: S | None = None
        self.waiting: deque[_Call[I, O]] = deque()


class Funnel(Generic[S, I, O]):
    """Turns concurrent writes below one parent into few batches, each built on the state before it.

    A call that finds its parent idle builds and commits in the caller, alone; those that arrive
    meanwhile share the next batch, up to 512 operations. The batch is conditional on the state
    it was built from; after a conflict the state is read again and the batch built anew, with full
    jitter between attempts, until the store's timeout has passed since the item was submitted. For a
    second after a conflict every round begins with a pause about as long as an attempt, so that a
    process which does not stop writing cannot keep the others from it.
    An item that fails by itself does not fail the others of its batch, and nobody's cancellation
    reaches another caller's item; a cancelled item may or may not have been written.
    """

    def __init__(
        self,
        store: Store,
        load: Callable[[str], Awaitable[S]],
        build: Callable[[str, S, list[I]], Awaitable[Built[S, O]]],
        *,
        at_once: Callable[[str, S, list[I]], Built[S, O] | None] | None = None,
        lost: Callable[[str, Built[S, O], Conflict], Awaitable[tuple[int, KvError] | None]] | None = None,
        partly: Callable[[str, Built[S, O], Sequence[I], Conflict], None] | None = None,
        stand: Callable[[str, Built[S, O], Sequence[I]], Awaitable[bool]] | None = None,
        weigh: Callable[[I], int] | None = None,
        max_ops: int = _MAX_OPERATIONS,
        max_idle: int = _IDLE_PARENTS,
        what: str = "append",
    ) -> None:
        """
        Args:
            load: reads the state of a parent; what it raises fails the items of the round.
            build: makes one batch of some items; it may read. It must not change the state it is given.
            at_once: does what ``build`` does for items that need no reading; None: they do.
            lost: is told of a conflict before the round is built again; it may name the item (by position)
                that the conflict belongs to, and the error this item fails with.
            partly: without atomic batches, is told which items a conflict cut in two, after some operations
                of theirs; it may change them to what is left.
            stand: is asked, after a conflict at the stat alone, whether the items stand; if not, it has changed
                them to what is left, and the round is built again.
            weigh: about how many operations an item becomes; 1 where it is left out.
        """
        self._store = store
        self._load = load
        self._build = build
        self._at_once = at_once
        self._lost = lost
        self._partly = partly
        self._stand = stand
        self._weigh = weigh
        self._max_ops = max_ops
        self._max_idle = max_idle
        self._what = what
        self._atomic = store.capabilities.atomic_batch != "none"
        self._is_simple = self._atomic and at_once is not None and lost is None  # most calls are one commit
        self._lanes: OrderedDict[str, _Lane[S, I, O]] = OrderedDict()
        self._tasks: set[asyncio.Task[None]] = set()

    async def submit(self, parent: str, item: I) -> O:
        """Write ``item`` below ``parent`` and return its answer.

        Raises:
            DeadlineExceeded: other writers won every time until the store's timeout; nothing was changed.
            KvError: what load, build or the commit raised.
        """
        self._store._check()  # before the queue is joined: it belongs to the store's loop and process
        lane = self._lanes.get(parent)
        if lane is None:
            lane = self._new_lane(parent)
        else:
            self._lanes.move_to_end(parent)
        loop = asyncio.get_running_loop()
        if lane.busy:
            future: asyncio.Future[O] = loop.create_future()
            lane.waiting.append(_Call(item, loop.time(), future))
            return await future
        began = loop.time()
        lane.busy = True
        try:
            state = lane.state
            if state is not None and self._is_simple and lane.polite_until <= began:
                built = cast("Callable[..., Built[S, O] | None]", self._at_once)(parent, state, [item])
                if built is not None and built.ops:
                    lane.state = None  # until it is known what is stored now
                    try:
                        version = await self._store._commit(built.ops)
                    except Conflict:
                        await self._lost_to_another(lane, 0, loop.time() - began)
                    else:
                        lane.state = built.after(version)
                        return cast("O", built.results[0])
            call: _Call[I, O] = _Call(item, began, None)
            await self._round(parent, lane, [call])
        finally:
            if lane.waiting:
                self._hand_over(parent, lane)
            else:
                lane.busy = False
        answer = call.answer
        if isinstance(answer, BaseException):
            raise answer
        return cast("O", answer)

    def cached(self, parent: str) -> S | None:
        """What is remembered of ``parent``, which another process may have changed since."""
        lane = self._lanes.get(parent)
        return None if lane is None else lane.state

    def remember(self, parent: str, state: S) -> None:
        """Spare the first round the reading of a state that is known."""
        lane = self._lanes.get(parent) or self._new_lane(parent)
        if not lane.busy:
            lane.state = state

    def forget(self, parent: str) -> None:
        """Let the next round read the state of ``parent`` again."""
        lane = self._lanes.get(parent)
        if lane is not None:
            lane.state = None

    def _new_lane(self, parent: str) -> _Lane[S, I, O]:
        lane = self._lanes[parent] = _Lane[S, I, O]()
        if len(self._lanes) > self._max_idle:
            oldest = next((key for key, other in self._lanes.items() if not other.busy and other is not lane), None)
            if oldest is not None:
                del self._lanes[oldest]
        return lane

    def _hand_over(self, parent: str, lane: _Lane[S, I, O]) -> None:
        """The leader is done: whoever came meanwhile is served by a task, so that it need not wait for them."""
        task = asyncio.get_running_loop().create_task(self._drain(parent, lane))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _drain(self, parent: str, lane: _Lane[S, I, O]) -> None:
        try:
            while lane.waiting:
                calls = self._take(lane)
                if calls:
                    try:
                        await self._round(parent, lane, calls)
                    except Exception as error:  # noqa: BLE001  # it belongs to the callers, and the lane goes on
                        for call in calls:
                            call.settle(error)
                    except BaseException:  # the loop is being closed
                        for call in calls:
                            call.settle(StoreClosed("the event loop was closed: open the store again"))
                        raise
                await asyncio.sleep(0)  # callers answered a moment ago submit again, and share the next batch
        finally:
            lane.busy = False
            for call in lane.waiting:
                call.settle(StoreClosed("the event loop was closed: open the store again"))
            lane.waiting.clear()

    def _take(self, lane: _Lane[S, I, O]) -> list[_Call[I, O]]:
        calls: list[_Call[I, O]] = []
        room = self._max_ops
        waiting = lane.waiting
        while waiting:
            call = waiting[0]
            if call.future is not None and call.future.done():  # cancelled before it was taken
                waiting.popleft()
                continue
            room -= 1 if self._weigh is None else self._weigh(call.item)
            if calls and room < 0:
                break
            calls.append(waiting.popleft())
        return self._in_time(calls)

    async def _round(self, parent: str, lane: _Lane[S, I, O], calls: list[_Call[I, O]]) -> None:
        """Write some items as one batch and settle each; raises what concerns all that are left."""
        attempt = 0
        loop = asyncio.get_running_loop()
        if lane.polite_until > loop.time():  # another process writes here too: give it a moment between two commits
            await asyncio.sleep(random.uniform(0, lane.scale))
        while calls:
            built: Built[S, O] | None = None
            began = loop.time()
            try:
                state = lane.state
                if state is None:
                    state = lane.state = await self._load(parent)
                items = [call.item for call in calls]
                built = None if self._at_once is None else self._at_once(parent, state, items)
                if built is None:
                    built = await self._build(parent, state, items)
                if built.ops:
                    version = await self._store._commit(built.ops)
                    lane.state = built.after(version)
            except Conflict as conflict:
                lane.state = None
                blamed = None if built is None or self._lost is None else await self._lost(parent, built, conflict)
                if blamed is not None:
                    calls.pop(blamed[0]).settle(blamed[1])
                    continue
                if built is not None and self._stands(built, conflict):
                    items = [call.item for call in calls]
                    if self._stand is not None and not await self._stand(parent, built, items):
                        continue
                    await self._amend(parent, lane, built.amends)
                else:
                    if built is not None and self._partly is not None and conflict.position > 0:
                        self._partly(parent, built, [call.item for call in calls], conflict)
                    await self._lost_to_another(lane, attempt, loop.time() - began)
                    attempt += 1
                    calls[:] = self._in_time(calls)
                    continue
            except BaseException as error:  # also a cancellation: what is stored now is not known
                lane.state = None
                if not (isinstance(error, KvError) and not self._atomic and built is not None and built.stands == 0):
                    raise
            for call, answer in zip(calls, built.results, strict=True):
                call.settle(answer)
            return

    async def _lost_to_another(self, lane: _Lane[S, I, O], attempt: int, took: float) -> None:
        lane.polite_until, lane.scale = asyncio.get_running_loop().time() + _POLITE, min(took, _LONGEST)
        await _give_way(attempt, took)

    def _stands(self, built: Built[S, O], conflict: Conflict) -> bool:
        return not self._atomic and built.stands is not None and conflict.position >= built.stands

    async def _amend(self, parent: str, lane: _Lane[S, I, O], amends: Sequence[I]) -> None:
        """Mend the stat of items that stand. Given up after the store's timeout: fsck counts again."""
        loop = asyncio.get_running_loop()
        latest = loop.time() + (_AMENDED if self._store.timeout is None else self._store.timeout)
        attempt = 0
        while amends and loop.time() < latest:
            began = loop.time()
            try:
                state = await self._load(parent)
                built = await self._build(parent, state, list(amends))
                if built.ops:
                    state = built.after(await self._store._commit(built.ops))
            except Conflict:
                await _give_way(attempt, loop.time() - began)
                attempt += 1
            except KvError:  # the items are stored, which is what their callers asked for
                return
            else:
                lane.state = state
                return

    def _in_time(self, calls: list[_Call[I, O]]) -> list[_Call[I, O]]:
        """Fail the calls whose time is over; return the others."""
        timeout = self._store.timeout
        if timeout is None or not calls:
            return calls
        latest = asyncio.get_running_loop().time() - timeout
        for call in calls:
            if call.since <= latest:
                call.settle(DeadlineExceeded(self._what, timeout))
        return [call for call in calls if call.since > latest]


async def _give_way(attempt: int, took: float) -> None:
    """Wait with full jitter after a conflict, up to 16 times as long as the attempt took (seconds).

    A fixed scale would be too short for a bucket, and on a file so long that a loser, asleep, never
    meets the moment between two commits of a writer that does not pause.
    """
    scale = max(took, _SHORTEST) * 2 ** min(attempt, _DOUBLINGS)
    await asyncio.sleep(random.uniform(0, min(_LONGEST, scale)))
