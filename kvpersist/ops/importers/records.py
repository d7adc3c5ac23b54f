"""Writing the records that are no sessions: each is created, found equal, or found different."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any, Final, Literal, TypeAlias

import msgspec

from kvpersist.agents.persistence import Persistence
from kvpersist.agents.workspace.providers import Provider
from kvpersist.errors import BadOption, BadRequest, Conflict, ParentGone, UniqueConflict
from kvpersist.ops.importers.plan import Problem, Record, list_or_none, object_or_none

__all__ = ["Outcome", "Records"]

Outcome: TypeAlias = Literal["created", "present", "differing", "left out"]

_KEYS: Final[dict[str, tuple[str, ...]]] = {
    "todos": ("agent_id",),
    "confirmations": ("session_id",),
    "snapshots": ("agent_id", "id"),
    "windows": ("agent_id", "id"),
    "compressions": ("agent_id", "id"),
    "recovered_files": ("agent_id", "id"),
    "media": ("agent_id", "key"),
}
"""What a record of a kind is found by; otherwise its id."""
_OURS: Final = ("sealed", "secret_ref", "is_default", "root", "failed", "duration", "version")
"""Fields that follow from others, or that are decided here."""


class Records:
    """Adds records to a store."""

    def __init__(self, db: Persistence, *, secrets: str | None = None, dry_run: bool = False) -> None:
        """
        Raises:
            BadOption: ``secrets`` is none of None, "encrypt" and "env:NAME".
        """
        if secrets is not None and secrets != "encrypt" and not re.fullmatch(r"env:[A-Za-z0-9_{}]+", secrets):
            raise BadOption("secrets", f"{secrets!r} is neither encrypt nor env:NAME")
        self._db, self._secrets, self._dry_run = db, secrets, dry_run

    async def add(self, item: Record, problem: Callable[[Problem], None]) -> Outcome:
        """Create the record unless it is there; what it names and is not there is kept as metadata, and reported."""
        wanted = item.record
        stored = await self._get(item)
        if stored is not None:
            if not _equal(wanted, stored):
                return "differing"
            await self._add_secret(item, stored, problem)
            return "present"
        if self._dry_run:
            self._tell_secret(item, problem)
            return "created"
        while True:
            try:
                await self._create(item, wanted)
            except ParentGone as error:
                field = f"{error.kind}_id"
                named = getattr(wanted, field, None)
                if named is None or field in _KEYS.get(item.kind, ()):
                    problem(Problem(place=item.place, reason=str(error)))
                    return "left out"
                reason = f"it names the {error.kind} {named!r}, which is not there: kept in metadata.missing"
                problem(Problem(place=item.place, reason=reason, left_out=False))
                missing = {**wanted.metadata.get("missing", {}), field: named}
                wanted = msgspec.structs.replace(
                    wanted, metadata={**wanted.metadata, "missing": missing}, **{field: None}
                )
            except UniqueConflict:
                found = await self._get(item)
                return "present" if found is not None and _equal(wanted, found) else "differing"
            except (BadRequest, Conflict) as error:
                problem(Problem(place=item.place, reason=str(error)))
                return "left out"
            else:
                self._tell_secret(item, problem)
                return "created"

    async def holds(self, item: Record) -> bool:
        """Whether the store has the record as it is in the source."""
        stored = await self._get(item)
        return stored is not None and _equal(item.record, stored)

    async def _get(self, item: Record) -> Any:
        names = _KEYS.get(item.kind, ("id",))
        key = tuple(getattr(item.record, name) for name in names)
        try:
            return await self._repository(item).get(key[0] if len(key) == 1 else key)
        except BadRequest:  # a key that cannot be: creating it says why
            return None

    async def _create(self, item: Record, record: Any) -> None:
        repository = self._repository(item)
        if item.kind == "confirmations":
            await repository.save(record)
        elif item.kind == "todos":
            await repository._lists.create(record)  # with its version and times, which a save would count anew
        elif item.secret is not None and self._secrets is not None:
            if self._secrets == "encrypt":
                await repository.create(record, secret=item.secret)
            else:
                await repository.create(msgspec.structs.replace(record, secret_ref=self._reference(record.id)))
        else:
            await repository.create(record)

    async def _add_secret(self, item: Record, stored: Any, problem: Callable[[Problem], None]) -> None:
        """Add the secret to a provider that was imported without it."""
        if item.secret is None or stored.sealed is not None or stored.secret_ref is not None:
            return
        if self._secrets is None or self._dry_run:
            self._tell_secret(item, problem)
        elif self._secrets == "encrypt":
            await self._repository(item).set_secret(stored.id, item.secret)
        else:
            reference = self._reference(stored.id)

            def named(old: Provider) -> Provider:
                return msgspec.structs.replace(old, secret_ref=reference, updated_at=old.updated_at)

            await self._db.providers.update(stored.id, named)

    def _tell_secret(self, item: Record, problem: Callable[[Problem], None]) -> None:
        if item.secret is not None and self._secrets is None:
            reason = "its key is in clear, and was left out: import it again with secrets=encrypt or env:NAME"
            problem(Problem(place=item.place, reason=reason, left_out=False))

    def _reference(self, id_: str) -> str:
        name = re.sub(r"[^A-Z0-9]", "_", id_.upper())
        return (self._secrets or "").replace("{id}", name)

    def _repository(self, item: Record) -> Any:
        return getattr(self._db, item.kind)


def _equal(wanted: Any, stored: Any) -> bool:
    """Whether a stored record says everything that the source's does."""
    metadata = object_or_none(getattr(stored, "metadata", None)) or {}
    missing = object_or_none(metadata.get("missing")) or {}
    for name in wanted.__struct_fields__:
        value, found = getattr(wanted, name), getattr(stored, name)
        if value is None or name in _OURS:
            continue
        if name == "metadata":
            found = {key: metadata[key] for key in metadata if key != "missing" or key in value}
        if _text(value) != _text(found) and not (found is None and missing.get(name) == value):
            return False
    return True


def _text(value: Any) -> str:
    return json.dumps(msgspec.to_builtins(_whole(value)), sort_keys=True, default=str)


def _whole(value: Any) -> Any:
    """The value with every field of what is in it: ``to_builtins`` leaves out a default or not, by its identity."""
    if isinstance(value, msgspec.Struct):
        return {name: _whole(getattr(value, name)) for name in value.__struct_fields__}
    listed = list_or_none(value)
    return value if listed is None else [_whole(each) for each in listed]
