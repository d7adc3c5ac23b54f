"""What the driver needs of a service: objects with tags, written on a condition, listed in their order.

A *tag* changes with each write of an object: an ETag, or a generation. Names here are whole: the prefix of the
store and the escaped key.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Literal, NamedTuple, Protocol

from kvpersist.errors import KvError

__all__ = ["ANY", "NEW", "Changed", "Condition", "Found", "Listed", "ObjectStore", "Stream", "Upload"]

NEW: Literal["new"] = "new"
"""The condition that there is no object; every other text is the tag that must be there."""

ANY = None
"""No condition."""

Condition = str | None


class Changed(Exception):
    """The condition of a write did not hold, or another write was under way; nothing was changed."""


class Found(NamedTuple):
    """An object's bytes, or the first of them, and its tag."""

    body: bytes
    tag: str


class Listed(NamedTuple):
    """An object as a listing tells of it."""

    name: str
    size: int
    tag: str


class Stream(NamedTuple):
    """An object that is read piece by piece; ``pieces`` ends the request when it is closed."""

    tag: str
    pieces: AsyncIterator[bytes]


class Upload(Protocol):
    """An object that is written piece by piece, and is there when `finish` returns and not before."""

    async def add(self, piece: bytes) -> None:
        """Send the next piece; all but the last have the store's ``part`` bytes."""
        ...

    async def finish(self) -> str:
        """Put the object in its place and return its tag. Raises Changed."""
        ...

    async def abort(self) -> None:
        """Leave nothing."""
        ...


class ObjectStore(Protocol):
    """One service. Every method raises KvError, and CommitUnknown where a write's answer was lost."""

    calls: int  # requests sent
    server: str  # what answers, for people
    where: str  # the same as an address, without secrets
    part: int  # bytes of a piece of an upload

    async def get(self, name: str, first: int | None = None) -> Found | None:
        """Return an object, or its first bytes; None where there is none."""
        ...

    async def put(self, name: str, body: bytes, condition: Condition = ANY) -> str:
        """Write an object and return its tag. Raises Changed."""
        ...

    async def delete(self, name: str, condition: Condition = ANY) -> None:
        """Remove an object; one that is not there is no error without a condition. Raises Changed."""
        ...

    async def list(self, prefix: str, start: str, limit: int) -> tuple[list[Listed], bool]:
        """Return at most ``limit`` objects whose names begin with ``prefix`` and are not below ``start``.

        ``start`` begins with ``prefix``. The second answer is whether there may be more.
        """
        ...

    async def read(self, name: str) -> Stream | None: ...

    async def upload(self, name: str, condition: Condition) -> Upload: ...

    async def close(self) -> None: ...


class Conditions(NamedTuple):
    """Which conditions a service honours."""

    put: bool
    delete: bool


def told(error: BaseException) -> str:
    """Return the first line of what a client library says."""
    if isinstance(error, KvError):
        return str(error)
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__
