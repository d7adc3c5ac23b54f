"""What a failover of Redis takes along, and how calls end meanwhile: a load of 64 writers, on servers of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest

pytest.importorskip("redis")
from redis_server import missing

_HERE = Path(__file__).parent


def _failover(kind: str, fault: str) -> dict[str, Any]:
    program = [sys.executable, str(_HERE / "redis_failover.py"), kind, fault, "0.5"]
    done = subprocess.run(program, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("kind", ["cluster", "sentinel"])
@pytest.mark.parametrize("fault", ["kill", "freeze", "lag"])
def test_a_failover_gives_no_wrong_answer_and_every_call_ends(
    kind: str, fault: str, missing_service: Callable[[str, str], NoReturn]
) -> None:
    if reason := missing():
        missing_service(f"redis-{kind}", reason)

    found = _failover(kind, fault)

    assert (found["wrong"], found["unread"]) == (0, 0)
    assert found["longest_call_seconds"] <= found["timeout_seconds"] + 1
    assert set(found["errors"]) <= {"Unavailable/none", "DeadlineExceeded/none", "CommitUnknown/unknown"}
    assert found["accepted_again_after_seconds"] < 25
    if fault == "lag":  # what the replica had not heard of: it shows that a loss would be seen
        assert found["lost"] > 0
    else:
        assert found["lost"] < found["acknowledged_before"] / 100
