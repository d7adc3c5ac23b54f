"""A layout of another system that lies in the tables of a database."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable

from kvpersist.ops.importers.plan import Bad, Item, Problem, Record, Source
from kvpersist.ops.importers.sql import Database, Row, Table

__all__ = ["TablesSource"]


class TablesSource(Source):
    """Whose database is closed with it."""

    def __init__(self, system: str, database: Database) -> None:
        super().__init__(system, database.shown)
        self._database = database

    async def changed(self) -> str | None:
        return await self._database.changed()

    async def close(self) -> None:
        await self._database.close()

    async def _records(self, table: Table | None, make: Callable[[str, Row], Record]) -> AsyncIterator[Item]:
        """One item for each row, of a table that need not be there."""
        if table is None:
            return
        async for row in self._database.iterate(table, "id"):
            place = f"{table.name} {row.get('id')}"
            try:
                yield make(place, row)
            except Bad as error:
                yield Problem(place=place, reason=str(error))
