"""Which store each concept of an agent's records is kept in.

One store holds all of them, unless `kvpersist.open` is given others: ``events=`` one for the events,
``files=`` one for what people want to see as files. A batch is of one store: what has to change together
is placed together, and the birth keys of parents stay in the main store.
"""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AsyncExitStack
from typing import Any, Final, TypeAlias, cast

from kvpersist.driver import Driver
from kvpersist.errors import BadOption
from kvpersist.events import EventQueue
from kvpersist.store import Store
from kvpersist.urls import Where, unknown_option

__all__ = ["PLACES", "Beside", "Placement", "events_of"]

PLACES: Final[Mapping[str, str]] = {
    "events": "events",
    "todos": "files",
    "windows": "files",
    "recovered_files": "files",
    "media": "files",
}
"""Concept -> which of the stores it is kept in; everything else is in the main one."""

_COLLECTIONS: Final = {"todos": "todo", "windows": "window", "recovered_files": "recovered_file", "media": "media"}

Beside: TypeAlias = Where | Driver | Store | None
"""What names a store beside the main one; None: there is none."""

_SETTINGS: Final = frozenset(inspect.signature(EventQueue).parameters) - {"store", "namespace"}


class Placement:
    """The stores of one Persistence.

    Attributes:
        main: where everything is that has no other place.
        files, events: the stores given for these, or the main one.
        opened: those that `open` has opened, and that have to be closed.
    """

    def __init__(self, main: Store, *, files: Store | None = None, events: Store | None = None) -> None:
        self.main: Store = main
        self.files: Store = files or main
        self.events: Store = events or main
        self.opened: list[Store] = []

    @property
    def stores(self) -> dict[str, Store]:
        """Each store once, by the first of ``main``, ``files`` and ``events`` that it is."""
        found: dict[str, Store] = {}
        for name, store in (("main", self.main), ("files", self.files), ("events", self.events)):
            if store not in found.values():
                found[name] = store
        return found

    def store_of(self, concept: str) -> Store:
        """The store that a concept, such as "todos", is kept in."""
        return getattr(self, PLACES.get(concept, "main"))

    @property
    def elsewhere(self) -> dict[str, Store]:
        """The stores, other than the main one, of the collections of records that are kept in them."""
        stores = {name: self.store_of(concept) for concept, name in _COLLECTIONS.items()}
        return {name: store for name, store in stores.items() if store is not self.main}

    async def close(self) -> None:
        """Close what was opened, each even if another cannot be."""
        opened, self.opened = self.opened, []
        async with AsyncExitStack() as stack:  # one after the other: the child of a fork has no loop to gather in
            for store in opened:
                stack.push_async_callback(store.close)

    async def add(self, files: Beside, events: Beside, open_beside: Callable[[Any], Awaitable[Store]]) -> None:
        """Open the stores beside the main one; where that fails, `close` closes those that are open.

        Args:
            open_beside: opens what names a store, or is a driver.
        """
        for name, where in (("files", files), ("events", events)):
            if where is None:
                continue
            store = where if isinstance(where, Store) else await open_beside(where)
            if store is not where:
                self.opened.append(store)
            setattr(self, name, store)


def events_of(events: Mapping[str, Any] | Beside, configured: Any = None) -> tuple[Beside, dict[str, Any]]:
    """Split what ``events=`` says: the store of the events, None for the main one, and the queue's settings.

    A mapping holds settings of `EventQueue`, and what names a store: ``url`` or ``type`` with its options, or
    an open one as ``store``.

    Args:
        configured: what the place that names the main store says; it counts where ``events`` says nothing.

    Raises:
        BadOption: neither a setting of the queue nor, without a store, anything else.
    """
    if not isinstance(events, Mapping):
        if events is not None or configured is None:
            return events, {}
        return events_of(configured)
    settings = {name: value for name, value in events.items() if name in _SETTINGS}
    where = {str(name): value for name, value in events.items() if name not in _SETTINGS}
    if not where:
        place, less = events_of(configured)
        return place, {**less, **settings}
    if "store" in where:
        store = where.pop("store")
        if where:
            raise BadOption(next(iter(where)), "store= is an open store, or names one: leave url, type and options out")
        return cast("Beside", store), settings
    if not where.keys() & {"url", "type"}:
        raise unknown_option(next(iter(where)), sorted({*_SETTINGS, "url", "type", "store"}))
    return where, settings
