"""Several keys at once: buffered writes that are committed as one batch."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from typing import Any, Final, Protocol, cast

from kvpersist import codec, keys
from kvpersist.driver import ABSENT, Capabilities, Check, Clock, Delete, Entry, Expect, Op, Put
from kvpersist.errors import BadRequest, Conflict, Unsupported

__all__ = ["Transaction", "backoff", "jitter"]

_FIRST_WAIT: Final = 0.002  # seconds, upper bound of the first wait after a lost race; doubled each time
_LONGEST_WAIT: Final = 0.25  # seconds


class _Store(Protocol):
    """What a transaction needs of the store it belongs to."""

    capabilities: Capabilities
    clock: Clock
    codec: codec.CodecName
    where: str

    async def _entries(self, keys: Sequence[str]) -> list[Entry | None]: ...
    async def _commit(self, ops: Sequence[Op]) -> bytes: ...
    def _key(self, key: str) -> str: ...
    def _may_write(self, key: str, raw: bool) -> None: ...
    def _expiry(self, ttl: float | None) -> float | None: ...


class Transaction:
    """Buffered writes of one `Store.atomic` block; what is read here is checked at the commit."""

    def __init__(self, store: _Store) -> None:
        self.store = store
        self._seen: dict[str, Entry | None] = {}
        self._staged: dict[str, Op] = {}
        self._ended = False

    async def get(self, key: str, default: Any = None) -> Any:
        """As `Store.get`, and the block fails at its end if somebody changes it meanwhile."""
        [entry] = await self._entries([self.store._key(key)])
        return default if entry is None else codec.decode_plain(key, entry.value)

    def put(self, key: str, value: Any, *, ttl: float | None = None, raw: bool = False) -> None:
        """Store ``value`` at the end of the block."""
        self.store._may_write(key, raw)
        self._stage((Put(key, codec.encode_plain(key, value, self.store.codec), None, self.store._expiry(ttl)),))

    def delete(self, key: str, *, raw: bool = False) -> None:
        """Remove the key at the end of the block."""
        self.store._may_write(key, raw)
        self._stage((Delete(key),))

    async def _entries(self, keys: Sequence[str]) -> list[Entry | None]:
        unread = [key for key in dict.fromkeys(keys) if key not in self._seen and not self._writes(key)]
        for key, entry in zip(unread, await self.store._entries(unread), strict=True):
            self._seen.setdefault(key, entry)  # a read beside this one may have answered: what was used is checked
        return [self._view(key) for key in keys]

    def _writes(self, key: str) -> bool:
        return type(self._staged.get(key)) in (Put, Delete)

    def _view(self, key: str) -> Entry | None:
        staged = self._staged.get(key)
        if type(staged) is Put:
            if staged.expires_at is not None and staged.expires_at <= self.store.clock():
                return None
            return Entry(key, staged.value, _PENDING, staged.expires_at)
        return None if type(staged) is Delete else self._seen.get(key)

    def _stage(self, ops: Sequence[Op]) -> None:
        """Merge operations into the batch; conditions on what this block wrote are judged at once."""
        if self._ended:
            raise BadRequest("this atomic() block has ended: write inside it, or begin another")
        for op in ops:
            before = self._staged.get(op.key)
            if type(before) is Put or type(before) is Delete:
                self._judge(op)
                condition = before.expect
                if type(op) is Check:
                    continue
                self._staged[op.key] = _conditioned(op, condition)
                continue
            known: Expect | None = None if before is None else before.expect
            if op.key in self._seen:
                entry = self._seen[op.key]
                known = ABSENT if entry is None else entry.version
            if op.expect is not None and known is not None and op.expect != known:
                raise Conflict(op.key, op.expect, known)
            self._staged[op.key] = op if op.expect is not None else _conditioned(op, known)

    def _judge(self, op: Op) -> None:
        if op.expect is None:
            return
        present = self._view(op.key)
        if (op.expect is ABSENT) != (present is None) or (present is not None and op.expect != _PENDING):
            raise Conflict(op.key, op.expect, ABSENT if present is None else _PENDING)

    async def _commit(self) -> None:
        self._ended = True
        ops: list[Op] = [
            Check(key, ABSENT if entry is None else entry.version)
            for key, entry in self._seen.items()
            if key not in self._staged
        ]
        # a delete of what was absent before the block, or was made in it, only checks that
        ops += [
            Check(op.key, ABSENT) if type(op) is Delete and cast(Any, op.expect) is ABSENT else op
            for op in self._staged.values()
        ]
        if not ops:
            return
        if self.store.capabilities.atomic_batch == "partition" and len({keys.partition(op.key) for op in ops}) > 1:
            raise Unsupported("a batch over several namespaces", "keep what changes together in one namespace")
        await self.store._commit(ops)


_PENDING: Final = b"pending!"  # the version shown for what the block itself wrote


def _conditioned(op: Op, expect: Expect | None) -> Op:
    if type(op) is Put:
        return Put(op.key, op.value, expect, op.expires_at)
    if type(op) is Delete:
        return Delete(op.key, cast(Any, expect))  # ABSENT here becomes a Check at the commit
    return op


def jitter(attempt: int) -> float:
    """Return how long to wait, in seconds, after losing for the ``attempt + 1``-th time: full jitter, doubling."""
    return random.uniform(0, min(_LONGEST_WAIT, _FIRST_WAIT * 2**attempt))


async def backoff(attempt: int) -> None:
    """Wait for `jitter`."""
    await asyncio.sleep(jitter(attempt))
