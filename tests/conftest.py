"""Real servers for the tests: where they are, or a reason to skip, or with ``--require`` to fail."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest

sys.path.insert(0, str(Path(__file__).parent / "services"))  # for the modules of that folder

VARIABLES = {
    "redis": ["REDIS_URL"],
    "redis-cluster": ["REDIS_CLUSTER_URL", "REDIS_CLUSTER_NODES"],
    "redis-sentinel": ["REDIS_SENTINEL_NODES", "REDIS_SENTINEL_MASTER"],
    "postgres": ["POSTGRES_URL"],
    "mariadb": ["MYSQL_URL"],
    "mongo": ["MONGO_URL"],
    "s3": ["S3_URL", "S3_ENDPOINT", "S3_KEY", "S3_SECRET"],
    "gcs": ["GCS_URL", "GCS_ENDPOINT"],
    "azure": ["AZURE_URL", "AZURE_CONNECTION_STRING"],
}
os.environ.setdefault(
    "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false"
)  # the emulator lacks it; read when gcsfs is imported

Service = Callable[[str], dict[str, str]]
Missing = Callable[[str, str], NoReturn]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.getgroup("kvpersist").addoption(
        "--require",
        metavar="SERVICE,...",
        default="",
        help=f"fail where one of these is missing, rather than skip: all, {', '.join(VARIABLES)}",
    )


@pytest.fixture(scope="session")
def missing_service(request: pytest.FixtureRequest) -> Missing:
    """``missing_service("postgres", reason)``: skips, or fails where ``--require`` names that service."""
    required = request.config.getoption("--require").split(",")

    def give_up(name: str, reason: str) -> NoReturn:
        text = f"needs the service {name}: {reason}"
        if name in required or "all" in required:
            pytest.fail(text, pytrace=False)
        pytest.skip(text)

    return give_up


@pytest.fixture(scope="session")
def service(missing_service: Missing) -> Service:
    """``service("postgres")``: the variables that say where it is, such as KVPERSIST_TEST_POSTGRES_URL."""

    def find(name: str) -> dict[str, str]:
        names = [f"KVPERSIST_TEST_{variable}" for variable in VARIABLES[name]]
        if not all(os.environ.get(name) for name in names):
            missing_service(name, f"tests/services/up {name}")
        return {name: os.environ[name] for name in names}

    return find
