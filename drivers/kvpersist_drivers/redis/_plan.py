"""What the commit script is handed: names, and one text that says what is done with them."""

from __future__ import annotations

from typing import Final, NamedTuple, cast

from kvpersist.driver import ABSENT, HEADER_BYTES, Batch, Check, Put, milliseconds, packed_header
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
        self._spaces: dict[str, _Space] = {}
        self._steps = bytearray()
        self._names: list[str] = []
        self._values: list[str | bytes | int] = []

    @property
    def has_puts(self) -> bool:
        return any(space.has_puts for space in self._spaces.values())

    def add(self, batch: Batch, place: int) -> KvError | None:
        """Take ``batch`` in, unless it is empty; return why not."""
        if not batch.ops:
            return None
        taken = len(self._names), len(self._values), len(self._steps)
        try:
            self._add(batch)
        except UnicodeEncodeError as error:
            refused: KvError = BadKey(error.object, "no UTF-8 text: it holds a lone surrogate")
        except (BadRequest, Unsupported) as error:
            refused = error
        else:
            self.places.append(place)
            return None
        del self._names[taken[0] :], self._values[taken[1] :], self._steps[taken[2] :]
        return refused

    def _add(self, batch: Batch) -> None:
        ops, names, values, steps = batch.ops, self._names, self._values, self._steps
        first = ops[0].key
        text = first[: max(first.find(":"), 0)]
        space = self._spaces.get(text)
        if space is None:
            space = self._spaces[text] = _Space(self._base, text, len(self._spaces) + 1)
        start, prefix, cut = space.start, space.prefix, len(text)
        steps += space.number + len(ops).to_bytes(3, "big")
        header = b""
        for op in ops:
            key, expect, kind = op.key, op.expect, type(op)
            if not (key.startswith(start) if text else key.find(":") <= 0):
                raise Unsupported("a batch across namespaces", f"{first!r} and {key!r} cannot be written together")
            if not key.isascii():
                key.encode()
            names.append(prefix + key[cut:])
            condition = 0 if expect is None else _IF_ABSENT if expect is ABSENT else _IF_VERSION
            if kind is Check:
                steps.append(_CHECK + condition)
            elif isinstance(op, Put):
                value, expires_at = op.value, op.expires_at
                if len(value) > MAX_VALUE_BYTES:
                    raise ValueTooLarge(key, len(value), MAX_VALUE_BYTES)
                if expires_at is None:
                    header = header or packed_header(batch.version, 0)
                    steps.append(_PUT + condition)
                    values.append(header + value)
                else:
                    expires_ms = milliseconds(expires_at)
                    steps.append(_EXPIRING + condition)
                    values += (expires_ms, packed_header(batch.version, expires_ms) + value)
                space.has_puts = True
            else:
                steps.append(_DELETE + condition)
            if condition == _IF_VERSION:
                version = cast(bytes, expect)
                if len(version) != 8:
                    raise BadRequest(f"the version expected at {key!r} has {len(version)} bytes instead of 8")
                steps += version

    def words(self) -> tuple[str | bytes | int, ...]:
        """Return the number of KEYS of the script, these, and ARGV."""
        keys: list[str] = [] if self._sharded else [f"{self._base}:#"]
        for space in self._spaces:
            names = names_of(self._base, space)
            keys += names[1:] if keys else (names.lex, *names[1:])
        has_puts = bytes([space.has_puts for space in self._spaces.values()])
        plan = bytes((self._flags,)) + len(self._spaces).to_bytes(2, "big") + has_puts + bytes(self._steps)
        return (len(keys) + len(self._names), *keys, *self._names, plan, *self._spaces, *self._values)


class _Space:
    """A namespace of a plan."""

    __slots__ = ("has_puts", "number", "prefix", "start")

    def __init__(self, base: str, text: str, number: int) -> None:
        self.start = f"{text}:"  # of its keys
        self.prefix = f"{base}:{{.{text}}}"  # of their names, less the namespace
        self.number = number.to_bytes(2, "big")
        self.has_puts = False
