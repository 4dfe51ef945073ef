"""Timers of thousands of pollers.

The event loop compares its timers with a Python function, and each of them takes a quarter of a kilobyte. Here timers
are tuples in one heap, and the event loop has one timer: for the earliest of them.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
from collections.abc import Callable


class Timer:
    """One call at `when`, in the time of the event loop."""

    __slots__ = ("call", "when")

    def __init__(self, when: float, call: Callable[[], object]) -> None:
        self.when = when
        self.call: Callable[[], object] | None = call


class Timers:
    """Calls functions without arguments at their times, those of the same time in the order in which they came."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Timer]] = []
        self._numbers = itertools.count()
        self._cancelled = 0
        self._next: asyncio.TimerHandle | None = None

    def after(self, seconds: float, call: Callable[[], object]) -> Timer:
        """Call `call` after so many seconds."""
        return self.at(asyncio.get_running_loop().time() + seconds, call)

    def at(self, when: float, call: Callable[[], object]) -> Timer:
        """Call `call` at this time of the event loop, soon if it has passed."""
        timer = Timer(when, call)
        heapq.heappush(self._heap, (when, next(self._numbers), timer))
        if self._next is None or when < self._next.when():
            self._wake_at(when)
        return timer

    def cancel(self, timer: Timer) -> None:
        """Do not make this call any more."""
        if timer.call is None:
            return
        timer.call = None
        self._cancelled += 1
        if 2 * self._cancelled > len(self._heap):
            self._heap = [entry for entry in self._heap if entry[2].call is not None]
            heapq.heapify(self._heap)
            self._cancelled = 0

    def _wake_at(self, when: float) -> None:
        if self._next is not None:
            self._next.cancel()
        self._next = asyncio.get_running_loop().call_at(when, self._wake)

    def _wake(self) -> None:
        assert self._next is not None, "only the timer calls this"
        # The event loop may call a little early, as far as its clock can tell.
        now = max(self._next.when(), asyncio.get_running_loop().time())
        self._next = None
        try:
            while self._heap and self._heap[0][0] <= now:
                _, _, timer = heapq.heappop(self._heap)
                call, timer.call = timer.call, None
                if call is None:
                    self._cancelled -= 1
                else:
                    call()
        finally:
            if self._heap and (self._next is None or self._heap[0][0] < self._next.when()):
                self._wake_at(self._heap[0][0])
