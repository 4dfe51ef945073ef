"""The simulator's ledger of NodeMan V3, over HTTP, beside what a daemon counts of its answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from exporter.simulator import nodemgr_api
from exporter.simulator.nodemgr_world import Part, Target
from exporter.simulator.platform import Platform
from tests.support.components import http
from tests.support.process import BIZ, Daemon, Simulated, by_labels, configuration, select

LABELS = {
    "workflows_finished": ("blueking_nodemgr_workflows_finished_total", ("domain", "workflow_type", "status")),
    "workflows_reopened": ("blueking_nodemgr_workflows_reopened_total", ("domain",)),
    "workflow_durations": ("blueking_nodemgr_workflow_duration_seconds_count", ("domain", "workflow_type")),
    "workflows_unfinished": ("blueking_nodemgr_workflows_unfinished", ("domain", "workflow_type")),
    "host_failures": ("blueking_nodeman_host_failures_total", ("job_type", "step", "code")),
}
HOST = ("bk_cloud_id", "bk_host_id", "ip", "job_type", "step", "code")


def ask(simulated: Simulated, query: str) -> tuple[int, Any]:
    status, body = http(f"{simulated.url}/-/nodemgr/ledger?{query}")
    return status, json.loads(body)


def test_the_ledger_is_what_a_daemon_shows(tmp_path: Path) -> None:
    """Ends, retries, durations, failed operations, failing hosts and what runs, in the labels of /metrics."""
    hosts = [Target(2, f"10.7.0.{number}", number, area=5) for number in range(1, 5)] + [Target(2, "", ipv6="fd00::7")]

    def start(platform: Platform) -> None:
        world = nodemgr_api.world_of(platform)
        parts = [Part(host, "failed" if host.bk_host_id != 2 else "success", "wait_gse_ready", 300) for host in hosts]
        run = world.start("node", "install_agent", parts)
        world.retry(run, {0: Part(hosts[0], "success", "sync_node_info", 200)}, at=run.tries[0].finish + 1500)
        world.start("plugin", "install_plugin", [Part(hosts[1], "timeout", "start_process", 300, "bkmonitorbeat")])
        world.start("node", "upgrade_agent", [Part(hosts[2], "success", "", 10**8)])

    with Simulated(BIZ) as simulated:
        collectors = {"job": {"enabled": False}, "nodemgr": {"enabled": True, "interval": "200ms"}}
        platform = {"nodemgr": {"url": f"{simulated.url}/api/bk-nodemgr/prod"}}
        with Daemon(tmp_path, configuration(simulated.url, blueking=platform, collectors=collectors)) as running:
            running.wait_success(collector="nodemgr")
            since = simulated.do(lambda platform: platform.now())
            simulated.do(start)
            ends = LABELS["workflows_finished"][0]
            running.wait(lambda page: sum(select(page, ends).values()) == 3, 30)
            page = running.wait_success(collector="nodemgr")
        status, truth = ask(simulated, f"bk_biz_id=2&since={since}")
        assert status == 200
        for name, (metric, labels) in LABELS.items():
            shown = by_labels(page, metric, labels)
            assert shown == {tuple(row[label] for label in labels): row["value"] for row in truth[name]}, name
            assert shown, name
        failing = by_labels(page, "blueking_nodeman_host_failing_since_timestamp_seconds", HOST).keys()
        assert failing == {tuple(row[label] for label in HOST) for row in truth["hosts_failing"]}
        assert len(failing) == 3
        assert ask(simulated, "bk_biz_id=3")[1]["workflows_finished"] == []
        for mistake in ("", "bk_biz_id=x", "bk_biz_id=2&since=x"):
            assert ask(simulated, mistake)[0] == 400
