"""Raw keys: ls, get, put, rm."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator
from typing import Annotated, Any, Final, Literal

import msgspec
from cyclopts import Parameter

from kvpersist.cli.options import FOR_PEOPLE, USUAL_STORE, Count, Output, StoreOption
from kvpersist.cli.render import (
    clean,
    counted,
    is_terminal,
    print_items,
    print_json,
    read_stdin,
    say,
    write,
    write_bytes,
)
from kvpersist.driver import ABSENT
from kvpersist.errors import BadOption, CorruptRecord, LargeValue, ReservedNamespace
from kvpersist.keys import partition
from kvpersist.opening import open_store
from kvpersist.store import Store
from kvpersist.urls import parse_duration

__all__ = ["agreed", "get", "ls", "put", "rm"]

_AGENTS: Final = "kv"  # the namespace of kvpersist.open()


async def ls(
    prefix: str = "",
    /,
    *,
    depth: Annotated[int | None, Parameter(name=["--depth", "-d"])] = None,
    limit: Count | None = None,
    store: StoreOption = USUAL_STORE,
    output: Output = FOR_PEOPLE,
) -> int:
    """List keys in order, one per line; values are not read.

    Args:
        prefix: only keys that start with this text.
        depth: leave out keys with this many further ':' behind the prefix.
        limit: at most so many.
        store: which store.
        output: in which form.
    """
    async with open_store(store.existing()) as opened:

        async def found() -> AsyncIterator[str]:
            left = limit
            if left is not None and left <= 0:
                return
            async for key in opened.keys(prefix, max_depth=depth, raw=True):
                yield key
                if left is not None:
                    left -= 1
                    if left == 0:
                        return

        if output.json or output.jsonl:
            await print_items(found(), output)
        else:
            async for key in found():
                write((clean(key) if is_terminal() else key) + "\n")
    return 0


async def get(
    key: str,
    /,
    *,
    as_bytes: Annotated[bool, Parameter(name="--bytes")] = False,
    store: StoreOption = USUAL_STORE,
    output: Output = FOR_PEOPLE,
) -> int:
    """Print the value of a key: text and bytes as they are, everything else as JSON.

    Args:
        key: the key.
        as_bytes: print the stored bytes, frame and all.
        store: which store.
        output: in which form.
    """
    async with open_store(store.existing()) as opened:
        try:
            found, value = await (_stored if as_bytes else _value)(opened, key)
        except LargeValue:
            if output.json or output.jsonl:
                raise
            await _write_large(opened, key)
            return 0
    if not found:
        say(f"no such key: {key}", style="red")
        return 3
    if output.json or output.jsonl:
        print_json(value, compact=output.jsonl)
    elif isinstance(value, bytes):
        write_bytes(value)
    elif isinstance(value, str):
        write((clean(value) if is_terminal() else value) + "\n")
    else:
        print_json(value)
    return 0


async def put(
    key: str,
    value: Annotated[str, Parameter(allow_leading_hyphen=True)] = "-",
    /,
    *,
    form: Annotated[Literal["text", "json", "bytes"], Parameter(name="--as")] = "text",
    ttl: str | None = None,
    if_absent: bool = False,
    store: StoreOption = USUAL_STORE,
) -> int:
    """Store a value under a key.

    Args:
        key: the key, such as app:user:42.
        value: the value; left out or '-': read from stdin.
        form: what the value is; text from stdin loses its last newline.
        ttl: how long it lives, such as 30s, 12h, 7d; default: for ever.
        if_absent: fail with exit code 5 where the key exists.
        store: which store.
    """
    if partition(key) == _AGENTS:  # a store that holds no sessions yet does not know it
        raise ReservedNamespace(key, _AGENTS)
    if value == "-" and is_terminal(sys.stdin):
        say("reading the value from the terminal; end it with Ctrl-D")
    data = value.encode() if value != "-" else read_stdin()
    try:
        seconds = None if ttl is None else parse_duration(ttl)
        stored: Any = data
        if form == "json":
            stored = msgspec.json.decode(data)
        elif form == "text":
            text = data.decode()
            stored = text.removesuffix("\n") if value == "-" else text
    except UnicodeDecodeError as error:
        raise BadOption("value", "it is not UTF-8 text: use --as bytes") from error
    except msgspec.DecodeError as error:
        raise BadOption("value", f"it is not JSON ({error})") from error
    except ValueError as error:
        raise BadOption("--ttl", str(error)) from error
    async with open_store(store.meant) as opened:
        await opened.put(key, stored, ttl=seconds, expect=ABSENT if if_absent else None)
    return 0


async def rm(
    *keys: str,
    prefix: str | None = None,
    dry_run: bool = False,
    yes: Annotated[bool, Parameter(name=["--yes", "-y"])] = False,
    store: StoreOption = USUAL_STORE,
) -> int:
    """Remove keys, or every key with a prefix.

    Args:
        keys: the keys.
        prefix: remove every key that starts with this text; needs --yes.
        dry_run: only print the keys that would be removed.
        yes: do not ask.
        store: which store.
    """
    if bool(keys) == (prefix is not None):
        raise BadOption("rm", "name the keys, or give --prefix")
    async with open_store(store.existing()) as opened:
        if prefix is None:
            there = await opened.has_many(keys)
            present = [key for key, is_there in zip(keys, there, strict=True) if is_there]
            if dry_run:
                write("".join(f"{key}\n" for key in present))
            else:
                say(f"removed {counted(await opened.delete_many(present), 'key')}")
            for key in keys:
                if key not in present:
                    say(f"no such key: {key}", style="red")
            return 0 if len(present) == len(keys) else 3
        if dry_run:
            count = 0
            async for key in opened.keys(prefix, raw=True):
                write(f"{key}\n")
                count += 1
            say(f"would remove {counted(count, 'key')}")
            return 0
        if not yes:
            count = 0
            async for _ in opened.keys(prefix, raw=True):
                count += 1
            if not agreed(f"remove {counted(count, 'key')} with the prefix {prefix!r}?"):
                say("nothing was removed: --dry-run lists the keys, --yes removes them")
                return 2
        say(f"removed {counted(await opened.clear(prefix), 'key')}")
    return 0


async def _value(store: Store, key: str) -> tuple[bool, Any]:
    try:
        versioned = await store.get_versioned(key)
    except CorruptRecord:
        if "#" not in key:
            raise
        return await _stored(store, key)  # a repository's index entry or counter: bytes without a frame
    return versioned is not None, None if versioned is None else versioned.value


async def _write_large(store: Store, key: str) -> None:
    async with store.open_read(key) as value:
        if value is not None:
            async for part in value:
                write_bytes(part)


async def _stored(store: Store, key: str) -> tuple[bool, bytes | None]:
    [entry] = await store.driver.get([key])
    return entry is not None, None if entry is None else entry.value


def agreed(question: str) -> bool:
    """Ask on a terminal; elsewhere nobody answers, which is no."""
    if not (is_terminal(sys.stdin) and is_terminal(sys.stderr)):
        return False
    sys.stderr.write(f"{clean(question)} [y/N] ")
    sys.stderr.flush()
    return sys.stdin.readline().strip().lower() in ("y", "yes")
