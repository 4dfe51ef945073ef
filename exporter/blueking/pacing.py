"""How fast BlueKing may be asked: one budget and one number of slots for everything this process does."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from exporter.clock import Clock
from exporter.errors import ApiError


class Deadline:
    """When a poll must be done. Waiting for one's turn does not count: a queue at the start must time nobody out."""

    def __init__(self, seconds: float, clock: Clock) -> None:
        self._clock = clock
        self._end = clock.monotonic() + seconds

    def remaining(self) -> float:
        """Seconds left; negative when it has passed."""
        return self._end - self._clock.monotonic()

    def extend(self, seconds: float) -> None:
        """Give back time that was spent queueing."""
        self._end += seconds


class Gate:
    """Lets requests through in the order of arrival: `rate` per second, evenly spaced, at most `slots` at once.

    There is no burst: a token bucket that saved up tokens would exceed the rate in the very second in which all pollers
    start. A pause asked for by the platform holds for everybody, since the platform counts by application.
    """

    def __init__(self, rate: float, slots: int, clock: Clock, waited: Callable[[float], None]) -> None:
        self._spacing = 1.0 / rate
        self._slots = asyncio.Semaphore(slots)
        self._line = asyncio.Lock()
        self._clock = clock
        self._waited = waited
        self._next = float("-inf")
        self._paused_from = self._paused_until = float("-inf")

    def pause(self, seconds: float) -> None:
        """Let nobody through for so long. Pauses overlap, they do not add up."""
        now = self._clock.monotonic()
        if now > self._paused_until:
            self._paused_from = now
        self._paused_until = max(self._paused_until, now + seconds)

    @asynccontextmanager
    async def turn(self, deadline: Deadline) -> AsyncIterator[None]:
        """A slot, entered when it is one's turn. Raises ApiError `rate_limited` if a pause outlasts the deadline."""
        arrived = self._clock.monotonic()
        self._refuse_hopeless(arrived, deadline)
        async with self._slots:
            async with self._line:
                turn = self._clock.monotonic()
                while (now := self._clock.monotonic()) < (due := max(self._next, self._paused_until)):
                    self._refuse_hopeless(arrived, deadline)
                    await asyncio.sleep(due - now)
                    turn = due
                # Who is woken late must not push back all that come after.
                self._next = max(turn, now - self._spacing / 2) + self._spacing
            self._waited(now - arrived)
            deadline.extend(self._queued(arrived, now))
            yield

    def _queued(self, since: float, until: float) -> float:
        """Seconds between the two that were not spent in a pause: a pause is the platform's doing, not our queue."""
        paused = min(until, self._paused_until) - max(since, self._paused_from)
        return until - since - max(0.0, paused)

    def _refuse_hopeless(self, arrived: float, deadline: Deadline) -> None:
        now = self._clock.monotonic()
        pause = self._paused_until - now
        if pause > 0 and pause >= deadline.remaining() + self._queued(arrived, now):
            raise ApiError("rate_limited", "the platform wants a wait longer than the poll may take", retry_after=pause)
