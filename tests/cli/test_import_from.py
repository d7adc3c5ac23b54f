"""`kvpersist import SYSTEM:WHERE`: what it prints, returns, and how it is gone on with."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("cyclopts")

sys.path.insert(0, str(Path(__file__).parents[1] / "ops" / "importers"))  # for the layouts

import agentx_layout
import kode_layout
import tables_layout

from kvpersist.cli import systems
from kvpersist.cli.app import run

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def kv(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    for name in ("KVPERSIST_URL", "KVPERSIST_TRACEBACK", "NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)

    def command(*argv: str) -> tuple[int, str, str]:
        code = run([*argv, "--url", f"sqlite:///{tmp_path}/target.db"])
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return code, out, err

    return command


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "source"
    made.mkdir()
    return made


def test_it_tells_what_was_imported_and_how_it_compares(kv: Command, folder: Path) -> None:
    code, out, err = kv("import", tables_layout.prisma_sqlite(folder))

    assert code == 0
    assert out == ""
    assert "2 sessions with 5 messages imported, 1 confirmations" in err
    assert "compared: 2 of 2 sessions equal" in err
    assert json.loads(kv("sessions", "--json")[1])[0]["messages"] in (1, 4)


def test_what_is_left_out_is_told_of_and_makes_the_exit_code_6(kv: Command, folder: Path) -> None:
    text = agentx_layout.kv_sqlite(folder, {"sessions:a": "{", "sessions:b": '{"sessionId": "b"}'})

    code, _, err = kv("import", text)

    assert code == 6
    assert "left out: kv_storage sessions:a: no JSON" in err
    assert "1 left out" in err
    assert kv("import", text, "--on-error", "skip")[0] == 0
    code, _, err = kv("import", text, "--on-error", "stop")
    assert code == 1
    assert "sessions:a" in err


def test_json_has_the_whole_report(kv: Command, folder: Path) -> None:
    [report] = json.loads(kv("import", agentx_layout.queue_db(folder), "--json")[1])

    assert (report["events"], report["consumers"], report["whole"]) == (5, 3, False)
    assert report["problems"][0]["place"] == "entries of other loyw3v30-0002"


def test_a_dry_run_makes_no_store(kv: Command, folder: Path, tmp_path: Path) -> None:
    code, _, err = kv("import", agentx_layout.kv_sqlite(folder), "--dry-run")

    assert code == 0
    assert "would be imported" in err
    assert "compared" not in err
    assert not (tmp_path / "target.db").exists()


def test_files_beside_tables_are_named_by_an_option(kv: Command, folder: Path) -> None:
    text = kode_layout.sqlite_store(folder)
    (folder / "kode" / kode_layout.AGENT).rename(folder / "elsewhere")
    (folder / "files").mkdir()
    (folder / "elsewhere").rename(folder / "files" / kode_layout.AGENT)

    [report] = json.loads(kv("import", text, "--files", str(folder / "files"), "--json")[1])

    assert report["records"]["todos"] == 1
    assert report["events"] == 3


def test_a_key_in_clear_never_appears(kv: Command, folder: Path) -> None:
    code, out, err = kv("import", agentx_layout.kv_sqlite(folder), "--json")

    assert code == 0
    assert "in clear" in err
    assert "sk-very-secret" not in out + err


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (("agentz:x.db",), "did you mean agentx"),
        (("agentx:",), "write agentx:PATH"),
        (("prisma:x.db", "--new"), "not for SYSTEM:WHERE"),
        (("prisma:x.db", "--format", "openai"), "not for SYSTEM:WHERE"),
        (("talk.json", "--dry-run"), "not for files"),
        (("talk.json", "prisma:x.db", "--secrets", "encrypt"), "not for files"),
        (("kode:.", "--secrets", "clear"), "neither encrypt nor env:NAME"),
    ],
)
def test_what_makes_no_sense_is_refused(kv: Command, argv: tuple[str, ...], told: str, tmp_path: Path) -> None:
    (tmp_path / "talk.json").write_text("[]")
    (tmp_path / "agt" / "runtime").mkdir(parents=True)

    code, _, err = kv("import", *argv)

    assert code == 2
    assert told in err


def test_a_source_that_is_not_there_is_told_of(kv: Command) -> None:
    code, _, err = kv("import", "agentx:absent.db")
    assert (code, "no such file" in err) == (3, True)

    code, _, err = kv("import", "prisma:postgresql://u:hush@127.0.0.1:1/x")
    assert code == 4
    assert "hush" not in err


def test_a_file_whose_name_looks_like_a_system_is_a_file(kv: Command, tmp_path: Path) -> None:
    (tmp_path / "agentx:talk.json").write_text(json.dumps([{"role": "user", "content": "Hi"}]))

    code, _, err = kv("import", "agentx:talk.json")

    assert code == 0
    assert "1 session with 1 message imported" in err


def test_an_interrupt_prints_how_to_go_on_without_the_password(
    kv: Command, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(systems, "import_from", stop)
    monkeypatch.setattr(systems, "open_source", _opened)

    code, _, err = kv("import", "agentx:postgresql://u:hush@db/x?kv.table=t", "--user", "ada")

    assert code == 130
    assert "go on with: kvpersist import 'agentx:postgresql://u:***@db/x?kv.table=t' --user ada" in err
    assert "hush" not in err


async def _opened(text: str, **_: str) -> Any:
    class Opened:
        system, shown = "agentx", "x"

        async def __aenter__(self) -> Any:
            return self

        async def __aexit__(self, *_: object) -> None:
            pass

    return Opened()


def test_a_url_without_its_system_is_refused_without_its_password(kv: Command) -> None:
    code, out, err = kv("import", "mysql://me:hunter2@h.test/db")

    assert code == 2 and out == ""
    assert "hunter2" not in err and "prisma:URL" in err
