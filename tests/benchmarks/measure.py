"""Timing two sides against each other on a machine that has other things to do.

A slice is a few dozen milliseconds of one side. Sides take turns slice by slice, and only ratios
within one round are compared: what disturbs the machine for longer than a slice disturbs both
sides. The order within a turn is drawn anew: checkpoints come after a fixed number of pages, and
with any regular order they fall on the same side every time (a floor measured 0.75 of itself). A
line's figure is the median over its rounds.
"""

from __future__ import annotations

import asyncio
import gc
import os
import random
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from statistics import median
from typing import Any, TypeVar

import msgspec

__all__ = ["Figure", "Line", "Plan", "Side", "each", "measure", "over", "pinned", "spread"]

P = TypeVar("P")
SLACK = 1.25  # for lines of sequential awaits, whose hand-over between threads is the scheduler's business


class Plan(msgspec.Struct, frozen=True):
    """How much to measure."""

    rounds: int = 7
    turns: int = 5  # of each side in a round
    scale: float = 1.0  # of the operations in a slice
    load: float = 1.0  # of what is stored beforehand


class Side(msgspec.Struct, frozen=True):
    """One way of doing it: ``prepare`` makes what a slice needs, untimed; ``run`` is timed."""

    prepare: Callable[[], Any]
    run: Callable[[Any], Awaitable[None]]
    operations: int  # in one slice


def over(ours: str = "kvpersist", floor: str = "floor") -> Callable[[dict[str, float]], float]:
    """The quotient of two sides' seconds."""
    return lambda took: took[ours] / took[floor]


class Line(msgspec.Struct, frozen=True):
    """A goal and what it is judged by. ``goal`` None: printed, not judged."""

    row: str
    what: str
    goal: float | None
    sides: dict[str, Side]
    ratio: Callable[[dict[str, float]], float] = over()
    sequential: bool = False  # pinned to one core, judged with SLACK
    setting: str = "normal"


class Figure(msgspec.Struct, frozen=True):
    """What was found; microseconds per operation are medians, and only show the scale."""

    row: str
    what: str
    setting: str
    goal: float | None
    ratio: float
    low: float
    high: float
    cpu: float  # the same quotient of processor seconds
    slack: float
    reached: bool | None
    microseconds: dict[str, float]


async def measure(line: Line, plan: Plan) -> Figure:
    """Run ``plan.rounds`` rounds of ``line`` after a turn that is not counted."""
    names = list(line.sides)
    order = random.Random(11)
    ratios: list[float] = []
    processor: list[float] = []
    each_took: dict[str, list[float]] = {name: [] for name in names}
    with pinned(line.sequential):
        for name in names:
            await _slice(line.sides[name])
        gc.collect()
        gc.freeze()  # the stored fixtures are no garbage collector's business while timing
        for _ in range(plan.rounds):
            took, used = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0)
            for _ in range(plan.turns):
                for name in order.sample(names, len(names)):
                    wall, cpu = await _slice(line.sides[name])
                    took[name] += wall
                    used[name] += cpu
            for name in names:
                each_took[name].append(took[name] / plan.turns * 1e6)
            ratios.append(line.ratio(took))
            processor.append(line.ratio(used))
        gc.unfreeze()
    slack = SLACK if line.sequential else 1.0
    middle = median(ratios)
    return Figure(
        row=line.row,
        what=line.what,
        setting=line.setting,
        goal=line.goal,
        ratio=middle,
        low=min(ratios),
        high=max(ratios),
        cpu=median(processor),
        slack=slack,
        reached=None if line.goal is None else middle <= line.goal * slack,
        microseconds={name: median(values) for name, values in each_took.items()},
    )


async def _slice(side: Side) -> tuple[float, float]:
    """Wall and processor seconds per operation of one slice."""
    prepared = side.prepare()
    wall, cpu = time.perf_counter(), time.process_time()
    await side.run(prepared)
    return (time.perf_counter() - wall) / side.operations, (time.process_time() - cpu) / side.operations


async def each(call: Callable[[P], Awaitable[Any]], items: Sequence[P], tasks: int) -> None:
    """Await ``call`` for every item, from ``tasks`` tasks that each loop over a share."""
    if tasks == 1:
        for item in items:
            await call(item)
        return

    async def share(start: int) -> None:
        for item in items[start::tasks]:
            await call(item)

    await asyncio.gather(*[share(start) for start in range(tasks)])


@contextmanager
def pinned(wanted: bool) -> Iterator[None]:
    """Keep every thread of this process on one core, where the system can."""
    if not wanted or not hasattr(os, "sched_setaffinity"):
        yield
        return
    cores = os.sched_getaffinity(0)
    _place({min(cores)})
    try:
        yield
    finally:
        _place(cores)


def _place(cores: set[int]) -> None:
    for thread in os.listdir("/proc/self/task"):
        os.sched_setaffinity(int(thread), cores)


def spread(figures: Sequence[Figure]) -> float:
    """How noisy it was: the median over the lines of (max - min) / median."""
    return median((figure.high - figure.low) / figure.ratio for figure in figures) if figures else 0.0
