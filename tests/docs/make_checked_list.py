"""Makes ``docs/reference/checked-list.md`` from the rows in ``checked_list.toml`` and the tests that show them.

    python tests/docs/make_checked_list.py            writes the page
    python tests/docs/make_checked_list.py --check    says whether it is what would be written, and what is wrong

The tests are collected by pytest, not run, for all drivers, so their libraries have to be importable. Nothing is
written while a row has no test, a test that is named is not there, or a sentence does not stand on its page.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import msgspec
import pytest

ROOT = Path(__file__).parents[2]
ROWS = Path(__file__).with_name("checked_list.toml")
PAGE = ROOT / "docs" / "reference" / "checked-list.md"
EIGHT = ("memory", "sqlite", "filesystem", "s3", "redis", "mongo", "postgres", "mysql")
_ABOUT = {f"test_{name}.py": name for name in EIGHT} | {"test_buckets.py": "s3"}  # files of tests/drivers
SYSTEMS = {"S": "Seashore", "A": "AgentX", "Q": "AgentX queue", "P": "storage-prisma", "K": "Kode"}

_HEAD = """# Checked list

What five systems for keeping conversations do, or promised to do, and what shows that kvpersist does it: {rows} rows, \
of which {offered} are offered. The tests named here are run on every change. "All eight" are {eight}, by the same \
calls on each; s3 is MinIO, mongo is FerretDB, mysql is MariaDB. Where no store is named, the row does not touch one, \
or its tests have stores of their own. [Coming from](../coming-from/) translates the names of each system.

This page is made by `tests/docs/make_checked_list.py`, which fails where a row has no test.
"""


class Row(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A row as ``checked_list.toml`` has it; what each field means stands at its top."""

    what: str
    whose: str
    tests: list[str] = []
    on: list[str] = []
    says: str = ""
    page: str = ""
    instead: str = ""
    note: str = ""


class Section(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A table of the page; ``advice``: its rows may be sentences of a page."""

    title: str
    row: list[Row]
    advice: bool = False


class Test(msgspec.Struct, kw_only=True):
    """A test that was collected: the rows it shows, and the drivers it runs on, of the eight."""

    node: str
    shows: set[str] = msgspec.field(default_factory=set[str])
    drivers: set[str] = msgspec.field(default_factory=set[str])


Tests = Mapping[str, Test]


def sections() -> list[Section]:
    """The rows, in the order of the page."""
    return msgspec.toml.decode(ROWS.read_bytes(), type=dict[str, list[Section]])["section"]


def collected(given: Iterable[Section]) -> Tests:
    """The tests that are marked, and those that are named, by node id without parameters."""
    os.environ.pop("KVPERSIST_TEST_DRIVERS", None)  # all of them, also for those who work on one
    named = {node.partition("::")[0] for section in given for row in section.row for node in row.tests}
    marked = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "tests").rglob("test_*.py")
        if "pytest.mark.shows(" in path.read_text("utf-8")
    }
    files = [str(ROOT / name) for name in sorted(named | marked) if (ROOT / name).exists()]
    collector, printed = _Collector(), io.StringIO()
    with contextlib.redirect_stdout(printed):
        options = [
            "--collect-only",
            "-qq",
            "-p",
            "no:cacheprovider",
            f"--rootdir={ROOT}",
            "-c",
            str(ROOT / "pyproject.toml"),
        ]
        code = pytest.main([*options, *files], plugins=[collector])
    if code != pytest.ExitCode.OK:
        raise SystemExit(f"the tests cannot be collected:\n{printed.getvalue()}")
    return collector.tests


class _Collector:
    """A plugin of pytest that keeps what was collected."""

    def __init__(self) -> None:
        self.tests: dict[str, Test] = {}

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        for item in session.items:
            node = item.nodeid.partition("[")[0]
            test = self.tests.setdefault(node, Test(node=node))
            test.shows.update(row for mark in item.iter_markers("shows") for row in mark.args)
            callspec = getattr(item, "callspec", None)
            place = callspec.params.get("place") if callspec else None
            about = getattr(place, "name", None) or _ABOUT.get(item.path.name)
            if about in EIGHT:
                test.drivers.add(about)


def problems(given: Sequence[Section], tests: Tests) -> list[str]:
    """What is wrong, a sentence each."""
    rows = [row for section in given for row in section.row]
    names = [row.what for row in rows]
    found = [f"two rows are called {name!r}" for name in {name for name in names if names.count(name) > 1}]
    for test in tests.values():
        found += [f"{test.node} shows {row!r}, which is no row" for row in test.shows - set(names)]
    for row in rows:
        found += [
            f"{row.what!r} is not of {code!r}" for code in row.whose.split() if code.removesuffix("d") not in SYSTEMS
        ]
        found += [f"{row.what!r} names {node}, which is not there" for node in row.tests if node not in tests]
        if not (_shown_by(row, tests) or row.says):
            found.append(f"{row.what!r} has no test")
        if set(row.on) - _drivers_of(row, tests):
            found.append(f"{row.what!r} is not shown on {', '.join(row.on)}")
        if row.says and " ".join(row.says.split()) not in " ".join(_text_of(row.page).split()):
            found.append(f"{row.what!r}: docs/{row.page} does not say {row.says!r}")
    for section in given:
        if not section.advice:
            found += [f"{row.what!r} has a sentence, and needs a test" for row in section.row if row.says]
    return sorted(found)


def page(given: Sequence[Section], tests: Tests) -> str:
    """The whole page."""
    rows = [row for section in given for row in section.row]
    offered = sum(not row.instead for row in rows)
    head = _HEAD.format(rows=len(rows), offered=offered, eight=f"{', '.join(EIGHT[:-1])} and {EIGHT[-1]}")
    return head + "".join("\n" + "\n".join(_table(section, tests)) + "\n" for section in given)


def _table(section: Section, tests: Tests) -> Iterator[str]:
    yield f"## {section.title}\n"
    yield f"| {'advice' if section.advice else 'capability'} | whose | shown by | on |"
    yield "|---|---|---|---|"
    for row in section.row:
        cells = (row.what, _whose(row), "<br>".join(_evidence(row, tests)), _on(row, tests))
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _whose(row: Row) -> str:
    return ", ".join(
        SYSTEMS[code.removesuffix("d")] + (" (promised)" if code.endswith("d") else "") for code in row.whose.split()
    )


def _evidence(row: Row, tests: Tests) -> Iterator[str]:
    if row.instead:
        yield f"not offered: {row.instead}"
    for node in _shown_by(row, tests):
        file, _, name = node.partition("::")
        yield f"[`{name.rpartition('::')[2]}`](../../{file})"
    if row.says:
        yield f'[{_title_of(row.page)}](../{row.page}): "{row.says.rstrip(":.")}"'
    if row.note:
        yield row.note


def _on(row: Row, tests: Tests) -> str:
    drivers = set(row.on) or _drivers_of(row, tests)
    return "all eight" if drivers == set(EIGHT) else ", ".join(name for name in EIGHT if name in drivers)


def _shown_by(row: Row, tests: Tests) -> list[str]:
    marked = [node for node, test in tests.items() if row.what in test.shows]
    return [*marked, *(node for node in row.tests if node not in marked)]


def _drivers_of(row: Row, tests: Tests) -> set[str]:
    return {name for node in _shown_by(row, tests) if node in tests for name in tests[node].drivers}


def _text_of(name: str) -> str:
    path = ROOT / "docs" / name
    return path.read_text("utf-8") if name and path.exists() else ""


def _title_of(name: str) -> str:
    found = re.search(r"^# (.+)$", _text_of(name), re.MULTILINE)
    return found[1] if found else name


def main() -> int:
    """Write the page, or with ``--check`` compare it; 1: it differs, or something is wrong."""
    given = sections()
    tests = collected(given)
    wrong = problems(given, tests)
    text = page(given, tests)
    if not wrong and "--check" not in sys.argv[1:]:
        PAGE.write_text(text, "utf-8")
    elif not wrong and text != PAGE.read_text("utf-8"):
        wrong.append("the page differs: run python tests/docs/make_checked_list.py")
    print(*wrong, sep="\n", end="\n" if wrong else "")
    return int(bool(wrong))


if __name__ == "__main__":
    raise SystemExit(main())
