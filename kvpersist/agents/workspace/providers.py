"""Providers: how models are reached. Their secrets are never stored in clear."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any, Final, Literal, TypeAlias, cast, get_args
from urllib.parse import urlsplit
from uuid import UUID

import msgspec

from kvpersist import keys, urls
from kvpersist.agents.births import Belongs, Births, Family, checks_of
from kvpersist.agents.family import Records
from kvpersist.agents.records import new_id
from kvpersist.agents.workspace.secrets import Secrets, checked_reference
from kvpersist.driver import Check, Entry, Put
from kvpersist.errors import BadRequest, Conflict, UniqueConflict
from kvpersist.index import Index
from kvpersist.index.atomic_writer import AtomicWriter, IndexOps
from kvpersist.index.writer import version_of
from kvpersist.transaction import backoff

__all__ = ["PROTOCOLS", "Protocol", "Provider", "Providers"]

Protocol: TypeAlias = Literal["anthropic", "openai"]

PROTOCOLS: Final = get_args(Protocol)
_ATTEMPTS: Final = 40  # of a write that keeps losing to others


class Provider(msgspec.Struct, kw_only=True, omit_defaults=True):
    """How a model is reached. The secret is not part of it: see `Providers.secret`.

    ``secret_ref`` is ``env:NAME`` or ``file:/path``; ``sealed`` is a secret that is stored encrypted.
    ``is_default`` is True for the one default of a container, and otherwise None.
    """

    id: str = ""
    container_id: str | None = None
    name: str | None = None
    vendor: str | None = None
    protocol: str = "openai"
    base_url: str | None = None
    model: str | None = None
    is_default: bool | None = None
    metadata: dict[str, Any] = {}
    secret_ref: str | None = None
    sealed: bytes | None = None
    created_at: datetime | None = None
    updated_at: datetime | None = None

    def __repr__(self) -> str:
        shown = [f"{name}={getattr(self, name)!r}" for name in self.__struct_fields__ if name != "sealed"]
        return f"Provider({', '.join(shown)}{', sealed=...' if self.sealed else ''})"


class Providers(Records[Provider]):
    """The providers of one namespace, ``db.providers``, newest first.

    Found by ``name=``, ``container_id=`` or ``vendor=``. Its container must be there, and takes it along
    when it is deleted.
    """

    def __init__(self, family: Family, containers: Births, secrets: Secrets) -> None:
        super().__init__(
            family,
            Provider,
            name="provider",
            indexes=[
                Index("name", order_by="-created_at"),
                Index("container_id", order_by="-created_at"),
                Index("vendor", order_by="-created_at"),
                Index("container_id", "is_default", unique=True, name="default"),
                Index(order_by="-created_at"),
            ],
            belongs=[Belongs("container_id", containers)],
        )
        self._secrets = secrets

    async def create(self, record: Provider | None = None, /, *, secret: str | None = None, **fields: Any) -> Provider:
        """Store a new provider, given whole or by its fields; return it as it is stored.

        Args:
            secret: is stored encrypted, with the key that `open` was given.

        Raises:
            UniqueConflict: there is one of this id. ParentGone: its container does not exist.
            BadRequest: a field is not what it should be; a secret is not shown.
            BadOption, MissingExtra: a secret cannot be encrypted here.
        """
        return await super().create(self._with(self._made(record, fields), secret))

    async def save(self, record: Provider, *, secret: str | None = None) -> Provider:
        """Store a provider whose id you bring, in place of what is there; return it as it is stored.

        Without a secret of its own it keeps the one that is stored. Raises as `create`.
        """
        self._refuse_type(record)
        given = self._with(record, secret)

        def kept(old: Provider) -> Provider:
            if given.secret_ref is not None or given.sealed is not None:
                return given
            return msgspec.structs.replace(given, secret_ref=old.secret_ref, sealed=old.sealed)

        for attempt in range(_ATTEMPTS):
            stored = await self.update(given.id, kept) if given.id else None
            if stored is not None:
                return stored
            try:
                return await super().create(given)
            except UniqueConflict as conflict:
                if conflict.index != "id":
                    raise
            await backoff(attempt)
        raise Conflict(self.repository._prefix + keys.encode(given.id), None)

    async def set_secret(self, id: str | UUID, secret: str | None) -> Provider | None:
        """Store another secret, encrypted, in place of the secret or reference there; None removes it.

        Returns:
            The provider, None where there is none. Raises as `create`.
        """
        text = str(id)
        sealed = None if secret is None else self._sealed(secret, text)
        return await self.update(text, lambda old: msgspec.structs.replace(old, secret_ref=None, sealed=sealed))

    async def secret(self, id: str | UUID) -> str | None:
        """Return the secret: what its reference refers to now, or decrypted; None where there is none.

        Raises:
            BadOption: the variable or file is not there, or no key given is the one it was encrypted with.
            CorruptRecord: it was changed, or encrypted for another record.
            MissingExtra: the library to decrypt it is not installed.
        """
        provider = await self.get(id)
        if provider is None:
            return None
        if provider.secret_ref is not None:
            return await self._secrets.resolve(provider.secret_ref)
        if provider.sealed is not None:
            return self._secrets.open(provider.sealed, self._context(provider.id))
        return None

    async def default(self, container_id: str | UUID) -> Provider | None:
        """Return the default provider of a container, or None."""
        return await self.repository.first(container_id=str(container_id), is_default=True)

    # ---- private

    def _context(self, id_: str) -> str:
        return self.repository._prefix + self.repository._pk(id_)

    def _sealed(self, secret: Any, id_: str) -> bytes:
        if not isinstance(secret, str) or not secret:
            raise BadRequest("a secret is a text that is not empty")
        if any("\ud800" <= char <= "\udfff" for char in secret):  # an error of the codec would hold the secret
            raise BadRequest("a secret is a text; this one holds half of a surrogate pair")
        return self._secrets.seal(secret, self._context(id_))

    def _with(self, record: Provider, secret: str | None) -> Provider:
        if secret is None:
            return record
        if record.secret_ref is not None:
            raise BadRequest("give a secret, or a reference to one: not both")
        id_ = str(record.id) if record.id else new_id()
        return msgspec.structs.replace(record, id=id_, sealed=self._sealed(secret, id_))

    def _check(self, record: Provider) -> None:
        if record.protocol not in PROTOCOLS:
            raise BadRequest(f"unknown protocol {record.protocol!r}: use one of {', '.join(PROTOCOLS)}")
        if record.secret_ref is not None:
            checked_reference(record.secret_ref)
            record.sealed = None
        if record.base_url is not None:
            _refuse_password(record.base_url)
        record.is_default = True if record.is_default else None
        if record.is_default and record.container_id is None:
            raise BadRequest("a default provider is that of a container: give container_id")

    async def _write(self, pk: str, record: Provider, before: Provider | None, entry: Entry | None) -> None:
        """As for any record; a new default takes that from the one before, in the same batch where that is kept."""
        if not record.is_default:
            return await super()._write(pk, record, before, entry)
        key = self.repository._prefix + pk
        for attempt in range(_ATTEMPTS):
            holder = await self._holder(cast("str", record.container_id))
            try:
                if holder is None or holder.key == key:
                    return await super()._write(pk, record, before, entry)
                if self._family.atomic:
                    return await self._take_over(key, record, entry, holder, await checks_of(self._belongs, record))
                await checks_of(self._belongs, record)
                self.repository._codec.encode(key, record)  # what cannot be kept fails before anything is written
                await self.update(self._decode(holder).id, _not_default)
            except UniqueConflict as conflict:
                if conflict.index == "id":
                    raise
            except Conflict as conflict:
                if conflict.key == key:
                    raise
                if conflict.key == self.repository._definitions.key:
                    await self.repository._definitions.refresh()
                self._family.forget(conflict.key)
            await backoff(attempt)
        raise Conflict(key, version_of(entry))

    async def _holder(self, container_id: str) -> Entry | None:
        found = await self.default(container_id)
        return None if found is None else await self._entry(self.repository._pk(found.id))

    async def _take_over(
        self, key: str, record: Provider, entry: Entry | None, holder: Entry, checks: Sequence[Check]
    ) -> None:
        repository = self.repository
        writer = cast("AtomicWriter[Provider]", repository._writer)
        known = await repository._definitions.known()
        cleared = self._renewed(_not_default(self._decode(holder)), self._decode(holder))
        ops, prefix = IndexOps(), len(repository._prefix)
        await writer.index_ops(ops, known, holder.key[prefix:], holder, cleared, None, {})
        await writer.index_ops(ops, known, key[prefix:], entry, record, None, {})
        puts = [
            Put(holder.key, writer.encoded(holder.key, cleared, holder, known), holder.version),
            Put(key, writer.encoded(key, record, entry, known), version_of(entry)),
        ]
        try:
            await self._store._commit([*checks, known.check, *puts, *ops.by_key.values()])
        except Conflict as conflict:
            if conflict.key == key and entry is None:
                raise UniqueConflict("id", record.id, record.id) from conflict
            raise


def _not_default(provider: Provider) -> Provider:
    return msgspec.structs.replace(provider, is_default=None)


def _refuse_password(url: str) -> None:
    try:
        parts = urlsplit(url)
        secret = parts.password is not None or parts.username is not None or urls.redact(url) != url
    except ValueError as error:
        raise BadRequest("base_url is not a URL") from error
    if secret:
        raise BadRequest("base_url holds a user, password or key, which would be stored in clear: give it as secret=")
