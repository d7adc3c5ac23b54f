"""Sessions as agents use them: threads that are created, talked to, read, forked and listed."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias
from uuid import UUID

from kvpersist.agents.records import Message, Session
from kvpersist.agents.runs.ensure import default_title, ensure_session
from kvpersist.agents.runs.given import Given
from kvpersist.agents.runs.middleware import PersistenceMiddleware
from kvpersist.agents.runs.model_messages import Style, model_messages, system_text
from kvpersist.agents.runs.runs import StoredAgent
from kvpersist.errors import BadOption, BadRequest

if TYPE_CHECKING:
    from kvpersist.agents.persistence import Persistence

__all__ = ["ThreadContext", "ThreadManager"]

_Sessions: TypeAlias = list[Session]  # in the class below, `list` is a method
_Messages: TypeAlias = list[Message]

_PAGE: Final = 100  # messages read at once
_PREVIEW: Final = 80  # characters


class ThreadContext:
    """A thread and its latest messages, oldest first. Made by `ThreadManager.load_context`.

    Attributes:
        thread: the session.
        messages: those that were asked for.
        total: how many the thread has.
    """

    __slots__ = ("_tools", "messages", "thread", "total")

    def __init__(self, thread: Session, messages: list[Message], total: int, *, tools: bool = True) -> None:
        self.thread = thread
        self.messages = messages
        self.total = total
        self._tools = tools

    @property
    def system(self) -> str | None:
        """What system and developer say, for APIs that take it apart from the messages."""
        return system_text(self.messages)

    def to_llm_messages(self, style: Style = "openai") -> list[dict[str, Any]]:
        """Return the messages as a model's API takes them; as `model_messages`."""
        return model_messages(self.messages, style, tools=self._tools)

    def summary(self) -> str:
        """Return four lines: title, how many messages, by whom, and how the last one begins."""
        roles: dict[str, int] = {}
        for message in self.messages:
            roles[message.role] = roles.get(message.role, 0) + 1
        last = self.messages[-1] if self.messages else None
        text = "" if last is None else " ".join(last.content.split() if isinstance(last.content, str) else [])
        cut = text if len(text) <= _PREVIEW else f"{text[: _PREVIEW - 1]}…"
        return "\n".join(
            (
                f"Thread: {self.thread.title or self.thread.id}",
                f"Messages: {len(self.messages)} of {self.total}",
                f"Roles: {', '.join(f'{role} {count}' for role, count in roles.items()) or 'none'}",
                f"Last: {'none' if last is None else f'{last.role}: {cut}'.rstrip()}",
            )
        )


class ThreadManager:
    """The threads of one namespace, ``db.threads``; with an agent of its own: ``ThreadManager(db, agent)``."""

    def __init__(self, db: Persistence, agent: Any = None, **settings: Any) -> None:
        """``settings``: those of `with_storage`, for `send`."""
        self._db = db
        self._settings = settings
        self._agent = None if agent is None else StoredAgent(agent, db, **settings)

    def agent(self, agent: Any, **settings: Any) -> StoredAgent:
        """Put storage round an agent, as `with_storage` does; here also for programs that block."""
        return StoredAgent(agent, self._db, **{**self._settings, **settings})

    def middleware(self, **settings: Any) -> PersistenceMiddleware:
        """Return a `PersistenceMiddleware` of this store; here also for programs that block."""
        return PersistenceMiddleware(self._db, **settings)

    async def create(self, *, title: str | None = None, **fields: Any) -> Session:
        """Create a thread; the title is ``Conversation`` and the local time, by default. As ``db.sessions.create``."""
        return await self._db.sessions.create(title=title or default_title(self._db._all.now()), **fields)

    async def get_or_create(self, thread_id: str | UUID, *, user_id: str | None = None, **fields: Any) -> Session:
        """Return the thread of this id, created with these fields where there is none; two at once get the same.

        Raises:
            BadRequest: it belongs to another user than ``user_id``.
        """
        return (await ensure_session(self._db, thread_id, user_id=user_id, **fields))[0]

    async def send(
        self,
        thread_id: str | UUID,
        message: Given,
        *,
        agent: Any = None,
        user_id: str | None = None,
        load_history: bool | None = None,
        max_history_messages: int | None = None,
    ) -> Any:
        """Say something in a thread that is there, and return what the agent returned. As `StoredAgent.run`.

        Args:
            agent: by default that of the manager.

        Raises:
            BadRequest: there is no agent. ParentGone: there is no such thread.
        """
        stored = self._agent if agent is None else self.agent(agent)
        if stored is None:
            raise BadRequest("nobody to send it to: pass agent=, or make a ThreadManager(db, agent)")
        await ensure_session(self._db, thread_id, create=False, user_id=user_id)
        return await stored.run(
            message,
            thread_id=thread_id,
            user_id=user_id,
            load_history=load_history,
            max_history_messages=max_history_messages,
        )

    async def history(self, thread_id: str | UUID) -> _Messages:
        """Return all messages of a thread in order; none where there is no such thread."""
        return [message async for message in self._db.messages.iterate(thread_id)]

    async def load_context(
        self,
        thread_id: str | UUID,
        *,
        message_limit: int = 50,
        include_tool_messages: bool = True,
        filter: Callable[[Message], bool] | None = None,
    ) -> ThreadContext:
        """Return a thread and the latest messages of it.

        Args:
            message_limit: how many, after the others were left out.
            include_tool_messages: False leaves out results of tools, and messages that do nothing but call them.
            filter: only messages for which it is true.

        Raises:
            ParentGone: there is no such thread.
        """
        if message_limit < 0:
            raise BadOption("message_limit", f"{message_limit!r} is no number of messages: use 0 or more")
        session, _ = await ensure_session(self._db, thread_id, create=False)
        found: _Messages = []
        async for message in self._backwards(str(thread_id), message_limit):
            if not include_tool_messages and _is_tools(message):
                continue
            if filter is None or filter(message):
                found.append(message)
                if len(found) == message_limit:
                    break
        total = await self._db.messages.count(thread_id)
        return ThreadContext(session, found[::-1], total, tools=include_tool_messages)

    async def list(
        self,
        limit: int = 20,
        offset: int = 0,
        *,
        order: Literal["desc", "asc"] = "desc",
        **where: Any,
    ) -> _Sessions:
        """Return threads by the time of their creation, newest first; ``user_id=`` and others as ``db.sessions.find``.

        ``order="asc"`` reads all that there are.
        """
        if limit < 0 or offset < 0 or order not in ("asc", "desc"):
            raise BadRequest("limit and offset are 0 or more, order is desc or asc")
        if order == "asc":
            every = [session async for session in self._db.sessions.iterate(**where)]
            return every[::-1][offset : offset + limit]
        if limit == 0:
            return []
        return (await self._db.sessions.find(limit=offset + limit, **where))[offset:]

    async def fork(
        self,
        thread_id: str | UUID,
        *,
        title: str | None = None,
        message_limit: int | None = 50,
        at: int | str | UUID | None = None,
        **fields: Any,
    ) -> Session:
        """Make a thread that begins with the latest messages of this one, and return it. As ``db.sessions.fork``.

        Args:
            title: ``Fork of`` and the thread's title, by default.
            message_limit: how many messages are copied, the latest; None: all. Answers of tools whose
                calls would not be copied are left out where they come first.
            at: the last one, by number or id, in place of the thread's last.

        Raises:
            ParentGone: there is no such thread. BadRequest: no message of it has that id.
        """
        session, _ = await ensure_session(self._db, thread_id, create=False)
        after = 0
        if message_limit is not None:
            if message_limit < 0:
                raise BadOption("message_limit", f"{message_limit!r} is no number of messages: use 0 or more")
            at = await self._number(session.id, at)
            after = await self._begin(session.id, at, message_limit)
        title = title or f"Fork of {session.title or session.id}"
        [fork] = await self._db.sessions.fork(session.id, at=at, after=after, title=title, **fields)
        return fork

    async def delete(self, thread_id: str | UUID) -> bool:
        """Delete a thread with everything that belongs to it; False where there was none."""
        return await self._db.sessions.delete(thread_id)

    async def _number(self, thread_id: str, at: int | str | UUID | None) -> int:
        """The number of the last message that is copied."""
        if isinstance(at, int):
            return at
        if at is None:
            last = await self._db.messages.last(thread_id, 1)
            return last[0].number if last else 0
        message = await self._db.messages.get(at)
        if message is None or message.session_id != thread_id:
            raise BadRequest(f"session {thread_id!r} has no message {str(at)!r}")
        return message.number

    async def _begin(self, thread_id: str, last: int, limit: int) -> int:
        """The number behind which the latest ``limit`` messages up to ``last`` begin, answers without calls aside."""
        if limit == 0:
            return last
        found = await self._db.messages.range(thread_id, before=last + 1, limit=limit, reverse=True)
        if len(found) < limit:
            return 0
        first = next((message for message in reversed(found) if message.role != "tool"), None)
        return last if first is None else first.number - 1

    async def _backwards(self, thread_id: str, limit: int) -> AsyncIterator[Message]:
        before: int | None = None
        while limit:
            page = await self._db.messages.range(thread_id, before=before, limit=_PAGE, reverse=True)
            for message in page:
                yield message
            if len(page) < _PAGE:
                return
            before = page[-1].number


def _is_tools(message: Message) -> bool:
    return message.role == "tool" or bool(message.tool_calls and not message.content)
