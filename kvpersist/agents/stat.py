"""What is kept beside a session: its counts, its times, and the calls that wait for an answer.

One record per session, ``ns:session#stat:<id>``, written with every batch below the session. Its
version decides between writers; a session's own record is not touched by an append.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Final, NamedTuple

import msgspec

from kvpersist.agents.records import Message, SessionStat, ToolCall, ToolStats
from kvpersist.driver import Check, Entry

__all__ = ["EXACT", "SETTLED", "UNANSWERED", "Draft", "Parent", "Stat", "Waiting", "tool_stats"]

EXACT: Final = timedelta(seconds=1)
"""How far the index `updated` may lie behind."""

UNANSWERED: Final = 256
"""Calls that a session remembers as unanswered; an answer to an older one is not joined with it."""

SETTLED: Final = 32
"""Calls whose outcome was set without a message, and whose message may still come."""

Waiting = tuple[str, int, int]
"""An unanswered call: its call_id, the number of the asking message, the position in it."""

_COUNTED: Final = ("completed", "failed", "approval_required", "approved", "executing", "denied", "sealed")
"""The states counted behind the calls themselves, in their stored order: it may only grow. What is left is pending."""

_PLACES: Final = {state: place for place, state in enumerate(_COUNTED, 1)}
_NONE: Final = (0, 0, 0)  # calls, completed, failed: stored of every tool; further numbers only where they are not 0


class Stat(msgspec.Struct, omit_defaults=True):
    """The stored form.

    Attributes:
        tools: per name the calls, and those of them completed, failed and so on: `tool_stats` reads it.
        open: calls that wait for an answer. settled: those with an outcome already, set by hand.
        unsure: it was begun to rewrite the session without atomic batches: its counts are to be made anew.
        until: who began that may still be at it, up to this time in seconds since 1970.
        rewritten: how often the session was rewritten without atomic batches, or counted anew. Who began to write
            at another number may have written what nobody counted, or what answers a message that is gone.
    """

    updated_at: datetime
    last: int = 0
    messages: int = 0
    roles: dict[str, int] = {}
    tools: dict[str, tuple[int, ...]] = {}
    open: list[Waiting] = []
    indexed_at: datetime | None = None  # what the index `updated` holds
    settled: list[Waiting] = []
    unsure: bool = False
    until: float = 0.0
    rewritten: int = 0

    def public(self) -> SessionStat:
        """Return it in the form that users get."""
        return SessionStat(
            last=self.last,
            messages=self.messages,
            tool_calls=sum(counts[0] for counts in self.tools.values()),
            roles=dict(self.roles),
            tools={name: tool_stats(counts) for name, counts in self.tools.items()},
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

    __slots__ = ("last", "messages", "open", "roles", "settled", "tools", "unsure", "updated_at")

    def __init__(self, stat: Stat) -> None:
        self.last = stat.last
        self.messages = stat.messages
        self.roles = stat.roles.copy()
        self.tools = stat.tools.copy()
        self.open = stat.open.copy()
        self.settled = stat.settled.copy()
        self.unsure = False
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

    def leave_off(self, last: int) -> None:
        """Numbers above ``last`` only are given out."""
        self.last = max(self.last, last)

    def touch(self, at: datetime | None) -> None:
        """The session changed ``at`` some time."""
        if at is not None and at > self.updated_at:
            self.updated_at = at

    def count(self, before: ToolCall | None, after: ToolCall | None) -> None:
        """Count a call that was made, changed or removed, and remember it while it waits for an answer."""
        if before is not None:
            self._tally(before, -1)
            self.forget((before.call_id, before.number, before.position))
        if after is not None:
            self._tally(after, 1)
            if after.result_number is not None:
                return
            waiting = (after.call_id, after.number, after.position)
            if after.state not in ("completed", "failed"):
                _enter(self.open, waiting)
            elif after.audit:  # set by hand: a message may still tell the same
                _enter(self.settled, waiting)

    def _tally(self, call: ToolCall, by: int) -> None:
        counts = [*self.tools.get(call.name, _NONE)]
        counts[0] += by
        if place := _PLACES.get(call.state):
            while place >= len(counts):
                counts.append(0)
            counts[place] += by
        while not counts[-1] and len(counts) > len(_NONE):
            counts.pop()
        if counts[0]:
            self.tools[call.name] = tuple(counts)
        else:
            self.tools.pop(call.name, None)

    def forget(self, waiting: Waiting) -> None:
        """The call waits for no answer any more."""
        for places in (self.open, self.settled):
            if waiting in places:
                places.remove(waiting)

    def asked(self, call_id: str, before: int) -> Waiting | None:
        """Find the latest call of this id that still waits and was asked for by a message below ``before``."""
        found = [each for each in (*self.open, *self.settled) if each[0] == call_id and each[1] < before]
        return max(found, key=_place) if len(found) > 1 else found[0] if found else None

    def done(self, indexed_at: datetime | None) -> Stat:
        """Return the stat to be stored."""
        if len(self.open) > UNANSWERED:
            del self.open[:-UNANSWERED]
        if len(self.settled) > SETTLED:
            del self.settled[:-SETTLED]
        return Stat(
            self.updated_at,
            self.last,
            self.messages,
            self.roles,
            self.tools,
            self.open,
            indexed_at,
            self.settled,
            self.unsure,
        )


def tool_stats(counts: tuple[int, ...]) -> ToolStats:
    """Return the stored counts of one tool in the form that users get."""
    return ToolStats(counts[0], **dict(zip(_COUNTED, counts[1:], strict=False)))


def _enter(places: list[Waiting], waiting: Waiting) -> None:
    late = bool(places) and _place(places[-1]) > _place(waiting)  # its answer was deleted
    places.append(waiting)
    if late:
        places.sort(key=_place)


def _place(waiting: Waiting) -> tuple[int, int]:
    return waiting[1:]
