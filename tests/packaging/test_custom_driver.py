"""The example of a driver by somebody else: installed as any distribution is, it works as a built-in one."""

from __future__ import annotations

import json
import os
import shutil
import site
import subprocess
import sys
import sysconfig
import tomllib
import venv
from collections.abc import Callable
from pathlib import Path

import pytest
from checkout import ROOT

EXAMPLE = ROOT / "examples" / "custom_driver"

Call = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the example, so that installing it writes nothing into the checkout."""
    copy = tmp_path_factory.mktemp("custom") / "driver"
    shutil.copytree(EXAMPLE, copy, ignore=shutil.ignore_patterns(".*", "__pycache__"))
    return copy


@pytest.fixture(scope="module")
def python(folder: Path) -> Call:
    """Run Python in a new environment that has the example, and everything that this one has."""
    place = folder.parent / "env"
    venv.create(place, with_pip=False)
    own = Path(sysconfig.get_path("purelib", vars={"base": str(place), "platbase": str(place)}))
    theirs = [path for path in sys.path if Path(path).name == "site-packages"] or site.getsitepackages()
    lines = [f"import site; site.addsitedir({path!r})" for path in theirs]  # with the .pth files of editable installs
    (own / "theirs.pth").write_text("\n".join(lines))

    def call(*arguments: str, cwd: Path = folder) -> subprocess.CompletedProcess[str]:
        env = {name: value for name, value in os.environ.items() if not name.startswith(("KVPERSIST_URL", "PYTEST_"))}
        command = [str(place / "bin" / "python"), *arguments]
        return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=env, timeout=110, check=False)

    pip = ["-m", "pip"]
    if call(*pip, "--version").returncode != 0:  # this environment has none; the one it was made from has
        base: str = getattr(sys, "_base_executable", sys.executable)
        outer = [base, "-m", "pip", "--python", str(place / "bin" / "python")]
    else:
        outer = [str(place / "bin" / "python"), *pip]
    options = ["--quiet", "--disable-pip-version-check", "--no-index", "--no-deps", "--no-build-isolation"]
    done = subprocess.run(
        [*outer, "install", *options, str(folder)], capture_output=True, text=True, timeout=110, check=False
    )
    assert done.returncode == 0, done.stderr
    shutil.rmtree(folder / "kvpersist_cabinet")  # what runs is what was installed
    return call


def test_its_own_tests_pass(python: Call) -> None:
    done = python("-m", "pytest", "-q", "-p", "no:cacheprovider", "tests")

    assert done.returncode == 0, done.stdout[-4000:] + done.stderr


def test_it_stands_in_the_list_of_drivers(python: Call) -> None:
    done = python("-m", "kvpersist", "drivers", "--json")

    [cabinet] = [info for info in json.loads(done.stdout) if info["scheme"] == "cabinet"]
    assert (cabinet["distribution"], cabinet["builtin"], cabinet["error"]) == ("kvpersist-cabinet", False, None)


def test_its_scheme_opens_from_the_command_line_and_from_code(python: Call, tmp_path: Path) -> None:
    put = python("-m", "kvpersist", "put", "app:greeting", "hello", "--url", "cabinet:///a.cabinet", cwd=tmp_path)
    program = (
        "import asyncio, kvpersist, kvpersist_cabinet\n"
        "assert 'site-packages' in kvpersist_cabinet.__file__\n"
        "async def main():\n"
        "    async with kvpersist.open('cabinet:///a.cabinet') as db:\n"
        "        print(await db.store.get('app:greeting'), type(db.store.driver).__name__)\n"
        "asyncio.run(main())\n"
    )
    read = python("-W", "error", "-c", program, cwd=tmp_path)

    assert put.returncode == 0, put.stderr
    assert read.stdout == "hello CabinetDriver\n", read.stderr


def test_an_unknown_option_of_it_is_told_with_the_nearest(python: Call, tmp_path: Path) -> None:
    done = python("-m", "kvpersist", "ls", "--url", "cabinet:///a.cabinet?kv.tmeout=5", cwd=tmp_path)

    assert done.returncode == 2
    assert "did you mean kv.timeout?" in done.stderr


def test_it_conforms(python: Call, tmp_path: Path) -> None:
    done = python("-m", "kvpersist", "conformance", "cabinet:///a.cabinet", "--records", "--json", cwd=tmp_path)

    report = json.loads(done.stdout)
    assert [result for result in report["results"] if result["outcome"] == "failed"] == []
    assert done.returncode == 0
    assert report["passed"] > 80
    assert report["driver"] == "kvpersist_cabinet:CabinetDriver"


def test_it_is_whole(folder: Path) -> None:
    project = tomllib.loads((EXAMPLE / "pyproject.toml").read_text("utf-8"))["project"]
    [target] = project["entry-points"]["kvpersist.drivers"].values()

    assert target == "kvpersist_cabinet:CabinetDriver"
    assert (EXAMPLE / project["readme"]).is_file()
    assert (EXAMPLE / "kvpersist_cabinet" / "py.typed").is_file()
