"""The store that is meant when none is named, and who says so."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvpersist import config
from kvpersist.errors import BadOption, ReadOnly


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv(config.VARIABLE, raising=False)
    for name in ("data", "config"):
        monkeypatch.setenv(f"XDG_{name.upper()}_HOME", str(tmp_path / "home" / name))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    place = tmp_path / "here"
    place.mkdir()
    monkeypatch.chdir(place)
    return place


def _user_config(home: Path, text: str) -> Path:
    path = home / "config" / "kvpersist" / "config.toml"
    path.parent.mkdir(parents=True)
    path.write_text(text)
    return path


def test_without_anything_it_is_a_file_in_the_users_data_folder(home: Path, folder: Path) -> None:
    resolved = config.resolve()

    assert resolved.source == "default"
    assert resolved.where == {"type": "sqlite", "path": str(home / "data" / "kvpersist" / "default.db")}
    assert (home / "data" / "kvpersist").stat().st_mode & 0o777 == 0o700
    assert list(folder.iterdir()) == []


def test_each_place_goes_before_the_next(home: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    user = _user_config(home, 'url = "memory://user"')
    assert config.resolve() == config.Resolved({"url": "memory://user"}, str(user))

    (folder / "pyproject.toml").write_text('[tool.kvpersist]\nurl = "memory://project"\n')
    assert config.resolve() == config.Resolved({"url": "memory://project"}, str(folder / "pyproject.toml"))

    (folder / "kvpersist.toml").write_text('url = "memory://folder"\ntimeout = "5s"\n')
    resolved = config.resolve()
    assert (resolved.where, resolved.source) == (
        {"url": "memory://folder", "timeout": "5s"},
        str(folder / "kvpersist.toml"),
    )
    assert resolved.target.settings == {"timeout": 5.0}

    monkeypatch.setenv("KVPERSIST_URL", "memory://variable")
    assert config.resolve() == config.Resolved("memory://variable", "KVPERSIST_URL")

    assert config.resolve("memory://argument") == config.Resolved("memory://argument", "argument")


def test_an_empty_variable_and_files_without_a_table_say_nothing(
    home: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVPERSIST_URL", "")
    (folder / "kvpersist.toml").write_text("")
    (folder / "pyproject.toml").write_text('[project]\nname = "x"\n')

    assert config.resolve().source == "default"


@pytest.mark.parametrize("text", ["url = ", 'uri = "memory://x"', "\udcff"])
def test_a_file_that_names_no_store_is_an_error_that_names_the_file(home: Path, folder: Path, text: str) -> None:
    path = folder / "kvpersist.toml"
    path.write_text(text, "utf-8", "surrogateescape")

    with pytest.raises(BadOption) as caught:
        config.resolve()

    assert caught.value.option == str(path)


def test_a_file_below_the_one_that_decides_is_not_read(home: Path, folder: Path) -> None:
    (folder / "kvpersist.toml").write_text("no toml")

    assert config.resolve("memory://").source == "argument"
    assert config.resolve(environ={"KVPERSIST_URL": "memory://"}).source == "KVPERSIST_URL"


def test_origins_tell_every_place_and_make_nothing(home: Path, folder: Path) -> None:
    (folder / "kvpersist.toml").write_text('type = "memory"\nname = "x"\npassword = "CANARY"\n')

    told = config.origins(environ={"KVPERSIST_URL": "redis://ada:CANARY@h/0"})

    assert [(origin.source, origin.value, origin.used) for origin in told] == [
        ("argument", None, False),
        ("KVPERSIST_URL", "redis://ada:***@h/0", True),
        (str(folder / "kvpersist.toml"), "type = memory, name = x, password = ***", False),
        (str(folder / "pyproject.toml"), None, False),
        (str(home / "config" / "kvpersist" / "config.toml"), None, False),
        ("default", str(home / "data" / "kvpersist" / "default.db"), False),
    ]
    assert not home.exists()


def test_the_default_is_used_where_nothing_else_is(home: Path, folder: Path) -> None:
    assert [origin.source for origin in config.origins() if origin.used] == ["default"]


def test_what_is_resolved_shows_no_password(home: Path, folder: Path) -> None:
    assert "CANARY" not in repr(config.resolve("redis://ada:CANARY@h/0"))


def test_a_data_folder_that_cannot_be_made_is_an_error_that_says_so(home: Path, folder: Path) -> None:
    home.mkdir()
    (home / "data").write_text("a file where the folder should be")

    with pytest.raises(ReadOnly, match="KVPERSIST_URL"):
        config.resolve()
