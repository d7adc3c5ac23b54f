"""What a driver's author, or an application's tests, need: the contract, a model, faults, fixtures.

`DriverContract`, `AWKWARD_KEYS` and `driver_machine` load pytest or hypothesis, and only when they
are asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

from kvpersist.testing.clock import ManualClock

if TYPE_CHECKING:
    from kvpersist.testing.contract import AWKWARD_KEYS, DriverContract, batch

__all__ = ["AWKWARD_KEYS", "DriverContract", "ManualClock", "batch"]

_LAZY: Final = {
    "AWKWARD_KEYS": "contract",
    "DriverContract": "contract",
    "batch": "contract",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"kvpersist.testing.{_LAZY[name]}"), name)
