"""Real servers: started once for a run of the tests, or a reason to skip."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "services"))  # for redis_server.py

from redis_server import RedisServer, missing


@pytest.fixture(scope="session")
def redis_server() -> Iterator[RedisServer]:
    if reason := missing():
        pytest.skip(reason)
    server = RedisServer()
    yield server
    server.close()
