"""Real Redis servers for tests: each on a free loopback port, with its data in a folder of its own.

Standard library only. Nothing is stopped but what was started here.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path

__all__ = ["RedisServer", "free_port", "missing"]

_PATIENCE = 20.0  # seconds a server may take to start or stop


def missing() -> str | None:
    """Why there is no ``redis-server``, None if there is one; Debian's package is installed where that is possible."""
    if shutil.which("redis-server"):
        return None
    if os.environ.get("KVPERSIST_NO_INSTALL"):
        return "needs redis-server, and KVPERSIST_NO_INSTALL is set"
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        return "needs redis-server: apt-get install redis-server"
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive", "RUNLEVEL": "1"}  # starts no service
    install = ["apt-get", "-o", "DPkg::Lock::Timeout=120", "install", "-y", "--no-install-recommends", "redis-server"]
    for command in (install, ["apt-get", "update"], install):
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if shutil.which("redis-server"):
            return None
    return f"needs redis-server, which apt-get could not install: {done.stderr[-300:]}"


def free_port() -> int:
    """A loopback port that nobody listens at."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


class RedisServer:
    """One server. ``restart`` keeps the port and, with ``appendonly``, the data."""

    def __init__(self, *options: str) -> None:
        self._folder = tempfile.mkdtemp(prefix="kvpersist-redis-")
        self._options = options
        self._process: subprocess.Popen[bytes] | None = None
        self.socket = f"{self._folder}/redis.sock"
        for attempts_left in (2, 1, 0):
            self.port = free_port()
            try:
                self.start()
            except RuntimeError:  # somebody else took the port meanwhile, or the options are wrong
                if not attempts_left:
                    self.close()
                    raise
            else:
                break

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def start(self) -> None:
        fixed = ["--bind", "127.0.0.1", "--port", str(self.port), "--dir", self._folder, "--unixsocket", self.socket]
        command = ["redis-server", *fixed, "--save", "", "--daemonize", "no", *self._options]
        with Path(self._folder, "log").open("ab") as log:
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        until = time.monotonic() + _PATIENCE
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > until:
                told = Path(self._folder, "log").read_text("utf-8", "replace")[-2000:]
                self.stop()
                raise RuntimeError(f"redis-server did not start:\n{told}")
            time.sleep(0.02)

    def stop(self, signal_: int = signal.SIGTERM) -> None:
        """End the process, with its data kept in the folder."""
        process, self._process = self._process, None
        if process is not None:
            process.send_signal(signal_)
            try:
                process.wait(_PATIENCE)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def restart(self) -> None:
        self.stop()
        self.start()

    def close(self) -> None:
        self.stop()
        shutil.rmtree(self._folder, ignore_errors=True)

    def say(self, *words: str) -> bytes:
        """Send one command over a connection of its own and return the first bytes of the answer."""
        text = b"*%d\r\n" % len(words) + b"".join(b"$%d\r\n%s\r\n" % (len(w.encode()), w.encode()) for w in words)
        with socket.create_connection(("127.0.0.1", self.port), 5) as connection:
            connection.sendall(text)
            return connection.recv(1 << 16)

    def _answers(self) -> bool:
        try:
            return self.say("PING").startswith((b"+PONG", b"-NOAUTH"))
        except OSError:
            return False
