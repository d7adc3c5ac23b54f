"""From a URL, a path or a mapping to a driver's typed options and the store's settings.

================================  =================================================================
``memory://``, ``memory://name``  private, or shared by name within the process
``sqlite:///rel.db``              a path relative to the current folder: three slashes
``sqlite:////var/lib/abs.db``     an absolute path: four (SQLAlchemy's rule)
``rel.db``, ``/var/lib/abs.db``   a path that ends in .db, .sqlite or .sqlite3 is a SQLite file
``file:///var/lib/dir``           a folder of files, by its absolute path
``./dir/``, ``/var/lib/dir/``     a path that ends in a slash is a folder of files
``dir::memory://bucket/p``        a chain, whose parts ``::`` joins, is fsspec's as a whole
``{"type": "sqlite", ...}``       the driver's options and the store's settings by name
``{"url": "sqlite:///x.db", ..}``  a URL, and more options beside it
================================  =================================================================

Parameters named ``kv.<name>`` are ours: a setting of the store (`StoreSettings`) or an option of the
driver. Every other parameter belongs to the backend and passes through. Durations are seconds, or
carry a unit: ``500ms``, ``30s``, ``5m``, ``12h``, ``7d``, ``2w``; ``none`` is None.

How a driver's ``Options`` (a Struct) receives the pieces of a URL: a field called ``url``, ``host``,
``port``, ``username``, ``password``, ``path`` or ``params`` gets the piece of that name of `UrlParts`,
a field called ``name`` gets ``host``. Or it has a class method ``from_url(parts)`` that returns a dict
of fields, and is asked instead. A piece that is in the URL and finds no place is refused. Every other
field is reached as ``kv.<field>``, or by its name in a mapping. Fields that hold a number take
durations; names of `StoreSettings` are the store's and never reach a driver.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Annotated, Any, Final, Literal, TypeAlias, TypedDict, get_type_hints
from urllib.parse import unquote, unquote_plus

import msgspec

from kvpersist import registry
from kvpersist.driver import DriverClass
from kvpersist.errors import BadOption

__all__ = [
    "StoreSettings",
    "Target",
    "UrlParts",
    "Where",
    "parse",
    "parse_duration",
    "redact",
    "redact_option",
    "split",
    "unknown_option",
]

Where: TypeAlias = str | os.PathLike[str] | Mapping[str, Any]
"""What names a store: a URL, a path, or a mapping with a ``type`` or ``url`` key."""

_UNITS: Final = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0, "w": 604800.0}  # seconds
_DURATION: Final = re.compile(r"([0-9]+(?:\.[0-9]+)?)(ms|s|m|h|d|w)")
_CHAIN: Final = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*(://[^?#]*)?::[A-Za-z][A-Za-z0-9+.-]*(://|::)")  # of two URLs
_SQLITE_FILE: Final = (".db", ".sqlite", ".sqlite3")
_SECRET: Final = re.compile(
    r"(?i)(pass|secret|token|credential|signature|api[_-]?key|access[_-]?key|account[_-]?key|connection_?string|^sig$|^key$)"
)
_PIECES: Final = ("url", "host", "port", "username", "password", "path", "params", "name")

_Duration: TypeAlias = Annotated[float, msgspec.Meta(gt=0)]


class StoreSettings(TypedDict, total=False):
    """What the store itself takes from ``kv.`` parameters; seconds where it is a time."""

    timeout: _Duration | None
    ttl: _Duration | None
    sweep: _Duration | None
    codec: Literal["msgpack", "json"]


_SETTINGS: Final[dict[str, Any]] = get_type_hints(StoreSettings, include_extras=True)


class UrlParts(msgspec.Struct, frozen=True, kw_only=True):
    """The pieces of a URL, percent-decoded; empty or None where it has none.

    Attributes:
        scheme: in lower case.
        path: without the slash that ends the authority: ``rel.db`` of ``sqlite:///rel.db``.
        host: as it is written; several hosts stay one text.
        params: the backend's own parameters; the last one of a name counts.
        url: the URL as given, without ``kv.`` parameters.
    """

    scheme: str
    host: str = ""
    port: int | None = None
    username: str = ""
    password: str = ""
    path: str = ""
    params: dict[str, str] = {}
    url: str = ""

    def __repr__(self) -> str:
        return f"UrlParts({redact(self.url)!r})"

    def __rich_repr__(self) -> list[tuple[str, Any]]:
        """Rich would show every field, a password too."""
        return [("url", redact(self.url))]


class Target(msgspec.Struct, frozen=True):
    """What to open: a driver's scheme and typed options, and the store's settings that were given.

    ``shown`` names the store to people and holds no password.
    """

    scheme: str
    options: msgspec.Struct
    settings: StoreSettings
    shown: str

    def __repr__(self) -> str:
        return f"Target({self.shown!r})"

    def __rich_repr__(self) -> list[tuple[str, Any]]:
        """Rich would show every field, a password too."""
        return [("shown", self.shown)]


def parse(where: Where, *, also: Sequence[str] = ()) -> Target:
    """Find the driver that ``where`` names, and convert what is given for it.

    Args:
        where: what names the store.
        also: further names that one may have meant who wrote an unknown option.

    Raises:
        BadOption: an unknown, repeated or malformed option, or something that is no URL.
        UnknownScheme: no driver is registered for the scheme.
        MissingExtra, BrokenPlugin: the driver cannot be loaded.
    """
    if isinstance(where, Mapping):
        return _parse_mapping(where, also)
    parts, ours = split(os.fspath(where))
    return _target(parts.scheme, parts, _written(ours), redact(parts.url), also)


def split(url: str) -> tuple[UrlParts, dict[str, str]]:
    """Split a URL or path into its pieces and our own parameters, these without their ``kv.``.

    Raises:
        BadOption: it is not a URL, has a fragment, or repeats one of our parameters.
    """
    if "://" not in url:
        if url.endswith(("/", os.sep)):
            return UrlParts(scheme="file", path=url, url=url), {}
        if not url.endswith(_SQLITE_FILE):
            raise BadOption(
                "url",
                f"{_clip(url)!r} is neither a URL nor a .db file nor a folder/: write sqlite:///data.db or memory://",
            )
        return UrlParts(scheme="sqlite", path=url, url=url), {}
    if _CHAIN.match(url):
        theirs, params, ours = _split_query(url.partition("?")[2])
        whole = url.partition("?")[0] + (f"?{theirs}" if theirs else "")
        return UrlParts(scheme="fsspec", params=params, url=whole), ours
    scheme, rest = url.split("://", 1)
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9+.-]*", scheme):
        raise BadOption("url", f"a scheme has letters, digits, '+', '-' and '.', not {_clip(scheme)!r}")
    if "#" in rest:
        raise BadOption("url", "it holds a '#': write %23 where the name itself has one")
    address, _, query = rest.partition("?")
    authority, slash, path = address.partition("/")
    theirs, params, ours = _split_query(query)
    userinfo, _, hostport = authority.rpartition("@")
    username, _, password = userinfo.partition(":")
    host, port = _split_port(hostport)
    parts = UrlParts(
        scheme=scheme.lower(),
        host=unquote(host),
        port=port,
        username=unquote(username),
        password=unquote(password),
        path=unquote(path),
        params=params,
        url=f"{scheme}://{authority}{slash}{path}" + (f"?{theirs}" if theirs else ""),
    )
    return parts, ours


def parse_duration(text: str) -> float:
    """Seconds of ``90``, ``1.5`` or of a number with a unit: ms, s, m, h, d, w; units may follow each other.

    Example:
        >>> parse_duration("500ms"), parse_duration("7d"), parse_duration("1h30m"), parse_duration("2")
        (0.5, 604800.0, 5400.0, 2.0)

    Raises:
        ValueError: it is none of these.
    """
    found = _DURATION.findall(text)
    if found and "".join(number + unit for number, unit in found) == text:
        return sum(float(number) * _UNITS[unit] for number, unit in found)
    if re.fullmatch(r"[0-9]+(\.[0-9]+)?", text):
        return float(text)
    raise ValueError(f"{_clip(text)!r} is not a duration such as 500ms, 30s, 12h or 7d")


def redact(url: str) -> str:
    """Return ``url`` with every password and secret parameter replaced by ``***``, also in malformed ones.

    Example:
        >>> redact("redis://ada:s3cret@db.example:6379/0?password=x&ssl=1")
        'redis://ada:***@db.example:6379/0?password=***&ssl=1'
    """
    scheme, separator, rest = url.partition("://")
    if not separator:
        return url
    address, mark, query = _redact_userinfo(rest).partition("?")
    pairs = [
        f"{name}=***" if value and _is_secret(unquote_plus(name)) else name + equals + value
        for name, equals, value in (pair.partition("=") for pair in query.split("&"))
    ]
    return f"{scheme}://{address}{mark}{'&'.join(pairs)}"


def redact_option(name: str, value: Any) -> str:
    """Return the value of one option of a mapping for people to read, without what is secret in it."""
    if isinstance(value, Mapping):
        return "{...}"
    return "***" if _is_secret(name) else redact(str(value))


def unknown_option(option: str, known: Sequence[str]) -> BadOption:
    """The error for an option that is not among ``known``, with the one that may be meant."""
    from difflib import get_close_matches

    near = get_close_matches(option, known, n=1) or [name for name in known if name == "kv." + option]
    meant = f"did you mean {near[0]}?" if near else "known: " + ", ".join(sorted(known))
    return BadOption(option, f"there is no such option; {meant}")


def _parse_mapping(where: Mapping[str, Any], also: Sequence[str]) -> Target:
    given: dict[str, Any] = {}
    for name, value in where.items():
        option = str(name).removeprefix("kv.")
        if option in given:
            raise BadOption(option, "it is given twice, with kv. and without")
        given[option] = value
    scheme = given.pop("type", None)
    if isinstance(scheme, str):
        plain = {name: (name, value) for name, value in given.items()}
        return _target(scheme.lower(), None, plain, f"{scheme.lower()}://{_shown_place(given)}", also)
    if scheme is None and isinstance(url := given.pop("url", None), str | os.PathLike):
        return _parse_beside(os.fspath(url), given, also)
    raise BadOption("type", 'a mapping names its store by {"type": "sqlite", ...} or {"url": "sqlite:///x.db", ...}')


def _parse_beside(url: str, given: Mapping[str, Any], also: Sequence[str]) -> Target:
    parts, ours = split(url)
    if twice := sorted(ours.keys() & given.keys()):
        raise BadOption(twice[0], "it is given in the URL and beside it: leave one out")
    if pieces := sorted(given.keys() & _PIECES):
        raise BadOption(pieces[0], "beside a URL it has no place: write it there, or no URL but type= and every piece")
    beside = {name: (name, value) for name, value in given.items()}
    return _target(parts.scheme, parts, _written(ours) | beside, redact(parts.url), also)


def _written(ours: Mapping[str, str]) -> dict[str, tuple[str, Any]]:
    return {name: ("kv." + name, value) for name, value in ours.items()}


def _target(
    scheme: str, parts: UrlParts | None, given: Mapping[str, tuple[str, Any]], shown: str, also: Sequence[str]
) -> Target:
    """``parts`` is None where a mapping gave every field by its name; ``given`` has each option as it was written."""
    driver = registry.driver_class(scheme)
    fields = {field.name: field.type for field in msgspec.structs.fields(driver.Options)}
    placed = {} if parts is None else _place(driver, fields, parts)
    types = fields if parts is None else {name: fields[name] for name in fields if name not in {*_PIECES, *placed}}
    types |= _SETTINGS
    values: dict[str, Any] = {}
    for name, (written, value) in given.items():
        if name not in types:
            prefix = written.removesuffix(name)
            raise unknown_option(written, [*(prefix + known for known in types), *(() if prefix else also)])
        values[name] = _convert(written, value, types[name])
    settings = {name: values.pop(name) for name in _SETTINGS if name in values}
    return Target(scheme, _build(driver, placed | values), msgspec.convert(settings, StoreSettings), shown)


def _place(driver: DriverClass, fields: Mapping[str, Any], parts: UrlParts) -> dict[str, Any]:
    """Give the pieces of the URL to the fields that ask for them; refuse a piece that nobody asked for."""
    own = getattr(driver.Options, "from_url", None)
    if own is not None:
        return own(parts)
    placed: dict[str, Any] = {name: getattr(parts, name) for name in _PIECES[:-1] if name in fields}
    if "name" in fields:
        placed["name"] = parts.host
    placed = {name: value for name, value in placed.items() if value not in ("", None, {})}
    if "url" in fields:
        return placed
    lost = [name for name in _PIECES[1:-1] if getattr(parts, name) not in ("", None, {}) and name not in placed]
    if "host" in lost and "name" in placed:
        lost.remove("host")
    if "params" in lost:
        known = [name for name in fields if name not in _PIECES] + list(_SETTINGS)
        raise unknown_option(next(iter(parts.params)), ["kv." + name for name in known])
    if "host" in lost and "path" in fields:
        raise BadOption("url", f"two slashes name a host: write {parts.scheme}:///rel.db, or //// for an absolute path")
    if lost:
        raise BadOption("url", f"{parts.scheme}:// takes no {lost[0]}")
    return placed


def _convert(option: str, value: Any, kind: Any) -> Any:
    if isinstance(value, PurePath):
        value = str(value)
    try:
        return msgspec.convert(value, kind, strict=False)
    except msgspec.ValidationError as error:
        if not isinstance(value, str) or not (value == "none" or _takes_number(kind)):
            raise BadOption(option, str(error)) from None
    try:
        return msgspec.convert(None if value == "none" else parse_duration(value), kind)
    except (ValueError, msgspec.ValidationError) as error:
        raise BadOption(option, str(error)) from None


def _build(driver: DriverClass, values: dict[str, Any]) -> msgspec.Struct:
    try:
        return msgspec.convert(values, driver.Options)
    except msgspec.ValidationError as error:
        missing = re.search(r"required field `(\w+)`", str(error))
        name = missing[1] if missing else "url"
        raise BadOption(name, "it is required" if missing else str(error)) from None


def _takes_number(kind: Any) -> bool:
    described = msgspec.inspect.type_info(kind)
    kinds = described.types if isinstance(described, msgspec.inspect.UnionType) else (described,)
    return any(isinstance(one, msgspec.inspect.FloatType) for one in kinds)


def _split_query(query: str) -> tuple[str, dict[str, str], dict[str, str]]:
    """Return the text of the backend's parameters, the same decoded, and ours without ``kv.``."""
    theirs: list[str] = []
    params: dict[str, str] = {}
    ours: dict[str, str] = {}
    for pair in filter(None, query.split("&")):
        name, _, value = (unquote_plus(piece) for piece in pair.partition("="))
        if not name.startswith("kv."):
            theirs.append(pair)
            params[name] = value
        elif name.removeprefix("kv.") in ours:
            raise BadOption(name, "it is given twice")
        else:
            ours[name.removeprefix("kv.")] = value
    return "&".join(theirs), params, ours


def _split_port(hostport: str) -> tuple[str, int | None]:
    if hostport.startswith("[") and "]" in hostport:
        host, _, rest = hostport[1:].partition("]")
        rest = rest.removeprefix(":")
    elif hostport.count(":") == 1:
        host, _, rest = hostport.partition(":")
    else:
        return hostport, None
    if not rest:
        return host, None
    if not (rest.isascii() and rest.isdigit() and int(rest) < 65536):
        raise BadOption(
            "url", "the port is not a number below 65536; write %3A, %2F and %40 for ':', '/' and '@' in a password"
        )
    return host, int(rest)


def _redact_userinfo(rest: str) -> str:
    head = re.split(r"[?#]", rest, maxsplit=1)[0]
    authority = head.partition("/")[0]
    if not authority:
        return rest  # a path: what looks like a user there is none
    port = authority.rpartition(":")[2] if ":" in authority else ""
    if "@" in head:
        end = head.rindex("@")
    elif "@" in rest and not (port == "" or port.isdigit()):
        end = rest.rindex("@")  # a password with a raw '?' or '#'
    else:
        return rest
    user, colon, _ = rest[:end].partition(":")
    return f"{user}{colon}{'***' if colon else ''}{rest[end:]}"


def _is_secret(name: str) -> bool:
    return _SECRET.search(name.removeprefix("kv.")) is not None


def _shown_place(given: Mapping[str, Any]) -> str:
    """The option of a mapping that tells one store from another."""
    for name in ("path", "name", "host"):
        if name in given:
            return f"/{given[name]}" if name == "path" else str(given[name])
    return redact(str(given["url"])).partition("://")[2] if "url" in given else ""


def _clip(text: str) -> str:
    """What a user wrote, short, and without what may be a password."""
    return redact(text[:60]) if "@" not in text else "..."
