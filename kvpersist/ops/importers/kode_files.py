"""The files of one Kode agent, read as they lie, with what its write-ahead logs hold beyond them.

A log is ``{data, timestamp}`` of a whole file, and then newer than it; or lines of events that were not
flushed yet. Nothing is replayed in place, and no file is renamed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

from kvpersist.events.records import NewEvent
from kvpersist.ops.importers.kode_records import (
    CHANNELS,
    agent_id_of,
    agent_of,
    compression_of,
    conversation_of,
    event_of,
    media_of,
    recovered_of,
    snapshot_of,
    todos_of,
    window_of,
)
from kvpersist.ops.importers.plan import (
    Bad,
    Events,
    Item,
    Problem,
    Record,
    list_or_none,
    mapping,
    object_or_none,
    read_json,
)
from kvpersist.ops.importers.sql import unlisted

__all__ = ["agent_folders", "folders_beside", "items_beside", "items_of"]

_PARTS: Final = ("runtime", "events", "history", "snapshots")
_PAGE: Final = 200  # events handed on at once


def agent_folders(base: Path) -> list[tuple[str, Path]]:
    """The agents of a folder by the path below it, sorted; forks lie below their parents. Links are not followed."""
    found: list[tuple[str, Path]] = []
    for folder, below, files in os.walk(base, onerror=unlisted):
        path = Path(folder)
        if path != base and ("meta.json" in files or any(part in below for part in _PARTS)):
            found.append((path.relative_to(base).as_posix(), path))
            below[:] = [name for name in below if name not in _PARTS]
    return sorted(found)


def folders_beside(base: Path) -> list[str]:
    """The folders right below one that hold what Kode keeps beside its tables; there may be others among them."""
    signs = ["runtime/todos.json", "runtime/media-cache.json", *(f"events/{channel}.log" for channel in CHANNELS)]
    return sorted(path.name for path in base.iterdir() if any((path / sign).is_file() for sign in signs))


def items_of(name: str, folder: Path) -> Iterator[Item]:
    """Yield everything of an agent that is kept in files only."""
    info: dict[str, Any] = {}
    agent = name
    meta = _Place(name, folder, "meta.json")
    try:
        document = mapping(meta.json() or {}, "meta.json")
        info = object_or_none(document.get("info")) or document
    except Bad as error:
        yield Problem(place=meta.shown, reason=str(error))
    said = info.get("agentId")
    if isinstance(said, str) and os.path.normpath(said) == os.path.normpath(name):
        agent = said
    elif said is not None:
        reason = f"it says it is of the agent {said!r}: taken for the one of its folder"
        yield Problem(place=meta.shown, reason=reason, left_out=False)
    elif not info:
        reason = "nothing tells what agent this is: one was made of its folder's name"
        yield Problem(place=meta.shown, reason=reason, left_out=False)
    try:
        yield agent_of(meta.shown, agent, info)
    except Bad as error:
        yield Problem(place=meta.shown, reason=f"imported without what it says: {error}", left_out=False)
        yield agent_of(meta.shown, agent, {})
    messages: list[tuple[str, Any]] = []
    calls: list[tuple[str, Any]] = []
    for file, found in (("messages", messages), ("tool-calls", calls)):
        place = _Place(name, folder, f"runtime/{file}.json")
        problems: list[Problem] = []
        found += ((f"{place.shown} [{index}]", value) for index, value in enumerate(place.listed(problems)))
        yield from problems
    yield conversation_of(f"{name}/runtime/messages.json", agent, info, messages, calls)
    for place in _files(name, folder, "snapshots", ".json"):
        yield from _one(place, lambda place: snapshot_of(place.shown, agent, place.json()))
    yield from items_beside(name, agent, folder)


def items_beside(name: str, agent: str, folder: Path) -> Iterator[Item]:
    """Yield what is kept in files also where the rest is in tables: todos, media, history and events."""
    place = _Place(name, folder, "runtime/todos.json")
    if place.path.exists() or place.log.exists():
        yield from _one(place, lambda place: todos_of(place.shown, agent, place.newest()))
    place = _Place(name, folder, "runtime/media-cache.json")
    problems: list[Problem] = []
    for index, value in enumerate(place.listed(problems)):
        at = f"{place.shown} [{index}]"
        try:
            yield media_of(at, agent, value)
        except Bad as error:
            yield Problem(place=at, reason=str(error))
    yield from problems
    for place in _files(name, folder, "history/windows", ".json"):
        yield from _one(place, lambda place: window_of(place.shown, agent, place.json()))
    for place in _files(name, folder, "history/compressions", ".json"):
        yield from _one(place, lambda place: compression_of(place.shown, agent, place.json()))
    for place in _files(name, folder, "history/recovered", ".txt"):
        yield from _one(place, lambda place: recovered_of(place.shown, agent, place.path.name, place.text()))
    yield from _events(name, agent, folder)
    for left in sorted(folder.rglob("*.corrupted")):
        if left.is_file() and left.relative_to(folder).parts[0] in _PARTS:
            yield Problem(place=f"{name}/{left.relative_to(folder).as_posix()}", reason="kode found it unreadable")


class _Place:
    """A file of an agent, and its log."""

    def __init__(self, name: str, folder: Path, file: str) -> None:
        self.shown, self.folder = f"{name}/{file}", folder
        self.path = folder / file
        self.log = self.path.with_suffix(".wal")

    def text(self) -> str:
        _check_file(self.folder, self.path)
        try:
            return self.path.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise Bad(f"unreadable: {error}") from None

    def json(self) -> Any:
        """What the file holds; None where there is none."""
        return read_json(self.text()) if self.path.exists() else None

    def newest(self) -> Any:
        """What the log holds, or else the file."""
        return self.logged() if self.log.exists() else self.json()

    def logged(self) -> Any:
        _check_file(self.folder, self.log)
        try:
            return mapping(read_json(self.log.read_bytes()), "the log")["data"]
        except (OSError, KeyError) as error:
            raise Bad(f"unreadable log: {error}") from None

    def listed(self, problems: list[Problem]) -> list[Any]:
        """The list in the log, or in the file where the log cannot be read."""
        if self.log.exists():
            try:
                return _list(self.logged())
            except Bad as error:
                shown = self.shown.removesuffix(".json") + ".wal"
                problems.append(Problem(place=shown, reason=f"not replayed: {error}"))
        try:
            return _list(self.json())
        except Bad as error:
            problems.append(Problem(place=self.shown, reason=str(error)))
            return []


def _check_file(folder: Path, path: Path) -> None:
    """Refuse what leads out of the agent's folder, whoever made that link, and what is no file."""
    if not path.resolve().is_relative_to(folder.resolve()):
        raise Bad("it is a link out of the agent's folder, which is not followed")
    if not path.is_file():
        raise Bad("it is no file")


def _list(value: Any) -> list[Any]:
    """A list, or the one list in an object."""
    if value is None:
        return []
    listed = list_or_none(value)
    if listed is None:
        inner = [each for each in map(list_or_none, (object_or_none(value) or {}).values()) if each is not None]
        if len(inner) != 1:
            raise Bad("it holds no list")
        listed = inner[0]
    return listed


def _files(name: str, folder: Path, below: str, suffix: str) -> Iterator[_Place]:
    for path in sorted((folder / below).glob(f"*{suffix}")):
        if path.is_file():
            yield _Place(name, folder, f"{below}/{path.name}")


def _one(place: _Place, make: Callable[[_Place], Record]) -> Iterator[Item]:
    try:
        yield make(place)
    except Bad as error:
        yield Problem(place=place.shown, reason=str(error))


def _events(name: str, agent: str, folder: Path) -> Iterator[Item]:
    """The events of all channels in the order of the agent's sequence; logs give those that are in no file yet."""
    found: list[tuple[int, int, NewEvent]] = []
    for rank, channel in enumerate(CHANNELS):
        seen: set[int] = set()
        for suffix in (".log", ".wal"):
            path = folder / "events" / f"{channel}{suffix}"
            if not path.exists():
                continue
            try:
                _check_file(folder, path)
            except Bad as error:
                yield Problem(place=f"{name}/events/{path.name}", reason=str(error))
                continue
            for number, line in enumerate(_lines(path), 1):
                try:
                    seq, event = event_of(channel, read_json(line))
                except Bad as error:
                    yield Problem(place=f"{name}/events/{path.name}:{number}", reason=str(error))
                    continue
                if suffix == ".log" or seq not in seen:
                    seen.add(seq)
                    found.append((seq, rank, event))
    found.sort(key=lambda item: item[:2])
    topic = agent_id_of(agent)[0]
    for start in range(0, len(found), _PAGE):
        events = [event for _, _, event in found[start : start + _PAGE]]
        yield Events(place=f"{name}/events", topic=topic, events=events)


def _lines(path: Path) -> Iterator[bytes]:
    data = path.read_bytes()
    if path.suffix == ".wal":  # lines as in the file, or all of them in one object
        try:
            document = object_or_none(read_json(data))
        except Bad:
            document = None
        logged = None if document is None else document.get("data")
        if isinstance(logged, str):
            data = logged.encode()
        elif (listed := list_or_none(logged)) is not None:
            for item in listed:
                yield item.encode() if isinstance(item, str) else _dumped(item)
            return
    for line in data.splitlines():
        if line.strip():
            yield line


def _dumped(value: Any) -> bytes:
    import json

    return json.dumps(value).encode()
