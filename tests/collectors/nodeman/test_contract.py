"""NodeMan on /metrics, sentence by sentence (contract 4.1, 4.3, 5), over real HTTP and in virtual time."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from exporter.simulator.nodeman_world import PLANS, REMOVED, Filtered, LegacyHost, Target
from tests.support.daemon import BIZ, EPOCH, Metrics
from tests.support.nodeman import (
    FAILURE,
    FOREIGN,
    HOSTS,
    OTHER,
    failing,
    failures,
    finished,
    nodeman,
    own,
    since,
    watched,
)

pytestmark = pytest.mark.looptime(noop_cycles=5)

INSTALL = ("nodeman_job", "INSTALL_AGENT", "install", "")
CODES = {step.code for steps in PLANS.values() for step in steps}


def instances(metrics: Metrics, name: str = "job_instances", job_type: str = "") -> dict[tuple[str, ...], float]:
    """By status, without zeros; of one job type."""
    shown = metrics.by(nodeman(name), "status", job_type=job_type) if job_type else metrics.by(nodeman(name), "status")
    return {labels: value for labels, value in shown.items() if value}


# Jobs: counted once per run


async def test_a_job_counts_once_per_run_over_retries_and_restarts(tmp_path: Path) -> None:
    """An end is counted once, a retry is a run of its own, and a host once per run; gauges go down while it runs."""
    async with watched(tmp_path, job={}) as daemon:
        await daemon.start()
        job = daemon.failing_on("INSTALL_AGENT", HOSTS[0], HOSTS[1], duration=40)
        await daemon.sleep_until(130)
        for _ in range(2):
            metrics = await daemon.poll(2)
            assert finished(metrics) == {("INSTALL_AGENT", "failed"): 1}
            assert failures(metrics) == {INSTALL: 2}
            assert failing(metrics) == {INSTALL: 2}
            assert instances(metrics) == {("failed",): 2}
            await daemon.restart(down=45)

        daemon.nodeman.retry(job, {HOSTS[0]: "install"}, duration=200)
        metrics = await daemon.poll(3)
        assert metrics.by(nodeman("jobs_unfinished"), "job_type", "status") == {("INSTALL_AGENT", "running"): 1}
        assert instances(metrics) == {("running",): 2}
        assert finished(metrics) == {("INSTALL_AGENT", "failed"): 1}
        assert failing(metrics) == {INSTALL: 2}

        await daemon.restart(down=300)
        metrics = await daemon.poll(2)
        assert finished(metrics) == {("INSTALL_AGENT", "failed"): 1, ("INSTALL_AGENT", "part_failed"): 1}
        assert failures(metrics) == {INSTALL: 3}
        assert failing(metrics) == {INSTALL: 1}
        assert instances(metrics) == {("failed",): 1, ("success",): 1}
        # A label set that was shown stays at 0.
        assert metrics.get(nodeman("jobs_unfinished"), job_type="INSTALL_AGENT", status="running") in (0, None)
        assert metrics.get(nodeman("job_duration_seconds_count"), job_type="INSTALL_AGENT") == 1


async def test_a_retry_of_some_hosts_does_not_count_the_others_again(tmp_path: Path) -> None:
    """A new task over one of two failed hosts: the other one shows its old failure, which is known."""
    async with watched(tmp_path, job={}) as daemon:
        await daemon.start()
        job = daemon.failing_on("INSTALL_AGENT", HOSTS[0], HOSTS[1], duration=40)
        await daemon.sleep_until(130)
        assert failures(await daemon.poll()) == {INSTALL: 2}
        daemon.nodeman.retry(job, {HOSTS[0]: "install"}, only=[HOSTS[0]], duration=60)
        metrics = await daemon.poll()
        assert metrics.get(nodeman("jobs_unfinished"), job_type="INSTALL_AGENT", status="running") == 1
        await daemon.sleep_until(300)
        metrics = await daemon.poll()
        assert finished(metrics) == {("INSTALL_AGENT", "failed"): 2}
        assert failures(metrics) == {INSTALL: 3}
        assert failing(metrics) == {INSTALL: 2}


async def test_retrying_one_node_is_seen_as_a_return(tmp_path: Path) -> None:
    """retry_node leaves no mark on the list: the job of a failing host is looked at, runs again, ends again."""
    async with watched(tmp_path, job={}) as daemon:
        await daemon.start()
        job = daemon.failing_on("INSTALL_AGENT", HOSTS[0], HOSTS[1], duration=40)
        await daemon.sleep_until(130)
        daemon.nodeman.retry_node(job, HOSTS[0], duration=330)
        await daemon.sleep_until(400)
        metrics = await daemon.poll()
        assert metrics.get(nodeman("jobs_unfinished"), job_type="INSTALL_AGENT", status="running") == 1
        await daemon.sleep_until(700)
        metrics = await daemon.poll()
        assert finished(metrics) == {("INSTALL_AGENT", "failed"): 1, ("INSTALL_AGENT", "part_failed"): 1}
        assert failures(metrics) == {INSTALL: 2}, "the other host has not failed again"
        assert failing(metrics) == {INSTALL: 1}
        assert metrics.get(nodeman("job_duration_seconds_count"), job_type="INSTALL_AGENT") == 1


async def test_a_job_is_watched_from_the_end_of_its_newest_run(tmp_path: Path) -> None:
    """The platform keeps the end of the first run; a retry within max_finished_age of the newest one is counted."""
    async with watched(tmp_path, job={"max_finished_age": "10m"}) as daemon:
        await daemon.start()
        job = daemon.failing_on("INSTALL_AGENT", HOSTS[0], duration=40)
        await daemon.sleep_until(500)
        daemon.nodeman.retry(job, {HOSTS[0]: "install"}, duration=200)
        await daemon.sleep_until(1000)
        metrics = await daemon.poll()
        assert finished(metrics) == {("INSTALL_AGENT", "failed"): 2}
        assert instances(metrics) == {("failed",): 1}
        daemon.nodeman.retry(job, duration=20)
        await daemon.sleep_until(1100)
        metrics = await daemon.poll()
        assert finished(metrics) == {("INSTALL_AGENT", "failed"): 2, ("INSTALL_AGENT", "success"): 1}
        await daemon.sleep_until(1800)
        assert instances(await daemon.poll()) == {}


async def test_a_job_that_was_given_up_comes_back_when_it_runs_again(tmp_path: Path) -> None:
    """A retry after max_finished_age shows as unfinished, counts as a run and clears its host."""
    async with watched(tmp_path, job={"max_finished_age": "5m"}) as daemon:
        await daemon.start()
        job = daemon.failing_on("INSTALL_AGENT", HOSTS[0], duration=40)
        await daemon.sleep_until(3000)
        metrics = await daemon.poll()
        assert instances(metrics) == {}
        assert failing(metrics) == {INSTALL: 1}
        daemon.nodeman.retry(job, duration=200)
        await daemon.sleep_until(3100)
        assert sum((await daemon.poll()).by(nodeman("jobs_unfinished"), "status").values()) == 1
        await daemon.sleep_until(3400)
        metrics = await daemon.poll()
        assert finished(metrics) == {("INSTALL_AGENT", "failed"): 1, ("INSTALL_AGENT", "success"): 1}
        assert failing(metrics) == {}


async def test_a_job_that_runs_again_at_the_baseline_gives_no_duration(tmp_path: Path) -> None:
    """It is unfinished and has an end: that of a run that nobody here has seen."""
    async with watched(tmp_path, job={}) as daemon:
        job = daemon.failing_on("INSTALL_AGENT", HOSTS[0], duration=40)
        await daemon.sleep_until(100)
        daemon.nodeman.retry(job, duration=100)
        await daemon.start()
        await daemon.sleep_until(300)
        metrics = await daemon.poll()
        assert finished(metrics) == {("INSTALL_AGENT", "success"): 1}
        assert metrics.get(nodeman("job_duration_seconds_count"), job_type="INSTALL_AGENT") is None


async def test_a_run_between_two_polls_is_counted_by_what_it_leaves(tmp_path: Path) -> None:
    """Seen running, then running in another task and with an end: the first run has ended with failed hosts."""
    async with watched(tmp_path, job={"interval": "120s"}) as daemon:
        await daemon.start()
        hosts = {HOSTS[0]: "install", HOSTS[1]: None}
        job = daemon.nodeman.start_job("INSTALL_AGENT", hosts, duration=150)
        metrics = await daemon.poll()
        assert finished(metrics) == {}
        await daemon.sleep_until(200)
        daemon.nodeman.retry(job, duration=100)
        metrics = await daemon.poll()
        assert finished(metrics) == {("INSTALL_AGENT", "part_failed"): 1}
        metrics = await daemon.poll(2)
        assert finished(metrics) == {("INSTALL_AGENT", "part_failed"): 1, ("INSTALL_AGENT", "success"): 1}
        assert metrics.get(nodeman("job_duration_seconds_count"), job_type="INSTALL_AGENT") == 1


async def test_a_revoked_job_is_counted_once_as_terminated(tmp_path: Path) -> None:
    """TERMINATED is replaced within 30 s by what the hosts say: that is the same run."""
    async with watched(tmp_path, job={"interval": "10s"}) as daemon:
        await daemon.start()
        job = daemon.nodeman.start_job("RESTART_AGENT", {HOSTS[0]: None, HOSTS[1]: None}, duration=300)
        await daemon.sleep_until(51)
        daemon.nodeman.revoke(job)
        metrics = await daemon.poll()
        assert finished(metrics) == {("RESTART_AGENT", "terminated"): 1}
        metrics = await daemon.poll(6)
        assert daemon.nodeman.jobs[job.id].status == "FAILED"
        assert finished(metrics) == {("RESTART_AGENT", "terminated"): 1}
        assert failures(metrics) == {("nodeman_job", "RESTART_AGENT", "other", ""): 2}
        assert metrics.get(nodeman("job_duration_seconds_sum"), job_type="RESTART_AGENT") == 51


async def test_a_revoked_host_is_read_again_until_it_has_ended(tmp_path: Path) -> None:
    """4.3: the record has failed at once, its row says that it runs until its sub-step ends; both hosts are counted."""
    collectors: dict[str, Any] = {"job": {"interval": "10s"}, "subscription": {"subscription_ids": [11]}}
    async with watched(tmp_path, **collectors) as daemon:
        await daemon.start()
        hosts = {HOSTS[0]: "restart", HOSTS[1]: "update_process_status"}
        job = daemon.nodeman.start_job("RESTART_AGENT", hosts, duration=300)
        first = job.subscription.tasks[job.task_ids[0]].records[0]
        first.runs[0].ends, first.runs[0].end = [EPOCH + 30], EPOCH + 30
        await daemon.sleep_until(110)
        daemon.nodeman.revoke(job)
        await daemon.sleep_until(180)
        metrics = await daemon.poll()
        assert sum(failing(metrics, collector="nodeman_job").values()) == 1
        assert sum(failing(metrics, collector="nodeman_subscription").values()) == 1
        begun = daemon.loop.time()
        await daemon.sleep_until(260)
        metrics = await daemon.poll()
        expected = {("RESTART_AGENT", "restart", ""): 1, ("RESTART_AGENT", "other", ""): 1}
        for collector in ("nodeman_job", "nodeman_subscription"):
            of = {(collector, *labels): value for labels, value in expected.items()}
            assert failing(metrics, collector=collector) == of
            assert {labels: n for labels, n in failures(metrics).items() if labels[0] == collector} == of
        # Then it is settled, and only looked at like every job with a failing host.
        assert daemon.asked(begun)["job_details"] >= 1
        begun = daemon.loop.time()
        await daemon.poll(3)
        assert daemon.asked(begun)["job_details"] == 0


async def test_a_job_of_two_businesses_counts_in_both_and_its_hosts_in_their_own(tmp_path: Path) -> None:
    """Each configured business that it touches counts the job; each counts its own hosts."""
    async with watched(tmp_path, scopes=(BIZ, OTHER), job={}) as daemon:
        await daemon.start()
        hosts = {HOSTS[0]: "install", FOREIGN[0]: "get_agent_status", FOREIGN[1]: "get_agent_status"}
        daemon.nodeman.start_job("INSTALL_AGENT", hosts, duration=40)
        await daemon.sleep_until(100)
        metrics = await daemon.poll()
        for scope in (BIZ, OTHER):
            assert finished(metrics, scope) == {("INSTALL_AGENT", "failed"): 1}
        assert failures(metrics) == {INSTALL: 1}
        assert failures(metrics, OTHER) == {("nodeman_job", "INSTALL_AGENT", "get_agent_status", ""): 2}
        assert list(since(metrics)) == [("0", "1", "10.2.0.1")]
        assert list(since(metrics, OTHER)) == [("0", "301", "10.3.0.1"), ("0", "302", "10.3.0.2")]


async def test_the_baseline_counts_nothing_and_knows_which_hosts_fail(tmp_path: Path) -> None:
    """What had ended or failed before is not counted; what is unfinished then is counted when it ends."""
    async with watched(tmp_path, job={}) as daemon:
        daemon.failing_on("INSTALL_AGENT", HOSTS[0], duration=10)
        running = {HOSTS[1]: "add_or_update_hosts", HOSTS[2]: None, HOSTS[3]: "install"}
        daemon.nodeman.start_job("INSTALL_AGENT", running, duration=600)
        await daemon.sleep_until(200)
        await daemon.start()
        metrics = await daemon.metrics()
        assert finished(metrics) == failures(metrics) == {}
        assert metrics.by(nodeman("jobs_unfinished"), "job_type", "status") == {("INSTALL_AGENT", "running"): 1}
        assert metrics.get(nodeman("oldest_unfinished_timestamp_seconds")) == EPOCH
        assert list(since(metrics)) == [("0", "1", "10.2.0.1")]
        await daemon.sleep_until(650)
        metrics = await daemon.poll()
        assert finished(metrics) == {("INSTALL_AGENT", "part_failed"): 1}
        assert failures(metrics) == {("nodeman_job", "INSTALL_AGENT", "add_or_update_hosts", ""): 1, INSTALL: 1}
        assert metrics.get(nodeman("oldest_unfinished_timestamp_seconds")) is None


async def test_a_host_that_failed_before_the_baseline_is_not_counted_when_the_platform_tells_late(
    tmp_path: Path,
) -> None:
    """Statistics are up to 30 s late: a failure from before that shows after the baseline is known, not counted."""
    async with watched(tmp_path, job={}) as daemon:
        hosts = {HOSTS[1]: "add_or_update_hosts", HOSTS[2]: None}
        job = daemon.nodeman.start_job("INSTALL_AGENT", hosts, duration=600)
        # Statistics are stored at 80 and 110; the host fails in between.
        job.subscription.tasks[job.task_ids[0]].records[0].runs[0].end = EPOCH + 90
        job.subscription.tasks[job.task_ids[0]].records[0].runs[0].ends = [EPOCH + 90]
        await daemon.sleep_until(95)
        await daemon.start()
        assert failing(await daemon.metrics()) == {}
        await daemon.sleep_until(650)
        metrics = await daemon.poll()
        assert failures(metrics) == {}
        assert failing(metrics) == {("nodeman_job", "INSTALL_AGENT", "add_or_update_hosts", ""): 1}


async def test_every_host_of_a_job_from_after_the_baseline_is_counted(tmp_path: Path) -> None:
    """4.3: a job that the baseline did not see counts with its failed hosts, even if their ends lie just before it."""
    async with watched(tmp_path, job={}) as daemon:
        await daemon.sleep_until(100)
        await daemon.start()
        assert failing(await daemon.metrics()) == {}
        job = daemon.nodeman.start_job("INSTALL_AGENT", {HOSTS[1]: "install", HOSTS[2]: "install"}, duration=20)
        await daemon.sleep_until(125)
        for record in job.subscription.tasks[job.task_ids[0]].records:
            record.runs[0].end, record.runs[0].ends = EPOCH + 95, [EPOCH + 95]
        await daemon.sleep_until(250)
        metrics = await daemon.poll()
        assert finished(metrics) == {("INSTALL_AGENT", "failed"): 1}
        assert failures(metrics) == failing(metrics)
        assert sum(failures(metrics).values()) == 2


async def test_a_new_series_is_held_at_zero(tmp_path: Path) -> None:
    """Counters and histograms appear as 0 for counter_birth_hold, then with their value; a restart holds no more."""
    async with watched(tmp_path, job={}, counter_birth_hold="90s") as daemon:
        await daemon.start()
        daemon.failing_on("INSTALL_AGENT", HOSTS[0], duration=10)
        await daemon.sleep_until(60)
        metrics = await daemon.poll()
        assert finished(metrics) == {("INSTALL_AGENT", "failed"): 0}
        assert failures(metrics) == {INSTALL: 0}
        assert metrics.get(nodeman("job_duration_seconds_count"), job_type="INSTALL_AGENT") == 0
        assert failing(metrics) == {INSTALL: 1}
        await daemon.sleep_until(200)
        await daemon.restart()
        metrics = await daemon.metrics()
        assert finished(metrics) == {("INSTALL_AGENT", "failed"): 1}
        assert failures(metrics) == {INSTALL: 1}
        assert metrics.get(nodeman("job_duration_seconds_count"), job_type="INSTALL_AGENT") == 1


async def test_filtered_hosts_and_unusual_statistics(tmp_path: Path) -> None:
    """Filtered hosts are no results; `{}` counts nothing; `other` is what the total has beyond the five."""
    async with watched(tmp_path, job={}) as daemon:
        await daemon.start()
        filtered = [Filtered(HOSTS[5], "该主机已安装"), Filtered(HOSTS[6], "x", "IGNORED")]
        job = daemon.nodeman.start_job("INSTALL_AGENT", {HOSTS[0]: "install"}, duration=20, filtered=filtered)
        daemon.nodeman.start_job("MAIN_STOP_PLUGIN", {HOSTS[1]: None}, err_msg="no plan")
        daemon.nodeman.start_job("RESTART_AGENT", {HOSTS[2]: None, HOSTS[3]: REMOVED}, duration=20)
        daemon.nodeman.start_job("UPGRADE_AGENT", {}, bk_biz_scope=[2])
        await daemon.sleep_until(100)
        metrics = await daemon.poll()
        assert failures(metrics) == {INSTALL: 1}
        assert list(since(metrics)) == [("0", "1", "10.2.0.1")]
        assert instances(metrics, job_type="INSTALL_AGENT") == {("failed",): 1, ("ignored",): 2}
        assert instances(metrics, job_type="MAIN_STOP_PLUGIN") == {}
        assert instances(metrics, job_type="RESTART_AGENT") == {("success",): 1}
        # Nobody has read the details of a job over nothing, so that nothing has ended it.
        assert finished(metrics) == {
            ("INSTALL_AGENT", "failed"): 1, ("MAIN_STOP_PLUGIN", "failed"): 1, ("RESTART_AGENT", "success"): 1,
        }  # fmt: skip
        job.statistics["total_count"] += 4
        metrics = await daemon.poll()
        assert instances(metrics, job_type="INSTALL_AGENT") == {("failed",): 1, ("ignored",): 2, ("other",): 4}


async def test_durations_come_from_start_and_end(tmp_path: Path) -> None:
    """cost_time loses whole days; start and end do not. What gives a negative duration is counted without."""
    async with watched(tmp_path, job={}) as daemon:
        await daemon.start()
        long = daemon.nodeman.start_job("INSTALL_AGENT", {HOSTS[0]: None}, duration=20)
        long.start_time = EPOCH - 100_000
        late = daemon.nodeman.start_job("RESTART_AGENT", {HOSTS[1]: None}, duration=20)
        late.start_time = EPOCH + 5000
        await daemon.sleep_until(90)
        metrics = await daemon.poll()
        sums = metrics.by(nodeman("job_duration_seconds_sum"), "job_type")
        assert sums == {("INSTALL_AGENT",): pytest.approx(100_050, abs=31)}
        assert finished(metrics)[("RESTART_AGENT", "success")] == 1
        name = "blueking_exporter_unknown_values_total"
        assert metrics.samples[name, frozenset({("field", "nodeman_job.end_time")})] == 1
        assert metrics.by(nodeman("job_duration_seconds_bucket"), "le")[("86400.0",)] == 0


@pytest.mark.parametrize("ahead", [3600.0, -3600.0])
async def test_times_are_the_platforms(tmp_path: Path, ahead: float) -> None:
    """An own clock that is an hour off changes nothing, over a restart too."""
    async with watched(tmp_path, job={}) as daemon:
        daemon.ahead = ahead
        await daemon.start()
        daemon.failing_on("INSTALL_AGENT", HOSTS[0], duration=10)
        await daemon.sleep_until(60)
        await daemon.restart(down=40)
        await daemon.sleep_until(150)
        metrics = await daemon.poll()
        assert finished(metrics) == {("INSTALL_AGENT", "failed"): 1}
        assert failures(metrics) == {INSTALL: 1}
        assert since(metrics) == {("0", "1", "10.2.0.1"): EPOCH + 10}
        assert own(metrics, "watermark_timestamp_seconds") == pytest.approx(daemon.now(), abs=40)


# Watched and configured jobs


async def test_watched_jobs_have_series_of_their_own(tmp_path: Path) -> None:
    """`job_ids` give status and instances of each; an old one that is configured later is shown and not counted."""
    async with watched(tmp_path, job={"job_ids": [182]}) as daemon:
        old = daemon.failing_on("INSTALL_AGENT", HOSTS[0], duration=10)
        new = daemon.nodeman.start_job("RESTART_AGENT", {HOSTS[1]: None, HOSTS[2]: "restart"}, duration=100)
        old.end_time = old.start_time = EPOCH - 30 * 86400
        daemon.nodeman.refresh(old)
        assert new.id == 182
        await daemon.sleep_until(60)
        await daemon.start()
        metrics = await daemon.metrics()
        status = nodeman("watched_job_status")
        assert metrics.by(status, "job_id", "job_type", "status") == {("182", "RESTART_AGENT", "running"): 1}
        shown = metrics.by(nodeman("watched_job_instances"), "job_id", "job_type", "status")
        assert {labels[2]: value for labels, value in shown.items()} == {
            "pending": 0, "running": 2, "success": 0, "failed": 0, "ignored": 0,
        }  # fmt: skip
        daemon.set("nodeman_job", job_ids=[181, 182])
        await daemon.reload()
        await daemon.sleep_until(200)
        metrics = await daemon.poll()
        assert {labels[1:] for labels in metrics.by(status, "job_type", "job_id", "status")} == {
            ("181", "failed"), ("182", "part_failed"),
        }  # fmt: skip
        assert finished(metrics) == {("RESTART_AGENT", "part_failed"): 1}
        assert failures(metrics) == {("nodeman_job", "RESTART_AGENT", "restart", ""): 1}
        assert instances(metrics, job_type="INSTALL_AGENT") == {}, "it is not recently finished"
        daemon.set("nodeman_job", job_ids=[])
        await daemon.reload()
        metrics = await daemon.poll()
        assert metrics.by(status, "job_id") == {}


@pytest.mark.parametrize("api", ["gateway", "esb"])
async def test_without_discovery_only_the_configured_jobs_are_asked(tmp_path: Path, api: str) -> None:
    """discover: false; the ESB publishes no job_list, there each job costs one call of details."""
    async with watched(tmp_path, api=api, job={"discover": False, "job_ids": [182, 183]}) as daemon:
        for host in HOSTS[:3]:
            daemon.nodeman.start_job("INSTALL_AGENT", {host: "install"}, duration=100)
        await daemon.sleep_until(30)
        await daemon.start()
        await daemon.sleep_until(200)
        begun = daemon.loop.time()
        metrics = await daemon.poll()
        assert finished(metrics) == {("INSTALL_AGENT", "failed"): 2}
        assert failures(metrics) == {INSTALL: 2}
        assert set(daemon.asked(begun)) == ({"job_details"} if api == "esb" else {"job_list"})
        await daemon.restart()
        metrics = await daemon.poll()
        assert finished(metrics) == {("INSTALL_AGENT", "failed"): 2}


async def test_switching_discovery_on_counts_no_history(tmp_path: Path) -> None:
    """Jobs that discovery finds for the first time are a baseline, although there is a state."""
    async with watched(tmp_path, job={"discover": False, "job_ids": [182]}) as daemon:
        for host in HOSTS[:4]:
            daemon.failing_on("INSTALL_AGENT", host, duration=10)
        await daemon.sleep_until(100)
        await daemon.start()
        daemon.set("nodeman_job", discover=True)
        await daemon.reload()
        metrics = await daemon.poll()
        assert finished(metrics) == failures(metrics) == {}
        assert failing(metrics) == {INSTALL: 4}
        daemon.failing_on("INSTALL_AGENT", HOSTS[5], duration=10)
        await daemon.sleep_until(daemon.loop.time() + 70)
        assert finished(await daemon.poll()) == {("INSTALL_AGENT", "failed"): 1}


# Failing hosts


async def test_a_success_in_another_job_ends_a_streak(tmp_path: Path) -> None:
    """The newest result of a host decides, whichever job it comes from; since is the first failure's end."""
    async with watched(tmp_path, job={"failing_host_ttl": "2h"}) as daemon:
        await daemon.start()
        daemon.failing_on("INSTALL_AGENT", HOSTS[0], HOSTS[1], duration=40)
        await daemon.sleep_until(100)
        daemon.failing_on("RESTART_AGENT", HOSTS[0], step="restart", duration=40)
        await daemon.sleep_until(200)
        metrics = await daemon.poll()
        assert since(metrics) == {("0", "1", "10.2.0.1"): EPOCH + 40, ("0", "2", "10.2.0.2"): EPOCH + 40}
        assert failing(metrics) == {INSTALL: 1, ("nodeman_job", "RESTART_AGENT", "restart", ""): 1}
        daemon.nodeman.start_job("UPGRADE_AGENT", {HOSTS[0]: None}, duration=10)
        await daemon.sleep_until(300)
        metrics = await daemon.poll()
        assert failing(metrics) == {INSTALL: 1}
        # A label set that was shown stays at 0.
        shown = metrics.by(nodeman("hosts_failing"), *FAILURE)
        assert shown == {INSTALL: 1, ("nodeman_job", "RESTART_AGENT", "restart", ""): 0}
        await daemon.sleep_until(300 + 7200)
        assert failing(await daemon.poll()) == {}


async def test_a_host_is_the_same_before_and_after_it_has_an_id(tmp_path: Path) -> None:
    """One that fails in registering has no id; when it has been registered and succeeds, it fails no longer."""
    async with watched(tmp_path, job={}) as daemon:
        await daemon.start()
        daemon.failing_on("INSTALL_AGENT", HOSTS[0], step="add_or_update_hosts", duration=10)
        await daemon.sleep_until(60)
        metrics = await daemon.poll()
        assert list(since(metrics)) == [("0", "", "10.2.0.1")]
        daemon.failing_on("INSTALL_AGENT", HOSTS[0], duration=10)
        await daemon.sleep_until(160)
        metrics = await daemon.poll()
        assert list(since(metrics)) == [("0", "1", "10.2.0.1")]
        daemon.nodeman.start_job("RESTART_AGENT", {HOSTS[0]: None}, duration=10)
        await daemon.sleep_until(260)
        assert since(await daemon.poll()) == {}


async def test_the_detail_of_failing_hosts_is_capped_and_the_count_is_not(tmp_path: Path) -> None:
    """max_failing_hosts keeps the oldest streaks."""
    async with watched(tmp_path, job={"max_failing_hosts": 3}) as daemon:
        await daemon.start()
        daemon.failing_on("INSTALL_AGENT", *HOSTS[:2], duration=10)
        await daemon.sleep_until(60)
        daemon.failing_on("INSTALL_AGENT", *HOSTS[2:20], duration=10)
        await daemon.sleep_until(160)
        metrics = await daemon.poll()
        assert failing(metrics) == {INSTALL: 20}
        shown = since(metrics)
        assert len(shown) == 3
        assert {("0", "1", "10.2.0.1"), ("0", "2", "10.2.0.2")} <= set(shown)


async def test_more_failed_hosts_than_fit_on_a_page(tmp_path: Path) -> None:
    """1,201 failed hosts are read in pages of at most 500, each counted once."""
    hosts = [Target(2, f"10.9.{n // 250}.{n % 250}", 5000 + n) for n in range(1201)]
    async with watched(tmp_path, job={}) as daemon:
        await daemon.start()
        daemon.failing_on("INSTALL_AGENT", *hosts, duration=10)
        await daemon.sleep_until(100)
        metrics = await daemon.poll()
        assert failures(metrics) == {INSTALL: 1201}
        assert failing(metrics) == {INSTALL: 1201}
        sizes = [int(str(call.params["pagesize"])) for call in daemon.details()]
        assert len(sizes) == 3
        assert max(sizes) == 500


# One job does not hold up the others


async def test_a_job_whose_hosts_are_refused_counts_without_them(tmp_path: Path) -> None:
    """Refused for good: the job is counted from the list, truncated +1, the error counted, the poll complete."""
    async with watched(tmp_path, job={}) as daemon:
        await daemon.start()
        daemon.fault("permission", api="job_details")
        daemon.failing_on("INSTALL_AGENT", HOSTS[0], duration=10)
        await daemon.sleep_until(60)
        metrics = await daemon.poll(2)
        assert finished(metrics) == {("INSTALL_AGENT", "failed"): 1}
        assert failures(metrics) == {}
        assert own(metrics, "success") == 1
        assert own(metrics, "truncated_total") == 1
        assert own(metrics, "errors_total", reason="permission") == 1


async def test_a_job_whose_hosts_cannot_be_read_for_now_fails_five_polls(tmp_path: Path) -> None:
    """What may pass fails the poll, at most five times because of the same job; then it counts without hosts."""
    async with watched(tmp_path, job={}) as daemon:
        await daemon.start()
        daemon.fault("http_503", api="job_details")
        daemon.failing_on("INSTALL_AGENT", HOSTS[0], duration=10)
        await daemon.sleep_until(45)
        metrics = await daemon.poll()
        while not own(metrics, "success"):
            assert finished(metrics) == {}
            metrics = await daemon.poll()
        assert finished(metrics) == {("INSTALL_AGENT", "failed"): 1}
        assert own(metrics, "truncated_total") == 1
        assert own(metrics, "errors_total", reason="http_5xx") == 6


async def test_4_1_4_looking_up_known_jobs_fails_five_polls(tmp_path: Path) -> None:
    """When job_list cannot be read for known jobs, five polls fail; then their details are asked for instead."""
    async with watched(tmp_path, job={"discover": False, "job_ids": [181, 182]}) as daemon:
        for host in HOSTS[:2]:
            daemon.failing_on("INSTALL_AGENT", host, duration=60)
        await daemon.start()
        daemon.fault("http_503", api="job_list")
        for _ in range(5):
            metrics = await daemon.poll()
            assert own(metrics, "success") == 0
        metrics = await daemon.poll()
        assert own(metrics, "success") == 1
        assert finished(metrics) == {("INSTALL_AGENT", "failed"): 2}
        assert failures(metrics) == {INSTALL: 2}
        assert own(metrics, "truncated_total") == 0


async def test_a_lost_permission_fails_the_poll_and_changes_nothing(tmp_path: Path) -> None:
    """job_list refuses nobody, it leaves out: known jobs that are missing are asked for, and tell."""
    async with watched(tmp_path, scopes=(BIZ, OTHER), job={}) as daemon:
        daemon.nodeman.start_job("INSTALL_AGENT", {FOREIGN[0]: None}, duration=10)
        await daemon.start()
        daemon.failing_on("INSTALL_AGENT", HOSTS[0], duration=10, created_by="somebody")
        await daemon.sleep_until(100)
        await daemon.poll()
        daemon.nodeman.denied = {2}
        metrics = await daemon.poll(2)
        assert own(metrics, "success") == 0
        assert own(metrics, "success", scope=OTHER) == 1
        assert own(metrics, "errors_total", reason="permission") == 2
        assert finished(metrics) == {("INSTALL_AGENT", "failed"): 1}
        daemon.nodeman.denied = set()
        metrics = await daemon.poll()
        assert own(metrics, "success") == 1
        assert finished(metrics) == {("INSTALL_AGENT", "failed"): 1}


async def test_configured_jobs_that_cannot_be_read_block_nothing(tmp_path: Path) -> None:
    """One that does not exist and one of another business are counted as not_found; the poll is complete."""
    async with watched(tmp_path, job={"job_ids": [181, 999]}) as daemon:
        daemon.nodeman.start_job("INSTALL_AGENT", {FOREIGN[0]: "install"}, duration=10)
        await daemon.start()
        await daemon.sleep_until(60)
        metrics = await daemon.poll()
        assert own(metrics, "success") == 1
        assert own(metrics, "errors_total", reason="not_found") >= 4
        assert finished(metrics) == failures(metrics) == {}
        assert metrics.by(nodeman("watched_job_status"), "job_id") == {}


async def test_a_known_job_that_becomes_forbidden_blocks_nothing(tmp_path: Path) -> None:
    """It spans a business whose permission is lost: told once, left alone, its counts stay; the others continue."""
    async with watched(tmp_path, job={}) as daemon:
        await daemon.start()
        daemon.nodeman.start_job(
            "INSTALL_AGENT", {HOSTS[0]: "install", FOREIGN[0]: None}, duration=10, created_by="somebody"
        )
        daemon.failing_on("RESTART_AGENT", HOSTS[1], step="restart", duration=10)
        await daemon.sleep_until(60)
        await daemon.poll()
        daemon.nodeman.denied = {3}
        metrics = await daemon.poll(4)
        assert own(metrics, "success") == 1
        assert own(metrics, "errors_total", reason="permission") == 1
        expected = {("INSTALL_AGENT", "part_failed"): 1, ("RESTART_AGENT", "failed"): 1}
        assert finished(metrics) == expected
        daemon.nodeman.denied = set()
        assert finished(await daemon.poll(2)) == expected


async def test_a_deleted_job_leaves(tmp_path: Path) -> None:
    """An unfinished job that the platform no longer knows is forgotten, without an error."""
    async with watched(tmp_path, job={}) as daemon:
        await daemon.start()
        job = daemon.nodeman.start_job("INSTALL_AGENT", {HOSTS[0]: None}, duration=500)
        await daemon.poll(2)
        del daemon.nodeman.jobs[job.id]
        metrics = await daemon.poll()
        assert own(metrics, "success") == 1
        assert metrics.get(nodeman("jobs_unfinished"), job_type="INSTALL_AGENT", status="running") in (0, None)
        assert finished(metrics) == {}


async def test_unknown_words_are_unknown(tmp_path: Path) -> None:
    """An unknown status is terminal as soon as there is an end; a job type that is no word becomes `other`."""
    async with watched(tmp_path, job={}) as daemon:
        await daemon.start()
        job = daemon.nodeman.start_job("INSTALL_AGENT", {HOSTS[0]: None}, without_task=True)
        free = daemon.nodeman.start_job("INSTALL_AGENT", {HOSTS[0]: None}, without_task=True)
        job.status, free.job_type = "PAUSED", "安装 10.0.0.1\n"
        metrics = await daemon.poll()
        assert metrics.by(nodeman("jobs_unfinished"), "job_type", "status") == {
            ("INSTALL_AGENT", "unknown"): 1, ("other", "pending"): 1,
        }  # fmt: skip
        job.status, job.end_time = "HALTED", EPOCH + 60
        metrics = await daemon.poll()
        assert finished(metrics) == {("INSTALL_AGENT", "unknown"): 1}
        name = "blueking_exporter_unknown_values_total"
        assert metrics.samples[name, frozenset({("field", "nodeman_job.status")})] == 2


# Subscriptions


async def test_a_subscription_shows_its_counter_and_counts_failures(tmp_path: Path) -> None:
    """status_counter without its total; failures once per run over a new task; a recovered host is cleared."""
    async with watched(tmp_path, subscription={"subscription_ids": [11]}) as daemon:
        hosts = {HOSTS[0]: "transfer_package", HOSTS[1]: None, HOSTS[2]: None}
        policy = daemon.nodeman.start_subscription("MAIN_INSTALL_PLUGIN", hosts, name="policy", duration=300)
        await daemon.start()
        metrics = await daemon.metrics()
        status = nodeman("subscription_instances")
        assert metrics.by(status, "subscription_id", "status") == {("11", "running"): 3}
        await daemon.sleep_until(330)
        metrics = await daemon.poll()
        assert metrics.by(status, "status") == {("failed",): 1, ("success",): 2}
        failure = ("nodeman_subscription", "MAIN_INSTALL_PLUGIN", "transfer_package", "")
        assert failures(metrics) == failing(metrics) == {failure: 1}
        last = nodeman("subscription_last_finished_timestamp_seconds")
        assert metrics.get(last, subscription_id="11") == EPOCH + 300
        # Eight sub-steps of each of two hosts, three of the one that failed.
        steps = metrics.by(nodeman("step_duration_seconds_count"), "step", job_type="MAIN_INSTALL_PLUGIN")
        assert sum(steps.values()) == 19
        assert {step for (step,) in steps} <= CODES
        await daemon.restart()
        # A new task over the failed host alone: the counter is that of the newest task.
        daemon.nodeman.run_task(policy, {HOSTS[0]: "transfer_package"}, duration=60)
        await daemon.sleep_until(450)
        metrics = await daemon.poll()
        assert instances(metrics, "subscription_instances") == {("failed",): 1}
        assert failures(metrics) == {failure: 2}
        assert list(since(metrics).values()) == [EPOCH + 300]
        daemon.nodeman.run_task(policy, {HOSTS[0]: None, HOSTS[1]: None}, duration=60)
        await daemon.sleep_until(580)
        metrics = await daemon.poll()
        assert failing(metrics) == {}
        assert failures(metrics) == {failure: 2}


async def test_a_failed_instance_of_an_earlier_task_still_fails(tmp_path: Path) -> None:
    """task_result shows the newest task only; who failed in an earlier one is asked for by name."""
    async with watched(tmp_path, subscription={"subscription_ids": [11]}) as daemon:
        hosts = {HOSTS[0]: "restart", HOSTS[1]: None}
        policy = daemon.nodeman.start_subscription("RESTART_AGENT", hosts, duration=20)
        await daemon.start()
        await daemon.sleep_until(60)
        await daemon.poll()
        daemon.nodeman.run_task(policy, {HOSTS[1]: None}, duration=20)
        await daemon.sleep_until(500)
        metrics = await daemon.poll()
        assert sum(failing(metrics).values()) == 1
        assert sum(failures(metrics).values()) == 1
        first = policy.tasks[min(policy.tasks)].records[0]
        first.begin_run(daemon.now() + 5, 60, None)
        await daemon.sleep_until(900)
        metrics = await daemon.poll()
        assert failing(metrics) == {}
        assert sum(failures(metrics).values()) == 1


async def test_a_subscription_that_is_not_ready_is_skipped(tmp_path: Path) -> None:
    """not_ready is counted, the others of the poll continue, and the poll is complete."""
    async with watched(tmp_path, subscription={"subscription_ids": [11, 12]}) as daemon:
        daemon.nodeman.start_subscription("MAIN_INSTALL_PLUGIN", {HOSTS[0]: None}, duration=10, ready_after=100)
        daemon.nodeman.start_subscription("MAIN_INSTALL_PLUGIN", {HOSTS[1]: None}, duration=500)
        await daemon.start()
        metrics = await daemon.poll(2)
        collector = "nodeman_subscription"
        assert own(metrics, "success", collector=collector) == 1
        assert own(metrics, "errors_total", collector=collector, reason="not_ready") == 3
        shown = metrics.by(nodeman("subscription_instances"), "subscription_id", "status")
        assert shown == {("12", "running"): 1}
        await daemon.sleep_until(150)
        metrics = await daemon.poll()
        assert metrics.by(nodeman("subscription_instances"), "subscription_id", "status") == {
            ("11", "success"): 1, ("12", "running"): 1,
        }  # fmt: skip


async def test_an_instance_from_after_the_baseline_is_counted(tmp_path: Path) -> None:
    """4.3: a record that is newer than all at the baseline counts, even if its end lies just before the baseline."""
    async with watched(tmp_path, subscription={"subscription_ids": [11]}) as daemon:
        policy = daemon.nodeman.start_subscription("RESTART_AGENT", {HOSTS[0]: None}, duration=20)
        await daemon.sleep_until(100)
        await daemon.start()
        assert failing(await daemon.metrics()) == {}
        daemon.nodeman.run_task(policy, {HOSTS[0]: "restart"}, duration=1)
        run = policy.tasks[max(policy.tasks)].records[0].runs[0]
        run.end, run.ends = EPOCH + 95, [EPOCH + 95]
        await daemon.sleep_until(250)
        metrics = await daemon.poll()
        assert failures(metrics) == failing(metrics)
        assert sum(failures(metrics).values()) == 1


async def test_what_fails_while_a_subscription_is_not_ready_is_counted(tmp_path: Path) -> None:
    """The baseline is the collector's first complete poll, not the first answer of each subscription."""
    async with watched(tmp_path, subscription={"subscription_ids": [11]}) as daemon:
        daemon.nodeman.start_subscription("RESTART_AGENT", {HOSTS[0]: "restart"}, duration=30, ready_after=20)
        await daemon.start()
        metrics = await daemon.metrics()
        assert own(metrics, "success", collector="nodeman_subscription") == 1
        await daemon.sleep_until(150)
        metrics = await daemon.poll()
        failure = ("nodeman_subscription", "RESTART_AGENT", "restart", "")
        assert failures(metrics) == failing(metrics) == {failure: 1}


async def test_a_few_failed_instances_are_read_in_every_poll(tmp_path: Path) -> None:
    """A node that is retried and fails again between two polls moves no counter, and counts all the same."""
    async with watched(tmp_path, subscription={"subscription_ids": [11]}) as daemon:
        policy = daemon.nodeman.start_subscription("RESTART_AGENT", {HOSTS[0]: "restart", HOSTS[1]: None}, duration=5)
        await daemon.start()
        await daemon.sleep_until(70)
        assert sum(failures(await daemon.poll()).values()) == 1
        policy.tasks[min(policy.tasks)].records[0].begin_run(daemon.now() + 1, 5, "restart")
        await daemon.sleep_until(daemon.now() - EPOCH + 61)
        metrics = await daemon.poll()
        assert sum(failures(metrics).values()) == 2


async def test_what_gives_no_answer_is_not_shown(tmp_path: Path) -> None:
    """While a subscription or a task of 1.x is refused and others are not, its gauges are absent, not frozen."""
    collectors: dict[str, Any] = {"subscription": {"subscription_ids": [11, 12]}, "task": {"job_ids": [181, 182]}}
    async with watched(tmp_path, **collectors) as daemon:
        for host in HOSTS[:2]:
            daemon.nodeman.start_subscription("RESTART_AGENT", {host: "restart"}, duration=10)
            daemon.nodeman.start_legacy_task(2, "INSTALL_PAGENT", {host: "JOB_TIMEOUT"}, duration=10)
        await daemon.start()
        await daemon.sleep_until(60)
        before = await daemon.poll()
        gone = daemon.nodeman.subscriptions.pop(11), daemon.nodeman.legacy_tasks.pop(181)
        metrics = await daemon.poll()
        assert set(metrics.by(nodeman("subscription_instances"), "subscription_id")) == {("12",)}
        assert set(metrics.by(nodeman("task_hosts"), "job_id")) == {("182",)}
        assert set(metrics.by(nodeman("task_hosts_by_os"), "job_id")) == {("182",)}
        assert failing(metrics) == failing(before)
        daemon.nodeman.subscriptions[11], daemon.nodeman.legacy_tasks[181] = gone
        metrics = await daemon.poll()
        assert set(metrics.by(nodeman("subscription_instances"), "subscription_id")) == {("11",), ("12",)}
        assert failures(metrics) == failures(before)
        assert sum(failures(metrics).values()) == 4


async def test_one_subscription_that_is_gone_does_not_block_the_others(tmp_path: Path) -> None:
    """not_found is counted; without any other subscription the poll fails."""
    async with watched(tmp_path, subscription={"subscription_ids": [99, 11]}) as daemon:
        daemon.nodeman.start_subscription("MAIN_INSTALL_PLUGIN", {HOSTS[0]: None}, duration=10)
        await daemon.start()
        metrics = await daemon.metrics()
        collector = "nodeman_subscription"
        assert own(metrics, "success", collector=collector) == 1
        assert own(metrics, "errors_total", collector=collector, reason="not_found") == 1
        daemon.set("nodeman_subscription", subscription_ids=[99])
        await daemon.reload()
        metrics = await daemon.poll()
        assert own(metrics, "success", collector=collector) == 0
        assert metrics.by(nodeman("subscription_instances"), "subscription_id") == {}


async def test_one_subscription_with_an_unusual_sub_step_does_not_block_the_others(tmp_path: Path) -> None:
    """It is decode and read again in the next poll; of runs that are known the sub-steps are not looked at."""
    spoils = False

    def spoil(path: str, answer: dict[str, Any]) -> dict[str, Any]:
        for row in answer["data"]["list"] if spoils and "task_result" in path else ():
            if row["instance_info"]["host"]["bk_host_id"] == HOSTS[0].bk_host_id:
                row["steps"][0]["target_hosts"][0]["sub_steps"][0]["finish_time"] = "yesterday"
        return answer

    collector = "nodeman_subscription"
    async with watched(tmp_path, change=spoil, subscription={"subscription_ids": [11, 12]}) as daemon:
        for host in HOSTS[:2]:
            daemon.nodeman.start_subscription("RESTART_AGENT", {host: "restart"}, duration=40)
        await daemon.start()
        spoils = True
        await daemon.sleep_until(60)
        metrics = await daemon.poll()
        assert own(metrics, "success", collector=collector) == 1
        assert own(metrics, "errors_total", collector=collector, reason="decode") >= 1
        assert sum(failures(metrics).values()) == 1
        spoils = False
        metrics = await daemon.poll()
        errors = own(metrics, "errors_total", collector=collector, reason="decode")
        assert sum(failures(metrics).values()) == 2
        spoils = True
        metrics = await daemon.poll(12)
        assert own(metrics, "errors_total", collector=collector, reason="decode") == errors
        assert sum(failures(metrics).values()) == 2
        assert set(metrics.by(nodeman("subscription_instances"), "subscription_id")) == {("11",), ("12",)}


async def test_service_instances_and_old_engines(tmp_path: Path) -> None:
    """A service instance shows no steps: `other`, under the action of the others. An old engine sends names only."""
    service = Target(2, "10.2.9.9", 999, service_id=7)
    async with watched(tmp_path, subscription={"subscription_ids": [11, 12]}) as daemon:
        hosts = {HOSTS[0]: None, service: "install_package", FOREIGN[0]: "install_package"}
        daemon.nodeman.start_subscription("MAIN_INSTALL_PLUGIN", hosts, duration=100)
        old = {HOSTS[1]: "gse_operate_proc"}
        daemon.nodeman.start_subscription("MAIN_RESTART_PLUGIN", old, duration=100, old_engine=True)
        await daemon.start()
        await daemon.sleep_until(130)
        metrics = await daemon.poll()
        assert failures(metrics) == {
            ("nodeman_subscription", "MAIN_INSTALL_PLUGIN", "other", ""): 1,
            ("nodeman_subscription", "MAIN_RESTART_PLUGIN", "gse_operate_proc", ""): 1,
        }
        assert ("0", "999", "10.2.9.9") in since(metrics)


async def test_a_node_retried_in_a_subscription_counts_its_new_sub_steps_only(tmp_path: Path) -> None:
    """The record and its start stay: the finish tells the run, and sub-steps before the retry are not timed again."""
    async with watched(tmp_path, subscription={"subscription_ids": [11]}) as daemon:
        hosts = {HOSTS[0]: "get_agent_status", HOSTS[1]: None}
        policy = daemon.nodeman.start_subscription("RESTART_AGENT", hosts, duration=100)
        await daemon.start()
        await daemon.sleep_until(130)
        metrics = await daemon.poll()
        assert metrics.by(nodeman("step_duration_seconds_count"), "step") == {
            ("restart",): 2, ("get_agent_status",): 2, ("update_process_status",): 1,
        }  # fmt: skip
        # By then the failed one has been read again, without the others.
        await daemon.sleep_until(500)
        record = policy.latest(policy.tasks)[0]
        record.begin_run(daemon.now() + 5, 100, "get_agent_status", 1)
        await daemon.sleep_until(650)
        metrics = await daemon.poll()
        assert metrics.by(nodeman("step_duration_seconds_count"), "step") == {
            ("restart",): 2, ("get_agent_status",): 3, ("update_process_status",): 1,
        }  # fmt: skip
        assert sum(failures(metrics).values()) == 2
        assert sum(failing(metrics).values()) == 1


# NodeMan 1.x


async def test_a_legacy_task(tmp_path: Path) -> None:
    """Hosts by status and system, failures by err_code, no CMDB id; a host that runs again counts again."""
    windows = Target(2, "10.2.7.7", 77, bk_cloud_id=7, os_type="WINDOWS")
    async with watched(tmp_path, task={"job_ids": [181, 199]}) as daemon:
        outcomes = {HOSTS[0]: "SSH_LOGIN_TIMEOUT", windows: "WAIT_AGENT_TIMEOUT", HOSTS[1]: None}
        task = daemon.nodeman.start_legacy_task(2, "INSTALL_PAGENT", outcomes, duration=60, queue=30)
        await daemon.start()
        metrics = await daemon.metrics()
        collector = "nodeman_task"
        assert own(metrics, "success", collector=collector) == 1
        assert own(metrics, "errors_total", collector=collector, reason="api_error") == 1, "199 does not exist"
        hosts = nodeman("task_hosts")
        assert metrics.by(hosts, "job_id", "job_type", "status") == {
            ("181", "INSTALL_PAGENT", "running"): 3,
            ("181", "INSTALL_PAGENT", "success"): 0,
            ("181", "INSTALL_PAGENT", "failed"): 0,
        }
        assert metrics.by(nodeman("task_hosts_by_os"), "job_id", "os_type") == {
            ("181", "LINUX"): 2, ("181", "WINDOWS"): 1, ("181", "AIX"): 0,
        }  # fmt: skip
        await daemon.sleep_until(150)
        metrics = await daemon.poll()
        assert metrics.by(hosts, "status") == {("running",): 0, ("success",): 1, ("failed",): 2}
        expected = {
            ("nodeman_task", "INSTALL_PAGENT", "other", "SSH_LOGIN_TIMEOUT"): 1,
            ("nodeman_task", "INSTALL_PAGENT", "other", "WAIT_AGENT_TIMEOUT"): 1,
        }
        assert failures(metrics) == failing(metrics) == expected
        assert set(since(metrics)) == {("0", "", "10.2.0.1"), ("7", "", "10.2.7.7")}
        await daemon.restart()
        task.hosts[0] = LegacyHost(40, HOSTS[0], daemon.now(), daemon.now() + 40, "")
        task.hosts[1] = LegacyHost(41, windows, daemon.now(), daemon.now() + 40, "INSTALL_FAILED")
        metrics = await daemon.poll()
        assert failing(metrics) == expected, "running is no result"
        await daemon.sleep_until(daemon.loop.time() + 60)
        metrics = await daemon.poll()
        again = ("nodeman_task", "INSTALL_PAGENT", "other", "INSTALL_FAILED")
        assert failures(metrics) == expected | {again: 1}
        assert failing(metrics) == {again: 1}


async def test_legacy_hosts_without_an_address_are_distinguished(tmp_path: Path) -> None:
    """Several rows without an address do not take each other's status: each failure is counted once."""
    nowhere = [Target(2, "", number, ipv6=f"fd00::{number}") for number in range(3)]
    async with watched(tmp_path, task={"job_ids": [181]}) as daemon:
        outcomes = dict(zip(nowhere, ("SSH_LOGIN_TIMEOUT", None, "JOB_TIMEOUT"), strict=True))
        daemon.nodeman.start_legacy_task(2, "INSTALL_PAGENT", outcomes, duration=60)
        await daemon.start()
        await daemon.sleep_until(100)
        metrics = await daemon.poll(3)
        assert sum(failures(metrics).values()) == 2


async def test_a_call_that_failed_names_what_it_was_for(tmp_path: Path) -> None:
    """The log line of a subscription, job or task that is missing names its id and says what follows."""
    collectors: dict[str, Any] = {
        "job": {"job_ids": [181, 999]},
        "subscription": {"subscription_ids": [99, 11]},
        "task": {"job_ids": [181, 199]},
    }
    with capture_logs() as logged:
        async with watched(tmp_path, **collectors) as daemon:
            daemon.nodeman.start_job("INSTALL_AGENT", {HOSTS[0]: None}, duration=10)
            daemon.nodeman.start_legacy_task(2, "INSTALL_PAGENT", {HOSTS[0]: None})
            await daemon.start()
            daemon.set("nodeman_subscription", subscription_ids=[99])
            await daemon.reload()
            await daemon.poll()
    failed = {(line["about"], line["reason"], line["consequence"]) for line in logged if line["event"] == "call_failed"}
    assert failed == {
        ("job 999", "not_found", "left as it was"),
        ("subscription 99", "not_found", "not shown"),
        ("task 199", "api_error", "not shown"),
    }
    polls = [line["message"] for line in logged if line["event"] == "poll_failed"]
    assert polls
    assert all(message.startswith("subscription 99: ") for message in polls)


# What the exporter offers beside the page


async def test_drill_down_names_the_jobs(tmp_path: Path) -> None:
    """/api/v1/failures gives ids and pages of failed jobs and of the jobs of failing hosts."""
    async with watched(tmp_path, job={}) as daemon:
        await daemon.start()
        job = daemon.failing_on("INSTALL_AGENT", HOSTS[0], duration=10)
        await daemon.sleep_until(60)
        await daemon.poll()
        status, body = await daemon.ask("/api/v1/failures?bk_scope_type=biz&bk_scope_id=2")
        assert status == 200
        told = json.loads(body)
        (execution,), (host,) = told["executions"], told["hosts"]
        assert (execution["collector"], execution["job_id"], execution["status"]) == ("nodeman_job", job.id, "failed")
        assert (host["job_id"], host["bk_host_id"], host["reason"]) == (job.id, "1", "install")
        assert {execution["url"], host["url"]} == {f"https://nodeman.example.com/o/#/task-list/detail/{job.id}"}


async def test_gauges_vanish_when_polls_fail_for_long(tmp_path: Path) -> None:
    """After stale_after intervals gauges go, counters stay."""
    async with watched(tmp_path, job={}) as daemon:
        await daemon.start()
        daemon.failing_on("INSTALL_AGENT", HOSTS[0], duration=10)
        await daemon.sleep_until(60)
        await daemon.poll()
        daemon.fault("http_503", api="job_list")
        metrics = await daemon.poll(7)
        assert failing(metrics) == instances(metrics) == since(metrics) == {}
        assert finished(metrics) == {("INSTALL_AGENT", "failed"): 1}
        assert failures(metrics) == {INSTALL: 1}


CATALOGUE = {
    "blueking_nodeman_jobs_finished_total": ("counter", ("job_type", "status")),
    "blueking_nodeman_jobs_unfinished": ("gauge", ("job_type", "status")),
    "blueking_nodeman_oldest_unfinished_timestamp_seconds": ("gauge", ()),
    "blueking_nodeman_job_instances": ("gauge", ("job_type", "status")),
    "blueking_nodeman_watched_job_instances": ("gauge", ("job_id", "job_type", "status")),
    "blueking_nodeman_watched_job_status": ("gauge", ("job_id", "job_type", "status")),
    "blueking_nodeman_job_duration_seconds": ("histogram", ("job_type",)),
    "blueking_nodeman_subscription_instances": ("gauge", ("subscription_id", "status")),
    "blueking_nodeman_subscription_last_finished_timestamp_seconds": ("gauge", ("subscription_id",)),
    "blueking_nodeman_task_hosts": ("gauge", ("job_id", "job_type", "status")),
    "blueking_nodeman_task_hosts_by_os": ("gauge", ("job_id", "job_type", "os_type")),
    "blueking_nodeman_host_failures_total": ("counter", ("collector", "job_type", "step", "code")),
    "blueking_nodeman_hosts_failing": ("gauge", ("collector", "job_type", "step", "code")),
    "blueking_nodeman_host_failing_since_timestamp_seconds": (
        "gauge",
        ("collector", "bk_cloud_id", "bk_host_id", "ip", "job_type", "step", "code"),
    ),
    "blueking_nodeman_step_duration_seconds": ("histogram", ("job_type", "step")),
}
"""Contract 4.3, literally."""


async def test_the_catalogue_is_exactly_that_of_the_contract(tmp_path: Path) -> None:
    """Names, types and label sets of everything NodeMan on a page that shows all of it."""
    watching = watched(
        tmp_path, job={"job_ids": [181]}, subscription={"subscription_ids": [11]}, task={"job_ids": [181]}
    )
    async with watching as daemon:
        daemon.nodeman.start_subscription("MAIN_INSTALL_PLUGIN", {HOSTS[0]: "install_package"}, duration=60)
        daemon.nodeman.start_legacy_task(2, "INSTALL_PAGENT", {HOSTS[0]: "JOB_TIMEOUT"}, duration=60)
        daemon.failing_on("INSTALL_AGENT", HOSTS[1], duration=60)
        daemon.nodeman.start_job("INSTALL_AGENT", {HOSTS[2]: None}, duration=6000)
        await daemon.start()
        await daemon.sleep_until(150)
        metrics = await daemon.poll()
        types = dict(re.findall(r"^# TYPE (blueking_nodeman_\w+) (\w+)$", metrics.text, re.MULTILINE))
        assert types == {name: kind for name, (kind, _) in CATALOGUE.items()}
        seen: dict[str, set[frozenset[str]]] = {name: set() for name in CATALOGUE}
        for name, labels in metrics.samples:
            if name.startswith("blueking_nodeman_"):
                family = re.sub(r"_(bucket|sum|count)$", "", name) if name not in CATALOGUE else name
                seen[family].add(frozenset(dict(labels)) - {"le"})
        scope = {"bk_scope_type", "bk_scope_id"}
        assert seen == {name: {frozenset({*labels, *scope})} for name, (_, labels) in CATALOGUE.items()}


# What it costs


async def test_an_idle_poll_is_one_call(tmp_path: Path) -> None:
    """Nothing happens: one job_list per interval; a job with a failing host adds one look in five minutes."""
    async with watched(tmp_path, job={}) as daemon:
        for host in HOSTS[:15]:
            daemon.nodeman.start_job("INSTALL_AGENT", {host: None}, duration=10)
        await daemon.start()
        begun = daemon.loop.time()
        await daemon.poll(20)
        assert daemon.asked(begun) == {"job_list": 20}
        daemon.failing_on("INSTALL_AGENT", HOSTS[0], duration=10)
        await daemon.poll(4)
        begun = daemon.loop.time()
        await daemon.poll(20)
        assert daemon.asked(begun)["job_list"] == 20
        assert daemon.asked(begun)["job_details"] == 2


async def test_pending_jobs_are_left_alone(tmp_path: Path) -> None:
    """No details of a job are read before its task is ready: reading would end it on the platform."""
    async with watched(tmp_path, job={"interval": "10s"}) as daemon:
        await daemon.start()
        daemon.failing_on("INSTALL_AGENT", HOSTS[9], duration=5)
        await daemon.sleep_until(60)
        filtered = [Filtered(HOSTS[1], "该主机已安装", "IGNORED")]
        job = daemon.nodeman.start_job(
            "INSTALL_AGENT", {HOSTS[0]: "install", HOSTS[2]: "install"}, duration=60, ready_after=100, filtered=filtered
        )
        await daemon.sleep_until(300)
        daemon.nodeman.retry(job, {HOSTS[0]: "install"}, duration=60, ready_after=100)
        await daemon.sleep_until(600)
        metrics = await daemon.poll()
        assert daemon.nodeman.jobs[job.id].ends == [
            (EPOCH + 230, "FAILED"), (EPOCH + 470, "PART_FAILED"),
        ]  # fmt: skip
        assert finished(metrics) == {("INSTALL_AGENT", "failed"): 2, ("INSTALL_AGENT", "part_failed"): 1}
        assert failures(metrics) == {INSTALL: 4}


async def test_a_retried_job_is_left_alone_until_it_has_ended(tmp_path: Path) -> None:
    """RUNNING is stored before the new task is ready; hosts that still count as failed are no reason to read it."""
    async with watched(tmp_path, job={"interval": "10s"}) as daemon:
        await daemon.start()
        filtered = [Filtered(HOSTS[5], "该主机已安装", "IGNORED")]
        job = daemon.failing_on("INSTALL_AGENT", HOSTS[0], HOSTS[1], duration=20, filtered=filtered)
        await daemon.sleep_until(100)
        await daemon.poll()
        begun = daemon.loop.time()
        daemon.nodeman.retry(job, only=[HOSTS[0]], duration=30, ready_after=100)
        assert job.statistics["failed_count"] == 1
        await daemon.sleep_until(190)
        assert daemon.details(begun) == []
        assert job.status == "RUNNING"
        await daemon.sleep_until(300)
        metrics = await daemon.poll()
        assert [status for _, status in job.ends] == ["FAILED", "PART_FAILED"]
        assert failing(metrics) == {INSTALL: 1}


async def test_a_subscription_of_ten_thousand_instances(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """Idle: one call and one row. Moving: a page and what is news, never everything at once."""
    hosts = [Target(2, f"10.{20 + n // 60000}.{n // 250 % 240}.{n % 250}", 50_000 + n) for n in range(10_000)]
    async with watched(tmp_path, subscription={"subscription_ids": [11], "interval": "60s"}) as daemon:
        outcomes = {host: "install_package" if n % 100 == 0 else None for n, host in enumerate(hosts)}
        policy = daemon.nodeman.start_subscription("MAIN_INSTALL_PLUGIN", outcomes, duration=1200, jitter=0.5)
        await daemon.start()
        moving = []
        while daemon.loop.time() < 2000:
            begun = daemon.loop.time()
            metrics = await daemon.poll()
            moving.append(sum(call.nbytes for call in daemon.calls(begun)))
            assert len(daemon.calls(begun)) <= 4
        assert instances(metrics, "subscription_instances") == {("failed",): 100, ("success",): 9900}
        assert sum(failures(metrics).values()) == 100
        assert sum(failing(metrics).values()) == 100
        assert max(moving) < 1_000_000
        record_property("bytes_moving", max(moving))
        begun = daemon.loop.time()
        await daemon.poll(5)
        # One of the five polls reads the failed ones again.
        assert daemon.asked(begun) == {"task_result": 6}
        sizes = sorted(call.nbytes for call in daemon.calls(begun))
        assert sizes[-2] < 10_000
        record_property("bytes_idle", sizes[0])
        daemon.nodeman.run_task(policy, {hosts[0]: None}, duration=30)
        metrics = await daemon.poll(2)
        assert sum(failing(metrics).values()) == 99
