"""What an import from another system did, and what comparing the two has shown."""

from __future__ import annotations

from msgspec import Struct

from kvpersist.ops.importers.plan import Problem

__all__ = ["SessionCheck", "SystemImport", "Verified"]


class SessionCheck(Struct, frozen=True, kw_only=True):
    """A session of the source and the one in the store. ``digest`` is that of the source, in hex."""

    id: str
    messages: int
    digest: str
    stored_messages: int
    stored_digest: str

    @property
    def equal(self) -> bool:
        return (self.messages, self.digest) == (self.stored_messages, self.stored_digest)


class Verified(Struct, kw_only=True):
    """What comparing the source with the store has shown.

    Attributes:
        sessions: a check of each; ``different``: the ids of those that are not equal.
        records, missing_records: of other kinds, how many are there, and the places of those that are not.
    """

    sessions: list[SessionCheck] = []
    different: list[str] = []
    records: int = 0
    missing_records: list[str] = []


class SystemImport(Struct, kw_only=True):
    """What an import from another system did, or with ``dry_run`` would do.

    Attributes:
        sessions: how many were created; ``messages``: how many messages were added.
        completed: sessions that an earlier import, or the source since then, left to be added to.
        present: sessions that were there already, whole.
        differing: sessions and records that are there with other contents: left as they are.
        records: how many records of other kinds were created, by kind; ``records_present``: were there.
        events, consumers: how many were added.
        problems: what is not in the store as it is in the source, in its order.
        first: the first session of the source, None if there is none.
        verified: None with ``dry_run``.
    """

    source: str = ""
    system: str = ""
    dry_run: bool = False
    sessions: int = 0
    messages: int = 0
    completed: int = 0
    present: int = 0
    differing: list[str] = []
    records: dict[str, int] = {}
    records_present: int = 0
    events: int = 0
    consumers: int = 0
    problems: list[Problem] = []
    first: str | None = None
    verified: Verified | None = None

    @property
    def whole(self) -> bool:
        """Whether the store now holds everything that the source does."""
        lost = self.differing or any(problem.left_out for problem in self.problems)
        checked = self.verified
        return not (lost or (checked is not None and (checked.different or checked.missing_records)))
