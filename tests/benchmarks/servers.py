"""Where the servers are: in the environment, or what tests/services/up has started."""

from __future__ import annotations

import os
import sys
import uuid
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "services"))

from services import SERVICES
from state import State

__all__ = ["Missing", "needed", "new_name"]


class Missing(Exception):
    """The service that a row needs is not there."""


def needed(service: str) -> dict[str, str]:
    """Its variables, by their names without ``KVPERSIST_TEST_``.

    Raises:
        Missing: it is not there.
    """
    told = State().running().get(service, {}) | os.environ
    names = {name: f"KVPERSIST_TEST_{name}" for name in SERVICES[service].variables}
    if lost := [name for name in names.values() if not told.get(name)]:
        raise Missing(f"no {', '.join(lost)}: tests/services/up {service}")
    return {short: told[name] for short, name in names.items()}


def new_name() -> str:
    """Of a table, a collection or what keys begin with, for one run alone."""
    return f"b{uuid.uuid4().hex[:12]}"
