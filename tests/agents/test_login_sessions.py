"""Login sessions end by themselves, and are found by user and by their end."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
import pytest

import kvpersist
from kvpersist import LoginSession, between
from kvpersist.agents.persistence import Persistence
from kvpersist.errors import BadRequest, Unsupported
from kvpersist.testing import ManualClock

HOUR = timedelta(hours=1)


@pytest.fixture
async def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
async def db(driver: Any, clock: ManualClock) -> AsyncIterator[Persistence]:
    async with kvpersist.open(driver.driver, clock=clock, sweep=None) as db:
        yield db


def at(clock: ManualClock, ahead: timedelta) -> datetime:
    return datetime.fromtimestamp(clock(), UTC) + ahead


async def test_a_login_session_is_gone_when_it_ends(db: Persistence, clock: ManualClock, driver: Any) -> None:
    short = await db.login_sessions.create(user_id="u", expires_at=at(clock, HOUR), metadata={"ip": "::1"})
    long = await db.login_sessions.create(user_id="u")
    assert await db.login_sessions.get(short.id) == short
    assert {login.id for login in await db.login_sessions.find(user_id="u")} == {short.id, long.id}

    clock.advance(3601)

    assert await db.login_sessions.get(short.id) is None
    assert await db.login_sessions.find(user_id="u") == [long]
    assert await db.login_sessions.count(user_id="u") == 1
    assert await db.login_sessions.update(short.id, lambda login: login) is None
    await db.store.sweep()
    if db.store.capabilities.atomic_batch != "none":
        assert not [key for key in await driver.everything() if short.id in key]


async def test_a_login_session_is_prolonged_and_shortened(db: Persistence, clock: ManualClock) -> None:
    made = await db.login_sessions.create(user_id="u", expires_at=at(clock, HOUR))

    longer = await db.login_sessions.update(
        made.id, lambda login: msgspec.structs.replace(login, expires_at=at(clock, 3 * HOUR))
    )
    clock.advance(2 * 3600)
    assert longer is not None and await db.login_sessions.get(made.id) == longer
    kept = await db.login_sessions.merge_metadata(made.id, {"seen": True})
    assert kept is not None and kept.expires_at == longer.expires_at

    clock.advance(3600)
    assert await db.login_sessions.get(made.id) is None


async def test_login_sessions_are_found_by_their_end(db: Persistence, clock: ManualClock) -> None:
    for n in (3, 1, 2):
        await db.login_sessions.create(id=str(n), user_id="u", expires_at=at(clock, n * HOUR))
    await db.login_sessions.create(id="open", user_id="u")

    until = await db.login_sessions.find(expires_at=between(at(clock, HOUR), at(clock, 2 * HOUR)))
    assert [login.id for login in until] == ["1", "2"]
    assert len(await db.login_sessions.find()) == 4


async def test_an_end_that_makes_no_sense_is_refused(db: Persistence, clock: ManualClock) -> None:
    for ahead in (timedelta(0), -HOUR):
        with pytest.raises(BadRequest, match="is over"):
            await db.login_sessions.create(user_id="u", expires_at=at(clock, ahead))
    with pytest.raises(BadRequest, match="zone"):
        await db.login_sessions.save(LoginSession(id="x", user_id="u", expires_at=datetime(2099, 1, 1)))  # noqa: DTZ001
    with pytest.raises(BadRequest):
        await db.login_sessions.create(expires_at=at(clock, HOUR))
    assert await db.login_sessions.count() == 0


async def test_a_life_too_short_to_be_kept_is_refused_where_batches_are_not_atomic(
    db: Persistence, clock: ManualClock
) -> None:
    soon = at(clock, timedelta(seconds=30))
    if db.store.capabilities.atomic_batch == "none":
        with pytest.raises(Unsupported):
            await db.login_sessions.create(user_id="u", expires_at=soon)
    else:
        assert await db.login_sessions.create(user_id="u", expires_at=soon)


async def test_a_login_session_is_ended_by_hand(db: Persistence) -> None:
    made = await db.login_sessions.create(user_id="u")

    assert await db.login_sessions.delete(made.id) and not await db.login_sessions.delete(made.id)
    assert await db.login_sessions.find(user_id="u") == []
