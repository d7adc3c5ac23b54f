"""A store is opened by keyword as by URL; one that is left open names the line that opened it."""

from __future__ import annotations

import asyncio
import gc
import inspect
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Self

import pytest
from msgspec import Struct

import kvpersist
from kvpersist import bytes_level, registry
from kvpersist.errors import BadOption, UnknownScheme
from kvpersist_drivers.memory import MemoryDriver


class _Client:
    """Of some backend's library."""


class _Options(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    url: str = ""
    host: str = ""
    port: int | None = None
    password: str = ""
    client: Any = None
    pool_max: int = 10
    base: str = "kv"


class _Served(MemoryDriver):
    """A driver that could have connections."""

    Options: ClassVar[type[Struct]] = _Options
    opened: ClassVar[list[_Options]] = []

    @classmethod
    async def open(cls, options: Any, /) -> Self:
        cls.opened.append(options)
        return cls()


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[_Options]:
    """The options that drivers were opened with; ``served`` is their scheme."""
    monkeypatch.delenv("KVPERSIST_URL", raising=False)
    real = registry.driver_class

    def driver_class(scheme: str) -> Any:
        return _Served if scheme == "served" else real(scheme)

    monkeypatch.setattr(registry, "driver_class", driver_class)
    _Served.opened.clear()
    return _Served.opened


_FUNCTIONS = pytest.mark.parametrize("function", [kvpersist.open, kvpersist.open_store])


@_FUNCTIONS
async def test_keywords_name_a_store_as_a_url_does(function: Any, opened: list[_Options]) -> None:
    client = _Client()
    for named in (
        function(type="served", host="db", port=7, base="app"),
        function({"type": "served", "host": "db"}, port=7, base="app"),
        function("served://db:7", base="app", pool_max=4),
        function(url="served://db:7?kv.base=app", pool_max="4"),
        function("served://db:7", type="served"),
        function({"url": "served://db:7"}, pool_max=4),
        function(type="served", client=client),
    ):
        async with named:
            pass

    at_7 = _Options(url="served://db:7", host="db", port=7)
    assert opened == [
        _Options(host="db", port=7, base="app"),
        _Options(host="db", port=7, base="app"),
        _Options(url=at_7.url, host="db", port=7, base="app", pool_max=4),
        _Options(url="served://db:7", host="db", port=7, base="app", pool_max=4),
        _Options(url=at_7.url),
        _Options(url=at_7.url, host="db", port=7, pool_max=4),
        _Options(client=client),
    ]
    assert opened[-1].client is client


@_FUNCTIONS
async def test_settings_among_the_options_are_the_stores(function: Any, opened: list[_Options]) -> None:
    async with function({"type": "served", "timeout": "1m"}, ttl=5, sweep=None) as made:
        store = made if isinstance(made, kvpersist.Store) else made.store

        assert (store.timeout, store._ttl, store._sweeper) == (60.0, 5, None)


@pytest.mark.parametrize(
    ("where", "options", "option", "says"),
    [
        ("served://db", {"pool_mx": 4}, "pool_mx", "did you mean pool_max?"),
        ("served://db", {"tiemout": 4}, "tiemout", "did you mean timeout?"),
        ("served://db", {"kv.bose": "x"}, "bose", "did you mean base?"),
        ("served://db?kv.bose=x", {"base": "x"}, "kv.bose", "did you mean kv.base?"),
        ("served://db?kv.base=x", {"base": "y"}, "base", "beside it"),
        ("served://db", {"pool_max": "many"}, "pool_max", "int"),
        ("served://db", {"host": "other"}, "host", "beside a URL it has no place"),
        ("served://db", {"url": "served://other"}, "url", "named twice"),
        ("served://db", {"type": "memory"}, "url", "there is no such option"),
        ({"type": "served", "base": "x"}, {"base": "y"}, "base", "beside it"),
        ({"type": "served"}, {"clinet": 1}, "clinet", "did you mean client?"),
        (None, {"base": "x"}, "base", "there is no such option"),
        (None, {"typ": "served"}, "typ", "did you mean type?"),
        (None, {"namespce": "x"}, "namespce", "did you mean namespace?"),
        ("served://db", {"namespce": "x"}, "namespce", "did you mean namespace?"),
    ],
)
async def test_what_is_wrong_with_a_keyword_is_named(
    opened: list[_Options], where: Any, options: dict[str, Any], option: str, says: str
) -> None:
    with pytest.raises(BadOption) as caught:
        await kvpersist.open(where, **options)

    assert caught.value.option == option
    assert says in str(caught.value)
    assert opened == []


async def test_what_is_open_already_takes_no_options() -> None:
    driver = MemoryDriver()
    with pytest.raises(BadOption, match="open already"):
        await kvpersist.open_store(driver, pool_max=4)
    async with kvpersist.open_store(driver) as store:
        with pytest.raises(BadOption, match="open already"):
            await kvpersist.open(store, table="kv")


async def test_an_unknown_type_is_told_as_an_unknown_scheme_is() -> None:
    with pytest.raises(UnknownScheme, match="Did you mean 'redis'"):
        await kvpersist.open(type="reddis", host="h")


def test_every_argument_may_be_what_an_unknown_option_meant() -> None:
    from kvpersist.agents import persistence
    from kvpersist.urls import StoreSettings

    named = {*persistence._ARGUMENTS, *StoreSettings.__annotations__, "where", "options"}

    assert set(inspect.signature(kvpersist.open).parameters) == named


async def test_no_error_about_keywords_shows_a_password(opened: list[_Options]) -> None:
    for options in ({"password": "CANARY", "nosuch": 1}, {"password": ["CANARY"]}, {"password": "CANARY", "port": "x"}):
        with pytest.raises(BadOption) as caught:
            await kvpersist.open(type="served", **options)
        assert "CANARY" not in str(caught.value)


# -- left open ---------------------------------------------------------------------------------


def _line() -> str:
    frame = inspect.currentframe()
    assert frame is not None
    assert frame.f_back is not None
    return f"{__file__}:{frame.f_back.f_lineno}"


async def _warned(opening: Callable[[], Any]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        made = await opening()
        del made
        for _ in range(3):
            await asyncio.sleep(0)
            gc.collect()
    return [str(one.message) for one in caught if one.category is ResourceWarning]


@_FUNCTIONS
@pytest.mark.parametrize("where", ["memory://", "served://ada:CANARY@db:7/0"])
async def test_a_store_dropped_unclosed_names_its_opener(function: Any, where: str, opened: list[_Options]) -> None:
    lines: list[str] = []

    def opening() -> Any:
        lines.append(_line()); return function(where)  # fmt: skip  # noqa: E702

    [told] = await _warned(opening)

    shown = where.replace("CANARY", "***")
    assert told == f"the store {shown}, opened at {lines[0]}, was never closed: use async with"


async def test_a_store_that_was_closed_or_is_over_a_driver_of_yours_says_nothing() -> None:
    async def closed() -> None:
        async with kvpersist.open_store("memory://") as store:
            await store.put("a", 1)

    async def failed() -> None:
        class _Down(MemoryDriver):
            async def get(self, keys: Any) -> Any:
                raise kvpersist.Unavailable("down")

        with pytest.raises(kvpersist.Unavailable):
            await kvpersist.open_store(_Down())

    assert await _warned(closed) == []
    assert await _warned(failed) == []
    assert await _warned(lambda: kvpersist.open_store(MemoryDriver(), sweep=None)) == []


async def test_a_store_that_could_not_be_opened_says_nothing(opened: list[_Options], monkeypatch: Any) -> None:
    async def get(self: Any, keys: Any) -> Any:
        raise kvpersist.Unavailable("down")

    monkeypatch.setattr(_Served, "get", get)

    async def opening() -> None:
        with pytest.raises(kvpersist.Unavailable):
            await kvpersist.open_store("served://db")

    assert await _warned(opening) == []
    assert bytes_level.left_open() == []


async def test_what_is_left_open_is_known_until_it_is_closed() -> None:
    store = await kvpersist.open_store("memory://"); line = _line()  # fmt: skip  # noqa: E702

    assert [(one.where, one.opener) for one in bytes_level.left_open()] == [("memory://", line)]
    await store.close()
    assert bytes_level.left_open() == []


def test_a_program_that_forgets_to_close_is_told_where(tmp_path: Path) -> None:
    program = tmp_path / "forgets.py"
    program.write_text(
        "import asyncio, kvpersist\n"
        "async def main():\n"
        "    db = await kvpersist.open('sqlite:///kept.db')\n"
        "    await db.sessions.create()\n"
        "asyncio.run(main())\n"
    )

    done = subprocess.run(
        [sys.executable, "-X", "dev", str(program)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=60,
        check=True,
    )

    assert f"the store sqlite:///kept.db, opened at {program}:3, was never closed" in done.stderr
