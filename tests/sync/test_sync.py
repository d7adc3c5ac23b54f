"""The blocking names: what they give, from where they may be called, and that none is missing."""

from __future__ import annotations

import ast
import asyncio
import inspect
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import kvpersist
from kvpersist import Conflict, Message
from kvpersist.errors import BadRequest, ForkedStore, ParentGone, StoreClosed, UnknownScheme
from tests.sync.make_types import TARGET, Types

pytestmark = pytest.mark.filterwarnings("error")


@pytest.fixture(params=["memory://", "sqlite"])
def db(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Any]:
    where = f"sqlite:///{tmp_path}/agent.db" if request.param == "sqlite" else request.param
    with kvpersist.open_sync(where) as db:
        yield db
    assert "kvpersist-sync" not in [each.name for each in threading.enumerate()]


def test_a_conversation_is_kept_and_read_without_a_loop(db: Any) -> None:
    session = db.sessions.create(user_id="ada")

    db.messages.append_many(
        session.id, [Message(role="user", content="tea?"), Message(role="assistant", content="yes")]
    )

    assert [each.content for each in db.messages.last(session.id, 5)] == ["tea?", "yes"]
    assert [each.content for each in db.messages.iterate(session.id)] == ["tea?", "yes"]
    assert [each.id for each in db.sessions.iterate(user_id="ada")] == [session.id]
    assert db.stats().messages == 2


def test_blocks_and_what_they_give_block_too(db: Any) -> None:
    session = db.sessions.create()
    db.messages.append(session.id, Message(role="user", content="add"))

    with db.tool_calls.record(session.id, "add", {"a": 1}) as call:
        call.result = 2
    with db.store.atomic() as tx:
        tx.put("app:a", 1)
        assert tx.get("app:a") == 1
    with db.store.lock("job") as lease:
        lease.put("app:b", 2)

    assert [each.result for each in db.tool_calls.of(session.id)] == [2]
    assert list(db.store.scan("app:")) == [("app:a", 1), ("app:b", 2)]
    assert not dict(db.store.scan("nothing:"))


def test_a_failed_block_writes_nothing(db: Any) -> None:
    with pytest.raises(ZeroDivisionError), db.store.atomic() as tx:
        tx.put("app:a", 1 // 0)

    assert not db.store.has("app:a")


def test_the_function_of_a_transaction_may_make_calls(db: Any) -> None:
    db.store.put("app:n", 1)

    def add(tx: Any) -> int:
        found = tx.get("app:n") + db.store.get("app:n")
        tx.put("app:n", found)
        return found

    assert db.transact(add) == 2
    assert db.store.get("app:n") == 2


def test_a_handler_of_events_may_make_calls(db: Any) -> None:
    done = threading.Event()

    def handle(entry: Any) -> None:
        db.store.put("app:seen", entry.event)
        done.set()

    stop = db.events.on("jobs", handle, after="start")
    db.events.publish("jobs", {"n": 1})

    assert done.wait(30)
    assert db.store.get("app:seen") == {"n": 1}
    assert stop() is None


def test_events_are_read_in_a_for_loop_and_it_can_be_left(db: Any) -> None:
    db.events.publish_many("jobs", [1, 2, 3])

    met = []
    for entry in db.events.subscribe("jobs", after="start"):
        met.append(entry.event)
        if len(met) == 3:
            break

    assert met == [1, 2, 3]


def test_a_repository_of_ones_own_blocks_and_takes_part_in_transactions(db: Any) -> None:
    notes = db.repository(dict, name="note", indexes=[kvpersist.Index("topic", type=str)])

    with db.atomic() as tx:
        notes.put({"id": "1", "topic": "tea"}, tx=tx)
        notes.put({"id": "2", "topic": "tea"}, tx=tx)

    assert [each["id"] for each in notes.find(topic="tea")] == ["1", "2"]


def test_errors_are_those_of_the_asynchronous_calls(db: Any) -> None:
    version = db.store.put("app:a", 1)
    db.store.put("app:a", 2)

    with pytest.raises(Conflict):
        db.store.put("app:a", 3, expect=version)
    with pytest.raises(ParentGone):
        db.messages.append("nobody", Message(role="user", content="hello"))
    with pytest.raises(AttributeError, match="_commit"):
        _ = db.store._commit


def test_a_call_from_the_thread_of_the_loop_is_refused_instead_of_waiting_for_itself(db: Any) -> None:
    session = db.sessions.create()

    with pytest.raises(BadRequest, match="wait for itself"):
        db.sessions.update(session.id, lambda _: db.sessions.get(session.id))

    assert db.sessions.get(session.id) == session


def test_closing_from_the_thread_of_the_loop_is_refused_and_closes_nothing(db: Any) -> None:
    db.sessions.create(id="a")

    def closes(session: Any) -> Any:
        db.close()
        return session

    with pytest.raises(BadRequest, match="wait for itself"):
        db.sessions.update("a", closes)

    assert db.sessions.get("a") is not None


def test_threads_that_append_at_once_lose_nothing(db: Any) -> None:
    session = db.sessions.create()

    def append() -> None:
        for n in range(25):
            db.messages.append(session.id, Message(role="user", content=n))

    threads = [threading.Thread(target=append) for _ in range(8)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()

    assert [each.number for each in db.messages.iterate(session.id)] == list(range(1, 201))


async def test_it_works_beside_a_running_loop_as_in_a_notebook() -> None:
    with kvpersist.open_sync("memory://") as db:
        session = db.sessions.create()
        db.messages.append(session.id, Message(role="user", content="hello"))
        answers = await asyncio.gather(*[asyncio.to_thread(db.messages.count, session.id) for _ in range(5)])

    assert answers == [1] * 5


def test_two_that_are_open_share_one_thread_which_ends_with_the_last() -> None:
    with kvpersist.open_sync("memory://") as one:
        with kvpersist.open_store_sync("memory://") as two:
            two.put("app:a", 1)
            assert [each.name for each in threading.enumerate()].count("kvpersist-sync") == 1
        one.store.put("app:a", 2)
        with pytest.raises(StoreClosed):
            two.get("app:a")

    with pytest.raises(StoreClosed):
        one.store.get("app:a")
    one.close()
    assert "kvpersist-sync" not in [each.name for each in threading.enumerate()]


def test_what_cannot_be_opened_leaves_no_thread() -> None:
    with pytest.raises(UnknownScheme):
        kvpersist.open_sync("nowhere://")

    assert "kvpersist-sync" not in [each.name for each in threading.enumerate()]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_child_of_a_fork_is_refused_and_can_open_its_own(tmp_path: Path) -> None:
    path = tmp_path / "agent.db"
    with kvpersist.open_sync(path) as db:
        db.store.put("app:a", 1)
        child = os.fork()
        if child == 0:
            code = 1
            try:
                try:
                    db.store.get("app:a")
                except ForkedStore:
                    with kvpersist.open_sync(path) as own:
                        code = 0 if own.store.get("app:a") == 1 else 2
            finally:
                os._exit(code)

        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert db.store.get("app:a") == 1


def test_an_interrupt_ends_a_call_that_waits(tmp_path: Path) -> None:
    code = """
import kvpersist, sys
with kvpersist.open_sync(sys.argv[1]) as db:
    try:
        print("waits", flush=True)
        for _ in db.events.subscribe("jobs"):
            pass
    except KeyboardInterrupt:
        print(db.store.put("app:a", 1) != b"", flush=True)
"""
    process = subprocess.Popen(
        [sys.executable, "-W", "error", "-c", code, str(tmp_path / "a.db")],
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "waits\n"
    process.send_signal(signal.SIGINT)

    rest, _ = process.communicate(timeout=60)

    assert (rest, process.returncode) == ("True\n", 0)


def test_a_program_that_does_not_close_ends_all_the_same(tmp_path: Path) -> None:
    code = "import kvpersist, sys; db = kvpersist.open_sync(sys.argv[1]); db.store.put('app:a', 1)"

    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "a.db")], timeout=60, check=False)

    assert done.returncode == 0


def test_the_types_are_those_that_are_made_from_the_asynchronous_names() -> None:
    assert TARGET.read_text("utf-8") == Types().text(), "run: python tests/sync/make_types.py"


def test_the_blocking_surface_is_the_asynchronous_one() -> None:
    made = Types()
    stub = ast.parse(made.text())
    classes = {node.name: node for node in stub.body if isinstance(node, ast.ClassDef)}

    assert {"Persistence", "Store", "Sessions", "Messages", "ToolCalls", "Repository", "EventQueue"} <= set(classes)
    for name, type_ in made.classes.items():
        has = {each.name: each for each in classes[name].body if isinstance(each, ast.FunctionDef)}
        for member, function in inspect.getmembers(type_, inspect.isfunction):
            if member.startswith("_"):
                continue
            twin = has["close" if member == "aclose" else member]
            of_twin = [*twin.args.args, *twin.args.kwonlyargs, twin.args.vararg, twin.args.kwarg]
            wanted = list(inspect.signature(inspect.unwrap(function)).parameters)
            assert [each.arg for each in of_twin if each is not None] == wanted, f"{name}.{member}"
    text = made.text()
    assert "Awaitable" not in text and "Async" not in text and "Coroutine" not in text


def test_a_type_checker_knows_what_blocking_calls_give(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        "import kvpersist\n"
        "with kvpersist.open_sync('memory://') as db:\n"
        "    reveal_type(db.sessions.create(user_id='ada'))\n"
        "    reveal_type([each for each in db.messages.iterate('a')])\n"
        "    with db.store.atomic() as tx:\n"
        "        reveal_type(tx.get('app:a'))\n"
        "    db.sessions.nothing()\n"
    )
    # by default it passes over what lies below a folder with a dot, as temporary files may
    (tmp_path / "pyrightconfig.json").write_text('{"include": ["program.py"], "exclude": ["nothing"]}')
    root = Path(kvpersist.__file__).parent.parent

    done = subprocess.run(
        [sys.executable, "-m", "basedpyright", "--pythonpath", sys.executable, "--project", str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(root)},
        timeout=110,
        check=False,
    )

    assert 'is "Session"' in done.stdout
    assert 'is "list[Message]"' in done.stdout
    assert 'Cannot access attribute "nothing"' in done.stdout


def test_a_call_that_is_under_way_when_another_thread_closes_ends() -> None:
    begun, outcome = threading.Event(), list[Any]()

    async def agent(message: str) -> str:
        begun.set()
        await asyncio.Event().wait()
        return message

    db = kvpersist.open_sync("memory://")
    db.sessions.create(id="a")

    def send() -> None:
        try:
            outcome.append(db.threads.send("a", "hello", agent=agent))
        except StoreClosed as error:
            outcome.append(error)

    thread = threading.Thread(target=send, daemon=True)
    thread.start()
    assert begun.wait(10)
    db.close()
    thread.join(10)

    [closed] = outcome
    assert isinstance(closed, StoreClosed) and "open it again" in str(closed)


def test_an_iteration_that_is_left_after_closing_ends_in_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", told.append)
    with kvpersist.open_sync("memory://") as db:
        db.sessions.create(id="a")
        db.messages.append("a", Message(role="user", content="hello"))
        messages = iter(db.messages.iterate("a"))
        next(messages)
    del messages

    assert not told


def test_an_agent_with_storage_is_told_of_the_blocking_way() -> None:
    with kvpersist.open_sync("memory://") as db, pytest.raises(BadRequest, match=r"threads\.send"):
        kvpersist.with_storage(lambda message: message, db)
