"""What polls with many rows cost, counted in calls and look-ups, so that no slow machine fails."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from types import FrameType
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
from exporter.collectors.job.state import JobState, Tracked, news
from exporter.config.schema import JobConfig, Watch
from exporter.metrics.counts import Tally
from exporter.metrics.family import Counts
from exporter.model import Scope

NOW = 1_795_000_000_000
SCOPE = Scope("biz", "2")
NAME = Raw(b'"nightly"')


class Calls:
    """How many functions were called since `with`: those written in Python, and those of C."""

    def __init__(self) -> None:
        self.python = self.c = 0

    def __enter__(self) -> Calls:
        sys.setprofile(self._count)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)

    def _count(self, frame: FrameType, event: str, argument: object) -> None:
        self.python += event == "call"
        self.c += event == "c_call"


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


def collector(api: Lists, now: list[float], **config: Any) -> JobCollector:
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


async def poll(job: JobCollector, state: JobState | None) -> Observed[JobState]:
    clock = Clock(wall=lambda: NOW / 1000, monotonic=lambda: 0.0)
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
