"""The built wheel holds the library and its drivers, and nothing else."""

from __future__ import annotations

import tarfile
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest
from checkout import ROOT, modules
from hatchling.builders.sdist import SdistBuilder
from hatchling.builders.wheel import WheelBuilder

import kvpersist


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    [path] = WheelBuilder(str(ROOT)).build(directory=str(tmp_path_factory.mktemp("wheel")), versions=["standard"])
    return zipfile.ZipFile(path)


def test_the_wheel_holds_every_module_and_the_type_marker(wheel: zipfile.ZipFile) -> None:
    names = set(wheel.namelist())
    expected = {
        str(path.relative_to(ROOT / "drivers" if name.startswith("kvpersist_drivers") else ROOT))
        for name, path in modules()
    }

    assert expected <= names
    assert "kvpersist/py.typed" in names
    assert "kvpersist/cli/demo.json" in names
    assert "kvpersist_drivers/redis/redis.lua" in names


def test_the_wheel_holds_nothing_else_at_the_top(wheel: zipfile.ZipFile) -> None:
    tops = {name.partition("/")[0] for name in wheel.namelist()}

    assert tops == {"kvpersist", "kvpersist_drivers", f"kvpersist-{kvpersist.__version__}.dist-info"}
    assert not [name for name in wheel.namelist() if "__pycache__" in name or name.endswith((".db", ".pyc"))]


def test_the_wheel_needs_little_and_says_its_licence(wheel: zipfile.ZipFile) -> None:
    [path] = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
    metadata = message_from_bytes(wheel.read(path))
    needed = [text for text in metadata.get_all("Requires-Dist", []) if "extra ==" not in text]

    assert metadata["Version"] == kvpersist.__version__
    assert metadata["License-Expression"] == "MIT"
    assert sorted(text.partition(">")[0] for text in needed) == ["msgspec", "platformdirs", "uuid-utils"]


def test_two_builds_are_the_same_bytes(tmp_path: Path) -> None:
    built: list[bytes] = []
    for name in ("one", "two"):
        [path] = WheelBuilder(str(ROOT)).build(directory=str(tmp_path / name), versions=["standard"])
        built.append(Path(path).read_bytes())

    assert built[0] == built[1]


def test_the_sdist_can_build_and_test_what_it_holds(tmp_path: Path) -> None:
    [path] = SdistBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"])
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}

    assert {"pyproject.toml", "LICENSE", "README.md", "kvpersist/__init__.py", "tests/run", "tests/_venv.sh"} <= names
    assert not [name for name in names if name.startswith((".venv", ".cache", "dist/"))]
