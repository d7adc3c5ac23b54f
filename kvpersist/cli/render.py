"""How results look: a table on a terminal, aligned text in a pipe, JSON where it was asked for.

Stored text is data: characters that would steer the terminal are shown, not sent.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import AsyncIterable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import IO, TYPE_CHECKING, Any, Final, TypeAlias

import msgspec

from kvpersist.cli.options import Output
from kvpersist.ops.progress import OnProgress, Progress

if TYPE_CHECKING:
    from rich.console import Console

__all__ = [
    "Row",
    "ago",
    "clean",
    "console",
    "counted",
    "duration",
    "is_terminal",
    "one_line",
    "print_items",
    "print_json",
    "print_rows",
    "progress_bar",
    "read_stdin",
    "say",
    "write",
    "write_bytes",
]

Row: TypeAlias = Sequence[str]

_NARROW: Final = 20  # characters of the column that is shortened, before others are left out
_NARROWEST: Final = 8  # and when there is none left to leave out
# C0 and C1 control characters but tab and newline, and the marks that reorder text on screen.
_STEERING: Final = {
    **{code: 0x2400 + code for code in range(0x20) if code not in (0x09, 0x0A)},
    0x7F: 0x2421,
    **dict.fromkeys((*range(0x80, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A)), 0xFFFD),
}


def clean(text: str) -> str:
    """``text`` without what would steer a terminal: such characters become visible signs."""
    return text.translate(_STEERING)


def one_line(text: str, width: int | None = None) -> str:
    """``text`` clean and in one line, at most ``width`` characters, the last one then an ellipsis."""
    joined = clean(" ".join(text.split()))
    return joined if width is None or len(joined) <= width else joined[: width - 1].rstrip() + "…"


def is_terminal(stream: IO[str] | None = None) -> bool:
    """Whether people look at ``stream`` (default: stdout)."""
    return (stream or sys.stdout).isatty()


def console(*, stderr: bool = False) -> Console:
    """Rich's console for stdout or stderr; it heeds NO_COLOR and FORCE_COLOR."""
    from rich.console import Console

    return Console(stderr=stderr, highlight=False, markup=False, emoji=False, soft_wrap=False)


def write(text: str) -> None:
    """Write data to stdout as it is."""
    sys.stdout.write(text)


def write_bytes(data: bytes) -> None:
    """Write bytes to stdout as they are."""
    sys.stdout.flush()
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()


def read_stdin() -> bytes:
    """Read stdin to its end; Ctrl-C ends the command also while nothing comes."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # asyncio's would wait for the read to end
    try:
        return sys.stdin.buffer.read()
    finally:
        signal.signal(signal.SIGINT, before)


def say(text: str, *, style: str = "") -> None:
    """Tell people something, on stderr."""
    if is_terminal(sys.stderr):
        console(stderr=True).print(clean(text), style=style or None, soft_wrap=True)
    else:
        sys.stderr.write(clean(text) + "\n")


def print_json(value: Any, *, compact: bool = False) -> None:
    """Print one JSON document, indented on a terminal unless ``compact``."""
    encoded = _json(value)
    write((msgspec.json.format(encoded, indent=2) if is_terminal() and not compact else encoded) + "\n")


async def print_items(items: AsyncIterable[Any], output: Output) -> None:
    """Print values as they come: a list (``--json``) or a line each (``--jsonl``)."""
    if output.jsonl:
        async for item in items:
            write(_json(item) + "\n")
        return
    separator = "["
    async for item in items:
        write(f"{separator}\n{_json(item)}")
        separator = ","
    write("[]\n" if separator == "[" else "\n]\n")


def print_rows(
    columns: Sequence[str], rows: Iterable[Row], *, cut: str, right: Sequence[str] = (), spare: Sequence[str] = ()
) -> None:
    """Print a table: fitted to a terminal's width, with a rule and colours; plain and whole in a pipe.

    Args:
        columns: their names.
        rows: a cell per column.
        cut: the column that is shortened where a terminal is narrow; the first is what gets copied.
        right: the columns that hold numbers.
        spare: the columns that are left out, one by one, where a terminal is narrower still.
    """
    cells = [[name if is_terminal() else name.upper() for name in columns]]
    cells += [[one_line(cell) for cell in row] for row in rows]
    if is_terminal():
        _print_table(columns, cells, cut, right, list(spare))
        return
    widths = [max(len(row[n]) for row in cells) for n in range(len(columns))]
    for row in cells:
        fitted = [
            cell.rjust(width) if name in right else cell.ljust(width)
            for name, cell, width in zip(columns, row, widths, strict=True)
        ]
        write("  ".join(fitted).rstrip() + "\n")


def _print_table(
    columns: Sequence[str], cells: Sequence[Row], cut: str, right: Sequence[str], spare: list[str]
) -> None:
    from rich.cells import cell_len, set_cell_size
    from rich.text import Text

    out = console()
    widths = {name: max(cell_len(row[n]) for row in cells) for n, name in enumerate(columns)}
    shown = list(columns)
    while True:
        rest = out.width - sum(widths[name] + 2 for name in shown if name != cut)
        if rest >= min(widths[cut], _NARROW) or not spare:
            break
        shown.remove(spare.pop(0))
    widths[cut] = min(widths[cut], max(rest, _NARROWEST))
    for line, row in enumerate(cells):
        text = Text()
        for name, cell in zip(columns, row, strict=True):
            if name not in shown:
                continue
            width = widths[name]
            fitted = cell if cell_len(cell) <= width else set_cell_size(cell, width - 1) + "…"
            space = " " * (width - cell_len(fitted))
            style = "bold" if line == 0 else "cyan" if name == columns[0] else ""
            text.append(f"{space}{fitted}" if name in right else f"{fitted}{space}", style).append("  ")
        text.rstrip()
        out.print(text, soft_wrap=True)
        if line == 0:
            out.print(Text("─" * (sum(widths[name] + 2 for name in shown) - 2), "dim"), soft_wrap=True)


@contextmanager
def progress_bar(label: str) -> Iterator[OnProgress | None]:
    """A bar on stderr while the block runs; None, and nothing shown, where stderr is no terminal."""
    if not is_terminal(sys.stderr):
        yield None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Bar(*columns, console=console(stderr=True), transient=True) as bar:
        task = bar.add_task(clean(label), total=None)

        def update(progress: Progress) -> None:
            bar.update(task, completed=progress.done, total=progress.total)

        yield update


def duration(seconds: float) -> str:
    """Seconds for people.

    Example:
        >>> [duration(s) for s in (0.0004, 0.25, 12.3, 192, 7500, 200000)]
        ['0.4 ms', '250 ms', '12.3 s', '3 m 12 s', '2 h 5 m', '2 d 7 h']
    """
    if seconds < 0.001:
        return f"{seconds * 1000:.1f} ms"
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    whole = int(seconds)
    for unit, size, lower, small in (("m", 60, "s", 1), ("h", 3600, "m", 60), ("d", 86400, "h", 3600)):
        if whole < size * (60 if unit == "m" else 24) or unit == "d":
            return f"{whole // size} {unit} {whole % size // small} {lower}"
    return ""


def counted(number: int, noun: str) -> str:
    """A number and its noun, as people write it.

    Example:
        >>> counted(1, "message"), counted(5308, "message")
        ('1 message', '5,308 messages')
    """
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def ago(when: datetime | None, now: datetime) -> str:
    """How long ago, roughly: what a list of sessions shows."""
    if when is None:
        return ""
    seconds = (now - when).total_seconds()
    for limit, unit, size in ((60, "s", 1), (3600, "m", 60), (86400, "h", 3600), (30 * 86400, "d", 86400)):
        if seconds < limit:
            return f"{max(0, int(seconds // size))} {unit} ago"
    return when.strftime("%Y-%m-%d")


def _json(value: Any) -> str:
    return msgspec.json.encode(value).decode()
