"""URLs of empty stores by the name of their driver, for tests that run on several."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from pathlib import Path

__all__ = ["SHARED", "empty_store"]

_SERVED = {  # its service, and the option that keeps one test's entries from another's
    "redis": ("redis", "REDIS_URL", "kv.base"),
    "postgres": ("postgres", "POSTGRES_URL", "kv.table"),
    "mysql": ("mariadb", "MYSQL_URL", "kv.table"),
    "mongo": ("mongo", "MONGO_URL", "kv.collection"),
}
SHARED = ("sqlite", "filesystem", "redis", "postgres", "mysql")
"""Drivers whose stores several processes can have open."""

_numbers = itertools.count()


def empty_store(name: str, folder: Path, service: Callable[[str], dict[str, str]]) -> str:
    """Return a URL; skips where a server is needed and not there. ``service`` is the fixture."""
    if name == "memory":
        return "memory://"
    if name == "sqlite":
        return f"sqlite:///{folder / 'store.db'}?kv.durability=normal"
    if name == "filesystem":
        return f"file://{folder / 'store'}?kv.durability=normal"
    server, variable, option = _SERVED[name]
    url = service(server)[f"KVPERSIST_TEST_{variable}"]
    return f"{url}{'&' if '?' in url else '?'}{option}=t{os.getpid()}_{next(_numbers)}_{os.urandom(3).hex()}"
