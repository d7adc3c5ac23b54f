"""What MongoDB and PyMongo say, in kvpersist's words."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from socket import gaierror
from ssl import SSLCertVerificationError
from typing import Any, Final

from bson.errors import BSONError
from pymongo import errors as theirs

from kvpersist.errors import (
    BadKey,
    BadOption,
    CommitUnknown,
    KvError,
    PoolExhausted,
    ReadOnly,
    StoreClosed,
    Unavailable,
)

__all__ = ["DUPLICATE_KEY", "Translator"]

DUPLICATE_KEY: Final = 11000
_UNAUTHORIZED: Final = 13
_WRONG_LOGIN: Final = {11, 18, 8000}  # UserNotFound, AuthenticationFailed, AtlasError
_NOT_PRIMARY: Final = {10107, 13435}  # refused before anything was done
_WHILE_CONNECTING: Final = (ConnectionRefusedError, gaierror, SSLCertVerificationError)


class Translator:
    """Raises kvpersist errors in place of PyMongo's, which stay the cause."""

    def __init__(self, client: Any) -> None:
        self._client = client

    @property
    def where(self) -> str:
        """The servers for people, without user and password."""
        try:
            servers = sorted(self._client.topology_description.server_descriptions())
        except (AttributeError, theirs.PyMongoError):
            servers = []
        shown = ",".join(host if port is None else f"{host}:{port}" for host, port in servers)
        return f"mongodb at {shown or '?'}"

    @contextmanager
    def reading(self) -> Iterator[None]:
        try:
            yield
        except theirs.PyMongoError as error:
            raise self.of_client(error, writes=False) from error
        except UnicodeEncodeError as error:
            raise BadKey(error.object, "no UTF-8 text: it holds a lone surrogate") from error
        except BSONError as error:
            raise KvError(f"{self.where}: an answer that cannot be read: {error}") from error

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Lets ``BulkWriteError`` through, which tells what was done."""
        try:
            yield
        except theirs.BulkWriteError:
            raise
        except theirs.PyMongoError as error:
            raise self.of_client(error, writes=True) from error
        except KeyError as error:  # an answer of FerretDB to an update that failed lacks a count PyMongo looks for
            raise CommitUnknown((), f"{self.where}: an answer without {error}") from error

    def of_client(self, error: theirs.PyMongoError, *, writes: bool) -> KvError:
        """The error of ours for what PyMongo raised in a call that ``writes`` or does not."""
        message = f"{self.where}: {_short(error)}"
        if isinstance(error, theirs.WaitQueueTimeoutError):
            pool = self._client.options.pool_options
            return PoolExhausted(pool.max_pool_size, pool.max_pool_size, pool.wait_queue_timeout or 0.0)
        if isinstance(error, theirs.InvalidOperation):
            closed = "after close" in str(error)
            return StoreClosed("the client was closed: open the store again") if closed else KvError(message)
        if isinstance(error, theirs.ConfigurationError):  # of mongodb+srv, whose hosts are looked up when first needed
            return BadOption("url", message)
        if isinstance(error, theirs.OperationFailure):
            return self._of_refusal(error, message, writes)
        if writes and _may_have_been_sent(error):
            return CommitUnknown((), message)
        return Unavailable(f"{message}; nothing was changed: try again")

    def _of_refusal(self, error: theirs.OperationFailure, message: str, writes: bool) -> KvError:
        if error.code in _WRONG_LOGIN:
            return BadOption("password", f"{self.where} refuses this user or password: {_short(error)}")
        if error.code == _UNAUTHORIZED:
            return ReadOnly(message) if writes else BadOption("username", message)
        if writes:  # refused as a whole, or given up half way: the server does not say which
            return CommitUnknown((), message)
        return Unavailable(message) if error.timeout or error.has_error_label("RetryableError") else KvError(message)


def _may_have_been_sent(error: theirs.PyMongoError) -> bool:
    if isinstance(error, theirs.ServerSelectionTimeoutError):
        return False
    if isinstance(error, theirs.NotPrimaryError):
        details: Any = error.details
        return not (isinstance(details, dict) and details.get("code") in _NOT_PRIMARY)  # pyright: ignore[reportUnknownMemberType]
    return not isinstance(error.__cause__, _WHILE_CONNECTING) and "connection pool paused" not in str(error)


def _short(error: theirs.PyMongoError) -> str:
    """The message without the description of the whole topology and the server's answer in full."""
    return str(error).partition(", full error: ")[0].partition(", Topology Description: ")[0]
