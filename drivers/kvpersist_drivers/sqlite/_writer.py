"""What the writing thread does: one transaction for whatever has been waiting, judged in Python."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from contextlib import suppress
from typing import Final, TypeAlias

from kvpersist.driver import ABSENT, Batch, Check, Clock, Committed, Op, Put
from kvpersist.errors import BadKey, CommitUnknown, Conflict, KvError, ValueTooLarge
from kvpersist_drivers.sqlite._database import Database
from kvpersist_drivers.sqlite._errors import code_of, translated
from kvpersist_drivers.sqlite._lane import Job, Lane
from kvpersist_drivers.sqlite._statements import MAX_KEYS, Statements, padded

__all__ = ["MAX_VALUE_BYTES", "Writer"]

MAX_VALUE_BYTES: Final = 999_000_000  # SQLite keeps rows of up to 1,000,000,000 bytes, key and all
_IDLE_SECONDS: Final = 0.25  # without a write, before the WAL is checkpointed
_BOUND_PAGES: Final = 2000  # written by this process, after which it is checkpointed in any case
_VACUUM: Final = "PRAGMA incremental_vacuum(2000)"  # pages given back by one compact
_PAGE_BYTES: Final = 4096

_IOERR: Final = sqlite3.SQLITE_IOERR

_Answer: TypeAlias = Committed | KvError
_Row: TypeAlias = tuple[str, bytes, bytes, float | None]
_REFUSALS: Final = (sqlite3.Error, UnicodeEncodeError, OverflowError, ValueTooLarge)


class Writer:
    """Serves a lane whose jobs are lists of batches, and functions to be called in the thread."""

    def __init__(self, database: Database, sql: Statements, clock: Clock) -> None:
        self.clock = clock
        self.connection: sqlite3.Connection = None  # pyright: ignore[reportAttributeAccessIssue] # set by the first job
        self._database = database
        self._sql = sql
        self._pages = 0  # a guess at what this process has written since the last checkpoint

    def serve(self, lane: Lane, jobs: list[Job]) -> None:
        """Commit what is to be committed, then call the functions."""
        commits = [job for job in jobs if isinstance(job.work, list)]
        if commits:
            self._commit(lane, commits)
        if len(commits) < len(jobs):
            for job in lane.claim([job for job in jobs if not isinstance(job.work, list)]):
                job.call()

    def tend(self, idle: bool) -> float | None:
        """Checkpoint when nothing has been written for a while, or much has; never before an answer."""
        if not self._pages or self._database.in_memory:
            return None
        if idle or self._pages > _BOUND_PAGES:
            self._pages = 0 if self._database.checkpoint(self.connection) else 1
        return _IDLE_SECONDS if self._pages else None

    def compact(self, limit: int) -> int:
        """Remove expired entries, give back free pages."""
        connection = self.connection
        with self._database.locked():
            try:
                connection.execute("BEGIN IMMEDIATE")
                removed = connection.execute(self._sql.sweep, (self.clock(), limit)).rowcount
                connection.execute("COMMIT")
                connection.executescript(_VACUUM)  # `execute` would stop after the first page
            except sqlite3.Error as error:
                raise translated(error, "compact", self._database.path) from error
            finally:
                self._rollback()
        self._pages += 1 + removed
        return removed

    def _commit(self, lane: Lane, jobs: list[Job]) -> None:
        try:
            self._database.acquire()
        except KvError as error:
            for job in lane.claim(jobs):
                job.error = type(error)(*error.args)
            return
        try:
            self._transact(lane, jobs)
        finally:
            self._rollback()
            self._database.release()

    def _transact(self, lane: Lane, jobs: list[Job]) -> None:
        """Begin, and only then claim: until the lock is ours, a cancelled commit is simply not there."""
        lone = _lone(jobs)
        if lone is None:
            try:
                self.connection.execute("BEGIN IMMEDIATE")
            except sqlite3.Error as error:
                for job in lane.claim(jobs):
                    job.error = translated(error, "commit", self._database.path)
                return
        jobs = lane.claim(jobs)
        if not jobs:
            return
        if lone is None:
            answers = self._together([batch for job in jobs for batch in job.work])
            at = 0
            for job in jobs:
                job.outcome = answers[at : at + len(job.work)]
                at += len(job.work)
        else:
            jobs[0].outcome = [self._alone(lone)]

    def _alone(self, batch: Batch) -> _Answer:
        """One unconditional operation, in a transaction of its own."""
        [op] = batch.ops
        try:
            if isinstance(op, Put) and (op.expires_at is None or op.expires_at > self.clock()):
                self._weigh((batch,), len(op.value), 1)
                self.connection.execute(self._sql.put, (op.key, op.value, batch.version, op.expires_at))
            else:
                self._weigh((), 0, 1)
                self.connection.execute(self._sql.delete, (op.key,))
        except _REFUSALS as error:
            return self._unknown(batch, error) if code_of(error) == _IOERR else self._refusal(batch, error)
        return Committed(batch.version)

    def _together(self, batches: list[Batch]) -> list[_Answer]:
        """Apply ``batches`` and commit, in the transaction that is open."""
        try:
            answers = self._apply(batches)
        except _REFUSALS as error:
            return self._apart(batches, error)
        try:
            self.connection.execute("COMMIT")
        except sqlite3.Error as error:
            if code_of(error) == sqlite3.SQLITE_FULL:  # the commit frame is the last one: it was not written
                return self._apart(batches, error)
            self._rollback()  # the frame may be in the WAL, though not yet on the disk: a crash could revive it
            return [self._unknown(batch, error) for batch in batches]
        return answers

    def _apart(self, batches: list[Batch], error: Exception) -> list[_Answer]:
        """After ``error``: each batch by itself, so that only those fail which have to."""
        self._rollback()
        if len(batches) == 1:
            return [self._refusal(batches[0], error)]
        answers: list[_Answer] = []
        for batch in batches:
            try:
                self.connection.execute("BEGIN IMMEDIATE")
            except sqlite3.Error as refused:
                answers.append(self._refusal(batch, refused))
            else:
                answers += self._together([batch])
        return answers

    def _apply(self, batches: list[Batch]) -> list[_Answer]:
        now = self.clock()
        wanted = {op.key for batch in batches for op in batch.ops if op.expect is not None}
        versions = self._versions(list(wanted), now)
        rows: dict[str, _Row | None] = {}  # None: to be deleted
        answers: list[_Answer] = []
        size = 0
        for batch in batches:
            if wanted and (conflict := _conflict(batch.ops, versions)) is not None:
                answers.append(conflict)
                continue
            version = batch.version
            for op in batch.ops:
                if type(op) is Check:
                    continue
                key = op.key
                if type(op) is Put and ((expires := op.expires_at) is None or expires > now):
                    value = op.value
                    rows[key] = (key, value, version, expires)
                    size += len(value)
                    if key in wanted:
                        versions[key] = version
                else:
                    rows[key] = None
                    versions.pop(key, None)
            answers.append(Committed(version))
        self._weigh(batches, size, len(rows))
        puts = [row for row in rows.values() if row is not None]
        self.connection.executemany(self._sql.put, puts)
        if len(puts) < len(rows):
            self.connection.executemany(self._sql.delete, [(key,) for key, row in rows.items() if row is None])
        return answers

    def _versions(self, keys: list[str], now: float) -> dict[str, bytes]:
        """The versions of those of ``keys`` that are there and have not expired."""
        found: dict[str, bytes] = {}
        for start in range(0, len(keys), MAX_KEYS):
            part = padded(keys[start : start + MAX_KEYS])
            found.update(self.connection.execute(self._sql.versions[len(part)], (*part, now)).fetchall())
        return found

    def _weigh(self, batches: Sequence[Batch], size: int, rows: int) -> None:
        """Count what goes into the WAL; refuse a value that no row can hold before SQLite copies it."""
        self._pages += 1 + rows + size // _PAGE_BYTES
        if size > MAX_VALUE_BYTES:
            for op in (op for batch in batches for op in batch.ops):
                if isinstance(op, Put) and len(op.value) > MAX_VALUE_BYTES:
                    raise ValueTooLarge(op.key, len(op.value), MAX_VALUE_BYTES)

    def _rollback(self) -> None:
        if self.connection.in_transaction:
            with suppress(sqlite3.Error):  # after an I/O error SQLite has rolled back already
                self.connection.execute("ROLLBACK")

    def _refusal(self, batch: Batch, error: Exception) -> KvError:
        """Why ``batch`` had no effect, as an error of its own."""
        if isinstance(error, KvError):
            return type(error)(*error.args)
        if isinstance(error, UnicodeEncodeError):
            answer: KvError = BadKey(error.object, "no UTF-8 text: it holds a lone surrogate")
        elif isinstance(error, sqlite3.Error) and code_of(error) != sqlite3.SQLITE_TOOBIG:
            answer = translated(error, "commit", self._database.path)
        else:
            largest = max((op for op in batch.ops if isinstance(op, Put)), key=lambda op: len(op.key) + len(op.value))
            answer = ValueTooLarge(largest.key, len(largest.value), MAX_VALUE_BYTES)
        answer.__cause__ = error
        return answer

    def _unknown(self, batch: Batch, error: Exception) -> KvError:
        keys = tuple(op.key for op in batch.ops if not isinstance(op, Check))
        answer = CommitUnknown(keys, f"sqlite, {self._database.path}: {error}")
        answer.__cause__ = error
        return answer


def _conflict(ops: Sequence[Op], versions: dict[str, bytes]) -> Conflict | None:
    for position, op in enumerate(ops):
        expected = op.expect
        if expected is None:
            continue
        found = versions.get(op.key, ABSENT)
        if found != expected:
            return Conflict(op.key, expected, found, position)
    return None


def _lone(jobs: list[Job]) -> Batch | None:
    """The only batch of the only job, if it is one operation without a condition."""
    if len(jobs) == 1 and len(jobs[0].work) == 1 and len((batch := jobs[0].work[0]).ops) == 1:
        return None if batch.ops[0].expect is not None else batch
    return None
