"""What a driver's author, or an application's tests, need: the contract, a model, faults, fixtures.

Every name is loaded when it is asked for: those of `contract` and `model` need pytest and hypothesis,
and pytest loads the fixtures of `plugin` in every run where kvpersist is installed.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from kvpersist.testing.clock import ManualClock
    from kvpersist.testing.contract import AWKWARD_KEYS, DriverContract, batch
    from kvpersist.testing.faults import Crashed, Fault, FaultyDriver, Gate
    from kvpersist.testing.leaks import no_leaks
    from kvpersist.testing.model import DriverMachine, driver_machine
    from kvpersist.testing.records import PersistenceContract
    from kvpersist.testing.scratch import ScratchDriver

__all__ = [
    "AWKWARD_KEYS",
    "Crashed",
    "DriverContract",
    "DriverMachine",
    "Fault",
    "FaultyDriver",
    "Gate",
    "ManualClock",
    "PersistenceContract",
    "ScratchDriver",
    "batch",
    "driver_machine",
    "no_leaks",
]

_LAZY: Final = {
    "AWKWARD_KEYS": "contract",
    "Crashed": "faults",
    "DriverContract": "contract",
    "DriverMachine": "model",
    "Fault": "faults",
    "FaultyDriver": "faults",
    "Gate": "faults",
    "ManualClock": "clock",
    "PersistenceContract": "records",
    "ScratchDriver": "scratch",
    "batch": "contract",
    "driver_machine": "model",
    "no_leaks": "leaks",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"kvpersist.testing.{_LAZY[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
