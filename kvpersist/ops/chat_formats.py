"""Conversations in files: what forms there are, and how each becomes messages.

==========  =====================================================================================
format      what the file holds
==========  =====================================================================================
tau         objects with ``traj``, a list of messages (tau-bench); every other key is metadata
openai      objects with ``messages``; every other key is metadata
messages    a list of messages: one conversation
jsonl       per line a conversation in any form here; or per line a message: one conversation
kvpersist   what `kvpersist.ops.chat_export.export_session` writes, or `Sessions.export` returns
==========  =====================================================================================

A file of the first two, or of the last, holds one conversation or a list of them. A message has
``role`` and ``content``, and may have ``name``, ``tool_calls`` (``id``, ``function.name``,
``function.arguments``) and ``tool_call_id``; its other keys are kept in ``Message.extra``. The text
of a call's arguments is kept as it stands. **A tool's result whose text begins with** ``Error`` **is
an error**, unless the message itself says ``is_error``.

Reading a file by lines holds one conversation at a time in memory; any other form is one JSON
document, held as bytes while its conversations are read one by one.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice
from os import PathLike, fspath
from pathlib import PurePath
from types import NoneType
from typing import IO, Any, Final, Literal, Self, TypeAlias, TypeVar, cast, get_args

import msgspec
from msgspec import Struct

from kvpersist.agents.records import ROLES, Message, Session, ToolCall, ToolCallPart
from kvpersist.codec import JSON, RecordCodec, frame, unframe
from kvpersist.errors import BadOption, CorruptRecord, MalformedRecord

__all__ = [
    "EXPORT_FORMAT",
    "EXPORT_VERSION",
    "OWN_VERSION",
    "Chat",
    "ChatFormat",
    "ChatSource",
    "Chats",
    "read_chats",
    "to_json",
]

ChatFormat: TypeAlias = Literal["auto", "tau", "openai", "messages", "jsonl", "kvpersist"]
ChatSource: TypeAlias = str | PathLike[str] | IO[bytes]
EXPORT_FORMAT: Final = "kvpersist.session"
"""The ``format`` member of our own export."""
EXPORT_VERSION: Final = 1
"""Its ``version``."""
OWN_VERSION: Final = 2
"""The ``version`` of what `Sessions.export` returns, which is read too."""

_Json: TypeAlias = dict[str, Any]
_FORMATS: Final = get_args(ChatFormat)
_LINE_SUFFIXES: Final = {".jsonl", ".ndjson"}
_BOM: Final = b"\xef\xbb\xbf"
_SESSIONS: Final = RecordCodec(Session, codec="json")
_MESSAGES: Final = RecordCodec(Message, codec="json")
_CALLS: Final = RecordCodec(ToolCall, codec="json")
_CODECS: Final[dict[type, RecordCodec[Any]]] = {Session: _SESSIONS, Message: _MESSAGES, ToolCall: _CALLS}
_Record = TypeVar("_Record")
_MESSAGE_KEYS: Final = {"role", "content", "name", "tool_calls", "tool_call_id"}


class Chat(Struct, frozen=True, kw_only=True):
    """One conversation as it stands in a file.

    Attributes:
        source: the file's name.
        record: from 1, its place in the file's list, or its (first) line.
        digest: 16 bytes; equal for equal conversations, whatever file and form they stand in.
        owner: the user that the file names, None if none.
        session: the other fields of `Session` that the file gives.
        messages: in their order; ids, numbers and owners are not set.
        recorded: calls that no message asked for; ``number`` is that of the message they follow.
    """

    source: str
    record: int
    digest: bytes
    owner: str | None
    session: dict[str, Any]
    messages: list[Message]
    recorded: list[ToolCall] = []


class Chats:
    """The conversations of a file, read one by one as it is iterated; a context manager that closes the file.

    Where a record is no conversation, the `MalformedRecord` that says why stands in its place.

    Attributes:
        source: the file's name.
        total: how many there are; None for a file read by lines.
    """

    def __init__(
        self,
        source: str,
        total: int | None,
        items: Iterator[Chat | MalformedRecord],
        file: IO[bytes] | None = None,
    ) -> None:
        self.source, self.total = source, total
        self._items, self._file = items, file

    def __iter__(self) -> Iterator[Chat | MalformedRecord]:
        return self._items

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()


def read_chats(source: ChatSource, format: ChatFormat = "auto") -> Chats:
    """Read the conversations of a file, or of a binary stream, which stays open.

    ``auto`` takes a file whose name ends in ``.jsonl`` or ``.ndjson``, or whose first line is a
    whole JSON value with another line below it, for ``jsonl``; elsewhere the keys of each
    conversation decide. Naming a format refuses the others.

    Raises:
        BadOption: ``format`` is none of those.
        OSError: the file cannot be read.
    """
    if format not in _FORMATS:
        raise BadOption("format", f"{format!r} is none of {', '.join(_FORMATS)}")
    if not isinstance(source, (str, PathLike)):
        return _chats(str(getattr(source, "name", "stdin")), source, None, format)
    name = fspath(source)
    file = open(name, "rb")  # noqa: SIM115 - a file read by lines stays open until the reader is closed
    try:
        return _chats(name, file, file, format)
    except BaseException:  # interrupted too: the file was opened here
        file.close()
        raise


def _chats(name: str, file: IO[bytes], owned: IO[bytes] | None, format: ChatFormat) -> Chats:
    lines = _lines(file)
    head = list(islice(lines, 2))
    if format == "jsonl" or (format == "auto" and _is_by_line(name, head)):
        return Chats(name, None, _by_line(name, chain(head, lines)), owned)
    document = b"".join([*(line for _, line in head), file.read()])
    if owned is not None:
        owned.close()
    return _document(name, document, format)


def to_json(record: Session | Message | ToolCall) -> _Json:
    """A record as the JSON values of our own export, fields that have their default left out."""
    codec: RecordCodec[Any] = _CODECS[type(record)]
    return msgspec.json.decode(unframe("", codec.encode("", record)).payload)


def _lines(file: IO[bytes]) -> Iterator[tuple[int, bytes]]:
    """Number and bytes of each line that is not blank; numbers start at 1."""
    for number, line in enumerate(file, 1):
        text = line.removeprefix(_BOM) if number == 1 else line
        if not text.isspace() and text:
            yield number, text


def _is_by_line(name: str, head: Sequence[tuple[int, bytes]]) -> bool:
    if PurePath(name).suffix.lower() in _LINE_SUFFIXES:
        return True
    if len(head) < 2:  # one line is a document too, and one that is read faster
        return False
    try:
        msgspec.json.decode(head[0][1], type=msgspec.Raw)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return False
    return True


def _by_line(name: str, lines: Iterable[tuple[int, bytes]]) -> Iterator[Chat | MalformedRecord]:
    head = next(iter(lines := iter(lines)), None)
    if head is None:
        return
    first, line = head
    try:
        value = _parse(line)
    except _Malformed:
        value = None  # told of below, with its line
    if isinstance(value, dict) and _kind(cast(_Json, value)) is None and "role" in value:
        yield _one_by_line(name, first, chain([head], lines))
        return
    for number, line in chain([head], lines):
        yield _conversation(name, number, line, "auto")


def _one_by_line(name: str, first: int, lines: Iterable[tuple[int, bytes]]) -> Chat | MalformedRecord:
    """A message per line: one conversation, of which nothing is imported if a line is none."""
    messages: list[Any] = []
    for number, line in lines:
        try:
            messages.append(_parse(line))
            _message(messages[-1], "")
        except _Malformed as error:
            return MalformedRecord(name, number, error.field.lstrip("."), error.reason)
    return _conversation(name, first, messages, "messages")


def _document(name: str, document: bytes, format: ChatFormat) -> Chats:
    is_list = document[:256].lstrip()[:1] == b"["
    try:
        items: list[Any] = _parse(document, list[msgspec.Raw]) if is_list else [_parse(document)]
        first = _parse(items[0]) if is_list and items else items[0] if items else None
    except _Malformed as error:
        return Chats(name, 1, iter([MalformedRecord(name, 1, error.field, error.reason)]))
    if isinstance(first, dict) and _kind(cast(_Json, first)) is None and ("role" in first or format == "messages"):
        items = [document if is_list else items]  # the messages of one conversation
    return Chats(name, len(items), (_conversation(name, n, item, format) for n, item in enumerate(items, 1)))


class _Malformed(Exception):
    def __init__(self, field: str, reason: str) -> None:
        self.field, self.reason = field, reason


def _parse(text: bytes | msgspec.Raw, type: Any = Any) -> Any:
    """JSON to values.

    Raises:
        _Malformed: not JSON. NaN and halves of surrogate pairs are not.
    """
    if not text:
        raise _Malformed("", "the file is empty")
    try:
        return msgspec.json.decode(text, type=type)
    except UnicodeDecodeError as error:
        raise _Malformed("", f"not UTF-8 ({error.reason} at byte {error.start})") from error
    except RecursionError as error:
        raise _Malformed("", "nested too deeply") from error
    except msgspec.MsgspecError as error:
        raise _Malformed("", f"not JSON ({error})") from error


def _kind(value: _Json) -> ChatFormat | None:
    """Which form of conversation an object is, None if it is none."""
    if "traj" in value:
        return "tau"
    if value.get("format") == EXPORT_FORMAT:
        return "kvpersist"
    return "openai" if "messages" in value else None


def _conversation(name: str, record: int, item: Any, format: ChatFormat) -> Chat | MalformedRecord:
    """One record of a file, as bytes or parsed, as a conversation."""
    try:
        value = _parse(item) if isinstance(item, (bytes, msgspec.Raw)) else item
        kind = "messages" if isinstance(value, list) else _kind(cast(_Json, value)) if isinstance(value, dict) else None
        if kind is None:
            raise _Malformed("", f"no conversation: {_named(value)}, without 'messages' or 'traj'")
        if format not in ("auto", kind):
            raise _Malformed("", f"a conversation of format {kind!r} where {format!r} was asked for")
        if kind == "kvpersist":
            return _exported(name, record, cast(_Json, value))
        return _foreign(name, record, value, "traj" if kind == "tau" else "messages")
    except _Malformed as error:
        return MalformedRecord(name, record, error.field, error.reason)


def _foreign(name: str, record: int, value: Any, key: str) -> Chat:
    metadata: _Json = {}
    raw: Any = value
    if isinstance(value, dict):
        metadata = cast(_Json, value).copy()
        raw = metadata.pop(key)
    if not isinstance(raw, list):
        raise _Malformed(key, f"{_named(raw)}, expected a list of messages")
    messages = [_message(item, f"{key}[{n}]") for n, item in enumerate(cast(list[Any], raw))]
    digest = _digest({"messages": raw, "metadata": metadata})
    return Chat(
        source=name, record=record, digest=digest, owner=None, session={"metadata": metadata}, messages=messages
    )


def _exported(name: str, record: int, value: _Json) -> Chat:
    """One of our own exports. Ids and owners are no part of what makes two of them equal."""
    version = value.get("version")
    if isinstance(version, bool) or version not in (EXPORT_VERSION, OWN_VERSION):
        raise _Malformed("version", f"{version!r}, this kvpersist reads {EXPORT_VERSION} and {OWN_VERSION}")
    header, raw = value.get("session"), value.get("messages")
    if not isinstance(header, dict):
        raise _Malformed("session", f"{_named(header)}, expected an object")
    if not isinstance(raw, list):
        raise _Malformed("messages", f"{_named(raw)}, expected a list of messages")
    session = _decode(_SESSIONS, header, "session")
    owner = session.user_id
    messages = [_decode(_MESSAGES, item, f"messages[{n}]") for n, item in enumerate(cast(list[Any], raw))]
    if version == OWN_VERSION:
        value["recorded_calls"] = _aside(messages, value.get("calls", []))
    for n, message in enumerate(messages):
        if message.role not in ROLES:
            raise _Malformed(f"messages[{n}].role", f"{message.role!r}, expected one of {', '.join(sorted(ROLES))}")
        message.id = message.session_id = ""
        message.number = 0
        if message.user_id == owner:
            message.user_id = None
    session.id, session.user_id = "", None
    recorded = _recorded(value.get("recorded_calls", []), len(messages))
    plain = [to_json(part) for part in (session, *messages, *recorded)]
    fields = {field: getattr(session, field) for field in session.__struct_fields__ if field not in ("id", "user_id")}
    return Chat(
        source=name,
        record=record,
        digest=_digest(plain),
        owner=owner,
        session=fields,
        messages=messages,
        recorded=recorded,
    )


def _aside(messages: Sequence[Message], value: Any) -> Any:
    """Of the calls that `Sessions.export` tells, those that no message asks for, numbered by places."""
    if not isinstance(value, list):
        return value  # told of where it is read
    numbers = [message.number or place for place, message in enumerate(messages, 1)]
    asked = {number: len(message.tool_calls or ()) for number, message in zip(numbers, messages, strict=True)}
    found: list[Any] = []
    for item in cast("list[Any]", value):
        if not isinstance(item, dict):
            found.append(item)
            continue
        call = cast(_Json, item).copy()
        number, position = call.get("number"), call.pop("position", 0)
        if isinstance(number, int) and isinstance(position, int) and position < asked.get(number, 0):
            continue
        for field in ("number", "result_number"):
            if isinstance(place := call.get(field), int):
                call[field] = bisect_right(numbers, place)
        found.append(call)
    return found


def _recorded(value: Any, messages: int) -> list[ToolCall]:
    if not isinstance(value, list):
        raise _Malformed("recorded_calls", f"{_named(value)}, expected a list")
    calls: list[ToolCall] = []
    for n, item in enumerate(cast(list[Any], value)):
        path = f"recorded_calls[{n}]"
        if not isinstance(item, dict):
            raise _Malformed(path, f"{_named(item)}, expected an object")
        call = _decode(_CALLS, {**cast(_Json, item), "session_id": "", "position": 0}, path)
        least = calls[-1].number if calls else 0
        if not least <= call.number <= messages:
            raise _Malformed(f"{path}.number", f"{call.number}, expected {least} to {messages}")
        calls.append(call)
    return calls


def _decode(codec: RecordCodec[_Record], value: Any, path: str) -> _Record:
    if not isinstance(value, dict):
        raise _Malformed(path, f"{_named(value)}, expected an object")
    try:
        return codec.decode(path, frame(path, msgspec.json.encode(value), JSON, 1))
    except CorruptRecord as error:
        raise _Malformed(path, error.reason) from error


def _message(value: Any, path: str) -> Message:
    if not isinstance(value, dict):
        raise _Malformed(path, f"{_named(value)}, expected a message")
    item = cast(_Json, value)
    role = item.get("role")
    if not isinstance(role, str) or role not in ROLES:
        said = repr(role) if isinstance(role, str) else _named(role) if "role" in item else "missing"
        raise _Malformed(f"{path}.role", f"{said}, expected one of {', '.join(sorted(ROLES))}")
    content = item.get("content")
    if not (content is None or isinstance(content, str)) and not _is_blocks(content):
        raise _Malformed(f"{path}.content", f"{_named(content)}, expected a text, a list of blocks, or null")
    for key in ("name", "tool_call_id"):
        if not isinstance(item.get(key), (str, NoneType)):
            raise _Malformed(f"{path}.{key}", f"{_named(item[key])}, expected a text")
    if item.get("tool_calls") and role != "assistant":
        raise _Malformed(f"{path}.tool_calls", f"a message of role {role} has none")
    if item.get("tool_call_id") is not None and role != "tool":
        raise _Malformed(f"{path}.tool_call_id", f"a message of role {role} has none")
    extra = {key: kept for key, kept in item.items() if key not in _MESSAGE_KEYS}
    calls: list[ToolCallPart] | None = None
    if item.get("tool_calls") is not None:
        calls, unknown = _tool_calls(item["tool_calls"], f"{path}.tool_calls")
        if any(unknown):
            extra["tool_calls"] = unknown
    return Message(
        role=role,
        content=content,
        name=item.get("name"),
        tool_calls=calls,
        tool_call_id=item.get("tool_call_id"),
        is_error=_is_error(item) if role == "tool" else None,
        extra=extra or None,
    )


def _tool_calls(value: Any, path: str) -> tuple[list[ToolCallPart], list[_Json]]:
    """The calls, and for each what a `ToolCallPart` has no place for."""
    if not isinstance(value, list):
        raise _Malformed(path, f"{_named(value)}, expected a list")
    calls: list[ToolCallPart] = []
    unknown: list[_Json] = []
    for n, call in enumerate(cast(list[Any], value)):
        here = f"{path}[{n}]"
        if not isinstance(call, dict):
            raise _Malformed(here, f"{_named(call)}, expected a tool call")
        rest = cast(_Json, call).copy()
        function = rest.pop("function", None)
        if not isinstance(function, dict):
            raise _Malformed(f"{here}.function", f"{_named(function)}, expected an object with name and arguments")
        inner = cast(_Json, function).copy()
        id_, called, arguments = rest.pop("id", None), inner.pop("name", None), inner.pop("arguments", None)
        if not isinstance(called, str):
            raise _Malformed(f"{here}.function.name", f"{_named(called)}, expected a text")
        if not isinstance(id_, (str, NoneType)):
            raise _Malformed(f"{here}.id", f"{_named(id_)}, expected a text")
        if not isinstance(arguments, (str, dict, NoneType)):
            raise _Malformed(f"{here}.function.arguments", f"{_named(arguments)}, expected a text or an object")
        if rest.get("type") == "function":
            del rest["type"]
        calls.append(ToolCallPart(id=id_ or "", name=called, arguments=arguments))
        unknown.append(rest | ({"function": inner} if inner else {}))
    return calls, unknown


def _is_error(item: _Json) -> bool:
    said = item.get("is_error")
    if isinstance(said, bool):
        return said
    content = item.get("content")
    if isinstance(content, list):
        content = next((block.get("text") for block in cast(list[_Json], content) if "text" in block), None)
    return isinstance(content, str) and content.startswith("Error")


def _is_blocks(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(block, dict) for block in cast(list[Any], value))


def _named(value: Any) -> str:
    """What a JSON value is, for people."""
    if value is None:
        return "null"
    names: dict[type, str] = {bool: "a truth value", int: "a number", float: "a number", str: "a text", list: "a list"}
    return names.get(cast(Any, type(value)), "an object")


def _digest(value: Any) -> bytes:
    return hashlib.blake2b(msgspec.json.encode(value, order="sorted"), digest_size=16).digest()
