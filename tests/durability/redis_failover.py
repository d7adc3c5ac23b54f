"""Take the master away under a load of 64 writers, and count: ``redis_failover.py cluster|sentinel FAULT [seconds]``.

Faults: "kill", the master dies; "freeze", it stops for a while; "lag", its replica hears nothing for some
seconds, and then the master dies: what it acknowledged meanwhile must be found to be lost; "guarded", the
same with ``min-replicas-to-write 1`` and ``min-replicas-max-lag 1``.

Each writer has a key of its own and replaces its value by the next number, on condition that the last
version it knows of is still there; so a write that was acknowledged and is lost is noticed by the next
one. What was found is printed as JSON.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import signal
import sys
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "services"))

from redis_server import RedisCluster, RedisSentinel, RedisServer

import kvpersist
from kvpersist.driver import ABSENT
from kvpersist.errors import CommitUnknown, Conflict, KvError
from kvpersist_drivers.redis import RedisDriver, RedisOptions
from kvpersist_drivers.redis._servers import slot_of

WRITERS = 64
BEFORE, LONGEST = 1.0, 30.0  # seconds of load before the fault, and until a write has to be accepted again
TIMEOUT = 3.0  # of the store, seconds
LAG = 3.0  # seconds for which the replica hears nothing
LARGE = "x" * 8000  # part of each value then: more than the system's buffers take


class Writer:
    def __init__(self, store: kvpersist.Store, number: int, more: str) -> None:
        self.store, self.more = store, more
        self.space = f"n{number % 16}"
        self.key = f"{self.space}:k{number}"
        self.acknowledged = 0  # the last number
        self.attempted = 0
        self.version: Any = ABSENT
        self.accepted: list[float] = []  # when
        self.lost = self.wrong = 0
        self.longest = 0.0
        self.errors: Counter[str] = Counter()
        self.sure = True  # that what is stored is known

    async def run(self, going: asyncio.Event) -> None:
        while going.is_set():
            begun = time.monotonic()
            try:
                if not self.sure:
                    await self.look()
                await self.write()
            except Conflict:
                self.sure = False
            except KvError as error:
                self.errors[f"{type(error).__name__}/{error.outcome}"] += 1
                self.sure = self.sure and not isinstance(error, CommitUnknown)
                await asyncio.sleep(0.005)
            finally:
                self.longest = max(self.longest, time.monotonic() - begun)

    async def write(self) -> None:
        self.attempted += 1
        self.version = await self.store.put(self.key, [self.key, self.attempted, self.more], expect=self.version)
        self.acknowledged = self.attempted
        self.accepted.append(time.monotonic())

    async def look(self) -> None:
        """Read what is there: the last number acknowledged, a later one whose answer was lost, or one before a loss."""
        found = await self.store.get_versioned(self.key)
        key, number, _ = found.value if found else (self.key, 0, "")
        if key != self.key or number > self.attempted:
            self.wrong += 1
        if number < self.acknowledged:
            self.lost += self.acknowledged - number
        self.acknowledged, self.version = number, found.version if found else ABSENT
        self.sure = True


async def main(kind: str, fault: str, seconds: float) -> dict[str, Any]:
    group: Any = RedisCluster() if kind == "cluster" else RedisSentinel()
    try:
        nodes = group.nodes if kind == "cluster" else group.sentinels
        options: dict[str, Any] = {"sentinel": group.master_name} if kind == "sentinel" else {}
        hosts = ",".join(f"127.0.0.1:{node.port}" for node in nodes)
        driver = await RedisDriver.open(RedisOptions(url=f"redis://{hosts}/0", **options))
        async with kvpersist.open_store(driver, timeout=TIMEOUT) as store:
            return await _measure(store, driver, group.nodes, fault, seconds) | {"servers": kind, "fault": fault}
    finally:
        group.close()


async def _measure(
    store: kvpersist.Store, driver: RedisDriver, nodes: list[RedisServer], fault: str, seconds: float
) -> dict[str, Any]:
    lags = fault in ("lag", "guarded")
    if fault == "guarded":
        for node in nodes:
            node.say("CONFIG", "SET", "min-replicas-to-write", "1", "min-replicas-max-lag", "1")
    writers = [Writer(store, number, LARGE if lags else "") for number in range(WRITERS)]
    going = asyncio.Event()
    going.set()
    tasks = [asyncio.create_task(writer.run(going)) for writer in writers]
    await asyncio.sleep(BEFORE)
    port, hit = await _hit(driver, writers)
    [place] = [place for place, node in enumerate(nodes) if node.port == port]
    master, replica = nodes[place], nodes[place + len(nodes) // 2]
    before = sum(writer.acknowledged for writer in writers)
    if lags:
        _signal(replica, signal.SIGSTOP)
        await asyncio.sleep(LAG)
    if fault == "freeze":
        _signal(master, signal.SIGSTOP)
    else:
        await asyncio.to_thread(master.stop, signal.SIGKILL)
    if lags:
        _signal(replica, signal.SIGCONT)
    at = time.monotonic()
    longest = 6.0 if fault == "guarded" else LONGEST  # guarded, it takes the old master as a replica
    while time.monotonic() < at + longest and not any(_after(writer, at) for writer in hit):
        await asyncio.sleep(0.01)
    await asyncio.sleep(seconds)
    if fault == "freeze":
        _signal(master, signal.SIGCONT)
    else:
        await asyncio.to_thread(master.start)
    await asyncio.sleep(1)  # the old master is back, as a replica
    going.clear()
    await asyncio.gather(*tasks)
    until = time.monotonic() + LONGEST
    for writer in writers:  # whatever was acknowledged last must be there
        writer.sure = False
        while not writer.sure and time.monotonic() < until:
            with suppress(KvError):
                await writer.look()
    found = [_after(writer, at) for writer in hit]
    return {
        "acknowledged": sum(len(writer.accepted) for writer in writers),
        "acknowledged_before": before,
        "lost": sum(writer.lost for writer in writers),
        "wrong": sum(writer.wrong for writer in writers),
        "unread": sum(not writer.sure for writer in writers),
        "writers_hit": len(hit),
        "accepted_again_after_seconds": round(min((one for one in found if one), default=LONGEST), 2),
        "last_writer_after_seconds": round(max(one or LONGEST for one in found), 2),
        "others_longest_gap_seconds": round(
            max((_gap(writer, at) for writer in writers if writer not in hit), default=0.0), 2
        ),
        "longest_call_seconds": round(max(writer.longest for writer in writers), 2),
        "timeout_seconds": TIMEOUT,
        "errors": dict(sum((writer.errors for writer in writers), Counter[str]())),
    }


def _signal(server: RedisServer, which: signal.Signals) -> None:
    assert server._process is not None
    server._process.send_signal(which)


async def _hit(driver: RedisDriver, writers: list[Writer]) -> tuple[int, list[Writer]]:
    """The port of the first writer's server, and the writers whose keys it has."""
    owners = [await driver._servers.server(slot_of(f"{driver._base}:{{.{writer.space}}}")) for writer in writers]
    port: int = owners[0].pool.connection_kwargs["port"]
    return port, [writer for writer, owner in zip(writers, owners, strict=True) if owner is owners[0]]


def _after(writer: Writer, at: float) -> float | None:
    """Seconds from ``at`` to the next accepted write but one: the first may have been under way."""
    times = [time_ - at for time_ in writer.accepted[-100_000:] if time_ > at]
    late = [one for one in times if one > 0.2]
    return late[0] if late else None


def _gap(writer: Writer, at: float) -> float:
    times = [one for one in writer.accepted if one > at - 0.1]
    return max((later - one for one, later in itertools.pairwise(times)), default=0.0)


if __name__ == "__main__":
    more = float(sys.argv[3]) if len(sys.argv) > 3 else 2.0
    print(json.dumps(asyncio.run(main(sys.argv[1], sys.argv[2], more))))
