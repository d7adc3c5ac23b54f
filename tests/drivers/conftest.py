"""Real servers: started once for a run of the tests, or a reason to skip."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NoReturn

import pytest
from redis_server import RedisServer, missing


@pytest.fixture(scope="session")
def redis_server(missing_service: Callable[[str, str], NoReturn]) -> Iterator[RedisServer]:
    if reason := missing():
        missing_service("redis", reason)
    with RedisServer() as server:
        yield server
