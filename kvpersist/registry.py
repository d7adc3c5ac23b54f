"""Which driver a URL scheme belongs to.

A driver is an entry point of the group ``kvpersist.drivers``: its name is the scheme, its object a
class with ``api``, ``Options`` and ``open`` (`kvpersist.driver.DriverClass`). kvpersist's own drivers
come the same way. Names are read without importing anything; one driver is imported when its scheme
is asked for, and one that cannot be imported does not stand in the way of the others. A scheme that
nobody registered is looked for among fsspec's, and served by the driver of ``fsspec`` if it is there.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from functools import cache
from typing import TYPE_CHECKING, Any, Final, cast

import msgspec

from kvpersist.driver import DRIVER_API, DriverClass
from kvpersist.errors import BrokenPlugin, KvError, MissingExtra, UnknownScheme

if TYPE_CHECKING:  # dear to import, and a ready driver needs none of it
    from importlib.metadata import EntryPoint

__all__ = ["DriverInfo", "driver_class", "list_drivers", "refresh", "schemes"]

_GROUP: Final = "kvpersist.drivers"
_OWN_DISTRIBUTION: Final = "kvpersist"
_CATCH_ALL: Final = "fsspec"  # the scheme whose driver takes those that fsspec knows


class DriverInfo(msgspec.Struct, frozen=True, kw_only=True):
    """One registered driver; ``error`` is None where nothing is known to be wrong with it."""

    scheme: str
    target: str  # "module:Class"
    distribution: str
    version: str
    builtin: bool
    error: str | None = None


def driver_class(scheme: str) -> DriverClass:
    """Import and return the driver of ``scheme``.

    Raises:
        UnknownScheme: none is registered.
        MissingExtra: its client library is not installed.
        BrokenPlugin: it cannot be imported, is made for another ``api``, or two distributions claim the scheme.
    """
    loaded = _loaded.get(scheme)
    if loaded is not None:
        return loaded
    claims = _registered().get(scheme)
    if claims is None:
        if _CATCH_ALL in _registered() and _known_to_fsspec(scheme):
            return driver_class(_CATCH_ALL)
        raise _unknown(scheme)
    point, rivals = claims[0], claims[1:]
    if rivals and not _is_own(point):
        names = " and ".join(sorted(_distribution(claim) for claim in claims))
        raise BrokenPlugin(scheme, point.value, f"{names} both register it: uninstall one")
    try:
        driver = _check(point, point.load())
    except KvError as error:
        _failed[scheme] = str(error)
        raise
    except (Exception, SystemExit) as error:  # a plugin's import runs foreign code, which may raise anything
        _failed[scheme] = f"{type(error).__name__}: {error}"
        raise BrokenPlugin(scheme, point.value, _failed[scheme]) from error
    _failed.pop(scheme, None)
    _loaded[scheme] = driver
    return driver


def schemes() -> tuple[str, ...]:
    """Every registered scheme, in order; nothing is imported."""
    return tuple(sorted(_registered()))


def list_drivers(*, load: bool = False) -> list[DriverInfo]:
    """Every registered driver, in the order of schemes, with what is wrong with it.

    Args:
        load: import each, to find those that cannot be; otherwise only failures met so far are told.
    """
    if load:
        for scheme in schemes():
            try:
                driver_class(scheme)
            except (BrokenPlugin, MissingExtra):
                continue  # kept, and told below
    listed: list[DriverInfo] = []
    for scheme, claims in sorted(_registered().items()):
        for position, point in enumerate(claims):
            if position and _is_own(claims[0]):
                error: str | None = "ignored: a scheme of kvpersist's own cannot be replaced"
            elif len(claims) > 1 and not _is_own(claims[0]):
                error = "ignored: registered by more than one distribution"
            else:
                error = _failed.get(scheme)
            listed.append(
                DriverInfo(
                    scheme=scheme,
                    target=point.value,
                    distribution=_distribution(point),
                    version=_told(point, "version"),
                    builtin=_is_own(point),
                    error=error,
                )
            )
    return listed


def _unknown(scheme: str) -> UnknownScheme:
    """The error for a scheme that nobody registered, with the nearest one that somebody did."""
    from difflib import get_close_matches

    known = schemes()
    near = get_close_matches(scheme, known, n=1, cutoff=0.5)
    hint = "" if _has_fsspec() else "Schemes of fsspec need pip install 'kvpersist[fsspec]'"
    return UnknownScheme(scheme, near[0] if near else "", known, hint)


def _known_to_fsspec(scheme: str) -> bool:
    """Imports fsspec, if it is installed; its file systems stay where they are."""
    if not _has_fsspec():
        return False
    from fsspec.registry import known_implementations  # pyright: ignore[reportMissingImports, reportUnknownVariableType]

    return scheme in known_implementations


def _has_fsspec() -> bool:
    from importlib.util import find_spec

    try:
        return find_spec("fsspec") is not None
    except ValueError:  # what stands for it is no module
        return False


def refresh() -> None:
    """Forget what was found and loaded: what was installed since then is seen."""
    _registered.cache_clear()
    _loaded.clear()
    _failed.clear()


_loaded: dict[str, DriverClass] = {}
_failed: dict[str, str] = {}


def _entry_points() -> Iterable[EntryPoint]:
    from importlib.metadata import entry_points

    try:
        return entry_points(group=_GROUP)
    except Exception:  # noqa: BLE001  (somebody's file is damaged, in whatever way: read the others one by one)
        return _readable_entry_points()


def _readable_entry_points() -> list[EntryPoint]:
    from importlib.metadata import distributions

    found: dict[str, list[EntryPoint]] = {}  # the first distribution of a name hides others
    for distribution in distributions():
        with suppress(Exception):  # the damaged one
            name = distribution.name
            found.setdefault(name, list(distribution.entry_points.select(group=_GROUP)))
    return [point for points in found.values() for point in points]


@cache
def _registered() -> dict[str, list[EntryPoint]]:
    """Scheme -> those who claim it, kvpersist's own first; one scan of all distributions per process."""
    found: dict[str, list[EntryPoint]] = {}
    for point in sorted(_entry_points(), key=lambda point: (not _is_own(point), _distribution(point))):
        found.setdefault(point.name, []).append(point)
    return found


def _distribution(point: EntryPoint) -> str:
    return _told(point, "name") or "unknown"


def _told(point: EntryPoint, what: str) -> str:
    """What the distribution of an entry point says of itself; empty where its metadata cannot be read."""
    try:
        return getattr(point.dist, what, None) or ""
    except Exception:  # noqa: BLE001  (foreign bytes, in whatever state)
        return ""


def _is_own(point: EntryPoint) -> bool:
    return _distribution(point) == _OWN_DISTRIBUTION


def _check(point: EntryPoint, loaded: Any) -> DriverClass:
    api = getattr(loaded, "api", None)
    if api != DRIVER_API:
        raise BrokenPlugin(point.name, point.value, f"it declares api = {api!r}, this kvpersist speaks {DRIVER_API}")
    options = getattr(loaded, "Options", None)
    if not (isinstance(options, type) and issubclass(options, msgspec.Struct)):
        raise BrokenPlugin(point.name, point.value, "its Options is not a msgspec.Struct")
    if not callable(getattr(loaded, "open", None)):
        raise BrokenPlugin(point.name, point.value, "it has no open(options)")
    return cast(DriverClass, loaded)
