"""A server of one process: started on a free loopback port, with its data in a folder of its own."""

from __future__ import annotations

import os
import pwd
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Self

__all__ = ["HOST", "Server", "Spawned", "free_port", "wait_until"]

HOST = "127.0.0.1"
Spawned = Callable[[int, int], object]  # told of each process: its id, and the signal that ends it
_PATIENCE = float(os.environ.get("KVPERSIST_SERVICES_WAIT", "60"))  # seconds a server may take to start or stop
_PAUSE = 0.02  # seconds between two questions


def free_port(also: int = 0) -> int:
    """A loopback port that nobody listens at, nor at the one ``also`` above it.

    It lies below those that the system gives to outgoing connections: a server that was stopped finds it free.
    """
    while True:
        port = random.randrange(20_000, 32_000 - also)
        try:
            for number in {port, port + also}:
                with socket.socket() as free:
                    free.bind((HOST, number))
        except OSError:
            continue
        return port


def wait_until(ready: Callable[[], bool], gone: Callable[[], bool] = lambda: False) -> bool:
    """Whether it became true before patience ended; an error of the system counts as not yet."""
    until = time.monotonic() + _PATIENCE
    while time.monotonic() < until:
        try:
            if ready():
                return True
        except OSError:
            pass
        if gone():
            return False
        time.sleep(_PAUSE)
    return False


class Server(ABC):
    """One server, running when made. ``restart`` keeps the port and the data; ``close`` removes the data.

    Args:
        options: more arguments of the program.
        folder: where its data goes, an empty folder or none yet; without it a temporary one, removed by ``close``.
        spawned: is told of each process as soon as it runs.
    """

    name: ClassVar[str]
    ending: ClassVar[signal.Signals] = signal.SIGTERM
    users: ClassVar[tuple[str, ...]] = ()  # one of these runs it where root may not

    def __init__(self, *options: str, folder: Path | None = None, spawned: Spawned | None = None) -> None:
        self._options = options
        self._spawned = spawned
        self._process: subprocess.Popen[bytes] | None = None
        self._user = _user_for(self.users)
        self.folder = folder or Path(tempfile.mkdtemp(prefix=f"kvpersist-{self.name}-", dir=_place(self._user)))
        self.folder.mkdir(parents=True, exist_ok=True)
        self.port = 0
        if self._user:
            shutil.chown(self.folder, self._user.pw_uid, self._user.pw_gid)
        try:
            self._prepare()
            for attempts_left in (2, 1, 0):
                self.port = self._free_port()
                try:
                    self.start()
                except RuntimeError:  # somebody else took the port meanwhile, or the options are wrong
                    if not attempts_left:
                        raise
                else:
                    break
        except BaseException:
            self.close()
            raise

    @property
    @abstractmethod
    def url(self) -> str:
        """The URL of the server, or of the database or bucket made in it."""

    @property
    @abstractmethod
    def environment(self) -> dict[str, str]:
        """What tests are told, by the ends of the names of the variables."""

    @abstractmethod
    def _command(self) -> list[str]: ...

    @abstractmethod
    def _ready(self) -> bool: ...

    def _prepare(self) -> None:  # noqa: B027 - most have nothing to make
        """Make the data, before the first start."""

    def _free_port(self) -> int:
        return free_port()

    def _settings(self) -> dict[str, str]:
        """More environment variables of the process."""
        return {}

    def start(self) -> None:
        log = self.folder / "log"
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                self._command(),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                cwd=self.folder,
                env={**os.environ, "TMPDIR": str(self.folder), **self._settings()},
                start_new_session=True,
                **self._as_user(),
            )
        process = self._process
        if self._spawned is not None:
            self._spawned(process.pid, self.ending)
        if not wait_until(self._ready, lambda: process.poll() is not None):
            told = log.read_text("utf-8", "replace")[-2000:]
            self.stop(signal.SIGKILL)
            raise RuntimeError(f"{self.name} did not start:\n{told}")

    def stop(self, signal_: int | None = None) -> None:
        """End the process, with its data kept in the folder; SIGKILL also ends what it started."""
        process, self._process = self._process, None
        if process is None or process.poll() is not None:
            return
        if signal_ == signal.SIGKILL:
            os.killpg(process.pid, signal_)
        else:
            process.send_signal(signal_ or self.ending)
        try:
            process.wait(_PATIENCE)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def restart(self) -> None:
        self.stop()
        self.start()

    def close(self) -> None:
        self.stop()
        shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _as_user(self) -> dict[str, Any]:
        """For subprocess: who runs it."""
        if self._user is None:
            return {}
        return {"user": self._user.pw_uid, "group": self._user.pw_gid, "extra_groups": []}

    def _run(self, command: list[str], text: str = "") -> None:
        """Run a program to its end, as the server's user."""
        settings = {**os.environ, "TMPDIR": str(self.folder)}
        done = subprocess.run(
            command, input=text, capture_output=True, text=True, cwd=self.folder, env=settings, **self._as_user()
        )
        if done.returncode:
            raise RuntimeError(f"{command[0]} ended with {done.returncode}:\n{(done.stdout + done.stderr)[-2000:]}")

    def _reachable(self, programs: Path, installation: Path) -> Path:
        """The folder of programs, or a copy of it where the server's user cannot get to the installation."""
        if self._user is None or _lets_others_in(programs):
            return programs
        copy = self.folder / "programs"
        if not copy.exists():
            shutil.copytree(installation, copy, symlinks=True)
        return copy / programs.relative_to(installation)


def _user_for(names: tuple[str, ...]) -> pwd.struct_passwd | None:
    if os.geteuid() != 0:
        return None
    known = {user.pw_name: user for user in pwd.getpwall()}
    return next((known[name] for name in names if name in known), None)


def _place(user: pwd.struct_passwd | None) -> Path:
    """A folder for temporary folders that this user can get through to."""
    places = [Path(tempfile.gettempdir()), Path("/tmp"), Path("/var/tmp")]
    return next((place for place in places if user is None or _lets_others_in(place)), places[0])


def _lets_others_in(folder: Path) -> bool:
    return all(place.stat().st_mode & 0o001 for place in (folder, *folder.resolve().parents))
