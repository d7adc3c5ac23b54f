"""What a rewriting of a session comes to: which messages stay, change, go and are added, and which calls follow.

Numbers only grow, so what stays is a beginning of the new list that stands in the old one in the same
order; everything behind it is appended, and what is left over of the old one goes.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from collections.abc import Set as AbstractSet
from typing import Any, Final, NamedTuple

import msgspec

from kvpersist import keys
from kvpersist.agents.collections import Collections
from kvpersist.agents.conversations.items import FIXED, Remove, Replace, ReplaceCalls, checked
from kvpersist.agents.records import Message, ToolCall
from kvpersist.codec import RecordCodec
from kvpersist.driver import Entry
from kvpersist.errors import UniqueConflict
from kvpersist.index.writer import live
from kvpersist.log import after_stat, read_range

__all__ = ["CallPlan", "Plan", "StoredCall", "StoredMessage", "doomed", "followers", "planned", "planned_calls", "same"]

StoredMessage = tuple[Entry, Message]
StoredCall = tuple[Entry, ToolCall]

_ANY_NUMBER: Final = 1 << 62
_NEAR: Final = 64  # numbers: how far before an answer its call is looked for first
_WIDER: Final = 8  # times, each further look


class Plan(NamedTuple):
    """What makes the stored messages the given ones.

    Attributes:
        remove: the newest first.
        edit: each as it is stored, and as it will be.
        append: behind everything that stays.
        stands: what stays, as it will be, in order.
        again: more is left to do than one batch may hold.
    """

    remove: Sequence[StoredMessage]
    edit: Sequence[tuple[Entry, Message]]
    append: Sequence[Message]
    stands: Sequence[Message]
    again: bool


class CallPlan(NamedTuple):
    """What makes the stored calls the given ones: ``put`` has each as it is stored, if it is, and as it will be."""

    remove: Sequence[StoredCall]
    put: Sequence[tuple[Entry | None, ToolCall]]
    again: bool


async def planned(every: Collections, part: str, item: Replace, last: int = _ANY_NUMBER) -> Plan:
    """Read a session's messages up to ``last`` once and compare them with those of ``item``.

    Raises:
        UniqueConflict: two of the given messages have one id.
    """
    codec = every.messages._codec
    entries = after_stat(every.store, f"{every.message_prefix}{part}!", 0)
    stored = [(entry, codec.decode(entry.key, entry.value)) async for entry in entries if live(entry) is not None]
    stored = [each for each in stored if each[1].number <= last]
    wanted = item.messages
    if item.make is not None:
        calls = [every.tool_calls._codec.decode(entry.key, entry.value) async for entry in _calls(every, part)]
        made = item.make([message for _, message in stored], calls)
        wanted = checked(made, keys.decode(part, str), every.now())
    if item.since is not None:
        ids = {message.id for message in wanted}
        late = (message for _, message in stored if message.number > item.since and message.id not in ids)
        wanted = [*wanted, *map(msgspec.structs.replace, late)]  # copies: those that move get new numbers
    where = {message.id: place for place, (_, message) in enumerate(stored)}
    _refuse_repeats(wanted)
    named = {message.id for message in wanted}
    stands: list[Message] = []
    edit: list[tuple[Entry, Message]] = []
    kept: set[int] = set()
    place = 0
    for given in wanted:
        found, changed = _match(codec, item, given, stored, where, named, place)
        if found is None:
            break
        kept.add(found)
        place = found + 1
        if changed is not None:
            edit.append((stored[found][0], changed))
        stands.append(stored[found][1] if changed is None else changed)
    remove = [stored[each] for each in reversed(range(len(stored))) if each not in kept]
    append = wanted[len(stands) :]
    if item.make is not None and len(remove) + len(edit) + len(append) > item.most:
        return Plan((), (), (), (), True)
    if len(remove) > item.most:
        return Plan(remove[: item.most], (), (), (), True)
    if len(remove) + len(edit) > item.most:
        return Plan(remove, edit[: item.most - len(remove)], (), (), True)
    room = item.most - len(remove) - len(edit)
    return Plan(remove, edit, append[:room], stands, len(append) > room)


def _match(
    codec: RecordCodec[Message],
    item: Replace,
    given: Message,
    stored: Sequence[StoredMessage],
    where: dict[str, int],
    named: AbstractSet[str],
    start: int,
) -> tuple[int | None, Message | None]:
    """Find the stored message, from ``start`` on, that ``given`` is, and what it becomes if it changes.

    ``where``: the places of the stored messages by id; ``named``: the ids that are given, which are nobody else's.
    """
    undated = given.id in item.undated
    if given.id in item.anonymous and given.id not in where:
        for place in range(start, len(stored)):
            entry, message = stored[place]
            if message.id not in named and same(codec, entry, message, _placed(given, message, undated)):
                return place, None
        return None, None
    place = where.get(given.id, -1)
    if place < start:
        return None, None
    entry, message = stored[place]
    wanted = _placed(given, message, undated)
    if same(codec, entry, message, wanted):
        return place, None
    if any(getattr(message, field) != getattr(wanted, field) for field in FIXED):
        return None, None
    return place, wanted


def _placed(given: Message, stored: Message, undated: bool) -> Message:
    at = stored.created_at if undated else given.created_at
    return msgspec.structs.replace(given, id=stored.id, number=stored.number, created_at=at)


def same(codec: RecordCodec[Any], entry: Entry, stored: Any, wanted: Any) -> bool:
    """Whether ``wanted`` is what is stored. 0, False and 0.0 differ; the order of members does not count."""
    data = codec.encode(entry.key, wanted)
    if data == entry.value:
        return True
    again = codec.decode(entry.key, data)
    if again != stored:
        return False
    encode = msgspec.msgpack.Encoder(order="sorted").encode
    try:
        return all(encode(getattr(again, name)) == encode(getattr(stored, name)) for name in again.__struct_fields__)
    except OverflowError:  # a number that only the records' codec can write: written once more, at worst
        return False


def _refuse_repeats(messages: Sequence[Message]) -> None:
    ids: set[str] = set()
    for message in messages:
        if message.id in ids:
            raise UniqueConflict("id", message.id, message.id)
        ids.add(message.id)


async def doomed(every: Collections, part: str, session_id: str, item: Remove, last: int) -> list[StoredMessage]:
    """Read the messages that ``item`` removes, the newest first; ``last`` is the session's last number."""
    prefix, codec = f"{every.message_prefix}{part}!", every.messages._codec
    if item.places is None:

        async def newest(_: str) -> int:
            return last

        entries = await read_range(every.store, prefix, item.after, last + 1, item.most, True, newest, session_id)
        return [(entry, codec.decode(entry.key, entry.value)) for entry in entries]
    named = sorted(item.places, reverse=True)
    held = await every.store._entries([prefix + keys.encode(number) for number, _ in named])
    found: list[StoredMessage] = []
    for (_, id_), entry in zip(named, held, strict=True):
        entry = live(entry)
        if entry is not None:
            message = codec.decode(entry.key, entry.value)
            if message.id == id_:  # a session of the same id may have taken the place of the one that was asked of
                found.append((entry, message))
    return found


async def followers(
    every: Collections,
    part: str,
    removed: Sequence[StoredMessage],
    behind: int | None = None,
    last: int = _ANY_NUMBER,
) -> tuple[list[StoredCall], list[StoredCall]]:
    """The calls that go with ``removed`` messages, and the other calls that they answered.

    Args:
        behind: all calls from this number on, up to ``last``, go, whether or not their message is there.
    """
    codec = every.tool_calls._codec
    numbers = {message.number for _, message in removed}
    gone: list[StoredCall] = []
    if numbers or behind is not None:
        first = min(numbers) if behind is None else behind
        async for entry in every.calls_of(part, first, max(numbers) if behind is None else last):
            call = codec.decode(entry.key, entry.value)
            if behind is not None or call.number in numbers:
                gone.append((entry, call))
    answers = {message.number for _, message in removed if message.role == "tool" and message.tool_call_id is not None}
    answers -= {call.result_number for _, call in gone if call.result_number is not None}
    places = {entry.key for entry, _ in gone}
    return gone, [each async for each in _answered_by(every, part, answers) if each[0].key not in places]


async def _answered_by(every: Collections, part: str, answers: set[int]) -> AsyncIterator[StoredCall]:
    """The calls that messages of these numbers answer: near them first, as a rule that is all."""
    codec = every.tool_calls._codec
    top, size = max(answers, default=-1), _NEAR
    if answers:
        size += top - min(answers)
    while answers and top >= 0:
        low = max(0, top - size + 1)
        async for entry in every.calls_of(part, low, top):
            call = codec.decode(entry.key, entry.value)
            if call.result_number in answers:
                answers.discard(call.result_number)
                yield entry, call
        top, size = low - 1, size * _WIDER


def _calls(every: Collections, part: str) -> AsyncIterator[Entry]:
    return every.calls_of(part, 0, _ANY_NUMBER)


async def planned_calls(every: Collections, part: str, item: ReplaceCalls) -> CallPlan:
    """Read a session's calls once and compare them with those of ``item``."""
    codec = every.tool_calls._codec
    left = dict(item.calls)
    remove: list[StoredCall] = []
    put: list[tuple[Entry | None, ToolCall]] = []
    async for entry in _calls(every, part):
        call = codec.decode(entry.key, entry.value)
        wanted = left.pop((call.number, call.position), None)
        if wanted is None:
            remove.append((entry, call))
            continue
        if wanted.created_at is None:
            wanted = msgspec.structs.replace(wanted, created_at=call.created_at)
        if not same(codec, entry, call, wanted):
            put.append((entry, wanted))
    for call in left.values():
        if call.created_at is None:
            call.created_at = every.now()
        put.append((None, call))
    room = max(0, item.most - len(remove))
    return CallPlan(remove[: item.most], put[:room], len(remove) > item.most or len(put) > room)
