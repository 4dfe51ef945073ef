"""The pure fold of the JOB collector over generated sequences of polls."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from random import Random
from typing import Any, cast

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import Raw

from exporter.blueking.job import Execution, ExecutionStatus, IpResult, JobApi, Step, TargetResult
from exporter.clock import Clock
from exporter.collectors.base import GAP, TRUNCATED, Observed
from exporter.collectors.job.collector import JobCollector
from exporter.collectors.job.fold import (
    CREATED,
    DURATION,
    EXIT_CODES,
    FINISHED,
    HOST_FAILURES,
    HOST_RESULTS,
    LOST,
    REOPENED,
    STEP_FAILURES,
)
from exporter.collectors.job.state import FORGOTTEN_WITHIN, JobRecords, JobState, known_times, matches, transition
from exporter.config.schema import JobConfig, Watch
from exporter.metrics.counts import Tally
from exporter.metrics.family import Counts, Labels
from exporter.model import JOB_STATUSES, Scope

NOW = 1_795_000_000_000
"""ms: the moment of the baseline."""
LOOKBACK, REOPEN, AGE = 600_000, 3_600_000, 7_200_000
INTERVAL = 30_000


def collector(**changes: Any) -> JobCollector:
    config = JobConfig(
        **{
            "lookback": LOOKBACK / 1000,
            "reopen_window": REOPEN / 1000,
            "max_unfinished_age": AGE / 1000,
            **changes,
        }
    )
    # `observe` asks nobody.
    return JobCollector(Scope("biz", "2"), config, cast(JobApi, None), Clock())


JOB = collector()


def execution(id: int, status: int, end: int | None = None, *, age: int = 60_000, **other: Any) -> Execution:
    """A row; `end` in ms after the baseline, as its creation is `age` ms before it."""
    values: dict[str, Any] = {"task_type": 1, "launch_mode": 2, "plan_id": -1, "name": f"run {id}", **other}
    created = NOW - age
    return Execution(
        id=id,
        status=status,
        raw_name=Raw(msgspec.json.encode(values.pop("name"))),
        create_time=created,
        start_time=created,
        end_time=None if end is None else NOW + end,
        **values,
    )


def records(number: int, rows: Iterable[Execution], **other: Any) -> JobRecords:
    """What the poll of that number brought; number 0 is the baseline."""
    now = NOW + number * INTERVAL
    read = [known_times(row, now) for row in rows]
    odd = tuple(value for _, values in read for value in values)
    return JobRecords(begin=now - LOOKBACK, end=now, now=now, rows={row.id: row for row, _ in read}, odd=odd, **other)


def poll(state: JobState | None, number: int, rows: Iterable[Execution] = (), **other: Any) -> JobState:
    return observed(state, records(number, rows, **other)).state


def observed(state: JobState | None, records: JobRecords, job: JobCollector = JOB) -> Observed[JobState]:
    tally = Tally(state.counts if state else Counts(), records.now / 1000, 90.0, job.families)
    found = job.observe(state, records, tally)
    if state is not None:
        assert job.unchanged(state, records, tally.now) in (None, found.state), "the short way leads elsewhere"
    return found


BASE = poll(None, 0)


def counted(state: JobState, family: str) -> dict[Labels, float]:
    """Counter values that are not 0."""
    series = state.counts.counters.get(family, {})
    return {labels: count.value for labels, count in series.items() if count.value}


def known_ids(state: JobState) -> set[int]:
    """The executions of which something is kept, in any of the three places."""
    places = (state.executions, state.resumable_executions, state.ended_executions)
    known = [id for place in places for id in place]
    assert len(known) == len(set(known)), "an execution is in one place"
    return set(known)


def total(state: JobState, family: str) -> float:
    return sum(counted(state, family).values())


def values(state: JobState) -> dict[tuple[str, Labels, str], float]:
    """Every number that must never fall."""
    counts = state.counts
    found = {(name, labels, ""): c.value for name, series in counts.counters.items() for labels, c in series.items()}
    for name, histograms in counts.histograms.items():
        for labels, one in histograms.items():
            found |= {(name, labels, f"bucket {n}"): float(count) for n, count in enumerate(one.counts)}
            found[name, labels, "sum"] = one.sum
    return found


def status(row: Execution, *steps: Step) -> ExecutionStatus:
    return ExecutionStatus(row.id, row.status, row.end_time, steps)


def script(id: int, status: int, results: Mapping[int, int], *, count: int = 0, end: int = 0) -> Step:
    """A script step whose hosts (by number) ended with these codes; `end` in ms after the baseline."""
    hosts = tuple(
        IpResult(
            bk_host_id=100 + host,
            bk_cloud_id=0,
            ip=f"10.0.0.{host}",
            status=code,
            exit_code=1 if code == 104 else 0,
            end_time=NOW + end,
        )
        for host, code in results.items()
    )
    return Step(id, 1, status, count, NOW + end, hosts)


def container(status: int, exit_code: int | None) -> TargetResult:
    """The result of a target that is no host."""
    return IpResult(bk_host_id=None, status=status, exit_code=exit_code, end_time=NOW)


# What one execution may be seen as, poll after poll.

STAGE = st.one_of(
    st.tuples(st.sampled_from([1, 2, 7, 10, 15]), st.none()),
    st.tuples(st.sampled_from([3, 4, 9, 11]), st.one_of(st.none(), st.sampled_from([1000, 2000, 3000]))),
    st.tuples(st.just(99), st.one_of(st.none(), st.sampled_from([1000, 2000]))),
)
# Per poll and execution: what is seen of it, or that it is not listed.
SIGHTINGS = st.lists(st.lists(st.one_of(st.none(), STAGE), min_size=4, max_size=4), max_size=8)


def rows_of(seen: Sequence[tuple[int, int | None] | None]) -> list[Execution]:
    return [execution(id, stage[0], stage[1]) for id, stage in enumerate(seen, 1) if stage is not None]


class Model:
    """Contract 4.1.1: counted when first seen to have ended, once per (id, end time)."""

    def __init__(self) -> None:
        self.created = self.reopened = 0
        self.finished: Counter[int] = Counter()
        self.known: dict[int, tuple[bool, int | None]] = {}

    def see(self, row: Execution) -> None:
        terminal = JOB_STATUSES[row.status].outcome is not None if row.status != 99 else row.end_time is not None
        if row.id not in self.known:
            self.created += 1
            self.known[row.id] = (False, None)
        ended, end = self.known[row.id]
        if not terminal:
            self.reopened += ended
            self.known[row.id] = (False, None)
        elif not ended:
            self.finished[row.status] += 1
            self.known[row.id] = (True, row.end_time)
        elif end is None:
            self.known[row.id] = (True, row.end_time)
        elif row.end_time not in (None, end):
            self.reopened += 1
            self.finished[row.status] += 1
            self.known[row.id] = (True, row.end_time)


@given(SIGHTINGS)
def test_4_1_1_created_finished_and_reopened_are_the_models(
    sightings: list[list[tuple[int, int | None] | None]],
) -> None:
    """Whatever sequence of statuses, ends and absences is seen, each run is counted once."""
    state, model = BASE, Model()
    for number, seen in enumerate(sightings, 1):
        rows = rows_of(seen)
        state = poll(state, number, rows)
        for row in rows:
            model.see(row)
    by_status: Counter[int] = Counter()
    for (_, _, slug), value in counted(state, FINISHED).items():
        by_status[next((n for n, known in JOB_STATUSES.items() if known.slug == slug), 99)] += int(value)
    assert total(state, CREATED) == model.created
    assert total(state, REOPENED) == model.reopened
    assert by_status == model.finished
    timed = sum(sum(one.counts) for one in state.counts.histograms.get(DURATION, {}).values())
    assert timed <= len(model.known), "only the first end of an id enters the histogram"


@given(SIGHTINGS)
def test_4_1_1_the_same_poll_twice_counts_once(sightings: list[list[tuple[int, int | None] | None]]) -> None:
    """Overlapping windows show the same rows again and again: nothing is added."""
    state = BASE
    for number, seen in enumerate(sightings, 1):
        state = poll(state, number, rows_of(seen))
        assert values(poll(state, number, rows_of(seen))) == values(state)


@given(SIGHTINGS, st.randoms(use_true_random=False))
def test_4_1_4_the_order_of_rows_in_a_poll_means_nothing(
    sightings: list[list[tuple[int, int | None] | None]], rng: Random
) -> None:
    """Rows with the same create_time have no order, so their order must not change the state."""
    one = other = BASE
    for number, seen in enumerate(sightings, 1):
        rows = rows_of(seen)
        one = poll(one, number, rows)
        rng.shuffle(rows)
        other = poll(other, number, rows)
        assert one == other


@pytest.mark.parametrize("number", [0, 1])
def test_4_1_4_of_watched_executions_that_end_at_once_the_order_means_nothing(number: int) -> None:
    """The duration shown is that of the one with the greater id, in a baseline and later."""
    job = collector(watch=[Watch("run", name="run *")])
    before = observed(None, records(0, []), job).state if number else None
    rows = [execution(1, 3, -10_000, age=50_000), execution(2, 3, -10_000, age=20_000)]
    states = [observed(before, records(number, listed), job).state for listed in (rows, rows[::-1])]
    assert states[0] == states[1]
    assert states[0].watched["run"].duration == 10_000


@given(SIGHTINGS)
def test_4_1_6_counters_never_fall(sightings: list[list[tuple[int, int | None] | None]]) -> None:
    """No sequence of polls makes any counter or bucket smaller, and no series vanishes."""
    state = BASE
    for number, seen in enumerate(sightings, 1):
        before = values(state)
        state = poll(state, number, rows_of(seen))
        after = values(state)
        assert before.keys() <= after.keys()
        assert all(after[key] >= value for key, value in before.items())


@given(SIGHTINGS)
def test_4_1_1_a_restart_between_any_two_polls_changes_nothing(
    sightings: list[list[tuple[int, int | None] | None]],
) -> None:
    """The state contains everything: written and read again, counting continues in the same way."""
    going = restarted = BASE
    for number, seen in enumerate(sightings, 1):
        rows = rows_of(seen)
        restarted = msgspec.msgpack.decode(msgspec.msgpack.encode(restarted), type=JobState)
        assert restarted == going
        going, restarted = poll(going, number, rows), poll(restarted, number, rows)


ENDS = st.lists(
    st.tuples(st.sampled_from([3, 4, 9, 11, 14]), st.integers(0, 5000), st.integers(0, LOOKBACK // 2)), max_size=12
)


@given(ENDS, st.randoms(use_true_random=False), st.integers(1, 5))
def test_4_1_1_rows_spread_over_polls_in_any_order_are_counted_as_if_at_once(
    ends: list[tuple[int, int, int]], rng: Random, polls: int
) -> None:
    """Executions that are listed late, early, repeatedly or out of order add up to the same."""
    rows = [execution(id, status, end, age=age) for id, (status, end, age) in enumerate(ends, 1)]
    at_once = poll(BASE, 1, rows)
    spread = BASE
    rest = [*rows, *rng.sample(rows, len(rows) // 2)]
    rng.shuffle(rest)
    for number in range(1, polls + 1):
        spread = poll(spread, number, rest[number - 1 :: polls])
    for family in (CREATED, FINISHED, REOPENED, LOST):
        assert counted(spread, family) == counted(at_once, family)
    assert spread.last_finished == at_once.last_finished
    buckets = [
        {labels: one.counts for labels, one in state.counts.histograms.get(DURATION, {}).items()}
        for state in (spread, at_once)
    ]
    assert buckets[0] == buckets[1]


def test_a_poll_that_finds_nothing_new_is_not_folded() -> None:
    """Unless time alone changes the state: executions leave the window, hosts are forgotten, followed ones get old."""
    empty = records(2, [])
    assert JOB.unchanged(BASE, empty, empty.now / 1000) == observed(BASE, empty).state
    ended = poll(BASE, 1, [execution(7, 3, 10_000)])
    assert JOB.unchanged(ended, empty, empty.now / 1000) == observed(ended, empty).state
    left = records(LOOKBACK // INTERVAL + 2, [])
    assert JOB.unchanged(ended, left, left.now / 1000) == observed(ended, left).state, "forgetting can wait"
    late = records((LOOKBACK + FORGOTTEN_WITHIN) // INTERVAL + 2, [])
    assert JOB.unchanged(ended, late, 0.0) is None
    assert observed(ended, late).state.ended_executions == {}
    row, answer = failing(8, 10_000, script(1, 4, {1: 104}))
    fails = poll(BASE, 1, [row], examined={8: answer})
    fails = msgspec.structs.replace(fails, resumable_executions={})
    assert fails.hosts.streaks
    assert JOB.unchanged(fails, empty, 0.0) is not None
    assert JOB.unchanged(fails, records(50 * 3600_000 // INTERVAL, []), 0.0) is None
    for some in (execution(9, 2), execution(9, 3, 20_000)):
        assert JOB.unchanged(BASE, records(2, [some]), 0.0) is None
    assert JOB.unchanged(poll(BASE, 1, [execution(9, 2)]), empty, 0.0) is None


@given(ENDS, st.integers(0, 400))
def test_the_state_forgets_what_can_no_longer_matter(ends: list[tuple[int, int, int]], number: int) -> None:
    """It keeps what the next poll lists again, what has not ended, and what may run again within reopen_window."""
    rows = [execution(id, status, end, age=age) for id, (status, end, age) in enumerate(ends, 1)]
    running = [execution(1000 + id, 2, age=age) for id, (_, _, age) in enumerate(ends, 1)]
    now = NOW + number * INTERVAL
    new = execution(5000, 3, now - NOW, age=NOW - now)
    state = poll(poll(BASE, 1, rows + running), number, [new], checked=True)
    wanted = {row.id for row in [*rows, new] if row.create_time >= now - LOOKBACK}
    wanted |= {row.id for row in rows if row.status in (4, 9, 11) and now - (row.end_time or 0) < REOPEN}
    wanted |= {row.id for row in running if now - row.create_time <= AGE}
    assert known_ids(state) == wanted
    assert total(state, LOST) == len([row for row in running if now - row.create_time > AGE])
    kept = (state.executions, state.resumable_executions, state.ended_executions)
    assert len(msgspec.msgpack.encode(kept)) <= 100 * len(wanted) + 10


def test_4_1_2_a_baseline_counts_nothing_and_knows_everything() -> None:
    """What had ended stays uncounted, what runs is counted when it ends, what failed is counted when it runs again."""
    done, runs, failed = execution(1, 3, -1000), execution(2, 2, age=AGE - 1000), execution(3, 4, -2000)
    state = poll(None, 0, [done, runs, failed])
    assert {family: total(state, family) for family in (CREATED, FINISHED, REOPENED)} == {
        CREATED: 0,
        FINISHED: 0,
        REOPENED: 0,
    }
    assert state.last_finished == {"success": NOW - 1000, "failure": NOW - 2000}
    state = poll(state, 1, [done, execution(2, 3, 500, age=AGE - 1000), execution(3, 3, 900)])
    assert counted(state, FINISHED) == {("script", "api", "success"): 2}
    assert (total(state, CREATED), total(state, REOPENED)) == (0, 1)
    assert [sum(one.counts) for one in state.counts.histograms[DURATION].values()] == [1]


def test_F18_an_end_time_that_is_filled_in_later_is_the_same_run() -> None:
    """Ended without an end time, then with one: counted once, timed when the time is known."""
    state = poll(BASE, 1, [execution(1, 3)])
    assert total(state, FINISHED) == 1
    assert DURATION not in state.counts.histograms
    state = poll(state, 2, [execution(1, 3, 5000)])
    assert total(state, FINISHED) == 1
    assert [one.sum for one in state.counts.histograms[DURATION].values()] == [65.0]


def test_4_1_9_only_the_first_end_of_an_id_is_a_duration() -> None:
    """A retry keeps the start time, so the time to its end contains the pause; even if the first end was never told."""
    state = poll(poll(poll(BASE, 1, [execution(1, 4, 1000)]), 2, [execution(1, 2)]), 3, [execution(1, 3, 9000)])
    assert [one.sum for one in state.counts.histograms[DURATION].values()] == [61.0]
    untold = poll(poll(poll(BASE, 1, [execution(1, 4)]), 2, [execution(1, 2)]), 3, [execution(1, 3, 9000)])
    assert DURATION not in untold.counts.histograms
    assert (total(untold, FINISHED), total(untold, REOPENED)) == (2, 1)


def test_4_1_9_a_run_between_two_polls_shows_as_its_changed_end() -> None:
    """Another end time of an ended execution is another run, though nobody saw it running."""
    state = poll(poll(BASE, 1, [execution(1, 4, 1000)]), 2, [execution(1, 3, 9000)])
    assert (total(state, FINISHED), total(state, REOPENED)) == (2, 1)


def test_4_1_9_last_finished_never_moves_back() -> None:
    """An older end that becomes known later changes nothing."""
    state = poll(poll(BASE, 1, [execution(1, 3, 9000)]), 2, [execution(2, 3, 1000)])
    assert state.last_finished == {"success": NOW + 9000}


def test_4_1_9_a_success_that_runs_again_as_it_leaves_the_window_is_another_run() -> None:
    """Nothing but three numbers was kept of it; the poll that would forget it sees it running."""
    state = poll(BASE, 1, [execution(1, 3, 1000, age=0)])
    assert state.ended_executions.keys() == {1}
    late = LOOKBACK // INTERVAL + 1
    state = poll(state, late, [execution(1, 2, age=0)])
    assert (total(state, FINISHED), total(state, REOPENED), state.ended_executions) == (1, 1, {})
    state = poll(state, late + 1, [execution(1, 3, late * INTERVAL, age=0)])
    assert (total(state, CREATED), total(state, FINISHED), total(state, REOPENED)) == (1, 2, 1)
    assert [sum(one.counts) for one in state.counts.histograms[DURATION].values()] == [1]


def failing(id: int, end: int, *steps: Step, code: int = 4) -> tuple[Execution, ExecutionStatus]:
    row = execution(id, code, end)
    return row, status(row, *steps)


def test_4_1_9_steps_and_hosts_count_once_per_step_and_attempt() -> None:
    """A retry of the second step counts its results again, and not those of the first step, which did not run again."""
    first = script(71, 6, {1: 104, 2: 9}, end=100)
    row, answer = failing(1, 1000, first, script(72, 4, {1: 9, 2: 104}, end=900))
    state = poll(BASE, 1, [row], examined={1: answer})
    assert (total(state, STEP_FAILURES), total(state, HOST_RESULTS), total(state, HOST_FAILURES)) == (1, 4, 2)
    again, answer = failing(1, 5000, first, script(72, 4, {1: 3, 2: 104}, count=1, end=4900))
    state = poll(state, 2, [again], examined={1: answer})
    assert (total(state, STEP_FAILURES), total(state, HOST_RESULTS), total(state, HOST_FAILURES)) == (2, 6, 3)
    assert {identity: streak.count for identity, streak in state.hosts.streaks.items()} == {"102": 1}


def test_4_1_2_steps_from_before_the_baseline_are_not_counted_with_a_later_run() -> None:
    """A retry of what had failed before the baseline shows its old steps again: they are not counted."""
    state = poll(None, 0, [execution(1, 4, -1000)])
    old, new = script(71, 4, {1: 104}, end=-1500), script(72, 4, {2: 104}, end=4000)
    row, answer = failing(1, 5000, old, new)
    state = poll(state, 1, [row], examined={1: answer})
    assert (total(state, STEP_FAILURES), total(state, HOST_FAILURES)) == (1, 1)


def test_4_1_8_an_old_failure_that_a_long_execution_brings_is_older_than_a_success() -> None:
    """Host 1 failed in an execution that continues for half an hour more, and succeeded elsewhere meanwhile: no streak.

    The success lies beyond lookback by then; it is remembered as long as an execution is open that began before it.
    """
    other = execution(2, 4, 2000)
    state = poll(
        BASE, 1, [execution(1, 2), other], examined={2: status(other, script(81, 4, {1: 9, 3: 104}, end=2000))}
    )
    assert state.hosts.cleared == {"101": (NOW + 2000) / 1000}
    for number in range(2, 60):
        state = poll(state, number, [])
    row, answer = failing(
        1, 60 * INTERVAL, script(71, 6, {1: 104}, end=1000), script(72, 4, {2: 104}, end=60 * INTERVAL)
    )
    state = poll(state, 60, [row], examined={1: answer})
    assert "101" not in state.hosts.streaks
    assert "102" in state.hosts.streaks


def test_4_1_9_a_retry_does_not_bring_back_an_old_failure_of_a_host() -> None:
    """The steps before a retried one are reported again unchanged; a host that recovered since must stay recovered."""
    old = script(71, 6, {1: 104}, end=1000)
    row, answer = failing(1, 2000, old, script(72, 4, {2: 104}, end=2000))
    state = poll(BASE, 1, [row], examined={1: answer})
    good = execution(2, 3, 60_000)
    state = poll(state, 3, [good], examined={2: status(good, script(81, 3, {1: 9}, end=60_000))})
    assert state.hosts.streaks.keys() == {"102"}
    for number in range(4, 60):
        state = poll(state, number, [])
    row, answer = failing(1, 59 * INTERVAL, old, script(72, 4, {2: 104}, count=1, end=59 * INTERVAL))
    state = poll(state, 60, [row], examined={1: answer})
    assert state.hosts.streaks.keys() == {"102"}


def test_4_1_8_the_last_step_of_a_host_decides() -> None:
    """A host that failed in an ignored step and succeeded in the next one is not failing; without a next step it is."""
    row, answer = failing(1, 2000, script(71, 6, {1: 104, 2: 104}, end=1000), script(72, 4, {2: 9, 3: 104}, end=2000))
    state = poll(BASE, 1, [row], examined={1: answer})
    assert state.hosts.streaks.keys() == {"101", "103"}
    assert total(state, HOST_FAILURES) == 3


def test_4_1_8_code_3_neither_fails_nor_clears() -> None:
    """Code 3, already succeeded, belongs to an earlier attempt: it changes no streak, but is a host result."""
    row, answer = failing(1, 1000, script(71, 4, {1: 104, 2: 104}, end=900))
    state = poll(BASE, 1, [row], examined={1: answer})
    row, answer = failing(2, 2000, script(81, 4, {1: 3, 2: 9, 4: 3, 5: 104}, end=1900))
    state = poll(state, 2, [row], examined={2: answer})
    assert state.hosts.streaks.keys() == {"101", "105"}
    assert total(state, HOST_RESULTS) == 6


def test_4_1_8_containers_count_but_do_not_fail() -> None:
    """A container's failure enters the counters; no host fails for it."""
    row = execution(1, 4, 1000)
    step = Step(71, 1, 4, 0, NOW + 900, (container(104, 2),))
    state = poll(BASE, 1, [row], examined={1: status(row, step)})
    assert counted(state, HOST_FAILURES) == {("104", "script_nonzero_exit"): 1}
    assert counted(state, EXIT_CODES) == {("2",): 1}
    assert state.hosts.streaks == {}


def test_4_1_8_a_success_that_only_clears_counts_into_no_counter() -> None:
    """A successful execution that is read because its plan has failing hosts clears hosts and counts nothing."""
    row, answer = failing(1, 1000, script(71, 4, {1: 104}, end=900))
    state = poll(BASE, 1, [row], examined={1: answer})
    before = {family: total(state, family) for family in (STEP_FAILURES, HOST_RESULTS, HOST_FAILURES, EXIT_CODES)}
    good = execution(2, 3, 2000)
    state = poll(state, 2, [good], examined={2: status(good, script(81, 3, {1: 9, 2: 9}, end=1900))})
    assert state.hosts.streaks == {}
    assert {family: total(state, family) for family in before} == before


def test_4_2_exit_codes_are_the_first_64_then_other() -> None:
    """Scripts choose their exit codes: 70 of them make 64 series and `other`, and known ones continue counting."""
    row = execution(1, 4, 1000)
    results = tuple(container(104, code) for code in [*range(1, 71), 1])
    state = poll(BASE, 1, [row], examined={1: status(row, Step(71, 1, 4, 0, NOW, results))})
    shown = counted(state, EXIT_CODES)
    assert len(shown) == 65
    assert (shown["other",], shown["1",]) == (6, 2)


@given(st.integers() | st.integers(-(10**400), 10**400))
def test_F50_a_start_of_any_size_gives_a_duration_or_none(start: int) -> None:
    """Duration and state stay numbers that can be kept, whatever a platform calls the start."""
    job = collector(watch=(Watch("all", name="*"),))
    row = msgspec.structs.replace(execution(1, 3, 1000), start_time=start)
    state = observed(BASE, records(1, [row]), job).state
    measured = [one for one in state.counts.histograms.get(DURATION, {}).values() if one.sum or sum(one.counts)]
    assert len(measured) == (row.create_time - 86_400_000 <= start <= NOW + 1000)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(state), type=JobState) == state


@given(st.lists(st.integers() | st.integers(-(10**60), 10**60), min_size=1, max_size=5))
def test_F50_numbers_of_any_size_count_and_stay_short(numbers: list[int]) -> None:
    """Whatever a platform sends as a code, an end or an id of a host: each target counts once, and no label is longer
    than a real number."""
    row = execution(1, 4, 1000)
    results = tuple(IpResult(bk_host_id=n, ip="10.0.0.1", status=n, exit_code=n, end_time=n) for n in numbers)
    state = poll(BASE, 1, [row], examined={1: status(row, Step(71, 1, 4, 0, NOW, results))})
    failed = [n for n in numbers if n not in (3, 5, 7, 9)]
    assert total(state, HOST_FAILURES) == total(state, EXIT_CODES) == len(failed)
    texts = {labels[0] for family in (HOST_FAILURES, EXIT_CODES) for labels in counted(state, family)}
    texts |= {text for streak in state.hosts.streaks.values() for text in (streak.labels[0], streak.host.bk_host_id)}
    assert all(len(text) <= 20 for text in texts)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(state), type=JobState) == state


def test_4_2_only_script_steps_have_exit_codes() -> None:
    """What a file step carries in that field is no exit code."""
    row = execution(1, 4, 1000)
    step = Step(71, 2, 4, 0, NOW, (container(202, 5),))
    state = poll(BASE, 1, [row], examined={1: status(row, step)})
    assert counted(state, EXIT_CODES) == {}
    assert counted(state, STEP_FAILURES) == {("file",): 1}


def test_F13_an_unknown_status_ends_with_its_end_time() -> None:
    """Status 99 is unfinished without, a failure with an end time, and named each time it is new."""
    seen = observed(BASE, records(1, [execution(1, 99), execution(2, 2)]))
    assert seen.unknown == (("job.status", "99"),)
    state = seen.state
    view = JOB.view(state)
    unfinished = next(f for f in JOB.families if f.name == "blueking_job_executions_unfinished")
    assert unfinished.gauge is not None
    assert unfinished.gauge(view) == {("script", "unknown"): 1.0, ("script", "running"): 1.0}
    seen = observed(state, records(2, [execution(1, 99, 500), execution(2, 99, 500)]))
    assert seen.unknown == (("job.status", "99"),)
    assert counted(seen.state, FINISHED) == {("script", "api", "unknown"): 2}
    assert seen.state.last_finished == {"failure": NOW + 500}
    assert observed(seen.state, records(3, [execution(1, 99, 500), execution(2, 99, 500)])).unknown == ()


def test_F13_an_unknown_failure_code_keeps_its_number() -> None:
    """Code 777 is a failure with reason unknown_code; a script's flood of codes ends in `other`."""
    row = execution(1, 4, 1000)
    results = tuple(container(code, None) for code in range(1000, 1070))
    seen = observed(BASE, records(1, [row], examined={1: status(row, Step(71, 9, 4, 0, NOW, results))}))
    shown = counted(seen.state, HOST_FAILURES)
    assert shown["1000", "unknown_code"] == 1
    assert shown["other", "unknown_code"] == 6
    assert {field for field, _ in seen.unknown} == {"job.host.status", "job.step.type"}


def test_F14_a_negative_duration_is_counted_without_a_duration() -> None:
    """An end before its start, or in a far future, is named and never observed."""
    backwards = execution(1, 3, -61_000)
    far = execution(2, 3, 400 * 86_400_000)
    seen = observed(BASE, records(1, [backwards, far]))
    assert total(seen.state, FINISHED) == 2
    assert DURATION not in seen.state.counts.histograms
    assert [field for field, _ in seen.unknown] == ["job.end_time", "job.end_time"]
    assert seen.state.last_finished == {"success": NOW - 61_000}


def test_lost_is_counted_once_even_while_it_is_still_listed() -> None:
    """An execution that is given up for its age stays given up, also with a lookback that is longer than that age."""
    job = collector(max_unfinished_age=60.0)
    state = observed(None, records(0, []), job).state
    running = execution(1, 2, age=0)
    for number in range(1, 6):
        state = observed(state, records(number, [running]), job).state
    assert (total(state, LOST), total(state, REOPENED), total(state, CREATED)) == (1, 0, 1)
    state = observed(state, records(6, [execution(1, 3, 100_000, age=0)]), job).state
    assert total(state, FINISHED) == 0


def test_what_the_platform_no_longer_knows_is_lost_if_it_had_not_ended() -> None:
    """A tracked execution that vanished counts as lost, a failed one that vanished is only forgotten."""
    state = poll(BASE, 1, [execution(1, 2), execution(2, 4, 100)])
    state = poll(state, 2, [], gone=frozenset({1, 2}))
    assert total(state, LOST) == 1
    assert known_ids(state) == set()


def test_deferred_is_counted_once_when_its_turn_comes() -> None:
    """A flood of failures is examined over several polls: each execution is created at once and finished once."""
    row, answer = failing(1, 1000, script(71, 4, {1: 104}, end=900))
    state = poll(BASE, 1, [row], deferred=frozenset({1}), more=True)
    assert (total(state, CREATED), total(state, FINISHED)) == (1, 0)
    assert transition(state.executions[1], row) == "finished"
    state = poll(state, 2, [row], examined={1: answer})
    assert (total(state, CREATED), total(state, FINISHED), total(state, HOST_FAILURES)) == (1, 1, 1)


def test_deferred_and_run_again_meanwhile_loses_no_run() -> None:
    """If a deferred execution is retried before its turn, the run that ended is counted, as truncated."""
    row = execution(1, 4, 1000)
    state = poll(BASE, 1, [row], deferred=frozenset({1}), more=True)
    running = poll(state, 2, [execution(1, 2)])
    assert (total(running, FINISHED), total(running, REOPENED), total(running, TRUNCATED)) == (1, 1, 1)
    ended = poll(state, 2, [execution(1, 3, 5000)])
    assert (total(ended, FINISHED), total(ended, REOPENED), total(ended, TRUNCATED)) == (2, 1, 1)
    again, answer = failing(1, 5000, script(71, 4, {1: 104}, end=4900))
    runs = list(observed(state, records(2, [again], examined={1: answer})).finished)
    assert [dict(run.failed_hosts) for run in runs] == [{}, {"104": 1}], "nobody read the hosts of the first run"


def test_deferred_is_never_lost() -> None:
    """It has ended, so neither its age nor its absence makes it lost: it is counted, as truncated if it is gone."""
    row = execution(1, 4, -AGE, age=AGE + 1000)
    state = poll(BASE, 1, [row], deferred=frozenset({1}), more=True)
    state = poll(state, 2, [])
    assert total(state, LOST) == 0
    assert state.executions.keys() == {1}
    state = poll(state, 3, [], gone=frozenset({1}))
    assert (total(state, LOST), total(state, FINISHED), total(state, TRUNCATED)) == (0, 1, 1)


def test_gap_and_truncation_are_added_by_the_poll_that_brings_them() -> None:
    """Both are ordinary counters of the state."""
    state = poll(poll(BASE, 1, [], gap=120.5, unreadable=frozenset({NOW, NOW + 1})), 2, [], unexamined=frozenset({1}))
    assert (total(state, GAP), total(state, TRUNCATED)) == (120.5, 3)


def test_4_1_5_born_at_zero_are_exactly_the_named_series() -> None:
    """A baseline without any row has the counters without labels and the nine pairs, and nothing else."""
    born = {name: set(series) for name, series in BASE.counts.counters.items()}
    pairs = {(kind, mode) for kind in ("plan", "script", "file") for mode in ("web", "api", "cron")}
    assert born == {
        CREATED: pairs,
        FINISHED: {(*pair, status) for pair in pairs for status in ("success", "failed")},
        REOPENED: {()},
        LOST: {()},
        HOST_RESULTS: {()},
        GAP: {()},
        TRUNCATED: {()},
    }
    assert BASE.counts.histograms == {}


@pytest.mark.parametrize(
    ("pattern", "name", "fits"),
    [
        ("[prod] nightly", "[prod] nightly", True),
        ("[prod] nightly", "p nightly", False),
        ("[prod]*", "p-another", False),
        ("[prod]*", "[prod] anything\n", True),
        ("[!a]?", "[!a]b", True),
        ("[!a]?", "bb", False),
        ("night?y-*", "nightly-", True),
        ("night?y-*", "nighty-", False),
        ("a]b[c", "a]b[c", True),
        ("Nightly", "nightly", False),
        ("*" * 30 + "x", "a" * 500, False),
    ],
)
def test_4_2_in_a_watched_name_only_star_and_question_mark_are_special(pattern: str, name: str, fits: bool) -> None:
    """Brackets, as in `[prod] nightly`, are themselves."""
    assert matches(Watch("w", name=pattern), -1, name) is fits
