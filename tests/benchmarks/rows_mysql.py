"""The row M1: put and get against multi-row statements of asyncmy."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from floors_mysql import RawMysql
from measure import Line, Plan
from rows import Row
from servers import needed, new_name
from statements import fill, lines_of_64
from work import TASKS, Note

import kvpersist
from kvpersist.urls import split

__all__ = ["ROWS"]


@asynccontextmanager
async def _m1(folder: str, plan: Plan) -> AsyncIterator[list[Line]]:
    url, name = needed("mariadb")["MYSQL_URL"], new_name()
    parts, _ = split(url)
    where = {"host": parts.host, "port": parts.port or 3306, "user": parts.username, "password": parts.password}
    raw = await RawMysql.open(f"{name}_raw", Note, database=parts.path, **where)
    try:
        async with kvpersist.open_store({"url": url, "table": name}) as store:
            [[version, flushed]] = await raw.run("SELECT version(), @@innodb_flush_log_at_trx_commit")
            setting = f"{version}, innodb_flush_log_at_trx_commit={flushed}"
            notes = kvpersist.Repository(store, Note, name="note", key="id")
            ids = await fill(notes, raw, int(10_000 * plan.load))
            yield lines_of_64("M1", notes, raw, ids, TASKS * int(10 * plan.scale), goals=(1.5, 1.5), setting=setting)
    finally:
        await raw.run(f"DROP TABLE IF EXISTS {name}")
        await raw.close()


ROWS: dict[str, Row] = {"M1": _m1}
