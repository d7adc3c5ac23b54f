"""What finding sessions, messages and calls has in common: the index or range a query goes through, and its order."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import datetime
from typing import Any, Final, NamedTuple, TypeVar

from kvpersist import keys
from kvpersist.agents.collections import Collections
from kvpersist.agents.finding.choices import Choice
from kvpersist.agents.finding.conditions import Where
from kvpersist.agents.finding.queries import Asked, Finder
from kvpersist.agents.finding.sources import Replaced, Sorted, Source
from kvpersist.errors import BadRequest, IndexNotReady, KvError, NoIndex
from kvpersist.index.declaration import Range
from kvpersist.index.reads import Query
from kvpersist.repository import Repository

__all__ = ["Chosen", "IndexFinder", "downwards", "refuse_unknown"]

R = TypeVar("R")

_DESCENDING: Final = frozenset(("created_at", "updated_at", "message_count"))  # what positions hold greatest first
_NARROW: Final = "Name an owner or a time, declare an index, or pass scan=True to read everything"
_MORE: Final = "Narrow it, declare an index, raise scanned=, go on by page(), or pass scan=True"


class Chosen(NamedTuple):
    """The index or range that a query goes through.

    ``used``: the conditions it answers. ``order`` and ``descending``: how it orders. ``narrow``: it
    does not hold the whole collection.
    """

    query: Query
    used: frozenset[str]
    order: str
    descending: bool
    narrow: bool


class IndexFinder(Finder[Any, R]):
    """What the three have in common."""

    def __init__(self, collections: Collections, repository: Repository[Any]) -> None:
        self._all = collections
        self._store = collections.store
        self._repository = repository
        self._reverses = collections.store.capabilities.reverse

    async def _ready(self, choices: Sequence[Choice]) -> tuple[Chosen | None, str | None]:
        """The first choice that can be read, and the name of a better one that cannot yet."""
        unready: str | None = None
        for choice in choices:
            query = await self._repository._reader.through(choice.bound, choice.where)
            if query is not None:
                used = frozenset(choice.where)
                return Chosen(query, used, choice.order, choice.descending, bool(used)), unready
            unready = unready or choice.bound.name
        return None, unready

    def _wide(self, asked: Asked, unready: str | None, what: Mapping[str, Any] | str) -> KvError:
        """The error of a query that would read the whole collection."""
        if unready is not None:
            return IndexNotReady(self.collection, unready)
        return self._refusal(what, _NARROW)

    def _refusal(self, what: Mapping[str, Any] | str, advice: str = _MORE) -> KvError:
        shown = what if isinstance(what, str) else ", ".join(what)
        return NoIndex(self.collection, shown, tuple(str(bound) for bound in self._repository.indexes), advice)

    def _counted(self, queries: Sequence[Query]) -> Callable[[], Awaitable[int]]:
        """Return what counts the entries of ranges. It raises Replaced."""
        reader = self._repository._reader

        async def count() -> int:
            total = 0
            for query in queries:
                total += await reader.count(query)
                if not await reader.unchanged(query):
                    raise Replaced
            return total

        return count

    def _between(self, start: str, end: str | None, base: str = "") -> Query:
        """The records between two keys."""
        return Query(None, start, end, None, b"", base=base)

    def _directed(
        self,
        asked: Asked,
        chosen: Chosen,
        order: str,
        descending: bool,
        make: Callable[[bool], Source[Any]],
        place: Callable[[Any], str],
        refusal: Callable[[], KvError],
    ) -> tuple[Source[Any], bool]:
        """Return ``make(reverse)`` if that comes in the order asked for, else sorted; and whether it was sorted."""
        if chosen.order == order and (chosen.descending == descending or self._reverses):
            return make(chosen.descending != descending), False
        most = None if asked.scan else asked.scanned
        reverse = descending != (order in _DESCENDING)
        return Sorted(make(False), place, reverse=reverse, most=most, refusal=refusal), True


def refuse_unknown(asked: Where, label: str, known: frozenset[str]) -> None:
    """Raise BadRequest where ``label`` is asked for with a value that none can have."""
    value = asked.get(label)
    if value is not None and not isinstance(value, Range) and value not in known:
        raise BadRequest(f"unknown {label} {value!r}: use one of {', '.join(sorted(known))}")


def downwards(value: datetime | int | None) -> str:
    """A value as a position holds it, greatest first; what has none comes last."""
    return "~" if value is None else keys.encode(value, True)
