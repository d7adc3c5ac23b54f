"""Whatever is wrong with a call, a name or a file: the error says so and what to do, and nothing is lost."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any
from uuid import UUID

import msgspec
import pytest

import kvpersist
from kvpersist import Index, Message, Repository, Store, open_store, registry
from kvpersist.errors import (
    BadCursor,
    BadKey,
    CorruptRecord,
    ForkedStore,
    FormatMismatch,
    KeyTooLong,
    KvError,
    MissingExtra,
    NoIndex,
    ReadOnly,
    StoreClosed,
    Unencodable,
    UnknownScheme,
    ValueTooLarge,
    WrongLoop,
)


class User(msgspec.Struct, kw_only=True):
    id: str
    team: str
    meta: dict[str, Any] = {}


def users_of(store: Store) -> Repository[User]:
    return Repository(store, User, name="user", indexes=[Index("team", order_by="id")])


_IDS = ["u1", "u2", "u3", "u4", "u5"]
KEPT: dict[str, Any] = {"note": {"text": "kept"}, "users": _IDS, "said": ["hello", "again"], "damage": []}
"""What `held` finds in a file of the fixture `path`."""


@pytest.fixture
async def path(tmp_path: Path) -> Path:
    """A closed SQLite store in which something was acknowledged."""
    path = tmp_path / "agent.db"
    await fill(path)
    return path


async def fill(path: Path) -> None:
    async with kvpersist.open(path) as db:
        await db.store.put("note", {"text": "kept"})
        await users_of(db.store).put_many([User(id=id_, team="red") for id_ in _IDS])
        await db.sessions.create(id="s")
        for text in ("hello", "again"):
            await db.messages.append("s", Message("user", text))


async def held(path: Path, **options: str) -> dict[str, Any]:
    """Open the file anew and return what is in it, the records by their index."""
    async with kvpersist.open({"type": "sqlite", "path": path, **options}) as db:
        users = users_of(db.store)
        return {
            "note": await db.store.get("note"),
            "users": [user.id for user in await users.find(team="red")],
            "said": [message.content for message in await db.messages.last("s", 9)],
            "damage": await users.verify(),
        }


@contextmanager
def refused(class_: type[KvError], *says: str) -> Iterator[pytest.ExceptionInfo[KvError]]:
    """The block ends in exactly this error, which says all of that, had no effect, and is not to be repeated."""
    with pytest.raises(KvError) as caught:
        yield caught
    assert type(caught.value) is class_, caught.value
    assert (caught.value.outcome, caught.value.retryable) == ("none", False)
    assert [text for text in says if text not in str(caught.value)] == [], str(caught.value)


def everything_in(folder: Path) -> dict[str, bytes | None]:
    return {str(each.relative_to(folder)): each.read_bytes() if each.is_file() else None for each in folder.rglob("*")}


def changed(path: Path, statement: str, *values: object) -> None:
    connection = sqlite3.connect(path)
    with connection:
        connection.execute(statement, values)
    connection.close()


def rows(path: Path) -> list[Any]:
    connection = sqlite3.connect(path)
    found = connection.execute("SELECT k, v, ver, exp FROM kv ORDER BY k").fetchall()
    connection.close()
    return found


# -- the name of a store -------------------------------------------------------------------------


@pytest.mark.parametrize("opened", [kvpersist.open, open_store])
async def test_an_unknown_scheme_is_told_with_the_one_that_was_meant(opened: Callable[[str], Any], path: Path) -> None:
    with refused(UnknownScheme, "'sqlit'", "Did you mean 'sqlite'?", "memory"):
        await opened(f"sqlit:///{path}")

    assert await held(path) == KEPT


_CABINET = """
from kvpersist.driver import needs_extra
with needs_extra("cabinet", module="cabinet_client"):
    import cabinet_client
class CabinetDriver: ...
"""


@pytest.fixture
def cabinet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A driver ``cabinet://`` is installed, the library it needs is not."""
    folder = tmp_path / "site"
    info = folder / "kvpersist_cabinet-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: kvpersist-cabinet\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[kvpersist.drivers]\ncabinet = kvpersist_cabinet:CabinetDriver\n")
    (folder / "kvpersist_cabinet.py").write_text(_CABINET)
    monkeypatch.syspath_prepend(folder)
    registry.refresh()
    yield
    monkeypatch.undo()
    registry.refresh()


@pytest.mark.usefixtures("cabinet")
async def test_a_missing_extra_is_told_with_the_line_that_installs_it(path: Path) -> None:
    with refused(MissingExtra, "cabinet_client", "pip install 'kvpersist[cabinet]'"):
        await open_store("cabinet://shelf")

    assert await held(path) == KEPT


def test_without_its_extra_the_command_line_tells_the_line_that_installs_it() -> None:
    program = "import sys; sys.modules['rich'] = sys.modules['cyclopts'] = None\nfrom kvpersist.cli import main; main()"

    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)

    assert done.stderr.rstrip().endswith("is not installed: pip install 'kvpersist[cli]'")


# -- keys and values -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "says"),
    [
        ("", "a key is a text that is not empty"),
        (None, "a key is a text that is not empty"),
        (b"note", "a key is a text that is not empty"),
        ("a\ud800", "a lone surrogate has no UTF-8 form: replace it"),
    ],
)
async def test_what_is_no_key_is_refused(path: Path, key: Any, says: str) -> None:
    async with open_store(path) as store:
        with refused(BadKey, repr(key), says):
            await store.put(key, 1)
        with refused(BadKey, repr(key), says):
            await store.put_many({"beside": 1, key: 1})
        with refused(BadKey, repr(key), says):
            await store.get(key)
        assert not await store.has("beside")

    assert await held(path) == KEPT


@pytest.mark.parametrize(
    ("part", "says"),
    [(7, "id: it is a str, found int"), (None, "id: it is a str, found NoneType"), ("a\ud800", "replace it")],
)
async def test_what_is_no_part_of_a_key_is_refused(path: Path, part: Any, says: str) -> None:
    async with open_store(path) as store:
        users = users_of(store)
        with refused(BadKey, repr(part), says):
            await users.put(User(id=part, team="red"))
        with refused(BadKey, repr(part), says):
            await users.put_many([User(id="beside", team="red"), User(id=part, team="red")])
        with refused(BadKey, repr(part), says):
            await users.get(part)

    assert await held(path) == KEPT


async def test_a_number_that_no_key_can_hold_is_refused(tmp_path: Path) -> None:
    class Reading(msgspec.Struct):
        at: float

    async with open_store(tmp_path / "readings.db") as store:
        readings = Repository(store, Reading, name="reading", key="at")
        await readings.put(Reading(1.5))
        with refused(BadKey, "NaN has no place in an order"):
            await readings.put(Reading(float("nan")))
    async with open_store(tmp_path / "readings.db") as store:
        assert [reading async for reading in Repository(store, Reading, name="reading", key="at").iterate()] == [
            Reading(1.5)
        ]


async def test_a_key_too_large_is_refused_with_the_limit(path: Path) -> None:
    async with kvpersist.open(path) as db:
        with refused(KeyTooLong, "514 bytes", "limit is 512", "shorten it"):
            await db.store.put("é" * 257, 1)
        with refused(KeyTooLong, "161 bytes", "limit is 160", "shorten it"):
            await users_of(db.store).put(User(id="x" * 161, team="red"))
        with refused(KeyTooLong, "limit is", "shorten it"):
            await db.sessions.create(id="x" * 161)

    assert await held(path) == KEPT


async def test_a_value_too_large_is_refused_alone(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvpersist_drivers.sqlite._writer.MAX_VALUE_BYTES", 100_000)  # 999 MB would take a while
    large = "x" * 100_001
    says = ("limit is 100000", "split it")
    async with kvpersist.open(path) as db:
        with refused(ValueTooLarge, "'large'", *says):
            await db.store.put("large", large)
        with refused(ValueTooLarge, "'kv:user:u1'", *says):
            await users_of(db.store).put(User(id="u1", team="blue", meta={"text": large}))
        with refused(ValueTooLarge, "kv:message:s!", *says):
            await db.messages.append("s", Message("user", large))
        together = await asyncio.gather(
            db.store.put("small:a", 1), db.store.put("large", large), db.store.put("small:b", 2), return_exceptions=True
        )

        assert [type(answer) for answer in together] == [bytes, ValueTooLarge, bytes]
    assert await held(path) == KEPT
    async with open_store(path) as store:
        assert await store.get_many(["small:a", "large", "small:b"]) == [1, None, 2]


@pytest.mark.parametrize(
    ("value", "where", "says"),
    [
        (object(), "tags[1]", "object is none of None, bool, int"),
        ((1, 2), "tags[1]", "tuple is none of"),
        ({1, 2}, "tags[1]", "convert it"),
        (UUID(int=1), "tags[1]", "UUID is none of"),
        (datetime(2026, 1, 1), "tags[1]", "use datetime.now(timezone.utc)"),  # noqa: DTZ001
        ({"b": {1: 2}}, "tags[1].b", "the key 1 is int, not text: convert it"),
        ({"b": ["\ud800"]}, "tags[1].b[0]", "replace it"),
    ],
)
@pytest.mark.parametrize("codec", ["msgpack", "json"])
async def test_a_value_that_cannot_be_kept_is_named_by_its_path(
    path: Path, codec: str, value: object, where: str, says: str
) -> None:
    async with kvpersist.open({"type": "sqlite", "path": path, "codec": codec}) as db:
        with refused(Unencodable, where, "cannot be kept", says) as caught:
            await db.store.put("note", {"tags": [0, value]})
        assert caught.value.path == where
        with refused(Unencodable, f"meta.{where}", "cannot be kept", says):
            await users_of(db.store).put(User(id="u1", team="red", meta={"tags": [0, value]}))
        with refused(Unencodable, f"metadata.{where}", "cannot be kept", says):
            await db.messages.append_many(
                "s", [Message("user", "beside"), Message("user", "x", metadata={"tags": [0, value]})]
            )

    assert await held(path) == KEPT


# -- queries -------------------------------------------------------------------------------------


async def test_a_query_without_an_index_is_refused_with_those_there_are(path: Path) -> None:
    async with open_store(path) as store:
        users = users_of(store)
        for query in (users.find(id="u1"), users.first(name="x"), users.count(name="x"), users.page(team="red", id2=1)):
            with refused(NoIndex, "'user' has no index for", "team", "Declare one, or use iterate()"):
                await query

    assert await held(path) == KEPT


async def test_a_foreign_cursor_is_refused(path: Path) -> None:
    async with open_store(path) as store:
        users = users_of(store)
        others = Repository(store, User, name="other", indexes=[Index("team", order_by="id")])
        cursor = (await users.page(team="red", limit=2)).cursor
        assert cursor is not None
        for query in (
            users.page(team="blue", after=cursor),
            users.page(after=cursor),
            others.page(team="red", after=cursor),
            users.page(team="red", after="junk"),
            users.page(team="red", after=cursor[:-4]),
            users.page(team="red", after=""),
        ):
            with refused(BadCursor, "another query", "start again without one"):
                await query
        assert [user.id for user in (await users.page(team="red", after=cursor)).items] == _IDS[2:]

    assert await held(path) == KEPT


# -- the life of a store -------------------------------------------------------------------------


async def test_a_closed_store_is_refused(path: Path) -> None:
    db = await kvpersist.open(path)
    users = users_of(db.store)
    await db.close()

    calls = (
        lambda: db.store.get("note"),
        lambda: db.store.put("note", 1),
        lambda: db.store.snapshot(),
        lambda: db.store.sweep(),
        lambda: users.put(User(id="u1", team="blue")),
        lambda: users.find(team="red"),
        lambda: db.messages.append("s", Message("user", "late")),
        lambda: db.sessions.delete("s"),
    )
    for call in calls:
        with refused(StoreClosed, "open it again"):
            await call()
    await db.close()
    assert await held(path) == KEPT


async def test_another_event_loop_is_refused_and_does_no_harm(path: Path) -> None:
    async with open_store(path) as store:
        users = users_of(store)

        def elsewhere() -> None:
            for call in (lambda: store.get("note"), lambda: store.put("note", 1), lambda: users.delete("u1")):
                with refused(WrongLoop, "open one in each loop"):
                    asyncio.run(call())
            with refused(WrongLoop, "open one in each loop"):
                asyncio.run(store.close())

        await asyncio.to_thread(elsewhere)
        assert await store.get("note") == KEPT["note"]

    assert await held(path) == KEPT


_FORKED = """
import asyncio, json, os, sys, warnings
import kvpersist
from kvpersist.errors import KvError
warnings.simplefilter("ignore", DeprecationWarning)  # of a fork with threads: it is what is tested
async def told(call):
    try:
        return repr(await call)
    except KvError as error:
        return [type(error).__name__, str(error), error.outcome, error.retryable]
async def main(path):
    db = await kvpersist.open(path)
    ours, theirs = os.pipe()
    pid = os.fork()
    if pid == 0:
        calls = (
            lambda: db.store.get("note"),
            lambda: db.store.put("note", "the child's"),
            lambda: db.sessions.create(id="the child's"),
            lambda: db.sessions.delete("s"),
            lambda: db.messages.append("s", kvpersist.Message("user", "the child's")),
        )
        answers = [asyncio.run(told(call())) for call in calls]  # the parent's loop is not there any more
        await db.close()
        os.write(theirs, json.dumps(answers).encode())
        os._exit(0)
    os.waitpid(pid, 0)
    await db.store.put("parent", "goes on")
    await db.close()
    print(os.read(ours, 65536).decode())
asyncio.run(main(sys.argv[1]))
"""


async def test_a_forked_process_is_refused_and_does_no_harm(path: Path) -> None:
    if not hasattr(os, "fork"):
        pytest.skip("this system does not fork")

    answers = json.loads(_python(_FORKED, str(path)))

    assert len(answers) == 5
    for name, text, outcome, retryable in answers:
        assert (name, outcome, retryable) == (ForkedStore.__name__, "none", False)
        assert "open it again in the child" in text
    assert await held(path) == KEPT
    async with open_store(path) as store:
        assert await store.get("parent") == "goes on"


def _python(program: str, *arguments: str) -> str:
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# -- files that are no store ---------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["rwc", "rw", "ro"])
@pytest.mark.parametrize(
    "content",
    [b"x", b"Dear diary,\n" * 500, b'{"users": []}', b"SQLite format 3\0" + b"\xff" * 5000, b"\0" * 8192],
    ids=["one byte", "text", "json", "only the beginning of a database", "zeros"],
)
async def test_a_file_that_is_no_database_is_refused_and_not_touched(tmp_path: Path, content: bytes, mode: str) -> None:
    (tmp_path / "diary.db").write_bytes(content)
    before = everything_in(tmp_path)

    for opened in (kvpersist.open, open_store):
        with refused(FormatMismatch, "diary.db", "expected a kvpersist store", "nothing was written: name another"):
            await opened(f"sqlite:///{tmp_path}/diary.db?kv.mode={mode}")

    assert everything_in(tmp_path) == before


@pytest.mark.parametrize("mode", ["rwc", "rw", "ro"])
@pytest.mark.parametrize(
    "statements",
    [
        ("CREATE TABLE t (a)", "INSERT INTO t VALUES (1)"),
        ("CREATE TABLE kv (k, v)",),
        ("PRAGMA user_version = 1", "CREATE TABLE t (a)"),
        ("PRAGMA application_id = 252006675", "VACUUM"),
        ("PRAGMA journal_mode = WAL", "CREATE TABLE t (a)"),
    ],
    ids=["a table", "a table of our name", "a version", "only an application", "a write-ahead log"],
)
async def test_a_database_of_another_program_is_refused_and_not_touched(
    tmp_path: Path, statements: tuple[str, ...], mode: str
) -> None:
    for statement in statements:
        changed(tmp_path / "theirs.db", statement)
    before = everything_in(tmp_path)

    with refused(FormatMismatch, "theirs.db", "another program's SQLite database", "nothing was written: name another"):
        await open_store(f"sqlite:///{tmp_path}/theirs.db?kv.mode={mode}")

    assert everything_in(tmp_path) == before


async def test_a_database_that_another_program_is_using_is_refused_and_not_touched(tmp_path: Path) -> None:
    changed(tmp_path / "theirs.db", "CREATE TABLE t (a)")
    using = sqlite3.connect(tmp_path / "theirs.db", isolation_level=None)
    using.execute("PRAGMA journal_mode = WAL")
    using.execute("INSERT INTO t VALUES (1)")
    before = everything_in(tmp_path)
    assert "theirs.db-wal" in before

    with refused(FormatMismatch, "another program's SQLite database"):
        await open_store(tmp_path / "theirs.db")

    assert everything_in(tmp_path) == before
    assert using.execute("SELECT a FROM t").fetchall() == [(1,)]
    using.close()


# -- stores that are damaged or newer ------------------------------------------------------------


@pytest.mark.parametrize("codec", ["msgpack", "json"])
@pytest.mark.parametrize(
    "damaged",
    [
        lambda value, other: value[:-1] + bytes([value[-1] ^ 1]),
        lambda value, other: bytes([value[0] ^ 0x80]) + value[1:],
        lambda value, other: value[: len(value) // 2],
        lambda value, other: value + b"\0",
        lambda value, other: other,
    ],
    ids=["last bit", "first bit", "cut", "grown", "another's"],
)
async def test_a_corrupt_record_is_named_and_a_list_goes_on_past_it(
    tmp_path: Path, codec: str, damaged: Callable[[bytes, bytes], bytes]
) -> None:
    path = tmp_path / "agent.db"
    async with open_store(path, codec=codec) as store:
        await users_of(store).put_many([User(id=id_, team="red") for id_ in _IDS])
        await store.put_many({f"plain:{n}": n for n in range(3)})
    values = {row[0]: row[1] for row in rows(path)}
    for key, other in (("kv:user:u2", "kv:user:u3"), ("plain:1", "plain:2")):
        changed(path, "UPDATE kv SET v = ? WHERE k = ?", damaged(values[key], values[other]), key)

    async with open_store(path) as store:
        users = users_of(store)
        for call in (users.get("u2"), users.get_many(["u1", "u2"]), users.find(team="red"), users.page(team="red")):
            with refused(CorruptRecord, "'kv:user:u2'", "restore it from a backup, or delete it") as caught:
                await call
            assert caught.value.key == "kv:user:u2"
        with refused(CorruptRecord, "'plain:1'", "restore it from a backup, or delete it"):
            await store.get("plain:1")

        passed: list[CorruptRecord] = []
        others = ["u1", "u3", "u4", "u5"]
        assert [user.id for user in await users.find(team="red", on_corrupt=passed.append)] == others
        assert [user.id async for user in users.iterate(on_corrupt=passed.append)] == others
        assert [each async for each in store.scan("plain:", on_corrupt=passed.append)] == [
            ("plain:0", 0),
            ("plain:2", 2),
        ]
        assert [error.key for error in passed] == ["kv:user:u2", "kv:user:u2", "plain:1"]

        assert await users.delete("u2") and await store.delete("plain:1")
        assert [user.id for user in await users.find(team="red")] == others
        await users.put(User(id="u2", team="red"))
    async with open_store(path) as store:
        assert [user.id for user in await users_of(store).find(team="red")] == _IDS
        assert await users_of(store).verify() == []


async def test_a_corrupt_message_is_named_and_the_session_goes_on_past_it(path: Path) -> None:
    [(key, value)] = [(row[0], row[1]) for row in rows(path) if b"hello" in row[1]]
    changed(path, "UPDATE kv SET v = ? WHERE k = ?", value.replace(b"hello", b"jello"), key)

    async with kvpersist.open(path) as db:
        with refused(CorruptRecord, repr(key), "restore it from a backup"):
            await db.messages.range("s")
        passed: list[CorruptRecord] = []
        assert [message.content for message in await db.messages.range("s", on_corrupt=passed.append)] == ["again"]
        assert [error.key for error in passed] == [key]
        assert (await db.messages.append("s", Message("user", "more"))).number == 3


@pytest.mark.parametrize("mode", ["rwc", "rw", "ro"])
@pytest.mark.parametrize("newer", [{"format": 2, "keys": 1}, {"format": 1, "keys": 2}], ids=["format", "keys"])
async def test_a_newer_store_format_is_refused_before_any_write(path: Path, newer: dict[str, int], mode: str) -> None:
    async with open_store(path) as store:
        present = await store.get("kvpersist:format")
        await store.put("kvpersist:format", {**present, **newer, "unknown": "kept"}, raw=True)
    before = rows(path)

    for opened in (kvpersist.open, open_store):
        with refused(FormatMismatch, "agent.db", "upgrade kvpersist", "nothing was written"):
            await opened(f"sqlite:///{path}?kv.mode={mode}")

    assert rows(path) == before


@pytest.mark.parametrize("mode", ["rwc", "rw", "ro"])
async def test_a_newer_sqlite_format_is_refused_and_the_file_not_touched(path: Path, mode: str) -> None:
    changed(path, "PRAGMA user_version = 2")
    before = everything_in(path.parent)

    with refused(FormatMismatch, "agent.db", "the newer format 2", "use the kvpersist that wrote this one"):
        await open_store(f"sqlite:///{path}?kv.mode={mode}")

    assert everything_in(path.parent) == before
    changed(path, "PRAGMA user_version = 1")
    assert await held(path) == KEPT


# -- places that cannot be written ---------------------------------------------------------------


@pytest.mark.parametrize("there", ["nothing", "an empty file"])
async def test_reading_only_never_makes_a_store(tmp_path: Path, there: str) -> None:
    if there == "an empty file":
        (tmp_path / "new.db").touch()
    before = everything_in(tmp_path)

    for name in ("new.db", "folder/new.db"):
        for opened in (kvpersist.open, open_store):
            with refused(FormatMismatch, "new.db", "expected a kvpersist store", "name another place"):
                await opened(f"sqlite:///{tmp_path}/{name}?kv.mode=ro")

    assert everything_in(tmp_path) == before


async def test_a_store_opened_for_reading_answers_and_refuses_every_write(path: Path) -> None:
    before = path.read_bytes()
    async with kvpersist.open(f"sqlite:///{path}?kv.mode=ro") as db:
        users = users_of(db.store)
        for call in (
            db.store.put("note", 1),
            db.store.delete("note"),
            db.store.put_many({"note": 1}),
            db.store.clear("note"),
            users.put(User(id="u1", team="blue")),
            users.delete("u1"),
            users.update("u1", lambda user: user),
            db.sessions.create(),
            db.sessions.delete("s"),
            db.messages.append("s", Message("user", "late")),
        ):
            with refused(ReadOnly, "agent.db", "mode=ro"):
                await call
        assert [user.id for user in await users.find(team="red")] == _IDS

    assert path.read_bytes() == before
    assert await held(path, mode="ro") == KEPT
    assert await held(path) == KEPT


_UNPRIVILEGED = """
import asyncio, json, os, sys
import kvpersist
from kvpersist.errors import KvError
NOBODY = 65534
async def main(path, mode):
    async with kvpersist.open("sqlite:///:memory:"):  # whoever gives up root may not reach its modules later
        pass
    if os.getuid() == 0:
        try:
            os.setgroups([]), os.setgid(NOBODY), os.setuid(NOBODY)
        except PermissionError:
            return "root cannot become another user here"
    if not os.access(os.path.dirname(path), os.X_OK):
        return "another user cannot enter the folder of the test"
    if os.access(os.path.dirname(path), os.W_OK) and os.access(path, os.W_OK):
        return "permissions do not hold here"
    try:
        async with kvpersist.open(f"sqlite:///{path}?kv.mode={mode}") as db:
            await db.store.put("note", 1)
    except KvError as error:
        return [type(error).__name__, str(error), error.outcome, error.retryable]
    return ["opened"]
print(json.dumps(asyncio.run(main(*sys.argv[1:]))))
"""


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that other users can enter; those of pytest are for their owner alone."""
    folder = Path(tempfile.mkdtemp(prefix="kvpersist-bad-input-"))
    folder.chmod(0o755)
    yield folder
    folder.chmod(0o700)
    shutil.rmtree(folder)


@pytest.mark.parametrize(
    ("folder_mode", "file_mode", "mode", "says"),
    [
        (0o555, 0o666, "rwc", "cannot be written: change its permissions, or open the store with mode=ro"),
        (0o555, 0o666, "rw", "cannot be written: change its permissions, or open the store with mode=ro"),
        (0o555, 0o666, "ro", "copy the store"),
        (0o777, 0o444, "rwc", "cannot be written: change its permissions, or open the store with mode=ro"),
        (0o777, 0o444, "rw", "cannot be written: change its permissions, or open the store with mode=ro"),
        (0o777, 0o444, "ro", "mode=ro"),
        (0o555, None, "rwc", "Permission denied"),
    ],
    ids=["folder", "folder, rw", "folder, ro", "file", "file, rw", "file, ro", "folder without a file"],
)
async def test_a_place_without_permission_to_write_is_named(
    open_folder: Path, folder_mode: int, file_mode: int | None, mode: str, says: str
) -> None:
    path = open_folder / "agent.db"
    if file_mode is not None:
        await fill(path)
        path.chmod(file_mode)
        for lock in open_folder.glob("agent.db-lock"):  # which old SQLite libraries need
            lock.chmod(0o666)
    before = everything_in(open_folder)
    open_folder.chmod(folder_mode)

    told = json.loads(_python(_UNPRIVILEGED, str(path), mode))

    if isinstance(told, str):
        pytest.skip(told)
    assert told[0] == "ReadOnly", told
    assert str(open_folder) in told[1] and says in told[1]
    assert told[2:] == ["none", False]
    open_folder.chmod(0o777)
    after = everything_in(open_folder)
    assert {name: after[name] for name in before} == before
    if file_mode is None:
        assert after == {}
    else:
        path.chmod(0o666)
        assert await held(path) == KEPT
