"""What a session waits for: one at a time, over restarts, and not beyond its session."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import kvpersist
from kvpersist import Confirmation
from kvpersist.agents.persistence import Persistence
from kvpersist.errors import BadRequest, ParentGone, Unencodable


async def test_a_session_waits_for_one_thing_at_a_time(db: Persistence) -> None:
    await db.sessions.create(id="s")
    first = await db.confirmations.save(
        Confirmation(
            session_id="s",
            tool_name="rm",
            arguments={"path": "/", "force": False},
            user_message="delete it",
            call_id="c1",
            number=2,
            position=0,
            metadata={"n": 0},
        )
    )
    assert await db.confirmations.get("s") == first
    assert first.created_at is not None

    second = await db.confirmations.save(Confirmation(session_id="s", tool_name="mv"))

    assert await db.confirmations.get("s") == second
    assert second.arguments is None and second.created_at is not None and second.created_at >= first.created_at
    assert await db.confirmations.find() == [second]
    assert await db.confirmations.count() == 1


async def test_a_session_waits_no_more_once_it_is_cleared(db: Persistence) -> None:
    await db.sessions.create(id="s")
    await db.confirmations.save(Confirmation(session_id="s", tool_name="rm"))

    assert await db.confirmations.clear("s") is True
    assert await db.confirmations.clear("s") is False
    assert await db.confirmations.get("s") is None
    assert await db.confirmations.clear("nobody") is False
    assert await db.confirmations.find() == []


async def test_what_a_session_waits_for_survives_a_restart(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'a.db'}"
    async with kvpersist.open(url) as db:
        await db.sessions.create(id="s")
        saved = await db.confirmations.save(Confirmation(session_id="s", tool_name="rm", arguments=["-rf"]))
    async with kvpersist.open(url) as db:
        assert await db.confirmations.get("s") == saved
        assert await db.confirmations.clear("s")


async def test_a_confirmation_of_no_session_is_refused_whole(db: Persistence, driver: Any) -> None:
    before = await driver.everything()

    with pytest.raises(ParentGone, match="session 's'"):
        await db.confirmations.save(Confirmation(session_id="s", tool_name="rm"))
    assert await driver.everything() == before

    await db.sessions.create(id="s")
    before = await driver.everything()
    with pytest.raises(Unencodable):
        await db.confirmations.save(Confirmation(session_id="s", tool_name="rm", arguments=object()))
    with pytest.raises(BadRequest):
        await db.confirmations.save({"session_id": "s"})  # pyright: ignore[reportArgumentType]
    assert await driver.everything() == before


async def test_a_confirmation_does_not_pass_to_a_new_session_of_its_id(db: Persistence) -> None:
    await db.sessions.create(id="s")
    await db.confirmations.save(Confirmation(session_id="s", tool_name="rm"))
    await db.sessions.delete("s")

    await db.sessions.create(id="s")

    assert await db.confirmations.get("s") is None


async def test_all_that_waits_is_listed_newest_first(db: Persistence) -> None:
    for id_ in ("a", "a!b", "c"):
        await db.sessions.create(id=id_)
        await db.confirmations.save(Confirmation(session_id=id_, tool_name=id_))

    assert [each.session_id for each in await db.confirmations.find()] == ["c", "a!b", "a"]
    page = await db.confirmations.page(limit=2)
    rest = await db.confirmations.page(limit=2, after=page.cursor)
    assert [each.session_id for each in (*page.items, *rest.items)] == ["c", "a!b", "a"]
    assert {each.session_id async for each in db.confirmations.iterate()} == {"a", "a!b", "c"}
