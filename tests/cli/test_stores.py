"""Whole stores on the command line: init, ddl, reset, conformance."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import msgspec
import pytest
from msgspec import Struct

pytest.importorskip("cyclopts")

import kvpersist
from kvpersist import Message, registry
from kvpersist.cli.app import run
from kvpersist.driver import Batch, Committed
from kvpersist.errors import FormatMismatch, KvError, ReadOnly, Unavailable
from kvpersist.urls import redact
from kvpersist_drivers.memory import MemoryDriver


class _TabledOptions(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    url: str
    host: str
    password: str = ""
    table: str = "kv"
    auto_create: bool = True


class Tabled(MemoryDriver):
    """A driver that keeps a table somewhere, which has to be made."""

    Options: ClassVar[type[Struct]] = _TabledOptions
    tables: ClassVar[dict[str, MemoryDriver]] = {}
    opened: ClassVar[list[_TabledOptions]] = []
    refuses: ClassVar[bool] = False

    @classmethod
    async def open(cls, options: Any, /) -> Self:
        cls.opened.append(options)
        if options.host == "down":
            raise Unavailable("down:1: connection refused")
        if not options.auto_create and options.table not in cls.tables:
            shown = redact(options.url)
            made = f"which `kvpersist init {shown}` makes and `kvpersist ddl {shown}` prints"
            raise FormatMismatch(shown, "nothing", f'the table "{options.table}", {made}')
        driver = cls(f"{options.host}-{options.table}")
        driver.options = options
        await driver.provision()
        return driver

    options: _TabledOptions

    @classmethod
    def ddl_of(cls, options: Any, /) -> str:
        return f'CREATE TABLE IF NOT EXISTS "{options.table}" (key text);'

    def ddl(self) -> str:
        return self.ddl_of(self.options)

    async def provision(self) -> None:
        if self.options.table not in self.tables:
            self.tables[self.options.table] = MemoryDriver(self._name)  # which holds what is in it

    async def commit(self, batches: Sequence[Batch]) -> list[Committed | KvError]:
        if self.refuses:
            raise ReadOnly("not for this user")
        return await super().commit(batches)


@pytest.fixture(autouse=True)
def _alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    real = registry.driver_class
    monkeypatch.setattr(registry, "driver_class", lambda scheme: Tabled if scheme == "tabled" else real(scheme))
    for name in ("KVPERSIST_URL", "NO_COLOR", "FORCE_COLOR", "KVPERSIST_TRACEBACK"):
        monkeypatch.delenv(name, raising=False)
    for name in ("HOME", "XDG_DATA_HOME", "XDG_CONFIG_HOME"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.chdir(tmp_path)
    Tabled.opened.clear()
    yield
    for table in Tabled.tables.values():
        asyncio.run(table.close())
    Tabled.tables.clear()


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def kv(capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*argv: str) -> tuple[int, str, str]:
        code = run(argv)
        out, err = capsys.readouterr()
        assert "CANARY" not in out + err
        assert "Traceback" not in err
        return code, out, err

    return call


def _filled(url: str) -> None:
    async def fill() -> None:
        async with kvpersist.open(url) as db:
            await db.sessions.create(id="a")
            await db.messages.append_many("a", [Message("user", n) for n in range(20)])
            await db.store.put_many({f"app:{n}": n for n in range(1500)})
            await db.store.put("plain", 1)

    asyncio.run(fill())


def _rows(out: str) -> dict[str, str]:
    return {row.split()[0]: row.split(maxsplit=1)[1] for row in out.splitlines()[1:]}


# -- init ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("url", ["sqlite:///new.db", "new.db", "tabled://ada:CANARY@db"])
def test_init_makes_what_is_missing_and_then_nothing(url: str, kv: Run) -> None:
    part = "tables" if url.startswith("tabled") else "place"

    first, again = kv("init", url), kv("init", "--url", url, "--json")

    assert (first[0], _rows(first[1])) == (0, {part: "made", "format": "made"})
    assert again[0] == 0
    assert json.loads(again[1]) == {
        "store": redact(url),
        part: "there already",
        "format": "there already",
    }
    assert kv("ls", "--url", url)[:2] == (0, "kvpersist:format\n")


def test_init_makes_tables_though_the_url_says_not_to(kv: Run) -> None:
    url = "tabled://ada:CANARY@db?kv.auto_create=false&kv.table=mine"

    assert kv("ls", "--url", url)[0] == 3
    assert kv("init", url)[0] == 0
    assert list(Tabled.tables) == ["mine"]
    assert kv("put", "app:a", "x", "--url", url)[0] == 0


def test_a_missing_table_is_told_with_both_commands(kv: Run) -> None:
    code, out, err = kv("put", "app:a", "x", "--url", "tabled://ada:CANARY@db?kv.auto_create=false")

    assert (code, out) == (3, "")
    assert "there is no store at tabled://ada:***@db" in err
    assert "`kvpersist init tabled://ada:***@db` makes" in err
    assert "`kvpersist ddl tabled://ada:***@db` prints" in err


@pytest.mark.parametrize("command", [("ls",), ("get", "x"), ("sessions",), ("stats",), ("reset", "--yes")])
def test_reading_or_emptying_a_store_does_not_make_its_tables(command: tuple[str, ...], kv: Run) -> None:
    assert kv(*command, "--url", "tabled://db")[0] == 3
    assert Tabled.tables == {}


def test_init_fills_in_the_format_of_a_store_that_an_administrator_made(kv: Run) -> None:
    async def made() -> None:
        await (await Tabled.open(_TabledOptions(url="tabled://db", host="db"))).close()

    asyncio.run(made())

    assert _rows(kv("init", "tabled://db")[1]) == {"tables": "there already", "format": "made"}


def test_init_says_when_it_cannot(kv: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    assert kv("init", "tabled://down")[0] == 4
    assert kv("init", "nosuch://x")[0] == 2
    assert kv("init", "a.db", "--url", "b.db")[0] == 2
    assert kv("init", "a.db?kv.nosuch=1")[0] == 2
    monkeypatch.setattr(Tabled, "refuses", True)
    assert kv("init", "tabled://db")[0] == 1


def test_sixteen_who_make_a_store_at_once_all_succeed(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "kvpersist", "init", f"sqlite:///{tmp_path}/race.db", "--json"]
    children = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(16)]

    printed = [child.communicate(timeout=60)[0] for child in children]

    assert [child.returncode for child in children] == [0] * 16
    assert any(json.loads(text)["place"] == "made" for text in printed)


# -- ddl -----------------------------------------------------------------------------------------


def test_ddl_is_printed_as_it_is_and_nothing_is_opened(kv: Run) -> None:
    assert kv("ddl", "tabled://ada:CANARY@down?kv.table=mine") == (
        *(0, 'CREATE TABLE IF NOT EXISTS "mine" (key text);\n', ""),
    )
    code, out, _ = kv("ddl", "tabled://ada:CANARY@down", "--json")
    assert code == 0
    assert json.loads(out) == {"store": "tabled://ada:***@down", "ddl": 'CREATE TABLE IF NOT EXISTS "kv" (key text);'}
    assert Tabled.opened == []


@pytest.mark.parametrize("url", ["sqlite:///x.db", "file:///nowhere/at/all", "memory://"])
def test_a_driver_without_tables_has_no_ddl_and_says_so(url: str, kv: Run, tmp_path: Path) -> None:
    code, out, _ = kv("ddl", url)

    assert code == 0
    assert out.startswith("-- ")
    assert len(out.splitlines()) == 1
    assert json.loads(kv("ddl", url, "--json")[1])["ddl"] == ""
    assert list(tmp_path.iterdir()) == []


# -- reset ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("url", ["sqlite:///full.db", "file://{}/full", "tabled://db"])
def test_reset_leaves_what_init_makes(url: str, kv: Run, tmp_path: Path) -> None:
    url = url.format(tmp_path)
    if url.startswith("file"):
        url += "?kv.durability=normal"
    _filled(url)

    counted = kv("reset", url, "--dry-run", "--json")
    asked = kv("reset", url)
    before = kv("ls", "--url", url)[1].splitlines()
    done = kv("reset", url, "--yes")

    counts = json.loads(counted[1])
    assert (counts["app"], counts[""]) == (1500, 1)
    assert counts["kv"] > 40
    assert sum(counts.values()) == len(before) - 1
    assert asked[0] == 2
    assert "nothing was removed" in asked[2]
    assert (done[0], done[1]) == (0, "")
    assert f"removed {len(before) - 1:,} keys" in done[2]
    assert kv("ls", "--url", url)[1] == "kvpersist:format\n"
    _filled(url)  # it can be used again
    assert json.loads(kv("stats", "--url", url, "--json")[1])["messages"] == 20


def test_reset_of_a_namespace_leaves_the_others(kv: Run) -> None:
    _filled("sqlite:///full.db")
    counts = json.loads(kv("reset", "full.db", "--dry-run", "--json")[1])

    assert kv("reset", "full.db", "--dry-run", "--namespace", "app")[1].split() == ["NAMESPACE", "KEYS", "app", "1,500"]
    assert kv("reset", "full.db", "--namespace", "kv", "--yes")[0] == 0
    assert json.loads(kv("reset", "full.db", "--dry-run", "--json")[1]) == {"": 1, "app": 1500}
    assert kv("reset", "full.db", "--namespace", "ap", "--yes")[2] == "removed 0 keys\n"
    assert counts.keys() == {"", "app", "kv"}


def test_reset_needs_a_name_and_never_takes_the_usual_store(kv: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    _filled("sqlite:///usual.db")
    monkeypatch.setenv("KVPERSIST_URL", "sqlite:///usual.db")

    code, _, err = kv("reset", "--yes")

    assert code == 2
    assert "name the store" in err
    assert json.loads(kv("stats", "--json")[1])["messages"] == 20


def test_reset_refuses_what_is_no_store_of_ours(kv: Run, tmp_path: Path) -> None:
    import sqlite3

    with sqlite3.connect(tmp_path / "theirs.db") as theirs:
        theirs.execute("CREATE TABLE kept (a)")

    assert kv("reset", "theirs.db", "--yes")[0] == 1
    assert kv("reset", "nowhere.db", "--yes")[0] == 3
    assert not (tmp_path / "nowhere.db").exists()


# -- conformance ---------------------------------------------------------------------------------


def test_conformance_prints_what_is_claimed_and_what_each_test_came_to(kv: Run) -> None:
    code, out, err = kv("conformance", "memory://")

    able, _, tests = out.partition("\n\n")
    assert code == 0
    assert _rows(able)["atomic_batch"] == "all"
    assert _rows(able)["driver"] == "kvpersist_drivers.memory:MemoryDriver"
    results = [row.split()[0] for row in tests.splitlines()[1:]]
    assert set(results) == {"passed", "skipped"}
    assert "declares no limit" in tests
    assert f"{results.count('passed')} passed, {results.count('skipped')} skipped, 0 failed: memory://" in err


def test_conformance_as_json_and_as_lines(kv: Run) -> None:
    code, out, _ = kv("conformance", "--url", "tabled://ada:CANARY@db", "--records", "--json")
    report = json.loads(out)
    _, lines, _ = kv("conformance", "memory://", "--jsonl")

    assert code == 0
    assert report["store"] == "tabled://ada:***@db"
    assert report["capabilities"]["conditional"] is True
    assert report["failed"] == 0
    assert {result["contract"] for result in report["results"]} == {"driver", "records"}
    [made] = [result for result in report["results"] if "made again" in result["test"]]
    assert made["outcome"] == "passed"
    results = [json.loads(line) for line in lines.splitlines()]
    assert {result["outcome"] for result in results} == {"passed", "skipped"}


def test_conformance_of_a_broken_driver_ends_with_1(kv: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    async def commit(self: Any, batches: Sequence[Batch]) -> list[Committed | KvError]:
        return await MemoryDriver.commit(
            self,
            [
                Batch(
                    tuple(msgspec.structs.replace(op, expect=None) for op in one.ops if hasattr(op, "value")),
                    one.version,
                )
                for one in batches
            ],
        )

    monkeypatch.setattr(Tabled, "commit", commit)

    code, out, err = kv("conformance", "tabled://db")

    assert code == 1
    assert "failed   a put that expects absence succeeds once" in out
    assert "failed: tabled://db" in err


def test_conformance_without_pytest_names_the_extra(tmp_path: Path) -> None:
    program = (
        "import sys; sys.modules['pytest'] = None\n"
        "from kvpersist.cli.app import run\n"
        "sys.exit(run(['conformance', 'memory://']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False, env=os.environ
    )

    assert done.returncode == 2
    assert "pip install 'kvpersist[test]'" in done.stderr


def test_a_store_that_is_down_is_told_at_once(kv: Run) -> None:
    assert kv("conformance", "tabled://down")[0] == 4
    assert kv("reset", "tabled://down", "--yes")[0] == 4


# -- plugins -------------------------------------------------------------------------------------


def test_a_broken_plugin_is_listed_with_what_is_wrong_and_told_by_its_scheme(tmp_path: Path) -> None:
    info = tmp_path / "acme-1.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme\nVersion: 1.2\n")
    (info / "entry_points.txt").write_text("[kvpersist.drivers]\nacme = acme_broken:Driver\n")
    (tmp_path / "acme_broken.py").write_text("print('noise')\nraise RuntimeError('no licence')\n")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])}

    def call(*argv: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "kvpersist", *argv]
        return subprocess.run(command, capture_output=True, text=True, env=env, timeout=60, check=False)

    listed, opened, other = call("drivers", "--json"), call("ls", "--url", "acme://x"), call("drivers")

    [acme] = [one for one in json.loads(listed.stdout) if one["scheme"] == "acme"]
    assert (acme["distribution"], acme["error"]) == ("acme", "RuntimeError: no licence")
    assert "RuntimeError: no licence" in other.stdout
    assert opened.returncode == 1
    assert "the driver of 'acme' (acme_broken:Driver) cannot be loaded: RuntimeError: no licence" in opened.stderr
    assert "kvpersist drivers" in opened.stderr
