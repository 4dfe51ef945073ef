"""Calls of one poll: how often one id may fail it, and how many calls are under way at once."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterable
from typing import Any, TypeVar

from exporter.errors import ApiError

T = TypeVar("T")


class Attempts:
    """How many polls have failed because of each id, for reasons that may pass. Lives with the collector."""

    MOST = 5
    """Polls that one id may fail; then the poll goes on without it."""

    def __init__(self) -> None:
        self._failed: dict[int, int] = {}

    def exhausted(self, id: int, error: ApiError) -> bool:
        """Whether to go on without `id`: at once after a refusal for good, else after `MOST` failed polls."""
        return not error.transient or self._failed.get(id, 0) >= self.MOST

    def give_up(self, id: int, error: ApiError) -> bool:
        """`exhausted`; where it is not, count one failed poll."""
        if self.exhausted(id, error):
            return True
        self.charge((id,))
        return False

    def charge(self, ids: Iterable[int]) -> None:
        """Count one failed poll for each id."""
        for id in ids:
            self._failed[id] = self._failed.get(id, 0) + 1

    def forget(self, ids: Iterable[int]) -> None:
        """Forget the failures of these ids: they have been answered or given up."""
        for id in ids:
            self._failed.pop(id, None)


async def gather_bounded(calls: Iterable[Coroutine[Any, Any, T]], limit: int) -> list[T]:
    """The results of `calls` in their order, at most `limit` under way at once. The first error ends them all."""
    numbered = list(enumerate(calls))
    if not numbered:
        return []
    waiting = iter(numbered)
    results: dict[int, T] = {}

    async def work() -> None:
        for index, call in waiting:
            results[index] = await call

    first: BaseException | None = None
    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(min(limit, len(numbered))):
                group.create_task(work())
    except BaseExceptionGroup as errors:
        first = errors.exceptions[0]
    finally:
        for _, call in waiting:
            call.close()
    try:
        if first is not None:
            raise first
    finally:
        # Raised outside the handler and forgotten here: in a circle with the group it would hold on to whole answers.
        first = None
    return [results[index] for index in sorted(results)]
