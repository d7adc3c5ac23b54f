"""The command line as people and scripts meet it: output, exit codes, pipes, terminals."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("cyclopts")

from kvpersist import errors, open_store
from kvpersist.cli.app import exit_code, run

TALK = [
    {"role": "user", "content": "Where is my parcel?"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"id": "1", "type": "function", "function": {"name": "track", "arguments": '{"id": 7}'}}],
    },
    {"role": "tool", "tool_call_id": "1", "content": "Error: no such parcel"},
    {"role": "assistant", "content": "I cannot find it."},
]
READING = (
    ("sessions",),
    ("timeline", "ID"),
    ("search", "parcel"),
    ("stats",),
    ("ls",),
    ("get", "app:value"),
    ("drivers",),
    ("config",),
    ("config", "--origins"),
    ("export", "ID"),
)


class Result:
    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    @property
    def json(self) -> Any:
        return json.loads(self.out)


class Command:
    """Runs command lines against one store, in this process."""

    def __init__(self, url: str, capsys: pytest.CaptureFixture[str]) -> None:
        self.url, self._capsys = url, capsys

    def __call__(self, *argv: str) -> Result:
        code = run([*argv, "--url", self.url])
        out, err = self._capsys.readouterr()
        assert "Traceback" not in err
        return Result(code, out, err)


@pytest.fixture
def url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.delenv("KVPERSIST_URL", raising=False)
    for name in ("NO_COLOR", "FORCE_COLOR", "KVPERSIST_TRACEBACK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.chdir(tmp_path)
    return f"sqlite:///{tmp_path}/test.db"


@pytest.fixture
def kv(url: str, capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(url, capsys)


@pytest.fixture
def empty(kv: Command) -> Command:
    """A store that is there, and has nothing in it."""
    kv("put", "app:a", "x", "--ttl", "0")
    return kv


@pytest.fixture
def talk(kv: Command, tmp_path: Path) -> str:
    """A session, and a plain key; returns the session's id."""
    path = tmp_path / "talk.json"
    path.write_text(json.dumps(TALK))
    kv("put", "app:value", '{"a": [1]}', "--as", "json")
    return kv("import", str(path), "--user", "ada", "--json").json[0]["first"]


def shell(*argv: str, url: str | None = None, stdin: bytes = b"", **env: str) -> subprocess.CompletedProcess[bytes]:
    given = {**os.environ, **env}
    if url is not None:
        given["KVPERSIST_URL"] = url
    command = [sys.executable, "-m", "kvpersist", *argv]
    return subprocess.run(command, input=stdin, capture_output=True, env=given, timeout=60, check=False)


def terminal(argv: Sequence[str], typed: bytes = b"", **env: str) -> tuple[int, str]:
    """Run in a terminal of 100 columns; exit code and everything that was shown."""
    given = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "100", "LINES": "50", "TZ": "UTC", **env}
    end, its_end = os.openpty()
    command = [sys.executable, "-m", "kvpersist", *argv]
    with subprocess.Popen(command, stdin=its_end, stdout=its_end, stderr=its_end, env=given) as child:
        os.close(its_end)
        os.write(end, typed)
        shown = b""
        while True:
            try:
                part = os.read(end, 65536)
            except OSError:  # the other end is closed
                break
            if not part:
                break
            shown += part
        os.close(end)
    return child.returncode, shown.decode().replace("\r\n", "\n")


def uncoloured(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


# ---- the demo


def test_the_demo_shows_a_conversation_and_what_to_try_next(kv: Command) -> None:
    result = kv("demo")

    assert result.code == 0
    assert "Late parcel" in result.out
    assert "find_order(order_id=" in result.out
    assert "Error: Northpost did not answer" in result.out
    assert result.err.count("  kvpersist ") == 3


def test_the_demo_twice_is_one_session(kv: Command) -> None:
    first, second = kv("demo"), kv("demo")

    assert (first.out, first.code) == (second.out, second.code)
    assert len(kv("sessions", "--json").json) == 1


def test_what_the_demo_says_to_try_works(kv: Command) -> None:
    for line in kv("demo").err.splitlines()[1:]:
        done = subprocess.run(
            ["bash", "-c", f'kvpersist() {{ {sys.executable} -m kvpersist "$@"; }}; {line}'],
            capture_output=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, (line, done.stderr)


# ---- conversations


def test_import_tells_in_words_on_stderr_and_in_json_on_stdout(kv: Command, tmp_path: Path) -> None:
    path = tmp_path / "talk.json"
    path.write_text(json.dumps(TALK))

    first, again = kv("import", str(path)), kv("import", str(path), "--json")

    assert (first.code, first.out) == (0, "")
    assert "1 session with 4 messages imported" in first.err
    assert again.json[0] | {"first": ""} == {
        "source": str(path),
        "sessions": 0,
        "messages": 0,
        "completed": 0,
        "present": 1,
        "skipped": [],
        "first": "",
    }


def test_import_stops_at_a_malformed_record_and_skips_it_when_told_to(kv: Command, tmp_path: Path) -> None:
    path = tmp_path / "some.jsonl"
    path.write_text('{"messages": []}\n{"messages": [{"role": "robot"}]}\n{"messages": [], "n": 1}\n')

    stopped = kv("import", str(path))
    skipped = kv("import", str(path), "--on-error", "skip")

    assert stopped.code == 1
    assert "KV420" in stopped.err
    assert "record 2, field messages[0].role" in stopped.err
    assert "--on-error skip" in stopped.err
    assert skipped.code == 0
    assert "1 skipped" in skipped.err


def test_import_reads_stdin_and_export_writes_what_it_reads(kv: Command, talk: str, url: str) -> None:
    exported = shell("export", talk, url=url)
    imported = shell("import", "-", "--user", "bob", "--json", url=url, stdin=exported.stdout)

    assert exported.returncode == imported.returncode == 0
    [report] = json.loads(imported.stdout)
    assert (report["sessions"], report["messages"]) == (1, 4)
    assert [session["user_id"] for session in kv("sessions", "--user", "bob", "--json").json] == ["bob"]


def test_import_of_several_files_names_each(kv: Command, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.json").write_text(json.dumps({"messages": TALK, "name": name}))

    result = kv("import", "a.json", "b.json", "--jsonl")

    assert [json.loads(line)["source"] for line in result.out.splitlines()] == ["a.json", "b.json"]


def test_new_copies(kv: Command, talk: str, tmp_path: Path) -> None:
    kv("import", str(tmp_path / "talk.json"), "--user", "ada", "--new")

    assert len(kv("sessions", "--json").json) == 2
    assert talk in {session["id"] for session in kv("sessions", "--json").json}


def test_sessions_are_listed_with_their_counts(kv: Command, talk: str) -> None:
    [line] = kv("sessions").out.splitlines()[1:]
    [value] = kv("sessions", "--json").json

    assert line.split()[0] == talk
    assert "Where is my parcel?" in line
    assert (value["messages"], value["tool_calls"], value["failed"], value["user_id"]) == (4, 1, 1, "ada")


def test_sessions_come_newest_first_up_to_the_limit(kv: Command, tmp_path: Path) -> None:
    for day in range(1, 6):
        export = {
            "format": "kvpersist.session",
            "version": 1,
            "session": {"title": f"day {day}", "created_at": f"2026-01-0{day}T00:00:00Z"},
            "messages": [],
        }
        (tmp_path / f"{day}.json").write_text(json.dumps(export))
        kv("import", f"{day}.json")

    def titles(*more: str) -> list[str]:
        return [session["title"] for session in kv("sessions", "--json", *more).json]

    assert titles("--limit", "2") == ["day 5", "day 4"]
    assert titles("--all") == [f"day {day}" for day in (5, 4, 3, 2, 1)]
    assert titles("--limit", "0") == []


def test_a_timeline_shows_each_call_with_its_result(kv: Command, talk: str) -> None:
    result = kv("timeline", talk)
    value = kv("timeline", talk, "--json").json
    by_line = [json.loads(line) for line in kv("timeline", talk, "--jsonl").out.splitlines()]

    lines = result.out.splitlines()
    call = next(n for n, line in enumerate(lines) if "track(id=7)" in line)
    assert "! Error: no such parcel" in lines[call + 1]
    assert value["session"]["id"] == talk
    assert value["items"] == by_line
    assert [item["message"]["role"] for item in by_line] == ["user", "assistant", "tool", "assistant"]
    assert by_line[1]["tool_calls"][0]["result"] == "Error: no such parcel"


def test_search_finds_in_any_case_and_says_when_it_finds_nothing(kv: Command, talk: str) -> None:
    found, nothing = kv("search", "PARCEL"), kv("search", "elephant")

    assert talk in found.out
    assert (nothing.code, nothing.out) == (0, "")
    assert "elephant" in nothing.err
    assert sorted(hit["number"] for hit in kv("search", "parcel", "--json").json) == [1, 3]
    assert kv("search", "parcel", "--user", "bob", "--json").json == []


def test_stats_count_everything(kv: Command, talk: str) -> None:
    value = kv("stats", "--json").json

    assert (value["sessions"], value["messages"], value["tool_calls"], value["tool_errors"]) == (1, 4, 1, 1)
    assert re.search(r"^messages +4$", kv("stats").out, re.MULTILINE)
    del talk


def test_export_in_each_form(kv: Command, talk: str, url: str) -> None:
    forms = {form: shell("export", talk, "--format", form, url=url).stdout for form in ("kvpersist", "openai", "jsonl")}

    assert json.loads(forms["kvpersist"])["format"] == "kvpersist.session"
    assert json.loads(forms["openai"])["messages"] == TALK
    assert [json.loads(line) for line in forms["jsonl"].splitlines()] == TALK
    assert shell("export", talk, "--jsonl", url=url).stdout == forms["jsonl"]
    del kv


@pytest.mark.parametrize("command", READING, ids=" ".join)
@pytest.mark.parametrize("form", ["--json", "--jsonl"])
def test_every_reading_command_prints_json(url: str, talk: str, command: tuple[str, ...], form: str) -> None:
    argv = [talk if part == "ID" else part for part in command]

    done = shell(*argv, form, url=url)

    assert (done.returncode, done.stderr) == (0, b"")
    if form == "--jsonl":
        for line in done.stdout.splitlines():
            json.loads(line)
        assert done.stdout.endswith(b"\n")
    else:
        json.loads(done.stdout)


@pytest.mark.parametrize("command", [("sessions",), ("search", "x"), ("stats",), ("ls",)], ids=" ".join)
def test_an_empty_store_gives_valid_json_and_exit_code_0(empty: Command, command: tuple[str, ...]) -> None:
    result = empty(*command, "--json")

    assert result.code == 0
    assert not result.json or isinstance(result.json, dict) or result.json == ["kvpersist:format"]
    assert empty(*command).code == 0


@pytest.mark.parametrize("command", [*READING[:6], READING[-1], ("rm", "app:a")], ids=" ".join)
def test_looking_into_a_store_that_is_not_there_does_not_make_it(
    kv: Command, tmp_path: Path, command: tuple[str, ...]
) -> None:
    result = kv(*command)

    assert (result.code, result.out) == (3, "")
    assert "there is no store at" in result.err
    assert not list(tmp_path.glob("test.db*"))


def test_the_usual_store_is_empty_before_anything_was_put_into_it(url: str) -> None:
    done = shell("sessions")

    assert (done.returncode, done.stdout) == (0, b"")
    assert b"kvpersist demo" in done.stderr


def test_a_mode_that_was_asked_for_is_kept(kv: Command, url: str) -> None:
    assert shell("ls", url=f"{url}?kv.mode=rwc").returncode == 0
    assert shell("ls", url=f"{url}?kv.mode=ro").returncode == 0


def test_no_sessions_of_a_user_is_not_no_sessions(kv: Command, talk: str) -> None:
    result = kv("sessions", "--user", "eve")

    assert (result.code, result.out, result.err) == (0, "", "no sessions of user 'eve'\n")
    del talk


# ---- raw keys


KEYS = ["app:a", "app:key with space", "app:%!:/*?", "app:\u00e9\U0001f388", "app:-dash", "app:a:b", "app:" + "x" * 200]


@pytest.mark.parametrize("key", KEYS)
def test_what_was_put_is_got_back(kv: Command, key: str) -> None:
    assert kv("put", key, "value \u00e9").code == 0
    assert kv("get", key).out == "value \u00e9\n"
    assert kv("ls", "app:").out == f"{key}\n"
    assert kv("rm", key).code == 0
    assert kv("get", key).code == 3


@pytest.mark.parametrize("value", ["null", "0", "false", '""', "[]", '{"a":1.5}', "123456789012345678901234567890"])
def test_json_values_are_kept_exactly(kv: Command, value: str) -> None:
    kv("put", "app:j", value, "--as", "json")

    assert kv("get", "app:j", "--json").out == value + "\n"


def test_bytes_pass_through_pipes_unchanged(url: str) -> None:
    data = bytes(range(256))
    assert shell("put", "app:b", "--as", "bytes", url=url, stdin=data).returncode == 0

    assert shell("get", "app:b", url=url).stdout == data


def test_text_from_stdin_loses_its_last_newline_only(url: str) -> None:
    shell("put", "app:t", "-", url=url, stdin=b"two\nlines\n\n")

    assert shell("get", "app:t", "--json", url=url).stdout == b'"two\\nlines\\n"\n'


def test_put_if_absent_is_a_conflict_where_the_key_is(kv: Command) -> None:
    codes = [kv("put", "app:a", str(n), "--if-absent").code for n in range(2)]

    assert codes == [0, 5]
    assert kv("get", "app:a").out == "0\n"


def test_a_ttl_that_has_passed_removes(kv: Command) -> None:
    kv("put", "app:a", "x", "--ttl", "7d")
    assert kv("get", "app:a").code == 0
    kv("put", "app:a", "x", "--ttl", "0")
    assert kv("get", "app:a").code == 3


def test_ls_goes_as_deep_and_as_far_as_told(kv: Command) -> None:
    for key in ("app:a", "app:a:b", "app:c", "zoo:d"):
        kv("put", key, "x")

    assert kv("ls", "app:").out.split() == ["app:a", "app:a:b", "app:c"]
    assert kv("ls", "app:", "--depth", "1").out.split() == ["app:a", "app:c"]
    assert kv("ls", "app:", "--limit", "2").out.split() == ["app:a", "app:a:b"]


def test_rm_with_a_prefix_needs_yes_and_asks_nobody_in_a_pipe(kv: Command, url: str) -> None:
    for key in ("app:a", "app:b", "zoo:c"):
        kv("put", key, "x")

    refused = shell("rm", "--prefix", "app:", url=url, stdin=b"y\n")
    listed = kv("rm", "--prefix", "app:", "--dry-run")
    assert (refused.returncode, listed.out.split()) == (2, ["app:a", "app:b"])
    assert b"--yes" in refused.stderr
    assert len(kv("ls", "app:").out.split()) == 2

    removed = kv("rm", "--prefix", "app:", "--yes")
    assert (removed.code, removed.err) == (0, "removed 2 keys\n")
    assert kv("ls", "app:").out == ""
    assert kv("ls", "zoo:").out == "zoo:c\n"


def test_rm_tells_which_keys_were_not_there(kv: Command) -> None:
    kv("put", "app:a", "x")

    result = kv("rm", "app:a", "app:b")

    assert result.code == 3
    assert "app:b" in result.err
    assert kv("get", "app:a").code == 3


def test_plain_keys_do_not_reach_into_a_repository(kv: Command, talk: str) -> None:
    [key] = [key for key in kv("ls", "kv:session:").out.split() if talk in key]

    assert kv("put", key, "x").code == 2
    assert kv("rm", key).code == 2
    assert kv("rm", "--prefix", "kv:", "--yes").code == 2
    assert kv("timeline", talk).code == 0


def test_every_key_of_a_store_can_be_printed(kv: Command, talk: str, url: str) -> None:
    """Index entries and counters of repositories too: they are bytes without a frame."""
    keys = kv("ls", "--jsonl").out.splitlines()

    assert len(keys) > 10
    for line in keys:
        assert kv("get", json.loads(line), "--json").code == 0, line
    assert shell("get", "app:value", "--bytes", url=url).stdout not in (b"", b'{"a":[1]}\n')
    del talk


def test_a_large_value_goes_to_stdout_in_parts_and_its_pieces_are_not_listed(url: str) -> None:
    data = os.urandom(1_000_000)

    async def fill() -> None:
        async with open_store(url) as store, store.open_write("app:film") as out:
            await out.write(data)

    asyncio.run(fill())

    assert shell("get", "app:film", url=url).stdout == data
    assert shell("ls", "app:", url=url).stdout == b"app:film\n"
    refused = shell("get", "app:film", "--json", url=url)
    assert (refused.returncode, refused.stdout) == (1, b"") and b"open_read" in refused.stderr
    shell("rm", "--prefix", "app:", "--yes", url=url)
    with contextlib.closing(sqlite3.connect(url.removeprefix("sqlite:///"))) as file:
        assert file.execute("SELECT count(*) FROM kv WHERE k LIKE 'app:%'").fetchone() == (0,)


# ---- exit codes and errors


@pytest.mark.parametrize(
    ("argv", "code", "told"),
    [
        (("nonsense",), 2, "nonsense"),
        (("get",), 2, "KEY"),
        (("get", "a", "--frob"), 2, "--frob"),
        (("sessions", "--json", "--jsonl"), 2, "xclusive"),
        (("sessions", "--limit", "many"), 2, "many"),
        (("sessions", "--limit", "-3"), 2, "-3"),
        (("put", "kv:session:1", "x"), 2, "KV417"),
        (("import",), 2, "file"),
        (("import", "x.json", "--format", "csv"), 2, "csv"),
        (("import", "none.json"), 3, "none.json"),
        (("put", "app:a", "x", "--ttl", "soon"), 2, "soon"),
        (("put", "app:a", "{", "--as", "json"), 2, "JSON"),
        (("put", "", "x"), 2, "KV411"),
        (("put", "k" * 600, "x"), 2, "KV412"),
        (("rm",), 2, "--prefix"),
        (("rm", "a", "--prefix", "b"), 2, "--prefix"),
        (("get", "app:none"), 3, "app:none"),
        (("timeline", "nobody"), 3, "nobody"),
        (("export", "nobody"), 3, "nobody"),
        (("ls", "--url", "nope://x"), 2, "KV419"),
        (("ls", "--url", "sqlite:///x.db?kv.nope=1"), 2, "KV418"),
        (("ls", "--url", "plain words"), 2, "KV418"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, tuple) else "",
)
def test_what_fails_says_so_in_words_with_its_exit_code(
    empty: Command, url: str, capsys: pytest.CaptureFixture[str], argv: tuple[str, ...], code: int, told: str
) -> None:
    given = argv if "--url" in argv else (*argv, "--url", url)

    assert run(given) == code

    del empty
    out, err = capsys.readouterr()
    assert out == ""
    assert told in err
    assert "Traceback" not in err


def test_a_file_that_is_no_store_is_refused_unharmed(tmp_path: Path) -> None:
    path = tmp_path / "notes.db"
    path.write_bytes(b"not a database, but dear to somebody" * 100)

    done = shell("sessions", "--url", f"sqlite:///{path}")

    assert (done.returncode, b"KV501" in done.stderr, b"Traceback" in done.stderr) == (1, True, False)
    assert path.read_bytes().startswith(b"not a database, but dear")


def test_each_error_has_the_exit_code_of_its_kind() -> None:
    assert {
        error.__class__.__name__: exit_code(error)
        for error in (
            errors.Unavailable("x"),
            errors.DeadlineExceeded("get", 1.0),
            errors.Busy("x"),
            errors.Conflict("k", None),
            errors.UniqueConflict("i", "v", "h"),
            errors.SchemaChanged("c", "d"),
            errors.ParentGone("session", "x"),
            errors.BadKey("k", "r"),
            errors.MalformedRecord("s", 1, "f", "r"),
            errors.CorruptRecord("k", "r"),
            errors.CommitUnknown(("k",), "r"),
            errors.MissingExtra("redis", "redis"),
        )
    } == {
        "Unavailable": 4,
        "DeadlineExceeded": 4,
        "Busy": 4,
        "Conflict": 5,
        "UniqueConflict": 5,
        "SchemaChanged": 5,
        "ParentGone": 3,
        "BadKey": 2,
        "MalformedRecord": 1,
        "CorruptRecord": 1,
        "CommitUnknown": 1,
        "MissingExtra": 2,
    }


def test_a_backend_that_cannot_be_reached_is_told_with_the_next_step(
    url: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object, **__: object) -> Any:
        raise errors.Unavailable("redis://localhost:6379 refused the connection")

    monkeypatch.setattr("kvpersist.cli.keys.open_store", refused)

    assert run(["ls", "--url", url]) == 4
    err = capsys.readouterr().err
    assert err.startswith("KV200 redis://localhost:6379 refused the connection\n")
    assert "kvpersist config --origins" in err


def test_an_error_of_our_own_making_is_one_line_too(
    url: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvpersist.cli.keys.open_store", lambda *_: 1 / 0)

    assert run(["ls", "--url", url]) == 1
    err = capsys.readouterr().err
    assert "ZeroDivisionError" in err
    assert "Traceback" not in err

    monkeypatch.setenv("KVPERSIST_TRACEBACK", "1")
    with pytest.raises(ZeroDivisionError):
        run(["ls", "--url", url])


def test_a_password_is_shown_nowhere(capsys: pytest.CaptureFixture[str], url: str) -> None:
    secret = "redis://ada:hunter2@localhost:1/0?password=hunter2"
    for argv in (["ls"], ["sessions"], ["config", "--origins"], ["config", "--json"], ["demo"], ["import", "x"]):
        run([*argv, "--url", secret])
        out, err = capsys.readouterr()
        assert "hunter2" not in out + err, argv
    del url


INTERRUPTED = """
import os, signal, sys
from kvpersist.cli import app, chats

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job begins with it ignored
imported = chats.import_chats

async def interrupting(*args, **kwargs):
    interrupted = []

    def progress(state):
        if state.done >= 3 and not interrupted:
            interrupted.append(state.done)
            os.kill(os.getpid(), signal.SIGINT)
    return await imported(*args, **kwargs | {"progress": progress})

chats.import_chats = interrupting
sys.exit(app.run(sys.argv[1:]))
"""


def test_ctrl_c_ends_an_import_and_prints_how_to_go_on(kv: Command, url: str, tmp_path: Path) -> None:
    path = tmp_path / "many talks.jsonl"
    path.write_text("".join(json.dumps({"messages": TALK, "n": n}) + "\n" for n in range(300)))
    argv = ["import", str(path), "--url", url]

    done = subprocess.run([sys.executable, "-c", INTERRUPTED, *argv], capture_output=True, timeout=60, check=False)

    assert done.returncode == 130
    assert b"Traceback" not in done.stderr
    assert f"kvpersist import '{path}' --url {url}" in done.stderr.decode()
    assert kv("import", str(path)).code == 0
    assert kv("stats", "--json").json["messages"] == 1200


SILENT = """
import sys, types
from kvpersist.cli.app import run

def read(stdin=sys.stdin.buffer):
    print("reading", flush=True)
    return stdin.read()

sys.stdin = types.SimpleNamespace(buffer=types.SimpleNamespace(read=read), isatty=lambda: False)
sys.exit(run())
"""


@pytest.mark.parametrize("argv", [["put", "a", "-"], ["import", "-"]], ids=" ".join)
def test_ctrl_c_while_stdin_is_silent_ends_the_command(url: str, argv: list[str]) -> None:
    pipe = subprocess.PIPE
    env = {**os.environ, "KVPERSIST_URL": url}
    with subprocess.Popen(
        [sys.executable, "-c", SILENT, *argv], stdin=pipe, stdout=pipe, stderr=pipe, env=env
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"reading\n"
        child.send_signal(signal.SIGINT)
        assert child.wait(timeout=30) == 130


def test_a_reader_that_goes_away_is_no_error(kv: Command, url: str, tmp_path: Path) -> None:
    (tmp_path / "many.json").write_text(json.dumps([{"messages": TALK, "n": n} for n in range(200)]))
    kv("import", "many.json")
    assert len(kv("ls").out) > 1 << 17  # more than a pipe holds
    script = f"set -o pipefail; {sys.executable} -m kvpersist ls | head -n 1"

    done = subprocess.run(
        ["bash", "-c", script], capture_output=True, timeout=60, check=False, env={**os.environ, "KVPERSIST_URL": url}
    )

    assert done.stdout.startswith(b"kv:")
    assert (done.returncode, done.stderr) == (0, b"")


def test_the_url_may_stand_before_the_command_and_behind_it(kv: Command, url: str) -> None:
    kv("put", "app:-x", "v")

    for argv in (["--url", url, "get", "app:-x"], [f"--url={url}", "get", "app:-x"], ["get", "--url", url, "app:-x"]):
        assert shell(*argv).stdout == b"v\n", argv
    assert shell("--url", url, "--", "x").returncode == 2
    assert shell("--url", url, "--help").returncode == 0
    assert shell("--url", url).returncode == 0


@pytest.mark.parametrize(
    "command",
    [
        "demo",
        "import",
        "sessions",
        "timeline",
        "search",
        "stats",
        "export",
        "ls",
        "get",
        "put",
        "rm",
        "init",
        "ddl",
        "reset",
        "conformance",
        "drivers",
        "config",
    ],
)
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([command, "--help"]) == 0
    assert f"Usage: kvpersist {command}" in capsys.readouterr().out


def test_help_names_arguments_and_no_default_of_a_flag(capsys: pytest.CaptureFixture[str]) -> None:
    run(["import", "--help"])
    shown = capsys.readouterr().out

    assert shown.startswith("Usage: kvpersist import [OPTIONS] FILE...\n")
    assert "[default: auto]" in shown
    assert "False" not in shown
    assert "None" not in shown


def test_the_help_of_a_command_says_more_than_its_line_in_the_list(capsys: pytest.CaptureFixture[str]) -> None:
    run(["health", "--help"])
    own = " ".join(capsys.readouterr().out.split())

    listed = " ".join(shell("--help").stdout.decode().split())

    assert "Exit code 4: one does not; 1: one cannot be written." in own
    assert "Exit code" not in listed


def test_a_reader_that_goes_away_from_help_is_no_error(url: str) -> None:
    script = f"set -o pipefail; {sys.executable} -m kvpersist --help | true"

    assert subprocess.run(["bash", "-c", script], capture_output=True, timeout=60, check=False).returncode == 0


def test_help_and_version_need_no_store() -> None:
    import kvpersist

    assert shell("--version").stdout.decode().strip() == kvpersist.__version__
    shown = shell("--help", KVPERSIST_URL="nope://").stdout.decode()
    assert all(command in shown for command in ("demo", "timeline", "config"))


# ---- terminals


def test_a_pipe_gets_no_colours_and_a_terminal_does(url: str, talk: str) -> None:
    piped = shell("timeline", talk, url=url)
    code, shown = terminal(["timeline", talk, "--url", url])

    assert b"\x1b" not in piped.stdout + piped.stderr
    assert code == 0
    assert "\x1b[31m" in shown  # the error, in red
    assert "✗ Error: no such parcel" in uncoloured(shown)


def test_no_color_is_heeded_on_a_terminal(url: str, talk: str) -> None:
    _, shown = terminal(["timeline", talk, "--url", url], NO_COLOR="1")

    assert not re.search(r"\x1b\[[0-9;]*3[0-9]m", shown)
    assert "✗ Error: no such parcel" in uncoloured(shown)


def test_a_terminal_gets_a_table_and_whole_ids(url: str, talk: str) -> None:
    _, shown = terminal(["sessions", "--url", url])

    assert "───" in shown
    assert talk in uncoloured(shown)


def test_a_terminal_is_asked_before_a_prefix_is_removed(kv: Command, url: str) -> None:
    kv("put", "app:a", "x")

    no, asked = terminal(["rm", "--prefix", "app:", "--url", url], typed=b"n\n")
    yes, _ = terminal(["rm", "--prefix", "app:", "--url", url], typed=b"y\n")

    assert (no, yes) == (2, 0)
    assert "remove 1 key with the prefix 'app:'? [y/N]" in asked
    assert kv("ls", "app:").out == ""


def test_a_terminal_is_told_that_a_value_is_awaited(url: str) -> None:
    code, shown = terminal(["put", "app:a", "--url", url], typed=b"hello\n\x04")

    assert code == 0
    assert "Ctrl-D" in shown
    assert shell("get", "app:a", url=url).stdout == b"hello\n"


def test_a_conversation_of_several_days_shows_where_one_begins(kv: Command, tmp_path: Path) -> None:
    days = [{"role": "user", "content": "hi", "created_at": f"2026-01-0{day}T12:00:00Z"} for day in (1, 1, 3)]
    export = {"format": "kvpersist.session", "version": 1, "session": {}, "messages": days}
    (tmp_path / "days.json").write_text(json.dumps(export))
    first = kv("import", "days.json", "--json").json[0]["first"]

    lines = shell("timeline", first, url=kv.url, TZ="UTC").stdout.decode().splitlines()
    _, shown = terminal(["timeline", first, "--url", kv.url])

    assert [len(line.split()) for line in lines[3:]] == [3, 3, 1, 3]
    assert lines[5] == "01-03"
    assert uncoloured(shown).count("01-03") == 1
    assert "2026-01-01 UTC, 2 d 0 h" in uncoloured(shown)


def test_a_demo_that_nothing_keeps_suggests_nothing(kv: Command, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["demo", "--url", "memory://"]) == 0
    assert capsys.readouterr().err == ""


def test_stored_text_cannot_steer_the_terminal(kv: Command, url: str, tmp_path: Path) -> None:
    evil = "\x1b]0;title\x07\x1b[2J\x9b31m\u202egnp.exe"
    talk = [
        {"role": "user", "content": evil},
        {"role": "assistant", "tool_calls": [{"id": evil, "function": {"name": evil, "arguments": evil}}]},
        {"role": "tool", "tool_call_id": evil, "content": evil},
    ]
    (tmp_path / "evil.json").write_text(json.dumps({"messages": talk}))
    kv("import", "evil.json", "--user", evil)
    kv("put", f"app:{evil}", evil)
    [session] = kv("sessions", "--json").json

    for argv in (
        ["sessions"],
        ["timeline", session["id"]],
        ["search", "gnp"],
        ["ls"],
        ["get", f"app:{evil}"],
        ["stats"],
    ):
        code, shown = terminal([*argv, "--url", url], NO_COLOR="1")
        assert code == 0
        for sign in ("\x1b]0", "\x07", "\x1b[2J", "\x9b", "\u202e"):
            assert sign not in shown, (argv, sign)


def test_an_import_on_a_terminal_shows_its_progress_on_stderr_only(url: str, tmp_path: Path) -> None:
    (tmp_path / "many.json").write_text(json.dumps([{"messages": TALK, "n": n} for n in range(50)]))

    _, shown = terminal(["import", "many.json", "--url", url])
    piped = shell("import", "many.json", "--new", url=url)

    assert "50/50" in uncoloured(shown)
    assert b"/50" not in piped.stderr + piped.stdout


# ---- damage


def test_a_damaged_message_is_told_and_the_others_are_shown(kv: Command, talk: str, tmp_path: Path) -> None:
    whole = kv("timeline", talk, "--json").json["items"]
    with contextlib.closing(sqlite3.connect(tmp_path / "test.db")) as database, database:
        first = "SELECT min(k) FROM kv WHERE k LIKE 'kv:message:%'"
        database.execute(f"UPDATE kv SET v = CAST(v || x'00' AS BLOB) WHERE k = ({first})")

    timeline = kv("timeline", talk, "--json")
    search = kv("search", "e", "--json")

    assert timeline.code == search.code == 1
    assert len(timeline.json["items"]) == len(whole) - 1
    assert "KV500 left out: the record at 'kv:message:" in timeline.err
    assert "KV500 left out" in search.err and search.json
    assert kv("sessions").code == 0
