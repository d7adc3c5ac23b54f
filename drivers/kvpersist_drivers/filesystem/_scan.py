"""Files in the order of their keys: folders are listed only where the bounds and the limit lead."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator
from heapq import merge
from typing import Final, NamedTuple

from kvpersist.errors import CorruptRecord
from kvpersist_drivers.filesystem._header import HEADER_BYTES, hashed_key
from kvpersist_drivers.filesystem._names import LOW, SUFFIX, file_text, folder_text, hashed_prefix, is_hashed, place
from kvpersist_drivers.filesystem._tree import Tree

__all__ = ["empty_folders", "keys"]

_AFTER_DIGITS: Final = "g"


class _Item(NamedTuple):
    """A file, by its key, or a folder, by the lowest key that it can hold."""

    low: str
    folder: str = ""
    prefix: str = ""
    of_integers: bool = False


def keys(tree: Tree, start: str | None, end: str | None, reverse: bool) -> Iterator[str]:
    """Yield the keys of ``[start, end)`` that have a file, in order, or backwards.

    Raises:
        CorruptRecord: a file with a hashed name does not tell its key; it is named by its path.
    """
    yield from _below(tree, _Item("", "", ""), start, end, reverse)


def empty_folders(tree: Tree, path: str = "") -> list[str]:
    """The folders of keys that hold nothing, or only such, innermost first."""
    found: list[str] = []
    for name in tree.names(path):
        if folder_text(name) is not None:
            inner = f"{path}/{name}" if path else name
            below = empty_folders(tree, inner)
            found += below
            if {f"{inner}/{each}" for each in tree.names(inner)} <= set(below):
                found.append(inner)
    return found


def _below(tree: Tree, within: _Item, start: str | None, end: str | None, reverse: bool) -> Iterator[str]:
    if within.of_integers:
        yield from _integers(tree, within, start, end, reverse)
        return
    names = tree.names(within.folder)
    plain = sorted([name[: -len(SUFFIX)] for name in names if name.endswith(SUFFIX) and "~" not in name])
    items = sorted(_items(tree, within, [name for name in names if "~" in name], start, end))
    if any(_lies_between(plain, items, at, len(within.prefix)) for at, item in enumerate(items) if item.of_integers):
        items, plain = _untangled(tree, sorted(_items(tree, within, names, start, end)), start, end), []
    files = _plain(plain, within.prefix, start, end, reverse)
    for item in merge(files, reversed(items) if reverse else items, reverse=reverse):
        if item.folder:
            yield from _below(tree, item, start, end, reverse)
        else:
            yield item.low


def _plain(texts: list[str], prefix: str, start: str | None, end: str | None, reverse: bool) -> Iterator[_Item]:
    """Files whose names are the texts they stand for; of many, only those asked for are looked at."""
    first = bisect_left(texts, start[len(prefix) :]) if start is not None and start.startswith(prefix) else 0
    last = bisect_left(texts, end[len(prefix) :]) if end is not None and end.startswith(prefix) else len(texts)
    for at in range(last - 1, first - 1, -1) if reverse else range(first, last):
        key = prefix + texts[at]
        if file_text(texts[at] + SUFFIX, False) is None or not key:
            continue
        if (start is None or key >= start) and (end is None or key < end):
            yield _Item(key)


def _lies_between(plain: list[str], items: list[_Item], at: int, cut: int) -> bool:
    """Whether a key lies between those of a folder of integers; ``cut``: length of what all begin with."""
    item = items[at]
    end = item.prefix + _AFTER_DIGITS
    found = bisect_left(plain, item.low[cut:])
    return (at + 1 < len(items) and items[at + 1].low < end) or (found < len(plain) and plain[found] < end[cut:])


def _integers(tree: Tree, within: _Item, start: str | None, end: str | None, reverse: bool) -> Iterator[str]:
    """The keys of a folder of integers: its names are in their order, so only those asked for are looked at."""
    prefix = within.prefix
    names = sorted(tree.names(within.folder))
    first, last = 0, len(names)
    if start is not None and start.startswith(prefix):
        first = bisect_left(names, start[len(prefix) :][:LOW])
    if end is not None and end.startswith(prefix):
        last = bisect_right(names, end[len(prefix) :][:LOW] + SUFFIX)
    for at in range(last - 1, first - 1, -1) if reverse else range(first, last):
        text = file_text(names[at], True)
        if text is not None and (start is None or prefix + text >= start) and (end is None or prefix + text < end):
            yield prefix + text


def _items(tree: Tree, within: _Item, names: Iterable[str], start: str | None, end: str | None) -> Iterator[_Item]:
    """What of these names in a folder is within the bounds."""
    path, prefix = within.folder, within.prefix
    for name in names:
        text = file_text(name, within.of_integers)
        if text is not None:
            key = prefix + text
            if (start is None or key >= start) and (end is None or key < end) and key:
                yield _Item(key)
        elif within.of_integers:
            continue
        elif (found := folder_text(name)) is not None:
            low = prefix + found[0]
            if _may_hold(low, start, end):
                yield _Item(low + "000" if found[1] else low, f"{path}/{name}" if path else name, low, found[1])
        elif is_hashed(name) and (text := hashed_prefix(name)) is not None and _may_hold(prefix + text, start, end):
            key = _hashed(tree, path, name)
            if key is not None and (start is None or key >= start) and (end is None or key < end):
                yield _Item(key)


def _hashed(tree: Tree, path: str, name: str) -> str | None:
    where = f"{path}/{name}" if path else name
    data = tree.read(path, name, HEADER_BYTES)
    if data is None:
        return None
    key = hashed_key(where, data)
    if place(key)[:2] != (path, name):
        raise CorruptRecord(where, "it is the file of another key")
    return key


def _may_hold(prefix: str, start: str | None, end: str | None) -> bool:
    """Whether a key that begins with ``prefix`` can lie in ``[start, end)``."""
    return (end is None or prefix < end) and (start is None or prefix >= start or start.startswith(prefix))


def _untangled(tree: Tree, items: list[_Item], start: str | None, end: str | None) -> list[_Item]:
    """List folders of integers where other keys lie between theirs: ``k12`` is between ``k11ff`` and ``k1200``."""
    whole: list[_Item] = []
    tangled = False
    for number, item in enumerate(items):
        if not item.of_integers or number + 1 == len(items) or items[number + 1].low >= item.prefix + _AFTER_DIGITS:
            whole.append(item)
        else:
            tangled = True
            whole += _items(tree, item, tree.names(item.folder), start, end)
    return sorted(whole) if tangled else items
