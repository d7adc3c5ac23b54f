"""A clock that stands still until a test moves it."""

from __future__ import annotations

__all__ = ["ManualClock"]


class ManualClock:
    """Seconds since 1970, for any ``clock=`` argument or attribute.

    Example:
        >>> clock = ManualClock(100.0)
        >>> clock.advance(2.5)
        >>> clock()
        102.5
    """

    def __init__(self, now: float = 1_700_000_000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        """Move by ``seconds``; backwards if negative, as a real clock may."""
        self.now += seconds
