"""Index declarations, checked against the record's type, and the index keys a record has.

An entry of an index lies at ``ns:collection#slot:`` + the encoded parts + ``!`` + the record's encoded
key; a unique index leaves the record's key out, so that its entry is a *claim*. The value of both is
the record's encoded key. A record in which a part is None is not in the index.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable, Iterable
from datetime import datetime
from enum import Enum
from hashlib import blake2b
from itertools import product
from operator import attrgetter, itemgetter
from typing import Any, Final
from uuid import UUID

import msgspec
from msgspec import inspect

from kvpersist import keys
from kvpersist.errors import BadKey, BadOption, BadRequest, Unencodable

__all__ = ["BoundIndex", "Index", "Part", "Range", "Spec", "at_least", "at_most", "between", "bind", "key_parts"]

_KINDS: Final[dict[str, type]] = {
    "str": str,
    "int": int,
    "bool": bool,
    "float": float,
    "datetime": datetime,
    "UUID": UUID,
}
_TAKEN: Final = frozenset(("limit", "after"))  # arguments of the queries, so no field can be asked for by these
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
        if type is not None and type.__name__ not in _KINDS:
            raise BadOption("Index.type", f"{type.__name__} cannot be indexed; use one of {', '.join(_KINDS)}")
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
            type=None if spec.type is None else _KINDS[spec.type],
        )


class Part:
    """One part of an index or record key: how to get it out of a record, and into a key."""

    __slots__ = ("descending", "encode", "get", "kind", "label", "multi", "optional")

    def __init__(
        self,
        label: str,
        get: Callable[[Any], Any],
        kind: type,
        *,
        descending: bool = False,
        multi: bool = False,
        optional: bool = False,
        whole: bool = False,
    ) -> None:
        """``optional``: a record may have no value here. ``whole``: long text is not cut and hashed."""
        self.label, self.get, self.kind = label, get, kind
        self.descending, self.multi, self.optional = descending, multi, optional
        self.encode = _encoder(label, kind, descending, whole)

    def asked(self, value: Any) -> Any:
        """Return ``value`` of a query as this part's type. Raises BadRequest."""
        try:
            return _coerced(value, self.kind)
        except TypeError as error:
            raise BadRequest(f"{self.label}={value!r}: it is indexed as {self.kind.__name__}") from error

    def of(self, record: Any) -> list[Any]:
        """Return the values this part has in ``record``: none, one, or a collection's elements."""
        value = self.get(record)
        if value is None or value is msgspec.UNSET:
            return []
        return [_coerced(each, self.kind) for each in (value if self.multi else (value,)) if each is not None]


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

    def values(self, record: Any) -> tuple[str, ...]:
        """Return the encoded, joined parts of ``record``, one per entry it has in this index.

        Raises:
            Unencodable: a part is of another type than declared.
        """
        if self.multi:
            return self._product(record)
        encoded: list[str] = []
        for get, encode in self._steps:
            value = get(record)
            if value is None or value is msgspec.UNSET:
                return ()
            encoded.append(encode(value))
        return ("!".join(encoded),)

    def stored_values(self, record: Any) -> tuple[str, ...]:
        """As `values`, of a record that was stored before this index was declared: what does not fit is left out."""
        try:
            return self.values(record)
        except Unencodable:
            return ()

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
            if value is None or value is msgspec.UNSET:
                return ()
            if not part.multi:
                columns.append([part.encode(value)])
                continue
            if isinstance(value, (str, bytes, dict)) or not isinstance(value, Iterable):
                raise Unencodable(part.label, f"a multi-valued index needs a collection, not {type(value).__name__}")
            elements: Iterable[Any] = value
            columns.append(list(dict.fromkeys(part.encode(each) for each in elements if each is not None)))
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
            kind = index.type or _returned(field, index.multi)
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
    if taken := _TAKEN.intersection(labels):
        raise BadOption(f"index {index.name}", f"{taken.pop()!r} is an argument of the queries: rename the field")
    return BoundIndex(index, tuple(parts))


def key_parts(type_: type, key: str | tuple[str, ...]) -> tuple[Part, ...]:
    """Return how to make a record's key from its fields.

    Raises:
        BadOption: no such field, or one that cannot be part of a key.
    """
    names = (key,) if isinstance(key, str) else tuple(key)
    if not names:
        raise BadOption("key", "name at least one field")
    parts: list[Part] = []
    for name in names:
        found = _resolve(type_, name, "key")
        if found.collection:
            raise BadOption("key", f"{name!r} is a collection")
        # the text of a plain dict's key cannot be told from an encoded number, so it has to be text
        parts.append(Part(name, _getter(type_, name), found.kind or str, whole=True))
    return tuple(parts)


# ---- types


class _Found(msgspec.Struct):
    """What a path leads to; ``kind`` None: free-form data."""

    kind: type | None
    collection: bool = False
    optional: bool = False


def _part_of_path(index: Index, type_: type, path: str, multi: bool) -> Part:
    what = f"index {index.name}"
    found = _resolve(type_, path, what)
    kind, collection = found.kind, found.collection
    if kind is None:
        if index.type is None:
            raise BadOption(what, f"{path!r} leads into free-form data: say what it is with type=")
        kind, collection = index.type, multi and len(index.fields) == 1
    elif collection and not multi:
        raise BadOption(what, f"{path!r} is a collection: declare multi=True")
    return Part(path, _getter(type_, path), kind, multi=collection, optional=found.optional)


def _resolve(type_: type, path: str, what: str) -> _Found:
    at = inspect.type_info(type_)
    done: list[str] = []
    optional = False
    for step in path.split("."):
        at = _plain(at)
        fields = _fields(at)
        if fields is not None:
            if step not in fields:
                inside = f"{'.'.join(done)} of {type_.__name__}" if done else type_.__name__
                raise BadOption(what, f"{step!r} is no field of {inside}; fields: {', '.join(fields)}")
            optional |= isinstance(at, inspect.TypedDictType) and not fields[step].required
            at = fields[step].type
        elif isinstance(at, inspect.DictType):
            at, optional = at.value_type, True
        elif isinstance(at, inspect.AnyType):
            return _Found(None, optional=True)
        else:
            raise BadOption(what, f"{'.'.join(done)!r} has no fields, so there is no {path!r}")
        optional |= _may_be_none(at)
        done.append(step)
    at = _plain(at)
    if isinstance(at, inspect.CollectionType):
        return _Found(_kind(_plain(at.item_type), what, path), True, optional)
    if isinstance(at, inspect.TupleType):
        kinds = {_kind(_plain(item), what, path) for item in at.item_types}
        if len(kinds) == 1:
            return _Found(kinds.pop(), True, optional)
    return _Found(_kind(at, what, path), False, optional)


def _may_be_none(info: inspect.Type) -> bool:
    if isinstance(info, inspect.Metadata):
        return _may_be_none(info.type)
    return isinstance(info, (inspect.UnionType, inspect.AnyType, inspect.NoneType, inspect.LiteralType))


def _plain(info: inspect.Type) -> inspect.Type:
    """Leave out what does not decide the key: metadata, and None in a union."""
    if isinstance(info, inspect.Metadata):
        return _plain(info.type)
    if isinstance(info, inspect.UnionType):
        rest = [_plain(each) for each in info.types if not isinstance(each, inspect.NoneType)]
        if len(rest) == 1:
            return rest[0]
        if all(isinstance(each, (inspect.IntType, inspect.FloatType)) for each in rest):
            return inspect.FloatType()
    return info


def _fields(info: inspect.Type) -> dict[str, inspect.Field] | None:
    if isinstance(info, (inspect.StructType, inspect.DataclassType, inspect.TypedDictType, inspect.NamedTupleType)):
        return {field.name: field for field in info.fields}
    return None


def _kind(info: inspect.Type, what: str, path: str) -> type | None:
    match info:
        case inspect.AnyType():
            return None
        case inspect.StrType():
            return str
        case inspect.BoolType():
            return bool
        case inspect.IntType():
            return int
        case inspect.FloatType():
            return float
        case inspect.DateTimeType():
            return datetime
        case inspect.UUIDType():
            return UUID
        case inspect.EnumType():
            values = [member.value for member in info.cls]
        case inspect.LiteralType():
            values = list(info.values)
        case _:
            raise BadOption(what, f"{path!r} cannot be indexed; use a field of {', '.join(_KINDS)}")
    kinds = {type(value) for value in values if value is not None}
    if len(kinds) == 1 and (kind := kinds.pop()) in (str, int):
        return kind
    raise BadOption(what, f"{path!r} has values of several types")


def _returned(function: Callable[[Any], Any], multi: bool) -> type:
    """The annotated type of what a callable returns; text where it does not say."""
    try:
        returned = typing.get_type_hints(function).get("return", str)
    except (NameError, TypeError):
        return str
    choices = [each for each in typing.get_args(returned) or (returned,) if each is not type(None) and each is not ...]
    kinds = {each for each in choices if each in _KINDS.values()}
    return kinds.pop() if len(kinds) == 1 and (multi or len(choices) == 1) else str


# ---- values


def _getter(type_: type, path: str) -> Callable[[Any], Any]:
    steps = path.split(".")
    is_mapping = typing.is_typeddict(type_) or type_ is dict or typing.get_origin(type_) is dict
    if len(steps) == 1 and not is_mapping:
        return attrgetter(path)
    if is_mapping and len(steps) == 1:
        required: frozenset[str] = getattr(type_, "__required_keys__", frozenset())
        return itemgetter(path) if path in required else _Path(steps)
    return _Path(steps)


class _Path:
    """Follows ``meta.topic`` through attributes and mappings; None where it ends early."""

    __slots__ = ("_steps",)

    def __init__(self, steps: list[str]) -> None:
        self._steps = steps

    def __call__(self, record: Any) -> Any:
        at: Any = record
        for step in self._steps:
            if at is None or at is msgspec.UNSET:
                return None
            if isinstance(at, dict):
                at = typing.cast("dict[str, Any]", at).get(step)
            elif isinstance(at, msgspec.Struct) or dataclasses.is_dataclass(at):
                at = getattr(at, step)
            else:  # free-form data that is something else in this record
                return None
        return at


def _coerced(value: Any, kind: type) -> Any:
    """Return ``value`` as ``kind``: enum members by their value, an int for a float. Raises TypeError."""
    if isinstance(value, Enum):
        value = value.value
    if kind is float and type(value) is int:
        return float(value)
    if kind is UUID and isinstance(value, str):
        return UUID(value) if len(value) == 36 else _refused(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        return _refused(value)
    return value


def _refused(value: Any) -> Any:
    raise TypeError(type(value).__name__)


def _encoder(label: str, kind: type, descending: bool, whole: bool) -> Callable[[Any], str]:
    def encode(value: Any) -> str:
        if type(value) is not kind:
            try:
                value = _coerced(value, kind)
            except (TypeError, ValueError) as error:
                raise Unencodable(label, f"it is indexed as {kind.__name__}, found {type(value).__name__}") from error
        try:
            return keys.encode(value, descending)
        except BadKey as error:
            raise Unencodable(label, error.reason) from error

    def encode_text(value: Any) -> str:
        if type(value) is not str:
            try:
                value = str.__str__(_coerced(value, str))
            except TypeError as error:
                raise Unencodable(label, f"it is indexed as str, found {type(value).__name__}") from error
        try:
            return keys.index_text(value)[0]
        except BadKey as error:
            raise Unencodable(label, error.reason) from error

    return encode_text if kind is str and not whole else encode
