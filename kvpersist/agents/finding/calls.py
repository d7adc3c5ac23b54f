"""Finding tool calls: in one session, by name, by outcome, or newest first across all."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any, ClassVar, Final

from kvpersist import keys
from kvpersist.agents.collections import Collections
from kvpersist.agents.finding.choices import best
from kvpersist.agents.finding.conditions import Test, Where, normal, tests_of
from kvpersist.agents.finding.finder import Chosen, IndexFinder, downwards, refuse_unknown
from kvpersist.agents.finding.queries import Asked, Plan
from kvpersist.agents.finding.sources import Chunk, Indexed, Merged, Sorted, Source, passing
from kvpersist.agents.records import TOOL_CALL_STATES, ToolCall
from kvpersist.errors import BadRequest, IndexNotReady, KvError
from kvpersist.index.reads import OnCorrupt, Query, decoded

__all__ = ["CallFinder"]

_WINDOW: Final = 16  # messages whose calls are read at once where a backend only reads upwards


class CallFinder(IndexFinder[ToolCall]):
    """Finds tool calls."""

    collection: ClassVar[str] = "tool_call"

    def __init__(
        self,
        collections: Collections,
        last_number: Callable[[str], Awaitable[int]],
        results: Callable[[list[ToolCall], OnCorrupt | None], Awaitable[list[ToolCall]]],
    ) -> None:
        """``results`` fills in what stands in messages."""
        super().__init__(collections, collections.tool_calls)
        self._last_number = last_number
        self._results = results
        [self._by_state] = [each for each in collections.tool_calls.indexes if each.name == "state_by_created_at_desc"]

    @staticmethod
    def normal(where: Mapping[str, Any]) -> Where:
        """Return conditions in one spelling. Raises BadRequest."""
        asked = normal(where, {"created": "created_at"}, ("created_at", "started_at", "updated_at", "completed_at"))
        if isinstance(asked.get("state"), str):
            asked["state"] = asked["state"].lower()
        refuse_unknown(asked, "state", TOOL_CALL_STATES)
        refuse_unknown(asked, "decision", frozenset(("allow", "deny")))
        for label in ("is_error", "success", "has_approval"):
            if label in asked and not isinstance(asked[label], bool):
                raise BadRequest(f"{label} is True or False")
        if "success" in asked:
            failed = not asked.pop("success")
            if asked.setdefault("is_error", failed) is not failed:
                raise BadRequest("a call that succeeded is no error: ask for success or is_error")
        return asked

    async def plan(self, asked: Asked) -> Plan[ToolCall]:
        """As `Finder.plan`."""
        where = dict(asked.where)
        if "session_id" in where:
            return self._in_session(asked, str(where.pop("session_id")), where)
        usable = {label: value for label, value in where.items() if label not in _CALL_TESTS}
        choices = [each for each in best(self._repository.indexes, usable, "created_at") if each.where]
        chosen, unready = await self._ready(choices)
        if chosen is not None:
            return self._indexed(asked, chosen, where)
        return await self._across(asked, where, unready)

    async def finished(self, records: list[ToolCall], on_corrupt: OnCorrupt | None) -> list[ToolCall]:
        """As `Finder.finished`."""
        return await self._results(records, on_corrupt)

    def _in_session(self, asked: Asked, session_id: str, rest: Where) -> Plan[ToolCall]:
        tests = self._tests(rest)
        part = keys.encode(session_id)
        base = f"{self._all.call_prefix}{part}!"
        newest_first = asked.order != "asc"
        if newest_first and not self._reverses:
            source: Source[ToolCall] = _Downwards(self._all, session_id, self._last_number, asked.on_corrupt)
        else:
            query = self._between(base, keys.prefix_end(base), base)
            source = Indexed(self._repository, query, reverse=newest_first, on_corrupt=asked.on_corrupt)
        return Plan(source=passing(source, tests), eager=not tests, most=None, refusal=lambda: self._refusal(rest))

    def _indexed(self, asked: Asked, chosen: Chosen, where: Where) -> Plan[ToolCall]:
        rest = {label: value for label, value in where.items() if label not in chosen.used}
        tests = self._tests(rest)

        def refusal() -> KvError:
            return self._refusal(rest or f"order={asked.order}")

        def make(reverse: bool) -> Source[ToolCall]:
            return passing(Indexed(self._repository, chosen.query, reverse=reverse, on_corrupt=asked.on_corrupt), tests)

        label, descending = chosen.order, chosen.descending
        if asked.order is not None:
            label, descending = "created_at", asked.order == "desc"
        source, is_sorted = self._directed(asked, chosen, label, descending, make, _call_time, refusal)
        count = None if tests else self._counted([chosen.query])
        most = None if asked.scan or is_sorted or not tests else asked.scanned
        return Plan(source=source, eager=is_sorted or not tests, most=most, refusal=refusal, count=count)

    async def _across(self, asked: Asked, where: Where, unready: str | None) -> Plan[ToolCall]:
        """All calls by time: those of every state, merged."""
        rest = {label: value for label, value in where.items() if label not in ("created_at", "is_error")}
        if rest and "created_at" not in where and "is_error" not in where and not asked.scan:
            raise self._wide(asked, unready, rest)
        tests = self._tests(rest)
        ranged = {"created_at": where["created_at"]} if "created_at" in where else {}
        newest_first = asked.order != "asc"
        reverse = not newest_first and self._reverses
        sources: list[Source[ToolCall]] = []
        queries: list[Query] = []
        for state, sure in _states(where.get("is_error")):
            query = await self._repository._reader.through(self._by_state, {"state": state, **ranged})
            if query is None:
                raise IndexNotReady(self.collection, self._by_state.name)
            queries.append(query)
            source: Source[ToolCall] = Indexed(self._repository, query, reverse=reverse, on_corrupt=asked.on_corrupt)
            doubts = [] if sure else [_ended(where["is_error"])]
            sources.append(passing(source, [*tests, *doubts]))
        merged: Source[ToolCall] = Merged(sources, reverse=reverse)

        def refusal() -> KvError:
            return self._refusal(rest or f"order={asked.order}")

        is_sorted = not newest_first and not reverse
        if is_sorted:
            most = None if asked.scan else asked.scanned
            merged = Sorted(merged, _call_time, reverse=True, most=most, refusal=refusal)
        count: Callable[[], Awaitable[int]] | None = None
        if not where:
            count = self._repository.count
        elif not tests and "is_error" not in where:
            count = self._counted(queries)
        most = None if asked.scan or is_sorted or not tests else asked.scanned
        return Plan(source=merged, eager=is_sorted or not tests, most=most, refusal=refusal, count=count)

    def _tests(self, rest: Where) -> list[Test]:
        return tests_of(ToolCall, self._repository.indexes, _CALL_TESTS, rest)


class _Downwards(Source[ToolCall]):
    """The calls of one session, the last first, where a backend only reads upwards: by windows of messages."""

    def __init__(
        self,
        collections: Collections,
        session_id: str,
        last_number: Callable[[str], Awaitable[int]],
        on_corrupt: OnCorrupt | None,
    ) -> None:
        self._all, self._session_id = collections, session_id
        self._last_number, self._on_corrupt = last_number, on_corrupt

    async def read(self, after: str | None, limit: int) -> Chunk[ToolCall]:
        """As `Source.read`."""
        part = keys.encode(self._session_id)
        prefix = f"{self._all.call_prefix}{part}!"
        if after is None:
            high = await self._last_number(self._session_id) + 1
        else:
            high = keys.decode(after.partition("!")[0], int)
        low = max(0, high - max(limit, _WINDOW))
        items: list[tuple[str, ToolCall]] = []
        async for entry in self._all.calls_of(part, low, high):
            position = entry.key[len(prefix) :]
            if after is not None and position >= after:
                continue
            read = decoded(self._all.tool_calls._codec, (entry,), self._on_corrupt)
            items += [(position, call) for call in read]
        items.reverse()
        if len(items) > limit:
            return Chunk(items[:limit], limit, items[limit - 1][0])
        return Chunk(items, len(items), keys.encode(low) if low else None)


def _approved(asked: bool) -> Test:
    return lambda call: (call.approval is not None) is asked


def _decided(asked: str) -> Test:
    return lambda call: call.approval is not None and call.approval.decision == asked


def _ended(is_error: bool) -> Test:
    return lambda call: call.is_error is is_error


_CALL_TESTS: Final[dict[str, Callable[[Any], Test]]] = {"has_approval": _approved, "decision": _decided}


def _states(is_error: bool | None) -> list[tuple[str, bool]]:
    """The states of calls with this outcome, and whether all calls in them have it."""
    if is_error is None:
        return [(state, True) for state in sorted(TOOL_CALL_STATES)]
    return [("failed" if is_error else "completed", True), ("denied", False), ("sealed", False)]


def _call_time(call: ToolCall) -> str:
    place = "!".join((keys.encode(call.session_id), keys.encode(call.number), keys.encode(call.position)))
    return f"{downwards(call.created_at)}!{place}"
