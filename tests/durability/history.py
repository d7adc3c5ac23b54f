"""Judges a history that `history_worker` has written down: what was lost, came twice, or came out of order.

A list-append history: each topic is a list, each event has its producer's number in it. What every consumer worked
on tells the list; it is held against what was acknowledged to the producers.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from history_worker import GROUP_TOPIC, TOPICS

__all__ = ["Verdict", "judge"]

_SHOWN = 20  # things that were wrong


@dataclass
class Verdict:
    """What a history holds. ``lost``: events that were acknowledged to their producer, and that some reader did
    not work on; ``duplicates``: events worked on again, as at-least-once allows; ``unknown``: events of which their
    producer was told nothing certain, ``found`` of them were there; ``wrong``: each breach of a promise."""

    acknowledged: int = 0
    lost: int = 0
    duplicates: int = 0
    unknown: int = 0
    found: int = 0
    failed: int = 0
    cancels: int = 0
    wrong: list[str] = field(default_factory=list)

    def say(self, text: str) -> None:
        if len(self.wrong) < _SHOWN:
            self.wrong.append(text)


@dataclass
class _Publish:
    producer: int
    topic: str
    first: int
    count: int
    outcome: str = "u"
    position: int = 0


def judge(folder: Path, lasts: Mapping[str, int], *, atomic: bool) -> Verdict:
    """Judge the files in ``folder``.

    Args:
        lasts: the last position of each topic, as the store has it at the end.
        atomic: a publish is there as a whole or not at all; else its beginning may be.
    """
    verdict = Verdict()
    publishes = list(_publishes(folder, verdict))
    lists: dict[str, dict[int, tuple[int, int]]] = {topic: {} for topic in (*TOPICS, GROUP_TOPIC)}
    for path in sorted(folder.glob("*.read")):
        _judge_readers(path, lists, lasts, verdict)
    _judge_group(folder, lasts[GROUP_TOPIC], verdict)
    places: dict[tuple[int, int], tuple[str, int]] = {}
    for topic, events in lists.items():
        _judge_list(topic, events, lasts[topic], places, verdict)
    for publish in publishes:
        _judge_publish(publish, places, verdict, atomic=atomic)
    if intruders := len(places.keys() - _all_numbers(publishes)):
        verdict.say(f"{intruders} events that nobody published")
    return verdict


def _publishes(folder: Path, verdict: Verdict) -> Iterator[_Publish]:
    for path in sorted(folder.glob("*.published")):
        pending: dict[str, _Publish] = {}
        for line in path.read_text().splitlines():
            kind, *fields = line.split()
            if kind == "x":
                verdict.cancels += 1
            elif kind == "i":
                if fields[0] in pending:  # its process was killed before the answer
                    yield pending.pop(fields[0])
                pending[fields[0]] = _Publish(int(fields[0]), fields[1], int(fields[2]), int(fields[3]))
            else:
                publish = pending.pop(fields[0])
                publish.outcome = kind
                publish.position = int(fields[1]) if kind == "o" else 0
                yield publish
        yield from pending.values()


def _all_numbers(publishes: list[_Publish]) -> set[tuple[int, int]]:
    return {(one.producer, n) for one in publishes for n in range(one.first, one.first + one.count)}


def _judge_readers(
    path: Path, lists: dict[str, dict[int, tuple[int, int]]], lasts: Mapping[str, int], verdict: Verdict
) -> None:
    """Each subscription goes on where the consumer had acknowledged to, without a gap or a repetition."""
    latest: defaultdict[str, int] = defaultdict(int)  # the last position of the run
    furthest: defaultdict[str, int] = defaultdict(int)
    asked: defaultdict[str, int] = defaultdict(int)
    acknowledged: defaultdict[str, int] = defaultdict(int)
    begins: set[str] = set()
    for line in path.read_text().splitlines():
        kind, *fields = line.split()
        who = fields[0] if fields else ""
        if kind == "d":
            position, event = int(fields[1]), (int(fields[2]), int(fields[3]))
            topic = TOPICS[int(who) % 3]
            if who in begins:
                begins.discard(who)
                if not acknowledged[who] < position <= asked[who] + 1:
                    verdict.say(
                        f"consumer {who} began at {position}: {acknowledged[who]} was acknowledged, {asked[who]} asked"
                    )
            elif position != latest[who] + 1:
                verdict.say(f"consumer {who} was given {position} behind {latest[who]} of {topic}")
            if position > furthest[who] + 1:
                verdict.lost += position - furthest[who] - 1
                verdict.say(f"consumer {who} never worked on {furthest[who] + 1} to {position - 1} of {topic}")
            verdict.duplicates += position <= furthest[who]
            latest[who], furthest[who] = position, max(furthest[who], position)
            if lists[topic].setdefault(position, event) != event:
                verdict.say(f"position {position} of {topic} is {lists[topic][position]} and {event}")
        elif kind == "b":
            begins.add(who)
        elif kind == "t":
            asked[who] = max(asked[who], int(fields[1]))
            if asked[who] > furthest[who]:
                verdict.say(f"consumer {who} acknowledged {asked[who]} before it had worked on it")
        elif kind == "a":
            acknowledged[who] = max(acknowledged[who], int(fields[1]))
        elif kind == "x":
            verdict.cancels += 1
        elif kind == "g":
            position, event = int(fields[1]), (int(fields[3]), int(fields[4]))
            if lists[GROUP_TOPIC].setdefault(position, event) != event:
                verdict.say(f"position {position} of {GROUP_TOPIC} is two events")
    for who, position in furthest.items():
        last = lasts[TOPICS[int(who) % 3]]
        if position < last:
            verdict.lost += last - position
            verdict.say(f"consumer {who} never worked on {position + 1} to {last}")


def _judge_group(folder: Path, last: int, verdict: Verdict) -> None:
    """Every attempt is one member's, new events come to each in order, and what is done does not come again."""
    given: defaultdict[int, list[int]] = defaultdict(list)
    done: dict[int, int] = {}
    for path in sorted(folder.glob("*.read")):
        newest: defaultdict[str, int] = defaultdict(int)
        for line in path.read_text().splitlines():
            kind, *fields = line.split()
            if kind == "g":
                position, attempts = int(fields[1]), int(fields[2])
                if attempts in given[position]:
                    verdict.say(f"attempt {attempts} of {position} was given out twice")
                given[position].append(attempts)
                if attempts == 1:
                    if position <= newest[fields[0]]:
                        verdict.say(f"member {fields[0]} was given {position} behind {newest[fields[0]]}")
                    newest[fields[0]] = position
            elif kind == "k":
                position = int(fields[1])
                if position in done:
                    verdict.say(f"{position} was done twice")
                done[position] = int(fields[2])
    for position in range(1, last + 1):
        if position not in given:
            verdict.lost += 1
            verdict.say(f"no member worked on {position}")
    verdict.duplicates += sum(len(attempts) - 1 for attempts in given.values())
    for position, attempts in done.items():
        if attempts != max(given[position], default=attempts):
            verdict.say(f"{position} was given out again after it was done")


def _judge_list(
    topic: str,
    events: Mapping[int, tuple[int, int]],
    last: int,
    places: dict[tuple[int, int], tuple[str, int]],
    verdict: Verdict,
) -> None:
    """No position is empty, no event stands at two, and the events of each producer are in its order."""
    latest: dict[int, int] = {}
    for position in range(1, last + 1):
        event = events.get(position)
        if event is None:
            continue  # told by those who judge the readers
        producer, number = event
        if event in places:
            verdict.say(f"event {number} of producer {producer} is at {places[event]} and at {(topic, position)}")
        places[event] = (topic, position)
        if number <= latest.get(producer, -1):
            verdict.say(f"{topic}: event {number} of producer {producer} stands behind {latest[producer]}")
        latest[producer] = number
    if events and max(events) > last:
        verdict.say(f"{topic} ends at {last}, and {max(events)} was read")


def _judge_publish(
    publish: _Publish, places: Mapping[tuple[int, int], tuple[str, int]], verdict: Verdict, *, atomic: bool
) -> None:
    numbers = range(publish.first, publish.first + publish.count)
    found = [places.get((publish.producer, number)) for number in numbers]
    if publish.outcome == "o":
        verdict.acknowledged += publish.count
        for n, place in enumerate(found):
            if place is None:
                verdict.lost += 1
                verdict.say(f"event {numbers[n]} of producer {publish.producer} was acknowledged, and is not there")
            elif place != (publish.topic, publish.position + n):
                verdict.say(f"event {numbers[n]} of producer {publish.producer} is at {place}")
        return
    there = [place is not None for place in found]
    if publish.outcome == "f":
        verdict.failed += publish.count
        if any(there):
            verdict.say(f"events of producer {publish.producer} from {publish.first} on failed, and are there")
        return
    verdict.unknown += publish.count
    verdict.found += sum(there)
    if there != sorted(there, reverse=True) or (atomic and any(there) and not all(there)):
        verdict.say(f"the publish of producer {publish.producer} from {publish.first} on is there in part")
