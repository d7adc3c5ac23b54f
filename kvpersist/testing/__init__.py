"""What a driver's author, or an application's tests, need: the contract, a model, faults, fixtures.

The names of `contract` and `model` load pytest and hypothesis, and only when they are asked for. The
fixtures are in `plugin`, which pytest loads by itself.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

from kvpersist.testing.clock import ManualClock
from kvpersist.testing.faults import Crashed, Fault, FaultyDriver, Gate

if TYPE_CHECKING:
    from kvpersist.testing.contract import AWKWARD_KEYS, DriverContract, batch
    from kvpersist.testing.model import DriverMachine, driver_machine

__all__ = [
    "AWKWARD_KEYS",
    "Crashed",
    "DriverContract",
    "DriverMachine",
    "Fault",
    "FaultyDriver",
    "Gate",
    "ManualClock",
    "batch",
    "driver_machine",
]

_LAZY: Final = {
    "AWKWARD_KEYS": "contract",
    "DriverContract": "contract",
    "batch": "contract",
    "DriverMachine": "model",
    "driver_machine": "model",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"kvpersist.testing.{_LAZY[name]}"), name)
