"""The tables of the reference name every method with its arguments, every field and every command."""

from __future__ import annotations

import inspect
import re
import runpy
from pathlib import Path
from typing import Any

import pytest

import kvpersist
from kvpersist import (
    Agent,
    AgentStats,
    Bookmark,
    Compression,
    CompressionConfig,
    EventEntry,
    EventQueue,
    HistoryWindow,
    Lease,
    Lock,
    Log,
    Media,
    Message,
    NewEvent,
    Persistence,
    PersistenceMiddleware,
    RecoveredFile,
    Repository,
    Session,
    Snapshot,
    Store,
    StoredAgent,
    StoredStream,
    ThreadManager,
    TimelineItem,
    Todo,
    TodoList,
    ToolCall,
    ToolCallPart,
    WindowStats,
)
from kvpersist.agents.conversations.confirmations import Confirmations
from kvpersist.agents.conversations.messages import Messages
from kvpersist.agents.conversations.sessions import Sessions
from kvpersist.agents.conversations.tool_calls import ToolCalls
from kvpersist.agents.conversations.traces import Traces
from kvpersist.agents.family import Records
from kvpersist.agents.runs.middleware import ThreadHandler
from kvpersist.agents.runs.model_messages import model_messages, system_text
from kvpersist.agents.runs.threads import ThreadContext
from kvpersist.agents.state.agents import Agents
from kvpersist.agents.state.history import Compressions, RecoveredFiles, Windows
from kvpersist.agents.state.media import MediaCache
from kvpersist.agents.state.snapshots import Snapshots
from kvpersist.agents.state.todos import Todos
from kvpersist.agents.workspace.providers import Providers
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
        ("agent-state.md", "db.agents", Agents),
        ("agent-state.md", "db.todos", Todos),
        ("agent-state.md", "db.snapshots", Snapshots),
        ("agent-state.md", "db.windows", Windows),
        ("agent-state.md", "db.windows", Compressions),
        ("agent-state.md", "db.windows", RecoveredFiles),
        ("agent-state.md", "db.windows", MediaCache),
        ("runs.md", "StoredAgent", StoredAgent),
        ("runs.md", "StoredStream", StoredStream),
        ("runs.md", "db.threads", ThreadManager),
        ("runs.md", "ThreadContext", ThreadContext),
        ("runs.md", "PersistenceMiddleware", PersistenceMiddleware),
        ("runs.md", "ThreadHandler", ThreadHandler),
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


@pytest.mark.parametrize(
    "record",
    [
        Agent,
        AgentStats,
        Bookmark,
        Compression,
        CompressionConfig,
        HistoryWindow,
        Media,
        RecoveredFile,
        Snapshot,
        Todo,
        TodoList,
        WindowStats,
    ],
)
def test_every_field_of_an_agents_state_is_named(record: Any) -> None:
    text = (REFERENCE / "agent-state.md").read_text("utf-8")
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


def test_every_setting_of_a_stored_agent_is_named() -> None:
    cells = first_cells("runs.md").partition("`run(")[0]

    assert re.findall(r"`(\w+)`", cells) == list(inspect.signature(kvpersist.with_storage).parameters)[2:]


@pytest.mark.parametrize(
    "function", [kvpersist.continue_thread, kvpersist.stream_continue_thread, model_messages, system_text]
)
def test_every_function_round_a_run_is_named_with_its_arguments(function: Any) -> None:
    named = shown(first_cells("runs.md", "Functions"))

    assert named[function.__name__] == list(inspect.signature(function).parameters)


def test_every_setting_of_the_middleware_is_named() -> None:
    [arguments] = re.findall(r"`PersistenceMiddleware\((.*?)\)`\.", (REFERENCE / "runs.md").read_text("utf-8"))

    assert re.findall(r"(\w+)(?:=[^,]+)?(?:, |$)", arguments) == [*inspect.signature(PersistenceMiddleware).parameters]


def test_every_command_is_listed() -> None:
    pytest.importorskip("cyclopts")
    from kvpersist.cli.app import app

    listed = re.findall(r"^\| `kvpersist (\w+)", (REFERENCE / "command-line.md").read_text("utf-8"), re.MULTILINE)

    assert sorted(listed) == sorted(name for name in app if not name.startswith("-"))


def test_every_test_that_the_guarantees_name_exists() -> None:
    text = (ROOT / "docs" / "explanation" / "guarantees.md").read_text("utf-8")
    named = re.findall(r"`(test_\w+)`", text)
    sources = [*(ROOT / "tests").rglob("test_*.py"), *(ROOT / "kvpersist" / "testing").rglob("*.py")]
    there = set(re.findall(r"def (test_\w+)", "".join(path.read_text("utf-8") for path in sources)))

    assert len(named) > 20
    assert sorted(set(named) - there) == []


def test_every_page_can_be_reached_from_the_index() -> None:
    text = (ROOT / "docs" / "index.md").read_text("utf-8")
    pages = {str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md")} - {"index.md"}

    assert sorted(page for page in pages if page not in text and not page.startswith("decisions/")) == []


def test_the_page_of_the_configuration_is_what_the_code_says() -> None:
    made = runpy.run_path(str(ROOT / "tests" / "docs" / "make_configuration.py"))
    text = (REFERENCE / "configuration.md").read_text("utf-8")

    assert text == made["page"](text), "run: python tests/docs/make_configuration.py"


def test_every_variable_that_the_library_reads_is_on_the_page_of_the_configuration() -> None:
    text = (REFERENCE / "configuration.md").read_text("utf-8")
    sources = [path for path in (ROOT / "kvpersist").rglob("*.py") if "testing" not in path.parts]
    read = set(re.findall(r"KVPERSIST_[A-Z_]+", "".join(path.read_text("utf-8") for path in sources)))

    assert sorted(name for name in read if f"`{name}`" not in text) == []


def test_every_option_on_the_page_of_the_configuration_has_a_meaning() -> None:
    rows = re.findall(r"^\| `.*\|$", (REFERENCE / "configuration.md").read_text("utf-8"), re.MULTILINE)

    assert len(rows) > 100
    assert [row for row in rows if row.rstrip("| ").endswith(("none", "`")) and row.count("|") < 4] == []
    assert [row for row in rows if row.endswith("|  |")] == []
