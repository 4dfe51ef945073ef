"""Timers of pollers: what is called, when, and in which order."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import looptime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exporter.timers import Timers

Plan = list[tuple[float, float | None]]
"""Timers: seconds until the call, and seconds until it is cancelled, None for never."""

plans = st.lists(st.tuples(st.integers(0, 20).map(float), st.none() | st.integers(0, 20).map(float)), max_size=60)


async def called(plan: Plan) -> list[tuple[float, int]]:
    """The time and the place in the plan of each call that is made."""
    loop, timers = asyncio.get_running_loop(), Timers()
    begun, calls = loop.time(), []

    def call(number: int) -> Callable[[], None]:
        return lambda: calls.append((round(loop.time() - begun, 3), number))

    set_timers = [timers.after(wait, call(number)) for number, (wait, _) in enumerate(plan)]
    for second in range(22):
        for timer, (_, cancelled) in zip(set_timers, plan, strict=True):
            if cancelled == second:
                timers.cancel(timer)
                timers.cancel(timer)  # the second time changes nothing
        await asyncio.sleep(1)
    return calls


@given(plan=plans)
@settings(deadline=None, max_examples=100)
def test_each_timer_calls_once_at_its_time_unless_it_is_cancelled_before(plan: Plan) -> None:
    loop = looptime.new_event_loop()
    try:
        calls = loop.run_until_complete(called(plan))
    finally:
        loop.close()
    sure = [(wait, number) for number, (wait, end) in enumerate(plan) if end is None or end > wait]
    never = {number for number, (wait, end) in enumerate(plan) if end is not None and end < wait}
    assert [call for call in calls if call in sure] == sorted(sure), "in the order of time, then of their setting"
    assert not never & {number for _, number in calls}
    assert len(calls) == len(set(calls)), "once each"


@pytest.mark.looptime
async def test_a_call_may_set_a_timer_that_is_due_before_all_others() -> None:
    loop, timers = asyncio.get_running_loop(), Timers()
    begun, calls = loop.time(), []
    timers.after(10, lambda: calls.append(loop.time() - begun))
    timers.after(1, lambda: timers.after(1, lambda: calls.append(loop.time() - begun)))
    await asyncio.sleep(11)
    assert calls == pytest.approx([2, 10])


@pytest.mark.looptime
async def test_a_call_that_fails_does_not_hold_up_the_next_ones() -> None:
    loop, timers = asyncio.get_running_loop(), Timers()
    errors, calls = [], []
    loop.set_exception_handler(lambda _, context: errors.append(context["exception"]))
    timers.after(1, lambda: [].pop())
    timers.after(1, lambda: calls.append(1))
    timers.after(2, lambda: calls.append(2))
    await asyncio.sleep(3)
    assert calls == [1, 2]
    assert [type(error) for error in errors] == [IndexError]
