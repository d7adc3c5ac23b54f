"""One table says which drivers there are; pyproject and the docs agree with it."""

from __future__ import annotations

import importlib
import re
from itertools import dropwhile, takewhile

import msgspec
from checkout import PYPROJECT, ROOT

_PAGE = ROOT / "docs" / "reference" / "drivers.md"


def _rows() -> list[dict[str, str]]:
    """The rows of the page's first table by their heads."""
    lines = takewhile(_is_row, dropwhile(lambda line: not _is_row(line), _PAGE.read_text("utf-8").splitlines()))
    head, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [dict(zip(head, row, strict=True)) for row in rows]


def _is_row(line: str) -> bool:
    return line.startswith("|")


def _codes(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def test_the_table_and_pyproject_name_the_same_schemes_and_modules() -> None:
    tabled = {scheme: _codes(row["module"]) for row in _rows() for scheme in _codes(row["schemes"])}
    registered = {
        scheme: [target.partition(":")[0]]
        for scheme, target in PYPROJECT["project"]["entry-points"]["kvpersist.drivers"].items()
    }

    assert tabled == registered


def test_every_extra_of_the_table_is_in_pyproject() -> None:
    extras = {extra for row in _rows() for extra in _codes(row["extra"])}

    assert extras <= PYPROJECT["project"]["optional-dependencies"].keys()


def test_every_driver_has_a_page() -> None:
    for row in _rows():
        [link] = re.findall(r"\]\(([^)]+)\)", row["page"])
        page = _PAGE.parent / link
        assert page.is_file()
        assert f"{_codes(row['schemes'])[0]}://" in page.read_text("utf-8")


def test_every_option_of_a_driver_is_on_its_page() -> None:
    for row in _rows():
        [link] = re.findall(r"\]\(([^)]+)\)", row["page"])
        text = (_PAGE.parent / link).read_text("utf-8")
        [module] = _codes(row["module"])
        scheme = _codes(row["schemes"])[0]
        target = PYPROJECT["project"]["entry-points"]["kvpersist.drivers"][scheme].partition(":")[2]
        options = getattr(importlib.import_module(module), target).Options
        for field in msgspec.structs.fields(options):
            assert re.search(rf"`(kv\.)?{field.name}`", text), f"{field.name} is not on {link}"


def test_every_extra_is_part_of_all_or_for_development() -> None:
    extras = PYPROJECT["project"]["optional-dependencies"]
    in_all = set(re.findall(r"\[([^\]]+)\]", extras["all"][0])[0].split(","))

    assert in_all == extras.keys() - {"all", "test"}
