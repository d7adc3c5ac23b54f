"""One session as a JSON value, and back: under its own ids, or as another session of another owner.

The shape, version 2::

    {"format": "kvpersist.session", "version": 2, "last": 7,
     "session": {...}, "messages": [{...}, ...], "calls": [{...}, ...],
     "confirmation": {...} or None, "traces": [{...}, ...]}

Records have the names of their fields; those that have their default are left out, and so are
``session_id`` of what belongs to the session, and the results that stand in messages. What JSON has no
form for is written as in JSON stores (``{"$bytes": "aGk="}``). ``last`` is the last number given out.
Version 1, which `kvpersist.ops.chat_export` writes, is read too: there messages are numbered by their
places, and ``recorded_calls`` has only the calls that no message asks for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, TypeVar, cast, get_args
from uuid import UUID

import msgspec
from msgspec import UNSET, UnsetType

from kvpersist import keys
from kvpersist.agents.collections import Collections
from kvpersist.agents.conversations.approvals import state_named
from kvpersist.agents.conversations.confirmations import Confirmation
from kvpersist.agents.conversations.items import answered, asked_call, checked
from kvpersist.agents.conversations.making import Making, new_session
from kvpersist.agents.conversations.ordered import OrderedTurns
from kvpersist.agents.conversations.traces import Trace, TraceType
from kvpersist.agents.conversations.turns import Turns
from kvpersist.agents.records import Message, Session, ToolCall, new_id
from kvpersist.codec import JSON, RecordCodec, frame, unframe
from kvpersist.errors import BadRequest, CorruptRecord, MalformedRecord, ParentGone, Unencodable, UniqueConflict
from kvpersist.index.writer import live
from kvpersist.log import after_stat
from kvpersist.repository import Repository

__all__ = ["EXPORT_FORMAT", "EXPORT_VERSION", "Transfers"]

EXPORT_FORMAT: Final = "kvpersist.session"
"""The ``format`` member of an export."""

EXPORT_VERSION: Final = 2
"""Its ``version``."""

R = TypeVar("R", bound=msgspec.Struct)

_Json = dict[str, Any]
_SESSIONS: Final = RecordCodec(Session, codec="json")
_MESSAGES: Final = RecordCodec(Message, codec="json")
_CALLS: Final = RecordCodec(ToolCall, codec="json")
_CONFIRMATIONS: Final = RecordCodec(Confirmation, codec="json")
_TRACES: Final = RecordCodec(Trace, codec="json")
_ANY_NUMBER: Final = 1 << 62


class Transfers:
    """What `Sessions` does to take a session out of a store, and to bring one in."""

    _all: Collections
    _turns: Turns | OrderedTurns

    if TYPE_CHECKING:  # as in `Sessions`

        async def get(self, id: str | UUID) -> Session | None: ...

    async def export(self, session_id: str | UUID, *, user_id: str | None = None) -> dict[str, Any]:
        """Return a session and all that belongs to it as a JSON value; this module's text has its shape.

        Args:
            user_id: whose session it has to be.

        Raises:
            ParentGone: there is no such session.
            BadRequest: it is another user's.
        """
        parent = str(session_id)
        part = keys.encode(parent)
        session = await self.get(parent)
        if session is None:
            raise ParentGone("session", parent)
        if user_id is not None and session.user_id != user_id:
            raise BadRequest(f"session {parent!r} is not one of user {user_id!r}")
        every = self._all
        entries = [entry async for entry in every.calls_of(part, 0, _ANY_NUMBER)]  # none of a message behind the last
        calls = [every.tool_calls._codec.decode(entry.key, entry.value) for entry in entries]
        messages: list[Message] = []
        last = 0
        async for entry in after_stat(every.store, f"{every.message_prefix}{part}!", 0):
            last = keys.decode(entry.key.rpartition("!")[2], int)
            if live(entry) is not None:
                messages.append(every.messages._codec.decode(entry.key, entry.value))
        asked: Confirmation | None = await self._kind("confirmation").get(parent)
        traces = [trace async for trace in self._kind("trace").iterate(session_id=parent)]
        traces.sort(key=lambda trace: (trace.started_at, trace.id))
        return {
            "format": EXPORT_FORMAT,
            "version": EXPORT_VERSION,
            "session": _to_json(_SESSIONS, session),
            "last": max([last, *(call.number for call in calls)]),
            "messages": [_without(_to_json(_MESSAGES, message), "session_id") for message in messages],
            "calls": [_without(_to_json(_CALLS, call), "session_id") for call in calls],
            "confirmation": None if asked is None else _without(_to_json(_CONFIRMATIONS, asked), "session_id"),
            "traces": [_without(_to_json(_TRACES, trace), "session_id") for trace in traces],
        }

    async def import_(
        self,
        data: Mapping[str, Any],
        *,
        user_id: str | UnsetType | None = UNSET,
        new_ids: bool = True,
        **fields: Any,
    ) -> Session:
        """Store what `export` returned, and return the session. It can be seen when all of it is there.

        Order, numbers, times, calls and their results are kept.

        Args:
            user_id: the new owner, also of the messages that were the old owner's; left out: the old one.
            new_ids: give the session and its messages new ids, so that this is another session whatever
                is there. Otherwise they keep theirs, and where the session is there already with all of
                these messages, nothing is written.
            fields: of the session, in place of those in ``data``: ``container_id=None``, ...

        Raises:
            MalformedRecord: ``data`` is no such export; it names the place. Nothing was written.
            UniqueConflict: an id is taken by something else. BadRequest: the session is there, but another user's.
            ParentGone: the container or image that the session names does not exist here.
        """
        loaded = _loaded(data)
        session, owner = loaded.session, loaded.session.user_id
        if user_id is not UNSET:
            session.user_id = user_id
        if new_ids:
            session.id = ""
        given = {name: getattr(session, name) for name in session.__struct_fields__} | fields
        try:
            session, updated_at = new_session(given, self._all.now())
        except BadRequest as error:
            if fields:
                raise
            raise MalformedRecord("export", 1, "session", str(error)) from error
        for message in loaded.messages:
            message.session_id = session.id
            message.id = new_id() if new_ids else message.id or new_id()
            message.user_id = session.user_id if message.user_id == owner else message.user_id
        for call in loaded.calls:
            call.session_id = session.id
        if not new_ids and (there := await self._there(session, loaded.messages)) is not None:
            return there
        if new_ids:
            _rename(loaded.traces)
        for trace in loaded.traces:
            trace.session_id = session.id
        for asked in loaded.confirmations:
            asked.session_id = session.id
        making = Making(self._all, self._turns, session, updated_at)
        making.also(self._kind("confirmation"), loaded.confirmations)
        making.also(self._kind("trace"), loaded.traces)
        try:
            await making.add_all(loaded.messages, loaded.calls)
            making.leave_off(loaded.last)
            return await making.finish()
        except BaseException as error:  # cancelled too
            await making.abandon()
            if isinstance(error, Unencodable):
                raise MalformedRecord("export", 1, error.path, error.reason) from error
            raise

    def _kind(self, name: str) -> Repository[Any]:
        return self._all.family.repositories[name]

    async def _there(self, session: Session, messages: Sequence[Message]) -> Session | None:
        """Return the stored session of this id if it has these messages; None where there is no such session."""
        stored = await self.get(session.id)
        if stored is None:
            return None
        if stored.user_id != session.user_id:
            raise BadRequest(f"session {session.id!r} is there, and another user's: import it with new ids")
        prefix = f"{self._all.message_prefix}{keys.encode(session.id)}!"
        found: set[str] = set()
        async for entry in after_stat(self._all.store, prefix, 0):
            if live(entry) is not None:
                found.add(self._all.messages._codec.decode(entry.key, entry.value).id)
        if {message.id for message in messages} <= found:
            return stored
        raise UniqueConflict("id", session.id, session.id)


class _Loaded(msgspec.Struct):
    """An export taken apart and found sound."""

    session: Session
    messages: list[Message]
    calls: list[ToolCall]
    last: int
    confirmations: list[Confirmation]
    traces: list[Trace]


def _loaded(data: Any) -> _Loaded:
    whole = _mapping(data, "")
    if whole.get("format") != EXPORT_FORMAT:
        raise _malformed("format", f"{whole.get('format')!r}, expected {EXPORT_FORMAT!r}")
    version = whole.get("version")
    if isinstance(version, bool) or version not in (1, EXPORT_VERSION):
        raise _malformed("version", f"{version!r}, this kvpersist reads 1 and {EXPORT_VERSION}")
    session = _from_json(_SESSIONS, whole.get("session"), "session")
    messages = [
        _from_json(_MESSAGES, item, f"messages[{n}]") for n, item in enumerate(_list(whole, "messages", needed=True))
    ]
    messages = _numbered(messages, by_place=version == 1)
    if version == 1:
        calls = _placed(messages, _call_list(whole, "recorded_calls", {"position": 0}))
    else:
        calls = _call_list(whole, "calls", {})
    last = whole.get("last", 0)
    if not isinstance(last, int) or isinstance(last, bool) or not 0 <= last < _ANY_NUMBER:
        raise _malformed("last", f"{last!r}, expected a number")
    asked = whole.get("confirmation")
    confirmations = [] if asked is None else [_from_json(_CONFIRMATIONS, _named(asked, "confirmation"), "confirmation")]
    traces = [_trace(item, f"traces[{n}]") for n, item in enumerate(_list(whole, "traces"))]
    return _Loaded(session, messages, _complete(messages, calls), last, confirmations, traces)


def _named(value: Any, path: str) -> _Json:
    """What belongs to a session, which it does not name itself in an export."""
    return {**_mapping(value, path), "session_id": ""}


def _trace(value: Any, path: str) -> Trace:
    trace = _from_json(_TRACES, _named(value, path), path)
    if trace.type not in get_args(TraceType):
        raise _malformed(f"{path}.type", f"{trace.type!r}, expected one of {', '.join(get_args(TraceType))}")
    if trace.started_at is None:
        raise _malformed(f"{path}.started_at", "missing")
    trace.id = trace.id or new_id()
    trace.root, trace.failed = trace.parent_id is None or None, trace.error is not None or None
    return trace


def _rename(traces: Sequence[Trace]) -> None:
    """Give traces new ids, and let their children name them by those."""
    names = {trace.id: new_id() for trace in traces}
    for trace in traces:
        trace.id = names[trace.id]
        trace.parent_id = names.get(trace.parent_id or "", trace.parent_id)


def _numbered(messages: list[Message], *, by_place: bool) -> list[Message]:
    """Check the messages as an append would, and their numbers, which may all be left out."""
    unnumbered = by_place or all(not message.number for message in messages)
    least = 1
    ids: set[str] = set()
    ready: list[Message] = []
    for n, message in enumerate(messages):
        path = f"messages[{n}]"
        number = n + 1 if unnumbered else message.number
        if not least <= number < _ANY_NUMBER:
            raise _malformed(f"{path}.number", f"{message.number}, expected {least} or more")
        least = number + 1
        if message.id and message.id in ids:
            raise _malformed(f"{path}.id", f"{message.id!r} stands there twice")
        ids.add(message.id)
        if message.created_at is None:
            raise _malformed(f"{path}.created_at", "missing")
        message.session_id = ""
        try:
            [new] = checked([message], "", message.created_at)
        except BadRequest as error:
            raise _malformed(path, str(error)) from error
        new.number = number
        if not message.id:
            new.id = ""
        ready.append(new)
    return ready


def _call_list(whole: _Json, name: str, more: _Json) -> list[ToolCall]:
    calls: list[ToolCall] = []
    for n, item in enumerate(_list(whole, name)):
        path = f"{name}[{n}]"
        call = _from_json(_CALLS, {**_mapping(item, path), "session_id": "", **more}, path)
        try:
            call.state = state_named(call.state)
        except BadRequest as error:
            raise _malformed(f"{path}.state", str(error)) from error
        if call.created_at is None:
            raise _malformed(f"{path}.created_at", "missing")
        if not (0 <= call.number < _ANY_NUMBER and 0 <= call.position < _ANY_NUMBER):
            raise _malformed(f"{path}.number", f"{call.number}, {call.position}: no place of a call")
        calls.append(call)
    return calls


def _placed(messages: Sequence[Message], recorded: Sequence[ToolCall]) -> list[ToolCall]:
    """Give recorded calls their positions behind those that the messages ask for."""
    next_: dict[int, int] = {message.number: len(message.tool_calls or ()) for message in messages}
    for call in recorded:
        call.position = next_.get(call.number, 0)
        next_[call.number] = call.position + 1
    return list(recorded)


def _complete(messages: Sequence[Message], calls: Sequence[ToolCall]) -> list[ToolCall]:
    """All calls in order: those that are told of, and for the others what the messages say of them."""
    numbers = {message.number: message for message in messages}
    told: dict[tuple[int, int], ToolCall] = {}
    for n, call in enumerate(calls):
        if (call.number, call.position) in told:
            raise _malformed(f"calls[{n}]", f"{call.number}, {call.position} stands there twice")
        answer = None if call.result_number is None else numbers.get(call.result_number)
        if call.result_number is not None and (answer is None or answer.role != "tool"):
            raise _malformed(f"calls[{n}].result_number", f"{call.result_number} is no tool message")
        told[call.number, call.position] = call
    taken = {call.result_number for call in calls}
    waiting: dict[str, list[tuple[int, int]]] = {}
    for message in messages:
        for position, part in enumerate(message.tool_calls or ()):
            if (message.number, position) not in told:
                told[message.number, position] = asked_call(message, position)
                waiting.setdefault(part.id, []).append((message.number, position))
        asked = waiting.get(message.tool_call_id or "") if message.role == "tool" else None
        if asked and message.tool_call_id is not None and message.number not in taken:
            place = asked.pop()
            told[place] = answered(told[place], message)
    return [told[place] for place in sorted(told)]


def _to_json(codec: RecordCodec[R], record: R) -> _Json:
    return msgspec.json.decode(unframe("", codec.encode("", record)).payload)


def _from_json(codec: RecordCodec[R], value: Any, path: str) -> R:
    item = _mapping(value, path)
    try:
        return codec.decode(path, frame(path, msgspec.json.encode(item), JSON, 1))
    except CorruptRecord as error:
        raise _malformed(path, error.reason) from error
    except (TypeError, ValueError, OverflowError, RecursionError) as error:  # not a JSON value
        raise _malformed(path, str(error)) from error


def _mapping(value: Any, path: str) -> _Json:
    if not isinstance(value, Mapping):
        raise _malformed(path, f"{type(value).__name__}, expected an object")
    return dict(cast("Mapping[str, Any]", value))


def _list(whole: _Json, name: str, *, needed: bool = False) -> list[Any]:
    value = whole.get(name, None if needed else [])
    if not isinstance(value, list):
        raise _malformed(name, f"{type(value).__name__}, expected a list")
    return cast("list[Any]", value)


def _without(item: _Json, *names: str) -> _Json:
    return {name: value for name, value in item.items() if name not in names}


def _malformed(field: str, reason: str) -> MalformedRecord:
    return MalformedRecord("export", 1, field, reason)
