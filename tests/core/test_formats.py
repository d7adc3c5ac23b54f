"""Stores that released versions wrote are read, found by index, and written by this one."""

import importlib.util
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest

import kvpersist
from kvpersist import Log, Message, Repository, between
from kvpersist.bytes_level import FORMAT
from kvpersist.errors import IndexNotReady, UniqueConflict

DATA = Path(__file__).parent.parent / "data" / "formats"
STORES = sorted(DATA.glob("format-*.db"))


@pytest.fixture(scope="module")
def golden() -> ModuleType:
    spec = importlib.util.spec_from_file_location("golden", DATA / "make.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["golden"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(params=STORES, ids=lambda path: path.stem)
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    shutil.copy(request.param, tmp_path / "store.db")
    return f"sqlite:///{tmp_path}/store.db"


def test_there_is_a_store_of_every_format() -> None:
    assert [path.stem for path in STORES] == [f"format-{n}" for n in range(1, FORMAT + 1)]


async def test_everything_in_an_old_store_is_read(url: str, golden: ModuleType) -> None:
    async with kvpersist.open(url) as db:
        assert await db.store.get_many(list(golden.VALUES)) == list(golden.VALUES.values())
        assert await db.store.get_raw("app:raw") == b"raw"
        session = await db.sessions.get("s1")
        assert session is not None and (session.title, session.metadata) == ("Late parcel", {"n": 1})
        assert await db.sessions.get("gone") is None
        found = await db.messages.last("s1", 10)
        assert [(m.number, m.role, m.content, m.metadata, m.created_at) for m in found] == [
            (n, m.role, m.content, m.metadata, m.created_at) for n, m in enumerate(golden.TURN, 1)
        ]
        [call] = await db.tool_calls.find(name="track")
        assert (call.state, call.result, call.arguments) == ("completed", "in Oslo", {"parcel": 7})
        assert await db.messages.get(found[1].id) == found[1]
        log = Log(db.store, golden.Note, name="log")
        assert [item async for item in log.iterate("p")] == [(1, golden.Note("one")), (2, golden.Note("two"))]
        assert await log.append("p", golden.Note("four")) == 4


@pytest.mark.parametrize("codec", ["msgpack", "json"])
async def test_the_indexes_of_an_old_store_answer_and_are_kept(url: str, golden: ModuleType, codec: str) -> None:
    async with kvpersist.open(url) as db:
        parts = Repository(db.store, golden.Part, name=f"part-{codec}", indexes=golden.INDEXES)
        a, b, c = golden.PARTS

        assert await parts.find(maker="x") == [a, b]
        assert await parts.find(serial=c.serial) == [c]
        assert await parts.find(tags="red") == [a, b]
        assert await parts.find(**{"meta.rank": between(2, 3)}) == [b]
        with pytest.raises(UniqueConflict):
            await parts.insert(golden.Part(id="d", maker="z", serial="s1", tags=[], price=0, meta={}))
        await parts.delete("b!2%")

        assert await parts.find(tags="red") == [a]
        assert await parts.verify() == []


async def test_an_old_store_takes_further_turns(url: str) -> None:
    async with kvpersist.open(url) as db:
        stored = await db.messages.append("s1", Message(role="user", content="thanks"))

        assert stored.number == 5
        assert await db.messages.count("s1") == 5


async def test_an_old_store_answers_by_what_it_indexed_and_by_newer_indexes_once_they_are_built(url: str) -> None:
    async with kvpersist.open(url) as db:
        await db.sessions.create(id="s2", user_id="ada", agent_id="helper")

        assert {s.id for s in await db.sessions.find(user_id="ada")} == {"s1", "s2"}
        assert {s.id for s in await db.sessions.list()} == {s.id for s in await db.sessions.recent()} == {"s1", "s2"}
        assert [s.id for s in await db.sessions.find(user_id="ada", agent_id="helper")] == ["s2"]
        with pytest.raises(IndexNotReady):
            await db.sessions.find(agent_id="helper")

        await db.reindex()

        assert [s.id for s in await db.sessions.find(agent_id="helper")] == ["s2"]
        assert [m.number for m in await db.messages.find(user_id="ada", role="tool")] == [3]
