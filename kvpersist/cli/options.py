"""Options that several commands share."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Final

from cyclopts import Group, Parameter, validators

from kvpersist import config
from kvpersist.errors import BadOption
from kvpersist.urls import Where

__all__ = ["FOR_PEOPLE", "USUAL_STORE", "Count", "Output", "StoreOption"]

_FORM = Group("Output", validator=validators.mutually_exclusive)

Count = Annotated[int, Parameter(name=["--limit", "-n"], validator=validators.Number(gte=0))]


@Parameter(name="*")
@dataclass(frozen=True)
class StoreOption:
    """Which store is meant."""

    url: str | None = None
    """the store, such as sqlite:///agent.db; default: KVPERSIST_URL, kvpersist.toml, your data folder."""
    profile: str | None = None
    """a store that kvpersist.toml names in [profiles.NAME]; --url goes before it."""

    def named(self, url: str | None) -> StoreOption:
        """This option, or one that names ``url``, the argument of a command."""
        if url is None:
            return self
        if self.url is not None:
            raise BadOption("--url", "the store is named twice: leave one out")
        return StoreOption(url)

    @property
    def meant(self) -> Where | None:
        """What an open function takes."""
        if self.url is not None or self.profile is None:
            return self.url
        return config.resolve(profile=self.profile).named

    def resolved(self) -> config.Resolved:
        """The store, and who says so."""
        return config.resolve(self.url, profile=self.profile)

    def existing(self) -> Where:
        """The store to read: one that was named is not made by looking into it, where its driver has a mode."""
        found = self.resolved()
        creates = [(name, closed) for name, creating, closed in _CREATE if _option(found, name) == creating]
        where = found.where
        if found.source == "default" or not creates or creates[0][0] in str(where):
            return found.named
        named: Mapping[str, Any] = where if isinstance(where, Mapping) else {"url": os.fspath(where)}
        return {**named, **found.beside, **dict(creates)}


# The option by which a driver's open makes what is missing, its value that does, and the one that does not.
_CREATE: Final = (("mode", "rwc", "rw"), ("auto_create", True, False))


def _option(found: config.Resolved, name: str) -> Any:
    return getattr(found.target.options, name, None)


@Parameter(name="*")
@dataclass(frozen=True)
class Output:
    """In which form data is printed; without either: for people."""

    json: Annotated[bool, Parameter(group=_FORM)] = False
    """print one JSON document."""
    jsonl: Annotated[bool, Parameter(group=_FORM)] = False
    """print one JSON value per line, as they come."""


USUAL_STORE: Final = StoreOption()
FOR_PEOPLE: Final = Output()
