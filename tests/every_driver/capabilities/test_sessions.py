"""Sessions: what they hold, how they are found, and that they go whole."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta

import msgspec
import pytest
from places import Where

import kvpersist
from kvpersist import Message, at_least, between
from kvpersist.agents.persistence import Persistence
from kvpersist.errors import UniqueConflict
from kvpersist.testing import ManualClock

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(300)]

KeysWith = Callable[[str], Awaitable[list[str]]]

LONG_AGO = datetime(2026, 1, 1, tzinfo=UTC)


@pytest.mark.shows(
    "A record of each conversation",
    "A title",
    "Owners: a user, an agent",
    "Free metadata, replaced or merged",
    "Create, read, change and delete a conversation",
    "Whether a conversation is there",
)
async def test_a_session_is_created_read_changed_and_deleted(db: Persistence) -> None:
    made = await db.sessions.create(id="life", user_id="ada", agent_id="clerk", title="Tea", metadata={"a": 1})
    with pytest.raises(UniqueConflict):
        await db.sessions.create(id="life")
    await db.sessions.merge_metadata("life", {"b": [2]})
    merged = await db.sessions.update("life", lambda session: msgspec.structs.replace(session, title="Coffee"))
    replaced = await db.sessions.set_metadata("life", {"c": None})

    assert (made.user_id, made.agent_id, made.title, made.metadata) == ("ada", "clerk", "Tea", {"a": 1})
    assert merged is not None
    assert replaced is not None
    assert (merged.title, merged.metadata, replaced.metadata) == ("Coffee", {"a": 1, "b": [2]}, {"c": None})
    assert await db.sessions.exists("life")
    assert await db.sessions.delete("life") is True
    assert await db.sessions.delete("life") is False
    assert await db.sessions.get("life") is None
    assert not await db.sessions.exists("life")
    assert await db.sessions.update("life", lambda session: session) is None


@pytest.mark.shows("Open and closed conversations", "The open conversation of a user, made where there is none")
async def test_the_open_session_of_a_user_is_found_or_made(db: Persistence) -> None:
    assert await db.sessions.active("eve") is None

    made = await db.sessions.active("eve", create={"title": "Tea"})
    again = await db.sessions.active("eve", create={"title": "Milk"})

    assert made is not None
    assert again is not None
    assert (made.id, made.title) == (again.id, "Tea")
    closed = await db.sessions.close(made.id)
    assert closed is not None
    assert not closed.active
    assert await db.sessions.active("eve") is None
    assert [session.id for session in await db.sessions.find(user_id="eve", active=False)] == [made.id]
    await db.sessions.reopen(made.id)
    found = await db.sessions.active("eve")
    assert found is not None
    assert found.id == made.id


@pytest.mark.shows(
    "Lists by user, by agent, of all, with limit, offset and order", "Lists by the beginning of an id, literally"
)
async def test_sessions_are_listed_by_owner_time_and_prefix(db: Persistence) -> None:
    for n, (id_, user, agent) in enumerate(
        (("l%1", "bob", "cook"), ("l%2", "bob", "clerk"), ("l_3", "bob", "cook"), ("l%4", "mia", "cook"))
    ):
        await db.sessions.create(
            id=id_, user_id=user, agent_id=agent, title=str(9 - n), created_at=LONG_AGO + timedelta(days=n)
        )
    sessions = db.sessions

    assert [each.id for each in await sessions.find(user_id="bob")] == ["l_3", "l%2", "l%1"]
    assert [each.id for each in await sessions.find(user_id="bob", limit=1, offset=1)] == ["l%2"]
    assert [each.id for each in await sessions.find(user_id="bob", order="title")] == ["l_3", "l%2", "l%1"]
    assert [each.id for each in await sessions.find(user_id="bob", order="created_at")] == ["l%1", "l%2", "l_3"]
    assert [each.id for each in await sessions.find(agent_id="cook", limit=2)] == ["l%4", "l_3"]
    assert [each.id for each in await sessions.find(id_prefix="l%")] == ["l%1", "l%2", "l%4"]
    year = between(LONG_AGO, LONG_AGO + timedelta(days=1))
    assert [each.id for each in await sessions.find(created=year)] == ["l%2", "l%1"]
    assert {"l%1", "l%2", "l_3", "l%4"} <= {each.id for each in await sessions.find(limit=100)}
    first = await sessions.page(limit=2, user_id="bob")
    second = await sessions.page(limit=2, after=first.cursor, user_id="bob")
    assert [each.id for each in (*first.items, *second.items)] == ["l_3", "l%2", "l%1"]
    assert await sessions.count(user_id="bob") == 3
    assert len(await sessions.find(user_id="bob", updated=at_least(LONG_AGO), order="-updated_at")) == 3


@pytest.mark.shows("Old conversations deleted by age", "Old conversations that nobody uses are deleted")
async def test_sessions_that_nobody_touched_for_long_are_deleted(where: Where) -> None:
    clock = ManualClock()
    async with kvpersist.open(where, clock=clock, timeout=60) as db:
        await db.sessions.create(id="closed", active=False)
        await db.sessions.create(id="open")
        clock.advance(100 * 86_400)
        await db.sessions.create(id="new")

        assert await db.sessions.delete_older(than=timedelta(days=90), inactive_only=True) == 1
        assert not await db.sessions.exists("closed")
        assert await db.sessions.delete_older(than=timedelta(days=90)) == 1
        assert [each.id for each in await db.sessions.find()] == ["new"]


@pytest.mark.shows("Fork: a conversation goes on in several ways, and knows where it came from")
async def test_a_session_is_forked_with_its_lineage(db: Persistence) -> None:
    await db.sessions.create(id="trunk", user_id="ada")
    await db.messages.append_many("trunk", [Message("user", "one"), Message("user", "two"), Message("user", "three")])

    first, second = await db.sessions.fork("trunk", at=2, count=2)
    [twig] = await db.sessions.fork(first.id, at=1)
    await db.messages.append(first.id, Message("user", "four"))

    assert (first.parent_id, first.forked_at, first.lineage) == ("trunk", 2, ["trunk"])
    assert twig.lineage == ["trunk", first.id]
    assert await _said(db, first.id) == ["one", "two", "four"]
    assert await _said(db, second.id) == ["one", "two"]
    assert await _said(db, twig.id) == ["one"]
    assert await _said(db, "trunk") == ["one", "two", "three"]


@pytest.mark.shows("Groups that are kept apart, and deleted whole", "`delete` removes everything")
async def test_a_container_takes_all_that_is_its_own_along(db: Persistence, keys_with: KeysWith) -> None:
    for container in ("mine", "yours"):
        await db.containers.create(id=container, name=container)
        await db.images.create(id=f"{container}-image", container_id=container, name="image")
        await db.sessions.create(id=f"{container}-session", container_id=container, image_id=f"{container}-image")
        await db.messages.append(f"{container}-session", Message("user", "hi"))

    assert [each.id for each in await db.sessions.find(container_id="mine")] == ["mine-session"]
    assert [each.id for each in await db.images.find(container_id="mine")] == ["mine-image"]
    assert await db.containers.delete("mine") is True

    assert [
        await db.containers.get("mine"),
        await db.images.get("mine-image"),
        await db.sessions.get("mine-session"),
    ] == [None] * 3
    assert await db.messages.range("mine-session") == []
    assert await _said(db, "yours-session") == ["hi"]
    assert await keys_with("mine") == []
    assert await keys_with("yours") != []


@pytest.mark.shows("One conversation as JSON, out and in, for another owner")
async def test_a_session_moves_as_json(db: Persistence) -> None:
    await db.sessions.create(id="packed", user_id="ada", title="Tea", metadata={"n": 0})
    await db.messages.append_many("packed", [Message("user", "first"), Message("assistant", "second")])

    data = msgspec.json.decode(msgspec.json.encode(await db.sessions.export("packed")))
    copy = await db.sessions.import_(data, user_id="bob")

    assert copy.id != "packed"
    assert (copy.user_id, copy.title, copy.metadata) == ("bob", "Tea", {"n": 0})
    assert await _said(db, copy.id) == ["first", "second"]


async def _said(db: Persistence, session_id: str) -> list[str]:
    return [message.content async for message in db.messages.iterate(session_id)]
