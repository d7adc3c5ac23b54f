"""The scripts that start and stop services, in a folder of the test's own; and what pytest makes of them."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from redis_server import RedisServer, missing
from server import wait_until

_HERE = Path(__file__).parent


class _Scripts:
    """The scripts over one folder, without what this run of the tests knows of other services."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        ours = ("KVPERSIST_TEST_", "PYTEST_")
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith(ours)}
        self.environment["KVPERSIST_SERVICES_DIR"] = str(folder)

    def run(self, script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(_HERE / script), *arguments]
        settings = self.environment | environment
        return subprocess.run(command, env=settings, capture_output=True, text=True, check=False)

    def begin(self, script: str, *arguments: str) -> subprocess.Popen[str]:
        command = [sys.executable, str(_HERE / script), *arguments]
        return subprocess.Popen(
            command, env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def rows(self) -> dict[str, dict[str, list[list[int]]]]:
        try:
            return json.loads((self.folder / "pids.json").read_text("utf-8"))
        except FileNotFoundError:
            return {}

    def pids(self, name: str) -> list[int]:
        return [pid for pid, *_ in self.rows()[name]["processes"]] if name in self.rows() else []


@pytest.fixture
def scripts() -> Iterator[_Scripts]:
    if reason := missing():
        pytest.skip(reason)
    folder = Path(tempfile.mkdtemp(prefix="kvpersist-services-"))
    scripts = _Scripts(folder)
    yield scripts
    down = scripts.run("down")
    assert down.returncode == 0, down.stderr
    shutil.rmtree(folder)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text("utf-8").rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def _answers(exports: str) -> bool:
    [port] = re.findall(r"KVPERSIST_TEST_REDIS_URL=redis://127\.0\.0\.1:(\d+)/0", exports)
    asking = RedisServer.__new__(RedisServer)
    asking.port = int(port)
    try:
        return asking.say("PING") == b"+PONG\r\n"
    except OSError:
        return False


def test_up_twice_is_up_once(scripts: _Scripts) -> None:
    first = scripts.run("up", "redis")
    pids = scripts.pids("redis")
    second = scripts.run("up", "redis")

    assert (first.returncode, second.returncode) == (0, 0), first.stderr
    assert first.stdout == second.stdout == scripts.run("up", "--running").stdout
    assert scripts.pids("redis") == pids and len(pids) == 1
    assert _answers(first.stdout)


def test_two_who_start_at_once_share_one_server(scripts: _Scripts) -> None:
    both = [scripts.begin("up", "redis") for _ in range(2)]
    (one, _), (two, _) = [process.communicate(timeout=60) for process in both]

    assert one == two
    assert _answers(one)
    assert len(scripts.pids("redis")) == 1


def test_down_stops_what_up_started_and_nothing_else(scripts: _Scripts) -> None:
    with RedisServer() as other:
        exports = scripts.run("up", "redis", "redis-sentinel").stdout
        started = [*scripts.pids("redis"), *scripts.pids("redis-sentinel")]
        assert len(started) == 6

        assert scripts.run("down", "redis-sentinel").returncode == 0
        assert [_runs(pid) for pid in started] == [True] + [False] * 5
        assert _answers(exports)
        assert scripts.run("down").returncode == 0

        assert not any(map(_runs, started))
        assert other.say("PING") == b"+PONG\r\n"
        assert scripts.rows() == {}
        assert list((scripts.folder / "data").iterdir()) == []


def test_a_killed_server_is_started_anew(scripts: _Scripts) -> None:
    scripts.run("up", "redis")
    [pid] = scripts.pids("redis")
    os.kill(pid, signal.SIGKILL)
    assert wait_until(lambda: not _runs(pid))
    assert scripts.run("up", "--running").stdout == ""

    again = scripts.run("up", "redis")

    assert again.returncode == 0
    assert _answers(again.stdout)
    assert scripts.pids("redis") != [pid]


def test_a_service_that_lost_one_process_is_started_anew_as_a_whole(scripts: _Scripts) -> None:
    scripts.run("up", "redis-cluster")
    before = scripts.pids("redis-cluster")
    os.kill(before[3], signal.SIGKILL)
    assert wait_until(lambda: not _runs(before[3]))

    assert scripts.run("up", "redis-cluster").returncode == 0

    assert not any(map(_runs, before))
    assert len(scripts.pids("redis-cluster")) == 6


def test_a_process_that_was_given_a_recorded_id_is_left_alone(scripts: _Scripts) -> None:
    scripts.run("up", "redis")
    bystander = subprocess.Popen(["sleep", "60"], start_new_session=True)
    try:
        rows = scripts.rows()
        [[_, begun, ending]] = rows["redis"]["processes"]
        rows["redis"]["processes"].append([bystander.pid, begun, ending])
        (scripts.folder / "pids.json").write_text(json.dumps(rows), "utf-8")

        assert scripts.run("up", "redis").returncode == 0
        assert scripts.run("down").returncode == 0

        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()


def test_what_an_interrupted_start_has_left_is_stopped(scripts: _Scripts) -> None:
    starting = scripts.begin("up", "redis-cluster")
    assert wait_until(lambda: len(scripts.pids("redis-cluster")) >= 3)
    starting.terminate()
    starting.communicate(timeout=30)
    left = scripts.pids("redis-cluster")
    assert starting.returncode != 0
    assert any(map(_runs, left))

    assert scripts.run("down").returncode == 0

    assert not any(map(_runs, left))


def test_a_missing_program_is_told_and_the_rest_is_started(scripts: _Scripts, tmp_path: Path) -> None:
    if shutil.which("redis-server") is None:
        pytest.skip("the only redis-server is in the folder that this test hides")
    done = scripts.run("up", "--present", "redis", "mongo", KVPERSIST_SERVICES_CACHE=str(tmp_path))

    assert done.returncode == 1
    assert "mongo is not up: mongo is not built" in done.stderr
    assert _answers(done.stdout)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_installed_where_that_is_forbidden(scripts: _Scripts, tmp_path: Path) -> None:
    done = scripts.run("up", "gcs", KVPERSIST_NO_INSTALL="1", KVPERSIST_SERVICES_CACHE=str(tmp_path))

    assert done.returncode == 1
    assert "KVPERSIST_NO_INSTALL" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_name_is_refused(scripts: _Scripts) -> None:
    done = scripts.run("up", "reddis")

    assert done.returncode == 2
    assert "no service reddis" in done.stderr


def test_the_folder_of_another_user_is_not_used(scripts: _Scripts) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root, to make a folder for somebody else")
    os.chown(scripts.folder, 65534, 65534)

    done = scripts.run("up", "redis")

    os.chown(scripts.folder, 0, 0)
    assert done.returncode != 0
    assert "belongs to another user" in done.stderr


class _Pytest:
    """Runs of pytest over one test that asks for Redis, with this folder's fixtures."""

    def __init__(self, scripts: _Scripts, folder: Path) -> None:
        self._scripts, self._folder = scripts, folder
        shutil.copy(_HERE.parent / "conftest.py", folder)
        (folder / "services").symlink_to(_HERE)
        (folder / "test_it.py").write_text(
            "def test_it(service):\n    assert service('redis')['KVPERSIST_TEST_REDIS_URL']\n", "utf-8"
        )

    def run(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "pytest", "-c", os.devnull, "-p", "no:cacheprovider", "test_it.py"]
        settings = self._scripts.environment | environment
        return subprocess.run(
            [*command, *arguments], cwd=self._folder, env=settings, capture_output=True, text=True, check=False
        )


@pytest.fixture
def inner(scripts: _Scripts, tmp_path: Path) -> _Pytest:
    return _Pytest(scripts, tmp_path)


def test_a_test_whose_service_is_missing_is_skipped_and_counted(inner: _Pytest) -> None:
    done = inner.run()

    assert done.returncode == 0
    assert "1 skipped" in done.stdout
    assert "redis: 1 tests skipped; tests/services/up redis" in done.stdout


@pytest.mark.parametrize("required", ["redis", "all", "redis,postgres"])
def test_it_fails_where_the_service_is_required(inner: _Pytest, required: str) -> None:
    done = inner.run("--require", required)

    assert done.returncode == 1
    assert "1 failed" in done.stdout
    assert "needs the service redis: tests/services/up redis" in done.stdout


def test_a_required_service_that_no_test_asks_for_fails_the_run(inner: _Pytest, scripts: _Scripts) -> None:
    scripts.run("up", "redis")
    done = inner.run("--require", "redis,gcs")

    assert "1 passed" in done.stdout
    assert "gcs is required, and not there" in done.stdout
    assert done.returncode == 1


def test_what_runs_is_used(inner: _Pytest, scripts: _Scripts) -> None:
    scripts.run("up", "redis")

    assert "1 passed" in inner.run("--require", "redis").stdout


def test_the_environment_is_used_first(inner: _Pytest) -> None:
    done = inner.run("--require", "redis", KVPERSIST_TEST_REDIS_URL="redis://elsewhere")

    assert "1 passed" in done.stdout


@pytest.mark.parametrize("options", [[], ["--require", "redis"]])
def test_what_is_installed_is_started_where_asked(inner: _Pytest, scripts: _Scripts, options: list[str]) -> None:
    done = inner.run("--start-services", "-n", "2", *options)

    assert "1 passed" in done.stdout, done.stdout
    assert len(scripts.pids("redis")) == 1


def test_a_required_service_must_exist(inner: _Pytest) -> None:
    done = inner.run("--require", "reddis")

    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert "no service reddis" in done.stderr
