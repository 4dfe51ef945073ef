"""Hours of two businesses in NodeMan V3, watched by a daemon that is stopped and started, against what happened."""

from __future__ import annotations

from pathlib import Path

import pytest

from exporter.model import Scope
from exporter.simulator.nodemgr_world import business
from tests.support.daemon import BIZ, EPOCH
from tests.support.nodemgr import Nodemgr, differences, watched

pytestmark = pytest.mark.looptime(noop_cycles=5)

OTHER = Scope("biz", "3")
CALM = 1500.0
"""Seconds in which every workflow and its retries have ended."""


async def live(directory: Path, seed: int, workflows: int) -> int:
    """Compare again and again until so many workflows have been counted; how many retries were among them."""
    async with watched(directory, scopes=(BIZ, OTHER), seed=seed, nodemgr={"reopen_window": "6h"}) as daemon:
        begin = int((EPOCH - 3600) * 1000)
        daemon.v3.traffic += [
            business(daemon.v3, 2, begin, every=20, others=(3,)),
            business(daemon.v3, 3, begin, every=60),
        ]
        daemon.v3.live()
        await daemon.start()
        born = int((EPOCH + daemon.loop.time()) * 1000)
        counted = retries = 0.0
        while counted < workflows:
            # A retry takes the place of the end before it: what ends twice while nobody looks shows once.
            for down in (0.0, 90.0, 30.0):
                await daemon.poll(40)
                await daemon.restart(down)
            daemon.v3.quiet_until = int((daemon.now() + CALM) * 1000)
            await daemon.poll(int(CALM // 30))
            counted, retries = await compare(daemon, born)
        assert retries > counted / 50
        return int(counted)


async def compare(daemon: Nodemgr, born: int) -> tuple[float, float]:
    """Every number of the page against the truth; how many ends and how many retries there were."""
    page = await daemon.metrics()
    counted = retries = 0
    for scope in (BIZ, OTHER):
        truth = daemon.v3.truth(int(scope.bk_scope_id), born, int(daemon.now() * 1000))
        found = differences(page, truth, scope)
        assert not found, "\n".join(found)
        counted += truth.finished.total()
        retries += truth.reopened.total()
    assert page.total("blueking_exporter_collector_errors_total") == 0
    assert page.total("blueking_exporter_collector_truncated_total") == 0
    assert page.total("blueking_nodemgr_workflows_lost_total") == 0
    return counted, retries


@pytest.mark.timeout(120)
async def test_hours_of_two_businesses(tmp_path: Path) -> None:
    """Ends, retries, durations, failed operations and failing hosts, each exactly as it happened."""
    assert await live(tmp_path, 7, 200) >= 200


@pytest.mark.slow
@pytest.mark.timeout(600)
async def test_2000_workflows(tmp_path: Path) -> None:
    """The same for 2,000 ends."""
    assert await live(tmp_path, 11, 2000) >= 2000
