"""What the file system says, in kvpersist's words."""

from __future__ import annotations

import errno
from typing import Final

from kvpersist.errors import KvError, ReadOnly, Unavailable

__all__ = ["translated"]

_DENIED: Final = (errno.EACCES, errno.EPERM, errno.EROFS)


def translated(error: OSError, operation: str, root: str, *, reading: bool = False) -> KvError:
    """The error of ours that says the same; of a write, it says that nothing was changed."""
    message = f"filesystem {operation}, {root}: {error.strerror or error}"
    answer = ReadOnly(message) if error.errno in _DENIED and not reading else Unavailable(message)
    answer.__cause__ = error
    return answer
