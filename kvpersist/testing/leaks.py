"""Find stores that were opened and not closed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from kvpersist.bytes_level import left_open

__all__ = ["no_leaks"]


@contextmanager
def no_leaks() -> Iterator[None]:
    """Raise AssertionError if the block leaves a store open; it names each, and the line that opened it.

    Meant are stores opened by a URL, a path or options: one over a driver of yours holds nothing that
    the driver's own ``close`` does not release.
    """
    before = set(left_open())
    yield
    leaked = [f"{store.where}, opened at {store.opener}" for store in left_open() if store not in before]
    if leaked:
        raise AssertionError("left open: " + "; ".join(sorted(leaked)))
