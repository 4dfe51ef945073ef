"""Calls of one poll: how many polls one id may fail, how many calls run at once, what one call asks for."""

from __future__ import annotations

import asyncio
from collections.abc import Container, Coroutine, Hashable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

from exporter.errors import ApiError

T = TypeVar("T")


class Attempts:
    """How many polls have failed because of each id, for reasons that may pass. Lives with the collector."""

    MOST = 5
    """Polls that one id may fail; then the poll goes on without it."""
    LONGEST_REST = 8
    """Most polls that leave out an id that was given up, before it is asked for again."""

    def __init__(self) -> None:
        self._failed: dict[Hashable, int] = {}
        self._resting: dict[Hashable, tuple[int, int]] = {}
        """By id: in how many more polls it is left out, and the number it began with."""

    def exhausted(self, id: Hashable, error: ApiError) -> bool:
        """Whether to go on without `id`: at once after a final error, else after `MOST` failed polls."""
        return not error.transient or self._failed.get(id, 0) >= self.MOST

    def give_up(self, id: Hashable, error: ApiError) -> bool:
        """Like `exhausted`; if that is False, count one failed poll."""
        if self.exhausted(id, error):
            return True
        self.charge((id,))
        return False

    def charge(self, ids: Iterable[Hashable]) -> None:
        """Count one failed poll for each id."""
        for id in ids:
            self._failed[id] = self._failed.get(id, 0) + 1

    def forget(self, ids: Iterable[Hashable]) -> None:
        """Forget the failures of these ids: they have been answered or given up."""
        for id in ids if self._failed or self._resting else ():
            self._failed.pop(id, None)
            self._resting.pop(id, None)

    def retain(self, ids: Container[Hashable]) -> None:
        """Forget all others."""
        self.forget([id for id in {*self._failed, *self._resting} if id not in ids])

    def rest(self, ids: Iterable[Hashable]) -> None:
        """Leave these ids, which have been given up, out of the next 1, 2, 4 … polls."""
        for id in ids:
            polls = min(self.LONGEST_REST, 2 * self._resting.get(id, (0, 0))[1] or 1)
            self._resting[id] = polls, polls

    def rests(self, id: Hashable) -> bool:
        """Whether to leave `id` out of this poll; to be asked once per poll."""
        left, polls = self._resting.get(id, (0, 0))
        if left:
            self._resting[id] = left - 1, polls
        return left > 0


def parts(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    """The items in their order, `size` at once; the last part may be shorter."""
    return (items[begin : begin + size] for begin in range(0, len(items), size))


async def gather_bounded(calls: Iterable[Coroutine[Any, Any, T]], limit: int) -> list[T]:
    """The results of `calls` in their order; at most `limit` run at once. The first error cancels the others."""
    numbered = list(enumerate(calls))
    if not numbered:
        return []
    waiting = iter(numbered)
    results: dict[int, T] = {}

    async def work() -> None:
        for index, call in waiting:
            results[index] = await call

    # No TaskGroup: one that fails leaves a cancel request at this task, and with Python before 3.11.4 the next
    # `asyncio.timeout` of the task then ends in a CancelledError.
    workers = [asyncio.create_task(work()) for _ in range(min(limit, len(numbered)))]
    try:
        await asyncio.gather(*workers)
    finally:
        for worker in workers:
            worker.cancel()
        await asyncio.wait(workers)
        # The error holds this frame: with the workers in it, that would be a cycle that keeps whole answers in memory.
        workers.clear()
        for _, call in waiting:
            call.close()
    return [results[index] for index in sorted(results)]
