"""The checked list is what the tests say, and what is wrong with it is found."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parent / "make_checked_list.py"
MADE = runpy.run_path(str(SCRIPT))


def test_the_page_is_what_the_tests_show() -> None:
    done = subprocess.run([sys.executable, str(SCRIPT), "--check"], capture_output=True, text=True, check=False)

    assert (done.returncode, done.stdout) == (0, ""), done.stderr


def _section(advice: bool = False, **fields: Any) -> list[Any]:
    return [MADE["Section"](title="t", advice=advice, row=[MADE["Row"](**{"what": "row", "whose": "S", **fields})])]


def _tests(*shows: str) -> dict[str, Any]:
    return {"tests/a.py::test_a": MADE["Test"](node="tests/a.py::test_a", shows=set(shows), drivers={"sqlite"})}


@pytest.mark.parametrize(
    ("fields", "shows", "wrong"),
    [
        ({}, (), "'row' has no test"),
        ({}, ("row", "other"), "tests/a.py::test_a shows 'other', which is no row"),
        ({"tests": ["tests/a.py::test_b"]}, ("row",), "'row' names tests/a.py::test_b, which is not there"),
        ({"on": ["redis"]}, ("row",), "'row' is not shown on redis"),
        ({"whose": "X"}, ("row",), "'row' is not of 'X'"),
        ({"says": "tea", "page": "index.md"}, ("row",), "'row': docs/index.md does not say 'tea'"),
        ({"says": "kvpersist", "page": "index.md"}, ("row",), "'row' has a sentence, and needs a test"),
        ({}, ("row",), None),
        ({"tests": ["tests/a.py::test_a"]}, (), None),
    ],
)
def test_what_is_wrong_with_a_row_is_told(fields: dict[str, Any], shows: tuple[str, ...], wrong: str | None) -> None:
    found = MADE["problems"](_section(**fields, advice="says" in fields and "tea" in fields["says"]), _tests(*shows))

    assert found == ([] if wrong is None else [wrong])


def test_a_row_names_whose_it_was_its_tests_and_its_drivers() -> None:
    text = MADE["page"](_section(whose="S Kd", note="a note"), _tests("row"))

    assert "| row | Seashore, Kode (promised) | [`test_a`](../../tests/a.py)<br>a note | sqlite |" in text
