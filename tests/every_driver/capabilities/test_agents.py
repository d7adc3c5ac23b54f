"""Agents and what belongs to them, what agents are made of, traces, log-ins."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta

import msgspec
import pytest

from kvpersist import (
    Bookmark,
    Compression,
    Conflict,
    HistoryWindow,
    Media,
    Message,
    NewEvent,
    RecoveredFile,
    Snapshot,
    Todo,
    TokenUsage,
    ToolCallPart,
    at_most,
    between,
)
from kvpersist.agents.persistence import Persistence
from kvpersist.errors import BadRequest, Unsupported

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(300)]

KeysWith = Callable[[str], Awaitable[list[str]]]

NOON = datetime(2026, 3, 1, 12, tzinfo=UTC)


@pytest.mark.shows("A record of each agent: template, lineage, breakpoint, counters, bookmark")
async def test_what_is_known_of_an_agent_is_kept_and_found(db: Persistence) -> None:
    made = await db.agents.create(id="a%1", template_id="coder", created_at=NOON, metadata={"n": 0})
    await db.agents.create(id="a_2", template_id="coder", created_at=NOON + timedelta(days=1))

    saved = await db.agents.update(
        "a%1",
        lambda agent: msgspec.structs.replace(
            agent, breakpoint="PRE_TOOL", last_safe_point=3, counters={"steps": 0}, bookmark=Bookmark(seq=4, at=NOON)
        ),
    )

    assert (made.breakpoint, made.last_safe_point, made.lineage) == ("ready", -1, [])
    assert saved is not None
    assert saved == await db.agents.get("a%1")
    assert (saved.breakpoint, saved.last_safe_point, saved.counters) == ("pre_tool", 3, {"steps": 0})
    assert [agent.id for agent in await db.agents.find(template_id="coder")] == ["a_2", "a%1"]
    assert [agent.id for agent in await db.agents.find(id_prefix="a%")] == ["a%1"]
    assert [agent.id for agent in await db.agents.find(created=between(NOON, NOON))] == ["a%1"]
    merged = await db.agents.merge_metadata("a%1", {"m": 1})
    assert merged is not None
    assert merged.metadata == {"n": 0, "m": 1}


@pytest.mark.shows("An agent's todos, one in progress at most")
async def test_todos_are_kept_as_a_list_with_a_version(db: Persistence) -> None:
    await db.agents.create(id="doer")

    saved = await db.todos.save(
        "doer", [Todo(title="outline", status="in_progress", assignee="ada"), Todo(title="draft", notes="soon")]
    )

    assert await db.todos.get("doer") == saved
    assert [(todo.title, todo.status) for todo in saved.todos] == [("outline", "in_progress"), ("draft", "pending")]
    with pytest.raises(Conflict):
        await db.todos.save("doer", [], version=0)
    with pytest.raises(BadRequest):
        await db.todos.save("doer", [Todo(title="a", status="in_progress"), Todo(title="b", status="in_progress")])


@pytest.mark.shows("Snapshots of an agent, to go back to", "Counts of an agent: messages, calls, snapshots")
async def test_snapshots_are_places_in_a_session(db: Persistence) -> None:
    await db.agents.create(id="snap")
    await db.sessions.create(id="snapped", agent_id="snap")
    await db.messages.append_many("snapped", [Message("user", "one"), Message("assistant", "two")])
    first = await db.snapshots.save(Snapshot(agent_id="snap", session_id="snapped", last_safe_point=1))
    await db.messages.append("snapped", Message("assistant", tool_calls=[ToolCallPart("c", "look")]))
    await db.snapshots.create(agent_id="snap", id="label", messages=[Message("user", "copy")], metadata={"step": 0})

    label, sfp = await db.snapshots.find(agent_id="snap")
    stats = await db.agents.stats("snap")

    assert (first.id, sfp) == ("sfp-1", first)
    assert [message.content for message in await db.snapshots.messages(first)] == ["one", "two"]
    assert [message.content for message in await db.snapshots.messages(label)] == ["copy"]
    assert label.metadata == {"step": 0}
    assert (stats.messages, stats.tool_calls, stats.snapshots) == (3, 1, 2)
    assert (stats.tool_calls_by_name, stats.tool_calls_by_state) == ({"look": 1}, {"pending": 1})


@pytest.mark.shows(
    "What was compressed away: history windows, compressions, recovered files", "What providers keep of media"
)
async def test_history_and_media_of_an_agent_are_kept(db: Persistence) -> None:
    await db.agents.create(id="historian")
    window = await db.windows.save(
        HistoryWindow(agent_id="historian", messages=[Message("user", "long ago")], events=[{"n": 0}])
    )
    await db.compressions.save(
        Compression(agent_id="historian", window_id=window.id, summary="talk", ratio=0.1, recovered_files=["a.txt"])
    )
    await db.recovered_files.save(RecoveredFile(agent_id="historian", path="a/b.txt", content="tea", modified_at=NOON))
    await db.media.replace_all(
        "historian", [Media(agent_id="historian", key="k", provider="p", mime_type="image/png", size=0, file_id="f")]
    )

    [kept] = await db.windows.find(agent_id="historian")
    [compression] = await db.compressions.find(agent_id="historian")
    [file] = await db.recovered_files.find(agent_id="historian", path="a/b.txt")
    [media] = await db.media.find(agent_id="historian")

    assert kept == window
    assert (window.stats.message_count, window.stats.event_count) == (1, 1)
    assert (compression.window_id, compression.config.threshold) == (window.id, 50_000)
    assert (file.content, file.modified_at) == ("tea", NOON)
    assert (media.key, media.size, media.file_id) == ("k", 0, "f")


@pytest.mark.shows(
    "Fork of an agent in several, with sessions, snapshots, todos, events", "`delete` removes everything"
)
async def test_an_agent_is_forked_and_deleted_whole(db: Persistence, keys_with: KeysWith) -> None:
    await db.agents.create(id="parent")
    await db.sessions.create(id="parent-session", agent_id="parent")
    await db.messages.append_many("parent-session", [Message("user", "one"), Message("user", "two")])
    await db.todos.save("parent", [Todo(title="draft")])
    await db.events.publish_many("parent", [NewEvent(event={"n": 0}, channel="progress")])
    await db.snapshots.save(Snapshot(agent_id="parent", session_id="parent-session", id="now"))

    forks = await db.agents.fork("parent", count=2)

    assert len({fork.id for fork in forks}) == 2
    for fork in forks:
        [session] = await db.sessions.find(agent_id=fork.id)
        todos = await db.todos.get(fork.id)
        assert fork.lineage == ["parent"]
        assert [message.content for message in await db.messages.range(session.id)] == ["one", "two"]
        assert todos is not None
        assert [todo.title for todo in todos.todos] == ["draft"]
        assert [entry.event for entry in await db.events.read(fork.id)] == [{"n": 0}]
        assert await db.snapshots.count(agent_id=fork.id) == 1
    assert await db.agents.delete(forks[0].id) is True
    assert await keys_with(forks[0].id) == []
    assert await db.events.read(forks[0].id) == []
    assert await db.agents.exists(forks[1].id)


@pytest.mark.shows("What an agent is made of: images, and the image an image was made from", "Prototypes of agents")
async def test_images_and_prototypes_keep_how_an_agent_is_configured(db: Persistence) -> None:
    await db.containers.create(id="studio")
    await db.prototypes.create(id="model", container_id="studio", name="writer", system_prompt="Write.")
    base = await db.images.create(
        id="base",
        container_id="studio",
        name="writer",
        description="",
        system_prompt="Write.",
        prototype_id="model",
        mcp_servers={"files": {"command": "files"}},
    )
    await db.images.create(id="derived", container_id="studio", name="writer 2", parent_id="base", model="small")
    await db.images.update("derived", lambda image: msgspec.structs.replace(image, name="poet"))

    assert await db.images.get("base") == base
    assert [image.id for image in await db.images.find(parent_id="base")] == ["derived"]
    assert await db.images.find(name="writer 2") == []
    assert [image.id for image in await db.images.find(name="poet")] == ["derived"]
    assert [image.id for image in await db.images.find(container_id="studio")] == ["derived", "base"]
    assert [prototype.id for prototype in await db.prototypes.find(container_id="studio")] == ["model"]


@pytest.mark.shows("How models are reached, without a secret in clear")
async def test_providers_are_kept_and_one_is_the_default(db: Persistence, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOWN_SECRET", "s3cret")
    await db.containers.create(id="office")
    made = await db.providers.create(
        container_id="office",
        name="main",
        vendor="acme",
        protocol="openai",
        base_url="https://models.example",
        model="small",
        is_default=True,
        secret_ref="env:SHOWN_SECRET",
    )

    default = await db.providers.default("office")

    assert default == made
    assert await db.providers.secret(made.id) == "s3cret"
    assert "s3cret" not in repr(made)


@pytest.mark.shows("Traces of runs, of six types", "Tokens that were used")
async def test_traces_form_a_tree_and_count_tokens(db: Persistence) -> None:
    await db.sessions.create(id="traced")
    root = await db.traces.start("run", type="agent", session_id="traced")
    for type_ in ("tool", "llm", "retriever", "embedding", "chain"):
        await db.traces.start(type_, type=type_, session_id="traced", parent_id=root.id, input={"q": 0})
    [llm] = await db.traces.find(session_id="traced", type="llm")

    ended = await db.traces.end(llm.id, output=False, token_usage=TokenUsage(3, 4, 7))

    assert ended is not None
    assert (ended.output, ended.token_usage) == (False, TokenUsage(3, 4, 7))
    assert ended.duration is not None
    assert [trace.id for trace in await db.traces.find(session_id="traced", root=True)] == [root.id]
    assert len(await db.traces.find(parent_id=root.id)) == 5


@pytest.mark.shows("Log-ins with their end", "An end of life for each entry")
async def test_a_login_session_ends_by_itself(db: Persistence) -> None:
    now = datetime.now(UTC)
    await db.login_sessions.create(
        id="long", user_id="ada", expires_at=now + timedelta(hours=1), metadata={"ip": "::1"}
    )
    soon = now + timedelta(seconds=0.7)
    if db.store.capabilities.atomic_batch == "none":
        with pytest.raises(Unsupported):
            await db.login_sessions.create(id="short", user_id="ada", expires_at=soon)
    else:
        await db.login_sessions.create(id="short", user_id="ada", expires_at=soon)
        while await db.login_sessions.exists("short"):
            await asyncio.sleep(0.02)

    assert [login.id for login in await db.login_sessions.find(user_id="ada")] == ["long"]
    await db.store.put("plain", 1, ttl=0.3)
    while await db.store.has("plain"):
        await asyncio.sleep(0.02)


@pytest.mark.shows("Agents older than 90 days are found and deleted")
async def test_old_agents_are_found_by_their_time_and_deleted(db: Persistence) -> None:
    for days in (400, 91, 89):
        created = datetime.now(UTC) - timedelta(days=days)
        await db.agents.create(id=f"of-{days}", template_id="ages", created_at=created)
    limit = datetime.now(UTC) - timedelta(days=90)

    old = [agent.id async for agent in db.agents.iterate(created=at_most(limit), template_id="ages")]
    for id_ in old:
        await db.agents.delete(id_)

    assert sorted(old) == ["of-400", "of-91"]
    assert [agent.id for agent in await db.agents.find(template_id="ages")] == ["of-89"]
