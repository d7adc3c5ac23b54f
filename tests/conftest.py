"""Real servers for the tests."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest

Service = Callable[[str], dict[str, str]]


@pytest.fixture(scope="session")
def service() -> Service:
    """``service("postgres")``: the variables that say where it is; skips where there is none."""

    def find(name: str) -> dict[str, str]:
        prefix = {"mariadb": "MYSQL"}.get(name, name.upper().replace("-", "_"))
        found = {k: v for k, v in os.environ.items() if k.startswith(f"KVPERSIST_TEST_{prefix}_")}
        if not found:
            pytest.skip(f"needs the service {name}")
        return found

    return find
