"""The command line, which needs ``kvpersist[cli]``; without it, only the line that installs it."""

from __future__ import annotations

import sys
from typing import Final

from kvpersist.errors import MissingExtra

__all__ = ["main"]

_EXTRA: Final = ("cyclopts", "rich")


def main() -> int:
    """Run the command line of this process; return its exit code, 2 where the extra is not installed."""
    try:
        from kvpersist.cli.app import run
    except ModuleNotFoundError as error:
        absent = (error.name or "").partition(".")[0]
        if absent not in _EXTRA:
            raise
        sys.stderr.write(f"{MissingExtra('cli', absent)}\n")
        return 2
    return run()
