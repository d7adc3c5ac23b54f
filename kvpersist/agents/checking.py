"""Whether what is stored fits together: `Persistence.check`. Nothing is changed."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Final, Literal, TypeAlias

import msgspec

from kvpersist import keys
from kvpersist.agents.births import Belongs, Births, Family, given_up
from kvpersist.agents.deletion import PENDING
from kvpersist.agents.records import Message, SessionStat, ToolCall
from kvpersist.driver import Entry
from kvpersist.errors import CorruptRecord
from kvpersist.index.writer import live
from kvpersist.repository import Repository
from kvpersist.store import Store

__all__ = ["Checker", "Consistency", "Issue", "IssueKind"]

IssueKind: TypeAlias = Literal["corrupt", "index", "orphan", "reference", "count", "unfinished", "missing"]

_PAGE: Final = 250  # entries read at once
_ATTEMPTS: Final = 3  # to count a session that is written meanwhile


class Issue(msgspec.Struct, frozen=True, kw_only=True):
    """Something that does not fit.

    Attributes:
        kind: "corrupt": a record that cannot be read. "index": a record without its index entry, an entry
            without its record, or a unique value that two records have. "orphan": what it belongs to is not
            there. "count": a session's counts are not those of its messages and calls. "unfinished": a
            creation that nobody has been at for ten minutes, or a deletion that was interrupted or is under
            way. "missing": what was asked about is not there. "reference": it names something that is not
            there, which may be as it should.
        store: "main", "files" or "events".
        collection, id: of the record.
        detail: what exactly, for people.
    """

    kind: IssueKind
    store: str
    collection: str
    id: str
    detail: str


class Consistency(msgspec.Struct, frozen=True, kw_only=True):
    """What a check found.

    Attributes:
        consistent: there are no issues but references: whoever is named may have been deleted on purpose.
        issues: at most as many as were asked for.
        complete: everything was looked at; False: there were more issues than were asked for.
        records: how many records were looked at.
    """

    consistent: bool
    issues: list[Issue]
    complete: bool
    records: int
    checked_at: datetime


class Checker:
    """One check. Memory holds a page of records, the issues, and the calls of one message."""

    def __init__(
        self,
        family: Family,
        stores: Mapping[str, Store],
        repositories: Mapping[str, Repository[Any]],
        belongs: Mapping[str, Sequence[Belongs]],
        stat: Callable[[str], Awaitable[SessionStat | None]],
        references: Iterable[tuple[str, str, str]],
        limit: int,
    ) -> None:
        """
        Args:
            repositories: by collection, "session", "message" and "tool_call" among them.
            belongs: by collection, what its records belong to by their fields.
            stat: what is counted of a session.
            references: collection, field, and the collection whose record the field may name.
        """
        self._family = family
        self._main = family.store
        self._names = {id(store): name for name, store in stores.items()}
        self._repositories = dict(repositories)
        self._belongs = dict(belongs)
        self._stat = stat
        self._references = tuple(references)
        self._limit = limit
        self._issues: list[Issue] = []
        self._records = 0

    async def all(self) -> Consistency:
        """Check everything."""
        try:
            for births in self._family.births.values():
                await self._unfinished(births)
            for name in self._repositories:
                await self._indexes(name, "")
                await self._collection(name, "")
            async for part in self._parts("session", ""):
                await self._counts(part)
        except _Enough:
            return self._found(complete=False)
        return self._found(complete=True)

    async def session(self, session_id: str) -> Consistency:
        """Check one session and what belongs to it."""
        try:
            await self._session(keys.encode(session_id))
        except _Enough:
            return self._found(complete=False)
        return self._found(complete=True)

    async def agent(self, agent_id: str) -> Consistency:
        """Check one agent, its state in whichever store, and its sessions."""
        part = keys.encode(agent_id)
        try:
            if not await self._there("agent", part):
                self._add("missing", "agent", part, "there is no agent of this id")
            below = self._below("agent")
            for name in ("agent", *below):
                await self._indexes(name, part)
                await self._collection(name, part)
            sessions = self._repositories["session"]
            async for session in sessions.iterate(agent_id=agent_id, on_corrupt=self._corrupt("session")):
                await self._session(keys.encode(session.id))
        except _Enough:
            return self._found(complete=False)
        return self._found(complete=True)

    # ---- private

    async def _session(self, part: str) -> None:
        if not await self._there("session", part):
            self._add("missing", "session", part, "there is no session of this id")
        for name in ("session", *self._below("session")):
            await self._indexes(name, part)
            await self._collection(name, part)
        await self._counts(part)

    def _below(self, parent: str) -> list[str]:
        """The collections whose keys begin with the id of a record of ``parent``."""
        children = self._family.births[parent].deletions.children
        return [name for name, repository in self._repositories.items() if repository in children]

    async def _there(self, name: str, part: str) -> bool:
        [entry] = await self._main._entries([self._repositories[name]._prefix + part])
        return live(entry) is not None

    async def _indexes(self, name: str, below: str) -> None:
        repository = self._repositories[name]
        [definition] = await repository.store._entries([repository._definitions.key])
        if definition is None:  # nothing was ever written; to look further would write it
            return
        exact = repository.store.capabilities.atomic_batch != "none"
        left = self._limit - len(self._issues) + 1
        for damage in await repository._reindexer().verify(False, below=below, limit=left):
            if damage.kind == "stale" and not exact:  # there readers pass over them
                continue
            if damage.kind == "corrupt":
                self._add("corrupt", name, damage.record, f"{damage.key!r} is not what was written")
            else:
                self._add("index", name, damage.record, f"{damage.kind} in index {damage.index!r}: {damage.key!r}")

    async def _collection(self, name: str, below: str) -> None:
        """Look for what the records of a collection belong to, and for what they name."""
        repository = self._repositories[name]
        own = self._family.births.get(name)
        above = [each for each in self._family.births.values() if repository in each.deletions.children]
        belongs = [
            one for one in self._belongs.get(name, ()) if not one.optional and not (above and one.births in above)
        ]
        named = [(field, self._repositories[target]) for here, field, target in self._references if here == name]
        async for page in self._pages(repository, below):
            self._records += len(page)
            pks = [entry.key[len(repository._prefix) :] for entry in page]
            births = [(pk, pk, own) for pk in pks] if own is not None else []
            births += [(pk, pk.partition("!")[0], each) for pk in pks for each in above]
            records = [_decoded(repository, entry) for entry in page] if belongs or named else []
            asked: list[tuple[str, str, Any, Repository[Any]]] = []
            for pk, record in zip(pks, records, strict=False):
                if record is None:  # corrupt, and told as such
                    continue
                for one in belongs:
                    if (value := getattr(record, one.field)) is not None:
                        if one.cascade:
                            births.append((pk, keys.encode(value), one.births))
                        else:
                            asked.append((pk, one.field, value, one.births.repository))
                for field, target in named:
                    if (value := getattr(record, field)) is not None:
                        asked.append((pk, field, value, target))
            await self._orphans(name, births, own)
            await self._dangling(name, asked, [record for record in records if record is not None])

    async def _orphans(self, name: str, asked: Sequence[tuple[str, str, Births]], own: Births | None) -> None:
        births = dict.fromkeys((each.prefix + part, each.deleting_prefix + part) for _, part, each in asked)
        wanted = [key for pair in births for key in pair]
        found = dict(zip(wanted, await self._main._entries(wanted), strict=True))
        for pk, part, each in asked:
            marker = found[each.deleting_prefix + part]
            if found[each.prefix + part] is not None or (marker is not None and marker.value == PENDING):
                continue
            if await self._gone(name, pk) or (each is not own and await self._in_the_making(each, part)):
                continue
            if each is own and pk == part:
                self._add("orphan", name, pk, "it has no birth key: nothing can be added below it")
            else:
                self._add("orphan", name, pk, f"its {each.kind} {keys.unescape(part)!r} is not there")

    async def _dangling(
        self, name: str, asked: Sequence[tuple[str, str, Any, Repository[Any]]], records: Sequence[Any]
    ) -> None:
        for pk, field, value, target in asked:
            key = target._prefix
            if len(target._key_parts) == 2:  # below the same parent
                key += pk.partition("!")[0] + "!"
            [entry] = await target.store._entries([key + keys.encode(value)])
            if live(entry) is None and not await self._gone(name, pk):
                self._add("reference", name, pk, f"{field} names the {target.name} {value!r}, which is not there")

    async def _gone(self, name: str, pk: str) -> bool:
        """Whether a record was removed since it was read."""
        repository = self._repositories[name]
        [entry] = await repository.store._entries([repository._prefix + pk])
        return live(entry) is None

    async def _in_the_making(self, births: Births, part: str) -> bool:
        """Whether a record is being made of which there is a part already, or was made meanwhile, or given up."""
        [making] = await self._main._entries([births.making_prefix + part])
        [birth] = await self._main._entries([births.prefix + part])  # the former goes when this is there
        return making is not None or birth is not None

    async def _unfinished(self, births: Births) -> None:
        prefix = births.deleting_prefix
        async for entry in _scanned(self._main, prefix):
            if entry.value == PENDING:
                self._add("unfinished", births.kind, entry.key[len(prefix) :], "its deletion is not finished")
        async for page in _paged(_scanned(self._main, births.prefix)):
            parts = [entry.key[len(births.prefix) :] for entry in page]
            stored = await self._main._entries([births.repository._prefix + part for part in parts])
            for part, entry in zip(parts, stored, strict=True):
                if live(entry) is None:
                    again = await self._main._entries([births.prefix + part, births.repository._prefix + part])
                    birth = again[0]
                    if birth is not None and live(again[1]) is None and self._left(birth.value):
                        self._add("unfinished", births.kind, part, "it has a birth key and no record")

        async for page in _paged(_scanned(self._main, births.making_prefix)):
            for note in page:
                part = note.key[len(births.making_prefix) :]
                if given_up(note.value, self._main.clock()) and not await self._there(births.kind, part):
                    self._add("unfinished", births.kind, part, "it was begun to make it, with what belongs to it")

    def _left(self, since: bytes) -> bool:
        """Whether a birth key without a record is none of a creation under way: those are atomic where batches are."""
        return self._family.atomic or given_up(since, self._main.clock())

    async def _counts(self, part: str) -> None:
        """Compare what is kept of a session with its messages and calls, again if it is written meanwhile."""
        session_id = keys.unescape(part)
        for _ in range(_ATTEMPTS):
            before = await self._kept(session_id)
            if before is None:
                return
            counted = await self._recounted(part, before)
            if await self._kept(session_id) == before:
                for what, (kept, found) in counted.items():
                    if kept != found:
                        self._add("count", "session", part, f"{what}: {kept} kept, {found} there")
                return

    async def _kept(self, session_id: str) -> SessionStat | None:
        try:
            return await self._stat(session_id)
        except CorruptRecord as error:
            self._add("corrupt", "session", keys.encode(session_id), str(error))
            return None

    async def _recounted(self, part: str, stat: SessionStat) -> dict[str, tuple[Any, Any]]:
        roles: dict[str, int] = {}
        tools: dict[str, Counter[str]] = {}
        last = 0
        messages, calls = self._repositories["message"], self._repositories["tool_call"]
        async for page in self._pages(messages, part):
            for entry in page:
                message: Message | None = _decoded(messages, entry)
                if message is not None:
                    roles[message.role] = roles.get(message.role, 0) + 1
                    last = max(last, message.number)
        async for page in self._pages(calls, part):
            for entry in page:
                call: ToolCall | None = _decoded(calls, entry)
                if call is not None:
                    tools.setdefault(call.name, Counter())[call.state] += 1
        kept = {name: states for name, tool in stat.tools.items() if (states := tool.by_state())}
        return {
            "messages": (stat.messages, sum(roles.values())),
            "messages by role": (stat.roles, roles),
            "tool calls by name and state": (kept, {name: dict(states) for name, states in tools.items()}),
            "last number, at least": (max(stat.last, last), stat.last),
        }

    async def _parts(self, name: str, below: str) -> AsyncIterator[str]:
        repository = self._repositories[name]
        async for page in self._pages(repository, below):
            for entry in page:
                yield entry.key[len(repository._prefix) :]

    async def _pages(self, repository: Repository[Any], below: str) -> AsyncIterator[list[Entry]]:
        """Yield the live records of a collection, or those at an encoded key and below it."""
        start = repository._prefix + below
        end = keys.prefix_end(start + "!" if below else start)
        async for page in _paged(_scanned(repository.store, start, end)):
            kept = [entry for entry in page if live(entry) is not None]
            if kept:
                yield kept

    def _corrupt(self, name: str) -> Callable[[CorruptRecord], None]:
        return lambda error: self._add("corrupt", name, "", str(error))

    def _add(self, kind: IssueKind, name: str, pk: str, detail: str) -> None:
        if len(self._issues) >= self._limit:
            raise _Enough
        store = self._names.get(id(self._repositories[name].store), "main")
        shown = ", ".join(keys.unescape(part) for part in pk.split("!"))
        issue = Issue(kind=kind, store=store, collection=name, id=shown, detail=detail)
        if issue not in self._issues[-_PAGE:]:
            self._issues.append(issue)

    def _found(self, *, complete: bool) -> Consistency:
        return Consistency(
            consistent=complete and all(issue.kind == "reference" for issue in self._issues),
            issues=self._issues,
            complete=complete,
            records=self._records,
            checked_at=datetime.now(UTC),
        )


class _Enough(Exception):
    """As many issues were found as were asked for."""


def _decoded(repository: Repository[Any], entry: Entry) -> Any:
    try:
        return repository._codec.decode(entry.key, entry.value)
    except CorruptRecord:
        return None


async def _scanned(store: Store, start: str, end: str | None = None) -> AsyncIterator[Entry]:
    last = keys.prefix_end(start) if end is None else end
    at: str | None = start
    while at is not None:
        page = await store._scan(at, last, limit=_PAGE)
        for entry in page:
            yield entry
        at = page[-1].key + "!" if len(page) == _PAGE else None  # no key lies between a key and itself + '!'


async def _paged(entries: AsyncIterator[Entry]) -> AsyncIterator[list[Entry]]:
    page: list[Entry] = []
    async for entry in entries:
        page.append(entry)
        if len(page) == _PAGE:
            yield page
            page = []
    if page:
        yield page
