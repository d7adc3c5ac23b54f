"""One writer at a time, for a server that does not keep compare-and-set.

FerretDB 1.x looks for the document that the filter of an update or a delete names, and then writes by
``_id`` alone: of sixteen who replace one version at once, several are told that they did. What it does
keep is uniqueness. So there every commit takes a turn: it inserts the one document that a collection of
the database may have, and deletes it by an ``_id`` that nobody else has. It is one for all stores of a
database, as each writer also holds many of the 100 SQLite connections that FerretDB has for it.

A holder says every `_BEAT` seconds that it is alive, and gives up what it does when it could not say so
for `_SILENT`. A turn that another process has seen unchanged for `_LEASE` is ended by it. No clock is
compared with another machine's.
"""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from types import TracebackType
from typing import Any, Final, Self, TypeVar

from pymongo.errors import DuplicateKeyError

from kvpersist.errors import Busy, CommitUnknown, KvError, Unavailable
from kvpersist_drivers.mongo._errors import Translator

__all__ = ["Turns"]

_Answer = TypeVar("_Answer")

_BEAT: Final = 1.0  # seconds
_SILENT: Final = 5.0  # seconds
_LEASE: Final = 8.0  # seconds
_SETTLING: Final = 0.5  # seconds after which a write whose answer was lost has ended
_PAUSE: Final = 0.004  # seconds between two attempts, on average
_PATIENCE: Final = 30.0  # seconds a commit waits for its turn, unless its store's deadline is sooner


class Turns:
    """An asynchronous context manager. Its body is not cancelled; commits of one process queue up in it."""

    def __init__(self, collection: Any, errors: Translator) -> None:
        self._collection = collection
        self._errors = errors
        self._queue = asyncio.Lock()
        self._token = ""
        self._since = 0.0
        self._left: tuple[str, float] | None = None  # a turn of ours that may still be there, and from when on
        self._seen: tuple[Any, float] | None = None  # the turn of another, and when it was first seen so
        self._asked = 0.0  # when it was last looked at

    async def prepare(self) -> None:
        """Make sure that there can be no two."""
        with self._errors.reading():
            await self._collection.create_index("turn", unique=True)

    async def __aenter__(self) -> Self:
        await self._queue.acquire()
        try:
            await self._take()
        except BaseException:  # cancelled too: the next in the queue has its go
            self._queue.release()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if self._left is None:
                self._left = (self._token, time.monotonic() - _SETTLING)
                await self._give_back()
        except KvError:  # the next turn of ours begins with it; the commit is what it is
            pass
        finally:
            self._queue.release()

    async def within(self, work: Coroutine[Any, Any, _Answer]) -> _Answer:
        """Do ``work``, for as long as others can see that its process is alive."""
        call = asyncio.ensure_future(work)
        try:
            while not (await asyncio.wait({call}, timeout=_BEAT))[0]:
                await self._beat()
        except BaseException:  # cancelled too: no write may go on without its turn
            call.cancel()
            await asyncio.wait({call})
            raise
        return call.result()

    def unsettled(self) -> None:
        """The answer to a write was lost: it may still be going on, so the turn is not given back at once."""
        self._left = (self._token, time.monotonic())

    async def _beat(self) -> None:
        began = time.monotonic()
        try:
            async with asyncio.timeout(self._since + _SILENT - began):
                with self._errors.writing():
                    done = await self._collection.update_one({"_id": self._token}, {"$inc": {"beat": 1}})
        except (TimeoutError, KvError) as error:
            self.unsettled()
            raise CommitUnknown((), f"{self._errors.where}: no answer in {_SILENT:g} s") from error
        if not done.matched_count:
            raise CommitUnknown((), f"{self._errors.where}: another process took this one for dead")
        self._since = began

    async def _take(self) -> None:
        if self._left is not None:
            await asyncio.sleep(self._left[1] + _SETTLING - time.monotonic())
            await self._give_back()
        self._token = os.urandom(12).hex()
        until = time.monotonic() + _PATIENCE
        while True:
            self._since = time.monotonic()
            self._left = (self._token, self._since)  # should the answer be lost
            if await self._inserted():
                self._left = self._seen = None
                return
            self._left = None
            await self._end_a_dead_one()
            if self._since > until:
                raise Busy(f"{self._errors.where}: others kept writing for {_PATIENCE:g} s; nothing was changed")
            await asyncio.sleep(_PAUSE * (0.5 + random.random()))

    async def _inserted(self) -> bool:
        async with self._asking():
            try:
                await self._collection.insert_one({"_id": self._token, "turn": 1})
            except DuplicateKeyError:
                return False
        return True

    async def _give_back(self) -> None:
        assert self._left is not None
        async with self._asking():
            await self._collection.delete_one({"_id": self._left[0]})
        self._left = None

    async def _end_a_dead_one(self) -> None:
        now = time.monotonic()
        if self._seen is not None and now - self._asked < _BEAT / 4:
            return  # asked for often enough to see that it changed
        self._asked = now
        async with self._asking():
            holder = await self._collection.find_one({"turn": 1})
            if holder is None or self._seen is None or self._seen[0] != holder:
                self._seen = None if holder is None else (holder, now)
            elif now - self._seen[1] >= _LEASE:
                await self._collection.delete_one({"_id": holder["_id"]})

    @asynccontextmanager
    async def _asking(self) -> AsyncIterator[None]:
        try:
            with self._errors.reading():
                async with asyncio.timeout(_SILENT):
                    yield
        except TimeoutError as error:
            raise Unavailable(f"{self._errors.where}: no answer in {_SILENT:g} s") from error
