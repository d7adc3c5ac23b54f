"""`kvpersist import SYSTEM:WHERE`: what other systems keep, brought over and compared."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Final, Literal

import msgspec

import kvpersist
from kvpersist.agents.persistence import Persistence
from kvpersist.cli.options import StoreOption
from kvpersist.cli.render import counted, progress_bar, say
from kvpersist.errors import BadOption, FormatMismatch
from kvpersist.ops.importers import Source, SystemImport, import_from, names_system, open_source
from kvpersist.urls import redact

__all__ = ["import_system", "is_system", "looked_into", "plain_system_import", "refuse_url"]

_SHOWN: Final = 50  # problems that are told one by one


def is_system(text: str) -> bool:
    """Whether an argument names a system and a place, rather than a file that is there."""
    return names_system(text) and not os.path.exists(text)


def refuse_url(text: str) -> None:
    """Raise BadOption for a URL without a system: as a file that is not there, it would be shown with its password."""
    if "://" in text and not names_system(text) and not os.path.exists(text):
        raise BadOption("FILE", f"{redact(text)} is a URL: write of which system before it, as in prisma:URL")


async def import_system(
    db: Persistence,
    text: str,
    *,
    user: str | None,
    dry_run: bool,
    files: str | None,
    secrets: str | None,
    on_error: Literal["stop", "skip"],
) -> SystemImport:
    """Import ``SYSTEM:WHERE`` and tell what came of it."""
    options = {} if files is None else {"files": files}
    async with await open_source(text, **options) as source:
        with progress_bar(source.shown) as progress:
            report = await import_from(
                db, source, user=user, secrets=secrets, dry_run=dry_run, on_error=on_error, progress=progress
            )
    _tell(report, source)
    return report


@asynccontextmanager
async def looked_into(store: StoreOption) -> AsyncIterator[Persistence]:
    """The store to compare with; one that is not there is not made, and holds nothing."""
    try:
        db = await kvpersist.open(store.existing())
    except FormatMismatch as error:
        if error.found != "nothing":
            raise
        db = await kvpersist.open("memory://")
    async with db:
        yield db


def plain_system_import(report: SystemImport) -> dict[str, Any]:
    """A report as JSON has it."""
    return {**msgspec.to_builtins(report), "whole": report.whole}


def _tell(report: SystemImport, source: Source) -> None:
    for problem in report.problems[:_SHOWN]:
        style = "yellow" if problem.left_out else ""
        say(f"{'left out' if problem.left_out else 'note'}: {problem.place}: {problem.reason}", style=style)
    if len(report.problems) > _SHOWN:
        say(f"... and {len(report.problems) - _SHOWN:,} more; --json has them all")
    verb = "would be imported" if report.dry_run else "imported"
    parts = [f"{counted(report.sessions, 'session')} with {counted(report.messages, 'message')} {verb}"]
    parts += [f"{count:,} {kind.replace('_', ' ')}" for kind, count in report.records.items()]
    for count, what in (
        (report.events, "events"),
        (report.consumers, "consumers"),
        (report.completed, "sessions completed"),
        (report.present + report.records_present, "already there"),
        (len(report.differing), "different here: left as they are"),
        (sum(problem.left_out for problem in report.problems), "left out"),
    ):
        if count:
            parts.append(f"{count:,} {what}")
    say(f"{source.system} {source.shown}: {', '.join(parts)}")
    if (found := report.verified) is None:
        return
    equal = len(found.sessions) - len(found.different)
    say(f"compared: {equal:,} of {counted(len(found.sessions), 'session')} equal, by count and digest of the messages")
    for id_ in found.different[:_SHOWN]:
        say(f"  different: session {id_}", style="red")
    for place in found.missing_records[:_SHOWN]:
        say(f"  missing: {place}", style="red")
