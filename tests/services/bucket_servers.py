"""Emulators of bucket stores, each with the bucket ``kvpersist-test``: MinIO or moto, fake-gcs-server, Azurite."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import urllib.error
import urllib.request
from datetime import UTC, datetime

import install
from server import HOST, Server, free_port

__all__ = ["AzuriteServer", "GcsServer", "MinioServer", "MotoServer"]

_BUCKET = "kvpersist-test"
_AZURE_NAME = "devstoreaccount1"  # the account that Azurite's documentation names, and its key: no secret
_AZURE_KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def _asked(method: str, url: str, body: bytes | None = None, headers: dict[str, str] | None = None) -> bool:
    """Whether the answer was a good one; something that is there already is good too."""
    request = urllib.request.Request(url, data=body, method=method, headers=headers or {})
    try:
        with _DIRECT.open(request, timeout=5):
            return True
    except urllib.error.HTTPError as error:
        error.close()
        return error.code == 409


class _BucketServer(Server):
    @property
    def _at(self) -> str:
        return f"http://{HOST}:{self.port}"


class MinioServer(_BucketServer):
    name = "minio"

    @property
    def url(self) -> str:
        return f"s3://{_BUCKET}"

    @property
    def environment(self) -> dict[str, str]:
        return {"S3_URL": self.url, "S3_ENDPOINT": self._at, "S3_KEY": "kvpersist", "S3_SECRET": "kvpersist"}

    def _prepare(self) -> None:
        (self.folder / "data" / _BUCKET).mkdir(parents=True)  # a folder in its data is a bucket

    def _command(self) -> list[str]:
        listen = ["--address", f"{HOST}:{self.port}", "--console-address", f"{HOST}:{free_port()}"]
        return [install.go_program("minio"), "server", str(self.folder / "data"), *listen, *self._options]

    def _settings(self) -> dict[str, str]:
        quiet = {"MINIO_BROWSER": "off", "MINIO_UPDATE": "off"}
        return {"MINIO_ROOT_USER": "kvpersist", "MINIO_ROOT_PASSWORD": "kvpersist", **quiet}

    def _ready(self) -> bool:
        return _asked("GET", f"{self._at}/minio/health/ready")


class MotoServer(MinioServer):
    """S3 in memory: its data ends with the process."""

    name = "moto"

    def _prepare(self) -> None:
        pass

    def _command(self) -> list[str]:
        return [*install.moto(), "-H", HOST, "-p", str(self.port), *self._options]

    def _ready(self) -> bool:
        return _asked("PUT", f"{self._at}/{_BUCKET}")


class GcsServer(_BucketServer):
    """Google's in memory: its data ends with the process."""

    name = "gcs"

    @property
    def url(self) -> str:
        return f"gcs://{_BUCKET}"

    @property
    def environment(self) -> dict[str, str]:
        return {"GCS_URL": self.url, "GCS_ENDPOINT": self._at}

    def _command(self) -> list[str]:
        listen = ["-scheme", "http", "-host", HOST, "-port", str(self.port), "-backend", "memory"]
        known_as = ["-public-host", f"{HOST}:{self.port}", "-external-url", self._at]
        return [install.go_program("fake-gcs-server"), *listen, *known_as, *self._options]

    def _ready(self) -> bool:
        wanted = json.dumps({"name": _BUCKET}).encode()
        headers = {"Content-Type": "application/json"}
        return _asked("POST", f"{self._at}/storage/v1/b?project=test", wanted, headers)


class AzuriteServer(_BucketServer):
    name = "azure"

    @property
    def url(self) -> str:
        return f"az://{_BUCKET}"

    @property
    def environment(self) -> dict[str, str]:
        account = f"DefaultEndpointsProtocol=http;AccountName={_AZURE_NAME};AccountKey={_AZURE_KEY}"
        return {
            "AZURE_URL": self.url,
            "AZURE_CONNECTION_STRING": f"{account};BlobEndpoint={self._at}/{_AZURE_NAME};",
        }

    def _prepare(self) -> None:
        (self.folder / "data").mkdir()

    def _command(self) -> list[str]:
        where = ["--location", str(self.folder / "data"), "--blobHost", HOST, "--blobPort", str(self.port)]
        return [*install.azurite(), "--silent", *where, "--skipApiVersionCheck", "--disableTelemetry", *self._options]

    def _ready(self) -> bool:
        """Make the container: a request signed as Azure's "Authorize with Shared Key" says."""
        day = datetime.now(UTC).strftime("%a, %d %b %Y %H:%M:%S GMT")
        headers = {"x-ms-date": day, "x-ms-version": "2021-12-02"}
        lines = "".join(f"{name}:{headers[name]}\n" for name in sorted(headers))
        resource = f"/{_AZURE_NAME}/{_AZURE_NAME}/{_BUCKET}\nrestype:container"
        signed = hmac.digest(
            base64.b64decode(_AZURE_KEY), f"PUT{chr(10) * 12}{lines}{resource}".encode(), hashlib.sha256
        )
        headers["Authorization"] = f"SharedKey {_AZURE_NAME}:{base64.b64encode(signed).decode()}"
        return _asked("PUT", f"{self._at}/{_AZURE_NAME}/{_BUCKET}?restype=container", None, headers)
