"""Google Cloud Storage's JSON interface, with the session, credentials and address of gcsfs."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from io import BytesIO  # aiohttp warns of many bytes that are none
from typing import Any, Final
from urllib.parse import quote

from kvpersist.driver import needs_extra
from kvpersist.errors import BadOption, CommitUnknown, KvError, ReadOnly, Unavailable
from kvpersist_drivers.buckets._store import ANY, NEW, Changed, Condition, Found, Listed, Stream, told

with needs_extra("gcs", module="gcsfs"):
    import aiohttp
    from gcsfs.core import (
        GCSFileSystem,  # the plain one: what gcsfs itself exports may ask the service what a bucket is
    )
    from google.auth.exceptions import GoogleAuthError
    from yarl import URL

__all__ = ["GcsStore"]

_PIECE: Final = 1 << 18  # bytes of a piece that is read
_TIMES: Final = aiohttp.ClientTimeout(total=None, sock_connect=5, sock_read=60)  # seconds
_NOT_SENT: Final = (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError)


class GcsStore:
    """One bucket; the tag of an object is its generation. A write is sent once."""

    def __init__(self, filesystem: GCSFileSystem, bucket: str, where: str, *, owns: bool) -> None:
        """Does not connect."""
        self.calls = 0
        self.server = "Google Cloud Storage"
        self.where = where
        self.part = 8 << 20
        self._fs: Any = filesystem
        self._bucket = quote(bucket, safe="")
        self._owns = owns

    async def get(self, name: str, first: int | None = None) -> Found | None:
        headers = {} if first is None else {"Range": f"bytes=0-{first - 1}"}
        async with self._ask("GET", self._media(name), headers=headers) as answer:
            if answer.status == 404:
                if "bucket does not exist" in await answer.text(errors="replace"):
                    raise self._no_bucket()
                return None
            if answer.status == 416:
                return Found(b"", "")
            await self._check(answer)
            return Found(await answer.read(), answer.headers["X-Goog-Generation"])

    async def put(self, name: str, body: bytes, condition: Condition = ANY) -> str:
        url = self._upload("media", name, condition)
        async with self._ask("POST", url, writes=name, data=BytesIO(body)) as answer:
            await self._check(answer, name)
            return json.loads(await answer.read())["generation"]

    async def delete(self, name: str, condition: Condition = ANY) -> None:
        url = f"{self._fs.base}b/{self._bucket}/o/{quote(name, safe='')}?{_if(condition)}"
        async with self._ask("DELETE", url, writes=name) as answer:
            if answer.status == 404:
                if condition is not ANY:
                    raise Changed
                return
            await self._check(answer, name)

    async def list(self, prefix: str, start: str, limit: int) -> tuple[list[Listed], bool]:
        asked = f"prefix={quote(prefix, safe='')}&startOffset={quote(start, safe='')}&maxResults={limit}"
        url = f"{self._fs.base}b/{self._bucket}/o?{asked}&fields=items(name,size,generation),nextPageToken"
        token = ""
        while True:
            async with self._ask("GET", url + token) as answer:
                await self._check(answer)
                page = json.loads(await answer.read())
            found = [Listed(item["name"], int(item["size"]), item["generation"]) for item in page.get("items", ())]
            more = page.get("nextPageToken")
            if found or not more:
                return found, bool(more)
            token = f"&pageToken={quote(more, safe='')}"

    async def read(self, name: str) -> Stream | None:
        asking = self._ask("GET", self._media(name))
        answer = await asking.__aenter__()
        try:
            if answer.status != 404:
                await self._check(answer)
                return Stream(answer.headers["X-Goog-Generation"], self._pieces(asking, answer))
        except BaseException:  # cancelled too: the answer may not stay open
            answer.close()
            raise
        await asking.__aexit__(None, None, None)
        return None

    async def upload(self, name: str, condition: Condition) -> GcsUpload:
        async with self._ask("POST", self._upload("resumable", name, condition), writes="", json={}) as answer:
            await self._check(answer, "")
            return GcsUpload(self, name, answer.headers["Location"])

    async def close(self) -> None:
        if self._owns and self._fs._session is not None:
            await self._fs._session.close()

    @asynccontextmanager
    async def _ask(
        self, method: str, url: str, *, writes: str | None = None, headers: dict[str, str] | None = None, **sent: Any
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """Send one request; ``writes`` names the object whose state is unknown when its answer is lost, if any."""
        self.calls += 1
        fs = self._fs
        try:
            session = await fs._set_session()
            payer = fs._get_params({})
            if payer:
                url += f"&userProject={quote(str(payer['userProject']), safe='')}"
            async with session.request(
                method,
                URL(url, encoded=True),
                headers=fs._get_headers(headers),
                allow_redirects=False,
                timeout=_TIMES if fs.requests_timeout is None else fs.requests_timeout,
                **sent,
            ) as answer:
                yield answer
        except (aiohttp.ClientError, OSError, GoogleAuthError) as error:
            message = f"{self.where}: {told(error)}"
            if isinstance(error, GoogleAuthError):
                raise BadOption("token", message) from error
            if writes and not isinstance(error, _NOT_SENT):
                raise CommitUnknown((writes,), message) from error
            raise Unavailable(message) from error

    async def _check(self, answer: aiohttp.ClientResponse, writes: str | None = None) -> None:
        status = answer.status
        if status < 300 or status == 308:
            return
        if status == 412 or (status == 409 and writes is not None):
            raise Changed
        text = await answer.text(errors="replace")
        try:
            text = json.loads(text)["error"]["message"]
        except (ValueError, LookupError, TypeError):
            text = text.strip()[:200]
        message = f"{self.where}: {status} {text}"
        if status == 404:
            raise self._no_bucket()
        if status == 401:
            raise BadOption("token", message)
        if status == 403:
            if writes is None:
                raise BadOption("token", f"{message}; reading needs storage.objects.get and storage.objects.list")
            raise ReadOnly(message)
        if status in (408, 429, 503):
            raise Unavailable(message)
        if status >= 500:
            raise CommitUnknown((writes,), message) if writes else Unavailable(message)
        raise KvError(message)

    def _no_bucket(self) -> BadOption:
        return BadOption("url", f"{self.where}: there is no such bucket: create it first")

    async def _pieces(self, asking: Any, answer: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
        try:
            async for piece in answer.content.iter_chunked(_PIECE):
                yield piece
        except (aiohttp.ClientError, OSError) as error:
            raise Unavailable(f"{self.where}: {told(error)}") from error
        finally:
            answer.close()
            await asking.__aexit__(None, None, None)

    def _media(self, name: str) -> str:
        return f"{self._fs._location}/download/storage/v1/b/{self._bucket}/o/{quote(name, safe='')}?alt=media"

    def _upload(self, kind: str, name: str, condition: Condition) -> str:
        place = f"{self._fs._location}/upload/storage/v1/b/{self._bucket}/o"
        return f"{place}?uploadType={kind}&name={quote(name, safe='')}&fields=generation&{_if(condition)}"


class GcsUpload:
    """A resumable upload."""

    def __init__(self, store: GcsStore, name: str, place: str) -> None:
        """Of an upload that was begun at ``place``."""
        self._store, self._name, self._place = store, name, place
        self._last: bytes | None = None  # the piece that is not sent yet: only the last may have any length
        self._sent = 0

    async def add(self, piece: bytes) -> None:
        last, self._last = self._last, piece
        if last is not None:
            await self._send(last, "*", "")

    async def finish(self) -> str:
        assert self._last is not None
        return await self._send(self._last, str(self._sent + len(self._last)), self._name)

    async def abort(self) -> None:
        async with self._store._ask("DELETE", self._place, writes=""):
            return

    async def _send(self, piece: bytes, total: str, writes: str) -> str:
        span = f"bytes {self._sent}-{self._sent + len(piece) - 1}/{total}"
        store = self._store
        async with store._ask(
            "PUT", self._place, writes=writes, headers={"Content-Range": span}, data=BytesIO(piece)
        ) as answer:
            await store._check(answer, writes)
            self._sent += len(piece)
            return json.loads(await answer.read())["generation"] if writes else ""


def _if(condition: Condition) -> str:
    if condition is ANY:
        return ""
    return f"ifGenerationMatch={0 if condition == NEW else condition}"
