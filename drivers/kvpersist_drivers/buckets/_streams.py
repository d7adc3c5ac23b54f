"""Values that are read and written piece by piece."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Self

from kvpersist.driver import HEADER_BYTES, Entry, Expect, unpacked_entry
from kvpersist.errors import KvError, ValueTooLarge
from kvpersist_drivers.buckets._records import TOMBSTONE_BYTES, Records
from kvpersist_drivers.buckets._store import Stream, Upload

__all__ = ["Pieces", "give_up", "read", "send"]

_PARTS = 10_000  # of one upload: S3 takes no more


class Pieces:
    """The pieces of a value, from behind its header on."""

    def __init__(self, first: bytes, rest: AsyncIterator[bytes]) -> None:
        """``first`` is what came together with the header."""
        self._first = first
        self._rest = rest

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> bytes:
        first, self._first = self._first, b""
        return first or await anext(self._rest)

    async def aclose(self) -> None:
        """End the request, whatever is left of it."""
        await _close(self._rest)


async def read(key: str, stream: Stream) -> tuple[Entry, Pieces] | None:
    """Return the entry without its value, and the value's pieces; None for a tombstone."""
    head = b""
    try:
        while len(head) < HEADER_BYTES:
            head += await anext(stream.pieces)
    except StopAsyncIteration:
        pass
    try:
        if len(head) == TOMBSTONE_BYTES:
            await _close(stream.pieces)
            return None
        entry = unpacked_entry(key, head[:HEADER_BYTES])
    except BaseException:  # cancelled too: the pieces may not stay open
        await _close(stream.pieces)
        raise
    return entry, Pieces(head[HEADER_BYTES:], stream.pieces)


async def _close(pieces: AsyncIterator[bytes]) -> None:
    ends = getattr(pieces, "aclose", None)
    if ends is not None:
        await ends()


async def send(
    records: Records, key: str, name: str, head: bytes, pieces: AsyncIterator[bytes], expect: Expect | None
) -> tuple[Upload | None, bytes] | KvError:
    """Send the header and the pieces, but for what is left at the end.

    Returns:
        The upload, None if all of it is left, and what is left. Or why nothing was stored: Conflict, say.

    Raises:
        Whatever ``pieces`` raises.
    """
    part = records.store.part
    left = bytearray(head)
    upload: Upload | None = None
    sent = 0
    try:
        async for piece in pieces:
            left += piece
            while len(left) > part:
                try:
                    if upload is None:
                        upload = await records.store.upload(name, await records.condition(key, expect))
                    if sent == _PARTS - 1:
                        limit = _PARTS * part - len(head)
                        raise ValueTooLarge(key, limit + len(left), limit)
                    await upload.add(bytes(left[:part]))
                except KvError as error:
                    await give_up(upload)
                    return error
                del left[:part]
                sent += 1
    except BaseException:  # cancelled too: no part may stay
        await give_up(upload)
        raise
    return upload, bytes(left)


async def give_up(upload: Upload | None) -> None:
    """Remove what was sent; the service does where it cannot be reached."""
    if upload is not None:
        with suppress(KvError):
            await upload.abort()
