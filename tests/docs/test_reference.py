"""The tables of the reference name every method with its arguments, every field and every command."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import pytest

import kvpersist
from kvpersist import (
    EventEntry,
    EventQueue,
    Lease,
    Lock,
    Log,
    Message,
    NewEvent,
    Persistence,
    Repository,
    Session,
    Store,
    TimelineItem,
    ToolCall,
    ToolCallPart,
)
from kvpersist.agents.confirmations import Confirmations
from kvpersist.agents.family import Records
from kvpersist.agents.messages import Messages
from kvpersist.agents.providers import Providers
from kvpersist.agents.sessions import Sessions
from kvpersist.agents.tool_calls import ToolCalls
from kvpersist.agents.traces import Traces
from kvpersist.events import Claimed, EventGroup, GroupStats, Lag, Parked, Subscription, TopicStats

ROOT = Path(__file__).parents[2]
REFERENCE = ROOT / "docs" / "reference"


def first_cells(page: str, heading: str = "") -> str:
    """The first cell of every row of a page's tables, or of the part below one heading."""
    text = (REFERENCE / page).read_text("utf-8")
    part = (
        re.search(rf"^## `?{re.escape(heading)}`?$(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
        if heading
        else None
    )
    rows = re.findall(r"^\| (.+?) \|", text if part is None else part[1], re.MULTILINE)
    return "\n".join(rows)


def shown(cells: str) -> dict[str, list[str]]:
    return {
        name: [argument.strip("* ") for argument in arguments.split(",") if argument]
        for name, arguments in re.findall(r"`(\w+)\(([^)`]*)\)`", cells)
    }


@pytest.mark.parametrize(
    ("page", "heading", "type_"),
    [
        ("store.md", "", Store),
        ("repository.md", "", Repository),
        ("log.md", "", Log),
        ("locks.md", "Lock", Lock),
        ("locks.md", "Lease", Lease),
        ("agents.md", "db", Persistence),
        ("agents.md", "db.sessions", Sessions),
        ("agents.md", "db.messages", Messages),
        ("agents.md", "db.tool_calls", ToolCalls),
        ("agents.md", "Records with the usual methods", Records),
        ("agents.md", "db.providers", Providers),
        ("agents.md", "db.traces", Traces),
        ("agents.md", "db.confirmations", Confirmations),
        ("events.md", "EventQueue", EventQueue),
        ("events.md", "Subscription", Subscription),
        ("events.md", "EventGroup", EventGroup),
    ],
)
def test_every_method_stands_in_its_table_with_its_arguments(page: str, heading: str, type_: Any) -> None:
    methods = {name: getattr(type_, name) for name in dir(type_) if not name.startswith("_")}

    assert shown(first_cells(page, heading)) == {
        name: list(inspect.signature(method).parameters)[1:] for name, method in methods.items() if callable(method)
    }


@pytest.mark.parametrize("page", ["store.md", "agents.md"])
def test_every_argument_of_an_open_function_is_named(page: str) -> None:
    function: Any = kvpersist.open_store if page == "store.md" else kvpersist.open
    [arguments] = re.findall(rf"`kvpersist\.{function.__name__}\((.*?)\)`", (REFERENCE / page).read_text("utf-8"))

    assert re.findall(r"(\w+)(?:=[^,]+)?(?:, |$)", arguments) == list(inspect.signature(function).parameters)


@pytest.mark.parametrize("type_", [Repository, kvpersist.Index])
def test_every_argument_of_a_declaration_is_named(type_: Any) -> None:
    named = set(re.findall(r"`(\w+)`", first_cells("repository.md")))

    assert set(inspect.signature(type_).parameters) - {"store"} <= named


@pytest.mark.parametrize(
    "record",
    [
        Session,
        Message,
        ToolCallPart,
        ToolCall,
        TimelineItem,
        kvpersist.Confirmation,
        kvpersist.Trace,
        kvpersist.TokenUsage,
        kvpersist.Container,
        kvpersist.Image,
        kvpersist.Prototype,
        kvpersist.Provider,
        kvpersist.LoginSession,
    ],
)
def test_every_field_of_a_record_is_named(record: Any) -> None:
    text = (REFERENCE / "agents.md").read_text("utf-8")
    [fields] = re.findall(rf"^\| `{record.__name__}` \| ([^:;|]+)", text, re.MULTILINE)

    assert re.findall(r"`(\w+)`", fields) == list(record.__struct_fields__)


@pytest.mark.parametrize("record", [EventEntry, NewEvent, TopicStats, Lag, Claimed, Parked, GroupStats])
def test_every_field_of_what_events_give_is_named(record: Any) -> None:
    text = (REFERENCE / "events.md").read_text("utf-8")
    [fields] = re.findall(rf"^\| `{record.__name__}` \| ([^:;|]+)", text, re.MULTILINE)

    assert re.findall(r"`(\w+)`", fields) == list(record.__struct_fields__)


def test_every_setting_of_an_event_queue_is_named() -> None:
    cells = first_cells("events.md", "Settings")
    named = re.findall(r"`(\w+)`", cells)

    assert named == list(inspect.signature(EventQueue).parameters)[1:]


def test_every_command_is_listed() -> None:
    pytest.importorskip("cyclopts")
    from kvpersist.cli.app import app

    listed = re.findall(r"^\| `kvpersist (\w+)", (REFERENCE / "command-line.md").read_text("utf-8"), re.MULTILINE)

    assert sorted(listed) == sorted(name for name in app if not name.startswith("-"))


def test_every_test_that_the_guarantees_name_exists() -> None:
    text = (ROOT / "docs" / "explanation" / "guarantees.md").read_text("utf-8")
    named = re.findall(r"`(test_\w+)`", text)
    kits = [ROOT / "kvpersist" / "testing" / name for name in ("contract.py", "records.py")]
    sources = [*(ROOT / "tests").rglob("test_*.py"), *kits]
    there = set(re.findall(r"def (test_\w+)", "".join(path.read_text("utf-8") for path in sources)))

    assert len(named) > 20
    assert sorted(set(named) - there) == []


def test_every_page_can_be_reached_from_the_index() -> None:
    text = (ROOT / "docs" / "index.md").read_text("utf-8")
    pages = {str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md")} - {"index.md"}

    assert sorted(page for page in pages if page not in text and not page.startswith("decisions/")) == []
