"""Azure Blob Storage, with the client and credentials of adlfs."""

from __future__ import annotations

import os
import weakref
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable
from io import BytesIO
from typing import Any, Final, TypeVar

from kvpersist.driver import needs_extra
from kvpersist.errors import BadOption, CommitUnknown, KvError, ReadOnly, Unavailable
from kvpersist_drivers.buckets._names import followed
from kvpersist_drivers.buckets._store import ANY, NEW, Changed, Condition, Found, Listed, Stream, told

with needs_extra("azure", module="adlfs"):
    from adlfs import AzureBlobFileSystem
    from azure.core import MatchConditions
    from azure.core.exceptions import (
        AzureError,
        ClientAuthenticationError,
        HttpResponseError,
        IncompleteReadError,
    )
    from azure.storage.blob import BlobBlock

__all__ = ["AzureStore"]

_ONCE: Final = {"retry_total": 0, "connection_timeout": 5}  # one attempt; seconds
_LARGE: Final = 1 << 20  # bytes
_MARKERS: Final = 256  # places in listings that can be gone on from
_CREDENTIALS: Final = {"AuthenticationFailed", "InvalidAuthenticationInfo", "NoAuthenticationInformation"}

_T = TypeVar("_T")


class AzureStore:
    """One container; the tag of a blob is its ETag. A write is sent once."""

    def __init__(self, filesystem: AzureBlobFileSystem, bucket: str, where: str, *, owns: bool) -> None:
        """Does not connect."""
        self.calls = 0
        self.server = "Azure Blob Storage"
        self.where = where
        self.part = 8 << 20
        self._fs: Any = filesystem
        self._container: Any = filesystem.service_client.get_container_client(bucket)
        self._markers: OrderedDict[tuple[str, str], str] = OrderedDict()  # prefix and last name of a page
        self._owns = owns
        if owns:
            _forget(filesystem)

    async def get(self, name: str, first: int | None = None) -> Found | None:
        try:
            answer = await self._call(self._download(name, first))
            return Found(await self._call(answer.readall(), counts=0), _tag(answer.properties.etag))
        except _Missing:
            return None
        except _Empty:
            return Found(b"", "")

    async def put(self, name: str, body: bytes, condition: Condition = ANY) -> str:
        """As `ObjectStore.put`; what is large takes two requests, as aiohttp warns of many bytes that are no file."""
        if len(body) > _LARGE:
            upload = await self.upload(name, condition)
            await upload.add(body)
            return await upload.finish()
        blob = self._container.get_blob_client(name)
        how = {"overwrite": False} if condition == NEW else {"overwrite": True, **_if(condition)}
        call = blob.upload_blob(body, length=len(body), **how, **_ONCE)
        try:
            return _tag((await self._call(call, name))["etag"])
        except _Missing:
            raise Changed from None

    async def delete(self, name: str, condition: Condition = ANY) -> None:
        try:
            await self._call(self._container.get_blob_client(name).delete_blob(**_if(condition), **_ONCE), name)
        except _Missing:
            if condition is not ANY:
                raise Changed from None

    async def list(self, prefix: str, start: str, limit: int) -> tuple[list[Listed], bool]:
        """As `ObjectStore.list`; a start that no page ended at is reached by reading from the prefix on."""
        marker = self._markers.get((prefix, followed(start) or ""))
        pages = self._container.list_blobs(
            name_starts_with=prefix, results_per_page=limit if start == prefix or marker else 5000, **_ONCE
        ).by_page(marker)
        while True:
            try:
                page = [blob async for blob in await self._call(anext(pages))]
            except StopAsyncIteration:
                return [], False
            except _Missing:
                raise BadOption("url", f"{self.where}: there is no such container: create it first") from None
            found = [Listed(blob.name, blob.size, _tag(blob.etag)) for blob in page if blob.name >= start]
            more = pages.continuation_token
            if page and more:
                self._markers[prefix, page[-1].name] = more
                if len(self._markers) > _MARKERS:
                    self._markers.popitem(last=False)
            if found or not more:
                return found[:limit], bool(more) or len(found) > limit

    async def read(self, name: str) -> Stream | None:
        try:
            answer = await self._call(self._download(name, None))
        except _Missing:
            return None
        return Stream(_tag(answer.properties.etag), self._pieces(answer))

    async def upload(self, name: str, condition: Condition) -> AzureUpload:
        return AzureUpload(self, name, condition)

    async def close(self) -> None:
        if self._owns:
            await self._fs.service_client.close()
            if hasattr(self._fs.credential, "close"):
                await self._fs.credential.close()

    def _download(self, name: str, first: int | None) -> Awaitable[Any]:
        span = {} if first is None else {"offset": 0, "length": first}
        return self._container.get_blob_client(name).download_blob(max_concurrency=1, **span, **_ONCE)

    async def _pieces(self, answer: Any) -> AsyncIterator[bytes]:
        pieces = answer.chunks()
        while True:
            try:
                yield await self._call(anext(pieces), counts=0)
            except StopAsyncIteration:
                return

    async def _call(self, call: Awaitable[_T], writes: str | None = None, counts: int = 1) -> _T:
        """Await one request; ``writes`` names the blob whose state is unknown when its answer is lost, if any."""
        self.calls += counts
        try:
            return await call
        except (AzureError, OSError) as error:
            raise self._translated(error, writes) from error

    def _translated(self, error: Exception, writes: str | None) -> Exception:
        message = f"{self.where}: {told(error)}"
        if isinstance(error, HttpResponseError) and not isinstance(error, IncompleteReadError) and error.status_code:
            code: Any = getattr(error, "error_code", "")
            return self._answered(str(getattr(code, "value", code)), error.status_code, message, writes)
        if isinstance(error, ClientAuthenticationError):
            return BadOption("account_key", message)
        if writes:  # also where it could not connect: aiohttp sends a PUT again, by itself, when a connection breaks
            return CommitUnknown((writes,), message)
        return Unavailable(message)

    def _answered(self, code: str, status: int, message: str, writes: str | None) -> Exception:
        if code == "ContainerNotFound":
            return BadOption("url", f"{self.where}: there is no such container: create it first")
        if status == 404:
            return _Missing()
        if status in (409, 412):
            return Changed()
        if status == 416:
            return _Empty()
        if status == 401 or code in _CREDENTIALS:
            return BadOption("account_key", message)
        if status == 403:
            return BadOption("account_key", message) if writes is None else ReadOnly(message)
        if status in (408, 429, 503):
            return Unavailable(message)
        if status >= 500:
            return CommitUnknown((writes,), message) if writes else Unavailable(message)
        return KvError(message)


class AzureUpload:
    """Blocks of a blob, which the service forgets after a week unless they are committed."""

    def __init__(self, store: AzureStore, name: str, condition: Condition) -> None:
        """Sends nothing yet."""
        self._store, self._name, self._condition = store, name, condition
        self._blob: Any = store._container.get_blob_client(name)
        self._run = os.urandom(6).hex()
        self._blocks: list[str] = []

    async def add(self, piece: bytes) -> None:
        block = f"{self._run}-{len(self._blocks):06}"
        await self._store._call(self._blob.stage_block(block, BytesIO(piece), length=len(piece), **_ONCE), "")
        self._blocks.append(block)

    async def finish(self) -> str:
        blocks = [BlobBlock(block) for block in self._blocks]
        try:
            answer = await self._store._call(
                self._blob.commit_block_list(blocks, **_if(self._condition), **_ONCE), self._name
            )
        except _Missing:
            raise Changed from None
        return _tag(answer["etag"])

    async def abort(self) -> None:
        """Leave the blocks to the service: there is no request that removes them."""


class _Missing(Exception):
    """There is no such blob."""


class _Empty(Exception):
    """A range of a blob without bytes was asked for."""


def _if(condition: Condition) -> dict[str, Any]:
    if condition is ANY:
        return {}
    if condition == NEW:
        return {"match_condition": MatchConditions.IfMissing}
    return {"etag": f'"{condition}"', "match_condition": MatchConditions.IfNotModified}


def _tag(etag: str) -> str:
    return etag.strip('"')


def _forget(filesystem: AzureBlobFileSystem) -> None:
    """Undo what adlfs asks the interpreter to do at its end, on a loop that is not there: `close` does it."""
    for finalizer in list(getattr(weakref.finalize, "_registry", ())):
        alive = finalizer.peek()
        if alive is not None and alive[0] is filesystem:
            finalizer.detach()
