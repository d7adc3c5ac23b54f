"""Snapshots: places in sessions, or copies, by label and newest first."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from kvpersist import Bookmark, Message, Persistence, Snapshot, at_most
from kvpersist.errors import BadRequest, ParentGone, UniqueConflict

BEGIN = datetime(2026, 1, 1, tzinfo=UTC)


@pytest.fixture(autouse=True)
async def agent(db: Persistence) -> None:
    await db.agents.create(id="a")


async def test_a_snapshot_is_called_by_its_label_or_its_safe_point(db: Persistence) -> None:
    labelled = await db.snapshots.save(Snapshot(agent_id="a", id="before lunch", last_safe_point=4))
    numbered = await db.snapshots.save(Snapshot(agent_id="a", last_safe_point=0))
    neither = await db.snapshots.save(Snapshot(agent_id="a"))

    assert (labelled.id, numbered.id) == ("before lunch", "sfp-0")
    assert len(neither.id) == 36
    assert await db.snapshots.get(("a", "sfp-0")) == numbered
    assert await db.snapshots.get(("a", "nothing")) is None


async def test_a_snapshot_saved_again_takes_the_place_of_the_old_one(db: Persistence) -> None:
    first = await db.snapshots.save(Snapshot(agent_id="a", last_safe_point=1, metadata={"step_count": 0}))

    second = await db.snapshots.save(Snapshot(agent_id="a", last_safe_point=1, bookmark=Bookmark(0)))

    assert await db.snapshots.find(agent_id="a") == [second]
    assert first.created_at is not None and second.created_at is not None and second.created_at > first.created_at
    with pytest.raises(UniqueConflict):
        await db.snapshots.create(agent_id="a", id="sfp-1")


async def test_two_agents_may_use_one_label(db: Persistence) -> None:
    await db.agents.create(id="b")
    for id_ in ("a", "b"):
        await db.snapshots.save(Snapshot(agent_id=id_, id="x", metadata={"of": id_}))

    assert [s.metadata["of"] for id_ in ("a", "b") for s in await db.snapshots.find(agent_id=id_)] == ["a", "b"]
    assert await db.snapshots.delete(("a", "x")) is True
    assert await db.snapshots.delete(("a", "x")) is False
    assert await db.snapshots.count(agent_id="b") == 1


async def test_snapshots_are_listed_newest_first(db: Persistence) -> None:
    for n in (2, 0, 3, 1):
        await db.snapshots.save(Snapshot(agent_id="a", id=str(n), created_at=BEGIN + timedelta(n)))

    async def ids(**how: Any) -> str:
        return "".join(snapshot.id for snapshot in await db.snapshots.find(agent_id="a", **how))

    assert await ids() == "3210"
    assert await ids(limit=2, offset=1) == "21"
    assert await ids(created_at=at_most(BEGIN + timedelta(1))) == "10"
    page = await db.snapshots.page(agent_id="a", limit=3)
    assert [s.id for s in (await db.snapshots.page(agent_id="a", limit=3, after=page.cursor)).items] == ["0"]
    assert await db.snapshots.count(agent_id="a") == 4


async def test_a_snapshot_refers_to_its_session_and_copies_nothing(db: Persistence, driver: Any) -> None:
    await db.sessions.create(id="s", agent_id="a")
    await db.messages.append_many("s", [Message("user", n) for n in range(300)])
    driver.clear()
    snapshot = await db.snapshots.save(Snapshot(agent_id="a", session_id="s", last_safe_point=299))
    assert driver.values_read == 0

    await db.messages.append("s", Message("user", "later"))

    assert snapshot.number == 300
    assert snapshot.messages is None
    assert [message.content for message in await db.snapshots.messages(snapshot)] == list(range(300))
    early = await db.snapshots.save(Snapshot(agent_id="a", id="early", session_id="s", number=2))
    assert [message.content for message in await db.snapshots.messages(early)] == [0, 1]
    empty = await db.snapshots.save(Snapshot(agent_id="a", id="empty", session_id="s", number=0))
    assert await db.snapshots.messages(empty) == []


async def test_a_snapshot_can_have_a_copy_of_its_own(db: Persistence) -> None:
    copy = [Message("user", [{"type": "text", "text": ""}], id="m", created_at=BEGIN), Message("assistant", 0)]

    await db.snapshots.save(Snapshot(agent_id="a", id="x", messages=copy))

    found = await db.snapshots.get(("a", "x"))
    assert found is not None
    assert await db.snapshots.messages(found) == copy
    nothing = await db.snapshots.save(Snapshot(agent_id="a", id="y"))
    assert await db.snapshots.messages(nothing) == []


async def test_a_place_in_no_session_is_refused(db: Persistence, driver: Any) -> None:
    before = await driver.everything()

    with pytest.raises(BadRequest, match="of which session"):
        await db.snapshots.save(Snapshot(agent_id="a", id="x", number=1))
    with pytest.raises(ParentGone, match="nowhere"):
        await db.snapshots.save(Snapshot(agent_id="a", id="x", session_id="nowhere"))

    assert await driver.everything() == before


async def test_all_snapshots_are_replaced_at_once(db: Persistence, driver: Any) -> None:
    for n in range(3):
        await db.snapshots.save(Snapshot(agent_id="a", id=str(n), created_at=BEGIN))
    same = await db.snapshots.get(("a", "1"))
    assert same is not None
    driver.clear()

    await db.snapshots.replace_all("a", [same, Snapshot(agent_id="a", id="9", created_at=BEGIN)])

    assert {snapshot.id for snapshot in await db.snapshots.find(agent_id="a")} == {"1", "9"}
    assert not any(op.key.endswith(":a!1") for batch in driver.batches for op in batch.ops)
