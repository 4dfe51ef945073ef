"""Which clock: how `Date` headers set the platform's time (contract 4.1.10, F15, F58)."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from exporter.clock import Clock

DAY = 86_400.0
START = 1_795_000_000.0


class Platform:
    """A platform whose time is `START` plus the monotonic time, asked by a clock that is `ahead` of it."""

    def __init__(self, ahead: float = 0.0) -> None:
        self.time = 1000.0
        self.clock = Clock(lambda: START + self.time + ahead, lambda: self.time)

    def answer(self, wrong_by: float = 0.0, after: float = 30.0) -> str:
        """An answer `after` seconds whose Date is wrong by so much."""
        self.time += after
        return self.clock.learn(float(int(START + self.time + wrong_by)))

    @property
    def error(self) -> float:
        """Seconds by which the clock is ahead of the platform's true time."""
        return self.clock.platform() - (START + self.time)


@pytest.mark.parametrize("wrong_by", [8 * DAY, -8 * DAY, 301.0, -301.0, 400 * DAY])
def test_F58_one_wrong_date_moves_nothing(wrong_by: float) -> None:
    """One answer that is more than five minutes off is not accepted, nor two, nor contradictory ones."""
    one = Platform()
    assert one.answer() == "first"
    assert one.answer(wrong_by) == "doubted"
    assert one.error == pytest.approx(0, abs=1)
    assert one.answer() == "known"
    for number in range(20):
        assert one.answer(wrong_by * (1 + number % 2)) == "doubted"
    assert one.answer(wrong_by) == "doubted"
    assert one.answer(wrong_by) == "agreeing"
    assert one.answer() == "known"
    assert one.answer(wrong_by) == "doubted", "the row begins anew"
    assert one.error == pytest.approx(0, abs=1)


@pytest.mark.parametrize("after", [0.1, 5.0, 30.0, 300.0])
@pytest.mark.parametrize("moved", [DAY, -DAY, 8 * DAY, 3600.0])
def test_F58_a_platform_clock_that_really_moves_is_believed_after_a_minute(moved: float, after: float) -> None:
    """Three agreeing answers over at least a minute, however fast they follow one another; then at once."""
    one = Platform()
    one.answer()
    answers, begun = 0, one.time + after
    while one.answer(moved, after) != "believed":
        answers += 1
        assert one.error == pytest.approx(0, abs=1)
    assert answers + 1 >= 3
    assert 60 <= one.time - begun < 60 + 2 * after + 0.1
    assert one.error == pytest.approx(moved, abs=1)
    assert one.answer(moved) == "known"


def test_F58_a_date_that_stands_still_is_never_believed() -> None:
    """A proxy that sends the Date of a stored answer agrees with itself for half a minute at most."""
    one = Platform()
    one.answer()
    stored = 3600.0
    for _ in range(50):
        assert one.answer(stored) != "believed"
        stored -= 30.0
        if -300 <= stored <= 300:
            break
    assert one.error == pytest.approx(0, abs=1)


@given(st.floats(-1000 * DAY, 1000 * DAY))
@example(2.5)
def test_F15_the_first_answer_is_believed(ahead: float) -> None:
    """Whatever the exporter's own clock shows: that clock may be wrong."""
    one = Platform(ahead)
    assert one.clock.skew == 0.0
    assert one.answer() == "first"
    # A Date has whole seconds, so a clock that is 2.5 s off may seem to be 2 s off, which is ignored.
    assert one.error == pytest.approx(0, abs=2.51)
    assert one.clock.skew == pytest.approx(ahead, abs=1)


@pytest.mark.parametrize("moved", [3.0, 60.0, 299.0, -299.0])
def test_F15_small_differences_are_followed_at_once(moved: float) -> None:
    """A difference of up to five minutes is accepted at once."""
    one = Platform()
    one.answer()
    assert one.answer(moved) == "known"
    assert one.error == pytest.approx(moved, abs=1)


@pytest.mark.parametrize("step", [9 * DAY, -9 * DAY, 3600.0])
def test_F15_a_step_of_the_own_clock_moves_no_window(step: float) -> None:
    """Even a step between the two readings that a difference needs: the own clock is read once."""
    readings = itertools.cycle([START, START + step])
    clock = Clock(lambda: next(readings), lambda: 1000.0)
    clock.learn(START)
    for _ in range(4):
        assert clock.platform() == pytest.approx(START, abs=2)
