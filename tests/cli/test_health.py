"""`kvpersist health`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kvpersist.cli.app import run


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("KVPERSIST_URL", "KVPERSIST_PROFILE", "KVPERSIST_HOME"):
        monkeypatch.delenv(name, raising=False)
    assert run(["init", "sqlite:///a.db"]) == 0
    return tmp_path


def test_a_store_that_answers_is_told_with_its_latency(capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()

    assert run(["health", "sqlite:///a.db", "--write"]) == 0
    told = capsys.readouterr().out
    assert "writable" in told and " ms" in told and "sqlite:///a.db" in told

    assert run(["health", "sqlite:///a.db", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["healthy"] and found["stores"]["main"]["connected"]
    assert found["stores"]["main"]["writable"] is None


def test_a_store_that_is_not_there_has_the_exit_code_of_what_keeps_it_away(folder: Path) -> None:
    assert run(["health", "sqlite:///nosuch.db"]) == 3
    assert not (folder / "nosuch.db").exists()


def test_a_server_that_does_not_answer_is_exit_code_4() -> None:
    pytest.importorskip("redis")

    assert run(["health", "redis://127.0.0.1:1/0"]) == 4


def test_stores_beside_the_main_one_are_asked_too(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "kvpersist.toml").write_text(
        '[profiles.x]\nurl = "sqlite:///a.db"\nfiles = "sqlite:///f.db"\nevents = { url = "memory://" }\n'
    )

    assert run(["health", "--profile", "x", "--json"]) == 0

    assert list(json.loads(capsys.readouterr().out.splitlines()[-1])["stores"]) == ["main", "files", "events"]


def test_every_command_takes_a_profile(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "kvpersist.toml").write_text('[profiles.x]\nurl = "sqlite:///x.db"\n')

    assert run(["put", "app:a", "hello", "--profile", "x"]) == 0
    assert run(["get", "app:a", "--profile", "x"]) == 0
    assert run(["config", "--origins", "--profile", "x"]) == 0
    told = capsys.readouterr().out
    assert "hello" in told and "profile x" in told
    assert (folder / "x.db").exists()
    assert run(["get", "app:a", "--profile", "nosuch"]) == 2


def test_a_timeout_of_no_time_is_a_mistake_and_no_sick_store(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["health", "sqlite:///a.db", "--timeout", "0"]) == 2
    assert "--timeout" in capsys.readouterr().err
