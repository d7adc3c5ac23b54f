"""The driver on the page for driver authors is short, and the page leaves no capability out."""

from __future__ import annotations

import re
from pathlib import Path

from kvpersist import driver, testing

PAGE = (Path(__file__).parents[2] / "docs" / "how-to" / "write-a-driver.md").read_text("utf-8")


def test_the_minimal_driver_has_less_than_sixty_lines_of_code() -> None:
    [source] = re.findall(r"```python\n# jar\.py\n(.*?)```", PAGE, re.DOTALL)

    lines = [line for line in source.splitlines() if line.strip()]
    assert len(lines) < 60


def test_every_capability_is_explained() -> None:
    named = set(re.findall(r"`(\w+)`", PAGE))

    assert set(driver.Capabilities.__struct_fields__) - named == set()


def test_every_contract_of_the_kit_is_named() -> None:
    for name in ("DriverContract", "driver_machine", "PersistenceContract", "ScratchDriver"):
        assert name in testing.__all__
        assert f"`{name}" in PAGE or f"`kvpersist.testing.{name}" in PAGE
