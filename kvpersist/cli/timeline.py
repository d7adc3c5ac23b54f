"""A session as people read it: who said what and when, each call with its result under it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime
from typing import Any, Final, cast

import msgspec
from msgspec import Struct

from kvpersist.agents.records import Session, TimelineItem, ToolCall
from kvpersist.cli.render import clean, console, counted, duration, is_terminal, one_line, write

__all__ = ["content_text", "print_timeline"]

_SHORT: Final = 280  # characters of a result or a system text on a terminal
_STYLES: Final = {"system": "dim", "developer": "dim", "user": "bold green", "assistant": "bold blue", "tool": "yellow"}


class _Line(Struct):
    """One entry: a text said, a call, a result or an error."""

    kind: str  # said, call, result, error, note
    text: str
    aside: str = ""


def print_timeline(session: Session, items: Sequence[TimelineItem], *, full: bool) -> None:
    """Print to stdout; on a terminal with colours, and long results cut unless ``full``."""
    show = _print_rich if is_terminal() else _print_plain
    show(session, items, full)


def content_text(content: Any) -> str:
    """What a message's content says, as one text; blocks that are no text by their type's name."""
    if isinstance(content, str):
        return content
    if content is None:
        return ""
    if not isinstance(content, list):
        return msgspec.json.encode(content).decode()
    return "\n".join(_block_text(block) for block in cast(list[Any], content))


def _block_text(block: Any) -> str:
    if not isinstance(block, dict):
        return content_text(block)
    item = cast("dict[str, Any]", block)
    text = item.get("text")
    return text if isinstance(text, str) else f"[{item.get('type', 'block')}]"


def _print_plain(session: Session, items: Sequence[TimelineItem], full: bool) -> None:
    del full  # a pipe gets everything
    signs = {"said": "", "call": "> ", "result": "  < ", "error": "  ! ", "note": "  "}
    write(f"{one_line(_title(session))}\n{_summary(session, items)}\n")
    day = _day(items[0]) if items else ""
    for item, lines in _entries(items):
        if day != (day := _day(item)):
            write(f"{day}\n")
        head = f"{_at(item):8}  {item.message.role:9}  "
        for line in lines:
            sign = signs[line.kind]
            aside = f"  ({line.aside})" if line.aside else ""
            first, *rest = (clean(line.text) + aside).split("\n")
            write(f"{head}{sign}{first}".rstrip() + "\n")
            head = " " * len(head)
            write("".join(f"{head}{' ' * len(sign)}{text}".rstrip() + "\n" for text in rest))


def _print_rich(session: Session, items: Sequence[TimelineItem], full: bool) -> None:
    from rich.console import Group
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    out = console()
    out.print()
    out.print(Text(one_line(_title(session)), style="bold"))
    out.print(Text(_summary(session, items), style="dim"))
    out.print()
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(no_wrap=True, style="dim")
    grid.add_column(no_wrap=True)
    grid.add_column(ratio=1, overflow="fold")
    day = _day(items[0]) if items else ""
    for item, lines in _entries(items):
        if day != (day := _day(item)):
            grid.add_row(Padding(Text(day, style="bold"), (0, 0, 1, 0)))
        role = item.message.role
        parts: list[Any] = []
        for line in lines:
            cut = not full and (line.kind in ("result", "error") or role in ("system", "developer"))
            text = one_line(line.text, _SHORT) if cut else clean(line.text)
            if line.kind == "said":
                parts.append(Text(text, style="dim" if role in ("system", "developer") else ""))
            elif line.kind == "call":
                name, bracket, rest = text.partition("(")
                call = Text.assemble(("⚙ ", "yellow"), (name, "yellow"), bracket, rest)
                parts.append(call.append(f"  {line.aside}" if line.aside else "", "dim"))
            else:
                sign, style = {"result": ("→ ", "dim"), "error": ("✗ ", "red"), "note": ("… ", "dim")}[line.kind]
                parts.append(Padding(Text(sign + text, style=style), (0, 0, 0, 2)))
        grid.add_row(_at(item), Text(role, style=_STYLES.get(role, "")), Padding(Group(*parts), (0, 0, 1, 0)))
    out.print(grid)


def _entries(items: Iterable[TimelineItem]) -> Iterator[tuple[TimelineItem, list[_Line]]]:
    """A message and the lines under it; an answer stands under its call, so its message is left out."""
    shown: set[int] = set()
    for item in items:
        if item.number in shown:
            continue
        lines: list[_Line] = []
        if text := content_text(item.message.content):
            kind = "said" if item.message.role != "tool" else "error" if item.message.is_error else "result"
            lines.append(_Line(kind, text))
        for call in item.tool_calls:
            lines += _call_lines(call)
            if call.result_number is not None:
                shown.add(call.result_number)
        yield item, lines or [_Line("note", "(empty)")]


def _call_lines(call: ToolCall) -> list[_Line]:
    took = call.duration
    # Imported without times, call and result were stored in the same instant: that is no duration.
    lines = [_Line("call", _call_text(call), duration(took) if took else "")]
    if call.state == "pending":
        return [*lines, _Line("note", "no result")]
    return [*lines, _Line("error" if call.is_error else "result", content_text(call.result) or "(empty)")]


def _call_text(call: ToolCall) -> str:
    """``name(key=value, ...)``; arguments that are no JSON object stand as they are."""
    arguments = call.arguments
    parsed = arguments
    if isinstance(arguments, str):
        try:
            parsed = msgspec.json.decode(arguments)
        except (msgspec.DecodeError, UnicodeError, RecursionError):
            parsed = None
    if isinstance(parsed, dict):
        pairs = cast("dict[str, Any]", parsed).items()
        return f"{call.name}({', '.join(f'{key}={msgspec.json.encode(value).decode()}' for key, value in pairs)})"
    return f"{call.name}({'' if arguments is None else arguments})"


def _title(session: Session) -> str:
    return session.title or "(no title)"


def _summary(session: Session, items: Sequence[TimelineItem]) -> str:
    """The id alone in its line, so that it can be copied; below it what there is."""
    calls = [call for item in items for call in item.tool_calls]
    failed = sum(1 for call in calls if call.is_error)
    parts = [f"user {one_line(session.user_id)}"] if session.user_id else []
    parts.append(counted(len(items), "message"))
    if calls:
        parts.append(counted(len(calls), "tool call") + (f", {failed} failed" if failed else ""))
    if items:
        span = (items[-1].at - items[0].at).total_seconds()
        parts.append(f"{_local(items[0].at):%Y-%m-%d %Z}" + (f", {duration(span)}" if span >= 1 else ""))
    return f"{session.id}\n{' · '.join(parts)}"


def _day(item: TimelineItem) -> str:
    return f"{_local(item.at):%m-%d}"  # the year stands in the summary


def _at(item: TimelineItem) -> str:
    return f"{_local(item.at):%H:%M:%S}"


def _local(when: datetime) -> datetime:
    return when.astimezone()
