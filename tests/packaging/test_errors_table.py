"""One table tells every error; it agrees with the classes."""

from __future__ import annotations

import pytest
from checkout import ROOT

from kvpersist import errors
from kvpersist.errors import KvError

_PAGE = ROOT / "docs" / "reference" / "errors.md"


def _rows() -> list[dict[str, str]]:
    lines = [line for line in _PAGE.read_text("utf-8").splitlines() if line.startswith("|")]
    head, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [dict(zip(head, row, strict=True)) for row in rows]


def _as_told(class_: type[KvError]) -> dict[str, str]:
    """What the table must say of a class."""
    return {
        "code": class_.code,
        "error": f"`{class_.__name__}`",
        "retryable": "yes" if class_.retryable else "no",
        "outcome": class_.outcome,
        "is a": ", ".join(f"`{base.__name__}`" for base in class_.__bases__ if base is not KvError),
    }


def test_the_table_has_every_error_once_in_the_order_of_codes() -> None:
    classes = [getattr(errors, name) for name in errors.__all__ if name != "KvError"]

    assert [row["error"].strip("`") for row in _rows()] == [
        class_.__name__ for class_ in sorted(classes, key=lambda class_: class_.code)
    ]


@pytest.mark.parametrize("row", _rows(), ids=lambda row: row["error"].strip("`"))
def test_a_row_says_what_the_class_says(row: dict[str, str]) -> None:
    told = _as_told(getattr(errors, row["error"].strip("`")))

    assert {name: row[name] for name in told} == told
    assert row["when"] and row["what to do"]
