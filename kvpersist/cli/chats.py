"""Conversations: demo, import, sessions, timeline, search, stats, export."""

from __future__ import annotations

import asyncio
import shlex
from collections.abc import AsyncIterator, Sequence
from datetime import UTC, datetime
from importlib.resources import as_file, files
from io import BytesIO
from typing import Annotated, Any, Final, Literal

import msgspec
from cyclopts import Parameter

import kvpersist
from kvpersist.agents.persistence import Persistence
from kvpersist.agents.records import Message, Session, SessionStat, TimelineItem
from kvpersist.cli.options import FOR_PEOPLE, USUAL_STORE, Count, Output, StoreOption
from kvpersist.cli.render import (
    ago,
    counted,
    one_line,
    print_items,
    print_json,
    print_rows,
    progress_bar,
    read_stdin,
    say,
    write,
    write_bytes,
)
from kvpersist.cli.systems import import_system, is_system, looked_into, plain_system_import, refuse_url
from kvpersist.cli.timeline import content_text, print_timeline
from kvpersist.errors import BadOption, CorruptRecord
from kvpersist.ops.chat_export import ExportFormat, export_session
from kvpersist.ops.chat_formats import ChatFormat
from kvpersist.ops.chat_import import ImportReport, import_chats
from kvpersist.ops.importers import SystemImport
from kvpersist.urls import redact

__all__ = ["demo", "export", "import_", "search", "sessions", "stats", "timeline"]

_DEMO_USER: Final = "demo"
_PAGE: Final = 500  # messages of a timeline read at once


async def demo(*, store: StoreOption = USUAL_STORE) -> int:
    """Put a sample conversation into the store and show its timeline; a second run only shows it."""
    async with kvpersist.open(store.meant) as db:
        with as_file(files("kvpersist.cli") / "demo.json") as path:
            report = await import_chats(db, path, user=_DEMO_USER)
        assert report.first is not None
        await _show(db, report.first, full=False)
        kept = db.store.capabilities.shared
    if not kept:  # nothing that could be tried next would find it
        return 0
    where = f" --url {shlex.quote(redact(store.url))}" if store.url else ""
    if not where and store.profile:
        where = f" --profile {shlex.quote(store.profile)}"
    say("Try next:")
    say(f"  kvpersist sessions{where}")
    say(f"  kvpersist search depot{where}")
    say(f"  kvpersist export {report.first}{where} > late-parcel.json")
    return 0


async def import_(
    *paths: Annotated[str, Parameter(name="FILE", allow_leading_hyphen=True)],  # for "-"
    format: ChatFormat = "auto",
    user: str | None = None,
    new: bool = False,
    on_error: Literal["stop", "skip"] | None = None,
    dry_run: bool = False,
    files: str | None = None,
    secrets: str | None = None,
    store: StoreOption = USUAL_STORE,
    output: Output = FOR_PEOPLE,
) -> int:
    """Import conversations from files, or all that another system keeps; what is there already is not imported again.

    Args:
        paths: files of conversations, '-' for stdin; or SYSTEM:WHERE, as in agentx:./agentx.db,
            kode:./store, prisma:postgresql://host/db, seashore:URL, langgraph:FILE, openai-agents:FILE.
        format: what files hold; auto looks into each.
        user: who the sessions belong to; default: whom the file names.
        new: of files, make copies with new ids, whatever is there.
        on_error: stop at a record that cannot be imported (files do), or skip it and say so (systems do).
        dry_run: of a system, write nothing, and say what would be imported.
        files: of kode, the folder of the files beside its tables.
        secrets: of agentx, keys in clear: encrypt, or env:NAME to refer to a variable; default: left out.
        store: which store.
        output: in which form.
    """
    if not paths:
        raise BadOption("FILE", "name at least one file, or '-' for stdin")
    for path in paths:
        if path.startswith("-") and path != "-":
            raise BadOption(path, "there is no such option; a file of that name is ./" + path)
        refuse_url(path)
    systems = [path for path in paths if is_system(path)]
    only_files = {"format": format != "auto", "new": new}
    only_systems = {"dry-run": dry_run, "files": files is not None, "secrets": secrets is not None}
    for options, others, what in (
        (only_files, systems, "SYSTEM:WHERE"),
        (only_systems, len(systems) < len(paths), "files"),
    ):
        for name, is_given in options.items():
            if is_given and others:
                raise BadOption(f"--{name}", f"it is not for {what}: leave it out, or import them apart")
    given = read_stdin() if "-" in paths else b""
    reports: list[ImportReport | SystemImport] = []
    async with looked_into(store) if dry_run else kvpersist.open(store.meant) as db:
        for path in paths:
            if path in systems:
                skips = on_error or "skip"
                asked: dict[str, Any] = {
                    "user": user,
                    "dry_run": dry_run,
                    "files": files,
                    "secrets": secrets,
                    "on_error": skips,
                }
                reports.append(await import_system(db, path, **asked))
                continue
            with progress_bar(path) as progress:
                source = BytesIO(given) if path == "-" else path
                report = await import_chats(
                    db, source, format=format, user=user, new=new, on_error=on_error or "stop", progress=progress
                )
            reports.append(report)
            _tell_import(report)
    if output.json or output.jsonl:
        for value in map(_plain_report, reports) if output.jsonl else [[_plain_report(one) for one in reports]]:
            print_json(value, compact=output.jsonl)
    whole = all(report.whole for report in reports if isinstance(report, SystemImport))
    return 0 if whole or dry_run or on_error == "skip" else 6


async def sessions(
    *,
    user: str | None = None,
    limit: Count = 20,
    all: bool = False,
    store: StoreOption = USUAL_STORE,
    output: Output = FOR_PEOPLE,
) -> int:
    """List sessions, newest first.

    Args:
        user: only those of this user.
        limit: at most so many.
        all: all of them, however many there are.
        store: which store.
        output: in which form.
    """
    async with kvpersist.open(store.existing()) as db:
        rows = _sessions(db, user, None if all else limit)
        if output.json or output.jsonl:
            await print_items((_plain_session(session, stat) async for session, stat in rows), output)
            return 0
        found = [row async for row in rows]
        if not found:
            say("no sessions here yet; try: kvpersist demo" if user is None else f"no sessions of user {user!r}")
            return 0
        titles = await asyncio.gather(*(_title(db, session) for session, _ in found))
    now = datetime.now(UTC)
    print_rows(
        ("id", "title", "user", "messages", "calls", "failed", "updated"),
        [
            (
                session.id,
                one_line(title, 60),
                session.user_id or "-",
                str(stat.messages),
                str(stat.tool_calls),
                str(sum(tool.failed for tool in stat.tools.values())),
                ago(stat.updated_at, now),
            )
            for (session, stat), title in zip(found, titles, strict=True)
        ],
        cut="title",
        right=("messages", "calls", "failed"),
        spare=("user", "calls", "failed", "messages"),
    )
    return 0


async def timeline(
    session_id: Annotated[str, Parameter(name="ID")],
    /,
    *,
    full: bool = False,
    store: StoreOption = USUAL_STORE,
    output: Output = FOR_PEOPLE,
) -> int:
    """Show a session: messages, tool calls, results, errors.

    Args:
        session_id: the session.
        full: cut nothing on a terminal; a pipe gets everything anyway.
        store: which store.
        output: in which form.
    """
    async with kvpersist.open(store.existing()) as db:
        if output.json or output.jsonl:
            session = await db.sessions.get(session_id)
            if session is None:
                return _no_session(session_id)
            damage = _Damage()
            if output.json:
                print_json({"session": session, "items": [item async for item in _timeline(db, session_id, damage)]})
            else:
                await print_items(_timeline(db, session_id, damage), output)
            return damage.code
        return await _show(db, session_id, full=full)


async def search(
    text: str,
    /,
    *,
    user: str | None = None,
    session: str | None = None,
    limit: Count = 20,
    scan: int = 10_000,
    store: StoreOption = USUAL_STORE,
    output: Output = FOR_PEOPLE,
) -> int:
    """Find messages by their text, in any case.

    Args:
        text: what to look for.
        user: only in sessions of this user.
        session: only in this session.
        limit: at most so many.
        scan: read at most so many messages, the newest sessions first.
        store: which store.
        output: in which form.
    """
    async with kvpersist.open(store.existing()) as db:
        damage = _Damage()
        found = await db.messages.search(
            text, user_id=user, session_id=session, limit=limit, scanned=scan, on_corrupt=damage
        )
    if output.json or output.jsonl:
        for value in found if output.jsonl else [found]:
            print_json(value, compact=output.jsonl)
        return damage.code
    if not found:
        say(f"nothing found for {text!r}")
        return damage.code
    print_rows(
        ("session", "number", "role", "text"),
        [(hit.session_id, str(hit.number), hit.role, _around(hit, text)) for hit in found],
        cut="text",
        right=("number",),
        spare=("role",),
    )
    return damage.code


async def stats(*, store: StoreOption = USUAL_STORE, output: Output = FOR_PEOPLE) -> int:
    """Count what the store holds, without reading contents."""
    async with kvpersist.open(store.existing()) as db:
        total = await db.stats()
    if output.json or output.jsonl:
        print_json(msgspec.to_builtins(total), compact=output.jsonl)
        return 0
    rows: list[tuple[str, str]] = [
        ("sessions", f"{total.sessions:,}"),
        ("messages", f"{total.messages:,}"),
        *((f"  {one_line(role)}", f"{count:,}") for role, count in _most_first(total.messages_by_role)),
        ("tool calls", f"{total.tool_calls:,}"),
        *((f"  {one_line(name)}", f"{count:,}") for name, count in _most_first(total.tool_calls_by_name)),
        ("tool errors", f"{total.tool_errors:,}"),
    ]
    width = max(len(name) for name, _ in rows) + 2
    numbers = max(len(number) for _, number in rows)
    for name, number in rows:
        write(f"{name:{width}}{number:>{numbers}}\n")
    return 0


async def export(
    session_id: Annotated[str, Parameter(name="ID")],
    /,
    *,
    format: ExportFormat | None = None,
    store: StoreOption = USUAL_STORE,
    output: Output = FOR_PEOPLE,
) -> int:
    """Write a session to stdout, in a form that `kvpersist import` reads.

    Args:
        session_id: the session.
        format: kvpersist holds everything; openai and jsonl are for other tools (--jsonl means the latter).
        store: which store.
        output: in which form.
    """
    chosen: ExportFormat = format or ("jsonl" if output.jsonl else "kvpersist")
    async with kvpersist.open(store.existing()) as db:
        data = await export_session(db, session_id, chosen)
    if data is None:
        return _no_session(session_id)
    write_bytes(data)
    return 0


async def _show(db: Persistence, session_id: str, *, full: bool) -> int:
    session = await db.sessions.get(session_id)
    if session is None:
        return _no_session(session_id)
    damage = _Damage()
    items = [item async for item in _timeline(db, session_id, damage)]
    title = await _title(db, session)
    print_timeline(msgspec.structs.replace(session, title=one_line(title, 100)), items, full=full)
    return damage.code


class _Damage:
    """Tells of damaged records, which are left out, and remembers that there were any."""

    def __init__(self) -> None:
        self.code = 0

    def __call__(self, error: CorruptRecord) -> None:
        self.code = 1
        say(f"{error.code} left out: {error}", style="red")


async def _timeline(db: Persistence, session_id: str, damage: _Damage) -> AsyncIterator[TimelineItem]:
    after = 0
    while page := await db.timeline(session_id, after=after, limit=_PAGE, on_corrupt=damage):
        for item in page:
            yield item
        after = page[-1].number


def _passed_over(error: CorruptRecord) -> None:
    """A title is made of what can be read; `timeline` tells of the rest."""


def _no_session(session_id: str) -> int:
    say(f"no such session: {session_id}", style="red")
    say("  try: kvpersist sessions")
    return 3


async def _sessions(db: Persistence, user: str | None, limit: int | None) -> AsyncIterator[tuple[Session, SessionStat]]:
    found = db.sessions.iterate() if user is None else db.sessions.iterate(user_id=user)
    left = limit
    if left is not None and left <= 0:
        return
    async for session in found:
        stat = await db.sessions.stat(session.id)
        if stat is None:
            continue  # deleted meanwhile
        yield session, stat
        if left is not None:
            left -= 1
            if left == 0:
                return


async def _title(db: Persistence, session: Session) -> str:
    """The session's title, or what its user said first."""
    if session.title:
        return session.title
    for message in await db.messages.range(session.id, limit=3, on_corrupt=_passed_over):
        if message.role == "user":
            return content_text(message.content)
    return "-"


def _around(message: Message, text: str) -> str:
    """The part of the message's text where ``text`` stands."""
    said = one_line(content_text(message.content))
    at = max(0, said.lower().find(text.lower()) - 30)
    return ("…" if at else "") + one_line(said[at:], 100)


def _plain_session(session: Session, stat: SessionStat) -> dict[str, Any]:
    return {
        **{field: getattr(session, field) for field in session.__struct_fields__},
        "messages": stat.messages,
        "tool_calls": stat.tool_calls,
        "failed": sum(tool.failed for tool in stat.tools.values()),
    }


def _plain_report(report: ImportReport | SystemImport) -> dict[str, Any]:
    if isinstance(report, SystemImport):
        return plain_system_import(report)
    skipped = [{"record": one.record, "field": one.field, "reason": one.reason} for one in report.skipped]
    return {**{field: getattr(report, field) for field in report.__struct_fields__}, "skipped": skipped}


def _tell_import(report: ImportReport) -> None:
    for one in report.skipped:
        say(f"{one.code} skipped {one}", style="yellow")
    parts = [f"{counted(report.sessions, 'session')} with {counted(report.messages, 'message')} imported"]
    if report.completed:
        parts.append(f"{report.completed:,} completed")
    if report.present:
        parts.append(f"{report.present:,} already there")
    if report.skipped:
        parts.append(f"{len(report.skipped):,} skipped")
    say(f"{report.source}: {', '.join(parts)}")


def _most_first(counts: dict[str, int]) -> Sequence[tuple[str, int]]:
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))
