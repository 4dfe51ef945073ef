"""NodeMan V3 on /metrics, sentence by sentence (contract 4.1, 4.3), over real HTTP and in virtual time."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from exporter.model import Scope
from exporter.simulator.faults import Fault
from exporter.simulator.nodemgr_world import Part
from tests.support.daemon import BIZ, EPOCH
from tests.support.nodemgr import (
    FOREIGN,
    HOSTS,
    failing,
    failures,
    finished,
    own,
    reopened,
    unfinished,
    watched,
)

pytestmark = pytest.mark.looptime(noop_cycles=5)

OTHER = Scope("biz", "3")
FAILED = ("node", "install_agent", "failed")
PART = ("node", "install_agent", "partial_failed")
GOOD = ("node", "install_agent", "success")
WAIT = ("install_agent", "wait_gse_ready", "failed")


async def test_a_run_counts_once_over_polls_and_restarts(tmp_path: Path) -> None:
    async with watched(tmp_path) as daemon:
        await daemon.start()
        daemon.run((HOSTS[0], "success"), (HOSTS[1], "failed"), takes=40)
        page = await daemon.poll()
        assert unfinished(page) == {("node", "install_agent"): 1}
        assert finished(page) == {}
        page = await daemon.poll(3)
        assert finished(page) == {PART: 1}
        assert failures(page) == failing(page) == {WAIT: 1}
        assert unfinished(page) == {}
        await daemon.restart(100)
        page = await daemon.poll(3)
        assert finished(page) == {PART: 1}
        assert failures(page) == failing(page) == {WAIT: 1}


async def test_a_baseline_counts_nothing_and_knows_which_hosts_fail(tmp_path: Path) -> None:
    """What is unfinished then is counted when it ends, however old it is."""
    async with watched(tmp_path) as daemon:
        start = int(EPOCH * 1000)
        failed = [Part(HOSTS[0], "failed", "wait_gse_ready", 1000)]
        daemon.v3.start("node", "install_agent", failed, at=start - 40 * 3_600_000)
        daemon.v3.start("node", "install_agent", failed, at=start - 60 * 3_600_000)
        slow = [Part(HOSTS[1], "success", "", 5 * 86_400_000 + 100_000)]
        daemon.v3.start("node", "upgrade_agent", slow, at=start - 5 * 86_400_000)
        await daemon.start()
        page = await daemon.metrics()
        assert finished(page) == failures(page) == {}
        assert failing(page) == {WAIT: 1}
        assert unfinished(page) == {("node", "upgrade_agent"): 1}
        assert own(page, "success") == 1
        page = await daemon.poll(5)
        assert finished(page) == {("node", "upgrade_agent", "success"): 1}


async def test_a_retry_is_a_run_of_its_own(tmp_path: Path) -> None:
    """It keeps id, start and, until it ends, the finish time. Hosts that stay failed are not counted again."""
    async with watched(tmp_path) as daemon:
        await daemon.start()
        run = daemon.run((HOSTS[0], "failed"), (HOSTS[1], "failed"))
        page = await daemon.poll(2)
        assert finished(page) == {FAILED: 1}
        assert failures(page) == {WAIT: 2}
        await asyncio.sleep(2 * 3600)
        await daemon.poll()
        daemon.again(run, "success", takes=50)
        page = await daemon.poll()
        assert reopened(page) == {("node",): 1}
        assert unfinished(page) == {("node", "install_agent"): 1}
        assert finished(page) == {FAILED: 1}
        page = await daemon.poll(3)
        assert finished(page) == {FAILED: 1, PART: 1}
        assert failures(page) == {WAIT: 2}
        assert failing(page) == {WAIT: 1}
        assert page.total("blueking_nodemgr_workflow_duration_seconds_count") == 1
        daemon.again(run, "", "timeout", step="install_node_by_ssh")
        page = await daemon.poll(2)
        assert reopened(page) == {("node",): 2}
        assert failures(page) == {WAIT: 2, ("install_agent", "install_node_by_ssh", "timeout"): 1}
        assert failing(page) == {("install_agent", "install_node_by_ssh", "timeout"): 1}


async def test_a_retry_between_two_polls_shows_in_its_finish_time(tmp_path: Path) -> None:
    async with watched(tmp_path) as daemon:
        await daemon.start()
        run = daemon.run((HOSTS[0], "failed"))
        await daemon.poll(2)
        await asyncio.sleep(3600)
        page = await daemon.poll()
        daemon.again(run, "success", takes=3)
        page = await daemon.poll()
        assert finished(page) == {FAILED: 1, GOOD: 1}
        assert reopened(page) == {("node",): 1}
        assert failing(page) == {}


async def test_an_end_and_a_retry_between_two_polls(tmp_path: Path) -> None:
    """The row runs again with a new finish time: the status of that end is lost, and this is reported."""
    async with watched(tmp_path) as daemon:
        await daemon.start()
        run = daemon.run((HOSTS[0], "failed"), takes=31)
        page = await daemon.poll()
        assert unfinished(page) == {("node", "install_agent"): 1}
        await asyncio.sleep(5)
        daemon.again(run, "success", takes=80)
        page = await daemon.poll()
        assert (finished(page), reopened(page)) == ({}, {("node",): 1})
        assert own(page, "truncated_total") == 1
        page = await daemon.poll(4)
        assert (finished(page), reopened(page)) == ({GOOD: 1}, {("node",): 1})
        assert page.total("blueking_nodemgr_workflow_duration_seconds_sum") == 31


async def test_a_retry_that_runs_at_the_baseline_gives_no_duration(tmp_path: Path) -> None:
    async with watched(tmp_path) as daemon:
        failed = [Part(HOSTS[0], "failed", "wait_gse_ready", 1000)]
        run = daemon.v3.start("node", "install_agent", failed, at=int((EPOCH - 100) * 1000))
        daemon.again(run, "success", takes=100)
        await daemon.start()
        page = await daemon.poll(6)
        assert (finished(page), reopened(page)) == ({GOOD: 1}, {})
        assert page.total("blueking_nodemgr_workflow_duration_seconds_count") == 0


async def test_the_old_end_shown_after_a_retry_counts_nothing(tmp_path: Path) -> None:
    """Right after a retry the platform may show the end of the try before."""
    async with watched(tmp_path) as daemon:
        await daemon.start()
        run = daemon.run((HOSTS[0], "failed"))
        await daemon.poll(2)
        daemon.again(run, "success", takes=100)
        page = await daemon.poll()
        assert reopened(page) == {("node",): 1}
        run.settling = 40_000
        page = await daemon.poll()
        assert finished(page) == {FAILED: 1}
        run.settling = 0
        page = await daemon.poll(4)
        assert finished(page) == {FAILED: 1, GOOD: 1}
        assert reopened(page) == {("node",): 1}


async def test_hosts_of_several_businesses_count_in_their_own(tmp_path: Path) -> None:
    async with watched(tmp_path, scopes=(BIZ, OTHER)) as daemon:
        await daemon.start()
        daemon.run((HOSTS[0], "failed"), (FOREIGN[0], "failed"), (FOREIGN[1], "timeout"))
        page = await daemon.poll(2)
        assert finished(page) == finished(page, OTHER) == {FAILED: 1}
        assert failures(page) == {WAIT: 1}
        assert failures(page, OTHER) == {WAIT: 1, ("install_agent", "wait_gse_ready", "timeout"): 1}


async def test_two_failed_plugins_of_a_host_are_two_failures_of_one_host(tmp_path: Path) -> None:
    async with watched(tmp_path) as daemon:
        await daemon.start()
        parts = [Part(HOSTS[0], "failed", "start_process", 1000 + number, name) for number, name in enumerate("ab")]
        daemon.v3.start("plugin", "install_plugin", parts)
        page = await daemon.poll(2)
        assert finished(page) == {("plugin", "install_plugin", "failed"): 1}
        assert failures(page) == {("install_plugin", "start_process", "failed"): 2}
        assert failing(page) == {("install_plugin", "start_process", "failed"): 1}


async def test_a_host_fails_until_a_newer_success(tmp_path: Path) -> None:
    """Successful runs are asked for their hosts only while a host fails."""
    async with watched(tmp_path) as daemon:
        await daemon.start()
        daemon.run((HOSTS[0], "success"), (HOSTS[1], "success"))
        await daemon.poll(2)
        assert daemon.asked()["node_operation_list"] == 0
        daemon.run((HOSTS[0], "terminated"))
        page = await daemon.poll(2)
        assert failing(page) == {("install_agent", "wait_gse_ready", "terminated"): 1}
        assert finished(page)[PART] == 1, "a terminated run has failed in part"
        daemon.run((HOSTS[0], "success"), type="restart_agent")
        page = await daemon.poll(2)
        assert failing(page) == {}


async def test_a_run_waits_for_rows_that_still_run_five_polls(tmp_path: Path) -> None:
    async with watched(tmp_path) as daemon:
        await daemon.start()
        daemon.run((HOSTS[0], "failed"), row_lag=70_000)
        daemon.run((HOSTS[1], "failed"), row_lag=10**9, type="upgrade_agent")
        page = await daemon.poll(2)
        assert finished(page) == failures(page) == {}
        page = await daemon.poll(3)
        assert finished(page) == {FAILED: 1}
        assert failures(page) == {WAIT: 1}
        page = await daemon.poll(3)
        assert finished(page) == {FAILED: 1, ("node", "upgrade_agent", "failed"): 1}
        assert own(page, "truncated_total") == 1


async def test_a_refused_operation_list_leaves_the_run_counted(tmp_path: Path) -> None:
    """A run is listed for one of its businesses; its hosts need the right on all of them."""
    async with watched(tmp_path) as daemon:
        await daemon.start()
        daemon.v3.denied = {3}
        daemon.run((HOSTS[0], "failed"), (FOREIGN[0], "failed"))
        page = await daemon.poll(2)
        assert finished(page) == {FAILED: 1}
        assert failures(page) == {}
        assert own(page, "truncated_total") == 1
        assert own(page, "errors_total", reason="permission") == 1
        assert own(page, "success") == 1


async def test_an_operation_list_that_fails_for_now_fails_five_polls(tmp_path: Path) -> None:
    """An unknown id is a 500; it is not asked for without end."""
    async with watched(tmp_path) as daemon:
        await daemon.start()
        daemon.platform.faults.add(Fault("http_500", api="node_operation_list"))
        daemon.run((HOSTS[0], "failed"))
        page = await daemon.poll(5)
        assert finished(page) == {}
        page = await daemon.poll(3)
        assert finished(page) == {FAILED: 1}
        assert own(page, "truncated_total") == 1


async def test_unfinished_ones_are_given_up(tmp_path: Path) -> None:
    """By their age, or when the platform no longer knows them."""
    async with watched(tmp_path, nodemgr={"max_unfinished_age": "2h"}) as daemon:
        await daemon.start()
        daemon.run((HOSTS[0], "success"), stuck=True)
        gone = daemon.run((HOSTS[1], "success"), takes=10**6)
        await daemon.poll(2)
        await asyncio.sleep(1200)
        del daemon.v3.workflows["node", gone.id]
        page = await daemon.poll(2)
        assert page.by("blueking_nodemgr_workflows_lost_total", "domain") == {("node",): 1}
        await asyncio.sleep(2 * 3600)
        page = await daemon.poll(2)
        assert page.by("blueking_nodemgr_workflows_lost_total", "domain") == {("node",): 2}
        assert unfinished(page) == {}


async def test_4_1_what_is_given_up_is_lost_once(tmp_path: Path) -> None:
    """Also while the lists still show it; what happens to it then is not counted."""
    async with watched(tmp_path, nodemgr={"max_unfinished_age": "2m"}) as daemon:
        await daemon.start()
        daemon.run((HOSTS[0], "success"), takes=400)
        page = await daemon.poll(2)
        assert unfinished(page) == {("node", "install_agent"): 1}
        for _ in range(3):
            page = await daemon.poll(6)
            assert page.by("blueking_nodemgr_workflows_lost_total", "domain") == {("node",): 1}
            assert unfinished(page) == {}
            await daemon.restart()
        assert (finished(page), reopened(page)) == ({}, {})


async def test_4_1_11_a_workflow_without_a_start_is_no_execution(tmp_path: Path) -> None:
    """It lies in no window and has no age: it is named, and neither counted nor lost."""

    def without_start(path: str, answer: dict[str, Any]) -> dict[str, Any]:
        if path.endswith("/node/workflow/list"):
            answer["data"]["items"] = [{**row, "operate_time": 0} for row in answer["data"]["items"]]
        return answer

    async with watched(tmp_path, change=without_start) as daemon:
        await daemon.start()
        daemon.run((HOSTS[0], "success"), takes=100)
        page = await daemon.poll(6)
        assert finished(page) == unfinished(page) == page.by("blueking_nodemgr_workflows_lost_total", "domain") == {}
        assert own(page, "success") == 1
        unknown = ("blueking_exporter_unknown_values_total", frozenset({("field", "nodemgr.operate_time")}))
        assert page.samples[unknown] > 0


async def test_4_3_every_failed_host_of_a_run_from_after_the_baseline_is_counted(tmp_path: Path) -> None:
    """Also where the platform lists the run late, and where an operation still ran when the run had ended."""
    async with watched(tmp_path) as daemon:
        await daemon.start()
        parts = [Part(HOSTS[0], "failed", "wait_gse_ready", 5_000), Part(HOSTS[1], "failed", "wait_gse_ready", 6_000)]
        late = daemon.v3.start("node", "install_agent", parts, at=int((daemon.now() - 20) * 1000))
        late.row_lag = 60_000
        page = await daemon.poll(3)
        assert finished(page) == {FAILED: 1}
        assert failures(page) == failing(page) == {WAIT: 2}


async def test_a_long_history_is_read_in_slices_and_the_gap_is_reported(tmp_path: Path) -> None:
    """More rows of one second than a page holds lose none; what lies further back than max_catchup is a gap."""
    async with watched(tmp_path, nodemgr={"max_catchup": "5h"}) as daemon:
        await daemon.start()
        await daemon.stop()
        base = int(daemon.now() * 1000)
        for number in range(3000):
            at = base + 3_600_000 * 2 + (0 if number < 700 else number * 3000)
            daemon.v3.start("plugin", "install_plugin", [Part(HOSTS[0], "success", "", 1000)], at=at)
        await asyncio.sleep(6 * 3600)
        await daemon.start()
        page = await daemon.poll(2)
        assert finished(page) == {("plugin", "install_plugin", "success"): 3000}
        assert 3500 < own(page, "gap_seconds_total") < 3700


async def test_an_account_with_rights_on_agents_only(tmp_path: Path) -> None:
    """Without the filter the list of nodes leaves out what the account may see, without an error."""
    async with watched(tmp_path, nodemgr={"node_roles": ["agent", "blank"]}) as daemon:
        daemon.v3.roles = {"agent", "blank"}
        await daemon.start()
        daemon.run((HOSTS[0], "success"))
        daemon.run((HOSTS[1], "success"), type="install_proxy")
        page = await daemon.poll(2)
        assert finished(page) == {GOOD: 1}


async def test_unusual_rows_of_older_versions(tmp_path: Path) -> None:
    async with watched(tmp_path) as daemon:
        daemon.v3.zero, daemon.v3.nulls = -62135596800000, True
        await daemon.start()
        daemon.run((HOSTS[0], "failed"), takes=40)
        page = await daemon.poll()
        assert unfinished(page) == {("node", "install_agent"): 1}
        page = await daemon.poll(2)
        assert finished(page) == {FAILED: 1}
        assert failures(page) == {WAIT: 1}


async def test_a_quiet_poll_costs_four_calls(tmp_path: Path) -> None:
    async with watched(tmp_path) as daemon:
        await daemon.start()
        daemon.run((HOSTS[0], "success"))
        await daemon.poll(3)
        begin = daemon.loop.time()
        await daemon.poll(10)
        assert daemon.asked(begin) == {"node_workflow_list": 20, "plugin_workflow_list": 20}


async def test_failures_name_the_workflow_and_its_page(tmp_path: Path) -> None:
    async with watched(tmp_path) as daemon:
        await daemon.start()
        run = daemon.run((HOSTS[0], "failed"))
        await daemon.poll(2)
        status, body = await daemon.ask("/api/v1/failures")
        assert status == 200
        found = json.loads(body)
        url = f"https://nodemgr.example.com/#/node-manager/history/detail/{run.id.replace(':', '%3A')}"
        for one in (found["hosts"][0], found["executions"][0]):
            assert (one["collector"], one["workflow_id"], one["url"]) == ("nodemgr", run.id, url)
        status, body = await daemon.ask("/failures")
        assert status == 200
        assert url.encode() in body
