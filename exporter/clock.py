"""Three clocks: the wall, the monotonic one, and the platform's.

Time windows of BlueKing's history are laid in the platform's time, so that a wrong clock on this machine neither skips
nor repeats history. Intervals and deadlines use the monotonic clock and never this machine's wall clock.
"""

from __future__ import annotations

import time
from collections.abc import Callable

TOLERANCE = 2.0
"""Seconds of difference that are put down to transport and to the whole seconds of a Date header."""


class Clock:
    """The time sources of one process. `wall` and `monotonic` return seconds; tests give virtual ones."""

    def __init__(self, wall: Callable[[], float] = time.time, monotonic: Callable[[], float] = time.monotonic) -> None:
        self.wall = wall
        self.monotonic = monotonic
        self._anchor: tuple[float, float] | None = None

    def learn(self, date: float) -> None:
        """Take the time of a `Date` header (unix seconds, whole) that has just arrived."""
        self._anchor = (date + 0.5, self.monotonic())

    @property
    def skew(self) -> float:
        """Own wall clock minus the platform's, in seconds; 0.0 before the platform has answered."""
        if self._anchor is None:
            return 0.0
        date, at = self._anchor
        return self.wall() - (date + self.monotonic() - at)

    def platform(self) -> float:
        """The platform's time, unix seconds: the own clock, corrected when the two differ by more than `TOLERANCE`."""
        skew = self.skew
        return self.wall() - skew if abs(skew) > TOLERANCE else self.wall()
