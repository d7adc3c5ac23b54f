"""What is kept beside a session: its counts, its times, and the calls that wait for an answer.

One record per session, ``ns:session#stat:<id>``, written with every batch below the session. Its
version decides between writers; a session's own record is not touched by an append.
"""

from __future__ import annotations

from datetime import datetime
from typing import Final, NamedTuple

import msgspec

from kvpersist.agents.records import Message, SessionStat, ToolCall, ToolStats
from kvpersist.driver import Check, Entry

__all__ = ["UNANSWERED", "Draft", "Parent", "Stat", "Waiting"]

UNANSWERED: Final = 256
"""Calls that a session remembers as unanswered; an answer to an older one is not joined with it."""

Waiting = tuple[str, int, int]
"""An unanswered call: its call_id, the number of the asking message, the position in it."""


class Stat(msgspec.Struct, omit_defaults=True):
    """The stored form. ``tools``: per name the calls, and those of them completed and failed."""

    updated_at: datetime
    last: int = 0
    messages: int = 0
    roles: dict[str, int] = msgspec.field(default_factory=dict[str, int])
    tools: dict[str, tuple[int, int, int]] = msgspec.field(default_factory=dict[str, tuple[int, int, int]])
    open: list[Waiting] = msgspec.field(default_factory=list[Waiting])
    indexed_at: datetime | None = None  # what the index `updated` holds

    def public(self) -> SessionStat:
        """Return it in the form that users get."""
        return SessionStat(
            last=self.last,
            messages=self.messages,
            tool_calls=sum(calls for calls, _, _ in self.tools.values()),
            roles=dict(self.roles),
            tools={name: ToolStats(*counts) for name, counts in self.tools.items()},
            updated_at=self.updated_at,
        )


class Parent(NamedTuple):
    """What a funnel remembers of a session.

    ``birth`` is the condition every batch below the session carries; ``version`` that of the stat.
    ``recent``: calls of the last batch as they are stored, so that their answers need no read.
    """

    birth: Check
    stat: Stat
    version: bytes
    recent: dict[str, Entry]


class Draft:
    """A stat in the making; the one it started from is not changed."""

    __slots__ = ("last", "messages", "open", "roles", "tools", "updated_at")

    def __init__(self, stat: Stat) -> None:
        self.last = stat.last
        self.messages = stat.messages
        self.roles = stat.roles.copy()
        self.tools = stat.tools.copy()
        self.open = stat.open.copy()
        self.updated_at = stat.updated_at

    def add(self, message: Message) -> None:
        """Count a message that takes the next number."""
        self.last = message.number
        self.messages += 1
        role = message.role
        self.roles[role] = self.roles.get(role, 0) + 1
        self.touch(message.created_at)

    def remove(self, message: Message) -> None:
        """Count a message no more; its number stays taken."""
        self.messages -= 1
        role = message.role
        self.roles[role] = self.roles.get(role, 0) - 1
        if not self.roles[role]:
            del self.roles[role]

    def touch(self, at: datetime | None) -> None:
        """The session changed ``at`` some time."""
        if at is not None and at > self.updated_at:
            self.updated_at = at

    def count(self, before: ToolCall | None, after: ToolCall | None) -> None:
        """Count a call that was made, changed or removed, and remember it while it waits for an answer."""
        for call, by in ((before, -1), (after, 1)):
            if call is not None:
                calls, completed, failed = self.tools.get(call.name, (0, 0, 0))
                completed += by if call.state == "completed" else 0
                failed += by if call.state == "failed" else 0
                if calls + by:
                    self.tools[call.name] = (calls + by, completed, failed)
                else:
                    self.tools.pop(call.name, None)
        if before is not None and before.state == "pending":
            waiting = (before.call_id, before.number, before.position)
            if waiting in self.open:
                self.open.remove(waiting)
        if after is not None and after.state == "pending":
            waiting = (after.call_id, after.number, after.position)
            if self.open and _place(self.open[-1]) > _place(waiting):  # its answer was deleted
                self.open.append(waiting)
                self.open.sort(key=_place)
            else:
                self.open.append(waiting)

    def asked(self, call_id: str, before: int) -> Waiting | None:
        """Find the latest call of this id that still waits and was asked for by a message below ``before``."""
        for waiting in reversed(self.open):
            if waiting[0] == call_id and waiting[1] < before:
                return waiting
        return None

    def done(self, indexed_at: datetime | None) -> Stat:
        """Return the stat to be stored."""
        if len(self.open) > UNANSWERED:
            del self.open[:-UNANSWERED]
        return Stat(self.updated_at, self.last, self.messages, self.roles, self.tools, self.open, indexed_at)


def _place(waiting: Waiting) -> tuple[int, int]:
    return waiting[1:]
