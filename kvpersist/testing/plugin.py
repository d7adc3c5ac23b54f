"""Pytest fixtures: ``kv`` (in memory), ``kv_sqlite`` (a file), ``kv_url`` (``--kv-url``), ``kv_no_leaks``.

The first three are an open `kvpersist.store.Store`, closed after the test; the last fails a test that
leaves a store open. The plugin is loaded into every pytest
run where kvpersist is installed, so nothing of kvpersist is imported before a fixture is asked for.
The fixtures need pytest-asyncio.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pytest_asyncio import fixture

    from kvpersist.store import Store
else:
    try:  # its own decorator works in its strict mode too
        from pytest_asyncio import fixture
    except ModuleNotFoundError:
        fixture = pytest.fixture

__all__ = ["kv", "kv_no_leaks", "kv_sqlite", "kv_url", "pytest_addoption"]


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add ``--kv-url``."""
    parser.getgroup("kvpersist").addoption(
        "--kv-url", metavar="URL", help="the store behind the fixture kv_url: a scratch one, for it is not emptied"
    )


@fixture
async def kv() -> AsyncIterator[Store]:
    """An empty store in memory."""
    from kvpersist.opening import open_store

    async with open_store("memory://") as store:
        yield store


@fixture
async def kv_sqlite(tmp_path: Path) -> AsyncIterator[Store]:
    """An empty store in a SQLite file, ``tmp_path / "kv.db"``."""
    from kvpersist.opening import open_store

    async with open_store({"type": "sqlite", "path": str(tmp_path / "kv.db")}) as store:
        yield store


@fixture
async def kv_url(request: pytest.FixtureRequest) -> AsyncIterator[Store]:
    """The store that ``--kv-url`` names, as it is; the test is skipped where none was given."""
    from kvpersist.opening import open_store

    where: str | None = request.config.getoption("--kv-url")
    if where is None:
        pytest.skip("needs --kv-url")
    async with open_store(where) as store:
        yield store


@pytest.fixture
def kv_no_leaks() -> Iterator[None]:
    """Fail the test if it leaves a store open that it opened by a URL or the like; name the line that did."""
    from kvpersist.testing.leaks import no_leaks

    with no_leaks():
        yield
