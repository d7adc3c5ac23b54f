"""The header in which drivers of plain bytes keep version and expiry."""

from __future__ import annotations

import math

import pytest

from kvpersist.driver import HEADER_BYTES, Entry, milliseconds, packed_header, unpacked_entry
from kvpersist.errors import BadRequest, CorruptRecord


@pytest.mark.parametrize("expires_at", [None, 0.001, 1.0, 1_700_000_000.123, 4_102_444_800.0])
@pytest.mark.parametrize("value", [b"", b"value", bytes(100)])
def test_an_entry_comes_back_as_it_was_packed(expires_at: float | None, value: bytes) -> None:
    header = packed_header(b"\x00\xffersion", milliseconds(expires_at))

    assert len(header) == HEADER_BYTES
    found = unpacked_entry("k", header + value)
    assert (found.value, found.version) == (value, b"\x00\xffersion")
    assert found.expires_at == (None if expires_at is None else pytest.approx(expires_at, abs=0.001))


def test_the_layout_is_version_milliseconds_and_checksum() -> None:
    assert packed_header(b"version1", 1_700_000_000_123)[:16] == b"version1" + (1_700_000_000_123).to_bytes(8, "big")
    assert packed_header(b"12345678", 0).hex() == "31323334353637380000000000000000940e5271"


def test_no_expiry_is_taken_for_never() -> None:
    assert milliseconds(None) == 0
    assert [milliseconds(past) for past in (0.0, -1.0, -math.inf, 0.0004)] == [1, 1, 1, 1]
    assert milliseconds(math.inf) == milliseconds(1e300) == 1 << 53
    with pytest.raises(BadRequest):
        milliseconds(math.nan)


def test_every_flipped_bit_of_a_header_and_every_cut_is_found() -> None:
    stored = packed_header(b"version1", 1_700_000_000_123) + b"value"

    for bit in range(8 * HEADER_BYTES):
        damaged = bytearray(stored)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(CorruptRecord, match="'k'"):
            unpacked_entry("k", bytes(damaged))
    for length in range(HEADER_BYTES):
        with pytest.raises(CorruptRecord, match="'k'"):
            unpacked_entry("k", stored[:length])
    assert unpacked_entry("k", stored[:HEADER_BYTES]) == Entry("k", b"", b"version1", 1_700_000_000.123)
