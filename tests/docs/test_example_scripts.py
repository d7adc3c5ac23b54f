"""The scripts in examples/ run as a newcomer runs them, and print what their readers are told."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
SCRIPTS = sorted(path.name for path in EXAMPLES.glob("*.py"))


def run(script: str, *arguments: str, cwd: Path, fails: int = 0) -> list[str]:
    """The lines that a script prints; warnings are errors, and so is anything that is said beside them."""
    command = [sys.executable, "-W", "error", str(EXAMPLES / script), *arguments]
    env = {name: value for name, value in os.environ.items() if not name.startswith("KVPERSIST_")}
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=env, timeout=110, check=False)
    assert done.returncode == fails, done.stderr
    assert fails or done.stderr == ""
    return done.stdout.splitlines()


CHAT = [
    "Tea with Ada: 0 messages so far",
    "  you:   What is my name?",
    "  agent: I do not know yet.",
    "  you:   My name is Ada.",
    "  agent: Nice to meet you.",
    "Kept: 4 messages. Run it again: it goes on from here.",
]
CHAT_AGAIN = [
    "Tea with Ada: 4 messages so far",
    "  you:   What is my name?",
    "  agent: You are Ada.",
    "  you:   Thank you.",
    "  agent: You have said 4 things so far.",
    "Kept: 8 messages. Run it again: it goes on from here.",
]
STREAMING = [
    *("A whole answer:", "   Let", "    me", "    look.", "   tool_call", "   tool_result"),
    *("   There", "    is", "    green", "    and", "    black", "    tea."),
    *("The reader leaves in the middle of the next one:", "   Let", "    me"),
    "What is kept:",
    "   1 user: Is there tea?",
    "   2 assistant: Let me look. calls look",
    "   3 tool: ['green', 'black']",
    "   4 assistant: There is green and black tea.",
    "   5 user: And coffee? [the stream was left before its end]",
    "   6 assistant: Let me [partial]",
]
APPROVAL = [
    "agent:   I have to delete old.txt for that.",
    "waiting: delete_file {'path': 'old.txt'}",
    "-- the program ends, and is started again",
    "boss:    may it delete_file {'path': 'old.txt'} - yes",
    "-- the program ends, and is started again",
    "agent:   The tool says: old.txt is deleted",
    "kept:    approval_required -> approved -> executing -> completed",
    "by:      boss",
    "files:   ['notes.txt']",
]

PLACES = [(), ("sqlite:///other.db",), ("file:///{cwd}/folder",)]


def place(arguments: tuple[str, ...], cwd: Path) -> list[str]:
    return [argument.replace("/{cwd}", str(cwd)) for argument in arguments]


@pytest.mark.parametrize("arguments", PLACES)
def test_a_chat_goes_on_where_it_was(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    where = place(arguments, tmp_path)

    assert run("persistent_chat.py", *where, cwd=tmp_path) == CHAT
    assert run("persistent_chat.py", *where, cwd=tmp_path) == CHAT_AGAIN


@pytest.mark.parametrize("arguments", PLACES)
def test_a_stream_is_kept_as_far_as_it_came(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    assert run("streaming.py", *place(arguments, tmp_path), cwd=tmp_path) == STREAMING


@pytest.mark.parametrize("arguments", PLACES)
def test_an_approval_survives_a_restart(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    where = place(arguments, tmp_path)

    assert run("tool_calls_and_approval.py", *where, cwd=tmp_path) == APPROVAL
    assert run("tool_calls_and_approval.py", *where, cwd=tmp_path) == APPROVAL


EXPORT = [
    "exported 4 messages to conversation.json",
    "imported 'Tea' for bob",
    "  1 user: Is there tea?",
    "  2 assistant:  look({'place': 'cupboard'}) -> ['green', 'black']",
    "  3 tool: ['green', 'black']",
    "  4 assistant: Green and black.",
]
EVENTS = [
    "the reader follows",
    "  browser got started",
    "  browser got thinking",
    "the connection is lost; the agent goes on",
    "  2 events wait",
    "the reader comes back",
    "  browser got calling a tool",
    "  browser got answering",
    "  browser got finished",
    "  0 events wait",
]


@pytest.mark.parametrize("arguments", [(), ("file:///{cwd}/folder", "sqlite:///other.db")])
def test_a_conversation_moves_by_way_of_a_file(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    where = place(arguments, tmp_path)

    assert run("export_import.py", *where, cwd=tmp_path) == EXPORT
    assert run("export_import.py", *where, cwd=tmp_path) == EXPORT


@pytest.mark.parametrize("arguments", PLACES)
def test_a_reader_of_events_goes_on_where_it_was(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    where = place(arguments, tmp_path)

    assert run("events_resume.py", *where, cwd=tmp_path) == EVENTS
    assert run("events_resume.py", *where, cwd=tmp_path) == EVENTS


def test_backups_rotate_and_can_be_opened(tmp_path: Path) -> None:
    first = run("backup_rotate.py", cwd=tmp_path)
    kept = sorted(path.name for path in (tmp_path / "backups").glob("*.db"))
    second = run("backup_rotate.py", "sqlite:///rotate.db", cwd=tmp_path)

    assert first == ["6 backups, 3 too many or too old", "the newest holds 5 of 6 new messages", "the last is Day 5"]
    assert second == ["9 backups, 6 too many or too old", *first[1:]]
    assert len(kept) == 3
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d-\d\d-\d\d-\d{6}\.db", name) for name in kept)
    assert run("backup_rotate.py", "memory://", cwd=tmp_path, fails=1) == []


def test_what_outlives_the_program_needs_a_store_that_stays(tmp_path: Path) -> None:
    assert run("tool_calls_and_approval.py", "memory://", cwd=tmp_path, fails=1) == []
    assert run("events_resume.py", "memory://", cwd=tmp_path, fails=1) == []


def test_every_script_is_run_here_and_says_how() -> None:
    source = Path(__file__).read_text("utf-8")

    for script in SCRIPTS:
        assert f'run("{script}"' in source, script
        text = (EXAMPLES / script).read_text("utf-8")
        assert re.search(rf"^    python examples/{script}( |$)", text, re.MULTILINE), script
