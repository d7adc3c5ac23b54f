"""Which store is meant when none is named.

An argument goes before the variable ``KVPERSIST_URL``, this before ``./kvpersist.toml`` or the table
``[tool.kvpersist]`` of ``./pyproject.toml``, these before the user's ``kvpersist/config.toml``, and
without any of them it is a SQLite file in the user's data folder. The first that names a store decides
alone: nothing of the others is mixed into it. A file names a store by what `kvpersist.urls.parse` takes
as a mapping, paths being relative to the current folder::

    url = "sqlite:///agent.db"
    timeout = "5s"
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Final, cast

import msgspec

from kvpersist import urls
from kvpersist.errors import BadOption, ReadOnly

__all__ = ["VARIABLE", "Origin", "Resolved", "default_path", "origins", "resolve"]

VARIABLE: Final = "KVPERSIST_URL"
"""The environment variable that names the store."""


class Origin(msgspec.Struct, frozen=True, kw_only=True):
    """A place that can name the store.

    Attributes:
        source: "argument", the variable, or a file.
        value: what it says, without passwords; None: nothing.
        used: it is the one that decides.
    """

    source: str
    value: str | None
    used: bool


class Resolved(msgspec.Struct, frozen=True, dict=True):
    """The store that is meant, as `kvpersist.urls.parse` takes it, and who says so."""

    where: urls.Where
    source: str

    @cached_property
    def target(self) -> urls.Target:
        """What it names; errors are those of `kvpersist.urls.parse`."""
        return urls.parse(self.where)

    def __repr__(self) -> str:
        return f"Resolved({_shown(self.where)!r} from {self.source})"


def resolve(
    where: urls.Where | None = None, *, environ: Mapping[str, str] | None = None, folder: Path | None = None
) -> Resolved:
    """Find the store that is meant; the folder of the default file is made if it is the one.

    Args:
        where: the argument, None if there is none.
        environ: instead of ``os.environ``.
        folder: instead of the current folder.

    Raises:
        BadOption: a configuration file that decides cannot be read, or does not name a store.
        ReadOnly: the default file's folder cannot be made.
    """
    for source, found in _candidates(where, os.environ if environ is None else environ, folder or Path.cwd()):
        if found is not None:
            return Resolved(found, source)
    path = default_path()
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ReadOnly(f"the folder of {path} cannot be made ({error.strerror}): name a store in {VARIABLE}") from error
    return Resolved({"type": "sqlite", "path": str(path)}, "default")


def origins(
    where: urls.Where | None = None, *, environ: Mapping[str, str] | None = None, folder: Path | None = None
) -> list[Origin]:
    """Every place that can name the store, the strongest first, with what it says; nothing is made.

    Raises:
        BadOption: a configuration file cannot be read.
    """
    candidates = list(_candidates(where, os.environ if environ is None else environ, folder or Path.cwd()))
    candidates.append(("default", str(default_path())))
    winner = next(source for source, found in candidates if found is not None)
    return [
        Origin(source=source, value=None if found is None else _shown(found), used=source == winner)
        for source, found in candidates
    ]


def default_path() -> Path:
    """The SQLite file that is used where nothing else is named."""
    from platformdirs import user_data_path

    return user_data_path("kvpersist", appauthor=False) / "default.db"


def _candidates(
    where: urls.Where | None, environ: Mapping[str, str], folder: Path
) -> Iterator[tuple[str, urls.Where | None]]:
    """Lazily: a file below the one that decides is not read, so it cannot fail."""
    yield "argument", where
    yield VARIABLE, environ.get(VARIABLE) or None
    for path, table in ((folder / "kvpersist.toml", ()), (folder / "pyproject.toml", ("tool", "kvpersist"))):
        yield str(path), _read(path, table)
    from platformdirs import user_config_path

    path = user_config_path("kvpersist", appauthor=False) / "config.toml"
    yield str(path), _read(path, ())


def _read(path: Path, table: tuple[str, ...]) -> dict[str, Any] | None:
    """Return the table of a TOML file that names a store, None where there is no file, or no such table."""
    try:
        if not path.is_file():
            return None
        import tomllib

        found: Any = tomllib.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise BadOption(str(path), f"it cannot be read: {error}") from error
    for name in table:
        found = cast("dict[str, Any]", found).get(name)
        if not isinstance(found, dict):
            return None
    named = cast("dict[str, Any]", found)
    if not named:
        return None
    if not ({"url", "type"} & named.keys()):
        raise BadOption(str(path), 'it names no store: write url = "sqlite:///agent.db"')
    return named


def _shown(where: urls.Where) -> str:
    if isinstance(where, Mapping):
        return ", ".join(f"{name} = {urls.redact_option(str(name), value)}" for name, value in where.items())
    return urls.redact(os.fspath(where))
