"""Whether the stores answer and can be written, and what is in them: `Persistence.health` and `totals`."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from os import urandom
from typing import Final

import msgspec

from kvpersist.driver import Batch, Delete, Measures, Pings, Put
from kvpersist.errors import KvError, ReadOnly, Unsupported
from kvpersist.store import Store

__all__ = ["Health", "StoreHealth", "Totals", "health_of", "size_of"]

_KEY: Final = "kvpersist:health:"  # and a random end: what one check writes, no other removes
_LEFT: Final = 60.0  # seconds after which a probe that could not be removed expires


class StoreHealth(msgspec.Struct, frozen=True, kw_only=True):
    """One store.

    Attributes:
        store: its address, without passwords.
        driver: the class of the driver. server: name and version of what answers, empty where not known.
        connected: it answered in time.
        latency: seconds until the answer of a ping, or of a read where the driver has none; None: no answer.
        writable: something was written and removed again; None: that was not tried.
        durable: what is acknowledged survives the machine's death, not only the process's.
        error: why it is not connected or not writable, with its code.
    """

    store: str
    driver: str
    server: str
    connected: bool
    latency: float | None
    writable: bool | None
    durable: bool
    error: str | None = None
    read_only: bool = False


class Health(msgspec.Struct, frozen=True, kw_only=True):
    """All stores together.

    Attributes:
        healthy: every store answered, and could be written unless it is read-only.
        latency: seconds, of the slowest; None: one did not answer.
        stores: by "main", "files" and "events", each once.
    """

    healthy: bool
    latency: float | None
    stores: dict[str, StoreHealth]
    checked_at: datetime


class Totals(msgspec.Struct, frozen=True, kw_only=True):
    """What is stored.

    Attributes:
        records: by collection, such as "agent", "image" and "snapshot"; those without any are left out.
        bytes: by store, the room it takes in its backend, with what else is in the same file or table; None: the
            driver cannot tell.
    """

    sessions: int
    messages: int
    tool_calls: int
    records: dict[str, int]
    bytes: dict[str, int | None]
    collected_at: datetime


async def size_of(store: Store) -> int | None:
    """Ask a store's driver for the bytes that it takes; None: it cannot tell."""
    store._check()
    return await store.driver.size() if isinstance(store.driver, Measures) else None


async def health_of(stores: Mapping[str, Store], *, timeout: float, write: bool) -> Health:
    """Ask every store at once; raises nothing but being cancelled."""
    asked = await asyncio.gather(*(_store_health(store, timeout, write) for store in stores.values()))
    found = dict(zip(stores, asked, strict=True))
    latencies = [one.latency for one in asked if one.latency is not None]
    return Health(
        healthy=all(one.connected and (one.writable is not False or one.read_only) for one in asked),
        latency=max(latencies) if len(latencies) == len(asked) else None,
        stores=found,
        checked_at=datetime.now(UTC),
    )


async def _store_health(store: Store, timeout: float, write: bool) -> StoreHealth:
    latency: float | None = None
    writable: bool | None = None
    error: str | None = None
    read_only = False
    try:
        async with asyncio.timeout(timeout):
            begun = time.perf_counter()
            store._check()
            await _answer(store)
            latency = time.perf_counter() - begun
            if write:
                await _write(store)
                writable = True
    except TimeoutError as late:
        error = f"{late.code} {late}" if isinstance(late, KvError) else f"no answer in {timeout:g} s"
    except (ReadOnly, Unsupported) as refused:
        error, read_only = f"{refused.code} {refused}", True
    except KvError as failed:
        error = f"{failed.code} {failed}"
    except Exception as failed:  # noqa: BLE001  # whatever a driver raises is what is asked for here
        error = type(failed).__name__  # its text is somebody else's, and may hold anything
    if latency is not None and error is not None:
        writable = False
    return StoreHealth(
        store=store.where,
        driver=type(store.driver).__name__,
        server=store.capabilities.server,
        connected=latency is not None,
        latency=latency,
        writable=writable,
        durable=store.capabilities.durable,
        error=error,
        read_only=read_only,
    )


async def _answer(store: Store) -> None:
    if isinstance(store.driver, Pings):
        await store.driver.ping()
    else:
        await store._lanes.get(["kvpersist:format"])


async def _write(store: Store) -> None:
    """Write and remove a key of our own, unseen by those who watch from this process."""
    key = _KEY + urandom(8).hex()
    for op in (Put(key, b"", None, store.clock() + _LEFT), Delete(key)):
        [outcome] = await store._lanes.commit([Batch((op,), urandom(8))])
        if isinstance(outcome, KvError):
            raise outcome
