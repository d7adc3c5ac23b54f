"""Redis: one server, a cluster of six, and a master with a replica that three sentinels watch."""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import install
from server import HOST, Server, Spawned, free_port, wait_until

__all__ = ["RedisCluster", "RedisSentinel", "RedisServer", "free_port", "major_version", "missing"]

_SLOTS = 16384
_BUS = 10_000  # nodes of a cluster talk to each other at their port and this
_LONGEST_SOCKET = 100  # bytes; the system allows 107
_MASTER = "kvmaster"


def missing() -> str | None:
    """Why there is no ``redis-server``, None if there is one."""
    try:
        install.redis()
    except install.Missing as reason:
        return str(reason)
    return None


def major_version() -> int:
    """Of the Redis that is started here: 7 is Debian's, 6 the wheel's, which was built without TLS too."""
    told = subprocess.run([install.redis(), "--version"], capture_output=True, text=True, check=True).stdout
    return int(re.findall(r"v=(\d+)", told)[0])


class RedisServer(Server):
    """One server. ``restart`` keeps the port and, with ``appendonly``, the data."""

    name = "redis"

    @property
    def url(self) -> str:
        return f"redis://{HOST}:{self.port}/0"

    @property
    def environment(self) -> dict[str, str]:
        return {"REDIS_URL": self.url}

    @property
    def socket(self) -> str:
        return f"{self.folder}/redis.sock"

    def say(self, *words: str) -> bytes:
        """Send one command over a connection of its own and return the first bytes of the answer."""
        text = b"*%d\r\n" % len(words) + b"".join(b"$%d\r\n%s\r\n" % (len(w.encode()), w.encode()) for w in words)
        with socket.create_connection((HOST, self.port), 5) as connection:
            connection.sendall(text)
            return connection.recv(1 << 16)

    def _command(self) -> list[str]:
        fixed = ["--bind", HOST, "--port", str(self.port), "--dir", str(self.folder), "--daemonize", "no", "--save", ""]
        named = ["--unixsocket", self.socket] if len(self.socket) <= _LONGEST_SOCKET else []
        return [install.redis(), *fixed, *named, *self._options]

    def _ready(self) -> bool:
        return self.say("PING").startswith((b"+PONG", b"-NOAUTH"))


class RedisCluster:
    """Three masters, ``nodes[:3]``, and a replica of each in the same order, ``nodes[3:]``."""

    def __init__(self, folder: Path | None = None, spawned: Spawned | None = None) -> None:
        self.folder = folder or Path(tempfile.mkdtemp(prefix="kvpersist-redis-cluster-"))
        self.nodes: list[RedisServer] = []
        try:
            self.nodes += [_ClusterNode(folder=self.folder / str(n), spawned=spawned) for n in range(6)]
            self._join()
        except BaseException:
            self.close()
            raise

    @property
    def url(self) -> str:
        return f"redis://{HOST}:{self.nodes[0].port}"

    @property
    def environment(self) -> dict[str, str]:
        return {
            "REDIS_CLUSTER_URL": self.url,
            "REDIS_CLUSTER_NODES": ",".join(f"{HOST}:{node.port}" for node in self.nodes),
        }

    def close(self) -> None:
        _close_all(self.nodes, self.folder)

    def _join(self) -> None:
        masters, replicas = self.nodes[:3], self.nodes[3:]
        bounds = [_SLOTS * n // len(masters) for n in range(len(masters) + 1)]
        for master, first, end in zip(masters, bounds, bounds[1:], strict=False):
            _ordered(master, "CLUSTER", "ADDSLOTS", *map(str, range(first, end)))
        for epoch, node in enumerate(self.nodes, 1):
            _ordered(node, "CLUSTER", "SET-CONFIG-EPOCH", str(epoch))
            if node is not masters[0]:
                _ordered(node, "CLUSTER", "MEET", HOST, str(masters[0].port))
        _await(self.nodes, lambda node: b"cluster_known_nodes:6" in node.say("CLUSTER", "INFO"))
        for master, replica in zip(masters, replicas, strict=True):
            name = master.say("CLUSTER", "MYID").split(b"\r\n")[1].decode()
            _ordered(replica, "CLUSTER", "REPLICATE", name)
        _await(self.nodes, lambda node: b"cluster_state:ok" in node.say("CLUSTER", "INFO"))
        _await(replicas, lambda node: b"master_link_status:up" in node.say("INFO", "replication"))
        _await(masters, lambda node: b"state=online" in node.say("INFO", "replication"))


class RedisSentinel:
    """``nodes[0]`` is the master to begin with, ``nodes[1]`` its replica; the sentinels call them `master_name`."""

    master_name = _MASTER

    def __init__(self, folder: Path | None = None, spawned: Spawned | None = None) -> None:
        self.folder = folder or Path(tempfile.mkdtemp(prefix="kvpersist-redis-sentinel-"))
        self.nodes: list[RedisServer] = []
        self.sentinels: list[RedisServer] = []
        try:
            kept = ["--appendonly", "yes", "--repl-diskless-sync-delay", "0"]
            master = RedisServer(*kept, folder=self.folder / "0", spawned=spawned)
            self.nodes.append(master)
            follow = ["--replicaof", HOST, str(master.port)]
            self.nodes.append(RedisServer(*kept, *follow, folder=self.folder / "1", spawned=spawned))
            _await([master], lambda node: b"state=online" in node.say("INFO", "replication"))
            for n in range(3):
                watched = str(master.port)
                self.sentinels.append(_Sentinel(watched, folder=self.folder / f"sentinel-{n}", spawned=spawned))
            _await(self.sentinels, _knows_all)
        except BaseException:
            self.close()
            raise

    @property
    def environment(self) -> dict[str, str]:
        return {
            "REDIS_SENTINEL_NODES": ",".join(f"{HOST}:{sentinel.port}" for sentinel in self.sentinels),
            "REDIS_SENTINEL_MASTER": self.master_name,
        }

    def close(self) -> None:
        _close_all([*self.sentinels, *self.nodes], self.folder)


class _ClusterNode(RedisServer):
    name = "redis-cluster"

    def _free_port(self) -> int:
        return free_port(also=_BUS)

    def _command(self) -> list[str]:
        cluster = ["--cluster-enabled", "yes", "--cluster-node-timeout", "2000", "--cluster-announce-ip", HOST]
        return [*super()._command(), "--appendonly", "yes", "--repl-diskless-sync-delay", "0", *cluster]


class _Sentinel(RedisServer):
    """Its one option is the port of the master."""

    name = "redis-sentinel"

    def _command(self) -> list[str]:
        rewritten = self.folder / f"{self.port}.conf"  # by the sentinel itself
        if not rewritten.exists():
            rewritten.write_text(
                f"bind {HOST}\nport {self.port}\ndir {self.folder}\n"
                f"sentinel monitor {_MASTER} {HOST} {self._options[0]} 2\n"
                f"sentinel down-after-milliseconds {_MASTER} 1500\nsentinel failover-timeout {_MASTER} 6000\n",
                "utf-8",
            )
        return [install.redis(), str(rewritten), "--sentinel"]


def _ordered(node: RedisServer, *words: str) -> None:
    if not (answer := node.say(*words)).startswith(b"+OK"):
        raise RuntimeError(f"{' '.join(words[:2])} was answered {answer[:200]!r}")


def _await(nodes: list[RedisServer], holds: Callable[[RedisServer], bool]) -> None:
    for node in nodes:
        if not wait_until(lambda node=node: holds(node)):
            raise RuntimeError(f"{node.name} is not ready: {node.say('INFO', 'replication')!r}")


def _knows_all(sentinel: RedisServer) -> bool:
    words = sentinel.say("SENTINEL", "MASTER", _MASTER).split(b"\r\n")[2::2]
    told = dict(zip(words[::2], words[1::2], strict=False))
    return (told.get(b"num-other-sentinels"), told.get(b"num-slaves")) == (b"2", b"1")


def _close_all(servers: list[RedisServer], folder: Path) -> None:
    for server in servers:
        server.close()
    shutil.rmtree(folder, ignore_errors=True)
