"""What Redis and its client say, in kvpersist's words."""

from __future__ import annotations

import re
from typing import Final

from redis import exceptions as theirs

from kvpersist.errors import BadOption, KvError, ReadOnly, TooManyClients, Unavailable

__all__ = ["is_full", "of_client", "of_reply"]

_CODE: Final = re.compile(r"(?:^|: -?|^-)([A-Z]{2,})\b")  # also inside "Error running script ..: -OOM .." of Redis 6
_IN_SCRIPT: Final = "user executing the script can't"  # what NOPERM is called inside a script
_LATER: Final = {"OOM", "LOADING", "BUSY", "MISCONF", "NOREPLICAS", "MASTERDOWN"}
_MOVING: Final = {"MOVED", "ASK", "TRYAGAIN", "CLUSTERDOWN"}  # a cluster that does not settle
_DENIED: Final = (theirs.AuthenticationError, theirs.AuthorizationError, theirs.AuthenticationWrongNumberOfArgsError)
_CODED: Final = {  # classes that the client made of an error whose code it cut off
    theirs.OutOfMemoryError: "OOM",
    theirs.BusyLoadingError: "LOADING",
    theirs.ReadOnlyError: "READONLY",
    theirs.NoPermissionError: "NOPERM",
    theirs.MovedError: "MOVED",
    theirs.AskError: "ASK",
    theirs.ClusterCrossSlotError: "CROSSSLOT",
    theirs.TryAgainError: "TRYAGAIN",
    theirs.MasterDownError: "MASTERDOWN",
    theirs.ClusterDownError: "CLUSTERDOWN",
}


def is_full(error: Exception) -> bool:
    """Whether the server has as many clients as it takes."""
    return "max number of clients" in str(error)


def of_client(error: Exception, where: str) -> KvError:
    """The error of ours for a failure to connect, or for an error the server answered a command with."""
    if isinstance(error, _DENIED) or str(error).startswith(("NOAUTH", "WRONGPASS")):
        return BadOption("password", f"{where} refuses this user or password: {error}")
    code = next((code for kind, code in _CODED.items() if isinstance(error, kind)), None)
    if is_full(error):
        return TooManyClients(f"{where}: {error}; raise its maxclients, or lower kv.pool_max")
    if code is None and isinstance(error, theirs.ConnectionError | theirs.TimeoutError | OSError):
        return Unavailable(f"{where}: {error}")
    return of_reply(str(error), where, code)


def of_reply(text: str, where: str, code: str | None = None) -> KvError:
    """The error of ours for an error of the server; each of these means that nothing was changed."""
    if code is None:
        found = _CODE.search(text)
        code = "NOPERM" if _IN_SCRIPT in text else str(found[1]) if found else "ERR"
    elif code not in text:
        text = f"{code} {text}"
    message = f"{where}: {text}"
    if code in _LATER or code in _MOVING:
        return Unavailable(f"{message}; nothing was changed")
    if code == "READONLY" or code == "NOPERM":
        return ReadOnly(message)
    return KvError(message)
