"""Which index answers most of what is asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from kvpersist.agents.finding.conditions import Where
from kvpersist.index.declaration import BoundIndex, Range

__all__ = ["Choice", "best"]


class Choice(NamedTuple):
    """An index, the conditions that it answers, and what it orders the records by then."""

    bound: BoundIndex
    where: Where
    order: str
    descending: bool


def best(indexes: Sequence[BoundIndex], where: Mapping[str, Any], order: str | None = None) -> list[Choice]:
    """Return the indexes that answer some of ``where``, or are only an order, the most useful first.

    That is: of one record, of the most equal values, of a range, in this order.
    """
    choices: list[tuple[tuple[int, int, int, int], int, Choice]] = []
    for at, bound in enumerate(indexes):
        parts, fields = bound.parts, bound.fields
        if fields and parts[0].label not in where:
            continue
        used: Where = {}
        for part in parts:
            if part.label not in where or isinstance(where[part.label], Range):
                break
            used[part.label] = where[part.label]
        equals = len(used)
        if equals < len(parts) and isinstance(where.get(parts[equals].label), Range):
            used[parts[equals].label] = where[parts[equals].label]
        rest = parts[len(used) : fields]
        if any(part.optional for part in rest) or any(part.multi for part in parts[equals:]):
            continue  # records are missing there, or occur several times
        if any(isinstance(value, (dict, list)) for value in used.values()):
            continue  # contained in something: no index tells
        by = parts[equals] if equals < len(parts) else None
        label = "id" if by is None else by.label
        choice = Choice(bound, used, label, by is not None and by.descending)
        single = bound.unique and equals == len(parts)
        choices.append(((not single, -equals, -len(used), label != order), at, choice))
    return [choice for _, _, choice in sorted(choices, key=lambda each: each[:2])]
