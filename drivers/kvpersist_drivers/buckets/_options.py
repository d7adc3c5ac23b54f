"""The options of a bucket, and what they mean to fsspec."""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

from msgspec import Meta, Struct, structs

from kvpersist.errors import BadOption, Unsupported
from kvpersist.urls import UrlParts, redact, split

__all__ = ["BucketOptions", "Place"]

_KINDS: Final[dict[str, Literal["s3", "gcs", "azure"]]] = {
    **dict.fromkeys(("s3", "s3a"), "s3"),
    **dict.fromkeys(("gs", "gcs"), "gcs"),
    **dict.fromkeys(("az", "abfs", "abfss"), "azure"),
}
_OURS: Final = ("url", "client", "params", "concurrency", "grace")
_CACHES: Final = {"simplecache", "filecache", "blockcache", "cached"}
_BOOLEANS: Final = {"true": True, "false": False}


class BucketOptions(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where the bucket is, and who asks.

    What is named neither here nor ``kv.`` is the file system's own: a parameter of the URL, or of ``params``.

    Attributes:
        url: ``s3://bucket/prefix``, ``gs://..``, ``az://container/prefix``, or any URL of fsspec, chained ones too.
        client: a ready file system of fsspec, made with ``asynchronous=True``; it is not closed.
        concurrency: reads, and writes, that are under way at once.
        grace: seconds after which a tombstone is removed, where deleting takes one; None: never.
        params: options of the file system, such as ``{"use_ssl": False}``.
        endpoint_url: address of another service than the vendor's, for s3 and gs.
        region: of the bucket, for s3.
        key, secret, token: credentials, for s3; ``token`` for gs too: ``anon``, ``google_default``, ``cloud``
            or the path of a key file. Left out: the usual places are looked at.
        profile: of the files of the AWS command line.
        project: for gs.
        account_name, account_key, sas_token, connection_string: for az.
    """

    url: str
    client: Any = None
    concurrency: Annotated[int, Meta(ge=1, le=1000)] = 32
    grace: Annotated[float, Meta(ge=60)] | None = 86400.0
    params: dict[str, Any] = {}
    endpoint_url: str | None = None
    region: str | None = None
    key: str | None = None
    secret: str | None = None
    token: str | None = None
    profile: str | None = None
    project: str | None = None
    account_name: str | None = None
    account_key: str | None = None
    sas_token: str | None = None
    connection_string: str | None = None

    @classmethod
    def from_url(cls, parts: UrlParts) -> dict[str, Any]:
        """Give the URL as it is; `Place` reads its parameters."""
        return {"url": parts.url}

    def __repr__(self) -> str:
        return f"BucketOptions(url={redact(self.url)!r}, concurrency={self.concurrency}, grace={self.grace})"

    def __rich_repr__(self) -> list[tuple[str, Any]]:
        """Rich would show every field, a password too."""
        return [("url", redact(self.url))]


class Place(Struct, frozen=True):
    """What `BucketOptions` name: ``kind`` is s3, gcs, azure or url, and ``root`` what every name begins with."""

    kind: Literal["s3", "gcs", "azure", "url"]
    bucket: str
    root: str
    options: dict[str, Any]
    where: str

    def __repr__(self) -> str:
        return f"Place({self.where!r})"

    def __rich_repr__(self) -> list[tuple[str, Any]]:
        """Rich would show every field, a password too."""
        return [("where", self.where)]

    @classmethod
    def of(cls, options: BucketOptions) -> Place:
        """Take the URL apart.

        Raises:
            BadOption: it names no bucket, or a prefix that no service keeps.
        """
        parts, _ = split(options.url)
        named = {
            name: value for name, value in structs.asdict(options).items() if name not in _OURS and value is not None
        }
        kind = _KINDS.get(parts.scheme)
        if kind is None:
            if cache := next((link for link in parts.url.partition("?")[0].split("::") if link in _CACHES), None):
                raise Unsupported(f"{cache}:: (it shows what others have overwritten since)", "leave it out")
            return cls("url", "", options.url, {**options.params, **named}, redact(options.url))
        given = {name: _BOOLEANS.get(value.lower(), value) for name, value in parts.params.items()}
        bucket, root = parts.host, parts.path.strip("/")
        if kind == "azure" and parts.username:  # abfs://container@account.dfs.core.windows.net/prefix
            bucket = parts.username
            given.setdefault("account_name", parts.host.partition(".")[0])
        elif parts.username or parts.password or parts.port:
            raise BadOption("url", f"{parts.scheme}://bucket/prefix names no user or port: give key= and endpoint_url=")
        if not bucket:
            raise BadOption("url", f"it names no bucket: write {parts.scheme}://bucket/prefix")
        if any(part in ("", ".", "..") or not part.isprintable() for part in root.split("/") if root):
            raise BadOption("url", "a prefix has no empty parts, no '.' or '..', and no control characters")
        where = f"{parts.scheme}://{bucket}" + (f"/{root}" if root else "")
        return cls(kind, bucket, root + "/" if root else "", {**given, **options.params, **named}, where)
