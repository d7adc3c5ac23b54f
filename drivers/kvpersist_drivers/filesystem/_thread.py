"""Calls in a thread, awaited: one thread, one call after the other."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import TypeVar

__all__ = ["Thread"]

T = TypeVar("T")


class Thread:
    """One thread, started by its first call."""

    def __init__(self, name: str) -> None:
        self.executor = ThreadPoolExecutor(1, name)

    async def run(self, call: Callable[[], T], *, settle: bool) -> T:
        """Make the call. Cancelled before it has begun, it is never made; afterwards, with ``settle``,
        the cancellation goes on only when the call has ended.
        """
        job = self.executor.submit(call)
        future = asyncio.wrap_future(job)
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            if not job.cancel() and settle:
                while not future.done():
                    with suppress(asyncio.CancelledError):  # cancelled again: the first one is still under way
                        await asyncio.wait([future])
            if future.done() and not future.cancelled():
                future.exception()  # taken note of
            raise

    async def close(self, last: Callable[[], None]) -> None:
        """Make the calls that wait, then the ``last``, and end."""
        with suppress(RuntimeError):  # it was closed before
            await self.run(last, settle=True)
        self.executor.shutdown(wait=True)
