"""Images and prototypes: saved in place of each other, renamed, and found by what they name."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
import pytest

from kvpersist import Image, Prototype
from kvpersist.agents.persistence import Persistence
from kvpersist.errors import ParentGone, Unencodable

START = datetime(2025, 3, 1, 12, tzinfo=UTC)
EVERY: dict[str, Any] = {
    "session_id": "s",
    "description": "d",
    "system_prompt": "You are",
    "parent_id": "p",
    "mcp_servers": {"files": {"command": "x", "args": ["-v"]}},
    "metadata": {"claudeSdkSessionId": "z"},
    "role_id": "r",
    "os_id": "o",
    "model": "m",
    "thinking": {"budget": 0},
    "provider_options": {"temperature": 0.0},
    "prototype_id": "pp",
    "custom_data": {"x": False},
}


async def test_an_image_keeps_every_field(db: Persistence) -> None:
    await db.containers.create(id="c")
    made = await db.images.save(Image(id="i", container_id="c", created_at=START, **EVERY))

    assert await db.images.get("i") == made
    assert {name: getattr(made, name) for name in EVERY} == EVERY
    assert (made.name, made.created_at) == ("New Conversation", START)


async def test_a_renamed_image_is_not_found_by_its_old_name(db: Persistence, driver: Any) -> None:
    await db.images.save(Image(id="i", name="old"))
    await db.images.save(Image(id="i", name="new"))
    await db.images.update("i", lambda image: msgspec.structs.replace(image, name="newest"))

    assert await db.images.find(name="old") == await db.images.find(name="new") == []
    assert [image.id for image in await db.images.find(name="newest")] == ["i"]
    assert await db.images.find(name="newes") == []
    assert not [key for key in await driver.everything() if ":old!" in key or ":new!" in key]


async def test_images_are_found_by_what_they_name_newest_first(db: Persistence) -> None:
    await db.containers.create(id="c")
    for n in range(5):
        await db.images.create(
            id=str(n), container_id="c", session_id=f"s{n % 2}", parent_id="p", created_at=START + timedelta(hours=n)
        )
    await db.images.create(id="other", name="a:b!c")

    assert [i.id for i in await db.images.find(container_id="c", limit=2)] == ["4", "3"]
    assert [i.id for i in await db.images.find(session_id="s1")] == ["3", "1"]
    assert [i.id for i in await db.images.find(parent_id="p", offset=3)] == ["1", "0"]
    assert [i.id for i in await db.images.find(name="a:b!c")] == ["other"]
    assert await db.images.count() == 6


async def test_an_image_of_a_container_that_is_not_there_is_refused(db: Persistence, driver: Any) -> None:
    before = await driver.everything()

    for write in (db.images.create(container_id="c"), db.images.save(Image(id="i", container_id="c"))):
        with pytest.raises(ParentGone, match="container 'c'"):
            await write
    assert await driver.everything() == before

    await db.images.create(id="i")
    with pytest.raises(ParentGone):
        await db.images.update("i", lambda image: msgspec.structs.replace(image, container_id="c"))
    with pytest.raises(ParentGone):
        await db.images.save(Image(id="i", container_id="c"))
    found = await db.images.get("i")
    assert found is not None and found.container_id is None


async def test_an_image_moves_between_containers(db: Persistence) -> None:
    await db.containers.create(id="a")
    await db.containers.create(id="b")
    await db.images.create(id="i", container_id="a")

    await db.images.update("i", lambda image: msgspec.structs.replace(image, container_id="b"))
    await db.containers.delete("a")

    assert [image.id for image in await db.images.find(container_id="b")] == ["i"]


async def test_what_an_image_cannot_keep_is_refused_whole(db: Persistence, driver: Any) -> None:
    await db.images.create(id="i")
    before = await driver.everything()

    with pytest.raises(Unencodable):
        await db.images.save(Image(id="i", model=7))  # pyright: ignore[reportArgumentType]
    with pytest.raises(Unencodable):
        await db.images.create(custom_data={"x": {1, 2}})

    assert await driver.everything() == before


async def test_a_deleted_image_begins_no_session(db: Persistence) -> None:
    await db.images.create(id="i")
    await db.sessions.create(id="s", image_id="i")
    await db.images.delete("i")

    with pytest.raises(ParentGone, match="image 'i'"):
        await db.sessions.create(image_id="i")
    assert [session.id for session in await db.sessions.find(image_id="i")] == ["s"]
    await db.images.create(id="i")
    await db.sessions.create(id="t", image_id="i")


async def test_prototypes_are_found_by_name_and_container(db: Persistence) -> None:
    await db.containers.create(id="c")
    made = await db.prototypes.save(Prototype(id="p", container_id="c", name="coder", thinking=True))
    await db.prototypes.create(name="free")

    assert await db.prototypes.find(container_id="c") == await db.prototypes.find(name="coder") == [made]
    assert await db.prototypes.count() == 2
    with pytest.raises(ParentGone):
        await db.prototypes.create(container_id="nobody")
    assert await db.prototypes.delete("p") and not await db.prototypes.delete("p")
    assert await db.prototypes.find(container_id="c") == []
