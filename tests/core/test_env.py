"""Variables of a file, and those of other systems."""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

import kvpersist
from kvpersist import config, urls
from kvpersist.errors import BadOption, KvError, MissingExtra, UnknownScheme

needs_dotenv = pytest.mark.skipif(find_spec("dotenv") is None, reason="needs python-dotenv")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for variable in (config.VARIABLE, config.PROFILE, config.HOME):
        monkeypatch.delenv(variable, raising=False)
    return tmp_path


# -- .env --------------------------------------------------------------------------------------


@needs_dotenv
async def test_a_file_of_variables_is_read_when_it_is_asked_for(folder: Path) -> None:
    (folder / ".env").write_text('# a comment\nexport KVPERSIST_URL="sqlite:///of-the-file.db"\n')

    async with kvpersist.open(dotenv=True) as db:
        assert db.store.where == "sqlite:///of-the-file.db"
    async with kvpersist.open_store(dotenv=folder / ".env") as store:
        assert store.where == "sqlite:///of-the-file.db"
    assert config.resolve(environ=config.variables(dotenv=False)).source == "default"
    assert "KVPERSIST_URL" not in os.environ


@needs_dotenv
def test_what_is_set_already_wins_over_the_file(folder: Path) -> None:
    (folder / ".env").write_text("A=file\nB=file\nC\n")

    assert config.variables(dotenv=True, environ={"A": "set"}) == {"A": "set", "B": "file"}


def test_a_missing_file_is_an_error_only_where_it_was_named(folder: Path) -> None:
    assert config.variables(dotenv=True, environ={"A": "1"}) == {"A": "1"}
    with pytest.raises(BadOption, match=r"other\.env is not there"):
        config.variables(dotenv="other.env")


@needs_dotenv
@pytest.mark.parametrize("text", [b"A=1\nthis is no line\n", b"A='open\n", b"A=\xff\n"])
def test_a_file_that_cannot_be_read_is_an_error_that_names_it(folder: Path, text: bytes) -> None:
    (folder / ".env").write_bytes(text)

    with pytest.raises(BadOption, match=r"\.env"):
        config.variables(dotenv=True)


def test_without_the_library_the_error_says_what_to_install(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / ".env").write_text("A=1")
    for name in ("dotenv", "dotenv.main", "dotenv.parser"):
        monkeypatch.setitem(sys.modules, name, None)

    with pytest.raises(MissingExtra, match=r"kvpersist\[dotenv\]"):
        config.variables(dotenv=True)


# -- DATABASE_URL ------------------------------------------------------------------------------


def _database(url: str) -> dict[str, Any]:
    return dict(config.from_database_url(environ={"DATABASE_URL": url}))


@pytest.mark.parametrize(
    ("url", "found"),
    [
        ("postgres://ada:pw@db:5433/agents", {"url": "postgres://ada:pw@db:5433/agents"}),
        ("postgresql+asyncpg://ada@db/agents", {"url": "postgresql://ada@db/agents"}),
        (
            "postgresql://ada:p%40w@db/agents?schema=public&connection_limit=5&pool_timeout=7&sslmode=require",
            {
                "url": "postgresql://ada:p%40w@db/agents?sslmode=require",
                "pool_max": "5",
                "connect_timeout": "7",
                "schema": "public",
            },
        ),
        (
            "postgresql://db/a?pgbouncer=true&connect_timeout=3&pool_timeout=9&socket_timeout=4&statement_cache_size=0",
            {"url": "postgresql://db/a", "connect_timeout": "3", "timeout": "4", "pgbouncer": "true"},
        ),
        ("postgresql://db/a?sslaccept=strict", {"url": "postgresql://db/a?sslmode=verify-full"}),
        ("postgresql://db/a?connect_timeout=0&connection_limit=0", {"url": "postgresql://db/a"}),
        (
            "mysql://ada:pw@db:3306/agents?connection_limit=5&sslaccept=strict",
            {"url": "mysql://ada:pw@db:3306/agents", "pool_max": "5", "ssl": "verify-full"},
        ),
        ("mysql2://db/a?ssl={%22rejectUnauthorized%22:true}", {"url": "mysql://db/a", "ssl": "verify-full"}),
        ("mysql+pymysql://db/a?charset=utf8mb4&socket=/s", {"url": "mysql://db/a?unix_socket=%2Fs"}),
        ("mariadb://db/a", {"url": "mariadb://db/a"}),
        ("mongodb+srv://ada:pw@c.example/agents?retryWrites=true", None),
        ("mongodb://ada:pw@a,b/agents", None),
        ("redis://h:6379/0", None),
        ("file:./dev.db", {"type": "sqlite", "path": "./dev.db"}),
        ("file:dev.db?connection_limit=1", {"type": "sqlite", "path": "dev.db"}),
        ("file:/var/lib/dev.db", {"type": "sqlite", "path": "/var/lib/dev.db"}),
        ("file:///var/lib/dev.db", {"type": "sqlite", "path": "/var/lib/dev.db"}),
        ("sqlite:dev.db", {"type": "sqlite", "path": "dev.db"}),
        ("sqlite::memory:", {"type": "sqlite", "path": ":memory:"}),
        ("sqlite:///dev.db", {"type": "sqlite", "path": "dev.db"}),
        ("sqlite+aiosqlite:////var/dev.db", {"type": "sqlite", "path": "/var/dev.db"}),
        ("sqlite://dev.db", {"type": "sqlite", "path": "dev.db"}),
    ],
)
def test_a_database_url_of_others_is_understood(url: str, found: dict[str, Any] | None) -> None:
    assert _database(url) == ({"url": url} if found is None else found)


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://ada:pw@db/agents?schema=public&connection_limit=5&pool_timeout=7&socket_timeout=3",
        "mysql://ada:pw@db/agents?connection_limit=5&sslaccept=accept_invalid_certs",
        "mongodb://ada:pw@db/agents",
        "file:./dev.db",
    ],
)
def test_what_is_understood_is_what_the_drivers_take(url: str) -> None:
    try:
        target = urls.parse(_database(url))
    except MissingExtra as missing:
        pytest.skip(str(missing))

    assert target.scheme == url.partition(":")[0].replace("file", "sqlite")


@pytest.mark.parametrize(
    "url", ["sqlserver://h:1433;database=a;user=sa;password=CANARY", "mssql+pyodbc://sa:CANARY@h/a"]
)
def test_sql_server_is_refused_and_the_way_to_a_plugin_is_named(url: str) -> None:
    with pytest.raises(UnknownScheme, match=r"DATABASE_URL.*plugin.*write-a-driver") as caught:
        _database(url)

    assert "CANARY" not in str(caught.value)


@pytest.mark.parametrize("url", ["jdbc:sqlserver://h;password=CANARY", "prisma://accelerate?api_key=CANARY"])
def test_what_has_no_driver_is_refused(url: str) -> None:
    with pytest.raises(UnknownScheme) as caught:
        _database(url)

    assert "CANARY" not in str(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        "",
        "CANARY",
        "postgresql:",
        "file:",
        "file:///dir/",
        "file:./x.db?CANARY=1",
        "postgresql://ada:CANARY@db/a?channel_binding=require",
        "postgresql://ada:CANARY@db/a?sslidentity=x.p12",
        "mysql://ada:CANARY@db/a?sslaccept=maybe",
        "mysql://ada:CANARY@db/a?ssl={",
        "mysql://ada:CANARY@db/a?charset=latin1",
    ],
)
def test_a_database_url_that_cannot_be_kept_is_an_error_that_names_the_variable(url: str) -> None:
    with pytest.raises(BadOption) as caught:
        _database(url)

    assert caught.value.option == "DATABASE_URL"
    assert "CANARY" not in str(caught.value).replace("'CANARY'", "")


def test_the_variable_can_have_another_name_and_a_plugins_scheme_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvpersist.registry.schemes", lambda: ("sqlserver",))

    found = config.from_database_url("APP_DB", environ={"APP_DB": "sqlserver://h;user=sa"})

    assert found == {"url": "sqlserver://h;user=sa"}


async def test_a_database_url_opens_its_store(folder: Path) -> None:
    async with kvpersist.open(config.from_database_url(environ={"DATABASE_URL": "file:./dev.db"})) as db:
        await db.sessions.create(id="s")

    assert (folder / "dev.db").is_file()


# -- REDIS_URL ---------------------------------------------------------------------------------


@pytest.mark.parametrize("url", ["redis://:pw@h:6379/2", "rediss://h", "valkey://h", "unix:///run/redis.sock"])
def test_a_redis_url_is_taken_as_it_is(url: str) -> None:
    assert config.from_redis_url(environ={"REDIS_URL": url}) == {"url": url}


def test_a_redis_url_may_be_a_host_alone() -> None:
    assert config.from_redis_url(environ={"REDIS_URL": "cache:6380"}) == {"url": "redis://cache:6380"}


@pytest.mark.parametrize("given", [{}, {"REDIS_URL": " "}, {"REDIS_URL": "http://ada:CANARY@h"}])
def test_a_redis_url_that_is_none_is_an_error_that_names_the_variable(given: dict[str, str]) -> None:
    with pytest.raises(BadOption) as caught:
        config.from_redis_url(environ=given)

    assert caught.value.option == "REDIS_URL"
    assert "CANARY" not in str(caught.value)


# -- Kode --------------------------------------------------------------------------------------


def test_kodes_variables_name_a_sqlite_file_and_a_folder(folder: Path) -> None:
    assert config.from_kode_env(environ={"KODE_STORE_TYPE": "sqlite"}) == {
        "type": "sqlite",
        "path": "./data/agents.db",
        "files": {"type": "file", "path": str(folder / "data" / "store")},
    }
    given = {"KODE_STORE_TYPE": "sqlite", "KODE_SQLITE_PATH": "/x/a.db", "KODE_STORE_PATH": "/x/s"}
    assert config.from_kode_env(environ=given) == {
        "type": "sqlite",
        "path": "/x/a.db",
        "files": {"type": "file", "path": "/x/s"},
    }


def test_kodes_variables_name_a_postgres_server_with_the_documented_fallbacks(folder: Path) -> None:
    given = {"KODE_STORE_TYPE": "postgres", "POSTGRES_PASSWORD": "CANARY"}
    found = config.from_kode_env(environ=given)

    assert {name: value for name, value in found.items() if name != "files"} == {
        "type": "postgresql",
        "host": "localhost",
        "port": 5432,
        "database": "kode_agents",
        "username": "kode",
        "password": "CANARY",
    }
    assert "CANARY" not in repr(found) and "CANARY" not in f"{found}"
    more = {"POSTGRES_HOST": "db", "POSTGRES_PORT": "6000", "POSTGRES_DB": "d", "POSTGRES_USER": "u"}
    found = config.from_kode_env(environ={**given, **more})
    assert (found["host"], found["port"], found["database"], found["username"]) == ("db", 6000, "d", "u")


@pytest.mark.parametrize(
    ("given", "variable"),
    [
        ({}, "KODE_STORE_TYPE"),
        ({"KODE_STORE_TYPE": ""}, "KODE_STORE_TYPE"),
        ({"KODE_STORE_TYPE": "json"}, "KODE_STORE_TYPE"),
        ({"KODE_STORE_TYPE": "mysql"}, "KODE_STORE_TYPE"),
        ({"KODE_STORE_TYPE": "postgres"}, "POSTGRES_PASSWORD"),
        ({"KODE_STORE_TYPE": "postgres", "POSTGRES_PASSWORD": ""}, "POSTGRES_PASSWORD"),
        ({"KODE_STORE_TYPE": "postgres", "POSTGRES_PASSWORD": "CANARY", "POSTGRES_PORT": "x"}, "POSTGRES_PORT"),
        ({"KODE_STORE_TYPE": "postgres", "POSTGRES_PASSWORD": "CANARY", "POSTGRES_PORT": "70000"}, "POSTGRES_PORT"),
    ],
)
def test_kodes_variables_that_are_missing_or_wrong_are_named(given: dict[str, str], variable: str) -> None:
    with pytest.raises(BadOption) as caught:
        config.from_kode_env(environ=given)

    assert caught.value.option == variable
    assert "CANARY" not in str(caught.value)


async def test_kodes_variables_open_both_stores(folder: Path) -> None:
    async with kvpersist.open(config.from_kode_env(environ={"KODE_STORE_TYPE": "sqlite"})) as db:
        assert list(db.placement.stores) == ["main", "files"]
        await db.sessions.create()

    assert (folder / "data" / "agents.db").is_file()
    assert (folder / "data" / "store").is_dir()


def test_every_error_of_the_helpers_is_one_of_ours() -> None:
    for helper in (config.from_database_url, config.from_redis_url, config.from_kode_env):
        with pytest.raises(KvError):
            helper(environ={})
