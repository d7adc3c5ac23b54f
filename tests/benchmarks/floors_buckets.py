"""The floor on a bucket: s3fs alone.

As it comes, s3fs asks for an object's size before it reads it; `AT_ONCE` is how it reads with one request.
"""

from __future__ import annotations

import asyncio
from typing import Any, Generic, Self, TypeVar

import msgspec
from s3fs import S3FileSystem

__all__ = ["AT_ONCE", "RawBucket"]

T = TypeVar("T")
AT_ONCE = {"max_concurrency": 1}


class RawBucket(Generic[T]):
    """Records as objects below one prefix, ``bucket/prefix``."""

    def __init__(self, filesystem: Any, session: Any, root: str, type_: type[T], concurrency: int) -> None:
        self.filesystem, self._session, self._root = filesystem, session, root
        self._reading = asyncio.Semaphore(concurrency)
        self._encode = msgspec.msgpack.Encoder().encode
        self._decode = msgspec.msgpack.Decoder(type_).decode

    @classmethod
    async def open(cls, root: str, type_: type[T], *, concurrency: int, **where: Any) -> Self:
        limits = {"max_pool_connections": 2 * concurrency}
        filesystem = S3FileSystem(
            asynchronous=True, use_listings_cache=False, skip_instance_cache=True, config_kwargs=limits, **where
        )
        return cls(filesystem, await filesystem.set_session(), root, type_, concurrency)

    async def put(self, id_: str, record: T) -> None:
        await self.filesystem._pipe_file(f"{self._root}/{id_}", self._encode(record))

    async def get(self, id_: str, **how: int) -> T:
        return self._decode(await self.filesystem._cat_file(f"{self._root}/{id_}", **how))

    async def list(self, prefix: str, **how: int) -> list[T]:
        """Names, then every object, side by side."""
        names = await self.filesystem._find(f"{self._root}/{prefix}")
        return await asyncio.gather(*(self._one(name, how) for name in names))

    async def _one(self, name: str, how: dict[str, int]) -> T:
        async with self._reading:
            return self._decode(await self.filesystem._cat_file(name, **how))

    async def close(self) -> None:
        await self._session.close()
