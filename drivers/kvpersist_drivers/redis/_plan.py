"""What the commit script is handed: names, and one text that says what is done with them."""

from __future__ import annotations

from typing import Final, NamedTuple

from kvpersist.driver import ABSENT, HEADER_BYTES, Batch, Check, Delete, milliseconds, packed_header
from kvpersist.errors import BadKey, BadRequest, KvError, Unsupported, ValueTooLarge

__all__ = ["MAX_VALUE_BYTES", "Names", "Plan", "names_of", "space_of"]

MAX_VALUE_BYTES: Final = (512 << 20) - HEADER_BYTES  # of a string in Redis, unless configured otherwise

_CHECK, _PUT, _EXPIRING, _DELETE = range(4)
_IF_ABSENT, _IF_VERSION = 4, 8  # added to the kind
_SHARDED, _TELLS = 1, 2  # of the whole


class Names(NamedTuple):
    """Of a namespace; all have the same hash tag, which is never empty."""

    prefix: str  # of entries
    lex: str  # the index
    expiries: str


def names_of(base: str, space: str) -> Names:
    """Return the names of namespace ``space``."""
    tag = f"{{.{space}}}"
    return Names(f"{base}:{tag}", f"{base}:#{tag}", f"{base}:~{tag}")


def space_of(key: str) -> str:
    """Return the namespace of ``key``."""
    return key[: max(key.find(":"), 0)]


class Plan:
    """Collects batches. One that cannot be kept is refused by itself and leaves nothing in the plan.

    ``sharded``: what the script may touch are names of its one namespace. ``tells``: of the changes.
    """

    def __init__(self, base: str, *, sharded: bool, tells: bool) -> None:
        self.places: list[int] = []  # what `add` was told of each batch that is in
        self._base = base
        self._sharded = sharded
        self._flags = _SHARDED * sharded + _TELLS * tells
        self._spaces: dict[str, int] = {}  # numbered from 1
        self._has_puts: list[bool] = []
        self._steps = bytearray()
        self._names: list[str] = []
        self._values: list[str | bytes | int] = []

    @property
    def has_puts(self) -> bool:
        return any(self._has_puts)

    def add(self, batch: Batch, place: int) -> KvError | None:
        """Take ``batch`` in, unless it is empty; return why not."""
        if not batch.ops:
            return None
        names: list[str] = []
        values: list[str | bytes | int] = []
        steps = bytearray()
        first = batch.ops[0].key
        space = space_of(first)
        prefix, cut = f"{self._base}:{{.{space}}}", len(space)
        header = b""
        try:
            for op in batch.ops:
                key, expect = op.key, op.expect
                if key[: max(key.find(":"), 0)] != space:
                    return Unsupported("a batch across namespaces", f"{first!r} and {key!r} cannot be written together")
                if not key.isascii():
                    key.encode()
                names.append(prefix + key[cut:])
                condition = 0 if expect is None else _IF_ABSENT if expect is ABSENT else _IF_VERSION
                if isinstance(op, Check):
                    steps.append(_CHECK + condition)
                elif isinstance(op, Delete):
                    steps.append(_DELETE + condition)
                else:
                    if len(op.value) > MAX_VALUE_BYTES:
                        return ValueTooLarge(key, len(op.value), MAX_VALUE_BYTES)
                    if op.expires_at is None:
                        header = header or packed_header(batch.version, 0)
                        steps.append(_PUT + condition)
                        values.append(header + op.value)
                    else:
                        expires_ms = milliseconds(op.expires_at)
                        steps.append(_EXPIRING + condition)
                        values += (expires_ms, packed_header(batch.version, expires_ms) + op.value)
                if condition == _IF_VERSION:
                    assert isinstance(expect, bytes)
                    steps += expect
                    if len(expect) != 8:
                        return BadRequest(f"the version expected at {key!r} has {len(expect)} bytes instead of 8")
        except UnicodeEncodeError as error:
            return BadKey(error.object, "no UTF-8 text: it holds a lone surrogate")
        except BadRequest as error:
            return error
        number = self._spaces.setdefault(space, len(self._spaces) + 1)
        if number > len(self._has_puts):
            self._has_puts.append(False)
        if values:
            self._has_puts[number - 1] = True
        self._steps += number.to_bytes(2, "big") + len(names).to_bytes(3, "big") + steps
        self._names += names
        self._values += values
        self.places.append(place)
        return None

    def words(self) -> tuple[str | bytes | int, ...]:
        """Return the number of KEYS of the script, these, and ARGV."""
        keys: list[str] = [] if self._sharded else [f"{self._base}:#"]
        for space in self._spaces:
            names = names_of(self._base, space)
            keys += names[1:] if keys else (names.lex, *names[1:])
        head = bytes((self._flags,)) + len(self._spaces).to_bytes(2, "big") + bytes(self._has_puts)
        names = self._names
        return (len(keys) + len(names), *keys, *names, head + bytes(self._steps), *self._spaces, *self._values)
