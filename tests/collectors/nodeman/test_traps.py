"""Where the vendor's documents of NodeMan and reality differ: what the daemon makes of each, over real HTTP.

The numbers are those of the list of traps in the facts about the APIs; 26 and 27 are the gateway's and the ESB's.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from exporter.simulator.nodeman_world import PLANS, REMOVED, Filtered, Target
from tests.support.daemon import BIZ, EPOCH
from tests.support.nodeman import (
    HOSTS,
    OTHER,
    Nodeman,
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
MEMORY = {"url": "memory:"}


@pytest.mark.parametrize("hours", [8.0, 0.0, -3.5])
async def test_trap_16_times_with_and_without_a_zone(tmp_path: Path, hours: float) -> None:
    """Jobs carry the offset of the server, subscriptions none: both end at the same moment. cost_time, text or float
    and without its days, is not read."""

    def spoil(path: str, answer: dict[str, Any]) -> dict[str, Any]:
        for row in [answer["data"], *answer["data"].get("list", [])]:
            if "cost_time" in row:
                row["cost_time"] = "not a number"
        return answer

    sign, minutes = "-" if hours < 0 else "+", int(abs(hours) * 60)
    zone = f"{sign}{minutes // 60:02d}:{minutes % 60:02d}"
    watching = watched(tmp_path, change=spoil, job={}, subscription={"subscription_ids": [11]}, state=MEMORY)
    async with watching as daemon:
        daemon.nodeman.utc_offset = hours
        blueking = daemon._settings["blueking"] | {"timezone": zone}
        daemon.top(blueking=blueking)
        policy = daemon.nodeman.start_subscription("INSTALL_AGENT", {HOSTS[1]: "install"}, duration=40)
        assert policy.id == 11
        await daemon.start()
        daemon.failing_on("INSTALL_AGENT", HOSTS[0], duration=40)
        await daemon.sleep_until(100)
        metrics = await daemon.poll()
        job, subscription = (since(metrics, collector=name) for name in ("nodeman_job", "nodeman_subscription"))
        assert list(job.values()) == list(subscription.values()) == [EPOCH + 40]
        assert metrics.get(nodeman("job_duration_seconds_sum"), job_type="INSTALL_AGENT") == 50


async def test_trap_17_the_status_condition_is_a_list(tmp_path: Path) -> None:
    """A plain text, as in the vendor's example, matches nothing; so every condition that is sent holds a list."""
    async with watched(tmp_path, job={}, state=MEMORY) as daemon:
        await daemon.start()
        daemon.failing_on("INSTALL_AGENT", HOSTS[0], duration=10)
        await daemon.sleep_until(60)
        assert failures(await daemon.poll()) == {INSTALL: 1}
        conditions = [call.params["conditions"] for call in daemon.details() if "conditions" in call.params]
        assert conditions
        assert all(one == [{"key": "status", "value": ["FAILED"]}] for one in conditions)


async def test_trap_18_filtered_and_removed_hosts(tmp_path: Path) -> None:
    """Filtered hosts come on every page and are outside the total; they and the removed ones are no results."""
    hosts = [Target(2, f"10.9.{n // 250}.{n % 250}", 5000 + n) for n in range(700)]
    async with watched(tmp_path, job={}, state=MEMORY) as daemon:
        await daemon.start()
        # Without a stored status it is shown as FAILED and counted as IGNORED.
        filtered = [Filtered(host, "x") for host in HOSTS[:30]]
        outcomes: dict[Target, str | None] = dict.fromkeys(hosts, "install")
        outcomes[HOSTS[35]] = REMOVED
        daemon.nodeman.start_job("INSTALL_AGENT", outcomes, duration=10, filtered=filtered)
        await daemon.sleep_until(60)
        metrics = await daemon.poll()
        assert failures(metrics) == failing(metrics) == {INSTALL: 700}
        shown = metrics.by(nodeman("job_instances"), "status")
        assert {status: value for (status,), value in shown.items() if value} == {"failed": 700, "ignored": 30}
        assert [int(str(call.params["page"])) for call in daemon.details()] == [1, 2]


async def test_trap_19_reading_details_is_left_to_what_needs_it(tmp_path: Path) -> None:
    """Details write: they are not read while nothing failed, so the platform itself sets the end, up to 30 s late."""
    async with watched(tmp_path, job={"interval": "10s"}, state=MEMORY) as daemon:
        await daemon.start()
        job = daemon.nodeman.start_job("RESTART_AGENT", {HOSTS[0]: None}, duration=55)
        await daemon.sleep_until(100)
        metrics = await daemon.poll()
        assert daemon.details() == []
        assert job.end_time == EPOCH + 80
        assert metrics.get(nodeman("job_duration_seconds_sum"), job_type="RESTART_AGENT") == 80


async def test_trap_19_an_end_that_our_own_read_wrote_is_the_same_run(tmp_path: Path) -> None:
    """Reading the failed hosts of a running job after its last host ends it on the platform: counted once."""
    async with watched(tmp_path, job={"interval": "10s"}, state=MEMORY) as daemon:
        await daemon.start()
        job = daemon.nodeman.start_job("RESTART_AGENT", {HOSTS[0]: "restart", HOSTS[1]: None}, duration=49)
        # One host fails just before the statistics task, the other ends just after it.
        first, second = job.subscription.tasks[job.task_ids[0]].records
        first.runs[0].end, first.runs[0].ends = EPOCH + 49, [EPOCH + 49]
        second.runs[0].end, second.runs[0].ends = EPOCH + 51, [EPOCH + 51]
        await daemon.sleep_until(50.5)
        await daemon.poll(3)
        assert job.end_time is not None
        assert job.end_time < EPOCH + 80, "our read has ended it, before the statistics task"
        metrics = await daemon.poll(6)
        assert finished(metrics) == {("RESTART_AGENT", "part_failed"): 1}
        assert failures(metrics) == {("nodeman_job", "RESTART_AGENT", "restart", ""): 1}


async def test_trap_20_a_task_that_is_not_ready(tmp_path: Path) -> None:
    """3800015 of task_result is counted and skipped; the job is pending, which is no error."""
    watching = watched(tmp_path, job={}, subscription={"subscription_ids": [11]}, state=MEMORY)
    async with watching as daemon:
        daemon.nodeman.start_job("MAIN_INSTALL_PLUGIN", {HOSTS[0]: None}, duration=10, ready_after=100)
        await daemon.start()
        metrics = await daemon.poll()
        assert metrics.by(nodeman("jobs_unfinished"), "status") == {("pending",): 1}
        for collector, errors in (("nodeman_job", 0), ("nodeman_subscription", 2)):
            assert own(metrics, "success", collector=collector) == 1
            assert own(metrics, "errors_total", collector=collector, reason="not_ready") == errors
        await daemon.sleep_until(200)
        metrics = await daemon.poll()
        assert finished(metrics) == {("MAIN_INSTALL_PLUGIN", "success"): 1}
        assert metrics.by(nodeman("subscription_instances"), "status") == {("success",): 1}


async def test_trap_21_never_the_bare_list(tmp_path: Path) -> None:
    """Without pagesize task_result is a bare array of everything: each call gives one, of at most 500."""
    hosts = {Target(2, f"10.9.{n // 250}.{n % 250}", 5000 + n): "restart" for n in range(1100)}
    async with watched(tmp_path, subscription={"subscription_ids": [11]}, state=MEMORY) as daemon:
        daemon.nodeman.start_subscription("RESTART_AGENT", dict(hosts), duration=20)
        await daemon.start()
        await daemon.sleep_until(100)
        metrics = await daemon.poll()
        assert sum(failures(metrics).values()) == 1100
        calls = daemon.calls(api="task_result")
        assert all(0 <= int(str(call.params["pagesize"])) <= 500 for call in calls)
        assert not any("return_all" in call.params for call in calls)


async def test_trap_22_only_statuses_that_occur(tmp_path: Path) -> None:
    """status_counter leaves out what is zero: a status that no instance has any more leaves the page."""
    async with watched(tmp_path, subscription={"subscription_ids": [11]}, state=MEMORY) as daemon:
        daemon.nodeman.start_subscription("RESTART_AGENT", {HOSTS[0]: None, HOSTS[1]: "restart"}, duration=60)
        await daemon.start()
        shown = nodeman("subscription_instances")
        assert (await daemon.metrics()).by(shown, "status") == {("running",): 2}
        await daemon.sleep_until(100)
        assert (await daemon.poll()).by(shown, "status") == {("failed",): 1, ("success",): 1}


async def test_trap_23_a_full_last_page_is_not_asked_beyond(tmp_path: Path) -> None:
    """A page past the end of job_list is an error: with exactly 500 jobs the baseline asks for one page of each."""
    async with watched(tmp_path, job={}, state=MEMORY) as daemon:
        for number in range(500):
            daemon.nodeman.start_job("RESTART_AGENT", {HOSTS[number % 40]: None}, duration=10)
        await daemon.sleep_until(60)
        await daemon.start()
        metrics = await daemon.metrics()
        assert own(metrics, "success") == 1
        assert [call.params["page"] for call in daemon.calls(api="job_list")] == [1, 1]
        assert metrics.get(nodeman("job_instances"), job_type="RESTART_AGENT", status="success") == 500


async def test_trap_23_a_list_that_shrinks_while_it_is_read_fails_one_poll(tmp_path: Path) -> None:
    """The second page has gone when it is asked for: 3800500 fails the poll, nothing is half registered."""
    removed: list[int] = []

    def shrink(path: str, answer: dict[str, Any]) -> dict[str, Any]:
        if "job_list" in path and len((answer["data"] or {}).get("list", [])) == 500 and not removed:
            removed.extend(list(daemon.nodeman.jobs)[:5])
            for number in removed:
                del daemon.nodeman.jobs[number]
        return answer

    async with watched(tmp_path, change=shrink, job={}, state=MEMORY) as daemon:
        for number in range(503):
            daemon.nodeman.start_job("RESTART_AGENT", {HOSTS[number % 40]: None}, duration=10)
        await daemon.sleep_until(60)
        await daemon.start()
        metrics = await daemon.metrics()
        assert own(metrics, "success") == 0
        assert own(metrics, "errors_total", reason="api_error") == 1
        metrics = await daemon.poll()
        assert metrics.get(nodeman("job_instances"), job_type="RESTART_AGENT", status="success") == 498


async def test_trap_23_a_missing_permission_is_an_empty_list(tmp_path: Path) -> None:
    """job_list leaves out what one may not see: a known job that is missing is asked for itself, and refused."""
    async with watched(tmp_path, job={}, state=MEMORY) as daemon:
        await daemon.start()
        daemon.failing_on("INSTALL_AGENT", HOSTS[0], duration=10)
        await daemon.sleep_until(60)
        await daemon.poll()
        daemon.fault("permission", api="job_list")
        daemon.fault("permission", api="job_details")
        metrics = await daemon.poll()
        assert own(metrics, "success") == 0
        assert own(metrics, "errors_total", reason="permission") == 1
        assert finished(metrics) == {("INSTALL_AGENT", "failed"): 1}


async def test_trap_23_jobs_of_other_businesses_fail_the_poll(tmp_path: Path) -> None:
    """4.1.14: a list that ignores the business is decode; none of its rows is taken for this one's."""

    def foreign(path: str, answer: dict[str, Any]) -> dict[str, Any]:
        for row in answer["data"]["list"]:
            row["bk_biz_scope"] = [3]
        return answer

    async with watched(tmp_path, job={}, change=foreign, state=MEMORY) as daemon:
        for host in HOSTS[:3]:
            daemon.nodeman.start_job("INSTALL_AGENT", {host: "install"}, duration=10)
        await daemon.start()
        await daemon.sleep_until(100)
        metrics = await daemon.poll()
        assert own(metrics, "success") == 0
        assert own(metrics, "errors_total", reason="decode") >= 2
        assert metrics.by(nodeman("job_instances"), "status") == {}
        assert failing(metrics) == {}


async def test_trap_24_text_codes_and_localized_messages(tmp_path: Path) -> None:
    """ "9900403" as text is a permission: the missing action is named, the message of the platform is not repeated."""
    async with watched(tmp_path, job={"discover": False, "job_ids": [181]}, state=MEMORY) as daemon:
        daemon.failing_on("INSTALL_AGENT", HOSTS[0], duration=10, created_by="somebody")
        daemon.nodeman.denied = {2}
        await daemon.start()
        metrics = await daemon.metrics()
        assert own(metrics, "errors_total", reason="permission") == 1
        _, body = await daemon.ask("/api/v1/status")
        assert "task_history_view" in body.decode()
        assert "当前用户" not in body.decode()


async def test_trap_25_the_route_of_1x_is_gone(tmp_path: Path) -> None:
    """NodeMan 2.x answers HTML 404, which the ESB makes 1306201: http_5xx, and the other collectors continue."""
    async with watched(tmp_path, job={}, task={"job_ids": [181]}, state=MEMORY) as daemon:
        daemon.nodeman.start_legacy_task(2, "INSTALL_PAGENT", {HOSTS[0]: None})
        await daemon.start()
        metrics = await daemon.metrics()
        assert metrics.by(nodeman("task_hosts"), "job_id", status="running") == {("181",): 1}, "text ids and code OK"
        daemon.nodeman.legacy = False
        metrics = await daemon.poll()
        assert own(metrics, "success", collector="nodeman_task") == 0
        assert own(metrics, "errors_total", collector="nodeman_task", reason="http_5xx") == 1
        assert own(metrics, "success", collector="nodeman_job") == 1


async def test_trap_28_a_redirect_to_the_login_is_not_followed(tmp_path: Path) -> None:
    """A direct call to NodeMan without the gateway's token ends at a login page: reason auth, one request."""
    async with watched(tmp_path, job={}, state=MEMORY) as daemon:
        daemon.fault("login_redirect")
        await daemon.start()
        metrics = await daemon.metrics()
        assert own(metrics, "errors_total", reason="auth") == 1
        assert len(daemon.calls()) == 1


@pytest.mark.parametrize("language", ["zh", "en"])
async def test_trap_29_no_localized_text_gets_into_a_label(tmp_path: Path, language: str) -> None:
    """Steps are codes whatever the language of the platform; no label of NodeMan holds anything but words."""

    def speak(path: str, answer: dict[str, Any]) -> dict[str, Any]:
        for row in (answer["data"] or {}).get("list", []):
            name = row.get("step")
            if name and language == "en":
                row["step"] = next(step.en for steps in PLANS.values() for step in steps if step.zh == name)
        return answer

    collectors: dict[str, Any] = {"job": {}, "subscription": {"subscription_ids": [11]}, "task": {"job_ids": [181]}}
    async with watched(tmp_path, change=speak, scopes=(BIZ, OTHER), state=MEMORY, **collectors) as daemon:
        await _fail_in_every_step(daemon)
        metrics = await daemon.poll()
        truth = daemon.ledger.host_failures(2, "nodeman_job", EPOCH)
        shown = failures(metrics)
        assert {labels: value for labels, value in shown.items() if labels[0] == "nodeman_job"} == truth
        assert {step for _, _, step, _ in truth} == {step.code for steps in PLANS.values() for step in steps}
        for name, labels in metrics.samples:
            if name.startswith("blueking_nodeman_"):
                assert all(re.fullmatch(r"[\w.:+]*", value, re.ASCII) for _, value in labels), labels


async def _fail_in_every_step(daemon: Nodeman) -> None:
    daemon.nodeman.start_subscription("MAIN_INSTALL_PLUGIN", {HOSTS[0]: "install_package"}, duration=10)
    daemon.nodeman.start_legacy_task(2, "INSTALL_PAGENT", {HOSTS[0]: "JOB_TIMEOUT"}, duration=10)
    await daemon.start()
    for job_type, steps in PLANS.items():
        outcomes = {host: step.code for host, step in zip(HOSTS, steps, strict=False)}
        daemon.nodeman.start_job(job_type, dict(outcomes), duration=20)
    await daemon.sleep_until(100)
