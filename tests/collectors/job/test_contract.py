"""The JOB collector against sections 4.1 and 4.2 of its contract: the daemon, a simulated platform, HTTP between them.

Time is virtual. Every test is named after the point that it holds.
"""

from __future__ import annotations

import asyncio
import math
import re
import sqlite3
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml

from exporter.collectors.job.state import JobState
from exporter.model import Scope
from exporter.simulator.faults import Fault
from exporter.simulator.world import Outcome, StepScript, Target, target
from tests.support.daemon import BIZ, EPOCH, LIST, MEMORY, STATUS, Daemon, Metrics, daemon

pytestmark = pytest.mark.looptime(noop_cycles=2)

A, B, C = target(1), target(2), target(3, 5)
DAY = 86_400.0
PAIRS = {(kind, mode) for kind in ("plan", "script", "file") for mode in ("web", "api", "cron")}


def step(results: Mapping[Target, Outcome] | None = None, duration: float = 3.0, **other: Any) -> StepScript:
    return StepScript(duration=duration, results=results or {A: 9}, **other)


def begin(one: Daemon, results: Mapping[Target, Outcome] | None = None, duration: float = 3.0, **other: Any) -> int:
    """Start an execution of one script step."""
    late = other.pop("settles_late", 0.0)
    return one.world.start(BIZ, **{"steps": [step(results, duration, settles_late=late)], **other})


def past(one: Daemon, seconds: float, **other: Any) -> int:
    """An execution that was created so many seconds ago."""
    return begin(one, create_time=one.ms - int(seconds * 1000), **other)


def finished(page: Metrics, status: str | None = None) -> float:
    return page.total("executions_finished_total", **({"status": status} if status else {}))


def created(page: Metrics) -> float:
    return page.total("executions_created_total")


def failing(page: Metrics) -> dict[str, str]:
    """Failing hosts: id → code."""
    shown = page.by("host_failing_since_timestamp_seconds", "bk_host_id", "code")
    return {labels[0]: labels[1] for labels in shown}


# 1. Exactly once


async def test_4_1_1_each_run_is_counted_once_however_often_it_is_listed(tmp_path: Path) -> None:
    """Twenty polls show the same executions again and again; each is created once and finished once."""
    async with daemon(tmp_path) as one:
        await one.start()
        for number in range(5):
            begin(one, duration=20.0 * number)
        page = await one.poll(20)
        assert (created(page), finished(page, "success")) == (5, 5)
        assert page.by("execution_duration_seconds_count", "task_type") == {("script",): 5}


async def test_F48_a_restart_at_any_point_neither_loses_nor_doubles(tmp_path: Path) -> None:
    """Started, seen, ended and retried around restarts: every count is what happened, and none fell."""
    async with daemon(tmp_path) as one:
        await one.start()
        first = begin(one, {A: 104}, duration=20)
        page = await one.poll()
        before = page
        for _ in range(4):
            await one.restart()
            page = await one.metrics()
            assert _fallen(before, page) == []
            before = page
        page = await one.poll(3)
        assert (created(page), finished(page, "failed")) == (1, 1)
        one.world.retry(first, duration=40)
        await one.restart(down=20)
        await one.restart(down=40)
        page = await one.poll()
        assert (created(page), finished(page), page.get("executions_reopened_total")) == (1, 2, 1)
        assert _fallen(before, page) == []


def _fallen(before: Metrics, after: Metrics) -> list[str]:
    """Counters and buckets of the platform that are smaller than they were, or gone."""
    kept = re.compile(r"blueking_job_.*_(total|bucket|sum|count)$|.*collector_(gap_seconds|truncated)_total$")
    return [
        f"{key}: {value} → {after.samples.get(key)}"
        for key, value in before.samples.items()
        if kept.match(key[0]) and after.samples.get(key, -1.0) < value
    ]


async def test_4_1_1_nothing_is_shown_that_is_not_committed(tmp_path: Path) -> None:
    """When the state cannot be written the page keeps what it had, and the poll failed with reason `state`."""
    async with daemon(tmp_path) as one:
        await one.start()
        assert one.app is not None
        await one.app.store.close()
        begin(one)
        page = await one.poll()
        assert (created(page), finished(page)) == (0, 0)
        assert page.own("success") == 0
        assert page.own("errors_total", reason="state") == 1
        await one.app.store.open()
        page = await one.poll()
        assert (created(page), finished(page), page.own("success")) == (1, 1, 1)


# 2. Baseline


async def test_4_1_2_the_first_poll_registers_and_counts_nothing(tmp_path: Path) -> None:
    """What had ended before the first poll is never counted and never asked for; its end is known."""
    async with daemon(tmp_path) as one:
        for age in (30, 300, 590, 5000):
            past(one, age, results={A: 104})
        await one.start()
        page = await one.poll(3)
        assert (created(page), finished(page), page.get("host_results_total")) == (0, 0, 0)
        assert one.counted_calls()[STATUS] == 0
        assert page.get("last_finished_timestamp_seconds", outcome="failure") == EPOCH - 30 + 3


@pytest.mark.parametrize("api", ["v4", "v3", "esb"])
async def test_4_1_2_what_was_unfinished_is_found_by_status_and_counted_when_it_ends(tmp_path: Path, api: str) -> None:
    """Executions that have been running, waiting or pending for up to a week are found without reading the week."""
    async with daemon(tmp_path, api=api) as one:
        for age in range(3000):
            past(one, 1000 + age * 150)
        past(one, 6.9 * DAY, duration=6.9 * DAY + 100)
        past(one, 3 * DAY, steps=[StepScript(3, 3 * DAY + 100), step({A: 9})], task_type=0)
        past(one, 2 * DAY, pending_for=2 * DAY + 100)
        past(one, 8 * DAY, duration=9 * DAY)
        await one.start()
        page = await one.metrics()
        assert page.by("executions_unfinished", "task_type", "status") == {
            ("script", "running"): 1,
            ("plan", "waiting_user"): 1,
            ("script", "pending"): 1,
        }
        assert page.get("oldest_unfinished_timestamp_seconds", status="running") == pytest.approx(EPOCH - 6.9 * DAY)
        assert one.counted_calls() == {LIST: 11}, "three weeks of history are not read"
        page = await one.poll(8)
        assert (created(page), finished(page, "success")) == (0, 3)
        assert page.by("executions_unfinished", "task_type", "status") == {
            ("script", "running"): 0,
            ("plan", "waiting_user"): 0,
            ("script", "pending"): 0,
        }


async def test_4_1_2_what_had_failed_before_is_counted_when_it_is_retried(tmp_path: Path) -> None:
    """A failure from before the baseline that a user retries: reopened, and finished when it ends again."""
    async with daemon(tmp_path) as one:
        old = past(one, 7200, results={A: 104, B: 9})
        await one.start()
        one.world.retry(old, duration=2, results={A: (104, 7)})
        await asyncio.sleep(900)
        page = await one.poll()
        assert (created(page), finished(page, "failed"), page.get("executions_reopened_total")) == (0, 1, 1)
        assert page.by("host_exit_codes_total", "exit_code") == {("7",): 1}
        assert page.by("execution_duration_seconds_count", "task_type") == {}


# 3. Catch-up


async def test_4_1_3_history_since_the_watermark_is_counted_after_downtime(tmp_path: Path) -> None:
    """A day of downtime with 12,000 executions: read in slices, oldest first, each committed, all of them counted."""
    async with daemon(tmp_path) as one:
        await one.start()
        await one.stop()
        for number in range(12_000):
            begin(one, {A: 104 if number % 100 == 0 else 9}, 1.0, create_time=one.ms + 1000 + number * 7000)
        await asyncio.sleep(DAY)
        await one.start()
        await one.until(lambda: watermark(one) > one.now() - 60)
        page = await one.metrics()
        assert (created(page), finished(page, "success"), finished(page, "failed")) == (12_000, 11_880, 120)
        assert page.get("host_failures_total", code="104", reason="script_nonzero_exit") == 120
        assert page.own("gap_seconds_total") == 0
        history = [call.params for call in one.calls(one.loop.time() - 60, LIST) if "status" not in call.params]
        begins = [int(str(params["create_time_start"])) for params in history]
        assert begins == sorted(begins)
        assert len(set(begins)) >= 3, "a long history is read in slices"


def watermark(one: Daemon) -> float:
    assert one.app is not None
    (poller,) = one.app.process.status().pollers
    # A poll that runs may have committed what it does not show yet.
    if poller.last_success is None or not poller.next_poll:
        return float("-inf")
    return _states(one)[BIZ].watermark or 0.0


def _states(one: Daemon) -> dict[Scope, JobState]:
    """What is committed, read from the file as a crash would leave it."""
    with sqlite3.connect(one.directory / "state.db") as db:
        rows = db.execute("SELECT bk_scope_type, bk_scope_id, payload FROM state WHERE collector = 'job'").fetchall()
    db.close()
    return {Scope(kind, id): msgspec.msgpack.decode(payload, type=JobState) for kind, id, payload in rows}


async def test_4_1_3_what_lies_further_back_than_max_catchup_is_a_gap(tmp_path: Path) -> None:
    """Three hours down with a catch-up of one: two hours are a gap, added once, and the last hour is counted."""
    async with daemon(tmp_path, job={"max_catchup": "1h"}) as one:
        await one.start()
        await one.stop()
        start = one.ms
        for minute in range(1, 180):
            begin(one, duration=1, create_time=start + minute * 60_000 + 30_000)
        await asyncio.sleep(3 * 3600)
        await one.start()
        page = await one.poll(2)
        assert created(page) == finished(page) == 60
        assert page.own("gap_seconds_total") == pytest.approx(7200, abs=1)
        await one.restart()
        assert (await one.poll()).own("gap_seconds_total") == page.own("gap_seconds_total")


async def test_4_1_3_an_execution_that_ran_through_the_downtime_is_counted_when_it_ends(tmp_path: Path) -> None:
    """Tracked before, ended during or after a downtime that is longer than the gap: finished once, created once."""
    async with daemon(tmp_path, job={"max_catchup": "1h"}) as one:
        await one.start()
        begin(one, duration=600)
        begin(one, duration=4 * 3600)
        await one.poll()
        await one.restart(down=3 * 3600)
        page = await one.poll()
        assert (created(page), finished(page)) == (2, 1)
        await asyncio.sleep(3600)
        assert finished(await one.poll()) == 2


async def test_4_1_3_a_restart_in_the_middle_of_a_catch_up_continues_from_its_slice(tmp_path: Path) -> None:
    """The daemon is stopped after the first slice: the next one neither counts it again nor leaves anything out."""
    async with daemon(tmp_path) as one:
        await one.start()
        await one.stop()
        start = one.ms
        for number in range(12_000):
            begin(one, duration=1, create_time=start + 1000 + number * 7000)
        await asyncio.sleep(DAY)
        one.platform.faults.add(Fault("latency", value=0.2))
        starting = asyncio.ensure_future(one.start())
        await one.until(lambda: (_states(one)[BIZ].watermark or 0) > start / 1000 + 3600)
        await starting
        await one.stop()
        half = _states(one)[BIZ].watermark
        assert half is not None
        assert half < one.now() - 3600
        await one.start()
        await one.until(lambda: watermark(one) > one.now() - 60)
        page = await one.metrics()
        assert created(page) == finished(page) == 12_000


@pytest.mark.parametrize("api", ["v4", "v3"])
async def test_4_1_4_windows_longer_than_v3_allows_are_split(tmp_path: Path, api: str) -> None:
    """v3 refuses more than 30 days: unfinished ones of 45 days ago are found, and 50 days of downtime are counted."""
    job = {"max_unfinished_age": "60d", "max_catchup": "60d"}
    async with daemon(tmp_path, api=api, job=job) as one:
        past(one, 45 * DAY, duration=45 * DAY + 3600)
        await one.start()
        assert (await one.metrics()).total("executions_unfinished") == 1
        await one.stop()
        for day in range(50):
            begin(one, duration=1, create_time=one.ms + int(day * DAY * 1000) + 1000)
        await asyncio.sleep(50 * DAY)
        await one.start()
        page = await one.poll()
        assert (created(page), finished(page)) == (50, 51)
        assert (page.own("gap_seconds_total"), page.own("truncated_total")) == (0, 0)


# 4. All or nothing, and no poison


async def test_4_1_4_a_poll_that_fails_half_way_changes_nothing(tmp_path: Path) -> None:
    """The list works, the second of two status calls does not: state and page are as before, then all is counted."""
    async with daemon(tmp_path) as one:
        await one.start()
        begin(one, {A: 104})
        begin(one, {B: 104})
        one.platform.faults.add(Fault("http_503", api=STATUS, every=2))
        assert (await one.poll()).own("success") == 1, "a call is tried three times"
        one.platform.faults.clear()
        begin(one, {A: 104})
        begin(one, {B: 104})
        before = _states(one)
        one.platform.faults.add(Fault("http_503", api=STATUS))
        page = await one.poll()
        assert page.own("success") == 0
        assert (created(page), page.get("host_results_total")) == (2, 2)
        assert _states(one) == before
        one.platform.faults.clear()
        page = await one.poll()
        assert (created(page), finished(page), page.get("host_results_total")) == (4, 4, 4)
        assert page.own("errors_total", reason="http_5xx") == 1


PERMANENT = {
    "permission": "permission",
    "html_200": "decode",
    "gzip_bomb": "too_large",
}


@pytest.mark.parametrize("fault", PERMANENT)
async def test_4_1_4_a_status_call_that_fails_for_good_blocks_nothing(tmp_path: Path, fault: str) -> None:
    """Counted from the list without host results; truncated and the error counted; the poll is a success."""
    async with daemon(tmp_path) as one:
        await one.start()
        one.platform.faults.add(Fault(fault, api=STATUS, value=70 if fault == "gzip_bomb" else None))
        begin(one, {A: 104})
        page = await one.poll()
        assert (finished(page, "failed"), page.get("host_results_total")) == (1, 0)
        assert page.own("success") == 1
        assert page.own("truncated_total") == 1
        assert page.own("errors_total", reason=PERMANENT[fault]) == 1
        assert (await one.poll(2)).own("truncated_total") == 1, "it is not asked for again"


async def test_4_1_4_history_without_permission_is_counted_without_hosts(tmp_path: Path) -> None:
    """view_history is missing, access_business is not: executions are counted, hosts are not, and this is reported."""
    async with daemon(tmp_path, api="v3") as one:
        await one.start()
        one.platform.denied_history.add(BIZ)
        begin(one, {A: 104})
        page = await one.poll()
        assert (finished(page, "failed"), page.own("success")) == (1, 1)
        assert page.own("errors_total", reason="permission") == 1


@pytest.mark.parametrize(
    ("fault", "reason"), [("http_503", "http_5xx"), ("blackhole", "timeout"), ("reset_before", "connect")]
)
async def test_4_1_4_a_status_call_that_fails_for_now_fails_five_polls_at_most(
    tmp_path: Path, fault: str, reason: str
) -> None:
    """The same execution fails its scope five times; the sixth poll counts it without host results."""
    async with daemon(tmp_path, state=MEMORY, job={"interval": "120s"}) as one:
        await one.start()
        one.platform.faults.add(Fault(fault, api=STATUS))
        begin(one, {A: 104})
        for number in range(1, 6):
            page = await one.poll()
            assert page.own("success") == 0
            assert page.own("errors_total", reason=reason) == number
            assert created(page) == 0
        page = await one.poll()
        assert page.own("success") == 1
        assert (created(page), finished(page, "failed"), page.own("truncated_total")) == (1, 1, 1)


async def test_4_1_4_one_outage_of_the_status_api_is_held_against_all_that_wait(tmp_path: Path) -> None:
    """Eight failures do not take eight times five polls: after the fifth, all are counted without host results."""
    async with daemon(tmp_path, state=MEMORY, job={"interval": "120s"}) as one:
        await one.start()
        one.platform.faults.add(Fault("http_503", api=STATUS))
        for number in range(8):
            begin(one, {target(number): 104}, name=f"run {number}")
        assert finished(await one.poll(5)) == 0
        page = await one.poll()
        assert (page.own("success"), finished(page, "failed"), page.own("truncated_total")) == (1, 8, 8)


@pytest.mark.parametrize("fault", [None, "permission"])
async def test_4_1_4_a_flood_of_failures_is_examined_over_several_polls(tmp_path: Path, fault: str | None) -> None:
    """Sixty failures on a platform that takes five seconds per answer: no poll outlasts its deadline, none is lost."""
    async with daemon(tmp_path, state=MEMORY) as one:
        await one.start()
        for number in range(60):
            begin(one, {target(number): 104}, name=f"run {number}")
        one.platform.faults.add(Fault("latency", api=STATUS, value=5))
        if fault:
            one.platform.faults.add(Fault(fault, api=STATUS))
        page = await one.poll()
        assert (page.own("success"), page.own("errors_total", reason="timeout")) == (1, None)
        assert (created(page), finished(page, "failed")) == (60, 60)
        assert page.get("host_results_total") == (0 if fault else 60)
        assert page.own("truncated_total") == (60 if fault else 0)
        assert one.counted_calls()[STATUS] == 60


@pytest.mark.parametrize(
    ("fault", "polls"), [("refused", 0), ("permission", 0), ("html_200", 0), ("http_503", 5), ("blackhole", 5)]
)
async def test_F51_a_success_whose_status_cannot_be_read_blocks_nothing(tmp_path: Path, fault: str, polls: int) -> None:
    """Asked because a host fails for its plan: it is counted at once, or after five polls, and all else of the scope
    with it; truncated says that its hosts are not known."""
    async with daemon(tmp_path, state=MEMORY, job={"interval": "120s"}) as one:
        await one.start()
        begin(one, {A: 104}, plan_id=1_000_001, task_type=0)
        assert set(failing(await one.poll())) == {"101"}
        good = begin(one, {A: 9}, plan_id=1_000_001, task_type=0)
        one.platform.faults.add(Fault(fault, api=STATUS, execution=good))
        begin(one, {B: 104})
        for number in range(1, polls + 1):
            page = await one.poll()
            assert (page.own("success"), finished(page)) == (0, 1), number
        page = await one.poll()
        assert page.own("success") == 1
        assert (finished(page, "success"), finished(page, "failed"), page.own("truncated_total")) == (1, 2, 1)
        assert set(failing(page)) == {"101", "102"}
        mark = one.loop.time()
        page = await one.poll(3)
        assert (page.own("success"), page.own("truncated_total"), one.counted_calls(mark)[STATUS]) == (1, 1, 0)


LOOK_UP = {"refused": "api_error", "html_200": "decode", "permission": "permission", "gzip_bomb": "too_large"}


@pytest.mark.parametrize("fault", LOOK_UP)
async def test_F52_a_look_up_that_is_refused_for_good_blocks_nothing(tmp_path: Path, fault: str) -> None:
    """A running execution beyond lookback that cannot be asked for by its id: polls continue, the refusals are counted
    and become rare, and by its age it is lost."""
    job = {"lookback": "1m", "max_unfinished_age": "2h"}
    async with daemon(tmp_path, state=MEMORY, job=job) as one:
        await one.start()
        running = begin(one, duration=DAY)
        await one.poll()
        value = 70 if fault == "gzip_bomb" else None
        one.platform.faults.add(Fault(fault, api=LIST, execution=running, value=value))
        await asyncio.sleep(120)
        begin(one, {A: 104})
        page = await one.poll()
        assert (page.own("success"), finished(page, "failed")) == (1, 1)
        assert page.own("errors_total", reason=LOOK_UP[fault])
        await asyncio.sleep(3600)
        page = await one.metrics()
        assert (page.own("success"), page.total("executions_unfinished")) == (1, 1)
        assert (page.own("errors_total", reason=LOOK_UP[fault]) or 0) < 25, "asked for at growing distances"
        await asyncio.sleep(3600)
        page = await one.poll()
        assert (page.get("executions_lost_total"), page.total("executions_unfinished")) == (1, 0)
        assert page.own("truncated_total") == 0


@pytest.mark.parametrize("fault", ["http_503", "blackhole"])
async def test_F52_a_look_up_that_fails_for_now_fails_five_polls_at_most(tmp_path: Path, fault: str) -> None:
    """The sixth poll continues without it; when it can be read again, its end is counted."""
    async with daemon(tmp_path, state=MEMORY, job={"lookback": "3m", "interval": "120s"}) as one:
        await one.start()
        running = begin(one, duration=1500)
        await one.poll(2)
        one.platform.faults.add(Fault(fault, api=LIST, execution=running))
        begin(one)
        pages = [await one.poll() for _ in range(8)]
        assert sum(page.own("success") == 0 for page in pages) == 5
        assert (pages[-1].own("success"), finished(pages[-1], "success")) == (1, 1)
        one.platform.faults.clear()
        await asyncio.sleep(1500)
        page = await one.poll()
        assert (finished(page, "success"), page.get("executions_lost_total")) == (2, 0)


async def test_F52_one_call_for_many_that_is_refused_becomes_one_call_each(tmp_path: Path) -> None:
    """Forty running executions share a call. If the platform cannot answer it, each gets its own call."""
    async with daemon(tmp_path, state=MEMORY, job={"lookback": "1m"}) as one:
        await one.start()
        for number in range(40):
            begin(one, duration=300, create_time=one.ms + number)
        await asyncio.sleep(150)
        one.platform.faults.add(Fault("refused", api=LIST, having="status"))
        mark = one.loop.time()
        page = await one.poll()
        assert page.own("success") == 1
        assert one.counted_calls(mark)[LIST] > 40
        await asyncio.sleep(300)
        assert finished(await one.poll(), "success") == 40


@pytest.mark.parametrize("api", ["v4", "v3"])
async def test_4_1_4_pages_that_are_too_large_become_smaller_ones(tmp_path: Path, api: str) -> None:
    """Names so long that no full page fits into `max_response_bytes`: fewer rows are asked for, and all are counted."""
    async with daemon(tmp_path, api=api) as one:
        blueking = yaml.safe_load(one.file.read_text())["blueking"]
        one.change(blueking={**blueking, "max_response_bytes": "64KiB"})
        await one.start()
        for number in range(300):
            begin(one, duration=1, name=f"{number} " + "x" * 500, create_time=one.ms - 5000 + number * 10)
        page = await one.poll(2)
        assert (page.own("success"), created(page), finished(page)) == (1, 300, 300)
        assert page.own("truncated_total") == 0


@pytest.mark.parametrize("api", ["v3", "esb"])
async def test_4_1_4_a_container_on_v3_costs_its_execution_the_host_results(tmp_path: Path, api: str) -> None:
    """1240002 with per-host results: asked again without, so that its steps count; one truncation, one error, no failed
    poll."""
    async with daemon(tmp_path, api=api) as one:
        await one.start()
        begin(one, {Target(container=7): 104, A: 104})
        page = await one.poll()
        assert (finished(page, "failed"), page.get("host_results_total")) == (1, 0)
        assert page.get("step_failures_total", step_type="script") == 1
        assert (page.own("success"), page.own("truncated_total")) == (1, 1)
        assert page.own("errors_total", reason="api_error") == 1
        assert one.counted_calls()[STATUS] == 2


async def test_4_1_4_a_container_on_v4_is_counted(tmp_path: Path) -> None:
    """v4 tells of containers: they count as results and failures, and no host fails."""
    async with daemon(tmp_path) as one:
        await one.start()
        begin(one, {Target(container=7): 104, A: 9})
        page = await one.poll()
        assert page.get("host_results_total") == 2
        assert page.get("host_failures_total", code="104", reason="script_nonzero_exit") == 1
        assert failing(page) == {}


async def test_4_1_4_a_tracked_execution_that_vanishes_is_lost(tmp_path: Path) -> None:
    """Archived while it ran: counted as lost when it is no longer in the window, and no error."""
    async with daemon(tmp_path, job={"lookback": "1m"}) as one:
        await one.start()
        gone = begin(one, duration=5000)
        await one.poll()
        one.world.vanish(gone)
        page = await one.poll(4)
        assert (page.get("executions_lost_total"), page.own("success")) == (1, 1)
        assert page.by("executions_unfinished", "task_type", "status") == {("script", "running"): 0}


async def test_4_1_4_an_execution_that_never_ends_is_lost_by_age(tmp_path: Path) -> None:
    """After max_unfinished_age, counted from its creation, it is given up, once."""
    async with daemon(tmp_path, state=MEMORY, job={"max_unfinished_age": "1h"}) as one:
        await one.start()
        begin(one, duration=100 * DAY)
        await asyncio.sleep(3500)
        assert (await one.poll()).get("executions_lost_total") == 0
        await asyncio.sleep(200)
        page = await one.poll(3)
        assert page.get("executions_lost_total") == 1
        assert page.total("executions_unfinished") == 0


@pytest.mark.parametrize("api", ["v4", "v3"])
async def test_F17_a_burst_in_one_millisecond_is_counted_exactly(tmp_path: Path, api: str) -> None:
    """1,300 executions of one millisecond, in another order at every call, between others."""
    async with daemon(tmp_path, api=api, job={"interval": "60s"}) as one:
        await one.start()
        at = one.ms + 5000
        for _ in range(1300):
            begin(one, duration=1, create_time=at)
        for number in range(300):
            begin(one, duration=1, create_time=at - 150 + number)
        page = await one.poll(2)
        assert created(page) == finished(page) == 1600
        assert page.own("truncated_total") == 0


async def test_F17_an_unreadable_millisecond_is_truncated_once_however_often_it_is_read(tmp_path: Path) -> None:
    """An operator's limit on `start` hides the rest of it, in every poll of the lookback."""
    async with daemon(tmp_path, api="v3", job={"interval": "60s"}) as one:
        one.platform.v3_start_limit = 500
        await one.start()
        at = one.ms + 5000
        for _ in range(1200):
            begin(one, duration=1, create_time=at)
        page = await one.poll(5)
        assert page.own("truncated_total") == 1
        assert created(page) >= 1000


@pytest.mark.parametrize(
    ("api", "fault"), [("v4", "repeated_page"), ("v4", "ignored_time_filter"), ("v3", "wrong_total")]
)
async def test_F16_a_list_that_lies_fails_the_poll_or_changes_nothing(tmp_path: Path, api: str, fault: str) -> None:
    """Whatever the platform does with pages, no execution is counted twice, and when it stops all are counted."""
    async with daemon(tmp_path, api=api) as one:
        await one.start()
        for number in range(450):
            begin(one, duration=1, create_time=one.ms - 5000 + number * 10)
        one.platform.faults.add(Fault(fault, api=LIST))
        page = await one.poll()
        assert created(page) in (0, 450)
        one.platform.faults.clear()
        page = await one.poll()
        assert created(page) == finished(page) == 450
        assert page.own("truncated_total") == 0


@pytest.mark.parametrize("api", ["v4", "v3", "esb"])
async def test_F66_a_row_without_a_usable_id_does_not_block_its_scope(tmp_path: Path, api: str) -> None:
    """The others are counted, poll after poll; the one that cannot be known is truncated and named, once."""
    async with daemon(tmp_path, api=api) as one:
        await one.start()
        begin(one, create_time=one.ms)
        for number in range(3):
            begin(one, {A: 104}, create_time=one.ms - 1000 - number)
        one.platform.faults.add(Fault("huge_id", api=LIST))
        page = await one.poll(4)
        assert (page.own("success"), created(page), finished(page, "failed")) == (1, 3, 3)
        assert page.own("truncated_total") == 1
        assert (
            page.samples["blueking_exporter_unknown_values_total", frozenset({("field", "job.job_instance_id")})] == 1
        )


async def test_4_1_14_rows_of_another_scope_fail_the_poll_and_count_nothing(tmp_path: Path) -> None:
    """A list with executions of another scope is refused as a whole; when it is correct again, all is counted."""
    async with daemon(tmp_path) as one:
        await one.start()
        for _ in range(3):
            begin(one)
        one.platform.faults.add(Fault("other_scope", api=LIST))
        page = await one.poll()
        assert (page.own("success"), page.own("errors_total", reason="decode"), created(page)) == (0, 1, 0)
        one.platform.faults.clear()
        assert created(await one.poll()) == 3


@pytest.mark.parametrize("fault", ["other_id", "other_scope"])
async def test_4_1_14_a_status_answer_about_something_else_is_not_taken(tmp_path: Path, fault: str) -> None:
    """As after any status call that fails for good: counted without host results, truncated, the error counted."""
    async with daemon(tmp_path) as one:
        await one.start()
        one.platform.faults.add(Fault(fault, api=STATUS))
        begin(one, {A: 104})
        page = await one.poll()
        assert (page.own("success"), finished(page, "failed"), page.get("host_results_total")) == (1, 1, 0)
        assert (page.own("truncated_total"), page.own("errors_total", reason="decode")) == (1, 1)
        assert failing(page) == {}


async def test_F49_the_same_executions_in_two_scopes_stay_apart(tmp_path: Path) -> None:
    """Each scope has its own counts and errors: a scope without permission does not affect the other."""
    other = Scope("biz_set", "2")
    async with daemon(tmp_path, scopes=[BIZ, other]) as one:
        await one.start()
        begin(one, {A: 104})
        one.world.start(other, steps=[step({A: 104})])
        one.world.start(other, steps=[step({B: 9})])
        page = await one.poll()
        assert sum(page.by("executions_created_total", "task_type", "launch_mode").values()) == 1
        assert sum(page.by("executions_created_total", "task_type", "launch_mode", scope=other).values()) == 2
        one.platform.denied.add(other)
        begin(one)
        page = await one.poll()
        assert (page.own("success"), page.own("success", scope=other)) == (1, 0)
        assert page.own("errors_total", scope=other, reason="permission") == 1
        assert sum(page.by("executions_created_total", "task_type", "launch_mode").values()) == 2


# 5. Born at zero


async def test_4_1_5_born_at_zero(tmp_path: Path) -> None:
    """After the first complete poll of an idle scope exactly the named series are there, at 0."""
    async with daemon(tmp_path, counter_birth_hold="90s") as one:
        await one.start()
        page = await one.metrics()
        assert page.by("executions_created_total", "task_type", "launch_mode") == dict.fromkeys(PAIRS, 0)
        assert page.by("executions_finished_total", "task_type", "launch_mode", "status") == {
            (*pair, status): 0 for pair in PAIRS for status in ("success", "failed")
        }
        for name in ("executions_reopened_total", "executions_lost_total", "host_results_total"):
            assert page.get(name) == 0
        assert (page.own("gap_seconds_total"), page.own("truncated_total")) == (0, 0)
        names = {name for name, _ in page.samples}
        assert not names & {
            "blueking_job_execution_duration_seconds_count",
            "blueking_job_step_failures_total",
            "blueking_job_host_failures_total",
            "blueking_job_host_exit_codes_total",
            "blueking_exporter_collector_errors_total",
        }


async def test_4_1_5_nothing_is_born_before_the_first_complete_poll(tmp_path: Path) -> None:
    """A scope that has never answered shows no zero."""
    async with daemon(tmp_path) as one:
        one.platform.denied.add(BIZ)
        await one.start()
        page = await one.metrics()
        assert not [name for name, _ in page.samples if name.startswith("blueking_job_exec")]
        assert page.own("success") == 0
        assert page.own("gap_seconds_total") is None


async def test_4_1_5_a_series_is_held_at_zero_and_a_restart_does_not_hold_again(tmp_path: Path) -> None:
    """A first event shows 0 for the hold, then its value; born series show at once; a restart changes neither."""
    async with daemon(tmp_path, counter_birth_hold="300s") as one:
        await one.start()
        begin(one, {A: 104})
        page = await one.poll()
        assert finished(page, "failed") == 1
        assert page.by("host_failures_total", "code") == {("104",): 0}
        assert page.by("execution_duration_seconds_count", "task_type") == {("script",): 0}
        born = one.loop.time()
        await one.restart(down=100)
        assert (await one.metrics()).by("host_failures_total", "code") == {("104",): 0}
        await asyncio.sleep(born + 301 - one.loop.time())
        page = await one.metrics()
        assert page.by("host_failures_total", "code") == {("104",): 1}
        assert page.by("execution_duration_seconds_count", "task_type") == {("script",): 1}
        await one.restart()
        assert (await one.metrics()).by("host_failures_total", "code") == {("104",): 1}


async def test_4_1_5_errors_are_held_too_and_live_with_the_process(tmp_path: Path) -> None:
    """The first error of a reason is 0 for the hold, then 1."""
    async with daemon(tmp_path, counter_birth_hold="60s") as one:
        await one.start()
        one.platform.faults.add(Fault("html_200", times=1))
        page = await one.poll()
        assert page.own("errors_total", reason="decode") == 0
        await asyncio.sleep(60)
        assert (await one.metrics()).own("errors_total", reason="decode") == 1
        await one.restart()
        assert (await one.metrics()).own("errors_total", reason="decode") is None


# 6. Counters never fall


async def test_4_1_6_counters_and_their_birth_survive_restart_and_reload(tmp_path: Path) -> None:
    """Restarts and reloads with other settings: no counter falls, `_created` keeps its time."""
    async with daemon(tmp_path) as one:
        await one.start()
        begin(one, {A: 104})
        await one.poll()
        before = await one.metrics(openmetrics=True)
        births = {
            key: value
            for key, value in before.samples.items()
            if key[0].startswith("blueking_job") and key[0].endswith("_created")
        }
        assert len(births) > 30
        await one.restart(down=1000)
        after = await one.metrics(openmetrics=True)
        assert _fallen(before, after) == []
        assert {key: after.samples[key] for key in births} == births
        one.change(job={"interval": "20s", "lookback": "5m"})
        assert (await one.ask("/-/reload", method="POST"))[0] == 200
        after = await one.metrics(openmetrics=True)
        assert _fallen(before, after) == []
        assert {key: after.samples[key] for key in births} == births


async def test_4_1_6_changed_buckets_restart_only_that_histogram(tmp_path: Path) -> None:
    """New `duration_buckets` begin anew with a new `_created`; everything else counts on."""
    async with daemon(tmp_path) as one:
        await one.start()
        begin(one)
        await one.poll()
        one.change(job={"duration_buckets": [2, 4]})
        await one.ask("/-/reload", method="POST")
        page = await one.poll()
        assert page.by("execution_duration_seconds_bucket", "task_type", "le") == {
            ("script", "2.0"): 0,
            ("script", "4.0"): 0,
            ("script", "+Inf"): 0,
        }, "also where nothing ends any more"
        begin(one)
        await one.poll()
        page = await one.metrics(openmetrics=True)
        assert page.by("execution_duration_seconds_bucket", "task_type", "le") == {
            ("script", "2.0"): 0,
            ("script", "4.0"): 1,
            ("script", "+Inf"): 1,
        }
        assert finished(page) == 2
        assert (page.get("execution_duration_seconds_created", task_type="script") or 0) > EPOCH + 1


# 7. Staleness


async def test_4_1_7_gauges_vanish_when_the_scope_is_stale_and_counters_stay(tmp_path: Path) -> None:
    """Five intervals without a complete poll: gauges of 4.2 leave, counters and all of 4.4 stay; then all is back."""
    async with daemon(tmp_path) as one:
        await one.start()
        begin(one, {A: 104}, duration=1)
        begin(one, duration=10_000)
        page = await one.poll()
        gauges = {
            name
            for name, _ in page.samples
            if name.startswith("blueking_job_") and not name.endswith(("_total", "_bucket", "_sum", "_count", "_info"))
        }
        assert len(gauges) == 6
        kept = {name for name, _ in page.samples} - gauges
        one.platform.faults.add(Fault("html_200"))
        await asyncio.sleep(4.5 * 30)
        assert gauges <= {name for name, _ in (await one.metrics()).samples}
        await asyncio.sleep(30)
        stale = await one.metrics()
        assert gauges & {name for name, _ in stale.samples} == set()
        assert kept <= {name for name, _ in stale.samples}
        assert stale.own("last_success_timestamp_seconds") == page.own("last_success_timestamp_seconds")
        one.platform.faults.clear()
        assert gauges <= {name for name, _ in (await one.poll()).samples}


async def test_4_1_7_after_a_start_counters_are_served_at_once_and_gauges_after_a_poll(tmp_path: Path) -> None:
    """While the platform is down a started daemon shows what it had counted, and no gauge."""
    async with daemon(tmp_path) as one:
        await one.start()
        begin(one, {A: 104})
        page = await one.poll()
        seen = (page.own("last_success_timestamp_seconds"), page.own("watermark_timestamp_seconds"))
        await one.stop()
        one.platform.faults.add(Fault("html_200"))
        await one.start()
        page = await one.metrics()
        assert finished(page, "failed") == 1
        assert page.by("hosts_failing", "code") == {}
        assert (page.own("last_success_timestamp_seconds"), page.own("watermark_timestamp_seconds")) == seen
        one.platform.faults.clear()
        assert (await one.poll()).by("hosts_failing", "code") == {("104",): 1}


async def test_4_1_7_zeros_stay_for_what_was_shown_and_detail_leaves(tmp_path: Path) -> None:
    """`unfinished` and `hosts_failing` go to 0; the detail of a recovered host and oldest_unfinished are absent."""
    async with daemon(tmp_path) as one:
        await one.start()
        begin(one, {A: 104}, duration=1, name="x")
        begin(one, duration=45, name="y")
        await one.poll()
        begin(one, {A: 9}, duration=1, name="x")
        page = await one.poll(2)
        assert page.by("executions_unfinished", "task_type", "status") == {("script", "running"): 0}
        assert page.by("hosts_failing", "code", "reason") == {("104", "script_nonzero_exit"): 0}
        assert page.by("oldest_unfinished_timestamp_seconds", "status") == {}
        assert failing(page) == {}
        assert page.by("host_consecutive_failures", "bk_host_id") == {}


# 8. Failing hosts


async def test_4_1_8_a_streak_has_its_beginning_its_length_and_the_newest_code(tmp_path: Path) -> None:
    """Three executions in a row fail on a host, each with another code; the other host fails once."""
    async with daemon(tmp_path) as one:
        await one.start()
        first = one.now()
        for code in (104, 1, 102):
            begin(one, {A: code, B: 9 if code != 1 else 310}, duration=2)
            page = await one.poll()
        assert page.by("host_consecutive_failures", "bk_cloud_id", "bk_host_id", "ip") == {
            ("0", "101", "10.0.0.1"): 3,
        }
        assert page.by("hosts_failing", "code", "reason") == {
            ("102", "script_timeout"): 1,
            ("104", "script_nonzero_exit"): 0,
            ("1", "agent_abnormal"): 0,
            ("310", "gse_agent_abnormal"): 0,
        }
        since = page.get(
            "host_failing_since_timestamp_seconds",
            bk_cloud_id="0", bk_host_id="101", ip="10.0.0.1", code="102", reason="script_timeout",
        )  # fmt: skip
        assert since == pytest.approx(first + 1, abs=1.1)


async def test_4_1_8_a_success_of_the_same_plan_clears_for_one_call(tmp_path: Path) -> None:
    """Under host_results failed, only successes of a plan or name with failing hosts are asked for, one call each."""
    async with daemon(tmp_path) as one:
        await one.start()
        begin(one, {A: 104, B: 104}, plan_id=1_000_001, task_type=0)
        begin(one, {C: 104}, name="ad-hoc")
        page = await one.poll()
        assert set(failing(page)) == {"101", "102", "103"}
        mark = one.loop.time()
        counted = [page.get("host_results_total"), page.total("host_failures_total")]
        begin(one, {A: 9, C: 9}, plan_id=1_000_002, task_type=0)
        begin(one, {A: 9, C: 9}, name="other")
        page = await one.poll()
        assert one.counted_calls(mark)[STATUS] == 0, "nothing fails for that plan and that name"
        assert set(failing(page)) == {"101", "102", "103"}
        begin(one, {A: 9, C: 3}, plan_id=1_000_001, task_type=0)
        page = await one.poll()
        assert one.counted_calls(mark)[STATUS] == 1
        assert set(failing(page)) == {"102", "103"}, "it clears the hosts that it contains, and code 3 clears none"
        begin(one, {C: 9}, name="ad-hoc")
        page = await one.poll()
        assert one.counted_calls(mark)[STATUS] == 2
        assert set(failing(page)) == {"102"}
        assert [page.get("host_results_total"), page.total("host_failures_total")] == counted
        mark = one.loop.time()
        begin(one, {C: 9}, name="ad-hoc")
        await one.poll()
        assert one.counted_calls(mark)[STATUS] == 0, "no host fails for that name any more"


async def test_4_1_8_a_host_is_forgotten_after_its_ttl(tmp_path: Path) -> None:
    """No newer result for failing_host_ttl after the newest failure: the host is not failing any more."""
    async with daemon(tmp_path, state=MEMORY, job={"failing_host_ttl": "1h"}) as one:
        await one.start()
        begin(one, {A: 104})
        await one.poll()
        await asyncio.sleep(3500)
        assert set(failing(await one.metrics())) == {"101"}
        await asyncio.sleep(160)
        page = await one.metrics()
        assert failing(page) == {}
        assert page.get("hosts_failing", code="104", reason="script_nonzero_exit") == 0


async def test_4_1_8_detail_is_capped_and_the_counts_are_exact(tmp_path: Path) -> None:
    """Forty hosts fail, ten may be shown: the ten that failed first, and forty in the count."""
    async with daemon(tmp_path, job={"max_failing_hosts": 10}) as one:
        await one.start()
        begin(one, {target(number): 104 for number in range(1, 11)})
        await one.poll()
        begin(one, {target(number): 104 for number in range(11, 41)})
        page = await one.poll()
        assert page.get("hosts_failing", code="104", reason="script_nonzero_exit") == 40
        assert set(failing(page)) == {str(100 + number) for number in range(1, 11)}
        assert len(page.by("host_consecutive_failures", "bk_host_id")) == 10


async def test_max_series_bounds_the_whole_page_and_the_cut_is_counted(tmp_path: Path) -> None:
    """The process's own series are part of it; detail gives way, counts and aggregates stay exact."""
    async with daemon(tmp_path, max_series=500) as one:
        await one.start()
        begin(one, {target(number): 104 for number in range(400)})
        page = await one.poll()
        assert len(page.samples) <= 500
        assert page.total("hosts_failing") == 400
        assert 0 < len(failing(page)) < 400
        assert page.total("blueking_exporter_series_dropped_total") >= 800 - 2 * len(failing(page))


async def test_4_1_8_hosts_without_an_id_are_cloud_and_address(tmp_path: Path) -> None:
    """Two clouds, one address, no ids: two hosts, each cleared for itself."""
    here, there = Target(None, "10.9.0.1", 0), Target(None, "10.9.0.1", 4)
    async with daemon(tmp_path, api="v3") as one:
        await one.start()
        begin(one, {here: 104, there: 104})
        page = await one.poll()
        assert page.by("host_consecutive_failures", "bk_cloud_id", "bk_host_id", "ip") == {
            ("0", "", "10.9.0.1"): 1,
            ("4", "", "10.9.0.1"): 1,
        }
        begin(one, {there: 9})
        page = await one.poll()
        assert page.by("host_consecutive_failures", "bk_cloud_id") == {("0",): 1}


async def test_4_1_8_all_and_none(tmp_path: Path) -> None:
    """`all` counts and clears by every finished execution; `none` asks for nothing."""
    async with daemon(tmp_path, job={"host_results": "all"}) as one:
        await one.start()
        begin(one, {A: 104}, name="x")
        await one.poll()
        begin(one, {A: 9}, name="y")
        page = await one.poll()
        assert page.get("host_results_total") == 2
        assert failing(page) == {}
        one.change(job={"host_results": "none"})
        await one.ask("/-/reload", method="POST")
        mark = one.loop.time()
        begin(one, {A: 104}, name="x")
        page = await one.poll()
        assert one.counted_calls(mark)[STATUS] == 0
        assert (finished(page, "failed"), page.get("host_results_total")) == (2, 2)


@pytest.mark.parametrize("api", ["v4", "v3"])
@pytest.mark.parametrize("with_id_first", [True, False])
async def test_F69_a_host_once_with_and_once_without_an_id_is_one_host(
    tmp_path: Path, api: str, with_id_first: bool
) -> None:
    """It fails as one and succeeds as the other: it recovers. Two failures are one streak of one host."""
    first, second = (A, Target(None, A.ip)) if with_id_first else (Target(None, A.ip), A)
    async with daemon(tmp_path, api=api) as one:
        await one.start()
        begin(one, {first: 104, B: 104})
        begin(one, {second: 104}, name="other")
        page = await one.poll()
        assert page.total("hosts_failing") == 2
        assert page.by("host_consecutive_failures", "bk_host_id") == {("101",): 2, ("102",): 1}
        begin(one, {second: 9})
        begin(one, {first: 9}, name="other")
        page = await one.poll()
        assert set(failing(page)) == {"102"}


async def test_F69_in_one_execution_the_last_step_of_a_host_decides_whatever_it_carries(tmp_path: Path) -> None:
    """Failed with its id, succeeded without it in the next step; and the other way round."""
    nameless = {A: Target(None, A.ip), B: Target(None, B.ip)}
    async with daemon(tmp_path) as one:
        await one.start()
        ignored = step({A: 104, nameless[B]: 9}, ignore_error=True)
        begin(one, steps=[ignored, step({nameless[A]: 9, B: 104})])
        page = await one.poll(2)
        assert set(failing(page)) == {"102"}


# An execution that has ended while its steps still run


@pytest.mark.parametrize("settles_late", [40.0, 100.0])
async def test_F70_hosts_of_a_step_that_settles_later_are_counted_then(tmp_path: Path, settles_late: float) -> None:
    """Status 4, step still running with one host done: the execution counts at once, its steps and hosts when the step
    has settled, at most two minutes later; nothing is truncated."""
    async with daemon(tmp_path) as one:
        await one.start()
        begin(one, steps=[step({C: 9}), step({A: 104, B: 104}, settles_late=settles_late)])
        await asyncio.sleep(10)
        page = await one.poll()
        assert (finished(page, "failed"), page.get("host_results_total")) == (1, 1)
        assert page.by("step_failures_total", "step_type") == {}
        assert set(failing(page)) == {"101"}, "what is known of a host is shown"
        page = await one.poll(4)
        assert (finished(page, "failed"), page.get("host_results_total")) == (1, 3)
        assert page.by("step_failures_total", "step_type") == {("script",): 1}
        assert page.by("host_failures_total", "code") == {("104",): 2}
        assert set(failing(page)) == {"101", "102"}
        assert page.own("truncated_total") == 0
        mark = one.loop.time()
        await one.poll(3)
        assert one.counted_calls(mark)[STATUS] == 0


@pytest.mark.parametrize("restarted", [False, True])
async def test_F70_a_step_that_never_settles_is_asked_for_five_more_polls(tmp_path: Path, restarted: bool) -> None:
    """Then what it has told is counted, and truncated says that it was not all."""
    async with daemon(tmp_path) as one:
        await one.start()
        begin(one, {A: 1, B: 104}, settles_late=math.inf)
        page = await one.poll(5)
        assert (finished(page, "failed"), page.get("host_results_total"), page.own("truncated_total")) == (1, 0, 0)
        if restarted:
            await one.restart()
        page = await one.poll(3)
        assert (page.get("host_results_total"), page.own("truncated_total")) == (1, 1)
        assert page.by("host_failures_total", "code") == {("1",): 1}
        assert set(failing(page)) == {"101"}
        assert one.counted_calls()[STATUS] == 6


async def test_F70_a_success_whose_step_settles_later_clears_its_hosts_then(tmp_path: Path) -> None:
    """Asked because a host fails for its name; beyond lookback too."""
    async with daemon(tmp_path, job={"lookback": "30s"}) as one:
        await one.start()
        begin(one, {A: 104, B: 104}, name="x")
        assert set(failing(await one.poll())) == {"101", "102"}
        begin(one, {A: 9, B: 9}, name="x", settles_late=80.0)
        assert set(failing(await one.poll())) == {"102"}
        page = await one.poll(3)
        assert failing(page) == {}
        assert (page.get("host_results_total"), page.own("truncated_total")) == (2, 0)


async def test_F70_what_runs_again_before_it_settles_is_truncated(tmp_path: Path) -> None:
    """The first attempt of the retried step can no longer be read: its hosts are missing, and this is reported."""
    async with daemon(tmp_path) as one:
        await one.start()
        lagging = begin(one, {A: 104, B: 104}, settles_late=math.inf)
        assert finished(await one.poll(), "failed") == 1
        one.world.retry(lagging, duration=1, results={A: 104})
        page = await one.poll(2)
        assert (finished(page, "failed"), page.get("executions_reopened_total")) == (2, 1)
        assert (page.get("host_results_total"), page.own("truncated_total")) == (2, 1)


# 9. Retries


async def test_4_1_9_a_retry_is_another_run_with_no_duration_and_only_new_results(tmp_path: Path) -> None:
    """The failed second step is retried: reopened, finished again, its results again, no other step's, no duration."""
    async with daemon(tmp_path) as one:
        await one.start()
        retried = begin(one, steps=[step({A: 9, B: 9}), step({A: 104, B: 9})], task_type=0)
        page = await one.poll(2)
        assert (page.get("host_results_total"), page.get("step_failures_total", step_type="script")) == (4, 1)
        duration = page.get("execution_duration_seconds_sum", task_type="plan")
        one.world.retry(retried, duration=40, results={A: 104})
        page = await one.poll()
        assert page.get("executions_reopened_total") == 1
        assert page.get("executions_unfinished", task_type="plan", status="running") == 1
        page = await one.poll()
        assert (finished(page, "failed"), page.get("host_results_total")) == (2, 6)
        assert page.get("step_failures_total", step_type="script") == 2
        assert page.by("execution_duration_seconds_count", "task_type") == {("plan",): 1}
        assert page.get("execution_duration_seconds_sum", task_type="plan") == duration
        assert page.by("host_consecutive_failures", "bk_host_id") == {("101",): 1}, "one execution, one failure"


async def test_4_1_9_a_retry_between_two_polls_shows_as_its_changed_end(tmp_path: Path) -> None:
    """Retried and ended before the next poll: reopened and finished once more, and the host has recovered."""
    async with daemon(tmp_path) as one:
        await one.start()
        retried = begin(one, {A: 104})
        await one.poll()
        one.world.retry(retried, duration=1)
        page = await one.poll()
        assert (finished(page, "failed"), finished(page, "success")) == (1, 1)
        assert page.get("executions_reopened_total") == 1
        assert failing(page) == {}


async def test_4_1_9_executions_that_hold_a_failing_host_are_looked_at_every_two_minutes(tmp_path: Path) -> None:
    """Long after lookback, a retry that heals a host is seen within two minutes."""
    async with daemon(tmp_path, state=MEMORY) as one:
        await one.start()
        holder = begin(one, {A: 104})
        await asyncio.sleep(2 * 3600)
        assert set(failing(await one.metrics())) == {"101"}
        one.world.retry(holder, duration=5)
        await asyncio.sleep(126)
        page = await one.metrics()
        assert failing(page) == {}
        assert (page.get("executions_reopened_total"), finished(page, "success")) == (1, 1)


async def test_4_1_9_an_execution_that_holds_a_failing_host_is_looked_at_after_reopen_window_too(
    tmp_path: Path,
) -> None:
    """As long as the host fails: only the other failed executions are given up at the end of the window."""
    async with daemon(tmp_path, state=MEMORY, job={"reopen_window": "1h", "lookback": "2m", "interval": "10s"}) as one:
        await one.start()
        holder = begin(one, {A: 104})
        await asyncio.sleep(5 * 3600)
        assert set(failing(await one.metrics())) == {"101"}
        one.world.retry(holder, duration=5)
        await asyncio.sleep(60)
        page = await one.metrics()
        assert failing(page) == {}
        assert (page.get("executions_reopened_total"), finished(page, "success")) == (1, 1)


@pytest.mark.parametrize("api", ["v4", "v3"])
async def test_4_1_9_a_failed_execution_is_watched_for_a_retry_within_reopen_window(tmp_path: Path, api: str) -> None:
    """A retry of a failure that holds no host is counted within a hundredth of the window; after the window, not."""
    async with daemon(
        tmp_path, state=MEMORY, api=api, job={"reopen_window": "1h", "lookback": "2m", "interval": "10s"}
    ) as one:
        await one.start()
        early, late = (begin(one, {A: 104}, name=name) for name in ("early", "late"))
        await one.poll()
        begin(one, {A: 9}, name="late")
        await asyncio.sleep(3000)
        one.world.retry(early, duration=5)
        await asyncio.sleep(5 + 36 + 10)
        page = await one.metrics()
        assert (page.get("executions_reopened_total"), finished(page, "success")) == (1, 2)
        await asyncio.sleep(600)
        one.world.retry(late, duration=5)
        await asyncio.sleep(120)
        page = await one.metrics()
        assert page.get("executions_reopened_total") == 1


@pytest.mark.parametrize("api", ["v4", "v3", "esb"])
async def test_F67_stopped_and_refused_executions_are_watched_for_another_run(tmp_path: Path, api: str) -> None:
    """Later than lookback they are taken up again and succeed: reopened, finished, and the watched plan is not
    overdue; also what had ended before the baseline. Abandoned and ended by hand are not watched."""
    watch = [{"name": "*", "as": "all"}]
    job = {"reopen_window": "1h", "lookback": "2m", "interval": "10s", "watch": watch}
    async with daemon(tmp_path, state=MEMORY, api=api, job=job) as one:
        old = [past(one, 1800, outcome=status) for status in (11, 13, 8, 14)]
        await one.start()
        new = [begin(one, outcome=status) for status in (11, 13)]
        await asyncio.sleep(1200)
        page = await one.metrics()
        assert (finished(page), page.get("executions_reopened_total")) == (2, 0)
        for number in (*old[:2], *new):
            one.world.retry(number, duration=5)
        ended = one.now() + 5
        await asyncio.sleep(60)
        page = await one.metrics()
        assert page.get("executions_reopened_total") == 4
        assert (finished(page, "success"), finished(page, "stopped"), page.total("executions_unfinished")) == (4, 1, 0)
        ends = page.by("watched_last_finished_timestamp_seconds", "job_name", "outcome")
        assert ends["all", "success"] == pytest.approx(ended, abs=1)
        watching = [call.params["status"] for call in one.calls(600, LIST) if "status" in call.params]
        assert not {"8", "14"} & {str(status) for status in watching}


async def test_F67_steps_of_a_stopped_run_count_when_the_execution_fails_later(tmp_path: Path) -> None:
    """Not those of a run that had been stopped before the baseline."""
    async with daemon(tmp_path) as one:
        steps = [step({A: 9, B: 9}), step({A: 104}, duration=600)]
        old = past(one, 60, steps=steps, task_type=0)
        one.world.stop(old)
        await asyncio.sleep(5)
        await one.start()
        new = begin(one, steps=steps, task_type=0)
        await one.poll()
        one.world.stop(new)
        page = await one.poll()
        assert (finished(page, "stopped"), page.get("host_results_total")) == (1, 0)
        one.world.retry(new, duration=1, results={A: 104}, all_hosts=True)
        assert (await one.poll()).get("host_results_total") == 3
        one.world.retry(old, duration=1, results={A: 104}, all_hosts=True)
        assert (await one.poll()).get("host_results_total") == 4


async def test_4_1_9_a_status_that_changes_with_the_same_end_is_the_same_run(tmp_path: Path) -> None:
    """4 becomes 6 with the same end: counted once, no longer watched for a retry, and nothing new in each poll."""
    async with daemon(tmp_path, job={"watch": [{"name": "*", "as": "all"}]}) as one:
        await one.start()
        ignored = begin(one, {A: 104})
        page = await one.poll()
        end = round(1000 * page.by("last_finished_timestamp_seconds", "outcome")["failure",])
        one.world.set_status(ignored, 6, end_time=end)
        page = await one.poll()
        assert (finished(page), page.get("executions_reopened_total")) == (1, 0)
        ends = page.by("watched_last_finished_timestamp_seconds", "outcome")
        assert ends == {("failure",): end / 1000, ("success",): end / 1000}
        assert _states(one)[BIZ].executions[ignored].status == 6


async def test_4_1_9_abnormal_is_a_failure_and_a_user_ends_an_execution(tmp_path: Path) -> None:
    """Outcomes by status: 9 is a failure with failed step, 8, 11, 13 and 14 are aborted and not asked for."""
    async with daemon(tmp_path) as one:
        await one.start()
        begin(one, steps=[step({A: 9}, status=9)], outcome=9)
        for outcome in (8, 13, 14):
            begin(one, outcome=outcome)
        one.world.stop(begin(one, duration=100))
        page = await one.poll()
        statuses = page.by("executions_finished_total", "status", task_type="script", launch_mode="api")
        assert statuses == {
            **{(status,): 1 for status in ("abnormal", "terminated", "confirm_terminated", "abandoned", "stopped")},
            **{(status,): 0 for status in ("success", "failed")},
        }
        assert page.get("step_failures_total", step_type="script") == 1
        assert one.counted_calls()[STATUS] == 1
        assert set(page.by("last_finished_timestamp_seconds", "outcome")) == {("failure",), ("aborted",)}


# 10. Which clock


@pytest.mark.parametrize("wrong_by", [8 * DAY, -8 * DAY, 400 * DAY])
async def test_F58_one_wrong_date_moves_no_window_and_loses_nothing(tmp_path: Path, wrong_by: float) -> None:
    """One answer days ahead or back: running executions are counted when they end, failing hosts still fail."""
    async with daemon(tmp_path) as one:
        await one.start()
        for number in range(5):
            begin(one, duration=200.0 + number)
        begin(one, {A: 104})
        before = await one.poll(2)
        one.platform.faults.add(Fault("clock_skew", times=1, value=wrong_by))
        page = await one.poll()
        assert _fallen(before, page) == []
        assert page.total("executions_unfinished") == 5
        assert set(failing(page)) == {"101"}
        assert page.own("watermark_timestamp_seconds") == pytest.approx(one.now(), abs=31)
        begin(one)
        page = await one.poll(6)
        assert (created(page), finished(page, "success"), finished(page, "failed")) == (7, 6, 1)
        assert (page.get("executions_lost_total"), page.own("gap_seconds_total")) == (0, 0)


@pytest.mark.parametrize("moved", [DAY, -DAY])
async def test_F58_a_platform_clock_that_really_moves_is_followed(tmp_path: Path, moved: float) -> None:
    """The platform's clock jumps for good: what it creates from then on is counted within two minutes, once."""
    async with daemon(tmp_path) as one:
        await one.start()
        await one.poll()
        one.platform.skew = moved
        at = one.ms + int(moved * 1000)
        for number in range(3):
            one.world.start(BIZ, create_time=at + number, visible_from=one.ms)
        await asyncio.sleep(120)
        page = await one.poll()
        assert created(page) == 3
        assert page.own("watermark_timestamp_seconds") == pytest.approx(one.now() + moved, abs=31)
        assert page.own("gap_seconds_total") == 0
        assert created(await one.poll(3)) == 3


@pytest.mark.parametrize("ahead", [3600.0, -3600.0])
async def test_F15_a_wrong_own_clock_neither_skips_nor_repeats_history(tmp_path: Path, ahead: float) -> None:
    """An hour wrong from the first start on: windows lie in the platform's time, and the skew is shown."""
    async with daemon(tmp_path) as one:
        one.ahead = ahead
        past(one, 60)
        past(one, 60, duration=200)
        await one.start()
        begin(one, {A: 104})
        page = await one.poll(6)
        assert (created(page), finished(page, "success"), finished(page, "failed")) == (1, 1, 1)
        assert page.samples["blueking_exporter_api_clock_skew_seconds", frozenset()] == pytest.approx(ahead, abs=1)
        assert page.own("watermark_timestamp_seconds") == pytest.approx(one.now(), abs=31)
        assert page.own("last_success_timestamp_seconds") == pytest.approx(one.now() + ahead, abs=31)
        await one.restart(down=300)
        begin(one)
        page = await one.poll(2)
        assert (created(page), finished(page)) == (2, 3)
        assert page.own("gap_seconds_total") == 0


@pytest.mark.parametrize("step_by", [3600.0, -3600.0, 30 * DAY])
async def test_F15_the_own_clock_is_stepped_while_running_and_while_down(tmp_path: Path, step_by: float) -> None:
    """The wall clock jumps: intervals, counts, staleness and history continue; what is visible does not vanish."""
    async with daemon(tmp_path, job={"max_catchup": "20m"}, counter_birth_hold="60s") as one:
        await one.start()
        begin(one, {A: 104})
        before = await one.poll(4)
        one.ahead = step_by
        mark = one.loop.time()
        begin(one, {A: 104})
        page = await one.poll(10)
        assert 9 <= one.counted_calls(mark)[LIST] <= 16, "one poll per interval"
        assert _fallen(before, page) == []
        assert (created(page), finished(page, "failed")) == (2, 2)
        assert set(failing(page)) == {"101"}
        await one.stop()
        one.ahead = 0.0
        await asyncio.sleep(300)
        begin(one)
        one.ahead = step_by
        await one.start()
        page = await one.poll(3)
        assert (created(page), finished(page)) == (3, 3)
        assert page.own("gap_seconds_total") == 0, "no history is given up for a wrong own clock"


async def test_F15_a_platform_whose_date_is_behind_its_data_loses_nothing(tmp_path: Path) -> None:
    """The Date header is an hour behind: executions are counted when that clock has reached them, each once."""
    async with daemon(tmp_path, state=MEMORY) as one:
        one.platform.skew = -3600.0
        await one.start()
        for _ in range(3):
            begin(one)
            await one.poll()
        await asyncio.sleep(3700)
        page = await one.poll()
        assert created(page) == finished(page) == 3


@pytest.mark.parametrize("api", ["v4", "v3"])
@pytest.mark.parametrize("ahead", [60.0, 3600.0])
async def test_F15_a_platform_clock_that_is_set_back_loses_and_doubles_nothing(
    tmp_path: Path, api: str, ahead: float
) -> None:
    """The Date header is ahead for some polls and right again: what was created meanwhile counts, each once."""
    async with daemon(tmp_path, api=api, job={"lookback": "30s", "interval": "10s"}) as one:
        await one.start()
        begin(one)
        await one.poll(2)
        one.platform.skew = ahead
        for _ in range(3):
            begin(one)
            await one.poll()
        one.platform.skew = 0.0
        for _ in range(6):
            begin(one)
            await one.poll()
        await one.restart()
        begin(one)
        page = await one.poll(6)
        assert created(page) == finished(page) == 11
        assert page.own("gap_seconds_total") == page.own("truncated_total") == 0


# 11. Times, 12. reused ids


async def test_F68_zero_and_less_are_no_times(tmp_path: Path) -> None:
    """A start of 0 gives no duration and no wait, an end of 0 is none until the real one is there."""
    async with daemon(tmp_path) as one:
        await one.start()
        no_start, late_end, negative = (begin(one, duration=100) for _ in range(3))
        await asyncio.sleep(5)
        one.world.set_status(no_start, 3, start_time=0, end_time=one.ms)
        one.world.set_status(late_end, 4, end_time=0)
        one.world.set_status(negative, 3, start_time=-5, end_time=-1)
        page = await one.poll()
        assert (finished(page, "success"), finished(page, "failed")) == (2, 1)
        assert page.by("execution_duration_seconds_count", "task_type") == {}
        assert set(page.by("last_finished_timestamp_seconds", "outcome")) == {("success",)}
        one.world.set_status(late_end, 4, end_time=one.ms)
        page = await one.poll(2)
        assert (finished(page, "failed"), page.get("executions_reopened_total")) == (1, 0)
        assert page.by("execution_duration_seconds_count", "task_type") == {("script",): 1}
        assert page.get("last_finished_timestamp_seconds", outcome="failure") == pytest.approx(one.now(), abs=70)


@pytest.mark.parametrize("late", [0, None])
async def test_F18_an_end_that_is_written_late_is_found_beyond_lookback_too(tmp_path: Path, late: int | None) -> None:
    """A long execution ends without an end time, which comes a minute later: it gives the duration. One that never
    comes is looked for no longer than five minutes."""
    async with daemon(tmp_path, state=MEMORY, job={"lookback": "1m"}) as one:
        await one.start()
        long, never = (begin(one, duration=1000) for _ in range(2))
        await asyncio.sleep(200)
        for number in (long, never):
            one.world.set_status(number, 3, end_time=late)
        page = await one.poll()
        assert (finished(page, "success"), page.by("execution_duration_seconds_count", "task_type")) == (2, {})
        await asyncio.sleep(60)
        one.world.set_status(long, 3, end_time=one.ms)
        page = await one.poll()
        assert page.get("execution_duration_seconds_sum", task_type="script") == pytest.approx(260, abs=35)
        await asyncio.sleep(300)
        mark = one.loop.time()
        page = await one.poll(3)
        assert (finished(page), one.counted_calls(mark)[LIST]) == (2, 3)


async def test_F68_unusual_times_are_named_and_measure_nothing(tmp_path: Path) -> None:
    """A start 400 days before the creation, a start and an end in the far future: counted, without a duration; what
    has a far end is forgotten as if it had none."""
    job = {"reopen_window": "10m", "lookback": "1m", "watch": [{"name": "*", "as": "all"}]}
    async with daemon(tmp_path, state=MEMORY, job=job) as one:
        await one.start()
        early, far, running = (begin(one, pending_for=1000.0) for _ in range(3))
        await asyncio.sleep(5)
        one.world.set_status(early, 3, start_time=one.ms - int(400 * DAY * 1000), end_time=one.ms)
        one.world.set_status(far, 4, end_time=one.ms + int(400 * DAY * 1000))
        one.world.set_status(running, 2, start_time=one.ms + int(400 * DAY * 1000))
        page = await one.poll(3)
        assert (finished(page, "success"), finished(page, "failed")) == (1, 1)
        assert page.by("execution_duration_seconds_count", "task_type") == {}
        assert page.by("execution_wait_seconds_count", "task_type") == {}
        assert page.by("watched_unfinished_since_timestamp_seconds", "job_name") == {
            ("all",): pytest.approx(one.world.find(BIZ, running).create_time / 1000)  # type: ignore[union-attr]
        }
        odd = {
            dict(labels)["field"]: value for (name, labels), value in page.samples.items()
            if name == "blueking_exporter_unknown_values_total"
        }  # fmt: skip
        assert odd == {"job.start_time": 2, "job.end_time": 1}, "once, not in each poll"
        mark = one.loop.time()
        await asyncio.sleep(1500)
        assert {str(call.params.get("status")) for call in one.calls(mark + 800, LIST)} <= {"None", "2"}


@pytest.mark.parametrize("status", [3, 4, 2])
async def test_F68_a_known_id_with_another_creation_is_another_execution(tmp_path: Path, status: int) -> None:
    """Created and finished by itself, with a duration of its own; the earlier one is lost if it had not ended."""
    async with daemon(tmp_path) as one:
        await one.start()
        first = begin(one, {A: 104 if status == 4 else 9}, duration=1000 if status == 2 else 3)
        await one.poll()
        begin(one, {A: 104, B: 104}, reused_id=first)
        page = await one.poll(2)
        assert (created(page), page.get("executions_reopened_total")) == (2, 0)
        assert finished(page) == (1 if status == 2 else 2)
        assert page.get("executions_lost_total") == (status == 2)
        assert page.get("execution_duration_seconds_count", task_type="script") == finished(page)
        assert page.get("host_results_total") == (3 if status == 4 else 2)
        assert page.by("host_consecutive_failures", "bk_host_id") == {("101",): 1 + (status == 4), ("102",): 1}


# 15. Unknown words


async def test_4_1_15_unknown_words_are_counted_and_named(tmp_path: Path) -> None:
    """Status 99 ends with its end time as a failure; an unknown type and mode are `unknown`; each is named."""
    async with daemon(tmp_path) as one:
        await one.start()
        odd = begin(one, task_type=7, launch_mode=9, duration=1000)
        page = await one.poll()
        assert page.get("executions_created_total", task_type="unknown", launch_mode="unknown") == 1
        one.world.set_status(odd, 99)
        page = await one.poll()
        assert page.get("executions_unfinished", task_type="unknown", status="unknown") == 1
        one.world.set_status(odd, 99, end_time=one.ms)
        page = await one.poll()
        assert page.get("executions_finished_total", task_type="unknown", launch_mode="unknown", status="unknown") == 1
        assert page.get("last_finished_timestamp_seconds", outcome="failure") is not None
        named = {dict(labels)["field"] for name, labels in page.samples if name.endswith("unknown_values_total")}
        assert {"job.status", "job.type", "job.launch_mode"} <= named


async def test_4_1_15_a_negative_duration_is_counted_without_a_duration(tmp_path: Path) -> None:
    """An end before the start: finished, no observation, named."""
    async with daemon(tmp_path) as one:
        await one.start()
        odd = begin(one, duration=1000)
        await asyncio.sleep(5)
        one.world.set_status(odd, 3, end_time=one.ms - 100_000)
        page = await one.poll()
        assert finished(page, "success") == 1
        assert page.by("execution_duration_seconds_count", "task_type") == {}
        assert page.samples["blueking_exporter_unknown_values_total", frozenset({("field", "job.end_time")})] == 1


# 4.2: watch list and exit codes


async def test_4_2_watched_executions_have_their_own_series(tmp_path: Path) -> None:
    """By plan and by name pattern: newest end by outcome, newest first duration, unfinished from 0 on, max age."""
    watch = [{"job_plan_id": 1001}, {"name": "nightly-*", "as": "nightly", "max_age": "26h"}]
    async with daemon(tmp_path, job={"watch": watch}) as one:
        past(one, 300, name="nightly-old")
        await one.start()
        page = await one.metrics()
        assert page.by("watched_unfinished", "job_name") == {("1001",): 0, ("nightly",): 0}
        assert page.by("watched_max_age_seconds", "job_name") == {("nightly",): 26 * 3600}
        assert page.by("watched_last_finished_timestamp_seconds", "job_name", "outcome") == {
            ("nightly", "success"): EPOCH - 297,
        }
        started = one.now()
        begin(one, plan_id=1001, task_type=0, duration=20)
        begin(one, {A: 104}, name="nightly-backup", duration=7)
        begin(one, name="nightly-report", duration=1000)
        begin(one, name="daily", duration=1)
        page = await one.poll(2)
        assert page.by("watched_unfinished", "job_name") == {("1001",): 0, ("nightly",): 1}
        assert page.by("watched_last_duration_seconds", "job_name") == {("1001",): 20, ("nightly",): 7}
        ends = page.by("watched_last_finished_timestamp_seconds", "job_name", "outcome")
        assert ends == {
            ("1001", "success"): pytest.approx(started + 20, abs=0.01),
            ("nightly", "success"): EPOCH - 297,
            ("nightly", "failure"): pytest.approx(started + 7, abs=0.01),
        }


async def test_4_2_the_wait_from_creation_to_start_is_observed_once(tmp_path: Path) -> None:
    """When the start of the first run is known, not at its retry; not for what had begun before the baseline."""
    async with daemon(tmp_path, job={"duration_buckets": [5, 50]}) as one:
        past(one, 30, duration=100)
        past(one, 30, pending_for=40.0, duration=5)
        await one.start()
        waits = begin(one, {A: 104}, pending_for=10.0, duration=600)
        begin(one, outcome=14)
        begin(one, task_type=0, pending_for=90.0, duration=1000)
        page = await one.poll(2)
        assert page.by("execution_wait_seconds_bucket", "task_type", "le") == {
            ("script", "5.0"): 0, ("script", "50.0"): 2, ("script", "+Inf"): 2,
        }  # fmt: skip
        assert page.get("execution_wait_seconds_sum", task_type="script") == pytest.approx(50, abs=0.01)
        await one.restart()
        page = await one.poll(2)
        one.world.retry(waits, duration=1)
        page = await one.poll(2)
        assert page.by("execution_wait_seconds_count", "task_type") == {("script",): 2, ("plan",): 1}
        assert page.get("execution_wait_seconds_sum", task_type="plan") == pytest.approx(90, abs=0.01)


async def test_4_2_a_watched_job_tells_since_when_it_has_not_ended(tmp_path: Path) -> None:
    """The start of the oldest one, before it its creation; absent while none runs."""
    watch = [{"job_plan_id": 1001}, {"name": "nightly-*", "as": "nightly"}]
    async with daemon(tmp_path, job={"watch": watch}) as one:
        await one.start()
        assert (await one.metrics()).by("watched_unfinished_since_timestamp_seconds", "job_name") == {}
        at = one.now()
        begin(one, plan_id=1001, task_type=0, pending_for=45.0, duration=100)
        begin(one, name="nightly-a", pending_for=1.0, duration=70)
        begin(one, name="nightly-b", pending_for=5.0, duration=1000)
        begin(one, name="daily", duration=1000)
        await asyncio.sleep(6)

        async def since(polls: int) -> dict[tuple[str, ...], float]:
            page = await one.poll(polls)
            shown = page.by("watched_unfinished_since_timestamp_seconds", "job_name")
            return {job: round(value - at, 1) for job, value in shown.items()}

        assert await since(1) == {("1001",): 0.0, ("nightly",): 1.0}
        assert await since(1) == {("1001",): 45.0, ("nightly",): 1.0}
        await one.restart()
        await asyncio.sleep(10)
        assert await since(1) == {("1001",): 45.0, ("nightly",): 5.0}
        assert await since(4) == {("nightly",): 5.0}


async def test_4_2_exit_codes_end_in_other_after_64(tmp_path: Path) -> None:
    """Seventy exit codes: the first 64 have a series, the rest is `other`, and that survives a restart."""
    async with daemon(tmp_path) as one:
        await one.start()
        begin(one, {target(number): (104, number) for number in range(1, 61)})
        await one.poll()
        begin(one, {target(number): (104, number) for number in range(61, 71)})
        await one.restart()
        page = await one.poll()
        codes = page.by("host_exit_codes_total", "exit_code")
        assert len(codes) == 65
        assert codes["other",] == 6
        begin(one, {A: (104, 1), B: (104, 9999)})
        page = await one.poll()
        codes = page.by("host_exit_codes_total", "exit_code")
        assert (codes["1",], codes["other",], len(codes)) == (2, 7, 65)


async def test_4_2_exemplars_name_the_execution(tmp_path: Path) -> None:
    """In OpenMetrics a duration and a host failure lead to the execution behind them."""
    async with daemon(tmp_path) as one:
        await one.start()
        failed = begin(one, {A: 104})
        await one.poll()
        text = (await one.metrics(openmetrics=True)).text
        exemplar = f'# {{job_instance_id="{failed}"}}'
        assert [line for line in text.splitlines() if exemplar in line and "duration_seconds_bucket" in line]
        assert [line for line in text.splitlines() if exemplar in line and "host_failures_total" in line]


# What it costs


@pytest.mark.parametrize("api", ["v4", "v3", "esb"])
async def test_economy_an_idle_scope_costs_one_call_per_interval(tmp_path: Path, api: str) -> None:
    """An hour with some successful executions: 120 list calls, nothing else."""
    async with daemon(tmp_path, state=MEMORY, api=api) as one:
        await one.start()
        begin(one, duration=30)
        await one.poll()
        mark = one.loop.time()
        for _ in range(6):
            await asyncio.sleep(600)
            begin(one, duration=30)
        assert one.counted_calls(mark) == {LIST: 120}


async def test_economy_a_failed_execution_costs_one_status_call(tmp_path: Path) -> None:
    """Fifty failures: fifty status calls, however many polls show them."""
    async with daemon(tmp_path) as one:
        await one.start()
        for number in range(50):
            begin(one, {target(number): 104}, name=f"run {number}")
        await one.poll(10)
        assert one.counted_calls()[STATUS] == 50


@pytest.mark.parametrize("api", ["v4", "v3"])
async def test_economy_the_watch_for_retries_costs_one_call_a_hundred_times_per_window(
    tmp_path: Path, api: str
) -> None:
    """Eighty failures without failing hosts: beyond lookback one call shows them all, a hundred times in the window."""
    job = {"reopen_window": "1h", "lookback": "1m", "interval": "10s", "host_results": "none"}
    async with daemon(tmp_path, state=MEMORY, api=api, job=job) as one:
        await one.start()
        for number in range(80):
            begin(one, {A: 104}, create_time=one.ms + number * 100)
        await asyncio.sleep(300)
        mark = one.loop.time()
        await asyncio.sleep(3000)
        watching = [call.params for call in one.calls(mark, LIST) if "status" in call.params]
        # A look falls on the poll before it would be late: 36 s become 30 s with an interval of 10 s.
        assert len(watching) == 100
        assert one.counted_calls(mark) == {LIST: 300 + 100}


async def test_economy_long_running_executions_share_a_call(tmp_path: Path) -> None:
    """Forty executions that run for hours cost one more call per poll, and one is not held against another."""
    async with daemon(tmp_path, state=MEMORY, job={"lookback": "2m"}) as one:
        await one.start()
        for number in range(40):
            begin(one, duration=1800 + number, create_time=one.ms + number * 1000)
        await asyncio.sleep(300)
        mark = one.loop.time()
        await one.poll(20)
        assert one.counted_calls(mark) == {LIST: 40}
        await asyncio.sleep(1800)
        assert finished(await one.metrics(), "success") == 40


async def test_economy_two_polls_never_run_at_once_for_a_scope(tmp_path: Path) -> None:
    """A platform slower than the interval: polls follow one another and never overlap."""
    async with daemon(tmp_path, job={"interval": "5s"}) as one:
        await one.start()
        one.platform.faults.add(Fault("latency", value=12))
        mark = one.loop.time()
        await asyncio.sleep(120)
        times = sorted(call.at for call in one.calls(mark))
        assert len(times) <= 10
        assert all(later - sooner > 11 for sooner, later in pairwise(times))
