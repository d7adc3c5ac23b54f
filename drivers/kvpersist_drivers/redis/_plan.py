"""What the commit script is handed: names, and one text that says what is done with them."""

from __future__ import annotations

from typing import Final, NamedTuple

from kvpersist.driver import HEADER_BYTES, Batch, Check, Expect, Put, milliseconds, packed_header
from kvpersist.errors import BadKey, BadRequest, KvError, Unsupported, ValueTooLarge

__all__ = ["MAX_VALUE_BYTES", "Names", "Plan", "names_of", "space_of"]

MAX_VALUE_BYTES: Final = (512 << 20) - HEADER_BYTES  # of a string in Redis, unless configured otherwise

_END, _CHECK_ABSENT, _PUT_NEW, _PUT, _PUT_OVER, _CHECK_VERSION, _DELETE_VERSION, _DELETE = range(8)
_SHARDED, _TELLS, _EXPIRES, _DISTINCT = 1, 2, 4, 8  # of the whole


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
    """Collects batches of one namespace. One that cannot be kept is refused by itself, and nothing of it is done.

    ``sharded``: the set of namespaces may be another server's. ``tells``: of the changes.
    """

    def __init__(self, base: str, space: str, *, sharded: bool, tells: bool) -> None:
        self.places: list[int] = []  # what `add` was told of each batch that is in
        self._base = base
        self._space = space
        self._sharded = sharded
        self._flags = _SHARDED * sharded + _TELLS * tells
        self._steps = bytearray()
        self._names: tuple[list[str], ...] = ([], [], [], [], [], [], [], [])  # by kind, as what follows
        self._values: tuple[list[bytes], ...] = ([], [], [], [], [])
        self._versions: tuple[list[bytes], ...] = ([], [], [], [], [], [], [])
        self._checks: dict[str, tuple[Expect, bytes]] = {}  # the last of each key, and its step

    @property
    def has_puts(self) -> bool:
        return any(self._values)

    def add(self, batch: Batch, place: int) -> KvError | None:
        """Take ``batch`` in, which is not empty; return why not."""
        before = len(self._steps)
        try:
            self._add(batch)
        except UnicodeEncodeError as error:
            refused: KvError = BadKey(error.object, "no UTF-8 text: it holds a lone surrogate")
        except (BadRequest, Unsupported) as error:
            refused = error
        else:
            self._steps.append(_END)
            self.places.append(place)
            return None
        self._take_back(before)
        return refused

    def _add(self, batch: Batch) -> None:
        space, names, values, steps = self._space, self._names, self._values, self._steps
        start, cut, prefix = space + ":", len(space), f"{self._base}:{{.{space}}}"
        lasting = packed_header(batch.version, 0)
        for op in batch.ops:
            key, expect = op.key, op.expect
            if not key.startswith(start) and (space or ":" in key):
                first = batch.ops[0].key
                raise Unsupported("a batch across namespaces", f"{first!r} and {key!r} cannot be written together")
            if not key.isascii():
                key.encode()
            if type(op) is Put:
                value, expires_at = op.value, op.expires_at
                if len(value) > MAX_VALUE_BYTES:
                    raise ValueTooLarge(key, len(value), MAX_VALUE_BYTES)
                header = lasting if expires_at is None else self._expiring(batch.version, expires_at)
                if expect is None:
                    kind = _PUT
                elif type(expect) is bytes:
                    kind = _PUT_OVER
                    self._expect(kind, key, expect)
                else:
                    kind = _PUT_NEW
                values[kind].append(header + value)
            elif type(op) is Check:
                known = self._checks.get(key)
                steps += known[1] if known is not None and known[0] == expect else self._check(key, op.expect)
                continue
            elif type(expect) is bytes:
                kind = _DELETE_VERSION
                self._expect(kind, key, expect)
            else:
                kind = _DELETE
            names[kind].append(prefix + key[cut:])
            steps.append(kind)

    def _expiring(self, version: bytes, expires_at: float) -> bytes:
        header = packed_header(version, milliseconds(expires_at))
        self._flags |= _EXPIRES
        return header

    def _expect(self, kind: int, key: str, version: bytes) -> None:
        if len(version) != 8:
            raise BadRequest(f"the version expected at {key!r} has {len(version)} bytes instead of 8")
        self._versions[kind].append(version)

    def _check(self, key: str, expect: Expect) -> bytes:
        """The step of a new check; others that check the same share it."""
        kind = _CHECK_ABSENT
        if type(expect) is bytes:
            kind = _CHECK_VERSION
            self._expect(kind, key, expect)
        step = bytes((kind,)) + len(self._names[kind]).to_bytes(3, "big")
        self._names[kind].append(f"{self._base}:{{.{self._space}}}{key[len(self._space) :]}")
        self._checks[key] = expect, step
        return step

    def _take_back(self, before: int) -> None:
        """Forget the steps from ``before`` on; what they check stays, for others."""
        at = before
        while at < len(self._steps):
            kind = self._steps[at]
            if kind in (_CHECK_ABSENT, _CHECK_VERSION):
                at += 4
                continue
            for of_kind in (self._names, self._values, self._versions):
                if kind < len(of_kind) and of_kind[kind]:
                    of_kind[kind].pop()
            at += 1
        del self._steps[before:]

    def words(self) -> tuple[str | bytes | int, ...]:
        """Return the number of KEYS of the script, these, and ARGV."""
        _, index, expiries = names_of(self._base, self._space)
        keys = [index if self._sharded else f"{self._base}:#", index, expiries]
        ends = bytearray()
        for names in self._names[1:]:
            keys += names
            ends += len(keys).to_bytes(3, "big")
        distinct = len({*keys}) == len(keys) - self._sharded
        plan = bytes((self._flags + _DISTINCT * distinct,)) + ends + self._steps
        versions = b"".join([version for of_kind in self._versions for version in of_kind])
        values = [value for of_kind in self._values for value in of_kind]
        return (len(keys), *keys, plan, self._space, versions, *values)
