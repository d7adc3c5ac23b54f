"""Which server has a key: the only one, the master that sentinels name, or a master of a cluster."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import lru_cache
from typing import Any, ClassVar, Final, NamedTuple, TypeAlias, cast

from redis.asyncio.connection import AbstractConnection, ConnectionPool
from redis.crc import key_slot
from redis.exceptions import (
    AskError,
    BusyLoadingError,
    ClusterDownError,
    MovedError,
    NoPermissionError,
    ReadOnlyError,
    RedisError,
    TryAgainError,
)

from kvpersist.errors import BadOption, CommitUnknown, KvError, PoolExhausted, TooManyClients, Unavailable
from kvpersist_drivers.redis._connections import Connections, Limits, Request, closed
from kvpersist_drivers.redis._errors import of_client

__all__ = ["SLOTS", "Address", "Cluster", "Sentinels", "Servers", "slot_of"]

SLOTS: Final = 16384
_ROUNDS: Final = 8  # that a call is sent in at most, where the server that has its key changes
_ASKED_SECONDS: Final = 1.0  # that one server has to say who the master is
_AGAIN_SECONDS: Final = 0.005  # before a third round, four times; doubled for each further one
_KNOWN: Final = 64  # servers of a cluster that are remembered, to be asked


class Address(NamedTuple):
    host: str
    port: int

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


Opener: TypeAlias = Callable[[Address], ConnectionPool]


@lru_cache(maxsize=4096)
def slot_of(name: str) -> int:
    """Return the slot of a cluster that has ``name``: Redis Cluster Specification, "Key distribution model"."""
    return key_slot(name.encode())


class Servers:
    """One server, which has every key."""

    sharded: ClassVar[bool] = False
    """Whether names of different slots are on different servers, and no script may use both."""

    def __init__(self, connections: Connections) -> None:
        self._connections = connections

    @property
    def where(self) -> str:
        """For people, without user and password."""
        return self._connections.where

    @property
    def calls(self) -> int:
        """How many round trips were made."""
        return self._connections.calls

    @property
    def in_use(self) -> int:
        """How many connections have a call in flight."""
        return self._connections.in_use

    async def ask(self, requests: Sequence[Request], *, writes: bool = False) -> list[Any]:
        """Send ``n`` requests: ``n`` answers, each by itself the answer or an error of ours.

        Raises:
            PoolExhausted, TooManyClients, Unavailable: nothing was sent, or nothing was changed.
            CommitUnknown: they were sent, an answer is lost, and they are ``writes``.
        """
        answers = await self._connections.run(requests, writes=writes)
        return [of_client(answer, self.where) if isinstance(answer, RedisError) else answer for answer in answers]

    async def masters(self) -> list[Connections]:
        """Every server that has keys."""
        return [self._connections]

    async def server(self, slot: int) -> Connections:
        """The server that has the keys of ``slot``. Raises Unavailable where that is not known."""
        return self._connections

    def doubt(self) -> None:
        """A server did not do what it should: look anew before the next call where there may be another."""

    async def close(self) -> None:
        await self._connections.close()


class _Moving(Servers):
    """Servers of which others tell who the masters are now.

    What a server refuses, because it is not or no longer the one, is sent to the one that is. What may
    have changed something is never sent twice.
    """

    def __init__(self, open_pool: Opener, limits: Limits) -> None:
        self._open_pool = open_pool
        self._limits = limits
        self._nodes: dict[Address, Connections] = {}
        self._calls = 0  # of nodes that are gone
        self._doubted = True
        self._looks = 0
        self._looking = asyncio.Lock()
        self._retiring: set[asyncio.Task[None]] = set()
        self._is_closed = False

    @property
    def where(self) -> str:
        return ", ".join(node.where for node in self._nodes.values())

    @property
    def calls(self) -> int:
        return self._calls + sum(node.calls for node in self._nodes.values())

    @property
    def in_use(self) -> int:
        return sum(node.in_use for node in self._nodes.values())

    async def ask(self, requests: Sequence[Request], *, writes: bool = False) -> list[Any]:
        answers: list[Any] = [None] * len(requests)
        left: dict[int, Connections | None] = dict.fromkeys(range(len(requests)))  # None: whoever has the slot
        for round_ in range(_ROUNDS):
            if round_ > 1:
                await asyncio.sleep(_AGAIN_SECONDS * 2**round_)
            if self._doubted:
                try:
                    await self.look(self._looks)
                except KvError:
                    if not round_:  # later, something may have been done: the answers tell
                        raise
            looks = self._looks
            groups: dict[tuple[Connections, bool], list[int]] = {}
            for at, other in left.items():
                server = other or self._owner(requests[at].slot)
                if server is None:
                    answers[at] = Unavailable(f"{self.where}: no server has slot {requests[at].slot}")
                else:
                    groups.setdefault((server, other is not None), []).append(at)
            tries = [
                _tried(node, [requests[at] for at in group], writes, asking) for (node, asking), group in groups.items()
            ]
            try:
                outcomes = [await tries[0]] if len(tries) == 1 else await asyncio.gather(*tries)
            except BaseException:  # cancelled too: a server may be hanging
                self._doubted = True
                raise
            left = {}
            lost: dict[int, Connections] = {}
            for ((node, _), group), outcome in zip(groups.items(), outcomes, strict=True):
                for at, answer in zip(group, outcome, strict=True):
                    answers[at] = answer
                    if isinstance(answer, MovedError):
                        self._moved(requests[at].slot, self._told(answer, node))
                        left[at] = None
                    elif isinstance(answer, AskError):
                        left[at] = self._told(answer, node)
                    elif isinstance(answer, TryAgainError):
                        left[at] = None
                    elif isinstance(answer, _LOST) and not isinstance(answer, PoolExhausted | TooManyClients):
                        lost[at] = node
                    elif isinstance(answer, CommitUnknown):
                        self._doubted = True
            if lost:
                with suppress(KvError):  # nobody tells: the answers stay what they are
                    await self.look(looks)
                left |= {at: None for at, node in lost.items() if self._owner(requests[at].slot) not in (node, None)}
            if not left:
                break
        return [of_client(answer, self.where) if isinstance(answer, RedisError) else answer for answer in answers]

    async def server(self, slot: int) -> Connections:
        if self._doubted:
            await self.look(self._looks)
        found = self._owner(slot)
        if found is None:
            raise Unavailable(f"{self.where}: no server has slot {slot}")
        return found

    def doubt(self) -> None:
        self._doubted = True

    async def look(self, seen: int) -> None:
        """Learn who the masters are, unless somebody did since look number ``seen``.

        Raises:
            Unavailable: nobody tells.
        """
        async with self._looking:
            if self._is_closed:
                raise closed()
            if self._looks == seen:
                await self._look()
                self._looks += 1
                self._doubted = False

    async def close(self) -> None:
        self._is_closed = True
        await asyncio.gather(*(node.close() for node in self._nodes.values()), *self._retiring)

    async def _look(self) -> None:
        raise NotImplementedError

    def _owner(self, slot: int) -> Connections | None:
        raise NotImplementedError

    def _moved(self, slot: int, node: Connections) -> None:
        """A server told that ``node`` has ``slot`` now."""
        self._doubted = True

    def _node(self, address: Address) -> Connections:
        if address not in self._nodes:
            self._nodes[address] = Connections(self._open_pool(address), f"redis at {address}", self._limits)
        return self._nodes[address]

    def _told(self, error: AskError, by: Connections) -> Connections:
        host, port = cast("tuple[str, int]", error.node_addr)
        return self._node(Address(host or _host(by), port))

    def _keep(self, addresses: Iterable[Address]) -> None:
        """Close the connections to every other server."""
        for address in self._nodes.keys() - set(addresses):
            node = self._nodes.pop(address)
            self._calls += node.calls
            task = asyncio.get_running_loop().create_task(node.close())
            self._retiring.add(task)
            task.add_done_callback(self._retiring.discard)


class Sentinels(_Moving):
    """The master that sentinels name; a server that is none is never asked for anything."""

    def __init__(
        self, name: str, addresses: Sequence[Address], open_sentinel: Opener, open_pool: Opener, limits: Limits
    ) -> None:
        super().__init__(open_pool, limits)
        self._name = name
        self._sentinels = [
            Connections(open_sentinel(address), f"sentinel at {address}", limits._replace(size=1))
            for address in addresses
        ]
        self._master: Connections | None = None

    @property
    def where(self) -> str:
        return super().where or ", ".join(sentinel.where for sentinel in self._sentinels)

    async def masters(self) -> list[Connections]:
        return [await self.server(0)]

    async def close(self) -> None:
        await asyncio.gather(super().close(), *(sentinel.close() for sentinel in self._sentinels))

    def _owner(self, slot: int) -> Connections | None:
        return self._master

    async def _look(self) -> None:
        question = Request(0, ("SENTINEL", "GET-MASTER-ADDR-BY-NAME", self._name))
        why: list[str] = []
        for sentinel in list(self._sentinels):
            try:
                told = await _asked(sentinel, question)
            except BadOption as error:
                raise BadOption("sentinel_password", str(error)) from error
            except (KvError, TimeoutError) as error:
                why.append(str(error) or f"{sentinel.where}: no answer in {_ASKED_SECONDS:g} s")
                continue
            if told is None:
                why.append(f"{sentinel.where} knows no master {self._name!r}")
                continue
            self._sentinels.remove(sentinel)
            self._sentinels.insert(0, sentinel)  # the first that is asked the next time
            address = Address(told[0].decode(), int(told[1]))
            self._master = self._node(address)
            self._keep([address])
            return
        if not self._looks and any("knows no master" in one for one in why):
            raise BadOption("sentinel", "; ".join(why))
        raise Unavailable("; ".join(why))

    def _node(self, address: Address) -> Connections:
        if address not in self._nodes:
            pool = self._open_pool(address)
            self._nodes[address] = Connections(pool, f"redis at {address}", self._limits, _be_master)
        return self._nodes[address]


class Cluster(_Moving):
    """The masters of a cluster, by the slots that they have."""

    sharded: ClassVar[bool] = True

    def __init__(self, addresses: Sequence[Address], open_pool: Opener, limits: Limits) -> None:
        super().__init__(open_pool, limits)
        self._known = list(addresses)  # whom to ask, in this order; replicas too
        self._owners: list[Connections | None] = [None] * SLOTS

    async def masters(self) -> list[Connections]:
        if self._doubted:
            await self.look(self._looks)
        return list(dict.fromkeys(node for node in self._owners if node is not None))

    def _owner(self, slot: int) -> Connections | None:
        return self._owners[slot]

    def _moved(self, slot: int, node: Connections) -> None:
        super()._moved(slot, node)
        self._owners[slot] = node
        address = Address(_host(node), node.pool.connection_kwargs["port"])
        self._known = list(dict.fromkeys((address, *self._known)))  # it knows more than others

    async def _look(self) -> None:
        why: list[str] = []
        for address in self._known:
            try:
                told = await _asked(self._node(address), Request(0, ("CLUSTER", "SLOTS")))
            except (KvError, TimeoutError) as error:
                if isinstance(error, BadOption):
                    raise
                why.append(str(error) or f"redis at {address}: no answer in {_ASKED_SECONDS:g} s")
                continue
            if not told:
                why.append(f"redis at {address} has no slots to tell of")
                continue
            owners: list[Connections | None] = [None] * SLOTS
            seen = {address: None}
            for first, last, *nodes in told:
                places = [Address((host or address.host.encode()).decode(), int(port)) for host, port, *_ in nodes]
                owners[first : last + 1] = [self._node(places[0])] * (last + 1 - first)
                seen |= dict.fromkeys(places)
            self._owners = owners
            self._known = [*seen, *(place for place in self._known if place not in seen)][:_KNOWN]
            self._keep(Address(_host(node), node.pool.connection_kwargs["port"]) for node in set(owners) if node)
            return
        raise Unavailable("; ".join(why))


_LOST: Final = (ClusterDownError, ReadOnlyError, BusyLoadingError, Unavailable)


async def _tried(node: Connections, requests: Sequence[Request], writes: bool, asking: bool) -> list[Any]:
    """As `Connections.run`, with an error of the whole in the place of each answer."""
    try:
        if not asking:
            return await node.run(requests, writes=writes)
        ask_for = Request(0, ("ASKING",)).packed()
        packed = [part for request in requests for part in (ask_for, request.packed(whole=True))]
        return (await node.exchange(packed, len(packed), writes=writes))[1::2]
    except KvError as error:
        return [error] * len(requests)


async def _asked(node: Connections, question: Request) -> Any:
    async with asyncio.timeout(_ASKED_SECONDS):
        [answer] = await node.run([question])
    if isinstance(answer, RedisError):
        raise of_client(answer, node.where)
    return answer


async def _be_master(connection: AbstractConnection, where: str) -> None:
    """Refuse a server that is no master, or not yet: what it holds may be old."""
    await connection.send_packed_command([Request(0, ("ROLE",)).packed()], check_health=False)
    try:
        role = cast(Any, await connection.read_response(disable_decoding=True))
    except NoPermissionError:  # this user may not ask
        return
    if role[0] != b"master":
        raise Unavailable(f"{where}: it is no master now")


def _host(node: Connections) -> str:
    return node.pool.connection_kwargs["host"]
