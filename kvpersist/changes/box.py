"""What one watcher has not taken yet."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence

from kvpersist.changes.scope import Change, Scope
from kvpersist.errors import KvError

__all__ = ["Box"]


class Box:
    """Filled by what is told, emptied by one watcher; bounded."""

    def __init__(
        self, scope: Scope, interval: float, limit: int, merges: bool, hidden: Callable[[str, Scope], bool]
    ) -> None:
        """``hidden``: keys that are not told of."""
        self.scope, self.interval = scope, interval
        self.woken = asyncio.Event()
        self.ended = False
        self.error: Exception | None = None
        self.begun = False
        self._limit = limit
        self._merges = merges
        self._hidden = hidden
        self._waiting: deque[Sequence[str]] = deque()
        self._merged: dict[str, None] = {}
        self._size = 0  # keys of what is waiting
        self._missed = False

    def told(self, changed: Sequence[str]) -> None:
        mine = [key for key in changed if not self._hidden(key, self.scope)]
        if not mine:
            return
        if self._merges:
            self._merged.update(dict.fromkeys(mine))
            self._size = len(self._merged)
        else:
            self._waiting.append(mine)
            self._size += len(mine)
        if self._size > self._limit:
            self._drop()
        self.woken.set()

    def missed(self) -> None:
        if self.begun:  # before that it means that the source has begun
            self._drop()
            self.woken.set()

    def failed(self, error: Exception) -> None:
        if isinstance(error, KvError) and error.retryable:
            self.missed()
        elif self.begun:
            self.end(error)

    def end(self, error: Exception | None) -> None:
        if not self.ended:
            self.ended, self.error = True, error
        self.woken.set()

    def take(self) -> Change | None:
        """The next change, if there is one."""
        if self._missed:
            self._missed = False
            return Change((), missed=True)
        if self._merged:
            changed = tuple(self._merged)
            self._merged, self._size = {}, 0
            return Change(changed)
        if self._waiting:
            mine = self._waiting.popleft()
            self._size -= len(mine)
            return Change(tuple(mine))
        return None

    def waits(self) -> bool:
        return not (self._missed or self._merged or self._waiting)

    def _drop(self) -> None:
        self._waiting.clear()
        self._merged, self._size = {}, 0
        self._missed = True
