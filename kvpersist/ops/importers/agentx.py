"""AgentX: its key-value layout wherever it is kept, its export in one JSON file, and its ``queue.db``.

======================  =====================================================================
of AgentX               becomes
======================  =====================================================================
container, prototype    the same; ``config`` and other fields are kept
image                   the same, by container and name
session                 a session with ``container_id`` and ``image_id``
message                 a message; ``subtype`` and what has no field of ours stand in ``extra``
llm provider            a provider; its key in clear is left out, unless it is asked for
queue entry             an event of the topic, with its old cursor
queue consumer          a consumer's position
======================  =====================================================================
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any, Final

from kvpersist.agents.records import Message, Session
from kvpersist.errors import BadRequest
from kvpersist.ops.importers.agentx_messages import message_of
from kvpersist.ops.importers.agentx_places import Place, normal, open_place
from kvpersist.ops.importers.agentx_queue import AgentxQueue
from kvpersist.ops.importers.agentx_records import SHELVES, record_of
from kvpersist.ops.importers.plan import (
    Bad,
    Conversation,
    Item,
    Problem,
    Source,
    id_for,
    json_value,
    list_or_none,
    mapping,
    moment_of,
    read_json,
    required_text,
    text_or_none,
)
from kvpersist.ops.importers.sql import found_at, open_database, path_of

__all__ = ["open_agentx"]

_SYSTEM: Final = "agentx"
_PAGE: Final = 200  # records read at once
_SHELVES: Final = (*(shelf.name for shelf in SHELVES), "sessions", "messages")
_DERIVED: Final = ("idx",)  # made from the records: ours makes its own


async def open_agentx(where: str, **options: str) -> Source:
    """Open what AgentX left: a database, a folder of files, a server, an export, a queue, or its home folder.

    Args:
        where: a path or a URL; a home folder is one with ``data/agentx.db`` or ``data/queue.db`` in it.
        options: as for `kvpersist.ops.importers.agentx_places.open_place`.
    """
    found = found_at(where)
    if found == "folder":
        parts = await asyncio.to_thread(_home_files, path_of(where))
        if parts:
            return _Home(where, [await open_agentx(str(part), **options) for part in parts])
    elif found == "file":
        path = path_of(where)
        if await asyncio.to_thread(_is_export, path):
            return _Store(str(path), await asyncio.to_thread(_Export.read, path))
        if await _is_queue(where):
            return await AgentxQueue.open(where)
    return _Store.over(await open_place(where, **options))


class _Home(Source):
    def __init__(self, shown: str, parts: list[Source]) -> None:
        super().__init__(_SYSTEM, shown)
        self._parts = parts

    async def items(self) -> AsyncIterator[Item]:
        for part in self._parts:
            async for item in part.items():
                yield item

    async def changed(self) -> str | None:
        return next(filter(None, [await part.changed() for part in self._parts]), None)

    async def close(self) -> None:
        for part in self._parts:
            await part.close()


# ---- records and sessions


class _Shelves:
    """The records of a store by kind, and the messages of its sessions."""

    async def records(self, shelf: str) -> AsyncIterator[tuple[str, str | None, Any]]:
        """Yield place, the id that the place gives (None: it gives none) and the value, decoded or not."""
        raise NotImplementedError
        yield

    async def messages(self, session_id: str) -> tuple[str, Any]:
        """Place and value of a session's messages; None where there are none."""
        raise NotImplementedError

    async def homeless(self) -> AsyncIterator[tuple[str, str, Any]]:
        """Yield place, session id and value of messages whose session is not there."""
        raise NotImplementedError
        yield

    def strangers(self) -> list[str]:
        """Keys that are not AgentX's."""
        return []

    async def total(self) -> int | None:
        return None

    async def changed(self) -> str | None:
        return None

    async def close(self) -> None:
        """Close what was opened."""


class _Keys(_Shelves):
    """Key and value, as all drivers of AgentX have them."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self._keys: dict[str, list[str]] = {}
        self._named: set[str] = set()

    async def records(self, shelf: str) -> AsyncIterator[tuple[str, str | None, Any]]:
        await self._list()
        keys = self._keys.get(shelf, [])
        for start in range(0, len(keys), _PAGE):
            page = keys[start : start + _PAGE]
            for key, value in zip(page, await self._place.get(page), strict=True):
                yield self._at(key), key.partition(":")[2], value

    async def messages(self, session_id: str) -> tuple[str, Any]:
        key = f"messages:{normal(session_id)}"
        self._named.add(key)
        [value] = await self._place.get([key]) if key in self._keys.get("messages", ()) else [None]
        return self._at(key), value

    async def homeless(self) -> AsyncIterator[tuple[str, str, Any]]:
        for key in self._keys.get("messages", ()):
            if key not in self._named:
                [value] = await self._place.get([key])
                yield self._at(key), key.partition(":")[2], value

    def strangers(self) -> list[str]:
        return [self._at(key) for shelf, keys in self._keys.items() if shelf not in _SHELVES + _DERIVED for key in keys]

    async def total(self) -> int | None:
        await self._list()
        return sum(len(self._keys.get(shelf, ())) for shelf in _SHELVES if shelf != "messages")

    async def changed(self) -> str | None:
        return await self._place.changed()

    async def close(self) -> None:
        await self._place.close()

    async def _list(self) -> None:
        if self._keys:
            return
        for key in await self._place.keys():
            self._keys.setdefault(key.partition(":")[0], []).append(key)

    def _at(self, key: str) -> str:
        return f"{self._place.name} {key}".strip()


class _Export(_Shelves):
    """The export: {containers, images, sessions, messages: {session id: messages}}."""

    def __init__(self, document: dict[str, Any]) -> None:
        self._document = document
        self._named: set[str] = set()

    @classmethod
    def read(cls, path: Path) -> _Export:
        """Read the file.

        Raises:
            BadRequest: it is no export.
        """
        try:
            document = mapping(read_json(path.read_bytes()), "the export")
            for shelf in _SHELVES[:-1]:
                if not isinstance(document.get(shelf, []), list):
                    raise Bad(f"{shelf} is no list")
            mapping(document.get("messages", {}), "messages")
        except Bad as error:
            raise BadRequest(f"{path}: {error}: this is no export of agentx") from error
        return cls(document)

    async def records(self, shelf: str) -> AsyncIterator[tuple[str, str | None, Any]]:
        name = "llmProviders" if shelf == "llm-providers" and shelf not in self._document else shelf
        for index, value in enumerate(self._document.get(name, [])):
            yield f"{name}[{index}]", None, value

    async def messages(self, session_id: str) -> tuple[str, Any]:
        self._named.add(session_id)
        return f"messages[{session_id}]", self._document.get("messages", {}).get(session_id)

    async def homeless(self) -> AsyncIterator[tuple[str, str, Any]]:
        for session_id, value in self._document.get("messages", {}).items():
            if session_id not in self._named:
                yield f"messages[{session_id}]", session_id, value

    def strangers(self) -> list[str]:
        return [name for name in self._document if name not in (*_SHELVES, "llmProviders", "version", "exportedAt")]

    async def total(self) -> int | None:
        return sum(len(self._document.get(shelf, ())) for shelf in _SHELVES if shelf != "messages")


class _Store(Source):
    def __init__(self, shown: str, shelves: _Shelves) -> None:
        super().__init__(_SYSTEM, shown)
        self._shelves = shelves

    @classmethod
    def over(cls, place: Place) -> _Store:
        return cls(place.shown, _Keys(place))

    async def items(self) -> AsyncIterator[Item]:
        shelves = self._shelves
        for shelf in SHELVES:
            async for place, named, value in shelves.records(shelf.name):
                try:
                    yield record_of(place, shelf, _row(value, shelf.id_field, named))
                except Bad as error:
                    yield Problem(place=place, reason=str(error))
        async for place, named, value in shelves.records("sessions"):
            try:
                row = _row(value, "sessionId", named)
                at, messages = await shelves.messages(row["sessionId"])
                yield _conversation(place, at, row, messages)
            except Bad as error:
                yield Problem(place=place, reason=str(error))
        async for place, session_id, value in shelves.homeless():
            yield Problem(place=place, reason="there is no session of this id: one was made for them", left_out=False)
            yield _conversation(place, place, {"sessionId": session_id}, value)
        for place in shelves.strangers():
            yield Problem(place=place, reason="it is nothing that agentx is known to keep")

    async def total(self) -> int | None:
        return await self._shelves.total()

    async def changed(self) -> str | None:
        return await self._shelves.changed()

    async def close(self) -> None:
        await self._shelves.close()


def _row(value: Any, id_field: str, named: str | None) -> dict[str, Any]:
    row = mapping(json_value(value), "the record")
    given = next((name for name in (id_field, "id") if row.get(name) is not None), None)
    id_ = named if given is None else required_text(row, given)
    if not id_:
        raise Bad(f"{id_field} is missing")
    if named is not None and normal(id_) != named:
        raise Bad(f"its {id_field} is {id_!r}, which does not belong under this key")
    return {**row, id_field: id_}


def _conversation(place: str, at: str, row: Mapping[str, Any], value: Any) -> Conversation:
    id_, foreign = id_for(row["sessionId"], "session")
    known = ("sessionId", "imageId", "containerId", "createdAt", "updatedAt")
    container, image = text_or_none(row.get("containerId"), "containerId"), text_or_none(row.get("imageId"), "imageId")
    rest = {name: value for name, value in row.items() if name not in known}
    session = Session(
        id=id_,
        external_id=foreign,
        container_id=id_for(container, "container")[0] if container else None,
        image_id=id_for(image, "image")[0] if image else None,
        metadata={"agentx": rest} if rest else {},
        created_at=moment_of(row.get("createdAt"), "createdAt"),
        updated_at=moment_of(row.get("updatedAt"), "updatedAt"),
    )
    messages: list[Message] = []
    problems: list[Problem] = []
    try:
        decoded = json_value(value)
        listed = [] if decoded is None else list_or_none(decoded)
        if listed is None:
            raise Bad("the messages are no list")
    except Bad as error:
        listed = []
        problems.append(Problem(place=at, reason=str(error)))
    for index, item in enumerate(listed):
        try:
            messages.append(message_of(mapping(item, "the message")))
        except Bad as error:
            problems.append(Problem(place=f"{at} [{index}]", reason=str(error)))
    return Conversation(place=place, session=session, messages=messages, problems=problems)


def _home_files(folder: Path) -> list[Path]:
    for data in (folder / "data", folder):
        if found := [file for file in (data / "agentx.db", data / "queue.db") if file.is_file()]:
            return found
    return []


def _is_export(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(64).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"{")


async def _is_queue(where: str) -> bool:
    database = await open_database(where)
    try:
        return await database.table("entries") is not None and await database.table("kv_storage") is None
    finally:
        await database.close()
