"""Importing kvpersist is cheap, and opening a store loads what that store needs."""

from __future__ import annotations

import json
import subprocess
import sys

_PROBE = """
import json, sys
before = set(sys.modules)
{code}
added = set(sys.modules) - before
print(json.dumps(sorted(added)))
"""
_BASE = {"kvpersist", "msgspec", "typing_extensions", "uuid_utils"}  # msgspec loads the third where it is installed
_BUILT_IN = set(sys.stdlib_module_names) | set(sys.builtin_module_names)


def _loaded_by(code: str) -> set[str]:
    """Modules that a fresh interpreter has loaded after ``code``, those of the standard library aside."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", _PROBE.format(code=code)], capture_output=True, text=True, check=True
    )
    return {name for name in json.loads(done.stdout) if name.partition(".")[0] not in _BUILT_IN}


def test_importing_kvpersist_loads_nothing_but_itself() -> None:
    assert _loaded_by("import kvpersist") == {"kvpersist"}


def test_importing_every_public_name_loads_no_driver_no_client_and_no_command_line() -> None:
    loaded = _loaded_by("from kvpersist import *")

    assert {name.partition(".")[0] for name in loaded} <= _BASE
    assert not [name for name in loaded if name.startswith(("kvpersist.cli", "kvpersist.testing"))]


def test_opening_a_store_loads_its_own_driver_alone() -> None:
    loaded = _loaded_by(
        "import asyncio, kvpersist\n"
        "async def main():\n"
        "    async with kvpersist.open('memory://'): pass\n"
        "asyncio.run(main())"
    )

    assert {name for name in loaded if name.startswith("kvpersist_drivers")} == {
        "kvpersist_drivers",
        "kvpersist_drivers.memory",
    }
    assert {name.partition(".")[0] for name in loaded} <= _BASE | {"kvpersist_drivers"}


def test_the_pytest_plugin_loads_nothing_heavy() -> None:
    loaded = _loaded_by("import pytest\nbefore = set(sys.modules)\nimport kvpersist.testing.plugin")

    assert not [name for name in loaded if name.startswith(("kvpersist_drivers", "hypothesis", "kvpersist.agents"))]
