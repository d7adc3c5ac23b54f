"""Redis or Valkey, 6.2 or later: a server, a cluster, or what sentinels watch over. Needs ``kvpersist[redis]``.

An entry is a string under ``<base>:{.<namespace>}<rest of the key>``: a header of 20 bytes and the
value. Beside the entries of a namespace stand its index, a sorted set of all its keys in their order
(``<base>:#{.<namespace>}``), and the expiries of those that have one (``<base>:~{.<namespace>}``); the
namespaces are a set, ``<base>:#``. The namespace is the text before a key's first ``:``; keys without
one share the empty namespace. Changes are published on ``<base>:!{.<namespace>}``.

``commit`` is one script call for each namespace however many batches it has, all in one round trip,
``get`` one MGET, ``scan`` one script call per namespace and thousand entries; on a cluster one MGET for
each namespace too, sent together to each server. Batches across namespaces are refused. The server's
clock judges expiry.

A cancelled commit may still be executed by the server. What the server acknowledged is as durable as
its configuration makes it.
"""

from __future__ import annotations

import asyncio
import copy
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing
from typing import Any, ClassVar, Final, Self

from msgspec import Struct, structs

from kvpersist import keys as grammar
from kvpersist.driver import ABSENT, Batch, Capabilities, Check, Committed, Entry, needs_extra, unpacked_entry
from kvpersist.errors import (
    BadKey,
    BadOption,
    CommitUnknown,
    Conflict,
    KvError,
    ReadOnly,
    Unavailable,
    Unsupported,
)

with needs_extra("redis", module="redis"), needs_extra("redis", module="hiredis"):
    from kvpersist_drivers.redis._connections import (
        COMMIT,
        PERMIT,
        SCAN,
        SWEEP,
        TELL,
        Request,
        Script,
        closed,
    )
    from kvpersist_drivers.redis._errors import of_reply
    from kvpersist_drivers.redis._opening import servers_at
    from kvpersist_drivers.redis._options import Place, RedisOptions, place_of
    from kvpersist_drivers.redis._plan import MAX_VALUE_BYTES, Names, Plan, names_of, space_of
    from kvpersist_drivers.redis._scanning import bounds_in, entries_of, only_namespace, pointing
    from kvpersist_drivers.redis._servers import Cluster, Sentinels, Servers, slot_of
    from kvpersist_drivers.redis._watch import changes

__all__ = ["RedisDriver", "RedisOptions"]

_PAGE: Final = 1000  # entries of one call of the scan script, which hands as many names to one MGET
_OLDEST: Final = (6, 2)  # the first with PXAT
_ANNOUNCED_SECONDS: Final = 60.0  # for which a cluster is trusted to remember a namespace


class RedisDriver:
    """Made by `open`, or by `over` on a client that stays the caller's."""

    api: ClassVar[int] = 1
    Options: ClassVar[type[Struct]] = RedisOptions

    watch: Callable[[str], AsyncIterator[tuple[str, ...]]]
    """As `Watches.watch`; only where the server lets this user publish, on a cluster from Redis 7 on.

    The empty tuple comes whenever listening begins, at first too. On a cluster the prefix names a namespace.
    """

    def __init__(self, servers: Servers, *, base: str = "kvpersist") -> None:
        """Does not connect; `open` and `over` are what a user calls."""
        self.capabilities = Capabilities(
            atomic_batch="partition",
            conditional=True,
            conditional_delete=True,
            ordered=True,
            reverse=True,
            deref=True,
            coalesce="both",
            overlap="writes",
            ttl="native",
            shared=True,
            max_value_bytes=MAX_VALUE_BYTES,
            server="Redis",
        )
        self._servers = servers
        self._base = base
        self._denied: str | None = None  # why this user cannot write
        self._tells = False  # of changes
        self._announced: set[str] = set()  # namespaces that a cluster was told of
        self._forget = 0.0  # when they are to be told again, by the loop's clock
        self._closed = False

    @classmethod
    async def open(cls, options: RedisOptions, /) -> Self:
        """Connect to what ``options`` name.

        Raises:
            BadOption: the options mean nothing, or the server refuses the user or password.
            Unavailable: no server can be reached. Unsupported: it is too old.
        """
        place = place_of(options)
        try:
            return await cls._opened(place, options.base)
        except TypeError as error:
            if "argument" not in str(error):
                raise
            raise BadOption("url", str(error)) from error  # of the parameters of the URL

    @classmethod
    async def over(cls, client: Any, **options: Any) -> Self:
        """Use a client of redis-py, which must allow ``pool_max`` connections and is not closed by `close`.

        Of a `RedisCluster`, and of a client that asks sentinels, only the settings are used.
        """
        return await cls.open(RedisOptions(client=client, **options))

    @classmethod
    async def _opened(cls, place: Place, base: str) -> Self:
        servers, info = await servers_at(place)
        driver = cls(servers, base=base)
        try:
            await driver._probe(info)
        except BaseException:  # cancelled too: nothing may stay open
            await driver.close()
            raise
        return driver

    async def get(self, keys: Sequence[str]) -> list[Entry | None]:
        if self._closed:
            raise closed()
        if not keys:
            return []
        stored = await self._stored(keys)
        return [None if data is None else unpacked_entry(key, data) for key, data in zip(keys, stored, strict=True)]

    async def commit(self, batches: Sequence[Batch]) -> list[Committed | KvError]:
        if self._closed:
            raise closed()
        sharded = self._servers.sharded
        answers: list[Committed | KvError] = []
        plans: dict[str, Plan] = {}
        for at, batch in enumerate(batches):
            if not batch.ops:
                answers.append(Committed(batch.version))
                continue
            space = space_of(batch.ops[0].key)
            plan = plans.get(space)
            if plan is None:
                plan = plans[space] = Plan(self._base, space, sharded=sharded, tells=self._tells)
            answers.append(plan.add(batch, at) or Committed(batch.version))
        left = [(space, plan) for space, plan in plans.items() if plan.places]
        if not left:
            return answers
        if self._denied is not None:
            raise ReadOnly(self._denied)
        if sharded:
            left = await self._announce(left, answers)
        requests = [
            Request(slot_of(self._names(space).prefix) if sharded else 0, plan.words(), COMMIT) for space, plan in left
        ]
        outcomes = await self._servers.ask(requests, writes=True) if requests else []
        kinds: set[type[Any]] = {type(outcome) for outcome in outcomes}
        if len(left) == len(plans) and len(kinds) == 1 and isinstance(outcomes[0], KvError):  # it is everybody's
            raise _unknown(outcomes[0])
        for (_, plan), outcome in zip(left, outcomes, strict=True):
            if isinstance(outcome, KvError):
                for place in plan.places:
                    answers[place] = copy.copy(_unknown(outcome))
                continue
            for at in range(0, len(outcome), 3):
                number, position, found = outcome[at : at + 3]
                for place in [plan.places[int(number) - 1]] if number else plan.places:
                    answers[place] = self._failure(batches[place], position, found)
        return answers

    async def scan(
        self,
        start: str | None,
        end: str | None,
        *,
        limit: int,
        reverse: bool = False,
        keys_only: bool = False,
        deref: str | None = None,
    ) -> list[Entry]:
        if self._closed:
            raise closed()
        if limit <= 0 or (start is not None and end is not None and start >= end):
            return []
        space = only_namespace(start, end)
        if space is not None:
            return await self._scan(space, start, end, limit, reverse, keys_only, deref)
        spaces = await self._spaces()
        found: list[Entry] = []
        for space in sorted((space for space in spaces if space), key=lambda space: space + ":", reverse=reverse):
            if len(found) >= limit:
                break
            found += await self._scan(space, start, end, limit - len(found), reverse, keys_only, deref)
        if "" in spaces:  # its keys stand between those of the others
            found += await self._scan("", start, end, limit, reverse, keys_only, deref)
            found.sort(key=lambda entry: entry.key, reverse=reverse)
        return found[:limit]

    async def now(self) -> float:
        """Seconds since 1970 by the server's clock."""
        seconds, microseconds = await self._ask(self._home, "TIME")
        return int(seconds) + int(microseconds) / 1e6

    async def ping(self) -> None:
        if self._closed:
            raise closed()
        masters = await self._servers.masters()
        for answers in await asyncio.gather(*(master.run([Request(0, ("PING",))]) for master in masters)):
            if isinstance(answers[0], Exception):
                raise Unavailable(str(answers[0])) from answers[0]

    async def compact(self, limit: int = 500) -> int:
        """Take at most ``limit`` expired keys out of the indexes; their values are gone by themselves."""
        removed = 0
        for space in await self._spaces():
            names = self._names(space)
            looked = 1
            while looked and removed < limit:
                gone, looked = await self._run(SWEEP, [names.lex, names.expiries], [names.prefix, limit - removed])
                removed += gone
        return removed

    async def close(self) -> None:
        self._closed = True
        await self._servers.close()

    async def _changes(self, prefix: str) -> AsyncGenerator[tuple[str, ...]]:
        if self._closed:
            raise closed()
        if self._servers.sharded and ":" not in prefix:
            raise Unsupported("watching all namespaces of a cluster", "watch one, by a prefix such as 'kv:'")
        async with aclosing(changes(self._servers, self._base, prefix)) as found:
            async for keys in found:
                yield keys

    async def _stored(self, keys: Sequence[str]) -> list[bytes | None]:
        start = f"{self._base}:{{."
        parts = [key.partition(":") for key in keys]
        names = [f"{start}{space}}}:{rest}" if colon else f"{start}}}{space}" for space, colon, rest in parts]
        return await (self._gathered(keys, names) if self._servers.sharded else self._ask(0, "MGET", *names))

    async def _gathered(self, keys: Sequence[str], names: list[str]) -> list[bytes | None]:
        """What is stored under ``names``, one MGET for each slot."""
        try:
            "".join(keys).encode()  # before anything is sent
        except UnicodeEncodeError as error:
            raise BadKey(error.object, "no UTF-8 text: it holds a lone surrogate") from error
        slots: dict[int, list[int]] = {}
        for at, name in enumerate(names):
            slots.setdefault(self._slot(name), []).append(at)
        stored: list[bytes | None] = [None] * len(names)
        requests = [Request(slot, ("MGET", *(names[at] for at in places))) for slot, places in slots.items()]
        failed: dict[str, KvError] = {}
        for places, answer in zip(slots.values(), await self._servers.ask(requests), strict=True):
            if isinstance(answer, KvError):
                failed |= {keys[at]: answer for at in places}
                continue
            for at, data in zip(places, answer, strict=True):
                stored[at] = data
        if failed:
            error = copy.copy(next(iter(failed.values())))
            error.about = tuple(failed)
            raise error
        return stored

    async def _announce(
        self, plans: list[tuple[str, Plan]], answers: list[Committed | KvError]
    ) -> list[tuple[str, Plan]]:
        """Put the namespaces among the others before they are written; leave out what may not be written now."""
        now = asyncio.get_running_loop().time()
        if now >= self._forget:
            self._announced.clear()
            self._forget = now + _ANNOUNCED_SECONDS
        new = [space for space, plan in plans if plan.has_puts and space not in self._announced]
        if not new:
            return plans
        [answer] = await self._servers.ask([Request(self._home, ("SADD", f"{self._base}:#", *new))], writes=True)
        if not isinstance(answer, KvError):
            self._announced.update(new)
            return plans
        if isinstance(answer, CommitUnknown):  # of the namespaces alone
            answer = Unavailable(f"{answer.reason}; nothing was changed")
        for space, plan in plans:
            if space in new:
                for place in plan.places:
                    answers[place] = copy.copy(answer)
        return [(space, plan) for space, plan in plans if space not in new]

    async def _spaces(self) -> list[str]:
        return [text.decode() for text in await self._ask(self._home, "SMEMBERS", f"{self._base}:#")]

    async def _scan(
        self,
        space: str,
        start: str | None,
        end: str | None,
        limit: int,
        reverse: bool,
        keys_only: bool,
        deref: str | None,
    ) -> list[Entry]:
        """Scan the part of ``[start, end)`` that lies in one namespace."""
        bounds = bounds_in(space, start, end)
        if bounds is None:
            return []
        low, high = bounds
        prefix, index, _ = self._names(space)
        near = deref is not None and ":" in deref and grammar.partition(deref) == space
        targets = prefix + deref[len(space) :] if deref is not None and near else ""
        found: list[Entry] = []
        while len(found) < limit:
            args = [prefix, low, high, min(_PAGE, limit - len(found)), "reverse" * reverse, "keys" * keys_only, targets]
            last, *page = await self._run(SCAN, [index], args)
            found += entries_of(space, page, deref if near else None, keys_only)
            if last is None:
                break
            bound = "(" + last.decode()
            low, high = (low, bound) if reverse else (bound, high)
        return await self._followed(found, deref) if deref is not None and not near else found

    async def _followed(self, entries: list[Entry], deref: str) -> list[Entry]:
        """Add the targets, which are in other namespaces, with one more call."""
        keys = [deref + entry.value.decode("utf-8", "replace") for entry in entries]
        return [
            pointing(entry, key, data)
            for entry, key, data in zip(entries, keys, await self._stored(keys) if keys else [], strict=True)
        ]

    async def _probe(self, info: dict[str, str]) -> None:
        """Judge what the server is, and find out whether this user may do what a commit needs."""
        version = info.get("redis_version", "")
        numbers = tuple(int(number) for number in version.split(".")[:2] if number.isdigit())
        if numbers and numbers < _OLDEST:
            raise Unsupported(f"Redis {version} ({self._servers.where})", "it needs 6.2 or later")
        valkey = info.get("valkey_version")
        server = f"Valkey {valkey}" if valkey else f"Redis {version}".strip()
        kind = " Cluster" if isinstance(self._servers, Cluster) else ""
        kind = " with Sentinel" if isinstance(self._servers, Sentinels) else kind
        self.capabilities = structs.replace(self.capabilities, server=server + kind)
        try:
            await self._run(PERMIT, [f"{self._base}:?"], [])
        except ReadOnly as error:
            self._denied = str(error)
        except KvError:  # what else keeps it from writing now is told by the commit that it keeps
            pass
        try:
            publish = "SPUBLISH" if self._servers.sharded else "PUBLISH"
            await self._run(TELL, [f"{self._base}:!"], [publish])
        except KvError:  # not for this user, or unknown to this server: changes are not told of
            return
        self._tells = True
        self.watch = self._changes
        self.capabilities = structs.replace(self.capabilities, watch="push")

    @property
    def _home(self) -> int:
        """The slot of the set of namespaces."""
        return slot_of(f"{self._base}:#")

    def _slot(self, name: str) -> int:
        """The slot of a name, which begins as all of its namespace."""
        return slot_of(name[: name.index("}") + 1])

    async def _ask(self, slot: int, *words: str) -> Any:
        return await self._one(Request(slot, words))

    async def _run(self, script: Script, keys: list[str], args: list[str | bytes | int]) -> Any:
        slot = slot_of(keys[0]) if self._servers.sharded else 0
        return await self._one(Request(slot, (len(keys), *keys, *args), script))

    async def _one(self, request: Request) -> Any:
        if self._closed:
            raise closed()
        try:
            [answer] = await self._servers.ask([request])
        except UnicodeEncodeError as error:
            raise BadKey(error.object, "no UTF-8 text: it holds a lone surrogate") from error
        if isinstance(answer, KvError):
            raise answer
        return answer

    def _names(self, space: str) -> Names:
        return names_of(self._base, space)

    def _failure(self, batch: Batch, position: int, found: bytes) -> KvError:
        if position >= 0:
            op = batch.ops[position]
            return Conflict(op.key, op.expect, found or ABSENT, position)
        text = found.decode("utf-8", "replace")
        where = self._servers.where
        if position == -1:
            return of_reply(text, where)
        return CommitUnknown(tuple(op.key for op in batch.ops if not isinstance(op, Check)), f"{where}: {text}")


def _unknown(error: KvError) -> KvError:
    """An error of the commit script itself comes from somewhere in its middle."""
    return CommitUnknown((), str(error)) if type(error) is KvError else error
