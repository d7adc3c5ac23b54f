"""Opening a store: what is meant, and what an open function returns."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Coroutine, Generator, Mapping, Sequence
from typing import Any, Final, Generic, Literal, Protocol, TypeVar, cast

import msgspec

from kvpersist import config, registry, urls
from kvpersist.driver import Clock, Driver
from kvpersist.errors import BadOption
from kvpersist.home import Home
from kvpersist.store import Store

__all__ = ["Opening", "caller_line", "named_by", "open_named", "open_store"]

_ARGUMENTS: Final = ("clock", "profile", "home", "dotenv")  # of `open_store`, that are no settings of a URL
_SWEEP: Final = 60.0  # seconds between removals of expired entries


class _Closes(Protocol):
    async def close(self) -> None: ...


_Closing = TypeVar("_Closing", bound=_Closes)


class Opening(Generic[_Closing]):
    """What an open function returns: ``async with`` it, or await it and close what you get."""

    def __init__(self, make: Callable[[], Coroutine[Any, Any, _Closing]], *, closes: bool = True) -> None:
        self._make = make
        self._closes = closes
        self._made: _Closing | None = None

    def __await__(self) -> Generator[Any, Any, _Closing]:
        return self._make().__await__()

    async def __aenter__(self) -> _Closing:
        self._made = await self._make()
        return self._made

    async def __aexit__(self, *_: object) -> None:
        if self._made is not None and self._closes:
            await self._made.close()


def open_store(
    where: urls.Where | Driver | Store | None = None,
    *,
    codec: Literal["msgpack", "json"] | None = None,
    ttl: float | None | msgspec.UnsetType = msgspec.UNSET,
    timeout: float | None | msgspec.UnsetType = msgspec.UNSET,
    clock: Clock = time.time,
    sweep: float | None | msgspec.UnsetType = msgspec.UNSET,
    profile: str | None = None,
    home: Home | str | os.PathLike[str] | None = None,
    dotenv: config.DotEnv = False,
    **options: Any,
) -> Opening[Store]:
    """Open a store; ``async with`` it, or await it and close it.

    Settings left out here come from the URL (``kv.ttl=7d``), then from the defaults below.

    Args:
        where: a URL, a path, a mapping with a ``type`` key, a ready Driver (yours to close), an open
            Store (given back as it is, and yours to close), or None for the configured default.
        codec: "msgpack" or "json" (readable in the backend's own tools); default: as the driver prefers.
        ttl: seconds every entry lives unless told otherwise; default None: for ever.
        timeout: seconds after which a call fails; default 10; None: never.
        clock: seconds since 1970; replaced in tests of expiry.
        sweep: seconds between removals of expired entries; default 60; None: only by `Store.sweep`.
        profile: instead of ``where``: the profile of this name in a configuration file. Beside ``where`` it
            is an option of the driver, if that has one of this name.
        home: a folder; without ``where`` and ``profile`` the store is in it. See `kvpersist.home`.
        dotenv: look for variables in a file too: True: ``.env``, if it is there; a path: that file.
        options: the driver's, beside a URL, a path or a mapping; without ``where`` they name the store
            themselves: ``type="redis", host="db"``, or ``type="redis", client=client`` with a client of
            the backend's library, which stays yours to close.

    Raises:
        UnknownScheme, BadOption, MissingExtra, BrokenPlugin: the address is wrong.
        Unavailable: the backend does not answer.
        FormatMismatch: not a store, or one written by a newer version; nothing was written.
    """
    opener = caller_line()
    given: dict[str, Any] = {"codec": codec or msgspec.UNSET, "ttl": ttl, "timeout": timeout, "sweep": sweep}
    given = {name: value for name, value in given.items() if value is not msgspec.UNSET}

    async def make() -> Store:
        meant = named_by(where, options, profile, home, config.variables(dotenv), also=_ARGUMENTS)
        return await open_named(meant, given, clock, opener, also=_ARGUMENTS)

    return Opening(make, closes=not isinstance(where, Store))


def caller_line() -> str:
    """The line that called the function which asks, as ``file:line``."""
    frame = sys._getframe(2)
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"


def named_by(
    where: urls.Where | Driver | Store | None,
    options: Mapping[str, Any],
    profile: str | None,
    home: Home | str | os.PathLike[str] | None,
    environ: Mapping[str, str],
    *,
    also: Sequence[str],
) -> config.Resolved | Driver | Store:
    """What an open function is to open; ``also`` are its arguments."""
    if profile is not None and (where is not None or options.keys() & {"type", "url"}):
        if not _takes_profile(where, options):
            raise BadOption("profile", "the store is named twice: leave one out")
        options, profile = {**options, "profile": profile}, None
    if where is None and not options.keys() & {"type", "url"} and (not options or profile or home is not None):
        found = config.resolve(profile=profile, home=home, environ=environ)
        named = _with_options(found.where, options, also)
        return msgspec.structs.replace(found, where=cast("urls.Where", named)) if options else found
    named = _with_options(where, options, also)
    if isinstance(named, (str, os.PathLike, Mapping)):
        return config.resolve(named, environ=environ)
    assert named is not None
    return named


def _takes_profile(where: urls.Where | Driver | Store | None, options: Mapping[str, Any]) -> bool:
    """Whether ``profile`` is an option of the driver that is named, as it is of buckets'."""
    named: Any = options if where is None else where
    if isinstance(named, Mapping):
        given = cast("Mapping[str, Any]", named)
        named = given["type"] + "://" if isinstance(given.get("type"), str) else given.get("url")
    if not isinstance(named, (str, os.PathLike)):
        return False
    kind = registry.driver_class(urls.split(os.fspath(cast("str", named)))[0].scheme)
    return "profile" in kind.Options.__struct_fields__


async def open_named(
    meant: config.Resolved | Driver | Store,
    settings: Mapping[str, Any],
    clock: Clock,
    opener: str,
    *,
    also: Sequence[str],
) -> Store:
    """What `open_store` does once it is awaited; ``also`` are the arguments of the function that was called."""
    if isinstance(meant, Store):
        return meant
    if isinstance(meant, config.Resolved):
        target = urls.parse(meant.where, also=also)
        driver = await registry.driver_class(target.scheme).open(target.options)
        chosen: dict[str, Any] = {**target.settings, **settings}
        sweep: float | None = chosen.pop("sweep", _SWEEP)
        store = Store(driver, clock=clock, where=target.shown, owns_driver=True, **chosen)
        store._opened_at(opener)
    else:
        chosen = dict(settings)
        sweep = chosen.pop("sweep", _SWEEP)
        store = Store(meant, clock=clock, **chosen)
    try:
        await store._adopt()
    except BaseException:  # cancelled too: nothing may stay open
        await store.close()
        raise
    if sweep is not None:
        store._start_sweeping(sweep)
    return store


def _with_options(
    where: urls.Where | Driver | Store | None, options: Mapping[str, Any], also: Sequence[str]
) -> urls.Where | Driver | Store | None:
    """One answer to what is meant, of ``where`` and the options beside it."""
    if not options:
        return where
    if where is None:
        if not options.keys() & {"type", "url"}:
            raise urls.unknown_option(next(iter(options)), ["type", "url", *urls.StoreSettings.__annotations__, *also])
        return options
    if isinstance(where, Mapping):
        if twice := sorted(where.keys() & options.keys()):
            raise BadOption(twice[0], "it is given in the mapping and beside it: leave one out")
        return {**where, **options}
    if isinstance(where, (str, os.PathLike)):
        if "url" in options:
            raise BadOption("url", "the store is named twice: leave one out")
        return {**options, "url": where}
    raise BadOption(next(iter(options)), "a driver or store that is open already takes no options")
