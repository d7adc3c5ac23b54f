"""The services by name: how each is installed and started, and the variables that say where it is."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Protocol

import install as programs
from bucket_servers import AzuriteServer, GcsServer, MinioServer, MotoServer
from mariadb_server import MariadbServer
from mongo_server import MongoServer
from postgres_server import PostgresServer
from redis_server import RedisCluster, RedisSentinel, RedisServer, major_version
from server import Spawned
from state import State, is_alive

__all__ = ["SERVICES", "Service", "bring_up"]


class _Running(Protocol):
    @property
    def environment(self) -> dict[str, str]: ...


@dataclass(frozen=True)
class Service:
    """One service.

    Attributes:
        variables: names of what tests are told, without ``KVPERSIST_TEST_``.
        install: finds its programs, or with ``install=True`` installs them; raises `install.Missing`.
        start: starts it with its data in a folder, and returns once it is ready.
        settings: environment variables that its client library reads.
    """

    variables: list[str]
    install: Callable[..., object]
    start: Callable[[Path, Spawned], _Running]
    settings: dict[str, str] = field(default_factory=dict)


def _redis(folder: Path, spawned: Spawned) -> RedisServer:
    kept = ["--appendonly", "yes", "--appendfsync", "everysec"]
    slow = ["--enable-debug-command", "local"] if major_version() >= 7 else []
    return RedisServer(*kept, *slow, folder=folder, spawned=spawned)


def _s3_server(*, install: bool = False) -> type[MinioServer]:
    """MinIO, or moto where there is no MinIO, nor a Go to build it with."""
    if not os.environ.get("KVPERSIST_SERVICES_WHEELS"):
        try:
            programs.go_program("minio", install=install, wheel=False)
        except programs.Missing as reason:
            if install:
                _say(f"s3: {reason}; trying the wheel of moto")
        else:
            return MinioServer
    programs.moto(install=install)
    return MotoServer


SERVICES = {
    "redis": Service(["REDIS_URL"], programs.redis, _redis),
    "redis-cluster": Service(["REDIS_CLUSTER_URL", "REDIS_CLUSTER_NODES"], programs.redis, RedisCluster),
    "redis-sentinel": Service(["REDIS_SENTINEL_NODES", "REDIS_SENTINEL_MASTER"], programs.redis, RedisSentinel),
    "postgres": Service(
        ["POSTGRES_URL"], programs.postgres, lambda folder, spawned: PostgresServer(folder=folder, spawned=spawned)
    ),
    "mariadb": Service(
        ["MYSQL_URL"], programs.mariadb, lambda folder, spawned: MariadbServer(folder=folder, spawned=spawned)
    ),
    "mongo": Service(
        ["MONGO_URL"],
        partial(programs.go_program, "mongo"),
        lambda folder, spawned: MongoServer(folder=folder, spawned=spawned),
    ),
    "s3": Service(
        ["S3_URL", "S3_ENDPOINT", "S3_KEY", "S3_SECRET"],
        _s3_server,
        lambda folder, spawned: _s3_server()(folder=folder, spawned=spawned),
    ),
    "gcs": Service(
        ["GCS_URL", "GCS_ENDPOINT"],
        partial(programs.go_program, "fake-gcs-server"),
        lambda folder, spawned: GcsServer(folder=folder, spawned=spawned),
        {"GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false"},  # the emulator lacks it; read when gcsfs is imported
    ),
    "azure": Service(
        ["AZURE_URL", "AZURE_CONNECTION_STRING"],
        programs.azurite,
        lambda folder, spawned: AzuriteServer(folder=folder, spawned=spawned),
    ),
}


def bring_up(state: State, name: str, *, install: bool) -> dict[str, str]:
    """Start a service, or find that it runs; the caller holds the lock of ``state``.

    Returns:
        Its variables, by full names.

    Raises:
        install.Missing: a program is not there, or could not be installed.
        RuntimeError: it did not start; nothing of it is left running.
    """
    service = SERVICES[name]
    row = state.rows().get(name)
    if row and is_alive(row):
        _say(f"{name} is already up")
        return row["environment"]
    if not state.stop(name):  # a part of it died, or a start was interrupted
        raise RuntimeError(f"what is left of {name} would not end; see {state.folder}")
    begun = time.monotonic()
    service.install(install=install)
    installed = time.monotonic()  # or found
    folder = state.folder / "data" / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        running = service.start(folder, lambda pid, ending: state.add_process(name, pid, ending))
        environment = {f"KVPERSIST_TEST_{part}": running.environment[part] for part in service.variables}
    except BaseException:
        state.stop(name)
        raise
    state.set_ready(name, environment)
    _say(f"{name} is up: programs {installed - begun:.1f} s, start {time.monotonic() - installed:.1f} s")
    return environment


def _say(text: str) -> None:
    print(f"[services] {text}", file=sys.stderr, flush=True)
