"""What PostgreSQL and asyncpg say, in kvpersist's words."""

from __future__ import annotations

from typing import Final

import asyncpg

from kvpersist.errors import (
    BadOption,
    FormatMismatch,
    KvError,
    ReadOnly,
    TooManyClients,
    Unavailable,
)

__all__ = ["AGAIN", "code_of", "is_answer", "is_of_one_batch", "of_connecting", "of_server"]

AGAIN: Final = {"40001", "40P01"}  # serialization failure, deadlock: rolled back, and worth another attempt

_FULL: Final = {"53300"}
_PASSWORD: Final = {"28000", "28P01"}
_READ_ONLY: Final = {"25006"}
_DENIED: Final = {"42501"}
_GONE: Final = {"42P01", "3F000"}
_WRONG_PLACE: Final = {"3D000", "42704", "22023", "55000"}  # database, parameter, its value; not accepting connections
_LOST: Final = {"57P01", "57P02", "57P03", "57P04", "57P05", "40003"}
_LATER: Final = {"08", "40", "53", "55", "57", "58"}  # classes
_OF_ONE: Final = {"22", "23", "54", "P0", "XX"}  # classes that a single batch may be to blame for


def is_answer(error: BaseException) -> bool:
    """Whether ``error`` is the server's refusal of a statement, after which nothing of it was done."""
    if not isinstance(error, asyncpg.PostgresError):
        return False
    code = code_of(error)
    return bool(code) and code not in _LOST and not code.startswith("08")


def is_of_one_batch(error: asyncpg.PostgresError) -> bool:
    """Whether other batches of the same statement might have been taken."""
    return code_of(error)[:2] in _OF_ONE


def of_server(error: asyncpg.PostgresError, where: str, *, writes: bool = False) -> KvError:
    """The error of ours for a refusal of a statement; each of these means that nothing was changed."""
    code = code_of(error)
    message = f"{where}: {error}"
    if code in _READ_ONLY or (code in _DENIED and writes):
        return ReadOnly(f"{message}: name the primary server, or GRANT SELECT, INSERT, UPDATE, DELETE on the table")
    if code in _DENIED:
        return BadOption("username", f"{message}: GRANT USAGE on the schema and SELECT on the table")
    if code in _GONE:
        return FormatMismatch(where, str(error), "the table that `kvpersist init URL` makes")
    if code[:2] in _LATER:
        return Unavailable(f"{message}; nothing was changed: try again")
    return KvError(message)


def of_connecting(error: Exception, where: str, seconds: float) -> KvError:
    """The error of ours for a connection that did not come about."""
    code = code_of(error)
    if code in _FULL or "no more connections allowed" in str(error):  # the latter is PgBouncer's
        return TooManyClients(f"{where} takes no more connections: {error}; try again, or lower kv.pool_max")
    if code in _PASSWORD:
        return BadOption("password", f"{where} refuses this user or password: {error}")
    if code in _WRONG_PLACE:
        return BadOption("url", f"{where}: {error}")
    if isinstance(error, TimeoutError):
        return Unavailable(f"{where}: no connection in {seconds:g} s: is the server there? or raise kv.connect_timeout")
    if isinstance(error, asyncpg.ClientConfigurationError):
        return BadOption("url", str(error))
    if isinstance(error, ValueError) and not isinstance(error, OSError):  # its text may hold a piece of the password
        return BadOption("url", "asyncpg cannot read it: write %40, %3A and %2F for '@', ':' and '/' in a password")
    return Unavailable(f"{where}: {error}: is the server there?")


def code_of(error: BaseException) -> str:
    """The SQLSTATE of an error; empty where it has none."""
    return str(getattr(error, "sqlstate", None) or "")
