"""From a place to a service: the file system of fsspec, and what talks through it."""

from __future__ import annotations

from typing import Any

from kvpersist.errors import BadOption, KvError
from kvpersist_drivers.buckets._options import Place
from kvpersist_drivers.buckets._store import ObjectStore, told

__all__ = ["opened", "over"]


def opened(place: Place, connections: int) -> tuple[ObjectStore, str]:
    """Make the file system that a place names, which may take long; nothing is asked of the service yet.

    Returns:
        What talks to it, and what every name begins with.
    """
    common: dict[str, Any] = {"asynchronous": True, "skip_instance_cache": True, "use_listings_cache": False}
    options = dict(place.options)
    try:
        if place.kind == "s3":
            from kvpersist_drivers.buckets import _s3

            options = _s3.storage_options(options, connections)
            return _s3.S3Store(_s3.S3FileSystem(**common, **options), place.bucket, place.where, owns=True), place.root
        if place.kind == "gcs":
            from kvpersist_drivers.buckets import _gcs

            return _gcs.GcsStore(
                _gcs.GCSFileSystem(**common, **options), place.bucket, place.where, owns=True
            ), place.root
        if place.kind == "azure":
            from kvpersist_drivers.buckets import _azure

            filesystem = _azure.AzureBlobFileSystem(**common, **options)
            return _azure.AzureStore(filesystem, place.bucket, place.where, owns=True), place.root
        from kvpersist_drivers.buckets import _plain

        return _plain.PlainStore(*_plain.from_url(place.root, options), place.where, owns=True), ""
    except (KvError, ImportError):
        raise
    except Exception as error:  # a file system raises what it likes where its options do not fit
        raise BadOption("url", f"{place.where}: {type(error).__name__}: {told(error)}") from error


def over(filesystem: Any, root: str) -> tuple[ObjectStore, str]:
    """Use a ready file system, which stays the caller's; ``root`` is ``bucket/prefix``, or a path of it."""
    protocol: Any = filesystem.protocol
    protocols: tuple[str, ...] = (protocol,) if isinstance(protocol, str) else protocol
    bucket, _, prefix = root.strip("/").partition("/")
    prefix = prefix + "/" if prefix else ""
    where = f"{protocols[0]}://{root}"
    asynchronous = getattr(filesystem, "async_impl", False)
    if asynchronous and not filesystem.asynchronous:
        raise BadOption("client", "make the file system with asynchronous=True, in the loop that uses it")
    if "s3" in protocols and asynchronous:
        from kvpersist_drivers.buckets import _s3

        return _s3.S3Store(filesystem, bucket, where, owns=False), prefix
    if "gs" in protocols and asynchronous:
        from kvpersist_drivers.buckets import _gcs

        return _gcs.GcsStore(filesystem, bucket, where, owns=False), prefix
    if "abfs" in protocols and asynchronous:
        from kvpersist_drivers.buckets import _azure

        return _azure.AzureStore(filesystem, bucket, where, owns=False), prefix
    from kvpersist_drivers.buckets import _plain

    return _plain.PlainStore(filesystem, root, where, owns=False), ""
