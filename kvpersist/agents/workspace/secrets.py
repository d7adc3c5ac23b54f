"""Secrets of records: never stored in clear, but as a reference, or encrypted.

Encrypted ones need ``kvpersist[crypto]`` and a key. A sealed secret is a format byte, 8 bytes that tell
the key it was made with, a nonce of 12 bytes, and what AES-GCM makes of the text; it opens only in the
record that it was sealed for.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import os
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any, Final, TypeAlias, cast

from kvpersist.driver import needs_extra
from kvpersist.errors import BadOption, BadRequest, CorruptRecord

__all__ = ["KEY_VARIABLE", "SecretKey", "Secrets", "checked_reference", "new_secret_key"]

SecretKey: TypeAlias = str | bytes | Sequence[str | bytes]
"""16, 24 or 32 bytes, or their base64; of several the first one seals, and all of them open."""

KEY_VARIABLE: Final = "KVPERSIST_SECRET_KEY"
"""The environment variable that gives the key, or several with commas between, where no option does."""

_FORMAT: Final = b"\x01"
_MARK: Final = 8  # bytes that tell which key a secret was sealed with
_NONCE: Final = 12  # bytes
_SIZES: Final = (16, 24, 32)  # bytes of a key
_MOST: Final = 65_536  # bytes read of a file


class Secrets:
    """Seals and opens secrets, and resolves references. Shows none of its keys."""

    def __init__(self, key: SecretKey | None = None) -> None:
        """``key``: None: as `KEY_VARIABLE` says when it is first needed. Raises BadOption."""
        self._given = None if key is None else _keys_of(key, "secret_key")

    def __repr__(self) -> str:
        return "<Secrets>"

    def seal(self, secret: str, context: str) -> bytes:
        """Encrypt ``secret`` for the record whose full key is ``context``.

        Raises:
            BadOption: there is no key. MissingExtra: the library for it is not installed.
        """
        key = self._keys()[0]
        nonce = os.urandom(_NONCE)
        head = _FORMAT + _mark(key)
        return head + nonce + _cipher(key).encrypt(nonce, secret.encode(), head + context.encode())

    def open(self, sealed: bytes, context: str) -> str:
        """Return the secret that was sealed for the record whose full key is ``context``.

        Raises:
            BadOption: there is no key, or not the one that it was sealed with.
            CorruptRecord: it was changed, or sealed for another record.
            MissingExtra: the library for it is not installed.
        """
        head, nonce = sealed[: 1 + _MARK], sealed[1 + _MARK : 1 + _MARK + _NONCE]
        if len(sealed) <= len(head) + _NONCE or sealed[:1] != _FORMAT:
            raise CorruptRecord(context, "its secret is not what was sealed")
        key = next((each for each in self._keys() if _mark(each) == head[1:]), None)
        if key is None:
            raise BadOption("secret_key", f"none of the keys given sealed the secret of {context!r}: add the old key")
        cipher = _cipher(key)
        from cryptography.exceptions import InvalidTag

        try:
            return cipher.decrypt(nonce, sealed[len(head) + _NONCE :], head + context.encode()).decode()
        except (InvalidTag, UnicodeDecodeError):
            raise CorruptRecord(context, "its secret was changed, or sealed for another record") from None

    async def resolve(self, reference: str) -> str:
        """Return what ``env:NAME`` or ``file:/path`` refers to now, without the line end of a file.

        Raises:
            BadOption: there is no such variable or file, or it is empty.
        """
        kind, _, name = checked_reference(reference).partition(":")
        if kind == "env":
            text = os.environ.get(name, "")
        else:
            try:
                text = (await asyncio.to_thread(_read, Path(name))).rstrip("\r\n")
            except (OSError, ValueError) as error:
                raise BadOption(reference, f"the secret cannot be read: {type(error).__name__}") from None
        if not text:
            raise BadOption(reference, "there is no secret: set it where the program runs")
        return text

    def _keys(self) -> list[bytes]:
        if self._given is not None:
            return self._given
        text = os.environ.get(KEY_VARIABLE, "")
        if not text:
            raise BadOption("secret_key", f"there is none: give open(secret_key=...), or set {KEY_VARIABLE}")
        return _keys_of([each for each in text.split(",") if each], KEY_VARIABLE)


def new_secret_key() -> str:
    """Return a fresh key of 32 bytes as base64, for ``open(secret_key=...)``."""
    return base64.urlsafe_b64encode(os.urandom(32)).decode()


def checked_reference(reference: Any) -> str:
    """Return a reference that is one.

    Raises:
        BadRequest: it is not; it is not shown, since it may be the secret itself.
    """
    kind, _, name = reference.partition(":") if isinstance(reference, str) else ("", "", "")
    if kind == "env" and name:
        return cast("str", reference)
    if kind == "file" and Path(name).is_absolute():
        return cast("str", reference)
    raise BadRequest("secret_ref is neither env:NAME nor file:/path: give the secret itself as secret=")


def _read(path: Path) -> str:
    with path.open("rb") as file:
        return file.read(_MOST).decode()


def _keys_of(given: SecretKey, option: str) -> list[bytes]:
    many: Any = given if isinstance(given, list | tuple) else [given]
    keys = [_key_of(each, option) for each in many]
    if not keys:
        raise BadOption(option, "there is no key in it")
    return keys


def _key_of(given: Any, option: str) -> bytes:
    """Decode a key, which no error shows."""
    data: Any = given
    if isinstance(given, str):
        try:
            text = given.strip().replace("+", "-").replace("/", "_").rstrip("=")
            data = base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
        except (binascii.Error, ValueError):
            data = None
    if not isinstance(data, bytes) or len(data) not in _SIZES:
        raise BadOption(option, "a key is 16, 24 or 32 bytes, or their base64: kvpersist.new_secret_key() makes one")
    return data


def _mark(key: bytes) -> bytes:
    return blake2b(b"kvpersist secret key", key=key, digest_size=_MARK).digest()


def _cipher(key: bytes) -> Any:
    with needs_extra("crypto", module="cryptography"):
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM
    return AESGCM(key)
