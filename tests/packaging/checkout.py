"""Where the checkout is, and what is in it."""

from __future__ import annotations

import ast
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PYPROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))


def modules() -> Iterator[tuple[str, Path]]:
    """Every module of the library and the drivers: dotted name and file."""
    for root, package in ((ROOT, "kvpersist"), (ROOT / "drivers", "kvpersist_drivers")):
        for path in sorted((root / package).rglob("*.py")):
            name = ".".join(path.relative_to(root).with_suffix("").parts)
            yield name.removesuffix(".__init__"), path


def parsed() -> Iterator[tuple[str, ast.Module]]:
    for name, path in modules():
        yield name, ast.parse(path.read_text("utf-8"), str(path))
