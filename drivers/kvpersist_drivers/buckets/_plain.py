"""Any other file system of fsspec: no conditions, and a listing of everything for each page of a scan."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from typing import Any, Final, TypeVar

from kvpersist.driver import needs_extra
from kvpersist.errors import BadOption, CommitUnknown, KvError, ReadOnly, Unavailable, Unsupported
from kvpersist_drivers.buckets._names import internal
from kvpersist_drivers.buckets._store import ANY, Condition, Found, Listed, Stream, told

with needs_extra("fsspec", module="fsspec"):
    import fsspec
    from fsspec.asyn import AsyncFileSystem
    from fsspec.implementations.asyn_wrapper import AsyncFileSystemWrapper
    from fsspec.implementations.dirfs import DirFileSystem
    from fsspec.implementations.local import LocalFileSystem

__all__ = ["PlainStore", "from_url"]

_PIECE: Final = 1 << 20  # bytes of a piece that is read
_LEFT: Final = 3_600_000  # milliseconds until `compact` removes what an interrupted write left

_T = TypeVar("_T")
_fsspec: Any = fsspec  # whose types are not whole


def from_url(url: str, options: dict[str, Any]) -> tuple[Any, str]:
    """Return the file system and the folder that any URL of fsspec names, a chained one too."""
    if "::" not in url:
        kind: Any = _fsspec.get_filesystem_class(url.partition("://")[0])
        asynchronous = {"asynchronous": True} if kind.async_impl else {}
        options = {"use_listings_cache": False, **asynchronous, **options}
    return _fsspec.url_to_fs(url, skip_instance_cache=True, **options)


class PlainStore:
    """A folder of a file system; one that is not asynchronous works in threads."""

    def __init__(self, filesystem: Any, folder: str, where: str, *, owns: bool) -> None:
        """``folder`` is a path of the file system."""
        chained: Any = filesystem
        if isinstance(chained, DirFileSystem) and not chained.asynchronous:
            inner: Any = chained
            filesystem, folder = inner.fs, str(inner.path)
        ready = isinstance(filesystem, AsyncFileSystem) and filesystem.async_impl and filesystem.asynchronous
        self.calls = 0
        self.server = f"fsspec {type(filesystem).__name__}"
        self.where = where
        self.part = _PIECE
        self._fs: Any = filesystem if ready else AsyncFileSystemWrapper(filesystem, asynchronous=True)
        self._folder = folder.rstrip("/")
        self._local = isinstance(filesystem, LocalFileSystem)
        self._owns = owns

    async def get(self, name: str, first: int | None = None) -> Found | None:
        try:
            return Found(bytes(await self._call(self._fs._cat_file(self._path(name), start=0, end=first))), "")
        except FileNotFoundError:
            return None

    async def put(self, name: str, body: bytes, condition: Condition = ANY) -> str:
        upload = await self.upload(name, condition)
        await upload.add(body)
        return await upload.finish()

    async def delete(self, name: str, condition: Condition = ANY) -> None:
        if condition is not ANY:
            raise Unsupported("a condition")
        with suppress(FileNotFoundError):
            await self._call(self._fs._rm_file(self._path(name)), writes=name)

    async def list(self, prefix: str, start: str, limit: int) -> tuple[list[Listed], bool]:
        try:
            found = await self._call(self._fs._find(self._folder, detail=True))
        except FileNotFoundError:
            return [], False
        skip = len(self._folder) + 1 if self._folder else 0
        names = {path[skip:]: info for path, info in found.items()}
        inside = sorted((name for name in names if name.startswith(prefix) and name >= start), key=str.encode)
        listed = [Listed(name, names[name].get("size") or 0, "") for name in inside[:limit]]
        return listed, len(inside) > limit

    async def read(self, name: str) -> Stream | None:
        if self._local:
            try:
                file = await self._call(asyncio.to_thread(open, self._path(name), "rb"))
            except FileNotFoundError:
                return None
            return Stream("", self._pieces(lambda: asyncio.to_thread(file.read, _PIECE), file.close))
        found = await self.get(name)
        if found is None:
            return None
        pieces = (found.body[at : at + _PIECE] for at in range(0, len(found.body), _PIECE))

        async def following() -> bytes:
            return next(pieces, b"")

        return Stream("", self._pieces(following, lambda: None))

    async def upload(self, name: str, condition: Condition) -> Any:
        if condition is not ANY:
            raise Unsupported("a condition")
        if not self._local:
            return _Held(self, name)
        left = self._path(internal(int(time.time() * 1000) + _LEFT, "t", os.urandom(8).hex()))
        return _Beside(self, name, left)

    async def close(self) -> None:
        session = getattr(self._fs, "_session", None) if self._owns else None
        if session is not None:
            await session.close()

    async def write(self, name: str, body: bytes) -> None:
        """Write an object that is no file of this machine, and the folders it needs."""
        path = self._path(name)
        try:
            await self._call(self._fs._pipe_file(path, body), writes=name)
        except FileNotFoundError:
            await self._call(self._fs._makedirs(path.rpartition("/")[0], exist_ok=True), writes="")
            try:
                await self._call(self._fs._pipe_file(path, body), writes=name)
            except FileNotFoundError as error:
                raise CommitUnknown((name,), f"{self.where}: {told(error)}") from error

    async def _call(self, call: Awaitable[_T], writes: str | None = None) -> _T:
        self.calls += 1
        try:
            return await call
        except FileNotFoundError:
            raise
        except Exception as error:  # a file system raises what its client library does
            raise self._translated(error, writes) from error

    def _translated(self, error: Exception, writes: str | None) -> KvError:
        message = f"{self.where}: {told(error)}"
        if isinstance(error, KvError):
            return error
        if isinstance(error, PermissionError | NotImplementedError):
            return BadOption("url", message) if writes is None else ReadOnly(message)
        return CommitUnknown((writes,), message) if writes else Unavailable(message)

    async def _pieces(
        self, following: Callable[[], Awaitable[bytes]], close: Callable[[], None]
    ) -> AsyncIterator[bytes]:
        try:
            while piece := await self._call(following()):
                yield piece
        finally:
            close()

    def _path(self, name: str) -> str:
        return f"{self._folder}/{name}" if self._folder else name


class _Held:
    """Pieces that are kept in memory until all are there: not every file system can give up a file half written."""

    def __init__(self, store: PlainStore, name: str) -> None:
        self._store, self._name = store, name
        self._pieces: list[bytes] = []

    async def add(self, piece: bytes) -> None:
        self._pieces.append(piece)

    async def finish(self) -> str:
        await self._store.write(self._name, b"".join(self._pieces))
        return ""

    async def abort(self) -> None:
        self._pieces.clear()


class _Beside:
    """A file of this machine, written beside its place and moved there."""

    def __init__(self, store: PlainStore, name: str, temporary: str) -> None:
        self._store, self._name, self._temporary = store, name, temporary

    async def add(self, piece: bytes) -> None:
        await self._store._call(asyncio.to_thread(_append, self._temporary, piece), writes="")

    async def finish(self) -> str:
        place = self._store._path(self._name)
        await self._store._call(asyncio.to_thread(_move, self._temporary, place), writes=self._name)
        return ""

    async def abort(self) -> None:
        await asyncio.to_thread(_remove, self._temporary)


def _append(path: str, piece: bytes) -> None:
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "ab") as file:
        file.write(piece)


def _move(path: str, place: str) -> None:
    os.makedirs(os.path.dirname(place), exist_ok=True)
    os.replace(path, place)


def _remove(path: str) -> None:
    with suppress(FileNotFoundError):
        os.remove(path)
