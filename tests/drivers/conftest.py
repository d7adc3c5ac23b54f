"""Real servers: started once for a run of the tests, or a reason to skip."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

import pytest
from redis_server import RedisCluster, RedisServer, missing

sys.path.insert(0, str(Path(__file__).parent))  # for the modules of this folder


@pytest.fixture(scope="session")
def redis_server(missing_service: Callable[[str, str], NoReturn]) -> Iterator[RedisServer]:
    if reason := missing():
        missing_service("redis", reason)
    with RedisServer() as server:
        yield server


@pytest.fixture(scope="session")
def own_cluster(missing_service: Callable[[str, str], NoReturn]) -> Iterator[str]:
    """A cluster whose slots tests may move."""
    if reason := missing():
        missing_service("redis-cluster", reason)
    cluster = RedisCluster()
    yield "redis://" + ",".join(f"127.0.0.1:{node.port}" for node in cluster.nodes)
    cluster.close()
