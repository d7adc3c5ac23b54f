"""Windows, compressions, recovered files and media: chronological, by agent, replaced as a whole."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
import pytest
from agent_state import sound_state

import kvpersist
from kvpersist import (
    Compression,
    CompressionConfig,
    HistoryWindow,
    Media,
    Message,
    Persistence,
    RecoveredFile,
    WindowStats,
    between,
)
from kvpersist.errors import BadRequest, KeyTooLong
from kvpersist_drivers.memory import MemoryDriver

BEGIN = datetime(2026, 1, 1, tzinfo=UTC)
KINDS = ["windows", "compressions", "recovered_files", "media"]


@pytest.fixture(autouse=True)
async def agents(db: Persistence) -> None:
    await db.agents.create(id="a")
    await db.agents.create(id="b")


def make(kind: str, id_: str = "", agent: str = "a", **fields: Any) -> Any:
    if kind == "windows":
        return HistoryWindow(agent_id=agent, id=id_, **fields)
    if kind == "compressions":
        return Compression(agent_id=agent, id=id_, **fields)
    if kind == "recovered_files":
        return RecoveredFile(agent_id=agent, id=id_, path="p", **fields)
    return Media(agent_id=agent, key=id_ or kvpersist.agents.records.new_id(), **fields)


def name_of(record: Any) -> str:
    return record.key if isinstance(record, Media) else record.id


@pytest.mark.parametrize("kind", KINDS)
async def test_records_of_an_agent_are_found_oldest_first(db: Persistence, kind: str) -> None:
    kept = getattr(db, kind)
    for n in (2, 0, 3, 1):
        await kept.save(make(kind, str(n), created_at=BEGIN + timedelta(n)))
    await kept.save(make(kind, "other", "b"))

    async def ids(**how: Any) -> str:
        return "".join(name_of(record) for record in await kept.find(agent_id="a", **how))

    assert await ids() == "0123"
    assert await ids(limit=2, offset=1) == "12"
    assert await ids(created_at=between(BEGIN + timedelta(1), BEGIN + timedelta(2))) == "12"
    assert "".join([name_of(record) async for record in kept.iterate(agent_id="a")]) == "0123"
    first = await kept.page(agent_id="a", limit=3)
    rest = await kept.page(agent_id="a", limit=3, after=first.cursor)
    assert [name_of(record) for record in (*first.items, *rest.items)] == ["0", "1", "2", "3"]
    assert await kept.count(agent_id="a") == 4
    assert await kept.delete(("a", "1")) is True
    assert await kept.delete(("a", "1")) is False
    assert await kept.get(("a", "1")) is None
    assert await ids() == "023"


@pytest.mark.parametrize("kind", KINDS)
async def test_two_made_at_one_moment_do_not_meet_and_keep_their_order(kind: str) -> None:
    async with kvpersist.open(MemoryDriver(), clock=lambda: 1_767_225_600.0) as db:
        await db.agents.create(id="a")
        kept = getattr(db, kind)

        made = [await kept.save(make(kind)) for _ in range(20)]

        assert [name_of(record) for record in await kept.find(agent_id="a")] == [name_of(record) for record in made]
        assert len({name_of(record) for record in made}) == 20


@pytest.mark.parametrize("kind", KINDS)
async def test_one_id_under_two_agents_is_two_records(db: Persistence, kind: str) -> None:
    kept = getattr(db, kind)
    await kept.save(make(kind, "x", "a", created_at=BEGIN))
    await kept.save(make(kind, "x", "b", created_at=BEGIN + timedelta(1)))

    [first], [second] = [await kept.find(agent_id=id_) for id_ in ("a", "b")]

    assert (first.created_at, second.created_at) == (BEGIN, BEGIN + timedelta(1))


@pytest.mark.parametrize("kind", KINDS)
async def test_a_list_is_replaced_as_a_whole_and_equal_items_are_not_written(
    db: Persistence, driver: Any, kind: str
) -> None:
    kept = getattr(db, kind)
    for n in range(50):
        await kept.save(make(kind, f"{n:02}"))
    await kept.save(make(kind, "other", "b"))
    stored = await kept.find(agent_id="a")
    driver.clear()

    wanted = [*stored[:25], make(kind, "26"), make(kind, "99")]
    await kept.replace_all("a", wanted)

    assert [name_of(record) for record in await kept.find(agent_id="a")] == [f"{n:02}" for n in (*range(25), 26, 99)]
    assert await kept.get(("a", "26")) == stored[26]
    written = {op.key for batch in driver.batches for op in batch.ops if f":{kept.repository.name}:" not in op.key}
    records = {op.key for batch in driver.batches for op in batch.ops} - written
    assert not any(key.endswith(f"!{n:02}") for key in records for n in (*range(25), 26))
    assert await kept.count(agent_id="b") == 1
    await kept.replace_all("a", [])
    assert await kept.find(agent_id="a") == []
    await sound_state(db)


@pytest.mark.parametrize("kind", KINDS)
async def test_a_list_with_one_bad_item_changes_nothing(db: Persistence, driver: Any, kind: str) -> None:
    kept = getattr(db, kind)
    await kept.save(make(kind, "1"))
    before = await driver.everything()

    with pytest.raises(BadRequest):
        await kept.replace_all("a", [make(kind, "2"), make(kind, "3", "b")])
    with pytest.raises(BadRequest):
        await kept.replace_all("a", [make(kind, "2"), make(kind, "2")])
    with pytest.raises(BadRequest):
        await kept.replace_all("a", [make(kind, "2"), {"id": "3"}])
    with pytest.raises(BadRequest, match="time zone"):
        await kept.replace_all("a", [make(kind, "2", created_at=datetime(2026, 1, 1))])  # noqa: DTZ001

    assert await driver.everything() == before


async def test_a_window_counts_what_it_holds(db: Persistence) -> None:
    messages = [Message("user", 0), Message("assistant", "", created_at=BEGIN)]

    counted = await db.windows.save(HistoryWindow(agent_id="a", messages=messages, events=[{"n": 0}, None]))
    given = await db.windows.save(HistoryWindow(agent_id="a", stats=WindowStats(7, 50_000, 0)))

    assert counted.stats == WindowStats(2, 0, 2)
    assert await db.windows.get(("a", counted.id)) == counted
    assert given.stats == WindowStats(7, 50_000, 0)


async def test_a_compression_says_how_it_was_made(db: Persistence) -> None:
    plain = await db.compressions.save(Compression(agent_id="a"))
    full = await db.compressions.save(
        Compression(
            agent_id="a",
            window_id="w",
            config=CompressionConfig("model", "prompt", 0),
            summary="s" * 500,
            ratio=0.25,
            recovered_files=["x", "y"],
        )
    )

    assert plain.config.threshold == 50_000
    assert await db.compressions.get(("a", full.id)) == full


async def test_one_path_is_kept_as_it_was_at_several_times(db: Persistence) -> None:
    for n, path in enumerate(("/a/../b", "/a_..", "/a/../b", "/" + "long/" * 100)):
        await db.recovered_files.save(
            RecoveredFile(agent_id="a", path=path, content=b"\0" if n else "", modified_at=BEGIN + timedelta(n))
        )

    found = await db.recovered_files.find(agent_id="a", path="/a/../b")

    assert [(file.content, file.modified_at) for file in found] == [("", BEGIN), (b"\0", BEGIN + timedelta(2))]
    assert len(await db.recovered_files.find(agent_id="a", path="/" + "long/" * 100)) == 1
    with pytest.raises(BadRequest, match="which file"):
        await db.recovered_files.save(RecoveredFile(agent_id="a"))
    with pytest.raises(BadRequest, match="modified_at"):
        await db.recovered_files.save(RecoveredFile(agent_id="a", path="x", modified_at=datetime(2026, 1, 1)))  # noqa: DTZ001


async def test_media_are_named_by_their_key(db: Persistence) -> None:
    saved = await db.media.save(
        Media(agent_id="a", key="k/%_", provider="p", mime_type="image/png", size=0, file_id="f", file_uri="")
    )

    again = await db.media.save(msgspec.structs.replace(saved, created_at=None, size=1))

    assert await db.media.find(agent_id="a") == [again]
    assert again.created_at == saved.created_at
    assert await db.media.get(("a", "k/%_")) == again
    with pytest.raises(BadRequest, match="digest"):
        await db.media.save(Media(agent_id="a"))
    with pytest.raises(KeyTooLong):
        await db.media.save(Media(agent_id="a", key="k" * 160))
