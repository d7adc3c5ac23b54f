"""What the tests do again and again."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import pytest

from kvpersist.driver import Batch, Committed, Driver, Entry, Op, Put
from kvpersist.errors import Conflict, KvError

__all__ = [
    "LONG_AWAY",
    "assert_conflict",
    "batch",
    "fill",
    "in_byte_order",
    "limit_or_skip",
    "needs",
    "outcome_of",
    "put",
    "values_of",
]

LONG_AWAY: Final = 4_102_444_800.0  # 2100-01-01


def batch(*ops: Op, version: bytes | None = None) -> Batch:
    """Make a batch of ``ops``, under a version of its own unless one is given."""
    return Batch(ops, os.urandom(8) if version is None else version)


async def put(driver: Driver, key: str, value: bytes, expires_at: float | None = None) -> bytes:
    """Write one entry and return its version."""
    one = batch(Put(key, value, None, expires_at))
    [outcome] = await driver.commit([one])
    assert outcome == Committed(one.version)
    return one.version


async def fill(driver: Driver, items: Mapping[str, bytes]) -> None:
    """Write each of ``items``, as a batch of its own."""
    batches = [batch(Put(key, value)) for key, value in items.items()]
    for at in range(0, len(batches), 500):
        outcomes = await driver.commit(batches[at : at + 500])
        assert outcomes == [Committed(one.version) for one in batches[at : at + 500]]


async def outcome_of(driver: Driver, one: Batch) -> Committed | KvError:
    """What came of ``one``, answered or raised."""
    try:
        [outcome] = await driver.commit([one])
    except KvError as error:
        return error
    return outcome


def assert_conflict(
    outcome: Committed | KvError, key: str, expected: Any, found: Any = None, position: int = 0
) -> None:
    """``found`` may be left unsaid by the driver (None), and is not looked at where the test gives None."""
    assert isinstance(outcome, Conflict), outcome
    assert (outcome.key, outcome.expected, outcome.position) == (key, expected, position)
    assert found is None or outcome.found is None or outcome.found == found


def values_of(entries: Sequence[Entry | None]) -> list[bytes | None]:
    """Their values, None where there is no entry."""
    return [None if entry is None else entry.value for entry in entries]


def in_byte_order(keys: Iterable[str]) -> list[str]:
    """As drivers order keys: by their bytes."""
    return sorted(keys, key=str.encode)


def limit_or_skip(declared: int | None) -> int:
    """A limit that can be tried; the test is skipped where there is none."""
    if declared is None:
        pytest.skip("declares no limit")
    if declared > 64 << 20:
        pytest.skip("the declared limit is too large to try")
    return declared


def needs(claimed: bool, capability: str) -> None:
    """Skip the test where a capability is not claimed."""
    if not claimed:
        pytest.skip(f"does not claim {capability}")
