"""An event loop with a time of its own, and a driver whose single steps take a part of that: schedules by a seed."""

from __future__ import annotations

import asyncio
import random
import selectors
from collections.abc import Coroutine, Sequence
from typing import Any, TypeVar

from msgspec.structs import replace

from kvpersist.driver import Batch, Committed, Driver, Entry
from kvpersist.errors import Conflict, KvError

__all__ = ["Stepwise", "now", "run"]

T = TypeVar("T")

_BEGINNING = 1.7e9  # seconds since 1970


class _Selector(selectors.SelectSelector):
    """Nothing happens outside: who waits for a time has waited."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:
            raise RuntimeError("everybody waits for somebody")
        self.now += max(timeout, 0.0)
        return []


class _Loop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self._selector_of_mine = _Selector()
        super().__init__(self._selector_of_mine)

    def time(self) -> float:
        return self._selector_of_mine.now


def run(main: Coroutine[Any, Any, T]) -> T:
    """Run ``main`` in a loop where an hour of waiting takes no time."""
    with asyncio.Runner(loop_factory=_Loop) as runner:
        return runner.run(main)


def now() -> float:
    """The time of the running loop, seconds since 1970."""
    return _BEGINNING + asyncio.get_running_loop().time()


class Stepwise:
    """One process's way to a shared store: each key, page or operation is a step, which takes about 10 ms.

    ``stalls``: how many of the steps take 8 s, which is longer than others wait for anybody.
    """

    def __init__(self, shared: Driver, seed: str) -> None:
        self.capabilities = replace(shared.capabilities, coalesce="none")
        self.stalls = 0.0
        self._shared = shared
        self._chance = random.Random(seed)

    async def get(self, keys: Sequence[str]) -> list[Entry | None]:
        found: list[Entry | None] = []
        for key in keys:
            await self._step()
            found += await self._shared.get([key])
        return found

    async def scan(self, start: str | None, end: str | None, **options: Any) -> list[Entry]:
        await self._step()
        return await self._shared.scan(start, end, **options)

    async def commit(self, batches: Sequence[Batch]) -> list[Committed | KvError]:
        return [await self._in_order(batch) for batch in batches]

    async def _in_order(self, batch: Batch) -> Committed | KvError:
        for position, op in enumerate(batch.ops):
            await self._step()
            [outcome] = await self._shared.commit([Batch((op,), batch.version)])
            if isinstance(outcome, Conflict):
                return Conflict(outcome.key, outcome.expected, outcome.found, position)
            if isinstance(outcome, KvError):
                return outcome
        return Committed(batch.version)

    async def _step(self) -> None:
        stalled = self._chance.random() < self.stalls
        await asyncio.sleep(8.0 if stalled else self._chance.expovariate(100))

    async def close(self) -> None:
        """The shared store stays open."""
