"""Names that confuse paths, patterns, collations or query languages: as keys, namespaces, ids and index values."""

from __future__ import annotations

from itertools import chain, repeat
from pathlib import Path

import msgspec
import pytest
from places import Where

import kvpersist
from kvpersist import Index, Repository
from kvpersist.errors import BadKey, KeyTooLong, KvError
from kvpersist.testing import AWKWARD_KEYS

LIMIT = "k" * 512
PATIENCE = 60.0  # seconds that a call may take where emulators share a machine
HOSTILE = sorted(
    {
        *AWKWARD_KEYS,
        *("../x", "/etc/passwd", "C:\\x", "\\", "*", "?", "[", "{}", "%2e", "a\r\nSET b 1\r\n", "x. ", "x.", "x "),
        *("__proto__", "$where", "' OR 1=1 --", '{"$gt": ""}', "\u202etxt.exe", "\U0001f600", LIMIT),
        *("%s", "%(k)s", "$1", ":k", "@k", "?1", "\\'", "\\0", "\\", "%", "_", "key\x00", "\x1a"),
    },
    key=str.encode,
)
REFUSED = {  # by every driver alike, before it is asked
    "": BadKey,
    "a\ud800": BadKey,
    "\udfff": BadKey,
    LIMIT + "k": KeyTooLong,
    "\u00e9" * 257: KeyTooLong,
}


class Note(msgspec.Struct, kw_only=True):
    id: str
    topic: str


async def test_each_hostile_key_is_its_own_and_the_listing_has_all_of_them_in_order(where: Where) -> None:
    async with kvpersist.open_store(where, timeout=PATIENCE) as store:
        await store.put_many({key: f"value of {key}" for key in HOSTILE})

        assert await store.get_many(HOSTILE) == [f"value of {key}" for key in HOSTILE]
        assert [key async for key in store.keys("")] == HOSTILE
        for key in HOSTILE[::2]:
            assert await store.delete(key)
        assert [key async for key in store.keys("")] == HOSTILE[1::2]


async def test_what_a_listing_of_a_hostile_prefix_answers_begins_with_it(where: Where) -> None:
    async with kvpersist.open_store(where, timeout=PATIENCE) as store:
        await store.put_many(dict(zip(HOSTILE, repeat(0), strict=False)))

        for prefix in ("*", "?", "[", "%", "_", "../", "\\", "{", "$", "\x00", "'", "\U0001f600", "A", "a", "."):
            assert [key async for key in store.keys(prefix)] == [key for key in HOSTILE if key.startswith(prefix)]


async def test_hostile_namespaces_do_not_meet(where: Where) -> None:
    spaces = [name for name in HOSTILE if ":" not in name and "#" not in name and len(name.encode()) <= 120]
    pairs = list(chain.from_iterable(((f"{space}:a", space), (f"{space}:b", space)) for space in spaces))
    async with kvpersist.open_store(where, timeout=PATIENCE) as store:
        await store.put_many(dict(pairs))

        for space in spaces:
            assert [item async for item in store.scan(f"{space}:")] == [(f"{space}:a", space), (f"{space}:b", space)]
        everything = [key async for key in store.keys("")]
        assert everything == sorted((key for key, _ in pairs), key=str.encode)
        assert await store.clear(f"{spaces[3]}:") == 2
        assert [key async for key in store.keys("")] == [
            key for key in everything if not key.startswith(f"{spaces[3]}:")
        ]


async def test_hostile_ids_and_index_values_find_their_own_record(where: Where) -> None:
    names = [name for name in HOSTILE if len(name.encode()) <= 40]
    async with kvpersist.open_store(where, timeout=PATIENCE) as store:
        notes = Repository(store, Note, name="note", key="id", indexes=[Index("topic")])
        refused = dict(zip(names, await _outcomes(notes, names), strict=True))

        assert {name: type(error) for name, error in refused.items() if error} == {}
        for name in names:
            assert await notes.get(name) == Note(id=name, topic=name)
            assert await notes.find(topic=name) == [Note(id=name, topic=name)]
        assert await notes.find(topic="nothing of this name") == []
        assert await notes.verify() == []


@pytest.mark.parametrize("key", REFUSED, ids=[f"{len(key)} characters" for key in REFUSED])
async def test_what_is_no_key_is_refused_by_every_driver_alike(where: Where, key: str) -> None:
    async with kvpersist.open_store(where, timeout=PATIENCE) as store:
        await store.put("there", 1)

        for call in (store.get(key), store.put(key, 1), store.delete(key), store.put_many({"other": 1, key: 1})):
            with pytest.raises(REFUSED[key]):
                await call
        assert [item async for item in store.scan()] == [("there", 1)]


async def test_nothing_is_written_outside_the_place(where: Where, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    before = _tree(tmp_path)
    async with kvpersist.open_store(where, timeout=PATIENCE) as store:
        await store.put_many(dict(zip(HOSTILE, repeat(0), strict=False)))

    beside = {path for path in _tree(tmp_path) - before if path.relative_to(tmp_path).parts[0].split(".")[0] != "store"}
    assert beside == set()
    assert list(outside.iterdir()) == []


async def _outcomes(notes: Repository[Note], names: list[str]) -> list[KvError | None]:
    outcomes: list[KvError | None] = []
    for name in names:
        try:
            await notes.put(Note(id=name, topic=name))
        except KvError as error:
            outcomes.append(error)
        else:
            outcomes.append(None)
    return outcomes


def _tree(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))
