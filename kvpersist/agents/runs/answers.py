"""What an agent answers, read from its results and chunks, as the messages of a turn.

Messages stand in the order model APIs want them in: an assistant's message with its calls, the
results of these calls, and then what the assistant said about them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final, TypeAlias, cast

import msgspec

from kvpersist.agents.records import Message, ToolCallPart, new_id
from kvpersist.errors import BadRequest

__all__ = ["Answer", "Extract", "read_tool_call"]

Extract: TypeAlias = Callable[[Any], Any]
"""Makes of what an agent returned, or of one chunk, something that is accepted; None leaves a chunk out."""

_MISSING: Final = object()
_EMPTY: Final[tuple[Any, ...]] = (None, "", [])
_PLAIN: Final = (str, list, tuple, bool, int, float, bytes, bytearray, set, frozenset, type)
_IDS: Final = ("tool_call_id", "toolCallId", "tool_use_id", "call_id", "id")
_TEXT: Final = frozenset(("content", "content_delta", "text", "text_delta"))
_CALL: Final = frozenset(("tool_call", "tool_call_start", "tool_call_end", "tool_use"))
_ARGUMENTS: Final = frozenset(("tool_call_delta", "tool_call_args", "tool_call_arguments"))
_RESULT: Final = frozenset(("tool_result", "tool_call_result", "tool_output"))
_END: Final = frozenset(("finish", "done", "end", "complete"))


class _Step:
    """One assistant's message in the making, and the results of its calls."""

    __slots__ = ("calls", "content", "response_type", "results")

    def __init__(self, content: Any = None) -> None:
        self.content = content
        self.response_type: str | None = None
        self.calls: list[ToolCallPart] = []
        self.results: list[Message] = []


class Answer:
    """Collects what comes of a run, whole or chunk by chunk.

    Attributes:
        finished: the agent said that it is done, or returned: nothing is missing.
    """

    def __init__(self, extract: Extract | None = None, extract_chunk: Extract | None = None) -> None:
        self._extract, self._extract_chunk = extract, extract_chunk
        self._steps: list[_Step] = []
        self._messages: list[Message] = []  # of an extractor that makes messages itself
        self.finished = False

    @property
    def text(self) -> str:
        """The texts of all that was said, one after the other."""
        said = [step.content for step in self._steps] + [message.content for message in self._messages]
        return "".join(content for content in said if isinstance(content, str))

    def messages(self, *, partial: bool = False) -> list[Message]:
        """Return the answer as messages; ``partial`` marks the last thing said as cut before its end."""
        made: list[Message] = []
        said: Message | None = None
        for step in self._steps:
            if step.calls or step.content not in _EMPTY:
                kind = step.response_type
                said = Message(
                    role="assistant",
                    content=step.content,
                    tool_calls=list(step.calls) or None,
                    metadata=None if kind is None else {"response_type": kind},
                )
                made.append(said)
            made += step.results
        made += self._messages
        if partial and said is not None:
            said.partial = True
        return made

    def take_result(self, result: Any) -> None:
        """Take what a run returned: a text, or something with ``content`` or ``message`` and ``tool_calls``.

        Raises:
            BadRequest: it is nothing of the kind.
        """
        self._whole(result if self._extract is None else self._extract(result))
        self.finished = True

    def take(self, chunk: Any) -> None:
        """Take one chunk: a text, ``{"type": "content", "delta": ...}`` or a tool event; others are left out."""
        if self._extract_chunk is not None:
            chunk = self._extract_chunk(chunk)
        if isinstance(chunk, str):
            self._say(chunk)
        elif chunk is not None and not isinstance(chunk, _PLAIN):
            self._event(chunk)

    # ---- whole results

    def _whole(self, result: Any) -> None:
        if result is None:
            return
        if isinstance(result, str):
            self._steps.append(_Step(result))
        elif isinstance(result, Message):
            self._messages.append(result)
        elif isinstance(result, list | tuple):
            items = cast("list[Any] | tuple[Any, ...]", result)
            if not all(isinstance(each, Message) for each in items):
                raise _unknown(cast("object", result))
            self._messages += items
        else:
            self._response(result)

    def _response(self, result: Any) -> None:
        kind: Any = None
        content, said = _field(result, "content"), _field(result, "message")
        calls, results = _calls(result), _results(result)
        if content is _MISSING:
            kind = _field(result, "type")
        if content is _MISSING and said is not _MISSING:
            content = said
            if not isinstance(said, str | list | None):
                content = _field(cast("object", said), "content")
                calls, results = calls or _calls(said), results or _results(said)
        if content is _MISSING:
            content = None
            if not calls and not results:
                if not isinstance(result, Mapping):
                    raise _unknown(result)
                content = _json(cast("object", result))
        for call, part in [(call, self._asks(call)) for call in calls]:
            self._answer_within(call, part)
        for answer in results:
            self._answer(answer)
        if self._steps and not self._steps[-1].results:
            self._steps[-1].content = content  # nothing is known yet that it could be said about
        else:
            self._steps.append(_Step(content))
        if isinstance(kind, str):
            self._steps[-1].response_type = kind

    # ---- chunks

    def _event(self, chunk: Any) -> None:
        kind = _field(chunk, "type")
        name = kind.replace("-", "_").replace(".", "_").lower() if isinstance(kind, str) else None
        if name is None or name in _TEXT:
            delta = _field(chunk, "delta", "content", "text")
            if delta is not _MISSING and not isinstance(delta, str):
                delta = _field(delta, "text")
            if isinstance(delta, str):
                self._say(delta)
        elif name in _CALL:
            self._call(_inner(chunk, "tool_call", "toolCall", "call"))
        elif name in _ARGUMENTS:
            self._more_arguments(_inner(chunk, "tool_call", "toolCall", "call"))
        elif name in _RESULT:
            self._answer(_inner(chunk, "tool_result", "toolResult"))
        elif name in _END:
            result = _field(chunk, "result", "response")
            if result is not _MISSING and not self._steps:
                self._whole(result)
            self.finished = True

    def _say(self, delta: str) -> None:
        step = self._open()
        step.content = delta if step.content is None else step.content + delta

    def _open(self) -> _Step:
        """The step that is added to: a new one where the calls of the last are being answered."""
        if not self._steps or self._steps[-1].results:
            self._steps.append(_Step())
        return self._steps[-1]

    def _call(self, value: Any) -> None:
        """Note a call; of one that was asked for already, and has no result yet, what there is to add."""
        id_ = _field(value, *_IDS)
        known = self._asked(id_) if isinstance(id_, str) else None
        if known is None:
            if _name_of(value) is None and self._asked(id_, open_=False) is not None:
                return  # the end of a call that has its result
            known = self._asks(value)
        elif (arguments := _field(value, "arguments", "args", "input")) is not _MISSING:
            known.arguments = arguments
        self._answer_within(value, known)

    def _asks(self, value: Any) -> ToolCallPart:
        part = read_tool_call(value)
        self._open().calls.append(part)
        return part

    def _answer_within(self, value: Any, part: ToolCallPart) -> None:
        """Note the result that a call brings along, if it does."""
        if _field(value, "result", "output") is not _MISSING or _failed(value):
            self._answer(value, part.id)

    def _more_arguments(self, value: Any) -> None:
        id_, delta = _field(value, *_IDS), _field(value, "delta", "arguments", "args")
        known = self._asked(id_) if isinstance(id_, str) else None
        if known is not None and isinstance(delta, str):
            known.arguments = delta if known.arguments is None else f"{known.arguments}{delta}"

    def _asked(self, id_: str, *, open_: bool = True) -> ToolCallPart | None:
        """The last call of that id; ``open_``: only where it has no result."""
        for step in reversed(self._steps):
            asked = [call for call in step.calls if call.id == id_]
            if asked and (not open_ or len(asked) > sum(each.tool_call_id == id_ for each in step.results)):
                return asked[-1]
        return None

    def _answer(self, value: Any, id_: Any = None) -> None:
        id_ = id_ or _field(value, *_IDS)
        if not isinstance(id_, str):
            raise BadRequest("a tool's result has no tool_call_id: name the call, or pass extract= or extract_chunk=")
        result, failed = _field(value, "result", "output", "content"), _failed(value)
        if isinstance(result, Mapping) and cast("Mapping[str, Any]", result).get("success") is False:
            failed = True
        if result is _MISSING:
            error = _field(value, "error")
            result = None if isinstance(error, bool) or error is _MISSING else error
        if isinstance(result, BaseException):
            result = str(result) or type(result).__name__
        name = _field(value, "name", "tool_name", "toolName")
        for step in reversed(self._steps):
            asked = [call for call in step.calls if call.id == id_]
            if len(asked) > sum(each.tool_call_id == id_ for each in step.results):
                step.results.append(_tool_message(id_, asked[0].name, result, failed))
                return
        if self._asked(id_, open_=False) is None:  # else it was told twice
            step = _Step()  # it answers a call of an earlier turn
            step.results.append(_tool_message(id_, name if isinstance(name, str) else None, result, failed))
            self._steps.append(step)


def read_tool_call(value: Any) -> ToolCallPart:
    """Return a call in any of the accepted forms: ours, OpenAI's with ``function``, or one flat object.

    Raises:
        BadRequest: it has no name.
    """
    if isinstance(value, ToolCallPart):
        return ToolCallPart(value.id or _made_id(), value.name, value.arguments)
    name = _name_of(value)
    if name is None:
        raise BadRequest("a tool call has no name: give id, name and arguments, or pass extract= or extract_chunk=")
    function = _field(value, "function")
    asked = value if function is _MISSING or isinstance(function, str) else function
    arguments, id_ = _field(asked, "arguments", "args", "input"), _field(value, *_IDS)
    return ToolCallPart(
        id_ if isinstance(id_, str) and id_ else _made_id(), name, None if arguments is _MISSING else arguments
    )


def _name_of(value: Any) -> str | None:
    function = _field(value, "function")
    asked = value if function is _MISSING or isinstance(function, str) else function
    name = function if isinstance(function, str) else _field(asked, "name", "tool_name", "toolName", "tool")
    return name if isinstance(name, str) and name else None


def _failed(value: Any) -> bool:
    """Whether it says that something went wrong; an error that is empty says nothing."""
    return _field(value, "is_error", "isError") is True or _field(value, "error") not in (_MISSING, False, "")


def _made_id() -> str:
    return f"call_{new_id()}"


def _tool_message(id_: str, name: str | None, content: Any, failed: bool) -> Message:
    return Message(role="tool", content=content, tool_call_id=id_, name=name, is_error=failed or None)


def _calls(value: Any) -> list[Any]:
    return _listed(value, "tool_calls", "toolCalls")


def _results(value: Any) -> list[Any]:
    return _listed(value, "tool_results", "toolResults")


def _listed(value: Any, *names: str) -> list[Any]:
    found = _field(value, *names)
    if found is _MISSING:
        return []
    if not isinstance(found, list | tuple):
        raise BadRequest(f"{names[0]} is a list, not {type(found).__name__}: pass extract= to read other results")
    return list(cast("list[Any]", found))


def _inner(chunk: Any, *names: str) -> Any:
    found = _field(chunk, *names)
    return chunk if found is _MISSING or isinstance(found, str) else found


def _field(value: Any, *names: str) -> Any:
    """The first of these that is there and not None, of a mapping or an object."""
    if value is None or isinstance(value, _PLAIN):
        return _MISSING
    for name in names:
        found = cast("Mapping[str, Any]", value).get(name) if isinstance(value, Mapping) else getattr(value, name, None)
        if found is not None and not (callable(found) and not isinstance(value, Mapping)):
            return found
    return _MISSING


def _json(result: object) -> str:
    try:
        return msgspec.json.encode(result).decode()
    except (TypeError, ValueError) as error:
        raise _unknown(result) from error


def _unknown(result: object) -> BadRequest:
    return BadRequest(
        f"an agent's result is a text, or has content or message, and tool_calls; {type(result).__name__} has "
        "neither: pass extract= to make one of it"
    )
