"""URLs, paths and mappings become typed options and settings, or are refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import Meta, Struct

from kvpersist import registry, urls
from kvpersist.errors import BadOption, UnknownScheme


class CabinetOptions(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    host: str
    port: int = 70
    username: str = ""
    password: str = ""
    params: dict[str, str] = {}
    drawer: str = "kv"
    patience: Annotated[float, Meta(gt=0)] = 5.0  # seconds
    label: str | None = None
    strict: bool = False


class FolderOptions(Struct, frozen=True, kw_only=True):
    path: str


class WholeOptions(Struct, frozen=True, kw_only=True):
    url: str
    concurrency: int = 32


class AskingOptions(Struct, frozen=True, kw_only=True):
    place: str
    depth: int = 1

    @classmethod
    def from_url(cls, parts: urls.UrlParts) -> dict[str, Any]:
        return {"place": f"{parts.host}|{parts.path}"}


def _driver(options: type[Struct]) -> type:
    class Stub:
        api: ClassVar[int] = 1
        Options: ClassVar[type[Struct]] = options

    return Stub


@pytest.fixture(autouse=True)
def _stub_drivers(monkeypatch: pytest.MonkeyPatch) -> None:
    stubs = {
        "cabinet": CabinetOptions,
        "folder": FolderOptions,
        "sqlite": FolderOptions,
        "asking": AskingOptions,
        "fsspec": WholeOptions,
    }

    def driver_class(scheme: str) -> type:
        if scheme not in stubs:
            raise UnknownScheme(scheme, "", tuple(stubs))
        return _driver(stubs[scheme])

    monkeypatch.setattr(registry, "driver_class", driver_class)


@pytest.mark.parametrize(
    ("url", "path"),
    [
        ("sqlite:///rel.db", "rel.db"),
        ("sqlite:///data/rel.db", "data/rel.db"),
        ("sqlite:////var/abs.db", "/var/abs.db"),
        ("SQLite:///rel.db", "rel.db"),
        ("rel.db", "rel.db"),
        ("./data/x.sqlite3", "./data/x.sqlite3"),
        ("/var/abs.sqlite", "/var/abs.sqlite"),
        ("C:\\data\\x.db", "C:\\data\\x.db"),
        (Path("some") / "x.db", "some/x.db"),
        ("sqlite:///my%20data%23%3F%25.db", "my data#?%.db"),
    ],
)
def test_three_slashes_are_relative_and_four_are_absolute(url: str | Path, path: str) -> None:
    target = urls.parse(url)

    assert (target.scheme, target.options) == ("sqlite", FolderOptions(path=path))


def test_the_pieces_of_a_url_reach_the_fields_of_their_names() -> None:
    target = urls.parse("cabinet://ada:s%40fe@db.example:71?color=red+one&color=blue&kv.drawer=x&kv.patience=500ms")

    assert target.options == CabinetOptions(
        host="db.example", port=71, username="ada", password="s@fe", params={"color": "blue"}, drawer="x", patience=0.5
    )


def test_an_options_class_with_from_url_is_asked() -> None:
    assert urls.parse("asking://one/two?kv.depth=3").options == AskingOptions(place="one|two", depth=3)


def test_settings_of_the_store_are_kept_apart_from_options_of_the_driver() -> None:
    target = urls.parse("folder:///x?kv.timeout=30s&kv.ttl=7d&kv.codec=json&kv.sweep=none")

    assert target.settings == {"timeout": 30.0, "ttl": 604800.0, "codec": "json", "sweep": None}
    assert urls.parse("folder:///x").settings == {}


def test_a_mapping_names_options_and_settings_without_a_prefix_or_with_it() -> None:
    target = urls.parse({"type": "Cabinet", "host": "h", "patience": "1m", "strict": True, "kv.ttl": 5})

    assert target.options == CabinetOptions(host="h", patience=60.0, strict=True)
    assert target.settings == {"ttl": 5.0}


def test_a_mapping_may_hold_a_url_and_more_beside_it() -> None:
    target = urls.parse({"url": "cabinet://h?kv.drawer=x", "timeout": "5s", "strict": True})

    assert target.options == CabinetOptions(host="h", drawer="x", strict=True)
    assert target.settings == {"timeout": 5.0}


def test_a_path_object_is_taken_in_a_mapping() -> None:
    assert urls.parse({"type": "folder", "path": Path("a") / "b"}).options == FolderOptions(path="a/b")


def test_text_that_reads_none_stays_text_where_text_is_wanted() -> None:
    assert urls.parse("cabinet://h?kv.drawer=none&kv.label=none").options == CabinetOptions(
        host="h", drawer="none", label="none"
    )


@pytest.mark.parametrize(
    "url",
    [
        "dir::memory://bucket/p",
        "Dir::memory://bucket/p",
        "zip::simplecache::s3://b/x.zip",
        "zip://inside.txt::s3://b/x.zip?color=red&endpoint_url=http%3A%2F%2Fh%3A9000",
        "dir::ftp://ada:s%40fe@h:21/p",
    ],
)
def test_a_chain_of_urls_is_one_for_fsspec_as_a_whole(url: str) -> None:
    joint = "&" if "?" in url else "?"

    target = urls.parse(f"{url}{joint}kv.concurrency=4&kv.ttl=5")

    assert (target.scheme, target.options) == ("fsspec", WholeOptions(url=url, concurrency=4))
    assert target.settings == {"ttl": 5.0}
    assert "s%40fe" not in target.shown + repr(target)
    assert urls.parse({"url": url, "concurrency": 4}).options == target.options


@pytest.mark.parametrize(
    ("url", "scheme", "host"),
    [
        ("cabinet://[::1]:71/p", "cabinet", "::1"),
        ("cabinet://[fe80::abc]:71/p", "cabinet", "fe80::abc"),
        ("cabinet://h/p?next=dir::memory://x", "cabinet", "h"),
        ("sqlite:///a::b.db", "sqlite", ""),
    ],
)
def test_two_colons_elsewhere_are_no_chain(url: str, scheme: str, host: str) -> None:
    parts, _ = urls.split(url)

    assert (parts.scheme, parts.host) == (scheme, host)


@pytest.mark.parametrize(
    ("where", "option", "says"),
    [
        ("folder:///x?kv.timeot=1", "kv.timeot", "kv.timeout"),
        ("folder:///x?timeout=1", "timeout", "did you mean kv.timeout?"),
        ("cabinet://h?kv.draver=1", "kv.draver", "kv.drawer"),
        ("cabinet://h?kv.host=1", "kv.host", "no such option"),
        ("cabinet://h?kv.ttl=1&kv.ttl=2", "kv.ttl", "twice"),
        ("cabinet://h?kv.timeout=soon", "kv.timeout", "'soon' is not a duration"),
        ("cabinet://h?kv.timeout=-1", "kv.timeout", "not a duration"),
        ("cabinet://h?kv.timeout=0", "kv.timeout", "> 0"),
        ("cabinet://h?kv.patience=0s", "kv.patience", "> 0"),
        ("cabinet://h?kv.strict=maybe", "kv.strict", "bool"),
        ("cabinet://h?kv.codec=pickle", "kv.codec", "pickle"),
        ("cabinet://", "host", "required"),
        ("cabinet://h:99999", "url", "port"),
        ("folder://rel", "url", "folder:///rel.db"),
        ("folder://user@/x", "url", "username"),
        ("folder:///x#y", "url", "%23"),
        ("1folder:///x", "url", "scheme"),
        ("words", "url", "neither a URL"),
        ("", "url", "neither a URL"),
        ({"host": "h"}, "type", '"type": "sqlite"'),
        ({"type": 3}, "type", '"type": "sqlite"'),
        ({"type": "cabinet", "host": 3}, "host", "str"),
        ({"type": "cabinet", "host": "h", "hots": 1}, "hots", "did you mean host?"),
        ({"type": "cabinet", "host": "h", "ttl": 1, "kv.ttl": 2}, "ttl", "twice"),
        ({"url": "cabinet://h?kv.drawer=x", "drawer": "y"}, "drawer", "beside it"),
    ],
)
def test_what_is_wrong_is_named(where: Any, option: str, says: str) -> None:
    with pytest.raises(BadOption) as caught:
        urls.parse(where)

    assert caught.value.option == option
    assert says in str(caught.value)


def test_an_unknown_scheme_is_an_error_of_its_own() -> None:
    with pytest.raises(UnknownScheme):
        urls.parse("cabnet://h")


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("500ms", 0.5),
        ("1.5s", 1.5),
        ("2", 2.0),
        ("12h", 43200.0),
        ("7d", 604800.0),
        ("2w", 1209600.0),
        ("1h30m", 5400.0),
    ],
)
def test_durations_have_units(text: str, seconds: float) -> None:
    assert urls.parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "s", "1y", "-1s", "1 s", "1s2", "nan", "inf", "1e9", "1h-2m", "٣s"])
def test_other_text_is_no_duration(text: str) -> None:
    with pytest.raises(ValueError, match="not a duration"):
        urls.parse_duration(text)


@pytest.mark.parametrize(
    "url",
    [
        "cabinet://ada:CANARY@h:71/p",
        "cabinet://:CANARY@h",
        "cabinet://ada:CAN/CANARY@h",
        "cabinet://ada:12/CANARY@h",
        "cabinet://ada:x?CANARY@h",
        "cabinet://ada:x#CANARY@h",
        "cabinet://ada:@CANARY@h",
        "cabinet://h?password=CANARY",
        "cabinet://h?kv.nosuch=1&api_key=CANARY",
        "cabinet://h?kv.password=CANARY",
        "cabinet://h?connection_string=CANARY",
        "dir::ftp://ada:CANARY@h/p",
        "zip://x::ftp://ada:CANARY@h/p.zip?secret=CANARY",
        "cabinet://h?AWS_SECRET_ACCESS_KEY=CANARY&x=1",
        "nosuch://ada:CANARY@h",
        "1bad://ada:CANARY@h",
        "ada:CANARY@h",
    ],
)
def test_a_password_is_neither_shown_nor_told_in_an_error(url: str) -> None:
    seen: list[object] = []
    try:
        seen.append(urls.parse(url))
        seen.append(urls.parse(url).shown)
        seen.append(urls.split(url)[0])
    except (BadOption, UnknownScheme) as error:
        seen += [error, error.args, error.__cause__, error.__context__]

    assert "CANARY" not in "".join(repr(one) + str(one) for one in seen)
    assert "CANARY" not in urls.redact(url) or "://" not in url


@given(st.text(st.sampled_from("aZ0:/@?#&=%.[]-+ é"), max_size=30))
def test_any_text_is_parsed_or_refused_and_never_fails_otherwise(text: str) -> None:
    for url in (text, f"cabinet://{text}"):
        urls.redact(url)
        try:
            urls.split(url)
        except BadOption:
            continue


@given(st.text(st.characters(codec="utf-8", exclude_characters="@/:?#"), min_size=1))
def test_an_encoded_password_arrives_and_is_redacted(password: str) -> None:
    from urllib.parse import quote

    url = f"cabinet://ada:{quote(password, safe='')}@h/p?x=1"

    assert urls.split(url)[0].password == password
    assert urls.redact(url) == "cabinet://ada:***@h/p?x=1"


def test_options_that_the_backend_owns_stay_in_its_url_as_they_were_written() -> None:
    parts, ours = urls.split("mongodb://a:1,b:2/db?w=1&kv.ttl=5&tags=x%20y&tags=z")

    assert parts.url == "mongodb://a:1,b:2/db?w=1&tags=x%20y&tags=z"
    assert (parts.host, parts.port, parts.path) == ("a:1,b:2", None, "db")
    assert ours == {"ttl": "5"}


def test_an_address_in_brackets_keeps_its_colons() -> None:
    parts, _ = urls.split("cabinet://[::1]:71/p")

    assert (parts.host, parts.port) == ("::1", 71)


def test_a_target_is_shown_by_its_address() -> None:
    assert repr(urls.parse("cabinet://ada:x@h:1?kv.ttl=5")) == "Target('cabinet://ada:***@h:1')"
    assert urls.parse({"type": "folder", "path": "/a/b"}).shown == "folder:////a/b"
    assert msgspec.structs.asdict(urls.parse({"type": "folder", "path": "a"}))["shown"] == "folder:///a"
