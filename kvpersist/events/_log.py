"""A topic as a log: what is stored of an event, and how a place in a topic is found."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from kvpersist import keys
from kvpersist.driver import ABSENT, Delete, Entry, Op, Put
from kvpersist.errors import BadCursor, BadRequest, Conflict, CorruptRecord, EventsExpired, KeyTooLong, KvError
from kvpersist.events.records import After, EventEntry, NewEvent, as_json, number_of, position_of
from kvpersist.log import Log, LogState, Numbered, Tail
from kvpersist.store import Store

__all__ = ["COLLECTIONS", "TopicLog", "checked", "entry_of", "expired", "item_of", "moment"]

COLLECTIONS: Final = ("event", "event_mark", "event_consumer", "event_group", "event_parked")
"""Collections of a namespace that belong to its events."""

_OLD: Final = re.compile(r"([0-9a-z]{7,9})-[0-9]{4,}")  # milliseconds in base 36, a sequence within them
_REREADS: Final = 8  # of a page that has a hole
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_WORDS: Final = ("start", "now")
_SURELY_SHORT: Final = 40  # characters: at most 160 bytes encoded
_MARKED_PAGE: Final = 100  # events removed at once where each may have two marks


class TopicLog(Log[dict[str, Any]]):
    """The events of all topics of a namespace.

    An event is kept as ``{"at": microseconds since 1970, "from": bytes of the topic before it, "event": ...}``
    with ``channel``, ``cursor`` and ``bookmark`` where it has them. The stat's tail is the newest event's
    time, the bytes of the topic up to its end, and whether any event had a cursor or a bookmark.
    Those are found by marks, ``ns:event_mark:<topic>!<kind>!<text>``, whose value is the event's number.

    With atomic batches publishing does not write the stat, it checks that nobody has: the newest event
    tells what the stat would. It is written when a topic begins, is trimmed, and has its first mark, so
    that whoever trims or removes a topic stops those who knew it before; put-if-absent of the next
    number decides between publishers.
    """

    def __init__(self, store: Store, namespace: str) -> None:
        super().__init__(store, dict[str, Any], name="event", namespace=namespace)
        self._marks = keys.record_prefix(self._space, "event_mark")
        self._finds_newest = self._atomic and store.capabilities.reverse

    @property
    def space(self) -> str:
        """The namespace, as it stands in keys."""
        return self._space

    def wake_prefix(self, topic: str) -> str:
        """Below which everything of ``topic`` that is published lies."""
        return self._prefix_of(topic)

    def stat_key(self, topic: str) -> str:
        """Which says that there is ``topic``."""
        return self._stat_prefix + keys.encode(topic)

    def key_of(self, topic: str, number: int) -> str:
        """Where the event of this number lies."""
        return self._prefix_of(topic) + keys.encode(number)

    def emptied(self, state: LogState) -> Put:
        """Write that no event of a topic counts any more, unless the stat is not that of ``state``."""
        return self._stat_put(state._replace(first=state.last + 1, alive=0))

    async def state(self, topic: str) -> LogState:
        """What is known of ``topic``: two reads."""
        return await self._load(topic)

    async def many(self, topic: str, numbers: Sequence[int]) -> list[dict[str, Any] | None]:
        """The events of these numbers, None where there is none: one read."""
        prefix = self._prefix_of(topic)
        found = await self._store._entries([prefix + keys.encode(number) for number in numbers])
        return [None if entry is None else self._codec.decode(entry.key, entry.value) for entry in found]

    async def page(self, topic: str, after: int, limit: int) -> tuple[list[Numbered[dict[str, Any]]], bool]:
        """Up to ``limit`` events right behind ``after``, without a hole, and whether there may be more.

        Raises:
            EventsExpired: retention removed the one behind ``after``.
            BadCursor: the topic has not come so far.
        """
        first = 0
        for attempt in range(_REREADS):
            found = await self.range(topic, after=after, limit=limit)
            whole = 0
            while whole < len(found) and found[whole].number == after + 1 + whole:
                whole += 1
            if whole:
                return found[:whole], len(found) == limit or whole < len(found)
            if not found and await self._is_there(topic, after):
                return [], False
            state = await self._load(topic)
            if after + 1 < state.first:
                raise expired(topic, after, state.first)
            if after > state.last:
                raise BadCursor(position_of(after))
            if after == state.last:
                return [], False
            first = found[0].number if found else state.last + 1
            await asyncio.sleep(0.002 * attempt)  # a scan of several calls passed over what was being written
        raise expired(topic, after, first)  # damage: what was acknowledged is not there

    async def place(self, topic: str, after: After) -> int:
        """The number of the event behind which ``after`` tells to begin.

        Raises:
            BadCursor: neither a position nor a cursor or bookmark of this topic.
        """
        number = number_of(after)
        if number is not None:
            return number
        if after is None or after == "start":
            return (await self._load(topic)).first - 1
        if after == "now":
            return (await self._load(topic)).last
        number = await self._marked(topic, after)
        if number is not None:
            return number
        old = _OLD.fullmatch(after) if isinstance(after, str) else None
        if old is None:
            raise BadCursor(str(after))
        state = await self._load(topic)
        number = await self._before(topic, state, "at", int(old[1], 36) * 1000)
        return number - 1 if 1 < state.first == number + 1 else number  # what expired may have come after it

    async def cut(self, topic: str, *, since: float | None, count: int | None, size: int | None) -> int:
        """The first number that retention keeps: by time (seconds since 1970), by count, by bytes."""
        state = await self._load(topic)
        cuts = [state.first]
        if state.last < state.first:
            return state.first
        if count is not None:
            cuts.append(state.last + 1 - count)
        if size is not None:
            # the first event before which enough bytes lie; the newest stays, however large
            kept_from = await self._before(topic, state, "from", state.tail[1] - size) + 1
            cuts.append(min(kept_from, state.last))
        if since is not None:
            cuts.append(await self._before(topic, state, "at", int(since * 1_000_000)) + 1)
        return max(cuts)

    async def beside(self, topic: str, others: Sequence[str]) -> tuple[LogState, list[Entry | None]]:
        """The state of ``topic`` and the entries at other keys, read with its stat."""
        stat, *found = await self._store._entries([self._stat_prefix + keys.encode(topic), *others])
        return await self._state_of(topic, stat), found

    async def trim(self, parent: str, *, before: int) -> int:
        known = self._funnel.cached(parent)
        if known is not None and known.last + 1 < before:  # others have published since
            self._funnel.forget(parent)
        return await super().trim(parent, before=before)

    async def _is_there(self, topic: str, number: int) -> bool:
        """Whether there is the event of this number and it was not trimmed: one read."""
        stat, event = await self._store._entries([self.stat_key(topic), self.key_of(topic, number)])
        return stat is not None and event is not None and number >= self._stats.decode(stat.key, stat.value).first

    async def _state_of(self, parent: str, entry: Entry | None) -> LogState:
        state = await super()._state_of(parent, entry)
        while self._finds_newest and state.expect is not ABSENT:
            found = await self._store._scan(state.prefix, keys.prefix_end(state.prefix), limit=1, reverse=True)
            for newest in found:
                last = keys.decode(newest.key[len(state.prefix) :], int)
                if last >= state.last:
                    tail = await self._tail_at(state, newest)
                    return state._replace(last=last, alive=last + 1 - state.first, tail=tail)
            [again] = await self._store._entries([state.stat_key])  # all were trimmed: by then, or between the reads?
            if again is not None and again.version == state.expect:
                break
            state = await super()._state_of(parent, again)
        return state

    async def _tail_at(self, state: LogState, newest: Entry) -> Tail:
        """The tail with the newest event; where that one is damaged, by the last that is not."""
        try:
            return self._tail_after(state.tail, newest)
        except CorruptRecord:
            damaged = 0
        for entry in await self._store._scan(state.prefix, newest.key + "\0", limit=_MARKED_PAGE, reverse=True):
            try:
                at, size, marked = self._tail_after(state.tail, entry)
            except CorruptRecord:
                damaged += len(entry.value)
            else:
                return (at, size + damaged, marked)
        at, size, marked = state.tail
        return (at, size + damaged, marked)

    def _is_found_again(self, before: LogState, after: LogState) -> bool:
        return (
            self._finds_newest
            and before.expect is not ABSENT
            and before.first == after.first
            and before.tail[2:] == after.tail[2:]
        )

    async def _clear_below(self, parent: str, first: int) -> int:
        if (await self._load(parent)).tail[2:] != (1,):
            return await super()._clear_below(parent, first)
        removed = 0
        while page := await self.range(parent, before=first, limit=_MARKED_PAGE):
            await self._unmark(parent, [item for _, item in page], first)
            prefix = self._prefix_of(parent)
            await self._store._commit([Delete(prefix + keys.encode(number)) for number, _ in page])
            removed += len(page)
        return removed

    async def _unmark(self, topic: str, items: Sequence[dict[str, Any]], first: int) -> None:
        """Remove the marks of expired events, unless a later event has taken them over."""
        marks = list(dict.fromkeys(mark for item in items for mark in self._marks_of(topic, item)))
        there = await self._store._entries(marks)
        conditional = self._store.capabilities.conditional_delete
        gone = [
            (Delete(entry.key, entry.version if conditional else None),)
            for entry in there
            if entry is not None and int(entry.value) < first
        ]
        for outcome in await self._store._commit_each(gone) if gone else ():
            if isinstance(outcome, KvError) and not isinstance(outcome, Conflict):
                raise outcome  # before the events go: without them nobody would find the marks

    async def _before(self, topic: str, state: LogState, field: str, bound: int) -> int:
        """The number of the last event whose ``field``, which never falls, is below ``bound``; first - 1: none."""
        low, high = state.first, state.last + 1  # the first event that is not below bound is in [low, high]
        if field == "at" and state.tail and state.tail[0] < bound:
            return state.last
        probe = low  # most often nothing, or little, lies below
        while low < high:
            [item] = await self.many(topic, [probe])
            if item is None or item[field] < bound:  # None: trimmed meanwhile
                low = probe + 1
            else:
                high = probe
            probe = (low + high) // 2
        return low - 1

    async def _marked(self, topic: str, after: str | int | dict[str, Any]) -> int | None:
        """The number of the newest event with this cursor or bookmark."""
        wanted = _mark_text(after)
        found = await self._store._entries([self._mark(topic, kind, wanted) for kind in ("c", "b")])
        for entry, name in zip(found, ("cursor", "bookmark"), strict=True):
            if entry is None:
                continue
            number = int(entry.value)
            [item] = await self.many(topic, [number])
            if item is None or _mark_text(item.get(name)) == wanted:  # None: expired, as the reader will be told
                return number
        if self._atomic:
            return None
        found_at: int | None = None  # a crash may have come between an event and its mark
        async for number, item in self.iterate(topic):
            if wanted in {_mark_text(item[name]) for name in ("cursor", "bookmark") if name in item}:
                found_at = number
        return found_at

    def _puts(
        self, parent: str, prefix: str, last: int, items: Sequence[dict[str, Any]], tail: Tail
    ) -> tuple[list[Op], Tail]:
        at, size, marked = tail or (0, 0, 0)
        at = max(at, int(self._store.clock() * 1_000_000))  # a clock that steps back does not show
        puts: list[Op] = []
        marks: dict[str, Op] | None = None
        for item in items:
            last += 1
            key = prefix + keys.encode(last)
            value = self._codec.encode(key, {"at": at, "from": size, **item})
            size += len(value)
            puts.append(Put(key, value, ABSENT))
            if len(item) > 1:
                marks = marks or {}
                marks.update((mark, Put(mark, b"%d" % last)) for mark in self._marks_of(parent, item))
        if marks:
            puts += marks.values()
            marked = 1
        return puts, (at, size, marked)

    def _tail_after(self, tail: Tail, missed: Entry) -> Tail:
        item = self._codec.decode(missed.key, missed.value)
        marked = 1 if "cursor" in item or "bookmark" in item else (*tail, 0, 0, 0)[2]
        return (item["at"], item["from"] + len(missed.value), marked)

    def _marks_of(self, topic: str, item: dict[str, Any]) -> list[str]:
        return [self._mark(topic, name[0], _mark_text(item[name])) for name in ("cursor", "bookmark") if name in item]

    def _mark(self, topic: str, kind: str, text: str) -> str:
        return f"{self._marks}{keys.encode(topic)}!{kind}!{keys.index_text(text)[0]}"


def item_of(new: NewEvent) -> dict[str, Any]:
    """Return what is stored of an event, but for its time.

    Raises:
        BadRequest: a cursor or bookmark that `after` would take for something else.
    """
    item: dict[str, Any] = {"event": new.event}
    if new.channel is not None:
        if type(new.channel) is not str or not new.channel:
            raise BadRequest(f"channel={new.channel!r}: name it by a text that is not empty, or leave it out")
        item["channel"] = new.channel
    if new.cursor is not None:
        if type(new.cursor) not in (str, int):
            raise BadRequest(f"cursor={new.cursor!r}: a cursor is a text or an integer")
        item["cursor"] = new.cursor
    if new.bookmark is not None:
        item["bookmark"] = new.bookmark
    for own in (new.cursor, new.bookmark):
        if own in ("", *_WORDS) or number_of(own) is not None:
            raise BadRequest(f"{own!r} has a meaning of its own as a place in a topic: choose another cursor")
    return item


def entry_of(topic: str, number: int, item: dict[str, Any]) -> EventEntry:
    """Return an event as its readers get it."""
    return EventEntry(
        position_of(number),
        topic,
        item["event"],
        moment(item["at"]),
        item.get("channel"),
        item.get("cursor"),
        item.get("bookmark"),
    )


def moment(at: int) -> datetime:
    """Return microseconds since 1970 as a time in UTC."""
    return _EPOCH + timedelta(microseconds=at)


def checked(text: str, what: str) -> str:
    """Return ``text`` if it can name a topic, a consumer or a group.

    Raises:
        BadKey: not a text, empty, or with a lone surrogate. KeyTooLong: over 160 bytes encoded.
    """
    keys.check_key(text)
    if len(text) > _SURELY_SHORT and (size := len(keys.encode(text).encode())) > keys.ID_LIMIT:
        raise KeyTooLong(f"{what} {text}", size, keys.ID_LIMIT)
    return text


def expired(topic: str, after: int, first: int) -> EventsExpired:
    """The events behind ``after`` and before ``first`` are gone."""
    return EventsExpired(topic, position_of(after), position_of(first), first - after - 1)


def _mark_text(value: Any) -> str:
    """A cursor or bookmark as text, equal for equal ones."""
    if type(value) is str:
        return value
    return json.dumps(value, sort_keys=True, separators=(",", ":"), default=as_json)
