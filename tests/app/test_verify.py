"""`verify` compares what was counted with what the platform shows when it is read again.

Hours of polling pass in virtual time. Between the exporter and the simulated platform is a `mirror`, which changes
answers where a test says so.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import functools
import json
import math
import re
import signal
import subprocess
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import yaml
from aiohttp import web

from exporter.clock import Clock
from exporter.config.load import load
from exporter.simulator import nodeman_api
from exporter.simulator.faults import Fault
from exporter.simulator.nodemgr_world import Domain, Part, Workflow
from exporter.simulator.server import SimulatorServer, create_platform, sample_config
from exporter.simulator.world import Deviation, StepScript, target
from exporter.verify.answers import Redactor
from exporter.verify.command import verify
from exporter.verify.members import is_documented, read_members
from tests.support.components import eventually
from tests.support.daemon import BIZ, EPOCH, LIST, STATUS, Daemon, daemon
from tests.support.nodeman import FOREIGN, HOSTS, Nodeman, watched
from tests.support.nodemgr import FOREIGN as V3_FOREIGN
from tests.support.nodemgr import HOSTS as V3_HOSTS
from tests.support.nodemgr import Nodemgr
from tests.support.nodemgr import watched as watched_v3
from tests.support.paths import FIXTURES
from tests.support.process import PROGRAM, Simulated, command, configuration

pytestmark = pytest.mark.looptime(noop_cycles=2)

SECRET, NAME, IP, ID = "canary-s3cret-value", "canary-name", "10.254.3.77", 987_654_321
FINISHED = "blueking_job_executions_finished_total"

Change = Callable[[str, Any], None]
"""Called with the path of a request and the answer as JSON, which it may change."""


@contextlib.asynccontextmanager
async def mirror(
    url: str, change: Change, ids: Mapping[str, int] | None = None, *, until: float = math.inf
) -> AsyncIterator[str]:
    """A server that forwards all requests to `url` and changes the answers by `change` for `until` seconds; yields its
    own URL. `ids`: the true ids of executions by the ids that the answers show."""
    end = asyncio.get_running_loop().time() + until
    async with aiohttp.ClientSession() as session:

        async def serve(request: web.BaseRequest) -> web.StreamResponse:
            headers = {name: value for name, value in request.headers.items() if name.startswith(("X-", "Content-T"))}
            address = url + request.path_qs
            for shown, true in (ids or {}).items():
                address = address.replace(shown, str(true))
            sent = session.request(
                request.method, address, headers=headers, data=await request.read(), allow_redirects=False
            )
            async with sent as answer:
                body, date = await answer.json(content_type=None), answer.headers["Date"]
            if asyncio.get_running_loop().time() < end:
                change(request.path, body)
            return web.json_response(body, status=answer.status, headers={"Date": date})

        runner = web.ServerRunner(web.Server(serve, access_log=None), shutdown_timeout=0.1)
        await runner.setup()
        try:
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            yield f"http://127.0.0.1:{runner.addresses[0][1]}"
        finally:
            await runner.cleanup()


def rows(body: Any) -> list[dict[str, Any]]:
    """The rows in an answer of JOB's list."""
    found: list[dict[str, Any]] = body["data"]["job_instance_list"]
    return found


async def run(one: Daemon, seconds: float, record: Path | None = None) -> tuple[bool, list[str]]:
    """Verify for so many seconds. Returns whether everything agrees, and the lines."""
    clock = Clock(lambda: EPOCH + one.loop.time(), one.monotonic)
    found = [line async for line in verify(load(one.file).config, seconds, record, clock)]
    return all(good for _, good in found), [line for line, _ in found]


def wrong(lines: list[str]) -> list[str]:
    return [line for line in lines if line.startswith(("DIFF", "FAIL"))]


def after(one: Daemon, seconds: float, event: Callable[[], object]) -> None:
    one.world.at(one.ms + round(seconds * 1000), lambda: (event(), None)[1])


# JOB


@pytest.mark.parametrize("api", ["v4", "v3", "esb"])
@pytest.mark.parametrize("host_results", ["failed", "all", "none"])
async def test_a_correct_count_is_equal(tmp_path: Path, api: str, host_results: str) -> None:
    """Plans, scripts, failures, hosts and running executions: all counters and gauges agree."""
    async with daemon(tmp_path, api=api, job={"host_results": host_results}) as one:

        def start(**arguments: Any) -> None:
            steps = [StepScript(1, 20.0, {target(1): (104, 3), target(2): 310, target(3): 9})]
            one.world.start(BIZ, steps=steps, **arguments)

        start(name="before")
        await asyncio.sleep(60)
        for number in range(12):
            kinds = {"task_type": number % 2, "launch_mode": 1 + number % 3}
            after(one, 30 + 40 * number, functools.partial(start, **kinds))
        after(one, 500, lambda: one.world.start(BIZ, steps=[StepScript(1, 5000.0, {target(4): 9})]))
        after(one, 400, lambda: one.world.start(BIZ, steps=[StepScript(2, 10.0, {target(5): 9, target(6): 303})]))
        good, lines = await run(one, 600)
    assert good, lines
    assert re.fullmatch(r"ok    job biz/2: \d+ values equal, 13 runs finished", lines[0])
    assert len(lines) > 1
    assert all(line.startswith("note  get_job_instance_") for line in lines[1:]), lines


async def test_a_retry_in_the_window_is_no_difference(tmp_path: Path) -> None:
    """Retried twice and then successful; retried and failed with another code; stopped. Earlier runs cannot be read
    again."""
    async with daemon(tmp_path) as one:
        await asyncio.sleep(60)
        ids: dict[str, int] = {}

        def start(name: str, plan_id: int = -1) -> None:
            steps = [StepScript(1, 5.0, {target(1): (104, 3), target(2): 9})]
            ids[name] = one.world.start(BIZ, name=name, steps=steps, plan_id=plan_id)

        after(one, 40, lambda: start("twice"))
        after(one, 120, lambda: one.world.retry(ids["twice"], results={target(1): (104, 4)}))
        after(one, 200, lambda: one.world.retry(ids["twice"]))
        after(one, 50, lambda: start("otherwise"))
        after(one, 150, lambda: one.world.retry(ids["otherwise"], results={target(1): 310}))
        after(one, 60, lambda: ids.update(long=one.world.start(BIZ, steps=[StepScript(1, 900.0, {target(5): 9})])))
        after(one, 250, lambda: one.world.stop(ids["long"]))
        good, lines = await run(one, 600)
    assert good, lines
    assert "note  job biz/2: 2 runs were retried; their earlier ends are as the polls counted them" in lines


async def test_a_retry_that_is_not_noticed_yet_is_no_difference(tmp_path: Path) -> None:
    """The daemon checks only from time to time whether an execution outside of the window runs again; until then there
    is no difference. The same holds for one that failed before the first poll."""
    async with daemon(tmp_path, job={"lookback": "1m"}) as one:
        steps = [StepScript(1, 5.0, {target(1): (104, 3)})]
        old = one.world.start(BIZ, steps=steps)
        await asyncio.sleep(300)
        new = 0

        def start() -> None:
            nonlocal new
            new = one.world.start(BIZ, steps=steps)

        after(one, 40, start)
        after(one, 100, lambda: one.world.retry(old, duration=4.0))
        after(one, 585, lambda: one.world.retry(new, duration=4.0))
        good, lines = await run(one, 600)
    assert good, lines
    assert "note  job biz/2: 1 executions run again; the daemon looks for that from time to time only" in lines


async def test_an_execution_that_was_never_listed_is_named(tmp_path: Path) -> None:
    """It appears in the history longer after its creation than `lookback`: the polls could not count it."""
    async with daemon(tmp_path, job={"lookback": "1m"}) as one:
        await asyncio.sleep(60)
        created = one.ms + 30_000
        late = one.world.start(
            BIZ, steps=[StepScript(1, 5.0, {target(1): (104, 3)})], create_time=created, visible_from=created + 300_000
        )
        good, lines = await run(one, 600)
    assert not good
    assert f"DIFF  job biz/2: executions ended and not counted: {late}" in lines
    labels = 'task_type="script",launch_mode="api"'
    assert (
        f'DIFF  job biz/2: {FINISHED}{{{labels},status="failed"}}: counted 0 while polling, 1 when read again' in lines
    )
    created_total = FINISHED.replace("finished", "created")
    assert f"DIFF  job biz/2: {created_total}{{{labels}}}: counted 0 while polling, 1 when read again" in lines
    failures = 'blueking_job_host_failures_total{code="104",reason="script_nonzero_exit"}'
    assert f"DIFF  job biz/2: {failures}: counted 0 while polling, 1 when read again" in lines


async def test_a_history_that_changes_afterwards_is_named(tmp_path: Path) -> None:
    """A success becomes a failure with the same end, and an execution is archived: both are named."""
    async with daemon(tmp_path) as one:
        await asyncio.sleep(60)
        fine = [StepScript(1, 5.0, {target(1): 9})]
        changed, gone = one.world.start(BIZ, steps=fine), one.world.start(BIZ, steps=fine)
        one.world.advance()

        def change() -> None:
            row = one.world.find(BIZ, changed)
            assert row is not None
            one.world.set_status(changed, 4, end_time=row.end_time)
            one.world.vanish(gone)

        after(one, 599.9, change)
        after(one, 30, lambda: one.world.start(BIZ, steps=fine))
        # What ended within the window is counted as soon as it is listed: the baseline comes first.
        for number in (changed, gone):
            assert one.world.find(BIZ, number) is not None
        good, lines = await run(one, 600)
    assert not good
    assert f"DIFF  job biz/2: executions changed: {changed} (counted as success, is failed)" in lines
    assert f"DIFF  job biz/2: executions counted and not shown any more: {gone}" in lines


async def test_lies_of_the_polls_are_named(tmp_path: Path) -> None:
    """While polling, the list shows failures as successes; when it is read again, it does not."""

    def change(path: str, body: Any) -> None:
        if LIST in path:
            for row in rows(body):
                row["status"] = 3 if row["status"] == 4 else row["status"]

    async with (
        daemon(tmp_path) as one,
        SimulatorServer(one.platform) as server,
        mirror(server.url, change, until=659) as url,
    ):
        one.configure(url)
        await asyncio.sleep(60)
        after(one, 40, lambda: one.world.start(BIZ, steps=[StepScript(1, 5.0, {target(1): (104, 3)})]))
        good, lines = await run(one, 600)
    assert not good
    labels = 'task_type="script",launch_mode="api",status='
    assert f'DIFF  job biz/2: {FINISHED}{{{labels}"failed"}}: counted 0 while polling, 1 when read again' in lines
    assert f'DIFF  job biz/2: {FINISHED}{{{labels}"success"}}: counted 1 while polling, 0 when read again' in lines


async def test_unknown_values_are_named(tmp_path: Path) -> None:
    """An unknown status, type or host code is a difference, also if the counts agree."""

    def change(path: str, body: Any) -> None:
        if LIST in path:
            for row in rows(body):
                row["status"] = 99 if row["status"] == 4 else row["status"]
                row["type"] = 7
        if STATUS in path:
            for step in body["data"]["step_instance_list"]:
                step["step_execute_object_result_list"][0]["status"] = 888

    async with daemon(tmp_path) as one, SimulatorServer(one.platform) as server, mirror(server.url, change) as url:
        one.configure(url)
        await asyncio.sleep(60)
        after(one, 40, lambda: one.world.start(BIZ, steps=[StepScript(1, 5.0, {target(1): (104, 3)})]))
        good, lines = await run(one, 300)
    assert not good
    assert wrong(lines) == [
        "DIFF  job biz/2: job.host.status has the unknown value 888",
        "DIFF  job biz/2: job.status has the unknown value 99",
        "DIFF  job biz/2: job.type has the unknown value 7",
    ]


async def test_members_that_no_document_names_are_named(tmp_path: Path) -> None:
    """A new member at any depth is a failure; a documented one that is not used is a note."""

    def change(path: str, body: Any) -> None:
        if LIST in path:
            body["data"]["next_cursor"] = "x"
            for row in rows(body):
                row["priority"] = {"level": 1}

    async with daemon(tmp_path) as one, SimulatorServer(one.platform) as server, mirror(server.url, change) as url:
        one.configure(url)
        one.world.start(BIZ)
        good, lines = await run(one, 60)
    assert not good
    assert wrong(lines) == [
        "FAIL  get_job_instance_list: data.job_instance_list[].priority is in no document, and not used",
        "FAIL  get_job_instance_list: data.next_cursor is in no document, and not used",
    ]
    assert any("documented, and not used: bk_biz_id" in line for line in lines if line.startswith("note"))


async def test_found_scopes_are_verified(tmp_path: Path) -> None:
    """With discovery the scopes are those of CMDB. A note says that the members of its answers are not checked."""
    async with daemon(tmp_path) as one:
        one.change(scopes=[], discovery={"enabled": True, "biz": {"include": ["*"]}})
        settings = yaml.safe_load(one.file.read_text())
        settings["blueking"]["cmdb"] = {"url": settings["blueking"]["job"]["url"].replace("bk-job", "bk-cmdb")}
        one.file.write_text(yaml.safe_dump(settings))
        good, lines = await run(one, 120)
    assert good, lines
    assert lines[0].startswith("ok    job biz/2: ")
    assert "note  members are not checked in the answers of search" in lines


async def test_a_scope_that_is_refused_fails_and_others_are_verified(tmp_path: Path) -> None:
    """The line names the reason; the other collectors continue."""
    async with daemon(tmp_path) as one:
        one.platform.denied.add(BIZ)
        good, lines = await run(one, 60)
    assert not good
    assert lines[0].startswith("FAIL  job biz/2: no poll was complete: permission; ")


async def test_what_never_stands_still_lies_between_two_polls(tmp_path: Path) -> None:
    """Something happens between any two calls: counters are compared with the polls before and after."""
    async with daemon(tmp_path) as one, SimulatorServer(one.platform) as server:

        def change(path: str, body: Any) -> None:
            if LIST in path:
                one.world.start(BIZ, steps=[StepScript(1, 0.0, {target(1): (104, 3)})])

        async with mirror(server.url, change) as url:
            one.configure(url)
            good, lines = await run(one, 120)
    assert good, wrong(lines)
    assert "note  job biz/2: it changed all the time: counters lie between two polls, gauges are not compared" in lines


async def test_F68_odd_times_are_named_and_nothing_else_differs(tmp_path: Path) -> None:
    """An end in the far future and a start long before the creation are unknown values; all counts agree."""
    async with daemon(tmp_path) as one:
        await asyncio.sleep(60)
        fails = [StepScript(1, 5.0, {target(1): (104, 3)})]
        ahead = Deviation(end_time_ahead=400 * 86400.0)
        after(one, 40, lambda: one.world.start(BIZ, steps=fails, deviation=ahead))
        after(
            one,
            50,
            lambda: one.world.start(BIZ, steps=fails, deviation=Deviation(start_time=one.ms - 400 * 86_400_000)),
        )
        good, lines = await run(one, 300)
    assert not good
    found = wrong(lines)
    assert len(found) == 2, lines
    assert found[0].startswith("DIFF  job biz/2: job.end_time has the unknown value ")
    assert found[1].startswith("DIFF  job biz/2: job.start_time has the unknown value ")


# JOB: hosts that fail, watched jobs

WATCH = [{"name": "back*", "as": "backup", "max_age": "1h"}, {"job_plan_id": 7, "as": "deploy"}]


def plan_failures(one: Daemon) -> None:
    """Hosts that fail twice, that recover in the same plan and in another one; a watched job before the window, in it,
    and one that still runs."""
    fails = [StepScript(1, 5.0, {target(1): (104, 3), target(2): 310, target(3): 9})]
    again = [StepScript(1, 5.0, {target(1): 303}), StepScript(1, 5.0, {target(1): 9, target(4): (104, 1)})]
    fine = [StepScript(1, 5.0, {target(1): 9, target(2): 9})]
    one.world.start(BIZ, name="backup", task_type=0, plan_id=7, steps=fails)
    after(one, 30, lambda: one.world.start(BIZ, name="backup", task_type=0, plan_id=7, steps=fails))
    after(one, 70, lambda: one.world.start(BIZ, name="elsewhere", steps=fine))
    after(one, 110, lambda: one.world.start(BIZ, name="restart", steps=again))
    after(one, 160, lambda: one.world.start(BIZ, name="backup", task_type=0, plan_id=7, steps=fine[:1]))
    after(one, 200, lambda: one.world.start(BIZ, name="restart", steps=again))
    after(one, 330, lambda: one.world.start(BIZ, name="backup 2", steps=[StepScript(1, 5000.0, {target(5): 9})]))


@pytest.mark.parametrize("host_results", ["failed", "all", "none"])
async def test_failing_hosts_and_watched_jobs_are_equal(tmp_path: Path, host_results: str) -> None:
    """Failures in a row, a success of the plan, one elsewhere (known with `all` only), watched jobs."""
    async with daemon(tmp_path, job={"host_results": host_results, "watch": WATCH}) as one:
        plan_failures(one)
        await asyncio.sleep(20)
        good, lines = await run(one, 400)
    assert good, wrong(lines)
    assert lines[0].startswith("ok    job biz/2: "), lines


async def test_lies_about_hosts_are_named(tmp_path: Path) -> None:
    """While polling, the status answers show another code and another end of a host than when they are read again."""

    def change(path: str, body: Any) -> None:
        if STATUS in path:
            for step in body["data"]["step_instance_list"]:
                for result in step["step_execute_object_result_list"]:
                    if result["status"] == 303:
                        result["status"], result["end_time"] = 310, result["end_time"] - 2000

    steps = [StepScript(1, 5.0, {target(1): 303, target(2): (104, 1)})]
    async with (
        daemon(tmp_path) as one,
        SimulatorServer(one.platform) as server,
        mirror(server.url, change, until=219) as url,
    ):
        one.configure(url)
        await asyncio.sleep(20)
        after(one, 60, lambda: one.world.start(BIZ, steps=steps))
        good, lines = await run(one, 200)
    assert not good
    text = "\n".join(wrong(lines))
    failing = "DIFF  job biz/2: blueking_job_hosts_failing"
    assert f'{failing}{{code="310",reason="gse_agent_abnormal"}}: counted 1 while polling, 0 when read again' in text
    assert f'{failing}{{code="303",reason="file_timeout"}}: counted 0 while polling, 1 when read again' in text
    since = 'blueking_job_host_failing_since_timestamp_seconds{bk_cloud_id="0",bk_host_id="101",ip="10.0.0.1",code='
    shown = {
        code: re.search(re.escape(since) + f'"{code}".*counted ([0-9.]+) .*, ([0-9.]+) when', text)
        for code in (303, 310)
    }
    assert shown[303], text
    assert shown[310], text
    assert float(shown[303][2]) - float(shown[310][1]) == pytest.approx(2.0)
    assert 'bk_host_id="102"' not in text


async def test_failures_in_a_row_that_were_missed_are_named(tmp_path: Path) -> None:
    """While polling, the list hides a second failed execution: the host has failed twice in a row, not once."""

    def change(path: str, body: Any) -> None:
        if LIST in path:
            body["data"]["job_instance_list"] = [row for row in rows(body) if row["name"] != "hidden"]

    steps = [StepScript(1, 5.0, {target(1): 303})]
    async with (
        daemon(tmp_path) as one,
        SimulatorServer(one.platform) as server,
        mirror(server.url, change, until=319) as url,
    ):
        one.configure(url, job={"watch": [{"name": "hidden"}], "lookback": "1m"})
        await asyncio.sleep(20)
        after(one, 40, lambda: one.world.start(BIZ, steps=steps))
        after(one, 60, lambda: one.world.start(BIZ, name="hidden", steps=steps))
        after(one, 61, lambda: one.world.start(BIZ, name="hidden", steps=[StepScript(1, 900.0)]))
        good, lines = await run(one, 300)
    assert not good
    text = "\n".join(wrong(lines))
    row = 'blueking_job_host_consecutive_failures{bk_cloud_id="0",bk_host_id="101",ip="10.0.0.1"}'
    assert f"{row}: counted 1 while polling, 2 when read again" in text
    for name in (
        "last_finished_timestamp_seconds",
        "last_duration_seconds",
        "unfinished",
        "unfinished_since_timestamp",
    ):
        assert re.search(f'blueking_job_watched_{name}.*job_name="hidden".*counted 0 while polling', text), name


async def test_a_retry_of_what_ended_just_before_the_window_is_no_difference(tmp_path: Path) -> None:
    """The list of the first poll has it, later lists do not, and it runs again: the daemon has not checked it yet."""
    async with daemon(tmp_path, job={"lookback": "1m"}) as one:
        steps = [StepScript(1, 5.0, {target(1): (104, 3)})]
        old = one.world.start(BIZ, steps=steps)
        await asyncio.sleep(20)
        after(one, 585, lambda: one.world.retry(old, duration=4.0))
        good, lines = await run(one, 600)
    assert good, wrong(lines)


# NodeMan


async def test_nodeman_is_verified(tmp_path: Path) -> None:
    """Jobs, their failed hosts, a retry, a subscription and a task of 1.x are equal."""
    settings: dict[str, Any] = {"job": {}, "subscription": {"subscription_ids": [1]}, "task": {"job_ids": [181]}}
    async with watched(tmp_path, scopes=(BIZ,), **settings) as one:
        policy = one.nodeman.start_subscription(
            "MAIN_RESTART_PLUGIN", {HOSTS[0]: None, HOSTS[1]: "gse_operate_proc"}, duration=20
        )
        task = one.nodeman.start_legacy_task(2, "INSTALL_PAGENT", {HOSTS[2]: "SSH_LOGIN_TIMEOUT", HOSTS[3]: None})
        one.set("nodeman_subscription", subscription_ids=[policy.id])
        one.set("nodeman_task", job_ids=[task.id])
        plan_nodeman(one)
        good, lines = await run(one, 900)
    assert good, wrong(lines)
    assert [line.split(":")[0] for line in lines[:1]] == ["ok    nodeman_job biz/2"]
    assert sum(line.startswith("ok ") for line in lines) == 3
    assert any(line.startswith("ok    nodeman_job biz/2: ") and line.endswith(" 3 runs finished") for line in lines)


def plan_nodeman(one: Nodeman) -> None:
    """A job before the window, one that is running when it begins, one in it with failures, one that is retried."""
    jobs: dict[str, Any] = {}
    begin = one.nodeman.now()
    one.failing_on("INSTALL_AGENT", HOSTS[4], duration=0.0)
    one.nodeman.start_job("UPGRADE_AGENT", {HOSTS[5]: None, HOSTS[6]: None}, duration=120)
    hosts = {HOSTS[0]: "install", HOSTS[1]: None, FOREIGN[0]: "install"}
    one.nodeman.plan(begin + 100, lambda: jobs.update(new=one.nodeman.start_job("INSTALL_AGENT", hosts, duration=60)))
    one.nodeman.plan(begin + 200, lambda: jobs.update(retried=one.failing_on("RESTART_AGENT", HOSTS[2], duration=30)))
    one.nodeman.plan(begin + 500, lambda: (one.nodeman.retry(jobs["retried"], duration=30), None)[1])


async def test_a_revoked_job_is_no_difference(tmp_path: Path) -> None:
    """The platform shows it as terminated first and as failed later; it ended once."""
    async with watched(tmp_path, scopes=(BIZ,), job={"interval": "3s"}) as one:
        begin = one.nodeman.now()
        jobs: list[Any] = []
        hosts = dict.fromkeys(HOSTS[:3])
        one.nodeman.plan(begin + 50, lambda: jobs.append(one.nodeman.start_job("INSTALL_PROXY", hosts, duration=300)))
        one.nodeman.plan(begin + 150, lambda: one.nodeman.revoke(jobs[0]))
        good, lines = await run(one, 600)
        assert jobs[0].status == "FAILED"
    assert good, wrong(lines)
    assert lines[0].endswith(" 1 runs finished")


async def test_no_complete_poll_is_no_proof(tmp_path: Path) -> None:
    """If the platform answers only after the window, nothing is verified."""
    async with daemon(tmp_path) as one:
        one.platform.denied.add(BIZ)
        one.loop.call_later(599, one.platform.denied.clear)
        good, lines = await run(one, 590)
    assert not good
    assert lines[0].startswith("FAIL  job biz/2: no poll was complete: permission; ")


async def test_polls_that_failed_are_reported(tmp_path: Path) -> None:
    """Later polls counted what failed polls missed: no difference, but a note."""
    async with daemon(tmp_path) as one:
        one.platform.faults.add(Fault("refused", api=LIST, every=5, times=2))
        after(one, 40, lambda: one.world.start(BIZ, steps=[StepScript(1, 5.0, {target(1): (104, 3)})]))
        good, lines = await run(one, 600)
    assert good, wrong(lines)
    assert "note  job biz/2: 2 calls or polls failed with the reason api_error; later polls made up for them" in lines


async def test_nodeman_differences_are_named(tmp_path: Path) -> None:
    """A failed job that is shown as a success while polling, and an unknown status."""

    def change(path: str, body: Any) -> None:
        if "job_list" in path:
            for row in body["data"]["list"]:
                if row["status"] == "FAILED":
                    row["status"], row["statistics"] = "SUCCESS", {**row["statistics"], "failed_count": 0}
                if row["job_type"] == "UPGRADE_AGENT":
                    row["status"] = "FROZEN"

    async with contextlib.AsyncExitStack() as stack:
        one = await stack.enter_async_context(watched(tmp_path, scopes=(BIZ,), job={}))
        server = await stack.enter_async_context(SimulatorServer(one.platform))
        one.configure(await stack.enter_async_context(mirror(server.url, change, until=599)), job={})
        begin = one.nodeman.now()
        jobs: list[Any] = []
        start = one.nodeman.start_job
        one.nodeman.plan(begin + 50, lambda: jobs.append(start("INSTALL_AGENT", {HOSTS[0]: "install"}, duration=30)))
        one.nodeman.plan(begin + 60, lambda: jobs.append(start("UPGRADE_AGENT", {HOSTS[1]: None}, duration=30)))
        good, lines = await run(one, 600)
    assert not good
    assert any("nodeman_job.status has the unknown value frozen" in line for line in lines)
    finished = 'blueking_nodeman_jobs_finished_total{job_type="INSTALL_AGENT",status='
    assert any(line.startswith(f'DIFF  nodeman_job biz/2: {finished}"failed"}}: counted 0 ') for line in lines), lines


@pytest.mark.parametrize("lie", ["hosts", "ends"])
async def test_lies_about_failing_hosts_of_nodeman_are_named(tmp_path: Path, lie: str) -> None:
    """While polling, the details show the failed host as a success, or with another end."""

    def change(path: str, body: Any) -> None:
        for row in body["data"]["list"] if "details" in path else ():
            if lie == "ends":
                moved = datetime.datetime.fromisoformat(row["end_time"]) - datetime.timedelta(seconds=9)
                row["end_time"] = moved.strftime("%Y-%m-%d %H:%M:%S%z")
            else:
                row["status"] = "SUCCESS"

    async with contextlib.AsyncExitStack() as stack:
        one = await stack.enter_async_context(watched(tmp_path, scopes=(BIZ,), job={}))
        server = await stack.enter_async_context(SimulatorServer(one.platform))
        one.configure(await stack.enter_async_context(mirror(server.url, change, until=299)), job={})
        begin = one.nodeman.now()
        one.nodeman.plan(begin + 51, lambda: (one.failing_on("INSTALL_AGENT", HOSTS[0], duration=33), None)[1])
        good, lines = await run(one, 300)
    assert not good
    what = "hosts_failing" if lie == "hosts" else "host_failing_since_timestamp_seconds"
    assert any(f"blueking_nodeman_{what}{{" in line for line in wrong(lines)), lines


async def test_hosts_of_subscriptions_and_tasks_are_compared(tmp_path: Path) -> None:
    """A failed host that is shown as a success while polling is named, of a subscription and of a task."""

    def change(path: str, body: Any) -> None:
        if "task_result" in path:
            for row in body["data"]["list"]:
                row["status"] = "SUCCESS"
        if "get_task_info" in path:
            for host in body["data"]["hosts"]:
                host["status"] = "SUCCESS"

    settings: dict[str, Any] = {"subscription": {"subscription_ids": [1]}, "task": {"job_ids": [181]}}
    async with contextlib.AsyncExitStack() as stack:
        one = await stack.enter_async_context(watched(tmp_path, scopes=(BIZ,), **settings))
        server = await stack.enter_async_context(SimulatorServer(one.platform))
        policy = one.nodeman.start_subscription("MAIN_RESTART_PLUGIN", {HOSTS[0]: "gse_operate_proc"}, duration=20)
        task = one.nodeman.start_legacy_task(2, "INSTALL_PAGENT", {HOSTS[2]: "SSH_LOGIN_TIMEOUT"})
        settings = {"subscription": {"subscription_ids": [policy.id]}, "task": {"job_ids": [task.id]}}
        one.configure(await stack.enter_async_context(mirror(server.url, change, until=1019)), **settings)
        await asyncio.sleep(900)
        good, lines = await run(one, 120)
    assert not good
    text = "\n".join(wrong(lines))
    for collector in ("nodeman_subscription", "nodeman_task"):
        assert f'blueking_nodeman_hosts_failing{{collector="{collector}"' in text, lines


# NodeMan V3


def plan_workflows(one: Nodemgr) -> None:
    """Workflows before the window, one that is running when it begins, and in it: failed ones, one retried twice, one
    with hosts of another business, one of plugins, one whose operations end late, and one that still runs."""
    now = one.v3.time

    def part(number: int, state: str, seconds: float = 5.0, plugin: str = "") -> Part:
        return Part(V3_HOSTS[number], state, "wait_gse_ready", round(seconds * 1000), plugin)

    def start(after: float, *parts: Part, domain: Domain = "node", **given: Any) -> Workflow:
        return one.v3.start(domain, f"install_{domain}", parts, at=now + round(after * 1000), **given)

    start(-300, part(0, "failed"))
    early = start(-200, part(1, "failed"), part(2, "failed"))
    one.v3.retry(early, {0: part(1, "success")}, at=now + 100_000)
    start(-20, part(3, "timeout", 90), part(0, "success", 100))
    twice = start(50, part(4, "failed"), part(5, "failed"), part(6, "success"))
    one.v3.retry(twice, {0: part(4, "failed"), 1: part(5, "success")}, at=now + 150_000)
    one.v3.retry(twice, {0: part(4, "success")}, at=now + 300_000)
    start(60, part(7, "terminated"), Part(V3_FOREIGN[0], "failed", "wait_gse_ready", 5000))
    start(70, part(8, "failed", plugin="a"), part(8, "success", 9, plugin="b"), domain="plugin")
    start(80, part(9, "failed"), row_lag=100_000)
    start(90, part(10, "success"))
    start(120, part(11, "success", 9000))


@pytest.mark.parametrize("lookback", ["10m", "1m"])
async def test_nodeman_v3_is_verified(tmp_path: Path, lookback: str) -> None:
    """Ends, retries, durations, failed operations, failing hosts and what still runs are equal."""
    async with watched_v3(tmp_path, scopes=(BIZ,), nodemgr={"lookback": lookback}) as one:
        plan_workflows(one)
        good, lines = await run(one, 600)
    assert good, wrong(lines)
    assert re.fullmatch(r"ok    nodemgr biz/2: \d+ values equal, 7 runs finished", lines[0]), lines
    assert "note  nodemgr biz/2: 1 runs were retried; their earlier ends are as the polls counted them" in lines


AGENT = 'domain="node",workflow_type="install_agent"'
FAILED_HOST = '{collector="nodemgr",job_type="install_agent",step="wait_gse_ready",code="failed"}'


@pytest.mark.parametrize(
    ("lie", "named"),
    [
        ("status", [f'finished_total{{{AGENT},status="failed"}}: counted 0 ', "changed: node/wf:"]),
        ("hidden", [f'finished_total{{{AGENT},status="failed"}}: counted 0 ', "not counted: node/wf:"]),
        ("finish", [f"workflow_duration_seconds_sum{{{AGENT}}}: counted "]),
        ("state", [f"hosts_failing{FAILED_HOST}: counted 0 ", f"host_failures_total{FAILED_HOST}: counted 0 "]),
        ("end", ["host_failing_since_timestamp_seconds{"]),
        ("type", [f"workflows_unfinished{{{AGENT}}}: counted 0 "]),
        (
            "unknown",
            ["nodemgr.status has the unknown value frozen", "nodemgr.operation.state has the unknown value lost"],
        ),
    ],
)
async def test_lies_about_workflows_are_named(tmp_path: Path, lie: str, named: list[str]) -> None:
    """While polling, the lists of workflows and operations show something else than when they are read again."""

    def change(path: str, body: Any) -> None:
        for row in list(body["data"].get("items") or ()):
            if lie == "status" and row["status"] == "failed":
                row["status"] = "success"
            if lie == "hidden":
                body["data"]["items"].remove(row)
            if lie == "type" and row["status"] == "running":
                row["type"] = "upgrade_agent"
            if lie == "finish" and row["finish_time"]:
                row["finish_time"] += 1000
            if lie == "unknown" and row["status"] == "failed":
                row["status"] = "frozen"
        for one in body["data"].get("operations") or ():
            life = one["latest_oper_inst_brief_data"]["life_cycle"]
            if lie in ("state", "unknown") and life["state"] == "failed":
                life["state"] = "timeout" if lie == "state" else "lost"
            if lie == "end":
                life["end_time"] -= 1000

    async with contextlib.AsyncExitStack() as stack:
        one = await stack.enter_async_context(watched_v3(tmp_path, scopes=(BIZ,)))
        server = await stack.enter_async_context(SimulatorServer(one.platform))
        until = math.inf if lie == "unknown" else 299
        url = await stack.enter_async_context(mirror(server.url, change, until=until))
        one.configure_v3(url, {"lookback": "1m"})
        now = one.v3.time
        failed, slow = Part(V3_HOSTS[0], "failed", "wait_gse_ready", 5000), Part(V3_HOSTS[1], "success", "", 9_000_000)
        one.v3.start("node", "install_agent", [failed], at=now + 60_000)
        one.v3.start("node", "install_agent", [slow], at=now + 70_000)
        good, lines = await run(one, 300)
    assert not good
    text = "\n".join(wrong(lines))
    assert not [each for each in named if each not in text], lines


# Members


@pytest.mark.parametrize(
    ("api", "prefixes"),
    [
        (LIST, ("job_v3_list", "job_v4_list", "esb__job_v3_list")),
        (STATUS, ("job_v3_status", "job_v4_status")),
        ("job_list", ("nodeman_job_list",)),
        ("job_details", ("nodeman_job_details",)),
        ("task_result", ("nodeman_task_result",)),
        ("get_task_info", ("nodeman_v2_get_task_info",)),
    ],
)
def test_every_member_of_the_sample_answers_is_read_or_documented(api: str, prefixes: tuple[str, ...]) -> None:
    """Except the members that only `need_detail` returns, which the exporter never requests."""
    members = read_members(api)
    assert members is not None
    files = [
        file
        for file in FIXTURES.glob("*.json")
        if file.name.startswith(prefixes) and "error" not in file.name and "need_detail" not in file.name
    ]
    assert files
    unread = {path for file in files for path in members.unread(json.loads(file.read_text()))}
    assert unread
    assert not [path for path in unread if not is_documented(api, path)]


def test_members_that_are_read_are_not_called_unread() -> None:
    """Aliases, members that are decoded separately, and members whose names are data."""
    members = read_members("task_result")
    assert members is not None
    sub_step = {"node_name": "x", "step_code": None, "status": "FAILED", "start_time": None, "new": 1}
    instance = {"task_id": 1, "steps": [{"actions": "X", "target_hosts": [{"sub_steps": [sub_step]}]}]}
    body = {"data": {"list": [instance], "status_counter": {"ANYTHING": 1}, "total": 1}}
    assert list(members.unread(body)) == ["data.list[].steps[].target_hosts[].sub_steps[].new"]


# Records


async def test_nothing_of_the_site_is_recorded(tmp_path: Path) -> None:
    """No secret, name, address or id is left; members and types are. Each shape once, equal values alike."""

    def change(path: str, body: Any) -> None:
        if LIST in path and isinstance(body.get("data"), dict):
            body["data"]["extra"] = {NAME: {"list": [ID, IP]}, "note": f"{NAME} at {IP} with {SECRET}"}
            for row in rows(body):
                row |= {"name": NAME, "operator": NAME, "job_instance_id": ID, "job_plan_id": ID + 1}
        if STATUS in path and isinstance(body.get("data"), dict):
            body["data"]["job_instance"] |= {"name": NAME, "job_instance_id": ID}
            for step in body["data"]["step_instance_list"]:
                step |= {"name": NAME, "step_instance_id": ID + 2}
                for result in step["step_execute_object_result_list"]:
                    result["tag"] = SECRET
                    result["execute_object"] = {
                        "type": 1, "resource_id": str(ID + 3),
                        "host": {"bk_host_id": ID + 3, "bk_cloud_id": ID + 4, "ip": IP, "ipv6": "fd00:ca::7"},
                    }  # fmt: skip

    record, ids = tmp_path / "record", dict[str, int]()
    async with daemon(tmp_path) as one, SimulatorServer(one.platform) as server, mirror(server.url, change, ids) as url:
        one.configure(url)
        await asyncio.sleep(60)
        steps = [StepScript(1, 5.0, {target(1): (104, 3)})]
        after(one, 40, lambda: ids.update({str(ID): one.world.start(BIZ, steps=steps)}))
        _, lines = await run(one, 120, record)
    files = sorted(record.iterdir())
    assert {file.name.rpartition("-")[0] for file in files} == {LIST, STATUS}
    assert f"note  {len(files)} answers recorded in {record}; read them before you send them" in lines
    text = "".join(file.read_text() for file in files)
    canaries = [SECRET, NAME, IP, "fd00:ca", str(one.ms)[:7], *(str(ID + number) for number in range(5))]
    assert not [canary for canary in canaries if canary in text]
    status = json.loads(next(file.read_text() for file in files if STATUS in file.name))
    data = status["body"]["data"]
    result = data["step_instance_list"][0]["step_execute_object_result_list"][0]
    assert (status["status"], data["job_instance"]["status"], result["status"], result["exit_code"]) == (200, 4, 104, 3)
    assert result["execute_object"]["resource_id"] == str(result["execute_object"]["host"]["bk_host_id"])
    assert data["job_instance"]["name"] == data["step_instance_list"][0]["name"]
    shapes = [json.dumps(_types(json.loads(file.read_text())), sort_keys=True) for file in files]
    assert len(set(shapes)) == len(shapes)


def _types(value: Any) -> Any:
    """The value with types instead of values; a list becomes the set of the types of its items."""
    if isinstance(value, dict):
        return {name: _types(member) for name, member in value.items()}
    if isinstance(value, list):
        return sorted({json.dumps(_types(item), sort_keys=True) for item in value})
    return type(value).__name__


def test_times_are_moved_together_and_words_stay() -> None:
    """Time differences are kept, in every form of a time; a word that is a secret is not kept."""
    copy = Redactor().copy(
        {
            "start_time": 1_795_000_000_000,
            "end_time": 1_795_000_005_250,
            "data": {"start_time": "2026-11-18 10:00:00+0800", "status": "PART_FAILED", "job_type": "it's a name"},
            "status_counter": {"FAILED": 2, "total": 3},
            "message": "boom",
            "error": {"code": "NO_PERMISSION", "type": "dbserver", "dbserver": 1},
        },
        read_members("job_details"),
    )
    assert copy["end_time"] - copy["start_time"] == 5250
    assert copy["start_time"] == 1_577_836_800_000
    assert copy["data"]["start_time"].endswith(":20+0800")
    assert not copy["data"]["start_time"].startswith("2026")
    assert (copy["data"]["status"], copy["data"]["job_type"]) == ("PART_FAILED", "text-1")
    assert copy["status_counter"] == {"FAILED": 2, "total": 3}
    assert copy["message"] == "text-2"
    assert copy["error"] == {"code": "NO_PERMISSION", "type": "text-3", "member-1": 1}, "what is not known may be data"


# The command


def test_the_command_says_equal_or_different(tmp_path: Path) -> None:
    """Exit 0 and `equal`, exit 1 and `different`; nothing is stored."""
    with Simulated(BIZ) as simulated:
        file = tmp_path / "config.yaml"
        file.write_text(json.dumps(configuration(simulated.url)))
        done = command("verify", f"--config.file={file}", "--for=1s")
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.splitlines()[0].startswith("ok    job biz/2: ")
        assert done.stdout.splitlines()[-1] == "equal"
        assert [each.name for each in tmp_path.iterdir()] == ["config.yaml"]
        simulated.fault("bad_credentials")
        done = command("verify", f"--config.file={file}", "--for=1s")
        assert done.returncode == 1
        assert done.stdout.splitlines()[-1] == "different"
        assert "simulated" not in done.stdout.replace("simulated BlueKing", "")


def test_interrupted_it_has_not_verified(tmp_path: Path) -> None:
    """Ctrl-C while it polls: exit 1 and one line on standard error, no result."""
    with Simulated(BIZ) as simulated:
        file = tmp_path / "config.yaml"
        file.write_text(json.dumps(configuration(simulated.url)))
        arguments = [*PROGRAM, "verify", f"--config.file={file}"]
        with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            try:
                eventually(lambda: simulated.calls() > 12, 20, 0.05)
                process.send_signal(signal.SIGINT)
                out, err = process.communicate(timeout=20)
            finally:
                process.kill()
    assert (process.returncode, out) == (1, "")
    assert err == "blueking-exporter: interrupted, nothing is verified\n"


def test_a_folder_that_cannot_be_used_is_reported_at_once(tmp_path: Path) -> None:
    """Before polling: the folder is not empty, or it is a file. A wrong duration: exit 2."""
    file = tmp_path / "config.yaml"
    file.write_text(json.dumps(configuration("http://127.0.0.1:1")))
    for folder, told in ((tmp_path, "is not empty"), (file, "cannot record into")):
        done = command("verify", f"--config.file={file}", f"--record={folder}")
        assert done.returncode == 1
        assert told in done.stderr
        assert "Traceback" not in done.stderr
    done = command("verify", f"--config.file={file}", "--for=10")
    assert done.returncode == 2
    assert 'want a duration like 30s, 5m, 2h or 7d, not "10"' in done.stderr


async def test_the_traffic_of_the_demo_is_equal(tmp_path: Path) -> None:
    """All collectors beside each other, with traffic that fails, retries and stops."""
    loop = asyncio.get_running_loop()
    platform = create_platform(seed=5, scopes=2, speed=3.0, now=lambda: EPOCH + loop.time())
    nodeman_api.world_of(platform)
    looks = 0

    def monotonic() -> float:
        nonlocal looks
        looks += 1
        return loop.time() + looks * 1e-9

    async with SimulatorServer(platform) as server:
        file = tmp_path / "config.yaml"
        file.write_text(sample_config(server.url, platform))
        clock = Clock(lambda: EPOCH + loop.time(), monotonic)
        found = [line async for line in verify(load(file).config, 420, None, clock)]
    assert all(good for _, good in found), [line for line, good in found if not good]
    assert sum(line.startswith("ok ") for line, _ in found) == 11
