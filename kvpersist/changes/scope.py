"""What is watched, and what is told of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self, cast

import msgspec

from kvpersist.errors import BadRequest

__all__ = ["Change", "Scope"]


class Change(msgspec.Struct, frozen=True):
    """Keys that were put or deleted, by one commit or some.

    ``missed``: there were changes that are not named, of any of the watched keys: read what matters.
    """

    keys: tuple[str, ...]
    missed: bool = False


class Scope(msgspec.Struct, frozen=True):
    """What is watched: everything below a prefix, or some keys; of a waker also both."""

    prefix: str = ""
    keys: tuple[str, ...] | None = None

    @property
    def below(self) -> tuple[str, ...]:
        """The prefix, where one is meant."""
        return (self.prefix,) if self.prefix or self.keys is None else ()

    @classmethod
    def of(cls, wanted: str | Sequence[str]) -> Self:
        """What a caller of `Store.watch` means. Raises BadRequest."""
        if isinstance(wanted, str):
            return cls(wanted)
        if not wanted or not all(isinstance(key, str) and key for key in cast(Sequence[Any], wanted)):
            raise BadRequest(f"watch({wanted!r}): give a prefix, or a list of keys")
        return cls(keys=tuple(dict.fromkeys(wanted)))

    def namespaces(self) -> set[str]:
        """The prefixes to be asked of a driver: whole namespaces, so that watchers can share."""
        return {text[: text.find(":") + 1] for text in (*self.below, *(self.keys or ()))}
