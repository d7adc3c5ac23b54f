"""The pages for people who come from elsewhere: no name they may look for is missing, and their scripts run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = ROOT / "docs" / "coming-from"
SYSTEMS = sorted(path.stem for path in (Path(__file__).parent / "theirs").glob("*.txt"))


def names(system: str) -> list[str]:
    """What users of a system may look for, in its spelling."""
    lines = (Path(__file__).parent / "theirs" / f"{system}.txt").read_text("utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


@pytest.mark.parametrize("system", SYSTEMS)
def test_every_name_of_the_system_stands_on_its_page(system: str) -> None:
    page = (PAGES / f"{system}.md").read_text("utf-8")

    missing = [name for name in names(system) if not re.search(rf"(?<!\w){re.escape(name)}(?!\w)", page)]

    assert not missing


def test_each_page_belongs_to_a_system_whose_names_are_listed() -> None:
    assert sorted(path.stem for path in PAGES.glob("*.md")) == SYSTEMS
