"""Backups of a SQLite store while it is used, named by the time; old ones go.

    python examples/backup_rotate.py                    # keeps rotate.db here, and backups/ beside it
    python examples/backup_rotate.py sqlite:///agent.db  # of another store

Names are ISO times in UTC, with "-" for ":" and ".", so that they sort by time on any file system.
`prune` keeps the newest, and of these none that is too old. Servers have backups of their own.
"""

from __future__ import annotations

import asyncio
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import kvpersist
from kvpersist import Message
from kvpersist.driver import BacksUp

FOLDER = Path("backups")
KEPT = 3
OLDEST = timedelta(days=30)


def name_of(at: datetime) -> str:
    """A file name: 2026-03-01T02-00-00-000000.db."""
    text = at.astimezone(UTC).replace(tzinfo=None).isoformat(timespec="microseconds")
    return f"{text.replace(':', '-').replace('.', '-')}.db"


def time_of(backup: Path) -> datetime:
    return datetime.strptime(backup.stem, "%Y-%m-%dT%H-%M-%S-%f").replace(tzinfo=UTC)


async def back_up(db: kvpersist.Persistence) -> Path:
    """Copy the store as it is now; others may go on writing meanwhile."""
    if not isinstance(db.store.driver, BacksUp):
        sys.exit("this store has no backup of its own: use that of its server")
    FOLDER.mkdir(exist_ok=True)
    target = FOLDER / name_of(datetime.now(UTC))
    await db.store.driver.backup(str(target))
    return target


def prune(now: datetime) -> int:
    """Remove what is too old, and all but the newest; return how many went."""
    newest_first = sorted(FOLDER.glob("*.db"), reverse=True)
    gone = [each for at, each in enumerate(newest_first) if at >= KEPT or now - time_of(each) > OLDEST]
    for each in gone:
        each.unlink()
        Path(f"{each}-lock").unlink(missing_ok=True)  # of one that was looked into
    return len(gone)


async def main(where: str) -> None:
    async with kvpersist.open(where) as db:
        thread = await db.threads.get_or_create("diary", title="Diary")
        before = await db.messages.count(thread.id)
        for day in range(1, 6):
            await db.messages.append(thread.id, Message("user", f"Day {day}"))
            newest = await back_up(db)
        (FOLDER / name_of(datetime.now(UTC) - timedelta(days=31))).write_bytes(b"")  # as if of last month
        there = len(list(FOLDER.glob("*.db")))
        print(f"{there} backups, {prune(datetime.now(UTC))} too many or too old")
        await db.messages.append(thread.id, Message("user", "Not in any backup"))
        now = await db.messages.count(thread.id)

    async with kvpersist.open(str(newest)) as copy:
        kept = await copy.messages.count(thread.id)
        print(f"the newest holds {kept - before} of {now - before} new messages")
        print("the last is", (await copy.threads.history(thread.id))[-1].content)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1] if len(sys.argv) > 1 else "sqlite:///rotate.db"))
