"""What a commit's batches come to: which may be kept, what they expect, and what is written in the end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from kvpersist.driver import ABSENT, Batch, Check, Committed, Expect, Op, Put, milliseconds
from kvpersist.errors import BadKey, BadRequest, Conflict, KeyTooLong, KvError, ValueTooLarge
from kvpersist_drivers.mysql._statements import MAX_KEY_BYTES, Row

__all__ = ["Verdict", "expectations", "judge", "locks", "refusal"]


class Verdict(NamedTuple):
    """One answer per batch, and the entries to be written; None: to be removed."""

    answers: list[Committed | KvError]
    rows: dict[str, Row | None]


def refusal(batch: Batch, max_value_bytes: int) -> KvError | None:
    """Why ``batch`` cannot be kept, whatever is stored."""
    try:
        for op in batch.ops:
            size = len(op.key.encode())
            if size > MAX_KEY_BYTES:
                return KeyTooLong(op.key, size, MAX_KEY_BYTES)
            if isinstance(op.expect, bytes) and len(op.expect) != 8:
                return BadRequest(f"the version expected at {op.key!r} has {len(op.expect)} bytes instead of 8")
            if isinstance(op, Put):
                if len(op.value) > max_value_bytes:
                    return ValueTooLarge(op.key, len(op.value), max_value_bytes)
                milliseconds(op.expires_at)
    except UnicodeEncodeError as error:
        return BadKey(error.object, "no UTF-8 text: it holds a lone surrogate")
    except BadRequest as error:
        return error
    return None


def expectations(batches: Sequence[Batch]) -> dict[str, Expect]:
    """What must be stored at first for every batch to succeed, as far as each key's first condition tells."""
    expected: dict[str, Expect] = {}
    written: set[str] = set()
    for batch in batches:
        for op in batch.ops:
            if op.expect is not None and op.key not in written:
                expected.setdefault(op.key, op.expect)
        written.update(op.key for op in batch.ops if not isinstance(op, Check))
    return expected


def locks(batches: Sequence[Batch]) -> tuple[set[str], set[str]]:
    """The keys that are only looked at, and are there if all goes well; and all others.

    The others are none where nothing is expected of them: writing locks them soon enough.
    """
    looked_at, others, expected = set[str](), set[str](), set[str]()
    for batch in batches:
        for op in batch.ops:
            (looked_at if type(op) is Check and op.expect is not ABSENT else others).add(op.key)
            if op.expect is not None:
                expected.add(op.key)
    return looked_at - others, others if others & expected else set()


def judge(batches: Sequence[Batch], stored: Mapping[str, Expect], now_ms: int) -> Verdict:
    """Apply ``batches`` in their order to the versions ``stored``, of which absent ones may be left out."""
    versions = {key: version for key, version in stored.items() if version is not ABSENT}
    verdict = Verdict([], {})
    for batch in batches:
        if (conflict := _conflict(batch.ops, versions)) is not None:
            verdict.answers.append(conflict)
            continue
        for op in batch.ops:
            if isinstance(op, Check):
                continue
            expires = milliseconds(op.expires_at) if isinstance(op, Put) else 1
            if isinstance(op, Put) and (not expires or expires > now_ms):
                verdict.rows[op.key] = (batch.version, expires, op.value)
                versions[op.key] = batch.version
            else:
                verdict.rows[op.key] = None
                versions.pop(op.key, None)
        verdict.answers.append(Committed(batch.version))
    return verdict


def _conflict(ops: Sequence[Op], versions: Mapping[str, Expect]) -> Conflict | None:
    for position, op in enumerate(ops):
        if op.expect is not None and (found := versions.get(op.key, ABSENT)) != op.expect:
            return Conflict(op.key, op.expect, found, position)
    return None
