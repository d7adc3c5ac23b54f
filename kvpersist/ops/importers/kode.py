"""The Kode SDK's stores: a folder of files, or SQLite or PostgreSQL tables with files beside them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from kvpersist.errors import BadOption, BadRequest
from kvpersist.ops.importers.kode_files import agent_folders, folders_beside, items_beside, items_of
from kvpersist.ops.importers.kode_records import agent_of, conversation_of, snapshot_of
from kvpersist.ops.importers.plan import Bad, Item, Problem, Source, json_value, required_text
from kvpersist.ops.importers.sql import Database, Row, Table, found_at, held_database, path_of
from kvpersist.ops.importers.tables import TablesSource

__all__ = ["open_kode"]

_SYSTEM: Final = "kode"
_JSON: Final = (
    "lineage",
    "lastbookmark",
    "metadata",
    "content",
    "input",
    "approval",
    "result",
    "audittrail",
    "messages",
)
_INFO: Final = {
    "templateid": "templateId",
    "createdat": "createdAt",
    "configversion": "configVersion",
    "lineage": "lineage",
    "messagecount": "messageCount",
    "lastsfpindex": "lastSfpIndex",
    "lastbookmark": "lastBookmark",
    "breakpoint": "breakpoint",
    "metadata": "metadata",
}
_CALL: Final = {
    "id": "id",
    "name": "name",
    "input": "input",
    "state": "state",
    "approval": "approval",
    "result": "result",
    "error": "error",
    "iserror": "isError",
    "startedat": "startedAt",
    "completedat": "completedAt",
    "durationms": "durationMs",
    "createdat": "createdAt",
    "updatedat": "updatedAt",
    "audittrail": "auditTrail",
}
_SNAPSHOT: Final = {
    "snapshotid": "id",
    "messages": "messages",
    "lastsfpindex": "lastSfpIndex",
    "lastbookmark": "lastBookmark",
    "createdat": "createdAt",
    "metadata": "metadata",
}
_MESSAGE: Final = {"id": "id", "role": "role", "content": "content", "metadata": "metadata", "createdat": "created_at"}


async def open_kode(where: str, *, files: str | None = None) -> Source:
    """Open a JSONStore folder, or a database.

    Args:
        where: the folder, a SQLite file, or the URL of a PostgreSQL database.
        files: of a database, the folder of the files beside it; for SQLite the file's own, unless given.
    """
    if files is not None and found_at(files) != "folder":
        raise BadOption("files", f"{files} is no folder")
    found = found_at(where)
    if found == "folder":
        if files is not None:
            raise BadOption("files", "a folder has no files beside it: leave it out")
        base = Path(where)
        if not await asyncio.to_thread(agent_folders, base):
            raise BadRequest(f"{where} holds no agents: no store of kode")
        return _Folder(base)
    beside = path_of(where).parent if files is None and found == "file" else None
    async with held_database(where) as database:
        return await _Tables.over(database, beside if files is None else Path(files))


class _Folder(Source):
    def __init__(self, base: Path) -> None:
        super().__init__(_SYSTEM, str(base))
        self._base = base

    async def items(self) -> AsyncIterator[Item]:
        for name, folder in await asyncio.to_thread(agent_folders, self._base):
            for item in await asyncio.to_thread(_all, items_of(name, folder)):
                yield item


class _Tables(TablesSource):
    def __init__(self, database: Database, tables: Mapping[str, Table], files: Path | None) -> None:
        super().__init__(_SYSTEM, database)
        self._tables, self._files = tables, files

    @classmethod
    async def over(cls, database: Database, files: Path | None) -> _Tables:
        agents = await database.needed("agents", _SYSTEM, "agent_id", "template_id", "lineage")
        messages = await database.needed("messages", _SYSTEM, "agent_id", "role", "content", "seq")
        tables = {"agents": agents, "messages": messages}
        for name in ("tool_calls", "snapshots"):
            if (found := await database.table(name)) is not None:
                tables[name] = found
        return cls(database, tables, files)

    async def items(self) -> AsyncIterator[Item]:
        seen: set[str] = set()
        async for row in self._database.iterate(self._tables["agents"], "agent_id"):
            try:
                agent = required_text(row, "agentid")
            except Bad as error:
                yield Problem(place="agents", reason=str(error))
                continue
            seen.add(agent)
            async for item in self._agent(agent, row):
                yield item
        for name in ("messages", "tool_calls", "snapshots"):
            async for item in self._homeless(name, seen):
                yield item
        if self._files is not None:
            for name in await asyncio.to_thread(folders_beside, self._files):
                if name not in seen:
                    yield Problem(place=f"{self._files}/{name}", reason="no agent of this id is in the table agents")

    async def total(self) -> int | None:
        return None

    async def _agent(self, agent: str, row: Row) -> AsyncIterator[Item]:
        place = f"agents {agent}"
        info: dict[str, Any] = {}
        try:
            info = _named(row, _INFO)
            yield agent_of(place, agent, info)
        except Bad as error:
            yield Problem(place=place, reason=f"imported without what it says: {error}", left_out=False)
            info.clear()
            yield agent_of(place, agent, info)
        messages: list[tuple[str, Any]] = []
        calls: list[tuple[str, Any]] = []
        for table, order, names, found in (
            ("messages", ("seq",), _MESSAGE, messages),
            ("tool_calls", ("created_at",), _CALL, calls),
        ):
            for below in await self._rows(table, agent, order):
                at = f"{table} {below.get('id')}"
                try:
                    found.append((at, _named(below, names)))
                except Bad as error:
                    yield Problem(place=at, reason=str(error))
        yield conversation_of(place, agent, info, messages, calls)
        for below in await self._rows("snapshots", agent, ("created_at",)):
            at = f"snapshots {agent} {below.get('snapshotid')}"
            try:
                yield snapshot_of(at, agent, _named(below, _SNAPSHOT))
            except Bad as error:
                yield Problem(place=at, reason=str(error))
        if self._files is not None and (folder := self._folder(self._files, agent)) is not None:
            for item in await asyncio.to_thread(_all, items_beside(agent, agent, folder)):
                yield item

    async def _rows(self, table: str, agent: str, order: tuple[str, ...]) -> list[Row]:
        found = self._tables.get(table)
        return [] if found is None else await self._database.select(found, where={"agent_id": agent}, order=order)

    async def _homeless(self, name: str, seen: set[str]) -> AsyncIterator[Item]:
        table = self._tables.get(name)
        if table is None:
            return
        for agent, count in await self._database.strays(table, "agent_id", seen):
            reason = f"{count} rows of an agent that is not in the table agents"
            yield Problem(place=f"{name} of {agent}", reason=reason)

    @staticmethod
    def _folder(files: Path, agent: str) -> Path | None:
        """The agent's folder, where it lies below the files: an id may lead elsewhere."""
        base = files.resolve()
        folder = (base / agent).resolve()
        return folder if folder != base and folder.is_relative_to(base) and folder.is_dir() else None


def _all(items: Iterator[Item]) -> list[Item]:
    return list(items)


def _named(row: Row, names: Mapping[str, str]) -> dict[str, Any]:
    """The fields of a row by their names in Kode's records; columns that hold JSON decoded."""
    found: dict[str, Any] = {}
    for column, value in row.items():
        if (name := names.get(column)) is None or value is None:
            continue
        if column in _JSON:
            try:
                value = json_value(value)
            except Bad as error:
                raise Bad(f"{name}: {error}") from None
        found[name] = value
    return found
