"""What a service keeps of what S3 promises, found out with three objects that are removed again."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Iterable
from typing import Any, Final, NamedTuple

from kvpersist.errors import BadOption, CommitUnknown, KvError, ReadOnly, Unavailable, Unsupported
from kvpersist_drivers.buckets._names import internal
from kvpersist_drivers.buckets._store import NEW, Changed, Conditions, ObjectStore

__all__ = ["Probed", "probed"]

_LEFT: Final = 3_600_000  # milliseconds until `compact` removes what a probe that was interrupted left
_OTHER: Final = "1"  # a tag that no object has


class Probed(NamedTuple):
    """``denied`` tells why this user cannot write; the conditions are taken for granted then."""

    able: Conditions
    denied: str | None


async def probed(store: ObjectStore, root: str) -> Probed:
    """Try conditions and listing: four round trips, one where this user cannot write.

    Raises:
        BadOption: there is no such bucket, or this user may not read. Unavailable: nothing answers.
        Unsupported: it does not list names in their order.
    """
    base = root + internal(int(time.time() * 1000) + _LEFT, "p", os.urandom(6).hex())
    names = [base + end for end in ("B", "a", "\u00e9")]
    [listed, *made] = await _all([store.list(root, root, 1), *(store.put(name, b"probe") for name in names)])
    if isinstance(listed, BaseException):
        raise listed
    if denied := [answer for answer in made if isinstance(answer, ReadOnly)]:
        return Probed(Conditions(put=True, delete=True), str(denied[0]))
    try:
        _raised(made)
        return Probed(await _tried(store, base, names, made), None)
    finally:
        await _all([store.delete(name) for name in names])  # what is left here, `compact` removes


async def _tried(store: ObjectStore, base: str, names: list[str], tags: list[str]) -> Conditions:
    answers = await _all(
        [
            store.put(names[0], b"again", NEW),
            store.put(names[1], b"again", _OTHER),
            store.list(base, base + "C", 10),
        ]
    )
    _raised(answers)
    created, replaced, listed = answers
    if isinstance(listed, KvError) or [item.name for item in listed[0]] != names[1:]:
        raise Unsupported(f"a service that does not list names in their order ({store.where})")
    if not (isinstance(created, Changed) and isinstance(replaced, Changed)):
        return Conditions(put=False, delete=False)
    answers = await _all([store.put(names[1], b"mine", tags[1]), store.delete(names[2], _OTHER)])
    _raised(answers)
    return Conditions(put=isinstance(answers[0], str), delete=isinstance(answers[1], Changed))


async def _all(calls: Iterable[Awaitable[Any]]) -> list[Any]:
    return await asyncio.gather(*calls, return_exceptions=True)


def _raised(answers: list[Any]) -> None:
    """Raise what says that the service cannot be used; what it only refuses to do is an answer."""
    for answer in answers:
        if isinstance(answer, CommitUnknown):
            raise Unavailable(answer.reason) from answer
        if isinstance(answer, Changed) or not isinstance(answer, BaseException):
            continue
        if not isinstance(answer, KvError) or isinstance(answer, Unavailable | BadOption):
            raise answer
