"""How far a long operation has come: library functions report it, faces show it, nobody prints here."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from msgspec import Struct

__all__ = ["OnProgress", "Progress"]


class Progress(Struct, frozen=True):
    """``done`` of ``total`` units; ``total`` is None where it is not known beforehand."""

    done: int
    total: int | None
    unit: str
    label: str = ""


OnProgress: TypeAlias = Callable[[Progress], None]
"""Called in the event loop after each unit; it must return at once, and what it raises ends the operation."""
