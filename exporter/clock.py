"""Three clocks: the wall clock, the monotonic clock, and the platform's clock.

Time windows of BlueKing's history use the platform's time, so that a wrong clock on this machine neither skips nor
repeats history. Intervals and deadlines use the monotonic clock and never this machine's wall clock.

The platform's clock is read from the `Date` header of its answers. One wrong header must not move a window by days: a
Date that contradicts the known time is accepted only when several answers agree with it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Literal

import msgspec

TOLERANCE = 2.0
"""Seconds of difference that are ignored: the network and the whole seconds of a Date header explain them."""
DOUBTED = 300.0
"""Seconds: a Date that differs more from the known platform time is not accepted at once."""
AGREEMENT = 30.0
"""Doubted Dates agree when they differ by at most this many seconds, besides the time between their answers."""
AGREEING_ANSWERS = 3
AGREEING_SECONDS = 60.0
"""So many answers in a row, the first and the last at least so many seconds apart, must agree on another time."""

Verdict = Literal["first", "known", "doubted", "agreeing", "believed"]
"""What `Clock.learn` made of a Date: the first one since the start; close to the known clock; the first one of a row
that contradicts it; another one of that row; the one that made the row believed."""


class _Doubted(msgspec.Struct):
    """A row of answers that agree on another time. `offset`: of the first one; `since`: when it came, monotonic."""

    offset: float
    since: float
    answers: int


class Clock:
    """The time sources of one process. `wall` and `monotonic` return seconds; tests give virtual ones."""

    def __init__(self, wall: Callable[[], float] = time.time, monotonic: Callable[[], float] = time.monotonic) -> None:
        self.wall = wall
        self.monotonic = monotonic
        self._offset: float | None = None
        """The platform's time minus the monotonic clock."""
        self._doubted: _Doubted | None = None

    def learn(self, date: float) -> Verdict:
        """Learn the platform's time from a `Date` header (whole unix seconds) that has just arrived, if it is
        credible."""
        now = self.monotonic()
        offset = date + 0.5 - now
        if self._offset is None or abs(offset - self._offset) <= DOUBTED:
            verdict: Verdict = "first" if self._offset is None else "known"
            self._offset, self._doubted = offset, None
            return verdict
        doubted = self._doubted
        if doubted is None or abs(offset - doubted.offset) > AGREEMENT:
            self._doubted = _Doubted(offset, now, 1)
            return "doubted"
        doubted.answers += 1
        if doubted.answers < AGREEING_ANSWERS or now - doubted.since < AGREEING_SECONDS:
            return "agreeing"
        self._offset, self._doubted = offset, None
        return "believed"

    @property
    def skew(self) -> float:
        """Own wall clock minus the platform's, in seconds; 0.0 before the platform has answered."""
        return self._skew_of(self.wall())

    def platform(self) -> float:
        """The platform's time, unix seconds: the own clock, corrected when the two differ by more than `TOLERANCE`."""
        wall = self.wall()
        skew = self._skew_of(wall)
        return wall - skew if abs(skew) > TOLERANCE else wall

    def _skew_of(self, wall: float) -> float:
        return 0.0 if self._offset is None else wall - (self._offset + self.monotonic())
