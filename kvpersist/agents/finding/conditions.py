"""What is asked of records: conditions in one spelling, and what tells whether a record meets them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any, TypeAlias, cast
from uuid import UUID

from kvpersist.agents.records import utc
from kvpersist.errors import BadRequest
from kvpersist.index.declaration import BoundIndex, Range
from kvpersist.index.fields import getter

__all__ = ["Test", "Where", "equal", "normal", "tests_of", "within"]

Test: TypeAlias = Callable[[Any], bool]
Where: TypeAlias = dict[str, Any]


def normal(where: Mapping[str, Any], aliases: Mapping[str, str], times: Iterable[str]) -> Where:
    """Return conditions in one spelling: fields by their name, metadata by paths, times in UTC, ids as text.

    Raises:
        BadRequest: a condition twice, on None, or on a time that is none.
    """
    asked: Where = {}
    for label, value in where.items():
        if value is None:
            raise BadRequest(f"{label}=None: records without a value cannot be asked for; leave it out")
        if label == "metadata":
            pairs = _metadata(value)
        else:
            pairs = {aliases.get(label, label): str(value) if isinstance(value, UUID) else value}
        if twice := sorted(asked.keys() & pairs.keys()):
            raise BadRequest(f"{twice[0]} is asked for twice: give one condition, or a range")
        asked |= pairs
    for label in times:
        value = asked.get(label)
        if isinstance(value, Range):
            asked[label] = Range(_time(label, value.low), _time(label, value.high))
        elif value is not None:
            asked[label] = _time(label, value)
    return asked


def _metadata(asked: Any) -> Where:
    if not isinstance(asked, Mapping):
        raise BadRequest("metadata: ask for {path: value}, such as {'topic': 'tea', 'order.id': 7}")
    pairs = {f"metadata.{path}": value for path, value in cast("Mapping[str, Any]", asked).items()}
    if None in pairs.values():
        raise BadRequest("metadata: what has no value cannot be asked for; leave it out")
    return pairs


def _time(label: str, value: Any) -> datetime | None:
    if value is None:  # an open end
        return None
    if not isinstance(value, datetime):
        raise BadRequest(f"{label}: ask for a datetime, or a range made with between, at_least or at_most")
    return utc(value, label)


def within(value: Any, asked: Any) -> bool:
    """Whether a value is what is asked for: equal, in the range, or a collection that contains it."""
    if isinstance(asked, Range):
        if value is None:
            return False
        try:
            return (asked.low is None or value >= asked.low) and (asked.high is None or value <= asked.high)
        except TypeError:  # of another type
            return False
    return equal(value, asked)


def equal(value: Any, asked: Any) -> bool:
    """Whether ``asked`` is ``value``, or contained in it: a mapping by its keys, an element in a list."""
    if isinstance(asked, dict):
        if not isinstance(value, dict):
            return False
        mine, wanted = cast("dict[str, Any]", value), cast("dict[str, Any]", asked)
        return all(key in mine and equal(mine[key], each) for key, each in wanted.items())
    if isinstance(value, list) and not isinstance(asked, list):
        return any(equal(each, asked) for each in cast("list[Any]", value))
    if isinstance(value, bool) is not isinstance(asked, bool):  # True == 1
        return False
    return bool(value == asked)


def tests_of(
    type_: type, indexes: Sequence[BoundIndex], special: Mapping[str, Callable[[Any], Test]], where: Where
) -> list[Test]:
    """Return what tells on a record whether it is asked for: one test per condition.

    Args:
        special: conditions that are no fields: what makes a test of the value asked for.

    Raises:
        BadRequest: no such condition; the error names those there are.
    """
    tests: list[Test] = []
    fields: tuple[str, ...] = cast("Any", type_).__struct_fields__
    computed = {part.label: part for bound in indexes for part in bound.parts[: bound.fields]}
    for label, asked in where.items():
        if label in special:
            tests.append(special[label](asked))
        elif label.partition(".")[0] in fields:
            tests.append(_field_test(getter(type_, label), asked))
        elif label in computed:
            tests.append(_part_test(computed[label], asked))
        else:
            known = ", ".join(sorted({*fields, *computed, *special}))
            raise BadRequest(f"{label!r} cannot be asked for; use metadata={{path: value}} or one of {known}")
    return tests


def _field_test(get: Callable[[Any], Any], asked: Any) -> Test:
    return lambda record: within(get(record), asked)


def _part_test(part: Any, asked: Any) -> Test:
    return lambda record: any(within(value, asked) for value in part.of(record))
