"""S3 and what speaks its protocol, through s3fs."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable
from contextlib import suppress
from typing import Any, Final, TypeVar, cast

from kvpersist.driver import needs_extra
from kvpersist.errors import BadOption, CommitUnknown, KvError, ReadOnly, Unavailable
from kvpersist_drivers.buckets._names import before
from kvpersist_drivers.buckets._store import ANY, NEW, Changed, Condition, Found, Listed, Stream, told

with needs_extra("s3", module="s3fs"), needs_extra("s3", module="aiobotocore"):
    from aiohttp import ClientError as HttpError
    from botocore import exceptions as theirs
    from botocore import utils
    from s3fs import S3FileSystem

__all__ = ["S3Store", "storage_options"]

_PIECE: Final = 1 << 18  # bytes of a piece that is read
_SMALL: Final = 1 << 20  # bytes
_CREDENTIALS: Final = {
    *("InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken", "TokenRefreshRequired"),
    *("AuthorizationHeaderMalformed", "RequestTimeTooSkewed", "InvalidSecurity", "NotSignedUp"),
}
_DENIED: Final = {"AccessDenied", "AllAccessDisabled", "AccountProblem", "MethodNotAllowed"}
_LATER: Final = {
    "SlowDown",
    "ServiceUnavailable",
    "RequestLimitExceeded",
    "Throttling",
    "SlowDownRead",
    "SlowDownWrite",
}
_NO_CREDENTIALS: Final = (theirs.NoCredentialsError, theirs.PartialCredentialsError, theirs.CredentialRetrievalError)
_MALFORMED: Final = (
    TypeError,
    ValueError,
    theirs.ProfileNotFound,
    theirs.InvalidRegionError,
    theirs.ParamValidationError,
)

_T = TypeVar("_T")


def storage_options(options: dict[str, Any], connections: int) -> dict[str, Any]:
    """Return what `S3FileSystem` is made with: as given, less attempts that kvpersist must know of."""
    client, config = dict(options.pop("client_kwargs", None) or {}), dict(options.pop("config_kwargs", None) or {})
    if region := options.pop("region", None):
        client["region_name"] = region
    config.setdefault("max_pool_connections", connections)
    config.setdefault("retries", {"total_max_attempts": 1})
    return {**options, "client_kwargs": client, "config_kwargs": config}


class S3Store:
    """One bucket. A write is sent once: a second attempt could overwrite what others wrote after the first.

    (aiohttp sends again what went to a kept connection that turns out to be closed.)
    """

    def __init__(self, filesystem: S3FileSystem, bucket: str, where: str, *, owns: bool) -> None:
        """Does not connect."""
        self.calls = 0
        self.server = "S3"
        self.where = where
        self.part = 8 << 20
        self._fs: Any = filesystem
        self._bucket = bucket
        self._owns = owns
        self._client: Any = None
        if owns:
            filesystem.retries = 1

    async def get(self, name: str, first: int | None = None) -> Found | None:
        ranged = {} if first is None else {"Range": f"bytes=0-{first - 1}"}
        try:
            answer = await self._call("get_object", Key=name, **ranged)
            body = await self._read(answer["Body"].read())
        except _Missing:
            return None
        except _Empty:
            return Found(b"", "")
        return Found(body, _tag(answer))

    async def put(self, name: str, body: bytes, condition: Condition = ANY) -> str:
        try:
            answer = await self._call("put_object", writes=name, Key=name, Body=body, **_if(condition))
        except _Missing:
            raise Changed from None
        return _tag(answer)

    async def delete(self, name: str, condition: Condition = ANY) -> None:
        try:
            await self._call("delete_object", writes=name, Key=name, **_if(condition))
        except _Missing:
            if condition is not ANY:
                raise Changed from None

    async def list(self, prefix: str, start: str, limit: int) -> tuple[list[Listed], bool]:
        after = {"StartAfter": before(start)} if start > prefix else {}
        answer = await self._call("list_objects_v2", Prefix=prefix, MaxKeys=limit, **after)
        server = answer["ResponseMetadata"]["HTTPHeaders"].get("server")
        self.server = f"S3 ({server})" if server else "S3"
        found = [Listed(item["Key"], item["Size"], _tag(item)) for item in answer.get("Contents", ())]
        return found, answer["IsTruncated"]

    async def read(self, name: str) -> Stream | None:
        try:
            answer = await self._call("get_object", Key=name)
        except _Missing:
            return None
        return Stream(_tag(answer), self._pieces(answer["Body"]))

    async def upload(self, name: str, condition: Condition) -> S3Upload:
        answer = await self._call("create_multipart_upload", writes="", Key=name)
        return S3Upload(self, name, answer["UploadId"], condition)

    async def close(self) -> None:
        if self._owns and self._fs._s3 is not None:
            await self._fs._s3creator.__aexit__(None, None, None)

    async def _call(self, method: str, writes: str | None = None, **arguments: Any) -> Any:
        """Send one request; ``writes`` names the object whose state is unknown when its answer is lost, if any."""
        self.calls += 1
        try:
            await self._connect()
            return await self._fs._call_s3(method, Bucket=self._bucket, **arguments)
        except Exception as error:  # botocore, aiohttp and s3fs each raise of their own
            raise self._translated(error, writes) from error

    async def _connect(self) -> None:
        client = await self._fs.set_session()  # the same one, until its credentials or connections are gone
        if client is not self._client and self._owns:
            client.meta.events.register_last("before-call.s3", _without_asking)
        self._client = client

    async def _read(self, reading: Awaitable[_T]) -> _T:
        try:
            return await reading
        except (HttpError, theirs.BotoCoreError, OSError) as error:
            raise Unavailable(f"{self.where}: {told(error)}") from error

    async def _pieces(self, body: Any) -> AsyncIterator[bytes]:
        try:
            while piece := await self._read(cast("Awaitable[bytes]", body.read(_PIECE))):
                yield piece
        finally:
            body.close()

    def _translated(self, error: Exception, writes: str | None) -> Exception:
        cause = error if isinstance(error, theirs.ClientError) else error.__cause__
        if isinstance(cause, theirs.ClientError):
            told_of = cast("dict[str, Any]", cause.response)
            code, status = str(told_of["Error"].get("Code")), told_of["ResponseMetadata"].get("HTTPStatusCode", 0)
            return self._answered(code, status, f"{self.where}: {code}: {told(cause)}", writes)
        message = f"{self.where}: {told(error)}"
        if isinstance(error, _NO_CREDENTIALS):
            return BadOption("key", f"{message}; give key and secret, a profile, or anon=true")
        if isinstance(error, _MALFORMED):
            return BadOption("url", message)
        if writes:  # also where it could not connect: aiohttp sends a PUT again, by itself, when a connection breaks
            return CommitUnknown((writes,), message)
        network = isinstance(error, (OSError, HttpError, theirs.BotoCoreError))
        return Unavailable(message) if network else KvError(message)

    def _answered(self, code: str, status: int, message: str, writes: str | None) -> Exception:
        if code == "NoSuchBucket":
            return BadOption("url", f"{self.where}: there is no such bucket: create it first")
        if status == 404:
            return _Missing()
        if status in (409, 412):
            return Changed()
        if status == 416:
            return _Empty()
        if code in _CREDENTIALS:
            return BadOption("key", message)
        if code in _DENIED or status in (401, 403):
            if writes is None:
                return BadOption("key", f"{message}; reading needs GetObject and ListBucket")
            return ReadOnly(message)
        if status in (301, 307):
            return BadOption("region", f"{message}; the bucket is in another region")
        if code in _LATER or status in (429, 503):
            return Unavailable(message)
        if status >= 500:
            return CommitUnknown((writes,), message) if writes else Unavailable(message)
        return KvError(message)


class S3Upload:
    """A multipart upload."""

    def __init__(self, store: S3Store, name: str, number: str, condition: Condition) -> None:
        """Of an upload that was created."""
        self._store = store
        self._place = {"Key": name, "UploadId": number}
        self._condition = condition
        self._parts: list[dict[str, Any]] = []

    async def add(self, piece: bytes) -> None:
        number = len(self._parts) + 1
        answer = await self._store._call("upload_part", writes="", PartNumber=number, Body=piece, **self._place)
        self._parts.append({"PartNumber": number, "ETag": answer["ETag"]})

    async def finish(self) -> str:
        parts = {"MultipartUpload": {"Parts": self._parts}}
        try:
            answer = await self._store._call(
                "complete_multipart_upload", writes=self._place["Key"], **parts, **self._place, **_if(self._condition)
            )
        except _Missing:
            raise Changed from None
        return _tag(answer)

    async def abort(self) -> None:
        with suppress(_Missing):  # it is in its place
            await self._store._call("abort_multipart_upload", writes="", **self._place)


class _Missing(Exception):
    """There is no such object."""


class _Empty(Exception):
    """A range of an object without bytes was asked for."""


def _without_asking(params: dict[str, Any], **_: Any) -> None:
    """Send a small body at once: asking first whether it is welcome is a round trip of its own."""
    if params["headers"].get("Expect") and (cast(Any, utils).determine_content_length(params["body"]) or 0) <= _SMALL:
        del params["headers"]["Expect"]


def _if(condition: Condition) -> dict[str, str]:
    if condition is ANY:
        return {}
    return {"IfNoneMatch": "*"} if condition == NEW else {"IfMatch": f'"{condition}"'}


def _tag(answer: Any) -> str:
    return answer["ETag"].strip('"')
