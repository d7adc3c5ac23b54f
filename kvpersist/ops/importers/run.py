"""Bring what a reader yields into a store, so that doing it again changes nothing.

**Going on.** Nothing is remembered beside the records: what is there already shows how far an import
came. A session that holds the first messages of the source's goes on behind them; one that holds other
messages is left as it is and reported. Events go on behind the last one there. So an import that was
killed and run again ends in the same store as one that was not. Import one source once at a time.

**Verifying.** Afterwards the source is read again, and each session's messages and calls are compared
with the stored ones by count and by a digest of their contents.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Final, Literal

import msgspec

from kvpersist.agents.persistence import Persistence
from kvpersist.agents.records import ROLES, Session
from kvpersist.errors import BadRequest, Conflict, MalformedRecord, ParentGone, UniqueConflict
from kvpersist.ops.importers.calls import TIMES, complete_calls, missing_calls
from kvpersist.ops.importers.placing import Placed, allowed, content_of, fitting
from kvpersist.ops.importers.plan import (
    ConsumerPosition,
    Conversation,
    Events,
    Problem,
    Record,
    Source,
    id_for,
    made_id,
    printable,
)
from kvpersist.ops.importers.records import Records
from kvpersist.ops.importers.report import SessionCheck, SystemImport, Verified
from kvpersist.ops.importers.topics import Topics
from kvpersist.ops.progress import OnProgress, Progress

__all__ = ["import_from"]

_MESSAGE_ID_BYTES: Final = 120  # of an encoded id: what an index entry holds whole
_BATCH_MESSAGES: Final = 250
_MESSAGE_OPS: Final = 8  # of a batch, for one message with a call: roughly
_NO_MESSAGE: Final = 1 << 60  # a number behind every message's
_SPARE: Final = 4096  # bytes that framing and key may add to a value


async def import_from(
    db: Persistence,
    source: Source,
    *,
    user: str | None = None,
    secrets: str | None = None,
    dry_run: bool = False,
    on_error: Literal["skip", "stop"] = "skip",
    progress: OnProgress | None = None,
) -> SystemImport:
    """Import everything of a source that the store does not hold yet, and compare the two afterwards.

    Args:
        db: where it goes.
        source: what `kvpersist.ops.importers.open_source` returned; it is only read.
        user: who the sessions belong to that name nobody.
        secrets: what becomes of keys that the source holds in clear. None: they are left out, and reported;
            "encrypt": stored encrypted; "env:NAME": the variable NAME is referred to instead, in which ``{id}``
            stands for the record's id in capitals.
        dry_run: read everything, write nothing, and report what would be done.
        on_error: "skip" leaves out a row that cannot be imported and reports it; "stop" ends there.
        progress: is told after each item.

    Raises:
        MalformedRecord: a row cannot be imported, and ``on_error`` is "stop".
        BadOption, BadRequest: the source is not what it is said to be.
        Unavailable, CommitUnknown: import again to go on.
    """
    records = Records(db, secrets=secrets, dry_run=dry_run)
    run = _Run(db, source, records, user=user, dry_run=dry_run, stops=on_error == "stop", progress=progress)
    await run.write()
    if not dry_run:
        await run.verify()
    if (reason := await source.changed()) is not None:
        run.problem(Problem(place=source.shown, reason=f"{reason}: import again", left_out=False))
    return run.report


class _Run:
    def __init__(
        self,
        db: Persistence,
        source: Source,
        records: Records,
        *,
        user: str | None,
        dry_run: bool,
        stops: bool,
        progress: OnProgress | None,
    ) -> None:
        self.report = SystemImport(source=printable(source.shown), system=source.system, dry_run=dry_run)
        self._db, self._source, self._user, self._dry_run, self._stops = db, source, user, dry_run, stops
        self._records = records
        self._progress, self._done = progress, 0
        limits = db.store.capabilities
        most = limits.max_batch
        self._ordered = limits.atomic_batch == "none"
        self._batch = _BATCH_MESSAGES if most is None else max(1, min(_BATCH_MESSAGES, most // _MESSAGE_OPS))
        largest = limits.max_value_bytes
        self._largest = None if largest is None else max(1, largest - _SPARE)
        self._topics = Topics(db.events, dry_run=dry_run)
        self._now = datetime.now(UTC)
        self._silent = False  # while verifying: problems were told of already

    def problem(self, problem: Problem) -> None:
        if self._silent:
            return
        problem = msgspec.structs.replace(problem, place=printable(problem.place), reason=printable(problem.reason))
        if self._stops and problem.left_out:
            raise MalformedRecord(self._source.shown, problem.place, "", problem.reason)
        self.report.problems.append(problem)

    # ---- writing

    async def write(self) -> None:
        total = await self._source.total()
        async for item in self._source.items():
            if isinstance(item, Problem):
                self.problem(item)
                continue
            if isinstance(item, Conversation):
                for problem in item.problems:
                    self.problem(problem)
                await self._try_conversation(item)
            elif isinstance(item, Record):
                await self._record(item)
            elif isinstance(item, Events):
                await self._events(item)
            else:
                await self._consumer(item)
            self._done += 1
            if self._progress is not None:
                self._progress(Progress(self._done, total, "records", self._source.shown))

    async def _try_conversation(self, conversation: Conversation) -> None:
        """Import a session, or leave it out whole where this store refuses it."""
        id_ = conversation.session.id
        there = await self._db.sessions.get(id_) is not None
        try:
            await self._conversation(conversation)
        except (BadRequest, UniqueConflict) as error:
            if isinstance(error, MalformedRecord):
                raise
            if not there and not self._dry_run:
                await self._db.sessions.delete(id_)
            self.problem(Problem(place=conversation.place, reason=str(error)))

    async def _conversation(self, conversation: Conversation) -> None:
        id_ = conversation.session.id
        self.report.first = self.report.first or id_
        stored = await self._db.sessions.get(id_)
        created = stored is None
        if stored is None:
            if self._dry_run:
                self.report.sessions += 1
                self.report.messages += len(self._placed(conversation, conversation.session))
                return
            stored = await self._create(conversation)
        messages = self._placed(conversation, stored)
        there = 0 if created else await self._there(id_, messages, conversation.resaved)
        if there is None:
            self.report.differing.append(id_)
            reason = "the store has a session of this id with other messages: it was left as it is"
            self.problem(Problem(place=conversation.place, reason=reason))
            return
        if self._dry_run:
            added = len(messages) - there
        else:
            if not created and self._ordered:  # what a crash kept from following the last message is made up for
                await self._db.messages.truncate(id_, after=_NO_MESSAGE)
            added = await self._append(id_, messages, there, conversation.resaved)
            await complete_calls(self._db, id_, conversation, [each.index for each in messages])
            await self._keep_time(conversation, id_, messages)
        self.report.messages += added
        if created:
            self.report.sessions += 1
        elif added > 0:
            self.report.completed += 1
        else:
            self.report.present += 1

    async def _create(self, conversation: Conversation) -> Session:
        """Create the session; what it names and is not there is kept as metadata, and reported."""
        session = conversation.session
        wanted = msgspec.structs.replace(session, user_id=session.user_id or self._user)
        if wanted.created_at is None:  # all that is known, and the same when the import goes on
            first = next((message.created_at for message in conversation.messages if message.created_at), None)
            wanted.created_at = first or self._now
        while True:
            fields = {name: getattr(wanted, name) for name in wanted.__struct_fields__}
            try:
                return await self._db.sessions.create(**fields)
            except ParentGone as error:
                field = f"{error.kind}_id"
                missing = getattr(wanted, field, None)
                if missing is None:
                    raise
                self.problem(
                    Problem(
                        place=conversation.place,
                        reason=f"it names the {error.kind} {missing!r}, which is not there: kept in metadata.missing",
                        left_out=False,
                    )
                )
                kept = {**wanted.metadata.get("missing", {}), field: missing}
                metadata = {**wanted.metadata, "missing": kept}
                wanted = msgspec.structs.replace(wanted, metadata=metadata, **{field: None})
            except UniqueConflict:
                found = await self._db.sessions.get(wanted.id)
                if found is None:
                    raise
                return found  # another process was faster

    def _placed(self, conversation: Conversation, session: Session) -> list[Placed]:
        """The messages as they will be stored, without those that cannot be."""
        placed: list[Placed] = []
        seen: set[str] = set()
        at = session.created_at
        for index, message in enumerate(conversation.messages):
            at = message.created_at or at
            foreign = message.id
            if not foreign:
                own, kept = made_id(session.id, len(placed) + 1), None
            elif foreign in seen:
                own, kept = made_id(session.id, len(placed) + 1, foreign), foreign
            else:
                own, kept = id_for(foreign, "message", _MESSAGE_ID_BYTES)
            seen.add(foreign)
            ready = allowed(msgspec.structs.replace(message, id=own, created_at=at, session_id=""))
            if kept is not None:
                ready.extra = {**(ready.extra or {}), "external_id": kept}
            try:
                content = content_of(ready, conversation.resaved)
            except (BadRequest, ValueError) as error:
                self._left_out(conversation, index, foreign, str(error))
                continue
            if self._largest is not None and len(content) > self._largest:
                self._left_out(conversation, index, foreign, f"{len(content)} bytes are more than the store takes")
            elif ready.role not in ROLES:
                self._left_out(conversation, index, foreign, f"unknown role {ready.role!r}")
            else:
                placed.append(Placed(ready, index, len(content), hashlib.sha256(content).digest()))
        return placed

    def _left_out(self, conversation: Conversation, index: int, foreign: str, reason: str) -> None:
        place = f"{conversation.place} message {foreign or index + 1}"
        self.problem(Problem(place=place, reason=reason))

    async def _there(self, session_id: str, messages: Sequence[Placed], resaved: bool) -> int | None:
        """How many of ``messages`` the session holds already; None: it holds others."""
        at = 0
        async for stored in self._db.messages.iterate(session_id):
            if at == len(messages):
                return at  # it was gone on with here
            if hashlib.sha256(content_of(stored, resaved)).digest() != messages[at].digest:
                return None
            at += 1
        return at

    async def _append(self, session_id: str, messages: list[Placed], there: int, resaved: bool) -> int:
        """Append what is behind the first ``there`` messages; return how many that were."""
        at = there
        while at < len(messages):
            batch = fitting(messages, at, self._batch)
            try:
                await self._db.messages.append_many(session_id, batch)
            except UniqueConflict:
                if not await self._renamed(session_id, messages, at, len(batch)):
                    raise
                continue
            except Conflict:
                now = await self._there(session_id, messages, resaved)
                if now is None or now <= at:
                    raise
                at = now  # another process imports the same source: go on behind what it has written
                continue
            at += len(batch)
        return at - there

    async def _keep_time(self, conversation: Conversation, session_id: str, messages: Sequence[Placed]) -> None:
        """Let the session's last change be the source's again, where only this import moved it, or no earlier."""
        stored = await self._db.sessions.get(session_id)
        if stored is None or stored.updated_at is None:
            return
        times = [each.message.created_at for each in messages]
        times += [getattr(record.call, name) for record in conversation.calls for name in TIMES]
        moved = max((at for at in times if at is not None), default=None)
        wanted = conversation.session.updated_at or moved
        if wanted is None or stored.updated_at == wanted:
            return
        if stored.updated_at < wanted or stored.updated_at == moved:
            await self._db.sessions.update(
                session_id, lambda session: msgspec.structs.replace(session, updated_at=wanted)
            )

    async def _renamed(self, session_id: str, messages: list[Placed], start: int, count: int) -> bool:
        """Give another id to messages whose id another session's message has; whether there were any."""
        any_taken = False
        for index in range(start, start + count):
            message = messages[index].message
            holder = await self._db.messages.get(message.id)
            if holder is None:
                continue
            any_taken = True
            extra = {"external_id": message.id, **(message.extra or {})}
            own = made_id(session_id, index + 1, message.id)
            messages[index].message = msgspec.structs.replace(message, id=own, extra=extra)
        return any_taken

    async def _record(self, record: Record) -> None:
        outcome = await self._records.add(record, self.problem)
        if outcome == "created":
            self.report.records[record.kind] = self.report.records.get(record.kind, 0) + 1
        elif outcome == "present":
            self.report.records_present += 1
        elif outcome == "differing":
            self.report.differing.append(printable(record.place))
            self.problem(Problem(place=record.place, reason="the store has another of this id: it was left as it is"))

    async def _events(self, events: Events) -> None:
        self.report.events += await self._topics.add(events, self.problem)

    async def _consumer(self, position: ConsumerPosition) -> None:
        self.report.consumers += await self._topics.acknowledge(position, self.problem)

    # ---- verifying

    async def verify(self) -> None:
        """Read the source again, and compare."""
        self._silent = True
        self._topics = Topics(self._db.events, dry_run=True)
        found = self.report.verified = Verified()
        left_out = {problem.place for problem in self.report.problems if problem.left_out}
        async for item in self._source.items():
            if isinstance(item, Conversation):
                check = await self._checked(item)
                found.sessions.append(check)
                if not check.equal:
                    found.different.append(check.id)
                missing = await missing_calls(self._db, check.id, item)
                found.records += len(item.calls) - len(missing)
                found.missing_records += map(printable, missing)
            elif isinstance(item, Record):
                if await self._records.holds(item):
                    found.records += 1
                elif printable(item.place) not in left_out:
                    found.missing_records.append(printable(item.place))
            elif isinstance(item, Events):
                missing = await self._topics.missing(item)
                found.records += len(item.events) - missing
                if missing:
                    found.missing_records.append(f"{printable(item.place)}: {missing} events")
        self._silent = False

    async def _checked(self, conversation: Conversation) -> SessionCheck:
        id_ = conversation.session.id
        session = await self._db.sessions.get(id_)
        messages = self._placed(conversation, session or conversation.session)
        digest, stored_digest = hashlib.sha256(), hashlib.sha256()
        for message in messages:
            digest.update(message.digest)
        count = 0
        async for stored in self._db.messages.iterate(id_):
            if count == len(messages):
                break  # it was gone on with here
            stored_digest.update(hashlib.sha256(content_of(stored, conversation.resaved)).digest())
            count += 1
        return SessionCheck(
            id=id_,
            messages=len(messages),
            digest=digest.hexdigest(),
            stored_messages=count,
            stored_digest=stored_digest.hexdigest(),
        )
