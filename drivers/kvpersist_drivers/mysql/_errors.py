"""What MariaDB, MySQL and their client say, in kvpersist's words."""

from __future__ import annotations

import ssl
from typing import Final

from kvpersist.errors import BadOption, KvError, ReadOnly, TooManyClients, Unavailable

__all__ = ["AGAIN", "NOTHING_SENT", "NOT_AS_EXPECTED", "code_of", "is_lost", "of_connecting", "of_server"]

NOTHING_SENT: Final = 2006  # the client's, raised before the statement left
NOT_AS_EXPECTED: Final = 1242  # how the guard of a commit fails: a subquery of two rows
AGAIN: Final = {1205, 1213}  # waited too long for a lock, chosen to end a deadlock

# connection killed, server shutting down, broken network reads and writes, gone away, lost
_LOST: Final = {1927, 1053, 1077, 1079, 1158, 1159, 1160, 1161, 1184, NOTHING_SENT, 2013, 2055}
_FULL: Final = {1040, 1203, 1226}  # the server, or what it allows this account
_DENIED: Final = {1142, 1143, 1227, 1370, 1792, 1836, 4166}  # to this user, or in a read-only transaction or server
_NO_DATABASE: Final = {1044, 1046, 1049}
_NO_ENTRY: Final = {1045, 1130, 1251, 1524, 1698, 2059, 2061, 3118, 4151}  # user, password, host or plugin
_LATER: Final = {1021, 1041, 1114, 1180, 1205, 1213, 1317, 1637, 1969, 3024}  # full, out of memory, interrupted


def code_of(error: BaseException) -> int:
    """The number MariaDB gives to an error, 0 where the client raised one without."""
    code = error.args[0] if error.args else 0
    return code if isinstance(code, int) else 0


def is_lost(error: BaseException) -> bool:
    """Whether the connection is of no more use, so that an answer may have been lost with it."""
    code = code_of(error)
    return code in _LOST or code < 1000


def of_connecting(error: Exception, where: str) -> KvError:
    """The error of ours for a connection that could not be made."""
    code, cause = code_of(error), error.__cause__ or error
    if isinstance(cause, ssl.SSLCertVerificationError):
        return BadOption("ssl", f"the certificate of {where} is not accepted: {cause}; see kv.ssl and ssl_ca")
    if code in _NO_DATABASE:
        return BadOption("url", f"{where}: {_text(error)}; create the database, or name another")
    if code in _NO_ENTRY:
        return BadOption("password", f"{where} refuses this user or password: {_text(error)}")
    if code in _FULL:
        return TooManyClients(f"{where}: {_text(error)}; nothing was changed: try again, or lower kv.pool_max")
    return Unavailable(f"{where}: {_text(error)}; nothing was changed")


def of_server(error: Exception, where: str) -> KvError:
    """The error of ours for a statement that the server refused; nothing was changed by it."""
    code, text = code_of(error), f"{where}: {_text(error)}"
    if code in _DENIED or (code == 1290 and "read" in text):  # 1290: an option forbids it, such as --read-only
        return ReadOnly(f"{text}; nothing was changed")
    if code in _LATER:
        return Unavailable(f"{text}; nothing was changed")
    if code in _FULL:
        return TooManyClients(f"{text}; nothing was changed")
    return KvError(f"{text} (error {code})")


def _text(error: Exception) -> str:
    return str(error.args[-1]) if error.args else type(error).__name__
