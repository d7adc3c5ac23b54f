"""Tables of another system, read through the client libraries that the drivers use too.

Names of tables and columns in a statement are those that the database itself lists, quoted; values
are always parameters. On servers everything is read in one read-only snapshot; a SQLite file is opened
read-only, and what is in its write-ahead log is seen.
"""

from __future__ import annotations

import asyncio
import os
import sqlite3
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, Final, Literal, NoReturn, Self, TypeAlias, cast
from urllib.parse import parse_qsl, quote, urlencode, urlsplit, urlunsplit

from msgspec import Struct

from kvpersist import urls
from kvpersist.driver import needs_extra
from kvpersist.errors import BadOption, BadRequest, Unavailable

__all__ = [
    "Database",
    "JsonText",
    "Row",
    "Table",
    "check_url",
    "found_at",
    "held_database",
    "open_database",
    "path_of",
    "unlisted",
]

Row: TypeAlias = dict[str, Any]
"""A row by the plain names of its columns."""

_PAGE: Final = 500  # rows read at once where nothing else bounds them
_AGAIN: Final = 0.05  # seconds between two attempts to interrupt a statement
_TIMEOUT: Final = 30.0  # seconds, to connect and for a statement
_FOREIGN: Final = ("schema", "connection_limit", "pool_timeout", "pgbouncer", "socket_timeout", "sslaccept")
"""Parameters that Prisma takes out of a URL, and no server knows."""


class JsonText(str):
    """What a database knows to be JSON, as text."""

    __slots__ = ()


class Table(Struct, frozen=True):
    """A table that is there. ``columns`` leads from plain names (``sessionid``) to real ones (``sessionId``)."""

    name: str
    columns: dict[str, str]

    def has(self, *names: str) -> bool:
        """Whether it has a column of each of these names."""
        return all(_plain(name) in self.columns for name in names)


class Database(ABC):
    """A database, open for reading."""

    row_order = ""
    """What orders rows as they were inserted, as far as that can be known; empty: it cannot."""

    def __init__(self, shown: str) -> None:
        self.shown = shown

    @abstractmethod
    async def fetch(self, statement: str, *values: Any) -> list[tuple[Any, ...]]:
        """Return the rows of a statement; ``values`` stand for the marks in it.

        Raises:
            BadRequest: the database refuses the statement. Unavailable: it does not answer.
        """

    @abstractmethod
    def mark(self, number: int) -> str:
        """What stands for value ``number``, from 1."""

    @abstractmethod
    async def columns(self, table: str) -> list[str]:
        """The names of a table's columns; none where there is no such table."""

    def quoted(self, name: str) -> str:
        """A name, quoted."""
        return '"' + name.replace('"', '""') + '"'

    async def changed(self) -> str | None:
        """Say what shows that somebody wrote meanwhile; None: nothing does, or it does not matter."""
        return None

    @abstractmethod
    async def close(self) -> None:
        """Close the connection."""

    async def table(self, name: str) -> Table | None:
        """Look for a table."""
        columns = await self.columns(name)
        return Table(name, {_plain(column): column for column in columns}) if columns else None

    async def needed(self, name: str, system: str, *columns: str) -> Table:
        """Return a table that has to be there, with these columns.

        Raises:
            BadRequest: it is not, or lacks one.
        """
        found = await self.table(name)
        if found is None:
            raise BadRequest(f"{self.shown} has no table {name}: it holds nothing of {system}, or is another database")
        for column in columns:
            if not found.has(column):
                raise BadRequest(f"{self.shown}: table {name} has no column {column}: no layout of {system} known here")
        return found

    async def select(
        self,
        table: Table,
        *,
        where: Mapping[str, Any] | None = None,
        order: Sequence[str] = (),
        behind: tuple[str, Any] | None = None,
        limit: int | None = None,
    ) -> list[Row]:
        """Return rows of a table.

        Args:
            where: columns and what they must equal.
            order: columns, where the table has them; then the order of insertion.
            behind: a column and the value that rows must lie behind.
        """
        tests: list[str] = []
        values: list[Any] = []
        for name, value in (where or {}).items():
            values.append(value)
            tests.append(f"{self._column(table, name)} = {self.mark(len(values))}")
        if behind is not None:
            values.append(behind[1])
            tests.append(f"{self._column(table, behind[0])} > {self.mark(len(values))}")
        by = [self._column(table, name) for name in order if table.has(name)]
        if self.row_order and behind is None:
            by.append(self.row_order)
        listed = ", ".join(self.quoted(column) for column in table.columns.values())
        statement = f"SELECT {listed} FROM {self.quoted(table.name)}"  # noqa: S608 - names the database lists, quoted
        statement += f" WHERE {' AND '.join(tests)}" if tests else ""
        statement += f" ORDER BY {', '.join(by)}" if by else ""
        statement += f" LIMIT {int(limit)}" if limit is not None else ""
        return [dict(zip(table.columns, row, strict=True)) for row in await self.fetch(statement, *values)]

    async def iterate(self, table: Table, key: str) -> AsyncIterator[Row]:
        """Yield every row, by its unique column ``key``, some hundred at a time."""
        behind: tuple[str, Any] | None = None
        while page := await self.select(table, order=(key,), behind=behind, limit=_PAGE):
            for row in page:
                yield row
            if len(page) < _PAGE:
                return
            behind = key, page[-1][_plain(key)]

    async def strays(self, table: Table, column: str, known: Collection[str]) -> list[tuple[str, int]]:
        """What ``column`` names that is not ``known``, and in how many rows; sorted."""
        name = self._column(table, column)
        statement = f"SELECT {name}, count(*) FROM {self.quoted(table.name)} GROUP BY {name}"  # noqa: S608 - as above
        found = [(_shown(value), int(count)) for value, count in await self.fetch(statement) if value is not None]
        return sorted(each for each in found if each[0] not in known)

    async def count(self, table: Table) -> int:
        """Count the rows."""
        [[count]] = await self.fetch(f"SELECT count(*) FROM {self.quoted(table.name)}")  # noqa: S608 - as above
        return int(count)

    def _column(self, table: Table, name: str) -> str:
        return self.quoted(table.columns[_plain(name)])


async def open_database(where: str) -> Database:
    """Open a SQLite file, or a PostgreSQL or MySQL database by its URL.

    Raises:
        BadOption: it is none of these, or the server refuses the address.
        MissingExtra: the client library is not installed.
        FileNotFoundError: there is no such file. Unavailable: the server does not answer.
    """
    scheme = where.partition("://")[0].lower() if "://" in where else "sqlite"
    if scheme in ("postgres", "postgresql"):
        return await _Postgres.open(where)
    if scheme in ("mysql", "mariadb"):
        return await _Mysql.open(where)
    if scheme == "sqlite":
        return await _Sqlite.open(where)
    raise BadOption("source", f"{scheme}:// is no database read here: a SQLite file, postgresql:// or mysql://")


@asynccontextmanager
async def held_database(where: str) -> AsyncIterator[Database]:
    """Open a database, as `open_database`, for what the block makes of it; closed again only where the block fails."""
    database = await open_database(where)
    try:
        yield database
    except BaseException:  # cancelled too: nobody else has it
        await database.close()
        raise


def check_url(where: str) -> urls.UrlParts:
    """Split a URL before a client library does, whose errors would show a password that is not escaped.

    Raises:
        BadOption: it is no URL, or one with a raw '/', '@' or '#' in its password.
    """
    parts, _ = urls.split(where)
    if "@" in parts.url.partition("://")[2].partition("?")[0].partition("/")[2]:
        raise BadOption("source", f"{urls.redact(where)}: write %2F and %40 for '/' and '@' in a password or name")
    return parts


def path_of(where: str) -> Path:
    """The file that a path or a ``sqlite:///`` URL names."""
    return Path(where.removeprefix("sqlite:///")) if where.startswith("sqlite:///") else Path(where)


def found_at(where: str) -> Literal["folder", "file", "url"]:
    """What a text names.

    Raises:
        FileNotFoundError: a path of nothing.
    """
    if "://" in where and not where.startswith("sqlite:///"):
        return "url"
    path = path_of(where)
    if not path.exists():
        raise FileNotFoundError(2, "no such file or folder", str(path))
    return "folder" if path.is_dir() else "file"


def unlisted(error: OSError) -> NoReturn:
    """For `os.walk`, which passes over a folder that cannot be listed, with all that is in it."""
    raise error


class _Sqlite(Database):
    row_order = "rowid"

    def __init__(self, path: Path, connection: sqlite3.Connection, state: tuple[Any, ...] | None) -> None:
        super().__init__(str(path))
        self._path, self._connection, self._state = path, connection, state

    @classmethod
    async def open(cls, where: str) -> Self:
        path = path_of(where)
        found_at(where)
        # Without a log nobody has the file open, and `immutable` leaves no files beside it; `changed` tells if
        # somebody opened it all the same.
        state = None if any(_beside(path, suffix) for suffix in ("-wal", "-journal")) else _state(path)
        uri = f"file:{quote(os.fspath(path.absolute()))}?mode=ro" + ("" if state is None else "&immutable=1")
        try:
            connection = await asyncio.to_thread(
                sqlite3.connect, uri, uri=True, check_same_thread=False, isolation_level=None, timeout=_TIMEOUT
            )
        except sqlite3.Error as error:
            raise BadRequest(f"{path}: {error}") from error
        connection.text_factory = _text
        return cls(path, connection, state)

    async def fetch(self, statement: str, *values: Any) -> list[tuple[Any, ...]]:
        try:
            return await self._in_thread(lambda: self._connection.execute(statement, values).fetchall())
        except sqlite3.Error as error:
            raise BadRequest(f"{self.shown}: {error}") from error

    async def _in_thread(self, function: Callable[[], list[tuple[Any, ...]]]) -> list[tuple[Any, ...]]:
        """Run a statement; being cancelled ends it, so that nobody closes the connection under it, or waits for it."""
        running = asyncio.ensure_future(asyncio.to_thread(function))
        try:
            return await asyncio.shield(running)
        except asyncio.CancelledError:
            while not running.done():
                self._connection.interrupt()  # in vain where the statement has not begun: so again
                await asyncio.wait([running], timeout=_AGAIN)
            if not running.cancelled():
                running.exception()  # looked at: nobody else will
            raise

    def mark(self, number: int) -> str:
        return f"?{number}"

    async def columns(self, table: str) -> list[str]:
        return [name for (name,) in await self.fetch("SELECT name FROM pragma_table_info(?1)", table)]

    async def changed(self) -> str | None:
        if self._state is None or self._state == _state(self._path):
            return None
        return "the file was written to while it was read"

    async def close(self) -> None:
        await asyncio.to_thread(self._connection.close)


class _Postgres(Database):
    row_order = "ctid"

    def __init__(self, shown: str, connection: Any) -> None:
        super().__init__(shown)
        self._connection = connection

    @classmethod
    async def open(cls, where: str) -> Self:
        with needs_extra("postgres", module="asyncpg"):
            import asyncpg
        shown = urls.redact(where)
        check_url(where)
        url, schema = _without_foreign(where)
        settings: dict[str, Any] = {"server_settings": {"search_path": schema}} if schema else {}
        connect = cast("Any", asyncpg).connect  # it brings no whole types
        try:
            connection = await connect(url, timeout=_TIMEOUT, command_timeout=_TIMEOUT, **settings)
        except (asyncpg.InvalidAuthorizationSpecificationError, asyncpg.InvalidCatalogNameError) as error:
            raise BadOption("source", f"{shown}: {error}") from error
        except ValueError:
            raise BadOption("source", f"{shown}: the client cannot read this address") from None
        except (asyncpg.PostgresError, asyncpg.InterfaceError, OSError, TimeoutError) as error:
            raise Unavailable(f"{shown}: {error}") from error
        for kind in ("json", "jsonb"):
            await connection.set_type_codec(kind, encoder=str, decoder=JsonText, schema="pg_catalog")
        await connection.execute("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")
        return cls(shown, connection)

    async def fetch(self, statement: str, *values: Any) -> list[tuple[Any, ...]]:
        import asyncpg

        try:
            return [tuple(row) for row in await self._connection.fetch(statement, *values)]
        except (asyncpg.ConnectionDoesNotExistError, asyncpg.InterfaceError, OSError, TimeoutError) as error:
            raise Unavailable(f"{self.shown}: {error}") from error
        except asyncpg.PostgresError as error:
            raise BadRequest(f"{self.shown}: {error}") from error

    def mark(self, number: int) -> str:
        return f"${number}"

    async def columns(self, table: str) -> list[str]:
        statement = (
            "SELECT attname FROM pg_attribute WHERE attrelid = to_regclass(quote_ident($1)) "
            "AND attnum > 0 AND NOT attisdropped ORDER BY attnum"
        )
        return [str(name) for (name,) in await self.fetch(statement, table)]

    async def close(self) -> None:
        await self._connection.close(timeout=5.0)


class _Mysql(Database):
    def __init__(self, shown: str, connection: Any) -> None:
        super().__init__(shown)
        self._connection = connection

    @classmethod
    async def open(cls, where: str) -> Self:
        with needs_extra("mysql", module="asyncmy"):
            import asyncmy
            from asyncmy.errors import Error, OperationalError
        parts = check_url(where)
        shown = urls.redact(where)
        if not parts.path:
            raise BadOption("source", f"{shown} names no database: mysql://user:password@host/database")
        connect = cast("Any", asyncmy).connect  # it brings no whole types
        try:
            connection = await connect(
                host=parts.host or "127.0.0.1",
                port=parts.port or 3306,
                user=parts.username or None,
                password=parts.password,
                db=parts.path,
                unix_socket=parts.params.get("unix_socket"),
                charset="utf8mb4",
                connect_timeout=int(_TIMEOUT),
                read_timeout=int(_TIMEOUT),
            )
        except OperationalError as error:
            if error.args and error.args[0] in (1044, 1045, 1049):  # denied, or no such database
                raise BadOption("source", f"{shown}: {error}") from error
            raise Unavailable(f"{shown}: {error}") from error
        except (Error, OSError, TimeoutError) as error:
            raise Unavailable(f"{shown}: {error}") from error
        database = cls(shown, connection)
        await database.fetch("SET time_zone = '+00:00'")
        await database.fetch("SET SESSION TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        await database.fetch("START TRANSACTION WITH CONSISTENT SNAPSHOT, READ ONLY")
        return database

    async def fetch(self, statement: str, *values: Any) -> list[tuple[Any, ...]]:
        from asyncmy.errors import Error, InterfaceError, OperationalError

        try:
            async with self._connection.cursor() as cursor:
                await cursor.execute(statement, values)
                return [tuple(row) for row in await cursor.fetchall() or ()]
        except (OperationalError, InterfaceError, OSError, TimeoutError) as error:
            raise Unavailable(f"{self.shown}: {error}") from error
        except Error as error:
            raise BadRequest(f"{self.shown}: {error}") from error

    def mark(self, number: int) -> str:
        return "%s"

    def quoted(self, name: str) -> str:
        return "`" + name.replace("`", "``").replace("%", "%%") + "`"

    async def columns(self, table: str) -> list[str]:
        statement = (
            "SELECT column_name FROM information_schema.columns "
            "WHERE table_schema = DATABASE() AND table_name = %s ORDER BY ordinal_position"
        )
        return [str(name) for (name,) in await self.fetch(statement, table)]

    async def close(self) -> None:
        with suppress(Exception):  # it said goodbye before we could: closed all the same
            await self._connection.ensure_closed()


def _text(data: bytes) -> str | bytes:
    """What a SQLite file calls a text: its bytes where it is none, so that only that field is refused."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return data


def _shown(value: Any) -> str:
    return repr(value) if isinstance(value, bytes) else str(value)


def _plain(name: str) -> str:
    return name.replace("_", "").lower()


def _beside(path: Path, suffix: str) -> bool:
    """Whether a log lies beside the file, with something in it."""
    log = Path(f"{path}{suffix}")
    return log.exists() and log.stat().st_size > 0


def _state(path: Path) -> tuple[Any, ...]:
    found = path.stat()
    return found.st_mtime_ns, found.st_size, found.st_ino, _beside(path, "-wal")


def _without_foreign(where: str) -> tuple[str, str | None]:
    """The URL without parameters of Prisma's, and the schema that one of them names."""
    split = urlsplit(where)
    pairs = parse_qsl(split.query, keep_blank_values=True)
    schema = next((value for name, value in pairs if name == "schema" and value), None)
    kept = urlencode([pair for pair in pairs if pair[0] not in _FOREIGN])
    return urlunsplit(split._replace(query=kept)), schema
