"""Free-form values, and where a record's type has them. Private: `kvpersist.codec` says what the rules are."""

from __future__ import annotations

from base64 import b64encode
from binascii import a2b_base64
from collections.abc import Callable, Iterable
from copy import copy
from datetime import UTC, datetime
from math import isfinite
from typing import Any, Final, TypeAlias, cast, get_origin

import msgspec
import msgspec.inspect as inspect

from kvpersist.errors import Unencodable

__all__ = [
    "DEPTH_LIMIT",
    "Free",
    "FreeDict",
    "Refused",
    "Shape",
    "Shapes",
    "ext_hook",
    "json_free",
    "packed_free",
    "untag",
]

DEPTH_LIMIT: Final = 200  # containers inside each other
_BIG_INT: Final = 1  # MessagePack Ext: signed big-endian bytes of an integer that has no form of its own
_ATOMS: Final = frozenset((str, bool, type(None)))  # kept as they are by both codecs
_INT_MIN: Final = -(1 << 63)
_INT_END: Final = 1 << 64

Free: TypeAlias = Callable[[Any, int], Any]
"""`packed_free` or `json_free`: takes a value and how many containers it is in."""


class Refused(Exception):
    """A value that cannot be kept; ``steps`` lead to it, innermost first."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason
        self.steps: list[Any] = []

    def public(self) -> Unencodable:
        """Return the error for the caller, with a path such as ``meta.tags[3]``."""
        text = ""
        for step in reversed(self.steps):
            if isinstance(step, str) and step.isidentifier():
                text += f".{step}" if text else step
            else:
                text += f"[{step!r}]"
        return Unencodable(text, self.reason)


def ext_hook(code: int, data: memoryview) -> int:
    """Return the integer in an extension of ours; any other extension is no value of ours."""
    if code != _BIG_INT:
        raise ValueError(f"unknown extension {code}")
    return int.from_bytes(data, "big", signed=True)


def packed_free(value: Any, depth: int) -> Any:
    """Return ``value`` as MessagePack can hold it: itself unless something in it has no form there."""
    kind = type(value)  # pyright: ignore[reportUnknownVariableType]
    if kind is str or kind is bool or kind is float or kind is bytes or value is None:
        return value
    if kind is int:
        if _INT_MIN <= value < _INT_END:
            return value
        return msgspec.msgpack.Ext(_BIG_INT, value.to_bytes(value.bit_length() // 8 + 1, "big", signed=True))
    if kind is dict:
        return _free_dict(value, depth, packed_free)
    if kind is list:
        return _free_list(value, depth, packed_free)
    if isinstance(value, datetime):
        return _utc(value)
    return packed_free(_plain_type(value), depth)


def json_free(value: Any, depth: int) -> Any:
    """Return ``value`` as JSON can hold it: itself unless something in it has no form there."""
    kind = type(value)  # pyright: ignore[reportUnknownVariableType]
    if kind is str or kind is bool or value is None:
        return value
    if kind is int:
        # Hexadecimal: the interpreter limits how long a decimal it converts.
        return value if _INT_MIN <= value < _INT_END else {"$int": f"{value:#x}"}
    if kind is float:
        return value if isfinite(value) else {"$float": str(value)}
    if kind is dict:
        kept = _free_dict(value, depth, json_free)
        return {"$dict": kept} if _looks_tagged(kept) else kept
    if kind is list:
        return _free_list(value, depth, json_free)
    if kind is bytes:
        return {"$bytes": b64encode(value).decode()}
    if isinstance(value, datetime):
        return {"$datetime": _utc(value).isoformat()}
    return json_free(_plain_type(value), depth)


def untag(value: Any) -> Any:
    """Return what `json_free` made ``value`` of; containers are changed in place.

    Raises:
        ValueError: an object that looks tagged, and that no value is written as.
    """
    root: list[Any] = [value]
    todo: list[Any] = [root]
    while todo:  # no recursion: what could be written is read from the bottom of a deep stack too
        container = todo.pop()
        keyed = type(container) is dict
        for at, item in cast("dict[Any, Any]", container).items() if keyed else enumerate(container):
            if isinstance(item, list):
                todo.append(item)
            elif isinstance(item, dict):
                fields: Any = cast("dict[str, Any]", item)
                if _looks_tagged(fields):
                    fields = container[at] = _untag_object(fields)
                if isinstance(fields, dict):
                    todo.append(fields)
    return root[0]


def _free_dict(value: dict[Any, Any], depth: int, free: Free) -> dict[str, Any]:
    if depth >= DEPTH_LIMIT:
        raise _too_deep()
    changed = value
    key = None
    try:
        for key, item in value.items():
            if type(key) is not str:
                break
            kind = type(item)  # pyright: ignore[reportUnknownVariableType]
            if kind in _ATOMS or (kind is int and _INT_MIN <= item < _INT_END):
                continue
            if (kept := free(item, depth + 1)) is not item:
                if changed is value:
                    changed = value.copy()
                changed[key] = kept
        else:
            return changed
    except Refused as refused:
        refused.steps.append(key)
        raise
    return _free_dict(_text_keys(value), depth, free)


def _free_list(value: list[Any], depth: int, free: Free) -> list[Any]:
    if depth >= DEPTH_LIMIT:
        raise _too_deep()
    changed = value
    at = 0
    try:
        for at, item in enumerate(value):
            if type(item) not in _ATOMS and (kept := free(item, depth + 1)) is not item:
                if changed is value:
                    changed = value.copy()
                changed[at] = kept
    except Refused as refused:
        refused.steps.append(at)
        raise
    return changed


def _too_deep() -> Refused:
    return Refused(f"more than {DEPTH_LIMIT} containers inside each other")


def _text_keys(value: dict[Any, Any]) -> dict[str, Any]:
    for key in value:
        if not isinstance(key, str):
            raise Refused(f"the key {_shortened(key)} is {type(key).__name__}, not text: convert it")
    return {str.__str__(key): item for key, item in value.items()}


def _plain_type(value: Any) -> Any:
    """Return an instance of a subclass as one of the plain type."""
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        return int.__int__(value)
    if isinstance(value, float):
        return float.__float__(value)
    if isinstance(value, bytes):
        return memoryview(value).tobytes()
    if isinstance(value, dict):
        return dict(cast("dict[Any, Any]", value))
    if isinstance(value, list):
        return list(cast("list[Any]", value))
    kinds = "None, bool, int, float, str, bytes, datetime, list, dict"
    raise Refused(f"{type(value).__name__} is none of {kinds}: convert it")


def _utc(value: datetime) -> datetime:
    if type(value) is datetime and value.tzinfo is UTC:
        return value
    if value.utcoffset() is None:
        raise Refused("a time without a zone: use datetime.now(timezone.utc)")
    try:
        moved = value.astimezone(UTC)
    except OverflowError:
        raise Refused("this time has no form in UTC") from None
    plain = datetime.combine(moved.date(), moved.time(), UTC)
    if plain != value:
        raise Refused(f"this {type(value).__name__} is more than a datetime in microseconds")
    return plain


def _looks_tagged(value: dict[Any, Any]) -> bool:
    if len(value) != 1:
        return False
    [key] = value
    return isinstance(key, str) and key.startswith("$")


def _untag_object(tagged: dict[str, Any]) -> Any:
    """Return what a one-key object stands for; of ``$dict``, the dict with its values as they are."""
    [(tag, item)] = tagged.items()
    if tag == "$dict" and isinstance(item, dict) and _looks_tagged(cast("dict[str, Any]", item)):
        return cast(Any, item)
    value: Any = None
    if isinstance(item, str):
        if tag == "$bytes":
            value = a2b_base64(item, strict_mode=True)
        elif tag == "$datetime":
            value = datetime.fromisoformat(item)
        elif tag == "$int":
            value = int(item, 16)
        elif tag == "$float":
            value = float(item)
    try:
        if value is not None and json_free(value, 0) == tagged:  # no other spelling
            return value
    except Refused:
        pass
    raise ValueError(f"no value is written as {_shortened(tagged)}")


def _shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


class Shape:
    """How to reach the free-form values inside a value of one type; this one is free-form itself."""

    def write(self, value: Any, depth: int, free: Free) -> Any:
        """Return ``value`` with ``free`` applied to what is free-form in it; a copy where that changed anything."""
        return free(value, depth)

    def read(self, value: Any) -> Any:
        """Return ``value``, as decoded from JSON, with its free-form parts restored."""
        return untag(value)


class FreeDict(Shape):
    """``dict[str, Any]``: free-form, and a dict."""

    def write(self, value: Any, depth: int, free: Free) -> Any:
        return free(value, depth) if isinstance(value, dict) else value

    def read(self, value: Any) -> Any:
        if type(value) is not dict:
            return value
        plain = untag(value)
        if type(plain) is not dict:
            raise ValueError(f"a {type(plain).__name__} in place of a dict")
        return cast(Any, plain)


class _AnyOf(Shape):
    """A union: each shape leaves alone what is not of its class, and no two have one class."""

    def __init__(self, inner: list[Shape]) -> None:
        self._inner = inner

    def write(self, value: Any, depth: int, free: Free) -> Any:
        for shape in self._inner:
            value = shape.write(value, depth, free)
        return value

    def read(self, value: Any) -> Any:
        for shape in self._inner:
            value = shape.read(value)
        return value


class _Container(Shape):
    """A container with declared types inside; a value of another class is left alone, for the decoder to find."""

    class_: type[Any]

    def parts(self, value: Any) -> Iterable[tuple[Any, Any, Shape]]:
        """Give the parts to visit: where, what, and its shape."""
        raise NotImplementedError

    def changed(self, value: Any, changes: dict[Any, Any]) -> Any:
        """Return a copy of ``value`` with other things in the places of ``changes``."""
        raise NotImplementedError

    def write(self, value: Any, depth: int, free: Free) -> Any:
        if not isinstance(value, self.class_):
            return value
        if depth >= DEPTH_LIMIT:
            raise _too_deep()
        changes: dict[Any, Any] = {}
        where = None
        try:
            for where, item, shape in self.parts(value):
                kept = shape.write(item, depth + 1, free)
                if kept is not item:
                    changes[where] = kept
        except Refused as refused:
            refused.steps.append(where)
            raise
        return self.changed(value, changes) if changes else value

    def read(self, value: Any) -> Any:
        if not isinstance(value, self.class_):
            return value
        changes = {where: kept for where, item, shape in self.parts(value) if (kept := shape.read(item)) is not item}
        return self.changed(value, changes) if changes else value


class _Fields(_Container):
    """A Struct or a dataclass; ``inner`` has those fields that need a visit."""

    def __init__(self, class_: type[Any]) -> None:
        self.class_ = class_
        self.inner: list[tuple[str, Shape]] = []
        self._set = msgspec.structs.force_setattr if issubclass(class_, msgspec.Struct) else object.__setattr__

    def write(self, value: Any, depth: int, free: Free) -> Any:
        if type(value) is not self.class_:  # nor a subclass: that may be another member of the union
            return value
        if depth >= DEPTH_LIMIT:
            raise _too_deep()
        changes: dict[Any, Any] | None = None
        name = ""
        try:
            for name, shape in self.inner:
                item = getattr(value, name)
                if type(item) not in _ATOMS and (kept := shape.write(item, depth + 1, free)) is not item:
                    changes = {} if changes is None else changes
                    changes[name] = kept
        except Refused as refused:
            refused.steps.append(name)
            raise
        return value if changes is None else self.changed(value, changes)

    def parts(self, value: Any) -> Iterable[tuple[Any, Any, Shape]]:
        return [(name, getattr(value, name), shape) for name, shape in self.inner if type(value) is self.class_]

    def changed(self, value: Any, changes: dict[Any, Any]) -> Any:
        made = copy(value)
        for name, item in changes.items():
            self._set(made, name, item)
        return made


class _Keys(_Container):
    """A TypedDict; ``inner`` has those keys that need a visit."""

    class_ = dict

    def __init__(self) -> None:
        self.inner: list[tuple[str, Shape]] = []

    def parts(self, value: Any) -> Iterable[tuple[Any, Any, Shape]]:
        return [(name, value[name], shape) for name, shape in self.inner if name in value]

    def changed(self, value: Any, changes: dict[Any, Any]) -> Any:
        return {**value, **changes}


class _Values(_Container):
    """A mapping with declared types of keys and values."""

    class_ = dict

    def __init__(self, inner: Shape | None) -> None:
        self._inner = inner

    def write(self, value: Any, depth: int, free: Free) -> Any:
        if free is json_free and isinstance(value, dict) and _looks_tagged(cast("dict[Any, Any]", value)):
            raise Refused("its one key starts with $, which JSON cannot tell from a tag: use MessagePack")
        return super().write(value, depth, free)

    def parts(self, value: Any) -> Iterable[tuple[Any, Any, Shape]]:
        inner = self._inner
        return () if inner is None else [(key, item, inner) for key, item in value.items()]

    def changed(self, value: Any, changes: dict[Any, Any]) -> Any:
        return {**value, **changes}


class _Items(_Container):
    """A list or a tuple; ``inner`` is the shape of every item, or those of the places that need a visit."""

    def __init__(self, class_: type[Any], inner: Shape | list[tuple[int, Shape]]) -> None:
        self.class_ = class_
        self._inner = inner

    def parts(self, value: Any) -> Iterable[tuple[Any, Any, Shape]]:
        inner = self._inner
        if isinstance(inner, Shape):
            return [(at, item, inner) for at, item in enumerate(value)]
        return [(at, value[at], shape) for at, shape in inner if at < len(value)]

    def changed(self, value: Any, changes: dict[Any, Any]) -> Any:
        return self.class_(changes.get(at, item) for at, item in enumerate(value))


class Shapes:
    """Makes the shapes of one record type; None stands for a type with nothing to visit.

    For JSON the typed mappings are visited too, since one of them may look like a tagged value.
    """

    def __init__(self, *, json: bool) -> None:
        self._json = json
        self._made: dict[int, Shape | None] = {}  # by identity of the type's description

    def of(self, info: inspect.Type) -> Shape | None:
        """Return the shape of a type.

        Raises:
            Refused: values of this type cannot be kept.
        """
        match info:
            case inspect.AnyType():
                return Shape()
            case inspect.CustomType(cls=class_):
                if class_ is object:
                    return Shape()
                raise Refused(f"{class_.__name__} has no stored form: use a Struct, or Any for plain values")
            case inspect.RawType() | inspect.ExtType():
                raise Refused("msgspec's Raw and Ext differ between the codecs: use bytes")
            case inspect.Metadata(type=inner):
                return self.of(inner)
            case inspect.StructType() | inspect.DataclassType() | inspect.TypedDictType():
                return self._record(info)
            case inspect.DictType():
                return self._mapping(info)
            case inspect.ListType(item_type=item):
                shape = self.of(item)
                return None if shape is None else _Items(list, shape)
            case inspect.VarTupleType(item_type=item):
                shape = self.of(item)
                return None if shape is None else _Items(tuple, shape)
            case inspect.TupleType(item_types=items):
                shapes = [(at, shape) for at, item in enumerate(items) if (shape := self.of(item)) is not None]
                return _Items(tuple, shapes) if shapes else None
            case inspect.SetType(item_type=item) | inspect.FrozenSetType(item_type=item):
                return self._without_free(item, "a set needs items of one declared type")
            case inspect.NamedTupleType(fields=fields):
                for field in fields:
                    self._without_free(field.type, "a named tuple needs fields of declared types: use a Struct")
                return None
            case inspect.UnionType(types=types):
                return self._union(types)
            case _:
                return None

    def _without_free(self, info: inspect.Type, otherwise: str) -> None:
        if self.of(info) is not None:
            raise Refused(otherwise)

    def _record(self, info: inspect.StructType | inspect.DataclassType | inspect.TypedDictType) -> Shape | None:
        mark = id(info)
        if mark in self._made:  # a type within itself finds its own shape here, and so is visited for its depth
            return self._made[mark]
        shape = _Keys() if isinstance(info, inspect.TypedDictType) else _Fields(get_origin(info.cls) or info.cls)
        self._made[mark] = shape
        for field in info.fields:
            try:
                if field.encode_name.startswith("$"):
                    raise Refused(f"no field is stored as {field.encode_name!r}: names with $ are taken")
                inner = self.of(field.type)
            except Refused as refused:
                refused.steps.append(field.name)
                raise
            if inner is not None:
                shape.inner.append((field.name, inner))
        if not shape.inner:
            self._made[mark] = None
        return self._made[mark]

    def _mapping(self, info: inspect.DictType) -> Shape | None:
        key, value = info.key_type, self.of(info.value_type)
        text_key = isinstance(key, inspect.AnyType) or key == inspect.StrType()
        if text_key and type(value) is Shape and info.min_length is None and info.max_length is None:
            return FreeDict()
        self._without_free(key, "a dict needs keys of one declared type: use dict[str, ...]")
        return _Values(value) if value is not None or self._json else None

    def _union(self, types: tuple[inspect.Type, ...]) -> Shape | None:
        inner: list[Shape] = []
        for shape in map(self.of, types):
            if type(shape) is Shape:
                return shape
            if shape is not None:
                inner.append(shape)
        return _AnyOf(inner) if len(inner) > 1 else next(iter(inner), None)
