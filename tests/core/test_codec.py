"""Bytes that come back as what was written, in both codecs, or an error that says why not."""

from __future__ import annotations

import json
import math
import pickle
from collections import OrderedDict, defaultdict
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta, timezone
from decimal import Decimal
from enum import IntEnum, StrEnum
from functools import reduce
from typing import Any, Generic, Literal, NamedTuple, TypedDict, TypeVar
from uuid import UUID, uuid4

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from kvpersist.codec import (
    DEPTH_LIMIT,
    JSON,
    MSGPACK,
    RAW,
    SCHEMA_LIMIT,
    CodecName,
    Framed,
    RecordCodec,
    decode_plain,
    encode_plain,
    frame,
    unframe,
)
from kvpersist.errors import BadOption, CorruptRecord, FormatMismatch, Unencodable

KEY = "kv:session:é-1"
CODECS: tuple[CodecName, ...] = ("msgpack", "json")
BYTES = {"msgpack": MSGPACK, "json": JSON}
BIG = 2**64

both = pytest.mark.parametrize("codec", CODECS)

texts = st.text(max_size=8)
tags = st.sampled_from(["$bytes", "$datetime", "$int", "$float", "$dict", "$", "$$", "$other", "a", ""])
zones = st.integers(-1439, 1439).map(lambda minutes: timezone(timedelta(minutes=minutes)))
moments = st.datetimes(datetime(1, 1, 3), datetime(9999, 12, 29), timezones=zones)  # noqa: DTZ001 (the zone is added)
leaves = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-(2**70), 2**70)
    | st.sampled_from([2**63 - 1, 2**63, -(2**63), -(2**63) - 1, 2**64 - 1, 2**64, 10**500, -(10**500)])
    | st.floats(allow_nan=False)
    | texts
    | st.binary(max_size=8)
    | moments
)
values = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(texts | tags, inner, max_size=3)
        | st.dictionaries(tags, inner, min_size=1, max_size=1)
    ),
    max_leaves=12,
)


class Call(msgspec.Struct):
    id: str
    arguments: Any = None


class Session(msgspec.Struct, kw_only=True):
    id: str
    number: int = 0
    score: float | None = None
    created_at: datetime | None = None
    secret: bytes = b""
    tags: list[str] = []
    calls: list[Call] | None = None
    metadata: dict[str, Any] = {}


@dataclass
class Point:
    x: int
    meta: dict[str, Any] = field(default_factory=dict[str, Any])


class Row(TypedDict, total=False):
    id: str
    meta: Any


def alike(a: Any, b: Any) -> bool:
    """Equal, of equal types, all the way down; NaN equals NaN, and -0.0 is not 0.0."""
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return list(a) == list(b) and all(alike(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(alike, a, b))
    if isinstance(a, float):
        return repr(a) == repr(b)
    if isinstance(a, datetime):
        return a == b and b.utcoffset() == timedelta(0)
    return a == b


def round_trip(value: Any, codec: CodecName) -> Any:
    return decode_plain(KEY, encode_plain(KEY, value, codec))


def nested(depth: int, leaf: Any = 1) -> Any:
    return reduce(lambda inner, _: [inner], range(depth), leaf)


# --- The frame


@pytest.mark.parametrize("codec", [RAW, MSGPACK, JSON])
@pytest.mark.parametrize("schema", [0, 1, 127, 128, 16_383, 16_384, SCHEMA_LIMIT])
@pytest.mark.parametrize("payload", [b"", b"\0", b"kv1 json", b"\n\n", bytes(range(256))])
def test_a_framed_payload_comes_back_with_its_codec_and_schema(codec: int, schema: int, payload: bytes) -> None:
    assert unframe(KEY, frame(KEY, payload, codec, schema)) == Framed(codec, schema, payload)


def test_the_form_of_a_frame_does_not_change() -> None:
    assert frame("kv:a:1", b"abc", RAW, 0).hex() == "01003f84c1b5616263"
    assert frame("kv:a:1", b"abc", MSGPACK, 300).hex() == "02ac02117fc232616263"
    assert frame("kv:a:1", b"{}", JSON, 7) == b"kv1 json 7 dacf8938\n{}"


@pytest.mark.parametrize("codec", [RAW, MSGPACK, JSON])
@pytest.mark.parametrize("schema", [0, 1, 300])
def test_every_flipped_bit_is_found_and_the_key_named(codec: int, schema: int) -> None:
    data = frame(KEY, b'{"a": 1}', codec, schema)

    for bit in range(len(data) * 8):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises(CorruptRecord) as caught:
            unframe(KEY, bytes(flipped))
        assert caught.value.key == KEY


@pytest.mark.parametrize("codec", [RAW, MSGPACK, JSON])
def test_every_truncation_and_every_appended_byte_is_found(codec: int) -> None:
    data = frame(KEY, b'{"a": 1}', codec, 1)

    for damaged in [data[:length] for length in range(len(data))] + [data + b"\0", data + b"\n", b"\0" + data]:
        with pytest.raises(CorruptRecord):
            unframe(KEY, damaged)


@pytest.mark.parametrize("codec", [RAW, MSGPACK, JSON])
def test_a_value_under_another_key_is_found(codec: int) -> None:
    with pytest.raises(CorruptRecord, match="kv:b"):
        unframe("kv:b", frame("kv:a", b"{}", codec, 1))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x02",
        b"\x02\x80",
        b"\x02\x80\x00\0\0\0\0",
        b"\x02\xff\xff\xff\xff\x7f\0\0\0\0",
        b"\x00\x00\0\0\0\0",
        b"kv1 json",
        b"kv1 json 01 00000000\n",
        b"kv1 json 1 0000000\n",
        b"kv1 json 999999999 00000000\n",
        b"kv2 json 1 00000000\n",
        b"{}",
    ],
)
def test_what_is_no_frame_is_corrupt(data: bytes) -> None:
    for reader in (unframe, decode_plain, RecordCodec(Session).decode):
        with pytest.raises(CorruptRecord):
            reader(KEY, data)


def test_the_crc_of_a_json_line_has_one_spelling() -> None:
    data = next(data for n in range(99) if (data := frame(KEY, b"{}", JSON, n)).split()[3].upper() != data.split()[3])

    line, payload = data.split(b"\n")
    with pytest.raises(CorruptRecord):
        unframe(KEY, line[:-8] + line[-8:].upper() + b"\n" + payload)


def test_a_schema_version_has_one_spelling() -> None:
    data = frame(KEY, b"abc", MSGPACK, 1)

    with pytest.raises(CorruptRecord, match="schema version"):
        unframe(KEY, data[:1] + b"\x81\x00" + data[2:])


# --- Free-form values


@both
@given(value=values)
@example(value={"$bytes": "aGk="})
@example(value={"$dict": {"$dict": {"$int": "0x10000000000000000"}}})
@example(value={"$dict": 1, "a": {"$float": math.inf}})
@example(value=[-0.0, math.inf, -math.inf, 1e22, 5e-324, 1.7976931348623157e308, 1.0])
@example(value=datetime(1, 1, 1, tzinfo=UTC))
@example(value=datetime(9999, 12, 31, 23, 59, 59, 999999, tzinfo=UTC))
@example(value=datetime(1969, 12, 31, 23, 59, 59, 999999, tzinfo=UTC))
@example(value=["\0", "\ud7ff\ue000\U0010ffff", "2020-01-01T00:00:00Z", '"\\/\n'])
def test_a_free_form_value_comes_back_alike(codec: CodecName, value: Any) -> None:
    before = pickle.dumps(value)

    assert alike(value, round_trip(value, codec))
    assert pickle.dumps(value) == before


@both
def test_nan_comes_back(codec: CodecName) -> None:
    assert alike([math.nan], round_trip([math.nan], codec))


@both
@pytest.mark.parametrize("value", [None, False, 0, 0.0, "", b"", [], {}, {"": None}, [[]], [{}]])
def test_empty_and_false_values_come_back_as_themselves(codec: CodecName, value: Any) -> None:
    assert alike(value, round_trip(value, codec))


@both
def test_integers_without_limit_come_back(codec: CodecName) -> None:
    assert round_trip([1 << 100_000, -(1 << 100_000)], codec) == [1 << 100_000, -(1 << 100_000)]


def test_json_values_can_be_read_by_people_and_other_tools() -> None:
    data = encode_plain("a", {"text": "é", "raw": b"hi", "big": BIG, "at": datetime(2026, 1, 2, tzinfo=UTC)}, "json")

    line, payload = data.split(b"\n", 1)
    assert line.isascii() and json.loads(payload) == {
        "text": "é",
        "raw": {"$bytes": "aGk="},
        "big": {"$int": "0x10000000000000000"},
        "at": {"$datetime": "2026-01-02T00:00:00+00:00"},
    }
    assert b'\n  "text"' in payload


def test_the_form_of_packed_values_does_not_change() -> None:
    data = encode_plain("a", {"big": BIG, "neg": -BIG, "at": datetime(2026, 1, 2, tzinfo=UTC), "b": b"x"}, "msgpack")

    assert unframe("a", data).payload.hex() == (
        "84a3626967c70901010000000000000000a36e6567c70901ff0000000000000000a26174d6ff69570a80a162c40178"
    )


def test_raw_bytes_come_back_as_bytes() -> None:
    assert decode_plain(KEY, frame(KEY, b"\xc1 anything", RAW, 0)) == b"\xc1 anything"


class _Level(IntEnum):
    HIGH = 3


class _Colour(StrEnum):
    RED = "red"


class _Ratio(float):
    pass


class _Moment(datetime):
    pass


class _Blob(bytes):
    def __bytes__(self) -> bytes:
        return b"lie"


@both
def test_subclasses_come_back_as_the_plain_type(codec: CodecName) -> None:
    kept = {
        "level": _Level.HIGH,
        "colour": _Colour.RED,
        "ratio": _Ratio(0.5),
        "blob": _Blob(b"truth"),
        "at": _Moment(2026, 1, 2, tzinfo=UTC),
        "more": OrderedDict(a=1),
        "most": defaultdict(list[int], {"b": [2]}),
        _Colour.RED: 1,
    }

    plain = {
        "level": 3,
        "colour": "red",
        "ratio": 0.5,
        "blob": b"truth",
        "at": datetime(2026, 1, 2, tzinfo=UTC),
        "more": {"a": 1},
        "most": {"b": [2]},
        "red": 1,
    }
    assert alike(plain, round_trip(kept, codec))


class _Finer(datetime):
    """Knows more than a datetime holds, as those of some libraries do."""

    def __ne__(self, other: object) -> bool:
        return True


@both
@pytest.mark.parametrize(
    ("value", "path"),
    [
        ({"a": {"tags": ["x", "y", {1}]}}, "a.tags[2]"),
        ({"a": (1, 2)}, "a"),
        ([Decimal(1)], "[0]"),
        ({"a b": uuid4()}, "['a b']"),
        ({"a": [datetime(2020, 1, 1)]}, "a[0]"),  # noqa: DTZ001 (that is the point)
        ({"a": date(2020, 1, 1)}, "a"),
        ({"a": timedelta(1)}, "a"),
        ({"a": datetime.max.replace(tzinfo=timezone(timedelta(hours=-1)))}, "a"),
        ({"a": _Finer(2020, 1, 1, tzinfo=UTC)}, "a"),
        ({"a": {1: 2}}, "a"),
        ({"a": {"b": 1, None: 2}}, "a"),
        ({"a": {b"b": 1}}, "a"),
        ({"a": "\ud800"}, "a"),
        ({"a": [1, ["\udfff"]]}, "a[1][0]"),
        ({"a": {"\ud800": 1}}, "a"),
        ({"$a": {"b": "\ud800", "c": BIG}}, "['$a'].b"),
        ({"a": bytearray(b"x")}, "a"),
        ({"a": memoryview(b"x")}, "a"),
        ({"a": object()}, "a"),
        ({"a": Call("x")}, "a"),
        ({"a": Point(1)}, "a"),
        ({"a": Call}, "a"),
        ({"a": msgspec.Raw(b"1")}, "a"),
        ({"a": msgspec.msgpack.Ext(1, b"x")}, "a"),
        ({"a": msgspec.UNSET}, "a"),
        ({"a": iter([])}, "a"),
        (1j, ""),
    ],
)
def test_what_would_not_come_back_is_refused_with_its_path(codec: CodecName, value: Any, path: str) -> None:
    with pytest.raises(Unencodable) as caught:
        encode_plain(KEY, value, codec)

    assert caught.value.path == path


@both
def test_a_value_within_itself_is_refused(codec: CodecName) -> None:
    value: list[Any] = []
    value.append({"again": value})

    with pytest.raises(Unencodable, match="200"):
        encode_plain(KEY, value, codec)


@both
def test_nesting_is_kept_to_the_limit_and_refused_beyond_it(codec: CodecName) -> None:
    deepest = nested(DEPTH_LIMIT)

    assert round_trip(deepest, codec) == deepest
    with pytest.raises(Unencodable):
        encode_plain(KEY, [deepest], codec)


@both
def test_the_deepest_value_of_lookalike_tags_comes_back(codec: CodecName) -> None:
    deepest: Any = reduce(lambda inner, _: {"$dict": inner}, range(DEPTH_LIMIT), 1)

    assert round_trip(deepest, codec) == deepest


@pytest.mark.parametrize("depth", [100_000])
def test_stored_bytes_that_nest_without_end_are_corrupt(depth: int) -> None:
    for payload, codec in ((b"\x91" * depth + b"\xc0", MSGPACK), (b"[" * depth + b"]" * depth, JSON)):
        with pytest.raises(CorruptRecord) as caught:
            decode_plain(KEY, frame(KEY, payload, codec, 0))
        assert isinstance(caught.value.__cause__, RecursionError)


@pytest.mark.parametrize(
    "text",
    [
        '{"$bytes": 5}',
        '{"$bytes": "a"}',
        '{"$bytes": "aGk"}',
        '{"$bytes": "aGl="}',
        '{"$bytes": "aGk=\\n"}',
        '{"$int": "5"}',
        '{"$int": "0x5"}',
        '{"$int": "18446744073709551616"}',
        '{"$int": "0x010000000000000000"}',
        '{"$int": "0X10000000000000000"}',
        '{"$int": ""}',
        '{"$float": "1.5"}',
        '{"$float": "NaN"}',
        '{"$float": "infinity"}',
        '{"$datetime": "2020-01-01"}',
        '{"$datetime": "2020-01-01T00:00:00"}',
        '{"$datetime": "2020-01-01T02:00:00+02:00"}',
        '{"$datetime": "2020-01-01T00:00:00Z"}',
        '{"$datetime": "0001-01-01T00:00:00+14:00"}',
        '{"$dict": {}}',
        '{"$dict": {"a": 1}}',
        '{"$dict": {"$a": 1, "b": 2}}',
        '{"$dict": [1]}',
        '{"$dict": "x"}',
        '{"$other": 1}',
        '{"$": 1}',
        '{"a": [{"$bytes": null}]}',
        "{",
        "[1] 2",
        "NaN",
        '"\\ud800"',
        "\xff",
    ],
)
def test_json_that_no_value_is_written_as_is_corrupt(text: str) -> None:
    data = frame(KEY, text.encode("latin-1"), JSON, 0)

    with pytest.raises(CorruptRecord) as caught:
        decode_plain(KEY, data)
    assert caught.value.key == KEY and caught.value.__cause__ is not None


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\xc1",
        b"\x91",
        b"\xc0\xc0",
        b"\xa2\xff\xff",
        b"\xd4\x02x",  # an extension of somebody else
        b"\xd4\x00x",
        b"\x81\xa1a\xc7\x04\x7fabcd",
        b"\xd6\xff\x00\x00\x00",
        b"\xc7\x0c\xff\xff\xff\xff\xff\x00\x00\x00\x00\x00\x00\x00\x00",  # 4294967295 nanoseconds in a second
        b"\x81\x81\x01\x01\x01",
    ],
)
def test_msgpack_that_is_damaged_or_foreign_is_corrupt_and_never_revived(payload: bytes) -> None:
    with pytest.raises(CorruptRecord) as caught:
        decode_plain(KEY, frame(KEY, payload, MSGPACK, 0))
    assert caught.value.__cause__ is not None


# --- Records


def session(**fields: Any) -> Session:
    return Session(**{"id": "s1", **fields})


@both
@given(
    value=values,
    metadata=st.dictionaries(texts | tags, values, max_size=2),
    at=moments,
    secret=st.binary(max_size=5),
    score=st.floats(allow_nan=False, allow_infinity=False),
    number=st.integers(-(2**63), 2**64 - 1),
)
def test_a_record_comes_back_alike_and_is_left_as_it_was(
    codec: CodecName, value: Any, metadata: dict[str, Any], at: datetime, secret: bytes, score: float, number: int
) -> None:
    record = session(
        number=number, score=score, created_at=at, secret=secret, calls=[Call("c", value)], metadata=metadata
    )
    before = pickle.dumps((value, metadata))
    records = RecordCodec(Session, codec=codec)

    found = records.decode(KEY, records.encode(KEY, record))

    assert found == record
    assert found.calls is not None and alike(value, found.calls[0].arguments) and alike(metadata, found.metadata)
    assert record.calls is not None and record.calls[0].arguments is value and record.metadata is metadata
    assert pickle.dumps((value, metadata)) == before


@both
@given(value=values, meta=st.dictionaries(texts | tags, values, max_size=2))
def test_dataclasses_typed_dicts_and_dicts_come_back_alike(codec: CodecName, value: Any, meta: dict[str, Any]) -> None:
    for type_, record in ((Point, Point(1, meta)), (Row, {"id": "r", "meta": value}), (Row, {}), (dict, meta)):
        records = RecordCodec[Any](type_, codec=codec)

        found = records.decode(KEY, records.encode(KEY, record))

        assert found == record and type(found) is type(record)
        if isinstance(record, dict):
            assert alike(record, found)


@both
def test_either_codec_is_read_whichever_is_written(codec: CodecName) -> None:
    record = session(calls=[Call("c", {"big": BIG, "raw": b"x"})], metadata={"$bytes": "x"})
    data = RecordCodec(Session, codec=codec).encode(KEY, record)

    assert unframe(KEY, data).codec == BYTES[codec]
    for other in CODECS:
        assert RecordCodec(Session, codec=other).decode(KEY, data) == record


@both
def test_a_record_carries_its_version(codec: CodecName) -> None:
    for version in (1, 2, 200):
        assert unframe(KEY, RecordCodec(Session, codec=codec, version=version).encode(KEY, session())).schema == version


@both
def test_every_flip_and_truncation_of_a_record_is_found(codec: CodecName) -> None:
    records = RecordCodec(Session, codec=codec)
    data = records.encode(KEY, session(metadata={"a": 1}))

    damaged = [data[:length] for length in range(len(data))] + [data + b"\0"]
    damaged += [
        data[:at] + bytes((data[at] ^ 1 << bit,)) + data[at + 1 :] for at in range(len(data)) for bit in range(8)
    ]
    for bytes_ in damaged:
        with pytest.raises(CorruptRecord) as caught:
            records.decode(KEY, bytes_)
        assert caught.value.key == KEY


@both
def test_a_record_under_another_key_is_found(codec: CodecName) -> None:
    records = RecordCodec(Session, codec=codec)

    with pytest.raises(CorruptRecord):
        records.decode("kv:session:2", records.encode(KEY, session()))


@pytest.mark.parametrize(
    ("payload", "codec"),
    [
        (b"\x81\xa2id\x05", MSGPACK),
        (b"\x80", MSGPACK),
        (b"\x93\x01\x02\x03", MSGPACK),
        (b"\x82\xa2id\xa1a\xa8metadata\x05", MSGPACK),
        (b"\x82\xa2id\xa1a\xa8metadata\x81\xa1a\xd4\x09x", MSGPACK),
        (b'{"id": 5}', JSON),
        (b"null", JSON),
        (b'{"id": "a", "metadata": {"$bytes": "aGk="}}', JSON),
        (b'{"id": "a", "metadata": {"$other": 1}}', JSON),
        (b'{"id": "a", "calls": [{"id": "x", "arguments": {"$dict": 1}}]}', JSON),
        (b"raw", RAW),
    ],
)
def test_bytes_that_are_another_record_are_corrupt(payload: bytes, codec: int) -> None:
    records = RecordCodec(Session)

    with pytest.raises(CorruptRecord) as caught:
        records.decode(KEY, frame(KEY, payload, codec, 1))
    assert codec == RAW or caught.value.__cause__ is not None


@both
def test_fields_that_are_gone_from_the_type_are_passed_over(codec: CodecName) -> None:
    payload = {"msgpack": msgspec.msgpack.encode, "json": msgspec.json.encode}[codec]({"id": "a", "gone": 1})

    assert RecordCodec(Session).decode(KEY, frame(KEY, payload, BYTES[codec], 1)) == Session(id="a")


class Sub(Session):
    more: int = 5


class NoEq(msgspec.Struct, eq=False):
    id: str
    at: float = 0.0


class Holder(msgspec.Struct):
    inner: NoEq
    call: Call | None = None


class SubCall(Call):
    more: int = 1


@both
@pytest.mark.parametrize(
    ("record", "path"),
    [
        ({"id": 5}, "id"),
        ({"id": None}, "id"),
        ({"id": b"x"}, "id"),
        ({"id": uuid4()}, "id"),
        ({"id": datetime(2020, 1, 1, tzinfo=UTC)}, "id"),
        ({"id": "\ud800"}, "id"),
        ({"number": "5"}, "number"),
        ({"number": 1.0}, "number"),
        ({"number": 2**64}, "number"),
        ({"number": Decimal(5)}, "number"),
        ({"secret": "text"}, "secret"),
        ({"created_at": "2020-01-01T00:00:00Z"}, "created_at"),
        ({"created_at": 0}, "created_at"),
        ({"created_at": datetime.max.replace(tzinfo=timezone(timedelta(hours=-1)))}, "created_at"),
        ({"tags": ("a",)}, "tags"),
        ({"tags": {"a"}}, "tags"),
        ({"tags": ["a", 5]}, "tags[1]"),
        ({"tags": ["a", "\udfff"]}, "tags[1]"),
        ({"tags": [object()]}, "tags[0]"),
        ({"metadata": None}, "metadata"),
        ({"metadata": [1]}, "metadata"),
        ({"metadata": {"tags": ["a", {"b": {1}}]}}, "metadata.tags[1].b"),
        ({"metadata": {1: 2}}, "metadata"),
        ({"metadata": {"a": "\ud800"}}, "metadata.a"),
        ({"metadata": {"a": nested(DEPTH_LIMIT)}}, None),
        ({"calls": [Call("x"), Call("y", (1,))]}, "calls[1].arguments"),
        ({"calls": [Call("x"), SubCall("y")]}, "calls[1]"),
        ({"calls": (Call("x", {"a": (1,)}),)}, "calls"),
        ({"calls": [{"id": "x", "arguments": {1: 2}}]}, "calls[0]"),
        ({"calls": [Call("x", datetime(2020, 1, 1))]}, "calls[0].arguments"),  # noqa: DTZ001 (that is the point)
    ],
)
def test_a_field_that_would_not_come_back_is_refused_with_its_path(
    codec: CodecName, record: dict[str, Any], path: str | None
) -> None:
    records = RecordCodec(Session, codec=codec)

    with pytest.raises(Unencodable) as caught:
        records.encode(KEY, session(**record))

    assert path is None or caught.value.path == path


@both
def test_a_typed_list_within_itself_is_refused(codec: CodecName) -> None:
    endless: Any = ["a"]
    endless.append(endless)

    with pytest.raises(Unencodable, match="deep") as caught:
        RecordCodec(Session, codec=codec).encode(KEY, session(tags=endless))
    assert caught.value.path == "tags"


@both
@pytest.mark.parametrize("record", [None, 5, {"id": "a"}, Call("x"), Sub(id="a"), Session])
def test_what_is_not_exactly_a_record_of_the_type_is_refused(codec: CodecName, record: Any) -> None:
    with pytest.raises(Unencodable):
        RecordCodec(Session, codec=codec).encode(KEY, record)


@both
def test_unknown_keys_of_a_typed_dict_and_keys_that_are_no_text_are_refused(codec: CodecName) -> None:
    for type_, record in ((Row, {"id": "a", "more": 1}), (dict, {1: 2}), (dict, [1]), (Row, [1]), (Row, {"id": 5})):
        with pytest.raises(Unencodable):
            RecordCodec[Any](type_, codec=codec).encode(KEY, record)


def test_nan_in_a_typed_field_is_kept_by_msgpack_and_refused_by_json() -> None:
    record = session(score=math.nan)
    records = RecordCodec(Session)

    found = records.decode(KEY, records.encode(KEY, record))

    assert found.score is not None and math.isnan(found.score)
    for bad in (math.nan, math.inf):
        with pytest.raises(Unencodable) as caught:
            RecordCodec(Session, codec="json").encode(KEY, session(score=bad))
        assert caught.value.path == "score"


@both
def test_structs_without_equality_go_by_their_fields(codec: CodecName) -> None:
    records = RecordCodec(Holder, codec=codec)

    found = records.decode(KEY, records.encode(KEY, Holder(NoEq("a", 1.5))))

    assert (found.inner.id, found.inner.at) == ("a", 1.5)
    for bad, path in ((Holder(NoEq("a"), SubCall("x")), "call"), (Holder(NoEq(uuid4())), "inner.id")):  # type: ignore[arg-type]
        with pytest.raises(Unencodable) as caught:
            records.encode(KEY, bad)
        assert caught.value.path == path


class Words(msgspec.Struct, tag="words"):
    content: Any = None


class MoreWords(Words, tag="more"):
    title: Any = None


class Picture(msgspec.Struct, tag="picture"):
    meta: dict[str, Any]


class Frozen(msgspec.Struct, frozen=True, tag=True, rename="camel", omit_defaults=True):
    some_id: str
    any_value: Any = None
    union: str | list[dict[str, Any]] | None = None
    by_name: dict[str, Call] = {}
    by_number: dict[int, Any] = {}
    pair: tuple[int, Any] = (0, None)
    many: tuple[Any, ...] = ()
    one_of: Words | MoreWords | Picture | None = None
    point: Point | None = None
    thing: object = None
    deep: list[list[dict[str, list[Any]]]] = []
    counts: dict[str, int] = {}


@both
@given(value=values)
@example(value={"$int": BIG})
def test_free_form_values_are_found_wherever_the_type_has_them(codec: CodecName, value: Any) -> None:
    record = Frozen(
        "a",
        any_value=value,
        union=[{"a": value}],
        by_name={"x": Call("c", value)},
        by_number={5: value, -1: value},
        pair=(1, value),
        many=(value, 1),
        one_of=Picture({"a": value}),
        point=Point(1, {"a": value}),
        thing=value,
        deep=[[{"a": [value], "b": []}]],
        counts={"a": 1, "b": 2},
    )
    records = RecordCodec(Frozen, codec=codec)

    found = records.decode(KEY, records.encode(KEY, record))

    assert found == record
    assert isinstance(found.one_of, Picture) and isinstance(found.union, list) and found.point is not None
    places = [found.any_value, found.union[0]["a"], found.by_name["x"].arguments, found.by_number[5], found.pair[1]]
    places += [found.many[0], found.one_of.meta["a"], found.point.meta["a"], found.thing]
    places += [found.deep[0][0]["a"][0]]
    for place in places:
        assert alike(value, place)


@both
@pytest.mark.parametrize(
    "fields",
    [
        {"union": "text"},
        {"union": None},
        {"union": []},
        {"one_of": None},
        {"one_of": Words({"$a": {"$b": b"x"}})},
        {"one_of": Words(["$a", BIG])},
        {"one_of": MoreWords({"$a": b"x"}, b"y")},
        {"one_of": Picture({"$a": BIG})},
    ],
)
def test_a_union_is_followed_by_the_class_of_its_value(codec: CodecName, fields: dict[str, Any]) -> None:
    records = RecordCodec(Frozen, codec=codec)

    found = records.decode(KEY, records.encode(KEY, Frozen("a", **fields)))

    assert found == Frozen("a", **fields)


def test_json_refuses_a_typed_mapping_that_looks_like_a_tag() -> None:
    record = Frozen("a", counts={"$int": 1})

    assert RecordCodec(Frozen).decode(KEY, RecordCodec(Frozen).encode(KEY, record)) == record
    with pytest.raises(Unencodable) as caught:
        RecordCodec(Frozen, codec="json").encode(KEY, record)
    assert caught.value.path == "counts"


class Node(msgspec.Struct):
    children: list[Node] = []
    value: Any = None


class Chain(msgspec.Struct):
    next: Chain | None = None


@both
def test_records_within_records_are_kept_to_the_limit_of_depth(codec: CodecName) -> None:
    trees, chains = RecordCodec(Node, codec=codec), RecordCodec(Chain, codec=codec)
    tree = Node([Node([], {"$a": BIG}), Node([Node(value=b"x")])])

    assert trees.decode(KEY, trees.encode(KEY, tree)) == tree
    deep = reduce(lambda inner, _: Chain(inner), range(DEPTH_LIMIT - 1), Chain())
    assert chains.decode(KEY, chains.encode(KEY, deep)) == deep
    with pytest.raises(Unencodable):
        chains.encode(KEY, Chain(deep))


T = TypeVar("T")


class Box(msgspec.Struct, Generic[T]):
    id: str
    content: T


@both
def test_a_generic_record_keeps_its_parameter(codec: CodecName) -> None:
    ints: RecordCodec[Any] = RecordCodec(Box[int], codec=codec)
    free: RecordCodec[Any] = RecordCodec(Box[Any], codec=codec)

    assert ints.decode(KEY, ints.encode(KEY, Box("a", 1))) == Box("a", 1)
    assert free.decode(KEY, free.encode(KEY, Box("a", b"x"))) == Box("a", b"x")
    with pytest.raises(Unencodable):
        ints.encode(KEY, Box("a", "1"))


class Rich(msgspec.Struct):
    uid: UUID
    amount: Decimal
    day: date
    span: timedelta
    colour: _Colour
    kind: Literal["a", "b"]
    names: frozenset[str]
    maybe: int | msgspec.UnsetType = msgspec.UNSET
    local: datetime | None = None


@both
def test_the_usual_types_of_fields_come_back(codec: CodecName) -> None:
    local = datetime(2020, 1, 1, 3, 4, 5, 678901)  # noqa: DTZ001 (a typed field may be without a zone)
    record = Rich(
        uuid4(), Decimal("1.10"), date(2020, 2, 3), timedelta(1, 2, 3), _Colour.RED, "b", frozenset("ab"), local=local
    )
    records = RecordCodec(Rich, codec=codec)

    assert records.decode(KEY, records.encode(KEY, record)) == record


class Pair(NamedTuple):
    a: Any


class _Alien:
    pass


@pytest.mark.parametrize(
    ("annotation", "path"),
    [
        (_Alien, "field"),
        (msgspec.Raw, "field"),
        (msgspec.msgpack.Ext, "field"),
        (set[Any], "field"),
        (frozenset[Any], "field"),
        (dict[Any, int], "field"),
        (Pair, "field"),
        (list[_Alien | None], "field"),
    ],
)
def test_a_type_that_cannot_be_kept_is_refused_when_it_is_declared(annotation: Any, path: str) -> None:
    with pytest.raises(Unencodable) as caught:
        RecordCodec(msgspec.defstruct("Bad", [("field", annotation)]))
    assert caught.value.path == path


class Listed(msgspec.Struct, array_like=True):
    id: str


class Dollar(msgspec.Struct):
    value: int = msgspec.field(name="$int")


@pytest.mark.parametrize(
    "type_", [int, list, list[Session], dict[str, int], dict[int, Any], Listed, Dollar, 5, None, Pair]
)
def test_what_is_no_record_type_is_refused_when_it_is_declared(type_: Any) -> None:
    with pytest.raises(Unencodable):
        RecordCodec(type_)


@pytest.mark.parametrize(
    "options",
    [{"codec": "pickle"}, {"version": 0}, {"version": SCHEMA_LIMIT + 1}, {"version": 2, "upcasters": {2: dict}}],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(BadOption):
        RecordCodec(Session, **options)


class Careful(msgspec.Struct):
    low: int
    high: int

    def __post_init__(self) -> None:
        if self.low > self.high:
            raise ValueError("low over high")


def test_what_the_types_own_check_refuses_is_neither_written_nor_read() -> None:
    records = RecordCodec(Careful)
    record = Careful(1, 2)
    record.low = 3

    with pytest.raises(Unencodable, match="low over high"):
        records.encode(KEY, record)
    with pytest.raises(CorruptRecord, match="low over high"):
        records.decode(KEY, frame(KEY, msgspec.msgpack.encode({"low": 3, "high": 2}), MSGPACK, 1))


# --- Versions


class Old(msgspec.Struct):
    id: str
    name: str
    at: datetime
    meta: dict[str, Any] = {}


class New(msgspec.Struct):
    id: str
    first: str
    last: str
    at: datetime
    meta: dict[str, Any] = {}
    added: int = 7
    renamed: str = msgspec.field(default="", name="was")


def split_name(record: dict[str, Any]) -> dict[str, Any]:
    first, last = record.pop("name").split(" ")
    return {**record, "first": first, "last": last}


def shout(record: dict[str, Any]) -> dict[str, Any]:
    return {**record, "last": record["last"].upper(), "meta": {**record["meta"], "seen": True}}


AT = datetime(2026, 1, 2, tzinfo=UTC)


@both
def test_upcasters_run_in_a_chain_from_the_stored_version(codec: CodecName) -> None:
    meta = {"big": BIG, "raw": b"x", "$at": AT, "nan": [math.inf]}
    first = RecordCodec(Old, codec=codec, version=1).encode(KEY, Old("a", "Ada Love", AT, meta))
    reader = RecordCodec(New, version=4, upcasters={1: split_name, 3: shout})

    assert reader.decode(KEY, first) == New("a", "Ada", "LOVE", AT, {**meta, "seen": True})


@both
def test_an_upcaster_sees_free_form_values_as_they_were_written(codec: CodecName) -> None:
    seen: list[dict[str, Any]] = []
    meta = {"$bytes": {"big": BIG, "raw": b"x", "at": AT}}

    def look(record: dict[str, Any]) -> dict[str, Any]:
        seen.append(record)
        return record

    data = RecordCodec(Old, codec=codec).encode(KEY, Old("a", "n", AT, meta))
    found = RecordCodec(Old, version=2, upcasters={1: look}).decode(KEY, data)

    assert alike(meta, seen[0]["meta"]) and found == Old("a", "n", AT, meta)


@both
def test_a_version_with_no_step_to_take_is_decoded_as_it_is(codec: CodecName) -> None:
    def never(record: dict[str, Any]) -> dict[str, Any]:
        raise AssertionError("called")

    for stored in (2, 3):
        data = RecordCodec(Old, codec=codec, version=stored).encode(KEY, Old("a", "n", AT))
        assert RecordCodec(Old, version=3, upcasters={1: never}).decode(KEY, data) == Old("a", "n", AT)


def test_added_and_renamed_fields_need_no_upcaster() -> None:
    class Before(msgspec.Struct):
        id: str
        first: str
        last: str
        at: datetime
        was: str

    data = RecordCodec(Before).encode(KEY, Before("a", "b", "c", AT, "kept"))

    assert RecordCodec(New).decode(KEY, data) == New("a", "b", "c", AT, {}, 7, "kept")


@both
def test_mappings_with_other_keys_than_text_pass_through_an_upcaster(codec: CodecName) -> None:
    record = Frozen("a", by_number={5: b"x", -1: {"$a": BIG}})
    data = RecordCodec(Frozen, codec=codec).encode(KEY, record)

    assert RecordCodec(Frozen, version=2, upcasters={1: dict}).decode(KEY, data) == record


def test_what_an_upcaster_raises_is_the_callers_with_the_record_named() -> None:
    data = RecordCodec(Old).encode(KEY, Old("a", "one_word", AT))

    with pytest.raises(ValueError, match="unpack") as caught:
        RecordCodec(New, version=2, upcasters={1: split_name}).decode(KEY, data)
    assert not isinstance(caught.value, CorruptRecord) and repr(KEY) in caught.value.__notes__[0]

    with pytest.raises(TypeError, match="dict"):
        RecordCodec(New, version=2, upcasters={1: lambda _: None}).decode(KEY, data)  # type: ignore[arg-type,return-value]


def test_a_record_that_is_still_not_of_the_type_after_its_upcasters_is_corrupt() -> None:
    data = RecordCodec(Old).encode(KEY, Old("a", "b", AT))

    with pytest.raises(CorruptRecord, match="version 1") as caught:
        RecordCodec(New, version=2, upcasters={1: dict}).decode(KEY, data)
    assert isinstance(caught.value.__cause__, msgspec.ValidationError)


class Inner(msgspec.Struct):
    a: int


class Known(msgspec.Struct, omit_defaults=True):
    id: str
    title: str | None = None
    inner: Inner | None = None
    parts: list[Inner] = []
    named: dict[str, Inner] = {}
    meta: dict[str, Any] = {}


class InnerNext(msgspec.Struct):
    a: int
    more: Any = None


class Next(msgspec.Struct):
    id: str
    title: str | None = None
    inner: InnerNext | None = None
    parts: list[InnerNext] = []
    named: dict[str, InnerNext] = {}
    meta: dict[str, Any] = {}
    added: Any = None
    blob: bytes = b""
    at: datetime | None = None


def newer_record() -> Next:
    return Next(
        "a",
        "old title",
        InnerNext(1, BIG),
        [InnerNext(1, "one"), InnerNext(2, b"two")],
        {"x": InnerNext(5, {"$int": "kept"})},
        {"gone": 1},
        {"$bytes": AT},
        b"\xff",
        AT,
    )


@both
@pytest.mark.parametrize("own", CODECS)
def test_an_older_version_preserves_what_a_newer_one_wrote(codec: CodecName, own: CodecName) -> None:
    newer = RecordCodec(Next, codec=codec, version=3)
    older = RecordCodec(Known, codec=own, version=2)
    stored = newer.encode(KEY, newer_record())
    record = older.decode(KEY, stored)
    assert record.inner is not None
    record.title, record.inner.a, record.parts[1].a, record.meta = None, 9, 8, {"b": BIG}

    data = older.encode_keeping(KEY, record, stored)

    assert (unframe(KEY, data).schema, unframe(KEY, data).codec) == (3, BYTES[codec])
    assert older.decode(KEY, data) == record
    assert newer.decode(KEY, stored) == newer_record()
    expected = newer_record()
    expected.title, expected.meta = None, {"b": BIG}
    expected.inner = InnerNext(9, BIG)
    expected.parts[1] = InnerNext(8)  # another item than it was: what belonged to that one goes
    assert newer.decode(KEY, data) == expected


@both
def test_decode_newer_gives_all_that_is_stored_and_only_of_newer_records(codec: CodecName) -> None:
    stored = RecordCodec(Next, codec=codec, version=3).encode(KEY, newer_record())

    found = RecordCodec(Known, version=2).decode_newer(KEY, stored)

    assert found is not None and found["added"] == {"$bytes": AT} and found["inner"] == {"a": 1, "more": BIG}
    assert RecordCodec(Known, version=3).decode_newer(KEY, stored) is None


@both
def test_encode_keeping_over_a_record_that_is_not_newer_is_encode(codec: CodecName) -> None:
    records = RecordCodec(Known, codec=codec)
    stored = records.encode(KEY, Known("a", "b"))

    assert records.encode_keeping(KEY, Known("a"), stored) == records.encode(KEY, Known("a"))


def test_encode_keeping_refuses_what_encode_refuses_and_damage() -> None:
    records = RecordCodec(Known)
    stored = RecordCodec(Next, version=2).encode(KEY, newer_record())

    with pytest.raises(Unencodable):
        records.encode_keeping(KEY, Known("a", 5), stored)  # type: ignore[arg-type]
    with pytest.raises(Unencodable):
        records.encode_keeping(KEY, Inner(1), stored)  # type: ignore[arg-type]
    for damaged in (stored[:-1], frame(KEY, b"\x90", MSGPACK, 2), frame(KEY, b"x", RAW, 2)):
        with pytest.raises(CorruptRecord):
            records.encode_keeping(KEY, Known("a"), damaged)


def test_a_newer_record_this_version_cannot_read_is_not_called_damaged() -> None:
    stored = RecordCodec(New, version=5).encode(KEY, New("a", "b", "c", AT))

    with pytest.raises(FormatMismatch, match="version 5"):
        RecordCodec(Old, version=2).decode(KEY, stored)
