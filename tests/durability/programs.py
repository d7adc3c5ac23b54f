"""Runs the programs of this folder, which print one JSON object."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

__all__ = ["run_program"]


def run_program(name: str, *arguments: str | Path, **variables: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name(name), *arguments],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(done.stdout)
    print({**result, "wrong": result["wrong"][:9]})
    return result
