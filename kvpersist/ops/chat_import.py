"""Bring conversations from files into a store, so that doing it again changes nothing.

**Identity.** A conversation's session id is made from its owner, its canonical JSON and its ordinal
among equal ones in the file; a message's id from the session's id and the message's number. So a
second import finds what the first one made, in whatever file and form it stands, and an import that
was killed goes on where it stopped and ends in the same store.

**What is written at once.** A session is created first; its messages follow in batches of at most 250
messages and about 1 MiB, so most conversations go in as one. One that was cut short goes on behind its
last stored message. Of a conversation that cannot be stored, nothing is left.

**What is kept.** Roles, content, calls with the text of their arguments, names, unknown keys (in
``Message.extra``) and everything beside the messages (in ``Session.metadata``). Times are those of the
file where it is one of our own exports; otherwise they are those of the import. A tool's result whose
text begins with ``Error`` is an error.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from itertools import islice
from typing import Any, Final, Literal
from uuid import UUID, uuid5

import msgspec
from msgspec import Struct

from kvpersist.agents.conversations.items import Begin
from kvpersist.agents.persistence import Persistence
from kvpersist.agents.records import Message, new_id
from kvpersist.errors import BadOption, BadRequest, Conflict, KvError, MalformedRecord, ParentGone, Unencodable
from kvpersist.ops.chat_formats import Chat, ChatFormat, Chats, ChatSource, read_chats
from kvpersist.ops.progress import OnProgress, Progress

__all__ = ["ImportReport", "OnError", "chat_session_id", "import_chats", "read_chats"]

OnError = Literal["stop", "skip"]

_NAMESPACE: Final = UUID("2a9fc4fc-56f9-5304-ba97-628e76a367a9")  # of the ids made here; never changed
_BATCH_MESSAGES: Final = 250
_MESSAGE_OPS: Final = 8  # of a batch, for one message with a call: roughly
_BATCH_BYTES: Final = 1 << 20  # of the messages' JSON
_READ_AHEAD: Final = 32  # conversations


class ImportReport(Struct, kw_only=True):
    """What an import did.

    Attributes:
        sessions: how many were created; ``messages``: how many messages were added.
        completed: sessions of an earlier import that was cut short, now whole.
        present: conversations that were there already, whole.
        skipped: the records that are left out, in the file's order.
        first: the session of the file's first conversation, None if there is none.
    """

    source: str = ""
    sessions: int = 0
    messages: int = 0
    completed: int = 0
    present: int = 0
    skipped: list[MalformedRecord] = []
    first: str | None = None


async def import_chats(
    db: Persistence,
    source: ChatSource,
    *,
    format: ChatFormat = "auto",
    user: str | None = None,
    new: bool = False,
    on_error: OnError = "stop",
    progress: OnProgress | None = None,
    in_flight: int = 8,
) -> ImportReport:
    """Import every conversation of a file that the store does not hold yet.

    Several processes may import the same file at once: each conversation goes in once.

    Args:
        db: where they go.
        source: a path, or a binary stream.
        format: see `kvpersist.ops.chat_formats`.
        user: who the sessions belong to; None: whom the file names, or nobody.
        new: make copies with new ids, whatever is there; cut short, it has nothing to go on from.
        on_error: "stop" ends at the first record that cannot be imported, those before it being
            whole in the store; "skip" leaves it out and reports it.
        progress: is told after each conversation.
        in_flight: how many conversations are written at once.

    Raises:
        MalformedRecord: a record is no conversation, or holds what the store cannot keep.
        BadOption: an unknown format, or a wrong argument.
        OSError: the file cannot be read.
        Unavailable, CommitUnknown: import again to go on.
    """
    if on_error not in ("stop", "skip"):
        raise BadOption("on_error", f"{on_error!r} is neither 'stop' nor 'skip'")
    if in_flight < 1:
        raise BadOption("in_flight", "at least one")
    with await asyncio.to_thread(read_chats, source, format) as chats:
        run = _Import(db, chats, user=user, new=new, stops=on_error == "stop", progress=progress, in_flight=in_flight)
        await run.all()
    return run.report


def chat_session_id(chat: Chat, owner: str | None, ordinal: int = 0) -> str:
    """The id of the session that a conversation becomes; ``ordinal`` counts equal ones before it in the file."""
    name = msgspec.json.encode([owner, chat.digest.hex(), ordinal])
    return str(uuid5(_NAMESPACE, name.decode()))


class _Import:
    def __init__(
        self,
        db: Persistence,
        chats: Chats,
        *,
        user: str | None,
        new: bool,
        stops: bool,
        progress: OnProgress | None,
        in_flight: int,
    ) -> None:
        self.report = ImportReport(source=chats.source)
        self._db, self._chats, self._user, self._new, self._stops = db, chats, user, new, stops
        self._progress, self._done = progress, 0
        self._free = asyncio.Semaphore(in_flight)
        limit = db.store.capabilities.max_batch
        self._batch = _BATCH_MESSAGES if limit is None else max(1, min(_BATCH_MESSAGES, limit // _MESSAGE_OPS))
        self._failed: list[tuple[int, KvError]] = []

    async def all(self) -> None:
        try:
            async with asyncio.TaskGroup() as group:
                await self._feed(group)
        except BaseExceptionGroup as error:
            raise error.exceptions[0] from None
        self.report.skipped.sort(key=lambda skipped: int(skipped.record))
        if self._failed:
            raise min(self._failed, key=lambda failed: failed[0])[1]

    async def _feed(self, group: asyncio.TaskGroup) -> None:
        """Start a task per conversation, in the file's order; what is under way when one fails still ends."""
        seen: Counter[tuple[str | None, bytes]] = Counter()
        items = iter(self._chats)
        while read := await asyncio.to_thread(lambda: list(islice(items, _READ_AHEAD))):
            for item in read:
                await self._free.acquire()
                if self._failed:
                    return
                if isinstance(item, MalformedRecord):
                    self._refuse(int(item.record), item)
                    self._ended()
                    continue
                owner = item.owner if self._user is None else self._user
                session_id = new_id() if self._new else chat_session_id(item, owner, seen[owner, item.digest])
                seen[owner, item.digest] += 1
                self.report.first = self.report.first or session_id
                group.create_task(self._one(item, session_id, owner))

    async def _one(self, chat: Chat, session_id: str, owner: str | None) -> None:
        try:
            await self._store(chat, session_id, owner)
        except BadRequest as error:
            await self._db.sessions.delete(session_id)  # ours by its id, and a part of it is worse than nothing
            field = error.path if isinstance(error, Unencodable) else ""
            malformed = MalformedRecord(chat.source, chat.record, field, str(error))
            malformed.__cause__ = error
            self._refuse(chat.record, malformed)
        except KvError as error:
            self._failed.append((chat.record, error))
        self._ended()

    def _refuse(self, record: int, error: MalformedRecord) -> None:
        if self._stops:
            self._failed.append((record, error))
        else:
            self.report.skipped.append(error)

    def _ended(self) -> None:
        self._free.release()
        self._done += 1
        if self._progress is not None and not self._failed:
            self._progress(Progress(self._done, self._chats.total, "conversations", self._chats.source))

    async def _store(self, chat: Chat, session_id: str, owner: str | None) -> None:
        created = await self._create(chat, session_id, owner)
        before = stored = 0 if created else await self._last(session_id)
        messages = [_placed(message, session_id, number) for number, message in enumerate(chat.messages, 1)]
        for stop in sorted({call.number for call in chat.recorded} | {len(messages)}):
            if stop >= stored:
                stored = await self._append(session_id, messages[:stop], stored)
                await self._record(session_id, chat, stop)
        if created:
            self.report.sessions += 1
        elif before < len(messages):
            self.report.completed += 1
        else:
            self.report.present += 1

    async def _append(self, session_id: str, messages: list[Message], stored: int) -> int:
        """Append what is behind the first ``stored`` messages; return how many are stored then."""
        while stored < len(messages):
            batch = _fitting(messages, stored, self._batch)
            try:
                await self._db.messages.append_many(session_id, batch)
            except Conflict:
                # Another process imports the same file: go on behind what it has written.
                now = await self._last(session_id)
                if now <= stored:
                    raise
                stored = now
                continue
            stored += len(batch)
            self.report.messages += len(batch)
        return stored

    async def _record(self, session_id: str, chat: Chat, number: int) -> None:
        """Add the calls that no message asked for and that follow message ``number``, but those that are there."""
        calls = [call for call in chat.recorded if call.number == number]
        asked = len(chat.messages[number - 1].tool_calls or ()) if number else 0
        while calls and await self._last(session_id) == number:
            there = await self._db.tool_calls.of(session_id, after=max(0, number - 1), before=number + 1)
            position = len([call for call in there if call.number == number])
            if position - asked >= len(calls):
                return
            again = msgspec.structs.replace(calls[position - asked], session_id=session_id)
            try:
                await self._db.tool_calls._turns.submit(session_id, Begin(again, (number, position)))
            except Conflict:  # another process imports the same file: go on behind what it has written
                continue

    async def _create(self, chat: Chat, session_id: str, owner: str | None) -> bool:
        if await self._db.sessions.get(session_id) is not None:
            return False
        try:
            await self._db.sessions.create(id=session_id, user_id=owner, **chat.session)
        except Conflict:
            return False  # another process was faster
        return True

    async def _last(self, session_id: str) -> int:
        stat = await self._db.sessions.stat(session_id)
        if stat is None:
            raise ParentGone("session", session_id)
        return stat.last


def _placed(message: Message, session_id: str, number: int) -> Message:
    id_ = str(uuid5(UUID(session_id), str(number)))
    return msgspec.structs.replace(message, id=id_)


def _fitting(messages: list[Message], start: int, most: int) -> list[Message]:
    """The next messages that go in as one batch: at least one."""
    size = 0
    batch: list[Message] = []
    for message in messages[start : start + most]:
        size += _size(message)
        if batch and size > _BATCH_BYTES:
            break
        batch.append(message)
    return batch


def _size(value: Any) -> int:
    return len(msgspec.json.encode(value))
