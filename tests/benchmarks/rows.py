"""Which module has which row. A module is imported when one of its rows is asked for, for it needs its client."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Final

from measure import Line, Plan

__all__ = ["MODULES", "Row", "row"]

Row = Callable[[str, Plan], AbstractAsyncContextManager[list[Line]]]

_HELD: Final = {
    "rows_sqlite": "S1 S2 S3 S4 S5 S6 S7 S8 S9 P3-SQLITE",
    "rows_redis": "R1 R2 R3 R4 R5",
    "rows_postgres": "P1 P2 P3",
    "rows_mysql": "M1",
    "rows_mongo": "M2",
    "rows_files": "F1 F2 F3",
    "rows_buckets": "O1",
    "rows_length": "L1 L2",
}
MODULES: Final = {name: module for module, names in _HELD.items() for name in names.split()}


def row(name: str) -> Row:
    return importlib.import_module(MODULES[name]).ROWS[name]
