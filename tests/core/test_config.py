"""The store that is meant when none is named, and who says so."""

from __future__ import annotations

import inspect
import logging
from pathlib import Path
from typing import Any

import pytest

import kvpersist
from kvpersist import config, registry, urls
from kvpersist.errors import BadKey, BadOption, ReadOnly
from kvpersist.home import Home


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for variable in (config.VARIABLE, config.PROFILE, config.HOME, "KVPERSIST_LOGS"):
        monkeypatch.delenv(variable, raising=False)
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
        ("KVPERSIST_PROFILE", None, False),
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


# -- profiles ----------------------------------------------------------------------------------

_PROFILES = """
url = "memory://usual"

[profiles.prod]
url = "postgresql://ada:CANARY@db/agents"
pool_max = 4

[profiles.dev]
type = "memory"
name = "dev"
"""


def test_a_profile_is_a_store_of_a_file_by_its_name(home: Path, folder: Path) -> None:
    (folder / "kvpersist.toml").write_text(_PROFILES)

    assert config.resolve().where == {"url": "memory://usual"}
    found = config.resolve(profile="dev")
    assert (found.where, found.source) == ({"type": "memory", "name": "dev"}, "profile dev")
    assert config.resolve(profile="prod").where == {"url": "postgresql://ada:CANARY@db/agents", "pool_max": 4}
    assert "CANARY" not in repr(config.resolve(profile="prod"))


def test_a_profile_goes_before_the_variables_and_its_variable_before_the_files(home: Path, folder: Path) -> None:
    (folder / "kvpersist.toml").write_text(_PROFILES)
    both = {"KVPERSIST_URL": "memory://variable", "KVPERSIST_PROFILE": "dev"}

    assert config.resolve("memory://argument", profile="dev", environ=both).source == "argument"
    assert config.resolve(profile="prod", environ=both).source == "profile prod"
    assert config.resolve(environ=both).where == "memory://variable"
    assert config.resolve(environ={"KVPERSIST_PROFILE": "dev"}).where == {"type": "memory", "name": "dev"}
    told = config.origins(environ={"KVPERSIST_PROFILE": "prod"})
    assert [(one.source, one.value) for one in told if one.used] == [
        ("KVPERSIST_PROFILE", "url = postgresql://ada:***@db/agents, pool_max = 4")
    ]


def test_the_first_file_that_has_a_profile_decides_and_one_of_profiles_alone_names_no_store(
    home: Path, folder: Path
) -> None:
    _user_config(home, '[profiles.dev]\nurl = "memory://user"\n[profiles.mine]\nurl = "memory://mine"')
    (folder / "kvpersist.toml").write_text('[profiles.dev]\nurl = "memory://folder"')

    assert config.resolve(profile="dev").where == {"url": "memory://folder"}
    assert config.resolve(profile="mine").where == {"url": "memory://mine"}
    assert config.resolve().source == "default"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (_PROFILES, "there are: prod, dev"),
        ("", r"write \[profiles.NAME\]"),
        ("[profiles.nosuch]\npool_max = 3", "names no store"),
        ("profiles = 3", "tables"),
    ],
)
def test_a_profile_that_is_not_there_is_an_error_that_names_those_there_are(
    home: Path, folder: Path, text: str, says: str
) -> None:
    (folder / "kvpersist.toml").write_text(text)

    with pytest.raises(BadOption, match=says):
        config.resolve(profile="nosuch")


async def test_an_open_function_takes_a_profile_and_options_beside_it(home: Path, folder: Path) -> None:
    (folder / "kvpersist.toml").write_text('[profiles.x]\nurl = "sqlite:///x.db"\ndurability = "normal"')

    async with kvpersist.open_store(profile="x", busy_timeout=1) as store:
        assert store.where == "sqlite:///x.db"
    async with kvpersist.open(profile="x", namespace="n") as db:
        assert db.store.where == "sqlite:///x.db"
    for function in (kvpersist.open, kvpersist.open_store):
        for named in ({"where": "memory://"}, {"type": "memory"}, {"url": "memory://"}, {"where": {"type": "memory"}}):
            with pytest.raises(BadOption, match="named twice"):
                await function(**named, profile="x")


async def test_a_profile_beside_a_bucket_is_the_buckets_own(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("fsspec")
    from kvpersist_drivers.buckets import BucketDriver

    taken: list[Any] = []

    async def refuse(options: Any) -> Any:
        taken.append(options.profile)
        raise kvpersist.Unavailable("enough")

    monkeypatch.setattr(BucketDriver, "open", refuse)
    for function in (kvpersist.open, kvpersist.open_store):
        with pytest.raises(kvpersist.Unavailable):
            await function("s3://bucket", profile="mine")

    assert taken == ["mine", "mine"]


def test_no_other_argument_hides_an_option_of_a_driver() -> None:
    arguments = {*inspect.signature(kvpersist.open).parameters} - {"timeout"}
    hidden = {
        field
        for info in registry.list_drivers(load=True)
        if info.error is None
        for field in registry.driver_class(info.scheme).Options.__struct_fields__
        if field in arguments
    }

    assert hidden <= {"profile"}


def test_what_a_file_says_of_other_stores_is_not_of_this_one(home: Path, folder: Path) -> None:
    (folder / "kvpersist.toml").write_text('url = "memory://"\nfiles = "./files/"\n[events]\nretention = 60')

    found = config.resolve()

    assert (found.where, found.files, found.events) == ({"url": "memory://"}, "./files/", {"retention": 60})
    again = config.resolve(found.named)
    assert (again.where, again.files, again.events) == (found.where, found.files, found.events)


# -- the home folder ---------------------------------------------------------------------------


def test_a_home_folder_holds_the_data(home: Path, folder: Path, tmp_path: Path) -> None:
    own = tmp_path / "own"
    wanted = {"type": "sqlite", "path": str(own / "data" / "default.db")}

    assert config.resolve(environ={"KVPERSIST_HOME": str(own)}) == config.Resolved(wanted, "default")
    assert (own / "data").stat().st_mode & 0o777 == 0o700
    (folder / "kvpersist.toml").write_text('url = "memory://folder"')
    environ = {"KVPERSIST_HOME": "/elsewhere", "KVPERSIST_URL": "memory://variable"}
    assert config.resolve(environ={"KVPERSIST_HOME": str(own)}).where == {"url": "memory://folder"}
    assert config.resolve(home=own, environ=environ) == config.Resolved(wanted, "home")
    assert config.resolve("memory://", home=own, environ=environ).where == "memory://"


async def test_an_open_function_takes_a_home(home: Path, folder: Path, tmp_path: Path, monkeypatch: Any) -> None:
    async with kvpersist.open(home=tmp_path / "one") as db:
        assert db.store.where == f"sqlite:///{tmp_path}/one/data/default.db"
        assert db.home is not None and db.home.path == tmp_path / "one"
    monkeypatch.setenv("KVPERSIST_HOME", str(tmp_path / "two"))
    async with kvpersist.open("memory://") as db:
        assert db.home is not None and db.home.path == tmp_path / "two"
    assert not (tmp_path / "two").exists()
    async with kvpersist.open() as db:
        await db.sessions.create()
    assert (tmp_path / "two" / "data" / "default.db").is_file()
    monkeypatch.delenv("KVPERSIST_HOME")
    async with kvpersist.open("memory://") as db:
        assert db.home is None


@pytest.mark.parametrize(
    "id_",
    [
        *(
            "agent-1",
            "..",
            ".",
            "../../etc",
            "/etc/passwd",
            "a/b",
            "a%2Fb",
            "a:b",
            "a\0b",
            "C:\\x",
            "ü" * 100,
            "x" * 300,
        ),
        *("x" * 300, "~", " ", ".hidden", "\n", "UPPER", "upper"),
    ],
)
def test_a_work_folder_lies_in_the_home_folder_whatever_the_id(tmp_path: Path, id_: str) -> None:
    home = Home(tmp_path / "h")

    path = home.workdir(id_)

    assert path.is_dir()
    assert path.parent == home.containers
    assert path.resolve().parent == home.containers.resolve()
    assert len(path.name.encode()) <= 255
    assert path.stat().st_mode & 0o777 == 0o700
    assert home.path.stat().st_mode & 0o777 == 0o700
    assert home.workdir(id_) == path


def test_no_two_ids_share_a_work_folder(tmp_path: Path) -> None:
    home = Home(tmp_path)
    ids = ["a", "A", "a ", "%61", "a%20", ".", "..", "%2E", "x" * 300, "x" * 301, "x" * 200, "é", "e\u0301"]

    assert len({home.workdir(id_, create=False) for id_ in ids}) == len(ids)
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_id_has_no_work_folder(tmp_path: Path) -> None:
    for wrong in ("", "\udc80"):
        with pytest.raises(BadKey):
            Home(tmp_path).workdir(wrong)
    with pytest.raises(BadOption):
        Home("")


def test_a_link_is_no_work_folder(tmp_path: Path) -> None:
    home = Home(tmp_path)
    home.workdir("a").rmdir()
    home.workdir("a", create=False).symlink_to(tmp_path)

    with pytest.raises(ReadOnly, match="link"):
        home.workdir("a")


async def test_logs_are_written_only_when_they_are_asked_for(tmp_path: Path, monkeypatch: Any, home: Path) -> None:
    log = tmp_path / "h" / "logs" / "kvpersist.log"
    async with kvpersist.open("memory://", home=tmp_path / "h"):
        logging.getLogger("kvpersist").error("unasked")
    assert not log.exists()

    async with kvpersist.open("memory://", home=tmp_path / "h", logs=True) as db:
        logging.getLogger("kvpersist.x").info("asked")
        async with kvpersist.open("memory://", home=tmp_path / "h", logs="debug"):
            await db.sessions.create()
        logging.getLogger("kvpersist.x").debug("too low")
    logging.getLogger("kvpersist.x").error("too late")
    monkeypatch.setenv("KVPERSIST_LOGS", "warning")
    async with kvpersist.open("memory://", home=tmp_path / "h"):
        logging.getLogger("kvpersist.x").warning("by the variable")

    text = log.read_text()
    assert "INFO kvpersist.x: asked" in text and "commit: " in text and "by the variable" in text
    assert "unasked" not in text and "too l" not in text
    assert logging.getLogger("kvpersist").handlers == []
    assert logging.getLogger("kvpersist").level == logging.NOTSET


@pytest.mark.parametrize(("logs", "option"), [(True, "logs"), ("loud", "logs"), (None, "KVPERSIST_LOGS")])
async def test_logs_that_cannot_be_written_are_an_error(
    home: Path, tmp_path: Path, monkeypatch: Any, logs: Any, option: str
) -> None:
    monkeypatch.setenv("KVPERSIST_LOGS", "info")
    where = {"home": tmp_path} if logs == "loud" else {}

    with pytest.raises(BadOption) as caught:
        await kvpersist.open("memory://", logs=logs, **where)

    assert caught.value.option == option
    assert logging.getLogger("kvpersist").handlers == []


async def test_logs_end_where_the_store_cannot_be_opened(home: Path, tmp_path: Path) -> None:
    with pytest.raises(kvpersist.KvError):
        await kvpersist.open("nosuch://x", home=tmp_path, logs=True)

    assert logging.getLogger("kvpersist").handlers == []


def test_a_home_of_a_user_that_is_not_there_is_refused() -> None:
    with pytest.raises(BadOption, match="no such user"):
        Home("~nobody-of-this-name/agents")


@pytest.mark.parametrize(
    ("module", "url"),
    [
        ("asyncpg", "postgresql://me:hunter2@h.test/db"),
        ("asyncmy", "mysql://me:hunter2@h.test/db"),
        ("redis", "redis://me:hunter2@h.test/0"),
        ("pymongo", "mongodb://me:hunter2@h.test/db"),
        ("fsspec", "s3://bucket/p?secret=hunter2"),
    ],
)
def test_rich_shows_no_password_either(module: str, url: str) -> None:
    pretty = pytest.importorskip("rich.pretty").pretty_repr
    pytest.importorskip(module)
    target = urls.parse(url)

    for each in (config.resolve(url, environ={}), urls.split(url)[0], target, target.options):
        assert "hunter2" not in repr(each) + pretty(each)
