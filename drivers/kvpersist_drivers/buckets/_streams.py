"""Values that are read and written piece by piece."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Self

from kvpersist.driver import HEADER_BYTES, Entry, Expect, packed_header, unpacked_entry
from kvpersist.errors import Conflict, Unavailable, ValueTooLarge
from kvpersist_drivers.buckets._order import Job
from kvpersist_drivers.buckets._records import TOMBSTONE_BYTES, Records, Seen
from kvpersist_drivers.buckets._store import Changed, Stream

__all__ = ["Pieces", "read", "write"]

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
        await close(self._rest)


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
            await close(stream.pieces)
            return None
        entry = unpacked_entry(key, head[:HEADER_BYTES])
    except BaseException:
        await close(stream.pieces)
        raise
    return entry, Pieces(head[HEADER_BYTES:], stream.pieces)


async def close(pieces: AsyncIterator[bytes]) -> None:
    ends = getattr(pieces, "aclose", None)
    if ends is not None:
        await ends()


async def write(
    records: Records, job: Job, key: str, pieces: AsyncIterator[bytes], seen: Seen, expect: Expect | None, name: str
) -> None:
    """Store the pieces as one value under the version and expiry of ``seen``.

    Raises:
        Conflict, ValueTooLarge: nothing was changed.
    """
    store = records.store
    version = seen.version
    assert version is not None
    waiting = bytearray(packed_header(version, seen.expires_ms))
    upload = None
    sent = 0
    try:
        async for piece in pieces:
            waiting += piece
            while len(waiting) > store.part:
                if upload is None:
                    upload = await store.upload(name, await records.condition(key, expect))
                await upload.add(bytes(waiting[: store.part]))
                del waiting[: store.part]
                sent += 1
                if sent == _PARTS:
                    limit = _PARTS * store.part - HEADER_BYTES
                    raise ValueTooLarge(key, limit + len(waiting), limit)
        if upload is not None:
            await upload.add(bytes(waiting))
            if seen.expires_ms:
                await records.file(key, seen.expires_ms)
        job.sending = True
        if upload is None:
            await records.put(key, bytes(waiting[HEADER_BYTES:]), version, seen.expires_ms, expect)
        else:
            records.wrote(key, seen._replace(tag=await upload.finish()))
    except Changed as error:
        if upload is not None:
            await upload.abort()
        found = records.state(await records.look(key, name))
        if expect is not None and found != expect:
            raise Conflict(key, expect, found) from error
        raise Unavailable(f"{store.where}: {key!r} changed while its value was sent; nothing was changed") from error
    except BaseException:  # cancelled too: no part may stay
        if upload is not None:
            await upload.abort()
        raise
    finally:
        job.sending = False
