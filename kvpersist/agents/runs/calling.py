"""How an agent is called, whatever it is: a function or an object, sync or async, whole or in chunks."""

from __future__ import annotations

import asyncio
import contextvars
import functools
import inspect
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any, Final, NamedTuple, Self, cast

from kvpersist.errors import BadRequest

__all__ = ["AgentThread", "Caller", "RunContext"]

_RUN: Final = ("run", "chat", "send")
_NAMED: Final = ("history", "session_id", "thread_id", "user_id")
_MAPPING: Final = ("context", "options")
_END: Final = object()


class RunContext(NamedTuple):
    """What an agent is called with beside the new message.

    ``history`` are the earlier messages, ``messages`` the same and the new ones.
    """

    thread_id: str
    user_id: str | None
    history: list[Any]
    messages: list[Any]

    def named(self, name: str) -> Any:
        """The value of a parameter of that name."""
        return self.thread_id if name == "session_id" else getattr(self, name)

    def mapping(self) -> dict[str, Any]:
        """The whole as one argument."""
        return {"session_id": self.thread_id, "user_id": self.user_id, "history": self.history}


class Caller:
    """Calls one agent, with as much as it takes."""

    def __init__(self, agent: Any) -> None:
        """Raise `BadRequest` where it is no agent, or wants what nobody has."""
        methods = [getattr(agent, name, None) for name in _RUN]
        run = next((method for method in methods if callable(method)), None)
        stream = getattr(agent, "stream", None)
        stream = stream if callable(stream) else None
        whole = run or (agent if callable(agent) else None)
        first, second = whole or stream, stream or whole
        if isinstance(agent, type) or first is None or second is None:
            name = agent.__name__ if isinstance(agent, type) else type(agent).__name__
            raise BadRequest(f"an agent is a callable, or has run, chat, send or stream; {name} is none")
        self._run = _Function(first)
        self._stream = self._run if second is first else _Function(second)

    def takes_history(self, *, streaming: bool) -> bool:
        """Whether there is a parameter that the earlier messages go to."""
        return (self._stream if streaming else self._run).takes_history

    async def start(self, message: Any, context: RunContext, thread: AgentThread, *, streaming: bool) -> Any:
        """Call the agent; return what it returned, awaited where it is awaitable. ``thread`` runs what blocks."""
        function = self._stream if streaming else self._run
        arguments, named = function.arguments(message, context)
        if function.is_async:
            result = function.function(*arguments, **named)
        else:
            result = await thread.run(functools.partial(function.function, *arguments, **named))
        return await result if inspect.isawaitable(result) else result


class _Function:
    """One way to call an agent, and which arguments go where."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.is_async = _is_async(function)
        self.takes_history = False
        self._positional: list[str] = []
        self._named: dict[str, str] = {}
        try:
            parameters = list(inspect.signature(function).parameters.values())
        except (TypeError, ValueError):  # built in: it does not say what it takes
            self._positional.append("message")
            return
        self._bind(parameters)

    def arguments(self, message: Any, context: RunContext) -> tuple[list[Any], dict[str, Any]]:
        """The arguments of one call."""

        def value(what: str) -> Any:
            if what == "message":
                return message
            return context.mapping() if what == "mapping" else context.named(what)

        return [value(what) for what in self._positional], {name: value(what) for name, what in self._named.items()}

    def _bind(self, parameters: list[inspect.Parameter]) -> None:
        kinds = {parameter.kind for parameter in parameters}
        taken = False  # the message has its parameter
        skipped = False  # of those that are given by place alone
        for parameter in parameters:
            if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                continue
            what = None if skipped and parameter.kind is parameter.POSITIONAL_ONLY else self._meant(parameter, taken)
            if what is None:
                if parameter.default is parameter.empty:
                    raise BadRequest(
                        f"nothing fills the agent's parameter {parameter.name!r}: it is called with the message, "
                        f"{', '.join(_NAMED)}; wrap it in a function of these"
                    )
                skipped = skipped or parameter.kind is parameter.POSITIONAL_ONLY
                continue
            taken = taken or what in ("message", "messages")
            if parameter.kind is parameter.POSITIONAL_ONLY:
                self._positional.append(what)
            else:
                self._named[parameter.name] = what
        if not taken:
            if inspect.Parameter.VAR_POSITIONAL not in kinds:
                raise BadRequest("the agent takes no message: its first parameter has to be one")
            self._positional.append("message")
        elif self._named and not self._positional:
            first = next(iter(self._named))
            if parameters[0].name == first and parameters[0].kind is parameters[0].POSITIONAL_OR_KEYWORD:
                self._positional.append(self._named.pop(first))
        if inspect.Parameter.VAR_KEYWORD in kinds and "mapping" not in self._named.values():
            given = {*self._named.values(), *self._positional}
            wanted = ("session_id", "user_id") if "messages" in given else ("history", "session_id", "user_id")
            self._named.update({name: name for name in wanted if name not in given})
        given = {*self._named.values(), *self._positional}
        self.takes_history = not given.isdisjoint(("history", "messages", "mapping"))

    def _meant(self, parameter: inspect.Parameter, taken: bool) -> str | None:
        name = parameter.name
        if name in _NAMED:
            return name
        if name == "messages":
            return "messages"
        if not taken and (parameter.kind is not parameter.KEYWORD_ONLY or name == "message"):
            return "message"
        if name in _MAPPING or (taken and parameter.default is parameter.empty and not self._has_mapping()):
            return None if parameter.kind is parameter.KEYWORD_ONLY and name not in _MAPPING else "mapping"
        return None

    def _has_mapping(self) -> bool:
        return "mapping" in self._positional or "mapping" in self._named.values()


def _is_async(function: Any) -> bool:
    while isinstance(function, functools.partial):
        function = cast("functools.partial[Any]", function).func
    for each in (function, getattr(function, "__call__", None)):  # noqa: B004  # the method, not whether it is there
        if inspect.iscoroutinefunction(each) or inspect.isasyncgenfunction(each):
            return True
    return False


class AgentThread:
    """A thread for one run of an agent that blocks, made when it is first needed.

    All of a run happens in the same thread, one step after the other. The threads of asyncio's own
    pool are not used: agents that wait for each other could take all of them.
    """

    def __init__(self) -> None:
        self._executor: ThreadPoolExecutor | None = None
        self._context = contextvars.copy_context()
        self._closes: Callable[[], Any] | None = None
        self._chunks: Any = None

    async def run(self, function: Callable[[], Any]) -> Any:
        """Return what ``function`` returns in the thread."""
        return await asyncio.wrap_future(self._submit(function))

    def chunks(self, result: Any) -> AsyncIterator[Any] | None:
        """Return an iterator over ``result`` where it comes in chunks, None where it is whole."""
        if hasattr(result, "__aiter__"):
            iterator = cast("AsyncIterable[Any]", result).__aiter__()
            self._chunks = iterator if hasattr(iterator, "aclose") else result
            return iterator
        if hasattr(result, "__next__"):
            self._closes = getattr(result, "close", None)
            self._chunks = steps = self._stepped(result)
            return steps
        return None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close what gives chunks; where that fails while an error is under way, the error says so and goes on."""
        try:
            if (close := getattr(self._chunks, "aclose", None)) is not None:
                await close()
            if self._closes is not None:
                closed = self._submit(self._closes)  # after the step that it is at, however long that takes
                if not isinstance(error, asyncio.CancelledError):
                    await asyncio.wrap_future(closed)
        except Exception as failure:  # of the agent's code: it raises anything
            if error is None:
                raise
            error.add_note(f"and closing the agent's stream failed: {failure!r}")
        finally:
            if self._executor is not None:
                self._executor.shutdown(wait=False)

    async def _stepped(self, iterator: Iterator[Any]) -> AsyncIterator[Any]:
        while (chunk := await self.run(functools.partial(next, iterator, _END))) is not _END:
            yield chunk

    def _submit(self, function: Callable[[], Any]) -> Any:
        if self._executor is None:
            self._executor = ThreadPoolExecutor(1, thread_name_prefix="kvpersist-agent")
        return self._executor.submit(self._context.run, _guarded, function)


def _guarded(function: Callable[[], Any]) -> Any:
    try:
        return function()
    except StopIteration as error:  # no future can hold one
        raise RuntimeError("the agent raised StopIteration") from error
