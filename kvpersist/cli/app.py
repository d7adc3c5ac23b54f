"""The command line: which commands there are, and what an error becomes.

Exit codes: 0 done, 1 failed, 2 wrong usage, 3 not found, 4 cannot connect, 5 conflict, 6 a difference
was found, 130 interrupted. Data goes to stdout, words to stderr. A command's module is imported when
the command is called.
"""

from __future__ import annotations

import asyncio
import os
import shlex
import sys
from collections.abc import Sequence
from io import TextIOWrapper
from typing import Final, TypeGuard

from cyclopts import App, Group, Parameter

import kvpersist
from kvpersist import errors
from kvpersist.cli.render import say
from kvpersist.urls import redact

__all__ = ["app", "exit_code", "run"]

_RECORDS: Final = Group("Conversations", sort_key=1)
_KEYS: Final = Group("Raw keys", sort_key=2)
_STORES: Final = Group("Stores", sort_key=3)
_SETTINGS: Final = Group("Settings", sort_key=4)


def _shown_default(value: object) -> str | None:
    """What help says of a default; nothing where there is none, of a flag, or of a text that is empty."""
    return None if value is None or value is False or value == "" else str(value)


app = App(
    name="kvpersist",
    help="Everything an agent says, calls and makes, kept in any store and found again.",
    help_epilogue=(
        "The store is --url, or KVPERSIST_URL, or kvpersist.toml, or a SQLite file in your data folder; "
        "`kvpersist config --origins` says which."
    ),
    version=kvpersist.__version__,
    default_parameter=Parameter(negative="", show_default=_shown_default),
    result_action="return_value",
    suppress_keyboard_interrupt=False,
    error_formatter=lambda error: f"{error}\n  --help tells more",
)

for name, arguments, target, group, help_ in (
    ("demo", "", "chats:demo", _RECORDS, "Put a sample conversation into the store and show it."),
    ("import", "FILE...", "chats:import_", _RECORDS, "Import from files, or from another system."),
    ("sessions", "", "chats:sessions", _RECORDS, "List sessions, newest first."),
    ("timeline", "ID", "chats:timeline", _RECORDS, "Show a session: messages, tool calls, results, errors."),
    ("search", "TEXT", "chats:search", _RECORDS, "Find messages by their text."),
    ("stats", "", "chats:stats", _RECORDS, "Count what the store holds."),
    ("export", "ID", "chats:export", _RECORDS, "Write a session to stdout."),
    ("ls", "[PREFIX]", "keys:ls", _KEYS, "List keys."),
    ("get", "KEY", "keys:get", _KEYS, "Print the value of a key."),
    ("put", "KEY [VALUE]", "keys:put", _KEYS, "Store a value under a key."),
    ("rm", "KEY... | --prefix TEXT", "keys:rm", _KEYS, "Remove keys."),
    ("init", "[URL]", "stores:init", _STORES, "Make what a store needs; what is there stays."),
    ("ddl", "[URL]", "stores:ddl", _STORES, "Print the SQL that makes what a store needs; nothing is run."),
    ("reset", "URL", "stores:reset", _STORES, "Empty a store."),
    ("health", "[URL]", "health:health", _STORES, "Ask a store whether it answers, and can be written."),
    ("conformance", "[URL]", "stores:conformance", _STORES, "Test what a store keeps, beside what it holds."),
    ("drivers", "", "settings:drivers", _SETTINGS, "List the drivers, and what is wrong with them."),
    ("config", "", "settings:config", _SETTINGS, "Show the settings, and where they come from."),
):
    app.command(
        f"kvpersist.cli.{target}",
        name=name,
        group=group,
        help=help_,
        help_epilogue="",
        usage=f"Usage: kvpersist {name} [OPTIONS] {arguments}".rstrip(),
    )

_CODES: Final[tuple[tuple[type[BaseException], int], ...]] = (
    (errors.MalformedRecord, 1),
    (errors.ValueTooLarge, 1),
    (errors.BadRequest, 2),
    (errors.MissingExtra, 2),
    (errors.Unavailable, 4),
    (errors.Conflict, 5),
    (errors.SchemaChanged, 5),
    (errors.ParentGone, 3),
    (FileNotFoundError, 3),
)


def run(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code; errors are told on stderr, in one line each."""
    given = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # a terminal that cannot show a character still gets the rest
            stream.reconfigure(errors="backslashreplace")
    try:
        result = app(_with_whole_help(_global_last(given)))
    except SystemExit as stop:  # cyclopts has told of a usage error already
        if isinstance(stop.__context__, BrokenPipeError):  # rich met it while it printed help
            return _reader_gone()
        return stop.code if isinstance(stop.code, int) else 1
    except (KeyboardInterrupt, asyncio.CancelledError):
        _interrupted(given)
        return 130
    except BrokenPipeError:
        return _reader_gone()
    except Exception as error:  # whatever happened, a user gets a line and a code, not a traceback
        if os.environ.get("KVPERSIST_TRACEBACK"):
            raise
        _tell(error)
        return exit_code(error)
    return result if isinstance(result, int) else 0


def _reader_gone() -> int:
    """The reader went away, as in `| head`; keep the interpreter from flushing into the pipe at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def exit_code(error: BaseException) -> int:
    """The exit code that stands for an error."""
    if _is_absent(error):
        return 3
    return next((code for kind, code in _CODES if isinstance(error, kind)), 1)


def _global_last(argv: list[str]) -> list[str]:
    """Let ``--url`` stand before the command, too: move it behind the command's name."""
    moved: list[str] = []
    rest = argv
    while rest and (rest[0] == "--url" or rest[0].startswith("--url=")):
        cut = 2 if rest[0] == "--url" else 1
        moved, rest = moved + rest[:cut], rest[cut:]
    return rest[:1] + moved + rest[1:] if rest and not rest[0].startswith("-") else rest or moved[:0]


def _with_whole_help(argv: list[str]) -> list[str]:
    """Let a command's own help say what its function does; the line in the list of all is there to load nothing."""
    if {"--help", "-h"} & {*argv} and argv[0] in [*app] and not argv[0].startswith("-"):
        app[argv[0]].help = None
    return argv


def _tell(error: BaseException) -> None:
    while type(error) is ImportError and error.__cause__ is not None:  # cyclopts loading a command's module
        error = error.__cause__
    if isinstance(error, errors.KvError):
        say(f"{error.code} {f'there is no store at {error.where}' if _is_absent(error) else error}", style="red")
        if hint := _next_step(error):
            say(f"  {hint}")
    elif isinstance(error, OSError) and error.filename is not None:
        say(f"{error.filename}: {error.strerror}", style="red")
    else:
        say(f"internal error: {type(error).__name__}: {error}", style="red")
        say("  KVPERSIST_TRACEBACK=1 shows where; please report it")


def _is_absent(error: BaseException) -> TypeGuard[errors.FormatMismatch]:
    return isinstance(error, errors.FormatMismatch) and error.found == "nothing"


def _next_step(error: errors.KvError) -> str:
    """What to do next, where the message itself does not say it."""
    match error:
        case errors.DeadlineExceeded() | errors.Busy():
            return ""
        case errors.Unavailable():
            return "is it the store that is meant, and is it up? try: kvpersist config --origins"
        case errors.UnknownScheme() | errors.BrokenPlugin():
            return "try: kvpersist drivers"
        case errors.FormatMismatch():
            if "kvpersist init" in error.expected:
                return f"it needs {error.expected}"
            if _is_absent(error):
                return "another name? (see: kvpersist config --origins) init, demo, import and put make a new one"
            return "try: kvpersist config --origins"
        case errors.MalformedRecord():
            return "correct it and import again, or leave such records out: --on-error skip"
        case _:
            return ""


def _interrupted(argv: list[str]) -> None:
    say("interrupted")
    if "import" in argv[:3] and "--new" not in argv:
        again = shlex.join(["kvpersist", *(redact(part) for part in argv)])
        say(f"  go on with: {again}")
