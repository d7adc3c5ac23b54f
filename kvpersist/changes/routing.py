"""Whom a changed key is for."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from kvpersist.changes.scope import Scope

__all__ = ["Listener", "Router"]


class Listener(Protocol):
    """Who is told. ``told``: of these keys; ``missed``: of any; ``failed``: nothing is told for now."""

    def told(self, changed: Sequence[str]) -> None: ...
    def missed(self) -> None: ...
    def failed(self, error: Exception) -> None: ...


class Router:
    """Finds the listeners that a key is for; what it costs does not depend on how many there are."""

    def __init__(self) -> None:
        self.listeners: dict[Any, Scope] = {}
        self._exact: dict[str, list[Any]] = {}
        self._below: dict[str, list[Any]] = {}
        self._lengths: list[int] = []  # of the prefixes, each once, the shortest first

    def add(self, listener: Any, scope: Scope) -> None:
        if listener in self.listeners:
            return
        self.listeners[listener] = scope
        for table, texts in ((self._below, scope.below), (self._exact, scope.keys or ())):
            for text in texts:
                table.setdefault(text, []).append(listener)
        self._lengths = sorted({len(prefix) for prefix in self._below})

    def remove(self, listener: Any) -> None:
        scope = self.listeners.pop(listener, None)
        if scope is None:
            return
        for table, texts in ((self._below, scope.below), (self._exact, scope.keys or ())):
            for text in texts:
                table[text].remove(listener)
                if not table[text]:
                    del table[text]
        self._lengths = sorted({len(prefix) for prefix in self._below})

    def route(self, changed: Iterable[str]) -> dict[Any, list[str]]:
        """The listeners that ``changed`` concerns, each with its keys in their order."""
        found: dict[Any, list[str]] = {}
        for key in changed:
            for listener in self._exact.get(key, ()):
                found.setdefault(listener, []).append(key)
            for length in self._lengths:
                if length > len(key):
                    break
                for listener in self._below.get(key[:length], ()):
                    found.setdefault(listener, []).append(key)
        return found
