"""``python -m kvpersist`` is the command ``kvpersist``."""

from __future__ import annotations

import sys

from kvpersist.cli import main

__all__: list[str] = []

if __name__ == "__main__":
    sys.exit(main())
