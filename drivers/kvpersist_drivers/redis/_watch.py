"""What commits publish, as a stream of changed keys."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any, Final, cast

import msgspec
from redis.asyncio.connection import AbstractConnection
from redis.exceptions import RedisError

from kvpersist.errors import StoreClosed, Unavailable
from kvpersist_drivers.redis._connections import Request
from kvpersist_drivers.redis._errors import of_client
from kvpersist_drivers.redis._plan import space_of
from kvpersist_drivers.redis._servers import Servers, slot_of

__all__ = ["changes"]

_SILENCE: Final = 15.0  # seconds without a word after which the server is asked for one, and again until it is lost
_FIRST_WAIT, _LONGEST_WAIT = 0.05, 2.0  # seconds before connecting again
_GLOB: Final = str.maketrans({sign: "\\" + sign for sign in "*?[]^-\\"})

_decode: Final = msgspec.msgpack.Decoder().decode


async def changes(servers: Servers, base: str, prefix: str) -> AsyncGenerator[tuple[str, ...]]:
    """Yield the changed keys below ``prefix``, the empty tuple whenever listening begins, at first too.

    On sharded servers ``prefix`` names a namespace.

    Raises:
        StoreClosed: the servers were closed meanwhile. ReadOnly, BadOption: this user may not listen.
    """
    space = space_of(prefix) if ":" in prefix else None
    if space is None:
        words = ("PSUBSCRIBE", f"{base.translate(_GLOB)}:!{{.*")
    else:
        words = ("SSUBSCRIBE" if servers.sharded else "SUBSCRIBE", f"{base}:!{{.{space}}}")
    slot = slot_of(words[1]) if servers.sharded else 0
    wait = _FIRST_WAIT
    while True:
        try:
            server = await servers.server(slot)
            connection = await server.listen()
            try:
                await connection.send_packed_command([Request(slot, words).packed()], check_health=False)
                async with aclosing(_heard(connection, f"{base}:!{{.", prefix)) as heard:
                    async for keys in heard:
                        wait = _FIRST_WAIT
                        yield keys
            except RedisError as error:
                raise of_client(error, server.where) from error
            finally:
                await server.hang_up(connection)
        except StoreClosed:
            raise
        except Unavailable:
            await servers.doubt()
            await asyncio.sleep(wait * random.uniform(0.5, 1))
            wait = min(2 * wait, _LONGEST_WAIT)


async def _heard(connection: AbstractConnection, before: str, prefix: str) -> AsyncGenerator[tuple[str, ...]]:
    """Yield what is heard until the connection, or the slot's server, is lost."""
    asked = False
    while True:
        try:
            async with asyncio.timeout(_SILENCE):
                kind, *rest = cast("list[Any]", await connection.read_response(disable_decoding=True))
        except TimeoutError:
            if asked:
                raise Unavailable("the server fell silent") from None
            asked = True
            await connection.send_packed_command([Request(0, ("PING",)).packed()], check_health=False)
            continue
        asked = False
        if kind in (b"subscribe", b"psubscribe", b"ssubscribe"):
            yield ()
        elif kind == b"sunsubscribe":
            raise Unavailable("the slot has moved")
        elif kind in (b"message", b"pmessage", b"smessage"):
            keys = _keys(rest[-2].decode()[len(before) : -1], rest[-1])
            found = tuple(key for key in keys or () if key.startswith(prefix))
            if found or keys is None:
                yield found


def _keys(space: str, message: bytes) -> list[str] | None:
    """The keys of a message; None where it tells of too many to name them."""
    if not message:
        return None
    try:
        written, deleted = _decode(message)  # the written ones as ZADD takes them, with a score before each
        return [space + member for member in (*written, *deleted) if isinstance(member, str)]
    except (ValueError, TypeError):  # somebody else's
        return None
