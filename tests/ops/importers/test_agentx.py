"""AgentX: its keys wherever they are kept, its export, its queue."""

from __future__ import annotations

import asyncio
import json
import os
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import agentx_layout as layout
import msgspec
import pytest
from contents import everything, fingerprint

from kvpersist.agents.persistence import Persistence
from kvpersist.errors import BadOption, BadRequest
from kvpersist.ops.agentx_export import export_agentx
from kvpersist.ops.importers import SystemImport, import_from, open_source

Service = Callable[[str], dict[str, str]]


async def brought(db: Persistence, text: str, **options: Any) -> SystemImport:
    async with await open_source(text) as source:
        return await import_from(db, source, **options)


async def in_postgres(service: Service) -> str:
    import asyncpg

    url = service("postgres")["KVPERSIST_TEST_POSTGRES_URL"]
    connection = await asyncpg.connect(url)
    await connection.execute("DROP TABLE IF EXISTS kv_storage")
    await connection.execute(
        "CREATE TABLE kv_storage (key TEXT PRIMARY KEY, value TEXT, created_at BIGINT, updated_at BIGINT)"
    )
    await connection.executemany("INSERT INTO kv_storage VALUES ($1, $2, 1, 2)", list(layout.KEYS.items()))
    await connection.close()
    return f"agentx:{url}"


async def in_mysql(service: Service) -> str:
    from asyncmy import connect

    from kvpersist.urls import split

    url = service("mariadb")["KVPERSIST_TEST_MYSQL_URL"]
    parts, _ = split(url)
    connection = await connect(
        host=parts.host, port=parts.port, user=parts.username, password=parts.password, db=parts.path, charset="utf8mb4"
    )
    async with connection.cursor() as cursor:
        await cursor.execute("DROP TABLE IF EXISTS kv_storage")
        await cursor.execute(
            "CREATE TABLE kv_storage (`key` VARCHAR(512) PRIMARY KEY, value LONGTEXT, created_at BIGINT,"
            " updated_at BIGINT) CHARACTER SET utf8mb4 COLLATE utf8mb4_bin"
        )
        for item in layout.KEYS.items():
            await cursor.execute("INSERT INTO kv_storage VALUES (%s, %s, 1, 2)", item)
    await connection.commit()
    await connection.ensure_closed()
    return f"agentx:{url}"


async def in_redis(service: Service) -> str:
    from redis.asyncio import Redis

    url = service("redis")["KVPERSIST_TEST_REDIS_URL"]
    client = Redis.from_url(url)
    await client.flushdb()
    await client.mset({f"agentx:{key}": text for key, text in layout.KEYS.items()})
    await client.set("agentx2:sessions:x", "not ours")
    await client.aclose()
    return f"agentx:{url}"


async def in_mongo(service: Service) -> str:
    from pymongo import AsyncMongoClient

    url = service("mongo")["KVPERSIST_TEST_MONGO_URL"]
    client: Any = AsyncMongoClient(url)
    collection = client["agentx"]["storage"]
    await collection.drop()
    await collection.insert_many([{"key": key, "value": text} for key, text in layout.KEYS.items()])
    await client.close()
    return f"agentx:{url}?kv.database=agentx"


PLACES: dict[str, Any] = {
    "sqlite": layout.kv_sqlite,
    "files": layout.files,
    "export": layout.export_file,
    "postgres": in_postgres,
    "mysql": in_mysql,
    "redis": in_redis,
    "mongo": in_mongo,
}


@pytest.fixture(params=PLACES)
async def source(request: pytest.FixtureRequest, folder: Path, service: Service) -> str:
    make = PLACES[request.param]
    return make(folder) if request.param in ("sqlite", "files", "export") else await make(service)


async def test_sessions_and_messages_survive_with_ids_order_subtypes_and_times(db: Persistence, source: str) -> None:
    report = await brought(db, source)

    messages = [message async for message in db.messages.iterate("sess_1")]
    assert [message.content for message in messages] == [raw["content"] for raw in layout.TALK]
    assert [message.id for message in messages] == [raw["id"] for raw in layout.TALK]
    assert [(message.extra or {})["subtype"] for message in messages] == [raw["subtype"] for raw in layout.TALK]
    times = [message.created_at.timestamp() * 1000 for message in messages if message.created_at]
    assert [round(time) for time in times] == [raw["timestamp"] for raw in layout.TALK]
    session = await db.sessions.get("sess_1")
    assert session is not None and session.created_at is not None
    assert round(session.created_at.timestamp() * 1000) == layout.BEGAN + 10
    assert report.verified is not None
    assert report.verified.different == []
    assert report.first is not None


async def test_containers_images_prototypes_and_providers_keep_every_field(db: Persistence, source: str) -> None:
    report = await brought(db, source)

    container = await db.containers.get("c1")
    assert container is not None and container.config == {"region": "eu", "n": 0}
    image = await db.images.get("img_1")
    raw = layout.IMAGES[0]
    assert image is not None and image.created_at is not None
    assert (image.name, image.description, image.system_prompt) == (raw["name"], "", raw["systemPrompt"])
    assert (image.mcp_servers, image.metadata, image.model) == (raw["mcpServers"], raw["metadata"], raw["model"])
    assert (image.container_id, image.session_id) == ("c1", "sess_1")
    assert round(image.created_at.timestamp() * 1000) == raw["createdAt"]
    assert [found.id for found in await db.images.find(name="Weather: ../today")] == ["img_1"]
    assert await db.prototypes.get("proto_1") is not None
    provider = await db.providers.default("c1")
    assert provider is not None and provider.base_url == "https://llm.example"
    assert report.records["containers"] >= 1
    assert "sess_1" in [session.id for session in await db.sessions.find(image_id="img_1")]


async def test_a_session_whose_image_and_container_are_gone_is_imported_and_reported(
    db: Persistence, source: str
) -> None:
    report = await brought(db, source)

    session = await db.sessions.get("sess_orphan")
    assert session is not None and session.container_id is session.image_id is None
    assert session.metadata["missing"] == {"container_id": "c_gone", "image_id": "img_gone"}
    told = [problem for problem in report.problems if "sess_orphan" in problem.place or "sessions[3]" in problem.place]
    assert sorted(problem.left_out for problem in told) == [False, False]


async def test_a_key_in_clear_is_left_out_and_reported_unless_it_is_asked_for(
    folder: Path, db: Persistence, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = layout.kv_sqlite(folder)

    report = await brought(db, text)

    assert [problem.place for problem in report.problems if "in clear" in problem.reason] == [
        "kv_storage llm-providers:llm_1"
    ]
    assert await db.providers.secret("llm_1") is None
    monkeypatch.setenv("LLM_LLM_1", "from the environment")
    await brought(db, text, secrets="env:LLM_{id}")
    assert await db.providers.secret("llm_1") == "from the environment"
    entries = await db.store._scan(None, None, limit=10_000)
    assert not any(b"sk-very-secret" in entry.value for entry in entries)


async def test_a_key_may_be_stored_encrypted(folder: Path, tmp_path: Path) -> None:
    import kvpersist

    pytest.importorskip("cryptography")
    async with kvpersist.open("memory://", secret_key=b"k" * 32) as db:
        report = await brought(db, layout.kv_sqlite(folder), secrets="encrypt")

        assert await db.providers.secret("llm_1") == "sk-very-secret"
        assert not any("in clear" in problem.reason for problem in report.problems)


async def test_results_that_are_nothing_much_are_results_all_the_same(db: Persistence, source: str) -> None:
    await brought(db, source)

    calls = await db.tool_calls.of("sess_1")
    assert [(call.name, call.result, call.state) for call in calls] == [
        ("look:up", "", "completed"),
        ("count", 0, "completed"),
        ("ask", False, "completed"),
        ("say", None, "completed"),
    ]
    assert [type(call.result) for call in calls] == [str, int, bool, type(None)]


async def test_importing_twice_adds_nothing(db: Persistence, source: str) -> None:
    first = await brought(db, source)
    before = await everything(db)

    second = await brought(db, source)

    assert await everything(db) == before
    assert (second.sessions, second.messages, second.completed) == (0, 0, 0)
    assert second.present == first.sessions > 2
    assert second.differing == []


async def test_two_places_of_one_store_make_the_same_records(folder: Path, db: Persistence) -> None:
    await brought(db, layout.kv_sqlite(folder))
    before = await everything(db)

    report = await brought(db, layout.export_file(folder))

    assert await everything(db) == before
    assert report.sessions == report.messages == 0


async def test_an_id_of_messages_that_two_sessions_have_is_changed_in_the_later(folder: Path, db: Persistence) -> None:
    await brought(db, layout.kv_sqlite(folder))

    [first] = [message async for message in db.messages.iterate("sess_orphan")]
    assert first.id != "msg_1"
    assert (first.extra or {})["external_id"] == "msg_1"


async def test_newer_forms_of_messages_give_calls_and_failed_results(folder: Path, db: Persistence) -> None:
    await brought(db, layout.kv_sqlite(folder))

    [call] = await db.tool_calls.of(layout.ODD)
    assert (call.name, call.arguments, call.is_error, call.state) == ("look", {"q": 1}, True, "failed")


async def test_an_id_that_is_too_long_is_replaced_and_kept(folder: Path, db: Persistence) -> None:
    await brought(db, layout.kv_sqlite(folder))

    [found] = [session async for session in db.sessions.iterate() if session.external_id]
    assert found.external_id == "s" * 300
    assert await db.messages.count(found.id) == 2


async def test_bad_rows_are_reported_with_their_place_and_those_around_them_imported(
    folder: Path, db: Persistence
) -> None:
    good = {"sessionId": "ok", **layout._times()}
    talk = [layout.TALK[0], "no message", {"id": "x", "subtype": "riddle", "content": "?"}, layout.TALK[6]]
    text = layout.kv_sqlite(
        folder,
        {
            "sessions:broken": "{",
            "sessions:list": "[]",
            "sessions:other": json.dumps(good),
            "sessions:ok": json.dumps(good),
            "sessions:time": json.dumps({"sessionId": "time", "createdAt": "yesterday"}),
            "messages:ok": json.dumps(talk),
            "messages:lost": json.dumps(layout.TALK[:1]),
            "messages:number": "7",
            "secrets:x": "1",
        },
    )

    report = await brought(db, text)

    assert [message.content async for message in db.messages.iterate("ok")] == [
        layout.TALK[0]["content"],
        layout.TALK[6]["content"],
    ]
    assert await db.messages.count("lost") == 1
    places = {problem.place: problem.left_out for problem in report.problems}
    assert places == {
        "kv_storage sessions:broken": True,
        "kv_storage sessions:list": True,
        "kv_storage sessions:other": True,
        "kv_storage sessions:time": True,
        "kv_storage messages:ok [1]": True,
        "kv_storage messages:ok [2]": True,
        "kv_storage messages:lost": False,
        "kv_storage messages:number": True,
        "kv_storage secrets:x": True,
    }
    assert all(problem.reason for problem in report.problems)
    assert not report.whole


async def test_what_no_store_can_keep_is_left_out_and_the_rest_stays(folder: Path, db: Persistence) -> None:
    times = layout._times()
    talk = [
        {"id": "half \ud800", "subtype": "user", "content": "kept", "timestamp": layout.BEGAN},
        {"id": "m2", "subtype": "user", "content": "half \ud800", "timestamp": layout.BEGAN},
        {"id": "m3", "subtype": "user", "content": 1 << 80, "timestamp": layout.BEGAN},
        {"id": "m4", "subtype": "user", "content": "late", "timestamp": 1 << 70},
        {"id": "m3", "subtype": "user", "content": "the same id", "timestamp": layout.BEGAN},
        {"id": 7, "subtype": "user", "content": "a number", "timestamp": layout.BEGAN + 0.5},
    ]
    text = layout.kv_sqlite(
        folder,
        {
            "sessions:a": json.dumps({"sessionId": "a", **times}),
            "messages:a": json.dumps(talk),
            "sessions:b": json.dumps({"sessionId": "b", "note": "half \ud800", **times}),
            "sessions:c": json.dumps({"sessionId": "c", **times}),
            "messages:c": "[NaN]",
        },
    )

    report = await brought(db, text)

    messages = [message async for message in db.messages.iterate("a")]
    assert [message.content for message in messages] == ["kept", 1 << 80, "the same id", "a number"]
    assert (messages[0].extra or {})["external_id"] == "half \\ud800"
    assert (messages[2].extra or {})["external_id"] == messages[1].id == "m3"
    assert messages[3].id == "7"
    assert sorted(problem.place for problem in report.problems) == [
        "kv_storage messages:a [3]",
        "kv_storage messages:c",
        "kv_storage sessions:a message m2",
        "kv_storage sessions:b",
    ]
    assert await db.sessions.get("b") is None
    again = await brought(db, text)
    assert (again.sessions, again.messages, again.present) == (0, 0, 2)


async def test_the_source_is_not_changed(folder: Path, db: Persistence) -> None:
    for make in (layout.kv_sqlite, layout.files, layout.export_file, layout.queue_db):
        text = make(folder)
        before = fingerprint(folder)

        await brought(db, text)

        assert fingerprint(folder) == before


async def test_what_is_in_the_log_of_a_database_is_read_and_stays_there(folder: Path, db: Persistence) -> None:
    text = layout.kv_sqlite(folder)
    writer = sqlite3.connect(folder / "agentx.db")
    writer.execute("PRAGMA journal_mode=WAL")
    row = json.dumps({"sessionId": "late", **layout._times()})
    writer.execute("INSERT INTO kv_storage VALUES ('sessions:late', ?, 1, 2)", (row,))
    writer.commit()
    before = fingerprint(folder)

    await brought(db, text)

    assert fingerprint(folder) == before
    assert await db.sessions.get("late") is not None
    writer.close()


async def test_a_file_that_is_written_to_meanwhile_is_told_of(folder: Path, db: Persistence) -> None:
    text = layout.kv_sqlite(folder)
    async with await open_source(text) as source:
        writer = sqlite3.connect(folder / "agentx.db")
        writer.execute("INSERT INTO kv_storage VALUES ('sessions:late', '{}', 1, 2)")
        writer.commit()
        writer.close()

        report = await import_from(db, source)

    assert any("written to" in problem.reason for problem in report.problems)


async def test_a_dry_run_tells_what_it_would_do_and_writes_nothing(folder: Path, db: Persistence) -> None:
    text = layout.kv_sqlite(folder)
    before = await everything(db)

    dry = await brought(db, text, dry_run=True)

    assert await everything(db) == before
    real = await brought(db, text)
    assert (dry.sessions, dry.messages, dry.records) == (real.sessions, real.messages, real.records)


async def test_a_session_of_the_same_id_with_other_messages_is_left_as_it_is(folder: Path, db: Persistence) -> None:
    from kvpersist import Message

    await db.sessions.create(id="sess_1")
    await db.messages.append("sess_1", Message("user", "Something else"))

    report = await brought(db, layout.kv_sqlite(folder))

    assert report.differing == ["sess_1"]
    assert await db.messages.count("sess_1") == 1
    assert not report.whole


async def test_a_session_that_was_gone_on_with_here_is_present(folder: Path, db: Persistence) -> None:
    from kvpersist import Message

    text = layout.kv_sqlite(folder)
    await brought(db, text)
    await db.messages.append("sess_1", Message("user", "And now?"))

    report = await brought(db, text)

    assert report.differing == []
    assert report.verified is not None and report.verified.different == []
    assert await db.messages.count("sess_1") == len(layout.TALK) + 1


async def test_what_the_source_has_grown_by_is_added(folder: Path, db: Persistence) -> None:
    short = {**layout.KEYS, "messages:sess_1": json.dumps(layout.TALK[:3])}
    await brought(db, layout.kv_sqlite(folder, short))
    (folder / "agentx.db").unlink()

    report = await brought(db, layout.kv_sqlite(folder))

    assert (report.completed, report.messages) == (1, len(layout.TALK) - 3)
    assert await db.messages.count("sess_1") == len(layout.TALK)


# ---- the queue


async def test_events_keep_their_cursors_in_the_order_these_stand_for(folder: Path, db: Persistence) -> None:
    report = await brought(db, layout.queue_db(folder))

    entries = await db.events.read("jobs:../x")
    assert [entry.cursor for entry in entries] == layout.CURSORS
    assert [entry.event for entry in entries] == [{"n": 0}, {"n": 1}, {"n": 2}, {"n": 3}]
    assert [entry.bookmark["timestamp"] for entry in entries] == [layout.BEGAN + n for n in range(4)]
    assert [entry.event for entry in await db.events.read("other")] == [0]
    assert await db.events.read("jobs:../x", after=layout.CURSORS[2]) == entries[3:]
    assert report.events == 5
    assert [problem.place for problem in report.problems] == [
        "entries of other loyw3v30-0002",
        "consumers reader:4 other",
    ]


async def test_consumers_go_on_where_they_were(folder: Path, db: Persistence) -> None:
    report = await brought(db, layout.queue_db(folder))

    waiting = {
        name: [entry.cursor for entry in await db.events.recover(name, "jobs:../x")]
        for name in ("reader:1", "reader:2", "reader:3")
    }
    assert waiting == {
        "reader:1": layout.CURSORS[2:],
        "reader:2": layout.CURSORS[2:],
        "reader:3": layout.CURSORS,
    }
    assert report.consumers == 3


async def test_events_are_published_once(folder: Path, db: Persistence) -> None:
    text = layout.queue_db(folder)
    await brought(db, text)
    before = await everything(db)

    report = await brought(db, text)

    assert await everything(db) == before
    assert (report.events, report.consumers) == (0, 0)


async def test_a_home_folder_gives_its_records_and_its_queue(folder: Path, db: Persistence) -> None:
    (folder / "data").mkdir()
    layout.kv_sqlite(folder / "data")
    layout.queue_db(folder / "data")

    report = await brought(db, f"agentx:{folder}")

    assert report.sessions == len(layout.SESSIONS)
    assert report.events == 5


# ---- what is no source


async def test_what_is_no_store_of_agentx_is_refused(tmp_path: Path) -> None:
    sqlite3.connect(tmp_path / "other.db").execute("CREATE TABLE t (x)").connection.close()
    (tmp_path / "text.db").write_text("no database at all, but long enough to be looked at" * 20)
    (tmp_path / "list.json").write_text('{"sessions": 7}')

    for name in ("other.db", "text.db", "list.json"):
        with pytest.raises(BadRequest):
            await open_source(f"agentx:{tmp_path / name}")
    with pytest.raises(FileNotFoundError):
        await open_source(f"agentx:{tmp_path / 'absent'}")
    with pytest.raises(BadOption, match="did you mean agentx"):
        await open_source("agentz:x.db")
    with pytest.raises(BadOption, match="tabel"):
        await open_source("agentx:postgresql://127.0.0.1:1/x?kv.tabel=y")


async def test_a_password_is_never_shown() -> None:
    from kvpersist.errors import Unavailable

    for url in ("postgresql://u:hush@127.0.0.1:1/x", "mysql://u:hush@127.0.0.1:1/x", "redis://u:hush@127.0.0.1:1/0"):
        with pytest.raises(Unavailable) as failed:
            await open_source(f"agentx:{url}")
        assert "hush" not in str(failed.value)


# ---- there and back


async def test_an_export_in_their_shape_has_equal_json_values(folder: Path, db: Persistence) -> None:
    text = layout.export_file(folder)
    given = json.loads((folder / "export.json").read_bytes())
    await brought(db, text)

    made = json.loads(await export_agentx(db))

    for shelf, id_field in (("containers", "containerId"), ("sessions", "sessionId"), ("prototypes", "prototypeId")):
        assert {each[id_field]: each for each in made[shelf]} == {each[id_field]: each for each in given[shelf]}
    images = [{**each, "description": each.get("description")} for each in given["images"]]
    exported = [{**each, "description": each.get("description")} for each in made["images"]]
    assert sorted(exported, key=str) == sorted(images, key=str)
    assert {id_: talk for id_, talk in made["messages"].items() if talk} == given["messages"]
    assert b"sk-very-secret" not in await export_agentx(db)


async def test_an_export_can_be_imported_again_anywhere(folder: Path, db: Persistence) -> None:
    await brought(db, layout.kv_sqlite(folder))
    (folder / "again.json").write_bytes(await export_agentx(db))
    before = await everything(db)

    report = await brought(db, f"agentx:{folder / 'again.json'}")

    assert await everything(db) == before
    assert (report.sessions, report.messages, report.records, report.differing) == (0, 0, {}, [])


async def test_a_key_that_is_no_text_is_reported_as_json_can_have_it(folder: Path, db: Persistence) -> None:
    with sqlite3.connect(folder / "agentx.db") as database:
        database.execute("CREATE TABLE kv_storage (key, value)")
        database.execute("INSERT INTO kv_storage VALUES (x'73657373696f6e733aff', '{}')")
        database.execute("INSERT INTO kv_storage VALUES ('sessions:s1', '{\"sessionId\": \"s1\"}')")
    database.close()

    report = await brought(db, f"agentx:{folder / 'agentx.db'}")

    assert await db.sessions.exists("s1")
    [problem] = report.problems
    assert problem.place == "kv_storage sessions:\\udcff" and msgspec.json.encode(report)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no pipes here")
async def test_a_pipe_in_a_folder_is_not_waited_for(folder: Path, db: Persistence) -> None:
    (folder / "sessions").mkdir()
    os.mkfifo(folder / "sessions" / "pipe")
    (folder / "sessions" / "s1").write_text('{"sessionId": "s1"}')

    async with asyncio.timeout(10):
        await brought(db, f"agentx:{folder}")

    assert await db.sessions.count() == 1


async def test_a_folder_may_be_named_as_a_url_of_sqlite_is(folder: Path, db: Persistence) -> None:
    (folder / "sessions").mkdir()
    (folder / "sessions" / "s1").write_text('{"sessionId": "s1"}')

    await brought(db, f"agentx:sqlite:///{folder}")

    assert await db.sessions.exists("s1")
