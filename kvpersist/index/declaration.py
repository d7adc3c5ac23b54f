"""Index declarations, checked against the record's type, and the index keys a record has.

An entry of an index lies at ``ns:collection#slot:`` + the encoded parts + ``!`` + the record's encoded
key; a unique index leaves the record's key out, so that its entry is a *claim*. The value of both is
the record's encoded key. A record in which a part is None is not in the index.
"""

from __future__ import annotations

from collections.abc import Callable
from hashlib import blake2b
from itertools import product
from typing import Any, Final
from uuid import UUID

import msgspec
from msgspec import UNSET

from kvpersist import keys
from kvpersist.errors import BadKey, BadOption
from kvpersist.index.fields import KINDS, Part, field_at, getter, returned_kind

__all__ = ["BoundIndex", "Index", "Range", "Spec", "at_least", "at_most", "between", "bind"]

_TAKEN: Final = frozenset(
    ("limit", "after", "on_corrupt")
)  # arguments of the queries, so no field can be asked for by these
_DIGEST: Final = 8  # bytes of a fingerprint


class Range(msgspec.Struct, frozen=True):
    """What `between`, `at_least` and `at_most` ask for; both ends are included, None is open."""

    low: Any = None
    high: Any = None


def between(low: Any, high: Any) -> Any:
    """Ask for values from ``low`` to ``high``, both included: ``find(created_at=between(a, b))``."""
    return Range(low, high)


def at_least(low: Any) -> Any:
    """Ask for ``low`` and everything above it."""
    return Range(low, None)


def at_most(high: Any) -> Any:
    """Ask for ``high`` and everything below it."""
    return Range(None, high)


class Spec(msgspec.Struct, frozen=True):
    """What decides the keys of an index; two writers with equal ones write the same entries.

    ``computed``: an index over a callable, which no other process could maintain from this alone.
    ``kinds``: the type of each part, ``order`` included, by name.
    """

    fields: tuple[str, ...]
    order: str | None
    unique: bool
    multi: bool
    version: int
    type: str | None
    computed: bool
    kinds: tuple[str, ...]

    def fingerprint(self) -> str:
        """Return 16 hex digits that differ between different specifications."""
        return blake2b(msgspec.msgpack.encode(self), digest_size=_DIGEST).hexdigest()


class Index:
    """One secondary index of a repository; `Repository` checks it against the record's type.

    Args:
        fields: names of fields, paths such as ``"meta.topic"``, or a callable that is given the
            record (then ``name`` is required, and the query asks by that name). None: only ordered.
        order_by: the field that orders equal entries; ``"-created_at"``: greatest first.
        unique: at most one record per value.
        multi: the field holds a collection; one entry per distinct element, a query means "contains".
        name: of the index; default: the fields joined by ``_``, and ``_by_`` + the order.
        version: raise it when a callable, or an upcaster, gives other values than before.
        type: of the value of a callable or of a path into free-form data.

    Raises:
        BadOption: the declaration is at odds with itself.
    """

    __slots__ = ("fields", "multi", "name", "order_by", "type", "unique", "version")

    def __init__(
        self,
        *fields: str | Callable[[Any], Any],
        order_by: str | None = None,
        unique: bool = False,
        multi: bool = False,
        name: str | None = None,
        version: int = 1,
        type: type | None = None,
    ) -> None:
        if not fields and order_by is None:
            raise BadOption("Index", "name a field, or an order")
        if unique and order_by is not None:
            raise BadOption("Index.order_by", "a unique index has one record per value: there is nothing to order")
        if multi and not fields:
            raise BadOption("Index.multi", "name the field that holds the collection")
        if type is not None and type.__name__ not in KINDS:
            raise BadOption("Index.type", f"{type.__name__} cannot be indexed; use one of {', '.join(KINDS)}")
        if name is None:
            if not all(isinstance(field, str) for field in fields):
                raise BadOption("Index.name", "an index over a callable needs a name")
            name = "_".join(str(field) for field in fields)
            if order_by is not None:
                name += f"{'_' if fields else ''}by_{order_by.removeprefix('-')}{'_desc' * order_by.startswith('-')}"
            name = name.replace(".", "_").lower()
        self.fields = fields
        self.order_by = order_by
        self.unique = unique
        self.multi = multi
        self.name = keys.check_name(name, "index")
        self.version = version
        self.type = type

    def __repr__(self) -> str:
        return f"<Index {self.name}>"

    @classmethod
    def of(cls, name: str, spec: Spec) -> Index:
        """Return the index that another writer declared, unless it is computed."""
        return cls(
            *spec.fields,
            order_by=spec.order,
            unique=spec.unique,
            multi=spec.multi,
            name=name,
            version=spec.version,
            type=None if spec.type is None else KINDS[spec.type],
        )


class BoundIndex:
    """An `Index` that fits a record type."""

    def __init__(self, index: Index, parts: tuple[Part, ...]) -> None:
        self.name = index.name
        self.unique = index.unique
        self.multi = index.multi
        self.parts = parts
        self.fields = len(index.fields)  # the parts before the order
        self.computed = not all(isinstance(field, str) for field in index.fields)
        self.spec = Spec(
            fields=tuple(field if isinstance(field, str) else "()" for field in index.fields),
            order=index.order_by,
            unique=index.unique,
            multi=index.multi,
            version=index.version,
            type=None if index.type is None else index.type.__name__,
            computed=self.computed,
            kinds=tuple(part.kind.__name__ for part in parts),
        )
        self.fingerprint = self.spec.fingerprint()
        self._steps = [(part.get, part.encode) for part in parts]

    def __str__(self) -> str:
        asked = ", ".join(part.label for part in self.parts[: self.fields]) or "everything"
        return f"{self.name}({asked}{f'; by {self.spec.order}' if self.spec.order else ''})"

    def keys(self, record: Any, prefix: str, tail: str) -> list[str]:
        """Return ``prefix``, the encoded, joined parts of ``record``, and ``tail``: one per entry it has in this index.

        Raises:
            Unencodable: a part is of another type than declared.
        """
        if self.multi:
            return [f"{prefix}{values}{tail}" for values in self._product(record)]
        encoded: list[str] = []
        for get, encode in self._steps:
            value = get(record)
            if value is None or value is UNSET:
                return []
            encoded.append(encode(value))
        return [f"{prefix}{'!'.join(encoded)}{tail}"]

    def shown(self, value: str) -> str:
        """Return encoded, joined parts for people."""
        texts: list[str] = []
        for part, text in zip(self.parts, value.split("!"), strict=False):
            try:
                texts.append(str(keys.decode(text, part.kind, part.descending)))
            except BadKey:  # a long value was cut and hashed
                texts.append(text)
        return ", ".join(texts)

    def _product(self, record: Any) -> tuple[str, ...]:
        columns: list[list[str]] = []
        for part in self.parts:
            value = part.get(record)
            if value is None or value is UNSET:
                return ()
            if not part.multi:
                columns.append([part.encode(value)])
                continue
            columns.append(list(dict.fromkeys(part.encode(each) for each in part.elements(value))))
        return tuple(map("!".join, product(*columns)))


def bind(index: Index, type_: type) -> BoundIndex:
    """Fit ``index`` to the record type.

    Raises:
        BadOption: no such field (the error lists those there are), or one that cannot be indexed so.
    """
    parts: list[Part] = []
    for field in index.fields:
        if isinstance(field, str):
            parts.append(_part_of_path(index, type_, field, index.multi))
        else:
            kind = index.type or returned_kind(field, index.multi)
            parts.append(Part(index.name, field, kind, multi=index.multi, optional=True))
    collections = sum(part.multi for part in parts)
    if index.multi and collections != 1:
        raise BadOption(f"index {index.name}", f"multi=True needs exactly one collection, found {collections}")
    if index.order_by is not None:
        path = index.order_by.removeprefix("-")
        descending = path != index.order_by
        part = _part_of_path(index, type_, path, False)
        if descending and part.kind in (str, UUID):
            raise BadOption(f"index {index.name}", f"{path} is text, which has no descending order")
        parts.append(Part(part.label, part.get, part.kind, descending=descending, optional=part.optional))
    labels = [part.label for part in parts]
    if len(set(labels)) != len(labels):
        raise BadOption(f"index {index.name}", f"{', '.join(labels)}: a field occurs twice")
    if taken := sorted(_TAKEN.intersection(labels)):
        raise BadOption(f"index {index.name}", f"{taken[0]!r} is an argument of the queries: rename the field")
    return BoundIndex(index, tuple(parts))


def _part_of_path(index: Index, type_: type, path: str, multi: bool) -> Part:
    what = f"index {index.name}"
    found = field_at(type_, path, what)
    kind, collection = found.kind, found.collection
    if kind is None:
        if index.type is None:
            raise BadOption(what, f"{path!r} leads into free-form data: say what it is with type=")
        kind, collection = index.type, multi and len(index.fields) == 1
    elif collection and not multi:
        raise BadOption(what, f"{path!r} is a collection: declare multi=True")
    return Part(path, getter(type_, path), kind, multi=collection, optional=found.optional)
