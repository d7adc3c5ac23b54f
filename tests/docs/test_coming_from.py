"""The pages for people who come from elsewhere: no name they may look for is missing, and their scripts run."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
from functools import cache, reduce
from pathlib import Path
from typing import Any

import pytest

import kvpersist
from kvpersist import PersistenceMiddleware, registry, urls
from kvpersist.agents.runs.middleware import ThreadHandler
from kvpersist.agents.runs.runs import StoredAgent
from kvpersist.agents.runs.threads import ThreadContext
from kvpersist.ops.importers import SYSTEMS as IMPORTED

ROOT = Path(__file__).resolve().parents[2]
PAGES = ROOT / "docs" / "coming-from"
THEIRS = Path(__file__).parent / "theirs"
SYSTEMS = sorted(path.stem for path in THEIRS.glob("*.txt"))
REAL = ROOT.parent / "shared" / "data" / "tau-airline-gpt4o.json"

NAMED = {  # what stands on a page without ``db.`` before it
    "persist_message": PersistenceMiddleware,
    "persist_trace": PersistenceMiddleware,
    "ensure_thread": PersistenceMiddleware,
    "get_thread_messages": PersistenceMiddleware,
    "get_thread_traces": PersistenceMiddleware,
    "handler": PersistenceMiddleware,
    "on_user_message": ThreadHandler,
    "run": StoredAgent,
    "to_llm_messages": ThreadContext,
    "summary": ThreadContext,
}


@cache
def sections(system: str) -> dict[str, list[str]]:
    """What users of a system may look for, in its spelling: operations, and names that are none."""
    found: dict[str, list[str]] = {}
    names: list[str] = []
    for line in (THEIRS / f"{system}.txt").read_text("utf-8").splitlines():
        if heading := re.fullmatch(r"\[(\w+)\]", line):
            names = found[heading[1]] = []
        elif line and not line.startswith("# "):
            names.append(line)
    return found


def page(system: str) -> str:
    return (PAGES / f"{system}.md").read_text("utf-8")


def script(system: str) -> Path:
    return PAGES / f"{system.replace('-', '_')}.py"


def run(system: str, *arguments: str, cwd: Path) -> list[str]:
    """The lines that a script prints."""
    return python(str(script(system)), *arguments, cwd=cwd)


def python(*arguments: str, cwd: Path) -> list[str]:
    """The lines that a program prints; warnings are errors."""
    command = [sys.executable, "-W", "error", *arguments]
    env = {name: value for name, value in os.environ.items() if not name.startswith("KVPERSIST_")}
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=env, timeout=110, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.splitlines()


def lines(code: str) -> list[str]:
    return [line.strip() for line in code.splitlines() if line.strip()]


def prose(system: str) -> str:
    """The page without its blocks of code."""
    return re.sub(r"^ *```.+?```", "", page(system), flags=re.MULTILINE | re.DOTALL)


def performed(printed: list[str]) -> list[str]:
    return [name for line in printed if line.startswith("  ") for name in line.split()]


@pytest.mark.parametrize("system", SYSTEMS)
def test_every_name_of_the_system_stands_on_its_page(system: str) -> None:
    text = page(system)

    def stands(name: str) -> bool:
        return re.search(rf"(?<!\w){re.escape(name)}(?!\w)", text) is not None

    operations, *others = sections(system).values()
    missing = [name for name in operations if not stands(name) and not stands(name.partition(".")[2] or name)]
    missing += [name for names in others for name in names if not stands(name)]

    assert not missing


@pytest.mark.parametrize("system", SYSTEMS)
@pytest.mark.parametrize("where", ["memory://", "sqlite:///talks.db"])
def test_the_script_of_a_page_performs_every_operation_in_order(system: str, where: str, tmp_path: Path) -> None:
    listed = sections(system)
    data = ("--data", str(REAL)) if REAL.exists() else ()

    printed = run(system, where, *data, cwd=tmp_path)

    names = performed(printed)
    assert [name for name in names if name in listed["operations"]] == listed["operations"]
    assert set(names) <= {name for names in listed.values() for name in names}
    if data:
        assert printed[0] == "conversations new here: 200, messages: 5308"


def test_a_script_runs_again_on_the_same_store_of_files(tmp_path: Path) -> None:
    where = f"file://{tmp_path}/folder?kv.durability=normal"

    first, second = [run("kode", where, cwd=tmp_path) for _ in range(2)]

    assert performed(first) == performed(second)
    assert (first[0], second[0]) == (
        "conversations new here: 1, messages: 16",
        "conversations new here: 0, messages: 0",
    )


@pytest.mark.parametrize("system", SYSTEMS)
def test_a_script_performs_the_same_where_batches_are_not_atomic(system: str, tmp_path: Path) -> None:
    ordered = f"""
import asyncio, runpy, sys
sys.path.insert(0, {str(PAGES)!r})
import steps
from kvpersist.testing.faults import FaultyDriver
from kvpersist_drivers.memory import MemoryDriver
runpy.run_path({str(script(system))!r})
driver = FaultyDriver(MemoryDriver(), without={{"atomic_batch", "reverse", "deref"}})
asyncio.run(steps.perform("it", driver))
"""

    printed = python("-c", ordered, cwd=tmp_path)

    assert performed(printed) == performed(run(system, cwd=tmp_path))


@pytest.mark.parametrize("system", SYSTEMS)
def test_each_moving_step_says_what_was_before_and_what_comes_after(system: str) -> None:
    moving = page(system).partition("## Moving, step by step")[2].partition("\n[`")[0]
    steps = re.split(r"^\d\. ", moving, flags=re.MULTILINE)

    assert len(steps) == 6 and not steps[0].strip()
    for step in steps[1:-1] if system == "seashore" else steps[1:]:  # there, the last one removes what was before
        assert re.search(r"before:.+after:\n", step, re.DOTALL), step


@pytest.mark.parametrize("system", SYSTEMS)
def test_what_the_moving_steps_show_stands_in_the_script(system: str) -> None:
    blocks = re.findall(r"^ *```py\n(.+?)^ *```", page(system), re.MULTILINE | re.DOTALL)
    shown = [line for block in blocks for line in lines(block)]
    commands = re.findall(r"^ *kvpersist import ([\w-]+):", page(system), re.MULTILINE)

    assert len(shown) > 4
    assert [line for line in shown if line not in lines(script(system).read_text("utf-8"))] == []
    assert commands and set(commands) <= set(IMPORTED)


@pytest.mark.parametrize("system", SYSTEMS)
async def test_what_a_page_names_of_ours_exists_and_takes_the_arguments_it_names(system: str) -> None:
    calls = re.findall(r"(?:\bdb\.([\w.]+)|`\.?(\w+))\(((?:[^()]|\([^()]*\))*)\)", prose(system))
    used = set(re.findall(r"(\w+)=|\"(\w+)\":", script(system).read_text("utf-8")))
    conditions = {name for names in used for name in names}

    async with kvpersist.open("memory://") as db:
        for path, name, arguments in calls:
            owner: Any = db if path else NAMED.get(name) or kvpersist
            if not path and not hasattr(owner, name):
                continue  # one of theirs
            called = reduce(getattr, (path or name).split("."), owner)
            taken = inspect.signature(called).parameters
            open_ended = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in taken.values())
            named = set(re.findall(r"(\w+)=", re.sub(r"\([^()]*\)|\{[^{}]*\}", "", arguments)))
            assert named - set(taken) - (conditions if open_ended else set()) == set(), path or name

    assert len([path for path, *_ in calls if path]) > 20


@pytest.mark.parametrize("system", SYSTEMS)
def test_every_url_of_ours_on_a_page_is_understood(system: str) -> None:
    found = re.findall(r"[`\"]((\w+)://[^`\"\s…]*)[`\"]", prose(system))

    ours = [url for url, scheme in found if scheme in registry.schemes()]
    for url in ours:
        urls.parse(url)

    assert ours


def test_each_page_belongs_to_a_system_whose_names_are_listed() -> None:
    assert sorted(path.stem for path in PAGES.glob("*.md")) == SYSTEMS
    assert sorted(path.name for path in PAGES.glob("*.py")) == sorted(
        ["steps.py", *(script(system).name for system in SYSTEMS)]
    )
    for system in SYSTEMS:
        assert f"]({script(system).name})" in page(system)
