"""Which store is meant when none is named.

An argument goes before a profile that is asked for, this before a home folder that is given, then come
the variables ``KVPERSIST_URL`` and ``KVPERSIST_PROFILE``, then ``./kvpersist.toml`` or the table
``[tool.kvpersist]`` of ``./pyproject.toml``, then the user's ``kvpersist/config.toml``, and without any of
them it is a SQLite file in the folder ``KVPERSIST_HOME`` or in the user's data folder. The first that
names a store decides alone: nothing of the others is mixed into it. A file names a store by what
`kvpersist.urls.parse` takes as a mapping, paths being relative to the current folder, and may name others
as profiles::

    url = "sqlite:///agent.db"
    timeout = "5s"

    [profiles.prod]
    url = "postgresql://db/agents"
    files = "file:///var/lib/agents"

``files`` and ``events`` are the stores that `kvpersist.open` takes beside it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Final, cast

import msgspec

from kvpersist import urls
from kvpersist.env import DotEnv, Settings, from_database_url, from_kode_env, from_redis_url, variables
from kvpersist.errors import BadOption, ReadOnly
from kvpersist.home import Home

__all__ = [
    "HOME",
    "PROFILE",
    "VARIABLE",
    "DotEnv",
    "Origin",
    "Resolved",
    "Settings",
    "default_path",
    "from_database_url",
    "from_kode_env",
    "from_redis_url",
    "home_of",
    "origins",
    "resolve",
    "variables",
]

VARIABLE: Final = "KVPERSIST_URL"
"""The environment variable that names the store."""

PROFILE: Final = "KVPERSIST_PROFILE"
"""The environment variable that names a profile of a configuration file."""

HOME: Final = "KVPERSIST_HOME"
"""The environment variable that names the home folder."""

_BESIDE: Final = ("files", "events")  # what a mapping may say that is not of the store itself
_MODE: Final = 0o700


class Origin(msgspec.Struct, frozen=True, kw_only=True):
    """A place that can name the store.

    Attributes:
        source: "argument", "profile" and its name, "home", the variable, or a file.
        value: what it says, without passwords; None: nothing.
        used: it is the one that decides.
    """

    source: str
    value: str | None
    used: bool


class Resolved(msgspec.Struct, frozen=True, dict=True):
    """The store that is meant, as `kvpersist.urls.parse` takes it, and who says so.

    ``files`` and ``events`` are what the same place says of the stores beside it, None where it says nothing.
    """

    where: urls.Where
    source: str
    files: Any = None
    events: Any = None

    @cached_property
    def target(self) -> urls.Target:
        """What it names; errors are those of `kvpersist.urls.parse`."""
        return urls.parse(self.where)

    @property
    def beside(self) -> dict[str, Any]:
        """``files`` and ``events``, where they are given."""
        given = {"files": self.files, "events": self.events}
        return {name: value for name, value in given.items() if value is not None}

    @property
    def named(self) -> urls.Where:
        """Everything that `kvpersist.open` takes as its first argument: ``where``, and what is beside it."""
        if not self.beside:
            return self.where
        where = self.where if isinstance(self.where, Mapping) else {"url": os.fspath(self.where)}
        return {**where, **self.beside}

    def __repr__(self) -> str:
        return f"Resolved({_shown(self.where)!r} from {self.source})"

    def __rich_repr__(self) -> list[tuple[str, Any]]:
        """Rich would show every field, a password too."""
        return [("where", _shown(self.where)), ("source", self.source)]


def resolve(
    where: urls.Where | None = None,
    *,
    profile: str | None = None,
    home: Home | str | os.PathLike[str] | None = None,
    environ: Mapping[str, str] | None = None,
    folder: Path | None = None,
) -> Resolved:
    """Find the store that is meant; the folder of the default file is made if it is the one.

    Args:
        where: the argument, None if there is none.
        profile: the profile that is asked for, of the first file that has it.
        home: a home folder that is asked for; one that ``KVPERSIST_HOME`` names only moves the default.
        environ: instead of ``os.environ``.
        folder: instead of the current folder.

    Raises:
        BadOption: a configuration file that decides cannot be read, or does not name a store; no file
            has the profile.
        ReadOnly: the default file's folder cannot be made.
    """
    environ = os.environ if environ is None else environ
    for source, found in _candidates(where, profile, home, environ, folder or Path.cwd()):
        if found is not None:
            if source == "home":
                _make_folder_of(found)
            return _resolved(found, source)
    place = _default(environ)
    _make_folder_of(place)
    return Resolved(place, "default")


def origins(
    where: urls.Where | None = None,
    *,
    profile: str | None = None,
    home: Home | str | os.PathLike[str] | None = None,
    environ: Mapping[str, str] | None = None,
    folder: Path | None = None,
) -> list[Origin]:
    """Every place that can name the store, the strongest first, with what it says; nothing is made.

    Raises:
        BadOption: a configuration file cannot be read, or none has the profile.
    """
    environ = os.environ if environ is None else environ
    candidates = list(_candidates(where, profile, home, environ, folder or Path.cwd()))
    candidates.append(("default", str(default_path(environ))))
    winner = next(source for source, found in candidates if found is not None)
    return [
        Origin(source=source, value=None if found is None else _shown(found), used=source == winner)
        for source, found in candidates
    ]


def default_path(environ: Mapping[str, str] | None = None) -> Path:
    """The SQLite file that is used where nothing else is named."""
    home = home_of(None, environ)
    if home is not None:
        return home.data / "default.db"
    from platformdirs import user_data_path

    return user_data_path("kvpersist", appauthor=False) / "default.db"


def home_of(home: Home | str | os.PathLike[str] | None = None, environ: Mapping[str, str] | None = None) -> Home | None:
    """The home folder: the argument, or what ``KVPERSIST_HOME`` names, or None; nothing is made.

    Raises:
        BadOption: the argument is empty.
    """
    if home is not None:
        return home if isinstance(home, Home) else Home(home)
    named = (os.environ if environ is None else environ).get(HOME)
    return Home(named) if named else None


def _candidates(
    where: urls.Where | None,
    profile: str | None,
    home: Home | str | os.PathLike[str] | None,
    environ: Mapping[str, str],
    folder: Path,
) -> Iterator[tuple[str, urls.Where | None]]:
    """Lazily: a file below the one that decides is not read, so it cannot fail."""
    yield "argument", where
    if profile is not None:
        yield f"profile {profile}", _profile(profile, folder)
    if home is not None:
        yield "home", _in(cast(Home, home_of(home)))
    yield VARIABLE, environ.get(VARIABLE) or None
    named = environ.get(PROFILE)
    yield PROFILE, _profile(named, folder) if named else None
    for path, table in _files(folder):
        yield str(path), _store_of(path, _read(path, table))


def _files(folder: Path) -> Iterator[tuple[Path, tuple[str, ...]]]:
    yield folder / "kvpersist.toml", ()
    yield folder / "pyproject.toml", ("tool", "kvpersist")
    from platformdirs import user_config_path

    yield user_config_path("kvpersist", appauthor=False) / "config.toml", ()


def _profile(name: str, folder: Path) -> dict[str, Any]:
    known: list[str] = []
    for path, table in _files(folder):
        profiles: Any = (_read(path, table) or {}).get("profiles") or {}
        if not isinstance(profiles, dict):
            raise BadOption(str(path), "profiles are tables: write [profiles.NAME]")
        found = cast("dict[str, Any]", profiles).get(name)
        if found is not None:
            store = _store_of(path, cast("dict[str, Any]", found)) if isinstance(found, dict) else None
            if store is None:
                raise BadOption(str(path), f'profile {name!r} names no store: write url = "sqlite:///agent.db"')
            return store
        known += [other for other in cast("dict[str, Any]", profiles) if other not in known]
    there = f"there are: {', '.join(known)}" if known else "write [profiles.NAME] into kvpersist.toml"
    raise BadOption("profile", f"no configuration file has a profile {name!r}; {there}")


def _read(path: Path, table: tuple[str, ...]) -> dict[str, Any] | None:
    """Return a TOML file's table, None where there is no file, or no such table."""
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
    return cast("dict[str, Any]", found)


def _store_of(path: Path, table: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """What of a table names a store; None where it says nothing but of profiles."""
    named = {name: value for name, value in (table or {}).items() if name != "profiles"}
    if not named:
        return None
    if not ({"url", "type"} & named.keys()):
        raise BadOption(str(path), 'it names no store: write url = "sqlite:///agent.db"')
    return named


def _resolved(found: urls.Where, source: str) -> Resolved:
    if not isinstance(found, Mapping) or not any(name in found for name in _BESIDE):
        return Resolved(found, source)
    of_store = {name: value for name, value in found.items() if name not in _BESIDE}
    return Resolved(of_store, source, found.get("files"), found.get("events"))


def _in(home: Home) -> dict[str, Any]:
    return {"type": "sqlite", "path": str(home.data / "default.db")}


def _default(environ: Mapping[str, str]) -> dict[str, Any]:
    return {"type": "sqlite", "path": str(default_path(environ))}


def _make_folder_of(where: urls.Where) -> None:
    path = Path(cast("Mapping[str, Any]", where)["path"])
    try:
        path.parent.mkdir(mode=_MODE, parents=True, exist_ok=True)
    except OSError as error:
        raise ReadOnly(f"the folder of {path} cannot be made ({error.strerror}): name a store in {VARIABLE}") from error


def _shown(where: urls.Where) -> str:
    if isinstance(where, Mapping):
        return ", ".join(f"{name} = {urls.redact_option(str(name), value)}" for name, value in where.items())
    return urls.redact(os.fspath(where))
