"""Typed agent records over a small async key-value protocol.

``async with kvpersist.open("sqlite:///agent.db") as db`` is the way in. Names are loaded when they
are first asked for, so that importing kvpersist costs next to nothing.
"""

from __future__ import annotations

import importlib
from typing import Any, Final

__all__ = ["__version__"]

__version__ = "0.1.0"

_LAZY: Final[dict[str, str]] = {}


def __getattr__(name: str) -> Any:
    module = _LAZY.get(name)
    if module is None:
        raise AttributeError(f"module 'kvpersist' has no attribute {name!r}")
    value = getattr(importlib.import_module(module), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
