"""Calls of one poll that run at once."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable

import pytest

from exporter.collectors.calls import gather_bounded


async def value(number: int, before: Awaitable[object] | None = None) -> int:
    await (before or asyncio.sleep(0))
    return number


async def failure(before: Awaitable[object] | None = None) -> int:
    await (before or asyncio.sleep(0))
    raise ValueError("no answer")


async def test_results_come_in_the_order_of_the_calls() -> None:
    assert await gather_bounded((value(n, asyncio.sleep(0.01 * (3 - n))) for n in range(4)), 2) == [0, 1, 2, 3]
    assert await gather_bounded([], 2) == []


async def test_the_first_error_is_raised_and_cancels_the_other_calls() -> None:
    never, ended = asyncio.Event(), []

    async def waits() -> int:
        try:
            await never.wait()
        finally:
            ended.append("waits")
        return 0

    with pytest.raises(ValueError, match="no answer"):
        await gather_bounded([waits(), failure(), value(1)], 2)
    assert ended == ["waits"]


async def test_timeouts_of_the_task_work_after_an_error() -> None:
    """No cancel request is left: with one, Python before 3.11.4 ends the next timeout in a CancelledError."""
    task = asyncio.current_task()
    assert task is not None
    with pytest.raises(ValueError, match="no answer"):
        await gather_bounded([failure()], 1)
    assert task.cancelling() == 0
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await asyncio.Event().wait()


async def test_a_task_that_is_cancelled_while_a_call_fails_is_cancelled() -> None:
    """Its owner waits for its end: the error must not take the place of the cancellation."""
    fail = asyncio.Event()
    gathering = asyncio.create_task(gather_bounded([failure(fail.wait())], 1))
    await asyncio.sleep(0.01)
    fail.set()
    gathering.cancel()
    await asyncio.wait([gathering])
    assert gathering.cancelled()
