"""F57, contract 4.1.13: whatever label values the platform invents, the page stays small and counts stay exact."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from exporter.metrics.bounds import MOST_VALUES, OTHER
from exporter.simulator.nodeman_world import Target as NodemanTarget
from exporter.simulator.world import StepScript, target
from tests.support.daemon import BIZ, MEMORY, Metrics, daemon
from tests.support.nodeman import failing, nodeman, watched

pytestmark = pytest.mark.looptime(noop_cycles=2)


def series(page: Metrics) -> int:
    return sum(not line.startswith("#") for line in page.text.splitlines())


def values(page: Metrics, family: str, label: str) -> set[str]:
    return {value for (value,) in page.by(family, label)}


def numbered(count: int, biz: int = 2) -> Iterator[NodemanTarget]:
    return (NodemanTarget(biz, f"10.{n >> 16}.{n >> 8 & 255}.{n & 255}", n) for n in range(1, count + 1))


async def test_F57_unknown_host_codes_by_the_thousand(tmp_path: Path) -> None:
    """64 of them are named, by counter and gauges alike, before and after a restart; hosts and failures add up."""
    async with daemon(tmp_path) as one:
        await one.start()
        for begin in (0, 1000):
            results = {target(number): 5000 + number for number in range(begin, begin + 1000)}
            one.world.start(steps=[StepScript(duration=3.0, results=results)], scope=BIZ)
            page = await one.poll(2)
            await one.restart()
        after = await one.poll()
        for shown in (page, after):
            named = values(shown, "host_failures_total", "code")
            assert len(named) == MOST_VALUES + 1
            assert OTHER in named
            assert values(shown, "hosts_failing", "code") == named
            assert values(shown, "host_failing_since_timestamp_seconds", "code") <= named
            assert shown.total("host_failures_total") == shown.total("hosts_failing") == 2000


async def test_F57_three_thousand_job_types(tmp_path: Path) -> None:
    """The whole page stays within max_series, that of the process included, and no job and no host is lost."""
    settings = {"interval": "5m", "max_finished_age": "30m", "failing_host_ttl": "1h"}
    async with watched(tmp_path, job=settings, max_series=1000) as one:
        await one.start()
        hosts = list(numbered(3000))
        for begin in range(0, 3000, 1000):
            for number in range(begin, begin + 1000):
                outcome = "install" if number % 10 == 0 else None
                one.nodeman.start_job(f"KIND_{number}_AGENT", {hosts[number]: outcome}, duration=20.0)
            page = await one.poll(2)
            assert series(page) <= 1000
            assert page.total(nodeman("jobs_finished_total")) == begin + 1000
            assert sum(failing(page).values()) == (begin + 1000) / 10
        before = page.by(nodeman("jobs_finished_total"), "job_type", "status")
        await one.restart()
        page = await one.poll()
        assert series(page) <= 1000
        assert page.by(nodeman("jobs_finished_total"), "job_type", "status") == before
        await asyncio.sleep(3700)
        page = await one.poll()
        assert series(page) <= 1000, "what stays at 0 is bounded too"
        assert sum(failing(page).values()) == 0


async def test_F57_a_new_err_code_in_every_poll(tmp_path: Path) -> None:
    """A NodeMan 1.x task whose host fails with a new code in every poll: later codes are `other`."""
    async with watched(tmp_path, task={"job_ids": [1]}, state=MEMORY) as one:
        (host,) = numbered(1)
        task = one.nodeman.start_legacy_task(2, "INSTALL_AGENT", {host: None}, duration=1.0)
        one.set("nodeman_task", job_ids=[task.id])
        await one.start()
        sizes = []
        for number in range(100):
            (row,) = task.hosts
            row.begin, row.end = one.now(), one.now() + 40
            await one.poll()
            row.end, row.err_code = one.now(), f"E{number}"
            page = await one.poll()
            sizes.append(series(page))
        assert page.total(nodeman("host_failures_total")) == 100
        assert len(values(page, nodeman("host_failures_total"), "code")) == MOST_VALUES + 1
        assert len(values(page, nodeman("hosts_failing"), "code")) <= MOST_VALUES + 1
        assert len(set(sizes[70:])) == 1
