"""Every operation of AgentX's persistence and queue, done with kvpersist.

    python docs/coming-from/agentx.py                                  # in memory, on the demo's conversation
    python docs/coming-from/agentx.py sqlite:///talks.db --data FILE   # any store, and your own conversations

``docs/coming-from/agentx.md`` is the page to it. Each step gets a conversation of its own, ``talk``.
"""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path
from tempfile import TemporaryDirectory

from msgspec.structs import replace
from steps import main, refused, theirs

import kvpersist
from kvpersist import (
    Container,
    EventEntry,
    EventQueue,
    Image,
    Message,
    Persistence,
    Prototype,
    Provider,
    Session,
    ToolCallPart,
    config,
)
from kvpersist.errors import ParentGone, Unencodable
from kvpersist.ops.agentx_export import export_agentx
from kvpersist.ops.importers import import_from, open_source

# ---- opening and drivers


@theirs("createPersistence", "create_persistence", "memory()", "fs(base)", "sqlite(path)")
async def open_stores(db: Persistence, talk: Session) -> None:
    with TemporaryDirectory() as folder:
        for where in ("memory://", f"file://{folder}/base", f"sqlite:///{folder}/data/agent.db"):
            async with kvpersist.open(where) as other:
                await other.containers.create(id="default")
        async with kvpersist.open(home=folder) as other:  # instead of ~/.agentx
            assert other.home is not None and other.home.path == Path(folder)
    assert config.from_redis_url(environ={"REDIS_URL": "cache:6379"}) == {"url": "redis://cache:6379"}
    url = "postgresql://ada@db/agents"
    assert config.from_database_url(environ={"DATABASE_URL": url}) == {"url": url}


@theirs("hasItem", "getItem", "setItem", "removeItem", "getKeys", "clear", "dispose")
async def plain_keys(db: Persistence, talk: Session) -> None:
    key = f"app:{talk.id}:theme"  # plain keys live beside the records
    await db.store.put(key, {"dark": True})
    assert await db.store.has(key)
    assert await db.store.get(key) == {"dark": True}
    assert [each async for each in db.store.keys(f"app:{talk.id}:")] == [key]
    assert await db.store.delete(key)
    await db.store.put(key, 0)
    assert await db.store.clear(f"app:{talk.id}:") == 1
    async with kvpersist.open_store("memory://") as store:  # without records; closed at the end
        assert await store.get(key) is None


# ---- containers


@theirs("saveContainer", "findContainerById", "findAllContainers", "containerExists", "deleteContainer")
async def containers(db: Persistence, talk: Session) -> None:
    container = await db.containers.save(Container(id=f"shop-{talk.id}", config={"plan": "free"}))
    container = await db.containers.save(replace(container, config={"plan": "paid"}))
    assert await db.containers.get(container.id) == container
    assert (await db.containers.find(limit=1))[0] == container  # newest first
    assert await db.containers.exists(container.id)
    session = await db.sessions.create(container_id=container.id)
    assert await db.containers.delete(container.id)
    assert not await db.sessions.exists(session.id)  # with all that is in it
    assert not await db.containers.delete(container.id)


# ---- images


@theirs(
    "saveImage",
    "findImageById",
    "findAllImages",
    "findImagesByName",
    "findImagesByContainerId",
    "imageExists",
    "updateMetadata",
    "deleteImage",
)
async def images(db: Persistence, talk: Session) -> None:
    container = await db.containers.create()
    image = await db.images.save(
        Image(
            id=f"img_{talk.id}",
            container_id=container.id,
            session_id=talk.id,
            system_prompt="You sell books.",
            mcp_servers={"files": {"command": "mcp-files"}},
            metadata={"claudeSdkSessionId": "abc"},
        )
    )
    assert image.name == "New Conversation"
    assert await db.images.get(image.id) == image
    assert await db.images.get("nobody's") is None
    assert (await db.images.find(limit=1))[0] == image
    name = f"Seller {talk.id}"
    image = await db.images.save(replace(image, name=name))
    assert await db.images.find(name=name) == [image]
    assert await db.images.find(name="New Conversation", limit=1) != [image]  # the old name leads nowhere
    assert await db.images.find(container_id=container.id) == [image]
    assert await db.images.exists(image.id)
    merged = await db.images.merge_metadata(image.id, {"driverSessionId": "xyz"})
    assert merged is not None and merged.metadata == {"claudeSdkSessionId": "abc", "driverSessionId": "xyz"}
    assert merged.updated_at != image.updated_at
    assert await db.images.merge_metadata("nobody's", {}) is None
    child = await db.images.create(replace(merged, id="", parent_id=image.id))
    assert await db.images.find(parent_id=image.id) == [child]
    assert await db.images.delete(image.id)
    assert not await db.images.delete(image.id)


@theirs("prototypes", "llmProviders", "setDefault")
async def prototypes_and_providers(db: Persistence, talk: Session) -> None:
    container = await db.containers.create()
    prototype = await db.prototypes.save(
        Prototype(id=f"proto_{talk.id}", container_id=container.id, name="Seller", model="large")
    )
    assert await db.prototypes.find(container_id=container.id) == [prototype]
    os.environ["SHOP_KEY"] = "secret"
    first, second = [
        await db.providers.create(
            Provider(
                container_id=container.id,
                name=vendor,
                vendor=vendor,
                protocol=protocol,
                base_url=f"https://{vendor}.example",
                model="large",
                secret_ref="env:SHOP_KEY",  # the apiKey itself is never stored in clear
            )
        )
        for vendor, protocol in (("acme", "openai"), ("zenith", "anthropic"))
    ]
    assert await db.providers.secret(first.id) == "secret"
    for provider in (first, second):
        await db.providers.update(provider.id, lambda provider: replace(provider, is_default=True))
        default = await db.providers.default(container.id)
        assert default is not None and default.id == provider.id  # there is one, the last that was set


# ---- sessions


@theirs(
    "saveSession",
    "findSessionById",
    "findSessionByImageId",
    "findSessionsByContainerId",
    "findAllSessions",
    "sessionExists",
    "deleteSession",
)
async def sessions(db: Persistence, talk: Session) -> None:
    container = await db.containers.create()
    image = await db.images.create(container_id=container.id)
    session = await db.sessions.create(id=f"sess_{talk.id}", image_id=image.id, container_id=container.id)
    await db.sessions.update(session.id, lambda session: replace(session, title="Books"))
    found = await db.sessions.get(session.id)
    assert found is not None and found.title == "Books"
    assert [each.id for each in await db.sessions.find(image_id=image.id, limit=1)] == [session.id]
    assert [each.id for each in await db.sessions.find(container_id=container.id)] == [session.id]
    assert (await db.sessions.list(limit=1))[0].id == session.id
    assert [each.id async for each in db.sessions.iterate()][:2] == [session.id, talk.id]
    assert await db.sessions.exists(session.id)
    assert await db.sessions.delete(session.id)
    assert not await db.sessions.delete(session.id)


@theirs("addMessage", "getMessages")
async def add_messages(db: Persistence, talk: Session) -> None:
    before = await db.messages.count(talk.id)
    stored = await db.messages.append(talk.id, Message(role="user", content="Is there tea?"))
    call = ToolCallPart("call_t", "look", {"place": "cupboard"})
    parts = [{"type": "text", "text": "Green."}, {"type": "image", "data": "iVBORw0="}]
    await db.messages.append_many(
        talk.id,
        [
            Message("assistant", None, tool_calls=[call]),  # subtype tool_call
            Message("tool", ["green"], tool_call_id="call_t"),  # subtype tool_result
            Message("assistant", parts),
        ],
    )
    messages = await db.messages.range(talk.id, after=stored.number - 1)
    assert [message.role for message in messages] == ["user", "assistant", "tool", "assistant"]
    assert messages[-1].content == parts
    every = [message async for message in db.messages.iterate(talk.id)]
    assert len(every) == before + 4 and every[-4:] == messages
    with refused(ParentGone):
        await db.messages.append("nobody's", Message("user", "Hello?"))


@theirs("truncateAfterMessage", "clearMessages")
async def remove_messages(db: Persistence, talk: Session) -> None:
    messages = await db.messages.range(talk.id)
    assert await db.messages.truncate(talk.id, after=messages[2].id) == len(messages) - 3
    assert await db.messages.range(talk.id) == messages[:3]
    assert await db.messages.clear(talk.id) == 3


@theirs("export", "import")
async def export_and_import(db: Persistence, talk: Session) -> None:
    data = await db.sessions.export(talk.id)
    async with kvpersist.open("memory://") as other:
        container = await other.containers.create(id=f"shop-{talk.id}")
        image = await other.images.create(id=f"img_{talk.id}", container_id=container.id)
        await other.sessions.import_(data, container_id=container.id, image_id=image.id)
        exported = await export_agentx(other)
    document = json.loads(exported)
    assert sorted(document) == ["containers", "images", "messages", "prototypes", "sessions"]
    with TemporaryDirectory() as folder:
        Path(folder, "export.json").write_bytes(exported)
        for new in (1, 0):  # loading it twice makes no duplicates
            async with await open_source(f"agentx:{folder}/export.json") as source:
                report = await import_from(db, source)
            assert (report.sessions, report.present) == (new, 1 - new)
            assert report.verified is not None and report.verified.different == []
    [session] = await db.sessions.find(image_id=image.id)
    assert [message.role for message in await db.messages.range(session.id)] == [
        message.role for message in await db.messages.range(talk.id)
    ]


# ---- queue


@theirs("createQueue", "create_queue", "publish", "subscribe", "unsubscribe", "close")
async def publish_and_subscribe(db: Persistence, talk: Session) -> None:
    got: list[EventEntry] = []
    came = asyncio.Event()

    def handler(entry: EventEntry) -> None:
        got.append(entry)
        came.set()

    queue = EventQueue(db.store, namespace="queue", retention=86_400, cleanup_interval=300)  # seconds
    unsubscribe = await queue.on(talk.id, handler)
    position = await queue.publish(talk.id, {"type": "started"})
    await came.wait()
    assert [(entry.position, entry.event) for entry in got] == [(position, {"type": "started"})]
    unsubscribe()
    with refused(Unencodable):
        await queue.publish(talk.id, object())  # what cannot be kept is an error, and nobody is told
    await queue.close()
    await queue.close()  # again is no harm
    EventQueue(db.store, retention=172_800, consumer_ttl=86_400, max_events=10_000, cleanup_interval=0)


@theirs("ack", "getCursor", "recover")
async def acknowledge(db: Persistence, talk: Session) -> None:
    topic, consumer = talk.id, "browser"
    first, second, third = [await db.events.publish(topic, {"step": step}) for step in (1, 2, 3)]
    assert await db.events.cursor(consumer, topic) is None
    assert [entry.position for entry in await db.events.recover(consumer, topic, limit=1_000)] == [first, second, third]
    assert await db.events.ack(consumer, topic, second) == second
    assert await db.events.ack(consumer, topic, first) == second  # only forward
    assert await db.events.cursor(consumer, topic) == second
    assert [entry.event for entry in await db.events.read(topic, second, limit=1_000)] == [{"step": 3}]
    async with db.events.subscribe(topic, consumer=consumer) as entries:  # what waits, and then what comes: no gap
        await db.events.publish(topic, {"step": 4})
        assert [(await anext(entries)).event for _ in range(2)] == [{"step": 3}, {"step": 4}]
    old = "lq5x4g2-0001"  # a cursor of theirs stays one
    await db.events.publish(topic, {"step": 5}, cursor=old)
    await db.events.publish(topic, {"step": 6})
    assert [entry.event for entry in await db.events.read(topic, old)] == [{"step": 6}]


if __name__ == "__main__":
    main("AgentX")
