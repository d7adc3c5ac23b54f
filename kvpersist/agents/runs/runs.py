"""An agent's run, kept: earlier messages go to the agent, and the turn that comes of it is stored.

A turn is what was said to the agent and what it answered, with its calls and their results. It is
written when the run has ended, as one batch: runs that go on at once on one session each leave a
turn without gaps. Of a run that fails, what was said is kept, marked with the error.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncGenerator, Callable
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias
from uuid import UUID

import msgspec

from kvpersist.agents.conversations.items import checked
from kvpersist.agents.records import Message, new_id
from kvpersist.agents.runs.answers import Answer, Extract
from kvpersist.agents.runs.calling import AgentThread, Caller, RunContext
from kvpersist.agents.runs.ensure import check_owner, ensure_session
from kvpersist.agents.runs.given import Given, read_messages
from kvpersist.agents.runs.model_messages import STYLES, Style, model_messages
from kvpersist.agents.runs.streams import StoredStream, StoredTurn
from kvpersist.errors import BadOption, BadRequest

if TYPE_CHECKING:
    from kvpersist.agents.persistence import Persistence

__all__ = [
    "HistoryStyle",
    "OnMessage",
    "StoredAgent",
    "continue_thread",
    "notify",
    "stream_continue_thread",
    "with_storage",
]

HistoryStyle: TypeAlias = Style | Literal["records"]
"""How earlier messages are given to an agent: as a model's API takes them, or as `Message`."""

OnMessage: TypeAlias = Callable[[Message], Any]
"""Is called, and awaited where it returns an awaitable, with each message once it is stored."""

_LIMIT: Final = 50
_ERROR: Final = 2_000  # characters of an error's text that are kept


class _Options(msgspec.Struct, frozen=True):
    """Of one run."""

    thread_id: str
    is_new: bool  # nobody can have made that session
    user_id: str | None
    title: str | None
    history: int  # messages at most


class StoredAgent:
    """An agent whose turns are kept. Made by `with_storage`."""

    def __init__(
        self,
        agent: Any,
        db: Persistence,
        *,
        auto_save: bool = True,
        auto_load_history: bool = True,
        max_history_messages: int = _LIMIT,
        auto_create_thread: bool = True,
        keep_partial: bool = True,
        agent_id: str | None = None,
        history_style: HistoryStyle = "openai",
        extract: Extract | None = None,
        extract_chunk: Extract | None = None,
        on_message: OnMessage | None = None,
    ) -> None:
        if history_style not in (*STYLES, "records"):
            raise BadOption("history_style", f"{history_style!r} is unknown: use one of {', '.join(STYLES)}, records")
        self._caller = Caller(agent)
        if not hasattr(db, "_all"):
            raise BadRequest(
                "this needs what kvpersist.open gives, not the blocking kind: there, call "
                "db.threads.send(thread_id, message, agent=agent)"
            )
        self._db = db
        self._saves, self._loads = auto_save, auto_load_history
        self._limit = _limit(max_history_messages)
        self._creates, self._keeps_partial = auto_create_thread, keep_partial
        self._agent_id = agent_id
        self._style: HistoryStyle = history_style
        self._extract, self._extract_chunk = extract, extract_chunk
        self._on_message = on_message

    async def run(
        self,
        message: Given,
        *,
        thread_id: str | UUID | None = None,
        user_id: str | None = None,
        thread_title: str | None = None,
        load_history: bool | None = None,
        max_history_messages: int | None = None,
    ) -> Any:
        """Run the agent on a message and return what it returned; arguments and errors as for `turn`."""
        turn = await self.turn(
            message,
            thread_id=thread_id,
            user_id=user_id,
            thread_title=thread_title,
            load_history=load_history,
            max_history_messages=max_history_messages,
        )
        return turn.result

    async def turn(
        self,
        message: Given,
        *,
        thread_id: str | UUID | None = None,
        user_id: str | None = None,
        thread_title: str | None = None,
        load_history: bool | None = None,
        max_history_messages: int | None = None,
    ) -> StoredTurn:
        """Run the agent on a message and return what came of it, as it was stored.

        Args:
            message: a text, a list of parts, a `Message` or a mapping of its fields, or several of these,
                such as the results of calls that were approved; the agent gets the content of the last.
            thread_id: the session; created where there is none, by default a new one.
            user_id: whose session it is; its owner where it is created.
            thread_title: its title where it is created; by default ``Conversation`` and the local time.
            load_history: whether the agent gets the earlier messages, as `with_storage` was told.
            max_history_messages: how many of them, the latest.

        Raises:
            ParentGone: there is no such session, and it may not be created, or it was deleted meanwhile.
            BadRequest: of the message, of a session of another user, of a result that is not understood, or
                of ``load_history=True`` with an agent that takes none.
            Whatever the agent raises, after the message was stored with the error.
        """
        inputs = read_messages(message)
        options = self._options(thread_id, user_id, thread_title, load_history, max_history_messages, streaming=False)
        turn = StoredTurn(options.thread_id)
        async for _ in self._perform(inputs, options, turn, streaming=False):
            pass
        return turn

    def stream(
        self,
        message: Given,
        *,
        thread_id: str | UUID | None = None,
        user_id: str | None = None,
        thread_title: str | None = None,
        load_history: bool | None = None,
        max_history_messages: int | None = None,
    ) -> StoredStream:
        """Run the agent on a message and give its chunks, unchanged; arguments and errors as for `turn`.

        An agent that answers as a whole gives one chunk, the text of its answer. If the stream is left
        before its end, the message is stored as failed, with what was said until then as a partial answer.
        """
        inputs = read_messages(message)
        options = self._options(thread_id, user_id, thread_title, load_history, max_history_messages, streaming=True)
        turn = StoredTurn(options.thread_id)
        return StoredStream(self._db._ending, self._perform(inputs, options, turn, streaming=True), turn)

    # ---- private

    def _options(
        self,
        thread_id: str | UUID | None,
        user_id: str | None,
        title: str | None,
        load_history: bool | None,
        limit: int | None,
        *,
        streaming: bool,
    ) -> _Options:
        takes = self._caller.takes_history(streaming=streaming)
        if load_history and not takes:
            raise BadRequest("the agent takes no history: give it a parameter history, messages or context")
        loads = takes and (self._loads if load_history is None else load_history)
        limit = self._limit if limit is None else _limit(limit)
        new = thread_id is None
        return _Options(new_id() if new else str(thread_id), new, user_id, title, limit if loads else 0)

    async def _perform(
        self, inputs: list[Message], options: _Options, turn: StoredTurn, *, streaming: bool
    ) -> AsyncGenerator[Any]:
        inputs = checked(inputs, options.thread_id, self._db._all.now())
        for message in inputs:  # what cannot be kept is refused before the agent runs
            self._db._all.messages._codec.encode(message.id, message)
        context = await self._prepared(inputs, options)
        answer = Answer(self._extract, self._extract_chunk)
        try:
            async with AgentThread() as thread:
                result = await self._caller.start(inputs[-1].content, context, thread, streaming=streaming)
                chunks = thread.chunks(result)
                if chunks is None:
                    turn.result = result
                    answer.take_result(result)
                    if streaming and answer.text:
                        yield answer.text
                else:
                    async for chunk in chunks:
                        answer.take(chunk)
                        yield chunk
                    turn.result = answer.text
        except BaseException as error:  # a cancelled run and a stream that is left have failed, too
            if isinstance(error, GeneratorExit) and answer.finished:
                await self._save(turn, options, inputs, answer)
            else:
                await self._save_failed(turn, options, inputs, answer, error)
            raise
        await self._save(turn, options, inputs, answer)

    async def _prepared(self, inputs: list[Message], options: _Options) -> RunContext:
        """Make sure of the session, and read the latest messages."""
        if self._saves or not (self._creates or options.is_new):
            await ensure_session(
                self._db,
                options.thread_id,
                create=self._saves and (self._creates or options.is_new),
                user_id=options.user_id,
                title=options.title,
                agent_id=self._agent_id,
            )
        elif (session := await self._db.sessions.get(options.thread_id)) is not None:
            check_owner(session, options.user_id)
        limit = 0 if options.is_new else options.history
        history = await self._db.messages.last(options.thread_id, limit) if limit else []
        if self._style == "records":
            return RunContext(options.thread_id, options.user_id, [*history], [*history, *inputs])
        answers = [each for each in inputs if each.role == "tool"]  # without them, what they answer would be left out
        before = model_messages([*history, *answers], self._style)
        after = model_messages([*history, *inputs], self._style)
        return RunContext(options.thread_id, options.user_id, before, after)

    async def _save(self, turn: StoredTurn, options: _Options, inputs: list[Message], answer: Answer) -> None:
        try:
            await self._append(turn, options, [*inputs, *answer.messages()])
        except BadRequest as error:  # something in the answer cannot be kept, and nothing was
            if not turn.messages:
                await self._save_failed(turn, options, inputs, Answer(), error)
            raise

    async def _save_failed(
        self,
        turn: StoredTurn,
        options: _Options,
        inputs: list[Message],
        answer: Answer,
        error: BaseException,
    ) -> None:
        """Store what was said, with the error, and the partial answer; if that fails, the error says so."""
        marked = next((at for at in reversed(range(len(inputs))) if inputs[at].role == "user"), len(inputs) - 1)
        failed = [
            msgspec.structs.replace(each, error=_described(error)) if at == marked else each
            for at, each in enumerate(inputs)
        ]
        partial = answer.messages(partial=True) if self._keeps_partial else []
        try:
            try:
                await self._append(turn, options, [*failed, *partial])
            except BadRequest:
                if turn.messages or not partial:
                    raise
                await self._append(turn, options, failed)
        except Exception as failure:  # the run's own error goes on, and says this
            if isinstance(error, GeneratorExit):  # whoever left the stream does not get to see that one
                raise
            error.add_note(f"and the failed turn was not stored: {failure!r}")

    async def _append(self, turn: StoredTurn, options: _Options, messages: list[Message]) -> None:
        if not self._saves:
            return
        for message in messages:
            if message.role == "user":
                message.user_id = message.user_id or options.user_id
            elif message.role in ("assistant", "tool"):
                message.agent_id = message.agent_id or self._agent_id
        turn.messages = await self._db.messages.append_many(options.thread_id, messages)
        for message in turn.messages:
            await notify(self._on_message, message)


def with_storage(
    agent: Any,
    db: Persistence,
    *,
    auto_save: bool = True,
    auto_load_history: bool = True,
    max_history_messages: int = _LIMIT,
    auto_create_thread: bool = True,
    keep_partial: bool = True,
    agent_id: str | None = None,
    history_style: HistoryStyle = "openai",
    extract: Extract | None = None,
    extract_chunk: Extract | None = None,
    on_message: OnMessage | None = None,
) -> StoredAgent:
    """Put storage round an agent: its runs get the earlier messages, and leave their turns.

    The agent is a function, or an object with ``run``, ``chat``, ``send`` or ``stream``, sync or async.
    The message goes to its first parameter, or with the earlier ones to one named ``messages``;
    ``history``, ``session_id``, ``thread_id`` and ``user_id`` to parameters of these names; all of that
    as a mapping to ``context`` or ``options``, or to a second parameter of any name that must be given.
    An agent with none of these gets the message alone. What blocks runs in a thread of its own; a run
    that is cancelled does not wait for that thread.

    Args:
        auto_save: store the turns.
        auto_load_history: read the earlier messages for the agent.
        max_history_messages: how many, the latest, in chronological order.
        auto_create_thread: create the session that a run names where it is missing.
        keep_partial: of a run that fails, keep the answer as far as it came, marked ``partial``.
        agent_id: noted with new sessions and with answers.
        history_style: ``"openai"``, ``"anthropic"``, or ``"records"`` for `Message`. In the first two,
            calls without answer and answers without call are left out, as `model_messages` does.
        extract: makes of a result what is accepted: a text, something with ``content`` or ``message``
            and ``tool_calls``, a `Message`, or a list of them.
        extract_chunk: the same of a chunk: a text or a mapping; None where there is nothing in it.
        on_message: is called, and awaited, with each message once its turn is stored; an error of it is
            raised by the run.

    Raises:
        BadRequest: that is no agent, or it has a parameter that nothing fills. BadOption: of a setting.
    """
    return StoredAgent(
        agent,
        db,
        auto_save=auto_save,
        auto_load_history=auto_load_history,
        max_history_messages=max_history_messages,
        auto_create_thread=auto_create_thread,
        keep_partial=keep_partial,
        agent_id=agent_id,
        history_style=history_style,
        extract=extract,
        extract_chunk=extract_chunk,
        on_message=on_message,
    )


async def continue_thread(
    agent: Any,
    db: Persistence,
    thread_id: str | UUID,
    message: Given,
    *,
    load_history: bool = True,
    message_limit: int = _LIMIT,
    persist_messages: bool = True,
    user_id: str | None = None,
    **settings: Any,
) -> Any:
    """Run an agent on a message to a session that is there, and return what it returned.

    Args:
        load_history: give the agent the latest ``message_limit`` messages.
        persist_messages: store the turn.
        settings: others of `with_storage`.

    Raises:
        As `StoredAgent.turn`; ParentGone: there is no such session.
    """
    stored = _continuing(agent, db, load_history, message_limit, persist_messages, settings)
    return await stored.run(message, thread_id=thread_id, user_id=user_id)


def stream_continue_thread(
    agent: Any,
    db: Persistence,
    thread_id: str | UUID,
    message: Given,
    *,
    load_history: bool = True,
    message_limit: int = _LIMIT,
    persist_messages: bool = True,
    user_id: str | None = None,
    **settings: Any,
) -> StoredStream:
    """As `continue_thread`, and give the chunks of the answer; `ParentGone` comes with the first."""
    stored = _continuing(agent, db, load_history, message_limit, persist_messages, settings)
    return stored.stream(message, thread_id=thread_id, user_id=user_id)


def _continuing(
    agent: Any, db: Persistence, load_history: bool, limit: int, persist: bool, settings: dict[str, Any]
) -> StoredAgent:
    try:
        return StoredAgent(
            agent,
            db,
            auto_save=persist,
            auto_load_history=load_history,
            max_history_messages=limit,
            auto_create_thread=False,
            **settings,
        )
    except TypeError as error:
        raise BadRequest(f"{error}: see with_storage for the settings there are") from error


async def notify(callback: Callable[[Any], Any] | None, record: Any) -> None:
    """Call a callback, if there is one, with a record that is stored, and await it where that is possible."""
    if callback is not None:
        answer = callback(record)
        if inspect.isawaitable(answer):
            await answer


def _limit(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise BadOption("max_history_messages", f"{value!r} is no number of messages: use 0 or more")
    return value


def _described(error: BaseException) -> str:
    if isinstance(error, GeneratorExit):
        return "the stream was left before its end"
    if isinstance(error, asyncio.CancelledError):
        return "the run was cancelled"
    text = str(error)
    return (f"{type(error).__name__}: {text}" if text else type(error).__name__)[:_ERROR]
