"""What polls with many rows cost, counted in calls and look-ups, so that no slow machine fails."""

from __future__ import annotations

import contextlib
from bisect import bisect
from collections.abc import Callable, Iterator
from random import Random
from typing import Any

import msgspec
import pytest
from msgspec import Raw

from exporter.blueking.job import Execution, ExecutionPage
from exporter.blueking.pacing import Deadline
from exporter.clock import Clock
from exporter.collectors.base import Observed
from exporter.collectors.job.collector import JobCollector
from exporter.collectors.job.fold import CREATED, DURATION, FINISHED
from exporter.collectors.job.history import SLICE_ROWS
from exporter.collectors.job.state import JobRecords, JobState, Tracked, news
from exporter.config.schema import JobConfig, Watch
from exporter.errors import ApiError
from exporter.metrics.counts import Tally
from exporter.metrics.family import Counts
from exporter.model import Scope
from tests.support.calls import Calls

NOW = 1_795_000_000_000
SCOPE = Scope("biz", "2")
NAME = Raw(b'"nightly"')


class CountedDict(dict[int, Tracked]):
    """A dict that counts how often all of it is walked through."""

    walks = 0

    def _walked(self, walk: Callable[[], Any]) -> Any:
        self.walks += 1
        return walk()

    def __iter__(self) -> Iterator[int]:
        walked: Iterator[int] = self._walked(super().__iter__)
        return walked

    def keys(self) -> Any:  # of which a set can be made
        return self._walked(super().keys)

    def values(self) -> Any:
        return self._walked(super().values)

    def items(self) -> Any:
        return self._walked(super().items)


class PagedLists:
    """A platform that lists these rows as v4 does, 200 at a time; `seconds` pass with each call. Rows with an id in
    `late` are listed so many seconds after their creation. A call in `failing` fails."""

    page_size, max_offset, max_window, web_url = 200, 10_000, None, ""

    def __init__(self, now: list[float], seconds: float = 0.0) -> None:
        self.now, self.seconds = now, seconds
        self.rows: list[Execution] = []
        self.calls = 0
        self.late: dict[int, float] = {}
        self.failing: Callable[[], bool] = lambda: False

    async def list(
        self, scope: Scope, begin: int, end: int, *, deadline: Deadline, status: int | None = None, offset: int = 0,
        length: int = 200, **ignored: object,
    ) -> ExecutionPage:  # fmt: skip
        self.calls += 1
        self.now[0] += self.seconds
        if deadline.remaining() < 0 or self.failing():
            raise ApiError("timeout", "the platform is slow")
        rows, now = self.rows, self.now[0]
        if self.late:
            rows = [row for row in rows if row.create_time / 1000 + self.late.get(row.id, 0.0) <= now]
        last, first = (bisect(rows, at, key=lambda row: row.create_time) for at in (end, begin - 1))
        shown = [] if status is not None else rows[max(first, last - offset - length) : max(first, last - offset)]
        return ExecutionPage(tuple(reversed(shown)), None)


class Lists:
    """The list call of a platform that has one page for every window; `looks`: the ids and statuses asked for."""

    page_size, max_offset, max_window, web_url = 1_000_000, None, None, ""

    def __init__(self, rows: tuple[Execution, ...] = ()) -> None:
        self.rows = rows
        self.looks: list[int | None] = []

    async def list(
        self, scope: Scope, begin: int, end: int, *, status: int | None = None, job_instance_id: int | None = None,
        **paging: object,
    ) -> ExecutionPage:  # fmt: skip
        if status is not None or job_instance_id is not None:
            self.looks.append(status)
            return ExecutionPage((), None)
        return ExecutionPage(self.rows, None)


def collector(api: Lists | PagedLists, now: list[float], **config: Any) -> JobCollector:
    built: Any = JobCollector
    job: JobCollector = built(SCOPE, JobConfig(**config), api, Clock(wall=lambda: now[0], monotonic=lambda: now[0]))
    return job


def rows(count: int, *, status: int = 3, age: int = 0) -> tuple[Execution, ...]:
    return tuple(
        Execution(
            scope_type="biz", scope_id="2", id=1000 + number, plan_id=number % 7 + 1, raw_name=NAME, launch_mode=1,
            status=status, start_time=NOW - age - 9000, end_time=NOW - age - number % 9000 - 1,
            create_time=NOW - age - 9500, task_type=number % 3,
        )
        for number in range(count)
    )  # fmt: skip


async def poll(job: JobCollector, state: JobState | None, now: list[float] | None = None) -> Observed[JobState]:
    clock = Clock(wall=lambda: NOW / 1000, monotonic=lambda: now[0] if now else 0.0)
    records = await job.fetch(state, Deadline(60.0, clock))
    tally = Tally(state.counts if state else Counts(), NOW / 1000, 0.0, job.families)
    return job.observe(state, records, tally)


async def polled(count: int, **config: Any) -> tuple[Calls, Observed[JobState]]:
    """The calls of a poll in which so many executions are new and have ended well."""
    api, now = Lists(), [NOW / 1000]
    job = collector(api, now, **config)
    state = (await poll(job, None)).state
    api.rows = rows(count)
    with Calls() as calls:
        observed = await poll(job, state)
    assert sum(one.value for one in observed.state.counts.counters[CREATED].values()) == count
    assert sum(one.value for one in observed.state.counts.counters[FINISHED].values()) == count
    assert sum(sum(one.counts) for one in observed.state.counts.histograms[DURATION].values()) == count
    return calls, observed


@pytest.mark.parametrize("host_results", ["failed", "none"])
async def test_new_executions_that_ended_well_cost_no_call_of_a_function_each(host_results: str) -> None:
    """Counting twice as many calls not one more function of Python, and a handful of C's for each of them."""
    await polled(50, host_results=host_results)  # label sets are made once per process
    few, _ = await polled(200, host_results=host_results)
    many, observed = await polled(400, host_results=host_results)
    assert many.python == few.python < 400
    assert (many.c - few.c) / 200 <= 8
    assert len(list(observed.finished)) == 400


async def test_nothing_is_made_of_a_finished_run_that_is_not_logged() -> None:
    """Its name is not decoded, and its record for the log is not made, until somebody reads it."""
    _, observed = await polled(400)
    with Calls() as calls:
        runs = list(observed.finished)
    assert calls.python > 800
    assert {run.name for run in runs} == {"nightly"}


async def test_a_known_execution_costs_one_look_up() -> None:
    """Rows that the window shows again are found by their id, and that is all."""
    _, observed = await polled(400)
    listed = rows(400)
    with Calls() as calls:
        found, odd = news(observed.state, listed, NOW)
    assert (found, odd) == ({}, {})
    assert calls.python <= 3
    assert calls.c <= 405


async def test_what_is_kept_of_an_execution_that_ended_well_is_small() -> None:
    """Its id, three numbers: 50,000 of them are a state of a MiB, where a failed one is kept with its name."""
    _, observed = await polled(50_000)
    assert len(msgspec.msgpack.encode(observed.state)) < 50_000 * 26
    assert not observed.state.executions
    assert len(observed.state.ended_executions) == 50_000


async def test_a_quiet_poll_does_not_look_at_50_000_executions_that_may_run_again() -> None:
    """Between two checks they are not walked through, not copied, and cost no call."""

    async def quiet(count: int) -> tuple[Calls, CountedDict, Lists, JobState]:
        api, now = Lists(), [NOW / 1000]
        job = collector(api, now, host_results="none", max_unfinished_age=7 * 86400.0)
        state = (await poll(job, None)).state
        api.rows = rows(count, status=4, age=3_600_000)
        state = (await poll(job, msgspec.structs.replace(state, begin=NOW - 86_400_000))).state
        api.rows = ()
        assert len(state.resumable_executions) == count
        kept = CountedDict(state.resumable_executions)
        state = msgspec.structs.replace(state, resumable_executions=kept)
        now[0] += 30
        with Calls() as calls:
            after = (await poll(job, state)).state
        assert after.resumable_executions is kept
        assert not api.looks[10:], "nothing was due to be checked"
        return calls, kept, api, after

    few, _, _, _ = await quiet(50)
    many, kept, _, _ = await quiet(50_000)
    assert kept.walks == 0
    assert (many.python, many.c) == (few.python, few.c)


async def test_a_quiet_poll_does_not_look_at_executions_that_have_ended() -> None:
    """However many of them the window holds."""

    async def quiet(count: int) -> Calls:
        _, observed = await polled(count)
        clock = Clock(wall=lambda: NOW / 1000, monotonic=lambda: 0.0)
        job = collector(Lists(), [NOW / 1000 + 30])
        records = await job.fetch(observed.state, Deadline(60.0, clock))
        with Calls() as calls:
            assert job.unchanged(observed.state, records, NOW / 1000 + 30) is not None
        return calls

    few, many = await quiet(50), await quiet(5_000)
    assert (many.python, many.c) == (few.python, few.c)


async def test_watched_names_are_matched_for_new_rows_only() -> None:
    """`watch` reads the names of rows that are counted, not those of known ones."""
    entry = Watch("n", name="night*")
    api, now = Lists(), [NOW / 1000]
    job = collector(api, now, watch=[entry])
    state = (await poll(job, None)).state
    api.rows = rows(100)
    state = (await poll(job, state)).state
    assert state.watched["n"].last_finished == {"success": NOW - 1}
    with Calls() as calls:
        again = (await poll(job, state)).state
    assert again.watched == state.watched
    assert calls.python < 150


def ended_well(id: int, created: int) -> Execution:
    return Execution(
        scope_type="biz", scope_id="2", id=id, plan_id=1, raw_name=NAME, launch_mode=1, status=3, start_time=created,
        end_time=created + 1, create_time=created, task_type=1,
    )  # fmt: skip


async def caught_up(count: int, minutes: float, seconds: float = 0.0) -> tuple[PagedLists, list[JobState], int]:
    """A catch-up with so many executions that ended well, none of them within the first and the last minute: the
    platform, the states that were committed, and how many polls failed."""
    now = [NOW / 1000 - minutes * 60]
    api = PagedLists(now, seconds)
    job = collector(api, now)
    state = (await poll(job, None, now)).state
    begin, api.calls = round(now[0] * 1000), 0
    api.rows = [
        ended_well(1000 + number, begin + 60_000 + round(number * (minutes * 60_000 - 120_000) / count))
        for number in range(count)
    ]
    now[0] = NOW / 1000
    states, failed, more = [state], 0, True
    while more:
        try:
            observed = await poll(job, states[-1], now)
        except ApiError:
            failed += 1
            assert failed < 50, "no progress"
            continue
        states.append(observed.state)
        more = observed.more
    for family in (CREATED, FINISHED):
        assert sum(one.value for one in states[-1].counts.counters[family].values()) == count
    return api, states[1:], failed


@pytest.mark.parametrize("minutes", [9, 360])
async def test_a_catch_up_asks_for_little_more_than_its_pages(minutes: int) -> None:
    """The last page of each slice is not full, and two pages share a row; the first call shows how dense it is."""
    api, states, _ = await caught_up(60_000, minutes)
    assert api.calls <= 1.08 * 60_000 / 200
    assert len(states) <= 60_000 / SLICE_ROWS + 2


async def test_the_commits_of_a_flood_are_a_few_times_its_state() -> None:
    """All that was created within `lookback` is kept, and each slice commits all of it: so slices grow with it."""
    committed = {}
    for count in (50_000, 100_000):
        _, states, _ = await caught_up(count, 9)
        sizes = [len(msgspec.msgpack.encode(state)) for state in states]
        committed[count] = sum(sizes) / sizes[-1]
    assert committed[100_000] < 8
    assert committed[100_000] < 1.5 * committed[50_000]


async def test_only_a_poll_that_moves_begin_looks_for_what_is_to_be_forgotten() -> None:
    """The slices of a flood leave `begin` where it is, and do not walk through what is kept."""
    now = [NOW / 1000]
    job = collector(Lists(), now)
    state = (await poll(job, None)).state

    def walks(begin: int) -> int:
        kept = CountedDict()
        records = JobRecords(begin, NOW, NOW, {row.id: row for row in rows(1)}, more=True)
        job.observe(msgspec.structs.replace(state, ended_executions=kept), records, Tally(Counts(), 0.0, 0.0))
        return kept.walks

    assert walks(state.begin + 1) == walks(state.begin) + 1


async def test_4_1_3_a_slow_platform_is_read_in_shorter_slices() -> None:
    """At five seconds a page a poll of a minute reads 12 pages, not a usual slice: the next one asks for less."""
    api, _, failed = await caught_up(12_000, 360, seconds=5.0)
    assert failed
    assert api.calls <= 3 * 12_000 / 200


async def test_4_1_3_what_is_listed_late_while_a_poll_reads_is_counted_by_the_next_one() -> None:
    """However long the reading takes: `lookback` counts from when it began."""
    now = [NOW / 1000]
    api = PagedLists(now)
    job = collector(api, now, lookback=10.0)
    state = (await poll(job, None, now)).state
    now[0] += 20
    end = round(now[0] * 1000)
    api.rows = [ended_well(1000 + number, end - 5_000 + 20 * number) for number in range(250)]
    late = api.rows[200]
    api.seconds, api.late = 8.0, {late.id: 9.5}
    state = (await poll(job, state, now)).state
    assert late.id not in state.ended_executions, "it was listed after the page in which it belongs"
    api.seconds = 0.0
    state = (await poll(job, state, now)).state
    assert sum(one.value for one in state.counts.counters[CREATED].values()) == 250


@pytest.mark.parametrize("seed", [*range(6), 37, 38, 45, 49])
async def test_4_1_3_a_catch_up_counts_every_execution_once(seed: int) -> None:
    """However dense the history is, whichever calls fail, wherever the process ends or stands still, and although some
    executions are listed minutes late."""
    chance = Random(seed)
    now = [NOW / 1000]
    api = PagedLists(now, seconds=chance.choice([0.0, 0.05, 1.0]))
    count, before, length = chance.choice([500, 9_000, 25_000]), 300_000, chance.choice([60_000, 540_000, 7_200_000])
    bursts = [chance.randrange(before + length) for _ in range(4)]
    times = [
        NOW - before + chance.choice([chance.choice(bursts) + chance.randrange(20_000), chance.randrange(length)])
        for _ in range(count)
    ]
    api.rows = [ended_well(1000 + number, at) for number, at in enumerate(sorted(times))]
    api.late = {row.id: chance.uniform(0.0, 400.0) for row in chance.sample(api.rows, count // 5)}
    job = collector(api, now)
    api.seconds, seconds = 0.0, api.seconds
    state = (await poll(job, None, now)).state
    count -= len(state.executions) + len(state.resumable_executions) + len(state.ended_executions)
    api.seconds, api.failing = seconds, lambda: chance.random() < 0.03
    now[0] += (length + 20_000) / 1000
    polls, end, more = 0, now[0] + 600, True
    while more or now[0] < end:
        polls += 1
        assert polls < 1000, "no progress"
        more = False
        with contextlib.suppress(ApiError):
            observed = await poll(job, state, now)
            state, more = observed.state, observed.more
        if chance.random() < 0.2:
            job = collector(api, now)
            state = msgspec.msgpack.decode(msgspec.msgpack.encode(state), type=JobState)
        now[0] += 900 if chance.random() < 0.05 else 0 if more else 30
    api.seconds, api.failing, more = 0.0, lambda: False, True
    while more:
        observed = await poll(job, state, now)
        state, more = observed.state, observed.more
    state = (await poll(job, state, now)).state
    for family in (CREATED, FINISHED):
        assert sum(one.value for one in state.counts.counters[family].values()) == count
