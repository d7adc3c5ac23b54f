"""One entry, one object: reads, writes on a condition, and what is left of deleted entries.

A condition is kept in two steps. The object is read, its version compared, and then written on the condition
that its tag is still the same; a small memory of versions and tags saves the first step.

Where a service ignores conditions on a DELETE (`Conditions.delete` is false), an entry that is deleted on a
condition is overwritten by a *tombstone*: shorter than a header, so that a listing tells it from an entry. Later
it is removed in two steps, since nothing keeps the DELETE from hitting an entry that was written meanwhile: it
is first marked as *doomed*; nobody writes over a doomed one from half a minute on, and only then whoever marked
it, nobody else, deletes it. For the same reason no entry is written blindly there unless it was seen alive lately.
"""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Final, NamedTuple
from zlib import crc32

from kvpersist.driver import ABSENT, HEADER_BYTES, Clock, Entry, Expect, packed_header, unpacked_entry
from kvpersist.errors import Busy, CommitUnknown, Conflict, CorruptRecord, KvError, Unavailable
from kvpersist_drivers.buckets._names import escaped, internal
from kvpersist_drivers.buckets._store import ANY, NEW, Changed, Condition, Conditions, Found, ObjectStore, Upload

__all__ = ["TOMBSTONE_BYTES", "Records", "Seen"]

TOMBSTONE_BYTES: Final = 19
_ATTEMPTS: Final = 8  # at a write that others come before
_REMEMBERED: Final = 4096  # versions and tags
_FRESH: Final = 600.0  # seconds for which an entry that was seen alive has no tombstone that is due
_DOOM: Final = 60_000  # milliseconds between the two steps
_STEP: Final = 1 << 14  # milliseconds to which the due times of removals are rounded
_PAUSE: Final = 0.01  # seconds, doubled with each attempt
_LATEST: Final = (1 << 48) - 1  # milliseconds


class Seen(NamedTuple):
    """What is known of an object; ``version`` is None for a tombstone, which was made at ``since``."""

    version: bytes | None
    expires_ms: int
    tag: str
    since: int = 0  # milliseconds since 1970
    doomed: bool = False


class Records:
    """The entries below one prefix of a bucket."""

    def __init__(self, store: ObjectStore, root: str, grace: float | None) -> None:
        """``grace``: seconds a tombstone stays; None: for ever."""
        self.store = store
        self.root = root
        self.able = Conditions(put=True, delete=True)
        self.grace = None if grace is None else int(grace * 1000)
        self.clock: Clock = time.time
        self._seen: OrderedDict[str, tuple[Seen, float]] = OrderedDict()  # key -> what, and when by the loop's clock
        self._doomed: dict[str, str] = {}  # key -> tag of the tombstone that was marked here
        self._filed: OrderedDict[tuple[str, int], None] = OrderedDict()  # removals that are noted

    # -- reading

    async def read(self, key: str, name: str) -> Entry | None:
        """Return the live entry, value and all."""
        found = await self.store.get(name)
        if found is None or len(found.body) == TOMBSTONE_BYTES:
            self._remember(key, None if found is None else _seen(key, found))
            return None
        entry = unpacked_entry(key, found.body)
        seen = _seen(key, found)
        self._remember(key, seen)
        return entry if self.is_live(seen) else None

    async def look(self, key: str, name: str, tag: str = "") -> Seen | None:
        """Return what is there without its value; nothing is asked if ``tag`` is what it was last seen with."""
        known = self._seen.get(key)
        if known is not None and tag and known[0].tag == tag:
            return known[0]
        found = await self.store.get(name, HEADER_BYTES)
        seen = None if found is None else _seen(key, found)
        self._remember(key, seen)
        return seen

    def is_live(self, seen: Seen | None) -> bool:
        """Whether it is an entry, and not expired."""
        if seen is None or seen.version is None:
            return False
        return not seen.expires_ms or seen.expires_ms > self.clock() * 1000

    def state(self, seen: Seen | None) -> Expect:
        """Return the version of a live entry, or ABSENT."""
        return seen.version if seen is not None and seen.version is not None and self.is_live(seen) else ABSENT

    # -- writing

    async def put(self, key: str, value: bytes, version: bytes, expires_ms: int, expect: Expect | None) -> None:
        """Store an entry. Raises Conflict, or what the store raises."""
        if expires_ms:
            await self.file(key, expires_ms)
        body = packed_header(version, expires_ms) + value

        async def write(condition: Condition) -> None:
            tag = await self.store.put(self.root + escaped(key), body, condition)
            self._remember(key, Seen(version, expires_ms, tag))

        if expect is None and (self.able.delete or not self.able.put or self._lately_alive(key)):
            await write(ANY)
        else:
            await self.replace(key, expect, version, write)

    async def delete(self, key: str, version: bytes, expect: Expect | None) -> None:
        """Remove an entry. Raises Conflict."""
        name = self.root + escaped(key)
        if expect is None:
            await self.store.delete(name)
            self._seen.pop(key, None)
            return
        if expect is ABSENT:  # an entry that expired before it was written
            await self.check(key, ABSENT)
            return

        async def write(condition: Condition) -> None:
            if self.able.delete:
                await self.store.delete(name, condition)
                self._seen.pop(key, None)
            else:
                await self._entomb(key, version, condition)

        await self.replace(key, expect, version, write)

    async def condition(self, key: str, expect: Expect | None) -> Condition:
        """Return the condition under which an object that takes long to write keeps ``expect``. Raises Conflict."""
        if expect is None and (self.able.delete or not self.able.put):
            return ANY
        seen = await self._look(key)
        if expect is not None and self.state(seen) != expect:
            raise Conflict(key, expect, self.state(seen))
        self._refuse_doomed(key, seen)
        return NEW if seen is None else ANY if expect is None and seen.version is not None else seen.tag

    async def finish(self, key: str, upload: Upload, rest: bytes, seen: Seen, expect: Expect | None) -> None:
        """Put an upload in its place, with the ``rest`` of it, as the entry that ``seen`` describes.

        Raises:
            Conflict: it is not as expected. Unavailable: it changed, though it is as expected again.
        """
        if seen.expires_ms:
            await self.file(key, seen.expires_ms)
        await upload.add(rest)
        try:
            tag = await upload.finish()
        except Changed as error:
            try:
                found = self.state(await self._look(key))
            except KvError as unread:  # as in `replace`
                raise CommitUnknown((key,), str(unread)) from unread
            if expect is not None and found != expect:
                raise Conflict(key, expect, found) from error
            where = self.store.where
            raise Unavailable(f"{where}: {key!r} changed while its value was sent; nothing was changed") from error
        self._remember(key, seen._replace(tag=tag))

    async def check(self, key: str, expect: Expect) -> None:
        """Raise Conflict unless the entry is as expected; what is remembered does not count."""
        found = self.state(await self.look(key, self.root + escaped(key)))
        if found != expect:
            raise Conflict(key, expect, found)

    async def replace(
        self, key: str, expect: Expect | None, version: bytes, write: Callable[[Condition], Awaitable[None]]
    ) -> None:
        """Call ``write`` with the condition that keeps ``expect``, again where others came first.

        Raises:
            Conflict: it is not as expected. Unavailable: it changed too often, or is being removed.
        """
        known = self._seen.get(key) if expect is not None else None  # it may be too old to write blindly
        seen = known[0] if known is not None else None
        fresh = False  # whether it was looked at in this call
        for attempt in range(_ATTEMPTS):
            if seen is None and not fresh and isinstance(expect, bytes):
                seen, fresh = await self._look(key), True
            if not fresh and seen is not None and (seen.doomed or expect not in (None, self.state(seen))):
                seen, fresh = await self._look(key), True
            if expect is not None and self.state(seen) != expect:
                raise Conflict(key, expect, self.state(seen))
            self._refuse_doomed(key, seen)
            try:
                # over what is an entry an unconditional write may go blindly, see above
                await write(NEW if seen is None else ANY if expect is None and seen.version is not None else seen.tag)
            except Changed:
                try:
                    seen, fresh = await self._look(key), True
                except KvError as error:  # what changed it may have been ours: aiohttp sends a cut request again
                    raise CommitUnknown((key,), str(error)) from error
                if seen is not None and seen.version == version:
                    return  # it was ours: a client that was handed in tried twice
                await asyncio.sleep(random.random() * _PAUSE * 2**attempt)
            else:
                return
        raise Unavailable(f"{self.store.where}: {key!r} is changed by others all the time; nothing was changed")

    async def _look(self, key: str) -> Seen | None:
        return await self.look(key, self.root + escaped(key))

    def _lately_alive(self, key: str) -> bool:
        known = self._seen.get(key)
        fresh = _FRESH if self.grace is None else min(_FRESH, self.grace / 1000)
        return known is not None and known[0].version is not None and time.monotonic() - known[1] < fresh

    def _remember(self, key: str, seen: Seen | None) -> None:
        if seen is None:
            self._seen.pop(key, None)
            return
        self._seen[key] = seen, time.monotonic()
        self._seen.move_to_end(key)
        if len(self._seen) > _REMEMBERED:
            self._seen.popitem(last=False)

    # -- what is removed later

    async def file(self, key: str, due_ms: int) -> None:
        """Note that the object may be removed from ``due_ms`` on. A note may be stale, but is never missing."""
        due = min(due_ms, _LATEST) & -_STEP
        if (key, due) in self._filed and due > self.clock() * 1000:
            return
        await self.store.put(self.root + internal(due, "k", escaped(key)), b"")
        self._filed[key, due] = None
        if len(self._filed) > _REMEMBERED:
            self._filed.popitem(last=False)

    async def remove(self, key: str, due_ms: int) -> tuple[bool, bool]:
        """Remove what expired, or was deleted ``grace`` ago.

        Returns:
            Whether an expired entry went, and whether the note of ``due_ms`` has served.
        """
        seen = await self._look(key)
        if seen is not None and seen.version is None:
            return False, await self._bury(key, seen, due_ms)
        self._doomed.pop(key, None)
        if seen is None:
            return False, True
        if self.is_live(seen):
            return False, not due_ms <= seen.expires_ms < due_ms + _STEP
        try:
            if self.able.delete or not self.able.put:
                await self.store.delete(self.root + escaped(key), seen.tag if self.able.put else ANY)
                self._seen.pop(key, None)
            else:
                await self._entomb(key, os.urandom(8), seen.tag)
        except Changed:
            return False, False
        return True, True

    async def _bury(self, key: str, seen: Seen, due_ms: int) -> bool:
        """Do the next step of removing a tombstone; whether the note of ``due_ms`` has served."""
        now = self._now()
        if self.grace is None:
            return True
        if not seen.doomed and now < seen.since + self.grace:
            if due_ms < seen.since + self.grace - _STEP:  # the note of another deletion, or of another grace
                await self.file(key, seen.since + self.grace)
                return True
            return False
        if seen.doomed and now < seen.since + _DOOM:
            return False
        mine = self._doomed.pop(key, None) == seen.tag
        if seen.doomed and now < seen.since + 2 * _DOOM:
            if mine:
                await self.store.delete(self.root + escaped(key))
                self._seen.pop(key, None)
            return mine
        with suppress(Changed):
            self._doomed[key] = await self._write_tombstone(key, os.urandom(8), seen.tag, now, doomed=True)
        return False

    async def _entomb(self, key: str, version: bytes, condition: Condition) -> None:
        now = self._now()
        if self.grace is not None:
            await self.file(key, now + self.grace)
        await self._write_tombstone(key, version, condition, now, doomed=False)

    async def _write_tombstone(self, key: str, version: bytes, condition: Condition, now: int, *, doomed: bool) -> str:
        head = (b"X" if doomed else b"T") + now.to_bytes(6, "big") + version
        tag = await self.store.put(self.root + escaped(key), head + crc32(head).to_bytes(4, "big"), condition)
        self._remember(key, Seen(None, 0, tag, now, doomed))
        return tag

    def _refuse_doomed(self, key: str, seen: Seen | None) -> None:
        """Raise Busy where a DELETE may be under way."""
        if seen is not None and seen.doomed and seen.since + _DOOM // 2 <= self._now() < seen.since + 3 * _DOOM:
            raise Busy(f"{self.store.where}: {key!r} is being removed; nothing was changed: try again in a minute")

    def _now(self) -> int:
        return int(self.clock() * 1000)


def _seen(key: str, found: Found) -> Seen:
    body = found.body
    if len(body) == TOMBSTONE_BYTES:
        if body[:1] not in b"TX" or crc32(body[:15]) != int.from_bytes(body[15:], "big"):
            raise CorruptRecord(key, "its tombstone is not what was written")
        return Seen(None, 0, found.tag, int.from_bytes(body[1:7], "big"), body[:1] == b"X")
    entry = unpacked_entry(key, body[:HEADER_BYTES])
    return Seen(entry.version, int.from_bytes(body[8:16], "big"), found.tag)
