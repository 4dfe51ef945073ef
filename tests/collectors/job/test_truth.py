"""Hours of a business, watched by the daemon and restarted in the middle, against the ledger of what truly happened.

The platform moves in steps of a second, so that a poll sees one moment. Traffic runs five times as fast as life, polls
follow one another within the shortest time between two ends of the same execution: what begins and ends between two
looks is one run to any exporter, and two to the ledger.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from random import Random
from typing import Any, Literal

import pytest

from exporter.model import Host
from exporter.simulator.faults import Fault
from exporter.simulator.ledger import Exporter, HostResults, Truth
from exporter.simulator.traffic import Business, UnusualBusiness
from tests.support.daemon import BIZ, EPOCH, Daemon, Metrics, daemon

pytestmark = pytest.mark.looptime(noop_cycles=2)

SPEED = 5.0
LOOKBACK = 90.0
DAY = 86_400.0
Api = Literal["v4", "v3", "esb"]


def compared(metrics: Metrics, truth: Truth) -> int:
    """Hold every value of a page to the truth; how many there were."""
    expected: dict[str, Mapping[tuple[str, ...], float]] = {
        "executions_created_total": _values(truth.created),
        "executions_finished_total": _values(truth.finished),
        "executions_reopened_total": {(): truth.reopened},
        "executions_lost_total": {(): truth.lost},
        "executions_unfinished": _values(truth.unfinished),
        "oldest_unfinished_timestamp_seconds": _single(truth.oldest_unfinished),
        "execution_duration_seconds_count": _single({name: n for name, (n, _) in truth.durations.items()}),
        "execution_duration_seconds_sum": _single({name: total for name, (_, total) in truth.durations.items()}),
        "execution_wait_seconds_count": _single({name: n for name, (n, _) in truth.waits.items()}),
        "execution_wait_seconds_sum": _single({name: total for name, (_, total) in truth.waits.items()}),
        # Of what had succeeded before the baseline's lookback nobody can know.
        "last_finished_timestamp_seconds": _single(
            {outcome: end for outcome, end in truth.last_finished.items() if end >= EPOCH}
        ),
        "step_failures_total": _single(truth.step_failures),
        "host_results_total": {(): truth.host_results},
        "host_failures_total": _values(truth.host_failures),
        "host_exit_codes_total": _single(truth.exit_codes),
        "hosts_failing": _values(truth.hosts_failing),
        "host_failing_since_timestamp_seconds": {
            (*_host(host), str(failing.code), failing.reason): failing.since for host, failing in truth.failing.items()
        },
        "host_consecutive_failures": {_host(host): failing.consecutive for host, failing in truth.failing.items()},
        "watched_last_finished_timestamp_seconds": {
            labels: end for labels, end in truth.watched_finished.items() if end >= EPOCH
        },
        "watched_last_duration_seconds": {
            (job,): duration for job, (end, duration) in truth.watched_duration.items() if end >= EPOCH
        },
        "watched_unfinished": _single(truth.watched_unfinished),
        "watched_unfinished_since_timestamp_seconds": _single(truth.watched_since),
        "blueking_exporter_collector_truncated_total": {(): truth.truncated},
    }
    labels = {
        "executions_created_total": ("task_type", "launch_mode"),
        "executions_finished_total": ("task_type", "launch_mode", "status"),
        "executions_unfinished": ("task_type", "status"),
        "oldest_unfinished_timestamp_seconds": ("status",),
        "execution_duration_seconds_count": ("task_type",),
        "execution_duration_seconds_sum": ("task_type",),
        "execution_wait_seconds_count": ("task_type",),
        "execution_wait_seconds_sum": ("task_type",),
        "last_finished_timestamp_seconds": ("outcome",),
        "step_failures_total": ("step_type",),
        "host_failures_total": ("code", "reason"),
        "host_exit_codes_total": ("exit_code",),
        "hosts_failing": ("code", "reason"),
        "host_failing_since_timestamp_seconds": ("bk_cloud_id", "bk_host_id", "ip", "code", "reason"),
        "host_consecutive_failures": ("bk_cloud_id", "bk_host_id", "ip"),
        "watched_last_finished_timestamp_seconds": ("job_name", "outcome"),
        "watched_last_duration_seconds": ("job_name",),
        "watched_unfinished": ("job_name",),
        "watched_unfinished_since_timestamp_seconds": ("job_name",),
    }
    for name, values in expected.items():
        shown = metrics.by(name, *labels.get(name, ()))
        if name.endswith("last_finished_timestamp_seconds"):
            shown = {outcome: end for outcome, end in shown.items() if end >= EPOCH}
        elif name == "watched_last_duration_seconds":
            shown = {job: duration for job, duration in shown.items() if job in values}
        elif "bk_host_id" in labels.get(name, ()):
            # Which of its results carried the id of a host depends on the order in which they became known.
            shown = {(cloud, "" if ip else id, ip, *rest): value for (cloud, id, ip, *rest), value in shown.items()}
        # A series at 0 was born at zero, or stays after it was shown: the ledger has none.
        assert {key: value for key, value in shown.items() if value} == {
            key: pytest.approx(value, abs=1e-6) for key, value in values.items() if value
        }, name
    return sum(len([value for value in values.values() if value]) for values in expected.values())


def _values(counter: Mapping[Any, int]) -> dict[tuple[str, ...], float]:
    return {labels: float(value) for labels, value in counter.items()}


def _single(values: Mapping[str, float]) -> dict[tuple[str, ...], float]:
    return {(name,): float(value) for name, value in values.items()}


def _host(host: Host) -> tuple[str, str, str]:
    return host.bk_cloud_id, "" if host.ip else host.bk_host_id, host.ip


def traffic(watched: Daemon) -> None:
    """A business whose life began ten minutes before the exporter's."""
    watched.world.speed = SPEED
    Business(watched.world, BIZ).live(watched.ms - 600_000)


class Calm(Business):
    """A business in which nobody retries: to who comes later, a run and its retry in a downtime are one."""

    def retry(self, number: int) -> None:
        """Nothing."""


def dialect(api: Api) -> Literal["v4", "v3"]:
    return "v4" if api == "v4" else "v3"


def until(metrics: Metrics) -> int:
    """The moment of which a page speaks, ms."""
    watermark = metrics.own("watermark_timestamp_seconds")
    assert watermark is not None
    return int(watermark) * 1000


@pytest.mark.parametrize(("seed", "api"), [(11, "v4"), (12, "v3")])
async def test_what_is_caught_up_after_hours_is_what_happened(tmp_path: Path, seed: int, api: Api) -> None:
    """Two hours of traffic that nobody watched are counted as if somebody had, and failing hosts are known."""
    job = {"interval": "5s", "max_failing_hosts": 10_000}
    async with daemon(tmp_path, tick=1.0, seed=seed, api=api, job=job) as watched:
        watched.world.speed = SPEED
        Calm(watched.world, BIZ).live(watched.ms - 600_000)
        await watched.start()
        for _ in range(2):
            await watched.poll(20)
            await watched.restart(down=7200)
            metrics = await watched.poll(2)
            exporter = Exporter(dialect=dialect(api))
            compared(metrics, watched.world.truth(BIZ, int(EPOCH * 1000), until(metrics), exporter))
        assert metrics.own("gap_seconds_total") == 0


@pytest.mark.parametrize(
    ("seed", "api", "host_results"),
    [
        (1, "v4", "failed"),
        (2, "v4", "failed"),
        (3, "v4", "all"),
        (4, "v3", "failed"),
        (5, "v3", "all"),
        (6, "esb", "failed"),
    ],
)
async def test_what_is_shown_is_what_happened(tmp_path: Path, seed: int, api: Api, host_results: HostResults) -> None:
    """Every value of JOB on the page equals the ledger's, at many moments and over restarts of the daemon."""
    job = {
        "interval": "2s",
        "lookback": f"{LOOKBACK:.0f}s",
        "reopen_window": "200s",
        "host_results": host_results,
        "max_failing_hosts": 10_000,
    }
    exporter = Exporter(host_results, dialect(api))
    values = 0
    async with daemon(tmp_path, tick=1.0, seed=seed, api=api, job=job) as watched:
        traffic(watched)
        await watched.start()
        for minute in range(20):
            if minute % 5 == 4:
                await watched.restart()
            metrics = await watched.poll(30)
            truth = watched.world.truth(BIZ, int(EPOCH * 1000), until(metrics), exporter)
            values += compared(metrics, truth)
        assert metrics.own("gap_seconds_total") == 0
    assert sum(truth.created.values()) > 400
    assert values > 800


async def odd_hours(directory: Path, seed: int, api: Api, host_results: HostResults, executions: int) -> None:
    """Watch a platform that is odd at random until it has created so many executions; compare every few minutes."""
    chance = Random(seed)
    watch = [{"name": "nightly-backup", "as": "nightly"}, {"name": "restart-app"}]
    job = {
        "interval": "4s",
        "lookback": f"{LOOKBACK:.0f}s",
        "reopen_window": "400s",
        "max_unfinished_age": "500s",
        "host_results": host_results,
        "max_failing_hosts": 10_000,
        "watch": watch,
    }
    exporter = Exporter(
        host_results,
        dialect(api),
        lookback=LOOKBACK,
        max_unfinished_age=500,
        watch={"nightly": "nightly-backup", "restart-app": "restart-app"},
        asks_again=90,
    )
    created = 0.0
    async with daemon(directory, tick=1.0, seed=seed, api=api, job=job) as watched:
        watched.world.speed = SPEED
        await watched.start()
        UnusualBusiness(watched.world, BIZ, patient=60, long=LOOKBACK + 20).live(watched.ms)
        while created < executions:
            if chance.random() < 0.2:
                await watched.restart()
            elif chance.random() < 0.5:
                days = chance.choice((8, -8, 400))
                watched.platform.faults.add(Fault("clock_skew", times=1, value=days * DAY))
            metrics = await watched.poll(45)
            while (
                truth := watched.world.truth(BIZ, int(EPOCH * 1000), until(metrics), exporter)
            ).pending or not metrics.own("success"):
                metrics = await watched.poll()
            compared(metrics, truth)
            created = sum(truth.created.values())
        assert metrics.own("gap_seconds_total") == 0
    assert truth.lost + truth.truncated + truth.reopened > executions / 100


@pytest.mark.parametrize(
    ("seed", "api", "host_results"),
    [(21, "v4", "failed"), (22, "v3", "failed"), (23, "esb", "all"), (24, "v4", "none")],
)
async def test_what_is_shown_of_an_unusual_platform_is_what_happened(
    tmp_path: Path, seed: int, api: Api, host_results: HostResults
) -> None:
    """Refused status calls and look-ups, odd times, reused ids, hosts without ids, steps that settle late, statuses
    that change with the same end, wrong Dates, stopped executions that run again: F51, F52, F58, F67 to F70."""
    await odd_hours(tmp_path, seed, api, host_results, 300)


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize(
    ("seed", "api", "host_results"),
    [(31, "v4", "failed"), (32, "v3", "failed"), (33, "esb", "failed"), (34, "v4", "all"), (35, "v3", "all")],
)
async def test_soak_of_an_unusual_platform_there_is_no_difference(
    tmp_path: Path, seed: int, api: Api, host_results: HostResults
) -> None:
    """The same over 25,000 executions in all."""
    await odd_hours(tmp_path, seed, api, host_results, 5000)
