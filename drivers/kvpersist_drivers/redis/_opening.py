"""Finding out what stands at a place: a server, a node of a cluster, or sentinels."""

from __future__ import annotations

from kvpersist.errors import BadOption, KvError, ReadOnly, Unavailable
from kvpersist_drivers.redis._connections import Connections, Request
from kvpersist_drivers.redis._options import Place
from kvpersist_drivers.redis._servers import Cluster, Sentinels, Servers

__all__ = ["servers_at"]


async def servers_at(place: Place) -> tuple[Servers, dict[str, str]]:
    """Return what stands there, and what it says of itself.

    Raises:
        BadOption: it is not what the options say, or refuses this user. Unavailable: nothing answers.
    """
    if place.sentinel:
        servers = Sentinels(place.sentinel, place.addresses, place.open_sentinel, place.open, place.limits)
        return servers, await _told(servers)
    failed: list[Unavailable] = []
    for address in place.addresses or [None]:
        pool = place.open(address) if place.pool is None else place.pool
        path = pool.connection_kwargs.get("path")
        single = Servers(Connections(pool, f"redis at {path or address}", place.limits))
        try:
            info = await _told(single)
        except Unavailable as error:  # its neighbours may be there
            failed.append(error)
            continue
        mode = info.get("redis_mode", "standalone")
        if mode == "standalone" and len(place.addresses) < 2:
            return single, info
        await single.close()
        if mode == "sentinel":
            raise BadOption("sentinel", f"{single.where} is one: name the master too, ?kv.sentinel=NAME")
        if mode != "cluster" and info:
            raise BadOption(
                "url", f"{single.where} is no part of a cluster: name one server, or sentinels and kv.sentinel"
            )
        return Cluster([address, *place.addresses] if address else [], place.open, place.limits), info
    if len(failed) == 1:
        raise failed[0]
    raise Unavailable("; ".join(str(error) for error in failed))


async def _told(servers: Servers) -> dict[str, str]:
    """What a server says of itself, nothing where this user may not ask; closes the servers where that fails."""
    try:
        [told] = await servers.ask([Request(0, ("INFO", "server"))])
        if isinstance(told, KvError) and type(told) not in (ReadOnly, KvError):
            raise told
    except BaseException:  # cancelled too: nothing may stay open
        await servers.close()
        raise
    text: str = "" if isinstance(told, KvError) else told.decode("utf-8", "replace")
    return {name: value for name, _, value in (line.partition(":") for line in text.splitlines())}
