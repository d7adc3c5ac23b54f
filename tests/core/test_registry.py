"""Drivers are found by scheme; one that is broken does not stand in the way of the others."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from kvpersist import registry
from kvpersist.errors import BrokenPlugin, MissingExtra, UnknownScheme

_PATH = os.pathsep.join(path for path in sys.path if path)
_GOOD = """
import msgspec
class Good:
    api = 1
    class Options(msgspec.Struct): ...
    @classmethod
    async def open(cls, options): ...
"""

Install = Callable[..., None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Put a distribution with driver entry points, and the modules they name, on the path."""
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)

    def install(distribution: str, points: dict[str, str], **modules: str) -> None:
        info = tmp_path / f"{distribution}-1.2.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.2\n")
        lines = [f"{scheme} = {target}" for scheme, target in points.items()]
        (info / "entry_points.txt").write_text("\n".join(["[kvpersist.drivers]", *lines]))
        for name, text in modules.items():
            (tmp_path / f"{name}.py").write_text(text)
        registry.refresh()

    yield install
    registry.refresh()
    for name in set(sys.modules) - before:
        if getattr(sys.modules[name], "__file__", None) and str(tmp_path) in str(sys.modules[name].__file__):
            del sys.modules[name]


def test_kvpersist_brings_its_drivers_as_plugins() -> None:
    assert {"memory", "sqlite"} <= set(registry.schemes())
    assert registry.driver_class("memory").__name__ == "MemoryDriver"
    [memory] = [info for info in registry.list_drivers() if info.scheme == "memory"]
    assert memory.builtin
    assert (memory.target, memory.distribution) == ("kvpersist_drivers.memory:MemoryDriver", "kvpersist")


def test_a_driver_of_another_distribution_is_found_by_its_scheme(install: Install) -> None:
    install("acme", {"acme": "acme_good:Good"}, acme_good=_GOOD)

    assert registry.driver_class("acme").__name__ == "Good"
    [info] = [info for info in registry.list_drivers() if info.scheme == "acme"]
    assert (info.distribution, info.version, info.builtin, info.error) == ("acme", "1.2", False, None)


def test_listing_imports_nothing(install: Install) -> None:
    install("acme", {"acme": "acme_unasked:Good"}, acme_unasked=_GOOD)

    assert "acme" in [info.scheme for info in registry.list_drivers()]
    assert "acme" in registry.schemes()
    assert "acme_unasked" not in sys.modules


def test_only_the_driver_that_was_asked_for_is_imported(install: Install) -> None:
    install("acme", {"acme": "acme_one:Good", "other": "acme_two:Good"}, acme_one=_GOOD, acme_two=_GOOD)

    registry.driver_class("acme")

    assert "acme_one" in sys.modules
    assert "acme_two" not in sys.modules


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("1/0", "ZeroDivisionError"),
        ("import no_such_module_at_all", "no_such_module_at_all"),
        ("", "Good"),
        (_GOOD.replace("api = 1", "api = 2"), "api = 2"),
        (_GOOD.replace("api = 1", ""), "api = None"),
        (_GOOD.replace("(msgspec.Struct)", ""), "Options"),
        (_GOOD.replace("async def open", "async def opens"), "open"),
    ],
)
def test_a_broken_driver_is_named_and_the_others_keep_working(install: Install, text: str, says: str) -> None:
    install("acme", {"acme": "acme_broken:Good"}, acme_broken=text)

    with pytest.raises(BrokenPlugin, match=says) as caught:
        registry.driver_class("acme")

    assert (caught.value.scheme, caught.value.target) == ("acme", "acme_broken:Good")
    [info] = [info for info in registry.list_drivers() if info.scheme == "acme"]
    assert info.error is not None
    assert says in info.error
    assert registry.driver_class("memory").__name__ == "MemoryDriver"


def test_listing_can_find_what_is_broken_before_it_is_asked_for(install: Install) -> None:
    install("acme", {"acme": "acme_early:Good"}, acme_early="1/0")

    assert [info.error for info in registry.list_drivers() if info.scheme == "acme"] == [None]
    [error] = [info.error for info in registry.list_drivers(load=True) if info.scheme == "acme"]

    assert error is not None
    assert "ZeroDivisionError" in error
    assert [info.error for info in registry.list_drivers(load=True) if info.scheme == "memory"] == [None]


def test_an_absent_client_library_is_told_with_the_line_that_installs_it(install: Install) -> None:
    text = (
        "from kvpersist.driver import needs_extra\nwith needs_extra('acme', module='acme_client'):\n"
        "    import acme_client\n"
    )
    install("acme", {"acme": "acme_extra:Good"}, acme_extra=text)

    with pytest.raises(MissingExtra, match=r"pip install 'kvpersist\[acme\]'"):
        registry.driver_class("acme")


def test_a_driver_that_could_not_be_imported_is_tried_again(install: Install, tmp_path: Path) -> None:
    install("acme", {"acme": "acme_mended:Good"}, acme_mended="1/0")
    with pytest.raises(BrokenPlugin):
        registry.driver_class("acme")

    (tmp_path / "acme_mended.py").write_text(_GOOD + "\n# mended\n")

    assert registry.driver_class("acme").__name__ == "Good"
    assert [info.error for info in registry.list_drivers() if info.scheme == "acme"] == [None]


def test_a_scheme_of_our_own_is_not_replaced_and_the_attempt_is_shown(install: Install) -> None:
    install("acme", {"memory": "acme_shadow:Good"}, acme_shadow=_GOOD)

    assert registry.driver_class("memory").__name__ == "MemoryDriver"
    ours, theirs = (info for info in registry.list_drivers(load=True) if info.scheme == "memory")
    assert (ours.builtin, ours.error) == (True, None)
    assert (theirs.distribution, theirs.builtin) == ("acme", False)
    assert theirs.error is not None
    assert "cannot be replaced" in theirs.error
    assert "acme_shadow" not in sys.modules


def test_a_scheme_that_two_distributions_claim_is_refused(install: Install) -> None:
    install("acme", {"both": "acme_first:Good"}, acme_first=_GOOD)
    install("bolt", {"both": "bolt_second:Good"}, bolt_second=_GOOD)

    with pytest.raises(BrokenPlugin, match="acme and bolt both register it"):
        registry.driver_class("both")

    errors = [info.error for info in registry.list_drivers() if info.scheme == "both"]
    assert len(errors) == 2
    assert all(error is not None and "more than one" in error for error in errors)


@pytest.mark.parametrize(("scheme", "meant"), [("memry", "memory"), ("sqlite3", "sqlite"), ("zzz", "")])
def test_an_unknown_scheme_names_the_nearest_and_all_there_are(scheme: str, meant: str) -> None:
    with pytest.raises(UnknownScheme) as caught:
        registry.driver_class(scheme)

    assert caught.value.suggestion == meant
    assert {"memory", "sqlite"} <= set(caught.value.known)


def test_a_scheme_that_only_fsspec_knows_is_served_by_its_driver() -> None:
    assert registry.driver_class("sftp") is registry.driver_class("fsspec")
    assert "sftp" not in registry.schemes()


def test_a_scheme_of_ours_comes_before_fsspecs_and_a_plugins_too(install: Install) -> None:
    assert registry.driver_class("memory").__name__ == "MemoryDriver"
    assert registry.driver_class("file").__name__ == "FilesystemDriver"

    install("acme", {"sftp": "acme_sftp:Good"}, acme_sftp=_GOOD)

    assert registry.driver_class("sftp").__name__ == "Good"


def test_fsspec_is_not_imported_for_a_scheme_that_is_registered() -> None:
    code = (
        "import sys; from kvpersist import registry; registry.driver_class('memory'); registry.schemes()\n"
        "assert 'fsspec' not in sys.modules, 'imported'"
    )

    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, env={**os.environ, "PYTHONPATH": _PATH})


def test_without_fsspec_an_unknown_scheme_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fsspec", None)

    with pytest.raises(UnknownScheme, match=r"kvpersist\[fsspec\]") as caught:
        registry.driver_class("sftp")

    assert caught.value.scheme == "sftp"
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_distributions_are_searched_once(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    searches: list[str] = []

    def entry_points(*, group: str) -> list[EntryPoint]:
        searches.append(group)
        return [EntryPoint("acme", "acme_cached:Good", group)]

    install("acme", {}, acme_cached=_GOOD)
    monkeypatch.setattr("importlib.metadata.entry_points", entry_points)

    for _ in range(3):
        registry.driver_class("acme")
        registry.list_drivers()

    assert searches == ["kvpersist.drivers"]


@pytest.mark.parametrize("text", ["raise SystemExit(3)", "import sys; sys.exit('no')", "class Good(1): ..."])
def test_a_driver_that_ends_the_program_when_it_is_imported_is_isolated_too(install: Install, text: str) -> None:
    install("acme", {"acme": "acme_exits:Good"}, acme_exits=text)

    [error] = [info.error for info in registry.list_drivers(load=True) if info.scheme == "acme"]

    assert error
    with pytest.raises(BrokenPlugin):
        registry.driver_class("acme")
    assert registry.driver_class("memory").__name__ == "MemoryDriver"


@pytest.mark.parametrize("target", ["", "acme good", "acme_good", "acme_good:", ":Good", "acme_good:Good.nothing"])
def test_an_entry_point_that_names_no_class_is_told(install: Install, target: str) -> None:
    install("acme", {"acme": target}, acme_good=_GOOD)

    with pytest.raises(BrokenPlugin):
        registry.driver_class("acme")
    assert "memory" in [info.scheme for info in registry.list_drivers(load=True) if info.error is None]


@pytest.mark.parametrize("metadata", [None, "", "Metadata-Version: 2.1\nVersion: 1\n", "\xff\x00", "Name: acme\n"])
def test_a_distribution_without_its_metadata_does_not_hide_the_others(
    install: Install, tmp_path: Path, metadata: str | None
) -> None:
    install("acme", {"acme": "acme_good:Good"}, acme_good=_GOOD)
    path = tmp_path / "acme-1.2.dist-info" / "METADATA"
    if metadata is None:
        path.unlink()
    else:
        path.write_text(metadata, "latin-1")
    registry.refresh()

    assert registry.driver_class("memory").__name__ == "MemoryDriver"
    install("other", {"other": "acme_good:Good"})
    listed = {info.scheme: info for info in registry.list_drivers(load=True)}
    assert not listed["acme"].builtin
    assert registry.driver_class("acme").__name__ == "Good"
    assert listed["other"].distribution == "other"


def test_a_broken_file_of_entry_points_does_not_hide_the_others(install: Install, tmp_path: Path) -> None:
    install("acme", {"acme": "acme_good:Good"}, acme_good=_GOOD)
    (tmp_path / "acme-1.2.dist-info" / "entry_points.txt").write_text("= = [\n[kvpersist.drivers]\nno sense at all\n")
    registry.refresh()

    assert registry.driver_class("memory").__name__ == "MemoryDriver"
    assert {"memory", "sqlite"} <= set(registry.schemes())
