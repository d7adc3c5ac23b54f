"""An agent's todo list: one list per agent, saved as a whole."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from datetime import datetime
from typing import Any, Final, Literal, TypeAlias, get_args
from uuid import UUID

import msgspec

from kvpersist.agents.births import Births, Family
from kvpersist.agents.children import Children
from kvpersist.agents.records import new_id, utc
from kvpersist.driver import ABSENT, Expect
from kvpersist.errors import BadRequest, Conflict, UniqueConflict

__all__ = ["TODO_STATES", "Todo", "TodoList", "TodoStatus", "Todos"]

TodoStatus: TypeAlias = Literal["pending", "in_progress", "completed"]
TODO_STATES: Final = frozenset(get_args(TodoStatus))

_ATTEMPTS: Final = 40  # of a save that keeps losing to others


class Todo(msgspec.Struct, kw_only=True, omit_defaults=True):
    """One thing to do. ``updated_at`` moves when the item changes, not with each save of its list."""

    id: str = ""
    title: str = ""
    status: TodoStatus = "pending"
    assignee: str | None = None
    notes: str | None = None
    created_at: datetime | None = None
    updated_at: datetime | None = None


class TodoList(msgspec.Struct, kw_only=True, omit_defaults=True):
    """All there is to do for an agent, in order. ``version`` counts the saves, from 1."""

    agent_id: str
    todos: list[Todo] = []
    version: int = 0
    updated_at: datetime | None = None


class Todos:
    """The todo lists of one namespace, ``db.todos``. What is written checks that the agent is there."""

    def __init__(self, family: Family, agents: Births) -> None:
        self._lists = Children(family, TodoList, name="todo", key="agent_id", parents=agents)
        self._now = family.now

    async def get(self, agent_id: str | UUID) -> TodoList | None:
        """Return the agent's list, or None where none was saved; one read."""
        return await self._lists.get(str(agent_id))

    async def save(self, agent_id: str | UUID, todos: Iterable[Todo], *, version: int | None = None) -> TodoList:
        """Replace the agent's list and return it as stored, with the next version.

        Ids are UUIDv7 text unless given. An item that is as it was keeps its ``updated_at``.

        Args:
            version: what the list must have now, 0 where there must be none; None: whatever there is.

        Raises:
            Conflict: it has another version; nothing was written. Get it again.
            BadRequest: two items are in progress or have one id, or an item has no title or an unknown status.
            ParentGone: there is no such agent.
        """
        items = list(todos)
        return await self._replace(str(agent_id), lambda _: items, version)

    async def update(self, agent_id: str | UUID, fn: Callable[[list[Todo]], Iterable[Todo]]) -> TodoList:
        """Replace the agent's items by what ``fn`` makes of them (of an empty list where there is none).

        ``fn`` is called again when another writer came first.

        Raises:
            BadRequest, ParentGone: as `save`. Conflict: lost to other writers 40 times.
        """
        return await self._replace(str(agent_id), fn, None)

    async def delete(self, agent_id: str | UUID) -> bool:
        """Remove the agent's list; False where there was none. The next one begins with version 1."""
        return await self._lists.delete(str(agent_id))

    async def _copy(self, agent_id: str, to: str) -> None:
        """Give another agent the list of this one, in place of its own, with its version and times."""
        found = await self._lists.get(agent_id)
        if found is not None:
            await self._lists.save(msgspec.structs.replace(found, agent_id=to))

    async def _replace(
        self, agent_id: str, fn: Callable[[list[Todo]], Iterable[Todo]], version: int | None
    ) -> TodoList:
        def next_(old: TodoList) -> TodoList:
            if version is not None and old.version != version:
                raise Conflict(f"the todo list of {agent_id}", _mark(version), _mark(old.version))
            now = self._now()
            todos = _ready(fn(list(old.todos)), old.todos, now)
            return TodoList(agent_id=agent_id, todos=todos, version=old.version + 1, updated_at=now)

        for _ in range(_ATTEMPTS):
            changed = await self._lists.update(agent_id, next_)
            if changed is not None:
                return changed
            try:
                return await self._lists.create(next_(TodoList(agent_id=agent_id)))
            except UniqueConflict:  # another save came first
                continue
        raise Conflict(f"the todo list of {agent_id}", None)


def _mark(version: int) -> Expect:
    """A list's version in the form that a Conflict carries."""
    return version.to_bytes(max(1, (version.bit_length() + 7) // 8), "big") if version > 0 else ABSENT


def _ready(todos: Iterable[Any], before: Iterable[Todo], now: datetime) -> list[Todo]:
    """Return copies as they will be stored.

    Raises:
        BadRequest: the list is at odds with itself.
    """
    known = {todo.id: todo for todo in before}
    ready: list[Todo] = []
    for todo in todos:
        if not isinstance(todo, Todo):
            raise BadRequest(f"a todo is a kvpersist.Todo, not {type(todo).__name__}")
        if not todo.title:
            raise BadRequest("a todo has no title: say what is to be done")
        if todo.status not in TODO_STATES:
            raise BadRequest(f"unknown status {todo.status!r}: use one of {', '.join(sorted(TODO_STATES))}")
        old = known.get(todo.id) if todo.id else None
        created_at = (now if old is None else old.created_at) if todo.created_at is None else todo.created_at
        created_at = utc(created_at or now, "created_at")
        updated_at = None if todo.updated_at is None else utc(todo.updated_at, "updated_at")
        new = msgspec.structs.replace(todo, id=todo.id or new_id(), created_at=created_at, updated_at=updated_at)
        if old is not None and updated_at in (None, old.updated_at):
            same = msgspec.structs.replace(new, updated_at=old.updated_at) == old
            new.updated_at = old.updated_at if same else now
        elif updated_at is None:
            new.updated_at = now
        ready.append(new)
    ids = [todo.id for todo in ready]
    if len(set(ids)) != len(ids):
        raise BadRequest("two todos have one id: give each its own, or none")
    if (busy := sum(todo.status == "in_progress" for todo in ready)) > 1:
        raise BadRequest(f"{busy} todos are in progress: at most one may be")
    return ready
