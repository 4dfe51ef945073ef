"""F45: a month of polls in virtual time leaves behind no task, no descriptor and no memory.

All pollers run as in the daemon, over HTTP against a simulated platform on which something happens every two hours,
with scrapes, and a reload every day. NodeMan is busy once a day: the product remembers some thousand of its time texts.
"""

from __future__ import annotations

import asyncio
import gc
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec
import pytest

from exporter.clock import Clock
from exporter.config.load import load
from exporter.exposed import page_families
from exporter.fleet import Fleet
from exporter.metrics.negotiate import Format
from exporter.metrics.page import Page
from exporter.model import Scope
from exporter.poller import Services
from exporter.simulator import nodeman_api, nodeman_world
from exporter.simulator.platform import Platform
from exporter.simulator.server import SimulatorServer
from exporter.simulator.world import StepScript, target
from exporter.state.memory import MemoryStore
from exporter.telemetry import Telemetry

SCOPES = (Scope("biz", "2"), Scope("biz", "3"))
HOUR = 3600.0
DAYS = 30


class Left(msgspec.Struct, frozen=True):
    """What there is after a day."""

    tasks: Sequence[str]
    descriptors: int
    blocks: int


def left() -> Left:
    gc.collect()
    tasks = sorted(task.get_name() for task in asyncio.all_tasks() if not task.get_name().startswith("Task-"))
    return Left(tasks, len(os.listdir("/proc/self/fd")), sys.getallocatedblocks())


def happen(platform: Platform, hour: int) -> None:
    """In each scope an execution that fails or succeeds on some of ten hosts, and once a day a job of NodeMan."""
    for number, scope in enumerate(SCOPES):
        biz = int(scope.bk_scope_id)
        codes = {target(biz * 100 + host): (104, 1) if (host + hour) % 7 == 0 else 9 for host in range(10)}
        platform.job.start(scope, plan_id=1001 + hour % 5, task_type=0, steps=[StepScript(1, 60.0, codes)])
        if hour % 24 == 0:
            host = nodeman_world.Target(biz, f"10.0.{biz}.{hour % 9}", biz * 1000 + hour % 9)
            outcome = "gse_operate_proc" if (hour // 24 + number) % 5 == 0 else None
            nodeman_api.world_of(platform).start_job("MAIN_RESTART_PLUGIN", {host: outcome})


@pytest.mark.timeout(400)
@pytest.mark.looptime(noop_cycles=2)
async def test_F45_a_month_leaves_nothing_behind(tmp_path: Path) -> None:
    """After the first days the last ones have the same tasks and descriptors, and as much memory to within 2 %."""
    loop = asyncio.get_running_loop()
    started = loop.time()

    def now() -> float:
        return 1_789_000_000.0 + loop.time() - started

    platform = Platform(scopes=SCOPES, now=now)
    platform.job.keep_for(5 * HOUR)
    nodeman_api.world_of(platform).keep_for(5 * HOUR)
    policy = nodeman_api.world_of(platform).start_subscription("MAIN_INSTALL_PLUGIN", {}).id
    async with SimulatorServer(platform) as server:
        file = tmp_path / "config.yaml"
        file.write_text(
            f"""\
blueking:
  job: {{url: "{server.url}/api/bk-job/prod"}}
  nodeman: {{url: "{server.url}/api/bk-nodeman/prod"}}
  auth: {{app_code: blueking-exporter, app_secret: simulated, username: admin}}
  requests_per_second: 1000
collectors:
  job: {{interval: 2h, lookback: 4h, reopen_window: 6h, failing_host_ttl: 49h}}
  nodeman_job: {{enabled: true, interval: 2h, max_finished_age: 6h}}
  nodeman_subscription: {{enabled: true, interval: 2h, subscription_ids: [{policy}]}}
scopes:
- {{bk_scope_type: biz, bk_scope_id: "2"}}
- {{bk_scope_type: biz, bk_scope_id: "3"}}
"""
        )
        page, telemetry = Page(page_families()), Telemetry()
        async with Fleet(Services(MemoryStore(), page, telemetry, Clock(now, loop.time))) as fleet:
            days = []
            for day in range(DAYS):
                assert await fleet.apply(load(file).config)
                for hour in range(0, 24, 2):
                    happen(platform, 24 * day + hour)
                    await asyncio.sleep(2 * HOUR)
                    for form in Format:
                        b"".join(page.exposition(form, extra=telemetry.render(form.openmetrics)))
                platform.calls.clear()
                days.append(left())
            assert all(poller.success for poller in fleet.pollers.values())
            await fleet.stop()
    assert {len(day.tasks) for day in days[3:]} == {0}, "between two polls there is no task"
    assert len({day.descriptors for day in days[3:]}) == 1
    early, late = (sorted(day.blocks for day in some)[2] for some in (days[3:8], days[-5:]))
    assert late < early * 1.02, [day.blocks for day in days]
