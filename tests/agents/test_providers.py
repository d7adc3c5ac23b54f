"""Providers: one default each container, and secrets that are never in clear."""

from __future__ import annotations

import asyncio
import base64
import logging
import os
import pickle
import sys
import traceback
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

import kvpersist
from kvpersist import Provider, new_secret_key
from kvpersist.agents.persistence import Persistence
from kvpersist.errors import BadOption, BadRequest, CorruptRecord, MissingExtra, ParentGone, UniqueConflict

SECRET = "sk-very-secret-0123456789"
KEY = base64.b64encode(bytes(range(32))).decode()


@pytest.fixture
async def db(driver: Any) -> AsyncIterator[Persistence]:
    async with kvpersist.open(driver, secret_key=KEY) as db:
        await db.containers.create(id="c")
        yield db


async def defaults(db: Persistence, container: str = "c") -> list[str]:
    return [each.id for each in await db.providers.find(container_id=container) if each.is_default]


# ---- records


async def test_a_provider_comes_back_as_it_was_created(db: Persistence) -> None:
    made = await db.providers.create(
        container_id="c", name="main", vendor="acme", protocol="anthropic", base_url="https://x.test/v1", model="m"
    )

    assert await db.providers.get(made.id) == made
    assert await db.providers.find(name="main") == await db.providers.find(vendor="acme") == [made]
    assert await db.providers.secret(made.id) is None
    assert await db.providers.secret("nobody") is None


@pytest.mark.parametrize(
    "fields",
    [
        {"protocol": "grpc"},
        {"is_default": True},
        {"base_url": "https://user:pass@x.test"},
        {"base_url": f"https://x.test/v1?api-key={SECRET}"},
        {"base_url": "https://[x"},
        {"api_key": SECRET},
        {"secret_ref": SECRET},
        {"secret_ref": "file:relative"},
        {"secret_ref": "env:"},
        {"secret_ref": 7},
        {"secret": ""},
        {"secret": 7},
        {"secret": SECRET, "secret_ref": "env:X"},
    ],
)
async def test_what_a_provider_cannot_be_is_refused_without_showing_it(
    fields: dict[str, Any], db: Persistence, driver: Any
) -> None:
    before = await driver.everything()

    with pytest.raises(BadRequest) as refused:
        await db.providers.create(id="p", **fields)

    assert SECRET not in f"{refused.value} {refused.value!r} {refused.value.__cause__!r}"
    assert await driver.everything() == before


async def test_a_container_has_one_default_at_most(db: Persistence) -> None:
    await db.containers.create(id="d")
    await db.providers.create(id="a", container_id="c", is_default=True)
    await db.providers.create(id="b", container_id="c", is_default=True)
    await db.providers.create(id="other", container_id="d", is_default=True)
    assert await defaults(db) == ["b"]

    await db.providers.update("a", lambda p: msgspec.structs.replace(p, is_default=True))
    assert await defaults(db) == ["a"]
    await db.providers.save(Provider(id="b", container_id="c", is_default=True))
    assert await defaults(db) == ["b"]
    found = await db.providers.default("c")
    assert found is not None and found.id == "b"
    assert await defaults(db, "d") == ["other"]

    await db.providers.update("b", lambda p: msgspec.structs.replace(p, is_default=False))
    assert await defaults(db) == [] and await db.providers.default("c") is None
    with pytest.raises(UniqueConflict):
        await db.providers.create(id="a", container_id="c", is_default=True)
    assert await defaults(db) == []


async def test_many_defaults_at_once_leave_one(db: Persistence, driver: Any) -> None:
    async with kvpersist.open(driver) as other:
        await asyncio.gather(
            *(
                each.providers.create(id=f"{name}{n}", container_id="c", is_default=True)
                for name, each in (("x", db), ("y", other))
                for n in range(4)
            )
        )

    assert len(await defaults(db)) <= 1
    assert await db.providers.count(container_id="c") == 8
    if db.store.capabilities.atomic_batch != "none":
        assert len(await defaults(db)) == 1
        assert await db.providers.repository.verify() == []


async def test_a_default_of_no_container_takes_nothing_away(db: Persistence) -> None:
    await db.providers.create(id="a", container_id="c", is_default=True)

    with pytest.raises(ParentGone):
        await db.providers.create(container_id="nobody", is_default=True)
    with pytest.raises(BadRequest):
        await db.providers.create(container_id="c", is_default=True, model=7)

    assert await defaults(db) == ["a"]


# ---- secrets


async def test_a_secret_is_stored_encrypted_and_given_back(db: Persistence, driver: Any) -> None:
    made = await db.providers.create(id="p", container_id="c", secret=SECRET)

    assert await db.providers.secret("p") == SECRET
    stored = b"".join([*(await driver.everything()).values(), *(k.encode() for k in await driver.everything())])
    assert SECRET.encode() not in stored and SECRET[3:].encode() not in stored
    shown = f"{made} {made!r} {db.providers!r} {db!r} {vars(db.providers)} {pickle.dumps(made.name)!r}"
    assert SECRET not in shown and KEY not in shown
    assert "sealed=..." in repr(made)


async def test_no_log_shows_a_secret(db: Persistence, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        await db.providers.create(id="p", secret=SECRET)
        await db.providers.secret("p")

    assert SECRET not in caplog.text


async def test_a_secret_that_is_no_text_is_refused_without_showing_it(db: Persistence) -> None:
    await db.providers.create(id="p")
    for write in (
        db.providers.create(id="new", secret=SECRET + "\udc80"),
        db.providers.set_secret("p", SECRET + "\udc80"),
    ):
        with pytest.raises(BadRequest) as caught:
            await write
        assert SECRET not in repr(caught.value) + repr(caught.value.__cause__) + repr(caught.value.__context__)


async def test_a_reference_to_a_path_that_cannot_be_is_told_of(db: Persistence) -> None:
    await db.providers.create(id="p", secret_ref="file:/run/a\0b")
    with pytest.raises(BadOption):
        await db.providers.secret("p")


async def test_a_reference_is_resolved_when_it_is_asked_for(
    db: Persistence, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "key"
    await db.providers.create(id="e", secret_ref="env:MY_KEY")
    await db.providers.create(id="f", secret_ref=f"file:{file}")

    for id_ in ("e", "f"):
        with pytest.raises(BadOption):
            await db.providers.secret(id_)
    monkeypatch.setenv("MY_KEY", SECRET)
    file.write_text(f"{SECRET}\n")
    assert await db.providers.secret("e") == await db.providers.secret("f") == SECRET
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(BadOption, match="cannot be read"):
        await db.providers.secret("f")
    file.write_text("\n")
    with pytest.raises(BadOption, match="no secret"):
        await db.providers.secret("f")


async def test_a_secret_is_replaced_and_removed(db: Persistence) -> None:
    await db.providers.create(id="p", secret_ref="env:MY_KEY", name="n")

    changed = await db.providers.set_secret("p", SECRET)
    assert changed is not None and (changed.secret_ref, changed.name) == (None, "n")
    assert await db.providers.secret("p") == SECRET
    await db.providers.set_secret("p", None)
    assert await db.providers.secret("p") is None
    assert await db.providers.set_secret("nobody", SECRET) is None


async def test_a_save_without_a_secret_keeps_the_one_there(db: Persistence) -> None:
    await db.providers.save(Provider(id="p", name="a"), secret=SECRET)

    await db.providers.save(Provider(id="p", name="b"))
    assert await db.providers.secret("p") == SECRET
    await db.providers.save(Provider(id="p", secret_ref="env:HOME"))
    assert await db.providers.secret("p") == os.environ["HOME"]
    await db.providers.save(Provider(id="p"), secret="other")
    found = await db.providers.get("p")
    assert found is not None and found.secret_ref is None and found.name is None
    assert await db.providers.secret("p") == "other"


async def test_a_sealed_secret_opens_in_its_own_record_only(db: Persistence) -> None:
    made = await db.providers.create(id="p", secret=SECRET)
    await db.providers.save(Provider(id="thief", sealed=made.sealed))

    with pytest.raises(CorruptRecord) as refused:
        await db.providers.secret("thief")
    assert SECRET not in "".join(traceback.format_exception(refused.value))


async def test_a_sealed_secret_that_was_changed_is_found(db: Persistence) -> None:
    made = await db.providers.create(id="p", secret=SECRET)
    assert made.sealed is not None
    for at in (0, 3, 12, 25, len(made.sealed) - 1):
        damaged = bytearray(made.sealed)
        damaged[at] ^= 1
        await db.providers.save(Provider(id="p", sealed=bytes(damaged)))
        with pytest.raises((CorruptRecord, BadOption)):
            await db.providers.secret("p")
    for cut in (b"\x01", made.sealed[:21]):
        await db.providers.save(Provider(id="p", sealed=cut))
        with pytest.raises(CorruptRecord):
            await db.providers.secret("p")


async def test_keys_are_changed_by_giving_the_new_one_first(db: Persistence, driver: Any) -> None:
    await db.providers.create(id="old", secret=SECRET)
    fresh = new_secret_key()
    async with kvpersist.open(driver, secret_key=[fresh, KEY]) as both:
        await both.providers.create(id="new", secret=SECRET)
        assert await both.providers.secret("old") == await both.providers.secret("new") == SECRET
        await both.providers.set_secret("old", SECRET)
    async with kvpersist.open(driver, secret_key=fresh) as later:
        assert await later.providers.secret("old") == SECRET
    with pytest.raises(BadOption, match="add the old key"):
        await db.providers.secret("old")


async def test_without_a_key_a_secret_is_refused_and_everything_else_works(
    driver: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("KVPERSIST_SECRET_KEY", raising=False)
    async with kvpersist.open(driver) as db:
        with pytest.raises(BadOption, match="KVPERSIST_SECRET_KEY") as refused:
            await db.providers.create(id="p", secret=SECRET)
        assert SECRET not in str(refused.value)
        assert await db.providers.count() == 0
        await db.providers.create(id="p", name="x")
        monkeypatch.setenv("KVPERSIST_SECRET_KEY", f"{new_secret_key()},{KEY}")
        await db.providers.set_secret("p", SECRET)
        assert await db.providers.secret("p") == SECRET


@pytest.mark.parametrize("key", ["short", b"x" * 31, "!" * 44, [], 7, ["a" * 43 + "=", "bad"]])
async def test_what_is_no_key_is_refused_without_showing_it(key: Any) -> None:
    with pytest.raises(BadOption) as refused:
        await kvpersist.open("memory://", secret_key=key)

    assert "secret_key" in str(refused.value)
    assert "short" not in str(refused.value) and "bad'" not in str(refused.value)


async def test_without_the_library_a_secret_is_refused_with_a_hint(
    db: Persistence, monkeypatch: pytest.MonkeyPatch
) -> None:
    await db.providers.create(id="p", secret=SECRET)
    for name in [name for name in sys.modules if name.partition(".")[0] == "cryptography"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "cryptography", None)

    with pytest.raises(MissingExtra, match="crypto"):
        await db.providers.secret("p")
    with pytest.raises(MissingExtra, match="crypto"):
        await db.providers.create(secret=SECRET)
    assert await db.providers.count() == 1
