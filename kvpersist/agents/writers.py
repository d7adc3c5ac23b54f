"""How a repository's records are written, by what its backend can do."""

from __future__ import annotations

from typing import TypeVar, cast

from kvpersist import keys
from kvpersist.errors import UniqueConflict
from kvpersist.index.atomic_writer import AtomicWriter
from kvpersist.index.ordered_writer import OrderedWriter
from kvpersist.repository import Repository

__all__ = ["atomic_writer", "ordered_writer", "shown", "taken"]

R = TypeVar("R")


def atomic_writer(repository: Repository[R]) -> AtomicWriter[R]:
    """How a repository writes on a backend with atomic batches."""
    return cast("AtomicWriter[R]", repository._writer)


def ordered_writer(repository: Repository[R]) -> OrderedWriter[R]:
    """How a repository writes on a backend without atomic batches."""
    return cast("OrderedWriter[R]", repository._writer)


def taken(pk: str) -> UniqueConflict:
    """The error of a record that is there already, of this encoded key."""
    return UniqueConflict("id", shown(pk), shown(pk))


def shown(pk: str) -> str:
    """An encoded key as people know it."""
    return ", ".join(keys.unescape(part) for part in pk.split("!"))
