"""What is stored and asked for, the same for every backend; every value is distinct."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
from measure import Side, each, over

__all__ = [
    "EPOCH",
    "TASKS",
    "Note",
    "below",
    "by_raw_growth",
    "chance",
    "cycled",
    "drawn",
    "in_chunks",
    "microseconds",
    "new_items",
    "new_note",
    "new_notes",
    "new_text",
    "numbers",
    "side",
]

TASKS = 64
EPOCH = datetime(2025, 1, 1, tzinfo=UTC)


class Note(msgspec.Struct, kw_only=True):
    """A record of about 300 bytes."""

    id: str
    user_id: str
    title: str
    body: str
    score: float
    tags: list[str]
    created_at: datetime


_WORDS = ("what", "the", "agent", "said", "about", "an", "order", "and", "which", "tool", "it", "called", "then")
numbers = itertools.count()
chance = random.Random(7)


def new_text(words: int) -> str:
    return " ".join(chance.choices(_WORDS, k=words))


def new_note(id_: str | None = None, user: str = "u1") -> Note:
    number = next(numbers)
    return Note(
        id=id_ or f"note-{number:010d}",
        user_id=user,
        title=new_text(4),
        body=new_text(38),
        score=chance.random(),
        tags=["a", f"t{number}"],
        created_at=EPOCH + timedelta(microseconds=number),
    )


def new_notes(count: int) -> Callable[[], list[Note]]:
    return lambda: [new_note() for _ in range(count)]


def drawn(ids: Sequence[str], count: int) -> Callable[[], list[str]]:
    return lambda: chance.choices(ids, k=count)


def side(prepare: Callable[[], Sequence[Any]], call: Callable[[Any], Any], operations: int, tasks: int = 1) -> Side:
    return Side(prepare, lambda items: each(call, items, tasks), operations)


def below(folder: str, name: str) -> str:
    place = Path(folder, name)
    place.mkdir()
    return str(place)


def in_chunks(prepare: Callable[[], Sequence[Any]], size: int = TASKS) -> Callable[[], list[Sequence[Any]]]:
    """What ``prepare`` makes, in pieces of ``size``."""

    def chunks() -> list[Sequence[Any]]:
        items = prepare()
        return [items[start : start + size] for start in range(0, len(items), size)]

    return chunks


def cycled(names: Sequence[str], count: int) -> Iterator[str]:
    return itertools.islice(itertools.cycle(names), count)


def microseconds(at: datetime) -> int:
    return (at - EPOCH) // timedelta(microseconds=1)


def new_items(names: Sequence[str], count: int) -> Callable[[], list[tuple[str, Note]]]:
    return lambda: [(name, new_note()) for name, _ in zip(itertools.cycle(names), range(count))]


def by_raw_growth(took: dict[str, float]) -> float:
    """How our side grew with the length of a log, over how the floor did."""
    return over("kvpersist@20k", "kvpersist@1k")(took) / over("floor@20k", "floor@1k")(took)
