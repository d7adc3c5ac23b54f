"""Removing a topic with everything kept of it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Final

from kvpersist import keys
from kvpersist.driver import Check, Delete, Op
from kvpersist.errors import Conflict
from kvpersist.events._log import COLLECTIONS
from kvpersist.store import Store

__all__ = ["remove_topic"]

_PAGE: Final = 250  # keys removed in one batch


async def remove_topic(
    store: Store,
    namespace: str,
    topic: str,
    *,
    checks: Sequence[Check] = (),
    ask: Callable[[], Awaitable[None]] | None = None,
) -> bool:
    """Remove what lies below ``topic`` in each collection of events, and its stat last; False: there was nothing.

    Args:
        checks: are carried by every batch; a conflict at one of them is raised.
        ask: is awaited before each batch, and raises where it must not be made.
    """
    space, part = keys.namespace(namespace), keys.encode(topic)
    stat_key = keys.meta_prefix(space, "event", "stat") + part
    conditional = store.capabilities.conditional_delete
    size = min(_PAGE, (store.capabilities.max_batch or _PAGE + len(checks)) - len(checks))
    existed = False

    async def remove(ops: Sequence[Op]) -> None:
        if ask is not None:
            await ask()
        await store._commit([*checks, *ops])

    while True:
        [stat] = await store._entries([stat_key])
        for collection in COLLECTIONS:
            start = keys.record_prefix(space, collection) + part + "!"
            while page := await store._scan(start, keys.prefix_end(start), limit=size, keys_only=True):
                await remove([Delete(entry.key) for entry in page])
                existed = True
        if stat is None:
            return existed
        existed = True
        try:
            await remove([Delete(stat_key, stat.version if conditional else None)])
        except Conflict as conflict:
            if conflict.key != stat_key:
                raise  # something was published meanwhile: once more
        else:
            return True
