"""What others keep is shown on the eight drivers that agents are kept on, by the same calls on each.

A test names the rows of the checked list that it shows: ``@pytest.mark.shows(row, ...)``, and
``tests/docs/make_checked_list.py`` makes the page of them. A module opens each store once; the ids
of a test are its own.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Final

import pytest
import pytest_asyncio
from places import PLACES, Place

import kvpersist
from kvpersist.agents.persistence import Persistence

EIGHT: Final = ("memory", "sqlite", "filesystem", "s3", "redis", "mongo", "postgres", "mysql")


@pytest.fixture(scope="module", params=[place for place in PLACES if place.name in EIGHT], ids=lambda place: place.name)
def place(request: pytest.FixtureRequest) -> Place:
    return request.param


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def db(
    place: Place, service: Callable[[str], dict[str, str]], tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Persistence]:
    """A store of the driver, shared by the tests of a module."""
    where = place.make(service(place.service) if place.service else {}, tmp_path_factory.mktemp(place.name))
    async with kvpersist.open(where, timeout=60) as opened:
        yield opened


@pytest.fixture
def keys_with(db: Persistence) -> Callable[[str], Awaitable[list[str]]]:
    """The keys that have a text in them, without tombstones: where batches are not atomic these stay for 30 days."""

    async def find(text: str) -> list[str]:
        found = await db.store.driver.scan(None, None, limit=1_000_000)
        return [entry.key for entry in found if text in entry.key and entry.value and entry.expires_at is None]

    return find
