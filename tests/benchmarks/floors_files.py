"""The floor on files: system calls for a folder of JSON files, on the loop's thread or in one other thread."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Generic, TypeVar

import msgspec

__all__ = ["RawFiles"]

T = TypeVar("T")
_READ = 65536  # bytes


class RawFiles(Generic[T]):
    """A file per record, written beside its place and renamed into it; ``sync``: file and folder, before the answer."""

    def __init__(self, folder: str, type_: type[T], *, sync: bool = False) -> None:
        self._folder, self._sync = folder, sync
        self._encode = msgspec.json.Encoder().encode
        self._decode = msgspec.json.Decoder(type_).decode
        self._lengths: dict[str, int] = {}
        self._thread = ThreadPoolExecutor(1)
        os.makedirs(folder, exist_ok=True)

    async def get(self, name: str) -> T:
        """Read on the loop's own thread."""
        descriptor = os.open(f"{self._folder}/{name}.json", os.O_RDONLY)
        try:
            return self._decode(os.read(descriptor, _READ))
        finally:
            os.close(descriptor)

    async def put(self, name: str, record: T) -> None:
        """Write in the other thread, one hop."""
        data = self._encode(record)
        await asyncio.get_running_loop().run_in_executor(self._thread, self._write, name, data)

    async def append(self, parent: str, item: T) -> int:
        """A file per item, below a folder for its parent; the next number is known here."""
        number = self._lengths[parent] = self._lengths.get(parent, 0) + 1
        if number == 1:
            Path(self._folder, parent).mkdir()
        await self.put(f"{parent}/{number:08x}", item)
        return number

    async def fill(self, parent: str, items: Sequence[T]) -> None:
        for item in items:
            await self.append(parent, item)

    def _write(self, name: str, data: bytes) -> None:
        place = f"{self._folder}/{name}.json"
        descriptor = os.open(place + ".new", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            os.write(descriptor, data)
            if self._sync:
                os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(place + ".new", place)
        if self._sync:
            self._sync_folder(os.path.dirname(place))

    def _sync_folder(self, path: str) -> None:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    async def close(self) -> None:
        self._thread.shutdown()
