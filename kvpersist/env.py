"""Variables of the environment: a file of them, and those of other systems.

Nothing here is looked at unless it is asked for by name: `variables` adds a ``.env`` file, and
`from_database_url`, `from_redis_url` and `from_kode_env` return what `kvpersist.open` takes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, TypeAlias, cast
from urllib.parse import parse_qsl, quote_plus

from kvpersist import registry, urls
from kvpersist.driver import needs_extra
from kvpersist.errors import BadOption, UnknownScheme

__all__ = ["DotEnv", "Settings", "from_database_url", "from_kode_env", "from_redis_url", "variables"]

DotEnv: TypeAlias = bool | str | os.PathLike[str]
"""True: the file ``.env`` of the current folder, if it is there; a path: that file, which has to be there."""

_Values: TypeAlias = dict[str, str]
_Options: TypeAlias = dict[str, Any]

_SAME: Final = {"postgis": "postgresql", "mysql2": "mysql", "sqlite3": "sqlite"}
_REDIS: Final = ("redis", "rediss", "valkey", "unix")
_PLUGIN: Final = "a driver for it can be added as a plugin: docs/how-to/write-a-driver.md shows how"


class Settings(dict[str, Any]):
    """What `kvpersist.open` takes as a mapping; shown without passwords."""

    def __repr__(self) -> str:
        shown = ", ".join(f"{name!r}: {urls.redact_option(name, value)!r}" for name, value in self.items())
        return f"{{{shown}}}"


def variables(
    dotenv: DotEnv = False, *, environ: Mapping[str, str] | None = None, folder: Path | None = None
) -> Mapping[str, str]:
    """The environment, and below it what a file of variables says: what is set already wins.

    The process's own environment is not changed. A file needs ``kvpersist[dotenv]``.

    Args:
        dotenv: which file, if any.
        environ: instead of ``os.environ``.
        folder: instead of the current folder.

    Raises:
        BadOption: a file that is named is missing, or cannot be read.
        MissingExtra: python-dotenv is not installed.
    """
    environ = os.environ if environ is None else environ
    if dotenv is False:
        return environ
    path = (folder or Path.cwd()) / (".env" if dotenv is True else dotenv)
    if not path.is_file():
        if dotenv is True:
            return environ
        raise BadOption("dotenv", f"{path} is not there: name a file, or True for .env if there is one")
    return {**_read(path), **environ}


def from_database_url(
    variable: str = "DATABASE_URL", *, dotenv: DotEnv = False, environ: Mapping[str, str] | None = None
) -> Settings:
    """Read a database's URL as Prisma, SQLAlchemy and hosting services write it.

    ``postgresql://``, ``postgres://``, ``mysql://``, ``mariadb://`` (also with a client's name, as in
    ``postgresql+asyncpg://``), ``mongodb://``, ``mongodb+srv://``; ``file:./dev.db`` and ``sqlite:`` are
    a SQLite file, relative to the current folder. Prisma's parameters become ours: ``schema``,
    ``connection_limit``, ``connect_timeout``, ``pool_timeout``, ``socket_timeout``, ``pgbouncer``,
    ``sslaccept``. Every other scheme that has a driver is taken as it is.

    Raises:
        BadOption: the variable is not set, or says what cannot be kept; it is named, its value is not shown.
        UnknownScheme: there is no driver, as for SQL Server.
        MissingExtra: as `variables`.
    """
    url = _asked(variables(dotenv, environ=environ), variable, "postgresql://user@host/database")
    scheme, colon, rest = url.partition(":")
    base = scheme.lower() if scheme.lower() == "mongodb+srv" else scheme.lower().partition("+")[0]
    base = _SAME.get(base, base)
    if not colon or not rest:
        raise BadOption(variable, "it is no URL: write postgresql://user@host/database")
    if base in ("file", "sqlite"):
        return _sqlite(variable, base, rest)
    if base == "jdbc" or base not in registry.schemes():
        shown = rest.partition(":")[0] if base == "jdbc" else base
        raise UnknownScheme(shown, "", registry.schemes(), f"{variable} names it: {_PLUGIN}")
    head, _, query = rest.partition("?")
    given = dict(parse_qsl(query, keep_blank_values=True))
    translate = _TRANSLATE.get(base)
    options = {} if translate is None else translate(variable, given)
    theirs = "&".join(f"{quote_plus(name)}={quote_plus(value)}" for name, value in given.items())
    return Settings(url=f"{base}:{head}" + (f"?{theirs}" if theirs else ""), **options)


def from_redis_url(
    variable: str = "REDIS_URL", *, dotenv: DotEnv = False, environ: Mapping[str, str] | None = None
) -> Settings:
    """Read a Redis server's URL; ``host`` and ``host:port`` alone are taken too.

    Raises:
        BadOption: the variable is not set, or names something else; its value is not shown.
        MissingExtra: as `variables`.
    """
    url = _asked(variables(dotenv, environ=environ), variable, "redis://host:6379/0")
    if "://" not in url:
        url = f"redis://{url}"
    if (scheme := url.partition("://")[0].lower()) not in _REDIS:
        raise BadOption(variable, f"it begins with {scheme}://, not with one of {', '.join(_REDIS)}")
    return Settings(url=url)


def from_kode_env(*, dotenv: DotEnv = False, environ: Mapping[str, str] | None = None) -> Settings:
    """Read what the Kode SDK's documentation names: a database, and a folder for what it keeps in files.

    ``KODE_STORE_TYPE`` is ``sqlite`` (``KODE_SQLITE_PATH``, else ``./data/agents.db``) or ``postgres``
    (``POSTGRES_HOST``, else localhost; ``POSTGRES_PORT``, 5432; ``POSTGRES_DB``, kode_agents;
    ``POSTGRES_USER``, kode; ``POSTGRES_PASSWORD``). ``KODE_STORE_PATH``, else ``./data/store``, is the
    folder of todos, history windows, recovered files and media. Relative paths start at the current folder.

    Raises:
        BadOption: a variable is missing or says nothing known; it is named, a password is not shown.
        MissingExtra: as `variables`.
    """
    given = variables(dotenv, environ=environ)
    kind = _asked(given, "KODE_STORE_TYPE", "sqlite or postgres").lower()
    files = {"type": "file", "path": str(Path(given.get("KODE_STORE_PATH") or "./data/store").absolute())}
    if kind == "sqlite":
        return Settings(type="sqlite", path=given.get("KODE_SQLITE_PATH") or "./data/agents.db", files=files)
    if kind != "postgres":
        raise BadOption(
            "KODE_STORE_TYPE", f"{kind[:40]!r} is neither sqlite nor postgres; a folder of files is file:///DIR"
        )
    port = given.get("POSTGRES_PORT") or "5432"
    if not (port.isascii() and port.isdigit() and 0 < int(port) < 65536):
        raise BadOption("POSTGRES_PORT", "it is not a number below 65536")
    return Settings(
        type="postgresql",
        host=given.get("POSTGRES_HOST") or "localhost",
        port=int(port),
        database=given.get("POSTGRES_DB") or "kode_agents",
        username=given.get("POSTGRES_USER") or "kode",
        password=_asked(given, "POSTGRES_PASSWORD", "the password of POSTGRES_USER"),
        files=files,
    )


def _read(path: Path) -> _Values:
    with needs_extra("dotenv", module="dotenv"):
        from dotenv.main import dotenv_values  # pyright: ignore[reportMissingImports, reportUnknownVariableType]
        from dotenv.parser import parse_stream  # pyright: ignore[reportMissingImports, reportUnknownVariableType]
    parsed, valued = (
        cast("Callable[[Any], Any]", parse_stream),
        cast("Callable[..., dict[str, str | None]]", dotenv_values),
    )
    try:
        with path.open(encoding="utf-8") as file:
            for binding in parsed(file):
                if binding.error:
                    raise BadOption("dotenv", f"{path}, line {binding.original.line}: it is not NAME=value")
        found = valued(path, encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadOption("dotenv", f"{path} cannot be read: {error}") from error
    return {name: value for name, value in found.items() if value is not None}


def _asked(given: Mapping[str, str], variable: str, meant: str) -> str:
    value = given.get(variable, "").strip()
    if not value:
        raise BadOption(variable, f"the variable is not set, or empty: set it to {meant}")
    return value


def _sqlite(variable: str, base: str, rest: str) -> Settings:
    """``file:`` as Prisma writes it, ``sqlite:`` with any number of slashes."""
    path, _, query = rest.partition("?")
    for name in dict(parse_qsl(query, keep_blank_values=True)):
        if name not in ("connection_limit", "socket_timeout", "pool_timeout", "connect_timeout", "mode", "cache"):
            raise BadOption(variable, f"of a SQLite file it may not say {name[:40]!r}: leave it out")
    if path.startswith("//"):
        host, slash, behind = path[2:].partition("/")
        absolute = base == "file" or behind.startswith("/")
        path = host + slash + behind if host else ("/" if absolute else "") + behind.removeprefix("/")
    if not path or path.endswith("/"):
        raise BadOption(variable, f"{base}: is a SQLite file here: write file:./dev.db")
    return Settings(type="sqlite", path=path)


def _pool(given: _Values) -> _Options:
    """Take what Prisma says of pools and times out of ``given``; 0 is without limit there."""
    options: _Options = {}
    waits = [given.pop(name, "0") for name in ("connect_timeout", "pool_timeout")]
    for name, value in (
        ("pool_max", given.pop("connection_limit", "")),
        ("connect_timeout", next((wait for wait in waits if wait not in ("", "0")), "")),
        ("timeout", given.pop("socket_timeout", "")),
    ):
        if value not in ("", "0"):
            options[name] = value
    return options


def _verified(variable: str, given: _Values) -> bool | None:
    """Whether certificates are looked at; None where nothing is said."""
    if "sslidentity" in given:
        raise BadOption(variable, "sslidentity is a PKCS 12 file, which the client cannot read: give PEM files")
    accept = given.pop("sslaccept", None)
    if accept is not None and accept not in ("strict", "accept_invalid_certs"):
        raise BadOption(variable, "sslaccept is strict or accept_invalid_certs")
    return None if accept is None else accept == "strict"


def _postgres(variable: str, given: _Values) -> _Options:
    options = _pool(given)
    verified = _verified(variable, given)
    if verified is not None:
        given["sslmode"] = "verify-full" if verified else given.get("sslmode", "require")
    for name in ("schema", "pgbouncer"):
        if value := given.pop(name, ""):
            options[name] = value
    given.pop("statement_cache_size", None)  # the client's own tuning
    if given.pop("channel_binding", "prefer") == "require":
        raise BadOption(variable, "channel_binding=require is not what asyncpg can do: leave it out, keep sslmode")
    return options


def _mysql(variable: str, given: _Values) -> _Options:
    options = _pool(given)
    verified = _verified(variable, given)
    if "ssl" in given and verified is None:  # as mysql2 takes it
        try:
            said: Any = json.loads(given.pop("ssl"))
        except ValueError as error:
            raise BadOption(variable, 'ssl is JSON such as {"rejectUnauthorized":true}') from error
        verified = bool(said) and (not isinstance(said, dict) or bool(cast(Any, said).get("rejectUnauthorized", True)))
    if verified is not None:
        options["ssl"] = "verify-full" if verified else "require"
    for theirs, ours in (("socket", "unix_socket"), ("sslcert", "ssl_ca")):
        if theirs in given:
            given[ours] = given.pop(theirs)
    if given.pop("charset", "utf8mb4").lower() not in ("utf8mb4", "utf8"):
        raise BadOption(variable, "charset is utf8mb4: leave it out")
    return options


_TRANSLATE: Final[dict[str, Callable[[str, _Values], _Options]]] = {
    "postgresql": _postgres,
    "postgres": _postgres,
    "mysql": _mysql,
    "mariadb": _mysql,
}
