"""Changes: who wants to know of them, and where they are learnt from.

``scope`` what is watched and what is told of it; ``routing`` whom a key is for; ``hub`` everybody who
watches one store; ``source`` what runs while it is wanted: a ``feed`` of what the driver tells, or,
where a driver says only that something has changed or nothing at all, a ``survey`` that finds out what
by comparing versions; ``watch`` an iteration over changes; ``waker`` tells when to read again, not what.
"""

from kvpersist.changes.hub import Hub
from kvpersist.changes.scope import Change, Scope
from kvpersist.changes.waker import Waker
from kvpersist.changes.watch import Watch

__all__ = ["Change", "Hub", "Scope", "Waker", "Watch"]
