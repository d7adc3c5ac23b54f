"""Keys: injective, in the order of their parts, isolated by prefix."""

from __future__ import annotations

import math
import random
import re
from datetime import UTC, datetime, timedelta, timezone
from enum import IntEnum, StrEnum
from itertools import pairwise
from typing import Any
from uuid import UUID, uuid4

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from kvpersist import keys
from kvpersist.errors import BadKey, KeyTooLong

AWKWARD = [
    "",
    "a",
    "a:b",
    "a-b",
    "a!b",
    "a%b",
    "a%21b",
    "%",
    "%%",
    "!",
    "#",
    "\0",
    " ",
    "a\nb",
    "..",
    "/",
    "\\",
    "*",
    "{}",
]
AWKWARD += ["\x7f", "é", "\ud7ff", "\ue000", "\U0010ffff", "😀", "%25", "%2", "$where", "' OR 1=1", "__proto__"]

# Text with many characters around the ones that matter, and none that has no UTF-8 form.
texts = st.text(
    st.sampled_from("!%#$&a2 \0:\ud7ff\ue000\U0010ffff") | st.characters(exclude_categories=("Cs",)), max_size=12
)
integers = st.integers(-(2**256), 2**256 - 1) | st.integers(-(2**64), 2**64) | st.integers(-300, 300)
floats = st.floats(allow_nan=False)
zones = st.integers(-1439, 1439).map(lambda minutes: timezone(timedelta(minutes=minutes)))
moments = st.datetimes(datetime(2, 1, 1), datetime(9998, 12, 31), timezones=zones)  # noqa: DTZ001 (the zone is added)


# --- Text


@given(texts)
def test_escaped_text_comes_back(text: str) -> None:
    assert keys.unescape(keys.escape(text)) == text


@given(texts)
def test_escaped_text_holds_no_character_that_separates_parts(text: str) -> None:
    assert not set(keys.escape(text)) & {chr(code) for code in range(0x25)}


@given(st.lists(texts, min_size=1, max_size=4), st.lists(texts, min_size=1, max_size=4))
@example(["a"], ["a", ""])
@example(["a", "b"], ["a!b"])
@example(["a%21b"], ["a!b"])
@example(["\ud7ff"], ["\ue000"])
def test_the_byte_order_of_joined_keys_is_the_order_of_the_tuples(a: list[str], b: list[str]) -> None:
    left, right = (keys.join(map(keys.escape, parts)).encode() for parts in (a, b))

    if a == [""] or b == [""]:  # one empty part and none at all are the same text; the number of parts is fixed
        return
    assert (left < right) == (a < b) and (left == right) == (a == b)


def test_every_pair_of_awkward_texts_has_a_key_of_its_own_in_order() -> None:
    pairs = sorted((a, b) for a in AWKWARD for b in AWKWARD)

    joined = [keys.join((keys.escape(a), keys.escape(b))).encode() for a, b in pairs]

    assert all(left < right for left, right in pairwise(joined))


@pytest.mark.parametrize("text", ["018f3c5e-7e1b-7cc1-a3f0-000000000000", "a.b/c:d*e", "auth0|123", "naïve-😀"])
def test_ordinary_ids_stay_readable(text: str) -> None:
    assert keys.escape(text) == text


@pytest.mark.parametrize("text", ["\ud800", "a\udfffb", "%\ud800"])
def test_a_lone_surrogate_is_refused_everywhere(text: str) -> None:
    calls: list[Any] = [keys.escape, keys.encode, keys.namespace, keys.check_key, keys.index_text]
    for call in calls:
        with pytest.raises(BadKey):
            call(text)


@pytest.mark.parametrize("part", ["a!b", "%", "%2", "%4a", "%26", "%2f", "%zz", "a b", "\0", "%\n0", "%~00"])
def test_what_no_text_escapes_to_is_not_unescaped(part: str) -> None:
    with pytest.raises(BadKey):
        keys.unescape(part)


# --- Numbers, times, other parts


@given(integers, integers)
@example(-1, 0)
@example(-16, -17)
@example(15, 16)
@example(-(2**256), 2**256 - 1)
def test_integers_keep_their_order_both_ways(a: int, b: int) -> None:
    assert (keys.encode(a).encode() < keys.encode(b).encode()) == (a < b)
    assert (keys.encode(a, descending=True).encode() < keys.encode(b, descending=True).encode()) == (a > b)


@given(floats, floats)
@example(-0.0, 0.0)
@example(-math.inf, -1e308)
@example(5e-324, 0.0)
def test_floats_keep_their_order_both_ways(a: float, b: float) -> None:
    assert (keys.encode(a) < keys.encode(b)) == (a < b) and (keys.encode(a) == keys.encode(b)) == (a == b)
    assert (keys.encode(a, descending=True) < keys.encode(b, descending=True)) == (a > b)


@given(moments, moments)
@example(datetime(2020, 1, 1, 12, tzinfo=timezone(timedelta(hours=2))), datetime(2020, 1, 1, 10, tzinfo=UTC))
@example(datetime(1969, 12, 31, 23, 59, 59, 999999, tzinfo=UTC), datetime(1970, 1, 1, tzinfo=UTC))
def test_times_keep_the_order_of_their_moments_both_ways(a: datetime, b: datetime) -> None:
    assert (keys.encode(a) < keys.encode(b)) == (a < b) and (keys.encode(a) == keys.encode(b)) == (a == b)
    assert (keys.encode(a, descending=True) < keys.encode(b, descending=True)) == (a > b)


@given(st.one_of(integers, floats, moments, st.booleans()), st.booleans())
def test_an_encoded_part_comes_back(value: Any, descending: bool) -> None:
    part = keys.encode(value, descending)

    assert keys.decode(part, type(value), descending) == value
    assert keys.unescape(part) == part


@given(texts)
def test_encoded_text_comes_back(text: str) -> None:
    assert keys.decode(keys.encode(text), str) == text


def test_a_uuid_is_kept_as_its_text() -> None:
    value = uuid4()

    assert keys.encode(value) == str(value) == keys.encode(str(value))
    assert keys.decode(str(value), UUID) == value


def test_false_comes_before_true_and_after_it_when_descending() -> None:
    assert keys.encode(False) < keys.encode(True) and keys.encode(False, True) > keys.encode(True, True)


def test_random_integers_of_all_sizes_sort_as_their_keys() -> None:
    source = random.Random(5)
    numbers = sorted({source.choice((-1, 1)) * source.getrandbits(source.randint(1, 256)) for _ in range(5000)})

    parts = [keys.encode(number).encode() for number in numbers]

    assert parts == sorted(parts) and len(set(parts)) == len(numbers)
    assert not any(byte <= ord("%") for part in parts for byte in part)


def test_the_form_of_parts_does_not_change() -> None:
    assert [keys.encode(n) for n in (0, 1, 15, 16, -1, -16, -17, 2**63)] == [
        "h0",
        "h1",
        "hf",
        "i10",
        "ff",
        "f0",
        "eef",
        "w8000000000000000",
    ]
    assert keys.encode(1.5) == "bff8000000000000" and keys.encode(-1.5) == "4007ffffffffffff"
    assert keys.encode(datetime(2026, 1, 2, 3, 4, 5, 6, tzinfo=UTC)) == "t6475ef64cf346"
    assert keys.encode("50% off!") == "50%25%20off%21"


class _Colour(StrEnum):
    RED = "red"


class _Level(IntEnum):
    HIGH = 3


def test_an_enum_of_text_or_integers_counts_as_its_value() -> None:
    assert keys.encode(_Colour.RED) == "red" and keys.encode(_Level.HIGH) == keys.encode(3)


@pytest.mark.parametrize(
    "value",
    [
        None,
        b"a",
        (1,),
        object(),
        1j,
        math.nan,
        datetime(2020, 1, 1),  # noqa: DTZ001 (that is the point)
        2**256,
        -(2**256) - 1,
        datetime.max.replace(tzinfo=timezone(timedelta(hours=-1))),
        datetime.min.replace(tzinfo=timezone(timedelta(hours=1))),
    ],
)
def test_what_has_no_order_or_no_exact_form_is_no_part(value: Any) -> None:
    with pytest.raises(BadKey):
        keys.encode(value)


@pytest.mark.parametrize("value", ["a", uuid4()])
def test_text_has_no_descending_order(value: Any) -> None:
    with pytest.raises(BadKey):
        keys.encode(value, descending=True)


@pytest.mark.parametrize(
    ("part", "type_"),
    [
        ("", int),
        ("h", int),
        ("i01", int),
        ("hF", int),
        ("h 1", int),
        ("h1_0", int),
        ("1", int),
        ("f1f", int),
        ("", bool),
        ("2", bool),
        ("", float),
        ("bff8", float),
        ("7fffffffffffffff", float),
        ("fff8000000000001", float),
        ("8" * 17, float),
        ("x7" + "f" * 15, datetime),
        ("zffffffffffffffffffff", datetime),
        ("A" * 32, UUID),
        ("%41", str),
        ("%3A", str),
        ("h1", bytes),
    ],
)
def test_another_spelling_of_a_part_is_refused(part: str, type_: Any) -> None:
    with pytest.raises(BadKey):
        keys.decode(part, type_)


# --- Prefixes


@given(texts, texts)
@example("\ud7ff", "x")
@example("a\U0010ffff\U0010ffff", "b")
@example("\U0010ffff", "\U0010ffff")
@example("a\ud7ff\U0010ffff", "")
def test_a_prefix_and_its_end_hold_just_the_keys_that_start_with_it(prefix: str, rest: str) -> None:
    end = keys.prefix_end(prefix)

    inside = (prefix + rest).encode()
    assert prefix.encode() <= inside and (end is None or inside < end.encode())
    other = rest.encode()
    if not rest.startswith(prefix):
        assert other < prefix.encode() or (end is not None and other >= end.encode())


def test_the_end_of_a_prefix_skips_the_surrogates_and_the_last_code_point() -> None:
    assert keys.prefix_end("a\ud7ff") == "a\ue000"
    assert keys.prefix_end("a\U0010ffff\U0010ffff") == "b"
    assert keys.prefix_end("\U0010ffff") is None
    assert keys.prefix_end("") is None
    assert keys.prefix_end("kv:session:") == "kv:session;"


def test_every_kind_of_key_of_a_collection_is_isolated() -> None:
    prefixes = [
        keys.record_prefix(ns, collection)
        for ns in ("kv", "kv-a", keys.namespace("kv:a"))
        for collection in ("a", "a-b", "session")
    ]
    prefixes += [keys.index_prefix("kv", "a", name) for name in ("email", "email-2", "defs")]
    prefixes += [keys.meta_prefix("kv", "a", "stat"), keys.meta_prefix("kv", "a", "birth")]

    for one in prefixes:
        assert [other for other in prefixes if other.startswith(one)] == [one]


def test_the_form_of_whole_keys_does_not_change() -> None:
    assert keys.record_prefix("kv", "session") == "kv:session:"
    assert keys.index_prefix("kv", "session", "user_id") == "kv:session#user_id:"
    assert keys.meta_key("kv", "session", "def") == "kv:session#def"
    assert keys.meta_prefix("kv", "session", "stat") == "kv:session#stat:"


@pytest.mark.parametrize("name", ["def", "stat", "birth", "deleting"])
def test_an_index_may_not_take_a_reserved_name(name: str) -> None:
    with pytest.raises(BadKey):
        keys.index_prefix("kv", "session", name)


@pytest.mark.parametrize(("key", "expected"), [("a:b:c", "a"), ("plain", ""), (":a", ""), ("", ""), ("a:", "a")])
def test_the_partition_is_the_text_before_the_first_colon(key: str, expected: str) -> None:
    assert keys.partition(key) == expected


# --- Names, namespaces, whole keys


@pytest.mark.parametrize("name", ["a", "a_b.c-9", "0", "x" * 64])
def test_a_good_name_is_given_back(name: str) -> None:
    assert keys.check_name(name, "collection") == name


@pytest.mark.parametrize("name", ["", "A", "a b", "a:b", "a#b", "a!b", "é", "a\n", "x" * 65, None, 5, b"a"])
def test_a_bad_name_is_refused_and_the_error_says_of_what(name: Any) -> None:
    with pytest.raises(BadKey, match="collection"):
        keys.check_name(name, "collection")


@given(texts.filter(bool), texts.filter(bool))
@example("a:b", "a%3Ab")
@example("a", "a:")
def test_namespaces_come_back_stay_apart_and_are_partitions(a: str, b: str) -> None:
    try:
        one, other = keys.namespace(a), keys.namespace(b)
    except BadKey:
        return

    assert keys.unescape(one) == a and (one == other) == (a == b)
    assert keys.partition(keys.record_prefix(one, "session")) == one


def test_a_namespace_has_at_most_64_bytes_once_escaped() -> None:
    assert keys.namespace("auth0|123") == "auth0|123"
    assert keys.namespace("é" * 32) == "é" * 32
    for text in ("é" * 33, "x" * 65, "!" * 22, ""):
        with pytest.raises(BadKey):
            keys.namespace(text)


@pytest.mark.parametrize("key", ["a", "app:user:42", "x" * 512, "é" * 256, "\0", " ", "a!b#c%"])
def test_any_text_within_the_limit_is_a_key(key: str) -> None:
    keys.check_key(key)


@pytest.mark.parametrize("key", ["", None, 5, b"a", ["a"]])
def test_what_is_no_text_or_empty_is_no_key(key: Any) -> None:
    with pytest.raises(BadKey):
        keys.check_key(key)


def test_a_key_over_the_limit_is_refused_with_its_size_in_bytes() -> None:
    with pytest.raises(KeyTooLong) as caught:
        keys.check_key("é" * 257)

    assert (caught.value.size, caught.value.limit) == (514, 512)
    keys.check_key("é" * 257, limit=514)
    keys.check_key("x" * 10_000, limit=None)


# --- Long index values


@given(texts, st.integers(0, 400))
def test_a_long_index_value_is_cut_at_a_code_point_and_never_inside_an_escape(unit: str, times: int) -> None:
    text = unit * times

    part, lossy = keys.index_text(text)

    whole = keys.escape(text)
    assert lossy == (len(whole.encode()) > keys.INDEX_LIMIT)
    assert len(part.encode()) <= keys.INDEX_LIMIT and not set(part) & {chr(code) for code in range(0x25)}
    if lossy:
        head, digest = part.split("%~")
        assert whole.startswith(head) and 117 <= len(head.encode()) <= 120 and re.fullmatch("[0-9a-f]{32}", digest)
        assert keys.unescape(head) == text[: len(keys.unescape(head))]
    else:
        assert part == whole


def test_the_limit_of_an_index_value_counts_encoded_bytes() -> None:
    for text in ("x" * 160, "é" * 80, "!" * 53):
        assert keys.index_text(text) == (keys.escape(text), False)
    for text in ("x" * 161, "é" * 81, "!" * 54):
        assert keys.index_text(text)[1]


def test_long_values_with_one_beginning_differ_and_none_is_met_by_a_short_one() -> None:
    long = "x" * 200
    part, _ = keys.index_text(long)

    assert part != keys.index_text(long + "y")[0]
    assert part != keys.index_text(part)[0] != keys.index_text(part.replace("%~", ""))[0]
