"""Storage for agents that tell what they do: one event at a time, messages and traces."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final, TypeAlias, cast
from uuid import UUID

from kvpersist.agents.conversations.traces import TokenUsage, Trace
from kvpersist.agents.records import Message, id_text
from kvpersist.agents.runs.ensure import ensure_session
from kvpersist.agents.runs.given import message_of
from kvpersist.agents.runs.runs import OnMessage, notify
from kvpersist.errors import BadOption, BadRequest, ParentGone

if TYPE_CHECKING:
    from kvpersist.agents.persistence import Persistence

__all__ = ["ThreadHandler", "OnTrace", "PersistenceMiddleware"]

OnTrace: TypeAlias = Callable[[Trace], Any]
"""Is called, and awaited where it returns an awaitable, with each trace once its start or end is stored."""

_THREAD: Final = ("thread_id", "session_id")
_STARTS: Final = frozenset(
    ("name", "type", "thread_id", "session_id", "parent_id", "input", "metadata", "started_at", "token_usage")
)
_ENDS: Final = frozenset(("output", "error", "token_usage", "metadata", "ended_at"))


class PersistenceMiddleware:
    """Stores what an agent tells, message by message and trace by trace.

    Where an agent's whole turn is known at once, `with_storage` writes it as one batch; this is for
    agents that report while they work. Each event is stored before the call returns.
    """

    def __init__(
        self,
        db: Persistence,
        *,
        auto_create_thread: bool = True,
        default_agent_id: str = "default",
        persist_messages: bool = True,
        persist_traces: bool = True,
        on_message: OnMessage | None = None,
        on_trace: OnTrace | None = None,
    ) -> None:
        """Make one for a store.

        Args:
            auto_create_thread: create the thread that an event names where it is missing.
            default_agent_id: of threads that are created here, unless the event names an agent.
            persist_messages, persist_traces: off: what would store one raises `BadOption`.
            on_message, on_trace: are called, and awaited, with each record once it is stored.
        """
        self._db = db
        self._creates = auto_create_thread
        self._agent_id = default_agent_id
        self._messages, self._traces = persist_messages, persist_traces
        self._on_message, self._on_trace = on_message, on_trace

    async def persist_message(self, event: Mapping[str, Any]) -> Message:
        """Store one message and return it.

        Args:
            event: ``thread_id``, ``role`` and ``content``, and any other field of `Message`;
                ``tool_calls`` in ours, OpenAI's or a flat form.

        Raises:
            BadOption: ``persist_messages`` is off.
            BadRequest: the event is not understood; nothing was written.
            ParentGone: there is no such thread, and none is created.
        """
        if not self._messages:
            raise BadOption("persist_messages", "is off: messages are not stored here")
        fields, thread_id = _split(event)
        message = message_of(fields)
        await self.ensure_thread(thread_id, agent_id=message.agent_id, user_id=message.user_id)
        stored = await self._db.messages.append(thread_id, message)
        await notify(self._on_message, stored)
        return stored

    async def persist_trace(self, event: Mapping[str, Any]) -> Trace:
        """Store the start or the end of a trace, and return the trace.

        Args:
            event: ``{"trace_id", "action": "start" | "end", "data"}``. ``data`` of a start: ``name``,
                ``type`` ("agent"), ``thread_id``, ``parent_id``, ``input``, ``metadata``; of an end:
                ``output``, ``error``, ``token_usage`` (`TokenUsage` or its fields), ``metadata``.

        Raises:
            BadOption: ``persist_traces`` is off.
            UniqueConflict: a trace of this id has started already.
            ParentGone: no trace of this id has started; or there is no such thread, and none is created.
            BadRequest: the event is not understood; nothing was written.
        """
        if not self._traces:
            raise BadOption("persist_traces", "is off: traces are not stored here")
        if not isinstance(cast("Any", event), Mapping) or not event.get("trace_id"):
            raise BadRequest("a trace's event has trace_id, action and data")
        action: Any = event.get("action")
        data: Any = event.get("data") or {}
        if action not in ("start", "end") or not isinstance(data, Mapping):
            raise BadRequest(f"the action of a trace is start or end, with data as a mapping, not {action!r}")
        fields = dict(cast("Mapping[str, Any]", data))
        if unknown := fields.keys() - (_STARTS if action == "start" else _ENDS):
            known = ", ".join(sorted(_STARTS if action == "start" else _ENDS))
            raise BadRequest(f"the {action} of a trace has no {', '.join(sorted(unknown))}; it has {known}")
        id_ = id_text(event["trace_id"], "trace_id")
        trace = await (self._start(id_, fields) if action == "start" else self._end(id_, fields))
        await notify(self._on_trace, trace)
        return trace

    async def ensure_thread(
        self,
        thread_id: str | UUID,
        *,
        agent_id: str | None = None,
        user_id: str | None = None,
        title: str | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> bool:
        """Make sure of the thread of this id; True where it was created.

        Raises:
            ParentGone: it is missing, and ``auto_create_thread`` is off.
            BadRequest: it belongs to another user.
        """
        _, created = await ensure_session(
            self._db,
            thread_id,
            create=self._creates,
            user_id=user_id,
            agent_id=agent_id or self._agent_id,
            title=title,
            metadata=dict(metadata or {}),
        )
        return created

    async def get_thread_messages(self, thread_id: str | UUID, limit: int = 50) -> list[Message]:
        """Return the latest messages of a thread, oldest first."""
        return await self._db.messages.last(thread_id, limit)

    async def get_thread_traces(self, thread_id: str | UUID, limit: int = 50) -> list[Trace]:
        """Return the latest traces of a thread, newest first."""
        return await self._db.traces.find(session_id=str(thread_id), limit=limit)

    def handler(
        self, thread_id: str | UUID, *, agent_id: str | None = None, user_id: str | None = None
    ) -> ThreadHandler:
        """Return the callbacks of one thread, for agents that are given functions to call."""
        return ThreadHandler(self, str(thread_id), agent_id, user_id)

    # ---- private

    async def _start(self, id_: str, fields: dict[str, Any]) -> Trace:
        thread_id = next((fields.pop(name) for name in _THREAD if fields.get(name)), None)
        for name in _THREAD:
            fields.pop(name, None)
        fields["token_usage"] = _usage(fields.get("token_usage"))
        if not isinstance(fields.get("name"), str):
            raise BadRequest("the start of a trace has a name in its data")
        if fields.get("metadata") is None:
            fields.pop("metadata", None)
        if thread_id is not None:
            await self.ensure_thread(thread_id)
            fields["session_id"] = str(thread_id)
        return await self._db.traces.create(id=id_, **fields)

    async def _end(self, id_: str, fields: dict[str, Any]) -> Trace:
        fields["token_usage"] = _usage(fields.get("token_usage"))
        trace = await self._db.traces.end(id_, **fields)
        if trace is None:
            raise ParentGone("trace", id_)
        return trace


class ThreadHandler:
    """The callbacks of one thread. Made by `PersistenceMiddleware.handler`; raises as `persist_message`."""

    def __init__(
        self, middleware: PersistenceMiddleware, thread_id: str, agent_id: str | None, user_id: str | None
    ) -> None:
        self.thread_id = thread_id
        self._middleware = middleware
        self._agent_id, self._user_id = agent_id, user_id

    async def on_user_message(self, content: Any, **fields: Any) -> Message:
        """Store what the user said; ``fields`` are others of `Message`."""
        return await self._persist({"role": "user", "content": content, "user_id": self._user_id, **fields})

    async def on_assistant_message(self, content: Any, tool_calls: list[Any] | None = None, **fields: Any) -> Message:
        """Store what the assistant said, with the calls it asks for."""
        return await self._persist({"role": "assistant", "content": content, "tool_calls": tool_calls, **fields})

    async def on_tool_result(
        self, tool_call_id: str, result: Any, *, name: str | None = None, is_error: bool = False, **fields: Any
    ) -> Message:
        """Store what came of a call: it joins the latest earlier unanswered call of that id."""
        answer = {"tool_call_id": tool_call_id, "content": result, "name": name, "is_error": is_error or None}
        return await self._persist({"role": "tool", **answer, **fields})

    async def _persist(self, fields: dict[str, Any]) -> Message:
        fields.setdefault("agent_id", self._agent_id)
        return await self._middleware.persist_message({"thread_id": self.thread_id, **fields})


def _split(event: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """The fields of a message, and its thread."""
    if not isinstance(cast("Any", event), Mapping):
        raise BadRequest("a message's event is a mapping with thread_id, role and content")
    fields = dict(event)
    ids = [fields.pop(name, None) for name in _THREAD]
    thread_id = next((each for each in ids if each), None)
    if thread_id is None or "role" not in fields:
        raise BadRequest("a message's event has thread_id, role and content")
    return fields, str(thread_id)


def _usage(value: Any) -> TokenUsage | None:
    if value is None or isinstance(value, TokenUsage):
        return value
    try:
        return TokenUsage(**value)
    except TypeError as error:
        raise BadRequest(f"token_usage has prompt, completion and total: {error}") from error
