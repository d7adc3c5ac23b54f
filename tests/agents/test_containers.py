"""Containers: created, saved, renamed, found, and given metadata."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
import pytest

import kvpersist
from kvpersist import Container, Session
from kvpersist.agents.persistence import Persistence
from kvpersist.errors import BadOption, BadRequest, NoIndex, Unencodable, UniqueConflict

START = datetime(2025, 3, 1, 12, tzinfo=UTC)


async def test_a_container_comes_back_as_it_was_created(db: Persistence) -> None:
    made = await db.containers.create(name="acme", config={"a": [1, {"b": None}], "at": START}, metadata={"n": 0})

    assert made.id and made.created_at == made.updated_at is not None
    assert await db.containers.get(made.id) == made
    assert await db.containers.exists(made.id) and not await db.containers.exists("nobody")
    assert await db.containers.get("nobody") is None


async def test_an_id_is_given_once(db: Persistence, driver: Any) -> None:
    await db.containers.create(id="auth0|7: ä!", name="first")
    before = await driver.everything()

    with pytest.raises(UniqueConflict):
        await db.containers.create(Container(id="auth0|7: ä!", name="second"))

    assert await driver.everything() == before


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"nmae": "x"}, BadRequest),
        ({"created_at": datetime(2025, 1, 1)}, BadRequest),  # noqa: DTZ001
        ({"name": 7}, Unencodable),
        ({"config": {"x": object()}}, Unencodable),
        ({"metadata": {1: 2}}, Unencodable),
    ],
)
async def test_what_cannot_be_kept_is_refused_whole(
    fields: dict[str, Any], error: type[Exception], db: Persistence, driver: Any
) -> None:
    before = await driver.everything()

    with pytest.raises(error):
        await db.containers.create(id="c", **fields)

    assert await driver.everything() == before
    await db.containers.create(id="c")


async def test_another_kind_of_record_is_refused(db: Persistence) -> None:
    with pytest.raises(BadRequest, match="a container is a Container, not Session"):
        await db.containers.create(Session())  # pyright: ignore[reportArgumentType]
    with pytest.raises(BadRequest, match="not str"):
        await db.containers.save("c")  # pyright: ignore[reportArgumentType]
    with pytest.raises(BadRequest, match="or its fields"):
        await db.containers.create(Container(), name="x")


async def test_containers_are_listed_newest_first_and_page_by_page(db: Persistence) -> None:
    for n in range(7):
        await db.containers.create(id=str(n), name="odd" if n % 2 else "even", created_at=START + timedelta(days=n))

    assert [c.id for c in await db.containers.find(limit=3)] == ["6", "5", "4"]
    assert [c.id for c in await db.containers.find(limit=2, offset=5)] == ["1", "0"]
    assert [c.id for c in await db.containers.find(name="odd")] == ["5", "3", "1"]
    page = await db.containers.page(limit=4)
    rest = await db.containers.page(limit=4, after=page.cursor)
    assert [c.id for c in (*page.items, *rest.items)] == list("6543210")
    assert rest.cursor is None
    assert await db.containers.count() == 7 and await db.containers.count(name="even") == 4
    assert sorted([c.id async for c in db.containers.iterate()]) == list("0123456")
    with pytest.raises(NoIndex):
        await db.containers.find(config="x")
    for wrong in ({"limit": 0}, {"offset": -1}):
        with pytest.raises(BadRequest):
            await db.containers.find(**wrong)


async def test_metadata_is_replaced_or_merged(db: Persistence) -> None:
    made = await db.containers.create(id="c", metadata={"a": 1, "b": {"x": 1}})

    merged = await db.containers.merge_metadata("c", {"b": 2, "c": None})
    assert merged is not None and merged.metadata == {"a": 1, "b": 2, "c": None}
    assert merged.updated_at is not None and made.updated_at is not None and merged.updated_at > made.updated_at
    replaced = await db.containers.set_metadata("c", {"only": False})
    assert replaced is not None and replaced.metadata == {"only": False}
    assert await db.containers.get("c") == replaced
    assert await db.containers.merge_metadata("nobody", {}) is await db.containers.set_metadata("nobody", {}) is None


async def test_metadata_merged_by_many_at_once_is_all_there(db: Persistence, driver: Any) -> None:
    await db.containers.create(id="c")
    async with kvpersist.open(driver) as other:
        await asyncio.gather(
            *(
                each.containers.merge_metadata("c", {f"{name}{n}": n})
                for name, each in (("a", db), ("b", other))
                for n in range(5)
            )
        )

    found = await db.containers.get("c")
    assert found is not None and len(found.metadata) == 10


async def test_an_update_keeps_the_key_and_may_set_the_time(db: Persistence) -> None:
    await db.containers.create(id="c", created_at=START)
    later = START + timedelta(days=3)

    changed = await db.containers.update("c", lambda c: msgspec.structs.replace(c, name="x", updated_at=later))
    assert changed is not None and (changed.name, changed.updated_at, changed.created_at) == ("x", later, START)
    with pytest.raises(BadRequest, match="key"):
        await db.containers.update("c", lambda c: msgspec.structs.replace(c, id="d"))
    with pytest.raises(BadRequest):
        await db.containers.update("c", lambda c: None)  # pyright: ignore[reportArgumentType, reportReturnType]
    assert await db.containers.update("nobody", lambda c: c) is None


async def test_the_names_of_the_agents_collections_are_taken(db: Persistence) -> None:
    for name in ("container", "image", "prototype", "provider", "login_session", "trace", "confirmation"):
        with pytest.raises(BadOption):
            db.repository(Container, name=name)


async def test_indexes_of_containers_are_built_with_the_others(db: Persistence) -> None:
    await db.containers.create(id="c")

    done = await db.reindex()

    assert {"container", "image", "prototype", "provider", "login_session", "trace", "confirmation"} <= done.keys()
