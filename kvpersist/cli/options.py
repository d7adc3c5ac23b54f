"""Options that several commands share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Final

from cyclopts import Group, Parameter, validators

__all__ = ["FOR_PEOPLE", "USUAL_STORE", "Output", "StoreOption"]

_FORM = Group("Output", validator=validators.mutually_exclusive)


@Parameter(name="*")
@dataclass(frozen=True)
class StoreOption:
    """Which store is meant."""

    url: str | None = None
    """The store's URL, e.g. sqlite:///agent.db; default: KVPERSIST_URL, kvpersist.toml, your data folder."""


@Parameter(name="*")
@dataclass(frozen=True)
class Output:
    """In which form data is printed; without either: for people."""

    json: Annotated[bool, Parameter(group=_FORM)] = False
    """Print one JSON document."""
    jsonl: Annotated[bool, Parameter(group=_FORM)] = False
    """Print one JSON value per line, as they come."""


USUAL_STORE: Final = StoreOption()
FOR_PEOPLE: Final = Output()
