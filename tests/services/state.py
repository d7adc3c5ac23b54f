"""What runs, in one file: the processes of each service and where it is.

The folder is ``KVPERSIST_SERVICES_DIR``, by default one for each user in the system's temporary folder. A process
is known by its id and the time the kernel says it began, so an id that was given out again is never taken for it.
Linux only.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypedDict

__all__ = ["Row", "State", "is_alive"]

_PATIENCE = 10.0  # seconds a process may take to end before it is killed


class Row(TypedDict):
    processes: list[list[int]]  # id, begun at, signal that ends it
    environment: dict[str, str]  # empty until it is ready


class State:
    """The file and its folder. Writers hold `locked`; who only reads need not."""

    def __init__(self, folder: Path | None = None) -> None:
        given = os.environ.get("KVPERSIST_SERVICES_DIR")
        usual = Path(tempfile.gettempdir(), f"kvpersist-test-services-{os.getuid()}")
        self.folder = folder or (Path(given) if given else usual)
        self._file = self.folder / "pids.json"
        self._threads = threading.Lock()

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes from starting and stopping meanwhile."""
        self.folder.mkdir(mode=0o711, parents=True, exist_ok=True)
        if self.folder.stat().st_uid != os.getuid():
            raise PermissionError(f"{self.folder} belongs to another user: set KVPERSIST_SERVICES_DIR")
        self.folder.chmod(0o711)  # some servers run as another user, who has to get through
        with (self.folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def rows(self) -> dict[str, Row]:
        try:
            return json.loads(self._file.read_text("utf-8"))
        except FileNotFoundError:
            return {}

    def running(self) -> dict[str, dict[str, str]]:
        """The variables of each service that is whole."""
        return {name: row["environment"] for name, row in self.rows().items() if is_alive(row)}

    def add_process(self, name: str, pid: int, ending: int) -> None:
        with self._changed() as rows:
            begun = _begun_at(pid)
            rows.setdefault(name, {"processes": [], "environment": {}})["processes"].append([pid, begun or 0, ending])

    def set_ready(self, name: str, environment: dict[str, str]) -> None:
        with self._changed() as rows:
            rows[name]["environment"] = environment

    def stop(self, name: str) -> bool:
        """End the recorded processes of a service and forget it; false where one would not end."""
        row = self.rows().get(name)
        if row is None:
            return True
        if not _ended(row["processes"]):
            return False
        with self._changed() as rows:
            del rows[name]
        return True

    @contextmanager
    def _changed(self) -> Iterator[dict[str, Any]]:
        with self._threads:
            rows = self.rows()
            yield rows
            part = self._file.with_suffix(".part")
            part.write_text(json.dumps(rows, indent=1), "utf-8")
            part.replace(self._file)


def is_alive(row: Row) -> bool:
    """Whether the service became ready and every process of it still runs."""
    return bool(row["environment"]) and all(_begun_at(pid) == begun for pid, begun, _ in row["processes"])


def _begun_at(pid: int) -> int | None:
    """When it began, in ticks since the machine did; None where it is gone or only waits to be reaped."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text("utf-8", "replace").rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else int(fields[19])


def _ended(processes: list[list[int]]) -> bool:
    left = [process for process in processes if _begun_at(process[0]) == process[1]]
    for killing in (False, True):
        for pid, _, ending in left:
            with suppress(ProcessLookupError):
                if killing:
                    os.killpg(pid, signal.SIGKILL)  # each was started as the first of a group of its own
                else:
                    os.kill(pid, ending)
        until = time.monotonic() + _PATIENCE
        while left and time.monotonic() < until:
            time.sleep(0.02)
            left = [process for process in left if _begun_at(process[0]) == process[1]]
    return not left
