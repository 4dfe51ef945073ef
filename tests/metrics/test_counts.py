"""Adding to counters leaves earlier values untouched; a new series is shown as 0 for some time."""

from __future__ import annotations

import math

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from exporter.metrics.counts import Tally, held
from exporter.metrics.family import Count, Counts, Exemplar

HOLD = 90.0
BOUNDS = (1.0, 10.0)


def test_a_tally_that_counts_nothing_returns_the_very_same_counts() -> None:
    """An idle poll must not make the page or the state look changed."""
    tally = Tally(Counts(), 100, HOLD)
    tally.zero("a_total")
    before = tally.freeze()
    again = Tally(before, 200, HOLD)
    again.zero("a_total")
    assert again.freeze() is before


def test_families_that_are_not_added_to_are_shared() -> None:
    """Copying is paid only for the families of this poll."""
    tally = Tally(Counts(), 100, HOLD)
    tally.inc("a_total", ("x",))
    tally.inc("b_total", ("x",))
    before = tally.freeze()
    tally = Tally(before, 200, HOLD)
    tally.inc("a_total", ("x",))
    after = tally.freeze()
    assert after.counters["b_total"] is before.counters["b_total"]
    assert before.counters["a_total"]["x",].value == 1
    assert after.counters["a_total"]["x",].value == 2


def test_a_series_keeps_its_birth_and_its_hold() -> None:
    """`_created` and the end of the hold belong to the first event, whatever comes later."""
    tally = Tally(Counts(), 100, HOLD)
    tally.inc("a_total", ("x",), exemplar=7)
    tally = Tally(tally.freeze(), 150, HOLD)
    tally.inc("a_total", ("x",), by=2)
    assert tally.freeze().counters["a_total"]["x",] == Count(3, 100, 190, Exemplar(7, 1, 100))


def test_a_series_born_at_zero_is_never_held() -> None:
    """What was exposed as 0 before needs no second 0."""
    tally = Tally(Counts(), 100, HOLD)
    tally.zero("a_total")
    tally.inc("a_total")
    count = tally.freeze().counters["a_total"][()]
    assert (count.value, count.born) == (1, 100)
    assert not held(count.shown, 100, HOLD)


@pytest.mark.parametrize("by", [-1, math.nan, math.inf])
def test_a_counter_refuses_nan_and_negative_values(by: float) -> None:
    """One NaN or negative increment would spoil the counter for good."""
    with pytest.raises(ValueError, match="a_total"):
        Tally(Counts(), 100, HOLD).inc("a_total", by=by)


def test_an_observation_falls_into_the_bucket_whose_bound_it_does_not_exceed() -> None:
    """Bounds are inclusive; what exceeds all of them falls into +Inf. The exemplar stands in the same bucket."""
    tally = Tally(Counts(), 100, HOLD)
    for id, value in enumerate((1.0, 1.5, 11.0), start=1):
        tally.observe("d", (), value, BOUNDS, exemplar_id=id)
    distribution = tally.freeze().histograms["d"][()]
    assert (distribution.counts, distribution.sum) == ((1, 1, 1), 13.5)
    assert [e and e.job_instance_id for e in distribution.exemplars] == [1, 2, 3]


def test_other_bounds_restart_a_histogram_with_a_new_birth() -> None:
    """Buckets of two kinds cannot be added up; a new `_created` tells so."""
    tally = Tally(Counts(), 100, HOLD)
    tally.observe("d", (), 2, BOUNDS)
    tally = Tally(tally.freeze(), 500, HOLD)
    tally.observe("d", (), 2, (5.0,))
    distribution = tally.freeze().histograms["d"][()]
    assert (distribution.counts, distribution.born, distribution.shown) == ((1, 0), 500, 590)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_histogram_refuses_nan_and_infinite_values(value: float) -> None:
    """A sum that is NaN or infinite never recovers."""
    with pytest.raises(ValueError, match="d: "):
        Tally(Counts(), 100, HOLD).observe("d", (), value, BOUNDS)


def test_F15_a_clock_set_back_hides_nothing() -> None:
    """A series that ends its hold in the far future was seen before the clock was set back: it stays visible."""
    assert held(shown=190, now=100, hold=HOLD)
    assert not held(shown=190, now=10, hold=HOLD)
    assert not held(shown=190, now=math.inf, hold=HOLD)


events = st.lists(
    st.one_of(
        st.tuples(st.just("inc"), st.sampled_from("xyz"), st.integers(0, 5)),
        st.tuples(st.just("observe"), st.sampled_from("xyz"), st.floats(0, 100)),
    ),
    max_size=20,
)


@given(polls=st.lists(events, max_size=6))
def test_counters_never_fall_and_survive_the_state(polls: list[list[tuple[str, str, float]]]) -> None:
    """Over any polls, each series only grows, in the running process and after every round through msgpack."""
    counts = Counts()
    for now, poll in enumerate(polls):
        tally = Tally(counts, now, HOLD)
        for kind, label, value in poll:
            if kind == "inc":
                tally.inc("a_total", (label,), by=value)
            else:
                tally.observe("d", (label,), value, BOUNDS)
        after = tally.freeze()
        for labels, old in counts.counters.get("a_total", {}).items():
            new = after.counters["a_total"][labels]
            assert new.value >= old.value
            assert (new.born, new.shown) == (old.born, old.shown)
        for labels, before in counts.histograms.get("d", {}).items():
            assert all(a >= b for a, b in zip(after.histograms["d"][labels].counts, before.counts, strict=True))
        counts = msgspec.msgpack.decode(msgspec.msgpack.encode(after), type=Counts)
        assert counts == after
