"""The first line of a file: ``kv1 <version> <expires|-> <crc> [<hex key>]``, then the value as it is.

The checksum covers the key and the line, so a file that was renamed is as damaged as one that was
cut. The key is in the line where the name is hashed.
"""

from __future__ import annotations

import re
from binascii import unhexlify
from typing import Final, TypeAlias
from zlib import crc32

from kvpersist.errors import CorruptRecord

__all__ = ["HEADER_BYTES", "Header", "hashed_key", "pack", "unpack"]

HEADER_BYTES: Final = 1200  # no header is longer
_LINE: Final = re.compile(rb"kv1 ([0-9a-f]*) (-|-?[0-9.einf+-]{1,32}) ([0-9a-f]{8})(?: ([0-9a-f]+))?\n")


Header: TypeAlias = tuple[bytes, "float | None", int]
"""Version, expiry, and where the value begins."""


def pack(key: str, version: bytes, expires_at: float | None, hashed: bool) -> bytes:
    """Return the header, with its newline."""
    told = f"{version.hex()} {'-' if expires_at is None else repr(float(expires_at))}".encode()
    text = key.encode()
    return b"kv1 %b %08x%b\n" % (told, _crc(text, told), b" " + text.hex().encode() if hashed else b"")


def unpack(key: str, data: bytes) -> Header:
    """Read the header of the file of ``key``.

    Raises:
        CorruptRecord: it is not what was written there.
    """
    line = _LINE.match(data)
    if line is None:
        what = "it is empty" if not data else "its first line is cut off" if data[:4] == b"kv1 " else "foreign content"
        raise CorruptRecord(key, what)
    version, expires, crc, hashed = line.groups()
    text = key.encode()
    if _crc(text, data[4 : line.end(2)]) != int(crc, 16) or (hashed and hashed != text.hex().encode()):
        raise CorruptRecord(key, "the checksum of its first line does not match")
    return unhexlify(version), None if expires == b"-" else float(expires), line.end()


def hashed_key(where: str, data: bytes) -> str:
    """Return the key in the header of a file with a hashed name.

    Raises:
        CorruptRecord: there is none, or the line is damaged; it names ``where``.
    """
    line = _LINE.match(data)
    try:
        if line is not None and line[4]:
            key = bytes.fromhex(line[4].decode()).decode()
            unpack(key, data)
            return key
    except (ValueError, CorruptRecord):  # odd digits, no UTF-8, or the wrong checksum
        pass
    raise CorruptRecord(where, "its first line does not tell its key")


def _crc(key: bytes, told: bytes) -> int:
    return crc32(told, crc32(key + b"\n"))
