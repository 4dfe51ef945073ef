"""Where a live NodeMan 2.4.7 answers otherwise than its documents say: what the daemon makes of it, over real HTTP."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from exporter.simulator.nodeman_api import NodemanApi
from exporter.simulator.nodeman_world import Filtered, LegacyHost, Target
from exporter.simulator.platform import Call
from tests.support.daemon import EPOCH, MEMORY, Metrics
from tests.support.nodeman import HOSTS, failing, failures, finished, nodeman, own, since, watched

pytestmark = pytest.mark.looptime(noop_cycles=5)

INSTALL = ("nodeman_job", "INSTALL_AGENT", "install", "")
DAY = 86400.0
FILTERED = [Filtered(HOSTS[30], "该主机已安装", "IGNORED")]

Answer = dict[str, Any]


def unknown(metrics: Metrics, field: str) -> float:
    name = "blueking_exporter_unknown_values_total"
    return metrics.samples.get((name, frozenset({("field", field)})), 0)


def durations(metrics: Metrics) -> dict[tuple[str, ...], float]:
    return metrics.by(nodeman("job_duration_seconds_sum"), "job_type")


# The baseline


async def test_a_failed_job_before_hundreds_of_successes_is_not_forgotten(tmp_path: Path) -> None:
    """The jobs that need asking are chosen first. One poll reads 200 of them, the next ones the others."""
    async with watched(tmp_path, job={}, state=MEMORY) as daemon:
        daemon.failing_on("INSTALL_AGENT", HOSTS[0], HOSTS[1], duration=10)
        await daemon.sleep_until(40)
        for number in range(230):
            daemon.nodeman.start_job("RESTART_AGENT", {HOSTS[2 + number % 30]: None}, duration=10)
        # The oldest success is the one that clears a host.
        oldest = daemon.nodeman.jobs[182]
        oldest.subscription.tasks[oldest.task_ids[0]].records[0].target = HOSTS[1]
        await daemon.sleep_until(100)
        await daemon.start()
        metrics = await daemon.metrics()
        assert failing(metrics)[INSTALL] >= 1
        await daemon.until(lambda: len(daemon.details()) >= 231)
        metrics = await daemon.poll()
        assert failing(metrics) == {INSTALL: 1}
        assert list(since(metrics)) == [("0", "1", "10.2.0.1")]
        assert finished(metrics) == failures(metrics) == {}
        assert len(daemon.details()) == 231
        assert own(metrics, "truncated_total") == 0


async def test_more_failed_jobs_than_one_poll_reads(tmp_path: Path) -> None:
    """After a downtime in which 250 jobs failed each host is counted once, 200 jobs in a poll."""
    hosts = [Target(2, f"10.9.{n // 250}.{n % 250}", 5000 + n) for n in range(250)]
    async with watched(tmp_path, job={}) as daemon:
        await daemon.start()
        await daemon.stop()
        for host in hosts:
            daemon.failing_on("INSTALL_AGENT", host, duration=10)
        await daemon.sleep_until(100)
        await daemon.start()
        metrics = await daemon.poll()
        assert finished(metrics) == {("INSTALL_AGENT", "failed"): 250}
        assert failures(metrics) == failing(metrics) == {INSTALL: 250}
        assert len(daemon.details()) == 250


async def test_a_job_that_never_begins_is_forgotten(tmp_path: Path) -> None:
    """The platform leaves some jobs pending for ever: after seven days they are not shown any more."""
    async with watched(tmp_path, job={}, state=MEMORY) as daemon:
        jobs = [daemon.nodeman.start_job("INSTALL_AGENT", {HOSTS[0]: None}, without_task=True) for _ in range(2)]
        jobs[0].start_time -= 8 * DAY
        await daemon.start()
        shown = nodeman("jobs_unfinished")
        assert (await daemon.metrics()).by(shown, "status") == {("pending",): 1}
        jobs[1].start_time -= 8 * DAY
        daemon.nodeman.start_job("INSTALL_AGENT", {HOSTS[1]: None}, without_task=True)
        metrics = await daemon.poll(2)
        assert metrics.by(shown, "status") == {("pending",): 1}
        assert finished(metrics) == {}


async def test_a_host_that_ends_after_the_baseline_in_a_job_that_ended_before(tmp_path: Path) -> None:
    """The job was revoked before the baseline and is not counted; its host failed after it, and is."""
    async with watched(tmp_path, job={}) as daemon:
        hosts = {HOSTS[0]: None, HOSTS[1]: None}
        job = daemon.nodeman.start_job("RESTART_AGENT", hosts, duration=300)
        early = job.subscription.tasks[job.task_ids[0]].records[0].runs[0]
        early.ends, early.end, early.failed = [EPOCH + 50], EPOCH + 50, True
        await daemon.sleep_until(60)
        daemon.nodeman.revoke(job)
        await daemon.sleep_until(95)
        await daemon.start()
        assert failures(await daemon.metrics()) == {}
        await daemon.sleep_until(200)
        metrics = await daemon.poll()
        assert finished(metrics) == {}
        assert failures(metrics) == {("nodeman_job", "RESTART_AGENT", "other", ""): 1}
        assert sum(failing(metrics).values()) == 2


# Large answers


async def test_a_list_that_is_too_large_is_read_in_smaller_pages(tmp_path: Path) -> None:
    """Job_list contains the filtered hosts of every job. Fewer rows are asked for, and that is remembered."""
    async with watched(tmp_path, job={}, state=MEMORY) as daemon:
        daemon.top(blueking=daemon._settings["blueking"] | {"max_response_bytes": "64KiB"})
        many = [Filtered(Target(2, f"10.8.0.{n}", 800 + n), "x" * 60, "IGNORED") for n in range(20)]
        for number in range(130):
            daemon.nodeman.start_job("RESTART_AGENT", {HOSTS[number % 40]: None}, duration=10, filtered=many)
        await daemon.sleep_until(60)
        await daemon.start()
        metrics = await daemon.metrics()
        assert own(metrics, "success") == 1
        assert metrics.get(nodeman("job_instances"), job_type="RESTART_AGENT", status="success") == 130
        begun = daemon.loop.time()
        daemon.failing_on("INSTALL_AGENT", HOSTS[0], duration=10)
        await daemon.sleep_until(begun + 95)
        metrics = await daemon.metrics()
        assert finished(metrics) == {("INSTALL_AGENT", "failed"): 1}
        # Every poll reads a page of 20, and the others by their ids, 20 at a time.
        sizes = [int(str(call.params["pagesize"])) for call in daemon.calls(begun, "job_list")]
        assert max(sizes) <= 20
        assert own(metrics, "truncated_total") == 0


async def test_a_single_row_that_is_too_large_is_passed_over(tmp_path: Path) -> None:
    """Truncated +1, once, and the other jobs are counted; also where it is the last row of the list."""
    async with watched(tmp_path, job={}, state=MEMORY) as daemon:
        daemon.top(blueking=daemon._settings["blueking"] | {"max_response_bytes": "64KiB"})
        huge = [Filtered(Target(2, f"10.8.0.{n}", 800 + n), "x" * 900, "IGNORED") for n in range(100)]
        daemon.nodeman.start_job("RESTART_AGENT", {HOSTS[0]: None}, duration=10, filtered=huge)
        daemon.nodeman.start_job("RESTART_AGENT", {HOSTS[0]: None}, duration=10)
        await daemon.start()
        metrics = await daemon.poll(3)
        assert own(metrics, "success") == own(metrics, "truncated_total") == 1
        daemon.nodeman.start_job("RESTART_AGENT", {HOSTS[1]: None}, duration=10, filtered=huge)
        daemon.failing_on("INSTALL_AGENT", HOSTS[2], duration=10)
        await daemon.sleep_until(daemon.loop.time() + 60)
        metrics = await daemon.poll(3)
        assert (own(metrics, "success"), own(metrics, "truncated_total")) == (1, 2)
        assert finished(metrics)[("INSTALL_AGENT", "failed")] == 1


# Jobs that look ended and are not


async def test_a_job_over_the_esb_that_has_not_begun_is_asked_at_growing_intervals(tmp_path: Path) -> None:
    """Each look may damage it, so there are few; once it runs it is asked in every poll."""
    async with watched(tmp_path, api="esb", job={"discover": False, "job_ids": [181, 182]}) as daemon:
        daemon.nodeman.start_job("INSTALL_AGENT", {HOSTS[0]: "install"}, duration=300, ready_after=3600)
        daemon.nodeman.start_job("INSTALL_AGENT", {HOSTS[1]: "install"}, duration=60000)
        await daemon.sleep_until(30)
        await daemon.start()
        await daemon.sleep_until(3500)
        looks = [call.at - EPOCH for call in daemon.details() if call.params["job_id"] == 181]
        assert len(looks) < 10
        assert all(later - at >= 0.9 * at for at, later in itertools.pairwise(looks) if at < 1700)
        assert len([call for call in daemon.details() if call.params["job_id"] == 182]) > 100
        await daemon.sleep_until(3600 + 1800 + 400)
        metrics = await daemon.poll()
        assert finished(metrics) == {("INSTALL_AGENT", "failed"): 1}
        assert failures(metrics) == {INSTALL: 1}


async def test_a_success_without_a_task_is_believed_after_a_while(tmp_path: Path) -> None:
    """A job that somebody looks at before its task exists says SUCCESS, runs, and ends as PART_FAILED.

    It is counted once, and gives no duration: the platform keeps the end of the success.
    """
    async with watched(tmp_path, job={"interval": "10s"}) as daemon:
        await daemon.start()
        hosts = {HOSTS[0]: "install", HOSTS[1]: None}
        job = daemon.nodeman.start_job("INSTALL_AGENT", hosts, filtered=FILTERED, task_after=40, duration=200)
        metrics = await daemon.poll(2)
        assert job.status == "SUCCESS"
        assert finished(metrics) == {}
        assert metrics.by(nodeman("jobs_unfinished"), "status") == {}
        await daemon.sleep_until(100)
        metrics = await daemon.poll()
        assert metrics.by(nodeman("jobs_unfinished"), "status") == {("running",): 1}
        await daemon.sleep_until(300)
        metrics = await daemon.poll()
        assert finished(metrics) == {("INSTALL_AGENT", "part_failed"): 1}
        assert failures(metrics) == {INSTALL: 1}
        assert durations(metrics) == {}


@pytest.mark.parametrize("before", [True, False])
async def test_a_success_that_stays_is_counted_after_90_seconds(tmp_path: Path, before: bool) -> None:
    """4.3: nothing but ignored instances and no task; one from before the baseline is not counted."""
    async with watched(tmp_path, job={"interval": "10s"}) as daemon:
        if not before:
            await daemon.start()
        job = daemon.nodeman.start_job("INSTALL_AGENT", {}, filtered=FILTERED, without_task=True)
        daemon.nodeman.plan(daemon.now() + 20, lambda: daemon.nodeman.refresh(job))
        await daemon.sleep_until(50)
        if before:
            await daemon.start()
        assert job.status == "SUCCESS"
        await daemon.sleep_until(100)
        assert finished(await daemon.poll()) == {}
        await daemon.restart()
        await daemon.sleep_until(130)
        metrics = await daemon.poll()
        assert finished(metrics) == ({} if before else {("INSTALL_AGENT", "success"): 1})
        assert durations(metrics) == ({} if before else {("INSTALL_AGENT",): 20})


async def test_a_success_that_the_list_shows_late_is_counted(tmp_path: Path) -> None:
    """4.3: a job that is first listed after the baseline counts, also when it reported success before it."""
    hidden = True

    def late(path: str, answer: Answer) -> Answer:
        if hidden and path.endswith("/job_list/"):
            answer["data"] |= {"total": 0, "list": []}
        return answer

    async with watched(tmp_path, job={"interval": "10s"}, change=late, state=MEMORY) as daemon:
        job = daemon.nodeman.start_job("INSTALL_AGENT", {}, filtered=FILTERED, without_task=True)
        daemon.nodeman.plan(daemon.now() + 20, lambda: daemon.nodeman.refresh(job))
        await daemon.sleep_until(50)
        await daemon.start()
        assert job.status == "SUCCESS"
        hidden = False
        await daemon.sleep_until(130)
        assert finished(await daemon.poll()) == {("INSTALL_AGENT", "success"): 1}


# Runs between two looks


async def test_the_hosts_of_a_run_between_two_polls_are_counted(tmp_path: Path) -> None:
    """A job ends and is retried between two polls: its subscription still tells what its first task did."""
    async with watched(tmp_path, job={"interval": "120s"}) as daemon:
        await daemon.start()
        hosts = {HOSTS[0]: "install", HOSTS[1]: None, HOSTS[2]: "get_agent_status"}
        job = daemon.nodeman.start_job("INSTALL_AGENT", hosts, duration=150)
        await daemon.poll()
        await daemon.sleep_until(200)
        daemon.nodeman.retry(job, {HOSTS[0]: "install"}, duration=100)
        metrics = await daemon.poll()
        status = ("nodeman_job", "INSTALL_AGENT", "get_agent_status", "")
        assert finished(metrics) == {("INSTALL_AGENT", "part_failed"): 1}
        assert failures(metrics) == {INSTALL: 1, status: 1}
        assert failing(metrics) == {INSTALL: 1, status: 1}
        metrics = await daemon.poll(2)
        assert finished(metrics) == {("INSTALL_AGENT", "part_failed"): 2}
        assert failures(metrics) == {INSTALL: 2, status: 1}
        assert failing(metrics) == {INSTALL: 1}
        assert own(metrics, "truncated_total") == 0
        assert durations(metrics) == {("INSTALL_AGENT",): pytest.approx(150, abs=31)}


@pytest.mark.parametrize("down", [False, True])
async def test_a_job_that_is_first_seen_in_its_third_run(tmp_path: Path, down: bool) -> None:
    """Three runs, all of which nobody has seen begin, are three, with all their hosts."""
    async with watched(tmp_path, job={"interval": "30s" if down else "900s"}) as daemon:
        await daemon.start()
        if down:
            await daemon.stop()
        else:
            await daemon.poll()
        begun = daemon.loop.time()
        job = daemon.failing_on("INSTALL_AGENT", HOSTS[0], HOSTS[1], duration=20)
        for number in range(2):
            await daemon.sleep_until(begun + 100 * (number + 1))
            daemon.nodeman.retry(job, {HOSTS[0]: "install"}, duration=20)
        await daemon.sleep_until(begun + 300)
        if down:
            await daemon.start()
            metrics = await daemon.metrics()
        else:
            metrics = await daemon.poll()
        assert finished(metrics) == {("INSTALL_AGENT", "failed"): 1, ("INSTALL_AGENT", "part_failed"): 2}
        assert failures(metrics) == {INSTALL: 4}
        assert failing(metrics) == {INSTALL: 1}
        assert own(metrics, "truncated_total") == 0


async def test_a_run_between_two_polls_that_cannot_be_read(tmp_path: Path) -> None:
    """Where the subscription refuses, the run is counted without its hosts and truncated +1."""
    async with watched(tmp_path, job={"interval": "120s"}) as daemon:
        await daemon.start()
        job = daemon.nodeman.start_job("INSTALL_AGENT", {HOSTS[0]: "install", HOSTS[1]: None}, duration=150)
        await daemon.poll()
        await daemon.sleep_until(200)
        daemon.nodeman.retry(job, duration=100)
        del daemon.nodeman.subscriptions[job.subscription.id]
        metrics = await daemon.poll(3)
        assert finished(metrics) == {("INSTALL_AGENT", "part_failed"): 1, ("INSTALL_AGENT", "success"): 1}
        assert failures(metrics) == {}
        assert own(metrics, "truncated_total") == 1
        assert own(metrics, "errors_total", reason="not_found") == 1


async def test_a_retry_while_a_job_runs_ends_no_run(tmp_path: Path) -> None:
    """One host has failed and is retried while another one runs: nothing has ended, and the failure is counted."""
    async with watched(tmp_path, job={}) as daemon:
        await daemon.start()
        job = daemon.nodeman.start_job("INSTALL_AGENT", {HOSTS[0]: None, HOSTS[1]: None}, duration=400)
        failed = job.subscription.tasks[job.task_ids[0]].records[0].runs[0]
        failed.ends, failed.end, failed.failed = [EPOCH + 40], EPOCH + 40, True
        await daemon.sleep_until(100)
        daemon.nodeman.retry(job, duration=100)
        await daemon.sleep_until(600)
        metrics = await daemon.poll()
        assert finished(metrics) == {("INSTALL_AGENT", "success"): 1}
        assert sum(failures(metrics).values()) == 1
        assert failing(metrics) == {}
        assert durations(metrics) == {("INSTALL_AGENT",): pytest.approx(400, abs=31)}


# Odd numbers and ids


async def test_a_negative_count_is_zero(tmp_path: Path) -> None:
    """A retry that names a host that had not failed makes failed_count -1."""
    watching: dict[str, Any] = {"job": {"job_ids": [181]}, "state": MEMORY}
    async with watched(tmp_path, **watching) as daemon:
        await daemon.start()
        job = daemon.nodeman.start_job("INSTALL_AGENT", {HOSTS[0]: "install", HOSTS[1]: None}, duration=20)
        await daemon.sleep_until(70)
        daemon.nodeman.retry(job, extra=1, duration=200, ready_after=100)
        assert job.statistics["failed_count"] == -1
        metrics = await daemon.poll(2)
        for name in ("job_instances", "watched_job_instances"):
            shown = metrics.by(nodeman(name), "status")
            assert shown[("failed",)] == 0
            assert min(shown.values()) == 0
        assert unknown(metrics, "nodeman_job.statistics") == 1
        job.statistics["total_count"] = 20
        shown = (await daemon.poll()).by(nodeman("watched_job_instances"), "status")
        assert sum(shown.values()) == 20


async def test_negative_counters_of_subscriptions_and_tasks(tmp_path: Path) -> None:
    """Negative counts are 0 and unknown values, in every collector."""

    def spoil(path: str, answer: Answer) -> Answer:
        data = answer["data"]
        for name, key in (("status_counter", "RUNNING"), ("status_count", "running_count"), ("os_count", "LINUX")):
            if name in data:
                data[name][key] = -2
        return answer

    collectors: dict[str, Any] = {"subscription": {"subscription_ids": [11]}, "task": {"job_ids": [181]}}
    async with watched(tmp_path, change=spoil, state=MEMORY, **collectors) as daemon:
        daemon.nodeman.start_subscription("RESTART_AGENT", {HOSTS[0]: None}, duration=600)
        daemon.nodeman.start_legacy_task(2, "INSTALL_PAGENT", {HOSTS[0]: None}, duration=600)
        await daemon.start()
        metrics = await daemon.poll(3)
        assert metrics.by(nodeman("subscription_instances"), "status") == {("running",): 0}
        assert metrics.by(nodeman("task_hosts"), "status")[("running",)] == 0
        assert metrics.by(nodeman("task_hosts_by_os"), "os_type")[("LINUX",)] == 0
        for field in ("nodeman_subscription.status_counter", "nodeman_task.status_count", "nodeman_task.os_count"):
            assert unknown(metrics, field) == 1


@pytest.mark.parametrize("time", [1e30, 10**30, "9" * 40])
async def test_F66_a_time_beyond_every_calendar_blocks_nothing(tmp_path: Path, time: object) -> None:
    """No `internal` error; the job and its host are counted, without a duration."""

    def spoil(path: str, answer: Answer) -> Answer:
        data = answer["data"]
        for row in [data, *data.get("list", [])]:
            for name in ("end_time", "finish_time"):
                if row.get(name):
                    row[name] = time
        return answer

    collectors: dict[str, Any] = {
        "job": {}, "subscription": {"subscription_ids": [11]}, "task": {"job_ids": [181]},
    }  # fmt: skip
    async with watched(tmp_path, change=spoil, **collectors) as daemon:
        daemon.nodeman.start_subscription("RESTART_AGENT", {HOSTS[0]: "restart"}, duration=40)
        daemon.nodeman.start_legacy_task(2, "INSTALL_PAGENT", {HOSTS[0]: "JOB_TIMEOUT"}, duration=40)
        await daemon.start()
        daemon.failing_on("INSTALL_AGENT", HOSTS[2], duration=10)
        await daemon.sleep_until(100)
        assert unknown(await daemon.poll(), "nodeman_job.end_time") == 1
        await daemon.restart()
        metrics = await daemon.poll()
        for collector in ("nodeman_job", "nodeman_subscription", "nodeman_task"):
            assert own(metrics, "success", collector=collector) == 1, collector
            assert own(metrics, "errors_total", collector=collector, reason="internal") == 0
        assert finished(metrics) == {("INSTALL_AGENT", "failed"): 1}
        assert sum(failures(metrics).values()) == 3
        assert durations(metrics) == {}
        assert all(EPOCH <= at <= EPOCH + 300 for at in since(metrics).values())


async def test_F66_a_job_with_an_impossible_id_blocks_nothing(tmp_path: Path) -> None:
    """The row is left out and named; the other jobs, also those on the pages after it, are counted."""

    def spoil(path: str, answer: Answer) -> Answer:
        for row in answer["data"].get("list", []) if "job_list" in path else ():
            if row["id"] == 600:
                row["id"] = 2**63
        return answer

    async with watched(tmp_path, change=spoil, job={}, state=MEMORY) as daemon:
        for number in range(510):
            daemon.nodeman.start_job("RESTART_AGENT", {HOSTS[number % 40]: None}, duration=10)
        await daemon.sleep_until(60)
        await daemon.start()
        metrics = await daemon.metrics()
        assert own(metrics, "success") == 1
        assert metrics.get(nodeman("job_instances"), job_type="RESTART_AGENT", status="success") == 509
        for page in (metrics, await daemon.poll(3)):
            assert unknown(page, "nodeman_job.id") == own(page, "truncated_total") == 1


async def test_4_1_12_a_reused_id_is_another_job(tmp_path: Path) -> None:
    """A known id with another start is counted anew, and so are its hosts; the same for a task of 1.x."""
    async with watched(tmp_path, job={}, task={"job_ids": [181]}) as daemon:
        await daemon.start()
        job = daemon.failing_on("INSTALL_AGENT", HOSTS[0], duration=20)
        task = daemon.nodeman.start_legacy_task(2, "INSTALL_PAGENT", {HOSTS[0]: "JOB_TIMEOUT"})
        await daemon.poll()
        await daemon.sleep_until(100)
        metrics = await daemon.poll()
        assert finished(metrics) == {("INSTALL_AGENT", "failed"): 1}
        assert sum(failures(metrics).values()) == 2
        del daemon.nodeman.jobs[job.id]
        daemon.nodeman._ids["job"] -= 1
        assert daemon.failing_on("INSTALL_AGENT", HOSTS[0], duration=20).id == job.id
        task.start_time = daemon.now()
        task.hosts = [LegacyHost(40, HOSTS[0], daemon.now(), daemon.now() + 5, "JOB_TIMEOUT")]
        await daemon.sleep_until(200)
        metrics = await daemon.poll()
        assert finished(metrics) == {("INSTALL_AGENT", "failed"): 2}
        assert sum(failures(metrics).values()) == 4


# Subscriptions


async def test_the_step_of_a_second_step(tmp_path: Path) -> None:
    """Job_details then names a sub-step that succeeded, so the job says `other`; task_result knows it."""
    async with watched(tmp_path, job={}, subscription={"subscription_ids": [11]}, state=MEMORY) as daemon:
        await daemon.start()
        hosts = {HOSTS[0]: "install_package", HOSTS[1]: "restart"}
        daemon.nodeman.start_job("RESTART_AGENT", hosts, duration=110, second="MAIN_INSTALL_PLUGIN")
        await daemon.sleep_until(200)
        metrics = await daemon.poll()
        assert failures(metrics) == {
            ("nodeman_job", "RESTART_AGENT", "other", ""): 1,
            ("nodeman_job", "RESTART_AGENT", "restart", ""): 1,
            ("nodeman_subscription", "MAIN_INSTALL_PLUGIN", "install_package", ""): 1,
            ("nodeman_subscription", "RESTART_AGENT", "restart", ""): 1,
        }
        steps = metrics.by(nodeman("step_duration_seconds_count"), "job_type", "step")
        assert steps[("MAIN_INSTALL_PLUGIN", "install_package")] == 1
        assert steps[("RESTART_AGENT", "restart")] == 2


@pytest.mark.parametrize("bare", [True, False])
async def test_a_subscription_without_a_counter_is_counted_from_its_rows(tmp_path: Path, bare: bool) -> None:
    """The counter is optional; an older platform answers a bare list of everything whatever is asked."""
    hosts: dict[Target, str | None] = {Target(2, f"10.9.{n // 250}.{n % 250}", 5000 + n): None for n in range(700)}
    failed = list(hosts)[::100]
    hosts |= dict.fromkeys(failed, "restart")

    def old(path: str, answer: Answer) -> Answer:
        if "task_result" in path and answer["result"]:
            del answer["data"]["status_counter"]
            if bare:
                answer["data"] = everything()
        return answer

    def everything() -> list[object]:
        subscription = daemon.nodeman.subscriptions[11]
        records = subscription.latest([max(subscription.tasks)])
        api = NodemanApi(daemon.nodeman)
        call = Call("task_result", "gateway", True, "POST", "/", {}, {}, "zh", daemon.now())
        return [api._instance_row(subscription, record, daemon.now(), False, call) for record in reversed(records)]

    async with watched(tmp_path, change=old, subscription={"subscription_ids": [11]}, state=MEMORY) as daemon:
        policy = daemon.nodeman.start_subscription("RESTART_AGENT", hosts, duration=60)
        await daemon.start()
        metrics = await daemon.metrics()
        status = nodeman("subscription_instances")
        assert metrics.by(status, "status") == {("running",): 700}
        await daemon.sleep_until(100)
        metrics = await daemon.poll(2)
        assert metrics.by(status, "status") == {("failed",): 7, ("success",): 693}
        failure = ("nodeman_subscription", "RESTART_AGENT", "restart", "")
        assert failures(metrics) == failing(metrics) == {failure: 7}
        daemon.nodeman.run_task(policy, dict.fromkeys(failed[:3]), duration=20)
        await daemon.sleep_until(200)
        metrics = await daemon.poll(2)
        assert metrics.by(status, "status") == {("success",): 3}
        assert failing(metrics) == {failure: 4}
        assert failures(metrics) == {failure: 7}


async def test_a_subscription_whose_newest_task_could_not_be_created(tmp_path: Path) -> None:
    """3800014: its earlier tasks are shown and continue, the log names it, the others are as before."""
    collector = "nodeman_subscription"
    with capture_logs() as logged:
        async with watched(tmp_path, subscription={"subscription_ids": [11, 12]}) as daemon:
            first = daemon.nodeman.start_subscription(
                "RESTART_AGENT", {HOSTS[0]: "restart", HOSTS[1]: None}, duration=20
            )
            daemon.nodeman.start_subscription("RESTART_AGENT", {HOSTS[2]: None}, duration=20)
            await daemon.start()
            await daemon.sleep_until(60)
            before = await daemon.poll()
            daemon.nodeman.run_task(first, {}, err_msg="no such module")
            metrics = await daemon.poll(3)
            status = nodeman("subscription_instances")
            expected = {("11", "failed"): 1, ("11", "success"): 1, ("12", "success"): 1}
            assert metrics.by(status, "subscription_id", "status") == expected
            assert failing(metrics) == failing(before)
            assert own(metrics, "success", collector=collector) == 1
            assert own(metrics, "errors_total", collector=collector, reason="api_error") == 3
            first.tasks[min(first.tasks)].records[0].begin_run(daemon.now() + 5, 20, None)
            await daemon.sleep_until(daemon.loop.time() + 40)
            metrics = await daemon.poll()
            assert failing(metrics) == {}
            assert failures(metrics) == failures(before)
    told = {(line["about"], line["consequence"]) for line in logged if line["event"] == "call_failed"}
    assert told == {("subscription 11", "shown as of its earlier tasks")}


async def test_a_subscription_whose_pipeline_is_missing(tmp_path: Path) -> None:
    """3800500 when rows are asked for: the counter is shown, what cannot be read is counted as truncated.

    Once the rows can be read again nothing is lost.
    """
    collector = "nodeman_subscription"
    async with watched(tmp_path, subscription={"subscription_ids": [11, 12]}) as daemon:
        first = daemon.nodeman.start_subscription("RESTART_AGENT", {HOSTS[0]: "restart", HOSTS[1]: None}, duration=90)
        daemon.nodeman.start_subscription("RESTART_AGENT", {HOSTS[2]: "restart"}, duration=90)
        await daemon.start()
        task = first.tasks[min(first.tasks)]
        task.tree = False
        await daemon.sleep_until(150)
        metrics = await daemon.poll(3)
        status = nodeman("subscription_instances")
        expected = {("11", "failed"): 1, ("11", "success"): 1, ("12", "failed"): 1}
        assert metrics.by(status, "subscription_id", "status") == expected
        assert own(metrics, "success", collector=collector) == 1
        assert own(metrics, "truncated_total", collector=collector) == 1
        assert sum(failing(metrics).values()) == 1
        task.tree = True
        metrics = await daemon.poll(2)
        assert sum(failing(metrics).values()) == 2
        assert sum(failures(metrics).values()) == 2


async def test_a_backend_without_the_gateways_token_is_auth(tmp_path: Path) -> None:
    """HTTP 200 with code 3800018."""

    def refuse(path: str, answer: Answer) -> Answer:
        return {"result": False, "code": 3800018, "data": None, "message": "no JWT（3800018）", "errors": None}

    async with watched(tmp_path, change=refuse, job={}, state=MEMORY) as daemon:
        await daemon.start()
        assert own(await daemon.metrics(), "errors_total", reason="auth") == 1


# The platform's clock


@pytest.mark.parametrize("days", [8, -8])
async def test_F58_one_wrong_date_changes_nothing(tmp_path: Path, days: int) -> None:
    """4.1.10: no running job is lost, no job is forgotten before its retry, no host let go, nothing counted twice."""
    collectors: dict[str, Any] = {"job": {}, "subscription": {"subscription_ids": [11]}, "task": {"job_ids": [181]}}
    async with watched(tmp_path, **collectors) as daemon:
        daemon.nodeman.start_subscription("RESTART_AGENT", {HOSTS[0]: "restart"}, duration=20)
        daemon.nodeman.start_legacy_task(2, "INSTALL_PAGENT", {HOSTS[0]: "JOB_TIMEOUT"}, duration=20)
        await daemon.start()
        failed = daemon.failing_on("INSTALL_AGENT", HOSTS[1], duration=20)
        daemon.nodeman.start_job("INSTALL_AGENT", {HOSTS[2]: "install"}, duration=600)
        await daemon.sleep_until(120)
        before = await daemon.poll()
        assert sum(failing(before).values()) == 3
        for api in ("job_list", "task_result", "get_task_info"):
            daemon.fault("clock_skew", api=api, value=days * DAY, times=1)
        metrics = await daemon.poll(3)
        assert since(metrics) == since(before)
        assert failing(metrics) == failing(before)
        assert metrics.by(nodeman("jobs_unfinished"), "status") == {("running",): 1}
        daemon.nodeman.retry(failed, duration=20)
        await daemon.sleep_until(700)
        metrics = await daemon.poll(2)
        assert finished(metrics) == {("INSTALL_AGENT", "failed"): 2, ("INSTALL_AGENT", "success"): 1}
        assert (
            sum(
                failures(
                    metrics,
                ).values()
            )
            == 4
        )
