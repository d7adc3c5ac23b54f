"""Puts of several stores that check what another one changes, on a driver that has them in one statement."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Any

from kvpersist.driver import Check, Committed, Put
from kvpersist.errors import Conflict
from kvpersist.testing import batch

__all__ = ["follow_what_they_checked"]


async def follow_what_they_checked(driver: Any, opened: Callable[[], AbstractAsyncContextManager[Any]]) -> None:
    """Each change also writes what the puts write, so whoever reads both at once sees them agree.

    ``opened``: one more driver of the same entries.
    """
    await driver.commit([batch(Put("c:held", b"v"), Put("c:x", b"version0"), version=b"version0")])
    wrong: list[object] = []
    known = b"version0"
    done = asyncio.Event()

    async def put(number: int) -> None:
        async with opened() as other:
            while not done.is_set():
                version = known
                outcomes = await other.commit(
                    [
                        batch(Check("c:held", version), Put("c:x", version), Put(f"c:{number}.{n}", b"v"))
                        for n in range(4)
                    ]
                )
                wrong.extend(o for o in outcomes if not isinstance(o, Committed | Conflict))

    async def look() -> None:
        while not done.is_set():
            held, x = await driver.get(["c:held", "c:x"])
            assert held is not None and x is not None
            if held.version != x.value:
                wrong.append((held.version, x.value))

    async def change() -> None:
        nonlocal known
        try:
            async with opened() as other:
                for turn in range(1, 41):
                    version = b"v%07d" % turn
                    changed = batch(Put("c:held", b"v", known), Put("c:x", version), version=version)
                    wrong.extend(o for o in await other.commit([changed]) if not isinstance(o, Committed))
                    known = version
        finally:
            done.set()

    async with asyncio.timeout(60):
        await asyncio.gather(change(), look(), *(put(number) for number in range(4)))

    assert wrong == []
