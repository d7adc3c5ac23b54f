"""What every driver with connections takes: the options of its pool, and of TLS.

The pools themselves are the client libraries'. These options have the same names and defaults on each
driver, as ``kv.pool_max`` and so on in a URL.
"""

from __future__ import annotations

import ssl as tls
from typing import Annotated, Any

from msgspec import Meta, Struct

from kvpersist.errors import BadOption

__all__ = ["PoolOptions", "ssl_context"]


class PoolOptions(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of the ``Options`` of a driver with connections; times are seconds.

    Attributes:
        pool_max: connections at most. A call that finds none free for ``connect_timeout`` raises
            ``PoolExhausted``.
        pool_idle: after how long an unused connection is closed.
        connect_timeout: how long connecting may take.
        ssl: a mode (see `ssl_context`), a truth value, or an ``ssl.SSLContext``; None: as the URL says.
    """

    pool_max: Annotated[int, Meta(ge=1)] = 10
    pool_idle: Annotated[float, Meta(gt=0)] = 30.0
    connect_timeout: Annotated[float, Meta(gt=0)] = 5.0
    ssl: Any = None

    def __rich_repr__(self) -> list[tuple[str, Any]]:
        """Rich would show every field, a password too."""
        return []


def ssl_context(ssl: Any) -> tls.SSLContext | None:
    """Return the context that option ``ssl`` means, None for a plain connection.

    ============================  ===========================================================
    False, "false", "disable"     plain
    "require"                     encrypted, whoever answers
    "verify-ca"                   encrypted, the certificate is signed by a known authority
    True, "true", "verify-full"   and it is this host's
    an ``ssl.SSLContext``         as it is
    ============================  ===========================================================

    Raises:
        BadOption: it is none of these.
    """
    if isinstance(ssl, tls.SSLContext):
        return ssl
    mode = str(ssl).lower()
    if mode in ("none", "false", "disable"):
        return None
    if mode not in ("true", "require", "verify-ca", "verify-full"):
        raise BadOption("ssl", f"{ssl!r} is none of disable, require, verify-ca, verify-full, true, false")
    context = tls.create_default_context()
    context.check_hostname = mode in ("true", "verify-full")
    if mode == "require":
        context.verify_mode = tls.CERT_NONE
    return context
