"""Removing a topic with everything kept of it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Final

from kvpersist import keys
from kvpersist.driver import ABSENT, Check, Delete, Op, Put
from kvpersist.errors import Conflict, Unavailable
from kvpersist.events._log import COLLECTIONS, TopicLog
from kvpersist.store import Store
from kvpersist.transaction import backoff

__all__ = ["remove_topic"]

_ATTEMPTS: Final = 10  # of a removal that finds events again each time
_PAGE: Final = 250  # keys removed in one batch
_BESIDE: Final = tuple(collection for collection in COLLECTIONS if collection not in ("event", "event_mark"))
_LATE: Final = 30 * 86_400.0  # seconds for which late writers are told how far a topic had come


async def remove_topic(
    store: Store,
    log: TopicLog,
    topic: str,
    *,
    checks: Sequence[Check] = (),
    ask: Callable[[], Awaitable[None]] | None = None,
) -> bool:
    """Remove what lies below ``topic`` in each collection of events, and its stat last; False: there was nothing.

    Without atomic batches a late publisher puts its event behind those it knew, so there the stat stays for 30 days.

    Args:
        checks: are carried by every batch, where batches are atomic; a conflict at one of them is raised.
        ask: is awaited before each step, and raises where it must not be made.
    """
    capabilities = store.capabilities
    part, stat_key = keys.encode(topic), log.stat_key(topic)
    size = min(_PAGE, (capabilities.max_batch or _PAGE + len(checks)) - len(checks))
    existed = False

    async def remove(ops: Sequence[Op]) -> None:
        if ask is not None:
            await ask()
        await store._commit([*checks, *ops])

    atomic = capabilities.atomic_batch != "none"
    attempt = 0
    while True:
        state = await log.state(topic)
        holds = state.last >= state.first
        existed |= holds
        if not atomic:
            if ask is not None:
                await ask()
            await log.trim(topic, before=state.last + 1)  # what is published beside it stands
        elif holds:
            try:
                await remove([log.emptied(state)])
            except Conflict as conflict:
                if conflict.key != stat_key:
                    raise
                continue
        for collection in COLLECTIONS if atomic else _BESIDE:
            start = keys.record_prefix(log.space, collection) + part + "!"
            end = keys.prefix_end(start) if collection != "event" else log.key_of(topic, state.last + 1)
            while page := await store._scan(start, end, limit=size, keys_only=True):
                await remove([Delete(entry.key) for entry in page])
                existed = True
        [stat] = await store._entries([stat_key])
        if stat is None or stat.expires_at is not None:
            return existed
        state = await log.state(topic)
        if state.last >= state.first:  # something was published meanwhile, or what was trimmed could not be noted
            attempt += 1
            if attempt == _ATTEMPTS and not atomic:
                raise Unavailable(f"the topic {topic!r} could not be removed as a whole: try again")
            await backoff(attempt)
            continue
        following = log.key_of(topic, state.last + 1)
        if atomic:  # nobody has published, and nobody can who knew the topic
            gone = Delete(stat_key, stat.version if capabilities.conditional_delete else None)
            last: Sequence[Op] = (Check(following, ABSENT), gone)
        else:
            last = (Put(stat_key, stat.value, stat.version, store.clock() + _LATE),)
        try:
            await remove(last)
        except Conflict as conflict:
            if conflict.key not in (stat_key, following):
                raise
            existed = True  # something was published meanwhile: once more
        else:
            return True
