"""kill -9 at any moment: of NodeMan V3 nothing is lost, nothing counted twice, and no counter that was seen falls."""

from __future__ import annotations

import contextlib
import random
import time
from pathlib import Path
from typing import Any

import pytest

from exporter.simulator import nodemgr_api
from exporter.simulator.nodemgr_world import Part, Target, Truth
from exporter.simulator.platform import Platform
from tests.support.components import eventually
from tests.support.daemon import BIZ
from tests.support.process import Daemon, Samples, Simulated, by_labels, configuration, total

KILLS = 15
WATERMARK = "blueking_exporter_collector_watermark_timestamp_seconds"
OWN = {"bk_scope_type": "biz", "bk_scope_id": "2"}


class Traffic:
    """Short workflows over hosts of their own, a few at each step; some that have been counted are retried."""

    def __init__(self, simulated: Simulated, seed: int) -> None:
        self.random = random.Random(seed)
        self._simulated = simulated
        self._host = 0

    def step(self) -> None:
        self._simulated.do(self._start)

    def _start(self, platform: Platform) -> None:
        world = nodemgr_api.world_of(platform)
        for _ in range(self.random.randint(1, 4)):
            parts = []
            for _ in range(self.random.randint(1, 3)):
                self._host += 1
                state = self.random.choice(("success", "success", "failed", "timeout"))
                parts.append(Part(Target(2, f"10.0.0.{self._host}", self._host), state, "start_process", 100))
            if self.random.random() < 0.5:
                world.start("node", "install_agent", parts)
            else:
                world.start("plugin", "install_plugin", parts)

    def retry(self, before: float) -> None:
        """Retry the failed operations of a workflow whose end the daemon has counted: it lies before its watermark."""

        def retry(platform: Platform) -> None:
            world = nodemgr_api.world_of(platform)
            for one in world.workflows.values():
                if len(one.tries) == 1 and one.status(0) != "success" and one.tries[0].finish < before * 1000 - 1:
                    again = {
                        number: Part(part.target, "success", "start_process", 200)
                        for number, (_, part) in one.newest(0).items()
                        if part.state != "success"
                    }
                    world.retry(one, again)
                    return

        self._simulated.do(retry)


def shown(page: Samples) -> dict[str, Any]:
    v3, host = "blueking_nodemgr_workflows", ("job_type", "step", "code")
    found: dict[str, Any] = {}
    for name, family, labels in (
        ("finished", f"{v3}_finished_total", ("domain", "workflow_type", "status")),
        ("reopened", f"{v3}_reopened_total", ("domain",)),
        ("durations", "blueking_nodemgr_workflow_duration_seconds_count", ("domain", "workflow_type")),
        ("failures", "blueking_nodeman_host_failures_total", host),
        ("failing", "blueking_nodeman_hosts_failing", host),
    ):
        found[name] = by_labels(page, family, labels, **OWN)
    return found


def expected(truth: Truth) -> dict[str, Any]:
    failing: dict[tuple[str, str, str], float] = {}
    for labels in truth.failing.values():
        failing[labels] = failing.get(labels, 0) + 1
    return {
        "finished": dict(truth.finished),
        "reopened": {(domain,): count for domain, count in truth.reopened.items()},
        "durations": dict(truth.durations),
        "failures": dict(truth.failures),
        "failing": failing,
    }


@pytest.mark.timeout(150)
def test_kills_lose_and_double_nothing(tmp_path: Path) -> None:
    draw = random.Random(5)
    highest: dict[object, float] = {}

    def no_counter_fell(page: Samples) -> None:
        for key, value in page.items():
            if key[0].startswith("blueking_nodem") and key[0].endswith(("_total", "_count", "_bucket", "_sum")):
                assert value >= highest.get(key, 0.0), f"{key} fell from {highest[key]} to {value}"
                highest[key] = value

    with Simulated(BIZ) as simulated:
        config = configuration(simulated.url)
        del config["blueking"]["job"]
        config["blueking"]["nodemgr"] = {"url": f"{simulated.url}/api/bk-nodemgr/prod"}
        config["collectors"] = {"nodemgr": {"enabled": True, "interval": "100ms", "lookback": "60s"}}
        daemon = Daemon(tmp_path, config)
        try:
            daemon.start()
            daemon.wait_success(collector="nodemgr")
            since = int(time.time() * 1000)
            time.sleep(0.01)
            traffic = Traffic(simulated, 5)
            for number in range(KILLS):
                traffic.step()
                if number % 4 == 3:
                    time.sleep(draw.uniform(0, 0.7))  # before or while it starts
                else:
                    daemon.url = eventually(daemon.address, 20, 0.01)
                    page = daemon.wait_success(collector="nodemgr") if number % 2 else daemon.metrics()
                    no_counter_fell(page)
                    with contextlib.suppress(KeyError):
                        traffic.retry(total(page, WATERMARK, collector="nodemgr"))
                    traffic.step()
                    time.sleep(draw.uniform(0, 0.4))
                daemon.kill()
                daemon.spawn()
            daemon.url = eventually(daemon.address, 20, 0.01)
            time.sleep(0.5)
            page = daemon.wait_success(collector="nodemgr")
            no_counter_fell(page)
            truth = simulated.do(
                lambda platform: nodemgr_api.world_of(platform).truth(2, since, int(platform.now() * 1000))
            )
            assert truth.finished.total() > 30
            assert truth.reopened
            assert shown(page) == expected(truth)
            assert daemon.stop() == 0
        finally:
            daemon.kill()
