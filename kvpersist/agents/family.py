"""Records that others belong to, and records that belong to them by a field.

A *parent* has a birth key, ``ns:collection#birth:<id>``, whose version does not change while it lives.
What is written below it carries a check of that key in the same batch, so that nothing is ever added to
a parent that was deleted; without atomic batches the key is looked at again afterwards, and what was
written is taken back where it is gone. Deleting a parent removes birth key and record in one batch that
leaves a marker; what belongs to it follows in batches (`kvpersist.agents.deletion`).

    family = Family(store, "kv")
    containers = Parents(family, Container, name="container")
    images = Parents(family, Image, name="image", indexes=[Index("container_id")],
                     belongs=[Belongs("container_id", containers.births)])        # deleted with its container
    todos = Children(family, Todo, name="todo", key=("agent_id", "position"), parents=agents.births)

    await containers.create(name="acme")        # or create(Container(...)); UniqueConflict where the id is taken
    await images.save(Image(id="i", container_id="gone"))                         # ParentGone
    await todos.replace_all("agent-1", [...])   # equal items are not written
    await containers.delete(id)                 # with its images, and what belongs to those

A field may also name a parent that need not be there (``Belongs(..., optional=True)``): where there is
one, its birth is checked, where there is none, its absence. ``cascade=False``: the record outlives its
parent. Other deletions join by ``births.also(fn)``, an ``async fn(id, guard)``: see `Cascade`. `Children` are
kept below their parent, by its id: see `kvpersist.agents.children`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from typing import Any, Final, Generic, TypeVar, cast
from uuid import UUID

import msgspec

from kvpersist.agents.births import Belongs, Births, Family, checks_of
from kvpersist.agents.deletion import Cascade, belonging, remove_page
from kvpersist.agents.records import new_id, utc
from kvpersist.agents.writers import atomic_writer, shown, taken
from kvpersist.driver import ABSENT, Check, Entry
from kvpersist.errors import BadRequest, Conflict, ParentGone, UniqueConflict
from kvpersist.index import Index
from kvpersist.index.reads import OnCorrupt
from kvpersist.index.writer import UNREAD, live, version_of
from kvpersist.repository import Page, Repository
from kvpersist.transaction import backoff

__all__ = ["Parents", "Records"]

R = TypeVar("R", bound=msgspec.Struct)

_ATTEMPTS: Final = 40  # of a write that keeps losing to others


class Records(Generic[R]):
    """Records that may belong to others by their fields, and are deleted with them.

    ``created_at`` and ``updated_at`` are set here where the type has them, unless the caller does.
    """

    def __init__(
        self,
        family: Family,
        type: type[R],
        *,
        name: str,
        key: str | tuple[str, ...] = "id",
        indexes: Iterable[Index] = (),
        belongs: Sequence[Belongs] = (),
        **options: Any,
    ) -> None:
        """``options``: as for `Repository`."""
        store = family.elsewhere.get(name, family.store)
        self.repository: Repository[R] = Repository(
            store, type, name=name, key=key, indexes=indexes, namespace=family.namespace, **options
        )
        family.repositories[name] = self.repository
        self._family = family
        self._store = store
        self._together: bool = (
            family.atomic and store is family.store
        )  # one batch can hold a record and checks of births
        self._type = type
        self._key = (key,) if isinstance(key, str) else key
        self._belongs = family.belongs[name] = tuple(belongs)
        self._has_times = "created_at" in type.__struct_fields__, "updated_at" in type.__struct_fields__
        for each in self._belongs:
            if not each.cascade:
                continue
            if each.field == self._key[0]:
                each.births.deletions.children.append(self.repository)
            else:
                each.births.also(self._cascade_of(each.field))

    # ---- reading

    async def get(self, id: Any) -> R | None:
        """Return the record, or None; one read."""
        return await self.repository.get(_plain(id))

    async def exists(self, id: Any) -> bool:
        """Whether there is such a record; it is not decoded."""
        return await self.repository.exists(_plain(id))

    async def find(
        self, *, limit: int = 100, offset: int = 0, on_corrupt: OnCorrupt | None = None, **where: Any
    ) -> list[R]:
        """Return up to ``limit`` records behind the first ``offset`` through an index. As `Repository.find`."""
        if limit < 1 or offset < 0:
            raise BadRequest(f"limit={limit}, offset={offset}: ask for at least one, behind none or some")
        found = await self.repository.find(limit=limit + offset, on_corrupt=on_corrupt, **where)
        return found[offset:]

    async def page(
        self, *, limit: int = 100, after: str | None = None, on_corrupt: OnCorrupt | None = None, **where: Any
    ) -> Page[R]:
        """Return one page as `find` does, and the cursor for the next. As `Repository.page`."""
        return await self.repository.page(limit=limit, after=after, on_corrupt=on_corrupt, **where)

    async def iterate(self, *, on_corrupt: OnCorrupt | None = None, **where: Any) -> AsyncIterator[R]:
        """Yield every record that `find` would. As `Repository.iterate`."""
        async for record in self.repository.iterate(on_corrupt=on_corrupt, **where):
            yield record

    async def count(self, **where: Any) -> int:
        """Count the records, all or those that `find` would return; only keys are read."""
        return await self.repository.count(**where)

    # ---- writing

    async def create(self, record: R | None = None, /, **fields: Any) -> R:
        """Store a new record, given whole or by its fields; return it as it is stored.

        Raises:
            UniqueConflict: there is one of this id, or of a unique value.
            ParentGone: what it belongs to does not exist.
            BadRequest: no such field, a field of another type, or a time without a zone.
        """
        made = self._new(self._made(record, fields))
        await self._family.own()
        await self._insert(made)
        return made

    async def save(self, record: R) -> R:
        """Store a record whose id you bring, in place of what is there; return it as it is stored.

        ``created_at`` stays where it is not given, ``updated_at`` moves.

        Raises:
            As `create`, but for UniqueConflict of the id.
        """
        self._refuse_type(record)
        record = self._named(record)
        if "id" in self._key and not cast("Any", record).id:
            return await self.create(record)
        await self._family.own()
        pk = self.repository._pk_of(record)
        for attempt in range(_ATTEMPTS):
            entry = await self._entry(pk)
            try:
                if entry is None:
                    made = self._new(record)
                    await self._insert(made)
                else:
                    before = self._decode(entry)
                    made = self._renewed(record, before)
                    await self._write(pk, made, before, entry)
            except UniqueConflict as conflict:
                if conflict.index != "id" or conflict.holder != shown(pk):
                    raise
            except Conflict:
                pass
            else:
                return made
            await backoff(attempt)
        raise Conflict(self.repository._prefix + pk, None)

    async def update(self, id: Any, fn: Callable[[R], R]) -> R | None:
        """Replace the record by what ``fn`` makes of it, and return that; None where there is none.

        ``fn`` is called again when another writer came first. ``updated_at`` moves, unless ``fn`` sets it.

        Raises:
            BadRequest: ``fn`` gave it another key. ParentGone: what it shall belong to does not exist.
        """
        await self._family.own()
        pk = self.repository._pk(_plain(id))
        for attempt in range(_ATTEMPTS):
            entry = await self._entry(pk)
            if entry is None:
                return None
            before = self._decode(entry)
            changed: Any = fn(self._decode(entry))
            self._refuse_type(changed)
            changed = self._renewed(changed, before)
            if self.repository._pk_of(changed) != pk:
                raise BadRequest(f"the key of a stored {self.repository.name} cannot change: create another")
            try:
                await self._write(pk, changed, before, entry)
            except UniqueConflict:
                raise
            except Conflict:
                await backoff(attempt)
                continue
            return changed
        raise Conflict(self.repository._prefix + pk, None)

    async def set_metadata(self, id: Any, metadata: Mapping[str, Any]) -> R | None:
        """Replace the metadata as a whole; None where there is no such record."""
        return await self.update(id, lambda record: _with(record, metadata=dict(metadata)))

    async def merge_metadata(self, id: Any, metadata: Mapping[str, Any]) -> R | None:
        """Set some keys of the metadata and leave the others; None where there is no such record."""
        return await self.update(
            id, lambda record: _with(record, metadata={**(cast("Any", record).metadata or {}), **metadata})
        )

    async def delete(self, id: Any) -> bool:
        """Remove the record; False where there was none."""
        await self._family.own()
        return await self.repository.delete(_plain(id))

    # ---- private

    def _made(self, record: R | None, fields: Mapping[str, Any]) -> R:
        if record is not None:
            self._refuse_type(record)
            if fields:
                raise BadRequest(f"give a {self._type.__name__}, or its fields")
            return record
        try:
            return self._type(**fields)
        except TypeError as error:
            raise BadRequest(f"{error}; fields: {', '.join(self._type.__struct_fields__)}") from error

    def _refuse_type(self, record: Any) -> None:
        if not isinstance(record, self._type):
            raise BadRequest(f"a {self.repository.name} is a {self._type.__name__}, not {type(record).__name__}")

    def _new(self, record: R) -> R:
        """Return a copy with its id and its times."""
        made: Any = self._named(record)
        if "id" in self._key:
            made.id = made.id or new_id()
        has_created, has_updated = self._has_times
        if has_created:
            made.created_at = self._family.now() if made.created_at is None else utc(made.created_at, "created_at")
        if has_updated:
            start = made.created_at if has_created else self._family.now()
            made.updated_at = start if made.updated_at is None else utc(made.updated_at, "updated_at")
        self._check(made)
        return made

    def _renewed(self, record: R, before: R) -> R:
        """Return a copy with the times of a record that takes the place of ``before``."""
        made: Any = self._named(record)
        old: Any = before
        has_created, has_updated = self._has_times
        if has_created:
            made.created_at = old.created_at if made.created_at is None else utc(made.created_at, "created_at")
        if has_updated:
            given = made.updated_at
            if given is None or given == old.updated_at:
                made.updated_at = self._family.now()
            else:
                made.updated_at = utc(given, "updated_at")
        self._check(made)
        return made

    def _named(self, record: R) -> R:
        """Return a copy in which ids are text."""
        made: Any = msgspec.structs.replace(record)
        for field in (*self._key, *(each.field for each in self._belongs)):
            if isinstance(getattr(made, field), UUID):
                setattr(made, field, str(getattr(made, field)))
        return made

    def _check(self, record: R) -> None:
        """Raise BadRequest for what this kind of record cannot be; it may be completed here."""

    def _ttl(self, record: R) -> float | None:
        """When the record expires, in seconds since 1970; None: never."""
        return None

    async def _insert(self, record: R) -> None:
        await self._write(self.repository._pk_of(record), record, None, None)

    async def _write(self, pk: str, record: R, before: R | None, entry: Entry | None) -> None:
        """Write a record in place of the entry that was read, on condition of what it belongs to."""
        key, expires_at = self.repository._prefix + pk, self._ttl(record)
        for attempt in range(_ATTEMPTS):
            checks = await checks_of(self._belongs, record, before)
            try:
                if self._together:
                    await atomic_writer(self.repository).save(
                        pk,
                        record,
                        expect=ABSENT if entry is None else None,
                        old=UNREAD if entry is None else entry,
                        expires_at=expires_at,
                        also=checks,
                    )
                    return
                if await self._write_in_order(pk, record, entry, expires_at, checks):
                    return
            except UniqueConflict:
                raise
            except Conflict as conflict:
                if conflict.key != key or entry is not None:
                    if not self._family.forget(conflict.key):
                        raise
                elif self._family.atomic:
                    raise taken(pk) from conflict
            await backoff(attempt)
        raise Conflict(key, version_of(entry))

    async def _write_in_order(
        self, pk: str, record: R, entry: Entry | None, expires_at: float | None, checks: Sequence[Check]
    ) -> bool:
        """Write, and look at the parents again; False: taken back, since they are not what they were."""
        key, writer = self.repository._prefix + pk, self.repository._writer
        [stored] = await self._store._entries([key]) if entry is None else [entry]
        if entry is None and live(stored) is not None:
            raise taken(pk)
        await writer.save(pk, record, old=stored, expires_at=expires_at)
        if await self._family.holds(checks):
            return True
        for check in checks:
            self._family.forget(check.key)
        before = None if live(stored) is None else self._decode(cast("Entry", stored))
        try:
            if before is not None:
                await checks_of(self._belongs, before)
                await writer.save(pk, before, expires_at=None if stored is None else stored.expires_at)
                return False
        except ParentGone:
            pass
        await writer.remove(pk)
        return False

    def _cascade_of(self, field: str) -> Cascade:
        async def cascade(id_: str, guard: Check) -> None:
            found = True
            while found:  # what changed between reading and removing is met again
                found = False
                async for page in belonging(self.repository, field, id_):
                    found = True
                    await self._remove_page(page, guard)

        return cascade

    async def _remove_page(self, page: Sequence[Entry], guard: Check) -> None:
        await remove_page(self.repository, page, guard, self._family.store)

    async def _entry(self, pk: str) -> Entry | None:
        [entry] = await self._store._entries([self.repository._prefix + pk])
        return live(entry)

    def _decode(self, entry: Entry) -> R:
        return self.repository._codec.decode(entry.key, entry.value)


class Parents(Records[R]):
    """Records that others belong to; deleting one deletes them too.

    Attributes:
        births: what others name in their `Belongs`, or in `Children`.
    """

    def __init__(
        self,
        family: Family,
        type: type[R],
        *,
        name: str,
        indexes: Iterable[Index] = (),
        belongs: Sequence[Belongs] = (),
        **options: Any,
    ) -> None:
        super().__init__(family, type, name=name, indexes=indexes, belongs=belongs, **options)
        self.births = Births(family, self.repository)

    async def check(self, id: str | UUID) -> Check:
        """As `Births.check`."""
        return await self.births.check(str(id))

    async def delete(self, id: Any) -> bool:
        """Delete the record and everything that belongs to it; False where there was none.

        From the first commit on the record is gone; what belongs to it follows in batches. If that is
        interrupted, it is finished by the next `open` of the store, or when the id is used again.
        """
        await self._family.own()
        return await self.births.kill(self.repository._pk(_plain(id)))

    async def _insert(self, record: R) -> None:
        await self.births.bear(self.repository._pk_of(record), record, lambda: checks_of(self._belongs, record))

    def _cascade_of(self, field: str) -> Cascade:
        cascade = super()._cascade_of(field)

        async def and_what_was_begun(id_: str, guard: Check) -> None:
            await cascade(id_, guard)
            await self.births.deletions.finish_all()  # of those that somebody removed and could not finish

        return and_what_was_begun

    async def _remove_page(self, page: Sequence[Entry], guard: Check) -> None:
        for entry in page:
            await self.births.kill(entry.key[len(self.repository._prefix) :], guard)


def _plain(id: Any) -> Any:
    """Return an id as the repository takes it: a UUID counts as its text."""
    if isinstance(id, UUID):
        return str(id)
    if isinstance(id, tuple):
        return tuple(_plain(each) for each in cast("tuple[Any, ...]", id))
    return id


def _with(record: R, **fields: Any) -> R:
    return msgspec.structs.replace(record, **fields)
