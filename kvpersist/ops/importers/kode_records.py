"""Records of the Kode SDK as ours.

======================  ======================================================================
of Kode                 becomes
======================  ======================================================================
AgentInfo               an agent, with a session of the same id
messages                the session's messages; blocks stay as they are, ``tool_use`` asks for calls
ToolCallRecord          the state of a call: result, approval, audit and times
TodoSnapshot            the agent's todo list
Snapshot                a snapshot with its own copy of the messages
HistoryWindow and so on windows, compressions, recovered files, media
Timeline                an event of the topic of the agent's id, with channel, cursor and bookmark
======================  ======================================================================
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Final, cast, get_args

from kvpersist import keys
from kvpersist.agents.records import (
    TOOL_CALL_STATES,
    Approval,
    AuditEntry,
    Message,
    Session,
    ToolCall,
    ToolCallPart,
)
from kvpersist.agents.state.agents import Agent
from kvpersist.agents.state.history import Compression, CompressionConfig, HistoryWindow, RecoveredFile, WindowStats
from kvpersist.agents.state.media import Media
from kvpersist.agents.state.snapshots import Bookmark, Snapshot
from kvpersist.agents.state.todos import TODO_STATES, Todo, TodoList, TodoStatus
from kvpersist.events.records import NewEvent
from kvpersist.ops.importers.plan import (
    Bad,
    CallRecord,
    Conversation,
    Problem,
    Record,
    id_for,
    list_or_none,
    mapping,
    moment_of,
    object_or_none,
    required_text,
    text_or_none,
)

__all__ = [
    "CHANNELS",
    "agent_id_of",
    "agent_of",
    "compression_of",
    "conversation_of",
    "event_of",
    "media_of",
    "recovered_of",
    "snapshot_of",
    "todos_of",
    "window_of",
]

CHANNELS: Final = ("progress", "control", "monitor")
_AGENT_BYTES: Final = 120
_BELOW_BYTES: Final = 158  # of the encoded ids of an agent and of something of its own
_INFO: Final = (
    "agentId",
    "templateId",
    "createdAt",
    "lineage",
    "configVersion",
    "messageCount",
    "lastSfpIndex",
    "lastBookmark",
    "breakpoint",
    "metadata",
)
_MESSAGE: Final = ("id", "role", "content", "metadata", "created_at", "createdAt")
_HEADER: Final = re.compile(r"\W*(recovered|timestamp|mtime)\b\W?\s*(.*)", re.IGNORECASE)
_ROLES: Final = ("user", "assistant", "system")


def agent_id_of(agent: str) -> tuple[str, str | None]:
    """The id of an agent here, and the foreign one where it was replaced."""
    return id_for(agent, "agent", _AGENT_BYTES)


def agent_of(place: str, agent: str, info: Mapping[str, Any]) -> Record:
    """Make the agent of an AgentInfo.

    Raises:
        Bad: a field is of another type than it has to be.
    """
    id_, foreign = agent_id_of(agent)
    metadata = dict(mapping(info.get("metadata") or {}, "metadata"))
    metadata |= {name: value for name, value in info.items() if name not in _INFO}
    if foreign is not None:
        metadata["external_id"] = foreign
    count = info.get("messageCount")
    version = info.get("configVersion")
    record = Agent(
        id=id_,
        template_id=text_or_none(info.get("templateId"), "templateId"),
        lineage=_lineage(info),
        config_version=text_or_none(version, "configVersion"),
        breakpoint=str(info.get("breakpoint") or "ready").lower(),
        last_safe_point=_whole(info.get("lastSfpIndex", -1), "lastSfpIndex"),
        bookmark=_bookmark(info.get("lastBookmark")),
        counters={} if count is None else {"message_count": _whole(count, "messageCount")},
        metadata=metadata,
        created_at=moment_of(info.get("createdAt"), "createdAt"),
    )
    record.updated_at = record.created_at
    return Record(place=place, kind="agents", record=record)


def conversation_of(
    place: str,
    agent: str,
    info: Mapping[str, Any],
    messages: Sequence[tuple[str, Any]],
    calls: Sequence[tuple[str, Any]],
) -> Conversation:
    """Make the session of an agent from places and values of its messages and tool call records."""
    id_, foreign = agent_id_of(agent)
    session = Session(id=id_, agent_id=id_, external_id=foreign)
    problems: list[Problem] = []
    try:
        session.template_id = text_or_none(info.get("templateId"), "templateId")
        session.lineage = _lineage(info)
        session.created_at = moment_of(info.get("createdAt"), "createdAt")
    except Bad:  # the agent's own record tells of it
        pass
    made: list[Message] = []
    asked: dict[str, list[tuple[int, int]]] = {}
    answered: dict[str, dict[str, Any]] = {}
    for at, value in messages:
        try:
            message = _message(mapping(value, "the message"))
        except Bad as error:
            problems.append(Problem(place=at, reason=str(error)))
            continue
        for position, part in enumerate(message.tool_calls or ()):
            asked.setdefault(part.id, []).append((len(made), position))
        for block in map(object_or_none, list_or_none(message.content) or ()):
            if block is not None and block.get("type") == "tool_result":
                answered[str(block.get("tool_use_id"))] = block
        made.append(message)
    found: list[CallRecord] = []
    for at, value in calls:
        try:
            call = _call(mapping(value, "the call"))
        except Bad as error:
            problems.append(Problem(place=at, reason=str(error)))
            continue
        places = asked.get(call.call_id)
        index, position = places.pop(0) if places else (None, 0)
        found.append(CallRecord(place=at, call=call, asked_by=index, position=position))
    for id_, places in asked.items():  # what only the messages tell of
        block = answered.get(id_)
        if block is not None and places:
            index, position = places[-1]
            part = (made[index].tool_calls or [])[position]
            failed = bool(block.get("is_error"))
            call = ToolCall(
                session_id="",
                number=0,
                position=0,
                call_id=part.id,
                name=part.name,
                state="failed" if failed else "completed",
                is_error=failed,
                result=block.get("content"),
            )
            found.append(CallRecord(place=f"{place} call {id_}", call=call, asked_by=index, position=position))
    return Conversation(place=place, session=session, messages=made, calls=found, problems=problems, resaved=True)


def snapshot_of(place: str, agent: str, value: Any) -> Record:
    """Make a snapshot. Raises Bad."""
    row = mapping(value, "the snapshot")
    owner, _ = agent_id_of(agent)
    label = required_text(row, "id")
    id_, foreign = id_for(label, f"snapshot of {agent}", _room(owner))
    metadata = dict(mapping(row.get("metadata") or {}, "metadata"))
    if foreign is not None:
        metadata["external_id"] = foreign
    record = Snapshot(
        id=id_,
        agent_id=owner,
        messages=_copies(row.get("messages")),
        last_safe_point=_whole(row.get("lastSfpIndex", -1), "lastSfpIndex"),
        bookmark=_bookmark(row.get("lastBookmark")),
        metadata=metadata,
        created_at=moment_of(row.get("createdAt"), "createdAt"),
    )
    return Record(place=place, kind="snapshots", record=record)


def todos_of(place: str, agent: str, value: Any) -> Record:
    """Make a todo list. Raises Bad."""
    row = mapping(value, "the todo list")
    todos: list[Todo] = []
    for item in list_or_none(row.get("todos")) or []:
        todo = mapping(item, "the todo")
        status = str(todo.get("status", "pending"))
        if status not in TODO_STATES:
            raise Bad(f"unknown status {status!r}: one of {', '.join(sorted(get_args(TodoStatus)))}")
        todos.append(
            Todo(
                id=required_text(todo, "id"),
                title=required_text(todo, "title"),
                status=cast("TodoStatus", status),
                assignee=text_or_none(todo.get("assignee"), "assignee"),
                notes=text_or_none(todo.get("notes"), "notes"),
                created_at=moment_of(todo.get("createdAt"), "createdAt"),
                updated_at=moment_of(todo.get("updatedAt"), "updatedAt"),
            )
        )
    record = TodoList(
        agent_id=agent_id_of(agent)[0],
        todos=todos,
        version=_whole(row.get("version", 1), "version"),
        updated_at=moment_of(row.get("updatedAt"), "updatedAt"),
    )
    return Record(place=place, kind="todos", record=record)


def window_of(place: str, agent: str, value: Any) -> Record:
    """Make a history window. Raises Bad."""
    row = mapping(value, "the window")
    owner, _ = agent_id_of(agent)
    stats = object_or_none(row.get("stats")) or {}
    record = HistoryWindow(
        id=id_for(required_text(row, "id"), f"window of {agent}", _room(owner))[0],
        agent_id=owner,
        messages=_copies(row.get("messages")) or [],
        events=list_or_none(row.get("events")) or [],
        stats=WindowStats(*(_whole(stats.get(name, 0), name) for name in ("messageCount", "tokenCount", "eventCount"))),
        created_at=moment_of(row.get("timestamp"), "timestamp"),
    )
    return Record(place=place, kind="windows", record=record)


def compression_of(place: str, agent: str, value: Any) -> Record:
    """Make a compression. Raises Bad."""
    row = mapping(value, "the compression")
    owner, _ = agent_id_of(agent)
    config = object_or_none(row.get("config")) or {}
    window = text_or_none(row.get("windowId"), "windowId")
    ratio = row.get("ratio", 0.0)
    if isinstance(ratio, bool) or not isinstance(ratio, (int, float)):
        raise Bad("ratio is no number")
    record = Compression(
        id=id_for(required_text(row, "id"), f"compression of {agent}", _room(owner))[0],
        agent_id=owner,
        window_id=id_for(window, f"window of {agent}", _room(owner))[0] if window else None,
        config=CompressionConfig(
            str(config.get("model", "")),
            str(config.get("prompt", "")),
            _whole(config.get("threshold", 50_000), "threshold"),
        ),
        summary=text_or_none(row.get("summary"), "summary") or "",
        ratio=float(ratio),
        recovered_files=[str(path) for path in list_or_none(row.get("recoveredFiles")) or ()],
        created_at=moment_of(row.get("timestamp"), "timestamp"),
    )
    return Record(place=place, kind="compressions", record=record)


def recovered_of(place: str, agent: str, name: str, text: str) -> Record:
    """Make a recovered file of its text: three lines that tell of it, an empty one, and its content. Raises Bad."""
    owner, _ = agent_id_of(agent)
    head, separator, content = text.partition("\n\n")
    told = {found[1].lower(): found[2].strip() for line in head.splitlines() if (found := _HEADER.match(line))}
    if not separator or not told.get("recovered"):
        raise Bad("it does not begin with three lines that say which file it is a copy of")
    record = RecoveredFile(
        id=id_for(name.removesuffix(".txt"), f"recovered file of {agent}", _room(owner))[0],
        agent_id=owner,
        path=told["recovered"],
        content=content,
        modified_at=moment_of(_number(told.get("mtime")), "mtime"),
        created_at=moment_of(_number(told.get("timestamp")), "timestamp"),
    )
    return Record(place=place, kind="recovered_files", record=record)


def media_of(place: str, agent: str, value: Any) -> Record:
    """Make an entry of the media cache. Raises Bad."""
    row = mapping(value, "the media record")
    owner, _ = agent_id_of(agent)
    record = Media(
        key=id_for(required_text(row, "key"), f"media of {agent}", _room(owner))[0],
        agent_id=owner,
        provider=text_or_none(row.get("provider"), "provider") or "",
        mime_type=text_or_none(row.get("mimeType"), "mimeType") or "",
        size=_whole(row.get("sizeBytes", 0), "sizeBytes"),
        file_id=text_or_none(row.get("fileId"), "fileId"),
        file_uri=text_or_none(row.get("fileUri"), "fileUri"),
        created_at=moment_of(row.get("createdAt"), "createdAt"),
    )
    return Record(place=place, kind="media", record=record)


def event_of(channel: str, value: Any) -> tuple[int, NewEvent]:
    """Make an event of a Timeline entry, and return its place in the agent's sequence. Raises Bad."""
    row = mapping(value, "the entry")
    bookmark = mapping(row.get("bookmark"), "its bookmark")
    seq = _whole(bookmark.get("seq"), "bookmark.seq")
    cursor: Any = row.get("cursor")
    if isinstance(cursor, bool) or not isinstance(cursor, (int, str)):
        cursor = None
    return seq, NewEvent(row.get("event"), channel=channel, cursor=cursor, bookmark=bookmark)


def _message(row: dict[str, Any]) -> Message:
    role = row.get("role")
    if role not in _ROLES:
        raise Bad(f"unknown role {role!r}")
    content = row.get("content")
    extra = {name: value for name, value in row.items() if name not in _MESSAGE}
    message = Message(
        role,
        content,
        id=text_or_none(row.get("id"), "id") or "",
        metadata=None if row.get("metadata") is None else mapping(row["metadata"], "metadata"),
        extra=extra or None,
        created_at=moment_of(row.get("created_at", row.get("createdAt")), "created_at"),
    )
    if role == "assistant":
        blocks = [block for block in map(object_or_none, list_or_none(content) or ()) if block is not None]
        message.tool_calls = [
            ToolCallPart(str(block.get("id") or ""), str(block.get("name") or ""), block.get("input"))
            for block in blocks
            if block.get("type") == "tool_use"
        ] or None
    return message


def _copies(value: Any) -> list[Message] | None:
    """Messages of a copy: without numbers, as they stand there."""
    listed = list_or_none(value)
    if listed is None:
        if value is not None:
            raise Bad("messages are no list")
        return None
    return [_message(mapping(item, "a message")) for item in listed]


def _call(row: dict[str, Any]) -> ToolCall:
    state = str(row.get("state", "pending")).lower()
    if state not in TOOL_CALL_STATES:
        raise Bad(f"unknown state {row.get('state')!r}")
    failed = row.get("isError")
    duration = row.get("durationMs")
    return ToolCall(
        session_id="",
        number=0,
        position=0,
        call_id=required_text(row, "id"),
        name=required_text(row, "name"),
        arguments=row.get("input"),
        state=state,
        is_error=bool(failed) if failed is not None else {"completed": False, "failed": True}.get(state),
        result=row.get("result"),
        error=text_or_none(row.get("error"), "error"),
        approval=_approval(row.get("approval")),
        audit=[_audit(entry) for entry in list_or_none(row.get("auditTrail")) or ()],
        metadata=None if duration is None else {"durationMs": duration},
        created_at=moment_of(row.get("createdAt"), "createdAt"),
        started_at=moment_of(row.get("startedAt"), "startedAt"),
        updated_at=moment_of(row.get("updatedAt"), "updatedAt"),
        completed_at=moment_of(row.get("completedAt"), "completedAt"),
    )


def _approval(value: Any) -> Approval | None:
    if value is None:
        return None
    row = mapping(value, "approval")
    decision = row.get("decision")
    if decision not in (None, "allow", "deny"):
        raise Bad(f"unknown decision {decision!r}")
    return Approval(
        required=bool(row.get("required", False)),
        decision=decision,
        decided_by=text_or_none(row.get("decidedBy"), "decidedBy"),
        decided_at=moment_of(row.get("decidedAt"), "decidedAt"),
        note=text_or_none(row.get("note"), "note"),
        meta=None if row.get("meta") is None else mapping(row["meta"], "approval.meta"),
    )


def _audit(value: Any) -> AuditEntry:
    row = mapping(value, "an entry of auditTrail")
    at = moment_of(row.get("timestamp"), "timestamp")
    if at is None:
        raise Bad("an entry of auditTrail has no timestamp")
    return AuditEntry(str(row.get("state", "")).lower(), at, text_or_none(row.get("note"), "note"))


def _lineage(info: Mapping[str, Any]) -> list[str]:
    return [agent_id_of(str(each))[0] for each in list_or_none(info.get("lineage")) or ()]


def _bookmark(value: Any) -> Bookmark | None:
    if value is None:
        return None
    row = mapping(value, "bookmark")
    return Bookmark(_whole(row.get("seq"), "seq"), moment_of(row.get("timestamp"), "timestamp"))


def _whole(value: Any, what: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise Bad(f"{what} is no whole number")
    return value


def _number(text: str | None) -> Any:
    """A time as it is written in a header: milliseconds, with a fraction or not, or ISO."""
    if text is None or not re.fullmatch(r"-?\d+(\.\d+)?", text):
        return text or None
    return float(text) if "." in text else int(text)


def _room(agent_id: str) -> int:
    return _BELOW_BYTES - len(keys.encode(agent_id).encode())
