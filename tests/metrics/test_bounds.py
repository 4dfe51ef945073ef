"""F57, contract 4.1.13: labels whose values the platform chooses have few values, in counters and gauges alike."""

from __future__ import annotations

import sys
from collections.abc import Mapping

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from exporter.exposed import page_families
from exporter.metrics.bounds import MOST_VALUES, OTHER, PLATFORM_CHOSEN, LabelBounds
from exporter.metrics.counts import Tally
from exporter.metrics.family import Count, Counts, Family, Labels
from exporter.metrics.gauges import Gauges

FAILURES = Family("failures_total", "counter", ("job_type", "code"), "", "")
DURATION = Family("duration_seconds", "histogram", ("job_type",), "", "")
FAILING = Family("failing", "gauge", ("job_type", "code"), "", "", sticky=True, gauge=lambda view: view)
SINCE = Family("since", "gauge", ("bk_host_id", "job_type", "code"), "", "", detail=True, gauge=lambda view: view)
STATES = Family("states", "gauge", ("bk_host_id", "status"), "", "", gauge=lambda view: view)
FAMILIES = (FAILURES, DURATION, FAILING)
BUCKETS = (1.0, 10.0)

CLOSED = {
    "bk_cloud_id", "bk_host_id", "ip",  # a host; these series are capped and cut
    "category", "domain", "launch_mode", "outcome", "reason", "status", "step_type", "task_type", "text_zh",  # slugs
    "collector", "job_id", "job_name", "name", "subscription_id",  # the configuration's words
}  # fmt: skip


def count(before: Counts, events: Mapping[Labels, int], room: int = sys.maxsize) -> Counts:
    tally = Tally(before, 100, 0, FAMILIES, room)
    for labels, times in events.items():
        tally.inc(FAILURES.name, labels, times)
    return tally.freeze()


def shown(counts: Counts) -> dict[Labels, float]:
    return {labels: one.value for labels, one in counts.counters.get(FAILURES.name, {}).items()}


def test_F57_every_label_of_the_page_is_bounded_by_somebody() -> None:
    """A label that is new must be declared: chosen by the platform, or by this program or its configuration."""
    labels = {label for family in page_families() for label in family.labels}
    assert labels <= PLATFORM_CHOSEN | CLOSED
    assert not PLATFORM_CHOSEN & CLOSED


def test_F57_a_label_has_64_values_then_other_and_no_event_is_lost() -> None:
    """What was there first continues counting under its own name."""
    counts = count(Counts(), {("install", str(code)): 1 for code in range(1000)})
    counts = count(counts, {("install", str(code)): 1 for code in range(1000)})
    values = shown(counts)
    assert values == {("install", str(code)): 2 for code in range(MOST_VALUES)} | {
        ("install", OTHER): 2 * (1000 - MOST_VALUES)
    }


def test_F57_which_values_are_known_survives_a_restart() -> None:
    """They are part of the state, those that only a gauge has shown too."""
    bounds = LabelBounds({}, room=1000)
    Gauges().read((FAILING,), {("install", str(code)): 1.0 for code in range(MOST_VALUES)}, bounds)
    stored = msgspec.msgpack.encode(Counts(values=bounds.values()))
    counts = count(msgspec.msgpack.decode(stored, type=Counts), {("install", "63"): 1, ("install", "64"): 1})
    assert shown(counts) == {("install", "63"): 1, ("install", OTHER): 1}


def test_F57_what_an_older_build_has_counted_stays_and_nothing_is_added() -> None:
    """Its state has more values than may be, and lists none of them."""
    old = Counts(counters={FAILURES.name: {("install", str(code)): Count(5, 0, 0) for code in range(100)}})
    counts = count(old, {("install", "99"): 1, ("install", "100"): 1})
    assert shown(counts) == {("install", str(code)): 5 for code in range(99)} | {
        ("install", "99"): 6,
        ("install", OTHER): 1,
    }


def test_F57_a_value_that_is_empty_or_other_takes_no_place() -> None:
    """Most collectors have no code at all."""
    counts = count(Counts(), {("install", ""): 1, ("install", OTHER): 1})
    counts = count(counts, {("install", str(code)): 1 for code in range(MOST_VALUES)})
    assert len(shown(counts)) == MOST_VALUES + 2


def test_F57_without_room_new_label_sets_are_other_in_all_that_the_platform_chose() -> None:
    """Known ones continue; a histogram takes the room of all its series."""
    before = count(Counts(), {("install", "1"): 1, ("restart", "2"): 1})
    assert shown(count(before, {("install", "1"): 1, ("install", "2"): 1, ("install", ""): 1}, room=0)) == {
        ("install", "1"): 2,
        ("restart", "2"): 1,
        (OTHER, OTHER): 1,
        (OTHER, ""): 1,
    }
    for room, expected in ((5, ("stop",)), (4, (OTHER,))):
        tally = Tally(before, 100, 0, FAMILIES, room)
        tally.observe(DURATION.name, ("stop",), 3, BUCKETS)
        assert tally.freeze().histograms[DURATION.name].keys() == {expected}
        assert tally.bounds.full == (expected == (OTHER,))


def test_F57_gauges_add_up_what_becomes_other_and_agree_with_counters() -> None:
    """A host is counted once, under the label that the counter of failures has for it."""
    tally = Tally(Counts(), 100, 0, FAMILIES)
    for code in range(100):
        tally.inc(FAILURES.name, ("install", str(code)))
    view = {("install", str(code)): 2.0 for code in range(50, 1000)}
    samples = Gauges().read((FAILING,), view, tally.bounds)[FAILING.name]
    assert samples.keys() <= shown(tally.freeze()).keys()
    assert samples["install", "63"] == 2
    assert sum(samples.values()) == 2 * 950


def test_F57_label_sets_that_stay_at_zero_are_bounded() -> None:
    """A new code in every poll, without end: the sticky gauge keeps 64 of them and `other`."""
    gauges, values = Gauges(), LabelBounds({}, 1000).values()
    for code in range(1000):
        bounds = LabelBounds(values, room=1000)
        samples = gauges.read((FAILING,), {("install", str(code)): 1.0}, bounds)
        gauges.show(samples)
        values = bounds.values()
        assert sum(samples[FAILING.name].values()) == 1
    assert len(samples[FAILING.name]) == MOST_VALUES + 1


def test_F57_detail_takes_no_room_and_keeps_known_values() -> None:
    """Hosts are cut by max_series: only what they say for the first time must wait for room."""
    bounds = LabelBounds({"job_type": ("install",), "code": ("1",)}, room=0)
    view = {("11", "install", "1"): 5.0, ("12", "install", "1"): 7.0}
    assert Gauges().read((SINCE,), view, bounds) == {SINCE.name: view}
    assert not bounds.full
    samples = Gauges().read((SINCE,), view | {("13", "install", "2"): 6.0}, bounds)
    assert samples == {SINCE.name: view | {("13", "install", OTHER): 6.0}}
    assert bounds.full


def test_families_without_such_labels_are_left_alone() -> None:
    """Hosts are many, and are not words."""
    view = {(str(id), "failed"): 1.0 for id in range(1000)}
    bounds = LabelBounds({}, room=0)
    assert Gauges().read((STATES,), view, bounds)[STATES.name] is view
    assert not bounds.full


WORDS = st.sampled_from([str(number) for number in range(90)] + ["", OTHER])
POLLS = st.lists(
    st.tuples(st.dictionaries(st.tuples(WORDS, WORDS), st.integers(1, 9), max_size=90), st.integers(0, 80)), max_size=6
)


@given(POLLS)
def test_F57_any_history_keeps_bounds_sums_and_rises(polls: list[tuple[dict[Labels, int], int]]) -> None:
    """Whatever comes: the sum is exact, no counter falls or vanishes, and only `other` exceeds what there is room
    for."""
    counts, total = Counts(), 0
    for events, room in polls:
        before = shown(counts)
        counts = msgspec.msgpack.decode(msgspec.msgpack.encode(count(counts, events, room)), type=Counts)
        after = shown(counts)
        total += sum(events.values())
        assert sum(after.values()) == total
        assert all(after[labels] >= value for labels, value in before.items())
        added = after.keys() - before.keys()
        assert sum(set(labels) - {"", OTHER} != set() for labels in added) <= room
        for at in (0, 1):
            assert len({labels[at] for labels in after} - {"", OTHER}) <= MOST_VALUES
