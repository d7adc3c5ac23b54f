"""Retention: what is removed from the front of a topic, and when."""

from __future__ import annotations

import asyncio
import logging
from typing import Final

from kvpersist import keys
from kvpersist.errors import CorruptRecord, ForkedStore, KvError, ReadOnly, StoreClosed, WrongLoop
from kvpersist.events._log import TopicLog
from kvpersist.events.consumers import Consumers
from kvpersist.events.groups import needed_by
from kvpersist.store import Store

__all__ = ["Retention"]

_logger = logging.getLogger("kvpersist.events")
_PAGE: Final = 250  # states of groups read at once


class Retention:
    """Removes events by age, count and size, from the oldest on, while publishing goes on."""

    def __init__(
        self,
        store: Store,
        log: TopicLog,
        consumers: Consumers,
        namespace: str,
        *,
        age: float | None,
        count: int | None,
        size: int | None,
        keep_unacknowledged: bool,
        interval: float,
    ) -> None:
        self._store = store
        self._log = log
        self._consumers = consumers
        self._groups = keys.record_prefix(keys.namespace(namespace), "event_group")
        self._age, self._count, self._size = age, count, size
        self._keeps = keep_unacknowledged
        self._interval = interval
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Sweep every interval from now on, if that is wanted and not done yet."""
        if self._task is None and self._interval > 0:
            self._store._check()
            self._task = asyncio.get_running_loop().create_task(self._sweep_every(self._interval))

    async def stop(self) -> None:
        """Sweep no more."""
        task, self._task = self._task, None
        if task is not None and task.get_loop() is asyncio.get_running_loop():  # else: forked
            task.cancel()
            await asyncio.wait([task])

    async def sweep(self) -> int:
        """Remove what retention does not keep, topic by topic; return how many events went.

        A damaged topic does not keep the others from being swept; its error is raised at the end.
        """
        removed, damage = 0, None
        async for topic in self._log.parents():
            try:
                removed += await self._sweep(topic)
            except CorruptRecord as error:
                damage = error
        if damage is not None:
            raise damage
        return removed

    async def _sweep(self, topic: str) -> int:
        since = None if self._age is None else self._store.clock() - self._age
        cut = await self._log.cut(topic, since=since, count=self._count, size=self._size)
        if self._keeps:
            cut = await self._needed(topic, cut)
        return await self._log.trim(topic, before=cut)

    async def _needed(self, topic: str, cut: int) -> int:
        """The first number, up to ``cut``, that some consumer or group has not acknowledged."""
        async for _, number in self._consumers.all(topic):
            cut = min(cut, number + 1)
        prefix = f"{self._groups}{keys.encode(topic)}!"
        start, end = prefix, keys.prefix_end(prefix)
        while True:
            page = await self._store._scan(start, end, limit=_PAGE)
            for entry in page:
                cut = min(cut, needed_by(entry))
            if len(page) < _PAGE:
                return cut
            start = page[-1].key + "\0"

    async def _sweep_every(self, interval: float) -> None:
        while True:
            await asyncio.sleep(interval)
            try:
                await self.sweep()
            except (StoreClosed, ForkedStore, WrongLoop, ReadOnly):
                return
            except KvError as error:  # tried again at the next turn; what expired stays until then
                _logger.warning("events could not be swept: %s", error)
