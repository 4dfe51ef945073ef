"""`log.executions`: one event per counted end of an execution or job, written after the commit."""

from __future__ import annotations

import contextlib
import json
import signal
import sqlite3
from collections import Counter
from pathlib import Path
from typing import Any
from urllib.parse import quote

from exporter.simulator import nodemgr_api, nodemgr_world
from exporter.simulator.nodeman_api import world_of
from exporter.simulator.nodeman_world import make_hosts
from exporter.simulator.world import StepScript, target
from tests.support.components import eventually
from tests.support.process import BIZ, FINISHED, Daemon, Simulated, configuration, merged, select, total

NODEMAN_FINISHED = "blueking_nodeman_jobs_finished_total"


def logging(simulated: Simulated, wanted: str, **changes: Any) -> dict[str, Any]:
    """A configuration that logs these ends as JSON."""
    config = configuration(simulated.url, log={"format": "json", "executions": wanted})
    return merged(config, {"blueking": {"job": {"web_url": "https://job.example.com"}}, **changes})


def events(running: Daemon) -> list[dict[str, Any]]:
    """The events of this run so far."""
    lines = [json.loads(line) for line in running.log.splitlines() if line.startswith("{")]
    return [line for line in lines if line["event"] == "execution_finished"]


def finish(simulated: Simulated, name: str, *results: int, **arguments: Any) -> int:
    """An execution that has ended by now, on one host per result."""
    hosts = {target(number): code for number, code in enumerate(results, 1)}
    return simulated.start(name=name, steps=[StepScript(duration=0.0, results=hosts)], **arguments)


def test_each_counted_end_is_one_event(tmp_path: Path, simulated: Simulated) -> None:
    """`all`: with ids, name, status, times, failed hosts by code and the address. A retry that ends is another one;
    what had ended before the baseline is none, and a restart repeats none."""
    finish(simulated, "before the baseline", 9)
    with Daemon(tmp_path, logging(simulated, "all")) as running:
        running.wait_success()
        good = finish(simulated, "备份 backup", 9)
        bad = finish(simulated, "broken", 104, 104, 310, 9)
        running.wait_success()
        found = {event["job_instance_id"]: event for event in events(running)}
        assert found.keys() == {good, bad}
        row = simulated.do(lambda platform: platform.job.find(BIZ, bad))
        assert row is not None
        event = found[bad]
        assert event | {"start": "", "end": "", "timestamp": ""} == {
            "timestamp": "", "level": "info", "event": "execution_finished", "collector": "job", "scope": "biz/2",
            "job_instance_id": bad, "name": "broken", "status": "failed", "start": "", "end": "",
            "failed_hosts": "104:2 310:1", "url": f"https://job.example.com/api_execute/{bad}",
        }  # fmt: skip
        assert event["start"] <= event["end"] <= event["timestamp"]
        assert (found[good]["name"], found[good]["status"], found[good]["failed_hosts"]) == (
            "备份 backup",
            "success",
            "",
        )

        simulated.do(lambda platform: platform.job.retry(bad, duration=0.0))
        page = running.wait_success()
        assert [event["status"] for event in events(running) if event["job_instance_id"] == bad] == [
            "failed",
            "success",
        ]
        assert len(events(running)) == total(page, FINISHED) == 3
        assert running.stop() == 0
    with Daemon(tmp_path, logging(simulated, "all")) as running:
        running.wait_success()
        assert events(running) == []


def test_only_failures_and_only_when_asked_for(tmp_path: Path, simulated: Simulated) -> None:
    """`none` is the default, `failed` leaves out success and what a user stopped; a reload changes it."""
    with Daemon(tmp_path, logging(simulated, "none")) as running:
        running.wait_success()
        finish(simulated, "unlogged", 104)
        running.wait_success()
        running.write(logging(simulated, "failed"))
        running.signal(signal.SIGHUP)
        eventually(lambda: '"event":"reloaded"' in running.log, 10, 0.02)
        assert "restart_needed" not in running.log
        finish(simulated, "good", 9)
        finish(simulated, "stopped", 9, outcome=11, stopping_for=0.0)
        finish(simulated, "bad", 104)
        page = running.wait_success()
        assert total(page, FINISHED) == 4
        assert [event["name"] for event in events(running)] == ["bad"]


def test_what_is_not_committed_is_not_logged(tmp_path: Path, simulated: Simulated) -> None:
    """While commits fail an end is not logged; the poll that commits it logs it once."""
    with Daemon(tmp_path, logging(simulated, "all")) as running:
        running.wait_success()
        with contextlib.closing(sqlite3.connect(tmp_path / "state.db")) as other:
            other.execute("BEGIN IMMEDIATE")
            finish(simulated, "held up", 9)
            running.wait(lambda page: bool(select(page, "blueking_exporter_collector_errors_total", reason="state")))
            assert events(running) == []
        running.wait(lambda page: total(page, FINISHED) == 1)
        eventually(lambda: events(running), 10, 0.02)
        running.wait_success()
        assert Counter(event["name"] for event in events(running)) == {"held up": 1}


def test_jobs_of_nodeman_are_events_too(tmp_path: Path, simulated: Simulated) -> None:
    """With their id, type, status, the steps in which hosts failed, and the address."""
    changes = {
        "blueking": {"nodeman": {"url": f"{simulated.url}/api/bk-nodeman/prod", "web_url": "https://nm.example.com"}},
        "collectors": {"job": {"enabled": False}, "nodeman_job": {"enabled": True, "interval": "200ms"}},
    }
    hosts = make_hosts(2, 4)

    def start(platform: Any) -> int:
        outcomes = dict.fromkeys(hosts[:2]) | dict.fromkeys(hosts[2:], "install")
        job: int = world_of(platform).start_job("INSTALL_AGENT", outcomes, duration=0.5).id
        return job

    with Daemon(tmp_path, logging(simulated, "failed", **changes)) as running:
        running.wait_success(collector="nodeman_job")
        job = simulated.do(start)
        # The platform's own statistics task comes by every 30 s.
        running.wait(lambda page: bool(select(page, NODEMAN_FINISHED, status="part_failed")), 60)
        (event,) = eventually(lambda: events(running), 10, 0.02)
        assert {name: event[name] for name in ("collector", "job_id", "name", "status", "failed_hosts", "url")} == {
            "collector": "nodeman_job", "job_id": job, "name": "INSTALL_AGENT", "status": "part_failed",
            "failed_hosts": "install:2", "url": f"https://nm.example.com/#/task-list/detail/{job}",
        }  # fmt: skip


def test_workflows_of_nodeman_v3_are_events_too(tmp_path: Path, simulated: Simulated) -> None:
    """With their text id, type, status, the hosts that failed by code, and the address; a retry is another event."""
    changes = {
        "blueking": {"nodemgr": {"url": f"{simulated.url}/api/bk-nodemgr/prod", "web_url": "https://nm3.example.com"}},
        "collectors": {"job": {"enabled": False}, "nodemgr": {"enabled": True, "interval": "200ms"}},
    }
    hosts = [nodemgr_world.Target(2, f"10.7.0.{number}", number) for number in range(1, 4)]

    def start(platform: Any) -> nodemgr_world.Workflow:
        parts = [
            nodemgr_world.Part(host, state, "start_process", 100, plugin)
            for host, state in zip(hosts, ("failed", "timeout", "success"), strict=True)
            for plugin in ("bkmonitorbeat", "bkunifylogbeat")
        ]
        world = nodemgr_api.world_of(platform)
        world.start("plugin", "restart_plugin", parts[-2:])
        return world.start("plugin", "install_plugin", parts)

    def retry(platform: Any) -> None:
        parts = {at: nodemgr_world.Part(hosts[at // 2], "failed", "start_process", 100) for at in range(2)}
        nodemgr_api.world_of(platform).retry(run, parts)

    with Daemon(tmp_path, logging(simulated, "failed", **changes)) as running:
        running.wait_success(collector="nodemgr")
        run = simulated.do(start)
        (event,) = eventually(lambda: events(running), 10, 0.02)
        names = ("collector", "scope", "workflow_id", "name", "status", "failed_hosts", "url")
        assert {name: event[name] for name in names} == {
            "collector": "nodemgr", "scope": "biz/2", "workflow_id": run.id, "name": "install_plugin",
            "status": "partial_failed", "failed_hosts": "failed:1 timeout:1",
            "url": f"https://nm3.example.com/#/node-manager/history/detail/{quote(run.id)}?active=plugin",
        }  # fmt: skip
        assert event["start"] < event["end"] <= event["timestamp"]
        simulated.do(retry)
        eventually(lambda: len(events(running)) == 2, 10, 0.02)
        page = running.wait_success(collector="nodemgr")
        assert [line["workflow_id"] for line in events(running)] == [run.id, run.id]
        assert total(page, "blueking_nodemgr_workflows_finished_total") == 3
