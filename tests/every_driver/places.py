"""Where each driver keeps a new, empty store for one test; the calling code is the same for all of them."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import msgspec

__all__ = ["LONGEST", "PLACES", "Place", "Where"]

Where = dict[str, Any]
Service = Callable[[str], dict[str, str]]


class Place(msgspec.Struct, frozen=True):
    """A driver on its backend.

    Attributes:
        name: of the parameter of a test.
        make: an empty place, as `kvpersist.open_store` takes it.
        service: what has to run, None where nothing has to.
        keys: how many keys a listing is tried with; KVPERSIST_FAULT_STRIDE=1 asks for all, on emulators too.
        conversations: how many of the 200 real ones.
    """

    name: str
    make: Callable[[dict[str, str], Path], Where]
    service: str | None = None
    keys: int = 100_000
    conversations: int = 200


def _name() -> str:
    return f"t{uuid.uuid4().hex[:12]}"


def _s3(told: dict[str, str], _: Path) -> Where:
    credentials = {"key": told["KVPERSIST_TEST_S3_KEY"], "secret": told["KVPERSIST_TEST_S3_SECRET"]}
    endpoint = told["KVPERSIST_TEST_S3_ENDPOINT"]
    return {"url": f"{told['KVPERSIST_TEST_S3_URL']}/{_name()}", "endpoint_url": endpoint, **credentials}


def _gcs(told: dict[str, str], _: Path) -> Where:
    endpoint = told["KVPERSIST_TEST_GCS_ENDPOINT"]
    url = f"{told['KVPERSIST_TEST_GCS_URL']}/{_name()}"
    return {"url": url, "endpoint_url": endpoint, "token": "anon", "project": "test"}


def _azure(told: dict[str, str], _: Path) -> Where:
    connection = told["KVPERSIST_TEST_AZURE_CONNECTION_STRING"]
    return {"url": f"{told['KVPERSIST_TEST_AZURE_URL']}/{_name()}", "connection_string": connection}


_ALL_OF_IT: Final = os.environ.get("KVPERSIST_FAULT_STRIDE") == "1"
LONGEST: Final = 3600 if _ALL_OF_IT else 900  # seconds for a test of many keys: an emulator may take 50 ms a request
_SLOW: Final[dict[str, int]] = {"keys": 1_000, "conversations": 10}  # of an emulator
_WHOLE: Final[dict[str, int]] = {"keys": 20_000}
_EMULATED: Final = _WHOLE if _ALL_OF_IT else _SLOW
_ALL: Final = (
    Place("memory", lambda _, folder: {"type": "memory"}),
    Place("sqlite", lambda _, folder: {"type": "sqlite", "path": str(folder / "store.db")}),
    Place("filesystem", lambda _, folder: {"type": "file", "path": str(folder / "store"), "durability": "normal"}),
    Place("diskcache", lambda _, folder: {"type": "diskcache", "path": str(folder / "store")}),
    Place("redis", lambda told, _: {"url": told["KVPERSIST_TEST_REDIS_URL"], "base": _name()}, "redis"),
    Place(
        "redis-cluster",
        lambda told, _: {"url": told["KVPERSIST_TEST_REDIS_CLUSTER_URL"], "base": _name()},
        "redis-cluster",
    ),
    Place(
        "redis-sentinel",
        lambda told, _: {
            "url": f"redis://{told['KVPERSIST_TEST_REDIS_SENTINEL_NODES']}/0",
            "sentinel": told["KVPERSIST_TEST_REDIS_SENTINEL_MASTER"],
            "base": _name(),
        },
        "redis-sentinel",
    ),
    Place(
        "mongo", lambda told, _: {"url": told["KVPERSIST_TEST_MONGO_URL"], "collection": _name()}, "mongo", **_EMULATED
    ),
    Place("postgres", lambda told, _: {"url": told["KVPERSIST_TEST_POSTGRES_URL"], "table": _name()}, "postgres"),
    Place("mysql", lambda told, _: {"url": told["KVPERSIST_TEST_MYSQL_URL"], "table": _name()}, "mariadb"),
    Place("s3", _s3, "s3", **_EMULATED),
    Place("gcs", _gcs, "gcs", **_EMULATED),
    Place("azure", _azure, "azure", **_EMULATED),
)

_ONLY: Final = os.environ.get("KVPERSIST_TEST_DRIVERS", "")  # names, for those who work on one driver
PLACES: Final = tuple(place for place in _ALL if not _ONLY or place.name in _ONLY.split(","))
