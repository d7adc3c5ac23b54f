"""Real servers for the tests: where they are, or a reason to skip, or with ``--require`` to fail."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest

sys.path.insert(0, str(Path(__file__).parent / "services"))  # for the modules of that folder

from services import SERVICES
from state import State

for _service in SERVICES.values():
    for _name, _value in _service.settings.items():
        os.environ.setdefault(_name, _value)

Service = Callable[[str], dict[str, str]]
Missing = Callable[[str, str], NoReturn]


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("kvpersist")
    group.addoption(
        "--require",
        metavar="SERVICE,...",
        default="",
        help=f"fail where one of these is missing, rather than skip: all, {', '.join(SERVICES)}",
    )
    group.addoption(
        "--start-services",
        action="store_true",
        help="start what is asked for and installed; install too what --require names. Nothing is stopped at the end",
    )


def pytest_configure(config: pytest.Config) -> None:
    required = _required(config)
    if unknown := set(required) - SERVICES.keys():
        raise pytest.UsageError(f"--require: no service {', '.join(sorted(unknown))}")
    if required and config.getoption("--start-services") and not hasattr(config, "workerinput"):
        _up(*(name for name in required if _found(name) is None))


def pytest_sessionfinish(session: pytest.Session) -> None:
    if session.exitstatus == 0 and any(_found(name) is None for name in _required(session.config)):
        session.exitstatus = 1  # also where no test has asked for it


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    reasons = [str(report.longrepr) for report in terminalreporter.stats.get("skipped", [])]
    skipped = Counter(found[1] for reason in reasons if (found := re.search(r"needs the service ([\w-]+)", reason)))
    if skipped:
        terminalreporter.section("services that were not there")
        for name, count in sorted(skipped.items()):
            terminalreporter.write_line(f"{name}: {count} tests skipped; tests/services/up {name}")
    for name in _required(config):
        if _found(name) is None:
            terminalreporter.write_line(f"{name} is required, and not there", red=True)


@pytest.fixture(scope="session")
def missing_service(request: pytest.FixtureRequest) -> Missing:
    """``missing_service("postgres", reason)``: skips, or fails where ``--require`` names that service."""

    def give_up(name: str, reason: str) -> NoReturn:
        text = f"needs the service {name}: {reason}"
        if name in _required(request.config):
            pytest.fail(text, pytrace=False)
        pytest.skip(text)

    return give_up


@pytest.fixture(scope="session")
def service(request: pytest.FixtureRequest, missing_service: Missing) -> Service:
    """``service("postgres")``: the variables that say where it is, such as KVPERSIST_TEST_POSTGRES_URL."""

    def find(name: str) -> dict[str, str]:
        found = _found(name)
        if found is None and request.config.getoption("--start-services"):
            _up("--present", name)
            found = _found(name)
        if found is None:
            missing_service(name, f"tests/services/up {name}")
        return found

    return find


def _required(config: pytest.Config) -> list[str]:
    names = [name for name in config.getoption("--require").split(",") if name]
    return list(SERVICES) if "all" in names else names


def _found(name: str) -> dict[str, str] | None:
    """Its variables, from the environment or from what tests/services/up has started."""
    names = [f"KVPERSIST_TEST_{variable}" for variable in SERVICES[name].variables]
    if all(os.environ.get(name) for name in names):
        return {name: os.environ[name] for name in names}
    return State().running().get(name)


def _up(*arguments: str) -> None:
    """It waits for others who start services, so several test processes may ask at once."""
    if arguments:
        up = Path(__file__).parent / "services" / "up"
        subprocess.run([sys.executable, str(up), *arguments], stdout=subprocess.DEVNULL, check=False)
